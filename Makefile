# Two commands do everything: `make try` answers a question, `make test` runs every check.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TOOLS  := target/tools/versions.txt

SOURCES := Cargo.toml Cargo.lock pyproject.toml .cargo/config.toml scripts/build_backend.py \
           $(shell find rust -type f -not -path 'rust/tests/*') \
           $(shell find python -type f -not -name '*.pyc' -not -name '*.so')
CARGO   := cargo --locked
QUIETLY := -q --disable-pip-version-check
PIP     := $(BIN)/python -m pip install $(QUIETLY)

.PHONY: try test test-browser test-json-schema lint bench soak docs wheel wheel-cuda clean

try: $(VENV)/installed
	@$(BIN)/python -m tabagent_model generate "What is the capital of France?"

test: $(VENV)/installed-for-tests lint
	$(CARGO) test --release --no-default-features
	$(BIN)/python -m pytest

# The chat page in Debian's chromium; `make test` skips it where there is none.
test-browser: $(VENV)/installed-for-tests
	command -v chromium chromedriver || apt-get install -y --no-install-recommends chromium chromium-driver
	$(PIP) selenium
	$(BIN)/python -m pytest tests/real/test_page.py

# The JSON-Schema-Test-Suite, which the source distribution of jsonschema carries, against our grammars.
test-json-schema: $(TOOLS)
	@test -d target/jsonschema-4.23.0 || ($(BIN)/python -m pip download $(QUIETLY) --no-deps \
		--no-binary :all: --dest target jsonschema==4.23.0 && tar -xzf target/jsonschema-4.23.0.tar.gz -C target)
	JSON_SCHEMA_TEST_SUITE=$(CURDIR)/target/jsonschema-4.23.0/json/tests $(CARGO) test --release \
		--no-default-features --test constraint -- --ignored --nocapture of_the_public_suite

lint: $(VENV)/installed-for-tests
	cargo fmt --check
	$(CARGO) clippy --release --all-targets --features python -- -D warnings
	$(CARGO) clippy --release --all-targets --no-default-features -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest tabagent_model._core --ignore-disjoint-bases

bench: $(VENV)/installed-for-tests
	$(BIN)/python -m benches

# 100,000 requests of eight users, half an hour over HTTP, and 200 swaps; `make test` has 500, six
# seconds and 100 of them.
soak: $(VENV)/installed-for-tests
	$(BIN)/python -m tests.soak
	$(BIN)/python -m tests.soak --http --minutes 30 --users 16
	TABAGENT_SWAP_ROUNDS=200 $(BIN)/python -m pytest -s tests/real/test_manager.py -k swapping

docs:
	@echo "README.md          what it is and how to begin"
	@ls docs/*.md

wheel: dist/built
	@ls dist/*.whl

# Needs a CUDA toolkit, but no card, and about 40 minutes of a core for each architecture.
wheel-cuda: $(VENV)/installed
	$(BIN)/python scripts/cuda_wheel.py

clean:
	rm -rf $(VENV) dist
	cargo clean

# The build tools live in the environment as well, so that pip need not fetch them for each build.
$(VENV)/tools: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "tabagent_model needs Python 3.10 or newer, and this is " + sys.version)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) $$(sed -n 's/^requires = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
	@touch $@

$(TOOLS): $(VENV)/tools
	@$(BIN)/python scripts/build_backend.py
	@touch $@

dist/built: $(TOOLS) $(SOURCES)
	@test -d target/release/build || echo "Compiling llama.cpp for the first time: about 7 minutes on two cores."
	@rm -rf dist
	@$(BIN)/maturin build --release --locked --quiet --interpreter $(BIN)/python --out dist
	@touch $@

$(VENV)/installed: dist/built
	@$(PIP) --force-reinstall --no-deps dist/*.whl
	@$(PIP) dist/*.whl
	@touch $@

$(VENV)/installed-for-tests: $(VENV)/installed
	@$(PIP) "$$(ls dist/*.whl)[test]"
	@touch $@
