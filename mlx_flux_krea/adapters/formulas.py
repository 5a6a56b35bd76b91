"""The formulas of adapters: from their parts and weights to one branch a layer (`models.layers.Branch`).

    LoRA   W + s B A              LoHa   W + s (A1 B1) * (A2 B2), a low-rank product of rank r^2
    LoKr   W + s kron(w1, w2)     DoRA   the rows (or columns) of W + B A, brought to learned lengths

All low-rank products of a layer, of all adapters, are one: their A are stacked, their B side by side with the weights
in them. Rows that share an A, as q, k and v may, share its place in the stack.

DoRA at a weight s other than 1 is read in two ways, by the trainer: PEFT's scales the product inside the length,
|W + s B A|; files with `dora_scale` are scaled as a whole, W + s (W' - W), as ComfyUI does. Both change W by a sum of
terms, so that several adapters add up.
"""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from .. import home
from ..errors import ModelError
from ..files import sha256_if_exists
from ..models.config import ModelSizes
from ..models.layers import Branch, Kronecker, dequantized, set_branch
from ..weights import ModelFolder, layer_shapes, parameters, read_header
from .parts import Adapter, Part, read_facts

_ROWS = 1024  # of a matrix that are in float32 at one time

Uses = Sequence[tuple[Adapter, float]]  # adapters with their weights


@dataclass(frozen=True)
class Lengths:
    """The terms of the squared length of each row, or column, of W + s D: base + 2 s cross + s^2 change."""

    base: mx.array
    cross: mx.array
    change: mx.array

    def at(self, scale: float) -> mx.array:
        """Returns the lengths."""
        squares = self.base + 2 * scale * self.cross + scale**2 * self.change
        return mx.sqrt(mx.maximum(squares, 0))


Measure = Callable[[Adapter, Part], Lengths]


def measure(part: Part, weight: mx.array) -> Lengths:
    """Measures what DoRA divides by, in float32 and some rows at a time.

    Args:
        part: with lengths of DoRA.
        weight: (out, in) of its layer.
    """
    target, axis = part.target, 0 if part.length == "intake" else 1
    sums: list[list[mx.array]] = []
    for start in range(0, target.rows, _ROWS):
        stop = min(start + _ROWS, target.rows)
        rows = weight[target.start + start : target.start + stop].astype(mx.float32)
        change = _dense(part, start, stop)
        terms = [(rows * rows).sum(axis), (rows * change).sum(axis), (change * change).sum(axis)]
        mx.eval(terms)
        sums.append(terms)
    joined = [mx.concatenate(list(terms)) if axis else sum(terms, mx.array(0.0)) for terms in zip(*sums, strict=True)]
    mx.eval(joined)
    return Lengths(*joined)


def _dense(part: Part, start: int, stop: int) -> mx.array:
    """Returns some rows of the matrix that a part adds, in float32."""
    arrays = {name: array.astype(mx.float32) for name, array in part.arrays.items()}
    if "down" in arrays:
        return arrays["up"][start:stop] @ _padded(arrays["down"], part.target.width)[:, : part.target.width]
    if "h1_a" in arrays:
        return (arrays["h1_a"][start:stop] @ arrays["h1_b"]) * (arrays["h2_a"][start:stop] @ arrays["h2_b"])
    if "w1" in arrays:
        inner = arrays["w2"].shape[0]
        first, last = start // inner, -(-stop // inner)
        return mx.kron(arrays["w1"][first:last], arrays["w2"])[start - first * inner : stop - first * inner]
    return arrays["diff"][start:stop]


