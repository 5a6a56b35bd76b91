"""Maps from photos: Canny's edges against OpenCV's, depth against transformers', and photos of every kind."""

import json
import logging
import shutil
import time

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import ROOT, assert_close, edit_json, run_command
from hub import Hub
from mlx_flux_krea.convert import convert
from mlx_flux_krea.convert.folder import check_manifest
from PIL import ExifTags, Image
from test_inputs import profile

from mlx_flux_krea import CannyDetector, DepthPreprocessor, cli, load_image
from mlx_flux_krea.errors import ModelError, UsageError
from mlx_flux_krea.inputs import canny as edges
from mlx_flux_krea.inputs.depth import _levels as levels_of
from mlx_flux_krea.inputs.depth import depth_map
from mlx_flux_krea.inputs.resample import resize
from mlx_flux_krea.models import depth
from mlx_flux_krea.models.depth_config import DEPTH_ANYTHING_V2_SMALL
from mlx_flux_krea.weights import open_component, open_folder

MAPS = ROOT / "tests" / "data" / "maps"
BAR = 1e-5  # of the largest depth
EDGES = {name: np.array(array) for name, array in mx.load(str(MAPS / "edges.safetensors")).items()}
FOUND = sorted(name for name in EDGES if ": " in name and not name.startswith(("area", "lanczos", "linear")))
RESIZED = sorted(name for name in EDGES if name.startswith(("area", "lanczos", "linear")))
DEPTHS = dict(mx.load(str(MAPS / "depth.safetensors")))


