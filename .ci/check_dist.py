"""Checks a folder with one wheel and one sdist: `python .ci/check_dist.py DIST`."""

import re
import sys
import tarfile
import zipfile
from pathlib import Path

PACKAGE = "mlx_flux_krea"
SDIST = (
    "cli.py", "setup.py", "tests/conftest.py", "tests/data/reference/goldens.safetensors", "docs/make.py",
    "benchmarks/macs.py", "examples/side_by_side.py", ".ci/run", "CONTRIBUTING.md",
)  # fmt: skip


def check_wheel(path: Path) -> None:
    """The wheel has one top-level name, the types' marker, the small model, and links that work at PyPI."""
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if ".dist-info/" not in name]
        (metadata,) = (wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    top = {name.split("/")[0] for name in names}
    assert top == {PACKAGE}, f"top-level names of {path.name}: {sorted(top)}"
    for name in ("py.typed", "convert/maps.py", "commands/shared/terminal.py", "nano/model/model_index.json"):
        assert f"{PACKAGE}/{name}" in names, f"{path.name} lacks {name}"
    training = {str(p.relative_to(PACKAGE)) for p in Path(PACKAGE).glob("nano/train*.py")}  # need a checkout and torch
    assert not {f"{PACKAGE}/{name}" for name in training} & {*names}, f"{path.name} has {training}"
    modules = {str(p.relative_to(PACKAGE)) for p in Path(PACKAGE).rglob("*.py")} - training
    modules |= {str(p) for p in Path("convert").rglob("*.py")}
    missing = sorted(modules - {name.removeprefix(f"{PACKAGE}/") for name in names})
    assert not missing, f"{path.name} lacks {missing}; list every package in pyproject.toml"
    relative = re.findall(r"\]\((?!https?:|#)[^)]*\)|src=\"(?!https?:)[^\"]*\"", metadata)
    assert not relative, f"links that lead nowhere at PyPI: {relative}"


def check_sdist(path: Path) -> None:
    """The sdist has what the tests read."""
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    for name in SDIST:
        assert name in names, f"{path.name} lacks {name}"
    assert "typings" not in names, f"{path.name} has typings, a link into convert/ that only a checkout needs"


if __name__ == "__main__":
    dist = Path(sys.argv[1])
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    check_wheel(wheel)
    check_sdist(sdist)
    print(f"{wheel.name} and {sdist.name} are complete")
