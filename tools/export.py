"""Write what is generated from the notebooks: badges, the package, the notebooks cleaned, and the learner's notebooks.

    python tools/export.py                  everything
    python tools/export.py nbs/NAME.ipynb   one notebook and its module
"""

import os
import sys

from badges import write_header
from exercises import write_exercises
from nbdev.clean import nbdev_clean
from nbdev.doclinks import nbdev_export
from notebooks import ROOT, notebook_paths, settings


def main(names: list[str]) -> None:
    """Bring everything that comes from the named notebooks, or from all, up to date."""
    os.chdir(ROOT)  # nbdev finds settings.ini from the working directory
    paths = notebook_paths(names)
    for path in paths:
        write_header(path)
    for path in paths if names else [settings()["nbs_path"]]:
        nbdev_export.__wrapped__(path=str(path))
        nbdev_clean.__wrapped__(fname=str(path))
    write_exercises(paths)


if __name__ == "__main__":
    main(sys.argv[1:])
