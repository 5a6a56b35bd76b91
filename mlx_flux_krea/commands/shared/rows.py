"""Prompt files, with a row for each prompt, and `{a|b}` alternatives within a prompt."""

import csv
import io
import itertools
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_flux_krea.errors import UsageError, amount
from mlx_flux_krea.files import MOST_BYTES, parse_json, read_small
from mlx_flux_krea.provenance import FORMATS

from .options import PER_PICTURE, cast, check_together

_MOST_TEXT = 2 * 10**7  # characters of all prompts that one expands to
_LONGEST_NAME = 255  # bytes of a file's name
_ESCAPED = {r"\{": "\ue000", r"\}": "\ue001", r"\|": "\ue002"}  # stand-ins while alternatives are parsed
_GROUP = re.compile(r"\{([^{}]*\|[^{}]*)\}")
_OPEN = re.compile(r"\{[^{}]*\||\|[^{}]*\}")  # a bar whose brace is not closed


def alternatives(prompt: str, limit: int) -> list[tuple[str, str]]:
    r"""Expands the alternatives `{a|b|c}` of a prompt; the last one changes first.

    Escaped characters (`\{`, `\|`, `\}`) and braces without a bar are literal.

    Args:
        prompt: the text.
        limit: the most prompts that it may expand to.

    Returns:
        The text of each prompt, and the alternatives chosen in it ("" without any).

    Raises:
        UsageError: nested alternatives, or too many prompts.
    """
    for escape, mark in _ESCAPED.items():
        prompt = prompt.replace(escape, mark)
    literal = _GROUP.split(prompt)
    choices = [group.split("|") for group in literal[1::2]]
    texts = literal[::2]
    if _OPEN.search(" ".join(texts)):
        raise UsageError("alternatives are not closed, or nested", "{a|b|c}", r"write \{ for a brace")
    count = 1
    for group in choices:
        count *= len(group)
    if count > limit:
        raise UsageError(f"the alternatives make {count} prompts", f"{limit} at most")
    if count * len(prompt) > _MOST_TEXT:
        found = f"the alternatives make {count * len(prompt) / 1e6:.0f} MB of prompts"
        raise UsageError(found, f"{_MOST_TEXT / 1e6:.0f} MB at most")

    def plain(text: str) -> str:
        for escape, mark in _ESCAPED.items():
            text = text.replace(mark, escape[1])
        return text

    prompts = []
    for chosen in itertools.product(*choices):
        text = "".join(itertools.chain(*itertools.zip_longest(texts, chosen, fillvalue="")))
        prompts.append((plain(text), plain(", ".join(part.strip() for part in chosen))))
    return prompts


# Other tools' marks in a prompt, of which this model knows none: pattern, and what becomes of the text.
_MARKS = (
    (re.compile(r"\([^()]*:\s*\d*\.?\d+\s*\)"), "is read as text: FLUX.1 has no weights of words"),
    (re.compile(r"\(\([^()]+\)\)"), "is read as text: FLUX.1 has no weights of words"),
    (re.compile(r"\[[^\[\]|]+\|[^\[\]]+\]"), "is read as text: alternatives are written {a|b}"),
    (re.compile(r"(?<![\\{])\{[\w -]{0,40}\}"),
     "is read as text: alternatives are written {a|b}, other values are not filled in"),
    (re.compile(r"\[[^\[\]]*:[^\[\]]*:\s*[\d.]+\s*\]"), "is read as text: words do not change between steps"),
    (re.compile(r"\bBREAK\b"), "is read as text: a prompt has one part"),
    (re.compile(r"\A\s*[“„«][^“”]*[”“»]\s*\Z"), "is read with its curly quotes: the shell knows straight ones alone"),
    (re.compile(r"__[\w/*-]+__"), "is read as text: alternatives are written {a|b}, or rows of a --prompts file"),
    (re.compile(r"\bembedding:\S+"), "is read as text: embeddings are made for other models than FLUX.1"),
    (re.compile(r"(?<!\S)--(?:ar|aspect|no|v|niji|s|stylize|style|seed|chaos|q|steps|cfg|width|height)\s+\S+"),
     "is read as text: options stand outside the quotes of the prompt"),
)  # fmt: skip
_OTHER_ADAPTER = re.compile(r"<(?:loha|hypernet)\s*:[^<>]*>|<(?:lora|lyco)\s+:[^<>]*>", re.I)


def prompt_notes(options: dict, *, typed: bool) -> tuple[str, ...]:
    """Checks the texts of a picture for the marks of other tools. Returns notes about those that do nothing.

    Args:
        options: of the picture.
        typed: the prompt was typed, not taken from a picture's record.

    Raises:
        UsageError: a prompt of blanks alone, or an adapter in another form.
    """
    names = [name for name in ("prompt", "negative_prompt") if isinstance(options.get(name), str)]
    texts = [options[name] for name in names if typed or name != "prompt"]
    if typed and options["prompt"] and not options["prompt"].strip():
        raise UsageError("the prompt is blank", "a text")
    for text in texts:
        if match := _OTHER_ADAPTER.search(text):
            raise UsageError(f"the prompt names {match[0]!r}", "a text", "an adapter is written <lora:NAME:WEIGHT>")
    found = dict.fromkeys(_file_notes(options["prompt"], bool(options.get("style"))) if typed else ())
    found |= dict.fromkeys(
        (match[0], effect) for text in texts for mark, effect in _MARKS for match in mark.finditer(text)
    )
    return tuple(f"{text!r} {effect}" for text, effect in found)


