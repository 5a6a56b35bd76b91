"""Maps from photos live beside OpenCV and transformers, on fresh pictures and random weights (extra `parity`)."""

import mlx.core as mx
import numpy as np
import pytest
from helpers import assert_close
from mlx_flux_krea.convert import convert
from PIL import Image

from mlx_flux_krea.inputs.canny import canny
from mlx_flux_krea.inputs.resample import resize
from mlx_flux_krea.models import depth
from mlx_flux_krea.models.depth_config import DEPTH_ANYTHING_V2_SMALL
from mlx_flux_krea.weights import open_folder

pytestmark = pytest.mark.parity

BAR = 3e-5
PHOTOS = ((97, 64), (64, 97), (500, 131), (1360, 768), (518, 518), (30, 1000))


def picture(seed: int, size: tuple[int, int], cells: int = 9) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (cells, cells + 3, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("cells", [5, 40, 200])
@pytest.mark.parametrize("thresholds", [(50, 200), (100, 200), (20.5, 60), (200, 50), (0, 0)])
def test_edges(cells, thresholds):
    cv2 = pytest.importorskip("cv2")
    for seed, size in enumerate(((320, 240), (211, 333), (1, 64), (2, 2), (1024, 64))):
        pixels = np.array(picture(seed, size, cells))
        for one in (pixels, pixels[..., 0].copy()):
            assert np.array_equal(canny(one, *thresholds), cv2.Canny(one, *thresholds)), (size, one.ndim)


@pytest.mark.parametrize("method", ["area", "lanczos", "linear"])
def test_resizing(method):
    cv2 = pytest.importorskip("cv2")
    kind = {"area": cv2.INTER_AREA, "lanczos": cv2.INTER_LANCZOS4, "linear": cv2.INTER_LINEAR}[method]
    for size in ((64, 64), (320, 256), (448, 128), (100, 500), (1, 1)):
        pixels = np.array(picture(1, (300, 200), 90))
        theirs = cv2.resize(pixels, size, interpolation=kind)
        assert np.abs(resize(pixels, size, method).astype(int) - theirs).max() <= 1, size


def random_network(folder, **sizes):
    """A depth network of transformers with random weights of a size that keeps the numbers alive, saved to a folder."""
    import torch
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "out_indices")
    backbone = {name: sizes.pop(name) for name in names}
    config = DepthAnythingConfig(
        backbone_config=Dinov2Config(**backbone, reshape_hidden_states=False),
        reassemble_hidden_size=backbone["hidden_size"],
        patch_size=backbone["patch_size"],
        **sizes,
    )
    draw = torch.Generator().manual_seed(backbone["hidden_size"])
    theirs = DepthAnythingForDepthEstimation(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            mean = 1.0 if name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "lambda1")) else 0.0
            parameter.copy_(mean + spread * torch.randn(parameter.shape, generator=draw))
        theirs.head.conv3.bias.fill_(1.0)
    theirs.save_pretrained(folder)
    return theirs


SMALL = {
    "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518, "patch_size": 14,
    "out_indices": [3, 6, 9, 12], "neck_hidden_sizes": [48, 96, 192, 384], "fusion_hidden_size": 64,
    "head_hidden_size": 32,
}  # fmt: skip
TINY = {
    "hidden_size": 24, "num_hidden_layers": 5, "num_attention_heads": 3, "image_size": 28, "patch_size": 7,
    "out_indices": [1, 2, 4, 5], "neck_hidden_sizes": [8, 12, 16, 20], "fusion_hidden_size": 12,
    "head_hidden_size": 6,
}  # fmt: skip
TWO_LEVELS = TINY | {
    "num_hidden_layers": 3, "out_indices": [2, 3], "neck_hidden_sizes": [6, 10], "reassemble_factors": [3, 0.25],
}  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "grids"),
    [
        (TINY, [(4, 4), (5, 4), (1, 10), (7, 9), (40, 3)]),
        (TWO_LEVELS, [(4, 4), (3, 8), (9, 5)]),
        (SMALL, [(6, 9), (37, 5)]),  # all of it at 518 x 518 takes minutes on the CPU: 6e-6 of the largest depth
    ],
    ids=["tiny", "two levels", "published sizes"],
)
def test_depth(sizes, grids, tmp_path):
    import torch

    theirs = random_network(tmp_path / "source", **sizes)
    folder = open_folder(convert([tmp_path / "source"], tmp_path / "ours", quantize=None).path)
    if sizes is SMALL:
        assert (folder.index.base, folder.index.license) == ("Depth Anything V2 Small", "apache-2.0")
        assert folder.networks["depth"].sizes == DEPTH_ANYTHING_V2_SMALL
    ours = folder.networks["depth"].load(mx.float32)
    for number, (h, w) in enumerate(grids):
        shape = (1, h * sizes["patch_size"], w * sizes["patch_size"], 3)
        pixels = np.random.default_rng(number).standard_normal(shape).astype(np.float32)
        with torch.no_grad():
            expected = theirs(torch.tensor(pixels).permute(0, 3, 1, 2)).predicted_depth.numpy()
        assert expected.std() > 0.01
        assert_close(ours(mx.array(pixels)), mx.array(expected), BAR * expected.max())


def test_photos_are_prepared():
    from transformers import DPTImageProcessorPil

    processor = DPTImageProcessorPil(
        size={"height": 518, "width": 518}, ensure_multiple_of=14, keep_aspect_ratio=True, resample=3,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    for seed, size in enumerate(PHOTOS):
        photo = picture(seed, size)
        expected = processor(photo, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
        assert_close(depth.preprocess(photo, DEPTH_ANYTHING_V2_SMALL), mx.array(expected), 1e-6)
