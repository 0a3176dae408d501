"""The exact RLHF optimum and best-of-n, against brute force on random tables; the small functions of over-optimisation and its cures."""

import itertools
import math

import pytest
import torch

from rlhf_course.conservative_rewards import combined_reward, error_correlation, mean_correlation
from rlhf_course.optimal_policy import (
    best_of_n_kl,
    best_of_n_policy,
    exact_kl,
    expected_reward,
    frontier,
    log_partition,
    optimal_policy,
    regularised_objective,
    response_tree,
)
from rlhf_course.overoptimization import WatchedReward, gao_curve, gao_fit, gao_peak, running_mean, standardise_rewards

SEEDS = range(5)


def table(seed, n=6, n_levels=None):
    """Log-probabilities of a reference and rewards, with ties where there are fewer levels than responses."""
    generator = torch.Generator().manual_seed(seed)
    ref = (2 * torch.randn(n, generator=generator, dtype=torch.float64)).log_softmax(0)
    rewards = torch.randn(n, generator=generator, dtype=torch.float64)
    return ref, rewards if n_levels is None else torch.randint(n_levels, (n,), generator=generator).double()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("beta", [0.2, 0.5, 5.0])
def test_gradient_ascent_finds_the_closed_form(seed, beta):
    """An optimizer that knows nothing of the formula ends at the same policy and the same objective."""
    ref, rewards = table(seed)
    logits = ref.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -regularised_objective(logits.log_softmax(0), ref, rewards, beta)
        loss.backward()
        return loss

    optimizer.step(closure)
    found = logits.detach().log_softmax(0)
    torch.testing.assert_close(found.exp(), optimal_policy(ref, rewards, beta).exp(), atol=1e-4, rtol=0)
    torch.testing.assert_close(regularised_objective(found, ref, rewards, beta), beta * log_partition(ref, rewards, beta), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n_levels", [None, 3, 1])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_best_of_n_is_what_all_draws_give(seed, n_levels, n):
    """Every sequence of n draws, with its probability and the first best of it."""
    ref, rewards = table(seed, 5, n_levels)
    p, expected = ref.exp(), torch.zeros(5, dtype=torch.float64)
    for draws in itertools.product(range(5), repeat=n):
        winner = max(draws, key=lambda i: rewards[i])  # max keeps the first of equals
        expected[winner] += math.prod(float(p[i]) for i in draws)
    found = best_of_n_policy(ref, rewards, n)
    torch.testing.assert_close(found.exp(), expected)
    assert exact_kl(found, ref) <= best_of_n_kl(n) + 1e-12


@pytest.mark.parametrize("n", [1, 2, 16])
def test_best_of_n_knows_responses_too_rare_for_a_float(n):
    """The least probable double is about exp(-745); here the worst and the best response lie below it, and one cannot be drawn at all."""
    ref = torch.tensor([-900.0, math.log(0.5), -math.inf, math.log(0.5), -800.0], dtype=torch.float64)
    found = best_of_n_policy(ref, torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]), n)
    expected = [-900.0 * n, math.log(0.5**n), -math.inf, math.log(1 - 0.5**n), -800 + math.log(n)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("n", [0, -1, math.nan])
def test_best_of_n_refuses_no_draws(n):
    """Nothing can be kept of nothing."""
    with pytest.raises(ValueError, match="best_of_n_policy: `n` should be at least 1"):
        best_of_n_policy(*table(0), n)


@pytest.mark.parametrize("beta", [0, -0.5, math.nan])
@pytest.mark.parametrize("function", [optimal_policy, log_partition])
def test_a_price_that_is_none_is_refused(function, beta):
    """And not answered with NaN."""
    with pytest.raises(ValueError, match="`beta` should be above 0"):
        function(*table(0), beta)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_policy_lies_above_the_frontier(seed):
    """Random policies against the best one of the same divergence."""
    ref, rewards = table(seed)
    kl, best = frontier(ref[None], rewards[None], torch.logspace(3, -2, 2_000, dtype=torch.float64).tolist())
    generator = torch.Generator().manual_seed(100 + seed)
    for _ in range(50):
        policy = (ref + 2 * torch.randn(6, generator=generator, dtype=torch.float64)).log_softmax(0)
        further = best[kl > exact_kl(policy, ref)]
        assert expected_reward(policy, rewards) < (further.min() if len(further) else rewards.max()) + 1e-9


@pytest.mark.parametrize(("n_tokens", "eos", "length"), [(3, 0, 2), (4, 2, 3), (5, 4, 4)])
def test_tree_holds_every_response_once(n_tokens, eos, length):
    """Wherever the end token stands in the vocabulary, each response's row begins like it."""
    tree = response_tree(n_tokens, eos, length)
    rows = [tuple(ids[mask].tolist()) for ids, mask in zip(tree.ids, tree.mask, strict=True)]
    assert len(set(rows)) == len(rows) == sum((n_tokens - 1) ** n for n in range(length)) + (n_tokens - 1) ** length
    for response, row, ended in zip(rows, tree.rows, tree.ended, strict=True):
        assert ended == (eos in response)
        assert tree.contexts[row].tolist()[: len(response) - 1] == list(response[:-1])


@pytest.mark.parametrize("n_max", [0, 1, 100])
def test_tree_refuses_what_it_cannot_hold(n_max):
    """Too short, or far too many."""
    with pytest.raises(ValueError, match="max_new_tokens"):
        response_tree(8, 1, n_max)


def test_tree_counts_the_shorter_responses_too():
    """A million without an end token, and 111,111 that end."""
    with pytest.raises(ValueError, match="at most 1,000,000 responses in all, got 6 with 11 tokens"):
        response_tree(11, 1, 6)


def test_best_of_n_kl_refuses_zero_draws():
    """Nothing can be kept of nothing."""
    with pytest.raises(ValueError, match="at least 1"):
        best_of_n_kl(0)


@pytest.mark.parametrize("seed", SEEDS)
def test_gao_peak_is_the_highest_point(seed):
    """Of the curve that was fitted, wherever it is."""
    generator = torch.Generator().manual_seed(seed)
    d = 6 * torch.rand(40, generator=generator)
    alpha, beta = gao_fit(d, gao_curve(d, 1.0 + 0.1 * seed, 0.4) + 0.2 * torch.randn(40, generator=generator))
    place, height = gao_peak(alpha, beta)
    near = torch.linspace(0.5, 2, 301, dtype=torch.float64) * place
    assert abs(gao_curve(near, alpha, beta).max() - height) < 1e-6 and abs(near[gao_curve(near, alpha, beta).argmax()] - place) < 0.02 * place


def test_running_mean_of_a_line_is_the_line():
    """Away from the ends."""
    line = torch.arange(9.0)
    assert running_mean(line, 5)[2:-2].tolist() == line[2:-2].tolist()


def test_watched_reward_passes_errors_on():
    """A reward function that raises is not recorded as a batch."""

    def broken(prompts, responses):
        raise RuntimeError("no reward")

    watched = WatchedReward(broken, {})
    with pytest.raises(RuntimeError, match="no reward"):
        watched(["x"], ["y"])
    assert watched.rows == [] and watched.texts == []


def test_rewards_may_be_lists():
    """Of plain numbers, as a measure gives them; a tensor comes out."""
    lengths = lambda prompts, responses: [float(len(response)) for response in responses]
    watched = WatchedReward(standardise_rewards(lengths, ["x"] * 3, ["a", "bb", "ccc"]), {"length": lengths, "tensor": lambda p, r: torch.tensor(lengths(p, r))})
    scores = watched(["x"] * 2, ["bb", "cccc"])
    torch.testing.assert_close(scores, torch.tensor([0.0, 2.0]))
    assert watched.rows == [{"proxy": 1.0, "length": 3.0, "tensor": 3.0}]
    torch.testing.assert_close(WatchedReward(lengths, {})(["x"], ["abc"]), torch.tensor([3.0]))


@pytest.mark.parametrize("seed", SEEDS)
def test_error_correlation_is_the_partial_correlation(seed):
    """Of each two models given the truth, by its textbook formula; level, unit and sign of a model have no influence beyond the sign."""
    generator = torch.Generator().manual_seed(seed)
    truth, scores = torch.randn(40, generator=generator), torch.randn(3, 40, generator=generator)
    scores[1] += scores[0] + truth
    r = torch.corrcoef(torch.cat([scores, truth[None]]).double())
    found = error_correlation(scores, truth)
    for i, j in itertools.combinations(range(3), 2):
        expected = (r[i, j] - r[i, 3] * r[j, 3]) / torch.sqrt((1 - r[i, 3] ** 2) * (1 - r[j, 3] ** 2))
        torch.testing.assert_close(found[i, j], expected)
    signs = torch.tensor([1.0, -1.0, 1.0])
    torch.testing.assert_close(error_correlation(scores * torch.tensor([[2.0], [-0.1], [30.0]]) + 5, truth), found * signs[:, None] * signs, atol=1e-5, rtol=0)
    assert mean_correlation(found) == pytest.approx(float(found[0, 1] + found[0, 2] + found[1, 2]) / 3)


@pytest.mark.parametrize("scores", [torch.randn(1, 5), torch.randn(5), torch.randn(2, 4), torch.randn(2, 5)[:, :2], torch.zeros(2, 5), torch.stack([torch.arange(5.0), torch.arange(5.0) ** 2])],
                         ids=["one model", "a row", "another length", "two responses", "constant", "no error"])  # fmt: skip
def test_error_correlation_refuses(scores):
    """What has no correlation is no NaN."""
    with pytest.raises(ValueError, match="error_correlation: `scores` should be"):
        error_correlation(scores, torch.arange(float(min(scores.shape[-1], 5))) if scores.shape != (2, 4) else torch.arange(5.0))


def test_combined_reward_asks_every_member_once():
    """With the same texts, and takes lists and tensors."""
    asked = []

    def member(values):
        return lambda prompts, responses: asked.append((prompts, responses)) or values

    reward = combined_reward([member([1.0, 5.0]), member(torch.tensor([3.0, 2.0]))], lambda scores: scores.amin(0))
    assert reward(["p", "q"], ["r", "s"]).tolist() == [1.0, 2.0]
    assert asked == [(["p", "q"], ["r", "s"])] * 2


@pytest.mark.parametrize(("members", "combine", "argument"), [([], lambda scores: scores.mean(0), "reward_fns"), ([lambda p, r: [1.0, 2.0]] * 3, lambda scores: scores.mean(1), "combine")])
def test_combined_reward_refuses(members, combine, argument):
    """Nobody to ask, and a combination along the wrong dimension."""
    with pytest.raises(ValueError, match=f"combined_reward: `{argument}`"):
        combined_reward(members, combine)(["p", "q"], ["r", "s"])
