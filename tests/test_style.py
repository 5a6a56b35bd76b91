"""Style images: SigLIP and Redux against transformers and diffusers, the three rules, the prior, and records."""

import json
import shutil
from dataclasses import replace

import judges
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import redux
from derived import EDIT, facts, goldens
from helpers import assert_close, edit_json, image, levels, max_abs, nhwc, psnr, rel
from mlx_flux_krea.convert import convert, hub
from PIL import Image

from mlx_flux_krea import FluxPipeline, FluxPriorReduxPipeline, Request
from mlx_flux_krea import checkpoint as interrupted
from mlx_flux_krea.errors import ModelError, UsageError, Withheld
from mlx_flux_krea.filters import judges as filters_judges
from mlx_flux_krea.filters.log import Log
from mlx_flux_krea.generator import Generator
from mlx_flux_krea.inputs import style as styles
from mlx_flux_krea.inputs.image import open_image
from mlx_flux_krea.inputs.style import StyledEmbeds
from mlx_flux_krea.models import siglip
from mlx_flux_krea.prompts import EncodedPrompt
from mlx_flux_krea.provenance import Picture, read_record
from mlx_flux_krea.residency import Blocks
from mlx_flux_krea.weights import open_component

CAT = "a cat"
QUICK = {"width": 32, "height": 32, "num_inference_steps": 1, "seed": 1, "progress": False}
PICTURES = ("a", "b", "control")
CASES = ("redux_1", "redux_2", "redux_notext")


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """The reference's Redux, in float32."""
    return convert([EDIT / "redux"], tmp_path_factory.mktemp("redux") / "redux", dtype="float32").path


@pytest.fixture
def installed(converted, home):
    shutil.copytree(converted, home / "components" / "redux")
    return open_component("redux")


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "style.png"
    Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 60).convert("RGB").save(path)
    return path


def networks(folder) -> tuple[siglip.SigLIP, siglip.Redux]:
    return tuple(folder.networks[name].load(mx.float32) for name in ("image_encoder", "image_embedder"))


def given(name: str) -> Image.Image:
    return open_image(EDIT / "images" / f"in_{name}.png")


def case(name: str) -> dict:
    """The arguments of a run of the reference that say what is drawn, as our own pipeline takes them."""
    told = facts()["redux"]["cases"][name]
    return {
        "prompt": told["prompt"],
        "style_images": [EDIT / path for path in told["images"]],
        "style_weights": told["prompt_embeds_scale"],
        "style_pooled_weights": told["pooled_prompt_embeds_scale"],
        "style_rule": "sum",
    }


def settings(name: str) -> dict:
    run = facts()["runs"][name]
    sizes = {"width": run["w"], "height": run["h"], "num_inference_steps": run["steps"]}
    return sizes | {"seed": run["seed"], "guidance_scale": run["g"]}


def run_of(pipe, name: str, **changed) -> tuple[Image.Image, list[mx.array]]:
    """The picture of a run of the reference, and the latents after each step."""
    latents = []

    def keep(pipe, step, timestep, kwargs):
        latents.append(kwargs["latents"])

    request = Request(**case(name) | settings(name) | changed)
    return pipe.generate(request, callback_on_step_end=keep, progress=False).images[0], latents


# --- the networks ---


@pytest.mark.parametrize("name", PICTURES)
def test_pixels_vectors_and_tokens_are_those_of_the_reference(installed, name):
    encoder, embedder = networks(installed)
    pixels = siglip.preprocess(given(name), encoder.config.image_size)
    assert max_abs(pixels, nhwc(goldens()[f"redux.{name}.pixel_values"])) <= 0.008
    vectors = encoder(pixels)
    assert_close(vectors, goldens()[f"redux.{name}.siglip"], 3e-5, name)
    assert_close(embedder(vectors), goldens()[f"redux.{name}.image_embeds"], 3e-5, name)


@pytest.mark.parametrize("kind", [Image.Resampling.LANCZOS, Image.Resampling.BILINEAR])
def test_another_filter_for_resizing_is_seen(kind):
    square = given("a").resize((42, 42), kind)
    assert max_abs(siglip.preprocess(square, 42), nhwc(goldens()["redux.a.pixel_values"])) > 0.008


MISTAKES = ("gelu by erf", "no last norm", "last layer left out", "not scaled to -1..1", "no positions")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_network_is_seen(installed, monkeypatch, mistake):
    encoder, embedder = networks(installed)
    pixels = nhwc(goldens()["redux.a.pixel_values"])
    if mistake == MISTAKES[0]:
        monkeypatch.setattr(nn, "gelu_approx", nn.gelu)
    elif mistake == MISTAKES[1]:
        encoder.post_layernorm = nn.Identity()
    elif mistake == MISTAKES[2]:
        encoder.layers = encoder.layers[:-1]
    elif mistake == MISTAKES[3]:
        pixels = pixels / 2 + 0.5
    else:
        encoder.position_embedding = mx.zeros_like(encoder.position_embedding)
    assert rel(embedder(encoder(pixels)), goldens()["redux.a.image_embeds"]) > 3e-5


