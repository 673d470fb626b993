# The commands of Half the Bits, and the one place that says how Sphinx is called:
# noxfile.py and the workflows call these targets.

PYTHON     ?= python3
SPHINXOPTS ?= -W --keep-going --nitpicky
PAGES      ?=
PORT       ?= 8000

# The GPU's environment holds the compiled part of Transformer Engine as well.
ifdef GPU
VENV := .nox/gpu
RECORD := -D verified_save=verification
else
VENV := .venv
endif

SPHINX := $(VENV)/bin/python -m sphinx -c . -d build/doctrees $(SPHINXOPTS)

ONLY   := $(if $(PAGES),-D "verified_pages=$(PAGES)")

# Nothing that points Python elsewhere may mix into the pinned environment.
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help html test doctest static serve linkcheck venv clean clean-build

help: ## list these commands
	@echo "Half the Bits: make COMMAND"
	@sed -n 's/^\([a-z-]*\):.*## /  \1  /p' Makefile | awk '{ n = $$1; $$1 = ""; printf "  %-12s%s\n", n, $$0 }'
	@echo "Options: PYTHON=python3.12 (to make .venv), PAGES=guide/true_half,start/first_run"

html: venv ## build the site in build/html, running the blocks that changed
	$(call sphinx,html)
	@echo "Open $(CURDIR)/build/html/index.html"

test: venv ## run every check that CI runs (nox -l lists them)
	@$(VENV)/bin/python -m nox

doctest: venv ## run all blocks, or those of PAGES=..., and record the results
	$(call sphinx,doctest,$(RECORD) $(ONLY))

static: venv ## type-check all blocks, those for a GPU too, without running them
	$(call sphinx,static)

serve: venv ## build, serve on 127.0.0.1 (PORT=8000) and reload on every change
	@mkdir -p build/doctrees && touch build/doctrees/unfinished
	$(VENV)/bin/python -m sphinx_autobuild -b html -c . -d build/doctrees $(SPHINXOPTS) \
	  --watch snippets --watch _ext --watch _static --watch conf.py --watch verification \
	  --host 127.0.0.1 --port $(PORT) source build/html

linkcheck: venv ## follow every link to other sites (needs the web)
	$(call sphinx,linkcheck)

venv: ## make .venv and install requirements.txt, unless that is done
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "Half the Bits: there is no $(PYTHON): install Python 3.11 or newer, or set PYTHON=... to where it is." >&2; exit 1; }
	@"$(PYTHON)" _ext/install.py --venv $(VENV) --name "$(PYTHON)" $(if $(GPU),--gpu) \
	  $(if $(filter command environment,$(origin PYTHON)),--chosen)

clean: clean-build ## remove all that these commands made, the environments too
	rm -rf .venv .nox

clean-build: ## remove all that these commands made, except the environments
	rm -rf build lightning_logs .mypy_cache .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name .nox -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call sphinx,BUILDER,FLAGS). Sphinx repeats only the warnings of pages that it reads
# again. So it reads them all after a build that did not end well, and when the code
# that reads them has changed; else -W could be passed by building twice.
define sphinx
	@mkdir -p build/doctrees
	@cd build/doctrees && if [ -e environment.pickle ]; then \
	  if [ -e unfinished ] || [ -n "$$(find ../../conf.py ../../_ext ../../$(VENV)/requirements.installed \
	    ! -path '*/__pycache__*' -type f -newer environment.pickle 2>/dev/null)" ]; \
	  then rm environment.pickle; fi; fi; touch unfinished
	$(SPHINX) -b $(1) $(2) source build/$(1)
	@rm build/doctrees/unfinished
endef
