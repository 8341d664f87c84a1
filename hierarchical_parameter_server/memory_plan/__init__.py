"""What a configuration will need on the host, on each GPU, in Redis and on disk, before anything is loaded."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from .. import _native
from ..config import ParameterServerConfig, plain_document
from ..errors import HpsError
from . import machine, sizes
from .keys import look_at_keys
from .placement import propose
from .plan import MemoryPlan, Resource, TablePlan

__all__ = ["MemoryPlan", "memory_plan"]


def memory_plan(
    config: str | os.PathLike | dict | ParameterServerConfig,
    host_memory: int | None = None,
    gpu_memory: int | None = None,
) -> MemoryPlan:
    """Plans a server out of the sizes of its table folders and a look at their keys. Nothing is loaded or opened.

    Args:
        config: path of a ps.json, a dict or a ParameterServerConfig.
        host_memory: bytes to spare on the host; without it those of this machine and its control group.
        gpu_memory: bytes to spare on each GPU; without it those of this machine's GPUs.

    Raises:
        hps.errors.HpsError: the configuration is wrong, or a table's folder is missing or damaged.
        TypeError: a number of bytes is none.
    """
    for name, size in (("host_memory", host_memory), ("gpu_memory", gpu_memory)):
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 0):
            raise TypeError(f"{name} must be a number of bytes, such as 80 << 30, got {size!r}")
    canonical, origin = _canonical(config)
    volatile, persistent = canonical["volatile_db"], canonical["persistent_db"]
    all_tables = [table for model in canonical["models"] for table in _tables(model, canonical)]
    _count_shared_once(all_tables)
    tables = [table for table in all_tables if not table.counted_with]
    host = Resource("host memory", available=machine.available_host_bytes() if host_memory is None else host_memory)
    plan = MemoryPlan(origin, volatile["type"], persistent["type"], all_tables, host)
    if volatile["type"] != "disabled" or persistent["type"] != "disabled":
        host.temporary["buffers of the loader, some of which the allocator may keep"] = min(
            sizes.LOADER_BUFFERS, 2 * max(table.rows * (8 + table.row_bytes) for table in tables)
        )
    largest_model = _largest_model(tables, "volatile_bytes")
    in_process = volatile["type"] == "hash_map"
    if in_process:
        host.items["tables in the hash map"] = sum(table.volatile_bytes for table in tables)
        host.temporary["a model's next version beside it"] = largest_model
    if volatile["type"] == "redis_cluster":
        plan.redis = Resource(f"Redis {volatile['address']}, all masters together")
        plan.redis.items["tables"] = sum(table.volatile_bytes for table in tables)
        plan.redis.temporary["a model's version before, kept for nodes that still serve it"] = largest_model
    if volatile["type"] == "multi_process_hash_map":
        title = f"shared memory {volatile['shared_memory_name']}"
        room = [volatile["shared_memory_size"], machine.free_shared_memory_bytes(volatile["shared_memory_name"])]
        plan.shared = Resource(title, available=min(size for size in room if size is not None))
        plan.shared.items["tables"] = sum(table.volatile_bytes for table in tables)
        own = sizes.shared_memory_own_bytes(volatile["shared_memory_size"])
        plan.shared.items["lists of what is in use (1/8192 of shared_memory_size)"] = own
        plan.shared.temporary["a model's next version beside it"] = largest_model
        host.items["shared memory, once for all processes"] = plan.shared.need
    if persistent["type"] == "rocks_db":
        _add_rocksdb(plan, tables, persistent)
    if volatile["cache_missed_embeddings"] and persistent["type"] != "disabled":
        host.temporary["rows on their way up (cache_missed_embeddings)"] = sizes.PROMOTION_QUEUE
        if in_process and any(table.volatile_rows < _most_rows(table, volatile) for table in tables):
            most = sum(
                sizes.hash_map_limit_bytes(_most_rows(table, volatile), 0, table.row_bytes, *_shape(volatile))
                for table in tables
            )
            host.temporary["rows that cache_missed_embeddings brings up, in time"] = max(0, most - host.items[
                "tables in the hash map"])  # fmt: skip
    if volatile["type"] != "disabled" and persistent["type"] == "disabled":
        plan.problems += [
            f"{table.name}: the {table.volatile_rows} rows that overflow_margin leaves are not all its {table.rows}, "
            f"and no persistent_db serves the others: a server refuses the load"
            for table in tables
            if table.volatile_rows < math.ceil(table.rows * volatile["initial_cache_rate"])
        ]
    _add_gpus(plan, canonical, gpu_memory)
    buffers = ("buffers of writes to caches", "buffers of whole batches")
    gpu_available = min(
        (
            max(gpu.available - sum(gpu.items.get(name, 0) for name in buffers), 0)
            for gpu in plan.gpus.values()
            if gpu.available is not None
        ),
        default=gpu_memory,
    )
    plan.notes += propose(
        tables,
        gpu_available,
        host.available,
        volatile["num_partitions"],
        redis=volatile["type"] == "redis_cluster",
        rocksdb=persistent["type"] == "rocks_db",
    )
    for table in all_tables:
        if table.counted_with:
            first = next(other for other in tables if other.name == table.counted_with)
            table.proposal, table.reason = first.proposal, f"the same rows as {first.name} (share_tables)"
    plan.notes.append("the program around the server is not counted: interpreter, TensorFlow, the dense model")
    return plan


def _canonical(config) -> tuple[dict[str, Any], str]:
    if isinstance(config, (str, os.PathLike)):
        return json.loads(_native.load_config(os.fspath(config))), os.fspath(config)
    if isinstance(config, dict):
        text = json.dumps(plain_document(config))
    elif isinstance(config, ParameterServerConfig):
        text = config.to_json()
    else:
        raise TypeError(
            f"config must be the path of a ps.json file, a dict or a ParameterServerConfig, not {type(config).__name__}"
        )
    return json.loads(_native.parse_config(text, "configuration")), "configuration"


def _count_shared_once(tables: list[TablePlan]) -> None:
    first: dict[str, TablePlan] = {}
    for table in tables:
        if not table.shared_as or first.setdefault(table.shared_as, table) is table:
            continue
        table.counted_with = first[table.shared_as].name
        table.volatile_bytes = table.persistent_bytes = 0


def _most_rows(table: TablePlan, volatile: dict[str, Any]) -> int:
    """What overflow_margin leaves of a table's rows in the volatile tier."""
    return min(table.rows, volatile["overflow_margin"] * volatile["num_partitions"])


