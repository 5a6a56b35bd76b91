"""What a Mac is asked for besides computing: to stay awake, to leave model folders alone, to say what it is.

Elsewhere all of this does nothing. Whatever fails here fails silently: no run depends on it.
"""

import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mlx_flux_krea.errors import UsageError

NEVER_INDEX = ".metadata_never_index"  # Spotlight leaves a folder alone that holds a file of this name


@contextlib.contextmanager
def awake() -> Iterator[None]:
    """The machine does not go to sleep by itself within the block, nor when this process is killed in it."""
    command = ["caffeinate", "-i", "-w", str(os.getpid())]
    process = None
    if sys.platform == "darwin":
        with contextlib.suppress(OSError):
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
    try:
        yield
    finally:
        if process:
            process.terminate()
            process.wait()


def leave_alone(folder: Path) -> None:
    """Weights can be had again: Spotlight does not read this folder, and Time Machine does not copy it."""
    if sys.platform != "darwin":
        return
    with contextlib.suppress(OSError):
        (folder / NEVER_INDEX).touch()
    run("tmutil", "addexclusion", str(folder))  # com.apple.metadata:com_apple_backup_excludeItem, set on the folder


def sysctl(name: str) -> str | None:
    """A value that the kernel has under this name."""
    return run("sysctl", "-n", name)


def run(*command: str) -> str | None:
    """What a program of the system prints; None where it fails, or this is no Mac."""
    if sys.platform != "darwin":
        return None
    try:
        ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip()


def check_python() -> None:
    """Finds a Python for Intel out before it fails to import MLX.

    Raises:
        UsageError: it is one.
    """
    if sys.platform != "darwin" or platform.machine() != "x86_64":
        return
    if sysctl("sysctl.proc_translated") == "1" or (sysctl("machdep.cpu.brand_string") or "").startswith("Apple"):
        raise UsageError(
            f"this Python ({sys.executable}) is made for Intel and runs translated, in which MLX does not run",
            "a Python for Apple silicon: python3 -c 'import platform; print(platform.machine())' prints arm64",
            "install one from python.org or with uv, make a new environment with it, and install flux-krea there",
        )
    raise UsageError("this Mac has an Intel processor, and MLX needs Apple silicon", "an M1 or later")
