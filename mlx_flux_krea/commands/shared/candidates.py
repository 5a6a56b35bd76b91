"""Candidates: pictures of which only the first steps are computed, each kept as an unfinished run of its own.

The run with the ID 3f2a9c1b keeps its third candidate as the unfinished run 3f2a9c1b-3, in a file of that name, with
its latents, and the predicted picture once that was released. `flux-krea resume 3f2a9c1b --pick 3` makes a new run of
the chosen ones, whose pictures begin with the steps that are stored; a file that is missing costs time alone.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from mlx_flux_krea.checkpoint import Checkpoint, folder
from mlx_flux_krea.errors import UsageError, amount
from mlx_flux_krea.provenance import SOFTWARE, Picture

from .jobs import PictureJob, PreparedJob
from .sheet import numbered_sheet

SHOWN = "candidate"  # name of the predicted picture in a checkpoint, and of the option that names the checkpoint
_NAME = re.compile(r"([\w-]+)-(\d{1,4})")
_OF_THE_RUN = ("candidates", "contact_sheet")  # options that a candidate does not keep
_SHARE = 3  # a candidate is computed for one step in so many


def stopped_early(prepared: PreparedJob) -> PreparedJob:
    """Returns a job that stops after about a third of its steps.

    Raises:
        UsageError: it has one step.
    """
    request = prepared.request
    count = request.num_inference_steps - request.first_step
    if count < 2:
        raise UsageError("--candidates, and a picture has one step", "2 steps or more")
    stop = max(1, round(count / _SHARE))
    given = prepared.given and replace(prepared.given, stop_after=stop)
    return replace(prepared, given=given, request=replace(request, stop_after=stop))


def plain_options(options: dict) -> dict:
    """Returns options without those of a run of candidates."""
    return {name: value for name, value in options.items() if name not in _OF_THE_RUN}


def name_of(run: str, number: int) -> str:
    """Returns the name of a candidate's checkpoint."""
    return f"{run}-{number}"


def run_of(name: str) -> str | None:
    """Returns the run that a candidate belongs to, by the name of its checkpoint; None: it is no candidate."""
    match = _NAME.fullmatch(name)
    return match[1] if match else None


def numbers_of(run: str) -> list[int]:
    """Returns the numbers of the candidates of a run that are kept."""
    matches = (_NAME.fullmatch(path.stem) for path in folder().glob(f"{run}-*.safetensors"))
    return sorted(int(match[2]) for match in matches if match and match[1] == run)


def read(name: str) -> Checkpoint:
    """Reads the checkpoint of a candidate, whose file may be resumed by others again once it is closed.

    Raises:
        UsageError: it is missing, damaged, or continued by another process.
    """
    return Checkpoint.read(folder() / f"{name}.safetensors")


def begun(job: PictureJob) -> Checkpoint | None:
    """Returns the checkpoint whose steps a chosen candidate begins with; None: it begins with its first step."""
    name = job.options.get(SHOWN)
    if not isinstance(name, str) or run_of(name) is None:
        return None
    try:
        return read(name)
    except UsageError:
        return None


def forget(job: PictureJob) -> None:
    """Deletes the checkpoint of a chosen candidate, once its picture is finished."""
    if checkpoint := begun(job):
        checkpoint.remove()


def read_picked(run: str, numbers: Sequence[int]) -> list[Checkpoint]:
    """Reads the checkpoints of chosen candidates. The caller closes them.

    Raises:
        UsageError: there is no such candidate.
    """
    known, opened = numbers_of(run), []
    if not known:
        raise UsageError(f"there are no candidates of a run {run}", "", "flux-krea resume --list lists what is there")
    if missing := [number for number in numbers if number not in known]:
        shown = ", ".join(map(str, known))
        raise UsageError(f"there is no unfinished candidate {missing[0]} of the run {run}", f"one of {shown}")
    try:
        for number in numbers:
            opened.append(read(name_of(run, number)))
    except BaseException:
        for checkpoint in opened:
            checkpoint.close()
        raise
    return opened


def choose(run: str) -> UsageError:
    """Returns the error for a run whose candidates wait for a choice."""
    numbers = numbers_of(run)
    shown = ", ".join(map(str, numbers))
    todo = f"flux-krea resume {run} --pick {numbers[0]}; or one as {name_of(run, numbers[0])}"
    return UsageError(f"the run {run} has {amount(len(numbers), 'candidate')}: {shown}", "a choice", todo)


def kept_message(run: str) -> str:
    """Returns how the candidates of a run are finished, or deleted; "" where none is kept."""
    numbers = numbers_of(run)
    if not numbers:
        return ""
    which = " ".join(map(str, numbers[:2]))
    return (
        f"{amount(len(numbers), 'candidate is', 'candidates are')} kept unfinished; finish those you choose: "
        f"flux-krea resume {run} --pick {which}; the others stay until: flux-krea purge --unfinished"
    )


def sheet_of(shown: dict[int, Picture], jobs: Sequence[PictureJob], made_by: dict[str, str]) -> Picture:
    """Makes the contact sheet of predicted pictures.

    Args:
        shown: small pictures, by the places of their jobs.
        jobs: of all candidates; those without a picture leave their place empty.
        made_by: of the run.
    """
    side = max(max(picture.size) for picture in shown.values())
    across = max(4, math.ceil(math.sqrt(len(jobs))))
    pictures: list[Image.Image | None] = [shown.get(i) for i in range(len(jobs))]
    record = {
        "software": SOFTWARE,
        "manifest_sha256": made_by.get("manifest_sha256"),
        "sheet": {"candidates": [{"prompt": job.options.get("prompt"), "seed": job.seed} for job in jobs]},
    }
    return Picture.from_pixels(numbered_sheet(pictures, across=across, side=side), record)


def pixels_of(checkpoint: Checkpoint) -> np.ndarray:
    """Returns the predicted picture that a candidate was released with.

    Raises:
        UsageError: it has none.
    """
    if SHOWN not in checkpoint.images:
        raise UsageError("it was not released", "a released prediction")
    return checkpoint.images[SHOWN]
