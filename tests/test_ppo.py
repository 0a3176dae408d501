"""PPO on environments of every kind, under bad input and bad luck: rewards that are no numbers, environments that raise, a killed process."""

import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import safetensors.torch
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from torch import nn
from torch.testing import assert_close

from rlhf_course.agents import Categorical, make_agent
from rlhf_course.environments import RewardScaler, RunningMoments, Stream
from rlhf_course.policy_gradient import compute_gae
from rlhf_course.ppo import PPOConfig, clip_gradients, evaluate, rollout, shuffled_minibatches, train, update
from rlhf_course.surrogate import masked_variance, normalize_advantages, ppo_loss
from rlhf_course.watching import Checkpoint, LiveDashboard, dashboard

SHORT = PPOConfig(total_steps=3 * 4 * 8, n_steps=8, n_epochs=2, n_minibatches=2)
TIMING = {"seconds", "steps_per_second"}


class Clock(gym.Env):
    """Shows the step and the number of the episode, ends after `n_steps` steps; `fault(env, step)` may change the reward or raise."""

    def __init__(self, n_steps=3, truncates=False, fault=None, action_space=None):
        self.n_steps, self.truncates, self.fault, self.closed, self.total = n_steps, truncates, fault, False, 0
        self.observation_space = gym.spaces.Box(-10, 1000, (2,), np.float64)
        self.action_space = action_space or gym.spaces.Discrete(2)
        self.episode = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.episode = 0, self.episode + 1
        return np.array([self.t, self.episode], dtype=float), {}

    def step(self, action):
        self.t, self.total = self.t + 1, self.total + 1
        reward = 1.0 if self.fault is None else self.fault(self, self.total)
        over = self.t >= self.n_steps
        return np.array([self.t, self.episode], dtype=float), reward, over and not self.truncates, over and self.truncates, {}

    def close(self):
        self.closed = True


def clocks(n_envs=4, faulty=None, mode=AutoresetMode.NEXT_STEP, kind=SyncVectorEnv, **settings):
    """Environments, of which number `faulty` has the fault."""
    fault = settings.pop("fault", None)
    makers = [partial(Clock, fault=fault if i == faulty else None, **settings) for i in range(n_envs)]
    return kind(makers, autoreset_mode=mode)


def agent_for(envs, seed=0):
    """A small agent for the environments."""
    return make_agent(envs.single_observation_space, envs.single_action_space, seed, width=8)


def weights(agent):
    """All weights in one vector."""
    return nn.utils.parameters_to_vector(agent.parameters()).detach()


# Vector environments of every kind.


@pytest.mark.parametrize("kind", [SyncVectorEnv, AsyncVectorEnv])
@pytest.mark.parametrize("truncates", [False, True], ids=["terminated", "truncated"])
def test_both_autoreset_modes_give_the_same_advantages(truncates, kind):
    """The transitions are the same, so their advantages are: those of next-step mode without its masked steps."""
    found = {}
    for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
        envs = clocks(2, mode=mode, n_steps=3, truncates=truncates, kind=kind)
        agent, stream = agent_for(envs), Stream(envs)
        stream.reset(0)
        experience = rollout(stream, agent, 11 if mode == AutoresetMode.NEXT_STEP else 9, torch.Generator().manual_seed(0))
        assert experience.observations.dtype == torch.float32
        with torch.no_grad():
            final = agent(torch.tensor([[3.0, 0.0]]))[1]
        assert_close(experience.next_values[2, 0], final[0])
        advantages, _ = compute_gae(experience.rewards, experience.values, experience.next_values,
                                    experience.terminated, experience.done, experience.mask)  # fmt: skip
        found[mode] = [column[experience.mask[:, 0], 0] for column in (experience.observations, advantages)]
        assert stream.n_episodes == 6 and set(stream.episodes) == {(3.0, 3)}
        envs.close()
    for next_step, same_step in zip(*found.values(), strict=True):
        assert_close(next_step, same_step)


