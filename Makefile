# make serve   serve the bundled model on http://127.0.0.1:8000   (ARGS="--port 9000" for flags)
# make test    lint, types, walls, tests
# make report  measure this machine and make the page runs/report/report.html (ARGS="--full")
# make browser a Chromium for the tests of the playground, which are skipped without one
# make install fill .venv; done by the two above, and nothing to do when up to date

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
# Processes that run tests.
WORKERS ?= 2
# For what installs system packages; empty where you are root.
SUDO ?= $(shell test "$$(id -u)" = 0 || echo sudo)
# Extra words for pip, such as an index that has CPU builds of torch.
PIP_ARGS ?=
# Anything here: install CUDA packages even where no GPU is found.
CUDA ?=

.PHONY: install serve test lint quick audit report browser observability-tools clean
.DELETE_ON_ERROR:

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt deploy/check_torch.py
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"Python 3.11 or newer is needed; {sys.executable} is {sys.version.split()[0]}")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -n "$(CUDA)" || $(BIN)/python deploy/check_torch.py $(PIP_ARGS)
	$(BIN)/pip install --quiet --constraint constraints.txt $(PIP_ARGS) --editable '.[test]'
	touch $@

serve: $(STAMP)
	@exec $(BIN)/vitrine serve $(ARGS)

# Files are shared out among two processes: most tests wait for processes that they started.
test: lint
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Known vulnerabilities in what is installed; says so where no advisories can be had.
audit: $(STAMP)
	$(BIN)/python deploy/audit.py

# Prometheus and promtool, for the tests of deploy/ (Debian's package; skipped where they are not).
observability-tools:
	command -v prometheus >/dev/null && command -v promtool >/dev/null || { \
		$(SUDO) apt-get update && $(SUDO) apt-get install --yes --no-install-recommends prometheus; }

# The system's Chromium where there is one or root can install it; else the one Playwright fetches.
browser: $(STAMP)
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
	    command -v $$name && exit 0; done; \
	if command -v apt-get >/dev/null && test "$$(id -u)" = 0; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	    apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=300 chromium; \
	else $(BIN)/playwright install chromium; fi

# Without the slow tests: for the change at hand.
quick: $(STAMP)
	$(BIN)/pytest -m 'not slow' $(ARGS)

# Under five minutes on two cores; goes on where it was when interrupted.
report: $(STAMP)
	@exec $(BIN)/vitrine report $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info build dist
