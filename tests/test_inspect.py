"""`hps inspect` of folders, RocksDB databases and configurations; Redis: test_inspect_redis.py."""

import json
import multiprocessing
import os
import pathlib

import numpy as np
import pytest
from conftest import model_config, write_config, write_table
from rocksdict import BlockBasedOptions, Options, Rdict

import hierarchical_parameter_server as hps
from hierarchical_parameter_server import _native
from hierarchical_parameter_server.cli import main
from hierarchical_parameter_server.inspect import inspect
from hierarchical_parameter_server.inspect.stored_names import parse_model_record, parse_table_name

WIDTH = 5


def options(format_version=5) -> Options:
    """Of a database that our servers read."""
    result = Options(raw_mode=True)
    result.create_if_missing(True)
    result.create_missing_column_families(True)
    blocks = BlockBasedOptions()
    blocks.set_format_version(format_version)
    result.set_block_based_table_factory(blocks)
    return result


def write_database(path, families: dict[str, dict[bytes, bytes]], flush=True, family_options=options) -> None:
    """`families`: rows by family; the family "default" holds records."""
    columns = {name: family_options() for name in {*families, "default"}}
    database = Rdict(str(path), options=options(), column_families=columns)
    for name, rows in families.items():
        family = database.get_column_family(name)
        for key, row in rows.items():
            family[key] = row
        if flush:
            family.flush()
        family.close()
    database.close()


def stored(rows: np.ndarray, first=0, key_bytes=8) -> dict[bytes, bytes]:
    return {int(first + i).to_bytes(key_bytes, "little"): row.astype("f4").tobytes() for i, row in enumerate(rows)}


def record(*lines: str) -> bytes:
    return "".join(f"{line}\n" for line in ("hps model record 1", *lines)).encode()


def state_of(folder: pathlib.Path) -> dict:
    return {file.name: (file.stat().st_size, file.stat().st_mtime_ns) for file in folder.iterdir()}


def table_of(report, name):
    return next(table for table in report.tables if name in (table.name, table.table))


# Table folders --------------------------------------------------------------------------------------------------------


def test_a_table_folder(tmp_path, rng):
    rows = rng.normal(size=(3000, WIDTH)).astype("f4")
    write_table(tmp_path / "items", np.arange(3000) * 3 - 50, rows)
    (table,) = inspect(tmp_path / "items", rows=2).tables
    assert (table.rows, table.rows_exact, table.width, table.key_bytes) == (3000, True, WIDTH, 8)
    assert table.bytes == 3000 * (8 + 4 * WIDTH)
    assert table.fingerprint == _native.fingerprint_table_folder(str(tmp_path / "items"), WIDTH)
    assert table.sample.keys == [-50, 2999 * 3 - 50]
    np.testing.assert_array_equal(np.float32(table.sample.values), rows[[0, -1], :4])
    assert table.sample.rows == 1000 and not table.sample.rows_with_nan


def test_values_that_are_no_numbers_are_counted(tmp_path):
    rows = np.zeros((10, WIDTH), "f4")
    rows[[1, 4], 2] = np.nan
    rows[7] = -np.inf
    write_table(tmp_path / "items", np.arange(10), rows)
    report = inspect(tmp_path / "items", rows=0)
    sample = report.tables[0].sample
    assert (sample.rows_with_nan, sample.rows_with_infinity, sample.keys) == (2, 1, [])
    assert "10 rows looked at: 2 with NaN, 1 with infinity" in report.to_text()


def test_a_folder_of_table_folders_with_a_damaged_one(tmp_path, capsys):
    write_table(tmp_path / "good", np.arange(10), np.zeros((10, WIDTH)))
    write_table(tmp_path / "bad", np.arange(10), np.zeros((10, WIDTH)))
    os.truncate(tmp_path / "bad" / "emb_vector", 77)
    (tmp_path / "ps.json").write_text("{}")
    report = inspect(tmp_path)
    assert table_of(report, "good").rows == 10
    assert "77 bytes" in report.all_problems()[0] and len(report.all_problems()) == 1
    assert report.others == ["ps.json"]
    assert main(["inspect", str(tmp_path)]) == 1
    assert "PROBLEM: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda folder: (folder / "key").unlink(), hps.errors.NotFoundError, "key does not exist"),
        (lambda folder: (folder / "emb_vector").unlink(), hps.errors.NotFoundError, "emb_vector does not exist"),
        (lambda folder: os.truncate(folder / "key", 0), hps.errors.DataLossError, "key is empty"),
        (lambda folder: os.truncate(folder / "key", 79), hps.errors.DataLossError, "79 bytes, no multiple of 8"),
        (lambda folder: os.truncate(folder / "emb_vector", 199), hps.errors.DataLossError, "199 bytes.*truncated"),
        (lambda folder: os.truncate(folder / "emb_vector", 0), hps.errors.DataLossError, "emb_vector is empty"),
    ],
)
def test_damaged_folder_is_refused(tmp_path, damage, error, message):
    write_table(tmp_path / "items", np.arange(10), np.zeros((10, WIDTH)))
    damage(tmp_path / "items")
    with pytest.raises(error, match=message):
        inspect(tmp_path / "items")


