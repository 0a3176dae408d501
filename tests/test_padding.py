"""Padding and batching: what a notebook cannot hold, and bad input, with one clear line for each."""

import math
import re

import numpy as np
import pytest
import torch
from datasets import Dataset, disable_progress_bars
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from rlhf_course import padding
from rlhf_course.padding import (BOTH_FORM, PAIR_COLUMNS, STRATEGIES, PairCollator, batch_slider, cut_batches, encode_conversations,
                                 encode_messages, length_correlation, length_grouped_batches, make_batches, optimal_batches,
                                 optimal_token_batches, pack_rows, packed_batch, pad_batch, padding_fraction, token_budget_batches,
                                 tokenize_both, tokenize_pairs, transcript)  # fmt: skip
from rlhf_course.preferences import count_tokens, filter_long, tokenize_texts
from rlhf_course.tiny_lm import load_tiny_lm, train_bpe_tokenizer

disable_progress_bars()
CHATML = "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endfor %}"
TRIMMING = "{% for m in messages %}{{ '<user>' + m['content'] | trim }}{% endfor %}"
SPACED = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12) | st.sampled_from(["<eos>", " <user>", "\n", "a b", "{x}", "🥚"])


def bpe(template):
    """A byte-pair tokenizer with this chat template, or none."""
    made = train_bpe_tokenizer(["how do i make tea ?\n\nboil the water . "] * 3, vocab_size=330)
    made.chat_template = template
    return made


TOKENIZERS = {"arena": load_tiny_lm()[1], "bytes": bpe(bpe(None).chat_template or "{% for m in messages %}{{ '<user>' + m['content'] + '<assistant>' }}{% endfor %}"),
              "line breaks": bpe(CHATML), "trimming": bpe(TRIMMING), "spaces": bpe(SPACED), "no template": bpe(None)}  # fmt: skip
each_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


def rows_of(prompt="p", a="x", b="y", winner="a", **more):
    """One comparison as a data set."""
    return Dataset.from_list([{"prompt": prompt, "response_a": a, "response_b": b, "winner": winner, **more}])


def refused(function, *args, **kwargs):
    """The message of a refusal."""
    with pytest.raises(ValueError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Tokens.


@each_tokenizer
@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=30))
def test_joined_texts_are_what_the_template_says(name, rows):
    """Whatever the texts, and whether or not their ids were joined."""
    tokenizer = TOKENIZERS[name]
    data = Dataset.from_list([{"prompt": p, "response_a": a, "response_b": b, "winner": "tie"} for p, a, b in rows])
    for row, (p, a, b) in zip(tokenize_pairs(data, tokenizer), rows):
        assert [row["input_ids_a"], row["input_ids_b"]] == encode_conversations([p, p], [a, b], tokenizer)
    for row, (p, a, b) in zip(tokenize_both(data, tokenizer), rows):
        text = BOTH_FORM.replace("{prompt}", "\0").replace("{response_a}", "\1").replace("{response_b}", "\2")
        text = re.sub("[\0-\2]", lambda found: (p, a, b)[ord(found[0])], text)
        if tokenizer.chat_template:
            turn = [{"role": "user", "content": text}]
            assert row["input_ids"] == tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        else:
            assert row["input_ids"][:-1] == tokenizer(text)["input_ids"][: len(row["input_ids"]) - 1]
            assert row["input_ids"][-1] == tokenizer.eos_token_id


def test_templates_that_do_not_permit_joining_are_found():
    """A template that trims its texts, puts a space before them, or leaves out what a model thought."""
    cutting = bpe("{% for m in messages %}{{ '<user>' + m['content'].split('</think>')[-1] + '<assistant>' }}{% endfor %}")
    assert padding._frame(lambda p, r: cutting.apply_chat_template(padding._one_turn(p, r), tokenize=False), 2, cutting) is None
    frames = {name: padding._frame(lambda p, r: t.apply_chat_template(padding._one_turn(p, r), tokenize=False), 2, t)
              for name, t in TOKENIZERS.items() if t.chat_template}  # fmt: skip
    assert frames["trimming"] is None and frames["spaces"] is None
    assert frames["arena"] is not None and frames["bytes"] is not None


