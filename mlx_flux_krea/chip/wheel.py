"""The library of MLX that is installed: whether it was made for this chip and this macOS, and how it will compute."""

import mmap
import platform
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from .. import macos
from ..errors import UsageError

_ACCELERATED = 5  # number of the first chip with accelerators for matrix products: M5
_ACCELERATORS_NEED = (26, 2)  # version of macOS
SWITCHES = {  # ways of MLX to compute less exactly: the variable by which weights.py switches it off, and its effect
    "TF32": ("MLX_ENABLE_TF32", "products of float32 lose 13 of 24 bits on an M5"),
    "Winograd": ("MLX_CONV_WINOGRAD", "3 x 3 convolutions in 16 bits lose several percent"),
}


def library_problem() -> tuple[bool, UsageError | None]:
    """Reads MLX's libraries on a Mac as files, for the faults of an installation that no import shows.

    Returns:
        True where there is a library for macOS, and the error; None: it fits.
    """
    spec = find_spec("mlx") if sys.platform == "darwin" else None
    for place in (spec and spec.submodule_search_locations) or ():
        library, kernels = Path(place, "lib", "libmlx.dylib"), Path(place, "lib", "mlx.metallib")
        if not library.is_file():
            continue
        known = _holds(library, b"MLX_CONV_WINOGRAD")
        problem = None if known else UsageError(
            "this mlx does not know MLX_CONV_WINOGRAD, and decodes pictures with errors of several percent",
            "a library of mlx 0.32.4 or later", "install it again: pip install --force-reinstall mlx",
        )  # fmt: skip
        return True, problem or _wrong_wheel(kernels)
    return False, None


def _wrong_wheel(kernels: Path) -> UsageError | None:
    """Returns the error for a library that was made for another macOS than an M5 or a later chip needs.

    Wheels for macOS 26 hold kernels (named *_nax) for the accelerators in these chips. They need macOS 26.2, and are
    used on 26.0 and 26.1 too (ml-explore/mlx#4525).
    """
    chip = re.match(r"Apple M(\d+)", macos.sysctl("machdep.cpu.brand_string") or "")
    if not chip or int(chip[1]) < _ACCELERATED or not kernels.is_file():
        return None
    found, has_kernels = macos_version(), _holds(kernels, b"_nax")
    is_enough = _numbers(found) >= _ACCELERATORS_NEED
    if has_kernels and not is_enough:
        ahead = f"this mlx uses the accelerators of the {chip[0]}, which macOS {found} cannot do"
        return UsageError(ahead, "macOS 26.2 or later", "update macOS")
    if is_enough and not has_kernels:
        slow = (
            "this mlx was made for an older macOS: without the chip's accelerators its products take 2.7 times as long"
        )
        todo = "make a new environment with a newer Python, which asks for it: uv venv --python 3.13"
        return UsageError(slow, "the wheel of mlx-metal for macOS 26", todo)
    return None


def macos_version() -> str:
    """Returns the version of macOS; a Python made for an older one is told 16.0 for 26."""
    return macos.sysctl("kern.osproductversion") or platform.mac_ver()[0]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def _holds(path: Path, text: bytes) -> bool:
    """Returns True where a file holds these bytes."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return mapped.find(text) >= 0
