"""The cost of a LoRA on all layers of the blocks: time by chip, memory by precision, and a block of full width here.

    python benchmarks/adapters.py [--rank 16] [--side 1024] [--tokens 64]

Computed: operations at half of a chip's peak, and the bytes of inputs and outputs that are read and written once more,
at Apple's figures for memory; the stages of the plan. Measured: blocks of FLUX.1's width in float32, whole and in 4
bits, with the branch and without. A trainer that knows q, k and v as layers of their own (diffusers, PEFT) gives each
a factor A of its own, so that the branch of our fused layer has three or four times the rank.
"""

import argparse
import dataclasses
import json
import time

import mlx.core as mx
import mlx.nn as nn

from mlx_flux_krea.commands.shared.estimates import weigh_recipe
from mlx_flux_krea.memory import GB, make_plan, step_flops
from mlx_flux_krea.models.config import FLUX_DEV, FLUX_DEV_MODEL
from mlx_flux_krea.models.layers import Branch, adopt, choose_products, set_branch
from mlx_flux_krea.models.transformer import rope
from mlx_flux_krea.presets import CHIPS, SHARE_OF_PEAK
from mlx_flux_krea.weights import build, layer_shapes

TEXT = 512  # tokens
BANDWIDTH = {  # GB/s, as Apple states them
    "M1": 68, "M1 Pro": 200, "M1 Max": 400, "M1 Ultra": 800, "M2": 100, "M2 Pro": 200, "M2 Max": 400, "M2 Ultra": 800,
    "M3": 100, "M3 Pro": 150, "M3 Max": 400, "M3 Ultra": 819, "M4": 120, "M4 Pro": 273, "M4 Max": 546, "M5": 153,
}  # fmt: skip
_APART = {"qkv": 3, "linear1": 4}  # modules of diffusers in one of our layers
_ROUNDS = 7


def ranks(rank: int, apart: bool) -> dict[str, tuple[int, int, int]]:
    """Returns the rank of the branch of every layer of the blocks but modulation, with its outputs and inputs."""
    shapes = layer_shapes("transformer", FLUX_DEV)
    inside = {path: shape for path, shape in shapes.items() if "blocks" in path and "mod" not in path}
    times = {path: _APART.get(path.rpartition(".")[2], 1) if apart else 1 for path in inside}
    return {path: (rank * times[path], *shape) for path, shape in inside.items()}


def added(rank: int, side: int, apart: bool) -> tuple[int, int]:
    """Returns operations and bytes, in 16 bits, that a step needs more."""
    image = (side // 16) ** 2
    operations = moved = 0
    for path, (r, rows, width) in ranks(rank, apart).items():
        tokens = image if ".img_" in path else TEXT if ".txt_" in path else image + TEXT
        operations += 2 * tokens * r * (rows + width)
        moved += 2 * (tokens * (2 * rows + width) + r * (rows + width))
    return operations, moved


def times(rank: int, side: int) -> dict[str, tuple[float, float]]:
    """Prints the share of a step by chip: of a LoRA on fused layers, and on those of diffusers."""
    base = step_flops(FLUX_DEV, side, side, TEXT)
    costs = [added(rank, side, apart) for apart in (False, True)]
    for (operations, moved), what in zip(costs, ("fused", "apart"), strict=True):
        print(f"{what}: {100 * operations / base:.1f} % more operations, {moved / 1e9:.1f} GB")
    print("| chip | a step | added | share | q, k and v apart |\n|---|---|---|---|---|")
    shares = {}
    for chip, bandwidth in BANDWIDTH.items():
        rate = CHIPS[chip] * SHARE_OF_PEAK * 1e12
        more = [operations / rate + moved / (bandwidth * 1e9) for operations, moved in costs]
        shares[chip] = (more[0] * rate / base, more[1] * rate / base)
        cells = " | ".join(f"{100 * one:.1f} %" for one in shares[chip])
        print(f"| {chip} | {base / rate:.1f} s | {more[0]:.2f} s | {cells} |")
    return shares


def memory(rank: int, side: int) -> list[dict]:
    """Prints what the plan counts for FLUX.1, in bfloat16: all blocks resident, and all of them streamed."""
    fused, apart = (sum(2 * r * (rows + width) for r, rows, width in ranks(rank, a).values()) for a in (False, True))
    cases = {"none": 0, f"rank {rank}": fused, f"rank {rank}, apart": apart, f"20 of rank {rank}": 20 * fused}
    print("| base | adapter | branches | all in memory | all streamed |\n|---|---|---|---|---|")
    rows = []
    for precision in ("none", "4"):
        weights = weigh_recipe(FLUX_DEV_MODEL, precision, "bfloat16")
        for name, count in cases.items():
            plan = make_plan(
                weights, FLUX_DEV_MODEL, mx.bfloat16, width=side, height=side, text_length=TEXT, adapters=count,
                budget=2**60,
            )  # fmt: skip
            base = "16 bits" if precision == "none" else f"{precision} bits"
            sizes = count / GB, plan.most / GB, plan.least / GB
            rows.append({"base": base, "adapter": name, "branches": sizes[0], "most": sizes[1], "least": sizes[2]})
            print(f"| {base} | {name} | {' | '.join(f'{one:.2f} GB' for one in sizes)} |")
    return rows


def measured(rank: int, tokens: int, bits: int | None) -> tuple[float, float]:
    """Measures a single block of full width with the branch, as a share of that without.

    Returns:
        The processor's time (other programs do not count), and the most memory in use.
    """
    sizes = dataclasses.replace(FLUX_DEV, depth=0, depth_single_blocks=1)
    block = build("transformer", sizes).single_blocks[0]
    if bits:
        nn.quantize(block, 64, bits, class_predicate=lambda path, layer: path in ("linear1", "linear2"))
        adopt(block)
        choose_products(block, mx.float32)
    x, mod = mx.random.normal((1, tokens, FLUX_DEV.hidden_size)), mx.zeros((1, 3 * FLUX_DEV.hidden_size))
    pe = rope(mx.zeros((tokens, 3)), FLUX_DEV.axes_dim, FLUX_DEV.theta)
    mx.eval(block.parameters(), x, pe)
    layers, shapes = (block.linear1, block.linear2), layer_shapes("transformer", sizes)
    outer = [shapes[f"single_blocks.0.{name}"] for name in ("linear1", "linear2")]
    branches = [Branch(down=mx.zeros((width, rank)), up=mx.zeros((rank, rows))) for rows, width in outer]
    mx.eval([branch.arrays for branch in branches])
    best, peak = [float("inf")] * 2, [0, 0]
    for _ in range(_ROUNDS):
        for i, chosen in enumerate(([None, None], branches)):
            for layer, branch in zip(layers, chosen, strict=True):
                set_branch(layer, branch)
            mx.reset_peak_memory()
            start = time.process_time()
            mx.eval(block(x, mod, pe))
            best[i] = min(best[i], time.process_time() - start)
            peak[i] = mx.get_peak_memory()
    return best[1] / best[0], peak[1] / peak[0]


def main() -> None:
    """Prints the tables and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=64, help="of the measured block")
    args = parser.parse_args()
    facts: dict = {"rank": args.rank, "tokens": args.tokens, "shares": times(args.rank, args.side)}
    facts["memory"] = memory(args.rank, args.side)
    print("| a single block, float32 | time | memory |\n|---|---|---|")
    for bits in (None, 4):
        facts[f"measured {bits or 'whole'}"] = ratio, peak = measured(args.rank, args.tokens, bits)
        print(f"| {f'{bits} bits' if bits else 'whole'} | {ratio:.3f} | {peak:.3f} |", flush=True)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
