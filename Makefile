# `make run` runs the notebook, `make test` runs every test, the notebook included. Each installs what it needs first.
PYTHON ?= python3
PYTHON313 ?= python3.13
BIN := .venv/bin
NBCONVERT := $(BIN)/python -m nbconvert --log-level=ERROR

.PHONY: run test test-browser test-colab badge stored ablation clean

run: .venv/installed
	@echo "Running notebooks/S6.ipynb, 20 epochs: minutes on a CPU. Nothing is printed meanwhile."
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

# The notebook in JupyterLab, in a browser. Pictures of the page: build/browser.
test-browser: .venv/browser
	$(BIN)/python -m pytest tests/in_browser.py

# The notebooks and the ways in, with the versions of Colab's image.
test-colab:
	@$(PYTHON313) -c "import sys; sys.exit(sys.version_info[:2] != (3, 13))" 2>/dev/null || \
		{ echo "Python 3.13 is not to be had as $(PYTHON313). Name another: make test-colab PYTHON313=/path/to/python3.13"; exit 1; }
	$(PYTHON313) -m venv .venv-colab
	.venv-colab/bin/python -m pip install --requirement tests/colab-constraints.txt --requirement requirements.txt
	.venv-colab/bin/python -m pytest --nbval notebooks tests/test_notebook.py

# For maintainers, once the project is published: where the badges lead and the notebooks fetch from.
badge:
	@printf '%s' '$(REPO)' | grep -Eqx '[A-Za-z0-9-]+/[A-Za-z0-9._-]+' || \
		{ echo "The address is owner/name, as in github.com/owner/name: make badge REPO=owner/name"; exit 1; }
	@sed -i.bak -E -e 's|(colab\.research\.google\.com/github/)[^/]+/[^/]+(/blob/)|\1$(REPO:.git=)\2|g' \
		-e 's|(REPOSITORY = .{1,2}https://github\.com/)[^"\]+|\1$(REPO:.git=)|' README.md notebooks/S6.ipynb notebooks/ablation.ipynb
	@rm README.md.bak notebooks/S6.ipynb.bak notebooks/ablation.ipynb.bak
	@echo "README.md and notebooks now lead to $(REPO:.git=)"

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

.venv/browser: tests/browser-requirements.txt .venv/installed
	@command -v chromium >/dev/null || { echo "Chromium is missing: install your distribution's package chromium"; exit 1; }
	$(BIN)/python -m pip install --requirement tests/browser-requirements.txt
	touch $@

clean:
	rm -rf .venv .venv-colab build
