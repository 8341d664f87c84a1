"""How many bytes rows take in each tier. Every formula is held against a measurement by tests/test_memory_plan.py.

Those of the memory of this host (cc/storage/table_memory.h) and of GPUs (cc/cache/cache_plan.h) are the server's own,
which it uses to refuse loads that cannot fit. Sources of the others: measured files (RocksDB), the structures of Redis
7 with jemalloc (Redis).
"""

from __future__ import annotations

import math

from .. import _native

hash_map_bytes = _native.hash_map_table_bytes
hash_map_limit_bytes = _native.hash_map_limit_bytes
shared_map_bytes = _native.shared_table_bytes
shared_memory_own_bytes = _native.shared_memory_own_bytes
gpu_whole_table_bytes = _native.whole_table_bytes

PROMOTION_QUEUE = 64 << 20  # rows on their way up, at most
LOADER_BUFFERS = 2 * (4 << 20)  # at most

ROCKSDB_UPDATES = 256 << 20  # waiting in memory, of one database, at most
_ROCKSDB_ROW = 12.4  # length and sequence numbers, bloom filter, restart points and the hash index of a block
_ROCKSDB_BLOCK = 50  # index entry, checksum and end of a block
_ROCKSDB_BLOCK_SIZE = 2048


def _up(count: float, unit: int) -> int:
    return math.ceil(count / unit) * unit


def rocksdb_disk_bytes(rows: int, row_bytes: int, key_bytes: int) -> int:
    """Table files after a load; twice as much while they are merged, or while a new version is loaded beside it."""
    blocks = min(1.0, (key_bytes + row_bytes) / _ROCKSDB_BLOCK_SIZE)  # a row's share of one
    return round(rows * (key_bytes + row_bytes + _ROCKSDB_ROW + _ROCKSDB_BLOCK * blocks))


def rocksdb_load_bytes(tables: list[tuple[int, int]]) -> int:
    """Rows on their way into sorted files, at most. tables: rows and bytes a row."""
    return min(_native.rocksdb_bulk_bytes, sum(_native.rocksdb_load_bytes(*table) for table in tables))


def rocksdb_filter_bytes(rows: int, row_bytes: int) -> int:
    """Filters and indexes of the files, which stay in memory."""
    return round(rows * (1.25 + 30 * min(1.0, row_bytes / _ROCKSDB_BLOCK_SIZE)))


def _allocated(count: int) -> int:
    """What jemalloc takes for `count` bytes."""
    if count <= 8:
        return 8
    if count <= 128:
        return _up(count, 16)
    step = 1 << ((count - 1).bit_length() - 3)
    return _up(count, step)


def _redis_string(count: int) -> int:
    return _allocated(count + 1 + (1 if count < 32 else 3 if count < 256 else 5 if count < 65536 else 9))


_LISTPACK_ROWS, _LISTPACK_BYTES = 512, 64  # hash-max-listpack-entries, -value: Redis' defaults
_HASH_KEY = 150  # name, object and place of a hash


def _listpack_hash(rows: float, key_bytes: int, value_bytes: int) -> int:
    entries = sum(count + (2 if count < 64 else 3) for count in (key_bytes, value_bytes))
    return _allocated(round(rows * entries) + 7) + _HASH_KEY


def redis_row_bytes(partition_rows: float, row_bytes: int, key_bytes: int, access_metadata: bool) -> float:
    """One row's share of a partition of so many rows, as Redis counts it in used_memory.

    A hash of Redis: field, value, an entry of 24 bytes, and a table of pointers whose size is a power of two; while
    that grows there are two. Small hashes are one packed piece instead. `access_metadata`: a second hash tells when or
    how often the row was used.
    """
    if partition_rows <= 0:
        return 0.0
    if partition_rows <= _LISTPACK_ROWS and max(row_bytes, key_bytes) <= _LISTPACK_BYTES:
        packed = _listpack_hash(partition_rows, key_bytes, row_bytes)
        if access_metadata:
            packed += _listpack_hash(partition_rows, key_bytes, 8)
        return packed / partition_rows
    buckets = 1 << max(2, math.ceil(math.log2(max(partition_rows, 1))))
    pointers = 8 * buckets / partition_rows
    if partition_rows < 0.75 * buckets:  # the smaller table is emptied a step at each write
        pointers *= 1.5
    entry = _redis_string(key_bytes) + _allocated(24) + pointers
    total = entry + _redis_string(row_bytes)
    return total + entry + _redis_string(8) if access_metadata else total


def redis_bytes(rows: int, row_bytes: int, key_bytes: int, num_partitions: int, access_metadata: bool) -> int:
    return round(rows * redis_row_bytes(rows / num_partitions, row_bytes, key_bytes, access_metadata))
