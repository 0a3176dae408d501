"""Run notebooks with nbconvert and save their outputs, each in a process of its own, two at a time, one thread each.

    python tools/lessons.py                  every notebook of nbs/
    python tools/lessons.py nbs/NAME.ipynb   one notebook

Cells flagged with one of settings.ini's tst_flags, or `#| eval: false`, are not run and keep their stored outputs.
A notebook that fails is left as it was.
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from badges import write_header
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import CellExecutionError
from nbconvert.preprocessors import ExecutePreprocessor
from nbdev.clean import nbdev_clean

from notebooks import ROOT, cell_flags, longest_first, notebook_paths, read_notebook, run_side_by_side, skip_flags


def is_progress_bar(output: nbformat.NotebookNode) -> bool:
    """Whether an output is tqdm's notebook bar, which TQDM_DISABLE does not reach."""
    data = output.get("data", {})
    return "application/vnd.jupyter.widget-view+json" in data and "%|" in data.get("text/plain", "")


def is_kernel_offer(output: nbformat.NotebookNode) -> bool:
    """Whether an output is bitsandbytes' offer, at its import, of a faster kernel for processors with AVX512-BF16: it is there on some machines only."""
    lines = output.get("text", "").strip().splitlines() if output.get("name") == "stderr" else []
    return bool(lines) and all("Failed to load CPU gemm_4bit_forward" in line for line in lines)


class RunUnflagged(ExecutePreprocessor):
    """Runs the cells that carry none of the skipped flags, in this interpreter's own kernel."""

    def preprocess_cell(self, cell, resources, index):
        """The cell with new outputs, or as it is where one of its flags is skipped."""
        if cell_flags(cell) & skip_flags():
            return cell, resources
        cell, resources = super().preprocess_cell(cell, resources, index)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not is_progress_bar(output) and not is_kernel_offer(output)]
        return cell, resources

    def create_kernel_manager(self):
        """A manager that looks at no installed kernel, so that a user's own `python3` is not taken for ours."""
        self.km = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
        return self.km


def run_one(path: Path) -> None:
    """Run the notebook at `path` in its own folder and replace it by the one with outputs, cleaned."""
    nb = read_notebook(path)
    with tempfile.TemporaryDirectory() as scratch:  # nothing of the user's set-up is read or written
        os.environ["IPYTHONDIR"] = os.environ["JUPYTER_RUNTIME_DIR"] = scratch
        runner = RunUnflagged(timeout=None, store_widget_state=False, coalesce_streams=True, record_timing=False)
        runner.preprocess(nb, {"metadata": {"path": str(path.parent)}})
    unfinished = path.with_name(f".{path.name}.tmp")
    nbformat.write(nb, unfinished)
    os.replace(unfinished, path)
    write_header(path)
    os.chdir(ROOT)  # nbdev finds settings.ini from the working directory
    nbdev_clean.__wrapped__(fname=str(path))


def main() -> int:
    """Exit status: 0 where every notebook ran."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", nargs="*", help="notebooks to run; all of nbs/ if none is named")
    parser.add_argument("--in-process", action="store_true", help="run one notebook here; the other processes use this")
    args = parser.parse_args()
    paths = notebook_paths(args.notebook)
    if args.in_process:
        try:
            for path in paths:
                run_one(path)
        except CellExecutionError as error:
            sys.exit(re.sub(r"\x1b\[[0-9;]*m", "", str(error)))  # without colours
        return 0

    command = [sys.executable, str(Path(__file__).resolve()), "--in-process"]
    failed = []

    def report(path: Path, status: int, seconds: float, output: str) -> None:
        print(f"{'saved ' if status == 0 else 'FAILED'} {seconds:6.1f} s  {path.name}", flush=True)
        if status != 0:
            failed.append(path.name)
            print(f"{output.rstrip()}\n(end of {path.name}: exit status {status}; the file is as it was)\n", flush=True)

    run_side_by_side({path: [*command, str(path)] for path in longest_first(paths)}, report)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
