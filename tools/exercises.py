"""Write the learner's notebooks: each lesson that has exercises, with their bodies taken out.

    python tools/exercises.py                  every lesson
    python tools/exercises.py nbs/NAME.ipynb   one lesson

A code cell flagged `#| exercise` defines one function with a docstring. Signature and docstring stay, the body becomes a line
that raises NotImplementedError. All outputs from the first exercise on are cleared: what depends on an exercise is there,
and what does not is computed anew by whoever gets so far. nbdev's directives go, as a learner exports nothing; the flags
of cells that take long or need an accelerator stay, as they say which cells to leave out. The rest is the lesson.
"""

import ast
import os
import sys
from pathlib import Path

import nbformat

from badges import BADGE, METADATA, SETUP_SIGN, badge_source, put_cell, setup_source
from notebooks import ROOT, cell_flags, notebook_paths, read_notebook, skip_flags

FOLDER = ROOT / "exercises"


def exercise_function(source: str) -> ast.FunctionDef:
    """The one function that an exercise cell defines; ValueError where it is anything else."""
    body = ast.parse(source).body
    if len(body) != 1 or not isinstance(body[0], ast.FunctionDef) or ast.get_docstring(body[0]) is None:
        raise ValueError(f"an exercise cell should define one function with a docstring and nothing else:\n{source}")
    return body[0]


def exercise_names(nb: nbformat.NotebookNode) -> list[str]:
    """The names of the functions to be written, in order."""
    return [exercise_function(cell.source).name for cell in nb.cells if "exercise" in cell_flags(cell)]


def stub_source(source: str) -> str:
    """An exercise cell up to the end of the docstring, then a line that raises."""
    function = exercise_function(source)
    docstring = function.body[0]
    kept = source.split("\n")[: docstring.end_lineno]
    if docstring.lineno == function.lineno or kept[-1][docstring.end_col_offset :].strip():
        raise ValueError(f"{function.name}: the docstring should have its lines to itself")
    indent = " " * docstring.col_offset
    raising = f'raise NotImplementedError("Exercise {function.name}: write the body; a hint is folded above.")'
    return "\n".join([*kept, indent + raising])


def without_directives(cell: nbformat.NotebookNode) -> str:
    """The cell's source without nbdev's directives, except the flags that say when to leave it out."""
    if not cell_flags(cell) or cell_flags(cell) & skip_flags():
        return cell.source
    return "\n".join(line for line in cell.source.split("\n") if not line.startswith("#|")).strip("\n")


def introduction(names: list[str]) -> str:
    """What stands below the badge of a learner's notebook."""
    several = "the bodies of its exercises are" if len(names) > 1 else "the body of its exercise is"
    listed = ", ".join(f"`{name}`" for name in names)
    return (
        f"**Your copy of the lesson**: {several} left for you to write ({listed}), and the outputs from there on are left "
        "for you to compute.\n\n"
        "Run the cells from the top. Below each exercise `check(...)` says whether your function is right, and if not, what is "
        "wrong with it; after three failed checks it shows the hint. Nobody gets stuck: "
        f"`check({names[0]}, show_solution=True)` shows the solution, and with the course's own function in place the rest "
        "of the notebook runs:\n\n"
        f'```python\nfrom rlhf_course.checks import use_solution\nuse_solution("{names[0]}")\n```'
    )


def learner_notebook(path: Path) -> nbformat.NotebookNode | None:
    """The learner's copy of the lesson at `path`, None where it has no exercise."""
    nb = read_notebook(path)
    names = exercise_names(nb)
    if not names:
        return None
    cells, seen = [], False
    for cell in nb.cells:
        is_exercise = "exercise" in cell_flags(cell)
        seen = seen or is_exercise
        cell.source = without_directives(cell)
        cell.source = stub_source(cell.source) if is_exercise else cell.source
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [] if seen else [without_count(output) for output in cell.outputs]
        if cell.source:
            cells.append(cell)
    nb.cells, nb.metadata = cells, nbformat.from_dict(METADATA)
    put_cell(nb, 1, "markdown", BADGE, badge_source(FOLDER / path.name), "badge")
    put_cell(nb, 2, "code", SETUP_SIGN, setup_source(), "setup")
    nb.cells.insert(2, nbformat.v4.new_markdown_cell(introduction(names), id="your-copy"))
    return nb


def without_count(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The output without the number of the run it comes from."""
    if "execution_count" in output:
        output.execution_count = None
    return output


def learner_text(path: Path) -> str | None:
    """The file of the learner's copy of the lesson at `path`, None where it has no exercise."""
    nb = learner_notebook(path)
    return None if nb is None else nbformat.writes(nb) + "\n"


def write_exercises(paths: list[Path]) -> None:
    """Bring the learner's copies of these lessons up to date, and remove those whose lesson is gone."""
    texts = {FOLDER / path.name: learner_text(path) for path in paths}
    lessons = {path.name for path in notebook_paths()}
    texts |= {path: None for path in FOLDER.glob("*.ipynb") if path.name not in lessons}
    for path, text in texts.items():
        if text is None:
            path.unlink(missing_ok=True)
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            FOLDER.mkdir(exist_ok=True)
            unfinished = path.with_name(f".{path.name}.tmp")
            unfinished.write_text(text, encoding="utf-8", newline="\n")
            os.replace(unfinished, path)


if __name__ == "__main__":
    write_exercises(notebook_paths(sys.argv[1:]))
