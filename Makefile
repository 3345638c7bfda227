# make demo | make test | make check | make bench
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check slow bench bench-cloud clean

demo: $(INSTALLED)
	$(BIN)/python pipelines/full.py demo $(ARGS)

test: $(INSTALLED) check
	$(BIN)/python -m pytest $(ARGS)

slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check coin_ray pipelines tests
	$(BIN)/ruff format --check coin_ray pipelines tests
	$(BIN)/mypy

bench: bench-cloud

bench-cloud: $(INSTALLED)
	$(BIN)/python tests/benchmarks/bench_cloud.py $(ARGS)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test,onnx]'
	touch $@

clean:
	rm -rf $(VENV) runs
