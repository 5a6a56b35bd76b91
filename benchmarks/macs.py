"""Time, disk and memory of FLUX.1 Krea [dev] with its filters on Macs: the README's tables, computed, not measured.

    python benchmarks/macs.py

Memory is that of `plan` for Metal, in four fifths of the part that macOS offers a GPU: two thirds of the memory up to
36 GB, three quarters above. Times are the products of all steps, and of the filters' questions, at half of the chip's
peak, as in `setup`.
"""

from mlx_flux_krea.commands.shared import estimates
from mlx_flux_krea.commands.shared.text import duration, size
from mlx_flux_krea.memory import GB
from mlx_flux_krea.models import config
from mlx_flux_krea.presets import PROPOSED_PRECISIONS

MACS = (
    ("M1", 8), ("M1", 16), ("M2 Pro", 16), ("M4", 16), ("M4 Pro", 24), ("M3 Max", 36), ("M4 Max", 64), ("M5 Max", 128),
)  # fmt: skip
SHAPE = {"width": 1024, "height": 1024, "length": 512}  # pixels, and tokens of T5
STEPS = 28
HOW = {"none": "16 bits", "8": "8 bits"}


def made() -> dict[str, int]:
    """Bytes of the model folder in each precision."""
    return {
        quantize: estimates.weigh_recipe(config.FLUX_DEV_MODEL, quantize, "bfloat16").disk
        for quantize in PROPOSED_PRECISIONS
    }


def table(rows: list[tuple]) -> str:
    """In Markdown."""
    head, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "| " + " | ".join(["---"] * len(rows[0])) + " |", *rest])


def page() -> str:
    """Both tables."""
    folders = made()
    filters = estimates.filter_bytes()
    fetched = {"model": folders["none"]} | {name: count for name, (count, _) in filters.items()}
    kept = {"model": f"{size(folders['8'])} (8 bits), {size(folders['none'])} (16)"}
    kept |= {"nsfw": size(filters["nsfw"][1]), "pixtral": f"{size(filters['pixtral'][1])} (4 bits)"}
    names = {
        "model": "FLUX.1 Krea [dev]",
        "nsfw": "classifier of pictures",
        "pixtral": "Pixtral 12B, the ready 4-bit copy",
    }
    rows = [("", "to fetch", "on disk", "takes about")]
    for part, count in fetched.items():
        took = duration(estimates.conversion_seconds(count, count))
        rows.append((names[part], size(count), kept[part], took))
    macs = [("Mac", "proposed", "memory", "a picture", "its filters", "at the start")]
    for chip, memory in MACS:
        budget = int(memory * GB * (2 / 3 if memory <= 36 else 3 / 4) * 4 / 5)
        found = estimates.precisions(config.FLUX_DEV_MODEL, folders, **SHAPE, budget=budget, device="gpu")
        quantize = estimates.propose(found, 2**60)
        one = found[quantize]
        how = "all in memory" if one.whole else "read block by block"
        draws = estimates.picture_seconds(config.FLUX_DEV, **SHAPE, steps=STEPS, chip=chip)
        checks = estimates.filter_seconds(chip)
        times = (duration(seconds) for seconds in (draws, *checks))
        macs.append((f"{chip}, {memory} GB", f"{HOW[quantize]}, {how}", size(one.peak), *times))
    return f"{table(rows)}\n\n{table(macs)}"


if __name__ == "__main__":
    print(page())
