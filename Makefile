# Every verb sets up .venv by itself, and nothing outside it.
#   make run ARGS=--once        pass arguments on
#   make test PYTHON=python3.12 choose the interpreter (when .venv is made)

.DEFAULT_GOAL := help
.PHONY: help run serve test test-long check conform bench docs lock clean FORCE

PYTHONS := $(if $(PYTHON),$(PYTHON),python3.14 python3.13 python3.12 python3.11 python3)
PIP := .venv/bin/python -m pip --disable-pip-version-check --quiet

help:  ## show this
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1	/p' Makefile | while IFS='	' read -r verb what; do \
		printf 'make %-9s %s\n' "$$verb" "$$what"; done

run: .venv/run-ready .venv/local-ready  ## start the demo: an agent loop over HTTP and over WebSocket, then keep serving (ARGS=--once: end)
	@.venv/bin/openline demo $(ARGS)

serve: .venv/run-ready .venv/local-ready  ## start the server (ARGS="--upstream gguf:model.gguf"; ARGS=--help shows more)
	@.venv/bin/openline serve $(ARGS)

test: check .venv/local-ready  ## check, then run the tests (ARGS="-k name" picks some, without the coverage gate)
	.venv/bin/pytest -n auto --maxprocesses=4 --cov --cov-report= $(ARGS)
ifeq ($(strip $(ARGS)),)
	.venv/bin/coverage report --include='src/openline/protocol/*' --fail-under=95
endif

test-long: .venv/dev-ready .venv/local-ready  ## run the tests that take long or repeat others (ARGS="-k hundred" picks some)
	.venv/bin/pytest --long -m long $(ARGS)

check: .venv/dev-ready  ## format, lint, types, layers, spelling
	.venv/bin/ruff format --check --quiet .
	.venv/bin/ruff check --quiet .
	.venv/bin/basedpyright
	.venv/bin/lint-imports
	.venv/bin/codespell
	@VALIDATE_PYPROJECT_NO_NETWORK=1 .venv/bin/validate-pyproject pyproject.toml

conform: .venv/dev-ready .venv/local-ready  ## run stock clients against the server
	.venv/bin/python conform/run.py $(ARGS)

BENCH = turns
bench: .venv/dev-ready .venv/local-ready  ## measure the CPU time of a turn (BENCH=warm_up: what a warm-up saves)
	.venv/bin/python bench/$(BENCH).py $(ARGS)

docs: .venv/run-ready  ## draw the state diagrams from the state tables
	.venv/bin/python docs/make_state_diagrams.py

# Pins stay unless pyproject.toml forbids them: `make lock ARGS=--upgrade` takes the newest.
LOCK = .venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--no-annotate --custom-compile-command "make lock" $(ARGS) pyproject.toml

lock: .venv/made  ## make the lock files again (ARGS=--upgrade: with the newest versions)
	@$(PIP) install uv
	$(LOCK) --output-file requirements.lock
	$(LOCK) --extra dev --extra postgres --extra otel --constraint requirements.lock --output-file requirements-dev.lock
	$(LOCK) --extra local --constraint requirements-dev.lock --output-file requirements-local.lock

clean:  ## remove .venv and everything made
	rm -rf .venv build dist .coverage .coverage.* .hypothesis .import_linter_cache .pytest_cache .ruff_cache
	find src tests bench conform docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# --- .venv: one stamp a stage, older than what it was made from means make it again --------------
# The lock files are complete: with --no-deps nothing is resolved anew. Else pip takes a package's extra, such as
# coverage[toml], for another package, not pinned, as soon as a newer version of it is out.

.venv/run-ready: .venv/made requirements.lock pyproject.toml
	@echo 'Installing what Openline needs into .venv (half a minute)'
	@$(PIP) install --no-deps --require-hashes -r requirements.lock
	@$(PIP) install --no-deps --editable .
	@touch $@

.venv/dev-ready: .venv/run-ready requirements-dev.lock
	@echo 'Installing the development tools into .venv (a minute)'
	@$(PIP) install --no-deps --require-hashes -r requirements-dev.lock
	@touch $@

# Where there is no wheel of llama.cpp, all the rest works; without a stamp it is tried again the next time.
.venv/local-ready: .venv/run-ready requirements-local.lock
	@echo 'Installing llama.cpp, for models in this process, into .venv (ten seconds)'
	@if $(PIP) install --only-binary :all: --no-deps --require-hashes -r requirements-local.lock; then touch $@; else \
		echo 'llama.cpp cannot be installed here; going on without models in this process.'; fi

# The stamp holds the folder's path: scripts in a .venv that was moved, or whose Python went away, do not run.
ifneq ($(shell test -x .venv/bin/python && cat .venv/made 2>/dev/null),$(CURDIR))
.venv/made: FORCE
endif
.venv/made:
	@for python in $(PYTHONS); do \
		"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
		found="$$python"; \
		"$$python" -c 'import ensurepip, venv' 2>/dev/null || continue; \
		echo "Making .venv with $$("$$python" --version)"; \
		"$$python" -m venv --clear .venv && echo '$(CURDIR)' > $@; \
		exit $$?; \
	done; \
	if [ -n "$$found" ]; then \
		package=$$("$$found" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
		echo "$$found cannot make a virtual environment: its venv or ensurepip module is missing."; \
		echo "On Debian and Ubuntu: apt install python3-venv (for this interpreter: $$package)."; \
	else \
		echo "Openline needs Python 3.11 or newer; tried: $(PYTHONS)."; \
		echo "Install one, or name it: make PYTHON=/path/to/python3 …"; \
	fi >&2; \
	exit 1
