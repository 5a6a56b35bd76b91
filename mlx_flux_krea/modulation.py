"""Modulations: shifts, scales and gates of every layer of the transformer, for all steps, before the first one.

They depend on time, guidance and the pooled vector alone. So one pass over their weights, 3.2 of the 11.9 billion,
serves all steps of a run, and of all runs whose prompts are read together. N rows, C width.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from .models.transformer import Flux
from .sampling import sampler

Streaming = Callable[[Sequence[int]], AbstractContextManager[Callable]]  # of the layers at these places
MakeRun = Callable[..., Callable]  # (number of parts, function that runs one) to one that also reports and stops


@dataclass(frozen=True)
class Moments:
    """All that the modulations of a run depend on. There is a row for each step of each condition.

    Attributes:
        sigmas: (n,) float32, noise levels of the steps.
        guidance: scale, or None for a model without guidance embedding.
        pooled: (P, D), a vector of each condition.
        rounding: of times and guidance, a key of `presets.TIMESTEP_ROUNDING`.
    """

    sigmas: np.ndarray
    guidance: float | None
    pooled: mx.array
    rounding: str

    @property
    def key(self) -> tuple:
        """All of it, to find modulations by."""
        vectors = np.array(self.pooled.astype(mx.float32)).tobytes()
        return self.sigmas.tobytes(), self.guidance, self.rounding, self.pooled.shape, vectors

    def embedded(self, flux: Flux, run: Callable) -> mx.array:
        """Returns the vector (N, C) of each row."""
        times = mx.tile(sampler.embedded_times(self.sigmas, self.rounding, flux.dtype), len(self.pooled))
        scales = None
        if self.guidance is not None:
            scales = mx.broadcast_to(sampler.embedded_guidance(self.guidance, self.rounding, flux.dtype), times.shape)
        pooled = mx.repeat(self.pooled, len(self.sigmas), axis=0)

        def vec() -> mx.array:
            return flux.vec(times, scales, pooled, in_float32=self.rounding == "once")

        return run(vec)


class Modulations:
    """The modulations of the last run, and of runs that were announced after it.

    A second picture of the same prompt, guidance and schedule uses them again, but for those that other adapters
    change. Rows of a run are computed by themselves, since a product of more rows may round otherwise.
    """

    def __init__(self):
        self._known: dict[tuple, list] = {}  # by key, in the order of the runs
        self._stale: set[int] = set()  # places of those that adapters have changed since

    @property
    def ahead_bytes(self) -> int:
        """Bytes of those of runs after the next one."""
        return sum(
            array.nbytes
            for made in [*self._known.values()][1:]
            for _, array in tree_flatten(made)
            if isinstance(array, mx.array)
        )

    def forget(self) -> None:
        """Drops all."""
        self._known, self._stale = {}, set()

    def change(self, places: Iterable[int]) -> None:
        """Notes that adapters have changed the layers at these places."""
        self._stale.update(places)

    def of(self, moments: Moments, flux: Flux, streaming: Streaming, make_run: MakeRun) -> list:
        """Returns the modulations of a run, the argument of `Flux.forward` with N rows.

        Args:
            moments: of the run.
            flux: the transformer.
            streaming: gives the function that runs modulation layers while their weights are read.
            make_run: called as make_run(parts, run), see `MakeRun`.
        """
        key = moments.key
        known = self._known.get(key)
        places = sorted(self._stale) if known else list(range(len(flux.modulated)))
        if known and not places:
            keys = list(self._known)
            self._known = {later: self._known[later] for later in keys[keys.index(key) :]}
            return known
        self._known = {}
        (computed,) = _computed([moments], flux, places, streaming, make_run)
        made = [computed.get(place, known and known[place]) for place in range(len(flux.modulated))]
        self._known, self._stale = {key: made}, set()
        return made

    def read_ahead(self, runs: Sequence[Moments], flux: Flux, streaming: Streaming, make_run: MakeRun) -> None:
        """Computes the modulations of several runs, in their order; arguments as for `of`."""
        wanted = {moments.key: moments for moments in runs}
        places = list(range(len(flux.modulated)))
        self.forget()
        computed = _computed(list(wanted.values()), flux, places, streaming, make_run)
        self._known = {key: list(made.values()) for key, made in zip(wanted, computed, strict=True)}


def _computed(
    runs: Sequence[Moments], flux: Flux, places: Sequence[int], streaming: Streaming, make_run: MakeRun
) -> list[dict[int, mx.array]]:
    """Computes the modulations of these layers for each run. A layer is read once for all of them."""
    made: list[dict[int, mx.array]] = [{} for _ in runs]
    with streaming(places) as run:
        run = make_run(len(runs) * (len(places) + 1), run)
        vectors = [moments.embedded(flux, run) for moments in runs]
        for place in places:
            for vector, of_run in zip(vectors, made, strict=True):
                (of_run[place],) = flux.modulations(vector, run, [place])
    return made
