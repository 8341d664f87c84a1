"""The conversion itself: open the source, rebuild the dense part, write everything, rename."""

from __future__ import annotations

import errno
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from hierarchical_parameter_server.convert import dense_remainder, keras_models
from hierarchical_parameter_server.convert import variables as tf_variables
from hierarchical_parameter_server.convert.layers import EmbeddingLookup, MeanLookup
from hierarchical_parameter_server.convert.ps_config import DATABASE_FOLDER, PERSISTENT_TYPES, write_ps_config
from hierarchical_parameter_server.convert.report import ConversionReport, NotTaken, TableReport
from hierarchical_parameter_server.convert.tables import (
    Progress,
    Table,
    check_dtype,
    legal_name,
    table_names,
    write_table,
)

_REPORT_FILE = "conversion.json"
_NO_DENSE_MODEL = "not built yet: the dense remainder of a {}; only Keras models have one"


def convert(
    model: Any,
    output_dir: str | os.PathLike[str],
    model_name: str | None = None,
    *,
    variables: str | None = None,
    sparse_inputs: Sequence[str] = (),
    persistent_db: str | None = None,
    max_batch_size: int = 1024,
    relative_paths: bool = False,
    overwrite: bool = False,
    narrow_float64: bool = False,
    custom_objects: Mapping[str, Any] | None = None,
    allow_lambda: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Converts a trained model for serving through the parameter server.

    The folder appears whole or not at all: everything is written beside it first and then renamed.

    Args:
        model: a functional or sequential Keras model; or the path of a .keras or .h5 file, of a SavedModel folder, or
            of a TensorFlow checkpoint (its prefix, or the folder with its `checkpoint` file). SavedModels are
            converted whole only if legacy Keras (TF_USE_LEGACY_KERAS=1) wrote them and runs now; of others, and of
            checkpoints, the tables are written, one at a time in memory, and there is no dense model.
        output_dir: the folder to write.
        model_name: name of the model in ps.json, [a-zA-Z0-9_-]{1,120}. Default: made from the model or file name.
        variables: regular expression that selects embeddings by name. Default: every Embedding layer of a Keras
            model, every variable that a SavedModel gathers rows from, every variable of a checkpoint whose last name
            component contains "embed".
        sparse_inputs: names of inputs of a Keras model that become SparseTensors of ids; each must feed one
            Embedding(mask_zero=True) followed by one GlobalAveragePooling1D, which become one sparse lookup.
        persistent_db: "rocks_db" adds a RocksDB database inside the folder below the memory tier.
        max_batch_size: samples per batch that ps.json announces; it sizes buffers and is no limit.
        relative_paths: write paths relative to ps.json, so that the folder can be moved. Such paths are looked up in
            the working directory first. Default: absolute paths.
        overwrite: replace a folder that an earlier conversion wrote.
        narrow_float64: accept float64 embeddings and round them to float32.
        custom_objects: your own layers and functions, by name, for loading a Keras file.
        allow_lambda: load Lambda layers from files. They run code: only for files you trust.
        progress: called as `progress(table_name, rows_done, rows)` while tables are written.

    Returns:
        What was written; `dense_model` is ready to use and to export.

    Raises:
        FileNotFoundError: `model` is a path where nothing is.
        FileExistsError: `output_dir` exists and may not be replaced.
        ValueError: not a model, no embedding found, a bad argument, or values that float32 cannot hold.
        NotImplementedError: a kind of model that is not supported yet.
        OSError: the folder cannot be written, or the disk is too small.
    """
    if persistent_db is not None and persistent_db not in PERSISTENT_TYPES:
        raise ValueError(f"persistent_db is {persistent_db!r}; valid: None, {', '.join(map(repr, PERSISTENT_TYPES))}")
    if model_name is not None and legal_name(model_name, "model") != model_name:
        raise ValueError(f"model_name {model_name!r} must consist of 1 to 120 of a-z, A-Z, 0-9, _ and -")
    if variables is not None:
        try:
            re.compile(variables)
        except re.error as error:
            raise ValueError(f"variables: {variables!r} is no regular expression: {error}") from error
    target = pathlib.Path(os.path.abspath(output_dir))
    _check_target(target, overwrite)

    source = _open(model, variables, custom_objects, allow_lambda)
    if not source.tables:
        seen = "".join(f"\n  {e.source} {list(e.shape)} {e.dtype}: {e.reason}" for e in source.not_taken[:20])
        raise ValueError(f"no embeddings found in {source.name}" + (f"; seen:{seen}" if seen else ""))
    if sparse_inputs and source.keras_model is None:
        raise ValueError(f"sparse_inputs needs a Keras model; {source.name} has no dense remainder")
    for table in source.tables:
        check_dtype(table, narrow_float64)
    names = table_names(table.source for table in source.tables)
    model_name = model_name or legal_name(source.name, "model")

    report = ConversionReport(
        source=source.name,
        output_dir=str(target),
        model_name=model_name,
        ps_config_file=str(target / "ps.json"),
        tables=[],
        not_taken=source.not_taken,
        dense_note=source.dense_note,
    )
    if source.keras_model is not None:
        report.dense_model = _dense_model(source, names, report, sparse_inputs)
        report.dense_model_file = str(target / "dense.keras")

    target.parent.mkdir(parents=True, exist_ok=True)
    _check_space(target.parent, source.tables)
    staging = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        if report.dense_model is not None:
            report.dense_model.save(staging / "dense.keras")
        start = time.perf_counter()
        for table, name in zip(source.tables, names, strict=True):
            nan_rows = write_table(staging / model_name / name, name, table, progress)
            report.tables.append(
                TableReport(
                    name=name,
                    source=table.source,
                    rows=table.rows,
                    width=table.width,
                    source_dtype=table.dtype.name,
                    nan_rows=nan_rows,
                    folder=str(target / model_name / name),
                )
            )
        report.seconds = time.perf_counter() - start
        if persistent_db is not None:
            (staging / DATABASE_FOLDER).mkdir()  # A relative path means this folder only if it exists.
        write_ps_config(
            staging / "ps.json",
            model_name=model_name,
            tables=source.tables,
            names=names,
            folder="" if relative_paths else str(target),
            max_batch_size=max_batch_size,
            persistent_db=persistent_db,
        )
        (staging / _REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
        staging.chmod(0o755)  # mkdtemp's folders are private.
        _replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return report


class _Source:
    """What was found in a model, whatever it came from."""

    def __init__(self, name: str, tables: list[Table], not_taken: list[NotTaken]) -> None:
        self.name = name
        self.tables = tables
        self.not_taken = not_taken
        self.keras_model: Any = None
        self.layers: list[Any] = []
        self.dense_note = ""


def _open(model: Any, pattern: str | None, custom_objects: Mapping[str, Any] | None, allow_lambda: bool) -> _Source:
    if not isinstance(model, (str, os.PathLike)):
        if not keras_models.is_keras_object(model):
            raise ValueError(
                f"{type(model).__name__} is not a model: pass a Keras model, or the path of a .keras or .h5 file, "
                "of a SavedModel folder, or of a TensorFlow checkpoint"
            )
        return _keras_source(model, model.name, pattern)
    path = pathlib.Path(model)
    if path.is_file() and path.suffix in (".keras", ".h5", ".hdf5"):
        return _keras_source(keras_models.load(path, custom_objects, allow_lambda), path.stem, pattern)
    if (path / "saved_model.pb").is_file():
        if keras_models.LEGACY and (path / "keras_metadata.pb").is_file():
            return _keras_source(keras_models.load(path, custom_objects, allow_lambda), path.name, pattern)
        source = _Source(path.name, *tf_variables.from_saved_model(path, pattern))
        source.dense_note = _NO_DENSE_MODEL.format("SavedModel")
        if (path / "keras_metadata.pb").is_file():
            source.dense_note = "legacy Keras wrote this SavedModel: set TF_USE_LEGACY_KERAS=1 to convert it whole"
        return source
    prefix = tf.train.latest_checkpoint(path) if path.is_dir() else os.fspath(path).removesuffix(".index")
    if prefix is not None and os.path.isfile(f"{prefix}.index"):
        source = _Source(os.path.basename(prefix), *tf_variables.from_checkpoint(prefix, pattern))
        source.dense_note = _NO_DENSE_MODEL.format("checkpoint")
        return source
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "no such model file, SavedModel folder or checkpoint prefix", str(path))
    raise ValueError(
        f"{path} is not a model: expected a .keras or .h5 file, a folder with saved_model.pb, or a checkpoint prefix"
    )


def _keras_source(model: Any, name: str, pattern: str | None) -> _Source:
    taken, left = keras_models.find_embeddings(model, pattern)
    not_taken = [
        NotTaken(layer.name, tuple(layer.embeddings.shape), str(layer.embeddings.dtype), f"no match for {pattern!r}")
        for layer in left
    ]
    source = _Source(name, list(taken.values()), not_taken)
    source.keras_model = model
    source.layers = list(taken)
    return source


def _dense_model(source: _Source, names: Sequence[str], report: ConversionReport, sparse_inputs: Sequence[str]) -> Any:
    def arguments(layer: Any, table: Table, name: str) -> dict[str, Any]:
        return {
            "model_name": report.model_name,
            "table_name": name,
            "emb_vec_size": table.width,
            "emb_vec_dtype": tf.float32,
            "ps_config_file": report.ps_config_file,
            "name": layer.name,
            "dtype": layer.dtype_policy,
        }

    lookups, means = {}, {}
    for layer, table, name in zip(source.layers, source.tables, names, strict=True):
        made = arguments(layer, table, name)
        lookups[layer] = lambda made=made, mask=layer.mask_zero: EmbeddingLookup(**made, mask_zero=mask)
        means[layer] = lambda made=made: MeanLookup(**made)
    return dense_remainder.build(source.keras_model, lookups, means, sparse_inputs)


def _check_target(target: pathlib.Path, overwrite: bool) -> None:
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(errno.EEXIST, "exists; pass overwrite=True (--overwrite) to replace it", str(target))
    if not (target / _REPORT_FILE).is_file():
        raise FileExistsError(
            errno.EEXIST, f"has no {_REPORT_FILE}, so no conversion wrote it and it is not replaced", str(target)
        )


def _check_space(folder: pathlib.Path, tables: Sequence[Table]) -> None:
    needed = sum(table.rows * (8 + 4 * table.width) for table in tables)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC, f"the tables need {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free", str(folder)
        )


def _replace(staging: pathlib.Path, target: pathlib.Path) -> None:
    """Renames `staging` to `target`; an older conversion there is deleted once the new one is in place."""
    if not target.exists() or not any(target.iterdir()):
        os.rename(staging, target)  # POSIX lets a folder take the place of an empty one.
        return
    old = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    os.rename(target, old)
    try:
        os.rename(staging, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
