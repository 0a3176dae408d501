"""RLHF under bad input and bad luck: rewards that fail, prompts without room, processes killed, checkpoints torn."""

import copy
import json
import math
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3TextConfig, GPT2Config, LlamaConfig, MistralConfig

from rlhf_course import tiny_lm
from rlhf_course.reward_model import new_reward_model, score_responses
from rlhf_course.rlhf import (
    PolicyWithValue,
    RLHFConfig,
    TrainingState,
    center_rewards,
    collect_rollout,
    evaluate_tokens,
    load_checkpoint,
    rollout_advantages,
    rollout_stats,
    save_checkpoint,
    train_rlhf,
    update_policy,
)
from rlhf_course.rlhf_lab import KLSnapshots, draw_dashboard, out_of_band
from rlhf_course.tiny_arena import tiny_arena, utility
from rlhf_course.tiny_lm import encode_prompts, load_tiny_lm, sample_responses, tiny_llama, train_bpe_tokenizer
from rlhf_course.token_rewards import adapt_kl_coef, chosen_logprobs, exact_token_kl, score_rollout, shape_rewards

ARENA = tiny_arena()
MODEL, TOKENIZER = load_tiny_lm()
SMALL = RLHFConfig(n_updates=2, batch_size=8, minibatch_size=4, max_new_tokens=12, n_epochs=2, missing_end_score=-100.0)


def truth(prompts, responses):
    """The true utility."""
    return torch.tensor([utility(ARENA, p, r) for p, r in zip(prompts, responses)])


def new_policy(**options):
    """The shipped model with a value head."""
    return PolicyWithValue(copy.deepcopy(MODEL), **options)


def with_adapters():
    """The shipped model with LoRA adapters."""
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    return PolicyWithValue(get_peft_model(copy.deepcopy(MODEL), lora))


def train(policy, config=SMALL, reward_fn=truth, ref_model=MODEL, prompts=ARENA.prompts, **options):
    """The history of a short training."""
    return train_rlhf(policy, ref_model, TOKENIZER, prompts, reward_fn, config, **options)


def same_weights(a, b):
    """Whether two policies are equal to the bit."""
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# Killed, and started again. Arguments: folder of the checkpoints, file for the weights, "full" or "lora".
TRAINING = """
import sys
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[4])
from test_rlhf import MODEL, RLHFConfig, new_policy, train, with_adapters

def say(update, rollout, stats): print("update", update, flush=True)

config = RLHFConfig(n_updates=8, batch_size=16, minibatch_size=8, max_new_tokens=24, target_kl=1.0, whiten_rewards=True)
policy = with_adapters() if sys.argv[3] == "lora" else new_policy()
history = train(policy, config, ref_model=None if sys.argv[3] == "lora" else MODEL, checkpoint_dir=sys.argv[1], callbacks=[say])
save_file({name: p.detach().contiguous() for name, p in policy.named_parameters() if p.requires_grad}, sys.argv[2])
print("end", len(history), flush=True)
"""


def arguments(folder: Path, kind: str) -> list[str]:
    """The command of one training."""
    return [sys.executable, "-c", TRAINING, str(folder / "run"), str(folder / "weights.safetensors"), kind, str(Path(__file__).parent)]


