"""hps.ParameterServer: lookups without TensorFlow, models that come and go, errors, threads, the end of a process."""

import gc
import json
import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import model_config, write_config

import hierarchical_parameter_server as hps
from hierarchical_parameter_server import errors

WIDTH = 4
KEYS = np.arange(100, dtype=np.int64)
DEFAULT = -1.0


def rows_of(keys: np.ndarray, version: int, width: int = WIDTH) -> np.ndarray:
    """The rows that table files hold: (..., width), different for each key, version and column."""
    keys = np.asarray(keys)[..., None]
    return (keys * 10 + np.arange(width) + version * 100_000).astype(np.float32)


def write_table(folder: Path, version: int = 1, width: int = WIDTH, keys: np.ndarray = KEYS) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    np.asarray(keys, np.int64).tofile(folder / "key")
    rows_of(keys, version, width).tofile(folder / "emb_vector")
    return str(folder)


def model(name: str, *folders: str, widths: tuple[int, ...] = (), **more) -> dict:
    widths = widths or (WIDTH,) * len(folders)
    return {
        "model": name,
        "sparse_files": list(folders),
        "embedding_table_names": [f"t{i}" for i in range(len(folders))],
        "embedding_vecsize_per_table": list(widths),
        "maxnum_catfeature_query_per_table_per_sample": [1] * len(folders),
        "default_value_for_each_table": [DEFAULT] * len(folders),
        "max_batch_size": 64,
        "gpucache": False,
        "deployed_device_list": [],
        **more,
    }


def config(*models: dict, database: Path | None = None, **more) -> dict:
    result = {"supportlonglong": True, "models": list(models), "volatile_db": {"type": "hash_map"}, **more}
    if database is not None:
        result["persistent_db"] = {"type": "rocks_db", "path": str(database)}
    return result


@pytest.fixture
def server(tmp_path):
    with hps.ParameterServer(config(model("m", write_table(tmp_path / "a")))) as opened:
        yield opened


# ---- the three forms of a configuration -----------------------------------------------------------------------------


def test_path_dict_and_config_object(tmp_path):
    text = config(model("m", write_table(tmp_path / "a")))
    path = tmp_path / "ps.json"
    path.write_text(json.dumps(text))
    for form in (str(path), path, text, hps.ParameterServerConfig.from_json(json.dumps(text))):
        with hps.ParameterServer(form) as server:
            assert server.models == ["m"]
            assert server.tables("m") == [("t0", WIDTH)]
            np.testing.assert_array_equal(server.lookup([1, 2], "m"), rows_of([1, 2], 1))


def test_relative_paths_are_taken_from_the_folder_of_the_file(tmp_path, monkeypatch):
    write_table(tmp_path / "a")
    (tmp_path / "ps.json").write_text(json.dumps(config(model("m", "a"))))
    monkeypatch.chdir("/")
    with hps.ParameterServer(tmp_path / "ps.json") as server:
        np.testing.assert_array_equal(server.lookup(KEYS, "m"), rows_of(KEYS, 1))
        write_table(tmp_path / "b", 2)
        monkeypatch.chdir(tmp_path)  # models that come later have no file: the working directory counts
        server.replace_model(model("m", "b"))
        np.testing.assert_array_equal(server.lookup(KEYS, "m"), rows_of(KEYS, 2))


def test_other_forms_are_refused():
    with pytest.raises(TypeError, match="list"):
        hps.ParameterServer([1])


def test_a_dict_may_hold_paths_and_scalars_of_numpy(tmp_path):
    write_table(tmp_path / "a")
    entry = model("m", tmp_path / "a", widths=(np.int64(WIDTH),), gpucache=np.bool_(False), max_batch_size=np.int32(64))
    entry["default_value_for_each_table"] = np.array([DEFAULT], np.float32)
    settings = config(entry, database=tmp_path / "db", supportlonglong=np.True_)
    settings["persistent_db"]["path"] = tmp_path / "db"
    settings["volatile_db"]["initial_cache_rate"] = np.float64(0.5)
    with hps.ParameterServer(settings) as server:
        np.testing.assert_array_equal(server.lookup([1, 500], "m"), [rows_of([1], 1)[0], [DEFAULT] * WIDTH])
        server.replace_model(entry)
        server.load_model({**entry, "model": "n"})
    assert hps.memory_plan(settings).fits


