"""Pictures of digits come out as MNIST has them, the bad ones with a sentence; the page carries the network."""

import base64
import copy
import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageDraw

from s6 import utils
from s6.draw import MEAN, STD, classify, drawing_page, page_weights, plot_reading, read_picture
from s6.model import ConvBlock, Net

WEIGHTS = (ROOT / "docs" / "weights.js").read_text(encoding="utf-8")


def network_in(text):
    """The network in weights.js. Its BatchNorms have no effect, because they are in the convolutions."""
    constants = {name: json.loads(value) for name, value in re.findall("const ([A-Z]+) = (.*);\n", text)}
    weights = torch.frombuffer(bytearray(base64.b64decode(constants["WEIGHTS"])), dtype=torch.float32)
    net, layers = Net(), constants["LAYERS"]
    assert (constants["ACTIVATION"], constants["UPRIGHT"], len(constants)) == ("silu", True, 4)
    convolutions = [module for module in net.modules() if isinstance(module, torch.nn.Conv2d)]
    shapes = [list(conv.weight.shape)[:3] for conv in convolutions]
    assert layers == [*shapes[:3], 2, *shapes[3:]]
    with torch.no_grad():
        for conv in convolutions:
            for part in (conv.weight, conv.bias):
                part.copy_(weights[: part.numel()].view_as(part))
                weights = weights[part.numel() :]
        for norm in (module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)):
            norm.running_var.fill_(1 - norm.eps)
    assert not len(weights)
    return net.eval()


@pytest.fixture(scope="module")
def network():
    return network_in(WEIGHTS)


def on_paper(digit, generator):
    """A (28, 28) digit in dark ink, ten times as large, on an 800 × 600 sheet of unevenly lit and noisy paper."""
    y, x = np.mgrid[:600, :800] / 800 - 0.5
    slope = generator.uniform(-40, 40, 2)
    sheet = generator.uniform(180, 220) + slope[0] * y + slope[1] * x
    ink = np.asarray(Image.fromarray(digit).resize((280, 280), Image.Resampling.BICUBIC), float) / 255
    top, left = generator.integers(321), generator.integers(521)
    part = sheet[top : top + 280, left : left + 280]
    part += (generator.uniform(30, 80) - part) * ink
    return (sheet + generator.normal(0, 8, sheet.shape)).clip(0, 255).astype(np.uint8)


def test_mnist_s_digits_on_paper_are_read(network):
    images, labels = utils.load_mnist(ROOT / "data", train=False)
    images, labels = images[:100, 0].numpy(), labels[:100]
    generator = np.random.default_rng(0)
    read = torch.tensor(np.stack([read_picture(on_paper(image, generator)) for image in images]))
    read = utils.upright(read.unsqueeze(1))[:, 0]
    right = (classify(network, read)[0] == labels).float().mean().item()
    assert right >= 0.99, f"{right:.1%}"


def seven(paper=230, ink=40, mode="L", at=(0, 0), size=(400, 300), scale=1, width=14):
    picture = Image.new(mode, size, paper)
    points = [(scale * x + at[0], scale * y + at[1]) for x, y in [(140, 80), (240, 76), (185, 230)]]
    ImageDraw.Draw(picture).line(points, ink, width)
    return picture


def test_what_a_camera_and_a_program_do_to_a_digit_changes_little(tmp_path):
    image = read_picture(seven()).astype(int)
    assert image.max() == 255 and (image > 127).any(1).sum() in (19, 20, 21)
    rows, columns = np.indices(image.shape)
    assert abs((image * rows).sum() / image.sum() - 14) < 0.2 and abs((image * columns).sum() / image.sum() - 14) < 0.2
    rotated = seven().transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    rotated.save(tmp_path / "phone.jpg", exif=exif, quality=95)
    seven().save(tmp_path / "first.gif", save_all=True, append_images=[Image.new("L", (400, 300), 230)])
    same = {
        "light on dark": seven(paper=20, ink=200),
        "coloured": seven(paper=(250, 240, 200), ink=(20, 20, 160), mode="RGB"),
        "transparent": seven(paper=(0, 0, 0, 0), ink=(0, 0, 0, 255), mode="RGBA"),
        "large": seven().resize((4000, 3000)),
        "phone": tmp_path / "phone.jpg",
        "animated": str(tmp_path / "first.gif"),
        "array": np.asarray(seven().convert("RGB")),
        "at the border": seven().crop((133, 69, 247, 238)),
    }
    for name, picture in same.items():
        assert abs(read_picture(picture) - image).mean() < 4, name


@pytest.mark.parametrize(("scale", "width", "noise"), [(0.3, 14, 0), (1, 2, 0), (3, 4, 8), (0.5, 3, 8)])
def test_a_small_or_thin_seven_stays_one(scale, width, noise, network):
    sheet = np.asarray(seven(size=(1600, 1200), at=(500, 300), scale=scale, width=width), float)
    sheet = sheet if noise else sheet[300:600, 500:900]
    sheet = sheet + np.random.default_rng(0).normal(0, noise, sheet.shape)
    labels, _ = classify(network, read_picture(sheet.clip(0, 255).astype(np.uint8))[None])
    assert labels.tolist() == [7]


