"""Right answers to the exercises of lessons 05a, 05b and 05d, written in another way than the solutions."""

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


ANOTHER_WAY = {"discounted_returns": discounted_returns_by_episodes, "compute_gae": compute_gae_by_sums, "real_steps": real_steps_by_columns,
               "following_values": following_values_by_entries}  # fmt: skip
