"""GPTQ of a transformer, block after block, in a folder of its own that survives a kill.

    HOME/interrupted/gptq-KEY/        KEY: of the source, the recipe and the prompts
      samples.safetensors             inputs of the transformer, collected by `mlx_flux_krea.calibration`
      modulations.safetensors         shifts, scales and gates of every block, a row for each sample
      stream-003-007.safetensors      x, (1, S + L, C): text and image stream of sample 7 before block 3
      block-002.safetensors           the rounded layers of a block; its metadata have their errors
      config.json                     how they are quantized, as in a model folder

The layers of a block are rounded one by one: the samples run through the block up to a layer, whose inputs add to its
second moment. Then each sample's stream is replaced by that behind the block. So the inputs of one block lie on disk,
2 GB for FLUX.1, and one moment is in memory. The streams are those of exact weights: on the small model as good as
those of rounded ones, with a pass less for each block (docs/precision.md).
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_flux_krea import home, macos
from mlx_flux_krea.errors import ModelError, UsageError
from mlx_flux_krea.files import replacing, try_lock
from mlx_flux_krea.models.config import FluxConfig, to_json
from mlx_flux_krea.models.layers import Branch, set_branch
from mlx_flux_krea.models.transformer import Flux, SingleStreamBlock, rope
from mlx_flux_krea.presets import CALIBRATION_PROMPTS, CALIBRATION_TIMES, GPTQ, TASKS
from mlx_flux_krea.residency import Blocks
from mlx_flux_krea.samples import Samples
from mlx_flux_krea.sampling import sampler
from mlx_flux_krea.weights import ModelFolder
from mlx_flux_krea.worker import evaluated

from .folder import check_disk, existing
from .gptq import round_matrix
from .job import Conversion
from .quantize import count_bytes, group_of, layer_of
from .remap import ComponentPlan, Target
from .sources import open_sources

LABEL = "rounding"  # of the progress, in inputs of layers
BITS = ("4", "3")
_STRIP = 2048  # rows of a moment that are computed at a time
Losses = dict[str, tuple[float, float]]  # of the outputs, by tensor: sums of the squares of error and values


@dataclass(frozen=True)
class Gptq:
    """The inputs by which layers are rounded, and who wants to know.

    Attributes:
        collect: writes the inputs that a model's transformer has for prompts: `calibration.collect` with its progress.
        prompts: whose inputs count.
        begin: called once everything is checked, with the model, and how many of its blocks are rounded already.
    """

    collect: Callable[..., None]
    prompts: tuple[str, ...] = CALIBRATION_PROMPTS
    begin: Callable[[ModelFolder, int], None] = lambda folder, done: None


@dataclass(frozen=True)
class Recorder(Branch):
    """Keeps the inputs of a layer, which computes as before."""

    seen: list[mx.array] = field(default_factory=list)

    def __call__(self, layer: Callable[[mx.array], mx.array], width: int, x: mx.array) -> mx.array:
        """Returns the layer's result."""
        self.seen.append(x)
        return layer(x)


