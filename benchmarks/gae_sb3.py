"""Advantages and returns of `compute_gae`, beside those of Stable-Baselines3's rollout buffer.

    pip install --no-deps stable-baselines3
    python benchmarks/gae_sb3.py

Both get the same rollouts: 128 steps of 8 environments, episodes that terminate and episodes that are truncated, float32, over
settings of gamma and lambda. Stable-Baselines3 has no next values: it adds gamma times the value of the final observation to the
reward of a truncated step, as its collect_rollouts does, and cuts at every end. For each of five seeds: the largest difference
over 20 rollouts, of values of size 1 (the aim is 1e-5), and the ratio of the times of the two computations, the median of
seven rounds in which they take turns. The numbers are kept in results/gae_sb3.json.
"""

import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import stable_baselines3
import torch
from gymnasium.spaces import Box, Discrete
from stable_baselines3.common.buffers import RolloutBuffer

from rlhf_course.checks import load_result, record_result
from rlhf_course.policy_gradient import compute_gae, following_values

T, N, ROLLOUTS, ROUNDS = 128, 8, 20, 7
SETTINGS = [(0.99, 0.95), (0.98, 0.8), (0.9, 0.0), (1.0, 1.0), (0.5, 1.0), (0.0, 0.9)]


def random_rollout(seed: int) -> dict[str, torch.Tensor]:
    """A rollout in same-step mode: rewards, values, last and final values, terminated and truncated flags."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values, final_values = torch.randn(3, T, N, generator=generator)
    terminated, truncated = torch.rand(2, T, N, generator=generator) < 0.03
    return {"rewards": rewards, "values": values, "last_values": torch.randn(N, generator=generator), "final_values": final_values,
            "terminated": terminated, "truncated": truncated & ~terminated}  # fmt: skip


def ours(rollout: dict[str, torch.Tensor], gamma: float, gae_lambda: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns by the course's functions."""
    done = rollout["terminated"] | rollout["truncated"]
    following = following_values(rollout["values"], rollout["last_values"], done, rollout["final_values"])
    return compute_gae(rollout["rewards"], rollout["values"], following, rollout["terminated"], done, gamma=gamma, gae_lambda=gae_lambda)


def filled_buffer(rollout: dict[str, torch.Tensor], gamma: float, gae_lambda: float) -> RolloutBuffer:
    """Stable-Baselines3's buffer with the rollout in it; truncated steps take gamma times their final value into the reward."""
    buffer = RolloutBuffer(T, Box(-1, 1, (1,)), Discrete(2), device="cpu", gamma=gamma, gae_lambda=gae_lambda, n_envs=N)
    done = (rollout["terminated"] | rollout["truncated"]).numpy()
    rewards = (rollout["rewards"] + gamma * rollout["final_values"] * rollout["truncated"]).numpy()
    nothing, start = np.zeros((N, 1)), np.zeros(N)
    for t in range(T):
        buffer.add(nothing, nothing, rewards[t], start, rollout["values"][t], torch.zeros(N))
        start = done[t]
    return buffer


def theirs(buffer: RolloutBuffer, rollout: dict[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and returns of a filled buffer."""
    buffer.compute_returns_and_advantage(rollout["last_values"], (rollout["terminated"] | rollout["truncated"])[-1].numpy())
    return buffer.advantages, buffer.returns


def largest_difference(gamma: float, gae_lambda: float, seeds: range) -> float:
    """The largest difference of an advantage or a return over all rollouts."""
    worst = 0.0
    for seed in seeds:
        rollout = random_rollout(seed)
        both = zip(ours(rollout, gamma, gae_lambda), theirs(filled_buffer(rollout, gamma, gae_lambda), rollout))
        worst = max([float(np.abs(mine.numpy() - other).max()) for mine, other in both] + [worst])
    return worst


def seconds(function, *args) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def compare(seed: int) -> dict[str, dict[str, float]]:
    """Largest difference and ratio of times for each setting."""
    rows = {}
    for gamma, gae_lambda in SETTINGS:
        rollout = random_rollout(1_000 * seed)
        buffer = filled_buffer(rollout, gamma, gae_lambda)
        times = [(seconds(ours, rollout, gamma, gae_lambda), seconds(theirs, buffer, rollout)) for _ in range(ROUNDS)]
        rows[f"gamma {gamma:g}, lambda {gae_lambda:g}"] = {
            "largest_difference": largest_difference(gamma, gae_lambda, range(1_000 * seed, 1_000 * seed + ROLLOUTS)),
            "time_ours_over_theirs": statistics.median(a / b for a, b in times)}  # fmt: skip
    return rows


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(__file__).parent / "results"
    config = {"T": T, "N": N, "rollouts": ROLLOUTS, "rounds": ROUNDS, "settings": SETTINGS, "stable_baselines3": stable_baselines3.__version__}
    record_result("gae_sb3", config, compare, seeds=range(5), folder=folder)
    values = load_result("gae_sb3", config, folder=folder)["values"].values()
    for name in next(iter(values)):
        worst = max(value[name]["largest_difference"] for value in values)
        ratio = statistics.median(value[name]["time_ours_over_theirs"] for value in values)
        print(f"{name:24s} largest difference {worst:.1e}   time, ours / theirs {ratio:.2f}")


if __name__ == "__main__":
    main()