def test_streamed_equals_resident(installed):
    style = styles.make_style(tuple(map(given, PICTURES)), None, None)
    encoded = styles.StyleEncoder(mx.float32, lambda: None).encode(style, installed, lambda parts, run: run)
    encoder, embedder = networks(installed)
    tensors = installed.networks["image_encoder"].tensors()
    blocks = Blocks(encoder, tensors, encoder.layers, dtype=mx.float32)
    with blocks.streaming(len(PICTURES)) as run:
        resident = [embedder(encoder(siglip.preprocess(given(name), 42), run)) for name in PICTURES]
    assert blocks.resident == {0, 1}
    assert all(map(mx.array_equal, encoded, resident))


# --- whole runs ---


@pytest.mark.parametrize("name", CASES)
@pytest.mark.core("redux_2", "redux_notext")
def test_a_run_equals_the_reference(full_pipe, installed, name):
    made, latents = run_of(full_pipe, name)
    golden = goldens()[f"{name}.latents"]
    assert len(latents) == len(golden)
    for step, (ours, theirs) in enumerate(zip(latents, golden, strict=True)):
        assert_close(ours, theirs, 1e-4, f"{name}, step {step}")
    theirs = image(f"edit/images/{name}.0.png")
    assert levels(made, theirs) <= 1
    assert psnr(made, theirs) >= 60


@pytest.mark.parametrize("name", CASES)
def test_the_prior_gives_the_reference_s_embeds(full_pipe, installed, name):
    told = facts()["redux"]["cases"][name]
    prior = FluxPriorReduxPipeline.from_pretrained(pipeline=full_pipe)
    scales = {key: told[key] for key in ("prompt_embeds_scale", "pooled_prompt_embeds_scale")}
    out = prior([EDIT / path for path in told["images"]], told["prompt"], **scales)
    for key in ("prompt_embeds", "pooled_prompt_embeds"):
        golden, ours = goldens()[f"{name}.{key}"], mx.array(out[key])
        if mx.any(golden).item():
            assert_close(ours, golden, 3e-5, key)
        else:
            assert mx.array_equal(ours, golden)


RUN_MISTAKES = ("text left out", "image tokens alone", "text not scaled", "one after another", "pooled not scaled")


@pytest.mark.parametrize("mistake", RUN_MISTAKES)
@pytest.mark.core("text not scaled")
def test_a_mistake_in_the_rule_is_seen(full_pipe, installed, monkeypatch, mistake):
    right = styles.styled

    def wrong(style, prompt, tokens):
        if mistake == RUN_MISTAKES[0]:
            prompt = EncodedPrompt(mx.zeros_like(prompt.embeds), prompt.pooled)
        if mistake == RUN_MISTAKES[3]:
            style = replace(style, rule="concat")
        if mistake == RUN_MISTAKES[4]:
            style = replace(style, pooled_weights=(1.0,) * len(style.images))
        made = right(style, prompt, tokens)
        embeds = made.embeds
        if mistake == RUN_MISTAKES[1]:
            embeds = embeds[:, prompt.embeds.shape[1] :]
        if mistake == RUN_MISTAKES[2]:
            embeds = mx.concatenate([prompt.embeds, embeds[:, prompt.embeds.shape[1] :]], axis=1)
        return EncodedPrompt(embeds, made.pooled)

    monkeypatch.setattr(styles, "styled", wrong)
    _, latents = run_of(full_pipe, "redux_2")
    assert rel(latents[-1], goldens()["redux_2.latents"][-1]) > 1e-4


def test_the_tokens_of_images_follow_those_of_the_text(full_pipe, installed):
    """The order moves no picture, since all ids are zeros; embeds alone show it."""
    out = FluxPriorReduxPipeline.from_pretrained(pipeline=full_pipe)(
        EDIT / "images" / "in_a.png", case("redux_1")["prompt"]
    )
    ours = mx.array(out.prompt_embeds)
    assert_close(ours[:, 512:], goldens()["redux.a.image_embeds"], 3e-5)
    turned = mx.concatenate([ours[:, 512:], ours[:, :512]], axis=1)
    assert rel(turned, goldens()["redux_1.prompt_embeds"]) > 0.1


@pytest.mark.parametrize("name", CASES)
@pytest.mark.core("redux_1")
def test_a_bfloat16_run_is_near_the_reference(full_pipe_bf16, installed, name):
    """As near as a run of text alone is held to (test_pipeline)."""
    made, latents = run_of(full_pipe_bf16, name)
    assert rel(latents[-1], goldens()[f"{name}.latents"][-1]) < 0.012
    assert psnr(made, image(f"edit/images/{name}.0.png")) >= 44


# --- rules ---


def test_weights_shrink_the_grid_to_a_side_from_3_to_27():
    table = {1.0: 27, 0.99: 27, 0.75: 20, 0.5: 14, 1 / 3: 9, 0.25: 7, 0.1: 3, 0.01: 3}
    assert {weight: styles.shrunk_side(27, weight) for weight in table} == table
    assert styles.shrunk_side(2, 0.5) == 2
    style = styles.make_style((given("a"),) * 3, (1.0, 1 / 3, 0.1), None)
    assert style.tokens(27) == 27**2 + 9**2 + 3**2
    assert replace(style, rule="concat").tokens(27) == 3 * 27**2
    assert replace(style, rule="sum").tokens(27) == 27**2


