"""What becomes of pictures that a run has drawn: where each went, as lines, as events, and as a report at the end."""

import json
from pathlib import Path

import click

from mlx_flux_krea.errors import Withheld, printable
from mlx_flux_krea.provenance import read_record

from .output import names_from, save
from .terminal import say, size, stage_times, table


class Delivery:
    """Saves the pictures of a run as they come, keeps how far it is, and says what became of each.

    Args:
        run: a `runs.Run`; those that it has already are not said again.
        as_json: say it as events, and all of it at the end.
    """

    def __init__(self, run, as_json: bool):
        self._run, self._as_json = run, as_json
        self._names = {output: names_from(output, taken) for output, taken in run.taken.items()}
        self._report = {"images": [], "skipped": run.skipped}
        if run.found:
            self._tell_found(run.found)

    def refuse(self, drawing, error: Withheld) -> None:
        """A prompt or an input image was flagged: there is no picture."""
        say(f"seed {drawing.job.seed}: withheld: {error.found}")
        outcome = f"withheld: {error.found}"
        self._add(outcome, None, None, {**drawing.request.record(drawing.pick), "outcome": outcome})

    def deliver(self, drawing, result) -> None:
        """What the pipeline made of a drawing: a file, if it was released."""
        pick, seed, picture, path = drawing.pick, drawing.job.seed, None, None
        outcome = result.outcomes[pick]
        if outcome == "released":
            picture = result.images[result.outcomes[:pick].count("released")]
            path = self._save(drawing.job, picture)
        else:
            say(f"seed {seed}: {outcome}")
        facts = {"outcome": outcome, "notes": [*drawing.notes, *result.notes], "seconds": result.seconds}
        facts |= {"peaks": result.peaks, "predicted": result.plan.stages}
        self._add(outcome, path, picture, {**result.records[pick], **facts})
        say(f"seed {seed}: {stage_times(result.seconds)}")
        if self._run.options.get("verbose"):
            say(_memory(result))
        self._tell(path)

    def deliver_sheet(self, made, name: Path) -> None:
        """All pictures as one."""
        path = save(made, names_from(name), self._run.force, self._run.note_file)
        self._tell_sheet(path)

    def report(self) -> None:
        """All of it as JSON, where that was asked for and there is something."""
        if self._as_json and (self._report["images"] or "contact_sheet" in self._report):
            click.echo(json.dumps(self._report, ensure_ascii=False))

    def _save(self, job, picture) -> Path:
        """Saves a picture; of the first with a name it is said if it cannot have that."""
        first, names = job.output not in self._names, self._names.setdefault(job.output, names_from(job.output))
        how = {name: job.options[name] for name in ("metadata", "quality") if name in job.options}
        path = save(picture, names, self._run.force, self._run.note_file, **how)
        if first and path != job.output:
            say(f"note: {printable(str(job.output))} exists; writing {printable(str(path))}")
        return path

    def _add(self, outcome: str, path: Path | None, picture, facts: dict) -> None:
        self._run.add(outcome, path, picture)
        self._run.advance()
        self._report["images"].append({"path": path and str(path), **facts})

    def _tell(self, path: Path | None) -> None:
        """Of the last picture, when it is counted."""
        if self._as_json:
            say("", event="picture", **self._report["images"][-1])
        elif path:
            click.echo(path)

    def _tell_sheet(self, path: Path) -> None:
        self._report["contact_sheet"] = str(path)
        if not self._as_json:
            click.echo(path)

    def _tell_found(self, path: Path) -> None:
        """Of a file that was written when nobody could be told any more; what it took of time is forgotten."""
        job, (outcome, last) = self._run.jobs[len(self._run.done) - 1], self._run.done[-1]
        if path != last:
            self._tell_sheet(path)
            return
        record = read_record(path) or {"seed": job.seed}
        self._report["images"].append({"path": str(path), **record, "outcome": outcome})
        self._tell(path)


def _memory(result) -> str:
    """Predicted and measured memory of each stage, side by side."""
    stages, predicted = {"denoise": ("image", "modulation", "denoise")}, result.plan.stages
    rows = [("stage", "seconds", "memory predicted", "measured")]
    for stage, seconds in result.seconds.items():
        expected = max(predicted[name] for name in stages.get(stage, (stage,)) if name in predicted)
        rows.append((stage, f"{seconds:.1f}", size(expected), size(result.peaks[stage])))
    kept = f"{result.plan.blocks} of {result.plan.of} blocks of the transformer stay in memory"
    return f"{table(rows, right=(1, 2, 3))}\n{kept}"
