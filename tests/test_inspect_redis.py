"""`hps inspect` of Redis: real servers, single, clustered, with users and with TLS."""

import json
import socket
import threading
from contextlib import closing

import numpy as np
import pytest
from conftest import model_config, write_config, write_table
from services import FreePort, RedisCluster, RedisServer, Tls

import hierarchical_parameter_server as hps
from hierarchical_parameter_server.cli import main
from hierarchical_parameter_server.inspect import inspect
from hierarchical_parameter_server.inspect.redis_nodes import PASSWORD_VARIABLE, parse_place
from hierarchical_parameter_server.inspect.stored_names import partition_of

WIDTH = 6
PASSWORD = "not-to-be-seen-4711"


@pytest.fixture(autouse=True)
def _no_password(monkeypatch):
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)


def write_rows(client, table, keys, rows, num_partitions=4, key_bytes=8, access=None) -> None:
    """As the predecessor stores a table since 4.2. `access`: a function from a key to its metadata."""
    for key, row in zip(keys, rows, strict=True):
        field = int(key).to_bytes(key_bytes, "little", signed=True)
        partition = f"hps_et{{{table}/p{partition_of(field, num_partitions)}}}"
        client.hset(partition + "v", field, np.asarray(row, "<f4").tobytes())
        if access:
            client.hset(partition + "t", field, access(key))


def describe(client, table, num_partitions=4, row_bytes=4 * WIDTH, key_bytes=8) -> None:
    fields = {"num_partitions": num_partitions, "row_bytes": row_bytes, "key_bytes": key_bytes}
    client.hset(f"hps.table/{table}", mapping=fields)


def record(*lines: str) -> str:
    return "".join(f"{line}\n" for line in ("hps model record 1", *lines))


def by_name(report):
    return {table.name: table for table in report.tables}


def rows_of(count, rng):
    return rng.normal(size=(count, WIDTH)).astype("f4")


@pytest.fixture(scope="module")
def server():
    with RedisServer() as started:
        yield started


@pytest.fixture
def client(server):
    with server.client() as connected:
        connected.flushall()
        yield connected


def test_the_partition_hash_is_the_predecessors():
    # The values of PartitionHash in cc/base/hash.h.
    expected = {0: 0, 1: 494698, 2: 612614, -1: 870019, 4711: 232874, 2**32 - 1: 591700}
    for key, partition in expected.items():
        assert partition_of(key.to_bytes(8, "little", signed=True), 1_000_003) == partition
    assert partition_of((-1).to_bytes(4, "little", signed=True), 1_000_003) == expected[2**32 - 1]


def test_tables_generations_and_records(server, client, rng):
    keys, rows = np.arange(-10, 290), rows_of(300, rng)
    write_rows(client, "hps_et.films.items@1", keys, rows)
    describe(client, "hps_et.films.items@1")
    write_rows(client, "hps_et.films.items", keys[:5], rows[:5])
    describe(client, "hps_et.films.items")
    client.set("hps.record/hps.model.films", record("1\t300\titems\tthe fingerprint"))
    write_rows(client, "hps_et.half.t", keys[:150], rows[:150])
    describe(client, "hps_et.half.t")
    client.set("hps.record/hps.model.half", "hps model record 2\n0\t150\t300\tt\tf\n")
    client.set("hps.record/hps.load.ads", "somebody")
    write_rows(client, "hps_et.ads.short", [1, -1, 7], rows[:3], key_bytes=4, access=lambda key: 3)
    client.hset("hps.table/hps_et.gone.t", mapping={"num_partitions": 4, "dropping": 1})
    client.hset("hctr_et.old.t/p0/v", bytes(8), rows[0].tobytes())
    client.set("hps_et_of_somebody_else", "x")
    client.set("session:1", "x")
    report = inspect(f"redis://{server.address}", rows=5)
    assert set(by_name(report)) == {
        "hps_et.films.items@1", "hps_et.films.items", "hps_et.half.t", "hps_et.ads.short", "hps_et.gone.t",
        "hctr_et.old.t",
    }  # fmt: skip
    table = by_name(report)["hps_et.films.items@1"]
    assert (table.state, table.generation, table.recorded_rows) == ("current", 1, 300)
    assert (table.rows, table.rows_exact, table.partitions, table.key_bytes, table.width) == (300, True, 4, 8, WIDTH)
    assert table.fingerprint == "the fingerprint" and not table.problems
    for key, values in zip(table.sample.keys, table.sample.values, strict=True):
        np.testing.assert_array_equal(np.float32(values), rows[key + 10, :4])
    assert by_name(report)["hps_et.films.items"].state == "superseded"
    assert "put 150 of 300 rows here" in by_name(report)["hps_et.half.t"].notes[0]
    short = by_name(report)["hps_et.ads.short"]
    assert (short.key_bytes, short.rows, short.access_rows, sorted(short.sample.keys)) == (4, 3, 3, [-1, 1, 7])
    assert "another program wrote it" in short.notes[0]
    assert "layout of 4.1" in "".join(by_name(report)["hctr_et.old.t"].notes)
    assert report.others == ["hps_et_of_somebody_else"]
    assert any("hps_et.gone.t is being dropped" in note for note in report.notes)
    assert any("loading model ads" in note for note in report.notes)
    assert not report.all_problems()


