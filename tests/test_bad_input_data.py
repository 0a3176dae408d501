"""Files of comparisons that are damaged, foreign or dirty: one clear line, the right place, and no text changed."""

import csv
import gzip
import json
import os
import random
import subprocess
import sys

import pyarrow as pa
import pytest
from pyarrow import parquet
from rlhf_course.loading import LoadReport, comparisons_from_rows, load_comparisons
from rlhf_course.preferences import filter_long, split_by_prompt

GOOD = {"prompt": "Say hello", "response_a": "Hello!", "response_b": "Hey", "winner": "a"}
ALPACA = {"instruction": "Say hello", "output_1": "Hello!", "output_2": "Hey", "preference": 1}
CSV_HEADER = "prompt,response_a,response_b,winner\n"
CSV_GOOD = "Say hello,Hello!,Hey,a\n"


def json_lines(*rows):
    """Rows as the bytes of a JSON Lines file."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet_bytes(table):
    """A pyarrow table as the bytes of a Parquet file."""
    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def put(folder, name, content):
    """Write `content` (text or bytes) to a file, and return its path."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path, strict=False):
    """The one-line error that loading `path` raises."""
    with pytest.raises(ValueError) as caught:
        load_comparisons(path, strict=strict)
    message = str(caught.value)
    assert type(caught.value) is ValueError, "UnicodeDecodeError, JSONDecodeError and their like must not come through"
    assert "\n" not in message and message.startswith(f"{path}: "), message
    assert len(message) < 900, message
    return message.removeprefix(f"{path}: ")


# --- files that are refused ----------------------------------------------------------------------------------------


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load_comparisons(tmp_path / "none.jsonl")
    assert str(caught.value).startswith(f"{tmp_path / 'none.jsonl'}: no such file. Give the path")
    with pytest.raises(FileNotFoundError):
        load_comparisons(str(tmp_path / "no_folder" / "none.csv"), strict=True)


def test_folder(tmp_path):
    assert refusal(tmp_path).startswith("is a folder")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file(tmp_path):
    path = put(tmp_path, "locked.jsonl", json_lines(GOOD))
    path.chmod(0)
    assert refusal(path).startswith("cannot be read (Permission denied)")


def test_path_that_the_system_refuses(tmp_path):
    assert refusal(tmp_path / ("x" * 300)).startswith("cannot be read (File name too long)")


VALID_PARQUET = parquet_bytes(pa.Table.from_pylist([GOOD] * 50))
VALID_GZIP = gzip.compress(json_lines(*[{**GOOD, "prompt": str(random.Random(i).random())} for i in range(2000)]))
DUPLICATE_PARQUET = parquet_bytes(
    pa.Table.from_arrays([pa.array(["x"])] * 5, ["prompt", "prompt", "response_a", "response_b", "winner"])
)

