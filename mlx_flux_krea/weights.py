"""The model folder: the one format that the library reads, and how its weights become modules.

    NAME/
      model_index.json          what it is, its schedule and defaults, what it was made from (config.ModelIndex)
      transformer/              config.json: sizes, "dtype" and "quantization" (below)
      text_encoder/    (CLIP)   model-0000k-of-0000n.safetensors: tensors in a fixed order, each block in one piece, the
      text_encoder_2/  (T5)         modulation layers of the transformer in shards of their own
      vae/                      model.safetensors.index.json: which shard holds which tensor
      tokenizer/  tokenizer_2/  the tokenizers' own files
      LICENSE.md  NOTICE        of the weights, as far as their licence is known and asks for it
      README.md                 what it is and what was done to it
      manifest.json             sha256 and size of every other file

A filter's folder is the same with one network in it, nsfw/ or pixtral/, and Pixtral's tokenizer in tokenizer/; what it
is, model_index.json says in less (filters.config.FilterIndex).

"dtype" is the type of every array that is not quantized, and of scales and biases. Where layers are quantized, in the
form of mlx-lm: "quantization" holds bits, group_size and mode of most of them, and by its path each layer with others
(an object of the same three) or with none (false). Of such a layer, `weight` holds packed numbers (U32), `scales` and,
in mode affine, `biases` what makes values of them; scales of mxfp4 and nvfp4 are bytes (U8). Embeddings are never
quantized. Whatever computes with a folder finds this there, and is not told.

Names are those of Black Forest Labs for the transformer and the VAE, those of transformers for the encoders. Loading is
strict (every tensor matched, shape and dtype checked before anything is read) and lazy: an array is read when it is
first evaluated, and a cast to another compute type never holds two copies of the whole.
"""

import functools
import json
import os
import re
import shlex
import struct
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from safetensors import SafetensorError, safe_open

from . import home
from .errors import ModelError, amount
from .files import read_json
from .models import config as configs
from .models.clip import CLIPText
from .models.filter_config import FilterIndex, PixtralConfig, ViTConfig
from .models.layers import adopt, choose_products
from .models.pixtral import Pixtral
from .models.t5 import T5Encoder
from .models.transformer import Flux
from .models.vae import VAE
from .models.vit import ViT
from .presets import FLUX_LATENT_RGB
from .tokenizers import CLIPTokenizer, T5Tokenizer

# An M5 would round the products of float32 to TF32, where float32 was asked for and in the float32 parts of a bfloat16
# run. MLX reads this once, at its first product; networks get their weights here, so that we are in time.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

COMPONENTS = {
    "transformer": (configs.FluxConfig, Flux),
    "text_encoder": (configs.CLIPConfig, CLIPText),
    "text_encoder_2": (configs.T5Config, T5Encoder),
    "vae": (configs.VAEConfig, VAE),
}
FILTERS = {"nsfw": (ViTConfig, ViT), "pixtral": (PixtralConfig, Pixtral)}
NETWORKS = COMPONENTS | FILTERS
# what folders are: the `_class_name` and the facts in model_index.json, and the networks
KINDS = {
    "FluxPipeline": (configs.ModelIndex, tuple(COMPONENTS)),
    "NSFWFilter": (FilterIndex, ("nsfw",)),
    "PixtralFilter": (FilterIndex, ("pixtral",)),
}
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # MLX's names, and those of safetensors
PACKED = {mx.uint32: "U32", mx.uint8: "U8"}  # of quantized layers, whatever the folder's type
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in its file."""

    dtype: str  # safetensors' spelling
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    end: int


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of a safetensors file, without reading a tensor.

    The safetensors library judges the header (sizes, overlaps, holes, types); then its offsets can be trusted.

    Raises:
        ModelError: not a readable, complete safetensors file.
    """
    try:
        with open(path, "rb") as file, safe_open(path, "numpy"):
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        reason = getattr(error, "strerror", None) or str(error).removeprefix("Error while deserializing header: ")
        raise ModelError(
            f"{path} cannot be read: {reason}", "a complete safetensors file", "copy or download it again"
        ) from None
    metadata = header.pop("__metadata__", None) or {}
    base = 8 + length
    infos = {
        name: TensorInfo(t["dtype"], tuple(t["shape"]), base + t["data_offsets"][0], base + t["data_offsets"][1])
        for name, t in header.items()
    }
    return infos, metadata


