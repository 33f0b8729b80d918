"""The exports compute what the network computes, whatever the size of the batch."""

import sys

import pytest
import torch

from s6.model import Net
from studies import export

pytest.importorskip("onnxruntime", reason="needs studies/requirements.txt")
pytest.importorskip("onnxscript", reason="needs studies/requirements.txt")


def test_both_exports_agree_with_the_network_on_all_test_images(mnist, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    torch.save(Net().state_dict(), tmp_path / "S6.pt")
    options = ["--weights", f"{tmp_path / 'S6.pt'}", "--folder", f"{tmp_path / 'new'}"]
    monkeypatch.setattr(sys, "argv", ["export.py", *options])
    export.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["S6.onnx", "S6.pt2"]
    assert all("10,000 images" in line and line.endswith(" 0 labels differ") for line in lines)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"S6.onnx", "S6.pt2"}, "the weights are inside"


def test_the_exports_take_any_number_of_images_and_another_network_is_told(tmp_path):
    model, other = Net().eval(), Net().eval()
    for exported in export.export(model, tmp_path).values():
        for images in (torch.rand(n, 1, 28, 28) for n in (1, 2, 7, 1000)):
            with torch.no_grad():
                assert torch.allclose(exported(images), model(images), atol=export.TOLERANCE)
        assert export.compare(other, exported, [(images, torch.zeros(1000).long())])[0] > export.TOLERANCE
