"""All places that a ps.json names, and whether they fit together."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .. import _native
from ..errors import HpsError, NotFoundError
from .folders import inspect_table_folder
from .redis_keys import inspect_redis
from .redis_nodes import PASSWORD_VARIABLE, RedisOptions, parse_addresses
from .report import CURRENT, Report, Table
from .rocksdb import inspect_database
from .shared_memory import FOLDER as SHARED_MEMORY
from .shared_memory import compare_layout, inspect_shared_memory


def redis_options(path: Path, section: dict[str, Any], timeout_seconds: float) -> RedisOptions:
    """How the configuration `path`, whose checked section volatile_db is given, reaches Redis."""
    return RedisOptions(
        parse_addresses(section["address"]),
        user=section["user_name"],
        password=_password(path, section),
        tls=section["enable_tls"],
        tls_ca=section["tls_ca_certificate"] if section["enable_tls"] else None,
        tls_certificate=_if_there(section["tls_client_certificate"]),
        tls_key=_if_there(section["tls_client_key"]),
        tls_server_name=section["tls_server_name_identification"],
        timeout_seconds=timeout_seconds,
        config=str(path),
    )


def _if_there(path: str) -> str | None:
    return path if os.path.exists(path) else None  # the defaults name files that need not exist


def _password(path: Path, section: dict[str, Any]) -> str | None:
    """From where the configuration says; PASSWORD_VARIABLE goes before all."""
    if PASSWORD_VARIABLE in os.environ:
        return os.environ[PASSWORD_VARIABLE]
    if section.get("password_env"):
        if section["password_env"] not in os.environ:
            raise NotFoundError(f"{path}: the environment variable {section['password_env']} (password_env) is not set")
        return os.environ[section["password_env"]]
    if section.get("password_file"):
        lines = Path(section["password_file"]).read_text(encoding="utf-8").splitlines()
        return lines[0] if lines else None
    # The checked text leaves passwords out.
    written = json.loads(path.read_text(encoding="utf-8-sig"))
    return written.get("volatile_db", {}).get("password") or None


def inspect_config(path: Path, shown: int, exact: bool, timeout_seconds: float) -> Report:
    """The folders of all tables and the databases; places that cannot be read are problems.

    Raises:
        HpsError: the configuration itself is wrong.
    """
    config = json.loads(_native.load_config(str(path)))
    report = Report("config", str(path), f"configuration {path}")
    folders = Report("folder", str(path), "table folders")
    for model in config["models"]:
        for folder, name, width in zip(
            model["sparse_files"], model["embedding_table_names"], model["embedding_vecsize_per_table"], strict=True
        ):
            stored = (model["model"], name)
            if model["share_tables"]:
                stored = (_native.shared_table_name(folder), "rows")
            table = next((table for table in folders.tables if (table.model, table.table) == stored), None)
            if table is None:
                try:
                    table = inspect_table_folder(Path(folder), shown, width)
                except (HpsError, OSError) as error:
                    table = Table(folder, problems=[str(error)])
                table.model, table.table = stored
                folders.tables.append(table)
            if model["share_tables"]:
                table.notes.append(f"shared by {model['model']}/{name}")
    report.parts.append(folders)
    persistent = volatile = None
    if config["persistent_db"]["type"] == "rocks_db":
        database = Path(config["persistent_db"]["path"])
        if not os.path.lexists(database) and not config["persistent_db"]["read_only"]:
            report.notes.append(f"RocksDB database {database}: not made yet; the first start makes it")
        else:
            persistent = _part(report, lambda: inspect_database(database, shown, exact), f"RocksDB database {database}")
    if config["volatile_db"]["type"] == "redis_cluster":
        section = config["volatile_db"]
        volatile = _part(
            report,
            lambda: inspect_redis(redis_options(path, section, timeout_seconds), shown),
            f"Redis {section['address']}",
        )
    elif config["volatile_db"]["type"] == "multi_process_hash_map":
        _add_shared_memory(SHARED_MEMORY / config["volatile_db"]["shared_memory_name"], folders, config, report)
    if persistent is not None:
        _compare_with_database(folders, persistent, config, report)
    if volatile is not None:
        _compare_with_redis(folders, volatile, config, report)
    return report


def _part(report: Report, inspect, title: str) -> Report | None:
    try:
        report.parts.append(inspect())
        return report.parts[-1]
    except (HpsError, OSError) as error:
        report.problems.append(f"{title}: {error}")
        return None


def _add_shared_memory(file: Path, folders: Report, config: dict[str, Any], report: Report) -> None:
    if not os.path.lexists(file):
        report.notes.append(f"shared memory {file}: not there; the first server that starts makes it")
        return
    shared = _part(report, lambda: inspect_shared_memory(file), f"shared memory {file}")
    if shared is None:
        return
    report.problems += compare_layout(shared, file, config)
    stored = {(table.model, table.table): table for table in shared.tables if table.state == CURRENT}
    for folder in folders.tables:
        _check_width(folder, stored.get((folder.model, folder.table)), report)
    _add_unnamed(folders, shared, report)


def _compare_with_database(folders: Report, database: Report, config: dict[str, Any], report: Report) -> None:
    """Says what the next start of a server will do about each table."""
    current = {(table.model, table.table): table for table in database.tables if table.state == CURRENT}
    for folder in folders.tables:
        table = current.get((folder.model, folder.table))
        name = f"{folder.model}/{folder.table}"
        if table is None:
            report.notes.append(f"{name}: not loaded into the database yet")
        elif not folder.problems and table.fingerprint == folder.fingerprint:
            report.notes.append(f"{name}: the database holds this folder")
        elif not folder.problems:
            report.notes.append(f"{name}: the folder has changed since it was loaded: the next start loads it anew")
        _check_width(folder, table, report)
    _add_unnamed(folders, database, report)


def _compare_with_redis(folders: Report, server: Report, config: dict[str, Any], report: Report) -> None:
    partitions = config["volatile_db"]["num_partitions"]
    stored = {(table.model, table.table): table for table in server.tables}
    for folder in folders.tables:
        table = stored.get((folder.model, folder.table))
        if table is not None and table.partitions != partitions:
            report.problems.append(
                f"{folder.model}/{folder.table}: Redis has {table.partitions} partitions and the configuration "
                f"{partitions}; write num_partitions {table.partitions}, or drop the table and load it anew"
            )
        _check_width(folder, table, report)
    _add_unnamed(folders, server, report)


def _check_width(folder: Table, table: Table | None, report: Report) -> None:
    if table is not None and None not in (table.width, folder.width) and table.width != folder.width:
        report.problems.append(
            f"{folder.model}/{folder.table}: rows of width {folder.width} in the folder and {table.width} in "
            f"{table.name}; correct embedding_vecsize_per_table, or load the table anew"
        )


def _add_unnamed(folders: Report, database: Report, report: Report) -> None:
    named = {(folder.model, folder.table) for folder in folders.tables}
    others = sorted({table.name for table in database.tables if (table.model, table.table) not in named})
    if others:
        report.notes.append(f"{database.title} also holds tables that are not configured: {', '.join(others)}")
