"""FluxPriorReduxPipeline: style images to embeds, with diffusers' names. The rule is `sum` of `inputs/style.py`.

The embeds remember the text and the images that they stand for. A `FluxPipeline` that is given both takes those, and
not the arrays: so its filters read the text and see the images, and the picture's record names them.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from . import compat
from .errors import ModelError, UsageError, amount, short_repr
from .home import is_hub_id
from .inputs import style as styles
from .inputs.style import Style, StyledEmbeds, StyledPrompt, StyleEncoder
from .models.config import CLIP_L
from .pipeline import FluxPipeline, chosen_dtype
from .presets import MAX_SEQUENCE_LENGTH
from .prompts import EncodedPrompt
from .weights import ComponentFolder, open_component
from .worker import Worker

CARD = "black-forest-labs/FLUX.1-Redux-dev"


class ReduxOutput(dict):
    """The result of a call, by name, by attribute, or by place: prompt_embeds and pooled_prompt_embeds."""

    @property
    def prompt_embeds(self) -> StyledEmbeds:
        """(1, S + N, T): tokens of the text and of the images."""
        return dict.__getitem__(self, "prompt_embeds")

    @property
    def pooled_prompt_embeds(self) -> StyledEmbeds:
        """(1, V): CLIP's pooled vector of the text."""
        return dict.__getitem__(self, "pooled_prompt_embeds")

    def __getitem__(self, key: str | int) -> StyledEmbeds:
        return tuple(self.values())[key] if isinstance(key, int) else dict.__getitem__(self, key)


