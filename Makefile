# `make demo` and `make test` work on a fresh machine: each makes .venv and installs what it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
FUZZ_SECONDS ?= 60
EXTRAS ?= openvino executorch litert fpga

.PHONY: demo test check fuzz targets wheel clean

demo: $(VENV)/.stamp-run
	$(BIN)/kompakt demo

test: $(VENV)/.stamp-dev check
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile
	@echo "made: lint, types and tests passed; see README.md for what to do next"

check: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Guided by coverage where atheris installs, blind mutation of the committed corpus otherwise.
fuzz: $(VENV)/.stamp-dev
	-$(BIN)/python -m pip install --quiet --only-binary :all: atheris
	$(BIN)/python -m tests.fuzz.fuzz_kpk $(FUZZ_SECONDS)

# Every target's runtime in an environment of its own, which sees what $(VENV) has and adds its extra. What the extra
# brings may hold plugins of pytest that are older than pytest.
targets: $(EXTRAS:%=target-%)

target-%: $(VENV)-%/.stamp
	PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(VENV)-$*/bin/python -m pytest -p xdist -n $(JOBS) tests/test_targets.py tests/test_fpga.py

$(VENV)-%/.stamp: pyproject.toml | $(VENV)/.stamp-dev
	$(PYTHON) -m venv $(VENV)-$*
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$($(VENV)-$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	$(VENV)-$*/bin/python -m pip install --quiet --editable '.[$*]'
	touch $@

.PRECIOUS: $(VENV)-%/.stamp

wheel: $(VENV)/.stamp-dev
	$(BIN)/python -m build --wheel --outdir dist

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kompakt needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-run: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.stamp-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/.stamp-run

clean:
	rm -rf $(VENV) $(EXTRAS:%=$(VENV)-%) dist kompakt-demo
