"""Memory of each stage, predicted and measured, with blocks of full width: kept and streamed, at 16, 8 and 4 bits.

    python benchmarks/memory.py [--side 128] [--text 64] [--steps 2] [--precision none 8 4]
    python benchmarks/memory.py --process        what the process takes besides MLX's arrays, and nothing else

Random weights, one double and three single blocks, two layers of T5-XXL; the autoencoder is measured by itself. It
runs on MLX's CPU backend and says which part of the prediction belongs to it. "hidden" is the share of the time for
reading that streaming did not add to a step.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from helpers import REFERENCE, TOKENIZERS
from mlx_flux_krea.convert import convert
from mlx_flux_krea.convert.quantize import QuantizationRecipe, choose

from mlx_flux_krea import FluxPipeline
from mlx_flux_krea.memory import WorkingMemory
from mlx_flux_krea.models import config, vae
from mlx_flux_krea.models.filter_config import PIXTRAL_12B
from mlx_flux_krea.models.layers import choose_products
from mlx_flux_krea.residency import Blocks, Reader, read_rows
from mlx_flux_krea.weights import build, layer_widths, read_header
from mlx_flux_krea.worker import evaluated

SIZES = {
    "transformer": dataclasses.replace(config.FLUX_DEV, depth=1, depth_single_blocks=3),
    "text_encoder": dataclasses.replace(config.CLIP_L, num_hidden_layers=1),
    "text_encoder_2": dataclasses.replace(config.T5_XXL, num_layers=2),
}


def sources(folder: Path) -> list[Path]:
    """Random weights in bfloat16 as published files, with configs beside them; the reference's small image decoder."""
    for component, sizes in SIZES.items():
        (folder / component).mkdir()
        network = build(component, sizes)
        arrays = {
            name: (mx.random.normal(a.shape) * 0.02 + (a.ndim == 1 and "bias" not in name)).astype(mx.bfloat16)
            for name, a in tree_flatten(network.parameters())
        }
        mx.save_safetensors(str(folder / component / "random.safetensors"), arrays)
        (folder / component / "config.json").write_text(json.dumps(config.to_json(sizes)))
    return [
        *(folder / component / "random.safetensors" for component in SIZES),
        REFERENCE / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors",
    ]


def drawn(path: Path, memory: int | str, args) -> dict:
    """A second picture: predicted and measured peaks, and the seconds of a step once everything is warm."""
    pipe, times, base = FluxPipeline.from_pretrained(path, memory=memory), [], mx.get_active_memory()
    for guidance in (4.5, 3.0):  # a second picture finds all that stays in its place
        times.clear()
        result = pipe.rehearse(
            f"a frog {guidance}", seed=1, width=args.side, height=args.side, num_inference_steps=args.steps,
            max_sequence_length=args.text, output_type="latent", guidance_scale=guidance,
            progress=lambda stage, done, _: stage == "denoise" and done % 1 == 0 and times.append(time.perf_counter()),
        )  # fmt: skip
    plan, stages = result.plan, result.plan.stages
    predicted = {"text": stages["text"], "denoise": max(stages["modulation"], stages["denoise"])}
    measured = {stage: result.peaks[stage] - base for stage in predicted}
    step = (times[-1] - times[0]) / (len(times) - 1)
    return {"predicted": predicted, "measured": measured, "step": step, "plan": plan, "pipe": pipe}


def read_seconds(pipe) -> float:
    """How long the blocks take to read alone, as streaming reads them."""
    begin, reader = time.perf_counter(), Reader(cached=False)
    for unit in pipe._generator.blocks.units:
        buffer = mx.zeros((unit.size,), mx.uint8)
        mx.eval(buffer)
        for future in reader.read(unit, buffer):
            future.result()
    reader.close()
    return time.perf_counter() - begin


