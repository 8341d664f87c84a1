"""`hps memory`: plans against what is then measured, and what it proposes."""

import json
import os
import pathlib
import stat
import subprocess
import sys
import uuid

import numpy as np
import pytest
from conftest import model_config, run_python, write_config, write_table
from services import RedisServer

import hierarchical_parameter_server as hps
from hierarchical_parameter_server.cli import main
from hierarchical_parameter_server.errors import HpsError
from hierarchical_parameter_server.inspect.stored_names import partition_of
from hierarchical_parameter_server.memory_plan import keys as key_files
from hierarchical_parameter_server.memory_plan import machine, memory_plan, sizes
from hierarchical_parameter_server.units import bytes_text, parse_bytes

SEED = 5
TOLERANCE = 0.10

# Growth of anonymous memory while a server is opened, and its rows.
MEASURE = """
import ctypes, json, sys
import hierarchical_parameter_server as hps

def anonymous_bytes():
    ctypes.CDLL(None).malloc_trim(0)  # buffers that were freed but are kept for later
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("RssAnon")).split()[1]) * 1024

with hps.ParameterServer({"supportlonglong": True, "models": [{"model": "warm", "sparse_files": [sys.argv[2]],
        "embedding_vecsize_per_table": [1], "maxnum_catfeature_query_per_table_per_sample": [1], "gpucache": False}]}):
    pass  # what every first server takes: threads, buffers
before = anonymous_bytes()
with hps.ParameterServer(sys.argv[1]) as server:
    grown = anonymous_bytes() - before
    rows = sum(table["volatile"]["rows"] for model in server.stats()["models"] for table in model["tables"])
    print(json.dumps([grown, rows]))
"""


def scattered(rng, count, bits=62):
    return np.unique(rng.integers(-(2**bits), 2**bits, size=count + 1000))[:count]


def make_folder(folder, keys, width):
    """Rows of zeros cost as much as others."""
    return write_table(folder, keys, np.zeros((len(keys), width), "f4"))


def make_config(tmp_path, tables, **more):
    """`tables`: keys and width by name."""
    places = {name: (make_folder(tmp_path / name, keys, width), width) for name, (keys, width) in tables.items()}
    settings = more.pop("model", {})
    return write_config(tmp_path / "ps.json", [model_config("films", places, **settings)], **more)


# Held against measurements --------------------------------------------------------------------------------------------


