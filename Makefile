# Two commands are all a newcomer needs: `make demo` and `make test`. Each sets up .venv on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint fuzz clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/anequant convert --output demo-output --force
	$(BIN)/anequant generate demo-output --prompt "In the morning they went down to the" --max-tokens 20

test: .venv/installed
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

.venv/fuzz: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	touch $@

# Seconds for all readers together; what escapes one is kept in fuzz-crashes/.
FUZZ_SECONDS ?= 600

fuzz: .venv/fuzz
	$(BIN)/python tools/fuzz.py --seconds $(FUZZ_SECONDS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv demo-output fuzz-crashes
