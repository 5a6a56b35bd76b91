"""Makes the cases of `watermark/` with the public implementation: pip install invisible-watermark PyWavelets.

    python tests/data/make_watermark.py

A screen (surfaces of one colour, letters), one colour, and colours whose rows are no multiple of a block. NAME.png is
marked as flux/util.py marks it, in float32, and then rounded: NAME-marked.png.
"""

from pathlib import Path

import numpy as np
from imwatermark import WatermarkEncoder
from PIL import Image

HERE = Path(__file__).parent
BITS = [int(bit) for bit in bin(0b001010101111111010000111100111001111010100101110)[2:]]


def pictures():
    screen = Image.open(HERE.parents[1] / "docs" / "page.png").convert("RGB")
    yield "page", np.asarray(screen.crop((300, 200, 556, 470)))
    yield "flat", np.tile(np.array([[[200, 30, 70]]], np.uint8), (256, 272, 1))
    small = np.random.default_rng(5).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    yield "colours", np.asarray(Image.fromarray(small).resize((256, 263), Image.Resampling.BICUBIC))


def main() -> None:
    encoder = WatermarkEncoder()
    encoder.set_watermark("bits", BITS)
    for name, pixels in pictures():
        marked = encoder.encode(pixels.astype(np.float32)[..., ::-1].copy(), "dwtDct")[..., ::-1]
        marked = np.rint(255 * np.clip(marked / 255, 0, 1)).astype(np.uint8)
        for ending, array in (("", pixels), ("-marked", marked)):
            Image.fromarray(array).save(HERE / "watermark" / f"{name}{ending}.png", optimize=True)


if __name__ == "__main__":
    main()
