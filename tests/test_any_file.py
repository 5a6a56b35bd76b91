"""Equal content from any layout: the small trained model as others keep it comes back, and draws as before."""

import json
from pathlib import Path

import foreign
import gguf
import numpy as np
import pytest
from helpers import psnr
from mlx_flux_krea.convert import convert, decode, remap
from mlx_flux_krea.convert.sources import open_sources
from pictures import THINGS, is_right
from PIL import Image

from mlx_flux_krea import FluxPipeline, nano
from mlx_flux_krea.weights import COMPONENTS

MATRICES = ("transformer", "text_encoder_2")
LOSSLESS = [
    ("BFL", {}),
    ("BFL", dict.fromkeys(COMPONENTS, "BF16")),
    ("ComfyUI", {}),
    ("all-in-one", {}),
    ("diffusers", {}),
    ("mflux", {}),
    ("mflux", dict.fromkeys(COMPONENTS, "BF16")),
    *(("GGUF", dict.fromkeys(MATRICES, kind)) for kind in ("F32", "BF16")),
]
# The gguf package or foreign.py writes these; tests/test_formats.py makes the others of random bytes.
WRITTEN = {kind.name for kind, about in gguf.quants._type_traits.items() if "quantize_blocks" in vars(about)}
WRITTEN |= foreign.BLOCKS.keys()
ROUNDED = [
    ("BFL", dict.fromkeys(COMPONENTS, "F16")),
    ("BFL", dict.fromkeys(MATRICES, "metadata")),
    ("ComfyUI", dict.fromkeys(MATRICES, "F8_E4M3")),
    ("ComfyUI", dict.fromkeys(MATRICES, "scaled") | {"text_encoder": "F16"}),
    ("all-in-one", dict.fromkeys(MATRICES, "F8_E4M3") | {"text_encoder": "F16"}),
    ("all-in-one", dict.fromkeys(MATRICES, "scaled")),
    *(("mflux", dict.fromkeys(COMPONENTS, how)) for how in ("q8", "q6", "q4", "q3")),
    *(
        ("GGUF", dict.fromkeys(MATRICES, kind))
        for kind in ("F16", *sorted(WRITTEN & {*decode._BLOCKS}), "Q4_0+Q8_0+F16+Q6_K+BF16")
    ),
]


DRAWN = ("F8_E4M3", "q3", "Q2_K", "Q4_0", "Q4_K")


def draw(folder: Path, prompt: str) -> Image.Image:
    call = {"height": 96, "width": 96, "guidance_scale": 4.5, "max_sequence_length": 40}
    return FluxPipeline.from_pretrained(folder, dtype="float32")(prompt, seed=3, num_inference_steps=8, **call).images[
        0
    ]


@pytest.fixture(scope="module")
def asked():
    """A prompt that the model gets right: the prompt, the things to be seen, and the picture."""
    for prompt, things, ground in THINGS:
        picture = draw(nano.FOLDER, prompt)
        if is_right(picture, things, ground):
            return prompt, things, ground, picture
    return pytest.fail("the model draws none of the pictures right")


def names(rows: list) -> dict:
    return {"argvalues": rows, "ids": [f"{layout}-{types.get('transformer', 'F32')}" for layout, types in rows]}


def converted(source: Path, tmp_path: Path) -> Path:
    return convert([source], tmp_path / "out", dtype="float32", tokenizers=nano.FOLDER).path


@pytest.mark.parametrize(("layout", "types"), **names(LOSSLESS))
@pytest.mark.core("mflux-F32")
def test_every_layout_without_loss_gives_the_same_bits_and_so_the_same_right_picture(asked, tmp_path, layout, types):
    """One of them is drawn: the same bits draw the same."""
    path = converted(foreign.write(nano.FOLDER, tmp_path / "source", layout, **types), tmp_path)
    foreign.assert_same(path, foreign.arrays_of(nano.FOLDER))
    prompt, *_, picture = asked
    if (layout, types) == ("mflux", {}):
        assert np.array_equal(draw(path, prompt), picture)


@pytest.mark.parametrize(("layout", "types"), **names(ROUNDED))
@pytest.mark.core("GGUF-Q4_K")
def test_what_a_file_lost_is_read_as_an_independent_decoder_reads_it(asked, tmp_path, layout, types):
    """And the picture stays right, of each kind of rounding once.

    Of 2 and 3 bits only its distance is judged: rounding so coarse may cost a thing.
    """
    source = foreign.write(nano.FOLDER, tmp_path / "source", layout, **types)
    if layout == "GGUF":
        stored = {tensor.dtype for one in open_sources([source]) for tensor in one.tensors.values()}
        assert {*types["transformer"].split("+")} <= stored
    path = converted(source, tmp_path)
    foreign.assert_same(path, foreign.expected(source, layout))
    kind = types["transformer"]
    if kind not in DRAWN:
        return
    prompt, things, ground, picture = asked
    made = draw(path, prompt)
    if kind in ("q3", "Q2_K"):
        assert psnr(made, picture) > 15
    else:
        assert is_right(made, things, ground)


@pytest.mark.parametrize(("layout", "kind"), [("GGUF", "Q4_0"), ("ComfyUI", "scaled"), ("mflux", "q4")])
@pytest.mark.slow
def test_how_matrices_are_cut_into_pieces_changes_no_byte(tmp_path, monkeypatch, layout, kind):
    source = foreign.write(nano.FOLDER, tmp_path / "source", layout, **dict.fromkeys(MATRICES, kind))
    written = []
    for size in (2**30, 7001):
        monkeypatch.setattr(remap, "_CHUNK", size)
        path = convert([source], tmp_path / str(size), quantize="4", tokenizers=nano.FOLDER).path
        manifest = json.loads((path / "manifest.json").read_text())
        written.append({name: entry for name, entry in manifest.items() if name.endswith(".safetensors")})
    assert written[0] == written[1]


def test_what_mflux_packed_is_not_rounded_again_also_where_we_fuse_its_layers(tmp_path):
    source = foreign.write(nano.FOLDER, tmp_path / "source", "mflux", **dict.fromkeys(COMPONENTS, "q4"))
    report = convert([source], tmp_path / "out", quantize="4", tokenizers=nano.FOLDER)
    errors = {group.name: group.error for group in report.groups if group.error is not None}
    assert len(errors) > 5
    assert {name for name, error in errors.items() if error} == {"modulation"}  # of 8 bits by our recipe
