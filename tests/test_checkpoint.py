"""Trainings that are killed, interrupted or cannot be saved, and files that are no checkpoints."""

import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
import zipfile

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from s6.model import Net
from s6.utils import Checkpoint, Recipe, TensorLoader, classify, load_averaged, predict, set_seed, test, train

RECIPE = Recipe(epochs=3, batch_size=16)


class Training:
    """What the notebook makes, on the tests' 70 images, with dropout, which draws from torch's own generator."""

    def __init__(self, path, batches, net=Net, recipe=RECIPE, **settings):
        set_seed(0)
        generator = torch.Generator().manual_seed(0)
        self.loader = TensorLoader(batches.images, batches.labels, recipe.batch_size, generator, recipe.augment)
        self.recipe, self.model = recipe, net(dropout=0.1)
        self.optimizer, self.scheduler, self.averaged = recipe.prepare(self.model, len(self.loader))
        self.histories = [], [], [], []
        self.checkpoint = Checkpoint(
            path, vars(recipe) | settings, self.histories, generator,
            model=self.model, averaged=self.averaged, optimizer=self.optimizer, scheduler=self.scheduler,
        )  # fmt: skip

    def run(self, epochs=None):
        for epoch in range(len(self.histories[0]) + 1, (epochs or self.recipe.epochs) + 1):
            train(
                self.model, "cpu", self.loader, self.optimizer, F.nll_loss, *self.histories[:2],
                scheduler=self.scheduler, averaged=self.averaged, disable=True,
            )  # fmt: skip
            test(self.averaged, "cpu", self.loader, F.nll_loss, *self.histories[2:])
            self.checkpoint.save(finished=epoch == self.recipe.epochs)
        return self


def tensors(path):
    """Every tensor and number in a checkpoint, by its place."""

    def walk(place, value):
        if isinstance(value, dict):
            return [leaf for key in value for leaf in walk(f"{place}/{key}", value[key])]
        if isinstance(value, (list, tuple)):
            return [leaf for i, each in enumerate(value) for leaf in walk(f"{place}/{i}", each)]
        return [(place, value)]

    return dict(walk("", torch.load(path, weights_only=True)))


def assert_same(path, other):
    a, b = tensors(path), tensors(other)
    assert a.keys() == b.keys() and len(a) > 100
    for place, value in a.items():
        equal = torch.equal(value, b[place]) if isinstance(value, torch.Tensor) else value == b[place]
        assert equal, f"{place} differs"


# ---------------------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("after", [1, 2])
def test_a_training_taken_up_ends_as_one_never_cut_short(after, batches, tmp_path, capsys):
    whole = Training(tmp_path / "whole.pt", batches).run()
    Training(tmp_path / "cut.pt", batches).run(after)
    assert {path.name for path in tmp_path.iterdir()} == {"whole.pt", "cut-unfinished.pt"}
    torch.rand(7)  # whatever the runtime did in between
    second = Training(tmp_path / "cut.pt", batches)
    second.checkpoint.resume()
    assert f"Going on after epoch {after}, kept in " in capsys.readouterr().out
    assert second.run().histories == whole.histories
    assert {path.name for path in tmp_path.iterdir()} == {"whole.pt", "cut.pt"}
    assert_same(tmp_path / "whole.pt", tmp_path / "cut.pt")


def test_a_finished_training_is_not_taken_up(batches, tmp_path, capsys):
    Training(tmp_path / "S6.pt", batches).run()
    again = Training(tmp_path / "S6.pt", batches)
    again.checkpoint.resume()
    assert again.histories == ([], [], [], []) and not capsys.readouterr().out
    (tmp_path / "S6.pt").rename(tmp_path / "S6-unfinished.pt")
    again.checkpoint.resume()
    assert again.histories == ([], [], [], [])
    assert "Training starts anew: S6-unfinished.pt is a finished training." in capsys.readouterr().out


NOTEBOOK = nbformat.read(ROOT / "notebooks" / "S6.ipynb", as_version=4)
CELLS = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"]
TRAINING = next(i for i, source in enumerate(CELLS) if "checkpoint.resume()" in source)


def script(epochs, images=1000):
    """The notebook's own cells, up to the training, as a program of `epochs` short epochs."""
    cells = [source.replace("recipe = Recipe()", f"recipe = Recipe(epochs={epochs})") for source in CELLS]
    few = f"for loader in (train_loader, test_loader):\n    loader.images = loader.images[:{images}]\n"
    loaders = next(i for i, source in enumerate(CELLS) if "train_loader, test_loader = " in source)
    cells[loaders] += f"\n{few}    loader.labels = loader.labels[:{images}]"
    return "\n".join(cells[: TRAINING + 1])


