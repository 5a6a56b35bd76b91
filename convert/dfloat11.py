"""DFloat11 files: finds the weights of each compressed group of layers.

A group G, such as a block, has `G.encoded_exponent`, `G.sign_mantissa`, `G.luts`, `G.gaps`, `G.output_positions` and
`G.split_positions`: the weights of its layers one after another, in an order that the config.json states. Their biases
are stored as usual, and tell the shapes. `exponents.py` decodes them, to the bits of bfloat16.

Facts: configs of the published files (`dfloat11_config`), LeanModels/DFloat11's and ComfyUI-DFloat11-Extended's tables.
"""

import re
from collections.abc import Callable, Mapping

import numpy as np

from mlx_flux_krea.errors import ModelError, printable

from .exponents import BLOCK, GAPS, WINDOW
from .tensors import WHOLE, Tensor, stored_bytes

_TYPES = {
    "encoded_exponent": ("U8", 1), "sign_mantissa": ("U8", 1), "luts": ("U8", 2), "gaps": ("U8", 1),
    "output_positions": ("U8", 1), "split_positions": ("I64", 1),
}  # fmt: skip
_INDEX = ("luts", "gaps", "output_positions", "split_positions")
_MOST_TABLES, _MOST_LAYERS = 18, 1000
CONFIG = "dfloat11_config"

_D = "norm1.linear norm1_context.linear attn.to_q attn.to_k attn.to_v attn.add_k_proj attn.add_v_proj attn.add_q_proj"
# the order of the layers in published files of FLUX.1, by a group's name
_KNOWN = {
    "transformer_blocks.#": f"{_D} attn.to_out.0 attn.to_add_out ff.net.0.proj ff.net.2 ff_context.net.0.proj"
    " ff_context.net.2",
    "single_transformer_blocks.#": "norm.linear proj_mlp proj_out attn.to_q attn.to_k attn.to_v",
    "double_blocks.#": "img_mod.lin img_attn.qkv img_attn.proj img_mlp.0 img_mlp.2 txt_mod.lin txt_attn.qkv"
    " txt_attn.proj txt_mlp.0 txt_mlp.2",
    "single_blocks.#": "linear1 linear2 modulation.lin",
}


def join(tensors: dict[str, Tensor], config: Callable[[], Mapping]) -> dict[str, Tensor]:
    """Returns the tensors of a file with a weight for each layer of its groups.

    Args:
        tensors: as the files have them.
        config: returns the config.json; called if there is a group.

    Raises:
        ModelError: a group lacks a part or has one of another shape, its layers or their shapes are not known, or the
            config states another way of packing.
    """
    groups = [name.rpartition(".")[0] for name in tensors if name.endswith(".encoded_exponent")]
    # one that cannot be decoded at all is for `lookalikes.py`
    groups = [group for group in groups if any(f"{group}.{part}" in tensors for part in _INDEX)]
    if not groups:
        return tensors
    stated = _stated(config(), tensors[f"{groups[0]}.encoded_exponent"])
    joined = dict(tensors)
    for group in groups:
        own = _parts(group, tensors)
        for name in own:
            del joined[f"{group}.{name}"]
        for weight in _weights(group, own, tensors, stated):
            if weight.name in tensors:
                raise _odd(weight, f"{weight.name} stands there twice, once in the group {group}", "every tensor once")
            joined[weight.name] = weight
    return joined


def _stated(config: Mapping, tensor: Tensor) -> dict[str, list[str]]:
    """Returns the layers of groups that a config.json states, by the groups' names with # for numbers."""
    own = config.get(CONFIG)
    if own is None:
        return {}
    patterns = own.get("pattern_dict") if isinstance(own, dict) else None
    if not isinstance(patterns, dict) or not all(_are_names(layers) for layers in patterns.values()):
        raise _odd(tensor, f"its config.json has a {CONFIG} without layers", "a pattern_dict")
    windows = BLOCK // WINDOW
    for field, known in (("threads_per_block", (windows, [windows])), ("bytes_per_thread", (WINDOW,))):
        if own.get(field, known[0]) not in known:
            raise _odd(tensor, f"{CONFIG} says {field} = {printable(str(own[field])[:100])}", f"{known[0]}")
    plain = ((pattern.replace("\\d+", "#").replace("\\.", "."), layers) for pattern, layers in patterns.items())
    return {re.sub(r"\[0-9\]\+", "#", pattern): list(layers) for pattern, layers in plain}


def _are_names(value) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value) and len(value) < _MOST_LAYERS


