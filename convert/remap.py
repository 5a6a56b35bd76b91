"""Applies a name table: every tensor of a source is matched or refused, every tensor of ours filled, shapes agree."""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import mlx.core as mx

from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.models.config import Quantization

from . import packing
from .maps import COPIES, NOT_NEEDED, Columns, Either, Pick, Sum, Swap
from .tensors import Data, Tensor

_SLOTS = {
    "{n}": r"(?P<n>\d+)",
    "{m}": r"(?P<m>\d+)",
    "{x}": r"(?P<x>[^.]+)",
    "{rest}": r"(?P<rest>.+)",
    "*": r"(?P<star>weight|bias)",
}
_CHUNK = 2**21  # numbers of a matrix that are processed at a time


@dataclass(frozen=True)
class Target:
    """A tensor of ours, and how it is made."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[Tensor, ...]  # none: zeros
    swap: bool
    torch_axes: bool  # of a convolution
    op: type = str  # of `maps`: how several sources become one

    def chunks(self, stored: Quantization | None = None) -> list[tuple[int, "Target"]]:
        """Returns chunks that fit into a processor's cache, each with its first row.

        Args:
            stored: how it will be quantized. If its sources are so already, codes and scales go over unchanged, and
                with them arrays that do not belong to rows.
        """
        is_whole = self.op is Columns or (stored is not None and stored.intake and stored == self.q)
        if len(self.shape) != 2 or self.swap or not self.sources or is_whole:
            return [(0, self)]
        most = max(1, _CHUNK // self.shape[1])
        parts = [part for tensor in self.sources for part in _cut(tensor, most)]
        rows = itertools.accumulate((part.shape[0] for part in parts), initial=0)
        cut = [replace(self, shape=(part.shape[0], self.shape[1]), sources=(part,), op=str) for part in parts]
        return list(zip(rows, cut, strict=False))

    @cached_property
    def q(self) -> Quantization | None:
        """The quantization of its sources, if it is one that MLX has; None: they have another, or none."""
        return None if self.swap else packing.find(self.sources, self.op)

    @property
    def is_ours(self) -> bool:
        """True where its sources are packed as recipes pack them."""
        return all(source.dtype.endswith(" MLX") and source.dtype != "mxfp8 MLX" for source in self.sources)

    def packed(self, data: Data) -> list[mx.array]:
        """Returns the arrays of `Quantization.arrays`; only where there is a `q`."""
        return packing.packed(self.sources, self.op, data)

    def make(self, data: Data) -> mx.array:
        """Reads the sources and combines them, in a type that holds every value."""
        if not self.sources:
            return mx.zeros(self.shape)
        parts = [_in_our_axes(tensor.read(data), len(self.shape), self.torch_axes) for tensor in self.sources]
        if self.op is Sum:
            return sum(parts[1:], parts[0])
        array = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=int(self.op is Columns))
        return mx.concatenate(list(mx.split(array, 2))[::-1]) if self.swap else array


@dataclass(frozen=True)
class ComponentPlan:
    """The mapping of a component: its tensors in our order, and tensors that are left out or missing."""

    targets: tuple[Target, ...]
    dropped: tuple[tuple[str, str], ...]  # their name, reason
    lost: tuple[tuple[str, str], ...] = ()  # our name, reason; they are zero

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(target.shape) for target in self.targets)


def _cut(tensor: Tensor, most: int) -> list[Tensor]:
    """Cuts a tensor into parts of about so many rows."""
    step = max(most // tensor.step, 1) * tensor.step
    return [tensor.rows(first, min(step, tensor.shape[0] - first)) for first in range(0, tensor.shape[0], step)]


class Misfit(ModelError):
    """A source whose tensors do not fit a network of these sizes.

    Args:
        source: its path.
        problems: all problems, as parts of sentences.
        same_sizes: no tensor has another shape.
    """

    def __init__(self, source: str, problems: list[str], same_sizes: bool):
        self.problems, self.same_sizes = problems, same_sizes
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        super().__init__(f"{source} {'; '.join(problems[:3])}{more}", todo="is it complete, and a model of this kind?")


def plan(
    tensors: dict[str, Tensor],
    *,
    table,
    dropped,
    lost,
    shapes: dict[str, tuple[int, ...]],
    modules: frozenset[str],
    last: int,
    source: str,
    picked: Sequence[int] = (),
) -> ComponentPlan:
    """Matches the tensors of a source with ours, by names and shapes alone.

    Args:
        tensors: of the source, names without prefix.
        table: rows of `maps.py`.
        dropped: rows of tensors to leave out.
        lost: rows of tensors that may be missing.
        shapes: our tensors in our order, MLX's axes.
        modules: generic names of the network's modules in this layout; an unknown tensor inside one is an error.
        last: the number from which `{-n}` counts down.
        source: its path, for errors.
        picked: the rows of `Pick`.

    Raises:
        Misfit: tensors missing, unknown or of another shape; the first few are named.
    """
    targets, missing, shaped, zeros, used = [], [], [], [], set()
    torch_axes = not _channels_last(tensors)
    for name, shape in shapes.items():
        names, op = source_names(name, table, last)
        if op is Either:
            names = next(([n] for n in names if n in tensors), names[:1])
        if op is Sum:
            names = [n for n in names if n in tensors] or names[:1]
        absent = [n for n in names if n not in tensors]
        if absent and (reason := dict(lost).get(name)):
            zeros.append((name, reason))
            targets.append(Target(name, tuple(shape), (), op is Swap, torch_axes))
            continue
        if absent or not names:
            missing += absent or [name]
            continue
        used.update(names)
        sources = tuple(tensors[n] for n in names)
        if op is Pick:
            whole, like = sources
            fits = whole.shape == like.shape and len(whole.shape) == 2
            sources = tuple(whole.rows(n, 1) for n in picked if n < whole.shape[0]) if fits else ()
        shape_of_sources = _shape([_shape_in_our_axes(t.shape, len(shape), torch_axes) for t in sources], op)
        if shape_of_sources != tuple(shape):
            stored = " + ".join(str(list(tensors[n].shape)) for n in names)
            shaped.append(f"{names[0]} has shape {stored}, expected parts of {list(shape)}")
        targets.append(Target(name, tuple(shape), sources, op is Swap, torch_axes, op))
    reasons, unknown, copies = _left([n for n in tensors if n not in used], dropped, modules, tensors)
    problems = (
        [f"lacks {n}" for n in dict.fromkeys(missing)]
        + [f"has the unknown tensor {n}" for n in unknown]
        + shaped
        + copies
    )
    if problems:
        raise Misfit(source, problems, same_sizes=not shaped)
    return ComponentPlan(tuple(targets), tuple(sorted(reasons.items())), tuple(zeros))


def _left(
    left: list[str], dropped, modules: frozenset[str], tensors: dict[str, Tensor]
) -> tuple[dict[str, str], list[str], list[str]]:
    """Returns why each tensor that is left is not needed, those that matter and are unknown, and copies that differ."""
    reasons, unknown, copies = {}, [], []
    for name in left:
        reason = matches(name, dropped)
        if reason is None and (deepest(name, modules) or generic(name) in modules):
            unknown.append(name)
        else:
            reasons[name] = reason or NOT_NEEDED
        original = tensors.get(COPIES.get(name, ""))
        if original and original.shape != tensors[name].shape:
            copies.append(f"{name} has shape {list(tensors[name].shape)}, expected {list(original.shape)}")
    return reasons, unknown, copies


def matches(name: str, rows) -> str | None:
    """Returns the reason of the first row whose pattern matches a name."""
    return next((reason for pattern, reason in rows if _pattern(pattern).fullmatch(name)), None)


def generic(name: str) -> str:
    """Returns a name with # for every number in it."""
    return ".".join("#" if part.isdigit() else part for part in name.split("."))


