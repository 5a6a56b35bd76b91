"""Runs of `generate`, `shell` and `resume`: jobs are checked, generated one by one, and delivered."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from mlx_flux_krea import FluxPipeline, macos
from mlx_flux_krea.errors import FluxKreaError, ModelError, PartlyDone, UsageError, Withheld, amount, printable
from mlx_flux_krea.fast import FastMode
from mlx_flux_krea.files import sha256_if_exists
from mlx_flux_krea.home import find_model
from mlx_flux_krea.inputs.maps import depth_sha256
from mlx_flux_krea.presets import FAST, SOLVERS
from mlx_flux_krea.prompts import cut_notes, tokenize
from mlx_flux_krea.request import ResolvedRequest
from mlx_flux_krea.tokenizers import Tokens
from mlx_flux_krea.weights import open_model

from . import signals
from .candidates import kept_message, stopped_early
from .credentials import check_credentials, sources_of, to_json
from .delivery import Delivery
from .images import close_images
from .jobs import (
    PictureJob,
    PreparedJob,
    default_output,
    make_jobs,
    merge,
    prepare,
    recorded_model,
    sheet_name,
    tool_notes,
)
from .loras import Loras, announce, with_adapters
from .options import POLICY, with_option_names
from .output import check_outcomes, check_output, meant_for
from .preview import make_preview
from .runs import Run, resumable
from .sheet import note_sheet
from .terminal import Console, PipelineProgress
from .text import several

_TOGETHER = 16  # pictures whose prompts are encoded together: that many encoded prompts stay in memory
OF_THE_PIPELINE = ("dtype", "memory", "check", "nsfw_threshold", "integrity_margin")  # options of from_pretrained

_T = TypeVar("_T")
_Skipped = list[tuple[str, UsageError]]  # unusable rows of a prompt file, with their errors


def open_pipeline(options: dict) -> FluxPipeline:
    """Opens the model of the options; without one, the installed model that made the picture of --from.

    Raises:
        FluxKreaError: as `FluxPipeline.from_pretrained`.
    """
    return FluxPipeline.from_pretrained(
        _model_of(options), **{name: options[name] for name in OF_THE_PIPELINE if name in options}
    )


def _model_of(options: dict) -> str | Path | None:
    """Returns the model that the options name, or the one that made the picture of --from; None: the usual one."""
    return options.get("model") or recorded_model(options.get("manifest_sha256"))


def over_config(config: dict, given: dict) -> dict:
    """Puts options of the command line over those of the config file.

    The file says who checks pictures where a licence asks for that; another model is not checked unless the command
    line says so.

    Raises:
        UsageError: as `merge`.
    """
    options = merge(config, given)
    usual = [name for name in POLICY if name in config and name not in given]
    with contextlib.suppress(FluxKreaError):  # of a model that cannot be opened: the pipeline says so
        if usual and not open_model(find_model(_model_of(options))).requires_filters:
            return {name: value for name, value in options.items() if name not in usual}
    return options


class Generation:
    """Generates the pictures of runs.

    Args:
        console: where lines, notes and progress are written.
        as_json: print a JSON report on standard output.
        pipe: an open pipeline; None: the model of a run is opened once its options are known to be good.
        is_last: the command ends with a run, so that signals are ignored once its last picture is saved.
        preview: sees each step of a model that requires nothing, instead of --preview.
        checked_preview: sees unfinished pictures of other models that have passed the filters.
    """

    def __init__(
        self,
        console: Console,
        *,
        as_json: bool,
        pipe: FluxPipeline | None = None,
        is_last: bool = True,
        preview: Callable | None = None,
        checked_preview: Callable | None = None,
    ):
        self._console, self._as_json, self._pipe, self._is_last = console, as_json, pipe, is_last
        self._preview, self._checked_preview = preview, checked_preview

    def run_options(self, base: dict, given: dict, force: bool) -> list[int]:
        """Generates all pictures of some options.

        Args:
            base: options of all pictures.
            given: those that were given on the command line, see `jobs.make_jobs`.
            force: replace existing files.

        Returns:
            The seeds.

        Raises:
            FluxKreaError: as `run`.
        """
        if base.get("candidates"):
            base = base | {"contact_sheet": True}
        jobs, skipped = make_jobs(base, given)
        return self.run(Run(base, jobs, rows=str(given.get("prompts", "")), force=force), skipped)

    def run(self, run: Run, skipped: Sequence[tuple[str, UsageError]] = ()) -> list[int]:
        """Generates the remaining pictures of a run.

        Args:
            run: the run.
            skipped: unusable rows of its prompt file, with their errors.

        Returns:
            The seeds of all its pictures.

        Raises:
            UsageError: options that cannot be used, before any work.
            PartlyDone: some pictures were released, others were not, or rows were skipped.
            FluxKreaError: as `FluxPipeline.__call__`.
        """
        with self._console.library_notes():
            return self._run(run, list(skipped))

    def _run(self, run: Run, skipped: _Skipped) -> list[int]:
        base = run.options
        jobs = _usable(run.remaining, _with_checked_output, skipped)
        sheet = sheet_name(base.get("output", default_output())) if base.get("contact_sheet") else None
        if sheet:
            check_output(sheet)

        pipe = self._pipe or open_pipeline(base)
        loras, adapters = Loras(pipe), []

        def whole_job(job: PictureJob) -> PreparedJob:
            own = loras.of(job)
            ready = prepare(job, pipe.folder, run.images, adapters=own.weights, preset=own.preset)
            adapters.append(own)
            if ready.request.style:
                pipe.load_redux()
            ready = with_adapters(ready, own)
            return stopped_early(ready) if base.get("candidates") else ready

        def prepared_job(job: PictureJob) -> PreparedJob:
            ready = whole_job(job).without_images()
            close_images(jobs[0].options, run.images)
            return ready

        prepared = _usable(jobs, prepared_job, skipped)
        if not prepared and not run.done:
            where, error = skipped[0]
            raise UsageError(f"no row can be used; {where}: {error}")
        if sheet and not base.get("candidates") and len({p.request.picture_size for p in prepared}) > 1:
            raise UsageError("--contact-sheet has pictures of several sizes", "one size")
        preview = self._watcher(base, pipe)
        for where, error in dict(skipped).items():  # one error for each row
            reason = with_option_names(str(error))
            self._console.say(printable(f"skipped {where}: {reason}"), event="skipped", where=where, reason=reason)
            run.skipped[where] = reason
        run.jobs[len(run.done) :] = [p.job for p in prepared]
        if prepared:
            announce(adapters, self._console)
            _announce(pipe, base, prepared=prepared, console=self._console)
        with resumable(run, pipe.folder, self._console), macos.awake():
            self._generate(pipe, run, prepared=prepared, again=whole_job, sheet=sheet, preview=preview)
        if base.get("candidates") and (kept := kept_message(run.checkpoint.path.stem)):
            self._console.say(kept)
        _check_run(run)
        return list(dict.fromkeys(job.seed for job in run.jobs))

    def _watcher(self, base: dict, pipe: FluxPipeline) -> Callable | None:
        """Returns what sees each step; None: nothing, or the pictures must be checked before anybody sees them."""
        if self._preview is None:
            return make_preview(base.get("preview"), pipe, self._console)
        return None if pipe.policy or pipe.folder.latent_rgb is None else self._preview

    def _generate(
        self,
        pipe: FluxPipeline,
        run: Run,
        *,
        prepared: list[PreparedJob],
        again: Callable[[PictureJob], PreparedJob],
        sheet: Path | None,
        preview: Callable | None,
    ) -> None:
        """Generates and delivers pictures one after the other, each prepared `again`, then their contact sheet."""
        progress, delivery = PipelineProgress(self._console), Delivery(run, self._as_json, self._console)
        try:
            for i, light in enumerate(prepared):
                if i % _TOGETHER == 0:
                    _encode_together(pipe, prepared[i : i + _TOGETHER], progress)
                job = again(light.job) if light.given is None else light
                assert job.given is not None
                close_images(job.job.options, run.images)
                try:
                    result = pipe.generate(
                        job.given,
                        progress=progress,
                        preview=preview,
                        checked_preview=self._checked_preview,
                        checkpoint=run.checkpoint,
                        before_release=signals.hold,  # pictures that the log calls released are saved despite a signal
                        meant_for=_meant_for(run, job),
                    )
                except Withheld as error:
                    if len(run.jobs) == 1:
                        raise
                    with signals.held():
                        delivery.refuse(job, error)
                    continue
                with signals.held():  # a saved picture is also reported
                    signals.let_go()
                    if self._is_last and light is prepared[-1] and not sheet:
                        signals.finish()
                    delivery.deliver(job, result)
            if sheet and (picture := run.sheet()):
                with signals.held():
                    if self._is_last:
                        signals.finish()
                    if pipe.policy:
                        note_sheet(picture, is_filtered=pipe.policy.check != "review")
                    delivery.deliver_sheet(picture, sheet)
        finally:
            signals.let_go()
            progress.close()
            delivery.report()


def _meant_for(run: Run, job: PreparedJob) -> dict:
    """Returns the file that a picture is meant for, and the images that it is made of if it is to be signed."""
    meant = meant_for(_output(run, job.job), job.job.options)
    if job.job.options.get("credentials"):
        meant["sources"] = to_json(sources_of(job.job.options, job.request.record(job.pick)))
    return meant


def _output(run: Run, job: PictureJob) -> Path:
    """Returns the file that a picture is meant for; a predicted one has a name of its own."""
    number = len(run.done) + 1
    return (
        job.output.with_stem(f"{job.output.stem}-candidate-{number}") if run.options.get("candidates") else job.output
    )


def _with_checked_output(job: PictureJob) -> PictureJob:
    check_output(job.output, job.options.get("quality"))
    check_credentials(job.options.get("credentials"))
    return job


def _usable(jobs: Sequence[PictureJob], check: Callable[[PictureJob], _T], skipped: _Skipped) -> list[_T]:
    """Applies a check to each job. Rows of a prompt file that fail are skipped; other failures are raised."""
    good = []
    for job in jobs:
        try:
            good.append(check(job))
        except UsageError as error:
            if not job.where:
                raise
            skipped.append((job.where, error))
    return good


def _encode_together(pipe: FluxPipeline, prepared: list[PreparedJob], progress: PipelineProgress) -> None:
    """Encodes the prompts of several pictures at once, where they differ."""
    requests = [p.request for p in prepared]
    if len({tuple(request.texts()) for request in requests}) > 1:
        pipe.read_ahead(requests, progress)


def _check_run(run: Run) -> None:
    """Checks that a run did everything.

    Raises:
        FluxKreaError: a picture was not released; PartlyDone where others were, or where rows were skipped.
    """
    try:
        check_outcomes([outcome for outcome, _ in run.done])
    except FluxKreaError as error:
        if not run.has_pictures:
            raise
        raise PartlyDone(error.found, error.expected, error.todo) from error
    if run.skipped:
        count = amount(len(run.skipped), f"row of {run.rows} was", f"rows of {run.rows} were")
        raise PartlyDone(f"{count} skipped")


def _announce(pipe: FluxPipeline, base: dict, *, prepared: list[PreparedJob], console: Console) -> None:
    """Says which pictures will be generated: sizes, seeds, tokens of the prompts, and notes."""
    requests = [p.request for p in prepared]
    texts = dict.fromkeys(
        (*pair, r.max_sequence_length) for r in requests for pair in r.pairs() + r.pairs(negative=True)
    )
    try:
        prompts = [tokenize(pipe.folder, *text) for text in texts]
    except ModelError:  # the pipeline reports a damaged model, after other checks
        return
    sizes: dict[str, list[int]] = {}
    for r in requests:
        whole, part = ("{} x {}".format(*size) for size in (r.picture_size, (r.width, r.height)))
        shown = whole if whole == part else f"{whole}, generated at {part},"
        sizes.setdefault(shown, []).append(r.num_inference_steps)
    parts = [
        several(f"{name} with {amount(several(sorted(steps)), 'step')}" for name, steps in sizes.items()),
        *([f"stopped after step {several(r.stop_after for r in requests)}"] if requests[0].stop_after else []),
        *_evaluations(requests),
        *([f"guidance {several(f'{r.guidance_scale:g}' for r in requests)}"] if requests[0].guidance_scale else []),
        f"seed {several(p.job.seed for p in prepared)}",
        *_token_counts(prompts),
    ]
    console.say(f"{amount(len(prepared), 'picture')}: {', '.join(parts)}")
    tools = dict.fromkeys(p.job.options["like"] for p in prepared if "like" in p.job.options)
    for text in (
        *(text for tool in tools for text in tool_notes(tool)),
        *(text for p in prepared for text in p.notes),
        *_name_notes(base, prepared),
        *(text for tokens in prompts for text in cut_notes(tokens)),
        *_differences(pipe, base, prepared),
    ):
        console.note(text)


def _evaluations(requests: Sequence[ResolvedRequest]) -> list[str]:
    """Formats how many evaluations of the transformer the steps take, where that is not one each."""
    shown = {}
    for r in requests:
        schedule = f"schedule {r.schedule}" if r.schedule else ""
        how = [r.solver if r.solver != SOLVERS[0] else "", _fast_name(r.fast) or str(r.cache or ""), schedule]
        if any(how) or r.evaluations != (r.stop_after or r.num_inference_steps):
            most = "at most " if r.cache and r.cache.name != FAST else ""
            named = ", ".join(filter(None, how))
            shown[f"{most}{amount(r.evaluations, 'evaluation')}{f' ({named})' if named else ''}"] = None
    return [several(shown)] if shown else []


def _fast_name(mode: FastMode | None) -> str:
    """Formats --fast, with the mode that `bench --fast` has chosen; "" without it."""
    return "" if mode is None else "fast" if mode.is_usual else f"fast: {mode}{' steps' if mode.steps else ''}"


def _name_notes(base: dict, prepared: list[PreparedJob]) -> list[str]:
    """Returns a note where the fields of -o do not tell the pictures of a run apart."""
    names = {p.job.output for p in prepared}
    if "{" not in str(base.get("output", "")) or len(names) == len(prepared):
        return []
    found = f"{base['output']} makes {amount(len(names), 'name')} for {amount(len(prepared), 'picture')}"
    return [f"{found}: others get -2, -3, ...; {{n}} or {{prompt}} tells them apart"]


def _token_counts(prompts: Sequence[tuple[Tokens, Tokens]]) -> list[str]:
    """Formats how many tokens of each encoder the prompts use."""
    parts = []
    for name, column in zip(("CLIP", "T5"), zip(*prompts, strict=True), strict=True):
        counts = sorted({tokens.count for tokens in column})
        most = "" if len(counts) == 1 else f" to {counts[-1]}"
        parts.append(f"{counts[0]}{most} of {several(len(tokens.ids) for tokens in column)} {name} tokens used")
    return parts


def _differences(pipe: FluxPipeline, base: dict, prepared: list[PreparedJob]) -> list[str]:
    """Returns notes where a picture of --from cannot be repeated exactly: other weights, or no tiles."""
    notes, folder = [], pipe.folder.path
    if "manifest_sha256" in base and sha256_if_exists(folder / "manifest.json") != base["manifest_sha256"]:
        notes.append(f"{base['from_']} was made with other weights than those of {folder}")
    made = base.get("depth_sha256")
    if made and any(p.request.inputs.kind == "depth" for p in prepared) and made != depth_sha256():
        notes.append(f"{base['from_']} was made with another depth network than the installed one")
    if base.get("tiled") and not all(pipe.plan(p.request).tiled for p in prepared):
        notes.append(
            f"{base['from_']} was decoded in tiles, since memory was short; decoded whole, it differs a little"
        )
    return notes
