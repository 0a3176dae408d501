"""The course's PPO beside Stable-Baselines3's, on CartPole-v1.

    pip install --no-deps stable-baselines3==2.9.2
    python benchmarks/ppo_sb3.py [--parity]

Without its dependencies, as torch and gymnasium are there already; it also needs pandas and cloudpickle, which the course's other
libraries bring. One thread, and the two take turns, seed by seed; seconds are those of the processor, so that other work on the machine does not count.

First parity: both get the same weights and the same rollout, of CartPole-v1 and of Pendulum-v1, and take one step; advantages,
losses, gradients and new weights are compared. Then three trainings for each of five seeds: ours as `SETTINGS` has it, ours
with Stable-Baselines3's tuned settings (`SB3_SETTING`), and Stable-Baselines3 with the same. Every 2,048 steps the clock stops, the
training mean of the last 100 episodes is noted, and, until it has reached 475 once, 100 episodes are played greedily.

The aims: the training mean reaches 475 in a third of the time, greedy play in half of it, and at equal settings 1.6 times the steps a
second. The record is nbs/results/05e_ppo_lab_sb3.json, which the lesson draws; without --parity, seeds that are in it are not measured again.
"""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from rlhf_course.agents import make_agent
from rlhf_course.checks import record_result
from rlhf_course.policy_gradient import compute_gae
from rlhf_course.ppo import PPOConfig, Rollout, evaluate, update
from rlhf_course.ppo_lab import (
    SB3_EXPERIMENT, SB3_SETTING, SETTINGS, environment_speed, greedy_returns, lab_envs, solve, time_shares,
)  # fmt: skip

RESULTS = Path(__file__).resolve().parent.parent / "nbs" / "results"
EVERY, LEVEL, EPISODES = (SB3_EXPERIMENT[name] for name in ("check_every", "level", "n_episodes"))
EVALUATION_SEED = SB3_EXPERIMENT["evaluation_seed"]


def sb3_model(env_id: str, setting, seed: int, **changes) -> PPO:
    """Stable-Baselines3's PPO with our settings; its value loss has no 1/2, so its coefficient is half of ours."""
    config = setting.config
    envs = make_vec_env(env_id, n_envs=setting.n_envs, seed=seed)
    options = dict(n_steps=config.n_steps, batch_size=config.n_steps * setting.n_envs // config.n_minibatches, n_epochs=config.n_epochs,
                   learning_rate=(lambda left: config.learning_rate * left) if config.anneal_learning_rate else config.learning_rate,
                   clip_range=(lambda left: config.clip_coef * left) if config.anneal_clip else config.clip_coef,
                   gamma=config.gamma, gae_lambda=config.gae_lambda, ent_coef=config.ent_coef, vf_coef=config.vf_coef / 2,
                   max_grad_norm=config.max_grad_norm, seed=seed, device="cpu")  # fmt: skip
    return PPO("MlpPolicy", envs, **options | changes)


# Parity.


def paired_parameters(agent, policy) -> list[tuple]:
    """Each parameter of our agent with the one of Stable-Baselines3's policy that plays the same part."""
    pairs = [(agent.policy[i], policy.mlp_extractor.policy_net[i]) for i in (0, 2)] + [(agent.policy[4], policy.action_net)]
    pairs += [(agent.value[i], policy.mlp_extractor.value_net[i]) for i in (0, 2)] + [(agent.value[4], policy.value_net)]
    matched = [(getattr(a, name), getattr(b, name)) for a, b in pairs for name in ("weight", "bias")]
    return matched + ([] if agent.log_std is None else [(agent.log_std, policy.log_std)])


class OneStep(BaseCallback):
    """When the rollout is there: moves the policy off the one that gathered it, and keeps a copy of all for our side."""

    def __init__(self, agent, seed: int):
        super().__init__()
        self.agent, self.generator = agent, torch.Generator().manual_seed(seed)

    def _on_step(self) -> bool:
        return True

    @torch.no_grad()
    def _on_rollout_end(self) -> None:
        for ours, theirs in paired_parameters(self.agent, self.model.policy):
            theirs += 0.1 * torch.randn(theirs.shape, generator=self.generator)  # ratios differ from 1, some are clipped
            ours.copy_(theirs)
        buffer = self.model.rollout_buffer
        done = np.concatenate([buffer.episode_starts[1:], self.locals["dones"][None]]).astype(bool)
        actions = torch.tensor(buffer.actions).squeeze(-1).long() if self.agent.log_std is None else torch.tensor(buffer.actions)
        values = torch.tensor(buffer.values)
        # An end by a time limit is in its rewards already, so every end is a final state here.
        self.experience = Rollout(torch.tensor(buffer.observations), actions, torch.tensor(buffer.log_probs), values,
                                  torch.cat([values[1:], self.locals["values"].reshape(1, -1)]), torch.tensor(buffer.rewards),
                                  torch.tensor(done), torch.tensor(done), torch.ones_like(values, dtype=torch.bool))  # fmt: skip
        self.advantages = torch.tensor(buffer.advantages)


