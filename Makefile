# Each target is the one way to do it, for people and for .ci/run alike.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.install-stamp
PIP := $(BIN)/python -m pip
# Nothing is asked, nothing waits for a keyboard; what is installed is what constraints.txt says.
INSTALL := $(PIP) install --no-input --disable-pip-version-check -c constraints.txt

PROTO := $(shell find proto -name '*.proto' 2>/dev/null)
PROTOC := $(BIN)/python -m grpc_tools.protoc -I proto
STUBS := ckptsvc/rpc/v1

.DEFAULT_GOAL := help
.PHONY: help install test test-rooms test-jobs test-faults test-slow test-slurm test-realfs test-observability test-page test-service \
	deb lint lint-deploy types contracts proto proto-check check docs reference demo bench clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 20

install: $(STAMP) ## make .venv with all that the other targets need

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) pip
	# torch first and alone, so that its wheel is chosen by this line and by nothing that depends on it
	$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	$(INSTALL) --build-constraint constraints.txt --group dev --editable .
	# a server of Azure's, which the tests start; without npm they are skipped
	if command -v npm > /dev/null; then \
	npm install --prefix $(VENV)/azurite --no-audit --no-fund --no-save --loglevel=error azurite@3.35.0; fi
	touch $@

test: install ## run the tests, all but the slow ones (ARGS="-k name")
ifeq ($(strip $(ARGS)),)
	@# three parts at once: the last two mostly wait for processes
	+@$(MAKE) --no-print-directory -j3 --output-sync=target test-rooms test-jobs test-faults
else
	$(BIN)/python -m pytest -m "not slow" $(ARGS)
endif

test-rooms:
	$(BIN)/python -m pytest -m "not slow" -p no:cacheprovider --durations=15 tests/unit tests/scale

test-jobs:
	$(BIN)/python -m pytest -m "not slow" -p no:cacheprovider --durations=15 tests/contract tests/compat tests/schedulers tests/integration

test-faults:
	$(BIN)/python -m pytest -m "not slow" --durations=15 tests/fault

test-slow: install ## run the slow tests
	$(BIN)/python -m pytest -m "slow and not realfs and not lustre" $(ARGS)

test-slurm: install ## the batch template under a real Slurm (Debian, root: installs it)
	@for program in slurmctld slurmd munged sbatch; do command -v $$program > /dev/null || absent=1; done; \
	if [ -n "$$absent" ]; then apt-get update && apt-get install -y --no-install-recommends slurm-wlm munge; fi
	$(BIN)/python -m pytest -m slurm $(ARGS)

REALFS := faketime radosgw ceph-mon ceph-osd ceph-mgr ceph-mds ceph-fuse ceph-common glusterfs-server glusterfs-client \
	moosefs-master moosefs-chunkserver moosefs-client

test-realfs: install ## the drivers on real CephFS, RGW, GlusterFS and MooseFS (Debian, root: installs them)
	@for program in faketime radosgw ceph-osd ceph-mds ceph-fuse glusterd mfsmaster mfschunkserver mfsmount; do \
	command -v $$program > /dev/null || absent=1; done; \
	if [ -n "$$absent" ]; then apt-get update && \
	DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $(REALFS); fi
	$(BIN)/python -m pytest -m realfs $(ARGS)

test-observability: install ## rules and dashboard with a real Prometheus (Debian, root: installs it)
	@for program in prometheus promtool; do command -v $$program > /dev/null || absent=1; done; \
	if [ -n "$$absent" ]; then apt-get update && apt-get install -y --no-install-recommends prometheus; fi
	$(BIN)/python -m pytest tests/unit/test_observability.py tests/integration/test_prometheus.py $(ARGS)

test-page: install ## the status page in Chromium (Debian, root: installs it)
	@command -v chromium > /dev/null || { apt-get update && apt-get install -y --no-install-recommends chromium; }
	$(BIN)/python -m pytest -m browser $(ARGS)