def _file_notes(prompt: str, has_style: bool) -> list[tuple[str, str]]:
    """Returns a note where a prompt is empty without a style image, or is the name of a file."""
    if not prompt:
        return [] if has_style else [("", "is the prompt, an empty one: the picture shows anything")]
    path = Path(prompt)
    if len(prompt) > _LONGEST_NAME or not os.path.isfile(path):
        return []
    kind, name = path.suffix.lower(), shlex.quote(prompt)
    option = f"--prompts {name}" if kind in _READERS else f"--image {name} or --from {name}" if kind in FORMATS else ""
    return [(prompt, f"is painted as a text; the file of this name is meant by {option}")] if option else []


def read_rows(path: Path) -> Iterator[tuple[str, dict | UsageError]]:
    """Reads a prompt file by its suffix; see `_READERS`. Empty lines, and lines that begin with #, are skipped.

    Yields:
        The place of a row, and its options, or the error in it.

    Raises:
        UsageError: the file cannot be read, is of another kind, or holds no row.
    """
    kind = path.suffix.lower()
    if str(path) == "-":
        raise UsageError("--prompts is not read from standard input", "a file", "one prompt is: flux-krea generate -")
    if kind in _OTHER_KINDS:
        raise UsageError(f"{path} is {_OTHER_KINDS[kind]}", f"a prompt file: {', '.join(_READERS)}", "save it as one")
    try:
        data = read_small(path, most=MOST_BYTES)
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8", "text", "save it as UTF-8") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "a file of prompts") from None
    if "\0" in text:
        raise UsageError(f"{path} is no text", f"a prompt file: {', '.join(_READERS)}")
    found = False
    for place, row in _READERS.get(kind, _lines)(text, path):
        found = True
        try:
            if isinstance(row, UsageError):
                raise row
            options = dict(cast(name, value, PER_PICTURE) for name, value in row.items() if value is not None)
            check_together(options)
        except UsageError as error:
            options = error
        yield f"{path.name}, {place}", options
    if not found:
        raise UsageError(f"{path} holds no prompt", "one a line")


def _is_row(line: str) -> bool:
    """Returns False for an empty line and for a comment."""
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _lines(text: str, path: Path) -> Iterator[tuple[str, dict]]:
    r"""Yields a row for each line; `\#` at its start is a #."""
    for number, line in enumerate(text.splitlines(), 1):
        if _is_row(line):
            yield f"line {number}", {"prompt": re.sub(r"^\\#", "#", line.strip())}


def _row_of_json(value: Any) -> dict | UsageError:
    row = {"prompt": value} if isinstance(value, str) else value
    return row if isinstance(row, dict | UsageError) else UsageError("this is not a JSON object", "one, or a prompt")


def _jsonl(text: str, path: Path) -> Iterator[tuple[str, dict | UsageError]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not _is_row(line):
            continue
        try:
            row = parse_json(line)
        except (ValueError, RecursionError) as error:
            row = UsageError(f"this is not JSON: {error}", 'a line such as {"prompt": "a frog", "seed": 7}')
        yield f"line {number}", _row_of_json(row)


def _json(text: str, path: Path) -> Iterator[tuple[str, dict | UsageError]]:
    """Yields the rows of a list; of objects or prompts; one object alone is one row."""
    try:
        value = parse_json(text)
    except (ValueError, RecursionError) as error:
        found = f"{path} is not JSON: {error}"
        raise UsageError(found, "a list of prompts or objects", "with one object a line, name it .jsonl") from None
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        yield f"entry {number}", _row_of_json(row)


def _table(text: str, path: Path) -> Iterator[tuple[str, dict | UsageError]]:
    """Yields rows of a table, whose first line names the options; empty cells are skipped."""
    first = next(filter(_is_row, text.splitlines()), "")
    delimiter = max(("\t", ";", ",") if path.suffix.lower() == ".tsv" else (",", ";", "\t"), key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells) or not _is_row(cells[0] or "-"):
                continue
            if names is None:
                names = [cell.strip() for cell in cells]
                if "prompt" not in [name.lower() for name in names]:
                    found = f"{path}: the first line is {delimiter.join(names)!r}"
                    raise UsageError(found, "names of options, with prompt")
                continue
            row: dict | UsageError = {n: c for n, c in zip(names, cells, strict=False) if c.strip()}
            if len(cells) > len(names):
                row = UsageError(amount(len(cells), "cell"), f"{len(names)}, or quotes around commas")
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}: {error}", "CSV") from None


_READERS = {".txt": _lines, ".csv": _table, ".tsv": _table, ".json": _json, ".jsonl": _jsonl, ".ndjson": _jsonl}
_OTHER_KINDS = {  # by suffix: files that hold prompts elsewhere, and are not read here
    **dict.fromkeys((".yaml", ".yml"), "YAML"),
    ".toml": "TOML",
    ".xml": "XML",
    **dict.fromkeys((".xls", ".xlsx", ".ods", ".numbers"), "a spreadsheet"),
    **dict.fromkeys((".doc", ".docx", ".odt", ".pages", ".rtf", ".pdf"), "a document"),
    **dict.fromkeys((".html", ".htm"), "a web page"),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".gif", ".heic"), "a picture (to repeat one: --from)"),
    **dict.fromkeys((".py", ".sh"), "a program"),
}
