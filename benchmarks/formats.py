"""Formats in which files hold the transformer: bits, error on the trained model, and what a conversion adds.

    python benchmarks/formats.py [--prompts 12]

The matrices of all blocks but their modulation go through a format and back, and the same prompts and seeds are drawn
in float32. The error is that of the final latents, relative, against the unrounded model; the second one is that of a
conversion with `-q 8` against the file: none where codes and scales go over unchanged. Bits count scales. Sizes are of
FLUX.1 Krea's transformer: that of a published file where its tensors are known, else computed with all matrices of
blocks in the format.

Encoders are MLX's, the gguf package's, or a few lines here: plain rounding without calibration. SVDQuant's own choice
of factors and its rounding (GPTQ) need the model's inputs, so that its files are better than these rows.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import foreign
import gguf
import mlx.core as mx
import numpy as np
import nunchaku
from mlx_flux_krea.convert.decode import TYPES, hadamard
from mlx_flux_krea.convert.fit import target_shapes
from mlx_flux_krea.convert.quantize import group_of
from nano import replaced, requantized, scenes_to_judge
from recipes import final_latents
from tqdm import tqdm

from mlx_flux_krea import nano
from mlx_flux_krea.models.config import FLUX_DEV, Quantization

RANK, WIDTH = 32, 3072  # of SVDQuant's branch, and of FLUX.1: a branch of rank r adds 2 r / width of 16 bits
EIGHT = Quantization(8, 64)
Encoder = Callable[[mx.array], mx.array]  # from a matrix in float32, what a format holds of it
NONE, KEPT, OWN = "rounded anew", "kept", "our own"


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        values: its encoder.
        bits: of a weight, scales included.
        codes: what becomes of them.
        published: the layout of a published file, for its size.
    """

    values: Encoder
    bits: float
    codes: str = NONE
    published: str | None = None


def scaled(codes: Encoder, largest: float, rows: bool = False) -> Encoder:
    """Returns the encoder with one scale, or one for each row; `largest`: the largest number of the type."""

    def values(weight: mx.array) -> mx.array:
        scale = mx.abs(weight).max(axis=1 if rows else None, keepdims=True) / largest
        return codes(weight / scale) * scale

    return values


def e4m3(numbers: mx.array) -> mx.array:
    return mx.from_fp8(mx.to_fp8(numbers), mx.float32)


def e5m2(numbers: mx.array) -> mx.array:
    """Rounds to the upper byte of float16, ties to even."""
    bits = np.array(numbers.astype(mx.float16)).view(np.uint16).astype(np.uint32)
    upper = (bits + 0x7F + (bits >> 8 & 1)) >> 8 << 8
    return mx.array(upper.astype(np.uint16).view(np.float16).astype(np.float32))


def rotated(weight: mx.array, size: int = 16) -> mx.array:
    """Rounds rows that are rotated in groups to int8 (ConvRot)."""
    matrix = hadamard(size) / math.sqrt(size)
    turned = (weight.reshape(len(weight), -1, size) @ matrix).reshape(weight.shape)
    return (scaled(mx.round, 127, rows=True)(turned).reshape(len(weight), -1, size) @ matrix).reshape(weight.shape)


def int4(weight: mx.array) -> mx.array:
    """Rounds groups of 64 to -8 to 7 times a scale."""
    groups = weight.reshape(len(weight), -1, 64)
    scale = (mx.abs(groups).max(axis=-1, keepdims=True) / 7).astype(mx.bfloat16).astype(mx.float32)
    return (mx.clip(mx.round(groups / scale), -8, 7) * scale).reshape(weight.shape)


def low_rank(rest: Encoder) -> Encoder:
    """Returns the encoder with a branch of the largest singular values, and another encoder for what it leaves."""

    def values(weight: mx.array) -> mx.array:
        u, s, v = np.linalg.svd(np.array(weight), full_matrices=False)
        rank = RANK * weight.shape[1] // WIDTH + 1  # as large a share as in FLUX.1
        branch = mx.array((u[:, :rank] * s[:rank]) @ v[:rank])
        return branch + rest(weight - branch)

    return values


def ggml(name: str) -> Encoder:
    kind = gguf.GGMLQuantizationType[name]
    return lambda weight: mx.array(gguf.dequantize(gguf.quantize(np.array(weight), kind), kind))


def own(q: Quantization, codes: str = OWN) -> Format:
    scales = 32 if q.mode == "affine" else 8
    return Format(lambda weight: requantized(weight.astype(mx.bfloat16), q), q.bits + scales / q.group_size, codes)


def _nvfp4(weight: mx.array) -> mx.array:
    return requantized(weight, Quantization(4, 16, "nvfp4"))


