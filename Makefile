PYTHON ?= python3
BIN = .venv/bin
export PYTHONPATH := .
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: venv demo test bench check fix clean

venv: .venv/installed

.venv/python: 
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11 …')"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	touch $@

.venv/installed: .venv/python requirements.txt
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

# torch first: with it there, its own version satisfies whatever asks for one later.
.venv/tests-installed: .venv/installed tests/requirements.txt
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -r tests/requirements.txt
	touch $@

demo: venv  ## pictures drawn from text by the embedded model, and one through a server
	$(BIN)/python -m keras_sd.demo --out out/demo.png
	$(BIN)/python -m serving.demo --out out

# Two processes with a thread each: with a thread for every core they wait for each other, 37 minutes instead of 31.
test: export OMP_NUM_THREADS = 1
test: export TF_NUM_INTRAOP_THREADS = 1
test: .venv/tests-installed  ## every number against those of diffusers, transformers and keras-cv
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Resumed where it was stopped: what is in runs/bench is not measured again. Hours on two cores; keep the machine quiet.
# Those that need Debian's fonts-noto-color-emoji come first, and say so.
BENCHMARKS = int8 approximations quality startup memory inference optimisations

bench: .venv/tests-installed  ## benchmarks/RESULTS.md, docs/speed.png, docs/quality.png
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name || exit 1; done
	$(BIN)/python -m benchmarks.results

check: .venv/tests-installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

fix: .venv/tests-installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv out .pytest_cache .ruff_cache
