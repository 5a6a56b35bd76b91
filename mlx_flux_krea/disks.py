"""The speed of the disks that hold models, measured once, by which a plan keeps as few blocks in memory as it can.

HOME/disks.json holds it: {disk: bytes a second}, where a disk is named by its number and its size. A damaged file, or a
model on another disk, is a disk whose speed is not known.
"""

import json
import math
import os
import random
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import home
from .errors import FluxKreaError
from .files import bypass, fill, forget, read_json, sync, written_whole
from .memory import Speeds
from .models.layers import rate
from .presets import SHARE_OF_PEAK

SAMPLE = 2**28  # bytes of a file that shows the speed of a disk
THREADS = 4  # that read at one time, as while blocks are streamed
_SECONDS = 1.0  # of reading it, at most
_CHUNK = 2**23


def speeds(folder: Path) -> Speeds | None:
    """Returns the speeds of this machine for models in a folder; None: that of its disk or of its chip is not known."""
    disk, products = known_speed(folder), rate() / SHARE_OF_PEAK
    return None if disk is None or math.isinf(products) else Speeds(disk, products)


def known_speed(folder: Path) -> float | None:
    """Returns the bytes a second that the disk of a folder reads; None: it was not measured."""
    try:
        speed = read_json(home.path(home.DISKS)).get(_name(folder))
    except (FluxKreaError, OSError):
        return None
    return speed if type(speed) is float and 0 < speed < math.inf else None


def remember_speed(folder: Path) -> None:
    """Measures the disk of a folder, unless that was done or is of no use here, and stores its speed.

    It takes two seconds. Where it cannot be measured or stored, it stays unknown.
    """
    if math.isinf(rate()) or known_speed(folder) is not None:
        return
    file = home.path(home.DISKS)
    try:
        known = read_json(file)
    except FluxKreaError:  # missing or damaged
        known = {}
    try:
        known[_name(folder)] = read_speed(folder.parent, SAMPLE, THREADS)
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as out:
            out.write(json.dumps(known, indent=2).encode())
    except (OSError, FluxKreaError):
        return


def _name(folder: Path) -> str:
    """Names the disk of a folder: numbers are given anew when a computer starts, so its size belongs to the name."""
    facts = os.statvfs(folder)
    return f"{os.stat(folder).st_dev}, {facts.f_blocks * facts.f_frsize} bytes"


def read_speed(place: Path, sample: int = SAMPLE // 4, threads: int = 1) -> float:
    """Measures the bytes per second that a disk reads, from a new file that never was in the system's cache.

    Args:
        place: a folder on the disk.
        sample: bytes of the file.
        threads: that read at one time.

    Raises:
        OSError: the file cannot be written or read.
    """
    with tempfile.TemporaryFile(dir=place, buffering=0) as file:
        number = file.fileno()
        bypass(number)  # before it is written: macOS takes no page back
        block = random.Random(0).randbytes(2**20)
        for _ in range(sample // len(block)):
            file.write(block)
        sync(number)
        forget(number)
        start = time.perf_counter()

        def read(first: int) -> int:
            buffer, count = memoryview(bytearray(_CHUNK)), 0
            for offset in range(first * _CHUNK, sample, threads * _CHUNK):
                if time.perf_counter() - start > _SECONDS:
                    break
                count += _CHUNK if fill(number, buffer, offset, min(_CHUNK, sample - offset)) else 0
            return count

        with ThreadPoolExecutor(threads) as pool:
            count = sum(pool.map(read, range(threads)))
        return min(count, sample) / max(time.perf_counter() - start, 1e-9)
