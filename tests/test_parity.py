"""Live beside diffusers and transformers, on fresh random weights of other shapes and seeds (the `parity` extra).

    pytest -m parity

Weights are drawn here, saved by diffusers, converted by us, and both pipelines make the same pictures of the same
texts: each with its own tokenizers, encoders, transformer, sampler, autoencoder and noise.
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

from mlx_flux_krea import FluxPipeline
from mlx_flux_krea.sampling import noise

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


def clip_tokenizer():
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(TOKENIZERS / "tokenizer", model_max_length=77)


def t5_tokenizer():
    """The tests' small T5 vocabulary in transformers' class; what T5's own class adds is the end token."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_file(str(TOKENIZERS / "tokenizer_2" / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


@pytest.fixture(scope="module", params=range(len(SHAPES)), ids=lambda i: f"shape{i}")
def both(request, tmp_path_factory):
    """diffusers' pipelines (text to image, image to image) and ours, over the same weights."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxTransformer2DModel
    from diffusers import FluxPipeline as Theirs
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.set_num_threads(1)  # tensors are tiny, and threads only wait for each other
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
        "scheduler": scheduler, "vae": vae, "text_encoder": clip, "tokenizer": clip_tokenizer(), "text_encoder_2": t5,
        "tokenizer_2": t5_tokenizer(), "transformer": transformer,
    }  # fmt: skip
    theirs, theirs_from_image = Theirs(**parts), FluxImg2ImgPipeline(**parts)
    for pipeline in (theirs, theirs_from_image):
        pipeline.set_progress_bar_config(disable=True)
    ours = FluxPipeline.from_pretrained(convert([folder / "source"], folder / "ours", dtype="float32").path)
    return theirs, theirs_from_image, ours


def latents_and_images(pipe, seeds, call) -> tuple[np.ndarray, list]:
    """Latents after every step, and the pictures, of either pipeline."""
    seen = []

    def callback(pipe, step, timestep, kwargs):
        seen.append(np.asarray(kwargs["latents"]))
        return {}

    if isinstance(pipe, FluxPipeline):
        return pipe(seed=seeds, callback_on_step_end=callback, **call), seen
    import torch

    generators = [torch.Generator().manual_seed(seed) for seed in np.atleast_1d(seeds).tolist()]
    generator = generators[0] if isinstance(seeds, int) else generators
    with torch.no_grad(), contextlib.redirect_stderr(None):
        return pipe(generator=generator, callback_on_step_end=callback, **call), seen


def assert_same(ours, theirs, seeds, **call):
    """One call of both pipelines: every step's latents and every picture."""
    call = {"prompt": PROMPT, "max_sequence_length": 40, **call}
    if ours.folder.flux.sizes.guidance_embed:
        call |= {"guidance_scale": 3.7}
    (our_result, our_latents), (their_result, their_latents) = (
        latents_and_images(p, seeds, call) for p in (ours, theirs)
    )
    for step, (a, b) in enumerate(zip(our_latents, their_latents, strict=True)):
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            error = np.linalg.norm(one - other) / np.linalg.norm(other)
            assert error <= 1e-4, f"step {step} of picture {i}: {error:.2e}"
    assert their_latents[-1].std() > 0.1
    for a, b in zip(our_result.images, their_result.images, strict=True):
        assert np.asarray(b).std() > 5  # a picture that varies
        assert psnr(a, b) >= 60
        assert levels(a, b) <= 1


@pytest.mark.parametrize(("prompt", "prompt_2"), [(PROMPT, None), ("", "cat " * 60), ("sign " * 90, "hello, world!")])
def test_encoders_give_what_transformers_gives(both, prompt, prompt_2):
    import torch

    theirs, _, ours = both
    with torch.no_grad(), contextlib.redirect_stderr(None):
        states, pooled, _ = theirs.encode_prompt(prompt, prompt_2, max_sequence_length=40)
    pairs = zip(
        ours.encode_prompt(prompt, prompt_2, max_sequence_length=40), (states, pooled), (3e-5, 2e-5), strict=True
    )
    for a, b, bar in pairs:
        assert np.linalg.norm(np.array(a) - b.numpy()) / np.linalg.norm(b.numpy()) < bar


@pytest.mark.parametrize(
    ("width", "height", "steps", "seed"), [(64, 64, 4, 11), (112, 48, 3, 2**32 + 5), (48, 144, 2, 0)]
)
def test_text_to_image(both, width, height, steps, seed):
    theirs, _, ours = both
    assert_same(ours, theirs, seed, width=width, height=height, num_inference_steps=steps)


def test_a_prompt_of_its_own_for_t5(both):
    theirs, _, ours = both
    assert_same(ours, theirs, 3, prompt_2="blurry, low quality", width=80, height=48, num_inference_steps=3)


