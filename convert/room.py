"""Disk space that conversions take: the one count by which `setup` says that they fit, and `convert` refuses."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .folder import existing
from .hub import cache_folder

SMALL_FILES = 2**26  # bytes for all files beside the weights


@dataclass(frozen=True)
class Room:
    """Bytes of a conversion's components, in the order in which they are written.

    Attributes:
        to_fetch: bytes of each component that are still to be fetched.
        written: bytes of each in the new folder.
    """

    to_fetch: tuple[int, ...]
    written: tuple[int, ...]

    def needs(self, *, discard: bool, shared: bool) -> tuple[int, int]:
        """Returns the most bytes used at a time on the disk of the new folder, and on that of the hub's cache.

        Args:
            discard: files are deleted once their component is converted.
            shared: both are one disk, on which the first number counts everything.
        """
        need = sum(self.written) + SMALL_FILES
        if not shared:
            return need, sum(self.to_fetch)
        if discard and self.written:  # while one component is written, later ones may already be fetched
            ends = range(len(self.written))
            return need + max(0, *(sum(self.to_fetch[i:]) - sum(self.written[i + 1 :]) for i in ends)), 0
        return need + sum(self.to_fetch), 0


def needs_in_turn(parts: Sequence[tuple[Room, bool]], *, shared: bool) -> tuple[int, int]:
    """Returns the same numbers for conversions one after another.

    Args:
        parts: each conversion, and whether its fetched files are deleted.
        shared: as for `Room.needs`.
    """
    most, kept = [0, 0], [0, 0]
    for room, discard in parts:
        need = room.needs(discard=discard, shared=shared)
        most = [max(most[i], kept[i] + need[i]) for i in (0, 1)]
        kept[0] += sum(room.written)
        kept[0 if shared else 1] += 0 if discard else sum(room.to_fetch)
    return most[0], most[1]


def shares_disk(target: Path) -> bool:
    """Returns True where a new folder and the hub's cache lie on one disk."""
    return os.stat(existing(cache_folder())).st_dev == os.stat(existing(target)).st_dev
