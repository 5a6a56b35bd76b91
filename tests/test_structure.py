"""The rooms and their levels: imports point down, networks import no networks, and only the top level prints."""

import ast
import os
import shutil
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest
from helpers import ROOT

import mlx_flux_krea

PACKAGE = "mlx_flux_krea"
LEVELS = {
    7: "cli commands server nano chip",
    6: "convert",
    5: "pipeline prior calibration",
    4: "generator filters latents second planning",
    3: "modulation request memory disks residency adapters checkpoint inputs prompts",
    2: "weights provenance credentials home files first_bytes fast beside samples",
    1: "models sampling tokenizers worker progress macos",
    0: "errors presets licence compat",
}
LEVEL = {room: level for level, rooms in LEVELS.items() for room in rooms.split()}
NETWORKS = {f"models.{name}" for name in ["transformer", "t5", "clip", "vae", "siglip", "vit", "pixtral", "depth"]}
NO_NETWORKS = {f"models.{name}" for name in ["config", "depth_config", "filter_config", "layers", "tiles", "vision"]}
FILES = sorted([ROOT / "cli.py", *(ROOT / "convert").glob("*.py"), *(ROOT / PACKAGE).rglob("*.py")])


def module_name(path: Path) -> str:
    """Returns its name where it is installed; a package's ends with __init__."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return f"{PACKAGE}.{name}" if name.startswith("convert.") else name


def place(name: str) -> str:
    """Returns a module's name inside our package; "" for the package itself and for modules of others."""
    first, _, rest = name.partition(".")
    return name if first in ("cli", "convert") else rest if first == PACKAGE else ""


def room(name: str) -> str:
    """Returns the room of a module of ours, or of something in it."""
    return place(name).partition(".")[0]


def imported(source: str, module: str) -> set[str]:
    """Returns all names that a module imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
            # `import mlx_flux_krea` and `import mlx_flux_krea.x` bind the package, and with it its lazy names
            bound = {a.name for a in node.names if not (a.asname and "." in a.name)}
            names |= {f"{PACKAGE}.pipeline" for name in bound if name.split(".")[0] == PACKAGE}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):  # import_module, __import__
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    lazy = {f"{PACKAGE}.{name}" for name in ("*", *mlx_flux_krea.__all__)} - {f"{PACKAGE}.__version__"}
    return {f"{PACKAGE}.pipeline" if name in lazy else name for name in names}


def unwanted(source: str, module: str) -> set[str]:
    """Returns the rooms, and for networks the networks, that a module imports and must not."""
    mine = room(module)
    places = {place(name) for name in imported(source, module)}
    rooms = {name.partition(".")[0] for name in places if name}
    wrong = {name for name in rooms if LEVEL.get(name, 0) > LEVEL[mine]}
    if mine == "convert":
        wrong |= rooms & {"pipeline", "cli"}
    if place(module) in NETWORKS:
        wrong |= {".".join(name.split(".")[:2]) for name in places} & NETWORKS - {place(module)}
    return wrong


def test_every_file_has_a_level():
    rooms = {room(module_name(path)) for path in FILES}
    assert rooms - {"__init__"} <= LEVEL.keys()
    models = {place(module_name(path)) for path in (ROOT / PACKAGE / "models").glob("*.py")}
    assert models - {"models.__init__"} <= NETWORKS | NO_NETWORKS


@pytest.mark.parametrize("path", [p for p in FILES if p != ROOT / PACKAGE / "__init__.py"], ids=module_name)
def test_imports_point_down(path):
    """The package's own __init__ has no level: it is the list of public names."""
    assert unwanted(path.read_text(), module_name(path)) == set()


def test_importing_the_package_imports_no_room():
    tree = ast.parse((ROOT / PACKAGE / "__init__.py").read_text())
    top = [node for node in tree.body if isinstance(node, ast.ImportFrom | ast.Import)]
    assert [node.module for node in top if isinstance(node, ast.ImportFrom)] == ["typing"]
    assert len(top) == 1