def thresholds(name: str) -> tuple[str, float, float]:
    picture, _, numbers = name.partition(": ")
    low, high = map(float, numbers.split(", "))
    return picture, low, high


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The tiny depth network, as a folder of ours."""
    return convert([MAPS / "depth"], tmp_path_factory.mktemp("converted") / "depth").path


@pytest.fixture
def network(converted, home):
    """The tiny depth network, installed."""
    shutil.copytree(converted, home / "components" / "depth")
    return open_folder(home / "components" / "depth").networks["depth"].load(mx.float32)


# --- edges ---


@pytest.mark.parametrize("name", FOUND)
def test_edges_are_those_of_opencv_to_the_pixel(name):
    picture, low, high = thresholds(name)
    pixels = EDGES[picture]
    found = edges.canny(pixels, low, high)
    assert found.dtype == np.uint8
    assert set(np.unique(found)) <= {0, 255}
    expected = np.unpackbits(EDGES[name])[: found.size].reshape(found.shape) * 255
    assert np.array_equal(found, expected), f"{(found != expected).sum()} of {found.size} pixels differ"


def test_thresholds_may_change_places():
    assert np.array_equal(edges.canny(EDGES["noise"], 200, 50), edges.canny(EDGES["noise"], 50, 200))


@pytest.mark.parametrize(
    ("what", "mistake"),
    [
        ("of the channels the last counts", {"_gradients": lambda p, real=edges._gradients: real(p[..., -1:])}),
        ("no hysteresis", {"_connected": lambda found, strong: found & strong}),
        ("every weak edge stays", {"_connected": lambda found, strong: found}),
        (
            "the border is black",
            {"_gradients": lambda p, real=edges._gradients: real(np.pad(p, ((1, 1), (1, 1), (0, 0))))},
        ),
        ("another sector", {"_TAN_22": 12573}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_mistake_is_seen(what, mistake, monkeypatch):
    for name, value in mistake.items():
        monkeypatch.setattr(edges, name, value)
    differ = 0
    for picture in ("noise", "shapes"):
        found = edges.canny(EDGES[picture], 50, 200)
        expected = np.unpackbits(EDGES[f"{picture}: 50, 200"])[: EDGES[picture][..., 0].size] * 255
        inner = found if found.size == expected.size else found[1:-1, 1:-1]
        differ += (inner.ravel() != expected).sum()
    assert differ > 0, what


def test_an_edge_of_any_length_is_followed():
    """A spiral of weak pixels with one strong end, which a search by dilation would need a pass for each pixel of."""
    side = 201
    spiral, top, left, bottom, right = np.zeros((side, side), bool), 0, 0, side - 1, side - 1
    while top <= bottom and left <= right:
        spiral[top, max(left - 2, 0) : right + 1] = spiral[top : bottom + 1, right] = True
        spiral[bottom, left : right + 1] = spiral[top + 2 : bottom + 1, left] = True
        top, left, bottom, right = top + 2, left + 2, bottom - 2, right - 2
    strong = np.zeros_like(spiral)
    assert not edges._connected(spiral, strong).any()
    strong[0, 0] = True
    assert np.array_equal(edges._connected(spiral, strong), spiral)
    apart = spiral.copy()
    apart[:, side // 2 - 40] = False  # cut into parts
    kept = edges._connected(apart, strong)
    assert kept[0, 0]
    assert kept.sum() < apart.sum()


@pytest.mark.parametrize("name", RESIZED)
def test_resizing_is_opencvs_within_a_level(name):
    method, _, size = name.partition(": ")
    width, height = map(int, size.split(", "))
    made = resize(np.ascontiguousarray(EDGES["shapes"][:50, :60]), (width, height), method)
    assert np.abs(made.astype(int) - EDGES[name]).max() <= 1


def test_the_detector_is_called_as_controlnet_aux_is():
    photo = Image.fromarray(EDGES["shapes"])
    made = CannyDetector()(photo, low_threshold=50, high_threshold=200, detect_resolution=128, image_resolution=192)
    assert (made.mode, made.size) == ("RGB", (192, 192))
    levels = np.asarray(made)
    assert np.array_equal(levels[..., 0], levels[..., 2])
    assert 0 < levels.mean() < 128
    same = CannyDetector()(photo, 50, 200, 128, 128)
    assert np.array_equal(
        np.asarray(same)[..., 0], edges.canny(resize(EDGES["shapes"], (128, 128), "lanczos"), 50, 200)
    )
    assert isinstance(CannyDetector()(EDGES["shapes"], detect_resolution=64, image_resolution=64), np.ndarray)
    assert isinstance(CannyDetector()(EDGES["shapes"], output_type="pil"), Image.Image)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"input_image": None}, "no `input_image`"),
        ({"low_threshold": float("nan")}, "`low_threshold` is nan"),
        ({"high_threshold": True}, "`high_threshold` is True"),
        ({"detect_resolution": 0}, "`detect_resolution` is 0"),
        ({"image_resolution": 10**9}, "`image_resolution` is 1000000000"),
        ({"output_type": "pt"}, "`output_type` is 'pt'"),
        ({"input_image": Image.new("RGB", (20_000, 20))}, "the map of 20000 x 20 would be"),
    ],
)
def test_arguments_out_of_range_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        CannyDetector()(**({"input_image": Image.new("RGB", (20, 20))} | options))


# --- depth ---


@pytest.mark.parametrize("size", [name.removeprefix("depth ") for name in sorted(DEPTHS) if name.startswith("depth ")])
def test_depth_is_that_of_transformers(network, size):
    expected = DEPTHS[f"depth {size}"]
    assert expected.max() > 0.1
    assert_close(network(DEPTHS[f"pixels {size}"]), expected, BAR * expected.max().item())


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("_bicubic", lambda real: lambda old, new: depth._bilinear(old, new)),
        ("_bilinear", lambda real: lambda old, new: depth._bicubic(old, new)),
        (
            "_resize",
            lambda real: (
                lambda x, rows, columns: (
                    real(x.transpose(0, 2, 1, 3), columns, rows).transpose(0, 2, 1, 3)[::-1] * 1.001
                )
            ),
        ),
    ],
)
def test_each_mistake_in_resizing_is_seen(network, name, mistake, monkeypatch):
    monkeypatch.setattr(depth, name, mistake(getattr(depth, name)))
    expected = DEPTHS["depth 35, 28"]
    assert mx.abs(network(DEPTHS["pixels 35, 28"]) - expected).max() > 10 * BAR * expected.max()


@pytest.mark.parametrize(
    "mistake",
    [
        lambda network: setattr(network, "layernorm", lambda x: x),
        lambda network: [setattr(layer, "layer_scale2", mx.ones_like(layer.layer_scale2)) for layer in network.layers],
        lambda network: setattr(network, "fusion", network.fusion[:1] + network.fusion[:0:-1]),
        lambda network: (
            setattr(network, "reassemble", network.reassemble)
            or setattr(
                network.reassemble[0].resize, "weight", network.reassemble[0].resize.weight.transpose(0, 2, 1, 3)
            )
        ),
    ],
    ids=["no last norm", "no layer scale", "fusions in reverse", "rows and columns of the enlargement"],
)
def test_each_mistake_in_the_network_is_seen(network, mistake):
    mistake(network)
    expected = DEPTHS["depth 28, 28"]
    assert mx.abs(network(DEPTHS["pixels 28, 28"]) - expected).max() > 10 * BAR * expected.max()


def test_a_photo_is_prepared_as_by_transformers(network):
    pixels = depth.preprocess(Image.fromarray(np.array(DEPTHS["photo"])), network.config)
    assert_close(pixels, DEPTHS["processed"], 1e-6)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 1024), (518, 518)),
        ((1360, 768), (924, 518)),  # the longer side would change more
        ((100, 600), (84, 518)),
        ((1, 1), (518, 518)),
        ((20_000, 20), (518, 14)),  # transformers: no height at all
        ((20_000, 600), (2072, 56)),  # transformers: 17266 x 518, whose attention takes 50 GB
    ],
)
def test_sizes_that_the_network_reads(size, expected):
    assert depth.input_size(size, DEPTH_ANYTHING_V2_SMALL) == expected


def test_pixels_of_another_shape_are_refused(network):
    with pytest.raises(ValueError, match=r"\[DepthAnything\] pixels have shape \(1, 28, 27, 3\)"):
        network(mx.zeros((1, 28, 27, 3)))


def test_a_map_reaches_from_black_to_white(network):
    levels = depth_map(network, Image.fromarray(EDGES["shapes"]))
    assert levels.shape == EDGES["shapes"].shape[:2]
    assert (levels.min(), levels.max()) == (0, 255)


def test_the_preprocessor_is_called_as_image_gen_aux_is(network, caplog):
    caplog.set_level(logging.INFO)
    made = DepthPreprocessor.from_pretrained("LiheYoung/depth-anything-large-hf").to("cuda")(EDGES["shapes"])
    assert [(one.mode, one.size) for one in made] == [("L", (110, 90))]
    assert made[0].convert("RGB").size == (110, 90)
    assert "LiheYoung/depth-anything-large-hf: the installed depth network is used, depth" in caplog.text
    (inverted,) = DepthPreprocessor()(EDGES["shapes"], invert=True, return_type="np")
    assert np.array_equal(inverted, 255 - np.asarray(made[0]))
    with pytest.raises(UsageError, match="`return_type` is 'pt'"):
        DepthPreprocessor()(EDGES["shapes"], return_type="pt")
    with pytest.raises(UsageError, match="no `image`"):
        DepthPreprocessor()(None)


def test_a_folder_can_be_named_and_must_be_of_a_depth_network(network, model):
    folder = open_component("depth").path
    assert DepthPreprocessor.from_pretrained(folder).folder.path == folder
    with pytest.raises(ModelError, match="is no depth network"):
        DepthPreprocessor.from_pretrained(model)


def test_without_a_depth_network_the_command_is_named(home):
    with pytest.raises(ModelError, match="flux-krea convert depth-anything/Depth-Anything-V2-Small-hf"):
        DepthPreprocessor.from_pretrained("LiheYoung/depth-anything-large-hf")


# --- photos of every kind ---

SMALL = Image.fromarray(EDGES["shapes"]).resize((48, 36))


def _saved(path, image, **options):
    image.save(path, **options)
    return path


def _turned(path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return _saved(path.with_suffix(".jpg"), SMALL, exif=exif, quality=95)


KINDS = {  # makes a file or image, and the size of its map
    "alpha": (lambda path: _saved(path, SMALL.convert("RGBA").rotate(30)), (48, 36)),
    "grey and alpha": (lambda path: _saved(path, SMALL.convert("LA")), (48, 36)),
    "grey": (lambda path: SMALL.convert("L"), (48, 36)),
    "two colours": (lambda path: _saved(path, SMALL.convert("1")), (48, 36)),
    "16 bits": (
        lambda path: _saved(path, Image.fromarray(np.asarray(SMALL.convert("L")).astype(np.uint16) * 257)),
        (48, 36),
    ),
    "CMYK": (lambda path: _saved(path.with_suffix(".tif"), SMALL.convert("CMYK")), (48, 36)),
    "palette": (lambda path: _saved(path, SMALL.quantize(16)), (48, 36)),
    "wide colours": (lambda path: _saved(path, SMALL, icc_profile=profile()), (48, 36)),
    "turned": (_turned, (36, 48)),
    "floats": (lambda path: np.asarray(SMALL, np.float32) / 255, (48, 36)),
    "one pixel": (lambda path: SMALL.crop((0, 0, 1, 1)), (1, 1)),
    "a strip": (lambda path: SMALL.resize((20_000, 20)), (20_000, 20)),
    "a column": (lambda path: SMALL.resize((20, 20_000)), (20, 20_000)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_photos_of_every_kind_get_a_map_of_their_upright_size(network, kind, tmp_path):
    make, size = KINDS[kind]
    given = make(tmp_path / "photo.png")
    (made,) = DepthPreprocessor()(given)
    assert made.size == size
    photo = load_image(given)
    assert edges.edge_map(photo).size == size
    if max(size) < 1000:
        detected = CannyDetector()(given, 50, 200, detect_resolution=64, image_resolution=64, output_type="pil")
        assert detected.size == ((64, 64) if min(size) == max(size) else tuple(64 * round(s / 36) for s in size))


def test_one_colour_has_no_edges_and_no_depth():
    flat = np.full((30, 40, 3), 127, np.uint8)
    assert not edges.canny(flat, 50, 200).any()
    assert not levels_of(np.full((30, 40), 3.5, np.float32)).any()


def test_what_is_no_image_is_refused_by_both(network, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    for make in (CannyDetector(), DepthPreprocessor()):
        for given in (tmp_path / "text.png", tmp_path / "none.png", 7, np.zeros((3, 4, 5, 6))):
            with pytest.raises(UsageError):
                make(given)


@pytest.mark.slow
def test_a_huge_photo_gets_its_maps(network):
    """50 megapixels, noise: as many edges as there can be."""
    photo = Image.fromarray(np.random.default_rng(1).integers(0, 256, (1400, 1800, 3), dtype=np.uint8))
    photo = photo.resize((8660, 5773))
    assert DepthPreprocessor()(photo)[0].size == photo.size
    assert CannyDetector()(photo, 50, 200, 1024, 1024).size == (1536, 1024)
    start = time.perf_counter()
    assert np.asarray(edges.edge_map(photo.resize((4096, 2731)))).any()
    assert time.perf_counter() - start < 60


# --- conversion ---


def test_it_goes_to_its_place_in_float32(home):
    report = convert([MAPS / "depth"], quantize=None)
    assert (report.path, report.dtype, report.quantize) == (home / "components" / "depth", "float32", "none")
    dropped = dict(report.components[0].dropped)
    assert "backbone.embeddings.mask_token" in dropped
    assert "neck.fusion_stage.layers.0.residual_layer1.convolution1.weight" in dropped
    assert open_component("depth").index.license == "unknown"  # it has other sizes than the published one
    assert check_manifest(report.path, lambda *_: None)[1] == {"differs": [], "missing": [], "not listed": []}
    again = convert([report.path], home / "again")
    assert open_folder(again.path).index.source[0] == open_folder(report.path).index.source[0]


@pytest.mark.parametrize("options", [{"quantize": "8"}, {"dtype": "bfloat16"}])
def test_it_is_in_no_other_precision(options, tmp_path):
    with pytest.raises(UsageError, match="the depth network in"):
        convert([MAPS / "depth"], tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("depth_estimation_type", "metric", "depth_estimation_type is 'metric'"),
        ("reassemble_factors", [4, 2, 0.3, 0.5], "reassemble_factors"),
        ("neck_hidden_sizes", [6, 8], "not of the same length"),
        ("backbone_config", None, "lacks backbone_config"),
        ("backbone_config", {"out_indices": [1, 2, 3, 9]}, "out_indices"),
        ("backbone_config", {"use_swiglu_ffn": True}, "use_swiglu_ffn is True"),
        ("backbone_config", {"hidden_size": 32}, "hidden_size is 32"),
    ],
)
def test_other_networks_are_refused(field, value, words, tmp_path):
    folder = copied(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    value = config[field] | value if isinstance(value, dict) else value
    edit_json(folder / "config.json", **{field: value})
    with pytest.raises(ModelError, match=words):
        convert([folder], tmp_path / "out")


def test_another_preprocessing_is_refused(tmp_path):
    folder = copied(tmp_path)
    edit_json(folder / "preprocessor_config.json", keep_aspect_ratio=False)
    with pytest.raises(ModelError, match="keep_aspect_ratio is False"):
        convert([folder], tmp_path / "out")


def copied(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for path in (MAPS / "depth").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.slow
def test_it_is_fetched_from_the_hub(home, tmp_path):
    repo = "depth-anything/Depth-Anything-V2-Small-hf"
    folder = copied(tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"not needed")
    with Hub(folder, repo) as hub:
        done = run_command("convert", repo, cwd=tmp_path, **hub.env(tmp_path, FLUX_KREA_HOME=str(home)))
        assert done.returncode == 0, done.stderr
        assert set(hub.fetched()) == {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert open_component("depth").index.name == "Depth-Anything-V2-Small-hf"


def test_verbs_know_it(network, home):
    runner = CliRunner()
    assert "depth" in runner.invoke(cli.cli, ["models"]).output
    assert "not required: its licence is unknown" in runner.invoke(cli.cli, ["inspect", "depth"]).output
    assert runner.invoke(cli.cli, ["verify", "depth"]).exit_code == 0
    assert runner.invoke(cli.cli, ["models", "rm", "depth", "--yes"]).exit_code == 0
    assert not (home / "components" / "depth").exists()