test-service: install ## units, packages and what a service suffers; with a real systemd as root (Debian, root: installs it)
	@for program in systemd-analyze dpkg-deb nsenter lintian podman runc mmdebstrap; do \
	command -v $$program > /dev/null || absent=1; done; \
	if [ -n "$$absent" ]; then apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
	systemd dpkg util-linux lintian podman runc mmdebstrap; fi
	if command -v npm > /dev/null; then npm install --prefix $(VENV)/containerfile --no-audit --no-fund --no-save \
	--loglevel=error dockerfile-utils@0.16.3; fi
	$(BIN)/python -m pytest tests/schedulers/test_systemd.py tests/schedulers/test_packages.py tests/schedulers/test_installed.py \
	tests/schedulers/test_kubernetes.py tests/fault/test_service.py tests/fault/test_service_faults.py $(ARGS)

deb: install ## a Debian package of the service, in dist/; lintian looks at it where it is installed
	rm -f dist/ckptsvc-*.whl
	$(PIP) wheel --no-input --disable-pip-version-check --no-deps --build-constraint constraints.txt -w dist .
	sh deploy/debian/build.sh dist/ckptsvc-*.whl "$(PIP)" dist
	if command -v lintian > /dev/null; then lintian --fail-on error,warning dist/ckptsvc_*.deb; fi

lint: install ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

SCRIPTS := .ci/run deploy/debian/build.sh deploy/debian/postinst deploy/debian/postrm deploy/debian/prerm \
	deploy/observability/targets.sh deploy/pbs/ckptsvc.pbs deploy/slurm/ckptsvc.sbatch
LINTERS := systemd-analyze:systemd dpkg-deb:dpkg lintian:lintian shellcheck:shellcheck promtool:prometheus \
	kubectl:kubernetes-client npm:npm

lint-deploy: install ## all of deploy/: units, package, image, manifests, rules, scripts (Debian, root: installs the linters)
	@absent=$$(for each in $(LINTERS); do command -v $${each%%:*} > /dev/null || echo $${each#*:}; done); \
	if [ -n "$$absent" ]; then apt-get update && \
	DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $$absent; fi
	npm install --prefix $(VENV)/containerfile --no-audit --no-fund --no-save --loglevel=error dockerfile-utils@0.16.3
	shellcheck $(SCRIPTS)
	$(MAKE) --no-print-directory deb
	$(BIN)/python -m pytest -m "not slow" --no-skips tests/schedulers/test_systemd.py tests/schedulers/test_packages.py \
	tests/schedulers/test_kubernetes.py tests/schedulers/test_pbs.py tests/unit/test_observability.py

types: install ## mypy --strict
	$(BIN)/mypy

contracts: install ## who may import whom
	$(BIN)/lint-imports

proto: install ## make the gRPC stubs from proto/
	$(PROTOC) --python_out=. --pyi_out=. --grpc_python_out=. $(PROTO)

proto-check: install ## the committed stubs are the ones that proto/ makes
	@made=$$(mktemp -d) && trap 'rm -rf "$$made"' EXIT && \
	$(PROTOC) --python_out="$$made" --pyi_out="$$made" --grpc_python_out="$$made" $(PROTO) && \
	diff -ru -x __init__.py -x __pycache__ $(STUBS) "$$made/$(STUBS)" || \
	{ echo "$(STUBS) is not what proto/ makes: run make proto" >&2; exit 1; }

check: test lint types contracts proto-check docs ## what .ci/run does, but for lint-deploy

docs: install ## the site of the documentation, into site/; whatever is wrong with it is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

reference: install ## make the pages of docs/reference/ that are made from the code
	$(BIN)/python docs/generate.py
	$(BIN)/python -m ckptsvc.telemetry > docs/reference/metrics.md

demo: install ## train, kill, recover, resume at other scales (ARGS="--keep DIR")
	$(BIN)/ckptsvc demo $(ARGS)

bench: install ## measure save, restore and reshard here (ARGS="save --ranks 4")
	$(BIN)/ckptsvc bench $(ARGS)

clean: ## remove what was made here, except .venv
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
