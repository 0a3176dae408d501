"""Samples per second of a whole PPO update on a language model, beside TRL's experimental PPOTrainer.

    pip install --no-deps "trl==1.12.*"        (the last release that has one; best in an environment of its own)
    python benchmarks/rlhf_ppo.py [--record]

A Llama of 7.3 million parameters with random weights, 16 prompts of 48 tokens, 32 new tokens each, a reward model of the same size, four epochs of one
minibatch, one thread. An update is everything: sampling, log-probabilities, reference, values, reward, and the steps of the optimizer. The two
take turns, update by update, from the same weights; the ratio is the median of fifteen. TRL trains a second backbone for the values, the course's
policy has its value head on its own; `own backbone` is the course's with a second one as well, and tells how much of the ratio that is.
Both keep the log-probabilities that tokens had when they were drawn (the course's by `rescore=False`; its default, and a policy with a second backbone,
ask once more).
With LoRA both adapt queries, keys and values, and take the reference from the same weights with the adapters switched off.
The aims are at least 1.5 times TRL with full weights, and twice with LoRA. Without TRL the course's side is measured alone.
With --record benchmarks/results/rlhf_ppo.json keeps all seconds of both sides and the parts of ours.
"""

import argparse
import copy
import os
import random
import statistics
import tempfile
import time
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from records import keep
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification, PrinterCallback, TrainerCallback
from transformers.utils import logging

import rlhf_course.rlhf as rlhf
from rlhf_course.reward_model import score_responses
from rlhf_course.tiny_lm import build_tokenizer, encode_prompts, tiny_llama

ROUNDS, BATCH, PROMPT_TOKENS, NEW_TOKENS, EPOCHS = 15, 16, 48, 32, 4
LORA = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj"])
CONFIG = rlhf.RLHFConfig(n_updates=ROUNDS + 1, batch_size=BATCH, max_new_tokens=NEW_TOKENS, n_epochs=EPOCHS, minibatch_size=BATCH, learning_rate=1e-5,
                         value_learning_rate=1e-5, kl_coef=0.05, max_kl=1e9, rescore=False)  # fmt: skip


def make_prompts(tokenizer, n: int) -> list[str]:
    """Random words, as many as make PROMPT_TOKENS with what the chat template adds."""
    rng, words = random.Random(0), sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
    extra = encode_prompts(tokenizer, ["x"])[0].shape[1] - 1
    return [" ".join(rng.choices(words, k=PROMPT_TOKENS - extra)) for _ in range(n)]


class Ours:
    """The course's updates, one at a time, and the seconds that went into sampling and into the optimizer's steps."""

    def __init__(self, model, reward_model, tokenizer, prompts: list[str], lora: bool = False, own_backbone: bool = False):
        self.tokenizer, self.prompts = tokenizer, prompts
        self.ref_model = None if lora else copy.deepcopy(model)
        torch.manual_seed(0)
        tuned = get_peft_model(copy.deepcopy(model), LORA) if lora else copy.deepcopy(model)
        policy = rlhf.PolicyWithValue(tuned, copy.deepcopy(model) if own_backbone else None)
        self.state = rlhf.TrainingState.start(policy, CONFIG)
        self.reward_fn = lambda prompts, responses: score_responses(reward_model, tokenizer, prompts, responses)
        self.sampling = 0.0
        self.times: list[tuple[float, float, float]] = []

    def update(self) -> float:
        """The seconds of one update."""
        sampling, plain = 0.0, rlhf.sample_responses

        def timed(*args, **kwargs):
            nonlocal sampling
            start = time.perf_counter()
            sample = plain(*args, **kwargs)
            sampling += time.perf_counter() - start
            return sample

        rlhf.sample_responses = timed
        try:
            start = time.perf_counter()
            prompts = self.state.rng.choices(self.prompts, k=BATCH)
            rollout = rlhf.collect_rollout(self.state.policy, self.ref_model, self.tokenizer, prompts, self.reward_fn, CONFIG, self.state.generator)
            middle = time.perf_counter()
            rlhf.rollout_stats(rollout, CONFIG)
            rlhf.update_policy(self.state.policy, self.state.optimizer, rollout, CONFIG, self.state.shuffler)
            self.state.schedule.step()
            end = time.perf_counter()
        finally:
            rlhf.sample_responses = plain
        assert rollout.input_ids.shape == (BATCH, PROMPT_TOKENS + NEW_TOKENS) and rollout.mask.float().mean() > 0.8
        self.times.append((sampling, middle - start - sampling, end - middle))
        return end - start

    def shares(self) -> dict[str, float]:
        """The part of each in an update, by the medians after the first one."""
        parts = [statistics.median(column) for column in zip(*self.times[1:])]
        return {name: part / sum(parts) for name, part in zip(("sampling", "scoring", "optimizer steps"), parts)}


