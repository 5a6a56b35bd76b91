"""Error of each group of layers in fewer bits, on trained weights: the evidence behind `convert.quantize.RECIPES`.

    python benchmarks/recipes.py [MODEL] [--prompts 8]

One group of layers at a time goes through `mx.quantize` and back, all others stay as they are, and the same prompts and
seeds are drawn in float32. A cell is the relative error of the final latents against those of the unrounded model: what
the rounding does to a picture, all steps and both encoders included. Below stand whole recipes, as `convert -q` has
them, and in the last column what is left of the error of recipe 4 if the group alone is raised to 8 bits.
"""

import argparse
import json
import tempfile
from pathlib import Path

import mlx.core as mx
from mlx_flux_krea.convert.quantize import GROUPS, RECIPES, group_of
from nano import rounded, scenes_to_judge
from tqdm import tqdm

from mlx_flux_krea import FluxPipeline, nano
from mlx_flux_krea.models.config import Quantization
from mlx_flux_krea.weights import open_model

WIDTHS = {str(bits): Quantization(bits, 64) for bits in (8, 6, 5, 4, 3)}
WIDTHS |= {"mxfp4": Quantization(4, 32, "mxfp4"), "nvfp4": Quantization(4, 16, "nvfp4")}
STEPS = 12


def final_latents(folder: Path, prompts: list[str]) -> mx.array:
    """(B, L, 64) of one picture of each prompt."""
    pipe = FluxPipeline.from_pretrained(folder, dtype="float32")
    drawn = [pipe(p, seed=n, num_inference_steps=STEPS, output_type="latent").images for n, p in enumerate(prompts)]
    return mx.concatenate(drawn)


def parameters(folder: Path) -> dict[str, int]:
    """Counts the weights in each group of layers that can be quantized."""
    counts, model = {}, open_model(folder)
    for component, network in model.networks.items():
        found = network.tensors()
        for path in network.layers():
            rows, width = found[f"{path}.weight"][1].shape
            group = group_of(component, f"{path}.weight")
            counts[group] = counts.get(group, 0) + rows * width
    return counts


def main() -> None:
    """Prints the table, worst first, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=nano.FOLDER)
    parser.add_argument("--prompts", type=int, default=8)
    given = parser.parse_args()
    prompts = [sentence for _, sentence in scenes_to_judge(given.prompts)]
    exact, counts = final_latents(given.model, prompts), parameters(given.model)
    groups = [g for g in dict.fromkeys(group for c, group, _ in GROUPS if c != "vae") if g in counts]  # it comes later

    def error(chosen: dict[str, Quantization]) -> float:
        with tempfile.TemporaryDirectory() as work:
            made = final_latents(rounded(given.model, Path(work) / "model", chosen), prompts)
        return (mx.linalg.norm(made - exact) / mx.linalg.norm(exact)).item()

    cells = [({group: q}, group, width) for group in groups for width, q in WIDTHS.items()]
    cells += [({g: q for g, q in row.items() if g in counts}, "recipe", width) for width, row in RECIPES.items()]
    table: dict[str, dict[str, float]] = {}
    for chosen, group, width in tqdm(cells, desc="rounding", leave=False):
        if width != "none":
            table.setdefault(group, {})[width] = error(chosen)
    four = {group: q for group, q in RECIPES["4"].items() if group in counts}
    for group in tqdm(groups, desc="raising", leave=False):
        table[group]["4, raised"] = error(four | {group: WIDTHS["8"]}) if group in four else table["recipe"]["4"]
    table["recipe"]["4, raised"] = table["recipe"]["4"]
    columns = [*WIDTHS, "4, raised"]
    print(f"{'':26}{'share':>7}" + "".join(f"{column:>10}" for column in columns))
    for group in [*sorted(groups, key=lambda g: -table[g]["4"]), "recipe"]:
        share = counts.get(group, 0) / sum(counts.values())
        label = "the recipe of that name" if group == "recipe" else group
        print(f"{label:26}{share or 1:7.1%}" + "".join(f"{table[group][column]:10.2%}" for column in columns))
    print(json.dumps(table))


if __name__ == "__main__":
    main()
