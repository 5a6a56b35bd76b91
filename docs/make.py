"""Writes docs/commands.md, the help page of every verb: `python docs/make.py`. A test says when it is due."""

from pathlib import Path

import click

from mlx_flux_krea import cli

HEAD = "# flux-krea\n\nWhat every verb says with `--help`. Written by `python docs/make.py`; not to be edited.\n"


def page() -> str:
    """The file as it should be."""
    width = {"terminal_width": 80, "max_content_width": 80}
    context = click.Context(cli.cli, info_name="flux-krea", **width, **{"help_option_names": ["-h", "--help"]})
    texts = [("flux-krea", cli.cli.get_help(context))]
    for name, command in sorted(cli.cli.commands.items()):
        inside = click.Context(command, info_name=name, parent=context, **width)
        texts.append((f"flux-krea {name}", command.get_help(inside)))
    return HEAD + "".join(f"\n## {name}\n\n```text\n{text}\n```\n" for name, text in texts)


if __name__ == "__main__":
    Path(__file__).with_name("commands.md").write_text(page(), encoding="utf-8")
