"""The notebooks' files, what Colab has for them, and the ways in."""

import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from conftest import ROOT
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from packaging.requirements import Requirement
from PIL import Image

from s6.model import Net
from s6.utils import Recipe, upright
from studies.common import on

NAMES = ("S6", "experiment", "ablation")
NOTEBOOKS = [nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4) for name in NAMES]
CODE, EXPERIMENT_CODE, ABLATION_CODE = ([cell for cell in each.cells if cell.cell_type == "code"] for each in NOTEBOOKS)
SOURCES = [cell.source for cell in CODE]
MODULES_CELL, SETTINGS, TRAINING, CURVES, HANDWRITING = (
    next(i for i, source in enumerate(SOURCES) if re.search(f"^{start}", source, re.MULTILINE))
    for start in ("modules =", "recipe =", "for epoch in range", "plot_curves", "picture =")
)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def text_of(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.parametrize(("code", "pictures"), [(CODE, 7), (EXPERIMENT_CODE, 2), (ABLATION_CODE, 6)], ids=NAMES)
def test_stored_outputs_are_from_one_run_from_top_to_bottom_on_no_machine_in_particular(code, pictures):
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == pictures
    assert not re.search(r"/(home|root|work|tmp|Users|content)/", json.dumps(outputs))


def test_readme_shows_the_pictures_of_the_stored_runs():
    curves = base64.b64decode(CODE[CURVES].outputs[-1].data["image/png"])
    assert (ROOT / "notebooks" / "curves.png").read_bytes() == curves
    pictures = re.findall(r"!\[.*\]\((.*\.png)\)", README)
    assert pictures == ["docs/draw.png", *(f"notebooks/{name}.png" for name in ("curves", "ablation", "widths"))]
    assert all((ROOT / picture).is_file() for picture in pictures)


def test_readme_s_example_runs(batches, monkeypatch, capsys):
    code = re.search("```python\n(.*?)```", README, re.DOTALL)[1]
    monkeypatch.setattr("s6.utils.mnist_loaders", lambda recipe, device: (batches, batches))
    exec(code.replace("Recipe()", "Recipe(epochs=2)"), {})
    assert re.search(r"^\(\[\d\.\d+\], \[\d+\.\d+\]\)$", capsys.readouterr().out, re.MULTILINE)


def test_badges_and_notebooks_have_one_address():
    notebooks = [(ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8") for name in NAMES]
    text = README + "".join(notebooks)
    badges = re.findall(r"colab\.research\.google\.com/github/([^/]+/[^/]+)/blob/main/notebooks/(\w+)\.ipynb", text)
    cloned = re.findall(r"https://github\.com/([^/]+/[\w-]+) S6", text)
    assert [name for _, name in badges] == ["S6", *NAMES] and len(cloned) == 3
    assert len({address for address, _ in badges} | set(cloned)) == 1
    assert all(notebook.metadata.accelerator == "GPU" for notebook in NOTEBOOKS[:2])  # what Colab then offers


def requirements(path):
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return {requirement.name: requirement.specifier for requirement in map(Requirement, filter(None, lines))}


def test_colab_s_versions_satisfy_the_requirements():
    wanted, colab = requirements(ROOT / "requirements.txt"), requirements(ROOT / "tests" / "colab-constraints.txt")
    assert {"torch", "torchvision", "torchsummary", "matplotlib", "tqdm"} <= wanted.keys() & colab.keys()
    for name in wanted.keys() & colab.keys():
        assert str(colab[name]).removeprefix("==") in wanted[name]


def copy_modules(folder, names=("model.py", "utils.py")):
    folder.mkdir(exist_ok=True, parents=True)
    for name in names:
        shutil.copy(ROOT / "s6" / name, folder)
    return folder


# --------------------------------------------------------------------------------------------- single cells, right here


def run_here(source, folder, monkeypatch):
    """Run a cell that may call git, in a folder; return its names."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.path", [*sys.path])
    names = {}
    shell = SimpleNamespace(system=lambda command: subprocess.run(command.format(**names), shell=True))
    names["get_ipython"] = lambda: shell
    exec(TransformerManager().transform_cell(source), names)
    return names


def modules_in(folder, monkeypatch):
    """Return where the modules are found from a folder."""
    modules = run_here(SOURCES[MODULES_CELL], folder, monkeypatch)["modules"]
    assert sys.path[0] == str(modules.resolve())
    return modules.as_posix()


def set_repository(folder, setenv):
    """Let git take a local repository for the address that the notebooks clone."""
    address = re.search("https://github.com/[^ ]+", SOURCES[MODULES_CELL])[0]
    setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    setenv("GIT_CONFIG_COUNT", "1")
    setenv("GIT_CONFIG_KEY_0", f"url.file://{folder}.insteadOf")
    setenv("GIT_CONFIG_VALUE_0", address)


@pytest.fixture
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    copy_modules(folder / "s6")
    shutil.copytree(ROOT / "studies" / "results", folder / "studies" / "results")
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@b.c", "-C", folder]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "The project"]):
        subprocess.run([*git, *command], check=True)
    return folder


@pytest.mark.parametrize(
    ("modules", "found", "folder"), [("here", ".", "."), ("here/s6", "s6", "."), ("s6", "../s6", "..")]
)
def test_the_modules_are_found_beside_the_notebook_or_in_a_checkout(modules, found, folder, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    copy_modules(tmp_path / modules)
    assert modules_in(tmp_path / "here", monkeypatch) == found
    exec(SOURCES[SETTINGS], names := {"Recipe": Recipe, "modules": Path(found)})
    assert names["folder"] == Path(folder), "images and weights are beside the modules, or in the root of the checkout"


def test_without_modules_the_project_is_cloned_once(tmp_path, repository, monkeypatch):
    set_repository(repository, monkeypatch.setenv)
    assert modules_in(tmp_path, monkeypatch) == modules_in(tmp_path, monkeypatch) == "S6/s6"
    assert (tmp_path / "S6" / "s6" / "utils.py").is_file()


def test_ablation_clones_the_rows_too_or_says_what_it_needs(tmp_path, repository, monkeypatch, capsys):
    set_repository("/nowhere", monkeypatch.setenv)
    with pytest.raises(AssertionError, match="^Upload accuracy.csv from studies/results beside this notebook"):
        run_here(ABLATION_CODE[0].source, tmp_path, monkeypatch)
    set_repository(repository, monkeypatch.setenv)
    run_here(ABLATION_CODE[0].source, tmp_path, monkeypatch)
    assert capsys.readouterr().out == text_of(ABLATION_CODE[0])


def test_the_experiment_clones_modules_and_rows_or_says_what_it_needs(tmp_path, repository, monkeypatch):
    set_repository("/nowhere", monkeypatch.setenv)
    with pytest.raises(AssertionError, match="^Upload model.py, utils.py and accuracy.csv beside this notebook"):
        run_here(EXPERIMENT_CODE[0].source, tmp_path, monkeypatch)
    set_repository(repository, monkeypatch.setenv)
    names = run_here(EXPERIMENT_CODE[0].source, tmp_path, monkeypatch)
    [place] = re.findall(r"read_csv\((.*)\)", EXPERIMENT_CODE[-1].source)
    assert eval(place, names).is_file() and names["modules"] == Path("S6/s6")


@pytest.mark.parametrize(
    ("present", "foreign", "named"),
    [
        ([], None, "S6/s6/model.py"),
        (["utils.py"], None, "model.py"),
        (["model.py", "utils.py"], "utils.py", "utils.py"),
        (["model.py", "utils.py"], "model.py", "model.py"),
    ],
)
def test_what_is_missing_or_of_another_project_is_named(present, foreign, named, tmp_path, monkeypatch):
    set_repository("/nowhere", monkeypatch.setenv)
    copy_modules(tmp_path, present)
    if foreign:
        (tmp_path / foreign).write_text("def train(): pass\n", encoding="utf-8")
    with pytest.raises(AssertionError, match=f"^{named} is missing or belongs to another project. Upload our file"):
        modules_in(tmp_path, monkeypatch)


def test_an_apple_gpu_does_not_get_channels_last(monkeypatch):
    """There torch 2.11 to 2.13 computes the gradient of BatchNorm wrongly in channels_last (pytorch/pytorch#175189)."""
    device = torch.device("mps")
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda **_: device)
    exec(SOURCES[SETTINGS + 1], names := {"torch": torch, "sys": sys})
    model = SimpleNamespace(to=lambda device, memory_format: memory_format)
    assert names["device"] is device and names["layout"] == on(device, model) == torch.preserve_format


def test_handwriting_is_read_and_a_network_without_a_page_goes_on(tmp_path, monkeypatch, capsys):
    Image.new("L", (400, 300), "white").save(tmp_path / "digit.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "s6")
    shown = []
    names = {"modules": ROOT / "s6", "recipe": Recipe(), "averaged": Net(), "torch": torch, "upright": upright}
    names["display"] = shown.append
    exec(SOURCES[HANDWRITING], names)
    monkeypatch.setattr("IPython.display.display", shown.append)
    exec(SOURCES[HANDWRITING + 1], names)
    assert len(shown[0].axes) == 3 and "<iframe srcdoc=" in shown[1].data
    names["averaged"] = Net(activation=torch.tanh)
    exec(SOURCES[HANDWRITING + 1], names)
    assert (
        "There is no page to draw on: the drawing page knows one activation, SiLU or ReLU, not tanh"
        in capsys.readouterr().out
    )
    with pytest.raises(ValueError, match="no ink was found"):
        exec(SOURCES[HANDWRITING].replace('picture = ""', 'picture = "digit.png"'), names)
    del sys.modules["draw"]


# ------------------------------------------------------------------------------------------- the notebook in a kernel


def shortened(settings):
    """The notebook's cells, for one epoch of a thousand images."""
    sources = [source.replace("recipe = Recipe()", "recipe = Recipe(epochs=1)") for source in SOURCES]
    sources[SETTINGS] += settings
    few = "for loader in (train_loader, test_loader):\n"
    few += "    loader.images, loader.labels = loader.images[:1000], loader.labels[:1000]\n"
    sources[TRAINING] = sources[TRAINING].replace("torch.manual_seed", f"{few}torch.manual_seed")
    return [nbformat.v4.new_code_cell(source) for source in sources]


def test_with_two_modules_and_a_drive_it_runs_to_the_verdict(tmp_path, mnist, monkeypatch):
    """There are too few images and epochs for the goal. Without draw.py, a sentence says what is missing."""
    drive, content = tmp_path / "drive", copy_modules(tmp_path / "content")
    drive.mkdir()
    (drive / "data").symlink_to(ROOT / "data")
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as here: see conftest.py
    notebook = nbformat.v4.new_notebook(cells=shortened(f"\nfolder = Path({str(drive)!r})"))
    where = {"metadata": {"path": str(content)}}
    with pytest.raises(CellExecutionError, match=r": \d\d?\.\d\d % at the last epoch: the goal is"):
        NotebookClient(notebook, kernel_name="python3", resources=where, timeout=120).execute()
    assert not [o for cell in notebook.cells for o in cell.outputs if o.get("name") == "stderr"]
    assert "upload draw.py and index.html beside model.py" in text_of(notebook.cells[HANDWRITING])
    bar_and_line = r"epoch 1:.*%\|.*\repoch  1: train loss .*\n$"  # nothing is left of the bar
    assert re.search(bar_and_line, text_of(notebook.cells[TRAINING]), re.DOTALL)
    Net().load_state_dict(torch.load(drive / "checkpoints" / "S6.pt", weights_only=True))
    assert [path.name for path in (drive / "checkpoints").iterdir()] == ["S6.pt"]
    assert {path.name for path in content.glob("*.*")} == {"model.py", "utils.py"}