@pytest.fixture(scope="module", params=["full", "lora"])
def undisturbed(request, tmp_path_factory):
    """The kind, the weights after a training that nobody disturbed, and the seconds from its first update to its end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = subprocess.Popen(arguments(folder, request.param), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    started = time.monotonic()
    said, errors = process.communicate(timeout=600)
    assert process.returncode == 0 and said.splitlines()[-1] == "end 8", errors
    return request.param, (folder / "weights.safetensors").read_bytes(), time.monotonic() - started


def killed_and_resumed(folder: Path, kind: str, after: float) -> tuple[bytes, str]:
    """The weights of a training that was killed `after` seconds from its first update, and the first line of the one that went on."""
    process = subprocess.Popen(arguments(folder, kind), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "update 0\n"
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = subprocess.run(arguments(folder, kind), capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr
    assert not list((folder / "run").glob(".checkpoint-*"))
    return (folder / "weights.safetensors").read_bytes(), again.stdout.splitlines()[0]


def test_killed_training_ends_the_same(undisturbed, tmp_path):
    """SIGKILL late in the training, so that there is a checkpoint to go on from; the same weights to the bit."""
    kind, weights, seconds = undisturbed
    resumed, first = killed_and_resumed(tmp_path, kind, 0.6 * seconds)
    assert resumed == weights and first != "update 0"


@pytest.mark.long
@pytest.mark.parametrize("number", range(4))
def test_killed_at_any_moment_ends_the_same(number, undisturbed, tmp_path):
    """SIGKILL at random moments: while sampling, in an update, while saving, before the first checkpoint."""
    kind, weights, seconds = undisturbed
    assert killed_and_resumed(tmp_path, kind, random.Random(f"{kind} {number}").uniform(0, seconds))[0] == weights


def test_torn_checkpoint_is_skipped(tmp_path):
    """A newest checkpoint with a flipped byte, and one cut short: the one before is taken, with a warning, and the end is the same."""
    config = replace(SMALL, n_updates=3)
    whole = new_policy()
    train(whole, config)
    for number, damage in enumerate((lambda data: data[: len(data) // 2], lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: b"")):
        folder = tmp_path / str(number)
        train(new_policy(), config, checkpoint_dir=folder)
        assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-3", "training.json"]
        place = folder / "checkpoint-3" / "state.safetensors"
        place.write_bytes(damage(place.read_bytes()))
        resumed = new_policy()
        with pytest.warns(UserWarning, match="checkpoint-3 is not whole"):
            history = train(resumed, config, checkpoint_dir=folder)
        assert len(history) == 3 and same_weights(resumed, whole)
        assert "policy.value_head.weight" in load_file(place)


def test_checkpoints_are_safetensors_and_json(tmp_path):
    """No pickle anywhere; the state can be read with other tools."""
    train(new_policy(), checkpoint_dir=tmp_path)
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"training.json", "state.safetensors", "state.json"}
    numbers = json.loads((tmp_path / "checkpoint-2" / "state.json").read_text())
    assert len(numbers["history"]) == 2 and numbers["rates"] == [0.0, 0.0]
    again = new_policy()
    state = TrainingState.start(again, SMALL)
    assert load_checkpoint(state, tmp_path) and len(state.history) == 2
    assert not load_checkpoint(TrainingState.start(again, SMALL), tmp_path / "nothing")


def test_finished_training_is_not_repeated(tmp_path):
    """Called again, it reads the last checkpoint and draws nothing."""
    first, again = new_policy(), new_policy()
    history = train(first, checkpoint_dir=tmp_path, checkpoint_every=5)
    assert train(again, checkpoint_dir=tmp_path, checkpoint_every=5, reward_fn=None) == history and same_weights(first, again)


@pytest.mark.parametrize(("what", "changed"), [("config", {"config": replace(SMALL, seed=1)}), ("prompts", {"prompts": ARENA.prompts[:9]})])
def test_folder_of_another_training_is_refused(what, changed, tmp_path):
    """Other settings or prompts would go on from weights that are not theirs; the error says which they are."""
    train(new_policy(), checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=f"with other {what}; .* for any other name another folder"):
        train(new_policy(), checkpoint_dir=tmp_path, **changed)
    (tmp_path / "training.json").write_text("not ours")
    with pytest.raises(ValueError, match="with other config and prompts and weights; "):
        train(new_policy(), checkpoint_dir=tmp_path)


def test_interrupted_training_says_how_to_go_on(tmp_path):
    """Ctrl-C after an update: the half-tuned policy is refused, with what to do instead; the untuned one ends as if nothing had happened."""

    def interrupt(update, rollout, stats):
        if update == 1:
            raise KeyboardInterrupt

    policy, again, whole = new_policy(), new_policy(), new_policy()
    with pytest.raises(KeyboardInterrupt):
        train(policy, checkpoint_dir=tmp_path, callbacks=[interrupt])
    with pytest.raises(ValueError, match="with other weights; .* goes on with the settings, the prompts and the untuned policy") as refused:
        train(policy, checkpoint_dir=tmp_path)
    assert "delete" not in str(refused.value)
    assert train(again, checkpoint_dir=tmp_path)[0]["update"] == 0
    train(whole)
    assert same_weights(again, whole)


def test_steps_between_checkpoints_are_whole_numbers(tmp_path):
    """0 would divide by zero at the first update; the error comes before anything is computed or written."""
    for wrong in (0, -1, 1.5):
        with pytest.raises(ValueError, match="`checkpoint_every` should be a whole number from 1 on"):
            train(new_policy(), checkpoint_dir=tmp_path / "run", checkpoint_every=wrong)
    assert not (tmp_path / "run").exists()


# Rewards that fail.


def broken_from(update: int, how):
    """A reward that is the truth until `update`, and `how` from then on."""
    calls = []

    def reward(prompts, responses):
        calls.append(len(prompts))
        return truth(prompts, responses) if len([n for n in calls if n == SMALL.batch_size]) <= update else how(prompts, responses)

    return reward


def raises(prompts, responses):
    """Fails for one of the prompts only, and names nothing."""
    raise RuntimeError("out of luck")


@pytest.mark.parametrize(("how", "words"), [
    (lambda p, r: torch.full((len(p),), math.nan), "nan for prompt"), (lambda p, r: torch.full((len(p),), -math.inf), "-inf for prompt"),
    (lambda p, r: torch.zeros(len(p), 1), r"\(8, 1\) for prompts that begin with"), (lambda p, r: torch.zeros(()), r"\(\) for prompts"),
    (lambda p, r: [0.0] * (len(p) - 1), r"\(7,\)"), (raises, "RuntimeError: out of luck, for prompt '"),
])  # fmt: skip
def test_failing_reward_is_named_and_the_last_checkpoint_stays(how, words, tmp_path):
    """The error says at which update and for which prompt; the checkpoint before it is whole, and training goes on from there."""
    with pytest.raises(ValueError, match=f"at update 1: .*({words})"):
        train(new_policy(), reward_fn=broken_from(1, how), checkpoint_dir=tmp_path)
    assert (tmp_path / "checkpoint-1").is_dir() and not (tmp_path / "checkpoint-2").exists()
    resumed, whole = new_policy(), new_policy()
    train(resumed, checkpoint_dir=tmp_path)
    train(whole)
    assert same_weights(resumed, whole)


def test_reward_that_fails_on_one_pair_names_that_pair():
    """Of a batch the pair that fails alone is found."""

    def reward(prompts, responses):
        if ARENA.prompts[5] in prompts:
            raise KeyError("unknown task")
        return truth(prompts, responses)

    with pytest.raises(ValueError, match="KeyError") as raised:
        collect_rollout(new_policy(), MODEL, TOKENIZER, list(ARENA.prompts[:8]), reward, SMALL, torch.Generator().manual_seed(0))
    assert repr(ARENA.prompts[5]) in str(raised.value) and repr(ARENA.prompts[4]) not in str(raised.value)


# Prompts, responses, prices.


def test_prompts_without_room_are_refused():
    """Longer than the model's context minus the response; and none at all."""
    with pytest.raises(ValueError, match="lower max_new_tokens"):
        train(new_policy(), prompts=[ARENA.prompts[0], "how do i make tea ? " * 120])
    with pytest.raises(ValueError, match="at least one text"):
        train(new_policy(), prompts=[])