def merging(*borders):
    """A tokenizer with one piece for each of these pairs of letters, and a template that puts # before a text and ~ behind it."""
    letters = {letter: i for i, letter in enumerate("#~abcdefghijklmnopqrstuvwxyz ", 3)}
    pieces = {"<pad>": 0, "<eos>": 1, "[unk]": 2, **letters, **{border: 40 + i for i, border in enumerate(borders)}}
    bpe = BPE(vocab=pieces, merges=[tuple(border) for border in borders], unk_token="[unk]")
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bpe), pad_token="<pad>", eos_token="<eos>")
    made.chat_template = "{% for m in messages %}<eos>#{{ m['content'] }}~<eos>{% endfor %}"
    return made


@pytest.mark.parametrize("borders", [["#q"], ["z~"], ["#q", "z~", "#x"]], ids=str)
@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(*[st.text("qzxa", min_size=1, max_size=3)] * 3), min_size=1, max_size=30))
def test_borders_that_odd_texts_do_not_foresee_are_found_in_the_data(borders, rows):
    """The template seems to permit joining; the texts that merge with what stands beside them are tokenized as they stand."""
    tokenizer = merging(*borders)
    assert padding._frame(lambda p, r: tokenizer.apply_chat_template(padding._one_turn(p, r), tokenize=False), 2, tokenizer) is not None
    data = Dataset.from_list([{"prompt": p, "response_a": a, "response_b": b, "winner": "tie"} for p, a, b in rows])
    for row, (p, a, b) in zip(tokenize_pairs(data, tokenizer), rows):
        assert [row["input_ids_a"], row["input_ids_b"]] == encode_conversations([p, p], [a, b], tokenizer)


class Watched:
    """A tokenizer that remembers the texts it was shown."""

    def __init__(self, tokenizer):
        self.inner, self.seen, self.chat_template, self.eos_token_id = tokenizer, [], tokenizer.chat_template, tokenizer.eos_token_id

    def __call__(self, texts, **options):
        self.seen.extend(texts)
        return self.inner(texts, **options)

    def apply_chat_template(self, turns, **options):
        return self.inner.apply_chat_template(turns, **options)

    def __getstate__(self):
        return {}


def test_what_was_counted_is_not_tokenized_again():
    """With `known` from counting, tokenizing shows the tokenizer no further text of the data, but the one that is tried at each call."""
    tokenizer, known = Watched(TOKENIZERS["arena"]), {}
    words = [f"boil water {'add leaves . ' * i}." for i in range(40)]
    rows = Dataset.from_list([{"prompt": words[i % 5], "response_a": words[i % 7], "response_b": words[i], "winner": "a"} for i in range(40)])
    counted = count_tokens(rows, tokenizer, known)
    assert sorted(tokenizer.seen) == sorted(set(words)) == sorted(known)
    tokenizer.seen.clear()
    again = tokenize_pairs(counted, tokenizer, known=known)
    assert len([text for text in tokenizer.seen if text in known]) <= 6 and len(known) == 40
    assert again.to_dict() == tokenize_pairs(rows, TOKENIZERS["arena"]).to_dict()
    both = tokenize_both(counted, tokenizer, known=known)
    assert both.to_dict() == tokenize_both(rows, TOKENIZERS["arena"]).to_dict()


def test_ids_of_another_tokenizer_are_refused():
    """A dict that was filled by one tokenizer is no use to another."""
    known = dict(tokenize_texts(["boil water ."], TOKENIZERS["arena"]))
    assert "`known` should be ids that this tokenizer gave, got others for 'boil water .'" in refused(
        tokenize_pairs, rows_of("boil water ."), TOKENIZERS["bytes"], known=known)  # fmt: skip


