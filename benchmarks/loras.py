"""The LoRAs of the small model, by the judge of pixels: their weights, both at once, and bases of fewer bits.

    python benchmarks/loras.py [--prompts 24] [--steps 8] [--table weights|bits] [--sheet FILE]

One adds hearts, the other lets plain backgrounds fade to black (`mlx_flux_krea/nano/train_lora.py`). Sentences are
about hearts and about shapes that the small model knows, all with combinations of shape, colour and background that
training never drew. Each picture is judged twice: with the background that its sentence says, and with that at dusk.

Bases of fewer bits have an adapter beside them, as it runs here, or merged into them: the quantized matrix and the
change are added, and quantized again. Distances are those of final latents from the unquantized model with the adapter.
"""

import argparse
import json
import os
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_flux_krea.convert.quantize import QuantizationRecipe
from nano import background, judge, rounded, save_grid

from mlx_flux_krea import FluxPipeline, nano
from mlx_flux_krea.adapters.parts import Facts
from mlx_flux_krea.adapters.reading import read
from mlx_flux_krea.nano import scenes
from mlx_flux_krea.weights import layer_shapes, open_model

FILES = {name: Path(__file__).parents[1] / f"tests/data/adapters/{name}.safetensors" for name in ("heart", "dusk")}
WEIGHTS: list[dict[str, float]] = [
    {}, *({name: weight} for name in FILES for weight in (0.5, 0.75, 1)),
    *({"heart": weight, "dusk": weight} for weight in (0.75, 1)),
]  # fmt: skip
SHAPES = (*scenes.SHAPES, *scenes.ADDED)
BITS = ("8", "4", "3")
SHEET = ("a large red heart on a yellow background", "a white heart to the left of a blue star on a green background",
         "a pink circle on a blue background")  # fmt: skip

Asked = Sequence[tuple[scenes.Scene, str]]


def asked(hearts: bool, count: int) -> Asked:
    """Returns held-out scenes on plain backgrounds but black, of one and two things in turn, with their sentences."""
    rng, drawn = random.Random(f"hearts {hearts}"), []
    while len(drawn) < count:
        shapes = (*SHAPES, *scenes.ADDED * 5) if hearts else scenes.SHAPES
        scene = scenes.sample(rng, 1 + len(drawn) % 2, held_out=True, shapes=shapes)
        plain = scene.background[0] == scene.background[1] != "black"
        clear = all(scenes.stands_out(thing.colour, at_dusk(scene).background) for thing in scene.things)
        has_one = any(thing.shape in scenes.ADDED for thing in scene.things)
        if plain and clear and has_one is hearts:
            drawn.append((scene, scenes.describe(scene, rng)))
    return drawn


def at_dusk(scene: scenes.Scene) -> scenes.Scene:
    """Returns the scene as the second LoRA draws it."""
    return replace(scene, background=(scene.background[0], "black"))


def loaded(folder: Path) -> FluxPipeline:
    """Returns a pipeline with both LoRAs."""
    pipe = FluxPipeline.from_pretrained(folder, dtype="float32")
    for name, path in FILES.items():
        pipe.load_lora_weights(path, adapter_name=name)
    return pipe


def drawn(
    pipe: FluxPipeline, weights: Mapping[str, float], sentences: Sequence[str], steps: int
) -> tuple[list[np.ndarray], mx.array]:
    """Returns the pixels of each sentence, with a seed of its own, and all final latents (N, L, 64)."""
    pipe.set_adapters(list(weights), list(weights.values()))
    pixels, latents, last = [], [], {}
    for n, text in enumerate(sentences):
        call = {"num_inference_steps": steps, "progress": False}
        made = pipe(text, seed=n, callback_on_step_end=lambda _, __, ___, kept: last.update(kept), **call)
        pixels.append(np.array(made.images[0]))
        latents.append(last["latents"])
    return pixels, mx.concatenate(latents)


def share(made: Sequence[np.ndarray], scenes_: Sequence[scenes.Scene]) -> float:
    """Returns the share of pictures that are entirely right."""
    return float(np.mean([not judge(pixels, scene, SHAPES) for pixels, scene in zip(made, scenes_, strict=True)]))


def darkness(made: Sequence[np.ndarray], scenes_: Sequence[scenes.Scene]) -> float:
    """Returns how far the lower edge of the background is from its colour to black, 0 to 1, on average."""
    black, shares = np.array(scenes.COLOURS["black"], float), []
    for pixels, scene in zip(made, scenes_, strict=True):
        whole = black - np.array(scenes.COLOURS[scene.background[0]], float)
        way = background(pixels)[-1] - scenes.COLOURS[scene.background[0]]
        shares.append(way @ whole / max(whole @ whole, 1))
    return float(np.mean(shares))


