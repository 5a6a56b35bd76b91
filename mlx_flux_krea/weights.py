"""The folder of a model or filter: the one format that the library reads, and how its weights become modules.

    NAME/
      model_index.json          name, task, schedule, defaults and sources (`config.ModelIndex`)
      transformer/              config.json: sizes, "dtype" and "quantization" (below)
      text_encoder/    (CLIP)   model-0000k-of-0000n.safetensors: tensors in a fixed order, each block contiguous, the
      text_encoder_2/  (T5)         modulation layers of the transformer in shards of their own
      vae/                      model.safetensors.index.json: maps each tensor to its shard
      tokenizer/  tokenizer_2/  the tokenizers' own files
      LICENSE.md  NOTICE        of the weights, where their licence is known and asks for them
      README.md                 a description of the model and its conversion
      manifest.json             sha256 and size of every other file

A filter's folder has the same form with one network, nsfw/ or pixtral/, Pixtral's tokenizer in tokenizer/, and a
shorter model_index.json (`filter_config.FilterIndex`). A component's folder has its own networks and a
`config.ComponentIndex`: redux has image_encoder/ (SigLIP) and image_embedder/, depth has depth/.

"dtype" is the type of every array that is not quantized, and of scales and biases. "quantization" has mlx-lm's form:
bits, group_size and mode of most layers, then exceptions by path: an object of the same three fields, or false for a
layer that is not quantized. A quantized layer has packed numbers in `weight` (U32), `scales` and, in mode affine,
`biases`; scales of other modes are bytes (U8). Layers that others packed may have more: "gain" and "intake" (true:
vectors of outputs and of inputs, U32 with the bits of float32) and "rank" (the matrices `down` and `up`). The
embeddings of FLUX.1's text encoders are never quantized.
Loading needs no other option: everything about precision is recorded here.

Names are those of Black Forest Labs for the transformer and the VAE, those of transformers for the encoders. Loading is
strict (every tensor matched, shape and dtype checked before anything is read) and lazy: an array is read when it is
first evaluated, and a cast to another compute type never holds two copies of the whole.
"""

import contextlib
import functools
import json
import os
import re
import shlex
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, overload

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from safetensors import SafetensorError, safe_open

from . import home, licence
from .errors import ModelError, amount, short_repr
from .files import open_regular, read_json, read_small, written_whole
from .first_bytes import SAFETENSORS, UNKNOWN, look, refused
from .models import config as configs
from .models.clip import CLIPText
from .models.config import (
    CLIPConfig,
    ComponentIndex,
    FluxConfig,
    ModelIndex,
    ModelSizes,
    Quantization,
    ReduxConfig,
    SiglipConfig,
    T5Config,
    VAEConfig,
)
from .models.depth import DepthAnything
from .models.depth_config import DepthConfig
from .models.filter_config import FilterIndex, PixtralConfig, ViTConfig
from .models.layers import ROWS, add_arrays, adopt, choose_products, machine
from .models.pixtral import Pixtral
from .models.siglip import Redux, SigLIP
from .models.t5 import T5Encoder
from .models.transformer import Flux
from .models.vae import VAE
from .models.vit import ViT
from .presets import FLUX_LATENT_RGB
from .tokenizers import CLIPTokenizer, T5Tokenizer

# An M5 would round products of float32 to TF32, also where float32 was asked for and in the float32 parts of a bfloat16
# run. MLX reads this variable once, at its first product; networks get their weights here, which is early enough.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
# Large 3 x 3 convolutions would go through Winograd's F(6,3) with 16-bit intermediates on Metal: an error of several
# percent for each (benchmarks/winograd.py). MLX reads this variable at every convolution (ml-explore/mlx#4639).
os.environ.setdefault("MLX_CONV_WINOGRAD", "0")

Sizes = (
    FluxConfig
    | CLIPConfig
    | T5Config
    | VAEConfig
    | ViTConfig
    | PixtralConfig
    | SiglipConfig
    | ReduxConfig
    | DepthConfig
)
S = TypeVar("S", bound=Sizes)
N = TypeVar("N", bound=nn.Module)

