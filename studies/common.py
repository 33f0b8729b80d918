"""What the studies need: splits, the course's way of loading, and rows that say where they were measured."""

import csv
import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch.utils.data import DataLoader, Subset

from s6 import utils

DATA, RESULTS = ROOT / "data", ROOT / "studies" / "results"


def get_device():
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def about(device):
    """Return the columns that every row ends with: device, versions, commit."""
    import torchvision

    name = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    name = f"{name}, {os.cpu_count()} CPUs, float32"  # earlier rows may say bfloat16
    if device.type != "cpu":
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def git(*arguments):
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)

    changed = git("diff", "--quiet", "HEAD", "--", "s6", "studies/*.py").returncode
    commit = git("rev-parse", "--short", "HEAD").stdout.strip() + ("-dirty" if changed else "")
    versions = platform.python_version(), torch.__version__, torchvision.__version__
    return dict(zip(("device", "python", "torch", "torchvision", "commit"), (name, *versions, commit), strict=True))


def on_cpu(row):
    """Whether a row is of a CPU, by the name that `about` gives it."""
    return "CPUs" in row["device"]


def read(path):
    """Return the rows of a CSV file as dicts of text; none where there is no file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path, row):
    """Write one row, in a new file after its header; ValueError if the file has not all of its columns."""
    new = not path.exists()
    columns = row if new else read(path)[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def on(device, model):
    """Return the model on the device, in channels_last: faster with one thread of a CPU, and on NVIDIA's GPUs."""
    return model.to(device, memory_format=torch.preserve_format if device.type == "mps" else torch.channels_last)


def loaders(recipe, device, split, images=None):
    """Return the loader that a split trains on, and the one that it tests on; `images` takes only so many of both."""
    train_set, test_set = utils.load_mnist(DATA), utils.load_mnist(DATA, train=False)
    if split == "50k/10k":
        train_set, test_set = [part[:50_000] for part in train_set], [part[50_000:] for part in train_set]
    few = ([part[:images] for part in both] for both in (train_set, test_set))
    return utils.make_loaders(recipe, device, *few)


def course_loader(images, batch_size, workers=0, data=DATA):
    """Load the first `images` of the training set as the course does: each through PIL, in every pass."""
    from torchvision import transforms
    from torchvision.datasets import MNIST

    steps = [
        transforms.RandomApply([transforms.CenterCrop(22)], p=0.1),
        transforms.Resize((28, 28)),
        transforms.RandomRotation((-15.0, 15.0), fill=0),
        transforms.ToTensor(),
        transforms.Normalize((utils.MEAN,), (utils.STD,)),
    ]
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: that is the question
    dataset = Subset(MNIST(data, transform=transforms.Compose(steps)), range(images))
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
