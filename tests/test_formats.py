"""Formats in which others store weights, and the statements of files about them: read to the bit, or refused by name.

The independent sides are comfy_kitchen, whose results stand in data/formats (made by data/make_formats.py), and rules
written out here number by number.
"""

import json
import struct
from pathlib import Path

import foreign
import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers import DATA
from mlx_flux_krea.convert import convert, examine, remap
from mlx_flux_krea.convert.fit import make_plan
from mlx_flux_krea.convert.formats import Statement, join_parts
from mlx_flux_krea.convert.identify import identify
from mlx_flux_krea.convert.maps import Rows
from mlx_flux_krea.convert.quantize import dequantize
from mlx_flux_krea.convert.reading import Reading
from mlx_flux_krea.convert.remap import Target
from mlx_flux_krea.convert.sources import Source, open_sources
from mlx_flux_krea.convert.tensors import Tensor
from test_layouts import PARAMETERS, names_in

from mlx_flux_krea import FluxPipeline, nano
from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.models.config import FLUX_DEV, Quantization
from mlx_flux_krea.models.layers import add_arrays, adopt, dequantized
from mlx_flux_krea.weights import open_model

KITCHEN = DATA / "formats" / "kitchen.safetensors"
KEPT = ["float8_e4m3fn_scalar", "float8_e4m3fn_rows", "float8_e5m2_scalar", "float8_e5m2_rows", "nvfp4", "mxfp8",
        "int8", "int8_rows", "int8_rotated_16", "int8_rotated_64", "int8_rotated_256"]  # fmt: skip
Stored = tuple[str, tuple[int, ...], bytes]


def values_of(file: Path, name: str = "a.weight") -> np.ndarray:
    """The numbers of a tensor as the converter reads it: whole, and cut wherever it may be cut."""
    (source,) = open_sources([file])
    tensor = source.tensors[name]
    with Reading([]) as reading:
        whole = np.array(tensor.read(reading.data).astype(mx.float32))
        rows, step = tensor.shape[0], max(tensor.step, 8)
        cut = [tensor.rows(k, min(step, rows - k)).read(reading.data) for k in range(0, rows, step)]
        cut = [np.array(part.astype(mx.float32)) for part in cut]
    assert np.array_equal(np.concatenate(cut), whole, equal_nan=True)
    return whole


# --- beside comfy_kitchen ---


@pytest.mark.parametrize("layer", KEPT)
def test_what_comfy_kitchen_stored_is_read_as_it_reads_it(layer):
    """To the bit. Its rotation is a product of floats, which rounds more often than ours."""
    expected = values_of(KITCHEN, f"{layer}.unpacked")
    found = values_of(KITCHEN, f"{layer}.weight")
    if "rotated" in layer:
        assert np.abs(found - expected).max() < 2e-6 * np.abs(expected).max()
    else:
        assert np.array_equal(found, expected)


def test_every_kept_layer_is_tried():
    (source,) = open_sources([KITCHEN])
    assert sorted(KEPT) == sorted(name.removesuffix(".weight") for name in source.tensors if name.endswith(".weight"))


# --- rules written out ---

RNG = np.random.default_rng(1)
SHAPE = (136, 64)  # one tile of scales and a part of another
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def f32(*numbers: float, shape: tuple[int, ...] = ()) -> Stored:
    return "F32", shape, struct.pack(f"<{len(numbers)}f", *numbers)


