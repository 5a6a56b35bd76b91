"""Trains the nano model from nothing: tokenizers, VAE, text encoders, flow, distillation, export.

    python -m mlx_flux_krea.nano.train WORK [PHASE ...]

Needs the `training` extra (torch, diffusers, transformers), which nothing at run time imports, and a GPU for CUDA; on a
processor alone it runs too, but for days. Every phase writes a folder in WORK when it is done, and checkpoints on the
way; a start continues where the last one stopped. The networks are the reference implementations' own classes, so their
results are by construction those of the reference. A step's data and noise depend on the seed and the number of the
step alone. README.md beside this file says how the shipped weights were made.
"""

import argparse
import functools
import io
import itertools
import json
import random
import shutil
import string
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from mlx_flux_krea.convert import convert
from mlx_flux_krea.convert.licence import licence_files
from mlx_flux_krea.files import sha256
from mlx_flux_krea.nano import scenes
from mlx_flux_krea.presets import Schedule
from mlx_flux_krea.sampling.preview import fit_latent_rgb
from mlx_flux_krea.sampling.sampler import make_sigmas
from mlx_flux_krea.tokenizers import CLIPTokenizer, T5Tokenizer
from mlx_flux_krea.weights import open_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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
NATIVE = scenes.CANVASES[0]
PICTURES = 60_000  # for the autoencoder
SENTENCES = 200_000  # for the text encoders
SCENES = {canvas: 200_000 if canvas == NATIVE else 8_000 for canvas in scenes.CANVASES}  # for the transformer
TOLD = 4  # sentences about each of these scenes
PAIRS = {canvas: 61_440 if canvas == NATIVE else 2_048 for canvas in scenes.CANVASES}  # for the distillation
FADE = 0.4  # below this noise level guidance fades to none: outlines are drawn there
STEPS = {"vae": 3_000, "decoder": 1_000, "text": 2_000, "flow": 6_200, "distil": 400}
RATES = {"vae": 2e-3, "decoder": 5e-4, "text": 2e-3, "flow": 1.5e-3, "distil": 1e-3}
BATCH = {"vae": 256, "decoder": 256, "text": 1024, "flow": 1024, "distil": 1024}


# --- the loop that every phase shares ---


