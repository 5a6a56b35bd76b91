"""A check of this machine: its name, its function, and its result; and the sizes at which checks compute.

Checks compare MLX's results with numpy's in float32 or float64, of the same numbers. On a GPU they have the shapes of
FLUX.1; on a CPU, where those would take an hour, shapes divided by `Setting.divisor`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..commands.shared.estimates import home_disk

CPU_DIVISOR = 48  # the largest that leaves each row of a matrix whole groups of 64
NO_MAC = "not on a Mac"
NO_GPU = "MLX computes on the CPU here"


@dataclass(frozen=True)
class Setting:
    """Sizes and places of checks.

    Attributes:
        divisor: by which shapes of full size are divided.
        folder: on the disk that is examined.
        budget: bytes of memory that a run may use; None: as many as the machine offers.
    """

    divisor: int
    folder: Path
    budget: int | None = None

    @property
    def in_words(self) -> str:
        """Says at which shapes the checks compute."""
        return "FLUX.1's shapes" if self.divisor == 1 else f"FLUX.1's shapes divided by {self.divisor}: {NO_GPU}"


@dataclass(frozen=True)
class CheckResult:
    """The result of a check.

    Attributes:
        found: the value at hand, with figures for a reader.
        expected: the value that is right; "": none is expected.
        is_right: False where something is wrong.
        todo: the next step where it is.
        figures: numbers for programs.
    """

    found: str
    expected: str = ""
    is_right: bool = True
    todo: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        expected = f"; expected {self.expected}" if self.expected else ""
        todo = f"; {self.todo}" if self.todo and not self.is_right else ""
        return f"{'' if self.is_right else 'WRONG: '}{self.found}{expected}{todo}"


@dataclass(frozen=True)
class Check:
    """One row of the table of checks."""

    name: str
    run: Callable[[Setting], CheckResult]


def this_setting() -> Setting:
    """Returns the setting of this machine."""
    return Setting(1 if is_gpu() else CPU_DIVISOR, home_disk()[0])


def is_gpu() -> bool:
    """Returns True where MLX computes on a GPU."""
    return mx.default_device().type == mx.gpu


def as_numpy(array: mx.array) -> np.ndarray:
    """Returns an array of any float type in float32, which holds its numbers exactly."""
    return np.array(array.astype(mx.float32))


def distance(found: np.ndarray, exact: np.ndarray) -> float:
    """Returns ||found - exact|| / ||exact||; infinite for another shape, and where a number is not finite."""
    if found.shape != exact.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.linalg.norm((found.astype(np.float64) - exact).ravel()) / np.linalg.norm(exact.astype(np.float64)))


def normal(shape: tuple[int, ...], dtype: mx.Dtype, seed: int = 0) -> mx.array:
    """Returns normal random numbers, evaluated; the state of MLX's own random numbers is left as it is."""
    array = mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)
    mx.eval(array)
    return array


def judged(error: float, bound: float, more: str = "", **figures: Any) -> CheckResult:
    """Returns the result for an error that has a bound."""
    found = f"error {error:.2g}{more}"
    return CheckResult(found, f"at most {bound:g}", error <= bound, _REPORT, {"error": error, "bound": bound} | figures)


_REPORT = "pictures of this machine may be wrong: please report it"
