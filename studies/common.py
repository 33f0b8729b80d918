"""What all studies need: images, the device, rows, and the weights that S6.ipynb saved."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from pickle import UnpicklingError

import pandas as pd
import torch
import torchvision

from s6 import utils
from s6.model import Net

ROOT = Path(__file__).resolve().parent.parent
DATA, RESULTS = ROOT / "data", ROOT / "studies" / "results"
CURVES = "accuracies", "raw accuracies", "losses"  # columns of accuracy.csv with a number for each epoch


def get_device():
    """Return the accelerator, or the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def loaders(recipe, device, split, images=None):
    """Return the training loader and the test loader of a split, with at most `images` images each."""
    train_set, test_set = utils.load_mnist(DATA), utils.load_mnist(DATA, train=False)
    if split == "50k/10k":
        train_set, test_set = [part[:50_000] for part in train_set], [part[50_000:] for part in train_set]
    few = ([part[:images] for part in both] for both in (train_set, test_set))
    return utils.make_loaders(recipe, device, *few)


def about(device):
    """Return the columns that every row has: the device and its kind, the versions, the commit."""

    def git(*arguments):
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)

    if device.type == "cpu":
        name = f"{torch.cpu.get_capabilities().get('cpu_name') or platform.machine()}, {os.cpu_count()} CPUs"
    else:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    changed = git("diff", "--quiet", "HEAD", "--", "s6", "studies/*.py").returncode
    commit = git("rev-parse", "--short", "HEAD").stdout.strip() + ("-dirty" if changed else "")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    return {"device": name, "kind": "CPU" if device.type == "cpu" else "GPU", **versions, "commit": commit}


def read(path):
    """Return the rows of a CSV file."""
    return pd.read_csv(path, keep_default_na=False, converters=dict.fromkeys(CURVES, str))


def done(path, columns):
    """Return these columns of all rows of a CSV file, as a set of tuples. Without a file it is empty."""
    return set(read(path)[columns].itertuples(index=False, name=None)) if path.exists() else set()


def append(path, row):
    """Append a row, a dict, to a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame([row]).to_csv(path, mode="a", header=not path.exists(), index=False, lineterminator="\n")


def trained(path=ROOT / "S6.pt"):
    """Return the network with the weights that S6.ipynb saved, on the CPU. Without them, end the program."""
    model = Net()
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, EOFError, RuntimeError, TypeError, UnpicklingError):  # no file, half a file, or another network
        sys.exit(f"{path} holds no weights of Net(), so train first, with `make run`.")
    return model.eval()
