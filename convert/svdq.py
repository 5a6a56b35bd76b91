"""Nunchaku's SVDQuant files: joins the tensors of each layer to a weight and a bias.

A layer L has `L.qweight`, `L.wscales`, `L.smooth`, `L.lora_down`, `L.lora_up` and `L.bias`; it computes

    (x / smooth) Wq^T + (x lora_down) lora_up^T + bias

with int4 codes in groups of 64, or e2m1 codes in groups of 16 with scales in e4m3, `L.wtscale` and `L.wcscales`. Layers
of modulation have plain 4-bit codes with `wscales` and `wzeros` (AWQ). `unpack.py` has the order of their numbers.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.files import parse_json

from .formats import check_method
from .tensors import WHOLE, Tensor

_GROUPS = {"int4": 64, "fp4": 16}
# layers after GELU, whose int4 inputs nunchaku shifts; the shift is folded into their bias
_SHIFTED = (".mlp_fc2", ".mlp_context_fc2")
# layers of modulation, and their number of parts: shift, scale and gate, once or twice
_MODULATION = {".norm1.linear": 6, ".norm1_context.linear": 6, ".norm.linear": 3}
_CONFIG = "quantization_config"


def join(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Returns the tensors of a file with a weight and a bias for each layer of nunchaku's.

    Raises:
        ModelError: the file states another method, or a layer lacks a part or has one of another shape.
    """
    joined, layers = dict(tensors), defaultdict(dict)
    for name, tensor in tensors.items():
        layer, _, last = name.rpartition(".")
        layers[layer][last] = tensor
    for layer, own in layers.items():
        if not layer or not {"qweight", "wscales"} <= own.keys():
            continue
        codes = own["qweight"]
        if len(codes.shape) != 2:
            raise _odd(codes, f"{codes.name} has shape {list(codes.shape)}", "rows and columns")
        made = _modulation(layer, codes, own) if "wzeros" in own else _layer(layer, codes, own)
        for part in own:
            del joined[f"{layer}.{part}"]
        joined |= made
    _check_method(tensors, metadata)
    return joined


def _check_method(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Checks the statement of a file about itself, where it has one."""
    path = next((t.path for t in tensors.values()), None)
    try:
        own = parse_json(metadata.get(_CONFIG) or "{}")
    except ValueError:
        own = None
    if not isinstance(own, dict):
        raise ModelError(f"{path}: {_CONFIG} cannot be read", "a JSON object", "download it again")
    check_method({_CONFIG: own}, tensors, f"{path}")


def _layer(layer: str, codes: Tensor, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns weight and bias of a layer with a low-rank branch."""
    rows, width = codes.shape[0], 2 * codes.shape[-1]
    kind = "fp4" if own["wscales"].dtype == "F8_E4M3" else "int4"
    groups, rank = width // _GROUPS[kind], own["lora_down"].shape[-1] if "lora_down" in own else 0
    needed = {"qweight": (rows, width // 2), "wscales": (groups, rows), "smooth": (width,)}
    needed |= {"lora_down": (width, rank), "lora_up": (rows, rank)}
    _check(layer, own, needed, {"bias": (rows,), "wcscales": (rows,), "wtscale": (), "smooth_orig": (width,)})
    if rows % 128 or width % 128 or rank % 16:
        raise _odd(codes, f"{layer} has {rows} rows of {width} and rank {rank}", "multiples of 128, and of 16")
    scales = replace(own["wscales"], dtype="U8" if kind == "fp4" else own["wscales"].dtype, shape=(rows, groups))
    smooth, down = (replace(own[name], dtype=f"{WHOLE} {own[name].dtype}") for name in ("smooth", "lora_down"))
    factors = tuple(own[name] for name in ("wcscales", "wtscale") if name in own)
    parts = (scales, smooth, down, own["lora_up"], *factors)
    weight = replace(codes, name=f"{layer}.weight", dtype=f"svdq {kind}", shape=(rows, width), parts=parts)
    made = {weight.name: weight}
    if bias := own.get("bias"):
        is_shifted = kind == "int4" and f".{layer}".endswith(_SHIFTED)
        taken = (replace(weight, dtype="svdq shift", parts=(scales, smooth, *factors)),) if is_shifted else ()
        made[bias.name] = replace(bias, dtype=f"svdq bias {bias.dtype}", parts=taken)
    return made


def _modulation(layer: str, codes: Tensor, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns weight and bias of a layer of modulation."""
    rows, width = 4 * codes.shape[0], 2 * codes.shape[-1]
    parts = next((count for end, count in _MODULATION.items() if f".{layer}".endswith(end)), 0)
    groups = (width // 64, rows)
    _check(layer, own, {"qweight": (rows // 4, width // 2), "wscales": groups, "wzeros": groups}, {"bias": (rows,)})
    if not parts or rows % parts or width % 64:
        raise _odd(codes, f"{layer} has {rows} rows of {width}", f"a layer of modulation: {', '.join(_MODULATION)}")
    scales = own["wscales"], own["wzeros"]
    made = {
        f"{layer}.weight": replace(
            codes, name=f"{layer}.weight", dtype=f"awq {parts}", shape=(rows, width), parts=scales
        )
    }
    if bias := own.get("bias"):
        made[bias.name] = replace(bias, dtype=f"awq bias {parts} {bias.dtype}")
    return made


def _check(layer: str, own: dict[str, Tensor], needed: dict, optional: dict) -> None:
    """Checks the parts of a layer and their shapes."""
    for name in needed:
        if name not in own:
            raise _odd(own["qweight"], f"{layer} lacks {name}", f"{', '.join(needed)}")
    for name, tensor in own.items():
        expected = (needed | optional).get(name)
        if expected is None:
            raise _odd(tensor, f"{layer} has the unknown part {name}", f"{', '.join((*needed, *optional))}")
        if tensor.shape != expected and not (expected == () and tensor.numbers == 1):
            raise _odd(tensor, f"{layer}.{name} has shape {list(tensor.shape)}", f"{list(expected)}")


def _odd(tensor: Tensor, found: str, expected: str) -> ModelError:
    return ModelError(f"{tensor.path}: {found}", expected, "download it again, or take another file")
