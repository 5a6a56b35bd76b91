"""Large pictures on the small model, which knows one size: direct, in two passes and in tiles: the evidence.

    python benchmarks/large.py [--times 2] [--prompts 24] [--steps 12] [--record FILE] [--sheet FILE]

Prompts are scenes with combinations of shape, colour and background that training never drew. Each is drawn at the
model's own size, as a first pass that is entirely right, and at the larger size, as what enlarging should give: so the
rows measure the second pass alone. "direct" asks for the larger picture at once, "from text" makes both passes. What
is right is judged on the picture brought back to the model's own size, by benchmarks/nano.py; things are counted at
twice that size, so small ones that were repeated count too. "edges" is the mean of the steepest hundredth of
its slopes, in levels a pixel, and PSNR is that from the drawing at the larger size. Intervals are of 95 %, of the mean
difference from the row "two passes", from prompts drawn again with replacement.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from nano import judge, look, scenes_to_judge
from PIL import Image
from tqdm import tqdm

from mlx_flux_krea import FluxPipeline, Request, nano
from mlx_flux_krea.nano import scenes
from mlx_flux_krea.sampling import enlarge

BAR = "two passes"
# Rows: arguments of the call, changes of the recipe, and if the drawing is the first pass.
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "direct": ({}, {}, False),
    "from text": ({"upscale_tiles": False}, {}, False),
    BAR: ({"upscale_tiles": False}, {}, True),
    "tiles": ({"upscale_tiles": True}, {}, True),
    "without guidance": ({"upscale_tiles": False}, {"guidance": 0.0}, True),
    "tiles without guidance": ({"upscale_tiles": True}, {"guidance": 0.0}, True),
    "without the shifted grid": ({"upscale_tiles": False}, {"shifts": False}, True),
    "strength 0.5": ({"upscale_tiles": False, "strength": 0.5}, {}, True),
}
PLAIN = ("Lanczos", "Lanczos, through the autoencoder", "drawn")
FIGURES = ("right", "counted", "edges", "psnr")


def made(pipe: FluxPipeline, name: str, scene: scenes.Scene, sentence: str, seed: int, times: int, steps: int) -> Any:
    """Returns the pixels of a row's picture, or None where there is nothing to denoise."""
    call, changes, is_drawn = ROWS[name]
    size = {"width": scene.width * times, "height": scene.height * times}
    if name != "direct":
        size = {"upscale": times} | ({} if is_drawn else {"width": scene.width, "height": scene.height})
    if is_drawn:
        call = call | {"image": scenes.draw(scene)}
    before, enlarge.RECIPE = enlarge.RECIPE, replace(enlarge.RECIPE, **changes)
    try:
        request = Request(prompt=sentence, seed=seed, num_inference_steps=steps, **size, **call)
        return np.array(pipe.generate(request, progress=False).images[0])
    finally:
        enlarge.RECIPE = before


def plain(pipe: FluxPipeline, name: str, scene: scenes.Scene, times: int) -> np.ndarray:
    """Returns the pixels of a row that nothing denoises."""
    if name == "drawn":
        return np.array(scenes.draw(scene, times))
    small = scenes.draw(scene)
    pixels = np.array(small.resize((small.width * times, small.height * times), Image.Resampling.LANCZOS))
    if name == "Lanczos":
        return pixels
    mean, _ = pipe.vae.encode(mx.array(pixels.astype(np.float32) / 127.5 - 1)[None])
    decoded = np.array(pipe.vae.decode(mean))[0]
    return np.clip(np.round(decoded * 127.5 + 127.5), 0, 255).astype(np.uint8)


