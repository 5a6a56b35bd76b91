"""Solvers, schedules and step caches at the same number of evaluations, on the small model: the evidence for `--fast`.

    python benchmarks/evaluations.py [--prompts 200] [--record FILE] [--sheet FILE]

Prompts are scenes with combinations of shape, colour and background that training never drew; each has a seed of its
own, and all modes draw the same ones. The yardstick is the solution of the flow in 200 steps of Euler's method: how far
the final latents of a mode are from its, relative to their length, and how near the picture is (PSNR and SSIM). The bar
is the distance of the usual 28 steps. Intervals are of 95 %, from prompts drawn again with replacement, the same ones
for a mode and for the bar. Thresholds of first-block are found on other prompts, so that about as many steps are
computed as the row says.

`--record` keeps the figures of each prompt, one line of JSON a prompt: started again with it, the benchmark goes on,
and with as many prompts as the file has, it prints the table alone.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from nano import judge, save_grid, scenes_to_judge
from tqdm import tqdm

from mlx_flux_krea import FluxPipeline, nano
from mlx_flux_krea.nano import scenes
from mlx_flux_krea.sampling.rules import skip_steps

Call = Mapping[str, Any]  # arguments of the pipeline
COUNTS = 10, 14, 20
YARDSTICK, BAR = "200 steps", "28 steps"
SHEET = YARDSTICK, BAR, "16, skip", "14, skip, dpmpp_2m, beta", "14, Euler", "10, dpmpp_2m, beta", "10, Euler"
_DRAWS = 2000  # of prompts, for an interval
_CALIBRATION = 12  # prompts that thresholds are found on


def skipping(evaluations: int, **more: Any) -> Call:
    """Returns the call whose static skip computes so many steps."""
    longest = max(steps for steps in range(1, 100) if len(skip_steps(steps)) == evaluations)
    return {"num_inference_steps": longest, "cache": "skip", **more}


def plain(evaluations: int, **more: Any) -> Call:
    """Returns the call that computes each of so many steps."""
    return {"num_inference_steps": evaluations, **more}


MODES: dict[str, Callable[[int], Call]] = {
    "Euler": plain,
    "Euler, beta": partial(plain, schedule="beta"),
    "Euler, simple": partial(plain, schedule="simple"),
    "dpmpp_2m": partial(plain, solver="dpmpp_2m"),
    "dpmpp_2m, beta": partial(plain, solver="dpmpp_2m", schedule="beta"),
    "heun": lambda evaluations: {"num_inference_steps": (evaluations + 1) // 2, "solver": "heun"},
    "skip": skipping,
    "skip, beta": partial(skipping, schedule="beta"),
    "skip, dpmpp_2m": partial(skipping, solver="dpmpp_2m"),
    "skip, dpmpp_2m, beta": partial(skipping, solver="dpmpp_2m", schedule="beta"),
}


def thresholds(pipe: FluxPipeline) -> dict[int, float]:
    """Returns the threshold of first-block that computes about so many of 28 steps, for each number compared."""
    asked = [sentence for _, sentence in scenes_to_judge(200 + _CALIBRATION)[-_CALIBRATION:]]

    def computed(threshold: float) -> float:
        call = plain(28, cache=f"first-block:{threshold}", output_type="latent", progress=False)
        made = [pipe(text, seed=1000 + n, **call) for n, text in enumerate(asked)]
        return float(np.mean([len(result.steps_computed[0]) for result in made]))

    found = {}
    for count in COUNTS:
        low, high = 0.001, 0.9
        for _ in range(8):
            middle = round((low * high) ** 0.5, 4)
            low, high = (middle, high) if computed(middle) > count else (low, middle)
        found[count] = middle
    return found


def calls(pipe: FluxPipeline) -> dict[str, Call]:
    """Returns all calls by the name of their row, yardstick and bar first."""
    made: dict[str, Call] = {
        YARDSTICK: plain(200),
        BAR: plain(28),
        "28, dpmpp_2m, beta": plain(28, solver="dpmpp_2m", schedule="beta"),
        "16, skip": plain(28, cache="skip"),
    }
    for count in COUNTS:
        made |= {f"{count}, {name}": mode(count) for name, mode in MODES.items()}
    for count, threshold in thresholds(pipe).items():
        made[f"{count}, first-block"] = plain(28, cache=f"first-block:{threshold}")
        made[f"{count}, first-block, order 1"] = plain(28, cache=f"first-block:{threshold}:1")
    return made


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the mean structural similarity of two pictures' lightness (Wang et al. 2004): windows of 11, sigma 1.5.

    Args:
        a: bytes (H, W, 3).
        b: bytes (H, W, 3).
    """
    weights = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights /= weights.sum()

    def blurred(x: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            x = np.apply_along_axis(np.convolve, axis, x, weights, mode="valid")
        return x

    x, y = (pixels.astype(float) @ (0.299, 0.587, 0.114) for pixels in (a, b))
    mx_, my = blurred(x), blurred(y)
    vx, vy, both = blurred(x * x) - mx_**2, blurred(y * y) - my**2, blurred(x * y) - mx_ * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float((((2 * mx_ * my + c1) * (2 * both + c2)) / ((mx_**2 + my**2 + c1) * (vx + vy + c2))).mean())


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the ratio of two pictures' peak to their difference in dB, 99 at most."""
    return float(min(99, 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9))))


