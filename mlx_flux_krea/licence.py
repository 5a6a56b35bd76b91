"""Decides if a model's licence requires content filters, from plain facts about the model.

The licence of FLUX.1 [dev], and of every model derived from it, demands content filters or a person's review before
anything is released. The policy stands here alone; whoever opens or converts a model states the facts.
"""

from typing import NamedTuple


class Architecture(NamedTuple):
    """The sizes by which a transformer of FLUX.1's family is recognised, in the names of FluxParams."""

    hidden_size: int
    num_heads: int
    depth: int  # double blocks
    depth_single_blocks: int
    guidance_embed: bool


FLUX_1_DEV = Architecture(hidden_size=3072, num_heads=24, depth=19, depth_single_blocks=38, guidance_embed=True)


def requires_filters(architecture: Architecture, declared: str) -> bool:
    """Decides whether a model's licence demands content filters or review.

    FLUX.1's published size with guidance embedding (dev, Krea, Kontext) always does. A folder can add the requirement
    and never lift it.

    Args:
        architecture: of the transformer.
        declared: `filters` in the folder's model_index.json: "required" or "none".
    """
    return declared == "required" or architecture == FLUX_1_DEV
