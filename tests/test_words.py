"""Words that everybody reads: docstrings and help of the whole tree, and one meaning for each name of a class."""

import ast
import functools
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

PRODUCT = sorted([*(ROOT / "convert").rglob("*.py"), *(ROOT / "mlx_flux_krea").rglob("*.py")])
OTHERS = sorted([*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "tests").rglob("*.py")])
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def trees(files: list[Path]) -> dict[Path, ast.Module]:
    return {path.relative_to(ROOT): tree_of(path) for path in files}


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            yield text


def helps(tree: ast.Module) -> Iterator[str]:
    """Texts of the argument `help` of any call."""
    for node in ast.walk(tree):
        for keyword in node.keywords if isinstance(node, ast.Call) else ():
            if keyword.arg == "help":
                parts = (c.value for c in ast.walk(keyword.value) if isinstance(c, ast.Constant))
                yield from (part for part in parts if isinstance(part, str))


def test_a_docstring_opens_with_a_verb_or_a_thing():
    """One that opens with "What", "Of" or "Whether" is half a sentence, whose verb the reader has to find."""
    opening = re.compile(r"(What|Of|Whether)\b")
    found = [
        f"{path}: {text.splitlines()[0]}"
        for path, tree in trees(PRODUCT + OTHERS).items()
        for text in docstrings(tree)
        if opening.match(text)
    ]
    assert found == []


def test_things_are_named_and_not_called_what():
    """The share of "what" in docstrings and help; in whisper and mlx-lm it is 0 to 1.1 in a thousand words."""
    texts = [text for tree in trees(PRODUCT).values() for text in (*docstrings(tree), *helps(tree))]
    words = re.findall(r"[A-Za-z']+", " ".join(texts))
    share = 1000 * sum(word.lower() == "what" for word in words) / len(words)
    assert share < 2, f"{share:.1f} in a thousand words"


def test_no_two_classes_have_the_same_name():
    """In the wheel, that is: nano/train*.py have their own classes for torch."""
    shipped = [path for path in PRODUCT if not path.name.startswith("train")]
    names = Counter(
        node.name for tree in trees(shipped).values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_code_cites_nothing_that_a_reader_does_not_have():
    """The design notes are not part of the repository."""
    word = "DESIGN"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is not a checkout")
    code = (ROOT / name for name in listed.stdout.splitlines() if name.endswith((".py", ".toml", ".yml", ".ci/run")))
    assert [path for path in code if path.is_file() and re.search(rf"\b{word}\b", path.read_text().replace(
        f'word = "{word}"', ""))] == []  # fmt: skip
