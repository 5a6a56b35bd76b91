"""Sizes of the networks and the facts of a model folder, as frozen dataclasses; the published ones as instances.

JSON goes in and out strictly: an unknown field, a missing field or a field of another type is an error that names it.
Field names are those of the public code: FluxParams and AutoEncoderParams of black-forest-labs/flux, and the
`config.json` of T5 and CLIP in transformers.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass, field

from .errors import ModelError


@dataclass(frozen=True)
class FluxConfig:
    """Sizes of the flow transformer (FluxParams in black-forest-labs/flux, src/flux/model.py)."""

    in_channels: int  # of a packed latent: 16 latent channels of a patch of 2 x 2
    out_channels: int
    vec_in_dim: int  # width of CLIP's pooled vector
    context_in_dim: int  # width of T5
    hidden_size: int
    mlp_ratio: float
    num_heads: int
    depth: int  # double blocks
    depth_single_blocks: int
    axes_dim: tuple[int, ...]  # rope widths of the three position axes; their sum is the head width
    theta: int
    guidance_embed: bool

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        """Width of the hidden layer of each MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    def problem(self) -> str | None:
        """What contradicts itself in these numbers, or None."""
        if self.hidden_size % self.num_heads:
            return f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}"
        if len(self.axes_dim) != 3 or any(d % 2 for d in self.axes_dim) or sum(self.axes_dim) != self.head_dim:
            return (
                f"axes_dim {list(self.axes_dim)} are not three even numbers with the sum {self.head_dim} (head width)"
            )
        return None


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 v1.1 encoder (transformers' T5Config; gated tanh-GELU, no biases)."""

    d_model: int
    d_kv: int
    d_ff: int
    num_heads: int
    num_layers: int
    vocab_size: int
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    layer_norm_epsilon: float

    def problem(self) -> str | None:
        """What contradicts itself in these numbers, or None."""
        if self.relative_attention_num_buckets % 4:
            return f"relative_attention_num_buckets {self.relative_attention_num_buckets} is not divisible by 4"
        return None


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of CLIP's text model (transformers' CLIPTextConfig; quick GELU, causal)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    layer_norm_eps: float
    eos_token_id: int  # 2 in every published file, which means: the first position of the largest id

    def problem(self) -> str | None:
        """What contradicts itself in these numbers, or None."""
        if self.hidden_size % self.num_attention_heads:
            return f"hidden_size {self.hidden_size} is not divisible by {self.num_attention_heads} heads"
        return None


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder (AutoEncoderParams in black-forest-labs/flux, and the groups, a literal there)."""

    in_channels: int
    out_ch: int
    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    norm_num_groups: int
    scale_factor: float  # latents = (z - shift_factor) * scale_factor
    shift_factor: float

    @property
    def downsampling(self) -> int:
        """Pixels along each side of one latent position."""
        return 2 ** (len(self.ch_mult) - 1)

    def problem(self) -> str | None:
        """What contradicts itself in these numbers, or None."""
        for mult in self.ch_mult:
            if self.ch * mult % self.norm_num_groups:
                return f"{self.ch * mult} channels are not divisible by {self.norm_num_groups} groups"
        return None


FLUX_DEV = FluxConfig(
    in_channels=64, out_channels=64, vec_in_dim=768, context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0,
    num_heads=24, depth=19, depth_single_blocks=38, axes_dim=(16, 56, 56), theta=10_000, guidance_embed=True,
)  # fmt: skip
FLUX_SCHNELL = dataclasses.replace(FLUX_DEV, guidance_embed=False)
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


@dataclass(frozen=True)
class Schedule:
    """How sigmas are shifted: exp(mu), with mu linear in the number of image tokens, or not at all (schnell)."""

    shift: str = "dynamic"  # or "none"
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096

    def problem(self) -> str | None:
        """What contradicts itself in these numbers, or None."""
        if self.shift not in ("dynamic", "none"):
            return f'shift is "{self.shift}" and not "dynamic" or "none"'
        if self.max_image_seq_len == self.base_image_seq_len:
            return "base_image_seq_len and max_image_seq_len are equal"
        return None


@dataclass(frozen=True)
class Defaults:
    """What a picture is made with where the user does not say."""

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float


@dataclass(frozen=True)
class Source:
    """A file that a model folder was converted from."""

    file: str
    sha256: str
    bytes: int
    layout: str


@dataclass(frozen=True)
class ModelIndex:
    """`model_index.json` of a model folder (DESIGN, section 4)."""

    name: str
    base: str
    license: str
    filters: str  # "required" | "none"; what the transformer is can only add the requirement
    max_sequence_length: int
    schedule: Schedule
    defaults: Defaults
    source: tuple[Source, ...] = field(default=())
    converter: str = ""
    format: int = 1

    def problem(self) -> str | None:
        """What contradicts itself in these facts, or None."""
        if self.filters not in ("required", "none"):
            return f'filters is "{self.filters}" and not "required" or "none"'
        if self.format != 1:
            return f"format is {self.format}, and this program reads format 1"
        return None


def requires_filters(config: FluxConfig, index: ModelIndex) -> bool:
    """Whether the licence of this model demands content filters or review.

    Decided by what the transformer is: FLUX.1's published size with guidance embedding (dev, Krea, Kontext). The
    folder's JSON can add the requirement and never lift it.
    """
    size = ("hidden_size", "num_heads", "depth", "depth_single_blocks", "guidance_embed")
    return index.filters == "required" or all(getattr(config, f) == getattr(FLUX_DEV, f) for f in size)


def to_json(config) -> dict:
    """The JSON form of one of the dataclasses above, in the order of its fields."""
    return dataclasses.asdict(config)


def from_json(cls, obj, where: str):
    """One of the dataclasses above from its JSON form.

    Args:
        cls: the dataclass.
        obj: what the JSON parser gave.
        where: the file, for errors.

    Raises:
        ModelError: an unknown, missing or wrongly typed field, or numbers that contradict each other.
    """
    if not isinstance(obj, dict):
        raise ModelError(f"{where} holds {_kind(obj)}", "a JSON object")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(obj) - set(fields))
    if unknown:
        raise ModelError(f"{where} has unknown fields: {', '.join(unknown[:5])}", f"only {', '.join(fields)}")
    required = [n for n, f in fields.items() if f.default is dataclasses.MISSING]
    missing = [n for n in required if n not in obj]
    if missing:
        raise ModelError(f"{where} lacks {', '.join(missing[:5])}", f"the fields {', '.join(required)}")
    hints = typing.get_type_hints(cls)
    config = cls(
        **{n: _checked(hints[n], value, f"{where}: {n}", _RANGES.get(n, (1, 2**24))) for n, value in obj.items()}
    )
    problem = config.problem() if hasattr(config, "problem") else None
    if problem:
        raise ModelError(f"{where}: {problem}", "numbers that agree", "take the file from the original model")
    return config


# What an integer may be, where it is not a size (a hostile file should not make us build a billion blocks).
_RANGES = {
    "depth": (0, 512),
    "depth_single_blocks": (0, 512),
    "num_layers": (1, 512),
    "num_hidden_layers": (1, 512),
    "eos_token_id": (0, 2**24),
    "bytes": (0, 2**60),
}


def _checked(hint, value, where: str, limits: tuple[int, int]):
    """`value` as the annotated type: integers within their limits, floats finite, lists as tuples."""
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value, where)
    if isinstance(hint, types.GenericAlias):  # tuple[X, ...]
        if not isinstance(value, list | tuple):
            raise ModelError(f"{where} is {_kind(value)}", "a list")
        return tuple(_checked(hint.__args__[0], v, where, limits) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint:
        raise ModelError(f"{where} is {_kind(value)}", hint.__name__)
    low, high = limits if hint is int else (-1e9, 1e9)
    if hint in (int, float) and not low <= value <= high:
        raise ModelError(f"{where} is {value}", f"a number from {low} to {high}")
    return value


def _kind(value) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) < 40 else text[:37] + '...'}"
