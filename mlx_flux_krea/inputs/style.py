"""Style images: Redux turns each into tokens, which stand beside those of T5 by one of three rules.

    grid     a weight w from 0 to 1 shrinks the grid of an image's tokens (27 x 27) to a side of round(27 w), 3 at
             least, each token then being the mean of those that it replaces. So the prompt keeps its say. At weight 1
             it is `concat`.
    concat   all tokens of every image after those of the text (black-forest-labs/flux), each image's multiplied by its
             weight (mflux; Black Forest Labs have no weights).
    sum      the text's tokens and an image's, times the image's weight, summed over the images, and the pooled vector
             likewise (diffusers' FluxPriorReduxPipeline): with several images the text counts as often.

The ids of all these tokens are zeros, like those of text: only the length of the text grows.
S text tokens, N tokens of an image, T width of T5, V width of CLIP's pooled vector.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..errors import ModelError, UsageError, amount
from ..files import sha256_if_exists
from ..licence import SMALLEST
from ..models import siglip
from ..models.config import FluxConfig
from ..presets import MAX_STYLES, MAX_WEIGHT, STYLE_RULES
from ..prompts import EncodedPrompt
from ..residency import Blocks
from ..weights import ComponentFolder, open_component
from .image import open_image

CACHED = 8  # images whose tokens stay in memory; one takes 6 MB at FLUX.1's size in 16 bits
LEAST = 3  # side of the smallest grid


@dataclass(frozen=True)
class Style:
    """The style images of a picture.

    Attributes:
        images: upright RGB.
        weights: of each.
        pooled_weights: of each, for the pooled vector; only by the rule `sum`.
        rule: one of `presets.STYLE_RULES`.
    """

    images: tuple[Image.Image, ...]
    weights: tuple[float, ...]
    pooled_weights: tuple[float, ...]
    rule: str

    @cached_property
    def hashes(self) -> tuple[str, ...]:
        """The sha256 of each image's pixels."""
        return tuple(hashlib.sha256(image.tobytes()).hexdigest() for image in self.images)

    def tokens(self, side: int) -> int:
        """Returns the number of tokens that stand beside those of the text, for an encoder with this grid."""
        if self.rule == "grid":
            return sum(shrunk_side(side, weight) ** 2 for weight in self.weights)
        return side**2 * (1 if self.rule == "sum" else len(self.images))

    def record(self) -> dict[str, Any]:
        """Returns everything here that decides a picture, as JSON."""
        facts = [
            {"width": image.width, "height": image.height, "rgb_sha256": digest, "weight": weight}
            for image, digest, weight in zip(self.images, self.hashes, self.weights, strict=True)
        ]
        if self.rule == "sum":
            facts = [one | {"pooled_weight": w} for one, w in zip(facts, self.pooled_weights, strict=True)]
        return {"rule": self.rule, "images": facts}


def open_images(given: Any) -> tuple[Image.Image, ...] | None:
    """Opens style images: one or a list of them, each as `open_image` takes it. None and an empty list are None.

    Raises:
        UsageError: not an image, or too many.
    """
    if given is None:
        return None
    images = list(given) if isinstance(given, list | tuple) else [given]
    if len(images) > MAX_STYLES:
        raise UsageError(f"`style_images` holds {amount(len(images), 'image')}", f"{MAX_STYLES} at most")
    opened = []
    for image in images:
        opened.append(open_image(image, "style_images"))
    if None in opened:
        raise UsageError("`style_images` holds None", "images")
    return tuple(opened) or None


