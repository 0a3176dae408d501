"""Right answers to the exercises of lessons 05a, 05b and 05d, written in another way than the solutions."""

import math

import numpy as np
import torch


# Lesson 05a.


def discounted_returns_by_episodes(rewards, done, mask=None, *, gamma=0.99):
    """Each return as a sum of its own, from its step to the end of the episode or of the gap-free stretch."""
    counts = torch.ones_like(done) if mask is None else mask
    returns = torch.zeros_like(rewards)
    for t, n in counts.nonzero().tolist():
        for k in range(t, len(rewards)):
            if not counts[k, n]:
                break
            returns[t, n] += gamma ** (k - t) * rewards[k, n]
            if done[k, n]:
                break
    return returns


def compute_gae_by_sums(rewards, values, next_values, terminated, done, mask=None, *, gamma=0.99, gae_lambda=0.95):
    """Each advantage as the weighted sum of the errors that follow it."""
    counts = torch.ones_like(done) if mask is None else mask
    advantages = torch.zeros_like(rewards)
    for t, n in counts.nonzero().tolist():
        for k in range(t, len(rewards)):
            if not counts[k, n]:
                break
            error = rewards[k, n] - values[k, n] + (0 if terminated[k, n] else gamma * next_values[k, n])
            advantages[t, n] += (gamma * gae_lambda) ** (k - t) * error
            if done[k, n]:
                break
    return advantages, torch.where(counts, advantages + values, 0)


def real_steps_by_columns(done, done_before):
    """One flag at a time, the one before it kept."""
    mask = torch.ones_like(done)
    for n, before in enumerate(done_before.tolist()):
        for t, now in enumerate(done[:, n].tolist()):
            mask[t, n], before = not before, now
    return mask


def following_values_by_entries(values, last_values, done, final_values=None):
    """One entry at a time."""
    following = values.clone()
    for t in range(len(values)):
        for n in range(values.shape[1]):
            if final_values is not None and done[t, n]:
                following[t, n] = final_values[t, n]
            else:
                following[t, n] = values[t + 1, n] if t + 1 < len(values) else last_values[n]
    return following


# Lessons 05aa to 05ac.


def counted(mask, *tensors):
    """The entries that count, flat."""
    return [tensor.flatten() if mask is None else tensor[mask] for tensor in tensors]


def clipped_surrogate_loss_by_cases(logprobs, old_logprobs, advantages, mask=None, clip_coef=0.2):
    """An advantage times the ratio, cut off above for good actions and below for bad ones; the data are detached, as they are data."""
    new, old, advantages = counted(mask, logprobs, old_logprobs.detach(), advantages.detach())
    ratio = new.exp() / old.exp()
    good = ratio.clamp(max=1 + clip_coef) * advantages
    bad = ratio.clamp(min=1 - clip_coef) * advantages
    return -torch.where(advantages > 0, good, bad).sum() / max(1, len(ratio))


def approx_kl_by_series(logprobs, old_logprobs, mask=None):
    """The exponential series from its second term on."""
    new, old = counted(mask, logprobs, old_logprobs)
    x = (new - old).double()
    total = sum(x**n / float(math.factorial(n)) for n in range(2, 40))
    return (total.sum() / max(1, len(x))).to(logprobs.dtype)


def explained_variance_by_moments(values, returns, mask=None):
    """From sums of squares; the factor n - 1 falls out."""
    values, returns = counted(mask, values, returns)
    errors = returns - values
    left, total = (((x - x.mean()) ** 2).sum() for x in (errors, returns))
    return (total - left) / total if len(returns.unique()) > 1 else torch.tensor(float("nan"))


def gaussian_logprob_by_torch(actions, mean, log_std):
    """PyTorch's own distribution."""
    return torch.distributions.Normal(mean, log_std.exp()).log_prob(actions).sum(-1)


def combine_moments_by_sums(mean, variance, count, batch):
    """From the sums of the numbers and of their squares."""
    batch = np.asarray(batch, dtype=float)
    n = count + len(batch)
    total = count * mean + batch.sum(0)
    squares = count * (variance + mean**2) + (batch**2).sum(0)
    return total / n, squares / n - (total / n) ** 2, n


# Lesson 05d.


def kept_ratios_by_division(logprobs):
    """Probabilities divided by a copy of the first row's."""
    old = logprobs[:1].detach().clone().exp()
    return torch.cat([logprobs[e : e + 1].exp() / old for e in range(len(logprobs))])


def regression_loss_by_torch(values, old_values, advantages):
    """torch's own mean squared error, halved."""
    with torch.no_grad():
        targets = old_values + advantages
    return torch.nn.functional.mse_loss(values, targets) / 2


def act_in_box_by_rows(mean, log_std, noise, low, high):
    """One action at a time, with the density multiplied out."""
    std = torch.exp(log_std)
    drawn = torch.stack([m + std * n for m, n in zip(mean, noise)])
    sent = torch.minimum(torch.maximum(drawn, torch.full_like(drawn, low)), torch.full_like(drawn, high))
    densities = [torch.prod(torch.exp(-((x - m) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi))) for x, m in zip(drawn, mean)]
    return drawn, sent, torch.log(torch.stack(densities))


def epoch_minibatches_by_numpy(n_rows, n_minibatches, seed):
    """numpy's generator, dealt out row by row to parts of the right sizes."""
    rows = np.random.default_rng(seed).permutation(n_rows).tolist()
    sizes = [n_rows // n_minibatches + (i < n_rows % n_minibatches) for i in range(n_minibatches)]
    return [torch.tensor([rows.pop() for _ in range(size)]) for size in sizes]


ANOTHER_WAY = {"discounted_returns": discounted_returns_by_episodes, "compute_gae": compute_gae_by_sums, "real_steps": real_steps_by_columns,
               "following_values": following_values_by_entries,
               "clipped_surrogate_loss": clipped_surrogate_loss_by_cases, "approx_kl": approx_kl_by_series,
               "explained_variance": explained_variance_by_moments, "gaussian_logprob": gaussian_logprob_by_torch,
               "combine_moments": combine_moments_by_sums,
               "kept_ratios": kept_ratios_by_division, "regression_loss": regression_loss_by_torch, "act_in_box": act_in_box_by_rows,
               "epoch_minibatches": epoch_minibatches_by_numpy}  # fmt: skip
