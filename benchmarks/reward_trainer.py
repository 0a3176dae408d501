"""Training the course's reward model, beside TRL's RewardTrainer.

    pip install trl==1.16.0
    python benchmarks/reward_trainer.py [--data FILE]

The same Llama, comparisons, LoRA settings, optimizer, schedule, batch size and one epoch, one thread; the two take turns on
slices of the comparisons, each from the same fresh adapters, and the ratio is the median of seven rounds. TRL draws random
batches; the course's trainer packs rows and reads a prompt once. First a check that both are the same training: with equal batches
in equal order the losses agree step by step. At the end both train on all comparisons and are judged on held-out ones.

Without --data the comparisons are the Tiny Arena's, two responses to a prompt, so that no response is shared.
The aim is at least 1.5 times the comparisons per second, at no worse accuracy.
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
from transformers import PrinterCallback, TrainingArguments
from transformers.utils import logging
from trl import RewardConfig as TrlConfig
from trl import RewardTrainer as TrlTrainer

from rlhf_course.loading import comparisons_from_rows, load_comparisons
from rlhf_course.padding import LABELS, tokenize_pairs
from rlhf_course.preferences import filter_long, split_by_prompt
from rlhf_course.reward_model import RewardConfig, RewardTrainer, add_lora, evaluate_rewards, new_reward_model, reward_batches, reward_optimizer
from rlhf_course.shared_batches import PrefixCollator
from rlhf_course.tiny_arena import sample_comparisons, tiny_arena
from rlhf_course.tiny_lm import load_tiny_lm, tiny_llama, tiny_lm_folder, train_bpe_tokenizer

ROUNDS, STEPS = 7, 15
CONFIG = RewardConfig(lora_r=8, lora_alpha=16, learning_rate=1e-3, head_learning_rate=3e-3, batch_size=16)


class InOrder:
    """Batches of neighbouring rows, in order."""

    def __init__(self, n: int, batch_size: int):
        self.batches = [list(range(start, min(start + batch_size, n))) for start in range(0, n, batch_size)]

    def __iter__(self):
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def chosen_first(pairs: Dataset) -> Dataset:
    """Tokenized comparisons as TRL takes them; ties are left out before."""
    sides = [("a", "b") if label == LABELS["a"] else ("b", "a") for label in pairs["label"]]
    return Dataset.from_dict({name: [row[f"input_ids_{side[i]}"] for row, side in zip(pairs, sides)]
                              for i, name in enumerate(("chosen_ids", "rejected_ids"))})  # fmt: skip


def trl_trainer(model, pairs: Dataset, tokenizer, folder: str, order: str) -> TrlTrainer:
    """TRL's trainer on these comparisons, with the course's optimizer."""
    n_steps = -(-len(pairs) // CONFIG.batch_size)
    arguments = TrlConfig(output_dir=folder, per_device_train_batch_size=CONFIG.batch_size, num_train_epochs=1, logging_steps=1, report_to=[],
                          save_strategy="no", disable_tqdm=True, bf16=False, gradient_checkpointing=False, max_length=None, use_cpu=not torch.cuda.is_available(),
                          train_sampling_strategy=order, seed=0, dataloader_pin_memory=False)  # fmt: skip
    trainer = TrlTrainer(model=model, args=arguments, train_dataset=chosen_first(pairs), processing_class=tokenizer,
                         optimizers=reward_optimizer(model, CONFIG, n_steps))  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def our_trainer(model, pairs: Dataset, tokenizer, folder: str, sampler) -> RewardTrainer:
    """The course's trainer on these comparisons."""
    arguments = TrainingArguments(output_dir=folder, num_train_epochs=1, logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True,
                                  remove_unused_columns=False, label_names=["labels"], seed=0, dataloader_pin_memory=False)  # fmt: skip
    trainer = RewardTrainer(model=model, args=arguments, train_dataset=pairs, batch_sampler=sampler, config=CONFIG,
                            data_collator=PrefixCollator(tokenizer.pad_token_id), optimizers=reward_optimizer(model, CONFIG, len(sampler)))  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def seconds(trainer) -> float:
    """How long the training takes."""
    start = time.perf_counter()
    trainer.train()
    return time.perf_counter() - start


