"""An unfinished run, read from its checkpoint and made ready to continue with a pipeline."""

from pathlib import Path

from mlx_flux_krea import FluxPipeline
from mlx_flux_krea.checkpoint import Checkpoint
from mlx_flux_krea.errors import ModelError, UsageError
from mlx_flux_krea.filters.duty import check_free

from . import settings
from .images import restored_images
from .loras import load_all
from .runs import Run, made_by
from .terminal import Console


def read_run(checkpoint: Checkpoint, path: Path) -> Run:
    """Reads the run of a checkpoint, with the checks of the config file where they are stricter.

    Args:
        checkpoint: the open file.
        path: its path, for errors.

    Raises:
        UsageError: the file is damaged, or the config file is.
    """
    try:
        run = Run.from_checkpoint(checkpoint)
    except UsageError as error:
        raise UsageError(f"{path}: {error.found}", error.expected, error.todo) from None
    run.restrict(settings.read_options())
    if run.remaining:
        run.images |= restored_images(run.remaining[0].options, checkpoint.images)
    return run


def model_options(run: Run) -> dict:
    """Returns the options by which `open_pipeline` finds the model of a run."""
    by_hash = {} if "model" in run.options else {"manifest_sha256": run.made_by.get("manifest_sha256")}
    return run.options | by_hash


def make_ready(run: Run, pipe: FluxPipeline, console: Console) -> None:
    """Checks that a run may continue with a pipeline, and takes over a picture that its last process saved.

    Raises:
        ModelError: it started with another model, or its pictures must be checked, and this model has no such duty.
        FiltersError: the log is damaged.
    """
    before, now = run.made_by, made_by(pipe.folder)
    if before.get("manifest_sha256") != now["manifest_sha256"]:
        todo = "name the model that the run started with: -m MODEL"
        raise ModelError(f"{pipe.folder.path} is not the model that this run started with", "its manifest", todo)
    if before != now:
        versions = (f"{versions.get('software')} with mlx {versions.get('mlx')}" for versions in (before, now))
        console.note("this run was started by {} and is continued by {}: the picture may differ".format(*versions))
    if not pipe.policy:
        load_all(pipe, run.remaining)  # adapters and Redux can add the duty that the run started with
        if any(job.options.get("style") for job in run.remaining):
            pipe.load_redux()
    if not pipe.policy:
        check_free(run.checkpoint, pipe.folder)
    run.take_over(is_filtered=bool(pipe.policy))
    run.confirm(console, is_filtered=bool(pipe.policy))
