"""flux-krea resume: an interrupted run, from where it was."""

from pathlib import Path

import click

from mlx_flux_krea.errors import ModelError, UsageError


@click.command()
@click.argument("file", required=False)
@click.option("-m", "--model", help="Where its model is now.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Another place for what is left.")
@click.option("--memory", help="What may be used, such as 8GB, instead of what it was begun with.")
@click.option("--list", "listed", is_flag=True, help="Show what can be gone on with, newest first.")
@click.option("--json", "as_json", is_flag=True, help="As for generate.")
def resume(file, model, output, memory, listed, as_json):
    """Go on with a run of `generate` that was interrupted, killed, or failed.

    FILE is what it was told to be gone on with by, or the path of such a file; without it, the newest. The pictures are
    those that it would have made. Unfinished runs are kept for 30 days.

    \b
    Examples:
      flux-krea resume
      flux-krea resume 3f2a9c1b --memory 8GB
    """
    if listed:
        _show()
        return
    from mlx_flux_krea.checkpoint import Checkpoint, find

    path = find(file)
    checkpoint = Checkpoint.read(path)
    try:
        _go_on(checkpoint, path, {"model": model, "output": output, "memory": memory}, as_json)
    finally:
        checkpoint.close()


def _go_on(checkpoint, path: Path, said: dict, as_json: bool) -> None:
    from PIL import Image

    from .config import read_config
    from .generate import make_run, open_pipe
    from .shared.runs import Run, made_by
    from .shared.terminal import note, show_notes

    try:
        run = Run.from_json(checkpoint.run, checkpoint.is_ours)
    except UsageError as error:
        raise UsageError(f"{path}: {error.found}", error.expected, error.todo) from None
    run.checkpoint = checkpoint
    run.restrict(read_config())
    run.options |= {name: said[name] for name in ("model", "memory") if said[name]}
    if checkpoint.image is not None and run.left and "image" in run.left[0].options:
        run.images[run.left[0].options["image"]] = Image.fromarray(checkpoint.image)
    before = run.made_by
    by_hash = {} if "model" in run.options else {"manifest_sha256": before.get("manifest_sha256")}
    pipe = open_pipe(run.options | by_hash)
    show_notes()
    now = made_by(pipe.folder)
    if before.get("manifest_sha256") != now["manifest_sha256"]:
        todo = "name the one that it was begun with: -m MODEL"
        raise ModelError(f"{pipe.folder.path} is not the model that this run was begun with", "its manifest", todo)
    if before != now:
        versions = (f"{made.get('software')} with mlx {made.get('mlx')}" for made in (before, now))
        note("this run was begun by {}, and goes on by {}: the picture may differ".format(*versions))
    run.take_over(is_filtered=bool(pipe.policy))
    if said["output"]:
        run.place(said["output"])
    make_run(run, as_json, pipe)


def _show() -> None:
    """What can be gone on with."""
    import time

    from mlx_flux_krea.checkpoint import Checkpoint, unfinished

    from .shared.terminal import say, table

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
        say("there is no unfinished run")
