"""Writes formats/keys.json.gz: names, types and shapes of whole files of FLUX.1 in 4 and 8 bits, by rules.

    python tests/data/make_keys.py

None of these files is at hand; the published 16-bit files are, in layouts.json.gz. nunchaku's name their layers as
`nunchaku.layers` does. ComfyUI's have Black Forest Labs' names, and beside each matrix of a block its scales in tiles.
"""

import gzip
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import foreign
import nunchaku

from mlx_flux_krea.models.config import FLUX_DEV

HERE = Path(__file__).parent
Keys = dict[str, tuple[str, tuple[int, ...]]]
# of ComfyUI's formats: type and numbers of a byte of weights, numbers of a scale, its type, and more parts
COMFY = {
    "nvfp4": ("U8", 2, 16, "F8_E4M3", {"weight_scale_2": ("F32", ())}),
    "mxfp8": ("F8_E4M3", 1, 32, "F8_E8M0", {}),
}


def svdq(kind: str) -> Keys:
    """The keys of svdq-KIND_r32-flux.1-krea-dev.safetensors."""
    stored = foreign.published("diffusers-transformer-dev")
    replaced = (".attn.to_", ".attn.add_", ".ff.", ".ff_context.", ".proj_mlp.", ".proj_out.", "norm1", ".norm.linear.")
    kept = {n: t for n, t in stored.items() if not any(part in n for part in replaced) or "_blocks." not in n}
    kept = {n.replace(".attn.norm_", ".norm_"): t for n, t in kept.items()}
    for layer, rows, width, how in nunchaku.layers(FLUX_DEV):
        parts = nunchaku.shapes("awq" if how == "awq" else kind, rows, width, gains=nunchaku.gains_of(layer))
        kept |= {f"{layer}.{name}": part for name, part in parts.items()}
    return kept


def comfy(kind: str) -> Keys:
    """The keys of flux1-krea-dev-KIND.safetensors."""
    codes, per_byte, numbers, scales, more = COMFY[kind]
    kept = {}
    for name, (dtype, shape) in foreign.published("bfl-transformer-dev").items():
        if "_blocks." not in name or len(shape) != 2:
            kept[name] = dtype, shape
            continue
        rows, width = shape
        layer, tiles = name.removesuffix(".weight"), (-(-rows // 128) * 128, -(-(width // numbers) // 4) * 4)
        kept |= {name: (codes, (rows, width // per_byte)), f"{layer}.weight_scale": (scales, tiles)}
        kept |= {f"{layer}.{part}": stored for part, stored in more.items()}
        kept[f"{layer}.comfy_quant"] = "U8", (len(json.dumps({"format": kind})),)
    return kept


def main() -> None:
    """Writes the file."""
    keys = {f"svdq-{kind}_r32": svdq(kind) for kind in ("int4", "fp4")} | {kind: comfy(kind) for kind in COMFY}
    with gzip.GzipFile(HERE / "formats" / "keys.json.gz", "wb", mtime=0) as file:
        file.write(json.dumps(keys).encode())


if __name__ == "__main__":
    main()
