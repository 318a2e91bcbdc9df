# Every target sets up .venv by itself from pyproject.toml at the versions of constraints.txt; nothing else is touched.
# Needs make, git and a Python with venv and pip. On a TPU VM or a GPU machine add the matching extra:
#   make reproduce EXTRAS=dev,report,tpu        (or cuda)

PYTHON ?= python3
EXTRAS ?= dev,report
STUDY  ?= params/laptop/study.yaml
PARITY ?= 1
BROWSER ?= 1
UPGRADE ?=
ARGS   ?=

.DELETE_ON_ERROR:

comma := ,
VENV := .venv
BIN  := $(VENV)/bin
HERE := $(CURDIR)/$(VENV)/home
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

# Only this checkout decides what runs: no interpreter downloads, no outer Python path, no outer Jupyter path.
export UV_PYTHON_DOWNLOADS := never
unexport PYTHONPATH PYTHONHOME JUPYTER_PATH JUPYTER_CONFIG_PATH

# uv shares its cache between checkouts; where the home folder can't be written, the cache lies in .venv.
ifndef UV_CACHE_DIR
UV_CACHE_DIR := $(shell d="$${XDG_CACHE_HOME:-$${HOME:+$$HOME/.cache}}"; cache="$$d/uv"; \
	while [ -n "$$d" ] && [ ! -e "$$d" ]; do d=$${d%/*}; done; \
	if [ -n "$$d" ] && [ -w "$$d" ]; then echo "$$cache"; else echo "$(CURDIR)/$(VENV)/cache"; fi)
endif
export UV_CACHE_DIR

PYTEST := $(BIN)/python -m pytest

.PHONY: help reproduce test faults audit lint lab app profile bench constraints clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

reproduce: $(STAMP) ## run the laptop study and write its report; prints the report's path at the end
	$(BIN)/nfnet study $(STUDY) $(ARGS)

test: lint $(VENV)/.extra-ray $(VENV)/.extra-app $(if $(filter-out 0,$(PARITY)),$(VENV)/.parity) $(if $(filter-out 0,$(BROWSER)),$(VENV)/.browser) ## lint, then every test, or those of ARGS (PARITY=0: without PyTorch and timm; BROWSER=0: without a browser)
	$(if $(ARGS),$(PYTEST) $(if $(filter 0,$(BROWSER)),-m "not browser") $(ARGS),OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist loadfile -m "not alone" && $(PYTEST) -m "alone$(if $(filter 0,$(BROWSER)), and not browser)")

faults: $(STAMP) $(VENV)/.extra-ray $(VENV)/.extra-app ## make every fault of docs/reliability.md, in its long form, and write what happened
	$(BIN)/python tests/faults.py $(ARGS)

audit: $(STAMP) $(VENV)/.extra-audit ## look up known vulnerabilities of the pinned versions (ARGS=all.zip: in a dump of OSV, without network)
	$(BIN)/python tests/audit.py $(ARGS)

lint: $(STAMP) ## check the code with ruff
	$(BIN)/ruff check .

lab: $(STAMP) ## open JupyterLab on notebooks/, reachable from this machine only
	$(BIN)/jupyter-lab --ip=127.0.0.1 $(ARGS) notebooks

app: $(STAMP) $(VENV)/.extra-app ## open the explorer as a page, reachable from this machine only
	$(BIN)/voila --Voila.ip=127.0.0.1 --token $(ARGS) notebooks/08_explore.ipynb

profile: $(STAMP) ## show where a training step's time goes (ARGS="F3-mini -p batch_size=32")
	$(BIN)/nfnet profile $(or $(ARGS),F0-mini)

bench: $(STAMP) ## run the benchmarks
	@for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python "$$script" $(ARGS) || exit; done

constraints: $(VENV)/.created ## refresh constraints.txt after editing pyproject.toml (UPGRADE=--upgrade renews every pin)
	$(BIN)/uv --no-config pip compile pyproject.toml --quiet --universal --python-version 3.11 --all-extras \
		--no-header --no-annotate --no-emit-index-url --no-emit-find-links $(UPGRADE) --output-file constraints.txt

clean: ## remove .venv and caches; outputs/ stays
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A user's own Jupyter, IPython or matplotlib settings must not change results.
reproduce test faults bench: export JUPYTER_CONFIG_DIR := $(HERE)/jupyter/config
reproduce test faults bench: export JUPYTER_DATA_DIR := $(HERE)/jupyter/data
reproduce test faults bench: export JUPYTER_RUNTIME_DIR := $(HERE)/jupyter/runtime
reproduce test faults bench: export IPYTHONDIR := $(HERE)/ipython
reproduce test faults bench: export MPLCONFIGDIR := $(HERE)/matplotlib
reproduce test faults bench: export XDG_CACHE_HOME := $(HERE)/cache
test faults: export JAX_PLATFORMS ?= cpu

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "error: PYTHON=$(PYTHON) is not Python 3.11 or newer; name one that is: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP_INSTALL) uv || echo "uv can't be installed here: pip does the work, more slowly" >&2
	@touch $@

# timm and PyTorch, with which the models are compared. By pip, which a machine's settings point at PyTorch's CPU build.
$(VENV)/.parity: constraints.txt | $(STAMP)
	@echo "installing PyTorch and timm into $(VENV) (make test PARITY=0 does without)"
	@$(PIP_INSTALL) -e '.[parity]'
	@touch $@

# Extras that only some targets need.
$(VENV)/.extra-%: constraints.txt pyproject.toml | $(STAMP)
	@echo "installing [$*] into $(VENV)"
	@{ test -x $(BIN)/uv && $(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[$*]'; } \
		|| $(PIP_INSTALL) -e '.[$*]'
	@touch $@

# The browser tests drive Debian's Chromium; playwright's own download is never used.
$(VENV)/.browser: | $(VENV)/.created
	@command -v chromium >/dev/null || { \
		echo "installing Chromium for the browser tests (make test BROWSER=0 does without)"; \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } >/dev/null 2>&1; } || { \
		echo "error: the browser tests need Debian's chromium: install it, or make test BROWSER=0" >&2; exit 1; }
	@touch $@

# Where Python may not write bytecode later, compile it now: a study starts many interpreters (9 s of imports, or 4).
$(STAMP): pyproject.toml constraints.txt | $(VENV)/.created
	@echo "installing [$(EXTRAS)] into $(VENV) (minutes the first time, seconds with a warm cache)"
	@{ test -x $(BIN)/uv && $(BIN)/uv pip install --quiet --python $(BIN)/python \
		$(if $(PYTHONDONTWRITEBYTECODE),--compile-bytecode) -c constraints.txt -e '.[$(EXTRAS)]'; } \
		|| $(PIP_INSTALL) -e '.[$(EXTRAS)]'
	@touch $@
