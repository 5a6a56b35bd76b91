"""Scripts for diffusers, run here: the model cards' own, and everything else that their authors call."""

import io
import logging
import shutil
import sys
import types
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers import PIPELINE, TOKENIZERS, edit_json, levels, without_guidance
from mlx_flux_krea.convert import convert
from PIL import Image
from test_parity import clip_tokenizer, t5_tokenizer

import mlx_flux_krea
from mlx_flux_krea import FluxPipeline, Request, compat
from mlx_flux_krea.errors import ModelError, UsageError
from mlx_flux_krea.home import NANO

SMALL = {"width": 32, "height": 32, "num_inference_steps": 1}

# The cards of FLUX.1 Krea [dev], FLUX.1 [dev] and FLUX.1 [schnell] at the hub, without their comments.
OPENING = """import torch
from diffusers import FluxPipeline

pipe = FluxPipeline.from_pretrained("black-forest-labs/{}", torch_dtype=torch.bfloat16)
pipe.enable_model_cpu_offload()
"""
CARDS = {
    "FLUX.1-Krea-dev": """
prompt = "A frog holding a sign that says hello world"
image = pipe(
    prompt,
    height=1024,
    width=1024,
    guidance_scale=4.5,
).images[0]
image.save("flux-krea-dev.png")
""",
    "FLUX.1-dev": """
prompt = "A cat holding a sign that says hello world"
image = pipe(
    prompt,
    height=1024,
    width=1024,
    guidance_scale=3.5,
    num_inference_steps=50,
    max_sequence_length=512,
    generator=torch.Generator("cpu").manual_seed(0)
).images[0]
image.save("flux-dev.png")
""",
    "FLUX.1-schnell": """
prompt = "A cat holding a sign that says hello world"
image = pipe(
    prompt,
    guidance_scale=0.0,
    num_inference_steps=4,
    max_sequence_length=256,
    generator=torch.Generator("cpu").manual_seed(0)
).images[0]
image.save("flux-schnell.png")
""",
}
SAVED = {"FLUX.1-Krea-dev": "flux-krea-dev.png", "FLUX.1-dev": "flux-dev.png", "FLUX.1-schnell": "flux-schnell.png"}

IMPORT = ("from diffusers import FluxPipeline", "from mlx_flux_krea import FluxPipeline")
WITHOUT_TORCH = (
    ("import torch\n", ""),
    ("torch_dtype=torch.bfloat16", 'dtype="bfloat16"'),
    ('generator=torch.Generator("cpu").manual_seed(0)', "seed=0"),
)


def card(name: str, *changed: tuple[str, str]) -> str:
    """A card's program with these changes, each of which must be one; and pictures that a test can wait for."""
    text = OPENING.format(name) + CARDS[name]
    for old, new in changed:
        assert old in text or "Generator" in old
        text = text.replace(old, new)
    return text.replace("=1024", "=32").replace("steps=50", "steps=4")


@pytest.fixture
def published(home, full_model, tmp_path):
    """The tiny pipelines, installed as if they had been converted from the published repositories."""
    source = without_guidance(tmp_path / "schnell")
    small = convert([source], tmp_path / "converted", tokenizers=TOKENIZERS, dtype="float32").path
    for name in CARDS:
        folder = home / "models" / name.lower()
        shutil.copytree(small if "schnell" in name else full_model, folder)
        defaults = {"width": 32, "height": 32, "num_inference_steps": 2, "guidance_scale": 4.5, "true_cfg_scale": 1.0}
        edit_json(folder / "model_index.json", repository=f"black-forest-labs/{name}", defaults=defaults)
    return home / "models"


@pytest.fixture
def fresh(monkeypatch):
    """No line was logged yet."""
    monkeypatch.setattr(compat, "_told", set())


class Generator:
    """Torch's, as far as a script sees it."""

    def __init__(self, device="cpu"):
        self.seed = 67280421310721

    def manual_seed(self, seed):
        self.seed = seed
        return self

    def initial_seed(self):
        return self.seed


