"""How long a batch of 64 pairs of 256 tokens takes to collate, beside transformers' DataCollatorWithPadding.

    python benchmarks/collating.py [--record]

Each row is the median of seven rounds in milliseconds, with the rounds of all rows interleaved and one thread; a round
is the best of ten calls. The rows of a batch hold their token ids as lists, which is what a data set gives, or as numpy
arrays. The aim is about 1 ms for either. DataCollatorWithPadding gets the same 128 sequences with their masks, as it
makes a mask only where there is none. Lengths are all 256, or drawn from 64 to 256. The last two rows are what else a
flat array can be filled with. `--record` keeps the numbers in results/collating.json.
"""

import argparse
import itertools
import os
import statistics
import time

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from records import keep
from transformers import DataCollatorWithPadding

from rlhf_course.padding import PairCollator
from rlhf_course.tiny_lm import load_tiny_lm

ROUNDS, CALLS, PAIRS, LONGEST = 7, 10, 64, 256


def make_rows(lengths: np.ndarray, kind: type) -> list[dict]:
    """Rows of `tokenize_pairs` whose ids are lists or arrays."""
    rng, rows = np.random.default_rng(0), []
    for pair in lengths:
        ids = [rng.integers(1, 32_000, n) for n in pair]
        ids = [i.tolist() if kind is list else i for i in ids]
        rows.append({"input_ids_a": ids[0], "input_ids_b": ids[1], "label": 0})
    return rows


def as_features(rows: list[dict]) -> list[dict]:
    """The same sequences, one a row."""
    ids = [row[name] for name in ("input_ids_a", "input_ids_b") for row in rows]
    return [{"input_ids": i, "attention_mask": [1] * len(i)} for i in ids]


def main() -> None:
    """Print one row a way to collate."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record", action="store_true", help="keep the numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tiny_lm()[1]
    tokenizer.padding_side = "right"
    ours, theirs = PairCollator(tokenizer.pad_token_id), DataCollatorWithPadding(tokenizer)
    full = np.full((PAIRS, 2), LONGEST)
    mixed = np.random.default_rng(1).integers(64, LONGEST + 1, (PAIRS, 2))
    ways = {}
    for name, lengths in {"all 256": full, "64 to 256": mixed}.items():
        for kind in (list, np.ndarray):
            rows = make_rows(lengths, kind)
            ways[f"PairCollator, {kind.__name__}, {name}"] = lambda rows=rows: ours(rows)
            features = as_features(rows)
            ways[f"DataCollatorWithPadding, {kind.__name__}, {name}"] = lambda features=features: theirs(features)
            assert torch.equal(ours(rows)["input_ids"], theirs(features)["input_ids"])
            assert torch.equal(ours(rows)["attention_mask"], theirs(features)["attention_mask"])
    lists = [row["input_ids_a"] for row in make_rows(full, list)] * 2
    n_tokens = sum(map(len, lists))
    ways["only np.fromiter, list, all 256"] = lambda: np.fromiter(itertools.chain.from_iterable(lists), np.int64, n_tokens)
    ways["only torch.tensor, list, all 256"] = lambda: torch.tensor(lists)
    times = {name: [] for name in ways}
    for _ in range(ROUNDS + 1):
        for name, collate in ways.items():
            calls = []
            for _ in range(CALLS):
                start = time.perf_counter()
                collate()
                calls.append(1000 * (time.perf_counter() - start))
            times[name].append(min(calls))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first round warms up
    for name, value in medians.items():
        print(f"{name:48} {value:7.2f} ms")
    if options.record:
        keep("collating", {"rounds": ROUNDS, "calls": CALLS, "pairs": PAIRS, "longest": LONGEST}, {"milliseconds": medians})


if __name__ == "__main__":
    main()