def keys_of(kind, rows):
    rng = np.random.default_rng(SEED)
    return {
        "dense": lambda: np.arange(rows),
        "scattered": lambda: scattered(rng, rows),
        "shuffled": lambda: rng.permutation(rows),
        "half": lambda: np.arange(rows) + rows // 2,
        "half, dense last": lambda: (np.arange(rows) + rows // 2)[::-1],
    }[kind]()


def bounded(policy, rows, num_partitions=8):
    """A margin that holds the rows, and little more."""
    mean = rows / num_partitions
    return {"overflow_margin": int(mean + 6 * mean**0.5), "overflow_policy": policy}


@pytest.mark.parametrize(
    ("kind", "width", "rows", "policy"),
    [
        ("dense", 4, 3_000_000, None),
        ("dense", 128, 150_000, None),
        ("scattered", 4, 1_500_000, None),
        ("scattered", 16, 700_000, None),
        ("scattered", 200, 100_000, None),
        ("shuffled", 16, 1_000_000, None),
        ("half", 16, 1_000_000, None),
        ("dense", 4, 3_000_000, "evict_oldest"),
        ("dense", 4, 3_000_000, "evict_least_used"),
        ("dense", 1, 3_000_000, "evict_least_used"),
        ("scattered", 4, 1_500_000, "evict_oldest"),
        ("scattered", 4, 1_500_000, "evict_random"),
    ],
)
def test_hash_map_takes_what_was_planned(tmp_path, kind, width, rows, policy):
    volatile = {"type": "hash_map", "num_partitions": 8, **(bounded(policy, rows) if policy else {})}
    config = make_config(tmp_path, {"items": (keys_of(kind, rows), width)}, volatile_db=volatile)
    plan = memory_plan(config).host
    assert set(plan.items) == {"tables in the hash map"}
    warm = make_folder(tmp_path / "warm", np.arange(10), 1)
    done = run_python(MEASURE, config, warm, cwd=tmp_path, HPS_TENSORFLOW="off")
    measured, loaded = json.loads(done.stdout.splitlines()[-1])
    assert loaded == rows
    print(f"{kind} width {width} {policy}: planned {plan.need}, measured {measured}: {plan.need / measured:.3f}")
    assert plan.need == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "width", "rows", "policy"),
    [
        ("dense", 4, 1_000_000, None),
        ("dense", 4, 1_000_000, "evict_oldest"),
        ("dense", 3, 20_000, None),
        ("dense", 64, 100_000, "evict_random"),
        ("scattered", 4, 700_000, None),
        ("scattered", 4, 700_000, "evict_least_used"),
        ("scattered", 1, 1_000_000, "evict_oldest"),
        ("scattered", 200, 30_000, None),
        ("scattered", 16, 2_000, None),
        ("shuffled", 16, 300_000, None),
        ("half", 4, 700_000, None),
        ("half, dense last", 4, 700_000, None),
    ],
)
def test_shared_memory_takes_what_was_planned(tmp_path, kind, width, rows, policy):
    volatile = {
        "type": "multi_process_hash_map",
        "shared_memory_name": f"hps_test_{uuid.uuid4().hex}",
        "shared_memory_size": 256 << 20,
        "num_partitions": 8,
        **(bounded(policy, rows) if policy else {}),
    }
    config = make_config(tmp_path, {"items": (keys_of(kind, rows), width)}, volatile_db=volatile)
    plan = memory_plan(config)
    file = pathlib.Path("/dev/shm", volatile["shared_memory_name"])
    with hps.ParameterServer(config) as server:
        measured = file.stat().st_blocks * 512
        assert server.stats()["models"][0]["tables"][0]["volatile"]["rows"] == rows
        again = memory_plan(config).shared
    assert not file.exists()
    print(f"{kind} width {width} {policy}: planned {plan.shared.need}, measured {measured}: "
          f"{plan.shared.need / measured:.3f}")  # fmt: skip
    assert plan.shared.need == pytest.approx(measured, rel=TOLERANCE)
    assert plan.host.need == plan.shared.need
    assert again.available == plan.shared.available == 256 << 20, "what the file has already is not missing"


@pytest.mark.parametrize(
    ("kind", "width", "long_keys"),
    [("dense", 4, True), ("scattered", 4, False), ("dense", 64, True), ("scattered", 300, True)],
)
def test_rocksdb_takes_what_was_planned(tmp_path, kind, width, long_keys):
    rng = np.random.default_rng(SEED)
    rows = 8_000_000 // (width * 4)
    keys = np.arange(rows) if kind == "dense" else scattered(rng, rows, 62 if long_keys else 30)
    config = make_config(
        tmp_path,
        {"items": (keys, width)},
        long_keys=long_keys,
        volatile_db={"type": "disabled"},
        persistent_db={"type": "rocks_db", "path": str(tmp_path / "database")},
    )
    plan = memory_plan(config)
    with hps.ParameterServer(config):
        pass
    measured = sum(file.stat().st_size for file in (tmp_path / "database").glob("*.sst"))
    assert plan.disk.items["tables"] == pytest.approx(measured, rel=TOLERANCE)
    assert "the database exists" in "".join(memory_plan(config).notes)


@pytest.mark.parametrize(
    ("width", "rows", "key_bytes", "access", "num_partitions"),
    [
        (4, 60_000, 8, False, 4),
        (16, 50_000, 8, True, 4),
        (16, 33_000, 4, False, 4),
        (64, 30_000, 8, False, 4),
        (300, 6_000, 8, True, 4),
        (4, 40_000, 8, False, 100),  # so few in a partition that Redis packs them
        (16, 40_000, 8, True, 100),
        (17, 40_000, 8, False, 100),  # rows too wide for that
    ],
)
def test_redis_takes_what_was_planned(width, rows, key_bytes, access, num_partitions):
    with RedisServer() as server, server.client() as client:
        before = client.info("memory")["used_memory"]
        partitions = [[] for _ in range(num_partitions)]
        for key in range(rows):
            raw = key.to_bytes(key_bytes, "little")
            partitions[partition_of(raw, num_partitions)].append(raw)
        row = bytes(width * 4)
        for number, fields in enumerate(partitions):
            for first in range(0, len(fields), 5000):
                some = fields[first : first + 5000]
                client.hset(f"hps_et{{hps_et.a.t/p{number}}}v", mapping=dict.fromkeys(some, row))
                if access:
                    client.hset(f"hps_et{{hps_et.a.t/p{number}}}t", mapping=dict.fromkeys(some, bytes(8)))
        measured = client.info("memory")["used_memory"] - before
    planned = sizes.redis_bytes(rows, width * 4, key_bytes, num_partitions, access)
    print(f"width {width}: planned {planned}, measured {measured}: {planned / measured:.3f}")
    assert planned == pytest.approx(measured, rel=TOLERANCE)