def test_what_is_no_picture_is_refused(tmp_path):
    seven().save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:1500])
    (tmp_path / "digit.pdf").write_bytes(b"%PDF-1.7\n")
    for picture, message in (
        (tmp_path / "half.jpg", "truncated"),
        (tmp_path / "digit.pdf", "cannot identify"),
        (tmp_path / "missing.jpg", "No such file"),
        (np.asarray(seven()) / 255, "Cannot cast .*float64.*uint8"),
    ):
        with pytest.raises(ValueError, match=f"this is not a readable picture, such as a JPEG or PNG: .*{message}"):
            read_picture(picture)


@pytest.mark.parametrize("picture", ["one pixel", "one colour", "noise", "shade"])
def test_paper_without_ink_is_refused(picture):
    noise = np.random.default_rng(0).normal(200, 15, (600, 800)).clip(0, 255).astype(np.uint8)
    shade = np.broadcast_to(np.linspace(90, 220, 800), (600, 800)).astype(np.uint8)
    blank = {"one pixel": np.zeros((1, 1), np.uint8), "one colour": Image.new("RGB", (300, 200), "red")}
    with pytest.raises(ValueError, match="no ink was found"):
        read_picture((blank | {"noise": noise, "shade": shade})[picture])


def test_classify_and_its_picture(network):
    assert (MEAN, STD) == (utils.MEAN, utils.STD)
    images = torch.stack([torch.from_numpy(read_picture(seven())), torch.zeros(28, 28, dtype=torch.uint8)])
    labels, probabilities = classify(network, images)
    assert labels[0] == 7 and torch.allclose(probabilities.sum(1), torch.ones(2))
    assert torch.equal(probabilities, classify(network, images.numpy())[1])
    fig = plot_reading(seven(), images[0].numpy(), probabilities[0])
    assert [bar.get_height() for bar in fig.axes[2].patches] == probabilities[0].tolist()


def test_the_weights_of_the_page_are_the_network_s_batch_normalisation_folded(batches):
    torch.manual_seed(0)
    net = Net()
    for norm in (module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        for part in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            part.uniform_(0.5, 1.5)
    images, _ = next(iter(batches))
    assert torch.allclose(network_in(page_weights(net))(images), net.eval()(images), atol=1e-5)


def test_the_page_has_the_network_s_activation_and_says_whether_digits_are_upright():
    for relu in (torch.nn.functional.relu, torch.nn.ReLU()):
        assert 'ACTIVATION = "relu"' in page_weights(Net(activation=relu))
    assert "UPRIGHT = false" in page_weights(Net(), upright=False)
    with pytest.raises(ValueError, match="one activation, SiLU or ReLU, not gelu"):
        page_weights(Net(activation=torch.nn.functional.gelu))


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
        (4, [Residual(16, 8, 1, 0.0, torch.nn.functional.silu)], "needs blocks, then one convolution, as in Net"),
        (4, [torch.nn.Conv2d(16, 8, 1)], "needs blocks, then one convolution, as in Net"),
        (9, [ConvBlock(16, 10, 1, 0.0, torch.nn.functional.silu)], "needs blocks, then one convolution, as in Net"),
        (10, [torch.nn.MaxPool2d(1), torch.nn.AvgPool2d(3)], "needs blocks, then one convolution, as in Net"),
        (10, [torch.nn.AdaptiveMaxPool2d(1)], "needs blocks, then one convolution, as in Net"),
    ],
)
def test_a_network_that_the_page_cannot_compute_is_refused(place, layers, message, network):
    net = copy.deepcopy(network)
    net.layers = torch.nn.Sequential(*net.layers[:place], *layers, *net.layers[place + 1 :])
    with pytest.raises(ValueError, match=message):
        page_weights(net)


def test_the_page_loads_its_weights_or_is_in_one_piece_for_a_notebook(network, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "index.html").read_text(encoding="utf-8")
    assert drawing_page(network) == page.replace(' src="weights.js">', f">\n{page_weights(network)}") != page
    monkeypatch.setattr("s6.draw.__file__", str(tmp_path / "draw.py"))
    with pytest.raises(FileNotFoundError, match="^index.html is missing: upload it beside draw.py"):
        drawing_page(network)
    (tmp_path / "index.html").write_text('<script src="weights.js"></script>', encoding="utf-8")
    assert drawing_page(network) == f"<script>\n{page_weights(network)}</script>"


def test_the_stored_network_is_above_the_goal(network):
    images, labels = utils.load_mnist(ROOT / "data", train=False)
    assert (classify(network, utils.upright(images)[:, 0])[0] == labels).sum() > 9940
