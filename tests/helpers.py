"""Helpers of the tests: fixtures on disk, goldens, and the two measures of difference."""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mlx_flux_krea.filters import acknowledgement as licence
from mlx_flux_krea.models import config as configs

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data"
REFERENCE = DATA / "reference"
TOKENIZERS = DATA / "tokenizers"
PIPELINE = REFERENCE / "pipeline"


MADE_FOR = "times the area that this model was made for"  # in a note about the small pictures of tests


@functools.cache
def goldens() -> dict[str, mx.array]:
    return mx.load(str(REFERENCE / "goldens.safetensors"))


@functools.cache
def facts() -> dict:
    return json.loads((REFERENCE / "goldens.json").read_text())


def image(name: str) -> Image.Image:
    return Image.open(REFERENCE / name)


def nhwc(x: mx.array) -> mx.array:
    return x.transpose(0, 2, 3, 1)


def rel(a: mx.array, b: mx.array) -> float:
    """||a - b|| / ||b|| over the whole tensor, b the reference."""
    a, b = (np.array(x.astype(mx.float32), np.float64) for x in (a, b))
    assert a.shape == b.shape, f"{a.shape} and {b.shape}"
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def max_abs(a: mx.array, b: mx.array) -> float:
    return float(mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max())


def assert_close(a: mx.array, b: mx.array, bar: float, what: str = "") -> None:
    """Relative error below the bar; a failure shows the largest difference and where it is."""
    error = rel(a, b)
    if not error <= bar:
        difference = np.abs(np.array(a.astype(mx.float32)) - np.array(b.astype(mx.float32)))
        where = tuple(int(i) for i in np.unravel_index(difference.argmax(), difference.shape))
        raise AssertionError(
            f"{what}: rel {error:.2e} > {bar:.0e}; largest difference {difference.max():.2e} at {where}"
        )