def torch_alike() -> types.ModuleType:
    """A module with the names of torch that a card uses."""

    class dtype:
        def __repr__(self):
            return "torch.bfloat16"

    torch = types.ModuleType("torch")
    torch.bfloat16, torch.Generator = dtype(), Generator  # type: ignore[attr-defined]
    return torch


@pytest.mark.core("FLUX.1-Krea-dev")
@pytest.mark.parametrize("name", CARDS)
def test_the_cards_programs_run_with_the_changed_lines(published, tmp_path, monkeypatch, name):
    """Without torch three lines change, with torch the import alone; the pictures are the same."""
    monkeypatch.chdir(tmp_path)
    exec(card(name, IMPORT, *WITHOUT_TORCH), {})
    picture = Image.open(SAVED[name]).copy()
    assert picture.size == (32, 32)
    if name == "FLUX.1-Krea-dev":  # no seed: each call chooses one
        return
    monkeypatch.setitem(sys.modules, "torch", torch_alike())
    exec(card(name, IMPORT), {})
    assert np.array_equal(picture, Image.open(SAVED[name]))


@pytest.mark.parametrize("name", CARDS)
@pytest.mark.parity
def test_with_torch_the_import_line_alone_changes_and_the_picture_is_diffusers(published, tmp_path, monkeypatch, name):
    import torch

    if torch.__version__ < "2.13":
        pytest.skip("draws other numbers than the recipe's torch 2.13")
    monkeypatch.chdir(tmp_path)
    in_float32 = ("bfloat16", "float32")
    seeded = ("    guidance_scale=4.5,", '    guidance_scale=4.5, generator=torch.Generator("cpu").manual_seed(3),')
    small = ("    guidance_scale=0.0,", "    guidance_scale=0.0, width=32, height=32,")  # the tiny model's default
    steps = ("=50,", "=4,")
    changed = (
        [in_float32, seeded] if "Krea" in name else [in_float32, small] if "schnell" in name else [in_float32, steps]
    )
    exec(card(name, IMPORT, *changed), {})
    ours = Image.open(SAVED[name]).copy()
    theirs = tmp_path / "schnell" if "schnell" in name else PIPELINE
    places = (f'"black-forest-labs/{name}"', f'"{theirs}", **tokenizers'), ("pipe.enable_model_cpu_offload()\n", "")
    if "Krea" in name:
        changed.append(("    prompt,", "    prompt, num_inference_steps=2,"))
    tokenizers = {"tokenizer": clip_tokenizer(), "tokenizer_2": t5_tokenizer()}
    exec(card(name, *changed, *places), {"tokenizers": tokenizers})
    assert levels(ours, Image.open(SAVED[name])) <= 1


# --- arguments ---


@pytest.mark.parametrize(
    "dtype",
    ["float32", "torch.float32", "fp32", mx.float32, np.float32, np.dtype("float32"), {"default": "float32"}],
)
def test_a_type_is_a_name_or_a_type_of_any_library(model, dtype):
    assert FluxPipeline.from_pretrained(model, dtype=dtype).dtype == "float32"
    assert FluxPipeline.from_pretrained(model, torch_dtype=dtype).dtype == "float32"


def test_auto_is_the_type_of_the_folder(model):
    assert FluxPipeline.from_pretrained(model, torch_dtype="auto").dtype == "float32"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"dtype": "int8"}, "`dtype` is 'int8'"),
        ({"torch_dtype": "torch.float64"}, "`torch_dtype` is 'float64'; expected one of float32"),
        ({"torch_dtype": "float32", "dtype": "bfloat16"}, "`dtype` is bfloat16 and `torch_dtype` float32"),
        ({"torch_dtype": {"vae": "float32", "default": "bfloat16"}}, "holds 2 types"),
    ],
)
def test_types_that_cannot_be_used_are_refused_under_the_name_that_was_given(model, arguments, says):
    with pytest.raises(UsageError, match=says):
        FluxPipeline.from_pretrained(model, **arguments)


