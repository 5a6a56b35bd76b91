"""Reads adapter files: every tensor is matched to a layer and checked, or the file is refused by name."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import ModelError
from ..files import parse_json, read_json
from ..models.config import ModelSizes
from ..weights import TensorInfo, read_header
from . import few_steps, names
from .checks import check_group, check_model, check_overlaps, is_widened, refused, shown
from .names import AdapterTarget
from .parts import LENGTHS, Adapter, Facts, Part

CONFIG = "adapter_config.json"  # of PEFT, beside its file
_MOST_RANKS = 16  # ranks that a description lists
_TRIGGERS = ("modelspec.trigger_phrase", "trigger_phrase", "trigger_words", "trigger_word", "activation_text")
_LICENCES = re.compile("licen[cs]e", re.I)
_TITLES = re.compile(r"modelspec\.title|ss_output_name", re.I)
_ORIGINS = re.compile("modelspec.(?:architecture|title)|base_?model|sd_model_name|_name_or_path", re.I)


@dataclass(frozen=True)
class AdapterOutline:
    """The names of a file, matched to a model; no tensor was read.

    Attributes:
        groups: of each module that the model has: its target, and the names of its tensors by field.
        unmatched: names of modules that it does not have.
        infos: every tensor of the file.
        metadata: of its header, and of PEFT's config beside it.
    """

    groups: dict[str, tuple[AdapterTarget, dict[str, str]]]
    unmatched: tuple[str, ...]
    infos: dict[str, TensorInfo]
    metadata: dict[str, Any]

    @property
    def modules(self) -> int:
        """Number of modules in the file."""
        return len(self.groups) + len(self.unmatched)


def outline(path: Path, sizes: ModelSizes) -> AdapterOutline:
    """Matches the names of a file to a model, and checks types and shapes; reads the header alone.

    Raises:
        ModelError: not an adapter, one for another model, of a style that is not read, or damaged.
    """
    infos, metadata = read_header(path)
    known, groups, unmatched = names.targets(sizes), {}, {}
    for name in infos:
        if unread := names.unread_style(name):
            style, todo = unread
            found = f"{shown(name)} is of the style {style}, which is not read yet"
            raise refused(path, found, "LoRA, LoKr, LoHa, DoRA or full differences", todo)
        module, what = names.split(name) or (names.bare(name), "")
        target = known.get(module)
        if not what or target is None:
            unmatched.setdefault(module, name)
            continue
        _, fields = groups.setdefault(module, (target, {}))
        if what in fields:
            raise refused(path, f"{shown(fields[what])} and {shown(name)} are the same tensor", "each once")
        fields[what] = name
    check_model(path, sizes, groups, list(unmatched), infos)
    found = AdapterOutline(groups, tuple(unmatched), infos, _settings(path, metadata))
    for target, fields in groups.values():
        check_group(path, target, fields, infos)
    check_overlaps(path, groups.values())
    return found


def looks_like_adapter(path: Path) -> bool:
    """True where a safetensors file names the parts of an adapter's formula, or those of a style that is not read."""
    if path.suffix.lower() != ".safetensors" or not path.is_file():
        return False
    infos, _ = read_header(path)
    split = (names.split(name) for name in infos)
    factors = ("down", "up", "hada_w1_a", "lokr_w1", "lokr_w1_a", "diff")
    return any(found and found[1] in factors for found in split) or any(map(names.unread_style, infos))


def read(path: Path, sizes: ModelSizes, facts: Facts) -> Adapter:
    """Reads an adapter file for a model.

    Args:
        path: a safetensors file.
        sizes: of the model.
        facts: its name, source and hash; what the file says is added.

    Raises:
        ModelError: as `outline`; or a tensor holds NaN, a rank or an alpha that cannot be used.
    """
    found = outline(path, sizes)
    tensors = mx.load(str(path))
    assert isinstance(tensors, dict)  # of a safetensors file, without return_metadata
    parts = []
    for target, fields in found.groups.values():
        arrays = {what: tensors[name] for what, name in fields.items()}
        for what, array in arrays.items():
            if not mx.isfinite(array).all().item():
                raise refused(path, f"{shown(fields[what])} holds NaN or infinities", "finite numbers")
        parts += _parts(path, target, fields, arrays, _Scaling.of(found.metadata, fields))
    return Adapter(described(found, facts, sizes, parts), tuple(parts))


