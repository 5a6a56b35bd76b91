"""Solvers, schedules and step caches: against exact solutions, the reference's runs and, live, diffusers."""

import math

import mlx.core as mx
import numpy as np
import pytest
from helpers import assert_close, rel

from mlx_flux_krea.errors import UsageError
from mlx_flux_krea.models.config import Schedule
from mlx_flux_krea.sampling import sampler
from mlx_flux_krea.sampling.caches import make_cache
from mlx_flux_krea.sampling.rules import CacheRule, count_evaluations, parse_cache, skip_steps
from mlx_flux_krea.sampling.solvers import SOLVERS, State

# ComfyUI's beta_scheduler: numpy.rint(scipy.stats.beta.ppf(1 - i / 14, 0.6, 0.6) * 9999), with scipy 1.17.1
BETA_14 = [9999, 9772, 9288, 8626, 7831, 6939, 5985, 5000, 4014, 3060, 2168, 1373, 711, 227]
LEVELS = sampler.make_sigmas(Schedule(), 1024, 14)


def noise(seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=(2, 5, 64)).astype(np.float32))


def field(latents: mx.array, sigma: float) -> mx.array:
    """A velocity that depends on both."""
    return mx.sin(3 * latents) * (0.3 + sigma) + 0.5 * latents - math.cos(5 * sigma)


def solved(name: str, levels: np.ndarray, latents: mx.array, velocity=field, cache=None) -> mx.array:
    """The latents after every step, stacked."""
    state, seen = State(latents), []
    model = lambda x, i: velocity(x, float(levels[i]))  # noqa: E731
    model = cache.wrap(model) if cache else model
    for i in range(len(levels) - 1):
        state = SOLVERS[name](model, state, levels, i)
        seen.append(state.latents)
    return mx.stack(seen)


# --- solvers ---


@pytest.mark.parametrize(
    ("name", "n", "least", "most"), [("euler", 16, 3, 5), ("heun", 8, 12, 20), ("dpmpp_2m", 64, 8, 16)]
)
def test_with_four_times_the_steps_the_error_falls_by_the_order_of_the_solver(name, n, least, most):
    """dx / d sigma = x - sigma has the solution x = c exp(sigma) + sigma + 1."""

    def error(n: int) -> float:
        levels = np.linspace(0.9, 0, n + 1)
        start = (0.7 * math.exp(0.9) + 1.9) * mx.ones((1, 1, 64))
        end = solved(name, levels, start, lambda x, sigma: x - sigma)[-1]
        return float(mx.abs(end - 1.7).max())

    assert least < error(n) / error(4 * n) < most


def test_a_straight_path_is_solved_exactly_by_each():
    for name in SOLVERS:
        image, start = noise(1), noise(2)
        ends = solved(name, LEVELS, start, lambda x, sigma: start - image)  # noqa: B023
        assert_close(ends[-1], image, 1e-6, name)


def test_heun_evaluates_both_ends_and_the_last_step_once():
    for name, count in {"euler": 14, "dpmpp_2m": 14, "heun": 27}.items():
        seen = []
        solved(name, LEVELS, noise(), lambda x, sigma: seen.append(sigma) or x)  # noqa: B023
        assert len(seen) == count_evaluations(name, 14) == count
        assert 0.0 not in seen


@pytest.mark.parity
@pytest.mark.parametrize("start", [0, 5])
def test_heun_equals_diffusers(start):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    levels = LEVELS[start:]
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(len(levels) - 1)
    sigmas = torch.from_numpy(levels)
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    evaluated = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2)])
    scheduler.timesteps = 1000 * evaluated
    x, seen = torch.from_numpy(np.array(noise())), []
    for i, timestep in enumerate(scheduler.timesteps):
        v = torch.from_numpy(np.array(field(mx.array(x.numpy()), float(evaluated[i]))))
        x = scheduler.step(v, timestep, x).prev_sample
        seen.append(x)
    ends = np.stack([x.numpy() for i, x in enumerate(seen) if i % 2 or i == len(seen) - 1])
    ours = solved("heun", levels, noise())
    assert_close(ours, mx.array(ends), 1e-6)
    assert rel(solved("euler", levels, noise()), mx.array(ends)) > 1e-3


