"""Previews: what a step heads for, in colours, in a terminal and in a file; and where none may be shown."""

import base64
import io
import re
import shutil
from dataclasses import replace

import judges
import mlx.core as mx
import numpy as np
import pytest
from helpers import at_terminal, edit_json, image, levels
from PIL import Image

from mlx_flux_krea import FluxPipeline, Request, generator, presets
from mlx_flux_krea.errors import FiltersError, ModelError, UsageError
from mlx_flux_krea.filters.log import Log
from mlx_flux_krea.models.config import FLUX_VAE
from mlx_flux_krea.models.vae import pixels_from_image
from mlx_flux_krea.provenance import read_picture
from mlx_flux_krea.sampling.preview import colours, fit_latent_rgb, predicted
from mlx_flux_krea.sampling.sampler import unpack
from mlx_flux_krea.weights import open_model

CAT = "a cat"
SIZE = {"width": 48, "height": 32, "num_inference_steps": 3}
OPTIONS = ["--width", "48", "--height", "32", "--steps", "3", "--seed", "7"]
MAP = (np.random.default_rng(0).normal(size=(17, 3)) / 4).round(4).tolist()


@pytest.fixture(scope="module")
def mapped(model, tmp_path_factory):
    """The tiny pipeline with a map of its own."""
    folder = tmp_path_factory.mktemp("mapped") / "tiny"
    shutil.copytree(model, folder)
    edit_json(folder / "model_index.json", latent_rgb=MAP)
    return folder


@pytest.fixture(scope="module")
def seen(mapped):
    """Step, steps and pixels of each preview of the usual run."""
    shown = []
    FluxPipeline.from_pretrained(mapped)(CAT, seed=7, preview=lambda *step: shown.append(step), **SIZE)
    return shown


def large(pixels: np.ndarray) -> Image.Image:
    small = Image.fromarray(pixels[0])
    return small.resize((small.width * 8, small.height * 8), Image.Resampling.BICUBIC)


def test_a_step_on_a_straight_path_heads_for_its_end():
    clean, noise = mx.random.normal((2, 1, 4, 64))
    at = lambda sigma: (1 - sigma) * clean + sigma * noise  # noqa: E731
    for sigma, following in ((1.0, 0.9), (0.6, 0.2), (0.2, 0.0)):
        assert mx.abs(predicted(at(sigma), at(following), sigma, following) - clean).max() < 1e-4


def test_a_map_is_found_again_from_pictures_that_were_made_with_it():
    rng = np.random.default_rng(1)
    latents = rng.normal(size=(3, 16, 4, 6))
    small = np.einsum("nchw,cr->nhwr", latents, np.array(MAP)[:-1]) + np.array(MAP)[-1]
    pixels = small.repeat(8, axis=1).repeat(8, axis=2)
    assert np.abs(np.array(fit_latent_rgb(latents, pixels)) - MAP).max() < 1e-4
    expected = np.round(np.clip(small / 2 + 0.5, 0, 1) * 255)
    assert np.abs(colours(mx.array(latents, mx.float32), MAP) - expected).max() <= 1
    with pytest.raises(ValueError, match="do not match latents"):
        fit_latent_rgb(latents, pixels[:, :30])


@pytest.mark.slow
def test_a_map_fitted_to_the_autoencoder_shows_pictures_better_than_their_mean_colour(pipe):
    pictures = [Image.new("RGB", (64, 64), tuple(np.random.default_rng(n).integers(0, 256, 3))) for n in range(24)]
    pictures += [image("images/input.png").resize((64, 64))]
    pixels = mx.concatenate([pixels_from_image(one, 64, 64) for one in pictures])
    config = pipe.vae.config
    mean, _ = pipe.vae.encode(pixels)
    latents = np.array((mean.transpose(0, 3, 1, 2) - config.shift_factor) * config.scale_factor)
    pixels = np.array(pixels)
    shown = colours(mx.array(latents), fit_latent_rgb(latents, pixels)) / 127.5 - 1
    small = pixels.reshape(25, 8, 8, 8, 8, 3).mean((2, 4))
    # its weights are random: a third of what distinguishes pictures is still there in one matrix
    assert np.square(shown - small).mean() < 0.67 * np.square(small - small.mean((0, 1, 2))).mean()


