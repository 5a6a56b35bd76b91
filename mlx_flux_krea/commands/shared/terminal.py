"""What the commands have in common: progress lines, notes and pictures, on stderr; tables and sizes, as text."""

import base64
import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import click
from tqdm import tqdm

from mlx_flux_krea.errors import UsageError, printable

_STAGES = {
    "check": ("checking", "layer"),
    "text": ("reading the prompt", "layer"),
    "image": ("reading the image", "stage"),
    "modulation": ("preparing", "layer"),
    "denoise": ("drawing", "step"),
    "decode": ("developing", "stage"),
}
_FORMAT = (
    "{desc:<20} {percentage:3.0f}% |{bar}| {n:.{digits}f}/{total:.0f} {unit}s, {rate_inv_fmt}, "
    "{remaining} left{postfix}"
)


_as_events = False


def tell_events(wanted: bool) -> None:
    """From now on what is said, and progress, are JSON objects, one a line; or not."""
    global _as_events
    _as_events = wanted


def telling_events() -> bool:
    """Whether they are."""
    return _as_events


def say(text: str, **event) -> None:
    """A line for the person who waits, if there still is one.

    Args:
        text: the line.
        event: what a program is told instead; nothing: {"event": "said", "text": text}.
    """
    if _as_events:
        text = json.dumps(event or {"event": "said", "text": text}, ensure_ascii=False)
    with contextlib.suppress(OSError):
        tqdm.write(text, file=sys.stderr)


def note(text: str) -> None:
    """A note as the library's own are: shown once, see `show_notes`."""
    logging.getLogger("mlx_flux_krea").warning(text)


def is_typed() -> bool:
    """Whether a person at a terminal can be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def agreed(question: str, yes: bool) -> bool:
    """What the person at the terminal answers to a question of yes or no.

    Args:
        question: without its mark.
        yes: the answer was given on the command line.

    Raises:
        UsageError: there is nobody to ask.
    """
    if not yes and not is_typed():
        raise UsageError(f"{question}: there is no terminal to ask at", "", "say it with --yes")
    return yes or click.confirm(f"{question}?", err=True)


def several(values: Iterable) -> str:
    """The different ones of some values, or the first and the last of many."""
    shown = list(dict.fromkeys(map(str, values)))
    return ", ".join(shown if len(shown) <= 6 else [*shown[:3], f"... {shown[-1]}"])


class PipelineProgress:
    """The pipeline's progress as one line a stage: seconds per step, time left, memory; silent without a terminal.

    A stage of less than half a second shows nothing. Where events are told, every whole unit is one, in any stage.
    """

    def __init__(self):
        self._stage = None
        self._bar = None
        self._told = 0
        self._begin = 0.0

    def __call__(self, stage: str, done: float, total: int) -> None:
        """As `FluxPipeline` reports it."""
        if _as_events:
            self._tell(stage, int(done + 1e-6), total)
            return
        if stage != self._stage:
            self.close()
            label, unit = _STAGES[stage]
            self._stage = stage
            layout = _FORMAT.replace("{digits}", "1" if unit == "step" else "0")
            self._bar = tqdm(
                total=total, desc=label, unit=unit, bar_format=layout, delay=0.5, disable=None, leave=False
            )
        self._bar.set_postfix_str(size(sys.modules["mlx.core"].get_peak_memory()), refresh=False)  # of this stage
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.close()

    def _tell(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage or done < self._told:
            self._stage, self._told, self._begin = stage, 0, time.perf_counter()
        if done > self._told:
            seconds = round(time.perf_counter() - self._begin, 3)
            say("", event="progress", stage=stage, done=done, total=total, seconds=seconds)
            self._told = done

    def close(self) -> None:
        """Takes the line away."""
        if self._bar is not None:
            self._bar.close()
            self._bar, self._stage = None, None


def counted(items: list, label: str, unit: str) -> tqdm:
    """The items one by one, with how many are done and the time left."""
    return tqdm(items, desc=label, unit=unit, delay=0.5, disable=None, leave=False)


class ByteProgress:
    """Bytes done of all, with speed and time left."""

    def __init__(self):
        self._bar = None

    def __call__(self, label: str, done: int, total: int) -> None:
        """As `convert` reports it."""
        if self._bar is not None and self._bar.total != total:  # bytes of another kind
            self.close()
        if self._bar is None:
            self._bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, delay=0.5, disable=None, leave=False)
        self._bar.set_description(f"{label:<16}", refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Takes the line away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class NoteHandler(logging.Handler):
    """The library's notes (a size changed, a prompt cut off) as lines on stderr, each of them once."""

    def __init__(self):
        super().__init__()
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """One note."""
        note = printable(record.getMessage())
        if note not in self._shown:
            say(f"note: {note}")
        self._shown.add(note)


def show_notes() -> None:
    """Sends the library's notes to stderr."""
    logger = logging.getLogger("mlx_flux_krea")
    logger.handlers = [NoteHandler()]
    logger.propagate = False


def table(rows: list[tuple], right: tuple[int, ...] = ()) -> str:
    """Rows as aligned columns.

    Args:
        rows: cells, of any type.
        right: columns aligned to the right.
    """
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = (
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def size(count: int) -> str:
    """Bytes for people: 23.8 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit in ("B", "kB") else f"{count:.1f} {unit}"
        count /= 1000


def stage_times(seconds: dict[str, float]) -> str:
    """How long each stage took: text 1.2 s, denoise 40.1 s."""
    return ", ".join(f"{stage} {took:.1f} s" for stage, took in seconds.items())


def number(count: int) -> str:
    """Parameters for people: 11.90 B."""
    for limit, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= limit:
            return f"{count / limit:.2f}{unit}"
    return str(count)


def inline_picture(data: bytes, rows: int | None = None) -> str | None:
    """What makes this terminal show a PNG where it writes; None: it cannot.

    Args:
        data: the file's bytes.
        rows: lines that it takes, the cursor staying where it is; None: as many as it has pixels for.
    """
    program = os.environ.get("LC_TERMINAL") or os.environ.get("TERM_PROGRAM", "")
    encoded = base64.b64encode(data).decode()
    if program in ("iTerm2", "iTerm.app", "WezTerm"):
        height = f"height={rows};" if rows else ""
        return f"\x1b]1337;File=inline=1;{height}preserveAspectRatio=1:{encoded}\x07"
    if "KITTY_WINDOW_ID" in os.environ or program == "ghostty":
        place = f"r={rows},C=1,i=1,q=2," if rows else ""  # the next of the same number takes its place
        chunks = [encoded[i : i + 4096] for i in range(0, len(encoded), 4096)] or [""]
        heads = [f"a=T,f=100,{place}"] + [""] * (len(chunks) - 1)
        more = [1] * (len(chunks) - 1) + [0]
        return "".join(f"\x1b_G{h}m={m};{chunk}\x1b\\" for h, m, chunk in zip(heads, more, chunks, strict=True))
    return None


def show_picture(path: Path) -> bool:
    """Shows a PNG to the person at this terminal: in it where it can (iTerm2, kitty), else in the platform's viewer.

    Returns:
        Whether that can be expected to have worked.
    """
    if inline := inline_picture(path.read_bytes()):
        say(inline)
        return True
    viewer = shutil.which("open" if sys.platform == "darwin" else "xdg-open")
    if viewer is None or (sys.platform != "darwin" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()):
        return False
    ran = subprocess.run([viewer, path], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return ran.returncode == 0
