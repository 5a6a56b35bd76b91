"""DFloat11: bfloat16 weights come back to the bit, and what is damaged or not stated is refused by name."""

import json
from collections import Counter
from pathlib import Path

import dfloat11
import foreign
import mlx.core as mx
import numpy as np
import pytest
from mlx_flux_krea.convert import convert
from mlx_flux_krea.convert.reading import Reading
from mlx_flux_krea.convert.sources import open_sources

from mlx_flux_krea import nano
from mlx_flux_krea.errors import ModelError

RNG = np.random.default_rng(11)
GROUP, LAYERS = "single_blocks.3", ("linear1", "linear2", "modulation.lin")


def bits(shape, kind: str = "usual") -> np.ndarray:
    """Bits of bfloat16 numbers whose exponents are usual, of many sizes, or of very unequal counts."""
    values = RNG.standard_normal(shape).astype(np.float32)
    if kind == "many sizes":
        values = np.ldexp(values, -RNG.integers(0, 100, shape)).astype(np.float32)
    if kind == "long codes":  # counts as Fibonacci's numbers give the longest codes
        counts = [1, 1]
        while sum(counts) + counts[-1] + counts[-2] < values.size:
            counts.append(counts[-1] + counts[-2])
        exponents = np.repeat(np.arange(60, 60 + len(counts)), counts)
        exponents = np.append(exponents, np.full(values.size - exponents.size, exponents[-1]))
        values = np.ldexp(np.float32(1.5), RNG.permutation(exponents).reshape(shape) - 127).astype(np.float32)
    if kind == "one exponent":
        values = np.abs(values) % 1 + 1
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def group_of(weights: dict[str, np.ndarray], name: str = GROUP) -> dict:
    """The stored tensors of a group and the biases of its layers."""
    stored = {f"{name}.{part}": entry for part, entry in dfloat11.encode(list(weights.values())).items()}
    return stored | {f"{name}.{layer}.bias": ("BF16", w.shape[:1], bytes(2 * len(w))) for layer, w in weights.items()}


def read(file: Path) -> dict[str, np.ndarray]:
    (source,) = open_sources([file])
    with Reading(source.files) as reading:
        arrays = {n: t.read(reading.data) for n, t in source.tensors.items() if n.endswith(".weight")}
        return {n: np.array(a.view(mx.uint16)) for n, a in arrays.items()}


@pytest.mark.parametrize("kind", ["usual", "many sizes", "long codes", "one exponent"])
def test_weights_come_back_to_the_bit(tmp_path, kind):
    """Weights begin and end inside blocks of the stream."""
    shapes = ((300, 171), (64, 300), (9, 3)) if kind != "one exponent" else ((3, 5), (2, 2), (1, 1))
    weights = {layer: bits(shape, kind) for layer, shape in zip(LAYERS, shapes, strict=True)}
    stored = group_of(weights)
    longest = max(map(len, dfloat11.codes(Counter((weights["linear1"] >> 7 & 255).ravel().tolist())).values()))
    assert longest > 16 or kind != "long codes"
    foreign.save(file := tmp_path / "x.safetensors", {f"model.diffusion_model.{n}": e for n, e in stored.items()})
    found = read(file)
    for layer, wanted in weights.items():
        assert np.array_equal(found[f"model.diffusion_model.{GROUP}.{layer}.weight"], wanted)


def test_the_order_that_the_config_states_counts(tmp_path):
    weights = {layer: bits((8, 16)) for layer in ("linear2", "modulation.lin", "linear1")}
    foreign.save(tmp_path / "x.safetensors", group_of(weights))
    config = {"pattern_dict": {r"single_blocks\.\d+": list(weights)}, "threads_per_block": [512], "bytes_per_thread": 8}
    (tmp_path / "config.json").write_text(json.dumps({"dfloat11_config": {"version": "0.5.0", **config}}))
    found = read(tmp_path / "x.safetensors")
    assert all(np.array_equal(found[f"{GROUP}.{layer}.weight"], wanted) for layer, wanted in weights.items())
    for change in ({"bytes_per_thread": 4}, {"threads_per_block": [256]}, {"pattern_dict": 3}):
        (tmp_path / "config.json").write_text(json.dumps({"dfloat11_config": config | change}))
        with pytest.raises(ModelError, match=r"is a DFloat11 file, and .*dfloat11_config"):
            open_sources([tmp_path / "x.safetensors"])


