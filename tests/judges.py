"""Two small filters with real weights in a file: an eye for red pictures, and a reader that knows some names."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
from helpers import acknowledge, edit_index

from mlx_flux_krea.filters import judges as filters_judges
from mlx_flux_krea.filters.instructions import CANARIES
from mlx_flux_krea.home import root as home
from mlx_flux_krea.weights import read_header

EYE = {"weight": [9.0, -4.0, 1.0], "bias": [-9.5]}  # of mean red, green and blue; undecided of none
NAMES = ("mickey", "pikachu")


def load(folder: Path) -> dict[str, mx.array]:
    read_header(folder / "model.safetensors")  # whole, or an error
    return mx.load(str(folder / "model.safetensors"))


class Eye:
    def __init__(self, folder: Path):
        self.about = {"source": "a test"}
        self.weights = load(folder)

    def logit(self, pixels: np.ndarray) -> float:
        mean = mx.array(pixels.reshape(-1, 3).mean(0) / 255, mx.float32)
        return float(mean @ self.weights["weight"] + self.weights["bias"][0])

    def images(self, pixels):
        probabilities = [1 / (1 + np.exp(-self.logit(one))) for one in pixels]
        return [{"normal": 1 - p, "nsfw": p} for p in probabilities]

    def free(self):
        pass


class Reader:
    def __init__(self, folder: Path):
        self.about = {"source": "a test"}
        self.known = load(folder)["names"]
        self.read: list[str] = []

    def tokens(self, text: str) -> list[str]:
        return text.casefold().replace(",", " ").split()

    def prompts(self, texts):
        self.read += texts
        known = "".join(map(chr, self.known.tolist())).split()
        return [8.0 * any(name in self.tokens(text) for name in known) - 4.0 for text in texts]

    def images(self, pixels):
        return [{"integrity": -4.0 + float(one[0, 0, 0] == 255 and one[0, 0, 1] == 0) * 8} for one in pixels]

    def together(self, pixels, texts):
        own = texts[len(CANARIES) :]  # a test may have other answers about these
        return self.images(pixels), [*self.prompts(texts[: len(CANARIES)]), *(self.prompts(own) if own else [])]

    def free(self):
        pass


CLASSES = {"nsfw": Eye, "pixtral": Reader}


def install(record: bool = True) -> None:
    """Writes both into the home folder, as the converter would."""
    arrays = {
        "nsfw": {name: mx.array(value) for name, value in EYE.items()},
        "pixtral": {"names": mx.array(list(map(ord, " ".join(NAMES))))},
    }
    for name, weights in arrays.items():
        folder = home() / "filters" / name
        folder.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
        if record:
            values = filters_judges.self_test(name, CLASSES[name](folder))[0]
            (folder / filters_judges.SELF_TEST).write_text(json.dumps(values))


def load_judge(name: str, folder: Path, make_run=None):
    return CLASSES[name](folder)


def as_required(model: Path, folder: Path, **changes) -> Path:
    """A copy of a model as one whose licence requires filters, its manifest included."""
    shutil.copytree(model, folder)
    return edit_index(folder, filters="required", **changes)


def filtered_copy(model: Path, folder: Path, monkeypatch, **changes) -> Path:
    """Such a copy with both filters, whose licence somebody has agreed to."""
    acknowledge(as_required(model, folder, **changes))
    install()
    monkeypatch.setattr(filters_judges, "load_judge", load_judge)
    return folder
