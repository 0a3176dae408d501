"""Training the course's reward model, beside TRL's RewardTrainer.

    pip install --no-deps trl==1.16.0
    python benchmarks/reward_trainer.py [--data FILE] [--record]

The same Llama, comparisons, LoRA settings, optimizer, schedule, batch size and one epoch, one thread; the two take turns on
slices of the comparisons, each from the same fresh adapters, and the ratio is the median of seven rounds. TRL draws random
batches; the course's trainer packs rows and reads a prompt once. First a check that both are the same training: with equal batches
in equal order the losses agree step by step. At the end both train on all comparisons and are judged on fresh ones, and what the
course saved is loaded as TRL's reward model, by its trainer and by the function that its PPO asks for rewards.

Without --data the comparisons are the Tiny Arena's, two responses to a prompt, so that no response is shared.
The aim is at least 1.5 times the comparisons per second, at no worse accuracy. --record writes down what lesson 04 shows.
"""

import argparse
import copy
import os
import random
import statistics
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import trl
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar as disable_progress_bars
from transformers import AutoModelForSequenceClassification, PrinterCallback, TrainingArguments
from transformers.utils import logging
from trl import RewardConfig as TrlConfig
from trl import RewardTrainer as TrlTrainer
from trl.experimental.utils import get_reward

from rlhf_course.checks import record_result
from rlhf_course.loading import comparisons_from_rows, load_comparisons
from rlhf_course.padding import LABELS, encode_conversations, pad_batch, tokenize_pairs
from rlhf_course.preferences import filter_long, split_by_prompt
from rlhf_course.reward_model import RewardConfig, RewardTrainer, add_lora, evaluate_rewards, reward_batches, reward_optimizer, save_reward_model
from rlhf_course.scoring import new_reward_model, score_responses
from rlhf_course.shared_batches import PrefixCollator
from rlhf_course.tiny_arena import sample_comparisons, tiny_arena
from rlhf_course.tiny_lm import load_tiny_lm, tiny_llama, tiny_lm_folder, train_bpe_tokenizer

CONFIG = RewardConfig(lora_r=8, lora_alpha=16, learning_rate=1e-3, head_learning_rate=3e-3, batch_size=16)
RECORD = "04_reward_model_trl"
SETTINGS = {"n_comparisons": 2_000, "n_fresh": 5_600, "fresh_seed": 1_000_000, "rounds": 7, "steps_a_round": 6, "parity_steps": 20, "batch_size": 16, "lora_r": 8}


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


def as_trl_loads_it(folder: Path, tokenizer, comparisons) -> dict[str, float]:
    """The largest difference between the scores of what was saved, as the course reads them and as TRL does, and the largest score."""
    saved = str(folder / "merged")
    rows = comparisons.select(range(64))
    prompts, responses = rows["prompt"][:], rows["response_a"][:]
    ours = score_responses(AutoModelForSequenceClassification.from_pretrained(saved), tokenizer, prompts, responses)
    arguments = TrlConfig(output_dir=str(folder), report_to=[], bf16=False, use_cpu=True, max_length=None)
    trainer = TrlTrainer(model=saved, args=arguments, train_dataset=chosen_first(tokenize_pairs(rows, tokenizer)), processing_class=tokenizer)
    input_ids, mask = pad_batch(encode_conversations(prompts, responses, tokenizer), tokenizer.pad_token_id)
    model = trainer.model.eval()
    with torch.no_grad():
        theirs = model(input_ids=input_ids, attention_mask=mask).logits[:, 0]
        in_ppo = get_reward(model, input_ids, tokenizer.pad_token_id, 0)[1]
    return {"trainer": float((theirs - ours).abs().max()), "ppo": float((in_ppo - ours).abs().max()), "largest_score": float(ours.abs().max())}


def comparisons_of(path: str | None):
    """Training and held-out comparisons, tokenizer, and the folder of a language model."""
    if path is None:
        _, tokenizer = load_tiny_lm()
        rows = [sample_comparisons(tiny_arena(), SETTINGS["n_comparisons"], seed=0),
                sample_comparisons(tiny_arena(), SETTINGS["n_fresh"], seed=SETTINGS["fresh_seed"], responses_per_prompt=8)]  # fmt: skip
        train, fresh = (comparisons_from_rows(part)[0] for part in rows)
        return train, fresh, tokenizer, str(tiny_lm_folder())
    rows = load_comparisons(path)[0]
    rows = rows.select(random.Random(0).sample(range(len(rows)), 900))
    tokenizer = train_bpe_tokenizer(sorted({text for name in ("prompt", "response_a", "response_b") for text in rows[name]}), vocab_size=4096)
    rows = filter_long(rows, tokenizer, max_prompt_tokens=128, max_response_tokens=256)[0]
    train, valid = split_by_prompt(rows, valid_fraction=0.2, seed=0)
    folder = tempfile.mkdtemp()
    tiny_llama(tokenizer, hidden_size=256, n_layers=6).save_pretrained(folder)
    return train, valid, tokenizer, folder


