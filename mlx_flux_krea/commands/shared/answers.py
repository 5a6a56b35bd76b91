"""Answers to command lines that cannot be parsed: what was found, what was expected, and what to type."""

import difflib
import itertools
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

import click

from mlx_flux_krea.errors import FluxKreaError

from . import peers, typed

# Options and verbs that remove things or skip a question: nobody is led to them by a typing error.
NEVER = {"--force", "--yes", "--discard-source", "--allow-nonfinite", "--allow-unknown-filter", "purge", "rm"}
_LIKENESS = 0.7  # of two names, from 0 to 1
_VALUE = re.compile(r"(?P<value>.+) is (?:not a valid|not in the range)", re.DOTALL)
_TABLES = {
    "convert": peers.CONVERTING,
    "setup": peers.CONVERTING,
    "plan": peers.PLANNING,
    "ui": peers.SERVING,
}  # by verb
_ANY = {"-V": "--version", "-v": "--version", "--ver": "--version", "-?": "--help", "-help": "--help"}
_EXAMPLE = re.compile(r"(?P<option>--?[A-Za-z][\w-]*) \{(?P<example>[^{}]*)\}")  # in an answer of `peers`
_LONGEST = 200  # characters of a command that is proposed


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
        return _no_option(error.option_name, context, argv)
    if isinstance(error, click.BadOptionUsage):
        return _no_value(error.option_name, context) or text
    if isinstance(error, click.MissingParameter) and error.param:
        return f"{_label(error.param)} is missing; expected {_wanted(error.param)}"
    if isinstance(error, click.BadParameter) and error.param:
        return bad_value(_label(error.param), error.param, error.message, context)
    if text.startswith("Got unexpected extra argument"):
        return _too_many(context, text, argv)
    match = re.match(r"No such command (['\"])(?P<name>.*)\1$", error.message.rstrip("."), re.DOTALL)
    if match and isinstance(context.command, click.Group):
        return _unknown_verb(match["name"], context, argv)
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


def _unknown_verb(word: str, context: click.Context, argv: Sequence[str]) -> str:
    """Returns the answer to a verb that a group does not have."""
    group, command = context.command, context.command_path
    names = group.list_commands(context) if isinstance(group, click.Group) else []
    top = not context.parent
    rest = list(argv)[list(argv).index(word) + 1 :] if word in argv else []
    if re.search(r"\s", word.strip()) or typed.has_curly_quotes([word]):
        line = _line("generate", context, [word[:40], *rest]) or f"{command} generate {typed.quoted(word[:40])}"
        return f"{word!r} is no command; for a picture of it: {line}"
    found, lower = f"there is no command {word!r}", word.lower()
    near = (peers.VERBS if top else peers.SUBVERBS).get(lower)
    if near == "" and getattr(group, "invoke_without_command", False):
        return f"{found}; write {command}"
    if near and near.split()[0] in names:
        return f"{found}; write {_line(near, context, rest) or f'{command} {near}'}"
    if top and lower == "help" and rest and rest[0] in names:
        return f"{found}; write {command} {rest[0]} --help"
    if top and (text := peers.MISSING_VERBS.get(lower)):
        return f"{found}; {text}"
    if near := nearest(word, names):
        return f"{found}; did you mean {_line(near, context, rest) or f'{command} {near}'}?"
    return f"{found}; expected {', '.join(name for name in names if name not in NEVER)}"


def _line(verb: str, context: click.Context, words: Sequence[str]) -> str:
    """Returns a command line with another verb and the words that were typed; "": the verb does not take them.

    Args:
        verb: of the group, or a verb and one below it.
        context: of the group.
        words: after the verb.
    """
    command: click.Command | None = context.command
    for name in verb.split():
        command = command.get_command(context, name) if isinstance(command, click.Group) else None
    if command is None or not words:
        return ""
    prompt = _takes_prompt(command)
    line = typed.read(command, _without_prompt_names(words, command) if prompt else words)
    most = sum(99 if one.nargs < 0 else one.nargs for one in command.params if isinstance(one, click.Argument))
    text = line.meant(f"{context.command_path} {verb}", prompt)
    fits = not line.unknown and (prompt or len(line.arguments) <= most) and len(text) <= _LONGEST
    removes = {word for words in line.options for word in words} & NEVER
    return text if fits and not removes else ""


