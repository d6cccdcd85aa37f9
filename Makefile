# make demo        train the embedded demo, leave pictures in demo_output/
# make test        lint and all default tests, as continuous integration runs them
# make test-long   the whole demo still turns colour into ink, in time; bench/run_gpu.sh, small; every promise's cases

PYTHON ?= python3
VENV_PYTHON = .venv/bin/python

.PHONY: demo test test-long

demo: .venv/installed
	$(VENV_PYTHON) train_manga_lora.py --demo

test: .venv/installed-tests
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(VENV_PYTHON) -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-long: .venv/installed-tests
	$(VENV_PYTHON) -m pytest -m "long and not promise"
	$(VENV_PYTHON) -m pytest -m promise -n auto --record tests/promises.json

# torch comes first and pinned: another package's open range would fetch a build of several gigabytes.
.venv/installed: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(VENV_PYTHON) -m pip install --quiet -c constraints.txt torch
	$(VENV_PYTHON) -m pip install --quiet -c constraints.txt -r requirements.txt
	touch $@

.venv/installed-tests: .venv/installed demo/requirements.txt
	$(VENV_PYTHON) -m pip install --quiet -c constraints.txt hypothesis pytest pytest-xdist ruff selenium
	@if $(VENV_PYTHON) -m pip install --quiet -c constraints.txt -r demo/requirements.txt; then touch $@; else \
		echo "demo/requirements.txt can't be installed now: the tests of the demo's scripts are skipped"; fi
