"""How far a step of the small model is from the exact one, by bits and by the way of rounding: the evidence for --gptq.

    python benchmarks/gptq.py [--prompts 16]
    python benchmarks/gptq.py --pictures 100    how many pictures of held-out sentences are entirely right, in 12 steps
    python benchmarks/gptq.py --hours       the time that GPTQ takes for FLUX.1 Krea [dev], computed, by chip

A step's error is the distance of the velocity from that of the unquantized transformer, relative to its length, at the
same latents: root mean square over some steps of sentences that training never drew, in float32. Embeddings are exact,
so that the transformer alone counts. Rows "range search" round each number for itself, with the range of each group
that has the least error of weights. "scenes" are prompts of the kind that the small model was trained on, others than
those that it is judged by; the usual prompts are `presets.CALIBRATION_PROMPTS`, of which it knows few words.
"""

import argparse
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_flux_krea.convert import Gptq, convert
from mlx_flux_krea.convert import gptq as rounding
from mlx_flux_krea.convert.quantize import group_of
from nano import measure, scenes_to_judge

from mlx_flux_krea import FluxPipeline, calibration, nano
from mlx_flux_krea.commands.shared.rounding import seconds
from mlx_flux_krea.commands.shared.text import duration, table
from mlx_flux_krea.models.config import FLUX_DEV
from mlx_flux_krea.models.transformer import Flux, rope
from mlx_flux_krea.nano import scenes
from mlx_flux_krea.presets import CALIBRATION_PROMPTS, CHIPS, MAX_SEQUENCE_LENGTH
from mlx_flux_krea.sampling import sampler
from mlx_flux_krea.weights import open_model

_STEPS = (0, 2, 7, 12, 17, 22, 26)  # of 28
_SIDE = 96


def scene_prompts(count: int) -> tuple[str, ...]:
    """Returns sentences about scenes of one and two things, of combinations that training drew."""
    rng = random.Random(5)
    return tuple(scenes.describe(scenes.sample(rng, 1 + n % 2), rng) for n in range(count))


def transformer(path: Path) -> Flux:
    """Returns the transformer of a model folder, in float32."""
    return open_model(path).flux.load(mx.float32)


