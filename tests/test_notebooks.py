"""The notebooks run, and the files that are kept are those of their sources."""

import json

import jupytext
import pytest
from PIL import Image, ImageDraw

from benchmarks.style import draw_pictures
from notebooks.build import FOLDER, SOURCES, read, run


def test_there_are_notebooks():
    assert {"text_to_image", "export_and_serve", "finetune"} <= set(SOURCES)


@pytest.fixture(scope="module")
def style(tmp_path_factory):
    """A small set of pictures for the notebook `finetune`: flat shapes in place of emoji."""
    folder, drawings = tmp_path_factory.mktemp("style"), {}
    for i, name in enumerate(("red apple", "rocket", "penguin", "banana")):
        drawings[name] = Image.new("RGBA", (80, 80))
        ImageDraw.Draw(drawings[name]).regular_polygon((40, 40, 35), i + 3, fill=(60 * i, 200 - 50 * i, 90))
    grounds = {"red": (205, 40, 45), "blue": (45, 95, 205), "white": (255, 255, 255)}
    draw_pictures(folder, drawings, grounds, learnt=2, count=2)
    return folder


@pytest.mark.parametrize("name", SOURCES)
def test_the_kept_notebook_is_its_source_with_outputs(name):
    kept, source = jupytext.read(FOLDER / f"{name}.ipynb"), read(name)
    assert [(cell.cell_type, cell.source) for cell in kept.cells] == [(c.cell_type, c.source) for c in source.cells]
    outputs = [output for cell in kept.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)
    assert len(json.dumps(kept)) < 2**20


@pytest.mark.parametrize("name", SOURCES)
def test_it_runs(name, style, monkeypatch):
    monkeypatch.setenv("STYLE", str(style))
    monkeypatch.setenv("EPOCHS", "1")
    notebook = run(read(name))
    kept = jupytext.read(FOLDER / f"{name}.ipynb")
    for cell, known in zip(notebook.cells, kept.cells):
        drawn, wanted = (
            [bool(o.get("data", {}).get("image/png")) for o in c.get("outputs", [])] for c in (cell, known)
        )
        assert drawn == wanted