@pytest.mark.parity
@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("count", [8, 28])
def test_dpmpp_2m_equals_diffusers(start, count):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    levels = sampler.make_sigmas(Schedule(), 1024, count)[start:]
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, algorithm_type="dpmsolver++", solver_order=2
    )
    scheduler.set_timesteps(len(levels) - 1)
    scheduler.sigmas = torch.from_numpy(levels)
    x, seen = torch.from_numpy(np.array(noise())), []
    scheduler._begin_index = scheduler._step_index = 0
    for i in range(len(levels) - 1):
        v = torch.from_numpy(np.array(field(mx.array(x.numpy()), float(levels[i]))))
        x = scheduler.step(v, scheduler.timesteps[i], x).prev_sample
        seen.append(x.numpy())
    ours = solved("dpmpp_2m", levels, noise())
    assert_close(ours, mx.array(np.stack(seen)), 1e-5)
    assert rel(solved("euler", levels, noise()), mx.array(np.stack(seen))) > 1e-3


# --- schedules ---


def test_beta_quantiles_are_those_of_the_integral():
    """Against the distribution's integral by the midpoint rule after x = sin(t)^2, which smooths its ends."""
    edges = np.linspace(0, math.pi / 2, 200_001)
    middle = (edges[1:] + edges[:-1]) / 2
    integral = np.append(0, np.cumsum((np.sin(middle) * np.cos(middle)) ** 0.2))
    shares = np.linspace(0, 1, 57)
    expected = np.sin(np.interp(shares, integral / integral[-1], edges)) ** 2
    found = sampler.beta_quantiles(shares, 0.6)
    assert np.abs(found - expected).max() < 1e-6
    assert (found[0], found[-1], found[28]) == (0.0, 1.0, pytest.approx(0.5, abs=1e-12))


def test_schedules_are_comfys_before_the_models_shift():
    assert sampler.schedule_levels(None, 28) is None
    simple, beta = sampler.schedule_levels("simple", 28), sampler.schedule_levels("beta", 28)
    assert np.abs(simple - np.linspace(1, 1 / 28, 28)).max() <= 1e-4
    assert simple[1] == (10000 - 357) / 10000
    assert (beta[0], beta[14]) == (1.0, 0.5001)  # the middle, 4999.5, goes to the even neighbour
    assert np.abs(beta[1:] + beta[:0:-1] - 1).max() <= 2e-4  # symmetric: more levels at both ends
    assert beta[1] - beta[2] < beta[13] - beta[14]
    picked = [round(10000 * level) - 1 for level in sampler.schedule_levels("beta", 14)]
    assert picked == BETA_14
    with pytest.raises(ValueError, match="karras"):
        sampler.schedule_levels("karras", 28)


# --- caches ---


def test_skip_computes_the_first_four_then_every_second_and_the_last():
    assert skip_steps(28) == (0, 1, 2, 3, *range(5, 28, 2))
    assert [len(skip_steps(n)) for n in (1, 4, 5, 6, 12, 20, 27, 28)] == [1, 4, 5, 5, 8, 12, 16, 16]
    assert all(skip_steps(n)[-1] == n - 1 for n in range(1, 60))


def test_skip_extrapolates_linearly_in_sigma_from_twelve_evaluations_and_repeats_below():
    line = lambda x, sigma: (2 + 3 * sigma) * noise(3)  # noqa: E731
    for n, exact in ((19, True), (18, False)):
        levels = sampler.make_sigmas(Schedule(), 1024, n)
        cache = make_cache(CacheRule("skip"), levels)
        full, skipped = (solved("euler", levels, noise(), line, one) for one in (None, cache))
        assert (bool(rel(skipped[-1], full[-1]) < 1e-6)) == exact
        assert cache.computed("0.") == skip_steps(n)
        assert cache.evaluations == cache.left(0) == len(skip_steps(n))
        assert cache.left(5) == len(skip_steps(n)) - 4


@pytest.mark.parametrize("factor", [-3.0, math.nan, math.inf])
def test_a_jump_in_the_velocity_and_nan_compute_the_step(factor):
    """The velocity turns round, or is NaN, in step 5, so the steps that would be taken from it are computed."""
    levels = sampler.make_sigmas(Schedule(), 1024, 28)
    cache = make_cache(CacheRule("skip"), levels)
    calls = []

    def model(x: mx.array, i: int) -> mx.array:
        calls.append(i)
        return factor * noise() if i == 5 else noise()

    velocity = cache.wrap(model)
    for i in range(28):
        velocity(noise(), i)
    assert calls == sorted({*skip_steps(28), 6})
    assert cache.computed("0.") == tuple(calls)


