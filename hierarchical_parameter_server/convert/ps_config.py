"""The ps.json that belongs to a conversion."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from hierarchical_parameter_server.convert.tables import Table

PERSISTENT_TYPES = ("rocks_db",)
DATABASE_FOLDER = "rocksdb"


def write_ps_config(
    path: str | os.PathLike[str],
    *,
    model_name: str,
    tables: Sequence[Table],
    names: Sequence[str],
    folder: str,
    max_batch_size: int,
    persistent_db: str | None,
) -> None:
    """Writes a config that serves the tables from memory, and from a database as well if asked.

    Args:
        path: where to write.
        tables, names: the tables and their names, in the order of their ids.
        folder: prefix of all paths in the config: the output folder, or "" for paths relative to ps.json.
        persistent_db: None or "rocks_db" (the database goes to `rocksdb` in the folder).
    """
    config: dict = {
        "supportlonglong": True,
        "models": [
            {
                "model": model_name,
                "sparse_files": [os.path.join(folder, model_name, name) for name in names],
                "embedding_table_names": list(names),
                "embedding_vecsize_per_table": [table.width for table in tables],
                "maxnum_catfeature_query_per_table_per_sample": [table.keys_per_sample for table in tables],
                "default_value_for_each_table": [0.0] * len(tables),
                "deployed_device_list": [0],
                "max_batch_size": max_batch_size,
                "gpucache": False,
            }
        ],
        "volatile_db": {"type": "parallel_hash_map"},
    }
    if persistent_db is not None:
        config["persistent_db"] = {"type": persistent_db, "path": os.path.join(folder, DATABASE_FOLDER)}
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2)
        file.write("\n")
