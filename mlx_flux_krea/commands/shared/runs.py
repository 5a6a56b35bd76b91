"""A run of `generate`: its pictures, its state, and both as JSON in the checkpoint of an unfinished run.

A checkpoint may come from anybody. Its options are read like those of a prompt file; only checkpoints in our own folder
may say where pictures are written and whether they replace files.
"""

import contextlib
import functools
import hashlib
import io
import os
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlx_flux_krea.checkpoint import Checkpoint
from mlx_flux_krea.errors import FiltersError, FluxKreaError, PartlyDone, UsageError, Withheld, amount, printable
from mlx_flux_krea.files import read_small, remove_partials, sha256_if_exists
from mlx_flux_krea.filters.ledger import Ledger, pixel_hash
from mlx_flux_krea.provenance import SOFTWARE, Picture, opened, read_picture
from mlx_flux_krea.weights import ModelFolder

from . import candidates, signals
from .images import Opened, restored_images, stored_images
from .jobs import UNTYPED, PictureJob, default_output, output_name
from .options import BY_NAME, cast
from .sheet import sheet_of, small, thumbnail
from .styles import absolute_style
from .terminal import Console

_LARGEST = 2**30  # bytes of a picture's file
_STRICTER = {"nsfw_threshold": min, "integrity_margin": max}


