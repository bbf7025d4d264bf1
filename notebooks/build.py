"""Runs the notebooks and writes them with their outputs: `python -m notebooks.build [NAME …]`, from the .py sources."""

import argparse
import pathlib

import jupytext
import nbclient

FOLDER = pathlib.Path(__file__).parent
SOURCES = sorted(path.stem for path in FOLDER.glob("*.py") if path.read_text().startswith("# %%"))


def read(name):
    """The cells of a source, without outputs. Cells have no random ids, so that the same source is the same file."""
    notebook = jupytext.read(FOLDER / f"{name}.py", fmt="py:percent")
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"{name}-{i}"
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return notebook


def run(notebook):
    """Executes all cells in the project's folder; an error in a cell is raised."""
    nbclient.NotebookClient(notebook, timeout=7200, resources={"metadata": {"path": str(FOLDER.parent)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, which differ from run to run
        if "outputs" in cell:  # what libraries log is no result
            cell.outputs = [output for output in cell.outputs if not is_log(output)]
    return notebook


def is_log(output):
    return output.get("name") == "stderr" or output.get("text", "").startswith("WARNING:tensorflow")


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m notebooks.build", description=__doc__.split(":")[0])
    parser.add_argument("names", nargs="*", default=SOURCES, help=f"of {', '.join(SOURCES)}; by default all")
    for name in parser.parse_args(arguments).names:
        path = FOLDER / f"{name}.ipynb"
        jupytext.write(run(read(name)), path, fmt="ipynb")
        print(path)


if __name__ == "__main__":
    main()
