import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchsummary import summary

from conftest import ROOT
from s6.model import ConvBlock, Net


def test_summary_is_the_course_s_line_for_line(capsys):
    table = (ROOT / "tests" / "summary.txt").read_text(encoding="utf-8")
    assert len(table.splitlines()) == 35 and "Total params: 10,474" in table
    summary(Net(), (1, 28, 28), device="cpu")
    assert capsys.readouterr().out.startswith(table)


def test_resolution_and_receptive_field_are_those_in_the_comments():
    """Measured, not added up: the first output of each layer, followed back to the pixels it depends on."""
    source = (ROOT / "s6" / "model.py").read_text(encoding="utf-8")
    claimed = [tuple(map(int, pair)) for pair in re.findall(r"# (\d+) x \1, sees (\d+)", source)]

    torch.manual_seed(0)
    layers = Net().eval().layers
    for module in layers.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.uniform_(module.weight, 0.1, 1)  # positive, so that no gradient is 0 and none cancels another
            nn.init.zeros_(module.bias)
    measured = []
    for depth in range(1, len(layers) + 1):
        images = torch.rand(64, 1, 28, 28, requires_grad=True)  # many: the maximum hides three pixels of four
        output = layers[:depth](images)
        output[:, :, 0, 0].sum().backward()
        across, down = ((images.grad.abs().sum((0, 1)) > 0).any(axis).sum().item() for axis in (0, 1))
        assert across == down
        measured.append((output.shape[-1], across))
    assert measured == claimed and measured[-1] == (1, 28)


@pytest.mark.parametrize("activation", [F.relu, torch.tanh, nn.GELU(), nn.PReLU()])
def test_the_activation_is_a_function_or_a_module_and_is_part_of_the_printed_form(activation):
    torch.manual_seed(0)
    model, images = Net(activation=activation), torch.randn(4, 1, 28, 28)
    x = images
    for layer in model.layers[:9]:
        x = activation(layer.norm(layer.conv(x))) if isinstance(layer, ConvBlock) else layer(x)
    torch.testing.assert_close(model.train().layers[:9](images), x)
    assert getattr(activation, "__name__", type(activation).__name__) in str(model) != str(Net())


def test_with_a_block_taken_away_or_added_it_is_an_error_or_the_mean():
    images = torch.randn(4, 1, 28, 28)
    for added in (ConvBlock(16, 16, 3), nn.MaxPool2d(2, 1)):  # leaves 1 x 1 place, or 2 x 2
        net = Net()
        net.layers.insert(9, added)
        expected = F.log_softmax(net.eval().layers[:-1](images).mean((2, 3)), 1)
        torch.testing.assert_close(net(images), expected)
    net = Net()
    del net.layers[8]
    with pytest.raises(ValueError, match="AvgPool2d"):
        net(images)  # 5 x 5 places


def test_output_is_log_probabilities_and_dropout_is_off_unless_asked_for():
    images = torch.randn(5, 1, 28, 28)
    without, dropped = Net(), Net(dropout=0.5)
    torch.testing.assert_close(without(images).exp().sum(1), torch.ones(5))
    assert torch.equal(without(images), without(images))
    assert not torch.equal(dropped(images), dropped(images))
    with pytest.raises(ValueError, match=r"images of shape \(B, 1, 28, 28\), got \(1, 28, 28\)"):
        without(images[0])
    assert Net(width=0.01)(images).shape == (5, 10), "one channel; other widths are in test_accuracy.py"
