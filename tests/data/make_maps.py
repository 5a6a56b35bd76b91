"""Makes `maps/`: pictures with OpenCV's edges, and a tiny depth network with transformers' results.

pip install opencv-python-headless torch transformers && python tests/data/make_maps.py
"""

from pathlib import Path

import cv2
import mlx.core as mx
import numpy as np
import torch
from PIL import Image
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessorPil

HERE = Path(__file__).parent / "maps"
THRESHOLDS = ((50, 200), (100, 200), (0, 0), (10.7, 30.2), (300, 1500))
DEPTH_SIZES = ((28, 28), (35, 28), (7, 49))  # height and width


def pictures() -> dict[str, np.ndarray]:
    """Returns noise, smooth shapes, grey, two levels, and pictures of one row, one column and one pixel."""
    draw = np.random.default_rng(22)
    noise = draw.integers(0, 256, (67, 83, 3), dtype=np.uint8)
    coarse = Image.fromarray(draw.integers(0, 256, (9, 11, 3), dtype=np.uint8))
    shapes = coarse.resize((110, 90), Image.Resampling.BICUBIC)
    return {
        "noise": noise,
        "shapes": np.asarray(shapes),
        "grey": np.asarray(shapes.convert("L")),
        "two levels": (draw.integers(0, 2, (50, 60, 3)) * 255).astype(np.uint8),
        "row": noise[:1],
        "column": noise[:, :1],
        "pixel": noise[:1, :1],
    }


def make_edges() -> None:
    """Writes pictures, their edges as packed bits, and resized pictures."""
    arrays = {}
    for name, pixels in pictures().items():
        arrays[name] = mx.array(pixels)
        for low, high in THRESHOLDS:
            edges = cv2.Canny(np.ascontiguousarray(pixels), low, high)
            arrays[f"{name}: {low}, {high}"] = mx.array(np.packbits(edges > 0))
    shapes = np.ascontiguousarray(pictures()["shapes"][:50, :60])
    for method, kind in (("area", cv2.INTER_AREA), ("lanczos", cv2.INTER_LANCZOS4), ("linear", cv2.INTER_LINEAR)):
        for width, height in ((32, 32), (40, 64), (96, 64)):
            arrays[f"{method}: {width}, {height}"] = mx.array(cv2.resize(shapes, (width, height), interpolation=kind))
    mx.save_safetensors(str(HERE / "edges.safetensors"), arrays, {"opencv": cv2.__version__})


def make_depth() -> None:
    """Writes a network with random weights in float16, pictures' pixels, and the depths."""
    backbone = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=7,
        out_indices=[1, 2, 3, 4], reshape_hidden_states=False,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=16, patch_size=7, neck_hidden_sizes=[6, 8, 10, 12],
        fusion_hidden_size=8, head_hidden_size=4,
    )  # fmt: skip
    torch.manual_seed(22)
    model = DepthAnythingForDepthEstimation(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.2 * torch.randn_like(parameter)).half().float())
        model.head.conv3.bias.fill_(1)
        arrays = {}
        for height, width in DEPTH_SIZES:
            pixels = torch.randn(1, height, width, 3)
            depth = model(pixels.permute(0, 3, 1, 2)).predicted_depth
            arrays |= {f"pixels {height}, {width}": pixels, f"depth {height}, {width}": depth}
    processor = DPTImageProcessorPil(
        size={"height": 28, "width": 28}, ensure_multiple_of=7, keep_aspect_ratio=True, resample=3,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    photo = Image.fromarray(pictures()["shapes"]).resize((61, 45))
    arrays["photo"] = torch.tensor(np.asarray(photo))
    arrays["processed"] = processor(photo, return_tensors="pt")["pixel_values"].permute(0, 2, 3, 1).contiguous()
    model.half().save_pretrained(HERE / "depth")
    processor.save_pretrained(HERE / "depth")
    mx.save_safetensors(str(HERE / "depth.safetensors"), {k: mx.array(v.numpy()) for k, v in arrays.items()})


if __name__ == "__main__":
    make_edges()
    make_depth()