def shapes_of(found: AdapterOutline) -> tuple[Part, ...]:
    """Returns the parts of an outline. Their arrays have shapes and were never evaluated: a plan needs no more."""
    parts = []
    for target, fields in found.groups.values():
        shapes = {what: found.infos[name].shape for what, name in fields.items()}
        made = {what.replace("hada_w", "h"): shape for what, shape in shapes.items()}
        for number in "12" if any(what.startswith("lokr") for what in shapes) else "":
            whole, a, b = (f"lokr_w{number}{end}" for end in ("", "_a", "_b"))
            made[f"w{number}"] = shapes[whole] if whole in shapes else (shapes[a][0], shapes[b][1])
        if "diff_b" in shapes and target.width:
            made["bias"] = shapes["diff_b"]
        elif "diff_b" in shapes:
            bias = replace(target, path=f"{target.path.rpartition('.')[0]}.bias")
            parts.append(Part(bias, {"diff": mx.zeros(shapes["diff_b"])}))
        if "dora_scale" in shapes:
            over_columns = shapes["dora_scale"] == (1, target.width) and target.rows > 1
            made["intake" if over_columns else "gain"] = (math.prod(shapes["dora_scale"]),)
        names_of_parts = ("down", "up", "h1_a", "h1_b", "h2_a", "h2_b", "w1", "w2", "diff", "set", "bias", *LENGTHS)
        if arrays := {what: mx.zeros(shape) for what, shape in made.items() if what in names_of_parts}:
            parts.insert(0, Part(replace(target, swapped=False), arrays))
    return tuple(parts)


def described(found: AdapterOutline, facts: Facts, sizes: ModelSizes, parts: Iterable[Part] = ()) -> Facts:
    """Returns an adapter's facts with what its file says: kinds, ranks, words, licence, the preset for few steps."""
    parts = list(parts)
    kinds = Counter(part.kind for part in parts) or _kinds_of(found)
    ranks = {part.rank for part in parts if part.rank is not None} or _ranks_of(found)
    metadata = found.metadata
    stated = [str(value) for key, value in metadata.items() if _LICENCES.search(key) and isinstance(value, str)]
    words = dict.fromkeys(text for key in _TRIGGERS if (text := str(metadata.get(key) or "").strip()))
    control = any(is_widened(target, fields, found.infos) for target, fields in found.groups.values())
    named = [str(value) for key, value in metadata.items() if _ORIGINS.search(key) and isinstance(value, str)]
    titles = [str(value) for key, value in metadata.items() if _TITLES.search(key)]
    changed = [target for target, _ in found.groups.values()]
    preset = few_steps.recognised((facts.name, facts.source, *titles), changed, sizes)
    return replace(
        facts,
        modules=found.modules,
        applied=len(found.groups),
        dropped=found.unmatched,
        kinds=tuple(f"{count} {kind}" for kind, count in kinds.most_common()),
        ranks=tuple(sorted(ranks)[:_MOST_RANKS]),
        triggers=tuple(words)[:20],
        license=(*facts.license, *(text[:200] for text in stated)),
        origins=(*facts.origins, *(text[:200] for text in named)),
        control=control,
        preset=(preset.steps, preset.guidance, preset.weight) if preset else (),
        published=preset.publisher if preset else "",
        few_steps=preset is None and few_steps.looks_like_one(changed, ranks, sizes),
    )


def _kinds_of(found: AdapterOutline) -> Counter[str]:
    """Counts the formulas by the names of a header."""
    kinds: Counter[str] = Counter()
    for _, fields in found.groups.values():
        signs = (("down", "LoRA"), ("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr"), ("lokr_w1_a", "LoKr"), ("set", "norm"))
        kind = next((kind for sign, kind in signs if sign in fields), "full")
        lengths = fields.keys() & {"magnitude", "dora_scale"}
        kinds["DoRA" if lengths and kind == "LoRA" else f"DoRA ({kind})" if lengths else kind] += 1
    return kinds


