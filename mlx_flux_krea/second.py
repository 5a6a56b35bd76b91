"""The second pass of a run: what it starts from, and how much of a run a checkpoint has behind it.

A checkpoint counts the steps of both passes. In the second it holds, beside the latents, those of the finished first
pass, the steps that were computed there in full, and if tiles are seen; the enlarged picture is decoded and encoded
again when the run goes on.
"""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from .checkpoint import Checkpoint
from .memory import MemoryPlan
from .request import ResolvedRequest
from .sampling.enlarge import second_seed

Computed = tuple[tuple[int, ...], ...]  # of each picture, the steps that were computed in full


@dataclass(frozen=True)
class Second:
    """The second pass of a run.

    Attributes:
        request: the pass, at its size, with a seed of its own.
        first: the request of both passes.
        plan: of both passes.
        kept: arrays of a checkpoint that the pass depends on: "first", (B, L, 64), latents of the first pass; "tiles";
            "computed.i", the steps of picture i that the first pass computed in full.
    """

    request: ResolvedRequest
    first: ResolvedRequest
    plan: MemoryPlan
    kept: dict[str, mx.array]


def second_pass(
    request: ResolvedRequest,
    plan: MemoryPlan,
    latents: mx.array | None,
    computed: Computed,
    checkpoint: Checkpoint | None,
    shape: tuple[int, ...],
) -> Second:
    """Returns the second pass of a request.

    Args:
        request: the request.
        plan: of both passes.
        latents: of the first pass; None: a checkpoint holds them, or an image is enlarged.
        computed: steps of the first pass.
        checkpoint: of the run.
        shape: of the first pass's latents.

    Raises:
        UsageError: the checkpoint's latents have another shape, or hold NaN or infinities.
    """
    assert request.large is not None  # where the second pass runs
    large, kept = request.large, {"tiles": mx.array([float(plan.tiles > 1)])}
    kept |= {f"computed.{i}": mx.array(steps, mx.float32) for i, steps in enumerate(computed)}
    if request.first_steps:
        if latents is None and checkpoint:
            latents = mx.array(checkpoint.state().get("first", np.zeros(0, np.float32)))
            if latents.shape != shape or not mx.isfinite(latents).all().item():
                raise checkpoint.damaged()
        assert latents is not None
        kept["first"] = latents
    seeds = tuple(map(second_seed, request.seeds))
    at_size = replace(
        request,
        width=large.width,
        height=large.height,
        seed=seeds[0] if isinstance(request.seed, int) else seeds,
        cache=None,
        fast=None,
        inputs=replace(request.inputs, canvas=None),
    )
    return Second(at_size, request, plan, kept)


def as_begun(request: ResolvedRequest, checkpoint: Checkpoint | None) -> ResolvedRequest:
    """Returns a request whose second pass sees tiles, or the whole, as it does in a checkpoint that has begun it."""
    if not (checkpoint and request.large and is_enlarging(request, checkpoint)):
        return request
    tiles = checkpoint.state().get("tiles")
    if tiles is None or tiles.shape != (1,):
        raise checkpoint.damaged()
    return replace(request, large=replace(request.large, tiles=bool(tiles[0])))


def computed_before(request: ResolvedRequest, checkpoint: Checkpoint | None) -> Computed:
    """Returns the steps of a first pass that a checkpoint has behind it which were computed in full, of each picture.

    Raises:
        UsageError: the checkpoint's are impossible.
    """
    if not (checkpoint and is_enlarging(request, checkpoint)):
        return ((),) * request.batch
    found = [checkpoint.state().get(f"computed.{i}", np.zeros(0)) for i in range(request.batch)]
    known = {*range(request.first_steps)}
    if any(not {*steps.tolist()} <= known for steps in found):
        raise checkpoint.damaged()
    return tuple(tuple(map(int, steps)) for steps in found)


def is_enlarging(request: ResolvedRequest, checkpoint: Checkpoint | None) -> bool:
    """Returns True where a checkpoint has the first pass behind it."""
    return request.enlarges and checkpoint is not None and checkpoint.done > request.first_steps