@pytest.mark.parametrize("seeds", [5, [8, 3, 8, 1]], ids=["one seed", "list of seeds"])
def test_several_images_of_several_prompts(both, seeds):
    theirs, _, ours = both
    texts = {"prompt": [PROMPT, ""], "prompt_2": ["a red circle", "water"]}
    assert_same(ours, theirs, seeds, **texts, num_images_per_prompt=2, width=64, height=32, num_inference_steps=3)


def test_true_cfg(both):
    theirs, _, ours = both
    texts = {"negative_prompt": "blurry", "negative_prompt_2": "low quality", "true_cfg_scale": 2.5}
    assert_same(ours, theirs, 2, **texts, width=48, height=64, num_inference_steps=3)


def test_true_cfg_of_several_images_of_several_prompts(both):
    theirs, _, ours = both
    texts = {"prompt": [PROMPT, "cat"], "negative_prompt": ["", "blurry"], "true_cfg_scale": 1.7}
    size = {"width": 32, "height": 48, "num_inference_steps": 2}
    assert_same(ours, theirs, [1, 2, 3, 4], **texts, num_images_per_prompt=2, **size)


def test_sigmas_of_ones_own(both):
    theirs, _, ours = both
    assert_same(ours, theirs, 4, sigmas=[0.9, 0.6, 0.2], num_inference_steps=3, width=48, height=80)


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height))


@pytest.mark.parametrize(("strength", "steps"), [(0.6, 7), (0.95, 4), (1.0, 3)])
def test_image_to_image(both, strength, steps):
    _, theirs, ours = both
    size = {"width": 64, "height": 48, "num_inference_steps": steps, "strength": strength}
    assert_same(ours, theirs, 6, image=picture(90, 61), prompt_2="a blue square", **size)


def test_image_to_image_with_true_cfg(both):
    _, theirs, ours = both
    texts = {"negative_prompt": "blurry", "true_cfg_scale": 2.0}
    size = {"width": 48, "height": 96, "num_inference_steps": 4, "strength": 0.7}
    assert_same(ours, theirs, 9, image=picture(30, 70), **texts, **size)


@pytest.mark.parametrize("seeds", [5, [8, 3, 1]], ids=["one seed", "list of seeds"])
def test_several_images_of_an_image(both, seeds):
    _, theirs, ours = both
    size = {"width": 64, "height": 32, "num_inference_steps": 4, "strength": 0.7}
    assert_same(ours, theirs, seeds, image=picture(64, 32), num_images_per_prompt=3, **size)


SIZES = (1, 2, 15, 16, 17, 31, 33, 47, 100, 1000)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_noise_of_any_size_is_torchs(dtype):
    import torch

    streams = noise.TorchStream(7), torch.Generator().manual_seed(7)
    for shape in (*((size,) for size in SIZES), (1, 16, 6, 10), (3, 16, 14, 34), (7, 5, 3)):
        a = np.array(streams[0].normal(shape, getattr(mx, dtype), "rounded").astype(mx.float32))
        b = torch.randn(shape, generator=streams[1], dtype=getattr(torch, dtype)).float().numpy()
        if dtype == "float32":
            assert np.abs(a - b).max() <= 5e-6
        else:
            assert (a == b).mean() >= 0.995
            assert np.abs(a - b).max() <= 0.016


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_noise_of_older_torch_is_its_algorithm_in_torchs_own_16_bit_arithmetic(dtype, bits):
    """`normal_fill` as torch 2.7 and before ran it, from today's tensors: a uniform is the low bits of a word."""
    import torch

    kind, generator, stream = (
        getattr(torch, dtype),
        torch.Generator().manual_seed(2**31 + 3),
        noise.TorchStream(2**31 + 3),
    )

    def uniforms(size):
        return torch.randint(0, 2**bits, (size,), generator=generator).to(kind) / 2**bits

    def box_muller(block):
        radius, theta = torch.sqrt(-2 * torch.log(1 - block[:8])), 2 * np.pi * block[8:]
        return torch.cat([radius * torch.cos(theta), radius * torch.sin(theta)])

    for size in [size for size in SIZES if size >= 16]:
        b = uniforms(size)
        for start in range(0, size - 15, 16):
            b[start : start + 16] = box_muller(b[start : start + 16])
        if size % 16:
            b[-16:] = box_muller(uniforms(16))
        a = np.array(stream.normal((size,), getattr(mx, dtype), "stepwise").astype(mx.float32))
        assert (a == b.float().numpy()).mean() >= 0.99
        assert np.abs(a - b.float().numpy()).max() <= 0.032
