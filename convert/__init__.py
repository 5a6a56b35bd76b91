"""The converter: any known layout of the weights into a model folder (`mlx_flux_krea.weights` documents the format).

    from mlx_flux_krea.convert import convert
    convert(["FLUX.1-Krea-dev"], "models/krea-bf16", dtype="bfloat16")

sources opens files, layouts recognises them, maps names their tensors, remap puts tensors together, write stores them.
"""

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_flux_krea import __version__, presets
from mlx_flux_krea import config as configs
from mlx_flux_krea.errors import ModelError, UsageError
from mlx_flux_krea.tokenizers import CLIPTokenizer, T5Tokenizer
from mlx_flux_krea.weights import COMPONENTS, DTYPES, check_tensors, home, open_model, read_json

from . import write
from .layouts import Found, identify, make_plan
from .remap import Plan
from .sources import Source, open_sources

TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "spiece.model")
_TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Component:
    """What one component was made of."""

    name: str
    layout: str
    files: tuple[str, ...]
    parameters: int
    bytes: int
    dropped: tuple[tuple[str, str], ...]  # tensors left out on purpose, with the reason


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
) -> Report:
    """Converts what the sources hold into a model folder.

    Args:
        sources: a folder in diffusers' layout, or the files of the components one by one.
        out: the model folder to make; None: models/NAME-TYPE in the home folder (`weights.home`).
        dtype: of every array: "bfloat16", "float16" or "float32".
        tokenizers: a folder with `tokenizer` and `tokenizer_2` (or `clip` and `t5`), where the sources have none.
        force: an existing folder is replaced.
        allow_nonfinite: weights may hold NaN and infinities.
        progress: called with the component at work, the bytes written so far and in all.

    Raises:
        UsageError: an option or the target cannot be used.
        ModelError: a source is missing, damaged, incomplete or of another kind.
        ResourceError: not enough disk.
    """
    if dtype not in DTYPES:
        raise UsageError(f'no type is called "{dtype}"', f"one of {', '.join(DTYPES)}")
    found = _components([Path(path).expanduser() for path in sources])
    plans = {component: make_plan(f) for component, f in found.items()}
    index = _index(found, plans)
    target = Path(out).expanduser() if out else home() / "models" / f"{index.name}-{_SHORT[dtype]}"
    write.check_target(target, force)
    folders = {name: _find_tokenizer(name, found, tokenizers) for name in _TOKENIZERS}
    _check_vocabulary(folders, plans)
    total = sum(write.output_bytes(plan, dtype) for _, plan in plans.values())
    write.check_disk(target, total + 2**26)

    written = 0
    with write.new_folder(target, force) as partial, ThreadPoolExecutor(1) as background:
        hashes = {name: [background.submit(write.sha256, p) for p in f.source.files] for name, f in found.items()}
        try:
            for component in COMPONENTS:
                config, plan = plans[component]

                def done(count: int, component: str = component) -> None:
                    nonlocal written
                    written += count
                    if progress:
                        progress(component, written, total)

                write.write_component(partial / component, configs.to_json(config), plan, dtype, done, allow_nonfinite)
            for name, folder in folders.items():
                _copy_tokenizer(folder, partial / name)
            index = replace(index, source=_source_records(found, hashes))
        except BaseException:
            background.shutdown(cancel_futures=True)
            raise
        write.write_json(partial / "model_index.json", {"_class_name": "FluxPipeline", **configs.to_json(index)})
        write.write_manifest(partial)
        _verify(partial, plans, dtype)
    return _report(target, index, dtype, found, plans)


_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
# where each tokenizer may lie inside a folder of tokenizers, and in the hub's cache
_TOKENIZERS = {
    "tokenizer": (("tokenizer", "clip", "."), CLIPTokenizer, "CLIP's vocab.json and merges.txt"),
    "tokenizer_2": (("tokenizer_2", "t5", "."), T5Tokenizer, "T5's spiece.model or tokenizer.json"),
}
_HUB = ("black-forest-labs/FLUX.1-Krea-dev", "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell")


def _components(paths: list[Path]) -> dict[str, Found]:
    found: dict[str, Found] = {}
    for source in open_sources(paths):
        one = identify(source)
        if one.layout.component in found:
            other = found[one.layout.component].source.path
            raise ModelError(f"{source.path} and {other} are both a {one.layout.component}", "one of each")
        found[one.layout.component] = one
    missing = [c for c in COMPONENTS if c not in found]
    if missing:
        have = ", ".join(found) or "nothing"
        raise ModelError(f"the sources hold {have}", f"also {', '.join(missing)}", "name the missing files too")
    return {c: found[c] for c in COMPONENTS}


def _index(found: dict[str, Found], plans: dict[str, tuple[object, Plan]]) -> configs.ModelIndex:
    source = found["transformer"].source
    config = plans["transformer"][0]
    root = source.folder.parent if source.component else source.path
    names = [part.lower() for part in root.parts if part.startswith("models--")] + [root.name.lower()]
    family = _family(config, names)
    unguided = config == configs.FLUX_SCHNELL
    scheduler = root / "scheduler" / "scheduler_config.json"
    if source.component and scheduler.exists():
        schedule = _schedule(read_json(scheduler), scheduler)
    else:
        schedule = presets.NO_SHIFT if unguided else presets.DYNAMIC_SHIFT
    index = configs.ModelIndex(
        name=root.stem if root.is_file() else root.resolve().name,
        base=family.base,
        license=family.license,
        filters="none",
        max_sequence_length=presets.MAX_SEQUENCE_LENGTH_SCHNELL if unguided else presets.MAX_SEQUENCE_LENGTH,
        schedule=schedule,
        defaults=family.defaults,
        converter=__version__,
    )
    return replace(index, filters="required" if configs.requires_filters(config, index) else "none")


