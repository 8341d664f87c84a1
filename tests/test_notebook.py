"""The notebooks run from top to bottom, and are stored without outputs."""

import pathlib

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "notebooks"


def read(path):
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_is_stored_without_outputs(path):
    for cell in read(path).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None, f"strip the outputs of {path.name}"


def run(name) -> tuple[list, str]:
    """Runs a notebook; its plots and its text."""
    notebook = read(FOLDER / f"{name}.ipynb")
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    plots = [output for output in outputs if "image/png" in output.get("data", {})]
    return plots, "".join(output.get("text", "") for output in outputs)


def test_basic_workflow():
    plots, text = run("basic_workflow")
    assert len(plots) == 2
    assert text.count("largest difference") == 3


def test_database_backends():
    plots, text = run("database_backends")
    assert len(plots) == 2
    assert "hps_et.films.films" in text
    assert "all of them right" in text
