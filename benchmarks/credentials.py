"""Signs and reads pictures with content credentials: seconds of each, and the memory of a process that does many.

    python benchmarks/credentials.py [FILES]

Each of FILES (1000) pictures of 256 x 256 is saved as a PNG, JPEG or WebP, two of three with the one before as
their input, read again, and removed. Memory is the resident set after a tenth of them, and at the end.
"""

import itertools
import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from mlx_flux_krea.credentials import reading, signing
from mlx_flux_krea.provenance import SOFTWARE, Picture


def resident() -> int:
    """Bytes of this process in memory; on a Mac the most so far, which `resource` alone knows."""
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(count: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    record = {"software": SOFTWARE, "prompt": "a frog"}
    made, edited = (Picture.from_pixels(pixels, record | more) for more in ({}, {"image": {}}))
    seconds, early, before = {"save": 0.0, "sign": 0.0, "read": 0.0}, 0, Path("none")
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("FLUX_KREA_HOME", f"{folder}/home")
        for number, ending in zip(range(count), itertools.cycle((".png", ".jpg", ".webp"))):
            path, is_first = Path(folder, f"{number}{ending}"), number % 3 == 0
            start = time.perf_counter()
            made.save(path)
            saved = time.perf_counter()
            how = signing.Signing("require", sources=[] if is_first else [signing.parent(before)])
            (made if is_first else edited).save(path, credentials=how)
            signed = time.perf_counter()
            if (reading.read_credentials(path) or {}).get("state") != "trusted":
                raise SystemExit(f"{path} is not good")
            seconds["save"] += saved - start
            seconds["sign"] += signed - saved - (saved - start)
            seconds["read"] += time.perf_counter() - signed
            before.unlink(missing_ok=True)
            before = path
            early = resident() if number == count // 10 else early
        late = resident()
    ms = {name: round(1000 * took / count, 1) for name, took in seconds.items()}
    print(f"{count} files: sign {ms['sign']} ms, read {ms['read']} ms; {early / 1e6:.0f} MB, then {late / 1e6:.0f} MB")
    facts = {"files": count, "ms": ms, "resident_bytes": late, "grown_bytes": late - early}
    print(json.dumps(facts | {"c2pa-python": version("c2pa-python"), "machine": os.uname().machine}))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
