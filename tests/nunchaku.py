"""Writes transformers as nunchaku's files hold them: every number to its place, by the place's own arithmetic.

    layers(FluxConfig)           name, rows, width and kind of every layer of a file
    quantized("int4", 128, 256)  the parts of a layer with random numbers, and weight and bias in float64
    modulation(6, 768, 128)      the same of a layer of modulation

A tile of codes has 128 rows and 64 columns, one of a vector 128 numbers, one of a factor 16 x 16.
"""

from collections.abc import Iterator

import foreign
import mlx.core as mx
import numpy as np

RANK = 16
SHIFT = 0.171875
RNG = np.random.default_rng(5)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
Stored = tuple[str, tuple[int, ...], bytes]


def layers(config) -> Iterator[tuple[str, int, int, str]]:
    """Every quantized layer: its name, rows and width, and "svdq" or "awq"."""
    h, mlp = config.hidden_size, config.mlp_size
    for n in range(config.depth):
        for end, rows, width in (
            ("qkv_proj", 3 * h, h), ("qkv_proj_context", 3 * h, h), ("out_proj", h, h), ("out_proj_context", h, h),
            ("mlp_fc1", mlp, h), ("mlp_fc2", h, mlp), ("mlp_context_fc1", mlp, h), ("mlp_context_fc2", h, mlp),
        ):  # fmt: skip
            yield f"transformer_blocks.{n}.{end}", rows, width, "svdq"
        for end in ("norm1.linear", "norm1_context.linear"):
            yield f"transformer_blocks.{n}.{end}", 6 * h, h, "awq"
    for n in range(config.depth_single_blocks):
        for end, rows, width in (("qkv_proj", 3 * h, h), ("out_proj", h, h), ("mlp_fc1", mlp, h), ("mlp_fc2", h, mlp)):
            yield f"single_transformer_blocks.{n}.{end}", rows, width, "svdq"
        yield f"single_transformer_blocks.{n}.norm.linear", 3 * h, h, "awq"