def parity(env_id: str, seed: int) -> dict[str, float]:
    """The largest difference between the two in one update of one minibatch, by what differs; and the share that was clipped."""
    config = PPOConfig(total_steps=256, n_steps=32, n_epochs=1, n_minibatches=1, learning_rate=1e-3, anneal_learning_rate=False,
                       gamma=0.98, gae_lambda=0.8, vf_coef=1.0, ent_coef=0.01)  # fmt: skip
    model = sb3_model(env_id, type(SB3_SETTING)(env_id, 8, config), seed)
    envs = lab_envs(env_id, 8)
    agent = make_agent(envs.single_observation_space, envs.single_action_space, seed)
    one = OneStep(agent, seed)
    model.learn(total_timesteps=256, callback=one, log_interval=None)
    optimizer = torch.optim.Adam(agent.parameters(), lr=config.learning_rate, eps=1e-5, fused=True)
    stats = update(agent, optimizer, one.experience, config, torch.Generator().manual_seed(0))
    told = model.logger.name_to_value
    advantages, _ = compute_gae(one.experience.rewards, one.experience.values, one.experience.next_values, one.experience.terminated,
                                one.experience.done, one.experience.mask, gamma=config.gamma, gae_lambda=config.gae_lambda)  # fmt: skip
    loss = stats["policy_loss"] + config.vf_coef * stats["value_loss"] - config.ent_coef * stats["entropy"]
    pairs = paired_parameters(agent, model.policy)
    largest = lambda differences: max(float(difference.abs().max()) for difference in differences)  # noqa: E731
    return {"advantages": largest([advantages - one.advantages]),
            "loss": abs(loss - float(told["train/loss"])) / max(1.0, abs(loss)),
            "policy_loss": abs(stats["policy_loss"] - float(told["train/policy_gradient_loss"])),
            "value_loss": abs(2 * stats["value_loss"] - float(told["train/value_loss"])) / max(1.0, abs(float(told["train/value_loss"]))),
            "entropy": abs(stats["entropy"] + float(told["train/entropy_loss"])),
            "gradients": largest([a.grad - b.grad for a, b in pairs]),
            "weights": largest([a.detach() - b.detach() for a, b in pairs]),
            "clipfrac": stats["clipfrac"], "largest_gradient": largest([b.grad for _, b in pairs])}  # fmt: skip


# Speed.


class Clock:
    """Seconds of the processor that training takes, which stop while a check is made; and what the checks saw."""

    def __init__(self):
        self.seconds, self.rows, self.reached = 0.0, [], False
        self.since = time.process_time()

    def lap(self, steps: int, training_mean: float, play) -> None:
        """To be called after each update; `play` gives the greedy return."""
        self.seconds += time.process_time() - self.since
        if steps // EVERY > (self.rows[-1]["steps"] if self.rows else 0) // EVERY:
            greedy = None if self.reached else play()
            self.reached = self.reached or greedy >= LEVEL
            self.rows.append({"steps": steps, "seconds": self.seconds, "training": training_mean if np.isfinite(training_mean) else None, "greedy": greedy})
        self.since = time.process_time()

    def outcome(self, steps: int, play) -> dict:
        """The record of the run."""
        return {"total_steps": steps, "total_seconds": self.seconds, "final_greedy": play(), **{name: [row[name] for row in self.rows] for name in self.rows[0]}}


def run_ours(setting, seed: int) -> dict:
    """Our training, with its checks."""
    clock = Clock()

    def greedy(agent) -> float:
        return float(evaluate(agent, lab_envs(setting.env_id, EPISODES), EVALUATION_SEED).mean())

    solution = solve(setting.env_id, seed, setting,
                     callback=lambda agent, history: clock.lap(history[-1]["steps"], history[-1]["return_mean"], lambda: greedy(agent)))  # fmt: skip
    return clock.outcome(solution.history[-1]["steps"], lambda: float(greedy_returns(solution, EPISODES, EVALUATION_SEED).mean()))


class Checks(BaseCallback):
    """Stable-Baselines3's side of the clock: a rollout begins when the update before it is over."""

    def __init__(self, play):
        super().__init__()
        self.play = play

    def _on_training_start(self) -> None:
        self.clock = Clock()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.num_timesteps:
            self.clock.lap(self.num_timesteps, float(np.mean([episode["r"] for episode in self.model.ep_info_buffer] or [np.nan])), self.play)

    _on_training_end = _on_rollout_start


def run_sb3(setting, seed: int) -> dict:
    """Stable-Baselines3's training, with the same checks."""
    model = sb3_model(setting.env_id, setting, seed)

    def greedy() -> float:
        agent = lambda observations: (model.policy.get_distribution(observations), None)  # noqa: E731
        return float(evaluate(agent, lab_envs(setting.env_id, EPISODES), EVALUATION_SEED).mean())

    checks = Checks(greedy)
    model.learn(total_timesteps=setting.config.total_steps, callback=checks, log_interval=None)
    return checks.clock.outcome(model.num_timesteps, greedy)


def one_seed(seed: int) -> dict:
    """Everything of one seed, plain JSON."""
    ours = SETTINGS["CartPole-v1"]
    outcome = {"parity": {env_id: parity(env_id, seed) for env_id in SB3_EXPERIMENT["parity"]}, "ours": run_ours(ours, seed),
               "sb3": run_sb3(SB3_SETTING, seed), "ours_at_sb3": run_ours(SB3_SETTING, seed),
               "shares": {name: time_shares(setting, seed=seed) | {"alone": environment_speed(setting.env_id, setting.n_envs)}
                          for name, setting in (("ours", ours), ("ours_at_sb3", SB3_SETTING))}}  # fmt: skip
    for name in ("ours", "sb3", "ours_at_sb3"):
        run = outcome[name]
        print(f"seed {seed} {name:12s} {run['total_steps'] / run['total_seconds']:8,.0f} steps/s   greedy return at the end {run['final_greedy']:.1f}", flush=True)
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parity", action="store_true", help="only compare one update, and print")
    torch.set_num_threads(1)
    if parser.parse_args().parity:
        for env_id in SB3_EXPERIMENT["parity"]:
            print(env_id, {name: float(f"{value:.3g}") for name, value in parity(env_id, 0).items()})
        return
    record_result("05e_ppo_lab_sb3", SB3_EXPERIMENT, one_seed, seeds=range(5), folder=RESULTS)


if __name__ == "__main__":
    main()
