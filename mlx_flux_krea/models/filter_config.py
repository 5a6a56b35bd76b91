"""Sizes of the filters' networks, with the published ones as instances; `config.py` has those of all others.

Field names are those of the `config.json` of transformers. Other fields of a published file (activations, label names,
token ids) are checked when it is converted: the networks are written for those values alone.
"""

from dataclasses import dataclass
from typing import Annotated

from .config import ComponentIndex, Count, Epsilon, Width

Vocabulary = Annotated[int, 1, 2**22]
TokenId = Annotated[int, 0, 2**22]
Theta = Annotated[float, 1.0, 1e12]
SELF_TEST = "selftest.json"  # in a filter's folder: its answers when it was converted
LABELS = ("normal", "nsfw")  # the classifier's labels, in the order of its logits


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of the picture classifier (transformers' ViTConfig; erf GELU, biases everywhere, no pooler)."""

    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Count
    num_attention_heads: Count
    image_size: Annotated[int, 1, 4096]  # pixels of each side
    patch_size: Annotated[int, 1, 1024]
    layer_norm_eps: Epsilon
    labels: tuple[str, ...]

    @property
    def positions(self) -> int:
        """Number of patches, and one for the class token before them."""
        return (self.image_size // self.patch_size) ** 2 + 1

    def problem(self) -> str | None:
        """Returns a contradiction between these numbers, or None."""
        if self.hidden_size % self.num_attention_heads:
            return f"hidden_size {self.hidden_size} is not divisible by {self.num_attention_heads} heads"
        if self.image_size % self.patch_size:
            return f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}"
        if self.labels != LABELS:
            return f"labels are {', '.join(self.labels)[:60]} and not {', '.join(LABELS)}"
        return None


@dataclass(frozen=True)
class MistralConfig:
    """Sizes of Pixtral's text decoder (transformers' MistralConfig; gated SiLU, causal, no biases)."""

    vocab_size: Vocabulary
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Width
    rms_norm_eps: Epsilon
    rope_theta: Theta

    def problem(self) -> str | None:
        """Returns a contradiction between these numbers, or None."""
        if self.num_attention_heads % self.num_key_value_heads:
            return f"{self.num_attention_heads} heads cannot share {self.num_key_value_heads} of keys and values"
        return f"head_dim {self.head_dim} is odd" if self.head_dim % 2 else None


@dataclass(frozen=True)
class PixtralVisionConfig:
    """Sizes of Pixtral's vision tower (transformers' PixtralVisionConfig; gated SiLU, no biases, 2-D rope)."""

    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Count
    num_attention_heads: Count
    image_size: Annotated[int, 1, 4096]  # the longest side, in pixels
    patch_size: Annotated[int, 1, 1024]
    rope_theta: Theta

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def problem(self) -> str | None:
        """Returns a contradiction between these numbers, or None."""
        if self.hidden_size % self.num_attention_heads or self.head_dim % 4:
            heads = self.num_attention_heads
            return f"hidden_size {self.hidden_size} is not {heads} heads of a width that 4 divides"
        return None


@dataclass(frozen=True)
class PixtralConfig:
    """Sizes of a decoder that reads text and pictures (LlavaConfig; the projector has an erf GELU and biases)."""

    text_config: MistralConfig
    vision_config: PixtralVisionConfig
    image_token_index: TokenId  # stands for one patch
    head_ids: tuple[TokenId, ...]  # tokens whose logits are computed: "yes", "no", and others for inspection

    def problem(self) -> str | None:
        """Returns a contradiction between these numbers, or None."""
        if len(self.head_ids) < 2 or len(set(self.head_ids)) < len(self.head_ids):
            return "head_ids are not two tokens or more, each of them once"
        if max(*self.head_ids, self.image_token_index) >= self.text_config.vocab_size:
            return f"head_ids or image_token_index are not below vocab_size {self.text_config.vocab_size}"
        return None


NSFW_VIT = ViTConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224,
    patch_size=16, layer_norm_eps=1e-12, labels=LABELS,
)  # fmt: skip
PIXTRAL_12B = PixtralConfig(
    text_config=MistralConfig(
        vocab_size=131_072, hidden_size=5120, intermediate_size=14_336, num_hidden_layers=40, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-5, rope_theta=1e9,
    ),
    vision_config=PixtralVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=1024,
        patch_size=16, rope_theta=10_000.0,
    ),
    image_token_index=10,
    head_ids=(13_059, 2649),
)  # fmt: skip
# of model.safetensors in Falconsai/nsfw_image_detection
NSFW_SHA256 = "97b2ce64ec146884b37f98ee7944ca4891aa72f6827dc0cb10684a1cbecd5830"
# repositories of Pixtral 12B; the hub states the sha256 of their files
PIXTRAL_REPOSITORIES = (
    "mistral-community/pixtral-12b", "mistral-labs/pixtral-12b", "mlx-community/pixtral-12b-4bit",
)  # fmt: skip
OWN_LAYOUT = "flux-krea model folder"  # of sources that are folders of ours


@dataclass(frozen=True)
class FilterIndex(ComponentIndex):
    """Contents of `model_index.json` in a filter's folder: name, licence and sources."""

    weights: str = ""  # "published", or "unknown": --allow-unknown-filter was given; "": by an earlier version

    def is_published(self, name: str) -> bool:
        """Returns True where the filter `name` was made from its published files, by their sha256.

        That of the classifier is known. Those of Pixtral are stated by the hub, which was asked at conversion.
        """
        originals = [source for source in self.source if source.layout != OWN_LAYOUT]
        if name == "nsfw":
            return [source.sha256 for source in originals] == [NSFW_SHA256]
        return bool(originals) and all(source.published in PIXTRAL_REPOSITORIES for source in originals)

    def problem(self) -> str | None:
        """Returns a contradiction between these facts, or None."""
        if self.weights not in ("", "published", "unknown"):
            return f'weights is "{self.weights[:60]}" and not "published" or "unknown"'
        return super().problem()
