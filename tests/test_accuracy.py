"""The accuracy study trains as the notebook does, and nothing twice. README and S6.ipynb say what its rows say."""

import re

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from conftest import CODE, NOTEBOOKS, ROOT, run_training_cell, text_of
from scipy.stats import ttest_1samp

from s6.utils import Recipe, mnist_loaders
from studies import accuracy
from studies.common import append, get_device, on_cpu, read

ROWS = read(accuracy.RESULTS / "accuracy.csv")
EVERY = {name: changes for _, variants in accuracy.STUDIES.values() for name, changes in variants.items()}
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
PARAMETERS = {row["variant"]: int(row["parameters"]) for row in ROWS}


@pytest.mark.parametrize("name", EVERY)
def test_each_variant_trains_and_has_the_parameters_of_its_stored_rows(name, mnist):
    row = accuracy.trial(name, "60k/test", 1, images=256, **EVERY[name] | {"epochs": 1})
    assert 0 < float(row["last"]) < 100 and len(row["accuracies"].split()) == len(row["losses"].split()) == 1
    assert row["parameters"] == PARAMETERS[name.removesuffix(", 15 epochs")]


def test_a_trial_is_the_notebook_s_training(mnist, tmp_path, monkeypatch):
    """On the same few images, and on a CPU: a GPU never adds up in the same order. The average only watches."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(accuracy, "get_device", lambda: cpu)
    monkeypatch.setattr(accuracy, "on", lambda device, model: model)  # channels_last rounds otherwise
    row = accuracy.trial("ours", "60k/test", 3, images=500, epochs=2, batch_size=50)
    recipe = Recipe(seed=3, epochs=2, batch_size=50)
    few = mnist_loaders(recipe, cpu, ROOT / "data")
    for loader in few:
        loader.images, loader.labels = loader.images[:500], loader.labels[:500]
    names = {"recipe": recipe, "train_loader": few[0], "test_loader": few[1], "folder": tmp_path}
    run_training_cell(names)
    assert row["accuracies"] == " ".join(f"{x:.2f}" for x in names["test_acc"])
    assert row["losses"] == " ".join(f"{x:.5f}" for x in names["test_losses"])
    without = accuracy.trial("-", "60k/test", 3, images=500, epochs=2, batch_size=50, averaged=False)
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


def test_readme_and_s6_ipynb_say_what_the_rows_say():
    """Gains are means of differences between trainings with the same seed on the same kind of device."""
    rows = pd.DataFrame([row for row in ROWS if row["split"] == "60k/test"])
    rows = rows.set_index(["variant", rows.apply(on_cpu, axis=1), "seed"])
    last, raw = (rows[kind].str.split().str[-1].astype(float) for kind in ("accuracies", "raw accuracies"))
    ours = last["ours"]
    assert f"{ours.mean():.2f} ± {ours.std():.2f} % (mean ± standard deviation), lowest {ours.min():.2f} %" in README
    assert f" %, over {len(ours)} trainings" in README
    pairs = [
        ours - raw["constant rate"],
        last["one-cycle up to 0.2, Nesterov, weight decay"] - last["BatchNorm before ReLU, no ReLU on the scores"],
        ours - last["no BatchNorm, He's first weights, a quarter of the rate"],
        ours - last["no augmentation"],
        ours - last["constant rate"],
        ours - raw["ours"],
        ours - last["ReLU instead of SiLU"],
    ]
    gains = [round(pair.mean(), 2) for pair in pairs]
    intervals = [ttest_1samp(pair.dropna(), 0).confidence_interval(1 - 0.05 / len(pairs)) for pair in pairs]
    exec(CODE["S6"][-1].source, names := {"plt": plt})
    assert names["gains"] == gains
    assert names["half_lines"] == [round((high - low) / 2, 2) for low, high in intervals]
    section = re.search("The convolutions are .* put BatchNorm before SiLU", README)[0]
    chance = [", perhaps chance" if low < 0 < high else "" for low, high in intervals]
    table = [f"{gain:.2f}{perhaps}" for gain, perhaps in zip(gains, chance, strict=True)]
    assert re.findall(r"\| (\d\.\d\d.*?) \|", section) == table
    assert section in " ".join("".join(cell.source for cell in NOTEBOOKS["S6"].cells).split())
    [text] = [cell.source for cell in NOTEBOOKS["experiment"].cells if "constant rate of 0.2" in cell.source]
    figures = re.findall(r"[+-]\d\.\d{3} ± \d\.\d{3} points(?:, \d+ pairs)?", text)
    first = rows["accuracies"].str.split().str[0].astype(float)
    low, high = ttest_1samp((first["constant rate"] - first["ours"]).dropna(), 0).confidence_interval(1 - 0.05 / 10)
    assert figures.pop(0) == f"{(low + high) / 2:+.3f} ± {(high - low) / 2:.3f} points"
    verdicts = "".join(map(text_of, CODE["ablation"]))
    assert len(figures) == 3 and all(figure in verdicts for figure in figures)
