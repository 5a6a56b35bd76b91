"""The mode of `fast`: the usual one, or the one that `flux-krea bench --fast` has chosen for a model.

HOME/fast.json holds the choices: {sha256 of a model's manifest: {"mode", "share", "distance", "model"}}. A picture's
record and an unfinished run name the mode itself, so that neither depends on this file.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import home
from .errors import FluxKreaError, UsageError
from .files import read_json, sha256_if_exists, written_whole
from .presets import FAST, MAX_STEPS
from .sampling.rules import CacheRule, parse_cache, skip_steps

_STEPS = re.compile(r"([1-9]\d{0,3})/([1-9]\d{0,3})")


@dataclass(frozen=True)
class FastMode:
    """A way to take the steps of a picture with fewer evaluations.

    Attributes:
        cache: the step cache; None: there is none.
        steps: so many steps in the place of so many; None: as many as without.
        share: of the steps, those that were computed in full when it was measured; None: not known.
    """

    cache: CacheRule | None = None
    steps: tuple[int, int] | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: Any, share: float | None = None) -> "FastMode":
        """Reads the name of a mode: that of a cache, or "16/28" for 16 steps in the place of 28.

        Raises:
            UsageError: anything else.
        """
        match = _STEPS.fullmatch(text) if isinstance(text, str) else None
        if not match:
            return cls(cache=parse_cache(text), share=share)
        few, many = int(match[1]), int(match[2])
        if not few < many <= MAX_STEPS:
            raise UsageError(f"the mode of `fast` is {text}", "fewer steps in the place of more")
        return cls(steps=(few, many), share=share)

    def __str__(self) -> str:
        """Returns the name that `parse` reads."""
        return "{}/{}".format(*self.steps) if self.steps else str(self.cache)

    @property
    def is_usual(self) -> bool:
        """True for the mode of `fast` where nothing was measured."""
        return str(self) == FAST

    def taken(self, count: int) -> int:
        """Returns the steps that a picture of so many steps takes."""
        return max(1, round(count * self.steps[0] / self.steps[1])) if self.steps else count

    def evaluations(self, count: int) -> int:
        """Returns the expected number of evaluations of a picture of so many steps."""
        if self.cache and self.cache.name == "skip":
            return len(skip_steps(count))
        return self.taken(count) if self.steps or self.share is None else max(1, round(self.share * count))


def chosen_mode(model: Path) -> tuple[FastMode, str]:
    """Returns the mode of `fast` for a model folder, and a sentence where the file of choices is damaged, or ""."""
    file, usual = home.path(home.FAST), FastMode.parse(FAST)
    if not file.exists():
        return usual, ""
    try:
        entry = read_json(file).get(sha256_if_exists(model / "manifest.json") or "")
        if entry is None:
            return usual, ""
        share = entry["share"]
        if type(share) is not float or not 0 < share <= 1:
            raise ValueError
        return FastMode.parse(entry["mode"], share), ""
    except (FluxKreaError, KeyError, TypeError, ValueError):
        return usual, f"{file} is damaged: `fast` is {FAST}; flux-krea bench --fast writes the file again"


def store_choice(model: Path, choice: Mapping[str, Any]) -> None:
    """Stores the mode of a model folder.

    Args:
        model: the folder.
        choice: "mode", "share", and facts for the reader.

    Raises:
        OSError: the file cannot be written.
    """
    file = home.path(home.FAST)
    try:
        known = read_json(file)
    except FluxKreaError:  # missing or damaged
        known = {}
    known[sha256_if_exists(model / "manifest.json") or ""] = dict(choice)
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as out:
        out.write(json.dumps(known, indent=2).encode())
