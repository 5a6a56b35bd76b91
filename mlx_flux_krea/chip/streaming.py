"""Blocks that are streamed from disk against blocks in memory, bit for bit, and the speed of the disk itself."""

import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..commands.shared import estimates
from ..commands.shared.text import size
from ..disks import SAMPLE, THREADS, read_speed
from ..errors import ResourceError
from ..memory import machine_memory, make_plan, step_flops
from ..models import config
from ..residency import SLOTS, Blocks
from ..weights import read_header
from .check import CheckResult, Setting, as_numpy, normal
from .products import SHAPES

BLOCKS, WIDTH, TOKENS = 4, 6144, 4608  # 75 MB a block in bfloat16
ROUNDS = 3  # through all blocks, so that each is read again into a buffer that held another
_SIDE, _LENGTH = 1024, 512  # pixels and tokens of T5 of a usual picture


class ChainLink(nn.Module):
    """A block that keeps its numbers near 1: a layer, and a norm without weights."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(self.linear(x), None, 1e-6)


class Chain(nn.Module):
    """Blocks that run one after the other."""

    def __init__(self, width: int):
        super().__init__()
        self.links = [ChainLink(width) for _ in range(BLOCKS)]

    def __call__(self, x: mx.array, run: Callable) -> mx.array:
        for link in self.links:
            x = run(link, x)
        return x


def same_bits(setting: Setting) -> CheckResult:
    """Compares the results of blocks in memory, read once, and streamed, while their buffers are filled again."""
    width = WIDTH // setting.divisor
    x = normal((TOKENS // setting.divisor, width), mx.bfloat16)
    weights = {f"links.{i}.linear.weight": normal((width, width), mx.bfloat16, i + 1) for i in range(BLOCKS)}
    chain = Chain(width)
    chain.load_weights(list(weights.items()))
    results = {"in memory": as_numpy(chain(x, lambda link, y: link(y)))}
    with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
        path = Path(folder) / "blocks.safetensors"
        mx.save_safetensors(str(path), weights)
        del weights
        tensors = {name: (path, info) for name, info in read_header(path)[0].items()}
        for name, budget, rounds in (("resident", None, 1), ("streamed", 0, ROUNDS)):
            blocks = Blocks(chain, tensors, chain.links, dtype=mx.bfloat16, budget=budget)
            with blocks.streaming(rounds) as run:
                for i in range(rounds):
                    results[f"{name}, round {i + 1}"] = as_numpy(chain(x, run))
    pairs = pairwise(results.items())
    wrong = [f"{b} differs from {a}" for (a, first), (b, second) in pairs if not np.array_equal(first, second)]
    refilled = ROUNDS * BLOCKS - SLOTS
    found = f"{len(results)} results with the same bits, {refilled} reads into buffers that had been used"
    todo = "streamed pictures may be wrong: report it, and use a --memory that holds all blocks"
    return CheckResult("; ".join(wrong) or found, "the same bits", not wrong, todo, {"differ": wrong})


def disk(setting: Setting) -> CheckResult:
    """Compares the disk, past the system's cache, with the speed at which streaming costs no time.

    That is for FLUX.1 in 8 bits at 1024 x 1024, with the blocks that do not fit in this program's memory, at the rate
    that this machine's products have.
    """
    speed = read_speed(setting.folder, SAMPLE if setting.divisor == 1 else SAMPLE // 8, THREADS)
    rate = _operations_a_second(setting)
    read, blocks = _streamed(setting.budget or machine_memory())
    seconds = step_flops(config.FLUX_DEV, _SIDE, _SIDE, _LENGTH) / rate
    need, found = read / seconds, f"reads {speed / 1e9:.2f} GB/s"
    figures = {"bytes_per_second": speed, "needed": need, "bytes_per_step": read}
    if not read:
        return CheckResult(found, "any: all blocks of 8 bits fit in memory", True, figures=figures)
    expected = f"{need / 1e9:.2g} GB/s for {blocks} streamed blocks, {size(read)} in a step of {seconds:.3g} s"
    return CheckResult(found, expected, speed >= need, "fewer bits (-q 4), or a faster disk for the models", figures)


def _operations_a_second(setting: Setting) -> float:
    """Returns the rate of a block's widest product in bfloat16."""
    rows, inputs, outputs = (side // setting.divisor for side in SHAPES[0])
    x, weight = normal((rows, inputs), mx.bfloat16), normal((inputs, outputs), mx.bfloat16)
    mx.eval(mx.matmul(x, weight))  # compiles the kernel
    start = time.perf_counter()
    mx.eval(mx.matmul(x, weight))
    return 2 * rows * inputs * outputs / (time.perf_counter() - start)


def _streamed(budget: int) -> tuple[int, int]:
    """Returns the bytes that a step reads in 8 bits in so much memory, and the number of blocks that it streams."""
    weights = estimates.weigh_recipe(config.FLUX_DEV_MODEL, "8", "bfloat16")
    try:
        plan = make_plan(
            weights,
            config.FLUX_DEV_MODEL,
            mx.bfloat16,
            width=_SIDE,
            height=_SIDE,
            text_length=_LENGTH,
            filtered=True,
            budget=budget,
        )
    except ResourceError:  # not even streamed: as if every block were
        return sum(weights.blocks.stored), len(weights.blocks.stored)
    return plan.read_per_step, plan.total_blocks - plan.resident_blocks
