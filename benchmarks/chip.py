"""Writes the stored outputs of `flux-krea doctor --chip`: the small model's latents and pictures, and their bounds.

    python benchmarks/chip.py

Run it where MLX computes on a CPU. The file holds the run in float32 of the small model as it is, in 8 and in 4 bits,
and bounds: for each other type twice its distance from that run, of the latents (relative) and of the picture (root
mean square, levels of 255). `tests/test_chip.py` shows that a wrong layer exceeds them.
"""

import json

import mlx.core as mx

from mlx_flux_krea.chip.outputs import EXACT, FILE, KINDS, SmallRun, run

ROOM = 2  # times the measured distance


def record() -> tuple[dict[str, SmallRun], dict[str, tuple[float, float]]]:
    """Returns the runs in float32 by bits, and the bounds of each kind."""
    exact = {bits: run(bits, "float32") for bits, _ in KINDS.values()}
    bounds = {"float32": EXACT}
    for name, (bits, dtype) in KINDS.items():
        if dtype != "float32":
            latents, _, levels = run(bits, dtype).errors(exact[bits])
            bounds[name] = float(f"{ROOM * latents:.2g}"), float(f"{ROOM * levels:.2g}")
    return exact, bounds


def main() -> None:
    """Writes the file and prints the bounds."""
    exact, bounds = record()
    arrays = {}
    for bits, one in exact.items():
        arrays |= {f"{bits}.latents": mx.array(one.latents), f"{bits}.picture": mx.array(one.picture)}
    mx.save_safetensors(str(FILE), arrays, {"bounds": json.dumps(bounds)})
    print(f"{FILE}: {FILE.stat().st_size} bytes")
    print(json.dumps(bounds))


if __name__ == "__main__":
    main()
