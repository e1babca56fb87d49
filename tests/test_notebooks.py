"""Notebooks: every one is a pair whose halves agree, holds no outputs, is listed, and runs in a minute."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

jupytext = pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
MOST_S = 60.0  # of processor time of the kernel: others may use the machine
SPENT = "import os as _os\n_t = _os.times()\nprint('spent', _t.user + _t.system + _t.children_user + _t.children_system)"


def cells(notebook: Any) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source.strip()) for cell in notebook.cells]


def test_the_four_jobs_have_a_notebook_and_the_readme_lists_each() -> None:
    assert NAMES == ["capacity", "capture", "search", "validate"]
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES
    readme = (FOLDER / "README.md").read_text()
    assert all(f"({name}.ipynb)" in readme for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_halves_of_a_pair_agree_and_hold_no_outputs(name: str) -> None:
    source = jupytext.read(FOLDER / f"{name}.py")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    assert cells(notebook) == cells(source), f"make it again: jupytext --to ipynb notebooks/{name}.py"
    assert cells(notebook)[0][1].startswith("# "), "a notebook begins with its title"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the machinery around notebooks, not of moesim
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_in_a_minute_and_draws_pictures(name: str) -> None:
    if name == "capture":
        pytest.importorskip("transformers")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(SPENT))
    begin = time.perf_counter()
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1
    spent = float(outputs[-1]["text"].split()[1])
    assert spent <= MOST_S, f"{spent:.0f} s of processor time, {time.perf_counter() - begin:.0f} s by the clock"
