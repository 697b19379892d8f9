# Every target installs what it needs into .venv first. PYTHON=python3.12 make demo: another interpreter.
PYTHON ?= python3
BIN := .venv/bin
# three workers on two cores, as tests wait for browsers and processes, with one thread each: more starve each other
# a file's tests go to one of them, which makes what they share once; the longest first, as tests/conftest.py has them
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: demo test lint bench study study-quick pretrain
demo: .venv/installed  ## fine-tune the tiny SD3 with DRTune and GRPO, and report
	$(BIN)/fme demo

test: .venv/installed  ## the whole suite
	$(TESTS)

lint: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: .venv/installed  ## entropy against closed forms; error, seconds and memory of the estimators and scores; faults: an hour
	$(BIN)/python scripts/diversity_metrics/validate_entropy.py
	$(BIN)/python scripts/bench/entropy.py --out logs/bench/entropy
	$(BIN)/python scripts/bench/diversity.py --out logs/bench/diversity
	$(BIN)/python scripts/bench/faults.py

study: .venv/installed  ## every run of the study, its tables, figures and docs/study.md: hours; runs go on where they were cut short
	$(BIN)/python scripts/study/run.py
	$(BIN)/python scripts/study/ratios.py
	$(BIN)/python scripts/study/gradient_noise.py
	$(BIN)/python scripts/study/summarise.py --logs logs/study

study-quick: .venv/installed  ## further seeds, stopped early, held against the committed intervals
	$(BIN)/python scripts/study/run.py --quick
	$(BIN)/python scripts/study/ratios.py --quick
	$(BIN)/python scripts/study/summarise.py --quick logs/study

pretrain: .venv/installed  ## make assets/ again from Debian's dataset-fashion-mnist: two hours and a half
	$(BIN)/python scripts/tiny/pretrain.py
	$(BIN)/python scripts/scenes/pretrain.py

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
