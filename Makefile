# Each target alone makes the virtual environment and installs what it needs. PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-full lint types bench docs evidence-1 evidence-2 evidence-3 evidence-4 evidence-5 evidence-6 browser relock clean

demo: $(READY)
	$(BIN)/orograph demo

test: $(READY) browser
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto -m "not slow"

test-full: $(READY) browser
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

bench: .venv/.peers
	$(BIN)/python -m benchmarks.run

# --no-deps: one of the peers asks for torchvision, which would bring another torch
.venv/.peers: $(READY) benchmarks/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/requirements.txt
	@touch .venv/.peers

docs: $(READY)
	$(BIN)/pdoc --math -o build/docs orograph

evidence-1: $(READY)
	$(BIN)/python -m evidence.certified_curvature

evidence-2: .venv/.peers
	$(BIN)/python -m evidence.right_and_fast

evidence-3: $(READY)
	$(BIN)/python -m evidence.one_point

evidence-4: $(READY)
	$(BIN)/python -m evidence.between_networks

evidence-5: $(READY)
	$(BIN)/python -m evidence.surfaces

evidence-6: $(READY)
	OROGRAPH_FAMILIES=all $(BIN)/python -m evidence.true_again

browser: $(READY)
	@sh tools/install-browser.sh

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Orograph needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Set PYTHON=python3.11.")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $(READY)

relock: $(READY)
	$(BIN)/python -m pip install --quiet --upgrade --upgrade-strategy eager "torch==2.13.0" -e ".[test,lint,docs]"
	@sed -n '/^#/p' requirements.lock > requirements.new
	$(BIN)/python -m pip freeze --all --exclude-editable | sed 's/^torch==.*/torch==2.13.0/' | grep -v '^pip==' >> requirements.new
	@mv requirements.new requirements.lock

clean:
	rm -rf .venv build demo-report