class FluxPriorReduxPipeline(compat.DiffusersMethods):
    """Style images to embeds, by the installed FLUX.1 Redux. Names are those of diffusers.

    Example:
        Variations of a picture, by any text-to-image model of FLUX.1's size:

            from mlx_flux_krea import FluxPipeline, FluxPriorReduxPipeline

            prior = FluxPriorReduxPipeline.from_pretrained("black-forest-labs/FLUX.1-Redux-dev")
            pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-Krea-dev")
            images = pipe(**prior("picture.png"), guidance_scale=2.5, seed=0).images

    Attributes:
        folder: the installed Redux.
        dtype: the compute type, MLX's name of it.
    """

    def __init__(
        self,
        folder: ComponentFolder | None = None,
        dtype: str | None = None,
        pipeline: FluxPipeline | None = None,
        **others: Any,
    ):
        if others or not isinstance(folder, ComponentFolder):
            name = type(self).__name__
            raise UsageError(f"{name}() opens nothing", "an open folder", f'write {name}.from_pretrained("{CARD}")')
        self.folder = folder
        self.dtype = dtype or folder.networks["image_encoder"].dtype
        self._pipeline = pipeline
        self._worker = Worker()
        self._encoder = StyleEncoder(getattr(mx, self.dtype), self._worker.check)

    def __repr__(self) -> str:
        return short_repr(type(self).__name__, str(self.folder.path), dtype=self.dtype)

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike | None = None,
        *,
        pipeline: FluxPipeline | None = None,
        dtype: str | mx.Dtype | None = None,
        torch_dtype: Any = None,
        **others: Any,
    ) -> "FluxPriorReduxPipeline":
        """Opens the installed Redux. Only its JSON is read; weights follow when they are needed.

        Args:
            model: None, its hub id or its folder: there is one, in the home folder.
            pipeline: whose text encoders read prompts; it must be given for a prompt. (In diffusers text encoders are
                given, which here nobody has apart from a pipeline.)
            dtype: the compute type; None: the pipeline's, or the folder's.
            torch_dtype: diffusers' name of `dtype`.
            others: further arguments of diffusers (`compat.PRIOR`), accepted with a log line or refused.

        Raises:
            ModelError: Redux is not installed, damaged, or does not fit the pipeline.
            UsageError: a type that does not exist, or no pipeline.
        """
        if "pretrained_model_name_or_path" in others and model is None:
            model = others.pop("pretrained_model_name_or_path")
        compat.take_known(cls.from_pretrained, others, compat.PRIOR, owner="FluxPriorReduxPipeline")
        chosen = chosen_dtype(dtype, torch_dtype)
        if pipeline is not None and not isinstance(pipeline, FluxPipeline):
            raise UsageError(f"`pipeline` is {type(pipeline).__name__}", "a FluxPipeline")
        folder = open_component("redux") if pipeline is None else pipeline.load_redux()
        path = Path(os.path.expanduser(model)) if model is not None else folder.path
        if not (is_hub_id(str(model)) and not path.exists()) and str(model) != "redux" and path != folder.path:
            raise ModelError(f"{model} is not the installed Redux", f"{folder.path}, or its hub id, {CARD}")
        folder.check()
        return cls(folder, chosen or (pipeline.dtype if pipeline else None), pipeline)

    def __call__(
        self,
        image: Any,
        prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        prompt_embeds: Any = None,
        pooled_prompt_embeds: Any = None,
        prompt_embeds_scale: float | Sequence[float] | None = 1.0,
        pooled_prompt_embeds_scale: float | Sequence[float] | None = 1.0,
        return_dict: bool = True,
    ) -> ReduxOutput:
        """Returns embeds of style images, and of a text.

        Nothing is computed before the arrays are read (`mx.array(out.prompt_embeds)`) or given to a pipeline.

        Args:
            image: a PIL image, a path or an array, or a list of them; or a batch (B, H, W, 3).
            prompt: one text for all images, or the same for each; None: zeros stand for it.
            prompt_2: text for T5, where it differs.
            prompt_embeds: is refused: a filter could not read it.
            pooled_prompt_embeds: is refused likewise.
            prompt_embeds_scale: a number for all images, or one for each, by which the tokens of each image *and* of
                the text are multiplied before they are summed over the images.
            pooled_prompt_embeds_scale: the same for the pooled vector.
            return_dict: False: the result is the tuple of its two values.

        Raises:
            UsageError: an image or a scale that cannot be used, different texts for the images, or a text without a
                pipeline to read it.
        """
        for name, value in (("prompt_embeds", prompt_embeds), ("pooled_prompt_embeds", pooled_prompt_embeds)):
            if value is not None:
                raise compat.refuse(name, "give the text as `prompt`, which filters can read")
        images = styles.open_images(_each(image))
        if images is None:
            raise UsageError("`image` is None", "a style image, or a list of them")
        scales = {"prompt_embeds_scale": prompt_embeds_scale, "pooled_prompt_embeds_scale": pooled_prompt_embeds_scale}
        for name, value in scales.items():
            count = len(value) if isinstance(value, list | tuple) else len(images)
            if count != len(images):
                raise UsageError(f"`{name}` holds {amount(count, 'number')}", f"{len(images)}, one for each image")
        style = styles.make_style(images, prompt_embeds_scale, "sum", pooled_prompt_embeds_scale)
        assert style is not None  # there are images
        texts = _one_text("prompt", prompt), _one_text("prompt_2", prompt_2)
        if texts != (None, None) and self._pipeline is None:
            todo = f'FluxPriorReduxPipeline.from_pretrained("{CARD}", pipeline=pipe)'
            raise UsageError("`prompt` is given, and there are no text encoders to read it", "a pipeline", todo)
        source = StyledPrompt(*texts, style, self._encode)
        both = {name: StyledEmbeds(source, field) for name, field in _FIELDS.items()}
        return ReduxOutput(both) if return_dict else tuple(both.values())  # type: ignore[return-value]

    def _encode(self, source: StyledPrompt) -> EncodedPrompt:
        """Computes the embeds of a text with style images."""
        text = None
        if source.prompt is not None and self._pipeline is not None:
            text = EncodedPrompt(*self._pipeline.encode_prompt(source.prompt, source.prompt_2))

        def encode(style: Style) -> EncodedPrompt:
            prompt = text or self._no_text()
            tokens = self._encoder.encode(style, self.folder, lambda parts, run: run)
            result = styles.styled(style, prompt, tokens)
            if not all(mx.isfinite(array).all().item() for array in (result.embeds, result.pooled)):
                self._encoder.forget()
                raise ModelError("Redux gave NaN or infinities", "finite numbers", "convert it again")
            return result

        return self._worker.run(encode, source.style)

    def _no_text(self) -> EncodedPrompt:
        width = self.folder.networks["image_embedder"].sizes.txt_in_features
        pooled = self._pipeline.folder.flux.sizes.vec_in_dim if self._pipeline else CLIP_L.hidden_size
        dtype = getattr(mx, self.dtype)
        return EncodedPrompt(mx.zeros((1, MAX_SEQUENCE_LENGTH, width), dtype), mx.zeros((1, pooled), dtype))


_FIELDS = {"prompt_embeds": "embeds", "pooled_prompt_embeds": "pooled"}  # names of the results, and of EncodedPrompt's


def _each(image: Any) -> Any:
    """Returns the images of a batch (B, H, W, C) as a list; anything else as it is."""
    is_array = isinstance(image, mx.array) or (hasattr(image, "__array__") and hasattr(image, "shape"))
    if is_array and len(image.shape) == 4:
        batch = image if isinstance(image, mx.array) else np.asarray(image)
        return [batch[i] for i in range(batch.shape[0])]
    return image


def _one_text(name: str, given: Any) -> str | None:
    """Returns the one text of all images; None: there is none.

    Raises:
        UsageError: several texts that differ, or not a text.
    """
    texts: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
    if not texts or any(text is not None and not isinstance(text, str) for text in texts):
        raise UsageError(f"`{name}` is {type(given).__name__}", "a text")
    if len({*texts}) > 1:
        raise UsageError(f"`{name}` holds {len(texts)} texts that differ", "one for all images", "make a call for each")
    return None if name == "prompt_2" and not texts[0] else texts[0]