COMPONENTS: dict[str, tuple[type[Sizes], type[nn.Module]]] = {
    "transformer": (FluxConfig, Flux),
    "text_encoder": (CLIPConfig, CLIPText),
    "text_encoder_2": (T5Config, T5Encoder),
    "vae": (VAEConfig, VAE),
}
FILTERS: dict[str, tuple[type[Sizes], type[nn.Module]]] = {
    "nsfw": (ViTConfig, ViT),
    "pixtral": (PixtralConfig, Pixtral),
}
# by the name of a folder below components/ in the home folder
BESIDE: dict[str, dict[str, tuple[type[Sizes], type[nn.Module]]]] = {
    "redux": {"image_encoder": (SiglipConfig, SigLIP), "image_embedder": (ReduxConfig, Redux)},
    "depth": {"depth": (DepthConfig, DepthAnything)},
}
KIND_OF = {network: kind for kind, networks in BESIDE.items() for network in networks}
NETWORKS = COMPONENTS | FILTERS | {name: both for networks in BESIDE.values() for name, both in networks.items()}
CLASS_NAMES = {  # in model_index.json
    "model": "FluxPipeline",
    "nsfw": "NSFWFilter",
    "pixtral": "PixtralFilter",
    "redux": "FluxPriorReduxPipeline",
    "depth": "DepthPreprocessor",
}
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # MLX's names, and those of safetensors
PACKED = {mx.uint32: "U32", mx.uint8: "U8"}  # of quantized layers, whatever the folder's type
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


# --- tensors ---


@dataclass(frozen=True)
class TensorInfo:
    """Type, shape and place of a tensor in its file."""

    dtype: str  # safetensors' spelling
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file
    end: int


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Returns the tensors and the metadata of a safetensors file, without reading a tensor.

    The safetensors library checks the header (sizes, overlaps, holes, types); then its offsets can be trusted.

    Raises:
        ModelError: not a readable, complete safetensors file.
    """
    try:
        with open_regular(path) as file, safe_open(path, "numpy"):
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        reason = getattr(error, "strerror", None) or str(error).removeprefix("Error while deserializing header: ")
        kind = None if isinstance(error, OSError) else look(path)
        if kind and kind not in (SAFETENSORS, UNKNOWN):
            raise refused(path, kind) from None
        todo = "copy or download it again"
        if isinstance(error, SafetensorError) and (size := _promised(path)) and size > path.stat().st_size:
            reason += f" (it ends after {path.stat().st_size:,} of {size:,} bytes, as an unfinished download does)"
            todo = "wait for its download, or copy or download it again"
        raise ModelError(f"{path} cannot be read: {reason}", "a complete safetensors file", todo) from None
    metadata = header.pop("__metadata__", None) or {}
    base = 8 + length
    infos = {
        name: TensorInfo(t["dtype"], tuple(t["shape"]), base + t["data_offsets"][0], base + t["data_offsets"][1])
        for name, t in header.items()
    }
    return infos, metadata


def _promised(path: Path) -> int:
    """Returns the bytes that the header of a damaged safetensors file asks for; 0: it does not tell."""
    try:
        with open_regular(path) as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > (here := path.stat().st_size - 8):
                return 8 + length if here > 0 else 0
            header = json.loads(file.read(length))
        ends = (t["data_offsets"][1] for name, t in header.items() if name != "__metadata__")
        return 8 + length + max(ends, default=0)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error):
        return 0


def check_tensors(where: Path, found: Mapping[str, tuple], expected: Mapping[str, tuple]) -> None:
    """Compares (dtype, shape) of every tensor with the expected ones.

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


# --- networks without weights ---


def parameters(network: nn.Module) -> dict[str, mx.array]:
    """Returns every array of a network by its path."""
    return dict(tree_flatten(network.parameters()))  # type: ignore[arg-type]  # its stubs allow other trees


