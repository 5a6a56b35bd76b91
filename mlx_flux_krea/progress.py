"""Progress of denoising in steps; and progress bars of a call in Python, by tqdm, in a terminal or a notebook."""

import inspect
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from tqdm.std import tqdm as terminal_tqdm

from .presets import STAGES


class ProgressBars:
    """Bars for the stages of a call, one after the other; called as (stage, done, total).

    Args:
        options: arguments of tqdm, over ours. By default a bar appears after half a second, in a terminal and in a
            notebook, and stays there only for denoising.
    """

    def __init__(self, options: dict[str, Any]):
        self._options = options
        self._stage = ""
        self._bar: tqdm | None = None

    def __call__(self, stage: str, done: float, total: int) -> None:
        """Takes a report of a pipeline."""
        if self._bar is None or stage != self._stage:
            self.close()
            about = {"desc": STAGES[stage].label, "unit": STAGES[stage].unit, "leave": stage in ("denoise", "enlarge")}
            layout = {"delay": 0.5, "disable": None, "bar_format": _LAYOUT}
            self._stage, self._bar = stage, tqdm(**{"total": total, **about, **layout, **self._options})
        self._bar.update(max(0, int(done + 1e-6) - self._bar.n))

    def close(self) -> None:
        """Ends the bar that is shown."""
        if self._bar is not None:
            self._bar.close()
        self._stage, self._bar = "", None


_LAYOUT = "{desc:<20} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
_KNOWN = inspect.signature(terminal_tqdm.__init__).parameters.keys() - {"self", "iterable", "total", "kwargs"}


def check_options(options: dict[str, Any]) -> None:
    """Checks arguments for tqdm before a run.

    Raises:
        TypeError: one that tqdm does not have, or the total, which is the run's.
    """
    for name in options:
        if name not in _KNOWN:
            raise TypeError(f"set_progress_bar_config() got an unexpected keyword argument {name!r}")


class Passes:
    """Reports the progress of denoising in steps, part by part of each pass through the transformer.

    A pass that a step cache ends after the first block counts as a whole one: the steps that are left are known, and
    their evaluations are not.

    Args:
        progress: is called with the stage, the steps done and their number; None: nothing is reported.
        passes: that are expected.
        parts: of a pass.
        total: steps.
        stage: "denoise", or "enlarge" in the second pass.
    """

    def __init__(
        self,
        progress: Callable[[str, float, int], None] | None,
        passes: int,
        parts: int,
        total: int,
        stage: str = "denoise",
    ):
        self._progress, self._passes, self._parts, self._total = progress, max(passes, 1), parts, total
        self._stage = stage
        self._ended = self._done = 0

    def part(self, done: int) -> None:
        """Takes one part that was computed."""
        self._done = min(self._done + 1, self._parts)
        self._report(self._ended + self._done / self._parts)

    def end(self) -> None:
        """Takes the end of a pass."""
        is_whole = self._done == self._parts
        self._ended, self._done = self._ended + 1, 0
        if not is_whole:
            self._report(self._ended)

    def _report(self, passes: float) -> None:
        if self._progress:
            self._progress(self._stage, self._total * min(passes / self._passes, 1), self._total)
