"""The words of a command line as a person typed them, and the line that was meant, which answers propose."""

import itertools
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import click

from mlx_flux_krea.errors import UsageError

_DASHES = "‐‑‒–—―−"  # as text programs write hyphens
_OPEN, _CLOSED = "“„‟«‘", "”“‟»’"  # as text programs write quotation marks
_LONG_DASH = re.compile(rf"[{_DASHES}]+-?([A-Za-z][\w-]*)((?:=.*)?)", re.DOTALL)
_CURLY = re.compile(rf"[{_OPEN}]([^{_OPEN}{_CLOSED}]*)[{_CLOSED}]")
_JOINED = re.compile(r"(-[A-Za-z])=(.*)", re.DOTALL)
_EQUAL = re.compile(r"(--?[A-Za-z][\w-]*)=(.*)", re.DOTALL)
_UNIT = re.compile(r"(?:[kmgt]i?)?b|[kmgt]i?", re.I)
_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]{1,11}$")


def check(command: click.Command, argv: Sequence[str]) -> None:
    """Checks words that would be taken for something else: a long dash, -o=FILE, an amount in two words.

    Raises:
        UsageError: one of them.
    """
    ours = options_of(command)
    words = list(itertools.takewhile(lambda word: word != "--", argv))
    for before, word, after in zip(["", *words], words, [*words[1:], ""], strict=False):
        if (option := ours.get(before)) and takes_value(option) and (match := _CURLY.fullmatch(word)):
            raise UsageError(
                f"{word} stands in curly quotes", "straight ones", f"write {before} {shlex.quote(match[1])}"
            )
        if (typed := _EQUAL.fullmatch(word)) and typed[1] in ours and (match := _CURLY.fullmatch(typed[2])):
            value = shlex.quote(match[1])
            raise UsageError(f"{typed[2]} stands in curly quotes", "straight ones", f"write {typed[1]} {value}")
        if (match := _LONG_DASH.fullmatch(word)) and (option := _with_hyphens(match[1])) in ours:
            value = shlex.quote(after) if takes_value(ours[option]) and after and not match[2] else ""
            typed = f"{option}{match[2]} {value}".rstrip()
            raise UsageError(f"{word} begins with a long dash", "a hyphen or two", f"write {typed}")
        if (match := _JOINED.match(word)) and (option := ours.get(match[1])) and takes_value(option):
            value = match[2] if re.fullmatch(r"~/[\w./-]+", match[2]) else shlex.quote(match[2])
            raise UsageError(f"in {word} the value begins with =", f"{match[1]} {value}")
        if word == "--memory" and re.fullmatch(r"\d+(\.\d+)?", after):
            unit = "".join(words[words.index(word) + 2 :][:1])
            if _UNIT.fullmatch(unit):
                raise UsageError(f"--memory {after} {unit} is an amount in two words", f"--memory {after}{unit}")


def options_of(command: click.Command) -> dict[str, click.Option]:
    """Returns the options of a command by each of their spellings."""
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    return {spelling: option for option in options for spelling in (*option.opts, *option.secondary_opts)}


def takes_value(option: click.Option) -> bool:
    """Returns False for an option that stands alone."""
    return not (option.is_flag or option.count)


def values_after(name: str, argv: Iterable[str]) -> list[str]:
    """Returns the words that follow an option, up to the next one; or the text after = or after its letter."""
    words = list(argv)
    for at, word in enumerate(words):
        if word == name:
            return list(itertools.takewhile(lambda one: not re.match(r"-[^\d.]", one), words[at + 1 :]))
        if word.startswith(f"{name}="):
            return [word.partition("=")[2]]
        if len(name) == 2 and name[1] != "-" and word.startswith(name):
            return [word[2:]]
    return []


def quoted(text: str) -> str:
    """Returns a text in double quotes, or in single ones where a shell would read inside of these."""
    return shlex.quote(text) if re.search(r'["$`\\!]', text) else f'"{text}"'


