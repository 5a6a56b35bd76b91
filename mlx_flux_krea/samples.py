"""The file of a calibration: inputs of the transformer at some steps of some prompts, by which GPTQ rounds its layers.

`calibration` writes it and `convert` reads it, so that neither knows the other.

    latents     (N, L, C) float32, packed, before a step
    sigmas      (N,) float32, noise level of that step
    prompts     (N,) int32, the place of its prompt
    embeds      (P, S, D) float32, of T5
    pooled      (P, V) float32, of CLIP
    metadata    "flux-krea": {"width", "height" (of the latents), "guidance", "rounding"} as JSON
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .errors import ModelError
from .files import replacing

_KEY = "flux-krea"
_ARRAYS = ("latents", "sigmas", "prompts", "embeds", "pooled")
_FACTS = ("width", "height", "guidance", "rounding")


@dataclass(frozen=True)
class Samples:
    """The contents of the file; arrays as above.

    Attributes:
        width: of the latents.
        height: of the latents.
        guidance: guidance scale; None: the model has no guidance embedding.
        rounding: of times and guidance, a key of `presets.TIMESTEP_ROUNDING`.
    """

    latents: np.ndarray
    sigmas: np.ndarray
    prompts: np.ndarray
    embeds: np.ndarray
    pooled: np.ndarray
    width: int
    height: int
    guidance: float | None
    rounding: str

    def __len__(self) -> int:
        return len(self.latents)

    def save(self, path: Path) -> None:
        """Writes the file, which takes its name when it is complete.

        Raises:
            UsageError: it cannot be written.
            ResourceError: the disk is full.
        """
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        facts = {name: getattr(self, name) for name in _FACTS}
        with replacing(path) as file:
            file.write(save(arrays, {_KEY: json.dumps(facts)}))

    @classmethod
    def load(cls, path: Path) -> "Samples":
        """Reads the file.

        Raises:
            ModelError: it is missing, damaged, or another file.
        """
        try:
            with safe_open(path, "numpy") as file:
                arrays = {name: file.get_tensor(name) for name in _ARRAYS}
                facts = json.loads(file.metadata()[_KEY])
            return cls(**arrays, **{name: facts[name] for name in _FACTS})
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ModelError(f"{path} cannot be read: {reason}", "the inputs for GPTQ", "collect them anew") from None
