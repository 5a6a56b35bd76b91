"""Four seeds of one prompt, encoded once, saved with their records: python side_by_side.py [MODEL] [PIXELS]"""

import sys

from mlx_flux_krea import FluxPipeline

pipe = FluxPipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "nano")
side = int(sys.argv[2]) if len(sys.argv) > 2 else None  # None: the model's own size
result = pipe(
    "a large red star on a white background",
    num_images_per_prompt=4,
    seed=[1, 2, 3, 4],  # a stream for each: any of them can be made again alone
    width=side,
    height=side,
)
for seed, picture in zip(result.seeds, result.images, strict=True):
    picture.save(f"star-{seed}.png")
    print(f"star-{seed}.png", picture.record["num_inference_steps"], "steps")