def _ranks_of(found: AdapterOutline) -> set[int]:
    fields = (fields for _, fields in found.groups.values())
    factors = (one.get("down") or one.get("hada_w1_b") for one in fields)
    return {found.infos[name].shape[0] for name in factors if name}


# --- scales ---


@dataclass(frozen=True)
class _Scaling:
    """The scale of one module by the header of PEFT's files; numbers in `.alpha` tensors come before it.

    Attributes:
        alpha: None: the rank.
        rank: as the header has it; None: not said.
        by_root: alpha / sqrt(rank), as rsLoRA has it.
        always: the scale holds for LoKr of whole factors too, as PEFT has it.
    """

    alpha: float | None = None
    rank: int | None = None
    by_root: bool = False
    always: bool = False

    @classmethod
    def of(cls, settings: Mapping[str, Any], fields: Mapping[str, str]) -> "_Scaling":
        """Returns the scale of a module."""
        name = next(iter(fields.values()))
        module, _ = names.split(name) or (name, "")
        component = next((prefix for prefix in ("text_encoder_2.", "text_encoder.") if name.startswith(prefix)), "")
        peft = settings.get("peft", {}).get(component or "transformer.", {})
        alpha = _by_pattern(peft.get("alpha_pattern"), module, peft.get("lora_alpha", peft.get("alpha")))
        rank = _by_pattern(peft.get("rank_pattern"), module, peft.get("r"))
        return cls(
            alpha=float(alpha) if isinstance(alpha, int | float) and not isinstance(alpha, bool) else None,
            rank=rank if type(rank) is int else None,
            by_root=peft.get("use_rslora") is True,
            always=str(peft.get("peft_type", "")).upper() in ("LOKR", "LOHA"),
        )

    def factor(self, alpha: float | None, rank: int) -> float:
        """Returns the scale of a product of this rank."""
        if alpha is not None:
            return alpha / rank
        return 1.0 if self.alpha is None else self.alpha / (math.sqrt(rank) if self.by_root else rank)


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """Returns the value of the first pattern that ends a module's name, as PEFT does; patterns are names here."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        plain = str(pattern).removeprefix("^").removesuffix("$").replace("\\.", ".")
        if module == plain or (not pattern.startswith("^") and module.endswith(f".{plain}")):
            return value
    return default


def _settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Returns the metadata of a file with PEFT's settings by component, from its header or the file beside it.

    Raises:
        ModelError: the header's JSON is damaged, or has patterns that are no names.
    """
    settings: dict[str, Any] = dict(metadata)
    peft: dict[str, dict[str, Any]] = {}
    if text := metadata.get("lora_adapter_metadata"):
        try:
            given = parse_json(text)
        except ValueError as error:
            raise refused(path, f"lora_adapter_metadata is no JSON: {error}") from None
        for key, value in given.items() if isinstance(given, dict) else ():
            component, _, name = key.partition(".")
            peft.setdefault(f"{component}.", {})[name] = value
    elif (beside := path.parent / CONFIG).is_file() and path.name.startswith(("adapter_model", "pytorch_lora")):
        peft = {"transformer.": read_json(beside)}
    for one in peft.values():
        for patterns in ("rank_pattern", "alpha_pattern"):
            table = one.get(patterns) or {}
            bad = [key for key in table if re.search(r"[*+?()\[\]{}|]", key)] if isinstance(table, dict) else [patterns]
            if bad:
                raise refused(path, f"{patterns} has {shown(bad[0])}, a pattern that is no name", "names of modules")
    return settings | {"peft": peft}


