"""The text that Prometheus scrapes, read by a parser that takes nothing but what the text format allows."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import model_config, write_config, write_table

import hierarchical_parameter_server as hps

METRIC = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"'
SAMPLE = re.compile(rf"({METRIC})(?:\{{({LABEL}(?:,{LABEL})*)\}})? (\S+)")
KINDS = ("counter", "gauge", "histogram", "summary", "untyped")


def parse(text):
    """Returns help, kind and samples ({labels: value} by sample name) of each family; refuses anything irregular."""
    if text == "":
        return {}
    assert text.endswith("\n"), "the last line is not ended"
    families, current, seen = {}, None, set()
    for line in text[:-1].split("\n"):
        if line.startswith("#"):
            what, name, rest = re.fullmatch(rf"# (HELP|TYPE) ({METRIC}) (.+)", line).groups()
            if what == "HELP":
                assert name not in families, f"second HELP of {name}, or its lines do not stand together"
                assert not re.search(r"\\[^\\n]", rest)
                current = families[name] = {"help": rest, "kind": None, "samples": {}}
            else:
                assert current and families.get(name) is current, f"TYPE of {name} is not after its HELP"
                assert current["kind"] is None, f"second TYPE of {name}"
                assert rest in KINDS
                current["kind"] = rest
            continue
        match = SAMPLE.fullmatch(line)
        assert match, f"no sample: {line!r}"
        name, labels, value = match[1], tuple(re.findall(LABEL, match[2] or "")), float(match[match.lastindex])
        assert current and current["kind"], f"a sample before its TYPE: {line!r}"
        family = next(key for key, entry in families.items() if entry is current)
        suffixes = ("_bucket", "_sum", "_count") if current["kind"] == "histogram" else ("",)
        assert name in [family + suffix for suffix in suffixes], f"{name} does not belong to {family}"
        assert len(dict(labels)) == len(labels), f"a label twice: {line!r}"
        assert (name, frozenset(labels)) not in seen, f"a sample twice: {line!r}"
        seen.add((name, frozenset(labels)))
        current["samples"].setdefault(name, {})[labels] = value
    for name, family in families.items():
        assert family["samples"], f"{name} has no sample"
        if family["kind"] == "counter":
            assert all(value >= 0 and value == int(value) for value in family["samples"][name].values())
        if family["kind"] == "histogram":
            check_histogram(name, family["samples"])
    return families


def check_histogram(name, samples):
    series = {}
    for labels, value in samples[f"{name}_bucket"].items():
        limits = dict(labels)
        limit = float(limits.pop("le"))
        series.setdefault(tuple(limits.items()), []).append((limit, value))
    assert set(series) == set(samples[f"{name}_sum"]) == set(samples[f"{name}_count"])
    for labels, buckets in series.items():
        assert [limit for limit, _ in buckets] == sorted({limit for limit, _ in buckets}), "buckets out of order"
        counts = [count for _, count in buckets]
        assert counts == sorted(counts), "buckets are not cumulative"
        assert buckets[-1] == (math.inf, samples[f"{name}_count"][labels])


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("# HELP a b\n# TYPE a counter\na 1", "not ended"),
        ("# TYPE a counter\na 1\n", "not after its HELP"),
        ("# HELP a b\na 1\n", "before its TYPE"),
        ("# HELP a b\n# TYPE a counter\na 1\n# HELP b b\n# TYPE b gauge\nb 1\n# HELP a b\n", "second HELP"),
        ("# HELP a b\n# TYPE a counter\nb 1\n", "does not belong"),
        ("# HELP a b\n# TYPE a counter\na 1\na 2\n", "twice"),
        ('# HELP a b\n# TYPE a counter\na{x="1",x="1"} 1\n', "twice"),
        ('# HELP a b\n# TYPE a counter\na{x="1} 1\n', "no sample"),
        ('# HELP a b\n# TYPE a counter\na{x="1",} 1\n', "no sample"),
        (
            '# HELP a b\n# TYPE a histogram\na_bucket{le="1"} 2\na_bucket{le="+Inf"} 1\na_sum 1\na_count 1\n',
            "cumulative",
        ),
    ],
)
def test_the_parser_is_strict(text, wrong):
    with pytest.raises(AssertionError, match=wrong):
        parse(text)


@pytest.fixture
def configs(tmp_path):
    """Two configurations that have every metric."""
    folder = write_table(tmp_path / "t", np.arange(100), np.ones((100, 2)))
    return [
        write_config(
            tmp_path / f"{name}.json",
            [model_config(name, {"t": (folder, 2), "u": (folder, 2)})],
            volatile_db={"type": "hash_map", "initial_cache_rate": 0.5, "cache_missed_embeddings": True},
            persistent_db={"type": "rocks_db", "path": str(tmp_path / f"database_{name}")},
        )
        for name in ("a", "b")
    ]


def documented():
    page = (Path(__file__).parent.parent / "docs/operations.md").read_text(encoding="utf-8")
    names = set(re.findall(r"^\| `(hps_\w+)` \|", page, re.MULTILINE))
    # Only servers with caches on devices have these (cc/tests/device_server_test.cc).
    return {name for name in names if not name.startswith(("hps_cache_", "hps_workspaces_", "hps_device_"))}


def test_metrics_of_devices_are_documented_too():
    """No server here has them all; each has a HELP line, and these are what the page is compared with."""
    root = Path(__file__).parent.parent
    source = (root / "cc/metrics/metrics.cc").read_text(encoding="utf-8")
    helped = set(re.findall(r'^ +\{"(hps_\w+)",', source, re.MULTILINE))
    page = (root / "docs/operations.md").read_text(encoding="utf-8")
    names = set()
    for cell, labels in re.findall(r"^\| (`hps_\w+_.*?) \| (.*?) \|", page, re.MULTILINE):
        first, *others = re.findall(r"`(\w+)`", cell)
        names |= {first} | {re.sub(r"_[a-z]+(_[a-z]+)$", rf"{other.rstrip('_')}\1", first) for other in others}
        if re.match("`hps_cache_(rows|fills|memory|pinned|keys_asked)", cell):
            assert labels == "model, table, device", first
    assert names == helped


def test_each_family_is_described_once(configs):
    with hps.ParameterServer(configs[0]) as server:
        server.lookup(np.arange(200), "a")
        families = parse(server.prometheus_text())
    assert set(families) == documented()
    assert {family["kind"] for family in families.values()} == {"counter", "gauge", "histogram"}
    for name, family in families.items():
        assert family["help"].endswith("."), name
        kind = {"total": "counter", "seconds": "histogram", "state": "gauge"}[name.rsplit("_", 1)[1]]
        assert family["kind"] == kind
    asked = families["hps_keys_asked_total"]["samples"]["hps_keys_asked_total"]
    assert asked == {(("model", "a"), ("table", "t")): 200, (("model", "a"), ("table", "u")): 0}
    (count,) = families["hps_lookup_duration_seconds"]["samples"]["hps_lookup_duration_seconds_count"].values()
    assert count == 1


def test_several_servers_share_the_families(configs):
    hps.shutdown()
    hps.Init(ps_config_file=configs[0], global_batch_size=1)
    layers = [hps.LookupLayer(name, 0, 2, "float32", ps_config_file=configs[1] * (name == "b")) for name in "ab"]
    try:
        for count, layer in zip((10, 20), layers, strict=True):
            layer(np.arange(count))
        families = parse(hps.prometheus_text())
        hashes = [entry["config_hash"] for entry in hps.stats()["servers"]]
    finally:
        hps.shutdown()
    assert set(families) == documented()
    asked = families["hps_keys_asked_total"]["samples"]["hps_keys_asked_total"]
    expected = {(("server", hashes[i]), ("model", name), ("table", "t")): 10 * (i + 1) for i, name in enumerate("ab")}
    assert {labels: value for labels, value in asked.items() if labels[2][1] == "t"} == expected
    for family in families.values():
        for samples in family["samples"].values():
            assert {dict(labels)["server"] for labels in samples} == set(hashes)
    assert parse(hps.prometheus_text()) == {}