def _without_prompt_names(words: Sequence[str], command: click.Command) -> list[str]:
    """Returns words without the options by which other tools name the prompt: --prompt, or --prompt=."""
    ours, left = typed.options_of(command), []
    for word in words:
        name, equals, value = word.partition("=")
        row = peers.find(name) if name.startswith("-") and name not in ours else None
        if not row or row[1] != peers.NO_PROMPT:
            left.append(word)
        elif equals:
            left.append(value)
    return left


def _takes_prompt(command: click.Command) -> bool:
    return any(parameter.name == "prompt" for parameter in command.params)


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


def _no_option(name: str, context: click.Context, argv: Sequence[str]) -> str:
    """Returns the answer to an option that the command does not have."""
    found = f"there is no option {name}"
    command, verb = context.command, context.info_name or ""
    if isinstance(command, click.Group) and not context.parent:
        return _before_verb(name, context, argv)
    ours = typed.options_of(command)
    text = next((word for word in argv if word.startswith(name) and re.search(r"\s", word.partition("=")[0])), "")
    if text and _takes_prompt(command):
        line = f"{context.command_path} -- {typed.quoted(text)}"
        return f"{found}; a prompt that begins with a hyphen comes last, after --: {line}"
    if len(name) == 3 and name[1:] in ours:
        return f"{found}; did you mean {name[1:]}?"
    if (option := name.lstrip("-").replace("-", "_").lower()) and (given := _setting(option, context, argv)):
        return f"{found}; write {given}"
    table = _TABLES.get(verb, peers.OPTIONS)
    if known := nearest(name, [option for option in ours if option.startswith("--")]):
        exact = known.lstrip("-") == name.lstrip("-").replace("_", "-").lower()
        if exact or not peers.find(name, table):
            return f"{found}; did you mean {known}?"
    if row := peers.find(name, table) or peers.find(name):
        tools, text = row
        if text == peers.NO_PROMPT and (meant := _with_prompt(name, context, argv)):
            return f"{found} (of {tools}); the prompt has none: {meant}"
        text = with_values(text, typed.values_after(name, argv), _options_of("generate", context) | ours)
        elsewhere = set(re.findall(r"write (-[\w-]+)", text)) - set(ours)
        return f"{found} (of {tools}); {'with flux-krea generate, ' * bool(elsewhere)}{text}"
    if name not in NEVER and name in _options_of("generate", context):
        return f"{found} of {context.command_path}; flux-krea generate has it"
    return found


def _with_prompt(name: str, context: click.Context, argv: Sequence[str]) -> str:
    """Returns the command line without the name of an option in front of the prompt; "": it is not to be had."""
    words = list(argv)[list(argv).index(context.info_name or "") + 1 :] if context.info_name in argv else []
    line = typed.read(context.command, [word.removeprefix(f"{name}=") for word in words if word != name])
    meant = line.meant(context.command_path, prompt=True)
    return meant if line.arguments and not line.unknown and len(meant) <= _LONGEST else ""


def _before_verb(name: str, context: click.Context, argv: Sequence[str]) -> str:
    """Returns the answer to an option in front of the verb."""
    if name in _ANY:
        return f"there is no option {name}; write {context.command_path} {_ANY[name]}"
    found = f"there is no option {name} before a command"
    names = context.command.list_commands(context) if isinstance(context.command, click.Group) else []
    at = next((i for i, word in enumerate(argv) if word in names), None)
    line = _line(argv[at], context, [*argv[at + 1 :], *argv[:at]]) if at is not None else ""
    return f"{found}; {f'write {line}' if line else f'expected one first: {context.command_path} generate'}"