@pytest.mark.parametrize("order", [0, 1])
def test_first_block_decides_by_the_mean_change_and_computes_on_nan(order):
    levels = sampler.make_sigmas(Schedule(), 1024, 8)
    cache = make_cache(CacheRule("first-block", 0.1, order), levels)
    change = noise()[:1]
    signals = [1.0, 1.05, 1.2, 1.25, math.nan, 1.3, 1.5, 1.52]
    taken = []
    for i, factor in enumerate(signals):
        before = noise(9)[:1]
        after = before + factor * change
        rest = lambda after=after, i=i: taken.append(i) or after + (1 + float(levels[i])) * change  # noqa: E731
        found = cache.shortcut("0.0.", i)(before, after, rest)
        exact = after + (1 + float(levels[i])) * change
        if i in (3, 7):
            assert (rel(found, exact) < 1e-5) == bool(order)
    assert taken == [0, 2, 4, 5, 6]
    assert cache.computed("0.") == (0, 2, 4, 5, 6)
    assert cache.computed("1.") == ()


def test_pictures_and_halves_are_decided_apart():
    levels = sampler.make_sigmas(Schedule(), 1024, 4)
    cache = make_cache(CacheRule("first-block", 0.1), levels)
    change = noise()[:1]
    for i in range(4):
        for key, factor in (("0.0.", 1.0), ("0.1.", 1.0 + 0.2 * (i >= 2)), ("10.0.", 1.5**i)):
            cache.shortcut(key, i)(change, change + factor * change, lambda: change)
    expected = {"0.0.": (0,), "0.1.": (0, 2), "0.": (0, 2), "10.": (0, 1, 2, 3), "1.": ()}
    assert {key: cache.computed(key) for key in expected} == expected


@pytest.mark.parametrize("text", ["skip", "first-block:0.08", "first-block:0.08:1", "first-block:0.125"])
def test_names_of_caches_are_read_as_they_are_written(text):
    assert str(parse_cache(text)) == text


BAD = [
    "",
    "none",
    "skip:",
    "first-block",
    "first-block:0",
    "first-block:1",
    "first-block:nan",
    "first-block:a",
    3,
    True,
]


@pytest.mark.parametrize("text", [*BAD, "first-block:0.1:2", "first-block:0.1:"])
def test_other_names_of_caches_are_refused(text):
    with pytest.raises(UsageError, match="`cache` is"):
        parse_cache(text)


@pytest.mark.parametrize("rule", [CacheRule("skip"), CacheRule("first-block", 0.1), CacheRule("first-block", 0.1, 1)])
def test_a_cache_is_restored_to_the_bit_and_refuses_anothers_arrays(rule):
    levels = sampler.make_sigmas(Schedule(), 1024, 28)
    shapes = {"velocity": (2, 5, 64), "stream": (1, 5, 64)}

    def step(cache, i: int) -> mx.array:
        if rule.name == "skip":
            return cache.wrap(lambda x, i: noise(7) * (1 + float(levels[i])))(noise(), i)
        before = noise(4)[:1] * float(levels[i])
        return cache.shortcut("0.1.", i)(before, 2.3 * before + 1, lambda: before * 4 + float(levels[i]))

    whole, half, rest = (make_cache(rule, levels) for _ in range(3))
    expected = [step(whole, i) for i in range(28)]
    for i in range(9):
        step(half, i)
    rest.restore(half.arrays(), shapes)
    assert all(mx.array_equal(step(rest, i), expected[i]) for i in range(9, 28))
    assert rest.computed("0.") == whole.computed("0.")
    assert 3 < len(whole.computed("0.")) < 28
    arrays = half.arrays()
    for name, array in arrays.items():
        is_steps = name.endswith(("computed", "steps"))
        wrong = [array[:, :1] if array.ndim == 3 else array + 40, array * math.nan]
        wrong += [array[::-1], mx.zeros((2, 2))] if is_steps else []
        for other in wrong:
            with pytest.raises((ValueError, KeyError)):
                make_cache(rule, levels).restore(arrays | {name: other}, shapes)
