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

# The README's table, from nothing: a draft of the first domain, the live stream of every arm, the tap's cost. Fifteen to thirty
# minutes on two cores. A part that is done is not done again, one that was stopped goes on or begins anew.
BENCH := runs/bench
STREAMS := $(BENCH)/streams
SCRIPT = $(PYTHON) benchmarks
done = $(patsubst %,$(BENCH)/%.done,$(1))
KEEP = for end in json png; do test ! -e $(basename $@).$$end || cp $(basename $@).$$end benchmarks/results/ || exit 1; \
	done; touch $@

bench: $(call done,bench-stream bench-overhead)
	$(SCRIPT)/bench_table.py

$(BENCH)/first-draft.done: | $(READY)
	mkdir -p $(BENCH)
	$(SCRIPT)/first_draft.py $(BENCH)
	touch $@

$(BENCH)/bench-stream.done: $(BENCH)/first-draft.done
	$(PYTHON) -m onlinespec.cli bench stream --json $(basename $@).json --draft $(BENCH)/train/draft \
		--config configs/demo.yaml --requests 200 \
		--arms "none;frozen;adaptive;recipe;onlinespec;onlinespec floor.enabled=true"
	$(KEEP)

$(BENCH)/bench-overhead.done: $(BENCH)/first-draft.done | $(BENCH)/bench-stream.done
	$(PYTHON) -m onlinespec.cli bench overhead --json $(basename $@).json --draft $(BENCH)/train/draft \
		--config configs/demo.yaml --block-seconds 5
	$(KEEP)

# All of RESULTS.md that no GPU is wanted for: hours, one JSON a part. Recorded rows and simulations two at a time, what
# a live server says alone.
REPLAYED := bench-replay bench-replay-orders learning gate loss-change bfloat16 guard drift
LIVE := demo shadow-fidelity battery swap trainer-step kv-modes
bench-full: bench
	$(MAKE) $(call done,streams)
	$(MAKE) -j2 $(call done,$(REPLAYED))
	$(SCRIPT)/bench_table.py
	$(MAKE) $(call done,$(LIVE))
	$(SCRIPT)/bench_table.py

$(BENCH)/streams.done: | $(READY)
	$(SCRIPT)/record_streams.py $(STREAMS)
	touch $@

RECORDED = $(foreach seed,101 102 103 104 105,--replay $(STREAMS)/code-$(seed) --replay $(STREAMS)/support-$(seed))
REPLAY = $(PYTHON) -m onlinespec.cli bench stream --json $(basename $@).json $(RECORDED) --config configs/demo.yaml --jobs 1

$(BENCH)/bench-replay.done: $(BENCH)/streams.done
	$(REPLAY) --tokens 20000 --arms "recipe;recipe-steps;onlinespec"
	$(KEEP)

$(BENCH)/bench-replay-orders.done: $(BENCH)/streams.done
	$(REPLAY) --tokens 16000 --arms "recipe;onlinespec" --orders "gradual,recurring,bursts" --seeds 2
	$(KEEP)

$(BENCH)/learning.done: $(BENCH)/streams.done
	$(SCRIPT)/bench_learning.py $(STREAMS) $(basename $@).json
	$(SCRIPT)/bench_learning.py $(STREAMS) $(basename $@).json --arms "recipe, as many steps" --seeds 2
	$(KEEP)

$(BENCH)/bfloat16.done: $(BENCH)/streams.done
	$(SCRIPT)/bench_learning.py $(STREAMS) $(basename $@).json --seeds 2 --tokens 16000 \
		--arms "onlinespec, float32;onlinespec, bfloat16"
	$(KEEP)

$(BENCH)/loss-change.done: $(BENCH)/streams.done
	$(SCRIPT)/bench_loss_change.py $(STREAMS) $(basename $@).json --seeds 2
	$(KEEP)

$(BENCH)/gate.done: $(BENCH)/streams.done
	$(SCRIPT)/bench_gate.py --record $(STREAMS) $(BENCH)/gate-differences.json
	$(SCRIPT)/bench_gate.py $(basename $@).json --differences $(BENCH)/gate-differences.json
	cp $(BENCH)/gate-differences.json benchmarks/results/
	$(KEEP)

$(BENCH)/guard.done: | $(READY)
	$(SCRIPT)/guard_delay.py $(basename $@).json
	$(KEEP)

$(BENCH)/drift.done: | $(READY)
	$(SCRIPT)/drift_delay.py $(basename $@).json
	$(KEEP)

$(BENCH)/demo.done: | $(READY)
	rm -rf $(basename $@)
	$(PYTHON) -m onlinespec.cli demo --run-dir $(basename $@)
	cp $(basename $@)/demo.json $(basename $@)/demo.png $(BENCH)/
	$(KEEP)

$(BENCH)/shadow-fidelity.done: | $(READY)
	$(SCRIPT)/bench_shadow_fidelity.py $(basename $@).json --requests 600 --seconds 900
	$(KEEP)

$(BENCH)/battery.done: | $(READY)
	$(SCRIPT)/bench_battery.py $(basename $@).json
	$(KEEP)

$(BENCH)/swap.done: | $(READY)
	rm -f $(basename $@).json
	$(SCRIPT)/bench_swap.py $(basename $@).json
	$(KEEP)

$(BENCH)/trainer-step.done: | $(READY)
	$(SCRIPT)/bench_trainer_step.py $(basename $@).json --rounds 3 \
		--systems "ours;ours, muon;ours, activations recomputed;plain, bfloat16;ours, bfloat16;ours, muon, bfloat16"
	$(KEEP)

$(BENCH)/kv-modes.done: | $(READY)
	$(SCRIPT)/bench_kv_modes.py $(basename $@).json
	$(KEEP)

# On a GPU machine, in an environment with onlinespec[gpu,dev]: make gpu PYTHON=python. Some checks alone: ONLY="boots rows",
# one part: PART=2, within a loan of ten minutes: SECONDS=520, what was found in one file: PACK=a.tgz, what would run:
# DRY=1. The same command goes on.
gpu:
	$(PYTHON) benchmarks/gpu/checks.py runs/gpu $(if $(ONLY),--only $(ONLY)) $(if $(PART),--part $(PART)) \
		$(if $(SECONDS),--seconds $(SECONDS)) $(if $(PACK),--pack $(PACK)) $(if $(DRY),--dry-run)

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
