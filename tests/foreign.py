"""A model folder of ours written as other programs keep it, and their files read back without the converter.

    write(model, target, "all-in-one", transformer="F8_E4M3")     gives what to name as source
    read(file)                                                    every tensor as it decodes, under its own name
    assemble(tensors, "transformer", "mflux")                     the same as tensors of ours

Names follow the rules in data/layouts.json.gz (made beside the published files, not from convert/maps.py). Types are
decoded by the gguf package, MLX, and a table of e4m3.
"""

import functools
import gzip
import itertools
import json
import math
import shutil
import struct
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
from helpers import DATA

COMPONENTS = ("transformer", "text_encoder", "text_encoder_2", "vae")
SAFETENSORS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U32": np.uint32, "U8": np.uint8}
# Published file names, and the folder of each in ComfyUI's `models`
FILES = {
    "transformer": ("diffusion_models", "flux1-krea-dev"),
    "text_encoder": ("text_encoders", "clip_l"),
    "text_encoder_2": ("text_encoders", "t5xxl"),
    "vae": ("vae", "ae"),
}
PREFIXES = {
    "transformer": "model.diffusion_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.t5xxl.transformer.",
    "vae": "vae.",
}
# The types that gguf reads and does not write: bits of a number; the fields of a block that scale its parts, all by one
# (which is one above the middle where they are signed); where d is, and dmin if there is one
BLOCKS = {
    "Q2_K": (2, {0: b"\x11" * 16}, (80, 82)),
    "Q3_K": (3, {96: b"\x11" * 8 + b"\xaa" * 4}, (108,)),
    "Q4_K": (4, {4: b"\x01" * 8 + b"\x11" * 4}, (0, 2)),
    "Q5_K": (5, {4: b"\x01" * 8 + b"\x11" * 4}, (0, 2)),
    "Q6_K": (6, {192: b"\x01" * 16}, (208,)),
    "IQ4_NL": (4, {}, (0,)),
    "IQ4_XS": (4, {2: b"\xaa" * 2 + b"\x11" * 4}, (0,)),
}


# --- what the published files hold ---


@functools.cache
def _data() -> dict:
    return json.loads(gzip.decompress((DATA / "layouts.json.gz").read_bytes()))


def layouts() -> list[str]:
    return list(_data()["layouts"])