@pytest.mark.parametrize(
    ("change", "error", "place"),
    [
        (
            lambda s: s["volatile_db"].update(initial_cache_rate=float("nan")),
            ValueError,
            "/volatile_db/initial_cache_rate",
        ),
        (lambda s: s["models"][0].update(hit_rate_threshold=np.float32("inf")), ValueError, "/models/0/hit_rate_thres"),
        (lambda s: s["models"][0].update(sparse_files=[b"x"]), TypeError, "/models/0/sparse_files/0.*bytes"),
        (lambda s: s["volatile_db"].update(address=object()), TypeError, "/volatile_db/address.*object"),
        (lambda s: s["models"][0].update({7: 1}), ValueError, "/models/0: the key 7"),
    ],
)
def test_what_json_cannot_hold_is_named(tmp_path, change, error, place):
    settings = config(model("m", write_table(tmp_path / "a")))
    change(settings)
    for takes in (hps.ParameterServer, hps.memory_plan):
        with pytest.raises(error, match=f"^{place}"):
            takes(settings)


@pytest.mark.parametrize(
    "text", ['{"volatile_db": {"password": "secret"}}', '\n  {"password": "secret"', "{" + "secret" * 999]
)
def test_json_text_in_place_of_a_path_is_not_shown(text):
    for takes in (hps.ParameterServer, hps.memory_plan, hps.inspect, lambda t: hps.Init(t, 1)):
        with pytest.raises(errors.InvalidArgumentError, match="JSON text") as error:
            takes(text)
        assert "secret" not in str(error.value)
    with pytest.raises(errors.InvalidArgumentError, match=r"json.loads\(text\)"):
        hps.ParameterServer(text)


# ---- lookups --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (2, 3), (4, 0, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64, ">i8"])
def test_keys_of_any_shape_and_integer_type(server, shape, dtype):
    keys = (np.arange(int(np.prod(shape))) % 127).reshape(shape).astype(dtype)
    rows, found = server.lookup(keys, "m", "t0", return_found=True)
    assert rows.shape == (*shape, WIDTH) and rows.dtype == np.float32
    assert found.shape == shape and found.dtype == np.bool_
    expected = np.where((keys < 100)[..., None], rows_of(keys.astype(np.int64), 1), DEFAULT)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(found, keys < 100)


def test_keys_that_are_no_plain_arrays(server):
    np.testing.assert_array_equal(server.lookup(5, "m"), rows_of(5, 1))
    np.testing.assert_array_equal(server.lookup([[1], [2]], "m"), rows_of([[1], [2]], 1))
    assert server.lookup([], "m").shape == (0, WIDTH)
    np.testing.assert_array_equal(server.lookup(KEYS[::3], "m"), rows_of(KEYS[::3], 1))
    np.testing.assert_array_equal(server.lookup(KEYS.reshape(10, 10).T, "m"), rows_of(KEYS.reshape(10, 10).T, 1))
    read_only = KEYS.copy()
    read_only.setflags(write=False)
    np.testing.assert_array_equal(server.lookup(read_only, "m"), rows_of(KEYS, 1))


def test_extreme_keys(tmp_path):
    keys = np.array([-1, 0, np.iinfo(np.int64).min, np.iinfo(np.int64).max])
    with hps.ParameterServer(config(model("m", write_table(tmp_path / "a", keys=keys)))) as server:
        rows, found = server.lookup(keys, "m", return_found=True)
        np.testing.assert_array_equal(rows, rows_of(keys, 1))
        assert found.all() and not server.lookup(keys + np.array([-1, 1, 1, -1]), "m", return_found=True)[1][2:].any()


@pytest.mark.parametrize(
    "keys", [[1.0], np.zeros(0, np.float32), np.array([1], np.uint64), [2**64], ["1"], [True], [None], [1 + 2j]]
)
def test_keys_that_are_no_integers_are_refused(server, keys):
    with pytest.raises(errors.InvalidArgumentError, match="keys must be integers"):
        server.lookup(keys, "m")


