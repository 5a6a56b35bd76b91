"""Tells what a file is from its first bytes, whatever its name says. Reads at most a few hundred of them.

    look(path)      READABLE["safetensors"], or a Kind that says what else it is, and what to do

Sources: the published specifications of safetensors, GGUF, Git LFS, zip (APPNOTE 4.3.7), SQLite 3, pickle (PEP 3154),
ONNX's protobuf, and the DDUF page of the Hugging Face hub.
"""

import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from .errors import ModelError
from .files import open_regular

_END = 2**14  # bytes of the end of a file
_START = 600  # bytes: a tar archive has its mark at 257
_SHORTEST = 8  # bytes of a file that is called a text without a name that promises anything
_LONGEST_HEADER = 10**8  # bytes of a safetensors header, the limit of its library


@dataclass(frozen=True)
class Kind:
    """A kind of file: its name with an article, and the next step of somebody who wants weights."""

    name: str
    todo: str = ""


SAFETENSORS, GGUF = Kind("a safetensors file"), Kind("a GGUF file")
READABLE = (SAFETENSORS, GGUF)

_AGAIN = "download the file itself again"
_SAME = "take the .safetensors of the same model"
PICKLE = Kind("a pickle, which can run any program when opened", _SAME)
DOWNLOADING = Kind("still downloading", "wait for the download, or start it again")
UNKNOWN = Kind("of no format that is known", _AGAIN)
_EMPTY = Kind("empty", _AGAIN)
_PROSE, _ANSWER = Kind("a text"), Kind("a text, and no weights: perhaps a server's answer", _AGAIN)

_UNFINISHED = (
    ".part", ".partial", ".crdownload", ".download", ".opdownload", ".incomplete", ".aria2", ".aria2__temp", ".!qb",
    ".!ut", ".!bt", ".bc!", ".td", ".xltd", ".filepart", ".fdmdownload", ".dtapart", ".dctmp", ".downloading",
    ".unfinished", ".tmp",
)  # fmt: skip
# Ends of names that say what a file is, whatever its bytes are: programs give unfinished downloads names of their own.
_ENDINGS = {
    **dict.fromkeys(_UNFINISHED, DOWNLOADING),
    ".icloud": Kind("kept in iCloud, and not on this disk", "download it in the Finder"),
    ".ckpt-tensordata": Kind("the numbers of a model of Draw Things", _SAME),
    ".onnx": Kind("an ONNX graph", _SAME),
    ".engine": Kind("a TensorRT engine, made for one graphics card", _SAME),
    ".trt": Kind("a TensorRT engine, made for one graphics card", _SAME),
    ".plan": Kind("a TensorRT engine, made for one graphics card", _SAME),
    ".dduf": Kind("a DDUF, an archive of a whole pipeline", "unpack it, and name the folder"),
    ".msgpack": Kind("of Flax (.msgpack)", _SAME),
    ".h5": Kind("an HDF5 file of Keras", _SAME),
}
# names under which pickles are published; others that start like one are pickles too
_PICKLED = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
# Ends of names of files that hold weights or stand for such; of no interest to us, but not to be passed over unsaid.
READABLE_NAMES = (".safetensors", ".sft", ".gguf")
WEIGHTS = (*READABLE_NAMES, *_PICKLED, *_ENDINGS)

# ends of names of the files that fill folders of models beside weights, which are not opened one by one
_OTHERS = (
    ".json", ".txt", ".md", ".py", ".yaml", ".yml", ".model", ".jinja", ".csv", ".log", ".png", ".jpg", ".jpeg",
    ".webp", ".gif", ".mp4",
)  # fmt: skip

_TEXT = rb"(?:\xef\xbb\xbf|\xff\xfe)?\s*"  # a byte order mark and blanks, with which texts may begin