def edges(pixels: np.ndarray) -> float:
    """Returns the mean of the steepest hundredth of the slopes of (H, W, 3) pixels, in levels a pixel."""
    slopes = np.hypot(*np.gradient(pixels.astype(float).mean(axis=2))).reshape(-1)
    return float(np.sort(slopes)[-(slopes.size // 100) :].mean())


def figures(pixels: np.ndarray, scene: scenes.Scene, times: int) -> dict[str, float]:
    """Returns the figures of one picture."""
    small, middle = (
        np.asarray(Image.fromarray(pixels).resize((scene.width * n, scene.height * n), Image.Resampling.BOX))
        for n in (1, 2)
    )
    truth = np.asarray(scenes.draw(scene, times), float)
    return {
        "right": float(not judge(small, scene)),
        "counted": float(len(look(middle)) == len(scene.things)),
        "edges": edges(pixels),
        "psnr": float(min(99, 10 * np.log10(255**2 / max(np.mean((pixels - truth) ** 2), 1e-9)))),
    }


def table(records: Sequence[Mapping[str, Mapping[str, float]]]) -> None:
    """Prints the table."""
    again = np.random.default_rng(0).integers(len(records), size=(2000, len(records)))
    print("| way | right | things counted right | edges | PSNR, dB | from two passes |")
    print("|---|---|---|---|---|---|")
    for name in records[0]:
        means = {key: np.mean([r[name][key] for r in records]) for key in FIGURES}
        difference = np.array([r[name]["psnr"] - r[BAR]["psnr"] for r in records])
        low, high = np.percentile(difference[again].mean(axis=1), (2.5, 97.5))
        shown = "" if name in (BAR, "drawn") else f"{difference.mean():+.1f} ({low:+.1f} to {high:+.1f})"
        cells = [f"{means['right']:.0%}", f"{means['counted']:.0%}", f"{means['edges']:.1f}"]
        cells += ["" if name == "drawn" else f"{means['psnr']:.1f}", shown]
        print(f"| {name} | {' | '.join(cells)} |")


def sheet(pipe: FluxPipeline, path: Path, times: int, steps: int, columns: Sequence[str], numbers: Sequence[int]):
    """Writes pictures of some prompts, one row each."""
    prompts = scenes_to_judge(max(numbers) + 1)
    rows = []
    for number in numbers:
        scene, sentence = prompts[number]
        asked = sentence, number, times, steps
        parts: list[np.ndarray] = [
            plain(pipe, name, scene, times) if name in PLAIN else made(pipe, name, scene, *asked) for name in columns
        ]
        rows.append(np.concatenate([np.pad(part, ((2, 2), (2, 2), (0, 0)), constant_values=255) for part in parts], 1))
    Image.fromarray(np.concatenate(rows)).quantize(128).save(path, optimize=True)


def main() -> None:
    """Prints the table, and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="Rows of the table by name; default: all.")
    parser.add_argument("--record", type=Path, help="File that keeps the figures of each prompt.")
    parser.add_argument("--sheet", type=Path, help="Picture to write, instead of the table.")
    given = parser.parse_args()
    pipe = FluxPipeline.from_pretrained(nano.FOLDER, dtype="float32")
    if given.sheet:
        columns = ("direct", "Lanczos", "without guidance", BAR, "tiles")
        sheet(pipe, given.sheet, given.times, given.steps, columns, (0, 1, 3))
        return
    names = [name for name in (*PLAIN, *ROWS) if not given.rows or name in given.rows or name == BAR]
    record: Path | None = given.record
    kept = record.read_text().splitlines() if record and record.exists() else []
    records = [json.loads(line) for line in kept]
    for number, (scene, sentence) in enumerate(tqdm(scenes_to_judge(given.prompts), desc="prompts")):
        if number < len(records):
            continue
        found = {}
        for name in names:
            arguments = pipe, name, scene
            picture = (
                plain(*arguments, given.times)
                if name in PLAIN
                else made(*arguments, sentence, number, given.times, given.steps)
            )
            found[name] = figures(picture, scene, given.times)
        records.append(found)
        if given.record:
            given.record.write_text("".join(json.dumps(line) + "\n" for line in records))
    table(records)


if __name__ == "__main__":
    main()