# What a configuration means -------------------------------------------------------------------------------------------


def test_tiers_and_rates(tmp_path):
    tables = {"items": (np.arange(10_000), 16), "users": (np.arange(10_000) * 1000 + 70_000, 32)}
    persistent = {"type": "rocks_db", "path": str(tmp_path / "database")}
    whole = memory_plan(make_config(tmp_path, tables, persistent_db=persistent))
    assert [table.keys for table in whole.tables] == ["0..n-1", "scattered"]
    assert [table.volatile_rows for table in whole.tables] == [10_000, 10_000]
    half = memory_plan(
        make_config(
            tmp_path,
            tables,
            volatile_db={"type": "hash_map", "initial_cache_rate": 0.5, "cache_missed_embeddings": True},
            persistent_db=persistent,
        )
    )
    assert [table.volatile_rows for table in half.tables] == [5_000, 5_000]
    assert half.host.items["tables in the hash map"] < 0.6 * whole.host.items["tables in the hash map"]
    assert half.disk.need == whole.disk.need
    assert half.host.temporary["rows that cache_missed_embeddings brings up, in time"] > 5_000 * (64 + 128)
    read_only = memory_plan(
        make_config(tmp_path, tables, volatile_db={"type": "disabled"}, persistent_db={**persistent, "read_only": True})
    )
    assert read_only.disk.need == 0 and "tables in the hash map" not in read_only.host.items


def test_redis_and_its_margin(tmp_path):
    tables = {"items": (np.arange(10_000), 16)}
    volatile = {"type": "redis_cluster", "address": "cache:7000", "num_partitions": 4}
    unbounded = memory_plan(make_config(tmp_path, tables, volatile_db=volatile))
    assert unbounded.redis.need == sizes.redis_bytes(10_000, 64, 8, 4, False)
    bounded = memory_plan(make_config(tmp_path, tables, volatile_db={**volatile, "overflow_margin": 1000}))
    (table,) = bounded.tables
    assert 3_300 < table.volatile_rows < 4_000  # five standard deviations below four full partitions
    assert bounded.redis.need == sizes.redis_bytes(table.volatile_rows, 64, 8, 4, True)
    assert "a server refuses the load" in "".join(bounded.problems) and not bounded.fits


