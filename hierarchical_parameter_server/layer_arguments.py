"""Checks that the layers share."""

from __future__ import annotations

import operator

import tensorflow as tf

from .lookup_ops import COMBINERS, check_name

_LARGEST = 2**31 - 1  # of a table's number and width


def _integer(value) -> int | None:
    """The value as an int (also of numpy's integers), or None if it is no integer."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def check_model_name(model_name) -> str:
    if not isinstance(model_name, str) or not model_name:
        raise ValueError(f"model_name must be the name of a model in ps.json, got {model_name!r}")
    return check_name(model_name, "model_name")


def check_table(table_id, table_name) -> str | int:
    """The table's name or number; exactly one must be given."""
    if (table_id is None) == (table_name is None):
        raise ValueError(
            f"give exactly one of table_id (a number) and table_name, got table_id={table_id!r}, "
            f"table_name={table_name!r}"
        )
    if table_name is not None:
        if not isinstance(table_name, str) or not table_name:
            raise ValueError(f"table_name must be a non-empty string, got {table_name!r}")
        return check_name(table_name, "table_name")
    number = _integer(table_id)
    if number is None or not 0 <= number <= _LARGEST:
        raise ValueError(
            f"table_id must be a number from 0 to {_LARGEST}, got {table_id!r}; a table's name goes into table_name"
        )
    return number


def check_tables(tables) -> list[str | int]:
    """The names or numbers of several tables: at least one, all of one kind."""
    names = list(tables)
    if not names:
        raise ValueError("tables must name at least one table")
    if len({isinstance(name, str) for name in names}) > 1:
        raise ValueError(f"tables must be all names or all numbers, got {names}")
    return [check_table(None, name) if isinstance(name, str) else check_table(name, None) for name in names]


def check_width(emb_vec_size) -> int:
    width = _integer(emb_vec_size)
    if width is None or not 0 < width <= _LARGEST:
        raise ValueError(
            f"emb_vec_size must be the width of the table's rows, a positive integer, got {emb_vec_size!r}"
        )
    return width


def check_padding_value(padding_value) -> int | None:
    """The value as an int; None: there is no padding."""
    if padding_value is None:
        return None
    value = _integer(padding_value)
    if value is None or not -(2**63) <= value < 2**63:
        raise ValueError(f"padding_value must be None or an integer that an int64 id can be, got {padding_value!r}")
    return value


def check_dtype(emb_vec_dtype) -> tf.DType:
    dtype = tf.as_dtype(emb_vec_dtype)
    if dtype != tf.float32:
        raise ValueError(
            f"emb_vec_dtype must be tf.float32, the type of the stored rows, got {dtype.name}; for other types of the "
            f"output give the layer a dtype policy"
        )
    return dtype


def check_combiner(combiner) -> str:
    """None means "mean", as for tf.nn.embedding_lookup_sparse."""
    if combiner is None:
        return "mean"
    if combiner not in COMBINERS:
        raise ValueError(f"combiner must be one of {', '.join(COMBINERS)}, got {combiner!r}")
    return combiner
