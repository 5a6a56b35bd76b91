"""flux-krea resume: continues an interrupted run."""

import time
from pathlib import Path

import click

from mlx_flux_krea.checkpoint import Checkpoint, find, unfinished
from mlx_flux_krea.errors import UsageError

from .shared.generation import Generation, open_pipeline
from .shared.options import FILE
from .shared.resuming import make_ready, model_options, read_run
from .shared.runs import Run
from .shared.terminal import Console
from .shared.text import table


@click.command()
@click.argument("file", required=False)
@click.option("-m", "--model", help="Folder or name of the run's model.  [default: the same as before]")
@click.option("-o", "--output", type=FILE, help="Output of the remaining pictures.  [default: the run's]")
@click.option("--memory", help="Memory for this program, such as 6GB.  [default: the run's]")
@click.option("--list", "listed", is_flag=True, help="List unfinished runs, newest first.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON report, as generate does.")
def resume(file, model, output, memory, listed, as_json):
    """Continue a run that was interrupted, killed, or failed.

    FILE: the run's ID or checkpoint file; default: the newest. The result is the same as without the interruption.
    Unfinished runs are deleted after 30 days, except the 20 newest.

    \b
    Examples:
      flux-krea resume
      flux-krea resume 3f2a9c1b --memory 8GB
    """
    console = Console(as_events=as_json)
    if listed:
        _list(console)
        return
    path = find(file)
    checkpoint = Checkpoint.read(path)
    try:
        run = read_run(checkpoint, path)
        run.options |= {name: value for name, value in (("model", model), ("memory", memory)) if value}
        _continue(run, output, console=console, as_json=as_json)
    finally:
        checkpoint.close()


def _continue(run: Run, output: Path | None, *, console: Console, as_json: bool) -> None:
    pipe = open_pipeline(model_options(run))
    make_ready(run, pipe, console)
    if output:
        run.place(output)
    Generation(console, as_json=as_json, pipe=pipe).run(run)


def _list(console: Console) -> None:
    """Prints unfinished runs."""
    rows = []
    for path in unfinished():
        try:
            checkpoint = Checkpoint.read(path)
        except UsageError as error:
            rows.append((path.stem, "", error.found))
            continue
        checkpoint.close()
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        done, jobs = (len(checkpoint.run.get(name, ())) for name in ("done", "jobs"))
        step = f"step {checkpoint.done} of {checkpoint.total}" if checkpoint.done else "before the first step"
        rows.append((path.stem, when, f"picture {min(done + 1, jobs)} of {jobs}, {step}"))
    if rows:
        click.echo(table(rows))
    else:
        console.say("there is no unfinished run")
