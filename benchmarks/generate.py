"""Generation as a user of a Mac runs it: seconds per step, TFLOP/s, share of the chip's peak, stage times and memory.

    python benchmarks/generate.py [-m MODEL] [--width 1024] [--height 1024] [--steps 5] [--memory auto]

The same as `flux-krea bench --json`.
"""

from mlx_flux_krea.commands.bench import bench

if __name__ == "__main__":
    import sys

    bench([*sys.argv[1:], "--json"])
