"""How accurate is the network, over many seeds, and what is each layer and trick worth?

    .venv/bin/python studies/accuracy.py report --seeds 20    # the recipe, on 60k/test
    .venv/bin/python studies/accuracy.py ladder --seeds 5     # from the course's recipe to ours, step by step
    .venv/bin/python studies/accuracy.py ablation --seeds 5   # ours with one thing changed
    .venv/bin/python studies/accuracy.py widths --seeds 5     # ours with fewer and with more channels
    .venv/bin/python studies/accuracy.py choosing --seeds 3   # on 50k/10k

A trial trains one variant from one seed, and becomes a row of results/accuracy.csv when it ends; what has its row, from
a CPU or from a GPU, is not run there again. As many as `--workers` says run at once, each on one thread, and in float32
(a GPU's convolutions in TF32). Network, recipe, data and loop are the notebook's.

Splits: `50k/10k` trains on the first 50,000 training images and reads the last 10,000; everything was chosen there.
`60k/test` trains on all 60,000 and reads the test set. It does so after each epoch, to draw the curve; the last epoch
counts, and nothing is chosen by any of them.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from s6 import utils
from s6.model import ConvBlock, Net
from s6.utils import Recipe, test, train
from studies.common import RESULTS, about, append, course_loader, get_device, loaders, on_cpu, read

# ---------------------------------------------------------------------------------------------------------- variants
# Name: what it changes about ours. The keys are fields of `Recipe`, or arguments of `trial`.

COURSE = {  # the course's recipe
    "augment": "course",
    "dropout": 0.005,
    "net": "course",
    "plain_sgd": True,
    "weight_decay": 0.0,
    "lr": 0.01,
    "schedule": "a tenth after epoch 15",
    "batch_size": 512,
    "average": 0.0,
}
RUNGS = {  # from there to ours, each with the keys that it takes from ours, or changes once more
    "the course's recipe": {},
    "affine augmentation": {"augment": None},
    "no dropout": {"dropout": None},
    "BatchNorm before ReLU, no ReLU on the scores": {"net": "ReLU"},
    "one-cycle up to 0.2, Nesterov, weight decay": dict.fromkeys(("plain_sgd", "weight_decay", "lr", "schedule")),
}
LADDER, changes = {}, COURSE
for name, step in RUNGS.items():
    LADDER[name] = changes = {key: value for key, value in (changes | step).items() if value is not None}

# Then batches of 250, SiLU and the moving average. The average has no part in the training: the accuracies of the first
# two are those of the weights themselves in these.
LADDER |= {"ReLU for SiLU": {"net": "ReLU"}, "ours": {}}
ABLATION = {  # without "no moving average", for the same reason
    "ours": {},
    "no augmentation": {"augment": "none"},
    "ReLU for SiLU": {"net": "ReLU"},
    "no BatchNorm, He's first weights, a quarter of the rate": {"net": "no BatchNorm", "lr": 0.05},
    "constant rate": {"schedule": "constant"},
    "no 1×1 transition": {"net": "no transition"},
    "linear layer for the global average": {"net": "linear layer"},
    "pooling one block earlier": {"net": "pooling earlier"},
    "dropout 0.05": {"dropout": 0.05},
    "bfloat16": {"bfloat16": True},
}
WIDTHS = {f"{width:g} of the channels": {"width": width} for width in (0.375, 0.5, 0.625, 0.75, 0.875, 1.25, 1.375)}
STUDIES = {
    "choosing": ("50k/10k", {"ours": {}}),
    "report": ("60k/test", {"ours": {}}),
    "ladder": ("60k/test", LADDER),
    "ablation": ("60k/test", ABLATION),
    "widths": ("60k/test", WIDTHS),
}


def settings(changes):
    """Return everything that sets a trial apart but its seed, as text: the recipe's fields, then the other changes."""
    return ", ".join(f"{key}={value}" for key, value in (vars(Recipe()) | changes).items() if key != "seed")


# ------------------------------------------------------------------------------------------------------------- trial


class ReLUBlock(ConvBlock):
    """Ours with the ReLU for the SiLU."""

    def forward(self, x):
        conv, norm, dropout = self
        return dropout(F.relu(norm(conv(x))))


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
            nn.init.kaiming_normal_(block[0].weight)  # He et al., 2015: torch's are so small that nothing is learnt
            nn.init.zeros_(block[0].bias)
    elif net in ("ReLU", "course"):
        for block in blocks:
            block.__class__ = ReLUBlock if net == "ReLU" else ReLUFirst
        if net == "course":
            layers.insert(-1, nn.ReLU())  # on the scores, before their mean
    elif net == "no transition":  # the next block takes all 16 channels
        layers[4:6] = [ConvBlock(16, 12, 3, dropout)]
    elif net == "linear layer":  # of all features, in place of nine scores and their mean
        layers[-2:] = [nn.Flatten(), nn.Linear(16 * 3 * 3, 10)]
    elif net == "pooling earlier":
        layers[2], layers[3], layers[-1] = layers[3], layers[2], nn.AvgPool2d(2)
    elif net != "ours":
        raise ValueError(f"there is no network called {net!r}")
    if width != 1:
        for i, layer in enumerate(layers):
            if isinstance(layer, ConvBlock):
                conv = layer[0]
                inputs = 1 if i == 0 else int(width * conv.in_channels)
                layers[i] = ConvBlock(inputs, int(width * conv.out_channels), conv.kernel_size[0], dropout)
        layers[-2] = nn.Conv2d(int(width * 16), 10, 1)
    model.layers = nn.Sequential(*layers)
    return model


