"""Eight prompts for the small trained model, and a check that a picture shows its prompt."""

import nano as judging
import numpy as np

THINGS = [
    ("a red circle on a blue background", [("circle", "red")], "blue"),
    ("a large yellow star on a purple background", [("star", "yellow")], "purple"),
    ("a large white square on a green background", [("square", "white")], "green"),
    ("a black triangle in front of a pink background", [("triangle", "black")], "pink"),
    ("a cyan cross in the top left corner on a red background", [("cross", "cyan")], "red"),
    ("a green ring on plain yellow", [("ring", "green")], "yellow"),
    (
        "a red square to the left of a white circle on a blue background",
        [("square", "red"), ("circle", "white")],
        "blue",
    ),
    ("a blue circle above a pink square on a white background", [("circle", "blue"), ("square", "pink")], "white"),
]


def is_right(picture, things, background) -> bool:
    """Returns True if the picture shows these things on this background, in any size and place."""
    pixels = np.array(picture)
    ground = judging.background(pixels)
    seen = sorted((s.shape, s.colour) for s in judging.look(pixels))
    return seen == sorted(things) and {judging.nearest(ground[0]), judging.nearest(ground[-1])} == {background}