@pytest.mark.parametrize("kind", ["sync", "async", "vector_entry_point"])
def test_same_seed_same_numbers(kind):
    """Twice the same weights and history to the bit, from environments of each kind."""
    runs = []
    for _ in range(2):
        envs = gym.make_vec("CartPole-v1", num_envs=4, vectorization_mode=kind)
        agent = agent_for(envs)
        history = train(agent, envs, SHORT, seed=5)
        envs.close()
        runs.append((weights(agent), [{k: v for k, v in row.items() if k not in TIMING} for row in history]))
    assert torch.equal(runs[0][0], runs[1][0]) and repr(runs[0][1]) == repr(runs[1][1])


def test_measured_actions_learn():
    """A continuous probe: the reward is highest at 0.7, the torque sent is clipped, the one kept is not."""

    class Torque(Clock):
        def step(self, action):
            assert self.action_space.contains(action)
            return *super().step(action)[:1], -float((action[0] - 0.7) ** 2), True, False, {}

    envs = SyncVectorEnv([lambda: Torque(1, action_space=gym.spaces.Box(-1, 1, (1,), np.float32))] * 16)
    agent = agent_for(envs)
    train(agent, envs, PPOConfig(total_steps=16_000, n_steps=16, n_minibatches=2, learning_rate=1e-2), seed=0)
    assert evaluate(agent, envs, seed=1).mean() > -0.02
    stream = Stream(envs)
    stream.reset(0)
    agent.log_std.data.fill_(1.0)
    assert rollout(stream, agent, 32, torch.Generator().manual_seed(0)).actions.abs().max() > 1


def test_one_environment_and_uneven_minibatches():
    """One environment; 24 rows in 5 parts; more parts than rows."""
    for n_minibatches in (5, 100):
        envs = clocks(1)
        history = train(agent_for(envs), envs, replace(SHORT, n_minibatches=n_minibatches, total_steps=24), seed=0)
        assert all(math.isfinite(row["policy_loss"]) for row in history)
    generator = torch.Generator().manual_seed(0)
    assert sorted(torch.cat(list(shuffled_minibatches(24, 5, generator))).tolist()) == list(range(24))
    assert all(len(rows) for rows in shuffled_minibatches(3, 100, generator))


def test_episodes_of_one_step_and_of_none():
    """An episode of one step is one; an environment that ends in the step that reset it adds none, and gives nothing to learn."""
    envs = clocks(2, n_steps=1)
    stream = Stream(envs)
    stream.reset(0)
    experience = rollout(stream, agent_for(envs), 6, torch.Generator().manual_seed(0))
    assert experience.mask[:, 0].tolist() == [True, False] * 3 and set(stream.episodes) == {(1.0, 1)} and stream.n_episodes == 6

    class Stillborn(SyncVectorEnv):
        def step(self, actions):
            observations, rewards, _, _, infos = super().step(actions)
            return observations, 0 * rewards, np.ones(len(rewards), bool), np.zeros(len(rewards), bool), infos

    envs = clocks(2, kind=Stillborn)
    stream = Stream(envs)
    stream.reset(0)
    stream.step(torch.zeros(2, dtype=torch.long))
    n_episodes, agent = stream.n_episodes, agent_for(envs)
    experience = rollout(stream, agent, 4, torch.Generator().manual_seed(0))
    assert stream.n_episodes == n_episodes and not experience.mask.any()
    with pytest.raises(ValueError, match="at least one step that counts"):
        update(agent, torch.optim.SGD(agent.parameters()), experience, SHORT, torch.Generator())


def test_observations_that_are_written_over_are_kept():
    """An environment without copies writes each observation over the last."""
    experiences = []
    for copy in (True, False):
        envs = SyncVectorEnv([partial(Clock, 3)] * 2, copy=copy)
        stream = Stream(envs)
        stream.reset(0)
        experiences.append(rollout(stream, agent_for(envs), 8, torch.Generator().manual_seed(0)))
    for kept, written_over in zip(*experiences, strict=True):
        assert_close(kept, written_over)


# Normalisation, beside gymnasium's.