def test_gpu(tmp_path):
    """The sums are those of the server; device_server_test holds them against what a server takes."""
    tables = {"items": (np.arange(10_000), 16), "users": (np.arange(10_000), 32)}
    model = {"gpucache": True, "deployed_device_list": [0, 1], "gpucacheper": 0.5, "max_batch_size": 100}
    plan = memory_plan(make_config(tmp_path, tables, model=model), gpu_memory=1 << 30)
    assert set(plan.gpus) == {0, 1}
    gpu = plan.gpus[0]
    buckets = -(-5_000 // 7)
    caches = [buckets * (64 + 7 * width * 4) + 32 for width in (16, 32)]  # 32: what the kernels tell each other
    assert gpu.items["cached rows and their index"] == sum(caches)
    assert [table.gpu_bytes for table in plan.tables] == caches
    assert all(5_000 <= table.gpu_rows < 5_007 for table in plan.tables)
    # Two keys a sample: 200 positions of 28 bytes and their table, rows of 64 and 128 bytes with offsets and keys.
    assert gpu.items["buffers of whole batches"] == pytest.approx(200 * (28 + 16) + 100 * (64 + 128), rel=0.2)
    assert gpu.items["buffers of writes to caches"] == 8 << 20
    assert gpu.temporary["a model's next version beside it"] == sum(gpu.items.values()) - (8 << 20)
    assert plan.host.items["pinned buffers of whole batches, for the GPUs"] >= 2 * ((8 << 20) + 100 * (64 + 128))
    assert plan.fits
    static = memory_plan(
        make_config(tmp_path, tables, model={**model, "embedding_cache_type": "static"}), gpu_memory=1 << 30
    )
    assert 10_000 <= static.tables[0].gpu_rows < 11_000
    assert not any("pinned rows" in item for item in static.host.items)
    pinned = memory_plan(
        make_config(tmp_path, tables, model={**model, "embedding_cache_type": "static", "enable_pagelock": True}),
        gpu_memory=1 << 30,
    )
    slots = [table.gpu_rows for table in pinned.tables]
    assert [table.gpu_bytes for table in pinned.tables] == [rows // 7 * 64 + 32 for rows in slots]
    assert pinned.host.items["pinned rows of caches, for each GPU its own"] == 2 * (slots[0] * 64 + slots[1] * 128)
    tight = memory_plan(make_config(tmp_path, tables, model=model), gpu_memory=8 << 20)
    assert not tight.fits
    uvm = memory_plan(make_config(tmp_path, tables, model={**model, "embedding_cache_type": "uvm"}), gpu_memory=1 << 30)
    slots = [table.gpu_rows for table in uvm.tables]  # gpucacheper 0.5: four of seven rows are on the GPU
    assert [table.gpu_bytes for table in uvm.tables] == [
        rows // 7 * (64 + 4 * width * 4) + 32 for rows, width in zip(slots, (16, 32), strict=True)
    ]
    assert uvm.host.items["pinned rows of caches, for each GPU its own"] == 2 * (
        slots[0] // 7 * 3 * 64 + slots[1] // 7 * 3 * 128
    )
    small = memory_plan(
        make_config(tmp_path, tables, model={**model, "embedding_cache_type": "static", "fp8_quant": True}),
        gpu_memory=1 << 30,
    )
    assert [table.gpu_bytes for table in small.tables] == [
        rows // 7 * (64 + 7 * (4 + width)) + 32 for rows, width in zip(slots, (16, 32), strict=True)
    ]
    for gpu_memory in (None, 1 << 30):  # as any server does, with a GPU and without one
        with pytest.raises(HpsError, match="fp8_quant: is for caches that hold whole tables"):
            memory_plan(make_config(tmp_path, tables, model={**model, "fp8_quant": True}), gpu_memory=gpu_memory)


def test_a_damaged_folder_is_told_with_model_and_table(tmp_path):
    config = make_config(tmp_path, {"items": (np.arange(10), 16)})
    for path in tmp_path.rglob("key"):
        path.write_bytes(b"")
    with pytest.raises(HpsError, match="^model '[^']+', table 'items': .*key is empty"):
        memory_plan(config)


def test_a_table_is_not_placed_where_buffers_leave_no_room(tmp_path):
    config = make_config(tmp_path, {"items": (np.arange(10_000), 64)}, model={"gpucache": True, "gpucacheper": 0.1})
    assert memory_plan(config, gpu_memory=1 << 30).tables[0].proposal == "GPU"
    tight = memory_plan(config, gpu_memory=9 << 20)  # the table alone would fit
    assert tight.tables[0].gpu_bytes < 9 << 20 and tight.tables[0].proposal != "GPU"


def test_gpus_are_found_through_the_driver(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '0, 1000'\necho '1, 2000'\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert machine.gpu_free_bytes() == {0: 1000 << 20, 1: 2000 << 20}
    tool.write_text("#!/bin/sh\necho No devices were found\n")
    assert machine.gpu_free_bytes() == {}


def test_large_key_files_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(key_files, "READ_WHOLE_ROWS", 1_000_000)
    rows = 2_000_000
    keys = np.arange(rows)
    make_folder(tmp_path / "items", np.where(keys % 4 == 0, keys + 10 * rows, keys), 1)
    looked = key_files.look_at_keys(tmp_path / "items", rows)
    assert looked.sampled and looked.dense_rows == pytest.approx(0.75 * rows, rel=0.01)


# The proposal ---------------------------------------------------------------------------------------------------------


def test_hot_tables_go_to_the_fastest_tier_that_has_room(tmp_path):
    tables = {name: (np.arange(20_000) * 3 + 1, 64) for name in ("cold", "hot", "warm")}  # 5 MiB and some index each
    model = {
        "maxnum_catfeature_query_per_table_per_sample": [1, 100, 10],
        "gpucache": True,
        "deployed_device_list": [0],
    }
    config = make_config(
        tmp_path, tables, model=model, persistent_db={"type": "rocks_db", "path": str(tmp_path / "database")}
    )
    plan = memory_plan(config, host_memory=8 << 20, gpu_memory=17 << 20)  # 10 MiB of it are buffers
    assert {table.table: table.proposal for table in plan.tables} == {"hot": "GPU", "warm": "CPU", "cold": "disk"}
    assert "100 keys a sample" in plan.tables[1].reason
    assert not plan.fits and "DOES NOT FIT" in plan.to_text()
    roomy = memory_plan(config, host_memory=1 << 30, gpu_memory=1 << 30)
    assert {table.proposal for table in roomy.tables} == {"GPU"} and roomy.fits


def test_without_a_lower_tier_the_cure_is_named(tmp_path):
    plan = memory_plan(make_config(tmp_path, {"items": (np.arange(20_000), 64)}), host_memory=1 << 20)
    assert plan.tables[0].proposal == "nowhere" and "add a persistent_db" in plan.tables[0].reason
    volatile = {"type": "redis_cluster", "address": "cache:7000"}
    plan = memory_plan(
        make_config(tmp_path, {"items": (np.arange(20_000), 64)}, volatile_db=volatile), host_memory=1 << 20
    )
    assert plan.tables[0].proposal == "Redis"


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    config = make_config(tmp_path, {"items": (np.arange(20_000), 64)})
    assert main(["memory", config]) == 0
    text = capsys.readouterr().out
    assert "films  items  20,000     64  0..n-1" in text and "available: fits" in text
    assert main(["memory", config, "--json", "--host-memory", "1MiB"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["host"]["available"] == 1 << 20 and not document["fits"]
    assert document["host"]["need"] == memory_plan(config).host.need
    for wrong in ("much", "80"):
        with pytest.raises(SystemExit):
            main(["memory", config, "--gpu-memory", wrong])
        assert "write a number with a unit, such as 80GiB" in capsys.readouterr().err
    for wrong in ("80GiB", -1, True, 1.5):
        with pytest.raises(TypeError, match="gpu_memory must be a number of bytes"):
            memory_plan(config, gpu_memory=wrong)


@pytest.mark.parametrize("command", ["memory", "inspect"])
def test_the_command_says_nothing_but_its_answer(tmp_path, command):
    config = make_config(tmp_path, {"items": (np.arange(1000), 4)})
    done = subprocess.run([sys.executable, "-m", "hps_command", command, config], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "items" in done.stdout


def test_what_cannot_be_planned_is_refused(tmp_path, capsys):
    config = make_config(tmp_path, {"items": (np.arange(100), 4)})
    os.truncate(tmp_path / "items" / "emb_vector", 100)
    assert main(["memory", config]) == 1
    assert "no width fits" in capsys.readouterr().err
    assert main(["memory", str(tmp_path / "none.json")]) == 1
    with pytest.raises(TypeError, match="path of a ps.json file, a dict or a ParameterServerConfig"):
        memory_plan(3)


def test_a_dict_is_planned_like_a_file(tmp_path):
    config = make_config(tmp_path, {"items": (np.arange(100), 4)})
    with open(config) as file:
        document = json.load(file)
    assert hps.memory_plan(document).host.need == hps.memory_plan(config).host.need


def test_amounts():
    assert [bytes_text(count) for count in (0, 1023, 1024, 1536, 200 << 20, 5 << 40)] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 KiB", "200 MiB", "5.0 TiB"
    ]  # fmt: skip
    assert [parse_bytes(text) for text in ("4096", "80G", "80 GiB", "1.5kb", "1TIB")] == [
        4096, 80 << 30, 80 << 30, 1536, 1 << 40
    ]  # fmt: skip
    for wrong in ("", "G", "-1G", "1X", "1 G B"):
        with pytest.raises(ValueError, match="no amount of memory"):
            parse_bytes(wrong)