def losses(trainer) -> list[float]:
    """The loss of each step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def comparisons_of(path: str | None):
    """Training and held-out comparisons, tokenizer, and the folder of a language model."""
    if path is None:
        _, tokenizer = load_tiny_lm()
        rows = comparisons_from_rows(sample_comparisons(tiny_arena(), 8_000, seed=0))[0]
        train, valid = split_by_prompt(rows, valid_fraction=0.2, seed=0)
        return train, valid, tokenizer, str(tiny_lm_folder())
    rows = load_comparisons(path)[0]
    rows = rows.select(random.Random(0).sample(range(len(rows)), 1_800))
    tokenizer = train_bpe_tokenizer(sorted({text for name in ("prompt", "response_a", "response_b") for text in rows[name]}), vocab_size=4096)
    rows = filter_long(rows, tokenizer, max_prompt_tokens=128, max_response_tokens=256)[0]
    train, valid = split_by_prompt(rows, valid_fraction=0.2, seed=0)
    folder = tempfile.mkdtemp()
    tiny_llama(tokenizer, hidden_size=256, n_layers=6).save_pretrained(folder)
    return train, valid, tokenizer, folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="comparisons in one of the course's layouts; default: the Tiny Arena")
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    train, valid, tokenizer, source = comparisons_of(parser.parse_args().data)
    train = train.select([i for i, winner in enumerate(train["winner"]) if winner != "tie"])
    fresh = add_lora(new_reward_model(source, tokenizer), CONFIG)
    print(f"{len(train)} comparisons, {sum(p.numel() for p in fresh.parameters()) / 1e6:.1f}M parameters, {os.environ['OMP_NUM_THREADS']} thread")
    with tempfile.TemporaryDirectory() as folder:
        first = tokenize_pairs(train.select(range(20 * CONFIG.batch_size)), tokenizer).map(lambda row, i: {"row": i}, with_indices=True)
        ours = our_trainer(copy.deepcopy(fresh), first, tokenizer, folder, InOrder(len(first), CONFIG.batch_size))
        theirs = trl_trainer(copy.deepcopy(fresh), first, tokenizer, folder, "sequential")
        ours.train(), theirs.train()
        relative = [abs(a - b) / abs(b) for a, b in zip(losses(ours), losses(theirs), strict=True)]
        print(f"same batches, same order: {len(relative)} steps, largest relative difference of the loss {max(relative):.1e}")

        ratios, rates = [], []
        size = STEPS * CONFIG.batch_size
        for number in range(ROUNDS):
            part = train.select([(number * size + i) % len(train) for i in range(size)])
            pairs, sampler = reward_batches(part, tokenizer, CONFIG)
            mine = seconds(our_trainer(copy.deepcopy(fresh), pairs, tokenizer, folder, sampler))
            other = seconds(trl_trainer(copy.deepcopy(fresh), tokenize_pairs(part, tokenizer), tokenizer, folder, "random"))
            ratios.append(other / mine)
            rates.append((size / mine, size / other))
        mine, other = (statistics.median(column) for column in zip(*rates))
        print(f"comparisons per second: ours {mine:.1f}, TRL in random order {other:.1f}; ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")

        pairs, sampler = reward_batches(train, tokenizer, CONFIG)
        ours = our_trainer(copy.deepcopy(fresh), pairs, tokenizer, folder, sampler)
        theirs = trl_trainer(copy.deepcopy(fresh), tokenize_pairs(train, tokenizer), tokenizer, folder, "random")
        for name, trainer in (("ours", ours), ("TRL", theirs)):
            trainer.train()
            metrics, _ = evaluate_rewards(trainer.model.eval(), tokenizer, valid)
            low, high = metrics["accuracy_ci95"]
            print(f"{name:5s} accuracy on {len(valid)} held-out comparisons {metrics['accuracy']:.3f} ({low:.3f} to {high:.3f}), log-loss {metrics['log_loss']:.3f}")


if __name__ == "__main__":
    main()
