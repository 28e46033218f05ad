# Every target makes the virtual environment that it needs; PYTHON chooses the interpreter.
PYTHON ?= python3.11
PYTHON := $(shell command -v $(PYTHON) || command -v python3)
RUN := .venv/bin/python
# Tests run in JOBS processes of one thread each, a file's fast tests in one of them.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist loadfile

.PHONY: demo test test-slow test-comfy lint format bench bench-quality bench-open toybox docs dist clean

.venv: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: .venv
	$(RUN) -m iteris_core demo --output build/demo

test: .venv
	$(PYTEST)

test-slow: .venv
	$(PYTEST) --dist worksteal -m 'slow or fuzz'

# MATRIX="COMFYUI=PYTHON …": checkouts, each with a Python that has its requirements.
test-comfy:
	for pair in $(MATRIX); do COMFYUI_PATH=$${pair%%=*} HF_HUB_OFFLINE=1 PYTHONPATH= \
	  $${pair#*=} -m pytest -p no:cacheprovider -m "comfyui and not slow" tests/comfy || exit 1; done

lint: .venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright
	.venv/bin/lint-imports

format: .venv
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

PAGES := $(wildcard LICENSE *.md docs/*.md docs/errors/*.md docs/api/*.md docs/images/* benchmarks/*.md benchmarks/emoji/*.md benchmarks/minilm/*.md benchmarks/photos/*.md benchmarks/styles/*.md benchmarks/open/*.md toybox/*.md web/*.svg web/docs/*.md web/docs/*/en.jpg)

docs: .venv/docs
	rm -rf build/pages build/site && mkdir -p build/pages
	tar cf - $(PAGES) | tar xf - -C build/pages
	.venv/bin/zensical build --strict

.venv/docs: .venv/installed
	.venv/bin/pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

dist: .venv
	rm -rf dist && $(RUN) -m build

bench: .venv
	$(RUN) benchmarks/speed/run.py

# Goes on where it stopped; SECONDS=500 stops it by itself.
bench-quality: .venv
	$(RUN) benchmarks/unseen.py --world reported --sizes 5,10,2,3,7 --sets 2 --replicates 5 \
		$(if $(SECONDS),--seconds $(SECONDS))

# METHOD=FOLDER with method.py; goes on where it stopped. WORLD=FILE.yaml: on a model of your own.
bench-open: .venv
	$(RUN) benchmarks/unseen.py --world $(or $(WORLD),reported) --own $(METHOD) --sizes 2,5,10 --sets 2 \
		$(if $(SECONDS),--seconds $(SECONDS))

toybox: .venv
	$(RUN) -m toybox.train

clean:
	rm -rf build dist .venv *.egg-info
