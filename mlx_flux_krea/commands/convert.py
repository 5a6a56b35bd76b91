"""flux-krea convert: foreign weights into a model folder."""

import contextlib
import dataclasses
import json
import time
from pathlib import Path

import click

from .shared import signals


@click.command()
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The model folder to make.  [default: in the home folder]"
)
@click.option(
    "-q",
    "--quantize",
    type=click.Choice(["none", "8", "6", "5", "4", "3", "mxfp4", "nvfp4"]),
    help="Bits of the large layers.  [default: 8; of Pixtral 4]",
)
@click.option("--group-size", type=int, help="Numbers that share a scale: 32, 64 or 128.  [default: 64]")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Type of what is not quantized, and of scales.  [default: bfloat16]",
)
@click.option("--tokenizers", type=click.Path(path_type=Path), help="A folder with tokenizer/ and tokenizer_2/ in it.")
@click.option("--force", is_flag=True, help="Replace an existing model folder.")
@click.option("--allow-nonfinite", is_flag=True, help="Accept weights that hold NaN or infinities.")
@click.option("--offline", is_flag=True, help="Take from the hub's cache what is there, and ask nobody.")
@click.option("--discard-source", is_flag=True, help="Delete what is fetched from the hub once it is converted.")
@click.option("--json", "as_json", is_flag=True, help="Print a report as JSON.")
def convert(
    sources, output, quantize, group_size, dtype, tokenizers, force, allow_nonfinite, offline, discard_source, as_json
):
    """Convert weights into a model folder.

    SOURCES is a folder (diffusers', ComfyUI's, mflux's, or a model folder or its name), an all-in-one file, or files of
    transformer, CLIP, T5 and VAE one by one, as safetensors or GGUF. Or it is a content filter: the folder of
    Falconsai/nsfw_image_detection or of Pixtral 12B. Or it is OWNER/NAME, a repository with one of these on the
    Hugging Face hub: what is needed of it is fetched into the hub's cache, and goes on where it was interrupted.

    \b
    Examples:
      flux-krea convert black-forest-labs/FLUX.1-Krea-dev
      flux-krea convert FLUX.1-Krea-dev -q 4 -o krea-small
      flux-krea convert mistral-community/pixtral-12b --discard-source
      flux-krea convert flux1-krea-dev.safetensors clip_l.safetensors \\
          t5xxl_fp16.safetensors ae.safetensors --tokenizers FLUX.1-schnell
    """
    from .shared.terminal import number, say, size, table

    begin = time.perf_counter()
    report = make(
        sources,
        output,
        dtype=dtype,
        quantize=quantize,
        group_size=group_size,
        tokenizers=tokenizers,
        force=force,
        allow_nonfinite=allow_nonfinite,
        offline=offline,
        discard_source=discard_source,
        placing=_placing,
    )
    signals.finish()
    rows = [("component", "stored", "parameters", "size", "from")]
    rows += [(c.name, c.stored, number(c.parameters), size(c.bytes), c.layout) for c in report.components]
    say(table(rows, right=(2, 3)))
    for component in report.components:
        for reason in dict.fromkeys(reason for _, reason in component.dropped):
            name, *more = (name for name, why in component.dropped if why == reason)
            say(f"left out of {component.name}: {name}{f' and {len(more)} more' if more else ''} ({reason})")
        for name, reason in component.lost:
            say(f"zero in {component.name}: {name} ({reason})")
        for reason in dict.fromkeys(reason for _, reason in component.left):
            names = [name for name, why in component.left if why == reason]
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            say(f"not quantized in {component.name}: {', '.join(names[:2])}{more} ({reason})")
    quantized = [group for group in report.groups if group.error is not None]
    if quantized:
        rows = [("worst first", "stored", "parameters", "size", "error")]
        rows += [(g.name, g.stored, number(g.parameters), size(g.bytes), f"{g.error:.2%}") for g in quantized]
        say(table(rows, right=(2, 3, 4)))
    for note in report.notes:
        say(f"note: {note}")
    say(f"{report.base}, in {time.perf_counter() - begin:.1f} s")
    click.echo(json.dumps({**dataclasses.asdict(report), "path": str(report.path)}) if as_json else report.path)


def make(sources: list[str | Path], output: Path | None = None, **options):
    """Converts with a line of progress, and tries what is a filter. A source may also be the name of a model."""
    from mlx_flux_krea.convert import convert as run
    from mlx_flux_krea.home import named
    from mlx_flux_krea.weights import FILTERS

    from .shared import macos, trials
    from .shared.terminal import ByteProgress

    progress = ByteProgress()
    with macos.awake():
        try:
            report = run([named(source) for source in sources], output, progress=progress, **options)
        finally:
            progress.close()
        macos.leave_alone(report.path if output else report.path.parent)
        name = report.components[0].name
        if name in FILTERS:
            signals.let_go()  # what is stopped here is tried by the next setup
            trials.record(name, report.path)
    return report


@contextlib.contextmanager
def _placing():
    """From here on no signal disturbs: a model that has its name is a success, a filter is still tried."""
    signals.hold()
    yield
