"""Step caches: some steps of a schedule are not computed in full, but taken from those that were.

    skip                  the first 4 steps are computed, then every second, and the last. A skipped velocity is
                          extrapolated linearly in sigma from the last two computed ones, or repeats the last where
                          fewer than 12 are computed. (28 steps: 16.) A skipped step reads no weights.
    first-block:T         the first block runs in every step. Where the mean change that it makes to the image stream
                          differs by a share of T at most from that of the last computed step, the changes of all other
                          blocks are repeated (ParaAttention, Cheng 2024; diffusers' FirstBlockCache).
    first-block:T:1       the same, with their changes extrapolated linearly in sigma.

A cache belongs to one run. Pictures of a batch, and the two halves of true CFG, are decided apart. NaN, infinities and
jumps in the signal lead to a computed step. B batch, L image tokens, C channels of the transformer.
"""

from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import numpy as np

from .rules import LINEAR_FROM, CacheRule, skip_steps
from .solvers import Model

Rest = Callable[[], mx.array]
Shortcut = Callable[[mx.array, mx.array, Rest], mx.array]  # `between` of Flux.forward

_JUMP = 1.0  # mean difference of two velocities, relative to the last, above which a step is not extrapolated


class Uncached:
    """The cache of a run without one, which counts steps.

    Args:
        sigmas: noise levels of the steps that the run has, and 0: (count + 1,).
    """

    def __init__(self, sigmas: np.ndarray):
        self._sigmas = sigmas

    @property
    def evaluations(self) -> int:
        """Expected number of full evaluations of a picture."""
        return self.left(0)

    def wrap(self, model: Model) -> Model:
        """Returns the model with the cache around it."""
        return model

    def shortcut(self, key: str, step: int) -> Shortcut | None:
        """Returns the function between the first block and the others; None: there is none.

        Args:
            key: of the picture in the batch, and of the half of true CFG.
            step: from 0 in this run.
        """
        return None

    def computed(self, key: str) -> tuple[int, ...]:
        """Returns the steps that ran in full, for pictures and halves whose key starts so."""
        return tuple(range(len(self._sigmas) - 1))

    def left(self, done: int) -> int:
        """Returns the expected number of evaluations after so many steps."""
        return len(self._sigmas) - 1 - done

    def arrays(self) -> dict[str, mx.array]:
        """Returns everything that the next steps depend on, for a checkpoint."""
        return {}

    def restore(self, arrays: Mapping[str, mx.array], shapes: Mapping[str, Sequence[int]]) -> None:
        """Takes what `arrays` gave.

        Args:
            arrays: by name; others than its own are ignored.
            shapes: of the velocity and of the image stream, (B, L, 64) and (1, L, C).

        Raises:
            ValueError: a shape, or the number of a step, that is impossible.
        """

    def _steps(self, array: mx.array) -> list[int]:
        """Returns the numbers of steps in an array, checked."""
        steps = [int(x) for x in np.array(array.astype(mx.float32)).reshape(-1) if np.isfinite(x)]
        if array.ndim != 1 or len(steps) != array.size or steps != sorted({*steps} & {*range(len(self._sigmas) - 1)}):
            raise ValueError("[Uncached] The numbers of computed steps are impossible.")
        return steps


class Skip(Uncached):
    """The rule `skip`: a static choice of steps, around the whole model."""

    def __init__(self, sigmas: np.ndarray):
        super().__init__(sigmas)
        self._planned = skip_steps(len(sigmas) - 1)
        self._is_linear = self.evaluations >= LINEAR_FROM
        self._past: list[mx.array] = []  # the last two computed velocities
        self._computed: list[int] = []

    def wrap(self, model: Model) -> Model:
        """Returns the model that skips steps."""

        def velocity(latents: mx.array, step: int) -> mx.array:
            if step not in self._planned and (guess := self._extrapolated(step)) is not None:
                return guess
            v = model(latents, step)
            keep = 2 if self._is_linear else 1
            self._past, self._computed = [*self._past, v][-keep:], [*self._computed, step]
            return v

        return velocity

    def _extrapolated(self, step: int) -> mx.array | None:
        """Returns the velocity of a skipped step; None: nothing is known that it could be taken from."""
        if len(self._past) < 2:
            return self._past[-1] if self._past and not self._is_linear else None
        before, last = self._past
        if not (mx.abs(last - before).mean() < _JUMP * mx.abs(last).mean()).item():
            return None
        return extrapolate(before, last, self._sigmas, [*self._computed[-2:], step])

    def computed(self, key: str) -> tuple[int, ...]:
        """Returns the computed steps."""
        return tuple(self._computed)

    def left(self, done: int) -> int:
        """Counts the computed steps that are left."""
        return sum(step >= done for step in self._planned)

    def arrays(self) -> dict[str, mx.array]:
        """Returns the velocities that the next steps are extrapolated from, and the computed steps."""
        past = {f"velocity.{i}": v for i, v in enumerate(self._past)}
        return past | {"computed": mx.array(self._computed, mx.float32)}

    def restore(self, arrays: Mapping[str, mx.array], shapes: Mapping[str, Sequence[int]]) -> None:
        """Takes what `arrays` gave."""
        self._past = _numbered(arrays, "velocity", shapes["velocity"])
        self._computed = self._steps(arrays["computed"]) if "computed" in arrays else []
        if len(self._past) > len(self._computed):
            raise ValueError("[Skip] There are more velocities than steps.")


