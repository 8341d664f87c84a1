"""RocksDB databases, through the Python package rocksdict: opened read-only, beside a server that may be writing.

Nothing is written into the folder. What is seen is the database as it was when it was opened;
rows of a load that is running are seen when it has flushed them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from ..errors import (
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from . import stored_names
from .report import CURRENT, INCOMPLETE, SAMPLE_ROWS, SUPERSEDED, Report, Table

CURRENT_FILE = "CURRENT"  # every database has it
_DEFAULT_FAMILY = "default"
_OPENING_ATTEMPTS = 10  # a server that compacts may delete a file between the list of files and its opening
_COUNTED_BYTES = 16 << 20  # smaller tables are counted, as servers do for their statistics
_MANIFEST_NOTE = "hps_manifest"  # cc/storage/rocksdb_manifest.h
_NEWEST_FORMAT = 5  # format_version of table files that servers read: that of Debian's RocksDB
# A table file ends in its format_version (4 bytes) and a number that says what kind it is.
_BLOCK_BASED = 0x88E241B785F4CFF7


def is_database(folder: Path) -> bool:
    return (folder / CURRENT_FILE).exists()


def inspect_database(folder: Path, shown: int, exact: bool = False) -> Report:
    """Lists tables, generations and records of a database.

    Args:
        folder: the database.
        shown: rows of each table to show.
        exact: count the rows of all tables, which reads them.

    Raises:
        NotFoundError: no such folder. InvalidArgumentError: no database, or one of pickled Python objects.
        FailedPreconditionError: not readable, or of a newer format. DataLossError: damaged.
    """
    if not folder.exists():
        raise NotFoundError(f"{folder} does not exist")
    if not is_database(folder):
        raise InvalidArgumentError(f"{folder} is no RocksDB database: it has no file {CURRENT_FILE}")
    report = Report("rocks_db", str(folder), f"RocksDB database {folder}")
    report.problems += _manifest_problems(folder)
    with _open(folder) as (database, families):
        try:
            records = _read_records(database, report)
        except Exception as error:
            raise _mapped(error, folder, database.path()) from error
        report.problems += _format_problems(database)
        for family in sorted(families):
            name = stored_names.parse_table_name(family)
            if name is not None:
                report.tables.append(_inspect_table(database, name, records, shown, exact, folder))
            elif family != _DEFAULT_FAMILY:
                report.others.append(family)
        report.facts["sequence_number"] = database.latest_sequence_number()
    report.facts["bytes_on_disk"] = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    _add_findings(report, records)
    return report


def _manifest_problems(folder: Path) -> list[str]:
    """What a server refuses: a MANIFEST shorter than our note of it says. RocksDB opens it, without tables."""
    note = folder / _MANIFEST_NOTE
    try:
        noted = note.read_bytes()  # before the rest: a server may write
    except FileNotFoundError:
        return []  # another program's database, or one that was never flushed
    except OSError as error:
        return [f"{note} cannot be read ({error.strerror}), so nobody can say whether the MANIFEST has lost its end"]
    match = re.fullmatch(rb"(MANIFEST-\d+) (\d+)\n", noted)
    if not match:
        return [
            f"{note} is damaged (it begins with {noted[:32]!r}), so nobody can say whether the MANIFEST has lost its "
            f"end: look at the disk, and whether all tables are there; if they are, remove the file: a server writes "
            f"it anew"
        ]
    name, noted_bytes = match[1].decode(), int(match[2])
    try:
        if (folder / CURRENT_FILE).read_text(encoding="utf-8").strip() != name:
            return []
        there = (folder / name).stat().st_size
    except (OSError, ValueError):
        return []  # what is missing shows when the database is opened
    if there >= noted_bytes:
        return []
    return [
        f"{folder / name} has {there} bytes and had {noted_bytes} when it was last flushed: its end is lost, and with "
        f"it the names of table files; servers refuse the database: restore the folder, or delete it and load anew"
    ]


def _format_problems(database) -> list[str]:
    """Table files of a format that this package reads and servers do not; one of them keeps a server from starting."""
    newer: dict[int, list[str]] = {}
    linked = Path(database.path())
    for file in database.live_files():
        with contextlib.suppress(OSError):  # deleted meanwhile: not in use any more
            with open(linked / file["name"].lstrip("/"), "rb") as opened:
                opened.seek(-12, os.SEEK_END)
                version, kind = struct.unpack("<IQ", opened.read(12))
            if kind == _BLOCK_BASED and version > _NEWEST_FORMAT:
                newer.setdefault(version, []).append(file["name"].lstrip("/"))
    return [
        f"{len(files)} table files ({min(files)} and so on) have the format_version {version}, and servers refuse "
        f"them: they read up to {_NEWEST_FORMAT}; write them again with that (in rocksdict: "
        f"BlockBasedOptions.set_format_version({_NEWEST_FORMAT}))"
        for version, files in sorted(newer.items())
    ]


@contextmanager
def _open(folder: Path) -> Iterator:
    """(database, names of its families), read-only."""
    with tempfile.TemporaryDirectory(prefix="hps_inspect_") as scratch:
        for attempt in itertools.count(1):
            linked = Path(scratch, str(attempt))
            try:
                database, families = _open_linked(folder, linked)
                break
            except Exception as error:  # rocksdict raises nothing finer
                if "No such file" in str(error) and attempt < _OPENING_ATTEMPTS and is_database(folder):
                    continue
                raise _mapped(error, folder, str(linked)) from error
        with closing(database):
            yield database, families


def _open_linked(folder: Path, linked: Path) -> tuple:
    """Opens the database through a folder of links to its files: the package writes a file of its own beside them."""
    from rocksdict import AccessType, Options, Rdict

    linked.mkdir()
    for file in folder.resolve().iterdir():
        if file.is_file() and file.name != "LOCK":
            (linked / file.name).symlink_to(file)
    options = Options(raw_mode=True)
    options.create_if_missing(False)
    options.set_db_log_dir(str(linked))
    families = Rdict.list_cf(str(linked), options)
    columns = {name: options for name in families}
    return Rdict(str(linked), options, columns, AccessType.read_only()), families


def _mapped(error: Exception, folder: Path, linked: str, table: str = "") -> Exception:
    """`linked` stands in the texts of RocksDB where the folder is meant."""
    text = str(error).replace(linked, str(folder))
    text = re.sub(r"(/\d+)\.ldb\b", r"\1.sst", text)  # a missing file is looked for under its old suffix last
    text = f"{folder}{f', table {table}' if table else ''}: {text}"
    if "format_version" in text:
        return FailedPreconditionError(f"{text}; the files were written by a newer RocksDB: pip install -U rocksdict")
    if "comparator" in text:
        return InvalidArgumentError(f"{text}; its keys are Python objects, not the raw keys of tables")
    if "Permission denied" in text:
        return FailedPreconditionError(f"{text}; run as a user who may read it")
    if "lock" in text.lower() and "Resource temporarily" in text:
        return UnavailableError(f"{text}; another process holds it")
    if re.search(r"Corruption|No such file|Not a directory|Invalid argument", text):
        return DataLossError(f"{text}; the database is damaged or incomplete: restore it, or delete it and load anew")
    return UnavailableError(text)


def _read_records(database, report: Report) -> dict[str, dict[str, stored_names.TableRecord]]:
    """By model. Damaged records are problems of the report."""
    records = {}
    prefix = stored_names.RECORD_PREFIX.encode()
    for key, value in _walk(database, lambda rows: (rows.key(), rows.value()), prefix):
        if not key.startswith(prefix):
            break
        name = key[len(prefix) :].decode("utf-8", "replace")
        if not name.startswith(stored_names.MODEL_RECORD_PREFIX):
            report.notes.append(f"a record {name} of {len(value)} bytes that this program does not know")
            continue
        model = name.removeprefix(stored_names.MODEL_RECORD_PREFIX)
        try:
            records[model] = stored_names.parse_model_record(value, f"the record of model {model}")
        except DataLossError as error:
            report.problems.append(str(error))
    return records


def _walk(family, take: Callable, first: bytes = b"") -> Iterator:
    """take(iterator) for each row from the key `first` on. Raises where the rows cannot be read."""
    rows = family.iter()
    rows.seek(first)
    while rows.valid():
        yield take(rows)
        rows.next()
    rows.status()  # the package's own loops end silently at a damaged block


def _inspect_table(database, name, records, shown: int, exact: bool, folder: Path) -> Table:
    table = Table.stored(name, records)
    family = database.get_column_family(name.stored)
    try:
        table.bytes = family.property_int_value("rocksdb.live-sst-files-size") or 0
        in_memory = family.property_int_value("rocksdb.cur-size-all-mem-tables") or 0
        table.rows = family.property_int_value("rocksdb.estimate-num-keys") or 0
        table.rows_exact = False
        if exact or table.bytes + in_memory <= _COUNTED_BYTES:
            table.rows, table.rows_exact = sum(1 for _ in _walk(family, lambda rows: None)), True
        if table.rows and not table.bytes:
            table.notes.append("its rows are in the database's log only, until it is flushed")
        first = list(itertools.islice(_walk(family, lambda rows: (rows.key(), rows.value())), SAMPLE_ROWS))
        table.take_sample([key for key, _ in first], [row for _, row in first], shown)
    except Exception as error:
        table.problems.append(str(_mapped(error, folder, database.path(), name.stored)))
    finally:
        family.close()
    return table


def _add_findings(report: Report, records) -> None:
    stored = {(table.model, table.table, table.generation) for table in report.tables}
    for model, tables in records.items():
        for table, record in tables.items():
            if (model, table, record.generation) not in stored and record.fingerprint:
                report.problems.append(
                    f"the record of model {model} names table {table} in generation {record.generation}, which is not "
                    f"there: the next start loads it again, unless it is read-only"
                )
    for table in report.tables:
        if table.state == SUPERSEDED:
            table.notes.append("an old generation, or one that is being loaded; the next load of the model drops it")
        elif table.state == INCOMPLETE:
            table.notes.append("its first load is running or was cut short; the next start loads it again")
        elif table.state == CURRENT and table.rows_exact and not table.problems:
            table.compare_rows("restore the database, or delete it and load the model again")
