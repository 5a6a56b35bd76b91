"""From a resolved request to pixels: text, input image, modulation, denoising, decoding, in this order.

Networks, sampler and noise are functions; this file decides their order, when arrays are evaluated, which of them stay
in memory, which seed draws which noise, and where a run can be stopped. It does not decide whether a picture may be
made: `pipeline.py` does. All of it happens in the worker's thread.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from PIL import Image

from .adapters.formulas import Attached, Base, Uses
from .checkpoint import Checkpoint
from .errors import ModelError, ResourceError, UsageError, amount
from .inputs import style as styles
from .inputs.canvas import fit_to
from .inputs.maps import MapMaker
from .latents import Encode, Latents, enlarged_latents, make_latents
from .memory import MemoryPlan, modulation_bytes
from .models import tiles
from .models.transformer import Flux
from .models.vae import VAE, pixels_to_bytes
from .modulation import Modulations, Moments
from .progress import Passes
from .prompts import EncodedPrompt, PromptEncoder
from .request import ResolvedRequest
from .residency import Blocks
from .sampling import noise as noises
from .sampling import preview as previews
from .sampling import sampler
from .sampling.caches import Uncached, make_cache
from .sampling.enlarge import View, guided, low_frequencies, second_view
from .sampling.rules import count_evaluations
from .sampling.solvers import SOLVERS, State
from .second import Second, computed_before, is_enlarging, second_pass
from .weights import ComponentFolder, ModelFolder
from .worker import Worker, evaluated, limit_cache

logger = logging.getLogger("mlx_flux_krea")

Progress = Callable[[str, float, int], None]
Velocity = Callable[[mx.array, int], mx.array]  # of latents and the number of the step


@dataclass(frozen=True)
class Observers:
    """Functions that see a run after each step, and the file that it can be resumed from."""

    callback: Callable | None = None  # of (step, sigma, latents); returns latents to continue with, or None
    preview: Callable | None = None  # of (step, steps, pixels)
    checkpoint: Checkpoint | None = None


@dataclass(frozen=True)
class Generated:
    """The pictures of a request, which nobody has judged, and a report of the run.

    Attributes:
        images: pixels (H, W, 3) of each picture, or latents (B, L, 64) where the request asks for these.
        notes: sentences about prompts that were cut off.
        seconds: of each stage.
        peaks: memory of each stage, in bytes.
        control: the map that was made of a photo, or None.
        steps: of each picture, those that the transformer computed in full.
    """

    images: list[np.ndarray] | mx.array
    notes: tuple[str, ...]
    seconds: dict[str, float]
    peaks: dict[str, int]
    control: Image.Image | None = None
    steps: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Conditions:
    """Encoded prompts, P of them; and as many negative ones, or none."""

    positive: list[EncodedPrompt]
    negative: list[EncodedPrompt]

    @property
    def both(self) -> list[EncodedPrompt]:
        """Positive, then negative ones."""
        return [*self.positive, *self.negative]


@dataclass(frozen=True)
class _Steps:
    """The steps of a run.

    Attributes:
        view: how the transformer sees the latents.
        sigmas: noise levels of the steps that run, and 0; an input image skips the first ones of the schedule.
        done: steps that an interrupted run has behind it.
        stop: steps after which the run ends; fewer than all where the picture is predicted.
        cache: what the run remembers of them.
        solver: a key of `SOLVERS`.
        behind: steps of the pass before this one.
        total: steps of all passes.
    """

    view: View
    sigmas: np.ndarray
    done: int
    stop: int
    cache: Uncached
    solver: str
    behind: int
    total: int

    @property
    def stage(self) -> str:
        """The stage of the progress."""
        return "denoise" if self.view.factor == 1 else "enlarge"

    @property
    def evaluations(self) -> int:
        """Evaluations that are left, as far as this can be known."""
        left = self.cache.left(self.done) - self.cache.left(self.stop)
        return count_evaluations(self.solver, left, to_end=self.stop == self.count)

    @property
    def count(self) -> int:
        """Number of steps, the finished ones included."""
        return len(self.sigmas) - 1


@dataclass(frozen=True)
class _StreamedFlux:
    """The transformer, and the runners of its blocks and of its modulation layers, which run apart from the blocks."""

    network: Flux
    blocks: Blocks
    modulation: Blocks


class Generator:
    """The networks of one model folder, as far as they are in memory, and results that the next picture can use again.

    Args:
        folder: the model.
        dtype: the compute type.
        worker: in whose thread this is called.
    """

    def __init__(self, folder: ModelFolder, dtype: mx.Dtype, worker: Worker):
        self._folder = folder
        self._dtype = dtype
        self._worker = worker
        self._encoder = PromptEncoder(folder, dtype, worker.check)
        self._styles = styles.StyleEncoder(dtype, worker.check)
        self._maps = MapMaker()
        self._streamed: _StreamedFlux | None = None
        self._whole_flux: Flux | None = None
        self._whole_vae: VAE | None = None
        self._modulations = Modulations()
        self._base = Base(folder, dtype)
        self._attached: Attached | None = None  # adapters on the transformer that is in use
        self._progress: Progress | None = None
        self._checked = False

    @property
    def folder(self) -> ModelFolder:
        """The model folder."""
        return self._folder

    @property
    def blocks(self) -> Blocks | None:
        """The runner of the transformer's blocks, once they were needed and while nobody has the whole of it."""
        return self._streamed and self._streamed.blocks

    @contextlib.contextmanager
    def reporting(self, progress: Progress | None) -> Iterator[None]:
        """Reports to `progress` within one run; a callback may make a run of its own inside it."""
        outer, self._progress = self._progress, progress
        try:
            yield
        finally:
            self._progress = outer
            mx.clear_cache()

    def generate(
        self,
        request: ResolvedRequest,
        plan: MemoryPlan,
        observers: Observers,
        *,
        uses: Uses = (),
        redux: ComponentFolder | None = None,
        depth: ComponentFolder | None = None,
        as_floats: bool = False,
    ) -> Generated:
        """Makes all pictures of a request.

        Args:
            request: prompts, size, seeds and steps.
            plan: says how much of the transformer may be resident.
            observers: called after each step.
            uses: adapters with their weights.
            redux: where the request has style images.
            depth: the depth network, where the request has a map of depth made.
            as_floats: pixels in [0, 1] instead of bytes.

        Raises:
            ModelError: weights are missing or damaged, or gave NaN.
            ResourceError: a network gave the same numbers everywhere, as after a failed GPU command.
            UsageError: the checkpoint is of another picture.
            Interrupted: the run was stopped.
        """
        limit_cache(max(plan.budget - plan.peak - self._modulations.ahead_bytes, 2**26))
        seconds: dict[str, float] = {}
        peaks: dict[str, int] = {}
        conditions, made = Conditions([], []), None
        with self._distrusting():
            if request.inputs.kind:
                with _measured("map", seconds, peaks):
                    request, made = self._mapped(request, request.inputs.kind, depth)
            if not _is_denoised(request, observers.checkpoint):
                with _measured("text", seconds, peaks):
                    conditions = self._conditions(request, uses)
                if request.style and redux:
                    with _measured("style", seconds, peaks):
                        conditions = self._styled(request, request.style, conditions, redux)
            latents, computed = None, computed_before(request, observers.checkpoint)
            if request.first_steps and not is_enlarging(request, observers.checkpoint):
                with _measured("denoise", seconds, peaks):
                    latents, computed = self._denoise(request, conditions, plan, observers, uses)
            if request.enlarges and plan.second:
                with _measured("enlarge", seconds, peaks):
                    second = second_pass(request, plan, latents, computed, observers.checkpoint, self._shape(request))
                    latents, more = self._denoise(second.request, conditions, plan.second, observers, uses, second)
                request, plan = second.request, plan.second
                computed = tuple((*one, *other) for one, other in zip(computed, more, strict=True))
            assert latents is not None  # one of the passes has made them
            with _measured("decode", seconds, peaks):
                is_latent = request.output_type == "latent"
                images = latents if is_latent else self._decode(request, latents, as_floats=as_floats, tiled=plan.tiled)
        notes = tuple(dict.fromkeys(note for prompt in conditions.both for note in prompt.cut))
        return Generated(images, notes, seconds, peaks, made, computed)

    def check_folder(self) -> None:
        """Checks the model folder, before a weight is read, and once."""
        if not self._checked:
            self.folder.check()
            self._checked = True

    def encode(self, pairs: list[tuple[str, str]], length: int, uses: Uses = ()) -> list[EncodedPrompt]:
        """Encodes (text for CLIP, text for T5) of each prompt, T5's at a length in tokens, with adapters or without.

        Raises:
            ModelError: encoders missing or damaged, or they gave NaN.
            ResourceError: they gave the same numbers everywhere.
        """
        with self._distrusting():
            run = partial(self.runner, "text")
            encoded = self._encoder.encode(pairs, length, run, uses, self._base.lengths)
            for prompt in encoded:
                _check_finite("a text encoder", prompt.embeds, prompt.pooled)
                _check_varied("a text encoder", prompt.embeds, prompt.pooled)
        return encoded

    @contextlib.contextmanager
    def _distrusting(self) -> Iterator[None]:
        """Drops all results and weights in memory if a network fails in the block, so that another try is a new one."""
        try:
            yield
        except (ModelError, ResourceError):
            self._encoder.forget()
            self._styles.forget()
            self._maps.forget()
            self._modulations.forget()
            self._streamed = self._attached = None
            raise

    def _conditions(self, request: ResolvedRequest, uses: Uses) -> Conditions:
        pairs, negative_pairs = request.pairs(), request.pairs(negative=True)
        encoded = self.encode(pairs + negative_pairs, request.max_sequence_length, uses)
        positive = encoded[: len(pairs)] or _given(request.prompt_embeds, request.pooled_prompt_embeds)
        negative = encoded[len(pairs) :] or _given(
            request.negative_prompt_embeds, request.negative_pooled_prompt_embeds
        )
        return Conditions(positive, negative * request.prompts if len(negative) == 1 else negative)

    def encode_style(self, style: styles.Style, redux: ComponentFolder) -> list[mx.array]:
        """Returns the tokens (1, N, T) of each style image.

        Raises:
            ModelError: Redux is missing or damaged, or gave NaN.
            ResourceError: it gave the same numbers everywhere.
        """
        with self._distrusting():
            tokens = self._styles.encode(style, redux, partial(self.runner, "style"))
            _check_finite("Redux", *tokens)
            _check_varied("Redux", *tokens)
        return tokens

    def _styled(
        self, request: ResolvedRequest, style: styles.Style, conditions: Conditions, redux: ComponentFolder
    ) -> Conditions:
        """Returns the conditions with the tokens of style images beside those of the positive prompts."""
        tokens = self.encode_style(style, redux)
        no_text = styles.without_text(request.max_sequence_length, self.folder.flux.sizes, self._dtype)
        positive = [styles.styled(style, prompt, tokens) for prompt in conditions.positive or [no_text]]
        for prompt in positive:
            mx.eval(prompt.embeds, prompt.pooled)
        return Conditions(positive, conditions.negative)

    def _mapped(
        self, request: ResolvedRequest, kind: str, depth: ComponentFolder | None
    ) -> tuple[ResolvedRequest, Image.Image]:
        """Returns the request with the map of its photo, made at the size of the picture, and the map."""
        assert request.inputs.control is not None  # `gather` has checked it
        photo = fit_to(request.inputs.control, request.width, request.height, request.inputs.fit)
        made = self._maps.make(kind, photo, depth, partial(self.runner, "map"))
        return replace(request, inputs=request.inputs.with_map(made)), made

    def _denoise(
        self,
        request: ResolvedRequest,
        conditions: Conditions,
        plan: MemoryPlan,
        observers: Observers,
        uses: Uses,
        second: Second | None = None,
    ) -> tuple[mx.array, tuple[tuple[int, ...], ...]]:
        """Returns latents (B, L, 64) at the end of the schedule, from its start or from a checkpoint.

        Where the run stops before that, they are the clean latents that its last step heads for. With them it returns
        the steps that were computed in full, of each picture.
        """
        checkpoint, state, predicted = observers.checkpoint, None, None
        steps = self._steps(request, second)
        if checkpoint and checkpoint.done >= steps.behind + bool(second):
            saved = checkpoint.latents(self._shape(request), steps.total)
            if saved is not None:
                steps, state, predicted = self._continued(steps, request, checkpoint, saved)
        cache = steps.cache
        if state is None or steps.done < steps.stop:
            if second:
                made = self._enlarged(second, float(steps.sigmas[0]), plan)
            elif state is None or request.inputs.is_read_beside:
                made = self._latents(request, float(steps.sigmas[0]), tiled=plan.tiled)
            else:
                made = Latents(state.latents)
            flux, state = self._flux(plan.resident_bytes, uses), state or State(made.start)
            if self.blocks:
                self.blocks.in_flight = plan.in_flight
            with self._velocity(flux, request, conditions, steps, made) as velocity:
                if self._dtype == mx.float16:
                    velocity = self._repeating_overflows(velocity, request, conditions, steps, made, uses)
                velocity, take_step = cache.wrap(velocity), SOLVERS[request.solver]
                if made.enlarged is not None:
                    low = low_frequencies(steps.view.width, steps.view.height, steps.view.cutoff)
                    velocity = guided(velocity, steps.sigmas, made.enlarged, low, steps.view.recipe)
                for step in range(steps.done, steps.stop):
                    before, state = state.latents, take_step(velocity, state, steps.sigmas, step)
                    _check_finite(f"step {step + 1} of the transformer", state.latents)
                    self._show_preview(observers, steps, step, before=before, after=state.latents)
                    if step + 1 == steps.stop < steps.count:
                        predicted = _predicted(made, steps, step, before=before, after=state.latents)
                    state = replace(state, latents=self._kept(made, steps, step, state.latents))
                    sigma = float(steps.sigmas[step])
                    number = steps.behind + step
                    returned = observers.callback(number, sigma, state.latents) if observers.callback else None
                    state = state if returned is None else replace(state, latents=returned)
                    if checkpoint:
                        _save(checkpoint, step + 1, steps, state, predicted, second and second.kept)
        latents = state.latents if predicted is None else predicted
        computed = (cache.computed(f"{i}.") for i in range(request.batch))
        return latents, tuple(tuple(steps.behind + step for step in of_one if step < steps.stop) for of_one in computed)

    def _enlarged(self, second: Second, sigma: float, plan: MemoryPlan) -> Latents:
        """Returns the latents of the second pass's first step: those of the first pass's pictures, or of the image."""
        first, size = second.first, (second.request.width, second.request.height)
        if first.inputs.canvas:
            pictures = [first.inputs.canvas.part(*size)]
        else:
            made = self._decode(first, second.kept["first"], as_floats=False, tiled=second.plan.tiled)
            pictures = [fit_to(Image.fromarray(pixels), *size, "stretch") for pixels in made]
        return self._encoded(
            lambda encode: enlarged_latents(
                second.request, pictures, sigma, self.folder.vae.sizes, self._dtype, encode
            ),
            tiled=plan.tiled,
        )

    def _steps(self, request: ResolvedRequest, second: Second | None = None) -> _Steps:
        """Returns all steps of a pass that starts anew."""
        levels = request.sigmas or sampler.schedule_levels(request.schedule, request.num_inference_steps)
        schedule, n = self.folder.index.schedule, request.num_inference_steps
        down = self.folder.vae.sizes.downsampling
        view = View(request.width // down, request.height // down)
        _, length, _ = self._shape(request)
        first = request.first_step
        if second and request.large:  # the levels of the model's own area, from those of the last steps on
            own = request.large.own[0] // down, request.large.own[1] // down
            length, first = own[0] * own[1] // 4, n - request.second_steps
            view = second_view(view, own, request.large.factor, tiled=second.plan.tiles > 1)
        sigmas = sampler.make_sigmas(schedule, length, n, () if levels is None else tuple(levels))[first:]
        return _Steps(
            view=view,
            sigmas=sigmas,
            done=0,
            stop=request.stop_after or len(sigmas) - 1,
            cache=make_cache(request.cache, sigmas),
            solver=request.solver,
            behind=second.first.first_steps if second else 0,
            total=second.first.total_steps if second else request.total_steps,
        )

    def _shape(self, request: ResolvedRequest) -> tuple[int, int, int]:
        """Returns (B, L, 64) of a request."""
        tokens = request.width * request.height // (2 * self.folder.vae.sizes.downsampling) ** 2
        return request.batch, tokens, self.folder.flux.sizes.out_channels

    def _continued(
        self, steps: _Steps, request: ResolvedRequest, checkpoint: Checkpoint, saved: np.ndarray
    ) -> tuple[_Steps, State, mx.array | None]:
        """Returns the steps and the state of a run that is continued, and the picture that its last step predicted.

        Raises:
            UsageError: the checkpoint is damaged, or beyond the step at which the run stops.
        """
        done = checkpoint.done - steps.behind
        down = self.folder.vae.sizes.downsampling
        shape, tokens = self._shape(request), request.inputs.reference_tokens(2 * down)
        stream = 1, shape[1] + tokens, self.folder.flux.sizes.hidden_size
        dtype = mx.float32 if self._dtype == mx.float16 else self._dtype
        held = {name: _unpacked(array, dtype) for name, array in checkpoint.state().items()}
        state, predicted = State(mx.array(saved), held.get("denoised")), held.get("predicted")
        try:
            steps.cache.restore(held, {"velocity": shape, "stream": stream})
            if any(array is not None and array.shape != shape for array in (state.denoised, predicted)):
                raise ValueError
        except (ValueError, KeyError):
            raise checkpoint.damaged() from None
        if done > steps.stop or (predicted is None and done == steps.stop < steps.count):
            found = f"`stop_after` is {steps.stop}, and {amount(done, 'step is', 'steps are')} done"
            raise UsageError(found, f"{done + 1} or more", "or leave it out")
        predicted = predicted if done == steps.stop < steps.count else None
        return replace(steps, done=done), state, predicted

    @staticmethod
    def _kept(made: Latents, steps: _Steps, step: int, latents: mx.array) -> mx.array:
        """Returns latents after a step, with what stays outside of a mask put back."""
        if made.kept is None:
            return latents
        latents = made.kept.restore(latents, float(steps.sigmas[step + 1]), 1 - (step + 1) / steps.count)
        mx.eval(latents)  # the caller's thread cannot
        return latents

    def _show_preview(
        self, observers: Observers, steps: _Steps, step: int, *, before: mx.array, after: mx.array
    ) -> None:
        latent_rgb = self.folder.latent_rgb if observers.preview else None
        if observers.preview and latent_rgb:
            sigma, following = map(float, steps.sigmas[step:][:2])
            clean = previews.predicted(before, after, sigma, following)
            unpacked = sampler.unpack(clean, width=steps.view.width, height=steps.view.height)
            observers.preview(steps.behind + step + 1, steps.total, previews.colours(unpacked, latent_rgb))

    def _latents(self, request: ResolvedRequest, sigma: float, *, tiled: bool) -> Latents:
        """Returns the latents of the first step, and of images that take part in all of them."""
        return self._encoded(
            lambda encode: make_latents(request, sigma, self.folder.vae.sizes, self._dtype, encode), tiled=tiled
        )

    def _encoded(self, make: Callable[[Encode], Latents], *, tiled: bool) -> Latents:
        """Returns the latents that a function makes with the encoder, which is read when it is first used."""
        vae: VAE | None = None

        def encode(pixels: mx.array) -> tuple[mx.array, mx.array]:
            nonlocal vae
            vae = vae or self._vae()
            encode = partial(tiles.encode, vae) if tiled else vae.encode
            posterior = encode(pixels, self.runner("image", _count(encode, pixels)))
            _check_finite("the image encoder", *posterior)
            _check_varied("the image encoder", posterior[0])
            mean, logvar = (moment.transpose(0, 3, 1, 2).astype(mx.float32) for moment in posterior)
            return mean, logvar

        return make(encode)

    @contextlib.contextmanager
    def _velocity(
        self, flux: Flux, request: ResolvedRequest, conditions: Conditions, steps: _Steps, made: Latents
    ) -> Iterator[Velocity]:
        """Gives the model that the sampler integrates. Whatever does not depend on the latents is computed here, once.

        A resumed run computes all modulations again too: a product of fewer rows may round otherwise.
        """
        moments, streaming = self._moments(request, conditions, steps), partial(self._modulating, flux)
        modulations = self._modulations.of(moments, flux, streaming, partial(self.runner, "modulation"))
        texts = [evaluated(flux.txt_in, c.embeds.astype(flux.dtype)) for c in conditions.both]
        view = steps.view
        tables = [
            {size: view.tables(flux.config, text.shape[1], size, made.grids) for size in view.sizes} for text in texts
        ]
        mx.eval([list(of_one.values()) for of_one in tables])
        rounds = steps.evaluations * request.batch * (2 if conditions.negative else 1) * view.count
        passes = Passes(self._progress, rounds, len(flux.blocks) + 3, steps.stop - steps.done, steps.stage)

        def forward(latents: mx.array, i: int, condition: int, step: int) -> mx.array:
            row = condition * steps.count + step
            mods: Any = tree_map(lambda m: m[row : row + 1], modulations)
            half, seen = steps.cache.shortcut(f"{i}.{int(condition >= request.prompts)}.", step), []
            for part, size in view.parts(made.around(latents, i), step):
                v = flux.forward(part, texts[condition], mods, tables[condition][size], run, half)
                passes.end()
                v = v if made.tokens is None else v[:, : latents.shape[1]]
                _check_varied(f"step {step + 1} of the transformer", v)
                seen.append(v)
            return view.joined(seen, step).astype(mx.float32)

        def velocity(latents: mx.array, step: int) -> mx.array:
            velocities = []
            for i in range(request.batch):  # one by one: neither a picture nor its memory depends on its batch
                prompt = i // request.num_images_per_prompt
                v = forward(latents[i : i + 1], i, prompt, step)
                if conditions.negative:
                    negative = forward(latents[i : i + 1], i, request.prompts + prompt, step)
                    v = negative + request.true_cfg_scale * (v - negative)
                velocities.append(v)
            return mx.concatenate(velocities)

        with self._streaming(self.blocks, rounds) as run:
            run = self.runner(steps.stage, rounds, run=run, report=passes.part)
            yield velocity

    def _repeating_overflows(
        self,
        velocity: Velocity,
        request: ResolvedRequest,
        conditions: Conditions,
        steps: _Steps,
        made: Latents,
        uses: Uses,
    ) -> Velocity:
        """Returns a velocity in float16 whose steps are computed again in bfloat16 where a number leaves the range."""
        others: list[tuple[Generator, Flux]] = []  # made once, when it is needed

        def repeating(latents: mx.array, step: int) -> mx.array:
            v = velocity(latents, step)
            if mx.isfinite(v).all().item():
                return v
            if not others:
                logger.warning(
                    "step %d exceeds the range of float16: it is computed in bfloat16, and so is any other that does",
                    step + 1,
                )
                other = Generator(self._folder, mx.bfloat16, self._worker)
                others.append((other, other._flux(0, uses)))
            other, flux = others[0]
            sigmas = steps.sigmas[step : step + 2]
            one = replace(steps, sigmas=sigmas, done=0, stop=1, cache=Uncached(sigmas), solver="euler")
            with other._velocity(flux, request, conditions, one, made) as in_bfloat16:
                return in_bfloat16(latents, 0)

        return repeating

    def _flux(self, resident_bytes: int, uses: Uses) -> Flux:
        """Returns the transformer with adapters. Its blocks are read when they run, and so many bytes of them stay."""
        if self._whole_flux:
            self._streamed = None
            self._adapt(self._whole_flux, uses)
            return self._whole_flux
        if self._streamed:
            self._streamed.blocks.set_budget(resident_bytes)
        else:
            flux, tensors = self.folder.flux.load(self._dtype), self.folder.flux.tensors()
            make = partial(Blocks, flux, tensors, dtype=self._dtype, check=self._worker.check)
            blocks, modulation = make(flux.blocks, budget=resident_bytes), make(flux.modulated, budget=0)
            self._streamed = _StreamedFlux(flux, blocks, modulation)
        self._adapt(self._streamed.network, uses)
        return self._streamed.network

    def _adapt(self, flux: Flux, uses: Uses) -> None:
        """Makes these adapters those of the transformer, and forgets the modulations that they change."""
        if self._attached is None or self._attached.network is not flux:
            self._attached = Attached(flux, "transformer", self._dtype)
            self._modulations.forget()
        changed = self._attached.use(uses, self._base.lengths)
        if any(path.startswith(("time_in.", "guidance_in.", "vector_in.")) for path in changed):
            self._modulations.forget()
        stages = enumerate(flux.modulated)
        self._modulations.change(place for place, stage in stages if self._attached.touches(stage, changed))

    def read_ahead(self, requests: Sequence[ResolvedRequest], plan: MemoryPlan, uses: Uses) -> None:
        """Computes the modulations of requests that follow, for as many as have room beside the first one's plan.

        Their prompts were encoded with `encode`. A request with style images is left out: they change what it reads.
        """
        requests = [request for request in requests if not request.style]
        if self._whole_flux or not requests:  # nothing is read for them
            return
        flux = self._flux(plan.resident_bytes, uses)
        runs = [self._moments(request, self._conditions(request, uses), self._steps(request)) for request in requests]
        size = modulation_bytes(flux.config, max(len(run.sigmas) * len(run.pooled) for run in runs), self._dtype)
        runs = runs[: 1 + max(plan.budget - plan.peak, 0) // size]
        if len(runs) > 1:
            self._modulations.read_ahead(
                runs, flux, partial(self._modulating, flux), partial(self.runner, "modulation")
            )

    @staticmethod
    def _moments(request: ResolvedRequest, conditions: Conditions, steps: _Steps) -> Moments:
        rounding = noises.find_recipe(request.noise).timestep_rounding
        pooled = mx.concatenate([c.pooled for c in conditions.both])
        return Moments(steps.sigmas[:-1], request.guidance_scale, pooled, rounding)

    def _modulating(self, flux: Flux, places: Sequence[int]) -> contextlib.AbstractContextManager[Callable]:
        """Gives the `run` of the modulation layers at these places, while their weights are read."""
        blocks = self._streamed and self._streamed.modulation
        if blocks and len(places) < len(flux.modulated):
            some = [flux.modulated[place] for place in places]
            blocks = Blocks(
                flux, self.folder.flux.tensors(), some, dtype=self._dtype, budget=0, check=self._worker.check
            )
        return self._streaming(blocks, 1)

    @staticmethod
    def _streaming(blocks: Blocks | None, rounds: int) -> contextlib.AbstractContextManager[Callable]:
        return blocks.streaming(rounds) if blocks else contextlib.nullcontext(evaluated)

    def _decode(self, request: ResolvedRequest, latents: mx.array, *, as_floats: bool, tiled: bool) -> list[np.ndarray]:
        """Returns pixels (H, W, 3) of each picture, uint8 or float32 in [0, 1]; a part of an image is put back."""
        vae = self._vae()
        config = vae.config
        width, height = request.width // config.downsampling, request.height // config.downsampling
        decode = partial(tiles.decode, vae) if tiled else vae.decode
        stages = _count(decode, mx.zeros((1, height, width, config.z_channels)))
        run = self.runner("decode", request.batch * stages)
        rule = noises.find_recipe(request.noise).pixels
        canvas = request.inputs.canvas if request.inputs.paste else None
        pictures = []
        for i in range(request.batch):
            z = sampler.unpack(latents[i : i + 1], width=width, height=height).transpose(0, 2, 3, 1)
            x = decode(z / config.scale_factor + config.shift_factor, run)
            _check_finite("the image decoder", x)
            _check_varied("the image decoder", x)
            pixels = mx.clip(x.astype(mx.float32) / 2 + 0.5, 0, 1) if as_floats else pixels_to_bytes(x, rule)
            picture = np.array(pixels[0])
            pictures.append(canvas.paste(picture, soft=request.inputs.soft) if canvas else picture)
        return pictures

    def whole_flux(self, uses: Uses = ()) -> Flux:
        """Returns the transformer with all weights in memory, where it stays, and these adapters."""
        if self._whole_flux is None:
            flux = self.folder.flux.load(self._dtype)
            mx.eval(flux.parameters())
            self._whole_flux = flux
        self._adapt(self._whole_flux, uses)
        return self._whole_flux

    def whole_vae(self) -> VAE:
        """Returns the autoencoder with all weights in memory, where it stays."""
        if self._whole_vae is None:
            vae = self.folder.vae.load(self._dtype)
            mx.eval(vae.parameters())
            self._whole_vae = vae
        return self._whole_vae

    def _vae(self) -> VAE:
        """Returns the autoencoder: the one that stays, or one for this stage."""
        return self._whole_vae or self.folder.vae.load(self._dtype)

    def runner(
        self, stage: str, parts: int, run: Callable = evaluated, report: Callable[[int], None] | None = None
    ) -> Callable:
        """Returns a `run` that evaluates part by part: short command buffers, bounded memory, a stop after each.

        Args:
            stage: name for the progress.
            parts: how many will come.
            run: evaluates one part.
            report: takes the number of parts that are done; None: they are the progress.
        """

        def tell(done: int) -> None:
            if self._progress:
                self._progress(stage, done, parts)

        return self._worker.stoppable(run, report or tell)


def _is_denoised(request: ResolvedRequest, checkpoint: Checkpoint | None) -> bool:
    """Returns True where a checkpoint has all steps of a request behind it."""
    return checkpoint is not None and (checkpoint.is_denoised or checkpoint.done == request.stop_after)


def _predicted(made: Latents, steps: _Steps, step: int, *, before: mx.array, after: mx.array) -> mx.array:
    """Returns the clean latents (B, L, 64) that a step heads for, with the image where a mask keeps it."""
    sigma, following = map(float, steps.sigmas[step:][:2])
    clean = previews.predicted(before, after, sigma, following)
    if made.kept is not None:
        clean = made.kept.restore(clean, 0.0, 1 - (step + 1) / steps.count)
    _check_finite("the prediction of the picture", clean)
    return clean


def _save(
    checkpoint: Checkpoint,
    done: int,
    steps: _Steps,
    state: State,
    predicted: mx.array | None = None,
    kept: Mapping[str, mx.array] | None = None,
) -> None:
    """Saves a run after a step, and at once where it stops with a predicted picture, or a pass has ended.

    Args:
        checkpoint: of the run.
        done: steps of the pass.
        steps: of the pass.
        state: after the step.
        predicted: the picture's latents, where the run stops here.
        kept: what a second pass depends on.
    """
    if type(checkpoint) is not Checkpoint:  # its class was changed since the pipeline looked
        raise UsageError(f"`checkpoint` is {type(checkpoint).__name__}", "a Checkpoint")
    held = steps.cache.arrays() | ({} if state.denoised is None else {"denoised": state.denoised})
    held |= {} if predicted is None else {"predicted": predicted}
    held |= kept or {}
    arrays = {name: _packed(array) for name, array in held.items()}
    checkpoint.save_step(steps.behind + done, steps.total, np.array(state.latents.astype(mx.float32)), arrays)
    if predicted is not None or done == steps.count < steps.total:
        checkpoint.write()


def _packed(array: mx.array) -> np.ndarray:
    """Returns an array for a file, to the bit: float32, or the 16 bits of a number as an integer."""
    return np.array(array if array.dtype == mx.float32 else array.view(mx.uint16))


def _unpacked(array: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """Reverses `_packed`, with the type that numbers of 16 bits have."""
    return mx.array(array) if array.dtype == np.float32 else mx.array(array).view(dtype)


def _count(function: Callable, x: mx.array) -> int:
    """Counts the parts that a function runs, without evaluating any."""
    count = 0

    def run(part, *args):
        nonlocal count
        count += 1
        return part(*args)

    function(x, run)
    return count


def _given(embeds: mx.array | None, pooled: mx.array | None) -> list[EncodedPrompt]:
    if embeds is None or pooled is None:
        return []
    return [EncodedPrompt(embeds[i : i + 1], pooled[i : i + 1]) for i in range(len(embeds))]


def _check_finite(source: str, *arrays: mx.array) -> None:
    finite = [mx.isfinite(array).all() for array in arrays]
    mx.eval(finite, arrays)
    if not all(flag.item() for flag in finite):
        todo = "compute with `dtype` bfloat16 or float32; if that fails too, convert the model again"
        raise ModelError(f"{source} gave NaN or infinities", "finite numbers", todo)


def _check_varied(source: str, *arrays: mx.array) -> None:
    """Refuses results that hold the same numbers at every position: failed GPU commands leave zeros, without an error.

    NaN and infinities are not what this looks for.

    Args:
        source: the network.
        arrays: (1, ..., C); those with one position must hold different numbers.

    Raises:
        ResourceError: one of them has no variance.
    """
    rows = [array.reshape(-1, array.shape[-1]) for array in arrays]
    varied = [(row != (row[:1] if len(row) > 1 else row[:, :1])).any() | ~mx.isfinite(row).all() for row in rows]
    mx.eval(varied, arrays)
    if not all(flag.item() for flag in varied):
        todo = "a GPU command may have failed: try again; if that fails too, convert the model again"
        raise ResourceError(f"{source} gave the same numbers everywhere", "numbers that differ", todo)


@contextlib.contextmanager
def _measured(stage: str, seconds: dict[str, float], peaks: dict[str, int]) -> Iterator[None]:
    mx.reset_peak_memory()
    begin = time.perf_counter()
    yield
    seconds[stage], peaks[stage] = time.perf_counter() - begin, mx.get_peak_memory()
    mx.clear_cache()