ACCEPTED = {
    "variant": "fp16", "use_safetensors": True, "token": "x", "use_auth_token": True, "cache_dir": "/tmp",
    "revision": "main", "device_map": "balanced", "low_cpu_mem_usage": True, "local_files_only": True,
    "force_download": False, "max_memory": {0: "8GB"}, "offload_folder": "x", "proxies": {},
    "output_loading_info": False, "use_onnx": False, "disable_mmap": False,
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_arguments_of_loading_are_accepted_with_one_line(model, caplog, fresh, name):
    for _ in range(2):
        FluxPipeline.from_pretrained(model, **{name: ACCEPTED[name]})
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"`{name}` is accepted: " in caplog.text


def test_diffusers_own_name_of_the_model_is_understood(model):
    assert FluxPipeline.from_pretrained(pretrained_model_name_or_path=model).folder.path == model


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"transformer": object()}, "flux-krea convert takes files one by one"),
        ({"vae": object()}, "flux-krea convert takes files"),
        ({"scheduler": object()}, "takes `solver`, `schedule`"),
        ({"quantization_config": object()}, "flux-krea convert MODEL -q 4"),
        ({"custom_pipeline": "x"}, "one pipeline"),
        ({"output_loading_info": True}, "loading is strict"),
        ({"safety_checker": object()}, "see `check`"),
    ],
)
def test_arguments_of_loading_that_would_have_an_effect_are_refused(model, arguments, says):
    with pytest.raises(UsageError, match=says):
        FluxPipeline.from_pretrained(model, **arguments)
    FluxPipeline.from_pretrained(model, **dict.fromkeys(arguments))  # None is diffusers' default


def test_names_that_diffusers_does_not_have_are_errors_of_python(model, pipe):
    with pytest.raises(TypeError, match=r"from_pretrained\(\) got an unexpected keyword argument 'torch_dtyp'"):
        FluxPipeline.from_pretrained(model, torch_dtyp="float32")
    with pytest.raises(TypeError, match=r"__call__\(\) got an unexpected keyword argument 'guidance'"):
        pipe("a", guidance=3.5, **SMALL)
    for name in ("enable_everything", "unet", "load_lora_weight"):
        with pytest.raises(AttributeError, match=name):
            getattr(pipe, name)
    assert not hasattr(pipe, "text_encoder")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *((name, "`num_inference_steps`") for name in ("steps", "num_inference_step", "Steps", "inference_steps")),
        *((name, "`guidance_scale`") for name in ("guidance", "cfg", "guidance_scal", "cfg_scale")),
        *((name, "`num_images_per_prompt`") for name in ("n", "batch_size", "num_images")),
        *((name, f"`{name[:-1]}`") for name in ("seeds", "widths", "heigth", "images")),
        *((name, "`negative_prompt`") for name in ("negative", "neg_prompt", "negative_promt")),
        *((name, "`image`") for name in ("init_image", "image_path")),
        ("true_cfg", "`true_cfg_scale`"),
        ("max_length", "`max_sequence_length`"),
        ("image_strength", "`strength` is 1 minus it"),
        ("size", "`width` and `height`"),
        ("quantize", "flux-krea convert MODEL -q 4"),
        ("loras", "load_lora_weights"),
        ("lora_scale", "set_adapters(names, weights)"),
        ("device", "leave it out"),
        ("w", "`width`"),
        ("memory", "from_pretrained()"),
        ("dtype", "from_pretrained()"),
    ],
)
def test_a_name_of_another_tool_or_a_misspelt_one_is_answered(pipe, name, meant):
    for call in (pipe, Request):
        with pytest.raises(TypeError, match="unexpected keyword argument") as caught:
            call("a", **{name: 4})
        assert meant.replace("heigt", "height") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("quantize", "convert MODEL -q 4"), ("torch_dtyp", "`torch_dtype`"), ("dtyp", "`dtype`"), ("steps", "the call"),
        ("memory_limit", "`memory`"), ("seed", "the call"), ("path", "`model`"), ("checks", "`check`"),
    ],
)  # fmt: skip
def test_misspelt_arguments_of_loading_are_answered_too(model, name, meant):
    with pytest.raises(TypeError, match="unexpected keyword argument") as caught:
        FluxPipeline.from_pretrained(model, **{name: "x"})
    assert meant in str(caught.value)