def test_response_that_is_only_the_end_token():
    """It is one token long, has its score there, and trains."""
    policy = new_policy()
    eos = TOKENIZER.eos_token_id
    with torch.no_grad():  # the end token's row of the tied embedding, moved along the mean of what the last layer says
        head = torch.nn.Linear(policy.model.config.hidden_size, len(TOKENIZER))
        head.weight.zero_(), head.bias.zero_()
        head.bias[eos] = 50.0
    policy.model.lm_head = head
    rollout = collect_rollout(policy, copy.deepcopy(policy.model), TOKENIZER, list(ARENA.prompts[:4]), truth, SMALL, torch.Generator().manual_seed(0))
    assert rollout.responses == [""] * 4 and rollout.mask.shape == (1, 4) and rollout.ended.all()
    assert_close(rollout.rewards[0], rollout.scores)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    stats = update_policy(policy, optimizer, rollout, SMALL, torch.Generator().manual_seed(0))
    assert all(math.isfinite(value) for value in stats.values())
    with pytest.raises(ValueError, match="without tokens"):
        shape_rewards(torch.zeros(1), torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.bool), kl_coef=0.1)


def test_reward_model_with_another_tokenizer():
    """The reward reads texts: decoded by the policy's tokenizer, encoded by the reward model's, nothing lost on the way."""
    other = train_bpe_tokenizer(ARENA.prompts, vocab_size=300)
    texts = [TOKENIZER.decode(TOKENIZER(text)["input_ids"], skip_special_tokens=True) for text in ARENA.prompts[:50]]
    assert texts == list(ARENA.prompts[:50])
    assert [other.decode(other(text)["input_ids"], skip_special_tokens=True) for text in texts] == texts
    language_model = tiny_llama(other, hidden_size=64, n_layers=1)
    seen = []

    def reward(prompts, responses):
        seen.extend(responses)
        return score_responses(reward_model, other, prompts, responses)

    with tempfile.TemporaryDirectory() as folder:
        language_model.save_pretrained(folder)
        reward_model = new_reward_model(folder, other)
    centred = center_rewards(lambda p, r: reward(p, r).tolist(), MODEL, TOKENIZER, ARENA.prompts[:8], SMALL)  # a list of numbers will do
    history = train(new_policy(), reward_fn=centred)
    assert len(history) == 2 and len(other) != len(TOKENIZER) and all("<" not in text for text in seen)


