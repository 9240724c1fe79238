# Two commands do all the set-up: `make demo` and `make test`. Both create .venv first when it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := build/demo

.PHONY: demo docs test suite lint clean

# The stamps make a second `make` start at once, and install again when the dependencies change.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/.installed
	rm -rf $(DEMO)
	$(BIN)/darht-experiment recipes/digits-demo.yaml --out $(DEMO) --jobs 2

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/house_rules.py

# Both at a time: mypy has work for one core only.
test: $(VENV)/.dev
	$(MAKE) --no-print-directory -j2 lint suite

# One process for each core, each with one thread: threads of several processes on the same cores wait for each other.
suite: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

# The page of commands, written from the commands themselves, and the site in build/site; warnings are errors.
docs: $(VENV)/.dev
	$(BIN)/python .ci/cli_page.py
	$(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf build $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
