"""How accurate is the network, over many seeds, and what is each layer and trick worth?

    .venv/bin/python -m pip install --requirement studies/requirements.txt
    .venv/bin/python studies/accuracy.py choosing             # settings against each other, on 50k/10k
    .venv/bin/python studies/accuracy.py reporting --seeds 6  # the frozen recipe, on 60k/test
    .venv/bin/python studies/accuracy.py ladder --seeds 2     # from the course's recipe to ours, one change at a time
    .venv/bin/python studies/accuracy.py ablation --seeds 2   # ours with one thing taken away

A trial trains one variant from one seed and is one row of results/accuracy.csv, written when it ends; trials that have
their row are not run again. Ray runs them, as many at once as there are cores (on a GPU, `--share` of them), on this
machine or, with `--address`, on a cluster. The training is the notebook's: `Recipe`, `mnist_loaders`, `CPUParallel`,
`train` and `test` are imported.

Splits: `50k/10k` trains on the first 50,000 training images and reads the last 10,000; everything was chosen there.
`60k/test` trains on all of them and reads the test set: after each epoch, so as to draw the curve, but the last epoch is
the one that counts, and nothing depends on the others.
"""

import argparse
import csv
import io
import math
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "studies")]

import torch
import torch.nn.functional as F
from speed import DATA, RESULTS, about, course_loader, read
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from s6.model import ConvBlock, Net
from s6.utils import CPUParallel, Recipe, get_device, mnist_loaders, set_seed, test, train

