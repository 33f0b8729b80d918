"""The drawing page carries the network, and refuses one that it cannot compute."""

import copy
import re
from html import unescape

import pytest
import torch

from conftest import CODE, ROOT, network_in
from s6 import utils
from s6.draw import classify, drawing_page, page_weights
from s6.model import ConvBlock, Net


def test_the_weights_of_the_page_are_the_network_s_batch_normalisation_folded(batches):
    torch.manual_seed(0)
    net = Net()
    for norm in (module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        for part in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            part.uniform_(0.5, 1.5)
    images, _ = next(iter(batches))
    assert torch.allclose(network_in(page_weights(net))(images), net.eval()(images), atol=1e-5)


def test_the_memory_layout_changes_nothing(network):
    other = copy.deepcopy(network).to(memory_format=torch.channels_last)
    assert not other.layers[1].conv.weight.is_contiguous() and page_weights(other) == page_weights(network)


def test_the_page_has_the_network_s_activation():
    for relu in (torch.nn.functional.relu, torch.nn.ReLU()):
        assert 'ACTIVATION = "relu"' in page_weights(Net(activation=relu))


class Residual(ConvBlock):
    def forward(self, x):
        return x[:, :8] + super().forward(x)


@pytest.mark.parametrize(
    ("place", "layers", "message"),
    [
        (3, [torch.nn.AvgPool2d(2)], "does not know this layer"),
        (3, [torch.nn.MaxPool2d(2, stride=1)], "does not know this layer"),
        (3, [torch.nn.MaxPool2d((2, 2))], "does not know this layer"),
        (4, [torch.nn.Sequential(torch.nn.Conv2d(16, 8, 1))], "does not know this layer"),
        (4, [torch.nn.Conv2d(16, 8, 1, stride=2)], "does not know this layer"),
        (4, [torch.nn.Conv2d(16, 8, 1, bias=False)], "does not know this layer"),
        (4, [torch.nn.Sequential(torch.nn.Conv2d(16, 8, 1), torch.nn.GroupNorm(1, 8))], "does not know this layer"),
        (4, [Residual(16, 8, 1)], "needs blocks"),
        (4, [torch.nn.Conv2d(16, 8, 1)], "needs blocks"),
        (9, [ConvBlock(16, 10, 1)], "needs blocks"),
        (10, [torch.nn.MaxPool2d(1), torch.nn.AvgPool2d(3)], "needs blocks"),
        (10, [torch.nn.AdaptiveMaxPool2d(1)], "needs blocks"),
    ],
)
def test_a_network_that_the_page_cannot_compute_is_refused(place, layers, message, network):
    net = copy.deepcopy(network)
    net.layers = torch.nn.Sequential(*net.layers[:place], *layers, *net.layers[place + 1 :])
    with pytest.raises(ValueError, match=message):
        page_weights(net)


@pytest.mark.parametrize("other", [torch.nn.Linear(784, 10), Net(activation=torch.tanh)])
def test_a_network_without_blocks_or_with_another_activation_is_refused(other):
    with pytest.raises(ValueError, match="needs blocks with SiLU or ReLU"):
        page_weights(other)


def test_the_page_loads_its_weights_or_is_in_one_piece_for_a_notebook(network, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "index.html").read_text(encoding="utf-8")
    assert drawing_page(network) == page.replace(' src="weights.js">', f">\n{page_weights(network)}") != page
    monkeypatch.setattr("s6.draw.__file__", str(tmp_path / "draw.py"))
    with pytest.raises(FileNotFoundError, match="index.html"):
        drawing_page(network)
    (tmp_path / "index.html").write_text('<script src="weights.js"></script>', encoding="utf-8")
    assert drawing_page(network) == f"<script>\n{page_weights(network)}</script>"


def test_the_page_stored_in_s6_ipynb_is_today_s_page_with_the_weights_stored_there():
    outputs = [output.get("data", {}) for cell in CODE["S6"] for output in cell.outputs]
    [stored] = [unescape(data["text/html"]) for data in outputs if "text/html" in data]
    weights = re.search(r"const LAYERS.*?(?=</script>)", stored, re.DOTALL)[0]
    assert f'srcdoc="{drawing_page(network_in(weights))}"' in stored


def test_the_stored_network_is_above_the_goal(network):
    images, labels = utils.load_mnist(ROOT / "data", train=False)
    assert (classify(network, images[:, 0])[0] == labels).sum() > 9940
