"""Files of the reference that follow from others of it, and are therefore not stored: made once, for this session.

single_files()          the pipeline's networks as single files, in BFL's names, byte for byte the reference's
editing_source("fill")  a whole pipeline folder of an editing model in diffusers' layout, encoders and VAE linked
"""

import functools
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import foreign
import mlx.core as mx
from helpers import PIPELINE, REFERENCE

EDIT = REFERENCE / "edit"
CLASSES = {"kontext": "FluxKontextPipeline", "fill": "FluxFillPipeline", "control": "FluxControlPipeline"}
SINGLE = {  # component, and how its file stores numbers
    "flux1-tiny": ("transformer", "F32"),
    "ae": ("vae", "F32"),
    "clip_l": ("text_encoder", "F16"),
    "t5xxl": ("text_encoder_2", "F16"),
}


def temporary_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="flux-krea-derived-"))


@functools.cache
def goldens() -> dict[str, mx.array]:
    """Arrays of the editing runs."""
    return mx.load(str(EDIT / "goldens.safetensors"))


@functools.cache
def facts() -> dict:
    """Parameters of the editing runs, and tables."""
    return json.loads((EDIT / "goldens.json").read_text())


@functools.cache
def single_files() -> Path:
    """A folder with the single files and their config.json."""
    folder = temporary_folder()
    shutil.copy(REFERENCE / "bfl" / "config.json", folder)
    known = json.loads((REFERENCE / "bfl" / "sha256.json").read_text())
    for name, (component, dtype) in SINGLE.items():
        file = folder / f"{name}.safetensors"
        arrays = {
            n: a for shard in (PIPELINE / component).glob("*.safetensors") for n, a in mx.load(str(shard)).items()
        }
        ours = foreign.assemble(arrays, component, "diffusers")
        names = foreign.take_apart(ours, component, "BFL")
        tensors = {n: foreign.plain(names[n], dtype) for n in sorted(names)}
        foreign.save(file, tensors, {"format": "pt"} if dtype == "F16" else None)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert digest == known[name], f"{name} is not the reference's: {digest}"
    return folder


def editing_source(name: str, target: Path, class_name: str | None = None) -> Path:
    """Makes the pipeline folder of an editing model: its transformer in bfloat16, and links to the base's other parts.

    Args:
        name: "kontext", "fill" or "control".
        target: a folder to make.
        class_name: in its model_index.json; None: diffusers' for this model.
    """
    shutil.copytree(PIPELINE, target, ignore=shutil.ignore_patterns("transformer"), copy_function=_link)
    (target / "model_index.json").unlink()
    (target / "model_index.json").write_text(json.dumps({"_class_name": class_name or CLASSES[name]}))
    folder = target / "transformer"
    folder.mkdir()
    sizes = json.loads((EDIT / "bfl" / "config.json").read_text())[name]
    config = json.loads((PIPELINE / "transformer" / "config.json").read_text())
    heads = sizes["num_heads"]
    config |= {"attention_head_dim": sizes["hidden_size"] // heads, "num_attention_heads": heads}
    config |= {"axes_dims_rope": sizes["axes_dim"], "num_layers": sizes["depth"]}
    config |= {"num_single_layers": sizes["depth_single_blocks"], "out_channels": sizes["out_channels"]}
    (folder / "config.json").write_text(json.dumps(config | {"in_channels": sizes["in_channels"]}))
    arrays = mx.load(str(editing_file(name)))
    tensors = foreign.take_apart(arrays, "transformer", "diffusers")
    foreign.save(
        folder / "diffusion_pytorch_model.safetensors", {n: foreign.plain(a, "BF16") for n, a in tensors.items()}
    )
    return target


def editing_file(name: str) -> Path:
    """The transformer of an editing model as a single file."""
    return EDIT / "bfl" / f"flux1-{name}-tiny.safetensors"


def single_source(name: str, file: Path, metadata: dict[str, str] | None = None) -> list[Path]:
    """Puts the transformer of an editing model into a file, with the config.json that it needs beside it.

    Args:
        name: "kontext", "fill" or "control".
        file: to make.
        metadata: of the file.

    Returns:
        The sources of a whole model: the file, and encoders and VAE of the base.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    sizes = json.loads((EDIT / "bfl" / "config.json").read_text())[name]
    (file.parent / "config.json").write_text(json.dumps({"flux": sizes}))
    arrays = mx.load(str(editing_file(name)))
    foreign.save(file, {n: foreign.plain(a, "BF16") for n, a in arrays.items()}, metadata)
    return [file, *(PIPELINE / component for component in ("text_encoder", "text_encoder_2", "vae"))]


def _link(source: str, target: str) -> None:
    Path(target).symlink_to(source)
