"""Prints what pip must install to develop: pyproject.toml's build requirements, dependencies and the extras named.

Usage: python tools/requirements.py [EXTRA...]
"""

import importlib
import sys
from pathlib import Path


def read_pyproject() -> dict:
    for name in ("tomllib", "tomli", "pip._vendor.tomli"):  # Python 3.10 has no tomllib
        try:
            parser = importlib.import_module(name)
            break
        except ModuleNotFoundError:
            continue
    return parser.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8"))


def requirements(extras: list[str]) -> list[str]:
    pyproject = read_pyproject()
    lines = pyproject["build-system"]["requires"] + pyproject["project"]["dependencies"]
    for extra in extras:
        lines = lines + pyproject["project"]["optional-dependencies"][extra]
    return lines


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))
