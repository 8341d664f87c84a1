"""Fails when an include or an import goes the wrong way. The tables below are the rules.

Usage: python tools/check_layers.py [ROOT]
Prints one line a violation ("file:line: what is wrong") and exits with code 1 if there is one.
"""

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "hierarchical_parameter_server"
COMMAND = "hps_command"  # beside it


@dataclass(frozen=True)
class Layer:
    """A folder of C++ code and what its files may include, by prefix; the standard library is always allowed."""

    folder: str
    ours: tuple[str, ...]  # our headers
    others: tuple[str, ...] = ()  # other libraries
    system: bool = True  # headers of the operating system
    files: str = ""  # a regular expression: only files with such names may include the other libraries
    most: int = 1000  # and at most so many files, for each library


CONTRACTS = "hps/"
LAYERS = (
    Layer("cc/include/hps", (CONTRACTS,), system=False),
    Layer("cc/base", (CONTRACTS, "cc/base/")),
    Layer("cc/config", (CONTRACTS, "cc/base/", "cc/config/"), ("nlohmann/",), most=1),
    Layer("cc/metrics", (CONTRACTS, "cc/base/", "cc/metrics/")),
    Layer(
        "cc/storage",
        (CONTRACTS, "cc/base/", "cc/storage/"),
        ("rocksdb/", "hiredis/", "openssl/"),
        files=r"(rocksdb_.*|redis_connection)\.cc",
        most=1,
    ),
    Layer("cc/loader", (CONTRACTS, "cc/base/", "cc/storage/", "cc/loader/")),
    Layer("cc/cache", (CONTRACTS, "cc/base/", "cc/cache/", "cuda_kernels/")),
    Layer(
        "cc/core",
        (
            CONTRACTS,
            "cc/base/",
            "cc/config/",
            "cc/metrics/",
            "cc/storage/",
            "cc/loader/",
            "cc/cache/",
            "cc/core/",
            "cuda_kernels/device.h",
        ),
        ("nlohmann/",),
        most=1,
    ),
    Layer(
        "cc/ops", (CONTRACTS, "cc/base/", "cc/ops/"), ("tensorflow/", "absl/", "Eigen/", "unsupported/", "tsl/", "xla/")
    ),
    Layer(
        "cc/python",
        (
            CONTRACTS,
            "cc/base/",
            "cc/python/",
            "cc/cache/cache_plan.h",
            "cc/cache/cache_writer.h",
            "cc/cache/device_cache.h",
            "cc/core/host_memory.h",
            "cc/storage/shared_inspection.h",
            "cc/storage/table_memory.h",
        ),
        ("pybind11/", "Python.h"),
    ),
    Layer("cc/tests", (CONTRACTS, "cc/", "cuda_kernels/", "tests/gpu/"), ("gtest/", "gmock/", "nlohmann/", "rocksdb/")),
    Layer("cuda_kernels", ("cuda_kernels/",), ("cuda", "cub/", "cooperative_groups")),
    Layer("tests/gpu", ("cuda_kernels/", "tests/gpu/"), ("cuda",)),
    Layer("examples/cpp", (CONTRACTS,)),
    Layer(
        "benchmarks",
        (CONTRACTS, "cc/", "cuda_kernels/", "benchmarks/"),
        ("cuda", "hiredis/", "rocksdb/", "tensorflow/"),
    ),
)
# Folders below these names must have a layer above.
NATIVE_ROOTS = ("cc", "cuda_kernels", "examples", "benchmarks", "tests")
OURS = (CONTRACTS, "cc/", "cuda_kernels/", "benchmarks/", "tests/gpu/")
SYSTEM = re.compile(r"(sys|linux|netinet|arpa|net|asm|bits|x86|ext)/|[a-z0-9_]+\.h$")
THIRD_PARTY_FILES = re.compile(r"cuda|Python\.h|cublas|nccl|zlib\.h|zstd|lz4|hwloc")
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]')


