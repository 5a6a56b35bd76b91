"""Groups files by their names: parts "k of n", shards that an index lists, variants of one model. Opens indexes only.

The tensors that are there decide in the end; an index orders files, and its contradictions are said.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.files import read_json

_PART = re.compile(r"(.*?)([-_. ]?)(\d{1,9})([-_. ]*of[-_. ]*)(\d{1,9})(?=[-_. )\]}]|\Z)(.*)", re.I | re.DOTALL)
_COPY = re.compile(
    r"(?: ?\(\d\)| - copy(?: \(\d\))?| copy(?: \d)?)(?=\.\w+\Z|\Z)", re.IGNORECASE
)  # of a browser or Finder
_INDEX = re.compile(r".*\.index(\.\w+)?\.json", re.IGNORECASE)
_ENDING = re.compile(r"\.(safetensors|sft|gguf|bin|pt|pth|ckpt)\Z", re.IGNORECASE)
# words in names of files that say how the same weights are stored
_PRECISION = re.compile(
    r"(?<![a-z0-9])(?:svdq[-_](?:int|fp)4_r\d+|i?q\d(?:_(?:k(?:_(?:xl|[sml]))?|[01]|xxs|xs|nl|s|m))?|[2-8][-_]?bit|"
    r"b?f(?:p|loat)?(?:8|16|32)|e4m3(?:fn)?|e5m2|fp4|nf4|nvfp4|mxfp[48]|u?int[48]|convrot|scaled)(?![a-z0-9])",
    re.IGNORECASE,
)
_ANY_NAME = {"", "model", "diffusionpytorchmodel", "pytorchmodel", "weights", "checkpoint"}  # of many different models


@dataclass(frozen=True)
class FileSet:
    """The files of one checkpoint.

    Attributes:
        path: the file, or the folder of the shards.
        files: in their order.
        component: the component that its folder's name states.
        indexes: the files that list its shards.
    """

    path: Path
    files: tuple[Path, ...]
    component: str | None = None
    indexes: tuple[Path, ...] = field(default=())

    @property
    def stem(self) -> str:
        """The name that all variants of one model share."""
        return stem(self.files[0].name)


def stem(name: str) -> str:
    """Returns a file's name without ending, number, and words about precision: equal in all variants of a model."""
    part = split_part(name)
    base = _ENDING.sub("", part[0] + part[3] if part else name)
    return "".join(re.split(r"[-_. ]+", _PRECISION.sub("", base.lower())))


def names_a_model(name: str) -> bool:
    """Returns False for the stem of a name that files of many different models have."""
    return name not in _ANY_NAME and not name.isdigit()


def split_part(name: str) -> tuple[str, int, int, str] | None:
    """Returns base, number, count and ending of a name like NAME-00002-of-00003.safetensors; None: it is whole."""
    found = _PART.fullmatch(name)
    if not found or not 1 <= int(found[5]) <= 9999 or int(found[3]) > int(found[5]):
        return None
    return found[1], int(found[3]), int(found[5]), found[6]


def key_of(name: str) -> tuple | None:
    """Returns a key that all parts of a set share; None: the name is not that of a part."""
    part = split_part(name)
    return part and (part[0].lower(), part[2], part[3].lower())


def group(files: Iterable[Path], component: str | None = None) -> tuple[list[FileSet], list[tuple[str, ModelError]]]:
    """Groups the weight files of one folder, or files that were named one by one.

    Returns:
        The complete sets, and for each that lacks a part its stem and the error.
    """
    files = _without_copies(files)
    parts: dict[tuple, dict[int, Path]] = {}
    alone: list[Path] = []
    for file in files:
        part = split_part(file.name)
        if part is None:
            alone.append(file)
        else:
            parts.setdefault(key_of(file.name) or (), {}).setdefault(part[1], file)
    folders = dict.fromkeys(file.parent for file in files)
    indexes = [index for folder in folders for index in indexes_in(folder)]
    sets, errors = [], []
    for numbers in parts.values():
        try:
            sets.append(_complete(numbers, component))
        except ModelError as error:
            errors.append((stem(next(iter(numbers.values())).name), error))
    listed, lost = _listed(alone, indexes, component)
    sets += listed
    errors += dict.fromkeys((stem(file.name), error) for file, error in lost.items())
    alone = [file for file in alone if file not in lost and not any(file in one.files for one in listed)]
    by_block, lost = _by_block(alone, component)
    sets += by_block
    errors += lost
    alone = [
        file for file in alone if not any(file in one.files for one in by_block) and (not lost or not _block(file))
    ]
    numbered = [file for file in alone if file.stem.isdigit()]
    if len(numbered) > 1:  # as mflux writes them
        numbers = {int(file.stem): file for file in numbered}
        alone = [file for file in alone if file not in numbered]
        if lost := [n for n in range(max(numbers)) if n not in numbers]:
            name = f"{lost[0]}{numbered[0].suffix}"
            errors.append(("0", ModelError(f"{numbered[0].parent} lacks the shard {name}", "every part", _AGAIN)))
        else:
            sets.append(FileSet(numbered[0].parent, tuple(numbers[n] for n in sorted(numbers)), component))
    sets += [FileSet(file, (file,), component, tuple(_beside(file, indexes))) for file in alone]
    return [_with_indexes(one, indexes) for one in sets], errors


