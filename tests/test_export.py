"""The exports compute what the network computes, whatever the size of the batch."""

import pytest
import torch
from conftest import ROOT

from s6.model import Net
from s6.utils import Recipe, mnist_loaders
from studies import export

pytest.importorskip("onnxruntime", reason="needs tests/requirements.txt")
pytest.importorskip("onnxscript", reason="needs tests/requirements.txt")


def test_both_exports_agree_with_the_network_and_not_with_another(mnist, tmp_path):
    _, loader = mnist_loaders(Recipe(), "cpu", ROOT / "data")
    loader.images, loader.labels = loader.images[:1000], loader.labels[:1000]
    model, other = Net().eval(), Net().eval()
    exports = export.export(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"S6.onnx", "S6.pt2"}, "the weights are inside"
    for exported in exports.values():
        difference, labels = export.compare(model, exported, loader)
        assert difference <= export.TOLERANCE and labels == 0
        assert export.compare(other, exported, loader)[0] > export.TOLERANCE
        for images in (torch.rand(n, 1, 28, 28) for n in (1, 2, 7)):
            torch.testing.assert_close(exported(images), model(images), rtol=0, atol=export.TOLERANCE)
