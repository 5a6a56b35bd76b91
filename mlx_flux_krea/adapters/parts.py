"""An adapter once it is read: parts, each a change of some output rows of one layer, and the facts about it.

Every scale is folded into one of a part's factors, whatever the file's form was. `tensors_of` and `open_parts` write
and read the form that the home folder keeps; `formulas.py` computes with it.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from ..errors import ModelError, printable, short_repr
from ..files import read_json
from ..models import config as configs
from ..models.config import ModelSizes
from ..weights import read_header
from . import names
from .names import AdapterTarget

LENGTHS = ("magnitude", "gain", "intake")  # arrays of DoRA


@dataclass(frozen=True, repr=False, eq=False)
class Part:
    """A change of some output rows of one layer, or of a vector.

    Attributes:
        target: the layer and the rows.
        arrays: down (r, in) and up (rows, r); or w1 (a, b) and w2 (c, d), whose Kronecker product is the change; or
            h1_a, h1_b, h2_a, h2_b, whose two products are multiplied element by element; or diff (rows, in). With any
            of these: bias (rows,), and one of magnitude, gain (both (rows,)) and intake (in,), which are DoRA's lengths
            by the rules of PEFT, of LyCORIS over rows, and over columns. Or set (rows,) alone, of a norm.
    """

    target: AdapterTarget
    arrays: dict[str, mx.array]

    def __repr__(self) -> str:
        return short_repr("Part", self.target.path, **self.arrays)

    @property
    def kind(self) -> str:
        """The name of the formula."""
        kinds = (("down", "LoRA"), ("w1", "LoKr"), ("h1_a", "LoHa"), ("set", "norm"))
        kind = next((kind for name, kind in kinds if name in self.arrays), "full")
        return f"DoRA ({kind})" if self.length and kind != "LoRA" else "DoRA" if self.length else kind

    @property
    def length(self) -> str | None:
        """The name of the array that holds DoRA's lengths."""
        return next((name for name in LENGTHS if name in self.arrays), None)

    @property
    def rank(self) -> int | None:
        """Columns of the low-rank product."""
        if "down" in self.arrays:
            return self.arrays["down"].shape[0]
        return self.arrays["h1_b"].shape[0] if "h1_b" in self.arrays else None


@dataclass(frozen=True)
class Facts:
    """Everything about an adapter but its arrays; JSON in the home folder.

    Attributes:
        name: under which it is installed or was loaded.
        source: the file or the place on the hub that it came from.
        sha256: of that file.
        modules: modules that the file changes.
        applied: those of them that this model has.
        dropped: names of the others.
        kinds: the formulas, with the number of changes of each.
        ranks: of its low-rank products.
        triggers: words that the file says the prompt needs.
        license: ids of licences that the file or its place states.
        origins: names of models that the file says it came from.
        dev: it adds the duties of FLUX.1 [dev]'s licence; why.
        control: it widens the transformer's input, as BFL's control adapters do.
        preset: steps, guidance and weight as published, where it is an adapter for few steps.
        published: who published them.
        few_steps: its layers and rank are those of adapters for few steps, but no name says which one it is.
    """

    name: str
    source: str
    sha256: str
    modules: int = 0
    applied: int = 0
    dropped: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    triggers: tuple[str, ...] = ()
    license: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    dev: str = ""
    control: bool = False
    preset: tuple[float, ...] = ()
    published: str = ""
    few_steps: bool = False

    @property
    def count(self) -> str:
        """How much of the file is used: "494 of 494"."""
        return f"{self.applied} of {self.modules}"


@dataclass(frozen=True, repr=False)
class Adapter:
    """An adapter that fits one model: its facts, and its changes."""

    facts: Facts
    parts: tuple[Part, ...]

    def __repr__(self) -> str:
        return short_repr("Adapter", self.facts.name, applied=self.facts.count, kinds=list(self.facts.kinds))

    def changes(self, *components: str) -> bool:
        """True where it changes one of these networks."""
        return any(part.target.component in components for part in self.parts)