def test_what_is_no_place_is_refused(tmp_path, capsys):
    with pytest.raises(hps.errors.NotFoundError, match="does not exist, and is no address"):
        inspect(tmp_path / "nothing")
    with pytest.raises(hps.errors.NotFoundError, match="no table folder.*no RocksDB database"):
        inspect(tmp_path)
    with pytest.raises(hps.errors.InvalidArgumentError, match="rows must be at least 0"):
        inspect(tmp_path, rows=-1)
    (tmp_path / "text").write_text("hello")
    assert main(["inspect", str(tmp_path / "text")]) == 1
    assert "not valid JSON" in capsys.readouterr().err


# RocksDB --------------------------------------------------------------------------------------------------------------


def serve_until_told(config, pipe):
    with hps.ParameterServer(config) as server:
        pipe.send(server.stats()["models"][0]["tables"][0]["persistent"]["rows"])
        pipe.recv()


def test_a_database_that_a_server_is_using(tmp_path, rng):
    rows = rng.normal(size=(500, WIDTH)).astype("f4")
    write_table(tmp_path / "items", np.arange(500) - 7, rows)
    config = write_config(
        tmp_path / "ps.json",
        [model_config("films", {"items": (tmp_path / "items", WIDTH)})],
        persistent_db={"type": "rocks_db", "path": str(tmp_path / "database")},
    )
    context = multiprocessing.get_context("spawn")
    pipe, other_end = context.Pipe()
    server = context.Process(target=serve_until_told, args=(config, other_end), daemon=True)
    server.start()
    try:
        assert pipe.poll(60) and pipe.recv() == 500
        before = state_of(tmp_path / "database")
        report = inspect(tmp_path / "database", rows=500)
        assert state_of(tmp_path / "database") == before  # nothing was written
    finally:
        pipe.send("end")
        server.join(60)
    assert server.exitcode == 0
    (table,) = report.tables
    assert (table.model, table.table, table.generation, table.state) == ("films", "items", 0, "current")
    assert (table.rows, table.rows_exact, table.recorded_rows, table.width, table.key_bytes) == (
        500,
        True,
        500,
        WIDTH,
        8,
    )
    assert table.bytes > 500 * (8 + 4 * WIDTH)
    assert table.fingerprint == _native.fingerprint_table_folder(str(tmp_path / "items"), WIDTH)
    order = np.argsort(table.sample.keys)
    assert np.array(table.sample.keys)[order].tolist() == list(range(-7, 493))
    np.testing.assert_array_equal(np.float32(table.sample.values)[order], rows[:, :4])
    assert not report.all_problems() and not report.others


def test_generations_records_and_families_of_others(tmp_path):
    rows = np.ones((20, WIDTH))
    write_database(
        tmp_path / "database",
        {
            "default": {
                b"hps.record/hps.model.films": record(
                    "2\t20\titems\tfp: tab\tinside", "0\t0\tusers\t", "1\t9\tgone\tfp"
                ),
                b"hps.record/hps.model.broken": b"hps model record 1\nnonsense\n",
                b"hps.record/hps.model.newer": b"hps model record 9\n",
                b"hps.record/something": b"else",
                b"of another program": b"x",
            },
            "hps_et.films.items": stored(rows),
            "hps_et.films.items@2": stored(rows),
            "hps_et.films.items@3": stored(rows[:3]),
            "hps_et.films.users": stored(rows[:2]),
            "hps_et.ads.short": stored(rows, key_bytes=4),
            "hctr_et.old.t": stored(rows),
            "sessions": {b"key": b"value"},
        },
    )
    report = inspect(tmp_path / "database")
    states = {table.name: table.state for table in report.tables}
    assert states == {
        "hps_et.films.items": "superseded",
        "hps_et.films.items@2": "current",
        "hps_et.films.items@3": "superseded",
        "hps_et.films.users": "incomplete",
        "hps_et.ads.short": "not recorded",
        "hctr_et.old.t": "not recorded",
    }
    current = table_of(report, "hps_et.films.items@2")
    assert (current.generation, current.recorded_rows, current.fingerprint) == (2, 20, "fp: tab\tinside")
    assert table_of(report, "short").key_bytes == 4
    assert "before version 3.5" in table_of(report, "hctr_et.old.t").notes[0]
    assert report.others == ["sessions"]
    problems = report.all_problems()
    assert len(problems) == 3
    assert any("record of model broken cannot be understood" in problem for problem in problems)
    assert any("record of model newer has the format version '9'" in problem for problem in problems)
    assert any("a record something" in note for note in report.notes)
    assert any("names table gone in generation 1, which is not there" in problem for problem in problems)
    text = report.to_text()
    assert "films  items  @2          current" in text
    assert "of other programs, not looked at: sessions" in text


