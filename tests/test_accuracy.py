"""The accuracy study runs each trial once, as the notebook would; README says what the stored rows say."""

import ast
import re
import statistics

import nbformat
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run_training_cell
from scipy import stats

from s6.model import Net
from s6.utils import Recipe, mnist_loaders
from studies import accuracy
from studies.common import append, get_device, on_cpu, read
from studies.speed import SCHEDULES

ROWS = read(accuracy.RESULTS / "accuracy.csv")
EVERY = {name: changes for _, variants in accuracy.STUDIES.values() for name, changes in variants.items()}


PARAMETERS = {
    "no BatchNorm, He's first weights, a quarter of the rate": 10_474 - 2 * (8 + 12 + 16 + 8 + 12 + 16 + 16 + 16),
    "no 1×1 transition": 10_474 - 136 - 16 + 8 * 9 * 12,
    "linear layer for the global average": 10_474 - 170 + 1450,
    **dict(zip(accuracy.WIDTHS, (1_525, 2_762, 4_087, 4_912, 5_998, 7_889, 16_190, 19_213), strict=True)),
    **dict(zip(accuracy.NEXT, (5_998, 7_889), strict=True)),
}


def test_the_ladder_leads_from_the_course_to_ours_and_no_two_variants_are_the_same():
    *_, before, ours = accuracy.LADDER.values()
    assert before == accuracy.AS_THEY_COME and ours == {}
    for _, variants in accuracy.STUDIES.values():
        assert len({accuracy.settings(changes) for changes in variants.values()}) == len(variants)


@pytest.mark.parametrize("name", EVERY)
def test_each_variant_trains(name, mnist):
    row = accuracy.trial(name, "60k/test", 1, images=256, **EVERY[name] | {"epochs": 1})
    assert 0 < float(row["last"]) < 100 and len(row["accuracies"].split()) == len(row["losses"].split()) == 1
    assert row["parameters"] == PARAMETERS.get(name, 10_474)


def test_a_trial_is_the_notebook_s_training(mnist, tmp_path, monkeypatch):
    """On the same few images, and on a CPU: a GPU never adds up in the same order. The average only watches."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(accuracy, "get_device", lambda: cpu)
    row = accuracy.trial("ours", "60k/test", 3, images=500, epochs=2, batch_size=50)
    recipe = Recipe(seed=3, epochs=2, batch_size=50)
    few = mnist_loaders(recipe, cpu, ROOT / "data")
    for loader in few:
        loader.images, loader.labels = loader.images[:500], loader.labels[:500]
    names = {"recipe": recipe, "folder": tmp_path, "Net": Net, "F": F}
    names["mnist_loaders"] = lambda *_: few
    run_training_cell(names)
    assert row["accuracies"] == " ".join(f"{x:.2f}" for x in names["test_acc"])
    assert row["losses"] == " ".join(f"{x:.5f}" for x in names["test_losses"])
    without = accuracy.trial("-", "60k/test", 3, images=500, epochs=2, batch_size=50, average=0.0)
    assert without["accuracies"] == row["raw accuracies"] != row["accuracies"]


def test_what_is_missing_is_run_and_nothing_twice(tmp_path, mnist):
    path = tmp_path / "rows.csv"
    jobs = accuracy.missing("report", (1, 2), [], images=250)
    assert accuracy.run(jobs, path, workers=2) == 0
    rows = read(path)
    assert sorted(row["seed"] for row in rows) == ["1", "2"] and all(row["settings"] for row in rows)
    append(path, rows[0] | {"seed": "3", "settings": "of another recipe"})
    append(path, rows[0] | {"seed": "4", "device": "A GPU" if get_device().type == "cpu" else "2 CPUs"})
    assert [job[2] for job in accuracy.missing("report", (1, 2, 3, 4), read(path), images=250)] == [3, 4]


def test_stored_rows_are_whole_there_once_and_of_the_variants_as_they_are_now():
    for row in ROWS:
        curve, raw, losses = (row[kind].split() for kind in ("accuracies", "raw accuracies", "losses"))
        epochs = int(re.match(r"epochs=(\d+)", row["settings"])[1])
        assert len(curve) == len(losses) == epochs and len(raw) == epochs * (row["split"] == "60k/test")
        assert row["last"] == curve[-1]
        assert row["settings"] == accuracy.settings(EVERY[row["variant"]]), row["variant"]
        assert "dirty" not in row["commit"]
    once = {(row["settings"], row["split"], row["seed"], on_cpu(row)) for row in ROWS}
    assert len(once) == len(ROWS) > 0


def last(variant, kind="accuracies"):
    """The accuracy at the last epoch of each training on the test set, by kind of device and seed."""
    rows = [row for row in ROWS if (row["variant"], row["split"]) == (variant, "60k/test")]
    return {(on_cpu(row), row["seed"]): float(row[kind].split()[-1]) for row in rows}


def test_readme_says_what_the_rows_say():
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    goal = [row for row in read(accuracy.RESULTS / "goal.csv") if row["settings"].startswith("epochs=3, ")]
    short = [float(row["accuracy"]) for row in goal]
    assert SCHEDULES["cpu"]["epochs"] == 3 and len(short) == 10

    def spread(accuracies):
        return f"{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f} %"

    assert f"3 with another optimizer: {spread(short)}, lowest {min(short):.2f} %" in readme
    for variant, unit in (("ours", "trainings"), ("digits as they come", "")):
        figures = list(last(variant).values())
        assert spread(figures) in readme and f"over {len(figures)} {unit}" in readme
    assert f"lowest {min(last('ours').values()):.2f} %" in readme
    ablation = nbformat.read(ROOT / "notebooks" / "ablation.ipynb", as_version=4)
    printed = "".join(o.get("text", "") for cell in ablation.cells for o in cell.get("outputs", []))
    assert re.search(r"For README, .*\n(.*)\n", printed)[1] in readme, "what ablation.ipynb prints to be copied"


def test_the_notebook_s_gains_are_those_of_the_rows():
    """Means of differences between trainings with the same seed on the same kind of device, and 95 % intervals.

    As in ablation.ipynb, the intervals are wider for its 8 and 11 comparisons.
    """
    ours, steady = last("ours"), "constant rate"
    pairs = {
        "one-cycle up to 0.2, Nesterov, weight decay": (
            last("one-cycle up to 0.2, Nesterov, weight decay"),
            last("BatchNorm before ReLU, no ReLU on the scores"),
        ),
        "BatchNorm": (ours, last("no BatchNorm, He's first weights, a quarter of the rate")),
        "falling rate (moving average kept)": (ours, last(steady)),
        "moving average (falling rate kept)": (ours, last("ours", "raw accuracies")),
        "both, falling rate and moving average": (ours, last(steady, "raw accuracies")),
    }
    [cell] = [c for c in nbformat.read(ROOT / "notebooks" / "S6.ipynb", as_version=4).cells if "gains = {" in c.source]
    stated = ast.literal_eval(re.search(r"gains = ({.*?^})", cell.source, re.DOTALL | re.MULTILINE)[1])
    assert stated.keys() == pairs.keys()
    for name, (values, others) in pairs.items():
        differences = [values[run] - others[run] for run in values.keys() & others.keys()]
        comparisons = 8 if name.startswith("one-cycle") else 11
        interval = stats.ttest_1samp(differences, 0).confidence_interval(1 - 0.05 / comparisons)
        mean, half = statistics.mean(differences), (interval.high - interval.low) / 2
        assert stated[name] == (round(mean, 3), round(half, 3)), name
