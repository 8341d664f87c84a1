"""The `hps` command line: parses arguments and prints; the work is done by the package."""

from __future__ import annotations

import argparse
import getpass
import importlib
import json
import os
import sys
from collections.abc import Sequence

from .errors import HpsError
from .units import parse_bytes


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0 if it worked, 1 if it failed (the reason is printed), 2 if the arguments are wrong.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (HpsError, OSError, ValueError, NotImplementedError, ImportError) as error:
        print(f"hps {options.command}: error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `hps inspect ... | head` is no error
        return 0
    except KeyboardInterrupt:
        print(f"hps {options.command}: interrupted, nothing was written", file=sys.stderr)
        return 130


_EXAMPLES = """examples:
  hps convert model.keras -o served     tables, a ps.json and the dense rest of a trained model
  hps memory served/ps.json             what it will need on host, GPU and disk, before anything is loaded
  hps inspect served/ps.json            what its folders and databases hold
  hps inspect redis://cache:7000        the tables in a Redis cluster
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hps",
        description="Hierarchical Parameter Server",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_convert(commands)
    _add_inspect(commands)
    _add_memory(commands)
    return parser


def _add_inspect(commands) -> None:
    parser = commands.add_parser(
        "inspect",
        help="list models, tables, rows and bytes of folders and databases",
        description="Looks at PLACE and changes nothing; a server that uses it meanwhile is not disturbed. The exit "
        "code is 1 if something there is damaged.",
    )
    parser.set_defaults(run=_inspect)
    parser.add_argument(
        "place",
        metavar="PLACE",
        help="a table folder or a folder of them, a RocksDB folder, a ps.json (all its tables and databases), "
        "/dev/shm/NAME (multi_process_hash_map), or Redis: redis://[user@]host:port, rediss:// for TLS, host:port",
    )
    parser.add_argument("--rows", metavar="N", type=int, default=3, help="rows of each table to show (default: 3)")
    parser.add_argument("--exact", action="store_true", help="count rows that would be estimated; reads whole tables")
    parser.add_argument("--json", action="store_true", help="print JSON")
    redis = parser.add_argument_group("Redis")
    redis.add_argument("--password-env", metavar="NAME", help="environment variable with the password "
                       "(default: HPS_REDIS_PASSWORD)")  # fmt: skip
    redis.add_argument("--ask-password", action="store_true", help="ask for the password")
    redis.add_argument("--tls-ca", metavar="PATH", help="file or folder of trusted certificates")
    redis.add_argument("--tls-cert", metavar="FILE", help="certificate of this client")
    redis.add_argument("--tls-key", metavar="FILE", help="its key")
    redis.add_argument(
        "--tls-server-name", metavar="NAME", help="name to ask for and check at all nodes (default: the host in PLACE)"
    )
    redis.add_argument("--timeout", metavar="SECONDS", type=float, default=5.0, help="for an answer (default: 5)")


def _inspect(options: argparse.Namespace) -> int:
    from .inspect import inspect

    password = None
    if options.ask_password:
        password = getpass.getpass("password: ")
    elif options.password_env is not None:
        if options.password_env not in os.environ:
            raise ValueError(f"--password-env: there is no environment variable {options.password_env}")
        password = os.environ[options.password_env]
    report = inspect(
        options.place,
        rows=options.rows,
        exact=options.exact,
        password=password,
        tls_ca=options.tls_ca,
        tls_certificate=options.tls_cert,
        tls_key=options.tls_key,
        tls_server_name=options.tls_server_name,
        timeout_seconds=options.timeout,
    )
    print(json.dumps(report.to_dict(), indent=2) if options.json else report.to_text())
    problems = report.all_problems()
    if problems and options.json:
        print(f"hps inspect: {len(problems)} problems, the first: {problems[0]}", file=sys.stderr)
    return 1 if problems else 0


def _add_memory(commands) -> None:
    parser = commands.add_parser(
        "memory",
        help="say what a configuration will need before anything is loaded",
        description="Says what the tables of a ps.json will need on the host, on each GPU, in Redis and on disk, "
        "against what there is, and where each table should live. Nothing is loaded; only sizes and some keys of the "
        "table folders are read. The exit code is 1 if it does not fit, or a server would refuse the load.",
    )
    parser.set_defaults(run=_memory)
    parser.add_argument("config", metavar="PS_JSON")
    parser.add_argument("--host-memory", metavar="SIZE", type=_size, help="plan for a host with 64GiB, say, to spare")
    parser.add_argument("--gpu-memory", metavar="SIZE", type=_size, help="plan for GPUs with 80GiB, say, to spare")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _size(text: str) -> int:
    try:
        size = parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if size < 1 << 20:
        raise argparse.ArgumentTypeError(f"{text!r} is less than 1 MiB; write a number with a unit, such as 80GiB")
    return size


def _memory(options: argparse.Namespace) -> int:
    from .memory_plan import memory_plan

    plan = memory_plan(options.config, host_memory=options.host_memory, gpu_memory=options.gpu_memory)
    print(json.dumps(plan.to_dict(), indent=2) if options.json else plan.to_text())
    return 0 if plan.fits else 1


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
