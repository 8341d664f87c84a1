"""Tables in Redis: what the keys of one keyspace, ours and the predecessor's, say.

Only commands that do not block the server: SCAN, HLEN, HSCAN with a small COUNT, MEMORY USAGE with samples.
"""

from __future__ import annotations

import dataclasses
import re

import redis

from ..errors import DataLossError
from . import stored_names
from .redis_nodes import Nodes, RedisOptions, find_nodes, mapped, parse_addresses
from .report import CURRENT, INCOMPLETE, SAMPLE_ROWS, SUPERSEDED, Report, Table

TABLE_PREFIX = "hps.table/"
_FIELDS = ("num_partitions", "row_bytes", "key_bytes")
_MARGIN = "overflow_margin"  # a field of tables that give up rows by themselves
_SCAN_PATTERN = "h[pc][st]*"  # hps* and hctr*
_SCAN_COUNT = 10_000
_MEMORY_SAMPLES = 100

_PARTITION = re.compile(r"hps_et\{(?P<table>[^{}]+)/p(?P<partition>\d+)\}(?P<kind>[vt])")
_OLD_PARTITION = re.compile(r"(?P<table>h(?:ps|ctr)_et\.[^/{}]+)/p(?P<partition>\d+)/(?P<kind>[vt])")


@dataclasses.dataclass
class _Partition:
    client: redis.Redis
    key: bytes


@dataclasses.dataclass
class _Found:
    """The keys of one table."""

    values: dict[int, _Partition] = dataclasses.field(default_factory=dict)
    access: dict[int, _Partition] = dataclasses.field(default_factory=dict)
    old_layout: bool = False
    fields: dict[str, int] | None = None  # of our description of the table
    bounded: bool = False  # it gives up rows by itself
    dropping: bool = False


def inspect_redis(options: RedisOptions, shown: int) -> Report:
    """Lists the tables of a server or cluster; nodes that are down are problems of the report.

    Raises:
        HpsError: no node can be reached, or the user is refused.
    """
    nodes = find_nodes(options)
    try:
        report = _inspect(nodes, options, shown)
    except (redis.RedisError, OSError) as error:
        raise mapped(error, options.addresses[0], options) from error
    finally:
        nodes.close()
    return report


def _inspect(nodes: Nodes, options: RedisOptions, shown: int) -> Report:
    kind = "cluster" if nodes.cluster else "server"
    report = Report("redis", options.place, f"Redis {kind} {options.place}")
    report.facts |= {"version": nodes.info.get("redis_version", "?"), "cluster": nodes.cluster}
    if nodes.cluster:
        report.facts["masters"] = sorted(nodes.clients)
    report.problems += [f"its keys are missing here: {problem}" for problem in nodes.unreachable.values()]
    tables: dict[str, _Found] = {}
    records: dict[str, dict[str, stored_names.TableRecord]] = {}
    used_bytes = 0
    all_nodes = not nodes.unreachable
    for address, client in nodes.clients.items():
        try:
            used_bytes += client.info("memory")["used_memory"]
            for key in client.scan_iter(match=_SCAN_PATTERN, count=_SCAN_COUNT):
                _take_key(client, key, tables, records, report)
        except (redis.RedisError, OSError) as error:
            failure = mapped(error, parse_addresses(address)[0], options)
            if not nodes.cluster:
                raise failure from error
            report.problems.append(f"its keys are missing here: {failure}")
            all_nodes = False
    report.facts["used_memory_bytes"] = used_bytes
    for stored in sorted(tables):
        report.tables.append(_inspect_table(stored, tables[stored], records, shown))
    _add_findings(report, records, all_nodes)
    return report


def _take_key(client, key: bytes, tables: dict[str, _Found], records, report: Report) -> None:
    text = key.decode("utf-8", "replace")
    match = _PARTITION.fullmatch(text) or _OLD_PARTITION.fullmatch(text)
    if match and stored_names.parse_table_name(match["table"]):
        found = tables.setdefault(match["table"], _Found())
        found.old_layout |= "{" not in text
        partitions = found.values if match["kind"] == "v" else found.access
        partitions[int(match["partition"])] = _Partition(client, key)
    elif text.startswith(TABLE_PREFIX) and stored_names.parse_table_name(text.removeprefix(TABLE_PREFIX)):
        name = text.removeprefix(TABLE_PREFIX)
        try:
            *fields, margin, dropping = client.hmget(key, *_FIELDS, _MARGIN, "dropping")
            if dropping is not None:
                report.notes.append(f"the table {name} is being dropped, or its dropping was cut short")
                tables.setdefault(name, _Found()).dropping = True
                return
            named = zip(_FIELDS, fields, strict=True)
            tables.setdefault(name, _Found()).fields = {field: int(value) for field, value in named}
            tables[name].bounded = margin is not None
        except (TypeError, ValueError, redis.ResponseError):
            report.problems.append(f"the description {text} cannot be understood; drop the table, or load it anew")
    elif text.startswith(stored_names.RECORD_PREFIX + stored_names.MODEL_RECORD_PREFIX):
        model = text.removeprefix(stored_names.RECORD_PREFIX + stored_names.MODEL_RECORD_PREFIX)
        try:
            records[model] = stored_names.parse_model_record(client.get(key), f"the record of model {model}")
        except (DataLossError, redis.ResponseError, AttributeError) as error:
            report.problems.append(str(error))
    elif text.startswith(stored_names.RECORD_PREFIX + stored_names.LOAD_CLAIM_PREFIX):
        model = text.removeprefix(stored_names.RECORD_PREFIX + stored_names.LOAD_CLAIM_PREFIX)
        report.notes.append(f"a node is loading model {model}, or ended while it did (record {text})")
    elif text.startswith(stored_names.RECORD_PREFIX):
        report.notes.append(f"a record {text.removeprefix(stored_names.RECORD_PREFIX)} that this program does not know")
    elif text.startswith(("hps_et", "hctr_et", TABLE_PREFIX)):
        report.others.append(text)


