# Every target makes what it needs: scripts/bootstrap.py (Python 3.8+, standard library only) does the work.
# `exec` and $$PPID tie each run to make itself: when make is killed, nothing stays behind.

PYTHON ?= python3
FRAMEWORK ?= trl
ARGS ?=

# The demo of each framework. verl and OpenRLHF train on GPUs only: their demos run on the stand-ins for GPUs of our
# tests. The paths are absolute because the trainers' workers run elsewhere.
DEMO = gymlink demo --framework $(FRAMEWORK) --output runs/demo
DEMO_trl = $(DEMO)
DEMO_verl = env PYTHONPATH="$(CURDIR)/tests/verl_on_cpu" VERL_USE_EXTERNAL_MODULES=verl_on_cpu $(DEMO) -- +verl_on_cpu=on
DEMO_openrlhf = env PYTHONPATH="$(CURDIR)/tests/openrlhf_on_cpu" $(DEMO) -- --ds.attn_implementation sdpa

RUN = exec $(PYTHON) scripts/bootstrap.py --parent $$PPID
SUITES = exec $(PYTHON) scripts/suites.py --parent $$PPID

.PHONY: help demo test test-core test-trl test-verl test-openrlhf check bench clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: ## train a tiny model in a real NeMo Gym environment, into runs/demo (FRAMEWORK=trl; verl or openrlhf: on stand-ins for GPUs)
	@$(RUN) $(FRAMEWORK) -- $(DEMO_$(FRAMEWORK))

test: ## run every suite (ARGS="-k words" goes to pytest, here and below)
	@$(SUITES) -- $(ARGS)

test-core: ## run the tests of the core, the docs and the scripts
	@$(SUITES) core -- $(ARGS)

test-trl: ## run the tests of the TRL plugin, and the whole way through it
	@$(SUITES) trl -- $(ARGS)

test-verl: ## run the tests of the verl plugin
	@$(SUITES) verl -- $(ARGS)

test-openrlhf: ## run the tests of the OpenRLHF plugin
	@$(SUITES) openrlhf -- $(ARGS)

check: ## lint, format, types and import rules
	@$(RUN) trl -- bash scripts/check

bench: ## measure, and write the table in README.md (ARGS=turn_cost runs one)
	@$(RUN) trl -- python benchmarks $(ARGS)

clean: ## remove the environments and caches; runs/ stays
	@rm -rf .venvs .tools dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
