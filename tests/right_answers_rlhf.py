"""Right answers to the exercises of lessons 05f, 06a and 06b, written in another way than the solutions."""

import math

import torch


def chosen_logprobs_by_entries(logits, token_ids, mask, temperature=1.0):
    """One token at a time, from the definition of the softmax; the entropy as logsumexp minus the mean logit."""
    logprobs, entropy = [], []
    for t in range(logits.shape[1]):
        for b in range(logits.shape[0]):
            row = logits[b, t] / temperature
            total = torch.logsumexp(row, 0)
            counts, zero = bool(mask[t, b]), row.new_zeros(())
            logprobs.append(row[token_ids[b, t]] - total if counts else zero)
            entropy.append(total - (torch.softmax(row, 0) * row).sum() if counts else zero)
    return torch.stack(logprobs).view(mask.shape), torch.stack(entropy).view(mask.shape)


def token_kl_by_selection(logprobs, ref_logprobs, mask, estimator="k1"):
    """Only the tokens that count, put back into zeros; the ratio reference over policy from its logarithm; the reference is data."""
    log_r = ref_logprobs.detach()[mask] - logprobs[mask]
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


def optimal_policy_by_rows(ref_logprobs, rewards, beta):
    """Shifted by the largest entry of each row, then divided by its own sum."""
    scaled = ref_logprobs + rewards / beta
    scaled = scaled - scaled.amax(-1, keepdim=True)
    return scaled - scaled.exp().sum(-1, keepdim=True).log()


def implied_rewards_by_kl(logprobs, ref_logprobs, beta):
    """The mean of log(pi / ref) under the reference is minus the divergence KL(ref || pi)."""
    divergence = torch.nn.functional.kl_div(logprobs, ref_logprobs, reduction="none", log_target=True).sum(-1, keepdim=True)
    return beta * (logprobs - ref_logprobs + divergence)


def best_of_n_policy_by_hand(ref_logprobs, rewards, n):
    """One response at a time: how likely the draws are to have at most its reward, and less."""
    p, values = ref_logprobs.double().exp().tolist(), rewards.tolist()
    out = []
    for mine, value in zip(p, values, strict=True):
        at_most = sum(q for q, other in zip(p, values, strict=True) if other <= value)
        less = sum(q for q, other in zip(p, values, strict=True) if other < value)
        level = sum(q for q, other in zip(p, values, strict=True) if other == value)
        out.append(math.log(mine * (at_most**n - less**n) / level))
    return torch.tensor(out, dtype=torch.float64)


def gao_fit_by_normal_equations(distances, gains):
    """The two normal equations, solved by Cramer's rule."""
    pairs = [(d, -d * math.log(d) if d else 0.0, g) for d, g in zip(distances.tolist(), gains.tolist(), strict=True)]
    aa, ab, bb = (sum(f(p) for p in pairs) for f in (lambda p: p[0] * p[0], lambda p: p[0] * p[1], lambda p: p[1] * p[1]))
    ag, bg = (sum(p[i] * p[2] for p in pairs) for i in (0, 1))
    determinant = aa * bb - ab * ab
    return (ag * bb - bg * ab) / determinant, (aa * bg - ab * ag) / determinant


def conservative_scores_by_columns(scores, penalty=1.0):
    """Sums of squares, response by response."""
    columns = []
    for column in scores.T:
        mean = column.sum() / len(column)
        columns.append(mean - penalty * (((column - mean) ** 2).sum() / (len(column) - 1)) ** 0.5)
    return torch.stack(columns)


ANOTHER_WAY = {
    "chosen_logprobs": chosen_logprobs_by_entries,
    "token_kl": token_kl_by_selection,
    "shape_rewards": shape_rewards_by_columns,
    "whiten_masked": whiten_masked_by_selection,
    "adapt_kl_coef": adapt_kl_coef_by_cases,
    "optimal_policy": optimal_policy_by_rows,
    "implied_rewards": implied_rewards_by_kl,
    "best_of_n_policy": best_of_n_policy_by_hand,
    "gao_fit": gao_fit_by_normal_equations,
    "conservative_scores": conservative_scores_by_columns,
}