def published(layout: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor of a published file."""
    return {
        name if number is None else name.replace("#", str(number), 1): (dtype, tuple(shape))
        for name, dtype, shape, numbers in _data()["layouts"][layout]
        for number in numbers
    }


def keys(name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor of a file that is known by its maker's rules (data/make_keys.py)."""
    with gzip.open(DATA / "formats" / "keys.json.gz") as file:
        return {tensor: (dtype, tuple(shape)) for tensor, (dtype, shape) in json.load(file)[name].items()}


@functools.cache
def rules(component: str, layout: str) -> dict[str, tuple[str, list[str]]] | None:
    """How each of our tensors comes from a layout: an operation, and names; None: all have the same names as ours."""
    tables = _data()["rules"]
    ours = {"transformer": "bfl_transformer_from_diffusers", "vae": "bfl_ae_from_diffusers_vae"}.get(component)
    if layout == "llama.cpp":
        return tables["hf_t5_from_gguf"]
    if layout == "diffusers":
        return tables[ours] if ours else None
    if layout == "mflux" and component != "text_encoder":
        theirs = {
            "transformer": "transformer_from_diffusers",
            "vae": "vae_from_diffusers",
            "text_encoder_2": "t5_from_hf",
        }
        renamed = {}  # the first that is a copy: block 0's of the position biases
        for name, (_, (source,)) in tables[f"mflux_{theirs[component]}"].items():
            renamed.setdefault(source, name)
        if ours is None:
            return {name: ("copy", [new]) for name, new in renamed.items()}
        return {name: (how, [renamed[n] for n in names]) for name, (how, names) in tables[ours].items()}
    return None


def assemble(tensors: dict[str, mx.array], component: str, layout: str) -> dict[str, mx.array]:
    """Our tensors, in MLX's axes, from those of a file."""
    table = rules(component, layout) or {name: ("copy", [name]) for name in tensors}
    made = {}
    for name, (how, sources) in table.items():
        if all(source in tensors for source in sources):
            parts = [tensors[source] for source in sources]
            array = mx.concatenate(parts) if how == "concat_rows" else parts[0]
            if how == "swap_row_halves":
                array = mx.concatenate(mx.split(array, 2)[::-1])
            if array.ndim == 4 and array.shape[2:] == (1, 1) and "attn" in name:
                array = array.reshape(array.shape[:2])
            made[name] = array.transpose(0, 2, 3, 1) if array.ndim == 4 and layout != "mflux" else array
    return made


def take_apart(arrays: dict[str, mx.array], component: str, layout: str) -> dict[str, mx.array]:
    """The tensors that a file of this layout has, of ours."""
    table = rules(component, layout)
    made = {}
    for name, array in arrays.items():
        how, names = table[name] if table else ("copy", [name])
        if array.ndim == 4 and layout != "mflux":
            array = array.transpose(0, 3, 1, 2)
        elif component == "vae" and table is None and array.ndim == 2:
            array = array[:, :, None, None]
        if how == "concat_rows":
            width = arrays["img_in.bias"].shape[0]
            made |= dict(zip(names, mx.split(array, [width * i for i in range(1, len(names))]), strict=True))
        else:
            made[names[0]] = mx.concatenate(mx.split(array, 2)[::-1]) if how == "swap_row_halves" else array
    if layout == "mflux" and component == "text_encoder_2":
        first = next(n for n in made if "relative_attention_bias" in n)
        blocks = 1 + max(int(n.split(".")[1]) for n in made if n.startswith("t5_blocks."))
        made |= {first.replace(".0.", f".{n}.", 1): made[first] for n in range(blocks)}
    return made


# --- how files store numbers ---


@functools.cache
def e4m3() -> np.ndarray:
    """The values of the 256 codes: sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinities."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    values = np.where(exponent, (1 + mantissa / 8) * 2.0 ** (exponent - 7), mantissa / 8 * 2.0**-6)
    values = np.where(codes & 127 == 127, np.nan, values) * np.where(codes >> 7, -1, 1)
    return values.astype(np.float32)


def _numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


def plain(array: mx.array, dtype: str) -> tuple[str, tuple[int, ...], bytes]:
    """(type, shape, bytes) of an array in a 16 or 32 bit type, or in e4m3."""
    if dtype == "F8_E4M3":
        order = np.argsort(np.nan_to_num(e4m3(), nan=1e9))[:254]  # the codes in the order of their values
        values = e4m3()[order]
        between = (values[1:] + values[:-1]) / 2
        return dtype, array.shape, order.astype(np.uint8)[np.searchsorted(between, _numpy(array))].tobytes()
    kind = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32}[dtype]
    return (
        dtype,
        array.shape,
        np.array(array.astype(kind).view(mx.uint8) if array.ndim else array.astype(kind)).tobytes(),
    )


def stored(tensors: dict[str, mx.array], how: str) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor as a safetensors file has it: "F16", "F8_E4M3", "scaled" (ComfyUI's first), "metadata", "q4", ..."""
    made = {}
    for name, array in tensors.items():
        layer = name.removesuffix(".weight")
        matrix = array.ndim == 2 and name.endswith(".weight")
        if (
            how in ("scaled", "metadata")
            and matrix
            and "embed" not in name
            and "shared" not in name
            and "bias" not in name
        ):
            scale = max(float(mx.abs(array).max()) / 448, 1e-6)
            weight, act = ("scale_weight", "scale_input") if how == "scaled" else ("weight_scale", "input_scale")
            made[name] = plain(array / scale, "F8_E4M3")
            made[f"{layer}.{weight}"] = ("F32", (), struct.pack("<f", scale))
            made[f"{layer}.{act}"] = ("F32", (), struct.pack("<f", 1.5))
        elif how[0] == "q" and matrix and array.shape[-1] % 64 == 0:
            codes, scales, biases = mx.quantize(array.astype(mx.bfloat16), group_size=64, bits=int(how[1:]))
            parts = {name: (codes, "U32"), f"{layer}.scales": (scales, "BF16"), f"{layer}.biases": (biases, "BF16")}
            made |= {n: plain(a, dtype) for n, (a, dtype) in parts.items()}
        else:
            rest = "BF16" if how[0] == "q" else {"scaled": "F16", "metadata": "BF16"}.get(how, how)
            made[name] = plain(array, rest)
    if how == "scaled":
        made["scaled_fp8"] = ("F8_E4M3", (0,), b"")
    return made


def save(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]], metadata: dict[str, str] | None = None):
    """A safetensors file, in the order given. MLX cannot write all of these types."""
    entries, offset = {"__metadata__": metadata} if metadata else {}, 0
    for name, (dtype, shape, data) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # as the safetensors library pads it
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"".join(data for *_, data in tensors.values()))


