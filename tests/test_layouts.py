"""Layouts of real data sets: samples written as the sets are, rows that are malformed, arbitrary rows, and Hub ids."""

import json
import os
import re
import shutil
import subprocess
import sys

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from rlhf_course.loading import (COLUMNS, LAYOUTS, MESSAGES, MODELS, comparisons_from_rows, find_layout, join_conversations,
                                 load_comparisons, to_conversation)  # fmt: skip
from rlhf_course.preferences import shuffle_sides


def talk(*turns):
    """Messages from turns such as `u:Hi` (user), `a:Hello` (assistant) and `s:Be kind` (system)."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return [{"content": turn[2:], "role": roles[turn[0]]} for turn in turns]


def plain(prompt, a, b, winner):
    """What a question with two answers becomes."""
    return {"prompt": prompt, "response_a": a, "response_b": b, "winner": winner, "messages_a": None, "messages_b": None}


def several(prompt, a, b, winner, messages_a, messages_b):
    """What anything longer becomes."""
    return {**plain(prompt, a, b, winner), "messages_a": messages_a, "messages_b": messages_b}


# --- samples, each row as its set writes it, beside what it becomes or the reason it is dropped --------------------------

ARENA_A = talk("u:Wie koche ich ein Ei? 🥚", "a:Hart oder weich?", "u:Weich.", "a:Fünf Minuten.")
ARENA_B = talk("u:Wie koche ich ein Ei? 🥚", "a:Warum?", "u:Weich.", "a:Frag den Koch.")
ARENA_TEXTS = (
    "Wie koche ich ein Ei? 🥚",
    "assistant: Hart oder weich?\n\nuser: Weich.\n\nassistant: Fünf Minuten.",
    "assistant: Warum?\n\nuser: Weich.\n\nassistant: Frag den Koch.",
)
MODERATION = {"categories": {"hate": False, "sexual/minors": False}, "category_scores": {"hate": 4.5e-7}, "flagged": False}


def arena(winner, a=ARENA_A, b=ARENA_B, **more):
    """A row of lmsys/chatbot_arena_conversations."""
    return {"question_id": "58210e39b3fd4441a2bd4a518bb44c2d", "model_a": "chatglm-6b", "model_b": "koala-13b", "winner": winner,
            "judge": "arena_user_973", "conversation_a": a, "conversation_b": b, "turn": len(a) // 2, "anony": True,
            "language": "German", "tstamp": 1682351591.1322, "openai_moderation": MODERATION,
            "toxic_chat_tag": {"roberta-large": {"flagged": False, "probability": 0.012}}, **more}  # fmt: skip


def arena_55k(flags, prompt, a, b):
    """A row of lmarena-ai/arena-human-preference-55k: three lists as JSON text, three columns of which one is 1."""
    dump = lambda texts: texts if isinstance(texts, str) else json.dumps(texts)  # noqa: E731
    return {"id": 30192, "model_a": "gpt-4-1106-preview", "model_b": "gpt-4-0613", "prompt": dump(prompt), "response_a": dump(a),
            "response_b": dump(b), **dict(zip(("winner_model_a", "winner_model_b", "winner_tie"), flags))}  # fmt: skip


def hh(*turns):
    """A transcript of Anthropic/hh-rlhf."""
    return "".join(f"\n\n{'Human' if t[0] == 'u' else 'Assistant'}: {t[2:]}" for t in turns)


def ultra(prompt, chosen, rejected, scores=(8.5, 7.0)):
    """A row of HuggingFaceH4/ultrafeedback_binarized."""
    return {"prompt": prompt, "prompt_id": "f0e37e9f7800261167ce91143f98f511f768847236f133f2d0aed60b444ebe57", "chosen": chosen,
            "rejected": rejected, "messages": chosen, "score_chosen": scores[0], "score_rejected": scores[1]}  # fmt: skip


def alpaca(preference, a="Six minutes.", b="Ask a cook."):
    """An annotation of AlpacaEval."""
    return {"instruction": "An egg?", "output_1": a, "generator_1": "text_davinci_003", "dataset": "helpful_base", "output_2": b,
            "generator_2": "gpt4", "annotator": "alpaca_eval_gpt4_0314", "preference": preference, "raw_completion": None}  # fmt: skip


EGG = plain("An egg?", "Six minutes.", "Ask a cook.", "a")
SHARED = talk("u:An egg?", "a:Hard?", "u:Soft.")
SHARED_TEXT = "user: An egg?\n\nassistant: Hard?\n\nuser: Soft."
LONG_A, LONG_B = [*SHARED, *talk("a:Five minutes.")], [*SHARED, *talk("a:No.")]
LONG = several(SHARED_TEXT, "Five minutes.", "No.", "a", LONG_A, LONG_B)
KIND = talk("s:", "u:An egg?", "a:Six minutes."), talk("s:", "u:An egg?", "a:Ask a cook.")

SAMPLES = {
    "comparisons": [
        ({"prompt": "An egg?", "response_a": "Six minutes.", "response_b": "Ask a cook.", "winner": "a"}, EGG),
        ({"prompt": "An egg?", "response_a": "Six minutes.", "response_b": "Ask a cook.", "winner": " TIE "}, {**EGG, "winner": "tie"}),
        (LONG, LONG),
        ({"prompt": "An egg?", "response_a": "Six minutes.", "response_b": "Ask a cook.", "winner": None}, "null judgement"),
    ],
    "alpaca_eval": [
        (alpaca(1), EGG),
        (alpaca(2.0), {**EGG, "winner": "b"}),
        (alpaca(1.0000412), EGG),
        (alpaca(1.5), {**EGG, "winner": "tie"}),
        (alpaca(0), {**EGG, "winner": "tie"}),
        (alpaca(None), "null judgement"),
        (alpaca(2, b="Six minutes."), "identical responses"),
    ],
    "arena_conversations": [
        (arena("model_a"), several(*ARENA_TEXTS, "a", ARENA_A, ARENA_B)),
        (arena("tie (bothbad)"), several(*ARENA_TEXTS, "tie", ARENA_A, ARENA_B)),
        (arena("tie", ARENA_A[:2], ARENA_B[:2]), plain("Wie koche ich ein Ei? 🥚", "Hart oder weich?", "Warum?", "tie")),
        (arena("model_b", ARENA_A[:2], ARENA_B[:2]), plain("Wie koche ich ein Ei? 🥚", "Hart oder weich?", "Warum?", "b")),
        (arena("model_b", ARENA_A, ARENA_B[:3]), "does not end on a response"),
        (arena("model_a", ARENA_A[:2], talk("u:Wie koche ich ein Ei? 🥚", "a:")), "empty response"),
        (arena("model_a", ARENA_A, ARENA_A), "identical responses"),
        (arena(None), "null judgement"),
    ],
    "arena_55k": [
        (arena_55k((1, 0, 0), ["An egg?"], ["Six minutes."], ["Ask a cook."]), EGG),
        (arena_55k((0, 0, 1), *([m["content"] for m in ms[k::2]] for ms, k in ((ARENA_A, 0), (ARENA_A, 1), (ARENA_B, 1)))),
         several(*ARENA_TEXTS, "tie", ARENA_A, ARENA_B)),
        (arena_55k((0, 1, 0), '["A \\/ \\u00e9gg? \\ud83e\\udd5a"]', ["Six\n\nminutes."], ["null"]),
         plain("A / égg? 🥚", "Six\n\nminutes.", "null", "b")),
        (arena_55k((0, 1, 0), ["An egg?"], "[null]", ["Ask a cook."]), "text is not a string"),
        (arena_55k((0, 1, 0), ["An egg?"], '["cut \\ud83e"]', ["Ask a cook."]), "text is not valid Unicode"),
        (arena_55k((0, 1, 0), ["An egg?", "Soft."], ["Six."], ["Ask.", "No."]), "more prompts than responses, or fewer"),
        (arena_55k((0, 0, 0), ["An egg?"], ["Six minutes."], ["Ask a cook."]), "null judgement"),
        (arena_55k((1, 0, 1), ["An egg?"], ["Six minutes."], ["Ask a cook."]), "unknown winner"),
    ],
    "hh_rlhf": [
        ({"chosen": hh("u:An egg?", "a:Six minutes."), "rejected": hh("u:An egg?", "a:Ask a cook.")}, EGG),
        ({"chosen": hh("u:An egg?", "a:Hard?", "u:Soft.", "a:Five minutes."), "rejected": hh("u:An egg?", "a:Hard?", "u:Soft.", "a:No.")}, LONG),
        ({"chosen": hh("u:An egg?", "a:Hard?", "u:Soft.", "a:Five\n\nminutes. "), "rejected": hh("u:An egg?", "a:No.")},
         several("An egg?", "assistant: Hard?\n\nuser: Soft.\n\nassistant: Five\n\nminutes. ", "No.", "a",
                 talk("u:An egg?", "a:Hard?", "u:Soft.", "a:Five\n\nminutes. "), talk("u:An egg?", "a:No."))),
        ({"chosen": hh("u:Hm", "u:An egg?", "a:Six."), "rejected": hh("u:Hm", "u:An egg?", "a:No.")},
         several("user: Hm\n\nuser: An egg?", "Six.", "No.", "a", talk("u:Hm", "u:An egg?", "a:Six."), talk("u:Hm", "u:An egg?", "a:No."))),
        ({"chosen": hh("u:An egg?", "a:Six."), "rejected": hh("u:An egg?") + "\n\nAssistant:"}, "empty response"),
        ({"chosen": hh("u:An egg?", "a:Six.", "u:Thanks"), "rejected": hh("u:An egg?", "a:No.")}, "does not end on a response"),
        ({"chosen": hh("u:An egg?", "a:Six."), "rejected": hh("u:A hen?", "a:No.")}, "no shared prompt"),
        ({"chosen": hh("u:An egg?", "a:Six."), "rejected": hh("u:An egg?", "a:Six.")}, "identical responses"),
    ],
    "ultrafeedback": [
        (ultra("An egg?", talk("u:An egg?", "a:Six minutes."), talk("u:An egg?", "a:Ask a cook.")), EGG),
        (ultra("Soft.", LONG_A, LONG_B, (9, 9)), LONG),
        (ultra("An egg?", *KIND), several("system: \n\nuser: An egg?", "Six minutes.", "Ask a cook.", "a", *KIND)),
        (ultra("An egg?", talk("u:An egg?", "a:Six minutes."), talk("u:An egg?", "a:Six minutes.")), "identical responses"),
        (ultra("An egg?", talk("u:An egg?", "a:Six minutes."), talk("u:An egg?", "a: ")), "empty response"),
        (ultra("A hen?", talk("u:An egg?", "a:Six minutes."), talk("u:An egg?", "a:Ask a cook.")), "prompt is not in the conversation"),
    ],
    "trl_text": [
        ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, plain("The sky is", " blue.", " green.", "a")),
        ({"prompt": "The sky is", "chosen": " blue.", "rejected": " "}, "empty response"),
    ],
    "trl_messages": [
        ({"prompt": talk("u:An egg?"), "chosen": talk("a:Six minutes."), "rejected": talk("a:Ask a cook.")}, EGG),
        ({"prompt": SHARED, "chosen": LONG_A[3:], "rejected": LONG_B[3:]}, LONG),
        ({"prompt": talk("u:An egg?"), "chosen": talk("a:Six minutes."), "rejected": talk("u:Ask a cook.")}, "does not end on a response"),
    ],
    "trl_implicit_text": [
        ({"chosen": "The sky is blue.", "rejected": "The sky is black."}, plain("The sky is", " blue.", " black.", "a")),
        ({"chosen": "An egg?\n\nSix.", "rejected": "An egg?\n\nNo."}, plain("An egg?", "\n\nSix.", "\n\nNo.", "a")),
        ({"chosen": "Yes.", "rejected": "No."}, "no shared prompt"),
    ],
    "trl_implicit_messages": [
        ({"chosen": talk("u:An egg?", "a:Six minutes."), "rejected": talk("u:An egg?", "a:Ask a cook.")}, EGG),
        ({"chosen": LONG_A, "rejected": LONG_B}, LONG),
        ({"chosen": talk("a:Hi!", "a:Six minutes."), "rejected": talk("a:Hi!", "a:Ask a cook.")}, "no shared prompt"),
    ],
}  # fmt: skip
MODEL_COLUMNS = {"alpaca_eval": ("generator_1", "generator_2"), "arena_conversations": MODELS, "arena_55k": MODELS, "comparisons": MODELS}
each_layout = pytest.mark.parametrize("name", SAMPLES)


def expected_rows(name):
    """What the good rows of a layout's samples become, with the names of the models, and without messages where no row has any."""
    rows = [{**found, **{ours: row.get(theirs) for ours, theirs in zip(MODELS, MODEL_COLUMNS.get(name, MODELS))}}
            for row, found in SAMPLES[name] if isinstance(found, dict)]  # fmt: skip
    left_out = () if any(row["messages_a"] for row in rows) else MESSAGES
    return [{c: v for c, v in row.items() if c not in left_out} for row in rows]