def _parts(group: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the parts of a group, each of its type."""
    own = {name: tensors[f"{group}.{name}"] for name in _TYPES if f"{group}.{name}" in tensors}
    some = next(iter(own.values()))
    for name, (dtype, axes) in _TYPES.items():
        if name not in own:
            raise _odd(some, f"the group {group} lacks {name}", f"{', '.join(_TYPES)}")
        tensor = own[name]
        if tensor.dtype != dtype or len(tensor.shape) != axes:
            raise _odd(tensor, f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}", f"{dtype} of {axes} axes")
    tables, blocks = own["luts"], -(-own["encoded_exponent"].numbers // BLOCK)
    entries = own["output_positions"].numbers // 4 - 1
    if tables.shape[1] != 256 or not 2 <= tables.shape[0] <= _MOST_TABLES:
        raise _odd(tables, f"{tables.name} has shape {list(tables.shape)}", "2 to 18 tables of 256")
    if not blocks or entries not in (blocks, blocks - 1) or own["output_positions"].numbers % 4:
        raise _odd(some, f"{group}.output_positions has {entries + 1} entries for {blocks} blocks", f"{blocks + 1}")
    if own["gaps"].numbers < blocks * GAPS:
        raise _odd(some, f"{group}.gaps has {own['gaps'].numbers} bytes", f"{blocks * GAPS}")
    return own


def _weights(
    group: str, own: dict[str, Tensor], tensors: Mapping[str, Tensor], stated: Mapping[str, list[str]]
) -> list[Tensor]:
    """Returns the weights of a group."""
    layers, numbers = _layers(group, stated, own), own["sign_mantissa"].numbers
    positions = np.frombuffer(stored_bytes(own["output_positions"]), "<u4").astype(np.int64)
    ends = [*map(int, np.frombuffer(stored_bytes(own["split_positions"]), "<i8")), numbers]
    if len(ends) != len(layers) or sorted({0, *ends}) != [0, *ends]:
        found = f"the group {group} has {len(ends)} weights that end at {ends[:20]}"
        raise _odd(own["split_positions"], found, f"{len(layers)}, of {numbers} numbers in all")
    if positions[0] or positions[-1] != numbers or np.any(np.diff(positions) < 0):
        raise _odd(own["output_positions"], f"{group}.output_positions does not count up to {numbers}", "the count")
    weights = []
    for layer, first, end in zip(layers, [0, *ends], ends, strict=False):
        name = f"{group}.{layer}".rstrip(".")
        bias = tensors.get(f"{name}.bias")
        rows = bias.numbers if bias else 0
        if not rows or (end - first) % rows:
            found = f"the shape of {name}.weight, which has {end - first} numbers, is not stored"
            todo = "name the folder of all files of the model"
            raise _odd(own["sign_mantissa"], found, "a bias beside it, whose length divides them", todo)
        weights.append(_weight(f"{name}.weight", (rows, (end - first) // rows), own, positions, first))
    return weights


def _layers(group: str, stated: Mapping[str, list[str]], own: dict[str, Tensor]) -> list[str]:
    """Returns the names of a group's layers in their order; "" is the group itself."""
    parts = ["#" if part.isdigit() else part for part in group.split(".")]
    for name in (".".join(parts[n:]) for n in range(len(parts))):
        if name in stated:
            return stated[name] or [""]
        if not stated and name in _KNOWN:
            return _KNOWN[name].split()
    raise _odd(own["luts"], f"nothing says which layers the group {group} has", f"a config.json with {CONFIG}")


def _weight(name: str, shape: tuple[int, int], own: dict[str, Tensor], positions: np.ndarray, first: int) -> Tensor:
    """Returns one weight: its part of each tensor, whole blocks of the stream where its codes are."""
    numbers = shape[0] * shape[1]
    block = int(np.searchsorted(positions, first, side="right")) - 1
    last = int(np.searchsorted(positions, first + numbers, side="left"))
    codes, signs = own["encoded_exponent"], own["sign_mantissa"]

    def cut(part: str, start: int, end: int) -> Tensor:
        tensor, size = own[part], end - start
        return Tensor(tensor.name, tensor.path, f"{WHOLE} U8", (size,), tensor.start + start, tensor.start + end)

    parts = (
        cut("encoded_exponent", block * BLOCK, min(last * BLOCK + WINDOW, codes.numbers)),
        cut("gaps", block * GAPS, last * GAPS),
        Tensor(own["luts"].name, signs.path, f"{WHOLE} U8", own["luts"].shape, own["luts"].start, own["luts"].end),
        cut("output_positions", block * 4, (last + 1) * 4),
        Tensor(name, signs.path, "count", (first - int(positions[block]),), signs.start, signs.start),
    )
    start = signs.start + first
    return Tensor(name, signs.path, "DFloat11", shape, start, start + numbers, parts)


def _odd(
    tensor: Tensor, found: str, expected: str, todo: str = "download it again, or take another file"
) -> ModelError:
    found = f"{tensor.path} is a DFloat11 file, and {found}"
    return ModelError(found, expected, todo)
