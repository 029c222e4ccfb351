# Every target sets up what it needs on first use: an active environment (venv, conda, or a container that has w2r2
# installed) is used as it is; otherwise .venv is made from requirements.lock.
SHELL := /bin/bash
PYTHON ?= python3
ACTIVE := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX),$(shell $(PYTHON) -I -c 'import importlib.metadata as m, sys; m.version("w2r2"); print(sys.prefix)' 2>/dev/null))
ENV := $(or $(ACTIVE),$(CURDIR)/.venv)
READY := build/.ready-$(subst /,-,$(ENV))

export PATH := $(ENV)/bin:$(PATH)
export OMP_NUM_THREADS ?= 1
export MATPLOTLIBRC := $(CURDIR)/matplotlibrc

.DEFAULT_GOAL := help
.PHONY: help repro reference miniature test check campaign systems bench-gpu notebooks readme docs lab hooks lock

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): requirements.lock setup.py settings.ini
	@mkdir -p build
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "w2r2 needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
ifeq ($(ACTIVE),)
	$(PYTHON) -m venv .venv
	pip install --quiet --disable-pip-version-check -r requirements.lock
	pip install --quiet --disable-pip-version-check --no-deps -e .
else
	@python -c 'import papermill, w2r2.engine, dvc, nbdev, pytest' 2>/dev/null || python -m pip install -e '.[models,pipeline,dev]'
endif
	@touch $@

# When a stage ends, another DVC, `dvc status` say, may hold the folder's lock for longer than DVC waits by itself.
# A process that was killed as it wrote the list of locks leaves it cut.
REPRO := w2r2 unlock && dvc --wait-for-lock repro

repro: $(READY) ## the main job: regenerate everything that dvc.yaml describes in build/, then compare it with the committed reports
	$(REPRO)
	w2r2 verdict reports --reports build/reports

