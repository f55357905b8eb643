# Every target makes its own .venv: the first one takes some minutes and about 9 GB (SGLang brings torch).
PYTHON ?= python3
PORT ?= 30000
MODEL ?= rheoserve_sgl/nano/model
ARGS ?=
# Few frames for the bundled model, so that a long prompt shows both tiers at work.
DEMO := $(if $(filter rheoserve_sgl/nano/model,$(MODEL)),--rheoserve-gate-path $(MODEL)/gate \
	$(if $(findstring --rheoserve-device-tokens,$(ARGS)),,--rheoserve-device-tokens 4096) \
	$(if $(findstring --rheoserve-host-size,$(ARGS)),,--rheoserve-host-ratio 32))
PY := .venv/bin/python
export HF_HUB_OFFLINE ?= 1

.PHONY: serve test test-all test-gpu lint format bench bench-gpu soak clean

serve: .venv/ready
	@$(PY) -m rheoserve_sgl.nano.announce http://127.0.0.1:$(PORT) $$$$ & \
	exec $(PY) -m sglang.launch_server --model-path $(MODEL) --attention-backend rheoserve --port $(PORT) --sleep-on-idle $(DEMO) $(ARGS)

test: .venv/ready
	$(PY) -m pytest -m "not gpu and not slow" $(ARGS)

test-all: .venv/ready
	$(PY) -m pytest -m "not gpu" $(ARGS)

test-gpu: .venv/ready
	$(PY) -m pytest -m gpu $(ARGS)

lint: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: .venv/ready
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: .venv/ready
	$(PY) benchmarks/bench_decode_cpu.py $(ARGS)

bench-gpu: .venv/ready
	$(PY) benchmarks/bench_ops.py
	$(PY) benchmarks/bench_layers.py
	$(PY) benchmarks/bench_decode.py --context 32768 --device-gb 12 $(ARGS)
	$(PY) benchmarks/bench_decode.py --context 65536 --device-gb 24 --requests 10 --churn 0.05 0 0.15 $(ARGS)

soak: .venv/ready
	$(PY) -m benchmarks.soak $(ARGS)

# Editable, so that changes to the Python files need no reinstall; changes to csrc/ do.
.venv/ready: pyproject.toml $(wildcard csrc/*.* csrc/isa/*)
	@test -x $(PY) || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "PYTHON is $(PYTHON), which is $$($(PYTHON) -V); legal: Python 3.11 or 3.12, as in make PYTHON=python3.12"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf .venv build models .pytest_cache .ruff_cache .hypothesis
