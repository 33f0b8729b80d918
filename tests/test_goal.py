"""The Muon of the goal study is what it says; the speed study measures each time once."""

import pytest
import torch

from s6.model import Net
from studies import goal, speed
from studies.common import read


def test_muon_steps_along_orthonormal_rows_and_keeps_the_norm():
    torch.manual_seed(0)
    matrix = torch.randn(16, 72)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(u.T @ goal.orthogonalized(matrix) @ v.T, torch.eye(16), rtol=0, atol=0.35)
    model, images = Net(), torch.randn(8, 1, 28, 28)
    optimizer = goal.MuonRecipe(lr=0.03).optimizer(model)
    for _ in range(3):
        model(images)[:, 0].mean().backward()
        optimizer.step()
    for p in model.parameters():
        assert p.ndim == 1 or p.norm().item() == pytest.approx(len(p) ** 0.5, rel=0.04)  # a step is 0.03 of it


def test_the_speed_study_measures_each_time_once(mnist, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("s6.utils.load_mnist", lambda *_, **__: mnist)  # read once
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    monkeypatch.setattr(speed, "ROOT", tmp_path)
    for turns in ("1", "2"):
        monkeypatch.setattr("sys.argv", ["speed.py", "--turns", turns, "--images", "500"])
        speed.main()
    rows = read(tmp_path / "build" / "speed.csv")
    assert list(rows["epoch"]) == ["A, 0 workers", "A, 1 workers", "B", "C"] * 2
    assert list(rows["turn"]) == [1] * 4 + [2] * 4 and (rows["seconds"] > 0).all()
    seconds = rows.pivot(index="turn", columns="epoch", values="seconds")
    median = f"| B | {seconds['B'].median():.1f} | {(seconds['B'] / seconds['C']).median():.2f} | "
    assert median in capsys.readouterr().out
