"""Quantize and dequantize a 4096 x 4096 matrix in NF4, ours beside bitsandbytes on the CPU.

    python benchmarks/quantizing.py [--record]

Both take turns, with one thread, seven times after a first round that is not counted. The aim is a median of at most three times the library's.
Prints the medians and their ratio; the exit status is 1 where the aim is missed, or where the two do not give the same values.
`--record` keeps the numbers in results/quantizing.json.
"""

import argparse
import os
import statistics
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import bitsandbytes.functional as library
import torch
from records import keep

from rlhf_course.quantization import dequantize, quantize

REPEATS, AIM, SIDE = 7, 3.0, 4096


def ours(weight: torch.Tensor) -> tuple[torch.Tensor, float, float]:
    """The values that come back, and the seconds there and back."""
    start = time.perf_counter()
    quantized = quantize(weight)
    middle = time.perf_counter()
    values = dequantize(quantized)
    return values, middle - start, time.perf_counter() - middle


def theirs(weight: torch.Tensor) -> tuple[torch.Tensor, float, float]:
    """The same by bitsandbytes."""
    start = time.perf_counter()
    codes, state = library.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    middle = time.perf_counter()
    values = library.dequantize_4bit(codes, state)
    return values, middle - start, time.perf_counter() - middle


def main() -> int:
    """Print medians and ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record", action="store_true", help="keep the numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    weight = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    times = {"rlhf_course": [], "bitsandbytes": []}
    for _ in range(REPEATS + 1):
        (mine, *seconds), (other, *other_seconds) = ours(weight), theirs(weight)
        times["rlhf_course"].append(seconds)
        times["bitsandbytes"].append(other_seconds)
    medians = {name: [statistics.median(part) for part in zip(*rounds[1:])] for name, rounds in times.items()}
    totals = {name: statistics.median(sum(one) for one in rounds[1:]) for name, rounds in times.items()}
    for name, (there, back) in medians.items():
        print(f"{name:14} quantize {1000 * there:7.0f} ms   dequantize {1000 * back:7.0f} ms   together {1000 * totals[name]:7.0f} ms")
    ratio = totals["rlhf_course"] / totals["bitsandbytes"]
    same = torch.equal(mine, other)
    print(f"ratio {ratio:.2f} (aim: at most {AIM:g}); values {'equal' if same else 'DIFFERENT'}")
    if options.record:
        keep("quantizing", {"repeats": REPEATS, "side": SIDE, "aim": AIM}, {"seconds": totals, "ratio": ratio, "values_equal": same})
    return 0 if same and ratio <= AIM else 1


if __name__ == "__main__":
    sys.exit(main())
