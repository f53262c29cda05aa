# Two commands are all a newcomer needs: `make demo` and `make test`. Each sets up .venv on first use.
PYTHON ?= python3
BIN := .venv/bin
# pip builds wheels in its cache, which cannot be where the home is read-only.
PIP := $(BIN)/python -m pip install --quiet $(shell test -w "$$HOME" || echo --no-cache-dir)

.PHONY: demo test test-orders lint fuzz clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip
	$(PIP) --constraint constraints.txt torch
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	touch $@

# Core AI too where its package is: says why where it is not.
DEMO_TARGET = import sys; from anequant.targets.coreai.installed import find_problem; problem = find_problem(); \
	problem and print("Core AI is left out:", problem.what, file=sys.stderr); \
	print("coreml" if problem else "both")

demo: .venv/installed
	$(BIN)/anequant convert --output demo-output --force --target "$$($(BIN)/python -c '$(DEMO_TARGET)')"
	$(BIN)/anequant generate demo-output --prompt "In the morning they went down to the" --max-tokens 20

test: .venv/installed
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(TESTS)

# The tests five times, with another hash seed and another order of files each time, until one fails.
SHUFFLED = import glob, random; files = sorted(glob.glob('tests/**/test_*.py', recursive=True)); \
	random.Random($$seed).shuffle(files); print(*files)

test-orders: .venv/installed
	for seed in 0 1 2 3 4; do \
		PYTHONHASHSEED=$$seed $(MAKE) test TESTS="$$($(BIN)/python -c "$(SHUFFLED)")" || exit 1; \
	done

.venv/fuzz: .venv/installed
	$(PIP) --constraint constraints.txt --editable '.[fuzz]'
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