def test_rows_that_are_in_the_log_only(tmp_path):
    write_database(tmp_path / "database", {"hps_et.a.t": stored(np.ones((9, WIDTH)))}, flush=False)
    report = inspect(tmp_path / "database")
    assert table_of(report, "t").rows == 9


def test_a_database_written_for_point_lookups_as_the_predecessor_does(tmp_path):
    def family_options():
        result = options()
        result.optimize_for_point_lookup(8)
        return result

    write_database(tmp_path / "database", {"hps_et.a.t": stored(np.ones((9, 4)))}, family_options=family_options)
    (table,) = inspect(tmp_path / "database").tables
    assert (table.rows, table.state, sorted(table.sample.keys)) == (9, "not recorded", [0, 1, 2])


def test_large_tables_are_estimated_unless_asked(tmp_path):
    rows = np.random.default_rng(1).normal(size=(20_000, 256))
    write_database(tmp_path / "database", {"hps_et.a.t": stored(rows)})
    estimated, exact = inspect(tmp_path / "database").tables[0], inspect(tmp_path / "database", exact=True).tables[0]
    assert not estimated.rows_exact and estimated.rows == pytest.approx(20_000, rel=0.2)
    assert exact.rows_exact and exact.rows == 20_000
    assert "~20," in inspect(tmp_path / "database").to_text()


def test_rows_and_keys_of_unlike_sizes_are_problems(tmp_path):
    write_database(
        tmp_path / "database",
        {
            "hps_et.a.rows": {**stored(np.ones((5, 4))), **stored(np.ones((5, 6)), first=100)},
            "hps_et.a.keys": {**stored(np.ones((5, 4))), b"abc": bytes(16)},
            "hps_et.a.odd": {bytes(8): b"12345"},
        },
    )
    report = inspect(tmp_path / "database")
    assert "rows of 16, 24 bytes" in table_of(report, "rows").problems[0]
    assert "keys of 3, 8 bytes" in table_of(report, "keys").problems[0]
    assert "rows of 5 bytes" in table_of(report, "odd").problems[0]


def test_a_folder_that_is_read_only(tmp_path):
    write_database(tmp_path / "database", {"hps_et.a.t": stored(np.ones((5, 4)))})
    os.chmod(tmp_path / "database", 0o555)
    try:
        assert inspect(tmp_path / "database").tables[0].rows == 5
    finally:
        os.chmod(tmp_path / "database", 0o755)


def test_databases_that_cannot_be_read(tmp_path, rng):
    write_database(tmp_path / "damaged", {"hps_et.a.t": stored(rng.normal(size=(2000, 64)))})
    for manifest in (tmp_path / "damaged").glob("MANIFEST-*"):
        os.truncate(manifest, 20)
    with pytest.raises(hps.errors.DataLossError, match=f"{tmp_path}/damaged.*damaged or incomplete"):
        inspect(tmp_path / "damaged")

    write_database(tmp_path / "missing", {"hps_et.a.t": stored(rng.normal(size=(2000, 64)))})
    for file in (tmp_path / "missing").glob("*.sst"):
        file.unlink()
    with pytest.raises(hps.errors.DataLossError, match=f"{tmp_path}/missing/\\d+.sst.*damaged or incomplete"):
        inspect(tmp_path / "missing")

    write_database(tmp_path / "flipped", {"hps_et.a.t": stored(rng.normal(size=(2000, 64)))})
    (file,) = (tmp_path / "flipped").glob("*.sst")
    with open(file, "r+b") as opened:
        opened.write(b"\xff" * 4096)
    (table,) = inspect(tmp_path / "flipped").tables
    assert table.problems[0].startswith(f"{tmp_path / 'flipped'}, table hps_et.a.t: Corruption")
    assert str(file) in table.problems[0] and table.problems[0].count("table hps_et.a.t") == 1

    pickled = Rdict(str(tmp_path / "pickled"))
    pickled["key"] = ["value"]
    pickled.close()
    with pytest.raises(hps.errors.InvalidArgumentError, match="Python objects"):
        inspect(tmp_path / "pickled")