def test_the_report_says_where_rows_came_from(tmp_path):
    settings = config(model("m", write_table(tmp_path / "a")), database=tmp_path / "db")
    settings["volatile_db"]["initial_cache_rate"] = 0.25
    with hps.ParameterServer(settings) as server:
        rows, report = server.lookup_report(np.arange(120), "m")
        assert rows.shape == (120, WIDTH)
        assert report.pop("volatile_nanoseconds") > 0 and report.pop("persistent_nanoseconds") > 0
        assert report == {
            "keys": 120,
            "rows_from_volatile": 25,
            "rows_from_persistent": 75,
            "rows_from_default": 20,
            "rows_unavailable": 0,
            "rows_skipped_volatile": 0,
            "rows_skipped_persistent": 0,
            "rows_from_cache": 0,
            "rows_deferred": 0,
            "rows_repeated": 0,
            "rows_unwaited": 0,
        }


def test_several_models_and_widths(tmp_path):
    first = model("m", write_table(tmp_path / "a", 1, 3), write_table(tmp_path / "b", 2, 65), widths=(3, 65))
    with hps.ParameterServer(config(first, model("n", write_table(tmp_path / "c", 3, 1), widths=(1,)))) as server:
        assert server.models == ["m", "n"]
        np.testing.assert_array_equal(server.lookup(KEYS, "m", 0), rows_of(KEYS, 1, 3))
        np.testing.assert_array_equal(server.lookup(KEYS, "m", "t1"), rows_of(KEYS, 2, 65))
        np.testing.assert_array_equal(server.lookup(KEYS, "n", np.int64(0)), rows_of(KEYS, 3, 1))


def test_unknown_models_and_tables(server):
    with pytest.raises(errors.NotFoundError, match="no model 'x'.*'m'"):
        server.lookup([1], "x")
    with pytest.raises(errors.NotFoundError, match="no table 'x'.*'t0'"):
        server.lookup([1], "m", "x")
    for table in (1, -1, 2**40):
        with pytest.raises(errors.InvalidArgumentError, match=f"table {table} does not exist.*1 tables"):
            server.lookup([1], "m", table)
    with pytest.raises(errors.NotFoundError):
        server.tables("x")


def test_arguments_of_another_type_are_refused_by_name(server):
    for call in (
        lambda: server.lookup(KEYS, None),
        lambda: server.lookup_report(KEYS, 3),
        lambda: server.tables(None),
        lambda: server.unload_model(None),
    ):
        with pytest.raises(TypeError, match="^model must be the name of a model"):
            call()
    for table in (None, 1.0, True, ["t0"]):
        with pytest.raises(TypeError, match="^table must be the name of a table"):
            server.lookup(KEYS, "m", table)
    with pytest.raises(errors.InvalidArgumentError, match="^keys must be integers"):
        server.lookup(None, "m")
    for wrong in ("a", "8", b"8", [8]):
        with pytest.raises(TypeError, match="^global_batch_size must be a number of samples"):
            hps.Init(ps_config_file="ps.json", global_batch_size=wrong)


def test_keys_beyond_32_bits_are_refused_where_configured(tmp_path):
    settings = config(model("m", write_table(tmp_path / "a")), supportlonglong=False)
    with hps.ParameterServer(settings) as server:
        np.testing.assert_array_equal(server.lookup(KEYS.astype(np.int32), "m"), rows_of(KEYS, 1))
        with pytest.raises(errors.OutOfRangeError, match="2147483648 at position 1"):
            server.lookup([0, 2**31], "m")


# ---- models that come and go ----------------------------------------------------------------------------------------


def test_load_replace_unload(server, tmp_path):
    server.load_model(model("n", write_table(tmp_path / "b", 2)))
    assert server.models == ["m", "n"]
    with pytest.raises(errors.AlreadyExistsError, match="'n'"):
        server.load_model(model("n", str(tmp_path / "b")))
    server.replace_model(json.dumps(model("n", write_table(tmp_path / "c", 3))))
    np.testing.assert_array_equal(server.lookup(KEYS, "n"), rows_of(KEYS, 3))
    with pytest.raises(errors.NotFoundError, match="'o'"):
        server.replace_model(model("o", str(tmp_path / "c")))
    with pytest.raises(errors.NotFoundError):
        server.replace_model(model("n", str(tmp_path / "nothing")))
    np.testing.assert_array_equal(server.lookup(KEYS, "n"), rows_of(KEYS, 3))
    server.unload_model("n")
    with pytest.raises(errors.NotFoundError, match="'n'"):
        server.lookup([1], "n")
    with pytest.raises(errors.NotFoundError, match="'n'"):
        server.unload_model("n")
    with pytest.raises(errors.InvalidArgumentError, match="sparse_filse"):
        server.load_model(model("n", sparse_filse=[]))