class FirstBlocks(Uncached):
    """The rule `first-block`, for every picture and half of a run.

    Args:
        sigmas: as of `Uncached`.
        rule: threshold and order.
    """

    def __init__(self, sigmas: np.ndarray, rule: CacheRule):
        super().__init__(sigmas)
        self._rule = rule
        self._halves: dict[str, _FirstBlock] = {}

    def shortcut(self, key: str, step: int) -> Shortcut:
        """Returns the function that decides after the first block."""
        half = self._halves.setdefault(key, _FirstBlock(self._rule, self._sigmas))

        def between(before: mx.array, after: mx.array, rest: Rest) -> mx.array:
            return half.run(step, before, after, rest)

        return between

    def computed(self, key: str) -> tuple[int, ...]:
        """Returns the steps that ran in full, of a picture: in either half."""
        return tuple(
            sorted({step for name, half in self._halves.items() if name.startswith(key) for step in half.steps})
        )

    def arrays(self) -> dict[str, mx.array]:
        """Returns the changes that the next steps are compared with and taken from, and the computed steps."""
        found: dict[str, mx.array] = {}
        for key, half in self._halves.items():
            found[f"{key}steps"] = mx.array(half.steps, mx.float32)
            found |= {} if half.first is None else {f"{key}first": half.first}
            found |= {f"{key}rest.{i}": rest for i, rest in enumerate(half.rests)}
        return found

    def restore(self, arrays: Mapping[str, mx.array], shapes: Mapping[str, Sequence[int]]) -> None:
        """Takes what `arrays` gave."""
        for key in [name.removesuffix("steps") for name in arrays if name.endswith("steps")]:
            half = self._halves[key] = _FirstBlock(self._rule, self._sigmas)
            half.steps = self._steps(arrays[f"{key}steps"])
            if f"{key}first" not in arrays:
                continue
            half.first = _checked(arrays[f"{key}first"], f"{key}first", shapes["stream"])
            half.rests = _numbered(arrays, f"{key}rest", shapes["stream"])
            if not 0 < len(half.rests) <= len(half.steps):
                raise ValueError("[FirstBlocks] There are as many changes as steps at most.")


class _FirstBlock:
    """The state of one picture, or of one of its halves."""

    def __init__(self, rule: CacheRule, sigmas: np.ndarray):
        self._rule, self._sigmas = rule, sigmas
        self.steps: list[int] = []  # that were computed
        self.first: mx.array | None = None  # (1, L, C), the first block's change at the last of them
        self.rests: list[mx.array] = []  # (1, L, C), changes of all other blocks at the last of them

    def run(self, step: int, before: mx.array, after: mx.array, rest: Rest) -> mx.array:
        """Returns the image stream (1, L, C) after all blocks, from those before and after the first."""
        first = after - before
        if self.first is not None and self._is_near(first, self.first):
            if len(self.rests) < 2:
                return after + self.rests[-1]
            return after + extrapolate(self.rests[0], self.rests[1], self._sigmas, [*self.steps[-2:], step])
        stream = rest()
        self.steps.append(step)
        rest_change = stream - after
        if mx.isfinite(rest_change).all().item():
            self.first, self.rests = first, [*self.rests, rest_change][-1 - self._rule.order :]
            mx.eval(self.first, self.rests)
        else:  # nothing may be taken from this step
            self.first, self.rests = None, []
        return stream

    def _is_near(self, first: mx.array, known: mx.array) -> bool:
        known = known.astype(mx.float32)
        difference = mx.abs(first.astype(mx.float32) - known).mean() / mx.abs(known).mean()
        return bool((difference <= self._rule.threshold).item())  # False for NaN


def cache_bytes(rule: CacheRule | None, velocities: int, streams: int, size: int) -> int:
    """Returns the bytes that a cache holds.

    Args:
        rule: of the cache; None: there is none.
        velocities: elements of the velocities of all pictures.
        streams: elements of the image streams of all pictures and halves.
        size: bytes of a number of the stream.
    """
    if rule is None:
        return 0
    return 4 * 3 * velocities if rule.name == "skip" else (3 + rule.order) * streams * size


def extrapolate(before: mx.array, last: mx.array, sigmas: np.ndarray, steps: Sequence[int]) -> mx.array:
    """Returns the value at the last of three steps, on the line through those at the first two, in sigma."""
    first, second, third = (float(sigmas[step]) for step in steps)
    return last + ((third - second) / (second - first) * (last - before)).astype(last.dtype)


def _numbered(arrays: Mapping[str, mx.array], name: str, shape: Sequence[int]) -> list[mx.array]:
    """Returns the one or two arrays of a name, checked."""
    return [_checked(arrays[f"{name}.{i}"], name, shape) for i in range(2) if f"{name}.{i}" in arrays]


def _checked(array: mx.array, name: str, shape: Sequence[int]) -> mx.array:
    """Returns an array that has this shape and holds finite numbers.

    Raises:
        ValueError: it does not.
    """
    if array.shape != tuple(shape) or not mx.isfinite(array).all().item():
        raise ValueError(f"[caches] {name} has another shape than {tuple(shape)}, or holds NaN.")
    return array


def make_cache(rule: CacheRule | None, sigmas: np.ndarray) -> Uncached:
    """Returns an empty cache for the steps of a run, whose noise levels end with 0."""
    if rule is None:
        return Uncached(sigmas)
    return Skip(sigmas) if rule.name == "skip" else FirstBlocks(sigmas, rule)
