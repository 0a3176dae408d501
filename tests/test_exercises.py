"""Exercises: the bank can tell right from wrong, the checks cannot be fooled, the learner's notebooks are as generated."""

import __future__
import ast
import html
import inspect
import itertools
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import right_answers_ppo
import right_answers_rlhf
import torch
from conftest import ROOT, copy_tree
from nbclient.exceptions import CellExecutionError
from scipy.stats import beta

from exercises import FOLDER, exercise_function, exercise_names, learner_text, stub_source
from lessons import RunUnflagged
from notebooks import cell_flags, notebook_paths, read_notebook
from rlhf_course.checks import FAILED_CHECKS, HINT_AFTER, _Outcome, _recognise, check, exercise_folder, find_hint, use_solution
from rlhf_course.doctor import copy_lessons
from rlhf_course.exercise_bank import EXERCISES

LESSONS = [path for path in notebook_paths() if exercise_names(read_notebook(path))]
CELLS = {exercise_function(cell.source).name: (path, nb, index) for path in LESSONS for nb in [read_notebook(path)]
         for index, cell in enumerate(nb.cells) if "exercise" in cell_flags(cell)}  # fmt: skip
MISTAKES = [(name, mistake, wrong) for name, exercise in EXERCISES.items() for mistake, wrong in exercise.wrong]
SENTENCES = re.compile(r"[A-Z].*[.]")

each_exercise = pytest.mark.parametrize("name", EXERCISES)
each_mistake = pytest.mark.parametrize(("name", "mistake", "wrong"), MISTAKES, ids=lambda value: str(value)[:40])
each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def fresh_session():
    """No failed check is remembered from another test."""
    FAILED_CHECKS.clear()


def named(name, function):
    """`function` under the name that the exercise asks for, as a function of its own."""

    def stand_in(*args, **kwargs):
        return function(*args, **kwargs)

    stand_in.__name__ = name
    return stand_in


# Right answers, written in another way than the solution: plain loops and other formulas.


def rao_kupper_by_rows(margins, tie_margin=0.0):
    """Numbers one at a time; the tie by its closed form (theta^2 - 1) P(a) P(b)."""
    rows = []
    for d in np.asarray(margins).tolist():
        a, b = (0.5 * (1 + math.tanh((sign * d - tie_margin) / 2)) for sign in (1, -1))
        rows.append([a, b, (math.exp(tie_margin) ** 2 - 1) * a * b])
    return np.array(rows)


def bayes_accuracy_by_rows(probabilities):
    """A running sum."""
    right = decided = 0.0
    for a, b, _ in probabilities:
        right, decided = right + (a if a > b else b), decided + a + b
    return right / decided


def bayes_log_loss_by_rows(probabilities):
    """Sum of p log(p / q) over sides that can win."""
    total = sum(p * math.log((a + b) / p) for a, b, _ in probabilities for p in (a, b) if p > 0)
    return total / sum(a + b for a, b, _ in probabilities)


def token_logprobs_by_rows(logits, input_ids, temperature=1.0):
    """One token at a time."""
    return torch.stack([torch.stack([logits[b, t - 1, input_ids[b, t]] / temperature - (logits[b, t - 1] / temperature).logsumexp(0)
                                     for t in range(1, input_ids.shape[1])]) for b in range(len(input_ids))])  # fmt: skip


def position_ids_by_rows(attention_mask):
    """A counter; pads after the last token get 0."""
    positions = torch.zeros(attention_mask.shape, dtype=torch.long)
    for b, row in enumerate(attention_mask):
        first = int(row.long().argmax())
        for t in range(first, len(row)):
            positions[b, t] = t - first if row[t] else 0
    return positions


def low_rank_update_by_entries(A, B, alpha):
    """One entry at a time."""
    r = A.shape[0]
    return torch.stack([torch.stack([sum(B[i, k] * A[k, j] for k in range(r)) * alpha / r for j in range(A.shape[1])]) for i in range(B.shape[0])])


def lora_parameter_count_by_zeros(shapes, r):
    """Counted on real matrices."""
    return sum(np.zeros((d_out, r)).size + np.zeros((r, d_in)).size for d_out, d_in in shapes)


def merged_weight_by_products(weight, A, B, scale, transposed=False):
    """What the layer does to each unit vector, with its adapter beside it."""
    W = weight.T if transposed else weight
    columns = [W @ unit + scale * (B @ (A @ unit)) for unit in torch.eye(A.shape[1])]
    return torch.stack(columns, 0 if transposed else 1)


