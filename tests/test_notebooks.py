"""The notebooks run from top to bottom, and what they print is what is stored in them."""

from pathlib import Path

import pytest
from pages import ROOT, assert_alike

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def printed(notebook: dict) -> str:
    """Return what the cells of a notebook have printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    return "".join(output.text for output in outputs if output.output_type == "stream")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_prints_what_is_stored(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, 4)
    assert sum(cell.cell_type == "code" for cell in notebook.cells) <= 10
    said = printed(notebook)
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ()))
    nbclient.NotebookClient(notebook, timeout=250, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert_alike(printed(notebook), said, tolerance=8)  # training on another processor ends elsewhere