@pytest.mark.slow
def test_the_pipeline_shows_every_step_of_every_picture(mapped, seen):
    """It equals the one from the latents that a callback sees; the last one is of the decoded latents."""
    pipe, latents = FluxPipeline.from_pretrained(mapped), []
    pipe(CAT, seed=7, callback_on_step_end=lambda p, i, t, kwargs: latents.append(kwargs["latents"]), **SIZE)
    assert [(step, steps, pixels.shape) for step, steps, pixels in seen] == [(n, 3, (1, 4, 6, 3)) for n in (1, 2, 3)]
    assert np.array_equal(seen[-1][2], colours(unpack(latents[-1], 6, 4), MAP))
    assert not np.array_equal(seen[0][2], colours(unpack(latents[0], 6, 4), MAP))
    final = seen[-1][2].astype(int)
    distance = [np.abs(pixels.astype(int) - final).mean() for *_, pixels in seen]
    assert distance[0] > distance[1] > distance[2] == 0
    several = []
    pipe(CAT, seed=[7, 8], num_images_per_prompt=2, preview=lambda *step: several.append(step[2]), **SIZE)
    assert several[0].shape == (2, 4, 6, 3)
    assert np.array_equal(several[1][:1], seen[1][2])


def test_whose_map_is_taken(pipe, mapped, tmp_path):
    assert pipe.folder.latent_rgb is None
    with pytest.raises(UsageError, match="`preview` needs latent_rgb"):
        pipe(CAT, preview=print, **SIZE)
    assert FluxPipeline.from_pretrained(mapped).folder.latent_rgb == tuple(map(tuple, MAP))
    big = open_model(mapped)
    big = replace(big, vae=replace(big.vae, sizes=FLUX_VAE), index=replace(big.index, latent_rgb=()))
    assert big.latent_rgb == presets.FLUX_LATENT_RGB
    assert [len(row) for row in presets.FLUX_LATENT_RGB] == [3] * 17
    for wrong, says in ((MAP[1:], "latent_rgb has 16 rows; expected 17"), ([[0, 1]], "rows that are not red, green")):
        shutil.copytree(mapped, tmp_path / "wrong", dirs_exist_ok=True)
        edit_json(tmp_path / "wrong" / "model_index.json", latent_rgb=wrong)
        with pytest.raises(ModelError, match=says):
            _ = FluxPipeline.from_pretrained(tmp_path / "wrong").folder.latent_rgb


@pytest.mark.slow
def test_a_preview_in_a_file_is_replaced_in_every_step_and_says_what_it_is(
    command, mapped, seen, tmp_path, monkeypatch
):
    from mlx_flux_krea.commands.shared.preview import Preview

    shown, call = [], Preview.__call__

    def watch(self, *step):
        call(self, *step)
        shown.append(Image.open(tmp_path / "now.png").convert("RGB"))

    monkeypatch.setattr(Preview, "__call__", watch)
    plain = command("generate", CAT, "-m", mapped, *OPTIONS, "-o", "plain.png")
    for _ in range(2):  # an earlier preview may be replaced
        code, out, err = command("generate", CAT, "-m", mapped, *OPTIONS, "--preview", "now.png", "--force")
        assert (plain[0], code, out) == (0, 0, "out.png\n"), err
    assert [levels(one, large(pixels)) for one, (*_, pixels) in zip(shown, seen + seen, strict=True)] == [0] * 6
    assert read_picture(tmp_path / "now.png")["source_type"] == "trainedAlgorithmicMedia"
    assert levels(Image.open(tmp_path / "out.png"), Image.open(tmp_path / "plain.png")) == 0
    shutil.copy(tmp_path / "plain.png", tmp_path / "mine.png")
    for name, says in (("mine.png", "is no preview"), ("nowhere/a.png", "there is no folder"), ("a.gif", "ends in")):
        code, out, err = command("generate", CAT, "-m", mapped, *OPTIONS, f"--preview={name}")
        assert (code, out, says in err) == (2, "", True), err


