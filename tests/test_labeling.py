"""Labeling by hand: the panel's callbacks, killed processes, full disks, foreign files, terminals, kernels with and without a person."""

import json
import queue
import random
import resource
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager
from lessons import RunUnflagged
from rlhf_course.labeling import (
    Labeling,
    LabelingPanel,
    ask_in_terminal,
    binomial_interval,
    plan_questions,
    question_text,
    read_rows,
    text_to_html,
)
from rlhf_course.loading import load_comparisons
from scipy.stats import binomtest

STRANGE = ["שלום עולם, مرحبا", "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301", "<script>alert(1)</script> & \"quotes\" 'too' </div>", "two\nlines\r\nand\ttabs\r",
           "line\u2028separators\u2029and\x85next", "$x^2$ \\alpha `code`", "\x1b[2J\x1b[31mred\x07", "\x00nul", " ", "x" * 100_000]  # fmt: skip


def pairs(n):
    """`n` different comparisons with writers and a recorded winner."""
    return [{"prompt": f"prompt {i}", "response_a": f"first of {i}", "response_b": f"second of {i}", "winner": ("a", "b", "tie")[i % 3],
             "model_a": "SECRET-ONE", "model_b": "SECRET-TWO"} for i in range(n)]  # fmt: skip


def enter(panel, text):
    """Type a text into the panel's box and press Enter, as the page reports it."""
    panel.box.value = text
    panel.box._handle_custom_msg({"event": "submit"}, [])


