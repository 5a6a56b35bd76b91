"""Delivery of a run's pictures: each is saved, recorded in the run, and reported as a line, an event and in JSON."""

import io
from pathlib import Path
from typing import Any

from mlx_flux_krea import Result
from mlx_flux_krea.errors import Withheld, printable
from mlx_flux_krea.provenance import FORMATS, Picture, read_record

from .credentials import is_signed, parts_of, signed, sources_of
from .jobs import PictureJob, PreparedJob
from .options import with_option_names
from .output import names_from, save, save_bytes
from .runs import Run
from .terminal import Console, say_path
from .text import json_text, size, stage_times, table


class Delivery:
    """Saves and reports the pictures of a run as they are finished.

    Args:
        run: the run; pictures that it already has are not reported again.
        as_json: report events, and everything as JSON at the end.
        console: where lines and events are written.
    """

    def __init__(self, run: Run, as_json: bool, console: Console):
        self._run, self._as_json, self._console = run, as_json, console
        self._names = {output: names_from(output, taken) for output, taken in run.taken.items()}
        self._maps: dict[bytes, Path] = {}  # saved maps of photos
        self._report: dict[str, Any] = {"images": [], "skipped": run.skipped}
        if run.unreported:
            self._report_earlier(run.unreported)

    def refuse(self, prepared: PreparedJob, error: Withheld) -> None:
        """Reports a job whose prompt or input image was withheld."""
        outcome = f"withheld: {error.found}"
        self._console.say(f"seed {prepared.job.seed}: {outcome}")
        self._add(outcome, {**prepared.request.record(prepared.pick), "outcome": outcome})

    def deliver(self, prepared: PreparedJob, result: Result) -> None:
        """Saves the picture of a job, if it was released, and reports its outcome."""
        pick, seed, path = prepared.pick, prepared.job.seed, None
        outcome = result.outcomes[pick]
        if self._run.options.get("candidates"):
            self._deliver_candidate(prepared, result)
            return
        if outcome == "released":
            picture = result.images[result.outcomes[:pick].count("released")]
            path = self._save(prepared.job, picture)
        else:
            self._console.say(f"seed {seed}: {outcome}")
        kept = self._keep_map(prepared, result, path)
        notes = [*prepared.notes, *map(with_option_names, result.notes)]
        facts = {"outcome": outcome, "notes": notes, "seconds": result.seconds}
        facts |= {"peaks": result.peaks, "predicted": result.plan.stages if result.plan else {}}
        facts |= {"map": str(kept)} if kept else {}
        self._add(outcome, {**result.records[pick], **facts}, path)
        self._console.say(f"seed {seed}: {stage_times(result.seconds)}")
        if self._run.options.get("verbose"):
            self._console.say(_memory(result))
        self._tell(path)

    def _deliver_candidate(self, prepared: PreparedJob, result: Result) -> None:
        """Keeps a candidate as an unfinished run, and its prediction for the contact sheet, if it was released."""
        pick, number = prepared.pick, len(self._run.done) + 1
        outcome = result.outcomes[pick]
        is_released = outcome == "released"
        picture = result.images[result.outcomes[:pick].count("released")] if is_released else None
        self._run.keep_candidate(outcome, picture)
        self._add(outcome, {"candidate": number, **result.records[pick], "outcome": outcome, "seconds": result.seconds})
        said = stage_times(result.seconds) if is_released else outcome
        self._console.say(f"candidate {number}, seed {prepared.job.seed}: {said}")
        self._report["run"] = self._run.checkpoint.path.stem
        if self._as_json:
            self._tell(None)

    def deliver_sheet(self, sheet: Picture, name: Path) -> None:
        """Saves and reports the contact sheet."""
        options = self._run.jobs[0].options
        parts = parts_of([path for _, path in self._run.done if path])
        how = _how(options) | signed(options.get("credentials"), parts)
        if FORMATS.get(name.suffix.lower()) == "PNG":
            how.pop("quality", None)
        self._tell_sheet(save(sheet, names_from(name), force=self._run.force, before=self._run.claim, **how))

    def report(self) -> None:
        """Prints the JSON report, if it was asked for and holds anything."""
        if self._as_json and (self._report["images"] or "contact_sheet" in self._report):
            self._console.result(json_text(self._report))

    def _save(self, job: PictureJob, picture: Picture) -> Path:
        """Saves a picture; a note tells if the first picture of a name gets another one."""
        first, names = job.output not in self._names, self._names.setdefault(job.output, names_from(job.output))
        how = _how(job.options)
        if is_signed(mode := job.options.get("credentials")):
            how |= signed(mode, sources_of(job.options, picture.record))
        path = save(picture, names, force=self._run.force, before=self._run.claim, **how)
        if first and path != job.output:
            self._console.say(f"note: {printable(str(job.output))} exists; writing {printable(str(path))}")
        return path

    def _keep_map(self, prepared: PreparedJob, result: Result, path: Path | None) -> Path | None:
        """Saves the map of a photo beside its picture, if that was asked for, and each map once. Returns its file.

        A map is the user's own material: once its photo has passed, it is saved whatever becomes of the picture.
        """
        if not prepared.job.options.get("keep_map") or result.control_image is None:
            return None
        beside, encoded = path or prepared.job.output, io.BytesIO()
        result.control_image.save(encoded, "PNG")
        data = encoded.getvalue()
        if data not in self._maps:
            names = names_from(beside.with_name(f"{beside.stem}-{prepared.request.inputs.kind}.png"))
            self._maps[data] = save_bytes(data, names, force=self._run.force)
            self._console.say(f"map: {printable(str(self._maps[data]))}")
        return self._maps[data]

    def _add(self, outcome: str, facts: dict, path: Path | None = None) -> None:
        self._run.add(outcome, path)
        self._run.advance()
        self._report["images"].append({"path": path and str(path), **facts})

    def _tell(self, path: Path | None) -> None:
        """Reports the last picture of the report."""
        if self._as_json:
            self._console.say("", event="picture", **self._report["images"][-1])
        elif path:
            say_path(path)

    def _tell_sheet(self, path: Path) -> None:
        self._report["contact_sheet"] = str(path)
        if not self._as_json:
            say_path(path)

    def _report_earlier(self, path: Path) -> None:
        """Reports a file that a killed process saved; its times are lost."""
        job, (outcome, last) = self._run.jobs[len(self._run.done) - 1], self._run.done[-1]
        if path != last:
            self._tell_sheet(path)
            return
        record = read_record(path) or {"seed": job.seed}
        self._report["images"].append({"path": str(path), **record, "outcome": outcome})
        self._tell(path)


def _how(options: dict[str, Any]) -> dict[str, Any]:
    """Picks the options of `Picture.save`, but for credentials."""
    return {name: options[name] for name in ("metadata", "quality") if name in options}


def _memory(result: Result) -> str:
    """Formats predicted and measured memory of each stage side by side."""
    if result.plan is None:
        return ""
    stages, predicted = {"denoise": ("image", "modulation", "denoise")}, result.plan.stages
    rows = [("stage", "seconds", "memory predicted", "measured")]
    for stage, seconds in result.seconds.items():
        expected = max(predicted[name] for name in stages.get(stage, (stage,)) if name in predicted)
        rows.append((stage, f"{seconds:.1f}", size(expected), size(result.peaks[stage])))
    plan = result.plan
    resident = f"{plan.resident_blocks} of {plan.total_blocks} transformer blocks resident in memory"
    resident += "; the others are read in the time that it computes" if plan.hidden else ""
    return f"{table(rows, right=(1, 2, 3))}\nbesides, {size(plan.process)} of the program itself\n{resident}"
