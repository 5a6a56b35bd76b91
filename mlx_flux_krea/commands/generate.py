"""flux-krea generate: pictures from prompts."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from mlx_flux_krea.errors import FluxKreaError, ModelError, PartlyDone, UsageError, Withheld, amount, printable

from .shared import macos, signals
from .shared.options import OPTIONS, USUAL, SeveralSeeds, said
from .shared.output import check_outcomes, check_output

_TOGETHER = 16  # pictures whose prompts are read at once: so many are kept, with a negative one each
OF_THE_PIPELINE = ("dtype", "memory", "check", "nsfw_threshold", "integrity_margin")


@click.command(cls=SeveralSeeds, params=[click.Argument(["prompt"], required=False), *OPTIONS])
def generate(**options):
    """Make pictures from PROMPT.

    A PROMPT of - is read from standard input. {a|b} in a prompt makes a picture of each.

    With --json, standard error has what happens, an object a line: "said", "skipped", "progress", "picture". Only an
    error that ends it is a plain line.

    \b
    Examples:
      flux-krea generate "a frog holding a sign" --seed 7 -o frog.png
      flux-krea generate "a {red|green} frog" --seed 1 2 3 --contact-sheet
    """
    given, force, as_json = said(options)
    if given.get("prompt") == "-":
        given["prompt"] = _standard_input()

    from .config import read_config
    from .shared.jobs import merge

    make_pictures(merge(read_config(), given), given, force, as_json)


def make_pictures(base: dict, given: dict, force: bool, as_json: bool, pipe=None, ends: bool = True) -> list[int]:
    """All pictures that were asked for, saved and reported.

    Args:
        base: options that hold for all of them.
        given: those that were typed, see `jobs.make_jobs`.
        force: replace what stands in the way.
        as_json: report as JSON.
        pipe: of the model; None: opened, once all else is known to be good.
        ends: whether the command ends with them, and is not to be interrupted any more.

    Returns:
        Their seeds.

    Raises:
        UsageError: options that cannot be used, before any work; or rows of a file that were skipped, after it.
    """
    from .shared.jobs import make_jobs
    from .shared.runs import Run

    jobs, skipped = make_jobs(base, given)
    return make_run(Run(base, jobs, rows=str(given.get("prompts", "")), force=force), as_json, pipe, ends, skipped)


def make_run(run, as_json: bool, pipe=None, ends: bool = True, skipped: Sequence = ()) -> list[int]:
    """What is left of a run: all of it, or what an interrupted one did not come to.

    Args:
        run: a `runs.Run`.
        as_json: as in `make_pictures`.
        pipe: as there.
        ends: as there.
        skipped: rows of a file that cannot be used, and why.

    Returns:
        The seeds of its pictures.

    Raises:
        UsageError: as `make_pictures`.
    """
    from .shared.jobs import prepare, sheet_name
    from .shared.preview import make_preview
    from .shared.runs import keeping
    from .shared.terminal import say, show_notes, tell_events

    tell_events(as_json)
    base, skipped = run.options, list(skipped)
    jobs = _usable(run.left, lambda job: check_output(job.output, job.options.get("quality")) or job, skipped)
    sheet = sheet_name(base.get("output", Path(USUAL["output"]))) if base.get("contact_sheet") else None
    if sheet:
        check_output(sheet)

    pipe = pipe or open_pipe(base)
    drawings = _usable(jobs, lambda job: prepare(job, pipe.folder, run.images), skipped)
    if not drawings and not run.done:
        where, error = skipped[0]
        raise UsageError(f"no row can be used; {where}: {error}")
    if sheet and len({(d.request.width, d.request.height) for d in drawings}) > 1:
        raise UsageError("--contact-sheet has pictures of several sizes", "one size")
    show_notes()
    preview = make_preview(base.get("preview"), pipe)
    for where, error in dict(skipped).items():  # one reason for each
        say(printable(f"skipped {where}: {error}"), event="skipped", where=where, reason=str(error))
        run.skipped[where] = str(error)
    run.jobs[len(run.done) :] = [drawing.job for drawing in drawings]
    if drawings:
        _announce(pipe, base, drawings)
    with keeping(run, pipe.folder), macos.awake():
        _draw(pipe, drawings, run, as_json, sheet, ends, preview)
    _check_run(run)
    return list(dict.fromkeys(job.seed for job in run.jobs))


def open_pipe(base: dict):
    """The pipeline of the model that was named; else, of a picture to be repeated, the installed one that made it."""
    from mlx_flux_krea import FluxPipeline
    from mlx_flux_krea.files import sha256_if_exists
    from mlx_flux_krea.home import installed_models

    model, made_by = base.get("model"), base.get("manifest_sha256")
    if model is None and made_by:
        found = (path for path in installed_models().values() if sha256_if_exists(path / "manifest.json") == made_by)
        model = next(found, None)
    said = {name: base[name] for name in OF_THE_PIPELINE if name in base}
    return FluxPipeline.from_pretrained(model, **said)


def _draw(pipe, drawings: list, run, as_json: bool, sheet: Path | None, ends: bool, preview) -> None:
    """Draws and delivers one after the other."""
    from .shared.delivery import Delivery
    from .shared.sheet import note_sheet
    from .shared.terminal import PipelineProgress

    progress, delivery = PipelineProgress(), Delivery(run, as_json)
    try:
        for i, drawing in enumerate(drawings):
            if i % _TOGETHER == 0:
                _read_ahead(pipe, drawings[i : i + _TOGETHER], progress)
            try:
                result = pipe.generate(
                    drawing.given,
                    progress=progress,
                    preview=preview,
                    checkpoint=run.checkpoint,
                    before_release=signals.hold,  # pictures that the log calls released are saved despite a signal
                )
            except Withheld as error:
                if len(run.jobs) == 1:
                    raise
                with signals.held():
                    delivery.refuse(drawing, error)
                continue
            with signals.held():  # a picture that has its name is also reported
                signals.let_go()
                if ends and drawing is drawings[-1] and not sheet:
                    signals.finish()
                delivery.deliver(drawing, result)
        if sheet and (made := run.sheet()):
            with signals.held():
                if ends:
                    signals.finish()
                if pipe.policy:
                    note_sheet(made)
                delivery.deliver_sheet(made, sheet)
    finally:
        signals.let_go()
        progress.close()
        delivery.report()


def _read_ahead(pipe, drawings: list, progress) -> None:
    """Reads the prompts of several pictures at once, where they differ."""
    requests = [drawing.request for drawing in drawings]
    if len({tuple(request.texts()) for request in requests}) > 1:
        pipe.read_ahead(requests, progress)


def _check_run(run) -> None:
    """Ends a run that did not do everything."""
    try:
        check_outcomes([outcome for outcome, _ in run.done])
    except FluxKreaError as error:
        if run.has_pictures:
            raise PartlyDone(error.found, error.expected, error.todo) from None
        raise
    if run.skipped:
        rows = amount(len(run.skipped), f"row of {run.rows} was", f"rows of {run.rows} were")
        raise PartlyDone(f"{rows} skipped")


def _announce(pipe, base: dict, drawings: list) -> None:
    """What will be drawn, before the work starts: sizes and seeds, how much of the prompts is read, what to know."""
    from mlx_flux_krea.prompts import cut_off, read_prompt

    from .shared.jobs import tool_notes
    from .shared.terminal import note, say, several

    requests = [drawing.request for drawing in drawings]
    texts = dict.fromkeys(
        (*pair, r.max_sequence_length) for r in requests for pair in r.pairs() + r.pairs(negative=True)
    )
    try:
        read = [read_prompt(pipe.folder, *text) for text in texts]
    except ModelError:  # what is wrong with a model, the pipeline says in its order
        return
    parts = [
        f"{amount(len(drawings), 'picture')} of {several(f'{r.width} x {r.height}' for r in requests)}",
        amount(several(r.num_inference_steps for r in requests), "step"),
        *([f"guidance {several(f'{r.guidance_scale:g}' for r in requests)}"] if requests[0].guidance_scale else []),
        f"seed {several(drawing.job.seed for drawing in drawings)}",
    ]
    for name, column in zip(("CLIP", "T5"), zip(*read, strict=True), strict=True):
        counts = sorted({tokens.count for tokens in column})
        most = "" if len(counts) == 1 else f" to {counts[-1]}"
        parts.append(f"{name} reads {counts[0]}{most} of {several(len(tokens.ids) for tokens in column)} tokens")
    say("making " + ", ".join(parts))
    tools = dict.fromkeys(drawing.job.options["like"] for drawing in drawings if "like" in drawing.job.options)
    for text in (
        *(text for tool in tools for text in tool_notes(tool)),
        *(text for drawing in drawings for text in drawing.notes),
        *(text for tokens in read for text in cut_off(tokens)),
        *_differences(pipe, base, drawings),
    ):
        note(text)


def _differences(pipe, base: dict, drawings: list) -> list[str]:
    """What of the making of a picture that is repeated is not repeated: its weights, its tiles."""
    from mlx_flux_krea.files import sha256_if_exists

    notes, folder = [], pipe.folder.path
    if "manifest_sha256" in base and sha256_if_exists(folder / "manifest.json") != base["manifest_sha256"]:
        notes.append(f"{base['from_']} was made with other weights than those of {folder}")
    if base.get("tiled") and not all(pipe.plan(drawing.request).tiled for drawing in drawings):
        why = "memory was too little for the whole, which now is developed as one"
        notes.append(f"{base['from_']} was developed in tiles: {why}, and a little different")
    return notes


def _usable(jobs: list, check: Callable, skipped: list) -> list:
    """What `check` makes of each job; a row of a prompt file that fails is skipped, anything else fails."""
    good = []
    for job in jobs:
        try:
            good.append(check(job))
        except UsageError as error:
            if not job.where:
                raise
            skipped.append((job.where, error))
    return good


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig").strip()
    except (AttributeError, OSError, UnicodeDecodeError):
        raise UsageError("standard input is not UTF-8 text", "a prompt") from None
