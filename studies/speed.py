"""Measure times: of an epoch of ours and of the ordinary way, and of trainings to 99.4 %.

    .venv/bin/python studies/speed.py epochs             # half an hour on two idle cores
    .venv/bin/python studies/speed.py goal --seeds 10    # whole trainings
    .venv/bin/python studies/speed.py tables             # prints the tables of both, draws results/speed.png

studies/README.md says what A, B and C are. A shared machine changes its speed. So A and B take turns with C, and their
time is divided by C's. Half a piece of C runs first, then a piece of A or B, then the other half. An epoch of B is cut
into ten pieces. An epoch of A is not, because its workers load images all the time. A measurement that has its row from
the same device is skipped.
"""

import argparse
import json
import sys
import time
from itertools import islice
from pathlib import Path
from statistics import mean, median, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from s6.model import Net
from s6.utils import Recipe, test, train
from studies.common import RESULTS, about, append, course_loader, get_device, loaders, on, read

# ------------------------------------------------------------------------------------------------- seconds of an epoch

A, B = {"way": "A", "batch_size": 512, "dropout": 0.005}, {"way": "B"}
WORKERS = (0, 1, 2, 4) if get_device().type == "cpu" else (0, 1, 2, 4, 8)  # of A
TURNS = {"A": A, "A, no dropout": A | {"dropout": 0.0}, "B": B}  # arguments of `measure`
TURNS |= {f"B, {n:,} images": B | {"share": n / 60_000} for n in (15_000, 30_000)}
TURNS |= {f"B, batches of {n:,}": B | {"batch_size": n} for n in (125, 512, 1000)}


