"""Contact sheets: a grid of small pictures with labels at its edges."""

import textwrap
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mlx_flux_krea.filters.judges import unknown_installed
from mlx_flux_krea.filters.ledger import Ledger, pixel_hash
from mlx_flux_krea.provenance import Picture

from .jobs import PictureJob

_GAP = 4  # pixels between pictures
_TEXT = 14  # pixels, height of the letters
_SIDE = 512  # pixels, the longest side of a picture in a sheet


def thumbnail(picture: Picture) -> Picture:
    """Returns the picture at its size in a sheet; small ones stay as they are."""
    scale = _SIDE / max(picture.size)
    if scale >= 1:
        return picture
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return Picture.from_pixels(picture.resize(size, Image.Resampling.LANCZOS), picture.record)


def sheet_of(made: list[tuple[PictureJob, Picture]]) -> Picture:
    """Makes the contact sheet of a run, with a row for each prompt."""
    grid: dict[int, list[tuple[PictureJob, Picture]]] = {}
    for job, small in made:
        grid.setdefault(job.row, []).append((job, small))
    seeds = {tuple(f"seed {job.seed}" for job, _ in row) for row in grid.values()}
    rows = [[small for _, small in row] for row in grid.values()]
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
