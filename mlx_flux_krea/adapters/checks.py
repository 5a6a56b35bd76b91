"""Checks the names, types and shapes of an adapter file against a model, before a tensor is read."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelError, amount, printable
from ..models.config import ModelSizes
from ..weights import DTYPES, TensorInfo
from . import names
from .names import AdapterTarget

_FLOATS = tuple(DTYPES.values())
# The factors of each kind of change, as a file names them. A factor of two may stand in place of one.
_KINDS = {
    "lora": ("down", "up"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    "diff": ("diff", "diff_b"),
    "norm": ("set",),
}
_WITH = {  # further fields that a kind may have
    "lora": ("bias", "alpha", "magnitude", "dora_scale", "reshape", "diff_b"),
    "loha": ("alpha", "dora_scale", "diff_b"),
    "lokr": ("alpha", "dora_scale", "diff_b"),
    "diff": ("alpha",),
    "norm": (),
}
# Widths that tell which model a file of another width is for.
_WIDTHS = {
    320: "Stable Diffusion", 640: "Stable Diffusion", 1280: "SDXL", 1536: "SD3", 2432: "SD3.5 Large",
    3840: "Z-Image", 4096: "FLUX.2 klein", 5120: "Wan", 6144: "FLUX.2 [dev] or Krea 2",
}  # fmt: skip

Wrong = tuple[str, str] | None  # a field, and the shape that it should have


def check_model(
    path: Path, sizes: ModelSizes, groups: Mapping[str, Any], unmatched: list[str], infos: Mapping[str, TensorInfo]
) -> None:
    """Refuses files of other models, and files of which nothing is an adapter of this one."""
    if deeper := names.deeper(unmatched, sizes):
        raise refused(path, deeper, "an adapter for this model")
    if other := names.other_model(infos):
        raise refused(path, f"it is for {other}", "an adapter for FLUX.1")
    if groups:
        return
    some = ", ".join(map(shown, list(infos)[:3])) or "nothing"
    raise refused(path, f"none of its {amount(len(infos), 'tensor')} fits this model ({some})", "a LoRA for FLUX.1")


def check_group(path: Path, target: AdapterTarget, fields: dict[str, str], infos: Mapping[str, TensorInfo]) -> None:
    """Checks that the tensors of one module are of one kind, complete, and of its layer's shape."""
    first = shown(next(iter(fields.values())))
    for name in fields.values():
        if infos[name].dtype not in _FLOATS:
            raise refused(path, f"{shown(name)} is {infos[name].dtype}", f"one of {', '.join(_FLOATS)}")
    kinds = [kind for kind, factors in _KINDS.items() if set(factors) & fields.keys() and kind != "diff"]
    kinds = kinds or ["diff"] * bool(fields.keys() & {"diff", "diff_b"})
    if len(kinds) != 1:
        found = f"{first} and the tensors beside it are {' and '.join(kinds) or 'no change of a layer'}"
        raise refused(path, found, "the factors of one formula")
    kind = kinds[0]
    if extra := fields.keys() - {*_KINDS[kind], *_WITH[kind]}:
        raise refused(path, f"{shown(fields[min(extra)])} does not belong to {kind}", "", "")
    shapes = {what: infos[name].shape for what, name in fields.items()}
    wrong = _SHAPES[kind](target, shapes)
    if not wrong:
        wrong = _wrong_lengths(target, shapes)
    if wrong:
        what, expected = wrong
        if what not in fields:
            raise refused(path, f"{first} has no {what} beside it", f"all of {', '.join(_KINDS[kind])}")
        shape = list(shapes[what])
        width = next((_WIDTHS[n] for n in shape if n in _WIDTHS and n not in (target.rows, target.width)), None)
        todo = f"it may be for {width}" if width and kind in ("lora", "loha", "diff") else ""
        raise refused(path, f"{shown(fields[what])} has shape {shape}", expected, todo)


def is_widened(target: AdapterTarget, fields: Mapping[str, str], infos: Mapping[str, TensorInfo]) -> bool:
    """True where the layer that reads tokens takes a map beside the latents, whether or not the model does."""
    down = infos[fields["down"]].shape if "down" in fields else ()
    return bool(target.latents) and down[-1:] == (2 * target.latents,)


def _lora_shapes(target: AdapterTarget, shapes: Mapping[str, tuple]) -> Wrong:
    if not target.width:
        return "down", "no matrix: it is a vector"
    down, up = shapes.get("down", ()), shapes.get("up", ())
    if len(down) != 2 or down[1] not in target.widths:
        return "down", f"(rank, {target.width})"
    if not 1 <= down[0] <= max(target.rows, down[1]):
        return "down", f"a rank from 1 to {max(target.rows, down[1])}"
    return None if up == (target.rows, down[0]) else ("up", f"[{target.rows}, {down[0]}]")


