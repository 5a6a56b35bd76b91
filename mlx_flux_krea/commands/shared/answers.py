"""Answers to command lines that cannot be parsed: what was found, what was expected, and what to type."""

import difflib
import itertools
import re
import shlex
from collections.abc import Iterable, Sequence

import click

from . import peers

# Options and verbs that remove things or skip a question: nobody is led to them by a typing error.
NEVER = {"--force", "--yes", "--discard-source", "--allow-nonfinite", "--allow-unknown-filter", "purge", "rm"}
_LIKENESS = 0.7  # of two names, from 0 to 1
_VALUE = re.compile(r"(?P<value>.+) is (?:not a valid|not in the range)", re.DOTALL)
_CONVERTING = ("convert", "setup")


def answer(error: click.ClickException, context: click.Context, argv: Sequence[str]) -> str:
    """Returns the answer to a command line that click refuses.

    Args:
        error: click's.
        context: of the command that refused it.
        argv: the words of the command line.
    """
    text = error.format_message().rstrip(".?")
    is_misread = isinstance(error, click.NoSuchOption) or text.startswith("Got unexpected extra argument")
    if is_misread and (found := _one_dash(context, argv)):
        return found
    if isinstance(error, click.NoSuchOption):
        return _no_option(error.option_name, context)
    if isinstance(error, click.BadOptionUsage):
        return _no_value(error.option_name, context) or text
    if isinstance(error, click.MissingParameter) and error.param:
        return f"{_label(error.param)} is missing; expected {_wanted(error.param)}"
    if isinstance(error, click.BadParameter) and error.param:
        return bad_value(_label(error.param), error.param, error.message, context)
    if text.startswith("Got unexpected extra argument"):
        return _too_many(context, text)
    match = re.match(r"No such command (['\"])(?P<name>.*)\1$", error.message.rstrip("."), re.DOTALL)
    if match and isinstance(context.command, click.Group):
        return _unknown_verb(match["name"], context.command.list_commands(context), context.command_path)
    return text


def nearest(word: str, names: Iterable[str]) -> str | None:
    """Returns the name that a word was meant to be: the most similar, or the only one that it begins; None: none is.

    Names that remove things are never returned.
    """
    plain = {name.lstrip("-").replace("_", "-").lower(): name for name in names if name not in NEVER}
    word = word.lstrip("-").replace("_", "-").lower()
    if word in plain:
        return plain[word]
    begun = [name for name in plain if len(word) > 2 and name.startswith(word)]
    near = begun if len(begun) == 1 else difflib.get_close_matches(word, [n for n in plain if len(n) > 1], 1, _LIKENESS)
    return plain[near[0]] if near else None


def _unknown_verb(word: str, names: list[str], command: str) -> str:
    """Returns the answer to a verb that does not exist.

    Args:
        word: the verb.
        names: those that do.
        command: in front of it.
    """
    others = peers.VERBS if command == "flux-krea" else peers.SUBVERBS
    if re.search(r"\s", word.strip()):
        return f'{word!r} is no command; for a picture of it: {command} generate "{word[:40]}"'
    found = f"there is no command {word!r}"
    if (near := others.get(word.lower())) in names:
        return f"{found}; write {command} {near}"
    if command == "flux-krea" and (text := peers.MISSING_VERBS.get(word.lower())):
        return f"{found}; {text}"
    if near := nearest(word, names):
        return f"{found}; did you mean {command} {near}?"
    return f"{found}; expected {', '.join(name for name in names if name not in NEVER)}"


def number_wanted(kind: click.ParamType) -> str:
    """Returns the numbers that a type takes, in words; "" where it takes something else."""
    if not isinstance(kind, click.types.IntParamType | click.types.FloatParamType):
        return ""
    noun = "a whole number" if isinstance(kind, click.types.IntParamType) else "a number"
    low, high = getattr(kind, "min", None), getattr(kind, "max", None)
    if low is not None and high is not None:
        return f"{noun} from {low:{_digits(low)}} to {high:{_digits(high)}}"
    return noun if low is None else f"{noun} from {low:{_digits(low)}}"


def _digits(number: float) -> str:
    return "d" if isinstance(number, int) else "g"


def _one_dash(context: click.Context, argv: Sequence[str]) -> str | None:
    """Returns the answer to a word such as -steps, which is read as letters; None: there is none."""
    ours = {option for parameter in context.command.params for option in parameter.opts}
    for word in itertools.takewhile(lambda word: word != "--", argv):
        name = word.partition("=")[0]
        if re.match(r"-[A-Za-z]{2}", name) and (option := f"-{name.replace('_', '-')}") in ours:
            return f"{name} is read as one letter after the other; expected {option}"
    return None


