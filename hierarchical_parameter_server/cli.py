"""The `hps` command line: parses arguments and prints; the work is done by the package."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0 if it worked, 1 if it failed (the reason is printed), 2 if the arguments are wrong.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (OSError, ValueError, NotImplementedError, ImportError) as error:
        print(f"hps {options.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"hps {options.command}: interrupted, nothing was written", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hps", description="Hierarchical Parameter Server")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_convert(commands)
    return parser


def _add_convert(commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="dissect a trained model into tables, a config and a dense model",
        description="Writes key / emb_vector folders, a ps.json that works as it is, and (for Keras models) "
        "dense.keras: the model with its embeddings replaced by HPS layers.",
    )
    parser.set_defaults(run=_convert)
    parser.add_argument("model", metavar="MODEL", help=".keras or .h5 file, SavedModel folder, or checkpoint prefix")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="folder to write")
    parser.add_argument("--name", metavar="NAME", help="name of the model in ps.json (default: from the file name)")
    parser.add_argument("--variables", metavar="REGEX", help="take only embeddings whose name contains a match")
    parser.add_argument(
        "--sparse-input",
        metavar="NAME",
        action="append",
        default=[],
        help="input that becomes a SparseTensor of ids (masked Embedding + GlobalAveragePooling1D); may be repeated",
    )
    parser.add_argument("--rocksdb", action="store_true", help="add a RocksDB database below the memory tier")
    parser.add_argument("--max-batch-size", metavar="N", type=int, default=1024, help="default: 1024")
    parser.add_argument("--relative-paths", action="store_true", help="ps.json with relative paths: movable folder")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier conversion wrote")
    parser.add_argument("--narrow-float64", action="store_true", help="round float64 embeddings to float32")
    parser.add_argument(
        "--import",
        dest="imports",
        metavar="MODULE",
        action="append",
        default=[],
        help="Python module that registers your own Keras layers; may be repeated",
    )
    parser.add_argument("--allow-lambda", action="store_true", help="load Lambda layers: they run code from the file")


def _convert(options: argparse.Namespace) -> int:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.path.insert(0, os.getcwd())  # Modules of --import usually lie there.
    for module in options.imports:
        importlib.import_module(module)
    from hierarchical_parameter_server.convert import convert

    report = convert(
        options.model,
        options.output,
        options.name,
        variables=options.variables,
        sparse_inputs=options.sparse_input,
        persistent_db="rocks_db" if options.rocksdb else None,
        max_batch_size=options.max_batch_size,
        relative_paths=options.relative_paths,
        overwrite=options.overwrite,
        narrow_float64=options.narrow_float64,
        allow_lambda=options.allow_lambda,
        progress=_print_progress if sys.stderr.isatty() else None,
    )
    print(report.summary())
    return 0


def _print_progress(table: str, rows_done: int, rows: int) -> None:
    end = "\n" if rows_done == rows else ""
    print(f"\r{table}: {100 * rows_done // rows:3d} % of {rows:,} rows", end=end, file=sys.stderr, flush=True)
