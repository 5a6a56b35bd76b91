"""Runs that make the map of a photo: `control` in Python, --control and --keep-map on the command line."""

import json
import re
import shutil

import numpy as np
import pytest
from helpers import ROOT, edit_json, levels
from mlx_flux_krea.convert import convert
from PIL import Image
from test_gate import filters  # noqa: F401  # a fixture
from test_maps import KINDS
from test_resume import failing

from mlx_flux_krea import DepthPreprocessor, FluxPipeline, Request, memory
from mlx_flux_krea.errors import ModelError, UsageError, Withheld
from mlx_flux_krea.inputs import maps
from mlx_flux_krea.inputs.canny import canny, edge_map
from mlx_flux_krea.models.depth_config import DEPTH_ANYTHING_V2_SMALL
from mlx_flux_krea.provenance import read_record

PHOTO = Image.fromarray(np.random.default_rng(4).integers(0, 256, (6, 7, 3), np.uint8)).resize((80, 96))
GIVEN = {"prompt": "a", "seed": 3, "num_inference_steps": 2, "width": 64, "height": 48, "fit": "stretch"}
ARGS = ["a", "--seed", "3", "--steps", "2", "--width", "64", "--height", "48"]


@pytest.fixture
def depth(home):
    """The tiny depth network, installed."""
    return convert([ROOT / "tests" / "data" / "maps" / "depth"]).path


@pytest.fixture
def pipe(control):
    return FluxPipeline.from_pretrained(control)


@pytest.fixture
def photo(tmp_path):
    PHOTO.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def made_map(kind: str) -> Image.Image:
    """The map of the photo at the size of the picture, made by the parts alone."""
    fitted = PHOTO.resize((64, 48), Image.Resampling.LANCZOS)
    return edge_map(fitted) if kind == "canny" else DepthPreprocessor()(fitted)[0].convert("RGB")


# --- in Python ---

# The programs of diffusers' page about FLUX.1, for its cards' models, without their comments.
PAGE = {
    "canny": """
import torch
from controlnet_aux import CannyDetector
from diffusers import FluxControlPipeline
from diffusers.utils import load_image

pipe = FluxControlPipeline.from_pretrained("MODEL", torch_dtype=torch.bfloat16).to("cuda")

prompt = "A robot made of exotic candies and chocolates of different kinds."
control_image = load_image("photo.png")

processor = CannyDetector()
control_image = processor(
    control_image, low_threshold=50, high_threshold=200, detect_resolution=1024, image_resolution=1024
)

image = pipe(
    prompt=prompt,
    control_image=control_image,
    height=1024,
    width=1024,
    num_inference_steps=50,
    guidance_scale=30.0,
).images[0]
image.save("output.png")
""",
    "depth": """
import torch
from diffusers import FluxControlPipeline
from diffusers.utils import load_image
from image_gen_aux import DepthPreprocessor

pipe = FluxControlPipeline.from_pretrained("MODEL", torch_dtype=torch.bfloat16).to("cuda")

prompt = "A robot made of exotic candies and chocolates of different kinds."
control_image = load_image("photo.png")

processor = DepthPreprocessor.from_pretrained("LiheYoung/depth-anything-large-hf")
control_image = processor(control_image)[0].convert("RGB")

image = pipe(
    prompt=prompt,
    control_image=control_image,
    height=1024,
    width=1024,
    num_inference_steps=30,
    guidance_scale=10.0,
    generator=torch.Generator().manual_seed(42),
).images[0]
image.save("output.png")
""",
}
MODULES = r"^from (controlnet_aux|diffusers|diffusers\.utils|image_gen_aux) import"


