"""Chooses the source of each component: of variants in an argument the most precise, of arguments the later one."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlx_flux_krea.errors import ModelError, amount
from mlx_flux_krea.weights import BESIDE, COMPONENTS, FILTERS, KIND_OF

from .decode import precision
from .fit import make_plan
from .identify import identify
from .layouts import SourceComponent
from .remap import Misfit
from .sets import names_a_model
from .sources import OpenedArgument, open_arguments

Components = dict[str, SourceComponent]


@dataclass
class Choice:
    """The source of each component, notes on how it was chosen, and reasons for files that were passed over."""

    components: Components = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    passed: list[ModelError] = field(default_factory=list)


def choose(paths: Sequence[Path]) -> Choice:
    """Chooses the components of a model, of a filter, or of a component that runs beside a model.

    Raises:
        ModelError: nothing known in an argument, two different models in one, sources of several kinds, or a component
            is missing.
    """
    choice = Choice()
    for argument in open_arguments(paths):
        for name, component in _of_argument(argument, choice).items():
            before = choice.components.get(name)
            if before and before.source.files != component.source.files:
                choice.notes.append(f"{name}: {_where(component)} replaces {_where(before)}, which was named before it")
            choice.components[name] = component
    sources = {id(one.source): one.source for one in choice.components.values()}
    choice.notes += [note for source in sources.values() for note in source.notes]
    choice.components = _complete(choice)
    return choice


def _of_argument(argument: OpenedArgument, choice: Choice) -> Components:
    """Returns the components of one argument, and adds notes and reasons to the choice.

    Raises:
        ModelError: nothing in it is known, or it holds two different models.
    """
    found: dict[str, list[SourceComponent]] = {}
    reasons = []
    for source in argument.sources:
        try:
            for one in identify(source):
                found.setdefault(one.layout.component, []).append(one)
        except ModelError as error:
            reasons.append(error)
    if not found:
        raise _nothing(argument, reasons)
    choice.passed += [*argument.passed, *reasons]
    if argument.is_tree and "transformer" in found:  # a tree of programs holds filters, encoders and more besides
        found = {name: those for name, those in found.items() if name in COMPONENTS}
    if reasons:
        choice.notes.append(f"passed over {amount(len(reasons), 'file')} in {argument.path}: {_summary(reasons)}")
    return {name: _most_precise(argument, name, those, choice) for name, those in found.items()}


def _nothing(argument: OpenedArgument, reasons: list[ModelError]) -> ModelError:
    """Returns the error about an argument in which nothing is known."""
    reasons = [*reasons, *argument.passed]
    if len(reasons) == 1:
        return reasons[0]
    return ModelError(f"{argument.path} holds no component of FLUX.1: {_summary(reasons)}", reasons[0].expected)


def _summary(reasons: Sequence[ModelError]) -> str:
    texts = list(dict.fromkeys(reason.found for reason in reasons))
    return "; ".join(texts[:3]) + (f"; and {len(texts) - 3} more" if len(texts) > 3 else "")


def _most_precise(argument: OpenedArgument, name: str, those: list[SourceComponent], choice: Choice) -> SourceComponent:
    """Returns the most precise of variants of one model.

    Raises:
        ModelError: they are different models.
    """
    best, *others = sorted(_fitting(argument, those, choice), key=_precision, reverse=True)  # of equals, the first
    if not others:
        return best
    for other in others:
        if not _are_variants(best, other):
            found = f"{argument.path} holds two different models as {name}: {_where(best)} and {_where(other)}"
            raise ModelError(found, "one of each component", "name the files one by one")
    rest = ", ".join(_where(other) for other in others)
    choice.notes.append(f"{name}: {_where(best)} was taken, the most precise of its variants, and not {rest}")
    return best


def _fitting(argument: OpenedArgument, those: list[SourceComponent], choice: Choice) -> list[SourceComponent]:
    """Returns those of several candidates whose sizes are FLUX.1's: other models have networks of the same names.

    Raises:
        ModelError: none is, or one of them is, and lacks something; in a tree that one is passed over.
    """
    if len(those) == 1 and not argument.is_tree:
        return those
    fitting, errors = [], []
    for one in those:
        try:
            make_plan(one)
            fitting.append(one)
        except ModelError as error:
            if isinstance(error, Misfit) and error.same_sizes and not argument.is_tree:
                raise
            errors.append(error)
    if not fitting:
        raise errors[0]
    choice.passed += errors
    choice.notes += [f"passed over: {error.found}" for error in errors]
    return fitting


def _are_variants(one: SourceComponent, other: SourceComponent) -> bool:
    """Compares names: variants differ in words about precision. Names that many models share count in one folder."""
    is_named = names_a_model(one.source.stem) or one.source.folder == other.source.folder
    return one.source.stem == other.source.stem and is_named


def _precision(component: SourceComponent) -> float:
    """Returns the bits of a mean number of a component, as far as they tell values apart."""
    numbers = Counter()
    for tensor in component.tensors.values():
        numbers[tensor.dtype] += tensor.numbers
    return sum(precision(dtype) * count for dtype, count in numbers.items()) / max(1, sum(numbers.values()))


def _where(component: SourceComponent) -> str:
    """Names the files of a component."""
    first, *more = component.source.files
    return f"{first}" + (f" and {amount(len(more), 'more shard')}" if more else "")


def _complete(choice: Choice) -> Components:
    """Returns the components of the one thing that the sources hold, in its own order.

    Raises:
        ModelError: they hold several things, or one is incomplete.
    """
    components = choice.components
    if components.keys() & FILTERS.keys():
        if len(components) > 1:
            raise ModelError(f"the sources hold {', '.join(components)}", "a model, or one filter alone")
        return components
    kinds = {KIND_OF.get(name, "model") for name in components}
    if len(kinds) > 1:
        raise ModelError(f"the sources hold {', '.join(components)}", "a model, or a component alone")
    wanted = BESIDE.get(next(iter(kinds), ""), COMPONENTS)
    if missing := [name for name in wanted if name not in components]:
        have = ", ".join(components) or "nothing"
        passed = f" (passed over: {_summary(choice.passed)})" if choice.passed else ""
        todo = choice.passed[0].todo if choice.passed else ""
        todo = todo or "name the missing files too"
        raise ModelError(f"the sources hold {have}{passed}", f"also {', '.join(missing)}", todo)
    return {name: components[name] for name in wanted}