def test_bytes_are_those_that_redis_uses(server, client, rng):
    before = client.info("memory")["used_memory"]
    keys, rows = np.arange(20_000), rows_of(20_000, rng)
    for partition in range(4):
        of_partition = [i for i in keys if partition_of(int(i).to_bytes(8, "little"), 4) == partition]
        client.hset(f"hps_et{{hps_et.a.t/p{partition}}}v", mapping={
            int(i).to_bytes(8, "little"): rows[i].tobytes() for i in of_partition})  # fmt: skip
    used = client.info("memory")["used_memory"] - before
    (table,) = inspect(server.address).tables
    assert not table.bytes_exact and table.bytes == pytest.approx(used, rel=0.15)
    assert table.rows == 20_000


def test_what_does_not_fit_together_is_a_problem(server, client, rng):
    rows = rows_of(40, rng)
    write_rows(client, "hps_et.a.misplaced", range(40), rows, num_partitions=2)
    describe(client, "hps_et.a.misplaced", num_partitions=8)
    write_rows(client, "hps_et.a.wide", range(40), rows)
    describe(client, "hps_et.a.wide", row_bytes=4)
    client.hset("hps.table/hps_et.a.broken", "num_partitions", "many")
    client.set("hps_et{hps_et.a.string/p0}v", "no hash")
    client.set("hps.record/hps.model.future", "hps model record 9\n")
    report = inspect(server.address)
    assert "are not in the partition where num_partitions 8" in by_name(report)["hps_et.a.misplaced"].problems[0]
    assert "rows of 4 bytes, and they have 24" in by_name(report)["hps_et.a.wide"].problems[0]
    assert "is no hash" in by_name(report)["hps_et.a.string"].problems[0]
    problems = report.all_problems()
    assert any("hps_et.a.broken cannot be understood" in problem for problem in problems)
    assert any("format version '9'" in problem for problem in problems)


def test_lost_rows_are_a_problem(server, client, rng, capsys):
    write_rows(client, "hps_et.films.items", range(40), rows_of(40, rng))
    describe(client, "hps_et.films.items")
    client.set("hps.record/hps.model.films", record("0\t40\titems\tfp"))
    assert main(["inspect", server.address]) == 0
    field = (3).to_bytes(8, "little")
    assert client.hdel(f"hps_et{{hps_et.films.items/p{partition_of(field, 4)}}}v", field) == 1
    assert main(["inspect", server.address]) == 1
    assert "it holds 39 of the 40 that it held when it was loaded (1 are missing)" in capsys.readouterr().out
    client.set("hps.record/hps.model.films", record("0\t0\titems\tfp"))  # 0: not known, rows may leave
    assert main(["inspect", server.address]) == 0
    client.set("hps.record/hps.model.films", record("0\t40\titems\tfp"))
    client.hset("hps.table/hps_et.films.items", "overflow_margin", 100)  # its evictions are no loss
    assert main(["inspect", server.address]) == 0
    assert "it held 40 rows when it was loaded; overflow_margin has evicted others" in capsys.readouterr().out
    client.hdel("hps.table/hps_et.films.items", "overflow_margin")
    client.set("hps.record/hps.model.films", "hps model record 2\n0\t40\t90\titems\tfp\n")  # nor what was left out
    assert main(["inspect", server.address]) == 0
    client.set("hps.record/hps.model.films", record("2\t0\titems\tfp"))
    assert main(["inspect", server.address]) == 1
    assert "names table items, of which nothing is there" in capsys.readouterr().out


def test_a_server_never_gets_a_command_that_blocks_it(server, client, rng):
    write_rows(client, "hps_et.a.t", range(300), rows_of(300, rng), access=lambda key: 1)
    client.config_resetstat()
    inspect(server.address)
    commands = set(client.info("commandstats"))
    allowed = {"hlen", "hscan", "scan", "info", "memory|usage", "hmget", "get", "config|resetstat", "client|setinfo"}
    assert commands <= {f"cmdstat_{name}" for name in allowed}


