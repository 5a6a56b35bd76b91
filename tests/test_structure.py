"""The rooms and their arrows (DESIGN, section 2): imports point down only, and only the last row prints."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

ROWS = {
    "errors": 0, "config": 0, "presets": 0,
    "transformer": 1, "t5": 1, "clip": 1, "vae": 1, "tokenizers": 1, "noise": 1, "sampler": 1, "engine": 1,
    "weights": 2, "provenance": 2, "request": 2,
    "prompts": 3,
    "pipeline": 4,
    "convert": 5,
    "commands": 6, "cli": 6,
}  # fmt: skip
FILES = sorted([ROOT / "cli.py", *(ROOT / "convert").glob("*.py"), *(ROOT / "mlx_flux_krea").rglob("*.py")])


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] in ("cli", "convert") else parts[1]


def imported_rooms(path: Path) -> set[str]:
    """Rooms of ours that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inside = room(path) in ("convert", "commands")
            base = (
                f"mlx_flux_krea.{room(path)}" if node.level == 1 and inside else "mlx_flux_krea" if node.level else ""
            )
            module = ".".join(filter(None, [base, node.module]))
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            if parts[0] == "mlx_flux_krea" and len(parts) > 1:
                found.add(parts[1])
            if parts[0] in ("cli", "convert"):
                found.add(parts[0])
    return found & ROWS.keys() - {room(path)}


def test_every_room_has_a_row():
    assert {room(path) for path in FILES} - {"__init__"} == ROWS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    mine = room(path)
    if mine == "__init__":
        return
    rooms = imported_rooms(path)
    above = {r for r in rooms if ROWS[r] > ROWS[mine] or (ROWS[r] == ROWS[mine] and ROWS[mine] in (1, 4))}
    assert not above, f"{mine} (row {ROWS[mine]}) imports {above}"
    if mine == "convert":
        assert max(map(ROWS.get, rooms), default=0) <= 2


def test_the_test_of_arrows_can_fail(tmp_path):
    """The walk sees absolute, relative and nested imports."""
    file = ROOT / "mlx_flux_krea" / "vae.py"
    assert imported_rooms(file) == {"config"}
    assert {"pipeline", "commands"} <= imported_rooms(ROOT / "cli.py") | {"pipeline"}
    assert "weights" in imported_rooms(ROOT / "convert" / "layouts.py")
    assert "provenance" in imported_rooms(ROOT / "mlx_flux_krea" / "commands" / "inspect.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_commands_print(path):
    if ROWS.get(room(path)) == 6:
        return
    called = {
        node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute)
    }
    assert called.isdisjoint({"print", "echo"})
    assert "exit" not in called


def test_every_package_is_listed_for_the_wheel():
    text = (ROOT / "pyproject.toml").read_text()
    for init in (ROOT / "mlx_flux_krea").rglob("__init__.py"):
        name = ".".join(init.parent.relative_to(ROOT).parts)
        assert f'"{name}"' in text
    assert '"mlx_flux_krea.convert" = "convert"' in text


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import mlx_flux_krea", {"mlx", "numpy", "PIL", "click"}),
        ("import cli", {"mlx", "numpy", "PIL", "tokenizers", "huggingface_hub"}),
        ("from mlx_flux_krea import FluxPipeline", {"torch", "transformers", "diffusers", "click", "huggingface_hub"}),
        ("import mlx_flux_krea.convert", {"torch", "transformers", "diffusers", "click", "huggingface_hub"}),
    ],
)
def test_imports_bring_nothing_heavy(statement, unwanted):
    script = f"import sys; {statement}; print(*{{m.split('.')[0] for m in sys.modules}})"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert unwanted.isdisjoint(ran.stdout.split())
