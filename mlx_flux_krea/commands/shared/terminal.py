"""Standard error of a command: lines, notes, events and progress; questions and pictures at a terminal."""

import base64
import contextlib
import logging
import os
import re
import select
import shutil
import subprocess
import sys
import termios
import time
import tty
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import click
import mlx.core as mx
from tqdm import tqdm

from mlx_flux_krea.errors import UsageError, printable, shortened
from mlx_flux_krea.presets import STAGES

from .options import with_option_names
from .text import duration, json_text, size

# Variables of programs between a process and its terminal: they swallow pictures, or nobody sits before the display.
_BETWEEN = ("TMUX", "STY", "ZELLIJ", "SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY")
# Variables of terminals that show no pictures by the known protocols; those inside others inherit their names.
_ANOTHER = {"VTE_VERSION", "KONSOLE_VERSION", "XTERM_VERSION", "INSIDE_EMACS", "VIM_TERMINAL", "NVIM"}
# Of each protocol, a question that a terminal which shows pictures by it answers, and the beginning of the answer. All
# terminals answer the one for their attributes, which comes after it.
_QUESTIONS = {
    "kitty": ("\x1b_Gi=31,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\", b"\x1b_Gi=31;OK"),
    "iterm": ("\x1b]1337;ReportCellSize\x07", b"\x1b]1337;ReportCellSize="),
}
_ATTRIBUTES = "\x1b[c", re.compile(rb"\x1b\[\?[\d;]*c")
_LOGGER = logging.getLogger("mlx_flux_krea")
_EVERY = 5.0  # seconds between lines of progress that are not redrawn
_FORMAT = (
    "{desc:<20} {percentage:3.0f}% |{bar}| {n:.{digits}f}/{total:.0f} {unit}s, {rate_inv_fmt}, "
    "{remaining} left{postfix}"
)


class Console:
    """Standard error of one command: text for a person, or events for a program, one JSON object a line.

    Args:
        as_events: write JSON objects.
    """

    def __init__(self, as_events: bool = False):
        self.as_events = as_events
        self._notes: set[str] = set()

    def say(self, text: str, **event) -> None:
        """Writes text, with characters that control a terminal spelled out. A closed standard error is ignored.

        Args:
            text: one line or more.
            event: fields of the event that replaces it; default: {"event": "said", "text": text}.
        """
        if self.as_events:
            self.write(json_text(event or {"event": "said", "text": text}))
        else:
            self.write("\n".join(map(printable, text.split("\n"))))

    def write(self, text: str) -> None:
        """Writes text as it is, such as the escape sequence of a picture."""
        with contextlib.suppress(OSError):
            tqdm.write(f"{text}\n", file=sys.stderr, end="")  # at once: a signal between two writes would join lines

    def result(self, text: str) -> None:
        """Writes a result, to standard output."""
        click.echo(text)

    def note(self, text: str) -> None:
        """Writes a note, with the names of options; the same note is written once."""
        text = shortened(with_option_names(text))
        if text not in self._notes:
            self.say(f"note: {text}")
        self._notes.add(text)

    @contextlib.contextmanager
    def library_notes(self) -> Iterator[None]:
        """Writes the library's log messages as notes within the block."""
        handlers, propagate = _LOGGER.handlers, _LOGGER.propagate
        _LOGGER.handlers, _LOGGER.propagate = [_NoteHandler(self)], False
        self._notes.clear()
        try:
            yield
        finally:
            _LOGGER.handlers, _LOGGER.propagate = handlers, propagate


class _NoteHandler(logging.Handler):
    """Passes log messages to a console."""

    def __init__(self, console: Console):
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one message."""
        self._console.note(record.getMessage())


class PipelineProgress:
    """Progress of a pipeline: a line for each stage with seconds per step, time left and peak memory.

    In the first half second of a stage nothing is shown. Without a terminal a line is written every few seconds. A
    console of events gets an event for every whole unit of every stage.

    Args:
        console: where it is written.
    """

    def __init__(self, console: Console):
        self._console = console
        self._stage: str | None = None
        self._bar: tqdm | None = None
        self._told = 0
        self._start = 0.0
        self._lines = _Lines(console)

    def __call__(self, stage: str, done: float, total: int) -> None:
        """Takes a report of `FluxPipeline`."""
        if self._console.as_events:
            self._tell(stage, int(done + 1e-6), total)
            return
        if self._bar is None or stage != self._stage:
            self.close()
            self._stage, self._bar = stage, _stage_bar(stage, total)
        self._bar.set_postfix_str(size(mx.get_peak_memory()), refresh=False)  # of this stage
        self._bar.update(done - self._bar.n)
        if self._bar.disable:
            self._lines.tell(STAGES[stage].label, STAGES[stage].unit, done, total)
        if done >= total:
            self.close()

    def _tell(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage or done < self._told:
            self._stage, self._told, self._start = stage, 0, time.perf_counter()
        if done > self._told:
            seconds = round(time.perf_counter() - self._start, 3)
            self._console.say("", event="progress", stage=stage, done=done, total=total, seconds=seconds)
            self._told = done

    def close(self) -> None:
        """Removes the line."""
        if self._bar is not None:
            self._bar.close()
            self._bar, self._stage = None, None


def _stage_bar(stage: str, total: int) -> tqdm:
    label, unit = STAGES[stage].label, STAGES[stage].unit
    layout = _FORMAT.replace("{digits}", "1" if unit == "step" else "0")
    return tqdm(total=total, desc=label, unit=unit, bar_format=layout, delay=0.5, disable=None, leave=False)


class _Lines:
    """Progress where nothing can be redrawn, as in a log: a line every few seconds of the same work.

    Args:
        console: where it is written.
    """

    def __init__(self, console: Console):
        self._console = console
        self._work: tuple[str, float] | None = None
        self._start = self._last = self._first = 0.0

    def tell(self, label: str, unit: str, done: float, total: float) -> None:
        """Takes a report of so many units done; bytes have the unit B."""
        now = time.perf_counter()
        if (label, total) != self._work:
            self._work, self._start, self._last, self._first = (label, total), now, now, done
        if now - self._last < _EVERY or done >= total:
            return
        self._last, work = now, done - self._first
        left = f", {duration((now - self._start) / work * (total - done))} left" if work > 0 else ""
        count = f"{size(done)} of {size(total)}" if unit == "B" else f"{unit} {int(done)} of {total:.0f}"
        self._console.say(f"{label.strip()}: {count}{left}")


class ByteProgress:
    """Progress in bytes, with speed and time left; without a terminal a line every few seconds.

    Args:
        units: of labels that count something else.
    """

    def __init__(self, units: Mapping[str, str] | None = None):
        self._units = units or {}
        self._bar: tqdm | None = None
        self._lines = _Lines(Console())

    def __call__(self, label: str, done: int, total: int) -> None:
        """Takes a report of the converter."""
        if self._bar is not None and self._bar.total != total:  # the next kind of work
            self.close()
        if self._bar is None:
            other = self._units.get(label)
            unit = f" {other}s" if other else "B"
            self._bar = tqdm(
                total=total, initial=done, unit=unit, unit_scale=not other, delay=0.5, disable=None, leave=False
            )
        self._bar.set_description(f"{label:<16}", refresh=False)
        self._bar.update(done - self._bar.n)
        if self._bar.disable:
            self._lines.tell(label, self._units.get(label, "B"), done, total)

    def close(self) -> None:
        """Removes the line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def counted(items: Iterable, label: str, unit: str, total: int | None = None) -> tqdm:
    """Iterates over items with a progress line; `total` is their number where they do not know it."""
    return tqdm(items, desc=label, unit=unit, total=total, delay=0.5, disable=None, leave=False)


def is_interactive() -> bool:
    """True where a person at a terminal can be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def confirmed(question: str, yes: bool) -> bool:
    """Asks a question of yes or no.

    Args:
        question: without its question mark.
        yes: --yes was given: nothing is asked.

    Raises:
        UsageError: there is no terminal to ask at.
    """
    if not yes and not is_interactive():
        raise UsageError(f"{question}: there is no terminal to ask at", "", "confirm with --yes")
    return yes or click.confirm(f"{printable(question)}?", err=True)


def protocol() -> str | None:
    """Returns the protocol ("iterm", "kitty") by which the terminal at hand shows pictures; None: none that is known.

    Only variables count that terminals themselves set; others are inherited from one terminal by the next.
    """
    if _is_between() or _ANOTHER & os.environ.keys():
        return None
    terminal, program = os.environ.get("TERM", ""), os.environ.get("TERM_PROGRAM", "")
    if terminal in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    if terminal and not re.fullmatch(r"xterm(-\w+)?|wezterm", terminal):  # of another one
        return None
    return {"iTerm.app": "iterm", "WezTerm": "iterm", "ghostty": "kitty"}.get(program)


def _is_between() -> bool:
    """True where a multiplexer or a remote connection stands between this process and the terminal."""
    multiplexed = os.environ.get("TERM", "").startswith(("screen", "tmux"))
    return multiplexed or any(os.environ.get(name) for name in _BETWEEN)


def asked(kind: str, patience: float = 1.0) -> bool | None:
    """Asks the terminal at hand whether it shows pictures by a protocol; None: there is none to ask.

    Args:
        kind: "iterm" or "kitty".
        patience: seconds to wait for an answer.
    """
    if not is_interactive():
        return None
    question, answer = _QUESTIONS[kind]
    keys, heard, end = sys.stdin.fileno(), b"", time.monotonic() + patience
    before = termios.tcgetattr(keys)
    try:
        tty.setcbreak(keys)  # else the answer is shown, and waits for a new line
        os.write(sys.stderr.fileno(), (question + _ATTRIBUTES[0]).encode())
        while not _ATTRIBUTES[1].search(heard) and select.select([keys], [], [], max(0, end - time.monotonic()))[0]:
            heard += os.read(keys, 1024)
    finally:
        termios.tcsetattr(keys, termios.TCSAFLUSH, before)
    return answer in heard


def say_path(path: Path | None) -> None:
    """Prints a path on standard output: as it is for a program, with control characters spelled out at a terminal."""
    click.echo(printable(str(path)) if sys.stdout.isatty() else path, color=True)  # which strips nothing


def inline_picture(data: bytes, rows: int | None = None) -> str | None:
    """Encodes a PNG as the escape sequence by which this terminal shows it; None: it is not known to show pictures.

    Args:
        data: the file's bytes.
        rows: lines that it takes, with the cursor left in place; None: as many as its pixels need.
    """
    kind = protocol()
    encoded = base64.b64encode(data).decode()
    if kind == "iterm":
        height = f"height={rows};" if rows else ""
        return f"\x1b]1337;File=inline=1;{height}preserveAspectRatio=1:{encoded}\x07"
    if kind == "kitty":
        place = f"r={rows},C=1,i=1,q=2," if rows else ""  # a later picture with the same number replaces it
        chunks = [encoded[i : i + 4096] for i in range(0, len(encoded), 4096)] or [""]
        heads = [f"a=T,f=100,{place}"] + [""] * (len(chunks) - 1)
        more = [1] * (len(chunks) - 1) + [0]
        return "".join(f"\x1b_G{h}m={m};{chunk}\x1b\\" for h, m, chunk in zip(heads, more, chunks, strict=True))
    return None


def show_picture(path: Path, console: Console) -> bool:
    """Shows a PNG in the terminal where it is known to do that (iTerm2, kitty), else in the platform's viewer.

    Nothing is tried behind a multiplexer or a remote connection, where nobody may see it.

    Returns:
        True where the picture can be expected to be visible.
    """
    if inline := inline_picture(path.read_bytes()):
        console.write(inline)
        return True
    viewer = shutil.which("open" if sys.platform == "darwin" else "xdg-open")
    has_display = sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    if viewer is None or not has_display or _is_between():
        return False
    ran = subprocess.run([viewer, path], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return ran.returncode == 0