# First bytes; the first that matches counts. Matched without regard to case.
_MARKS: tuple[tuple[bytes, Kind], ...] = (
    (rb"GGUF", GGUF),
    (rb"(?:lmgg|fmgg|tjgg|algg|GGML)", Kind("of ggml, from before GGUF", "take a GGUF of the same model")),
    (rb"(?:\xef\xbb\xbf)?\s*version https://(?:git-lfs|hawser)",
     Kind("a pointer of Git LFS", "fetch the file itself: git lfs pull")),
    (rb"[./]*(?:\.git)?/annex/objects/", Kind("a pointer of git-annex", "fetch the file itself: git annex get")),
    (rb"# xet version", Kind("a pointer of Xet", _AGAIN)),
    (rb"SQLite format 3\0", Kind("an SQLite database, as Draw Things keeps its models", _SAME)),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP", Kind("a picture")),
    (rb"%PDF-", Kind("a document")),
    (rb"PK\x03\x04.{26}(?:[^\0]*/)?(?:data\.pkl|byteorder|\.format_version|\.storage_alignment|version)",
     Kind("a torch archive, which holds a pickle", _SAME)),
    (rb"PK\x03\x04.{26}[^\0]*(?:model_index\.json|config\.json|\.safetensors|\.gguf)",
     Kind("a zip archive or DDUF of weights", "unpack it, and name the folder or the files")),
    (rb"PK\x03\x04.{26}[^\0]*\.npy", Kind("a NumPy archive", _SAME)),
    (rb"PK(?:\x03\x04|\x05\x06|\x07\x08)", Kind("a zip archive", "unpack it, and name the files in it")),
    (rb"\x1f\x8b|7z\xbc\xaf\x27|Rar!|\xfd7zXZ|\x28\xb5\x2f\xfd|BZh|.{257}ustar",
     Kind("an archive", "unpack it, and name the files in it")),
    (rb"\x80[\x02-\x05]", PICKLE),
    # protocols 0 and 1
    (rb"\([dl]p\d+\n|[}\]]q\0|c(?:__builtin__|builtins|collections|copy_reg|numpy[\w.]*|torch[\w.]*)\n", PICKLE),
    (rb"[pf]trt", _ENDINGS[".engine"]),
    # a version of the graph's format, then who made it, the graph itself, or the sets of operators
    (rb"\x08[\x01-\x14](?:\x12[\0-\x40][ -~]*[\x1a\x22\x28:B]|:[\x80-\xff]|B[\x02-\x20]\x0a)", _ENDINGS[".onnx"]),
    (rb"\x89HDF\r\n", _ENDINGS[".h5"]),
    (rb"\x93NUMPY", Kind("a NumPy array", _SAME)),
    (rb"bplist00", Kind("a property list of macOS", _AGAIN)),
    (rb"....TFL3", Kind("a TensorFlow Lite model", _SAME)),
    (rb"book\0\0\0\0mark\0\0\0\0", Kind("an alias of the Finder", "name the file that it stands for")),
    (_TEXT + rb"<\0?[!?a-z]", Kind("a web page", _AGAIN)),
    (_TEXT + rb"(?:[\[{]\0?\s*(?:[\"\[{\]}]|-?\d|true|false|null)|\"[^\"]*\"\s*\Z)",
     Kind("JSON, and no weights: perhaps a server's answer", _AGAIN)),
    (rb"\0{16,}", Kind("all zeros at its start, as an unfinished download is", DOWNLOADING.todo)),
)  # fmt: skip


def look(path: Path) -> Kind:
    """Returns what a file is.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    with open_regular(path) as file:
        size, start = os.fstat(file.fileno()).st_size, file.read(_START)
    kind = _by_name(path) or _by_bytes(start, size)
    if kind is _EMPTY and _is_placeholder(path):
        return DOWNLOADING
    if kind is None and _is_text(start, size):
        kind = _ANSWER if is_named(path) else _PROSE if size >= _SHORTEST else None
    return kind or (PICKLE if _ends(path, _PICKLED) else UNKNOWN)


def is_weights(path: Path) -> bool:
    """Returns True for a name under which weights are kept, or a regular file that begins as weights do."""
    if _ends(path, WEIGHTS):
        return True
    if _ends(path, _OTHERS):
        return False
    try:
        return look(path) in READABLE
    except OSError:
        return False


def ends_in_zeros(path: Path) -> bool:
    """Returns True for a file of some size whose end is all zeros: programs may allot the whole length at once."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _END))
            return size >= 8 * _END and not any(file.read(_END))
    except OSError:
        return False


def is_named(path: Path) -> bool:
    """Returns True for a name under which weights are kept."""
    return _ends(path, WEIGHTS)


def promises(path: Path) -> bool:
    """Returns True for a name that promises weights that can be read."""
    return _ends(path, READABLE_NAMES)


def is_downloading(path: Path) -> bool:
    """Returns True for a file or folder with the name of an unfinished download: Safari keeps one in a folder."""
    return _by_name(path) is DOWNLOADING


def refused(path: Path, kind: Kind) -> ModelError:
    """Returns the error about a file that is of a kind without weights that can be read."""
    todo = kind.todo or "name the files or the folder of the weights"
    found = f"{path} is {kind.name}" + ("" if kind.todo else ", no weights")
    return ModelError(found, "a safetensors or GGUF file", todo)


def _by_name(path: Path) -> Kind | None:
    beside = Path(f"{path}.aria2")  # which aria2 deletes when it is done
    kind = next((kind for end, kind in _ENDINGS.items() if _ends(path, (end,))), None)
    return kind or (DOWNLOADING if os.path.lexists(beside) else None)


def _is_placeholder(path: Path) -> bool:
    """Returns True for an empty file beside the download that will replace it: Firefox's NAME.MARK.safetensors.part."""
    try:
        names = os.listdir(path.parent)
    except OSError:
        return False
    starts = f"{path.stem}.".lower()
    return any(n.lower().startswith(starts) and n.lower().endswith((".part", ".crdownload")) for n in names)


def _is_text(start: bytes, size: int) -> bool:
    """Returns True for UTF-8 without control characters; the last character may be cut."""
    try:
        text = start.decode()
    except UnicodeDecodeError as error:
        if size <= len(start) or error.start < len(start) - 3:
            return False
        text = start[: error.start].decode()
    return all(letter.isprintable() or letter.isspace() for letter in text)


def _by_bytes(start: bytes, size: int) -> Kind | None:
    if not start:
        return _EMPTY
    if len(start) > 8 and start[8:9] == b"{":
        (length,) = struct.unpack("<Q", start[:8])
        if length <= _LONGEST_HEADER:
            return SAFETENSORS
    return next((kind for mark, kind in _MARKS if re.match(mark, start, re.IGNORECASE | re.DOTALL)), None)


def _ends(path: Path, endings: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(endings)