def _block(file: Path) -> re.Match | None:
    """Returns the parts of a name like single_blocks_12.safetensors: a file for each block, as DFloat11 has them."""
    return re.fullmatch(r"(\w*blocks_)(\d+)", file.stem)


def _by_block(alone: list[Path], component: str | None) -> tuple[list[FileSet], list[tuple[str, ModelError]]]:
    """Returns sets of a file for each block, with the file of all other tensors, and errors of incomplete ones."""
    sets, errors = [], []
    for folder in dict.fromkeys(file.parent for file in alone):
        here = [file for file in alone if file.parent == folder]
        blocks = [(found[1], int(found[2]), file) for file in here if (found := _block(file))]
        if len(blocks) < 2:
            continue
        rest = [file for file in here if not _block(file) and not names_a_model(stem(file.name))]
        absent = next(
            (f"{base}{n}" for base in sorted({base for base, _, _ in blocks})
             for numbers in [{n for b, n, _ in blocks if b == base}] for n in range(max(numbers)) if n not in numbers),
            None if rest else "model",
        )  # fmt: skip
        if absent:
            found = f"{folder} lacks the shard {absent}{blocks[0][2].suffix}"
            errors.append((stem(blocks[0][2].name), ModelError(found, "a file for each block", _AGAIN)))
            continue
        ordered = (file for *_, file in sorted(blocks))
        sets.append(FileSet(folder, (*ordered, *rest), component))
    return sets, errors


def _without_copies(files: Iterable[Path]) -> list[Path]:
    """Returns files without second downloads of a part, such as `NAME-00001-of-00003 (1).safetensors`."""
    files = list(files)
    there = {(file.parent, file.name.lower()) for file in files}
    return [
        file
        for file in files
        if not (split_part(file.name) and _COPY.search(file.name))
        or (file.parent, _COPY.sub("", file.name).lower()) not in there
    ]


_AGAIN = "download it again"


def _complete(numbers: dict[int, Path], component: str | None) -> FileSet:
    """Returns a set of parts.

    Raises:
        ModelError: one is missing; it is named.
    """
    first = next(iter(numbers.values()))
    count = (split_part(first.name) or ("", 0, 0, ""))[2]
    wanted = range(count) if 0 in numbers else range(1, count + 1)
    for number in wanted:
        if number not in numbers:
            found = f"{first.parent} lacks the shard {_renumbered(first.name, number)}, part {number} of {count}"
            raise ModelError(found, "every part", _AGAIN)
    files = tuple(numbers[number] for number in sorted(numbers))
    return FileSet(first.parent if len(files) > 1 else first, files, component)


def _renumbered(name: str, number: int) -> str:
    found = _PART.fullmatch(name)
    return f"{found[1]}{found[2]}{number:0{len(found[3])}d}{found[4]}{found[5]}{found[6]}" if found else name


def indexes_in(folder: Path) -> list[Path]:
    """Returns the indexes in a folder."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [folder / name for name in names if _INDEX.fullmatch(name) and not name.startswith(".")]


def listed_shards(index: Path) -> dict[str, str]:
    """Returns the shard of every tensor that an index lists.

    Raises:
        ModelError: it cannot be read, or lists nothing.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ModelError(f"{index} has no weight_map", "an index of shards")
    return weight_map


def missing_shard(index: Path) -> ModelError | None:
    """Returns the error about an index none of whose shards is there; None: it lists none."""
    if not (shards := _shards(index)):
        return None
    return ModelError(f"{index.parent} lacks the shard {min(shards)}", "every file of the index", _AGAIN)


def _shards(index: Path) -> set[str]:
    """Returns the names in an index; none where it is damaged, which is said when its set is opened."""
    try:
        return set(listed_shards(index).values())
    except ModelError:
        return set()


def _listed(
    alone: list[Path], indexes: list[Path], component: str | None
) -> tuple[list[FileSet], dict[Path, ModelError]]:
    """Returns sets of files that are no parts by their names but are listed together, and files of incomplete ones."""
    sets, lost = [], {}
    for index in indexes:
        names = {name.lower(): name for name in _shards(index) if not split_part(name)}
        there = [file for file in alone if file.name.lower() in names and file.parent == index.parent]
        if not there or len(names) < 2 or any(file in one.files for one in sets for file in there):
            continue
        if absent := names.keys() - {file.name.lower() for file in there}:
            found = f"{index.parent} lacks the shard {names[min(absent)]}"
            lost |= dict.fromkeys(there, ModelError(found, "every file of the index", _AGAIN))
        else:
            sets.append(FileSet(index.parent, tuple(there), component))
    return sets, lost


def _beside(file: Path, indexes: list[Path]) -> Iterable[Path]:
    """Yields the indexes whose name begins as a whole file's does."""
    return (
        one for one in indexes if one.parent == file.parent and stem(one.name.split(".index.")[0]) == stem(file.name)
    )


def _with_indexes(one: FileSet, indexes: list[Path]) -> FileSet:
    """Returns a set with the indexes that list any of its files."""
    names = {file.name.lower() for file in one.files}
    own = [i for i in indexes if i.parent == one.files[0].parent and names & {s.lower() for s in _shards(i)}]
    return FileSet(one.path, one.files, one.component, tuple(dict.fromkeys((*own, *one.indexes))))