# Accuracies in percent, of the averaged weights. The last three columns hold a value for each epoch.
COLUMNS = (
    "variant", "split", "seed", "last", "best", "lowest of last five", "first epoch at 99.4", "parameters", "epochs",
    "seconds", "device", "python", "torch", "torchvision", "commit", "settings", "accuracies", "raw accuracies", "losses",
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------- variants
# Name: what it changes. The keys are fields of `Recipe`, or arguments of `trial`.

START = {"batch_size": 250, "lr": 0.2, "average": 0.998, "weight_decay": 5e-4, "warmup": 0.2}  # where choosing began
CHOOSING = {
    "start": {},
    "batches of 125, rate 0.1": {"batch_size": 125, "lr": 0.1, "average": 0.9995},
    "3 epochs unaugmented at the end": {"fade": 3},
    "augmentation x 1.5": {"degrees": 15.0, "translate": 3.0, "scale": 0.15, "shear": 7.5},
    "elastic": {"augment": "elastic"},
    "label smoothing 0.05": {"smoothing": 0.05},
    "AdamW 0.01": {"optim": "AdamW", "lr": 0.01, "weight_decay": 0.01},
    "flat, then down": {"schedule": "flat, then down"},
    "rate 0.4": {"lr": 0.4},
    "weight decay 1e-3": {"weight_decay": 1e-3},
    "ReLU before BatchNorm": {"net": "ReLU before BatchNorm"},
    "float32": {"dtype": torch.float32},
    "batches of 62, rate 0.1": {"batch_size": 62, "lr": 0.1, "average": 0.9995},
}
STUDIES = {
    "choosing": ("50k/10k", {name: START | changes for name, changes in CHOOSING.items()}),
    "reporting": ("60k/test", {"ours": {}}),
}


# ------------------------------------------------------------------------------------------------------------- trial


class ReLUFirst(ConvBlock):
    """The course's block: the ReLU before the normalisation."""

    def forward(self, x):
        conv, norm, dropout = self
        return dropout(norm(F.relu(conv(x))))


class Smooth(ConvBlock):
    def forward(self, x):
        conv, norm, dropout = self
        return dropout(F.silu(norm(conv(x))))


def build(net, dropout):
    """Return the network called `net`: `Net` with one thing about it changed."""
    model = Net(dropout)
    layers = list(model.layers)
    blocks = [layer for layer in layers if isinstance(layer, ConvBlock)]
    if net == "no BatchNorm":
        for block in blocks:
            block[1] = nn.Identity()
    elif net == "ReLU before BatchNorm":
        for block in blocks:
            block.__class__ = ReLUFirst
    elif net == "SiLU":
        for block in blocks:
            block.__class__ = Smooth
    elif net == "ReLU on the scores":
        layers.insert(-1, nn.ReLU())
    elif net == "no transition":  # the next block takes all 16 channels
        layers[4:6] = [ConvBlock(16, 12, 3, dropout)]
    elif net == "linear layer":  # of all features, instead of scores at nine places and their mean
        layers[-2:] = [nn.Flatten(), nn.Linear(16 * 3 * 3, 10)]
    elif net == "pooling a block earlier":
        layers[2], layers[3], layers[-1] = layers[3], layers[2], nn.AvgPool2d(2)
    elif net != "ours":
        raise ValueError(f"there is no network called {net!r}")
    model.layers = nn.Sequential(*layers)
    return model


# The rate of a step as a share of its peak: `ours` is the recipe's own.
SCHEDULES = {
    "one-cycle": lambda ours, total, step: ours(step),
    "flat, then down": lambda ours, total, step: min(1, (step + 1) / (0.05 * total), (total - step) / (0.5 * total)),
    "constant": lambda ours, total, step: 1.0,
}


def elastic(recipe, images, generator, pixels=1.0):
    """The recipe's augmentation, and a smooth random shift of each place (Simard, Steinkraus and Platt, 2003)."""
    field = torch.rand(len(images), 2, 5, 5, generator=generator, device=images.device) * 2 - 1
    field = F.interpolate(field, images.shape[-2:], mode="bicubic", align_corners=True) * (pixels * 2 / 28)
    eye = torch.eye(2, 3, device=images.device).expand(len(images), 2, 3)
    grid = F.affine_grid(eye, images.shape, align_corners=False) + field.permute(0, 2, 3, 1)
    return recipe.augment(F.grid_sample(images, grid, align_corners=False), generator)


def trial(
    variant, split, seed, changes, data=DATA, images=None, *, net="ours", dropout=0.0, augment="ours", fade=0,
    optim="SGD", schedule="one-cycle", smoothing=0.0, shards=2, dtype=None, **recipe,
):  # fmt: skip
    """Train, and return the row, still without its commit."""
    start, device, recipe = time.perf_counter(), get_device(), replace(Recipe(), **recipe)
    set_seed(seed)
    holdout = 10_000 if split == "50k/10k" else 0
    augment = {"ours": recipe.augment, "none": None, "elastic": partial(elastic, recipe)}[augment]
    loader, test_loader = mnist_loaders(data, recipe.batch_size, device, seed, augment=augment, holdout=holdout)
    for part in (loader, test_loader):
        part.images, part.labels = part.images[:images], part.labels[:images]
    model = build(net, dropout).to(device)
    optimizer, scheduler, averaged = recipe.prepare(model, len(loader))
    ours = scheduler.lr_lambdas[0]
    if optim == "AdamW":
        groups = [{k: g[k] for k in ("params", "weight_decay")} for g in optimizer.param_groups]
        optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.99))
    total = recipe.epochs * len(loader)
    if optim != "SGD" or schedule != "one-cycle":
        scheduler = LambdaLR(optimizer, partial(SCHEDULES[schedule], ours, total))
    fast = CPUParallel(model, shards, dtype) if device.type == "cpu" else model
    criterion = partial(F.cross_entropy, label_smoothing=smoothing) if smoothing else F.nll_loss
    losses, accuracies, raw = [], [], []
    for epoch in range(recipe.epochs):
        if epoch >= recipe.epochs - fade:
            loader.augment = None
        train(fast, device, loader, optimizer, criterion, scheduler=scheduler, averaged=averaged, disable=True)
        test(averaged, device, test_loader, F.nll_loss, losses, accuracies)
        if not holdout:
            test(model, device, test_loader, F.nll_loss, None, raw)
    figures = (
        variant, split, seed, f"{accuracies[-1]:.2f}", f"{max(accuracies):.2f}", f"{min(accuracies[-5:]):.2f}",
        next((epoch for epoch, accuracy in enumerate(accuracies, 1) if accuracy >= 99.4), "-"),
        sum(p.numel() for p in model.parameters()), recipe.epochs, f"{time.perf_counter() - start:.0f}",
        *about(device)[:-1], "-", settings(changes),
        *(" ".join(f"{x:.{n}f}" for x in values) for values, n in ((accuracies, 2), (raw, 2), (losses, 5))),
    )  # fmt: skip
    return dict(zip(COLUMNS, figures, strict=True))


