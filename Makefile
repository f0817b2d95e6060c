# Start with `make demo` or `make test`. The first target that needs .venv creates it.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# If the caller's environment turns off Python's cache, every process of the tests would compile every module again.
export PYTHONDONTWRITEBYTECODE :=
SANDBOX := $(BIN)/python -m sandbox --

.PHONY: help venv demo test check coverage bench bench-growth docs test-faults test-page test-compose test-citus lock clean

help:
	@echo "make demo          the whole system on this machine: sender, Kafka, consumer, PostgreSQL, API; Ctrl-C stops it"
	@echo "make test          checks and tests, with a real PostgreSQL and Kafka"
	@echo "make venv          install all dependencies into .venv; the other targets do this themselves"
	@echo "make check         format, lint, types, architecture"
	@echo "make coverage      run the tests and report the lines of library and programs that they miss"
	@echo "make bench         run the benchmarks and print the figures as tables; needs wrk, and uses go if installed"
	@echo "make bench-growth  measure ingest and GET while the tables grow to 10,000,000 orders; needs wrk and 40 GB of disk"
	@echo "make docs          generate docs/reference.md from the docstrings"
	@echo "make test-faults   the long fault tests, which make test leaves out (some minutes)"
	@echo "make test-page     the pages in a real browser; needs chromium"
	@echo "make test-compose  docker-compose.yml on a real engine; needs docker with compose"
	@echo "make test-citus CITUS=FOLDER  the tests that use PostgreSQL on Citus; needs PostgreSQL 18 with the extension"
	@echo "make lock          pin the newest versions of the dependencies; needs uv"
	@echo "make clean         remove everything that the other targets created in this folder"

$(READY): requirements/dev.txt
	@command -v "$(PYTHON)" >/dev/null \
		|| { echo "orderlib needs Python 3.11 or newer; there is no $(PYTHON) here (set another with make PYTHON=…)"; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(3 if sys.version_info < (3, 11) else 0)'; status=$$?; \
		test $$status -eq 0 && exit 0; \
		test $$status -eq 3 && problem="is older" || problem="does not run"; \
		echo "orderlib needs Python 3.11 or newer; $(PYTHON) $$problem (set another with make PYTHON=…)"; exit 2
	@echo "setting up .venv, once: downloads about 190 MB, and takes 600 MB …"
	@$(PYTHON) -m venv --clear .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements/dev.txt
	@touch $@

venv: $(READY)

demo: $(READY)
	@$(SANDBOX) $(BIN)/python -m sandbox.demo

# Four processes, because tests wait a third of the time on two cores.
test: check
	$(BIN)/pytest --numprocesses 4 --dist worksteal

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest --quiet tests/unit/test_architecture.py

coverage: $(READY)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest --numprocesses 4 --dist worksteal
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

bench: $(READY)
	@$(BIN)/python -m bench

bench-growth: $(READY)
	@$(BIN)/python -m bench.growth

docs: $(READY)
	@$(BIN)/python -m docs.reference

test-faults: $(READY)
	$(BIN)/pytest -m faults --numprocesses 2 --dist loadfile

test-page: $(READY)
	$(BIN)/pytest tests/page

test-compose: $(READY)
	$(BIN)/pytest tests/compose

test-citus: $(READY)
	@test -n "$(CITUS)" -a -x "$(CITUS)/bin/postgres" \
		|| { echo "set CITUS to the folder of a PostgreSQL 18 with the extension Citus: it has bin/postgres"; exit 2; }
	TESTS_CITUS="$(CITUS)" $(BIN)/pytest -m "faults or not faults" --timeout 900 --numprocesses 3 --dist loadfile \
		tests/integration tests/e2e tests/faults

LOCK := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
	--custom-compile-command 'make lock' --upgrade pyproject.toml

lock:
	$(LOCK) --all-extras --group dev --output-file requirements/dev.txt
	$(LOCK) --group services --constraint requirements/dev.txt --output-file requirements/services.txt

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage build dist