def _no_option(name: str, context: click.Context) -> str:
    """Returns the answer to an option that the command does not have."""
    found = f"there is no option {name}"
    command, verb = context.command, context.info_name or ""
    if isinstance(command, click.Group) and not context.parent:
        return f"{found} before a command; expected one first: flux-krea generate"
    ours = [option for parameter in command.params for option in parameter.opts if isinstance(parameter, click.Option)]
    if len(name) == 3 and name[1:] in ours:
        return f"{found}; did you mean {name[1:]}?"
    if known := nearest(name, [option for option in ours if option.startswith("--")]):
        exact = known.lstrip("-") == name.lstrip("-").replace("_", "-").lower()
        if exact or not peers.find(name):
            return f"{found}; did you mean {known}?"
    table = peers.CONVERTING if verb in _CONVERTING else peers.OPTIONS
    if row := peers.find(name, table):
        tools, text = row
        elsewhere = set(re.findall(r"write (-[\w-]+)", text)) - set(ours)
        return f"{found} (of {tools}); {'with flux-krea generate, ' * bool(elsewhere)}{text}"
    if name not in NEVER and name in _options_of("generate", context):
        return f"{found} of {context.command_path}; flux-krea generate has it"
    return found


def _options_of(verb: str, context: click.Context) -> set[str]:
    """Returns the options of a verb of the group that a context belongs to."""
    group = context.find_root().command
    command = group.get_command(context, verb) if isinstance(group, click.Group) else None
    return {option for parameter in command.params for option in parameter.opts} if command else set()


def _no_value(name: str, context: click.Context) -> str | None:
    """Returns the answer to an option without its value, or to a flag with one; None: the option is not known."""
    parameter = next((p for p in context.command.params if name in (*p.opts, *p.secondary_opts)), None)
    if parameter is None:
        return None
    if getattr(parameter, "is_flag", False):
        return f"{name} takes no value; expected {name} alone"
    return f"{name} has no value; expected {_wanted(parameter)}"


def bad_value(label: str, parameter: click.Parameter, message: str, context: click.Context | None = None) -> str:
    """Returns the answer to a value that an option does not take.

    Args:
        label: the option, as the place spells it.
        parameter: the option.
        message: click's own.
        context: of the command; None: the value comes from a file.
    """
    message, kind = message.rstrip("."), parameter.type
    wanted = number_wanted(kind)
    if wanted and (match := _VALUE.match(message)):
        return _found(label, match["value"].strip("'\"").removesuffix(".0"), wanted, context)
    if isinstance(kind, click.Choice) and (match := re.match(r"'(.*?)' is not one of", message, re.DOTALL)):
        near = nearest(match[1].replace("x", ":").replace("/", ":"), map(str, kind.choices))
        text = _found(label, match[1], _wanted(parameter), context)
        return f"{text}; did you mean {near}?" if near else text
    return f"{label}: {message}"


def _found(label: str, value: str, wanted: str, context: click.Context | None) -> str:
    """Returns the text for a wrong value, which may be the next option."""
    options = {option for p in context.command.params for option in p.opts} if context else set()
    if value in options:
        return f"{label} has no value, {value} follows; expected {wanted}"
    return f"{label} is {value!r}; expected {wanted}"


def _too_many(context: click.Context, text: str) -> str:
    """Returns the answer to arguments after the last that a command takes: mostly a prompt without quotes."""
    match = re.search(r"\((.*)\)$", text, re.DOTALL)
    extra = match[1] if match else ""
    if any(parameter.name == "prompt" for parameter in context.command.params):
        return f'{extra!r} follows the prompt; expected a prompt in quotes: {context.command_path} "a frog on a log"'
    count = sum(isinstance(parameter, click.Argument) for parameter in context.command.params)
    taken = ("no argument", "one argument")[count] if count < 2 else f"{count} arguments"
    by_option = any("-m" in parameter.opts for parameter in context.command.params)
    named = f"; a model is named with -m: {context.command_path} -m {shlex.quote(extra)}" if by_option else ""
    return f"there is an argument too many: {extra!r}; expected {taken}{named}"


def _label(parameter: click.Parameter) -> str:
    """Returns a parameter as users write it."""
    return parameter.human_readable_name if isinstance(parameter, click.Argument) else max(parameter.opts, key=len)


def _wanted(parameter: click.Parameter) -> str:
    """Returns the values that a parameter takes, in words."""
    kind = parameter.type
    if isinstance(kind, click.Choice):
        *most, last = map(str, kind.choices)
        return f"{', '.join(most)} or {last}"
    if wanted := number_wanted(kind):
        return wanted
    if isinstance(kind, click.Path):
        return "a path"
    if kind.name == "seeds":
        return "seeds such as 7, 1 2 3 or 7+4"
    if parameter.name in ("model", "name"):
        return "a name, as flux-krea models lists them"
    return "a text"
