import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from torchvision.transforms.functional import InterpolationMode
from torchvision.transforms.functional import affine as affine_of_torchvision

from conftest import ROOT
from s6.utils import MEAN, STD, Loader, Recipe, affine, load_mnist, mnist_loaders

IMAGES = torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def test_affine_agrees_with_torchvision():
    """Torchvision turns and slants the other way, and takes one image at a time."""
    degrees = torch.tensor([-30.0, 7, 0, 45, 12, 90])
    scale, shear = torch.tensor([[0.7, 1, 1.3, 1.1, 0.9, 1], [5, -9, 20, 0, 3, -15]])
    translate = torch.tensor([[0, 0], [2, -3], [1, 0], [-4, 1], [0, 2], [3, 3]])
    ours = affine(IMAGES, degrees, translate.float(), scale, shear)
    for i in range(6):
        amounts = -degrees[i].item(), translate[i].tolist(), scale[i].item(), -shear[i].item()
        theirs = affine_of_torchvision(IMAGES[i], *amounts, interpolation=InterpolationMode.BILINEAR)
        torch.testing.assert_close(ours[i], theirs, rtol=0, atol=1e-3)


def test_augment_scales_the_draws_by_the_recipe():
    draws = torch.rand(6, 5) * 2 - 1
    turn, x, y, zoom, slant = draws.T
    expected = affine(IMAGES, 10 * turn, 2 * torch.stack([x, y], 1), 1 + 0.1 * zoom, 10 * slant)
    torch.testing.assert_close(Recipe(translate=2.0).augment(IMAGES, draws), expected)


def numbered(count, *args, **options):
    """A loader of images that carry their own number, modulo 256, in each pixel, and as their label."""
    numbers = torch.arange(count)
    return Loader((numbers % 256).byte().view(-1, 1, 1, 1).expand(-1, 1, 28, 28), numbers, *args, **options)


def order(loader):
    return torch.cat([labels for _, labels in loader])


def order_and_draws(loader):
    draws = []
    loader.augment = lambda images, drawn: draws.append(drawn) or images
    return order(loader), torch.cat(draws)


def test_a_pass_visits_each_image_once_with_its_label():
    loader = numbered(2103, 50, seed=1)
    first, second = order(loader), order(loader)
    assert torch.equal(first.sort()[0], torch.arange(2103)) and torch.equal(second.sort()[0], torch.arange(2103))
    assert not torch.equal(first, second) and [len(labels) for _, labels in loader] == [50] * 42 + [3]
    for images, labels in loader:
        torch.testing.assert_close(images * STD + MEAN, (labels.view(-1, 1, 1, 1) % 256 / 255).expand_as(images))
    without = numbered(2103, 50)
    assert len(without) == 43 and torch.equal(order(without), torch.arange(2103))


def test_what_is_drawn_depends_on_seed_and_epoch_only():
    expected, draws = order_and_draws(numbered(2103, 50, seed=1))
    assert draws.shape == (2103, 5) and draws.min() >= -1 and draws.max() <= 1
    assert draws.mean(0).abs().max() < 0.15 and (draws.std(0) - 1 / 3**0.5).abs().max() < 0.1, "uniform"
    torch.rand(3)  # torch's own generator has no part in it
    other_order, other_draws = order_and_draws(numbered(2103, 7, seed=1))
    assert torch.equal(other_order, expected) and torch.equal(other_draws, draws)
    loader = numbered(2103, 50, seed=np.int64(1))
    assert torch.equal(order(loader), expected)  # augmented or not
    second, loader.epoch = order(loader), 2
    assert torch.equal(order(loader), second) and not torch.equal(second, expected)
    assert not torch.equal(order(numbered(2103, 50, seed=2)), expected)


def test_mnist_loaders_hold_what_torchvision_reads_normalised_by_its_statistics():
    recipe = Recipe(batch_size=100, seed=7)
    loaders = mnist_loaders(recipe, "cpu", ROOT / "data")
    for loader, train in zip(loaders, (True, False), strict=True):
        theirs = torchvision.datasets.MNIST(ROOT / "data", train=train)
        assert torch.equal(loader.images[:, 0], theirs.data) and torch.equal(loader.labels, theirs.targets)
    pixels = loaders[0].images.double() / 255
    assert (round(pixels.mean().item(), 4), round(pixels.std().item(), 4)) == (MEAN, STD)
    assert (loaders[0].batch_size, loaders[0].seed, loaders[0].augment) == (100, 7, recipe.augment)
    assert loaders[1].seed is loaders[1].augment is None


def test_damaged_files_and_a_failing_download_say_what_to_do_and_nothing_is_deleted(tmp_path, mnist, monkeypatch):
    def download(*_, **__):
        raise OSError(f"no answer in {socket.getdefaulttimeout()} seconds")

    raw = tmp_path / "MNIST" / "raw"
    shutil.copytree(ROOT / "data" / "MNIST" / "raw", raw)
    labels = raw / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + b"\x07")
    before = sorted(raw.iterdir())
    for reason in ("a file is damaged", "no answer in 60.0 seconds"):
        with pytest.raises(RuntimeError, match=f"{reason}.*delete {tmp_path / 'MNIST'}. .*make data"):
            load_mnist(tmp_path)
        assert sorted(raw.iterdir()) == before and socket.getdefaulttimeout() is None
        monkeypatch.setattr("s6.utils.MNIST", download)


def test_a_download_that_hardly_moves_ends_and_so_does_the_program(tmp_path):
    """Such as one byte every 20 seconds."""
    code = "import time; from s6 import utils; utils.TIME_LIMIT = 1; utils.MNIST = lambda *_, **__: time.sleep(600)"
    command = [sys.executable, "-c", f"{code}; utils.load_mnist({str(tmp_path / 'data')!r})"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 1 and "MNIST could not be loaded: it took more than 1 seconds" in done.stderr


def test_a_drive_that_is_not_mounted_is_not_made(tmp_path):
    with pytest.raises(RuntimeError, match="No such file or directory: .*Drive/data"):
        load_mnist(tmp_path / "Drive" / "data")
    assert not list(tmp_path.iterdir())