def refusal(*args, **kwargs):
    """The one-line error with which a labeling is refused."""
    with pytest.raises(ValueError) as caught:
        Labeling(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is shown, and what is saved.


def test_what_is_shown_is_what_is_saved_and_nothing_gives_the_writers_away(tmp_path):
    """Each question: texts on the panel are those of the pair, turned as planned; no writer or recorded winner in any widget."""
    rows = pairs(20)
    labeling = Labeling(Dataset.from_list(rows), tmp_path / "answers.jsonl", repeat_share=0.5, seed=3)
    panel = LabelingPanel(labeling, min_seconds=0)
    for question in labeling.questions:
        row = rows[question.pair]
        sides = (row["response_b"], row["response_a"]) if question.turned else (row["response_a"], row["response_b"])
        state = json.dumps([widget.get_state() for widget in (panel.progress, panel.prompt, panel.left, panel.right, panel.message)], default=str)
        assert row["prompt"] in panel.prompt.value and sides[0] in panel.left.value and sides[1] in panel.right.value
        assert "SECRET" not in state and "repeat" not in state
        panel.buttons["t"].click()
        saved = labeling.answers[-1]
        assert (saved["response_a"], saved["response_b"]) == sides and saved["winner"] == "tie"
        assert saved["model_a"] == ("SECRET-TWO" if question.turned else "SECRET-ONE")
    assert "SECRET" not in question_text(Labeling(rows, tmp_path / "other.jsonl"))


def test_recorded_winner_and_win_rate_follow_the_turned_sides(tmp_path):
    """A judge that always picks the recorded winner agrees on all decided pairs, and wins are credited to the right writer."""
    rows = pairs(30)
    labeling = Labeling(rows, tmp_path / "answers.jsonl", repeat_share=0.4)
    while labeling.question is not None:
        winner = rows[labeling.question.pair]["winner"]
        labeling.answer({"a": "b", "b": "a"}.get(winner, winner) if labeling.question.turned else winner)
    report = labeling.report()
    assert report.recorded == (20, 20) and report.self_agreement == (12, 12) and report.ties == (10, 30)
    assert labeling.win_rate("SECRET-ONE") == (10, 20) and labeling.win_rate("nobody") == (0, 0)
    assert "12 of 12, 100% (95% interval 74% to 100%)" in str(report)


def test_without_recorded_winners_and_writers(tmp_path):
    """Responses before and after tuning have neither; an empty or identical response is a fair question."""
    rows = [{"prompt": "p", "response_a": "", "response_b": "x"}, {"prompt": "p", "response_a": "same", "response_b": "same"}]
    labeling = Labeling(rows, tmp_path / "answers.jsonl", repeat_share=0.0)
    labeling.answer("a")
    labeling.answer("b")
    assert labeling.report().recorded == (0, 0) and "nothing to count yet" in str(labeling.report())
    assert labeling.answers[0]["model_a"] is None


@pytest.mark.parametrize("text", STRANGE, ids=lambda text: repr(text[:12]))
def test_any_text_makes_the_round_trip(text, tmp_path):
    """Into the file, through a resumed labeling, through the loader (which drops blank texts, and says so)."""
    rows = [{"prompt": text, "response_a": text + "!", "response_b": text, "winner": "a"}]
    labeling = Labeling(rows, tmp_path / "answers.jsonl", repeat_share=0.0)
    assert {labeling.shown["response_a"], labeling.shown["response_b"]} == {text, text + "!"} and labeling.shown["prompt"] == text
    labeling.answer("b")
    assert Labeling(rows, tmp_path / "answers.jsonl", repeat_share=0.0).answers == labeling.answers
    if text.strip():
        loaded, _ = load_comparisons(tmp_path / "answers.jsonl")
        assert loaded["prompt"][0] == text and {loaded["response_a"][0], loaded["response_b"][0]} == {text, text + "!"}


@given(st.text(st.characters(exclude_categories=["Cs"])))
@hypothesis_settings(max_examples=200, deadline=None)
def test_no_text_can_leave_its_box(text):
    """In the page only the panel's own tags are tags; in a terminal no control character is left."""
    shown = text_to_html(text, text)
    assert shown.count("<") == shown.count(">") == 4
    assert "<" not in shown.split(">")[3].removesuffix("</div")


def test_terminal_gets_no_control_characters(tmp_path):
    """A response cannot clear the screen or ring the bell; emoji and right-to-left text stay whole."""
    rows = [{"prompt": STRANGE[6], "response_a": STRANGE[0], "response_b": STRANGE[1] + "\x9b2J"}]
    text = question_text(Labeling(rows, tmp_path / "answers.jsonl"))
    assert not set(text) & {chr(i) for i in (*range(9), *range(11, 32), *range(127, 160))}
    assert STRANGE[0] in text and STRANGE[1] in text


# The panel.


def test_buttons_and_keys(tmp_path):
    """All three of each; upper case and spaces are fine; each answer is on disk when the next question is shown."""
    labeling = Labeling(pairs(6), tmp_path / "answers.jsonl", repeat_share=0.0)
    panel = LabelingPanel(labeling, min_seconds=0)
    for number, act in enumerate([panel.buttons["a"].click, panel.buttons["b"].click, panel.buttons["t"].click,
                                  lambda: enter(panel, "a"), lambda: enter(panel, " B "), lambda: enter(panel, "T")], 1):  # fmt: skip
        act()
        assert len(read_rows(tmp_path / "answers.jsonl")[0]) == number and panel.box.value == ""
    assert [row["winner"] for row in labeling.answers] == ["a", "b", "tie"] * 2
    assert "Report" in panel.prompt.value and panel.progress.value == "all 6 questions answered"
    assert panel.box.disabled and all(button.disabled for button in panel.buttons.values())
    panel.buttons["a"].click()
    enter(panel, "a")
    assert len(labeling.answers) == 6


@pytest.mark.parametrize("typed", ["", " ", "c", "ab", "left", "1", "<b>a</b>", "а"], ids=repr)  # the last is a Cyrillic letter
def test_wrong_key_is_ignored_with_a_message(typed, tmp_path):
    """Nothing is saved, the question stays, the box is empty again, and the message cannot hold markup."""
    labeling = Labeling(pairs(3), tmp_path / "answers.jsonl")
    panel = LabelingPanel(labeling, min_seconds=0)
    before = panel.prompt.value
    enter(panel, typed)
    assert "is no answer" in panel.message.value and "<" not in panel.message.value and panel.box.value == ""
    assert panel.prompt.value == before and not (tmp_path / "answers.jsonl").exists()
    enter(panel, "a")
    assert len(labeling.answers) == 1 and panel.message.value == "saved"


def test_typing_without_enter_answers_nothing(tmp_path):
    """Only Enter counts."""
    labeling = Labeling(pairs(3), tmp_path / "answers.jsonl")
    panel = LabelingPanel(labeling, min_seconds=0)
    panel.box.value = "a"
    panel.box._handle_custom_msg({"event": "other"}, [])
    assert labeling.answers == [] and panel.box.value == "a"


def test_double_click_answers_once(tmp_path):
    """The second click would judge a pair that nobody has seen."""
    labeling = Labeling(pairs(5), tmp_path / "answers.jsonl")
    panel = LabelingPanel(labeling, min_seconds=30)
    panel.buttons["a"].click()
    panel.buttons["a"].click()
    enter(panel, "b")
    assert len(labeling.answers) == 1 and "double click" in panel.message.value


def test_what_goes_wrong_while_saving_is_said_and_the_question_stays(tmp_path):
    """Another kernel writes to the same file: neither answer is lost, and the panel says who is in the way."""
    path = tmp_path / "answers.jsonl"
    one, two = Labeling(pairs(5), path), Labeling(pairs(5), path)
    panel = LabelingPanel(one, min_seconds=0)
    two.answer("b")
    panel.buttons["a"].click()
    assert "Not saved" in panel.message.value and "Another kernel is writing" in panel.message.value
    assert one.answers == [] and panel.progress.value == "question 1 of 6"
    assert [row["winner"] for row in read_rows(path)[0]] == ["b"]


def test_without_ipywidgets_the_error_says_what_to_do():
    """And nothing else of the module needs it."""
    code = ("import sys; sys.modules['ipywidgets'] = None\nfrom rlhf_course.labeling import Labeling, LabelingPanel\n"
            "try: LabelingPanel(Labeling([dict(prompt='p', response_a='a', response_b='b')], 'none.jsonl'))\n"
            "except ImportError as error: print(error)")  # fmt: skip
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install ipywidgets" in said and "ask_in_terminal" in said


# Killed, torn, full, foreign.

ANSWERING = """
import sys
from rlhf_course.labeling import Labeling
rows = [dict(prompt=f"prompt {i} \\U0001f44b", response_a=f"first {i} " + "x" * 2000, response_b=f"second {i}") for i in range(3000)]
labeling = Labeling(rows, sys.argv[1], seed=1)
print(len(labeling.answers), flush=True)
while labeling.question is not None:
    labeling.answer("ab"[len(labeling.answers) % 2])
"""


def test_killed_process_resumes_where_it_stopped(tmp_path):
    """SIGKILL at random moments, five times: each process finds whole lines, all that was answered, and goes on."""
    path, rng, found = tmp_path / "answers.jsonl", random.Random(0), []
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", ANSWERING, str(path)], stdout=subprocess.PIPE, text=True)
        try:
            found.append(int(process.stdout.readline()))
            before = path.stat().st_size if path.exists() else 0
            end = time.monotonic() + 60
            while (path.stat().st_size if path.exists() else 0) <= before and time.monotonic() < end:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.05))
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert process.returncode == -signal.SIGKILL
        rows, whole, torn = read_rows(path)
        assert [row["question"] for row in rows] == list(range(len(rows))) and len(rows) > found[-1]
        assert [row["winner"] for row in rows] == ["ab"[i % 2] for i in range(len(rows))]
        assert whole + torn == path.stat().st_size
    assert found[0] == 0 and found == sorted(set(found))