@pytest.mark.parametrize("terminal", ["TERM_PROGRAM=iTerm.app", "TERM=xterm-kitty"])
@pytest.mark.core("TERM_PROGRAM=iTerm.app")
def test_a_terminal_is_shown_every_step(mapped, seen, tmp_path, terminal):
    """Through a pseudo-terminal, and what it was sent decoded back to pixels."""
    variable, value = terminal.split("=")
    code, out, text = at_terminal(
        "generate", "--preview", CAT, "-m", mapped, *OPTIONS, cwd=tmp_path, **{variable: value}
    )
    assert (code, out) == (0, "out.png\n"), text
    if "kitty" in terminal:
        parts = re.findall(r"\x1b_G(?:a=T,f=100,r=\d+,C=1,i=1,q=2,)?m=(\d);([^\x1b]*)\x1b", text)
        data = "".join(chunk + "|" * (more == "0") for more, chunk in parts).split("|")[:-1]
    else:
        data = re.findall(r"File=inline=1;height=\d+;[^:]*:([^\x07]*)\x07", text)
    pictures = [Image.open(io.BytesIO(base64.b64decode(one))).convert("RGB") for one in data]
    assert [levels(one, large(pixels)) for one, (*_, pixels) in zip(pictures, seen, strict=True)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--check", "review"], "nobody may see these pictures before they are checked"),
        ([], "this is no terminal that shows pictures"),
    ],
)
@pytest.mark.slow
def test_where_there_can_be_no_preview_it_is_said_and_the_picture_is_made(command, mapped, tmp_path, options, says):
    code, _, err = command("generate", "--preview", CAT, "-m", mapped, *OPTIONS, *options)
    assert code == (5 if options else 0), err
    assert f"note: there is no preview: {says}" in err


@pytest.mark.slow
def test_models_without_a_map_and_those_that_need_filters_have_no_preview(command, model, mapped, tmp_path):
    _, _, err = command("generate", CAT, "-m", model, *OPTIONS, "--preview", "now.png")
    assert "note: there is no preview: this model has no latent_rgb" in err
    strict = tmp_path / "strict"
    shutil.copytree(mapped, strict)
    edit_json(strict / "model_index.json", filters="required")
    with pytest.raises(UsageError, match="`preview` is given, which shows unfinished pictures"):
        FluxPipeline.from_pretrained(strict)(CAT, preview=print, **SIZE)
    assert not (tmp_path / "now.png").exists()


@pytest.fixture
def filtered(mapped, tmp_path, monkeypatch):
    """The tiny pipeline as a model that requires filters, with both."""
    return judges.filtered_copy(mapped, tmp_path / "filtered", monkeypatch)


@pytest.mark.slow
def test_a_checked_preview_is_shown_only_if_both_filters_pass_exactly_that(filtered, home, monkeypatch):
    seen, judged = [], []
    pipe, score = FluxPipeline.from_pretrained(filtered), judges.Reader.images
    monkeypatch.setattr(judges.Reader, "images", lambda self, pixels: (judged.extend(pixels), score(self, pixels))[1])
    request = Request(prompt=CAT, num_inference_steps=5, seed=7, width=32, height=32)
    plain = pipe.generate(request, progress=False)
    judged.clear()
    made = pipe.generate(request, progress=False, checked_preview=lambda *one: seen.append(one))
    assert [one[:2] for one in seen] == [(2, 5), (4, 5)]
    assert all(np.array_equal(one[2][0], pixels) for one, pixels in zip(seen, judged, strict=False))
    assert np.array_equal(np.asarray(made.images[0]), np.asarray(plain.images[0]))
    red = np.zeros((1, 4, 4, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    monkeypatch.setattr(generator.previews, "colours", lambda *given: red)
    pipe.generate(request, progress=False, checked_preview=lambda *one: seen.append(one))
    assert len(seen) == 2
    events = [entry["event"] for entry in Log(home / "log").read()]
    assert (events.count("preview_passed"), events.count("preview_flagged")) == (2, 2)
    monkeypatch.setattr(
        judges.Eye, "images", lambda self, pixels: [{"normal": 0.5, "nsfw": float("nan")}] * len(pixels)
    )
    with pytest.raises(FiltersError):
        pipe.generate(request, progress=False, checked_preview=lambda *one: seen.append(one))
    reviewed = FluxPipeline.from_pretrained(filtered, check="review")
    reviewed.generate(request, progress=False, checked_preview=lambda *one: seen.append(one))
    assert len(seen) == 2
