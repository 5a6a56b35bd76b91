"""Names of step caches, and the evaluations that a run takes with them: without MLX, for the command line too."""

from dataclasses import dataclass

from ..errors import UsageError
from ..presets import FAST_FROM

WARM_UP = 4  # steps that `skip` computes first; 2 and 6 were worse
LINEAR_FROM = 12  # evaluations from which `skip` extrapolates; below, repeating is nearer to the full run
_EXPECTED = '"skip", or "first-block:T" with T between 0 and 1, such as first-block:0.08'


@dataclass(frozen=True)
class CacheRule:
    """A step cache as a user names it.

    Attributes:
        name: "skip" or "first-block".
        threshold: of first-block.
        order: of its extrapolation, 0 or 1.
    """

    name: str
    threshold: float = 0.0
    order: int = 0

    def __str__(self) -> str:
        """Returns the name that `parse_cache` reads."""
        return self.name if self.name == "skip" else f"{self.name}:{self.threshold!r}" + ":1" * self.order


def parse_cache(text: str) -> CacheRule:
    """Reads the name of a cache: "skip", "first-block:0.08" or "first-block:0.08:1".

    Raises:
        UsageError: anything else.
    """
    name, _, rest = text.partition(":") if isinstance(text, str) else ("", "", "")
    threshold, _, order = rest.partition(":")
    try:
        if name == "skip" and ":" not in text:
            return CacheRule(name)
        if name == "first-block" and 0 < float(threshold) < 1 and (order in ("0", "1") or ":" not in rest):
            return CacheRule(name, float(threshold), int(order or 0))
    except ValueError:
        pass
    raise UsageError(f"`cache` is {text!r}", _EXPECTED)


def skip_steps(count: int) -> tuple[int, ...]:
    """Returns the steps that `skip` computes, of so many."""
    return tuple(i for i in range(count) if i < WARM_UP or (i - WARM_UP) % 2 or i == count - 1)


def fast_skips(shift: str, count: int) -> bool:
    """Returns True where `fast` skips some of so many steps: none of a model made for few, nor of few steps.

    Args:
        shift: of the model's schedule.
        count: of steps.
    """
    return shift != "none" and count >= FAST_FROM


def count_evaluations(solver: str, steps: int, *, to_end: bool = True) -> int:
    """Counts the evaluations of the model in so many computed steps.

    Args:
        solver: one of `presets.SOLVERS`.
        steps: computed ones.
        to_end: the last of them ends at 0.
    """
    return max(2 * steps - to_end, 0) if solver == "heun" else steps