def served_database(tmp_path, keys):
    """A database that a server has filled from a folder with `keys`."""
    write_table(tmp_path / "items", keys, np.ones((len(keys), WIDTH)))
    config = write_config(
        tmp_path / "ps.json",
        [model_config("films", {"items": (tmp_path / "items", WIDTH)})],
        persistent_db={"type": "rocks_db", "path": str(tmp_path / "database")},
    )
    hps.ParameterServer(config).close()
    return tmp_path / "database", config


def test_rows_that_were_lost_are_a_problem(tmp_path, capsys):
    database, config = served_database(tmp_path, [*range(50), 7, 8, 9])  # keys that occur twice are one row
    assert main(["inspect", str(database)]) == 0
    assert inspect(database).tables[0].recorded_rows == 50
    opened = Rdict(str(database), Options(raw_mode=True))
    family = opened.get_column_family("hps_et.films.items")
    del family[(3).to_bytes(8, "little")]
    family.close()
    opened.close()
    capsys.readouterr()
    assert main(["inspect", str(database)]) == 1
    assert "it holds 49 of the 50 that it held when it was loaded (1 are missing); restore" in capsys.readouterr().out
    assert main(["inspect", config]) == 1


def last_record(manifest: bytes) -> int:
    """Where the last record of RocksDB's log format begins; the file is one block of 32 KiB at most."""
    assert len(manifest) < 32 << 10
    begins, at = 0, 0
    while at < len(manifest):
        begins, at = at, at + 7 + int.from_bytes(manifest[at + 4 : at + 6], "little")
    return begins


def test_a_manifest_that_lost_its_end_is_a_problem_as_it_is_for_servers(tmp_path, capsys):
    database, config = served_database(tmp_path, range(50))
    manifest = database / (database / "CURRENT").read_text().strip()
    assert main(["inspect", str(database)]) == 0
    whole = manifest.read_bytes()
    os.truncate(manifest, last_record(whole))
    capsys.readouterr()
    assert main(["inspect", str(database)]) == 1
    said = f"{manifest} has {manifest.stat().st_size} bytes and had {len(whole)} when it was last flushed"
    assert said in capsys.readouterr().out
    with pytest.raises(hps.errors.DataLossError, match="when it was last flushed"):
        hps.ParameterServer(config)


@pytest.mark.parametrize("note", [b"", b"\0" * 20, b"MANIFEST-000005\n", b"MANIFEST-000005 12x\n", b"\xff\xfe 1\n"])
def test_a_damaged_note_of_the_manifest_is_a_problem(tmp_path, capsys, note):
    folder = write_table(tmp_path / "a", np.arange(10), np.zeros((10, WIDTH)))
    settings = {"persistent_db": {"type": "rocks_db", "path": str(tmp_path / "db")}}
    path = write_config(tmp_path / "ps.json", [model_config("m", {"t": (folder, WIDTH)})], **settings)
    hps.ParameterServer(path).close()
    assert not inspect(tmp_path / "db").all_problems()
    (tmp_path / "db" / "hps_manifest").write_bytes(note)
    (problem,) = inspect(tmp_path / "db").all_problems()
    assert "hps_manifest is damaged" in problem and "remove the file" in problem
    assert main(["inspect", path]) == 1
    assert "hps_manifest is damaged" in capsys.readouterr().out
    hps.ParameterServer(path).close()  # writes it anew
    assert not inspect(tmp_path / "db").all_problems()


