"""tools/check_layers.py finds each kind of include and import that goes the wrong way."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import check_layers  # noqa: E402

PACKAGE = "hierarchical_parameter_server"

WRONG = [
    ("cc/include/hps/a.h", "#include <unistd.h>", "standard library only"),
    ("cc/include/hps/a.h", '#include "cc/base/hash.h"', "must not include cc/base/hash.h"),
    ("cc/base/a.cc", '#include "cc/core/tier_stack.h"', "must not include"),
    ("cc/config/a.cc", '#include "cc/storage/rocksdb_store.h"', "must not include"),
    ("cc/metrics/a.cc", "#include <nlohmann/json.hpp>", "must not include nlohmann"),
    ("cc/storage/hash_map_store.cc", "#include <rocksdb/db.h>", "files named"),
    ("cc/storage/rocksdb_store.h", "#include <rocksdb/db.h>", "files named"),
    ("cc/loader/a.cc", '#include "cc/core/model.h"', "must not include"),
    ("cc/core/a.cc", '#include "tensorflow/core/framework/op.h"', "must not include tensorflow"),
    ("cc/core/a.cc", "#include <absl/status/status.h>", "must not include absl"),
    ("cc/core/a.cc", "#include <pybind11/pybind11.h>", "must not include pybind11"),
    ("cc/core/a.cc", "#include <Python.h>", "Python.h"),
    ("cc/core/a.cc", "#include <cuda_runtime.h>", "must not include cuda_runtime.h"),
    ("cc/core/a.cc", '#include "Model.h"', "write the path"),
    ("cc/core/a.cc", '#  include  "cc/ops/handle.h"', "must not include"),
    ("cc/ops/a.cc", "#include <pybind11/pybind11.h>", "must not include"),
    ("cc/ops/a.cc", '#include "cc/core/tier_stack.h"', "must not include"),
    ("cc/python/a.cc", '#include "tensorflow/core/framework/op.h"', "must not include"),
    ("cuda_kernels/a.cu", '#include "cc/base/hash.h"', "must not include"),
    ("cuda_kernels/a.cu", '#include "hps/status.h"', "must not include"),
    ("examples/cpp/a.cc", '#include "cc/base/hash.h"', "must not include"),
    ("cc/unknown/a.cc", "#include <vector>", "no rule"),
    (f"{PACKAGE}/a.py", "from . import _hps", "_native.py"),
    (f"{PACKAGE}/sub/a.py", "from .._hps import lookup", "_native.py"),
    (f"{PACKAGE}/a.py", "import tests.helpers", "must not import tests"),
    ("tests/a.py", f"import {PACKAGE}._hps", "_native.py"),
    ("tools/a.py", "import numpy", "logic lives in the package"),
    ("tools/a.py", f"from {PACKAGE} import _native", "public names"),
    ("examples/a.py", f"from {PACKAGE}._native import module", "public names"),
]

RIGHT = [
    ("cc/include/hps/a.h", '#include <vector>\n#include "hps/status.h"'),
    ("cc/base/a.cc", "#include <sys/mman.h>\n#include <unistd.h>"),
    ("cc/storage/rocksdb_store.cc", "#include <rocksdb/db.h>"),
    ("cc/core/a.cc", '#include "cc/storage/hash_map_store.h"\n#include <nlohmann/json.hpp>'),
    ("cc/ops/a.cc", '#include "tensorflow/core/framework/op.h"\n#include "hps/parameter_server.h"'),
    ("cc/python/a.cc", "#include <pybind11/pybind11.h>"),
    ("cuda_kernels/a.cu", '#include <cuda_runtime.h>\n#include "cuda_kernels/gather.h"'),
    (f"{PACKAGE}/_native.py", "from . import _hps"),
    (f"{PACKAGE}/layers/a.py", "import tensorflow as tf\nfrom .. import _native"),
    ("tools/a.py", f"import argparse\nimport {PACKAGE}"),
]


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def test_the_repository_keeps_the_rules() -> None:
    assert check_layers.violations(ROOT) == []


@pytest.mark.parametrize(("name", "text", "expected"), WRONG)
def test_wrong_way_is_found(tmp_path: Path, name: str, text: str, expected: str) -> None:
    write(tmp_path, name, "\n" + text)
    (line,) = check_layers.violations(tmp_path)
    assert line.startswith(f"{name}:") and expected in line
    assert check_layers.main([str(tmp_path)]) == 1


@pytest.mark.parametrize(("name", "text"), RIGHT)
def test_right_way_passes(tmp_path: Path, name: str, text: str) -> None:
    write(tmp_path, name, text)
    assert check_layers.violations(tmp_path) == []
    assert check_layers.main([str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("folder", "library"),
    [("cc/config", "nlohmann/json.hpp"), ("cc/storage", "rocksdb/db.h"), ("cc/core", "nlohmann/json.hpp")],
)
def test_a_library_belongs_in_one_file(tmp_path: Path, folder: str, library: str) -> None:
    for name in ("rocksdb_a.cc", "rocksdb_b.cc"):
        write(tmp_path, f"{folder}/{name}", f"#include <{library}>\n#include <{library}>")
    (line,) = check_layers.violations(tmp_path)
    assert "belongs in one file" in line