class Base:
    """The weights of a model folder, of which DoRA measures the rows; one layer is in memory at a time.

    Lengths of an installed adapter are kept beside it, by the hash of the model's manifest and the compute type.

    Args:
        folder: the model.
        dtype: the compute type.
    """

    def __init__(self, folder: ModelFolder, dtype: mx.Dtype):
        self._folder, self._dtype = folder, dtype
        self._known: dict[Part, Lengths] = {}

    def lengths(self, adapter: Adapter, part: Part) -> Lengths:
        """Returns the lengths of a part's rows; those of the whole adapter are measured at once.

        Raises:
            ModelError: weights missing or damaged.
        """
        if part not in self._known:
            parts = [one for one in adapter.parts if one.length]
            kept = self._place(adapter)
            known = _read_lengths(kept, parts) if kept else None
            if known is None:
                known = self._measured(parts)
                if kept:
                    _write_lengths(kept, known)
            self._known |= known
        return self._known[part]

    def _measured(self, parts: Sequence[Part]) -> dict[Part, Lengths]:
        known = {}
        for component in sorted({part.target.component for part in parts}):
            layers = dict(self._folder.networks[component].load(self._dtype).named_modules())  # lazy
            by_path: dict[str, list[Part]] = {}
            for part in parts:
                if part.target.component == component:
                    by_path.setdefault(part.target.path, []).append(part)
            for path, some in by_path.items():
                weight = dequantized(layers[path])
                known |= {part: measure(part, weight) for part in some}
                layers[path].update({"weight": mx.zeros((0, 0))})
        return known

    def _place(self, adapter: Adapter) -> Path | None:
        """Returns the file for an adapter's lengths; None: it is not installed, or the model has no manifest."""
        folder = home.path(home.ADAPTERS, adapter.facts.name)
        digest = sha256_if_exists(self._folder.path / "manifest.json")
        with contextlib.suppress(ModelError):
            if digest and read_facts(folder / "adapter.json").sha256 == adapter.facts.sha256:
                return folder / f"lengths-{digest[:16]}-{str(self._dtype).rpartition('.')[2]}.safetensors"
        return None


_TERMS = ("base", "cross", "change")


def _name_of(part: Part) -> str:
    target = part.target
    return f"{target.component}.{target.path}@{target.start}-{target.stop}"


def _read_lengths(path: Path, parts: Sequence[Part]) -> dict[Part, Lengths] | None:
    """Returns kept lengths; None: there are none, or not exactly those of these parts."""
    try:
        read_header(path)
        arrays = mx.load(str(path))
        assert isinstance(arrays, dict)  # of a safetensors file, without return_metadata
        known = {part: Lengths(*(arrays[f"{_name_of(part)}.{term}"] for term in _TERMS)) for part in parts}
        for part, lengths in known.items():
            count = part.target.width if part.length == "intake" else part.target.rows
            terms = [lengths.base, lengths.cross, lengths.change]
            if any(term.shape != (count,) or not mx.isfinite(term).all().item() for term in terms):
                return None
    except (ModelError, KeyError, TypeError, RuntimeError):
        return None
    return known


def _write_lengths(path: Path, known: Mapping[Part, Lengths]) -> None:
    """Keeps lengths; without them they are measured again."""
    terms = {_name_of(part): (one.base, one.cross, one.change) for part, one in known.items()}
    arrays = {f"{name}.{term}": array for name, some in terms.items() for term, array in zip(_TERMS, some, strict=True)}
    partial = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.safetensors")
    with contextlib.suppress(OSError, RuntimeError):
        mx.save_safetensors(str(partial), arrays)
        os.replace(partial, path)


