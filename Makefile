# Each target first sets up .venv if that is needed. See README.md for the same commands without make.

# The interpreter that makes .venv: python3.11 where there is one that runs, else python3.
PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
# Where torch comes from. Empty: wherever pip finds it (on Linux PyPI's torch brings CUDA).
# make TORCH_INDEX=https://download.pytorch.org/whl/cpu takes the small CPU build.
TORCH_INDEX ?=
# More options for `make run` and `make lab`; one notebook for `make lessons`.
ARGS ?=
NB ?=
# One experiment for `make measure`; empty takes the first that has no complete result.
EXPERIMENT ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := .venv/.ready
MAKEFLAGS += --no-print-directory

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help setup run test test-all lab lessons measure export clean

help:
	@echo 'make run       the whole pipeline; options in ARGS, as in: make run ARGS="--fast --seed 1"'
	@echo 'make test      every notebook and every test'
	@echo 'make test-all  the same with what takes long'
	@echo 'make lab       JupyterLab on the lessons'
	@echo 'make lessons   run the notebooks and save their outputs; one with NB=nbs/00a_tiny_arena.ipynb'
	@echo 'make measure   run one long experiment that has no result yet; a chosen one with EXPERIMENT=name'
	@echo 'make export    write the package and the badges from the notebooks, and clean the notebooks'
	@echo 'make setup     only set up .venv;  make clean removes what building and testing left behind'

setup: $(READY)
	@:

run: $(READY)
	@$(BIN)/rlhf-course run $(ARGS)

# pytest runs, and closes the output, whether or not a notebook failed.
test: $(READY)
	@status=0; \
	$(BIN)/python tools/run_notebooks.py || status=1; \
	$(BIN)/python -m pytest tests || status=1; \
	exit $$status

test-all: $(READY)
	@status=0; \
	$(BIN)/python tools/run_notebooks.py --slow || status=1; \
	$(BIN)/python -m pytest tests --long || status=1; \
	exit $$status

lab: $(READY)
	@$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/nbs/index.ipynb $(ARGS)

lessons: $(READY)
	@$(BIN)/python tools/lessons.py $(NB)

measure: $(READY)
	@$(BIN)/python tools/measure.py $(EXPERIMENT)

export: $(READY)
	@$(BIN)/python tools/export.py

clean:
	@rm -rf build dist *.egg-info .pytest_cache .hypothesis _proc
	@find . -path ./.venv -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# The stamp is removed before pip starts and written after it has ended: a .venv without one is the work
# of an interrupted set-up and is made anew. Bytecode is written here, on all cores (pip would use one), and not left to
# the first import: where PYTHONDONTWRITEBYTECODE is set, every import would compile again, for 20 seconds.
$(READY): constraints.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "This needs Python 3.11 or newer, and $(PYTHON) is %d.%d. Try: make PYTHON=python3.12" % v[:2])'
	@echo 'Setting up .venv: this takes some minutes the first time.'
	@test -e $@ || $(PYTHON) -m venv --clear .venv
	@rm -f $@
	@$(PIP) install -qq --no-compile -c constraints.txt setuptools wheel
	@test -z '$(TORCH_INDEX)' || $(PIP) install -qq --no-compile --no-deps --index-url '$(TORCH_INDEX)' "$$(grep '^torch==' constraints.txt)"
	@PYTHONWARNINGS='ignore:Editable installation' $(PIP) install -qq --no-compile -c constraints.txt --no-build-isolation -e '.[lab,dev]'
	@$(BIN)/python -m compileall -qq -j 0 .venv || true # a few files of the packages are templates and no Python
	@touch $@