def build(component: str, sizes: Sizes, layers: Mapping[str, Quantization | None] | None = None) -> nn.Module:
    """Builds a network of these sizes without its weights.

    MLX would draw initial weights; the state of its random numbers is left as it was.

    Args:
        component: a key of `NETWORKS`.
        sizes: its config.
        layers: how layers are quantized, by their paths.
    """
    high, low = mx.random.state[0].tolist()  # type: ignore[index]  # a list; the stubs say object
    module: nn.Module = NETWORKS[component][1](sizes)  # type: ignore[arg-type]  # the class that takes these sizes
    quantized = {path: q for path, q in (layers or {}).items() if q}
    nn.quantize(module, class_predicate=lambda path, _: quantized[path].packing if path in quantized else False)
    adopt(module)
    for path, layer in module.named_modules():
        if isinstance(layer, nn.QuantizedLinear) and path in quantized:
            add_arrays(layer, quantized[path])
    mx.random.seed(high << 32 | low)
    return module


@functools.cache
def layer_shapes(component: str, sizes: Sizes) -> dict[str, tuple[int, int]]:
    """Returns the layers of a network that can be quantized: path, outputs and inputs."""
    module = build(component, sizes)
    kinds = (nn.Linear, nn.Embedding) if component == "pixtral" else nn.Linear
    linear = {f"{path}.weight" for path, layer in module.named_modules() if isinstance(layer, kinds)}
    arrays = ((name, array) for name, array in parameters(module).items() if name in linear)
    return {name.removesuffix(".weight"): (array.shape[0], array.shape[1]) for name, array in arrays}


def layer_widths(component: str, sizes: Sizes) -> dict[str, int]:
    """Returns the layers of a network that can be quantized: path and length of a row."""
    return {path: width for path, (_, width) in layer_shapes(component, sizes).items()}


def count_parameters(component: str, sizes: Sizes) -> int:
    """Counts the numbers in all tensors of a network that is not quantized."""
    return sum(array.size for array in parameters(build(component, sizes)).values())


# --- folders ---


@dataclass(frozen=True, repr=False)
class NetworkFolder(Generic[S, N]):
    """The folder of one network: its JSON, read and checked; no weights yet.

    Attributes:
        path: the folder.
        component: a key of `NETWORKS`.
        sizes: the network's config.
        dtype: type of the arrays that are not quantized, MLX's name.
        quantization: of most quantized layers; None: no layer is quantized.
        exceptions: layers stored in another way, by path; None: not quantized.
    """

    path: Path
    component: str
    sizes: S
    dtype: str
    quantization: Quantization | None
    exceptions: dict[str, Quantization | None]

    def __repr__(self) -> str:
        stored = str(self.quantization) if self.quantization else self.dtype
        return short_repr("NetworkFolder", self.component, stored=stored, path=str(self.path))

    def tensors(self) -> dict[str, tuple[Path, TensorInfo]]:
        """Returns every tensor with its shard, as the shards' own headers have it.

        Raises:
            ModelError: a shard missing or damaged, or the index and the shards contradict each other.
        """
        index = self.path / INDEX
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(s, str) for s in weight_map.values()):
            raise ModelError(f"{index} has no weight_map", "an index written by flux-krea convert")
        tensors: dict[str, tuple[Path, TensorInfo]] = {}
        for shard in sorted(set(weight_map.values())):
            if not _SHARD.fullmatch(shard):
                raise ModelError(f"{index} names the file {shard!r}", "model-0000k-of-0000n.safetensors")
            infos, _ = read_header(self.path / shard)
            tensors |= {name: (self.path / shard, info) for name, info in infos.items()}
        wrong = {
            name
            for name in tensors.keys() | weight_map.keys()
            if name not in tensors or tensors[name][0].name != weight_map.get(name)
        }
        if wrong:
            raise ModelError(f"{index} and its shards disagree about {_some(wrong)}", "the same tensors in both")
        return tensors

    def layers(self) -> dict[str, Quantization | None]:
        """Returns every layer that could be quantized, and how it is.

        Raises:
            ModelError: config.json names other layers, or groups that do not divide a row.
        """
        widths = layer_widths(self.component, self.sizes)
        where = f"{self.path / 'config.json'}: quantization"
        if unknown := self.exceptions.keys() - widths.keys():
            raise ModelError(f"{where} names {_some(unknown)}", "layers of this network", "convert the model again")
        layers = {path: self.exceptions.get(path, self.quantization) for path in widths}
        for path, q in layers.items():
            if q and widths[path] % q.group_size:
                raise ModelError(f"{where}: {path} has rows of {widths[path]}", f"a multiple of {q.group_size}")
        return layers

    def check(self) -> None:
        """Compares the headers of every shard with the sizes; reads no weights.

        Raises:
            ModelError: a tensor is missing, not expected, or of another shape or type than the sizes say.
        """
        self._skeleton()

    def load(self, dtype: mx.Dtype) -> N:
        """Returns the network with its weights, lazy.

        Args:
            dtype: the compute type. With float16, T5, the VAE and Pixtral compute in bfloat16, since their values
                overflow. The classifier and the depth network always compute in float32.

        Raises:
            ModelError: a tensor is missing, not expected, or of another shape or type than the sizes say.
        """
        module, tensors = self._skeleton()
        if dtype == mx.float16 and self.component not in ("transformer", "text_encoder"):
            dtype = mx.bfloat16
        dtype = mx.float32 if self.component in ("nsfw", "depth") else dtype
        arrays = []
        for shard in sorted({path for path, _ in tensors.values()}):
            for name, array in _load(shard).items():
                arrays.append((name, array if array.dtype in PACKED else array.astype(dtype)))
        module.load_weights(arrays, strict=True)
        module.eval()
        _choose_products(module, dtype, ROWS.get(self.component, 512))
        return module

    def _skeleton(self) -> tuple[N, dict[str, tuple[Path, TensorInfo]]]:
        """Returns the network without its weights, and the tensors that are those weights."""
        module: Any = build(self.component, self.sizes, self.layers())
        dtype, tensors = DTYPES[self.dtype], self.tensors()
        check_tensors(
            self.path,
            {name: (info.dtype, info.shape) for name, (_, info) in tensors.items()},
            {name: (PACKED.get(array.dtype, dtype), array.shape) for name, array in parameters(module).items()},
        )
        return module, tensors


