"""The accuracy study runs its trials once, wherever they run; README and notebook say what the stored rows say."""

import ast
import fcntl
import importlib.util
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from s6.model import Net
from s6.utils import Recipe
from studies import accuracy

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs studies/requirements.txt")
PATH = accuracy.RESULTS / "accuracy.csv"
ROWS = accuracy.read(PATH)
LISTS = ("LADDER", "ABLATION", "WIDTHS")
TINY = {"epochs": 2, "batch_size": 50}


# ------------------------------------------------------------------------------------------------------------ variants


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({}, 10_474),
        ({"net": "course", "dropout": 0.005}, 10_474),
        ({"net": "ReLU before BatchNorm"}, 10_474),
        ({"net": "pooling earlier"}, 10_474),
        ({"net": "no BatchNorm"}, 10_474 - 2 * (8 + 12 + 16 + 8 + 12 + 16 + 16 + 16)),
        ({"net": "no transition"}, 10_474 - 136 - 16 + 8 * 9 * 12),
        ({"net": "linear layer"}, 10_474 - 170 + 1450),
        ({"width": 0.5}, 2_762),
        ({"width": 1.25}, 16_190),
    ],
    ids=str,
)
def test_parameters_of_the_networks(changes, parameters):
    model = accuracy.build(**changes).train()
    assert sum(p.numel() for p in model.parameters()) == parameters
    output = model(torch.rand(4, 1, 28, 28))
    assert output.shape == (4, 10) and torch.allclose(output.exp().sum(1), torch.ones(4))


def test_the_unchanged_network_is_the_notebook_s():
    torch.manual_seed(0)
    expected = Net(0.1).state_dict()
    torch.manual_seed(0)
    found = accuracy.build(dropout=0.1).state_dict()
    assert list(found) == list(expected) and all(map(torch.equal, found.values(), expected.values()))


def test_unknown_networks_and_optimizers_are_refused(mnist):
    with pytest.raises(ValueError, match="no network called 'wider'"):
        accuracy.build("wider")
    with pytest.raises(ValueError, match="own width"):
        accuracy.build("linear layer", width=0.5)
    with pytest.raises(ValueError, match="no optimizer called 'Adam'"):
        accuracy.trial("-", "60k/test", 1, images=10, optim="Adam")


def test_the_ladder_leads_from_the_course_to_ours():
    rungs = list(accuracy.LADDER.values())
    assert rungs[0] == accuracy.COURSE and rungs[-1] == {}
    assert sorted(key for given_up in accuracy.RUNGS.values() for key in given_up) == sorted(accuracy.COURSE)


def test_rates():
    def share(schedule, step):
        return accuracy.rate(schedule, lambda step: -step, step, total=2000, epochs=20)

    assert share("one-cycle", 7) == -7 and share("constant", 7) == 1
    assert [share("a tenth after epoch 15", step) for step in (0, 1499, 1500, 1999)] == [1, 1, 0.1, 0.1]
    assert [share("flat, then down", step) for step in (0, 99, 1000, 1500, 2000)] == [0.01, 1, 1, 0.5, 0]


# -------------------------------------------------------------------------------------------------------------- trials


def test_a_trial_gives_the_figures_of_the_notebook_s_calls(mnist):
    """Trained by hand, as README's example does it, on the same few images."""
    import torch.nn.functional as F

    from s6.utils import CPUParallel, get_device, mnist_loaders, set_seed, test, train

    row = accuracy.trial("ours", "60k/test", 3, images=500, **TINY)
    device, recipe = get_device(), Recipe(**TINY)
    set_seed(3)
    loader, test_loader = mnist_loaders(ROOT / "data", 50, device, 3, augment=recipe.augment)
    for part in (loader, test_loader):
        part.images, part.labels = part.images[:500], part.labels[:500]
    model = Net().to(device)
    optimizer, scheduler, averaged = recipe.prepare(model, len(loader))
    fast = CPUParallel(model) if device.type == "cpu" else model
    losses, accuracies = [], []
    for _ in range(2):
        train(fast, device, loader, optimizer, F.nll_loss, scheduler=scheduler, averaged=averaged, disable=True)
        test(averaged, device, test_loader, F.nll_loss, losses, accuracies)
    assert tuple(row) == accuracy.COLUMNS and (row["variant"], row["seed"], row["parameters"]) == ("ours", 3, 10_474)
    assert row["accuracies"] == " ".join(f"{x:.2f}" for x in accuracies)
    assert row["losses"] == " ".join(f"{x:.5f}" for x in losses)
    assert (row["last"], row["epochs"]) == (f"{accuracies[-1]:.2f}", 2)


EVERY = {name: changes for _, variants in accuracy.STUDIES.values() for name, changes in variants.items()}


@pytest.mark.parametrize("name", EVERY)
def test_each_variant_trains(name, mnist):
    changes = EVERY[name] | {"epochs": 1}
    row = accuracy.trial(name, "60k/test", 1, images=256, **changes)
    assert 0 < float(row["last"]) < 100 and len(row["accuracies"].split()) == 1


