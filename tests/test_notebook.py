"""The notebooks' files, their cells, and the ways in."""

import base64
import json
import re
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
import torch.nn.functional as F
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

from conftest import CODE, NOTEBOOKS, ROOT, random_images, run_training_cell, text_of
from s6.model import Net
from s6.utils import Loader, Recipe

SOURCES = [cell.source for cell in CODE["S6"]]
MODULES_CELL, SETTINGS, DATA, TRAINING, SAVED, CURVES, VERDICT, HANDWRITING = (
    next(i for i, source in enumerate(SOURCES) if re.search(f"^{start}", source, re.MULTILINE))
    for start in ("modules", "recipe", "train_loader,", "for epoch", "saved", "plot_curves", "parameters", "picture")
)
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "pictures"), [("S6", 7), ("experiment", 1), ("ablation", 4)])
def test_stored_outputs_are_from_one_run_from_top_to_bottom_on_no_machine_in_particular(name, pictures):
    assert [cell.execution_count for cell in CODE[name]] == list(range(1, len(CODE[name]) + 1))
    outputs = [output for cell in CODE[name] for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == pictures
    assert not re.search(r"/(home|root|work|tmp|Users|content)/", json.dumps(outputs))


def test_readme_shows_the_pictures_of_the_stored_runs():
    for i, name in ((CURVES, "curves.png"), (-1, "gains.png")):
        picture = base64.b64decode(CODE["S6"][i].outputs[-1].data["image/png"])
        assert (ROOT / "notebooks" / name).read_bytes() == picture
    assert all((ROOT / picture).is_file() for picture in re.findall(r"!\[.*\]\((.*\.png)\)", README))


def test_readme_s_example_runs(batches, monkeypatch, capsys):
    code = re.search("```python\n(.*?)```", README, re.DOTALL)[1]
    monkeypatch.setattr("s6.utils.mnist_loaders", lambda recipe, device: (batches, batches))
    exec(code.replace("Recipe()", "Recipe(epochs=2)"), {})
    assert re.search(r"^\(\[\d\.\d+\], \[\d+\.\d+\]\)$", capsys.readouterr().out, re.MULTILINE)


def test_badges_and_notebooks_have_one_address():
    text = README + "".join(map(nbformat.writes, NOTEBOOKS.values()))
    addresses = re.findall(r"github(?:\.com)?/([\w-]+/[\w-]+)(?:/blob/main/notebooks/| S6)", text)
    assert len(addresses) == 5 + 3 and len(set(addresses)) == 1


def copy_modules(folder):
    folder.mkdir(exist_ok=True, parents=True)
    for name in ("model.py", "utils.py"):
        shutil.copy(ROOT / "s6" / name, folder)
    return folder


def commit(folder):
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@b.c", "-C", folder]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "All"]):
        subprocess.run([*git, *command], check=True)


@pytest.fixture
def run_here(tmp_path, monkeypatch):
    """Run a cell in an empty folder; return its names. What it clones is the folder `repository`, if there is one."""
    address = re.search("https://github.com/[^ ]+", SOURCES[MODULES_CELL])[0]
    instead = f"url.file://{tmp_path}/repository.insteadOf"
    for name, value in (("GLOBAL", "/dev/null"), ("COUNT", "1"), ("KEY_0", instead), ("VALUE_0", address)):
        monkeypatch.setenv(f"GIT_CONFIG_{name}", value)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("sys.path", [*sys.path])

    def run(source):
        shell = SimpleNamespace(system=lambda command: subprocess.run(command.format(**names), shell=True))
        names = {"get_ipython": lambda: shell}
        exec(TransformerManager().transform_cell(source), names)
        return names

    yield run
    for name in ("model", "utils", "draw"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("modules", "found", "folder"), [("here", ".", "."), ("here/s6", "s6", "."), ("s6", "../s6", "..")]
)
def test_the_modules_are_found_beside_the_notebook_or_in_a_checkout(modules, found, folder, tmp_path, run_here):
    copy_modules(tmp_path / modules)
    names = run_here(SOURCES[MODULES_CELL])
    assert names["modules"] == Path(found) and Path(sys.modules["utils"].__file__).parent == Path(found).resolve()
    exec(SOURCES[SETTINGS], names := {"Recipe": Recipe, "modules": Path(found)})
    assert names["folder"] == Path(folder), "images and weights are beside the modules, or in the root of the checkout"


def test_without_modules_the_project_is_cloned_once(run_here, tmp_path, capsys):
    folder = copy_modules(tmp_path / "repository" / "s6").parent
    shutil.copytree(ROOT / "studies" / "results", folder / "studies" / "results")
    with pytest.raises(ImportError, match="Found: neither file. .* upload our model.py and utils.py beside"):
        run_here(SOURCES[MODULES_CELL])  # no network at first
    commit(folder)
    for _ in range(2):
        assert run_here(SOURCES[MODULES_CELL])["modules"] == Path("S6/s6")
    capsys.readouterr()
    run_here(CODE["ablation"][0].source)
    assert capsys.readouterr().out == text_of(CODE["ablation"][0])
    shutil.copy(ROOT / "s6" / "model.py", ".")  # it does not go with the utils.py of the clone
    with pytest.raises(ImportError, match="No module named 'utils'. Found: model.py. "):
        run_here(SOURCES[MODULES_CELL])


@pytest.mark.parametrize("name", ["S6", "experiment"])
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model.py": "model.py"}, "No module named 'utils'. Found: model.py. "),
        ({"utils (1).py": "utils.py"}, r"No module named 'model'. Found: utils \(1\).py. "),  # from a browser
        ({"model.py": "model.py", "utils.py": "ruff.toml"}, "utils.py, line .* Found: .* Correct the file, or upload"),
        ({"model.py": "model.py", "utils.py": "draw.py"}, "cannot import name 'Recipe' from 'utils'"),
        ({"model.py": "utils.py", "utils.py": "utils.py"}, "cannot import name 'Net' from 'model'"),
    ],
)
def test_a_missing_a_renamed_or_a_foreign_module_is_named(name, files, message, tmp_path, run_here):
    for file, ours in files.items():
        shutil.copy(ROOT / "s6" / ours, file)
    commit(copy_modules(tmp_path / "repository" / "s6"))  # the student's own files count more than published ones
    with pytest.raises(ImportError, match=message):
        run_here(CODE[name][0].source)


