"""The index and README: one table of lessons, every lesson in it, every link leads to a file, every number is the lesson's."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

from exercises import exercise_names
from notebooks import notebook_paths, read_notebook

INDEX, README = ROOT / "nbs" / "index.ipynb", ROOT / "README.md"
HEAD = "lesson | what it builds | read | run | exercises | it ends with | best possible"
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
LESSONS = [path for path in notebook_paths() if path.name[0] == "0"]
SUPPORT = [path for path in notebook_paths() if path.name[0] == "9"]
LIMIT_ROW = re.compile(r"value +(?P<value>[-+.\de]+) \| limit +(?P<limit>[-+.\de]+) \|")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def text_of(path: Path) -> str:
    """The markdown of a notebook, or a file's text."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    return "\n\n".join(cell.source for cell in read_notebook(path).cells if cell.cell_type == "markdown")


def table_of(text: str) -> list[list[str]]:
    """The rows of the table of lessons, each a list of its cells."""
    lines = text.split("\n")
    rows = []
    for line in lines[lines.index(f"| {HEAD} |") + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def with_files(rows: list[list[str]], folder: Path) -> list[list[str]]:
    """The rows with each link relative to the root, where they are relative to `folder`."""
    def from_root(match):
        return f"[{match[1]}]({(folder / match[2]).resolve().relative_to(ROOT).as_posix()})"

    return [[LINK.sub(from_root, cell) for cell in row] for row in rows]


def dead_links(text: str, folder: Path) -> list[str]:
    """The links of a text in `folder` that lead to no file; addresses on the network are not followed."""
    targets = [target.partition("#")[0] for _, target in LINK.findall(text) if "://" not in target]
    return [target for target in targets if target and not (folder / target).is_file()]


def lesson_of(row: list[str], folder: Path = INDEX.parent) -> Path:
    """The notebook that a row is about."""
    return (folder / LINK.match(row[0])[2]).resolve()


def rule_minutes(path: Path) -> float:
    """150 words of text and 20 lines of code a minute."""
    cells = read_notebook(path).cells
    words = sum(len(cell.source.split()) for cell in cells if cell.cell_type == "markdown")
    lines = sum(bool(line.strip()) for cell in cells if cell.cell_type == "code" for line in cell.source.split("\n"))
    return words / 150 + lines / 20


def limit_rows(path: Path) -> list[tuple[str, str]]:
    """Value and limit of each row that show_limit printed in the stored outputs."""
    cells = [cell for cell in read_notebook(path).cells if cell.cell_type == "code" and "show_limit(" in cell.source]
    printed = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    return [(match["value"], match["limit"]) for match in LIMIT_ROW.finditer(printed)]


def says(text: str, number: str) -> bool:
    """Whether the first number of a text, with the decimals it has, is the given one, rounded."""
    found = NUMBER.search(text)
    return found is not None and abs(float(found[0]) - float(number)) <= 0.501 * 10.0 ** -len(found[0].partition(".")[2])


def ends_as(row: list[str], rows: list[tuple[str, str]]) -> bool:
    """Whether a lesson's row of the table gives value and limit of one of its show_limit rows."""
    ends, best = row[5].rpartition(": ")[2], row[6]
    return any(says(ends, value) and says(best, limit) for value, limit in rows)


TABLE = table_of(text_of(INDEX))
each_row = pytest.mark.parametrize("row", TABLE, ids=lambda row: lesson_of(row).stem)


def test_readme_has_the_table_of_the_index():
    """Cell by cell."""
    assert with_files(table_of(text_of(README)), ROOT) == with_files(TABLE, INDEX.parent)


def test_every_lesson_is_in_the_table():
    """In order, and no other."""
    assert [lesson_of(row) for row in TABLE] == LESSONS


def test_every_support_notebook_is_linked():
    """Below the table."""
    linked = {(INDEX.parent / target).resolve() for _, target in LINK.findall(text_of(INDEX))}
    assert set(SUPPORT) <= linked


@pytest.mark.parametrize("path", [INDEX, README], ids=["index", "README"])
def test_every_link_leads_to_a_file(path):
    """Relative to the file it stands in."""
    assert LINK.findall(text_of(path)) and not dead_links(text_of(path), path.parent)


@each_row
def test_row_is_what_the_lesson_says_of_itself(row):
    """Number and title; the number of exercises, linked to the learner's copy; minutes to read within a quarter of the rule."""
    path = lesson_of(row)
    nb = read_notebook(path)
    title = nb.cells[0].source.split("\n")[0].removeprefix("# ")
    assert LINK.match(row[0])[1].lower() == f"{path.stem.partition('_')[0]} {title}".lower()
    n_exercises = len(exercise_names(nb))
    assert row[4] == (f"[{n_exercises}](../exercises/{path.name})" if n_exercises else "")
    assert abs(int(row[2]) - rule_minutes(path)) <= rule_minutes(path) / 4, f"about {rule_minutes(path):.0f} minutes to read"
    assert re.fullmatch(r"½|[1-9]\d*", row[3])


@each_row
def test_row_ends_as_the_lesson_ends(row):
    """With the numbers of a show_limit row in the stored outputs."""
    rows = limit_rows(lesson_of(row))
    assert rows, f"{lesson_of(row).name} has no stored output of show_limit: run `make lessons`"
    assert ends_as(row, rows), f"the table gives {row[5]!r} and {row[6]!r}; the lesson ends with (value, limit) {rows}"


def test_these_checks_find_what_they_are_for(tmp_path):
    """A changed cell, a lesson left out, a dead link, a wrong number."""
    text = text_of(README)
    first = TABLE[0]
    assert table_of(text.replace(first[1], "something else")) != table_of(text)
    line = next(line for line in text.split("\n") if line.startswith(f"| {first[0].replace('(', '(nbs/')} |"))
    assert len(table_of(text.replace(line + "\n", ""))) == len(TABLE) - 1
    assert dead_links("[a](nbs/index.ipynb) [b](nbs/77_gone.ipynb#there) [c](https://example.com/x)", ROOT) == ["nbs/77_gone.ipynb"]
    row = ["", "", "", "", "", "loss (nats, 3 seeds): 0.52", "0.509, the entropy"]
    assert ends_as(row, [("1", "1"), ("0.5241", "0.5087")])
    assert not ends_as(row, [("0.5261", "0.5087")]) and not ends_as(row, [("0.5241", "0.5099")]) and not ends_as(row, [])
    assert says("500, the longest", "500") and not says("?", "500") and not says("500", "501")