# --- the form that is kept ---

_TENSOR = re.compile(r"(transformer|text_encoder|text_encoder_2)\.([\w.]+?)@(\d{1,7})-(\d{1,7})\.(\w+)")


def tensors_of(adapter: Adapter) -> dict[str, mx.array]:
    """Returns the arrays of an adapter by names that say everything: COMPONENT.PATH@START-STOP.FIELD."""
    tensors = {}
    for part in adapter.parts:
        target = part.target
        at = f"{target.component}.{target.path}@{target.start}-{target.stop}"
        tensors |= {f"{at}.{what}": array for what, array in part.arrays.items()}
    return tensors


def open_parts(path: Path, sizes: ModelSizes, read: bool = True) -> tuple[Part, ...]:
    """Opens what `tensors_of` made; without `read`, the arrays are lazy.

    Raises:
        ModelError: damaged, or for a model of other sizes.
    """
    read_header(path)
    tensors = mx.load(str(path))
    assert isinstance(tensors, dict)  # of a safetensors file, without return_metadata
    known = sorted(names.targets(sizes).values(), key=lambda target: target.rows)
    by_layer = {(target.component, target.path): target for target in known}  # the last one is the whole
    groups: dict[AdapterTarget, dict[str, mx.array]] = {}
    for name, array in tensors.items():
        match = _TENSOR.fullmatch(name)
        whole = _whole(by_layer, match[1], match[2]) if match else None
        if not match or whole is None or not int(match[3]) < int(match[4]) <= whole.stop:
            raise _unfit(path, name)
        target = replace(whole, start=int(match[3]), stop=int(match[4]), swapped=False)
        groups.setdefault(target, {})[match[5]] = array
    parts = tuple(Part(target, arrays) for target, arrays in groups.items())
    for part in parts:
        if not _fits(part):
            raise _unfit(path, f"{part.target.path} in another shape")
    if read:
        mx.eval(list(groups.values()))
    return parts


def _whole(by_layer: dict[tuple[str, str], AdapterTarget], component: str, path: str) -> AdapterTarget | None:
    """Returns the layer or vector at a path; a norm's bias is known by its weight."""
    weight = f"{path.removesuffix('bias')}weight"
    known = by_layer.get((component, path))
    if known is None and path.endswith(".bias") and (norm := by_layer.get((component, weight))):
        return replace(norm, path=path)
    return known


def _fits(part: Part) -> bool:
    """True where the shapes of a part's arrays are those of its rows."""
    shapes = {name: array.shape for name, array in part.arrays.items()}
    rows, width, rank = part.target.rows, part.target.width, part.rank
    vectors = {"bias": rows, "magnitude": rows, "gain": rows, "intake": width, "set": rows}
    if any(shapes[name] != (count,) for name, count in vectors.items() if name in shapes):
        return False
    if "down" in shapes or "up" in shapes:
        return shapes.get("up") == (rows, rank) and shapes.get("down") in [(rank, one) for one in part.target.widths]
    if "w1" in shapes or "w2" in shapes:
        one, two = shapes.get("w1", ()), shapes.get("w2", ())
        return len(one) == len(two) == 2 and (one[0] * two[0], one[1] * two[1]) == (rows, width)
    if any(name.startswith("h") for name in shapes):
        factors = [(shapes.get(f"h{i}_a", (0, 0)), shapes.get(f"h{i}_b", (0, 0))) for i in "12"]
        return all(a[:1] == (rows,) and a[1:] == b[:1] and b[1:] == (width,) for a, b in factors)
    return shapes.get("diff", (rows, width)[: 2 if width else 1]) == ((rows, width) if width else (rows,))


def _unfit(path: Path, found: str) -> ModelError:
    todo = "load the file that it was made from again"
    return ModelError(f"{path} holds {printable(found[:120])}", "an adapter for this model", todo)


def read_facts(path: Path) -> Facts:
    """Reads adapter.json.

    Raises:
        ModelError: it is damaged.
    """
    return configs.from_json(Facts, read_json(path), str(path))
