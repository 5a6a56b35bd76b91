"""`bench --fast`: one model's latents in several modes, compared, to choose the mode of --fast.

Five runs of a first picture, then three of a second: the full run, and the two modes that were nearest to it. Each run
is an unfinished one in a file of its own, so that a second call continues where the first was stopped. Nothing is
decoded, and the files are deleted at the end.
"""

import contextlib
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mlx_flux_krea import FluxPipeline, home
from mlx_flux_krea.checkpoint import Checkpoint
from mlx_flux_krea.errors import ResourceError, UsageError, amount
from mlx_flux_krea.fast import FastMode, store_choice
from mlx_flux_krea.files import sha256_if_exists, try_lock
from mlx_flux_krea.presets import FAST_FROM
from mlx_flux_krea.provenance import SOFTWARE
from mlx_flux_krea.sampling.rules import fast_skips, skip_steps

from . import signals
from .terminal import Console, PipelineProgress
from .text import duration, table

PICTURES = ("a large red circle on a white background", "a small blue square and a large yellow star")
_SIDE = 512  # pixels at most
_CACHES = ("skip", "first-block:0.08:1", "first-block:0.12:1")
_SECOND = 2  # modes that are tried on the second picture
_NOTHING = "there is nothing to choose for --fast"


@dataclass(frozen=True)
class Trial:
    """One run of one picture.

    Attributes:
        picture: 1 or 2.
        mode: in which its steps were taken; None: all were computed.
        evaluations: steps that were computed in full.
        distance: of its latents from those of the full run, relative to the length of these.
    """

    picture: int
    mode: FastMode | None
    evaluations: int
    distance: float

    @property
    def name(self) -> str:
        """The mode, for people."""
        return "full" if self.mode is None else f"{self.mode}{' steps' if self.mode.steps else ''}"


def modes(steps: int) -> list[FastMode]:
    """Returns the modes that are measured, for a model of so many steps."""
    fewer = FastMode(steps=(len(skip_steps(steps)), steps))
    return [*map(FastMode.parse, _CACHES), fewer]


def nearest(trials: Sequence[Trial], steps: int) -> list[FastMode]:
    """Returns modes that computed at most two thirds of the steps of every picture, the nearest to the full run first.

    Args:
        trials: of one picture or of several; a mode counts by its mean distance, where it ran on all of them.
        steps: of the full run.
    """
    most, pictures = _most(steps), {trial.picture for trial in trials}
    runs = {str(trial.mode): [one for one in trials if one.mode == trial.mode] for trial in trials if trial.mode}
    good = [own for own in runs.values() if len(own) == len(pictures) and max(one.evaluations for one in own) <= most]
    good.sort(key=lambda own: sum(one.distance for one in own) / len(own))
    return [own[0].mode for own in good if own[0].mode]


def _most(steps: int) -> int:
    """Returns the steps that a mode may compute, of so many."""
    return math.ceil(2 * steps / 3)


def check_choice(pipe: FluxPipeline) -> None:
    """Checks that --fast has a choice for a model.

    Raises:
        UsageError: the model was made for few steps, or needs images.
    """
    index = pipe.folder.index
    if index.task != "text-to-image":
        raise UsageError(f"{index.name} makes pictures of images: {_NOTHING}", "a model for text to image")
    if not fast_skips(index.schedule.shift, index.defaults.num_inference_steps):
        made = f"{index.name} was made for {amount(index.defaults.num_inference_steps, 'step')}, and all are computed"
        raise UsageError(f"{made}: {_NOTHING}", f"a model of {FAST_FROM} steps or more")


def shape_of(pipe: FluxPipeline) -> tuple[int, int]:
    """Returns width and height of the pictures that are compared."""
    default = pipe.folder.index.defaults
    return min(default.width, _SIDE), min(default.height, _SIDE)


def choose(pipe: FluxPipeline, seconds: float, console: Console) -> dict[str, Any]:
    """Runs what is missing, stores the choice, and returns the facts.

    Args:
        pipe: the model, which `check_choice` has passed.
        seconds: of a step.
        console: where the time and the progress are shown.

    Raises:
        UsageError: another process does the same.
        ResourceError: the home folder cannot be written.
    """
    steps, tried = pipe.folder.index.defaults.num_inference_steps, modes(pipe.folder.index.defaults.num_inference_steps)
    with _folder_of(pipe) as folder:
        runs = _Runs(pipe, folder, console)
        most = 4 * steps + 2 * len(skip_steps(steps)) + _SECOND * _most(steps)  # first-block may compute all
        left = max(most - runs.done, 0)
        text = f"at most {amount(left, 'step')} of {seconds:.3g} s: about {duration(left * seconds)}"
        console.say(f"{amount(1 + len(tried), 'run')} of one picture and {1 + _SECOND} of another, {text}")
        with signals.continued("the same command continues"):
            trials = runs.compared(1, tried)
            trials += runs.compared(2, nearest(trials, steps)[:_SECOND])
        order = nearest(trials, steps)
        if not order:
            raise UsageError(f"no mode computes at most two thirds of the steps: {_NOTHING}")
        facts = _facts(pipe, order[0], trials, steps)
        try:
            store_choice(pipe.folder.path, {name: facts[name] for name in ("mode", "share", "distance", "model")})
        except OSError as error:
            raise ResourceError(f"{home.path(home.FAST)} cannot be written: {error.strerror}") from None
        shutil.rmtree(folder, ignore_errors=True)
    return facts | {"seconds_per_step": seconds}


