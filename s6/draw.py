"""Read your own digits, from a picture or drawn on a page."""

import base64
import copy
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch.nn.utils import fuse_conv_bn_eval, parameters_to_vector

MEAN, STD = 0.1307, 0.3081  # as in utils.py. Each module works alone


def _open(picture):
    """Return a grey PIL image of at most 400 x 400. Transparent parts become white."""
    try:
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray(picture.astype(np.uint8, casting="safe"))
        picture = picture if isinstance(picture, Image.Image) else Image.open(picture)
        picture = ImageOps.exif_transpose(picture).convert("RGBA")
        picture.thumbnail((400, 400), Image.Resampling.BILINEAR)
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("L")
    except Exception as error:  # such as no picture, or half of one
        raise ValueError(
            f"this is not a readable picture, such as a JPEG or PNG: {error}"
        ) from error


def read_picture(picture):
    """Return the digit in a picture as MNIST would have it: (28, 28) uint8, light on black.

    The picture is cut to the ink. The longer side is scaled to 20 pixels. The centre of mass moves
    to the middle (LeCun et al., "Gradient-based learning applied to document recognition", 1998).
    Everything that is not paper counts as ink.

    `picture` is a path, a PIL image, or a uint8 array (H, W), (H, W, 3) or (H, W, 4). The digit may
    be dark on light or light on dark. It needs more paper than ink. Raises ValueError without a
    picture or without ink.
    """
    # Light may come from one side. So we fit a plane to the grey of the paper, five times. Each fit
    # leaves out the pixels that were far from the plane before.
    grey = np.asarray(_open(picture), np.float32)
    terms = np.stack([np.ones_like(grey), *np.indices(grey.shape)], -1)
    paper = np.full(grey.shape, True)
    for _ in range(5):
        known = terms[paper]
        residual = (
            grey - terms @ np.linalg.lstsq(known.T @ known, known.T @ grey[paper], rcond=None)[0]
        )
        noise = np.median(abs(residual[paper]))
        paper = abs(residual) <= 2 * noise + 1
    residual = residual if residual.sum() > 0 else -residual  # from here on, ink is positive
    ink = residual > max(25, 8 * noise)
    if not ink.any():
        raise ValueError(
            "no ink was found: let the paper fill the picture, go closer, or use a thicker pen"
        )
    # The edge of a stroke is at half the level of ink. Everything far below becomes 0.
    ink = np.clip((residual / np.quantile(residual[ink], 0.9) - 0.3) / 0.4, 0, 1)
    rows, columns = (np.flatnonzero((ink >= 0.5).any(axis)) for axis in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    margin = max(ink.shape)
    side = 30 / 20 * margin  # this square becomes 30 x 30: 28 x 28 and a rim for the blur
    # With its corner at (x, y), the centre of mass is in pixel [14, 14], as in MNIST.
    y, x = ((np.indices(ink.shape) + 0.5) * ink).sum((1, 2)) / ink.sum() + margin - 15.5 / 30 * side
    square = Image.fromarray(np.pad((255 * ink).round().astype(np.uint8), margin))
    image = square.resize((30, 30), Image.Resampling.BOX, (x, y, x + side, y + side))
    # A thin stroke is grey now. Blur it to two pixels, as wide as MNIST's, and scale it to white.
    image = image.filter(ImageFilter.Kernel((3, 3), (1, 2, 1, 2, 4, 2, 1, 2, 1)))
    image = image.crop((1, 1, 29, 29))
    return (np.asarray(image) * (255 / np.max(image))).round().astype(np.uint8)


def classify(model, images):
    """Return labels, (N,), and probabilities, (N, 10), of (N, 28, 28) uint8 images."""
    images = torch.as_tensor(images).to(next(model.parameters()).device).float().unsqueeze(1)
    with torch.no_grad():
        probabilities = model.eval()((images / 255 - MEAN) / STD).exp()
    return probabilities.argmax(1), probabilities


def plot_reading(picture, image, probabilities):
    """Return a figure of a picture, the (28, 28) image of it, and the (10,) probabilities."""
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
    left.imshow(_open(picture), cmap="gray", vmin=0, vmax=255)
    middle.imshow(np.asarray(image), cmap="gray")
    right.bar(range(10), probabilities.tolist())
    title = f"read as {probabilities.argmax()}, probability {probabilities.max():.1%}"
    right.set(xticks=range(10), ylim=(0, 1), title=title)
    plt.close(fig)
    return fig


def page_weights(model, upright=True):
    """Return the text of docs/weights.js for `model`, a `Net` or its moving average.

    `upright` tells the page whether to make digits upright. The page knows the kinds of layers of
    `Net`, any number of channels, SiLU and ReLU. Raises ValueError for another network.
    """
    net = copy.deepcopy(getattr(model, "module", model)).cpu().eval()  # a GPU rounds more
    layers, entries, activations = [], [], set()
    for layer in net.layers[:-1]:  # the last takes the mean
        parts = [*layer.children()][:2]
        if [type(part) for part in parts] == [nn.Conv2d, nn.BatchNorm2d]:
            activation = getattr(layer, "activation", None)
            activations.add(getattr(activation, "__name__", type(activation).__name__).lower())
            layer = fuse_conv_bn_eval(*parts)
        entry = int(np.max(getattr(layer, "kernel_size", 1)))
        known = nn.MaxPool2d(entry)
        if isinstance(layer, nn.Conv2d):
            known = nn.Conv2d(layer.in_channels, layer.out_channels, entry)
            entry = [layer.out_channels, layer.in_channels, entry]
        if repr(layer) != repr(known):  # another kind, or another stride, padding, ...
            raise ValueError(f"the drawing page does not know this layer: {layer}")
        layers.append(layer)
        entries.append(entry)
    activation = ", ".join(sorted(activations))
    if activation not in ("silu", "relu"):
        raise ValueError(f"the drawing page knows one activation, SiLU or ReLU, not {activation}")
    # The page computes these scores. A changed `forward`, for example, makes others.
    x = images = 3 * torch.arange(784.0).sin().view(1, 1, 28, 28)
    with torch.no_grad():
        for layer in layers[:-1]:
            x = layer(x)
            x = getattr(F, activation)(x) if isinstance(layer, nn.Conv2d) else x
        scores = layers[-1](x).mean((2, 3))
        same = torch.allclose(F.log_softmax(scores, 1), net(images), atol=1e-4)
    if not same or not isinstance(layers[-1], nn.Conv2d):
        raise ValueError("the drawing page needs blocks, then one convolution, as in Net")
    weights = parameters_to_vector(nn.Sequential(*layers).parameters()).detach().numpy()
    constants = {
        "LAYERS": entries,
        "ACTIVATION": activation,
        "UPRIGHT": upright,
        "WEIGHTS": base64.b64encode(weights).decode(),
    }
    return "".join(f"const {name} = {json.dumps(value)};\n" for name, value in constants.items())


def drawing_page(model, upright=True):
    """Return the drawing page as one text, with the weights of `model` inside, for a notebook.

    Raises FileNotFoundError if index.html is neither beside draw.py nor in ../docs.
    """
    here = Path(__file__).parent
    places = [folder / "index.html" for folder in (here, here.parent / "docs")]
    pages = [path.read_text(encoding="utf-8") for path in places if path.is_file()]
    if not pages:
        raise FileNotFoundError("index.html is missing: upload it beside draw.py")
    script = f"<script>\n{page_weights(model, upright)}</script>"
    return pages[0].replace('<script src="weights.js"></script>', script)