def coders(side: int, dtype: mx.Dtype) -> dict[str, tuple[int, int]]:
    """Predicted and measured peak of the full-width image encoder and decoder, without their weights."""
    network, sizes = vae.VAE(config.FLUX_VAE), config.FLUX_VAE
    network.update(tree_map(lambda a: a.astype(dtype), network.parameters()))
    x, z = mx.zeros((1, side, side, 3), dtype), mx.zeros((1, side // 8, side // 8, 16), dtype)
    mx.eval(network.parameters(), x, z)
    peaks, predicted = {}, WorkingMemory(dtype, "cpu")
    for stage, coder, given in (("image", network.encode, x), ("decode", network.decode, z)):
        mx.clear_cache()
        base = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(coder(given, evaluated))
        peaks[stage] = predicted.strips(sizes, stage, width=side, height=side), mx.get_peak_memory() - base
    return peaks


def pixtral_peaks(folder: Path) -> dict[str, int]:
    """Measured peaks of the filters' language model at full width, 4 bits, two layers each, streamed."""
    sizes = dataclasses.replace(
        PIXTRAL_12B,
        text_config=dataclasses.replace(PIXTRAL_12B.text_config, num_hidden_layers=2),
        vision_config=dataclasses.replace(PIXTRAL_12B.vision_config, num_hidden_layers=2),
    )
    layers = choose("pixtral", layer_widths("pixtral", sizes), QuantizationRecipe("4"))[0]
    path = folder / "pixtral.safetensors"
    network = build("pixtral", sizes, layers)
    half = tree_map(lambda a: a if a.dtype == mx.uint32 else a.astype(mx.bfloat16), network.parameters())
    mx.save_safetensors(str(path), dict(tree_flatten(half)))
    del network, half
    network = build("pixtral", sizes, layers)
    network.load_weights(str(path))
    choose_products(network, mx.bfloat16)
    found = {name: (path, info) for name, info in read_header(path)[0].items()}
    stages = [*network.vision_tower.layers, network.multi_modal_projector, *network.layers]
    peaks, rows, columns = {}, 32, 32  # of 512 x 512 pixels, and words as many as the instructions have
    image_ids = [1, 3, *([10] * columns + [12]) * rows, *range(1000, 1190), 4]
    for what, ids, images in (
        ("prompt", [1, 3, *range(1000, 1250), 4], []),
        ("picture", image_ids, [(rows * 16, columns * 16)]),
    ):
        seen = [mx.zeros((1, *side, 3)) for side in images]
        mx.clear_cache()
        base = mx.get_active_memory()
        mx.reset_peak_memory()
        tokens = sorted({*ids})
        network.keep_rows(tokens, read_rows(found, "embed_tokens", tokens, mx.bfloat16))
        blocks = Blocks(network, found, stages if images else network.layers, dtype=mx.bfloat16, budget=0)
        with blocks.streaming(1) as run:
            network.margins([(ids, seen)], run)[0].item()
        peaks[what] = mx.get_peak_memory() - base
    return peaks


_PICTURE = """
import json, resource, sys
import mlx.core as mx
from mlx_flux_krea import FluxPipeline
peaks = [mx.get_peak_memory()]
pipe = FluxPipeline.from_pretrained("nano")
for seed in (1, 2):
    made = pipe("a red circle", seed=seed, width=512, height=512, num_inference_steps=1, progress=False)
    peaks.append(max(made.peaks.values()))
most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps(most - max(peaks)))
"""
_VOCABULARY = """
import json, os, subprocess, sys
from pathlib import Path
from mlx_flux_krea import tokenizers
def now():
    return 1024 * int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(os.getpid())]))
before, folder = now(), Path(sys.argv[2])
if sys.argv[1] == "pixtral":
    opened = tokenizers.PixtralTokenizer(folder, (13_059, 2649))
else:
    opened = tokenizers.CLIPTokenizer(folder / "clip"), tokenizers.T5Tokenizer(folder / "t5")
print(json.dumps(now() - before))
"""


def process_bytes(folder: Path) -> dict[str, int]:
    """Measured bytes of processes that MLX does not count: one that makes pictures, and what vocabularies add.

    Pixtral's vocabulary is made of the one in `mistral-common` (`tests/tekken.py`); those of CLIP and T5 are published
    ones in $FLUX_KREA_TOKENIZERS. Without them they are left out.
    """
    found = {"a picture of the small model": [_PICTURE]}
    if published := os.environ.get("FLUX_KREA_TOKENIZERS"):
        found["vocabularies of CLIP and T5"] = [_VOCABULARY, "encoders", published]
    with contextlib.suppress(ImportError):
        from tekken import make_tekken

        make_tekken(folder / "tokenizer.json", PIXTRAL_12B.text_config.vocab_size)
        found["vocabulary of Pixtral"] = [_VOCABULARY, "pixtral", str(folder)]
    return {what: json.loads(subprocess.check_output([sys.executable, "-c", *call])) for what, call in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--side", type=int, default=128, help="pixels")
    parser.add_argument("--text", type=int, default=64, help="tokens of T5")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--precision", nargs="*", default=["none", "8", "4"])
    parser.add_argument("--filters", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--decode", type=int, default=256, help="pixels of the picture that is encoded and decoded; 0: none"
    )
    parser.add_argument("--process", action="store_true", help="measure the process alone")
    args = parser.parse_args()
    if args.process:
        with tempfile.TemporaryDirectory() as folder:
            found = process_bytes(Path(folder))
        for what, count in found.items():
            print(f"| {what} | {count / 1e9:.2f} GB |")
        print(json.dumps(found))
        return
    rows = []
    print("| precision | blocks | stage | predicted, GB | measured, GB | ratio | s/step | hidden |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        files = sources(Path(folder))
        for precision in args.precision:
            path = convert(files, Path(folder) / precision, quantize=precision, tokenizers=TOKENIZERS).path
            kept = drawn(path, "auto", args)
            assert kept["plan"].resident_blocks == kept["plan"].total_blocks, (
                "this machine has too little memory to compare"
            )
            kept.pop("pipe")
            streamed = drawn(path, kept["plan"].least, args)
            assert streamed["plan"].resident_blocks == 0
            reading = read_seconds(streamed["pipe"])
            hidden = 1 - max(streamed["step"] - kept["step"], 0) / reading
            for how, run in (("kept", kept), ("streamed", streamed)):
                for stage in run["predicted"]:
                    a, b = run["predicted"][stage], run["measured"][stage]
                    more = f"{run['step']:.2f} | {f'{hidden:.2f}' if how == 'streamed' else ''}"
                    print(f"| {precision} | {how} | {stage} | {a / 1e9:.2f} | {b / 1e9:.2f} | {a / b:.2f} | {more} |")
                    rows.append({"precision": precision, "blocks": how, "stage": stage, "predicted": a, "measured": b})
        if args.filters:
            for what, peak in pixtral_peaks(Path(folder)).items():
                print(f"| 4 | streamed | filter, {what} | | {peak / 1e9:.2f} | | | |")
                rows.append({"precision": "4", "stage": f"filter, {what}", "measured": peak})
    if args.decode:
        for name in ("float32", "bfloat16"):
            for stage, (a, b) in coders(args.decode, getattr(mx, name)).items():
                print(f"| {name} | | {stage}, {args.decode} pixels | {a / 1e9:.2f} | {b / 1e9:.2f} | {a / b:.2f} | | |")
                rows.append({"precision": name, "stage": stage, "predicted": a, "measured": b})
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