def test_price_of_zero_and_below():
    """Without a price the rewards are the scores alone; a negative price is refused."""
    rollout = collect_rollout(new_policy(), tiny_llama(TOKENIZER), TOKENIZER, list(ARENA.prompts[:4]), truth, replace(SMALL, kl_coef=0.0),
                              torch.Generator().manual_seed(0))  # fmt: skip
    assert_close(rollout.rewards.sum(0), rollout.scores)
    assert rollout_stats(rollout, SMALL)["kl"] > 1  # far from a model that knows nothing
    assert len(train(new_policy(), replace(SMALL, kl_coef=0.0))) == 2
    for wrong in (-0.1, math.nan):
        with pytest.raises(ValueError, match="kl_coef"):
            replace(SMALL, kl_coef=wrong)


def test_divergence_that_explodes_stops_with_advice(tmp_path):
    """A learning rate far too high: the run ends before the limit is passed by an update, says why, and does so again when resumed."""
    config = replace(SMALL, n_updates=6, learning_rate=0.03, kl_coef=0.0, max_kl=5.0)
    with pytest.warns(UserWarning, match="raise kl_coef, lower learning_rate"):
        history = train(new_policy(), config, checkpoint_dir=tmp_path)
    assert len(history) < 6 and all(row["kl"] <= 5 for row in history)
    with pytest.warns(UserWarning, match="raise kl_coef, lower learning_rate.*name another checkpoint_dir"):
        assert train(new_policy(), config, checkpoint_dir=tmp_path) == history


