"""Write each notebook's badge cell, set-up cell and metadata, with the names that stand in settings.ini.

    python tools/badges.py                  every notebook of nbs/
    python tools/badges.py nbs/NAME.ipynb   one notebook

A notebook that has no badge or set-up cell yet gets it after its title.
"""

import sys
from pathlib import Path

import nbformat

from notebooks import ROOT, notebook_paths, read_notebook, settings

METADATA = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
COLAB = "https://colab.research.google.com/github"
SETUP_SIGN = "importlib.util.find_spec("  # what tells the set-up cell from others


def badge_source(path: Path) -> str:
    """The markdown of the badge that opens the notebook at `path` in Colab."""
    cfg = settings()
    place = path.resolve().relative_to(ROOT).as_posix()
    return f"[![Open In Colab]({BADGE})]({COLAB}/{cfg['user']}/{cfg['repo']}/blob/{cfg['branch']}/{place})"


def setup_source() -> str:
    """The code that installs the package where it cannot be imported, as on Colab."""
    cfg = settings()
    return (
        "import importlib.util, subprocess, sys\n"
        f'if importlib.util.find_spec("{cfg["lib_name"]}") is None:\n'
        '    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", '
        f'"git+{cfg["git_url"]}.git@{cfg["branch"]}"])'
    )


def put_cell(nb: nbformat.NotebookNode, index: int, cell_type: str, sign: str, source: str, cell_id: str) -> None:
    """Give the cell of this type that holds `sign` the `source`; where there is none, insert one at `index`."""
    for cell in nb.cells[:6]:
        if cell.cell_type == cell_type and sign in cell.source:
            cell.source = source
            return
    make = nbformat.v4.new_markdown_cell if cell_type == "markdown" else nbformat.v4.new_code_cell
    nb.cells.insert(index, make(source, id=cell_id))


def write_header(path: Path) -> None:
    """Bring badge, set-up cell and metadata of the notebook at `path` up to date; nothing is written if they are."""
    nb = read_notebook(path)
    before = nbformat.writes(nb)
    nb.metadata = nbformat.from_dict(METADATA)
    put_cell(nb, 1, "markdown", BADGE, badge_source(path), "badge")
    put_cell(nb, 2, "code", SETUP_SIGN, setup_source(), "setup")
    if nbformat.writes(nb) != before:
        nbformat.write(nb, path)


if __name__ == "__main__":
    for notebook in notebook_paths(sys.argv[1:]):
        write_header(notebook)
