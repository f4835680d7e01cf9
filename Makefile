# Each target sets up .venv by itself on a fresh machine and is quick when nothing changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RELEASES := diffsynth==2.0.4 diffsynth==2.1.12
export OMP_NUM_THREADS ?= 1
# set, it has every command that a test or a benchmark starts compile the harness anew
unexport PYTHONDONTWRITEBYTECODE
# random examples per format and bench in `make test`; alone, the suite draws 200, and `lora-harness run` too
EXAMPLES ?= 5

.PHONY: report test test-slow test-core fuzz lint bench bench-gpu mutants clean

report: $(READY)  ## the main job: every installed loader through every check, then reports/out/index.html
	$(BIN)/lora-harness run --out reports/out

test: $(READY)  ## the tests and the suite on the installed loaders: each format, bench and variant of a package once
	$(BIN)/python -m pytest -n 2 --dist loadgroup -q -m "not slow" --lora-max-examples $(EXAMPLES) $(ARGS)

test-slow: $(READY)  ## what takes longer: the power of the checks, every variant on every bench, the wheel, many workers
	$(BIN)/python -m pytest -n 2 --dist loadgroup -q -m slow $(ARGS)

test-core: .venv-core/.ready  ## the core install, with the oldest releases that it allows: no torch
	.venv-core/bin/python -m pytest -q -m "not slow" tests $(ARGS)

# Python 3.10 to 3.12: numpy 1.26 has no wheel for a newer one; `make test-core FLOORS=` takes the newest of everything
FLOORS ?= -c floors.txt
.venv-core/.ready: pyproject.toml floors.txt Makefile
	$(PYTHON) -m venv .venv-core
	.venv-core/bin/python -m pip install --quiet --disable-pip-version-check $(FLOORS) -e .
	.venv-core/bin/python -m pip install --quiet --disable-pip-version-check pytest hypothesis jsonschema pyyaml
	touch $@

fuzz: $(READY)  ## a million mutated files into every reader (a quarter of an hour); writes benchmarks/fuzz.md
	$(BIN)/python -m tests.fuzz.run --write $(ARGS)

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: $(READY) .venv-bench/.ready  ## every benchmark, as ratios within one run; writes benchmarks/results.md
	$(BIN)/python -m benchmarks $(ARGS)

# peers that the benchmarks time: they see the packages of $(VENV), and what they install lies beside, never in it
.venv-bench/.ready: $(READY)
	$(BIN)/python -m venv .venv-bench
	$(BIN)/python -c 'import site; print("import site; site.addsitedir(\"%s\")" % site.getsitepackages()[0])' \
	  > "$$(.venv-bench/bin/python -c 'import site; print(site.getsitepackages()[0])')/packages.pth"
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

bench-gpu: $(READY)  ## a full verify against the copy bandwidth of a GPU; writes benchmarks/gpu.md
	$(BIN)/python -m benchmarks.gpu

mutants: $(READY)  ## mutation tests of the core (half an hour): every change of an operator must fail a test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev,mutants]'
	$(BIN)/python -m benchmarks.mutants $(ARGS)

# torch first and exactly: a CPU build where pip has one, and nothing later may replace it
$(READY): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	$(BIN)/lora-harness install $(RELEASES)
	touch $@

clean:
	rm -rf $(VENV) .venv-bench reports/out dist
