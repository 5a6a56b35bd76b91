"""Accuracy of the nano model, by a checker that looks at pixels alone.

    python benchmarks/nano.py MODEL [--prompts 200] [--no-background] [--rows ROW ...]

Prompts are scenes with combinations of shape, colour and background that training never drew. `judge` finds the
background from the picture's border, then every coloured patch, its colour and the shape it fits best, and compares
with what the sentence said. It knows no network.
"""

import argparse
import functools
import itertools
import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_flux_krea.convert import convert
from mlx_flux_krea.convert.quantize import RECIPES, QuantizationRecipe, dequantize, group_of
from PIL import Image, ImageDraw
from tqdm import tqdm

from mlx_flux_krea import FluxPipeline
from mlx_flux_krea.models.config import Quantization
from mlx_flux_krea.nano import scenes
from mlx_flux_krea.weights import open_model

_PALETTE = np.array(list(scenes.COLOURS.values()), float)
_NAMES = list(scenes.COLOURS)
_SIDE = 48  # of a patch when its shape is compared


@dataclass(frozen=True)
class Seen:
    """A patch of the picture."""

    shape: str
    fit: float  # overlap with that shape, 0 to 1
    colour: str
    x: float  # middle of its box, in pixels
    y: float
    width: int
    height: int


def background(pixels: np.ndarray) -> np.ndarray:
    """The background of (H, W, 3) pixels as a straight line of colours from top to bottom, (H, 3)."""
    height, width, _ = pixels.shape
    edge = np.zeros((height, width), bool)
    edge[:2], edge[-2:], edge[:, :2], edge[:, -2:] = True, True, True, True
    rows, values = np.nonzero(edge)[0], pixels[edge].astype(float)
    keep = np.ones(len(rows), bool)
    for _ in range(3):
        line = np.polyfit(rows[keep], values[keep], 1)
        off = np.linalg.norm(values - rows[:, None] * line[0] - line[1], axis=1)
        keep = off <= max(np.percentile(off, 80), 6)
    return np.arange(height)[:, None] * line[0] + line[1]


def nearest(colour: np.ndarray) -> str:
    """The name of the colour closest to this one."""
    return _NAMES[int(np.linalg.norm(_PALETTE - colour, axis=1).argmin())]


def patches(mask: np.ndarray) -> list[np.ndarray]:
    """The connected parts of a mask, each a mask of its own; specks below 30 pixels are left out."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        best = np.max([padded[1 + y : padded.shape[0] - 1 + y, 1 + x : padded.shape[1] - 1 + x]
                       for y in (-1, 0, 1) for x in (-1, 0, 1)], axis=0)  # fmt: skip
        grown = np.where(mask, best, 0)
        if (grown == labels).all():
            break
        labels = grown
    numbers, sizes = np.unique(labels[labels > 0], return_counts=True)
    return [labels == n for n, size in zip(numbers, sizes, strict=True) if size >= 30]


@functools.cache
def _stencils() -> dict[str, np.ndarray]:
    made = {}
    for shape in (*scenes.SHAPES, *scenes.ADDED):
        picture = Image.new("L", (400, 400))
        scenes.outline(ImageDraw.Draw(picture), shape, 200, 200, 180)
        made[shape] = _fitted(np.array(picture) > 0)
    return made


def _fitted(mask: np.ndarray) -> np.ndarray:
    """The mask's box, stretched to the size that is compared; values in [0, 1]."""
    ys, xs = np.nonzero(mask)
    box = Image.fromarray((mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1] * 255).astype(np.uint8))
    return np.asarray(box.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR), float) / 255


def look(pixels: np.ndarray, shapes: Iterable[str] = scenes.SHAPES) -> list[Seen]:
    """Finds the things in front of the background of (H, W, 3) pixels, and the nearest of these shapes for each."""
    away = np.linalg.norm(pixels.astype(float) - background(pixels)[:, None], axis=2)
    seen = []
    for part in patches(away > 40):
        colour = np.median(pixels[part & (away >= np.median(away[part]) * 0.8)], axis=0)
        own = part & (np.linalg.norm(pixels - colour, axis=2) < np.maximum(away, 1))  # nearer to it than to the ground
        ys, xs = np.nonzero(own if own.sum() >= 20 else part)
        mask = _fitted(own if own.sum() >= 20 else part)
        stencils = {shape: _stencils()[shape] for shape in shapes}
        fits = {s: np.minimum(mask, t).sum() / np.maximum(mask, t).sum() for s, t in stencils.items()}
        shape = max(fits, key=fits.get)
        seen.append(
            Seen(shape, fits[shape], nearest(colour), (xs.min() + xs.max()) / 2, (ys.min() + ys.max()) / 2,
                 int(xs.max() - xs.min() + 1), int(ys.max() - ys.min() + 1))
        )  # fmt: skip
    return seen