@dataclass
class Run:
    """One run of `generate` or `resume`."""

    options: dict[str, Any]  # of the whole run
    jobs: list[PictureJob]
    done: list[tuple[str, Path | None]] = field(default_factory=list)  # outcome and file of the first jobs
    skipped: dict[str, str] = field(default_factory=dict)  # unusable rows of a prompt file, with the reason
    rows: str = ""  # the name of that file
    force: bool = False
    made_by: dict[str, str] = field(default_factory=dict)  # hash of the model's manifest, versions
    images: Opened = field(default_factory=dict)  # input images
    checkpoint: Checkpoint = field(default_factory=lambda: Checkpoint({}))
    is_resumed: bool = False
    claimed: dict[str, Any] = field(default_factory=dict)  # the file about to get its name: path, sha256, process
    unreported: Path | None = None  # a file saved by a killed process, which was not reported
    _small: dict[int, Picture] = field(default_factory=dict)  # thumbnails for a contact sheet
    _claimed_small: Picture | None = None  # of the file about to get its name

    @functools.cached_property
    def _ledger(self) -> Ledger:
        """The log is read once, however many pictures are looked up in it."""
        return Ledger()

    @property
    def remaining(self) -> list[PictureJob]:
        """Jobs that are not done."""
        return self.jobs[len(self.done) :]

    @property
    def taken(self) -> Counter:
        """Number of pictures saved from each output name."""
        return Counter(job.output for job, (_, path) in zip(self.jobs, self.done, strict=False) if path)

    @property
    def has_pictures(self) -> bool:
        """True where a picture was released, so that a later failure concerns a part of the run."""
        return any(outcome == "released" for outcome, _ in self.done)

    def add(self, outcome: str, path: Path | None) -> None:
        """Records the outcome of the next job."""
        if path and self._claimed_small:
            self._small[len(self.done)] = self._claimed_small
        self.done.append((outcome, path))
        self.claimed, self._claimed_small = {}, None

    def keep_candidate(self, outcome: str, picture: Image.Image | None) -> None:
        """Keeps the next job as an unfinished run of its own, and its predicted picture for the contact sheet.

        Args:
            outcome: of the prediction; one that was withheld is not kept.
            picture: the prediction, once it was released.
        """
        if outcome.startswith("withheld"):
            return
        number, job = len(self.done), self.remaining[0]
        job = replace(job, options=candidates.plain_options(job.options))
        options = candidates.plain_options(self.options)
        alone = Run(options, [job], force=self.force, made_by=self.made_by)
        images = stored_images(job.options, self.images)
        if picture is not None:
            self._small[number] = Picture.from_pixels(small(picture.convert("RGB")), {})
            images[candidates.SHOWN] = np.asarray(picture.convert("RGB"))
        self.checkpoint.copy(candidates.name_of(self.checkpoint.path.stem, number + 1), alone.to_json(), images)

    def claim(self, path: Path, encoded: bytes) -> None:
        """Records in the checkpoint which file gets its name next, in case the process is killed right after."""
        digest = hashlib.sha256(encoded).hexdigest()
        if self.remaining and self.options.get("contact_sheet"):
            self._claimed_small = thumbnail(encoded)
        self.claimed = {"path": os.path.abspath(path), "sha256": digest, "process": os.getpid()}
        self.checkpoint.run = self.to_json()
        self.checkpoint.write()

    def take_over(self, is_filtered: bool) -> None:
        """Marks as done an output that a killed process saved but did not record.

        Args:
            is_filtered: filters are required, so that the log must have the release too.

        Raises:
            FiltersError: the log is damaged.
        """
        if not self.claimed:
            return
        if is_filtered:
            self._ledger.recover()  # which may give the file its name
        path, digest = Path(self.claimed["path"]), self.claimed["sha256"]
        remove_partials(path, self.claimed["process"])
        if not path.is_file() or sha256_if_exists(path) != digest:
            return
        if not self.remaining:
            self.options.pop("contact_sheet", None)
        elif is_filtered and not self._ledger.log.has_written(digest):
            return
        else:
            self.add("released", path)
        self.unreported = path

    def confirm(self, console: Console, *, is_filtered: bool) -> None:
        """Reads finished pictures of an earlier process for the contact sheet. Those that cannot be ours do not count.

        Args:
            console: where pictures that do not count are named.
            is_filtered: filters are required, so that the log must say that exactly these files were written.

        Raises:
            FiltersError: filters are required, and the log is damaged.
        """
        if self.options.get("candidates"):
            self._confirm_candidates(console, is_filtered=is_filtered)
        for i, (job, (_, path)) in enumerate(zip(self.jobs, self.done, strict=False)):
            if not path or not self.options.get("contact_sheet"):
                continue
            try:
                data = read_small(path, most=_LARGEST)
                self._check_written(job, data, is_filtered=is_filtered)
                self._small[i] = thumbnail(data)
            except (OSError, UsageError) as error:
                reason = error.found if isinstance(error, UsageError) else error.strerror or str(error)
                console.note(printable(f"the contact sheet lacks a picture: {path}: {reason}"))

    def _confirm_candidates(self, console: Console, *, is_filtered: bool) -> None:
        """Reads the predicted pictures of an earlier process; where filters are required, the log must know them."""
        for i, (outcome, _) in enumerate(self.done):
            if outcome != "released":
                continue
            name = candidates.name_of(self.checkpoint.path.stem, i + 1)
            try:
                kept = candidates.read(name)
                kept.close()
                pixels = candidates.pixels_of(kept)
                if is_filtered and not self._ledger.log.has_released(pixel_hash(pixels)):
                    raise UsageError("the log does not say that this picture was released")
                self._small[i] = Picture.from_pixels(small(Image.fromarray(pixels)), {})
            except UsageError as error:
                console.note(printable(f"the contact sheet lacks candidate {i + 1}: {error.found}"))

    def _check_written(self, job: PictureJob, data: bytes, *, is_filtered: bool) -> None:
        """Checks that a file is the released picture of a job, whatever a resume file says.

        Raises:
            UsageError: it is not, or nothing shows it.
        """
        if is_filtered:
            if not self._ledger.log.has_written(hashlib.sha256(data).hexdigest()):
                raise UsageError("the log does not say that this file was released")
            return
        facts = read_picture(io.BytesIO(data))
        record = facts["record"]
        if record is None:
            ours = job.options.get("metadata") == "minimal" and SOFTWARE.split()[0] in (facts["software"] or "")
        else:
            prompt = record.get("prompt") if record.get("truncated") else job.options.get("prompt")
            expected = {"manifest_sha256": self.made_by.get("manifest_sha256"), "seed": job.seed, "prompt": prompt}
            ours = expected == {name: record.get(name) for name in expected}
        if not ours:
            raise UsageError("it is not the picture that this run made")
        with opened(io.BytesIO(data)) as image:
            pixels = pixel_hash(np.asarray(image.convert("RGB")))
        with contextlib.suppress(FiltersError):  # a model without filters runs without a log too
            if self._ledger.log.is_withheld(pixels):
                raise UsageError("the log does not say that this picture was released")

    def sheet(self) -> Picture | None:
        """Makes the contact sheet of the pictures of this process, and of those that `confirm` has read."""
        if self.options.get("candidates"):
            return candidates.sheet_of(self._small, self.jobs, self.made_by) if self._small else None
        pictures = [(job, self._small[i]) for i, job in enumerate(self.jobs) if i in self._small]
        return sheet_of(pictures) if pictures else None

    def advance(self) -> None:
        """Writes the checkpoint for the next picture or contact sheet; removes it where nothing remains."""
        if self.done:
            candidates.forget(self.jobs[len(self.done) - 1])
        if not self.remaining and not self.options.get("contact_sheet"):
            self.checkpoint.remove()
            return
        images = stored_images(self.remaining[0].options, self.images) if self.remaining else {}
        begun = candidates.begun(self.remaining[0]) if self.remaining else None
        self.checkpoint.start_picture(self.to_json(), images, begun)
        if begun:
            begun.close()

    @property
    def position(self) -> str:
        """How far the run is, for messages."""
        checkpoint = self.checkpoint
        step = f"at step {checkpoint.done} of {checkpoint.total}" if checkpoint.done else "before the first step"
        picture = f" of picture {min(len(self.done) + 1, len(self.jobs))} of {len(self.jobs)}"
        return step + picture * (len(self.jobs) > 1)

    def to_json(self) -> dict[str, Any]:
        """Returns the run as JSON. Paths are absolute, since `resume` may run in another folder."""
        names = ("where", "seed", "label", "row")
        return {
            "options": _plain({"output": default_output(), **self.options}),
            "jobs": [
                {name: getattr(job, name) for name in names}
                | {"options": _plain(job.options), "output": os.path.abspath(job.output)}
                for job in self.jobs
            ],
            "done": [[outcome, path and os.path.abspath(path)] for outcome, path in self.done],
            "skipped": self.skipped,
            "rows": self.rows,
            "force": self.force,
            "made_by": self.made_by,
            "named": self.claimed,
        }

    @classmethod
    def from_picked(cls, picked: list[Checkpoint]) -> "Run":
        """Returns a run that finishes candidates.

        Raises:
            UsageError: a checkpoint is damaged.
        """
        runs = [cls.from_checkpoint(checkpoint) for checkpoint in picked]
        jobs = [
            replace(run.jobs[0], options=run.jobs[0].options | {candidates.SHOWN: checkpoint.path.stem})
            for run, checkpoint in zip(runs, picked, strict=True)
        ]
        run = cls(runs[0].options, jobs, force=runs[0].force, made_by=runs[0].made_by)
        for job, checkpoint in zip(jobs, picked, strict=True):
            run.images |= restored_images(job.options, checkpoint.images)
        run.checkpoint.run, run.checkpoint.filters = run.to_json(), picked[0].filters
        return run

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> "Run":
        """Reads an unfinished run.

        A checkpoint outside our folder writes its pictures into the current folder and replaces no file.

        Raises:
            UsageError: anything that `to_json` does not write.
        """
        obj, ours = checkpoint.run, checkpoint.is_ours
        _check_run(obj)
        run = cls(
            options=_typed(obj["options"]),
            jobs=[_job(job) for job in obj["jobs"]],
            done=[(outcome, path and Path(path)) for outcome, path in obj["done"]],
            skipped=obj["skipped"],
            rows=obj["rows"],
            force=obj["force"] and ours,
            made_by=obj["made_by"],
            checkpoint=checkpoint,
            is_resumed=True,
            claimed=obj["named"] if ours else {},
        )
        if not 0 < len(run.jobs) >= len(run.done):
            found = f"the file has {amount(len(run.done), 'finished picture')} of {len(run.jobs)}"
            raise UsageError(found, "a list of pictures that `generate` wrote")
        if not ours:
            run.options.pop("preview", None)
            run.jobs = [
                replace(
                    job,
                    output=Path(job.output.name),
                    options={name: value for name, value in job.options.items() if name != candidates.SHOWN},
                )
                for job in run.jobs
            ]
            run.options["output"] = Path(run.options.get("output", default_output()).name)
        return run

    def place(self, template: Path) -> None:
        """Gives the remaining pictures new names, as --output does."""
        self.options["output"] = template  # also names the contact sheet
        for i, job in enumerate(self.remaining, len(self.done)):
            output = output_name(template, prompt=job.options.get("prompt", ""), seed=job.seed, number=i + 1)
            self.jobs[i] = replace(job, output=output)

    def restrict(self, config: dict) -> None:
        """Applies the checks of the config file where they are stricter than the run's own."""
        if "check" in config:
            same = self.options.get("check") in (None, config["check"])
            self.options["check"] = config["check"] if same else "both"
        for name, stricter in _STRICTER.items():
            if name in config:
                self.options[name] = stricter(config[name], self.options.get(name, config[name]))


