# `make demo` and `make test` do everything on a fresh machine with Python 3.11+ and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-wide test-torch check docs bench bench-size front few-steps drift clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,quality,ort,trt-rtx,serve,dev]"
	touch $@

demo: .venv/ready   ## edit a real clip, uncached and cached, into out/demo
	$(BIN)/hetcache demo --out out/demo

test: .venv/ready   ## all tests but those of `test-wide`
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 20

test-wide: .venv/ready   ## what is left of the tests: many models and pipelines, and what takes long
	$(BIN)/python -m pytest -n 2 -m wide

# Another torch than the one of `make test`, and another diffusers if one is named, in a venv of their own. The CPU build
# of a torch is smaller where there is one.
TORCH ?= 2.11.0
DIFFUSERS ?=
OTHER := .venv-torch-$(TORCH)$(addprefix -diffusers-,$(DIFFUSERS))
test-torch:   ## all tests with others: make test-torch TORCH=2.11.0 DIFFUSERS=0.40.0
	$(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/python -m pip install --quiet "torch==$(TORCH)"
	$(OTHER)/bin/python -m pip install --quiet --editable ".[demo,quality,ort,dev]" $(addprefix diffusers==,$(DIFFUSERS))
	$(OTHER)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 20

check: .venv/ready build/typings   ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Type checkers follow no package-dir mapping, so they read the package through links.
.PHONY: build/typings
build/typings:
	rm -rf $@ && mkdir -p $@/hetcache_compile
	ln -s $(addprefix $(CURDIR)/,$(wildcard hetcache_compile/*) passes export) $@/hetcache_compile/

docs: .venv/ready build/typings   ## the pages of docs/ and the API, into build/site; a broken link is an error
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/python docs/generate.py --check
	$(BIN)/python benchmarks/tables.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: .venv/ready   ## measure the forms into benchmarks/results, and put the figures into docs/benchmarks.md
	$(BIN)/python benchmarks/steps.py --active 0.125 0.25 0.5 --moving
	$(BIN)/python benchmarks/engines.py
	$(BIN)/python benchmarks/tables.py

bench-size: .venv/ready   ## export the real 1.3B architecture (4 minutes, 5 GiB), and put the figures into docs/benchmarks.md
	$(BIN)/python benchmarks/export_size.py --out out/export_size
	$(BIN)/python benchmarks/tables.py

few-steps: .venv/ready   ## fidelity and quality against work in 4, 8 and 20 steps, into docs/benchmarks.md (hours; goes on)
	-$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[peers]"  # without it: no cache-dit
	$(BIN)/python benchmarks/few_steps.py
	$(BIN)/python benchmarks/tables.py

front: .venv/ready   ## fidelity against time, also of other caches, into docs/benchmarks.md (hours; goes on where it was cut short)
	-$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[peers]"  # without it: no cache-dit
	$(BIN)/python benchmarks/front.py
	$(BIN)/python benchmarks/tables.py

drift: .venv/ready   ## what changes between steps of the reference model, into docs/drift.md (about 15 minutes)
	$(BIN)/python benchmarks/drift.py --clips 6 --real
	$(BIN)/python benchmarks/drift_page.py

clean:
	rm -rf .venv build out .mypy_cache .ruff_cache .pytest_cache *.egg-info
