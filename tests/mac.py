"""A Mac as a program sees it, on any machine: its calls leave lines in a file, what only Linux has is not there.

    machine = Mac(folder, monkeypatch)      for a test in this process; the fixture `mac` does it
    mac.install(folder)                     for the whole of another process: `python -c`

Programs of macOS are small scripts on PATH. The calls that Python would make of the system are replaced where our code
looks them up. `fold` lets a folder find names as APFS does: without regard to case, and to how letters are composed.
"""

import builtins
import errno
import fcntl
import io
import mmap
import os
import platform
import resource
import shutil
import sys
import tempfile
import unicodedata
from functools import wraps
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
import safetensors

PAGE = 2**14  # bytes of Apple silicon's
FILES = 256  # that a process may have open, unless it asks for more
COMMANDS = {48: "F_NOCACHE", 51: "F_FULLFSYNC"}  # of fcntl, from <sys/fcntl.h>
# What Python's os has on Linux and not on macOS.
ABSENT = (
    "posix_fadvise", "posix_fallocate", "O_DIRECT", "O_TMPFILE", "O_PATH", "O_LARGEFILE", "RWF_NOWAIT", "fdatasync",
    "sched_getaffinity", "sched_setaffinity", "getxattr", "setxattr", "listxattr", "removexattr", "memfd_create",
    "copy_file_range", "splice", "eventfd", "pidfd_open", "pipe2", "getrandom",
)  # fmt: skip
PROGRAMS = {
    "caffeinate": '[ -p "$0.ready" ] && echo > "$0.ready"; exec sleep 60',
    "tmutil": 'echo "held $(ls -A "$2" | wc -l)" >> "$(dirname "$0")/../calls"',
    "open": "true",
    "sysctl": 'cat "$0.$2" 2> /dev/null',
}
SYSCTL = {
    "kern.osproductversion": "26.2",
    "machdep.cpu.brand_string": "Apple M2",
    "hw.memsize": str(16 * 2**30),
    "iogpu.wired_limit_mb": "0",
    "sysctl.proc_translated": "0",
}


