"""The errors that a user can meet. Each one knows the exit code of the command line (DESIGN, section 9).

A message has up to three parts: what was found, what was expected, what to do next. Programming errors are not here:
they are plain `ValueError`s in MLX's form, with the class and the argument in brackets.
"""

__all__ = [
    "FiltersError", "FluxKreaError", "Interrupted", "ModelError", "ResourceError", "UsageError", "Waiting", "Withheld",
    "printable",
]  # fmt: skip


class FluxKreaError(Exception):
    """Base of all errors that are a user's to mend.

    Args:
        found: what was found, with the file and tensor or the option that it is about.
        expected: what should have been there.
        todo: what to do next, usually a command.
    """

    exit_code = 1

    def __init__(self, found: str, expected: str = "", todo: str = ""):
        self.found, self.expected, self.todo = found, expected, todo
        super().__init__(found, expected, todo)

    def __str__(self) -> str:
        expected = f"expected {self.expected}" if self.expected else ""
        return "; ".join(part for part in (self.found, expected, self.todo) if part)


class UsageError(FluxKreaError, ValueError):
    """An option, a prompt, an input image or an output path that cannot be used."""

    exit_code = 2


class ModelError(FluxKreaError):
    """A model or a source that is missing, damaged, not understood or not reachable."""

    exit_code = 3


class Withheld(FluxKreaError):
    """A filter flagged what was asked for or what was drawn; nothing was released."""

    exit_code = 4


class Waiting(FluxKreaError):
    """What was drawn waits for a person's review."""

    exit_code = 5


class FiltersError(FluxKreaError):
    """Filters that the model's licence requires, or their log, are missing or unhealthy; nothing was released."""

    exit_code = 6


class ResourceError(FluxKreaError):
    """Not enough memory or disk, found before starting."""

    exit_code = 8


class Interrupted(FluxKreaError):
    """Stopped by `FluxPipeline.interrupt()` or by a signal; nothing was released."""

    exit_code = 130


def printable(text: str) -> str:
    """The text as one line for a terminal: what does not print, such as an escape in a file's name, is spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def amount(count: int | str, one: str, many: str = "") -> str:
    """A count, or some of them, and what is counted: 1 file, 2 files; `many` where an s does not do."""
    return f"{count} {one if str(count) == '1' else many or one + 's'}"
