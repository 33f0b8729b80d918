# `make run` runs the notebook, `make test` runs every test, the notebook included. Each installs what it needs first.
PYTHON ?= python3
BIN := .venv/bin
NBCONVERT := $(BIN)/python -m nbconvert --log-level=WARN

.PHONY: run test stored ablation clean

run: .venv/installed
	@echo "Running notebooks/S6.ipynb, 20 epochs: minutes on a CPU, less on a GPU. Nothing is printed meanwhile."
	@# With errors allowed, so that a missed goal can be looked at; the grep below fails where the verdict is missing.
	$(NBCONVERT) --execute --allow-errors --to notebook --output-dir build \
		--ExecutePreprocessor.record_timing=False notebooks/S6.ipynb
	@# Of each progress bar keep its last state.
	$(NBCONVERT) --to notebook --inplace --CoalesceStreamsPreprocessor.enabled=True build/S6.ipynb
	$(NBCONVERT) --to html build/S6.ipynb
	@echo "Figures and pictures: build/S6.html"
	@grep -o 'Passed: more than 99.4 % at the last epoch, [0-9][^"\\]*' build/S6.ipynb || \
		{ sed -n 's/^ *"evalue": "\(.*\)",$$/\1/p' build/S6.ipynb | head -1; exit 1; }

test: .venv/installed .venv/studies
	$(BIN)/python -m pytest --nbval

# For maintainers: the outputs of the last `make run` become those that the repository shows.
stored: build/S6.ipynb
	@test build/S6.ipynb -nt notebooks/S6.ipynb || { echo "The notebook has changed since: make run first."; exit 1; }
	$(NBCONVERT) --to markdown build/S6.ipynb
	cp build/S6.ipynb notebooks/S6.ipynb
	cp $$(grep -o 'S6_files/[^)]*' build/S6.md | sed -n 's|^|build/|; 2p') notebooks/curves.png  # the second picture

# For maintainers: after new rows in studies/results/accuracy.csv, the outputs of the notebook that draws them.
ablation: .venv/installed
	$(NBCONVERT) --execute --inplace --ExecutePreprocessor.record_timing=False notebooks/ablation.ipynb
	$(NBCONVERT) --to markdown --output-dir build notebooks/ablation.ipynb
	set -- $$(grep -o 'ablation_files/[^)]*' build/ablation.md | sed 's|^|build/|'); \
		cp "$$4" notebooks/ladder.png; cp "$$5" notebooks/ablation.png

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --requirement requirements.txt
	touch $@

.venv/studies: studies/requirements.txt .venv/installed
	$(BIN)/python -m pip install --requirement studies/requirements.txt
	touch $@

clean:
	rm -rf .venv build
