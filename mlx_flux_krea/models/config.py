"""Sizes of the networks and the facts of a model folder, as frozen dataclasses; the published ones as instances.

JSON goes in and out strictly: an unknown field, a missing field, a field of another type or outside its limits is an
error that names it. The limits are far beyond everything published, and keep a hostile file from filling the memory.
Field names are those of the public code: FluxParams and AutoEncoderParams of black-forest-labs/flux, and the
`config.json` of T5 and CLIP in transformers.
"""

import dataclasses
import types
import typing
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from ..errors import ModelError
from ..licence import Architecture
from ..presets import GPTQ, KINDS, TASKS, Defaults, Schedule

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

MASK_CHANNELS = 256  # of FLUX.1 Fill's packed mask: 8 x 8 pixels of a latent position, 2 x 2 positions of a token

# Types with the least and the largest value that a file may hold.
Width = Annotated[int, 1, 2**16]  # of a layer: channels, positions, buckets
Count = Annotated[int, 1, 512]  # of layers, heads, groups
Epsilon = Annotated[float, 1e-12, 0.1]


@dataclass(frozen=True)
class FluxConfig:
    """Sizes of the flow transformer (FluxParams in black-forest-labs/flux, src/flux/model.py)."""

    in_channels: Width  # of a token: its packed latents, then those of its condition (`tasks`)
    out_channels: Width  # of a packed latent: 16 latent channels of a patch of 2 x 2
    vec_in_dim: Width  # width of CLIP's pooled vector
    context_in_dim: Width  # width of T5
    hidden_size: Width
    mlp_ratio: Annotated[float, 1 / 16, 64.0]
    num_heads: Count
    depth: Annotated[int, 0, 512]  # double blocks
    depth_single_blocks: Annotated[int, 0, 512]
    axes_dim: tuple[Width, ...]  # rope widths of the three position axes; their sum is the head width
    theta: Annotated[int, 1, 2**30]
    guidance_embed: bool

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        """Width of the hidden layer of each MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of `presets.TASKS` that read in_channels, the usual one first; () where none does."""
        return tuple(task for task, count in self._channels().items() if count == self.in_channels)

    def _channels(self) -> dict[str, int]:
        """Returns in_channels of each task, from the width of a packed latent."""
        latents = self.out_channels
        return {
            "text-to-image": latents,
            "kontext": latents,  # its condition is further tokens
            "fill": 2 * latents + MASK_CHANNELS,  # latents, those of the image without its hole, the mask
            "control": 2 * latents,  # latents, those of the map
        }

    @property
    def architecture(self) -> Architecture:
        """The sizes that tell FLUX.1 from other models of its form (`licence.decide`)."""
        return Architecture(
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            depth=self.depth,
            depth_single_blocks=self.depth_single_blocks,
            guidance_embed=self.guidance_embed,
        )

    def problem(self) -> str | None:
        """Returns a contradiction between these numbers, or None."""
        if self.hidden_size % self.num_heads:
            return f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}"
        if len(self.axes_dim) != 3 or any(d % 2 for d in self.axes_dim) or sum(self.axes_dim) != self.head_dim:
            return (
                f"axes_dim {list(self.axes_dim)} are not three even numbers with the sum {self.head_dim} (head width)"
            )
        if not self.mlp_size:
            return f"mlp_ratio {self.mlp_ratio} of hidden_size {self.hidden_size} is nothing"
        if not self.tasks:
            known = ", ".join(f"{count} ({task})" for task, count in self._channels().items() if task != "kontext")
            return f"in_channels {self.in_channels} with out_channels {self.out_channels} is none of {known}"
        return None


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 v1.1 encoder (transformers' T5Config; gated tanh-GELU, no biases)."""

    d_model: Width
    d_kv: Width
    d_ff: Width
    num_heads: Count
    num_layers: Count
    vocab_size: Annotated[int, 1, 2**22]
    relative_attention_num_buckets: Width
    relative_attention_max_distance: Width
    layer_norm_epsilon: Epsilon

    def problem(self) -> str | None:
        """Returns a contradiction between these numbers, or None."""
        if self.relative_attention_num_buckets % 4:
            return f"relative_attention_num_buckets {self.relative_attention_num_buckets} is not divisible by 4"
        exact = self.relative_attention_num_buckets // 4  # distances with a bucket of their own
        if self.relative_attention_max_distance <= exact:
            return f"relative_attention_max_distance {self.relative_attention_max_distance} is not above {exact}"
        return None


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of CLIP's text model (transformers' CLIPTextConfig; quick GELU, causal)."""

    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Count
    num_attention_heads: Count
    vocab_size: Annotated[int, 1, 2**22]
    max_position_embeddings: Annotated[int, 2, 2**16]  # a prompt has at least its start and its end
    layer_norm_eps: Epsilon
    eos_token_id: Annotated[
        int, 0, 2**22
    ]  # 2 in every published file, which means: the first position of the largest id

    def problem(self) -> str | None:
        """Returns a contradiction between these numbers, or None."""
        if self.hidden_size % self.num_attention_heads:
            return f"hidden_size {self.hidden_size} is not divisible by {self.num_attention_heads} heads"
        return None


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder (AutoEncoderParams in black-forest-labs/flux, and the groups, a literal there)."""

    in_channels: Annotated[int, 3, 3]
    out_ch: Annotated[int, 3, 3]
    ch: Width
    ch_mult: tuple[Annotated[int, 1, 64], ...]
    num_res_blocks: Annotated[int, 1, 16]
    z_channels: Annotated[int, 1, 1024]
    norm_num_groups: Count
    scale_factor: Annotated[float, 1e-6, 1e6]  # latents = (z - shift_factor) * scale_factor
    shift_factor: Annotated[float, -1e6, 1e6]

    @property
    def downsampling(self) -> int:
        """Pixels along each side of one latent position."""
        return 2 ** (len(self.ch_mult) - 1)

    def problem(self) -> str | None:
        """Returns a contradiction between these numbers, or None."""
        if not 1 <= len(self.ch_mult) <= 8:
            return f"ch_mult has {len(self.ch_mult)} levels and not 1 to 8"
        for mult in (1, *self.ch_mult):
            if self.ch * mult % self.norm_num_groups:
                return f"{self.ch * mult} channels are not divisible by {self.norm_num_groups} groups"
        return None


