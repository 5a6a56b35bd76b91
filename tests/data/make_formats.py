"""Writes formats/kitchen.safetensors: one matrix as comfy_kitchen stores it in each format, with its unpacked values.

    pip install -e ".[parity]" && python tests/data/make_formats.py

Layers are named by their format. `L.unpacked` holds the float32 values that comfy_kitchen's Python reference returns.
"""

import json
from pathlib import Path

import torch
from comfy_kitchen.backends.eager import quantization as kitchen
from safetensors.torch import save_file

torch.manual_seed(0)
MATRIX = torch.randn(132, 64) * torch.rand(132, 1)  # whose rows fill one tile of scales, and a part of another
WIDE = torch.randn(8, 256)
KINDS = {
    "float8_e4m3fn": (torch.float8_e4m3fn, 448.0),
    "float8_e5m2": (torch.float8_e5m2, 57344.0),
}


def main() -> None:
    tensors, said = {}, {}

    def add(layer: str, parts: dict, values: torch.Tensor, **fields) -> None:
        tensors.update({f"{layer}.{name}": part.contiguous() for name, part in parts.items()})
        tensors[f"{layer}.unpacked"] = values.float().contiguous()
        said[layer] = fields

    for name, (dtype, most) in KINDS.items():
        for kind, amax in (("scalar", MATRIX.abs().max()), ("rows", MATRIX.abs().amax(1, keepdim=True))):
            scale = amax.float() / most
            codes = (MATRIX / scale).to(dtype)
            parts = {"weight": codes, "weight_scale": scale}
            add(f"{name}_{kind}", parts, codes.float() * scale, format=name)
    whole = MATRIX.abs().max() / (448 * 6)
    codes, scales = kitchen.quantize_nvfp4(MATRIX, whole)
    values = kitchen.dequantize_nvfp4(codes, whole, scales, torch.float32)
    add("nvfp4", {"weight": codes, "weight_scale": scales, "weight_scale_2": whole}, values, format="nvfp4")
    codes, scales = kitchen.quantize_mxfp8(MATRIX)
    values = kitchen.dequantize_mxfp8(codes, scales, torch.float32)
    add("mxfp8", {"weight": codes, "weight_scale": scales.view(torch.uint8)}, values, format="mxfp8")
    codes, scale = kitchen.quantize_int8_tensorwise(MATRIX)
    add("int8", {"weight": codes, "weight_scale": scale}, codes.float() * scale, format="int8_tensorwise")
    codes, scale = kitchen.quantize_int8_rowwise(MATRIX)
    add("int8_rows", {"weight": codes, "weight_scale": scale}, codes.float() * scale, format="int8_tensorwise")
    for size in (16, 64, 256):
        codes, scale = kitchen.quantize_int8_convrot_weight(WIDE if size == 256 else MATRIX, size)
        values = kitchen.dequantize_int8_convrot_weight(codes, scale, size)
        fields = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": size}
        add(f"int8_rotated_{size}", {"weight": codes, "weight_scale": scale}, values, **fields)
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": said})}
    target = Path(__file__).parent / "formats"
    target.mkdir(exist_ok=True)
    save_file(tensors, target / "kitchen.safetensors", metadata)


if __name__ == "__main__":
    main()