def make_style(images: Any, weights: Any, rule: Any, pooled_weights: Any = None) -> Style | None:
    """Returns the style images of a request with every default filled in; None: it has none.

    Args:
        images: from `open_images`.
        weights: a number for all, or one for each; None: 1.
        rule: None: the first of `presets.STYLE_RULES`.
        pooled_weights: as `weights`, for the rule `sum`.

    Raises:
        UsageError: a rule or a weight that does not exist, or weights without images.
    """
    if images is None:
        given = {"style_weights": weights, "style_rule": rule, "style_pooled_weights": pooled_weights}
        if name := next((name for name, value in given.items() if value is not None), None):
            raise UsageError(f"`{name}` does nothing without a style image", "", "add one, or leave it out")
        return None
    rule = STYLE_RULES[0] if rule is None else rule
    if rule not in STYLE_RULES:
        raise UsageError(f"`style_rule` is {rule!r}", f"one of {', '.join(STYLE_RULES)}")
    if pooled_weights is not None and rule != "sum":
        raise UsageError(f"`style_pooled_weights` does nothing by the rule {rule}", "", "leave it out")
    return Style(
        images=images,
        weights=_weights("style_weights", weights, len(images), rule),
        pooled_weights=_weights("style_pooled_weights", pooled_weights, len(images), rule),
        rule=rule,
    )


