# Every target sets up .venv by itself; a second call starts at once.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin/python
WORKERS ?= 2

.PHONY: demo test lint bench clean setup lock

demo: setup
	$(RUN) train.py +experiment=quickstart run.name=demo

test: setup
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright
	$(RUN) -m codespell_lib vlp data_recipes conf scripts docs README.md CHANGELOG.md train.py evaluate.py plan.py

bench: setup
	$(RUN) scripts/bench/run.py

setup: $(STAMP)

# uv lives inside the environment, so that a bare Python is enough. The lock is the only source of versions.
$(STAMP): requirements.lock pyproject.toml
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/uv --version >/dev/null 2>&1 || $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv
	@echo "Installing the locked packages (about 6 GB with the CUDA libraries; under a minute on a fast line) ..."
	@$(VENV)/bin/uv pip install --quiet --python $(RUN) --require-hashes -r requirements.lock
	@$(VENV)/bin/uv pip install --quiet --python $(RUN) --no-deps --no-build-isolation -e .
	@touch $(STAMP)

lock: setup
	$(VENV)/bin/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-header --no-annotate --upgrade -o requirements.lock

clean:
	rm -rf $(VENV) runs data_cache outputs multirun .pytest_cache .ruff_cache .hypothesis *.egg-info
