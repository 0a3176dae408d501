"""Right answers to the exercises of lessons 06, 06a and 06b, written in another way than the solutions."""

import math

import torch


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
    "optimal_policy": optimal_policy_by_rows,
    "implied_rewards": implied_rewards_by_kl,
    "best_of_n_policy": best_of_n_policy_by_hand,
    "gao_fit": gao_fit_by_normal_equations,
    "conservative_scores": conservative_scores_by_columns,
}
