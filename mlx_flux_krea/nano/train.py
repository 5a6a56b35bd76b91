"""Trains the nano model from nothing: tokenizers, VAE, text encoders, flow, guidance distillation, export.

    python -m mlx_flux_krea.nano.train WORK [PHASE ...]

Needs the `training` extra (torch, diffusers, transformers), which nothing at run time imports. Every phase writes a
folder in WORK when it is done, and checkpoints on the way; a start goes on where the last one stopped. The networks are
the reference implementations' own classes, so what is trained here is by construction what they compute. A step's data
and noise depend on the seed and the number of the step alone. README.md beside this file says what was run.
"""

import argparse
import copy
import io
import json
import random
import shutil
import string
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from mlx_flux_krea.convert import convert
from mlx_flux_krea.convert.licence import licence_files
from mlx_flux_krea.convert.reading import sha256
from mlx_flux_krea.nano import scenes
from mlx_flux_krea.sampling.preview import fit_latent_rgb
from mlx_flux_krea.tokenizers import CLIPTokenizer, T5Tokenizer
from mlx_flux_krea.weights import open_model

SEED = 20261121
T5_LENGTH = 40
CLIP_LENGTH = 48
T5_VOCABULARY = 384
CLIP_VOCABULARY = 768
VAE = {
    "block_out_channels": (16, 32, 64, 64), "layers_per_block": 1, "latent_channels": 16, "norm_num_groups": 8,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "use_quant_conv": False, "use_post_quant_conv": False, "sample_size": 96,
}  # fmt: skip
T5 = {
    "d_model": 128, "d_kv": 32, "d_ff": 256, "num_heads": 4, "num_layers": 3, "vocab_size": T5_VOCABULARY,
    "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
}  # fmt: skip
CLIP = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": CLIP_VOCABULARY, "max_position_embeddings": CLIP_LENGTH, "hidden_act": "quick_gelu",
    "bos_token_id": CLIP_VOCABULARY - 2, "eos_token_id": CLIP_VOCABULARY - 1, "pad_token_id": CLIP_VOCABULARY - 1,
}  # fmt: skip
FLUX = {
    "in_channels": 64, "num_layers": 4, "num_single_layers": 6, "attention_head_dim": 32, "num_attention_heads": 4,
    "joint_attention_dim": 128, "pooled_projection_dim": 128, "axes_dims_rope": (8, 12, 12), "guidance_embeds": True,
}  # fmt: skip
SCENES = {canvas: 40_000 if canvas == scenes.CANVASES[0] else 4_000 for canvas in scenes.CANVASES}
STEPS = {"vae": 2_000, "decoder": 1_500, "text": 800, "flow": 18_000, "refine": 15_000, "distil": 2_000}
RATES = {"vae": 2e-3, "decoder": 5e-4, "text": 1e-3, "flow": 1.2e-3, "refine": 1e-3, "distil": 3e-4}
BATCH = {"vae": 16, "text": 256, "flow": 48, "refine": 48, "distil": 48}


# --- the loop that every phase shares ---


