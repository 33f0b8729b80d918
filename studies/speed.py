"""How fast is the training, against the ordinary way and against what the machine allows?

    .venv/bin/python studies/speed.py            # half an hour on two cores, resumes; writes results/speed.csv, .png
    .venv/bin/python studies/speed.py --goal     # time to 99.4 %, a row a seed, resumes; writes results/goal.csv
    .venv/bin/python studies/speed.py --quick    # a minute, few images: does it run? The figures mean nothing

Contenders, one epoch each in turn, A B C A B C ..., the median of three rounds. `CPUParallel`, in B and C, has the
whole process keep freed memory; A gains by that too, and is measured once more in a process of its own.

- A, the ordinary way: the course's image-by-image transforms in a DataLoader at its best number of workers, batches of
  512, and two `.item()` a step. With the course's dropout of 0.005, and without.
- B, ours: `mnist_loaders` and `train` with what the notebook gives them; and again at batches of 512.
- C, the floor: forward, backward and step of B on one batch that stays, no data work, no figures, no average.

The least time on paper: to train on one image, a convolution does its multiply-accumulates three times (forward, for
the gradient of the weights, and for that of its input, which the first one is spared): 4.85 million. Divided by
the rate of a large matrix product, measured here, in the type that we compute in. Memory: each convolution's output is
written and read once forward and read once backward, its gradient written and read once: five passes, divided by the
bandwidth of a large copy, measured here. The two can overlap, so the larger one is the bound.

The levers are measured one at a time, each in a process of its own, three times, on a batch that stays, C's way.
"""

import argparse
import csv
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from tqdm import tqdm

from s6 import utils
from s6.model import Net
from s6.utils import (
    MEAN,
    STD,
    CPUParallel,
    Recipe,
    cpu_dtype,
    describe,
    get_device,
    mnist_loaders,
    set_seed,
    test,
    train,
)

DATA, RESULTS = ROOT / "data", ROOT / "studies" / "results"
COLUMNS = ("part", "name", "value", "low", "high", "n", "unit", "device", "python", "torch", "torchvision", "commit")
GOAL_COLUMNS = ("recipe", "seed", "accuracy", "seconds", *COLUMNS[-5:])
THREADS = torch.get_num_threads()
COURSE_BATCH, COURSE_EPOCHS = 512, 20


# -------------------------------------------------------------------------------------------------------- contenders


def course_loader(images, workers, device, data=DATA):
    """The course's data: every image through PIL, every time. They are not fetched: `load_mnist` does that."""
    steps = [
        transforms.RandomApply([transforms.CenterCrop(22)], p=0.1),
        transforms.Resize((28, 28)),
        transforms.RandomRotation((-15.0, 15.0), fill=0),
        transforms.ToTensor(),
        transforms.Normalize((MEAN,), (STD,)),
    ]
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: that is the question
    dataset = torchvision.datasets.MNIST(data, transform=transforms.Compose(steps))
    return DataLoader(
        Subset(dataset, range(images)),
        COURSE_BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )


def course_epoch(model, device, loader, optimizer):
    """The course's loop, which reads two numbers from the device in every step."""
    model.train()
    losses, correct = [], 0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        output = model(images)
        loss = F.nll_loss(output, labels)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        correct += output.argmax(dim=1).eq(labels).sum().item()


