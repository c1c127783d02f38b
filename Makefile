# Words of the house; CI runs the same. On a machine without a GPU `make venv` installs stock SGLang without its CUDA
# dependencies; with a GPU use `pip install -e ".[gpu,dev]"` in an environment of your own and PYTHON=python.
PYTHON := .venv/bin/python
READY := .venv/.ready
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-full check bench gpu venv clean

demo: venv
	$(PYTHON) -m onlinespec.cli demo

test: venv
	$(PYTHON) -m pytest -m "not full"

test-full: venv
	$(PYTHON) -m pytest

check: venv
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

# On a GPU machine, in an environment with onlinespec[gpu,dev]: make gpu PYTHON=python. The same tests, on CUDA.
gpu:
	$(PYTHON) -m pytest tests/integration

venv: $(READY)

$(READY): requirements-cpu.txt requirements-dev.txt pyproject.toml
	python3 -m venv .venv
	$(PYTHON) -m pip install torch==2.13.0
	$(PYTHON) -m pip install --no-deps -r requirements-cpu.txt -r requirements-dev.txt
	$(PYTHON) -m pip install --no-deps -e .
	touch $(READY)

clean:
	rm -rf .venv runs