def _weights(name: str, given: Any, count: int, rule: str) -> tuple[float, ...]:
    weights = (1.0 if given is None else given,) * count if not isinstance(given, tuple | list) else tuple(given)
    if len(weights) != count:
        raise UsageError(f"`{name}` holds {amount(len(weights), 'weight')}", f"{count}, one for each style image")
    for weight in weights:
        number = float(weight) if type(weight) in (int, float) else float("nan")
        if rule == "grid" and not 0 < number <= 1:
            todo = "leave an image without weight out; larger weights: `style_rule` concat"
            raise UsageError(f"`{name}` holds {weight!r}", "numbers above 0, up to 1, by the rule grid", todo)
        if not abs(number) <= MAX_WEIGHT:
            raise UsageError(f"`{name}` holds {weight!r}", f"numbers from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
    return tuple(map(float, weights))


# --- the results of FluxPriorReduxPipeline ---


@dataclass(frozen=True, repr=False)
class StyledPrompt:
    """A text with style images, from which embeds are computed when somebody reads them.

    Attributes:
        prompt: for CLIP, and for T5 where prompt_2 is None; None: there is no text.
        prompt_2: for T5.
        style: the images.
        compute: returns the encoded prompt.
    """

    prompt: str | None
    prompt_2: str | None
    style: Style
    compute: Callable[["StyledPrompt"], EncodedPrompt]

    @cached_property
    def encoded(self) -> EncodedPrompt:
        """(1, S + N, T) and (1, V)."""
        return self.compute(self)


class StyledEmbeds:
    """One of the two results of FluxPriorReduxPipeline: an array that remembers its text and its images.

    A pipeline that is given both takes texts and images from them and computes the arrays itself, so that its filters
    read the text and see the images. Everywhere else it is an array: `mx.array(x)`, `numpy.asarray(x)`, `x.shape`.

    Args:
        source: the text and the images.
        name: of the attribute of `EncodedPrompt`.
    """

    def __init__(self, source: StyledPrompt, name: str):
        self.source, self._name = source, name

    def __repr__(self) -> str:
        images = amount(len(self.source.style.images), "style image")
        return f"StyledEmbeds({self._name} of {images}, prompt={self.source.prompt!r})"

    @property
    def array(self) -> mx.array:
        """The array, evaluated."""
        return getattr(self.source.encoded, self._name)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.array.shape

    @property
    def dtype(self) -> mx.Dtype:
        """Type of the array."""
        return self.array.dtype

    def __mlx_array__(self) -> mx.array:
        return self.array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = np.array(self.array.astype(mx.float32))
        return array if dtype is None else array.astype(dtype)


def remembered(embeds: Any, pooled: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a request that results of FluxPriorReduxPipeline stand for; none: they are other arrays.

    Args:
        embeds: its field prompt_embeds.
        pooled: its field pooled_prompt_embeds.
        request: all its fields.

    Raises:
        UsageError: one of them alone, of two results, or with a text or style images beside them.
    """
    sources = [value.source for value in (embeds, pooled) if isinstance(value, StyledEmbeds)]
    if not sources:
        return {}
    if len(sources) != 2 or sources[0] is not sources[1]:
        found = "`prompt_embeds` and `pooled_prompt_embeds` are not of one result of FluxPriorReduxPipeline"
        raise UsageError(found, "both, as it returned them", "pipe(**prior(image))")
    names = ("prompt", "prompt_2", "style_images", "style_weights", "style_rule", "style_pooled_weights")
    if name := next((name for name in names if request.get(name) is not None), None):
        todo = "give the text to the prior: prior(image, prompt)" if name.startswith("prompt") else ""
        raise UsageError(f"`{name}` is given with the result of FluxPriorReduxPipeline", "one of them", todo)
    source, style = sources[0], sources[0].style
    return {
        "prompt": source.prompt,
        "prompt_2": source.prompt_2,
        "prompt_embeds": None,
        "pooled_prompt_embeds": None,
        "style_images": style.images,
        "style_weights": style.weights,
        "style_pooled_weights": style.pooled_weights,
        "style_rule": style.rule,
    }


# --- rules: functions of arrays ---


def shrunk_side(side: int, weight: float) -> int:
    """Returns the side of the grid to which a weight shrinks one of this side."""
    return min(max(round(side * weight), LEAST), side)


def shrink(tokens: mx.array, side: int) -> mx.array:
    """Shrinks a square grid of tokens: (1, N, T) to (1, side^2, T), in the type of the tokens.

    Each token is the mean of those that it covers, wholly or in part, as `interpolate(mode="area")` of torch and the
    tools for ComfyUI compute it.
    """
    before = round(tokens.shape[1] ** 0.5)
    if side == before:
        return tokens
    cover = np.zeros((side, before), np.float32)
    for i in range(side):
        first, last = i * before // side, -(-(i + 1) * before // side)
        cover[i, first:last] = 1 / (last - first)
    mean = mx.array(cover)
    rows = mean @ tokens.astype(mx.float32).reshape(before, -1)  # (side, before T)
    both = mean @ rows.reshape(side, before, -1)
    return both.reshape(1, side * side, -1).astype(tokens.dtype)


def styled(style: Style, prompt: EncodedPrompt, tokens: Sequence[mx.array]) -> EncodedPrompt:
    """Returns an encoded prompt with the tokens of style images.

    Args:
        style: weights and rule.
        prompt: (1, S, T) and (1, V).
        tokens: (1, N, T) of each image.
    """
    tokens = [array.astype(prompt.embeds.dtype) for array in tokens]
    if style.rule != "sum":
        side = round(tokens[0].shape[1] ** 0.5)
        weighted = [
            shrink(array, shrunk_side(side, weight)) if style.rule == "grid" else _times(array, weight)
            for array, weight in zip(tokens, style.weights, strict=True)
        ]
        return EncodedPrompt(mx.concatenate([prompt.embeds, *weighted], axis=1), prompt.pooled, prompt.cut)
    both = [mx.concatenate([prompt.embeds, array], axis=1) for array in tokens]
    return EncodedPrompt(
        _weighted_sum(both, style.weights),
        _weighted_sum([prompt.pooled] * len(tokens), style.pooled_weights),
        prompt.cut,
    )


def _times(array: mx.array, weight: float) -> mx.array:
    return array if weight == 1 else (array.astype(mx.float32) * weight).astype(array.dtype)


def _weighted_sum(arrays: Sequence[mx.array], weights: Sequence[float]) -> mx.array:
    total = sum(array.astype(mx.float32) * weight for array, weight in zip(arrays, weights, strict=True))
    return mx.array(total).astype(arrays[0].dtype)


def without_text(length: int, flux: FluxConfig, dtype: mx.Dtype) -> EncodedPrompt:
    """Returns what stands for a text where there is none: zeros, as in diffusers."""
    return EncodedPrompt(mx.zeros((1, length, flux.context_in_dim), dtype), mx.zeros((1, flux.vec_in_dim), dtype))


# --- the encoder ---


def open_redux(flux: FluxConfig) -> ComponentFolder:
    """Opens the installed Redux for a model, and checks the headers of its shards.

    Raises:
        ModelError: it is not installed (with the command that installs it), damaged, or does not fit the model.
    """
    folder = open_component("redux")
    width = folder.networks["image_embedder"].sizes.txt_in_features
    if width != flux.context_in_dim:
        found = f"{folder.path} makes tokens that are {width} wide"
        raise ModelError(found, f"{flux.context_in_dim}, as this model reads", "style images need another model")
    folder.check()
    return folder


def adds_duty(flux: FluxConfig) -> bool:
    """Returns True where Redux, which is under the licence of FLUX.1 [dev], makes filters required of a model."""
    return flux.hidden_size >= SMALLEST


def seen(image: Image.Image, folder: ComponentFolder | None) -> np.ndarray:
    """Returns a style image as SigLIP sees it: (H, W, 3) uint8.

    Raises:
        ValueError: Redux was not opened.
    """
    if folder is None:
        raise ValueError("[style.seen] Redux was not opened.")
    return np.asarray(siglip.to_square(image, folder.networks["image_encoder"].sizes.image_size))


class StyleEncoder:
    """SigLIP and Redux. Tokens stay in memory, networks do not: their layers are streamed, as T5's are.

    Args:
        dtype: the compute type; float16 is bfloat16 here.
        check: called while a read is waited for; raises to stop.
    """

    def __init__(self, dtype: mx.Dtype, check: Callable[[], None]):
        self._dtype, self._check = dtype, check
        self._encoded: OrderedDict[tuple, mx.array] = OrderedDict()

    def encode(self, style: Style, folder: ComponentFolder, make_run: Callable[..., Callable]) -> list[mx.array]:
        """Returns the tokens (1, N, T) of each style image.

        Args:
            style: the images.
            folder: from `open_redux`.
            make_run: called as make_run(parts, run); returns a `run` that also reports progress and can be stopped.

        Raises:
            ModelError: weights missing or damaged.
        """
        made_by = str(folder.path), sha256_if_exists(folder.path / "manifest.json")
        keys = [(*made_by, image.size, digest) for image, digest in zip(style.images, style.hashes, strict=True)]
        images = dict(zip(keys, style.images, strict=True))
        missing = {key: image for key, image in images.items() if key not in self._encoded}
        if missing:
            try:
                self._encoded |= dict(zip(missing, self._encode(list(missing.values()), folder, make_run), strict=True))
            finally:
                mx.clear_cache()
        encoded = [self._encoded[key] for key in keys]
        for key in keys:
            self._encoded.move_to_end(key)
        while len(self._encoded) > max(CACHED, len(images)):
            self._encoded.popitem(last=False)
        return encoded

    def forget(self) -> None:
        """Drops what was encoded: its values are not to be trusted."""
        self._encoded.clear()

    def _encode(
        self, images: Sequence[Image.Image], folder: ComponentFolder, make_run: Callable[..., Callable]
    ) -> list[mx.array]:
        encoder, embedder = (folder.networks[name] for name in ("image_encoder", "image_embedder"))
        network, redux, size = encoder.load(self._dtype), embedder.load(self._dtype), encoder.sizes.image_size
        dtype = network.position_embedding.dtype
        layers = Blocks(network, encoder.tensors(), network.layers, dtype=dtype, budget=0, check=self._check)
        last = Blocks(redux, embedder.tensors(), [redux], dtype=dtype, budget=0, check=self._check)
        count = len(images)
        with layers.streaming(count) as run_layer, last.streaming(count) as run_last:

            def run_either(part: Callable, *args: Any) -> Any:
                return (run_last if part is redux else run_layer)(part, *args)

            run = make_run(count * (len(network.layers) + 3), run_either)
            return [run(redux, network(siglip.preprocess(image, size), run)) for image in images]