def expected_drops(name, first):
    """Reason -> places of the samples that are dropped; the first row stands at `first`."""
    drops = {}
    for place, (_, found) in enumerate(SAMPLES[name], first):
        if isinstance(found, str):
            drops.setdefault(found, []).append(place)
    return drops


def write(path, rows):
    """The rows in the format that the path's ending names."""
    if path.suffix == ".parquet":
        columns = dict.fromkeys(c for row in rows for c in row)
        parquet.write_table(pa.table({c: [row.get(c) for row in rows] for c in columns}), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows), encoding="utf-8", newline="")
    else:  # lists as JSON text, nulls as nothing
        columns = list(dict.fromkeys(c for row in rows for c in row))
        cells = [["" if row.get(c) is None else row[c] if isinstance(row[c], str) else json.dumps(row[c]) for c in columns] for row in rows]
        lines = [",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in [columns, *cells]]
        path.write_text("\n".join(lines), encoding="utf-8", newline="")


@each_layout
@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "csv"])
def test_samples_load_as_they_should(tmp_path, name, ending):
    """Each row becomes what stands beside it, or is dropped for that reason, at its place, from each format."""
    rows = [row for row, _ in SAMPLES[name]]
    path = tmp_path / f"sample.{ending}"
    write(path, rows)
    comparisons, report = load_comparisons(path)
    places = {"jsonl": 1, "json": 1, "parquet": 1, "csv": 2}
    if ending == "csv":  # a record may have line breaks in it, so each starts further down
        heights = [1 + sum(str(v).count("\n") for v in row.values() if isinstance(v, str)) for row in rows]
        starts = [2 + sum(heights[:i]) for i in range(len(rows))]
        drops = {reason: [starts[i] for i in at] for reason, at in expected_drops(name, 0).items()}
    else:
        drops = expected_drops(name, places[ending])
    assert (report.layout, report.n_read, report.dropped) == (name, len(rows), drops)
    got = comparisons.to_list()
    assert got == [{c: row[c] for c in got[0]} for row in expected_rows(name)] and set(got[0]) == set(expected_rows(name)[0])


