# Two commands: `make serve` and `make test`. All that they make lies in .venv and .cache.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve cloud edge split test matrix lint clean free-port install install-test FORCE

VENV := .venv
CACHE := .cache
BASE := $(CACHE)/smollm2
PREPARED := $(CACHE)/smollm2-layer-parallel
SPLIT := $(CACHE)/smollm2-edge-cloud

# Settings, from the environment or the command line.
PORT ?= 8000
MODEL ?=
SERVE_ARGS ?=
PREPARE_ARGS ?= --groups "12,13;17,18;21,22;26,27" --bypass 1
SPLIT_ARGS ?= --partition 15 --exits 10,15 --text-tokens 16384 --held-out-tokens 8192
CLOUD_PORT ?= 8001
PYTEST_ARGS ?=
# Tests run side by side, each worker on a core of its own (tests/conftest.py); 3 GiB each.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(4, len(os.sched_getaffinity(0))))' \
	2>/dev/null || echo 2)

# Packages come without byte code (patches/install.py); vLLM starts four processes, and each would
# compile for ten seconds what it imports if the first could not keep it.
unexport PYTHONDONTWRITEBYTECODE

export VLLM_CACHE_ROOT ?= $(CURDIR)/$(CACHE)/vllm

# 3.11 before newer ones: it is the version that CI runs, and the one whose CPU wheel of torch is
# most often at hand. `ensurepip` tells a Python that cannot make environments (Debian without
# python3-venv); a pyenv shim of a version that is not active fails the test, hence the last two.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3 \
	$$HOME/.pyenv/versions/3.11.*/bin/python $$HOME/.pyenv/versions/3.1[2-9].*/bin/python; do \
	$$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)

define INSTALL
@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 with venv found; set PYTHON" >&2; exit 1; }
@$(PYTHON) patches/install.py --venv $(VENV) --extras
endef

help:  ## show this
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)
	@echo "  settings: PORT=8000  MODEL=DIR  SERVE_ARGS=...  PREPARE_ARGS=...  PYTEST_ARGS=...  PYTHON=..."

serve cloud edge: export VLLM_CPU_KVCACHE_SPACE ?= 2
# vLLM's own choice leaves one core idle for its scheduler: half of a small machine.
serve: export VLLM_CPU_OMP_THREADS_BIND ?= $(shell $(PYTHON) -c 'import os; \
	cores = sorted(os.sched_getaffinity(0)); \
	print(",".join(map(str, cores)) if len(cores) <= 4 else "auto")' 2>/dev/null || echo auto)
# On CPU vLLM 0.32 cannot load the ahead-of-time artifacts that it writes; without them a second
# start reuses the compiled kernels.
serve cloud edge: export VLLM_USE_AOT_COMPILE ?= $(if $(shell command -v nvidia-smi),1,0)

# Waits for the server that this shell becomes, then says what to ask it. $(1): its model.
define WELCOME
server=$$$$; \
while kill -0 $$server 2>/dev/null && ! curl -sf -o /dev/null localhost:$(PORT)/health; do \
	sleep 1; done && kill -0 $$server 2>/dev/null && printf '%s\n' '' \
	'Ready. Ask it something, in another terminal:' '' \
	"curl -s localhost:$(PORT)/v1/chat/completions -H 'Content-Type: application/json' \\" \
	'  -d '\''{"model": "$(1)", "max_tokens": 64, "temperature": 0,' \
	'       "messages": [{"role": "user", "content": "What is gravity?"}]}'\''' '' &
endef

serve: free-port install $(if $(MODEL),,$(PREPARED)/config.json)  ## serve the demo model, or MODEL=DIR
	@$(call WELCOME,$(or $(MODEL),$(PREPARED))) \
	exec $(VENV)/bin/vllm serve $(or $(MODEL),$(PREPARED)) --port $(PORT) $(SERVE_ARGS)

# Half of the cores each.
cores = $(shell $(PYTHON) -c 'import os; cores = sorted(os.sched_getaffinity(0)); \
	half = len(cores) // 2; print(",".join(map(str, cores[$(1)])))' 2>/dev/null || echo auto)

cloud: export VLLM_CPU_OMP_THREADS_BIND ?= $(call cores,half:)
cloud: export VLLM_PLUGINS := effplugin
cloud: PORT := $(CLOUD_PORT)
cloud: free-port install $(SPLIT)/cloud/config.json  ## its upper half, for `make edge`, on CLOUD_PORT=8001
	exec $(VENV)/bin/vllm serve $(SPLIT)/cloud --port $(PORT) $(SERVE_ARGS)

edge: export VLLM_CPU_OMP_THREADS_BIND ?= $(call cores,:half or 1)
edge: export EFFPLUGIN_CLOUD_URL ?= http://localhost:$(CLOUD_PORT)
edge: free-port $(if $(EFFPLUGIN_CLOUD_URL),install $(SPLIT)/cloud/config.json,split install)  ## its lower half, which asks that cloud
	@$(call WELCOME,$(SPLIT)/edge) \
	exec $(VENV)/bin/vllm serve $(SPLIT)/edge --port $(PORT) $(SERVE_ARGS)

test: install-test lint  ## install what the tests need, then lint and run them all
	$(VENV)/bin/pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

matrix: install-test  ## write the README's support matrix, from the tests
	$(VENV)/bin/pytest -q --collect-only --write-matrix > /dev/null

lint: install-test  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:  ## remove all that was made here, the environment and the models included
	rm -rf $(VENV) $(CACHE) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

free-port:
	@if curl -s -o /dev/null localhost:$(PORT); then \
		echo "error: port $(PORT) is in use; set PORT" >&2; exit 1; fi

install:
	$(INSTALL) auto,demo

install-test:
	$(INSTALL) auto,test

$(BASE)/config.json: | install
	$(VENV)/bin/effplugin demo-model $(BASE) --overwrite

$(PREPARED)/config.json: $(BASE)/config.json $(CACHE)/prepare-args | install
	$(VENV)/bin/effplugin prepare layer-parallel $(BASE) $(PREPARED) --overwrite $(PREPARE_ARGS)

$(SPLIT)/cloud/config.json: $(BASE)/config.json | install
	$(VENV)/bin/effplugin prepare edge-cloud $(BASE) $(SPLIT) --overwrite $(SPLIT_ARGS)

# Both halves are what `make cloud` writes in another terminal, perhaps just now.
split:
	@halves() { test -e $(SPLIT)/edge/config.json && test -e $(SPLIT)/cloud/config.json; }; \
	halves || echo 'waiting for `make cloud`, in another terminal, to split the demo model'; \
	until halves; do sleep 1; done

# Touched only when PREPARE_ARGS changes.
$(CACHE)/prepare-args: FORCE
	@mkdir -p $(CACHE)
	@echo '$(PREPARE_ARGS)' | cmp -s - $@ || echo '$(PREPARE_ARGS)' > $@