def judge(pixels: np.ndarray, scene: scenes.Scene, shapes: Iterable[str] = scenes.SHAPES) -> list[str]:
    """Lists the faults of a picture of a scene that may hold these shapes; none: it is entirely right."""
    ground = background(pixels)
    faults = [
        f"background is {nearest(colour)} and not {name} at the {end}"
        for colour, name, end in zip((ground[0], ground[-1]), scene.background, ("top", "bottom"), strict=True)
        if nearest(colour) != name
    ]
    any_colour = "colour" in scene.unsaid
    seen = look(pixels, shapes)
    if len(seen) != len(scene.things):
        return [*faults, f"{len(seen)} things and not {len(scene.things)}"]

    def wrong(order) -> list[str]:
        return [
            f"a {s.colour} {s.shape} ({s.fit:.2f}) and not a {t.colour} {t.shape}"
            for s, t in zip(order, scene.things, strict=True)
            if (s.colour, s.shape) != (s.colour if any_colour else t.colour, t.shape)
            or s.fit < 0.6
            or not 0.7 < s.width / s.height < 1.43
        ]

    order = min(itertools.permutations(seen), key=lambda o: (len(wrong(o)), _misplaced(o, scene) is not None))
    faults += wrong(order)
    misplaced = _misplaced(order, scene)
    return faults + ([misplaced] if misplaced else [])


def _misplaced(seen, scene: scenes.Scene) -> str | None:
    xs, ys = [s.x / scene.width for s in seen], [s.y / scene.height for s in seen]
    if len(seen) == 1:
        if scene.where is None:
            return None
        wanted = scenes.PLACES[scene.where]
        right = all(
            (share < 0.48, 0.35 < share < 0.65, share > 0.52)[int(want * 2)]
            for share, want in zip((xs[0], ys[0]), wanted, strict=True)
        )
        return None if right else f"at {xs[0]:.2f}, {ys[0]:.2f} and not {scene.where}"
    if "place" in scene.unsaid:
        return None
    if len(seen) == 2:
        values, first = (xs if scene.where in ("left of", "right of") else ys), scene.where in ("left of", "above")
        return None if (values[0] < values[1]) == first else f"the first is not {scene.where} the second"
    if not xs[0] < xs[1]:
        return "the first is not left of the second"
    right = ys[2] < min(ys[:2]) if scene.where == "above" else ys[2] > max(ys[:2])
    return None if right else f"the third is not {scene.where}"


# --- the table ---


def scenes_to_judge(count: int, unsaid: tuple[str, ...] = ()) -> list[tuple[scenes.Scene, str]]:
    """Held-out scenes of one and two things in turn, each with a sentence that leaves out some of `scenes.UNSAID`."""
    rng = random.Random(0)
    drawn = [scenes.sample(rng, 1 + n % 2, held_out=True, unsaid=unsaid) for n in range(count)]
    return [(scene, scenes.describe(scene, rng)) for scene in drawn]


def rounded(
    source: Path,
    target: Path,
    chosen: QuantizationRecipe | dict[str, Quantization],
    changes: Mapping[str, mx.array] | None = None,
) -> Path:
    """A copy of a model folder, in float32, whose layers of some groups went through `mx.quantize` and back.

    Args:
        source: the folder.
        target: the copy.
        chosen: how each group is quantized.
        changes: matrices to add to weights by name, after which those of quantized layers are quantized again, as
            tools do that merge adapters into a quantized model.
    """
    if isinstance(chosen, QuantizationRecipe):
        chosen = {group: chosen.of(group) for group in RECIPES[chosen.quantize]}
    layers = {component: network.layers() for component, network in open_model(source).networks.items()}

    def value(component: str, name: str, stored: mx.array) -> mx.array:
        path = name.removesuffix(".weight")
        q = chosen.get(group_of(component, name)) if path in layers[component] and path != name else None
        array = requantized(stored, q) if q else stored.astype(mx.float32)
        if changes and name in changes:
            merged = (array + changes[name]).astype(stored.dtype)
            array = requantized(merged, q) if q else merged.astype(mx.float32)
        return array

    return replaced(source, target, value)


def replaced(source: Path, target: Path, value: Callable[[str, str, mx.array], mx.array]) -> Path:
    """A copy of a model folder, in float32, with other values.

    Args:
        source: the folder.
        target: the copy.
        value: from a component, a name and an array as it is stored, the array of the copy.
    """
    shutil.copytree(source, target)
    for component in open_model(target).networks:
        for path in sorted((target / component).glob("*.safetensors")):
            arrays = {n: value(component, n, stored) for n, stored in mx.load(str(path)).items()}
            mx.eval(arrays)
            mx.save_safetensors(str(path), {name: array.astype(mx.float32) for name, array in arrays.items()})
        config = target / component / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}))
    return target


