"""How many bytes rows take in each tier. Every formula is held against a measurement by tests/test_memory_plan.py.

Sources: cc/storage/row_slab.*, hash_map_index.h and dense_index.h with docs/design/0001-hash-map-store.md (hash map),
measured files (RocksDB), the structures of Redis 7 with jemalloc (Redis), docs/architecture.md (GPU cache).
"""

from __future__ import annotations

import math

_PAGE = 4096
_HUGE_PAGE = 2 << 20
_HUGE_REGION = 32 << 20  # regions of rows from this size on ask for huge pages
_BUCKET = 64  # of the hashed index: five entries, planned for four
_RUN = 64 << 10  # of slots that a partition sets aside

PROMOTION_QUEUE = 64 << 20  # rows on their way up, at most
LOADER_BUFFERS = 2 * (4 << 20)  # at most

ROCKSDB_WRITES = 512 << 20  # of one database, at most: half for loads, half for updates
_ROCKSDB_ROW = 12.4  # length and sequence numbers, bloom filter, restart points and the hash index of a block
_ROCKSDB_BLOCK = 50  # index entry, checksum and end of a block
_ROCKSDB_BLOCK_SIZE = 2048

GPU_INDEX_LOAD = 0.8  # of keys and slot numbers in the cache's index: a bound, as on the CPU
GPU_SET = 64  # slots are rounded up to whole sets


def _up(count: float, unit: int) -> int:
    return math.ceil(count / unit) * unit


def _touched(pieces: float, total: int) -> int:
    """Bytes in memory of an area of `total` bytes into which `pieces` small writes fall at random."""
    page = _HUGE_PAGE if total >= _HUGE_PAGE else _PAGE
    pages = math.ceil(total / page)
    if pieces <= 0 or pages <= 1:
        return total if pieces > 0 else 0
    return min(total, round(pages * (1 - (1 - 1 / pages) ** pieces)) * page)


def hash_map_bytes(rows: int, row_bytes: int, num_partitions: int, dense_rows: int) -> int:
    """Anonymous memory of a hash map table that is created for `rows` and filled with them.

    Args:
        dense_rows: how many of the keys are 0 to rows - 1.
    """
    if not rows:
        return 0
    row_area = rows * row_bytes
    huge = row_area >= _HUGE_REGION
    # A partition's run is at most 1/32 of its rows, and on average half of the last one is unused.
    unused = num_partitions * min(_RUN, row_area / num_partitions / 32) / 2
    rows_in_memory = _up(row_area + (0 if huge else unused), _HUGE_PAGE if huge else _PAGE)
    return rows_in_memory + hash_map_index_bytes(rows, num_partitions, dense_rows)


def hash_map_index_bytes(rows: int, num_partitions: int, dense_rows: int) -> int:
    mean = rows / num_partitions
    partition_rows = int(max(mean, (mean + 5 * math.sqrt(mean)) * 0.8 / 0.875)) + 1
    hashed_area = max((partition_rows + 3) // 4, 2) * _BUCKET * num_partitions
    return _touched(dense_rows, rows * 4) + _touched(rows - dense_rows, hashed_area)


def hash_map_limit_bytes(rows: int, row_bytes: int) -> int:
    """What no hash map table of so many rows exceeds, also one that grew to it row by row."""
    return round(rows * (row_bytes + (8 + 8) / 0.8) * 1.1)


def rocksdb_disk_bytes(rows: int, row_bytes: int, key_bytes: int) -> int:
    """Table files after a load; twice as much while they are merged, or while a new version is loaded beside it."""
    blocks = min(1.0, (key_bytes + row_bytes) / _ROCKSDB_BLOCK_SIZE)  # a row's share of one
    return round(rows * (key_bytes + row_bytes + _ROCKSDB_ROW + _ROCKSDB_BLOCK * blocks))


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


def redis_row_bytes(partition_rows: float, row_bytes: int, key_bytes: int, access_metadata: bool) -> float:
    """One row's share of a partition of so many rows, as Redis counts it in used_memory.

    A hash of Redis: field, value, an entry of 24 bytes, and a table of pointers whose size is a power of two; while
    that grows there are two. `access_metadata`: a second hash tells when or how often the row was used.
    """
    if partition_rows <= 0:
        return 0.0
    buckets = 1 << max(2, math.ceil(math.log2(max(partition_rows, 1))))
    pointers = 8 * buckets / partition_rows
    if partition_rows < 0.75 * buckets:  # the smaller table is emptied a step at each write
        pointers *= 1.5
    entry = _redis_string(key_bytes) + _allocated(24) + pointers
    total = entry + _redis_string(row_bytes)
    return total + entry + _redis_string(8) if access_metadata else total


def redis_bytes(rows: int, row_bytes: int, key_bytes: int, num_partitions: int, access_metadata: bool) -> int:
    return round(rows * redis_row_bytes(rows / num_partitions, row_bytes, key_bytes, access_metadata))


def gpu_cache_bytes(slots: int, row_bytes: int, key_bytes: int) -> int:
    """Rows and the index of a cache on one device."""
    slots = _up(slots, GPU_SET)
    return round(slots * (row_bytes + (key_bytes + 8) / GPU_INDEX_LOAD))


def staging_bytes(max_batch_size: int, keys_per_sample: int, row_bytes: int, key_bytes: int, buffers: int) -> int:
    """Buffers for the keys and rows of whole batches, on the device; the host has pinned ones of the same size."""
    return max_batch_size * keys_per_sample * (key_bytes + row_bytes) * buffers
