PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: demo test lint clean help

demo: $(VENV)/demo.stamp  ## text to video with the shipped tiny weights (the first time installs into .venv)
	$(BIN)/python sample.py

test: $(VENV)/test.stamp  ## run the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/test.stamp  ## check style and format
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

clean:  ## remove .venv and all caches; runs/ and samples/ stay
	rm -rf $(VENV) *.egg-info build dist .pytest_cache .ruff_cache .hypothesis
	rm -rf __pycache__ */__pycache__

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' Makefile

# Install once; again when a dependency changes.
$(VENV)/demo.stamp: extras = video,plot
$(VENV)/test.stamp: extras = video,plot,qwen,text,wan,lora,test
$(VENV)/demo.stamp $(VENV)/test.stamp: pyproject.toml constraints.txt
	@test -x $(BIN)/pip || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo 'Python 3.11 or newer is needed, not $(PYTHON); name one: make PYTHON=python3.12' >&2; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e ".[$(extras)]" -c constraints.txt
	@touch $@