@dataclass(frozen=True)
class SiglipConfig:
    """Sizes of SigLIP's encoder of pictures (transformers' SiglipVisionConfig; tanh GELU, biases everywhere)."""

    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Count
    num_attention_heads: Count
    image_size: Annotated[int, 1, 4096]  # pixels of each side
    patch_size: Annotated[int, 1, 1024]
    layer_norm_eps: Epsilon

    @property
    def side(self) -> int:
        """Patches along each side of a picture; pixels that fill no patch are not read."""
        return self.image_size // self.patch_size

    @property
    def positions(self) -> int:
        """Number of patches."""
        return self.side**2

    def problem(self) -> str | None:
        """Returns a contradiction between these numbers, or None."""
        if self.hidden_size % self.num_attention_heads:
            return f"hidden_size {self.hidden_size} is not divisible by {self.num_attention_heads} heads"
        if not self.side:
            return f"image_size {self.image_size} is below patch_size {self.patch_size}"
        return None


@dataclass(frozen=True)
class ReduxConfig:
    """Sizes of FLUX.1 Redux (diffusers' ReduxImageEncoder)."""

    redux_dim: Width  # width of SigLIP
    txt_in_features: Width  # width of T5


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of the four networks of a text-to-image model."""

    flux: FluxConfig
    t5: T5Config
    clip: CLIPConfig
    vae: VAEConfig

    def by_component(self) -> dict[str, FluxConfig | CLIPConfig | T5Config | VAEConfig]:
        """Returns the sizes by the names of the folders that hold the networks, in their order."""
        return {"transformer": self.flux, "text_encoder": self.clip, "text_encoder_2": self.t5, "vae": self.vae}

    def check(self) -> None:
        """Checks that the networks fit together.

        Raises:
            ModelError: naming the first two that do not, with their numbers.
        """
        todo = "take the components of one model"
        rows = (
            ("out_channels", "vae", "4 * z_channels", 4 * self.vae.z_channels),  # a patch of 2 x 2
            ("context_in_dim", "text_encoder_2", "d_model", self.t5.d_model),
            ("vec_in_dim", "text_encoder", "hidden_size", self.clip.hidden_size),
        )
        for name, other, theirs, expected in rows:
            if getattr(self.flux, name) != expected:
                found = f"transformer and {other} do not fit: {name} is {getattr(self.flux, name)}"
                raise ModelError(found, f"{expected} ({theirs} of the {other})", todo)
        if "fill" in self.flux.tasks and 4 * self.vae.downsampling**2 != MASK_CHANNELS:
            found = f"transformer and vae do not fit: the vae makes one latent of {self.vae.downsampling} pixels a side"
            raise ModelError(found, f"8, as the mask's {MASK_CHANNELS} channels have them", todo)


FLUX_DEV = FluxConfig(
    in_channels=64, out_channels=64, vec_in_dim=768, context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0,
    num_heads=24, depth=19, depth_single_blocks=38, axes_dim=(16, 56, 56), theta=10_000, guidance_embed=True,
)  # fmt: skip
FLUX_SCHNELL = dataclasses.replace(FLUX_DEV, guidance_embed=False)
FLUX_FILL = dataclasses.replace(FLUX_DEV, in_channels=384)
FLUX_CONTROL = dataclasses.replace(FLUX_DEV, in_channels=128)
T5_XXL = T5Config(
    d_model=4096, d_kv=64, d_ff=10240, num_heads=64, num_layers=24, vocab_size=32128,
    relative_attention_num_buckets=32, relative_attention_max_distance=128, layer_norm_epsilon=1e-6,
)  # fmt: skip
CLIP_L = CLIPConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=49408,
    max_position_embeddings=77, layer_norm_eps=1e-5, eos_token_id=2,
)  # fmt: skip
FLUX_VAE = VAEConfig(
    in_channels=3, out_ch=3, ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=16, norm_num_groups=32,
    scale_factor=0.3611, shift_factor=0.1159,
)  # fmt: skip
SIGLIP_SO400M = SiglipConfig(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384,
    patch_size=14, layer_norm_eps=1e-6,
)  # fmt: skip
REDUX_DEV = ReduxConfig(redux_dim=1152, txt_in_features=4096)
FLUX_DEV_MODEL = ModelSizes(flux=FLUX_DEV, t5=T5_XXL, clip=CLIP_L, vae=FLUX_VAE)


# how numbers can be stored in few bits (mx.quantize): the bits and the group sizes of each mode
MODES = {
    "affine": ((3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
    "mxfp8": ((8,), (32,)),  # only of files that have it
}


@dataclass(frozen=True)
class Quantization:
    """How one matrix is stored in few bits: `group_size` numbers of a row share a scale, in mode affine also a bias."""

    bits: int
    group_size: int
    mode: str = "affine"
    gain: bool = False  # each output has a factor: layers that others packed
    intake: bool = False  # each input has a factor
    rank: Annotated[int, 0, 4096] = 0  # of a low-rank branch beside the product; 0: none

    def __str__(self) -> str:
        name = f"{self.bits} bits, groups of {self.group_size}" if self.mode == "affine" else self.mode
        return f"{name}, rank {self.rank}" if self.rank else name

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the arrays of a layer, in their order."""
        biases = ("biases",) if self.mode == "affine" else ()
        rows = (("gain", self.gain), ("intake", self.intake), ("down", self.rank), ("up", self.rank))
        return "weight", "scales", *biases, *(name for name, has in rows if has)

    @property
    def packing(self) -> dict[str, Any]:
        """The arguments of MLX's functions."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def problem(self) -> str | None:
        """Returns the value that MLX does not have, or None."""
        if self.mode not in MODES:
            return f'mode is "{self.mode}" and not one of {", ".join(MODES)}'
        for name, known in zip(("bits", "group_size"), MODES[self.mode], strict=True):
            if getattr(self, name) not in known:
                return f"{name} is {getattr(self, name)} and not one of {', '.join(map(str, known))} (mode {self.mode})"
        return None


def quantization_to_json(layers: dict[str, Quantization | None]) -> dict | None:
    """Returns the field `quantization` of a component's config.json, in the form of mlx-lm.

    Args:
        layers: every layer that can be quantized, with None if it is not.

    Returns:
        The quantization of most layers, then that of the others by their paths (false: not quantized); None if no layer
        is quantized.
    """
    quantized = [q for q in layers.values() if q]
    if not quantized:
        return None
    most = Counter(quantized).most_common(1)[0][0]
    others = {path: _brief(q) if q else False for path, q in layers.items() if q != most}
    return _brief(most) | others


def _brief(q: Quantization) -> dict:
    """Returns the fields of a quantization without those that it does not use."""
    return {name: value for name, value in to_json(q).items() if name in q.packing or value}


def quantization_from_json(obj, where: str) -> tuple[Quantization, dict[str, Quantization | None]]:
    """Reads the quantization of most layers, and that of the others by their paths.

    Raises:
        ModelError: a field or a value is unknown.
    """
    if not isinstance(obj, dict):
        raise ModelError(f"{where} is {_kind(obj)}", "a JSON object")
    names = {f.name for f in dataclasses.fields(Quantization)}
    most = from_json(Quantization, {name: obj[name] for name in obj if name in names}, where)
    others: dict[str, Quantization | None] = {}
    for path, value in obj.items():
        if path in names:
            continue
        if isinstance(value, dict):
            others[path] = from_json(Quantization, value, f"{where}: {_short(path)}")
        elif isinstance(value, bool):
            others[path] = most if value else None
        else:
            raise ModelError(f"{where}: {_short(path)} is {_kind(value)}", "false, or bits, group_size and mode")
    return most, others


@dataclass(frozen=True)
class SourceFile:
    """A source file of a conversion."""

    file: str
    sha256: str
    bytes: Annotated[int, 0, 2**60]
    layout: str
    published: str = ""  # the repository for which the hub states this sha256, where that decides the licence


@dataclass(frozen=True)
class ModelIndex:
    """Contents of `model_index.json` in a model folder."""

    name: str
    base: str
    license: str
    filters: str  # "required" | "none"; the transformer's sizes can only add the requirement
    max_sequence_length: Annotated[int, 1, 4096]
    schedule: Schedule
    defaults: Defaults
    source: tuple[SourceFile, ...] = field(default=())
    converter: str = ""
    latent_rgb: tuple[tuple[float, ...], ...] = ()  # colours of its latents, for previews: `preview.py`
    repository: str = ""  # ORG/NAME on the hub that the transformer came from, where the source shows it
    task: str = TASKS[0]  # of a folder without it: the usual one of its in_channels (`weights.open_folder`)
    kind: str | None = None  # of the maps that a control model reads, where that is known: one of `presets.KINDS`
    format: Annotated[int, 1, 2**30] = 1

    @property
    def is_by_gptq(self) -> bool:
        """True where GPTQ rounded the transformer; in `converter`, since older versions refuse other fields."""
        return self.converter.endswith(GPTQ)

    @property
    def task_and_kind(self) -> str:
        """The task in words, with the kind of a control model's maps."""
        if self.task != "control":
            return self.task
        return f"control ({self.kind or 'canny or depth'})"

    def problem(self) -> str | None:
        """Returns a contradiction between these facts, or None."""
        if self.filters not in ("required", "none"):
            return f'filters is "{self.filters}" and not "required" or "none"'
        if self.format != 1:
            return f"format is {self.format}, and this program reads format 1"
        if any(len(row) != 3 for row in self.latent_rgb):
            return "latent_rgb has rows that are not red, green and blue"
        if self.task not in TASKS:
            return f'task is "{_short(self.task)}" and not one of {", ".join(TASKS)}'
        if self.kind is not None and self.kind not in KINDS:
            return f'kind is "{_short(self.kind)}" and not one of {", ".join(KINDS)}'
        if self.kind is not None and self.task != "control":
            return f'kind is "{self.kind}" and task "{self.task}", and only control has kinds'
        return None


