"""Policy gradients: properties over shapes and settings, what is refused, Stable-Baselines3's buffer where it is installed."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from rlhf_course.policy_gradient import (
    check_aligned,
    check_fraction,
    compute_gae,
    discounted_returns,
    following_values,
    masked_mean,
    real_steps,
    zero_masked,
)

FRACTIONS = st.sampled_from([0.0, 0.3, 0.9, 0.99, 1.0])
SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 5))


def random_rollout(shape, seed, dtype=torch.float64):
    """Arguments of compute_gae with ends of both kinds and masked steps everywhere."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values, finals = torch.randn(3, *shape, generator=generator, dtype=dtype)
    terminated, truncated, gap = torch.rand(3, *shape, generator=generator) < 0.2
    done = terminated | truncated
    return rewards, values, following_values(values, finals[-1], done, finals), terminated, done, ~gap


# Properties.


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 10_000), gamma=FRACTIONS, gae_lambda=FRACTIONS)
def test_environments_do_not_touch_each_other(shape, seed, gamma, gae_lambda):
    """Each column on its own, in any order, gives what all together give."""
    batch = random_rollout(shape, seed)
    together = compute_gae(*batch, gamma=gamma, gae_lambda=gae_lambda)
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(seed))
    for got, expected in zip(compute_gae(*(x[:, order] for x in batch), gamma=gamma, gae_lambda=gae_lambda), together):
        assert torch.equal(got, expected[:, order])


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 10_000), gamma=FRACTIONS, gae_lambda=FRACTIONS)
def test_advantages_are_linear_in_rewards_and_values(shape, seed, gamma, gae_lambda):
    """Twice everything is twice the advantages, and two rollouts with the same ends add up."""
    rewards, values, following, *flags = random_rollout(shape, seed)
    more, others, later = random_rollout(shape, seed + 1)[:3]
    both = [compute_gae(*floats, *flags, gamma=gamma, gae_lambda=gae_lambda)[0] for floats in ((rewards, values, following), (more, others, later))]
    added = compute_gae(rewards + 2 * more, values + 2 * others, following + 2 * later, *flags, gamma=gamma, gae_lambda=gae_lambda)[0]
    assert_close(added, both[0] + 2 * both[1])


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 10_000), gamma=FRACTIONS)
def test_lambda_one_without_values_is_the_return(shape, seed, gamma):
    """With values 0 everywhere and lambda 1 the advantages are the discounted returns, masked steps and ends included."""
    rewards, values, _, terminated, done, mask = random_rollout(shape, seed)
    zeros = torch.zeros_like(values)
    advantages, returns = compute_gae(rewards, zeros, zeros, terminated, done, mask, gamma=gamma, gae_lambda=1.0)
    assert_close(advantages, discounted_returns(rewards, done, mask, gamma=gamma))
    assert torch.equal(advantages, returns)


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 10_000), gamma=st.sampled_from([0.3, 0.9, 0.99]), gae_lambda=FRACTIONS)
def test_exact_values_leave_nothing_to_explain(shape, seed, gamma, gae_lambda):
    """Where the values are the returns that will come, every advantage is 0, for every lambda."""
    rewards, _, _, _, done, _ = random_rollout(shape, seed)
    done[-1] = True
    values = discounted_returns(rewards, done, gamma=gamma)
    advantages, _ = compute_gae(rewards, values, following_values(values, values[0], done), done, done, gamma=gamma, gae_lambda=gae_lambda)
    assert advantages.abs().max() < 1e-12


@settings(max_examples=60, deadline=None)
@given(shape=st.tuples(st.integers(2, 14), st.integers(1, 4)), seed=st.integers(0, 10_000), cut=st.integers(1, 13))
def test_two_rollouts_have_the_mask_of_one(shape, seed, cut):
    """Cutting a run of steps in two, with the last flags handed over, changes no step's standing."""
    done = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    before, cut = torch.zeros(shape[1], dtype=torch.bool), min(cut, shape[0] - 1)
    parts = real_steps(done[:cut], before), real_steps(done[cut:], done[cut - 1])
    assert torch.equal(torch.cat(parts), real_steps(done, before))


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 10_000))
def test_reset_rows_can_be_put_in_anywhere(shape, seed):
    """A masked row of junk after each end, in every column, changes no other advantage: next-step mode is same-step mode with gaps."""
    rewards, values, following, terminated, done, _ = random_rollout(shape, seed)
    plain, _ = compute_gae(rewards, values, following, terminated, done, gamma=0.9, gae_lambda=0.8)
    for n in range(shape[1]):
        rows = [row for t in range(shape[0]) for row in ([t, None] if done[t, n] else [t])]
        keep = torch.tensor([row is not None for row in rows])
        index = torch.tensor([0 if row is None else row for row in rows])
        floats = [torch.where(keep, x[index, n], torch.nan)[:, None] for x in (rewards, values, following)]
        flags = [(x[index, n] & keep)[:, None] for x in (terminated, done)]
        advantages, _ = compute_gae(*floats, *flags, real_steps(flags[1], torch.tensor([False])), gamma=0.9, gae_lambda=0.8)
        assert torch.equal(advantages[keep, 0], plain[:, n])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_is_kept(dtype):
    """What comes in is what goes out."""
    batch = random_rollout((5, 2), 0, dtype)
    assert {x.dtype for x in compute_gae(*batch)} == {dtype} == {discounted_returns(batch[0], batch[4]).dtype}
    assert masked_mean(batch[0], batch[5]).dtype == dtype


