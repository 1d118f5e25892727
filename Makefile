# make repro          environment + the whole pipeline (PROFILE=paper: another profile)
# make test           environment + what a contributor runs; make test-slow: the rest
# make verify         reproduce the committed results elsewhere and compare (SEEDS="0 1": those alone, sooner)
# make study          all methods under several conditions (hours; broken off, it goes on; STUDY=study-90: one part)
# make real           the study on real pictures (hours; broken off, it goes on; REAL_FROM=DIR: a folder that has them)
# make bench          speed and memory against the release's step (10 minutes, a quiet machine)
# make report         the executed notebooks as web pages, self-contained
# make lab            JupyterLab
# make lock           renew requirements.lock from pyproject.toml

SHELL := /bin/bash
PROFILE ?=
PYTHON ?= $(shell command -v python3.11 || command -v python3)
UV_VERSION := 0.13.9

# An active conda environment named dgs (environment.yml) is used as it is; otherwise .venv is made.
ifeq ($(CONDA_DEFAULT_ENV),dgs)
BIN := $(CONDA_PREFIX)/bin
READY := history
else
BIN := $(CURDIR)/.venv/bin
READY := .venv/.ready
HINT := . To use dvc, papermill and dgs: source .venv/bin/activate
endif
export PATH := $(BIN):$(PATH)

STUDY ?= study-90 study-75 study-50 study-object study-networks study-patches study-90-val study-90-unbiased
FRESH := 20261130
REAL ?= real real-unmatched real-64 real-128 real-256
REAL_FROM ?=

NOTEBOOKS := $(addprefix notebooks/,$(addsuffix .ipynb,prepare train evaluate gradient_angles explore score))
PARALLEL := -n logical --dist loadfile  # not by groups: pytest-xdist 3.8 loses them under pytest 9.2 without a word
NBVAL := --nbval-lax --nbval-current-env --nbval-cell-timeout 300 --nbval-kernel-startup-timeout 120

.PHONY: history environment repro test test-slow verify study real real-pictures real-captions bench lint report lab page lock
environment: $(READY)

# DVC asks for a git repository, and refuses a copy without one (a ZIP) when everything is installed: made here, first.
history:
	@git rev-parse --git-dir > /dev/null 2>&1 || \
	  { echo "dgs: DVC needs a git repository, found none: git init makes an empty one here."; git init --quiet .; } || \
	  { echo "dgs: expected git to make it, found that it did not. Install git, or mend what it says above."; exit 1; }

# torch comes first and by pip: it honours the machine's pip settings, and keeps a CPU build that is already there.
.venv/.ready: requirements.lock pyproject.toml | history
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "dgs: expected Python 3.11 as python3.11 or python3, found $$($(PYTHON) --version). Set PYTHON=/path/to/python3.11."; exit 1; }
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet uv==$(UV_VERSION)
	.venv/bin/python -m pip install --quiet $$(grep -oE '^torch(vision)?==[^ ;]+' requirements.lock)
	.venv/bin/uv pip install --quiet --compile-bytecode --python .venv/bin/python -r requirements.lock
	.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps -e .
	touch $@

# A kill in the moment when DVC writes its lock file leaves an empty one, and DVC then refuses to start.
repro: $(READY)
	@test ! -e .dvc/tmp/rwlock || python -m json.tool .dvc/tmp/rwlock > /dev/null 2>&1 || rm -f .dvc/tmp/rwlock
	$(if $(PROFILE),pipeline=$$(dgs profile $(PROFILE)) &&) dvc repro $(if $(PROFILE),$$pipeline)
	@echo "Results: results/$(or $(PROFILE),mini)/REPORT.md$(HINT)"

test: $(READY) lint
	rm -f .coverage .coverage.*
	out=$$(mktemp -d) && trap "rm -rf $$out" EXIT && startup=$$out/ipython/profile_default/startup && \
	  mkdir -p $$startup && cp tests/kernel_coverage.py $$startup && \
	  export DGS_PROFILE=tiny DGS_OUT=$$out IPYTHONDIR=$$out/ipython && \
	  coverage run -m pytest $(NBVAL) $(NOTEBOOKS) && coverage run -m pytest $(PARALLEL) -m "not slow" --durations=25 tests
	coverage combine --quiet
	coverage report --skip-covered --fail-under=90

test-slow: $(READY)
	pytest $(PARALLEL) -m slow --durations=25 tests

verify: $(READY)
	python tests/verify.py $(SEEDS)

# The numbers of `tuned` in params.yaml were chosen and committed before these test images were made for the first time.
study: $(READY)
	test -e build/fresh || dgs minibench build --out build/fresh --seed $(FRESH) --training shipped
	$(if $(filter study-networks,$(STUDY)),test -e build/networks || \
	  dgs minibench build --out build/networks --seed 3 --generators train --network-seed 2)
	for profile in $(STUDY); do pipeline=$$(dgs profile $$profile) && dvc repro $$pipeline || exit 1; done
	dgs study

# Real pictures, from REAL_FROM=DIR or by git: whatever changes one, or a caption, makes the matched copy anew.
real-pictures: $(READY)
	test -e build/real/tower || dgs tower clip-vit-b16 --out build/real/tower
	dgs real $(if $(REAL_FROM),--from "$(REAL_FROM)",--clone)
	cmp -s real/captions.jsonl build/real/pictures/captions.jsonl || \
	  { rm -rf build/real/matched && cp real/captions.jsonl build/real/pictures/; }
	test -e build/real/matched || dgs match build/real/pictures build/real/matched --size 240

real: real-pictures
	for profile in $(REAL); do pipeline=$$(dgs profile $$profile) && dvc repro $$pipeline || exit 1; done
	python -m real.text_alone
	python -m real.in_common
	python -m real.study
	python -m real.tables

real-captions: $(READY)
	dgs real $(if $(REAL_FROM),--from "$(REAL_FROM)",--clone)
	python -m real.captions build/real/pictures --out real/captions.jsonl

bench: $(READY)
	python benchmarks/bench.py

lint: $(READY)
	ruff check .
	ruff format --check .
	mypy

report: $(READY)
	dgs report $(PROFILE)

lab: $(READY)
	$(if $(PROFILE),DGS_PROFILE=$(PROFILE)) jupyter lab notebooks

# For this machine alone; notebooks/voila.json sets how large pictures may be, and keeps the browser from other places.
page: $(READY)
	cd notebooks && $(if $(PROFILE),DGS_PROFILE=$(PROFILE)) voila score.ipynb

lock:
	uv pip compile -q --universal --python-version 3.11 --extra dev --extra captions --annotation-style line --no-header \
	  $$(for name in triton cuda-bindings cuda-pathfinder cuda-toolkit \
	      $$(uv pip compile -q --universal --python-version 3.11 --no-annotate --no-header pyproject.toml \
	         | sed -nE 's/^(nvidia-[a-z0-9-]+)==.*/\1/p'); do echo --no-emit-package $$name; done) \
	  pyproject.toml -o requirements.raw
	{ sed -n '/^#/p;/^[^#]/q' requirements.lock; \
	  sed -E "/python_full_version >= '3\.12'/d; s/ ; python_full_version < '3\.12'//; s/ +#/  #/" requirements.raw; } > requirements.new
	rm requirements.raw && mv requirements.new requirements.lock
