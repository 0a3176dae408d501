"""What the tools share: the notebooks, their cells' flags, and running several processes side by side."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from configparser import ConfigParser
from pathlib import Path

import nbformat
from nbdev.process import extract_directives

ROOT = Path(__file__).resolve().parent.parent
TIMES_FILE = ROOT / ".venv" / "notebook_times.json"  # how long each notebook took here; only orders the next run

QUIET_ENV = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "PYTHONUNBUFFERED": "1",
}


def settings() -> dict[str, str]:
    """The values of settings.ini, with references to one another filled in."""
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def notebook_paths(names: Iterable[str] = ()) -> list[Path]:
    """The named notebooks, or all of nbs/ where none is named, sorted."""
    paths = [Path(name).resolve() for name in names] or sorted((ROOT / settings()["nbs_path"]).glob("[!_.]*.ipynb"))
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        sys.exit(f"no such notebook: {', '.join(missing)}")
    return paths


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """The notebook at `path`."""
    return nbformat.read(path, as_version=4)


def cell_flags(cell: nbformat.NotebookNode) -> set[str]:
    """The `#|` directives of a code cell, as nbdev reads them; `eval: false` is given as "eval:false"."""
    if cell.cell_type != "code":
        return set()
    directives = extract_directives(cell, remove=False)
    flags = {name for name in directives if name != "eval:"}
    if [arg.lower() for arg in directives.get("eval:", [])[:1]] == ["false"]:
        flags.add("eval:false")
    return flags


def skip_flags() -> set[str]:
    """The flags of cells that neither tests nor lessons run: tst_flags of settings.ini, and `eval: false`."""
    return {*settings()["tst_flags"].split(), "eval:false"}


def run_side_by_side(
    commands: dict[Path, list[str]],  # the command to run for each notebook, in the order to start them
    report: Callable[[Path, int, float, str], None],  # called with path, exit status, seconds, output, as each ends
    n_workers: int = 2,  # how many at a time
) -> dict[Path, float]:
    """The seconds of each command that ended with status 0; each runs in a process of its own, with one thread."""

    def run(path: Path) -> tuple[int, float, str]:
        start = time.perf_counter()
        done = subprocess.run(
            commands[path],
            cwd=ROOT,
            env={**os.environ, **QUIET_ENV},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        return done.returncode, time.perf_counter() - start, done.stdout

    seconds = {}
    with ThreadPoolExecutor(n_workers) as pool:
        futures = {pool.submit(run, path): path for path in commands}
        for future in as_completed(futures):
            path = futures[future]
            status, elapsed, output = future.result()
            report(path, status, elapsed, output)
            if status == 0:
                seconds[path] = elapsed
    return seconds


def longest_first(paths: list[Path]) -> list[Path]:
    """`paths` by the time each took when last run here, longest first; one never run comes before them."""
    known = read_times()
    return sorted(paths, key=lambda path: -known.get(path.name, float("inf")))


def read_times() -> dict[str, float]:
    """Seconds a notebook took when last run here, by file name; empty where nothing is recorded."""
    try:
        return json.loads(TIMES_FILE.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def write_times(seconds: dict[Path, float]) -> None:
    """Record how long each notebook took, for `longest_first`."""
    if TIMES_FILE.parent.is_dir():
        times = read_times() | {path.name: round(value, 1) for path, value in seconds.items()}
        TIMES_FILE.write_text(json.dumps(times, indent=1, sort_keys=True) + "\n", encoding="utf-8")
