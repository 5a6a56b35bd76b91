"""Prompts and seeds in help, examples and pages, collected from these files: the small model draws each of them right.

A prompt that names one of its shapes is meant for it. The others (a frog) are for the real model, and no command or
example that shows one names the small model.
"""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nano as judging
import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from mlx_flux_krea import FluxPipeline
from mlx_flux_krea.nano import scenes
from mlx_flux_krea.provenance import read_record

PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"])
SOURCES = sorted([*(ROOT / "examples").glob("*.py"), *(ROOT / "mlx_flux_krea").glob("*.py")])
COLOURS, SHAPES = ("|".join(names) for names in (scenes.COLOURS, scenes.SHAPES))


@dataclass(frozen=True)
class Expected:
    """The things of a sentence and its background; None: any colour."""

    things: tuple[tuple[str, str | None], ...]
    relation: str | None
    background: str | None


def expected(prompt: str) -> Expected:
    """Reads a sentence as `scenes.describe` writes it, or as a person does."""
    things = tuple((shape, colour or None) for colour, shape in re.findall(rf"(?:({COLOURS}) )?({SHAPES})\b", prompt))
    ground = re.search(rf"\bon (?:an? )?(?:plain )?({COLOURS})\b(?! ({SHAPES}))", prompt)
    relation = re.search(r"\b(left of|right of|above|below)\b", prompt)
    return Expected(things, relation and relation[1], ground and ground[1])


def faults(picture, prompt: str) -> list[str]:
    """Lists the faults of a picture of a prompt; none: it is right."""
    pixels, wanted = np.array(picture), expected(prompt)
    ground, seen = judging.background(pixels), judging.look(pixels)
    found = {judging.nearest(ground[0]), judging.nearest(ground[-1])}
    wrong = [f"the background is {found}"] if wanted.background and found != {wanted.background} else []
    if len(seen) != len(wanted.things):
        return [*wrong, f"{len(seen)} things and not {len(wanted.things)}"]
    order = []
    for shape, colour in wanted.things:
        fits = [one for one in seen if one.shape == shape and colour in (None, one.colour) and one not in order]
        order += fits[:1]
        round_enough = fits and fits[0].fit >= (0.9 if shape == "circle" else 0.6)
        if not round_enough or not 0.8 < fits[0].width / fits[0].height < 1.25:
            wrong.append(f"no good {colour} {shape} among {seen}")
    if wanted.relation and len(order) == 2:
        (x, y), (other_x, other_y) = ((one.x, one.y) for one in order)
        places = {"left of": x < other_x, "right of": x > other_x, "above": y < other_y, "below": y > other_y}
        wrong += [] if places[wanted.relation] else [f"the first is not {wanted.relation} the second"]
    return wrong


def is_for_the_small_model(prompt: str) -> bool:
    return bool(re.search(rf"\b({SHAPES})\b", prompt))


def commands() -> Iterator[str]:
    """Yields the commands of pages that draw a prompt, once each."""
    lines = {}
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        found = re.findall(r"^ *(?:\$ )?flux-krea (?:demo|generate)\b[^\n]*", text, re.MULTILINE)
        lines |= dict.fromkeys(line.strip().removeprefix("$ ") for line in found)
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[1:] == ["demo"] or (len(words) > 2 and " " in words[2]):
            yield line


def calls() -> Iterator[tuple[str, str, dict]]:
    """Yields place, prompt and arguments of calls of a pipeline in examples, docstrings and pages."""
    for path in (*SOURCES, *PAGES):
        text = path.read_text()
        for call in re.finditer(r"\bpipe\(\s*\"[^\"\n]+\"(?:[^()]|\([^()]*\))*\)", text):
            try:
                tree = ast.parse(call[0]).body[0].value
            except SyntaxError:
                continue
            arguments = {word.arg: word.value for word in tree.keywords}
            known = {n: ast.literal_eval(v) for n, v in arguments.items() if isinstance(v, ast.Constant | ast.List)}
            if not {"image", None} & arguments.keys():  # else the picture follows from another
                yield f"{path.relative_to(ROOT)}", tree.args[0].value, known