def _shape(volatile: dict[str, Any]) -> tuple[int, int, str]:
    """What decides about memory beside the rows."""
    return volatile["num_partitions"], volatile["overflow_margin"], volatile["overflow_policy"]


def _tables(model: dict[str, Any], config: dict[str, Any]) -> list[TablePlan]:
    volatile, persistent = config["volatile_db"], config["persistent_db"]
    key_bytes = 8 if config["supportlonglong"] else 4
    plans = []
    for folder, name, width, keys_per_sample in zip(
        model["sparse_files"],
        model["embedding_table_names"],
        model["embedding_vecsize_per_table"],
        model["maxnum_catfeature_query_per_table_per_sample"],
        strict=True,
    ):
        try:
            _native.fingerprint_table_folder(folder, width)  # makes the checks of a load
        except HpsError as error:
            raise type(error)(f"model '{model['model']}', table '{name}': {error}") from None
        rows = (Path(folder) / "key").stat().st_size // 8
        plan = TablePlan(model["model"], name, folder, rows, width, key_bytes, keys_per_sample, "", False)
        plan.shared_as = _native.shared_table_name(folder) if model["share_tables"] else ""
        # As cc/core/volatile_share.h has it: no more than the tier takes without evicting.
        cached = min(
            math.ceil(rows * volatile["initial_cache_rate"]),
            _native.capacity_rows(volatile["type"], volatile["num_partitions"], volatile["overflow_margin"]),
        )
        keys = look_at_keys(Path(folder), cached or rows)
        plan.keys = {keys.rows: "0..n-1", 0: "scattered"}.get(keys.dense_rows, "mixed")
        plan.keys_sampled = keys.sampled
        if volatile["type"] in ("hash_map", "multi_process_hash_map"):
            dense = keys.dense_rows if cached else 0  # without a cache all keys were looked at, for the proposal
            plan.volatile_rows = cached
            table_bytes = sizes.hash_map_bytes if volatile["type"] == "hash_map" else sizes.shared_map_bytes
            plan.volatile_bytes = table_bytes(cached, dense, plan.row_bytes, *_shape(volatile), keys.others_early)
        elif volatile["type"] == "redis_cluster":
            plan.volatile_rows = cached
            plan.volatile_bytes = sizes.redis_bytes(
                cached, plan.row_bytes, key_bytes, volatile["num_partitions"], _redis_keeps_access(volatile)
            )
        if persistent["type"] == "rocks_db":
            plan.persistent_bytes = sizes.rocksdb_disk_bytes(rows, plan.row_bytes, key_bytes)
        plans.append(plan)
    return plans


