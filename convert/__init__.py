"""The converter: any known layout of the weights into a model folder (`mlx_flux_krea.weights` documents the format).

    from mlx_flux_krea.convert import convert
    convert(["FLUX.1-Krea-dev"], "models/krea-bf16", dtype="bfloat16")

sources opens files, decode knows their types, layouts recognises them, maps names their tensors, remap puts tensors
together; index and tokenizers add what weights do not say, write stores it all.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_flux_krea import config as configs
from mlx_flux_krea.errors import ModelError, UsageError, printable
from mlx_flux_krea.weights import COMPONENTS, DTYPES, home

from . import write
from .index import make_index
from .layouts import Found, identify, make_plan
from .remap import Plan
from .sources import open_sources
from .tokenizers import find_tokenizers

__all__ = ["Component", "Report", "convert"]
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Component:
    """What one component was made of."""

    name: str
    layout: str
    files: tuple[str, ...]
    parameters: int
    bytes: int
    dropped: tuple[tuple[str, str], ...]  # tensors left out on purpose, with the reason
    lost: tuple[tuple[str, str], ...]  # tensors that are not to be had, with the reason; zeros stand there


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    path: Path
    base: str
    dtype: str
    components: tuple[Component, ...]


def convert(
    sources: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    dtype: str = "bfloat16",
    tokenizers: str | Path | None = None,
    force: bool = False,
    allow_nonfinite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    placing: Callable[[], AbstractContextManager] = nullcontext,
) -> Report:
    """Converts what the sources hold into a model folder.

    Args:
        sources: a folder (diffusers', ComfyUI's, mflux's, or a model folder), an all-in-one file, or the files of the
            components one by one.
        out: the model folder to make; None: models/NAME-TYPE in the home folder (`weights.home`).
        dtype: of every array: "bfloat16", "float16" or "float32".
        tokenizers: a folder with `tokenizer` and `tokenizer_2` (or `clip` and `t5`), where the sources have none.
        force: an existing model folder is replaced, once the new one is complete; nothing else ever is, nor a folder
            with files in it that the converter did not write.
        allow_nonfinite: weights may hold NaN and infinities.
        progress: called with the component at work, the bytes written so far and in all.
        placing: gives the context in which the complete folder takes its name, for callers who handle signals.

    Raises:
        UsageError: an option or the target cannot be used.
        ModelError: a source is missing, damaged, incomplete or of another kind.
        ResourceError: not enough disk.
    """
    if dtype not in DTYPES:
        raise UsageError(f'no type is called "{dtype}"', f"one of {', '.join(DTYPES)}")
    paths = [Path(os.path.expanduser(path)) for path in sources]
    found = _components(paths)
    plans = {component: make_plan(f) for component, f in found.items()}
    configs.check_parts(*(plans[name][0] for name in ("transformer", "text_encoder_2", "text_encoder", "vae")))
    index = make_index(found, plans["transformer"][0])
    path = Path(os.path.expanduser(out)) if out else home() / "models" / f"{index.name}-{_SHORT[dtype]}"
    target = _resolved(path)
    tokens = find_tokenizers(found, plans, tokenizers)
    total = sum(write.output_bytes(plan, dtype) for _, plan in plans.values())
    sizes = {file: file.stat().st_size for f in found.values() for file in f.source.files}

    written = 0
    with write.new_folder(target, force, [*paths, *sizes], placing) as folder, write.hashing(sizes) as hashes:
        write.check_disk(target, total + 2**26)
        for component in COMPONENTS:
            config, plan = plans[component]

            def done(count: int, component: str = component) -> None:
                nonlocal written
                written += count
                if progress:
                    progress(component, written, total)

            write.write_component(folder, component, configs.to_json(config), plan, dtype, done, allow_nonfinite)
        for name, data in tokens.items():
            folder.write(name, [data])
        records = tuple(
            configs.Source(name, hashes[file].result(), sizes[file], layout)
            for file, (name, layout) in _records(found).items()
        )
        index = replace(index, source=records)
        if progress:
            progress("reading back", total, total)
        folder.finish({"_class_name": "FluxPipeline", **configs.to_json(index)}, plans, dtype)
    return _report(path, index, dtype, found, plans)


def _components(paths: list[Path]) -> dict[str, Found]:
    found: dict[str, Found] = {}
    for source in open_sources(paths):
        for one in identify(source):
            if one.layout.component in found:
                other = found[one.layout.component].source.path
                raise ModelError(f"{source.path} and {other} are both a {one.layout.component}", "one of each")
            found[one.layout.component] = one
    missing = [c for c in COMPONENTS if c not in found]
    if missing:
        have = ", ".join(found) or "nothing"
        raise ModelError(f"the sources hold {have}", f"also {', '.join(missing)}", "name the missing files too")
    return {c: found[c] for c in COMPONENTS}


def _resolved(path: Path) -> Path:
    target = os.path.realpath(path)  # what Path.resolve raises for links in a circle differs between versions
    try:
        target.encode()
    except UnicodeEncodeError:
        raise UsageError(f"the name {printable(target)} is not UTF-8", "one that is", "choose with -o") from None
    return Path(target)


def _records(found: dict[str, Found]) -> dict[Path, tuple[str, str]]:
    """What every file is called, and its layout; an all-in-one file has several."""
    records: dict[Path, tuple[str, str]] = {}
    for f in found.values():
        for file in f.source.files:
            name = f"{file.parent.name}/{file.name}" if f.source.component else file.name
            before = f"{records[file][1]}; " if file in records else ""
            records[file] = (name, before + f.layout.name)
    return records


def _report(
    path: Path,
    index: configs.ModelIndex,
    dtype: str,
    found: dict[str, Found],
    plans: dict[str, tuple[object, Plan]],
) -> Report:
    components = tuple(
        Component(
            name=name,
            layout=found[name].layout.name,
            files=tuple(file.name for file in found[name].source.files),
            parameters=plan.parameters,
            bytes=write.output_bytes(plan, dtype),
            dropped=plan.dropped,
            lost=plan.lost,
        )
        for name, (_, plan) in plans.items()
    )
    return Report(path, index.base, dtype, components)
