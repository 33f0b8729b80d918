"""How fast is the training, beside the ordinary way and beside what the machine allows, and how soon is it at 99.4 %?

    .venv/bin/python studies/speed.py epochs             # half an hour on two cores that do nothing else
    .venv/bin/python studies/speed.py goal --seeds 10    # the short schedule, one seed after the other
    .venv/bin/python studies/speed.py goal --split 50k/10k --set epochs=5 lr=0.02    # how its settings were chosen
    .venv/bin/python studies/speed.py tables             # prints the rows of both, draws results/speed.png

- A, the ordinary way, is the course's: images through PIL one by one, a DataLoader at its best number of workers, plain
  SGD, two numbers read from the device in each step. Then without its dropout, which one thread draws on a CPU, then
  with freed memory kept as well: beside B in batches of 512 only loading and loop differ, their layout and type too.
- B, ours, trains as the notebook does, freed memory kept; with fewer images and in other batches, to see how it grows.
- C, the floor, is B's forward, backward and step on one batch that stays. Then the levers: C with one thing changed.

They take turns, three each, B and C nine, so that a slow minute of the machine hits them all. A turn is a process,
because how memory is freed is settled when one starts; it trains two epochs, and the second one counts. Its row is
written when it ends, to speed.csv or goal.csv; what has its row from this device is not run again.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, median, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from s6.model import Net
from s6.utils import Loader, Recipe, cpu_dtype, load_mnist, mnist_loaders, test, train
from studies.common import DATA, RESULTS, about, append, course_loader, get_device, read

# ------------------------------------------------------------------------------------------------- seconds of an epoch
# Name: the arguments of `measure`; `kept` is one of `row`.

A, B, C = {"way": "A", "batch_size": 512, "dropout": 0.005, "kept": False}, {"way": "B"}, {"way": "C"}
PLAIN = A | {"dropout": 0.0}
TURNS = {"A": A, "A, no dropout": PLAIN, "A, no dropout, memory kept": PLAIN | {"kept": True}, "B": B}
TURNS |= {f"B, {n:,} images": B | {"share": n / 60_000} for n in (15_000, 30_000)}
TURNS |= {f"B, batches of {n:,}": B | {"batch_size": n} for n in (125, 500, 512, 1000)}
TURNS |= {"C": C, "C, dropout 0.005": C | {"dropout": 0.005}, "C, freed memory given back": C | {"kept": False}}
TURNS |= {f"C, {lever}": C | {"lever": lever} for lever in ("no channels_last", "torch.compile")}
TURNS |= {"C, float32": C | {"lever": "float32"}} if cpu_dtype() == torch.bfloat16 else {}  # elsewhere C is


def measure(way, images, workers, batch_size=Recipe.batch_size, dropout=0.0, share=1.0, lever=None):
    """Train one step and two epochs; return when the step had ended, the seconds of the last epoch, peak memory."""
    device, recipe, images = get_device(), Recipe(batch_size=batch_size), int(share * images)
    layout = torch.contiguous_format if way == "A" or lever == "no channels_last" else torch.channels_last
    model = Net(dropout).to(device, memory_format=layout)
    forward = torch.compile(model) if lever == "torch.compile" else model
    dtype = torch.float32 if way == "A" or lever == "float32" or device.type != "cpu" else cpu_dtype()  # as in `train`
    if way == "A":
        batches = course_loader(images, batch_size, workers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    else:
        batches, _ = mnist_loaders(recipe, device, DATA)
        batches.images, batches.labels = batches.images[:images], batches.labels[:images]
        optimizer, scheduler, averaged = recipe.prepare(model, len(batches))
        batches = [next(iter(batches))] * len(batches) if way == "C" else batches

    def epoch(batches):
        if way == "B":
            return train(model, device, batches, optimizer, F.nll_loss, scheduler=scheduler, averaged=averaged)
        model.train()
        for data, target in batches:
            data, target = data.to(device), target.to(device)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                output = forward(data).float()
            loss = F.nll_loss(output, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if way == "A":
                loss.item(), output.argmax(1).eq(target).sum().item()
        loss.item()  # waits for the device

    ends = []
    for part in ([next(iter(batches))], batches, batches):
        epoch(part)
        ends.append(time.time())
    # Of A without its workers. getrusage would count what the parent held when it started this process.
    memory = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10
    memory = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else memory
    return {"seconds": ends[2] - ends[1], "first step": ends[0], "MiB": memory}


def row(path, columns, key, function, until, kept=True, **arguments):
    """Return the row with `key` from this device, or append it with what a process of its own gets from `function`."""
    for old in read(path):
        if (key | {"device": columns["device"]}).items() <= old.items():
            return old
    # Else glibc gives freed memory back after each step, and the next one maps it anew, page by page.
    keep = {"MALLOC_MMAP_THRESHOLD_": f"{2**25}", "MALLOC_TRIM_THRESHOLD_": f"{2**31 - 1}"}
    env = {name: value for name, value in os.environ.items() if name not in keep} | (keep if kept else {})
    env["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # every compilation takes what the first one takes
    call, start = [sys.executable, __file__, "child", json.dumps([function, arguments])], time.time()
    child = subprocess.run(call, stdout=subprocess.PIPE, env=env)
    if child.returncode and arguments.get("lever") == "torch.compile":
        return print("torch.compile is left out: it fails here, as said above. Is there a C++ compiler?", flush=True)
    child.check_returncode()
    figures = json.loads(child.stdout.splitlines()[-1])  # after the bars of `train`
    figures[until] -= start  # a time of day becomes seconds from the command
    new = key | {name: f"{value:.4g}" for name, value in figures.items()} | columns
    append(path, new)
    print(*list(new.values())[: -len(columns)], sep=", ", flush=True)
    return new


def epochs(path, columns, images):
    """Find the best number of workers on a quarter of an epoch, then take the turns."""
    seconds = {}
    for n in (0, 1, 2, 4):
        key = {"name": f"A, 15,000 images, {n} workers", "turn": "1"}
        quarter = row(path, columns, key, "measure", "first step", images=images // 4, workers=n, **A)
        seconds[n] = float(quarter["seconds"])
    workers = min(seconds, key=seconds.get)
    turns = [(name, turn) for turn in "123" for name in TURNS]
    turns += [(name, turn) for turn in "456789" for name in ("B", "C")]  # which differ by little
    for name, turn in turns:
        key = {"name": name, "turn": turn}
        row(path, columns, key, "measure", "first step", images=images, workers=workers, **TURNS[name])


# ------------------------------------------------------------------------------------------------------ time to 99.4 %

SHORT = {"epochs": 4, "batch_size": 125, "lr": 0.03, "warmup": 0.1, "sgd_lr": 0.2}  # chosen on 50k/10k


class Muon(torch.optim.Optimizer):
    """Jordan's Muon for convolutions, as in his airbench94_muon, and SGD for the rest; both with Nesterov's momentum.

    `torch.optim.Muon` takes matrices only. In place of weight decay, weights keep the norm of orthonormal rows.
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
                    p.mul_(len(p) ** 0.5 / p.norm())
                p.sub_(update, alpha=group["lr"])