def prepared(way, images, workers=0, batch_size=Recipe.batch_size, dropout=0.0):
    """Return the batches of an epoch, and a function that trains on given batches."""
    device, recipe = get_device(), Recipe(batch_size=batch_size)
    model = Net(dropout).to(device) if way == "A" else on(device, Net(dropout))
    if way == "A":
        batches = course_loader(images, batch_size, workers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    else:
        batches, _ = loaders(recipe, device, "60k/test", images)
        batches = [next(iter(batches))] * len(batches) if way == "C" else batches
        optimizer = recipe.optimizer(model)
    scheduler, averaged = recipe.scheduler(optimizer, len(batches)), recipe.averaged(model)

    def steps(batches):
        if way == "B":
            train(model, device, batches, optimizer, F.nll_loss, scheduler=scheduler, averaged=averaged)
            return
        for data, target in batches:
            data, target = data.to(device), target.to(device)
            output = model(data)
            loss = F.nll_loss(output, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if way == "A":
                loss.item(), output.argmax(1).eq(target).sum().item()
        loss.item()  # waits for the device

    return batches, steps


def measure(way, images, workers, share=1.0, **setting):
    """Return the seconds of an epoch, and of the epoch of C that took turns with it."""
    batches, steps = prepared(way, images := int(share * images), workers, **setting)
    floor, floor_steps = prepared("C", images)
    steps(islice(batches, 1 + len(batches) // 10))  # to warm up
    floor_steps(floor[: 1 + len(floor) // 10])
    seconds = [0.0, 0.0]  # of C, then of the epoch itself
    pieces, epoch = (1, None) if way == "A" else (min(10, len(batches)), iter(batches))
    half = floor[: max(1, len(floor) // pieces // 2)]
    for i in range(pieces):
        count = len(batches) * (i + 1) // pieces - len(batches) * i // pieces
        part = islice(epoch, count) if epoch else batches
        for turn, (run, some) in enumerate([(floor_steps, half), (steps, part), (floor_steps, half)]):
            start = time.perf_counter()
            run(some)
            seconds[turn % 2] += time.perf_counter() - start
    return {"seconds": seconds[1], "seconds of C": seconds[0]}


def row(path, key, function, **arguments):
    """Return the row with this key. If there is none, call `function` and append its result."""
    if old := [one for one in read(path) if key.items() <= one.items()]:
        return old[0]
    new = key | {name: f"{value:.4g}" for name, value in function(**arguments).items()} | about(get_device())
    append(path, new)
    print(*list(new.values())[:-4], sep=", ", flush=True)
    return new


def epochs(path, images):
    """Find the best number of workers for A on a quarter of an epoch. Then measure everything in three turns."""
    ratios, key = {}, {"device": about(get_device())["device"]}
    for n in WORKERS:
        name = {"name": f"A, 15,000 images, {n} workers", "turn": "1"}
        quarter = row(path, key | name, measure, images=images // 4, workers=n, **A)
        ratios[n] = float(quarter["seconds"]) / float(quarter["seconds of C"])
    workers = min(ratios, key=ratios.get)
    for turn in "123":
        for name, setting in TURNS.items():
            row(path, key | {"name": name, "turn": turn}, measure, images=images, workers=workers, **setting)


# ------------------------------------------------------------------------------------------------------ time to 99.4 %

# Chosen on 50k/10k. Rows name the augmentation, too, because rows of a weaker one must not count as done.
GOAL = {"epochs": 4, "batch_size": 125, "lr": 0.03, "warmup": 0.1, "sgd_lr": 0.2}
GOAL |= {"degrees": Recipe.degrees, "shear": Recipe.shear}


class Muon(torch.optim.Optimizer):
    """Muon for convolutions, as in Jordan's airbench94_muon. For other parameters it is SGD with Nesterov's momentum.

    torch.optim.Muon takes only matrices.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad)
                update = p.grad.add(buffer, alpha=group["momentum"])
                if p.ndim > 1:
                    update = orthogonalized(update.flatten(1)).view_as(p)
                    p.mul_(len(p) ** 0.5 / p.norm())  # instead of weight decay
                p.sub_(update, alpha=group["lr"])


def orthogonalized(matrix):
    """Return the matrix with nearly orthonormal rows: five Newton-Schulz steps with Jordan's coefficients."""
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def training(seed, split, images, sgd_lr, **fields):
    """Train and test after each epoch. Return the last accuracy, the last loss, and the seconds.

    Muon trains the convolution kernels at the recipe's rate. SGD trains the rest at the rate `sgd_lr`.
    """
    device, recipe = get_device(), Recipe(seed=seed, **fields)
    loader, test_loader = loaders(recipe, device, split, images)
    torch.manual_seed(seed)
    model = on(device, Net())
    groups = zip(recipe.optimizer(model).param_groups, (recipe.lr, sgd_lr), strict=True)  # kernels, the rest
    optimizer = Muon([{"params": group["params"], "lr": lr} for group, lr in groups], {"momentum": recipe.momentum})
    scheduler, averaged = recipe.scheduler(optimizer, len(loader)), recipe.averaged(model)
    start = time.perf_counter()
    for _ in range(recipe.epochs):
        train(model, device, loader, optimizer, F.nll_loss, scheduler=scheduler, averaged=averaged)
        (loss,), (accuracy,) = test(averaged, device, test_loader, F.nll_loss)
    return {"accuracy": accuracy, "loss": loss, "seconds": time.perf_counter() - start}


# ------------------------------------------------------------------------------------------------------------- results


def grouped(rows, names, figures):
    """Group the rows by the columns `names`. Return for each group the sorted numbers of the columns `figures`."""
    groups = {}
    for one in rows:
        groups.setdefault(tuple(one[name] for name in names), []).append([float(one[name]) for name in figures])
    return {key: [sorted(column) for column in zip(*group, strict=True)] for key, group in groups.items()}


def tables(folder):
    """Print the tables of each device, and draw bars: median, lowest and highest."""
    rows = [one | {"ratio": float(one["seconds"]) / float(one["seconds of C"])} for one in read(folder / "speed.csv")]
    of = grouped(rows, ("device", "name"), ("seconds", "ratio"))
    devices = list(dict.fromkeys(device for device, _ in of))
    fig, panels = plt.subplots(max(1, len(devices)), figsize=(9, 6), layout="constrained", squeeze=False)
    for axes, device in zip(panels.flat, devices, strict=False):
        mid = {}
        print(f"| an epoch on {device} | seconds | times C | range |\n" + "|---" * 4 + "|")
        for name, (seconds, ratio) in ((name, of[there, name]) for there, name in of if there == device):
            mid[name] = times = median(ratio)
            print(f"| {name} | {median(seconds):.3g} | {times:.2f} | {ratio[0]:.2f} to {ratio[-1]:.2f} |")
            if "images" not in name:
                axes.barh(name, times, xerr=[[times - ratio[0]], [ratio[-1] - times]], color=f"C{'AB'.index(name[0])}")
        axes.axvline(1, color="black", linestyle="--")
        axes.set(title=f"The ordinary way (A) and ours (B) on {device}", ylim=axes.get_ylim()[::-1])
        axes.set_xlabel("time of an epoch / time of C (median, lowest, highest)")
        ratios = {"B / A": ("A", "B"), "B / A without A's dropout": ("A, no dropout", "B")}
        ratios["and both in batches of 512"] = "A, no dropout", "B, batches of 512"
        print("\n| | measured |\n|---|---|")
        for name, (a, b) in ratios.items():
            if a in mid and b in mid:
                print(f"| {name} | 1 / {mid[a] / mid[b]:.1f} |")
        print()
    fig.savefig(folder / "speed.png", dpi=110)
    of = grouped(read(folder / "goal.csv"), ("settings", "split", "device"), ("accuracy", "loss", "seconds"))
    if of:
        print("| settings | split | device | accuracy (%) | lowest | loss | seconds | seeds |\n" + "|---" * 8 + "|")
    for key, (accuracy, loss, seconds) in of.items():
        sd = stdev(accuracy) if len(accuracy) > 1 else float("nan")
        print(f"| {' | '.join(key)} | {mean(accuracy):.2f} ± {sd:.2f} | {accuracy[0]:.2f} ", end="")
        print(f"| {mean(loss):.4f} | {median(seconds):.1f} | {len(loss)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("epochs", "goal", "tables"))
    parser.add_argument("--split", choices=("60k/test", "50k/10k"), default="60k/test", help="for goal")
    parser.add_argument("--seeds", type=int, default=1, help="for goal: the last seed")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="for goal: other settings")
    parser.add_argument("--images", type=int, default=60_000, help="for a quick check; needs other --results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of rows and picture")
    options = parser.parse_args()
    assert options.images == 60_000 or options.results != RESULTS, "with --images, choose other --results"
    if options.part == "tables":
        return tables(options.results)
    if options.part == "epochs":
        return epochs(options.results / "speed.csv", options.images)
    settings = GOAL | {key: json.loads(value) for key, value in (item.split("=") for item in options.set)}
    text = ", ".join(f"{key}={value}" for key, value in settings.items())
    settings |= {"split": options.split, "images": options.images}
    for n in range(1, options.seeds + 1):
        key = {"settings": text, "split": options.split, "seed": f"{n}", "device": about(get_device())["device"]}
        row(options.results / "goal.csv", key, training, seed=n, **settings)


if __name__ == "__main__":
    main()