@each_layout
def test_samples_are_told_apart(name):
    """By their columns, and by their values where columns are shared."""
    rows = [row for row, _ in SAMPLES[name]]
    assert find_layout(rows[0], rows=rows).name == name
    assert {layout.name for layout in LAYOUTS} == set(SAMPLES)


@each_layout
def test_conversations_keep_their_turns(name):
    """`to_conversation` gives each side's messages as the source has them, and the other way round is the same comparison."""
    for row in expected_rows(name):
        sides = [to_conversation(row, side) for side in "ab"]
        assert sides == [row.get("messages_a") or talk("u:" + row["prompt"], "a:" + row["response_a"]),
                         row.get("messages_b") or talk("u:" + row["prompt"], "a:" + row["response_b"])]  # fmt: skip
        joined = join_conversations(*sides)
        assert {c: joined[c] for c in COLUMNS[:3]} == {c: row[c] for c in COLUMNS[:3]}
        assert joined["messages_a"] == row.get("messages_a")


def test_shuffled_sides_take_their_messages_along():
    """Text, messages, models and winner of a side stay together."""
    comparisons, _ = comparisons_from_rows([arena(winner) for winner in ("model_a", "model_b", "tie")] * 10)
    shuffled = shuffle_sides(comparisons, seed=1)
    assert 0 < sum(row["model_a"] == "koala-13b" for row in shuffled) < 30
    for before, after in zip(comparisons, shuffled):
        turned = after["model_a"] == "koala-13b"
        sides = ("b", "a") if turned else ("a", "b")
        assert [after[f"messages_{s}"] for s in sides] == [ARENA_A, ARENA_B]
        assert [after[f"response_{s}"] for s in sides] == list(ARENA_TEXTS[1:])
        assert after["winner"] == (dict(a="b", b="a").get(before["winner"], "tie") if turned else before["winner"])


