"""flux-krea log: whether the log of checks and releases is whole, and a summary for whoever may ask."""

import json
from collections import Counter

import click


@click.group()
def log():
    """The log of what was checked, reviewed and released.

    \b
    Examples:
      flux-krea log verify
      flux-krea log export > log.json
    """


@log.command()
def verify():
    """Follow the chain of hashes from the first entry to the last."""
    from mlx_flux_krea.errors import amount

    from .shared.terminal import say

    path, entries = _read()
    say(f"{amount(len(entries), 'entry', 'entries')}, each as it was written")
    click.echo(path)


@log.command()
def export():
    """Print a summary and every entry as JSON. There are hashes of prompts and pictures in it, and neither of them."""
    from mlx_flux_krea.provenance import SOFTWARE

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
    click.echo(json.dumps({**summary, "entries": entries}))


def _read():
    """Path and entries of the log, which need not exist."""
    from mlx_flux_krea import home
    from mlx_flux_krea.filters.log import Log

    log = Log(home.path(home.LOG))
    return log.path, log.read() if log.path.exists() else []
