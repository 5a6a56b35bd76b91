"""How long a command takes until something happens: `--help`, the import of the package, the first step of a picture.

    python benchmarks/start.py [--model MODEL] [--rounds 5]

Each is a process of its own, and its whole time counts; processor time stands beside it, since a busy machine stretches
only the other. The model is the small one unless another is named: this measures the program, not a network.
The first step is when the first event of `generate --json` says that it is done.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = str(Path(sys.executable).parent / "flux-krea")


def measure(command: list[str], until: str = "") -> tuple[float, float]:
    """Seconds, and seconds of the processor, to the end of a command or to a line on stderr."""
    before, begin = os.times(), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    seconds = None
    for line in process.stderr:
        if until and until in line and seconds is None:
            seconds = time.perf_counter() - begin
    if process.wait():
        raise SystemExit(f"{command} failed")
    after = os.times()
    computed = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds or time.perf_counter() - begin, computed


def main() -> None:
    """Prints a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FLUX_KREA_HOME"] = f"{folder}/home"
        picture = [PROGRAM, "generate", "a ring", "-m", args.model, "--json", "-o", f"{folder}/out.png", "--steps", "1"]
        commands = {
            "flux-krea --help": ([PROGRAM, "--help"], ""),
            "import mlx_flux_krea": ([sys.executable, "-c", "import mlx_flux_krea"], ""),
            "from mlx_flux_krea import FluxPipeline": (
                [sys.executable, "-c", "from mlx_flux_krea import FluxPipeline"], "",
            ),
            "first step of a picture": ([*picture, "--width", "64", "--height", "64"], '"stage": "denoise"'),
        }  # fmt: skip
        results = {}
        print("| what | seconds | of the processor |")
        print("|---|---|---|")
        for name, (command, until) in commands.items():
            measure(command, until)  # files into the page cache
            times = [measure(command, until) for _ in range(args.rounds)]
            wall, computed = (statistics.median(column) for column in zip(*times, strict=True))
            print(f"| `{name}` | {wall:.2f} | {computed:.2f} |", flush=True)
            results[name] = {"seconds": wall, "processor": computed}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