@each_tokenizer
def test_dialogues_keep_their_turns(name):
    """Null and not null messages in one data set; a dialogue whose sides part in the middle."""
    tokenizer = TOKENIZERS[name]
    start = [{"role": "user", "content": "hello ."}, {"role": "assistant", "content": "yes ?"}]
    sides = [start + [{"role": "user", "content": q}, {"role": "assistant", "content": "no ."}] for q in ("tea ?", "cake ?")]
    plain = {"prompt": "p", "response_a": "x", "response_b": "y", "winner": "b", "messages_a": None, "messages_b": None}
    data = Dataset.from_list([plain, {**plain, "messages_a": sides[0], "messages_b": sides[1]}, plain])
    rows = list(tokenize_pairs(data, tokenizer))
    assert rows[0] == rows[2] and rows[0]["input_ids_a"] == encode_conversations(["p"], ["x"], tokenizer)[0]
    assert [rows[1]["input_ids_a"], rows[1]["input_ids_b"]] == encode_messages(sides, tokenizer)
    if name in ("bytes", "no template"):
        shared, parts = "hello .", [transcript(side[1:]) for side in sides]
        assert BOTH_FORM.format(prompt=shared, response_a=parts[0], response_b=parts[1]) in tokenizer.decode(tokenize_both(data, tokenizer)[1]["input_ids"])


def test_rows_over_many_batches_of_map():
    """2,500 rows of 3 texts: the same ids in every batch, and in the order of the rows."""
    tokenizer = TOKENIZERS["arena"]
    words = ["boil water .", "add leaves .", "tie ribbon ."]
    data = Dataset.from_list([{"prompt": words[i % 3], "response_a": words[i % 2], "response_b": words[2], "winner": "ab"[i % 2]} for i in range(2500)])
    tokenized = tokenize_pairs(data, tokenizer)
    for i in (0, 999, 1000, 2499):
        assert tokenized[i]["input_ids_a"] == encode_conversations([words[i % 3]], [words[i % 2]], tokenizer)[0]
        assert tokenized[i]["label"] == i % 2
    assert tokenized.column_names == list(PAIR_COLUMNS)
    assert data.format["type"] is None and tokenized.format["type"] is None


def test_tokenizing_refuses_what_it_cannot_do():
    """No row, a row too long, a form without its fields."""
    tokenizer = TOKENIZERS["arena"]
    empty = rows_of().select([])
    assert refused(tokenize_pairs, empty, tokenizer).startswith("tokenize_pairs: `comparisons` should be at least one row, got none;")
    assert refused(tokenize_both, empty, tokenizer).startswith("tokenize_both: `comparisons` should be at least one row, got none;")
    long = Dataset.from_list([*rows_of(), *rows_of(b="tea " * 50)])
    assert "response_b of row 2; call filter_long" in refused(tokenize_pairs, long, tokenizer, max_length=20)
    assert "both responses of row 2;" in refused(tokenize_both, long, tokenizer, max_length=30)
    for form in ("", "{prompt} {response_a}", "{response_a} {prompt} {response_b}"):
        assert "tokenize_both: `form`" in refused(tokenize_both, rows_of(), tokenizer, form=form)


def test_prompt_alone_over_the_limit():
    """The tokenizer's limit refuses it, the filter drops it and says so."""
    tokenizer = TOKENIZERS["arena"]
    rows = Dataset.from_list([*rows_of(prompt="tea " * 40), *rows_of()])
    assert "for the prompt and response_a of row 1;" in refused(tokenize_pairs, rows, tokenizer, max_length=16)
    kept, report = filter_long(rows, tokenizer, max_prompt_tokens=10, max_response_tokens=5)
    assert len(kept) == 1 and len(tokenize_pairs(kept, tokenizer, max_length=16)) == 1
    assert "prompt" in str(report)


# Collating.


def test_collator_takes_lists_arrays_and_tensors():
    """Mixed in one batch, as views, as small integers, and as torch formats a data set."""
    kinds = [[5, 6, 7], np.array([5, 6, 7], dtype=np.int32), torch.tensor([5, 6, 7]), np.arange(12)[5:8], (5, 6, 7), [np.int64(5), 6, 7]]
    rows = [{"input_ids_a": ids, "input_ids_b": [9], "label": label} for ids, label in zip(kinds, (0, np.int64(1), torch.tensor(2), 0, 1, 2))]
    batch = PairCollator(0, "left", 4)(rows)
    assert batch["input_ids"].tolist() == [[0, 5, 6, 7]] * 6 + [[0, 0, 0, 9]] * 6 and batch["labels"].tolist() == [0, 1, 2, 0, 1, 2]
    formatted = Dataset.from_list([{"input_ids_a": [1, 2], "input_ids_b": [3], "label": 1}]).with_format("torch")
    assert_close(PairCollator(0)(list(formatted))["input_ids"], torch.tensor([[1, 2], [3, 0]]))


