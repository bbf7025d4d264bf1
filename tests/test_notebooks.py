"""The notebooks run, and the files that are kept are those of their sources."""

import json

import jupytext
import pytest

from notebooks.build import FOLDER, SOURCES, read, run


def test_there_are_notebooks():
    assert {"text_to_image", "export_and_serve"} <= set(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_the_kept_notebook_is_its_source_with_outputs(name):
    kept, source = jupytext.read(FOLDER / f"{name}.ipynb"), read(name)
    assert [(cell.cell_type, cell.source) for cell in kept.cells] == [(c.cell_type, c.source) for c in source.cells]
    outputs = [output for cell in kept.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)
    assert len(json.dumps(kept)) < 2**20


@pytest.mark.parametrize("name", SOURCES)
def test_it_runs(name):
    notebook = run(read(name))
    kept = jupytext.read(FOLDER / f"{name}.ipynb")
    for cell, known in zip(notebook.cells, kept.cells):
        drawn, wanted = (
            [bool(o.get("data", {}).get("image/png")) for o in c.get("outputs", [])] for c in (cell, known)
        )
        assert drawn == wanted
