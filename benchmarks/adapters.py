"""The cost of one LoRA on all layers of the blocks: computed by chip, and measured here on a block of full width.

    python benchmarks/adapters.py [--rank 16] [--side 1024] [--tokens 64]

Computed: operations at half of a chip's peak, and the bytes of inputs and outputs that are read and written once more,
at Apple's figures for memory. Measured: one single block of FLUX.1's width in float32, with the branch and without.
"""

import argparse
import dataclasses
import json
import time

import mlx.core as mx

from mlx_flux_krea.memory import step_flops
from mlx_flux_krea.models.config import FLUX_DEV
from mlx_flux_krea.models.layers import Branch, set_branch
from mlx_flux_krea.models.transformer import rope
from mlx_flux_krea.presets import CHIPS, SHARE_OF_PEAK
from mlx_flux_krea.weights import build, layer_shapes

TEXT = 512  # tokens
BANDWIDTH = {  # GB/s, as Apple states them
    "M1": 68, "M1 Pro": 200, "M1 Max": 400, "M1 Ultra": 800, "M2": 100, "M2 Pro": 200, "M2 Max": 400, "M2 Ultra": 800,
    "M3": 100, "M3 Pro": 150, "M3 Max": 400, "M3 Ultra": 819, "M4": 120, "M4 Pro": 273, "M4 Max": 546, "M5": 153,
}  # fmt: skip


def added(rank: int, side: int) -> tuple[int, int]:
    """Operations and bytes, in 16 bits, that a step needs more."""
    image = (side // 16) ** 2
    operations = moved = 0
    for path, (rows, width) in layer_shapes("transformer", FLUX_DEV).items():
        if "blocks" in path and "mod" not in path:
            tokens = image if ".img_" in path else TEXT if ".txt_" in path else image + TEXT
            operations += 2 * tokens * rank * (rows + width)
            moved += 2 * (tokens * (2 * rows + width) + rank * (rows + width))
    return operations, moved


def measured(rank: int, tokens: int) -> float:
    """The processor's time of a block with the branch, as a share of that without; other programs do not count."""
    sizes = dataclasses.replace(FLUX_DEV, depth=0, depth_single_blocks=1)
    block = build("transformer", sizes).single_blocks[0]
    x, mod = mx.random.normal((1, tokens, FLUX_DEV.hidden_size)), mx.zeros((1, 3 * FLUX_DEV.hidden_size))
    pe = rope(mx.zeros((tokens, 3)), FLUX_DEV.axes_dim, FLUX_DEV.theta)
    mx.eval(block.parameters(), x, pe)
    layers = (block.linear1, block.linear2)
    branches = [
        Branch(down=mx.zeros((layer.weight.shape[1], rank)), up=mx.zeros((rank, layer.weight.shape[0])))
        for layer in layers
    ]
    best = [float("inf")] * 2
    for _ in range(7):
        for i, chosen in enumerate(([None, None], branches)):
            for layer, branch in zip(layers, chosen, strict=True):
                set_branch(layer, branch)
            start = time.process_time()
            mx.eval(block(x, mod, pe))
            best[i] = min(best[i], time.process_time() - start)
    return best[1] / best[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=64, help="of the measured block")
    args = parser.parse_args()
    operations, moved = added(args.rank, args.side)
    base = step_flops(FLUX_DEV, args.side, args.side, TEXT)
    print(f"a step: {base / 1e12:.1f} TFLOP; added: {operations / 1e12:.2f} TFLOP, {moved / 1e9:.1f} GB")
    shares = {}
    for chip, bandwidth in BANDWIDTH.items():
        rate = CHIPS[chip] * SHARE_OF_PEAK * 1e12
        more = operations / rate + moved / (bandwidth * 1e9)
        shares[chip] = more * rate / base
        print(f"{chip:9} a step {base / rate:5.1f} s, added {more:.2f} s, {100 * shares[chip]:.1f} %")
    ratio = measured(args.rank, args.tokens)
    print(f"here, a single block of full width in float32, {args.tokens} tokens: {ratio:.3f} times the time without")
    print(json.dumps({"rank": args.rank, "shares": shares, "measured": ratio, "tokens": args.tokens}))


if __name__ == "__main__":
    main()
