"""Latents of the small model with its blocks in memory, half of them, and streamed; in flight, and one at a time.

    python benchmarks/bits.py [--steps 4]

For each type of weights: whether all six ways give the same bits for two pictures, and what a first and a second one
read of T5, modulation and blocks, counted where files are read. Ends with one JSON line.
"""

import argparse
import dataclasses
import itertools
import json
import os
import tempfile
from pathlib import Path
from unittest import mock

import mlx.core as mx
import numpy as np
from mlx_flux_krea.convert import convert

from mlx_flux_krea import FluxPipeline
from mlx_flux_krea.residency import Reader

NANO = Path(__file__).parent.parent / "mlx_flux_krea" / "nano" / "model"
WEIGHTS = {"float32": "none", "bfloat16": "none", "float16": "none", "bfloat16, 8 bits": "8", "bfloat16, 4 bits": "4"}
SHARES = {"in memory": 1.0, "half": 0.5, "streamed": 0.0}
PROMPT = "a red circle and a blue square on a white background"


def pictures(folder: Path, dtype: str, share: float, steps: int) -> tuple[np.ndarray, list[int]]:
    """Latents of two pictures, with a share of the blocks in memory, and the bytes that each of them read."""
    pipe, read, latents = FluxPipeline.from_pretrained(folder, dtype=dtype), [], []
    plan, original = pipe.plan, Reader.read
    pipe.plan = lambda request: dataclasses.replace(
        plan(request), resident_bytes=int(share * sum(pipe._weights.blocks.computed))
    )

    def counted(self, unit, buffer):
        read[-1] += sum(info.end - info.start for _, _, info, _ in unit.tensors)
        return original(self, unit, buffer)

    with mock.patch.object(Reader, "read", counted):
        for seed in (1, 2):
            read.append(0)
            made = pipe(PROMPT, seed=seed, width=96, height=96, num_inference_steps=steps, output_type="latent")
            latents.append(np.array(made.images.astype(mx.float32)))
    return np.concatenate(latents), read


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    rows = []
    print("| weights | the same bits | read, MB: in memory | half | streamed |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        for name, quantize in WEIGHTS.items():
            folder = Path(place) / quantize
            if not folder.exists():
                folder = convert([NANO], folder, quantize=quantize).path
            found, reads = [], {}
            for (share, part), switch in itertools.product(SHARES.items(), "10"):
                with mock.patch.dict(os.environ, {"FLUX_KREA_IN_FLIGHT": switch}):
                    latents, reads[share] = pictures(folder, name.partition(",")[0], part, args.steps)
                found.append(latents)
            equal = sum(np.array_equal(found[0], one) for one in found)
            cells = [" and ".join(f"{count / 1e6:.1f}" for count in reads[share]) for share in SHARES]
            print(f"| {name} | {equal} of {len(found)} | {' | '.join(cells)} |", flush=True)
            rows.append({"weights": name, "equal": equal, "ways": len(found), "read": reads})
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