@pytest.mark.parametrize(
    ("source", "module", "rooms"),
    [
        ("from mlx_flux_krea import FluxPipeline", "convert.remap", {"pipeline"}),
        ("def f():\n    from mlx_flux_krea import Request as R", "convert.remap", {"pipeline"}),
        ("import mlx_flux_krea", "convert.remap", {"pipeline"}),
        ("import mlx_flux_krea as ours", "convert.remap", {"pipeline"}),
        ("import mlx_flux_krea.models.config", "convert.remap", {"pipeline"}),
        ("from mlx_flux_krea import *", "convert.__init__", {"pipeline"}),
        ("from importlib import import_module\nimport_module('mlx_flux_krea.pipeline')", "convert.write", {"pipeline"}),
        ("__import__('cli')", "convert.write", {"cli"}),
        ("from mlx_flux_krea.cli import main", "convert.write", {"cli"}),
        ("from mlx_flux_krea.commands.shared.terminal import say", "convert.write", {"commands"}),
        ("from .. import FluxPipeline", "mlx_flux_krea.models.vae", {"pipeline"}),
        ("from ..weights import ModelFolder", "mlx_flux_krea.models.vae", {"weights"}),
        ("from ..files import read_json", "mlx_flux_krea.models.config", {"files"}),
        ("from .commands.shared.terminal import Console", "mlx_flux_krea.weights", {"commands"}),
        ("import convert", "mlx_flux_krea.weights", {"convert"}),
        ("from mlx_flux_krea.convert import convert", "mlx_flux_krea.pipeline", {"convert"}),
        ("from mlx_flux_krea.nano import FOLDER", "mlx_flux_krea.pipeline", {"nano"}),
        ("from .generator import Generator", "mlx_flux_krea.request", {"generator"}),
        ("from .request import Request", "mlx_flux_krea.weights", {"request"}),
        ("from .presets import STRENGTH\nfrom .files import forget", "mlx_flux_krea.licence", {"files"}),
        # in a sub-package one dot is the sub-package, two are the library
        ("from .. import pipeline", "mlx_flux_krea.filters.gate", {"pipeline"}),
        ("from ..pipeline import Request", "mlx_flux_krea.filters.gate", {"pipeline"}),
        ("from .. import FluxPipeline", "mlx_flux_krea.filters.__init__", {"pipeline"}),
        ("from .vit import ViT", "mlx_flux_krea.models.pixtral", {"models.vit"}),
        ("from . import vit", "mlx_flux_krea.models.pixtral", {"models.vit"}),
        ("import mlx_flux_krea.models.vit as vit", "mlx_flux_krea.models.pixtral", {"models.vit"}),
    ],
)
def test_an_arrow_that_points_up_is_seen(source, module, rooms):
    """Each of these lines in that module is one that the test above must refuse, rooms of later days included."""
    module = f"{PACKAGE}.{module}" if module.startswith("convert") else module
    assert unwanted(source, module) == rooms


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from . import maps\nfrom .layouts import SourceComponent", "convert.remap"),
        ("from mlx_flux_krea import __version__, presets", "convert.remap"),
        ("import mlx_flux_krea.models.config as configs", "convert.remap"),
        ("from .config import VAEConfig\nfrom . import layers", "mlx_flux_krea.models.vae"),
        ("from ..sampling import noise", "mlx_flux_krea.models.vae"),
        ("from .weights import ModelFolder", "mlx_flux_krea.provenance"),
        ("from . import pipeline\nfrom .shared.terminal import Console", "mlx_flux_krea.commands.generate"),
        ("from mlx_flux_krea import FluxPipeline", "cli"),
    ],
)
def test_arrows_that_point_down_are_allowed(source, module):
    assert unwanted(source, f"{PACKAGE}.{module}" if module.startswith("convert") else module) == set()


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_torch_and_transformers_are_for_training_alone(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    assert module_name(path).startswith(f"{PACKAGE}.nano.train") or names.isdisjoint(
        {"torch", "diffusers", "transformers"}
    )


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_only_the_top_level_prints(path):
    if LEVEL.get(room(module_name(path))) == 7:
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


def test_a_package_and_a_converter_of_two_checkouts_are_refused(tmp_path):
    """As with an editable install of one checkout, and the folder of another, which Python puts before it."""
    other = tmp_path / PACKAGE
    shutil.copytree(ROOT / PACKAGE, other, ignore=shutil.ignore_patterns("model", "__pycache__"))
    script = f"""
import importlib.util, sys
import {PACKAGE}
name = "{PACKAGE}.convert"
spec = importlib.util.spec_from_file_location(name, "{ROOT / "convert" / "__init__.py"}")
sys.modules[name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path, env=env
    )
    last = ran.stderr.splitlines()[-1]
    assert ran.returncode == 1
    for path in (other, ROOT / "convert"):
        assert str(path) in last
    assert f"pip install -e {tmp_path}" in last


def test_an_older_python_gets_a_sentence_to_read_instead_of_a_traceback():
    """Apple's is 3.9; pip of that age runs setup.py before it reads requires-python."""
    text = (ROOT / "setup.py").read_text()
    ast.parse(text, feature_version=(3, 9))
    program = f"import sys; sys.version_info = (3, 9, 6, 'final', 0)\nexec({text!r})"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "needs Python 3.11 or later, and this is Python 3.9" in ran.stderr
    assert "uv tool install" in ran.stderr
    assert "Traceback" not in ran.stderr