@pytest.mark.parametrize("kind", PAGE)
def test_the_published_programs_run_with_other_imports(control, depth, photo, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    program = re.sub(MODULES, "from mlx_flux_krea import", PAGE[kind], flags=re.MULTILINE)
    program = (
        program.replace("import torch\n", "").replace("torch.bfloat16", '"float32"').replace("MODEL", str(control))
    )
    program = program.replace("generator=torch.Generator().manual_seed(42)", "seed=42")
    exec(re.sub(r"_steps=\d+", "_steps=1", program.replace("=1024", "=64")), {})
    assert Image.open("output.png").size == (64, 64)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_photos_of_every_kind_are_read_by_a_run(pipe, depth, kind, tmp_path):
    given = KINDS[kind][0](tmp_path / "photo.png")
    for control in ("canny", "depth"):
        result = pipe(**GIVEN, control_image=given, control=control)
        assert (result.control_image.size, len(result.images)) == ((64, 48), 1)


@pytest.mark.core("depth")
@pytest.mark.parametrize("kind", ["canny", "depth"])
def test_the_picture_is_that_of_the_map(pipe, depth, kind):
    result = pipe(**GIVEN, control_image=PHOTO, control=kind)
    expected = made_map(kind)
    assert levels(result.control_image, expected) == 0
    assert np.asarray(expected).std() > 5
    by_hand = pipe(**GIVEN, control_image=expected)
    assert by_hand.control_image is None
    assert levels(result.images[0], by_hand.images[0]) == 0
    assert levels(result.images[0], pipe(**GIVEN, control_image=PHOTO).images[0]) > 0
    assert "map" in result.seconds
    record = result.records[0]
    assert (record["control"], record["control_image"]["width"]) == (kind, 80)
    assert record.get("depth_sha256") == (maps.depth_sha256() if kind == "depth" else None)


@pytest.mark.slow
def test_a_map_is_made_once_for_a_photo(pipe, depth, monkeypatch):
    made = []
    monkeypatch.setattr(maps, "depth_map", lambda *args, real=maps.depth_map: made.append(1) or real(*args))
    for seed in (1, 2):
        pipe(**GIVEN | {"seed": seed}, control_image=PHOTO, control="depth")
    assert len(made) == 1
    pipe(**GIVEN | {"width": 48}, control_image=PHOTO, control="depth")
    assert len(made) == 2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"control": "canny"}, "makes a map of a photo, and there is none"),
        ({"control": "pose", "control_image": PHOTO}, "one of canny, depth"),
        ({"control": 1, "control_image": PHOTO}, "one of canny, depth"),
    ],
)
def test_what_makes_no_map_is_refused(pipe, given, says):
    with pytest.raises(UsageError, match=says):
        pipe(**GIVEN | {"fit": None}, **given)


def test_a_model_without_a_control_image_makes_no_map(model):
    with pytest.raises(UsageError, match="`control_image` means nothing to this model"):
        FluxPipeline.from_pretrained(model)(**GIVEN, control_image=PHOTO, control="canny")


def test_a_model_for_one_kind_of_map_refuses_the_other(control, tmp_path):
    shutil.copytree(control, tmp_path / "canny")
    edit_json(tmp_path / "canny" / "model_index.json", kind="canny")
    pipe = FluxPipeline.from_pretrained(tmp_path / "canny")
    with pytest.raises(UsageError, match=r"`control` is depth, and this model reads maps of canny; expected `control`"):
        pipe(**GIVEN, control_image=PHOTO, control="depth")
    assert pipe(**GIVEN, control_image=PHOTO, control="canny").images


def test_a_missing_depth_network_is_told_before_anything_is_loaded(pipe, home, monkeypatch):
    monkeypatch.setattr("mlx_flux_krea.weights.NetworkFolder.load", lambda *args: pytest.fail("weights were loaded"))
    with pytest.raises(ModelError, match="flux-krea convert depth-anything/Depth-Anything-V2-Small-hf"):
        pipe(**GIVEN, control_image=PHOTO, control="depth")


def test_a_photo_passes_the_filters_before_its_map_is_made(control, depth, filters, monkeypatch):  # noqa: F811
    monkeypatch.setattr(maps, "depth_map", lambda *args: pytest.fail("a map was made"))
    pipe = FluxPipeline.from_pretrained(control, check="filters")
    with pytest.raises(Withheld, match="the input image was withheld"):
        pipe(**GIVEN, control_image=Image.new("RGB", (64, 48), (255, 0, 0)), control="depth")


def test_the_plan_has_the_stage_of_the_map(pipe, depth):
    plain = pipe.plan(Request(**GIVEN, control_image=PHOTO)).stages
    for kind in ("canny", "depth"):
        stages = pipe.plan(Request(**GIVEN, control_image=PHOTO, control=kind)).stages
        assert list(stages) == ["text", "map", *list(plain)[1:]]


def test_memory_of_the_published_network_is_as_measured():
    """On the CPU, 168 x 336 pixels: 0.099 GB of weights and 2618 bytes a pixel in the head."""
    needs = memory.map_needs(DEPTH_ANYTHING_V2_SMALL, 518, 518, "cpu")
    assert needs == pytest.approx(98.84e6 + 2618 * 518**2, rel=0.05)
    assert memory.map_needs(DEPTH_ANYTHING_V2_SMALL, 518, 518, "gpu") < needs / 2


# --- on the command line ---