def native_violations(root: Path) -> list[str]:
    found = []
    users: dict[tuple[str, str], list[str]] = {}  # (folder, library) -> files that include it
    for path in sorted(p for top in NATIVE_ROOTS for p in (root / top).rglob("*") if p.suffix in (".h", ".cc", ".cu")):
        name = path.relative_to(root).as_posix()
        layer = next((layer for layer in LAYERS if name.startswith(layer.folder + "/")), None)
        if layer is None:
            found.append(f"{name}:1: this folder has no rule in tools/check_layers.py; add it there and in the docs")
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            match = INCLUDE.match(line)
            if not match:
                continue
            header = match[1]
            problem = _problem(layer, path.name, header)
            if problem:
                found.append(f"{name}:{number}: {problem}")
            library = next((other for other in layer.others if header.startswith(other)), None)
            if library and name not in users.setdefault((layer.folder, library), []):
                users[layer.folder, library].append(name)
                if len(users[layer.folder, library]) > layer.most:
                    first = users[layer.folder, library][0]
                    found.append(f"{name}:{number}: {library} is included by {first} already, and belongs in one file")
    return found


def _problem(layer: Layer, file_name: str, header: str) -> str | None:
    """Says what is wrong with one include, or None."""
    if header.startswith(layer.others or ("\0",)):
        if layer.files and not re.fullmatch(layer.files, file_name):
            return f"{header} may be included by files named {layer.files} only"
        return None
    if header.startswith(OURS):
        if not header.startswith(layer.ours):
            return f"{layer.folder} must not include {header}; it may include {', '.join(layer.ours)}"
        return None
    if "." not in header and "/" not in header:
        return None  # the standard library
    if "/" not in header and not SYSTEM.match(header):
        return f"{header}: write the path from the root of the repository or of the include folder"
    if SYSTEM.match(header) and not THIRD_PARTY_FILES.match(header):
        return None if layer.system else f"{layer.folder} must include the standard library only, not {header}"
    return f"{layer.folder} must not include {header}"


# What Python files below a folder may import besides the standard library; None: anything.
PYTHON_LAYERS: dict[str, tuple[str, ...] | None] = {
    PACKAGE: None,
    "tools": (PACKAGE, COMMAND),
    "tests": None,
    "examples": None,
    "benchmarks": None,
}
# Files that must know a build tool.
TOOL_IMPORTS = {"tools/build_backend.py": ("setuptools",), "tools/requirements.py": ("pip",)}
NATIVE_MODULE = "_hps"  # imported by _native.py alone
NOT_FOR_THE_PACKAGE = ("tests", "tools", "examples", "benchmarks", "notebooks")


def python_violations(root: Path) -> list[str]:
    found = []
    for folder, allowed in PYTHON_LAYERS.items():
        siblings = {path.stem for path in (root / folder).glob("*.py")} | {folder}
        for path in sorted((root / folder).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            for number, module in _imports(path):
                parts = module.lstrip(".").split(".")
                top = "" if module.startswith(".") else parts[0]
                if NATIVE_MODULE in parts and name != f"{PACKAGE}/_native.py":
                    found.append(f"{name}:{number}: only {PACKAGE}/_native.py imports the native module")
                if "_native" in parts and folder not in (PACKAGE, "tests"):
                    found.append(f"{name}:{number}: {folder} uses the public names of the package, not _native")
                if folder == PACKAGE and top in NOT_FOR_THE_PACKAGE:
                    found.append(f"{name}:{number}: the package must not import {module}")
                legal = set(allowed or ()) | set(TOOL_IMPORTS.get(name, ())) | sys.stdlib_module_names | siblings
                # tomllib is part of the standard library from 3.11 on.
                if allowed is not None and top and top not in legal | {"tomllib"}:
                    found.append(f"{name}:{number}: {folder} must not import {module}; logic lives in the package")
    return found


def _imports(path: Path) -> list[tuple[int, str]]:
    """Returns (line, dotted name) of each import; of `from a import b` both the names a and a.b are one entry."""
    entries = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            entries += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            separator = "" if base.endswith(".") else "."
            entries += [(node.lineno, f"{base}{separator}{alias.name}") for alias in node.names]
    return entries


def violations(root: Path) -> list[str]:
    return native_violations(root) + python_violations(root)


def main(arguments: list[str]) -> int:
    root = Path(arguments[0]) if arguments else Path(__file__).resolve().parent.parent
    found = violations(root)
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
