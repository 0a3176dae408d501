"""Preferences: what must hold for any comparisons, and what bad ones are told."""

import difflib
import itertools
import math

import numpy as np
import pytest
from datasets import Dataset, disable_progress_bars
from hypothesis import given, settings
from hypothesis import strategies as st
from rlhf_course.preferences import (TOKEN_COUNTS, bag_overlap, count_agreements, count_longer_wins, count_tokens, count_wins, describe,
                                     filter_long, fit_bradley_terry, leaderboard, prompt_folds, rate_of, shared_prefix, shuffle_sides,
                                     sort_longest_first, split_by_prompt, win_probabilities)
from rlhf_course.tiny_arena import Labeler, sample_comparisons, tiny_arena
from rlhf_course.tiny_lm import arena_words, build_tokenizer
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

disable_progress_bars()
few_examples = settings(max_examples=25, deadline=None, derandomize=True)

WORDS = st.lists(st.sampled_from("boil water . add leaves wait tea".split()), min_size=1, max_size=12).map(" ".join)
ROWS = st.lists(st.fixed_dictionaries({
    "prompt": st.sampled_from(["tea ?", "egg ?", "rice and more rice ?"]), "response_a": WORDS, "response_b": WORDS,
    "winner": st.sampled_from(["a", "b", "tie"]), "model_a": st.sampled_from("owl crow robin".split()),
    "model_b": st.sampled_from("owl crow robin".split())}), min_size=1, max_size=30)  # fmt: skip
WINS = st.integers(2, 5).flatmap(lambda m: st.lists(st.integers(0, 9), min_size=m * m, max_size=m * m).map(lambda w: np.array(w).reshape(m, m)))


@pytest.fixture(scope="module")
def tokenizer():
    """A word a token."""
    return build_tokenizer(arena_words(tiny_arena()))


def data_of(rows):
    """Rows as a data set."""
    return Dataset.from_list(rows)


def row(winner="a", a="boil water .", b="wait .", prompt="tea ?", **more):
    """One comparison."""
    return {"prompt": prompt, "response_a": a, "response_b": b, "winner": winner, "model_a": "owl", "model_b": "crow", **more}


def data_of_wins(wins):
    """One row for each win of i over j."""
    return data_of([row(model_a=f"m{i}", model_b=f"m{j}") for i, j in np.ndindex(*wins.shape) for _ in range(wins[i, j])])


def message_of(function, *args, **kwargs):
    """The one line of the ValueError that a call raises."""
    with pytest.raises(ValueError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def arena(n=400, seed=0, **labeler):
    """Comparisons of the Tiny Arena."""
    return data_of(sample_comparisons(tiny_arena(), n, Labeler(**labeler), seed=seed))


# Bradley-Terry.


def has_optimum(wins):
    """Ford's condition by brute force: no group of models never lost to the rest."""
    models = range(len(wins))
    groups = itertools.chain.from_iterable(itertools.combinations(models, k) for k in range(1, len(wins)))
    return all(any(wins[j, i] for i in group for j in models if j not in group) for group in groups)


@few_examples
@given(WINS)
def test_fit_is_the_optimum_or_says_why_there_is_none(wins):
    """Everybody wins as often as expected; where a group never lost, or never met the rest, the error names models."""
    wins = wins * (1 - np.eye(len(wins), dtype=int))
    present = (wins + wins.T).any(1)
    wins = wins[present][:, present]
    if len(wins) == 0:
        return
    data = data_of_wins(wins)
    if not has_optimum(wins):
        assert "['m" in message_of(fit_bradley_terry, data)
        return
    strengths = fit_bradley_terry(data)
    s = np.array([strengths[f"m{i}"] for i in range(len(wins))])
    expected = ((wins + wins.T) / (1 + np.exp(s[None, :] - s[:, None]))).sum(1)
    np.testing.assert_allclose(expected, wins.sum(1), atol=1e-6)
    assert abs(s.sum()) < 1e-9 and list(strengths.values()) == sorted(strengths.values(), reverse=True)


@pytest.mark.parametrize("seed", range(3))
def test_fit_equals_logistic_regression_row_by_row(seed):
    """Rows with ties, each tie once for either side at half the weight; sides turned and rows shuffled change nothing."""
    data = arena(3000, seed, tie_margin=0.4, temperature=0.5)
    fitted = fit_bradley_terry(data)
    names = sorted(fitted)
    design, won, weights = [], [], []
    for r in data:
        x = np.eye(len(names))[names.index(r["model_a"])] - np.eye(len(names))[names.index(r["model_b"])]
        for y in {"a": [1], "b": [0], "tie": [1, 0]}[r["winner"]]:
            design.append(x)
            won.append(y)
            weights.append(0.5 if r["winner"] == "tie" else 1.0)
    model = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-12, max_iter=10_000).fit(design, won, sample_weight=weights)
    optimum = model.coef_[0] - model.coef_[0].mean()
    np.testing.assert_allclose([fitted[name] for name in names], optimum, atol=1e-4)
    again = fit_bradley_terry(shuffle_sides(data, seed=5).shuffle(seed=6))
    np.testing.assert_allclose([again[name] for name in names], [fitted[name] for name in names], atol=1e-9)


