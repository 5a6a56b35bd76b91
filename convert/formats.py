"""Weights that are stored in several tensors, and the statements that files make about them.

ComfyUI's files say how each layer is stored: in a tensor `L.comfy_quant` with JSON in its bytes, or for all layers in
the header's `_quantization_metadata`. Every statement is read; one that is not understood is refused by its own words.

Sources: ComfyUI's guide to quantization, comfy_kitchen's Python reference, MLX's quantize.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from mlx_flux_krea.errors import ModelError, printable
from mlx_flux_krea.files import parse_json

from .decode import BESIDE, FLOAT_MODES, ROTATIONS, TILES, TYPES
from .tensors import Tensor, stored_bytes

GROUP_SIZE = 64  # of MLX-quantized weights whose folder states none, as mflux writes them
_FLOATS = {"F32", "F16", "BF16"}
_SCALES = ("weight_scale", "scale_weight")
_OTHER = "download it again, or take another file"
LONGEST = 2**12  # bytes of a statement about one layer; published ones have under a hundred
METHOD = "svdquant"
MARK, _METADATA = "comfy_quant", "_quantization_metadata"
# fields of statements that change no weight: how products are computed, and the type and shape before
_HARMLESS = {"full_precision_matrix_mult", "orig_dtype", "input_scale"}
_VERSIONS = ("1.0", "1", 1, 1.0)  # of the header's statements


@dataclass(frozen=True)
class Statement:
    """A statement of a file about the weight of one layer: its format, and other fields."""

    format: str
    fields: Mapping = field(default_factory=dict)


@dataclass(frozen=True)
class Compound:
    """A way to store a weight in several tensors.

    Attributes:
        format: as a statement calls it; "": files do not state it.
        stored: types of the tensor `L.weight`.
        beside: names of the other parts.
        combine: from the tensors, the statement's fields and MLX's group size, the whole; None: they do not belong
            together.
    """

    format: str
    stored: frozenset[str]
    beside: tuple[str, ...]
    combine: Callable[..., Tensor | None]


def join_parts(
    tensors: dict[str, Tensor],
    group_size: Callable[[str], int] = lambda layer: GROUP_SIZE,
    statements: Mapping[str, Statement] | None = None,
) -> dict[str, Tensor]:
    """Joins tensors that store one weight together, such as codes and scales.

    Args:
        tensors: as the files have them.
        group_size: returns the group size of an MLX-quantized layer by its name.
        statements: by layer.

    Raises:
        ModelError: a layer is not stored as its statement says, or in a format that is not read.
    """
    joined, statements = dict(tensors), statements or {}
    for full, tensor in tensors.items():
        layer, _, last = full.rpartition(".")
        said = statements.get(layer)
        if last != "weight":
            continue
        for row in COMPOUNDS:
            parts = [tensors[name] for part in row.beside if (name := f"{layer}.{part}") in tensors]
            if row.format != (said.format if said else "") or tensor.dtype not in row.stored:
                continue
            if len(parts) != len(row.beside) or (not row.beside and any(f"{layer}.{n}" in tensors for n in _SCALES)):
                continue
            whole = row.combine(tensor, *parts, fields=said.fields if said else {}, group=group_size(layer))
            if whole and tuple((said.fields.get("orig_shape") if said else 0) or whole.shape) == whole.shape:
                joined[full] = whole
                for part in parts:
                    del joined[part.name]
                break
        else:
            if said:
                raise _contradicted(tensor, layer, said, tensors)
    return joined


def _contradicted(tensor: Tensor, layer: str, said: Statement, tensors: dict[str, Tensor]) -> ModelError:
    known = {row.format for row in COMPOUNDS if row.format}
    what = f"{tensor.path}: {layer} says that it is stored as {printable(said.format[:100])}"
    if said.format not in known:
        return ModelError(f"{what}, which is not read", f"one of {', '.join(sorted(known))}", "take another file")
    beside = (t for name, t in tensors.items() if name.startswith(f"{layer}.weight") and name != tensor.name)
    found = ", ".join(f"{t.name.removeprefix(layer + '.')} {t.dtype} {list(t.shape)}" for t in (tensor, *beside))
    return ModelError(f"{what}, and holds {found}", "tensors of that format", "download it again, or take another file")


# --- statements ---


def read_statements(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Statement]:
    """Returns the statements of a file about its layers, by the layers' full names.

    Raises:
        ModelError: one cannot be read, has a field that is not known, or contradicts another.
    """
    found: dict[str, Statement] = {}
    marks = {name: t for name, t in tensors.items() if name.endswith(f".{MARK}") or name == MARK}
    path = next((t.path for t in tensors.values()), None)
    for name, tensor in marks.items():
        layer = name.removesuffix(MARK).removesuffix(".")
        found[layer] = _statement(f"{tensor.path}: {name}", _bytes(tensor))
    if text := metadata.get(_METADATA):
        where = f"{path}: {_METADATA}"
        whole = _json(where, text)
        layers = whole.get("layers")
        if not isinstance(layers, dict):
            raise ModelError(f"{where} has no layers", "an object of layers", _OTHER)
        if odd := sorted(whole.keys() - {"layers", "format_version"}):
            raise ModelError(f"{where} says {printable(odd[0][:100])}, which is not read", "layers alone", _OTHER)
        if (version := whole.get("format_version", "1.0")) not in _VERSIONS:
            raise ModelError(f"{where} is of version {printable(str(version)[:20])}", "version 1.0", _OTHER)
        for name, value in layers.items():
            layer = _full(name, tensors)
            said = _statement(f"{where}: {printable(name[:200])}", value)
            if layer in found and found[layer] != said:
                contradiction = f"{where} says {said.format} of {layer}, and its {MARK} {found[layer].format}"
                raise ModelError(contradiction, "one statement", _OTHER)
            if layer is not None:
                found[layer] = said
    return found


def check_method(config: Mapping, tensors: Mapping[str, Tensor], where: str) -> None:
    """Checks the statement of a config.json, or of a header, about the method by which weights were quantized.

    Args:
        config: JSON with perhaps a `quantization_config`; one without a method is MLX's.
        tensors: of the file; where all are plain numbers, the statement is about another file.
        where: the JSON's place, for errors.

    Raises:
        ModelError: a method that is not read, by its own name.
    """
    own = config.get("quantization_config")
    own = own if isinstance(own, dict) else {}
    method = own.get("quant_method", own.get("method", METHOD))
    if method != METHOD and any(t.dtype not in _FLOATS for t in tensors.values()):
        found = f"{where} says that its method is {printable(str(method)[:100])}, which is not read"
        raise ModelError(found, f"plain weights, or {METHOD}", "take another file of the same model")


def _full(layer: str, tensors: Mapping[str, Tensor]) -> str | None:
    """Returns the layer's name in the file, which may have a prefix more or less; None: the file does not hold it."""
    layer = layer.removesuffix(".weight")
    parts = layer.split(".")
    for shorter in (".".join(parts[n:]) for n in range(len(parts))):
        if f"{shorter}.weight" in tensors:
            return shorter
    ends = [name.removesuffix(".weight") for name in tensors if name.endswith(f".{layer}.weight")]
    return ends[0] if len(ends) == 1 else None


