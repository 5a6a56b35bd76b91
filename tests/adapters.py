"""Adapter files for tests: the reference's, files of a header alone, and files that hold what a test says."""

import functools
import json
import math
import struct
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
from foreign import published
from helpers import DATA

from mlx_flux_krea import home
from mlx_flux_krea.adapters.parts import Adapter, Facts
from mlx_flux_krea.adapters.reading import read
from mlx_flux_krea.models.config import ModelSizes
from mlx_flux_krea.weights import layer_shapes, open_model

BYTES = {"F32": 4, "F64": 8, "I32": 4}


@functools.cache
def folder() -> Path:
    """A folder with the files of the reference, for as long as the tests run."""
    place = Path(tempfile.mkdtemp(prefix="flux-krea-adapters-"))
    with zipfile.ZipFile(DATA / "adapters" / "files.zip") as archive:
        archive.extractall(place)
    return place


def reference(name: str) -> Path:
    return folder() / f"{name}.safetensors"


@functools.cache
def goldens() -> dict[str, mx.array]:
    return mx.load(str(DATA / "adapters" / "goldens.safetensors"))


def opened(path: Path, sizes: ModelSizes, **facts) -> Adapter:
    return read(path, sizes, Facts(**{"name": path.stem, "source": str(path), "sha256": path.name} | facts))


def header(path: Path, tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: dict | None = None) -> Path:
    """A file of these names, types and shapes whose values take no room on the disk."""
    entries, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * BYTES.get(dtype, 2)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries | ({"__metadata__": metadata} if metadata else {})).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def turbo_keys(rank: int = 64, outside: bool = True) -> dict[str, tuple[str, Sequence[int]]]:
    """The 504 modules of Turbo-Alpha and of Hyper-SD: every linear layer of diffusers' transformer.

    The ten outside the blocks are those that SceneWorks/mlx-gen lists (hyper_flux_real_weights.rs).
    """
    modules = {
        "x_embedder": (3072, 64),
        "context_embedder": (3072, 4096),
        "proj_out": (64, 3072),
        "norm_out.linear": (6144, 3072),
        "time_text_embed.timestep_embedder.linear_1": (3072, 256),
        "time_text_embed.timestep_embedder.linear_2": (3072, 3072),
        "time_text_embed.guidance_embedder.linear_1": (3072, 256),
        "time_text_embed.guidance_embedder.linear_2": (3072, 3072),
        "time_text_embed.text_embedder.linear_1": (3072, 768),
        "time_text_embed.text_embedder.linear_2": (3072, 3072),
    }
    tensors: dict[str, tuple[str, Sequence[int]]] = {}
    for name, (_, shape) in published("lora-ai-toolkit").items():
        if "blocks" in name:
            tensors[name] = ("BF16", [rank, shape[1]] if "lora_A" in name else [shape[0], rank])
    for name, (rows, width) in modules.items() if outside else ():
        tensors[f"transformer.{name}.lora_A.weight"] = ("BF16", [rank, width])
        tensors[f"transformer.{name}.lora_B.weight"] = ("BF16", [rows, rank])
    return tensors


def save(path: Path, arrays: dict[str, mx.array], **metadata: str) -> Path:
    mx.save_safetensors(str(path), arrays, metadata)
    return path


def small(path: Path, seed: int = 1, only: str = "blocks", rank: int = 2, **metadata: str) -> Path:
    """A LoRA for the model that comes with the package: random, and strong enough to be seen.

    Args:
        path: the file.
        seed: of its numbers.
        only: a part of the names of the layers that it changes.
        rank: of each.
        metadata: of its header.
    """
    sizes = open_model(home.NANO).flux.sizes
    keys, arrays = mx.random.split(mx.random.key(seed), 1000), {}
    for n, (layer, (rows, width)) in enumerate(layer_shapes("transformer", sizes).items()):
        if only in layer:
            name = f"lora_unet_{layer.replace('.', '_')}"
            arrays[f"{name}.lora_down.weight"] = mx.random.normal((rank, width), key=keys[2 * n]) / 8
            arrays[f"{name}.lora_up.weight"] = mx.random.normal((rows, rank), key=keys[2 * n + 1]) / 8
    return save(path, {name: array.astype(mx.float16) for name, array in arrays.items()}, **metadata)
