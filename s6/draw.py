"""Digits that are not MNIST's: a picture of yours made ready as MNIST's were, and a page to draw on."""

import base64
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageFilter, ImageOps
from torch.nn.utils import fuse_conv_bn_eval

MEAN, STD = 0.1307, 0.3081  # as in utils.py: the modules do not import each other


def _open(picture):
    """Return a picture as a grey PIL image, upright, of at most 400 x 400; what is transparent in it is white."""
    try:
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray(picture.astype(np.uint8, casting="safe"))
        picture = picture if isinstance(picture, Image.Image) else Image.open(picture)
        picture = ImageOps.exif_transpose(picture).convert("RGBA")
        picture.thumbnail((400, 400), Image.Resampling.BILINEAR)
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("L")
    except Exception as error:  # Pillow raises many kinds over a file that is no picture, or half of one
        raise ValueError(f"this cannot be read as a picture, such as a JPEG or PNG: {error}") from error


def read_picture(picture):
    """Return the digit in a picture as MNIST would have it, light on black: (28, 28) uint8.

    As LeCun et al. prepared theirs ("Gradient-based learning applied to document recognition", 1998): cut to the ink,
    the longer side scaled to 20 pixels, the centre of mass in the middle. Whatever is not paper counts as ink.

    `picture` is a path, a PIL image, or an array (H, W), (H, W, 3) or (H, W, 4) of uint8, dark on light or light on
    dark, with more paper than ink. Raises ValueError for what is no picture, and for one without ink.
    """
    # The paper is a plane of grey levels, for light from a side. Each fit leaves out what stood out from the last one.
    grey = np.asarray(_open(picture), np.float32)
    terms, paper = np.stack([np.ones_like(grey), *np.indices(grey.shape)], -1), np.full(grey.shape, True)
    for _ in range(5):
        known = terms[paper]
        residual = grey - terms @ np.linalg.lstsq(known.T @ known, known.T @ grey[paper], rcond=None)[0]
        noise = np.median(abs(residual[paper]))
        paper = abs(residual) <= 2 * noise + 1
    residual = residual if residual.sum() > 0 else -residual  # ink is positive from here on
    ink = residual > max(25, 8 * noise)
    if not ink.any():
        raise ValueError("no ink found: let the paper fill the picture, come closer, or take a thicker pen")
    # Half the level of ink is the edge of a stroke; what is far below it, noise, becomes black.
    ink = np.clip((residual / np.quantile(residual[ink], 0.9) - 0.3) / 0.4, 0, 1)
    rows, columns = (np.flatnonzero((ink >= 0.5).any(axis)) for axis in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    side, margin = 30 / 20 * max(ink.shape), max(ink.shape)  # of a square: the image and, for the blur, a rim of 1
    # Its upper left corner. In MNIST the centre of mass lies on the pixel [14, 14], the middle of which is at 14.5.
    y, x = ((np.indices(ink.shape) + 0.5) * ink).sum((1, 2)) / ink.sum() + margin - 15.5 / 30 * side
    square = Image.fromarray(np.pad((255 * ink).round().astype(np.uint8), margin))
    image = square.resize((30, 30), Image.Resampling.BOX, (x, y, x + side, y + side))
    # A thin stroke is grey now. Blurred to two pixels, then scaled to white, it is as wide as MNIST's.
    image = image.filter(ImageFilter.Kernel((3, 3), (1, 2, 1, 2, 4, 2, 1, 2, 1))).crop((1, 1, 29, 29))
    return (np.asarray(image) * (255 / np.max(image))).round().astype(np.uint8)


def classify(model, images):
    """Return labels, (N,), and probabilities, (N, 10), of (N, 28, 28) uint8 images, an array or a tensor."""
    images = torch.as_tensor(images).to(next(model.parameters()).device).float().unsqueeze(1)
    with torch.no_grad():
        probabilities = model.eval()((images / 255 - MEAN) / STD).exp()
    return probabilities.argmax(1), probabilities


def plot_reading(picture, image, probabilities):
    """Draw a picture, the (28, 28) image that the network sees, and its (10,) probabilities; return a Figure."""
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
    left.imshow(_open(picture), cmap="gray", vmin=0, vmax=255)
    middle.imshow(image, cmap="gray")
    right.bar(range(10), probabilities.tolist())
    right.set(xticks=range(10), ylim=(0, 1), title=f"read as {probabilities.argmax()}, with {probabilities.max():.1%}")
    plt.close(fig)
    return fig


def drawing_page(model):
    """Return draw.html with this model's weights in it; it runs `Net`'s layers and SiLU only, of whatever channels."""
    layers = list(getattr(model, "module", model).eval().layers)[:-1]  # AvgPool comes by itself
    layers = [fuse_conv_bn_eval(layer[0], layer[1]) if isinstance(layer, nn.Sequential) else layer for layer in layers]
    shapes = [list(layer.weight.shape)[:3] if isinstance(layer, nn.Conv2d) else layer.kernel_size for layer in layers]
    weights = torch.cat([p.detach().flatten().cpu() for layer in layers for p in layer.parameters()]).numpy()
    page = Path(__file__).with_name("draw.html").read_text()  # which tells what it does with them
    return page.replace("__LAYERS__", str(shapes)).replace("__WEIGHTS__", base64.b64encode(weights).decode())
