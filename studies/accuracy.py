"""How accurate is the network, over many seeds, and what is each layer and trick worth?

    .venv/bin/python -m pip install --requirement studies/requirements.txt
    .venv/bin/python studies/accuracy.py choosing             # settings against each other, on 50k/10k
    .venv/bin/python studies/accuracy.py reporting --seeds 8  # the frozen recipe, on 60k/test
    .venv/bin/python studies/accuracy.py ladder --seeds 3     # from the course's recipe to ours, step by step
    .venv/bin/python studies/accuracy.py ablation --seeds 3   # ours with one thing changed
    .venv/bin/python studies/accuracy.py tables               # of README.md and studies/README.md, from the rows

A trial trains one variant from one seed. It becomes a row of results/accuracy.csv when it ends; a trial that has its
row is not run again. Ray runs the trials, one on each core (`--share` of them on a GPU), on this machine or, with
`--address`, on a cluster. Network, recipe, data and loop are the notebook's, imported.

Splits: `50k/10k` trains on the first 50,000 training images and reads the last 10,000; everything was chosen there.
`60k/test` trains on all 60,000 and reads the test set. It does so after each epoch, to draw the curve; the last epoch
counts, and nothing is chosen by any of them.
"""

import argparse
import csv
import fcntl
import io
import math
import os
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from s6.model import ConvBlock, Net
from s6.utils import CPUParallel, Recipe, get_device, mnist_loaders, set_seed, test, train
from studies.speed import COURSE_BATCH, DATA, RESULTS, course_loader, current_commit, read, versions

