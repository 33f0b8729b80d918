"""Read your own digits, from a picture or drawn on a page."""

import base64
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageFilter, ImageOps
from torch.nn.utils import fuse_conv_bn_eval

MEAN, STD = 0.1307, 0.3081  # as in utils.py, because no module imports another


def _open(picture):
    """Return a grey PIL image of at most 400 x 400. Transparent parts become white."""
    try:
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray(picture.astype(np.uint8, casting="safe"))
        picture = picture if isinstance(picture, Image.Image) else Image.open(picture)
        picture = ImageOps.exif_transpose(picture).convert("RGBA")
        picture.thumbnail((400, 400), Image.Resampling.BILINEAR)
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("L")
    except Exception as error:  # of many kinds: no picture, or half of one
        raise ValueError(
            f"this cannot be read as a picture, such as a JPEG or PNG: {error}"
        ) from error


def read_picture(picture):
    """Return the digit in a picture, prepared as MNIST's are: (28, 28) uint8, light on black.

    It is cut to its ink, the longer side is scaled to 20 pixels, and the centre of mass comes to
    the middle (LeCun et al., "Gradient-based learning applied to document recognition", 1998).
    Everything that is not paper counts as ink.

    `picture` is a path, a PIL image, or a uint8 array (H, W), (H, W, 3) or (H, W, 4). It may be
    dark on light or light on dark, with more paper than ink. Raises ValueError if it is not a
    picture or has no ink.
    """
    # Light may come from one side, so the paper is a plane of grey levels. It is fitted five times,
    # each time without the pixels that differed from the plane before.
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
            "no ink found: let the paper fill the picture, go closer, or use a thicker pen"
        )
    # The edge of a stroke is at half the level of ink. What is far below, such as noise, becomes 0.
    ink = np.clip((residual / np.quantile(residual[ink], 0.9) - 0.3) / 0.4, 0, 1)
    rows, columns = (np.flatnonzero((ink >= 0.5).any(axis)) for axis in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    margin = max(ink.shape)
    side = 30 / 20 * margin  # of a square that becomes 30 x 30: the blur needs a rim of one pixel
    # (x, y) is its upper left corner. MNIST has the centre of mass in the middle of pixel [14, 14].
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
    """Draw a picture, the (28, 28) image that the network sees, and the (10,) probabilities."""
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
    left.imshow(_open(picture), cmap="gray", vmin=0, vmax=255)
    middle.imshow(image, cmap="gray")
    right.bar(range(10), probabilities.tolist())
    title = f"read as {probabilities.argmax()}, with {probabilities.max():.1%}"
    right.set(xticks=range(10), ylim=(0, 1), title=title)
    plt.close(fig)
    return fig


def page_weights(model):
    """Return the JavaScript of docs/weights.js for `model`, a `Net` or its moving average.

    The page knows the kinds of layers of `Net`, with any number of channels, and the activations
    SiLU and ReLU. Raises ValueError for others.
    """
    activations, layers, weights = set(), [], []
    for layer in getattr(model, "module", model).eval().layers[:-1]:  # the page averages by itself
        if isinstance(layer, nn.Sequential):
            activation = layer.activation
            activations.add(getattr(activation, "__name__", type(activation).__name__).lower())
            layer = fuse_conv_bn_eval(layer[0], layer[1])
        # Of the layers that the page knows, a pooling has the padding 0, a convolution (0, 0).
        if getattr(layer, "padding", None) not in (0, (0, 0)):
            raise ValueError(f"the drawing page does not know this layer: {layer}")
        is_convolution = isinstance(layer, nn.Conv2d)
        layers.append(list(layer.weight.shape)[:3] if is_convolution else layer.kernel_size)
        weights += [p.detach().flatten().cpu() for p in layer.parameters()]
    if activations not in ({"silu"}, {"relu"}):
        raise ValueError(f"the drawing page knows SiLU or ReLU, not {', '.join(activations)}")
    text = base64.b64encode(torch.cat(weights).numpy()).decode()
    constants = f'LAYERS = {layers}, ACTIVATION = "{activations.pop()}", WEIGHTS = "{text}"'
    return f"// Written by `make draw`. BatchNorm is in the convolutions.\nconst {constants};\n"


def drawing_page(model):
    """Return docs/index.html with the weights of `model` inside, in one piece for a notebook.

    Raises FileNotFoundError if the page is neither beside draw.py nor in ../docs.
    """
    here = Path(__file__).parent
    places = [folder / "index.html" for folder in (here, here.parent / "docs")]
    pages = [path.read_text(encoding="utf-8") for path in places if path.is_file()]
    if not pages:
        raise FileNotFoundError("docs/index.html is missing: upload it beside draw.py")
    return pages[0].replace(
        '<script src="weights.js"></script>', f"<script>\n{page_weights(model)}</script>"
    )
