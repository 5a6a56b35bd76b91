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
        _to_trash_of_macos(path, Path.home() / ".Trash", _OF_MACOS)
    else:
        _to_trash_of_desktops(path, Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "Trash")


def _to_trash_of_macos(path: Path, place: Path, program: str) -> None:
    """Moves a file by the system's program, or into a folder where there is none or it fails."""
    if Path(program).exists():
        ran = subprocess.run([program, path], stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if ran.returncode == 0 and not os.path.lexists(path):
            return
    _move(path, place)


def _to_trash_of_desktops(path: Path, place: Path) -> None:
    """Moves a file into a folder as freedesktop.org's Trash specification 1.0 says, with the path that it had."""
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
