"""RocksDB databases, through the Python package rocksdict: opened read-only, beside a server that may be writing.

Nothing is written into the folder. What is seen is the database as it was when it was opened;
rows of a load that is running are seen when it has flushed them.
"""

from __future__ import annotations

import itertools
import re
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
    with _open(folder) as (database, families):
        try:
            records = _read_records(database, report)
        except Exception as error:
            raise _mapped(error, str(folder), database.path()) from error
        for family in sorted(families):
            name = stored_names.parse_table_name(family)
            if name is not None:
                report.tables.append(_inspect_table(database, name, records, shown, exact, report.place))
            elif family != _DEFAULT_FAMILY:
                report.others.append(family)
        report.facts["sequence_number"] = database.latest_sequence_number()
    report.facts["bytes_on_disk"] = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    _add_notes(report, records)
    return report


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
                raise _mapped(error, str(folder), str(linked)) from error
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


def _mapped(error: Exception, where: str, linked: str) -> Exception:
    """`linked` stands in the texts of RocksDB where `where` is meant."""
    text = f"{where}: {str(error).replace(linked, where)}"
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


def _inspect_table(database, name, records, shown: int, exact: bool, where: str) -> Table:
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
        table.problems.append(str(_mapped(error, f"{where}, table {name.stored}", database.path())))
    finally:
        family.close()
    return table


def _add_notes(report: Report, records) -> None:
    stored = {(table.model, table.table, table.generation) for table in report.tables}
    for model, tables in records.items():
        for table, record in tables.items():
            if (model, table, record.generation) not in stored and record.fingerprint:
                report.notes.append(
                    f"the record of model {model} names table {table} in generation {record.generation}, which is not "
                    f"there: the next start loads it again"
                )
    for table in report.tables:
        if table.state == SUPERSEDED:
            table.notes.append("an old generation, or one that is being loaded; the next load of the model drops it")
        elif table.state == INCOMPLETE:
            table.notes.append("its first load is running or was cut short; the next start loads it again")
        elif table.state == CURRENT and table.rows_exact and table.recorded_rows != table.rows:
            table.notes.append(f"its folder had {table.recorded_rows} rows: keys occurred twice, or updates came in")
