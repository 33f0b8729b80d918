"""The exports compute what the network computes, for batches of any size."""

import pytest
import torch

from s6.model import Net
from studies import export
from studies.common import trained

pytest.importorskip("onnxruntime", reason="needs tests/requirements.txt")
pytest.importorskip("onnxscript", reason="needs tests/requirements.txt")


def test_both_exports_agree_with_the_network_and_not_with_another(mnist, tmp_path, monkeypatch, capsys):
    model = Net().eval()
    monkeypatch.setattr(export, "trained", lambda: model)
    monkeypatch.setattr(export, "ROOT", tmp_path)
    export.main(images=200)
    said, folder = capsys.readouterr().out, tmp_path / "build"
    assert {path.name for path in folder.iterdir()} == {"S6.onnx", "S6.pt2"}, "the weights are inside"
    assert said.count("200 images") == 2
    exports = export.export(model, folder).values()
    for images in (torch.rand(n, 1, 28, 28) for n in (1, 2, 7)):
        for exported in exports:
            torch.testing.assert_close(exported(images), model(images), rtol=0, atol=1e-4)
    monkeypatch.setattr(export, "export", lambda *_: {folder / "S6.pt2": Net().eval()})
    with pytest.raises(AssertionError, match="not close"):
        export.main(images=200)


def test_the_weights_of_s6_ipynb_are_read_and_what_else_is_there_is_told_in_a_sentence(tmp_path):
    path, net = tmp_path / "S6.pt", Net()
    torch.save(net.state_dict(), path)
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(trained(path)(images), net.eval()(images))

    half = path.read_bytes()[:9000]
    torch.save({"layers.0.0.weight": torch.zeros(8, 1, 3, 3)}, path)  # the names of older weights
    for content in (path.read_bytes(), half, b"no weights", b"", None):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(SystemExit, match=r"S6\.pt holds no weights of Net\(\), so train first, with `make run`"):
            trained(path)
