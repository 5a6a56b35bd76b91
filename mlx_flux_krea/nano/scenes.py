"""The little world that the nano model draws: coloured shapes on plain or fading backgrounds, and sentences about them.

A scene is data; `draw` makes its picture, `describe` one of many sentences that say what is in it. Nothing here knows
a network. A sentence may leave out the background, the colour of a single thing, or how two things stand to each
other (`UNSAID`). Some combinations of shape, colour and background are held out: training never draws one, and the
benchmark asks for nothing else (`is_held_out`).
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 140, 32),
    "yellow": (250, 222, 64),
    "green": (46, 158, 72),
    "cyan": (72, 208, 220),
    "blue": (40, 72, 208),
    "purple": (130, 56, 176),
    "pink": (250, 150, 196),
    "white": (246, 246, 246),
    "black": (24, 24, 24),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
ADDED = ("heart",)  # shapes that the small model does not know: an adapter adds them
SIZES = {"small": 13, "medium": 18, "large": 23}  # half of the side, in pixels
PLACES = {  # of a single thing: fractions of the free width and height
    "in the middle": (0.5, 0.5),
    "on the left": (0.0, 0.5),
    "on the right": (1.0, 0.5),
    "at the top": (0.5, 0.0),
    "at the bottom": (0.5, 1.0),
    "in the top left corner": (0.0, 0.0),
    "in the top right corner": (1.0, 0.0),
    "in the bottom left corner": (0.0, 1.0),
    "in the bottom right corner": (1.0, 1.0),
}
RELATIONS = ("left of", "right of", "above", "below")  # of the first of two things to the second
THIRDS = ("above", "below")  # where a third thing is, when the first is left of the second
CANVASES = ((96, 96), (112, 80), (80, 112), (128, 64), (64, 128), (128, 96), (96, 128))
"""Width and height; the first is the native size."""
UNSAID = ("background", "colour", "place")
"""Parts that a sentence may leave out: the background of any scene, the colour of a single thing, the places of two."""
UNSAID_BACKGROUNDS = ("white", "blue", "yellow", "black")
"""A background that the sentence leaves out is plain, in the first of these colours that none of the things has."""
_GAP = 3  # pixels between things, and to the border


@dataclass(frozen=True)
class Thing:
    """One coloured shape."""

    shape: str
    colour: str
    size: str
    x: float  # of its centre, in pixels
    y: float


@dataclass(frozen=True)
class Scene:
    """The contents of a picture."""

    width: int
    height: int
    background: tuple[str, str]  # colours at the top and at the bottom; equal: a plain one
    things: tuple[Thing, ...]  # in the order of the sentence
    where: str | None  # of PLACES, RELATIONS or THIRDS, by the number of things; None: not said
    unsaid: tuple[str, ...] = ()  # of UNSAID


def is_held_out(shape: str, colour: str, background: tuple[str, str]) -> bool:
    """True for a combination that is kept for the benchmark: one in eight, equal on every machine."""
    return zlib.crc32(f"{shape} {colour} {background[0]} {background[1]}".encode()) % 8 == 0


def sample(
    rng: random.Random,
    things: int,
    canvas: tuple[int, int] = CANVASES[0],
    held_out: bool = False,
    unsaid: tuple[str, ...] = (),
    shapes: Sequence[str] = SHAPES,
) -> Scene:
    """A scene by chance.

    Args:
        rng: decides everything.
        things: 1 to 3.
        canvas: width and height.
        held_out: every combination is held out, or none is.
        unsaid: what its sentences leave out, of UNSAID.
        shapes: of its things, of SHAPES and ADDED.
    """
    while True:
        background = _background(rng)
        looks = [(rng.choice(shapes), rng.choice(list(COLOURS))) for _ in range(things)]
        if "background" in unsaid:
            background = _unsaid_background([colour for _, colour in looks])
        clear = all(stands_out(colour, background) for _, colour in looks) and len(set(looks)) == things
        if clear and all(is_held_out(s, c, background) is held_out for s, c in looks):
            break
    places = {1: (None, *PLACES), 2: RELATIONS, 3: THIRDS}[things]
    where = rng.choice(places)
    while True:
        sizes = [rng.choice(list(SIZES)) for _ in range(things)]
        centres = _place(rng, canvas, where, [SIZES[s] for s in sizes])
        if centres:
            break
    made = (Thing(*look, size, *centre) for look, size, centre in zip(looks, sizes, centres, strict=True))
    return Scene(*canvas, background, tuple(made), where, unsaid)


def _background(rng: random.Random) -> tuple[str, str]:
    top = rng.choice(list(COLOURS))
    return (top, top) if rng.random() < 0.7 else (top, rng.choice([c for c in COLOURS if c != top]))


def _unsaid_background(colours: list[str]) -> tuple[str, str]:
    free = next(c for c in UNSAID_BACKGROUNDS if c not in colours)
    return (free, free)


def stands_out(colour: str, background: tuple[str, str]) -> bool:
    """True for a colour that the background does not pass through."""
    c, top, bottom = (np.array(COLOURS[name], float) for name in (colour, *background))
    span = bottom - top
    nearest = top + span * np.clip((c - top) @ span / max(span @ span, 1), 0, 1)
    return bool(np.linalg.norm(c - nearest) > 70)


def _place(rng: random.Random, canvas, where: str | None, radii: list[int]) -> list[tuple[float, float]] | None:
    """Centres of things of these half sizes, or None where they do not fit this time."""
    width, height = canvas
    if len(radii) == 1:
        if where is None:
            fractions = (0.5 + rng.uniform(-0.35, 0.35), 0.5 + rng.uniform(-0.35, 0.35))
        else:
            fractions = tuple(min(max(f + rng.uniform(-0.08, 0.08), 0), 1) for f in PLACES[where])
        room = [side - 2 * (radii[0] + _GAP) for side in canvas]
        return [tuple(radii[0] + _GAP + f * r for f, r in zip(fractions, room, strict=True))]
    if len(radii) == 2:
        along_x = where in ("left of", "right of")
        first, second = (0, 1) if where in ("left of", "above") else (1, 0)
        points: list = [None, None]
        line = _row(rng, (width if along_x else height), [radii[first], radii[second]])
        if not line:
            return None
        for place, i in zip(line, (first, second), strict=True):
            across = height if along_x else width
            side = across / 2 + rng.uniform(-0.12, 0.12) * across
            side = min(max(side, radii[i] + _GAP), across - radii[i] - _GAP)
            points[i] = (place, side) if along_x else (side, place)
        return points
    pair = _row(rng, width, radii[:2])
    rows = _row(rng, height, [max(radii[:2]), radii[2]] if where == "below" else [radii[2], max(radii[:2])])
    if not pair or not rows:
        return None
    y_pair, y_third = rows if where == "below" else rows[::-1]
    third = min(max(width / 2 + rng.uniform(-0.15, 0.15) * width, radii[2] + _GAP), width - radii[2] - _GAP)
    return [(pair[0], y_pair), (pair[1], y_pair), (third, y_third)]


def _row(rng: random.Random, length: int, radii: list[int]) -> list[float] | None:
    """Two centres along a line, the free space shared by chance."""
    free = length - 2 * sum(radii) - 3 * _GAP
    if free < 0:
        return None
    shares = [rng.random() + 0.3 for _ in range(3)]
    before, between, _ = (free * s / sum(shares) for s in shares)
    a = _GAP + before + radii[0]
    return [a, a + radii[0] + _GAP + between + radii[1]]


# --- pictures ---


def draw(scene: Scene, times: int = 1) -> Image.Image:
    """The picture, with smooth edges; larger, so many times as wide and as high."""
    fine = 4 * times
    top, bottom = (np.array(COLOURS[c], float) for c in scene.background)
    share = np.linspace(0, 1, scene.height * fine)[:, None, None]
    rows = np.round(top * (1 - share) + bottom * share).astype(np.uint8)
    picture = Image.fromarray(np.broadcast_to(rows, (scene.height * fine, scene.width * fine, 3)).copy())
    for thing in scene.things:
        r = SIZES[thing.size] * fine
        left, top = int(thing.x * fine) - r - 1, int(thing.y * fine) - r - 1  # a stencil of its own is faster to paste
        stencil = Image.new("L", (2 * r + 4, 2 * r + 4))
        outline(ImageDraw.Draw(stencil), thing.shape, thing.x * fine - left, thing.y * fine - top, r)
        picture.paste(COLOURS[thing.colour], (left, top), stencil)
    return picture.resize((scene.width * times, scene.height * times), Image.Resampling.BOX)


def outline(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float) -> None:
    """Fills a shape of half side r around (x, y) on a stencil."""
    if shape in ("circle", "ring"):
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        if shape == "ring":
            pen.ellipse((x - 0.5 * r, y - 0.5 * r, x + 0.5 * r, y + 0.5 * r), fill=0)
    elif shape == "square":
        pen.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill=255)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + 0.85 * r), (x + r, y + 0.85 * r)], fill=255)
    elif shape == "star":
        turns = np.arange(10) * np.pi / 5 - np.pi / 2
        spokes = np.where(np.arange(10) % 2 == 0, r, 0.42 * r)
        pen.polygon([(x + s * np.cos(t), y + s * np.sin(t)) for s, t in zip(spokes, turns, strict=True)], fill=255)
    elif shape == "cross":
        pen.rectangle((x - r, y - 0.34 * r, x + r, y + 0.34 * r), fill=255)
        pen.rectangle((x - 0.34 * r, y - r, x + 0.34 * r, y + r), fill=255)
    elif shape == "heart":
        turns = np.linspace(0, 2 * np.pi, 60, endpoint=False)
        across = 16 * np.sin(turns) ** 3
        down = -13 * np.cos(turns) + 5 * np.cos(2 * turns) + 2 * np.cos(3 * turns) + np.cos(4 * turns) - 2.5
        pen.polygon([(x + a * r / 16, y + d * r / 16) for a, d in zip(across, down, strict=True)], fill=255)
    else:
        raise ValueError(f"[outline] shape {shape!r} is not one of {(*SHAPES, *ADDED)}.")


# --- sentences ---

_SAID: dict[str | None, tuple[str, ...]] = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_PLAIN = ("on {1} {0} background", "against {1} {0} background", "in front of {1} {0} background", "on plain {0}")
_FADING = ("on a background fading from {0} to {1}", "on a gradient from {0} at the top to {1} at the bottom")


def describe(scene: Scene, rng: random.Random) -> str:
    """One of the sentences that fit the scene."""
    names = [_name(thing, rng, "colour" not in scene.unsaid) for thing in scene.things]
    if "background" in scene.unsaid and rng.random() < 0.2:
        names = [name.split(" ", 1)[1] for name in names]
    plain = scene.background[0] == scene.background[1]
    top, bottom = scene.background
    ground = rng.choice(_PLAIN).format(top, _article(top)) if plain else rng.choice(_FADING).format(top, bottom)
    if "background" in scene.unsaid:
        ground = ""
    if len(names) == 1:
        what = names[0] if scene.where is None else f"{names[0]} {scene.where}"
        if ground and scene.where and rng.random() < 0.4:
            return _finish(f"{names[0]} {ground}, {scene.where}", rng)
    elif len(names) == 2:
        between = "and" if "place" in scene.unsaid else rng.choice(_SAID[scene.where])
        what = f"{names[0]} {between} {names[1]}"
    else:
        pair = f"{names[0]} {rng.choice(_SAID['left of'])} {names[1]}"
        what = f"{pair}, with {names[2]} {rng.choice(_SAID[scene.where])} them"
        if rng.random() < 0.5:
            what = f"{pair} and {names[2]} {scene.where} both"
    if not ground:
        return _finish(what, rng)
    return _finish(f"{what} {ground}" if len(names) < 3 or rng.random() < 0.5 else f"{what}, {ground}", rng)


def _name(thing: Thing, rng: random.Random, coloured: bool = True) -> str:
    size = "" if thing.size == "medium" and rng.random() < 0.8 else thing.size + " "
    words = f"{size}{thing.colour} {thing.shape}" if coloured else f"{size}{thing.shape}"
    return f"{_article(words)} {words}"


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def _finish(sentence: str, rng: random.Random) -> str:
    start = rng.choice(("", "", "a picture of ", "a drawing of ", "there is "))
    sentence = start + sentence
    if rng.random() < 0.3:
        sentence = sentence[0].upper() + sentence[1:]
    return sentence + rng.choice(("", "."))