def _inspect_table(stored: str, found: _Found, records, shown: int) -> Table:
    table = Table.stored(stored_names.parse_table_name(stored), records)
    table.bounded = found.bounded
    partitions = max([0, *(number + 1 for number in (*found.values, *found.access))])
    table.partitions = found.fields["num_partitions"] if found.fields else partitions
    table.rows = table.access_rows = table.bytes = 0
    table.bytes_exact = False
    keys: list[bytes] = []
    rows: list[bytes] = []
    misplaced = 0
    try:
        for number, partition in sorted(found.values.items()):
            table.rows += partition.client.hlen(partition.key)
            table.bytes += partition.client.memory_usage(partition.key, samples=_MEMORY_SAMPLES) or 0
            wanted = -(-SAMPLE_ROWS // max(1, len(found.values)))
            _, sample = partition.client.hscan(partition.key, count=wanted)
            for key, row in list(sample.items())[:wanted]:
                keys.append(key)
                rows.append(row)
                misplaced += stored_names.partition_of(key, max(1, table.partitions)) != number
        for partition in found.access.values():
            table.access_rows += partition.client.hlen(partition.key)
            table.bytes += partition.client.memory_usage(partition.key, samples=_MEMORY_SAMPLES) or 0
    except redis.ResponseError as error:
        table.problems.append(f"a key of it is no hash, or moved to another node meanwhile ({error}); try again")
    table.take_sample(keys, rows, shown)
    _check_layout(table, found, partitions, misplaced, len(keys))
    return table


def _check_layout(table: Table, found: _Found, partitions: int, misplaced: int, sampled: int) -> None:
    if found.old_layout:
        table.notes.append("in the predecessor's layout of 4.1 and earlier, which places keys by another hash")
        return
    if misplaced:
        table.problems.append(
            f"{misplaced} of {sampled} keys are not in the partition where num_partitions {table.partitions} puts "
            f"them: programs with another number of partitions wrote to it; drop it and load it anew"
        )
    if found.dropping:
        return
    if found.fields is None:
        table.notes.append("without our description: another program wrote it; num_partitions is the highest seen")
        return
    if partitions > table.partitions:
        table.problems.append(f"described with {table.partitions} partitions, and there is a number {partitions - 1}")
    for what, described, seen in (
        ("rows", found.fields["row_bytes"], table.row_bytes),
        ("keys", found.fields["key_bytes"], table.key_bytes),
    ):
        if seen is not None and seen != described:
            table.problems.append(f"it is described with {what} of {described} bytes, and they have {seen}")
    table.row_bytes = table.row_bytes or found.fields["row_bytes"]
    table.key_bytes = table.key_bytes or found.fields["key_bytes"]


def _compare_rows(table: Table, all_nodes: bool) -> None:
    if table.left_out_of:
        table.notes.append(
            f"its load put {table.recorded_rows} of {table.left_out_of} rows here and left the others to the "
            f"persistent_db: a node without one loads it anew"
        )
    elif not all_nodes or table.problems:
        return
    elif table.bounded and table.rows < table.recorded_rows:
        table.notes.append(f"it held {table.recorded_rows} rows when it was loaded; {_MARGIN} has evicted others")
    else:
        table.compare_rows(
            "load the model anew (replace_model, or a restart), and see that Redis loses no rows (maxmemory-policy "
            "noeviction, replicas)"
        )


def _add_findings(report: Report, records, all_nodes: bool) -> None:
    """`all_nodes`: that no rows are missing because their node was not asked."""
    stored = {(table.model, table.table, table.generation) for table in report.tables}
    for table in report.tables:
        if table.state == SUPERSEDED:
            table.notes.append("the generation before, which other nodes may still serve, or one that is being loaded")
        elif table.state == INCOMPLETE:
            table.notes.append("its load is running or was cut short")
        elif table.state == CURRENT:
            _compare_rows(table, all_nodes)
    for model, tables in records.items():
        for table, record in tables.items():
            if all_nodes and (model, table, record.generation) not in stored and record.fingerprint:
                report.problems.append(
                    f"the record of model {model} names table {table}, of which nothing is there: load the model anew"
                )