NOISE = np.random.default_rng(0).normal(size=1000)


def noisy(env, t):
    """A reward that is known."""
    return float(NOISE[t])


def test_rewards_are_scaled_as_by_gymnasium():
    """In one long episode, up to the weight 1e-4 of what gymnasium starts from; at ends gymnasium 1.4 forgets one reward too early."""
    ours, theirs = (clocks(3, n_steps=1000, faulty=1, fault=noisy) for _ in range(2))
    theirs = gym.wrappers.vector.NormalizeReward(theirs, gamma=0.9)
    stream = Stream(ours, reward_scaler=RewardScaler(3, gamma=0.9))
    stream.reset(0)
    theirs.reset(seed=0)
    for t in range(60):
        (rewards, *_), _ = stream.step(torch.zeros(3, dtype=torch.long))
        expected = theirs.step(np.zeros(3, dtype=int))[1]
        if t > 20:
            assert_close(torch.from_numpy(rewards), torch.tensor(expected, dtype=torch.float32), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_rewards_are_scaled_by_the_deviation_of_all_returns(mode):
    """All discounted sums since the start of the episodes, one after the other; nothing counts in a step that resets."""
    stream = Stream(clocks(1, n_steps=7, mode=mode, faulty=0, fault=noisy), reward_scaler=RewardScaler(1, gamma=0.9))
    stream.reset(0)
    sums, played = [], 0
    for _ in range(60):
        (rewards, _, _, mask), _ = stream.step(torch.zeros(1, dtype=torch.long))
        if mask:
            played += 1
            episode = NOISE[1 + (played - 1) // 7 * 7 : played + 1]
            sums.append(sum(0.9**k * reward for k, reward in enumerate(episode[::-1])))
            assert_close(rewards.item(), float(np.clip(NOISE[played] / np.sqrt(np.var(sums) + 1e-8), -10, 10)), rtol=1e-5, atol=1e-6)
    assert_close(stream.episodes[0][0], NOISE[1:8].sum(), msg="the returns that are reported are not scaled")


def test_observations_are_normalised_as_by_gymnasium():
    """The same observations, seen from the same statistics."""
    ours, theirs = gym.make_vec("CartPole-v1", 3), gym.wrappers.vector.NormalizeObservation(gym.make_vec("CartPole-v1", 3))
    moments = RunningMoments((4,))
    stream = Stream(ours, moments)
    stream.reset(0)
    theirs.reset(seed=0)
    for t in range(60):
        actions = torch.tensor([t % 2, 1, 0])
        stream.step(actions)
        expected = torch.tensor(theirs.step(actions.numpy())[0], dtype=torch.float32)
        if t > 20:
            assert_close(stream.observations, expected, rtol=1e-3, atol=1e-3)
    before = moments.count, moments.mean.copy()
    evaluate(agent_for(ours), gym.make_vec("CartPole-v1", 3), seed=1, observation_norm=moments)
    assert before[0] == moments.count and np.array_equal(before[1], moments.mean), "evaluation does not learn"


# Bad input.


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scaled", [False, True])
def test_rewards_that_are_no_numbers_stop_the_run(bad, scaled):
    """With the index of the environment and the step; all environments are closed."""
    envs = clocks(4, faulty=2, n_steps=100, fault=lambda env, t: bad if t == 6 else 1.0)
    with pytest.raises(ValueError, match=f"rewards.*{bad} from environment 2 in step 5"):
        train(agent_for(envs), envs, SHORT, reward_scaler=RewardScaler(4) if scaled else None)
    assert all(env.closed for env in envs.envs)


def test_observations_that_are_no_numbers_stop_the_run():
    """What the agent makes of them is not finite; the error shows the observation."""

    class Blind(Clock):
        def step(self, action):
            observation, *others = super().step(action)
            return np.full_like(observation, math.nan) if self.total == 3 else observation, *others

    envs = SyncVectorEnv([Clock, Blind])
    with pytest.raises(ValueError, match=r"finite values, got nan in row 3, environment 1, from the observation \[nan, nan\]"):
        train(agent_for(envs), envs, SHORT)


def raise_in_step_six(env, t):
    """A fault."""
    if t == 6:
        raise ZeroDivisionError("no wheel")
    return 1.0


@pytest.mark.parametrize("kind", [SyncVectorEnv, AsyncVectorEnv])
def test_environment_that_raises_is_named(kind):
    """The others are closed, no process is left behind, and the first error is the cause."""
    envs = clocks(4, faulty=2, kind=kind, n_steps=100, fault=raise_in_step_six)
    processes = list(getattr(envs, "processes", []))
    with pytest.raises(RuntimeError, match=r"environment 2 raised ZeroDivisionError in step 5: no wheel") as caught:
        train(agent_for(envs), envs, SHORT)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert not any(process.is_alive() for process in processes) and not multiprocessing.active_children()
    assert kind is AsyncVectorEnv or all(env.closed for env in envs.envs)


def test_mismatched_spaces_are_refused():
    """An agent for other observations, other actions, or another kind of action."""
    envs = clocks(2)
    for observations, actions in [(3, gym.spaces.Discrete(2)), (2, gym.spaces.Discrete(3)), (2, gym.spaces.Box(-1, 1, (2,)))]:
        agent = make_agent(gym.spaces.Box(-1, 1, (observations,)), actions)
        with pytest.raises(ValueError, match="train: `agent` should be"):
            train(agent, clocks(2), SHORT)
    with pytest.raises(RuntimeError, match="not equivalent"):  # gymnasium's own
        SyncVectorEnv([lambda: Clock(), lambda: gym.make("CartPole-v1")])
    train(agent_for(envs), envs, SHORT)


BOX, TWO = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)
UNSUPPORTED = {"dict": (gym.spaces.Dict(x=BOX), TWO, "FlattenObservation"), "tuple": (gym.spaces.Tuple([BOX]), TWO, "FlattenObservation"),
               "discrete": (TWO, TWO, "one-hot"), "multi-binary": (gym.spaces.MultiBinary(3), TWO, "FlattenObservation"),
               "multi-binary actions": (BOX, gym.spaces.MultiBinary(3), "TransformAction"),
               "multi-discrete actions": (BOX, gym.spaces.MultiDiscrete([2, 2]), "TransformAction"),
               "matrix actions": (BOX, gym.spaces.Box(-1, 1, (2, 2)), "TransformAction"),
               "images": (gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), TWO, "convolutional")}  # fmt: skip


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_spaces_say_what_to_use(case):
    """The message names what was found and what helps."""
    observations, actions, help_with = UNSUPPORTED[case]
    with pytest.raises(ValueError, match=help_with):
        make_agent(observations, actions)


