"""Writes mlx_flux_krea/filters/lookalikes.py's table from Unicode's confusables.txt.

    python docs/lookalikes.py confusables.txt

The file is that of Unicode Technical Standard #39 (unicode.org/Public/security). The table takes single characters
beyond ASCII whose prototype, without marks, is one ASCII letter, unless compatibility normalisation already turns them
into it.
"""

import re
import sys
import textwrap
import unicodedata
from pathlib import Path

from mlx_flux_krea.filters.lookalikes import letter

TARGET = Path(__file__).parent.parent / "mlx_flux_krea" / "filters" / "lookalikes.py"
# Look-alikes whose prototypes are no Latin letters (kra, Cyrillic ka, dotless i, turned w, small capital m, Cyrillic
# em), or the wrong one here: the standard's prototype of a capital I, and so of Iota, is a small l.
MORE = {"\u0138": "k", "\u043a": "k", "\u0131": "i", "\u028d": "m", "\u1d0d": "m", "\u043c": "m"}
MORE |= dict.fromkeys("\u0399\u0406\u04c0\u0196\u2c92\u13a5", "i")


def table(text: str) -> dict[str, str]:
    """Returns the look-alikes of each lower-case letter, in the order of their code points."""
    found = dict(MORE)
    for line in text.splitlines():
        fields = [field.strip() for field in line.split("#")[0].split(";")]
        if len(fields) < 3 or " " in fields[0]:
            continue
        character = chr(int(fields[0], 16))
        prototype = "".join(chr(int(code, 16)) for code in fields[1].split())
        bare = (c for c in unicodedata.normalize("NFKD", prototype) if not unicodedata.combining(c))
        letters = "".join(map(letter, bare))
        is_new = not unicodedata.normalize("NFKC", character).casefold().isascii()
        if is_new and character not in MORE and re.fullmatch("[A-Za-z]", letters):
            found[character] = letters.lower()
    rows: dict[str, str] = {}
    for character in sorted(found):
        rows[found[character]] = rows.get(found[character], "") + character
    return dict(sorted(rows.items()))


def main() -> None:
    """Replaces the table between its two marks."""
    text = Path(sys.argv[1]).read_text(encoding="utf-8-sig")
    version = next(line for line in text.splitlines() if line.startswith("# Date:")).removeprefix("# Date: ")
    lines = [f"# Unicode's confusables.txt of {version}, by docs/lookalikes.py", "_LETTERS = {"]
    for latin, characters in table(text).items():
        parts = textwrap.wrap(ascii(characters)[1:-1], 100, break_on_hyphens=False)
        lines += [f'    "{latin}": (', *(f'        "{part}"' for part in _whole(parts)), "    ),"]
    lines.append("}  # fmt: skip")
    source = TARGET.read_text(encoding="utf-8")
    before, rest = source.split("# --- generated ---\n")
    _, after = rest.split("# --- end ---\n")
    TARGET.write_text(f"{before}# --- generated ---\n{chr(10).join(lines)}\n# --- end ---\n{after}", encoding="utf-8")


def _whole(parts: list[str]) -> list[str]:
    """Moves the end of a cut escape to the next line."""
    escapes = re.findall(r"\\x..|\\u....|\\U........|.", "".join(parts))
    lines, line = [], ""
    for escape in escapes:
        if len(line) + len(escape) > 100:
            lines.append(line)
            line = ""
        line += escape
    return [*lines, line]


if __name__ == "__main__":
    main()
