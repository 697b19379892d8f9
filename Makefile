# Every target installs what it needs into .venv first. PYTHON=python3.12 make demo: another interpreter.
PYTHON ?= python3
BIN := .venv/bin
# one thread for each of the two test workers: two busy processes of two threads starve each other
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: demo test lint bench pretrain
demo: .venv/installed  ## fine-tune the tiny SD3 with DRTune and GRPO, and report
	$(BIN)/python scripts/study/demo.py

test: .venv/installed  ## the whole suite
	$(TESTS)

lint: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: .venv/installed  ## entropy: against closed forms, two minutes; error against seconds, long
	$(BIN)/python scripts/diversity_metrics/validate_entropy.py
	$(BIN)/python scripts/bench/entropy.py --out logs/bench/entropy

pretrain: .venv/installed  ## make assets/ again from Debian's dataset-fashion-mnist: about an hour
	$(BIN)/python scripts/train/pretrain_tiny.py

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