def test_environments_without_autoreset_are_refused():
    """Gymnasium has a third mode, in which the user resets."""
    with pytest.raises(ValueError, match="autoreset_mode"):
        train(agent_for(clocks(2)), clocks(2, mode=AutoresetMode.DISABLED), SHORT)


@pytest.mark.parametrize("setting", [{"gamma": 1.01}, {"gamma": -0.1}, {"gamma": math.nan}, {"gae_lambda": 2}, {"n_steps": 0}, {"n_epochs": 1.5},
                                     {"n_minibatches": -1}, {"learning_rate": 0}, {"clip_coef": -0.2}, {"max_grad_norm": 0},
                                     {"target_kl": 0}, {"vf_clip_coef": -1}, {"total_steps": 0}], ids=str)  # fmt: skip
def test_settings_outside_their_range_are_named(setting):
    """The error names the setting."""
    with pytest.raises(ValueError, match=f"PPOConfig: `{next(iter(setting))}`"):
        PPOConfig(**setting)
    if "gamma" in setting:
        with pytest.raises(ValueError, match="RewardScaler: `gamma`"):
            RewardScaler(2, **setting)


# Bad luck.

TRAINING = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background has Ctrl-C switched off
import gymnasium as gym
from rlhf_course.agents import make_agent
from rlhf_course.environments import RewardScaler, RunningMoments
from rlhf_course.ppo import PPOConfig, train
from rlhf_course.watching import Checkpoint
from safetensors.torch import save_file