class Rounding:
    """The rounding of one conversion's transformer, as far as it has come.

    Args:
        job: of a model folder of ours whose transformer is not quantized, to 3 or 4 bits.
        gptq: the inputs.

    Raises:
        UsageError: a recipe that GPTQ is not for.
        ModelError: a source that it cannot start from.
    """

    def __init__(self, job: Conversion, gptq: Gptq):
        self.folder, self.job, self._gptq = _checked(job), job, gptq
        self.layers = {
            path: q
            for path, q in job.layers["transformer"].items()
            if q and "blocks, " in group_of("transformer", f"{path}.weight")
        }
        if not self.layers:
            raise ModelError(f"no layer of {self.folder.path} has rows of whole groups", "", "leave `gptq` out")
        dtype = self.folder.flux.dtype
        self._dtype = mx.float32 if dtype == "float32" else mx.bfloat16  # float16 has too small a range for streams
        facts = [(self.folder.path / "manifest.json").read_bytes().hex(), job.dtype, gptq.prompts]
        facts += [sorted((path, to_json(q)) for path, q in self.layers.items())]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        self.path = home.path(home.CHECKPOINTS, f"gptq-{key}")
        self.losses: Losses = {}
        self.plain: Losses = {}

    @property
    def bytes(self) -> int:
        """Bytes that its folder takes at most, less what is there."""
        flux, index = self.folder.flux.sizes, self.folder.index
        count = len(self._gptq.prompts) * CALIBRATION_TIMES
        image = index.defaults.width * index.defaults.height // (2 * self.folder.vae.sizes.downsampling) ** 2
        tokens = image + index.max_sequence_length
        streams = (count + 1) * tokens * flux.hidden_size * self._dtype.size
        rows = count * (12 * flux.depth + 3 * flux.depth_single_blocks) * flux.hidden_size * self._dtype.size
        samples = 4 * count * image * flux.out_channels
        samples += 4 * len(self._gptq.prompts) * (index.max_sequence_length * flux.context_in_dim + flux.vec_in_dim)
        there = sum(file.stat().st_size for file in self.path.glob("*")) if self.path.exists() else 0
        targets = ((t, layer_of(t, dict(self.layers))) for t in self.job.plans["transformer"][1].targets)
        rounded = sum(count_bytes(target, self.job.dtype, q) for target, q in targets if q)
        return max(streams + rows + samples + rounded - there, 0)

    def check_disk(self, target: Path, need: int) -> None:
        """Refuses if a disk cannot hold this folder and the new one.

        Args:
            target: the new folder.
            need: bytes that it takes.

        Raises:
            ResourceError: with the free and the needed bytes.
        """
        shared = os.stat(existing(target)).st_dev == os.stat(existing(self.path)).st_dev
        todo = "choose another disk with `out`" if shared else "choose another disk with FLUX_KREA_HOME"
        check_disk(self.path, self.bytes + need * shared, todo)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Keeps the folder for this process within the block; it is deleted after success.

        Raises:
            UsageError: another process works in it.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.parent.chmod(0o700)  # latents are pictures that nobody has judged
            lock = try_lock(self.path / "lock")
        except OSError as error:
            todo = "make room there, or choose another place with FLUX_KREA_HOME"
            raise UsageError(f"{self.path} cannot be written: {error.strerror}", "", todo) from None
        if lock is None:
            raise UsageError(f"another conversion rounds {self.folder.path} by GPTQ", "one at a time", "wait for it")
        try:
            macos.exclude(self.path)
            for partial_file in self.path.glob(".*.partial"):
                partial_file.unlink()
            yield
            shutil.rmtree(self.path, ignore_errors=True)
        finally:
            if not any(self.path.glob("*.safetensors*")):  # nothing was done
                shutil.rmtree(self.path, ignore_errors=True)
            os.close(lock)

    def plan(self, progress: Callable[[str, int, int], None]) -> ComponentPlan:
        """Rounds what is left, and returns the transformer's plan with rounded layers in place of exact ones.

        Args:
            progress: called with a label, units done and all units.

        Raises:
            ModelError: weights or inputs are missing or damaged, or gave NaN.
            ResourceError: not enough memory or disk.
        """
        flux = self.folder.flux
        total = flux.sizes.depth + flux.sizes.depth_single_blocks
        done = next(place for place in range(total + 1) if place == total or not self._block(place).exists())
        self._gptq.begin(self.folder, done)
        if done < total:
            samples = self._samples()
            if not any(self.path.glob("block-*")) and not any(self.path.glob("stream-001-*")):
                self._prepare(samples)  # again, if it was not finished
            self._run(samples, done, progress)
        return self._replaced()

    def note(self) -> str:
        """Returns how far the layers' outputs are from exact ones, and how far they would be without GPTQ."""

        def share(losses: Losses) -> float:
            return math.sqrt(sum(error for error, _ in losses.values()) / sum(size for _, size in losses.values()))

        return (
            f"{GPTQ}: errors of its layers are of their outputs, {share(self.losses):.1%} in all; "
            f"{share(self.plain):.1%} if each number were rounded for itself"
        )

    def _block(self, place: int) -> Path:
        return self.path / f"block-{place:03d}.safetensors"

    def _streams(self, place: int, count: int) -> list[Path]:
        """Returns the files of all samples' streams before a block."""
        return [self.path / f"stream-{place:03d}-{number:03d}.safetensors" for number in range(count)]

    def _samples(self) -> Samples:
        """Returns the inputs, collected if they are not there."""
        file = self.path / "samples.safetensors"
        if not file.exists():
            self._gptq.collect(self.folder, file, prompts=self._gptq.prompts)
        return Samples.load(file)

    def _prepare(self, samples: Samples) -> None:
        """Writes the modulations of all blocks and the streams before the first."""
        flux, dtype = self.folder.flux.load(self._dtype), self._dtype
        times = sampler.embedded_times(samples.sigmas, samples.rounding, dtype)
        scales = None
        if samples.guidance is not None:
            scales = sampler.embedded_guidance(samples.guidance, samples.rounding, dtype)
            scales = mx.broadcast_to(scales, times.shape)
        pooled = mx.array(samples.pooled[samples.prompts])
        vec = evaluated(partial(flux.vec, in_float32=samples.rounding == "once"), times, scales, pooled)
        blocks = Blocks(flux, self.folder.flux.tensors(), flux.modulated, dtype=dtype, budget=0)
        with blocks.streaming(1) as run:
            modulations = flux.modulations(vec, run)[:-1]  # the last is of the final layer
        with replacing(self.path / "modulations.safetensors") as opened:
            mx.save_safetensors(opened, dict(tree_flatten(modulations)))  # type: ignore[arg-type]
        texts = [evaluated(flux.txt_in, mx.array(one[None]).astype(dtype)) for one in samples.embeds]
        for latents, prompt, file in zip(samples.latents, samples.prompts, self._streams(0, len(samples)), strict=True):
            _save(file, mx.concatenate([texts[prompt], flux.img_in(mx.array(latents[None]).astype(dtype))], axis=1))

    def _run(self, samples: Samples, first: int, progress: Callable[[str, int, int], None]) -> None:
        """Rounds the blocks from one on."""
        flux, count = self.folder.flux.load(self._dtype), len(samples)
        text = samples.embeds.shape[1]
        ids = sampler.position_ids(text, width=samples.width, height=samples.height)
        pe = rope(ids, flux.config.axes_dim, flux.config.theta)
        modulations: Any = tree_unflatten(list(mx.load(str(self.path / "modulations.safetensors")).items()))  # type: ignore[union-attr]
        blocks = flux.blocks
        layers = self._layers_of(flux)
        total, done = (count * sum(len(some) + 1 for some in part) for part in (layers, layers[:first]))

        def tell(passes: int = 1) -> None:
            nonlocal done
            done += passes
            progress(LABEL, done, total)

        for place in range(max(first - 1, 0), len(blocks)):  # streams may still be before a block that is rounded
            passes = _Passes(blocks[place], self._streams(place, count), modulations[place], pe, text, tell)
            if place >= first:
                self._round(layers[place], self._block(place), passes)
            if place + 1 < len(blocks):
                passes.move(self._streams(place + 1, count))
            blocks[place].update(tree_map(lambda _: mx.zeros(()), blocks[place].parameters()))  # frees its weights
            mx.clear_cache()

    def _round(self, layers: dict[str, nn.Linear], file: Path, passes: "_Passes") -> None:
        """Rounds the layers of a block, and writes its file."""
        arrays, errors = {}, {}
        for path, layer in layers.items():
            weight = np.array(layer.weight.astype(mx.float32))
            rounded = round_matrix(weight, passes.moment(layer), self.layers[path], getattr(mx, self.job.dtype))
            arrays |= {f"{path}.{part}": getattr(rounded, part) for part in ("weight", "scales", "biases")}
            errors[f"{path}.weight"] = rounded.error, rounded.plain, rounded.size
        with replacing(file) as opened:
            mx.save_safetensors(opened, arrays, {"errors": json.dumps(errors)})  # type: ignore[arg-type]

    def _layers_of(self, flux: Flux) -> list[dict[str, nn.Linear]]:
        """Returns the layers of each block that are rounded, by their paths in the transformer."""
        found: dict[str, dict[str, nn.Linear]] = {}
        for path, layer in flux.named_modules():
            if path in self.layers:
                kind, number, _ = path.split(".", 2)
                found.setdefault(f"{kind}.{number}", {})[path] = layer
        prefixes = {id(module): path for path, module in flux.named_modules()}
        return [dict(sorted(found.get(prefixes[id(block)], {}).items())) for block in flux.blocks]

    def _replaced(self) -> ComponentPlan:
        """Returns the plan of the transformer whose rounded layers are read from the blocks' files."""
        q = next(iter(self.layers.values()))
        with replacing(self.path / "config.json") as file:
            file.write(json.dumps({"quantization": to_json(q)}).encode())
        rounded = {}
        flux = self.folder.flux.sizes
        for place in range(flux.depth + flux.depth_single_blocks):
            (source,) = open_sources([self._block(place)])
            rounded |= source.tensors
            for name, (error, plain, size) in json.loads(source.metadata["errors"]).items():
                self.losses[name], self.plain[name] = (error, size), (plain, size)
        _, plan = self.job.plans["transformer"]
        targets = (
            Target(t.name, t.shape, (rounded[t.name],), swap=False, torch_axes=False) if t.name in rounded else t
            for t in plan.targets
        )
        return replace(plan, targets=tuple(targets))