def test_one_step_one_environment_and_none():
    """The smallest rollouts; one without environments is empty."""
    flag = torch.tensor([[False]])
    advantages, returns = compute_gae(torch.tensor([[1.0]]), torch.tensor([[2.0]]), torch.tensor([[4.0]]), flag, flag, gamma=0.5)
    assert (advantages.item(), returns.item()) == (1.0, 3.0)
    empty, none = torch.zeros(3, 0), torch.zeros(3, 0, dtype=torch.bool)
    assert compute_gae(empty, empty, empty, none, none)[0].shape == (3, 0) == discounted_returns(empty, none).shape


# Bad input.


@pytest.mark.parametrize("value", [-0.1, 1.1, 99, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["gamma", "gae_lambda"])
def test_discounts_outside_0_to_1_are_refused(name, value):
    """NaN and infinity too, with the function and the argument named."""
    batch = random_rollout((4, 2), 0)
    with pytest.raises(ValueError, match=rf"compute_gae: `{name}` should be in \[0, 1\]"):
        compute_gae(*batch, **{name: value})
    with pytest.raises(ValueError, match="f: `x`"):
        check_fraction("f", "x", value)
    if name == "gamma":
        with pytest.raises(ValueError, match="discounted_returns: `gamma`"):
            discounted_returns(batch[0], batch[4], gamma=value)


@pytest.mark.parametrize("place", range(6))
def test_every_argument_of_another_shape_is_refused(place):
    """Broadcasting is never what was meant: one environment more, batch first, a last dimension of 1."""
    names = ["rewards", "values", "next_values", "terminated", "done", "mask"]
    batch = random_rollout((4, 2), 0)
    for bad in (batch[place].T, batch[place][..., None], batch[place][:, :1], batch[place][0]):
        with pytest.raises(ValueError, match="compute_gae: `.*of shape") as caught:
            compute_gae(*batch[:place], bad, *batch[place + 1 :])
        assert names[place] in str(caught.value)


@pytest.mark.parametrize("place", range(6))
def test_every_argument_of_another_type_is_refused(place):
    """Whole numbers for floats, numbers for flags."""
    batch = random_rollout((4, 2), 0)
    for dtype in (torch.long, torch.uint8):
        with pytest.raises(ValueError, match="compute_gae: `.*(floating point|bool)"):
            compute_gae(*batch[:place], batch[place].to(dtype), *batch[place + 1 :])


def test_terminated_but_not_done_is_refused():
    """It would carry the trace over a death."""
    batch = list(random_rollout((4, 2), 0))
    batch[3][1, 1], batch[4][1, 1] = True, False
    with pytest.raises(ValueError, match="`done` should be True wherever `terminated` is"):
        compute_gae(*batch)


def test_values_and_masks_of_another_shape_are_refused():
    """The helpers of the two autoreset modes, and the masks."""
    rewards, values, following, _, done, _ = random_rollout((4, 2), 0)
    for args in ((values, values[0, :1], done), (values, values[0], done[:3]), (values, values[0], done, following[:3]), (values, values[0].float()[None], done)):
        with pytest.raises(ValueError, match="following_values: "):
            following_values(*args)
    for args in ((done, done[0, :1]), (done, done[0].long()), (done.long(), done[0]), (done, done)):
        with pytest.raises(ValueError, match="real_steps: `done_before`"):
            real_steps(*args)
    for bad in (torch.ones(4, 2), torch.ones(2, 4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="masked_mean: `mask`"):
            masked_mean(rewards, bad)
    with pytest.raises(ValueError, match=r"f: `values`.*squeeze\(-1\)"):
        check_aligned("f", {"rewards": rewards, "values": values[..., None]}, {})
    assert zero_masked(None) == ()


def test_a_reward_that_is_not_a_number_is_not_hidden():
    """It shows in the advantages of its own environment, where training can say which one, and in no other."""
    rewards, values, following, terminated, done, _ = random_rollout((8, 3), 5)
    rewards[5, 1] = math.nan
    for result in compute_gae(rewards, values, following, terminated, done):
        assert result[5, 1].isnan() and not result[:, [0, 2]].isnan().any() and not result[6:].isnan().any()


# Stable-Baselines3.


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.99, 0.95), (0.98, 0.8), (0.9, 0.0), (1.0, 1.0), (0.0, 0.5)])
def test_advantages_are_those_of_stable_baselines3(gamma, gae_lambda):
    """Its rollout buffer, filled as its collect_rollouts does, on rollouts with both kinds of ends, to 1e-5."""
    pytest.importorskip("stable_baselines3", reason="not a requirement of the course: pip install --no-deps stable-baselines3")
    import numpy as np
    from gymnasium.spaces import Box, Discrete
    from stable_baselines3.common.buffers import RolloutBuffer

    T, N = 64, 4
    for seed in range(5):
        rewards, values, _, terminated, done, _ = random_rollout((T, N), seed, torch.float32)
        finals, last_values = torch.randn(T + 1, N, generator=torch.Generator().manual_seed(seed)).split([T, 1])
        following = following_values(values, last_values[0], done, finals)
        advantages, returns = compute_gae(rewards, values, following, terminated, done, gamma=gamma, gae_lambda=gae_lambda)
        buffer = RolloutBuffer(T, Box(-1, 1, (1,)), Discrete(2), device="cpu", gamma=gamma, gae_lambda=gae_lambda, n_envs=N)
        paid = (rewards + gamma * finals * (done & ~terminated)).numpy()
        start = np.zeros(N)
        for t in range(T):
            buffer.add(np.zeros((N, 1)), np.zeros((N, 1)), paid[t], start, values[t], torch.zeros(N))
            start = done[t].numpy()
        buffer.compute_returns_and_advantage(last_values[0], done[-1].numpy())
        assert_close(advantages, torch.from_numpy(buffer.advantages), atol=1e-5, rtol=0)
        assert_close(returns, torch.from_numpy(buffer.returns), atol=1e-5, rtol=0)
