# Each target works on a fresh machine that has python3 (3.11 or newer) and make.
# PYTHON=python3.12 make test  uses another interpreter; VENV names where the packages go.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

FILM := runs/demo-pixels-$(shell date +%s)

.PHONY: demo demo-pixels test test-sb3 lint benchmark clean

demo: $(VENV)/installed  ## distil the shipped Hopper teacher into a larger student, in minutes
	$(RUN) ppd_mujoco.py --env-id Hopper-v4 --student-size larger --total-timesteps 300000

demo-pixels: $(VENV)/installed  ## distil the shipped coinrun teacher into a student of the same size, and film it
	$(RUN) ppd_procgen.py --env-id CoinrunEasy-v0 --student-size smaller --total-timesteps 200000 --run-dir $(FILM)
	$(RUN) evaluate.py $(FILM)/student.safetensors --episodes 20 --video $(FILM)/coinrun.gif

test: $(VENV)/installed-dev lint  ## lint, then every test
	$(RUN) -m pytest -n 2 --dist worksteal

test-sb3: $(VENV)/installed-dev  ## the tests with agents of PyTorch, which it installs
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-sb3.txt
	$(RUN) -m pytest -n 2 -m sb3 tests/test_import_teacher.py tests/test_reference.py tests/test_readme.py

lint: $(VENV)/installed-dev
	$(RUN) -m ruff check .

benchmark: $(VENV)/installed-dev  ## the paper's grid in miniature, with its tables and figures
	$(RUN) benchmark/grid.py --miniature --folder runs/miniature
	$(RUN) benchmark/report.py --results runs/miniature/results

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