@dataclass
class Line:
    """The words of a verb: its arguments, and its options with their values.

    Attributes:
        arguments: words that belong to no option.
        options: each option as it was typed, with its values.
        unknown: options that the verb does not have.
        spaced: an option and its path, where a path with spaces was not quoted.
    """

    arguments: list[str]
    options: list[list[str]]
    unknown: list[str]
    spaced: tuple[str, str] | None = None

    def meant(self, path: str, prompt: bool) -> str:
        """Returns the command line that was meant.

        Args:
            path: the command and its verb.
            prompt: the arguments are the words of one prompt.
        """
        arguments = (
            [quoted(" ".join(self.arguments))] if prompt and self.arguments else map(shlex.quote, self.arguments)
        )
        return " ".join([path, *arguments, *(shlex.quote(word) for words in self.options for word in words)])


def read(command: click.Command, words: Sequence[str]) -> Line:
    """Reads the words after a verb as they were meant: with hyphens for dashes, and curly quotes as quotes."""
    ours, line, left = options_of(command), Line([], [], []), list(_straightened(words))
    while left:
        word = left.pop(0)
        if match := _LONG_DASH.fullmatch(word):
            word = _with_hyphens(match[1]) + match[2]
        option = ours.get(word.partition("=")[0])
        if word == "--":
            line.arguments += left
            break
        if option is None:
            is_argument = not word.startswith("-") or word == "-" or re.search(r"\s", word)
            (line.arguments if is_argument else line.unknown).append(word)
        elif "=" in word or not takes_value(option):
            line.options.append([word])
        else:
            line.options.append([word, *_values(option, word, left, line)])
    return line


def _values(option: click.Option, name: str, left: list[str], line: Line) -> list[str]:
    """Takes the values of an option from the words that are left."""
    if option.name == "seed":
        taken = list(itertools.takewhile(re.compile(r"\d[\d+,]*").fullmatch, left))
        del left[: len(taken)]
        return taken
    if option.name == "preview" and not _SUFFIX.search("".join(left[:1])):
        return []
    taken = left[:1]
    del left[:1]
    if isinstance(option.type, click.Path) and taken and (count := _rest_of_path(taken[0], left)):
        taken = [" ".join([*taken, *left[:count]])]
        del left[:count]
        line.spaced = line.spaced or (name, taken[0])
    return taken


def _rest_of_path(first: str, following: Sequence[str]) -> int:
    """Returns how many words more belong to a path that was not quoted."""
    words = list(itertools.takewhile(lambda word: not word.startswith("-") and not re.search(r"\s", word), following))
    if os.path.exists(first) or _SUFFIX.search(first):
        return 0
    counts = range(1, len(words) + 1)
    there = [count for count in counts if os.path.exists(" ".join([first, *words[:count]]))]
    return next(iter([*there, *(count for count in counts if _SUFFIX.search(words[count - 1]))]), 0)


def _straightened(words: Sequence[str]) -> Iterator[str]:
    """Yields the words, with those between curly quotes as one."""
    left = list(words)
    while left:
        word = left.pop(0)
        before, mark, text = re.fullmatch(rf"((?:-[\w-]+=)?)([{_OPEN}]?)(.*)", word, re.DOTALL).groups()  # type: ignore[union-attr]
        end = next((i for i, one in enumerate([text, *left]) if one.endswith(tuple(_CLOSED))), None) if mark else None
        if end is None:
            yield word
            continue
        yield before + " ".join([text, *left[:end]])[:-1]
        del left[:end]


def has_curly_quotes(words: Iterable[str]) -> bool:
    """Returns True where a word begins with a quotation mark that no shell knows."""
    return any(re.match(rf"(?:-[\w-]+=)?[{_OPEN}]", word) for word in words)


def _with_hyphens(name: str) -> str:
    return f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}"
