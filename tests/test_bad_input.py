"""What a mistake is answered with: one sentence that names it. Bad files and lost networks are in the other tests."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from s6.model import Net
from s6.utils import Checkpoint, Recipe, TensorLoader, classify, load_mnist, mnist_loaders, test, train

IMAGES = torch.zeros(8, 1, 28, 28)
LABELS = torch.arange(8)


def fit(images=IMAGES, labels=LABELS, criterion=F.nll_loss, model=None):
    """One epoch of one batch. Whatever is wrong with it, the histories stay as they were."""
    model = model or Net()
    losses, accuracies = [1.0], [50.0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        train(model, "cpu", [(images, labels)], optimizer, criterion, losses, accuracies, disable=True)
    except Exception:
        assert losses == [1.0] and accuracies == [50.0]
        raise


class OutOfMemory(Net):
    def forward(self, images):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


BAD = {
    "no epochs": (lambda: Recipe(epochs=0), "epochs must be a whole number of at least 1, got 0"),
    "half an epoch": (lambda: Recipe(epochs=1.5), "epochs must be a whole number of at least 1, got 1.5"),
    "epochs in words": (lambda: Recipe(epochs="20"), "epochs must be a whole number of at least 1, got '20'"),
    "batches of 0": (lambda: Recipe(batch_size=0), "batch_size must be a whole number of at least 1, got 0"),
    "batches of a float": (lambda: Recipe(batch_size=250.0), "batch_size must be a whole number .*, got 250.0"),
    "rate below 0": (lambda: Recipe(lr=-0.1), "lr must be a number of at least 0, got -0.1"),
    "rate of NaN": (lambda: Recipe(lr=math.nan), "lr must be a number of at least 0, got nan"),
    "endless rate": (lambda: Recipe(lr=math.inf), "lr must be a number of at least 0, got inf"),
    "average of more than all": (lambda: Recipe(average=1.5), "average must be .* of at least 0 and below 1, got 1.5"),
    "momentum of 1": (lambda: Recipe(momentum=1), "momentum must be a number of at least 0 and below 1, got 1"),
    "warm-up for longer than it takes": (lambda: Recipe(warmup=2), "warmup must be .* below 1, got 2"),
    "zoom to nothing": (lambda: Recipe(scale=1.0), "scale must be a number of at least 0 and below 1, got 1.0"),
    "slant to a line": (lambda: Recipe(shear=90), "shear must be a number of at least 0 and below 90, got 90"),
    "a misspelt setting": (lambda: Recipe(learning_rate=0.1), "unexpected keyword argument 'learning_rate'"),
    "no momentum": (lambda: Recipe(momentum=0).prepare(Net(), 5), "Nesterov momentum requires a momentum"),
    "dropout of 2": (lambda: Net(dropout=2), "dropout probability has to be between 0 and 1, but got 2"),
    "an unknown device": (lambda: mnist_loaders(device="gpu"), "gpu"),
    "more held out than there is": (lambda: mnist_loaders(holdout=60_000), "holdout must lie between 0 and 59,999"),
    "bytes for a batch": (lambda: fit(IMAGES.byte()), r"expects normalised images of torch.float32, got torch.uint8"),
    "float64 images": (lambda: fit(IMAGES.double()), "expects normalised images of torch.float32, got torch.float64"),
    "images without a channel": (
        lambda: fit(IMAGES[:, 0]),
        r"expects images of shape \(B, 1, 28, 28\), got \(8, 28, 28\)",
    ),
    "colour images": (lambda: fit(IMAGES.expand(8, 3, 28, 28)), r"of shape \(B, 1, 28, 28\), got \(8, 3, 28, 28\)"),
    "images of 32 x 32": (lambda: fit(torch.zeros(8, 1, 32, 32)), r"of shape \(B, 1, 28, 28\), got \(8, 1, 32, 32\)"),
    "images of NaN": (lambda: fit(IMAGES * math.nan), "the training loss is nan: lower the learning rate or look at"),
    "a label of 10": (lambda: fit(labels=LABELS + 3), r"labels must lie in 0\.\.9, got 3 to 10"),
    "a label of -1": (lambda: fit(labels=LABELS - 1), r"labels must lie in 0\.\.9, got -1 to 6"),
    "labels as fractions": (
        lambda: fit(labels=LABELS.float()),
        r"must be class numbers of shape \(B,\), got \(8,\) of torch.float32",
    ),
    "one-hot labels": (
        lambda: fit(labels=F.one_hot(LABELS, 10)),
        r"must be class numbers of shape \(B,\), got \(8, 10\) of torch.int64",
    ),
    "fewer labels than images": (
        lambda: fit(labels=LABELS[:7]),
        "Expected input batch_size .8. to match target batch_size .7.",
    ),
    "a loss for each image": (
        lambda: fit(criterion=torch.nn.NLLLoss(reduction="none")),
        "the criterion must return one number, the mean loss, not 8: reduction='mean'",
    ),
    "a loss for each test image": (
        lambda: test(Net(), "cpu", [(IMAGES, LABELS)], torch.nn.NLLLoss(reduction="none")),
        "the criterion must return one number, the mean loss, not 8: reduction='mean'",
    ),
    "no memory on the GPU": (lambda: fit(model=OutOfMemory()), "CUDA out of memory"),
    "nothing to train on": (
        lambda: train(Net(), "cpu", [], None, F.nll_loss, disable=True),
        "training loader is empty",
    ),
    "nothing to test on": (lambda: test(Net(), "cpu", [], F.nll_loss), "the test loader is empty"),
    "a spent generator": (lambda: test(Net(), "cpu", iter(()), F.nll_loss), "the test loader is empty"),
    "images without labels": (lambda: TensorLoader(IMAGES, LABELS[:7], 4), "there are 8 images but 7 labels"),
    "a loader of float64 images": (
        lambda: TensorLoader(IMAGES.double(), LABELS, 4),
        "images must be torch.uint8, from 0 to 255, got torch.float64",
    ),
    "a setting of NumPy's": (
        lambda: Checkpoint("S6.pt", {"seed": np.int64(1)}, [[]], torch.Generator(), averaged=Net()),
        "a setting must be a number or a text of Python's own, got seed=",
    ),
    "float images to classify": (
        lambda: classify(Net(), IMAGES),
        r"images must be uint8, .*, got \(8, 1, 28, 28\) of torch.float32",
    ),
    "an RGB array to classify": (
        lambda: classify(Net(), np.zeros((28, 28, 3), np.uint8)),
        r"got \(28, 28, 3\) of torch.uint8",
    ),
    "one image without a batch": (lambda: classify(Net(), IMAGES[0, 0].byte()), r"got \(28, 28\) of torch.uint8"),
    "nothing to classify": (lambda: classify(Net(), IMAGES[:0].byte()), r"got \(0, 1, 28, 28\) of torch.uint8"),
}


@pytest.mark.parametrize("what", BAD)
def test_it_is_said_what_is_wrong(what):
    call, said = BAD[what]
    with pytest.raises((ValueError, TypeError, RuntimeError, FloatingPointError), match=said):
        call()


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "data").write_text("no folder")
    with pytest.raises(OSError, match="data"):
        load_mnist(tmp_path / "data")


def test_a_batch_larger_than_the_data_is_all_of_it():
    loader = TensorLoader(torch.zeros(8, 1, 28, 28, dtype=torch.uint8), LABELS, batch_size=1000)
    assert len(loader) == 1 and [len(labels) for _, labels in loader] == [8]
    model = Net()
    optimizer, scheduler, averaged = Recipe(epochs=1, batch_size=1000).prepare(model, len(loader))
    losses, _ = train(model, "cpu", loader, optimizer, F.nll_loss, scheduler=scheduler, averaged=averaged, disable=True)
    assert math.isfinite(losses[0])


def test_a_checkpoint_in_the_place_of_a_folder_is_moved_aside(tmp_path, capsys):
    (tmp_path / "S6-unfinished.pt").mkdir()
    checkpoint = Checkpoint(tmp_path / "S6.pt", {}, [[]], torch.Generator(), averaged=Net())
    checkpoint.resume()
    assert capsys.readouterr().out.startswith("Training starts anew: ") and Path(tmp_path, "S6-unused-1.pt").is_dir()
