"""The system's Trash: of macOS, and of desktops that follow freedesktop.org's rules."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

_OF_MACOS = "/usr/bin/trash"  # from macOS 15 on; it remembers where a file lay


def to_trash(path: Path) -> None:
    """Moves a file to the Trash.

    Raises:
        OSError: it cannot be moved.
    """
    if sys.platform == "darwin":
        if Path(_OF_MACOS).exists():
            ran = subprocess.run([_OF_MACOS, path], stdin=subprocess.DEVNULL, capture_output=True, check=False)
            if ran.returncode == 0:
                return
        _move(path, Path.home() / ".Trash")
        return
    place = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "Trash"
    info = place / "info"
    info.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = _move(path, place / "files")
    lines = ("[Trash Info]", f"Path={urllib.parse.quote(str(path.absolute()))}", time.strftime("DeletionDate=%FT%T"))
    with contextlib.suppress(OSError):
        (info / f"{target.name}.trashinfo").write_text("\n".join([*lines, ""]))


def _move(path: Path, folder: Path) -> Path:
    """Moves a file into a folder under a free name. Returns its new path."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    target, number = folder / path.name, 2
    while os.path.lexists(target):
        target, number = folder / f"{path.stem} {number}{path.suffix}", number + 1
    shutil.move(path, target)
    return target
