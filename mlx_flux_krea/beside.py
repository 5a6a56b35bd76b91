"""Reads the evidence of a licence that lies beside weights: its text, the model card, and ids and names in JSON.

People name these files in many ways, so that names are recognised by a word in them, and whatever their capitals.
"""

import codecs
import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .errors import ModelError
from .files import read_json, read_small
from .licence import dev_titles

_MOST = 2**20  # bytes of a text that may be a licence or a model card
_MOST_FILES = 50  # of a folder that are read
_LICENCE = re.compile(r"(?:[^/]*[-_. ])?(?:licen[cs]es?|copying)(?:[-_. ][^/]*)?", re.I)
_OTHERS = re.compile(r".*\.(?:safetensors|gguf|sft|ckpt|pth?|bin|onnx|png|jpe?g|webp|gif|json|ya?ml|py|pdf|zip)", re.I)
_USUAL = ("LICENSE.md", "LICENSE", "LICENSE.txt", "LICENCE.md", "LICENCE", "LICENCE.txt")
_TEXT = re.compile(r"notice(?:[-_. ].*)?", re.I)
_README = re.compile(r"readme(?:\.(?:md|markdown|txt))?", re.I)
_CARD = re.compile(r"\A\s*---\n(.*?)(?:\n---|\Z)", re.S)  # the facts that a model card begins with
_ITEM = re.compile(r"\s*-\s+(.*)")  # of a list in it
_ID_KEY, _NAME_KEY = re.compile("licen[cs]e", re.I), re.compile("name|title|base_?model|architecture|tags", re.I)
_MARKS = ((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


class Beside(NamedTuple):
    """Texts that may be licences, ids of licences, and names of models, from beside weights."""

    texts: tuple[str, ...]
    ids: tuple[str, ...]
    names: tuple[str, ...]


def read_beside(*folders: Path) -> Beside:
    """Reads licence texts, model cards and JSON in folders; those that cannot be read say nothing."""
    texts, ids, facts = [], [], []
    for folder in folders:
        listed = _names(folder)
        texts += [text_of(folder / name) for name in [*filter(is_licence, listed), *filter(_TEXT.fullmatch, listed)]]
        for name in filter(_README.fullmatch, listed):
            text = text_of(folder / name)
            ids += dev_titles(text)
            facts += _of_card(text)
        for name in ("model_index.json", "config.json"):
            with contextlib.suppress(ModelError):
                facts += of_json(read_json(folder / name))
    stated, named = sorted_facts(facts)
    return Beside(tuple(filter(None, texts)), (*ids, *stated), named)


def sorted_facts(facts: list[tuple[str, str]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns those of some facts, as (key, value), that are ids of licences, and those that are names of models."""
    ids = tuple(value for key, value in facts if _ID_KEY.search(key) and value)
    return ids, tuple(value for key, value in facts if _NAME_KEY.search(key) and not _ID_KEY.search(key))


def of_json(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields every text in JSON with the key that it stands under, lists and objects inside included."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, one in value.items():
            yield from of_json(one, f"{key}.{name}")
    elif isinstance(value, list):
        for one in value:
            yield from of_json(one, key)


def licence_names(folder: Path) -> list[str]:
    """Returns the names of files in a folder that may be licence texts, the usual names first."""
    found = [name for name in _names(folder) if is_licence(name)]
    return sorted(found, key=lambda name: (_USUAL.index(name) if name in _USUAL else len(_USUAL), name))


def is_licence(name: str) -> bool:
    """Recognises the name of a file that may be a licence text: LICENSE, license.md, LICENSE-FLUX1-dev, COPYING."""
    return bool(_LICENCE.fullmatch(name)) and not _OTHERS.fullmatch(name)


def text_of(path: Path) -> str:
    """Reads a text in UTF-8 or, with its mark, UTF-16; "" where that fails."""
    try:
        data = read_small(path, most=_MOST)
    except OSError:
        return ""
    coding = next((coding for mark, coding in _MARKS if data.startswith(mark)), "utf-8-sig")
    return "\n".join(data.decode(coding, errors="replace").splitlines())


def _names(folder: Path) -> list[str]:
    """Returns the names of files in a folder that may be of use here."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError:
        return []
    some = (name for name in names if is_licence(name) or _TEXT.fullmatch(name) or _README.fullmatch(name))
    return list(some)[:_MOST_FILES]


def _of_card(text: str) -> list[tuple[str, str]]:
    """Returns the facts of a model card as (key, value); of a list, each item with the key of the list."""
    facts, key = [], ""
    for line in card[1].split("\n") if (card := _CARD.match(text)) else ():
        item = _ITEM.fullmatch(line)
        if item:
            facts.append((key, item[1].strip()))
        name, colon, value = (item[1] if item else line).partition(":")
        if colon:
            facts.append((name.strip(), value.strip()))
        key = key if item else name.strip()
    return facts
