# Without make: `python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/python -m tinylm study`
PYTHON ?= python3
VENV ?= .venv
TEXT ?=
PRESET ?=
MINUTES ?=
SEED ?=
ONLY ?=
FORCE ?=
KILLS ?=
DAMAGES ?=
EXAMPLES ?=

PY = $(VENV)/bin/python
NEW_ENOUGH = import sys; sys.exit(sys.version_info < (3, 11))
export TEXT PRESET MINUTES SEED ONLY KILLS DAMAGES EXAMPLES

.PHONY: help study lab screenshots bench soak test test-slow check format environment test-environment clean

help:
	@echo 'make study      measure the scaling law of a text: TEXT=path or name, PRESET=smoke|quick|full, MINUTES=, SEED='
	@echo 'make lab        open the labs in JupyterLab, on this machine only'
	@echo 'make screenshots  open every lab in a browser, play, and keep its picture in labs/pictures'
	@echo 'make bench      measure speed on this idle machine: ONLY=training,sweep PRESET=smoke|full FORCE=1'
	@echo 'make soak       kill work, damage files, feed readers nonsense, compare with other places: KILLS=200 DAMAGES=1000'
	@echo '                EXAMPLES=2000 SEED=0 ONLY=ranks,exchange,cluster,damages,fuzz,kills (and large-text, report)'
	@echo 'make test       the quick tests (make test-slow: the others)'
	@echo 'make check      format and lint (make format: mend both)'
	@echo 'make clean      remove what tools leave behind; results and the environment stay'
	@echo 'PYTHON=python3.12 chooses the interpreter that the environment is made with; VENV=folder where it lies.'

# The values reach the shell as its own variables, so that paths with spaces and quotes arrive whole.
study: environment
	$(PY) -m tinylm study $(if $(TEXT),--text "$$TEXT") $(if $(PRESET),--preset "$$PRESET") \
		$(if $(MINUTES),--minutes "$$MINUTES") $(if $(SEED),--seed "$$SEED")

lab: environment
	JUPYTER_PREFER_ENV_PATH=1 $(PY) -m jupyterlab --ip=127.0.0.1 --notebook-dir=labs

screenshots: test-environment
	TINYLM_SCREENSHOTS=labs/pictures $(PY) -m pytest tests/test_labs_browser.py

bench: test-environment
	$(PY) -m tinylm bench $(if $(ONLY),--only "$$ONLY") $(if $(PRESET),--preset "$$PRESET") $(if $(FORCE),--force)

soak: test-environment
	$(PY) -m tinylm.study.reliability $(if $(ONLY),--only "$$ONLY") $(if $(KILLS),--kills "$$KILLS") \
		$(if $(DAMAGES),--damages "$$DAMAGES") $(if $(EXAMPLES),--examples "$$EXAMPLES") $(if $(SEED),--seed "$$SEED")

test: test-environment
	$(PY) -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: test-environment
	@status=0; \
	$(PY) -m pytest -n 2 --dist loadfile -m "slow and not alone" || status=1; \
	$(PY) -m pytest -m "slow and alone" || status=1; \
	exit $$status

check: test-environment
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .

format: test-environment
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

environment: $(VENV)/.installed
	@$(PY) -I -c 'import os, tinylm; assert os.path.samefile(os.path.dirname(tinylm.__file__), "tinylm")' 2>/dev/null || { \
		echo "error: $(VENV) does not hold this folder's tinylm: its Python was removed, or the folder was moved or copied." >&2; \
		echo "Way out: remove it (rm -r $(VENV)) and call make again." >&2; exit 1; }

test-environment: $(VENV)/.installed-test environment

$(VENV)/.installed: pyproject.toml
	@if [ -e $(VENV)/pyvenv.cfg ]; then \
		$(PY) -c '$(NEW_ENOUGH)' 2>/dev/null || { \
			echo "error: the Python in $(VENV) does not start, or is older than 3.11." >&2; \
			echo "Way out: remove it (rm -r $(VENV)) and call make again." >&2; exit 1; }; \
	else \
		$(PYTHON) -c '$(NEW_ENOUGH)' 2>/dev/null || { \
			echo "error: tinylm needs Python 3.11 or newer, and $(PYTHON) is: $$($(PYTHON) --version 2>&1 | head -n 1)." >&2; \
			echo "Way out: name another one, as in: make study PYTHON=python3.12" >&2; exit 1; }; \
	fi
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PY) -m pip install -e '.[test]'
	@touch $@

clean:
	rm -rf .pytest_cache .ruff_cache .hypothesis tinylm.egg-info
	find tinylm tests labs studies \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