@pytest.mark.parametrize("n_bytes", [1, 2, 15, 40, 10_000], ids=lambda n: f"{n} bytes left")
def test_torn_last_line_is_asked_again(n_bytes, tmp_path):
    """Cut at several places, also inside a letter and right before the line break."""
    path, rows = tmp_path / "answers.jsonl", [{"prompt": "שלום 👋", "response_a": f"א{i}", "response_b": f"ב{i}"} for i in range(4)]
    labeling = Labeling(rows, path, repeat_share=0.0)
    labeling.answer("a")
    first = path.read_bytes()
    labeling.answer("b")
    line = path.read_bytes()[len(first) :]
    path.write_bytes(first + line[: min(n_bytes, len(line) - 1)])
    again = Labeling(rows, path, repeat_share=0.0)
    assert len(again.answers) == 1 and path.read_bytes() == first
    again.answer("b")
    assert path.read_bytes() == first + line


def test_full_disk_leaves_whole_lines(tmp_path):
    """The system lets the file grow to a limit: what does not fit is refused, the file ends in a line break, and there is an error."""
    path, rows = tmp_path / "answers.jsonl", pairs(30)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    labeling = Labeling(rows, path)
    labeling.answer("a")
    panel = LabelingPanel(labeling, min_seconds=0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 500, hard))
    try:
        for _ in range(5):
            panel.buttons["b"].click()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "Not saved" in panel.message.value
    rows_on_disk, _, torn = read_rows(path)
    assert torn == 0 and rows_on_disk == labeling.answers and 1 <= len(rows_on_disk) < 6
    panel.buttons["b"].click()
    assert read_rows(path)[0] == labeling.answers and panel.message.value == "saved"