def shapes(kind: str, rows: int, width: int, rank: int = 32, gains: str = "wcscales wtscale"):
    """Type and shape of every part of a layer: kind "int4", "fp4" or "awq"; fp4 has these gains."""
    if kind == "awq":
        scales = ("BF16", (width // 64, rows))
        return {
            "qweight": ("I32", (rows // 4, width // 2)),
            "wscales": scales,
            "wzeros": scales,
            "bias": ("BF16", (rows,)),
        }
    scales = ("BF16", (width // 64, rows)) if kind == "int4" else ("F8_E4M3", (width // 16, rows))
    parts = {"qweight": ("I8", (rows, width // 2)), "wscales": scales, "bias": ("BF16", (rows,))}
    parts |= {"smooth": ("BF16", (width,)), "smooth_orig": ("BF16", (width,))}
    parts |= {"lora_down": ("BF16", (width, rank)), "lora_up": ("BF16", (rows, rank))}
    more = {"wcscales": ("BF16", (rows,)), "wtscale": ("BF16", ())}
    return parts | ({} if kind == "int4" else {name: more[name] for name in gains.split()})


def gains_of(layer: str) -> str:
    """The gains of a layer of a published fp4 file: of each output where three matrices are one."""
    return "wcscales" if "qkv_proj" in layer else "wtscale"


def halves(values: np.ndarray) -> tuple[bytes, np.ndarray]:
    """The bytes of values in bfloat16, and the values that they hold."""
    array = mx.array(values.astype(np.float32)).astype(mx.bfloat16)
    return np.array(array.view(mx.uint16)).tobytes(), np.array(array.astype(mx.float32)).astype(np.float64)


def put_codes(codes: np.ndarray) -> bytes:
    rows, width = codes.shape
    n, k = np.indices(codes.shape)
    pack, half, lane = n % 128 // 16, n % 16 // 8, n % 8
    part, column, nibble = k % 64 // 32, k % 32 // 8, k % 8
    word = (((((n // 128 * (width // 64) + k // 64) * 8 + pack) * 8 + lane) * 4 + column) * 2 + half) * 2 + part
    words = np.zeros(rows * width // 8, np.uint32)
    np.bitwise_or.at(words, word, codes.astype(np.uint32) << (4 * nibble).astype(np.uint32))
    return words.tobytes()


def put(values: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Values at their places, in one row."""
    out = np.zeros(values.size, values.dtype)
    out[place.reshape(-1)] = values.reshape(-1)
    return out


def put_vector(values: np.ndarray) -> np.ndarray:
    """A vector, or one for each group: (length, groups)."""
    n, g = np.indices(values.shape)
    inside = n % 128
    place = (n // 128 * values.shape[1] + g) * 128 + inside // 16 * 16 + inside % 8 // 2 * 4 + inside % 16 // 8 * 2
    return put(values, place + inside % 2)


def put_small_scales(values: np.ndarray) -> np.ndarray:
    n, g = np.indices(values.shape)
    inside, tile = n % 128, n // 128 * (values.shape[1] // 4) + g // 4
    return put(values, (((tile * 8 + inside % 8) * 4 + inside % 32 // 8) * 4 + inside // 32) * 4 + g % 4)


def put_factor(values: np.ndarray, is_down: bool) -> np.ndarray:
    """A factor (length, rank). Down has its inputs along the columns of a tile, up its outputs along the rows."""
    c, r = np.indices(values.shape)
    i, j = (r % 16, c % 16) if is_down else (c % 16, r % 16)
    tile = (c // 16 * (values.shape[1] // 16) + r // 16) * 256
    return put(values, tile + (i % 8 * 4 + j % 8 // 2) * 8 + i // 8 * 4 + j // 8 * 2 + j % 2)


Layer = tuple[dict[str, Stored], np.ndarray, np.ndarray]


def quantized(
    kind: str, rows: int, width: int, is_shifted: bool = False, smooth=None, gains: str = "wcscales wtscale"
) -> Layer:
    """The parts of a layer, its weight and its bias; `smooth` (width, 1): its factors of inputs."""
    types = shapes(kind, rows, width, RANK, gains)
    stored: dict[str, bytes] = {}

    def half(name: str, values: np.ndarray, place) -> np.ndarray:
        data, kept = halves(values)
        stored[name] = place(np.frombuffer(data, np.uint16).reshape(kept.shape)).tobytes()
        return kept

    codes = RNG.integers(0, 16, (rows, width))
    stored["qweight"] = put_codes(codes)
    smooth = half("smooth", RNG.random((width, 1)) + 0.5 if smooth is None else smooth, put_vector)
    stored["smooth_orig"] = bytes(2 * width)
    bias = half("bias", RNG.standard_normal((rows, 1)), put_vector)
    down = half("lora_down", RNG.standard_normal((width, RANK)) / 30, lambda v: put_factor(v, True))
    up = half("lora_up", RNG.standard_normal((rows, RANK)) / 30, lambda v: put_factor(v, False))
    if kind == "int4":
        scales = half("wscales", RNG.random((rows, width // 64)) / 30, put_vector).repeat(64, 1)
        values = ((codes ^ 8) - 8) * scales
    else:
        small = RNG.integers(1, 100, (rows, width // 16)).astype(np.uint8)
        stored["wscales"] = put_small_scales(small).tobytes()
        channel = half("wcscales", RNG.random((rows, 1)) / 30, put_vector) if "wcscales" in gains else 1
        stored["wtscale"], whole = halves(RNG.random(()) / 3) if "wtscale" in gains else (b"", 1)
        values = E2M1[codes] * foreign.e4m3()[small].astype(np.float64).repeat(16, 1) * channel * whole
    quantized_part = values / smooth.reshape(-1)
    if is_shifted:  # the file's bias is the true one without the shift of the inputs
        bias = bias + SHIFT * quantized_part.sum(1, keepdims=True)
    return {n: (*types[n], stored[n]) for n in types}, quantized_part + up @ down.T, bias.reshape(-1)


def modulation(parts: int, rows: int, width: int) -> Layer:
    """The parts of a layer of modulation, its weight and its bias, in the order of shift, scale and gate."""
    types, channels = shapes("awq", rows, width), rows // parts
    codes = RNG.integers(0, 16, (rows, width))
    n, k = np.indices(codes.shape)
    column = k // 32 * 8 + k % 8
    word = ((n // 4 * (width // 64) + column // 16) * 4 + n % 4) * 16 + column % 16
    words = np.zeros(rows * width // 4, np.uint16)
    np.bitwise_or.at(words, word, codes.astype(np.uint16) << (4 * (k % 32 // 8)).astype(np.uint16))
    scale_data, scales = halves(RNG.random((width // 64, rows)) / 30)
    zero_data, zeros = halves(RNG.standard_normal((width // 64, rows)) / 10)
    bias_data, bias = halves(RNG.standard_normal(rows))
    weight = codes * scales.T.repeat(64, 1) + zeros.T.repeat(64, 1)
    order = np.arange(rows).reshape(channels, parts).T.reshape(-1)  # row channel * parts + part
    bias = bias[order].reshape(parts, channels)
    bias[1::3] -= 1
    data = {"qweight": words.tobytes(), "wscales": scale_data, "wzeros": zero_data, "bias": bias_data}
    return {name: (*types[name], data[name]) for name in types}, weight[order], bias.reshape(-1)
