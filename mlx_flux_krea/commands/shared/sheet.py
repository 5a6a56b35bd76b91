"""Contact sheets: a grid of small pictures with labels at its edges."""

import contextlib
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mlx_flux_krea.errors import UsageError
from mlx_flux_krea.filters.judges import unknown_installed
from mlx_flux_krea.filters.ledger import Ledger, pixel_hash
from mlx_flux_krea.provenance import Picture, opened, read_picture

from .jobs import PictureJob

_GAP = 4  # pixels between pictures
_TEXT = 14  # pixels, height of the letters
_SIDE = 512  # pixels, the longest side of a picture in a sheet


def thumbnail(encoded: bytes) -> Picture:
    """Reads a picture's file at its size in a sheet; small ones stay as they are.

    A run that was interrupted has nothing but files to read, so that the others are read back too: the sheet is the
    same, even where a format loses something.

    Raises:
        UsageError: not a picture.
    """
    record = read_picture(io.BytesIO(encoded))["record"] or {}
    with opened(io.BytesIO(encoded)) as file:
        return Picture.from_pixels(small(file.convert("RGB")), record)


def sheet_of(made: list[tuple[PictureJob, Picture]]) -> Picture:
    """Makes the contact sheet of a run, with a row for each prompt."""
    grid: dict[int, list[tuple[PictureJob, Picture]]] = {}
    for job, picture in made:
        grid.setdefault(job.row, []).append((job, picture))
    seeds = {tuple(f"seed {job.seed}" for job, _ in row) for row in grid.values()}
    rows = [[picture for _, picture in row] for row in grid.values()]
    across = list(seeds.pop()) if len(seeds) == 1 else [str(n + 1) for n in range(max(map(len, rows)))]
    return contact_sheet(rows, across, [textwrap.shorten(row[0][0].label, 32) for row in grid.values()])


def contact_sheet(rows: list[list[Picture]], across: list[str], down: list[str]) -> Picture:
    """Makes a grid of pictures of one size.

    Args:
        rows: the pictures, row by row.
        across: a label for each column.
        down: a label for each row.

    Returns:
        The sheet, with the record of the first picture and the labels under "sheet".
    """
    font = ImageFont.load_default(_TEXT)
    first = rows[0][0]
    left = max(int(font.getlength(label)) for label in down) + 2 * _GAP
    top = _TEXT + 2 * _GAP
    wide, high = first.width + _GAP, first.height + _GAP
    sheet = Image.new("RGB", (left + wide * len(across), top + high * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, label in enumerate(across):
        pen.text((left + column * wide + first.width // 2, top // 2), label, "black", font, anchor="mm")
    for row, label in enumerate(down):
        pen.text((left - 2 * _GAP, top + row * high + first.height // 2), label, "black", font, anchor="rm")
        for column, picture in enumerate(rows[row]):
            sheet.paste(picture, (left + column * wide, top + row * high))
    return Picture.from_pixels(sheet, first.record | {"sheet": {"across": across, "down": down}})


def small(picture: Image.Image) -> Image.Image:
    """Returns a picture at its size in a sheet; small ones stay as they are."""
    if (scale := _SIDE / max(picture.size)) >= 1:
        return picture
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


def read_all(paths: list[Path]) -> list[Image.Image | None]:
    """Reads pictures; None for those that cannot be read."""
    found: list[Image.Image | None] = []
    for path in paths:
        found.append(None)
        with contextlib.suppress(UsageError), opened(path) as file:
            found[-1] = file.convert("RGB")
            found[-1].thumbnail((_SIDE, _SIDE))
    return found


def numbered_sheet(pictures: Sequence[Image.Image | None], across: int = 6, side: int = 256) -> Image.Image:
    """Makes a grid of pictures of any size, to find them by their numbers, from 1.

    Args:
        pictures: None leaves its place empty.
        across: pictures in a row.
        side: pixels of a place.
    """
    high, font = side + _TEXT + 2 * _GAP, ImageFont.load_default(_TEXT)
    wide = min(across, len(pictures)) * (side + _GAP) + _GAP
    sheet = Image.new("RGB", (wide, -(-len(pictures) // across) * high), "white")
    pen = ImageDraw.Draw(sheet)
    for place, picture in enumerate(pictures):
        row, column = divmod(place, across)
        left, top = column * (side + _GAP) + _GAP, row * high
        pen.text((left + side // 2, top + high - side - _TEXT // 2 - _GAP), str(place + 1), "black", font, anchor="mm")
        if picture is not None:
            fitted = picture.copy()
            fitted.thumbnail((side, side))
            sheet.paste(fitted, (left + (side - fitted.width) // 2, top + high - side + (side - fitted.height) // 2))
    return sheet


def note_sheet(sheet: Picture, is_filtered: bool) -> None:
    """Records in the log that a sheet of released pictures will be saved.

    Args:
        sheet: the contact sheet.
        is_filtered: filters judged its pictures; the log names those that are not the published ones.

    Raises:
        FiltersError: the log cannot be written.
    """
    unknown = unknown_installed() if is_filtered else []
    facts: dict[str, Any] = {"unknown_filters": unknown} if unknown else {}
    Ledger().log.append("sheet", pixels=pixel_hash(np.asarray(sheet)), **facts)
