"""Trainings cut short in every way end as one that was not; a file that does not fit is as good as none."""

import io
import itertools
import multiprocessing
import os
import signal
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import random_images, run_training_cell

from s6.model import Net
from s6.utils import Loader, Recipe

RECIPE, OTHER = Recipe(epochs=3, batch_size=16), Recipe(epochs=3, batch_size=16, lr=0.1)
LONG = {"recipe": Recipe(epochs=3, batch_size=40), "count": 400}


def training(folder, criterion=F.nll_loss, recipe=RECIPE, net=Net, count=70, names=None):
    """Run the notebook's cell on random images, with dropout; return all that it leaves behind. Its names: `names`."""
    images, labels = random_images(count)
    train_loader = Loader(images, labels, recipe.batch_size, recipe.seed, recipe.augment)
    loaders = train_loader, Loader(images, labels, recipe.batch_size)
    names = {} if names is None else names
    names |= {"folder": folder, "recipe": recipe, "F": SimpleNamespace(nll_loss=criterion)}
    names |= {"mnist_loaders": lambda *_: loaders, "Net": lambda: net(dropout=0.1)}
    run_training_cell(names)
    return {k: part.state_dict() for k, part in names["parts"].items()}, names["histories"], torch.get_rng_state()


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def after(calls, error=None):
    """A criterion that raises, or kills its process, when it is called once more: for each batch, and once to test."""
    counter = itertools.count()

    def criterion(outputs, labels):
        if next(counter) == calls:
            if error is None:
                kill()
            raise error
        return F.nll_loss(outputs, labels)

    return criterion


def cut_short(folder, calls, error=KeyboardInterrupt, **options):
    with pytest.raises(error):
        training(folder, after(calls, error), **options)
    return folder / "checkpoints" / "unfinished.pt"


assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return training(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize(("calls", "done"), [(3, 0), (5, 0), (6, 1), (11, 1), (14, 2)])
def test_interrupted_in_training_or_testing_it_ends_as_one_never_interrupted(calls, done, error, whole, tmp_path):
    cut_short(tmp_path, calls, error, names=(names := {}))
    assert [len(history) for history in names["histories"]] == [done] * 4
    assert_same(training(tmp_path), whole)
    assert not list(tmp_path.rglob("*.*"))


def train_until_killed(folder, calls):
    """In mid-epoch, or where `calls` is None between writing the file and renaming it."""
    torch.set_num_threads(1)  # as here: with more, sums are added up in another order
    if calls is None:
        Path.replace = kill
    training(folder, after(calls), **LONG)


def test_killed_it_ends_as_one_never_killed(tmp_path):
    for calls in (16, None):  # an epoch is ten batches and the test: in its middle, and where the file is renamed
        process = multiprocessing.get_context("spawn").Process(target=train_until_killed, args=(tmp_path, calls))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert_same(training(tmp_path, **LONG), training(tmp_path / "whole", **LONG))
    assert not list(tmp_path.rglob("*.*"))


def flipped(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        tensors = [info for info in archive.infolist() if "/data/" in info.filename]
    place = max(tensors, key=lambda info: info.file_size).header_offset + 200
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


DAMAGED = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "one bit flipped": flipped,
}


def assert_put_aside(path, why, whole, capsys):
    """All that the training leaves behind, the random state too, is as if there had been no file."""
    content = path.read_bytes()
    capsys.readouterr()  # what was said up to here
    assert_same(training(path.parent.parent), whole)
    assert [(old.name, old.read_bytes()) for old in path.parent.iterdir()] == [("unfinished.old", content)]
    said, *epochs = capsys.readouterr().out.splitlines()
    assert why in said and str(path) in said and "unfinished.old" in said and len(epochs) == 3


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_put_aside(kind, whole, tmp_path, capsys):
    path = cut_short(tmp_path, 6)  # after an epoch of five batches and a test
    path.write_bytes(DAMAGED[kind](path.read_bytes()))
    assert_put_aside(path, "damaged", whole, capsys)


OTHERS = {"recipe": {"recipe": OTHER}, "network": {"net": lambda dropout: Net(2 * dropout)}, "modules": {}}


@pytest.mark.parametrize("why", OTHERS)
def test_another_training_s_file_is_put_aside(why, whole, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        if why == "modules":
            patch.setattr("s6.utils.CODE", "another version")
        path = cut_short(tmp_path, 6, **OTHERS[why])
    assert_put_aside(path, why, whole, capsys)


@pytest.mark.parametrize("folder", ["/proc/s6", "file"])
def test_a_folder_that_cannot_be_written_costs_a_warning(folder, whole, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(UserWarning, match="not kept"):
        assert_same(training(tmp_path / folder), whole)