def _statement(where: str, value) -> Statement:
    """Reads a statement.

    Raises:
        ModelError: no JSON, no format, or fields that are not known.
    """
    value = _json(where, value) if isinstance(value, bytes | str) else value
    if not isinstance(value, dict) or not isinstance(value.get("format"), str):
        raise ModelError(f"{where} names no format", 'JSON like {"format": "float8_e4m3fn"}', _OTHER)
    inner = value.get("params")
    value = {**value, **(inner if isinstance(inner, dict) else {})}  # fields may stand one level deeper
    fields = {n: v for n, v in value.items() if n not in ("format", *_HARMLESS) and v is not None and v is not False}
    if fields.get("params") == inner and isinstance(inner, dict):
        del fields["params"]
    shape = fields.get("orig_shape", [])
    if not isinstance(shape, list) or not all(type(n) is int for n in shape):
        raise ModelError(f"{where} says orig_shape = {printable(json.dumps(shape)[:100])}", "a list of sizes", _OTHER)
    known = _FIELDS.get(value["format"])
    if known is not None and (odd := sorted(fields.keys() - known - {"orig_shape"})):
        said = f"{printable(odd[0][:100])} = {printable(json.dumps(fields[odd[0]])[:100])}"
        raise ModelError(f"{where} says {said}, which is not read", f"{value['format']} without it", _OTHER)
    return Statement(value["format"], fields)