def course(images, workers, device, dropout=0.005):
    """Return a function that trains the course's way, for one epoch or for so many steps of it."""
    model, loader = Net(dropout).to(device), course_loader(images, workers, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def epoch(steps=None):
        torch.set_num_threads(THREADS)  # the contender before may have changed it
        course_epoch(model, device, islice(loader, steps), optimizer)

    return epoch


def ours(images, device, batch_size=Recipe.batch_size, average=True, augment=True, only_step=False):
    """Return a function that trains our way, for one epoch or so many steps of it: B, B short of something, or C."""
    torch.set_num_threads(THREADS)
    recipe = Recipe(epochs=10_000, batch_size=batch_size)
    loader, _ = mnist_loaders(DATA, batch_size, device, augment=recipe.augment if augment else None)
    loader.images, loader.labels = loader.images[:images], loader.labels[:images]
    model = Net().to(device)
    optimizer, scheduler, averaged = recipe.prepare(model, len(loader))
    fast = CPUParallel(model) if device.type == "cpu" else model
    threads = torch.get_num_threads()
    batch = next(iter(loader))

    def epoch(steps=None):
        torch.set_num_threads(threads)
        if only_step:
            fast.train()
            for _ in range(steps or len(loader)):
                step(fast, optimizer, *batch)
            return
        with open(os.devnull, "w") as nowhere:  # the bar is drawn, and not shown
            options = {"scheduler": scheduler, "averaged": averaged if average else None, "file": nowhere}
            train(fast, device, islice(loader, steps), optimizer, F.nll_loss, **options)

    return epoch


def convolutions(model):
    return [layer for layer in model.modules() if isinstance(layer, torch.nn.Conv2d)]


def step(model, optimizer, images, labels):
    loss = F.nll_loss(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# ------------------------------------------------------------------------------------------------------------ levers


# Name: options of `lever`, below. Where nothing is said: batches of the recipe's size, torch's own threads, float32;
# for CPUParallel its own type, bfloat16 where the processor has it.
LEVERS = {
    "as torch comes": {},
    "dropout 0.005": {"dropout": 0.005},
    "batches of 125": {"batch_size": 125},
    "batches of 1,000": {"batch_size": 1000},
    "fused SGD": {"fused": True},
    "foreach SGD": {"foreach": True},
    "no gradient of the biases before BatchNorm": {"frozen": True},
    "freed memory kept": {"keep": True},
    "freed memory kept, channels_last": {"keep": True, "channels_last": True},
    "freed memory kept, bfloat16": {"keep": True, "bfloat16": True},
    "freed memory kept, bfloat16, channels_last": {"keep": True, "bfloat16": True, "channels_last": True},
    "torch.compile": {"compile": {}},
    "torch.compile, channels_last": {"compile": {}, "channels_last": True},
    "torch.compile, max-autotune": {"compile": {"mode": "max-autotune-no-cudagraphs"}},
    "torch.compile, bfloat16": {"compile": {}, "bfloat16": True},
    "torch.compile, bfloat16, channels_last": {"compile": {}, "bfloat16": True, "channels_last": True},
    "freed memory kept, torch.compile, bfloat16, channels_last": {
        "keep": True,
        "compile": {},
        "bfloat16": True,
        "channels_last": True,
    },
    "CPUParallel, float32": {"parallel": True, "bfloat16": False},
    "CPUParallel": {"parallel": True},
    "CPUParallel, batches of 125": {"parallel": True, "batch_size": 125},
    "CPUParallel, batches of 512": {"parallel": True, "batch_size": 512},
    "CPUParallel, freed memory given back": {"parallel": True, "keep": False},
}


def lever(
    device, batch_size=Recipe.batch_size, dropout=0.0, frozen=False, keep=None, channels_last=False,
    bfloat16=None, compile=None, parallel=False, **sgd,
):  # fmt: skip
    """Return a function that does so many steps on one batch."""
    if keep:
        utils._keep_freed_memory()
    elif keep is False:
        utils._keep_freed_memory = lambda: None  # in this process, which is only for this lever
    generator = torch.Generator().manual_seed(1)
    batch = torch.randn(batch_size, 1, 28, 28, generator=generator), torch.randint(10, (batch_size,))
    batch = [tensor.to(device) for tensor in batch]
    model = Net(dropout).to(device)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    if frozen:
        for layer in convolutions(model)[:-1]:  # the last one has no BatchNorm after it
            layer.bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, **sgd)
    fast = model
    if parallel:
        fast = CPUParallel(model, dtype=torch.float32 if bfloat16 is False else None)
    elif bfloat16:
        fast.forward = torch.autocast(device.type, torch.bfloat16)(fast.forward)
    if compile is not None:
        fast = torch.compile(fast, **compile)
    fast.train()

    def steps(count):
        for _ in range(count):
            step(fast, optimizer, *batch)

    return steps


# --------------------------------------------------------------------------------------------------------- measuring


def synchronize(device):
    if device.type != "cpu":
        torch.accelerator.synchronize()


def timed(epoch, device, *steps):
    start = time.perf_counter()
    epoch(*steps)
    synchronize(device)
    return time.perf_counter() - start


def child(name, images, workers):
    """In a process of its own: time of the first step, of an epoch of 60,000, page faults a step, peak memory."""
    device = get_device()
    if name == "A":
        epoch, batch_size = course(images, workers, device), COURSE_BATCH
    elif name == "B":
        epoch, batch_size = ours(images, device), Recipe.batch_size
    else:
        epoch, batch_size = lever(device, **LEVERS[name]), LEVERS[name].get("batch_size", Recipe.batch_size)
    timed(epoch, device, 1)
    finished = time.time()
    timed(epoch, device, 3)
    steps = math.ceil(images / batch_size)
    done = images if name in ("A", "B") else steps * batch_size  # the last batch of a loader may be smaller
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    seconds = statistics.median(timed(epoch, device, steps) for _ in range(3))
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / (3 * steps)
    figures = {"finished": finished, "seconds": seconds * 60_000 / done, "faults": faults}
    print(json.dumps(figures | {"memory": peak_memory(device) / 2**20}))


def peak_memory(device):
    """Return the bytes that the GPU, or else the process, held at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held when it started this process
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def spawn(*arguments):
    """Run this file in a process of its own, its compiler's cache empty; return its figures."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        command = [sys.executable, __file__, *map(str, arguments)]
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    figures = json.loads(done.stdout.splitlines()[-1])
    return figures | {"wait": figures["finished"] - start}


def machine_rates(device, size, copied):
    """Return multiply-accumulates a second of a large matrix product, by type, and bytes a second of a large copy."""
    torch.set_num_threads(THREADS)
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.randn(size, size, device=device, dtype=dtype)
        rates[dtype] = size**3 / min(timed(lambda m=matrix: m @ m, device) for _ in range(6))
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    return rates, 2 * copied / min(timed(lambda: target.copy_(source), device) for _ in range(6))


def work(model):
    """Return what an image trained costs at the least: multiply-accumulates, and values written or read."""
    macs = values = 0

    def count(layer, inputs, output):
        nonlocal macs, values
        macs += output[0].numel() * layer.weight[0].numel() * (3 if layer.in_channels > 1 else 2)
        values += 5 * output[0].numel()

    handles = [layer.register_forward_hook(count) for layer in convolutions(model)]
    model(torch.zeros(1, 1, 28, 28))
    for handle in handles:
        handle.remove()
    return macs, values


def versions(device):
    return describe(device), platform.python_version(), torch.__version__, torchvision.__version__


def current_commit():
    """Return the checkout's commit, with "-dirty" where the code is not what was committed."""

    def git(*arguments):
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)

    commit = git("rev-parse", "--short", "HEAD").stdout.strip()
    changed = git("diff", "--quiet", "HEAD", "--", "s6", "studies/*.py").returncode
    return f"{commit}-dirty" if commit and changed else commit or "unknown"