def test_a_cluster_and_one_that_has_lost_a_node(rng, capsys):
    with RedisCluster(masters=3) as cluster:
        rows = rows_of(300, rng)
        with cluster.client() as connected:
            write_rows(connected, "hps_et.films.items", range(300), rows, num_partitions=9)
            describe(connected, "hps_et.films.items", num_partitions=9)
            connected.set("hps.record/hps.model.films", record("0\t300\titems\tfp"))
        report = inspect(f"redis://{cluster.nodes[1].address}")
        assert report.facts["cluster"] and len(report.facts["masters"]) == 3
        assert (report.tables[0].rows, report.tables[0].state, report.all_problems()) == (300, "current", [])
        cluster.nodes[2].kill()
        # The first address is that of the dead node: the next one is asked.
        place = f"redis://{cluster.nodes[2].address},{cluster.nodes[0].address}"
        assert main(["inspect", place, "--json"]) == 1
        document = json.loads(capsys.readouterr().out)
        assert 0 < document["tables"][0]["rows"] < 300
        assert f"{cluster.nodes[2].address} cannot be reached" in document["problems"][0]
        assert not document["tables"][0]["problems"]  # rows of a node that is down are not lost


def test_passwords_come_from_the_environment_and_are_never_shown(monkeypatch, capsys):
    acl = ["user reader on >other ~hps* &* -@all +ping"]
    with RedisServer(user="operator", password=PASSWORD, acl_lines=acl) as server:
        with server.client() as client:
            write_rows(client, "hps_et.a.t", range(3), np.ones((3, WIDTH)))
        place = f"redis://operator@{server.address}"
        assert main(["inspect", place]) == 1
        monkeypatch.setenv(PASSWORD_VARIABLE, "wrong")
        assert main(["inspect", place]) == 1
        monkeypatch.setenv("MINE", PASSWORD)
        assert main(["inspect", place, "--password-env", "MINE"]) == 0
        monkeypatch.setenv(PASSWORD_VARIABLE, PASSWORD)
        assert main(["inspect", place]) == 0
        monkeypatch.delenv(PASSWORD_VARIABLE)
        monkeypatch.setattr("getpass.getpass", lambda prompt: PASSWORD)
        assert main(["inspect", place, "--ask-password", "--json"]) == 0
        assert main(["inspect", place, "--password-env", "NOT_SET"]) == 1
        assert main(["inspect", f"redis://operator:{PASSWORD}@{server.address}"]) == 1
        with pytest.raises(hps.errors.FailedPreconditionError, match="user reader may not do.*allow"):
            inspect(f"redis://reader@{server.address}", password="other")
        output = "".join(capsys.readouterr())
    assert "wants a password for user operator" in output
    assert "refuses the password of user operator" in output
    assert "no environment variable NOT_SET" in output
    assert "a password does not belong in an address" in output
    assert output.count("hps_et.a.t") >= 3
    assert PASSWORD not in output


@pytest.fixture(scope="module")
def secure_server():
    with RedisServer(tls=True) as started:
        with started.client() as client:
            write_rows(client, "hps_et.a.t", range(3), np.ones((3, WIDTH)))
        yield started


def tls_arguments(tls: Tls, ca="ca", name="localhost") -> dict:
    return {
        "tls_ca": tls.certificate(ca),
        "tls_certificate": tls.certificate("client"),
        "tls_key": tls.key("client"),
        "tls_server_name": name,
    }


def test_tls(secure_server, capsys):
    place, tls = f"rediss://{secure_server.address}", secure_server.tls
    assert inspect(place, **tls_arguments(tls)).tables[0].rows == 3
    assert inspect(place, **tls_arguments(tls, name="redis.localhost")).tables[0].rows == 3
    assert inspect(place, **tls_arguments(tls, name=None)).tables[0].rows == 3
    command = ["inspect", place, "--tls-ca", tls.certificate("ca"), "--tls-cert", tls.certificate("client")]
    assert main([*command, "--tls-key", tls.key("client"), "--tls-server-name", "localhost"]) == 0
    assert "hps_et.a.t" in capsys.readouterr().out


def test_all_nodes_are_asked_for_the_host_that_was_given(rng):
    """Nodes tell 127.0.0.1 of each other; their certificate is for localhost alone."""
    with RedisCluster(masters=2, tls=True) as cluster:
        with cluster.client() as connected:
            write_rows(connected, "hps_et.films.items", range(60), rows_of(60, rng), num_partitions=9)
        for node in cluster.nodes:
            with node.client() as client:
                files = {"tls-cert-file": cluster.tls.certificate("named"), "tls-key-file": cluster.tls.key("named")}
                client.execute_command("CONFIG", "SET", *(text for file in files.items() for text in file))
        report = inspect(f"rediss://localhost:{cluster.nodes[0].port}", **tls_arguments(cluster.tls, name=None))
        assert report.all_problems() == [] and report.tables[0].rows == 60
        with pytest.raises(hps.errors.UnavailableError, match="127.0.0.1.*TLS failed.*--tls-server-name"):
            inspect(f"rediss://{cluster.nodes[0].address}", **tls_arguments(cluster.tls, name=None))