def in_tiles(scales: np.ndarray) -> tuple[tuple[int, int], bytes]:
    """Scales at their places in tiles of 128 rows and 4 columns, one by one."""
    rows, columns = scales.shape
    down, across = -(-rows // 128), -(-columns // 4)
    data = bytearray(down * across * 512)
    for r in range(rows):
        for c in range(columns):
            tile = (r // 128) * across + c // 4
            data[512 * tile + 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4] = scales[r, c]
    return (128 * down, 4 * across), bytes(data)


def scales_of(count: int, shape: tuple[int, ...]) -> tuple[Stored, np.ndarray]:
    numbers = (RNG.random(int(np.prod(shape))) + 0.5).astype(np.float32)
    return f32(*numbers, shape=shape), numbers.reshape((-1, 1) if numbers.size == count else ())


def fp8(kind: str, scale: tuple[int, ...], container: str = "", shape=SHAPE) -> tuple[dict[str, Stored], np.ndarray]:
    codes = RNG.integers(0, 120, shape).astype(np.uint8)  # positive and finite in both kinds
    table = foreign.e4m3() if kind == "F8_E4M3" else (np.arange(256) << 8).astype(np.uint16).view(np.float16)
    stored, numbers = scales_of(shape[0], scale)
    parts = {"weight": (container or kind, shape, codes.tobytes()), "weight_scale": stored}
    return parts, table[codes].astype(np.float32) * numbers


def int8(scale: tuple[int, ...], container: str = "I8", rotated: int = 0, shape=SHAPE) -> tuple[dict, np.ndarray]:
    codes = RNG.integers(-127, 128, shape).astype(np.int8)
    stored, numbers = scales_of(shape[0], scale)
    whole = codes.astype(np.float64)
    if rotated:  # signs by the digits of both places to the base of 4: minus where a pair of them adds up to 3
        n = np.arange(rotated)
        digits = [n // 4**k % 4 for k in range(6) if 4**k < rotated]
        signs = np.prod([np.where(np.add.outer(d, d) == 3, -1, 1) for d in digits], axis=0)
        whole = (whole.reshape(shape[0], -1, rotated) @ signs / rotated**0.5).reshape(shape)
    return {"weight": (container, shape, codes.tobytes()), "weight_scale": stored}, whole * numbers.astype(np.float64)


def nvfp4(shape=SHAPE) -> tuple[dict[str, Stored], np.ndarray]:
    codes = RNG.integers(0, 16, shape)
    scales = RNG.integers(1, 120, (shape[0], shape[1] // 16)).astype(np.uint8)
    values = np.concatenate([E2M1, -E2M1])[codes] * (foreign.e4m3()[scales] * np.float32(0.3)).repeat(16, 1)
    packed = (codes[:, ::2] << 4 | codes[:, 1::2]).astype(np.uint8)  # the first number in the upper half
    parts = {"weight": ("U8", (shape[0], shape[1] // 2), packed.tobytes())}
    return parts | {"weight_scale": ("F8_E4M3", *in_tiles(scales)), "weight_scale_2": f32(0.3)}, values


def mxfp8(container: str = "F8_E4M3", shape=SHAPE) -> tuple[dict[str, Stored], np.ndarray]:
    codes = RNG.integers(0, 120, shape).astype(np.uint8)
    scales = RNG.integers(100, 140, (shape[0], shape[1] // 32)).astype(np.uint8)
    values = foreign.e4m3()[codes] * (2.0 ** (scales.astype(np.float64) - 127)).repeat(32, 1).astype(np.float32)
    return {"weight": (container, shape, codes.tobytes()), "weight_scale": ("U8", *in_tiles(scales))}, values


FP8, INT8 = "float8_e4m3fn", "int8_tensorwise"
SCALES = {"one": (), "[1]": (1,), "[1, 1]": (1, 1), "rows": (SHAPE[0],), "rows x 1": (SHAPE[0], 1)}
WRITTEN = {
    **{f"e4m3 {name}": (lambda s=s: fp8("F8_E4M3", s), {"format": FP8}) for name, s in SCALES.items()},
    **{f"e5m2 {name}": (lambda s=s: fp8("F8_E5M2", s), {"format": "float8_e5m2"}) for name, s in SCALES.items()},
    **{f"int8 {name}": (lambda s=s: int8(s), {"format": INT8}) for name, s in SCALES.items()},
    "e4m3 in U8": (lambda: fp8("F8_E4M3", (), "U8"), {"format": FP8}),
    "e4m3 in I8": (lambda: fp8("F8_E4M3", (SHAPE[0], 1), "I8"), {"format": FP8}),
    "e5m2 in U8": (lambda: fp8("F8_E5M2", (), "U8"), {"format": "float8_e5m2"}),
    "e4m3 for exact products": (lambda: fp8("F8_E4M3", ()), {"format": FP8, "full_precision_matrix_mult": True}),
    "int8 in U8": (lambda: int8((SHAPE[0], 1), "U8"), {"format": INT8, "convrot": False}),
    **{f"int8 rotated by {n}": (lambda n=n: int8((SHAPE[0], 1), "I8", n),
       {"format": INT8, "convrot": True, "convrot_groupsize": n}) for n in (16, 64)},
    "nvfp4": (nvfp4, {"format": "nvfp4"}),
    "nvfp4 with its group size": (nvfp4, {"format": "nvfp4", "group_size": 16}),
    "mxfp8": (mxfp8, {"format": "mxfp8"}),
    "mxfp8 in U8": (lambda: mxfp8("U8"), {"format": "mxfp8"}),
}  # fmt: skip


def mark(said: dict | str) -> Stored:
    data = (said if isinstance(said, str) else json.dumps(said)).encode()
    return "U8", (len(data),), data


def save(file: Path, parts: dict[str, Stored], said=None, where: str = "comfy_quant", layer: str = "a") -> Path:
    tensors, metadata = {f"{layer}.{name}": part for name, part in parts.items()}, {}
    if said is not None and where in ("comfy_quant", "both"):
        tensors[f"{layer}.comfy_quant"] = mark(said)
    if said is not None and where in ("metadata", "both"):
        metadata["_quantization_metadata"] = said if isinstance(said, str) else json.dumps({"layers": {layer: said}})
    foreign.save(file, tensors, metadata or None)
    return file


def assert_equal(found: np.ndarray, expected: np.ndarray, kind: str) -> None:
    """To the bit; int8, whose expected values are float64, to the last bit of float32."""
    most = np.abs(expected).max() * (2.0**-23 if "int8" in kind else 0)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= most


@pytest.mark.parametrize("kind", WRITTEN)
def test_every_format_that_a_file_states_is_read_to_the_bit(tmp_path, kind):
    """However it is stated."""
    write, said = WRITTEN[kind]
    parts, expected = write()
    for where in ("comfy_quant", "metadata", "both"):
        assert_equal(values_of(save(tmp_path / "x.safetensors", parts, said, where)), expected, kind)


@pytest.mark.parametrize("shape", SCALES)
@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2"])
def test_fp8_needs_no_statement(tmp_path, kind, shape):
    for name in ("weight_scale", "scale_weight"):
        parts, expected = fp8(kind, SCALES[shape])
        parts[name] = parts.pop("weight_scale")
        assert np.array_equal(values_of(save(tmp_path / "x.safetensors", parts)), expected)


def test_every_code_of_e5m2_is_read_and_without_scales_too(tmp_path):
    codes = np.arange(256, dtype=np.uint8)
    exponent, mantissa = codes >> 2 & 31, codes & 3
    values = np.where(exponent, (1 + mantissa / 4) * 2.0 ** (exponent.astype(float) - 15), mantissa / 4 * 2.0**-14)
    values = np.where(exponent == 31, np.where(mantissa, np.nan, np.inf), values) * np.where(codes >> 7, -1, 1)
    found = values_of(save(tmp_path / "x.safetensors", {"weight": ("F8_E5M2", (32, 8), codes.tobytes())}))
    assert np.array_equal(found.reshape(-1), values.astype(np.float32), equal_nan=True)


@pytest.mark.parametrize("mistake", ["rows", "halves", "scale of all"])
def test_each_mistake_in_nvfp4_is_seen(tmp_path, mistake):
    """Scales read row by row, halves of bytes the other way round, or the scale of all left out."""
    parts, expected = nvfp4()
    scales = np.frombuffer(parts["weight_scale"][2], np.uint8).reshape(parts["weight_scale"][1])
    codes = np.frombuffer(parts["weight"][2], np.uint8)
    changed = {
        "rows": {"weight_scale": ("F8_E4M3", *in_tiles(scales))},
        "halves": {"weight": ("U8", parts["weight"][1], (codes << 4 | codes >> 4).tobytes())},
        "scale of all": {"weight_scale_2": f32(1)},
    }[mistake]
    found = values_of(save(tmp_path / "x.safetensors", parts | changed, {"format": "nvfp4"}))
    assert np.abs(found - expected).max() > 0.5


# --- refused by the words of the file ---

REFUSED = {
    "another format": ({"format": "convrot_w4a4"}, "says that it is stored as convrot_w4a4, which is not read"),
    "one of 4 and 8 bits": ({"format": "asym_w4a8_int8", "group_size": 16}, "asym_w4a8_int8, which is not read"),
    "another of 4 bits": ({"format": "awq_w4a16"}, "awq_w4a16, which is not read"),
    "a rotation": ({"format": FP8, "convrot": True}, "says convrot = true, which is not read; expected float8_e4m3fn"),
    "another field": ({"format": FP8, "smooth": [1]}, r"says smooth = \[1\], which is not read"),
    "broken JSON": ('{"format": "float8', "a.comfy_quant cannot be read"),
    "no format": ({"fmt": FP8}, "a.comfy_quant names no format"),
    "a format that is no word": ({"format": 8}, "names no format"),
    "a list": ("[1]", "is no JSON object"),
    "another kind of numbers": ({"format": "nvfp4"}, r"stored as nvfp4, and holds weight F8_E4M3 \[136, 64\]"),
    "int8": ({"format": INT8}, "stored as int8_tensorwise, and holds weight F8_E4M3"),
    "a rotation one level deeper": ({"format": FP8, "params": {"convrot": True}}, "says convrot = true, which"),
    "another shape": ({"format": FP8, "orig_shape": [8, 8]}, r"holds weight F8_E4M3 \[136, 64\]"),
    "a shape that is none": ({"format": FP8, "orig_shape": "x"}, 'says orig_shape = "x"'),
    "a zero": ({"format": FP8, "rotation": 0}, "says rotation = 0, which is not read"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_statement_that_is_not_understood_is_refused_by_its_words(tmp_path, kind):
    said, message = REFUSED[kind]
    file = save(tmp_path / "x.safetensors", fp8("F8_E4M3", ())[0], said)
    with pytest.raises(ModelError, match=message) as caught:
        convert([file], tmp_path / "out")
    assert caught.value.exit_code == 3
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


PARTS = {
    "weights of 16 bits": (FP8, "weight", ("BF16", SHAPE, bytes(2 * SHAPE[0] * SHAPE[1]))),
    "scales by block": (FP8, "weight_scale", f32(*range(8), shape=(4, 2))),
    "scales of bytes": (FP8, "weight_scale", ("U8", (SHAPE[0],), bytes(SHAPE[0]))),
    "scales not in tiles": ("nvfp4", "weight_scale", ("F8_E4M3", (SHAPE[0], 4), bytes(4 * SHAPE[0]))),
    "no scale of all": ("nvfp4", "weight_scale_2", None),
    "several scales of all": ("nvfp4", "weight_scale_2", f32(1, 2, shape=(2,))),
    "no scales": ("mxfp8", "weight_scale", None),
    "rows that no group divides": ("mxfp8", "weight", ("U8", (SHAPE[0], 40), bytes(40 * SHAPE[0]))),
}


@pytest.mark.parametrize("kind", PARTS)
def test_a_layer_that_is_not_stored_as_it_says_is_refused(tmp_path, kind):
    name, part, stored = PARTS[kind]
    parts = {FP8: lambda: fp8("F8_E4M3", ()), "nvfp4": nvfp4, "mxfp8": mxfp8}[name]()[0]
    parts = {n: p for n, p in (parts | {part: stored}).items() if p}
    with pytest.raises(ModelError, match=f"a says that it is stored as {name}, and holds weight"):
        open_sources([save(tmp_path / "x.safetensors", parts, {"format": name})])


def test_two_statements_that_contradict_each_other_are_refused(tmp_path):
    parts = fp8("F8_E4M3", ())[0] | {"comfy_quant": mark({"format": FP8})}
    file = save(tmp_path / "x.safetensors", parts, {"format": "float8_e5m2"}, "metadata")
    with pytest.raises(ModelError, match="says float8_e5m2 of a, and its comfy_quant float8_e4m3fn"):
        open_sources([file])


@pytest.mark.parametrize("said", [{"convrot": "yes"}, {"convrot": 1}, {"convrot": True, "convrot_groupsize": 16.0},
                                  {"convrot": True, "convrot_groupsize": 32}])  # fmt: skip
def test_a_rotation_that_is_not_understood_is_refused(tmp_path, said):
    with pytest.raises(ModelError, match="says convrot"):
        open_sources([save(tmp_path / "x.safetensors", int8((SHAPE[0], 1))[0], {"format": INT8} | said)])


BROKEN = ["{", "[]", '{"layers": 3}', '{"layers": {"a": 3}}', '{"layers": {"a": {}}}',
          '{"layers": {}, "convrot": true}', '{"layers": {}, "format_version": "2.0"}']  # fmt: skip


@pytest.mark.parametrize("text", BROKEN)
def test_metadata_that_cannot_be_read_is_refused(tmp_path, text):
    with pytest.raises(ModelError, match="_quantization_metadata"):
        open_sources([save(tmp_path / "x.safetensors", fp8("F8_E4M3", ())[0], text, "metadata")])


def test_a_statement_about_a_layer_under_a_prefix_is_found_and_one_about_none_is_idle(tmp_path):
    parts, expected = nvfp4()
    layers = {"blocks.0.a": {"format": "nvfp4"}, "gone": {"format": "awq_w4a16"}}
    tensors = {f"model.blocks.0.a.{name}": part for name, part in parts.items()}
    foreign.save(
        file := tmp_path / "x.safetensors", tensors, {"_quantization_metadata": json.dumps({"layers": layers})}
    )
    assert np.array_equal(values_of(file, "model.blocks.0.a.weight"), expected)


@pytest.mark.parametrize("name", ["a.weight", "model.a", "model.diffusion_model.a.weight"])
def test_a_statement_about_a_layer_by_a_longer_name_is_found(tmp_path, name):
    """And a byte order mark is skipped."""
    parts, expected = nvfp4()
    text = "\ufeff" + json.dumps({"format_version": "1.0", "layers": {name: {"format": "nvfp4"}}})
    assert np.array_equal(values_of(save(tmp_path / "x.safetensors", parts, text, "metadata")), expected)


@pytest.mark.parametrize("method", ["torchao", "fp8", "bitsandbytes", 3])
def test_a_method_that_a_config_states_is_refused_by_its_word_unless_the_weights_are_plain(tmp_path, method):
    (folder := tmp_path / "text_encoder_2").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    save(folder / "model.safetensors", fp8("F8_E4M3", ())[0])
    with pytest.raises(ModelError, match=f"says that its method is {method}, which is not read.*; take another"):
        open_sources([tmp_path])
    save(folder / "model.safetensors", {"weight": ("F32", (1,), bytes(4))})
    assert open_sources([tmp_path])


@pytest.mark.parametrize("kind", ["U8", "I8"])
def test_bytes_without_a_statement_are_not_guessed_at(tmp_path, kind):
    """They may be fp8, int8, rotated int8, or two numbers of 4 bits."""
    source = foreign.write(nano.FOLDER, tmp_path / "source", "BFL")
    file = source / "flux1-krea-dev.safetensors"
    held = foreign.take_apart(foreign.arrays_of(nano.FOLDER)["transformer"], "transformer", "BFL")
    tensors = {name: foreign.plain(array, "F32") for name, array in held.items()}
    rows, width = held["txt_in.weight"].shape
    parts, _ = int8((rows, 1), kind, shape=(rows, width))
    foreign.save(file, tensors | {f"txt_in.{name}": part for name, part in parts.items()})
    with pytest.raises(ModelError, match=r"unknown tensor txt_in\.weight_scale"):
        convert([source], tmp_path / "out", tokenizers=nano.FOLDER)
    assert not (tmp_path / "out").exists()


# --- GGUF ---


def gguf_file(path: Path, name: str, data: np.ndarray, kind: str, shape=None) -> Path:
    writer = gguf.GGUFWriter(path, "flux")
    if shape:
        writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))
    writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


BLOCKS = [kind.name for kind in gguf.quants._type_traits if kind.name != "BF16"]


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_type_that_the_gguf_package_decodes_is_read(tmp_path, kind):
    numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = RNG.integers(0, 64, (16, 2 * size), dtype=np.uint8)
    found = values_of(gguf_file(tmp_path / "x.gguf", "a.weight", data, kind))
    assert found.shape == (16, 2 * numbers)
    assert np.array_equal(found, gguf.dequantize(data, gguf.GGMLQuantizationType[kind]), equal_nan=True)


@pytest.mark.parametrize("shape", [(8, 64), (4, 2, 64), (16, 4, 4, 2), (32, 16), (512,)])
def test_a_tensor_gets_its_original_shape_back(tmp_path, shape):
    """Also where its rows begin inside a block of 32."""
    values = RNG.standard_normal(512).astype(np.float32)
    data = gguf.quantize(values.reshape(16, 32), gguf.GGMLQuantizationType.Q8_0)
    expected = gguf.dequantize(data, gguf.GGMLQuantizationType.Q8_0).reshape(shape)
    assert np.array_equal(values_of(gguf_file(tmp_path / "x.gguf", "a.weight", data, "Q8_0", shape)), expected)


def test_an_original_shape_of_another_size_is_refused(tmp_path):
    data = gguf.quantize(np.zeros((16, 32), np.float32), gguf.GGMLQuantizationType.Q8_0)
    with pytest.raises(ModelError, match=r"a\.weight of shape \[16, 32\] cannot have had the shape \[ *8 65\]"):
        open_sources([gguf_file(tmp_path / "x.gguf", "a.weight", data, "Q8_0", (8, 65))])


# --- codes that go over unchanged ---


@pytest.mark.parametrize("write", [nvfp4, mxfp8])
@pytest.mark.parametrize("most", [2**21, 64], ids=["whole", "cut"])
def test_parts_of_a_fused_matrix_keep_their_codes(tmp_path, monkeypatch, write, most):
    """As queries, keys and values of diffusers: each with a scale of its own, cut at tiles of scales."""
    monkeypatch.setattr(remap, "_CHUNK", most)
    parts, values = zip(*(write() for _ in range(3)), strict=True)
    kind = "nvfp4" if write is nvfp4 else "mxfp8"
    tensors = {f"{n}.{part}": stored for n, one in enumerate(parts) for part, stored in one.items()}
    if kind == "nvfp4":
        tensors |= {f"{n}.weight_scale_2": f32(0.3 * (n + 1)) for n in range(3)}
    foreign.save(tmp_path / "a.safetensors", tensors | {f"{n}.comfy_quant": mark({"format": kind}) for n in range(3)})
    (source,) = open_sources([tmp_path / "a.safetensors"])
    sources = tuple(source.tensors[f"{n}.weight"] for n in range(3))
    target = Target("w.weight", (3 * SHAPE[0], SHAPE[1]), sources, swap=False, torch_axes=False, op=Rows)
    wanted = np.concatenate([v * (n + 1 if kind == "nvfp4" else 1) for n, v in enumerate(values)])
    with Reading([]) as reading:
        rows = [chunk.packed(reading.data) for _, chunk in target.chunks(target.q)]
        whole = target.packed(reading.data)
    assert len(rows) == (3 if most > 64 else 6)
    q = target.q
    for made in (whole, [mx.concatenate(arrays) for arrays in zip(*rows, strict=True)]):
        found = np.array(dequantize(dict(zip(q.arrays, made, strict=True)), q))
        assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()


# --- full size, without weights ---


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8"])
def test_every_tensor_of_a_whole_file_is_mapped_and_its_codes_are_kept(kind):
    """Names, types and shapes by ComfyUI's rules (data/make_keys.py)."""
    path, keys = Path("nowhere") / f"flux1-krea-dev-{kind}.safetensors", foreign.keys(kind)
    said = {n.removesuffix(".comfy_quant"): Statement(kind) for n in keys if n.endswith(".comfy_quant")}
    stored = {n: Tensor(n, path, dtype, shape, 0, 0) for n, (dtype, shape) in keys.items() if "comfy_quant" not in n}
    (found,) = identify(Source(path, (path,), join_parts(stored, statements=said), {}))
    config, plan = make_plan(found)
    assert (found.layout.name, config) == ("transformer, Black Forest Labs", FLUX_DEV)
    assert (plan.parameters, plan.dropped) == (PARAMETERS["transformer"], ())
    assert names_in(plan) == stored.keys()
    wanted = Quantization(4, 16, "nvfp4", gain=True) if kind == "nvfp4" else Quantization(8, 32, "mxfp8")
    assert {t.q for t in plan.targets if f"{t.name}_scale" in stored} == {wanted}
    assert {t.q for t in plan.targets if f"{t.name}_scale" not in stored} == {None}


# --- whole models ---

HOW = {
    "nvfp4": (lambda shape: nvfp4(shape), {"format": "nvfp4"}),
    "mxfp8": (lambda shape: mxfp8(shape=shape), {"format": "mxfp8"}),
    "e5m2": (lambda shape: fp8("F8_E5M2", (shape[0], 1), shape=shape), {"format": "float8_e5m2"}),
    "int8": (lambda shape: int8((shape[0],), shape=shape), {"format": INT8}),
    "int8 rotated": (
        lambda shape: int8((shape[0], 1), "I8", 16, shape),
        {"format": INT8, "convrot": True, "convrot_groupsize": 16},
    ),
}


def model_in(how: str, target: Path, prefix: str = "") -> tuple[Path, dict[str, mx.array]]:
    """Writes the small model with all matrices of blocks in a format; returns the folder and the expected arrays."""
    source = foreign.write(nano.FOLDER, target, "BFL")
    held = foreign.take_apart(foreign.arrays_of(nano.FOLDER)["transformer"], "transformer", "BFL")
    tensors = {prefix + name: foreign.plain(array, "F32") for name, array in held.items()}
    write, said = HOW[how]
    for name, array in held.items():
        if "_blocks." not in name or array.ndim != 2 or array.shape[1] % 64:
            continue
        parts, values = write(array.shape)
        held[name], layer = mx.array(values.astype(np.float32)), prefix + name.removesuffix(".weight")
        tensors |= {f"{layer}.{part}": stored for part, stored in parts.items()}
        tensors[f"{layer}.comfy_quant"] = mark(said)
    foreign.save(source / "flux1-krea-dev.safetensors", tensors)
    return source, held


def assert_kept(path: Path, wanted: dict, kept: dict[str, str]) -> None:
    """Layers of the folder hold the wanted values, those of `kept` in a form of others, and multiply by them."""
    network = open_model(path).flux.load(mx.float32)
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.QuantizedLinear)}
    for name, stored in kept.items():
        q = open_model(path).flux.layers()[name]
        weight = np.array(wanted[f"{name}.weight"]).astype(np.float32)
        assert str(q) == stored, name
        assert np.abs(np.array(dequantized(layers[name])) - weight).max() < 3e-6 * np.abs(weight).max(), name
        x = np.random.default_rng(0).standard_normal((3, weight.shape[1])).astype(np.float32)
        y = x @ weight.T + np.array(layers[name].bias)
        assert np.abs(np.array(layers[name](mx.array(x))) - y).max() < 1e-5 * np.abs(y).max(), name


@pytest.mark.parametrize("how", ["nvfp4", "mxfp8"])
@pytest.mark.core("nvfp4")
def test_codes_and_scales_that_mlx_has_are_kept(tmp_path, how):
    """Also when the folder is converted once more; fewer bits are rounded anew, and -q none keeps nothing."""
    source, wanted = model_in(how, tmp_path / "source")
    path = convert([source], tmp_path / "out", dtype="float32", quantize="8", tokenizers=nano.FOLDER).path
    names = [name for name, q in open_model(path).flux.layers().items() if q and q.mode == how]
    assert len(names) > 5
    assert_kept(path, wanted, dict.fromkeys(names, how))
    plain = convert([path], tmp_path / "plain", dtype="float32", quantize="none").path
    for name, array in foreign.arrays_of(plain)["transformer"].items():
        error = np.abs(np.array(array) - np.array(wanted[name].astype(mx.float32))).max()
        assert error < 3e-6 * np.abs(np.array(array)).max() + 1e-12 or "_blocks." not in name
    again = convert([path], tmp_path / "again", dtype="float32", quantize="8").path
    assert_kept(again, wanted, dict.fromkeys(names, how))
    labels = examine([source], tokenizers=nano.FOLDER).labels
    assert (labels["3"], labels["8"], labels["none"]) == ("3bit", how, "bf16")


@pytest.mark.slow
def test_a_picture_of_kept_layers_is_that_of_their_values(tmp_path):
    """Resident, streamed from the disk, with an adapter, and within the plan."""
    source, _ = model_in("nvfp4", tmp_path / "source")
    call = {"height": 64, "width": 64, "num_inference_steps": 1, "output_type": "latent", "seed": 1}
    layer, rng, adapter = "double_blocks.0.img_attn.proj", np.random.default_rng(0), tmp_path / "lora.safetensors"
    size = open_model(nano.FOLDER).sizes.flux.hidden_size
    factors = {"lora_down": (4, size), "lora_up": (size, 4)}
    arrays = {f"{layer}.{name}.weight": rng.standard_normal(s).astype(np.float32) / 9 for name, s in factors.items()}
    mx.save_safetensors(str(adapter), {name: mx.array(array) for name, array in arrays.items()})
    made, adapted = [], []
    for quantize, memory in (("none", None), ("8", None), ("8", "least")):
        path = tmp_path / quantize
        if not path.exists():
            convert([source], path, dtype="float32", quantize=quantize, tokenizers=nano.FOLDER)
        pipe = FluxPipeline.from_pretrained(path, dtype="float32")
        pipe.memory = pipe.plan(prompt="a red circle", height=64, width=64).least if memory else None
        made.append(pipe("a red circle", **call).images)
        assert (len(pipe._generator.blocks.resident) == 10) == (memory is None)
        pipe.load_lora_weights(adapter)
        adapted.append(pipe("a red circle", **call).images)
    for whole, kept, streamed in (made, adapted):
        assert mx.array_equal(kept, streamed)
        assert mx.linalg.norm(kept - whole, stream=mx.cpu) < 2e-3 * mx.linalg.norm(whole, stream=mx.cpu)
    assert not mx.array_equal(made[0], adapted[0])


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_a_layer_with_factors_keeps_to_the_range_of_its_type(dtype):
    """The sum before the gain is 200 000: beyond float16."""
    weight = mx.random.normal((32, 128), key=mx.random.key(0))
    layer = nn.Linear(128, 32)
    layer.weight = weight
    layer = nn.QuantizedLinear.from_linear(layer, 16, 4, "nvfp4")
    layer.scales = mx.full(layer.scales.shape, 0x7E, mx.uint8)  # 448, the largest
    adopt(nn.Sequential(layer))
    q = Quantization(4, 16, "nvfp4", gain=True, intake=True, rank=8)
    add_arrays(layer, q)
    layer.gain = (mx.arange(1, 33) * 1e-5).view(mx.uint32)
    layer.intake = mx.linspace(0.5, 2, 128).view(mx.uint32)
    layer.down, layer.up = mx.ones((128, 8), dtype) / 100, mx.ones((8, 32), dtype)
    layer.bias = layer.bias.astype(dtype)
    x = mx.full((3, 128), 4.0, dtype)
    wanted = x.astype(mx.float32) @ dequantized(layer).T + layer.bias
    assert mx.abs(wanted / (layer.gain.view(mx.float32))).max() > 65504
    error = mx.abs(layer(x).astype(mx.float32) - wanted).max() / mx.abs(wanted).max()
    assert layer(x).dtype == dtype
    assert error < {mx.float32: 1e-6, mx.bfloat16: 2e-2, mx.float16: 3e-3}[dtype]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.core("nvfp4")
def test_a_model_in_a_format_becomes_the_model_of_its_values(tmp_path, how):
    source, wanted = model_in(how, tmp_path / "source", "model.diffusion_model.")
    report = convert([source], tmp_path / "out", dtype="float32", quantize="none", tokenizers=nano.FOLDER)
    made = foreign.arrays_of(report.path)["transformer"]
    assert made.keys() == wanted.keys()
    for name, array in made.items():
        assert_equal(np.array(array), np.array(wanted[name].astype(mx.float32)), how)
