"""The stored format of the persistent database, proven with rocksdict, an independent client, in both directions."""

import numpy as np
import pytest
from conftest import model_config, write_config, write_table
from rocksdict import AccessType, BlockBasedOptions, DBCompressionType, Options, Rdict, SstFileWriter

import hierarchical_parameter_server as hps

FAMILY = "hps_et.main.items"
WIDTH = 7
DEFAULT_VALUE = -2.5
LONG_KEYS = np.array([0, 1, -1, 255, 256, 2**31, -(2**63), 2**63 - 1], np.int64)
SHORT_KEYS = np.array([0, 1, -1, 255, 256, 2**31 - 1, -(2**31)], np.int64)


def stored_keys(keys, long_keys) -> list[bytes]:
    return [key.tobytes() for key in np.asarray(keys).astype("<i8" if long_keys else "<i4")]


def raw_options(format_version=5, compression=None) -> Options:
    """Raw keys and values, and a table format that RocksDB 7 reads."""
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.create_missing_column_families(True)
    blocks = BlockBasedOptions()
    blocks.set_format_version(format_version)
    options.set_block_based_table_factory(blocks)
    if compression is not None:
        options.set_compression_type(compression)
    return options


def open_rocksdict(path, options=None, access_type=None) -> Rdict:
    options = options or raw_options()
    families = {name: options for name in {FAMILY, "default"}}
    return Rdict(
        str(path), options=options, column_families=families, access_type=access_type or AccessType.read_write()
    )


def write_rocksdict(path, keys, rows, long_keys, options=None) -> None:
    database = open_rocksdict(path, options)
    family = database.get_column_family(FAMILY)
    for key, row in zip(stored_keys(keys, long_keys), rows, strict=True):
        family[key] = row.tobytes()
    family.flush()
    family.close()
    database.close()


def read_rocksdict(path, name=FAMILY) -> dict[bytes, bytes]:
    families = {other: raw_options() for other in Rdict.list_cf(str(path))}
    database = Rdict(str(path), options=raw_options(), column_families=families, access_type=AccessType.read_only())
    family = database.get_column_family(name)
    rows = dict(family.items())
    family.close()
    database.close()
    return rows


@pytest.fixture
def config(tmp_path):
    """Writes a ps.json over the table folder tmp_path/items and the database tmp_path/database."""

    def write(long_keys=True, read_only=False, volatile="disabled"):
        model = model_config(
            "main", {"items": (tmp_path / "items", WIDTH)}, default_value_for_each_table=[DEFAULT_VALUE]
        )
        persistent = {"type": "rocks_db", "path": str(tmp_path / "database"), "read_only": read_only}
        return write_config(
            tmp_path / "ps.json",
            [model],
            long_keys=long_keys,
            volatile_db={"type": volatile},
            persistent_db=persistent,
        )

    return write


@pytest.mark.parametrize("long_keys", [True, False])
def test_rocksdict_reads_what_a_load_wrote(tmp_path, config, rng, long_keys):
    keys = LONG_KEYS if long_keys else SHORT_KEYS
    rows = rng.normal(size=(len(keys), WIDTH)).astype("f4")
    write_table(tmp_path / "items", keys, rows)
    with hps.ParameterServer(config(long_keys)) as server:
        np.testing.assert_array_equal(server.lookup(keys, "main"), rows)
    expected = {key: row.tobytes() for key, row in zip(stored_keys(keys, long_keys), rows, strict=True)}
    assert read_rocksdict(tmp_path / "database") == expected


MANY = 200_000  # rows that are loaded as sorted files, not through a memtable


def many_keys(rng, long_keys) -> np.ndarray:
    """Scattered keys in random order, each once."""
    drawn = rng.integers(-(2**63), 2**63 - 1, MANY) if long_keys else rng.integers(-(2**31), 2**31, MANY)
    keys = np.unique(np.concatenate([drawn, LONG_KEYS if long_keys else SHORT_KEYS]))
    return rng.permutation(keys)


@pytest.mark.parametrize("long_keys", [True, False])
def test_rocksdict_reads_and_changes_a_bulk_loaded_database(tmp_path, config, rng, long_keys):
    keys = many_keys(rng, long_keys)
    rows = rng.normal(size=(len(keys), WIDTH)).astype("f4")
    write_table(tmp_path / "items", keys, rows)
    with hps.ParameterServer(config(long_keys)) as server:
        np.testing.assert_array_equal(server.lookup(keys, "main"), rows)
    expected = {key: row.tobytes() for key, row in zip(stored_keys(keys, long_keys), rows, strict=True)}
    assert read_rocksdict(tmp_path / "database") == expected

    rows[:100] += 1
    write_rocksdict(tmp_path / "database", keys[:100], rows[:100], long_keys)
    with hps.ParameterServer(config(long_keys)) as server:
        np.testing.assert_array_equal(server.lookup(keys, "main"), rows)