def _parts(
    path: Path, target: AdapterTarget, fields: Mapping[str, str], arrays: dict[str, mx.array], scaling: _Scaling
) -> list[Part]:
    """Returns the changes that one module's tensors make: of its layer, and of a norm's bias."""
    arrays = {what: _in_our_order(target, what, array) for what, array in arrays.items()}
    alpha = float(np.array(arrays["alpha"].astype(mx.float32)).item()) if "alpha" in arrays else None
    if alpha == 0:
        raise refused(path, f"{shown(fields['alpha'])} is 0, so that the layer would not change", "another number")
    if "down" in arrays:
        rank = arrays["down"].shape[0]
        if scaling.rank not in (None, rank):
            found = f"{shown(fields['down'])} has rank {rank}, and the header says {scaling.rank}"
            raise refused(path, found, "the same rank")
        scale = scaling.factor(alpha, rank)
        made = {"down": arrays["down"], "up": _scaled(arrays["up"], scale)}
        if "bias" in arrays:
            made["bias"] = _scaled(arrays["bias"], scale)
    elif "hada_w1_a" in arrays:
        rank = arrays["hada_w1_b"].shape[0]
        made = {name.replace("hada_w", "h"): array for name, array in arrays.items() if name.startswith("hada")}
        made["h1_a"] = _scaled(made["h1_a"], scaling.factor(alpha, rank))
    elif any(name.startswith("lokr") for name in arrays):
        w1, w2 = (_whole(arrays, f"lokr_w{number}") for number in "12")
        made = {"w1": _scaled(w1, _kron_scale(arrays, alpha, scaling)), "w2": w2}
    elif "set" in arrays:
        made = {"set": arrays["set"]}
    else:
        made = {"diff": arrays["diff"]} if "diff" in arrays else {}
    parts = []
    if "diff_b" in arrays and not target.width:  # of a norm's bias, a vector of its own
        bias = replace(target, path=f"{target.path.rpartition('.')[0]}.bias")
        parts.append(Part(bias, {"diff": arrays["diff_b"]}))
    elif "diff_b" in arrays:
        made["bias"] = made.get("bias", 0) + arrays["diff_b"]
    if "magnitude" in arrays:
        made["magnitude"] = arrays["magnitude"]
    if "dora_scale" in arrays:
        over_columns = arrays["dora_scale"].shape == (1, target.width) and target.rows > 1
        made["intake" if over_columns else "gain"] = arrays["dora_scale"].reshape(-1)
        if over_columns and "w1" in made:
            raise refused(path, f"{shown(fields['dora_scale'])}: DoRA over columns of LoKr is not read yet")
    if made:
        parts.insert(0, Part(replace(target, swapped=False), made))
    mx.eval([part.arrays for part in parts])
    return parts


def _kron_scale(arrays: Mapping[str, mx.array], alpha: float | None, scaling: _Scaling) -> float:
    """Returns alpha / rank where a factor is a product itself; 1 where both are whole, unless PEFT made the file."""
    inner = [arrays[name].shape[0] for name in ("lokr_w2_b", "lokr_w1_b") if name in arrays]
    if inner:
        return scaling.factor(alpha, inner[0])
    return scaling.alpha / scaling.rank if scaling.always and scaling.alpha and scaling.rank else 1.0


def _whole(arrays: Mapping[str, mx.array], name: str) -> mx.array:
    if name in arrays:
        return arrays[name]
    return arrays[f"{name}_a"].astype(mx.float32) @ arrays[f"{name}_b"].astype(mx.float32)


def _scaled(array: mx.array, scale: float) -> mx.array:
    """Returns the array times a number, in its own type where that is exact."""
    product = array.astype(mx.float32) * scale
    same = product.astype(array.dtype)
    return same if mx.array_equal(same.astype(mx.float32), product).item() else product


_BY_ROWS = ("up", "bias", "diff", "diff_b", "magnitude", "hada_w1_a", "hada_w2_a", "lokr_w1", "lokr_w1_a")


def _in_our_order(target: AdapterTarget, what: str, array: mx.array) -> mx.array:
    """Returns a tensor with its output rows in our order."""
    by_rows = what in _BY_ROWS or (what == "dora_scale" and array.shape[0] == target.rows)
    if not target.swapped or not by_rows:
        return array
    if len(array) % 2:
        raise ModelError(f"{target.path}: a factor has {len(array)} rows, which have no halves", "an even number")
    return mx.concatenate([array[len(array) // 2 :], array[: len(array) // 2]])
