# make demo: compile the example model to int4, generate, evaluate, measure.  make test: everything CI checks.
# make mutants: whether the tests see small changes of the gate, verification, artifacts and arithmetic.
# make fuzz: hostile inputs for every reader, some minutes.  make faults: what a failing disk leaves behind.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test env lint unit mutants fuzz faults clean

env: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt # what the example needs; nothing is built from source
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "optc needs Python 3.11 or later"'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --only-binary :all: setuptools wheel
	$(INSTALL) --only-binary :all: --no-build-isolation --editable '.[onnx,genai]'
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	$(INSTALL) --no-build-isolation --editable '.[dev]'
	DS_BUILD_OPS=0 $(INSTALL) --no-build-isolation --editable '.[deepspeed]' # its setup imports torch
	touch $@

demo: env
	$(BIN)/optc compile examples/fiction-3m --target onnx-cpu --quant rtn -o $(OUT)/fiction-onnx --force
	$(BIN)/optc run $(OUT)/fiction-onnx --prompt "The old man looked at the sea, and" --max-new-tokens 64
	$(BIN)/optc eval $(OUT)/fiction-onnx --text examples/book.txt
	$(BIN)/optc bench $(OUT)/fiction-onnx

lint: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks
	$(BIN)/lint-imports

unit: $(VENV)/.ready-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test: $(VENV)/.ready-test # side by side: lint has one core only, and tests take two
	$(MAKE) --jobs 2 lint unit

mutants: $(VENV)/.ready-test # hours; MODULES="gate budget" takes some
	$(INSTALL) --editable '.[mutants]' --no-build-isolation
	$(BIN)/python tests/mutation.py $(MODULES)

FUZZ_SECONDS ?= 30
FUZZ_JOBS ?= 1
FUZZ ?= /tmp/optc-fuzz

fuzz: $(VENV)/.ready-test # 35 readers, FUZZ_SECONDS each; figures in FUZZ/figures.json, inputs that fail in FUZZ/failed
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m fuzz.campaign --seconds $(FUZZ_SECONDS) --jobs $(FUZZ_JOBS) --work $(FUZZ) \
		--json $(FUZZ)/figures.json --keep $(FUZZ)/failed

faults: $(VENV)/.ready-test # kills, failing disks and power losses at every file operation of the writers
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m fuzz.disk --work $(FUZZ)-disk --jobs $(FUZZ_JOBS) \
		--json $(FUZZ)-disk/figures.json
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m fuzz.serve_kills --work $(FUZZ)-disk --json $(FUZZ)-disk/serve.json

clean:
	rm -rf $(OUT)
