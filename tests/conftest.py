"""Markers, and the tree that the repository's gates look at."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

# One thread, so that numbers do not depend on the number of cores, and no network.
for name, value in {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}.items():
    os.environ.setdefault(name, value)

NOT_IN_A_TREE = {".git", ".venv", "scratch", "runs", "build", "dist", "_proc", "_docs", "__pycache__",
                 ".ipynb_checkpoints", ".pytest_cache", ".hypothesis"}  # fmt: skip


def pytest_addoption(parser):
    """`--long` runs the tests marked long too, as RLHF_COURSE_LONG=1 does."""
    parser.addoption("--long", action="store_true", help="run the tests marked `long` too")


def pytest_configure(config):
    """Make the markers known."""
    config.addinivalue_line("markers", "long: takes minutes; runs with --long or RLHF_COURSE_LONG=1")


def pytest_collection_modifyitems(config, items):
    """Leave long tests out, unless they are asked for."""
    if config.getoption("--long") or config.getoption("-m") or os.environ.get("RLHF_COURSE_LONG", "0") not in ("", "0"):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


def tree_files() -> list[Path]:
    """The repository's files, relative to its root: what git tracks or would add; without git, all but leftovers."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                                check=True, capture_output=True, text=True).stdout  # fmt: skip
        paths = sorted({Path(name) for name in listed.split("\0") if name})
    else:
        paths = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*"))
        paths = [path for path in paths if not NOT_IN_A_TREE & set(path.parts) and ".egg-info" not in str(path)]
    return [path for path in paths if (ROOT / path).is_file()]


def copy_tree(target: Path) -> Path:
    """`target`, with a copy of the repository's files."""
    for path in tree_files():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, target / path)
    return target


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel built from a copy of the tree, without a network."""
    source = copy_tree(tmp_path_factory.mktemp("source"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-index", "--no-deps", "--no-build-isolation",
                    "--wheel-dir", "dist", "."], cwd=source, check=True)  # fmt: skip
    [built] = (source / "dist").glob("*.whl")
    return built