def orthogonalized(matrix):
    """Make the rows, no more than columns, about orthonormal: five Newton-Schulz steps, Jordan's coefficients."""
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def short(seed, split, images, sgd_lr, **fields):
    """Train with the short schedule and test once; return accuracy, loss and the time when they were known."""
    device, recipe = get_device(), Recipe(seed=seed, **fields)
    loader, test_loader = mnist_loaders(recipe, device, DATA)
    if split == "50k/10k":
        test_loader = Loader(loader.images[50_000:], loader.labels[50_000:], recipe.batch_size)
        loader.images, loader.labels = loader.images[:50_000], loader.labels[:50_000]
    loader.images, loader.labels = loader.images[:images], loader.labels[:images]
    torch.manual_seed(seed)
    model = Net().to(device, memory_format=torch.channels_last)
    optimizer, scheduler, averaged = recipe.prepare(model, len(loader))
    groups = zip(optimizer.param_groups, (recipe.lr, sgd_lr), strict=True)  # convolutions, the rest
    optimizer = Muon([{"params": group["params"], "lr": lr} for group, lr in groups], {"momentum": recipe.momentum})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scheduler.lr_lambdas[0])
    for _ in range(recipe.epochs):
        train(model, device, loader, optimizer, F.nll_loss, scheduler=scheduler, averaged=averaged)
    (loss,), (accuracy,) = test(averaged, device, test_loader, F.nll_loss)
    return {"accuracy": accuracy, "loss": loss, "seconds": time.time()}


# ------------------------------------------------------------------------------------------------------------- results


