"""Both filters as they are published, small, and with answers that a trained model would give.

Random weights know nothing about rights. So the last layer is fitted, by least squares over the hidden states of a
handful of inputs, to answer those rightly; all before it, and the whole way to it, is the real one.
"""

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
from helpers import REFERENCE, edit_tensors
from mlx_flux_krea.convert import convert
from PIL import Image

from mlx_flux_krea.filters import instructions, judges
from mlx_flux_krea.filters.instructions import CANARIES
from mlx_flux_krea.models import pixtral
from mlx_flux_krea.weights import open_filter


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
    converted = open_filter("pixtral", convert([root / "pixtral"], root / "first", quantize="4").path)
    network = converted.network.load(mx.bfloat16)
    judge = judges.PixtralJudge(converted, lambda pieces, run: run)
    texts = CANARIES | texts
    asked = [(judge._tokenizer(*judges.request(text)), []) for text in texts]
    vision = network.config.vision_config
    around = [" ".join(s for s, _ in part) for part in (instructions.IMAGE_BEFORE, instructions.IMAGE_AFTER)]
    for picture in (judges.drawn_picture(), *pictures):
        seen = pixtral.preprocess(pixtral.to_area(Image.fromarray(picture)), vision)
        asked.append((judge._tokenizer(around[0], pixtral.grid(seen, vision), around[1]), [seen]))
    wanted = [8.0 if yes else -8.0 for yes in (*texts.values(), False, *(False for _ in pictures))]
    hidden = [network.norm(network.hidden(ids, images)[:, -1]).astype(mx.float32) for ids, images in asked]
    answer = np.linalg.lstsq(np.array(mx.concatenate(hidden)), np.array(wanted), rcond=None)[0]
    yes, no = network.config.head_ids[:2]

    def fit(arrays):
        head = np.array(arrays["language_model.lm_head.weight"].astype(mx.float32))
        head[yes], head[no] = answer / 2, -answer / 2
        arrays["language_model.lm_head.weight"] = mx.array(head).astype(mx.bfloat16)

    edit_tensors(root / "pixtral" / "model.safetensors", fit)
    return root / "vit", root / "pixtral"