def test_file_of_another_data_set_is_refused_by_name(tmp_path):
    """By the names of both, and of the file; also another order, seed or share of the same."""
    path, rows = tmp_path / "answers.jsonl", pairs(6)
    Labeling(rows, path, name="arena").answer("a")
    said = refusal(pairs(7), path, name="before and after")
    assert str(path) in said and "'arena'" in said and "'before and after'" in said
    assert "another data set" in refusal(rows[::-1], path)
    assert "Pass seed=0 to go on" in refusal(rows, path, seed=1)
    assert "Pass repeat_share=0.2 to go on" in refusal(rows, path, repeat_share=0.5)
    assert len(Labeling(rows, path, name="the arena, renamed").answers) == 1


def test_damaged_and_foreign_files_are_refused(tmp_path):
    """No JSON, no object, an ordinary file of comparisons, a lost line, a doubled line, a changed one: line and reason are named."""
    path, rows = tmp_path / "answers.jsonl", pairs(4)
    labeling = Labeling(rows, path, repeat_share=0.0)
    for _ in range(4):
        labeling.answer("a")
    lines = path.read_bytes().splitlines(keepends=True)
    cases = {b"not json\n": "line 1 is no JSON object", b"[1]\n": "line 1 is no JSON object", b"\xff\xfe\n": "line 1 is no JSON object",
             (json.dumps(rows[0]) + "\n").encode(): "line 1 was not written by a Labeling",
             lines[0] + lines[2]: "line 2 does not answer question 2", lines[0] * 2: "line 2 does not answer question 2",
             lines[0] + lines[1].replace(b'"winner": "a"', b'"winner": "c"'): "line 2 does not answer question 2",
             lines[0] + b"\n" + lines[1]: "line 2 is no JSON object",
             b"".join(lines) + lines[3]: "line 5 does not answer question 5"}  # fmt: skip
    for content, said in cases.items():
        path.write_bytes(content)
        assert said in refusal(rows, path, repeat_share=0.0) and path.read_bytes() == content


READ_ONLY = """
import os, sys
from rlhf_course.labeling import Labeling
rows = [dict(prompt="p", response_a="x", response_b="y")]
os.chdir(sys.argv[1])
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
for name in ("new.jsonl", "folder/new.jsonl", "old.jsonl"):
    try:
        Labeling(rows, name)
        print("accepted")
    except ValueError as error:
        print(error)
"""