def about(device):
    """Return device, versions and commit, the last columns of every row."""
    return *versions(device), current_commit()


def measure(path, images, rounds, levers):
    """Append the rows of the study to `path`, as soon as each is known; those that are there are not measured again."""
    utils.load_mnist(DATA)  # fetched here, not in a time that is measured
    device = get_device()
    if not path.exists():
        write(path, COLUMNS, [])
    there = {(row["part"], row["name"]) for row in read(path)}
    suffix = about(device)

    def row(part, name, values, unit):
        values = [values] if isinstance(values, float) else values
        figures = (f"{value:.4g}" for value in (statistics.median(values), min(values), max(values)))
        values = (part, name, *figures, len(values), unit, *suffix)
        write(path, COLUMNS, [dict(zip(COLUMNS, values, strict=True))], append=True)

    scale = 60_000 / images
    steps_of = {"15,000 images": images // 4, "30,000 images": images // 2, "60,000 images": images}
    batches = (125, 250, 500, 1000)
    with tqdm(unit="run", file=sys.stdout) as bar:

        def run(name, epoch):
            bar.set_description(name[:30].ljust(30))
            seconds = timed(epoch, device)
            bar.update()
            return seconds

        if ("machine", "copy") not in there:
            rates, bandwidth = machine_rates(
                device, 2048 if images == 60_000 else 256, 2**28 if images == 60_000 else 2**22
            )
            half = device.type == "cpu" and cpu_dtype() == torch.bfloat16
            macs, values = work(Net())
            for dtype, rate in rates.items():
                row("machine", f"matrix product, {str(dtype)[6:]}", rate / 1e9, "GMAC/s")
            row("machine", "copy", bandwidth / 1e9, "GB/s")
            row("least", "arithmetic", 60_000 * macs / rates[torch.bfloat16 if half else torch.float32], "s")
            row("least", "memory", 60_000 * values * (2 if half else 4) / bandwidth, "s")

        for count in (0, 1, 2, 4):
            if ("workers", str(count)) not in there:
                epoch = course(images // 4, count, device)
                epoch()  # starts the workers; a pass broken off would leave them batches in hand
                row("workers", str(count), 4 * scale * run(f"A, {count} workers", epoch), "s")
        best = min((row for row in read(path) if row["part"] == "workers"), key=lambda row: float(row["value"]))["name"]

        contenders = {
            "A": partial(course, images, int(best), device),
            "A, no dropout": partial(course, images, int(best), device, dropout=0.0),
            "B": partial(ours, images, device),
            "B, batches of 512": partial(ours, images, device, COURSE_BATCH),
            "B, no average": partial(ours, images, device, average=False),
            "B, no augmentation": partial(ours, images, device, augment=False),
            "C": partial(ours, images, device, only_step=True),
            "C, batches of 512": partial(ours, images, device, COURSE_BATCH, only_step=True),
        }
        growth = {name: partial(ours, count, device) for name, count in steps_of.items()}
        growth |= {f"batches of {size:,}": partial(ours, images, device, size) for size in batches}
        for part, group in (("epoch", contenders), ("growth", growth)):
            if (part, next(iter(group))) in there:
                continue
            group = {name: build() for name, build in group.items()}
            seconds = {name: [] for name in group}
            for epoch in group.values():
                epoch(2)
            for _ in range(rounds):
                for name, epoch in group.items():
                    seconds[name].append(scale * run(name, epoch))
            for name, values in seconds.items():
                row(part, name, values, "s")

        figures = {name: [] for name in ("A", "B", *levers) if ("process: seconds", name) not in there}
        for _ in range(rounds):
            for name in list(figures):
                bar.set_description(name[:30].ljust(30))
                try:
                    figures[name].append(spawn("--child", name, "--images", images // 10, "--workers", best))
                except RuntimeError as error:  # no compiler, say, or no glibc
                    if name in ("A", "B"):
                        raise
                    bar.write(f"left out: {str(error).splitlines()[-1]}")
                    del figures[name]
                bar.update()
        for name, of_rounds in figures.items():
            for part, unit in (("seconds", "s"), ("wait", "s"), ("faults", "pages a step"), ("memory", "MiB")):
                row(f"process: {part}", name, [figure[part] for figure in of_rounds], unit)


# ------------------------------------------------------------------------------------------------------ time to 99.4 %

SHORT = Recipe(
    epochs=6, lr=0.4, translate=2.0, shear=5.0
)  # chosen on the last 10,000 training images: studies/README.md, "Speed"


def goal_child(seed, images):
    """In a process of its own: the notebook's calls with the short schedule, tested at its end."""
    device = get_device()
    set_seed(seed)
    loader, test_loader = mnist_loaders(DATA, SHORT.batch_size, device, seed, augment=SHORT.augment)
    loader.images, loader.labels = loader.images[:images], loader.labels[:images]
    model = Net().to(device)
    optimizer, scheduler, averaged = SHORT.prepare(model, len(loader))
    fast = CPUParallel(model) if device.type == "cpu" else model
    for _ in range(SHORT.epochs):
        train(fast, device, loader, optimizer, F.nll_loss, scheduler=scheduler, averaged=averaged, disable=True)
    _, accuracy = test(averaged, device, test_loader, F.nll_loss)
    print(json.dumps({"finished": time.time(), "accuracy": accuracy[-1]}))


def measure_goal(path, seeds, images):
    """Append a row for each seed that `path` does not have yet."""
    done = {int(row["seed"]) for row in read(path) if row["recipe"] == str(SHORT)} if path.exists() else set()
    for seed in tqdm([seed for seed in seeds if seed not in done], unit="seed", file=sys.stdout):
        figures = spawn("--child", "goal", "--seed", seed, "--images", images)
        values = (SHORT, seed, f"{figures['accuracy']:.2f}", f"{figures['wait']:.1f}", *about(get_device()))
        write(path, GOAL_COLUMNS, [dict(zip(GOAL_COLUMNS, values, strict=True))], append=path.exists())


# ----------------------------------------------------------------------------------------------------------- results


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write(path, columns, rows, append=False):
    with open(path, "a" if append else "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if not append:
            writer.writeheader()
        writer.writerows(rows)


def tables(rows, goal):
    """Yield the tables of studies/README.md: contenders; ratios, and the short schedule; levers."""
    of = {(row["part"], row["name"]): float(row["value"]) for row in rows}
    a, b, c = (of["epoch", name] for name in "ABC")
    lines = ["| one epoch, 60,000 images | seconds | images a second | times A |", "|---|---|---|---|"]
    for part, name in sorted(key for key in of if key[0] in ("epoch", "least")):  # A, B, C, then the least
        label = f"least time, {name}" if part == "least" else name
        lines.append(f"| {label} | {of[part, name]:.1f} | {60_000 / of[part, name]:,.0f} | {of[part, name] / a:.3f} |")
    alone, first, memory = ([of[f"process: {part}", name] for name in "AB"] for part in ("seconds", "wait", "memory"))
    yield "\n".join(lines)

    def grown(name, *sizes):
        return ", ".join(f"{of['growth', name.format(f'{size:,}')]:.1f}" for size in sizes) + " s"

    plain = of["epoch", "A, no dropout"]
    lines = ["| | measured |", "|---|---|"]
    lines += [
        f"| B / A, an epoch | 1 / {a / b:.1f} |",
        f"| B / A without A's dropout | 1 / {plain / b:.1f} |",
        f"| B / A without dropout, both in batches of 512 | 1 / {plain / of['epoch', 'B, batches of 512']:.1f} |",
        f"| B / A, each in a process of its own | 1 / {alone[0] / alone[1]:.1f} |",
        f"| B / C | {b / c:.2f} |",
        f"| outside forward, backward and step | {100 * (1 - c / b):.0f} % |",
        f"| an epoch of 15,000, 30,000 and 60,000 images | {grown('{} images', 15_000, 30_000, 60_000)} |",
        f"| an epoch in batches of 125, 250, 500 and 1,000 | {grown('batches of {}', 125, 250, 500, 1000)} |",
        f"| from the command to the first step over, A and B | {first[0]:.1f} s, {first[1]:.1f} s |",
        f"| peak memory, A (without its workers) and B | {memory[0]:,.0f} MiB, {memory[1]:,.0f} MiB |",
    ]
    goal = [row for row in goal if row["recipe"] == str(SHORT)]
    seconds, accuracies = ([float(row[key]) for row in goal] for key in ("seconds", "accuracy"))
    spread = f" ± {statistics.stdev(accuracies):.2f}" if len(goal) > 1 else ""
    middle = statistics.median(seconds)
    lines += [
        f"| short schedule, from the command to the end of {SHORT.epochs} epochs, tested | {middle:.1f} s |",
        f"| short schedule / {COURSE_EPOCHS} epochs of A | 1 / {COURSE_EPOCHS * a / middle:.0f} |",
        f"| short schedule / {COURSE_EPOCHS} epochs of A without dropout | 1 / {COURSE_EPOCHS * plain / middle:.0f} |",
        f"| short schedule, accuracy of {len(goal)} seeds | {statistics.mean(accuracies):.2f}{spread} %, "
        f"lowest {min(accuracies):.2f} % |",
    ]
    yield "\n".join(lines)
    lines = ["| one batch, again and again | seconds for 60,000 | first step after | pages faulted a step |"]
    lines += ["|---|---|---|---|"]
    for name in LEVERS:
        if ("process: seconds", name) not in of:
            continue  # a quick run measures one
        values = [of[f"process: {part}", name] for part in ("seconds", "wait", "faults")]
        lines.append("| {} | {:.1f} | {:.0f} s | {:,.0f} |".format(name, *values))
    yield "\n".join(lines)


def plot(rows, path):
    """Draw an epoch of each contender, and each lever, as bars with the range of the rounds."""
    import matplotlib.pyplot as plt

    fig, panels = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    parts = (("epoch", "least"), ("process: seconds",))
    titles = ("One epoch of training, 60,000 images", "The step alone, for 60,000 images")
    for axes, wanted, title in zip(panels, parts, titles, strict=True):
        shown = [row for row in rows if row["part"] in wanted and (row["part"] in parts[0] or row["name"] in LEVERS)]
        shown.sort(key=lambda row: list(LEVERS).index(row["name"]) if row["name"] in LEVERS else row["part"] == "least")
        for place, row in enumerate(shown):
            value, low, high = (float(row[key]) for key in ("value", "low", "high"))
            least = row["part"] == "least" or row["name"][0] == "C" and row["part"] == "epoch"
            color = "tab:green" if least else "tab:blue" if row["name"].startswith(("B", "CPUParallel")) else "tab:gray"
            axes.barh(place, value, color=color, xerr=[[value - low], [high - value]], ecolor="black", capsize=2)
            axes.text(high, place, f"  {value:.1f}", va="center", fontsize=8)
        names = [("least time on paper, " if row["part"] == "least" else "") + row["name"] for row in shown]
        axes.set_yticks(range(len(shown)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set(xlabel="seconds (bar: median; line: lowest to highest)", title=title)
        axes.set_xlim(right=1.12 * max(float(row["high"]) for row in shown))
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images, one lever, one round; results in build/quick")
    parser.add_argument("--goal", action="store_true", help="time to 99.4 %%")
    parser.add_argument("--tables", action="store_true", help="draw and print the stored results")
    parser.add_argument("--results", type=Path, help="folder for the CSV files and the picture")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    for name, default in (("--images", 60_000), ("--workers", 0), ("--seed", 1)):
        parser.add_argument(name, type=int, default=default, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child == "goal":
        return goal_child(options.seed, options.images)
    if options.child:
        return child(options.child, options.images, options.workers)
    folder = options.results or (ROOT / "build" / "quick" if options.quick else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    speed, goal = folder / "speed.csv", folder / "goal.csv"
    images, levers, seeds = (1000, list(LEVERS)[:1], (1, 2)) if options.quick else (60_000, list(LEVERS), range(1, 11))
    if not (options.goal or options.tables):
        if options.quick:
            speed.unlink(missing_ok=True)
        measure(speed, images, 1 if options.quick else 3, levers)
    if options.goal or options.quick:
        measure_goal(goal, seeds, images)
    if speed.exists():
        plot(read(speed), folder / "speed.png")
    if speed.exists() and goal.exists():
        print(*tables(read(speed), read(goal)), sep="\n\n")
    else:
        print(f"The tables need both {speed}, made without --goal, and {goal}, made with it.")


if __name__ == "__main__":
    main()
