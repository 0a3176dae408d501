"""Right answers to the exercises of lessons 06, 06a and 06b, written in another way than the solutions."""

import math

import torch


def chosen_logprobs_by_entries(logits, token_ids, mask, temperature=1.0):
    """One token at a time, from the definition of the softmax; the entropy as logsumexp minus the mean logit."""
    logprobs, entropy = [], []
    for t in range(logits.shape[1]):
        for b in range(logits.shape[0]):
            row = logits[b, t] / temperature
            total = torch.logsumexp(row, 0)
            counts = bool(mask[t, b])
            logprobs.append(row[token_ids[b, t]] - total if counts else 0 * row[0])
            entropy.append(total - (torch.softmax(row, 0) * row).sum() if counts else 0 * row[0])
    return torch.stack(logprobs).view(mask.shape), torch.stack(entropy).view(mask.shape)


def token_kl_by_selection(logprobs, ref_logprobs, mask, estimator="k1"):
    """Only the tokens that count, put back into zeros; the ratio reference over policy from its logarithm."""
    log_r = ref_logprobs[mask] - logprobs[mask]
    estimates = {"k1": lambda: -log_r, "k2": lambda: log_r.square() / 2, "k3": lambda: (torch.special.expm1(log_r) - log_r)}
    if estimator not in estimates:
        raise ValueError(estimator)
    return torch.zeros_like(logprobs).masked_scatter(mask, estimates[estimator]())


def shape_rewards_by_columns(scores, logprobs, ref_logprobs, mask, *, kl_coef, estimator="k1"):
    """A loop over responses."""
    rewards = torch.zeros_like(logprobs)
    price = token_kl_by_selection(logprobs, ref_logprobs, mask, estimator)
    for column, score in enumerate(scores):
        (rows,) = mask[:, column].nonzero(as_tuple=True)
        if not len(rows):
            raise ValueError("a response without tokens")
        rewards[rows, column] = -kl_coef * price[rows, column]
        rewards[rows[-1], column] += score
    return rewards


def whiten_masked_by_selection(x, mask, keep_mean=False, eps=1e-8):
    """The entries that count, whitened and put back."""
    kept = x[mask]
    mean = sum(kept) / len(kept)
    variance = sum((kept - mean) ** 2) / (len(kept) - 1)
    out = torch.zeros_like(x)
    out[mask] = (kept - mean) * torch.rsqrt(variance + eps) + (mean if keep_mean else 0)
    return out


def adapt_kl_coef_by_cases(kl_coef, kl, target_kl, n_responses, horizon):
    """The clip as three cases."""
    if kl > 1.2 * target_kl:
        error = 0.2
    elif kl < 0.8 * target_kl:
        error = -0.2
    else:
        error = (kl - target_kl) / target_kl
    return math.fsum([kl_coef, kl_coef * error * n_responses / horizon])


ANOTHER_WAY = {"chosen_logprobs": chosen_logprobs_by_entries, "token_kl": token_kl_by_selection, "shape_rewards": shape_rewards_by_columns,
               "whiten_masked": whiten_masked_by_selection, "adapt_kl_coef": adapt_kl_coef_by_cases}  # fmt: skip