def psnr(a: Image.Image, b: Image.Image) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, f"{a.shape} and {b.shape}"
    error = np.mean((a - b) ** 2)
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def levels(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of two pictures, of 255."""
    return int(np.abs(np.asarray(a, np.int64) - np.asarray(b, np.int64)).max())


def run_command(*args, cwd: Path, timeout: float = 120, **env) -> subprocess.CompletedProcess:
    """The installed `flux-krea`, as a user runs it."""
    command = [str(Path(sys.executable).parent / "flux-krea"), *map(str, args)]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=timeout, check=False
    )


SHOWS_PICTURES = ("DISPLAY", "WAYLAND_DISPLAY", "LC_TERMINAL", "TERM_PROGRAM", "KITTY_WINDOW_ID", "TERM")
SHOWS_PICTURES += ("TMUX", "STY", "SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY")


def at_terminal(
    *args,
    cwd: Path,
    answer: Callable[[str], str] = lambda shown: "",
    size: tuple[int, int] = (24, 80),
    program: Sequence[str] = (str(Path(sys.executable).parent / "flux-krea"),),
    **env,
) -> tuple[int, str, str]:
    """Runs the installed `flux-krea` at a terminal of its own, which shows no pictures if `env` does not say so.

    Args:
        args: of the command.
        cwd: the folder at hand.
        answer: called with the text shown since the last answer, whenever there is more; returns the text to type.
        size: lines and columns.
        program: the command itself, or another program that runs it.
        env: variables.

    Returns:
        The exit code, standard output (no terminal), and everything that was shown.
    """
    screen, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    command = [*program, *map(str, args)]
    environment = {name: value for name, value in os.environ.items() if name not in SHOWS_PICTURES} | env
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stdin=end, stdout=subprocess.PIPE, stderr=end, text=True
    )
    os.close(end)
    shown, answered = b"", 0
    with contextlib.suppress(OSError):  # on Linux, that the other end is closed
        while part := os.read(screen, 65536):
            shown += part
            if typed := answer(shown[answered:].decode(errors="replace")):
                os.write(screen, typed.encode())
                answered = len(shown)
    stdout, _ = process.communicate(timeout=60)
    os.close(screen)
    return process.returncode, stdout, shown.decode(errors="replace")


def acknowledge(model: Path) -> None:
    """Acknowledges the licence in a model folder, as `flux-krea setup` does when a person agrees."""
    licence.acknowledge(licence.find_text(model)[1], model.name)


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_index(folder: Path, **changes) -> Path:
    """Changes model_index.json of a model folder, and what its manifest says of that. Returns the folder."""
    index, manifest = folder / "model_index.json", folder / "manifest.json"
    edit_json(index, **changes)
    data = index.read_bytes()
    edit_json(manifest, **{index.name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}})
    return folder


def edit_tensors(path: Path, edit) -> None:
    """Writes a safetensors file again after `edit` changed its dictionary of arrays."""
    arrays = dict(mx.load(str(path)))
    mx.eval(arrays)
    edit(arrays)
    mx.save_safetensors(str(path), arrays)


def pack_as_mlx_vlm(folder: Path, but: str = "") -> None:
    """Writes a Pixtral again as mlx-vlm has it: matrices in 4 bits, convolutions in MLX's axes, and its names.

    Args:
        folder: with one file of weights.
        but: a part of the names of matrices that stay as they are; "": none.
    """

    def pack(arrays):
        for name in list(arrays):
            array = arrays.pop(name)
            new = name.replace("vision_tower.", "vision_tower.vision_model.")
            if array.ndim == 2 and not (but and but in name):
                packed = mx.quantize(array, group_size=64, bits=4)
                arrays |= dict(zip((new, new[:-6] + "scales", new[:-6] + "biases"), packed, strict=True))
            else:
                arrays[new] = array.transpose(0, 2, 3, 1) if array.ndim == 4 else array

    edit_tensors(folder / "model.safetensors", pack)
    edit_json(folder / "config.json", quantization={"group_size": 64, "bits": 4}, model_type="pixtral")


CONTROL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"[TOOL_{i}]" for i in range(5)), "[IMG]", "<pad>"]
CONTROL += ["[IMG_BREAK]", "[IMG_END]"]


def pixtral_tokenizer(path: Path) -> tuple[int, int]:
    """A byte-level tokenizer.json with Pixtral's control tokens, and the ids of its words "yes" and "no"."""
    words = [*CONTROL, *map(chr, range(33, 127)), "\u0120", "ye", "yes", "no"]
    tokenizer = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [("y", "e"), ("ye", "s"), ("n", "o")], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.save(str(path))
    return words.index("yes"), words.index("no")


def pixtral_source(target: Path, source: Path = REFERENCE / "llava") -> Path:
    """A tiny Pixtral as it would be published, with a tokenizer; its config.json asks for the logits of every token."""
    shutil.copytree(source, target)
    yes_no = pixtral_tokenizer(target / "tokenizer.json")
    size = json.loads((target / "config.json").read_text())["text_config"]["vocab_size"]
    edit_json(target / "config.json", head_ids=[*yes_no, *(i for i in range(size) if i not in yes_no)])
    return target


def without_guidance(target: Path) -> Path:
    """The reference's pipeline as schnell is: no guidance embedding, no shift; one file for the transformer."""
    shutil.copytree(PIPELINE, target)
    folder = target / "transformer"
    arrays = {}
    for shard in sorted(folder.glob("*.safetensors")):
        arrays |= mx.load(str(shard))
    mx.eval(arrays)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    kept = {name: array for name, array in arrays.items() if "guidance_embedder" not in name}
    mx.save_safetensors(str(folder / "diffusion_pytorch_model.safetensors"), kept)
    edit_json(folder / "config.json", guidance_embeds=False)
    edit_json(target / "scheduler" / "scheduler_config.json", use_dynamic_shifting=False, shift=1.0)
    return target


def full_size_folder(path: Path, filters: str, guidance_embed: bool = True) -> Path:
    """The JSON of a model folder of FLUX.1's published size and a licence; no weights."""
    index = configs.ModelIndex(
        name="big",
        base="FLUX.1 Krea [dev]",
        license="flux-1-dev-non-commercial",
        filters=filters,
        max_sequence_length=512,
        schedule=configs.Schedule(),
        defaults=configs.Defaults(1024, 1024, 28, 4.5),
    )
    flux = configs.FLUX_DEV if guidance_embed else configs.FLUX_SCHNELL
    sizes = {
        "transformer": flux,
        "text_encoder": configs.CLIP_L,
        "text_encoder_2": configs.T5_XXL,
        "vae": configs.FLUX_VAE,
    }
    for name, config in sizes.items():
        (path / name).mkdir(parents=True)
        (path / name / "config.json").write_text(json.dumps({"dtype": "bfloat16", **configs.to_json(config)}))
    (path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **configs.to_json(index)}))
    (path / "LICENSE.md").write_text("What may be done with these weights.\n")
    return path
