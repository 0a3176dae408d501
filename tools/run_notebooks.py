"""Test notebooks as nbdev_test does, each in a process of its own, two at a time, one thread each.

    python tools/run_notebooks.py                  every notebook of nbs/
    python tools/run_notebooks.py --slow           the cells flagged `#| slow` too
    python tools/run_notebooks.py nbs/NAME.ipynb   one notebook

Cells flagged with one of settings.ini's tst_flags, or `#| eval: false`, are left out. The time of each notebook is
printed, and the whole output of one that failed.
"""

import argparse
import sys
from pathlib import Path

from notebooks import ROOT, longest_first, notebook_paths, run_side_by_side, settings, write_times


def test_one(path: Path, force_flags: list[str]) -> bool:
    """Whether every cell of the notebook ran; tracebacks go to stderr."""
    from nbdev.test import test_nb

    passed, _ = test_nb(path, skip_flags=settings()["tst_flags"].split(), force_flags=force_flags, basepath=ROOT)
    return passed


def main() -> int:
    """Exit status: 0 where every notebook passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", nargs="*", help="notebooks to run; all of nbs/ if none is named")
    parser.add_argument("--slow", action="store_true", help="run the cells flagged `#| slow` too")
    parser.add_argument("--in-process", action="store_true", help="run one notebook here; the other processes use this")
    args = parser.parse_args()
    paths = notebook_paths(args.notebook)
    if args.in_process:
        return 0 if all([test_one(path, ["slow"] if args.slow else []) for path in paths]) else 1

    options = ["--in-process", *(["--slow"] if args.slow else [])]
    command = [sys.executable, str(Path(__file__).resolve()), *options]
    failed = []

    def report(path: Path, status: int, seconds: float, output: str) -> None:
        print(f"{'ok    ' if status == 0 else 'FAILED'} {seconds:6.1f} s  {path.name}", flush=True)
        if status != 0:
            failed.append(path.name)
            print(f"{output.rstrip()}\n(end of {path.name}: exit status {status})\n", flush=True)

    seconds = run_side_by_side({path: [*command, str(path)] for path in longest_first(paths)}, report)
    if not args.slow:
        write_times(seconds)
    print(f"notebooks: {len(paths) - len(failed)} of {len(paths)} ran to their end", flush=True)
    if failed:
        print(f"failed: {' '.join(sorted(failed))}", flush=True)
    return 1 if failed or not paths else 0


if __name__ == "__main__":
    sys.exit(main())