BRANCH = 16 * 2 * RANK / WIDTH
FORMATS = {
    "float8_e4m3fn": Format(e4m3, 8, published="comfy-transformer-dev-fp8_e4m3fn"),
    "float8_e4m3fn, one scale": Format(scaled(e4m3, 448), 8, published="comfy-transformer-krea-fp8_scaled"),
    "float8_e4m3fn, a scale a row": Format(scaled(e4m3, 448, rows=True), 8),
    "float8_e5m2, one scale": Format(scaled(e5m2, 57344), 8),
    "int8_tensorwise": Format(scaled(mx.round, 127), 8),
    "int8, a scale a row": Format(scaled(mx.round, 127, rows=True), 8),
    "int8, rotated (groups of 16)": Format(rotated, 8),
    "mxfp8": own(Quantization(8, 32, "mxfp8"), KEPT),
    "nvfp4": own(Quantization(4, 16, "nvfp4"), KEPT),
    "svdq-int4, without calibration": Format(low_rank(int4), 4.25 + BRANCH, KEPT, "svdq int4"),
    "svdq-fp4, without calibration": Format(low_rank(_nvfp4), 4.5 + BRANCH, KEPT, "svdq fp4"),
    "GGUF Q8_0": Format(ggml("Q8_0"), 8.5, published="gguf-flux-dev-Q8_0"),
    "GGUF Q5_1": Format(ggml("Q5_1"), 6, published="gguf-flux-dev-Q5_1"),
    "GGUF Q5_0": Format(ggml("Q5_0"), 5.5, published="gguf-flux-dev-Q5_0"),
    "GGUF Q4_1": Format(ggml("Q4_1"), 5, published="gguf-flux-dev-Q4_1"),
    "GGUF Q4_0": Format(ggml("Q4_0"), 4.5, published="gguf-flux-dev-Q4_0"),
    **{f"-q {bits}": own(Quantization(bits, 64)) for bits in (8, 6, 5, 4, 3)},
    "-q mxfp4": own(Quantization(4, 32, "mxfp4")),
    "-q nvfp4": own(Quantization(4, 16, "nvfp4")),
}


def is_rounded(component: str, name: str) -> bool:
    """Returns True for the matrices of blocks but their modulation."""
    return component == "transformer" and name.endswith(".weight") and "blocks, " in group_of(component, name)


def size(row: Format) -> float:
    """Returns the bytes of FLUX.1 Krea's transformer in a format."""
    if row.published and row.published.startswith("svdq"):
        kind = row.published.removeprefix("svdq ")
        held = [
            nunchaku.shapes("awq" if how == "awq" else kind, n, k, RANK) for _, n, k, how in nunchaku.layers(FLUX_DEV)
        ]
        numbers = {"I32": 4, "I8": 1, "BF16": 2, "F8_E4M3": 1}
        rest = sum(math.prod(s) for n, s in target_shapes("transformer", FLUX_DEV).items() if "_blocks." not in n)
        return 2 * rest + sum(numbers[t] * math.prod(s) for parts in held for t, s in parts.values())
    if row.published:
        tensors = foreign.published(row.published).values()
        return sum(math.prod(shape) * TYPES[t].bytes / TYPES[t].numbers for t, shape in tensors)
    shapes = target_shapes("transformer", FLUX_DEV)
    bits = {n: row.bits if "_blocks." in n and len(s) == 2 else 16 for n, s in shapes.items()}
    if row.codes == OWN:  # modulation has 8 bits
        bits |= {n: 8.5 for n in bits if group_of("transformer", n) == "modulation" and n.endswith(".weight")}
    return sum(bits[n] * math.prod(s) for n, s in shapes.items()) / 8


def main() -> None:
    """Prints the table, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=12)
    given = parser.parse_args()
    prompts = [sentence for _, sentence in scenes_to_judge(given.prompts)]

    def drawn(values: Encoder) -> mx.array:
        with tempfile.TemporaryDirectory() as work:
            made = replaced(
                nano.FOLDER,
                Path(work) / "model",
                lambda c, n, a: values(a.astype(mx.float32)) if is_rounded(c, n) else a,
            )
            return final_latents(made, prompts)

    def error(one: mx.array, other: mx.array) -> float:
        return (mx.linalg.norm(one - other) / mx.linalg.norm(other)).item()

    exact, rows = drawn(lambda weight: weight), {}
    print("| format | bits a weight | error | `-q 8` adds | Krea's transformer | codes |\n|---|---|---|---|---|---|")
    for name, row in tqdm(FORMATS.items(), leave=False):
        made = drawn(row.values)
        added = error(drawn(lambda w, row=row: requantized(row.values(w), EIGHT)), made) if row.codes == NONE else 0.0
        rows[name] = {"bits": row.bits, "error": error(made, exact), "added": added, "bytes": size(row)}
        more = {NONE: f"{added:.1%}", KEPT: "0", OWN: ""}[row.codes]
        cells = (name, f"{row.bits:.3g}", f"{rows[name]['error']:.1%}", more, f"{size(row) / 1e9:.1f} GB", row.codes)
        print(f"| {' | '.join(cells)} |", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
