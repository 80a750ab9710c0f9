# All set-up happens in .venv; every target makes it first where it is missing.
PYTHON_ENV := .venv/bin/python
CORPUS ?=
OUTPUT ?=
PROFILE ?=

.PHONY: setup quickstart test test-slow check bench clean

setup:
	@requirements/install.sh $(PROFILE)

quickstart: setup  # CORPUS=my.jsonl runs it on your own texts, OUTPUT=folder elsewhere
	@$(PYTHON_ENV) examples/quickstart/run.py $(if $(CORPUS),--corpus "$(CORPUS)") $(if $(OUTPUT),--output-dir "$(OUTPUT)")

test: setup
	@$(PYTHON_ENV) -m pytest -m "not slow" -n 2 --dist loadfile --durations 12

test-slow: setup  # what takes minutes, the whole quick start included
	@$(PYTHON_ENV) -m pytest -m slow

check: setup
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

bench: setup  # on CPU; benchmarks/gpu.py is started by hand where a GPU is
	@for file in $(filter-out benchmarks/gpu.py,$(wildcard benchmarks/*.py)); do echo "== $$file"; $(PYTHON_ENV) $$file || exit 1; done

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build *.egg-info