def test_other_methods_answer_too_and_names_that_mean_nothing_get_no_answer(pipe):
    with pytest.raises(TypeError, match=r"load_lora_weights\(\) .*set_adapters\(names, weights\)"):
        pipe.load_lora_weights("x", weight=0.5)
    with pytest.raises(TypeError, match=r"encode_prompt\(\) .*it is an argument of the call"):
        pipe.encode_prompt("x", negative_prompt="y")
    with pytest.raises(UsageError, match=r"`request` is str; expected a Request; or call the pipeline"):
        pipe.generate("a red circle")
    for name in ("foo", "xyzzy", "other"):
        with pytest.raises(TypeError, match=f"argument '{name}'$"):
            pipe("a", **{name: 1})


@pytest.mark.parametrize("arguments", [{"folder": "nano"}, {"model": "nano"}, {"folder": Path("nano")}])
def test_the_class_itself_opens_no_model_and_says_what_does(arguments):
    with pytest.raises(UsageError, match=r"write FluxPipeline.from_pretrained\('nano'\)"):
        FluxPipeline(**arguments)
    with pytest.raises(UsageError, match=r'from_pretrained\("path or name"\)'):
        FluxPipeline()


def test_one_class_has_many_names_and_other_classes_are_answered(tmp_path):
    names = ("Img2Img", "Inpaint", "Kontext", "Fill", "Control", "ControlImg2Img", "ControlInpaint")
    assert {getattr(mlx_flux_krea, f"Flux{name}Pipeline") for name in names} == {FluxPipeline}
    Image.new("RGBA", (3, 2)).save(tmp_path / "a.png")
    assert mlx_flux_krea.load_image(str(tmp_path / "a.png")).mode == "RGB"
    with pytest.raises(UsageError, match="download it first"):
        mlx_flux_krea.load_image("https://example.com/a.png")
    for name, says in (
        ("FluxControlNetPipeline", "FLUX.1 Canny and Depth"), ("FluxKontextInpaintPipeline", "FluxFillPipeline fills"),
        ("ReduxImageEncoder", "FluxPriorReduxPipeline"), ("DiffusionPipeline", "FluxPipeline is for texts and images"),
        ("AutoPipelineForText2Image", "FluxPipeline is for"), ("FluxTransformer2DModel", "flux-krea convert"),
        ("BitsAndBytesConfig", "convert MODEL -q 4"), ("StableDiffusionXLPipeline", "FLUX.1 family"),
    ):  # fmt: skip
        with pytest.raises(ImportError, match=says):
            exec(f"from mlx_flux_krea import {name}")
    with pytest.raises(ImportError, match=r"name 'FluxPipline' .*: did you mean FluxPipeline\?"):
        exec("from mlx_flux_krea import FluxPipline")
    assert "FluxPipeline" in dir(mlx_flux_krea)
    assert not hasattr(mlx_flux_krea, "nothing")


@pytest.mark.parametrize(
    ("generator", "seed"),
    [
        (7, 7),
        (np.int64(7), 7),
        (Generator().manual_seed(7), 7),
        ([Generator("mps").manual_seed(7), 8], [7, 8]),
        ((7,), [7]),
    ],
)
def test_a_generator_is_its_seed(generator, seed):
    assert compat.seed_of(generator) == seed


