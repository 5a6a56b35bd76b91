"""Live beside diffusers and transformers, on fresh random weights of other shapes and seeds (the `parity` extra).

    pytest -m parity

Weights are drawn here, saved by diffusers, converted by us, and both pipelines make the same pictures from them.
"""

import contextlib
import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from helpers import TOKENIZERS, levels, psnr
from mlx_flux_krea.convert import convert
from PIL import Image

from mlx_flux_krea import FluxPipeline, noise

pytestmark = pytest.mark.parity

PROMPT = "A cat holding a sign that says hello world"
KEYS = ("heads", "head", "axes", "double", "single", "t5", "clip", "vae", "groups", "guidance")
SHAPES = [
    dict(zip(KEYS, values, strict=True))
    for values in (
        (3, 16, (4, 6, 6), 1, 4, 24, 20, (8, 16, 16, 24), 4, True),
        (2, 24, (4, 10, 10), 3, 1, 10, 12, (12, 12, 24, 24), 6, True),
        (4, 8, (2, 2, 4), 2, 2, 16, 16, (16, 16, 16, 16), 8, False),
    )
]


def random_weights(module, generator, scale=0.3):
    """Every parameter drawn, none at its zero or one initial value; norms stay near one."""
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                is_norm = "norm" in name and name.endswith("weight")
                parameter.copy_(drawn * 0.1 + (1 if is_norm else 0))
            elif "embed_tokens" in name or "shared" in name or "embedding" in name:
                parameter.copy_(drawn)
            else:
                parameter.copy_(drawn * scale * (9 if parameter.ndim == 4 else 1) / np.sqrt(parameter[0].numel() / 3))