def test_batch_can_be_written_to():
    """The tensors own their memory: numpy's buffers from packed bytes are read-only."""
    for sequences in ([[1, 2], [3]], [np.array([1, 2]), np.array([3])], [[1, 2]]):
        for tensor in pad_batch(sequences, 0):
            tensor += 1


def test_collator_is_a_drop_in_for_trainer(tmp_path):
    """Trainer trains on pairs with it; the last batch is smaller than the others."""
    tokenizer = TOKENIZERS["arena"]
    data = Dataset.from_list([*rows_of(a="boil water ."), *rows_of(winner="b"), *rows_of(winner="tie")])
    seen = []

    class Scorer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.score = torch.nn.Embedding(len(tokenizer), 1)

        def forward(self, input_ids, attention_mask, labels):
            seen.append(tuple(input_ids.shape))
            scores = (self.score(input_ids)[..., 0] * attention_mask).sum(1).view(2, -1)
            return {"loss": (scores[0] - scores[1]).square().mean() + 0 * labels.sum()}

    arguments = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=2, num_train_epochs=1, remove_unused_columns=False,
                                  report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True)  # fmt: skip
    Trainer(Scorer(), arguments, data_collator=PairCollator(0, pad_to_multiple_of=8), train_dataset=tokenize_pairs(data, tokenizer)).train()
    assert sorted(shape[0] for shape in seen) == [2, 4] and all(shape[1] % 8 == 0 for shape in seen)


# Batches.


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 50), st.sampled_from(STRATEGIES), st.integers(0, 3))
def test_every_strategy_deals_out_every_row_once(lengths, batch_size, strategy, seed):
    """Sizes and budgets are kept; a limit is never above its strategy."""
    batches, places = make_batches(strategy, lengths, batch_size, seed)
    assert sorted(sum(batches, [])) == list(range(len(lengths))) and places >= sum(lengths)
    if strategy in ("random", "length-grouped", "sorted", "best of equal size"):
        assert len(batches) == math.ceil(len(lengths) / batch_size) and max(map(len, batches)) <= batch_size
        assert places >= make_batches("best of equal size", lengths, batch_size)[1]
        assert abs(padding_fraction(lengths, batches) - (1 - sum(lengths) / places)) < 1e-12
    elif strategy != "packed":
        budget = max(max(lengths), round(batch_size * np.mean(lengths)))
        assert all(len(batch) * max(lengths[i] for i in batch) <= budget for batch in batches)
        best, fewest = make_batches("best under the budget", lengths, batch_size)
        assert len(best) == len(batches) and fewest <= places
    else:
        assert all(sum(lengths[i] for i in row) <= max(lengths) for row in batches)


BATCHERS = {"optimal_batches": optimal_batches, "length_grouped_batches": length_grouped_batches, "token_budget_batches": token_budget_batches,
            "optimal_token_batches": optimal_token_batches, "pack_rows": pack_rows}  # fmt: skip


@pytest.mark.parametrize("name", BATCHERS)
def test_batchers_refuse_empty_sets_and_sizes_below_one(name):
    """No length, a length of 0, and a batch size, budget or row length of 0 or below."""
    for lengths, got in (([], "none"), ([3, 0], "0")):
        assert refused(BATCHERS[name], lengths, 8).startswith(f"{name}: `lengths` should be at least one, each at least 1, got {got};")
    for size in (0, -5):
        assert f"got {size};" in refused(BATCHERS[name], [3, 2], size)


def test_other_refusals():
    """Strategy, megabatch, correlation, cut, meter."""
    assert "one of random, " in refused(make_batches, "alphabetical", [1, 2], 2)
    assert "`batch_size` should be at least 1, got 0;" in refused(make_batches, "sorted", [1, 2], 0)
    assert "`megabatch` should be at least 1" in refused(length_grouped_batches, [1, 2], 2, megabatch=0)
    assert "`batch_size` should be at least 1, got 0;" in refused(cut_batches, [0, 1], 0)
    for lengths, batches in (([3, 4], [[0], [1]]), ([3, 3], [[0, 1]])):
        assert "length_correlation: `batches`" in refused(length_correlation, lengths, batches)
    assert "each at least 1, got none;" in refused(padding_fraction, [], [[0]])


