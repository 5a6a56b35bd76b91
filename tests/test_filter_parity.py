"""The filters' networks live beside transformers, on fresh random weights of other shapes and seeds (extra `parity`).

    pytest -m parity

Weights are drawn here, saved by transformers, converted by us, and both judge the same texts and pictures.
"""

import json
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from helpers import assert_close, nhwc, pixtral_source
from mlx_flux_krea.convert import convert as run_converter
from PIL import Image
from tekken import make_tekken
from test_parity import random_weights

from mlx_flux_krea.models import pixtral, vit
from mlx_flux_krea.models.filter_config import PIXTRAL_12B
from mlx_flux_krea.tokenizers import PixtralTokenizer
from mlx_flux_krea.weights import open_filter

pytestmark = pytest.mark.parity

BAR = 3e-5
SIZES = ((97, 64), (64, 97), (500, 31), (33, 700), (224, 224), (1360, 768))

convert = partial(run_converter, allow_unknown_filter=True)  # these are small


def picture(seed: int, size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size).convert(mode)


def nchw(x: mx.array):
    import torch

    return torch.tensor(np.array(x.transpose(0, 3, 1, 2)))


# hidden, MLP, layers, heads, pixels, patch
@pytest.mark.parametrize("shape", [(48, 96, 3, 4, 64, 16), (40, 56, 1, 5, 60, 12)])
def test_the_classifier(shape, tmp_path):
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    config = ViTConfig(**dict(zip(names, shape, strict=True)), id2label={0: "normal", 1: "nsfw"}, layer_norm_eps=1e-12)
    theirs = ViTForImageClassification(config).eval()
    random_weights(theirs, torch.Generator().manual_seed(shape[0]))
    theirs.save_pretrained(tmp_path / "source")
    ours = open_filter("nsfw", convert([tmp_path / "source"], tmp_path / "ours").path).network.load(mx.float32)
    processor = ViTImageProcessorPil(size={"height": shape[4], "width": shape[4]})
    for seed, size in enumerate(SIZES):
        for mode in ("RGB", "L", "RGBA"):
            image = picture(seed, size, mode)
            pixels = vit.preprocess(image, shape[4])
            prepared = processor(image.convert("RGB"), return_tensors="np")["pixel_values"]
            assert np.array_equal(np.array(pixels), prepared.transpose(0, 2, 3, 1))  # to the bit
            with torch.no_grad():
                assert_close(ours(pixels), mx.array(theirs(nchw(pixels)).logits.numpy()), BAR)


TEXTS = (
    {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "rope_theta": 1e9, "layers": 3, "width": 36},
    {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "rope_theta": 1e4, "layers": 1, "width": 24},
)
VISIONS = (
    {"hidden": 48, "heads": 4, "patch": 16, "pixels": 160},
    {"hidden": 40, "heads": 2, "patch": 10, "pixels": 90},
)


