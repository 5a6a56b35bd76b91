"""A run of `generate`: its pictures, how far they are, and both as JSON in the file of an unfinished one.

That file may be anybody's. What it holds are options, and they are read as those of a prompt file are; where pictures
go, and what stands in their way, only our own files may say.
"""

import contextlib
import hashlib
import os
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from mlx_flux_krea.checkpoint import Checkpoint
from mlx_flux_krea.errors import FluxKreaError, PartlyDone, UsageError, Withheld, amount
from mlx_flux_krea.files import remove_partials, sha256_if_exists
from mlx_flux_krea.filters.ledger import Ledger
from mlx_flux_krea.provenance import SOFTWARE, Picture, opened, read_record
from mlx_flux_krea.weights import ModelFolder

from . import signals
from .jobs import UNTYPED, Job, output_name
from .options import BY_NAME, USUAL, cast
from .sheet import sheet_of, thumbnail
from .terminal import note, say

_STRICTER = {"nsfw_threshold": min, "integrity_margin": max}


@dataclass
class Run:
    """What was asked for at once."""

    options: dict  # that hold for all of it
    jobs: list[Job]
    done: list[tuple[str, Path | None]] = field(default_factory=list)  # outcome and file of the first of them
    skipped: dict[str, str] = field(default_factory=dict)  # rows of a prompt file, and why
    rows: str = ""  # the name of that file
    force: bool = False
    made_by: dict[str, str] = field(default_factory=dict)  # hash of the model's manifest, versions
    images: dict = field(default_factory=dict)  # input images that were opened, by their paths
    checkpoint: Checkpoint | None = None  # where it is kept
    named: dict = field(default_factory=dict)  # the file that is about to take its name: path, sha256, process
    found: Path | None = None  # such a file of a process that was killed, as long as nobody was told of it
    _small: dict[int, Picture] = field(default_factory=dict)  # thumbnails for a contact sheet

    @property
    def left(self) -> list[Job]:
        """What is still to be drawn."""
        return self.jobs[len(self.done) :]

    @property
    def taken(self) -> Counter:
        """How many pictures were written from each output's name."""
        return Counter(job.output for job, (_, path) in zip(self.jobs, self.done, strict=False) if path)

    @property
    def has_pictures(self) -> bool:
        """Whether any was released: a failure after that is one of a part."""
        return any(path for _, path in self.done)

    def add(self, outcome: str, path: Path | None, picture: Picture | None) -> None:
        """The next picture has its outcome."""
        if path and picture and self.options.get("contact_sheet"):
            self._small[len(self.done)] = thumbnail(picture)
        self.done.append((outcome, path))
        self.named = {}

    def note_file(self, path: Path, encoded: bytes) -> None:
        """Keeps which file takes its name next: a process may be killed before it can say that it has it."""
        digest = hashlib.sha256(encoded).hexdigest()
        self.named = {"path": os.path.abspath(path), "sha256": digest, "process": os.getpid()}
        self.checkpoint.run = self.to_json()
        self.checkpoint.write()

    def take_over(self, is_filtered: bool) -> None:
        """Counts as done what a process that was killed had given its name, and not yet counted.

        Args:
            is_filtered: then the log too must say that it was released.

        Raises:
            FiltersError: the log is damaged.
        """
        if not self.named:
            return
        path, digest = Path(self.named["path"]), self.named["sha256"]
        remove_partials(path, self.named["process"])
        if not path.is_file() or sha256_if_exists(path) != digest:
            return
        if not self.left:
            self.options.pop("contact_sheet", None)
        elif is_filtered and not Ledger().log.has_written(digest):
            return
        else:
            self.add("released", path, None)
        self.found = path

    def sheet(self) -> Picture | None:
        """All its pictures as one; those of an earlier process are read from their files."""
        made = []
        for i, (job, (_, path)) in enumerate(zip(self.jobs, self.done, strict=True)):
            if path and i not in self._small:
                try:
                    with opened(path) as image:
                        self._small[i] = thumbnail(Picture.from_pixels(image.convert("RGB"), read_record(path) or {}))
                except UsageError as error:
                    note(f"the contact sheet lacks a picture: {error.found}")
            made += [(job, self._small[i])] if i in self._small else []
        return sheet_of(made) if made else None

    def advance(self) -> None:
        """Keeps what is left from here on: the next picture, a contact sheet, or nothing."""
        if not self.left and not self.options.get("contact_sheet"):
            self.checkpoint.remove()
            return
        path = self.left[0].options.get("image") if self.left else None
        self.checkpoint.begin(self.to_json(), None if path is None else np.asarray(self.images[path]))

    @property
    def reached(self) -> str:
        """How far it is, for whoever interrupted it."""
        kept = self.checkpoint
        step = f"at step {kept.done} of {kept.total}" if kept.done else "before the first step"
        picture = f" of picture {min(len(self.done) + 1, len(self.jobs))} of {len(self.jobs)}"
        return step + picture * (len(self.jobs) > 1)

    def to_json(self) -> dict:
        """As JSON; with whole paths, since whoever goes on may be elsewhere."""
        names = ("where", "seed", "label", "row")
        return {
            "options": _plain({"output": Path(USUAL["output"]), **self.options}),
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
            "named": self.named,
        }

    @classmethod
    def from_json(cls, obj: dict, ours: bool) -> "Run":
        """Its reverse.

        Args:
            obj: from the file.
            ours: whether it lay where only we write; else pictures go to the folder at hand, and take nobody's name.

        Raises:
            UsageError: anything that is not as we write it.
        """
        _check(obj, {"options": dict, "jobs": list, "done": list, "skipped": dict, "rows": str, "force": bool,
                     "made_by": dict, "named": dict})  # fmt: skip
        if obj["named"]:
            _check(obj["named"], {"path": str, "sha256": str, "process": int})
        for texts in (obj["skipped"], obj["made_by"]):
            _check(texts, dict.fromkeys(texts, str))
        for entry in obj["done"]:
            if type(entry) is not list or [type(value) for value in entry] not in ([str, str], [str, type(None)]):
                raise UsageError("the file's list of finished pictures is none", "what we wrote")
        run = cls(
            options=_typed(obj["options"]),
            jobs=[_job(job) for job in obj["jobs"]],
            done=[(outcome, path and Path(path)) for outcome, path in obj["done"]],
            skipped=obj["skipped"],
            rows=obj["rows"],
            force=obj["force"] and ours,
            made_by=obj["made_by"],
            named=obj["named"] if ours else {},
        )
        if not 0 < len(run.jobs) >= len(run.done):
            raise UsageError(
                f"the file tells of {amount(len(run.done), 'picture')} of {len(run.jobs)}", "what we wrote"
            )
        if not ours:
            run.options.pop("preview", None)
            run.jobs = [replace(job, output=Path(job.output.name)) for job in run.jobs]
            run.options["output"] = Path(run.options.get("output", USUAL["output"]).name)
        return run

    def place(self, template: Path) -> None:
        """Gives what is left other places, by such a name as --output takes."""
        self.options["output"] = template  # beside which a contact sheet goes
        for i, job in enumerate(self.left, len(self.done)):
            output = output_name(template, job.options.get("prompt", ""), job.seed, i + 1)
            self.jobs[i] = replace(job, output=output)

    def restrict(self, config: dict) -> None:
        """Checks at least as strictly as a new run would: where file and config file differ, the stricter holds."""
        if "check" in config:
            same = self.options.get("check") in (None, config["check"])
            self.options["check"] = config["check"] if same else "both"
        for name, stricter in _STRICTER.items():
            if name in config:
                self.options[name] = stricter(config[name], self.options.get(name, config[name]))


