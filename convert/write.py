"""Writes a model folder: shards in our order of tensors, one tensor in memory at a time, under a temporary name.

The folder takes its final name only when everything in it is on disk. What an interrupted run leaves is a hidden folder
beside the target, which the next run removes.
"""

import contextlib
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_flux_krea.errors import ModelError, ResourceError, UsageError
from mlx_flux_krea.weights import DTYPES, INDEX

from .remap import Plan, Target

SHARD_BYTES = 4 * 2**30  # a shard ends with the block that reaches this
_MODULATION = ("_mod.lin.", ".modulation.lin.", "adaLN_modulation.")


@contextlib.contextmanager
def new_folder(target: Path, force: bool) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well, and nothing otherwise.

    Args:
        target: the final name.
        force: an existing folder is replaced, once the new one is complete.

    Raises:
        UsageError: the target exists, or its parent cannot be written.
    """
    check_target(target, force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f".{target.name}.*.partial"):
            if not _alive(left):
                shutil.rmtree(left)
        partial = target.parent / f".{target.name}.{os.getpid()}.partial"
        partial.mkdir()
    except OSError as error:
        raise UsageError(
            f"{target.parent} cannot be written: {error.strerror}", todo="choose another folder with -o"
        ) from None
    try:
        yield partial
        if target.exists():
            old = target.parent / f".{target.name}.old.{os.getpid()}.partial"
            target.rename(old)
            partial.rename(target)
            shutil.rmtree(old)
        else:
            partial.rename(target)
        _sync(target.parent)
    except OSError as error:
        if error.errno == 28:  # ENOSPC
            raise ResourceError(
                f"the disk of {target} is full", todo="make room, or choose another disk with -o"
            ) from None
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(target: Path, force: bool) -> None:
    """Refuses a target before any work.

    Raises:
        UsageError: it exists and is not to be replaced, or is no folder.
    """
    if target.exists() and not (target.is_dir() and (force or not any(target.iterdir()))):
        what = "exists" if target.is_dir() else "is a file"
        raise UsageError(f"{target} {what}", "a new folder", "choose another with -o, or replace it with --force")


def check_disk(target: Path, need: int) -> None:
    """Refuses before the first byte where the disk cannot hold the result.

    Raises:
        ResourceError: with the numbers.
    """
    parent = next(p for p in target.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < need:
        raise ResourceError(
            f"{free / 1e9:.1f} GB are free at {parent}", f"{need / 1e9:.1f} GB", "choose another disk with -o"
        )


def output_bytes(plan: Plan, dtype: str) -> int:
    """Bytes of a component in this type."""
    return sum(_bytes(target, dtype) for target in plan.targets)


def write_component(
    folder: Path, config: dict, plan: Plan, dtype: str, done: Callable[[int], None], allow_nonfinite: bool = False
) -> None:
    """Writes config.json, shards and index of one component.

    Args:
        folder: of the component; made here.
        config: sizes, as JSON.
        plan: its tensors.
        dtype: "float32", "bfloat16" or "float16", of every array.
        done: called with the bytes just written.
        allow_nonfinite: NaN and infinities pass.

    Raises:
        ModelError: NaN or infinities in a tensor, or a value that does not fit the type.
    """
    folder.mkdir()
    write_json(folder / "config.json", {"dtype": dtype, **config})
    shards = _shards(plan, dtype)
    weight_map = {}
    for number, targets in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {target.name: name for target in targets}
        with open(folder / name, "wb") as file:
            file.write(_header(targets, dtype))
            for target in targets:
                data = _array_bytes(target, dtype, allow_nonfinite)
                file.write(data)
                done(len(data))
            file.flush()
            os.fsync(file.fileno())
    total = output_bytes(plan, dtype)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path: Path, obj) -> None:
    """JSON as people read it, the same bytes for the same object."""
    path.write_text(json.dumps(obj, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_manifest(folder: Path) -> None:
    """manifest.json: sha256 and size of every file in the folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    entries = {p.relative_to(folder).as_posix(): {"sha256": sha256(p), "bytes": p.stat().st_size} for p in files}
    write_json(folder / "manifest.json", entries)


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def _shards(plan: Plan, dtype: str) -> list[list[Target]]:
    """Modulation apart from the rest; a shard never ends inside a block."""
    modulation = [t for t in plan.targets if any(part in t.name for part in _MODULATION)]
    rest = [t for t in plan.targets if not any(part in t.name for part in _MODULATION)]
    shards: list[list[Target]] = []
    for group in (modulation, rest):
        shard, size, block = [], 0, None
        for target in group:
            if size >= SHARD_BYTES and _block(target.name) != block:
                shards.append(shard)
                shard, size = [], 0
            shard.append(target)
            size += _bytes(target, dtype)
            block = _block(target.name)
        shards += [shard] if shard else []
    return shards


def _block(name: str) -> str:
    """The part of a name up to and with its first number: double_blocks.7, encoder.block.3."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: number + 1])


def _bytes(target: Target, dtype: str) -> int:
    return int(np.prod(target.shape, dtype=np.int64)) * getattr(mx, dtype).size


def _header(targets: list[Target], dtype: str) -> bytes:
    """A safetensors header in the order given; the library's own writers sort, and hold everything in memory."""
    entries: dict = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for target in targets:
        end = offset + _bytes(target, dtype)
        entries[target.name] = {"dtype": DTYPES[dtype], "shape": list(target.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header


def _array_bytes(target: Target, dtype: str, allow_nonfinite: bool) -> memoryview:
    stored = target.make()
    array = mx.contiguous(stored.astype(getattr(mx, dtype)))
    if not allow_nonfinite and not mx.isfinite(array).all().item():
        tensor = target.sources[0]
        if mx.isfinite(stored).all().item():
            raise ModelError(
                f"{tensor.path}: {tensor.name} holds values too large for {dtype}", todo="use another --dtype"
            )
        raise ModelError(f"{tensor.path}: {tensor.name} holds NaN or infinities", "finite weights", "download it again")
    return memoryview(np.asarray(array.reshape(-1).view(mx.uint8)))


def _alive(partial: Path) -> bool:
    """Whether the process that made a temporary folder still runs."""
    pid = partial.name.split(".")[-2]
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return int(pid) != os.getpid()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
