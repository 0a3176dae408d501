"""Run one long experiment: a notebook's cell flagged `#| slow` that calls `record_result("<name>", ...)`.

    python tools/measure.py            the first experiment without a complete result
    python tools/measure.py NAME       this one
    python tools/measure.py --list     what there is, and what each still lacks

The notebook's unflagged cells above the experiment run first, then the experiment, in the notebook's folder.
`record_result` writes nbs/results/<name>.json after each seed, so a run that is stopped goes on where it was.
"""

import argparse
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from notebooks import QUIET_ENV, cell_flags, notebook_paths, read_notebook, skip_flags

RECORD_CALL = re.compile(r"record_result\(\s*(?:name\s*=\s*)?[\"']([^\"']+)[\"']")


@dataclass(frozen=True)
class Experiment:
    """A slow cell, and where its result goes."""

    name: str  # the first argument of record_result
    notebook: Path  # the notebook that holds the cell
    cell: int  # the cell's place in the notebook

    @property
    def result(self) -> Path:
        """The file that record_result writes."""
        return self.notebook.parent / "results" / f"{self.name}.json"

    def missing(self) -> str:
        """What the stored result lacks, in words; empty where it is complete."""
        try:
            stored = json.loads(self.result.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return "no result yet"
        except ValueError:
            return "not readable as JSON"
        seeds = {str(seed) for seed in stored.get("seeds", [])} - set(stored.get("values", {}))
        return f"seeds {', '.join(sorted(seeds))} missing" if seeds else ""


def experiments() -> list[Experiment]:
    """Every experiment of nbs/, in the order of the notebooks and their cells."""
    return [
        Experiment(name, path, index)
        for path in notebook_paths()
        for index, cell in enumerate(read_notebook(path).cells)
        if "slow" in cell_flags(cell)
        for name in RECORD_CALL.findall(cell.source)
    ]


def run(experiment: Experiment) -> None:
    """Run the unflagged cells above the experiment, then its own, with what they print shown as it comes."""
    from IPython.core.interactiveshell import InteractiveShell

    os.environ["MPLBACKEND"] = "agg"
    for name, value in QUIET_ENV.items():  # as in the lessons, except that the experiment shows its progress
        if name != "TQDM_DISABLE":
            os.environ.setdefault(name, value)
    os.chdir(experiment.notebook.parent)
    sys.path[0] = ""
    shell = InteractiveShell.instance()
    cells = read_notebook(experiment.notebook).cells
    above = [c for c in cells[: experiment.cell] if c.cell_type == "code" and not cell_flags(c) & skip_flags()]
    for cell in [*above, cells[experiment.cell]]:
        shell.run_cell(cell.source).raise_error()


def main() -> int:
    """Exit status: 0 where the experiment is complete or there is none to run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", help="the experiment; the first incomplete one if none is named")
    parser.add_argument("--list", action="store_true", help="only list the experiments")
    args = parser.parse_args()
    known = experiments()
    if args.list:
        for experiment in known:
            print(f"{experiment.name:40} {experiment.notebook.name:28} {experiment.missing() or 'complete'}")
        return 0
    if args.name and args.name not in [experiment.name for experiment in known]:
        names = ", ".join(experiment.name for experiment in known) or "none"
        sys.exit(f"no slow cell records {args.name!r}; the experiments are: {names}")
    wanted = [e for e in known if e.name == args.name] if args.name else [e for e in known if e.missing()]
    if not wanted:
        print(f"Every experiment has its result ({len(known)} in all).")
        return 0
    experiment = wanted[0]
    print(f"{experiment.name} ({experiment.notebook.name}): {experiment.missing() or 'complete'}", flush=True)
    start = time.perf_counter()
    run(experiment)
    missing = experiment.missing()
    print(f"{experiment.name}: {missing or 'complete'} after {time.perf_counter() - start:.0f} s")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