@dataclass(frozen=True)
class ModelFolder:
    """A model folder whose JSON was read and checked; no weights yet."""

    path: Path
    kind: str  # a key of `KINDS`
    index: configs.ModelIndex | FilterIndex
    sizes: dict[str, object]  # component: its config
    dtypes: dict[str, str]  # component: the type of its arrays that are not quantized
    quantization: dict[str, tuple]  # component: what most layers have, and the exceptions; only where there is some

    @property
    def requires_filters(self) -> bool:
        """Whether the licence demands filters or review."""
        return configs.requires_filters(self.sizes["transformer"], self.index)

    @property
    def latent_rgb(self) -> tuple[tuple[float, ...], ...] | None:
        """From latents to colours, for previews (`preview.py`): the folder's own map, or that of FLUX.1's autoencoder.

        Raises:
            ModelError: the folder's has not as many rows as the autoencoder channels, and one.
        """
        own, config = self.index.latent_rgb, self.sizes["vae"]
        if own and len(own) != config.z_channels + 1:
            found = f"{self.path / 'model_index.json'}: latent_rgb has {amount(len(own), 'row')}"
            raise ModelError(found, f"{config.z_channels + 1}")
        return own or (FLUX_LATENT_RGB if config == configs.FLUX_VAE else None)

    @functools.cached_property
    def tokenizers(self) -> tuple[CLIPTokenizer, T5Tokenizer]:
        """Of CLIP and of T5, opened once.

        Raises:
            ModelError: files missing or damaged, or of more tokens than the encoder knows.
        """
        opened = []
        for component, cls in (("text_encoder", CLIPTokenizer), ("text_encoder_2", T5Tokenizer)):
            path = self.path / component.replace("text_encoder", "tokenizer")
            opened.append(cls(path))
            known = self.sizes[component].vocab_size
            if opened[-1].vocab_size > known:
                raise ModelError(f"{path} has {opened[-1].vocab_size} tokens", f"{known} at most, as {component} has")
        return tuple(opened)

    def tensors(self, component: str) -> dict[str, tuple[Path, TensorInfo]]:
        """Every tensor of a component with its shard, as the shards' own headers have it.

        Raises:
            ModelError: a shard missing or damaged, or the index and the shards contradict each other.
        """
        folder = self.path / component
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(s, str) for s in weight_map.values()):
            raise ModelError(f"{folder / INDEX} has no weight_map", "an index written by flux-krea convert")
        found = {}
        for shard in sorted(set(weight_map.values())):
            if not _SHARD.fullmatch(shard):
                raise ModelError(f"{folder / INDEX} names the file {shard!r}", "model-0000k-of-0000n.safetensors")
            infos, _ = read_header(folder / shard)
            found |= {name: (folder / shard, info) for name, info in infos.items()}
        wrong = {n for n in found.keys() | weight_map.keys() if n not in found or found[n][0].name != weight_map.get(n)}
        if wrong:
            raise ModelError(
                f"{folder / INDEX} and its shards disagree about {_some(wrong)}", "the same tensors in both"
            )
        return found

    def layers(self, component: str) -> dict[str, configs.Quantization | None]:
        """Every layer of a component that could be quantized, and how it is.

        Raises:
            ModelError: config.json names other layers, or groups that do not divide a row.
        """
        widths = layer_widths(component, self.sizes[component])
        if component not in self.quantization:
            return dict.fromkeys(widths)
        where = f"{self.path / component / 'config.json'}: quantization"
        most, others = self.quantization[component]
        if unknown := others.keys() - widths.keys():
            raise ModelError(f"{where} names {_some(unknown)}", "layers of this network", "convert the model again")
        layers = {path: others.get(path, most) for path in widths}
        for path, q in layers.items():
            if q and widths[path] % q.group_size:
                raise ModelError(f"{where}: {path} has rows of {widths[path]}", f"a multiple of {q.group_size}")
        return layers

    def check(self) -> None:
        """Compares the headers of every shard with the sizes; reads no weights.

        Raises:
            ModelError: a tensor is missing, not expected, or of another shape or type than the sizes say.
        """
        for component in self.sizes:
            self._skeleton(component)

    def load(self, component: str, dtype: mx.Dtype) -> nn.Module:
        """A network with its weights, lazy.

        Args:
            component: a key of `COMPONENTS`, or of `FILTERS`.
            dtype: the compute type; where float16 is asked for, all but transformer and CLIP compute in bfloat16. The
                classifier always computes in float32.

        Raises:
            ModelError: a tensor is missing, not expected, or of another shape or type than the sizes say.
        """
        module, found = self._skeleton(component)
        if dtype == mx.float16 and component not in ("transformer", "text_encoder"):
            dtype = mx.bfloat16
        dtype = mx.float32 if component == "nsfw" else dtype
        arrays = []
        for shard in sorted({path for path, _ in found.values()}):
            for name, array in mx.load(str(shard)).items():
                arrays.append((name, array if array.dtype in PACKED else array.astype(dtype)))
        module.load_weights(arrays, strict=True)
        module.eval()
        choose_products(module, dtype, home.path(home.PRODUCTS))
        return module

    def _skeleton(self, component: str) -> tuple[nn.Module, dict[str, tuple[Path, TensorInfo]]]:
        """The network without its weights, and the tensors that are those weights."""
        module = build(component, self.sizes[component], self.layers(component))
        dtype = DTYPES[self.dtypes[component]]
        found = self.tensors(component)
        check_tensors(
            self.path / component,
            {name: (info.dtype, info.shape) for name, (_, info) in found.items()},
            {name: (PACKED.get(array.dtype, dtype), array.shape) for name, array in tree_flatten(module.parameters())},
        )
        return module, found


