# make demo | make test | make test-all | make test-cluster | make check | make soak | make bench | make docs
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEVELOPED := $(VENV)/.developed
PYTEST := OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true $(BIN)/python -m pytest
WORKERS ?= 2

.PHONY: demo test test-all check soak test-cluster bench bench-against bench-cloud bench-coin bench-codetr bench-data bench-pipeline bench-speed bench-students bench-training docs clean

demo: $(INSTALLED)
	$(BIN)/python pipelines/full.py demo $(ARGS)

# Lint, types and the fast tests, in minutes.
test: $(DEVELOPED) check
	$(PYTEST) -n $(WORKERS) --dist worksteal --durations=15 --durations-min=3 $(ARGS)

# The slow tests too, and eight times the examples of Hypothesis.
test-all: $(DEVELOPED) check
	HYPOTHESIS_PROFILE=thorough $(PYTEST) -n $(WORKERS) --dist worksteal -m "not soak" --durations=30 --durations-min=5 $(ARGS)

soak: $(DEVELOPED)
	$(BIN)/python -m pytest -m soak -s tests/soak tests/pipelines/test_cloud_actors.py tests/pipelines/test_labeler_pool.py $(ARGS)

# A cluster on three machines of this one, and its faults; needs root: make test-cluster ARGS="--only undisturbed,asking-cable"
test-cluster: $(DEVELOPED)
	$(BIN)/python tests/cluster/run.py $(ARGS)

check: $(DEVELOPED)
	$(BIN)/ruff check coin_ray pipelines tests tune
	$(BIN)/ruff format --check coin_ray pipelines tests tune
	$(BIN)/mypy

bench: bench-cloud

# Collection against an earlier revision, in turns: make bench-against REV=f5fc1d4
REV ?= f5fc1d4
bench-against: $(DEVELOPED)
	$(BIN)/python tests/benchmarks/bench_against.py --rev $(REV) $(ARGS)

bench-cloud: $(DEVELOPED)
	$(BIN)/python tests/benchmarks/bench_cloud.py $(ARGS)

bench-coin: $(DEVELOPED)
	$(BIN)/python tests/benchmarks/bench_coin.py $(ARGS)

bench-codetr: $(DEVELOPED)
	$(BIN)/python tests/benchmarks/bench_codetr.py $(ARGS)

bench-students: $(DEVELOPED)
	$(BIN)/python tests/benchmarks/bench_students.py $(ARGS)

bench-pipeline: $(DEVELOPED)
	$(BIN)/python tests/benchmarks/bench_pipeline.py $(ARGS)

bench-speed: $(DEVELOPED)
	$(BIN)/python tests/benchmarks/bench_speed.py $(ARGS)

bench-training: $(DEVELOPED)
	$(BIN)/python tests/benchmarks/bench_training.py $(ARGS)

bench-data: $(DEVELOPED)
	$(BIN)/python tests/benchmarks/bench_data.py $(ARGS)

docs: $(DEVELOPED)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[docs]'
	$(BIN)/python -m pytest tests/docs
	$(BIN)/mkdocs build --strict

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(DEVELOPED): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test,export]'
	touch $@

clean:
	rm -rf $(VENV) runs
