# Every target sets up the environment it needs; only Python >= 3.11 and make are assumed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: bench bench-gpu demo test lint types docs package lowest clean

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "lightning_sym needs Python >= 3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY)

demo: $(READY)  ## train a small network on real digits with every monitor
	$(BIN)/python examples/monitor_digits.py

test: $(READY)
	OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest -q -n 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

bench: $(READY)  ## measure again what the page of benchmarks tells; on a quiet machine
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/sharpness.py --out docs/results/sharpness_benchmark.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/syre.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/growth.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/tools.py
	$(BIN)/python benchmarks/bumps.py --out docs/results/bumps_benchmark.json
	$(BIN)/python benchmarks/views.py --out docs/results/views.json

bench-gpu: $(READY)  ## the same of monitors and syre, where a GPU is at hand
	$(BIN)/python benchmarks/gpu.py

docs: $(READY)  ## build the site into docs/_build; warnings are errors
	$(BIN)/python docs/_ext/keys.py
	$(BIN)/python docs/_ext/verdicts.py
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

package: $(READY)  ## build wheel and sdist, and use the wheel where no extra is installed
	$(BIN)/python .ci/package.py

lowest:  ## try the lowest versions that are allowed (downloads them)
	$(PYTHON) -m benchmarks.lowest

clean:
	rm -rf $(VENV) runs lightning_logs docs/_build docs/auto_gallery
