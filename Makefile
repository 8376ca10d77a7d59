# The environment is made once in .venv; set PYTHON to use another one that has requirements.txt installed.
PYTHON ?= .venv/bin/python

ifeq ($(PYTHON),.venv/bin/python)
ENVIRONMENT = .venv/installed
endif

.PHONY: quickstart test browser clean

quickstart: $(ENVIRONMENT)  ## the whole of REALM on the built-in corpus, below runs/quickstart
	$(PYTHON) -m realm_tf.pipeline --config=configs/quickstart.py

test: $(ENVIRONMENT)
	$(PYTHON) -m pytest -q --durations=10 --numprocesses=2 --dist=loadfile --no-loadscope-reorder

browser:  ## what the web page's tests need, on Debian; without it they are skipped
	apt-get install --yes --no-install-recommends chromium chromium-driver

clean:  ## environment and caches; runs/ stays
	rm -rf .venv .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed: requirements.txt requirements_lock.txt
	python3.11 -m venv .venv || python3 -m venv --clear .venv
	.venv/bin/python -m pip install --quiet --requirement requirements.txt --constraint requirements_lock.txt
	touch $@
