"""Distance to the reference: every row of its tolerance table, with the value reached.

    python benchmarks/parity.py

Runs on the goldens in tests/data, in float32 and in bfloat16. Ends with one JSON line.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import mlx.core as mx
import numpy as np
from helpers import (
    PIPELINE,
    REFERENCE,
    TOKENIZERS,
    facts,
    goldens,
    image,
    levels,
    max_abs,
    nhwc,
    pixtral_source,
    psnr,
    rel,
)
from mlx_flux_krea.convert import convert
from test_filters import CASES as GOLDEN_CASES
from test_filters import case, expected
from test_networks import forward
from test_noise import CASES, SEEDS, repeated
from test_pipeline import arguments, latents_of

from mlx_flux_krea import FluxPipeline
from mlx_flux_krea.models.vae import pixels_from_image
from mlx_flux_krea.sampling import sampler
from mlx_flux_krea.weights import open_filter, open_model

RUNS = ("t2i_4", "t2i_8", "t2i_list", "cfg_4", "t2i_short", "img2img_8.sample")
QUANTIZED = (("8", "float32", 0.035), ("6", "float32", 0.25), ("4", "float32", 0.6))  # widths of 32 and groups of 32


def networks(folder):
    g = goldens()
    flux, t5, clip, vae = (n.load(mx.float32) for n in (folder.flux, folder.t5, folder.clip, folder.vae))
    texts = range(len(facts()["text"]))
    yield "T5 hidden, rel", max(rel(t5(g[f"text.{i}.t5_ids"]), g[f"text.{i}.t5_hidden"]) for i in texts), 3e-5
    yield (
        "CLIP pooled, rel",
        max(rel(clip(g[f"text.{i}.clip_ids"])[1], g[f"text.{i}.clip_pooled"]) for i in texts),
        2e-5,
    )
    yield "one transformer call, rel", max(rel(forward(flux, i), g[f"forward.{i}.output"]) for i in range(3)), 3e-5
    yield "VAE decode, rel", rel(vae.decode(nhwc(g["vae.z"]) / 0.3611 + 0.1159), nhwc(g["vae.decoded"])), 3e-5
    picture = image("images/input.png")
    yield (
        "VAE encode mean, rel",
        rel(vae.encode(pixels_from_image(picture, *picture.size))[0], nhwc(g["vae.mean"])),
        5e-5,
    )
    rows = facts()["schedule"]["diffusers"]
    ours = [sampler.make_sigmas(sampler.Schedule(), r["image_seq_len"], r["steps"]) for r in rows]
    yield (
        "sigmas, largest difference",
        max(np.abs(a - r["sigmas"]).max() for a, r in zip(ours, rows, strict=True)),
        5e-7,
    )


def runs(pipe):
    worst, decibels, off = 0.0, 99.0, 0
    for name in RUNS:
        result, latents = latents_of(pipe, **arguments(name))
        worst = max(worst, *(rel(a, b) for a, b in zip(latents, goldens()[f"{name}.latents"], strict=True)))
        for ours, theirs in zip(result.images, facts()["runs"][name]["pngs"], strict=True):
            decibels = min(decibels, psnr(ours, image(theirs)))
            off = max(off, levels(ours, image(theirs)))
    yield "latents after any step of six runs, rel", worst, 1e-4
    yield "PNG of the six runs, lowest PSNR in dB", decibels, 60
    yield "PNG of the six runs, levels off", off, 1


def noise():
    for prefix, era, dtype in dict.fromkeys((prefix, era, dtype) for prefix, era, _, dtype in CASES):
        pairs = [pair for seed in SEEDS for pair in repeated(prefix, era, seed, dtype).values()]
        if dtype == "float32":
            yield f"noise, {dtype}, largest difference", max(max_abs(a, b) for a, b in pairs), 5e-6
        else:
            equal = min(float((a == b).mean()) for a, b in pairs)
            yield f"noise, {dtype}, {era}, share equal", equal, 0.995


def bfloat16(model):
    result, latents = latents_of(FluxPipeline.from_pretrained(model, dtype="bfloat16"), **arguments("t2i_4"))
    yield (
        "bfloat16 run, final latents against torch's bfloat16 run, rel",
        rel(latents[-1], goldens()["bf16.latents"][-1]),
        0.03,
    )
    yield (
        "bfloat16 run, final latents against float32, rel (torch: 0.0067)",
        rel(latents[-1], goldens()["t2i_4.latents"][-1]),
        0.03,
    )
    half, halves = latents_of(FluxPipeline.from_pretrained(model, dtype="float16"), **arguments("t2i_4"))
    yield "float16 run, final latents against float32, rel", rel(halves[-1], goldens()["t2i_4.latents"][-1]), 0.009
    yield "float16 run, PNG against float32's, dB", psnr(half.images[0], image("images/t2i_4.0.png")), 48
    long = arguments("t2i_4") | {"num_inference_steps": 28}
    ends = [latents_of(FluxPipeline.from_pretrained(model, dtype=t), **long)[1][-1] for t in ("bfloat16", "float32")]
    yield "bfloat16 run of 28 steps, final latents against float32, rel", rel(*ends), 0.03
    yield "bfloat16 run, PNG against torch's, dB", psnr(result.images[0], image("images/bf16.0.png")), 42


def filters(folder: Path):
    g = goldens()
    path = convert([REFERENCE / "vit"], folder / "nsfw", allow_unknown_filter=True).path
    classifier = open_filter("nsfw", path).network.load(mx.float32)
    yield "classifier, logits, rel", rel(classifier(nhwc(g["vit.pixel_values"])), g["vit.logits"]), 3e-5
    source = pixtral_source(folder / "llava")
    for quantize, dtype, bar in (("none", "float32", 3e-5), ("none", "bfloat16", 0.15), *QUANTIZED):
        group_size = None if quantize == "none" else 32
        path = convert(
            [source],
            folder / f"{quantize}-{dtype}",
            dtype=dtype,
            quantize=quantize,
            group_size=group_size,
            allow_unknown_filter=True,
        ).path
        network = open_filter("pixtral", path).network.load(getattr(mx, dtype))
        cases = [(network.head(network.hidden([case(name)])[0]), expected(network, name)) for name in GOLDEN_CASES]
        what = dtype if quantize == "none" else f"{quantize} bits"
        yield f"Pixtral, logits of every position, {what}, rel", max(rel(*one) for one in cases), bar
        margins = [float(mx.abs((a - b)[0, -1, 0] - (a - b)[0, -1, 1]) / (b[0, -1].std() * 2**0.5)) for a, b in cases]
        yield f"Pixtral, margin of yes over no, {what}, of the spread of margins", max(margins), bar


def main():
    with tempfile.TemporaryDirectory() as folder:
        model = convert([PIPELINE], Path(folder) / "tiny", dtype="float32", tokenizers=TOKENIZERS).path
        pipe = FluxPipeline.from_pretrained(model)
        rows = [*networks(open_model(model)), *runs(pipe), *noise(), *bfloat16(model), *filters(Path(folder))]
    print("| compared with the reference | reached | bar |\n|---|---|---|")
    for name, reached, bar in rows:
        print(f"| {name} | {reached:.2g} | {bar:g} |" if bar < 1 else f"| {name} | {reached:.1f} | {bar:g} |")
    print(json.dumps({name: float(reached) for name, reached, _ in rows}))


if __name__ == "__main__":
    main()