@pytest.mark.parametrize("name", CODE)
def test_a_repository_without_our_files_leaves_no_clone_and_a_folder_s6_stays(name, run_here, tmp_path):
    (tmp_path / "repository" / "S6").mkdir(parents=True)
    (tmp_path / "repository" / "S6" / "README.md").write_text("Another project", encoding="utf-8")
    commit(tmp_path / "repository")
    for own in ([], [Path("S6/photos")]):
        for folder in own:
            folder.mkdir(parents=True)
        with pytest.raises((ImportError, AssertionError), match="[Uu]pload .* beside this notebook"):
            run_here(CODE[name][0].source)
        assert sorted(Path().glob("S6/*")) == own and Path("S6").exists() == bool(own)


def training(folder, criterion=F.nll_loss):
    """Run the training cell for three epochs of 70 random images; return its names and histories."""
    recipe, both = Recipe(epochs=3, batch_size=16), random_images(70)
    names = {"recipe": recipe, "folder": folder, "F": SimpleNamespace(nll_loss=criterion)}
    names |= {"train_loader": Loader(*both, 16, recipe.seed, recipe.augment), "test_loader": Loader(*both, 16)}
    try:
        run_training_cell(names)
    except KeyboardInterrupt:
        assert not (folder / "S6.pt").exists()
    return names, [names[name] for name in ("train_losses", "train_acc", "test_losses", "test_acc")]


def test_the_training_cell_run_twice_gives_the_same_figures_and_weights(tmp_path):
    assert len(SOURCES[TRAINING].splitlines()) <= 18
    (_, first), weights = training(tmp_path), torch.load(tmp_path / "S6.pt")
    assert training(tmp_path)[1] == first and len(first[3]) == 3
    torch.testing.assert_close(torch.load(tmp_path / "S6.pt"), weights, rtol=0, atol=0)