def requantized(weight: mx.array, q: Quantization) -> mx.array:
    """The float32 values of a matrix that went through `mx.quantize`."""
    return dequantize(dict(zip(q.arrays, mx.quantize(weight, **q.packing), strict=True)), q)


def direct(model: Path, work: Path, recipe: QuantizationRecipe, folder: Path) -> float:
    """How far the converted model, computed from its packed weights, is from the rounded one, in final latents."""
    report = convert([model], work / f"direct-{folder.name}", quantize=recipe.quantize, group_size=_group(recipe))
    made = []
    for path in (report.path, folder):
        pipe = FluxPipeline.from_pretrained(path, dtype="float32")
        made.append(pipe(scenes_to_judge(2)[1][1], seed=0, num_inference_steps=8, output_type="latent").images)
    return (mx.linalg.norm(made[0] - made[1]) / mx.linalg.norm(made[1])).item()


def _group(recipe: QuantizationRecipe) -> int | None:
    return recipe.group_size if recipe.quantize.isdigit() else None


def measure(
    folder: Path, asked: list[tuple[scenes.Scene, str]], steps: int, dtype: str = "float32"
) -> dict[int, float]:
    """The share of pictures that are entirely right, by the number of things."""
    pipe = FluxPipeline.from_pretrained(folder, dtype=dtype)
    right, total = Counter(), Counter()
    for number, (scene, sentence) in enumerate(tqdm(asked, desc=f"{folder.name}, {steps} steps", leave=False)):
        image = pipe(sentence, seed=number, num_inference_steps=steps, guidance_scale=4.5).images[0]
        total[len(scene.things)] += 1
        right[len(scene.things)] += not judge(np.array(image), scene)
    return {things: right[things] / total[things] for things in sorted(total)}


def save_grid(pictures: np.ndarray, path: Path) -> None:
    """Writes pictures (rows, columns, H, W, 3) uint8 as one, with white between them."""
    framed = np.pad(pictures, ((0, 0), (0, 0), (2, 2), (2, 2), (0, 0)), constant_values=255)
    Image.fromarray(np.concatenate(np.concatenate(framed, 1), 1)).save(path, optimize=True)


def reconstruction(folder: Path, count: int = 200) -> float:
    """Mean PSNR in dB of held-out scenes through encoder and decoder."""
    vae = FluxPipeline.from_pretrained(folder, dtype="float32").vae
    ratios = []
    for scene, _ in scenes_to_judge(count):
        pixels = np.asarray(scenes.draw(scene), np.float32) / 127.5 - 1
        mean, _ = vae.encode(mx.array(pixels)[None])
        made = np.array(vae.decode(mean))[0].clip(-1, 1)
        ratios.append(10 * np.log10(4 / np.mean((made - pixels) ** 2)))
    return float(np.mean(ratios))


WIDTHS = [("bf16", None)]
WIDTHS += [
    (f"{bits} bit, groups of {size}", QuantizationRecipe(str(bits), size))
    for bits in (8, 6, 5, 4, 3)
    for size in (32, 64, 128)
]
WIDTHS += [("mxfp4", QuantizationRecipe("mxfp4")), ("nvfp4", QuantizationRecipe("nvfp4"))]


def main() -> None:
    """Prints the table of widths and of steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--no-background", action="store_true", help="Ask with sentences that name no background.")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="Rows of the table by name; default: all.")
    parser.add_argument("model", type=Path, help="Model folder: WORK/export/model of nano/train.py.")
    given = parser.parse_args()
    asked = scenes_to_judge(given.prompts, ("background",) if given.no_background else ())
    print(f"reconstruction of held-out scenes: {reconstruction(given.model):.1f} dB")
    print(f"{'':24}one thing   two things   ({given.prompts} prompts, guidance 4.5)")

    rows = {}

    def row(label: str, shares: dict[int, float]) -> None:
        rows[label] = shares
        print(f"{label:24}{shares[1]:9.1%}{shares[2]:13.1%}", flush=True)

    with tempfile.TemporaryDirectory() as work:
        for label, how in WIDTHS:
            if given.rows and label not in given.rows:
                continue
            folder = rounded(given.model, Path(work) / label, how) if how else given.model
            row(label, measure(folder, asked, 28))
            if how:
                print(f"{'':24}computed from {label}: {direct(given.model, Path(work), how, folder):.1e} away")
        for steps in (50, 20, 12, 8, 4):
            label = f"bf16, {steps} steps"
            if not given.rows or label in given.rows:
                row(label, measure(given.model, asked, steps))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