@pytest.mark.slow
def test_a_generator_draws_the_picture_of_its_seed_and_is_told_once(pipe, caplog, fresh):
    expected = pipe("a", seed=7, **SMALL).images[0]
    for _ in range(2):
        assert np.array_equal(pipe("a", generator=Generator().manual_seed(7), **SMALL).images[0], expected)
    assert [record.getMessage() for record in caplog.records] == [f"`generator` is accepted: {compat.GENERATOR}"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"generator": np.random.default_rng(0)}, "`generator` is Generator; expected a torch.Generator"),
        ({"generator": "7"}, "`generator` is str"),
        ({"generator": True}, "`generator` is bool"),
        ({"generator": [[1], [2]]}, "list of lists"),
        ({"generator": [1, 2]}, "2 seeds for 1 image"),
        ({"generator": 1, "seed": 1}, "`seed` and `generator` are both given"),
        ({"joint_attention_kwargs": {"ip_adapter_image_embeds": []}}, "`joint_attention_kwargs` is diffusers'"),
        ({"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}, "is given the latents"),
        ({"ip_adapter_image": object()}, "`style_images` and load_lora_weights"),
        ({"negative_ip_adapter_image_embeds": [object()]}, "`style_images` and load_lora_weights"),
        ({"masked_image_latents": object()}, "images are given as images"),
        ({"control_mode": 1}, "ControlNets do not work here"),
    ],
)
def test_arguments_of_a_call_that_cannot_be_used_are_refused(pipe, arguments, says):
    with pytest.raises(UsageError, match=says):
        pipe("a", **arguments, **SMALL)


def test_arguments_of_a_call_that_mean_nothing_are_accepted_with_one_line(pipe, caplog, fresh):
    given = {"joint_attention_kwargs": {"scale": 0.8}, "callback_on_step_end_tensor_inputs": ["latents"]}
    for _ in range(2):
        pipe("a", seed=1, ip_adapter_image=None, **given, **SMALL)
    assert sorted(record.args or record.getMessage().split("`")[1] for record in caplog.records) == sorted(
        ["callback_on_step_end_tensor_inputs", "joint_attention_kwargs"]
    )


def test_a_result_is_a_tuple_on_request_and_has_diffusers_places(pipe):
    (images,) = pipe("a", seed=1, return_dict=False, **SMALL)
    result = pipe("a", seed=1, **SMALL)
    assert np.array_equal(images[0], result.images[0])
    assert result[0] is result["images"] is result.images


# --- methods ---


ACCEPTED_METHODS = [name for name, value in vars(compat.DiffusersMethods).items() if type(value) is compat.Accepted]
REFUSED_METHODS = [name for name, value in vars(compat.DiffusersMethods).items() if type(value) is compat.Refused]


@pytest.mark.parametrize("name", ACCEPTED_METHODS)
def test_methods_that_mean_nothing_are_accepted_with_one_line(pipe, caplog, fresh, name):
    for _ in range(2):
        assert getattr(pipe, name)("auto", device="mps") is None
    assert caplog.text.count(f"`{name}()` is accepted: ") == len(caplog.records) == 1


@pytest.mark.parametrize("name", REFUSED_METHODS)
def test_methods_that_would_do_something_are_refused_with_the_next_step(pipe, name):
    for owner in (pipe, FluxPipeline):
        with pytest.raises(UsageError) as refused:
            getattr(owner, name)("x", adapter_name="y")
        assert f"`{name}()` is diffusers'" in str(refused.value)
        assert len(refused.value.todo) > 15


def test_an_adapter_that_was_not_fetched_says_how(pipe):
    with pytest.raises(ModelError, match=r"flux-krea models add alimama-creative/FLUX\.1-Turbo-Alpha"):
        pipe.load_lora_weights("alimama-creative/FLUX.1-Turbo-Alpha")


def test_the_pipeline_moves_nowhere(pipe, caplog, fresh):
    assert pipe.to("mps") is pipe.to("cuda:0", "float32") is pipe.to(mx.float32) is pipe.to(device="cpu") is pipe
    assert len(caplog.records) == 1
    assert pipe.device == "cpu"
    with pytest.raises(UsageError, match='the type float16; expected float32; open the model with `dtype` "float16"'):
        pipe.to("mps", dtype="torch.float16")


def test_networks_have_the_methods_that_scripts_call(pipe, caplog, fresh):
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    pipe.transformer.to(memory_format="channels_last")
    assert pipe.vae.enable_tiling() is None
    assert len(caplog.records) == 3
    with pytest.raises(AttributeError):
        pipe.transformer.enable_tiling()