def best_low_rank_by_eigenvectors(change, r):
    """The largest eigenvectors of the Gram matrix; the factors divide the singular values evenly."""
    values, vectors = torch.linalg.eigh(change.T @ change)
    V, S = vectors[:, -r:], values[-r:].clamp(min=0).sqrt()
    return change @ V / S.sqrt(), S.sqrt()[:, None] * V.T


def binomial_interval_by_beta(k, n, confidence=0.95):
    """Quantiles of the beta distribution, by scipy."""
    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, k, n - k + 1)) if k else 0.0
    return low, float(beta.ppf(1 - tail, k + 1, n - k)) if k < n else 1.0


def self_agreement_by_rows(first, again):
    """A set of the pairs of answers that agree."""
    agreeing = [pair for pair in zip(first, again) if pair in {("a", "b"), ("b", "a"), ("tie", "tie")}]
    return len(agreeing), max(len(first), len(again))


def shared_prompt_by_lengths(messages_a, messages_b):
    """From the longest beginning down."""
    for n in range(min(len(messages_a), len(messages_b)), 0, -1):
        if messages_a[:n] == messages_b[:n] and messages_a[n - 1]["role"] == "user":
            return messages_a[:n]
    return []


def split_transcript_by_blocks(text):
    """Paragraph by paragraph; one that names no speaker belongs to the turn before."""
    messages, roles = [], {"Human": "user", "Assistant": "assistant"}
    for block in text.lstrip().split("\n\n"):
        speaker, colon, content = block.partition(":")
        if colon and speaker in roles:
            messages.append({"role": roles[speaker], "content": content[1:] if content[:1] == " " else content})
        elif not messages:
            return []
        else:
            messages[-1]["content"] += "\n\n" + block
    return messages


def bradley_terry_log_likelihood_by_pairs(strengths, wins):
    """One pair at a time, through log(1 + e^d)."""
    total = 0.0
    for i, j in np.ndindex(*np.shape(wins)):
        d = float(strengths[j] - strengths[i])
        total -= 0.0 if i == j else float(wins[i][j]) * (max(d, 0.0) + math.log1p(math.exp(-abs(d))))
    return total


def bradley_terry_gradient_by_pairs(strengths, wins):
    """Each win of i over j moves i up and j down by the probability that it would not have happened."""
    strengths, wins = np.asarray(strengths, dtype=float), np.asarray(wins, dtype=float)
    slopes = np.zeros(strengths.shape)
    for *lead, i, j in np.ndindex(*wins.shape):
        upset = 0.5 * (1 - math.tanh((strengths[*lead, i] - strengths[*lead, j]) / 2))
        if i != j:
            slopes[*lead, i] += wins[*lead, i, j] * upset
            slopes[*lead, j] -= wins[*lead, i, j] * upset
    return slopes


def count_longer_wins_by_rows(lengths_a, lengths_b, winners):
    """The signs of length and of winner, multiplied: 1 where they agree, 0 where the row has no say."""
    signs = [int(np.sign(int(a) - int(b))) * {"a": 1, "b": -1, "tie": 0}[winner] for a, b, winner in zip(lengths_a, lengths_b, winners)]
    return signs.count(1), len(signs) - signs.count(0)


def prompt_folds_by_rows(prompts, n_folds):
    """Always the largest prompt that is left, found by looking at all."""
    fold_of, left = {}, list(dict.fromkeys(prompts))
    while left:
        largest = max(left, key=lambda prompt: (prompts.count(prompt), -prompts.index(prompt)))
        filled = [sum(fold_of.get(prompt) == fold for prompt in prompts) for fold in range(n_folds)]
        fold_of[largest] = int(np.argmin(filled))
        left.remove(largest)
    return np.array([fold_of[prompt] for prompt in prompts])


def pad_batch_by_rows(sequences, pad_token_id, padding_side="right", pad_to_multiple_of=None):
    """Lists of lists."""
    width = max(len(sequence) for sequence in sequences)
    while pad_to_multiple_of and width % pad_to_multiple_of:
        width += 1
    ids, mask = [], []
    for sequence in sequences:
        tokens, n = list(sequence), width - len(sequence)
        ids.append(tokens + n * [pad_token_id] if padding_side == "right" else n * [pad_token_id] + tokens)
        mask.append(len(tokens) * [1] + n * [0] if padding_side == "right" else n * [0] + len(tokens) * [1])
    return torch.tensor(ids), torch.tensor(mask)


