"""The tests of the layers once more under legacy Keras, in a process of its own."""

import os
import pathlib
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

FILES = ("test_lookup_layers.py", "test_sparse_lookup.py", "test_saved_model.py", "test_keras_training.py")


@pytest.mark.skipif(os.environ.get("TF_USE_LEGACY_KERAS") == "1", reason="this is the other process")
def test_layers_under_legacy_keras(tmp_path):
    report = tmp_path / "report.xml"
    files = [str(pathlib.Path(__file__).parent / name) for name in FILES]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *files],
        env={**os.environ, "TF_USE_LEGACY_KERAS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:]
    counts = [suite.attrib for suite in ElementTree.parse(report).getroot().iter("testsuite")]
    tests, skipped = (sum(int(suite[name]) for suite in counts) for name in ("tests", "skipped"))
    assert tests - skipped > 200, f"{tests} tests, {skipped} skipped"
