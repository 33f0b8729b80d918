import re

import pytest
import torch
from conftest import ROOT
from torch import nn
from torchsummary import summary

from s6.model import Net

SUMMARY = """\
----------------------------------------------------------------
        Layer (type)               Output Shape         Param #
================================================================
            Conv2d-1            [-1, 8, 26, 26]              80
       BatchNorm2d-2            [-1, 8, 26, 26]              16
           Dropout-3            [-1, 8, 26, 26]               0
            Conv2d-4           [-1, 12, 24, 24]             876
       BatchNorm2d-5           [-1, 12, 24, 24]              24
           Dropout-6           [-1, 12, 24, 24]               0
            Conv2d-7           [-1, 16, 22, 22]           1,744
       BatchNorm2d-8           [-1, 16, 22, 22]              32
           Dropout-9           [-1, 16, 22, 22]               0
        MaxPool2d-10           [-1, 16, 11, 11]               0
           Conv2d-11            [-1, 8, 11, 11]             136
      BatchNorm2d-12            [-1, 8, 11, 11]              16
          Dropout-13            [-1, 8, 11, 11]               0
           Conv2d-14             [-1, 12, 9, 9]             876
      BatchNorm2d-15             [-1, 12, 9, 9]              24
          Dropout-16             [-1, 12, 9, 9]               0
           Conv2d-17             [-1, 16, 7, 7]           1,744
      BatchNorm2d-18             [-1, 16, 7, 7]              32
          Dropout-19             [-1, 16, 7, 7]               0
           Conv2d-20             [-1, 16, 5, 5]           2,320
      BatchNorm2d-21             [-1, 16, 5, 5]              32
          Dropout-22             [-1, 16, 5, 5]               0
           Conv2d-23             [-1, 16, 3, 3]           2,320
      BatchNorm2d-24             [-1, 16, 3, 3]              32
          Dropout-25             [-1, 16, 3, 3]               0
           Conv2d-26             [-1, 10, 3, 3]             170
        AvgPool2d-27             [-1, 10, 1, 1]               0
================================================================
Total params: 10,474
Trainable params: 10,474
Non-trainable params: 0
----------------------------------------------------------------
Input size (MB): 0.00
Forward/backward pass size (MB): 0.55
Params size (MB): 0.04
Estimated Total Size (MB): 0.59
----------------------------------------------------------------
"""


def test_summary_is_the_original_s_line_for_line(capsys):
    summary(Net(), (1, 28, 28), device="cpu")
    assert capsys.readouterr().out == SUMMARY


def test_readme_shows_the_summary():
    assert SUMMARY in (ROOT / "README.md").read_text()


def test_resolution_and_receptive_field_are_those_in_the_comments():
    """Measured, not added up: the first output of each layer, followed back to the pixels it depends on."""
    source = (ROOT / "s6" / "model.py").read_text()
    claimed = [tuple(map(int, pair)) for pair in re.findall(r"# (\d+) x \1, sees (\d+)", source)]

    torch.manual_seed(0)
    layers = Net().eval().layers
    for module in layers.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.uniform_(module.weight, 0.1, 1)  # positive, so that no ReLU and no cancelling hides a pixel
            nn.init.zeros_(module.bias)
    measured = []
    for depth in range(1, len(layers) + 1):
        images = torch.rand(64, 1, 28, 28, requires_grad=True)  # many: the maximum hides three pixels of four
        output = layers[:depth](images)
        output[:, :, 0, 0].sum().backward()
        seen = images.grad.abs().sum((0, 1)) > 0
        measured.append((output.shape[-1], seen.any(0).sum().item()))
        assert seen.any(0).sum() == seen.any(1).sum()
    assert measured == claimed
    assert measured[-1] == (1, 28)


def test_output_is_log_probabilities():
    output = Net()(torch.randn(5, 1, 28, 28))
    assert output.shape == (5, 10)
    torch.testing.assert_close(output.exp().sum(1), torch.ones(5))


def test_dropout_is_off_unless_asked_for():
    images = torch.randn(4, 1, 28, 28)
    without, dropped = Net().train(), Net(dropout=0.5).train()
    assert torch.equal(without(images), without(images))
    assert not torch.equal(dropped(images), dropped(images))


@pytest.mark.parametrize("shape", [(28, 28), (1, 28, 28), (4, 784), (4, 28, 28), (4, 3, 28, 28), (4, 1, 32, 32)])
def test_wrong_shape_says_what_was_expected_and_what_came(shape):
    with pytest.raises(ValueError) as error:
        Net()(torch.zeros(shape))
    assert "(B, 1, 28, 28)" in str(error.value) and str(shape) in str(error.value)
