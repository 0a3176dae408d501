"""Virtual environments that hold certain installed distributions, by links, and nothing else."""

import subprocess
import sys
import zipfile
from collections.abc import Iterable
from email.message import Message
from email.parser import Parser
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def wheel_metadata(wheel: Path) -> Message:
    """The wheel's METADATA."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def closure(requirements: Iterable[str]) -> dict[str, metadata.Distribution]:
    """The installed distributions that are required without extras, and what those require in turn."""
    found = {}
    waiting = [(text, "") for text in requirements]
    while waiting:
        text, extra = waiting.pop()
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        new_extras = [*requirement.extras] if name in found else ["", *requirement.extras]
        found[name] = metadata.distribution(requirement.name)
        waiting += [(text, extra) for extra in new_extras for text in found[name].requires or []]
    return found


def runtime_requirements(wheel: Path) -> list[str]:
    """What the wheel says it needs; requirements of its extras carry a marker."""
    return wheel_metadata(wheel).get_all("Requires-Dist")


def linked_venv(home: Path, distributions: Iterable[metadata.Distribution]) -> tuple[Path, Path]:
    """The interpreter and the site-packages of a new venv in `home` with links to what the distributions installed."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    [site_packages] = home.glob("lib/python*/site-packages")
    for distribution in distributions:
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (site_packages / top).exists() and not top.endswith(".pth"):
                (site_packages / top).symlink_to(distribution.locate_file(top))
    return home / "bin" / "python", site_packages
