"""The task of a model: what it reads besides a prompt, from its channels, its sources, or the person who converts."""

import hashlib
import json

import derived
import foreign
import mlx.core as mx
import pytest

from mlx_flux_krea.weights import open_model


@pytest.mark.parametrize(
    ("name", "channels", "steps", "guidance"),
    [("kontext", 64, 28, 2.5), ("fill", 384, 50, 30.0), ("control", 128, 50, 10.0)],
)
def test_the_editing_models_convert_with_their_task_and_defaults(request, name, channels, steps, guidance):
    folder = open_model(request.getfixturevalue(name))
    index, sizes = folder.index, folder.flux.sizes
    assert (index.task, index.kind) == (name, None)
    assert (sizes.in_channels, sizes.out_channels) == (channels, 64)
    assert (index.defaults.num_inference_steps, index.defaults.guidance_scale) == (steps, guidance)
    stored = foreign.arrays_of(folder.path)["transformer"]
    theirs = mx.load(str(derived.editing_file(name)))
    assert stored.keys() == theirs.keys()
    assert all(mx.array_equal(array, theirs[n].astype(mx.float32)) for n, array in stored.items())


def test_single_files_are_those_of_the_reference_to_the_byte():
    known = json.loads((derived.REFERENCE / "bfl" / "sha256.json").read_text())
    files = {path.stem: path for path in derived.single_files().glob("*.safetensors")}
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()} == known