def _loha_shapes(target: AdapterTarget, shapes: Mapping[str, tuple]) -> Wrong:
    for number in "12":
        a, b = shapes.get(f"hada_w{number}_a", ()), shapes.get(f"hada_w{number}_b", ())
        if len(b) != 2 or b[1] != target.width or not 1 <= b[0] <= max(target.rows, target.width):
            return f"hada_w{number}_b", f"(rank, {target.width})"
        if a != (target.rows, b[0]):
            return f"hada_w{number}_a", f"[{target.rows}, {b[0]}]"
    return None


def _lokr_shapes(target: AdapterTarget, shapes: Mapping[str, tuple]) -> Wrong:
    rows, width = 1, 1
    for number in "12":
        whole, a, b = (f"lokr_w{number}{end}" for end in ("", "_a", "_b"))
        if (whole in shapes) == (a in shapes or b in shapes):
            return whole if whole in shapes else a if a in shapes else whole, f"{whole}, or {a} and {b}"
        given = [name for name in (whole, a, b) if name in shapes]
        if bad := next((name for name in given if len(shapes[name]) != 2 or 0 in shapes[name]), None):
            return bad, "a matrix"
        if whole in shapes:
            outer, inner = shapes[whole]
        else:
            if a not in shapes or b not in shapes:
                return (b if a in shapes else a), ""
            if shapes[a][1] != shapes[b][0]:
                return b, f"({shapes[a][1]}, ...)"
            outer, inner = shapes[a][0], shapes[b][1]
        rows, width = rows * outer, width * inner
    if (rows, width) != (target.rows, target.width):
        last = "lokr_w2" if "lokr_w2" in shapes else "lokr_w2_a"
        return last, f"factors of [{target.rows}, {target.width}], and these make [{rows}, {width}]"
    return None


def _diff_shapes(target: AdapterTarget, shapes: Mapping[str, tuple]) -> Wrong:
    expected = (target.rows, target.width) if target.width else (target.rows,)
    if "diff" in shapes and shapes["diff"] != expected:
        return "diff", f"{list(expected)}"
    return None


def _norm_shapes(target: AdapterTarget, shapes: Mapping[str, tuple]) -> Wrong:
    if target.width or shapes["set"] != (target.rows,):
        return "set", f"[{target.rows}], of a norm" if not target.width else "no whole weight of a layer"
    return None


_SHAPES = {"lora": _lora_shapes, "loha": _loha_shapes, "lokr": _lokr_shapes, "diff": _diff_shapes, "norm": _norm_shapes}


def _wrong_lengths(target: AdapterTarget, shapes: Mapping[str, tuple]) -> Wrong:
    """Checks the fields that any kind may have beside its factors."""
    vectors = {"bias": (target.rows,), "diff_b": (target.rows,), "magnitude": (target.rows,)}
    for what, expected in vectors.items():
        if what in shapes and shapes[what] != expected:
            return what, f"{list(expected)}"
    if "alpha" in shapes and math.prod(shapes["alpha"]) != 1:
        return "alpha", "one number"
    over_rows = ((target.rows, 1), (target.rows,))
    if "dora_scale" in shapes and shapes["dora_scale"] not in (*over_rows, (1, target.width)):
        return "dora_scale", f"[{target.rows}, 1] or [1, {target.width}]"
    return None


def check_overlaps(path: Path, groups: Iterable[tuple[AdapterTarget, dict[str, str]]]) -> None:
    """Refuses files that change the same rows of a layer twice, under two names."""
    taken: dict[tuple[str, str], list[tuple[AdapterTarget, str]]] = {}
    for target, fields in groups:
        name = next(iter(fields.values()))
        for other, before in taken.setdefault((target.component, target.path), []):
            if other.start < target.stop and target.start < other.stop:
                found = f"{shown(before)} and {shown(name)} change the same rows of {target.path}"
                raise refused(path, found, "each once")
        taken[target.component, target.path].append((target, name))


def refused(path: Path, found: str, expected: str = "", todo: str = "") -> ModelError:
    """Returns the error for a file that cannot be used."""
    return ModelError(f"{path}: {found}", expected, todo)


def shown(name: str) -> str:
    """Returns the name of a tensor for a message."""
    return printable(name if len(name) <= 120 else f"{name[:117]}...")