# fields that are read, by format
_FIELDS = {
    "float8_e4m3fn": set(),
    "float8_e5m2": set(),
    "nvfp4": {"group_size", "block_size"},
    "mxfp8": {"group_size", "block_size"},
    "int8_tensorwise": {"convrot", "convrot_groupsize", "per_row", "per_channel"},
}


def _json(where: str, text: bytes | str) -> dict:
    try:
        value = parse_json(text.rstrip(b"\0 ") if isinstance(text, bytes) else text.removeprefix("\ufeff"))
    except ValueError as error:
        raise ModelError(f"{where} cannot be read: {printable(str(error))}", "JSON", "download it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{where} is no JSON object", "one", "download it again")
    return value


def _bytes(tensor: Tensor) -> bytes:
    """Reads the bytes of a statement.

    Raises:
        ModelError: it is too long, or the file cannot be read.
    """
    if tensor.end - tensor.start > LONGEST or tensor.dtype not in ("U8", "I8"):
        found = f"{tensor.path}: {tensor.name} is {tensor.dtype} {list(tensor.shape)}"
        raise ModelError(found, f"JSON in at most {LONGEST} bytes", "download it again")
    return stored_bytes(tensor)


# --- how parts make a weight ---


def _is_scale(scale: Tensor, weight: Tensor) -> bool:
    """Returns True for one number, or one for each row."""
    rows = weight.shape[:1]
    return scale.dtype in _FLOATS and scale.shape in ((), (1,), (1, 1), rows, (*rows, 1))


def _scaled(base: str) -> Callable[..., Tensor | None]:
    """Returns the function that combines numbers of a type with their scale."""

    def combine(weight: Tensor, *scale: Tensor, fields: Mapping, group: int) -> Tensor | None:
        if not scale:
            return replace(weight, dtype=base)
        return replace(weight, dtype=f"scaled {base}", parts=scale) if _is_scale(scale[0], weight) else None

    return combine


def _int8(weight: Tensor, scale: Tensor, *, fields: Mapping, group: int) -> Tensor | None:
    """Combines int8 with its scales, whose rows may be rotated in groups."""
    if len(weight.shape) != 2 or not _is_scale(scale, weight):
        return None
    if "convrot" not in fields:
        return replace(weight, dtype="scaled I8", parts=(scale,))
    size = fields.get("convrot_groupsize", 256)
    if fields["convrot"] is not True:
        found = f"{weight.path}: {weight.name} says convrot = {printable(json.dumps(fields['convrot'])[:100])}"
        raise ModelError(found, "true or false", _OTHER)
    if type(size) is not int or size not in ROTATIONS or weight.shape[1] % size:
        found = f"{weight.path}: {weight.name} says convrot_groupsize = {size}, and has rows of {weight.shape[1]}"
        raise ModelError(found, "a power of 4 that divides them", "take another file")
    return replace(weight, dtype=f"I8 rotated by {size}", parts=(scale,))