class Steps:
    """Steps of held-out sentences, and the exact velocity of each.

    Args:
        count: number of sentences.
    """

    def __init__(self, count: int):
        pipe = FluxPipeline.from_pretrained(nano.FOLDER, dtype="float32")
        folder = pipe.folder
        down = folder.vae.sizes.downsampling
        sigmas = sampler.make_sigmas(folder.index.schedule, (_SIDE // down // 2) ** 2, 28)
        self.inputs = []
        for number, (_, text) in enumerate(scenes_to_judge(count)):
            embeds, pooled = map(
                np.array, pipe.encode_prompt(text)
            )  # arrays of MLX belong to the thread that made them
            start = mx.random.normal((1, (_SIDE // down // 2) ** 2, 64), key=mx.random.key(number))
            latents = [np.array(start)]

            def keep(pipe, step, sigma, given, latents=latents):
                latents.append(np.array(given["latents"]))

            pipe(
                text,
                latents=start,
                num_inference_steps=28,
                output_type="latent",
                callback_on_step_end=keep,
                progress=False,
            )
            self.inputs += [(latents[step], float(sigmas[step]), embeds, pooled) for step in _STEPS]
        self._grid = {"width": _SIDE // down, "height": _SIDE // down}
        self.exact = [self.velocity(transformer(nano.FOLDER), one) for one in self.inputs]

    def velocity(self, flux: Flux, given) -> mx.array:
        """Returns the velocity at one step."""
        latents, embeds, pooled = map(mx.array, (given[0], given[2], given[3]))
        times, guidance = mx.array([1000 * given[1]]), mx.array([4500.0])
        pe = rope(sampler.position_ids(embeds.shape[1], **self._grid), flux.config.axes_dim, flux.config.theta)
        modulations = flux.modulations(flux.vec(times, guidance, pooled))
        v = flux.forward(latents, flux.txt_in(embeds), modulations, pe)
        mx.eval(v)
        return v

    def error(self, flux: Flux) -> float:
        """Returns the error of a step of a transformer."""
        pairs = zip(self.inputs, self.exact, strict=True)
        ratios = [(mx.linalg.norm(self.velocity(flux, one) - v) / mx.linalg.norm(v)).item() for one, v in pairs]
        return float(np.sqrt(np.mean(np.square(ratios))))


def in_order(diagonal: np.ndarray, group_size: int) -> np.ndarray:
    """Returns the columns in their own order, in place of `gptq._order`."""
    return np.arange(len(diagonal))


def searched(flux: Flux, bits: int, dtype: mx.Dtype = mx.bfloat16) -> Flux:
    """Rounds the blocks in place, each number for itself, in ranges of least error."""
    for path, layer in flux.named_modules():
        if "blocks, " in group_of("transformer", f"{path}.weight") and "weight" in layer and layer.weight.ndim == 2:
            weight = np.array(layer.weight.astype(mx.float32)).T
            for first in range(0, len(weight), 64):
                part = weight[first : first + 64]
                scale, bias = rounding.choose_grid(part, bits, dtype)
                part[:] = np.clip(np.rint((part - bias) / scale), 0, 2**bits - 1) * scale + bias
            layer.weight = mx.array(np.ascontiguousarray(weight.T))
    return flux


def judge_pictures(count: int) -> None:
    """Prints the share of pictures that are entirely right, with plain rounding and with GPTQ."""
    asked, rows = scenes_to_judge(count), {}
    with tempfile.TemporaryDirectory() as work:
        for bits in ("4", "3"):
            for name, how in ((f"{bits} bits", None), (f"{bits} bits, GPTQ", Gptq(calibration.collect))):
                path = convert([nano.FOLDER], Path(work) / "model", quantize=bits, gptq=how, force=True).path
                rows[name] = measure(path, asked, 12)
                print(f"{name:20}{rows[name][1]:9.0%}{rows[name][2]:9.0%}", flush=True)
    print(json.dumps(rows))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--pictures", type=int, metavar="N", help="Judge so many pictures instead.")
    parser.add_argument("--hours", action="store_true", help="Print the time by chip instead.")
    given = parser.parse_args()
    if given.hours:
        times = {chip: seconds(FLUX_DEV, chip, width=1024, height=1024, length=MAX_SEQUENCE_LENGTH) for chip in CHIPS}
        print(table([("chip", "takes about"), *((chip, duration(time)) for chip, time in times.items())], right=(1,)))
        print(json.dumps(times))
        return
    if given.pictures:
        judge_pictures(given.pictures)
        return
    steps, rows = Steps(given.prompts), {}

    with tempfile.TemporaryDirectory() as work:

        def converted(bits: str, prompts: tuple[str, ...] | None = None) -> Flux:
            file = Path(work) / f"{len(prompts or ())}-{hash(prompts)}.safetensors"
            if prompts and not file.exists():
                calibration.collect(open_model(nano.FOLDER), file, prompts=prompts)
            collect: Callable = lambda folder, path, prompts: shutil.copy(file, path)  # noqa: E731
            how = Gptq(collect, prompts) if prompts else None
            path = convert([nano.FOLDER], Path(work) / "model", quantize=bits, gptq=how, force=True).path
            return transformer(path)

        def changed(bits: str, name: str, value) -> Flux:
            before = getattr(rounding, name)
            setattr(rounding, name, value)
            try:
                return converted(bits, CALIBRATION_PROMPTS)
            finally:
                setattr(rounding, name, before)

        ways: dict[str, Callable[[], Flux]] = {}
        for bits in ("5", "4", "3"):
            ways[f"{bits} bits"] = partial(converted, bits)
            ways[f"{bits} bits, range search"] = lambda bits=bits: searched(transformer(nano.FOLDER), int(bits))
        for bits in ("4", "3"):
            ways[f"{bits} bits, GPTQ"] = partial(converted, bits, CALIBRATION_PROMPTS)
            ways[f"{bits} bits, GPTQ, scenes"] = partial(converted, bits, scene_prompts(12))
            ways[f"{bits} bits, GPTQ, a hundredth of damping"] = partial(changed, bits, "DAMPING", 0.01)
            ways[f"{bits} bits, GPTQ, columns in their own order"] = partial(changed, bits, "_order", in_order)
            ways[f"{bits} bits, GPTQ, no range search"] = partial(changed, bits, "_SHRUNK", np.ones(1, np.float32))
        for name, make in ways.items():
            rows[name] = steps.error(make())
            base = rows[name[:6]]
            print(f"{name:52} {rows[name]:7.1%} {rows[name] / base - 1:+7.0%}", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
