"""flux-krea inspect: describes a file or folder from its headers, without reading tensors."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import click

from mlx_flux_krea import home
from mlx_flux_krea.adapters.installed import FACTS, Origin, installed, with_licence
from mlx_flux_krea.adapters.parts import Facts, read_facts
from mlx_flux_krea.adapters.reading import described, looks_like_adapter, outline
from mlx_flux_krea.convert.decode import in_words
from mlx_flux_krea.convert.identify import identify
from mlx_flux_krea.convert.sources import open_sources
from mlx_flux_krea.convert.walk import is_model_folder
from mlx_flux_krea.errors import ModelError, amount, printable
from mlx_flux_krea.files import sha256
from mlx_flux_krea.models.config import FLUX_DEV_MODEL, quantization_to_json, to_json
from mlx_flux_krea.presets import GPTQ
from mlx_flux_krea.weights import ComponentFolder, ModelFolder, count_parameters, open_folder, open_model

from .shared.answers import nearest
from .shared.installed import formulas
from .shared.loras import FEW_STEPS, known_models
from .shared.options import FILE
from .shared.picture_facts import PICTURES, describe_picture
from .shared.text import json_text, number, size, table


@click.command()
@click.argument("path", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="Print all facts as JSON.")
def inspect(path, as_json):
    """Describe a model, an adapter, weights, or a picture.

    PATH is a file or folder, or the name of an installed model, adapter or component. Of pictures, also those made
    elsewhere, it reads and validates content credentials (C2PA).

    \b
    Examples:
      flux-krea inspect flux1-krea-dev.safetensors
      flux-krea inspect out.png
    """
    path = home.named(path)
    if not path.exists():
        path = (home.installed_components() | installed()).get(str(path), path)
    if not path.exists():
        beside = [at.name for at in path.parent.glob("*")] if path.parent.is_dir() else []
        near = nearest(path.name, [home.NANO_NAME, *home.installed_models(), *installed(), *beside])
        raise ModelError(f"there is nothing at {path}", "a file or a folder", f"did you mean {near}?" if near else "")
    if path.suffix.lower() in PICTURES and path.is_file():
        facts, lines = describe_picture(path)
    elif is_model_folder(path):
        facts, lines = _model(path)
    elif (path / FACTS).is_file():
        facts, lines = _adapter(read_facts(path / FACTS), path)
    else:
        facts, lines = _foreign_adapter(path) if looks_like_adapter(path) else _foreign(path)
    click.echo(json_text(facts) if as_json else "\n".join(map(printable, lines.split("\n"))))


def _model(path: Path) -> tuple[dict[str, Any], str]:
    """Describes a model folder."""
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
            ("filters", f"{'required' if folder.requires_filters else 'not required'}: {folder.filters.why}"),
            ("task", folder.index.task_and_kind),
            ("defaults", f"{default.width} x {default.height}, {steps}"),
            ("shift", index["schedule"]["shift"]),
        ]
    if isinstance(folder, ComponentFolder):
        required = folder.kind == "redux"
        about.append(("filters", f"{'required' if required else 'not required'}: its licence is {index['license']}"))
    if isinstance(folder, ModelFolder) and folder.index.is_by_gptq:
        about.append(("rounded by", f"{GPTQ}: blocks of the transformer, by the inputs that they have"))
    about.append(("converted from", ", ".join(source["file"] for source in index["source"])))
    if isinstance(folder, ModelFolder):
        index["control_kind"] = index.pop("kind")  # "kind" is of the thing inspected
    facts = {**index, "kind": "model folder", "components": components}
    rows: list[tuple] = [("component", "stored", "tensors", "parameters", "size")]
    most = {name: f"{n.quantization}, " for name, n in folder.networks.items() if n.quantization}
    rows += [
        (n, most.get(n, "") + c["dtype"], c["tensors"], number(c["parameters"]), size(c["bytes"]))
        for n, c in components.items()
    ]
    return facts, table(about) + "\n\n" + table(rows, right=(2, 3, 4))


def _foreign_adapter(path: Path) -> tuple[dict[str, Any], str]:
    """Describes an adapter file; of one that fits no model, its tensors and the reason."""
    try:
        return _adapter(_outlined(path), path)
    except ModelError as error:
        facts, lines = _foreign(path)
        return facts | {"problem": str(error)}, f"{lines}\nas an adapter: {error}"


def _outlined(path: Path) -> Facts:
    """Returns what an adapter's header says, for the first of the known models that it fits.

    Raises:
        ModelError: it fits none: the error of FLUX.1.
    """
    first = None
    for sizes in (FLUX_DEV_MODEL, *(open_model(folder).sizes for folder in known_models())):
        try:
            found = outline(path, sizes)
        except ModelError as error:
            first = first or error
            continue
        facts = described(found, Facts(name=path.stem, source=str(path.absolute()), sha256=sha256(path)), sizes)
        return with_licence(facts, path, Origin(facts.source), sizes.flux.architecture)
    raise first or ModelError(f"{path} fits no model")


def _adapter(facts: Facts, path: Path) -> tuple[dict[str, Any], str]:
    """Describes an adapter."""
    steps, guidance, weight = facts.preset or (0, 0, 0)
    about = [
        ("adapter", facts.name),
        ("source", facts.source),
        ("sha256", facts.sha256),
        ("formulas", formulas(facts.kinds, facts.ranks)),
        ("fits", f"{facts.count} modules" + (" (control: needs a control image)" if facts.control else "")),
        ("does not fit", ", ".join(facts.dropped)),
        ("words", ", ".join(facts.triggers)),
        ("published for", f"{steps:g} steps, guidance {guidance:g}, weight {weight:g}" if facts.preset else ""),
        ("perhaps", FEW_STEPS if facts.few_steps else ""),
        ("licence", ", ".join(facts.license) or "not stated"),
        ("filters", f"required: {facts.dev}" if facts.dev else "it adds no requirement"),
    ]
    return {"kind": "adapter", "path": str(path), **to_json(facts)}, table([row for row in about if row[1]])


def _foreign(path: Path) -> tuple[dict[str, Any], str]:
    """Describes weights that the converter can open."""
    rows: list[tuple] = [("file", "layout", "types", "tensors", "parameters", "size")]
    facts = []
    for source in open_sources([path]):
        problem = None
        try:
            layouts = [(one.layout.name, one.layout.component, one.tensors.values()) for one in identify(source)]
        except ModelError as error:
            layouts, problem = [("unknown", None, source.tensors.values())], str(error)
        for layout, component, tensors in layouts:
            dtypes = Counter(in_words(tensor.dtype) for tensor in tensors)
            count = sum(1 + len(tensor.parts) for tensor in tensors)
            parameters = sum(math.prod(tensor.shape) for tensor in tensors)
            stored = sum(tensor.bytes for tensor in tensors)
            facts.append(
                {
                    "path": str(source.path),
                    "layout": layout,
                    "component": component,
                    "problem": problem,
                    "dtypes": dtypes,
                    "tensors": count,
                    "parameters": parameters,
                    "bytes": stored,
                    "metadata": source.metadata,
                }
            )
            types = ", ".join(f"{n} {t}" for t, n in sorted(dtypes.items()))
            rows.append((source.path.name, layout, types, count, number(parameters), size(stored)))
    problems = [fact["problem"] for fact in facts if fact["problem"]]
    return {"kind": "weights", "sources": facts}, "\n".join([table(rows, right=(3, 4, 5)), *problems])
