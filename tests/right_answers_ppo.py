"""Right answers to the exercises of lessons 05a, 05b and 05d, written in another way than the solutions."""

import math

import numpy as np
import torch


def counted(mask, *tensors):
    """The entries that count, flat."""
    return [tensor.flatten() if mask is None else tensor[mask] for tensor in tensors]


def clipped_surrogate_loss_by_cases(logprobs, old_logprobs, advantages, mask=None, clip_coef=0.2):
    """An advantage times the ratio, cut off above for good actions and below for bad ones."""
    new, old, advantages = counted(mask, logprobs, old_logprobs, advantages)
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
    return (total - left) / total if total > 0 else torch.tensor(float("nan"))


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


ANOTHER_WAY = {"clipped_surrogate_loss": clipped_surrogate_loss_by_cases, "approx_kl": approx_kl_by_series,
               "explained_variance": explained_variance_by_moments, "gaussian_logprob": gaussian_logprob_by_torch,
               "combine_moments": combine_moments_by_sums}  # fmt: skip