def test_a_shrunk_grid_holds_the_means_of_what_it_covers():
    """By `torch.nn.functional.interpolate(x, size=3, mode="area")` of a 5 x 5 grid: windows of 2, 3 and 2."""
    grid = mx.arange(25).astype(mx.float32).reshape(1, 25, 1)
    assert styles.shrink(grid, 3).reshape(-1).tolist() == pytest.approx([3, 4.5, 6, 10.5, 12, 13.5, 18, 19.5, 21])
    assert styles.shrink(grid, 5) is grid
    half = styles.shrink(mx.ones((1, 27 * 27, 4), mx.bfloat16), 14)
    assert (half.shape, half.dtype) == ((1, 196, 4), mx.bfloat16)
    assert mx.allclose(half, mx.ones_like(half), atol=0.01).item()


def test_the_three_rules_place_and_weigh_tokens():
    prompt = EncodedPrompt(mx.ones((1, 4, 2)), mx.ones((1, 3)))
    tokens = [mx.full((1, 9, 2), 2.0), mx.full((1, 9, 2), 3.0)]
    style = styles.make_style((given("a"), given("b")), (0.5, 1.0), "concat")
    made = styles.styled(style, prompt, tokens)
    assert made.embeds[0, :, 0].tolist() == [1.0] * 4 + [1.0] * 9 + [3.0] * 9
    assert made.pooled is prompt.pooled
    grid = styles.styled(replace(style, rule="grid", weights=(1.0, 1.0)), prompt, tokens)
    whole = styles.styled(replace(style, weights=(1.0, 1.0)), prompt, tokens)
    assert mx.array_equal(grid.embeds, whole.embeds)
    summed = styles.styled(replace(style, rule="sum", pooled_weights=(1.0, 0.25)), prompt, tokens)
    assert summed.embeds[0, :, 0].tolist() == [1.5] * 4 + [4.0] * 9
    assert summed.pooled.tolist() == [[1.25] * 3]


