"""A picture, and three that start from it and go further and further: python from_an_image.py [MODEL] [PIXELS]"""

import sys

from mlx_flux_krea import FluxPipeline

pipe = FluxPipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "nano")
side = int(sys.argv[2]) if len(sys.argv) > 2 else None
first = pipe("a large white star on a blue background", seed=7, width=side, height=side).images[0]
first.save("star.png")
for strength in (0.3, 0.6, 0.9):
    result = pipe(
        "a large green circle on a blue background", image=first, strength=strength, seed=7, width=side, height=side
    )
    result.images[0].save(f"circle-{strength:g}.png")
    print(f"circle-{strength:g}.png")