def test_fit_far_from_equal():
    """One win in a million: far from the start, where a full Newton step would jump out of range."""
    wins = np.array([[0, 10**6, 0], [1, 0, 10**6], [0, 1, 0]])
    names = ["x", "y", "z"]
    from rlhf_course.preferences import _newton

    s = _newton(wins.astype(float))
    np.testing.assert_allclose(np.diff(s), -math.log(10**6), rtol=1e-6)
    assert len(s) == len(names)


def test_models_that_are_not_there():
    """No column, no name, an unknown winner, one model alone, no row."""
    assert "`model_a` should be a column" in message_of(fit_bradley_terry, arena(10).remove_columns("model_a"))
    unnamed = data_of([row(), row(model_b=None)])
    assert "`model_b` should be the name of a model in every row, got None in row 2" in message_of(fit_bradley_terry, unnamed)
    assert "got 'A' in row 1" in message_of(count_wins, data_of([row("A")]))
    assert "at least 2 models, got 1" in message_of(fit_bradley_terry, data_of([row(model_b="owl")]))
    assert "at least 2 models, got 0" in message_of(fit_bradley_terry, data_of([row()]).select([]))
    assert "should be a column" in message_of(fit_bradley_terry, [row()])


def test_all_ties_make_all_equal():
    """Half a win each."""
    data = data_of([row("tie", model_a=a, model_b=b) for a, b in (("x", "y"), ("y", "z"), ("x", "y"))])
    assert fit_bradley_terry(data) == pytest.approx({"x": 0, "y": 0, "z": 0}, abs=1e-9)
    board = leaderboard(data_of([row("tie")] * 30), n_resamples=50)
    assert [(s.rank, s.rating, s.low, s.high, s.n) for s in board] == [(1, 1000, 1000, 1000, 30)] * 2


def test_leaderboard_covers_the_truth():
    """95% intervals of differences to an anchor hold the true difference about that often, with ties by half wins of a fair judge."""
    strengths = np.array([0.8, 0.1, -0.9])
    p, names, inside = win_probabilities(strengths), ["x", "y", "z"], []
    for trial in range(60):
        rng = np.random.default_rng(trial)
        sides = rng.permuted(np.tile(np.arange(3), (600, 1)), axis=1)[:, :2]
        rows = [row("a" if rng.random() < p[i, j] else "b", model_a=names[i], model_b=names[j]) for i, j in sides]
        board = leaderboard(data_of(rows), n_resamples=100, anchor="z", anchor_rating=0, seed=trial)
        truth = dict(zip(names, (strengths - strengths[2]) * 400 / math.log(10)))
        inside += [s.low <= truth[s.model] <= s.high for s in board if s.model != "z"]
    assert 0.86 <= np.mean(inside) <= 0.99


def test_leaderboard_refuses_what_it_cannot_know():
    """Options out of range, an unknown anchor, and so few comparisons that resamples have no optimum."""
    data = arena(500)
    assert "`anchor` should be one of" in message_of(leaderboard, data, anchor="gpt")
    assert "`n_resamples` should be at least 20" in message_of(leaderboard, data, n_resamples=5)
    for level in (0, 1, math.nan):
        assert "`level` should be between 0 and 1" in message_of(leaderboard, data, level=level)
    assert "`anchor_rating` should be a finite number" in message_of(leaderboard, data, anchor_rating=math.nan)
    assert "resamples without an optimum" in message_of(leaderboard, data_of([row("a"), row("b")]))


def test_wider_levels_and_more_rows():
    """A higher level is wider; four times the rows make the interval about half as wide."""
    width = lambda board: np.mean([s.high - s.low for s in board])
    small, large = arena(1500, seed=1), arena(6000, seed=1)
    assert width(leaderboard(small, level=0.5)) < width(leaderboard(small, level=0.95))
    assert 1.6 < width(leaderboard(small)) / width(leaderboard(large)) < 2.5