REFUSED = {
    # nothing in it
    "empty.jsonl": (b"", "the file is empty"),
    "empty.csv": (b"", "the file is empty"),
    "empty.parquet": (b"", "the file is empty"),
    "empty.jsonl.gz": (gzip.compress(b""), "holds no rows"),
    "blank.jsonl": ("\n  \n\r\n", "holds no rows"),
    "only_bom.jsonl": (b"\xef\xbb\xbf", "holds no rows"),
    "empty_list.json": ("[]", "holds no rows"),
    "header_only.csv": (CSV_HEADER, "holds no rows"),
    "no_rows.parquet": (parquet_bytes(pa.Table.from_pylist([GOOD]).slice(0, 0)), "holds no rows"),
    # lines that do not parse
    "cut.jsonl": (json_lines(GOOD, GOOD) + b'{"prompt": "Say', "line 3, character 12 does not parse as JSON"),
    "blank_before.jsonl": (b"\n\n" + json_lines(GOOD) + b"oops\n", "line 4, character 1 does not parse as JSON"),
    "two_on_a_line.jsonl": (json_lines(GOOD)[:-1] + json_lines(GOOD), "line 1, character "),
    "crlf.jsonl": (json_lines(GOOD).replace(b"\n", b"\r\n") + b"{,}\r\n", "line 2, character 2 does not parse as JSON"),
    "old_mac.jsonl": (json_lines(GOOD).replace(b"\n", b"\r") + b"{,}\r", "line 2, character 2 does not parse as JSON"),
    "raw_tab.jsonl": (json_lines(GOOD) + b'{"prompt": "a\tb"}\n', "line 2, character 14 does not parse as JSON"),
    "text.jsonl": ("hello\n", "line 1, character 1 does not parse as JSON"),
    "pretty.json": (json.dumps(GOOD, indent=1), "line 1, character 2 does not parse as JSON"),
    "cut.json": (json.dumps([GOOD] * 3, indent=1)[:-40], "line 1"),
    "deep.jsonl": (b'{"prompt": ' + b"[" * 100_000 + b"\n", "line 1 does not parse as JSON"),
    "deep.json": (b"[" * 100_000, "the list does not parse as JSON"),
    "huge_number.jsonl": (b'{"prompt": ' + b"1" * 5000 + b"}\n", "line 1 does not parse as JSON"),
    "cut.jsonl.gz": (gzip.compress(json_lines(GOOD) + b'{"prompt'), "line 2, character 2 does not parse as JSON"),
    "three_fields.csv": (CSV_HEADER + CSV_GOOD + "a,b,c\n", "line 3 does not parse as CSV (expected 4 fields, found 3)"),
    "five_fields.csv": (CSV_HEADER + "a,b,c,d,a\n", "line 2 does not parse as CSV (expected 4 fields, found 5)"),
    "after_long_record.csv": (
        CSV_HEADER + '"one\ntwo\r\nthree",x,y,a\n\na,b\n',
        "line 6 does not parse as CSV (expected 4 fields, found 2)",
    ),
    "open_quote.csv": (CSV_HEADER + CSV_GOOD + '"Say hello,Hello!,Hey,a\n', "line 3 does not parse as CSV"),
    "stray_quote.csv": (CSV_HEADER + '"Say" hello,Hello!,Hey,a\n', "line 2 does not parse as CSV"),
    # bytes that are not text
    "latin1.jsonl": (
        json_lines(GOOD) + '{"prompt": "café"}'.encode("latin-1"),
        "line 2, byte 16 of the line is not text (found b'\\xe9')",
    ),
    "latin1.csv": (
        CSV_HEADER.encode() + "é,x,y,a\n".encode("latin-1"),
        "line 2, byte 1 of the line is not text (found b'\\xe9')",
    ),
    "latin1.csv.gz": (gzip.compress(CSV_HEADER.encode() + b"ab\xff,x,y,a\n"), "line 2, byte 3 of the line is not text"),
    "latin1.json": (b'[\n{"prompt":\n"\xff"}]', "line 3, byte 2 of the line is not text"),
    "half_character.jsonl": (json_lines(GOOD) + "é".encode()[:1], "line 2, byte 1 of the line is not text"),
    "surrogate.csv": (CSV_HEADER.encode() + b"\xed\xa0\x80,x,y,a\n", "line 2, byte 1 of the line is not text"),
    "late.jsonl": (json_lines(*[GOOD] * 5000) + b"\x80", "line 5001, byte 1 of the line is not text"),
    "utf16.csv": ((CSV_HEADER + CSV_GOOD).encode("utf-16"), "starts with b'\\xff\\xfep\\x00', which is no JSON Lines"),
    "sheet.xlsx": (b"PK\x03\x04" + bytes(100), "starts with b'PK\\x03\\x04', which is no JSON Lines"),
    "photo.jpg": (b"\xff\xd8\xff\xe0" + bytes(range(256)), "line 1, byte 1 of the line is not text"),
    # truncated and damaged gzip and Parquet
    "truncated.jsonl.gz": (VALID_GZIP[: len(VALID_GZIP) // 2], "truncated or damaged gzip"),
    "no_trailer.jsonl.gz": (VALID_GZIP[:-8], "truncated or damaged gzip"),
    "only_header.gz": (VALID_GZIP[:10], "truncated or damaged gzip"),
    "two_bytes.gz": (VALID_GZIP[:2], "truncated or damaged gzip"),
    "wrong_sum.jsonl.gz": (VALID_GZIP[:-8] + bytes(8), "truncated or damaged gzip"),
    "damaged.jsonl.gz": (VALID_GZIP[:2000] + bytes(100) + VALID_GZIP[2100:], "truncated or damaged gzip"),
    "truncated.parquet": (VALID_PARQUET[: len(VALID_PARQUET) // 2], "truncated or damaged Parquet"),
    "short.parquet": (VALID_PARQUET[:6], "truncated or damaged Parquet"),
    "no_footer.parquet": (VALID_PARQUET[:-4], "truncated or damaged Parquet"),
    "truncated.parquet.gz": (gzip.compress(VALID_PARQUET)[:-20], "truncated or damaged gzip"),
    "not.parquet": (json_lines(GOOD), "starts with b'{\"pr', which is no JSON Lines"),
    # columns
    "unknown.csv": ("question,answer\nq,a\n", "unknown columns: found 'question', 'answer'. The layouts known are"),
    "unknown.jsonl": (json_lines({"question": "q"}), "unknown columns: found 'question'."),
    "unknown.parquet": (parquet_bytes(pa.table({"question": ["q"]})), "unknown columns: found 'question'."),
    "objects.json": (json.dumps({"prompt": ["x"]}), "unknown columns: found 'prompt'."),
    "numbers.jsonl": ("1\n2\n", "unknown columns: found none."),
    "duplicate.csv": ("prompt,prompt,response_a,response_b,winner\nx,x,x,y,a\n", "duplicate column 'prompt'. Give"),
    "duplicate.jsonl": (
        json_lines(GOOD) + b'{"prompt": "x", "prompt": "y"}\n',
        "line 2 does not parse as JSON (duplicate column 'prompt')",
    ),
    "duplicate_in_message.jsonl": (
        b'{"chosen": [{"role": "user", "content": "x", "role": "system"}], "rejected": []}\n',
        "line 1 does not parse as JSON (duplicate column 'role')",
    ),
    "duplicate.json": ('[{"winner": "x", "winner": "y"}]', "the list does not parse as JSON (duplicate column 'winner')"),
    "duplicate.parquet": (DUPLICATE_PARQUET, "duplicate column 'prompt'. Give"),
    # nothing left
    "nothing_left.jsonl": (
        json_lines({**GOOD, "winner": None}, {**GOOD, "prompt": ""}),
        "kept 0 of 2 rows; dropped 2: null judgement 1 (line 1); empty prompt 1 (line 2); nothing is left",
    ),
    "nothing_left.json": (
        json.dumps([{**ALPACA, "output_2": 1}]),
        "kept 0 of 1 rows; dropped 1: text is not a string 1 (item 1); nothing is left",
    ),
    "nothing_left.csv": (
        CSV_HEADER + "p,same,same,a\n",
        "kept 0 of 1 rows; dropped 1: identical responses 1 (line 2); nothing is left",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("strict", [False, True])
def test_refused_with_one_clear_line(tmp_path, name, strict):
    content, expected = REFUSED[name]
    message = refusal(put(tmp_path, name, content), strict)
    if strict and "kept 0 of" in expected:  # strict names the first bad row and does not get as far as counting
        assert "Fix or remove it, or load without strict" in message
    else:
        assert message.startswith(expected), message


def test_a_refusal_says_what_would_have_worked(tmp_path):
    message = refusal(put(tmp_path, "near.csv", "prompt,chosen,response_b,winner\na,b,c,a\n"))
    assert "comparisons (prompt, response_a, response_b, winner)" in message
    assert "alpaca_eval (instruction, output_1, output_2, preference)" in message
    assert message.endswith("Closest is comparisons, which also needs response_a: rename or add columns")


# --- rows that are dropped, or refused when strict -----------------------------------------------------------------

DROPPED = {
    "empty prompt": ({**GOOD, "prompt": ""}, "prompt", "''"),
    "blank prompt": ({**GOOD, "prompt": " \t\n"}, "prompt", "' \\t\\n'"),
    "empty response": ({**GOOD, "response_a": ""}, "response_a", "''"),
    "blank response": ({**GOOD, "response_b": "\u3000"}, "response_b", "'\\u3000'"),
    "unknown winner": ({**GOOD, "winner": "c"}, "winner", "'c'"),
    "number for a winner": ({**GOOD, "winner": 1}, "winner", "1"),
    "list for a winner": ({**GOOD, "winner": ["a"]}, "winner", "['a']"),
    "null judgement": ({**GOOD, "winner": None}, "winner", "None"),
    "blank judgement": ({**GOOD, "winner": " "}, "winner", "' '"),
    "NaN judgement": ({**GOOD, "winner": float("nan")}, "winner", "nan"),
    "identical responses": ({**GOOD, "response_b": "Hello!"}, "response_b", "'Hello!'"),
    "number for a prompt": ({**GOOD, "prompt": 7}, "prompt", "7"),
    "null for a prompt": ({**GOOD, "prompt": None}, "prompt", "None"),
    "list for a response": ({**GOOD, "response_a": ["Hello!"]}, "response_a", "['Hello!']"),
    "object for a response": ({**GOOD, "response_b": {"text": "Hey"}}, "response_b", "{'text': 'Hey'}"),
    "true for a prompt": ({**GOOD, "prompt": True}, "prompt", "True"),
    "lone surrogate": ({**GOOD, "prompt": "\ud800"}, "prompt", "'\\ud800'"),
    "missing column": ({k: v for k, v in GOOD.items() if k != "response_b"}, "response_b", "'nothing'"),
    "not an object": ([1, 2], None, "[1, 2]"),
    "bare null": (None, None, "None"),
}
REASONS = {
    "blank prompt": "empty prompt",
    "blank response": "empty response",
    "number for a winner": "unknown winner",
    "list for a winner": "unknown winner",
    "blank judgement": "null judgement",
    "NaN judgement": "null judgement",
    "number for a prompt": "text is not a string",
    "null for a prompt": "text is not a string",
    "list for a response": "text is not a string",
    "object for a response": "text is not a string",
    "true for a prompt": "text is not a string",
    "lone surrogate": "text is not valid Unicode",
    "not an object": "row is not an object",
    "bare null": "row is not an object",
}


@pytest.mark.parametrize("case", DROPPED)
def test_bad_row_is_dropped_and_counted_with_its_line(tmp_path, case):
    row, _, _ = DROPPED[case]
    reason = REASONS.get(case, case)
    lines = json_lines(GOOD) + b"\n" + json_lines(row) + json_lines(GOOD) + json_lines(row)  # line 2 is blank
    comparisons, report = load_comparisons(put(tmp_path, "rows.jsonl", lines))
    assert report == LoadReport(str(tmp_path / "rows.jsonl"), 4, 2, {reason: [3, 5]}, "line", "comparisons")
    assert report.counts() == {reason: 2}
    assert str(report).endswith(f"kept 2 of 4 rows; dropped 2: {reason} 2 (lines 3, 5)")
    assert comparisons["prompt"][:] == ["Say hello"] * 2


@pytest.mark.parametrize("case", DROPPED)
def test_bad_row_is_an_error_when_strict(tmp_path, case):
    row, column, found = DROPPED[case]
    path = put(tmp_path, "rows.jsonl", json_lines(GOOD) + b"\n" + json_lines(row, GOOD, row))
    place = "line 3" if column is None else f"line 3, column {column}"
    message = refusal(path, strict=True)
    assert message.startswith(f"{place}: {REASONS.get(case, case)}, found {found} (1 more would be dropped). Fix or remove")


def test_strict_passes_clean_files(tmp_path):
    comparisons, report = load_comparisons(put(tmp_path, "rows.jsonl", json_lines(GOOD, GOOD)), strict=True)
    assert len(comparisons) == 2 and report.dropped == {}


def test_strict_names_the_column_of_the_file_and_not_ours(tmp_path):
    path = put(tmp_path, "rows.jsonl", json_lines(ALPACA, {**ALPACA, "output_2": ""}))
    assert refusal(path, strict=True).startswith("line 2, column output_2: empty response, found ''.")


@pytest.mark.parametrize("winner", ["x" * 100_000, ["x"] * 100_000, {"x" * 100_000: "y"}], ids=["text", "list", "object"])
def test_long_values_are_shown_short(tmp_path, winner):
    path = put(tmp_path, "rows.jsonl", json_lines({**GOOD, "winner": winner}, GOOD))
    assert len(refusal(path, strict=True)) < 250


def test_line_numbers_of_a_csv_with_long_records(tmp_path):
    text = (
        "\ufeff" + CSV_HEADER.replace("\n", "\r\n")
        + '"two\r\nlines",x,y,a\r\n'  # lines 2 and 3
        + "\r\n"  # line 4
        + "p,x,x,b\r\n"  # line 5: identical
        + 'p,"1\n2\n3",y,c\r\n'  # lines 6 to 8: unknown winner
        + "p,x,y,\r\n"  # line 9: nobody judged
        + "p,x,y,tie"  # line 10, without an end
    )  # fmt: skip
    comparisons, report = load_comparisons(put(tmp_path, "long.csv", text))
    assert report.dropped == {"identical responses": [5], "unknown winner": [6], "null judgement": [9]}
    assert comparisons["prompt"][:] == ["two\r\nlines", "p"]


def test_places_in_parquet_and_json_are_rows_and_items(tmp_path):
    rows = [GOOD, {**GOOD, "winner": None}, GOOD]
    _, report = load_comparisons(put(tmp_path, "rows.parquet", parquet_bytes(pa.Table.from_pylist(rows))))
    assert report.dropped == {"null judgement": [2]} and "(row 2)" in str(report)
    _, report = load_comparisons(put(tmp_path, "rows.json", json.dumps(rows, indent=2)))
    assert report.dropped == {"null judgement": [2]} and "(item 2)" in str(report)


def test_alpaca_eval_judgements(tmp_path):
    values = [1, 1.0, 2, 2.0, 1.2, 1.9, 0, 0.0, 1.5, None, float("nan"), 3, 0.5, "b", True, [1]]
    rows = [{**ALPACA, "preference": value, "generator_2": "small"} for value in values]
    comparisons, report = load_comparisons(put(tmp_path, "annotations.json", json.dumps(rows)))
    assert comparisons["winner"][:] == ["a", "a", "b", "b", "a", "b", "tie", "tie", "tie"]
    assert report.dropped == {"null judgement": [10, 11], "unknown winner": [12, 13, 14, 15, 16]}
    assert set(comparisons["model_b"]) == {"small"} and set(comparisons["model_a"]) == {None}


def test_winners_of_other_tools(tmp_path):
    values = ["A", " b ", "model_a", "MODEL_B", "tie (bothbad)", "Tie"]
    comparisons, _ = load_comparisons(put(tmp_path, "w.jsonl", json_lines(*[{**GOOD, "winner": v} for v in values])))
    assert comparisons["winner"][:] == ["a", "b", "a", "b", "tie", "tie"]


def test_parquet_of_odd_types(tmp_path):
    table = pa.table(
        {
            "prompt": pa.array(["p"] * 4).dictionary_encode(),
            "response_a": pa.array(["x"] * 4, pa.large_string()),
            "response_b": pa.array(["y"] * 4),
            "winner": pa.array(["a", None, "b", "z"]).dictionary_encode(),
            "notes": pa.array([b"\xff"] * 4, pa.binary()).view(pa.string()),  # a column of no concern, which is no text
        }
    )
    comparisons, report = load_comparisons(put(tmp_path, "odd.parquet", parquet_bytes(table)), strict=False)
    assert comparisons["winner"][:] == ["a", "b"] and report.dropped == {"null judgement": [2], "unknown winner": [4]}
    numbers = pa.table({"prompt": [1, 2], "response_a": [b"x", b"y"], "response_b": ["x", "y"], "winner": ["a", "b"]})
    assert "text is not a string 2 (rows 1, 2)" in refusal(put(tmp_path, "numbers.parquet", parquet_bytes(numbers)))


def test_parquet_with_text_that_is_not_utf8(tmp_path):
    bad = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    table = pa.table({"prompt": bad, "response_a": ["x"], "response_b": ["y"], "winner": ["a"]})
    assert refusal(put(tmp_path, "bad.parquet", parquet_bytes(table))).startswith("truncated or damaged Parquet")


# --- text that must come through unchanged -------------------------------------------------------------------------

ODD_TEXTS = [
    "emoji 🥚👩‍👩‍👧‍👦🏳️‍🌈",
    "עברית \u202bכיוון\u202c و عربي",
    "e\u0301 is not \u00e9",
    "line\u2028separator\u2029 and \x85 and \x0b\x0c",
    "tab\tquote\"comma,backslash\\n",
    "first\nsecond\n\nfourth",
    "carriage\r\nreturn",
    "  spaces around  ",
    "\ufeffstarts like a byte order mark",
    "NUL \x00 inside",
    "<|im_end|> {{ not a template }} </s>",
    "1",
    "null",
    "NaN",
]


def write_csv(path, rows):
    """The rows as CSV, every field quoted, line breaks inside fields kept."""
    quote = [['"' + str(row[c]).replace('"', '""') + '"' for c in GOOD] for row in rows]
    path.write_text("\r\n".join([",".join(GOOD), *map(",".join, quote)]), encoding="utf-8", newline="")


@pytest.mark.parametrize("kind", ["jsonl", "ascii.jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("named", [True, False])
def test_odd_text_survives_every_format(tmp_path, kind, zipped, named):
    rows = [{"prompt": t, "response_a": t + "!", "response_b": "other: " + t, "winner": "b"} for t in ODD_TEXTS]
    path = tmp_path / "odd"
    if kind == "csv":
        write_csv(path, rows)
    elif kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    else:
        lines = [json.dumps(row, ensure_ascii=kind.startswith("ascii")) for row in rows]
        path.write_text("\n".join(lines), encoding="utf-8", newline="\r\n")
    content = gzip.compress(path.read_bytes()) if zipped else path.read_bytes()
    target = put(tmp_path, f"odd.{kind}{'.gz' if zipped else ''}" if named else "nameless", content)
    comparisons, report = load_comparisons(target, strict=True)
    assert [{c: row[c] for c in GOOD} for row in comparisons] == rows
    assert report.n_kept == len(rows)


BODIES = {"lines": json_lines(GOOD), "list": json.dumps([GOOD]).encode(), "csv": (CSV_HEADER + CSV_GOOD).encode()}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("suffix", ["", ".txt", ".csv", ".jsonl"])
def test_content_decides_and_a_byte_order_mark_is_no_text(tmp_path, body, suffix):
    path = put(tmp_path, f"marked{suffix}", b"\xef\xbb\xbf" + BODIES[body])
    if (body, suffix) == ("csv", ".jsonl"):
        assert refusal(path).startswith("line 1, character 1 does not parse as JSON")
    else:
        comparisons, _ = load_comparisons(path, strict=True)
        assert [{c: row[c] for c in GOOD} for row in comparisons] == [GOOD]


def test_mixed_line_endings_count_as_an_editor_counts(tmp_path):
    lines = [json.dumps({**GOOD, "prompt": str(i), "winner": "a" if i != 3 else None}) for i in range(1, 7)]
    text = lines[0] + "\n" + lines[1] + "\r\n" + lines[2] + "\r" + "\r\n".join(lines[3:])
    comparisons, report = load_comparisons(put(tmp_path, "mixed.jsonl", text))
    assert report.dropped == {"null judgement": [3]} and comparisons["prompt"][:] == ["1", "2", "4", "5", "6"]


def test_mixed_line_endings_in_a_csv(tmp_path):
    text = CSV_HEADER + "1,x,y,a\r\n2,x,y,\n" + '"3\r\nthree","x\ny",z,b\r' + "4,x,x,a\r\n"
    comparisons, report = load_comparisons(put(tmp_path, "mixed.csv", text))
    assert report.dropped == {"null judgement": [3], "identical responses": [7]}
    assert comparisons["prompt"][:] == ["1", "3\r\nthree"] and comparisons["response_a"][1] == "x\ny"


def test_odd_text_survives_in_conversations(tmp_path):
    """Each odd text as a question, an answer and a second question, in lists of messages, through each format that has lists."""
    rows = []
    for text in ODD_TEXTS:
        start = [{"role": "system", "content": text}, {"role": "user", "content": text}, {"role": "assistant", "content": text + "!"}]
        sides = [[*start, {"role": "user", "content": text}, {"role": "assistant", "content": text + end}] for end in "xy"]
        rows.append(dict(zip(("chosen", "rejected"), sides)))
    put(tmp_path, "odd.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    put(tmp_path, "odd.jsonl.gz", gzip.compress(json_lines(*rows)))
    put(tmp_path, "odd.json", json.dumps(rows, indent=1))
    put(tmp_path, "odd.parquet", parquet_bytes(pa.Table.from_pylist(rows)))
    for path in tmp_path.iterdir():
        comparisons, report = load_comparisons(path, strict=True)
        assert [dict(zip(rows[0], (row["messages_a"], row["messages_b"]))) for row in comparisons] == rows
        again = tmp_path / "again.parquet"
        comparisons.to_parquet(again)
        assert load_comparisons(again, strict=True)[0].to_list() == comparisons.to_list()
        again.unlink()


LONG = 50_000_000


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_one_line_of_50_megabytes(tmp_path, kind):
    """A response as long as a file may be comes through whole, and the row after it is found where it stands."""
    row = {**GOOD, "response_a": "🥚" + "x" * LONG}
    content = {
        "jsonl": lambda: json_lines(row, {**GOOD, "winner": None}),
        "json": lambda: json.dumps([row, {**GOOD, "winner": None}]),
        "csv": lambda: CSV_HEADER + ",".join(row.values()) + "\n" + CSV_GOOD.replace(",a\n", ",\n"),
        "parquet": lambda: parquet_bytes(pa.Table.from_pylist([row, {**GOOD, "winner": None}])),
    }[kind]()
    comparisons, report = load_comparisons(put(tmp_path, f"long.{kind}", content))
    assert comparisons.num_rows == 1 and comparisons[0]["response_a"] == row["response_a"]
    assert report.dropped == {"null judgement": [3 if kind == "csv" else 2]}


BROKEN_LONG = {
    "no_end.jsonl": (b'{"prompt": "' + b"x" * LONG, "line 1, character 12 does not parse as JSON"),
    "no_row.jsonl": (b"x" * LONG, "line 1, character 1 does not parse as JSON"),
    "no_text.jsonl": (b'{"prompt": "' + b"x" * LONG + b'\xff"}\n', f"line 1, byte {LONG + 13} of the line is not text"),
    "no_row.csv": (b"x" * LONG, "holds no rows"),
    "no_column.csv": (b"x" * LONG + b"\ny\n", "unknown columns: found 'xxx"),
    "no_winner.jsonl": (json_lines({**GOOD, "winner": "x" * LONG}), "kept 0 of 1 rows; dropped 1: unknown winner 1 (line 1)"),
    "no_messages.jsonl": (json_lines({"conversation_a": "x" * LONG, "conversation_b": [], "winner": "a"}),
                          "kept 0 of 1 rows; dropped 1: not a JSON list 1 (line 1)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_LONG)
def test_one_bad_line_of_50_megabytes_is_a_short_error(tmp_path, name):
    content, expected = BROKEN_LONG[name]
    assert refusal(put(tmp_path, name, content)).startswith(expected)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_one_sample_is_enough(tmp_path, kind):
    content = {"jsonl": json_lines(GOOD), "json": json.dumps([GOOD]), "csv": CSV_HEADER + CSV_GOOD,
               "parquet": parquet_bytes(pa.Table.from_pylist([GOOD]))}[kind]  # fmt: skip
    comparisons, report = load_comparisons(put(tmp_path, f"one.{kind}", content))
    assert len(comparisons) == report.n_read == report.n_kept == 1 and {c: comparisons[0][c] for c in GOOD} == GOOD


def test_a_field_over_the_csv_limit_and_the_limit_left_alone(tmp_path):
    csv.field_size_limit(131_072)
    path = put(tmp_path, "long.csv", CSV_HEADER + "p," + "x" * 300_000 + ",y,a\n")
    assert len(load_comparisons(path)[0][0]["response_a"]) == 300_000
    put(tmp_path, "broken.csv", CSV_HEADER + '"p,x,y,a\n')
    refusal(tmp_path / "broken.csv")
    assert csv.field_size_limit() == 131_072


def test_files_are_closed(tmp_path):
    path = put(tmp_path, "rows.jsonl.gz", gzip.compress(json_lines(GOOD)))
    bad = put(tmp_path, "bad.jsonl.gz", gzip.compress(b"\xff"))
    code = (
        "from rlhf_course.loading import load_comparisons\n"
        f"load_comparisons({str(path)!r})\n"
        f"try: load_comparisons({str(bad)!r})\nexcept ValueError: pass\n"
    )
    done = subprocess.run([sys.executable, "-W", "always::ResourceWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "ResourceWarning" not in done.stderr, done.stderr


def test_refusing_a_file_loads_no_heavy_library(tmp_path):
    put(tmp_path, "bad.jsonl", "oops\n")
    code = (
        "import sys\nfrom rlhf_course.loading import load_comparisons\n"
        f"for name in ('none.jsonl', 'bad.jsonl'):\n"
        f"    try: load_comparisons({str(tmp_path)!r} + '/' + name)\n"
        "    except (FileNotFoundError, ValueError): pass\n"
        "    else: raise SystemExit('must be refused')\n"
        "print([m for m in ('torch', 'datasets', 'transformers', 'pyarrow', 'pandas', 'numpy') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- the steps after loading ---------------------------------------------------------------------------------------


def test_rows_in_memory_get_the_same_checks():
    with pytest.raises(ValueError, match="^rows: holds no rows"):
        comparisons_from_rows([])
    with pytest.raises(ValueError, match="^mine: row 2, column winner: null judgement, found None. Fix"):
        comparisons_from_rows([GOOD, {**GOOD, "winner": None}], "mine", strict=True)
    comparisons, report = comparisons_from_rows(iter([GOOD, {**GOOD, "model_a": 7, "model_b": "\ud800"}, {1: 2}]))
    assert report.dropped == {"missing column": [3]} and comparisons["model_a"][:] == [None, "7"]
    assert comparisons["model_b"][:] == [None, "?"]


def test_filter_and_split_refuse_what_they_cannot_do():
    comparisons, _ = comparisons_from_rows([GOOD, {**GOOD, "response_a": "Good day"}])
    with pytest.raises(ValueError, match="^split_by_prompt: `comparisons` should be of at least 2 prompts, got 1;"):
        split_by_prompt(comparisons)
    with pytest.raises(ValueError, match="^filter_long: `max_prompt_tokens` should be at least 1 token, got 0;"):
        filter_long(comparisons, max_prompt_tokens=0, max_response_tokens=5)
    with pytest.raises(ValueError, match="^filter_long: `tokenizer` should be given, got None;"):
        filter_long(comparisons, max_prompt_tokens=5, max_response_tokens=5)
