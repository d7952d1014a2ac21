PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE_SOURCES := CMakeLists.txt setup.py pyproject.toml $(shell find cmake csrc -type f 2>/dev/null)
CXX_FILES := $(shell find csrc examples/cpp tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

.PHONY: help setup demo test bench figures lint format clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST)

$(BIN)/.requirements: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -r requirements-dev.txt
	@touch $@

$(BIN)/.native: $(BIN)/.requirements $(NATIVE_SOURCES)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@cat safelora_kernels/_build_info.json
	@touch $@

$(BIN)/.demo: $(BIN)/.native examples/vault/requirements.txt examples/vault/requirements-nodeps.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r examples/vault/requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r examples/vault/requirements-nodeps.txt
	@touch $@

setup: $(BIN)/.native ## Create the virtual environment and build the kernels in place

demo: $(BIN)/.demo ## Project a real adapter and ask the model before and after
	$(BIN)/python examples/vault/demo.py --out build/demo

test: setup ## Run every test
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

bench: setup ## Measure the kernels against memory and against stock torch (results in build/bench)
	$(BIN)/safelora bench --out build/bench $(BENCH)

figures: setup ## Measure, and write the figures into README.md and docs
	$(BIN)/safelora bench --out docs/measured
	$(BIN)/python benchmarks/write_tables.py docs/measured/bench.json
	$(BIN)/python docs/generate_api.py

lint: setup ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: setup ## Rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean: ## Remove what the build made, the virtual environment excepted
	rm -rf build dist *.egg-info safelora_kernels/*.so safelora_kernels/_build_info.json $(BIN)/.native