# Describe.


@few_examples
@given(ROWS)
def test_describe_counts_what_a_loop_counts(rows):
    """Every number of the table against a plain loop; turning sides changes what it must and nothing else."""
    data = data_of(rows)
    found = describe(data, max_length=3)
    decided = [r for r in rows if r["winner"] != "tie"]
    assert found.n == len(rows) and sum(found.winners.values()) == len(rows)
    assert found.b_wins.n == len(decided) and (not decided or found.b_wins.share == sum(r["winner"] == "b" for r in decided) / len(decided))
    a, b = ([len(r[side].split()) for r in rows] for side in ("response_a", "response_b"))
    assert found.lengths["response_a"].tolist() == a and found.lengths["response_b"].tolist() == b
    cut = [r["response_a"].split()[:3] == r["response_b"].split()[:3] for r in rows]
    assert found.identical_after(3) == rate_of(sum(cut), len(rows))
    assert found.shared.tolist() == [len(list(itertools.takewhile(lambda xy: xy[0] == xy[1], zip(r["response_a"].split(), r["response_b"].split()))))
                                     for r in rows]  # fmt: skip
    near = [bag_overlap(r["response_a"].split(), r["response_b"].split()) >= 0.9 for r in rows]
    assert found.near_identical == rate_of(sum(near), len(rows))
    turned = describe(shuffle_sides(data, seed=1), max_length=3)
    assert (turned.longer_wins, turned.near_identical, turned.winners["tie"]) == (found.longer_wins, found.near_identical, found.winners["tie"])
    assert turned.agreement.n == found.agreement.n and turned.agreement.low == pytest.approx(found.agreement.low)
    assert len(str(found).splitlines()) == 11


@few_examples
@given(ROWS)
def test_agreement_is_that_of_two_judgements_drawn_at_random(rows):
    """All ordered pairs of judgements of a pair of texts, by a double loop."""
    groups = {}
    for r in rows:
        if r["response_a"] != r["response_b"]:
            best = {"a": r["response_a"], "b": r["response_b"], "tie": None}[r["winner"]]
            groups.setdefault((r["prompt"], frozenset([r["response_a"], r["response_b"]])), []).append(best)
    shares = [np.mean([x == y for x, y in itertools.permutations(votes, 2)]) for votes in groups.values() if len(votes) > 1]
    agreed, n = count_agreements(data_of(rows))
    assert n == len(shares) and agreed == pytest.approx(sum(shares))


def test_bag_overlap_is_near_where_difflib_is():
    """One word changed in twenty is near-identical for both; half of the words is for neither; order counts for difflib only."""
    words = [f"w{i}" for i in range(40)]
    changed, half, turned = [*words[:39], "x"], words[:20] + ["x"] * 20, words[::-1]
    ratio = lambda other: difflib.SequenceMatcher(None, words, other).ratio()
    assert bag_overlap(words, changed) > 0.9 < ratio(changed) and bag_overlap(words, half) < 0.9 > ratio(half)
    assert bag_overlap(words, turned) == 1 and ratio(turned) < 0.1


@pytest.mark.parametrize(("p", "n"), [(0.5, 20), (0.03, 60), (0.97, 60), (0.2, 500)])
def test_rate_is_wilson_and_covers(p, n):
    """scipy's interval for every count, and a mean coverage near 95%."""
    hits = np.arange(n + 1)
    rates = [rate_of(int(k), n) for k in hits]
    for k in hits:
        other = binomtest(int(k), n).proportion_ci(method="wilson")
        assert (rates[k].low, rates[k].high) == pytest.approx((other.low, other.high), abs=1e-12)
    weights = np.array([math.comb(n, int(k)) * p**k * (1 - p) ** (n - k) for k in hits])
    assert 0.9 < sum(w for w, r in zip(weights, rates) if r.low <= p <= r.high) < 0.99


def test_describe_in_tokens_of_a_real_tokenizer(tokenizer):
    """In the Tiny Arena a word is a token, so both units give the same lengths."""
    data = arena(300)
    words, tokens = describe(data), describe(data, tokenizer)
    assert (words.unit, tokens.unit) == ("words", "tokens")
    for name, lengths in words.lengths.items():
        np.testing.assert_array_equal(lengths, tokens.lengths[name])
    assert (words.near_identical, words.longer_wins) == (tokens.near_identical, tokens.longer_wins)


