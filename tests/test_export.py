"""The exports compute what the network computes, whatever the size of the batch."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_checkpoint import Training

from s6.model import Net
from s6.utils import load_averaged
from studies import export

needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnxruntime", "onnxscript"))), reason="needs studies/requirements.txt"
)


@needs_onnx
def test_both_exports_agree_with_the_network_on_all_test_images(batches, mnist, tmp_path, capsys):
    Training(tmp_path / "S6.pt", batches).run()
    export.main(
        ["--checkpoint", str(tmp_path / "S6.pt"), "--folder", str(tmp_path / "new"), "--data", str(ROOT / "data")]
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["S6.onnx", "S6.pt2"]
    assert all("10,000 images" in line and line.endswith(" 0 labels differ") for line in lines)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"S6.onnx", "S6.pt2"}, "the weights are inside"


@needs_onnx
def test_the_exports_take_any_number_of_images(tmp_path):
    model = Net().eval()
    for exported in export.export(model, tmp_path).values():
        for images in (torch.rand(n, 1, 28, 28) for n in (1, 2, 7, 1000)):
            with torch.no_grad():
                assert torch.allclose(exported(images), model(images), atol=export.TOLERANCE)


def test_an_export_that_computes_something_else_is_an_error(batches, mnist, tmp_path, monkeypatch):
    Training(tmp_path / "S6.pt", batches).run()
    other = load_averaged(Net(), tmp_path / "S6.pt")
    with torch.no_grad():
        other.layers[0][0].bias[0] += 0.1
    monkeypatch.setattr(export, "export", lambda model, folder: {tmp_path / "S6.pt": other})
    with pytest.raises(SystemExit, match="An export does not compute what the network computes"):
        export.main(["--checkpoint", str(tmp_path / "S6.pt"), "--data", str(ROOT / "data")])


def test_without_a_checkpoint_it_says_how_to_get_one(tmp_path):
    command = [sys.executable, ROOT / "studies" / "export.py", "--checkpoint", tmp_path / "S6.pt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith("S6.pt'. Train first: make run\n")
