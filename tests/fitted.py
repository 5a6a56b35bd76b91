"""Both filters as they are published, small, and with answers that a trained model would give.

Random weights know nothing about rights. So the last layer is fitted, by least squares over the hidden states of a
handful of inputs, to answer those rightly; all before it, and the whole way to it, is the real one.
"""

import json
import shutil
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from helpers import PIPELINE, REFERENCE, TOKENIZERS, edit_json, edit_tensors, pack_as_mlx_vlm, pixtral_source
from mlx_flux_krea.convert import convert
from PIL import Image

from mlx_flux_krea import FluxPipeline
from mlx_flux_krea.filters import instructions, judges
from mlx_flux_krea.filters.instructions import CANARIES
from mlx_flux_krea.models import pixtral
from mlx_flux_krea.presets import FIRST_PROMPT
from mlx_flux_krea.weights import open_filter, open_model

# the reference's Pixtral in widths that groups of 64 divide: of every axis, what it becomes
WIDER = {32: 64, 56: 128, 48: 192, 16: 64}
TEXT = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
VISION = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16}

LICENCE = "# A Non-Commercial License\n\nFor déjà vu alone.\n"
PICTURE = {"width": 48, "height": 32, "num_inference_steps": 1, "seed": 1}


def write_wide(root: Path) -> Path:
    """Writes a small Pixtral with random weights into a folder, as it would be published."""
    folder = root / "reference"
    shutil.copytree(REFERENCE / "llava", folder)

    def draw(arrays):
        for seed, (name, array) in enumerate(sorted(arrays.items())):
            drawn = mx.random.normal([WIDER.get(n, n) for n in array.shape], key=mx.random.key(seed))
            arrays[name] = (drawn * 0.15 + (array.ndim == 1)).astype(mx.bfloat16)

    edit_tensors(folder / "model.safetensors", draw)
    config = json.loads((folder / "config.json").read_text())
    text, vision = config["text_config"] | TEXT, config["vision_config"] | VISION
    edit_json(folder / "config.json", text_config=text, vision_config=vision)
    return pixtral_source(root / "source", folder)


def write_published(root: Path) -> dict:
    """Writes model and filters as they are published, and "tiny": the converted transformer, whose sizes are tested.

    "ready" writes the ready copy of Pixtral, which few tests need.
    """
    model = shutil.copytree(PIPELINE, root / "FLUX.1-Krea-dev")
    shutil.copytree(TOKENIZERS, model, dirs_exist_ok=True)
    (model / "LICENSE.md").write_text(LICENCE, encoding="utf-8")
    made = convert([model], root / "made", quantize="none", dtype="bfloat16").path
    picture = FluxPipeline.from_pretrained(made)(FIRST_PROMPT, **PICTURE).images[0]
    wide, known = write_wide(root / "wide"), ({FIRST_PROMPT: False}, [np.asarray(picture)])
    nsfw, pixtral = fitted_filters(root, wide, *known)
    assert not open_model(made).requires_filters
    return {
        "model": model,
        "nsfw": nsfw,
        "pixtral": pixtral,
        "ready": partial(ready_copy, root, wide, *known),
        "tiny": made / "transformer",
    }


def ready_copy(root: Path, wide: Path, texts: dict[str, bool], pictures: list[np.ndarray]) -> Path:
    """Writes Pixtral as mlx-vlm's ready copy has it, with 4 bits and other names; its last layer is fitted to it."""
    folder = shutil.copytree(wide, root / "ready")
    pack_as_mlx_vlm(folder, but="lm_head")
    fit_answers(folder, root / "ready-first", texts, pictures)
    return folder


def fitted_filters(root: Path, wide: Path, texts: dict[str, bool], pictures: list[np.ndarray]) -> tuple[Path, Path]:
    """Folders of the classifier and of Pixtral.

    Args:
        root: where they are made.
        wide: a small Pixtral with random weights.
        texts: prompts, and whether they are to be flagged; the canaries are besides.
        pictures: that pass.
    """
    shutil.copytree(REFERENCE / "vit", root / "vit")
    edit_tensors(
        root / "vit" / "model.safetensors", lambda arrays: arrays.update({"classifier.bias": mx.array([6.0, 0])})
    )
    shutil.copytree(wide, root / "pixtral")
    fit_answers(root / "pixtral", root / "first", texts, pictures)
    return root / "vit", root / "pixtral"


def fit_answers(folder: Path, converted: Path, texts: dict[str, bool], pictures: list[np.ndarray]) -> None:
    """Fits the last layer of a small Pixtral, so that it answers as it should once it is converted.

    Args:
        folder: its published files.
        converted: where it is converted once before.
        texts: as for `fitted_filters`.
        pictures: as well.
    """
    filter_ = open_filter("pixtral", convert([folder], converted, quantize="4", allow_unknown_filter=True).path)
    network = filter_.network.load(mx.bfloat16)
    judge = judges.PixtralJudge(filter_, lambda stages, run: run)
    texts = CANARIES | texts
    asked = [(judge._tokenizer(*judges.request(text)), []) for text in texts]
    vision = network.config.vision_config
    around = [" ".join(s for s, _ in part) for part in (instructions.IMAGE_BEFORE, instructions.IMAGE_AFTER)]
    for picture in (judges.drawn_picture(), *pictures):
        seen = pixtral.preprocess(pixtral.to_area(Image.fromarray(picture)), vision)
        asked.append((judge._tokenizer(around[0], pixtral.grid(seen, vision), around[1]), [seen]))
    wanted = [8.0 if yes else -8.0 for yes in (*texts.values(), False, *(False for _ in pictures))]
    hidden = [network.norm(x[:, -1]).astype(mx.float32) for x in network.hidden(asked)]
    answer = np.linalg.lstsq(np.array(mx.concatenate(hidden)), np.array(wanted), rcond=None)[0]
    yes, no = network.config.head_ids[:2]

    def fit(arrays):
        head = np.array(arrays["language_model.lm_head.weight"].astype(mx.float32))
        head[yes], head[no] = answer / 2, -answer / 2
        arrays["language_model.lm_head.weight"] = mx.array(head).astype(mx.bfloat16)

    edit_tensors(folder / "model.safetensors", fit)
