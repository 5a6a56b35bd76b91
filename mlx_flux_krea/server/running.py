"""One job at a time, from its first step or from its checkpoint, with the command's own runs; and the model in memory.

`Runner.run` is called in the queue's thread; all computing happens in the worker's, as in every pipeline.
"""

import gc
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_flux_krea import FluxPipeline, checkpoint
from mlx_flux_krea.checkpoint import Checkpoint
from mlx_flux_krea.commands.shared.generation import OF_THE_PIPELINE, Generation, open_pipeline
from mlx_flux_krea.commands.shared.resuming import make_ready, model_options, read_run
from mlx_flux_krea.commands.shared.runs import Run, made_by
from mlx_flux_krea.commands.shared.terminal import Console
from mlx_flux_krea.errors import FiltersError, FluxKreaError, Withheld
from mlx_flux_krea.filters.ledger import Ledger
from mlx_flux_krea.presets import STAGES
from mlx_flux_krea.worker import Worker

from . import fields, pictures
from .errors import plain
from .jobs import PageJob, outcome, picture_jobs

_EVERY = 0.25  # seconds between events of progress
Tell = Callable[[str, PageJob], None]  # of "progress", "preview", "picture" or "note", and the job


class Runner:
    """Runs jobs, with the model of the last one in memory.

    Args:
        find_image: returns the file of an upload or a picture.
        tell: called when something of a job has changed.
    """

    def __init__(self, find_image: fields.FindImage, tell: Tell):
        self._find_image, self._tell = find_image, tell
        self._pipe: FluxPipeline | None = None
        self._key: tuple = ()  # of what the pipeline was opened with
        self._manifest = ""  # hash of its model's

    @property
    def model(self) -> str | None:
        """Name of the model in memory."""
        pipe = self._pipe
        return None if pipe is None else fields.model_name(pipe.folder)

    def interrupt(self) -> None:
        """Stops the run at the next block; for any thread."""
        if pipe := self._pipe:
            pipe.interrupt()

    def free(self) -> None:
        """Frees the model."""
        if self._pipe is not None:
            self._pipe, self._key = None, ()
            gc.collect()
            Worker().run(mx.clear_cache)

    def run(self, job: PageJob, *, previews: bool, checked: bool, started: Callable[[PageJob], None]) -> None:
        """Runs a job until every picture has an outcome, which it then holds.

        Args:
            job: the job; `checkpoint` is the file that it resumes from, if that is still there.
            previews: show each step, where the model requires nothing.
            checked: show up to two previews that have passed the filters, where it requires them.
            started: called once the name of its checkpoint is known.

        Raises:
            FluxKreaError: it failed; outcomes of finished pictures are in the job.
            HTTPProblem: an image or a model that it names is no longer here.
        """
        console = _JobConsole(job, self._tell)
        run = self._resumed(job)
        if run is None and (run := self._new(job)) is None:
            return
        console.run, job.checkpoint = run, run.checkpoint.path.stem
        started(job)
        show, wanted = _Preview(job, self._tell), job.request.get("preview", True)
        watch, watch_checked = (show if wanted and setting else None for setting in (previews, checked))
        try:
            pipe = self._open(model_options(run))
            if run.is_resumed:
                make_ready(run, pipe, console)
            generation = Generation(
                console, as_json=True, pipe=pipe, is_last=False, preview=watch, checked_preview=watch_checked
            )
            generation.run(run)
        except Withheld as error:
            for _ in run.remaining:
                run.add(f"withheld: {error.found}", None)
        finally:
            run.checkpoint.close()
            console.settle()

    def forget(self, job: PageJob) -> None:
        """Deletes the checkpoint of a job that will not continue."""
        if job.checkpoint:
            path = checkpoint.folder() / f"{job.checkpoint}.safetensors"
            path.unlink(missing_ok=True)

    def _open(self, options: dict[str, Any]) -> FluxPipeline:
        """Returns the pipeline of a run: the one in memory, if it has the same model and options."""
        key = (options.get("model"), options.get("manifest_sha256"), *(options.get(name) for name in OF_THE_PIPELINE))
        if self._pipe is not None and key == self._key and self._manifest == _manifest(self._pipe):
            return self._pipe
        self.free()  # before another model takes memory
        self._pipe, self._key = open_pipeline(options), key
        self._manifest = _manifest(self._pipe)
        return self._pipe

    def _new(self, job: PageJob) -> Run | None:
        """Returns the run of a job that starts anew; None: another process has made its pictures."""
        base, made = picture_jobs(job.id, job.request, self._find_image)
        if job.checkpoint and self._has_ended_elsewhere(job):
            return None
        job.pictures = []
        return Run(base, made)

    def _resumed(self, job: PageJob) -> Run | None:
        """Returns the run of a checkpoint; None: there is none."""
        path = checkpoint.folder() / f"{job.checkpoint}.safetensors"
        if not job.checkpoint or not path.exists():
            return None
        opened = Checkpoint.read(path)
        try:
            return read_run(opened, path)
        except FluxKreaError:
            opened.close()
            raise

    def _has_ended_elsewhere(self, job: PageJob) -> bool:
        """Takes outcomes from the files and the quarantine where a run has ended and its process died, or was another.

        The run's checkpoint is gone then. Where none of its pictures is anywhere, it starts anew.
        """
        files = {number: path for path in pictures.folder().iterdir() if (number := _number(job, path))}
        waiting = waiting_of(job)
        if not files and not waiting:
            return False
        for index in range(len(job.seeds)):
            path, review = files.get(index + 1), waiting.get(index + 1)
            said = "waiting" if review else "withheld: the reason is in the log"
            job.pictures[index : index + 1] = [outcome(job, index, said, path, review)]
        return True


