# Every target does its own set-up in $(VENV); see .ci/setup.sh.
TORCH  ?= torch==2.13.0
VENV   ?= .venv
PYTHON ?=
export TORCH VENV PYTHON

setup := bash .ci/setup.sh
# The tests must see the installed package and nothing else.
in_venv := env -u PYTHONPATH -u PYTHONHOME $(VENV)/bin/
# A process a core, each of one thread; a file's tests stay together, for what they share.
pytest := env OMP_NUM_THREADS=1 $(in_venv)pytest -n auto --maxprocesses=4 --dist=loadfile
c_files := find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh'

.DEFAULT_GOAL := help
.PHONY: help demo test test-all bench claims docs lint format wheel gpu-check clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "TORCH=$(TORCH)  PYTHON=python3.12 (a new .venv is made with it)  FOURFOLD_APT=0 (never call apt-get)"
	@echo "PYTEST_ARGS=...  DEMO_ARGS=...  BENCH_ARGS=...  CLAIMS_ARGS=..."

demo:  ## set up, run the library on a real photo, print a table, write a picture
	@$(setup) demo
	@$(in_venv)python examples/demo.py $(DEMO_ARGS)

test:  ## set up, run the tests
	@$(setup) test
	@$(pytest) $(PYTEST_ARGS)

test-all:  ## the long tests as well
	@$(setup) test
	@$(pytest) -m "" $(PYTEST_ARGS)

bench:  ## measure every op against its rivals (BENCH_ARGS=--quick: two minutes)
	@$(setup) bench plot
	@$(in_venv)python -m fourfold.benchmarks $(BENCH_ARGS)

claims:  ## the papers' claims, run again, minutes (CLAIMS_ARGS=--full: hours)
	@$(setup) reproduce
	@$(in_venv)python -m fourfold.reproduce $(CLAIMS_ARGS)

docs:  ## the documentation as a site in build/site, which opens without network
	@$(setup) docs
	@NO_MKDOCS_2_WARNING=1 $(in_venv)mkdocs build --strict --quiet
	@$(in_venv)python docs/site/check.py build/site

lint:  ## ruff, clang-format, mypy
	@$(setup) lint
	@status=0; \
	$(in_venv)ruff check || status=1; \
	$(in_venv)ruff format --check || status=1; \
	$(c_files) | xargs $(in_venv)clang-format --dry-run -Werror || status=1; \
	$(in_venv)mypy || status=1; \
	exit $$status

format:  ## let ruff and clang-format rewrite the files
	@$(setup) lint
	@$(in_venv)ruff check --fix
	@$(in_venv)ruff format
	@$(c_files) | xargs $(in_venv)clang-format -i

wheel: libjpeg = $(CURDIR)/build/libjpeg-static
wheel:  ## a wheel in dist/, with a libjpeg-turbo of its own, and the CUDA library where nvcc is found
	@$(setup) test
	@bash .ci/libjpeg.sh $(libjpeg)
	@$(in_venv)python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist \
	  --config-settings=cmake.define.FOURFOLD_CUDA=$(or $(FOURFOLD_CUDA),AUTO) \
	  --config-settings=cmake.define.FOURFOLD_LIBJPEG=$(libjpeg) .
	@ls dist/*.whl

# In the current interpreter, without network: torch, pybind11, scikit-build-core, cmake, ninja and nvcc are there.
gpu-check: gpu_python = $(or $(PYTHON),python3)
gpu-check:  ## on a GPU machine: build with CUDA in the current interpreter, run the GPU tests and benchmarks
	@rm -rf build/gpu-site
	@arch=$$($(gpu_python) -c 'import torch; print("%d%d-real" % torch.cuda.get_device_capability())' 2>/dev/null) || \
	  { echo "gpu-check needs a GPU that torch of $(gpu_python) can use, and finds none"; exit 1; }; \
	echo "fourfold: building for $$arch into build/gpu-site"; \
	$(gpu_python) -m pip install --quiet --no-index --no-build-isolation --no-deps --target build/gpu-site \
	  --config-settings=build-dir=build/gpu --config-settings=cmake.define.FOURFOLD_CUDA=ON \
	  --config-settings=cmake.define.FOURFOLD_CUDA_ARCHS=$$arch .
	@PYTHONPATH=$(CURDIR)/build/gpu-site$${PYTHONPATH:+:$$PYTHONPATH} $(gpu_python) tests/gpu/check.py $(GPU_CHECK_ARGS)

clean:  ## remove what builds and tools left; .venv stays
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
