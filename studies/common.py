"""What all studies need: data, the device, and rows that name device and versions."""

import csv
import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path
from pickle import UnpicklingError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torchvision
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import MNIST

from s6 import utils
from s6.model import Net

DATA, RESULTS = ROOT / "data", ROOT / "studies" / "results"


def get_device():
    """Return the accelerator, or the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def about(device):
    """Return the last columns of each row: device, versions, commit."""
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    name = f"{name}, {os.cpu_count()} CPUs, float32"
    if device.type != "cpu":
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def git(*arguments):
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)

    changed = git("diff", "--quiet", "HEAD", "--", "s6", "studies/*.py").returncode
    commit = git("rev-parse", "--short", "HEAD").stdout.strip() + ("-dirty" if changed else "")
    versions = platform.python_version(), torch.__version__, torchvision.__version__
    return dict(zip(("device", "python", "torch", "torchvision", "commit"), (name, *versions, commit), strict=True))


def on_cpu(row):
    """Return whether a row comes from a CPU."""
    return "CPUs" in row["device"]


def read(path):
    """Return the rows of a CSV file, each a dict of text. Without a file there are none."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path, row):
    """Append a row to a CSV file. Raises ValueError if the file lacks a column of the row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", newline="", encoding="utf-8") as file:
        file.seek(0)
        columns = next(csv.reader(file), None)
        writer = csv.DictWriter(file, columns or row, lineterminator="\n")
        if not columns:
            writer.writeheader()
        writer.writerow(row)


def on(device, model):
    """Return the model on the device, in channels_last. With it, one CPU thread trains a third faster."""
    # On Apple GPUs (MPS), torch 2.11 to 2.13 gives wrong gradients in channels_last.
    layout = torch.preserve_format if device.type == "mps" else torch.channels_last
    return model.to(device, memory_format=layout)


def trained(path=ROOT / "S6.pt"):
    """Return the network with the weights that S6.ipynb saved, on the CPU. Without them, end the program."""
    model = Net()
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, EOFError, RuntimeError, TypeError, UnpicklingError):  # no file, half a file, or another network
        sys.exit(f"{path} holds no weights of Net(), so train first, with `make run`.")
    return model.eval()


def loaders(recipe, device, split, images=None):
    """Return the training loader and the test loader of a split, with at most `images` images each."""
    train_set, test_set = utils.load_mnist(DATA), utils.load_mnist(DATA, train=False)
    if split == "50k/10k":
        train_set, test_set = [part[:50_000] for part in train_set], [part[50_000:] for part in train_set]
    few = ([part[:images] for part in both] for both in (train_set, test_set))
    return utils.make_loaders(recipe, device, *few)


def course_loader(images, batch_size, workers=0, data=DATA):
    """Return a loader of the first `images` training images. Like the course's, it uses PIL, image by image."""
    steps = [
        transforms.RandomApply([transforms.CenterCrop(22)], p=0.1),
        transforms.Resize((28, 28)),
        transforms.RandomRotation((-15.0, 15.0), fill=0),
        transforms.ToTensor(),
        transforms.Normalize((utils.MEAN,), (utils.STD,)),
    ]
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores
    dataset = Subset(MNIST(data, transform=transforms.Compose(steps)), range(images))
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