class TakeTurns(TrainerCallback):
    """After each update of TRL: its seconds, then one update of each of ours."""

    def __init__(self, ours: dict[str, Ours]):
        self.ours, self.seconds = ours, {name: [] for name in ("TRL", *ours)}

    def on_train_begin(self, args, state, control, **kwargs):
        """The clock starts."""
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """The other side's turn."""
        self.seconds["TRL"].append(time.perf_counter() - self.started)
        for name, side in self.ours.items():
            self.seconds[name].append(side.update())
        self.started = time.perf_counter()


def trl_side(model, reward_model, tokenizer, prompts: list[str], lora: bool, callback: TrainerCallback) -> None:
    """Lets TRL train, and the callback take turns with it."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    ids, _ = encode_prompts(tokenizer, prompts)
    value_model = copy.deepcopy(reward_model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = PPOConfig(output_dir=folder, per_device_train_batch_size=BATCH, gradient_accumulation_steps=1, num_mini_batches=1, num_ppo_epochs=EPOCHS,
                              total_episodes=BATCH * (ROUNDS + 1), response_length=NEW_TOKENS, temperature=1.0, stop_token="eos", missing_eos_penalty=1.0,
                              kl_coef=0.05, learning_rate=1e-5, num_sample_generations=0, report_to=[], save_strategy="no", bf16=False, use_cpu=True,
                              gradient_checkpointing=False, disable_tqdm=True, logging_steps=1, seed=0, local_rollout_forward_batch_size=BATCH,
                              dataloader_pin_memory=False)  # fmt: skip
        trainer = PPOTrainer(args=arguments, processing_class=tokenizer, model=copy.deepcopy(model), ref_model=None if lora else copy.deepcopy(model),
                             reward_model=reward_model, value_model=value_model, train_dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
                             eval_dataset=Dataset.from_dict({"input_ids": ids[:BATCH].tolist()}), callbacks=[callback],
                             peft_config=copy.deepcopy(LORA) if lora else None)  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="keep what was measured")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    tokenizer = build_tokenizer([f"w{i}" for i in range(2043)])
    model = tiny_llama(tokenizer, hidden_size=256, n_layers=8)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        reward_model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    assert isinstance(reward_model, LlamaForSequenceClassification)
    prompts = make_prompts(tokenizer, BATCH * (ROUNDS + 1))
    print(f"{model.num_parameters() / 1e6:.1f} million parameters, batch {BATCH}, {PROMPT_TOKENS} prompt tokens, {NEW_TOKENS} new tokens, {EPOCHS} epochs, one thread")
    measured = {}
    for kind, lora in (("full weights", False), ("LoRA", True)):
        ours = {"rlhf_course": Ours(model, reward_model, tokenizer, prompts, lora)}
        if not lora:
            ours["own backbone"] = Ours(model, reward_model, tokenizer, prompts, own_backbone=True)
        turns = TakeTurns(ours)
        try:
            trl_side(model, reward_model, tokenizer, prompts, lora, turns)
        except ImportError:
            turns.seconds.pop("TRL")
            for name, side in ours.items():
                turns.seconds[name] = [side.update() for _ in range(ROUNDS + 1)]
        for name, seconds in turns.seconds.items():
            line = f"{kind:12s} {name:12s} {BATCH / statistics.median(seconds[1:]):5.2f} samples/s"
            if name != "TRL":
                if "TRL" in turns.seconds:
                    ratios = [a / b for a, b in zip(turns.seconds["TRL"][1:], seconds[1:])]
                    line += f"   {statistics.median(ratios):.2f} times TRL ({min(ratios):.2f} to {max(ratios):.2f})"
                line += "   " + "  ".join(f"{part} {share:.0%}" for part, share in ours[name].shares().items())
            print(line, flush=True)
        measured[kind] = {"seconds": turns.seconds, "shares": {name: side.shares() for name, side in ours.items()}}
    if arguments.record:
        keep("rlhf_ppo", {"trl": "1.12", "batch_size": BATCH, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "n_epochs": EPOCHS, "rounds": ROUNDS}, measured)


if __name__ == "__main__":
    main()