class _Passes:
    """Runs all samples through a block of exact weights.

    Args:
        block: of the transformer; weights are read when they are needed.
        streams: files of the samples' streams before it.
        modulation: of the block, a row for each sample.
        pe: from `rope`.
        text: S.
        tell: called after each sample.
    """

    def __init__(self, block, streams: Sequence[Path], modulation, pe, text: int, tell: Callable):
        self._block, self._streams, self._modulation, self._pe = block, streams, modulation, pe
        self._text, self._tell = text, tell

    def _output(self, number: int) -> mx.array:
        """Returns the streams (1, S + L, C) of a sample behind the block, not yet computed."""
        x = mx.load(str(self._streams[number]))["x"]  # type: ignore[call-overload]
        mod = tree_map(lambda rows: rows[number : number + 1], self._modulation)
        if isinstance(self._block, SingleStreamBlock):
            return self._block(x, mod, self._pe)
        img, txt = self._block(x[:, self._text :], x[:, : self._text], mod, self._pe)
        return mx.concatenate([txt, img], axis=1)

    def move(self, following: Sequence[Path]) -> None:
        """Writes the streams behind the block, each in place of that before it; those that are there stay."""
        for number, (stream, file) in enumerate(zip(self._streams, following, strict=True)):
            if not file.exists():
                _save(file, self._output(number))
            stream.unlink(missing_ok=True)
            self._tell()

    def moment(self, layer: nn.Linear) -> np.ndarray:
        """Returns the lower triangle of the second moment (I, I) of a layer's inputs, divided by their number, float32.

        Raises:
            ModelError: an input is not finite.
        """
        width, rows = layer.weight.shape[1], 0
        moment = np.zeros((width, width), np.float32)
        recorder = Recorder()
        set_branch(layer, recorder)
        try:
            for number in range(len(self._streams)):
                self._output(number)  # of which nothing is computed beyond the inputs of the layer
                x = mx.concatenate(recorder.seen, axis=1).reshape(-1, width).astype(mx.float32)
                recorder.seen.clear()
                mx.eval(x)
                rows += len(x)
                for first in range(0, width, _STRIP):
                    end = min(first + _STRIP, width)
                    moment[first:end, :end] += np.array(x[:, first:end].T @ x[:, :end])
                self._tell()
        finally:
            set_branch(layer, None)
        if not np.isfinite(np.diagonal(moment)).all():
            raise ModelError("a block of the transformer gave NaN or infinities", "", "convert the original again")
        moment /= rows
        return moment


