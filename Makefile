# Words of the house; CI runs the same. On a machine without a GPU `make venv` installs stock SGLang without its CUDA
# dependencies; with a GPU use `pip install -e ".[gpu,dev]"` in an environment of your own and PYTHON=python.
PYTHON := .venv/bin/python
READY := .venv/.ready
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-full check bench bench-full gpu gpu-kit venv clean

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

# The README's table, from nothing: a draft of the first domain, the live stream of every arm, the tap's cost. About 40
# minutes on two cores; what is there is gone on with.
BENCH := runs/bench
bench: venv
	mkdir -p $(BENCH)
	$(PYTHON) benchmarks/first_draft.py $(BENCH)
	$(PYTHON) -m onlinespec.cli bench stream --json $(BENCH)/stream.json --draft $(BENCH)/train/draft \
		--config configs/demo.yaml --requests 200 \
		--arms "none;frozen;adaptive;recipe;onlinespec;onlinespec floor.enabled=true"
	test -e $(BENCH)/overhead.json || $(PYTHON) -m onlinespec.cli bench overhead --json $(BENCH)/overhead.json \
		--draft $(BENCH)/train/draft --config configs/demo.yaml --block-seconds 5
	for end in json png; do for part in stream overhead; do \
		cp $(BENCH)/$$part.$$end benchmarks/results/bench-$$part.$$end || exit 1; done; done
	$(PYTHON) benchmarks/bench_table.py

# The rest of RESULTS.md that has no command of its own there: hours, one JSON a part, each goes on where it stopped.
STREAMS := runs/streams
RECORDED = $(foreach seed,101 102 103 104 105,--replay $(STREAMS)/code-$(seed) --replay $(STREAMS)/support-$(seed))
bench-full: bench
	$(PYTHON) benchmarks/record_streams.py $(STREAMS)
	$(PYTHON) -m onlinespec.cli bench stream --json $(BENCH)/replay.json $(RECORDED) \
		--config configs/demo.yaml --tokens 20000 --arms "recipe;recipe-steps;onlinespec"
	$(PYTHON) -m onlinespec.cli bench stream --json $(BENCH)/replay-orders.json $(RECORDED) \
		--config configs/demo.yaml --tokens 16000 --arms "recipe;onlinespec" --orders "gradual,recurring,bursts" --seeds 2
	for end in json png; do for part in replay replay-orders; do \
		cp $(BENCH)/$$part.$$end benchmarks/results/bench-$$part.$$end || exit 1; done; done
	$(PYTHON) benchmarks/bench_learning.py $(STREAMS) $(BENCH)/learning.json
	test -e $(BENCH)/gate.json || $(PYTHON) benchmarks/bench_gate.py $(BENCH)/gate.json
	test -e $(BENCH)/battery.json || $(PYTHON) benchmarks/bench_battery.py $(BENCH)/battery.json
	$(PYTHON) benchmarks/bench_shadow_fidelity.py $(BENCH)/shadow-fidelity.json --requests 600 --seconds 900
	test -e $(BENCH)/swap.json || $(PYTHON) benchmarks/bench_swap.py $(BENCH)/swap.json
	$(PYTHON) benchmarks/bench_table.py

# On a GPU machine, in an environment with onlinespec[gpu,dev]: make gpu PYTHON=python. Some checks alone: ONLY="boots rows",
# one part: PART=2, within a loan of ten minutes: SECONDS=570, what would run: DRY=1. The same command goes on.
gpu:
	$(PYTHON) benchmarks/gpu/checks.py runs/gpu $(if $(ONLY),--only $(ONLY)) $(if $(PART),--part $(PART)) \
		$(if $(SECONDS),--seconds $(SECONDS)) $(if $(DRY),--dry-run)

# What a GPU machine without a network needs beside torch 2.11, about 50 MB each: carry one, and try 0.5.23 first.
gpu-kit: gpu-kit/sglang-0.5.23.tar.xz gpu-kit/sglang-0.5.17.tar.xz

gpu-kit/sglang-%.tar.xz: benchmarks/gpu/make_kit.sh benchmarks/gpu/kit-%.txt $(READY)
	mkdir -p gpu-kit
	PYTHON=$(PYTHON) benchmarks/gpu/make_kit.sh $* $@

venv: $(READY)

# The wheels of every SGLang we know are read by a test, not installed: their sites must resolve.
$(READY): requirements-cpu.txt requirements-dev.txt pyproject.toml $(wildcard patches/*/sites.toml)
	python3 -m venv .venv
	$(PYTHON) -m pip install torch==2.13.0
	$(PYTHON) -m pip install --no-deps -r requirements-cpu.txt -r requirements-dev.txt
	$(PYTHON) -m pip install --no-deps -e .
	for version in $(notdir $(wildcard patches/*)); do \
		$(PYTHON) -m pip download --no-deps --dest .venv/sglang sglang==$$version || exit 1; done
	touch $(READY)

clean:
	rm -rf .venv runs