def test_tls_that_fails_says_why(secure_server):
    place, tls = f"rediss://{secure_server.address}", secure_server.tls
    for arguments in (
        tls_arguments(tls, ca="other_ca"),
        tls_arguments(tls, name="another.host"),
        {"tls_ca": tls.certificate("ca")},
    ):
        with pytest.raises(hps.errors.UnavailableError, match="TLS failed|cannot be reached"):
            inspect(place, **arguments)
    with pytest.raises(hps.errors.InvalidArgumentError, match="tls_ca: .*does not exist"):
        inspect(place, tls_ca="/nonexistent")
    with pytest.raises(hps.errors.UnavailableError, match="write rediss://"):
        inspect(f"redis://{secure_server.address}")


def test_servers_that_do_not_answer(server):
    with pytest.raises(hps.errors.UnavailableError, match="cannot be reached"):
        inspect("redis://127.0.0.1:1")
    server.nodes[0].stop()
    try:
        with pytest.raises(hps.errors.DeadlineExceededError, match="did not answer within 0.3 s"):
            inspect(server.address, timeout_seconds=0.3)
    finally:
        server.nodes[0].resume()


def test_every_address_that_does_not_answer_is_named(tmp_path, capsys):
    with closing(FreePort()) as first, closing(FreePort()) as second:
        address = f"127.0.0.1:{first.number},127.0.0.1:{second.number}"
        with pytest.raises(hps.errors.UnavailableError, match="none of the 2 addresses answers") as error:
            inspect(f"redis://{address}")
        write_table(tmp_path / "items", np.arange(50), np.ones((50, WIDTH)))
        config = write_config(
            tmp_path / "ps.json",
            [model_config("films", {"items": (tmp_path / "items", WIDTH)})],
            volatile_db={"type": "redis_cluster", "address": address},
        )
        assert main(["inspect", config]) == 1
        for said in (str(error.value), capsys.readouterr().out):
            for port in (first.number, second.number):
                assert f"Redis at 127.0.0.1:{port} cannot be reached" in said


def test_remedies_for_a_configuration_name_its_keys(tmp_path, monkeypatch):
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    write_table(tmp_path / "items", np.arange(50), np.ones((50, WIDTH)))
    with RedisServer(password=PASSWORD) as server:
        for password in ({}, {"password": "not that"}):
            volatile = {"type": "redis_cluster", "address": server.address, **password}
            models = [model_config("films", {"items": (tmp_path / "items", WIDTH)})]
            config = write_config(tmp_path / "ps.json", models, volatile_db=volatile)
            (problem,) = inspect(config).all_problems()
            assert "password_env, password_file) in" in problem and "--password-env" not in problem
            with pytest.raises(
                hps.errors.FailedPreconditionError, match=r"password.*\(or password_env, password_file\)"
            ):
                hps.ParameterServer(config)


def test_what_is_no_redis_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(hps.errors.UnavailableError):
            inspect(f"127.0.0.1:{listener.getsockname()[1]}", timeout_seconds=10)
        thread.join(20)


def test_addresses():
    options = parse_place("rediss://me%40x@[::1]:7001,cache")
    assert (options.addresses, options.user, options.tls) == ([("::1", 7001), ("cache", 7000)], "me@x", True)
    assert parse_place("cache:6379").addresses == [("cache", 6379)]
    assert parse_place("some/folder") is None and parse_place("folder") is None
    for wrong in (
        "redis://",
        "redis://a:b:1",
        "redis://host:0",
        "redis://host:70000",
        "redis://host:1/2",
        "host:99999",
    ):
        with pytest.raises(hps.errors.InvalidArgumentError):
            parse_place(wrong)


def test_a_configuration_with_redis(tmp_path, server, client, rng, monkeypatch):
    write_table(tmp_path / "items", np.arange(50), rows_of(50, rng))
    write_rows(client, "hps_et.films.items", range(50), rows_of(50, rng))
    volatile = {"type": "redis_cluster", "address": server.address, "num_partitions": 5, "password_env": "MINE"}
    config = write_config(
        tmp_path / "ps.json", [model_config("films", {"items": (tmp_path / "items", WIDTH)})], volatile_db=volatile
    )
    report = inspect(config)
    assert "MINE (password_env) is not set" in report.all_problems()[0]
    volatile["password_env"] = ""
    config = write_config(
        tmp_path / "ps.json", [model_config("films", {"items": (tmp_path / "items", WIDTH)})], volatile_db=volatile
    )
    report = inspect(config)
    assert report.parts[1].tables[0].rows == 50
    assert any("4 partitions and the configuration 5" in problem for problem in report.all_problems())
