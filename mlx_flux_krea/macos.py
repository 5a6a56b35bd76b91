"""Services of macOS: the machine stays awake, folders stay out of indexes and backups, the system is identified.

On other systems these functions do nothing. Failures are ignored, since no run depends on them.
"""

import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .errors import UsageError

_PATIENCE = 5  # seconds for a killed program to end
NEVER_INDEX = ".metadata_never_index"  # Spotlight ignores a folder that holds a file of this name


@contextlib.contextmanager
def awake() -> Iterator[subprocess.Popen | None]:
    """Keeps the machine from sleeping within the block, and no longer than this process lives.

    Gives the process that does so; None: there is none.
    """
    command = ["caffeinate", "-i", "-w", str(os.getpid())]
    process = None
    if sys.platform == "darwin":
        with contextlib.suppress(OSError):
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
    try:
        yield process
    finally:
        if process:
            process.kill()  # a child inherits an ignored SIGTERM: `signals.finish` ignores it
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE)  # it ends with this process in any case, see -w


def exclude(folder: Path) -> None:
    """Keeps a folder out of Spotlight and Time Machine, from before it is filled.

    It holds weights, which can be made again, or what nobody but its owner shall see. Its mark stays when the folder is
    renamed; a folder with the mark is left as it is, so that this costs time once.
    """
    if sys.platform != "darwin" or os.path.lexists(folder / NEVER_INDEX):
        return
    run("tmutil", "addexclusion", str(folder))  # sets com.apple.metadata:com_apple_backup_excludeItem on the folder
    with contextlib.suppress(OSError):
        (folder / NEVER_INDEX).touch()


def sysctl(name: str) -> str | None:
    """Returns a value of the kernel; None where there is none."""
    return run("sysctl", "-n", name)


def run(*command: str) -> str | None:
    """Returns the output of a program of the system; None where it fails, or on another system."""
    if sys.platform != "darwin":
        return None
    try:
        ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip()


def check_python() -> None:
    """Refuses a Python for Intel, in which the import of MLX fails.

    Raises:
        UsageError: this is one.
    """
    if sys.platform != "darwin" or platform.machine() != "x86_64":
        return
    if sysctl("sysctl.proc_translated") == "1" or (sysctl("machdep.cpu.brand_string") or "").startswith("Apple"):
        raise UsageError(
            f"this Python ({sys.executable}) is built for Intel and runs translated, where MLX does not work",
            "a Python for Apple silicon: python3 -c 'import platform; print(platform.machine())' prints arm64",
            "install one from python.org or with uv, make a new environment with it, and install flux-krea there",
        )
    raise UsageError("this Mac has an Intel processor, and MLX needs Apple silicon", "an M1 or later")
