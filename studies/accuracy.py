"""Train the variants of studies/variants.py with many seeds. Each training is a row of a CSV file.

    .venv/bin/python studies/accuracy.py ablation --seeds 5
    .venv/bin/python studies/accuracy.py tables               # the tables of studies/README.md

A training is skipped if the file has its row from the same kind of device, CPU or GPU. So a study that was interrupted
goes on with the missing ones. studies/README.md explains rows and splits.
"""

import argparse
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F
from tqdm import tqdm

from s6.utils import test, train
from studies.common import RESULTS, ROOT, about, append, done, get_device, loaders, read
from studies.variants import STUDIES, changes


def trial(variant, arm, split, seed, images, columns):
    """Train an arm once, and return its row. `images` limits both sets, and `columns` go into the row."""
    start, device, (recipe, network) = time.process_time(), get_device(), arm
    recipe = replace(recipe, seed=seed)
    loader, test_loader = loaders(recipe, device, split, images)
    torch.manual_seed(seed)
    # One thread of a CPU trains a third faster in channels_last. Apple GPUs may get wrong gradients (pytorch/175189).
    layout = torch.channels_last if device.type == "cpu" else torch.preserve_format
    model = network().to(device, memory_format=layout)
    optimizer = recipe.optimizer(model)
    scheduler, averaged = recipe.scheduler(optimizer, len(loader)), recipe.averaged(model)
    losses, accuracies, raw = [], [], []
    for _ in range(recipe.epochs):
        train(model, device, loader, optimizer, F.nll_loss, scheduler=scheduler, averaged=averaged, show_bar=False)
        test(averaged or model, device, test_loader, F.nll_loss, losses, accuracies)
        test(model, device, test_loader, F.nll_loss, None, raw)
    return {  # accuracies are in percent; "raw" ones are without the moving average
        "variant": variant,
        "split": split,
        "seed": seed,
        "last": f"{accuracies[-1]:.2f}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": f"{time.process_time() - start:.0f}",  # this is processor time
        **columns,
        "changes": changes(*arm),
        "accuracies": " ".join(f"{x:.2f}" for x in accuracies),
        "raw accuracies": " ".join(f"{x:.2f}" for x in raw),
        "losses": " ".join(f"{x:.5f}" for x in losses),
    }


def missing(split, arms, seeds, path):
    """Return (variant, arm, split, seed) of each trial without a row from this kind of device."""
    there, kind = done(path, ["changes", "split", "seed", "kind"]), about(get_device())["kind"]
    jobs = [(variant, arm, split, seed) for seed in seeds for variant, arm in arms.items()]
    return [job for job in jobs if (changes(*job[1]), split, job[3], kind) not in there]  # job[3] is the seed


def prepare():
    """Prepare a process that trains."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it, else it would go on with the next trial


def run(jobs, path, workers):
    """Run the trials, `workers` at once. Append each row when its trial ends. Return how many trials failed."""
    columns, failed = about(get_device()), 0  # with the commit of the start, in case that it changes meanwhile
    with ProcessPoolExecutor(workers, get_context("spawn"), prepare) as pool:
        running = {pool.submit(trial, *job, columns): f"{job[0]}, seed {job[3]}" for job in jobs}
        for ended in tqdm(as_completed(running), total=len(jobs), unit="trial"):
            try:
                row = ended.result()
            except Exception as error:  # the other trials go on
                failed += 1
                tqdm.write(f"{running[ended]} failed: {type(error).__name__}: {error}")
            else:
                append(path, row)
                tqdm.write(f"{running[ended]}: {row['last']} %")
    return failed


def tables(studies, path):
    """Print the accuracies after the last epoch: a table for each study, a line for each variant."""
    rows = read(path)
    rows["raw"] = rows["raw accuracies"].str.split().str[-1].astype(float)
    for study, (split, arms) in studies.items():
        print(f"\n| {study} | parameters | accuracy (%) | lowest | above 99.4 % | without the average |")
        print("|---" * 6 + "|")
        for variant in arms:
            some = rows[(rows["variant"] == variant) & (rows["split"] == split)]
            if len(some):
                parameters, last, raw = some["parameters"].iloc[0], some["last"], some["raw"].mean()
                above = f"{last.min():.2f} | {(last > 99.4).sum()} of {len(last)}"
                line = f"| {variant} | {parameters:,} | {last.mean():.2f} ± {last.std():.2f} | {above} | {raw:.2f} |"
                print(line.replace("nan", "–"))


def main(studies, path, doc):
    """Run the study that the command line names, or print the tables. `path` is where its rows belong."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*studies, "tables"])
    parser.add_argument("--seeds", type=int, default=1, help="seeds 1 to SEEDS (default: 1)")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="only these variants")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="trials at once (default: one a core)")
    parser.add_argument("--images", type=int, help="images of each set, for a quick check with its rows in `build`")
    parser.add_argument("--results", type=Path, help=f"the CSV file (default: {path.name} in studies/results)")
    options = parser.parse_args()
    path = options.results or (ROOT / "build" / path.name if options.images else path)
    if options.study == "tables":
        return tables(studies, path)
    split, arms = studies[options.study]
    names = options.only or list(arms)
    if unknown := set(names) - set(arms):
        parser.error(f"{options.study} has no variant {unknown}. It has {list(arms)}")
    jobs = missing(split, {name: arms[name] for name in names}, range(1, options.seeds + 1), path)
    sys.exit(run([(*job, options.images) for job in jobs], path, options.workers) > 0)


if __name__ == "__main__":
    main(STUDIES, RESULTS / "accuracy.csv", __doc__)