def padding_fraction_by_pads(lengths, batches):
    """One pad at a time."""
    pads = places = 0
    for batch in batches:
        each = [n for row in batch for n in np.atleast_1d(lengths[row]).tolist()]
        pads, places = pads + sum(max(each) - n for n in each), places + len(each) * max(each)
    return pads / places


def optimal_sizes_by_trying(longest, batch_size):
    """Every list of sizes."""
    n = -(-len(longest) // batch_size)
    options = [sizes for sizes in itertools.product(range(1, batch_size + 1), repeat=n) if sum(sizes) == len(longest)]
    return list(min(options, key=lambda sizes: sum(s * longest[sum(sizes[:k])] for k, s in enumerate(sizes))))


def token_budget_batches_by_sizes(lengths, max_tokens):
    """How many rows fit is a division."""
    table = np.asarray(lengths).reshape(len(lengths), -1)
    rows, batches = sorted(range(len(table)), key=lambda row: (-table[row].max(), row)), []
    while rows:
        size = max_tokens // int(table[rows[0]].max() * table.shape[1])
        batches, rows = [*batches, rows[:size]], rows[size:]
    return batches


def layer_activations_by_tensors(shape, batch_size, length, fused=True, padded=False, activation_bytes=4):
    """A list of shapes and sizes."""
    B, T, D, H, a = batch_size, length, shape.hidden_size, shape.n_heads, activation_bytes
    kv = D // H * shape.n_kv_heads if fused and not padded else D
    linear = 2 * [(D, 4), (D, a), (D, a), (1, 4)] + [(D, a), (kv, a), (kv, a), (D, a)] + 4 * [(shape.intermediate_size, a)]
    tables = ([(1, a)] if padded else []) if fused else [(H, 4)] + ([(H, a)] if a != 4 else [])
    linear += [(H, 4)] if fused else []
    return sum(B * T * width * size for width, size in linear), sum(B * T * T * n * size for n, size in tables)


def absmax_int8_by_rows(x, per_row=False):
    """One row at a time, with Python's own numbers where a scale is needed."""
    scales = [row.abs().max() / 127 for row in x] if per_row else [x.abs().max() / 127] * len(x)
    codes = [row / scale if scale > 0 else torch.zeros_like(row) for row, scale in zip(x, scales)]
    return torch.stack(codes).round().to(torch.int8), torch.stack(scales)[:, None] if per_row else scales[0]


def blockwise_absmax_by_slices(x, block_size):
    """One block at a time."""
    flat = x.flatten()
    return torch.tensor([flat[i : i + block_size].abs().max() for i in range(0, len(flat), block_size)], dtype=x.dtype)


def nearest_level_by_distance(x, levels):
    """A table of all distances."""
    return (x[..., None] - levels).abs().argmin(-1)


def bits_per_weight_by_totals(bits, block_size, double_block_size=None):
    """All bits of one block of blocks, divided by its weights."""
    n_scales = double_block_size or 1
    scale_bits = 32 if double_block_size is None else 8 * n_scales + 32
    return (bits * block_size * n_scales + scale_bits) / (block_size * n_scales)


def common_prefix_by_slices(sequences):
    """The longest slice that all begin with, tried from the longest possible."""
    for length in range(min(map(len, sequences)) - 1, -1, -1):
        if len({tuple(ids[:length]) for ids in sequences}) == 1:
            return length
    raise AssertionError("the empty slice is common to all")


def length_groups_by_shortest(lengths, ratio=2.0):
    """Take the shortest row that is left, and all that may stand with it."""
    left, groups = list(range(len(lengths))), []
    while left:
        shortest = min(lengths[row] for row in left)
        group = [row for row in left if lengths[row] <= ratio * shortest]
        groups.append(sorted(group, key=lambda row: (lengths[row], row)))
        left = [row for row in left if row not in group]
    return groups


def reward_accuracy_by_rows(margins, labels):
    """One point a row that is right, half a point where the scores are equal."""
    points = [0.5 if margin == 0 else float((margin > 0) == (label == 0)) for margin, label in zip(margins.tolist(), labels.tolist()) if label != 2]
    return sum(points) / len(points) if points else math.nan


def expected_calibration_error_by_rows(predicted, happened, n_bins=10):
    """Sums of predictions and of outcomes, in runs of the sorted list."""
    rows = sorted(zip(predicted.tolist(), happened.tolist()), key=lambda row: row[0])
    size, rest, start, total = len(rows) // n_bins, len(rows) % n_bins, 0, 0.0
    for number in range(n_bins):
        run = rows[start : start + size + (number < rest)]
        start += len(run)
        total += abs(sum(p for p, _ in run) - sum(y for _, y in run))
    return total / len(rows)


def last_token_index_by_rows(attention_mask):
    """The place of the last one in each row's list."""
    columns = []
    for row in attention_mask.long().tolist():
        ones = [column for column, value in enumerate(row) if value]
        if not ones:
            raise ValueError("a row is all padding")
        columns.append(ones[-1])
    return torch.tensor(columns)


def bradley_terry_loss_by_rows(scores_a, scores_b, labels, margin=0.0, label_smoothing=0.0):
    """binary_cross_entropy_with_logits, one row at a time."""
    losses = []
    for a, b, label in zip(scores_a, scores_b, labels.tolist()):
        logit = a - b + {0: -margin, 1: margin, 2: 0.0}[label]
        target = {0: 1 - label_smoothing / 2, 1: label_smoothing / 2, 2: 0.5}[label]
        losses.append(torch.nn.functional.binary_cross_entropy_with_logits(logit, torch.tensor(target, dtype=logit.dtype)))
    return torch.stack(losses).mean()


def classifier_logits_by_rows(hidden, attention_mask, weight):
    """The last of the real states of each row."""
    return torch.stack([weight @ states[mask.bool()][-1] if mask.all() or mask.any() else None for states, mask in zip(hidden, attention_mask)])


def position_bias_by_rows(margins, swapped_margins):
    """Sums and counts, pair by pair."""
    pairs = list(zip(margins.tolist(), swapped_margins.tolist()))
    twice = sum((one > 0 and other > 0) or (one < 0 and other < 0) for one, other in pairs)
    return {"lean": sum(one + other for one, other in pairs) / 2 / len(pairs), "contradictions": twice / len(pairs)}


def worth_of_a_word_by_normal_equations(scores, utilities, words, groups):
    """Means by a table of groups, slopes from the normal equations."""
    member = torch.nn.functional.one_hot(groups).double()
    centred = [x.double() - member @ ((member.T @ x.double()) / member.sum(0)) for x in (scores, utilities, words)]
    design = torch.stack(centred[1:], 1)
    slopes = torch.linalg.solve(design.T @ design, design.T @ centred[0])
    return (slopes[1] / slopes[0]).item()


ANOTHER_WAY = {"rao_kupper": rao_kupper_by_rows, "bayes_accuracy": bayes_accuracy_by_rows, "bayes_log_loss": bayes_log_loss_by_rows,
               "token_logprobs": token_logprobs_by_rows, "position_ids": position_ids_by_rows,
               "low_rank_update": low_rank_update_by_entries, "lora_parameter_count": lora_parameter_count_by_zeros,
               "merged_weight": merged_weight_by_products, "best_low_rank": best_low_rank_by_eigenvectors,
               "binomial_interval": binomial_interval_by_beta, "self_agreement": self_agreement_by_rows,
               "shared_prompt": shared_prompt_by_lengths, "split_transcript": split_transcript_by_blocks,
               "bradley_terry_log_likelihood": bradley_terry_log_likelihood_by_pairs, "bradley_terry_gradient": bradley_terry_gradient_by_pairs,
               "count_longer_wins": count_longer_wins_by_rows, "prompt_folds": prompt_folds_by_rows,
               "pad_batch": pad_batch_by_rows, "padding_fraction": padding_fraction_by_pads, "optimal_sizes": optimal_sizes_by_trying,
               "token_budget_batches": token_budget_batches_by_sizes, "layer_activations": layer_activations_by_tensors,
               "reward_accuracy": reward_accuracy_by_rows, "expected_calibration_error": expected_calibration_error_by_rows,
               "last_token_index": last_token_index_by_rows, "bradley_terry_loss": bradley_terry_loss_by_rows,
               "classifier_logits": classifier_logits_by_rows, "position_bias": position_bias_by_rows, "worth_of_a_word": worth_of_a_word_by_normal_equations,
               "common_prefix": common_prefix_by_slices, "length_groups": length_groups_by_shortest,
               "absmax_int8": absmax_int8_by_rows, "blockwise_absmax": blockwise_absmax_by_slices,
               "nearest_level": nearest_level_by_distance, "bits_per_weight": bits_per_weight_by_totals,
               **right_answers_ppo.ANOTHER_WAY, **right_answers_rlhf.ANOTHER_WAY}  # fmt: skip


# The bank.


def test_bank_and_lessons_hold_the_same_exercises():
    """Every flagged function has an entry, and every entry a flagged function in the module it names."""
    modules = {name: f"rlhf_course.{re.sub(r'^[0-9]+[a-z]*_', '', path.stem)}:{name}" for name, (path, _, _) in CELLS.items()}
    assert modules == {name: exercise.solution for name, exercise in EXERCISES.items()}
    assert len(CELLS) >= 3


@each_exercise
def test_right_answers_pass(name):
    """The solution, and a right answer that shares no code with it."""
    exercise = EXERCISES[name]
    for function in (exercise.load(), named(name, ANOTHER_WAY[name])):
        result = check(function)
        assert result.passed and result.mistake is None, result
        assert result.n_probes == len(exercise.probes()) >= 3 and f"all {result.n_probes} probes" in result.message


@each_mistake
def test_wrong_answers_are_named(name, mistake, wrong):
    """Each is rejected, with its own sentence and not another's, in one line."""
    result = check(named(name, wrong))
    assert not result.passed and result.mistake == mistake
    assert mistake in result.message and "\n" not in result.message
    assert SENTENCES.fullmatch(mistake)


@each_exercise
def test_bank_entry_is_sound(name):
    """At least three different mistakes; the same probes each time; no probe is there twice."""
    exercise = EXERCISES[name]
    assert len({mistake for mistake, _ in exercise.wrong}) >= 3
    probes = [repr(probe) for probe in exercise.probes()]
    assert probes == [repr(probe) for probe in exercise.probes()] and len(set(probes)) == len(probes)


# The learner's page.


@each_exercise
def test_exercise_is_laid_out_as_agreed(name):
    """Markdown with a title, a time and a folded hint before it; the check right below it."""
    path, nb, index = CELLS[name]
    above, below = nb.cells[index - 1], nb.cells[index + 1]
    assert above.cell_type == "markdown" and above.source.startswith("### Exercise: "), path
    assert re.search(r"\n\nAbout \d+ minutes\. ", above.source) and name in above.source, path
    assert above.source.count("<details><summary>Hint</summary>") == above.source.count("</details>") == 1, path
    assert below.cell_type == "code" and below.source == f"check({name})", path
    shown = ["".join(output.data["text/plain"]) for output in below.outputs]
    assert shown == [check(EXERCISES[name].load()).message], f"run `make lessons NB=nbs/{path.name}`"
    assert find_hint(name) and find_hint(name) in html.unescape(re.sub("</?code>", "`", " ".join(above.source.split())))


@each_exercise
def test_stub_fails_kindly(name):
    """It compiles with the signature and docstring of the solution, nothing else of it, and is not counted as a failure."""
    path, nb, index = CELLS[name]
    solution = EXERCISES[name].load()
    space = dict(vars(sys.modules[solution.__module__]))
    [stub] = [cell.source for cell in json_cells(FOLDER / path.name) if f"def {name}(" in cell.source]
    future = solution.__code__.co_flags & __future__.annotations.compiler_flag  # as the first cell of the lesson sets it
    exec(compile(stub, name, "exec", future, dont_inherit=True), space)
    written = space[name]
    assert written.__doc__ == solution.__doc__ and written.__annotations__ == solution.__annotations__
    assert [type(node) for node in ast.parse(stub).body[0].body] == [ast.Expr, ast.Raise]
    with pytest.raises(NotImplementedError, match=rf"Exercise {name}: "):
        args, kwargs = EXERCISES[name].probes()[0]
        written(*args, **kwargs)
    for _ in range(HINT_AFTER + 1):
        result = check(written)
    assert not result.passed and result.mistake is None and "not written yet" in result.message
    assert "\n" not in result.message and FAILED_CHECKS[name] == 0


def json_cells(path):
    """The cells of a notebook."""
    return read_notebook(path).cells


def test_stub_keeps_decorators_and_refuses_what_it_cannot_blank():
    """A body that would survive, or a cell with a second definition, is an error and not a leak."""
    source = '@torch.no_grad()\ndef f(\n    x: int, # a number\n) -> int: # another\n    """One.\n\n    Two."""\n    # secret\n    return x\n'
    assert stub_source(source).startswith(source[: source.index("    # secret")]) and "secret" not in stub_source(source)
    for bad in ('def f(x): "Doc."; return x', "def f(x):\n    return x", "a = 1", 'def f():\n    "Doc."\ndef g():\n    "Doc."',
                'def f(x):\n    "Doc."; return x'):
        with pytest.raises(ValueError):
            stub_source(bad)


# The checks cannot be fooled.


def failed(name, function):
    """The message of a check that should fail, and name no mistake of the bank."""
    result = check(named(name, function))
    assert not result.passed and result.mistake is None, result
    return result.message


def test_changed_input_is_noticed():
    """The values are right, and the learner's caller would be surprised."""

    def in_place(logits, input_ids, temperature=1.0):
        logits /= temperature
        return token_logprobs_by_rows(logits, input_ids)

    assert "changed `logits` in place" in failed("token_logprobs", in_place)


def test_right_values_of_the_wrong_kind_are_told_apart():
    """List for array, float32 for float64, float for long, tensor for number, shape with a 1 in it."""
    right = {name: EXERCISES[name].load() for name in EXERCISES}
    cases = [("rao_kupper", lambda *args: right["rao_kupper"](*args).tolist(), "numpy array"),
             ("rao_kupper", lambda *args: right["rao_kupper"](*args).astype(np.float32), "dtype float64"),
             ("rao_kupper", lambda *args: right["rao_kupper"](*args)[None], "shape (3, 3), got (1, 3, 3)"),
             ("bayes_accuracy", lambda *args: torch.tensor(right["bayes_accuracy"](*args)), ".item()"),
             ("bayes_accuracy", lambda *args: print(end=""), "`return` missing"),
             ("position_ids", lambda *args: right["position_ids"](*args).float(), "dtype torch.int64"),
             ("token_logprobs", lambda *args: right["token_logprobs"](*args).double(), "dtype torch.float32")]  # fmt: skip
    for name, function, said in cases:
        assert said in failed(name, function)


def test_mistake_is_named_behind_a_wrong_kind():
    """The swapped columns of rao_kupper, as lists."""
    mistake, wrong = EXERCISES["rao_kupper"].wrong[0]
    assert check(named("rao_kupper", lambda *args: wrong(*args).tolist())).mistake == mistake


def test_mistake_is_named_beside_another():
    """Swapped columns that also fail on a list or overflow."""
    mistake, wrong = EXERCISES["rao_kupper"].wrong[0]

    def swapped_without_lists(margins, tie_margin=0.0):
        return wrong(-(-margins), tie_margin)

    def swapped_and_overflows(margins, tie_margin=0.0):
        d = np.asarray(margins)
        a, b = (np.exp(x) / (np.exp(x) + np.exp(tie_margin)) for x in (-d, d))
        return np.stack([a, b, 1 - a - b], -1)

    for function in (swapped_without_lists, swapped_and_overflows):
        assert check(named("rao_kupper", function)).mistake == mistake
    assert "got nan (it comes of" in failed("bayes_accuracy", lambda probabilities: math.nan)


def test_no_mistake_is_named_where_it_is_not_certain():
    """On too few probes, where what is left fits two mistakes, and where what is left is right."""
    right, got = [_Outcome(value) for value in (1.0, 2.0, 3.0)], [_Outcome(5.0), _Outcome(6.0), _Outcome(error=ValueError())]
    one, two = ("One.", [_Outcome(5.0), _Outcome(6.0), _Outcome(7.0)]), ("Two.", [_Outcome(5.0), _Outcome(6.0), _Outcome(8.0)])
    assert _recognise(right, got, [one], 0, 0) == "One."
    assert _recognise(right, got, [one, two], 0, 0) is None
    assert _recognise(right, [got[0], got[2], got[2]], [one], 0, 0) is None
    assert _recognise(right, [*right[:2], got[2]], [("Late.", [*right[:2], _Outcome(9.0)])], 0, 0) is None


def moved(value):
    """A result whose numbers, in a list the first one, are too large by one and by themselves."""
    if isinstance(value, torch.Tensor) and not value.numel():
        return value.new_ones(1)
    if isinstance(value, torch.Tensor) and value.isnan().all() or isinstance(value, float) and math.isnan(value):
        return torch.full_like(value, 0.5) if isinstance(value, torch.Tensor) else 0.5
    return type(value)([moved(value[0]), *value[1:]]) if isinstance(value, list | tuple) else value + abs(value) + 1


def test_right_on_all_probes_but_one_is_wrong():
    """A function that is right on all probes but one is wrong, whichever one it is."""
    for name, exercise in EXERCISES.items():
        signature = inspect.signature(exercise.load())

        def written(args, kwargs, signature=signature):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return repr(bound.arguments).replace(", requires_grad=True", "")

        calls = [written(*probe) for probe in exercise.probes()]
        for lucky in dict.fromkeys(calls):

            def almost(*args, exercise=exercise, lucky=lucky, written=written, **kwargs):
                spoilt = written(args, kwargs) == lucky
                try:
                    value = exercise.load()(*args, **kwargs)
                except ValueError:  # what is right on this probe is to refuse it
                    if spoilt:
                        return 0
                    raise
                return moved(value) if spoilt else value

            result = check(named(name, almost))
            assert not result.passed and f"wrong on {calls.count(lucky)} of {len(calls)} probes" in result.message


def test_wrong_gradient_is_noticed():
    """The values are right and half of the gradient is lost."""

    def half(logits, input_ids, temperature=1.0):
        right = token_logprobs_by_rows(logits, input_ids, temperature)
        return 0.5 * right + 0.5 * right.detach()

    assert "gradient with respect to logits" in failed("token_logprobs", half)
    by_numpy = named("token_logprobs", lambda *args: torch.tensor(token_logprobs_by_rows(*args).numpy()))
    assert "no gradient flows" in check(by_numpy).message


def test_errors_are_reported_with_probe_and_line():
    """Also NotImplementedError when it does not come from the stub."""

    def divides(probabilities):
        return 1 / 0

    divides.__name__ = "bayes_accuracy"
    message = check(divides).message
    assert "ZeroDivisionError" in message and "`return 1 / 0`" in message and "probabilities=array(" in message

    def unsupported(probabilities):
        raise NotImplementedError("no kernel for this dtype")

    assert "no kernel for this dtype" in failed("bayes_accuracy", unsupported)
    assert "TypeError" in failed("bayes_accuracy", lambda: 0.5)


def test_interrupt_goes_through():
    """Ctrl-C in a learner's endless loop is not an answer."""

    def interrupted(probabilities):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(named("bayes_accuracy", interrupted))


def test_hint_and_solution_unfold():
    """The hint at the third failure, the solution when asked for, and a right answer starts the count again."""
    wrong = named("bayes_accuracy", lambda probabilities: 0.0)
    messages = [check(wrong).message for _ in range(HINT_AFTER + 1)]
    hint = find_hint("bayes_accuracy")
    assert [hint in message for message in messages] == [False, False, True, True]
    assert not any("def bayes_accuracy" in message for message in messages)
    assert "def bayes_accuracy" in check(wrong, show_solution=True).message
    assert check(named("bayes_accuracy", bayes_accuracy_by_rows)).passed
    assert hint not in check(wrong).message


def test_use_solution_reaches_the_caller(capsys):
    """The name in the namespace of the calling cell is the package's function."""
    space = {"use_solution": use_solution, "__name__": "__main__"}
    exec("def rao_kupper(margins): raise NotImplementedError\ndef later(): return rao_kupper([0.0])\nuse_solution('rao_kupper')", space)
    assert space["rao_kupper"] is EXERCISES["rao_kupper"].load() and space["later"]().tolist() == [[0.5, 0.5, 0.0]]
    assert "rao_kupper is now the course's own" in capsys.readouterr().out
    with pytest.raises(ValueError, match="one of the exercises"):
        use_solution("no_such_exercise")


def test_importing_checks_loads_neither_torch_nor_numpy():
    """The command line uses them and answers at once."""
    code = "import sys, rlhf_course.doctor; print(*{'torch', 'numpy', 'rlhf_course.exercise_bank'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


# The learner's notebooks.


def test_learners_notebooks_are_up_to_date():
    """Each is byte for byte what the lesson gives, twice; there is no other file."""
    for path in LESSONS:
        assert (FOLDER / path.name).read_bytes() == learner_text(path).encode() == learner_text(path).encode(), "run `make export`"
    assert sorted(path.name for path in FOLDER.iterdir() if not path.name.startswith(".")) == sorted(path.name for path in LESSONS)
    assert exercise_folder() == FOLDER


@each_lesson
def test_learners_notebook_is_the_lesson_without_its_answers(path):
    """Same cells in order; no output from the first exercise on; no directive of nbdev; no line of a solution."""
    lesson, learner = read_notebook(path), read_notebook(FOLDER / path.name)
    ids = [cell.id for cell in learner.cells]
    expected = [cell.id for cell in lesson.cells if cell.source.strip() != f"#| default_exp {re.sub('^[0-9]+[a-z]*_', '', path.stem)}"]
    assert [one for one in ids if one != "your-copy"] == expected
    names, sources = exercise_names(lesson), [cell.source for cell in learner.cells]
    first = next(i for i, source in enumerate(sources) if "raise NotImplementedError" in source)
    given = {cell.id: bool(cell.get("outputs")) for cell in lesson.cells}
    assert not any(cell.get("outputs") for cell in learner.cells[first:])
    assert all(bool(cell.get("outputs")) == given.get(cell.id, False) for cell in learner.cells[:first])
    assert not any("#| export" in source or "#| exercise" in source or "#| default_exp" in source for source in sources)
    assert sum("raise NotImplementedError(" in source for source in sources) == len(names)
    kept = {line.strip() for cell in lesson.cells if "exercise" not in cell_flags(cell) for line in cell.source.split("\n")}
    for cell in lesson.cells:
        if "exercise" in cell_flags(cell):
            body = exercise_function(cell.source).body[1:]
            lines = {line.strip() for line in cell.source.split("\n")[body[0].lineno - 1 :]} - kept - {""}
            assert lines and not [line for line in lines if any(line in source for source in sources)]


def test_stale_learners_notebooks_are_replaced_and_removed(tmp_path):
    """A touched copy is written anew, one without a lesson goes."""
    copy = copy_tree(tmp_path)
    name = LESSONS[0].name
    (copy / "exercises" / name).write_text("{}", encoding="utf-8")
    (copy / "exercises" / "77_gone.ipynb").write_text("{}", encoding="utf-8")
    subprocess.run([sys.executable, "tools/exercises.py"], cwd=copy, check=True)
    assert (copy / "exercises" / name).read_bytes() == (FOLDER / name).read_bytes()
    assert not (copy / "exercises" / "77_gone.ipynb").exists()


def test_copying_lessons_leaves_a_learners_work(tmp_path):
    """Three calls: all copied, all there, one of them worked in; a dangling link is not written through."""
    names = tuple(path.name for path in LESSONS)
    assert copy_lessons(tmp_path).copied == names and copy_lessons(tmp_path).same == names
    (tmp_path / names[0]).write_text("mine", encoding="utf-8")
    (tmp_path / names[-1]).unlink()
    (tmp_path / names[-1]).symlink_to(tmp_path / "elsewhere")
    report = copy_lessons(tmp_path)
    assert report.copied == () and set(report.kept) == {names[0], names[-1]} and names[0] in str(report)
    assert (tmp_path / names[0]).read_text(encoding="utf-8") == "mine" and not (tmp_path / "elsewhere").exists()


@pytest.mark.long
@each_lesson
def test_learners_notebook_runs_with_the_solutions_put_in(path, tmp_path, monkeypatch):
    """As a learner who is stuck everywhere would do it: `use_solution` in a cell below each stub. Without it, it stops."""
    nb = read_notebook(FOLDER / path.name)
    names = exercise_names(read_notebook(path))
    for cell in nb.cells:
        for name in names:
            if cell.cell_type == "code" and cell.source == f"check({name})":
                cell.source = f"from rlhf_course.checks import use_solution\nuse_solution({name!r})\nassert check({name}).passed"
    run(nb, tmp_path, monkeypatch)


@pytest.mark.long
def test_learners_notebook_stops_at_the_first_stub(tmp_path, monkeypatch):
    """The check itself lets "run all" go on; the first cell that needs the function says what is missing."""
    path = LESSONS[0]
    first = exercise_names(read_notebook(path))[0]
    with pytest.raises(CellExecutionError, match=f"Exercise {first}: write the body"):
        run(read_notebook(FOLDER / path.name), tmp_path, monkeypatch)


def run(nb, folder, monkeypatch):
    """Run the unflagged cells of a notebook in a folder that holds nothing."""
    monkeypatch.setenv("IPYTHONDIR", str(folder / ".ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(folder / ".jupyter"))
    (folder / "empty").mkdir()
    RunUnflagged(timeout=None, store_widget_state=False).preprocess(nb, {"metadata": {"path": str(folder / "empty")}})