def test_without_the_average_the_training_is_the_same(mnist):
    """Which is why no trial is spent on it: the raw accuracies of ours are its figures."""
    ours, unaveraged = (
        accuracy.trial("-", "60k/test", 1, images=500, **TINY, **changes) for changes in ({}, accuracy.UNAVERAGED)
    )
    assert unaveraged["accuracies"] == ours["raw accuracies"] != ours["accuracies"]
    ours["settings"] = accuracy.settings({})
    last = float(unaveraged["last"])
    assert accuracy.finals([ours], "60k/test", accuracy.UNAVERAGED) == [last]


def test_the_settings_tell_any_two_variants_of_a_study_apart():
    for split, variants in accuracy.STUDIES.values():
        assert split in ("50k/10k", "60k/test")
        assert len({accuracy.settings(changes) for changes in variants.values()}) == len(variants)


# --------------------------------------------------------------------------------------------------------------- rows


def a_row(variant="ours", seed=1, **changes):
    row = dict.fromkeys(accuracy.COLUMNS, "-") | {"variant": variant, "split": "60k/test", "seed": str(seed)}
    return row | {"last": "99.60", "settings": accuracy.settings(changes)}


def test_half_a_row_is_cut_off_and_its_trial_run_again(tmp_path):
    path = tmp_path / "rows.csv"
    assert accuracy.stored(path) == []
    accuracy.append(path, a_row(seed=1))
    accuracy.append(path, a_row(seed=2))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    rows = accuracy.stored(path)
    assert [row["seed"] for row in rows] == ["1"]
    assert [job[2] for job in accuracy.missing("reporting", (1, 2, 3), rows)] == [2, 3]
    accuracy.append(path, a_row(seed=2))
    assert path.read_bytes() == whole


def test_a_file_killed_before_its_header_was_whole_starts_anew(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("variant,spl")
    assert accuracy.stored(path) == []
    accuracy.append(path, a_row())
    assert accuracy.stored(path) == [a_row()]


def test_rows_of_another_recipe_do_not_count():
    rows = [a_row(lr=0.123)]
    assert len(accuracy.missing("reporting", (1,), rows)) == 1
    assert accuracy.missing("reporting", (1,), [a_row()]) == []


TWO_NODES, ONE_GPU = [{"num_cpus": 1}, {"num_cpus": 1}], [{"num_cpus": 2, "num_gpus": 1}]


@needs_ray
@pytest.mark.parametrize("nodes", [TWO_NODES, ONE_GPU], ids=["two nodes", "one GPU, as Ray sees it"])
def test_trials_run_side_by_side_and_none_is_lost(nodes, tmp_path, mnist, monkeypatch, capsys):
    """Seeds 1 and 2 wait for each other, so they must run at once; 3 is killed at its first attempt; 4 raises."""
    import ray
    from ray.cluster_utils import Cluster

    real = accuracy.trial

    def trial(*job, **changes):
        here = tmp_path / f"{job[2]}"
        first = not here.exists()
        here.touch()
        if job[2] == 3 and first:
            os.kill(os.getpid(), signal.SIGKILL)
        if job[2] == 4:
            raise FloatingPointError("the training loss is nan")
        deadline = time.time() + 120
        while not ((tmp_path / "1").exists() and (tmp_path / "2").exists()):
            assert time.time() < deadline, "the other trial did not start"
            time.sleep(0.1)
        return real(*job, **changes) | {"device": ray.get_runtime_context().get_node_id()}

    monkeypatch.setattr(accuracy, "trial", trial)
    jobs = [("ours", "60k/test", seed, TINY | {"images": 100}) for seed in (1, 2, 3, 4)]
    cluster = Cluster()
    try:
        for node in nodes:
            cluster.add_node(include_dashboard=False, **node)
        failed = accuracy.run(jobs, tmp_path / "rows.csv", cluster.address, ROOT / "data")
    finally:
        ray.shutdown()
        cluster.shutdown()
    rows = accuracy.read(tmp_path / "rows.csv")
    assert failed == 1 and "seed 4 failed: FloatingPointError: the training loss is nan" in capsys.readouterr().out
    node = {row["seed"]: row["device"] for row in rows}
    assert sorted(node) == ["1", "2", "3"] and (node["1"] != node["2"]) == (len(nodes) == 2)


@needs_ray
def test_the_command_runs_what_is_missing_and_nothing_twice(tmp_path, mnist):
    path = tmp_path / "rows.csv"
    accuracy.append(path, a_row(seed=1, images=250))

    def start():
        command = [sys.executable, ROOT / "studies" / "accuracy.py", "reporting", "--seeds", "2"]
        return subprocess.run(
            [*command, "--results", path, "--images", "250"], cwd=tmp_path, capture_output=True, text=True
        )

    done = start()
    assert not done.returncode, done.stderr
    rows = accuracy.read(path)
    assert rows[0] == a_row(seed=1, images=250) and [row["seed"] for row in rows] == ["1", "2"]
    assert "ours, seed 2: " in done.stdout and all(rows[1].values())
    before = path.read_bytes()
    done = start()
    assert (done.returncode, path.read_bytes()) == (0, before) and "Nothing is missing" in done.stdout


def test_two_starts_do_not_write_to_one_file(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "reporting", "--results", str(path)])
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="Another start is writing to"):
            accuracy.main()


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--only", "no drop-out", "no variant 'no drop-out' in ladder; there are: the course's recipe; "),
        ("--images", "0", "argument --images: invalid at_least_one value: '0'"),  # not the whole study
    ],
)
def test_a_bad_option_is_refused(option, value, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "ladder", option, value])
    with pytest.raises(SystemExit):
        accuracy.main()
    assert said in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- the stored rows