def test_read_only_folder_is_refused_before_the_first_question(tmp_path):
    """As a user without rights, in a folder that may only be read."""
    (tmp_path / "old.jsonl").write_text("")
    (tmp_path / "old.jsonl").chmod(0o444)
    tmp_path.chmod(0o555)
    try:
        said = subprocess.run([sys.executable, "-c", READ_ONLY, str(tmp_path)], capture_output=True, text=True, check=True).stdout.splitlines()
    finally:
        tmp_path.chmod(0o755)
    assert [line.partition(". ")[0] for line in said] == [f"{name}: cannot be written (no permission)" for name in
                                                         ("new.jsonl", "folder/new.jsonl", "old.jsonl")]  # fmt: skip


def test_path_that_is_a_folder_or_below_a_file_is_refused(tmp_path):
    """And a folder that is not there yet is made with the first answer."""
    (tmp_path / "file").write_text("")
    assert "it is a folder" in refusal(pairs(2), tmp_path)
    assert "is no folder" in refusal(pairs(2), tmp_path / "file" / "answers.jsonl")
    labeling = Labeling(pairs(2), tmp_path / "a" / "b" / "answers.jsonl")
    assert not (tmp_path / "a").exists()
    labeling.answer("a")
    assert (tmp_path / "a" / "b" / "answers.jsonl").exists()


def test_rows_that_cannot_be_shown_are_refused(tmp_path):
    """None at all, a column that is missing or no text, half a surrogate pair, a winner that is none, a share outside [0, 1]."""
    path, good = tmp_path / "answers.jsonl", pairs(1)[0]
    assert "`comparisons` should be at least one" in refusal([], path)
    for change, said in [({"response_b": None}, "`response_b`"), ({"prompt": 3}, "`prompt`"), ({"response_a": "\ud800"}, "`response_a`"),
                         ({"winner": "c"}, "`winner`")]:  # fmt: skip
        message = refusal([good, {**good, **change}], path)
        assert said in message and "row 1" in message
    assert "`repeat_share`" in refusal([good], path, repeat_share=1.5)
    assert not path.exists()


def test_one_comparison(tmp_path):
    """One question, or two where a repeat is asked for."""
    labeling = Labeling(pairs(1), tmp_path / "answers.jsonl")
    labeling.answer("a")
    assert labeling.question is None and labeling.shown is None
    with pytest.raises(ValueError, match="all are answered"):
        labeling.answer("a")
    twice = Labeling(pairs(1), tmp_path / "twice.jsonl", repeat_share=1.0)
    assert [(q.turned, q.repeat) for q in twice.questions] == [(twice.questions[0].turned, False), (not twice.questions[0].turned, True)]
    with pytest.raises(ValueError, match="a is the left response"):
        twice.answer("left")


@given(st.integers(1, 200), st.floats(0, 1), st.integers(0, 30), st.integers(0, 1_000))
@hypothesis_settings(max_examples=300, deadline=None)
def test_any_plan_keeps_its_promises(n, repeat_share, min_gap, seed):
    """Each pair once, the asked share again with sides exchanged, never nearer than promised."""
    questions = plan_questions(n, repeat_share=repeat_share, min_gap=min_gap, seed=seed)
    first = {q.pair: place for place, q in enumerate(questions) if not q.repeat}
    repeats = {q.pair: place for place, q in enumerate(questions) if q.repeat}
    assert sorted(first) == list(range(n)) and len(repeats) == round(repeat_share * n) == len(questions) - n
    for pair, place in repeats.items():
        assert questions[place].turned != questions[first[pair]].turned
        assert place - first[pair] - 1 >= min(min_gap, n - len(repeats))


# Intervals.