def build(component: str, sizes, layers: dict[str, configs.Quantization | None] | None = None) -> nn.Module:
    """A network of these sizes without its weights. MLX would draw initial ones: its stream is left as it was.

    Args:
        component: a key of `NETWORKS`.
        sizes: its config.
        layers: how layers are quantized, by their paths.
    """
    high, low = mx.random.state[0].tolist()
    module = NETWORKS[component][1](sizes)
    quantized = {path: configs.to_json(q) for path, q in (layers or {}).items() if q}
    nn.quantize(module, class_predicate=lambda path, _: quantized.get(path, False))
    adopt(module)
    mx.random.seed(high << 32 | low)
    return module


@functools.cache
def layer_widths(component: str, sizes) -> dict[str, int]:
    """The layers of a network that can be quantized: path and length of a row."""
    module = build(component, sizes)
    kinds = (nn.Linear, nn.Embedding) if component == "pixtral" else nn.Linear
    linear = {f"{path}.weight" for path, layer in module.named_modules() if isinstance(layer, kinds)}
    weights = ((name, array) for name, array in tree_flatten(module.parameters()) if name in linear)
    return {name.removesuffix(".weight"): array.shape[1] for name, array in weights}


def count_parameters(component: str, sizes) -> int:
    """Numbers in all tensors, packed ones one by one."""
    return sum(array.size for _, array in tree_flatten(build(component, sizes).parameters()))


def open_model(path: Path) -> ModelFolder:
    """Reads and checks the JSON of a model folder.

    Raises:
        ModelError: not a model folder of ours, a component or a field missing or wrong, or components that do not fit.
    """
    folder = open_folder(path)
    if folder.kind != "FluxPipeline":
        raise ModelError(f"{path / 'model_index.json'} is not of a FluxPipeline", '"_class_name": "FluxPipeline"')
    return folder


