"""The configurations in docs/operations.md are served, in the order of the page, over tables of the test."""

import json
import re
import uuid
from pathlib import Path

import numpy as np
import pytest
from conftest import write_table
from services import RedisCluster

import hierarchical_parameter_server as hps
from hierarchical_parameter_server.cli import main

PAGE = Path(__file__).parent.parent / "docs/operations.md"
ROWS = 500


def examples():
    return [json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)]


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    for name, width in (("users", 16), ("items", 32)):
        write_table(folder / "tables" / name, np.arange(ROWS) * 7, rows_of(np.arange(ROWS) * 7, width))
    return folder


def rows_of(keys, width):
    return (np.asarray(keys)[:, None] * 100 + np.arange(width)).astype("f4")


def served(number, folder, capsys, **volatile):
    """Serves example `number`, and asks both commands about it."""
    whole, *others = examples()
    config = {**whole, **(others[number - 1] if number else {})}
    config["volatile_db"] = {**config.get("volatile_db", {}), **volatile}
    path = folder / "ps.json"  # relative paths are its own
    path.write_text(json.dumps(config), encoding="utf-8")
    assert main(["memory", str(path)]) == 0
    with hps.ParameterServer(path) as server:
        for table, width in (("users", 16), ("items", 32)):
            keys = np.arange(0, 7 * ROWS, 7)
            np.testing.assert_array_equal(server.lookup(keys, "films", table), rows_of(keys, width))
        (model,) = server.stats()["models"]
        tiers = server.stats()["tiers"]
        shown = main(["inspect", str(path)])
    assert shown == 0, capsys.readouterr().out
    return tiers, [table["load"]["source"] for table in model["tables"]], model["tables"]


def test_all_examples_are_here():
    assert len(examples()) == 5


def test_memory_alone(folder, capsys):
    assert served(0, folder, capsys)[0] == {"volatile": "hash_map"}


def test_memory_over_a_database(folder, capsys):
    both = {"volatile": "hash_map", "persistent": "rocks_db"}
    assert served(1, folder, capsys)[:2] == (both, ["folder"] * 2)
    assert served(1, folder, capsys)[:2] == (both, ["persistent"] * 2)


def test_tables_larger_than_memory(folder, capsys):
    _, _, tables = served(2, folder, capsys)
    for table in tables:
        assert table["rows_served"] == {"volatile": ROWS // 10, "persistent": ROWS - ROWS // 10, "default": 0}


def test_processes_of_a_host(folder, capsys):
    name = f"hps_test_{uuid.uuid4().hex}"
    tiers, _, _ = served(3, folder, capsys, shared_memory_name=name, shared_memory_size=32 << 20)
    assert tiers == {"volatile": "multi_process_hash_map", "persistent": "rocks_db"}
    assert not Path("/dev/shm", name).exists()


def test_hosts_on_redis(folder, capsys, monkeypatch):
    monkeypatch.setenv("HPS_REDIS_PASSWORD", "correct-horse")
    with RedisCluster(masters=3, user="default", password="correct-horse") as cluster:
        tiers, _, tables = served(4, folder, capsys, address=cluster.address)
        assert tiers == {"volatile": "redis_cluster", "persistent": "rocks_db"}
        assert all(table["rows_served"]["volatile"] == ROWS for table in tables)
