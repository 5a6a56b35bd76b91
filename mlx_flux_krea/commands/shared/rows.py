"""Prompt files, with a row for each prompt, and `{a|b}` alternatives within a prompt."""

import csv
import io
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from mlx_flux_krea.errors import UsageError, amount
from mlx_flux_krea.files import MOST_BYTES, parse_json, read_small

from .options import PER_PICTURE, cast, check_together

_MOST_TEXT = 2 * 10**7  # characters of all prompts that one expands to
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


def read_rows(path: Path) -> Iterator[tuple[str, dict | UsageError]]:
    """Reads a prompt file: JSONL or CSV by its suffix, else one prompt a line. Empty lines are skipped.

    Yields:
        The place of a row, and its options, or the error in it.

    Raises:
        UsageError: the file cannot be read, or holds no row.
    """
    try:
        text = read_small(path, most=MOST_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8", "text", "save it as UTF-8") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "a file of prompts") from None
    reader = {".csv": _csv, ".jsonl": _jsonl}.get(path.suffix.lower(), _lines)
    found = False
    for line, row in reader(text, path):
        found = True
        try:
            if isinstance(row, UsageError):
                raise row
            options = dict(cast(name, value, PER_PICTURE) for name, value in row.items() if value is not None)
            check_together(options)
        except UsageError as error:
            options = error
        yield f"{path.name}, line {line}", options
    if not found:
        raise UsageError(f"{path} holds no prompt", "one a line")


def _lines(text: str, path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _jsonl(text: str, path: Path) -> Iterator[tuple[int, dict | UsageError]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except (ValueError, RecursionError) as error:
            row = UsageError(f"this is not JSON: {error}", 'a line such as {"prompt": "a frog", "seed": 7}')
        yield number, row if isinstance(row, dict | UsageError) else UsageError("this is not a JSON object")


def _csv(text: str, path: Path) -> Iterator[tuple[int, dict | UsageError]]:
    """Yields rows of a CSV, whose first line names the options; empty cells are skipped."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        names = [cell.strip() for cell in next(reader, [])]
        if "prompt" not in [name.lower() for name in names]:
            raise UsageError(f"{path}: the first line is {','.join(names)!r}", "names of options, with prompt")
        for cells in reader:
            if len(cells) > len(names):
                yield reader.line_num, UsageError(amount(len(cells), "cell"), f"{len(names)}, or quotes around commas")
            elif any(cell.strip() for cell in cells):
                yield reader.line_num, {n: c for n, c in zip(names, cells, strict=False) if c.strip()}
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}: {error}", "CSV") from None
