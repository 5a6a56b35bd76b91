"""Numbers, durations and tables as text for people."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from mlx_flux_krea.errors import printable


def json_text(value: Any, indent: int | None = None) -> str:
    """Formats JSON; characters that control a terminal or turn its lines round are escaped, as JSON allows.

    Args:
        value: of the types that JSON has.
        indent: spaces of a level; None: one line.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return re.sub(r"[^\n -~]", _escaped, text)


def finite(value: Any) -> Any:
    """Returns facts for JSON, which has no infinite numbers and no NaN: None stands for them."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _escaped(found: re.Match) -> str:
    """Returns a character as JSON escapes it, if it does not print."""
    if found[0].isprintable():
        return found[0]
    code = found[0].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{code[i : i + 4]}" for i in range(0, len(code), 4))


def flattened(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Returns facts as rows of a table, those of an inner object as OUTER.INNER."""
    rows: list[tuple[str, str]] = []
    for name, value in facts.items():
        if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
            value = {str(number): item for number, item in enumerate(value, 1)}
        if isinstance(value, dict) and value:
            rows += flattened(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", _in_words(value)))
    return rows


def _in_words(value) -> str:
    """Formats a value that JSON can hold, without the marks of a language."""
    if value is None or value in ({}, []):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(_in_words, value)) if isinstance(value, list | tuple) else str(value)


def table(rows: Sequence[Sequence], right: Sequence[int] = ()) -> str:
    """Formats rows as aligned columns.

    Args:
        rows: cells, of any type.
        right: columns aligned to the right.
    """
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = (
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def size(count: float) -> str:
    """Formats bytes: 23.8 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit in ("B", "kB") else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def number(count: int) -> str:
    """Formats a number of parameters: 11.90 B."""
    for limit, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= limit:
            return f"{count / limit:.2f}{unit}"
    return str(count)


def duration(seconds: float) -> str:
    """Formats a duration: 47 min."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def stage_times(seconds: dict[str, float]) -> str:
    """Formats the time of each stage: text 1.2 s, denoise 40.1 s."""
    return ", ".join(f"{stage} {took:.1f} s" for stage, took in seconds.items())


def several(values: Iterable) -> str:
    """Lists the distinct values; of more than six, the first three and the last."""
    shown = list(dict.fromkeys(map(str, values)))
    return ", ".join(shown if len(shown) <= 6 else [*shown[:3], f"... {shown[-1]}"])
