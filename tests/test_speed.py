"""The speed study runs, and goes on where it stopped; its Muon is what it says."""

import shutil
import sys

import pytest
import torch
from conftest import ROOT

from s6.model import Net
from s6.utils import Recipe
from studies import speed
from studies.common import read


def test_every_part_runs_and_nothing_twice(mnist, tmp_path, monkeypatch, capsys):
    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["speed.py", *arguments, "--images", "500", "--results", str(tmp_path)])
        speed.main()
        return capsys.readouterr().out

    monkeypatch.setattr("s6.utils.load_mnist", lambda *_, **__: mnist)  # read once
    monkeypatch.setattr(speed, "WORKERS", (0,))
    monkeypatch.setattr(speed, "TURNS", {"A": speed.A, "B": speed.B})
    header = (ROOT / "studies/results/goal.csv").read_text(encoding="utf-8").splitlines(keepends=True)[0]
    (tmp_path / "goal.csv").write_text(header, encoding="utf-8")
    goal = "goal", "--split", "50k/10k", "--set", "epochs=1"
    for _ in range(2):
        start("epochs")
        start(*goal)
    rows, [row] = read(tmp_path / "speed.csv"), read(tmp_path / "goal.csv")
    assert [one["turn"] for one in rows] == ["1"] * 3 + ["2"] * 2 + ["3"] * 2
    assert all(float(one[key]) > 0 for one in rows for key in ("seconds", "seconds of C"))
    assert row["settings"].endswith(f"degrees={Recipe.degrees}, shear={Recipe.shear}")
    assert 0 < float(row["accuracy"]) <= 100 and float(row["loss"]) > 0 and float(row["seconds"]) > 0
    said = start("tables")
    assert all(f"| {one['name']} | " in said for one in rows) and f"| {row['settings']} | 50k/10k |" in said
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def test_the_studies_readme_shows_the_tables_of_the_stored_rows(tmp_path, capsys):
    for name in ("speed.csv", "goal.csv"):
        shutil.copy(ROOT / "studies" / "results" / name, tmp_path)
    speed.tables(tmp_path)
    for table in capsys.readouterr().out.strip().split("\n\n"):
        assert table in (ROOT / "studies" / "README.md").read_text(encoding="utf-8")


def test_muon_steps_along_orthonormal_rows_and_keeps_the_norm():
    torch.manual_seed(0)
    matrix = torch.randn(16, 72)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(u.T @ speed.orthogonalized(matrix) @ v.T, torch.eye(16), rtol=0, atol=0.35)
    model, images = Net(), torch.randn(8, 1, 28, 28)
    optimizer = speed.Muon([{"params": model.parameters(), "lr": 0.03}], {"momentum": 0.9})
    for _ in range(3):
        model(images)[:, 0].mean().backward()
        optimizer.step()
    for p in model.parameters():
        assert p.ndim == 1 or p.norm().item() == pytest.approx(len(p) ** 0.5, rel=0.04)  # a step is 0.03 of it
