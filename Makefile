# make demo: train a small model on this machine and sample from it, in about three minutes
# make test: lint and the test suite (files in their order: some of few tests take minutes)
# make torture: kill a training run 100 times and check that nothing is lost, in about ten minutes
# All use the active virtual environment, or make .venv. On Linux without a GPU, install the CPU
# build of PyTorch first (README.md).

ACTIVE := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX))
VENV := $(or $(ACTIVE),.venv)
PYTHON := $(VENV)/bin/python

.PHONY: demo test torture

demo: $(PYTHON)
	$(PYTHON) -m pip install --quiet -r requirements.txt
	$(PYTHON) data/stdlib_char/prepare.py
	$(PYTHON) train.py config/fast_stdlib_char.py
	$(PYTHON) sample.py --out_dir=out-fast-stdlib-char --num_samples=1 --start="def "
	@echo
	@echo "That was a model of 1.4M parameters after two minutes on Python's own library. Next:"
	@echo "  $(PYTHON) sample.py --out_dir=out-fast-stdlib-char --start='class Model'"
	@echo "  $(PYTHON) train.py config/fast_stdlib_char.py --init_from=resume --max_iters=4000 --lr_decay_iters=4000"
	@echo "  $(PYTHON) data/shakespeare_char/prepare.py, and the rest of README.md"

test: $(PYTHON)
	$(PYTHON) -m pip install --quiet -r requirements-dev.txt
	$(PYTHON) -m ruff check .
	$(PYTHON) -m pytest -n 2 --dist=loadfile --no-loadscope-reorder

torture: $(PYTHON)
	$(PYTHON) -m pip install --quiet -r requirements-dev.txt
	$(PYTHON) tests/torture.py

.venv/bin/python:
	python3 -m venv .venv