@pytest.fixture(scope="module", params=range(len(SHAPES)), ids=lambda i: f"shape{i}")
def both(request, tmp_path_factory):
    """diffusers' pipelines (text to image, image to image) and ours, over the same weights."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxTransformer2DModel
    from diffusers import FluxPipeline as Theirs
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    shape = SHAPES[request.param]
    generator = torch.Generator().manual_seed(1000 + request.param)
    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=shape["double"], num_single_layers=shape["single"], attention_head_dim=shape["head"],
        num_attention_heads=shape["heads"], joint_attention_dim=shape["t5"], pooled_projection_dim=shape["clip"],
        guidance_embeds=shape["guidance"], axes_dims_rope=shape["axes"],
    )  # fmt: skip
    vae = AutoencoderKL(
        latent_channels=16, block_out_channels=shape["vae"], norm_num_groups=shape["groups"], layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=0.3611,
        shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    clip = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=shape["clip"], intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            vocab_size=49408, eos_token_id=2, hidden_act="quick_gelu",
        )
    )  # fmt: skip
    t5 = T5EncoderModel(
        T5Config(
            d_model=shape["t5"], d_kv=6, d_ff=40, num_layers=3, num_heads=5, vocab_size=32128,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip
    for module in (transformer, vae, clip, t5):
        random_weights(module.eval(), generator)
    shift = {"use_dynamic_shifting": True} if shape["guidance"] else {"shift": 1.0}
    scheduler = FlowMatchEulerDiscreteScheduler(base_shift=0.5, max_shift=1.15, **shift)
    folder = tmp_path_factory.mktemp("parity")
    for name, module in (("transformer", transformer), ("vae", vae), ("text_encoder", clip), ("text_encoder_2", t5)):
        module.save_pretrained(folder / "source" / name)
    scheduler.save_pretrained(folder / "source" / "scheduler")
    (folder / "source" / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    shutil.copytree(TOKENIZERS, folder / "source", dirs_exist_ok=True)
    parts = {
        "scheduler": scheduler, "vae": vae, "text_encoder": clip, "tokenizer": None, "text_encoder_2": t5,
        "tokenizer_2": None, "transformer": transformer,
    }  # fmt: skip
    theirs, theirs_from_image = Theirs(**parts), FluxImg2ImgPipeline(**parts)
    for pipeline in (theirs, theirs_from_image):
        pipeline.set_progress_bar_config(disable=True)
    ours = FluxPipeline.from_pretrained(convert([folder / "source"], folder / "ours", dtype="float32").path)
    return theirs, theirs_from_image, ours


def embeds(theirs, ours, prompt: str, prompt_2: str | None = None, length: int = 40) -> dict:
    """What transformers makes of a prompt; its ids are ours, which test_tokenizers holds to the published ones."""
    import torch

    from mlx_flux_krea.tokenizers import CLIPTokenizer, T5Tokenizer

    clip_ids = CLIPTokenizer(ours.folder.path / "tokenizer")(prompt).ids
    t5_ids = T5Tokenizer(ours.folder.path / "tokenizer_2")(prompt if prompt_2 is None else prompt_2, length).ids
    with torch.no_grad():
        pooled = theirs.text_encoder(torch.tensor([clip_ids])).pooler_output
        states = theirs.text_encoder_2(torch.tensor([t5_ids]))[0]
    return {"prompt_embeds": states, "pooled_prompt_embeds": pooled}


def run_theirs(pipeline, seeds, call, **options):
    """Latents after every step, and the pictures."""
    import torch

    seen = []

    def callback(pipe, step, timestep, kwargs):
        seen.append(kwargs["latents"].float().numpy().copy())
        return {}

    single = isinstance(seeds, int)
    generators = [torch.Generator().manual_seed(s) for s in ([seeds] if single else seeds)]
    with torch.no_grad(), contextlib.redirect_stderr(None):
        images = pipeline(
            **call, **options, generator=generators[0] if single else generators, callback_on_step_end=callback
        ).images
    return np.stack(seen), images


def run_ours(pipe, seeds, **call):
    seen = []

    def callback(pipe, step, timestep, kwargs):
        seen.append(np.array(kwargs["latents"]))

    return pipe(seed=seeds, callback_on_step_end=callback, **call), np.stack(seen)


def assert_same(ours, theirs, our_images, their_images):
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error <= 1e-4, f"step {step}: {error:.2e}"
    assert theirs[-1].std() > 0.1
    for a, b in zip(our_images, their_images, strict=True):
        assert np.asarray(b).std() > 5  # a picture that varies
        assert psnr(a, b) >= 60
        assert levels(a, b) <= 1


def guided(pipe) -> dict:
    return {"guidance_scale": 3.7} if pipe.folder.sizes["transformer"].guidance_embed else {}


def test_encoders_give_what_transformers_gives(both):
    theirs, _, ours = both
    for prompt, prompt_2 in ((PROMPT, None), ("", "cat " * 60)):
        reference = embeds(theirs, ours, prompt, prompt_2)
        states, pooled = ours.encode_prompt(prompt, prompt_2, max_sequence_length=40)
        for a, b, bar in (
            (states, reference["prompt_embeds"], 3e-5),
            (pooled, reference["pooled_prompt_embeds"], 2e-5),
        ):
            b = b.numpy()
            assert np.linalg.norm(np.array(a) - b) / np.linalg.norm(b) < bar


@pytest.mark.parametrize(("width", "height", "steps"), [(64, 64, 4), (112, 48, 3), (48, 144, 2)])
def test_text_to_image_with_a_prompt_of_its_own_for_t5(both, width, height, steps):
    theirs, _, ours = both
    size = {"width": width, "height": height, "num_inference_steps": steps, **guided(ours)}
    call = embeds(theirs, ours, PROMPT, "blurry, low quality")
    a = run_ours(ours, 11, prompt=PROMPT, prompt_2="blurry, low quality", max_sequence_length=40, **size)
    b = run_theirs(theirs, 11, call, **size)
    assert_same(a[1], b[0], a[0].images, b[1])


@pytest.mark.parametrize("seeds", [5, [8, 3, 8, 1]], ids=["one seed", "list of seeds"])
def test_several_images_of_several_prompts(both, seeds):
    import torch

    theirs, _, ours = both
    size = {"width": 64, "height": 32, "num_inference_steps": 3, **guided(ours)}
    each = [embeds(theirs, ours, prompt) for prompt in (PROMPT, "")]
    # two of each, prompt by prompt: diffusers repeats texts so, but of embeds only T5's half
    call = {name: torch.cat([e[name] for e in each]).repeat_interleave(2, dim=0) for name in each[0]}
    b = run_theirs(theirs, seeds, call, **size)
    a = run_ours(ours, seeds, prompt=[PROMPT, ""], num_images_per_prompt=2, max_sequence_length=40, **size)
    assert_same(a[1], b[0], a[0].images, b[1])


def test_true_cfg(both):
    theirs, _, ours = both
    size = {"width": 48, "height": 64, "num_inference_steps": 3, "true_cfg_scale": 2.5, **guided(ours)}
    call = embeds(theirs, ours, PROMPT)
    call |= {f"negative_{name}": value for name, value in embeds(theirs, ours, "blurry").items()}
    b = run_theirs(theirs, 2, call, **size)
    a = run_ours(ours, 2, prompt=PROMPT, negative_prompt="blurry", max_sequence_length=40, **size)
    assert_same(a[1], b[0], a[0].images, b[1])


def test_sigmas_of_ones_own(both):
    theirs, _, ours = both
    own = [0.9, 0.6, 0.2]
    size = {"width": 48, "height": 48, "sigmas": own, **guided(ours)}
    b = run_theirs(theirs, 4, embeds(theirs, ours, PROMPT), num_inference_steps=3, **size)
    a = run_ours(ours, 4, prompt=PROMPT, max_sequence_length=40, **size)
    assert_same(a[1], b[0], a[0].images, b[1])


@pytest.mark.parametrize(("strength", "steps"), [(0.6, 7), (0.95, 4), (1.0, 3)])
def test_image_to_image(both, strength, steps):
    _, theirs, ours = both
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)).resize((90, 61))
    size = {"width": 64, "height": 48, "num_inference_steps": steps, "strength": strength}
    size |= guided(ours) or {}
    call = embeds(theirs, ours, PROMPT) | {"image": picture}
    b = run_theirs(theirs, 6, call, **size)
    a = run_ours(ours, 6, prompt=PROMPT, image=picture, max_sequence_length=40, **size)
    assert_same(a[1], b[0], a[0].images, b[1])


def test_noise_of_sizes_of_ones_own():
    import torch

    for seed, shape in ((3, (1, 16, 6, 10)), (2**40 + 9, (3, 16, 14, 34))):
        for ours, theirs in ((mx.float32, torch.float32), (mx.bfloat16, torch.bfloat16), (mx.float16, torch.float16)):
            b = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=theirs).float().numpy()
            a = np.array(noise.draw("diffusers", seed, shape, ours).astype(mx.float32))
            if ours == mx.float32:
                assert np.abs(a - b).max() <= 5e-6
            else:
                assert (a == b).mean() >= 0.995
                assert np.abs(a - b).max() <= 0.016
