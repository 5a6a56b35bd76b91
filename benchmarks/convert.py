"""The converter at full size: memory, seconds, and how near it comes to what the machine can do.

    python benchmarks/convert.py [FOLDER] [--quantize 8 4]

The input has the names, types and shapes of the published files, and is 34 GB in appearance: a few layers of each kind
hold numbers, the rest of the files is holes. Needs FOLDER on a disk with 20 GB free (default: a temporary folder).

The bound is the slowest of reading, hashing, quantizing and writing, each by itself on the same cores, measured on 2 GB
just before the conversion and taken to its size. Reading back is timed apart.
"""

import argparse
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import mlx.core as mx
import numpy as np
from foreign import published
from helpers import TOKENIZERS

FILES = {
    "flux1-krea-dev": "bfl-transformer-dev",
    "clip_l": "comfy-clip_l-fp16",
    "t5xxl_fp16": "comfy-t5xxl-fp16",
    "ae": "bfl-ae",
}
FILLED = ("double_blocks.0.", "single_blocks.0.", "encoder.block.0.", "decoder.mid.")  # the layers that hold numbers
SIZES = {"F32": 4, "BF16": 2, "F16": 2}
CHUNK = 2**26


def make(folder: Path) -> list[Path]:
    """Sparse files with true headers."""
    rng, paths = np.random.default_rng(0), []
    for name, layout in FILES.items():
        header, end = {}, 0
        for tensor, (dtype, shape) in published(layout).items():
            size = int(np.prod(shape)) * SIZES[dtype]
            header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        path = folder / f"{name}.safetensors"
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            start = file.tell()
            file.truncate(start + end)
            for tensor, entry in header.items():
                if tensor.startswith(FILLED):
                    kind = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}[entry["dtype"]]
                    values = mx.array(rng.normal(0, 0.02, entry["shape"]).astype(np.float32)).astype(kind)
                    file.seek(start + entry["data_offsets"][0])
                    file.write(memoryview(np.array(values.reshape(-1).view(mx.uint8))))
        paths.append(path)
    return paths


def convert(sources: list[Path], target: Path, quantize: str) -> dict:
    """One conversion in a process of its own: seconds until all is written, seconds of reading back, peak memory."""
    script = """
import json, resource, sys, time
from mlx_flux_krea.convert import convert
from mlx_flux_krea.convert.write import Folder
moments, finish = [time.perf_counter()], Folder.finish
def timed(*args):
    moments.append(time.perf_counter())
    finish(*args)
    moments.append(time.perf_counter())
Folder.finish = timed
*sources, target, quantize, tokenizers = sys.argv[1:]
report = convert(sources, target, quantize=quantize, tokenizers=tokenizers)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
made = sum(c.bytes for c in report.components)
print(json.dumps({"seconds": moments[1] - moments[0], "back": moments[2] - moments[1], "peak": peak, "bytes": made}))
"""
    arguments = [*map(str, sources), str(target), quantize, str(TOKENIZERS)]
    ran = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def rate(work, size: int) -> float:
    """Seconds for each byte, the better of two."""
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times) / size


def bounds(source: Path, folder: Path, quantize: str) -> dict[str, float]:
    """Seconds for each byte of reading, hashing, quantizing (of the input) and writing (of the output)."""
    size = 2**31

    def read(use=len):
        with open(source, "rb") as file:
            for _ in range(size // CHUNK):
                use(file.read(CHUNK))

    def write():
        data = os.urandom(CHUNK)
        with open(folder / "written", "wb") as file:
            for _ in range(size // CHUNK):
                file.write(data)
            os.fsync(file.fileno())

    array = mx.random.normal((4096, 4096)).astype(mx.bfloat16)
    streams = [mx.new_stream(mx.cpu), mx.new_stream(mx.cpu)]
    mx.eval(array)

    def pack():
        for _ in range(4):
            mx.eval([mx.quantize(array, group_size=64, bits=int(quantize), stream=s) for s in streams])

    rates = {
        "read": rate(read, size),
        "hash": rate(lambda: read(hashlib.sha256), size),
        "quantize": rate(pack, 8 * array.nbytes),
        "write": rate(write, size),
    }
    (folder / "written").unlink()
    return rates


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--quantize", nargs="+", default=["8", "4"])
    given = parser.parse_args()
    print("| bits | seconds | reading back | peak memory | read | hash | quantize | write | share of the slowest |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        sources = make(folder)
        size = sum(path.stat().st_size for path in sources)
        for quantize in given.quantize:
            each = bounds(sources[0], folder, quantize)
            made = convert(sources, folder / "out", quantize)
            shutil.rmtree(folder / "out")
            alone = {
                "read": each["read"] * size,
                "hash": each["hash"] * (size + made["bytes"]),
                "quantize": each["quantize"] * size,
                "write": each["write"] * made["bytes"],
            }
            share = max(alone.values()) / made["seconds"]
            seconds = [f"{value:.0f} s" for value in (made["seconds"], made["back"], *alone.values())]
            cells = [quantize, *seconds[:2], f"{made['peak'] / 1e9:.2f} GB", *seconds[2:], f"{share:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
            rows.append({"bits": quantize, "input": size, **made, **alone, "share": share})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
