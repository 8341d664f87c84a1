"""multi_process_hash_map: servers of several processes on one copy of the tables, and what is left when they end."""

import json
import os
import pathlib
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


def test_tables_that_do_not_fit_are_refused_and_say_what_to_raise(tmp_path, name):
    with pytest.raises(errors.ResourceExhaustedError, match="raise shared_memory_size"):
        hps.ParameterServer(config(name, write_table(tmp_path / "t"), shared_memory_size=200_000))
    assert not pathlib.Path("/dev/shm", name).exists()