@pytest.mark.slow
def test_the_map_is_kept_beside_the_picture_on_request(command, control, depth, photo, tmp_path):
    base = ["generate", *ARGS, "-m", control, "--control-image", photo]
    code, out, err = command(*base, "--control", "depth")
    assert (code, out.split(), list(tmp_path.glob("*-depth.png"))) == (0, ["out.png"], []), err
    code, out, err = command(*base, "--control", "canny", "--keep-map", "-n", "2", "-o", "two.png", "--json")
    assert code == 0, err
    assert [one["map"] for one in json.loads(out)["images"]] == ["two-canny.png"] * 2
    assert levels(Image.open(tmp_path / "two-canny.png"), made_map("canny")) == 0
    assert command(*base, "--control", "canny", "--keep-map", "-o", "two.png", "--force")[0] == 0
    assert sorted(path.name for path in tmp_path.glob("*canny*")) == ["two-canny.png"]
    (tmp_path / "mine-depth.png").write_bytes(b"mine")
    assert command(*base, "--control", "depth", "--keep-map", "-o", "mine.png")[0] == 0
    assert (tmp_path / "mine-depth.png").read_bytes() == b"mine"
    assert levels(Image.open(tmp_path / "mine-depth-2.png"), made_map("depth")) == 0


@pytest.mark.slow
def test_a_picture_is_repeated_with_its_map(command, control, depth, photo, tmp_path):
    assert command("generate", *ARGS, "-m", control, "--control-image", photo, "--control", "depth")[0] == 0
    assert read_record(tmp_path / "out.png")["control"] == "depth"
    code, _, err = command("generate", "--from", "out.png", "-m", control)
    assert (code, "name it with --control-image" in err) == (2, True)
    again = ["generate", "--from", "out.png", "-m", control, "--control-image", photo]
    code, _, err = command(*again, "-o", "again.png")
    assert (code, "another depth network" in err) == (0, False), err
    assert levels(Image.open(tmp_path / "out.png"), Image.open(tmp_path / "again.png")) == 0
    (depth / "manifest.json").write_text((depth / "manifest.json").read_text() + "\n")
    code, _, err = command(*again, "-o", "other.png")
    assert (code, "another depth network" in err) == (0, True)
    assert "another depth network" not in command(*again, "--control", "canny", "-o", "edges.png")[2]


@pytest.mark.parametrize(
    ("args", "code", "word"),
    [
        (["--control", "depth"], 2, "--control depth makes a map of a photo, and there is none"),
        (["--keep-map"], 2, "--keep-map, and no map is made"),
        (["--control", "pose"], 2, "--control is 'pose'; expected canny or depth"),
        (["--control-image", "photo.png", "--control", "depth"], 3, "flux-krea convert depth-anything/"),
    ],
)
def test_what_makes_no_map_is_answered(command, control, photo, args, code, word):
    more = [] if "--control-image" in args or args[0] == "--control" else ["--control-image", photo]
    found, out, err = command("generate", *ARGS, "-m", control, *more, *args)
    assert (found, out) == (code, "")
    assert word in " ".join(err.split())


@pytest.mark.slow
def test_rows_of_a_prompt_file_take_maps(command, control, photo, tmp_path):
    rows = [{"prompt": "a", "control_image": str(photo), "control": "canny", "keep-map": True, "seed": 3}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, _, err = command("generate", "--prompts", "rows.jsonl", "-m", control, *ARGS[3:], "--num-images", "1")
    assert code == 0, err
    assert levels(Image.open(tmp_path / "out-canny.png"), made_map("canny")) == 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["denoise", "decode"])
def test_a_run_is_resumed_with_its_map(command, control, depth, photo, tmp_path, stage):
    args = [*ARGS, "-m", control, "--control-image", photo, "--control", "depth", "--keep-map"]
    assert command("generate", *args, "-o", "whole.png")[0] == 0
    with failing(stage, 1):
        assert command("generate", *args, "-o", "cut.png")[0] == 1
    photo.unlink()
    code, _, err = command("resume")
    assert code == 0, err
    assert levels(Image.open(tmp_path / "whole.png"), Image.open(tmp_path / "cut.png")) == 0
    assert (tmp_path / "whole-depth.png").read_bytes() == (tmp_path / "cut-depth.png").read_bytes()


def test_plan_shows_the_map(command, control):
    facts = json.loads(command("plan", control, "--control", "depth", "--json")[1])
    assert facts["stages"]["map"] > 90e6
    assert "map" not in json.loads(command("plan", control, "--json")[1])["stages"]
    assert "map" in command("plan", "--control", "canny", "--json")[1]


def test_edges_of_a_picture_are_those_of_the_parts():
    assert np.array_equal(np.asarray(edge_map(PHOTO))[..., 0], canny(np.asarray(PHOTO), 50, 200))