COMMANDS = list(commands())
ELSEWHERE = ("flux-krea demo", *(ROOT / "docs" / "fewer-steps.md").read_text().splitlines())  # test_readme draws these
CALLS = [(place, prompt, given) for place, prompt, given in calls() if is_for_the_small_model(prompt)]


def test_prompts_are_found_where_they_stand():
    """Else the tests below would check nothing."""
    assert "flux-krea demo" in COMMANDS
    assert len([line for line in COMMANDS if is_for_the_small_model(line)]) >= 3
    assert {"examples/side_by_side.py", "examples/watch_and_stop.py", "examples/from_an_image.py"} <= {
        c[0] for c in CALLS
    }
    assert any(place == "docs/python.md" for place, _, _ in CALLS)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_for_the_small_model_names_it_and_a_seed(line):
    words = shlex.split(line, comments=True)
    if words[1] == "generate" and is_for_the_small_model(words[2]):
        assert "nano" in words
        assert "--seed" in words
    elif words[1] == "generate":
        assert "nano" not in words or "--lora" in words  # an adapter knows more than the model


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a red circle on a blue background", Expected((("circle", "red"),), None, "blue")),
        ("a large yellow star above a small pink ring on plain black", Expected(
            (("star", "yellow"), ("ring", "pink")), "above", "black")),
        ("a ring", Expected((("ring", None),), None, None)),
        ("a star to the left of a white cross", Expected((("star", None), ("cross", "white")), "left of", None)),
    ],
)  # fmt: skip
def test_sentences_are_read(prompt, wanted):
    assert expected(prompt) == wanted


def test_the_judge_sees_what_is_wrong():
    picture = Image.new("RGB", (96, 96), scenes.COLOURS["blue"])
    scenes_circle = judging.ImageDraw.Draw(picture)
    scenes_circle.ellipse((20, 30, 60, 70), fill=scenes.COLOURS["red"])
    assert faults(picture, "a red circle on a blue background") == []
    for prompt in ("a red circle on a pink background", "a red square", "a green circle", "a red circle above a star"):
        assert faults(picture, prompt), prompt
    scenes_circle.rectangle((20, 60, 60, 70), fill=scenes.COLOURS["red"])  # lumpy
    assert faults(picture, "a red circle on a blue background")


def stands_alone(line):
    """Tells commands whose picture does not follow from another."""
    return is_for_the_small_model(line) and "--image" not in line


@pytest.mark.slow
@pytest.mark.parametrize("line", [one for one in COMMANDS if stands_alone(one) and one not in ELSEWHERE])
def test_commands_draw_their_prompts_right(command, tmp_path, line):
    code, out, err = command(*shlex.split(line, comments=True)[1:])
    assert code == 0, err
    judged = 0
    for path in map(Path, out.splitlines()):
        record = read_record(path)
        if "sheet" not in record and not path.stem.endswith(("-large", "-sheet")):
            assert faults(Image.open(path), record["prompt"]) == [], (path, record["prompt"], record["seed"])
            judged += 1
    assert judged


@pytest.mark.slow
@pytest.mark.parametrize(("place", "prompt", "given"), [call for call in CALLS if not call[0].startswith("examples/")])
def test_calls_draw_their_prompts_right(place, prompt, given):
    size = {name: given[name] for name in ("width", "height", "num_inference_steps") if given.get(name)}
    seeds = given["seed"] if isinstance(given["seed"], list) else [given["seed"]]
    pipe = FluxPipeline.from_pretrained("nano")
    for seed in seeds:
        picture = pipe(prompt, seed=seed, **size).images[0]
        assert faults(picture, prompt) == [], (place, prompt, seed)