# --- rows that are malformed ------------------------------------------------------------------------------------------

WRONG_MESSAGES = {
    "null": (None, "not a list of messages"),
    "number": (7, "not a list of messages"),
    "empty list": ([], "not a list of messages"),
    "list of texts": (["Hi"], "not a list of messages"),
    "object": ({"role": "user", "content": "Hi"}, "not a list of messages"),
    "no content": ([{"role": "user"}], "not a list of messages"),
    "from and value": ([{"from": "human", "value": "Hi"}], "not a list of messages"),
    "plain text": ("An egg?", "not a JSON list"),
    "cut JSON": ('[{"role": "user", "con', "not a JSON list"),
    "deep JSON": ("[" * 100_000, "not a JSON list"),
    "unknown role": (talk("u:Hi") + [{"role": "tool", "content": "42"}], "unknown role"),
    "null role": ([{"role": None, "content": "Hi"}], "unknown role"),
    "list for a role": ([{"role": ["user"], "content": "Hi"}], "unknown role"),
    "null content": (talk("u:Hi") + [{"role": "assistant", "content": None}], "text is not a string"),
    "parts for content": ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "text is not a string"),
    "lone surrogate": (talk("u:\ud800", "a:Hi"), "text is not valid Unicode"),
    "blank question": (talk("u: \n", "a:Hi"), "empty prompt"),
    "blank answer on the way": (talk("u:Hi", "a: ", "u:Hm", "a:Hi"), "empty response"),
    "ends with the user": (talk("u:An egg?", "a:Hi", "u:Bye"), "does not end on a response"),
    "ends with the system": (talk("u:An egg?", "a:Hi", "s:Bye"), "does not end on a response"),
    "another question": (talk("u:A hen?", "a:Hi"), "no shared prompt"),
    "no question": (talk("a:Hi"), "no shared prompt"),
    "the same": (talk("u:An egg?", "a:Six minutes."), "identical responses"),
}
GOOD = {
    "comparisons": LONG,
    "alpaca_eval": alpaca(1),
    "arena_conversations": arena("tie", talk("u:An egg?", "a:Six minutes."), talk("u:An egg?", "a:Ask a cook.")),
    "arena_55k": arena_55k((1, 0, 0), ["An egg?"], ["Six minutes."], ["Ask a cook."]),
    "hh_rlhf": SAMPLES["hh_rlhf"][0][0],
    "ultrafeedback": SAMPLES["ultrafeedback"][0][0],
    "trl_text": SAMPLES["trl_text"][0][0],
    "trl_messages": SAMPLES["trl_messages"][0][0],
    "trl_implicit_text": SAMPLES["trl_implicit_text"][0][0],
    "trl_implicit_messages": SAMPLES["trl_implicit_messages"][0][0],
}
MALFORMED = [
    *(("arena_conversations", "conversation_b", value, reason) for value, reason in WRONG_MESSAGES.values()),
    *((name, "rejected", value, reason) for name in ("ultrafeedback", "trl_implicit_messages")
      for case, (value, reason) in WRONG_MESSAGES.items() if isinstance(value, list) and case != "the same" or case == "the same"),
    *((name, "rejected", value, "not a JSON list" if isinstance(value, str) else "not a list of messages")
      for name in ("ultrafeedback", "trl_messages", "trl_implicit_messages") for value in (None, 7, "An egg? No.")),
    ("trl_messages", "prompt", [], "not a list of messages"),
    ("trl_messages", "prompt", talk("a:Hi"), "no shared prompt"),
    ("trl_messages", "prompt", talk("u: "), "empty prompt"),
    ("trl_messages", "chosen", talk("u:Hi"), "does not end on a response"),
    ("trl_messages", "rejected", talk("a:Six minutes."), "identical responses"),
    ("ultrafeedback", "prompt", "", "prompt is not in the conversation"),
    ("ultrafeedback", "prompt", 7, "prompt is not in the conversation"),
    *((name, column, value, reason) for name in ("trl_text", "trl_implicit_text", "hh_rlhf") for column in ("chosen", "rejected")
      for value, reason in ((None, "text is not a string"), (7, "text is not a string"), (["An egg?"], "text is not a string"))),
    *(("trl_text", column, value, reason) for column in ("prompt", "chosen", "rejected")
      for value, reason in (("\ud800", "text is not valid Unicode"), (" ", None))),
    ("trl_text", "rejected", " blue.", "identical responses"),
    ("trl_implicit_text", "rejected", "\ud800", "text is not valid Unicode"),
    ("trl_implicit_text", "rejected", "", "empty response"),
    ("trl_implicit_text", "rejected", "The sky is blue.", "identical responses"),
    ("hh_rlhf", "rejected", "\n\nHuman: \ud800\n\nAssistant: Hi", "text is not valid Unicode"),
    ("hh_rlhf", "rejected", "", "empty prompt"),
    ("hh_rlhf", "rejected", "The sky is blue.", "not a transcript"),
    ("hh_rlhf", "rejected", "Well.\n\nHuman: An egg?\n\nAssistant: No.", "not a transcript"),
    ("hh_rlhf", "rejected", hh("u:An egg?", "a:Hard?", "u: ", "a:No."), "empty prompt"),
    ("hh_rlhf", "rejected", hh("a:Six minutes."), "no shared prompt"),
    ("hh_rlhf", "rejected", hh("u:An egg?"), "does not end on a response"),
    *(("arena_55k", column, value, reason) for column in ("prompt", "response_a", "response_b")
      for value, reason in ((None, "not a list of messages"), (7, "not a list of messages"), ("[]", "not a list of messages"),
                            ('{"a": 1}', "not a list of messages"), ("An egg?", "not a JSON list"), ('["An egg?', "not a JSON list"),
                            ("['An egg?']", "not a JSON list"), ("[7]", "text is not a string"), ("[null]", "text is not a string"),
                            ('["\\ud800"]', "text is not valid Unicode"), ('[" "]', None))),
    ("arena_55k", "response_b", '["Ask a cook.", "No."]', "more prompts than responses, or fewer"),
    ("arena_55k", "response_b", '["Six minutes."]', "identical responses"),
    *(("arena_55k", "winner_model_b", value, "unknown winner") for value in (1, 2, -1, 0.5, "yes", None, "", [0], {"a": 1})),
    ("arena_55k", "winner_model_a", 0, "null judgement"),
    *(("arena_conversations", "winner", value, reason) for value, reason in
      ((None, "null judgement"), ("", "null judgement"), ("both", "unknown winner"), (1, "unknown winner"), (["a"], "unknown winner"))),
    *(("alpaca_eval", "preference", value, reason) for value, reason in
      ((None, "null judgement"), (float("nan"), "null judgement"), (3, "unknown winner"), ("one", "unknown winner"), (True, "unknown winner"),
       ([1], "unknown winner"), (float("inf"), "unknown winner"))),
    *(("alpaca_eval", column, value, reason) for column in ("instruction", "output_1", "output_2")
      for value, reason in ((None, "text is not a string"), (["x"], "text is not a string"), (" ", None), ("\ud800", "text is not valid Unicode"))),
    ("alpaca_eval", "output_2", "Six minutes.", "identical responses"),
    ("comparisons", "messages_a", None, "not a list of messages"),
    ("comparisons", "messages_b", None, "not a list of messages"),
    ("comparisons", "messages_b", LONG_B[:3], "does not end on a response"),
    ("comparisons", "prompt", "An egg?", "text differs from its messages"),
    ("comparisons", "response_a", "Four minutes.", "text differs from its messages"),
    ("comparisons", "response_b", 7, "text differs from its messages"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "column", "value", "reason"), MALFORMED, ids=lambda value: ascii(value)[:30])