# Accuracies in percent, of the averaged weights. The last three columns hold a value for each epoch.
COLUMNS = (
    "variant", "split", "seed", "last", "best", "lowest of last five", "first epoch at 99.4", "parameters", "epochs",
    "seconds", "device", "python", "torch", "torchvision", "commit", "settings",
    "accuracies", "raw accuracies", "losses",
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------- variants
# Name: what it changes about ours. The keys are fields of `Recipe`, or arguments of `trial`.

START = {  # the settings in use when choosing began
    "epochs": 20,
    "batch_size": 250,
    "lr": 0.2,
    "warmup": 0.2,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "average": 0.998,
    "degrees": 10.0,
    "translate": 2.0,
    "scale": 0.1,
    "shear": 5.0,
}
HALF = {"degrees": 5.0, "translate": 1.0, "scale": 0.05, "shear": 2.5}
CHOOSING = {
    "start": {},
    "batches of 125, rate 0.1": {"batch_size": 125, "lr": 0.1, "average": 0.9995},
    "3 epochs unaugmented at the end": {"fade": 3},
    "augmentation x 1.5": {"degrees": 15.0, "translate": 3.0, "scale": 0.15, "shear": 7.5},
    "elastic": {"augment": "elastic"},
    "label smoothing 0.05": {"smoothing": 0.05},
    "augmentation x 0.5, 3 epochs unaugmented at the end": {"fade": 3, **HALF},
    "augmentation x 0.5": HALF,
    "AdamW, rate 0.01": {"optim": "AdamW", "lr": 0.01, "weight_decay": 0.01},
    "5 epochs unaugmented at the end": {"fade": 5},
    "shift 1": {"translate": 1.0},
    "shift 1, shear 10": {"translate": 1.0, "shear": 10.0},
    "batches of 62, rate 0.1": {"batch_size": 62, "lr": 0.1, "average": 0.9995},
    "weight decay 2e-4": {"weight_decay": 2e-4},
    "ReLU before BatchNorm": {"net": "ReLU before BatchNorm"},
    "float32": {"dtype": torch.float32},
    "flat, then down": {"schedule": "flat, then down"},
    "not sharded": {"shards": 1},
    "shift 1, shear 10, 3 epochs unaugmented at the end": {"translate": 1.0, "shear": 10.0, "fade": 3},
    "shift 0.5, shear 10": {"translate": 0.5, "shear": 10.0},
    "rate 0.4": {"lr": 0.4},
    "rate 0.1": {"lr": 0.1},
    "shift 1, shear 10, rate 0.1": {"translate": 1.0, "shear": 10.0, "lr": 0.1},
    "shift 1, shear 10, average 0.99": {"translate": 1.0, "shear": 10.0, "average": 0.99},
    "shift 1, shear 10, ReLU on the scores": {"translate": 1.0, "shear": 10.0, "net": "ReLU on the scores"},
    "shift 1, shear 10, dropout 0.02": {"translate": 1.0, "shear": 10.0, "dropout": 0.02},
    "shift 1, shear 10, weight decay 1e-4": {"translate": 1.0, "shear": 10.0, "weight_decay": 1e-4},
}

COURSE = {  # the course's recipe
    "augment": "course",
    "shards": 1,
    "dtype": torch.float32,
    "dropout": 0.005,
    "net": "course",
    "optim": "plain SGD",
    "weight_decay": 0.0,
    "lr": 0.01,
    "schedule": "a tenth after epoch 15",
    "batch_size": COURSE_BATCH,
    "average": 0.0,
}
RUNGS = {  # from there to ours, each with the keys that it gives up
    "the course's recipe": [],
    "affine augmentation": ["augment"],
    "two shards, bfloat16": ["shards", "dtype"],
    "no dropout": ["dropout"],
    "BatchNorm before ReLU, no ReLU on the scores": ["net"],
    "one-cycle up to 0.2, Nesterov, weight decay": ["optim", "weight_decay", "lr", "schedule"],
    "batches of 250": ["batch_size"],
    "ours": ["average"],
}
LADDER, changes = {}, COURSE
for name, given_up in RUNGS.items():
    LADDER[name] = changes = {key: value for key, value in changes.items() if key not in given_up}

# The average only watches: without it the training is the same. Its figures are the raw accuracies of ours.
UNAVERAGED = {"average": 0.0}
ABLATION = {
    "ours": {},
    "no moving average": UNAVERAGED,
    "no augmentation": {"augment": "none"},
    "no BatchNorm": {"net": "no BatchNorm"},
    "no BatchNorm, a tenth of the rate": {"net": "no BatchNorm", "lr": 0.02},
    "constant rate": {"schedule": "constant"},
    "no 1×1 transition": {"net": "no transition"},
    "linear layer for the global average": {"net": "linear layer"},
    "pooling one block earlier": {"net": "pooling earlier"},
    "dropout 0.005": {"dropout": 0.005},
    "dropout 0.05": {"dropout": 0.05},
    "dropout 0.1": {"dropout": 0.1},
    "1/2 of the channels": {"width": 1 / 2},
    "3/4 of the channels": {"width": 3 / 4},
    "5/4 of the channels": {"width": 5 / 4},
}
STUDIES = {
    "choosing": ("50k/10k", {name: START | changes for name, changes in CHOOSING.items()}),
    "reporting": ("60k/test", {"ours": {}}),
    "ladder": ("60k/test", LADDER),
    "ablation": ("60k/test", ABLATION),
}


def settings(changes):
    """Return everything that sets a trial apart, as text: the recipe's fields, then the other changes."""
    return ", ".join(f"{key}={value}" for key, value in (vars(Recipe()) | changes).items())


# ------------------------------------------------------------------------------------------------------------- trial


class ReLUFirst(ConvBlock):
    """The course's block: the ReLU before the normalisation."""

    def forward(self, x):
        conv, norm, dropout = self
        return dropout(norm(F.relu(conv(x))))


def build(net="ours", width=1, dropout=0.0):
    """Return `Net` with one thing about it changed; `width` multiplies the channels between image and scores."""
    model = Net(dropout)
    layers = list(model.layers)
    blocks = [layer for layer in layers if isinstance(layer, ConvBlock)]
    if net == "no BatchNorm":
        for block in blocks:
            block[1] = nn.Identity()
    elif net in ("course", "ReLU before BatchNorm", "ReLU on the scores"):  # the first has both
        for block in blocks if net != "ReLU on the scores" else []:
            block.__class__ = ReLUFirst
        if net != "ReLU before BatchNorm":
            layers.insert(-1, nn.ReLU())  # at the nine places, before their mean
    elif net == "no transition":  # the next block takes all 16 channels
        layers[4:6] = [ConvBlock(16, 12, 3, dropout)]
    elif net == "linear layer":  # of all features, in place of nine scores and their mean
        layers[-2:] = [nn.Flatten(), nn.Linear(16 * 3 * 3, 10)]
    elif net == "pooling earlier":
        layers[2], layers[3], layers[-1] = layers[3], layers[2], nn.AvgPool2d(2)
    elif net != "ours":
        raise ValueError(f"there is no network called {net!r}")
    if width != 1:
        if net != "ours":
            raise ValueError(f"{net!r} comes in its own width only")
        for i, layer in enumerate(layers):
            if isinstance(layer, ConvBlock):
                conv = layer[0]
                inputs = 1 if layer is blocks[0] else int(width * conv.in_channels)
                layers[i] = ConvBlock(inputs, int(width * conv.out_channels), conv.kernel_size[0], dropout)
        layers[-2] = nn.Conv2d(int(width * 16), 10, 1)
    model.layers = nn.Sequential(*layers)
    return model


def elastic(images, generator, recipe, pixels=1.0):
    """A smooth random shift of each place (Simard, Steinkraus and Platt, 2003), then the recipe's augmentation."""
    field = torch.rand(len(images), 2, 5, 5, generator=generator, device=images.device) * 2 - 1
    field = F.interpolate(field, images.shape[-2:], mode="bicubic", align_corners=True) * (pixels * 2 / 28)
    grid = F.affine_grid(torch.eye(2, 3).expand(len(images), 2, 3), images.shape, align_corners=False)
    moved = F.grid_sample(images, grid.to(images) + field.permute(0, 2, 3, 1), align_corners=False)
    return recipe.augment(moved, generator)


def rate(schedule, ours, step, total, epochs):
    """Return the learning rate of a step as a share of its peak; `ours` is the recipe's."""
    if schedule == "a tenth after epoch 15":
        return 0.1 ** (step * epochs // total // 15)
    if schedule == "flat, then down":
        return min(1, (step + 1) / (0.05 * total), (total - step) / (0.5 * total))
    return {"one-cycle": ours(step), "constant": 1.0}[schedule]


def trial(
    variant, split, seed, data=DATA, *, images=None, net="ours", width=1, dropout=0.0, augment="ours", fade=0,
    optim="SGD", schedule="one-cycle", smoothing=0.0, shards=2, dtype=None, **fields,
):  # fmt: skip
    """Train, and return the row, still without its commit and settings.

    `fields` are the recipe's. `images` takes only so many of both sets, `fade` trains the last epochs on the images as
    they are, `shards` and `dtype` are for the CPU.
    """
    start, device, recipe = time.perf_counter(), get_device(), replace(Recipe(), **fields)
    set_seed(seed)
    augments = {"ours": recipe.augment, "elastic": partial(elastic, recipe=recipe), "none": None, "course": None}
    holdout = {"50k/10k": 10_000, "60k/test": 0}[split]
    loader, test_loader = mnist_loaders(
        data, recipe.batch_size, device, seed, augment=augments[augment], holdout=holdout
    )
    for part in (loader, test_loader):
        part.images, part.labels = part.images[:images], part.labels[:images]
    if augment == "course":
        loader = course_loader(len(loader.labels), 0, device, data)
    model = build(net, width, dropout).to(device)
    optimizer, scheduler, averaged = recipe.prepare(model, len(loader))
    shape = partial(rate, schedule, scheduler.lr_lambdas[0], total=recipe.epochs * len(loader), epochs=recipe.epochs)
    if optim == "AdamW":
        groups = [{key: group[key] for key in ("params", "weight_decay")} for group in optimizer.param_groups]
        optimizer = torch.optim.AdamW(groups, recipe.lr, betas=(0.9, 0.99))
    elif optim == "plain SGD":
        optimizer = torch.optim.SGD(model.parameters(), recipe.lr, recipe.momentum)
    elif optim != "SGD":
        raise ValueError(f"there is no optimizer called {optim!r}")
    scheduler = LambdaLR(optimizer, shape)
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
        *versions(device), "-", "-",
        *(" ".join(f"{x:.{n}f}" for x in values) for values, n in ((accuracies, 2), (raw, 2), (losses, 5))),
    )  # fmt: skip
    return dict(zip(COLUMNS, figures, strict=True))


# ----------------------------------------------------------------------------------------------------------- running


def stored(path):
    """Return the rows of `path`, if it is there; half a row, left by a start that was killed, is cut off."""
    if not path.exists():
        return []
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
    return read(path)


def append(path, row):
    """Write the row in one piece; in a new file the header comes before it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if not path.exists() or not path.stat().st_size:
        writer.writeheader()
    writer.writerow(row)
    with open(path, "ab", buffering=0) as file:
        file.write(text.getvalue().encode())
        os.fsync(file.fileno())


def missing(study, seeds, rows, only=None, **more):
    """Return (variant, split, seed, changes) of each trial without a row, seed by seed; `more` is changed in all."""
    split, variants = STUDIES[study]
    done = {(row["settings"], row["split"], row["seed"]) for row in rows}
    chosen = {name: variants[name] | more for name in only or variants if variants[name] != UNAVERAGED}
    jobs = [(name, split, seed, changes) for seed in seeds for name, changes in chosen.items()]
    return [job for job in jobs if (settings(job[3]), split, str(job[2])) not in done]


def run(jobs, path, address=None, data=None, share=8):
    """Run the trials with Ray, append each row as its trial ends, and return how many failed.

    A failed one raised an error, such as a loss that is not finite; it has no row. Where the cluster has a GPU, every
    trial takes a share of one.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    commit = current_commit()
    try:
        import ray
    except ImportError:
        sys.exit("Ray is missing: .venv/bin/python -m pip install --requirement studies/requirements.txt")
    if address:  # each node gets a copy of this folder, and fetches the images itself
        environment = {"working_dir": str(ROOT), "excludes": [".git", ".venv", "build", "data"]}
    else:
        environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    ray.init(address or "local", runtime_env=environment, log_to_driver=False, logging_level="ERROR")
    resources = ray.cluster_resources()
    gpus = 1 / share if resources.get("GPU") else 0
    # Ray starts a trial anew whose worker died; one that raised an error would raise it again.
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3, scheduling_strategy="SPREAD")(trial)
    data, failed = data or ("data" if address else DATA), 0
    try:
        running = {remote.remote(*job[:3], data, **job[3]): job for job in jobs}
        print(f"{len(jobs)} trials on {resources['CPU']:.0f} cores and {resources.get('GPU', 0):.0f} GPUs")
        with tqdm(total=len(jobs), unit="trial", file=sys.stdout) as bar:
            while running:
                [done], _ = ray.wait(list(running))
                variant, _, seed, changes = running.pop(done)
                name = f"{variant}, seed {seed}"
                try:
                    row = ray.get(done) | {"commit": commit, "settings": settings(changes)}
                except ray.exceptions.RayError as error:
                    failed += 1
                    bar.write(f"{name} failed: {str(error).strip().splitlines()[-1]}")
                else:
                    append(path, row)
                    bar.write(f"{name}: {row['last']} %")
                bar.update()
    finally:
        ray.shutdown()
    return failed