@dataclass
class _Sum:
    """A branch while parts are added to it; arrays in float32."""

    rows: int
    width: int
    stacked: dict[str, tuple[mx.array, list[tuple[mx.array, int]]]] = field(default_factory=dict)  # by hash of A
    products: list[Kronecker] = field(default_factory=list)
    vectors: dict[str, mx.array] = field(default_factory=dict)
    dense: mx.array | None = None

    def add(self, part: Part, weight: float, lengths: Lengths | None) -> None:
        """Adds a part with the weight of its adapter."""
        arrays = {name: array.astype(mx.float32) for name, array in part.arrays.items()}
        start, stop = part.target.start, part.target.stop
        gain, intake = self._lengths(part, arrays, weight, lengths)
        if "h1_a" in arrays:
            arrays |= _as_low_rank(arrays)
        if "down" in arrays:
            down, up = _padded(arrays["down"], self.width), weight * arrays["up"]
            down = down if intake is None else down * intake
            self._stack(down, up if gain is None else gain[:, None] * up, start)
        elif "w1" in arrays:
            self.products.append(Kronecker(weight * arrays["w1"], arrays["w2"], start, gain))
        elif "diff" in arrays:
            self.dense = mx.zeros((self.width, self.rows)) if self.dense is None else self.dense
            self.dense[:, start:stop] += weight * arrays["diff"].T
        if "bias" in arrays:
            self._add_vector("offset", weight * arrays["bias"], start, self.rows)

    def _lengths(
        self, part: Part, arrays: Mapping[str, mx.array], weight: float, lengths: Lengths | None
    ) -> tuple[mx.array | None, mx.array | None]:
        """Adds DoRA's change of W itself. Returns the factors of the product: by rows, and by columns."""
        if lengths is None or part.length is None:
            return None, None
        inside = part.length == "magnitude"
        factor = arrays[part.length] / mx.maximum(lengths.at(weight if inside else 1.0), 1e-12)
        change = (factor - 1) * (1.0 if inside else weight)
        if part.length == "intake":
            self._add_vector("intake", change, 0, self.width)
            return None, factor
        self._add_vector("gain", change, part.target.start, self.rows)
        return factor, None

    def _add_vector(self, name: str, change: mx.array, start: int, count: int) -> None:
        vector = self.vectors.get(name)
        vector = mx.full((count,), 0.0 if name == "offset" else 1.0) if vector is None else vector
        vector[start : start + len(change)] += change
        self.vectors[name] = vector

    def _stack(self, down: mx.array, up: mx.array, start: int) -> None:
        key = hashlib.sha256(np.array(down).tobytes()).hexdigest()
        _, ups = self.stacked.setdefault(key, (down, []))
        ups.append((up, start))

    def branch(self, dtype: mx.Dtype, bias: mx.array | None) -> Branch:
        """Returns the branch in a compute type, for a layer with this bias."""
        arrays: dict[str, mx.array] = dict(self.vectors)
        if "gain" in arrays and "intake" in arrays:
            raise ModelError("one layer has DoRA over rows and DoRA over columns", "one of them at a time")
        if "gain" in arrays and bias is not None:  # lengths are those of W; the bias stays
            offset = arrays.get("offset", mx.zeros((self.rows,)))
            arrays["offset"] = offset + bias.astype(mx.float32) * (1 - arrays["gain"])
        if self.stacked:
            downs = [down for down, _ in self.stacked.values()]
            widest = max(down.shape[1] for down in downs)
            downs = [_padded(down, widest) for down in downs]
            up, place = mx.zeros((sum(map(len, downs)), self.rows)), 0
            for down, ups in self.stacked.values():
                for rows, start in ups:
                    up[place : place + len(down), start : start + len(rows)] += rows.T
                place += len(down)
            arrays |= {"down": mx.contiguous(mx.concatenate(downs).T), "up": up}
        if self.dense is not None:
            arrays["dense"] = self.dense
        arrays = {name: array.astype(dtype) for name, array in arrays.items()}
        products = tuple(
            Kronecker(
                one.w1.astype(dtype),
                one.w2.astype(dtype),
                one.start,
                None if one.gain is None else one.gain.astype(dtype),
            )
            for one in self.products
        )
        branch = Branch(**arrays, products=products)
        mx.eval(branch.arrays)
        return branch


def _padded(down: mx.array, width: int) -> mx.array:
    """Returns (r, in) with zeros for inputs that an adapter does not read, up to so many."""
    return mx.pad(down, [(0, 0), (0, max(width - down.shape[1], 0))])


