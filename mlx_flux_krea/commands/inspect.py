"""flux-krea inspect: what a file or folder is. Reads headers, never tensors."""

import json
import math
from pathlib import Path

import click


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect(path, as_json):
    """Say what PATH is: a model folder or the name of an installed one, foreign weights, or a picture made here.

    \b
    Examples:
      flux-krea inspect flux1-krea-dev.safetensors
      flux-krea inspect out.png
    """
    from mlx_flux_krea.convert.sources import is_model_folder
    from mlx_flux_krea.errors import ModelError, printable
    from mlx_flux_krea.home import named
    from mlx_flux_krea.provenance import FORMATS

    path = named(path)
    if not path.exists():
        raise ModelError(f"there is nothing at {path}", "a file or a folder")
    if path.suffix.lower() in FORMATS:
        facts, lines = _picture(path)
    elif is_model_folder(path):
        facts, lines = _model(path)
    else:
        facts, lines = _foreign(path)
    click.echo(_json(facts) if as_json else "\n".join(map(printable, lines.split("\n"))))


def _picture(path: Path) -> tuple[dict, str]:
    from mlx_flux_krea.provenance import read_picture

    from .shared.terminal import table

    facts = read_picture(path)
    if not any(facts.values()):
        return {"kind": "picture", **facts}, f"{path} carries no record of ours"
    about = {"made by": facts["source_type"] or "not said", "software": facts["software"] or "not said"}
    if facts["record"] is None and facts["parameters"]:
        about["parameters"] = facts["parameters"]
    return {"kind": "picture", **facts}, table(list((about | (facts["record"] or {})).items()))


def _model(path: Path) -> tuple[dict, str]:
    """One of our own folders."""
    from mlx_flux_krea.errors import amount
    from mlx_flux_krea.models.config import quantization_to_json, to_json
    from mlx_flux_krea.weights import ModelFolder, count_parameters, open_folder

    from .shared.terminal import number, size, table

    folder = open_folder(path)
    components = {}
    for name, network in folder.networks.items():
        infos = [info for _, info in network.tensors().values()]
        components[name] = {
            "dtype": network.dtype,
            "quantization": quantization_to_json(network.layers()),
            "tensors": len(infos),
            "parameters": count_parameters(name, network.sizes),
            "bytes": sum(info.end - info.start for info in infos),
            "config": to_json(network.sizes),
        }
    index = to_json(folder.index)
    about = [("model", f"{index['name']} ({index['base']})"), ("licence", index["license"])]
    if isinstance(folder, ModelFolder):
        index["filters"] = "required" if folder.requires_filters else "none"
        default = folder.index.defaults
        steps = f"{amount(default.num_inference_steps, 'step')}, guidance {default.guidance_scale:g}"
        about += [
            ("filters", index["filters"]),
            ("defaults", f"{default.width} x {default.height}, {steps}"),
            ("shift", index["schedule"]["shift"]),
        ]
    about.append(("made from", ", ".join(source["file"] for source in index["source"])))
    facts = {"kind": "model folder", **index, "components": components}
    rows = [("component", "stored", "tensors", "parameters", "size")]
    most = {name: f"{n.quantization}, " for name, n in folder.networks.items() if n.quantization}
    rows += [
        (n, most.get(n, "") + c["dtype"], c["tensors"], number(c["parameters"]), size(c["bytes"]))
        for n, c in components.items()
    ]
    return facts, table(about) + "\n\n" + table(rows, right=(2, 3, 4))


def _foreign(path: Path) -> tuple[dict, str]:
    """Whatever the converter can open."""
    from mlx_flux_krea.convert.layouts import identify
    from mlx_flux_krea.convert.sources import open_sources
    from mlx_flux_krea.errors import ModelError

    from .shared.terminal import number, size, table

    rows, facts = [("file", "layout", "types", "tensors", "parameters", "size")], []
    for source in open_sources([path]):
        try:
            found = [(one.layout.name, one.layout.component, one.tensors.values()) for one in identify(source)]
            problem = None
        except ModelError as error:
            found, problem = [("not known", None, source.tensors.values())], str(error)
        for layout, component, tensors in found:
            dtypes: dict[str, int] = {}
            for tensor in tensors:
                dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + 1
            fact = {
                "path": str(source.path),
                "layout": layout,
                "component": component,
                "problem": problem,
                "dtypes": dtypes,
                "tensors": sum(1 + len(tensor.parts) for tensor in tensors),
                "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
                "bytes": sum(tensor.bytes for tensor in tensors),
                "metadata": source.metadata,
            }
            facts.append(fact)
            types = ", ".join(f"{n} {t}" for t, n in sorted(dtypes.items()))
            counts = fact["tensors"], number(fact["parameters"]), size(fact["bytes"])
            rows.append((source.path.name, layout, types, *counts))
    text = table(rows, right=(3, 4, 5))
    for problem in (fact["problem"] for fact in facts):
        text += f"\n{problem}" if problem else ""
    return {"kind": "weights", "sources": facts}, text


def _json(facts: dict) -> str:
    """Readable where it can be shown as it is: what stands in a file must not steer a terminal."""
    text = json.dumps(facts, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(facts)