@pytest.fixture(scope="module", params=range(2), ids=lambda i: f"shape{i}")
def both(request, tmp_path_factory):
    """transformers' Pixtral and ours, over the same weights."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration, MistralConfig, PixtralVisionConfig

    torch.set_num_threads(1)
    text, vision = TEXTS[request.param], VISIONS[request.param]
    rope = {"rope_type": "default", "rope_theta": text["rope_theta"]}
    config = LlavaConfig(
        text_config=MistralConfig(
            vocab_size=150, hidden_size=text["width"], intermediate_size=52, num_hidden_layers=text["layers"],
            num_attention_heads=text["num_attention_heads"], num_key_value_heads=text["num_key_value_heads"],
            head_dim=text["head_dim"], rms_norm_eps=1e-5, rope_parameters=rope, sliding_window=None,
            tie_word_embeddings=False,
        ),
        vision_config=PixtralVisionConfig(
            hidden_size=vision["hidden"], intermediate_size=44, num_hidden_layers=2, hidden_act="silu",
            num_attention_heads=vision["heads"], image_size=vision["pixels"], patch_size=vision["patch"],
        ),
        image_token_index=10, vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=False,
    )  # fmt: skip
    theirs = LlavaForConditionalGeneration(config).eval()
    random_weights(theirs, torch.Generator().manual_seed(request.param))
    folder = tmp_path_factory.mktemp("parity")
    theirs.save_pretrained(folder / "published", max_shard_size="60KB")
    path = convert(
        [pixtral_source(folder / "source", folder / "published")],
        folder / "ours",
        dtype="float32",
        allow_unknown_filter=True,
    ).path
    return theirs, open_filter("pixtral", path).network.load(mx.float32), path


def judged(both, ids, images):
    """Logits at every position, ours and theirs in our order; their pictures are padded to one size."""
    import torch

    theirs, ours, _ = both
    given = {"input_ids": torch.tensor([ids])}
    if images:
        height, width = (max(pixels.shape[axis] for pixels in images) for axis in (1, 2))
        padded = [mx.pad(p, ((0, 0), (0, height - p.shape[1]), (0, width - p.shape[2]), (0, 0))) for p in images]
        given["pixel_values"] = torch.cat([nchw(p) for p in padded])
        given["image_sizes"] = torch.tensor([p.shape[1:3] for p in images])
    with torch.no_grad():
        logits = theirs(**given).logits.numpy()
    return ours.head(ours.hidden([(ids, images)])[0]), mx.array(logits)[..., mx.array(ours.config.head_ids)]


def test_texts(both):
    tokenizer = PixtralTokenizer(both[2] / "tokenizer", both[1].config.head_ids[:2])
    for text in ("", "a frog", "A frog [/INST] holding a sign, " * 20):
        assert_close(*judged(both, tokenizer(text), []), BAR, text)


@pytest.mark.parametrize("sizes", [SIZES[:1], SIZES[2:3], SIZES[3:4], SIZES[5:6], SIZES[:4]], ids=str)
def test_pictures(both, sizes):
    vision = both[1].config.vision_config
    tokenizer = PixtralTokenizer(both[2] / "tokenizer", both[1].config.head_ids[:2])
    images = [pixtral.preprocess(picture(i, size), vision) for i, size in enumerate(sizes)]
    parts = [part for pixels in images for part in ("look: ", pixtral.grid(pixels, vision))]
    ids = tokenizer(*parts, "yes or no?")
    assert_close(*judged(both, ids, images), BAR)
    assert_close(both[1].logits([(ids, images)])[0], judged(both, ids, images)[1][:, -1], BAR)


@pytest.mark.parametrize("size", [*SIZES, (1, 1), (1025, 1024), (4000, 90)])
@pytest.mark.parametrize("to_area", [False, True])
def test_preparing_a_picture(size, to_area):
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    image = picture(sum(size), size)
    image = pixtral.to_area(image) if to_area else image
    prepared = PixtralImageProcessorPil()(image, return_tensors="np")["pixel_values"]
    assert np.array_equal(np.array(pixtral.preprocess(image)), np.array(nhwc(mx.array(prepared))))


def test_weights_under_the_names_that_transformers_5_holds_in_memory(both, tmp_path):
    theirs, ours, path = both
    folder = tmp_path / "memory"
    folder.mkdir()
    arrays = {name: mx.array(tensor.numpy()) for name, tensor in theirs.state_dict().items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    for file in (path.parent / "source").glob("*.json"):
        if "index" not in file.name:
            (folder / file.name).write_text(file.read_text())
    again = open_filter("pixtral", convert([folder], tmp_path / "out", dtype="float32").path)
    assert again.index.source[0].layout == "Pixtral, transformers 5"
    words = [([1, 3, 20, 4], ())]
    assert mx.array_equal(again.network.load(mx.float32).logits(words)[0], ours.logits(words)[0])


def test_the_published_vocabulary_under_transformers(tmp_path):
    """Their class on the same file, with our control tokens around it."""
    from transformers import PreTrainedTokenizerFast

    make_tekken(tmp_path / "tokenizer.json", 131_072)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ours = PixtralTokenizer(tmp_path, PIXTRAL_12B.head_ids)
    for text in ("yes", "A frog holding a sign.", "  two spaces\n\n世界 🐸"):
        assert ours(text) == theirs.encode(f"<s>[INST]{text}[/INST]", add_special_tokens=False)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["post_processor"] is None
