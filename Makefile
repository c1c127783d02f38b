# Words of the house; CI runs the same. On a machine without a GPU `make venv` installs stock SGLang without its CUDA
# dependencies; with a GPU use `pip install -e ".[gpu,dev]"` in an environment of your own and PYTHON=python.
PYTHON := .venv/bin/python
READY := .venv/.ready
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-full check bench gpu gpu-kit venv clean

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

# On a GPU machine, in an environment with onlinespec[gpu,dev]: make gpu PYTHON=python. One check alone: ONLY=rows.
gpu:
	$(PYTHON) benchmarks/gpu/checks.py benchmarks/results/gpu $(if $(ONLY),--only $(ONLY)) $(if $(DRY),--dry-run)

# What a GPU machine without a network needs beside torch 2.11.
gpu-kit:
	mkdir -p gpu-kit
	benchmarks/gpu/make_kit.sh 0.5.23 gpu-kit/sglang-0.5.23.tar.xz

venv: $(READY)

$(READY): requirements-cpu.txt requirements-dev.txt pyproject.toml
	python3 -m venv .venv
	$(PYTHON) -m pip install torch==2.13.0
	$(PYTHON) -m pip install --no-deps -r requirements-cpu.txt -r requirements-dev.txt
	$(PYTHON) -m pip install --no-deps -e .
	touch $(READY)

clean:
	rm -rf .venv runs