def _facts(pipe: FluxPipeline, mode: FastMode, trials: Sequence[Trial], steps: int) -> dict[str, Any]:
    """Returns the choice and the measurements as JSON."""
    own = [trial for trial in trials if trial.mode == mode]
    width, height = shape_of(pipe)
    return {
        "model": pipe.folder.index.name, "dtype": pipe.dtype, "width": width, "height": height, "steps": steps,
        "mode": str(mode), "share": float(np.mean([trial.evaluations for trial in own]) / steps),
        "distance": float(np.mean([trial.distance for trial in own])),
        "runs": [
            {"picture": one.picture, "mode": one.mode and str(one.mode), "evaluations": one.evaluations,
             "distance": one.distance}
            for one in trials
        ],
    }  # fmt: skip


def shown(facts: dict[str, Any]) -> str:
    """Formats the facts of `choose`: a table, and the choice."""
    rows: list[tuple[str, ...]] = [("mode", "picture", "evaluations", "distance")]
    for run in facts["runs"]:
        rows.append((run["mode"] or "full", str(run["picture"]), str(run["evaluations"]), f"{run['distance']:.4f}"))
    share = f"{facts['share']:.0%} of the steps"
    chosen = f"--fast is now {facts['mode']} for {facts['model']}: {share}, {facts['distance']:.2%} from the full run"
    return f"{table(rows, right=(1, 2, 3))}\n{chosen}"


class _Runs:
    """The runs of one model, each in a file of its own.

    Args:
        pipe: the model.
        folder: of the files.
        console: where the progress is shown.
    """

    def __init__(self, pipe: FluxPipeline, folder: Path, console: Console):
        self._pipe, self._folder, self._console = pipe, folder, console
        self._steps = pipe.folder.index.defaults.num_inference_steps
        made_by = {"software": SOFTWARE, "mlx": version("mlx")}
        made_by["manifest_sha256"] = sha256_if_exists(pipe.folder.path / "manifest.json") or ""
        self._made_by = made_by

    @property
    def done(self) -> int:
        """Steps that earlier calls have taken."""
        count = 0
        for path in self._folder.glob("*.safetensors"):
            with contextlib.suppress(UsageError):
                count += Checkpoint.read(path).done
        return count

    def compared(self, picture: int, tried: Sequence[FastMode]) -> list[Trial]:
        """Runs a picture in full and in some modes. Returns the trials."""
        trials, full = [], None
        for mode in (None, *tried):
            latents, evaluations = self._latents(picture, mode)
            full = latents if full is None else full
            distance = float(np.linalg.norm(latents - full) / np.linalg.norm(full))
            trials.append(Trial(picture, mode, evaluations, distance))
            one = trials[-1]
            self._console.say(f"picture {picture}, {one.name}: {one.evaluations} evaluations, distance {distance:.4f}")
        return trials

    def _latents(self, picture: int, mode: FastMode | None) -> tuple[np.ndarray, int]:
        """Returns the final latents of a run, and the steps that were computed in full."""
        width, height = shape_of(self._pipe)
        steps = self._steps if mode is None else mode.taken(self._steps)
        given: dict[str, Any] = {"width": width, "height": height, "num_inference_steps": steps, "seed": picture}
        given |= {"output_type": "latent"} | ({"cache": str(mode.cache)} if mode and mode.cache else {})
        known = given | {"dtype": self._pipe.dtype, "prompt": PICTURES[picture - 1]}
        checkpoint = self._opened(picture, mode, known)
        is_continued = checkpoint.has_latents
        try:
            return self._ran(checkpoint, PICTURES[picture - 1], given)
        except UsageError:
            if not is_continued:
                raise
            checkpoint.remove()  # it was damaged
            return self._ran(self._opened(picture, mode, known), PICTURES[picture - 1], given)

    def _ran(self, checkpoint: Checkpoint, prompt: str, given: dict[str, Any]) -> tuple[np.ndarray, int]:
        """Takes the steps that a checkpoint lacks. Returns as `_latents`."""
        tokens = given["width"] * given["height"] // (2 * self._pipe.folder.vae.sizes.downsampling) ** 2
        shape, shown = (1, tokens, self._pipe.folder.flux.sizes.out_channels), PipelineProgress(self._console)
        try:
            result = self._pipe.rehearse(prompt, progress=shown, checkpoint=checkpoint, **given)
            latents = checkpoint.latents(shape, given["num_inference_steps"])
        finally:
            shown.close()
            checkpoint.write()
            checkpoint.close()
        assert latents is not None  # after its last step
        return latents, len(result.steps_computed[0])

    def _opened(self, picture: int, mode: FastMode | None, given: dict[str, Any]) -> Checkpoint:
        """Returns the checkpoint of a run: that of an earlier call, where it is the same run, else a new one."""
        name = f"{picture}-{'full' if mode is None else str(mode)}".replace(":", "-").replace("/", "-of-")
        path, run = self._folder / f"{name}.safetensors", {"bench": given, "made_by": self._made_by}
        checkpoint = Checkpoint(run)
        with contextlib.suppress(UsageError):  # missing, or damaged
            found = Checkpoint.read(path)
            checkpoint = found if found.run == run else checkpoint
        checkpoint.path = path
        return checkpoint


@contextlib.contextmanager
def _folder_of(pipe: FluxPipeline) -> Iterator[Path]:
    """Gives the folder of a model's runs, which no other process uses meanwhile.

    Raises:
        UsageError: another one does.
        ResourceError: it cannot be made.
    """
    digest = sha256_if_exists(pipe.folder.path / "manifest.json") or "unknown"
    folder = home.path(home.CHECKPOINTS, f"bench-{digest[:16]}")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = try_lock(folder / "lock")
    except OSError as error:
        raise ResourceError(f"{folder} cannot be written: {error.strerror}", "", "make room there") from None
    if lock is None:
        raise UsageError("flux-krea bench --fast runs already for this model", "one at a time", "wait for it")
    try:
        yield folder
    finally:
        os.close(lock)
