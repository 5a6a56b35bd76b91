"""Writes docs/commands.md, the help page of every verb, and docs/openapi.json, the page's interface.

`python docs/make.py`; a test fails when one is out of date. Needs the extra `ui`.

`python docs/make.py editing` runs the commands of docs/editing.md and shows their pictures in docs/editing.png.
"""

import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from PIL import Image, ImageDraw

from mlx_flux_krea.cli import cli
from mlx_flux_krea.server.openapi import description

HEAD = "# flux-krea\n\nHelp of every verb. Written by `python docs/make.py`; do not edit.\n"


def page() -> str:
    """Returns the text of the file."""
    group = _context(cli, "flux-krea", None)
    texts = [("flux-krea", cli.get_help(group))]
    for name in cli.list_commands(group):
        command = cli.get_command(group, name)
        assert command, name
        texts.append((f"flux-krea {name}", command.get_help(_context(command, name, group))))
    return HEAD + "".join(f"\n## {name}\n\n```text\n{text}\n```\n" for name, text in texts)


def _context(command: click.Command, name: str, parent: click.Context | None) -> click.Context:
    return click.Context(
        command,
        info_name=name,
        parent=parent,
        terminal_width=80,
        max_content_width=80,
        help_option_names=["-h", "--help"],
    )


def openapi() -> str:
    """Returns the text of docs/openapi.json, the interface of `flux-krea ui`."""
    return json.dumps(description(), indent=1) + "\n"


def editing_commands() -> list[list[str]]:
    """Returns the commands of docs/editing.md that the small model runs, split into words."""
    text = Path(__file__).with_name("editing.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.strip().splitlines()]


def draw_mask(path: Path) -> None:
    """Draws the mask of docs/editing.md: white over the right half of a picture of 128 x 64."""
    mask = Image.new("L", (128, 64))
    ImageDraw.Draw(mask).rectangle((66, 2, 125, 61), fill=255)
    mask.save(path)


def _editing_picture() -> Image.Image:
    """Runs the commands of docs/editing.md. Returns their pictures in a row, at twice their size."""
    with tempfile.TemporaryDirectory() as folder:
        draw_mask(Path(folder) / "mask.png")
        for command in editing_commands():
            subprocess.run([sys.executable, "-m", "mlx_flux_krea.cli", *command[1:]], cwd=folder, check=True)
        shown = [Image.open(Path(folder) / f"{name}.png").convert("RGB") for name in ("two", "mask", "star", "wide")]
    row = Image.new("RGB", (sum(one.width + 8 for one in shown) - 8, 64), (128, 128, 128))
    for place, one in enumerate(shown):
        row.paste(one, (sum(before.width + 8 for before in shown[:place]), 0))
    return row.resize((2 * row.width, 2 * row.height), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    here = Path(__file__).parent
    if sys.argv[1:] == ["editing"]:
        _editing_picture().save(here / "editing.png")
    else:
        (here / "commands.md").write_text(page(), encoding="utf-8")
        (here / "openapi.json").write_text(openapi(), encoding="utf-8")