def drawn(pipe: FluxPipeline, sentence: str, seed: int, call: Call) -> tuple[np.ndarray, mx.array, int]:
    """Returns the picture's pixels, its final latents and the number of evaluations."""
    last: dict[str, mx.array] = {}
    made = pipe(
        sentence, seed=seed, progress=False, callback_on_step_end=lambda _, __, ___, kept: last.update(kept), **call
    )
    return np.array(made.images[0]), last["latents"], made.records[0]["evaluations"]


def compare(pipe: FluxPipeline, scene: scenes.Scene, sentence: str, seed: int, asked: Mapping[str, Call]) -> dict:
    """Returns the figures of each row for one prompt."""
    figures, exact, usual = {}, None, None
    for name, call in asked.items():
        pixels, latents, evaluations = drawn(pipe, sentence, seed, call)
        exact = exact or (pixels, latents)
        usual = pixels if name == BAR else usual
        figures[name] = {
            "evaluations": evaluations,
            "distance": (mx.linalg.norm(latents - exact[1]) / mx.linalg.norm(exact[1])).item(),
            "psnr": psnr(pixels, exact[0]),
            "ssim": ssim(pixels, exact[0]),
            "from usual": psnr(pixels, usual) if usual is not None else None,
            "right": not judge(pixels, scene),
        }
    return figures


# --- the tables ---


def worst_tenth(values: np.ndarray) -> np.ndarray:
    """Returns the mean of the largest tenth of values (..., N)."""
    return np.sort(values, axis=-1)[..., -max(values.shape[-1] // 10, 1) :].mean(axis=-1)


def summary(records: Sequence[dict], name: str) -> dict:
    """Returns the figures of a row over all prompts, with intervals and the difference from the bar."""
    distances = {row: np.array([r[row]["distance"] for r in records]) for row in (name, BAR)}
    again = np.random.default_rng(0).integers(len(records), size=(_DRAWS, len(records)))
    found: dict = {}
    for label, statistic in (("median", partial(np.median, axis=-1)), ("worst tenth", worst_tenth)):
        own, bar = (statistic(distances[row][again]) for row in (name, BAR))
        found[label] = [float(statistic(distances[name])), *np.percentile(own, (2.5, 97.5)).tolist()]
        found[f"{label}, from the bar"] = np.percentile(own - bar, (2.5, 97.5)).tolist()
    for label in ("evaluations", "ssim", "right"):
        found[label] = float(np.mean([r[name][label] for r in records]))
    for label in ("psnr", "from usual"):
        values = [r[name][label] for r in records if r[name][label] is not None]
        found[label] = [float(np.median(values)), float(min(values))] if values else None
    return found


def verdict(found: dict) -> str:
    """Says how a row's distances compare with the bar's, by their intervals."""
    words = []
    for label in ("median", "worst tenth"):
        low, high = found[f"{label}, from the bar"]
        words.append("nearer" if high < 0 else "farther" if low > 0 else "as far")
    return words[0] if words[0] == words[1] else " / ".join(words)


def table(records: Sequence[dict]) -> None:
    """Prints the table."""
    rows = {name: summary(records, name) for name in records[0] if name != YARDSTICK}
    print(
        "| mode | evaluations | distance: median | worst tenth | than 28 steps | PSNR | SSIM | right | from 28 steps |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, found in rows.items():
        cells = [
            f"{value:.4f} ({low:.4f} to {high:.4f})" for value, low, high in (found["median"], found["worst tenth"])
        ]
        usual = "" if name == BAR or not found["from usual"] else "{:.1f} ({:.1f})".format(*found["from usual"])
        cells += ["" if name == BAR else verdict(found), "{:.1f} ({:.1f})".format(*found["psnr"])]
        cells += [f"{found['ssim']:.4f}", f"{found['right']:.1%}", usual]
        print(f"| {name} | {found['evaluations']:.1f} | {' | '.join(cells)} |")


def sheet(pipe: FluxPipeline, records: Sequence[dict], path: Path, columns: Sequence[str], asked: Mapping[str, Call]):
    """Writes pictures of four prompts, one row each: from the nearest to the farthest of the bar's distances."""
    order = np.argsort([r[BAR]["distance"] for r in records])
    numbers = [int(order[round(share * (len(order) - 1))]) for share in (0.5, 0.9, 0.97, 1)]
    prompts = scenes_to_judge(len(records))
    rows = [[drawn(pipe, prompts[n][1], n, asked[name])[0] for name in columns] for n in numbers]
    save_grid(np.array(rows), path)
    for n in numbers:
        print(f"{prompts[n][1]}: " + ", ".join(f"{name} {records[n][name]['distance']:.3f}" for name in columns))


def main() -> None:
    """Prints the table, and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--record", type=Path, help="File that keeps the figures of each prompt.")
    parser.add_argument("--sheet", type=Path, help="Picture to write beside the table.")
    given = parser.parse_args()
    pipe = FluxPipeline.from_pretrained(nano.FOLDER, dtype="float32")
    head, *records = _read(given.record) or [calls(pipe)]
    asked = head
    for number, (scene, sentence) in enumerate(tqdm(scenes_to_judge(given.prompts), desc="prompts")):
        if number == len(records):
            records.append(compare(pipe, scene, sentence, number, asked))
            if given.record:
                given.record.write_text("".join(json.dumps(line) + "\n" for line in (head, *records)))
    table(records)
    if given.sheet:
        sheet(pipe, records, given.sheet, SHEET, asked)


def _read(path: Path | None) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []


if __name__ == "__main__":
    main()
