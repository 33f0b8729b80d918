"""Train variants of the recipe over many seeds, and keep the accuracy of each training as a row of a CSV file.

    .venv/bin/python studies/accuracy.py ablation --seeds 5

studies/README.md describes the studies and the rows. A trial is one variant with one seed. A trial is skipped if the
file already has its row from the same kind of device, CPU or GPU. Each trial runs on one thread.

There are two splits. `50k/10k` trains on the first 50,000 training images and tests on the last 10,000. All choices
were made there. `60k/test` trains on all 60,000 and tests on the test set after each epoch. The last epoch counts.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from s6.model import ConvBlock, Net
from s6.utils import Recipe, test, train
from studies.common import RESULTS, about, append, course_loader, get_device, loaders, on, on_cpu, read

# ---------------------------------------------------------------------------------------------------------- variants
# Each variant has a name, and what it changes. The keys are fields of `Recipe` or arguments of `trial`.

SGD = {"plain_sgd": True, "weight_decay": 0.0, "lr": 0.01, "schedule": "a tenth after epoch 15"}  # as in the course
LARGE = {"batch_size": 512, "averaged": False}  # the course's batches, and no moving average
LADDER = {  # from the course's recipe to ours, one step at a time
    "the course's recipe": {"augment": "course", "dropout": 0.005, "net": "course", **SGD, **LARGE},
    "affine augmentation": {"dropout": 0.005, "net": "course", **SGD, **LARGE},
    "no dropout": {"net": "course", **SGD, **LARGE},
    "BatchNorm before ReLU, no ReLU on the scores": {"net": "ReLU", **SGD, **LARGE},
    "one-cycle up to 0.2, Nesterov, weight decay": {"net": "ReLU", **LARGE},
    # The next steps are batches of 250, SiLU and the moving average. The first two are the "raw accuracies" of the next
    # two variants, because these are without the average.
    "ReLU instead of SiLU": {"net": "ReLU"},
    "ours": {},
}
ABLATION = {  # "no moving average" needs no trials: see "raw accuracies" above
    "no augmentation": {"augment": "none"},
    "ReLU instead of SiLU": {"net": "ReLU"},
    "no BatchNorm, He's first weights, a quarter of the rate": {"net": "no BatchNorm", "lr": 0.05},
    "constant rate": {"schedule": "constant"},
    "no 1×1 transition": {"net": "no transition"},
    "linear layer instead of the global average": {"net": "linear layer"},
    "pooling one block earlier": {"net": "pooling earlier"},
    "dropout 0.05": {"dropout": 0.05},
}
WIDTHS = {f"{width:g} of the channels": {"width": width} for width in (0.375, 0.5, 0.625, 0.75, 0.875, 1.25, 1.375)}
NEXT = {  # the course's next assignment: fewer than 8,000 parameters, at most 15 epochs
    f"{width:g} of the channels, 15 epochs": {"width": width, "epochs": 15} for width in (0.75, 0.875)
}
STUDIES = {
    "choosing": ("50k/10k", {"ours": {}}),
    "report": ("60k/test", {"ours": {}}),
    "ladder": ("60k/test", LADDER),
    "ablation": ("60k/test", {"ours": {}} | ABLATION),
    "widths": ("60k/test", WIDTHS),
    "next": ("60k/test", NEXT),
}


def settings(changes):
    """Return all settings of a trial except the seed, as text. This text identifies the rows of a variant."""
    return ", ".join(f"{key}={value}" for key, value in (vars(Recipe()) | changes).items() if key != "seed")


# ------------------------------------------------------------------------------------------------------------- trial


def build(net="ours", width=1.0, dropout=0.0):
    """Return `Net` with one thing changed."""
    activation = F.relu if net == "ReLU" else F.silu
    model = Net(dropout, activation, width)
    layers = list(model.layers)
    blocks = [i for i, layer in enumerate(layers) if isinstance(layer, ConvBlock)]
    if net == "no BatchNorm":
        for block in (layers[i] for i in blocks):
            block.norm = nn.Identity()
            nn.init.kaiming_normal_(block.conv.weight)  # He et al., 2015. With torch's weights it learns nothing
            nn.init.zeros_(block.conv.bias)
    elif net == "course":
        for i in blocks:
            layers[i] = nn.Sequential(layers[i].conv, nn.ReLU(), layers[i].norm, layers[i].dropout)
        layers.insert(-1, nn.ReLU())  # on the scores
    elif net == "no transition":  # the next block takes all 16 channels
        layers[4:6] = [ConvBlock(16, 12, 3, dropout, activation)]
    elif net == "linear layer":
        layers[-2:] = [nn.Flatten(), nn.Linear(16 * 3 * 3, 10)]
    elif net == "pooling earlier":
        layers[2], layers[3], layers[-1] = layers[3], layers[2], nn.AvgPool2d(2)
    elif net not in ("ours", "ReLU"):
        raise ValueError(f"there is no network called {net!r}")
    model.layers = nn.Sequential(*layers)
    return model


def trial(
    variant, split, seed, *, images=None, net="ours", width=1.0, dropout=0.0, augment="ours", plain_sgd=False,
    schedule="one-cycle", averaged=True, **fields,
):  # fmt: skip
    """Train once and return the row without its settings. `fields` go to `Recipe`; `images` limits both sets."""
    start, device, recipe = time.process_time(), get_device(), Recipe(seed=seed, **fields)
    loader, test_loader = loaders(recipe, device, split, images)
    if augment == "none":
        loader.augment = None
    elif augment == "course":
        loader = course_loader(len(loader.labels), recipe.batch_size)
    torch.manual_seed(seed)
    model = on(device, build(net, width, dropout))
    optimizer = recipe.optimizer(model)
    if plain_sgd:
        optimizer = torch.optim.SGD(model.parameters(), recipe.lr, recipe.momentum, fused=True)
    scheduler = recipe.scheduler(optimizer, len(loader))
    if schedule != "one-cycle":
        late = {"constant": 1.0, "a tenth after epoch 15": 0.1}[schedule]
        scheduler = LambdaLR(optimizer, lambda step: late if step >= 15 * len(loader) else 1.0)
    averaged = recipe.averaged(model) if averaged else None
    losses, accuracies, raw = [], [], []
    extras = {"scheduler": scheduler, "averaged": averaged, "show_bar": False}
    for _ in range(recipe.epochs):
        train(model, device, loader, optimizer, F.nll_loss, **extras)
        test(averaged or model, device, test_loader, F.nll_loss, losses, accuracies)
        if split == "60k/test":
            test(model, device, test_loader, F.nll_loss, None, raw)
    return {  # accuracies are in percent; "raw" ones are without the moving average
        "variant": variant,
        "split": split,
        "seed": seed,
        "last": f"{accuracies[-1]:.2f}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": f"{time.process_time() - start:.0f}",  # this is processor time
        **about(device),
        "accuracies": " ".join(f"{x:.2f}" for x in accuracies),
        "raw accuracies": " ".join(f"{x:.2f}" for x in raw),
        "losses": " ".join(f"{x:.5f}" for x in losses),
    }


# ----------------------------------------------------------------------------------------------------------- running


def missing(study, seeds, rows, only=None, **more):
    """Return (variant, split, seed, changes) of each trial without a row from this kind of device, CPU or GPU.

    `more` has changes for all trials.
    """
    split, variants = STUDIES[study]
    cpu = get_device().type == "cpu"
    done = {(row["settings"], row["split"], row["seed"]) for row in rows if on_cpu(row) == cpu}
    chosen = {name: variants[name] | more for name in only or variants}
    jobs = [(name, split, seed, changes) for seed in seeds for name, changes in chosen.items()]
    return [job for job in jobs if (settings(job[3]), split, str(job[2])) not in done]


def run(jobs, path, workers):
    """Run the trials, `workers` at once. Append each row when its trial ends. Return how many trials failed."""
    commit, failed = about(get_device())["commit"], 0
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
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
    parser.add_argument("--seeds", type=int, default=1, help="the last seed (default: 1)")
    parser.add_argument("--first-seed", type=int, default=1, help="the first seed (default: 1)")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="only these variants")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="trials at once (default: one for each core)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "accuracy.csv", help="the CSV file")
    options = parser.parse_args()
    seeds = range(options.first_seed, options.seeds + 1)
    jobs = missing(options.study, seeds, read(options.results), options.only)
    sys.exit(bool(run(jobs, options.results, options.workers)))


if __name__ == "__main__":
    main()