def test_stop_leaves_a_checkpoint(tmp_path):
    """Between two checkpoints the training is stopped: what was done until then is kept, and going on draws the same rollout and stops again."""
    config = replace(SMALL, n_updates=6, learning_rate=0.03, kl_coef=0.0, max_kl=5.0)
    stopped, again = new_policy(), new_policy()
    with pytest.warns(UserWarning, match="stopped before update") as first:
        history = train(stopped, config, checkpoint_dir=tmp_path, checkpoint_every=100)
    assert history and [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{len(history)}"]
    with pytest.warns(UserWarning, match="stopped before update") as second:
        assert train(again, config, checkpoint_dir=tmp_path, checkpoint_every=100) == history
    stops = [[str(w.message) for w in caught if "stopped before update" in str(w.message)] for caught in (first, second)]
    assert stops[0] == stops[1] and same_weights(stopped, again)


@pytest.mark.parametrize(("name", "wrong"), [
    *((name, value) for name in ("n_updates", "batch_size", "max_new_tokens", "kl_horizon", "n_epochs", "minibatch_size") for value in (0, 2.5)),
    *((name, value) for name in ("temperature", "learning_rate", "value_learning_rate", "clip_coef", "max_grad_norm", "max_kl") for value in (0.0, -1.0, math.nan)),
    *((name, value) for name in ("gamma", "gae_lambda") for value in (-0.1, 1.1, math.nan)),
    *((name, value) for name in ("kl_coef", "vf_coef") for value in (-0.1, math.nan)), *(("missing_end_score", value) for value in (math.nan, -math.inf)),
])  # fmt: skip
def test_settings_out_of_range_are_refused(name, wrong):
    """Counts are whole numbers from 1 on, the rest lies where the formulas ask for it."""
    with pytest.raises(ValueError, match=f"RLHFConfig: `{name}` should be"):
        RLHFConfig(**{name: wrong})


def test_gradient_that_is_not_finite_is_an_error(tmp_path):
    """A value head that overflows: an error that names the update, and no checkpoint of broken weights."""
    with pytest.raises(FloatingPointError, match="at update [0-2], .*begin anew with the untuned policy .*name another checkpoint_dir"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(new_policy(), replace(SMALL, n_updates=4, value_learning_rate=1e30, vf_coef=1e30, max_kl=1e9), checkpoint_dir=tmp_path)
    for place in tmp_path.glob("checkpoint-*"):
        assert all(torch.isfinite(x).all() for x in load_file(place / "state.safetensors").values())


# What must hold for any policy.


@pytest.mark.parametrize("make", [new_policy, with_adapters, lambda: new_policy(value_model=copy.deepcopy(MODEL))], ids=["full", "lora", "own backbone"])
def test_every_kind_of_policy_trains(make):
    """Full weights, adapters (reference by switching them off), a value with its own backbone: all trainable weights move, the same seed twice gives the same."""
    first, again, untouched = make(), make(), make()
    reference = None if make is with_adapters else MODEL
    config = replace(SMALL, n_updates=3, learning_rate=3e-3 if reference is None else 3e-4)  # adapters start from 0 and need larger steps
    rows, other = (train(policy, config, ref_model=reference) for policy in (first, again))
    assert same_weights(first, again) and rows[0]["kl"] < 1e-4 < abs(rows[-1]["kl"])
    strip = lambda row: {key: value for key, value in row.items() if key != "samples_per_second"}
    assert list(map(strip, rows)) == list(map(strip, other))
    for (name, before), now in zip(untouched.named_parameters(), first.parameters(), strict=True):
        used = not (name.startswith("value_model") and "lm_head" in name)
        assert torch.equal(before, now) != (before.requires_grad and used), name


@pytest.mark.parametrize("make", [new_policy, with_adapters], ids=["full", "lora"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_says_what_a_pass_says(make, temperature):
    """Log-probabilities and values kept while sampling, and those of a pass over the finished responses; a first step from either does the same."""
    policy = make()
    for name, parameter in policy.named_parameters():
        if "lora_B" in name or name == "value_head.weight":  # neither adapters nor values that are still 0
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    reference = None if make is with_adapters else MODEL
    config = replace(SMALL, temperature=temperature, n_epochs=1, minibatch_size=SMALL.batch_size)
    prompts = list(ARENA.prompts[: SMALL.batch_size])
    once, twice = (collect_rollout(policy, reference, TOKENIZER, prompts, truth, replace(config, rescore=rescore), torch.Generator().manual_seed(0)) for rescore in (False, True))
    assert once.responses == twice.responses and torch.equal(once.mask, twice.mask) and not once.mask.all()
    for name in ("logprobs", "values", "rewards"):
        assert_close(getattr(once, name), getattr(twice, name), atol=1e-5, rtol=0)
        assert getattr(once, name)[once.mask].std() > 1e-3 and (getattr(once, name)[~once.mask] == 0).all()
    for rollout in (once, twice):
        twin = copy.deepcopy(policy)
        stats = update_policy(twin, torch.optim.Adam(twin.parameters(), lr=1e-4), rollout, config, torch.Generator().manual_seed(0))
        assert stats["clipfrac"] == 0 and abs(stats["approx_kl"]) < 1e-6 and stats["grad_norm"] > 0


def test_second_backbone_is_always_asked():
    """The sampler reads the first backbone only: without a pass there would be no values, so the setting changes nothing."""
    policy = new_policy(value_model=copy.deepcopy(MODEL))
    torch.nn.init.normal_(policy.value_head.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    once, twice = (collect_rollout(policy, MODEL, TOKENIZER, list(ARENA.prompts[:4]), truth, replace(SMALL, rescore=rescore), torch.Generator().manual_seed(0)) for rescore in (False, True))
    assert torch.equal(once.logprobs, twice.logprobs) and torch.equal(once.values, twice.values) and once.values[once.mask].std() > 1e-3


def test_training_on_what_the_sampler_kept():
    """The same seed gives the same weights to the bit, and the divergence starts from 0."""
    config = replace(SMALL, rescore=False, n_updates=3)
    policies = new_policy(), new_policy()
    rows = [train(policy, config) for policy in policies]
    assert same_weights(*policies) and abs(rows[0][0]["kl"]) < 1e-4 < abs(rows[0][-1]["kl"])


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_rewards_follow_the_settings(estimator, whiten):
    """The price of each token by the estimator that was asked for, the score on the last token, all brought to one scale if wished."""
    policy = new_policy()
    with torch.no_grad():
        for p in policy.model.parameters():
            p.mul_(1.02)
    config = replace(SMALL, kl_coef=0.3, kl_estimator=estimator, whiten_rewards=whiten)
    rollout = collect_rollout(policy, MODEL, TOKENIZER, list(ARENA.prompts[:8]), truth, config, torch.Generator().manual_seed(0))
    log_ratio = (rollout.logprobs - rollout.ref_logprobs).double()
    price = {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": (-log_ratio).exp() - 1 + log_ratio}[estimator]
    expected = torch.where(rollout.mask, -0.3 * price, 0.0)
    last = rollout.mask.sum(0) - 1
    expected[last, torch.arange(8)] += rollout.scores.double()
    kept = expected[rollout.mask]
    if whiten:
        kept = (kept - kept.mean()) / kept.std() + kept.mean()
    assert_close(rollout.rewards[rollout.mask].double(), kept, atol=1e-5, rtol=1e-5)
    assert (rollout.rewards[~rollout.mask] == 0).all() and not rollout.mask.all() and log_ratio[rollout.mask].abs().max() > 0.05


def test_padding_changes_no_gradient():
    """More padding, other ids in it, and other numbers in masked places: the same losses and gradients; the ids to the bit."""
    policy = new_policy()
    rollout = collect_rollout(policy, MODEL, TOKENIZER, list(ARENA.prompts[:6]), truth, SMALL, torch.Generator().manual_seed(0))

    def gradients(rollout):
        policy.zero_grad()
        advantages, returns = rollout_advantages(rollout, SMALL)
        logprobs, values, entropy = evaluate_tokens(policy, rollout.input_ids, rollout.attention_mask, rollout.mask, 1.0)
        (logprobs * advantages + (values - returns) ** 2 + entropy).sum().backward()
        return [p.grad.clone() for p in policy.parameters()]

    plain = gradients(rollout)
    ids = torch.where(rollout.attention_mask.bool(), rollout.input_ids, 77)
    junk = torch.where(rollout.mask, rollout.rewards, math.nan)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(replace(rollout, input_ids=ids, rewards=junk))))
    wide = [torch.cat([torch.full((6, 3), fill), x], 1) for x, fill in ((rollout.input_ids, 5), (rollout.attention_mask, 0))]
    for a, b in zip(plain, gradients(replace(rollout, input_ids=wide[0], attention_mask=wide[1]))):
        assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_snapshots_and_adaptive_price():
    """Each divergence is kept at the first rollout that reaches it; the price rises where the divergence is above its target."""
    policy = new_policy()
    snapshots = KLSnapshots(policy, at=(0.02, 0.1, 50.0))
    config = replace(SMALL, n_updates=6, learning_rate=5e-4, target_kl=0.01, kl_coef=0.05)
    history = train(policy, config, callbacks=[snapshots, lambda update, rollout, stats: {"twice": 2 * stats["kl"]}])
    due = {nats: next(row["update"] for row in history if row["kl"] >= nats) for nats in (0.02, 0.1)}
    assert {nats: row["update"] for nats, row in snapshots.rows.items()} == due and history[-1]["twice"] == 2 * history[-1]["kl"]
    prices = [0.05, *(adapt_kl_coef(row["kl_coef"], row["kl"], 0.01, config.batch_size, config.kl_horizon) for row in history)]
    assert [row["kl_coef"] for row in history] == prices[:-1] and len(set(prices)) > 2
    assert not same_weights(snapshots.restore(0.02, new_policy()), policy)
    with pytest.raises(ValueError, match="not reached"):
        snapshots.restore(50.0)
    assert isinstance(out_of_band(history), dict)


def test_dropout_is_off():
    """A model in training mode with dropout is asked twice, and says the same."""
    model = tiny_llama(TOKENIZER, hidden_size=64, n_layers=1).train()
    model.config.attention_dropout = model.model.layers[0].self_attn.attention_dropout = 0.5
    ids, mask = encode_prompts(TOKENIZER, ARENA.prompts[:2])
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)  # dropout does something
    policy = PolicyWithValue(model)
    asked = [policy(ids, mask, 3)[0] for _ in range(2)]
    assert torch.equal(*asked)


def test_training_switches_dropout_off():
    """Policy and reference handed over in training mode, with dropout: both agree in the first rollout, and the same seed gives the same."""
    model = tiny_llama(TOKENIZER, hidden_size=64, n_layers=1)
    model.config.attention_dropout = model.model.layers[0].self_attn.attention_dropout = 0.5
    ends = []
    for _ in range(2):
        policy, reference = PolicyWithValue(copy.deepcopy(model), copy.deepcopy(model)).train(), copy.deepcopy(model).train()
        history = train(policy, replace(SMALL, n_epochs=1, minibatch_size=8), ref_model=reference)
        assert abs(history[0]["kl"]) < 1e-4 and history[0]["clipfrac"] == 0 and not any(m.training for m in (*policy.modules(), *reference.modules()))
        ends.append(policy)
    assert same_weights(*ends)


def test_dashboard_without_rows_is_refused():
    """No run, and a run that has not begun."""
    for nothing in ([], [[]]):
        with pytest.raises(ValueError, match="draw_dashboard: `histories` should be"):
            draw_dashboard(nothing)


def test_finished_rows_cost_nothing():
    """Rows computed by the model after the prompt: exactly the tokens that are kept, whatever the longest response is."""
    rows = []
    model = copy.deepcopy(MODEL)
    model.register_forward_pre_hook(lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    ids, mask = encode_prompts(TOKENIZER, ARENA.prompts[:32])
    sample = sample_responses(model, ids, mask, max_new_tokens=144, eos_token_id=TOKENIZER.eos_token_id, pad_token_id=TOKENIZER.pad_token_id,
                              generator=torch.Generator().manual_seed(0))  # fmt: skip
    n_tokens = sample.response_mask.sum(1)
    assert sum(rows) == int(n_tokens.sum()) < 0.7 * sample.response_mask.numel() and len(rows) == int(n_tokens.max())


def odd_models():
    """Small models with random weights whose caches differ: plain, with absolute positions, looking back eight tokens in all layers, or in every other."""
    size = {"vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    small = {"eos_token_id": TOKENIZER.eos_token_id, "pad_token_id": TOKENIZER.pad_token_id, "bos_token_id": None}
    mixed = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2, "head_dim": 8}
    return {
        "llama": LlamaConfig(**size, **small),
        "gpt2": GPT2Config(vocab_size=len(TOKENIZER), n_embd=32, n_layer=2, n_head=2, **small),
        "mistral": MistralConfig(**size, **small, sliding_window=8),
        "gemma3": Gemma3TextConfig(**size, **small, **mixed),
    }


@pytest.mark.parametrize("name", odd_models())
def test_cache_with_room_changes_no_bit(name, monkeypatch):
    """The same tokens, log-probabilities and hidden states as with the cache of transformers, while rows end and the room is used up."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(odd_models()[name]).eval()
    ids, mask = encode_prompts(TOKENIZER, ARENA.prompts[:48])

    def draw():
        return sample_responses(model, ids, mask, max_new_tokens=100, eos_token_id=int(ids[0, -1]), pad_token_id=TOKENIZER.pad_token_id, temperature=0.5,
                                generator=torch.Generator().manual_seed(0), value_fn=lambda hidden: hidden.sum(-1))  # fmt: skip

    ours = draw()
    monkeypatch.setattr(tiny_lm, "_roomy_cache", lambda config: DynamicCache(config=config))
    theirs = draw()
    for field in ("response_ids", "response_mask", "logprobs", "ended", "values"):
        assert torch.equal(getattr(ours, field), getattr(theirs, field)), field
    assert 1 < len(ours.response_mask.sum(1).unique()) and ours.response_mask.shape[1] == 100


def test_room_is_taken_rarely():
    """A hundred tokens are written into tensors that were made four times, and what comes out can be trained on."""
    seen = []
    model = copy.deepcopy(MODEL)
    model.register_forward_hook(lambda module, args, kwargs, out: seen.append(kwargs["past_key_values"].layers[0].kept[0]), with_kwargs=True)
    ids, mask = encode_prompts(TOKENIZER, ARENA.prompts[:4])
    sample = sample_responses(model, ids, mask, max_new_tokens=100, eos_token_id=-1, pad_token_id=TOKENIZER.pad_token_id, value_fn=lambda hidden: hidden.sum(-1))
    assert len(seen) == 100 and len({id(x) for x in seen}) == 1 + 99 // 33
    assert not any(x.is_inference() for x in (sample.response_ids, sample.response_mask, sample.logprobs, sample.ended, sample.values))


def test_bfloat16_policy_trains():
    """Weights in half precision, statistics in float32."""
    policy = PolicyWithValue(copy.deepcopy(MODEL).to(torch.bfloat16))
    reference = copy.deepcopy(MODEL).to(torch.bfloat16)
    history = train(policy, ref_model=reference)
    assert len(history) == 2 and all(math.isfinite(value) for row in history for value in row.values())


def test_save_keeps_the_last_two(tmp_path):
    """Older checkpoints go only after the new one is there."""
    state = TrainingState.start(new_policy(), SMALL)
    ids, _ = encode_prompts(TOKENIZER, ARENA.prompts[:2])
    for number in range(1, 5):
        state.history.append({"update": number, "n": float(ids.numel())})
        save_checkpoint(state, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]


def test_reference_that_is_the_policy_is_refused():
    """It would move with the policy, and the divergence would be 0 for ever."""
    policy = new_policy()
    with pytest.raises(ValueError, match="shares parameters with the policy"):
        train_rlhf(policy, policy.model, TOKENIZER, ARENA.prompts, truth, SMALL)


def test_reward_that_is_no_number_is_named():
    """None in place of scores is an error that names the prompt, as an exception is."""
    prompt = ARENA.prompts[0]
    with pytest.raises(ValueError, match=re.escape(repr(prompt))):
        score_rollout(lambda prompts, responses: None, [prompt], ["boil water ."], torch.tensor([True]), -3.0)


def test_folders_of_others_are_left_alone(tmp_path):
    """A folder with checkpoints of something else is refused, and nothing in it is touched."""
    for name in ("checkpoint-1", ".checkpoint-mine"):
        folder = tmp_path / name.strip(".")
        (folder / name).mkdir(parents=True)
        (folder / name / "model.bin").write_text("days of work")
        with pytest.raises(ValueError, match="checkpoints of something else"):
            train_rlhf(new_policy(), MODEL, TOKENIZER, ARENA.prompts, truth, SMALL, checkpoint_dir=folder)
        assert (folder / name / "model.bin").read_text() == "days of work" and len(list(folder.iterdir())) == 1
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match="a folder that can be written to"):
        train_rlhf(new_policy(), MODEL, TOKENIZER, ARENA.prompts, truth, SMALL, checkpoint_dir=tmp_path / "file")


def test_reference_that_would_be_trained():
    """The value's backbone is no reference, nor is a base model of which something else than the adapters is trained."""
    shared = copy.deepcopy(MODEL)
    with pytest.raises(ValueError, match="shares parameters with the policy"):
        train_rlhf(PolicyWithValue(copy.deepcopy(MODEL), value_model=shared), shared, TOKENIZER, ARENA.prompts, truth, SMALL)
    with pytest.raises(ValueError, match="`value_model` should be a second model"):
        PolicyWithValue(shared, value_model=shared)
    policy = with_adapters()
    next(p for name, p in policy.model.named_parameters() if "norm" in name).requires_grad_(True)
    with pytest.raises(ValueError, match="where more than adapters is trained, got None, and .*norm"):
        train_rlhf(policy, None, TOKENIZER, ARENA.prompts, truth, SMALL)


@pytest.mark.parametrize("prompts", ["hello", [], ["tea", None], [1, 2]])
def test_prompts_that_are_no_texts(prompts):
    """A string is not taken for its letters; what is no text is named."""
    for function in (lambda: train_rlhf(new_policy(), MODEL, TOKENIZER, prompts, truth, SMALL), lambda: center_rewards(truth, MODEL, TOKENIZER, prompts, SMALL)):
        with pytest.raises(ValueError, match="prompts"):
            function()


def test_numbers_of_numpy_go_into_checkpoints(tmp_path):
    """A learning rate or a statistic from numpy or torch is a number like any other."""
    config = replace(SMALL, n_updates=2, learning_rate=np.float32(1e-3))
    callback = lambda update, rollout, stats: {"numpy": np.float32(1), "torch": torch.tensor(2.0)}  # noqa: E731
    for _ in range(2):
        assert len(train_rlhf(new_policy(), MODEL, TOKENIZER, ARENA.prompts, truth, config, checkpoint_dir=tmp_path, callbacks=[callback])) == 2
    for seed in (1.5, "a", -1, None):
        with pytest.raises(ValueError, match="`seed` should be a whole number"):
            replace(SMALL, seed=seed)


def test_rewards_of_tokens_want_their_shapes():
    """A score too many is not dropped in silence; a reward function may do with its lists what it likes."""
    zeros, mask = torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="`scores` should be one for each response"):
        shape_rewards(torch.ones(3), zeros, zeros, mask, kl_coef=0.1)
    with pytest.raises(ValueError, match="`ref_logprobs` should be of shape"):
        shape_rewards(torch.ones(2), zeros, torch.zeros(2, 1), mask, kl_coef=0.1)

    def greedy(prompts, responses):
        scores = [1.0 for _ in responses]
        prompts.clear(), responses.clear()
        return scores

    prompts, responses = ["a", "b"], ["c", "d"]
    assert score_rollout(greedy, prompts, responses, torch.tensor([True, True]), -3.0).tolist() == [1.0, 1.0] and prompts == ["a", "b"] and responses == ["c", "d"]


def test_tokens_that_are_impossible():
    """A logit of minus infinity has no NaN in the entropy, in its gradient or in the divergence; an id of -100 in the padding is not read."""
    logits = torch.tensor([[[0.0, 1.0, -math.inf], [0.0, 0.0, 0.0]]], requires_grad=True)
    logprobs, entropy = chosen_logprobs(logits, torch.tensor([[1, -100]]), torch.tensor([[True], [False]]))
    (logprobs.sum() + entropy.sum()).backward()
    assert entropy[0, 0].item() == pytest.approx(0.5822, abs=1e-4) and logits.grad.isfinite().all()
    assert exact_token_kl(logits.detach()[0, :1], logits.detach()[0, :1]).tolist() == [0.0]