def test_the_schedule_is_read_as_a_script_reads_it_and_not_set(pipe):
    assert pipe.scheduler.config["use_dynamic_shifting"] is True
    for name in ("scheduler", "transformer", "vae", "text_encoder", "_interrupt"):
        with pytest.raises(UsageError, match=f"`{name}` is diffusers'"):
            setattr(pipe, name, object())
    pipe.my_own = 3
    assert pipe.my_own == 3
    with pytest.raises(AttributeError, match="encode_prompt"):
        pipe.text_encoder  # noqa: B018


# --- texts, guidance, images, latents ---


def test_an_empty_second_prompt_is_the_first_as_in_diffusers(pipe):
    same, empty, other = (
        pipe.encode_prompt("a cat", prompt_2=text)[0] for text in (None, "", [""])
    )  # fmt: skip
    assert mx.array_equal(same, empty)
    assert not mx.array_equal(same, other)
    for nothing in ("", [], ()):
        assert Request(prompt="a", prompt_2=nothing, negative_prompt_2=nothing).prompt_2 is None


def test_texts_are_encoded_with_the_arguments_that_scripts_pass(pipe, caplog, fresh):
    embeds, _ = pipe.encode_prompt("a", device="mps", num_images_per_prompt=1, lora_scale=None)
    assert embeds.shape[0] == len(pipe("a", num_images_per_prompt=None, seed=1, **SMALL).images) == 1
    assert len(caplog.records) == 2
    with pytest.raises(UsageError, match="`num_images_per_prompt` is diffusers'"):
        pipe.encode_prompt("a", num_images_per_prompt=2)
    with pytest.raises(TypeError, match="'devise'"):
        pipe.encode_prompt("a", devise="mps")


def test_schnells_published_guidance_is_accepted(published):
    pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-schnell")
    assert "guidance_scale" not in pipe("a", guidance_scale=0.0, seed=1).records[0]
    with pytest.raises(UsageError, match="no guidance embedding"):
        pipe("a", guidance_scale=3.5)


PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    "array",
    [
        PIXELS,
        PIXELS[None],
        [PIXELS],
        PIXELS.astype(np.float32) / 255,
        PIXELS.astype(np.float64) / 255,
        PIXELS.astype(np.uint16) * 257,
        np.dstack([PIXELS, np.full((32, 32), 255, np.uint8)]),
        mx.array(PIXELS),
        mx.array(PIXELS.astype(np.float32) / 255),
        PIXELS[::-1][::-1],
        Image.fromarray(PIXELS),
    ],
    ids=lambda value: f"{type(value).__name__} {getattr(value, 'dtype', '')} {getattr(value, 'shape', '')}",
)
def test_an_image_is_an_array_of_any_usual_form(array):
    assert np.array_equal(Request(prompt="a", image=array).image, PIXELS)


@pytest.mark.parametrize(
    "array", [PIXELS[..., 0], PIXELS[..., :1], PIXELS[..., 0] > 127, mx.array(PIXELS[..., 0])], ids=lambda a: a.shape
)
def test_grey_and_black_and_white_are_images_too(array):
    assert Request(prompt="a", image=array).image.mode == "RGB"


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (PIXELS.transpose(2, 0, 1), r"shape \(3, 32, 32\); expected .*; move the channels to the end"),
        (np.stack([PIXELS, PIXELS]), r"shape \(2, 32, 32, 3\)"),
        ([], "holds 0 images"),
        (PIXELS[:0], r"shape \(0, 32, 3\)"),
        (PIXELS.astype(np.float32), "holds floats from 0 to 255; expected 0 to 1"),
        (PIXELS.astype(np.float32) / 127.5 - 1, "holds floats from -1 to 1"),
        (np.full((8, 8, 3), np.nan), "holds floats"),
        (PIXELS.astype(np.int64), "holds int64"),
        (np.array(["a"]), "shape"),
        ("https://example.org/a.png", "nothing is fetched"),
        (3, "`image` is int"),
        (b"abc", "`image` is bytes"),
    ],
    ids=str,
)
def test_other_images_are_refused_with_the_reason(image, says):
    with pytest.raises(UsageError, match=says):
        Request(prompt="a", image=image)


