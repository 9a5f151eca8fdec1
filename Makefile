PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo picture notebooks test slow lint

demo: .venv/demo.installed
	$(BIN)/python demo.py

picture: .venv/demo.installed
	$(BIN)/python demo.py --save docs/demo.png

notebooks: .venv/notebooks.installed
	$(BIN)/python -m notebooks.execute

test: .venv/dev.installed
	$(BIN)/python -m pytest -n 2

slow: .venv/dev.installed
	$(BIN)/python -m pytest -n 2 -m slow

lint: .venv/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

.venv/%.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@
