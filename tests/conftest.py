"""What the tests share: tables on disk with their contents in memory, configurations, and processes of their own."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

SEED = 20262
WIDTHS = (1, 7, 16, 64, 130)
ROWS = 500
EXTREME_KEYS = np.array([-1, 0, 1, 2**31, 2**53 + 1, -(2**63), 2**63 - 1], np.int64)
DEFAULT_VALUE = 0.25


def write_table(folder, keys, rows) -> str:
    """Writes a table folder: int64 keys [n] and float32 rows [n, width]."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    np.asarray(keys, "<i8").tofile(folder / "key")
    np.asarray(rows, "<f4").tofile(folder / "emb_vector")
    return str(folder)


def model_config(name, tables, **more) -> dict:
    """An entry of "models"; `tables` maps a name to (folder, width)."""
    return {
        "model": name,
        "sparse_files": [str(folder) for folder, _ in tables.values()],
        "embedding_table_names": list(tables),
        "embedding_vecsize_per_table": [width for _, width in tables.values()],
        "maxnum_catfeature_query_per_table_per_sample": [1] * len(tables),
        "gpucache": False,
        **more,
    }


def write_config(path, models, long_keys=True, **more) -> str:
    """Writes a ps.json; returns its path."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"supportlonglong": long_keys, "models": models, **more}, indent=2))
    return str(path)


@dataclasses.dataclass
class Tables:
    """A server's configuration and what its tables hold.

    The model "main" has a table "w<width>" for each of WIDTHS, whose keys are 0 .. ROWS - 1, and the table "extreme"
    with EXTREME_KEYS, 3 wide. Keys that they lack have rows of DEFAULT_VALUE.
    """

    folder: pathlib.Path
    config: str
    rows: dict[str, np.ndarray]  # by the name of the table

    @property
    def names(self) -> list[str]:
        return list(self.rows)

    def table_id(self, name: str) -> int:
        return self.names.index(name)

    def width(self, name: str) -> int:
        return self.rows[name].shape[1]

    def expected(self, name: str, ids) -> np.ndarray:
        """Rows of ids below ROWS."""
        return self.rows[name][np.asarray(ids)]


def make_tables(folder, seed=SEED, **more) -> Tables:
    folder = pathlib.Path(folder)
    print(f"tables: seed {seed}")
    rng = np.random.default_rng(seed)
    rows = {f"w{width}": rng.normal(size=(ROWS, width)).astype("f4") for width in WIDTHS}
    for name, table_rows in rows.items():
        write_table(folder / name, np.arange(ROWS), table_rows)
    rows["extreme"] = rng.normal(size=(len(EXTREME_KEYS), 3)).astype("f4")
    write_table(folder / "extreme", EXTREME_KEYS, rows["extreme"])
    places = {name: (folder / name, table_rows.shape[1]) for name, table_rows in rows.items()}
    defaults = [DEFAULT_VALUE] * len(places)
    model = model_config("main", places, max_batch_size=4, default_value_for_each_table=defaults, **more)
    return Tables(folder, write_config(folder / "ps.json", [model]), rows)


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Tables:
    """Tables that no server serves yet."""
    return make_tables(tmp_path_factory.mktemp("tables"))


@pytest.fixture
def tables(disk) -> Tables:
    """Tables of the server of hps.Init."""
    import hierarchical_parameter_server as hps

    hps.Init(ps_config_file=disk.config, global_batch_size=4)
    return disk


@pytest.fixture
def no_server():
    """A process without servers, before and after the test."""
    import hierarchical_parameter_server as hps

    hps.shutdown()
    yield
    hps.shutdown()


@pytest.fixture(scope="module", autouse=True)
def _closed_servers():
    yield
    package = sys.modules.get("hierarchical_parameter_server")
    if package is not None:
        package.shutdown()


@pytest.fixture
def rng():
    print(f"seed {SEED}")
    return np.random.default_rng(SEED)


def run_python(script, *arguments, cwd, check=True, **environment) -> subprocess.CompletedProcess:
    """Runs a script in a process of its own, with `environment` added; with `check` it must succeed."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if check:
        assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    return result
