"""multi_process_hash_map: servers of several processes on one copy of the tables, and what is left when they end."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import time
import uuid

import numpy as np
import pytest

import hierarchical_parameter_server as hps
from hierarchical_parameter_server import errors
from hierarchical_parameter_server.cli import main
from hierarchical_parameter_server.inspect import inspect

WIDTH = 16
KEYS = np.concatenate([np.arange(2000), np.array([-1, -(2**63), 2**63 - 1])]).astype(np.int64)
ROWS = (np.arange(len(KEYS))[:, None] * 100 + np.arange(WIDTH)).astype(np.float32)


@pytest.fixture
def name():
    """A name of shared memory of the test's own, which is gone at its end."""
    name = f"hps_test_{uuid.uuid4().hex}"
    yield name
    pathlib.Path("/dev/shm", name).unlink(missing_ok=True)


def write_table(folder) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    KEYS.tofile(folder / "key")
    ROWS.tofile(folder / "emb_vector")
    return str(folder)


def config(name, folder, database=None, **volatile) -> dict:
    settings = {
        "supportlonglong": True,
        "models": [
            {
                "model": "m",
                "sparse_files": [folder],
                "embedding_table_names": ["t"],
                "embedding_vecsize_per_table": [WIDTH],
                "maxnum_catfeature_query_per_table_per_sample": [1],
                "default_value_for_each_table": [-1.0],
                "gpucache": False,
                "deployed_device_list": [],
            }
        ],
        "volatile_db": {
            "type": "multi_process_hash_map",
            "shared_memory_name": name,
            "shared_memory_size": 32 << 20,
            **volatile,
        },
    }
    if database is not None:
        settings["persistent_db"] = {"type": "rocks_db", "path": str(database), "read_only": True}
    return settings


def table_stats(server) -> dict:
    return server.stats()["models"][0]["tables"][0]


