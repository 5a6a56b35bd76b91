"""Writes docs/commands.md, the help page of every verb: `python docs/make.py`. A test fails when it is out of date."""

from pathlib import Path

import click

from mlx_flux_krea.cli import cli

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


if __name__ == "__main__":
    Path(__file__).with_name("commands.md").write_text(page(), encoding="utf-8")