@contextlib.contextmanager
def resumable(run: Run, model: ModelFolder, console: Console) -> Iterator[None]:
    """Keeps a checkpoint of a run within the block, until nothing of it remains.

    Args:
        run: the run.
        model: its model.
        console: where a failure is explained.

    Raises:
        FluxKreaError: as raised in the block, with the command that resumes the run; PartlyDone after a release.
    """
    if not run.is_resumed:
        run.made_by = run.made_by or made_by(model)
    if not run.is_resumed or run.unreported:
        run.advance()
    checkpoint = run.checkpoint
    try:
        yield
        checkpoint.remove()
    except signals.Stopped as stopped:
        checkpoint.write()
        stopped.message += f" {run.position}; continue with: {_command(checkpoint)}" if checkpoint.exists else ""
        raise
    except FluxKreaError as error:
        todo = ""
        if isinstance(error, Withheld) or not (checkpoint.done or run.done):
            checkpoint.remove()
        else:
            checkpoint.write()
            todo = f"continue with: {_command(checkpoint)}" * checkpoint.exists
        explained = error.with_next_step(todo)
        if run.has_pictures:
            raise PartlyDone(explained.found, explained.expected, explained.todo) from error
        raise explained from error
    except Exception:
        checkpoint.write()
        if checkpoint.exists:
            console.say(f"note: the run is saved; continue with: {_command(checkpoint)}")
        raise
    finally:
        checkpoint.close()