def test_describe_of_the_smallest_and_the_worst():
    """One row, all ties, no row, texts that are none, a winner that is none."""
    one = describe(data_of([row()]))
    assert one.n == 1 and one.agreement.n == 0 and "no such case" in str(one) and one.b_wins.share == 0
    ties = describe(data_of([row("tie")] * 4))
    assert (ties.b_wins.n, ties.longer_wins.n) == (0, 0) and math.isnan(ties.b_wins.share) and ties.agreement.share == 1
    assert describe(data_of([row(a="", b="")])).identical_after(5).share == 1
    assert "at least one row, got none" in message_of(describe, data_of([row()]).select([]))
    assert "got None in row 2" in message_of(describe, data_of([row(), row(a=None)]))
    not_text = Dataset.from_dict({"prompt": ["p"], "response_a": ["x"], "response_b": [math.nan], "winner": ["a"]})
    assert "`response_b` should be text in every row, got nan in row 1" in message_of(describe, not_text)
    assert "got None in row 1" in message_of(describe, data_of([row(None)]))
    assert "`winner` should be a column" in message_of(describe, data_of([row()]).remove_columns("winner"))
    assert "`max_length` should be at least 1" in message_of(describe, data_of([row()]), max_length=0)
    assert "between 0 and n = 3" in message_of(rate_of, 4, 3) and "between 0 and n = 3" in message_of(rate_of, math.nan, 3)


@few_examples
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.sampled_from(["a", "b", "tie"])), max_size=30))
def test_longer_wins_do_not_depend_on_the_side(rows):
    """Exchanging a and b changes nothing; longer and shorter wins add up to the rows that count."""
    a, b = (np.array([r[i] for r in rows], dtype=int) for i in (0, 1))
    winners = [r[2] for r in rows]
    won, n = count_longer_wins(a, b, winners)
    assert (won, n) == count_longer_wins(b, a, [{"a": "b", "b": "a"}.get(w, w) for w in winners])
    assert count_longer_wins(-a, -b, winners) == (n - won, n)


# Shuffle, filter, split, sort.


@few_examples
@given(ROWS, st.integers(0, 5))
def test_shuffling_sides_keeps_who_won(rows, seed):
    """Prompt, winning text and winning model of each row, and the loser's; the same seed twice."""
    data = data_of(rows)
    shuffled = shuffle_sides(data, seed)

    def told(r):
        sides = sorted((r[f"response_{s}"], r[f"model_{s}"], r["winner"] == s) for s in "ab")
        return r["prompt"], sides, r["winner"] == "tie"

    assert [told(r) for r in shuffled] == [told(r) for r in rows]
    assert shuffle_sides(data, seed).to_dict() == shuffled.to_dict()


@few_examples
@given(ROWS, st.integers(1, 8), st.integers(1, 12))
def test_filter_keeps_exactly_what_is_short_enough(rows, max_prompt, max_response):
    """In order; kept and dropped rows, by reason, are all rows."""
    rows = [{**r, "n_tokens_prompt": len(r["prompt"].split()), "n_tokens_a": len(r["response_a"].split()),
             "n_tokens_b": len(r["response_b"].split())} for r in rows]  # fmt: skip
    fits = [r["n_tokens_prompt"] <= max_prompt and max(r["n_tokens_a"], r["n_tokens_b"]) <= max_response for r in rows]
    limits = {"max_prompt_tokens": max_prompt, "max_response_tokens": max_response}
    if not any(fits):
        assert "nothing is left" in message_of(filter_long, data_of(rows), **limits)
        return
    kept, report = filter_long(data_of(rows), **limits)
    assert list(kept) == [r for r, fit in zip(rows, fits) if fit]
    assert sorted(place for places in report.dropped.values() for place in places) == [i for i, fit in enumerate(fits, 1) if not fit]


def test_prompt_alone_over_the_limit(tokenizer):
    """It is dropped for the prompt, whatever its responses; alone it leaves nothing."""
    data = data_of([row(prompt="how do i make tea ?"), row(prompt="how do i make tea ? " * 9)])
    kept, report = filter_long(data, tokenizer, max_prompt_tokens=10, max_response_tokens=50)
    assert len(kept) == 1 and report.dropped == {"prompt over 10 tokens": [2]}
    alone = message_of(filter_long, data.select([1]), tokenizer, max_prompt_tokens=10, max_response_tokens=50)
    assert "prompt over 10 tokens 1 (row 1)" in alone and "nothing is left" in alone