def changed(entry: tuple, edit) -> tuple:
    dtype, shape, data = entry
    edited = bytes(edit(bytearray(data)))
    first = shape[0] * len(edited) // len(data)
    return dtype, (first, *shape[1:]), edited


def flip(at: int):
    def edit(data: bytearray) -> bytearray:
        data[at] ^= 0x55
        return data

    return edit


DAMAGE = {
    "zeros in the stream": ("encoded_exponent", lambda data: data[:9000] + bytes(200) + data[9200:]),
    "another stream": ("encoded_exponent", lambda data: data[::-1]),
    "a window's start": ("gaps", flip(100)),
    "a table": ("luts", lambda data: bytearray(len(data))),
    "a table that is not there": ("luts", lambda data: bytearray(b"\xf0" * 256) + data[256:]),
    "the lengths": ("luts", lambda data: data[:-256] + bytearray(256)),
    "a block's first number": ("output_positions", flip(4)),
    "the last position": ("output_positions", flip(-4)),
    "a cut stream": ("encoded_exponent", lambda data: data[:5000]),
    "cut starts": ("gaps", lambda data: data[:-320]),
    "an end of a weight": ("split_positions", flip(0)),
    "no ends": ("split_positions", lambda data: data[:0]),
    "ends out of order": ("split_positions", lambda data: data[8:] + data[:8]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_damaged_is_refused_by_name(tmp_path, kind):
    part, edit = DAMAGE[kind]
    stored = group_of({layer: bits((120, 171), "many sizes") for layer in LAYERS})
    stored[f"{GROUP}.{part}"] = changed(stored[f"{GROUP}.{part}"], edit)
    foreign.save(file := tmp_path / "x.safetensors", stored)
    with pytest.raises(ModelError, match=r"x\.safetensors.*DFloat11.*; (?:download it|name the folder)") as caught:
        read(file)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("part", ["luts", "gaps", "sign_mantissa", "output_positions", "split_positions", "bias"])
def test_a_group_that_lacks_a_part_is_refused_by_name(tmp_path, part):
    stored = group_of({layer: bits((8, 16)) for layer in LAYERS})
    kept = {n: e for n, e in stored.items() if not n.endswith(f".{part}")}
    foreign.save(file := tmp_path / "x.safetensors", kept)
    with pytest.raises(ModelError, match=rf"is a DFloat11 file, and .*(?:lacks {part}|{part} beside it)"):
        open_sources([file])


def test_a_group_of_unknown_layers_is_refused_by_name(tmp_path):
    foreign.save(file := tmp_path / "x.safetensors", group_of({"a": bits((8, 16))}, "model.layers.3"))
    with pytest.raises(ModelError, match=r"which layers the group model\.layers\.3 has; expected a config\.json"):
        open_sources([file])


# --- whole models ---

DOUBLE = ("img_mod.lin", "img_attn.qkv", "img_attn.proj", "img_mlp.0", "img_mlp.2")
ORDERS = {
    "BFL": {"double_blocks": (*DOUBLE, *(name.replace("img", "txt") for name in DOUBLE)), "single_blocks": LAYERS},
    "diffusers": {
        "transformer_blocks": ("norm1.linear", "norm1_context.linear", "attn.to_q", "attn.to_k", "attn.to_v",
                               "attn.add_k_proj", "attn.add_v_proj", "attn.add_q_proj", "attn.to_out.0",
                               "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj",
                               "ff_context.net.2"),
        "single_transformer_blocks": ("norm.linear", "proj_mlp", "proj_out", "attn.to_q", "attn.to_k", "attn.to_v"),
    },
}  # fmt: skip


def model_in(layout: str, target: Path) -> tuple[Path, dict[str, mx.array]]:
    """Writes the small model with the transformer in DFloat11, as one file or a file for each block.

    In the one file only the first and the last blocks are compressed.
    """
    source = foreign.write(nano.FOLDER, target, layout)
    ours = {n: a.astype(mx.bfloat16) for n, a in foreign.arrays_of(nano.FOLDER)["transformer"].items()}
    held = {n: a.astype(mx.bfloat16) for n, a in foreign.take_apart(ours, "transformer", layout).items()}
    rest, files = {n: foreign.plain(a, "BF16") for n, a in held.items()}, {}
    for blocks, order in ORDERS[layout].items():
        for number in sorted({int(n.split(".")[1]) for n in held if n.startswith(f"{blocks}.")}):
            if layout == "BFL" and f"{blocks}.{number}" not in ("double_blocks.0", "single_blocks.5"):
                continue
            group, names = f"{blocks}.{number}", [f"{blocks}.{number}.{layer}.weight" for layer in order]
            encoded = dfloat11.encode([np.array(held[n].view(mx.uint16)) for n in names])
            files[f"{blocks}_{number}"] = {f"{group}.{part}": entry for part, entry in encoded.items()}
            for name in names:
                del rest[name]
    if layout == "BFL":
        foreign.save(
            source / "flux1-krea-dev.safetensors", {n: e for f in (rest, *files.values()) for n, e in f.items()}
        )
        return source, ours
    folder = source / "transformer"
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    for name, entries in {"model": rest, **files}.items():
        foreign.save(folder / f"{name}.safetensors", entries)
    stated = {rf"{blocks}\.\d+": list(order) for blocks, order in ORDERS[layout].items()}
    sizes = json.loads((folder / "config.json").read_text())
    config = {
        "_class_name": "FluxTransformer2DModel", "num_attention_heads": sizes["num_heads"],
        "attention_head_dim": sizes["hidden_size"] // sizes["num_heads"], "in_channels": sizes["in_channels"],
        "pooled_projection_dim": sizes["vec_in_dim"], "joint_attention_dim": sizes["context_in_dim"],
        "num_layers": sizes["depth"], "num_single_layers": sizes["depth_single_blocks"],
        "axes_dims_rope": sizes["axes_dim"], "guidance_embeds": True, "dfloat11_config": {"pattern_dict": stated},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return source, ours


@pytest.mark.parametrize("layout", ORDERS)
@pytest.mark.core("BFL")
def test_a_model_becomes_the_bits_of_its_weights(tmp_path, layout):
    source, wanted = model_in(layout, tmp_path / "source")
    report = convert([source], tmp_path / "out", quantize="none", tokenizers=nano.FOLDER)
    made = foreign.arrays_of(report.path)["transformer"]
    assert made.keys() == wanted.keys()
    assert all(mx.array_equal(made[n].view(mx.uint16), wanted[n].view(mx.uint16)) for n in made)


@pytest.mark.slow
def test_a_stream_that_is_damaged_leaves_nothing_behind(tmp_path):
    source, _ = model_in("BFL", tmp_path / "source")
    file = source / "flux1-krea-dev.safetensors"
    (opened,) = open_sources([file])
    stream = opened.tensors["single_blocks.5.linear2.weight"].parts[0]
    with open(file, "r+b") as opened_file:
        opened_file.seek(stream.start + 500)
        opened_file.write(bytes(2000))
    with pytest.raises(ModelError, match=r"flux1-krea-dev\.safetensors: the DFloat11 stream of single_blocks\.5"):
        convert([source], tmp_path / "out", tokenizers=nano.FOLDER)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize("name", ["single_transformer_blocks_0", "transformer_blocks_1", "model"])
def test_a_missing_file_of_a_block_is_named(tmp_path, name):
    files = [*(f"{blocks}_{n}" for blocks in ORDERS["diffusers"] for n in range(3)), "model"]
    for file in files:
        foreign.save(tmp_path / f"{file}.safetensors", {f"{file}.x": ("U8", (1,), b"1")})
    assert len(open_sources([tmp_path])[0].files) == len(files)
    (tmp_path / f"{name}.safetensors").unlink()
    with pytest.raises(ModelError, match=rf"lacks the shard {name}\.safetensors"):
        open_sources([tmp_path])