reference: $(READY) ## rewrite the committed reports by this run (params.yaml: train.set: report for the runs that the tables are made of); reports/trial and its page stay
	$(REPRO)
	rm -f build/reports/verdict*
	for kind in figures tables; do mkdir -p reports/$$kind && cp -r build/reports/$$kind/. reports/$$kind/; done
	find build/reports/notebooks -name '*.ipynb' ! -name 45_trial.ipynb -exec cp {} reports/notebooks/ \;
	cp build/reports/*.* reports/

miniature: $(READY) ## the whole pipeline on a few scenes and for a few steps, in a copy at build/miniature
	rm -rf build/miniature
	mkdir -p build/miniature
	git ls-files -co --exclude-standard -z | tar -c --null -T - | tar -x -C build/miniature
	cd build/miniature && mv params.ci.yaml params.yaml && rm -f dvc.lock && dvc config core.no_scm true && $(REPRO)

test: $(READY) ## the library notebooks (nbdev_test), then what a notebook cannot show (pytest)
	nbdev_test --n_workers 2
	pytest -n 2 --dist loadfile

INPUTS ?= 200000
KILLS ?= 200
campaign: $(READY) ## damaged files to every reader, faults at writes, kills of the miniature pipeline (INPUTS=20000 KILLS=20 for less; a stopped one goes on); then the page of it
	@mkdir -p build/campaign
	PYTHONPATH=tests python -m campaign.run --inputs $(INPUTS) --state build/campaign/inputs.jsonl
	PYTHONPATH=tests python -m campaign.faults --kills $(KILLS)
	PYTHONPATH=tests python -m campaign.kills --kills $(KILLS)
	papermill --engine w2r2 --cwd nbs/bench --no-progress-bar $(CURDIR)/nbs/bench/campaign.ipynb $(CURDIR)/nbs/bench/campaign.ipynb
	nbdev_clean

systems: $(READY) ## every system of Tables 1 and 2 on 200 queries, with 3D and without, and its geometry card: the pages systems and cards of nbs/bench, rows in reports/systems
	$(REPRO) prepare
	for page in systems cards; do papermill --engine w2r2 --stderr-file /dev/stderr --no-progress-bar nbs/bench/$$page.ipynb nbs/bench/$$page.ipynb || exit 1; done
	nbdev_clean

SIZE ?= Qwen2.5-VL-3B
DEVICE ?= cuda
FRAMES ?= 16,32
bench-gpu: $(READY) ## ms, memory and share of the ceiling of a training step at full size with random weights (SIZE=tiny DEVICE=cpu FRAMES=2,4 without a GPU); page and rows go to build/bench
	mkdir -p build/bench
	papermill --engine w2r2 --cwd nbs/bench --no-progress-bar -r size $(SIZE) -r device $(DEVICE) -r frames $(FRAMES) -r output $(CURDIR)/build/bench/full_size.json $(CURDIR)/nbs/bench/full_size_speed.ipynb $(CURDIR)/build/bench/full_size_speed.ipynb

check: $(READY) ## w2r2/ in step with nbs/, notebooks clean, code as ruff wants it, data as pinned
	ruff check --quiet nbs tests
	ruff format --quiet --check nbs tests || { echo 'Formatting: run ruff format nbs tests.'; exit 1; }
	nbdev_export
	nbdev_clean
	@git diff --exit-code --stat -- w2r2 nbs || { echo 'Out of step: w2r2/ and nbs/ have just been exported and cleaned; look at the change and commit it.'; exit 1; }
	@dvc status --quiet data.dvc || { echo 'data/ differs from data.dvc: restore it (git checkout data), or pin the change (dvc add --no-commit data).'; exit 1; }
	@echo 'w2r2/ in step, notebooks clean, data as pinned'

notebooks: $(READY) ## execute the library notebooks in place
	for notebook in nbs/[0-9]*.ipynb nbs/*/[0-9][0-9]_*.ipynb nbs/leaderboard.ipynb nbs/log.ipynb; do case $$notebook in nbs/pipeline/*) continue;; esac; papermill --engine w2r2 --cwd $$(dirname $$notebook) --stderr-file /dev/stderr --no-progress-bar $(CURDIR)/$$notebook $(CURDIR)/$$notebook || exit 1; done
	nbdev_clean

readme: $(READY) ## the answer in nbs/index.ipynb from the committed reports, and README.md from that
	papermill --engine w2r2 --cwd nbs --no-progress-bar $(CURDIR)/nbs/index.ipynb $(CURDIR)/nbs/index.ipynb
	nbdev_clean
	jupyter nbconvert --to markdown --no-input --stdout --log-level WARN nbs/index.ipynb | sed -E 's#\]\(\.\./#](#g; s#\]\(((report|scans)/|log\.ipynb)#](nbs/\1#g' > README.md

docs: $(READY) ## the site, in _docs/html/: built, and walked through where there is a Chromium
	rm -rf _docs
	sphinx-build -q -W --keep-going -j 2 -b html -c nbs -d _docs/doctrees . _docs/html
	pytest -q tests/test_site.py
	@echo 'open _docs/html/index.html'

# In a container the user is often root, and JupyterLab wants to be told that this is meant.
lab: $(READY) ## JupyterLab on the tour
	jupyter lab --config=nbs/jupyter_server_config.py --LabApp.default_url=/lab/tree/nbs/tour.ipynb $(if $(filter 0,$(shell id -u)),--allow-root)

hooks: $(READY) ## in this clone, git diffs notebooks by cell (nbdime) and merges them (nbdev)
	git config --local include.path ../.gitconfig

lock: $(READY) ## requirements.lock from settings.ini (needs uv; wheels of torch without CUDA in its find-links)
	uv pip compile --quiet --upgrade --extra models --extra pipeline --extra dev --no-header --no-annotate --python-version 3.11 -o requirements.lock setup.py
	sed -i 's/^\(torch==[0-9.]*\)+cpu$$/\1/' requirements.lock
	@! grep -iE '^(nvidia-(cu|nccl|nv)|triton|cuda)' requirements.lock || { echo 'The lock holds CUDA packages: compile it where pip finds a CPU build of torch.'; exit 1; }
