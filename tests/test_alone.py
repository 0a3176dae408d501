"""Each lesson alone: one notebook in an empty folder, in a venv with Jupyter, run as on Colab.

The venv holds what the wheel requires, pip and Jupyter's kernel, by links; the package itself is not there until the
notebook's set-up cell has installed it. That cell names the repository, and here the wheel built from this tree instead.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from venvs import closure, linked_venv, runtime_requirements

import badges
from notebooks import QUIET_ENV, cell_flags, notebook_paths, read_notebook, settings, skip_flags

PACKAGE = settings()["lib_name"]
EXERCISES = sorted((ROOT / "exercises").glob("*.ipynb"))
QUICK = {ROOT / "nbs" / "00a_tiny_arena.ipynb", ROOT / "exercises" / "00a_tiny_arena.ipynb"}
JUPYTER = ("pip", "ipykernel", "nbconvert")
ABSENT = (PACKAGE, "nbdev", "fastcore", "execnb", "jupytext", "jupyterlab", "ipywidgets", "pytest", "sklearn")

each_notebook = pytest.mark.parametrize("path", [
    pytest.param(path, marks=[] if path in QUICK else pytest.mark.long, id=f"{path.parent.name}/{path.stem}")
    for path in [*notebook_paths(), *EXERCISES]])  # fmt: skip


@pytest.fixture(scope="session")
def distributions(wheel):
    """The wheel's runtime requirements and Jupyter's kernel, with all they need."""
    return list(closure([*runtime_requirements(wheel), *JUPYTER]).values())


@pytest.fixture
def python(distributions, tmp_path) -> Path:
    """The interpreter of a new venv without the package; its own kernel is the one that Jupyter finds."""
    python, _ = linked_venv(tmp_path / "venv", distributions)
    call(python, tmp_path, "-m", "ipykernel", "install", "--sys-prefix")
    found = f"import importlib.util as i; print(*[name for name in {ABSENT!r} if i.find_spec(name)])"
    assert call(python, tmp_path, "-c", found).split() == [], "not an honest test"
    return python


def call(python: Path, folder: Path, *arguments: str | Path) -> str:
    """What the interpreter says; AssertionError where it fails. No network, no index of packages, no set-up of the user's."""
    kept = {name: value for name, value in os.environ.items() if name in ("LANG", "LC_ALL", "SYSTEMROOT", "TMPDIR")}
    paths = os.pathsep.join([str(python.parent), os.defpath])
    offline = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    home = python.parent.parent.parent / "home"
    home.mkdir(exist_ok=True)
    env = {**kept, **QUIET_ENV, **offline, "PATH": paths, "HOME": str(home), "IPYTHONDIR": str(home / "ipython")}
    done = subprocess.run([python, *arguments], cwd=folder, env=env, text=True, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    assert done.returncode == 0, re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)[-6000:]
    return done.stdout


def put_alone(nb: nbformat.NotebookNode, folder: Path, wheel: Path) -> Path:
    """The notebook as the one file of a new folder: installing the wheel, flagged cells skipped, exercises given up."""
    cfg = settings()
    [setup] = [cell for cell in nb.cells if cell.source == badges.setup_source()]
    setup.source = setup.source.replace(f"git+{cfg['git_url']}.git@{cfg['branch']}", str(wheel))
    assert str(wheel) in setup.source
    for cell in nb.cells:
        if cell_flags(cell) & skip_flags():
            cell.metadata["tags"] = ["skip-execution"]
        elif cell.cell_type == "code" and (match := re.fullmatch(r"check\((\w+)\)", cell.source)):
            name = match[1]
            cell.source = f"from {PACKAGE}.checks import use_solution\nuse_solution({name!r})\nassert check({name}).passed"
    folder.mkdir()
    nbformat.write(nb, folder / "lesson.ipynb")
    return folder / "lesson.ipynb"


def run_alone(python: Path, lesson: Path) -> nbformat.NotebookNode:
    """The notebook as it is after all its cells ran."""
    call(python, lesson.parent, "-m", "nbconvert", "--to", "notebook", "--execute", "--output", "done.ipynb", lesson.name)
    return read_notebook(lesson.with_name("done.ipynb"))


@each_notebook
def test_notebook_runs_alone(path, wheel, python, tmp_path):
    """To its end, with the package that its set-up cell installed."""
    done = run_alone(python, put_alone(read_notebook(path), tmp_path / "alone", wheel))
    unrun = [cell.source for cell in done.cells if cell.cell_type == "code" and cell.source
             and not cell.execution_count and not cell_flags(cell) & skip_flags()]  # fmt: skip
    assert not unrun
    place = call(python, tmp_path, "-I", "-c", f"import {PACKAGE}; print({PACKAGE}.__file__)").strip()
    assert Path(place).is_relative_to(tmp_path / "venv"), place


def test_notebook_without_its_set_up_cell_fails(wheel, python, tmp_path):
    """So the package does come from that cell."""
    nb = read_notebook(ROOT / "nbs" / "90_plots.ipynb")
    lesson = put_alone(nb, tmp_path / "alone", wheel)
    nb.cells = [cell for cell in nb.cells if str(wheel) not in cell.source]
    nbformat.write(nb, lesson)
    with pytest.raises(AssertionError, match=f"No module named '{PACKAGE}'"):
        run_alone(python, lesson)


def test_records_come_with_the_package(tmp_path, monkeypatch):
    """Where there is no results folder the packed record is read, and a complete one is not computed again."""
    package = shutil.copytree(ROOT / PACKAGE, tmp_path / "site" / PACKAGE, ignore=shutil.ignore_patterns("data", "__pycache__"))
    record = {"config": {"steps": 3}, "seeds": [0, 1], "values": {"0": 1.5, "1": 2.5}}
    (package / "results").mkdir()
    (package / "results" / "99_example.json").write_text(json.dumps(record))
    code = f"""
from {PACKAGE}.checks import load_result, record_result
print(load_result("99_example", {{"steps": 3}})["values"])
print(record_result("99_example", {{"steps": 3}}, run=None, seeds=(0, 1)).parent.parent.name)
record_result("99_example", {{"steps": 4}}, run=float, seeds=(0, 1))
print(load_result("99_example", {{"steps": 4}})["values"])
try:
    load_result("99_example", {{"steps": 3}})
except ValueError as error:
    print(error)
"""
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    (tmp_path / "alone").mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "alone", check=True, capture_output=True, text=True)
    packed, place, own, refused = done.stdout.splitlines()
    assert (packed, place, own) == ("{0: 1.5, 1: 2.5}", PACKAGE, "{0: 0.0, 1: 1.0}")
    assert "other steps" in refused
    assert [path.name for path in (tmp_path / "alone").rglob("*.json")] == ["99_example.json"]