class Mac:
    """The machine.

    Args:
        folder: where its programs and the file of calls lie.
        patch: replaces what is called.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self.folder, self._patch, self._refuses_full = folder, patch, False
        self._write_programs()
        for name in ABSENT:
            patch.delattr(os, name, raising=False)
        patch.setattr(tempfile, "_O_TMPFILE_WORKS", False, raising=False)
        patch.setattr(shutil, "_copyxattr", lambda *_, **__: None)
        proxies = SimpleNamespace(_get_proxy_settings=dict, _get_proxies=dict)
        patch.setitem(sys.modules, "_scproxy", proxies)  # of macOS's Python, which finds the proxies in its settings
        patch.setattr(sys, "platform", "darwin")
        patch.setattr(platform, "machine", lambda: "arm64")
        patch.setattr(platform, "system", lambda: "Darwin")
        patch.setattr(platform, "mac_ver", lambda *_, **__: ("16.0", ("", "", ""), "arm64"))  # as an old Python is told
        patch.setattr(mmap, "PAGESIZE", PAGE)
        patch.setenv("PATH", f"{folder}/bin{os.pathsep}{os.environ['PATH']}")
        patch.setenv("LC_ALL", "C")
        self._replace_calls()

    def _write_programs(self) -> None:
        programs = self.folder / "bin"
        programs.mkdir(exist_ok=True)
        for name, does in PROGRAMS.items():
            if not (programs / name).exists():
                (programs / name).write_text(f'#!/bin/sh\necho "{name} $*" >> "{self.folder}/calls"\n{does}\n')
                (programs / name).chmod(0o755)
        for name, value in SYSCTL.items():
            if not (programs / f"sysctl.{name}").exists():
                self.says(name, value)

    def _replace_calls(self) -> None:
        """Replaces fcntl, of which two commands are macOS's own, and hides /proc."""
        control, opened = fcntl.fcntl, builtins.open

        def record_command(file, command, argument=0):
            if command not in COMMANDS:
                return control(file, command, argument)
            number = file if isinstance(file, int) else file.fileno()
            self.note(f"{COMMANDS[command]} {path_of(number)}")
            if COMMANDS[command] == "F_FULLFSYNC" and self._refuses_full:
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
            return 0

        def open_file(file, *args, **kwargs):
            if isinstance(file, str) and file.startswith("/proc/"):
                self.note(f"/proc {file}")
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), file)
            return opened(file, *args, **kwargs)

        self._patch.setattr(fcntl, "fcntl", record_command)
        for number, name in COMMANDS.items():
            self._patch.setattr(fcntl, name, number, raising=False)
        self._patch.setattr(builtins, "open", open_file)

    def undo(self) -> None:
        """Makes this process run on the real machine again."""
        self._patch.undo()

    def note(self, call: str) -> None:
        """Notes a call."""
        number = os.open(self.folder / "calls", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(number, f"{call}\n".encode(errors="surrogateescape"))
        os.close(number)

    def calls(self, name: str = "") -> list[str]:
        """Returns the arguments of the calls of one name, in order; without a name, whole lines."""
        path = self.folder / "calls"
        lines = path.read_text(errors="surrogateescape").splitlines() if path.exists() else []
        return [line.partition(" ")[2] if name else line for line in lines if not name or line.split(" ")[0] == name]

    def says(self, name: str, value: str | None) -> None:
        """Sets a value of the kernel; None: there is none."""
        path = self.folder / "bin" / f"sysctl.{name}"
        path.unlink(missing_ok=True) if value is None else path.write_text(value + "\n")

    def refuse_full_sync(self) -> None:
        """Makes F_FULLFSYNC fail, as it does on disks of a network."""
        self._refuses_full = True

    def refuse(self, folder: Path) -> None:
        """Makes every look into a folder fail, as macOS does before a person has allowed it. Its name is seen."""
        below = str(folder)

        def refusing(call):
            @wraps(call)
            def guarded(path, *args, **kwargs):
                if isinstance(path, str | os.PathLike):
                    text = os.path.abspath(os.fspath(path))
                    lists = call.__name__ in ("scandir", "listdir", "open")
                    if text.startswith(below + os.sep) or (lists and text == below):
                        self.note(f"refused {text}")
                        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), text)
                return call(path, *args, **kwargs)

            return guarded

        for place, names in ((os, ("stat", "lstat", "scandir", "listdir", "open", "access", "readlink")),
                             (builtins, ("open",)), (io, ("open",))):  # fmt: skip
            for name in names:
                self._patch.setattr(place, name, refusing(getattr(place, name)))

    def fold(self, root: Path) -> None:
        """Lets names below a folder be found as APFS finds them; the names keep the spelling that they were given."""
        top, lstat, listdir = os.fspath(root), os.lstat, os.listdir

        def real(path):
            if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
                return path
            text = os.path.join(os.getcwd(), os.fspath(path))
            if not text.startswith(top + os.sep):
                return path
            at = top
            for name in text[len(top) + 1 :].split(os.sep):
                at = os.path.join(at, name if not name or name in (".", "..") or lexists(at, name) else like(at, name))
            return at

        def lexists(folder, name):
            try:
                lstat(os.path.join(folder, name))
            except OSError:
                return False
            return True

        def like(folder, name):
            try:
                found = next((found for found in listdir(folder) if plain(found) == plain(name)), name)
            except OSError:
                return name
            if found != name:
                self.note(f"folded {name}")
            return found

        def folding(call, count):
            @wraps(call)
            def folded(*args, **kwargs):
                if kwargs.get("dir_fd") is None and kwargs.get("src_dir_fd") is None:
                    args = [real(arg) if i < count else arg for i, arg in enumerate(args)]
                return call(*args, **kwargs)

            return folded

        def renaming(call):
            @wraps(call)
            def renamed(old, new, **kwargs):  # a file may be given another case of its own name
                return call(real(old), new if real(old) == real(new) else real(new), **kwargs)

            return renamed

        one = ("stat", "lstat", "scandir", "listdir", "open", "access", "readlink", "mkdir", "rmdir", "unlink",
               "remove", "chmod", "utime", "statvfs")  # fmt: skip
        for name in one:
            self._patch.setattr(os, name, folding(getattr(os, name), 1))
        self._patch.setattr(os, "link", folding(os.link, 2))
        for name in ("rename", "replace"):
            self._patch.setattr(os, name, renaming(getattr(os, name)))
        for place in (builtins, io):
            self._patch.setattr(place, "open", folding(place.open, 1))
        for place, name in ((safetensors, "safe_open"), (mx, "load")):  # which are not Python's
            self._patch.setattr(place, name, folding(getattr(place, name), 1))
        for module in ("mlx_flux_krea.weights", "mlx_flux_krea.checkpoint"):
            if module in sys.modules:
                self._patch.setattr(sys.modules[module], "safe_open", safetensors.safe_open)


def plain(name: str) -> str:
    """Returns the form in which two names are one to APFS."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def path_of(descriptor: int) -> str:
    """Returns the path of an open file."""
    if hasattr(fcntl, "F_GETPATH"):  # on macOS
        return fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0").decode()
    return os.readlink(f"/proc/self/fd/{descriptor}")


def install(folder: str, folded: str | None = None) -> Mac:
    """Makes this whole process run on a Mac: for the first line of another program.

    Args:
        folder: as of `Mac`.
        folded: as of `Mac.fold`.
    """
    machine = Mac(Path(folder), pytest.MonkeyPatch())
    if folded:
        machine.fold(Path(folded))
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return machine
