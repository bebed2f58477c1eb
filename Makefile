# Needs Python 3.11 or newer and make; everything else is installed into .venv.
PYTHON ?= python3
PIP = .venv/bin/python -m pip --disable-pip-version-check
PEERS_PIP = .venv-peers/bin/python -m pip --disable-pip-version-check

# Kept beside the sources, as usual: otherwise every process that a test starts compiles them anew.
unexport PYTHONDONTWRITEBYTECODE

ALL_TESTS = not gpu and not network and not parity and not bench
TESTS = .venv/bin/pytest -m "$(ALL_TESTS) and not long"

.PHONY: demo test sampled test-all portable install check lint types tutorials docs peers clean

demo: install
	.venv/bin/sparsary train recipes/quickstart.yaml
	.venv/bin/sparsary eval runs/quickstart

# pyright, which keeps one core busy for a minute, runs beside the tests; what it finds fails the command as well.
test: install lint
	@$(MAKE) --no-print-directory -j 2 types sampled

sampled: install
	$(TESTS)

# The sweeps too: every architecture and format, and runs killed again and again.
test-all: install check
	.venv/bin/pytest -m "$(ALL_TESTS)"

# The same tests as on other machines: the oldest instructions that the libraries know, AVX2 and two threads, and products
# summed in another order. Tests of documents, pages, packages and commands, which compute nothing, are left out.
PORTABLE = $(TESTS) tests/sae tests/transcoders tests/training tests/eval tests/test_real_models.py --ignore tests/eval/pages

portable: install
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 NUMBA_CPU_NAME=generic $(PORTABLE)
	ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_WAIT_POLICY=passive SPARSARY_TEST_THREADS=2 $(PORTABLE)
	SPARSARY_TEST_PRODUCTS=reordered $(PORTABLE)

# At least 300 injected faults, in one process and in two; a real full disk needs root, which may mount one in memory.
drill: install
	.venv/bin/python tests/drill/drill.py --faults $(or $(FAULTS),300) --seed $(or $(SEED),0)

# Damaged files for every reader, far more than the tests take, in a new order each time; then by coverage if atheris is there.
fuzz: install
	SPARSARY_FUZZ_EXAMPLES=$(or $(EXAMPLES),5000) .venv/bin/pytest -n 2 --dist load --timeout 7200 -m "slow or not slow" tests/fuzz
	@if .venv/bin/python -c 'import atheris' 2>/dev/null; then for name in recipe manifest shard checkpoint metrics; do .venv/bin/python tests/fuzz/atheris_fuzz.py $$name -max_total_time=300 || exit 1; done; else echo 'atheris is not installed: no fuzzing by coverage'; fi

check: lint types

types: install
	.venv/bin/pyright

lint: install
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	@if test -x .venv/bin/oxlint; then .venv/bin/oxlint --deny-warnings eval/pages/templates; else echo 'oxlint is not installed: the scripts of pages were not checked'; fi

# The tutorials, each run only if its text has changed; their outputs are in build/tutorials.
tutorials: .venv/docs
	.venv/bin/python docs/notebooks.py

# The documentation site, in build/docs. A warning is an error; nothing is loaded from the network when it is read.
docs: tutorials
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict

.venv/docs: .venv/installed
	$(PIP) install --quiet --constraint constraints.txt --group docs
	touch $@

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "sparsary needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) install --quiet "pip>=25.1" --constraint constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --group dev --editable ".[all]"
	touch $@

peers: .venv-peers/installed

.venv-peers/installed: tests/parity/peers.txt tests/parity/peers-nodeps.txt
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	$(PEERS_PIP) install --quiet --requirement tests/parity/peers.txt
	$(PEERS_PIP) install --quiet --no-deps --requirement tests/parity/peers-nodeps.txt
	touch $@

clean:
	rm -rf .venv .venv-peers runs build *.egg-info
