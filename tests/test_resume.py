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


def training(folder, criterion=F.nll_loss, recipe=RECIPE, net=Net):
    """Run the notebook's cell on random images; return the weights and the histories."""
    images, labels = random_images(70)
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
def test_interrupted_in_training_or_testing_it_ends_as_one_never_interrupted(calls, whole, tmp_path, capsys):
    interrupted(tmp_path, calls)
    assert_same(training(tmp_path), whole)
    assert (f"Continuing after epoch {calls // 6}" in capsys.readouterr().out) == (calls > 5)
    assert_finished(tmp_path)


def train_until_killed(folder, calls):
    torch.set_num_threads(1)  # as here: with more, sums are added up in another order
    if calls is None:  # between writing the file and renaming it
        Path.replace = kill
    training(folder, after(calls, kill))


def test_killed_it_ends_as_one_never_killed(whole, tmp_path):
    for calls in (8, None):  # in the middle of the second epoch, and at its end
        process = multiprocessing.get_context("spawn").Process(target=train_until_killed, args=(tmp_path, calls))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert_same(training(tmp_path), whole)
    assert_finished(tmp_path)


def flipped(content):
    """One bit of the largest tensor in a file."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        place = max(archive.infolist(), key=lambda info: info.file_size).header_offset + 200
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


def of_another_kind(_):
    torch.save(Net().state_dict(), content := io.BytesIO())
    return content.getvalue()


UNFIT = {
    "half": lambda content: content[: len(content) // 2],
    "one bit flipped": flipped,
    "another file": of_another_kind,
    "another recipe": {"recipe": OTHER},
    "another activation": {"net": lambda: Net(activation=F.relu)},
}


@pytest.mark.parametrize("kind", UNFIT)
def test_a_file_that_is_damaged_or_of_another_recipe_or_network_is_put_aside(kind, whole, tmp_path, capsys):
    other = UNFIT[kind] if isinstance(UNFIT[kind], dict) else {}
    path = interrupted(tmp_path, 6, **other)  # after an epoch of five batches and a test
    if not other:
        path.write_bytes(UNFIT[kind](path.read_bytes()))
    content = path.read_bytes()
    assert_same(training(tmp_path), whole)
    assert path.with_suffix(".old").read_bytes() == content and not path.exists()
    said = capsys.readouterr().out.splitlines()[-4]  # before the line of each epoch
    assert said.startswith(f"Starting at epoch 1. {path} cannot be used: ") and said.endswith("unfinished.old")
    assert ("another recipe or network" in said) == bool(other)


@pytest.mark.parametrize("calls", [0, 5, 17])  # before the training, in the first test, in the last
def test_a_folder_that_cannot_be_written_costs_a_warning_not_the_training(calls, whole, tmp_path):
    """As a Google Drive that loses its connection: nothing can be made in its place."""
    drive = tmp_path / "drive"

    def vanish():
        shutil.rmtree(drive, ignore_errors=True)
        drive.write_text("Transport endpoint is not connected", encoding="utf-8")

    if calls:
        drive.mkdir()
    else:
        vanish()
    with pytest.warns(UserWarning, match="could not be written"):
        assert_same(training(drive, after(calls, vanish if calls else int)), whole)


def test_a_drive_that_fails_while_the_file_is_read_is_an_error_and_the_file_stays(tmp_path, monkeypatch):
    path = interrupted(tmp_path, 6)
    content = path.read_bytes()

    def fail(_):
        raise OSError("Transport endpoint is not connected")

    with monkeypatch.context() as patch:
        patch.setattr("zipfile.ZipFile", fail)
        with pytest.raises(OSError, match="endpoint"):
            training(tmp_path)
    assert path.read_bytes() == content


def test_whatever_can_be_saved_can_be_loaded(tmp_path):
    """A history may hold NumPy numbers and tensors, a seed may be NumPy's."""
    path, recipe = tmp_path / "unfinished.pt", Recipe(seed=np.int64(1))
    save_checkpoint(path, recipe, [[np.float64(0.5)], [torch.tensor(99.0)]], model=Net())
    histories = [[], []]
    assert load_checkpoint(path, recipe, histories, model=Net()) == 1 and histories == [[0.5], [99.0]]