def test_table_files_that_servers_refuse_are_a_problem(tmp_path, capsys):
    def newer():
        return options(format_version=6)

    write_database(tmp_path / "database", {"hps_et.films.items": stored(np.ones((9, 4)))}, family_options=newer)
    assert main(["inspect", str(tmp_path / "database")]) == 1
    out = capsys.readouterr().out
    (file,) = (tmp_path / "database").glob("*.sst")
    assert f"1 table files ({file.name} and so on) have the format_version 6, and servers refuse them" in out
    assert "set_format_version(5)" in out and "hps_et.films.items" in out
    write_table(tmp_path / "items", range(9), np.ones((9, 4)))
    config = write_config(
        tmp_path / "ps.json",
        [model_config("films", {"items": (tmp_path / "items", 4)})],
        persistent_db={"type": "rocks_db", "path": str(tmp_path / "database")},
    )
    with pytest.raises(hps.errors.FailedPreconditionError, match="format_version"):
        hps.ParameterServer(config)


def test_names_and_records():
    assert parse_table_name("hps_et.a-b.c_d@12").generation == 12
    for other in ("hps_et.a", "hps_et.a.b.c", "hps_et.a.b@0", "hps_et.a.b@", "hps_et..b", "default", "hps_et.ä.b"):
        assert parse_table_name(other) is None
    for text in (
        b"",
        b"hps model record 1\n1\t2\tt\tf",
        b"hps model record 1\nx\t2\tt\tf\n",
        b"hps model record 2\n1\t2\tt\tf\n",
    ):
        with pytest.raises(hps.errors.DataLossError):
            parse_model_record(text, "the record")
    record = parse_model_record(b"hps model record 2\n1\t500\t1000\tt\tf\tg\n0\t7\t0\tu\t\n", "the record")
    assert (record["t"].rows, record["t"].all_rows, record["t"].fingerprint) == (500, 1000, "f\tg")
    assert (record["u"].rows, record["u"].all_rows, record["u"].fingerprint) == (7, 0, "")


# A configuration ------------------------------------------------------------------------------------------------------


def test_a_configuration_and_what_the_next_start_will_do(tmp_path, capsys):
    for name in ("same", "changed", "new"):
        write_table(tmp_path / name, np.arange(10), np.ones((10, WIDTH)))

    def config(*names):
        return write_config(
            tmp_path / "ps.json",
            [model_config("films", {name: (tmp_path / name, WIDTH) for name in names})],
            persistent_db={"type": "rocks_db", "path": str(tmp_path / "database")},
        )

    with hps.ParameterServer(config("same", "changed")):
        pass
    write_table(tmp_path / "changed", np.arange(11), np.ones((11, WIDTH)))
    report = inspect(config("same", "changed", "new"))
    assert report.notes == [
        "films/same: the database holds this folder",
        "films/changed: the folder has changed since it was loaded: the next start loads it anew",
        "films/new: not loaded into the database yet",
    ]
    assert main(["inspect", str(tmp_path / "ps.json"), "--json", "--rows", "1"]) == 0
    document = json.loads(capsys.readouterr().out)
    folders, database = document["parts"]
    assert [table["rows"] for table in folders["tables"]] == [10, 11, 10]
    assert {table["table"]: table["rows"] for table in database["tables"]} == {"same": 10, "changed": 10}


def test_a_configuration_whose_places_are_broken(tmp_path, capsys):
    write_table(tmp_path / "narrow", np.arange(10), np.ones((10, 4)))
    config = write_config(
        tmp_path / "ps.json",
        [model_config("films", {"gone": (tmp_path / "gone", 4), "narrow": (tmp_path / "narrow", 8)})],
        persistent_db={"type": "rocks_db", "path": str(tmp_path / "database"), "read_only": True},
    )
    assert main(["inspect", config]) == 1
    out = capsys.readouterr().out
    assert "gone/key: No such file or directory" in out
    assert "the files fit width 4" in out
    assert "database does not exist" in out


def test_a_database_that_the_first_start_makes_is_no_problem(tmp_path, capsys):
    write_table(tmp_path / "table", np.arange(10), np.ones((10, 4)))
    database = tmp_path / "database"
    models = [model_config("films", {"table": (tmp_path / "table", 4)})]
    section = {"type": "rocks_db", "path": str(database)}
    config = write_config(tmp_path / "ps.json", models, persistent_db=section)
    assert main(["inspect", config]) == 0
    assert f"RocksDB database {database}: not made yet" in capsys.readouterr().out
    assert not database.exists()
    database.mkdir()
    (database / "other").write_text("no database")
    assert main(["inspect", config]) == 1
    assert "is no RocksDB database" in capsys.readouterr().out


def test_the_help_shows_each_command_with_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for example in ("hps convert model.keras", "hps memory served/ps.json", "hps inspect redis://"):
        assert example in text
