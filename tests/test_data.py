from types import SimpleNamespace

import pytest
import torch
import torchvision
from conftest import ROOT

from s6.utils import MEAN, MNIST_SHA256, STD, Loader, Recipe, affine, load_mnist, mnist_loaders

IMAGES = torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(0))
DRAWS = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) * 2 - 1
STILL = torch.zeros(6)


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


def test_augment_is_a_function_of_images_and_draws():
    images, draws = IMAGES.clone(), DRAWS.clone()
    augmented = Recipe().augment(images, draws)
    turn, x, y, zoom, slant = draws.T
    expected = affine(images, 10 * turn, torch.stack([x, y], 1), 1 + 0.1 * zoom, 10 * slant)
    torch.testing.assert_close(augmented, expected)
    assert torch.equal(images, IMAGES) and torch.equal(draws, DRAWS)


def numbered(count, *args, **options):
    """A loader of images that carry their own number, 0 to 255, in each pixel, and as their label."""
    numbers = torch.arange(count)
    return Loader(numbers.byte().view(-1, 1, 1, 1).expand(-1, 1, 28, 28), numbers, *args, **options)


def order(loader):
    return torch.cat([labels for _, labels in loader])


def order_and_draws(loader):
    draws = []
    loader.augment = lambda images, drawn: draws.append(drawn) or images
    return order(loader), torch.cat(draws)


def test_a_pass_visits_each_image_once_with_its_label_in_an_order_of_its_own():
    loader = numbered(203, 50, seed=1)
    first, second = order(loader), order(loader)
    assert torch.equal(first.sort()[0], torch.arange(203)) and torch.equal(second.sort()[0], torch.arange(203))
    assert not torch.equal(first, second)
    for images, labels in loader:
        torch.testing.assert_close(images * STD + MEAN, (labels.view(-1, 1, 1, 1) / 255).expand_as(images))


def test_without_a_seed_the_order_stays_and_the_last_batch_holds_the_rest():
    loader = numbered(203, 50)
    assert torch.equal(order(loader), torch.arange(203)) and torch.equal(order(loader), torch.arange(203))
    assert [len(labels) for _, labels in loader] == [50, 50, 50, 50, 3] and len(loader) == 5


def test_what_is_drawn_depends_on_seed_and_epoch_only():
    expected, draws = order_and_draws(numbered(203, 50, seed=1))
    assert draws.shape == (203, 5) and draws.min() >= -1 and draws.max() <= 1
    assert draws.mean(0).abs().max() < 0.15 and (draws.std(0) - 1 / 3**0.5).abs().max() < 0.1, "uniform"
    torch.rand(3)  # torch's own generator has no part in it
    other_order, other_draws = order_and_draws(numbered(203, 7, seed=1))
    assert torch.equal(other_order, expected) and torch.equal(other_draws, draws)
    loader = numbered(203, 50, seed=1)
    assert torch.equal(order(loader), expected)  # augmented or not
    second, loader.epoch = order(loader), 2
    assert torch.equal(order(loader), second) and not torch.equal(second, expected)
    assert not torch.equal(order(numbered(203, 50, seed=2)), expected)


def test_mnist_loaders_hold_what_torchvision_reads_normalised_by_its_statistics(mnist):
    recipe = Recipe(batch_size=100, seed=7)
    train_loader, test_loader = mnist_loaders(recipe, "cpu", ROOT / "data")
    for loader, train in ((train_loader, True), (test_loader, False)):
        theirs = torchvision.datasets.MNIST(ROOT / "data", train=train)
        assert torch.equal(loader.images[:, 0], theirs.data) and torch.equal(loader.labels, theirs.targets)
    pixels = train_loader.images.double() / 255
    assert (round(pixels.mean().item(), 4), round(pixels.std().item(), 4)) == (MEAN, STD)
    assert (train_loader.batch_size, train_loader.seed, train_loader.augment) == (100, 7, recipe.augment)
    assert test_loader.seed is test_loader.augment is None


@pytest.fixture
def mirror(mnist, tmp_path, monkeypatch):
    """A stand-in for torchvision's MNIST, and the folder `raw`, at first with links to the four files.

    `found` is what lay there at each call, `content` what comes if not MNIST.
    """
    mirror = SimpleNamespace(raw=(raw := tmp_path / "MNIST" / "raw"), found=[], content=None)
    raw.mkdir(parents=True)
    for name in MNIST_SHA256:
        (raw / name).symlink_to(ROOT / "data" / "MNIST" / "raw" / name)

    def download(root, download):
        assert root == tmp_path and download
        mirror.found.append({path.name for path in raw.iterdir()})
        if isinstance(mirror.content, Exception):
            raise mirror.content
        for name in MNIST_SHA256.keys() - mirror.found[-1]:
            (raw / name).write_bytes(mirror.content or (ROOT / "data" / "MNIST" / "raw" / name).read_bytes())

    monkeypatch.setattr(torchvision.datasets, "MNIST", download)
    return mirror


@pytest.mark.parametrize("how", ["truncated", "one byte changed", "missing"])
def test_a_damaged_file_and_no_other_is_removed_before_the_download(how, tmp_path, mnist, mirror):
    path = mirror.raw / "train-labels-idx1-ubyte"
    content = path.read_bytes()
    path.unlink()  # the link
    if how != "missing":
        path.write_bytes({"truncated": content[:5000], "one byte changed": content[:-1] + b"?"}[how])
    assert torch.equal(load_mnist(tmp_path)[1], mnist[1])
    assert mirror.found == [MNIST_SHA256.keys() - {path.name}]


@pytest.mark.parametrize("content", [OSError("no route to the mirrors"), b"<html>Sign in to this network</html>"])
def test_when_the_download_fails_the_error_says_what_to_do_and_the_other_files_are_left(content, tmp_path, mirror):
    (mirror.raw / "t10k-labels-idx1-ubyte").unlink()
    mirror.content = content
    with pytest.raises(RuntimeError) as error:
        load_mnist(tmp_path)
    for part in (*MNIST_SHA256, str(mirror.raw), "make data"):
        assert part in str(error.value)
    assert len([path for path in mirror.raw.iterdir() if path.is_symlink()]) == 3