@dataclass(frozen=True, repr=False)
class ModelFolder:
    """A model whose JSON was read and checked; no weights yet."""

    path: Path
    index: ModelIndex
    flux: NetworkFolder[FluxConfig, Flux]
    t5: NetworkFolder[T5Config, T5Encoder]
    clip: NetworkFolder[CLIPConfig, CLIPText]
    vae: NetworkFolder[VAEConfig, VAE]

    def __repr__(self) -> str:
        return short_repr("ModelFolder", self.index.name, base=self.index.base, path=str(self.path))

    @property
    def networks(self) -> dict[str, NetworkFolder]:
        """The four networks by the names of their folders, in the order of `COMPONENTS`."""
        return {"transformer": self.flux, "text_encoder": self.clip, "text_encoder_2": self.t5, "vae": self.vae}

    @property
    def sizes(self) -> ModelSizes:
        """Sizes of the four networks."""
        return ModelSizes(flux=self.flux.sizes, t5=self.t5.sizes, clip=self.clip.sizes, vae=self.vae.sizes)

    @functools.cached_property
    def filters(self) -> licence.Decision:
        """The decision whether the licence demands filters or review."""
        return licence.decide(licence.of_folder(self.flux.sizes.architecture, self.index, self._licence_text()))

    @property
    def requires_filters(self) -> bool:
        """True where the licence demands filters or review."""
        return self.filters.required

    def _licence_text(self) -> str:
        with contextlib.suppress(OSError):
            return read_small(self.path / "LICENSE.md").decode(errors="replace")
        return ""

    @property
    def latent_rgb(self) -> tuple[tuple[float, ...], ...] | None:
        """The map from latents to colours, for previews (`preview.py`): the folder's own, or that of FLUX.1's VAE.

        Raises:
            ModelError: the folder's own has not as many rows as the autoencoder has channels, plus one.
        """
        own, config = self.index.latent_rgb, self.vae.sizes
        if own and len(own) != config.z_channels + 1:
            found = f"{self.path / 'model_index.json'}: latent_rgb has {amount(len(own), 'row')}"
            raise ModelError(found, f"{config.z_channels + 1}")
        return own or (FLUX_LATENT_RGB if config == configs.FLUX_VAE else None)

    @functools.cached_property
    def tokenizers(self) -> tuple[CLIPTokenizer, T5Tokenizer]:
        """The tokenizers of CLIP and of T5, opened once.

        Raises:
            ModelError: files missing or damaged, or with more tokens than the encoder knows.
        """
        clip, t5 = (
            CLIPTokenizer(self.path / "tokenizer", read_small),
            T5Tokenizer(self.path / "tokenizer_2", read_small),
        )
        for name, tokenizer, encoder in (("tokenizer", clip, self.clip), ("tokenizer_2", t5, self.t5)):
            known = encoder.sizes.vocab_size
            if tokenizer.vocab_size > known:
                found = f"{self.path / name} has {tokenizer.vocab_size} tokens"
                raise ModelError(found, f"{known} at most, as {encoder.component} has")
        return clip, t5

    def check(self) -> None:
        """Checks every network: `NetworkFolder.check`."""
        for network in self.networks.values():
            network.check()