def test_rocksdict_finds_the_next_generation_under_its_suffix(tmp_path, config, rng):
    keys = many_keys(rng, True)
    write_table(tmp_path / "items", keys[:100], np.zeros((100, WIDTH), "f4"))
    with hps.ParameterServer(config()):
        pass
    rows = rng.normal(size=(len(keys), WIDTH)).astype("f4")
    write_table(tmp_path / "items", keys, rows)
    with hps.ParameterServer(config()):
        pass
    assert FAMILY not in Rdict.list_cf(str(tmp_path / "database"))
    stored = read_rocksdict(tmp_path / "database", FAMILY + "@1")
    assert stored == {key: row.tobytes() for key, row in zip(stored_keys(keys, True), rows, strict=True)}


def test_a_server_reads_files_that_rocksdict_ingested(tmp_path, config, rng):
    keys = many_keys(rng, True)
    rows = rng.normal(size=(len(keys), WIDTH)).astype("f4")
    writer = SstFileWriter(raw_options())
    writer.open(str(tmp_path / "rows.sst"))
    for key, row in sorted(zip(stored_keys(keys, True), rows, strict=True), key=lambda pair: pair[0]):
        writer[key] = row.tobytes()
    writer.finish()
    database = open_rocksdict(tmp_path / "database")
    family = database.get_column_family(FAMILY)
    family.ingest_external_file([str(tmp_path / "rows.sst")])
    family.close()
    database.close()
    with hps.ParameterServer(config(read_only=True)) as server:
        np.testing.assert_array_equal(server.lookup(keys, "main"), rows)


@pytest.mark.parametrize("volatile", ["disabled", "hash_map"])
@pytest.mark.parametrize("long_keys", [True, False])
def test_a_server_reads_what_rocksdict_wrote(tmp_path, config, rng, long_keys, volatile):
    keys = LONG_KEYS if long_keys else SHORT_KEYS
    rows = rng.normal(size=(len(keys), WIDTH)).astype("f4")
    write_rocksdict(tmp_path / "database", keys, rows, long_keys)
    with hps.ParameterServer(config(long_keys, read_only=True, volatile=volatile)) as server:
        np.testing.assert_array_equal(server.lookup(keys, "main"), rows)
        found = server.lookup([keys[0], 77_777], "main")
        np.testing.assert_array_equal(found, [rows[0], np.full(WIDTH, DEFAULT_VALUE, "f4")])


@pytest.mark.parametrize("compression", ["none", "snappy", "lz4", "zstd", "zlib", "bz2"])
def test_every_compression_of_rocksdict_is_read(tmp_path, config, rng, compression):
    keys = np.arange(3000)
    rows = rng.integers(0, 3, size=(len(keys), WIDTH)).astype("f4")  # such rows do compress
    options = raw_options(compression=getattr(DBCompressionType, compression)())
    write_rocksdict(tmp_path / "database", keys, rows, True, options)
    with hps.ParameterServer(config(read_only=True)) as server:
        np.testing.assert_array_equal(server.lookup(keys, "main"), rows)


def test_rows_that_rocksdict_changed_are_served_without_another_load(tmp_path, config, rng):
    keys = np.arange(1000)
    rows = rng.normal(size=(len(keys), WIDTH)).astype("f4")
    write_table(tmp_path / "items", keys, rows)
    with hps.ParameterServer(config()):
        pass
    newer = np.ones((2, WIDTH), "f4")
    write_rocksdict(tmp_path / "database", [5, 5000], newer, True)
    for volatile in ("disabled", "hash_map"):
        with hps.ParameterServer(config(volatile=volatile)) as server:
            np.testing.assert_array_equal(server.lookup([5, 5000], "main"), newer)
            np.testing.assert_array_equal(server.lookup([4, 6], "main"), rows[[4, 6]])


def test_newer_table_format_is_refused_with_the_cure(tmp_path, config):
    write_rocksdict(tmp_path / "database", [1], np.ones((1, WIDTH), "f4"), True, raw_options(format_version=6))
    with pytest.raises(hps.errors.FailedPreconditionError, match="format_version 5"):
        hps.ParameterServer(config(read_only=True))


def test_database_with_pickled_keys_is_refused_with_the_cure(tmp_path, config):
    database = Rdict(str(tmp_path / "database"))
    database[1] = 2
    database.close()
    with pytest.raises(hps.errors.InvalidArgumentError, match="raw_mode"):
        hps.ParameterServer(config(read_only=True))


def test_rows_of_another_width_are_refused(tmp_path, config):
    write_rocksdict(tmp_path / "database", [1], np.ones((1, WIDTH + 1), "f4"), True)
    with pytest.raises(hps.errors.FailedPreconditionError, match=r"rows of 32 bytes.* 28"):
        hps.ParameterServer(config(read_only=True))
