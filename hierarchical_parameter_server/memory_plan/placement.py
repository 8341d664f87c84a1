"""Where each table should live: the hottest bytes go to the fastest tier that has room."""

from __future__ import annotations

from ..units import bytes_text
from . import sizes
from .plan import TablePlan

SPARE = 0.1  # of host and GPU memory stays free: for the process itself, and for growth


def propose(
    tables: list[TablePlan],
    gpu_available: int | None,
    host_available: int | None,
    num_partitions: int,
    redis: bool,
    rocksdb: bool,
) -> list[str]:
    """Fills in proposal and reason of each table; returns notes.

    A table is as hot as the keys of it that a sample asks for, for each byte it takes.
    """
    gpu_left = (gpu_available or 0) * (1 - SPARE)
    host_left = None if host_available is None else host_available * (1 - SPARE)
    by_heat = sorted(tables, key=lambda t: t.keys_per_sample / max(1, t.rows * t.row_bytes), reverse=True)
    spilt = []
    for table in by_heat:
        on_gpu = sizes.gpu_whole_table_bytes(table.rows, table.row_bytes)
        dense = table.rows if table.keys == "0..n-1" else 0
        on_host = sizes.hash_map_bytes(table.rows, dense, table.row_bytes, num_partitions)
        heat = f"{table.keys_per_sample} keys a sample"
        if on_gpu <= gpu_left:
            gpu_left -= on_gpu
            table.proposal = "GPU"
            table.reason = f"fits whole ({bytes_text(on_gpu)}), {heat}"
        elif host_left is None or on_host <= host_left:
            if host_left is not None:
                host_left -= on_host
            table.proposal = "CPU"
            table.reason = f"fits into the host's memory ({bytes_text(on_host)}), {heat}"
            if gpu_available:
                table.reason += "; the GPU is full of hotter tables: a cache of its hot rows there"
        else:
            spilt.append((table, on_host))
    for table, on_host in spilt:
        room = f"needs {bytes_text(on_host)} of memory, and {bytes_text(host_left)} is left"
        if redis:
            table.proposal, table.reason = "Redis", f"{room}: the memory of the cluster holds it"
        elif rocksdb:
            share = min(1.0, host_left / on_host)
            table.proposal = "disk"
            table.reason = f"{room}: all rows in RocksDB, {share:.0%} in memory, hot ones by cache_missed_embeddings"
            host_left -= share * on_host
        else:
            table.proposal = "nowhere"
            table.reason = f"{room}: add a persistent_db (rocks_db), Redis, or memory"
    if spilt and rocksdb and not redis:
        return ["initial_cache_rate is one number for all tables; bound what is brought up with overflow_margin"]
    return []