def test_exact_interval_is_scipys():
    """On a grid of counts and confidences, and for large counts."""
    cases = [(k, n, c) for n in (1, 2, 7, 20, 61) for k in range(n + 1) for c in (0.5, 0.9, 0.95, 0.999)]
    for k, n, confidence in [*cases, (37_000, 100_000, 0.95), (1, 100_000, 0.95), (99_999, 100_000, 0.99)]:
        right = binomtest(k, n).proportion_ci(confidence, "exact")
        assert binomial_interval(k, n, confidence) == pytest.approx((right.low, right.high), rel=1e-7, abs=1e-9)


# Terminal, notebook, nobody.


def lines_then(stop, *lines):
    """A stand-in for `input` that gives these lines and then stops as a terminal does."""
    waiting = list(lines)

    def read(prompt):
        if waiting:
            return waiting.pop(0)
        raise stop

    return read


@pytest.mark.parametrize("stop", [EOFError, KeyboardInterrupt])
def test_terminal_asks_until_it_is_stopped(stop, tmp_path):
    """A wrong line asks again; the end of the input and Ctrl-C keep all that was answered."""
    path, written = tmp_path / "answers.jsonl", []
    ask_in_terminal(Labeling(pairs(5), path, repeat_share=0.0), lines_then(stop, "a", "what?", " T "), written.append)
    assert [row["winner"] for row in read_rows(path)[0]] == ["a", "tie"]
    assert "'what?' is no answer" in written and any("stopped at question 3 of 5" in text for text in written)
    ask_in_terminal(Labeling(pairs(5), path, repeat_share=0.0), lines_then(stop, "b", "b", "b"), written.append)
    assert len(read_rows(path)[0]) == 5 and written[-1].startswith("5 of 5 questions answered")


def test_plain_python_falls_back_to_input(tmp_path):
    """A real process with a real pipe, and the pipe's end."""
    code = ("import sys; from rlhf_course.labeling import Labeling, start_labeling\n"
            "rows = [dict(prompt=f'p{i}', response_a=f'x{i}', response_b=f'y{i}') for i in range(5)]\n"
            "assert start_labeling(Labeling(rows, sys.argv[1])) is None")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "answers.jsonl")], input="a\nz\nb\n", capture_output=True, text=True, check=True)
    assert "'z' is no answer" in done.stdout and "stopped at question 3 of 6" in done.stdout and "2 of 6 questions answered" in done.stdout
    assert len(read_rows(tmp_path / "answers.jsonl")[0]) == 2


CELL = """from rlhf_course.labeling import Labeling, start_labeling
start_labeling(Labeling([dict(prompt="p", response_a="x", response_b="y")], {path!r}))"""


def test_page_without_a_person_holds_a_picture_and_no_widget(tmp_path, monkeypatch):
    """As nbconvert runs it: a picture is stored, no widget, and no file is made."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / ".ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / ".jupyter"))
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL.format(path=str(tmp_path / "answers.jsonl")))])
    RunUnflagged(timeout=120, store_widget_state=False).preprocess(nb, {"metadata": {"path": str(tmp_path)}})
    kinds = {kind for output in nb.cells[0].outputs for kind in output.get("data", {})}
    assert "image/png" in kinds and not any("widget" in kind for kind in kinds)
    assert "widgets" not in nb.metadata and not (tmp_path / "answers.jsonl").exists()


def test_kernel_with_a_person_shows_the_panel(tmp_path, monkeypatch):
    """As JupyterLab runs it: the cell's result is the widget."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / ".ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / ".jupyter"))
    manager = KernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    manager.start_kernel(cwd=str(tmp_path))
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(60)
        asked, results = client.execute(CELL.format(path=str(tmp_path / "answers.jsonl")), allow_stdin=True), []
        while True:
            message = client.get_iopub_msg(timeout=60)
            if message["parent_header"].get("msg_id") != asked:
                continue
            if message["msg_type"] == "execute_result":
                results.append(message["content"]["data"])
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                break
        assert ["application/vnd.jupyter.widget-view+json" in data for data in results] == [True]
        with pytest.raises(queue.Empty):
            client.get_stdin_msg(timeout=0.1)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
