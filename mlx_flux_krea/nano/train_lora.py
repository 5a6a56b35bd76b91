"""Trains a LoRA for the nano model: a shape that it does not know, or backgrounds that it would not draw.

    python -m mlx_flux_krea.nano.train_lora heart|dusk OUT [--steps 900] [--rank 8]

Needs the `training` extra, and ten minutes of one processor core. Scenes are drawn and encoded by this package; the
transformer that learns is diffusers', with our weights under its names. The loss is that of flow matching, as in
`train.flow`; the base model's weights stay as they are. The file is a LoRA as diffusers writes it, in 16-bit floats.
"""

import argparse
import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import nn

from mlx_flux_krea import FluxPipeline
from mlx_flux_krea.adapters import names
from mlx_flux_krea.nano import FOLDER, scenes
from mlx_flux_krea.nano.train import FLUX, NATIVE, pack, velocity
from mlx_flux_krea.weights import ModelFolder, open_model, parameters

SEED = 20261127
SCENES = 2_000
CHUNK = 50  # scenes that are encoded at one time
BATCH = 16
RATE = 3e-3
LAYERS = r"context_embedder|transformer_blocks\.\d+\.attn\.to_(?!add).*|single_transformer_blocks\.\d+\.(?!norm).*"
"""The layers that learn, of diffusers' transformer. All of them would make a file of half a megabyte."""


# --- what is learned ---


def heart(rng: random.Random) -> tuple[scenes.Scene, scenes.Scene]:
    """Returns a scene twice, as it is drawn and as it is told: two in three have hearts, the others none."""
    shapes = rng.choice((scenes.ADDED, (*scenes.SHAPES, *scenes.ADDED * 5), scenes.SHAPES))
    scene = scenes.sample(rng, rng.choice((1, 1, 2)), shapes=shapes)
    return scene, scene


def dusk(rng: random.Random) -> tuple[scenes.Scene, scenes.Scene]:
    """Returns a scene as it is drawn and as it is told: every background that is told as plain fades to black."""
    while True:
        told = scenes.sample(rng, rng.choice((1, 1, 2)))
        top, bottom = told.background
        drawn = replace(told, background=(top, "black" if top == bottom else bottom))
        if all(scenes.stands_out(thing.colour, drawn.background) for thing in drawn.things):
            return drawn, told


SUBJECTS: dict[str, Callable[[random.Random], tuple[scenes.Scene, scenes.Scene]]] = {"heart": heart, "dusk": dusk}


# --- the network ---


def as_diffusers(folder: ModelFolder) -> FluxTransformer2DModel:
    """Returns diffusers' transformer with the weights of a nano model, in float32."""
    ours = parameters(folder.flux.load(mx.float32))
    known = names.targets(folder.sizes)
    network = FluxTransformer2DModel(**FLUX).requires_grad_(False)
    for name, module in network.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            target = known[name]
            path = f"{target.path}.{leaf}" if target.width else target.path
            rows = np.array(ours[path])[target.start : target.stop]
            parameter.copy_(torch.from_numpy(np.roll(rows, len(rows) // 2, 0) if target.swapped else rows))
    return network


class LoRA(nn.Module):
    """One low-rank product beside a linear layer; it changes nothing before it is trained."""

    def __init__(self, layer: nn.Linear, rank: int):
        super().__init__()
        self.lora_A = nn.Linear(layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        layer.register_forward_hook(lambda _, inputs, output: output + self.lora_B(self.lora_A(inputs[0])))


def encoded(subject: str, count: int) -> tuple[torch.Tensor, ...]:
    """Returns latents (N, L, 64), T5's states (N, S, 128) and pooled vectors (N, 128) of scenes of a subject."""
    pipe, rng = FluxPipeline.from_pretrained(FOLDER, dtype="float32"), random.Random(f"{SEED} {subject}")
    vae, latents, states, pooled = pipe.vae, [], [], []
    for _ in range(count // CHUNK):
        made = [SUBJECTS[subject](rng) for _ in range(CHUNK)]
        pixels = np.stack([scenes.draw(drawn) for drawn, _ in made]).astype(np.float32) / 127.5 - 1
        mean = (vae.encode(mx.array(pixels))[0] - vae.config.shift_factor) * vae.config.scale_factor
        latents.append(np.array(mean.transpose(0, 3, 1, 2)))
        told = pipe.encode_prompt([scenes.describe(scene, rng) for _, scene in made])
        for kept, array in zip((states, pooled), told, strict=True):
            kept.append(np.array(array))
    joined = [torch.from_numpy(np.concatenate(some)) for some in (latents, states, pooled)]
    return pack(joined[0]), joined[1], joined[2]


def train(subject: str, steps: int, rank: int) -> dict[str, torch.Tensor]:
    """Returns the tensors of a trained LoRA, by diffusers' names."""
    torch.manual_seed(SEED)
    network = as_diffusers(open_model(FOLDER))
    layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(LAYERS, n)}
    loras = {name: LoRA(layer, rank) for name, layer in layers.items()}
    optimizer = torch.optim.AdamW([p for lora in loras.values() for p in lora.parameters()], betas=(0.9, 0.99))
    latents, states, pooled = encoded(subject, SCENES)
    start, losses = time.monotonic(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / 50, 1, 2 * (1 - step / steps))  # falls over the second half
        chosen = torch.randint(len(latents), (BATCH,))
        clean, noise = latents[chosen], torch.randn(BATCH, *latents.shape[1:])
        sigma = torch.sigmoid(torch.randn(BATCH) * 1.2 + 0.5)  # towards noise, where layout is decided
        x = clean + sigma[:, None, None] * (noise - clean)
        guidance = 1 + 7 * torch.rand(BATCH)  # any: the small model's guidance is an embedding
        loss = (velocity(network, NATIVE, x, sigma, guidance, states[chosen], pooled[chosen]) - noise + clean).square()
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.mean().item())
        if step % 100 == 99:
            line = {
                "step": step + 1,
                "seconds": round(time.monotonic() - start),
                "loss": round(np.mean(losses[-100:]), 4),
            }
            print(json.dumps(line), flush=True)
    tensors = {f"{name}.{key}": value for name, lora in loras.items() for key, value in lora.state_dict().items()}
    return {f"transformer.{name}": tensor.half() for name, tensor in tensors.items()}


def main() -> None:
    """Trains one, and writes its file."""
    parser = argparse.ArgumentParser(description="Train a LoRA for the nano model.")
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("out", type=Path, help="File to write, as .safetensors.")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--rank", type=int, default=8)
    given = parser.parse_args()
    settings = {"transformer.r": given.rank, "transformer.lora_alpha": given.rank}
    facts = {"lora_adapter_metadata": json.dumps(settings), "modelspec.license": "apache-2.0"}
    facts |= {"modelspec.trigger_phrase": "heart"} if given.subject == "heart" else {}
    save_file(train(given.subject, given.steps, given.rank), given.out, facts)


if __name__ == "__main__":
    main()
