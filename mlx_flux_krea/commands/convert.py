"""flux-krea convert: weights of other programs into a model folder."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import click

from mlx_flux_krea.convert import Report
from mlx_flux_krea.disks import remember_speed
from mlx_flux_krea.presets import KINDS, PRECISIONS, TASKS

from .shared import signals
from .shared.conversion import convert_sources
from .shared.options import DTYPE, FILE
from .shared.terminal import Console, say_path
from .shared.text import json_text, number, size, table


@click.command()
@click.argument("sources", nargs=-1, required=True, type=FILE)
@click.option("-o", "--output", type=FILE, help="Model folder to make.  [default: in the home folder]")
@click.option(
    "-q", "--quantize", type=click.Choice(PRECISIONS), help="Bits of the large layers.  [default: 8; Pixtral: 4]"
)
@click.option(
    "--gptq",
    is_flag=True,
    help="With -q 4 or 3, from a model folder in 16 bits: round by the inputs of each layer. Takes hours; resumable.",
)
@click.option("--group-size", type=int, help="Weights that share a scale: 32, 64 or 128.  [default: 64]")
@click.option("--dtype", type=DTYPE, help="Type of scales and unquantized layers.  [default: bfloat16]")
@click.option("--tokenizers", type=FILE, help="Folder with tokenizer/ and tokenizer_2/.")
@click.option(
    "--task",
    type=click.Choice(TASKS + KINDS),
    help="What the model reads besides a prompt, if its files do not say it.",
)
@click.option("--force", is_flag=True, help="Replace an existing model folder.")
@click.option("--allow-nonfinite", is_flag=True, help="Accept weights with NaN or infinities.")
@click.option("--allow-unknown-filter", is_flag=True, help="Accept a content filter that is not the published one.")
@click.option("--offline", is_flag=True, help="Use the hub's cache, without network access.")
@click.option("--discard-source", is_flag=True, help="Delete downloads after conversion.")
@click.option("--json", "as_json", is_flag=True, help="Print a report as JSON.")
def convert(sources: tuple[Path, ...], output: Path | None, as_json: bool, **options):
    """Convert weights into a model folder.

    SOURCES is a folder (of diffusers, ComfyUI or mflux, or a model folder or its name), an all-in-one file, or the
    files of transformer, CLIP, T5 and VAE, as safetensors or GGUF. A content filter is converted from the folder of
    Falconsai/nsfw_image_detection or of Pixtral 12B, Redux (for --style) from that of FLUX.1 Redux or from its file and
    SigLIP's, the network for depth maps from that of depth-anything/Depth-Anything-V2-Small-hf. OWNER/NAME names a
    repository of the Hugging Face hub with any of these, and OWNER/NAME:FILE one file of it: the files needed are
    downloaded into the hub's cache, and an interrupted download is continued.

    Folders of other programs (ComfyUI, Forge, InvokeAI) are searched. Of several variants of a model in one folder the
    most precise is taken; of several sources of a component, the later one.

    --gptq runs the model on twelve prompts and rounds the layers of the transformer so that their outputs change least:
    a step's error falls by about a third, and the folder is as any of its precision. It says first how long that takes.
    After Ctrl-C or a kill the same command continues.

    \b
    Examples:
      flux-krea convert black-forest-labs/FLUX.1-Krea-dev
      flux-krea convert FLUX.1-Krea-dev -q 4 -o krea-small
      flux-krea convert krea -q 4 --gptq -o krea-4bit
      flux-krea convert mistral-community/pixtral-12b --discard-source
      flux-krea convert ComfyUI city96/FLUX.1-dev-gguf:flux1-dev-Q8_0.gguf
      flux-krea convert flux1-krea-dev.safetensors clip_l.safetensors \\
          t5xxl_fp16.safetensors ae.safetensors --tokenizers FLUX.1-schnell
    """
    start, console = time.perf_counter(), Console()
    report = convert_sources(sources, output, console, placing=_placing, **options)
    signals.finish()
    remember_speed(report.path)
    _tell(report, console)
    task = f", {report.task}" if report.task not in ("", TASKS[0]) else ""
    console.say(f"{report.base}{task}, in {time.perf_counter() - start:.1f} s")
    if as_json:
        click.echo(json_text({**dataclasses.asdict(report), "path": str(report.path)}))
    else:
        say_path(report.path)


def _tell(report: Report, console: Console) -> None:
    """Writes the components, dropped and unquantized tensors, and the error of each kind of layer."""
    rows = [("component", "stored", "parameters", "size", "from")]
    rows += [(c.name, c.stored, number(c.parameters), size(c.bytes), c.layout) for c in report.components]
    console.say(table(rows, right=(2, 3)))
    for component in report.components:
        for reason in dict.fromkeys(reason for _, reason in component.dropped):
            name, *more = (name for name, why in component.dropped if why == reason)
            console.say(f"left out of {component.name}: {name}{f' and {len(more)} more' if more else ''} ({reason})")
        for name, reason in component.lost:
            console.say(f"zero in {component.name}: {name} ({reason})")
        for reason in dict.fromkeys(reason for _, reason in component.left):
            names = [name for name, why in component.left if why == reason]
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            console.say(f"not quantized in {component.name}: {', '.join(names[:2])}{more} ({reason})")
    quantized = [(group, group.error) for group in report.groups if group.error is not None]
    if quantized:
        rows = [("worst first", "stored", "parameters", "size", "error")]
        rows += [(g.name, g.stored, number(g.parameters), size(g.bytes), f"{error:.2%}") for g, error in quantized]
        console.say(table(rows, right=(2, 3, 4)))
    for note in report.notes:
        console.note(note)


@contextlib.contextmanager
def _placing() -> Iterator[None]:
    """Keeps signals pending from now on: a finished model is a success, and a filter still runs its self-test."""
    signals.hold()
    yield
