"""The lab of PPO: trainings repeat to the bit on every environment, and one update equals Stable-Baselines3's where it is installed."""

import importlib.util
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

from rlhf_course.ppo_lab import SETTINGS, solve


def short(setting):
    """The same setting for two updates."""
    return replace(setting, config=replace(setting.config, total_steps=2 * setting.n_envs * setting.config.n_steps))


@pytest.mark.parametrize("env_id", list(SETTINGS))
def test_one_seed_gives_one_result(env_id):
    """The same weights and normalisers for the same seed, others for another."""
    first, again, other = (solve(env_id, seed, short(SETTINGS[env_id])) for seed in (3, 3, 4))
    weights = [torch.nn.utils.parameters_to_vector(solution.agent.parameters()) for solution in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    if first.observation_norm is not None:
        assert (first.observation_norm.mean == again.observation_norm.mean).all()
        assert (first.observation_norm.mean != other.observation_norm.mean).any()


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_one_update_equals_that_of_stable_baselines3(env_id, monkeypatch):
    """Advantages, losses, gradients and weights to 1e-5, as benchmarks/ppo_sb3.py records them."""
    pytest.importorskip("stable_baselines3", reason="benchmark-only: pip install --no-deps stable-baselines3==2.9.2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spec = importlib.util.spec_from_file_location("ppo_sb3", ROOT / "benchmarks" / "ppo_sb3.py")
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ppo_sb3", benchmark)
    spec.loader.exec_module(benchmark)
    found = benchmark.parity(env_id, seed=11)
    sizes = {name: found.pop(name) for name in ("clipfrac", "largest_gradient")}
    assert max(found.values()) < 1e-5, found
    assert sizes["clipfrac"] > 0 and sizes["largest_gradient"] > 1e-2