def test_each_text_is_tokenized_once(tokenizer):
    """Texts that the tokenizer is shown, over count, filter and sort."""
    seen = []

    class Watched:
        def __call__(self, texts, **options):
            seen.extend(texts)
            return tokenizer(texts, **options)

    data = data_of([row(), row(b="boil water ."), row(prompt="wait .")] * 5)
    counted = count_tokens(data, Watched())
    filter_long(counted, max_prompt_tokens=9, max_response_tokens=9)
    sort_longest_first(counted)
    assert sorted(seen) == ["boil water .", "tea ?", "wait ."]


@few_examples
@given(ROWS, st.floats(0.01, 0.99), st.integers(0, 3))
def test_split_shares_no_prompt_and_loses_no_row(rows, fraction, seed):
    """Whatever the fraction; both sides have a prompt; the order of the rows does not matter."""
    data = data_of(rows)
    if len({r["prompt"] for r in rows}) < 2:
        assert "at least 2 prompts" in message_of(split_by_prompt, data, valid_fraction=fraction)
        return
    train, valid = split_by_prompt(data, valid_fraction=fraction, seed=seed)
    assert len(train) and len(valid) and not set(train["prompt"]) & set(valid["prompt"])
    assert sorted(map(str, [*train, *valid])) == sorted(map(str, data))
    backwards = data.select(range(len(rows))[::-1])
    assert set(split_by_prompt(backwards, valid_fraction=fraction, seed=seed)[1]["prompt"]) == set(valid["prompt"])


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, math.nan])
def test_split_refuses_a_fraction_that_is_none(fraction):
    """Including NaN, with which every comparison is false."""
    assert "between 0 and 1" in message_of(split_by_prompt, arena(20), valid_fraction=fraction)


@few_examples
@given(st.lists(st.sampled_from("abcdefg"), min_size=2, max_size=40), st.integers(2, 5))
def test_folds_share_no_prompt_and_are_as_even_as_scikit_learns(prompts, n_folds):
    """The sizes of GroupKFold, which deals in the same way; equal prompts may go elsewhere."""
    if len(set(prompts)) < n_folds:
        return
    folds = prompt_folds(prompts, n_folds)
    assert len(set(zip(prompts, folds.tolist()))) == len(set(prompts))
    theirs = [len(valid) for _, valid in GroupKFold(n_folds).split(prompts, groups=prompts)]
    assert sorted(np.bincount(folds, minlength=n_folds).tolist()) == sorted(theirs)


@few_examples
@given(ROWS)
def test_sorting_falls_and_loses_no_row(rows):
    """Rows of equal length keep their order."""
    rows = [{**r, "n_tokens_prompt": len(r["prompt"].split()), "n_tokens_a": len(r["response_a"].split()),
             "n_tokens_b": len(r["response_b"].split()), "place": i} for i, r in enumerate(rows)]  # fmt: skip
    length = lambda r: r["n_tokens_prompt"] + max(r["n_tokens_a"], r["n_tokens_b"])
    assert list(sort_longest_first(data_of(rows))) == sorted(rows, key=lambda r: (-length(r), r["place"]))


def test_one_row_and_none(tokenizer):
    """One row passes through everything but the split; no row is refused by what counts tokens."""
    one, none = data_of([row()]), data_of([row()]).select([])
    counted = count_tokens(one, tokenizer)
    assert counted.column_names[-3:] == list(TOKEN_COUNTS)
    assert len(sort_longest_first(counted)) == len(filter_long(counted, max_prompt_tokens=9, max_response_tokens=9)[0]) == 1
    assert len(shuffle_sides(one)) == 1 and len(shuffle_sides(none)) == 0
    assert "at least 2 prompts, got 1" in message_of(split_by_prompt, one) and "got 0" in message_of(split_by_prompt, none)
    assert "at least one row" in message_of(count_tokens, none, tokenizer)
    for function in (sort_longest_first, lambda data: filter_long(data, max_prompt_tokens=9, max_response_tokens=9)):
        assert "pass a tokenizer" in message_of(function, one)
    assert "at least 1 token" in message_of(filter_long, counted, max_prompt_tokens=0, max_response_tokens=9)


def test_the_same_seed_gives_the_same_result():
    """Twice, bit for bit; another seed gives something else."""
    data = arena(600, seed=2)
    for result in (lambda seed: leaderboard(data, n_resamples=100, seed=seed), lambda seed: shuffle_sides(data, seed).to_dict(),
                   lambda seed: split_by_prompt(data, seed=seed)[1].to_dict()):  # fmt: skip
        assert result(0) == result(0) != result(1)
    assert str(describe(data)) == str(describe(data)) and shared_prefix("ab", "ac") == 1