def test_models_as_inference_params(server, tmp_path):
    write_table(tmp_path / "b", 2)
    settings = hps.ParameterServerConfig.from_json(json.dumps(config(model("n", str(tmp_path / "b")))))
    server.load_model(settings.inference_params_array[0])
    np.testing.assert_array_equal(server.lookup(KEYS, "n"), rows_of(KEYS, 2))
    with pytest.raises(TypeError, match="InferenceParams"):
        server.load_model(["n"])


def test_threads_look_up_while_models_are_replaced(server, tmp_path):
    folders = [write_table(tmp_path / f"v{version}", version) for version in range(2, 12)]
    stop = threading.Event()
    problems: list = []
    calls = [0] * 4

    def look_up(thread: int):
        while not stop.is_set():
            rows = server.lookup(KEYS, "m")
            version = int(rows[0, 0] // 100_000)
            if not np.array_equal(rows, rows_of(KEYS, version)):
                problems.append(rows)
            calls[thread] += 1

    threads = [threading.Thread(target=look_up, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for folder in folders:
        server.replace_model(model("m", folder))
    np.testing.assert_array_equal(server.lookup(KEYS, "m"), rows_of(KEYS, 11))
    stop.set()
    for thread in threads:
        thread.join()
    assert not problems and all(calls)


def test_restart_keeps_rows_of_the_database(tmp_path):
    settings = config(model("m", write_table(tmp_path / "a")), database=tmp_path / "db")
    for source in ("folder", "persistent"):
        with hps.ParameterServer(settings) as server:
            assert server.stats()["models"][0]["tables"][0]["load"]["source"] == source
            np.testing.assert_array_equal(server.lookup(KEYS, "m"), rows_of(KEYS, 1))


# ---- statistics -----------------------------------------------------------------------------------------------------


def test_stats_are_what_was_done(server):
    server.lookup(np.arange(150), "m")
    server.lookup([1], "m")
    stats = server.stats()
    assert stats["tiers"] == {"volatile": "hash_map"}
    (entry,) = stats["models"]
    assert entry["name"] == "m" and entry["version"] == 1 and entry["lookup_latency"]["count"] == 2
    (table,) = entry["tables"]
    assert table["keys"] == 151 and table["lookups"] == 2
    assert table["rows_served"] == {"volatile": 101, "persistent": 0, "default": 50}
    assert table["volatile"]["rows"] == 100 and table["load"]["rows_read"] == 100
    assert 'hps_rows_served_total{model="m",table="t0",tier="default"} 50\n' in server.prometheus_text()


def test_an_interrupt_ends_a_load(tmp_path):
    count = 3_000_000
    folder = write_table(tmp_path / "t", keys=np.arange(count))
    config = write_config(
        tmp_path / "ps.json",
        [model_config("m", {"t": (folder, WIDTH)})],
        persistent_db={"type": "rocks_db", "path": str(tmp_path / "database")},
    )
    script = f"""
        import os, signal, threading, time
        import hierarchical_parameter_server as hps
        def interrupt():
            while not os.path.exists({str(tmp_path / "database" / "CURRENT")!r}):
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGINT)
        threading.Thread(target=interrupt, daemon=True).start()
        try:
            hps.ParameterServer({config!r})
        except KeyboardInterrupt:
            print("interrupted")
    """
    assert run_python(textwrap.dedent(script)).strip() == "interrupted"
    # Nothing half loaded is left: the next start loads the table.
    with hps.ParameterServer(config) as server:
        assert server.stats()["models"][0]["tables"][0]["load"]["source"] == "folder"
        np.testing.assert_array_equal(server.lookup([count - 1], "m"), rows_of(np.array([count - 1]), 1, WIDTH))


def test_servers_of_ones_own_are_not_the_default_server(server):
    hps.shutdown()
    assert server.lookup([1], "m").shape == (1, WIDTH)
    assert hps.stats() == {"servers": []}
    assert hps.servers() == [] and hps.prometheus_text() == ""
    hps.shutdown()
    assert server.lookup([1], "m").shape == (1, WIDTH)


# ---- closing --------------------------------------------------------------------------------------------------------


def test_a_closed_server_says_so(server, tmp_path):
    server.close()
    server.close()
    for call in (
        lambda: server.lookup([1], "m"),
        lambda: server.tables("m"),
        lambda: server.load_model(model("n", str(tmp_path / "a"))),
        lambda: server.unload_model("m"),
    ):
        with pytest.raises(errors.FailedPreconditionError, match="closed"):
            call()
    assert server.models == [] and server.stats()["models"] == []


def test_a_server_that_is_forgotten_frees_its_database(tmp_path):
    settings = config(model("m", write_table(tmp_path / "a")), database=tmp_path / "db")
    server = hps.ParameterServer(settings)
    del server
    gc.collect()
    code = f"import hierarchical_parameter_server as hps; hps.ParameterServer({settings!r}); print('opened')"
    assert run_python(code) == "opened\n"


def test_close_from_another_thread_ends_lookups(tmp_path):
    server = hps.ParameterServer(config(model("m", write_table(tmp_path / "a"))))
    started = threading.Barrier(3)
    ended: list[Exception] = []

    def look_up():
        started.wait()
        try:
            while True:
                server.lookup(KEYS, "m")
        except errors.FailedPreconditionError as error:
            ended.append(error)

    threads = [threading.Thread(target=look_up) for _ in range(2)]
    for thread in threads:
        thread.start()
    started.wait()
    server.close()
    for thread in threads:
        thread.join(60)
    assert len(ended) == 2


# ---- other processes ------------------------------------------------------------------------------------------------


def run_python(code: str, *, check: bool = True) -> str:
    """Runs code in a fresh interpreter without TensorFlow; its standard output."""
    environment = dict(os.environ, HPS_TENSORFLOW="off")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert not check or done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("ending", ["pass", "sys.exit(0)", "server.close()", "del server"])
def test_the_interpreter_ends_well_while_daemon_threads_look_up(tmp_path, ending):
    settings = config(model("m", write_table(tmp_path / "a")), database=tmp_path / "db")
    settings["volatile_db"]["initial_cache_rate"] = 0.5
    settings["volatile_db"]["cache_missed_embeddings"] = True
    code = f"""
        import sys, threading
        import numpy as np
        import hierarchical_parameter_server as hps

        server = hps.ParameterServer({settings!r})
        ready = threading.Semaphore(0)

        def look_up(server):
            count = 0
            while True:
                try:
                    server.lookup(np.arange(20000), "m")
                    server.stats()
                except hps.errors.FailedPreconditionError:
                    pass  # and on we go
                count += 1
                if count == 3:
                    ready.release()

        for _ in range(4):
            threading.Thread(target=look_up, args=(server,), daemon=True).start()
        for _ in range(4):
            ready.acquire()
        print("leaving", flush=True)
        {ending}
    """
    for _ in range(3):
        assert run_python(code) == "leaving\n"


def test_the_interpreter_ends_well_during_a_load(tmp_path):
    large = write_table(tmp_path / "large", keys=np.arange(500_000))
    settings = config(model("m", write_table(tmp_path / "a")), database=tmp_path / "db")
    code = f"""
        import threading
        import hierarchical_parameter_server as hps

        server = hps.ParameterServer({settings!r})
        started = threading.Event()

        def load():
            started.set()
            server.load_model({model("large", large)!r})

        threading.Thread(target=load, daemon=True).start()
        started.wait()
    """
    run_python(code)
    with hps.ParameterServer(settings) as server:  # and the database is in order
        np.testing.assert_array_equal(server.lookup(KEYS, "m"), rows_of(KEYS, 1))


def test_a_database_that_another_process_has_open(tmp_path):
    settings = config(model("m", write_table(tmp_path / "a")), database=tmp_path / "db")
    with hps.ParameterServer(settings):
        code = f"""
            import hierarchical_parameter_server as hps
            try:
                hps.ParameterServer({settings!r})
            except hps.errors.UnavailableError as error:
                print(isinstance(error, ConnectionError), "locked by another process" in str(error))
        """
        assert run_python(code) == "True True\n"


def test_a_forked_child_is_told_to_spawn(server):
    def child(connection):
        try:
            server.lookup([1], "m")
        except errors.FailedPreconditionError as error:
            connection.send(str(error))

    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=child, args=(sender,))
    process.start()
    assert receiver.poll(60) and "spawn" in receiver.recv()
    process.join(60)
    assert process.exitcode == 0
    np.testing.assert_array_equal(server.lookup([1], "m"), rows_of([1], 1))


def test_a_forked_child_may_end_as_it_likes(tmp_path):
    settings = config(model("m", write_table(tmp_path / "a")), database=tmp_path / "db")
    code = f"""
        import os, sys, threading
        import hierarchical_parameter_server as hps

        server = hps.ParameterServer({settings!r})
        hps.stats()
        child = os.fork()
        if child == 0:
            assert "error" in server.stats()
            server.close()
            del server
            sys.exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), server.lookup([1], "m").shape)
    """
    assert run_python(code) == "7 (1, 4)\n"


# ---- bad input ------------------------------------------------------------------------------------------------------

CODES = {
    "InvalidArgument": ValueError,
    "NotFound": LookupError,
    "AlreadyExists": ValueError,
    "FailedPrecondition": RuntimeError,
    "OutOfRange": ValueError,
    "ResourceExhausted": MemoryError,
    "Unavailable": ConnectionError,
    "DeadlineExceeded": TimeoutError,
    "Cancelled": Exception,
    "DataLoss": OSError,
    "Unimplemented": NotImplementedError,
    "Internal": RuntimeError,
}


@pytest.mark.parametrize("code", CODES)
def test_each_status_has_an_exception_that_is_a_built_in_too(code):
    error = getattr(errors, f"{code}Error")("message")
    assert isinstance(error, errors.HpsError) and isinstance(error, CODES[code]) and str(error) == "message"


def test_errors_of_what_is_no_file_begin_with_what_it_is(server):
    with pytest.raises(hps.errors.InvalidArgumentError, match="^configuration: /models: "):
        hps.ParameterServer({"supportlonglong": True, "models": "many"})
    with pytest.raises(hps.errors.InvalidArgumentError, match="^configuration: /models: is empty"):
        hps.memory_plan({"supportlonglong": True, "models": [], "volatile_db": 1})
    with pytest.raises(hps.errors.InvalidArgumentError, match="^configuration of the model: /wrong"):
        server.load_model({"wrong": 1})


def test_bad_configuration_files(tmp_path):
    path = tmp_path / "ps.json"
    with pytest.raises(errors.NotFoundError, match="ps.json"):
        hps.ParameterServer(path)
    path.write_text("{")
    with pytest.raises(errors.InvalidArgumentError, match="ps.json"):
        hps.ParameterServer(path)
    path.write_text(json.dumps(config(model("m", str(tmp_path), sparse_filse=[]))))
    with pytest.raises(errors.InvalidArgumentError, match=r"/models/0.*sparse_filse.*sparse_files"):
        hps.ParameterServer(path)
    with pytest.raises(errors.InvalidArgumentError, match="volatile_bd.*volatile_db"):
        hps.ParameterServer(config(volatile_bd={}))
    with pytest.raises(errors.HpsError, match=str(tmp_path)):
        hps.ParameterServer(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_configuration_file(tmp_path):
    path = tmp_path / "ps.json"
    path.write_text(json.dumps(config()))
    path.chmod(0)
    with pytest.raises(errors.FailedPreconditionError, match="ps.json"):
        hps.ParameterServer(path)


@pytest.mark.parametrize("database", [False, True])
def test_bad_table_folders(tmp_path, database):
    def opening(folder: Path, **more):
        return hps.ParameterServer(
            config(model("m", str(folder), **more), database=tmp_path / "db" if database else None)
        )

    with pytest.raises(errors.NotFoundError, match="nothing"):
        opening(tmp_path / "nothing")
    for name, size in (("key", 0), ("emb_vector", 0), ("key", 33), ("emb_vector", 33)):
        folder = tmp_path / f"{name}{size}"
        write_table(folder)
        os.truncate(folder / name, size)
        with pytest.raises(errors.DataLossError, match=f"model 'm'.*table 't0'.*{folder}"):
            opening(folder)
    write_table(tmp_path / "a")
    with pytest.raises(errors.InvalidArgumentError, match="embedding_vecsize_per_table"):
        opening(tmp_path / "a", embedding_vecsize_per_table=[WIDTH * 2])
    with opening(tmp_path / "a") as server:  # nothing that failed is in the way
        np.testing.assert_array_equal(server.lookup(KEYS, "m"), rows_of(KEYS, 1))


def test_rows_that_are_not_numbers_are_served_and_counted(tmp_path):
    folder = Path(write_table(tmp_path / "a"))
    rows = rows_of(KEYS, 1)
    rows[3, 1], rows[5] = np.nan, np.inf
    rows.tofile(folder / "emb_vector")
    with hps.ParameterServer(config(model("m", str(folder)))) as server:
        np.testing.assert_array_equal(server.lookup(KEYS, "m"), rows)
        assert server.stats()["models"][0]["tables"][0]["load"]["non_finite_rows"] == 2


def test_a_database_path_that_is_no_database(tmp_path):
    settings = config(model("m", write_table(tmp_path / "a")), database=tmp_path / "a")
    with pytest.raises(errors.InvalidArgumentError, match=str(tmp_path / "a")):
        hps.ParameterServer(settings)


def test_a_table_larger_than_the_memory_is_refused_at_once(tmp_path):
    rows = 10**11  # sparse files, which take no disk
    folder = tmp_path / "huge"
    folder.mkdir()
    for name, size in (("key", 8), ("emb_vector", 4 * WIDTH)):
        (folder / name).touch()
        os.truncate(folder / name, rows * size)
    with pytest.raises(errors.ResourceExhaustedError, match="MiB"):
        hps.ParameterServer(config(model("m", str(folder))))


# ---- readiness ------------------------------------------------------------------------------------------------------


def test_readiness_of_a_server(tmp_path):
    settings = config(model("m", write_table(tmp_path / "a")), database=tmp_path / "db")
    server = hps.ParameterServer(settings)
    assert server.ready()
    assert server.readiness() == {
        "ready": True,
        "reason": "ready",
        "models": ["m"],
        "tiers": {
            "volatile": {"store": "hash_map", "needed": False, "reachable": True, "error": ""},
            "persistent": {"store": "rocks_db", "needed": True, "reachable": True, "error": ""},
        },
    }
    server.close()
    assert not server.ready()
    assert "closed" in server.readiness()["reason"]


def test_readiness_of_the_process(tmp_path):
    hps.shutdown()
    assert not hps.ready()
    assert hps.readiness() == {
        "ready": False,
        "reason": "no server is open: call hps.Init or load a model",
        "servers": [],
    }
    path = tmp_path / "ps.json"
    path.write_text(json.dumps(config(model("m", write_table(tmp_path / "a")))))
    hps.Init(ps_config_file=path, global_batch_size=1)
    try:
        assert hps.ready()
        assert hps.readiness()["servers"][0]["models"] == ["m"]
    finally:
        hps.shutdown()
    assert not hps.ready()


def test_time_limits_and_policies_of_a_configuration(tmp_path):
    settings = config(model("m", write_table(tmp_path / "a")), database=tmp_path / "db", lookup_timeout_ms=60_000)
    settings["volatile_db"] |= {"timeout_ms": 1000, "when_unavailable": "default"}
    settings["persistent_db"] |= {"timeout_ms": 1000, "when_unavailable": "default"}
    with hps.ParameterServer(settings) as server:
        np.testing.assert_array_equal(server.lookup(KEYS, "m"), rows_of(KEYS, 1))
        assert not server.readiness()["tiers"]["persistent"]["needed"]
        states = server.stats()["tier_states"]
        assert states["volatile"] == {"store": "hash_map", "breaker": "closed", "openings": 0}
        assert 'hps_tier_reachable_state{tier="persistent"} 1' in server.prometheus_text()
