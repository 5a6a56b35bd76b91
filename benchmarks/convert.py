"""The converter at full size: memory, seconds, and the share of the machine's own rates.

    python benchmarks/convert.py [FOLDER] [--quantize 8 4]

The input has the names, types and shapes of the published files, and is 34 GB in appearance: a few layers of each kind
hold numbers, the rest of the files is holes. Needs FOLDER on a disk with 20 GB free (default: a temporary folder).

Reading, hashing, quantizing and writing are each measured by themselves on the same cores, on 2 GB just before the
conversion and just after it, past the system's cache as the conversion does it, and taken to its size. Quantizing is of
float16 where the input is. Hashing is of the sources; the hashes of what was written come from reading back, which is
timed apart. That gives two bounds: the slowest of the four, as if each had the cores to itself; and the processor's
time of all four spread over the cores, which nothing on these cores can be faster than. The last share is of the
processor's time, where other programs on the machine disturb least.
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
from mmap import mmap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import mlx.core as mx
import numpy as np
from foreign import published
from helpers import TOKENIZERS

from mlx_flux_krea.files import bypass, forget, open_direct

FILES = {
    "flux1-krea-dev": "bfl-transformer-dev",
    "clip_l": "comfy-clip_l-fp16",
    "t5xxl_fp16": "comfy-t5xxl-fp16",
    "ae": "bfl-ae",
}
FILLED = ("double_blocks.0.", "single_blocks.0.", "encoder.block.0.", "decoder.mid.")  # the layers that hold numbers
SIZES = {"F32": 4, "BF16": 2, "F16": 2}
CHUNK, BATCH = 2**22, 2**25  # bytes that are worked on in one go, and written until they are to be on the disk


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
    """One conversion in a process of its own.

    Returns:
        Seconds until all is written, of the processor too; seconds of reading back; peak memory; bytes written.
    """
    script = """
import json, os, resource, sys, time
from mlx_flux_krea.convert import convert
from mlx_flux_krea.convert.folder import NewFolder
def now():
    return time.perf_counter(), time.process_time()
moments, finish = [now()], NewFolder.finish
def timed(*args):
    moments.append(now())
    finish(*args)
    moments.append(now())
NewFolder.finish = timed
*sources, target, quantize, tokenizers = sys.argv[1:]
report = convert(sources, target, quantize=quantize, tokenizers=tokenizers)
if sys.platform == "darwin":
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
else:  # where that starts at what the process that started this one had
    peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
made = sum(c.bytes for c in report.components)
(begin, worked), (end, busy), (back, _) = moments
print(json.dumps({"seconds": end - begin, "cpu": busy - worked, "back": back - end, "peak": peak, "bytes": made}))
"""
    arguments = [*map(str, sources), str(target), quantize, str(TOKENIZERS)]
    ran = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def rate(work, size: int) -> np.ndarray:
    """(2,) seconds for each byte, and of the processor: the better of two."""
    times = []
    for _ in range(2):
        begin = np.array([time.perf_counter(), time.process_time()])
        work()
        times.append(np.array([time.perf_counter(), time.process_time()]) - begin)
    return np.min(times, axis=0) / size


def bounds(sources: list[Path], folder: Path, quantize: str) -> dict[str, np.ndarray]:
    """Returns the `rate` of reading, hashing and quantizing the input, and of writing the output."""
    size, buffer = 2**31, mmap(-1, CHUNK)

    def read():
        file = open_direct(sources[0])
        for start in range(0, size, CHUNK):
            os.preadv(file, [buffer], start)
        os.close(file)

    def digest():
        digest = hashlib.sha256()
        for _ in range(size // CHUNK):
            digest.update(buffer)

    def write():
        data = os.urandom(CHUNK)
        with open(folder / "written", "wb", buffering=0) as file:
            bypass(file.fileno())
            for _ in range(size // BATCH):
                for _ in range(BATCH // CHUNK):
                    file.write(data)
                os.fsync(file.fileno())
                forget(file.fileno())

    def quantizing(kind: mx.Dtype) -> np.ndarray:
        array = mx.random.normal((CHUNK // 8192, 4096)).astype(kind)
        mx.eval(array)

        def pack():
            for _ in range(32):
                arrays = [(array.astype(mx.bfloat16, stream=stream), stream) for stream in streams]
                mx.eval([mx.quantize(a, group_size=64, bits=int(quantize), stream=stream) for a, stream in arrays])

        return rate(pack, 64 * array.nbytes)

    streams = [mx.new_stream(mx.cpu), mx.new_stream(mx.cpu)]
    sizes = {path.stem: path.stat().st_size for path in sources}
    share = sum(size for name, size in sizes.items() if FILES[name].endswith("fp16")) / sum(sizes.values())
    rates = {
        "read": rate(read, size),
        "hash": rate(digest, size),
        "quantize": share * quantizing(mx.float16) + (1 - share) * quantizing(mx.bfloat16),
        "write": rate(write, size),
    }
    (folder / "written").unlink()
    return rates


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--quantize", nargs="+", default=["8", "4"])
    given = parser.parse_args()
    titles = ("bits", "seconds", "of the processor", "reading back", "peak memory", "read", "hash", "quantize", "write")
    titles += ("share of the slowest", "share of the cores", "of the processor")
    print(f"| {' | '.join(titles)} |")
    print("|---" * len(titles) + "|")
    rows = []
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        sources = make(folder)
        size = sum(path.stat().st_size for path in sources)
        for quantize in given.quantize:
            before = bounds(sources, folder, quantize)
            made = convert(sources, folder / "out", quantize)
            shutil.rmtree(folder / "out")
            after = bounds(sources, folder, quantize)
            bytes_of = dict.fromkeys(before, size) | {"write": made["bytes"]}
            alone = {stage: (before[stage] + after[stage]) / 2 * count for stage, count in bytes_of.items()}
            stages, work = {stage: float(cost[0]) for stage, cost in alone.items()}, sum(c[1] for c in alone.values())
            shares = {
                "slowest": max(stages.values()) / made["seconds"],
                "cores": float(work) / os.cpu_count() / made["seconds"],
                "processor": float(work) / made["cpu"],
            }
            seconds = [f"{value:.0f} s" for value in (made["seconds"], made["cpu"], made["back"], *stages.values())]
            cells = [quantize, *seconds[:3], f"{made['peak'] / 1e9:.2f} GB", *seconds[3:]]
            print(f"| {' | '.join([*cells, *(f'{share:.2f}' for share in shares.values())])} |", flush=True)
            rows.append({"bits": quantize, "input": size, **made, **stages, "shares": shares})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