def _save(file: Path, x: mx.array) -> None:
    with replacing(file) as opened:
        mx.save_safetensors(opened, {"x": x})  # type: ignore[arg-type]  # files are taken too


def _checked(job: Conversion) -> ModelFolder:
    """Returns the source of a conversion that GPTQ is for.

    Raises:
        UsageError: another number of bits.
        ModelError: not a model folder in 16 or 32 bits, or of a model that reads images.
    """
    quantize = job.recipe.quantize
    if quantize not in BITS:
        raise UsageError(f"`gptq` with `quantize` {quantize}", f"`quantize` {' or '.join(BITS)}", "choose one of them")
    folder = job.own.folder if job.own else None
    if not isinstance(folder, ModelFolder):
        todo = "convert it first, with `quantize` none; then convert that folder with `gptq`"
        raise ModelError("`gptq` runs the model, and this is not a model folder", "a model folder in 16 bits", todo)
    if any(folder.flux.layers().values()):
        todo = "convert the original with `quantize` none; then convert that folder with `gptq`"
        raise ModelError(f"the transformer in {folder.path} is already quantized", "one in 16 bits", todo)
    if folder.index.task != TASKS[0]:
        found = f"{folder.path} is a model for {folder.index.task}, whose inputs are not prompts alone"
        raise ModelError(found, TASKS[0], "leave `gptq` out")
    return folder