def start(folder, program):
    return subprocess.Popen(
        [sys.executable, "-uc", program], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture
def flat(tmp_path, mnist):
    """A folder with the modules and the images; another folder of the kind lies in `other`."""
    for folder in (tmp_path, tmp_path / "other"):
        folder.mkdir(exist_ok=True)
        (folder / "data").symlink_to(ROOT / "data")
        for name in ("model.py", "utils.py"):
            (folder / name).write_bytes((ROOT / "s6" / name).read_bytes())
    return tmp_path


def test_killed_ten_times_the_notebook_s_training_ends_as_one_never_killed(flat):
    program, chance = script(epochs=30), random.Random(0)
    whole = start(flat / "other", program)
    assert "epoch 30:" in whole.communicate(timeout=600)[0]
    kills, resumed = 0, set()
    while kills < 10:
        process = start(flat, program)
        for line in process.stdout:  # to the first bar; for the epochs done before there is none
            if said := line.startswith("Going on after epoch") and line.split()[4].rstrip(","):
                resumed.add(int(said))
            if "batch/s" in line:
                break
        time.sleep(chance.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was over before it was killed: let it train longer"
        kills += 1
    last = start(flat, program)
    output = last.communicate(timeout=600)[0]
    assert last.returncode == 0 and "epoch 30:" in output and "starts anew" not in output
    assert len(resumed) >= 3, f"killed too early to show anything: it went on after {resumed}"
    assert_same(flat / "checkpoints" / "S6.pt", flat / "other" / "checkpoints" / "S6.pt")


def test_interrupted_while_it_trains_or_tests_the_histories_are_of_equal_length(flat, monkeypatch):
    """By KeyboardInterrupt, as "Interrupt execution" raises it; then every later cell, then the training again."""
    program = script(epochs=3).replace("import utils\n", "import utils\nexec(INTERRUPT)\n")
    interrupt = """
import json
calls, real = 0, utils.{name}
def interrupted(*args, **options):
    global calls
    calls += 1
    if calls == {call}:
        raise KeyboardInterrupt
    return real(*args, **options)
utils.{name} = interrupted
"""
    training, rest = CELLS[TRAINING], CELLS[TRAINING + 1 : -1]
    for name, call, done in (("train", 1, 0), ("test", 1, 0), ("test", 2, 1), ("train", 3, 2)):
        code = f"INTERRUPT = {interrupt.format(name=name, call=call)!r}\n"
        code += program.removesuffix(training)
        code += f"try:\n    exec({training!r})\nexcept KeyboardInterrupt:\n    pass\n"
        code += "print(json.dumps(['lengths', *map(len, histories)]))\n" + "\n".join(rest)
        code += (
            f"\ntry:\n    exec({CELLS[-1]!r})\nexcept AssertionError as error:\n    print(error)\nexec({training!r})"
        )
        output, _ = start(flat, code).communicate(timeout=120)
        lines = output.splitlines()
        assert json.dumps(["lengths", *[done] * 4]) in lines, output
        assert f"stopped after {done} of 3 epochs: train on" in lines
        assert any(line.startswith(f"Going on after epoch {done},") for line in lines) == (done > 0), output
        assert lines[-1].split("\r")[-1].startswith("epoch  3: train loss"), output


# ------------------------------------------------------------------------------------------------- what does not fit


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


def pickled(value):
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def flipped(content):
    """One bit of the largest entry, the weights among them, changed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    place = largest.header_offset + 200
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


def zipped(**files):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return content.getvalue()


FILES = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "all but a byte": lambda content: content[:-1],
    "one bit changed": flipped,
    "a text": lambda content: b"epoch 3: 99.4 %\n" * 1000,
    "a zip file": lambda content: zipped(readme="nothing"),
    "a tensor": lambda content: pickled(torch.ones(3)),
    "other weights": lambda content: pickled(Net().state_dict()),
    "half the state": lambda content: pickled({"settings": vars(RECIPE), "parts": {}}),
    "settings of tensors": lambda content: pickled(
        torch.load(io.BytesIO(content), weights_only=True) | {"settings": {"lr": torch.ones(3)}}
    ),
    "histories of unequal length": lambda content: pickled(
        torch.load(io.BytesIO(content), weights_only=True) | {"histories": [[1.0], [], [], []]}
    ),
    "malicious": lambda content: pickled({"settings": Malicious()}),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_no_checkpoint_is_kept_and_training_starts_anew(kind, batches, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    whole = Training(tmp_path / "whole.pt", batches).run()
    Training(tmp_path / "S6.pt", batches).run(1)
    unfinished = tmp_path / "S6-unfinished.pt"
    content = FILES[kind](unfinished.read_bytes())
    unfinished.write_bytes(content)
    training = Training(tmp_path / "S6.pt", batches)
    training.checkpoint.resume()
    said = "S6-unfinished.pt is damaged, or no checkpoint of this project"
    assert (
        capsys.readouterr().out == f"Training starts anew: {said}. The file is kept as {tmp_path / 'S6-unused-1.pt'}.\n"
    )
    assert (tmp_path / "S6-unused-1.pt").read_bytes() == content and not unfinished.exists()
    assert training.run().histories == whole.histories
    assert not (tmp_path / "attacked").exists(), "nothing in the file was run"
    (tmp_path / "S6.pt").write_bytes(content)
    with pytest.raises(ValueError, match="^S6.pt is damaged, or no checkpoint of this project$"):
        load_averaged(Net(), tmp_path / "S6.pt")


class WithoutBias(Net):
    def __init__(self, dropout):
        super().__init__(dropout)
        self.layers[0][0] = torch.nn.Conv2d(1, 8, 3, bias=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"recipe": Recipe(epochs=3, batch_size=16, lr=0.1)}, "belongs to other settings (lr was 0.2, is 0.1)"),
        ({"seed": 2}, "belongs to other settings (seed was None, is 2)"),
        ({"net": WithoutBias}, "belongs to another network or training"),
    ],
)
def test_another_training_is_kept_and_this_one_starts_from_its_own_start(change, said, batches, tmp_path, capsys):
    whole = Training(tmp_path / "whole.pt", batches, **change).run()
    for n in (1, 2):
        Training(tmp_path / "S6.pt", batches).run(1)
        training = Training(tmp_path / "S6.pt", batches, **change)
        training.checkpoint.resume()
        kept = tmp_path / f"S6-unused-{n}.pt"
        expected = f"Training starts anew: S6-unfinished.pt {said}. The file is kept as {kept}.\n"
        assert capsys.readouterr().out == expected and kept.exists()
        assert training.run().histories == whole.histories, "nothing of the other training was left behind"


# ----------------------------------------------------------------------------------------------- where none can be kept


def test_a_full_disk_costs_a_warning_and_leaves_nothing_half_written(batches, tmp_path):
    """A limit on the size of files, after which a write stops half-way, as on a full disk."""
    training = Training(tmp_path / "S6.pt", batches).run(1)
    before = (tmp_path / "S6-unfinished.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            training.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [str(w.message) for w in caught] == ["the training goes on, but is not saved: [Errno 27] File too large"]
    assert len(training.histories[3]) == 3
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"S6-unfinished.pt": before}


@pytest.mark.parametrize("folder", ["/proc/s6", "file"])
def test_a_folder_that_cannot_be_written_costs_a_warning(folder, batches, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(UserWarning, match="the training goes on, but is not saved: ") as caught:
        training = Training(tmp_path / folder / "S6.pt", batches)
        training.checkpoint.resume()
        training.run()
    assert len(caught) == 1 and len(training.histories[3]) == 3


# --------------------------------------------------------------------------------------------------- using the result


def test_the_averaged_weights_come_back_and_classify_as_the_training_tested(batches, tmp_path):
    training = Training(tmp_path / "S6.pt", batches).run()
    network = Net()
    model = load_averaged(network, tmp_path / "S6.pt")
    labels, probabilities = classify(model, batches.images)
    outputs, _ = predict(training.averaged, "cpu", TensorLoader(batches.images, batches.labels, 250))
    assert torch.equal(probabilities, outputs.exp()) and torch.equal(labels, outputs.argmax(1))
    assert labels.dtype == torch.int64 and torch.allclose(probabilities.sum(1), torch.ones(70))
    assert not model.training and model is not network
    for same in (batches.images.squeeze(1), batches.images.numpy()):
        assert torch.equal(classify(model, same)[1], probabilities)


def test_readme_s_lines_classify(batches, tmp_path, monkeypatch):
    code = re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    training = Training(tmp_path / "checkpoints" / "S6.pt", batches).run()
    monkeypatch.chdir(tmp_path)
    names = {"images": batches.images}
    exec(code, names)
    assert torch.equal(names["probabilities"], classify(training.averaged, batches.images)[1])


def test_a_recipe_of_numpy_s_numbers_comes_back(batches, tmp_path):
    """As a loop over `np.linspace` makes it; of a file `weights_only` reads plain numbers alone."""
    recipe = Recipe(np.int64(1), batch_size=np.int64(16), lr=np.linspace(0.1, 0.2, 2)[0], average=np.float32(0.5))
    Training(tmp_path / "S6.pt", batches, recipe=recipe).run()
    assert isinstance(load_averaged(Net(), tmp_path / "S6.pt"), Net)


def test_weights_of_another_network_are_refused(batches, tmp_path):
    Training(tmp_path / "S6.pt", batches).run()
    with pytest.raises(ValueError, match="^S6.pt belongs to another network$"):
        load_averaged(WithoutBias(0), tmp_path / "S6.pt")
    with pytest.raises(FileNotFoundError, match="missing.pt"):
        load_averaged(Net(), tmp_path / "missing.pt")