def test_a_callback_may_return_latents_of_any_library(pipe):
    def halved(pipe, step, timestep, kwargs):
        return {"latents": kwargs["latents"] / 2}

    def halved_by_numpy(pipe, step, timestep, kwargs):
        return {"latents": np.array(kwargs["latents"], np.float64) / 2}

    one, two = (pipe("a", seed=1, callback_on_step_end=c, **SMALL).images[0] for c in (halved, halved_by_numpy))
    assert np.array_equal(one, two)


def test_latents_and_embeds_are_arrays_of_any_library(pipe):
    embeds, pooled = (np.array(array) for array in pipe.encode_prompt("a"))
    drawn = np.random.default_rng(0).normal(size=(1, 4, 64))
    assert pipe(prompt_embeds=embeds, pooled_prompt_embeds=pooled, latents=drawn, **SMALL).images
    with pytest.raises(UsageError, match="`latents` is str, which is no array"):
        pipe("a", latents="x", **SMALL)


# --- progress, reprs, help ---


def test_bars_are_shown_on_request_and_not_in_a_log(pipe, capsys):
    pipe("a", seed=1, **SMALL)
    assert capsys.readouterr().err == ""  # no terminal
    pipe("a", seed=1, progress=True, **SMALL)
    assert "denoising" in capsys.readouterr().err or SMALL["num_inference_steps"] == 1


@pytest.mark.slow
def test_bars_take_tqdms_arguments(model, capsys):
    pipe, shown = FluxPipeline.from_pretrained(model), io.StringIO()
    pipe.set_progress_bar_config(disable=False, file=shown, delay=0, desc="mine", leave=True)
    pipe("a", seed=1, **SMALL)
    assert "mine" in shown.getvalue()
    assert "100%" in shown.getvalue()
    before = shown.getvalue()
    pipe("a", seed=1, progress=False, **SMALL)
    pipe.set_progress_bar_config(disable=True, file=shown)
    pipe("a", seed=1, **SMALL)
    assert shown.getvalue() == before
    with pytest.raises(TypeError, match="'colur'"):
        pipe.set_progress_bar_config(colur="red")
    for other in ("yes", 0):
        with pytest.raises(UsageError, match="`progress` is "):
            pipe("a", progress=other, **SMALL)
    assert capsys.readouterr().err == ""


def test_a_bar_is_closed_when_a_call_fails(model):
    pipe, shown = FluxPipeline.from_pretrained(model), io.StringIO()
    pipe.set_progress_bar_config(disable=False, file=shown, delay=0, leave=False)

    def fails(pipe, step, timestep, kwargs):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        pipe("a", seed=1, callback_on_step_end=fails, **SMALL)
    assert shown.getvalue().endswith("\r")


def test_objects_show_themselves_in_one_short_line(pipe):
    result = pipe("a" * 3000, seed=1, latents=None, **SMALL)
    request = Request(prompt="b" * 3000, width=32, height=32, latents=mx.zeros((1, 4, 64)))
    shown = {
        repr(pipe): "dtype='float32', memory='auto', check='none'",
        repr(result): "Result(images=1 of 32 x 32, outcomes=['released'], seeds=[1], seconds=",
        repr(request): "latents=<array (1, 4, 64)>",
        repr(request.resolve(pipe.folder)): "num_inference_steps=28",
        repr(pipe.folder): "ModelFolder('pipeline', base=",
        repr(pipe.folder.flux): "NetworkFolder('transformer', stored='float32'",
        repr(pipe("a", seed=1, output_type="np", **SMALL)): "Result(images=1, outcomes",
    }
    for text, part in shown.items():
        assert part in text
        assert len(text) < 600
        assert "\n" not in text
    assert "bbbb" in repr(request)


@pytest.mark.slow
def test_help_has_an_example_that_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = (FluxPipeline.__doc__ or "").split("in a second or two:")[1].split("An installed")[0].splitlines()
    exec("\n".join(line.removeprefix(" " * 12) for line in lines), {})
    assert Image.open("circle.png").size == (96, 96)
    assert NANO.exists()
