"""Where the tokenizers of a conversion come from: beside the sources, a folder given, or the hub's cache."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.tokenizers import CLIPTokenizer, T5Tokenizer

from .layouts import Found


@dataclass(frozen=True)
class _Kind:
    """One of the two tokenizers."""

    encoder: str  # the component that reads its ids
    folders: tuple[str, ...]  # how its folder may be called
    files: tuple[str, ...]  # its own files; in a folder of its own, tokenizer.json will do
    read: type
    wanted: str


_KINDS = {
    "tokenizer": _Kind(
        "text_encoder", ("tokenizer", "clip"), ("vocab.json", "merges.txt"), CLIPTokenizer,
        "CLIP's vocab.json and merges.txt, or tokenizer.json",
    ),
    "tokenizer_2": _Kind(
        "text_encoder_2", ("tokenizer_2", "t5"), ("spiece.model",), T5Tokenizer, "T5's spiece.model or tokenizer.json"
    ),
}  # fmt: skip
_FILES = (
    "vocab.json", "merges.txt", "tokenizer.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json",
)  # fmt: skip
_HUB = ("black-forest-labs/FLUX.1-Krea-dev", "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell")


def find_tokenizers(found: dict[str, Found], plans: dict[str, tuple], given: str | Path | None) -> dict[str, bytes]:
    """The files of `tokenizer` and `tokenizer_2` under their names in a model folder, whole as far as can be seen.

    Args:
        found: the layout of every component; tokenizers may lie beside them.
        plans: the config of every component comes first.
        given: a folder to look in before all others.

    Raises:
        ModelError: none found, a damaged one, or one with more ids than its encoder knows.
    """
    roots = [Path(os.path.expanduser(given))] if given is not None else []
    if roots and not roots[0].is_dir():
        raise ModelError(f"there is no folder {given}", "a folder with tokenizer and tokenizer_2")
    beside = [found[component].source for component in ("text_encoder", "text_encoder_2", "transformer")]
    roots += [source.folder.parent if source.component else source.folder for source in beside]
    files = {}
    for name, kind in _KINDS.items():
        folder = next(_folders(name, kind, roots), None)
        if folder is None:
            todo = "put them into DIR/tokenizer and DIR/tokenizer_2 and add --tokenizers DIR"
            raise ModelError(
                f"no {name} was found beside the sources or in the hub's cache",
                kind.wanted,
                f"{todo} (both are in {_HUB[-1]}, ungated)",
            )
        size, known = kind.read(folder).vocab_size, plans[kind.encoder][0].vocab_size
        if size > known:
            raise ModelError(f"the tokenizer in {folder} has {size} ids", f"at most the {known} of {kind.encoder}")
        files |= {f"{name}/{file}": _read(folder / file) for file in _FILES if (folder / file).exists()}
    return files


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}", "a file that can") from None


def _folders(name: str, kind: _Kind, roots: list[Path]) -> Iterator[Path]:
    """Every folder that holds this tokenizer, the nearest first."""
    yield from (root / folder for root in roots for folder in (*kind.folders, ".") if _holds(root / folder, kind))
    for repository in _HUB:
        snapshot = _from_hub_cache(repository, name)
        if snapshot and _holds(snapshot / name, kind):
            yield snapshot / name


def _holds(folder: Path, kind: _Kind) -> bool:
    own = all((folder / file).exists() for file in kind.files)
    return own or (folder.name in kind.folders and (folder / "tokenizer.json").exists())


def _from_hub_cache(repository: str, name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, local_files_only=True, allow_patterns=f"{name}/*"))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None
