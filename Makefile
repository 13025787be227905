# make train   set up everything and run the main job (data, cold start, HDPO, report) in runs/demo
# make test    set up everything and run the tests
# make lint    ruff and pyright
# make docs    the site of the documentation: build/docs/index.html
# make test-slow, make test-gpu   what takes minutes, what needs a CUDA device
# make bench-gpu   test-gpu and every kernel beside its peers, as one page: runs/gpu_report.md
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: setup train test lint docs test-slow test-gpu bench-gpu clean
.DEFAULT_GOAL := help

# one line, where this platform has no wheel of something
define SAY_MISSING
import importlib.util, platform
found = {"vLLM (CPU)": "vllm", "Megatron-core": "megatron", "Triton": "triton"}
missing = [name for name, module in found.items() if not importlib.util.find_spec(module)]
missing += [] if platform.system() == "Linux" else ["the python tool"]
where = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
if missing:
    print(f"metis_fast: not here, on {where}: {', '.join(missing)}; the rest works without")
endef
export SAY_MISSING

help:
	@sed -n 's/^# //p' Makefile | head -6

setup: $(VENV)/.installed

# Rebuilt when what it depends on changes; a half-finished install leaves no stamp and is done again.
$(VENV)/.installed: pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/csrc/* kernels/csrc/aot/* kernels/*.cmake metis_fast/*/__init__.py)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "metis_fast needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@# first what it is built with, so that the C++ ops are built against the torch that runs them, and not against a second one
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt torch==2.13.0 scikit-build-core cmake ninja
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --no-build-isolation --editable ".[all]"
	@# by themselves, without what they depend on: pyproject.toml says why
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --constraint constraints.txt --group alone
	@# 30,000 files, which pip would compile one after the other; some that are templates do not compile
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@$(BIN)/python -c "$$SAY_MISSING"
	@touch $@

train: setup
	$(BIN)/metis-fast demo configs/demo.yaml

test: setup
	$(BIN)/python tests/run.py

# one after the other: most of them start many processes
test-slow: setup
	$(BIN)/python tests/run.py -m "slow and not gpu" -n 1

# pytest ends with 5 where no test has the mark, which is no failure
test-gpu: setup
	$(PYTEST) -m gpu || [ $$? -eq 5 ]

bench-gpu: setup
	$(BIN)/python -m bench.gpu_report runs/gpu_report.md

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: setup
	$(BIN)/python docs/pictures.py
	$(BIN)/python -m sphinx -q -W --keep-going -b html -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

clean:
	rm -rf $(VENV) build runs .pytest_cache .ruff_cache