folder, n_updates = sys.argv[1], 12
envs = gym.make_vec("CartPole-v1", num_envs=4, vectorization_mode=sys.argv[2])
agent = make_agent(envs.single_observation_space, envs.single_action_space, width=8)

def tell(agent, history):
    print("update", len(history), flush=True)
    time.sleep(float(sys.argv[3]))  # so that who wants to kill it is in time

train(agent, envs, PPOConfig(total_steps=n_updates * 4 * 16, n_steps=16), seed=3, observation_norm=RunningMoments((4,)),
      reward_scaler=RewardScaler(4), checkpoint=Checkpoint(f"{folder}/run.safetensors", every=3), callback=tell)
save_file({name: tensor.contiguous() for name, tensor in agent.state_dict().items()}, f"{folder}/weights.safetensors")
envs.close()
"""


def start(folder, kind="sync", pause=0.0, **settings):
    """A process that trains, with a pause after each update."""
    return subprocess.Popen([sys.executable, "-c", TRAINING, str(folder), kind, str(pause)], stdout=subprocess.PIPE, text=True, **settings)


def wait_for(process, line):
    """Read what the process prints until it has printed a line."""
    for printed in process.stdout:
        if printed.strip() == line:
            return
    raise AssertionError(f"the process never printed {line!r}")


def test_killed_run_ends_as_an_undisturbed_one(tmp_path):
    """SIGKILL after the fourth and again after the eighth update; the third start runs through. Same weights to the bit."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    through = start(undisturbed)
    assert through.communicate(timeout=60) and through.returncode == 0
    for line in ("update 4", "update 8"):
        process = start(killed, pause=0.5)
        wait_for(process, line)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (killed / "weights.safetensors").exists()
    last = start(killed)
    printed, _ = last.communicate(timeout=60)
    assert last.returncode == 0 and printed.split("\n")[0] in ("update 7", "update 10"), printed
    expected, found = (safetensors.torch.load_file(folder / "weights.safetensors") for folder in (undisturbed, killed))
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def descendants(pid):
    """The processes that a process has started and that are alive."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_interrupt_leaves_no_process_behind(tmp_path):
    """Ctrl-C reaches the whole group, as in a terminal; the workers of AsyncVectorEnv are gone afterwards."""
    process = start(tmp_path, "async", pause=0.5, start_new_session=True, stderr=subprocess.DEVNULL)
    wait_for(process, "update 2")
    workers = descendants(process.pid)
    assert len(workers) >= 4
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) != 0
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if os.path.exists(f"/proc/{pid}")]


def test_checkpoint_of_another_run_is_refused(tmp_path):
    """Other settings, another seed, a file that is none."""
    path = tmp_path / "deeper" / "run.safetensors"
    for seed, config in ((0, SHORT), (1, SHORT), (0, replace(SHORT, gamma=0.5))):
        envs = clocks(4)
        if path.exists():
            with pytest.raises(ValueError, match="same settings.*" + ("seed" if seed else "config")):
                train(agent_for(envs), envs, config, seed, checkpoint=Checkpoint(path, every=1))
        else:
            train(agent_for(envs), envs, config, seed, checkpoint=Checkpoint(path, every=1))
    assert [file.name for file in path.parent.iterdir()] == ["run.safetensors"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not the checkpoint of a run"):
        train(agent_for(envs), clocks(4), SHORT, 0, checkpoint=Checkpoint(path, every=1))


def test_checkpoint_takes_settings_from_numpy(tmp_path):
    """A learning rate out of `np.linspace` is a number like any other."""
    config = replace(SHORT, learning_rate=np.float64(0.003), gamma=np.float32(0.9))
    for _ in range(2):
        envs = clocks(4)
        assert len(train(agent_for(envs), envs, config, checkpoint=Checkpoint(tmp_path / "run", every=1))) > 1


@pytest.mark.parametrize("every", [0, -1, 2.0, None])
def test_checkpoint_without_an_interval(every, tmp_path):
    """Refused where it is made, not when the first update is over."""
    with pytest.raises(ValueError, match="Checkpoint: `every` should be a whole number from 1 on"):
        Checkpoint(tmp_path / "run", every=every)


def test_checkpoints_that_no_long_episode_survives(tmp_path):
    """A warning says that the longest episodes are never counted, and what to do."""
    for every, fits in ((31, False), (32, True)):
        envs = gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode="vector_entry_point")
        config = replace(SHORT, total_steps=2 * 16, n_steps=16)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            train(agent_for(envs), envs, config, checkpoint=Checkpoint(tmp_path / f"{every}", every=every))
        assert [("every=32" in str(warning.message)) for warning in told] == [True] * (not fits)


def test_actions_that_are_impossible():
    """A logit of minus infinity is an action that is never taken: no NaN in entropy, loss or gradient."""
    logits = torch.tensor([[0.0, 1.0, -math.inf], [0.0, -math.inf, -math.inf]], requires_grad=True)
    policy = Categorical(logits)
    assert torch.allclose(policy.entropy(), torch.tensor([0.5822, 0.0]), atol=1e-4)
    (policy.entropy().sum() + policy.log_prob(torch.tensor([0, 0])).sum()).backward()
    assert logits.grad.isfinite().all() and logits.grad[0, 0] != 0 and (logits.grad[:, 2] == 0).all()
    assert not (policy.sample(torch.Generator().manual_seed(0)) == 2).any()


def test_nothing_has_no_variance_and_no_advantages():
    """Empty tensors give 0 and empty tensors."""
    assert masked_variance(torch.empty(0)) == 0 and normalize_advantages(torch.empty(0)).shape == (0,)
    none, flags = torch.empty(0, 3), torch.empty(0, 3, dtype=torch.bool)
    assert [tuple(result.shape) for result in compute_gae(none, none, none, flags, flags)] == [(0, 3), (0, 3)]


def test_finished_run_is_not_trained_again(tmp_path):
    """Its history comes back, and its weights."""
    runs = []
    for _ in range(2):
        envs = clocks(4)
        agent = agent_for(envs)
        runs.append((train(agent, envs, SHORT, checkpoint=Checkpoint(tmp_path / "run", every=1)), weights(agent)))
    assert repr(runs[0][0]) == repr(runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


# What is watched.


def test_dashboard_before_the_first_episode_has_ended():
    """Return and length are NaN then; the figure can be drawn, and the live one is quiet in a test."""
    envs = clocks(4, n_steps=1000)
    live = LiveDashboard(every=1)
    history = train(agent_for(envs), envs, SHORT, callback=live)
    assert math.isnan(history[0]["return_mean"]) and history[0]["episodes"] == 0
    assert dashboard(history[:1])._repr_png_()[:4] == b"\x89PNG" and live.picture is None


def test_evaluation_of_episodes_that_never_end_stops():
    """Without a time limit it would wait for ever."""
    envs = clocks(2, n_steps=10**9)
    with pytest.raises(ValueError, match="time limit"):
        evaluate(agent_for(envs), envs, seed=0, max_steps=50)


def test_callback_stops_the_run():
    """After the update at which it says so."""
    envs = clocks(4)
    assert len(train(agent_for(envs), envs, SHORT, callback=lambda agent, history: len(history) == 2)) == 2


def test_rewards_of_resets_are_never_read():
    """Whatever stands in a step that only resets: the scaler's numbers are the same, and a NaN there stops nothing."""
    found = []
    for junk in (0.0, 100.0, math.nan):
        scaler = RewardScaler(1, 0.9)
        step = lambda reward, done, mask: scaler.scale(np.array([reward]), np.array([done]), np.array([mask]))[0]  # noqa: E731, B023
        step(1.0, False, True), step(1.0, True, True), step(junk, False, False)
        found.append([step(1.0, False, True) for _ in range(3)])
    assert found[0] == found[1] == found[2]

    class NoisyReset(gym.vector.VectorWrapper):
        """Rewards of resets are what the test says."""

        def step(self, actions):
            self.over = getattr(self, "done", np.zeros(self.num_envs, bool))
            observations, rewards, terminated, truncated, infos = self.env.step(actions)
            self.done = terminated | truncated
            return observations, np.where(self.over, junk, rewards), terminated, truncated, infos

    runs = []
    for junk in (0.0, 100.0, math.nan):
        envs = NoisyReset(clocks(4))
        agent = agent_for(envs)
        train(agent, envs, SHORT, reward_scaler=RewardScaler(4))
        runs.append(weights(agent))
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_weights_that_are_spoilt_are_not_saved(tmp_path):
    """A gradient that is no number stops the training; the checkpoint before it stays."""
    calls = []

    def fails_late(*args, **kwargs):
        calls.append(1)
        loss, stats = ppo_loss(*args, **kwargs)
        return (loss * math.nan if len(calls) == 9 else loss), stats

    envs = clocks(4)
    path = tmp_path / "run"
    with pytest.raises(FloatingPointError, match="norm of the gradient is nan"):
        train(agent_for(envs), envs, SHORT, checkpoint=Checkpoint(path, every=1), update_fn=partial(update, loss_fn=fails_late))
    held = safetensors.torch.load_file(path)
    assert all(tensor.isfinite().all() for name, tensor in held.items() if name.startswith("agent."))
    assert clip_gradients([nn.Parameter(torch.ones(2))], 0.5) == 0


