"""The errors that a user can meet. Each class has its exit code of the command line.

A message has up to three parts: found, expected, next step. Programming errors are not here: they are `ValueError`s in
MLX's form, with the class and the argument in brackets.
"""

import re
import reprlib
from typing import Self

__all__ = [
    "CredentialsError", "FiltersError", "FluxKreaError", "Interrupted", "MachineError", "ModelError", "PartlyDone",
    "ResourceError", "UsageError",
    "Waiting", "Withheld", "amount", "gpu_error", "printable", "short_repr", "shortened",
]  # fmt: skip


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_ERRNO = re.compile(r"\[(?:Errno|WinError) -?\d+\] ")
_GPU = re.compile(r"\[METAL\]|\[metal::|command buffer|\[malloc\] Unable to allocate", re.IGNORECASE)
_WORD, _MESSAGE = 400, 4000  # characters that are shown of a word, and of a message


class FluxKreaError(Exception):
    """Base of all errors that a user can mend.

    Args:
        found: the fault, with its file and tensor, or its option.
        expected: the value or state that was expected.
        todo: the next step, usually a command.
    """

    exit_code = 1

    def __init__(self, found: str, expected: str = "", todo: str = ""):
        self.found, self.expected, self.todo = found, expected, todo
        super().__init__(found, expected, todo)

    def __str__(self) -> str:
        expected = f"expected {self.expected}" if self.expected else ""
        return shortened("; ".join(part for part in (self.found, expected, self.todo) if part))

    def with_next_step(self, todo: str) -> Self:
        """Returns the same error with one more next step; an error itself never changes."""
        return type(self)(self.found, self.expected, "; ".join(filter(None, (self.todo, todo))))


class UsageError(FluxKreaError, ValueError):
    """An option, a prompt, an input image or an output path that cannot be used."""

    exit_code = 2


class ModelError(FluxKreaError):
    """A model or a source that is missing, damaged, not understood or not reachable."""

    exit_code = 3


class MachineError(FluxKreaError):
    """A check of `flux-krea doctor --chip` that this machine does not pass: it may compute other pictures."""

    exit_code = 3


class Withheld(FluxKreaError):
    """A filter flagged the prompt, the input image or the pictures; nothing was released."""

    exit_code = 4


class Waiting(FluxKreaError):
    """Pictures wait for a person's review."""

    exit_code = 5


class FiltersError(FluxKreaError):
    """Filters that the model's licence requires, or their log, are missing or unhealthy; nothing was released."""

    exit_code = 6


class CredentialsError(FluxKreaError):
    """A picture that must be signed cannot be: its certificate, its key or the signature is at fault."""

    exit_code = 6


class PartlyDone(FluxKreaError):
    """A part was done: some pictures, rows or lines, and not the others."""

    exit_code = 7


class ResourceError(FluxKreaError):
    """Not enough memory or disk, found before starting."""

    exit_code = 8


class Interrupted(FluxKreaError):
    """Stopped by `FluxPipeline.interrupt()` or by a signal; nothing was released."""

    exit_code = 130


def printable(text: str) -> str:
    """Returns the text as one line for a terminal, with other characters (escapes in a file's name) spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str) -> str:
    """Returns a message without the middle of words (names in hostile files) and of texts that nobody would read.

    Numbers of the system's errors are left out: the text after them says the same.
    """
    text = _ERRNO.sub("", text)
    text = re.sub(rf"\S{{{_WORD + 1},}}", lambda word: _without_middle(word[0], _WORD), text)
    return _without_middle(text, _MESSAGE)


def _without_middle(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    kept = most // 2 - 20
    return f"{text[:kept]}[... {len(text) - 2 * kept} characters ...]{text[-kept:]}"


def short_repr(kind: str, *values: object, **facts: object) -> str:
    """Returns one line about an object, Kind(value, name=fact, ...): arrays as their shapes, long texts shortened."""
    shown = [_short(value) for value in values] + [f"{name}={_short(fact)}" for name, fact in facts.items()]
    return f"{kind}({', '.join(shown)})"


def _short(value: object) -> str:
    shape = getattr(value, "shape", None)
    return f"<array {tuple(shape)}>" if shape is not None else _SHORT.repr(value)


def gpu_error(error: BaseException) -> ResourceError | None:
    """Returns the error for a person where MLX's allocator or a command of the GPU failed; None: it is another one.

    MLX raises RuntimeError for both (mlx/backend/metal: device.cpp, allocator.cpp). The system ends commands that keep
    the GPU too long while the display needs it (ml-explore/mlx#3267).
    """
    if not isinstance(error, RuntimeError) or not _GPU.search(str(error)):
        return None
    reason = " ".join(str(error).split())
    todo = "try again; close other programs, let the display sleep, or make a smaller picture; `memory` sets a limit"
    return ResourceError(f"the GPU failed: {reason}", "", todo)


def amount(count: int | str, one: str, many: str = "") -> str:
    """Returns a count and its noun: 1 file, 2 files. `many` is the plural where an s is not enough."""
    return f"{count} {one if str(count) == '1' else many or one + 's'}"
