import re

import pytest
import torch
from conftest import ROOT
from torch import nn
from torchsummary import summary

from s6.model import Net


def test_summary_is_the_course_s_line_for_line_as_readme_has_it(capsys):
    table = re.search("```\n(-{64}\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert len(table.splitlines()) == 35 and "Total params: 10,474" in table
    summary(Net(), (1, 28, 28), device="cpu")
    assert capsys.readouterr().out.startswith(table)


def test_resolution_and_receptive_field_are_those_in_the_comments():
    """Measured, not added up: the first output of each layer, followed back to the pixels it depends on."""
    source = (ROOT / "s6" / "model.py").read_text()
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


@pytest.mark.parametrize("bfloat16", [False, True])
def test_output_is_log_probabilities(bfloat16):
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
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
