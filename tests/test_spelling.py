"""Messages name arguments as the place spells them: in Python in backquotes, on the command line as options."""

import ast
import dataclasses
import logging
import re

import pytest
from helpers import ROOT
from PIL import Image

from mlx_flux_krea import Request
from mlx_flux_krea.commands.shared.options import ARGUMENTS, BY_NAME, spelled, with_option_names
from mlx_flux_krea.commands.shared.terminal import Console
from mlx_flux_krea.errors import UsageError

FIELDS = [field.name for field in dataclasses.fields(Request)]
OPTIONS = {ARGUMENTS.get(name, name): spelled(name) for name in BY_NAME}  # by the name of the library's argument
# names that nobody would write as a word of English: they must be in backquotes wherever a message has them
PYTHON = [name for name in [*FIELDS, *OPTIONS] if "_" in name]

BAD = {  # for each argument that an option sets, calls that are refused because of it
    "prompt": [{"prompt": 5}, {"prompt": []}, {"prompt": [1]}, {"prompt": "\udcff"}],
    "width": [{"width": -1}, {"width": "wide"}],
    "height": [{"height": -1}, {"height": 0.5}],
    "num_inference_steps": [{"num_inference_steps": 0}, {"num_inference_steps": "x"}],
    "guidance_scale": [{"guidance_scale": -1}, {"guidance_scale": float("nan")}],
    "num_images_per_prompt": [{"num_images_per_prompt": 0}],
    "seed": [{"seed": -1}, {"seed": [1, "x"], "num_images_per_prompt": 2}],
    "noise": [{"noise": 3}],
    "negative_prompt": [{"negative_prompt": 5}, {"negative_prompt_2": "a", "true_cfg_scale": 3}],
    "true_cfg_scale": [{"true_cfg_scale": -1}, {"true_cfg_scale": 3}, {"negative_prompt": "a"}],
    "image": [{"image": 3}],
    "strength": [{"strength": 0.5}, {"strength": 3}],
    "mask_image": [{"mask_image": 3}, {"mask_image": Image.new("L", (8, 8))}],
    "expand": [{"expand": 8}],
    "padding_mask_crop": [{"padding_mask_crop": 8}],
    "soft_mask": [{"soft_mask": True}, {"soft_mask": 3}],
    "paste": [{"paste": False}],
    "control_image": [{"control_image": 3}, {"control_image": Image.new("RGB", (8, 8))}],
    "control": [{"control": "canny"}, {"control": "pose"}],
    "fit": [{"fit": "crop"}, {"fit": 3}],
    "auto_resize": [{"auto_resize": False}],
    "style_rule": [{"style_rule": "grid"}],
    "upscale": [{"upscale": 5}, {"upscale": "x"}, {"upscale": 2, "control_image": Image.new("RGB", (8, 8))}],
    "watermark": [{"watermark": 1}, {"watermark": True, "width": 48, "height": 32}],
    "solver": [{"solver": "lms"}, {"solver": 3}, {"solver": "heun", "cache": "skip"}, {"solver": "heun", "fast": True}],
    "schedule": [{"schedule": "karras"}, {"schedule": "beta", "num_inference_steps": 1000}],
    "cache": [{"cache": "tea"}, {"cache": 3}, {"cache": "skip", "fast": True}, {"cache": "skip", "solver": "heun"}],
    "fast": [{"fast": 1}, {"fast": True, "cache": "skip"}, {"fast": True, "solver": "heun"}],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_replaces_its_argument(name):
    assert with_option_names(f"`{name}` is 3; set `{name}`") == f"{OPTIONS[name]} is 3; set {OPTIONS[name]}"


def test_other_names_lose_their_backquotes_and_quoted_texts_stay():
    assert with_option_names("`sigmas` of `prompt_embeds`") == "sigmas of prompt_embeds"
    for text in ("not read: 'set `width` to'", 'it holds "`width`"', "'a \\' `width`' is", "run `flux-krea setup`"):
        assert with_option_names(text) == text
    assert (
        with_option_names("the model's `width` and its users' `height`")
        == "the model's --width and its users' --height"
    )


@pytest.mark.parametrize("argument", sorted(OPTIONS.keys() & set(FIELDS)))
def test_what_python_refuses_is_refused_in_the_spelling_of_the_command_line(pipe, argument):
    for call in BAD[argument]:
        with pytest.raises(UsageError) as refused:
            pipe(**{"prompt": "a cat"} | call)
        assert f"`{argument}`" in str(refused.value)
        shown = with_option_names(str(refused.value))
        assert OPTIONS[argument] in shown
        without_options = shown.replace("negative_prompt_2", "")  # an argument without an option
        assert not re.search(rf"`|\b({'|'.join(name for name in PYTHON if name in OPTIONS)})\b", without_options), shown


def test_no_message_of_a_request_names_an_argument_without_backquotes():
    """In all texts of its errors, whether a test makes them appear or not."""
    tree = ast.parse((ROOT / "mlx_flux_krea" / "request.py").read_text())
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "UsageError"]
    texts = [text.value for call in calls for text in ast.walk(call) if isinstance(text, ast.Constant)]
    assert len(calls) > 20
    for text in filter(lambda text: isinstance(text, str), texts):
        bare = re.sub(r"`[^`]*`", "", text)
        assert not re.search(rf"\b({'|'.join(PYTHON)})\b", bare), text


def test_notes_of_the_library_are_shown_once_and_in_the_same_spelling(capsys):
    console, logger = Console(), logging.getLogger("mlx_flux_krea")
    before = logger.handlers, logger.propagate
    with console.library_notes():
        for _ in range(2):
            logger.warning("`guidance_scale` does nothing")
    assert capsys.readouterr().err == "note: --guidance does nothing\n"
    assert (logger.handlers, logger.propagate) == before
    with console.library_notes():
        logger.warning("`guidance_scale` does nothing")
    assert capsys.readouterr().err == "note: --guidance does nothing\n"


def test_two_consoles_share_nothing(capsys):
    events, lines = Console(as_events=True), Console()
    events.say("one")
    lines.say("two")
    assert capsys.readouterr().err == '{"event": "said", "text": "one"}\ntwo\n'