def _family(config: configs.FluxConfig, names: list[str]) -> presets.Family:
    if config == configs.FLUX_SCHNELL:
        return presets.SCHNELL
    if config != configs.FLUX_DEV:
        return presets.OTHER
    kin = (presets.KREA, presets.KONTEXT)
    return next((f for f in kin if any(f.hint in name for name in names)), presets.DEV)


def _schedule(obj: dict, where: Path) -> configs.Schedule:
    """From diffusers' scheduler_config.json."""
    kind = obj.get("_class_name")
    if kind != "FlowMatchEulerDiscreteScheduler":
        raise ModelError(f"{where} is of a {kind}", "a FlowMatchEulerDiscreteScheduler")
    if not obj.get("use_dynamic_shifting"):
        if obj.get("shift", 1.0) != 1.0:
            raise ModelError(f"{where} has a fixed shift of {obj['shift']}", "a dynamic shift, or none")
        return presets.NO_SHIFT
    fields = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
    return configs.from_json(configs.Schedule, {f: obj[f] for f in fields if f in obj}, str(where))


def _find_tokenizer(name: str, found: dict[str, Found], given: str | Path | None) -> Path:
    subfolders, _, wanted = _TOKENIZERS[name]
    if given is not None and not Path(given).expanduser().is_dir():
        raise ModelError(f"there is no folder {given}", "a folder with tokenizer and tokenizer_2")
    roots = [Path(given).expanduser()] if given is not None else []
    for component in ("text_encoder", "text_encoder_2", "transformer"):
        source = found[component].source
        roots.append(source.folder.parent if source.component else source.folder)
    for root in roots:
        for subfolder in subfolders:
            if _holds_tokenizer(root / subfolder, name):
                return root / subfolder
    for repository in _HUB:
        cached = _from_hub_cache(repository, name)
        if cached:
            return cached
    raise ModelError(
        f"no {name} was found beside the sources or in the hub's cache",
        wanted,
        f"put them into DIR/tokenizer and DIR/tokenizer_2 and add --tokenizers DIR (both are in {_HUB[-1]}, ungated)",
    )


def _holds_tokenizer(folder: Path, name: str) -> bool:
    if name == "tokenizer":
        own = (folder / "vocab.json").exists() and (folder / "merges.txt").exists()
        return own or (
            folder.name != "tokenizer_2" and folder.name == "tokenizer" and (folder / "tokenizer.json").exists()
        )
    return (folder / "spiece.model").exists() or (
        folder.name in ("tokenizer_2", "t5") and (folder / "tokenizer.json").exists()
    )


def _from_hub_cache(repository: str, name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, local_files_only=True, allow_patterns=f"{name}/*")) / name
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None
    return folder if _holds_tokenizer(folder, name) else None


def _check_vocabulary(folders: dict[str, Path], plans: dict[str, tuple[object, Plan]]) -> None:
    for (name, folder), component in zip(folders.items(), ("text_encoder", "text_encoder_2"), strict=True):
        size = _TOKENIZERS[name][1](folder).vocab_size
        known = plans[component][0].vocab_size
        if size > known:
            raise ModelError(f"the tokenizer in {folder} has {size} ids", f"at most the {known} of {component}")


def _copy_tokenizer(folder: Path, target: Path) -> None:
    target.mkdir()
    for name in (*TOKENIZER_FILES, *_TOKENIZER_EXTRAS):
        if (folder / name).exists():
            shutil.copyfile(folder / name, target / name)


def _source_records(found: dict[str, Found], hashes: dict) -> tuple[configs.Source, ...]:
    return tuple(
        configs.Source(
            file=f"{path.parent.name}/{path.name}" if f.source.component else path.name,
            sha256=future.result(),
            bytes=path.stat().st_size,
            layout=f.layout.name,
        )
        for name, f in found.items()
        for path, future in zip(f.source.files, hashes[name], strict=True)
    )


def _verify(folder: Path, plans: dict[str, tuple[object, Plan]], dtype: str) -> None:
    """Opens what was written as the library will."""
    model = open_model(folder)
    for component, (_, plan) in plans.items():
        tensors = {name: (info.dtype, info.shape) for name, (_, info) in model.tensors(component).items()}
        check_tensors(folder / component, tensors, {t.name: (DTYPES[dtype], t.shape) for t in plan.targets})


def _report(target: Path, index: configs.ModelIndex, dtype: str, found, plans) -> Report:
    components = []
    for name, f in found.items():
        plan: Plan = plans[name][1]
        size = write.output_bytes(plan, dtype)
        files = tuple(p.name for p in f.source.files)
        each = Component(name, f.layout.name, files, size // DTYPE_BYTES[dtype], size, plan.dropped)
        components.append(each)
    return Report(target, index.base, dtype, tuple(components))


DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
__all__ = ["Component", "Report", "Source", "convert"]
