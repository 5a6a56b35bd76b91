"""flux-krea resume: continues an interrupted run."""

import re
import time
from pathlib import Path

import click

from mlx_flux_krea.checkpoint import Checkpoint, find, unfinished
from mlx_flux_krea.errors import UsageError

from .shared import candidates, settings
from .shared.generation import Generation, open_pipeline
from .shared.options import FILE, joined
from .shared.resuming import make_ready, model_options, read_run
from .shared.runs import Run
from .shared.terminal import Console
from .shared.text import table


class _Picking(click.Command):
    """Command whose --pick takes several numbers."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        """Joins the numbers into the one value that click expects."""
        return super().parse_args(ctx, joined(args, "--pick"))


class _Numbers(click.ParamType):
    """Type of --pick: numbers from 1."""

    name = "numbers"

    def convert(self, value, param, ctx) -> tuple[int, ...]:
        """Returns the numbers in a text, each once."""
        words = str(value).replace(",", " ").split()
        if not words or not all(re.fullmatch(r"[1-9]\d{0,3}", word) for word in words):
            self.fail(f"{value!r} is no list of numbers such as 3 5.", param, ctx)
        return tuple(dict.fromkeys(map(int, words)))


@click.command(cls=_Picking)
@click.argument("file", required=False)
@click.option("--pick", type=_Numbers(), metavar="N...", help="Candidates to finish, by their numbers on the sheet.")
@click.option("-m", "--model", help="Folder or name of the run's model.  [default: the same as before]")
@click.option("-o", "--output", type=FILE, help="Output of the remaining pictures.  [default: the run's]")
@click.option("--memory", help="Memory for this program, such as 6GB.  [default: the run's]")
@click.option("--list", "listed", is_flag=True, help="List unfinished runs, newest first.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON report, as generate does.")
def resume(file, pick, model, output, memory, listed, as_json):
    """Continue a run that was interrupted, killed, or failed.

    FILE: the run's ID or checkpoint file; default: the newest. The result is the same as without the interruption.
    Unfinished runs are deleted after 30 days, except the 20 newest.

    \b
    Examples:
      flux-krea resume
      flux-krea resume 3f2a9c1b --memory 8GB
      flux-krea resume 3f2a9c1b --pick 3 5
    """
    console = Console(as_events=as_json)
    if listed:
        _list(console)
        return
    changed = {name: value for name, value in (("model", model), ("memory", memory)) if value}
    if pick:
        run = _picked(file or _newest_candidates(), pick)
        run.options |= changed
        _continue(run, output, console=console, as_json=as_json)
        return
    path = _find(file)
    checkpoint = Checkpoint.read(path)
    try:
        run = read_run(checkpoint, path)
        run.options |= changed
        _continue(run, output, console=console, as_json=as_json)
    finally:
        checkpoint.close()


def _find(file: str | None) -> Path:
    """Returns the checkpoint of a run, or the newest.

    Raises:
        UsageError: there is none; or its candidates wait for a choice.
    """
    if file is None:
        path = find(None)
        if group := candidates.run_of(path.stem):
            raise candidates.choose(group)
        return path
    try:
        return find(file)
    except UsageError:
        if re.fullmatch(r"\w+", file) and candidates.numbers_of(file):
            raise candidates.choose(file) from None
        raise


def _newest_candidates() -> str:
    """Returns the run of the newest candidate.

    Raises:
        UsageError: there is none.
    """
    groups = (candidates.run_of(path.stem) for path in unfinished())
    if group := next(filter(None, groups), None):
        return group
    raise UsageError("there are no candidates to pick from", "", "make some: flux-krea generate PROMPT --candidates 8")


def _picked(run: str, numbers: tuple[int, ...]) -> Run:
    """Returns a run of the chosen candidates, with the checks of the config file where they are stricter."""
    if not re.fullmatch(r"\w+", run):
        raise UsageError(f"{run} is no ID of a run", "the ID that generate --candidates gave")
    opened = candidates.read_picked(run, numbers)
    try:
        chosen = Run.from_picked(opened)
    finally:
        for checkpoint in opened:
            checkpoint.close()
    chosen.restrict(settings.read_options())
    return chosen


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
