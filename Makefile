# Everything runs in .venv, which the first target that needs it sets up.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: setup docs demo test test-all fuzz check format clean faults soak

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml .ci/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable '.[docs,explain,export,openvino,rtx,serve,dev]'
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --no-deps grad-cam tritonclient
	touch $@

# The whole experiment on the embedded data: runs/demo/report.html. It resumes where it was stopped.
demo: $(INSTALLED)
	$(BIN)/python tools/demo.py --out runs/demo

# A worker for each core, a thread for each worker. `test` leaves out what takes minutes; `test-all` is what CI runs, with the
# coverage of the other ones.
test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m "not slow"

test-all: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal --durations 20 --cov norton_deploy

# Ten thousand damaged and malicious files of every kind, in processes that may crash, hang or grow.
fuzz: $(INSTALLED)
	rm -f runs/fuzz.json
	$(BIN)/python -m tests.fuzz.run --out runs/fuzz.json

# Fifty kills of a training run at random moments; then memory over thousands of predictions and an hour of video.
faults: $(INSTALLED)
	rm -f runs/faults.json
	$(BIN)/python -m tests.faults.kill_runs --out runs/faults.json

soak: $(INSTALLED)
	$(BIN)/python benchmarks/soak.py

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation as a site in site/.
docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
