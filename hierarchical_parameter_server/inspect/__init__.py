"""What a place holds: a table folder, a RocksDB database, a Redis server or cluster, shared memory of servers, or all
that a ps.json names."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import InvalidArgumentError, NotFoundError
from .report import Report

__all__ = ["Report", "inspect"]


def inspect(
    place: str | os.PathLike,
    rows: int = 3,
    exact: bool = False,
    user: str | None = None,
    password: str | None = None,
    tls_ca: str | None = None,
    tls_certificate: str | None = None,
    tls_key: str | None = None,
    tls_server_name: str | None = None,
    timeout_seconds: float = 5.0,
) -> Report:
    """Looks at a place and changes nothing; a server that uses it meanwhile is not disturbed.

    Args:
        place: a table folder, a folder of table folders, a RocksDB folder, a ps.json, shared memory
            (``/dev/shm/NAME``), or a Redis address (``redis://[user@]host:port``, ``rediss://`` for TLS,
            ``host:port``).
        rows: how many rows of each table to show.
        exact: count all rows where a database would only estimate them.
        user: for Redis, where the address names none.
        password: for Redis; without it the environment variable HPS_REDIS_PASSWORD.
        tls_ca, tls_certificate, tls_key, tls_server_name: for Redis with TLS: trusted certificates (file or folder),
            the client's certificate and key, the name to ask for and check at all nodes in place of the address's host.
        timeout_seconds: longest wait for an answer of Redis.

    Returns:
        A report; damaged tables among others are in its ``all_problems()``.

    Raises:
        hps.errors.HpsError: there is no such place, it is none of the known kinds, or it cannot be read at all.
    """
    if rows < 0:
        raise InvalidArgumentError(f"rows must be at least 0, got {rows}")
    text = os.fspath(place)
    path = Path(text)
    if not os.path.exists(path):  # unlike Path.exists false for names that are too long
        from .redis_keys import inspect_redis
        from .redis_nodes import PASSWORD_VARIABLE, parse_place

        if text.lstrip().startswith("{"):  # not shown: there may be a password in it
            raise InvalidArgumentError("the place is JSON text; write it into a file and give its path")
        options = parse_place(text)
        if options is None:
            raise NotFoundError(
                f"{text} does not exist, and is no address; a place is a table folder, a RocksDB folder, a ps.json, or "
                f"redis://[user@]host:port (rediss:// for TLS)"
            )
        options.user = options.user or user
        options.password = os.environ.get(PASSWORD_VARIABLE) if password is None else password
        options.tls_ca, options.tls_certificate, options.tls_key = tls_ca, tls_certificate, tls_key
        options.tls_server_name, options.timeout_seconds = tls_server_name, timeout_seconds
        return inspect_redis(options, rows)
    if path.is_file():
        from .configuration import inspect_config
        from .shared_memory import inspect_shared_memory, is_shared_memory

        if is_shared_memory(path):
            return inspect_shared_memory(path)
        return inspect_config(path, rows, exact, timeout_seconds)
    from . import folders, rocksdb

    if rocksdb.is_database(path):
        return rocksdb.inspect_database(path, rows, exact)
    return folders.inspect_folders(path, rows)