def _setting(name: str, context: click.Context, argv: Sequence[str]) -> str:
    """Returns how `config` sets an option that was given to it as an option; "": the command is another."""
    if context.info_name != "config" or f"--{name.replace('_', '-')}" not in _options_of("generate", context):
        return ""
    option = name.replace("_", "-")
    value = " ".join(typed.values_after(f"--{option}", argv))
    return " ".join([context.command_path, option, *([shlex.quote(value)] if value else [])])


def with_values(text: str, values: Sequence[str], options: Mapping[str, click.Option]) -> str:
    """Returns an answer with the typed values in the place of its examples, where our options take them.

    Args:
        text: of `peers`, with examples in braces.
        values: words that were typed after the option.
        options: ours, by their spellings.
    """
    slots = list(_EXAMPLE.finditer(text))
    sides = " ".join(itertools.takewhile(lambda value: re.fullmatch(r"[\d.x×*,:/ ]+", value, re.I), values))
    parts = [part for part in re.split(r"[x×*,:/ ]+", sides, flags=re.I) if part]
    together = " ".join(itertools.takewhile(lambda value: re.fullmatch(r"[\d+,]+", value), values))
    in_turn = len({slot["option"] for slot in slots}) == len(parts) > 1
    filled = []
    for i, slot in enumerate(slots):
        option = options.get(slot["option"])
        value = parts[i] if in_turn else together if option and option.name == "seed" else "".join(values[:1])
        filled.append(value if value and option and _is_taken(value, option) else "")
    if not all(filled) and len(slots) > 1:
        filled = [""] * len(slots)
    typed_values = iter(filled)

    def shown(match: re.Match) -> str:
        value = next(typed_values)
        words = value if re.fullmatch(r"[\d+, ]+", value) else shlex.quote(value)
        return f"{match['option']} {words if value else match['example']}"

    return _EXAMPLE.sub(shown, text)


def _is_taken(value: str, option: click.Option) -> bool:
    """Returns True where an option takes a value, as far as its type knows."""
    try:
        option.type.convert(value, option, None)
    except (click.BadParameter, FluxKreaError):
        return False
    return True


def _options_of(verb: str, context: click.Context) -> dict[str, click.Option]:
    """Returns the options of a verb of the group that a context belongs to, by their spellings."""
    group = context.find_root().command
    command = group.get_command(context, verb) if isinstance(group, click.Group) else None
    return typed.options_of(command) if command else {}


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


def _too_many(context: click.Context, text: str, argv: Sequence[str]) -> str:
    """Returns the answer to arguments after the last that a command takes: mostly a prompt without quotes."""
    match = re.search(r"\((.*)\)$", text, re.DOTALL)
    extra, path = match[1] if match else "", context.command_path
    words = list(argv)[list(argv).index(context.info_name or "") + 1 :] if context.info_name in argv else []
    line = typed.read(context.command, words)
    if line.spaced:
        option, file = line.spaced
        return f"{extra!r} is left over; expected a path with spaces in quotes: {option} {shlex.quote(file)}"
    if _takes_prompt(context.command):
        meant = line.meant(path, prompt=True)
        meant = meant if len(meant) <= _LONGEST else f'{path} "..."'
        if typed.has_curly_quotes(words):
            return f"the shell knows no curly quotes; expected straight ones: {meant}"
        return f"{extra!r} follows the prompt; expected a prompt in quotes: {meant}"
    if len(line.arguments) > 1 and os.path.exists(whole := " ".join(line.arguments)):
        return f"{extra!r} is left over; expected a path with spaces in quotes: {path} {shlex.quote(whole)}"
    count = sum(isinstance(parameter, click.Argument) for parameter in context.command.params)
    taken = ("no argument", "one argument")[count] if count < 2 else f"{count} arguments"
    by_option = any("-m" in parameter.opts for parameter in context.command.params)
    named = f"; a model is named with -m: {path} -m {shlex.quote(extra)}" if by_option else ""
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
