"""A training that was interrupted ends as one that was not. A file that does not fit is put aside."""

import io
import itertools
import multiprocessing
import os
import shutil
import signal
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_images, run_training_cell

from s6.model import Net
from s6.utils import Loader, Recipe, load_checkpoint, save_checkpoint

RECIPE, OTHER = Recipe(epochs=3, batch_size=16), Recipe(epochs=3, batch_size=16, lr=0.1)
LONG = {"recipe": Recipe(epochs=3, batch_size=40), "count": 400}


def training(folder, criterion=F.nll_loss, recipe=RECIPE, net=Net, count=70):
    """Run the notebook's cell on random images; return the weights and the histories."""
    images, labels = random_images(count)
    train_loader = Loader(images, labels, recipe.batch_size, recipe.seed, recipe.augment)
    loaders = train_loader, Loader(images, labels, recipe.batch_size)
    names = {"folder": folder, "recipe": recipe, "F": SimpleNamespace(nll_loss=criterion)}
    names |= {"mnist_loaders": lambda *_: loaders, "Net": net}
    run_training_cell(names)
    return {name: part.state_dict() for name, part in names["parts"].items()}, names["histories"]


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def after(calls, action):
    """A criterion that acts when it is called once more: it is called for each batch, and once to test."""
    counter = itertools.count()

    def criterion(outputs, labels):
        if next(counter) == calls:
            action()
        return F.nll_loss(outputs, labels)

    return criterion


def interrupt():
    raise KeyboardInterrupt


def interrupted(folder, calls, **options):
    with pytest.raises(KeyboardInterrupt):
        training(folder, after(calls, interrupt), **options)
    return folder / "checkpoints" / "unfinished.pt"


assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)


def assert_finished(folder):
    """Only the trained weights are left in the folder."""
    assert [path.name for path in folder.rglob("*.*")] == ["S6.pt"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return training(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("calls", [3, 5, 6, 11, 14])  # an epoch is five batches and the test
def test_interrupted_in_training_or_testing_it_ends_as_one_never_interrupted(calls, whole, tmp_path):
    assert interrupted(tmp_path, calls).exists() == (calls > 5)
    assert_same(training(tmp_path), whole)
    assert_finished(tmp_path)


def train_until_killed(folder, calls):
    """In mid-epoch, or where `calls` is None between writing the file and renaming it."""
    torch.set_num_threads(1)  # as here: with more, sums are added up in another order
    if calls is None:
        Path.replace = kill
    training(folder, after(calls, kill), **LONG)


def test_killed_it_ends_as_one_never_killed(tmp_path):
    for calls in (16, None):  # an epoch is ten batches and the test: in its middle, and where the file is renamed
        process = multiprocessing.get_context("spawn").Process(target=train_until_killed, args=(tmp_path, calls))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    killed = training(tmp_path, **LONG)
    assert_finished(tmp_path)
    assert_same(killed, training(tmp_path / "whole", **LONG))


def flipped(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        tensors = [info for info in archive.infolist() if "/data/" in info.filename]
    place = max(tensors, key=lambda info: info.file_size).header_offset + 200
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


def other_content(_):
    torch.save(Net().state_dict(), content := io.BytesIO())
    return content.getvalue()


def assert_put_aside(path, why, whole, capsys):
    content = path.read_bytes()
    capsys.readouterr()  # what was said up to here
    assert_same(training(path.parent.parent), whole)
    assert path.with_suffix(".old").read_bytes() == content and not path.exists()
    said, *epochs = capsys.readouterr().out.splitlines()
    assert why in said and str(path) in said and len(epochs) == 3


DAMAGED = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "one bit flipped": flipped,
    "another file": other_content,
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_put_aside(kind, whole, tmp_path, capsys):
    path = interrupted(tmp_path, 6)  # after an epoch of five batches and a test
    path.write_bytes(DAMAGED[kind](path.read_bytes()))
    assert_put_aside(path, "because of", whole, capsys)


OTHERS = {"recipe": {"recipe": OTHER}, "activation": {"net": lambda: Net(activation=F.relu)}}


@pytest.mark.parametrize("why", OTHERS)
def test_the_file_of_another_recipe_or_network_is_put_aside(why, whole, tmp_path, capsys):
    assert_put_aside(interrupted(tmp_path, 6, **OTHERS[why]), "another recipe or network", whole, capsys)


@pytest.mark.parametrize("folder", ["/proc/s6", "file"])
def test_a_folder_that_cannot_be_written_costs_a_warning(folder, whole, tmp_path):
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    with pytest.warns(UserWarning, match="could not be written"):
        assert_same(training(tmp_path / folder), whole)


@pytest.mark.parametrize("calls", [3, 5, 8, 17])  # in the first epoch, its test, the second, the last test
def test_a_folder_that_vanishes_costs_a_warning_not_the_training(calls, whole, tmp_path):
    """As a Google Drive does that loses its connection: nothing can be made in its place."""

    def vanish():
        shutil.rmtree(tmp_path / "drive")
        (tmp_path / "drive").write_text("Transport endpoint is not connected", encoding="utf-8")

    (tmp_path / "drive").mkdir()
    with pytest.warns(UserWarning, match="could not be written"):
        assert_same(training(tmp_path / "drive", after(calls, vanish)), whole)


def test_whatever_can_be_saved_can_be_loaded(tmp_path):
    """A history may hold NumPy numbers and tensors, a seed may be NumPy's."""
    path, recipe = tmp_path / "unfinished.pt", Recipe(seed=np.int64(1))
    save_checkpoint(path, recipe, [[np.float64(0.5)], [torch.tensor(99.0)]], model=Net())
    histories = [[], []]
    assert load_checkpoint(path, recipe, histories, model=Net()) == 1 and histories == [[0.5], [99.0]]