class Run:
    """One phase's optimizer, averaged weights, checkpoints and log."""

    def __init__(self, work: Path, name: str, networks: dict[str, nn.Module]):
        self.name, self.networks = name, networks
        self.checkpoint = work / f"{name}.safetensors"
        self.log = work / "log.jsonl"
        self.named = {f"{n}.{k}": p for n, m in networks.items() for k, p in m.named_parameters() if p.requires_grad}
        self.average = {k: p.detach().clone() for k, p in self.named.items()}
        inner = {k for k, p in self.named.items() if p.ndim == 2 and "transformer_blocks." in k}
        adam = [p for k, p in self.named.items() if k not in inner]
        self.optimizers = [torch.optim.AdamW(adam, betas=(0.9, 0.99), weight_decay=0.01, fused=DEVICE == "cuda")]
        if inner:
            self.optimizers.append(Muon([self.named[k] for k in self.named if k in inner]))
        self.step = 0
        self.seconds = 0.0
        if self.checkpoint.exists():
            self._load()

    def train(self, loss_of: Callable[[random.Random], tuple[torch.Tensor, dict]]) -> None:
        """Runs the steps that are left; `loss_of(rng)` gives the loss and numbers for the log."""
        sums, saved = Counter(), time.monotonic()
        clock = time.monotonic()
        while self.step < (total := STEPS[self.name]):
            torch.manual_seed(SEED + self.step)
            rate = min((self.step + 1) / 200, 1, 2.5 * (1 - self.step / total))  # falls over the last two fifths
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = RATES[self.name] * rate
            with torch.autocast(DEVICE, torch.bfloat16):
                loss, numbers = loss_of(random.Random(f"{SEED} {self.name} {self.step}"))
            loss.backward()
            nn.utils.clip_grad_norm_(self.named.values(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            self.step += 1
            decay = min(0.999, 1 - 10 / (self.step + 10))
            torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.named.values()], 1 - decay)
            for key, value in {"loss": loss, **numbers}.items():
                sums[key] += value.detach()  # a GPU is waited for where the log is written, and not before
            if self.step % 50 == 0 or self.step == total:
                count, sums = (self.step - 1) % 50 + 1, Counter({k: float(v) for k, v in sums.items()})
                now = time.monotonic()
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
        save_file({k: v.cpu().contiguous() for k, v in state.items()}, partial, facts)
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


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal (Jordan and others, 2024), for the matrices of the blocks.

    torch has it too, one matrix after another; here all matrices of one shape are one product, which a GPU wants.
    """

    def __init__(self, matrices: list[nn.Parameter]):
        super().__init__(matrices, {"lr": 1e-3})

    @torch.no_grad()
    def step(self) -> None:
        """Moves every matrix by 0.2 of the rate on average, as AdamW would."""
        for group in self.param_groups:
            shapes = defaultdict(list)
            for matrix in group["params"]:
                shapes[matrix.shape].append(matrix)
            for shape, matrices in shapes.items():
                gradients = [m.grad for m in matrices]
                momenta = [self.state[m].setdefault("momentum", torch.zeros_like(m)) for m in matrices]
                torch._foreach_lerp_(momenta, gradients, 0.05)
                ahead = torch.stack(torch._foreach_lerp(gradients, momenta, 0.95))
                steps = _orthogonal(ahead) * (0.2 * max(shape) ** 0.5)
                torch._foreach_mul_(matrices, 1 - 0.01 * group["lr"])
                torch._foreach_add_(matrices, list(steps.unbind()), alpha=-group["lr"])


def _orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest matrices whose singular values are about 1, (N, rows, columns): five steps of Newton and Schulz."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.mT if tall else x).float()


# --- scenes, drawn and described by as many processes as there are processors ---


def scene(canvas: tuple[int, int], number: int) -> scenes.Scene:
    """Scene `number` of a canvas, the same one on every machine; none is held out."""
    rng = random.Random(f"{SEED} {canvas} {number} False")
    things = rng.choices((1, 2, 3), (0.35, 0.5, 0.15))[0]
    unsaid = [("background", 0.3), ("colour", 0.08 * (things == 1)), ("place", 0.1 * (things == 2))]
    return scenes.sample(rng, things, canvas, unsaid=tuple(part for part, share in unsaid if rng.random() < share))


def to_pixels(pictures: torch.Tensor | np.ndarray) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1] on the device, of (B, H, W, 3) bytes."""
    pixels = torch.as_tensor(pictures).to(DEVICE).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels.contiguous(memory_format=torch.channels_last)


_CHUNK = 500


def _chunks(make: Callable, canvas: tuple[int, int], count: int, *more) -> Iterator[dict[str, torch.Tensor]]:
    """`make(canvas, first, count, *more)` in other processes, for scenes 0 to `count` in chunks of 500."""
    with ProcessPoolExecutor() as processes:
        starts = range(0, count, _CHUNK)
        tasks = [processes.submit(make, canvas, s, min(_CHUNK, count - s), *more) for s in starts]
        for n, task in enumerate(tasks):
            tasks[n] = None  # its arrays go when the caller is done with them
            yield {k: torch.from_numpy(v) for k, v in task.result().items()}


def _pictures(canvas: tuple[int, int], first: int, count: int) -> dict[str, np.ndarray]:
    """Pixels (count, H, W, 3)."""
    return {"pixels": np.stack([np.asarray(scenes.draw(scene(canvas, first + n))) for n in range(count)])}


