"""SigLIP, Redux and the prior live beside transformers and diffusers, on random weights (the `parity` extra)."""

import json

import mlx.core as mx
import numpy as np
import pytest
from helpers import assert_close, nhwc
from mlx_flux_krea.convert import convert
from PIL import Image

from mlx_flux_krea import FluxPriorReduxPipeline
from mlx_flux_krea.inputs import style as styles
from mlx_flux_krea.models import siglip
from mlx_flux_krea.weights import open_component, open_folder

pytestmark = pytest.mark.parity

BAR = 3e-5
SHAPES = [  # width, MLP, layers, heads, pixels, patch; the last has so400m's grid of 27 and its strip that is not read
    (32, 64, 3, 4, 56, 14),
    (48, 100, 2, 3, 30, 7),
    (36, 44, 2, 2, 384, 14),
]
PICTURES = ((75, 53), (384, 384), (1, 1), (30, 1000), (1360, 768))


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def random_encoder(shape, seed: int = 1):
    """SigLIP's encoder of pictures of transformers, with random weights that keep the numbers alive."""
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.set_num_threads(1)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    model = SiglipVisionModel(SiglipVisionConfig(**dict(zip(names, shape, strict=True)))).eval()
    _draw(model, torch.Generator().manual_seed(seed))
    return model


def _draw(module, generator) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name and name.endswith("weight")
            scale = 1 / np.sqrt(parameter[0].numel()) if parameter.ndim > 1 and "position" not in name else 0.2
            parameter.copy_(drawn * scale + (1 if is_norm else 0))


@pytest.fixture(scope="module", params=range(len(SHAPES)), ids=lambda i: f"shape{i}")
def both(request, tmp_path_factory):
    """diffusers' prior and our folder of the same weights, as this version of transformers saves them."""
    import torch
    from diffusers import FluxPriorReduxPipeline as Theirs
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
    from transformers import SiglipImageProcessor

    shape = SHAPES[request.param]
    encoder, size = random_encoder(shape), {"height": shape[4], "width": shape[4]}
    width = 4096 if shape[4] < 100 else 64  # as the prior's zeros are wide; a large grid needs no such width
    embedder = ReduxImageEncoder(redux_dim=shape[0], txt_in_features=width).eval()
    _draw(embedder, torch.Generator().manual_seed(7))
    processor = SiglipImageProcessor(size=size, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    theirs = Theirs(image_encoder=encoder, feature_extractor=processor, image_embedder=embedder)
    folder = tmp_path_factory.mktemp("style") / "redux"
    theirs.save_pretrained(folder)
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "FluxPriorReduxPipeline"
    return theirs, convert([folder], folder.parent / "made", dtype="float32").path


@pytest.mark.parametrize("size", PICTURES)
def test_pixels(size):
    from transformers import SiglipImageProcessor

    one = picture(3, size)
    for side in (384, 42, 30):
        processor = SiglipImageProcessor(size={"height": side, "width": side}, resample=3)
        theirs = processor.preprocess(one, return_tensors="np")["pixel_values"]
        ours = np.array(siglip.preprocess(one, side))
        assert np.abs(ours - theirs.transpose(0, 2, 3, 1)).max() <= 0.008, side


def test_vectors_and_tokens(both):
    import torch

    theirs, path = both
    folder = open_folder(path)
    encoder, embedder = (folder.networks[name].load(mx.float32) for name in ("image_encoder", "image_embedder"))
    side = encoder.config.image_size
    pixels = torch.rand((2, 3, side, side), generator=torch.Generator().manual_seed(5)) * 2 - 1
    with torch.no_grad():
        vectors = theirs.image_encoder(pixels).last_hidden_state
        tokens = theirs.image_embedder(vectors).image_embeds
    ours = encoder(nhwc(mx.array(pixels.numpy())))
    assert_close(ours, mx.array(vectors.numpy()), BAR)
    assert_close(embedder(ours), mx.array(tokens.numpy()), BAR)


@pytest.mark.parametrize("both", [0, 1], indirect=True)
@pytest.mark.parametrize("scales", [(1.0, 1.0), ([0.3, 0.9], [1.0, 0.2])])
def test_the_prior_of_two_images(both, home, scales):
    theirs, path = both
    (home / "components").mkdir(parents=True)
    (home / "components" / "redux").symlink_to(path)
    ours = FluxPriorReduxPipeline.from_pretrained(dtype="float32")
    images = [picture(1, (75, 53)), picture(2, (40, 90))]
    names = ("prompt_embeds_scale", "pooled_prompt_embeds_scale")
    arguments = dict(zip(names, scales, strict=True))
    expected, made = theirs(images, **arguments), ours(images, **arguments)
    assert open_component("redux").path == ours.folder.path
    embeds = mx.array(made.prompt_embeds)
    assert_close(embeds[:, 512:], mx.array(expected.prompt_embeds[:, 512:].numpy()), 1e-4)
    assert embeds.shape == tuple(expected.prompt_embeds.shape)
    assert not mx.any(embeds[:, :512]).item()
    assert made.pooled_prompt_embeds.shape == tuple(expected.pooled_prompt_embeds.shape)


@pytest.mark.parametrize("side", [27, 26, 20, 14, 9, 7, 3])
def test_a_shrunk_grid_is_that_of_torch(side):
    import torch

    tokens = np.random.default_rng(side).normal(size=(1, 27 * 27, 5)).astype(np.float32)
    grid = torch.from_numpy(tokens).reshape(1, 27, 27, 5).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(grid, size=side, mode="area").permute(0, 2, 3, 1).reshape(1, side**2, 5)
    assert_close(styles.shrink(mx.array(tokens), side), mx.array(theirs.contiguous().numpy()), 1e-5)
