"""Shows how far each step moves the picture, and stops when it hardly moves: python watch_and_stop.py MODEL [PIXELS]"""

import sys

import mlx.core as mx

from mlx_flux_krea import FluxPipeline
from mlx_flux_krea.errors import Interrupted

pipe = FluxPipeline.from_pretrained(sys.argv[1])
side = int(sys.argv[2]) if len(sys.argv) > 2 else None
before = None


def watch(pipe, step, timestep, kwargs):
    """Called after every step, in the pipeline's thread."""
    global before
    latents = kwargs["latents"]
    if before is not None:
        moved = float(mx.abs(latents - before).mean())
        print(f"step {step}, noise {timestep / 1000:.2f}: moved by {moved:.4f}")
        if moved < 0.05:
            pipe.interrupt()
    before = latents


try:
    result = pipe("a lighthouse in a storm", seed=3, width=side, height=side, callback_on_step_end=watch)
    result.images[0].save("lighthouse.png")
    print("lighthouse.png")
except Interrupted:
    print("stopped")