def test_stored_rows_are_whole_and_there_once():
    for row in ROWS:
        curve, raw, losses = ([float(x) for x in row[key].split()] for key in accuracy.COLUMNS[-3:])
        assert len(curve) == len(losses) == int(row["epochs"]) == 20 and len(raw) == (
            20 if row["split"] == "60k/test" else 0
        )
        figures = [float(row[key]) for key in ("last", "best", "lowest of last five")]
        assert figures == [curve[-1], max(curve), min(curve[-5:])]
        first = next((str(epoch) for epoch, x in enumerate(curve, 1) if x >= 99.4), "-")
        assert first == row["first epoch at 99.4"]
    assert len({(row["settings"], row["split"], row["seed"]) for row in ROWS}) == len(ROWS)
    assert list(ROWS[0]) == list(accuracy.COLUMNS)


def test_stored_rows_are_of_the_variants_as_they_are_now():
    """A variant that was changed, or a new recipe, needs new rows."""
    for row in ROWS:
        named = [
            changes
            for split, variants in accuracy.STUDIES.values()
            for name, changes in variants.items()
            if (split, name) == (row["split"], row["variant"])
        ]
        assert row["settings"] in map(accuracy.settings, named), row["variant"]


def test_the_readmes_show_the_tables_of_the_stored_rows():
    *report, choice = accuracy.tables(ROWS)
    for name, tables in {"README.md": report, "studies/README.md": [choice]}.items():
        for table in tables:
            assert table in (ROOT / name).read_text(), f"{name} lacks:\n{table}"


def test_the_readmes_words_about_the_rows():
    readme, details = (" ".join((ROOT / name).read_text().split()) for name in ("README.md", "studies/README.md"))
    p = statistics.mean(accuracy.finals(ROWS, "60k/test", {})) / 100
    assert f"is {100 * math.sqrt(p * (1 - p) / 10_000):.2f} points." in readme

    losses = {
        name: accuracy.finals(ROWS, "50k/10k", changes, "losses")
        for name, changes in accuracy.STUDIES["choosing"][1].items()
        if "smoothing" not in changes  # another loss was trained, and this one reads high
    }
    bad = {
        "more augmentation": "augmentation x 1.5",
        "elastic shifts": "elastic",
        "small batches in shards": "batches of 62, rate 0.1",
        "the ReLU before BatchNorm": "ReLU before BatchNorm",
        "twice the rate": "rate 0.4",
        "dropout": "shift 1, shear 10, dropout 0.02",
    }
    assert f"a loss of 0.02 or more came with {', '.join(bad)}. " in details
    assert set(bad.values()) == {name for name, values in losses.items() if max(values) >= 0.02}
    spread = max(max(values) / min(values) for values in losses.values())
    assert f"differ by up to {100 * (spread - 1):.0f} % in loss" in details


def test_the_notebook_draws_the_variants_of_the_study():
    notebook = (ROOT / "notebooks" / "ablation.ipynb").read_text()
    cells = ["".join(cell["source"]) for cell in json.loads(notebook)["cells"]]
    lists = {name: re.search(rf"^{name} = (\[.*?\])", "\n".join(cells), re.M | re.S)[1] for name in LISTS}
    ladder, ablation, widths = (ast.literal_eval(lists[name]) for name in LISTS)
    assert ladder == list(accuracy.LADDER)
    assert set(ablation) | set(widths) == set(accuracy.ABLATION)


def test_readme_says_how_seed_1_ended_here_and_in_the_notebook():
    [row] = [row for row in ROWS if (row["variant"], row["split"], row["seed"]) == ("ours", "60k/test", "1")]
    stored = re.findall(r"test loss \S+ accuracy (\d\S+) %", (ROOT / "notebooks" / "S6.ipynb").read_text())
    assert f"ended at {row['last']} and at {stored[-1]} %" in (ROOT / "README.md").read_text()


def test_another_row_changes_the_tables():
    """So that the test above fails until README follows."""
    ours = accuracy.rows_of(ROWS, "60k/test", {})
    other = {"last": "99.00", "accuracies": f"{ours[0]['accuracies'][:-5]}99.00"}
    changed = [row | other if row is ours[0] else row for row in ROWS]
    before, after = list(accuracy.tables(ROWS)), list(accuracy.tables(changed))
    assert [x != y for x, y in zip(before, after, strict=True)] == [True, True, True, False]