def test_text_over_the_budget():
    """The row is named, of pairs too, and what it needs."""
    for batcher in (token_budget_batches, optimal_token_batches):
        assert "at least 9, the places of row 1 alone, got 8;" in refused(batcher, [3, 9, 2], 8)
        assert "at least 12, the places of row 0 alone, got 10;" in refused(batcher, [[6, 2], [1, 1]], 10)
        assert batcher([3, 9, 2], 9) == [[1], [0, 2]]
    assert "at least 9, the longest sequence, got 8;" in refused(pack_rows, [3, 9], 8)


def test_one_sample_and_a_batch_larger_than_the_set():
    """One batch, without pads or with those of the set."""
    for strategy in STRATEGIES:
        assert make_batches(strategy, [7], 32) == ([[0]], 7)
    assert [sorted(batch) for batch in optimal_batches([3, 5, 1], 1000)] == [[0, 1, 2]]
    assert [sorted(batch) for batch in length_grouped_batches([3, 5, 1], 1000)] == [[0, 1, 2]]
    assert cut_batches(range(3), 1000) == [[0, 1, 2]] and cut_batches([], 4) == []
    assert token_budget_batches([3, 5, 1], 10**9) == optimal_token_batches([3, 5, 1], 10**9) == [[1, 0, 2]]
    batch = PairCollator(0)([{"input_ids_a": [1], "input_ids_b": [2, 3], "label": 2}])
    assert batch["input_ids"].tolist() == [[1, 0], [2, 3]]


def test_optimal_batches_of_thousands_of_rows():
    """No worse than sorting, for both limits, on 5,000 log-normal lengths."""
    lengths = np.random.default_rng(0).lognormal(4, 1, 5000).astype(int) + 1
    by_cutting = padding_fraction(lengths, cut_batches(np.argsort(-lengths, kind="stable"), 37))
    assert 0 < by_cutting - padding_fraction(lengths, optimal_batches(lengths, 37)) < by_cutting
    greedy, best = token_budget_batches(lengths, 20_000), optimal_token_batches(lengths, 20_000)
    assert len(greedy) == len(best) and padding_fraction(lengths, best) < padding_fraction(lengths, greedy)


def test_packed_rows_hold_each_text_with_its_own_positions():
    """Blocks are causal, positions begin at 0, a pad sees itself alone."""
    sequences = [[5, 6, 7], [8], [9, 9], [4, 4, 4, 4]]
    batch = packed_batch(sequences, pack_rows(list(map(len, sequences)), 5), 0)
    mask = batch["attention_mask"][:, 0]
    for i, sequence in enumerate(sequences):
        row, columns = (batch["sequence_ids"] == i).nonzero()[0, 0], (batch["sequence_ids"] == i).nonzero()[:, 1]
        assert batch["input_ids"][row, columns].tolist() == sequence and batch["position_ids"][row, columns].tolist() == list(range(len(sequence)))
        assert_close(mask[row][columns][:, columns], torch.tril(torch.ones(len(sequence), len(sequence), dtype=torch.bool)))
        assert mask[row][columns].sum() == len(sequence) * (len(sequence) + 1) / 2
    assert mask.any(-1).all()


# The slider.


def test_slider_redraws_and_degrades(monkeypatch):
    """The controls change the picture; without ipywidgets or a front end there is a figure."""
    lengths = np.random.default_rng(0).integers(1, 50, 40)
    box = batch_slider(lengths, batch_size=8, live=True)
    (size, menu), picture = box.children[0].children, box.children[1]
    pictures = [picture.value]
    size.value = 16
    pictures.append(picture.value)
    menu.value = "packed"
    pictures.append(picture.value)
    assert len(set(pictures)) == 3 and all(bytes(value).startswith(b"\x89PNG") for value in pictures)
    assert hasattr(batch_slider(lengths), "savefig")
    monkeypatch.setitem(__import__("sys").modules, "ipywidgets", None)
    assert hasattr(batch_slider(lengths, live=True), "savefig")