@dataclass(frozen=True, repr=False)
class FilterFolder(Generic[S, N]):
    """A content filter whose JSON was read and checked; no weights yet."""

    path: Path
    index: FilterIndex
    network: NetworkFolder[S, N]

    def __repr__(self) -> str:
        return short_repr("FilterFolder", self.index.name, base=self.index.base, path=str(self.path))

    @property
    def networks(self) -> dict[str, NetworkFolder]:
        """The one network, by the name of its folder."""
        return {self.network.component: self.network}

    def check(self) -> None:
        """Checks the network: `NetworkFolder.check`."""
        self.network.check()


@dataclass(frozen=True, repr=False)
class ComponentFolder:
    """A component beside the models, whose JSON was read and checked; no weights yet.

    Attributes:
        path: the folder.
        kind: a key of `BESIDE`.
        index: its facts.
        networks: by the names of their folders.
    """

    path: Path
    kind: str
    index: ComponentIndex
    networks: dict[str, NetworkFolder]

    def __repr__(self) -> str:
        return short_repr("ComponentFolder", self.index.name, base=self.index.base, path=str(self.path))

    def check(self) -> None:
        """Checks every network: `NetworkFolder.check`."""
        for network in self.networks.values():
            network.check()


def open_folder(path: Path) -> ModelFolder | FilterFolder | ComponentFolder:
    """Reads and checks the JSON of a model's, a filter's or a component's folder.

    Raises:
        ModelError: none of them, a component or a field missing or wrong, or components that do not fit.
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
    class_name = obj.pop("_class_name", None)
    kind = next((kind for kind, name in CLASS_NAMES.items() if name == class_name), None)
    if kind is None:
        raise ModelError(f"{index_path} is not of a FluxPipeline", '"_class_name": "FluxPipeline"')
    if kind in BESIDE:
        index = configs.from_json(ComponentIndex, obj, str(index_path))
        folder = ComponentFolder(path, kind, index, {n: _open_network(path, n, BESIDE[kind]) for n in BESIDE[kind]})
        _check_fit(folder)
        return folder
    if kind != "model":
        index = configs.from_json(FilterIndex, obj, str(index_path))
        return FilterFolder(path, index, _open_network(path, kind, FILTERS))
    given = configs.from_json(ModelIndex, obj, str(index_path))
    flux, clip, t5, vae = (_open_network(path, component, COMPONENTS) for component in COMPONENTS)
    index = given if "task" in obj else replace(given, task=flux.sizes.tasks[0])  # one written before there were others
    if index.task not in flux.sizes.tasks:
        found = f'{index_path}: task is "{index.task}", and the transformer has in_channels {flux.sizes.in_channels}'
        raise ModelError(found, " or ".join(flux.sizes.tasks), "convert the model again")
    folder = ModelFolder(path, index, flux=flux, t5=t5, clip=clip, vae=vae)
    folder.sizes.check()
    return folder


def open_model(path: Path) -> ModelFolder:
    """Reads and checks the JSON of a model folder.

    Raises:
        ModelError: not a model folder of ours, a component or a field missing or wrong, or components that do not fit.
    """
    folder = open_folder(path)
    if not isinstance(folder, ModelFolder):
        raise ModelError(f"{path / 'model_index.json'} is not of a FluxPipeline", '"_class_name": "FluxPipeline"')
    return folder


@overload
def open_filter(name: Literal["nsfw"], path: Path | None = None) -> FilterFolder[ViTConfig, ViT]: ...
@overload
def open_filter(name: Literal["pixtral"], path: Path | None = None) -> FilterFolder[PixtralConfig, Pixtral]: ...
@overload
def open_filter(name: str, path: Path | None = None) -> FilterFolder: ...
def open_filter(name: str, path: Path | None = None) -> FilterFolder:
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
    if not isinstance(folder, FilterFolder):
        raise ModelError(f"{path} is of a {CLASS_NAMES['model']}", f"the filter {name}")
    if folder.network.component != name:
        raise ModelError(f"{path} is of a {CLASS_NAMES[folder.network.component]}", f"the filter {name}")
    return folder


_PUBLISHED = {  # name and repository of each component
    "redux": ("FLUX.1 Redux", "black-forest-labs/FLUX.1-Redux-dev"),
    "depth": ("the depth network", "depth-anything/Depth-Anything-V2-Small-hf"),
}


def open_component(kind: str) -> ComponentFolder:
    """Reads and checks the JSON of an installed component.

    Args:
        kind: a key of `BESIDE`.

    Raises:
        ModelError: not there (with the command that installs it), not such a folder, or a field missing or wrong.
    """
    path = home.path(home.COMPONENTS, kind)
    name, repository = _PUBLISHED[kind]
    install = f"install it: flux-krea convert {repository}"
    if not path.exists():
        raise ModelError(f"{name} is not installed", f"its folder, {path}", install)
    folder = open_folder(path)
    if not isinstance(folder, ComponentFolder) or folder.kind != kind:
        raise ModelError(f"{path} is another kind of folder", name, f"move it away, and {install}")
    return folder


def check_redux(siglip: SiglipConfig, redux: ReduxConfig) -> None:
    """Checks that the two networks of Redux fit together.

    Raises:
        ModelError: they do not.
    """
    if siglip.hidden_size != redux.redux_dim:
        found = f"image_encoder and image_embedder do not fit: its vectors are {siglip.hidden_size} wide"
        raise ModelError(found, f"{redux.redux_dim} (redux_dim)", "take both from one model")


def _check_fit(folder: ComponentFolder) -> None:
    if folder.kind == "redux":
        check_redux(folder.networks["image_encoder"].sizes, folder.networks["image_embedder"].sizes)


def _open_network(folder: Path, component: str, components: Iterable[str]) -> NetworkFolder[Any, Any]:
    """Reads and checks the config.json of one network.

    Raises:
        ModelError: the file or a field is missing or wrong.
    """
    where = folder / component / "config.json"
    if not where.exists():
        raise ModelError(f"{folder} has no {component}/config.json", f"the components {', '.join(components)}")
    fields = read_json(where)
    dtype = fields.pop("dtype", None)
    if dtype not in list(DTYPES):
        raise ModelError(f"{where}: dtype is {dtype!r}", f"one of {', '.join(DTYPES)}")
    most, exceptions = None, {}
    if "quantization" in fields:
        most, exceptions = configs.quantization_from_json(fields.pop("quantization"), f"{where}: quantization")
    sizes = configs.from_json(NETWORKS[component][0], fields, str(where))
    return NetworkFolder(folder / component, component, sizes, dtype, most, exceptions)


def _load(shard: Path) -> dict[str, mx.array]:
    arrays = mx.load(str(shard))
    assert isinstance(arrays, dict)  # of a safetensors file, without return_metadata
    return arrays


def _choose_products(network: nn.Module, dtype: mx.Dtype, rows: int) -> None:
    """Chooses how quantized layers multiply, and remembers it: a seed should give the same picture tomorrow.

    Failing to remember is harmless: the layers are timed again.
    """
    path = home.path(home.PRODUCTS)
    try:
        remembered = read_json(path)
    except ModelError:  # missing or damaged
        remembered = {}
    known = remembered.get(machine())
    known = known if isinstance(known, dict) else {}
    if chosen := choose_products(network, dtype, known, rows):
        text = json.dumps(remembered | {machine(): known | chosen}, indent=1)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as file:
                file.write(text.encode())


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
