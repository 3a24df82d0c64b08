# Two commands set everything up on a fresh machine: `make demo` and `make test`.
VENV ?= .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
# Threads that spin while they wait slow small networks down many times on shared cores.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint coverage docs package bench clean

# One thread is faster than two on networks as small as the demo's; two students train side by side.
demo: export OMP_NUM_THREADS ?= 1
demo: $(INSTALLED)
	$(PYTHON) examples/train.py mnist --view noise:0.7 --labels 400 --batch-size 96 --epochs 8 \
		--criterion alone kd dense --jobs 2 --out runs/demo
	$(PYTHON) examples/data show mnist --view noise:0.7 --out runs/demo/image.png
	$(PYTHON) examples/predict.py runs/demo/student-dense-seed0-*.pt runs/demo/image.png

# One thread a process, a process a core. Each takes half of the tests in their order, so that a
# file's tests share their fixtures; who is done takes tests from the end of the other's.
test: export OMP_NUM_THREADS ?= 1
test: lint
	$(PYTHON) -m pytest --numprocesses 2 --dist worksteal

lint: $(INSTALLED)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

# Which lines and branches of the library the suite never runs; make coverage ARGS=tests/criteria
coverage: export OMP_NUM_THREADS ?= 1
coverage: $(INSTALLED)
	$(PYTHON) -m pip install --quiet pytest-cov
	$(PYTHON) -m pytest --numprocesses 2 --dist worksteal --cov --cov-report=term $(ARGS)

# Beside peers, on a quiet core: make bench ARGS=--check
bench: export OMP_NUM_THREADS ?= 1
bench: $(INSTALLED)
	$(PYTHON) -m pip install --quiet --no-deps lightly lightly_utils pytorch-metric-learning
	$(PYTHON) -m benchmarks $(ARGS)

docs: $(INSTALLED)
	$(PYTHON) -m pip install --quiet --editable ".[docs]"
	$(PYTHON) -m sphinx -W --keep-going docs docs/_build/html

# What would be uploaded: both archives, and the wheel used where no extra is installed.
package: $(INSTALLED)
	rm -rf dist
	$(PYTHON) -m build --outdir dist .
	$(PYTHON) -m twine check --strict dist/*
	$(PYTHON) .ci/package.py

$(INSTALLED): pyproject.toml
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
