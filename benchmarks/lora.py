"""A training step with the course's LoRA layers, beside one with peft's.

    python benchmarks/lora.py [--record]

The same small Llama, batch, targets and optimizer, one thread; the two take turns, and each row is the median of seven
rounds of ten steps in milliseconds a step. The aim is a ratio of at most 1.05. `--record` keeps the numbers
in results/lora.json.
"""

import argparse
import copy
import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from peft import LoraConfig, get_peft_model
from records import keep

from rlhf_course.lora import inject_lora
from rlhf_course.tiny_lm import load_tiny_lm

ROUNDS, STEPS = 7, 10
TARGETS = {"q, k, v": ["q_proj", "k_proj", "v_proj"],
           "all linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}  # fmt: skip


def stepper(model: torch.nn.Module, ids: torch.Tensor):
    """A function that takes `STEPS` steps and gives the milliseconds of one."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def steps() -> float:
        start = time.perf_counter()
        for _ in range(STEPS):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return 1000 * (time.perf_counter() - start) / STEPS

    return steps


def main() -> None:
    """Print one row a choice of targets."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record", action="store_true", help="keep the numbers")
    options, measured = parser.parse_args(), {}
    torch.set_num_threads(1)
    base, _ = load_tiny_lm()
    ids = torch.randint(2, 300, (16, 64), generator=torch.Generator().manual_seed(0))
    for name, targets in TARGETS.items():
        ours = stepper(inject_lora(copy.deepcopy(base), targets, r=16, alpha=32).train(), ids)
        theirs = stepper(get_peft_model(copy.deepcopy(base), LoraConfig(r=16, lora_alpha=32, target_modules=targets)).train(), ids)
        ours(), theirs()  # the first steps allocate
        times = [(ours(), theirs()) for _ in range(ROUNDS)]
        mine, other = (statistics.median(column) for column in zip(*times))
        ratio = statistics.median(a / b for a, b in times)
        print(f"{name:12s} ours {mine:7.1f} ms   peft {other:7.1f} ms   ratio {ratio:.3f}")
        measured[name] = {"ours_milliseconds": mine, "peft_milliseconds": other, "ratio": ratio}
    if options.record:
        keep("lora", {"rounds": ROUNDS, "steps": STEPS, "targets": TARGETS, "r": 16, "batch": [16, 64]}, measured)


if __name__ == "__main__":
    main()
