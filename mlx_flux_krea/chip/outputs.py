"""The small model's latents and picture, in every type, against those stored in `outputs.safetensors`.

The file holds latents and picture of a run in float32, of the small model as it is and in 8 and 4 bits, and in its
metadata the distances from them that the other types may have: twice those measured with MLX on a CPU, where products
of 16 bits are summed in float32 as on a GPU. `python benchmarks/chip.py` writes it.
"""

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flux_krea.convert import convert

from ..home import NANO
from ..pipeline import FluxPipeline
from .check import CheckResult, Setting, as_numpy, distance

FILE = Path(__file__).with_name("outputs.safetensors")
PROMPT = "a large yellow star above a small pink ring on a purple background"
SHAPE: dict[str, Any] = {"width": 96, "height": 64, "num_inference_steps": 3, "seed": 1}
# By name: bits of the large layers ("none": 16), and the compute type.
KINDS = {
    "float32": ("none", "float32"),
    "bfloat16": ("none", "bfloat16"),
    "float16": ("none", "float16"),
    "8 bits": ("8", "bfloat16"),
    "4 bits": ("4", "bfloat16"),
}
EXACT = (1e-5, 1.0)  # bounds in float32: distance of the latents, and levels of 255 of the picture


@dataclass(frozen=True)
class SmallRun:
    """A run of the small model.

    Attributes:
        latents: (1, L, 64) float32.
        picture: (H, W, 3) uint8.
    """

    latents: np.ndarray
    picture: np.ndarray

    def errors(self, exact: "SmallRun") -> tuple[float, float, float]:
        """Returns the distance of the latents, and the largest and the root-mean-square difference in levels."""
        if self.picture.shape != exact.picture.shape:
            return math.inf, math.inf, math.inf
        levels = np.abs(self.picture.astype(float) - exact.picture)
        return distance(self.latents, exact.latents), float(levels.max()), float(np.sqrt(np.square(levels).mean()))


def run(bits: str, dtype: str) -> SmallRun:
    """Runs the small model, converted to so many bits, in a compute type."""
    with tempfile.TemporaryDirectory() as folder:
        model = NANO if bits == "none" else convert([NANO], Path(folder) / "small", quantize=bits).path
        seen: dict[str, mx.array] = {}

        def keep(pipe: Any, step: int, timestep: Any, arrays: dict) -> None:
            seen.update(arrays)

        pipe = FluxPipeline.from_pretrained(model, dtype=dtype)
        result = pipe(PROMPT, progress=False, callback_on_step_end=keep, **SHAPE)
        return SmallRun(as_numpy(seen["latents"]), np.asarray(result.images[0]))


def stored() -> tuple[dict[str, SmallRun], dict[str, tuple[float, float]]]:
    """Returns the stored runs by bits, and the bounds of each kind."""
    loaded: Any = mx.load(str(FILE), return_metadata=True)  # its stubs say one dict
    arrays, metadata = loaded
    runs = {
        bits: SmallRun(np.array(arrays[f"{bits}.latents"]), np.array(arrays[f"{bits}.picture"]))
        for bits, _ in KINDS.values()
    }
    return runs, {name: tuple(pair) for name, pair in json.loads(metadata["bounds"]).items()}


def small_model(kind: str, setting: Setting) -> CheckResult:
    """Checks a run of the small model of one kind. It is the same at every setting."""
    runs, bounds = stored()
    bits, dtype = KINDS[kind]
    latents, most, usual = run(bits, dtype).errors(runs[bits])
    at_most, levels = bounds[kind]
    picture, how = (most, "within") if kind == "float32" else (usual, "on average")
    found = f"latents {latents:.2g}, picture {how} {picture:.2g} levels"
    expected = f"at most {at_most:.2g} and {levels:.2g}"
    is_right = latents <= at_most and picture <= levels
    todo = "this machine computes other pictures: please report it"
    return CheckResult(found, expected, is_right, todo, {"latents": latents, "levels": picture, "bounds": bounds[kind]})
