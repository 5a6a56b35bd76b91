"""The rooms and their arrows (DESIGN, section 2): imports point down only, and only the last row prints."""

import ast
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest
from helpers import ROOT

import mlx_flux_krea

PACKAGE = "mlx_flux_krea"
ROWS = {
    "errors": 0, "presets": 0, "licence": 0, "files": 0, "home": 1, "models.config": 0, "models.filter_config": 0,
    "filters.instructions": 0,
    "models": 0, "sampling": 0, "models.transformer": 1, "models.t5": 1, "models.clip": 1, "models.vae": 1,
    "models.tiles": 1, "models.layers": 1, "models.vit": 1, "models.pixtral": 1, "tokenizers": 1, "sampling.noise": 1,
    "sampling.sampler": 1, "sampling.preview": 1, "worker": 1,
    "weights": 2, "residency": 2, "memory": 2, "provenance": 2, "request": 2, "checkpoint": 2,
    "prompts": 3, "filters": 3, "generator": 3,
    "pipeline": 4,
    "convert": 5,
    "commands": 6, "cli": 6, "nano": 6,
}  # fmt: skip
FILES = sorted([ROOT / "cli.py", *(ROOT / "convert").glob("*.py"), *(ROOT / PACKAGE).rglob("*.py")])


def module_name(path: Path) -> str:
    """Its name where it is installed; a package's ends with __init__."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return f"{PACKAGE}.{name}" if name.startswith("convert.") else name


def room(name: str) -> str | None:
    """The room of a module, or of something in it; None: the package itself. A sub-package's module may have a row."""
    if name.split(".")[0] in ("cli", "convert"):
        return name.split(".")[0]
    parts = name.split(".")[1:]
    return next((r for n in (2, 1) if (r := ".".join(parts[:n])) in ROWS), parts[0]) if parts else None


def imported_rooms(source: str, module: str) -> set[str]:
    """Rooms of ours that a module imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
            # `import mlx_flux_krea` and `import mlx_flux_krea.x` bind the package, and with it what is lazily in it
            bound = {a.name for a in node.names if not (a.asname and "." in a.name)}
            names |= {f"{PACKAGE}.pipeline" for name in bound if name.split(".")[0] == PACKAGE}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):  # import_module, __import__
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    lazy = {f"{PACKAGE}.{name}" for name in ("*", *mlx_flux_krea.__all__)} - {f"{PACKAGE}.__version__"}
    names = {f"{PACKAGE}.pipeline" if name in lazy else name for name in names}
    ours = {room(name) for name in names if name.split(".")[0] in (PACKAGE, "cli", "convert")}
    return ours - {None, "__version__", room(module)}


def unwanted(source: str, module: str) -> set[str]:
    """What a module imports against the arrows."""
    mine, rooms = room(module), imported_rooms(source, module)
    if mine == "convert":
        return {r for r in rooms if ROWS[r] > 2}
    return {r for r in rooms if ROWS[r] > ROWS[mine] or ROWS[r] == ROWS[mine] == 1}


def test_every_room_has_a_row():
    assert {room(module_name(path)) for path in FILES} - {"__init__"} <= ROWS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    module = module_name(path)
    if module != f"{PACKAGE}.__init__":
        assert unwanted(path.read_text(), module) == set()


@pytest.mark.parametrize(
    ("source", "module", "rooms"),
    [
        ("from mlx_flux_krea import FluxPipeline", "convert.remap", {"pipeline"}),
        ("def f():\n    from mlx_flux_krea import Request as R", "convert.remap", {"pipeline"}),
        ("import mlx_flux_krea", "convert.remap", {"pipeline"}),
        ("import mlx_flux_krea as ours", "convert.remap", {"pipeline"}),
        ("import mlx_flux_krea.models.config", "convert.remap", {"pipeline"}),
        ("from mlx_flux_krea import *", "convert.__init__", {"pipeline"}),
        ("from mlx_flux_krea.prompts import PromptEncoder", "convert.write", {"prompts"}),
        ("from importlib import import_module\nimport_module('mlx_flux_krea.pipeline')", "convert.write", {"pipeline"}),
        ("__import__('cli')", "convert.write", {"cli"}),
        ("from .. import FluxPipeline", "mlx_flux_krea.models.vae", {"pipeline"}),
        ("from ..sampling import noise", "mlx_flux_krea.models.vae", {"sampling.noise"}),
        ("from .commands.shared.terminal import say", "mlx_flux_krea.weights", {"commands"}),
        ("import convert", "mlx_flux_krea.weights", {"convert"}),
        ("from mlx_flux_krea.convert import convert", "mlx_flux_krea.pipeline", {"convert"}),
        ("from mlx_flux_krea.nano import FOLDER", "mlx_flux_krea.pipeline", {"nano"}),
        # in a sub-package one dot is the sub-package, two are the library
        ("from .. import pipeline", "mlx_flux_krea.filters.gate", {"pipeline"}),
        ("from ..pipeline import Request", "mlx_flux_krea.filters.gate", {"pipeline"}),
        ("from .. import FluxPipeline", "mlx_flux_krea.filters.__init__", {"pipeline"}),
        ("from .vit import ViT", "mlx_flux_krea.models.pixtral", {"models.vit"}),
    ],
)
def test_an_arrow_that_points_up_is_seen(source, module, rooms, monkeypatch):
    """Each of these lines in that module is what the test above must refuse, rooms of later days included."""
    for name, row in (("filters.gate", 3), ("filters", 3)):
        monkeypatch.setitem(ROWS, name, row)
    module = f"{PACKAGE}.{module}" if module.startswith("convert") else module
    assert unwanted(source, module) == rooms


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from . import maps\nfrom .layouts import Found", "convert.remap"),
        ("from mlx_flux_krea import __version__, presets", "convert.remap"),
        ("import mlx_flux_krea.models.config as configs", "convert.remap"),
        ("from .config import VAEConfig", "mlx_flux_krea.models.vae"),
        ("from . import pipeline\nfrom .shared.terminal import say", "mlx_flux_krea.commands.generate"),
        ("from mlx_flux_krea import FluxPipeline", "cli"),
    ],
)
def test_arrows_that_point_down_are_allowed(source, module):
    assert unwanted(source, f"{PACKAGE}.{module}" if module.startswith("convert") else module) == set()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_torch_and_transformers_are_for_training_alone(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    assert module_name(path) == f"{PACKAGE}.nano.train" or names.isdisjoint({"torch", "diffusers", "transformers"})


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_commands_print(path):
    if ROWS.get(room(module_name(path))) == 6:
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
        assert f'"{name}"' in text or f'"{name}.' in text  # a package is listed by its modules where one stays out
    assert '"mlx_flux_krea.convert" = "convert"' in text


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import mlx_flux_krea", {"mlx", "numpy", "PIL", "click"}),
        ("import mlx_flux_krea.cli", {"mlx", "numpy", "PIL", "tokenizers", "huggingface_hub"}),
        ("from mlx_flux_krea import FluxPipeline", {"torch", "transformers", "diffusers", "click", "huggingface_hub"}),
        ("import mlx_flux_krea.convert", {"torch", "transformers", "diffusers", "click", "huggingface_hub"}),
    ],
)
def test_imports_bring_nothing_heavy(statement, unwanted):
    script = f"import sys; {statement}; print(*{{m.split('.')[0] for m in sys.modules}})"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert unwanted.isdisjoint(ran.stdout.split())