def test_malformed_row_is_dropped_with_reason_and_place(name, column, value, reason):
    """Among good rows, and as an error of one line that names column and value when strict."""
    reason = reason or ("empty prompt" if column in ("prompt", "instruction") else "empty response")
    good, bad = GOOD[name], {**GOOD[name], column: value}
    comparisons, report = comparisons_from_rows([good, bad, good, good], "set")
    assert report.dropped == {reason: [2]} and len(comparisons) == 3 and report.layout == name
    with pytest.raises(ValueError) as caught:
        comparisons_from_rows([good, good, bad, good], "set", strict=True)
    message = str(caught.value)
    assert re.match(rf"set: row 3, column \w+: {reason}, found ", message) and "\n" not in message and len(message) < 250, message


@each_layout
def test_missing_column_is_named(name):
    """A row without one of its layout's columns, among rows that have it."""
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    for column in layout.columns:
        bad = {c: v for c, v in GOOD[name].items() if c != column}
        _, report = comparisons_from_rows([GOOD[name], GOOD[name], bad], "set")
        assert report.dropped == {"missing column": [3]}


def test_rows_of_another_layout_with_the_same_columns_are_reported():
    """A transcript among plain texts would be cut in the wrong place, a text among messages would not be found out otherwise."""
    groups = (("hh_rlhf", "trl_implicit_text", "trl_implicit_messages"), ("trl_text", "trl_messages", "ultrafeedback"))
    for group in groups:
        for most in group:
            strays = [GOOD[name] for name in group if name != most]
            comparisons, report = comparisons_from_rows([*strays, *[GOOD[most]] * 3], "set")
            assert report.layout == most and report.dropped == {"in another layout than most rows": [1, 2]} and len(comparisons) == 3


