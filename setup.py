"""Long description for PyPI: README.md with absolute links. Everything else is declared in pyproject.toml."""

# ruff: noqa: UP036
import sys

if sys.version_info < (3, 11):  # Apple's own Python is 3.9, and its pip asks here before it reads requires-python
    found = "{}.{} ({})".format(*sys.version_info[:2], sys.executable)
    sys.exit(
        "\n\nmlx-flux-krea needs Python 3.11 or later, and this is Python " + found + ".\n"
        "Install a newer one from https://www.python.org, or let uv fetch one: uv tool install --python 3.12 .\n"
    )

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def long_description() -> str:
    """Returns README.md as PyPI shows it, where a link relative to the repository would lead nowhere."""
    home = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Homepage"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r'(<img src=")(?!https?:)', rf"\1{home}/raw/main/", text)
    text = re.sub(r"(!\[[^]]*\]\()(?!https?:)", rf"\1{home}/raw/main/", text)
    return re.sub(r"(\]\()(?!https?:|#)", rf"\1{home}/blob/main/", text)


setup(long_description=long_description(), long_description_content_type="text/markdown")
