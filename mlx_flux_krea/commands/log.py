"""flux-krea log: verifies and exports the log of checks and releases."""

from collections import Counter
from pathlib import Path

import click

from mlx_flux_krea import home
from mlx_flux_krea.errors import amount
from mlx_flux_krea.filters.log import Log
from mlx_flux_krea.provenance import SOFTWARE

from .shared.terminal import Console, say_path
from .shared.text import json_text


@click.group()
def log():
    """Verify or export the log of checks and releases.

    \b
    Examples:
      flux-krea log verify
      flux-krea log export > log.json
    """


@log.command()
def verify():
    """Verify the chain of hashes from the first entry to the last."""
    path, entries = _read()
    Console().say(f"{amount(len(entries), 'entry', 'entries')}, unchanged")
    say_path(path)


@log.command()
def export():
    """Print a summary and every entry as JSON, with hashes of prompts and pictures only."""
    _, entries = _read()
    runs = [entry for entry in entries if entry["event"] in ("run", "unfiltered")]
    summary = {
        "software": SOFTWARE,
        "from": entries[0]["time"] if entries else None,
        "to": entries[-1]["time"] if entries else None,
        "events": Counter(entry["event"] for entry in entries),
        "checks": Counter(run.get("check", "none required") for run in runs),
        "models": Counter(run.get("model", "unknown") for run in runs),
        "reviewers": Counter(entry["reviewer"] for entry in entries if "reviewer" in entry),
    }
    click.echo(json_text({**summary, "entries": entries}))


def _read() -> tuple[Path, list[dict]]:
    """Returns path and entries of the log, which need not exist."""
    log = Log(home.path(home.LOG))
    return log.path, log.read() if log.path.exists() else []