def test_columns_of_two_layouts_are_refused():
    """Either choice would be a guess."""
    with pytest.raises(ValueError, match=r"^set: the columns fit two layouts, comparisons \(.*\) and alpaca_eval \(.*\)\. Remove"):
        comparisons_from_rows([{**GOOD["alpaca_eval"], **{c: "x" for c in COLUMNS}}], "set")
    assert find_layout(["prompt", "chosen", "rejected"]).columns.keys() == {"prompt", "chosen", "rejected"}


# --- arbitrary rows ---------------------------------------------------------------------------------------------------

TEXTS = st.text(max_size=8)
JUNK = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.lists(TEXTS, max_size=2) | st.dictionaries(TEXTS, TEXTS, max_size=1)
KNOWN = ["egg", "Six.", " pan \n", "user: a\n\nassistant: b", "\u202bשלום\u202c", "e\u0301🥚", "An egg? Yes.", "An egg? No.", "\ud83e", " "]
TURNS = [("user", "assistant"), ("system", "user", "assistant"), ("user", "assistant", "user", "assistant"), ("assistant",)]


class Draw:
    """Cells of all kinds, from the texts that hypothesis found, mixed by a seed that hypothesis found too."""

    def __init__(self, random, texts):
        self.random, self.texts, self.question = random, [*texts, *KNOWN], random.choice(KNOWN)

    def of(self, *values):
        return self.random.choice(values)

    def text(self):
        return self.random.choice(self.texts)

    def talk(self):
        return [{"role": role, "content": self.text()} for role in self.random.choice(TURNS)]

    def asked(self):
        start = [{"role": "user", "content": self.question}]
        return self.of(start + talk("a:" + self.text()), start + talk("a:" + self.text()), start + self.talk(), self.talk())

    def transcript(self):
        written = hh(*(f"{m['role'][0]}:{m['content']}" for m in self.asked()))
        return self.of(written, written, written, self.text())

    def json_list(self):
        return json.dumps([self.text() for _ in range(self.of(1, 1, 1, 2))])

    def flags(self):
        return {f"winner_{w}": self.of(0, 0.0, "0") for w in ("model_a", "model_b", "tie")} | {self.of(
            "winner_model_a", "winner_model_b", "winner_tie"): self.of(1, 1, "1", None)}  # fmt: skip

    def row(self, name):
        """A row that is mostly of the layout."""
        pair = {"chosen": self.asked, "rejected": self.asked}
        texts = dict.fromkeys(("prompt", "response_a", "response_b", "instruction", "output_1", "output_2"), self.text)
        winner = {"winner": lambda: self.of("a", "b", "tie", "model_a", "model_b", "tie (bothbad)", None, "c")}
        fields = {
            "comparisons": {c: texts[c] for c in COLUMNS[:3]} | winner,
            "alpaca_eval": {c: texts[c] for c in ("instruction", "output_1", "output_2")} | {"preference": lambda: self.of(1, 2, 1.5, 0, 1.3, None, 9)},
            "arena_conversations": {"conversation_a": self.asked, "conversation_b": lambda: self.of(self.asked(), json.dumps(self.asked()))} | winner,
            "arena_55k": {c: self.json_list for c in COLUMNS[:3]},
            "hh_rlhf": {"chosen": self.transcript, "rejected": self.transcript},
            "ultrafeedback": {"prompt": lambda: self.of(self.question, self.text()), **pair},
            "trl_text": {"prompt": self.text, "chosen": self.text, "rejected": self.text},
            "trl_messages": {"prompt": self.asked, "chosen": self.talk, "rejected": self.talk},
            "trl_implicit_text": {c: lambda: self.of("An egg? " + self.text(), self.text()) for c in ("chosen", "rejected")},
            "trl_implicit_messages": pair,
        }  # fmt: skip
        return {column: make() for column, make in fields[name].items()} | (self.flags() if name == "arena_55k" else {})


