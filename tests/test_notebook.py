"""The notebooks' files, what Colab has for them, and the ways in: each a kernel of its own in a folder of its own."""

import base64
import contextlib
import json
import re
import shutil
import subprocess

import nbformat
import pytest
import torch
from conftest import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from packaging.requirements import Requirement
from PIL import Image

from s6.model import Net

NOTEBOOK, ABLATION = (nbformat.read(ROOT / "notebooks" / name, as_version=4) for name in ("S6.ipynb", "ablation.ipynb"))
CODE, ABLATION_CODE = ([cell for cell in each.cells if cell.cell_type == "code"] for each in (NOTEBOOK, ABLATION))
SOURCES = [cell.source for cell in CODE]
MODULES_CELL, SETTINGS, TRAINING, CURVES, HANDWRITING = (
    next(i for i, source in enumerate(SOURCES) if re.search(f"^{start}", source, re.MULTILINE))
    for start in ("REPOSITORY =", "recipe =", "for epoch in range", "plot_curves", "picture =")
)
MODULES = ("model.py", "utils.py")


def text_of(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.parametrize(("code", "pictures"), [(CODE, 7), (ABLATION_CODE, 7)], ids=["S6", "ablation"])
def test_stored_outputs_are_from_one_run_from_top_to_bottom_on_no_machine_in_particular(code, pictures):
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == pictures
    assert not re.search(r"/(home|root|work|tmp|Users|content)/", json.dumps(outputs))
    assert NOTEBOOK.metadata.accelerator == "GPU"  # what Colab offers when it is opened there


def test_readme_shows_the_pictures_of_the_stored_runs():
    curves = base64.b64decode(CODE[CURVES].outputs[-1].data["image/png"])
    assert (ROOT / "notebooks" / "curves.png").read_bytes() == curves
    pictures = re.findall(r"!\[.*\]\((notebooks/.*\.png)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert pictures == [f"notebooks/{name}.png" for name in ("curves", "ablation", "widths")]
    assert all((ROOT / picture).is_file() for picture in pictures)


def test_readme_s_example_runs(batches, monkeypatch, capsys):
    code = re.search("```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    monkeypatch.setattr("s6.utils.mnist_loaders", lambda recipe, device: (batches, batches))
    exec(code.replace("Recipe()", "Recipe(epochs=2)"), {})
    assert re.search(r"^\(\[\d\.\d+\], \[\d+\.\d+\]\)$", capsys.readouterr().out, re.MULTILINE)


def test_badges_and_notebooks_have_one_address():
    names = ("README.md", "notebooks/S6.ipynb", "notebooks/ablation.ipynb")
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in names)
    badges = re.findall(r"colab\.research\.google\.com/github/([^/]+/[^/]+)/blob/main/notebooks/(\w+)\.ipynb", text)
    fetched = re.findall(r'REPOSITORY = \\"https://github\.com/([^"\\]+)\\"', text)
    assert [name for _, name in badges] == ["S6", "S6", "ablation"] and len(fetched) == 2
    assert len({address for address, _ in badges} | set(fetched)) == 1


def requirements(path):
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return {requirement.name: requirement.specifier for requirement in map(Requirement, filter(None, lines))}


COLAB = requirements(ROOT / "tests" / "colab-constraints.txt")


def test_colab_s_versions_satisfy_the_requirements():
    wanted = requirements(ROOT / "requirements.txt")
    assert {"torch", "torchvision", "torchsummary", "matplotlib", "tqdm"} <= wanted.keys() & COLAB.keys()
    for name in wanted.keys() & COLAB.keys():
        assert str(COLAB[name]).removeprefix("==") in wanted[name]


def shortened(epochs=1):
    """The notebook's cells, for so many epochs of a thousand images."""
    sources = [source.replace("recipe = Recipe()", f"recipe = Recipe(epochs={epochs})") for source in SOURCES]
    few = "for loader in (train_loader, test_loader):\n"
    few += "    loader.images, loader.labels = loader.images[:1000], loader.labels[:1000]\n"
    sources[TRAINING] = sources[TRAINING].replace("torch.manual_seed", f"{few}torch.manual_seed")
    return sources


def run(cwd, *sources, **env):
    """Run cells in a fresh kernel that sits in `cwd`; return them, and the error that stopped them, if any."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    client = NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(cwd)}}, timeout=120)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
        patch.delenv("TQDM_DISABLE", raising=False)
        for name, value in env.items():
            patch.setenv(name, str(value))
        with contextlib.suppress(CellExecutionError):
            client.execute()
    errors = [f"{o.ename}: {o.evalue}" for cell in notebook.cells for o in cell.outputs if o.output_type == "error"]
    return notebook.cells, "".join(errors)


def trained(cells):
    """Whether the training's cell got to the end of its one epoch, showed the bar, and left nothing of it."""
    assert not [o for cell in cells for o in cell.outputs if o.get("name") == "stderr"]
    return re.search(r"epoch 1:.*%\|.*\repoch  1: train loss .*\n$", text_of(cells[TRAINING]), re.DOTALL)


def copy_modules(folder):
    folder.mkdir(exist_ok=True, parents=True)
    for name in MODULES:
        shutil.copy(ROOT / "s6" / name, folder)
    return folder


@pytest.fixture
def place(tmp_path, mnist):
    """An empty folder but for the images."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    return tmp_path


@pytest.fixture
def repository(tmp_path_factory):
    """The environment in which git takes a local repository for the notebooks' address."""
    folder = tmp_path_factory.mktemp("repository")
    copy_modules(folder / "s6")
    (folder / "studies" / "results").mkdir(parents=True)
    shutil.copy(ROOT / "studies" / "results" / "accuracy.csv", folder / "studies" / "results")
    (folder / "data").symlink_to(ROOT / "data")
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@b.c", "-C", folder]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "The project"]):
        subprocess.run([*git, *command], check=True)
    return address_is(folder)


def address_is(folder):
    address = re.search('^REPOSITORY = "(.*)"$', SOURCES[MODULES_CELL], re.MULTILINE)[1]
    key = {"GIT_CONFIG_KEY_0": f"url.file://{folder}.insteadOf", "GIT_CONFIG_VALUE_0": address}
    return {"GIT_CONFIG_COUNT": 1, **key}


def test_from_a_checkout_images_and_checkpoints_lie_in_its_root(place):
    copy_modules(place / "s6")
    (place / "notebooks").mkdir()
    cells, error = run(place / "notebooks", *shortened()[: TRAINING + 1])
    assert not error and trained(cells) and not list((place / "notebooks").iterdir())
    assert text_of(cells[MODULES_CELL]) == "The modules are in the folder ../s6\n"
    Net().load_state_dict(torch.load(place / "checkpoints" / "S6.pt", weights_only=True))
    assert text_of(run(place, SOURCES[MODULES_CELL])[0][0]) == "The modules are in the folder s6\n"


def test_flat_in_a_folder_to_the_verdict(place):
    """With too few images and epochs for the goal. Without draw.py, a sentence says what is missing."""
    cells, error = run(copy_modules(place), *shortened())
    assert trained(cells) and text_of(cells[MODULES_CELL]) == "The modules are in the folder .\n"
    assert "upload draw.py and draw.html beside model.py" in text_of(cells[HANDWRITING])
    assert re.match(r"AssertionError: \d\d?\.\d\d? % at the last epoch: the goal is more than 99.4 %", error)


def test_cloned_from_the_address_and_run_again_after_a_restart(tmp_path, mnist, repository):
    for sources in (SOURCES[:TRAINING], SOURCES[: MODULES_CELL + 1]):
        cells, error = run(tmp_path, *sources, **repository)
        assert not error and text_of(cells[MODULES_CELL]) == "The modules are in the folder S6/s6\n"


@pytest.mark.parametrize("present", [[], ["utils.py"]], ids=["neither", "one"])
def test_without_modules_or_repository_one_sentence_says_what_to_do(present, tmp_path):
    for name in present:
        shutil.copy(ROOT / "s6" / name, tmp_path)
    _, error = run(tmp_path, SOURCES[MODULES_CELL], **address_is("/nowhere"))
    assert error.startswith("AssertionError: Upload both model.py and utils.py beside this notebook")
    _, error = run(tmp_path, ABLATION_CODE[0].source, **address_is("/nowhere"))
    assert error.startswith("AssertionError: Put studies/results/accuracy.csv, s6/model.py, s6/utils.py beside this")


def test_the_modules_of_another_project_are_named(tmp_path):
    copy_modules(tmp_path)
    (tmp_path / "utils.py").write_text("def train(): pass\n")
    assert run(tmp_path, SOURCES[MODULES_CELL])[1].startswith("AssertionError: utils.py belongs to another project")


def test_handwriting_is_read(place):
    """With an untrained network, and a picture that the setting names."""
    Image.new("L", (400, 300), "white").save(place / "digit.png")
    names = "import torch\nfrom model import Net\nfrom utils import Recipe, upright\naveraged, recipe = Net(), Recipe()"
    ready = f"{SOURCES[MODULES_CELL]}\n{names}"
    copy_modules(place)
    for name in ("draw.py", "draw.html"):
        shutil.copy(ROOT / "s6" / name, place)
    cells, error = run(place, ready, *SOURCES[HANDWRITING:-1])
    assert not error and "image/png" in cells[1].outputs[0].data
    assert "<iframe srcdoc=" in cells[2].outputs[0].data["text/html"]
    named = SOURCES[HANDWRITING].replace('picture = ""', 'picture = "digit.png"')
    assert "no ink found" in run(place, ready, named)[1]


def test_a_lost_runtime_goes_on_from_a_folder_that_outlives_it(tmp_path_factory, mnist):
    """As on a mounted Drive: images and unfinished training lie there, and the second runtime has nothing else."""
    drive, *runtimes = (tmp_path_factory.mktemp(name) for name in ("drive", "first", "second"))
    (drive / "data").symlink_to(ROOT / "data")
    sources = shortened(epochs=2)[: TRAINING + 1]
    sources[SETTINGS] += f"\nfolder = Path({str(drive)!r})"
    lost = sources[TRAINING].replace("    train(\n", "    assert epoch == 1, 'lost'\n    train(\n")
    _, error = run(copy_modules(runtimes[0]), *sources[:TRAINING], lost)
    assert error == "AssertionError: lost" and (drive / "checkpoints" / "unfinished.pt").is_file()
    cells, error = run(copy_modules(runtimes[1]), *sources)
    assert not error and re.match("Continuing after epoch 1. .*\n(.*\r)?epoch  2: ", text_of(cells[TRAINING]))
    assert {path.name for path in runtimes[1].iterdir()} - {"__pycache__"} == set(MODULES)


def test_ablation_in_an_empty_folder(tmp_path, repository):
    cells, error = run(tmp_path, *(cell.source.replace("2, 10_000", "2, 500") for cell in ABLATION_CODE), **repository)
    assert not error and [text_of(cell) for cell in cells[:-1]] == [text_of(cell) for cell in ABLATION_CODE[:-1]]
    assert "image/png" in cells[-1].outputs[-1].data  # trained on few images
