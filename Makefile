# make demo      train EMC2 and SimCLR on real digits and print both side by side
# make test      run all tests but the slow ones
# make test-slow run the slow ones, and the suite under other instruction sets, numbers of threads and seeds (test-isa)
# make test-peers  run the adapters' tests beside open_clip and lightly, which need torchvision: in .venv-peers, 5.6 GB
# make docs      the documentation as pages, in build/site
# make gpu-check on a GPU: is it right, and how fast (docs/development/gpu.md); with a Python that has torch it installs nothing
#
# All of them make and use .venv, with the torch that constraints.txt pins and the packages that the target needs.
# make TARGET ENV=none   with $(PYTHON) as it is: installs nothing; examples say what they miss, and how to install it
# gpu-check alone takes $(PYTHON) as it is wherever that has torch.

PYTHON ?= python3
EMC2_ARCH ?= -march=native

ifneq ($(filter gpu-check,$(MAKECMDGOALS)),)
ifneq ($(shell $(PYTHON) -c "import torch; print(torch.__version__)" 2>/dev/null),)
ENV := none
endif
endif

# Anything but none means .venv: shells have a use of their own for a variable of this name.
ifeq ($(ENV),none)
RUN := $(PYTHON)
else
RUN := .venv/bin/python
EXAMPLES := .venv/.examples
DOCS := .venv/.docs
INSTALLED := .venv/.test
endif

# The tests start hundreds of processes: without bytecode each would compile all that it imports, torch among it, anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow test-peers test-isa bench docs gpu-check compiled lint core-test core-cycles clean

demo: $(EXAMPLES)
	$(RUN) -m examples.demo

# One test a core, up to four; a thread that waits sleeps, as the tests beside it have use for its core.
test: $(INSTALLED)
	OMP_WAIT_POLICY=passive $(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test-slow: $(INSTALLED)
	$(RUN) -m pytest -m slow
	$(RUN) tests/support/instruction_sets.py

# Elsewhere these tests are skipped. torchvision wants the torch that it was built with, here another one than
# constraints.txt pins: that the library runs with it is tried here, too.
test-peers: .venv-peers/.installed
	OMP_WAIT_POLICY=passive .venv-peers/bin/python -m pytest tests/adapters -rs

# Exits with 1 where a test hangs on the processor or on luck.
test-isa: $(INSTALLED)
	$(RUN) tests/support/instruction_sets.py

bench: $(INSTALLED)
	$(RUN) -m bench.throughput

# The variable silences a notice of the theme's about mkdocs 2, which is not used.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

gpu-check: $(INSTALLED)
	$(RUN) -m bench.gpu.check

# Registers, memory and the pipe that binds, of the Triton kernels compiled for GPUs that need not be here.
compiled: $(INSTALLED)
	$(RUN) -m bench.gpu.compiled

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# The torch-free core by itself, ahead of time.
core-test:
	cmake -S . -B build -DCMAKE_BUILD_TYPE=Release
	cmake --build build --parallel 2
	ctest --test-dir build --output-on-failure

# Cycles of its parts; EMC2_ARCH as for cmake.
core-cycles:
	cmake -S . -B build -DCMAKE_BUILD_TYPE=Release -DEMC2_ARCH="$(EMC2_ARCH)"
	cmake --build build --target core_cycles
	build/core_cycles

clean:
	rm -rf .venv .venv-peers build

# An extra of setup.py: those of the examples and the pages are among those of the tests. Not compiled ahead: the
# packages of texts are 80 MB of Python source, of which tests import a tenth.
.venv/.examples .venv/.docs .venv/.test: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --no-compile -c constraints.txt -e ".[$(subst .,,$(@F))]"
	touch $@ $(if $(filter %/.test,$@),.venv/.examples .venv/.docs)

.venv-peers/.installed: setup.py
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --no-compile torch==2.14.1 torchvision==0.29.1 -e ".[peers]"
	touch $@