# ------------------------------------------------------------------------------------------------------------- tables


def rows_of(rows, split, changes):
    """Return the rows with these changes, in the order of their seeds."""
    of = split, settings(changes)
    return sorted((row for row in rows if (row["split"], row["settings"]) == of), key=lambda row: int(row["seed"]))


def finals(rows, split, changes, kind="accuracies"):
    """Return what the rows with these changes read at the last epoch, in the order of their seeds."""
    if changes == UNAVERAGED:
        changes, kind = {}, "raw accuracies"
    return [float(row[kind].split()[-1]) for row in rows_of(rows, split, changes)]


def tables(rows):
    """Yield the tables of report, ladder and ablation, for README.md, and of the choice, for studies/README.md."""
    ours = rows_of(rows, "60k/test", {})
    last, lowest = ([float(row[key]) for row in ours] for key in ("last", "lowest of last five"))
    mean = statistics.mean(last)
    lines = ["| 20 epochs, 60,000 images | wanted (%) | measured (%) | |", "|---|---|---|---|"]
    for name, wanted, value, shown in (
        (f"last epoch, mean ± sd of {len(ours)} seeds", 99.63, mean, f"{mean:.3f} ± {statistics.stdev(last):.3f}"),
        ("last epoch, lowest seed", 99.53, min(last), f"{min(last):.2f}"),
        ("last five epochs, lowest of any seed", 99.50, min(lowest), f"{min(lowest):.2f}"),
    ):
        lines.append(f"| {name} | ≥ {wanted:.2f} | {shown} | {'met' if value >= wanted else 'missed'} |")
    machines = {f"{row['device']}; Python {row['python']}, torch {row['torch']}" for row in ours}
    lines.append(f"| trained on | | {'<br>'.join(sorted(machines))} | |")
    yield "\n".join(lines)
    for title, study, against in (
        ("each step on top of those above", LADDER, "above"),
        ("ours, but", ABLATION, "ours"),
    ):
        lines = [f"| {title} | n | accuracy (%), mean ± standard error | against {against} |", "|---|---|---|---|"]
        base = None
        for name, changes in study.items():
            if not (values := finals(rows, "60k/test", changes)):
                continue
            mean = statistics.mean(values)
            error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.2f}" if len(values) > 1 else ""
            shown, difference = f"{mean:.2f}{error}", "" if base is None else f"{round(mean - base, 2) + 0.0:+.2f}"
            if max(values) - min(values) > 1:  # some learned and others did not: the mean describes none of them
                shown, difference = ", ".join(f"{x:.2f}" for x in values), ""
            lines.append(f"| {name} | {len(values)} | {shown} | {difference} |")
            if study is LADDER or base is None:
                base = mean
        yield "\n".join(lines)
    split, variants = STUDIES["choosing"]
    lines = ["| tried on 50k/10k | accuracy (%), seed by seed | loss |", "|---|---|---|"]
    for name, changes in variants.items():
        if last := finals(rows, split, changes):
            losses = statistics.mean(finals(rows, split, changes, "losses"))
            lines.append(f"| {name} | {', '.join(f'{x:.2f}' for x in last)} | {losses:.4f} |")
    yield "\n".join(lines)


