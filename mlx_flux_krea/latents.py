"""From noise and images to latents: where denoising starts, what the transformer reads beside it, and what stays.

The order in which one seed's numbers are drawn is the reference's, and decides the picture (diffusers 0.42.1):

    text to image              noise
    image to image             image posterior, noise
    inpainting                 image posterior, noise
    Kontext                    noise; references are the posterior's mean
    Fill                       image posterior, noise, masked image's posterior
    control                    control posterior of each picture, noise
    control, image to image    control posteriors, image posterior, noise
    control, inpainting        a posterior that nothing reads, control posteriors, image posterior, noise
    second pass                noise of a stream of its own; enlarged pictures are the posterior's mean

Recipes that take the posterior's mean draw the noise alone. B batch, L image tokens, h and w latent size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
from PIL import Image

from .inputs.canvas import fit_to
from .inputs.gather import Inputs
from .models.config import VAEConfig
from .models.vae import pixels_from_image
from .request import ResolvedRequest
from .sampling import noise as noises
from .sampling import sampler

Encode = Callable[[mx.array], tuple[mx.array, mx.array]]  # pixels to mean and log variance, (1, 16, h, w) float32


@dataclass(frozen=True)
class Kept:
    """The image that stays outside of a mask, noised to the level of each step.

    Attributes:
        clean: (1, L, 64) latents of the image.
        noise: (B, L, 64), that of the start.
        mask: (1, L, 64), 1 where the image is repainted. Values between are repainted for that share of the last steps
            (Levin and Fried 2023, differential diffusion).
    """

    clean: mx.array
    noise: mx.array
    mask: mx.array

    def restore(self, latents: mx.array, sigma: float, left: float) -> mx.array:
        """Returns latents after a step with the image back where it stays.

        Args:
            latents: (B, L, 64).
            sigma: the noise level after the step; 0 after the last, where the image is clean.
            left: the share of the steps that is left.
        """
        noised = sampler.add_noise(self.clean, self.noise, sigma)
        return mx.where(self.mask > left, latents, noised)


@dataclass(frozen=True)
class Latents:
    """All latents of a run.

    Attributes:
        start: (B, L, 64) float32, of the first step.
        channels: (B or 1, L, C) that the transformer reads beside the latents, or None.
        tokens: (1, R, 64) of references, which it reads after them, or None.
        grids: height and width in tokens of each reference.
        kept: what stays outside of a mask, or None.
        enlarged: (B, L, 64) clean latents of the pictures that a second pass starts from, or None.
    """

    start: mx.array
    channels: mx.array | None = None
    tokens: mx.array | None = None
    grids: tuple[tuple[int, int], ...] = ()
    kept: Kept | None = None
    enlarged: mx.array | None = None

    def around(self, latents: mx.array, i: int) -> mx.array:
        """Returns what the transformer reads for picture i, whose latents are (1, L, 64)."""
        if self.channels is not None:
            own = self.channels[i : i + 1] if len(self.channels) > 1 else self.channels
            latents = mx.concatenate([latents, own], axis=-1)
        return latents if self.tokens is None else mx.concatenate([latents, self.tokens], axis=1)


def make_latents(request: ResolvedRequest, sigma: float, vae: VAEConfig, dtype: mx.Dtype, encode: Encode) -> Latents:
    """Draws noise and encodes images, in the order above.

    Latents stay in float32 through the loop, where diffusers rounds after every step: it costs nothing, and keeps a
    bfloat16 run nearer to the float32 picture.

    Args:
        request: the run.
        sigma: the noise level of its first step.
        vae: sizes of the autoencoder.
        dtype: the compute type.
        encode: the autoencoder's encoder.
    """
    return _Drawing(request, vae, dtype, encode).latents(sigma)


def enlarged_latents(
    request: ResolvedRequest,
    pictures: Sequence[Image.Image],
    sigma: float,
    vae: VAEConfig,
    dtype: mx.Dtype,
    encode: Encode,
) -> Latents:
    """Draws noise and encodes the pictures that a second pass starts from, one for each of the batch, or one for all.

    Args:
        request: the second pass, at its size.
        pictures: of this size.
        sigma: the noise level of its first step.
        vae: sizes of the autoencoder.
        dtype: the compute type.
        encode: the autoencoder's encoder.
    """
    return _Drawing(request, vae, dtype, encode).enlarged(pictures, sigma)


class _Drawing:
    """One run's streams of numbers, and the encoder."""

    def __init__(self, request: ResolvedRequest, vae: VAEConfig, dtype: mx.Dtype, encode: Encode):
        self._request, self._vae, self._encode = request, vae, encode
        recipe = noises.find_recipe(request.noise)
        dtype = mx.float32 if recipe.dtype else dtype  # numbers that a tool draws in its own type are not rounded
        self._streams = [noises.Stream(recipe, seed, dtype) for seed in request.seeds]
        self._samples = recipe.posterior == "sample" and bool(self._streams)
        one_stream = isinstance(request.seed, int)
        self._shape = (
            request.batch if one_stream else 1,
            vae.z_channels,
            request.height // vae.downsampling,
            request.width // vae.downsampling,
        )

    def latents(self, sigma: float) -> Latents:
        """Returns everything, drawn and encoded in order."""
        request, inputs = self._request, self._request.inputs
        if inputs.control and inputs.is_masked and self._samples:
            self._streams[0].normal((1, *self._shape[1:]))
        channels = None if inputs.control is None else self._control(inputs.control)
        clean = part = None
        if inputs.canvas:
            part = inputs.canvas.part(request.width, request.height)
            clean = self._sampled(part)  # of the first stream, as in diffusers, whatever the number of streams
        references = zip(inputs.references, inputs.sizes, strict=True)
        tokens = [self._scaled(self._posterior(fit_to(image, *size, inputs.fit))[0]) for image, size in references]
        if request.latents is not None:
            start = noise = request.latents.astype(mx.float32)
        else:
            noise = mx.concatenate([stream.noise(self._shape) for stream in self._streams]).astype(mx.float32)
            start = sampler.pack(noise if clean is None else sampler.add_noise(clean, noise, sigma))
        kept = None
        if inputs.fill and part is not None:
            channels = self._fill(inputs, part)
        elif inputs.is_masked and clean is not None:
            kept = Kept(sampler.pack(clean), sampler.pack(noise), self._mask(inputs))
        return Latents(
            start,
            channels,
            mx.concatenate([sampler.pack(one) for one in tokens], axis=1) if tokens else None,
            tuple((one.shape[2] // 2, one.shape[3] // 2) for one in tokens),
            kept,
        )

    def enlarged(self, pictures: Sequence[Image.Image], sigma: float) -> Latents:
        """Returns the start of a second pass, and the latents of the pictures."""
        clean = mx.concatenate([sampler.pack(self._scaled(self._posterior(one)[0])) for one in pictures])
        noise = mx.concatenate([stream.noise(self._shape) for stream in self._streams]).astype(mx.float32)
        start = sampler.add_noise(clean, sampler.pack(noise), sigma)
        return Latents(start, enlarged=mx.broadcast_to(clean, start.shape))

    def _control(self, control: Image.Image) -> mx.array:
        """Returns (B or 1, L, 64): a sample of the posterior for each picture, or its mean."""
        request = self._request
        mean, deviation = self._posterior(fit_to(control, request.width, request.height, request.inputs.fit))
        if self._samples:
            mean = mx.concatenate([mean + deviation * stream.normal(self._shape) for stream in self._streams])
        return sampler.pack(self._scaled(mean))

    def _fill(self, inputs: Inputs, part: Image.Image) -> mx.array:
        """Returns (1, L, 320): latents of the image whose hole is grey, then the mask of each pixel."""
        assert inputs.canvas is not None  # `gather_inputs` has checked it
        mask = mx.array(inputs.canvas.repainted(*part.size))
        pixels = pixels_from_image(part, *part.size) * (1 - mask)[None, :, :, None]
        side = self._vae.downsampling
        height, width = self._shape[2:]
        patches = mask.reshape(height, side, width, side).transpose(1, 3, 0, 2).reshape(1, side**2, height, width)
        return mx.concatenate([sampler.pack(self._sampled(pixels)), sampler.pack(patches)], axis=-1)

    def _mask(self, inputs: Inputs) -> mx.array:
        """Returns (1, L, 64): the mask at each latent, its first pixel's or, of a soft mask, the mean."""
        assert inputs.canvas is not None
        size, side = (self._request.width, self._request.height), self._vae.downsampling
        grid = mx.array(inputs.canvas.grid(*size, side, soft=inputs.soft))
        return sampler.pack(mx.broadcast_to(grid, (1, *self._shape[1:])))

    def _sampled(self, image: Image.Image | mx.array) -> mx.array:
        """Returns (1, 16, h, w), scaled and shifted: a sample of the first stream, or the posterior's mean."""
        mean, deviation = self._posterior(image)
        return self._scaled(mean + deviation * self._streams[0].normal(mean.shape) if self._samples else mean)

    def _posterior(self, image: Image.Image | mx.array) -> tuple[mx.array, mx.array]:
        """Returns mean and standard deviation, (1, 16, h, w), of an image or its pixels."""
        pixels = pixels_from_image(image, *image.size) if isinstance(image, Image.Image) else image
        mean, logvar = self._encode(pixels)
        return mean, mx.exp(0.5 * logvar)

    def _scaled(self, z: mx.array) -> mx.array:
        return (z - self._vae.shift_factor) * self._vae.scale_factor