BAD = {
    "weights alone": ({"style_weights": 0.5}, "`style_weights` does nothing without a style image"),
    "a rule alone": ({"style_rule": "sum"}, "`style_rule` does nothing without"),
    "a rule": (
        {"style_images": "a", "style_rule": "mean"},
        "`style_rule` is 'mean'; expected one of grid, concat, sum",
    ),
    "two weights": ({"style_images": "a", "style_weights": [1, 1]}, "holds 2 weights; expected 1"),
    "zero": ({"style_images": "a", "style_weights": 0}, "holds 0; expected numbers above 0"),
    "above 1": ({"style_images": "a", "style_weights": 1.01}, "`style_rule` concat"),
    "nan": ({"style_images": "a", "style_weights": float("nan"), "style_rule": "concat"}, "holds nan"),
    "a text": ({"style_images": "a", "style_weights": "1"}, "holds '1'"),
    "true": ({"style_images": "a", "style_weights": True, "style_rule": "concat"}, "holds True"),
    "pooled": ({"style_images": "a", "style_pooled_weights": 0.5}, "does nothing by the rule grid"),
    "seventeen": ({"style_images": ["a"] * 17}, "holds 17 images; expected 16 at most"),
    "a number": ({"style_images": 7}, "`style_images` is int"),
    "none": ({"style_images": [None]}, "`style_images` holds None"),
    "an address": ({"style_images": "https://x/y.png"}, "`style_images` is an address"),
    "a mode": ({"style_images": Image.new("F", (3, 3))}, "white is not known"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_refused_before_any_work(pipe, installed, picture, name):
    arguments, says = BAD[name]
    images = arguments.get("style_images")
    if images == "a":
        arguments = arguments | {"style_images": picture}
    elif images == ["a"] * 17:
        arguments = arguments | {"style_images": [picture] * 17}
    with pytest.raises(UsageError) as error:
        pipe.plan(Request(prompt=CAT, **arguments))
    assert says in str(error.value)


# --- images of every kind ---

KINDS = {
    "alpha": lambda: Image.effect_mandelbrot((30, 20), (-2, -1, 1, 1), 60).convert("RGBA"),
    "grey": lambda: Image.effect_mandelbrot((30, 20), (-2, -1, 1, 1), 60),
    "16 bits": lambda: Image.fromarray((np.arange(600).reshape(20, 30) * 100).astype(np.uint16)),
    "CMYK": lambda: Image.effect_mandelbrot((30, 20), (-2, -1, 1, 1), 60).convert("RGB").convert("CMYK"),
    "palette": lambda: Image.effect_mandelbrot((30, 20), (-2, -1, 1, 1), 60).convert("P"),
    "one pixel": lambda: Image.new("RGB", (1, 1), "red"),
    "a line": lambda: Image.linear_gradient("L").resize((20_000, 20)),
    "a column": lambda: Image.linear_gradient("L").resize((20, 20_000)),
    "huge": lambda: Image.linear_gradient("L").resize((6000, 5000)),
    "array": lambda: np.linspace(0, 1, 20 * 30 * 3).reshape(20, 30, 3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.core(*KINDS.keys() - {"huge"})
def test_pictures_of_every_kind_are_seen_as_their_colours_on_white(installed, kind):
    """Style images are opened as any other input is (test_inputs has profiles and EXIF)."""
    image = KINDS[kind]()
    (opened,) = styles.open_images(image)
    seen = styles.seen(opened, installed)
    assert (seen.shape, seen.dtype, opened.mode) == ((42, 42, 3), np.uint8, "RGB")
    style = styles.make_style((opened,), None, None)
    (tokens,) = styles.StyleEncoder(mx.float32, lambda: None).encode(style, installed, lambda parts, run: run)
    assert tokens.shape == (1, 9, 14)
    assert mx.isfinite(tokens).all().item()


def test_profiles_and_turned_photos_count_as_in_every_input(tmp_path, installed):
    from test_inputs import COLOURS, expected, profile

    Image.fromarray(COLOURS).save(tmp_path / "p3.png", icc_profile=profile())
    (opened,) = styles.open_images(tmp_path / "p3.png")
    assert np.abs(np.asarray(opened, float) - expected(COLOURS)).max() <= 2
    turned = Image.new("RGB", (8, 4), "blue")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert styles.open_images(tmp_path / "turned.jpg")[0].size == (4, 8)


def test_several_images_in_one_array_are_a_list_for_the_prior(pipe, installed):
    prior = FluxPriorReduxPipeline.from_pretrained("black-forest-labs/FLUX.1-Redux-dev", pipeline=pipe)
    batch = np.stack([np.asarray(given("a").resize((20, 20))), np.asarray(given("b").resize((20, 20)))])
    out = prior(batch, prompt_embeds_scale=[0.5, 0.25])
    assert [image.size for image in out.prompt_embeds.source.style.images] == [(20, 20)] * 2


# --- what is kept, planned and recorded ---


def test_tokens_are_kept_by_the_image_and_as_many_as_are_few(installed, monkeypatch):
    encoder, read = styles.StyleEncoder(mx.float32, lambda: None), []

    def encode(*images):
        style = styles.make_style(tuple(images), None, None)
        return encoder.encode(style, installed, lambda parts, run: read.append(parts) or run)

    first = encode(given("a"))
    assert encode(given("a").copy())[0] is first[0]
    a, b = encode(given("a"), given("b"))
    assert (a is first[0], len(read)) == (True, 2)
    assert not mx.array_equal(a, b)
    square, line = Image.new("RGB", (4, 4)), Image.new("RGB", (16, 1))  # the same bytes
    encode(square, line)
    assert read == [5, 5, 10]
    for grey in range(2 * styles.CACHED):
        encode(Image.new("RGB", (2, 2), (grey, 0, 0)))
    assert len(encoder._encoded) == styles.CACHED
    encoder.forget()
    encode(given("a"))
    assert read[-1] == 5


def test_damaged_weights_are_said_and_not_kept(pipe, installed, home):
    picture = Image.new("RGB", (5, 7), "navy")  # whose tokens nobody has yet
    for shard in (home / "components" / "redux" / "image_embedder").glob("*.safetensors"):
        data = bytearray(shard.read_bytes())
        data[-4:] = np.float32("nan").tobytes()
        shard.write_bytes(data)
    with pytest.raises(ModelError, match="Redux gave NaN or infinities"):
        pipe(CAT, style_images=picture, **QUICK)
    prior = FluxPriorReduxPipeline.from_pretrained()
    with pytest.raises(ModelError, match="Redux gave NaN or infinities"):
        mx.array(prior(picture).prompt_embeds)


def test_the_plan_counts_tokens_and_the_stage(pipe, installed, picture):
    plain, styled = pipe.plan(prompt=CAT, **_sizes()), pipe.plan(prompt=CAT, style_images=picture, **_sizes())
    assert list(styled.stages) == ["text", "style", "modulation", "denoise", "decode"]
    assert "style" not in plain.stages
    more = pipe.plan(prompt=CAT, style_images=[picture] * 3, style_rule="concat", **_sizes())
    assert more.stages["denoise"] > styled.stages["denoise"] > plain.stages["denoise"]
    assert more.stages["text"] - plain.stages["text"] < styled.stages["style"]


def _sizes() -> dict:
    return {"width": 32, "height": 32}


def test_the_verb_plan_counts_style_images_before_redux_is_there(command, model):
    plain, styled = (json.loads(command("plan", model, "--json", *more)[1]) for more in ((), ("--style", "2")))
    assert styled["stages"]["style"] > 200e6  # Redux in bfloat16, and two layers of SigLIP
    assert styled["stages"]["denoise"] > plain["stages"]["denoise"]
    published = json.loads(command("plan", "--style", "1", "--json")[1])["precisions"]["8"]
    assert published["stages"]["style"] < published["stages"]["text"]


def test_tokens_stand_beside_the_positive_prompts_alone(pipe, installed, picture, monkeypatch):
    """And beside each of several."""
    seen, denoise = [], Generator._denoise

    def noting(self, request, conditions, *more):
        seen.append([prompt.embeds.shape[1] for prompt in conditions.both])
        return denoise(self, request, conditions, *more)

    monkeypatch.setattr(Generator, "_denoise", noting)
    result = pipe([CAT, "a dog"], negative_prompt="rain", true_cfg_scale=2, style_images=picture, **QUICK)
    assert seen == [[41, 41, 32, 32]]
    assert len(result.images) == 2


def test_a_record_names_images_weights_rule_and_redux(pipe, installed, picture, tmp_path):
    result = pipe(CAT, style_images=[picture, picture], style_weights=[0.5, 1], **QUICK)
    style = result.records[0]["style"]
    assert (style["rule"], [one["weight"] for one in style["images"]]) == ("grid", [0.5, 1.0])
    assert {one["rgb_sha256"] for one in style["images"]} == {
        styles.make_style((open_image(picture),), 1, None).hashes[0]
    }
    result.images[0].save(tmp_path / "out.png")
    record = read_record(tmp_path / "out.png")
    assert record["redux_sha256"] == styles.sha256_if_exists(installed.path / "manifest.json")
    assert "style" not in pipe(CAT, **QUICK).records[0]


def failing(monkeypatch, after: int) -> None:
    """Makes a run fail after so many steps."""
    save = interrupted.Checkpoint.save_step

    def save_step(self, done, *args):
        save(self, done, *args)
        if done == after:
            raise ModelError("the disk is gone")

    monkeypatch.setattr(interrupted, "EVERY", 0)
    monkeypatch.setattr(interrupted.Checkpoint, "save_step", save_step)


TINY = ("--width", "32", "--height", "32", "--seed", "7")


def test_a_run_goes_on_with_the_style_images_that_it_began_with(
    command, model, installed, picture, tmp_path, monkeypatch
):
    """Though the file is another one by now."""
    style = ("--style", f"{picture}=0.4", "--style-rule", "concat")
    how = ("generate", CAT, "-m", model, *TINY, "--steps", "2", *style)
    assert command(*how, "-o", "whole.png")[0] == 0
    with monkeypatch.context() as patch:
        failing(patch, 1)
        assert command(*how, "-o", "out.png")[0] == 3
    Image.new("RGB", (5, 5), "white").save(picture)
    code, _, err = command("resume")
    assert code == 0, err
    assert (tmp_path / "out.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


def test_a_picture_is_repeated_from_its_record_with_the_images_given_again(
    command, model, installed, picture, tmp_path
):
    style = ("--style", f"{picture}=0.4", "--style-rule", "sum")
    assert command("generate", CAT, "-m", model, *TINY, "--steps", "1", *style)[0] == 0
    code, _, err = command("generate", "--from", "out.png", "-m", model)
    assert (code, "out.png was made from 1 style image" in err) == (2, True)
    assert command("generate", "--from", "out.png", "-m", model, "--style", picture, "-o", "again.png")[0] == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "out.png").read_bytes()
    Image.new("RGB", (5, 5), "white").save(picture)
    _, _, err = command("generate", "--from", "out.png", "-m", model, "--style", picture, "-o", "other.png")
    assert "style.png is not the style image that out.png was made from" in err


def test_an_empty_prompt_with_a_style_image_is_a_variation(command, model, installed, picture):
    shown = [
        command("generate", "", "-m", model, *TINY, "--steps", "1", *more)[2] for more in ((), ("--style", picture))
    ]
    assert ["the picture shows anything" in err for err in shown] == [True, False]


@pytest.mark.parametrize("style", [7, {"rule": "sum", "images": 3}, {"rule": "sum", "images": [{"rgb_sha256": 5}]}])
def test_a_record_that_somebody_wrote_is_refused_in_one_line(command, model, installed, tmp_path, style):
    record = {"prompt": CAT, "seed": 1, "style": style}
    Picture.from_pixels(np.zeros((16, 16, 3), np.uint8), record).save(tmp_path / "out.png")
    code, out, err = command("generate", "--from", "out.png", "-m", model, "--style", "x.png")
    assert (code, out, err.count("\n")) == (2, "", 1), err


# --- not there, or not fitting ---


def test_without_redux_the_answer_is_the_command_that_installs_it(command, model, picture, tmp_path):
    code, out, err = command("generate", CAT, "-m", model, "--style", picture)
    assert (code, out) == (3, "")
    assert err.count("\n") == 1, "nothing else is said before"
    assert "install it: flux-krea convert black-forest-labs/FLUX.1-Redux-dev" in err
    with pytest.raises(ModelError, match=r"flux-krea convert black-forest-labs/FLUX\.1-Redux-dev"):
        FluxPriorReduxPipeline.from_pretrained("black-forest-labs/FLUX.1-Redux-dev")


def test_redux_of_another_width_is_refused_before_anything_is_read(installed, picture):
    with pytest.raises(ModelError, match="makes tokens that are 14 wide; expected 128, as this model reads"):
        FluxPipeline.from_pretrained("nano")(CAT, style_images=picture, **QUICK)


def test_another_component_in_its_place_is_refused(model, home, picture):
    shutil.copytree(model, home / "components" / "redux")
    with pytest.raises(ModelError, match=r"is another kind of folder; expected FLUX\.1 Redux"):
        open_component("redux")


# --- filters ---


@pytest.fixture
def filters(home, monkeypatch):
    judges.install()
    monkeypatch.setattr(filters_judges, "load_judge", judges.load_judge)


@pytest.fixture
def free(model, monkeypatch):
    """A model that requires nothing by itself, as schnell, and is no toy."""
    monkeypatch.setattr(styles, "SMALLEST", 1)
    return FluxPipeline.from_pretrained(model)


def test_redux_adds_the_duty_of_filters_to_a_model_without_it(free, installed, filters, picture):
    assert free.policy is None
    assert free(CAT, style_images=picture, **QUICK).outcomes == ("released",)
    assert free.policy.check == "filters"
    with pytest.raises(UsageError, match="latent"):
        free(CAT, style_images=picture, output_type="latent", **QUICK)
    with pytest.raises(Withheld):
        free("mickey", style_images=picture, **QUICK)


def test_redux_adds_nothing_to_a_small_model(pipe, installed, picture):
    pipe(CAT, style_images=picture, **QUICK)
    assert pipe.policy is None


def test_every_style_image_is_judged_as_siglip_sees_it(free, installed, filters, picture, monkeypatch):
    seen = []
    judge = judges.Eye.images

    def images(self, pixels):
        seen.extend(pixels)
        return judge(self, pixels)

    monkeypatch.setattr(judges.Eye, "images", images)
    free(CAT, style_images=[picture, given("a")], **QUICK)
    assert [one.shape for one in seen[-3:]] == [(42, 42, 3), (42, 42, 3), (32, 32, 3)]  # after the self-test
    assert np.array_equal(seen[-3], styles.seen(open_image(picture), installed))
    with pytest.raises(Withheld, match="the input image was withheld"):
        free(CAT, style_images=[picture, Image.new("RGB", (9, 9), "red")], **QUICK)


def test_the_result_of_the_prior_passes_the_filters_by_what_it_remembers(free, installed, filters, picture):
    prior = FluxPriorReduxPipeline.from_pretrained(pipeline=free)
    result = free(**prior(picture, CAT), **QUICK)
    assert result.outcomes == ("released",)
    assert (result.records[0]["prompt"], result.records[0]["style"]["rule"]) == (CAT, "sum")
    with pytest.raises(Withheld):
        free(**prior(picture, "mickey"), **QUICK)
    with pytest.raises(Withheld):
        free(**prior(Image.new("RGB", (9, 9), "red")), **QUICK)
    out = prior(picture, "mickey")
    with pytest.raises(UsageError, match="which no filter can read"):
        free(
            prompt_embeds=mx.array(out.prompt_embeds), pooled_prompt_embeds=mx.array(out.pooled_prompt_embeds), **QUICK
        )


@pytest.mark.slow
def test_a_run_with_the_duty_of_redux_goes_on_with_it(command, model, installed, filters, picture, home, monkeypatch):
    """The model alone has none, and would not be given latents that must be judged."""
    monkeypatch.setattr(styles, "SMALLEST", 1)
    with monkeypatch.context() as patch:
        failing(patch, 1)
        assert command("generate", CAT, "-m", model, *TINY, "--steps", "2", "--style", picture)[0] == 3
    code, _, err = command("resume")
    assert code == 0, err
    assert [entry["event"] for entry in Log(home / "log").read()][-2:] == ["released", "written"]


# --- the prior, as its card calls it ---


CARD = """import torch
from diffusers import FluxPriorReduxPipeline, FluxPipeline
from diffusers.utils import load_image

pipe_prior_redux = FluxPriorReduxPipeline.from_pretrained("black-forest-labs/FLUX.1-Redux-dev", torch_dtype=torch.bfloat16).to("cuda")
pipe = FluxPipeline.from_pretrained(
    "black-forest-labs/FLUX.1-dev" ,
    text_encoder=None,
    text_encoder_2=None,
    torch_dtype=torch.bfloat16
).to("cuda")

image = load_image("https://huggingface.co/datasets/YiYiXu/testing-images/resolve/main/style_ziggy/img5.png")
pipe_prior_output = pipe_prior_redux(image)
images = pipe(
    guidance_scale=2.5,
    num_inference_steps=50,
    generator=torch.Generator("cpu").manual_seed(0),
    **pipe_prior_output,
).images
images[0].save("flux-dev-redux.png")
"""  # noqa: E501
CHANGED = {  # a picture has to be here, and those that a test waits for are small
    "import torch\n": "",
    "from diffusers import": "from mlx_flux_krea import",
    "from diffusers.utils import": "from mlx_flux_krea import",
    "torch_dtype=torch.bfloat16": 'dtype="float32"',
    'generator=torch.Generator("cpu").manual_seed(0)': "seed=0",
    '"https://huggingface.co/datasets/YiYiXu/testing-images/resolve/main/style_ziggy/img5.png"': '"style.png"',
    "num_inference_steps=50": "num_inference_steps=1",
}


def test_the_card_s_program_runs_with_the_lines_that_change(model, installed, picture, home, tmp_path, monkeypatch):
    shutil.copytree(model, home / "models" / "flux")
    small = {"width": 32, "height": 32, "num_inference_steps": 2, "guidance_scale": 4.5, "true_cfg_scale": 1.0}
    index = {"repository": "black-forest-labs/FLUX.1-dev", "defaults": small}
    edit_json(home / "models" / "flux" / "model_index.json", **index)
    monkeypatch.chdir(tmp_path)
    program = CARD
    for old, new in CHANGED.items():
        assert old in program
        program = program.replace(old, new)
    exec(program, {})
    made = Image.open("flux-dev-redux.png")
    record = read_record(tmp_path / "flux-dev-redux.png")
    assert ("prompt" in record, record["style"]["rule"], record["guidance_scale"]) == (False, "sum", 2.5)
    pipe = FluxPipeline.from_pretrained(model)
    again = pipe(style_images=picture, style_rule="sum", guidance_scale=2.5, **QUICK | {"seed": 0})
    assert np.array_equal(np.asarray(made), np.asarray(again.images[0]))


def test_the_result_is_a_dict_an_object_and_a_tuple_of_arrays(pipe, installed, picture):
    prior = FluxPriorReduxPipeline.from_pretrained("redux", pipeline=pipe)
    out = prior(picture, CAT)
    assert list(out) == ["prompt_embeds", "pooled_prompt_embeds"]
    assert out[0] is out.prompt_embeds is out["prompt_embeds"]
    assert isinstance(out[1], StyledEmbeds)
    first, second = prior(picture, CAT, return_dict=False)
    assert (first.shape, second.shape) == ((1, 41, 14), (1, 16))
    assert np.asarray(first, np.float64).dtype == np.float64
    assert first.dtype == mx.float32
    assert "StyledEmbeds" in repr(first)


WRONG = {
    "prompt_embeds": ({"prompt_embeds": 1}, "give the text as `prompt`"),
    "scales": ({"prompt_embeds_scale": [1.0, 2.0]}, "`prompt_embeds_scale` holds 2 numbers; expected 1"),
    "texts": ({"image": ["a", "a"], "prompt": ["one", "two"]}, "holds 2 texts that differ"),
    "no image": ({"image": None}, "`image` is None"),
    "a number": ({"prompt": 5}, "`prompt` is int; expected a text"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_the_prior_cannot_do_is_said(pipe, installed, picture, name):
    prior = FluxPriorReduxPipeline.from_pretrained(pipeline=pipe)
    arguments, says = WRONG[name]
    arguments = {"image": picture} | arguments
    if arguments["image"] == ["a", "a"]:
        arguments["image"] = [picture, picture]
    with pytest.raises(UsageError) as error:
        prior(**arguments)
    assert says in str(error.value)


def test_a_text_needs_a_pipeline_and_results_stand_alone(pipe, installed, picture, tmp_path):
    prior = FluxPriorReduxPipeline.from_pretrained(dtype="float32")
    with pytest.raises(UsageError, match="no text encoders to read it; expected a pipeline"):
        prior(picture, CAT)
    assert prior(picture).pooled_prompt_embeds.shape == (1, 768)
    one, other = prior(picture), prior(picture)
    mixed = {"prompt_embeds": one.prompt_embeds, "pooled_prompt_embeds": other.pooled_prompt_embeds}
    for arguments in (mixed, {"prompt_embeds": one.prompt_embeds}, dict(one) | {"prompt": CAT}, dict(one) | BAD_RULE):
        with pytest.raises(UsageError, match="FluxPriorReduxPipeline"):
            pipe(**arguments, **QUICK)
    with pytest.raises(ModelError, match="is not the installed Redux"):
        FluxPriorReduxPipeline.from_pretrained(tmp_path)
    with pytest.raises(UsageError, match="opens nothing"):
        FluxPriorReduxPipeline("x")
    with pytest.raises(UsageError, match="a prompt is read by a pipeline"):
        FluxPriorReduxPipeline.from_pretrained(text_encoder=object())
    with pytest.raises(TypeError, match=r"FluxPriorReduxPipeline.from_pretrained\(\) got an unexpected"):
        FluxPriorReduxPipeline.from_pretrained(modell=1)


BAD_RULE = {"style_rule": "sum"}


# --- conversion ---


def stored(folder) -> dict[str, mx.array]:
    shards = sorted(folder.rglob("*.safetensors"))
    return {f"{s.parent.name}/{name}": array for s in shards for name, array in mx.load(str(s)).items()}


def test_files_one_by_one_give_what_the_pipeline_folder_gives(converted, tmp_path):
    source = tmp_path / "siglip"
    shutil.copytree(EDIT / "redux" / "image_encoder", source)
    bfl = EDIT / "bfl" / "flux1-redux-tiny.safetensors"
    made = convert([source, bfl], tmp_path / "made", dtype="float32").path
    assert stored(made).keys() == stored(converted).keys()
    assert all(mx.array_equal(array, stored(converted)[name]) for name, array in stored(made).items())
    index = json.loads((made / "model_index.json").read_text())
    assert (index["license"], index["name"]) == ("flux-1-dev-non-commercial", "flux1-redux-tiny")
    assert "Non-Commercial License" in (made / "LICENSE.md").read_text()
    assert "FLUX.1 [dev]" in (made / "NOTICE").read_text()


@pytest.mark.parametrize("kind", ["text tower", "transformers 5", "float16"])
def test_other_files_of_siglip_give_the_same(tmp_path, kind):
    redux_file, siglip_file = redux.write(tmp_path, width=14, side=3)
    plain = stored(convert([redux_file, siglip_file], tmp_path / "a", dtype="float32").path)
    tensors = mx.load(str(siglip_file))
    if kind == "text tower":
        text = {"text_model.embeddings.token_embedding.weight": mx.ones((5, 4)), "logit_scale": mx.ones((1,))}
        tensors |= text | {"text_model.final_layer_norm.weight": mx.ones((4,)), "logit_bias": mx.ones((1,))}
        own = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": own}))
    elif kind == "transformers 5":
        tensors = {name.removeprefix("vision_model."): array for name, array in tensors.items()}
    else:
        tensors = {name: array.astype(mx.float16) for name, array in tensors.items()}
    mx.save_safetensors(str(siglip_file), tensors)
    again = convert([siglip_file, redux_file], tmp_path / "b", dtype="float32")
    made = stored(again.path)
    assert made.keys() == plain.keys()
    bar = 1e-3 if kind == "float16" else 0
    assert all(max_abs(array, plain[name]) <= bar for name, array in made.items())
    assert {reason for _, reason in again.components[0].dropped} if kind != "float16" else True


def test_of_its_repository_the_folders_are_fetched_and_of_a_model_not_its_encoder_of_pictures():
    beside = ["LICENSE.md", "feature_extractor/preprocessor_config.json", "model_index.json"]
    folders = ["image_embedder/config.json", "image_embedder/diffusion_pytorch_model.safetensors"]
    folders += ["image_encoder/config.json", "image_encoder/model.safetensors"]
    others = ["flux1-redux-dev.safetensors", "README.md", "redux.png", "tokenizer/vocab.json"]
    needed = hub._needed([*beside, *folders, *others])
    assert needed == sorted([*beside, *folders, "tokenizer/vocab.json"])
    model = ["transformer/config.json", "transformer/a.safetensors", "image_encoder/model.safetensors"]
    assert hub._needed(model) == sorted(model[:2])


def test_what_is_not_redux_is_refused_by_name(tmp_path, model):
    redux_file, siglip_file = redux.write(tmp_path, width=14, side=3)
    cases = {
        "also image_encoder": [redux_file],
        "also image_embedder": [siglip_file],
        "none: it is small": [redux_file, siglip_file],
        "a model, or a component alone": [siglip_file, redux_file, EDIT.parent / "pipeline" / "vae"],
    }
    for says, sources in cases.items():
        with pytest.raises((ModelError, UsageError), match=says):
            convert(sources, tmp_path / "out", quantize="8" if says.startswith("none") else None)
    tensors = mx.load(str(siglip_file))
    mx.save_safetensors(str(siglip_file), tensors | {"vision_model.pre_layrnorm.weight": mx.ones((16,))})
    with pytest.raises(ModelError, match="is CLIP's encoder of pictures"):
        convert([redux_file, siglip_file], tmp_path / "out")
    other = redux.write(tmp_path, width=14, side=3)[0]
    mx.save_safetensors(
        str(other), {n: a[..., :8] if n == "redux_up.weight" else a for n, a in mx.load(str(other)).items()}
    )
    with pytest.raises(ModelError, match="its vectors are 16 wide; expected 8"):
        convert([other, siglip_file], tmp_path / "out")


def test_heads_and_preprocessing_must_be_the_published_ones(tmp_path):
    shutil.copytree(EDIT / "redux", tmp_path / "redux")
    edit_json(tmp_path / "redux" / "image_encoder" / "config.json", hidden_act="gelu")
    with pytest.raises(ModelError, match="hidden_act is 'gelu'"):
        convert([tmp_path / "redux"], tmp_path / "out")
    shutil.rmtree(tmp_path / "redux")
    shutil.copytree(EDIT / "redux", tmp_path / "redux")
    edit_json(tmp_path / "redux" / "feature_extractor" / "preprocessor_config.json", resample=2)
    with pytest.raises(ModelError, match="resample is 2"):
        convert([tmp_path / "redux"], tmp_path / "out")


def test_it_is_listed_verified_inspected_and_removed(command, home, tmp_path):
    code, out, err = command("convert", EDIT / "redux")
    assert (code, out.strip()) == (0, str(home / "components" / "redux")), err
    assert ["redux", "component"] in [line.split()[:2] for line in command("models")[1].splitlines()]
    facts = json.loads(command("inspect", "redux", "--json")[1])
    assert {name: one["dtype"] for name, one in facts["components"].items()} == {
        "image_encoder": "bfloat16",
        "image_embedder": "bfloat16",
    }
    assert "required: its licence is flux-1-dev" in command("inspect", "redux")[1]
    assert command("verify", "redux")[0] == 0
    assert command("convert", EDIT / "redux")[0] == 2, "it is there"
    assert command("models", "rm", "redux", "--yes")[0] == 0
    assert not (home / "components" / "redux").exists()
