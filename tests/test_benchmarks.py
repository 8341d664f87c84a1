"""The benchmark harness at tiny size: it checks rows, and writes what it promises."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import __main__ as command  # noqa: E402
from benchmarks import report, tiers  # noqa: E402
from benchmarks.axes import QUICK  # noqa: E402
from benchmarks.measure import WrongRowsError, check_rows, take_turns  # noqa: E402
from benchmarks.workload import Case, IdSource, TableData, cases  # noqa: E402

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder of a quick run, made in a process of its own: it shuts servers down."""
    folder = tmp_path_factory.mktemp("results")
    arguments = [sys.executable, "-m", "benchmarks", "--quick", "--output", str(folder)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (folder / report.SUMMARY).read_text(encoding="utf-8").strip()
    return folder


def test_every_case_is_there_once_with_its_numbers(results):
    run = report.read(results / report.LINES)
    expected = [case for width in QUICK.widths for case in cases(QUICK, width)]
    found = [Case(r["form"], r["distribution"], r["width"], r["batch"], r["call"]) for r in run.lookups]
    assert found == expected
    for case, record in zip(expected, run.lookups, strict=True):
        keys = case.ids_per_call(QUICK)
        assert record["keys"] == keys
        assert 0 < record["unique_share"] <= 1
        for measured in record["peers"].values():
            assert 0 < measured["median_us"] <= measured["p99_us"]
            assert measured["ratio"] > 0
            assert measured["ratio_quartiles"][0] <= measured["ratio_quartiles"][1]
        assert {"hps", "hps_scattered", "tensorflow"} <= set(record["peers"])
        assert record["peers"]["tensorflow"]["ratio"] == 1
        for peer in ("hps", "hps_scattered"):
            rows_from = record["peers"][peer]["rows_from"]
            assert rows_from == {"volatile": keys * record["rounds"], "persistent": 0, "default": 0}


def test_load_is_measured(results):
    load = report.read(results / report.LINES).load
    assert load["rows"] * (load["width"] * 4 + 8) == load["folder_bytes"]
    assert load["rows_per_second"] > 0
    assert load["peak_bytes"] >= load["loaded_bytes"] > load["rows"] * load["width"] * 4


def test_results_tell_the_machine_but_no_name_and_no_path(results):
    about = report.read(results / report.LINES).about
    assert about["machine"]["cores"] >= 1
    assert about["versions"]["tensorflow"].startswith("2.21.")
    assert about["command"] == "./dev bench --quick"
    text = "".join((results / name).read_text(encoding="utf-8") for name in (report.LINES, report.SUMMARY))
    assert str(ROOT) not in text
    assert str(results) not in text
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", text)


def test_table_and_page_show_every_case(results):
    run = report.read(results / report.LINES)
    assert report.summary(run).count("\n| dense") + report.summary(run).count("\n| sparse") == len(run.lookups) // 2
    page = report.page(run)
    assert page.count("\n| uniform") + page.count("\n| zipf") == len(run.lookups)
    assert f"{run.load['rows_per_second']:,}" in page


def test_chart_is_svg_with_a_line_for_each_series(results):
    root = ElementTree.parse(results / report.CHART).getroot()
    assert root.tag == SVG + "svg"
    lines = root.findall(SVG + "polyline")
    panels = len(QUICK.forms) * len(QUICK.distributions)
    assert len(lines) == panels * len(QUICK.widths) * len(QUICK.calls)
    width, height = float(root.get("width")), float(root.get("height"))
    for line in lines:
        points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        assert len(points) == len(QUICK.batches)
        assert all(0 < x < width and 0 < y < height for x, y in points)


def test_recorded_page_is_made_from_the_recorded_lines():
    run = report.read(report.RESULTS / report.LINES)
    remedy = "run: python -m benchmarks.report"
    assert report.PAGE.read_text(encoding="utf-8") == report.page(run), remedy
    assert (report.RESULTS / report.SUMMARY).read_text(encoding="utf-8") == report.summary(run), remedy


# Rows are checked -----------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    return TableData(100, 4, tmp_path)


DENSE = Case("dense", "uniform", 4, 8, "eager")
SPARSE = Case("sparse", "uniform", 4, 2, "eager")


def test_right_rows_pass(data):
    ids = np.arange(8) * 7
    check_rows(DENSE, QUICK, data, ids, {"a": data.values[ids], "b": data.values[ids].copy()})


def test_one_wrong_bit_is_found_and_named(data):
    ids = np.arange(8) * 7
    wrong = data.values[ids]
    wrong.view(np.uint32)[5, 2] ^= 1
    with pytest.raises(WrongRowsError, match="b returned 1 wrong rows, the first is row 5"):
        check_rows(DENSE, QUICK, data, ids, {"a": data.values[ids], "b": wrong})


def test_another_shape_or_type_is_refused(data):
    ids = np.arange(8)
    for rows in (data.values[ids][:7], data.values[ids].astype(np.float64)):
        with pytest.raises(WrongRowsError, match="expected float32"):
            check_rows(DENSE, QUICK, data, ids, {"a": rows})


def test_combined_rows_must_be_the_mean_and_bit_equal_among_peers(data):
    ids = np.arange(32)
    mean = data.values[ids].reshape(2, 16, 4).mean(axis=1, dtype=np.float64).astype(np.float32)
    check_rows(SPARSE, QUICK, data, ids, {"a": mean, "b": mean.copy()})
    other_rounding = mean.copy()
    other_rounding.view(np.uint32)[1, 1] ^= 1
    with pytest.raises(WrongRowsError, match="b returned 1 wrong rows, the first is row 1"):
        check_rows(SPARSE, QUICK, data, ids, {"a": mean, "b": other_rounding})
    with pytest.raises(WrongRowsError, match="2 wrong rows"):
        check_rows(SPARSE, QUICK, data, ids, {"a": mean * 2, "b": mean * 2})


# How it measures ------------------------------------------------------------------------------------------------------


def test_peers_take_turns_on_fresh_batches():
    seen = []
    calls = [(lambda batch, name=name: seen.append((name, batch)), [0, 1, 2]) for name in "ab"]
    times, processor_times = take_turns(calls, replace(QUICK, min_rounds=4, max_rounds=4))
    assert seen == [(name, turn % 3) for turn, order in enumerate(["ab", "ba", "ab", "ba"]) for name in order]
    assert times.shape == processor_times.shape == (2, 4)
    assert (times > 0).all()


def test_zipf_ids_have_the_shares_of_the_law():
    rows, count = 1_000, 200_000
    ids = IdSource(rows, "zipf").draw(count)
    assert ids.min() >= 0 and ids.max() < rows
    counts = np.sort(np.bincount(ids, minlength=rows))[::-1]
    shares = np.arange(1, rows + 1) ** -1.05
    shares /= shares.sum()
    np.testing.assert_allclose(counts[:10] / count, shares[:10], rtol=0.05)


def test_unknown_distribution_is_refused():
    with pytest.raises(ValueError, match="unknown distribution 'normal'"):
        IdSource(10, "normal")


@pytest.mark.parametrize("option", ["--rows", "--width", "--batch"])
def test_sizes_below_one_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        command.parse([option, "0"])
    assert "must be at least 1, got 0" in capsys.readouterr().err


def test_failed_run_leaves_the_old_results(tmp_path, monkeypatch):
    def fail(*arguments):
        raise WrongRowsError("wrong")

    monkeypatch.setattr(command, "run", fail)
    lines = tmp_path / report.LINES
    lines.write_text("old", encoding="utf-8")
    with pytest.raises(WrongRowsError):
        command.main(["--quick", "--output", str(tmp_path)])
    assert lines.read_text(encoding="utf-8") == "old"


def test_a_file_that_is_no_run_is_refused(tmp_path):
    path = tmp_path / report.LINES
    path.write_text(json.dumps({"kind": "lookup"}) + os.linesep, encoding="utf-8")
    with pytest.raises(ValueError, match="does not begin with the record of a run"):
        report.read(path)


# Tiers side by side ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    """A copy of what a recording reads and writes."""
    for folder in ("benchmarks", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    tools = [f"tools/{name}.py" for name in ("generate_docs", "gpu_cache_page", "note_tables")]
    for file in ("README.md", *tools, "tests/services.py", "cuda_kernels/cache_bucket.h"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    return tmp_path


def record(tree, *command):
    """Runs a benchmark there; afterwards all generated pages are current."""
    done = subprocess.run(
        [sys.executable, "-m", *command, "--record"], cwd=tree, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    check = [sys.executable, "tools/generate_docs.py", "--check"]
    assert subprocess.run(check, cwd=tree, capture_output=True, text=True).stdout == ""


def test_a_recording_leaves_no_page_stale(tree):
    few = ["--quick", "--skip", "load", "--form", "dense", "--call", "function", "--distribution", "zipf"]
    record(tree, "benchmarks", *few, "--width", "64", "--batch", "7")
    summary = (tree / "benchmarks/results" / report.SUMMARY).read_text(encoding="utf-8")
    assert "| dense, zipf | 7 | 7 |" in summary
    assert summary.strip() in (tree / "README.md").read_text(encoding="utf-8")
    assert "--batch 7" in (tree / "docs/performance.md").read_text(encoding="utf-8")


def test_tables_of_design_notes_are_made_from_the_recorded_lines(tree):
    note, lines = tree / "docs/design/0006-when-tiers-fail.md", tree / "benchmarks/results/stack.jsonl"
    before = note.read_text(encoding="utf-8")
    run = {"kind": "run", "version": "of the test", "commit": "abc", "load_average": 0.5}
    measured = {"kind": "load_beside_lookups", "tiers": "hash_map", "p99_ratio": 1.25}
    measured |= {"p99_ratio_quartiles": [1.1, 1.5], "quiet_p99_us": 171.5}
    with open(lines, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in (run, measured))
    command = [sys.executable, "tools/generate_docs.py"]
    check = subprocess.run([*command, "--check"], cwd=tree, capture_output=True, text=True)
    assert (check.returncode, check.stdout) == (1, f"{note.relative_to(tree)}:1: out of date: run ./dev docs\n")
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    line = "| of the test | abc | 0.5 | 172 /  | **1.25** (1.10 .. 1.50) |  |\n"
    assert set(note.read_text(encoding="utf-8").splitlines()) - set(before.splitlines()) == {line.strip()}
    assert subprocess.run([*command, "--check"], cwd=tree, capture_output=True).returncode == 0


def test_every_tier_is_measured_and_makes_the_table(tree):
    # So many rows that the memory a cluster takes without any (buffers, connections) is little beside theirs.
    record(tree, "benchmarks.tiers", "--rows", "20000", "--width", "4", "--seconds", "0")
    results = tree / "benchmarks/results"
    about, *measured = [json.loads(line) for line in (results / tiers.LINES).read_text(encoding="utf-8").splitlines()]
    names = {entry["tier"] for entry in measured}
    assert names == {name for name, _, _ in tiers.TIERS}
    for entry in measured:
        assert 0 < entry["median_us"] <= entry["p99_us"]
        assert 16 <= entry["bytes_per_row"] < 400
    text = (results / tiers.SUMMARY).read_text(encoding="utf-8")
    assert text == tiers.summary([about, *measured])
    assert text.count("\n| ") == 1 + len(names)
    assert str(tree) not in text and str(ROOT) not in text
    assert text in (tree / "docs/operations.md").read_text(encoding="utf-8")


def test_recorded_tiers_are_made_from_the_recorded_lines():
    lines = (report.RESULTS / tiers.LINES).read_text(encoding="utf-8").splitlines()
    expected = tiers.summary([json.loads(line) for line in lines])
    assert (report.RESULTS / tiers.SUMMARY).read_text(encoding="utf-8") == expected
