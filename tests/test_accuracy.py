"""The accuracy study trains as the notebook does, and nothing twice. README and S6.ipynb say what its rows say."""

import re
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch
from scipy.stats import ttest_1samp

from conftest import CODE, NOTEBOOKS, ROOT, run_training_cell, text_of
from s6.model import Net
from s6.utils import Recipe, mnist_loaders
from studies import accuracy, goal, speed, variants
from studies.common import RESULTS, read

ROWS = read(RESULTS / "accuracy.csv")
ARMS = {name: arm for _, arms in variants.STUDIES.values() for name, arm in arms.items()}
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


@pytest.mark.parametrize("name", ARMS)
def test_each_variant_trains_and_has_the_parameters_of_its_stored_rows(name, mnist):
    recipe, network = ARMS[name]
    row = accuracy.trial(name, (replace(recipe, epochs=1), network), "60k/test", 1, 256, columns={})
    assert 0 < float(row["last"]) < 100 and len(row["accuracies"].split()) == len(row["losses"].split()) == 1
    assert {row["parameters"]} == set(ROWS["parameters"][ROWS["variant"] == name])


def test_a_trial_is_the_notebook_s_training(mnist, tmp_path, monkeypatch):
    """On the same few images, and on a CPU: a GPU never adds up in the same order. The average only watches."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(accuracy, "get_device", lambda: cpu)
    monkeypatch.setattr(torch, "channels_last", torch.preserve_format)  # it rounds otherwise
    few = {"epochs": 2, "batch_size": 50}
    row = accuracy.trial("ours", (Recipe(**few), Net), "60k/test", 3, 500, columns={})
    recipe = Recipe(seed=3, **few)
    both = mnist_loaders(recipe, cpu, ROOT / "data")
    for loader in both:
        loader.images, loader.labels = loader.images[:500], loader.labels[:500]
    names = {"recipe": recipe, "train_loader": both[0], "test_loader": both[1], "folder": tmp_path}
    run_training_cell(names)
    assert row["accuracies"] == " ".join(f"{x:.2f}" for x in names["test_acc"])
    assert row["losses"] == " ".join(f"{x:.5f}" for x in names["test_losses"])
    without = accuracy.trial("-", (variants.NoAverage(**few), Net), "60k/test", 3, 500, columns={})
    assert without["accuracies"] == without["raw accuracies"] == row["raw accuracies"] != row["accuracies"]


def test_what_is_missing_is_run_and_nothing_twice(tmp_path, mnist, monkeypatch, capsys):
    path, one = tmp_path / "build" / "rows.csv", {"one": (Recipe(epochs=1), Net)}
    studies = {"report": ("60k/test", one | {"diverges": (Recipe(epochs=9, lr=1e30), Net)})}

    def start(*more):
        monkeypatch.setattr("sys.argv", ["accuracy.py", "report", "--seeds", "2", "--images", "250", *more])
        with pytest.raises(SystemExit) as end:
            accuracy.main(studies, RESULTS / "rows.csv", "")
        return end.value.code

    monkeypatch.setattr(accuracy, "ROOT", tmp_path)
    assert start("--only", "two") == 2 and "has no variant {'two'}" in capsys.readouterr().err
    assert start() == 1, "two trials failed"
    rows = read(path)
    assert list(rows["variant"]) == ["one", "one"] and list(rows) == list(ROWS), "the stored file can take new rows"
    assert "diverges, seed 2 failed: FloatingPointError" in capsys.readouterr().out
    others = rows.assign(seed=[3, 4], changes=["of another variant", rows["changes"][1]], kind=[rows["kind"][0], "-"])
    others.to_csv(path, mode="a", header=False, index=False)
    assert [job[3] for job in accuracy.missing("60k/test", one, (1, 2, 3, 4), path)] == [3, 4]


def test_stored_rows_are_whole_there_once_and_of_the_variants_as_they_are_now():
    for row in ROWS.to_dict("records"):
        recipe, network = ARMS[row["variant"]]
        curve, raw, losses = (row[kind].split() for kind in ("accuracies", "raw accuracies", "losses"))
        assert len(curve) == len(losses) == recipe.epochs and float(curve[-1]) == row["last"]
        assert len(raw) == recipe.epochs or row["split"] == "50k/10k"
        assert row["changes"] == variants.changes(recipe, network), row["variant"]
    assert not ROWS["commit"].str.contains("dirty").any() and set(ROWS["kind"]) == {"CPU", "GPU"}
    assert not ROWS.duplicated(["changes", "split", "seed", "kind"]).any()


def test_the_studies_readme_shows_the_tables_of_the_stored_rows(capsys):
    accuracy.tables(variants.STUDIES, RESULTS / "accuracy.csv")
    accuracy.tables(goal.STUDIES, RESULTS / "goal.csv")
    speed.table(RESULTS / "speed.csv")
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert len(tables) >= len(variants.STUDIES) + len(goal.STUDIES) + 1
    shown = (ROOT / "studies" / "README.md").read_text(encoding="utf-8")
    assert not [table for table in tables if table not in shown]


def test_readme_and_s6_ipynb_say_what_the_rows_say():
    """Gains are means of differences between trainings with the same seed on the same kind of device."""
    rows = ROWS[ROWS["split"] == "60k/test"].set_index(["variant", "kind", "seed"])
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
