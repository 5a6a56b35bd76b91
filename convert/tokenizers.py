"""Finds tokenizers: in a given folder, beside the sources, inside a T5 GGUF, or in the hub's cache."""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.files import read_small
from mlx_flux_krea.models.filter_config import PixtralConfig
from mlx_flux_krea.tokenizers import CLIPTokenizer, PixtralTokenizer, T5Tokenizer

from .gguf_header import read_gguf
from .hub import TOKENIZER_FILES, cached
from .layouts import SourceComponent


@dataclass(frozen=True)
class _Kind:
    """One of the two tokenizers."""

    encoder: str  # the component that reads its ids
    folders: tuple[str, ...]  # names of its folder
    files: tuple[str, ...]  # its files; in a folder of its own, tokenizer.json is enough
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
_HUB = tuple(
    f"black-forest-labs/FLUX.1-{name}"
    for name in ("Krea-dev", "dev", "Kontext-dev", "Fill-dev", "Canny-dev", "Depth-dev", "schnell")
)


def find_tokenizers(
    components: dict[str, SourceComponent], plans: dict[str, tuple], given: str | Path | None
) -> dict[str, bytes]:
    """Returns the files of the tokenizers by their names in a model folder, after opening them.

    A model has `tokenizer` and `tokenizer_2`, Pixtral has `tokenizer`, and the classifier has none.

    Args:
        components: the layout of every component; tokenizers may lie beside them.
        plans: for every component, its config and its plan.
        given: a folder to search before all others.

    Raises:
        ModelError: a tokenizer is missing or damaged, or has more ids than its encoder.
    """
    roots = [Path(os.path.expanduser(given))] if given is not None else []
    if roots and not roots[0].is_dir():
        raise ModelError(f"there is no folder {given}", "a folder with tokenizer and tokenizer_2")
    if "transformer" not in components:
        return _of_pixtral(components["pixtral"], plans["pixtral"][0], roots) if "pixtral" in components else {}
    beside = [components[component].source for component in ("text_encoder", "text_encoder_2", "transformer")]
    roots += [source.folder.parent if source.component else source.folder for source in beside]
    files = {}
    with TemporaryDirectory() as inside:
        roots += [unpack(components["text_encoder_2"].source.path, Path(inside))]
        for name, kind in _KINDS.items():
            folder = next(_folders(name, kind, roots), None)
            if folder is None:
                todo = "put them into DIR/tokenizer and DIR/tokenizer_2 and set `tokenizers` to DIR"
                raise ModelError(
                    f"no {name} was found beside the sources or in the hub's cache",
                    kind.wanted,
                    f"{todo} (both are in {_HUB[-1]}, ungated)",
                )
            size, known = kind.read(folder).vocab_size, plans[kind.encoder][0].vocab_size
            if size > known:
                raise ModelError(f"the tokenizer in {folder} has {size} ids", f"at most the {known} of {kind.encoder}")
            files |= {f"{name}/{file}": _read(folder / file) for file in TOKENIZER_FILES if (folder / file).exists()}
    return files


def _of_pixtral(component: SourceComponent, config: PixtralConfig, roots: list[Path]) -> dict[str, bytes]:
    source = component.source
    root = source.folder.parent if source.component else source.folder
    folders = [folder for root in (*roots, root) for folder in (root / "tokenizer", root)]
    folder = next((folder for folder in folders if (folder / "tokenizer.json").exists()), None)
    if folder is None:
        todo = "put it beside the weights, or set `tokenizers` to its folder"
        raise ModelError(f"no tokenizer was found beside {source.path}", "Pixtral's tokenizer.json", todo)
    yes, no, *_ = config.head_ids
    size, known = PixtralTokenizer(folder, (yes, no), read_small).vocab_size, config.text_config.vocab_size
    if size > known:
        raise ModelError(f"the tokenizer in {folder} has {size} ids", f"at most the {known} of pixtral")
    return {"tokenizer/tokenizer.json": _read(folder / "tokenizer.json")}


def unpack(source: Path, root: Path) -> Path:
    """Writes the tokenizer inside a T5 GGUF, if it has one, to ROOT/tokenizer_2/spiece.model. Returns the root.

    Raises:
        ModelError: the tokenizer is incomplete or damaged.
    """
    metadata = read_gguf(source)[1] if source.suffix == ".gguf" else {}
    if metadata.get("tokenizer.ggml.model") == "t5":
        (root / "tokenizer_2").mkdir()
        (root / "tokenizer_2" / "spiece.model").write_bytes(_spiece(metadata, source))
        try:
            T5Tokenizer(root / "tokenizer_2")
        except ModelError:
            raise ModelError(
                f"the tokenizer inside {source} is damaged", "T5's pieces", "give another with `tokenizers`"
            ) from None
    return root


def _spiece(metadata: dict, source: Path) -> bytes:
    """Returns a sentencepiece model (a ModelProto) from the fields that llama.cpp stores."""
    pieces, scores, kinds = (metadata.get(f"tokenizer.ggml.{k}") for k in ("tokens", "scores", "token_type"))
    charsmap = metadata.get("tokenizer.ggml.precompiled_charsmap", np.zeros(0, np.uint8))
    if (
        not isinstance(pieces, list)
        or not (isinstance(scores, np.ndarray) and scores.dtype == np.float32)
        or not (isinstance(kinds, np.ndarray) and kinds.dtype == np.int32)
        or not (isinstance(charsmap, np.ndarray) and charsmap.dtype in (np.uint8, np.int8))
        or not len(pieces) == len(scores) == len(kinds)
    ):
        raise ModelError(f"the tokenizer inside {source} is incomplete", "its tokens, scores and token_type")
    size = len(pieces)
    while size and (kinds[size - 1] == _UNUSED or pieces[size - 1].startswith("<extra_id_")):
        size -= 1  # added to fill the embedding; sentencepiece's own pieces end before them
    table = zip(pieces[:size], scores[:size], kinds[:size], strict=True)
    proto = [_field(1, _field(1, p.encode()) + _field(2, float(s)) + _field(3, int(k))) for p, s, k in table]
    keys = {3: "add_space_prefix", 4: "remove_extra_whitespaces"}
    spaces = {number: metadata.get(f"tokenizer.ggml.{key}") is not False for number, key in keys.items()}
    normalizer = _field(2, charsmap.tobytes()) + b"".join(_field(n, int(value)) for n, value in spaces.items())
    return b"".join([*proto, _field(2, _field(3, _UNIGRAM)), _field(3, normalizer)])


_UNUSED, _UNIGRAM = 5, 1  # sentencepiece's numbers of a kind of piece, and of a kind of model


def _field(number: int, value: bytes | int | float) -> bytes:
    """Encodes a field of a protobuf message: bytes, an integer, or a float32."""
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    value &= 2**64 - 1  # two's complement of a negative number
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])


def _read(file: Path) -> bytes:
    try:
        return read_small(file)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}", "a file that can") from None


def _folders(name: str, kind: _Kind, roots: list[Path]) -> Iterator[Path]:
    """Yields every folder that holds this tokenizer, the nearest first."""
    yield from (root / folder for root in roots for folder in (*kind.folders, ".") if _holds(root / folder, kind))
    for repository in _HUB:
        snapshot = cached(repository)
        if snapshot and _holds(snapshot / name, kind):
            yield snapshot / name


def _holds(folder: Path, kind: _Kind) -> bool:
    own = all((folder / file).exists() for file in kind.files)
    return own or (folder.name in kind.folders and (folder / "tokenizer.json").exists())