def table_of_weights(count: int, steps: int) -> list[dict]:
    """Prints what each choice of weights draws."""
    sets, rows = {kind: asked(kind == "hearts", count) for kind in ("hearts", "known shapes")}, []
    pipe, plain = loaded(nano.FOLDER), {}
    heads = [f"{kind}, {how}" for kind in sets for how in ("as told", "at dusk", "changed", "fading")]
    print(f"| weights | {' | '.join(heads)} |\n{'|---' * 9}|")
    for weights in WEIGHTS:
        row: dict = {"weights": weights}
        for kind, some in sets.items():
            told = [scene for scene, _ in some]
            made, _ = drawn(pipe, weights, [text for _, text in some], steps)
            before = plain.setdefault(kind, made)
            changed = np.mean([np.abs(a.astype(int) - b) for a, b in zip(made, before, strict=True)])
            right = share(made, told), share(made, [at_dusk(scene) for scene in told])
            row[kind] = [*right, float(changed), darkness(made, told)]
        rows.append(row)
        label = " and ".join(f"{name} {weight:g}" for name, weight in weights.items()) or "none"
        cells = (
            f"{100 * a:.0f} % | {100 * b:.0f} % | {c:.1f} | {d:.2f}" for a, b, c, d in (row[kind] for kind in sets)
        )
        print(f"| {label} | {' | '.join(cells)} |", flush=True)
    return rows


def changes(name: str) -> dict[str, mx.array]:
    """Returns the matrices that a LoRA adds, by the names of the weights."""
    sizes, found = open_model(nano.FOLDER).sizes, {}
    shapes = layer_shapes("transformer", sizes.flux)
    for part in read(FILES[name], sizes, Facts(name, name, "")).parts:
        down, up = (part.arrays[factor].astype(mx.float32) for factor in ("down", "up"))
        change = found.setdefault(f"{part.target.path}.weight", mx.zeros(shapes[part.target.path]))
        change[part.target.start : part.target.stop] += up @ down
    return found


def table_of_bits(count: int, steps: int) -> list[dict]:
    """Prints bases of fewer bits with a branch, and with the LoRA merged into them."""
    subjects = {"heart": asked(True, count), "dusk": [(at_dusk(scene), text) for scene, text in asked(False, count)]}
    rows, wanted = [], {}

    def row(label: str, pipes: Mapping[str, FluxPipeline], weight: float) -> None:
        numbers: dict = {"base": label}
        for name, some in subjects.items():
            pixels, latents = drawn(pipes[name], {name: weight}, [text for _, text in some], steps)
            exact = wanted.setdefault(name, latents)  # of the first row
            distance = (mx.linalg.norm(latents - exact) / mx.linalg.norm(exact)).item()
            numbers[name] = [share(pixels, [scene for scene, _ in some]), distance]
        rows.append(numbers)
        cells = [f"{100 * value:.0f} %" for name in subjects for value in numbers[name]]
        print(f"| {label} | {' | '.join(cells)} |", flush=True)

    print("| base | heart: right | latents away | dusk: right | latents away |\n|---|---|---|---|---|")
    row("not quantized", dict.fromkeys(subjects, loaded(nano.FOLDER)), 1)
    with tempfile.TemporaryDirectory() as work:
        for bits in BITS:
            recipe, place = QuantizationRecipe(bits), Path(work)
            row(f"{bits} bits, beside", dict.fromkeys(subjects, loaded(rounded(nano.FOLDER, place / bits, recipe))), 1)
            merged = {name: rounded(nano.FOLDER, place / f"{bits} {name}", recipe, changes(name)) for name in subjects}
            row(f"{bits} bits, merged", {name: loaded(folder) for name, folder in merged.items()}, 0)
    return rows


TABLES = {"weights": table_of_weights, "bits": table_of_bits}


def sheet(path: Path, steps: int) -> None:
    """Writes pictures of three sentences, one row each, with each choice of weights."""
    pipe = loaded(nano.FOLDER)
    columns = [np.stack(drawn(pipe, weights, SHEET, steps)[0]) for weights in WEIGHTS]
    save_grid(np.stack(columns, 1), path)


def main() -> None:
    """Prints both tables and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=24, help="Sentences of each kind.")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--table", choices=TABLES, help="The one to print; default: both.")
    parser.add_argument("--sheet", type=Path, help="Picture to write instead.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        os.environ["FLUX_KREA_HOME"] = home  # where adapters that are used are installed
        if given.sheet:
            sheet(given.sheet, given.steps)
            return
        chosen = [given.table] if given.table else list(TABLES)
        print(json.dumps({name: TABLES[name](given.prompts, given.steps) for name in chosen}))


if __name__ == "__main__":
    main()
