# Every target makes what it needs: scripts/bootstrap.py (Python 3.8+, standard library only) does the work.
# `exec` and $$PPID tie each run to make itself: when make is killed, nothing stays behind.

PYTHON ?= python3
FRAMEWORK ?= trl
ARGS ?=

RUN = exec $(PYTHON) scripts/bootstrap.py --parent $$PPID
SUITES = exec $(PYTHON) scripts/suites.py --parent $$PPID

.PHONY: help demo test test-core test-trl check bench clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: ## train a tiny model in a real NeMo Gym environment (FRAMEWORK=trl), into runs/demo
	@$(RUN) $(FRAMEWORK) -- gymlink demo --framework $(FRAMEWORK) --output runs/demo

test: ## run every suite (ARGS="-k words" goes to pytest, here and below)
	@$(SUITES) -- $(ARGS)

test-core: ## run the tests of the core, the docs and the scripts
	@$(SUITES) core -- $(ARGS)

test-trl: ## run the tests of the TRL plugin, and the whole way through it
	@$(SUITES) trl -- $(ARGS)

check: ## lint, format, types and import rules
	@$(RUN) trl -- bash scripts/check

bench: ## measure
	@$(RUN) trl -- python benchmarks $(ARGS)

clean: ## remove the environments and caches; runs/ stays
	@rm -rf .venvs .tools dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
