# make help lists the targets. Everything happens inside .venv; nothing outside this folder is touched.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUST_SOURCES := Cargo.toml Cargo.lock $(shell find rust -name '*.rs' -o -name Cargo.toml)
CRATES := -p ingot-kernels -p ingot-tokenizer -p ingot-model
DEMO_OUTPUT ?= runs/demo
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: help demo build test test-all lint bench clean tools

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: build ## the whole path on the built-in small world, from raw text to an aligned model (about 10 minutes, no torch, no data)
	$(BIN)/ingot demo --output $(DEMO_OUTPUT)

build: $(VENV)/built ## make .venv, compile, install

test: $(VENV)/test-extras ## the test suite (installs torch for the reference twin: with PyPI's CUDA build that is 5 GB)
	cargo test --quiet $(CRATES)
	$(BIN)/python -m pytest -m "not slow"
	$(BIN)/python -m mypy.stubtest ingot._native

test-all: $(VENV)/test-extras ## also the long checks: three seeds, 1,000 kills, real corpora
	cargo test --quiet $(CRATES)
	$(BIN)/python -m pytest
	$(BIN)/python -m mypy.stubtest ingot._native

lint: $(VENV)/test-extras ## formatting, clippy, ruff, mypy
	@$(PIP) --no-build-isolation --editable ".[test,dev]"
	cargo fmt --check
	cargo clippy --quiet --workspace --all-targets -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

bench: $(VENV)/test-extras ## speed and memory beside the peers, answers asserted (several minutes)
	$(BIN)/python benches/tokenizer.py
	$(BIN)/python benches/pretrain.py

clean: ## remove what was built (.venv, target); runs stay
	rm -rf $(VENV) target python/ingot/*.so

# Say what is missing and how to get it, before anything fails in a less helpful way.
tools:
	@command -v $(PYTHON) >/dev/null || { echo "make: Python 3.11 or later is missing: install it from https://python.org or your package manager, or say make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is older than Python 3.11: install a newer one, or say make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: $(PYTHON) has no venv module: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	@command -v cargo >/dev/null || { echo "make: Rust is missing: install it from https://rustup.rs (or apt install rustup), version 1.95 or later"; exit 1; }
	@command -v cc >/dev/null || { echo "make: a C compiler (used as linker) is missing: apt install gcc, or on a Mac xcode-select --install"; exit 1; }

# A torch that the base Python already has is used instead of another 5 GB.
$(VENV)/created: | tools
	@$(PYTHON) -m venv $$($(PYTHON) -c 'import importlib.util; print("--system-site-packages" if importlib.util.find_spec("torch") else "")') $(VENV)
	@$(PIP) "maturin>=1.9,<2"
	@touch $@

$(VENV)/built: $(VENV)/created $(RUST_SOURCES) pyproject.toml
	@echo "compiling ingot (about a minute the first time)"
	@$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/test-extras: $(VENV)/built
	@echo "installing what the tests compare with: torch, transformers, tokenizers, tiktoken (minutes the first time)"
	@$(PIP) --no-build-isolation --editable ".[test]"
	@touch $@
