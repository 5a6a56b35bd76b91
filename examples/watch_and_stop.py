"""Watches the picture settle, and stops once it has: python watch_and_stop.py [MODEL] [PIXELS]

Latents move least at the start, where they are mostly noise. So this looks at the finished picture that each step heads
for: the latents minus the noise that is left in them, which the last step's direction tells.
"""

import sys

import mlx.core as mx

from mlx_flux_krea import FluxPipeline
from mlx_flux_krea.errors import Interrupted

pipe = FluxPipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "nano")
side = int(sys.argv[2]) if len(sys.argv) > 2 else None
latents, levels, heading = [], [], None  # before each step, and its noise level


def watch(pipe, step, timestep, kwargs):
    """Called after every step, in the pipeline's thread, with the noise level before it."""
    global heading
    levels.append(timestep / 1000)
    if len(latents) > 1:
        (older, newer), (high, low) = latents[-2:], levels[-2:]
        direction = (newer - older) / (low - high)
        before, heading = heading, newer - low * direction
        moved = float(mx.abs(heading - before).mean()) if before is not None else float("nan")
        print(f"step {step}, noise {low:.2f}: the picture ahead moved by {moved:.4f}")
        if moved < 0.01 and low < 0.5:
            pipe.interrupt()
    latents.append(kwargs["latents"])


try:
    result = pipe(
        "a large yellow ring on a purple background", seed=3, width=side, height=side, callback_on_step_end=watch
    )
    result.images[0].save("ring.png")
    print("ring.png")
except Interrupted:
    print("stopped")
