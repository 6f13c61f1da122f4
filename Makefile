PYTHON ?= python3
BIN := .venv/bin
# Two workers; the tests of a file share what they make, so they go to one.
TWO := -n 2 --dist loadfile
.DELETE_ON_ERROR:
.PHONY: demo check test test-all bench-engine gpu constraints .venv-lmms

demo: .venv/core
	$(BIN)/mmroute demo
check: .venv/dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
test: check
	$(BIN)/python -m pytest $(TWO)
test-all: check .venv/ray .venv-lmms/made
	$(BIN)/python -m pytest $(TWO) -m 'not gpu'
bench-engine: .venv/core
	$(BIN)/python -m mmroute.bench.engine --out results/engine
gpu: .venv/dev
	$(BIN)/python -m pytest -m gpu tests/gpu -W default
	$(BIN)/python -m mmroute.bench.gpu --out results/gpu
constraints: .venv/dev
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' > constraints.txt

.venv/core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mmroute needs Python >= 3.11; try: make PYTHON=python3.12")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install -U pip
	$(BIN)/python -m pip install -c constraints.txt -e .
	@touch $@
# lmms-eval wants torchvision, which must match torch; mmroute and its models do without. Its trackers want older
# packages than all of our pins allow; without any, pip takes the newest torch, and a filelock that it cannot use.
.venv-lmms: .venv-lmms/made
.venv-lmms/made: .venv/core
	$(PYTHON) -m venv --clear .venv-lmms
	.venv-lmms/bin/python -m pip install -U pip
	.venv-lmms/bin/python -m pip install -c constraints.txt torch transformers datasets
	.venv-lmms/bin/python -m pip install -e . lmms-eval==0.7.3 \
		$$(grep -E '^(torch|transformers|datasets|numpy)==' constraints.txt)
	.venv-lmms/bin/python -m pip uninstall -y torchvision
	@touch $@
.venv/ray: .venv/dev
	$(BIN)/python -m pip install -c constraints.txt -e ".[ray]" --group quantised
	@touch $@
.venv/dev: .venv/core
	$(BIN)/python -m pip install -c constraints.txt -e ".[all]" --group dev
	@touch $@
