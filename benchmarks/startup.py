"""How long the package and its command take to answer, beside a bare interpreter.

    python benchmarks/startup.py

Each row is the median of seven starts in milliseconds; the commands take turns, with one thread. The aims are
under 300 ms for the import over the bare interpreter, and under 2,000 ms for the two answers of the command.
"""

import os
import statistics
import subprocess
import sys
import time

COMMANDS = {  # arguments of the interpreter, and the exit status that is right
    "python, nothing imported": (["-c", ""], 0),
    "import rlhf_course": (["-c", "import rlhf_course"], 0),
    "rlhf-course --help": (["-m", "rlhf_course", "--help"], 0),
    "rlhf-course run --data MISSING": (["-m", "rlhf_course", "run", "--data", "no_such_file.jsonl"], 2),
}
REPEATS = 7


def milliseconds(name: str) -> float:
    """The time one start takes; ends the benchmark where the command does not answer as it should."""
    arguments, expected = COMMANDS[name]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    elapsed = 1000 * (time.perf_counter() - start)
    if done.returncode != expected:
        sys.exit(f"{name}: exit status {done.returncode}, not {expected}: {done.stderr.decode()}")
    return elapsed


def main() -> None:
    """Print one row a command."""
    times = {name: [] for name in COMMANDS}
    for _ in range(REPEATS + 1):
        for name in COMMANDS:
            times[name].append(milliseconds(name))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first round warms the disk
    bare = medians["python, nothing imported"]
    for name, median in medians.items():
        print(f"{name:32} {median:7.0f} ms   {median - bare:+7.0f} ms over the bare interpreter")


if __name__ == "__main__":
    main()
