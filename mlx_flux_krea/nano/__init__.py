"""A small model of our own in FLUX.1's architecture, and how it was trained. `model/` is an ordinary model folder."""

from pathlib import Path

FOLDER = Path(__file__).parent / "model"
