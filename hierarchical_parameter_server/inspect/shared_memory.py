"""Shared memory of multi_process_hash_map: a file in /dev/shm that servers of one host have mapped.

The file is read past its servers: nothing attaches to it, no lock is taken, no byte is changed. Rows are counted as the
tables count them; keys and values are not looked at.
"""

from __future__ import annotations

import pwd
from pathlib import Path
from typing import Any

from .. import _native
from ..errors import DataLossError
from . import stored_names
from .report import CURRENT, INCOMPLETE, SUPERSEDED, Report, Table

FOLDER = Path("/dev/shm")
_MAGIC = (0x31706D6873706834).to_bytes(8, "little")  # cc/storage/shared_layout.h
_UNLIMITED = 0


def is_shared_memory(path: Path) -> bool:
    """Whether the file says so itself, or lies where shared memory does and is no text that begins with a brace."""
    try:
        with open(path, "rb") as file:
            first = file.read(4096)
    except OSError:
        return path.resolve().parent == FOLDER
    if first.startswith(_MAGIC):
        return True
    return path.resolve().parent == FOLDER and not first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")


def inspect_shared_memory(path: Path) -> Report:
    """What the header, the tables and the records say.

    Raises:
        NotFoundError: no such file. InvalidArgumentError: a file of another program. FailedPreconditionError: a folder,
        or not readable for this user.
    """
    found = _native.inspect_shared_memory(str(path))
    report = Report("multi_process_hash_map", str(path), f"shared memory {path}")
    report.facts["file_bytes"] = found["file_bytes"]
    report.facts["memory_taken_bytes"] = found["taken_bytes"]
    report.facts["made_by_user"] = _user_name(found["user"])
    if not found["finished"]:
        report.notes.append("its making has not ended, or was cut short: the next server that starts makes it anew")
        return report
    if not found["known_format"]:
        report.problems.append(
            f"it has format {found['format']}, which this version does not know (or is of another kind of processor): "
            f"servers of this version refuse it; use the version that made it, or stop its servers and remove the file"
        )
        return report
    margin = found["overflow_margin"]
    report.facts |= {
        "memory_used_bytes": found["used_bytes"],
        "num_partitions": found["num_partitions"],
        "key_bytes": found["key_bytes"],
        "overflow_margin": "unlimited" if margin == _UNLIMITED else margin,
        "removed_with_the_last_server": found["auto_remove"],
        "attached_processes": sorted(found["processes"]),
        "attachments_since_it_was_made": found["attachments"],
    }
    if found["damage"]:
        report.problems.append(f"it is damaged: {found['damage']}; stop the servers that use it and remove the file")
    records = _records(found["records"], report)
    for name, row_bytes, rows, evicted, table_bytes in found["tables"]:
        report.tables.append(_table(name.decode("utf-8", "replace"), row_bytes, rows, table_bytes, found, records))
        report.tables[-1].bounded = margin != _UNLIMITED
        if evicted:
            report.tables[-1].notes.append(f"{evicted} rows were evicted since it was made")
    _add_findings(report)
    report.notes.append("rows are counted; keys and values are not looked at")
    if not found["processes"]:
        report.notes.append(
            "no process uses it"
            + (": the next server with the same configuration finds its rows" if found["tables"] else "")
        )
    return report


def compare_layout(report: Report, path: Path, config: dict[str, Any]) -> list[str]:
    """What keeps a server of this configuration from using the memory as it is."""
    found = _native.inspect_shared_memory(str(path))
    if not found["known_format"]:
        return []  # said by the report, or made anew
    section = config["volatile_db"]
    key_bytes = 8 if config["supportlonglong"] else 4
    unlike = [
        f"{name} is {there} there and {here} in the configuration"
        for name, there, here in (
            ("shared_memory_size", found["file_bytes"], section["shared_memory_size"]),
            ("num_partitions", found["num_partitions"], section["num_partitions"]),
            ("the bytes of a key (supportlonglong)", found["key_bytes"], key_bytes),
            ("overflow_margin", *map(_margin, (found["overflow_margin"], section.get("overflow_margin")))),
        )
        if there != here
    ]
    if not unlike:
        return []
    text = f"{report.title} has another layout: {', '.join(unlike)}"
    if found["processes"] or not found["auto_remove"]:
        return [f"{text}; a server with this configuration is refused"]
    report.notes.append(f"{text}; no process uses it: the next server makes it anew")
    return []


def _margin(rows: int | None) -> int | str:
    return "unlimited" if rows is None or rows in (_UNLIMITED, 2**64 - 1) else rows


def _user_name(number: int) -> str:
    try:
        return f"{pwd.getpwuid(number).pw_name} ({number})"
    except KeyError:
        return str(number)


def _records(found: list[tuple[bytes, bytes]], report: Report) -> dict[str, dict[str, stored_names.TableRecord]]:
    records = {}
    for raw, value in found:
        name = raw.decode("utf-8", "replace")
        model = name.removeprefix(stored_names.MODEL_RECORD_PREFIX)
        if name.startswith(stored_names.LOAD_CLAIM_PREFIX):
            loading = name.removeprefix(stored_names.LOAD_CLAIM_PREFIX)
            report.notes.append(f"a server is loading model {loading}, or ended while it did")
        elif model == name:
            report.notes.append(f"a record {name} that this program does not know")
        else:
            try:
                records[model] = stored_names.parse_model_record(value, f"the record of model {model}")
            except DataLossError as error:
                report.problems.append(str(error))
    return records


def _table(stored: str, row_bytes: int, rows: int, table_bytes: int, found: dict, records) -> Table:
    name = stored_names.parse_table_name(stored)
    table = Table(stored) if name is None else Table.stored(name, records)
    table.rows, table.bytes, table.row_bytes = rows, table_bytes, row_bytes
    table.key_bytes, table.partitions = found["key_bytes"], found["num_partitions"]
    return table


def _add_findings(report: Report) -> None:
    for table in report.tables:
        if table.state == SUPERSEDED:
            table.notes.append(
                "the generation before, which other servers may still serve, or one that is being loaded"
            )
        elif table.state == INCOMPLETE:
            table.notes.append("its load is running or was cut short")
        elif table.state != CURRENT:
            continue
        elif table.left_out_of:
            table.notes.append(
                f"its load put {table.recorded_rows} of {table.left_out_of} rows here and left the others to the "
                f"persistent_db: a server without one loads it anew"
            )
        elif not table.bounded:
            table.compare_rows("load the model anew (replace_model, or a restart)")