def settings(changes):
    """Return everything that sets a trial apart, as text: the recipe's fields, then the other changes."""
    return ", ".join(f"{key}={value}" for key, value in (vars(Recipe()) | changes).items())


# ----------------------------------------------------------------------------------------------------------- running


def stored(path):
    """Return the rows of `path`, if it is there; half a row, of a start that was killed while writing, is cut off."""
    if not path.exists():
        return []
    whole = path.read_bytes()
    if (end := whole.rfind(b"\n") + 1) < len(whole):
        os.truncate(path, end)
    return read(path)


def append(path, row):
    """Write the row, and in a new file the header before it, in one piece."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if not path.exists():
        writer.writeheader()
    writer.writerow(row)
    with open(path, "ab", buffering=0) as file:
        file.write(text.getvalue().encode())
        os.fsync(file.fileno())


def missing(study, seeds, rows):
    """Return the trials of a study that have no row yet, seed by seed, as arguments of `trial`."""
    split, variants = STUDIES[study]
    done = {(row["settings"], row["split"], row["seed"]) for row in rows}
    wanted = [(name, split, seed, changes) for seed in seeds for name, changes in variants.items()]
    return [job for job in wanted if (settings(job[3]), split, str(job[2])) not in done]


def run(jobs, path, address=None, share=8, images=None):
    """Run the trials with Ray, and append each row as its trial ends; return how many failed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    # A cluster's nodes get a copy of this folder, and fetch the images themselves.
    there = {"runtime_env": {"working_dir": str(ROOT), "excludes": [".git", "data", ".venv", "build"]}} if address else {}
    ray.init(address, include_dashboard=False if not address else None, log_to_driver=False, **there)
    commit = about(get_device())[-1]
    gpus = 1 / share if ray.cluster_resources().get("GPU") else 0
    # Ray starts a trial again whose worker died; one that raised would raise again.
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3, scheduling_strategy="SPREAD")(trial)
    failed = 0
    try:
        running = {
            remote.remote(*job, "data" if address else DATA, images, **job[3]): f"{job[0]}, seed {job[2]}"
            for job in jobs
        }
        with tqdm(total=len(jobs), unit="trial", file=sys.stdout) as bar:
            while running:
                [done], _ = ray.wait(list(running))
                name = running.pop(done)
                try:
                    row = ray.get(done) | {"commit": commit}
                    append(path, row)
                    bar.write(f"{name}: {row['last']} %")
                except ray.exceptions.RayError as error:
                    failed += 1
                    bar.write(f"{name}: {str(error).strip().splitlines()[-1]}")
                bar.update()
    finally:
        ray.shutdown()
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, default=1, help="train from the seeds 1 to this one")
    parser.add_argument("--address", help="of a Ray cluster")
    parser.add_argument("--share", type=int, default=8, help="trials at once on a GPU")
    parser.add_argument("--results", type=Path, default=RESULTS / "accuracy.csv")
    parser.add_argument("--images", type=int, help="train on so many only: does it run? The figures mean nothing")
    options = parser.parse_args()
    jobs = missing(options.study, range(1, options.seeds + 1), stored(options.results))
    sys.exit(bool(run(jobs, options.results, options.address, options.share, options.images)))


if __name__ == "__main__":
    main()