def open_filter(name: str, path: Path | None = None) -> ModelFolder:
    """Reads and checks the JSON of a filter's folder.

    Args:
        name: a key of `FILTERS`.
        path: its folder; None: where `flux-krea convert` puts it.

    Raises:
        ModelError: not there, not such a folder, or a field missing or wrong.
    """
    path = path or home.path(home.FILTERS, name)
    if not path.exists():
        todo = "convert a downloaded one: flux-krea convert FOLDER"
        raise ModelError(f"there is no filter at {path}", f"{NETWORKS[name][1].__name__}, converted", todo)
    folder = open_folder(path)
    if tuple(folder.sizes) != (name,):
        raise ModelError(f"{path} is of a {folder.kind}", f"the filter {name}")
    return folder


def open_folder(path: Path) -> ModelFolder:
    """Reads and checks the JSON of a folder of ours, of whatever kind.

    Raises:
        ModelError: no folder of ours, a component or a field missing or wrong, or components that do not fit.
    """
    index_path = path / "model_index.json"
    convert = f"convert it first: flux-krea convert {shlex.quote(str(path))}"
    if not path.exists():
        raise ModelError(f"there is nothing at {path}", "a model folder")
    if not path.is_dir():
        raise ModelError(f"{path} is a file", "a model folder", convert)
    if not index_path.exists():
        raise ModelError(f"{path} has no model_index.json", "a model folder", convert)
    obj = read_json(index_path)
    if "format" not in obj:
        raise ModelError(f"{path} was not made by flux-krea convert", "a model folder", convert)
    kind = obj.pop("_class_name", None)
    if kind not in list(KINDS):
        raise ModelError(f"{index_path} is not of a FluxPipeline", '"_class_name": "FluxPipeline"')
    index_class, components = KINDS[kind]
    index = configs.from_json(index_class, obj, str(index_path))
    sizes, dtypes, quantization = {}, {}, {}
    for component in components:
        where = path / component / "config.json"
        if not where.exists():
            raise ModelError(f"{path} has no {component}/config.json", f"the components {', '.join(components)}")
        fields = read_json(where)
        dtypes[component] = fields.pop("dtype", None)
        if dtypes[component] not in list(DTYPES):
            raise ModelError(f"{where}: dtype is {dtypes[component]!r}", f"one of {', '.join(DTYPES)}")
        if "quantization" in fields:
            quantized = fields.pop("quantization")
            quantization[component] = configs.quantization_from_json(quantized, f"{where}: quantization")
        sizes[component] = configs.from_json(NETWORKS[component][0], fields, str(where))
    if kind == "FluxPipeline":
        configs.check_parts(*(sizes[name] for name in ("transformer", "text_encoder_2", "text_encoder", "vae")))
    return ModelFolder(path, kind, index, sizes, dtypes, quantization)


def check_tensors(where: Path, found: dict, expected: dict) -> None:
    """Compares (dtype, shape) of every tensor with what should be there.

    Raises:
        ModelError: naming the first few that are missing, not expected, of another shape or of another type.
    """
    problems = []
    if missing := expected.keys() - found.keys():
        problems.append(f"{len(missing)} missing ({_some(missing)})")
    if extra := found.keys() - expected.keys():
        problems.append(f"{len(extra)} not expected ({_some(extra)})")
    for name in sorted(found.keys() & expected.keys()):
        if tuple(found[name][1]) != tuple(expected[name][1]):
            problems.append(f"{name} has shape {list(found[name][1])}, expected {list(expected[name][1])}")
        elif found[name][0] != expected[name][0]:
            problems.append(f"{name} is {found[name][0]}, expected {expected[name][0]}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ModelError(
            f"the tensors in {where} are not those of its config: {'; '.join(problems[:3])}{more}",
            todo="convert the model again",
        )


def _some(names) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