@st.composite
def arbitrary_rows(draw, name):
    """Twenty rows that are mostly of the layout, with junk in any column, columns that are missing, and things that are no rows."""
    texts, junk = draw(st.lists(TEXTS, min_size=3, max_size=6)), draw(st.lists(JUNK, min_size=2, max_size=4))
    cells, rows = Draw(draw(st.randoms(use_true_random=True)), texts), []
    for _ in range(20):
        row = cells.row(name)
        column, fate = cells.of(*row), cells.of(*["good"] * 12, "junk", "junk", "missing", "no row")
        without = {c: v for c, v in row.items() if c != column}
        rows.append({"good": row, "missing": without, "junk": {**row, column: cells.of(*junk)}, "no row": cells.of(7, None, "x", [row])}[fate])
    return rows


def contents(value):
    """All text of a cell that was accepted: of a text, of a list of texts or messages, or of the JSON text of one."""
    if isinstance(value, str) and value.startswith("[") and not isinstance(value, list):
        value = json.loads(value)
    return value if isinstance(value, str) else "".join(v if isinstance(v, str) else v["content"] for v in value)


def text_of(row, layout, side):
    """The text of one side as it stands in the source, read without the loader."""
    first = side == "a"
    chosen = row.get("chosen" if first else "rejected")
    if layout == "hh_rlhf":
        return re.sub(r"(\A\s*|\n\n)(Human|Assistant): ?", "", chosen)
    if layout in ("trl_implicit_text", "trl_implicit_messages", "ultrafeedback"):
        return chosen if isinstance(chosen, str) else contents(chosen)
    if layout == "trl_text":
        return row["prompt"] + chosen
    if layout == "trl_messages":
        return contents(row["prompt"]) + contents(chosen)
    if layout == "alpaca_eval":
        return row["instruction"] + row["output_1" if first else "output_2"]
    if layout == "arena_conversations":
        return contents(row[f"conversation_{side}"])
    if layout == "arena_55k":
        prompts, answers = (json.loads(v) if isinstance(v, str) else v for v in (row["prompt"], row[f"response_{side}"]))
        return "".join(text for turn in zip(prompts, answers) for text in turn)
    return row["prompt"] + row[f"response_{side}"]


def loaded(load, n):
    """Rows and report; where nothing is left, the error must account for all n rows."""
    try:
        data, report = load()
    except ValueError as error:
        assert f"kept 0 of {n} rows; dropped {n}: " in str(error) and "\n" not in str(error)
        return None
    return data.to_list(), report


