"""Solvers of the flow's differential equation: from the latents before a step to those after it.

Each solver is one function of the model, the state, the schedule and the number of the step. Rectified flow (Liu et al.
2022; Lipman et al. 2022): x = (1 - sigma) * image + sigma * noise, and the model gives dx / d sigma. B batch, L image
tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

Model = Callable[[mx.array, int], mx.array]  # from latents (B, L, 64) and the number of a noise level to the velocity


@dataclass(frozen=True)
class State:
    """A run between two steps.

    Attributes:
        latents: (B, L, 64), in their type.
        denoised: (B, L, 64) float32, the image that the last step predicted; None: there was none, or nobody needs it.
    """

    latents: mx.array
    denoised: mx.array | None = None


def euler(model: Model, state: State, sigmas: np.ndarray, i: int) -> State:
    """Takes a step by Euler's method, as diffusers' FlowMatchEulerDiscreteScheduler (Esser et al. 2024). First order.

    Args:
        model: maps latents and i to the velocity at sigmas[i].
        state: before the step.
        sigmas: (n + 1,) float32, falling to 0.
        i: the step, from sigmas[i] to sigmas[i + 1].
    """
    return State(_moved(state.latents, model(state.latents, i), float(sigmas[i + 1] - sigmas[i])))


def heun(model: Model, state: State, sigmas: np.ndarray, i: int) -> State:
    """Takes a step with the mean of the velocities at its two ends (Karras et al. 2022, algorithm 1 without churn).

    Second order, with two evaluations a step and one in the last, whose end is the image. Equal to diffusers'
    FlowMatchHeunDiscreteScheduler. Arguments are those of `euler`.
    """
    step = float(sigmas[i + 1] - sigmas[i])
    velocity = model(state.latents, i)
    if sigmas[i + 1] > 0:
        velocity = (velocity + model(_moved(state.latents, velocity, step), i + 1)) / 2
    return State(_moved(state.latents, velocity, step))


def dpmpp_2m(model: Model, state: State, sigmas: np.ndarray, i: int) -> State:
    """Takes a step of DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) in the flow's form: alpha = 1 - sigma.

    Second order from the predictions of two steps, so one evaluation a step. The first step is Euler's, so is the
    second where the first level is 1, which is infinitely far away in log(alpha / sigma), and so is the last. Equal to
    diffusers' DPMSolverMultistepScheduler with flow sigmas. Arguments are those of `euler`.
    """
    sigma, following = float(sigmas[i]), float(sigmas[i + 1])
    x = state.latents.astype(mx.float32)
    denoised = x - sigma * model(state.latents, i).astype(mx.float32)
    ahead = denoised
    if i and state.denoised is not None and following > 0 and (behind := float(sigmas[i - 1])) < 1:
        ratio = (_log_snr(following) - _log_snr(sigma)) / (_log_snr(sigma) - _log_snr(behind))
        ahead = denoised + (ratio / 2) * (denoised - state.denoised)
    share = following / sigma
    return State((share * x + (1 - share) * ahead).astype(state.latents.dtype), denoised)


def _log_snr(sigma: float) -> float:
    return math.log((1 - sigma) / sigma)


def _moved(latents: mx.array, velocity: mx.array, step: float) -> mx.array:
    return latents + (step * velocity.astype(mx.float32)).astype(latents.dtype)


Solver = Callable[[Model, State, np.ndarray, int], State]
SOLVERS: dict[str, Solver] = {"euler": euler, "dpmpp_2m": dpmpp_2m, "heun": heun}
