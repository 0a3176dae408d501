"""Packaging: everything is read from settings.ini."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(ROOT / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
name = cfg["lib_name"]

# These stand beside the package in the repository, and inside it once installed: the learner's notebooks, and the
# records of slow cells, which lessons read where there is no repository.
beside = {"exercises": ("exercises", "*.ipynb"), "results": ("nbs/results", "*.json")}
packed = {f"{name}.{inside}": place for inside, place in beside.items() if (ROOT / place[0]).is_dir()}

setup(
    name=name,
    version=cfg["version"],
    description=cfg["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    url=cfg["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: {minor}" for minor in ("3.11", "3.12", "3.13")),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=f">={cfg['min_python']}",
    packages=[*find_packages(include=[name, f"{name}.*"]), *packed],
    package_dir={package: folder for package, (folder, _) in packed.items()},
    package_data={name: ["data/**"], **{package: [pattern] for package, (_, pattern) in packed.items()}},
    include_package_data=False,
    zip_safe=False,
    install_requires=cfg["requirements"].split(),
    extras_require={"lab": cfg["lab_requirements"].split(), "dev": cfg["dev_requirements"].split()},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
)