class Run:
    """One phase's optimizer, averaged weights, checkpoints and log."""

    def __init__(self, work: Path, name: str, networks: dict[str, nn.Module]):
        self.name, self.networks = name, networks
        self.checkpoint = work / f"{name}.safetensors"
        self.log = work / "log.jsonl"
        self.named = {f"{n}.{k}": p for n, m in networks.items() for k, p in m.named_parameters() if p.requires_grad}
        self.average = {k: p.detach().clone() for k, p in self.named.items()}
        inner = {k for k, p in self.named.items() if name == "refine" and p.ndim == 2 and "blocks." in k}
        adam = [p for k, p in self.named.items() if k not in inner]
        self.optimizers = [torch.optim.AdamW(adam, betas=(0.9, 0.99), weight_decay=0.01)]
        if inner:
            matrices = [self.named[k] for k in self.named if k in inner]
            self.optimizers.append(torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
        self.step = 0
        self.seconds = 0.0
        if self.checkpoint.exists():
            self._load()

    def train(self, loss_of: Callable[[int, random.Random], tuple[torch.Tensor, dict]]) -> None:
        """Runs the steps that are left; `loss_of(step, rng)` gives the loss and numbers for the log."""
        total, sums, saved = STEPS[self.name], Counter(), time.monotonic()
        clock = time.monotonic()
        while self.step < total:
            torch.manual_seed(SEED + self.step)
            rate = min((self.step + 1) / 200, 1, 4 * (1 - self.step / total))  # falls over the last quarter
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = RATES[self.name] * rate
            with torch.autocast(
                "cpu", torch.bfloat16, enabled=self.name in ("flow", "refine", "distil", "text")
            ):  # slower for convolutions
                loss, numbers = loss_of(self.step, random.Random(f"{SEED} {self.name} {self.step}"))
            loss.backward()
            nn.utils.clip_grad_norm_(self.named.values(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            self.step += 1
            decay = min(0.999, 1 - 10 / (self.step + 10))
            torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.named.values()], 1 - decay)
            sums.update({"loss": float(loss), **{k: float(v) for k, v in numbers.items()}})
            if self.step % 50 == 0 or self.step == total:
                count, now = (self.step - 1) % 50 + 1, time.monotonic()
                self.seconds += now - clock
                line = {"phase": self.name, "step": self.step, "seconds": round(self.seconds), "rate": round(rate, 3)}
                line |= {"seconds_per_step": round((now - clock) / count, 3)}
                line |= {k: round(v / count, 5) for k, v in sums.items()}
                clock, sums = now, Counter()
                print(json.dumps(line), flush=True)
                with self.log.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                if now - saved > 120 or self.step == total:
                    self._save()
                    saved = now
        self.use_average()

    def use_average(self) -> None:
        """Puts the averaged weights into the networks."""
        for key, parameter in self.named.items():
            parameter.data.copy_(self.average[key])

    def _save(self) -> None:
        state = {f"parameter/{k}": p.detach() for k, p in self.named.items()}
        state |= {f"average/{k}": p for k, p in self.average.items()}
        for n, optimizer in enumerate(self.optimizers):
            moments = optimizer.state_dict()["state"]
            state |= {f"moment/{n}/{i}/{k}": v for i, s in moments.items() for k, v in s.items()}
        partial = self.checkpoint.with_suffix(".partial")
        facts = {"step": str(self.step), "seconds": str(self.seconds)}
        save_file({k: v.contiguous() for k, v in state.items()}, partial, facts)
        partial.replace(self.checkpoint)

    def _load(self) -> None:
        state = load_file(self.checkpoint)
        with open(self.checkpoint, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            facts = json.loads(file.read(size))["__metadata__"]
        self.step, self.seconds = int(facts["step"]), float(facts["seconds"])
        for key, parameter in self.named.items():
            parameter.data.copy_(state[f"parameter/{key}"])
            self.average[key].copy_(state[f"average/{key}"])
        moments: list[dict[int, dict]] = [{} for _ in self.optimizers]
        for key, value in state.items():
            if key.startswith("moment/"):
                _, n, index, name = key.split("/")
                moments[int(n)].setdefault(int(index), {})[name] = value
        for optimizer, its in zip(self.optimizers, moments, strict=True):
            optimizer.load_state_dict({"state": its, "param_groups": optimizer.state_dict()["param_groups"]})


# --- what is drawn and said ---


def scene(canvas: tuple[int, int], number: int, held_out: bool = False) -> scenes.Scene:
    """Scene `number` of a canvas: the same one on every machine."""
    rng = random.Random(f"{SEED} {canvas} {number} {held_out}")
    return scenes.sample(rng, rng.choices((1, 2, 3), (0.35, 0.45, 0.2))[0], canvas, held_out)


def to_pixels(picture) -> torch.Tensor:
    """(3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


class Text:
    """Both tokenizers, and both encoders where they are trained."""

    def __init__(self, work: Path):
        self.clip_tokenizer = CLIPTokenizer(work / "tokenizers" / "tokenizer")
        self.t5_tokenizer = T5Tokenizer(work / "tokenizers" / "tokenizer_2")
        self.known: dict[str, tuple[list[int], list[int]]] = {}
        if (work / "text").exists():
            self.clip = CLIPTextModel.from_pretrained(work / "text" / "text_encoder").eval()
            self.t5 = T5EncoderModel.from_pretrained(work / "text" / "text_encoder_2").eval()

    def ids(self, sentences: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """CLIP's and T5's ids, (B, 48) and (B, 40)."""
        pairs = [self._ids(sentence) for sentence in sentences]
        return torch.tensor([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs])

    def _ids(self, sentence: str) -> tuple[list[int], list[int]]:
        clip, t5 = self.clip_tokenizer(sentence, CLIP_LENGTH), self.t5_tokenizer(sentence, T5_LENGTH)
        if clip.cut or t5.cut:
            raise ValueError(f"[train] {sentence!r} does not fit.")
        return clip.ids, t5.ids

    @torch.no_grad()
    def encode(self, sentences: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """T5's states (B, 40, 128) and CLIP's pooled vectors (B, 128)."""
        clip, t5 = self.ids(sentences)
        return self.t5(t5).last_hidden_state, self.clip(clip).pooler_output


# --- the phases ---


def tokenizers(work: Path, target: Path) -> None:
    """A sentencepiece model and a byte-pair vocabulary, from sentences about scenes."""
    rng = random.Random(SEED)
    lines = [scenes.describe(scene(scenes.CANVASES[0], n), rng) for n in range(20_000)]
    t5, clip = target / "tokenizer_2", target / "tokenizer"
    t5.mkdir(parents=True)
    clip.mkdir()
    made = io.BytesIO()  # under a name, the file would hold the path to it
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines + list(string.ascii_letters + string.digits + ".,;:!?'\"-()")),
        model_writer=made, vocab_size=T5_VOCABULARY, model_type="bpe", character_coverage=1.0,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    (t5 / "spiece.model").write_bytes(made.getvalue())
    (t5 / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 0}))

    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    words = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, level])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=CLIP_VOCABULARY, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator([line.lower() for line in lines], trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    letters = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    merges = merges[: CLIP_VOCABULARY - 2 - len(letters)]
    pieces = dict.fromkeys([*letters, *("".join(m) for m in merges)])
    vocab = {piece: number for number, piece in enumerate(pieces)}
    vocab |= {"<|startoftext|>": CLIP_VOCABULARY - 2, "<|endoftext|>": CLIP_VOCABULARY - 1}
    (clip / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (clip / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))


def vae(work: Path, target: Path) -> None:
    """Pixels to 16 channels and back, on crops."""
    torch.manual_seed(SEED)
    network = AutoencoderKL(**VAE).to(memory_format=torch.channels_last)
    pool = _pool()
    run = Run(work, "vae", {"vae": network})

    def loss_of(step: int, rng: random.Random):
        pixels = _crops(pool, rng, 64)
        posterior = network.encode(pixels).latent_dist
        made = network.decode(posterior.mean + posterior.std * torch.randn_like(posterior.mean)).sample
        divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        loss, numbers = _distance(made, pixels)
        return loss + 1e-3 * divergence, numbers | {"kl": divergence, "noise": posterior.std.mean()}

    run.train(loss_of)
    with torch.no_grad():
        latents = torch.cat([network.encode(p.float()).latent_dist.mean for p in pool[:1000].split(50)])
    network.register_to_config(shift_factor=float(latents.mean()), scaling_factor=1 / float(latents.std()))
    network.save_pretrained(target)


def decoder(work: Path, target: Path) -> None:
    """The decoder goes on alone, on whole pictures; the encoder, and so every latent, stays as it is.

    Latents that the transformer makes are a little beside those of pictures: half of the batch is, too.
    """
    network = AutoencoderKL.from_pretrained(work / "vae").to(memory_format=torch.channels_last)
    network.encoder.requires_grad_(False)
    pool = _pool()
    run = Run(work, "decoder", {"vae": network})

    def loss_of(step: int, rng: random.Random):
        pixels = _crops(pool, rng, 96)
        with torch.no_grad():
            posterior = network.encode(pixels).latent_dist
            beside = 0.4 * F.relu(torch.rand(len(pixels), 1, 1, 1) - 0.5) / network.config.scaling_factor
            z = posterior.mean + (posterior.std + beside) * torch.randn_like(posterior.mean)
        return _distance(network.decode(z).sample, pixels)

    run.train(loss_of)
    network.save_pretrained(target)


def _pool() -> torch.Tensor:
    return torch.stack([to_pixels(scenes.draw(scene((96, 96), n))).to(torch.bfloat16) for n in range(8_000)])


def _crops(pool: torch.Tensor, rng: random.Random, side: int) -> torch.Tensor:
    top, left = rng.randrange(0, 97 - side), rng.randrange(0, 97 - side)
    chosen = pool[[rng.randrange(len(pool)) for _ in range(BATCH["vae"])]]
    return chosen[:, :, top : top + side, left : left + side].float().contiguous(memory_format=torch.channels_last)


def _distance(made: torch.Tensor, pixels: torch.Tensor) -> tuple[torch.Tensor, dict]:
    error = made - pixels
    square = error.pow(2).mean()
    return error.abs().mean() + square, {"psnr": 10 * torch.log10(4 / square)}


class Probe(nn.Module):
    """Asks a text encoder what is in the scene: one attention over its states for each question, a linear answer."""

    def __init__(self, width: int, sizes: list[int], attention: bool):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(sizes), width)) if attention else None
        self.keys = nn.Linear(width, width) if attention else None
        self.answers = nn.ModuleList(nn.Linear(width, size) for size in sizes)

    def forward(self, states: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.queries is None:
            seen = [states] * len(self.answers)
        else:
            weights = (self.keys(states) @ self.queries.T / self.queries.shape[1] ** 0.5).softmax(1)
            seen = (weights.transpose(1, 2) @ states).unbind(1)
        logits = [answer(s) for answer, s in zip(self.answers, seen, strict=True)]
        loss = sum(F.cross_entropy(a.float(), t) for a, t in zip(logits, targets.T, strict=True)) / len(logits)
        right = torch.stack([a.argmax(-1) == t for a, t in zip(logits, targets.T, strict=True)], 1).all(1)
        return loss, right.float().mean()


_QUESTIONS = [3, 10, 10, *[7, 11, 4, 5, 5] * 3]


def answers(drawn: scenes.Scene) -> list[int]:
    """Answers for Probe: the number of things, the background, and shape, colour, size and place of each."""
    colours, shapes, sizes = list(scenes.COLOURS), scenes.SHAPES, list(scenes.SIZES)
    if len(drawn.things) == 1:
        across, down = scenes.PLACES.get(drawn.where, (1.5, 1.5))
        places = [(int(across * 2), int(down * 2))]
    elif len(drawn.things) == 2:
        first, second = (0, 2) if drawn.where in ("left of", "above") else (2, 0)
        places = [(p, 3) if drawn.where in ("left of", "right of") else (3, p) for p in (first, second)]
    else:
        third = 0 if drawn.where == "above" else 2
        places = [(0, 2 - third), (2, 2 - third), (1, third)]
    numbers = [len(drawn.things) - 1, *(colours.index(c) for c in drawn.background)]
    for thing, place in zip(drawn.things, places, strict=True):
        look = (shapes.index(thing.shape), colours.index(thing.colour), sizes.index(thing.size))
        numbers += [n + 1 for n in (*look, *place)]
    return numbers + [0] * (len(_QUESTIONS) - len(numbers))


def text(work: Path, target: Path) -> None:
    """Both encoders learn to tell what a sentence says: the flow then finds every word bound to its thing."""
    torch.manual_seed(SEED)
    tokens = Text(work)
    t5, clip = T5EncoderModel(T5Config(**T5)), CLIPTextModel(CLIPTextConfig(**CLIP))
    nn.init.normal_(t5.shared.weight, std=1.0)
    ask_t5, ask_clip = Probe(128, _QUESTIONS, attention=True), Probe(128, _QUESTIONS, attention=False)
    run = Run(work, "text", {"t5": t5, "clip": clip, "ask_t5": ask_t5, "ask_clip": ask_clip})

    def loss_of(step: int, rng: random.Random):
        drawn = [scene(scenes.CANVASES[0], rng.randrange(10**9)) for _ in range(BATCH["text"])]
        clip_ids, t5_ids = tokens.ids([scenes.describe(d, rng) for d in drawn])
        targets = torch.tensor([answers(d) for d in drawn])
        loss_t5, right_t5 = ask_t5(t5(t5_ids).last_hidden_state, targets)
        loss_clip, right_clip = ask_clip(clip(clip_ids).pooler_output, targets)
        return loss_t5 + loss_clip, {"t5": right_t5, "clip": right_clip}

    run.train(loss_of)
    t5.save_pretrained(target / "text_encoder_2")
    clip.save_pretrained(target / "text_encoder")


@dataclass
class _Drawn(Dataset):
    """The pictures of a canvas, for a process beside this one to draw."""

    canvas: tuple[int, int]
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> torch.Tensor:
        return to_pixels(scenes.draw(scene(self.canvas, number)))


@torch.no_grad()
def latents(work: Path, target: Path) -> None:
    """Every training scene through the VAE's encoder, once."""
    network = AutoencoderKL.from_pretrained(work / "vae").to(memory_format=torch.channels_last).eval()
    target.mkdir()
    for canvas, count in SCENES.items():
        parts = []
        drawn = DataLoader(_Drawn(canvas, count), batch_size=100, num_workers=1, prefetch_factor=8)
        for pixels in drawn:
            mean = network.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist.mean
            parts.append(pack((mean - network.config.shift_factor) * network.config.scaling_factor).half())
        save_file({"latents": torch.cat(parts)}, target / f"{canvas[0]}x{canvas[1]}.safetensors")


def pack(x: torch.Tensor) -> torch.Tensor:
    """(B, 16, h, w) to (B, h/2 * w/2, 64), as diffusers packs."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def unpack(x: torch.Tensor, canvas: tuple[int, int]) -> torch.Tensor:
    """The reverse of `pack`."""
    w, h = (side // 16 for side in canvas)
    return x.view(-1, h, w, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(-1, 16, 2 * h, 2 * w)


def positions(canvas: tuple[int, int]) -> torch.Tensor:
    """(h/2 * w/2, 3): zero, row, column."""
    rows, columns = torch.meshgrid(torch.arange(canvas[1] // 16), torch.arange(canvas[0] // 16), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()


def velocity(network, x, sigma, guidance, states, pooled, canvas) -> torch.Tensor:
    """The transformer's answer for packed latents."""
    return network(
        hidden_states=x, timestep=sigma, guidance=guidance, encoder_hidden_states=states, pooled_projections=pooled,
        img_ids=positions(canvas), txt_ids=torch.zeros(states.shape[1], 3), return_dict=False,
    )[0].float()  # fmt: skip


class Batches:
    """Latents of scenes with a sentence for each."""

    def __init__(self, work: Path):
        self.text = Text(work)
        self.latents = {c: load_file(work / "latents" / f"{c[0]}x{c[1]}.safetensors")["latents"] for c in SCENES}
        self.scenes = {c: [scene(c, n) for n in range(count)] for c, count in SCENES.items()}
        self.by_things = {
            c: [[n for n, s in enumerate(drawn) if len(s.things) == k] for k in (1, 2, 3)]
            for c, drawn in self.scenes.items()
        }
        self.fine = {c: [sum(map(_is_fine, s.things)) for s in drawn] for c, drawn in self.scenes.items()}

    def __call__(self, rng: random.Random, size: int, shares: tuple[float, float, float], fine: bool = False):
        """Canvas, packed latents (B, L, 64), sentences and what is drawn; fine: of two scenes the finer."""
        canvas = scenes.CANVASES[0] if rng.random() < 0.8 else rng.choice(scenes.CANVASES[1:])
        found = [rng.choices(numbers, k=1 + fine) for numbers in rng.choices(self.by_things[canvas], shares, k=size)]
        chosen = [max(numbers, key=self.fine[canvas].__getitem__) for numbers in found]
        sentences = [scenes.describe(self.scenes[canvas][n], rng) for n in chosen]
        return canvas, self.latents[canvas][chosen].float(), sentences, [self.scenes[canvas][n] for n in chosen]


def _is_fine(thing: scenes.Thing) -> bool:
    """True for an outline with details of less than a latent."""
    return thing.size == "small" and thing.shape in ("star", "ring", "cross")


def sigmas(size: int) -> torch.Tensor:
    """Noise levels in (0, 1): logit-normal, towards noise, where the layout is decided."""
    return torch.sigmoid(torch.randn(size) * 1.2 + 0.5)


def flow(work: Path, target: Path) -> None:
    """Flow matching: the velocity from picture to noise, one sentence in ten left out."""
    torch.manual_seed(SEED)
    network = FluxTransformer2DModel(**FLUX)
    _start(network)
    batches = Batches(work)
    run = Run(work, "flow", {"transformer": network})
    size = BATCH["flow"]

    def loss_of(step: int, rng: random.Random):
        shares = (0.6, 0.4, 0.0) if step < 1_500 else (0.35, 0.45, 0.2)
        canvas, clean, sentences, _ = batches(rng, size, shares)
        states, pooled = batches.text.encode(["" if rng.random() < 0.1 else s for s in sentences])
        sigma, noise = sigmas(size), torch.randn_like(clean)
        x = clean + sigma[:, None, None] * (noise - clean)
        made = velocity(network, x, sigma, torch.ones(size), states, pooled, canvas)
        loss = F.mse_loss(made, noise - clean)
        return loss, {}

    run.train(loss_of)
    network.save_pretrained(target)


class Pointer(nn.Module):
    """Asks every image token which thing stands there: its shape and colour (0: none), where its middle is, how large.

    Small shapes are a small part of the flow's error, and most of a picture. Training alone knows this layer.
    """

    def __init__(self, width: int):
        super().__init__()
        self.sizes = len(scenes.SHAPES) + 1, len(scenes.COLOURS) + 1, 3
        self.norm, self.answer = nn.LayerNorm(width), nn.Linear(width, sum(self.sizes))

    def forward(
        self, states: torch.Tensor, drawn: list[scenes.Scene]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The loss, the share of covered tokens whose shape is told, and which tokens those are, (B, L).

        Args:
            states: (B, L, width).
            drawn: the B scenes.
        """
        shape, colour, place = self.answer(self.norm(states)).float().split(self.sizes, -1)
        targets = torch.stack([torch.from_numpy(_covered(scene)) for scene in drawn])
        shapes, colours, places = targets[..., 0].long(), targets[..., 1].long(), targets[..., 2:].float()
        there = shapes > 0
        loss = F.cross_entropy(shape.flatten(0, 1), shapes.flatten())
        loss = loss + F.cross_entropy(colour.flatten(0, 1), colours.flatten())
        loss = loss + F.smooth_l1_loss(place[there], places[there])
        return loss, (shape.argmax(-1) == shapes)[there].float().mean(), there


def _covered(scene: scenes.Scene) -> np.ndarray:
    """For each token: shape and colour of the thing on it (0: none), and its middle and half side in tokens, from here.

    Returns:
        (L, 5).
    """
    ys, xs = (np.arange(side // 16) * 16 + 8.0 for side in (scene.height, scene.width))
    told, near = np.zeros((len(ys), len(xs), 5)), np.full((len(ys), len(xs)), np.inf)
    for thing in scene.things:
        r = scenes.SIZES[thing.size]
        distance = np.maximum(abs(ys - thing.y)[:, None], abs(xs - thing.x)[None])
        here = (distance < r + 6) & (distance < near)
        near[here] = distance[here]
        told[here, 0] = scenes.SHAPES.index(thing.shape) + 1
        told[here, 1] = list(scenes.COLOURS).index(thing.colour) + 1
        dy, dx = np.meshgrid((thing.y - ys) / 16, (thing.x - xs) / 16, indexing="ij")
        told[here, 2], told[here, 3], told[here, 4] = dy[here], dx[here], r / 16
    return told.reshape(-1, 5)


def refine(work: Path, target: Path) -> None:
    """The flow goes on, with another optimizer, and has to tell half way what stands where."""
    torch.manual_seed(SEED)
    network = FluxTransformer2DModel.from_pretrained(work / "flow")
    pointer = Pointer(network.inner_dim)
    batches = Batches(work)
    run = Run(work, "refine", {"transformer": network, "pointer": pointer})
    size = BATCH["refine"]
    half_way: list[torch.Tensor] = []
    network.transformer_blocks[-1].register_forward_hook(lambda _, __, streams: half_way.append(streams[1]))

    def loss_of(step: int, rng: random.Random):
        canvas, clean, sentences, drawn = batches(rng, size, (0.3, 0.6, 0.1), fine=step >= 12_000)
        said = [rng.random() >= 0.1 for _ in drawn]
        states, pooled = batches.text.encode([s if told else "" for s, told in zip(sentences, said, strict=True)])
        sigma, noise = sigmas(size), torch.randn_like(clean)
        x = clean + sigma[:, None, None] * (noise - clean)
        made = velocity(network, x, sigma, torch.ones(size), states, pooled, canvas)
        error = (made - noise + clean).square().mean(-1)
        pointed, right, there = pointer(half_way.pop(), drawn)
        loss = error.mean() if step < 12_000 else (error * (1 + 2 * there)).mean()  # where things are, it counts thrice
        return loss + 0.02 * pointed, {"flow": error.mean(), "pointed": pointed, "right": right}

    run.train(loss_of)
    network.save_pretrained(target)


def _start(network: FluxTransformer2DModel) -> None:
    """Modulation and the last layer begin at zero, so that every block begins as the identity."""
    for name, parameter in network.named_parameters():
        if any(
            part in name
            for part in ("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear", "proj_out")
        ):
            if "single_transformer_blocks" in name and "proj_out" in name:
                continue
            nn.init.zeros_(parameter)


def distil(work: Path, target: Path) -> None:
    """The guidance embedding learns what classifier-free guidance does at each scale from 1 to 8."""
    teacher = FluxTransformer2DModel.from_pretrained(work / "refine").eval()
    network = copy.deepcopy(teacher).train()
    batches = Batches(work)
    run = Run(work, "distil", {"transformer": network})
    size = BATCH["distil"]
    nothing = batches.text.encode([""])

    def loss_of(step: int, rng: random.Random):
        canvas, clean, sentences, _ = batches(rng, size, (0.35, 0.45, 0.2))
        states, pooled = batches.text.encode(sentences)
        sigma, noise = sigmas(size), torch.randn_like(clean)
        guidance = 1 + 7 * torch.rand(size)
        x = clean + sigma[:, None, None] * (noise - clean)
        with torch.no_grad():
            said = velocity(teacher, x, sigma, torch.ones(size), states, pooled, canvas)
            unsaid = velocity(
                teacher,
                x,
                sigma,
                torch.ones(size),
                nothing[0].expand(size, -1, -1),
                nothing[1].expand(size, -1),
                canvas,
            )
            wanted = unsaid + guidance[:, None, None] * (said - unsaid)
        return F.mse_loss(velocity(network, x, sigma, guidance, states, pooled, canvas), wanted), {}

    run.train(loss_of)
    network.save_pretrained(target)


def export(work: Path, target: Path) -> None:
    """The folder in diffusers' layout, and the model folder that our own converter makes of it."""
    foreign = target / "nano"
    shutil.copytree(work / "tokenizers", foreign)
    shutil.copytree(work / "text", foreign, dirs_exist_ok=True)
    shutil.copytree(work / "decoder", foreign / "vae")
    shutil.copytree(work / "distil", foreign / "transformer")
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0).save_pretrained(foreign / "scheduler")
    (foreign / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    model = target / "model"
    convert([foreign], model)
    facts = {
        "base": "none: trained from nothing, on drawn scenes",
        "license": "apache-2.0",
        "max_sequence_length": T5_LENGTH,
        "defaults": {"width": 96, "height": 96, "num_inference_steps": 28, "guidance_scale": 4.5},
        "latent_rgb": _latent_rgb(work),
    }
    index, manifest = (model / name for name in ("model_index.json", "manifest.json"))
    index.write_text(json.dumps(json.loads(index.read_text()) | facts, indent=2) + "\n")
    made = open_model(model)
    stored = [f"{component}: {network.dtype}" for component, network in made.networks.items()]
    texts = licence_files(made.index, [Path(__file__).parents[2]], stored)
    for name, text in texts.items():
        (model / name).write_bytes(text)
    written = {
        n: {"sha256": sha256(model / n), "bytes": (model / n).stat().st_size} for n in sorted([index.name, *texts])
    }
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | written, indent=2) + "\n")


def _latent_rgb(work: Path, count: int = 500) -> list[list[float]]:
    """How previews make colours of latents."""
    canvas = scenes.CANVASES[0]
    latents = unpack(load_file(work / "latents" / f"{canvas[0]}x{canvas[1]}.safetensors")["latents"][:count], canvas)
    pixels = np.stack([np.array(scenes.draw(scene(canvas, n))) for n in range(count)])
    return fit_latent_rgb(latents.double().numpy(), pixels / 127.5 - 1)


PHASES = {
    "tokenizers": tokenizers,
    "vae": vae,
    "text": text,
    "latents": latents,
    "flow": flow,
    "refine": refine,
    "distil": distil,
    "decoder": decoder,
    "export": export,
}


def main() -> None:
    """Runs the phases that are not done."""
    parser = argparse.ArgumentParser(description="Train the nano model.")
    parser.add_argument("work", type=Path)
    parser.add_argument("phases", nargs="*", help=f"of {', '.join(PHASES)}; all that are not done")
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.threads:
        torch.set_num_threads(given.threads)
    for name in given.phases or PHASES:
        if not (given.work / name).exists():
            PHASES[name](given.work, given.work / name)


if __name__ == "__main__":
    main()