class OtherProcess:
    """A Python process with a server of its own as `server`; it runs what it is told and answers with JSON."""

    LOOP = """
        import json, sys
        import numpy as np
        import hierarchical_parameter_server as hps

        server = hps.ParameterServer(json.loads(sys.argv[1]))
        for line in sys.stdin:
            print(json.dumps(eval(line)), flush=True)
    """

    def __init__(self, settings: dict):
        self._process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(self.LOOP), json.dumps(settings)],
            env=dict(os.environ, HPS_TENSORFLOW="off"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, expression: str):
        print(expression, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, f"the process ended with {self._process.wait(60)}"
        return json.loads(answer)

    def close(self) -> int:
        self._process.stdin.close()
        return self._process.wait(60)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._process.kill()
        self._process.wait(60)
        self._process.stdout.close()

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        assert self._process.wait(60) == -signal.SIGKILL


def test_two_servers_have_one_copy_of_the_rows(tmp_path, name):
    memory = pathlib.Path("/dev/shm", name)
    settings = config(name, write_table(tmp_path / "t"))
    with hps.ParameterServer(settings) as server:
        assert table_stats(server)["load"]["source"] == "folder"
        np.testing.assert_array_equal(server.lookup(KEYS, "m"), ROWS)
        taken = memory.stat().st_blocks
        with OtherProcess(settings) as other:
            stats = other.ask("server.stats()['models'][0]['tables'][0]")
            assert stats["load"]["source"] == "volatile", "loaded again"
            assert stats["volatile"]["rows"] == len(KEYS)
            assert other.ask(f"server.lookup({KEYS.tolist()}, 'm').tolist()") == ROWS.tolist()
            assert memory.stat().st_blocks == taken
            assert other.close() == 0
        np.testing.assert_array_equal(server.lookup(KEYS, "m"), ROWS)
    assert not memory.exists()


def test_a_row_that_one_server_brought_up_is_there_for_the_other(tmp_path, name):
    folder = write_table(tmp_path / "t")
    settings = config(name, folder, database=tmp_path / "db")
    first = {**settings, "volatile_db": {"type": "hash_map"}}
    first["persistent_db"] = {**settings["persistent_db"], "read_only": False}
    hps.ParameterServer(first).close()
    settings["volatile_db"].update(initial_cache_rate=0.0, cache_missed_embeddings=True)
    asked = KEYS[:500]
    with hps.ParameterServer(settings) as server, OtherProcess(settings) as other:
        report = server.lookup_report(asked, "m")[1]
        assert report["rows_from_persistent"] == len(asked)
        other.ask(f"server.lookup({KEYS[500:].tolist()}, 'm').tolist()")
        # Promotion takes a moment; what the other process has asked for appears here without being asked for.
        end = time.monotonic() + 60
        while table_stats(server)["volatile"]["rows"] < len(KEYS) and time.monotonic() < end:
            pass
        rows, report = server.lookup_report(KEYS, "m")
        np.testing.assert_array_equal(rows, ROWS)
        assert report["rows_from_volatile"] == len(KEYS)


def test_a_killed_server_takes_nothing_with_it(tmp_path, name):
    settings = config(name, write_table(tmp_path / "t"))
    with OtherProcess(settings) as loading:
        assert loading.ask("server.models") == ["m"]
        with hps.ParameterServer(settings) as server:
            loading.kill()
            np.testing.assert_array_equal(server.lookup(KEYS, "m"), ROWS)
            assert table_stats(server)["load"]["source"] == "volatile"
            with OtherProcess(settings) as other:
                assert other.ask("server.lookup([5], 'm').tolist()") == ROWS[5:6].tolist()
                assert other.close() == 0
    assert not pathlib.Path("/dev/shm", name).exists(), "the last one removes it, though another was killed"


def test_shared_memory_stays_where_it_is_not_to_be_removed(tmp_path, name):
    settings = config(name, write_table(tmp_path / "t"), shared_memory_auto_remove=False)
    hps.ParameterServer(settings).close()
    assert pathlib.Path("/dev/shm", name).exists()
    with hps.ParameterServer(settings) as server:
        assert table_stats(server)["load"]["source"] == "volatile"
        np.testing.assert_array_equal(server.lookup(KEYS, "m"), ROWS)


def test_another_layout_is_refused(tmp_path, name):
    folder = write_table(tmp_path / "t")
    with hps.ParameterServer(config(name, folder)):
        with pytest.raises(errors.FailedPreconditionError, match="num_partitions is 16 there and 2 here"):
            hps.ParameterServer(config(name, folder, num_partitions=2))
        with pytest.raises(errors.FailedPreconditionError, match="shared_memory_size is 33554432 there"):
            hps.ParameterServer(config(name, folder, shared_memory_size=64 << 20))


def test_an_inspection_says_what_is_there(tmp_path, name, capsys):
    memory = pathlib.Path("/dev/shm", name)
    settings = config(name, write_table(tmp_path / "t"))
    path = tmp_path / "ps.json"
    path.write_text(json.dumps(settings))
    report = inspect(path)
    assert any(f"shared memory {memory}: not there" in note for note in report.notes)
    with hps.ParameterServer(settings), OtherProcess(settings) as other:
        process = other.ask("__import__('os').getpid()")  # it is attached when it answers
        before = memory.stat()
        (table,) = inspect(memory).tables
        assert (table.name, table.model, table.table, table.state) == ("hps_et.m.t", "m", "t", "current")
        assert (table.rows, table.width, table.key_bytes, table.partitions) == (len(KEYS), WIDTH, 8, 16)
        assert table.bytes >= len(KEYS) * WIDTH * 4
        assert table.fingerprint and table.recorded_rows == len(KEYS)
        report = inspect(path)
        shared = report.parts[1]
        assert (shared.kind, shared.tables[0].rows) == ("multi_process_hash_map", len(KEYS))
        assert shared.facts["attached_processes"] == sorted([os.getpid(), process])
        assert shared.facts["file_bytes"] == 32 << 20 and shared.facts["overflow_margin"] == "unlimited"
        assert f"({os.geteuid()})" in shared.facts["made_by_user"]
        assert not report.all_problems()
        assert main(["inspect", str(memory)]) == 0
        assert "hps_et.m.t" in capsys.readouterr().out
        assert main(["inspect", str(memory), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["tables"][0]["rows"] == len(KEYS)
        after = memory.stat()
        assert (after.st_blocks, after.st_mtime_ns) == (before.st_blocks, before.st_mtime_ns)
        path.write_text(json.dumps(config(name, str(tmp_path / "t"), num_partitions=2, overflow_margin=5)))
        (problem,) = inspect(path).all_problems()
        assert "num_partitions is 16 there and 2 in" in problem and "overflow_margin is unlimited there" in problem
        other.kill()
        assert inspect(memory).facts["attached_processes"] == [os.getpid()]
    assert not memory.exists()


def test_an_inspection_of_memory_that_nobody_uses_or_that_is_broken(tmp_path, name, capsys):
    memory = pathlib.Path("/dev/shm", name)
    hps.ParameterServer(config(name, write_table(tmp_path / "t"), shared_memory_auto_remove=False)).close()
    report = inspect(memory)
    assert report.tables[0].rows == len(KEYS) and not report.all_problems()
    assert report.facts["attached_processes"] == []
    assert any("no process uses it" in note for note in report.notes)
    whole = memory.read_bytes()[: 1 << 20]
    for cut in (100, 5000, 1 << 20):
        os.truncate(memory, cut)
        assert any("is damaged" in problem for problem in inspect(memory).all_problems())
    memory.write_bytes(whole[:8] + (2).to_bytes(4, "little") + whole[12:])
    assert "has format 2" in inspect(memory).all_problems()[0]
    memory.write_bytes(b"\0" * 4096)
    assert any("making has not ended" in note for note in inspect(memory).notes)
    memory.write_bytes(b"somebody's")
    with pytest.raises(errors.InvalidArgumentError, match="is not shared memory of multi_process_hash_map"):
        inspect(memory)
    assert main(["inspect", str(memory)]) == 1
    assert "JSON" not in capsys.readouterr().err
    rng = random.Random(5)
    for _ in range(200):  # whatever stands there: a report, and no crash
        garbled = bytearray(whole)
        for _ in range(rng.randrange(1, 40)):
            garbled[rng.randrange(64, len(garbled))] = rng.randrange(256)
        header = rng.randrange(64, 8192) // 8 * 8
        garbled[header : header + 8] = rng.randbytes(8)
        memory.write_bytes(garbled)
        os.truncate(memory, 32 << 20)
        inspect(memory).to_text()
    memory.unlink()
    memory.mkdir()
    try:
        path = tmp_path / "ps.json"
        path.write_text(json.dumps(config(name, str(tmp_path / "t"))))
        assert any(f"{memory} is a folder" in problem for problem in inspect(path).all_problems())
        with pytest.raises(errors.FailedPreconditionError, match="is a folder"):
            hps.ParameterServer(path)
    finally:
        memory.rmdir()


def test_a_configuration_may_lie_in_shared_memory_too(tmp_path, name):
    path = pathlib.Path("/dev/shm", name)
    path.write_text(json.dumps(config("other_" + name, write_table(tmp_path / "t"))))
    assert inspect(path).kind == "config"


def test_tables_that_do_not_fit_are_refused_and_say_what_to_raise(tmp_path, name):
    with pytest.raises(errors.ResourceExhaustedError, match="raise shared_memory_size"):
        hps.ParameterServer(config(name, write_table(tmp_path / "t"), shared_memory_size=200_000))
    assert not pathlib.Path("/dev/shm", name).exists()