def made_by(model: ModelFolder) -> dict[str, str]:
    """Returns the hash of the model and the versions, which decide pictures along with a run's options."""
    manifest = sha256_if_exists(model.path / "manifest.json") or ""
    return {"manifest_sha256": manifest, "software": SOFTWARE, "mlx": version("mlx")}


def _command(checkpoint: Checkpoint) -> str:
    return f"flux-krea resume {shlex.quote(checkpoint.name)}"


def _check_run(obj: dict) -> None:
    """Checks the fields of a run and their types.

    Raises:
        UsageError: one is wrong.
    """
    _check(
        obj,
        {
            "options": dict,
            "jobs": list,
            "done": list,
            "skipped": dict,
            "rows": str,
            "force": bool,
            "made_by": dict,
            "named": dict,
        },
    )
    if obj["named"]:
        _check(obj["named"], {"path": str, "sha256": str, "process": int})
    for texts in (obj["skipped"], obj["made_by"]):
        _check(texts, dict.fromkeys(texts, str))
    for entry in obj["done"]:
        if type(entry) is not list or [type(value) for value in entry] not in ([str, str], [str, type(None)]):
            raise UsageError("the file's list of finished pictures is damaged", "a list that `generate` wrote")


def _check(obj, kinds: dict[str, type]) -> None:
    """Refuses anything but an object with exactly these fields."""
    if type(obj) is not dict or {name: type(value) for name, value in obj.items()} != kinds:
        raise UsageError("the file's list of pictures is damaged", "a list that `generate` wrote")


def _job(obj: dict) -> PictureJob:
    _check(obj, {"where": str, "options": dict, "seed": int, "label": str, "row": int, "output": str})
    return PictureJob(**obj | {"options": _typed(obj["options"]), "output": Path(obj["output"])})


def _plain(options: dict) -> dict:
    """Returns options as JSON."""
    paths = {name for name, value in options.items() if isinstance(value, Path)}
    if os.path.isdir(options.get("model", "")):  # else the name of an installed one
        paths.add("model")
    plain = {name: os.path.abspath(value) if name in paths else value for name, value in options.items()}
    plain |= {"style": tuple(map(absolute_style, options["style"]))} if "style" in options else {}
    return {name: list(map(os.path.abspath, value)) if _is_paths(value) else value for name, value in plain.items()}


def _is_paths(value: object) -> bool:
    return isinstance(value, tuple) and any(isinstance(one, Path) for one in value)


def _typed(options: dict) -> dict:
    """Reads options from JSON."""
    known = tuple(BY_NAME)
    typed = (
        (name, value) if name in UNTYPED else cast(name, value, known)
        for name, value in options.items()
        if value is not None
    )
    return {name: value for name, value in typed if value is not False}
