"""The stored format of Redis, proven with the Python package redis, an independent client, in both directions.

And TLS in a process that has TensorFlow's own OpenSSL in it.
"""

import json

import numpy as np
import pytest
import tensorflow as tf  # exports the names of another OpenSSL into this process, before ours is used
import xxhash
from conftest import model_config, write_config, write_table
from services import RedisCluster, RedisServer, wait_until

import hierarchical_parameter_server as hps

TABLE = "hps_et.main.items"
WIDTH = 7
DEFAULT_VALUE = -2.5
PARTITIONS = 5
LONG_KEYS = np.array([0, 1, -1, 255, 256, 2**31, -(2**63), 2**63 - 1, *range(1000, 1300)], np.int64)
SHORT_KEYS = np.array([0, 1, -1, 255, 256, 2**31 - 1, -(2**31), *range(1000, 1300)], np.int64)
MASK = 2**64 - 1


def partition_of(key: int, long_keys: bool) -> int:
    """The predecessor's rule, written down once more."""

    def rotated(x: int, bits: int) -> int:
        return (x >> bits | x << 64 - bits) & MASK

    x = int(key) & (MASK if long_keys else 2**32 - 1)
    x ^= rotated(x, 25) ^ rotated(x, 50)
    x = x * 0xA24BAED4963EE407 & MASK
    x ^= rotated(x, 24) ^ rotated(x, 49)
    x = x * 0x9FB21C651E98DF25 & MASK
    return (x ^ x >> 28) % PARTITIONS


def values_key(partition: int) -> str:
    return f"hps_et{{{TABLE}/p{partition}}}v"


def raw(key, long_keys: bool) -> bytes:
    return np.array(key).astype("<i8" if long_keys else "<i4").tobytes()


def rows_of(keys, seed=1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(len(keys), WIDTH)).astype("f4")


def volatile_db(service, **more) -> dict:
    section = {"type": "redis_cluster", "address": service.address, "num_partitions": PARTITIONS, **more}
    if service.options.secured:
        section.update(user_name=service.options.user or "default", password=service.options.password)
    if service.tls:
        section.update(enable_tls=True, tls_ca_certificate=str(service.tls.certificate("ca")))
        section.update(tls_client_certificate=str(service.tls.certificate("client")))
        section.update(tls_client_key=str(service.tls.key("client")))
    return section


def serve(tmp_path, service, keys, rows, long_keys=True, **more) -> hps.ParameterServer:
    write_table(tmp_path / "items", keys, rows)
    model = model_config("main", {"items": (tmp_path / "items", WIDTH)}, default_value_for_each_table=[DEFAULT_VALUE])
    path = write_config(tmp_path / "ps.json", [model], long_keys=long_keys, volatile_db=volatile_db(service, **more))
    return hps.ParameterServer(path)


@pytest.fixture(params=["cluster", "single"])
def service(request):
    with RedisCluster(masters=3) if request.param == "cluster" else RedisServer() as service:
        yield service


def test_the_description_tells_of_a_margin(tmp_path):
    """Otherwise `hps inspect` would take what it evicts for lost."""
    keys = np.arange(200)
    with RedisServer() as service:
        with serve(tmp_path, service, keys, rows_of(keys), overflow_margin=900), service.client() as client:
            assert client.hget(f"hps.table/{TABLE}", "overflow_margin") == b"900"
            assert client.hdel(values_key(partition_of(keys[3], True)), raw(keys[3], True)) == 1
        (table,) = hps.inspect(f"redis://{service.address}").tables
        assert (table.rows, table.recorded_rows, table.problems) == (199, 200, [])
        assert "overflow_margin has evicted others" in table.notes[0]


