"""How long 100,000 comparisons of 200 words in all take from a file to token ids, part by part, and how much memory that needs.

    python benchmarks/loading.py [--rows 100000] [--record]

The file is JSON Lines; loading includes the checks. Tokens come from a byte-level BPE trained on the first rows, with a chat template.
They are counted, as `filter_long` needs it, and the ids found there are kept for making pairs, so that each text is tokenized once.
Generating the file and training the tokenizer are not counted in the seconds. Memory is the peak of the process that loads
and tokenizes, with its libraries. The aims are 60 s and 2 GB on two cores for loading, validating, counting and tokenizing. Beside them
stands what the tokenizer alone takes for the same texts, nothing kept: less is not possible. `--record` keeps the numbers in results/loading.json.

The record of 2026-11-27 is of one core, shared with other work, so the seconds of the processor say more in it than those of the clock. It gave the
tokenizer all texts in one call, which takes longer and more memory than the parts of a thousand of today.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from records import keep

WORDS = {"prompt": 40, "response_a": 80, "response_b": 80}  # words of each text, 200 in all
N_WORDS = 20_000  # different words, drawn with Zipf's frequencies


def random_words(rng: random.Random) -> list[str]:
    """Words of 1 to 10 letters."""
    return ["".join(rng.choices("etaoinshrdlucmfwygpbvkqjxz", k=rng.randint(1, 10))) for _ in range(N_WORDS)]


def write_file(path: Path, n_rows: int) -> None:
    """Comparisons as JSON Lines, none of them to be dropped; a prompt comes back in four rows, as when four models are asked."""
    rng = random.Random(0)
    words, weights = random_words(rng), [1 / rank for rank in range(1, N_WORDS + 1)]
    cumulative = [sum(weights[:1])]
    for weight in weights[1:]:
        cumulative.append(cumulative[-1] + weight)
    with path.open("w", encoding="utf-8") as file:
        for i in range(n_rows):
            drawn = rng.choices(words, cum_weights=cumulative, k=200)
            if i % 4 == 0:
                prompt = " ".join(drawn[:40])
            row = {"prompt": prompt, "response_a": " ".join(drawn[40:120]), "response_b": " ".join(drawn[120:]),
                   "winner": rng.choice(("a", "b", "tie"))}  # fmt: skip
            file.write(json.dumps(row) + "\n")


def peak_megabytes() -> float:
    """The most memory this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e6 / 1024)


def measure(path: Path, n_rows: int, answers: multiprocessing.Queue) -> None:
    """Load, count tokens, tokenize, and say how long each took and how much memory all of it."""
    import datasets

    from rlhf_course.loading import load_comparisons
    from rlhf_course.padding import tokenize_pairs
    from rlhf_course.preferences import count_tokens
    from rlhf_course.tiny_lm import train_bpe_tokenizer

    datasets.disable_progress_bars()
    seconds, peaks = {}, {"libraries": peak_megabytes()}

    def timed(name, function):
        wall, cpu = time.perf_counter(), time.process_time()
        result = function()
        seconds[name] = time.perf_counter() - wall, time.process_time() - cpu
        peaks[name] = peak_megabytes()
        return result

    comparisons, report = timed("load and validate", lambda: load_comparisons(path))
    assert report.n_kept == n_rows
    texts = [comparisons[i][column] for i in range(min(2000, n_rows)) for column in WORDS]
    tokenizer = train_bpe_tokenizer(texts)
    known = {}
    counted = timed("count tokens", lambda: count_tokens(comparisons, tokenizer, known))
    pairs = timed("tokenize pairs", lambda: tokenize_pairs(counted, tokenizer, known=known))
    assert len(pairs) == n_rows
    seconds["all"], peaks["all"] = tuple(map(sum, zip(*seconds.values()))), max(peaks.values())
    texts, alone = list(known), tokenizer.backend_tokenizer
    parts = [texts[i : i + 1000] for i in range(0, len(texts), 1000)]
    timed("tokenizer alone", lambda: [len(alone.encode_batch_fast(part, add_special_tokens=False)) for part in parts])
    answers.put((seconds, peaks, sum(counted["n_tokens_a"]) / n_rows))


def main() -> None:
    """Print one row a part, and what all of it comes to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000, help="how many comparisons")
    parser.add_argument("--record", action="store_true", help="keep the numbers")
    options = parser.parse_args()
    n_rows = options.rows
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "comparisons.jsonl"
        write_file(path, n_rows)
        context = multiprocessing.get_context("spawn")
        answers = context.Queue()
        child = context.Process(target=measure, args=(path, n_rows, answers))
        child.start()
        seconds, peaks, n_tokens = answers.get()
        child.join()
        print(f"{n_rows:,} comparisons of 200 words, {path.stat().st_size / 1e6:.0f} MB, {n_tokens:.0f} tokens a response")
    for name, (wall, cpu) in seconds.items():
        print(f"{name:20} {wall:7.1f} s   {cpu:7.1f} s of all cores   peak so far {peaks[name]:6.0f} MB")
    print(f"{'libraries alone':52} peak        {peaks['libraries']:6.0f} MB")
    for what, value, aim, unit in (("time", seconds["all"][0], 60, "s"), ("memory", peaks["all"], 2000, "MB")):
        print(f"{what}: {value:.0f} {unit}, {'within' if value <= aim else 'OVER'} the aim of {aim} {unit}")
    if options.record:
        keep("loading", {"rows": n_rows, "words": WORDS, "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()},
             {"seconds": {name: wall for name, (wall, _) in seconds.items()}, "cpu_seconds": {name: cpu for name, (_, cpu) in seconds.items()},
              "peak_megabytes": peaks["all"], "libraries_megabytes": peaks["libraries"], "tokens_a_response": n_tokens})  # fmt: skip


if __name__ == "__main__":
    main()
