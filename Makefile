# `make` alone lists the targets. Every command runs in .venv, which is made on first use.
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
BIN := .venv/bin
READY := .venv/.ready
ARGS ?=
SEEDS ?= 0,1,2
WORKERS ?= 2
# WORKERS processes; the tests of a file run in one process, as they share fixtures
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: help train evaluate interpret report export import-saes test check format sweep replicate pretrain chaos bench bench-smallest bench-rivals \
	docs notebook fingerprint clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  ARGS="..." is passed on: make train ARGS="groups=count groups.num_groups=3"'

$(READY): pyproject.toml constraints.txt .ci/install
	@.ci/install
	@touch $@

train: $(READY)  ## Train Group-SAEs: the bundled model and text, minutes on a CPU
	@$(BIN)/python -m groupsae.train $(ARGS)

evaluate: $(READY)  ## Measure what a run costs the model: make evaluate ARGS="run=<run folder>"
	@$(BIN)/python -m groupsae.evaluate $(ARGS)

# without run= the newest finished run under outputs/
interpret: $(READY)  ## Show what single latents do, on one page: the newest run, or ARGS="run=<run folder>"
	@case " $(ARGS)" in *" run="*) ;; *) \
		newest=$$(ls -t outputs/*/*/*/summary.json 2>/dev/null | head -n 1); \
		if [ -z "$$newest" ]; then \
			echo 'no finished run under outputs/: make train makes one' >&2; exit 1; fi; \
		run="run=$${newest%/summary.json}"; echo "$$run" ;; esac; \
	$(BIN)/python -m groupsae.interpret $${run:+"$$run"} $(ARGS)

report: $(READY)  ## Write the report page of one or more runs: ARGS="run=<folder>[,<folder>]"
	@$(BIN)/python -m groupsae.report $(ARGS)

export: $(READY)  ## Write SAEs in another library's format: ARGS="run=<folder> format=saelens"
	@$(BIN)/python -m groupsae.export $(ARGS)

import-saes: $(READY)  ## Make a run folder from others' SAEs: ARGS="saes=<folder> model=<model>"
	@$(BIN)/python -m groupsae.import_saes $(ARGS)

test: $(READY)  ## Run the tests
	@$(PYTEST) $(ARGS)

check: $(READY)  ## Lint, types, import contracts, tests: what CI runs
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(PYTEST)

format: $(READY)  ## Format the code and fix lint errors where possible
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

sweep: $(READY)  ## Train with one to six groups
	@$(BIN)/python -m groupsae.train -m groups=count groups.num_groups=1,2,3,4,5,6 $(ARGS)

replicate: $(READY)  ## All rules, all numbers of groups, SEEDS=0,1,2: docs/replication.md (an hour)
	@$(BIN)/python -m groupsae.train -m experiment=replication seed=$(SEEDS) $(ARGS)
	@$(BIN)/python -m benchmarks.replication seed=$(SEEDS) $(ARGS)

pretrain: $(READY)  ## Train the bundled language model again (hours)
	@$(BIN)/python -m benchmarks.pretraining $(ARGS)

chaos: $(READY)  ## Kills, full disks, flipped bits, NaN: the table of docs/reliability.md (12 minutes)
	@$(BIN)/python -m pytest -m slow tests/chaos --table docs/reliability.md $(ARGS)

bench: $(READY)  ## Measure the training loop and its parts, a quarter of an hour: benchmarks/results
	@for each in step kernels loop lm_forward scaling; do $(BIN)/python -m benchmarks.$$each || exit; done

# CI runs every benchmark, so that none breaks unnoticed
bench-smallest: $(READY)  ## Run every benchmark for a few seconds; the figures mean nothing
	@mkdir -p build/bench
	@printf '%s\n' real_models better_groups interpretation interpretability downstream probing replication law scale pretraining \
		soak rivals quality saes store loop step kernels lm_forward scaling notebook | xargs -P $(WORKERS) -I @ sh -c \
		'if $(BIN)/python -m benchmarks.@ size=smallest >build/bench/@.log 2>&1; \
		then echo benchmarks.@; else cat build/bench/@.log; exit 255; fi'

bench-rivals: $(READY)  ## Compare training with SAELens, sparsify and dictionary_learning (15 minutes, 6 GB)
	@benchmarks/rivals/install
	@$(BIN)/python -m benchmarks.rivals $(ARGS)

fingerprint: $(READY)  ## Did a change alter a number? ARGS="--write <file>", later ARGS="--against <file>"
	@$(BIN)/python tests/fingerprint.py $(ARGS)

.venv/.docs: $(READY)
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
		--editable '.[docs]'
	@touch $@

docs: .venv/.docs  ## Build the documentation into site/: open site/index.html
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/mkdocs/mkdocs.yml

.venv/.notebook: $(READY)
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
		--editable '.[notebook]'
	@touch $@

notebook: .venv/.notebook  ## Run docs/notebook.py in a kernel and write docs/notebook.md (a minute)
	@$(BIN)/python docs/mkdocs/notebook.py $(ARGS)

clean:  ## Remove caches and build products; .venv and outputs stay
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