def _redis_keeps_access(volatile: dict[str, Any]) -> bool:
    """When or how often a row is used is kept where rows may have to leave by it."""
    return volatile["overflow_margin"] < 2**64 - 1 and volatile["overflow_policy"] != "evict_random"


def _largest_model(tables: list[TablePlan], name: str) -> int:
    sums: dict[str, int] = {}
    for table in tables:
        sums[table.model] = sums.get(table.model, 0) + getattr(table, name)
    return max(sums.values(), default=0)


def _add_rocksdb(plan: MemoryPlan, tables: list[TablePlan], persistent: dict[str, Any]) -> None:
    on_disk = sum(table.persistent_bytes for table in tables)
    plan.host.items["RocksDB: filters and indexes of its files"] = sum(
        sizes.rocksdb_filter_bytes(table.rows, table.row_bytes) for table in tables
    )
    if not persistent["read_only"]:
        loaded = sizes.rocksdb_load_bytes([(table.rows, table.row_bytes) for table in tables])
        plan.host.temporary["RocksDB: rows that are being loaded, at most"] = loaded
        plan.host.temporary["RocksDB: updates that are being written, at most"] = min(sizes.ROCKSDB_UPDATES, on_disk)
    plan.notes.append("RocksDB reads through the system's page cache: memory that is left over makes it faster")
    plan.disk = Resource(f"disk at {persistent['path']}", available=machine.free_disk_bytes(persistent["path"]))
    if persistent["read_only"]:
        plan.notes.append("the database is read-only: what it takes on disk is there already")
        return
    if (Path(persistent["path"]) / "CURRENT").exists():
        plan.notes.append("the database exists: a table that it holds already takes no further room")
    plan.disk.items["tables"] = on_disk
    plan.disk.temporary["a model's next version beside it, or files that are being merged"] = on_disk


def _add_gpus(plan: MemoryPlan, config: dict[str, Any], gpu_memory: int | None) -> None:
    free = machine.gpu_free_bytes() if gpu_memory is None else {}
    models = [model for model in config["models"] if model["gpucache"] and model["deployed_device_list"]]
    if models and gpu_memory is None and not free:
        plan.notes.append("this machine has no GPU: the CPU serves, and nothing is needed for one; to plan for a "
                          "machine that has one, give its memory (--gpu-memory 80GiB)")  # fmt: skip
        return
    pinned = pinned_rows = pinned_largest = 0
    counted: set[tuple[int, str]] = set()  # caches of shared tables, by device and name
    for model in models:
        tables = [table for table in plan.tables if table.model == model["model"]]
        plans = _native.plan_caches(json.dumps(model), [table.rows for table in tables])
        model_pinned = 0
        for device, (table_caches, workspaces, pinned_bytes) in plans.items():
            if device not in plan.gpus:
                plan.gpus[device] = Resource(f"GPU {device}", available=free.get(device, gpu_memory))
                plan.gpus[device].items["buffers of writes to caches"] = _native.cache_writer_bytes
                pinned += _native.cache_writer_bytes
            cached = 0
            for table, cache in zip(tables, table_caches, strict=True):
                table.gpu_rows, size, pinned_size = cache
                if table.shared_as:
                    if (device, table.shared_as) in counted:
                        continue
                    counted.add((device, table.shared_as))
                table.gpu_bytes = size
                cached += size
                model_pinned += pinned_size
            items = plan.gpus[device].items
            items["cached rows and their index"] = items.get("cached rows and their index", 0) + cached
            items["buffers of whole batches"] = items.get("buffers of whole batches", 0) + workspaces
            plan.gpus[device].temporary["a model's next version beside it"] = max(
                plan.gpus[device].temporary.get("a model's next version beside it", 0),
                cached + workspaces,
            )
            pinned += pinned_bytes
        pinned_rows += model_pinned
        pinned_largest = max(pinned_largest, model_pinned)
    if plan.gpus:
        plan.host.items["pinned buffers of whole batches, for the GPUs"] = pinned
        if pinned_rows:
            plan.host.items["pinned rows of caches, for each GPU its own"] = pinned_rows
            plan.host.temporary["pinned rows of a model's next version beside it"] = pinned_largest
