"""Limits of the process: what fails says which limit it was and what to do, and all works again above it."""

import json

import numpy as np
import pytest
from conftest import model_config, run_python, write_table
from services import RedisServer

WIDTH = 16
ROWS = 100_000

# Tries a server under each of some limits, then without one; prints a JSON list of the errors' types and texts (""
# where it served). A server that is refused leaves nothing behind that would keep the next one from starting.
ATTEMPTS = """
    import json, os, resource, shutil, sys
    import numpy as np
    import hierarchical_parameter_server as hps

    np.testing  # is imported when it is first used
    name, first, last, step, config, database = sys.argv[1:7]
    config = config if config.startswith("/") else json.loads(config)
    which = getattr(resource, name)
    infinity = resource.getrlimit(which)[1]

    def used():
        if name == "RLIMIT_AS":
            return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        if name == "RLIMIT_NOFILE":
            return len(os.listdir("/proc/self/fd")) - 1
        return 0

    def attempt():
        try:
            with hps.ParameterServer(config) as server:
                np.testing.assert_array_equal(server.lookup(np.arange(500) * 7, "m"), np.ones((500, 16), "f4"))
            return ["", ""]
        except Exception as error:
            return [type(error).__name__, str(error)]

    shared = "/dev/shm/" + str(isinstance(config, dict) and config.get("volatile_db", {}).get("shared_memory_name"))
    result = []
    for above in [*range(int(first), int(last), int(step)), None]:
        shutil.rmtree(database, ignore_errors=True)
        if above is not None:
            resource.setrlimit(which, (used() + above, infinity))
        result.append(attempt())
        resource.setrlimit(which, (infinity, infinity))
        assert not os.path.exists(shared)
    print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("limits")
    write_table(folder / "items", np.arange(ROWS) * 7, np.ones((ROWS, WIDTH)))
    return folder


def config_of(folder, tier):
    sections = {
        "hash_map": {},
        "multi_process_hash_map": {
            "volatile_db": {
                "type": "multi_process_hash_map",
                "shared_memory_name": f"hps_test_{folder.name}",
                "shared_memory_size": 64 << 20,
            }
        },
        "rocks_db": {"persistent_db": {"type": "rocks_db", "path": str(folder / "database")}},
    }[tier]
    return {"supportlonglong": True, "models": [model_config("m", {"items": (folder / "items", WIDTH)})], **sections}


def attempts(folder, config, limit, first, last, step) -> list[list[str]]:
    """The errors under the limits; without one it served."""
    text = config if isinstance(config, str) else json.dumps(config)
    arguments = (limit, first, last, step, text, folder / "database")
    result = run_python(ATTEMPTS, *arguments, cwd=folder, HPS_TENSORFLOW="off")
    *errors, without = json.loads(result.stdout.splitlines()[-1])
    assert without == ["", ""]
    errors = [error for error in errors if error[0]]
    assert errors, "the limits were not felt"
    return errors


@pytest.mark.parametrize("tier", ["hash_map", "multi_process_hash_map", "rocks_db"])
def test_address_space_and_threads(folder, tier):
    errors = attempts(folder, config_of(folder, tier), "RLIMIT_AS", 0, 800 << 20, 16 << 20)
    for kind, text in errors:
        assert kind == "ResourceExhaustedError", text
        assert "MiB of address space (RLIMIT_AS, ulimit -v)" in text and "; raise the limit" in text, text
    texts = [text for _, text in errors]
    assert any("refuses to start a thread" in text for text in texts), texts
    if tier != "rocks_db":  # whose threads need more than these rows
        assert any("memory" in text.split(";")[0] or "address space" in text.split(";")[0] for text in texts), texts


@pytest.mark.parametrize("tier", ["hash_map", "multi_process_hash_map", "rocks_db"])
def test_open_files(folder, tier):
    errors = attempts(folder, config_of(folder, tier), "RLIMIT_NOFILE", 0, 12, 1)
    for kind, text in errors:
        assert kind == "ResourceExhaustedError", text
        assert "Too many open files" in text and "open files (RLIMIT_NOFILE): raise that (ulimit -n" in text, text
    if tier == "multi_process_hash_map":
        assert any("cannot be opened again (Too many open files)" in text for _, text in errors), errors


def test_open_files_for_the_configuration_itself(folder):
    path = folder / "ps.json"
    path.write_text(json.dumps(config_of(folder, "hash_map")))
    ((kind, text),) = attempts(folder, str(path), "RLIMIT_NOFILE", 0, 1, 1)
    assert kind == "ResourceExhaustedError"
    assert f"the configuration file {path} cannot be read: Too many open files; the process may have" in text


def test_open_files_for_connections(folder):
    with RedisServer() as service:
        volatile = {"type": "redis_cluster", "address": service.address, "num_partitions": 2}
        config = {**config_of(folder, "hash_map"), "volatile_db": volatile}
        ((kind, text),) = attempts(folder, config, "RLIMIT_NOFILE", 0, 1, 1)
    assert kind == "UnavailableError" or kind == "ResourceExhaustedError"
    assert "Too many open files" in text and "(RLIMIT_NOFILE): raise that" in text


@pytest.mark.parametrize("tier", ["multi_process_hash_map", "rocks_db"])
def test_size_of_files(folder, tier):
    for kind, text in attempts(folder, config_of(folder, tier), "RLIMIT_FSIZE", 1, 4 << 20, 200_000):
        assert kind == "ResourceExhaustedError", text
        assert "File too large" in text and "bytes (RLIMIT_FSIZE): raise that (ulimit -f" in text, text
