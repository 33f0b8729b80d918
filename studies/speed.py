"""Measure how long an epoch takes.

    .venv/bin/python studies/speed.py           # a quarter of an hour on two idle cores; then prints the table

- A is the course's way. A `DataLoader` changes each image with PIL, in this process (0 workers) or in others.
- B is ours, as in S6.ipynb.
- C does the steps of B alone. It trains on one batch again and again, without schedule and moving average.

A shared machine changes its speed. So A, B and C take turns, and each time is divided by that of C in the same turn. A
time that has its row from the same device is not measured again.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import MNIST

from s6 import utils
from s6.model import Net
from studies.common import DATA, RESULTS, ROOT, about, append, done, get_device, loaders, read
from studies.variants import COURSE, COURSE_NET, COURSE_TRANSFORMS, CourseSteps

device = get_device()


def course(images, workers):
    """Return a function that trains for an epoch as the course does."""
    normalize = transforms.Normalize((utils.MEAN,), (utils.STD,))
    transform = transforms.Compose([*COURSE_TRANSFORMS, transforms.ToTensor(), normalize])
    dataset = Subset(MNIST(DATA, download=True, transform=transform), range(images))
    loader = DataLoader(dataset, COURSE["batch_size"], True, num_workers=workers, persistent_workers=workers > 0)
    model = COURSE_NET().to(device)
    optimizer = CourseSteps(**COURSE).optimizer(model)

    def epoch():
        for data, target in loader:
            data, target = data.to(device), target.to(device)
            optimizer.zero_grad()
            output = model(data)
            loss = F.nll_loss(output, target)
            loss.item()  # the course shows it in its bar
            loss.backward()
            optimizer.step()
            output.argmax(1).eq(target).sum().item()

    return epoch


def ours(images, steps_alone=False):
    """Return a function that trains for an epoch with our recipe, or does its steps alone."""
    recipe, model = utils.Recipe(), Net().to(device)
    batches, _ = loaders(recipe, device, "60k/test", images)
    optimizer = recipe.optimizer(model)
    more = {"scheduler": recipe.scheduler(optimizer, len(batches)), "averaged": recipe.averaged(model)}
    if steps_alone:
        batches, more = [next(iter(batches))] * len(batches), {}
    return lambda: utils.train(model, device, batches, optimizer, F.nll_loss, **more)


def table(path):
    """Print the median of each time, and of its ratio to the time of C, with the lowest and the highest ratio."""
    rows = read(path)
    for name, some in rows.groupby("device", sort=False):
        seconds = some.pivot(index="turn", columns="epoch", values="seconds")
        ratios = seconds.div(seconds["C"], axis=0)
        print(f"\n| an epoch on {name} | seconds | times C | range |\n" + "|---" * 4 + "|")
        for epoch, times in ratios.items():
            print(f"| {epoch} | {seconds[epoch].median():.1f} | {times.median():.2f} ", end="")
            print(f"| {times.min():.2f} to {times.max():.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--images", type=int, default=60_000, help="fewer for a quick check with its rows in `build`")
    options = parser.parse_args()
    columns, path = about(device), (RESULTS if options.images == 60_000 else ROOT / "build") / "speed.csv"
    epochs = {f"A, {n} workers": course(options.images, n) for n in (0, os.cpu_count())}
    epochs |= {"B": ours(options.images), "C": ours(options.images, steps_alone=True)}
    there = done(path, ["device", "turn", "epoch"])
    for turn in range(1, options.turns + 1):
        for name, epoch in epochs.items():
            if (columns["device"], turn, name) not in there:
                start = time.perf_counter()
                epoch()
                append(path, {"epoch": name, "turn": turn, "seconds": f"{time.perf_counter() - start:.2f}"} | columns)
    table(path)


if __name__ == "__main__":
    main()