def _sentences(canvas: tuple[int, int], first: int, count: int, work: Path, told: int) -> dict[str, np.ndarray]:
    """Ids of `told` sentences about each scene, (count, told, 48) and (count, told, 40), and what they say."""
    text, rng = Text(work, encoders=False), random.Random(f"{SEED} {canvas} {first} sentences")
    drawn = [scene(canvas, first + n) for n in range(count)]
    ids = [[text.ids(scenes.describe(one, rng)) for _ in range(told)] for one in drawn]
    return {
        "clip": np.array([[clip for clip, _ in some] for some in ids], np.int16),
        "t5": np.array([[t5 for _, t5 in some] for some in ids], np.int16),
        "answers": np.array([answers(one) for one in drawn], np.int16),
    }


def _everything(canvas: tuple[int, int], first: int, count: int, work: Path, told: int) -> dict[str, np.ndarray]:
    """Pixels, ids, and what stands where."""
    made = _pictures(canvas, first, count) | _sentences(canvas, first, count, work, told)
    del made["answers"]
    covered = np.stack([_covered(scene(canvas, first + n)) for n in range(count)])
    return made | {"covered": covered.astype(np.float16)}


class Text:
    """Both tokenizers, and both encoders where they are trained."""

    def __init__(self, work: Path, encoders: bool = True):
        self.clip_tokenizer = CLIPTokenizer(work / "tokenizers" / "tokenizer")
        self.t5_tokenizer = T5Tokenizer(work / "tokenizers" / "tokenizer_2")
        if encoders:
            self.clip = CLIPTextModel.from_pretrained(work / "text" / "text_encoder").to(DEVICE).eval()
            self.t5 = T5EncoderModel.from_pretrained(work / "text" / "text_encoder_2").to(DEVICE).eval()

    def ids(self, sentence: str) -> tuple[list[int], list[int]]:
        """CLIP's 48 and T5's 40 ids."""
        clip, t5 = self.clip_tokenizer(sentence, CLIP_LENGTH), self.t5_tokenizer(sentence, T5_LENGTH)
        if clip.cut or t5.cut:
            raise ValueError(f"[train] {sentence!r} does not fit.")
        return clip.ids, t5.ids

    @torch.no_grad()
    def encode(self, clip: torch.Tensor, t5: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """T5's states (B, 40, 128) and CLIP's pooled vectors (B, 128), of ids."""
        return self.t5(t5).last_hidden_state, self.clip(clip).pooler_output


# --- the phases ---


def tokenizers(work: Path, target: Path) -> None:
    """A sentencepiece model and a byte-pair vocabulary, from sentences about scenes."""
    rng = random.Random(SEED)
    lines = [scenes.describe(_spelled_out(n), rng) for n in range(20_000)]
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


def _spelled_out(number: int) -> scenes.Scene:
    """A scene of which nothing is left out."""
    rng = random.Random(f"{SEED} {NATIVE} {number} False")
    return scenes.sample(rng, rng.choices((1, 2, 3), (0.35, 0.45, 0.2))[0])


def vae(work: Path, target: Path) -> None:
    """Pixels to 16 channels and back, on crops."""
    torch.manual_seed(SEED)
    network = AutoencoderKL(**VAE).to(DEVICE, memory_format=torch.channels_last)
    pool = _pool()
    run = Run(work, "vae", {"vae": network})

    def loss_of(rng: random.Random):
        pixels = _crops(pool, rng, rng.choice((64, 96)))
        posterior = network.encode(pixels).latent_dist
        made = network.decode(posterior.mean + posterior.std * torch.randn_like(posterior.mean)).sample
        divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        loss, numbers = _distance(made, pixels)
        return loss + 5e-4 * divergence, numbers | {"kl": divergence, "noise": posterior.std.mean()}

    run.train(loss_of)
    with torch.no_grad():
        latents = torch.cat([network.encode(to_pixels(p)).latent_dist.mean for p in pool[:2000].split(50)])
    network.register_to_config(shift_factor=float(latents.mean()), scaling_factor=1 / float(latents.std()))
    network.save_pretrained(target)


def decoder(work: Path, target: Path) -> None:
    """Trains the decoder alone, on whole pictures; the encoder, and so every latent, stays as it is.

    Latents that the transformer makes are a little off those of pictures: half of the batch is, too.
    """
    network = AutoencoderKL.from_pretrained(work / "vae").to(DEVICE, memory_format=torch.channels_last)
    network.encoder.requires_grad_(False)
    pool = _pool()
    run = Run(work, "decoder", {"vae": network})

    def loss_of(rng: random.Random):
        pixels = _crops(pool, rng, 96)
        with torch.no_grad():
            posterior = network.encode(pixels).latent_dist
            off = 0.4 * F.relu(torch.rand(len(pixels), 1, 1, 1, device=DEVICE) - 0.5) / network.config.scaling_factor
            z = posterior.mean + (posterior.std + off) * torch.randn_like(posterior.mean)
        return _distance(network.decode(z).sample, pixels)

    run.train(loss_of)
    network.save_pretrained(target)


def _pool() -> torch.Tensor:
    """(N, 96, 96, 3) bytes on the device."""
    return torch.cat([chunk["pixels"] for chunk in _chunks(_pictures, NATIVE, PICTURES)]).to(DEVICE)


def _crops(pool: torch.Tensor, rng: random.Random, side: int) -> torch.Tensor:
    top, left = rng.randrange(0, 97 - side), rng.randrange(0, 97 - side)
    chosen = pool[torch.randint(len(pool), (BATCH["vae"],), device=DEVICE)]
    return to_pixels(chosen[:, top : top + side, left : left + side])


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
    """Answers to the questions of `Probe`: how many things, the background, and the look and place of each.

    A colour that is not said is 0, as are the looks of things that are not there.
    """
    colours, shapes, sizes = list(scenes.COLOURS), scenes.SHAPES, list(scenes.SIZES)
    if len(drawn.things) == 1:
        across, down = scenes.PLACES.get(drawn.where, (1.5, 1.5))
        places = [(int(across * 2), int(down * 2))]
    elif len(drawn.things) == 2:
        first, second = (0, 2) if drawn.where in ("left of", "above") else (2, 0)
        places = [(p, 3) if drawn.where in ("left of", "right of") else (3, p) for p in (first, second)]
        places = [(3, 3)] * 2 if "place" in drawn.unsaid else places
    else:
        third = 0 if drawn.where == "above" else 2
        places = [(0, 2 - third), (2, 2 - third), (1, third)]
    numbers = [len(drawn.things) - 1, *(colours.index(c) for c in drawn.background)]
    for thing, place in zip(drawn.things, places, strict=True):
        colour = -1 if "colour" in drawn.unsaid else colours.index(thing.colour)
        look = (shapes.index(thing.shape), colour, sizes.index(thing.size))
        numbers += [n + 1 for n in (*look, *place)]
    return numbers + [0] * (len(_QUESTIONS) - len(numbers))


def text(work: Path, target: Path) -> None:
    """Both encoders learn to tell what a sentence says: the flow then finds every word bound to its thing."""
    torch.manual_seed(SEED)
    t5, clip = T5EncoderModel(T5Config(**T5)).to(DEVICE), CLIPTextModel(CLIPTextConfig(**CLIP)).to(DEVICE)
    nn.init.normal_(t5.shared.weight, std=1.0)
    ask_t5, ask_clip = (Probe(128, _QUESTIONS, attention).to(DEVICE) for attention in (True, False))
    parts = list(_chunks(_sentences, NATIVE, SENTENCES, work, 1))
    told = {k: torch.cat([part[k] for part in parts]).to(DEVICE) for k in parts[0]}
    run = Run(work, "text", {"t5": t5, "clip": clip, "ask_t5": ask_t5, "ask_clip": ask_clip})

    def loss_of(rng: random.Random):
        chosen = torch.randint(SENTENCES, (BATCH["text"],), device=DEVICE)
        targets = told["answers"][chosen].long()
        loss_t5, right_t5 = ask_t5(t5(told["t5"][chosen, 0].long()).last_hidden_state, targets)
        loss_clip, right_clip = ask_clip(clip(told["clip"][chosen, 0].long()).pooler_output, targets)
        return loss_t5 + loss_clip, {"t5": right_t5, "clip": right_clip}

    run.train(loss_of)
    t5.save_pretrained(target / "text_encoder_2")
    clip.save_pretrained(target / "text_encoder")


@torch.no_grad()
def latents(work: Path, target: Path) -> None:
    """Encodes every training scene once, and writes its sentences beside it."""
    network = AutoencoderKL.from_pretrained(work / "vae").to(DEVICE, memory_format=torch.channels_last).eval()
    target.mkdir()
    for canvas, count in SCENES.items():
        parts = []
        for part in _chunks(_everything, canvas, count, work, TOLD):
            mean = network.encode(to_pixels(part.pop("pixels"))).latent_dist.mean
            scaled = (mean - network.config.shift_factor) * network.config.scaling_factor
            parts.append(part | {"latents": pack(scaled).half().cpu()})
        save_file({k: torch.cat([part[k] for part in parts]) for k in parts[0]}, _stored(target, canvas))


def _stored(folder: Path, canvas: tuple[int, int]) -> Path:
    return folder / f"{canvas[0]}x{canvas[1]}.safetensors"


def pack(x: torch.Tensor) -> torch.Tensor:
    """(B, 16, h, w) to (B, h/2 * w/2, 64), as diffusers packs."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


@functools.cache
def positions(canvas: tuple[int, int]) -> torch.Tensor:
    """(h/2 * w/2, 3): zero, row, column."""
    rows, columns = torch.meshgrid(torch.arange(canvas[1] // 16), torch.arange(canvas[0] // 16), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float().to(DEVICE)


def velocity(network, canvas, x, sigma, guidance, states, pooled) -> torch.Tensor:
    """The transformer's answer for packed latents."""
    return network(
        hidden_states=x, timestep=sigma, guidance=guidance, encoder_hidden_states=states, pooled_projections=pooled,
        img_ids=positions(canvas), txt_ids=torch.zeros(states.shape[1], 3, device=DEVICE), return_dict=False,
    )[0].float()  # fmt: skip


def compiled(network: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """The network on the device; on a GPU, with compiled blocks."""
    if DEVICE == "cuda":
        for block in [*network.transformer_blocks, *network.single_transformer_blocks]:
            block.forward = torch.compile(block.forward, dynamic=False)
    return network.to(DEVICE)


class Batches:
    """Scenes or pairs with their sentences, from a folder of files by canvas. Sentences are encoded once."""

    def __init__(self, work: Path, folder: str):
        self.text = Text(work)
        clip, t5 = (torch.tensor([ids], device=DEVICE, dtype=torch.int16) for ids in self.text.ids(""))
        self.nothing = self._encoded({"clip": clip, "t5": t5})
        self.stored = {}
        for canvas in scenes.CANVASES:
            stored = {k: v.to(DEVICE) for k, v in load_file(_stored(work / folder, canvas)).items()}
            told = stored["clip"].shape[1]
            encoded = self._encoded({k: stored[k].flatten(0, 1) for k in ("clip", "t5")})
            self.stored[canvas] = stored | {k: v.unflatten(0, (-1, told)) for k, v in encoded.items()}

    def _encoded(self, ids: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        parts = [
            self.text.encode(c.long(), t.long())
            for c, t in zip(*(ids[k].split(4096) for k in ("clip", "t5")), strict=True)
        ]
        states, pooled = (torch.cat([part[n].bfloat16() for part in parts]) for n in (0, 1))
        return ids | {"states": states, "pooled": pooled}

    def __call__(self, rng: random.Random, size: int) -> tuple[tuple[int, int], dict[str, torch.Tensor]]:
        """A canvas, mostly the native one, and some of what is stored for it: name to (size, ...)."""
        canvas = NATIVE if rng.random() < 0.8 else rng.choice(scenes.CANVASES[1:])
        return canvas, self.take(canvas, size)

    def take(self, canvas: tuple[int, int], size: int) -> dict[str, torch.Tensor]:
        """Chosen by chance, with one of several sentences about each."""
        stored = self.stored[canvas]
        chosen = torch.randint(len(stored["clip"]), (size,), device=DEVICE)
        which = torch.randint(stored["clip"].shape[1], (size,), device=DEVICE)
        return {k: v[chosen, which] if k in self.nothing else v[chosen] for k, v in stored.items()}

    def forget(self, taken: dict[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
        """Leaves out some sentences."""
        silent = torch.rand(len(taken["clip"]), device=DEVICE) < share
        left = {k: nothing.expand_as(taken[k]) for k, nothing in self.nothing.items()}
        return taken | {k: torch.where(silent.view(-1, *[1] * (v.ndim - 1)), v, taken[k]) for k, v in left.items()}


def flow(work: Path, target: Path) -> None:
    """Flow matching: the velocity from picture to noise, one sentence in ten left out.

    Half way through, the network has to tell which thing stands where.
    """
    torch.manual_seed(SEED)
    network = FluxTransformer2DModel(**FLUX)
    _start(network)
    pointer = Pointer(network.inner_dim).to(DEVICE)
    network = compiled(network)
    batches, size = Batches(work, "latents"), BATCH["flow"]
    run = Run(work, "flow", {"transformer": network, "pointer": pointer})
    half_way: list[torch.Tensor] = []
    network.transformer_blocks[-1].register_forward_hook(lambda _, __, streams: half_way.append(streams[1]))

    def loss_of(rng: random.Random):
        canvas, taken = batches(rng, size)
        taken = batches.forget(taken, 0.1)
        clean = taken["latents"].float()
        sigma = torch.sigmoid(torch.randn(size, device=DEVICE) * 1.2 + 0.5)  # towards noise, where layout is decided
        noise = torch.randn_like(clean)
        x = clean + sigma[:, None, None] * (noise - clean)
        made = velocity(network, canvas, x, sigma, torch.ones_like(sigma), taken["states"], taken["pooled"])
        error = (made - noise + clean).square().mean(-1)
        pointed, right, there = pointer(half_way.pop(), taken["covered"])
        near = 1 + 2 * there * (1 - sigma[:, None])  # towards the end, things count thrice
        return (error * near).mean() + 0.02 * pointed, {"flow": error.mean(), "pointed": pointed, "right": right}

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

    def forward(self, states: torch.Tensor, covered: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The loss, the share of covered tokens whose shape is told, and which tokens those are, (B, L).

        Args:
            states: (B, L, width).
            covered: (B, L, 5), from `_covered`.
        """
        shape, colour, place = self.answer(self.norm(states)).float().split(self.sizes, -1)
        shapes, colours, places = covered[..., 0].long(), covered[..., 1].long(), covered[..., 2:].float()
        there = shapes > 0
        loss = F.cross_entropy(shape.flatten(0, 1), shapes.flatten())
        loss = loss + F.cross_entropy(colour.flatten(0, 1), colours.flatten())
        off = F.smooth_l1_loss(place, places, reduction="none").mean(-1)
        loss = loss + (off * there).sum() / there.sum()
        return loss, ((shape.argmax(-1) == shapes) & there).sum() / there.sum(), there


def _covered(scene: scenes.Scene) -> np.ndarray:
    """Returns, for each token, shape and colour of the thing on it (0: none), and its middle and half side in tokens.

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


@torch.no_grad()
def pairs(work: Path, target: Path) -> None:
    """Noise, and the latents that classifier-free guidance at a scale from 1 to 8 makes of it in 28 steps."""
    teacher = compiled(FluxTransformer2DModel.from_pretrained(work / "flow"))
    batches, size = Batches(work, "latents"), BATCH["distil"] // 2
    target.mkdir()
    for canvas, count in PAIRS.items():
        parts = []
        for n in range(0, count, size):
            torch.manual_seed(SEED + n)
            taken = batches.forget(batches.take(canvas, size), 0.08)
            guidance = 1 + 7 * torch.rand(size, device=DEVICE)
            noise = torch.randn_like(taken["latents"], dtype=torch.float32)
            made = guided(teacher, canvas, taken, batches.nothing, noise, guidance)
            part = {"clip": taken["clip"][:, None], "t5": taken["t5"][:, None], "guidance": guidance}
            parts.append(part | {"noise": noise.half(), "latents": made.half()})
        save_file({k: torch.cat([part[k] for part in parts]).cpu() for k in parts[0]}, _stored(target, canvas))


def guided(network, canvas, told: dict, untold: dict, noise, guidance, steps: int = 28) -> torch.Tensor:
    """Latents by classifier-free guidance, with and without the sentence in one batch."""
    size, x = len(noise), noise
    states, pooled = (torch.cat([told[k], untold[k].expand_as(told[k])]) for k in ("states", "pooled"))
    one = torch.ones(2 * size, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        for sigma, following in itertools.pairwise(make_sigmas(Schedule(), noise.shape[1], steps).tolist()):
            both = velocity(network, canvas, torch.cat([x, x]), one * sigma, one, states, pooled)
            said, unsaid = both.chunk(2)
            scale = 1 + (guidance[:, None, None] - 1) * min(1, sigma / FADE)
            x = x + (following - sigma) * (unsaid + scale * (said - unsaid))
    return x


def distil(work: Path, target: Path) -> None:
    """The guidance embedding learns where guidance leads, and the flow to go there straight, in few steps.

    That is the reflow of Liu and others (2022), from the pairs of the phase before.
    """
    network = compiled(FluxTransformer2DModel.from_pretrained(work / "flow")).train()
    batches, size = Batches(work, "pairs"), BATCH["distil"]
    run = Run(work, "distil", {"transformer": network})

    def loss_of(rng: random.Random):
        canvas, taken = batches(rng, size)
        made, noise = taken["latents"].float(), taken["noise"].float()
        sigma = 1 - torch.rand(size, device=DEVICE) ** 1.5  # towards noise, where the first step is
        x = made + sigma[:, None, None] * (noise - made)
        straight = velocity(network, canvas, x, sigma, taken["guidance"], taken["states"], taken["pooled"])
        return F.mse_loss(straight, noise - made), {}

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


@torch.no_grad()
def _latent_rgb(work: Path, count: int = 500) -> list[list[float]]:
    """The map by which previews make colours of latents."""
    network = AutoencoderKL.from_pretrained(work / "vae").to(DEVICE).eval()
    pixels = to_pixels(_pictures(NATIVE, 0, count)["pixels"])
    mean = torch.cat([network.encode(some).latent_dist.mean for some in pixels.split(50)])
    latents = (mean - network.config.shift_factor) * network.config.scaling_factor
    return fit_latent_rgb(latents.double().cpu().numpy(), pixels.permute(0, 2, 3, 1).cpu().numpy())


PHASES = {
    "tokenizers": tokenizers,
    "vae": vae,
    "decoder": decoder,
    "text": text,
    "latents": latents,
    "flow": flow,
    "pairs": pairs,
    "distil": distil,
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
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass fails in torch 2.11
    for name in given.phases or PHASES:
        if not (given.work / name).exists():
            PHASES[name](given.work, given.work / name)


if __name__ == "__main__":
    main()