def at_least_one(text):
    if int(text) < 1:
        raise ValueError  # which argparse puts into words
    return int(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*STUDIES, "tables"])
    parser.add_argument("--seeds", type=at_least_one, default=1, help="train from the seeds 1 to this one")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="of the study, by name")
    parser.add_argument("--address", help="of a Ray cluster")
    parser.add_argument("--data", help="folder of the images; on a cluster, of each node")
    parser.add_argument("--share", type=at_least_one, default=8, help="trials at once on a GPU")
    parser.add_argument(
        "--images", type=at_least_one, help="take so few only: does it run? The rows go to build/accuracy.csv"
    )
    parser.add_argument("--results", type=Path, help="another file for the rows")
    options = parser.parse_args()
    path = options.results or (ROOT / "build" if options.images else RESULTS) / "accuracy.csv"
    if options.study == "tables":
        print(*tables(read(path)), sep="\n\n")
        return
    for name in options.only or []:
        if name not in STUDIES[options.study][1]:
            parser.error(f"no variant {name!r} in {options.study}; there are: {'; '.join(STUDIES[options.study][1])}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"Another start is writing to {path}")
        more = {"images": options.images} if options.images else {}
        jobs = missing(options.study, range(1, options.seeds + 1), stored(path), options.only, **more)
        if not jobs:
            print(f"Nothing is missing: every trial has its row in {path}")
            return
        sys.exit(bool(run(jobs, path, options.address, options.data, options.share)))


if __name__ == "__main__":
    main()