@pytest.mark.parametrize("long_keys", [True, False])
def test_rows_go_both_ways(tmp_path, service, long_keys):
    keys = LONG_KEYS if long_keys else SHORT_KEYS
    rows = rows_of(keys)
    with serve(tmp_path, service, keys, rows, long_keys) as server, service.client() as client:
        np.testing.assert_array_equal(server.lookup(keys, "main"), rows)

        # What we wrote, read by the other client.
        partitions = [partition_of(key, long_keys) for key in keys]
        assert set(partitions) == set(range(PARTITIONS))
        for key, partition, row in zip(keys, partitions, rows, strict=True):
            assert client.hget(values_key(partition), raw(key, long_keys)) == row.tobytes()
        assert sum(client.hlen(values_key(i)) for i in range(PARTITIONS)) == len(keys)
        assert client.hgetall(f"hps.table/{TABLE}") == {
            b"num_partitions": b"5",
            b"row_bytes": b"28",
            b"key_bytes": b"8" if long_keys else b"4",
            b"id": client.hget(f"hps.table/{TABLE}", "id"),
        }

        # What the other client writes, changes and removes, read by us.
        new_keys = np.arange(5000, 5200)
        new_rows = rows_of(new_keys, seed=2)
        for key, row in zip(new_keys, new_rows, strict=True):
            client.hset(values_key(partition_of(key, long_keys)), raw(key, long_keys), row.tobytes())
        client.hset(values_key(partitions[0]), raw(keys[0], long_keys), new_rows[0].tobytes())
        client.hdel(values_key(partitions[1]), raw(keys[1], long_keys))
        np.testing.assert_array_equal(server.lookup(new_keys, "main"), new_rows)
        np.testing.assert_array_equal(server.lookup(keys[:1], "main"), new_rows[:1])
        np.testing.assert_array_equal(server.lookup(keys[1:2], "main"), np.full((1, WIDTH), DEFAULT_VALUE, "f4"))
        np.testing.assert_array_equal(server.lookup(keys[2:], "main"), rows[2:])


@pytest.mark.parametrize("long_keys", [True, False])
def test_what_another_client_wrote_is_served_without_a_load(tmp_path, service, long_keys):
    """The other client writes the table; our loader never touches it, and there is no folder that it could load."""
    keys = LONG_KEYS if long_keys else SHORT_KEYS
    rows = rows_of(keys)
    with service.client() as client:
        for key, row in zip(keys, rows, strict=True):
            client.hset(values_key(partition_of(key, long_keys)), raw(key, long_keys), row.tobytes())
    model = model_config("main", {"items": (tmp_path / "nowhere", WIDTH)}, default_value_for_each_table=[DEFAULT_VALUE])
    section = volatile_db(service, initialize_after_startup=False)
    path = write_config(tmp_path / "ps.json", [model], long_keys=long_keys, volatile_db=section)
    with hps.ParameterServer(path) as server, service.client() as client:
        np.testing.assert_array_equal(server.lookup(keys, "main"), rows)
        absent = np.arange(7000, 7100)
        np.testing.assert_array_equal(server.lookup(absent, "main"), np.full((100, WIDTH), DEFAULT_VALUE, "f4"))
        # Each row lies where it was, and nowhere else.
        for key, row in zip(keys, rows, strict=True):
            assert client.hget(values_key(partition_of(key, long_keys)), raw(key, long_keys)) == row.tobytes()
        hashes = {name.decode() for name in client.scan_iter("hps_et*")}
        assert hashes == {values_key(i) for i in range(PARTITIONS)}


def old_values_key(key, long_keys: bool) -> str:
    """The hash of a key's row in the predecessor's layout of 4.1 and earlier, by the package xxhash."""
    return f"{TABLE}/p{xxhash.xxh3_64_intdigest(raw(key, long_keys)) % PARTITIONS}/v"