@contextlib.contextmanager
def keeping(run: Run, model: ModelFolder) -> Iterator[None]:
    """Keeps a run in a file as long as something of it is left to do.

    Args:
        run: the run; its `checkpoint` is that of an interrupted one, or None.
        model: what draws it.

    Raises:
        FluxKreaError: as it comes from the block; where something was drawn, with the way to go on.
    """
    is_new = run.checkpoint is None
    if is_new:
        run.checkpoint, run.made_by = Checkpoint({}), made_by(model)
    if is_new or run.found:
        run.advance()
    kept = run.checkpoint
    try:
        yield
        kept.remove()
    except signals.Stopped as stopped:
        kept.write()
        stopped.message += f" {run.reached}; go on with: {_command(kept)}" if kept.exists else ""
        raise
    except FluxKreaError as error:
        todo = ""
        if isinstance(error, Withheld) or not (kept.done or run.done):
            kept.remove()
        else:
            kept.write()
            todo = f"go on with: {_command(kept)}" * kept.exists
        told = error.with_next_step(todo)
        if run.has_pictures:
            raise PartlyDone(told.found, told.expected, told.todo) from error
        raise told from error
    except Exception:
        kept.write()
        if kept.exists:
            say(f"note: what was drawn is kept; go on with: {_command(kept)}")
        raise
    finally:
        kept.close()


def made_by(model: ModelFolder) -> dict[str, str]:
    """What beside a run's options decides its pictures."""
    manifest = sha256_if_exists(model.path / "manifest.json") or ""
    return {"manifest_sha256": manifest, "software": SOFTWARE, "mlx": version("mlx")}


def _command(checkpoint: Checkpoint) -> str:
    return f"flux-krea resume {shlex.quote(checkpoint.name)}"


def _check(obj, kinds: dict[str, type]) -> None:
    """Refuses what is not an object of exactly these fields."""
    if type(obj) is not dict or {name: type(value) for name, value in obj.items()} != kinds:
        raise UsageError("the file's list of pictures is none", "what we wrote")


def _job(obj) -> Job:
    _check(obj, {"where": str, "options": dict, "seed": int, "label": str, "row": int, "output": str})
    return Job(**obj | {"options": _typed(obj["options"]), "output": Path(obj["output"])})


def _plain(options: dict) -> dict:
    """Options as JSON."""
    is_path = {name for name, value in options.items() if isinstance(value, Path)}
    if os.path.isdir(options.get("model", "")):  # else the name of an installed one
        is_path.add("model")
    return {name: os.path.abspath(value) if name in is_path else value for name, value in options.items()}


def _typed(options: dict) -> dict:
    """Options from JSON."""
    known = tuple(BY_NAME)
    typed = (
        (name, value) if name in UNTYPED else cast(name, value, known)
        for name, value in options.items()
        if value is not None
    )
    return {name: value for name, value in typed if value is not False}
