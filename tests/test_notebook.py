"""The notebook's file, and the ways in: each starts a kernel of its own in a folder of its own."""

import ast
import base64
import contextlib
import json
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


SETTINGS, LOADERS, TRAINING, CURVES = map(place, ("recipe =", "train_loader, test_loader", "for epoch", "plot_curves"))


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
    return notebook.cells, "".join(errors)


@pytest.fixture
def flat(tmp_path):
    for name in ("model.py", "utils.py"):
        shutil.copy(ROOT / "s6" / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize("folder", [ROOT, ROOT / "notebooks"], ids=["root", "notebooks"])
def test_from_a_checkout(folder, mnist):
    cells, error = run(folder, *SOURCES[: LOADERS + 1])
    assert not error
    assert text_of(cells[LOADERS]) == "60,000 training images, 10,000 test images\n"
    assert not (ROOT / "notebooks" / "data").exists()


def test_flat_in_an_empty_folder_up_to_the_last_cell(flat, mnist):
    """Every cell, with a thousand images and one epoch: too little for the goal, and the verdict has to say so."""
    (flat / "data").symlink_to(ROOT / "data")
    sources = SOURCES.copy()
    sources[SETTINGS] = sources[SETTINGS].replace("recipe = Recipe()", "recipe = Recipe(epochs=1)")
    sources[LOADERS] += (
        "\ntrain_loader.images, train_loader.labels = train_loader.images[:1000], train_loader.labels[:1000]"
    )
    cells, error = run(flat, *sources)
    assert re.match(r"AssertionError: \d\d?\.\d\d % at the last epoch: the goal, more than 99.4 %, is missed", error)
    assert text_of(cells[TRAINING]).split("\r")[-1].startswith("epoch  1: train loss"), (
        "the bar is gone, the line is there"
    )


def test_in_colab_it_asks_for_both_files(tmp_path):
    """The stand-in uploads what `S6_UPLOADS` holds."""
    cells, error = run(tmp_path, *SOURCES[: SETTINGS + 1], PYTHONPATH=COLAB, S6_UPLOADS=ROOT / "s6")
    assert not error
    assert re.findall("Please choose .*", text_of(cells[0])) == ["Please choose model.py", "Please choose utils.py"]
    assert (tmp_path / "model.py").read_bytes() == (ROOT / "s6" / "model.py").read_bytes()
    assert "'epochs': 20" in cells[SETTINGS].outputs[0].data["text/plain"]


@pytest.mark.parametrize("way", ["beside", "asked for"])
def test_ablation_in_an_empty_folder(way, tmp_path):
    """With the rows beside it, and in Colab, where it asks for them: the same outputs as those stored."""
    if way == "beside":
        shutil.copy(ROOT / "studies" / "results" / "accuracy.csv", tmp_path)
    sources = [cell.source for cell in ABLATION_CODE]
    cells, error = run(tmp_path, *sources, PYTHONPATH=COLAB, S6_UPLOADS=ROOT / "studies" / "results")
    assert not error
    assert ("Please choose accuracy.csv" in text_of(cells[0])) == (way == "asked for")
    assert [text_of(cell) for cell in cells[1:]] == [text_of(cell) for cell in ABLATION_CODE[1:]]


def test_ablation_follows_the_rows(tmp_path):
    """So that its stored outputs fail under nbval when a row is edited."""
    rows = (ROOT / "studies" / "results" / "accuracy.csv").read_text().splitlines(keepends=True)
    first = next(i for i, row in enumerate(rows) if row.startswith("ours,60k/test,"))
    (tmp_path / "accuracy.csv").write_text("".join(rows[:first] + rows[first + 1 :]))
    cells, error = run(tmp_path, *(cell.source for cell in ABLATION_CODE[:3]))
    assert not error and text_of(cells[2]) != text_of(ABLATION_CODE[2])


def test_ablation_without_the_rows_says_what_is_missing(tmp_path):
    _, error = run(tmp_path, ABLATION_CODE[0].source)
    assert error.startswith("FileNotFoundError: accuracy.csv lies neither beside this notebook nor in")


def test_without_the_modules_and_without_colab_it_says_what_is_missing(tmp_path):
    _, error = run(tmp_path, SOURCES[0])
    assert error.startswith("FileNotFoundError: model.py and utils.py lie neither beside this notebook nor in")


@pytest.mark.parametrize(
    ("line", "said"),
    [("def broken(:", "SyntaxError"), ("import not_there", "ModuleNotFoundError: No module named 'not_there'")],
)
def test_an_error_inside_a_module_is_shown_as_it_is(line, said, flat):
    with (flat / "model.py").open("a") as file:
        file.write(f"{line}\n")
    cells, error = run(flat, SOURCES[0], PYTHONPATH=COLAB, S6_UPLOADS=ROOT / "s6")
    assert error.startswith(said) and "Please choose" not in text_of(cells[0])
    assert line in (flat / "model.py").read_text(), "nothing was uploaded over it"


def test_running_the_cell_again_takes_the_changed_module(flat):
    change = "Path('model.py').write_text(Path('model.py').read_text() + '\\nANSWER = 42\\n')"
    cells, error = run(flat, SOURCES[0], change, SOURCES[0], "import model; print(model.ANSWER)")
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