@functools.cache
def _codes(dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The codes of a type in `BLOCKS`, found out by asking gguf what every bit of a block does.

    Returns:
        For each code the bits of a block that is full of it, with d = 1; its value; and of each bit of a block the
        number that it belongs to, or -1.
    """
    (bits, fields, halves), kind = BLOCKS[dtype], gguf.GGMLQuantizationType[dtype]
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    empty = np.zeros(size, np.uint8)
    for at, data in fields.items():
        empty[at : at + len(data)] = np.frombuffer(data, np.uint8)
    for at, value in zip(halves, (1, 2 ** (bits - 1)), strict=False):
        empty[at : at + 2] = np.array([value], np.float16).view(np.uint8)
    flipped = np.packbits(np.unpackbits(empty) ^ np.eye(8 * size, dtype=np.uint8), axis=1)
    with np.errstate(invalid="ignore", over="ignore"):  # of bits of d
        change = np.abs(gguf.dequantize(flipped, kind) - gguf.dequantize(empty[None], kind))
    owner = np.where((change > 0).sum(1) == 1, change.argmax(1), -1)
    weight = np.zeros(8 * size, int)  # of a bit in the code of its number: they lie in the same order for all numbers
    for number in range(numbers):
        weight[owner == number] = 2 ** np.arange(bits)
    ones = (np.arange(2**bits)[:, None] & weight) > 0
    blocks = np.where(owner >= 0, ones, np.unpackbits(empty)).astype(np.uint8)
    return blocks, gguf.dequantize(np.packbits(blocks, axis=1), kind)[:, 0], owner


def in_blocks(array: np.ndarray, dtype: str) -> np.ndarray:
    """A matrix in blocks of a type that gguf only reads: the nearest codes, with one scale for a block."""
    blocks, values, owner = _codes(dtype)
    parts = array.reshape(-1, owner.max() + 1)
    d = (np.abs(parts).max(1, keepdims=True) / values.max()).astype(np.float16)
    order = np.argsort(values)
    between = (values[order][1:] + values[order][:-1]) / 2
    codes = order[np.searchsorted(between, parts / np.maximum(d, 1e-7).astype(np.float32))]
    data = np.packbits(blocks[codes[:, np.maximum(owner, 0)], np.arange(len(owner))], axis=1)
    for at, value in zip(BLOCKS[dtype][2], (d, d * 2 ** (BLOCKS[dtype][0] - 1)), strict=False):
        data[:, at : at + 2] = value.astype(np.float16).view(np.uint8)
    return data.reshape(*array.shape[:-1], -1)


def save_gguf(path: Path, tensors: dict[str, mx.array], kind: str, arch: str = "flux", add=None):
    """A GGUF file: matrices of blocks in `kind`, or in turn ("Q4_K+Q8_0"), where rows are of whole blocks."""
    others, kinds = kind if kind in SAFETENSORS else "F16", itertools.cycle(kind.split("+"))
    writer = gguf.GGUFWriter(path, arch)
    if add:
        add(writer)
    for name, array in tensors.items():
        block = ".blk." in name or "_blocks." in name or name.startswith("token_embd")
        dtype = "F32" if array.ndim == 1 else next(kinds) if block else others
        if array.shape[-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype]][0]:
            dtype = others
        if dtype in BLOCKS:
            data = in_blocks(_numpy(array), dtype)
        else:
            data = gguf.quantize(_numpy(array), gguf.GGMLQuantizationType[dtype])
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(path: Path) -> dict[str, mx.array]:
    """Every weight of a file as float32, decoded without the converter."""
    if path.suffix == ".gguf":
        reader = gguf.GGUFReader(path)
        shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
        return {
            t.name: mx.array(gguf.dequantize(t.data, t.tensor_type).reshape(shapes[t.name])) for t in reader.tensors
        }
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    arrays = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            dtype, raw = entry["dtype"], data[start:end]
            array = (
                e4m3()[np.frombuffer(raw, np.uint8)] if dtype == "F8_E4M3" else np.frombuffer(raw, SAFETENSORS[dtype])
            )
            array = mx.array(array.reshape(entry["shape"]))
            arrays[name] = array.view(mx.bfloat16).astype(mx.float32) if dtype == "BF16" else array
    for name in [n for n in arrays if n.endswith(".weight")]:
        layer = name.removesuffix(".weight")
        for scale in (f"{layer}.scale_weight", f"{layer}.weight_scale"):
            if scale in arrays:
                arrays[name] = arrays[name] * arrays[scale]
        if f"{layer}.scales" in arrays:
            scales, biases = arrays[f"{layer}.scales"], arrays[f"{layer}.biases"]
            bits = arrays[name].shape[-1] * 32 // (64 * scales.shape[-1])
            arrays[name] = mx.dequantize(arrays[name], scales, biases, group_size=64, bits=bits)
    beside = ("scale_weight", "scale_input", "weight_scale", "input_scale", "scales", "biases", "scaled_fp8")
    return {n: array.astype(mx.float32) for n, array in arrays.items() if n.rpartition(".")[2] not in beside}


# --- whole models ---


def arrays_of(model: Path) -> dict[str, dict[str, mx.array]]:
    """Every array of a model folder of ours that is not quantized."""
    return {
        component: {
            n: a for shard in sorted((model / component).glob("*.safetensors")) for n, a in mx.load(str(shard)).items()
        }
        for component in COMPONENTS
    }


def config(model: Path) -> dict:
    """The sizes of a model folder of ours as a config.json in the form of BFL's parameter classes has them."""
    sizes = {name: json.loads((model / name / "config.json").read_text()) for name in COMPONENTS}
    for obj in sizes.values():
        obj.pop("dtype")
    groups = sizes["vae"].pop("norm_num_groups")
    sections = {"flux": "transformer", "clip": "text_encoder", "t5": "text_encoder_2", "ae": "vae"}
    return {section: sizes[name] for section, name in sections.items()} | {"ae_norm_num_groups": groups}


def write(model: Path, target: Path, layout: str = "BFL", **types: str) -> Path:
    """A model folder of ours in another layout.

    Args:
        model: ours, not quantized.
        target: a folder to make.
        layout: "BFL" (single files), "ComfyUI" (its folders), "all-in-one", "diffusers" (the transformer in two
            shards), "mflux", or "GGUF" (transformer and T5; the others as BFL's).
        types: how a component is stored; see `stored` and `save_gguf`. F32 where nothing is said.
    """
    target.mkdir(parents=True)
    everything, in_one = arrays_of(model), {}
    for component, ours in everything.items():
        how = types.get(component, "F32")
        naming = "llama.cpp" if layout == "GGUF" and component == "text_encoder_2" else layout
        tensors = take_apart(ours, component, naming)
        place, name = FILES[component]
        if layout in ("diffusers", "mflux"):
            folder = target / component
            folder.mkdir()
            shutil.copy(model / component / "config.json", folder)
            _save_shards(folder, stored(tensors, how), layout, 2 if component == "transformer" else 1)
        elif layout == "GGUF" and component in ("transformer", "text_encoder_2"):
            save_gguf(target / f"{name}.gguf", tensors, how, "flux" if component == "transformer" else "t5encoder")
        elif layout == "all-in-one":
            in_one |= {PREFIXES[component] + n: entry for n, entry in stored(tensors, how).items()}
        else:
            folder = target / place if layout == "ComfyUI" else target
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text(json.dumps(config(model)))
            save(folder / f"{name}.safetensors", stored(tensors, how), {"format": "pt"})
    if in_one:
        in_one |= {f"text_encoders.{n}.logit_scale": ("F32", (), struct.pack("<f", 4.6)) for n in ("clip_l", "t5xxl")}
        save(target / "flux1-krea-dev-all.safetensors", in_one)
    if layout in ("all-in-one", "GGUF"):
        (target / "config.json").write_text(json.dumps(config(model)))
    if layout == "diffusers":
        (target / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    return target


def _save_shards(folder: Path, entries: dict, layout: str, count: int) -> None:
    names = list(entries)
    each = math.ceil(len(names) / count)
    shards = [names[i * each : (i + 1) * each] for i in range(count)]
    pattern = "{0}.safetensors" if layout == "mflux" else "diffusion_pytorch_model-{1:05d}-of-{2:05d}.safetensors"
    files = [pattern.format(i, i + 1, count) for i in range(count)]
    for file, shard in zip(files, shards, strict=True):
        save(folder / file, {n: entries[n] for n in shard}, {"mflux_version": "0.9.6"} if layout == "mflux" else None)
    if layout == "diffusers":
        weights = {n: file for file, shard in zip(files, shards, strict=True) for n in shard}
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def assert_same(model: Path, wanted: dict[str, dict[str, mx.array]]) -> None:
    """A model folder of ours holds these arrays, bit by bit."""
    for component, arrays in arrays_of(model).items():
        assert arrays.keys() == wanted[component].keys()
        for name, array in arrays.items():
            one = wanted[component][name].astype(mx.float32)
            assert array.shape == one.shape, name
            assert mx.array_equal(array, one), (name, float(mx.abs(array - one).max()))


def expected(source: Path, layout: str) -> dict[str, dict[str, mx.array]]:
    """Returns the expected arrays of a folder written by `write`: every file decoded, and joined by the rules."""
    made = {}
    for component in COMPONENTS:
        place, name = FILES[component]
        if layout in ("diffusers", "mflux"):
            files = sorted((source / component).glob("*.safetensors"))
        elif layout == "all-in-one":
            files = [source / "flux1-krea-dev-all.safetensors"]
        else:
            folder = source / place if layout == "ComfyUI" else source
            files = [f for f in sorted(folder.iterdir()) if f.stem == name and f.suffix != ".json"]
        tensors = {n: a for file in files for n, a in read(file).items()}
        if layout == "all-in-one":
            prefix = PREFIXES[component]
            tensors = {n.removeprefix(prefix): a for n, a in tensors.items() if n.startswith(prefix)}
        naming = "llama.cpp" if component == "text_encoder_2" and files[0].suffix == ".gguf" else layout
        made[component] = assemble(tensors, component, naming)
    return made
