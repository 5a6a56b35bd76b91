"""Refusals: of outputs that nobody could judge where the licence asks for it, and of runs that nobody may continue."""

from collections.abc import Callable

import numpy as np
from PIL import Image

from ..checkpoint import Checkpoint
from ..errors import FluxKreaError, ModelError, UsageError
from ..files import read_json, sha256_if_exists
from ..request import Request
from ..weights import ModelFolder
from .gate import Gate, Policy


def check_reviewable(policy: Policy, request: Request, callback: Callable | None, preview: Callable | None) -> None:
    """Refuses outputs, callbacks and inputs that no filter or person can check.

    Raises:
        UsageError: naming the argument.
    """
    unjudged = "this model's licence asks for filters or review, and latents are pictures that nobody has checked"
    if request.output_type == "latent":
        raise UsageError('`output_type` is "latent"', '"pil" or "np"', unjudged)
    if callback is not None:
        raise UsageError("`callback_on_step_end` is given, which sees latents", "`progress`, which sees none", unjudged)
    if preview is not None:
        raise UsageError("`preview` is given, which shows unfinished pictures", "`progress`, which does not", unjudged)
    if policy.check != "review" and (request.prompt_embeds is not None or request.negative_prompt_embeds is not None):
        raise UsageError("a prompt is given as embeds, which no filter can read", "a text")


def show_checked(gate: Gate, show: Callable, step: int, steps: int, pixels: np.ndarray) -> None:
    """Shows an unfinished picture at a third and at two thirds of the steps, if both filters pass what is shown.

    Args:
        gate: of the run.
        show: called with the step, the number of steps, and (1, H, W, 3) uint8.
        step: that has ended.
        steps: of the picture.
        pixels: (B, H/8, W/8, 3) uint8.
    """
    if step not in {-(-steps // 3), -(-2 * steps // 3)} - {steps}:
        return
    small = Image.fromarray(pixels[0])
    shown = np.asarray(small.resize((8 * small.width, 8 * small.height), Image.Resampling.BICUBIC))
    if gate.passes_preview(shown):
        show(step, steps, shown[None])


def check_free(checkpoint: Checkpoint, folder: ModelFolder) -> None:
    """Checks that the run of a checkpoint may be continued by a model that requires no filters.

    The run names its model by the hash of the manifest. A manifest may be copied into another folder, so the folder's
    own index, which says what the licence asks for, must be the one that the manifest lists.

    Raises:
        ModelError: its latents must be judged, or nothing shows that they need not.
    """
    todo = "name the model that the run started with"
    if checkpoint.filters == "required":
        found = f"this run's pictures must be filtered or reviewed, and {folder.path} is a model without that duty"
        raise ModelError(found, "the model that the run started with", todo)
    if not checkpoint.has_latents:
        return
    started, manifest = checkpoint.run.get("made_by"), folder.path / "manifest.json"
    if not isinstance(started, dict):
        if checkpoint.filters != "none":
            raise ModelError("nothing shows that these latents need no filters", "a run of this version", todo)
        return
    same = started.get("manifest_sha256") == sha256_if_exists(manifest)
    if same and checkpoint.filters != "none":  # written before the duty was stored: the index has to be the listed one
        try:
            listed = read_json(manifest).get("model_index.json")
        except FluxKreaError:
            listed = None
        digest = sha256_if_exists(folder.path / "model_index.json")
        same = isinstance(listed, dict) and listed.get("sha256") == digest
    if not same:
        raise ModelError(f"{folder.path} is not the model that this run started with, or was changed", "", todo)