def _tiled(mode: str, numbers: int, per_byte: int) -> Callable[..., Tensor | None]:
    """Returns the function that combines codes with scales in tiles of 128 x 4, and perhaps one more scale of all."""

    def combine(weight: Tensor, scales: Tensor, *whole: Tensor, fields: Mapping, group: int) -> Tensor | None:
        if len(weight.shape) != 2 or any(fields.get(key, numbers) != numbers for key in ("group_size", "block_size")):
            return None
        rows, width = weight.shape[0], weight.shape[1] * per_byte
        tiles = (-(-rows // 128) * 128, -(-(width // numbers) // 4) * 4)
        is_one = all(t.dtype in _FLOATS and t.numbers == 1 for t in whole)
        is_byte = scales.dtype in ("U8", "F8_E4M3", "F8_E8M0") and scales.numbers == tiles[0] * tiles[1]
        if not is_one or not is_byte or width % numbers:
            return None
        parts = (replace(scales, dtype=TILES, shape=tiles), *whole)
        return replace(weight, dtype=f"{mode} in tiles", shape=(rows, width), parts=parts)

    return combine


def _packed(weight: Tensor, scales: Tensor, biases: Tensor, *, fields: Mapping, group: int) -> Tensor | None:
    """Combines MLX's affine codes, scales and biases; bits follow from the shapes and the group size."""
    *rows, codes = weight.shape or (0,)
    *same, groups = scales.shape or (0,)
    bits, rest = divmod(32 * codes, group * groups) if groups else (0, 0)
    fits = rows and rows == same and scales.shape == biases.shape and not rest and group in (32, 64, 128)
    known = (name := f"{bits}-bit MLX") in TYPES and {scales.dtype, biases.dtype} <= _FLOATS
    whole = replace(weight, dtype=name, shape=(*rows, group * groups), parts=(scales, biases))
    return whole if fits and known else None


def _packed_floats(weight: Tensor, scales: Tensor, *, fields: Mapping, group: int) -> Tensor | None:
    """Combines MLX's codes and scales of small floats; the mode follows from the number of codes for each scale."""
    *rows, codes = weight.shape or (0,)
    for mode, numbers, bits in FLOAT_MODES:
        if rows and scales.dtype == "U8" and scales.shape == (*rows, 32 * codes // (bits * numbers)) and codes:
            return replace(weight, dtype=f"{mode} MLX", shape=(*rows, 32 * codes // bits), parts=(scales,))
    return None


def _with_more(base: Callable[..., Tensor | None], names: tuple[str, ...]) -> Callable[..., Tensor | None]:
    """Returns the function that combines a layer that MLX packs with further arrays of our folders."""

    def combine(weight: Tensor, *parts: Tensor, fields: Mapping, group: int) -> Tensor | None:
        whole = base(weight, *parts[: len(parts) - len(names)], fields=fields, group=group)
        if whole is None or not names:
            return whole
        more = {name: part.shape for name, part in zip(names, parts[-len(names) :], strict=True)}
        rank = more["up"][:1] if "up" in names else (0,)
        rows, width = whole.shape[:1], whole.shape[1:]
        fits = {"gain": rows, "intake": width, "down": (*width, *rank), "up": (*rank, *rows)}
        if any(more[name] != fits[name] for name in names):
            return None
        return replace(whole, dtype=f"{whole.dtype} with {' '.join(names)}", parts=parts)

    return combine


def _row(format: str, stored: str, beside: str, combine: Callable[..., Tensor | None]) -> Compound:
    return Compound(format, frozenset(stored.split()), tuple(beside.split()), combine)


_MOST_FIRST = sorted(BESIDE.items(), key=lambda row: -len(row[1]))
COMPOUNDS = (
    *(_row("", base, "scale_weight", _scaled(base)) for base in ("F8_E4M3", "F8_E5M2", "BF16", "F16", "F32")),
    *(_row("", base, "weight_scale", _scaled(base)) for base in ("F8_E4M3", "F8_E5M2")),
    *(
        _row(name, f"{base} U8 I8", beside, _scaled(base))
        for name, base in (("float8_e4m3fn", "F8_E4M3"), ("float8_e5m2", "F8_E5M2"))
        for beside in ("weight_scale", "scale_weight", "")
    ),
    _row("int8_tensorwise", "I8 U8", "weight_scale", _int8),
    _row("nvfp4", "U8 I8", "weight_scale weight_scale_2", _tiled("nvfp4", 16, 2)),
    _row("mxfp8", "F8_E4M3 U8 I8", "weight_scale", _tiled("mxfp8", 32, 1)),
    *(_row("", "U32", f"scales biases {end}", _with_more(_packed, names)) for end, names in _MOST_FIRST),
    *(_row("", "U32", f"scales {end}", _with_more(_packed_floats, names)) for end, names in _MOST_FIRST),
)