def _manifest(pipe: FluxPipeline) -> str:
    """Returns the hash of a model's manifest, which changes when it is converted again."""
    return made_by(pipe.folder)["manifest_sha256"]


def waiting_of(job: PageJob) -> dict[int, str]:
    """Returns the ids of a job's pictures that wait for review, by their numbers."""
    try:
        ledger = Ledger()
        found = {}
        for picture in ledger.waiting():
            meant = ledger.meant_for(picture).get("output")
            if isinstance(meant, str) and (number := _number(job, Path(meant))):
                found[number] = picture.image
        return found
    except FiltersError:
        return {}


def _number(job: PageJob, path: Path) -> int:
    """Returns the number of a job's picture by its file; 0: it is another job's."""
    made = pictures.job_of(path.name)
    return made[1] if made and made[0] == job.id else 0


class _JobConsole(Console):
    """Takes a run's events into its job.

    Args:
        job: the job.
        tell: called when something of it has changed.
    """

    def __init__(self, job: PageJob, tell: Tell):
        super().__init__(as_events=True)
        self.run: Run | None = None
        self._job, self._tell, self._last = job, tell, 0.0

    def say(self, text: str, **event) -> None:
        """Takes an event."""
        name = event.pop("event", "said")
        if name == "said" and text.startswith("note: "):
            self._job.notes.append(plain(text.removeprefix("note: ")))
            self._tell("note", self._job)
        elif name == "progress":
            self._take_progress(**event)
        elif name == "picture":
            self.settle()

    def result(self, text: str) -> None:
        """Drops the report of the command."""

    def settle(self) -> None:
        """Takes the outcomes of the finished pictures of the run."""
        run, job = self.run, self._job
        if run is None or len(run.done) == len(job.pictures):
            return
        waits = any(said == "waiting" for said, _ in run.done)
        reviews = waiting_of(job) if waits else {}
        for index in range(len(job.pictures), len(run.done)):
            said, path = run.done[index]
            job.pictures.append(outcome(job, index, plain(said), path, reviews.get(index + 1)))
        job.preview = job.png = None
        self._tell("picture", job)

    def _take_progress(self, *, stage: str, done: int, total: int, seconds: float) -> None:
        now = time.monotonic()
        if now - self._last < _EVERY and done < total:
            return
        self._last = now
        label, unit = STAGES[stage].label, STAGES[stage].unit
        shown = {"stage": stage, "label": label, "unit": unit, "done": done, "total": total, "seconds": seconds}
        self._job.progress = shown | {"picture": min(len(self._job.pictures) + 1, len(self._job.seeds))}
        self._tell("progress", self._job)


class _Preview:
    """Keeps the predicted picture after each step, as a PNG; a `preview` of `FluxPipeline.generate`."""

    def __init__(self, job: PageJob, tell: Tell):
        self._job, self._tell = job, tell

    def __call__(self, step: int, steps: int, pixels: np.ndarray) -> None:
        """Takes (B, h, w, 3) uint8 pixels."""
        data = io.BytesIO()
        Image.fromarray(pixels[0]).save(data, "PNG", compress_level=1)
        self._job.png, self._job.preview = data.getvalue(), {"step": step, "steps": steps}
        self._tell("preview", self._job)
