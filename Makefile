# The commands of the README. `make env` builds .venv from requirements.lock, the same versions for everybody.
PYTHON ?= python3.11
BIN = .venv/bin
PRESET ?= digits
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: env reproduce test coverage lab notebooks lint lock audit web clean

# Compiled once: where PYTHONDONTWRITEBYTECODE is set, every process would compile what it imports, for 12 s.
env: .venv/.ready

.venv/.ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "uv>=0.8"
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	touch $@

reproduce: env
	$(BIN)/python -m advkd reproduce --preset $(PRESET)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Every core runs its share of the tests, then of the others' rest; more than eight only import. The notebooks write to
# shared folders and stay one after another.
test: lint
	$(BIN)/pytest -q -n logical --maxprocesses 8 --dist worksteal tests
	$(BIN)/pytest -q --nbval notebooks

# The unit tests alone, and which lines of the package they leave out; fails under 90 % (pyproject.toml).
coverage: env
	$(BIN)/pytest -q -n logical --maxprocesses 8 --dist worksteal --cov --cov-report=term-missing:skip-covered tests

lab: env
	$(BIN)/jupyter lab

# Edit the .py, then this: the .ipynb follows, is executed from the top and keeps its outputs.
notebooks: env
	$(BIN)/jupytext --quiet --to ipynb --update notebooks/[0-9]*.py
	ADVKD_PROGRESS=0 $(BIN)/jupyter nbconvert --to notebook --execute --inplace \
		--ExecutePreprocessor.record_timing=False --ExecutePreprocessor.store_widget_state=False \
		--ExecutePreprocessor.timeout=-1 notebooks/*.ipynb
	$(BIN)/python -c "from pathlib import Path; from advkd.reproduce import update_readme; update_readme(Path())"

# After a change of the dependencies in pyproject.toml.
lock: env
	$(BIN)/uv pip compile --quiet --universal --generate-hashes \
		--no-annotate --no-header --python-version 3.10 --extra dev pyproject.toml -o requirements.lock

# Known vulnerabilities of the locked packages; without a network it says so.
audit: env
	$(BIN)/python .ci/audit.py

# onnxruntime-web for the page of `python -m advkd demo`, from its npm package; which version and files, runtime.json says.
web: runs/web/.ready

runs/web/.ready: advkd/web/runtime.json
	rm -rf runs/web && mkdir -p runs/web
	cd runs/web && npm pack --silent "onnxruntime-web@$$(sed -n 's/.*"version": "\(.*\)".*/\1/p' ../../$<)"
	tar -xzf runs/web/*.tgz -C runs/web --strip-components=2 $$(sed -n 's/.*"\(ort.*\)": "sha.*/package\/dist\/\1/p' $<)
	rm runs/web/*.tgz
	touch $@

clean:
	rm -rf runs/digits .venv  # what was trained elsewhere below runs/ stays