def grouped(rows, names, figures):
    """Return {what the columns `names` say: for each of the columns `figures` its numbers, ascending}."""
    groups = {}
    for one in rows:
        groups.setdefault(tuple(one[name] for name in names), []).append([float(one[name]) for name in figures])
    return {key: [sorted(column) for column in zip(*group, strict=True)] for key, group in groups.items()}


def tables(folder):
    """Print the tables of each device, and draw its bars: medians, lowest and highest."""
    of = grouped(read(folder / "speed.csv"), ("device", "name"), ("seconds", "first step", "MiB"))
    devices = list(dict.fromkeys(device for device, _ in of))
    fig, panels = plt.subplots(max(1, len(devices)), figsize=(9, 7), layout="constrained", squeeze=False)
    for axes, device in zip(panels.flat, devices, strict=False):
        mid = {name: median(of[device, name][0]) for there, name in of if there == device}
        print(f"\n| an epoch on {device} | seconds | range | times A | first step | peak memory |\n" + "|---" * 6 + "|")
        for name, middle in mid.items():
            s, first, memory = of[device, name]
            print(f"| {name} | {middle:.1f} | {s[0]:.1f} to {s[-1]:.1f} | {middle / mid['A']:.3f} ", end="")
            print(f"| {median(first):.1f} s | {median(memory):,.0f} MiB |")
            if "images" not in name:
                axes.barh(name, middle, xerr=[[middle - s[0]], [s[-1] - middle]], color=f"C{'ABC'.index(name[0])}")
        axes.set(title=f"A: the ordinary way, B: ours, C: its steps on one batch. {device}", ylim=axes.get_ylim()[::-1])
        axes.set_xlabel("seconds of an epoch: median, lowest, highest")
        print(f"\n| | measured |\n|---|---|\n| B / A | 1 / {mid['A'] / mid['B']:.1f} |")
        print(f"| B / A without A's dropout | 1 / {mid['A, no dropout'] / mid['B']:.1f} |")
        print(f"| and both in batches of 512 | 1 / {mid['A, no dropout'] / mid['B, batches of 512']:.1f} |")
        print(f"| and freed memory kept | 1 / {mid['A, no dropout, memory kept'] / mid['B, batches of 512']:.1f} |")
        print(f"| outside forward, backward and step, 1 - C / B | {1 - mid['C'] / mid['B']:.0%} |")
    fig.savefig(folder / "speed.png", dpi=110)
    print("\n| short schedule | split | device | accuracy (%) | lowest | loss | seconds | seeds |\n" + "|---" * 8 + "|")
    of = grouped(read(folder / "goal.csv"), ("settings", "split", "device"), ("accuracy", "loss", "seconds"))
    for key, (accuracy, loss, seconds) in of.items():
        sd = f" ± {stdev(accuracy):.2f}" if len(accuracy) > 1 else ""
        print(f"| {' | '.join(key)} | {mean(accuracy):.2f}{sd} | {accuracy[0]:.2f} ", end="")
        print(f"| {mean(loss):.4f} | {median(seconds):.1f} | {len(loss)} |")


def main():
    if sys.argv[1:2] == ["child"]:  # see `row`
        function, arguments = json.loads(sys.argv[2])
        return print(json.dumps(globals()[function](**arguments)))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("epochs", "goal", "tables"))
    parser.add_argument("--split", choices=("60k/test", "50k/10k"), default="60k/test", help="of goal")
    parser.add_argument("--seeds", type=int, default=1, help="of goal: the seeds 1 to this one")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of goal: of the recipe, or others")
    parser.add_argument("--images", type=int, default=60_000, help="take so few, to see that it runs; with --results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder for the rows and the picture")
    options = parser.parse_args()
    load_mnist(DATA)  # fetched here, not in a time that is measured
    if options.part == "tables":
        return tables(options.results)
    columns = about(get_device())
    if options.part == "epochs":
        return epochs(options.results / "speed.csv", columns, options.images)
    settings = SHORT | {key: json.loads(value) for key, value in (item.split("=") for item in options.set)}
    key = {"settings": ", ".join(f"{key}={value}" for key, value in settings.items()), "split": options.split}
    settings |= {"split": options.split, "images": options.images}
    for n in range(1, options.seeds + 1):
        row(options.results / "goal.csv", columns, key | {"seed": f"{n}"}, "short", "seconds", seed=n, **settings)


if __name__ == "__main__":
    main()