@dataclass(frozen=True)
class ComponentIndex:
    """Contents of `model_index.json` in a folder that is no model, but works with one: name, licence and sources."""

    name: str
    base: str
    license: str
    source: tuple[SourceFile, ...] = ()
    converter: str = ""
    format: Annotated[int, 1, 2**30] = 1

    def problem(self) -> str | None:
        """Returns a contradiction between these facts, or None."""
        return None if self.format == 1 else f"format is {self.format}, and this program reads format 1"


def to_json(config) -> dict:
    """Returns the JSON form of one of the dataclasses above, in the order of its fields."""
    return dataclasses.asdict(config)


def from_json(cls: type[T], obj, where: str) -> T:
    """Reads one of the dataclasses above from its JSON form.

    Args:
        cls: the dataclass.
        obj: the parsed JSON.
        where: the file, for errors.

    Raises:
        ModelError: a field is unknown, missing or wrongly typed, or numbers contradict each other.
    """
    if not isinstance(obj, dict):
        raise ModelError(f"{where} holds {_kind(obj)}", "a JSON object")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(obj) - set(fields)):
        raise ModelError(f"{where} has unknown fields: {_some(unknown)}", f"only {', '.join(fields)}")
    required = [n for n, f in fields.items() if f.default is dataclasses.MISSING]
    if missing := [n for n in required if n not in obj]:
        raise ModelError(f"{where} lacks {_some(missing)}", f"the fields {', '.join(required)}")
    hints = typing.get_type_hints(cls, include_extras=True)
    config = cls(**{n: _checked(hints[n], value, f"{where}: {n}") for n, value in obj.items()})
    problem = getattr(config, "problem", None)
    if problem and (contradiction := problem()):
        raise ModelError(f"{where}: {contradiction}", "numbers that agree", "take the file from the original model")
    return config


def _checked(hint, value, where: str):
    """Returns `value` as the annotated type: numbers within their limits, lists as tuples."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_json(hint, value, where)
    if isinstance(hint, types.GenericAlias):  # tuple[X, ...]
        if not isinstance(value, list | tuple):
            raise ModelError(f"{where} is {_kind(value)}", "a list")
        return tuple(_checked(hint.__args__[0], v, where) for v in value)
    if isinstance(hint, types.UnionType):  # X | None
        return None if value is None else _checked(hint.__args__[0], value, where)
    limits = getattr(hint, "__metadata__", None)
    hint = hint.__origin__ if limits else hint
    if type(value) is not hint and not (hint is float and type(value) is int):
        raise ModelError(f"{where} is {_kind(value)}", hint.__name__)
    if limits:
        low, high = limits
        if not low <= value <= high:
            raise ModelError(f"{where} is {_kind(value)}", f"a number from {low} to {high}" if low < high else f"{low}")
    return hint(value)


def _kind(value) -> str:
    return f"{type(value).__name__} {_short(repr(value))}"


def _some(names: list[str]) -> str:
    return ", ".join(_short(name) for name in names[:5])


def _short(text: str) -> str:
    return text if len(text) < 40 else text[:37] + "..."
