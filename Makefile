# The environment is made once in .venv; set PYTHON to use another one that has requirements.txt installed.
PYTHON ?= .venv/bin/python

ifeq ($(PYTHON),.venv/bin/python)
ENVIRONMENT = .venv/installed
endif

.PHONY: quickstart lint test test-fast docs browser clean

# Two workers. A file's tests stay together, because they share fixtures.
PYTEST = $(PYTHON) -m pytest -q --numprocesses=2 --dist=loadfile --no-loadscope-reorder

quickstart: $(ENVIRONMENT)  ## the whole of REALM on the built-in corpus, below runs/quickstart
	$(PYTHON) -m realm_tf.pipeline --config=configs/quickstart.py

lint: $(ENVIRONMENT)  ## style, formatting, types, and who may import whom
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -c 'from importlinter import cli; cli.lint_imports_command()' --no-cache --no-logo

test: $(ENVIRONMENT)  ## all tests
	$(PYTEST) --durations=10

test-fast: $(ENVIRONMENT)  ## the unit tests: those that are not slow by tests/conftest.py
	$(PYTEST) -m "not slow"

docs: $(ENVIRONMENT)  ## the pages of docs/ as a website, in build/docs; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet

browser:  ## what the web page's tests need, on Debian; without it they are skipped
	apt-get install --yes --no-install-recommends chromium chromium-driver

clean:  ## environment and caches; runs/ stays
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed: requirements.txt requirements_lock.txt
	$$(command -v python3.11 || command -v python3) -m venv .venv
	.venv/bin/python -m pip install --quiet --requirement requirements.txt --constraint requirements_lock.txt
	touch $@