def deepest(name: str, modules: frozenset[str]) -> int:
    """Returns how many parts the longest known module has that a name lies in; 0: it lies in none."""
    parts = generic(name).split(".")[:-1]
    return next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in modules), 0)


def source_names(name: str, table, last: int) -> tuple[list[str], type]:
    """Returns the source names of one of our tensors, and the operation on them."""
    for ours, theirs in table:
        match = _pattern(ours).fullmatch(name)
        if match:
            templates = (theirs,) if isinstance(theirs, str) else theirs.names
            return [_fill(t, match.groupdict(), last) for t in templates], type(theirs)
    return [], str


@cache
def _pattern(template: str) -> re.Pattern:
    parts = re.split(r"(\{\w+\}|\*)", template)
    return re.compile("".join(_SLOTS.get(part) or re.escape(part) for part in parts))


def _fill(template: str, slots: dict[str, str], last: int) -> str:
    if "n" in slots:
        template = template.replace("{-n}", str(last - int(slots["n"])))
    for slot, value in slots.items():
        template = template.replace("*" if slot == "star" else "{" + slot + "}", value)
    return template


def _shape(parts: list[tuple[int, ...]], op: type) -> tuple[int, ...]:
    """Returns the shape that sources make together; (): they do not fit."""
    if len(parts) == 1:
        return parts[0]
    axis = int(op is Columns)
    if (
        not parts
        or not all(len(part) > axis for part in parts)
        or len({(*p[:axis], *p[axis + 1 :]) for p in parts}) > 1
    ):
        return ()
    if op is Sum:
        return parts[0] if len(set(parts)) == 1 else ()
    return (*parts[0][:axis], sum(part[axis] for part in parts), *parts[0][axis + 1 :])


def _channels_last(tensors: dict[str, Tensor]) -> bool:
    """Tells MLX's axes of convolutions, OHWI, from torch's, OIHW, by all shapes. Kernels are square."""
    shapes = [t.shape for t in tensors.values() if len(t.shape) == 4]
    return any(s[2] != s[3] for s in shapes) and all(s[1] == s[2] for s in shapes)


def _shape_in_our_axes(shape: tuple[int, ...], ndim: int, torch_axes: bool) -> tuple[int, ...]:
    if len(shape) == 4 and ndim == 2 and shape[2:] == (1, 1):
        return shape[:2]
    return (shape[0], shape[2], shape[3], shape[1]) if torch_axes and len(shape) == ndim == 4 else tuple(shape)


def _in_our_axes(array: mx.array, ndim: int, torch_axes: bool) -> mx.array:
    """Transposes convolutions from torch's OIHW to OHWI; a 1 x 1 convolution becomes a matrix if ours is one."""
    if array.ndim == 4 and ndim == 2:
        return array.reshape(array.shape[:2])
    return array.transpose(0, 2, 3, 1) if torch_axes and array.ndim == 4 else array