def count_operations(flux: FluxConfig, *, image: int, text: int, samples: int, done: int = 0) -> tuple[float, float]:
    """Counts the operations of rounding a transformer: on the GPU, and in factorizing and rounding on the processor.

    For each layer the samples run through the block up to it (but for a last layer, products of one stream), and half
    of its moment is computed; once they run through the whole block.

    Args:
        flux: sizes of the transformer.
        image: tokens of the picture.
        text: tokens of T5.
        samples: number of inputs.
        done: blocks that are rounded already.
    """
    c, m, tokens = flux.hidden_size, flux.mlp_size, image + text
    attention = 2 * tokens * 3 * c * c + 4 * tokens**2 * c
    double = 2 * tokens * (4 * c * c + 2 * c * m) + 4 * tokens**2 * c  # the streams behind the block
    for stream in (image, text):
        proj, up = 2 * stream * c * c, 2 * stream * c * m
        double += 3 * attention + 2 * proj + up + stream * (3 * c * c + m * m)
    single = 2 * tokens * c * (4 * c + 2 * m) + 4 * tokens**2 * c
    single += attention + 2 * tokens * c * m + tokens * (c * c + (c + m) ** 2)
    matrices = {  # outputs and inputs
        "double": 2 * [(3 * c, c), (c, c), (m, c), (c, m)],
        "single": [(3 * c + m, c), (c, c + m)],
    }
    # a factor, the change of the outputs by plain rounding and by none, and the feedback: triangles of products
    rounding = {kind: sum(i**3 / 3 + 3 * o * i * i for o, i in some) for kind, some in matrices.items()}
    left = max(flux.depth - done, 0), flux.depth_single_blocks - max(done - flux.depth, 0)
    graphics = samples * (left[0] * double + left[1] * single)
    return graphics, left[0] * rounding["double"] + left[1] * rounding["single"]