@pytest.mark.parametrize("long_keys", [True, False])
def test_the_layout_before_4_2_goes_both_ways(tmp_path, service, long_keys):
    """The other client writes it and we serve it; what we write into such a table, it reads where it looks for it."""
    keys = LONG_KEYS if long_keys else SHORT_KEYS
    rows = rows_of(keys)
    old, promoted = np.arange(len(keys)) % 3 > 0, np.arange(len(keys)) % 3 == 0  # in Redis; in the database alone
    with service.client() as client:
        for key, row in zip(keys[old], rows[old], strict=True):
            client.hset(old_values_key(key, long_keys), raw(key, long_keys), row.tobytes())
        names = {name.decode() for name in client.scan_iter("*")}
        assert names == {f"{TABLE}/p{i}/v" for i in range(PARTITIONS)}

        write_table(tmp_path / "items", keys[promoted], rows[promoted])
        model = model_config(
            "main", {"items": (tmp_path / "items", WIDTH)}, default_value_for_each_table=[DEFAULT_VALUE]
        )
        path = write_config(
            tmp_path / "ps.json",
            [model],
            long_keys=long_keys,
            volatile_db=volatile_db(service, initialize_after_startup=False, cache_missed_embeddings=True),
            persistent_db={"type": "rocks_db", "path": str(tmp_path / "database")},
        )
        with hps.ParameterServer(path) as server:
            found, report = server.lookup_report(keys, "main")
            np.testing.assert_array_equal(found, rows)
            served = {name: report[f"rows_from_{name}"] for name in ("volatile", "persistent", "default")}
            assert served == {"volatile": old.sum(), "persistent": promoted.sum(), "default": 0}
            absent = server.lookup(np.arange(7000, 7100), "main")
            np.testing.assert_array_equal(absent, np.full((100, WIDTH), DEFAULT_VALUE, "f4"))

            def count() -> int:
                return sum(client.hlen(f"{TABLE}/p{i}/v") for i in range(PARTITIONS))

            wait_until(lambda: count() == len(keys), "the rows to be promoted")
            for key, row in zip(keys, rows, strict=True):
                assert client.hget(old_values_key(key, long_keys), raw(key, long_keys)) == row.tobytes()
            assert not list(client.scan_iter("hps_et{*"))  # nothing in the layout of 4.2
            assert client.hget(f"hps.table/{TABLE}", "layout") == b"4.1"

            # Changes and removals by the other client.
            first, second = keys[promoted][:2]
            client.hset(old_values_key(first, long_keys), raw(first, long_keys), rows[-1].tobytes())
            np.testing.assert_array_equal(server.lookup([first], "main"), rows[-1:])
            assert client.hdel(old_values_key(second, long_keys), raw(second, long_keys)) == 1
            np.testing.assert_array_equal(server.lookup([second], "main"), rows[promoted][1:2])  # from the database


def test_row_of_another_length_fails_the_lookup(tmp_path, service):
    with serve(tmp_path, service, LONG_KEYS, rows_of(LONG_KEYS)) as server, service.client() as client:
        client.hset(values_key(partition_of(255, True)), raw(255, True), b"short")
        with pytest.raises(Exception, match=f'"{TABLE}": key 255 has a row of 5 bytes instead of 28'):
            server.lookup(np.array([1, 255]), "main")
        assert server.lookup(np.array([1]), "main").shape == (1, WIDTH)


def test_tls_beside_tensorflow(tmp_path, monkeypatch):
    """A cluster that speaks TLS only, with a user, through a layer's op and without one."""
    with RedisCluster(masters=3, tls=True, user="trainer", password="s3cret-of-the-test") as service:
        monkeypatch.setenv("HPS_TEST_PASSWORD", service.options.password)
        keys = np.arange(20_000)
        rows = rows_of(keys)
        write_table(tmp_path / "items", keys, rows)
        model = model_config("main", {"items": (tmp_path / "items", WIDTH)})
        section = volatile_db(service)
        del section["password"]
        section["password_env"] = "HPS_TEST_PASSWORD"
        path = write_config(tmp_path / "ps.json", [model], volatile_db=section)
        hps.shutdown()
        hps.Init(ps_config_file=path, global_batch_size=1024)
        layer = hps.LookupLayer(model_name="main", table_id=0, emb_vec_size=WIDTH, emb_vec_dtype=tf.float32)
        np.testing.assert_array_equal(layer(tf.constant(keys)).numpy(), rows)
        lookup = tf.function(layer)
        for _ in range(3):
            np.testing.assert_array_equal(lookup(tf.constant(keys[::-1].copy())).numpy(), rows[::-1])
        with hps.ParameterServer(path) as server:  # a second set of connections
            np.testing.assert_array_equal(server.lookup(keys, "main"), rows)
            assert service.options.password not in json.dumps(server.stats())
        hps.shutdown()


def test_the_servers_certificate_is_checked(tmp_path):
    with RedisServer(tls=True) as service:
        other = {"tls_ca_certificate": str(service.tls.certificate("other_ca"))}
        with pytest.raises(Exception, match="certificate is not accepted"):
            _serve_tls(tmp_path, service, other)
        with pytest.raises(Exception, match="there is no file or folder"):
            _serve_tls(tmp_path, service, {"tls_ca_certificate": "nowhere.crt"})
        with pytest.raises(Exception, match="tls_server_name_identification"):
            _serve_tls(tmp_path, service, {"tls_server_name_identification": "other.example"})


def _serve_tls(tmp_path, service, changes: dict) -> None:
    keys = np.arange(3)
    write_table(tmp_path / "items", keys, rows_of(keys))
    model = model_config("main", {"items": (tmp_path / "items", WIDTH)})
    section = {**volatile_db(service), **changes}
    hps.ParameterServer(write_config(tmp_path / "ps.json", [model], volatile_db=section)).close()
