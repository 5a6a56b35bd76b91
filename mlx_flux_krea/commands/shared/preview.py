"""What a run shows of a picture while it is drawn: in the terminal, or in a file."""

import io
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from mlx_flux_krea.errors import UsageError
from mlx_flux_krea.provenance import FORMATS, SOFTWARE, Picture, read_record

from .options import IN_TERMINAL
from .terminal import inline_picture, note, say, telling_events

_ROWS = 16  # lines of a terminal that a preview takes
_SCALE = 8  # pixels of the picture for one of its latents


def make_preview(target: str | None, pipe) -> "Preview | None":
    """What shows the steps of a pipeline's pictures; None: nothing does, and a note says why.

    Args:
        target: of --preview.
        pipe: the pipeline.

    Raises:
        UsageError: a file that a preview may not replace, or cannot be.
    """
    if target is None:
        return None
    if target != IN_TERMINAL:
        check_target(Path(target))
    if pipe.policy:
        note("there is no preview: these pictures are shown to nobody before they were judged")
    elif pipe.folder.latent_rgb is None:
        note("there is no preview: this model says of its autoencoder no latent_rgb")
    elif target == IN_TERMINAL and (telling_events() or not sys.stderr.isatty() or not inline_picture(b"")):
        note(
            "there is no preview: this is no terminal that shows pictures (iTerm2, kitty); name a file: --preview FILE"
        )
    else:
        return Preview(target)
    return None


def check_target(path: Path) -> None:
    """Refuses a file that is not a preview's.

    Raises:
        UsageError: of another format, in no folder, or something else than a preview stands there.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--preview {path} ends in {path.suffix or 'nothing'!r}", f"one of {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}", "one that exists")
    if path.exists() and not (read_record(path) or {}).get("preview"):
        raise UsageError(f"{path} exists, and is no preview", "a name that is free, or an earlier preview's")


class Preview:
    """Shows what the pipeline predicts; see `FluxPipeline.__call__`."""

    def __init__(self, target: str):
        self._target = target
        self._step = 0

    def __call__(self, step: int, total: int, pixels: np.ndarray) -> None:
        """One step's (B, h, w, 3) uint8."""
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
        if step <= self._step or not self._step:  # of a new picture: lines of its own, above that of the progress
            say("\n" * (rows - 1))
        self._step = step
        sys.stderr.write(f"\x1b7\x1b[{rows}A\r{inline_picture(data.getvalue(), rows)}\x1b8")
        sys.stderr.flush()
