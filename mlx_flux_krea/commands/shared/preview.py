"""Previews of a picture while it is generated: in the terminal, or in a file."""

import io
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from mlx_flux_krea import FluxPipeline
from mlx_flux_krea.errors import UsageError
from mlx_flux_krea.provenance import FORMATS, SOFTWARE, Picture, read_record

from .options import IN_TERMINAL
from .terminal import Console, inline_picture

_ROWS = 16  # lines of a terminal that a preview takes
_SCALE = 8  # pixels of the picture for each latent


def make_preview(target: str | None, pipe: FluxPipeline, console: Console) -> "Preview | None":
    """Makes the preview of a pipeline; None: there is none, and a note gives the reason.

    Args:
        target: value of --preview.
        pipe: the pipeline.
        console: where notes are written.

    Raises:
        UsageError: the file cannot be written, or a preview may not replace it.
    """
    if target is None:
        return None
    if target != IN_TERMINAL:
        check_target(Path(target))
    if pipe.policy:
        console.note("there is no preview: nobody may see these pictures before they are checked")
    elif pipe.folder.latent_rgb is None:
        console.note("there is no preview: this model has no latent_rgb, which maps latents to colours")
    elif target == IN_TERMINAL and (console.as_events or not sys.stderr.isatty() or not inline_picture(b"")):
        console.note(
            "there is no preview: this is no terminal that shows pictures (iTerm2, kitty); name a file: --preview FILE"
        )
    else:
        return Preview(target, console)
    return None


def check_target(path: Path) -> None:
    """Checks that a preview may be written to a file.

    Raises:
        UsageError: another format, no such folder, or a file that is not a preview.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--preview {path} ends in {path.suffix or 'nothing'!r}", f"one of {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}", "one that exists")
    if path.exists() and not (read_record(path) or {}).get("preview"):
        raise UsageError(f"{path} exists, and is no preview", "a free name, or an earlier preview")


class Preview:
    """Shows the predicted picture after each step; a `preview` of `FluxPipeline.__call__`.

    Args:
        target: a file, or IN_TERMINAL.
        console: the terminal.
    """

    def __init__(self, target: str, console: Console):
        self._target, self._console = target, console
        self._step = 0

    def __call__(self, step: int, total: int, pixels: np.ndarray) -> None:
        """Shows (B, h, w, 3) uint8 pixels."""
        small = Image.fromarray(pixels[0])
        size = (small.width * _SCALE, small.height * _SCALE)
        picture = Picture.from_pixels(
            small.resize(size, Image.Resampling.BICUBIC), {"software": SOFTWARE, "preview": [step, total]}
        )
        if self._target != IN_TERMINAL:
            picture.save(self._target)
            return
        data = io.BytesIO()
        picture.save(data, "PNG")
        rows = min(_ROWS, shutil.get_terminal_size().lines - 4)
        if step <= self._step or not self._step:  # a new picture gets its own lines above the progress line
            self._console.say("\n" * (rows - 1))
        self._step = step
        sys.stderr.write(f"\x1b7\x1b[{rows}A\r{inline_picture(data.getvalue(), rows)}\x1b8")
        sys.stderr.flush()
