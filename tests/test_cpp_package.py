"""The installed C++ package: a small program is built on it and looks up rows, without Python and TensorFlow."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / os.environ.get("HPS_BUILD_DIR", "build/dev")


def run(*command: object, **options: object) -> subprocess.CompletedProcess:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert (BUILD / "CMakeCache.txt").exists(), f"{BUILD} holds no build: run ./dev build first"
    folder = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", BUILD, "--prefix", folder)
    return folder


@pytest.fixture(scope="module")
def program(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("example")
    source = folder / "source"
    shutil.copytree(ROOT / "examples" / "cpp", source)  # away from the checkout: only the prefix can be found
    build = folder / "build"
    run("cmake", "-S", source, "-B", build, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", build)
    return build / "lookup"


@pytest.fixture()
def config(tmp_path: Path) -> Path:
    """A model `movies` with one table `users` of 1,000 rows, width 3: row k is [k, k + 0.5, -k]."""
    table = tmp_path / "users"
    table.mkdir()
    keys = np.arange(1000, dtype=np.int64)
    keys.tofile(table / "key")
    np.stack([keys, keys + 0.5, -keys], axis=1).astype(np.float32).tofile(table / "emb_vector")
    model = {
        "model": "movies",
        "sparse_files": [str(table)],
        "embedding_table_names": ["users"],
        "embedding_vecsize_per_table": [3],
        "maxnum_catfeature_query_per_table_per_sample": [1],
        "default_value_for_each_table": [0.25],
        "deployed_device_list": [0],
        "max_batch_size": 64,
        "gpucache": False,
        "gpucacheper": 0.5,
    }
    path = tmp_path / "ps.json"
    path.write_text(json.dumps({"supportlonglong": True, "models": [model]}))
    return path


def test_prefix_holds_the_package_and_nothing_of_python_or_tensorflow(prefix: Path) -> None:
    files = {str(path.relative_to(prefix)) for path in prefix.rglob("*") if path.is_file()}
    contracts = {path.name for path in (ROOT / "cc" / "include" / "hps").glob("*.h")}
    assert {f"include/hps/{name}" for name in contracts} <= files
    libraries = {file for file in files if ".so" in file}
    assert [Path(file).name for file in libraries] == ["libhps_core.so"]
    configs = [file for file in files if file.endswith("cmake/hps/hpsConfig.cmake")]
    assert len(configs) == 1
    for path in prefix.rglob("*.cmake"):
        assert str(ROOT) not in path.read_text(), f"{path} points into the source folder"


def test_library_exports_only_its_own_names(prefix: Path) -> None:
    (library,) = prefix.rglob("libhps_core.so")
    symbols = [line.split()[-1] for line in run("nm", "-D", "--defined-only", library).stdout.splitlines()]
    assert any("ParameterServer" in symbol for symbol in symbols)
    foreign = [symbol for symbol in symbols if "3hps" not in symbol]
    assert not foreign, foreign[:20]


def test_program_prints_rows_and_defaults(program: Path, config: Path, tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin"}
    done = run(program, config, "movies", "users", 0, 999, 1000, 7, env=environment, cwd=tmp_path)
    rows = [[float(word) for word in line.split()] for line in done.stdout.splitlines()]
    assert rows == [[0, 0, 0.5, 0], [999, 999, 999.5, -999], [1000, 0.25, 0.25, 0.25], [7, 7, 7.5, -7]]
    assert "rows from volatile 3, persistent 0, default 1" in done.stderr
    needed = run("ldd", program).stdout
    assert "libhps_core.so" in needed
    assert not re.search("python|tensorflow", needed)


def test_program_fails_with_a_message(program: Path, config: Path) -> None:
    done = subprocess.run([program, config, "movies", "nobody", "1"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "NotFound" in done.stderr and "users" in done.stderr