@each_layout
def test_arbitrary_rows_are_loaded_intact_or_reported(name, tmp_path_factory):
    """2,000 rows: none crashes, none vanishes, no text changes; and a file gives what memory gives."""
    path, read = tmp_path_factory.mktemp("rows") / "rows.jsonl", {"rows": 0, "kept": 0}

    @settings(max_examples=100, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(arbitrary_rows(name))
    def check(some):
        rows = [SAMPLES[name][0][0], *some]
        read["rows"] += len(rows)
        answer = loaded(lambda: comparisons_from_rows(rows, "set"), len(rows))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        from_file = loaded(lambda: load_comparisons(path), len(rows))
        if answer is None:
            assert from_file is None
            return
        kept, report = answer
        assert from_file[0] == kept and from_file[1].dropped == report.dropped
        places = sorted(place for at in report.dropped.values() for place in at)
        assert len(set(places)) == len(places) == len(rows) - len(kept) and report.n_read == len(rows)
        assert all(isinstance(reason, str) and reason for reason in report.dropped)
        sources = [row for place, row in enumerate(rows, 1) if place not in places]
        for source, row in zip(sources, kept, strict=True):
            for side in "ab":
                assert "".join(m["content"] for m in to_conversation(row, side)) == text_of(source, report.layout, side)
        read["kept"] += len(kept)

    check()
    assert read["rows"] >= 2000 and read["kept"] >= 200, read


# --- Hub ids ----------------------------------------------------------------------------------------------------------


@pytest.fixture()
def hub_cache(tmp_path, monkeypatch):
    """The cache as an earlier visit to the Hub leaves it: two sets, one with two splits."""
    import datasets
    from datasets.packaged_modules.json.json import Json

    rows = [row for row, _ in SAMPLES["hh_rlhf"]]
    lines = tmp_path / "hh.jsonl"
    write(lines, rows)
    for name, splits in {"tiny": ["train"], "hh-tiny": ["train", "test"]}.items():
        builder = Json(dataset_name=name, cache_dir=str(tmp_path / "built"), data_files={split: [str(lines)] for split in splits})
        builder.download_and_prepare()
        place = tmp_path / "cache" / f"rlhf-course___{name}" / "default" / "0.0.0" / "0123456789abcdef"
        shutil.copytree(builder.cache_dir, place)
        info = json.loads((place / "dataset_info.json").read_text(encoding="utf-8"))
        (place / "dataset_info.json").write_text(json.dumps({**info, "config_name": "default"}), encoding="utf-8")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def test_hub_id_loads_what_an_earlier_visit_left(hub_cache):
    """Through datasets, without a network; a split where there are several."""
    for arguments in ({"path": "rlhf-course/tiny"}, {"path": "rlhf-course/hh-tiny", "split": "test"}):
        comparisons, report = load_comparisons(**arguments)
        assert str(report).startswith(f"{arguments['path']}: kept 4 of 8 rows; dropped 4: empty response 1 (row 5); ")
        assert comparisons.to_list() == expected_rows("hh_rlhf") and report.layout == "hh_rlhf"
    assert len(load_comparisons("rlhf-course/hh-tiny", split="train[:2]")[0]) == 2
    with pytest.raises(ValueError, match="^rlhf-course/tiny: row 5, column rejected: empty response, found "):
        load_comparisons("rlhf-course/tiny", strict=True)


def test_hub_id_wants_a_split_that_is_there(hub_cache):
    """Which split is meant is not guessed, and a wrong one is named with the right ones."""
    with pytest.raises(ValueError, match=r"^rlhf-course/hh-tiny: has the splits train, test\. Name one, as in split='train'$"):
        load_comparisons("rlhf-course/hh-tiny")
    with pytest.raises(ValueError, match=r"^rlhf-course/tiny: .*Unknown split \"dev\".*Check id and split"):
        load_comparisons("rlhf-course/tiny", split="dev")


def test_hub_id_without_a_network_says_what_to_do_instead(tmp_path):
    """In a process of its own that stays off the network; one line, no traceback of a library."""
    code = "import sys\nfrom rlhf_course.loading import load_comparisons\ntry: load_comparisons('Anthropic/hh-rlhf', split='train')\n" \
           "except ValueError as error: print(type(error).__name__, error)"  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_DATASETS_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ValueError Anthropic/hh-rlhf: no such file, and as a data set of the Hub it cannot be loaded (Couldn't reach")
    assert done.stdout.endswith("fetch a file of the set elsewhere, with a browser or `hf download`, and give its path\n")
    assert done.stdout.count("\n") == 1


def test_hub_set_is_asked_for_without_running_its_code(monkeypatch):
    """`load_dataset` gets the id and the split and nothing else, and an error of several lines becomes one."""
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'lmsys/x' is a gated dataset on the Hub.\nLog in.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"^lmsys/x: .*\(Dataset 'lmsys/x' is a gated dataset on the Hub\. Log in\.\)\. Check id") as caught:
        load_comparisons("lmsys/x", split="train")
    assert asked == [(("lmsys/x",), {"split": "train"})] and "\n" not in str(caught.value)


def test_files_go_before_hub_ids(tmp_path, monkeypatch):
    """A file called owner/name is a file, a name that ends like a file is one that is missing, and files have no splits."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    write(tmp_path / "owner" / "name.jsonl", [GOOD["trl_text"]])
    (tmp_path / "owner" / "name.jsonl").rename("owner/name")
    assert len(load_comparisons("owner/name")[0]) == 1
    for missing in ("owner/none.jsonl", "owner/none.csv.gz", "none", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=f"^{missing}: no such file"):
            load_comparisons(missing)
    with pytest.raises(ValueError, match="^owner: is a folder"):
        load_comparisons("owner")
    with pytest.raises(ValueError, match="^load_comparisons: `split` should be None for the file owner/name, got 'train'"):
        load_comparisons("owner/name", split="train")