def test_agents_of_another_kind_are_refused():
    """What is no policy, what gives one thing only, what has another number of actions: each in words, in `train` and in `evaluate`."""

    class Gives(nn.Module):
        def __init__(self, give):
            super().__init__()
            self.layer, self.give = nn.Linear(2, 2), give

        def forward(self, observations):
            scores = self.layer(observations)
            return self.give(scores)

    wrong = [lambda scores: scores, lambda scores: (scores, scores[:, 0]), lambda scores: (torch.distributions.Categorical(logits=scores), scores[:, 0]),
             lambda scores: (Categorical(scores), scores[:, 0].long()), lambda scores: (Categorical(scores.repeat(1, 3)), scores[:, 0])]
    for give in wrong:
        for function in (lambda envs: train(Gives(give), envs, SHORT), lambda envs: evaluate(Gives(give), envs, 0)):  # noqa: B023
            with pytest.raises(ValueError, match="`agent` should be"):
                function(clocks(2))
    with pytest.raises(ValueError, match="a gymnasium VectorEnv"):
        train(Gives(wrong[0]), gym.make("CartPole-v1"), SHORT)
    with pytest.raises(ValueError, match="`n_episodes`"):
        evaluate(agent_for(clocks(2)), clocks(2), 0, n_episodes=0)


def test_checkpoint_of_an_agent_of_another_size(tmp_path):
    """It is refused in words; so is a folder."""
    path = tmp_path / "run"
    envs = clocks(4)
    train(agent_for(envs), envs, SHORT, checkpoint=Checkpoint(path, every=1))
    envs = clocks(4)
    other = make_agent(envs.single_observation_space, envs.single_action_space, width=7)
    with pytest.raises(ValueError, match="with other weights"):
        train(other, envs, SHORT, checkpoint=Checkpoint(path, every=1))
    with pytest.raises(ValueError, match="not the checkpoint of a run"):
        train(agent_for(clocks(4)), clocks(4), SHORT, checkpoint=Checkpoint(tmp_path, every=1))


def test_settings_that_are_no_numbers():
    """A text, None, NaN: refused where they are set."""
    for setting in ({"learning_rate": "1e-3"}, {"gamma": None}, {"vf_coef": math.nan}, {"ent_coef": "x"}, {"clip_coef": None}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            PPOConfig(**setting)
    with pytest.raises(ValueError, match="should be a tensor, got list"):
        masked_variance([1.0, 2.0])