def _as_low_rank(arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Returns LoHa's product of two products of rank r as one of rank r^2."""
    up = arrays["h1_a"][:, :, None] * arrays["h2_a"][:, None, :]
    down = arrays["h1_b"][:, None, :] * arrays["h2_b"][None, :, :]
    return {"down": down.reshape(-1, down.shape[-1]), "up": up.reshape(len(up), -1)}


class Attached:
    """The changes of adapters in one network, which can be undone.

    Args:
        network: loaded; matrices of its layers may be absent.
        component: its folder.
        dtype: the compute type of the branches.
    """

    def __init__(self, network: nn.Module, component: str, dtype: mx.Dtype):
        self.network, self._component, self._dtype = network, component, dtype
        self._layers = dict(network.named_modules())
        self._shapes = layer_shapes(component, network.config)
        self._vectors: dict[str, mx.array] = {}  # of the network itself, that adapters have changed
        self._keys: dict[str, list[tuple[Part, float]]] = {}  # parts and weights of each changed layer

    def use(self, uses: Uses, lengths: Measure) -> set[str]:
        """Makes these adapters, and no others, those of the network.

        Args:
            uses: adapters with weights; those of weight 0 are left out.
            lengths: measures DoRA's rows.

        Returns:
            Paths of layers and vectors that are other ones now.
        """
        wanted: dict[str, list[tuple[Adapter, Part, float]]] = {}
        for adapter, weight in uses:
            for part in adapter.parts if weight else ():
                if part.target.component == self._component:
                    wanted.setdefault(part.target.path, []).append((adapter, part, weight))
        keys = {path: [(part, weight) for _, part, weight in parts] for path, parts in wanted.items()}
        changed = {path for path in self._keys.keys() | keys.keys() if self._keys.get(path) != keys.get(path)}
        for path in sorted(changed):
            if path in self._shapes:
                self._set_layer(path, wanted.get(path, ()), lengths)
            else:
                self._set_vector(path, wanted.get(path, ()))
        self._keys = keys
        return changed

    def touches(self, stage: Callable, changed: set[str]) -> bool:
        """True where one of these paths is of the layers that a stage of modulation computes."""
        owner: Any = getattr(stage, "__self__", stage)
        path = next(path for path, module in self._layers.items() if module is owner)
        return any(one.startswith(tuple(f"{path}.{name}." for name in owner.modulation_layers)) for one in changed)

    def _set_layer(
        self,
        path: str,
        parts: Sequence[tuple[Adapter, Part, float]],
        lengths: Measure,
    ) -> None:
        layer = self._layers[path]
        if not parts:
            set_branch(layer, None)
            return
        total = _Sum(*self._shapes[path])
        for adapter, part, weight in parts:
            total.add(part, weight, lengths(adapter, part) if part.length else None)
        set_branch(layer, total.branch(self._dtype, layer.get("bias")))

    def _set_vector(self, path: str, parts: Sequence[tuple[Adapter, Part, float]]) -> None:
        original = self._vectors.setdefault(path, parameters(self.network)[path])
        vector = original.astype(mx.float32)
        for _, part, weight in parts:
            arrays = {name: array.astype(mx.float32) for name, array in part.arrays.items()}
            vector = arrays["set"] if "set" in arrays else vector + weight * arrays["diff"]
        changed = vector.astype(original.dtype) if parts else self._vectors.pop(path)
        mx.eval(changed)
        self.network.update(tree_unflatten([(path, changed)]))


def branch_bytes(uses: Uses, sizes: ModelSizes, dtype: mx.Dtype) -> int:
    """Returns the bytes that the branches of these adapters take in a compute type, at most."""
    shapes = {name: layer_shapes(name, config) for name, config in sizes.by_component().items() if name != "vae"}
    numbers = 0
    for part in (part for adapter, weight in uses if weight for part in adapter.parts):
        rows, width = shapes[part.target.component].get(part.target.path, (0, 0))
        rank = part.rank
        if "diff" in part.arrays and width:
            numbers += rows * width
        elif rank is None:
            numbers += sum(array.size for array in part.arrays.values())
        else:
            numbers += (rank**2 if "h1_a" in part.arrays else rank) * (width + rows) + 2 * rows
    return numbers * dtype.size