def compare(path: str | None) -> dict[str, object]:
    """Parity, speed, accuracy and saved scores of the two trainers."""
    train, fresh, tokenizer, source = comparisons_of(path)
    train = train.select([i for i, winner in enumerate(train["winner"]) if winner != "tie"])
    untrained = add_lora(new_reward_model(source, tokenizer), CONFIG)
    size, steps = CONFIG.batch_size, SETTINGS["steps_a_round"] if path is None else 4
    with tempfile.TemporaryDirectory() as folder:
        first = tokenize_pairs(train.select(range(SETTINGS["parity_steps"] * size)), tokenizer)
        first = first.add_column("row", list(range(len(first))))
        ours = our_trainer(copy.deepcopy(untrained), first, tokenizer, folder, InOrder(len(first), size))
        theirs = trl_trainer(copy.deepcopy(untrained), first, tokenizer, folder, "sequential")
        ours.train(), theirs.train()
        relative = [abs(a - b) / abs(b) for a, b in zip(losses(ours), losses(theirs), strict=True)]

        rates = []
        for number in range(SETTINGS["rounds"]):
            part = train.select([(number * steps * size + i) % len(train) for i in range(steps * size)])
            pairs, sampler = reward_batches(part, tokenizer, CONFIG)
            mine = seconds(our_trainer(copy.deepcopy(untrained), pairs, tokenizer, folder, sampler))
            other = seconds(trl_trainer(copy.deepcopy(untrained), tokenize_pairs(part, tokenizer), tokenizer, folder, "random"))
            rates.append((len(part) / mine, len(part) / other))

        pairs, sampler = reward_batches(train, tokenizer, CONFIG)
        ours = our_trainer(copy.deepcopy(untrained), pairs, tokenizer, folder, sampler)
        theirs = trl_trainer(copy.deepcopy(untrained), tokenize_pairs(train, tokenizer), tokenizer, folder, "random")
        judged = {}
        for name, trainer in (("ours", ours), ("TRL", theirs)):
            trainer.train()
            judged[name] = evaluate_rewards(trainer.model.eval(), tokenizer, fresh)[0]
        save_reward_model(ours.model, tokenizer, folder)
        saved = as_trl_loads_it(Path(folder), tokenizer, fresh)
    return {"trl": trl.__version__, "n_parameters": sum(p.numel() for p in untrained.parameters()), "n_train": len(train), "n_fresh": len(fresh),
            "parity": max(relative), "parity_steps": len(relative), "rates": rates, "judged": judged, "saved": saved}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="comparisons in one of the course's layouts; default: the Tiny Arena")
    parser.add_argument("--record", action="store_true", help="write the Tiny Arena's result to nbs/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    warnings.simplefilter("ignore")
    found = compare(options.data)
    if options.record and options.data is None:
        record_result(RECORD, SETTINGS, lambda seed: found, seeds=(0,), folder=Path(__file__).resolve().parents[1] / "nbs" / "results")
    ratios = [mine / other for mine, other in found["rates"]]
    mine, other = (statistics.median(column) for column in zip(*found["rates"]))
    print(f"{found['n_train']} comparisons, {found['n_parameters'] / 1e6:.1f}M parameters, one thread, TRL {found['trl']}")
    print(f"same batches, same order: {found['parity_steps']} steps, largest relative difference of the loss {found['parity']:.1e}")
    print(f"comparisons per second: ours {mine:.1f}, TRL in random order {other:.1f}; ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    for name, metrics in found["judged"].items():
        low, high = metrics["accuracy_ci95"]
        print(f"{name:5s} accuracy on {found['n_fresh']} comparisons {metrics['accuracy']:.3f} ({low:.3f} to {high:.3f}), log-loss {metrics['log_loss']:.3f}")
    print("what was saved, loaded by TRL: " + ", ".join(f"{name} {value:.2g}" for name, value in found["saved"].items()))


if __name__ == "__main__":
    main()
