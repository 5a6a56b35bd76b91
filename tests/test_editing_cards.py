"""The programs of the model cards of Kontext and Fill, with the lines that change; test_map_runs has those of maps."""

import shutil

import numpy as np
import pytest
from helpers import REFERENCE, edit_json
from PIL import Image

IMAGES = REFERENCE / "edit" / "images"
ADDRESS = "https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/diffusers/"
CARDS = {
    "FLUX.1-Kontext-dev": f"""import torch
from diffusers import FluxKontextPipeline
from diffusers.utils import load_image

pipe = FluxKontextPipeline.from_pretrained("black-forest-labs/FLUX.1-Kontext-dev", torch_dtype=torch.bfloat16)
pipe.to("cuda")

input_image = load_image("{ADDRESS}cat.png")

image = pipe(
  image=input_image,
  prompt="Add a hat to the cat",
  guidance_scale=2.5
).images[0]
""",
    "FLUX.1-Fill-dev": f"""import torch
from diffusers import FluxFillPipeline
from diffusers.utils import load_image

image = load_image("{ADDRESS}cup.png")
mask = load_image("{ADDRESS}cup_mask.png")

pipe = FluxFillPipeline.from_pretrained("black-forest-labs/FLUX.1-Fill-dev", torch_dtype=torch.bfloat16).to("cuda")
image = pipe(
    prompt="a white paper cup",
    image=image,
    mask_image=mask,
    height=1632,
    width=1232,
    guidance_scale=30,
    num_inference_steps=50,
    max_sequence_length=512,
    generator=torch.Generator("cpu").manual_seed(0)
).images[0]
image.save(f"flux-fill-dev.png")
""",
}
IMPORTS = {
    "from diffusers import": "from mlx_flux_krea import",
    "from diffusers.utils import": "from mlx_flux_krea import",
}
CHANGED = {  # without torch
    "import torch\n": "",
    "torch_dtype=torch.bfloat16": 'dtype="bfloat16"',
    'generator=torch.Generator("cpu").manual_seed(0)': "seed=0",
    ADDRESS: "",  # nothing is fetched: the images are files beside the program
}
SMALL = {
    "guidance_scale=2.5": "guidance_scale=2.5, height=64, width=96, _auto_resize=False",
    "=1632": "=96",
    "=1232": "=64",
    "steps=50": "steps=2",
}
TASKS = ("kontext", "fill")


@pytest.fixture
def installed(request, home):
    """The tiny models, installed as if they had been converted from the published repositories."""
    for task in TASKS:
        folder = home / "models" / task
        shutil.copytree(request.getfixturevalue(task), folder)
        defaults = {"width": 32, "height": 32, "num_inference_steps": 2, "guidance_scale": 2.5, "true_cfg_scale": 1.0}
        repository = f"black-forest-labs/FLUX.1-{task.capitalize()}-dev"
        edit_json(folder / "model_index.json", repository=repository, defaults=defaults, max_sequence_length=512)


@pytest.mark.slow
@pytest.mark.parametrize("name", CARDS)
def test_the_cards_programs_run_with_the_changed_lines(installed, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for saved, own in {"cat": "in_a", "cup": "in_a", "cup_mask": "in_mask"}.items():
        shutil.copy(IMAGES / f"{own}.png", f"{saved}.png")
    text = CARDS[name]
    for old, new in (IMPORTS | CHANGED | SMALL).items():
        text = text.replace(old, new)
    names: dict = {}
    exec(text, names)
    assert names["image"].mode == "RGB"
    if "Fill" in name:
        mask, image = (
            np.asarray(Image.open(IMAGES / f"in_{one}.png").resize((64, 96), Image.Resampling.LANCZOS))
            for one in ("mask", "a")
        )
        assert names["image"].size == (64, 96)
        assert np.array_equal(np.asarray(names["image"])[mask == 0], image[mask == 0])