@pytest.mark.parametrize("calls", [3, 5, 9, 11])  # an epoch is five batches and the test
def test_an_interrupted_training_can_be_drawn(calls, tmp_path):
    criterion = Mock(wraps=F.nll_loss, side_effect=[DEFAULT] * calls + [KeyboardInterrupt])
    names, histories = training(tmp_path, criterion)
    assert [len(history) for history in histories] == [(calls + 1) // 6] * 2 + [calls // 6] * 2
    exec(SOURCES[CURVES], names)


def test_the_saved_weights_serve_without_our_loaders(network, tmp_path, mnist, capsys):
    torch.save(network.state_dict(), tmp_path / "S6.pt")
    (tmp_path / "data").symlink_to(ROOT / "data")
    exec(SOURCES[SAVED], names := {"Net": Net, "torch": torch, "folder": tmp_path})
    assert capsys.readouterr().out == text_of(CODE["S6"][SAVED])
    read = [names["saved"](image[None]).argmax().item() == label for image, label in islice(names["digits"], 100)]
    assert sum(read) >= 98


def test_handwriting_is_read_and_a_network_without_a_page_goes_on(tmp_path, monkeypatch, capsys):
    Image.new("L", (400, 300), "white").save(tmp_path / "digit.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "s6")
    shown, names = [], {"modules": ROOT / "s6", "averaged": Net().to(memory_format=torch.channels_last)}
    exec(SOURCES[HANDWRITING], names)
    assert len(plt.gcf().axes) == 3
    monkeypatch.setattr("IPython.display.display", shown.append)
    exec(SOURCES[HANDWRITING + 1], names)
    assert "<iframe srcdoc=" in shown[0].data
    names["averaged"] = Net(activation=torch.tanh)
    exec(SOURCES[HANDWRITING + 1], names)
    said = "There is no page to draw on: the drawing page needs blocks with SiLU or ReLU"
    assert said in capsys.readouterr().out
    with pytest.raises(ValueError, match="no ink was found"):
        exec(SOURCES[HANDWRITING].replace('picture = ""', 'picture = "digit.png"'), names)
    del sys.modules["draw"]


def test_with_two_modules_and_a_drive_it_runs_to_the_end_and_reads_new_files(tmp_path, mnist, monkeypatch):
    """For one epoch of a thousand images. First utils.py is an older one; at the end, model.py has other channels."""
    drive, content = tmp_path / "drive", copy_modules(tmp_path / "content")
    drive.mkdir()
    (drive / "data").symlink_to(ROOT / "data")
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as here: see conftest.py
    sources = [source.replace("recipe = Recipe()", "recipe = Recipe(epochs=1)") for source in SOURCES]
    sources[SETTINGS] += f"\nfolder = Path({str(drive)!r})"
    sources[DATA] += "\nfor loader in (train_loader, test_loader):"
    sources[DATA] += "\n    loader.images, loader.labels = loader.images[:1000], loader.labels[:1000]"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    client = NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(content)}})

    def run(cells):
        for i in cells:
            client.execute_cell(notebook.cells[i], i)

    ours = (content / "utils.py").read_text(encoding="utf-8")
    (content / "utils.py").write_text(ours.replace("def mnist_loaders", "def old_loaders"), encoding="utf-8")
    with client.setup_kernel():
        with pytest.raises(CellExecutionError, match=r"cannot import name 'mnist_loaders' .* Found: .*utils\.py"):
            run([MODULES_CELL])
        (content / "utils.py").write_text(ours, encoding="utf-8")
        run(range(VERDICT))
        with pytest.raises(CellExecutionError, match=r": \d\d?\.\d\d % at the last epoch: the goal is"):
            run([VERDICT])
        run(range(VERDICT + 1, len(sources)))
        assert "upload draw.py and index.html beside model.py" in text_of(notebook.cells[HANDWRITING])
        bar_and_line = r"epoch 1:.*%\|.*\repoch  1: train loss .*\n$"  # nothing is left of the bar
        assert re.search(bar_and_line, text_of(notebook.cells[TRAINING]), re.DOTALL)
        assert sorted(path.name for path in drive.iterdir()) == ["S6.pt", "data"]
        assert {path.name for path in content.glob("*.*")} == {"model.py", "utils.py"}
        wider = (content / "model.py").read_text(encoding="utf-8").replace("(8, 12, 16)", "(8, 12, 24)")
        (content / "model.py").write_text(wider, encoding="utf-8")
        notebook.cells[TRAINING].source += "\nprint(sum(p.numel() for p in model.parameters()), 'parameters')"
        run(range(VERDICT))
    exec(wider, names := {})
    expected = sum(p.numel() for p in names["Net"]().parameters())
    assert text_of(notebook.cells[TRAINING]).endswith(f"\n{expected} parameters\n") and expected != 10_474