def rate(schedule, ours, step, steps_per_epoch):
    """Return the learning rate of a step as a share of its peak; `ours` is the recipe's."""
    tenth = 0.1 if step // steps_per_epoch >= 15 else 1.0
    return {"one-cycle": ours(step), "constant": 1.0, "a tenth after epoch 15": tenth}[schedule]


def trial(
    variant, split, seed, *, images=None, net="ours", width=1, dropout=0.0, augment="ours", plain_sgd=False,
    schedule="one-cycle", bfloat16=False, **fields,
):  # fmt: skip
    """Train, and return the row, its settings still empty. `fields` are the recipe's.

    `images` takes only so many of both sets, to see whether it runs.
    """
    start, device, recipe = time.process_time(), get_device(), Recipe(seed=seed, **fields)
    # On every CPU in float32, also where the notebook would multiply in bfloat16.
    utils.cpu_dtype = lambda: torch.bfloat16 if bfloat16 else torch.float32
    loader, test_loader = loaders(recipe, device, split, images)
    if augment == "none":
        loader.augment = None
    elif augment == "course":
        loader = course_loader(len(loader.labels), recipe.batch_size)
    torch.manual_seed(seed)
    model = build(net, width, dropout).to(device, memory_format=torch.channels_last)
    optimizer, scheduler, averaged = recipe.prepare(model, len(loader))
    if plain_sgd:
        optimizer = torch.optim.SGD(model.parameters(), recipe.lr, recipe.momentum)
    shape = partial(rate, schedule, scheduler.lr_lambdas[0], steps_per_epoch=len(loader))
    scheduler = LambdaLR(optimizer, shape)
    losses, accuracies, raw = [], [], []
    for _ in range(recipe.epochs):
        train(model, device, loader, optimizer, F.nll_loss, scheduler=scheduler, averaged=averaged)
        test(averaged, device, test_loader, F.nll_loss, losses, accuracies)
        if split == "60k/test":
            test(model, device, test_loader, F.nll_loss, None, raw)
    return {  # accuracies in percent, of the averaged weights; the last three columns hold a value for each epoch
        "variant": variant,
        "split": split,
        "seed": seed,
        "last": f"{accuracies[-1]:.2f}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": f"{time.process_time() - start:.0f}",  # of the processor, whatever else it did
        **about(device),
        "settings": "",
        "accuracies": " ".join(f"{x:.2f}" for x in accuracies),
        "raw accuracies": " ".join(f"{x:.2f}" for x in raw),
        "losses": " ".join(f"{x:.5f}" for x in losses),
    }


# ----------------------------------------------------------------------------------------------------------- running


def missing(study, seeds, rows, only=None, **more):
    """Return (variant, split, seed, changes) of each trial without a row from such a device, seed by seed.

    Devices are of two kinds, CPUs and GPUs: they draw different augmentations, and in bfloat16 the notebook multiplies
    only on a CPU. `more` is changed in all trials.
    """
    split, variants = STUDIES[study]
    cpu = get_device().type == "cpu"
    done = {(row["settings"], row["split"], row["seed"]) for row in rows if on_cpu(row) == cpu}
    chosen = {name: variants[name] | more for name in only or variants if cpu or "bfloat16" not in variants[name]}
    jobs = [(name, split, seed, changes) for seed in seeds for name, changes in chosen.items()]
    return [job for job in jobs if (settings(job[3]), split, str(job[2])) not in done]


def run(jobs, path, workers):
    """Run the trials, `workers` at once, and append each row as its trial ends; return how many failed.

    A failed one raised an error, such as a loss that is not finite; it has no row.
    """
    os.environ |= {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}  # for the workers, which start anew
    commit, failed = about(get_device())["commit"], 0
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        running = {pool.submit(trial, *job[:3], **job[3]): job for job in jobs}
        for done in tqdm(as_completed(running), total=len(jobs), unit="trial", disable=False):
            variant, _, seed, changes = running[done]
            try:
                row = done.result() | {"commit": commit, "settings": settings(changes)}
            except Exception as error:
                failed += 1
                tqdm.write(f"{variant}, seed {seed} failed: {error}")
            else:
                append(path, row)
                tqdm.write(f"{variant}, seed {seed}: {row['last']} %")
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, default=1, help="train from the seeds 1 to this one")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="of the study, by name")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="trials at once; one a core")
    parser.add_argument("--results", type=Path, default=RESULTS / "accuracy.csv", help="the file for the rows")
    parser.add_argument("--images", type=int, help="take so few only, to see whether it runs; name other --results")
    options = parser.parse_args()
    for name in options.only or []:
        if name not in STUDIES[options.study][1]:
            parser.error(f"no variant {name!r} in {options.study}; there are: {'; '.join(STUDIES[options.study][1])}")
    more = {"images": options.images} if options.images else {}
    jobs = missing(options.study, range(1, options.seeds + 1), read(options.results), options.only, **more)
    sys.exit(bool(run(jobs, options.results, options.workers)))


if __name__ == "__main__":
    main()
