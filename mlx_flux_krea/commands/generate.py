"""flux-krea generate: pictures from prompts."""

import json
from pathlib import Path

import click

from mlx_flux_krea import presets
from mlx_flux_krea.errors import FluxKreaError, UsageError, printable

from . import signals
from .output import check_outcomes, check_output, names_from, save


@click.command()
@click.argument("prompt")
@click.option("-m", "--model", help="A model folder, or the name of an installed one.  [default: the only one]")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default="out.png", show_default=True, help="PNG, JPEG or WebP."
)
@click.option("--width", type=int, help="Pixels, a multiple of 16.  [default: the model's]")
@click.option("--height", type=int, help="Pixels, a multiple of 16.  [default: the model's]")
@click.option("--steps", type=int, help="Number of steps.  [default: the model's]")
@click.option("--guidance", type=float, help="How closely to follow the prompt.  [default: the model's]")
@click.option("--seed", type=int, help="Repeats a picture.  [default: a new one, which is shown]")
@click.option(
    "-n", "--num-images", type=click.IntRange(1, 1000), default=1, show_default=True, help="With seeds that count up."
)
@click.option(
    "--noise", default="diffusers", show_default=True, help="Whose seed: diffusers, bfl, comfy, mflux, mlx-examples."
)
@click.option("--negative-prompt", help="What to move away from; needs --true-cfg-scale.")
@click.option(
    "--true-cfg-scale", type=float, default=1.0, show_default=True, help="Above 1: doubles the time of a step."
)
@click.option("--image", type=click.Path(path_type=Path), help="An image to start from.")
@click.option("--strength", type=float, help=f"How far to go from the image, 0 to 1.  [default: {presets.STRENGTH}]")
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Compute type.  [default: the model's]"
)
@click.option("--quality", type=int, help="1 to 100, of JPEG and WebP.  [default: 95]")
@click.option(
    "--metadata", type=click.Choice(["full", "minimal"]), default="full", show_default=True,
    help="What the picture's file tells: all that made it, or only that a machine did.",
)  # fmt: skip
@click.option(
    "--check", type=click.Choice(["filters", "review", "both"]),
    help="Who looks before a picture is released; review: you do.  [default: filters, if the licence asks for any]",
)  # fmt: skip
@click.option("--nsfw-threshold", type=float, help="A picture passes below it; at most 0.85.  [default: 0.85]")
@click.option("--integrity-margin", type=float, help="How clear the filter's no must be; 0 or more.  [default: 0]")
@click.option("--force", is_flag=True, help="Replace the output, also a link; otherwise the next free name is taken.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of paths.")
def generate(prompt, model, output, num_images, dtype, image, quality, metadata, force, as_json, **options):
    """Make a picture from PROMPT.

    \b
    Example:
      flux-krea generate "a frog holding a sign" --seed 7 -o frog.png
    """
    from mlx_flux_krea.commands.terminal import PipelineProgress, say, show_notes

    check_output(output, quality)
    policy = {name: options.pop(name) for name in ("check", "nsfw_threshold", "integrity_margin")}
    in_python = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
    request = {in_python.get(name, name): value for name, value in options.items() if value is not None}
    seed = request.pop("seed", None)

    from mlx_flux_krea import FluxPipeline
    from mlx_flux_krea.request import open_image, random_seed

    show_notes()
    pipe = FluxPipeline.from_pretrained(model, dtype=dtype, **policy)
    request["image"] = open_image(image)  # once: the first picture may take its name
    seed = random_seed() if seed is None else seed
    if seed + num_images > 2**64:
        raise UsageError(f"seed {seed} and {num_images - 1} after it", f"at most {2**64 - 1}")
    progress = PipelineProgress()
    names, images, outcomes = names_from(output), [], []
    try:
        for number in range(num_images):
            result = pipe(prompt, seed=seed + number, progress=progress, **request)
            with signals.held():  # a picture that has its name is also reported
                if number == num_images - 1:
                    signals.finish()
                outcomes += result.outcomes
                path = None
                if result.outcomes[0] == "released":
                    path = save(result.images[0], names, force, metadata=metadata, quality=quality)
                    if path != output and not any(image["path"] for image in images):
                        say(f"note: {printable(str(output))} exists; writing {printable(str(path))}")
                else:
                    say(f"seed {seed + number}: {result.outcomes[0]}")
                stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items())
                say(f"seed {seed + number}: {stages}")
                more = {"outcome": result.outcomes[0], "notes": result.notes, "seconds": result.seconds}
                images.append({"path": path and str(path), **result.records[0], **more})
                if path and not as_json:
                    click.echo(path)
        check_outcomes(outcomes)
    except FluxKreaError as error:
        if any(image["path"] for image in images):
            error.exit_code = 7
        raise
    finally:
        progress.close()
        if as_json and images:
            click.echo(json.dumps({"images": images}, ensure_ascii=False))
