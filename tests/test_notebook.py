"""The notebook's file, and the ways in: each starts a kernel of its own in a folder of its own."""

import ast
import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
import torch
from conftest import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from s6.utils import Recipe

NOTEBOOK, ABLATION = (nbformat.read(ROOT / "notebooks" / name, as_version=4) for name in ("S6.ipynb", "ablation.ipynb"))
CODE, ABLATION_CODE = ([cell for cell in each.cells if cell.cell_type == "code"] for each in (NOTEBOOK, ABLATION))
SOURCES = [cell.source for cell in CODE]
COLAB = ROOT / "tests" / "colab"


def place(start):
    """Where among the code cells the one is that has a line beginning so."""
    return next(i for i, source in enumerate(SOURCES) if re.search(f"^{re.escape(start)}", source, re.MULTILINE))


IMPORTS, SETTINGS, LOADERS, TRAINING, CURVES = map(
    place, ("from model import", "recipe =", "train_loader, test_loader", "checkpoint = ", "plot_curves")
)
REPOSITORY = re.search('^REPOSITORY = "(.*)"$', SOURCES[0], re.MULTILINE)[1]


def text_of(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


# -------------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize(("code", "pictures"), [(CODE, 4), (ABLATION_CODE, 6)], ids=["S6", "ablation"])
def test_stored_outputs_are_from_one_run_from_top_to_bottom(code, pictures):
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == pictures


def test_stored_run_reached_the_goal():
    lines = re.findall(r"^epoch +(\d+): .* test loss .* accuracy (\S+) %$", text_of(CODE[TRAINING]), re.MULTILINE)
    assert [int(epoch) for epoch, _ in lines] == list(range(1, 21)) and float(lines[-1][1]) > 99.4
    assert text_of(CODE[-1]) == "Passed: more than 99.4 % at the last epoch, 10,474 parameters, 20 epochs\n"


def test_stored_settings_are_the_recipe_s():
    assert ast.literal_eval(CODE[SETTINGS].outputs[0].data["text/plain"]) == vars(Recipe())


@pytest.mark.parametrize(
    ("notebook", "code", "fewest"),
    [(NOTEBOOK, CODE, 10), (ABLATION, ABLATION_CODE, 8)],
    ids=["S6", "ablation"],
)
def test_each_code_cell_follows_a_sentence_and_is_short(notebook, code, fewest):
    kinds = [cell.cell_type for cell in notebook.cells]
    assert not [i for i, kind in enumerate(kinds) if kind == "code" and kinds[i - 1] != "markdown"]
    assert fewest <= len(code) <= 14 and max(len(cell.source.splitlines()) for cell in code) <= 40


def test_metadata_asks_colab_for_a_gpu():
    assert NOTEBOOK.metadata.accelerator == "GPU"
    assert NOTEBOOK.metadata.colab == {"provenance": [], "gpuType": "T4", "toc_visible": True}
    assert "widgets" not in NOTEBOOK.metadata


def test_nothing_of_the_machine_it_ran_on_is_stored():
    stored = json.dumps([cell.outputs for cell in CODE + ABLATION_CODE])
    assert not re.search(r"/(home|root|work|tmp|Users|content)/", stored)


def test_readme_shows_the_curves_of_the_stored_run():
    curves = CODE[CURVES].outputs[0].data["image/png"]
    assert (ROOT / "notebooks" / "curves.png").read_bytes() == base64.b64decode(curves)
    assert "(notebooks/curves.png)" in (ROOT / "README.md").read_text()


def test_readme_shows_ladder_and_ablation():
    pictures = [cell.outputs[-1].data["image/png"] for cell in ABLATION_CODE[5:7]]
    for name, picture in zip(("ladder.png", "ablation.png"), pictures, strict=True):
        assert (ROOT / "notebooks" / name).read_bytes() == base64.b64decode(picture)
        assert f"(notebooks/{name})" in (ROOT / "README.md").read_text()


def test_readme_s_example_runs(batches, monkeypatch, capsys):
    code = re.search("```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.setattr("s6.utils.mnist_loaders", lambda *args, **options: (batches, batches))
    monkeypatch.setattr("s6.utils.get_device", lambda: torch.device("cpu"))
    exec(code.replace("Recipe()", "Recipe(epochs=2)"), {})
    assert len(re.findall(r"^\d+\.\d\d %$", capsys.readouterr().out, re.MULTILINE)) == 2


# -------------------------------------------------------------------------------------------------------- the ways in


def shortened(*sources):
    """The same cells for one epoch of a thousand images."""
    few = "\nfor loader in (train_loader, test_loader):\n    loader.images, loader.labels = loader.images[:1000], "
    sources = [source.replace("recipe = Recipe()", "recipe = Recipe(epochs=1)") for source in sources]
    if len(sources) > LOADERS:
        sources[LOADERS] += few + "loader.labels[:1000]"
    return sources


def run(cwd, *sources, **env):
    """Run cells in a fresh kernel that sits in `cwd`; return them, and the error that stopped them, if any."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    client = NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(cwd)}}, timeout=120)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, str(value))
        with contextlib.suppress(CellExecutionError):
            client.execute()
    errors = [f"{o.ename}: {o.evalue}" for cell in notebook.cells for o in cell.outputs if o.output_type == "error"]
    assert not [o for cell in notebook.cells for o in cell.outputs if o.get("name") == "stderr"]
    return notebook.cells, "".join(errors)


def trained(cells):
    """Whether the training's cell got to the end of its one epoch, and left nothing of the bar."""
    return re.search(r"(^|\r)epoch  1: train loss .*\n$", text_of(cells[TRAINING]))


def copy_modules(folder):
    folder.mkdir(exist_ok=True)
    for name in ("model.py", "utils.py"):
        shutil.copy(ROOT / "s6" / name, folder)
    return folder


@pytest.fixture
def place_of_images(tmp_path, mnist):
    """An empty folder but for the images."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    return tmp_path


@pytest.fixture
def flat(place_of_images):
    return copy_modules(place_of_images)


@pytest.fixture
def colab(tmp_path_factory):
    """The environment of a stand-in for Colab, where the notebook's repository is a local one that has the project."""
    repository = tmp_path_factory.mktemp("repository")
    copy_modules(repository / "s6")
    (repository / "studies" / "results").mkdir(parents=True)
    shutil.copy(ROOT / "studies" / "results" / "accuracy.csv", repository / "studies" / "results")
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@b.c", "-C", repository]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "The project"]):
        subprocess.run([*git, *command], check=True)
    return in_colab(repository)


def in_colab(repository, uploads=(), drive=""):
    """The stand-in's environment: git takes `repository` for the address in the notebook, the dialog for `uploads`."""
    return {
        "PYTHONPATH": COLAB, "S6_UPLOADS": os.pathsep.join(map(str, uploads)), "S6_DRIVE": drive,
        "GIT_CONFIG_COUNT": 1, "GIT_CONFIG_KEY_0": f"url.file://{repository}.insteadOf",
        "GIT_CONFIG_VALUE_0": REPOSITORY,
    }  # fmt: skip


MODULES = [ROOT / "s6" / name for name in ("model.py", "utils.py")]


@pytest.mark.parametrize("folder", ["", "notebooks"], ids=["root", "notebooks"])
def test_from_a_checkout(folder, place_of_images):
    copy_modules(place_of_images / "s6")
    (place_of_images / "notebooks").mkdir()
    cells, error = run(place_of_images / folder, *shortened(*SOURCES[: TRAINING + 1]))
    assert not error and trained(cells)
    assert (place_of_images / "checkpoints" / "S6.pt").is_file()
    assert not list((place_of_images / "notebooks").iterdir())


def test_flat_in_an_empty_folder_up_to_the_last_cell(flat):
    """Every cell, with a thousand images and one epoch: too little for the goal, and the verdict has to say so."""
    cells, error = run(flat, *shortened(*SOURCES))
    assert re.match(r"AssertionError: \d\d?\.\d\d? % at the last epoch: the goal, more than 99.4 %, is missed", error)
    assert trained(cells)


def test_in_colab_the_modules_come_from_the_repository(place_of_images, colab):
    cells, error = run(place_of_images, *shortened(*SOURCES[: TRAINING + 1]), **colab)
    assert not error and trained(cells) and not text_of(cells[0])
    assert [(place_of_images / path.name).read_bytes() for path in MODULES] == [path.read_bytes() for path in MODULES]
    assert sorted(path.name for path in place_of_images.iterdir() if not path.name.startswith("__")) == [
        "checkpoints", "data", "model.py", "utils.py",
    ], "nothing of the clone is left"  # fmt: skip


@pytest.mark.parametrize("path", ["", os.environ["PATH"]], ids=["no git", "no repository"])
def test_in_colab_without_the_repository_it_asks_for_both_files(path, place_of_images):
    cells, error = run(
        place_of_images, *shortened(*SOURCES[: TRAINING + 1]), **in_colab("/nowhere", MODULES), PATH=path
    )
    assert not error and trained(cells)
    asked = f"They could not be fetched from {REPOSITORY}. Please choose model.py and utils.py\n"
    assert text_of(cells[0]).startswith(asked)


@pytest.mark.parametrize(("chosen", "lacking"), [([], "model.py and utils.py"), (MODULES[:1], "utils.py")])
def test_in_colab_when_the_dialog_gives_too_little_it_says_so(chosen, lacking, tmp_path):
    _, error = run(tmp_path, SOURCES[0], **in_colab("/nowhere", chosen))
    assert error == (f"FileNotFoundError: Put {lacking} beside this notebook or into a folder s6, then run again")


def test_in_colab_a_second_upload_takes_effect(place_of_images, colab, tmp_path_factory):
    """Of one module only, of its old length, within the same second and under the name that the dialog gives it."""
    mended = tmp_path_factory.mktemp("mended") / "model.py"
    mended.write_text((ROOT / "s6" / "model.py").read_text().replace("Classify 28", "Mended   28"))
    again = "from google.colab import files\nfiles.upload()"
    first = shortened(*SOURCES[: TRAINING + 1])
    cells, error = run(place_of_images, *first, again, *first, "print(Net.__doc__)", **colab | {"S6_UPLOADS": mended})
    assert not error
    assert "Saving model.py to model (1).py" in text_of(cells[len(first)])
    assert text_of(cells[-1]).startswith("Mended")
    assert trained(cells[len(first) + 1 :]) and not (place_of_images / "model (1).py").exists()
    assert (place_of_images / "model.py").read_bytes() == mended.read_bytes()


def test_in_colab_a_lost_runtime_goes_on_from_the_drive(tmp_path_factory, colab, mnist):
    """Images and checkpoint lie on the Drive; the second runtime has nothing else."""
    drive, *runtimes = (tmp_path_factory.mktemp(name) for name in ("drive", "first", "second"))
    (drive / "MyDrive" / "S6").mkdir(parents=True)
    (drive / "MyDrive" / "S6" / "data").symlink_to(ROOT / "data")
    sources = shortened(*SOURCES[: TRAINING + 1])
    sources[SETTINGS] = sources[SETTINGS].replace("DRIVE = False", "DRIVE = True").replace("epochs=1", "epochs=2")
    lost = sources[TRAINING].replace("checkpoint.save(", "assert epoch == 1, 'lost'; checkpoint.save(")
    _, error = run(runtimes[0], *sources[:TRAINING], lost, **colab | {"S6_DRIVE": drive})
    assert error == "AssertionError: lost"
    cells, error = run(runtimes[1], *sources, **colab | {"S6_DRIVE": drive})
    assert not error and "Going on after epoch 1, kept in " in text_of(cells[TRAINING])
    assert [path.name for path in (drive / "MyDrive" / "S6" / "checkpoints").iterdir()] == ["S6.pt"]
    assert "data" not in {path.name for path in runtimes[1].iterdir()}


@pytest.mark.parametrize("way", ["beside", "fetched", "asked for"])
def test_ablation_in_an_empty_folder(way, tmp_path, colab):
    """With the rows beside it, and in Colab, which fetches them or asks for them: the same outputs as those stored."""
    rows = ROOT / "studies" / "results" / "accuracy.csv"
    if way == "beside":
        shutil.copy(rows, tmp_path)
    sources = [cell.source for cell in ABLATION_CODE]
    cells, error = run(tmp_path, *sources, **in_colab("/nowhere", [rows]) if way == "asked for" else colab)
    assert not error
    assert ("Please choose accuracy.csv" in text_of(cells[0])) == (way == "asked for")
    assert [text_of(cell) for cell in cells[1:]] == [text_of(cell) for cell in ABLATION_CODE[1:]]


def test_settings_changed_before_the_training_alone_is_run_again(flat):
    """The loader takes on the new ones, too: what a checkpoint says of itself is what was done."""
    sources = shortened(*SOURCES[: TRAINING + 1])
    change = sources[SETTINGS].replace("epochs=1", "epochs=1, batch_size=500, degrees=0.0")
    tell = "print(len(train_loader), settings['batch_size'], train_loader.augment.__self__.degrees)"
    cells, error = run(flat, *sources, change, sources[TRAINING], tell)
    assert not error and text_of(cells[-1]) == "2 500 0.0\n"


def test_ablation_follows_the_rows(tmp_path):
    """So that its stored outputs fail under nbval when a row is edited."""
    rows = (ROOT / "studies" / "results" / "accuracy.csv").read_text().splitlines(keepends=True)
    first = next(i for i, row in enumerate(rows) if row.startswith("ours,60k/test,"))
    (tmp_path / "accuracy.csv").write_text("".join(rows[:first] + rows[first + 1 :]))
    cells, error = run(tmp_path, *(cell.source for cell in ABLATION_CODE[:3]))
    assert not error and text_of(cells[2]) != text_of(ABLATION_CODE[2])


def test_ablation_without_the_rows_says_what_is_missing(tmp_path):
    _, error = run(tmp_path, ABLATION_CODE[0].source)
    assert error.startswith("FileNotFoundError: Put accuracy.csv beside this notebook or into studies/results")


def test_without_the_modules_and_without_colab_it_says_what_is_missing(tmp_path):
    _, error = run(tmp_path, SOURCES[0])
    assert error.startswith("FileNotFoundError: Put model.py and utils.py beside this notebook or into a folder s6")


@pytest.mark.parametrize(
    ("line", "said"),
    [("def broken(:", "SyntaxError"), ("import not_there", "ModuleNotFoundError: No module named 'not_there'")],
)
def test_an_error_inside_a_module_is_shown_as_it_is(line, said, flat):
    with (flat / "model.py").open("a") as file:
        file.write(f"{line}\n")
    cells, error = run(flat, *SOURCES[: IMPORTS + 1], **in_colab("/nowhere", MODULES))
    assert error.startswith(said) and "Please choose" not in text_of(cells[0])
    assert line in (flat / "model.py").read_text(), "nothing was uploaded over it"


def test_running_the_cell_again_takes_the_changed_module(flat):
    change = "Path('model.py').write_text(Path('model.py').read_text() + '\\nANSWER = 42\\n')"
    imports = SOURCES[: IMPORTS + 1]
    cells, error = run(flat, *imports, change, *imports, "import model; print(model.ANSWER)")
    assert not error and text_of(cells[-1]) == "42\n"


IMPORT = """
import sys, torch
state = torch.get_rng_state()
import {}
assert torch.equal(state, torch.get_rng_state())
assert not {{"torchvision", "s6", "{}"}} & set(sys.modules)
"""


@pytest.mark.parametrize(("module", "other"), [("model", "utils"), ("utils", "model")])
def test_importing_a_module_does_nothing_and_does_not_need_the_other(module, other):
    command = [sys.executable, "-c", IMPORT.format(module, other)]
    done = subprocess.run(command, cwd=ROOT / "s6", capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
