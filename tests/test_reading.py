"""Sources are read once, in any order rightly, and hashed on the way; what ends too early is named."""

import hashlib
import json
import math
import os
import random
import re
import shutil
import threading
import time
import warnings
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest
from helpers import PIPELINE, TOKENIZERS
from mlx_flux_krea.convert import convert, decode, reading, remap
from mlx_flux_krea.convert.reading import hashing
from mlx_flux_krea.convert.sources import open_sources
from mlx_flux_krea.convert.tensors import Tensor

from mlx_flux_krea import files as disk
from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.files import sha256


@pytest.fixture
def source(tmp_path):
    """A copy of the diffusers folder, to be damaged."""
    return Path(shutil.copytree(PIPELINE, tmp_path / "source"))


def test_of_a_source_each_byte_is_read_once_and_hashed_on_the_way(source, tmp_path, monkeypatch):
    """As others keep it, with queries, keys and values apart; only what is small is read again."""
    count, read = 0, reading.Reading._read

    def counting(self, path, start, size, *rest):
        nonlocal count
        count += size
        return read(self, path, start, size, *rest)

    monkeypatch.setattr(reading, "_LARGE", 2**12)
    monkeypatch.setattr(reading.Reading, "_read", counting)
    out = convert([source], tmp_path / "out", dtype="float32", tokenizers=TOKENIZERS).path
    files = {path.relative_to(source).as_posix(): path for path in source.rglob("*.safetensors")}
    assert count <= 1.05 * sum(path.stat().st_size for path in files.values())
    sources = json.loads((out / "model_index.json").read_text())["source"]
    assert {s["file"]: s["sha256"] for s in sources} == {name: sha256(path) for name, path in files.items()}


@pytest.mark.parametrize("kind", ["F32", "BF16", "F8_E4M3", "8-bit MLX", "4-bit MLX", "3-bit MLX", "Q4_K", "Q2_K"])
@pytest.mark.parametrize("shape", [(9216, 3072), (3072, 12_288), (4096, 10_240)])
def test_of_every_type_the_pieces_are_large_enough_to_be_read_once(tmp_path, monkeypatch, kind, shape):
    stored, read, files = decode.TYPES[kind], [], reading.Reading._read
    size = math.prod(shape) // stored.numbers * stored.bytes
    (tmp_path / "holes").touch()
    os.truncate(tmp_path / "holes", size)
    tensor = Tensor("w", tmp_path / "holes", kind, shape, 0, size)
    monkeypatch.setattr(reading.Reading, "_read", lambda *args: read.append(args[3]) or files(*args))
    with reading.Reading([tensor.path]) as sources:
        for _, piece in remap.Target("w", shape, (tensor,), False, True).chunks():
            sources.data(*piece.sources)
        assert sources.finish(tensor.path) == sha256(tensor.path)
    assert sum(read) <= 1.04 * size


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("large", [1, 2**12])
def test_in_any_order_tensors_and_hashes_are_right(source, monkeypatch, large, direct):
    """Each stays as it is until three more were read, and with systems that read through their cache."""
    monkeypatch.setattr(reading, "_LARGE", large)
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    path = source / "vae" / "diffusion_pytorch_model.safetensors"
    (found,) = open_sources([path])
    data, tensors = path.read_bytes(), sorted(found.tensors.values(), key=lambda tensor: tensor.start)
    for seed in range(5):
        with reading.Reading([path]) as files:
            held = []
            for tensor in tensors:
                held = [*held[-3:], (tensor, files.data(tensor))]
                assert all(array.tobytes() == data[one.start : one.end] for one, array in held)
            assert files.finish(path) == hashlib.sha256(data).hexdigest()
        random.Random(seed).shuffle(tensors)


@pytest.mark.parametrize("large", [1, 2**40])
def test_a_file_that_ends_while_it_is_read_is_named(source, monkeypatch, large):
    path = source / "vae" / "diffusion_pytorch_model.safetensors"
    (found,) = open_sources([path])
    monkeypatch.setattr(reading, "_LARGE", large)
    last = max(found.tensors.values(), key=lambda tensor: tensor.start)
    with reading.Reading([path]) as files:
        files.data(min(found.tensors.values(), key=lambda tensor: tensor.start))
        os.truncate(path, last.start + 4)
        with pytest.raises(ModelError, match=rf"model.safetensors ended inside {re.escape(last.name)}"):
            files.data(last)
    path.unlink()
    with reading.Reading([path]) as files, pytest.raises(ModelError, match="cannot be read: No such file"):
        files.finish(path)


@pytest.mark.parametrize("left", [0, 1, 100, reading.PAGE, reading.PAGE + 100])
def test_a_file_that_becomes_shorter_while_it_is_hashed_ends_it(tmp_path, left):
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * reading._CHUNK))
    chunks = disk.chunks(path)
    assert len(next(chunks)) == reading._CHUNK
    os.truncate(path, reading._CHUNK + left)
    with pytest.raises(ModelError, match="became shorter while it was read"):
        list(chunks)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 2**22, 2**22 + 5])
def test_a_hash_is_of_all_of_a_file_whatever_its_size(tmp_path, size):
    (tmp_path / "file").write_bytes(data := random.Random(size).randbytes(size))
    assert sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_stopping_does_not_wait_for_the_hash_of_a_large_file(tmp_path):
    large = tmp_path / "large"
    with open(large, "wb") as file:
        file.truncate(2**34)  # with nothing on the disk
    started = threading.Event()

    def hash_large(*args, **options):
        started.set()
        return sha256(large, *args, **options)

    start = time.perf_counter()
    with hashing({large: hash_large}) as hashes:
        assert started.wait(30)
    assert time.perf_counter() - start < 5
    with pytest.raises(CancelledError):
        hashes[large].result()


SCALED_BY_BYTES = ("IQ1_M", "MXFP4", "NVFP4")  # whose scales are no 16-bit numbers
OF_GGUF = [name for name, kind in decode.TYPES.items() if kind.package == "gguf" and name not in SCALED_BY_BYTES]


@pytest.mark.parametrize("name", OF_GGUF)
def test_scales_that_are_not_numbers_are_decoded_without_warnings_of_another_package(name):
    """They are found in what comes out, and named."""
    kind = decode.TYPES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for half in (0x7C00, 0xFC00, 0x7C01, 0x7FFF):  # infinities and NaN, as every number of 16 bits of a block
            stored = np.full(-(-kind.bytes // 2), half, np.uint16).view(np.uint8)[: kind.bytes]
            values = np.array(kind.decode(stored, (1, kind.numbers)))
            assert not np.isfinite(values).all()
