"""Read your own digits, from a picture or drawn on a page."""

import base64
import copy
import json
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from scipy.ndimage import distance_transform_edt, gaussian_filter, maximum_filter, uniform_filter
from skimage.filters import threshold_otsu
from skimage.measure import label, regionprops
from torch.nn.utils import fuse_conv_bn_eval

MEAN, STD = 0.1307, 0.3081  # as in utils.py. Each module works alone


def _open(picture):
    """Return the grey levels of a picture, (H, W) uint8, with at most 400 rows and columns."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 200_000_000  # of a phone
    try:
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray(picture.astype(np.uint8, casting="safe"))
        elif not isinstance(picture, Image.Image):
            picture = Image.open(picture)
            picture.draft("L", (400, 400))  # decodes a JPEG at a fraction of its size
        picture = ImageOps.exif_transpose(picture)
        if picture.mode[0] in "IF":  # 16 or 32 bits. The lightest pixel becomes 255
            levels = np.asarray(picture, np.float32)
            picture = Image.fromarray(np.uint8(np.interp(levels, (0, levels.max()), (0, 255))))
        picture = picture.convert("RGBA")
        picture.thumbnail((400, 400), Image.Resampling.BILINEAR)
        grey, alpha = np.moveaxis(np.asarray(picture.convert("LA"), np.float32), 2, 0)
        # Transparent parts become paper: black if all ink is light, else white.
        darkest = grey.min(where=alpha > alpha.max() / 2, initial=255)
        paper = 0 if darkest > 127 else 255
        return np.uint8(paper + (grey - paper) * alpha / 255)
    except Exception as error:  # such as no picture, or half of one
        raise ValueError(
            f"this is not a readable picture, such as a JPEG or PNG: {error}"
        ) from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _local_mean(values):
    width = 2 * int(0.15 * max(values.shape)) + 1  # wider than strokes, narrower than shadows
    for _ in range(2):  # two box filters are close to one Gaussian filter
        values = uniform_filter(values, width, mode="nearest")
    return values


def _thickness(mask):
    return distance_transform_edt(mask)[mask].mean()


def _extent(region):
    return max(region.image.shape)


def _find_ink(grey):
    """Return `(darker, ink, contrast)`, three arrays of the shape of `grey`, (H, W).

    `darker` compares each pixel with the paper, as a share of the paper's grey. `ink` is a mask.
    `contrast` compares each pixel with the mean of everything around it, in grey levels. Light ink
    on dark paper is inverted first. Raises ValueError for one colour.
    """
    contrast = gaussian_filter(_local_mean(grey) - grey, 0.7)  # blurred, so that noise is not ink
    ink = contrast > threshold_otsu(contrast)
    if not ink.any():
        raise ValueError("no ink was found: the picture has one colour")
    if _thickness(ink) > _thickness(~ink):  # strokes are thin, so this is light ink on dark paper
        grey, contrast, ink = 255 - grey, -contrast, ~ink
    # Now we know where the ink is, so we can leave it out of the mean grey of the paper.
    paper = np.where(maximum_filter(ink, 5), 1e-3, 1)
    level = _local_mean(grey * paper) / _local_mean(paper)
    darker = 1 - (grey + 1) / (level + 1)  # a share, because a shadow darkens paper and ink alike
    smooth = gaussian_filter(darker, 0.7)
    ink = smooth > threshold_otsu(smooth)
    return darker, ink, contrast


def _find_digit(ink, contrast):
    """Return the part of the mask `ink` that is the digit. Raises ValueError without one digit."""
    labels = label(ink)
    # The edge of a shadow is pale: it has less contrast than 20 of 255 levels.
    parts = [r for r in regionprops(labels, contrast) if r.intensity_mean >= 20]
    if not parts:
        raise ValueError("no ink was found, or it is too pale: use a darker pen, or more light")
    # A table or a printed line reaches the border. A digit reaches it only in a tight crop. In a
    # tight crop, no other region is a tenth as large as the picture.
    sides = labels[0], labels[-1], labels[:, 0], labels[:, -1]
    regions = [r for r in parts if not any(r.label in side for side in sides)]
    if max(map(_extent, regions), default=0) < 0.1 * max(ink.shape):
        # A table covers a whole side. Squared paper has many holes (1 - euler_number).
        tables = [side[0] for side in sides if (side == side[0]).all()]
        regions = [r for r in parts if r.label not in tables and r.euler_number > -3]
    # A line that ends on the paper is flat, and longer than the digit is high.
    tallest = max((len(r.image) for r in regions), default=0)
    regions = [r for r in regions if r.image.shape[1] < max(4 * len(r.image), 0.9 * tallest)]
    largest = max(regions, key=_extent, default=None)
    if largest is None or _extent(largest) < 0.02 * max(ink.shape):
        raise ValueError("no digit was found: write it larger, and leave some paper around it")
    # If the largest region is a printed frame, the digit is in its hole. (A dot in a 0 is smaller.)
    inside = labels[largest.slice][largest.image_filled & ~largest.image]
    framed = [r for r in regions if r.label in inside and _extent(r) > 0.2 * _extent(largest)]
    regions = framed or regions
    largest = max(regions, key=_extent)

    # Strokes near the largest region belong to the same digit. So do strokes near these. We look
    # less far to the sides, because another digit may stand there.
    reach, digit = _extent(largest), [largest.label]
    for _ in range(2):
        near = maximum_filter(np.isin(labels, digit), (reach | 1, int(0.4 * reach) | 1))
        digit = [r.label for r in regions if near[tuple(r.coords.T)].any()]
    height = len(largest.image)
    if any(len(r.image) > 0.5 * height for r in regions if r.label not in digit):
        raise ValueError("more than one digit was found: let one fill the picture")
    return np.isin(labels, digit)


def read_picture(picture):
    """Return the digit in a picture as MNIST would have it: (28, 28) uint8, light on black.

    The picture is cut to the digit. The longer side is scaled to 20 pixels. The centre of mass
    moves to the middle (LeCun et al., "Gradient-based learning applied to document recognition",
    1998).

    `picture` is a path, a PIL image, or a uint8 array (H, W), (H, W, 3) or (H, W, 4). The digit may
    be dark on light or light on dark. Raises ValueError without a picture, without a digit, or with
    a second one that is clearly apart.
    """
    darker, ink, contrast = _find_ink(_open(picture).astype(np.float32))
    digit = _find_digit(ink, contrast)
    darker = np.where(maximum_filter(digit, 5), darker, 0)
    # The edge of a stroke is at half the level of ink. Everything far below becomes 0.
    ink = np.clip((darker / np.quantile(darker[digit], 0.9) - 0.3) / 0.4, 0, 1)
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
        # Softmax makes probabilities of log-probabilities, and of scores, too.
        probabilities = model.eval()((images / 255 - MEAN) / STD).softmax(1)
    return probabilities.argmax(1), probabilities


def plot_reading(picture, image, probabilities):
    """Draw a picture, the (28, 28) image of it, and the (10,) probabilities."""
    _, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
    left.imshow(_open(picture), cmap="gray", vmin=0, vmax=255)
    middle.imshow(np.asarray(image), cmap="gray")
    right.bar(range(10), probabilities.tolist())
    title = f"read as {probabilities.argmax()}, probability {probabilities.max():.1%}"
    right.set(xticks=range(10), ylim=(0, 1), title=title)


def page_weights(model):
    """Return the text of docs/weights.js for `model`, a `Net` or its moving average.

    The page knows the kinds of layers of `Net`, any number of channels, SiLU and ReLU. Raises
    ValueError for another network.
    """
    net = copy.deepcopy(getattr(model, "module", model)).cpu().eval()  # a GPU rounds more
    layers, entries, activations = [], [], set()
    for layer in getattr(net, "layers", [])[:-1]:  # the last takes the mean
        if isinstance(getattr(layer, "norm", None), nn.BatchNorm2d):
            activation = layer.activation
            activations.add(getattr(activation, "__name__", type(activation).__name__).lower())
            layer = fuse_conv_bn_eval(layer.conv, layer.norm)
        entry = int(np.max(getattr(layer, "kernel_size", 1)))
        known = nn.MaxPool2d(entry)
        if isinstance(layer, nn.Conv2d):
            known = nn.Conv2d(layer.in_channels, layer.out_channels, entry)
            entry = [layer.out_channels, layer.in_channels, entry]
        if repr(layer) != repr(known):  # another kind, or another stride, padding, ...
            raise ValueError(f"the drawing page does not know this layer: {layer}")
        layers.append(layer)
        entries.append(entry)
    needs = "the drawing page needs blocks, then one convolution, as in Net"
    if not activations:
        raise ValueError(needs)
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
        raise ValueError(needs)
    weights = torch.cat([part.flatten() for layer in layers for part in layer.parameters()])
    text = base64.b64encode(weights.detach().numpy()).decode()
    constants = {"LAYERS": entries, "ACTIVATION": activation, "WEIGHTS": text}
    return "".join(f"const {name} = {json.dumps(value)};\n" for name, value in constants.items())


def show_page(model):
    """Show the drawing page in a notebook, or print why there is none."""
    from IPython.display import HTML, display

    try:
        page = escape(drawing_page(model))
    except (FileNotFoundError, ValueError) as error:  # no index.html, or an unknown network
        print(f"There is no page to draw on: {error}")
    else:
        frame = f'<iframe srcdoc="{page}" width="100%" height="760" frameborder="0"></iframe>'
        display(HTML(f"<div>{frame}</div>"))


def drawing_page(model):
    """Return the drawing page as one text, with the weights of `model` inside, for a notebook.

    Raises FileNotFoundError if index.html is neither beside draw.py nor in ../docs.
    """
    here = Path(__file__).parent
    places = [folder / "index.html" for folder in (here, here.parent / "docs")]
    pages = [path.read_text(encoding="utf-8") for path in places if path.is_file()]
    if not pages:
        raise FileNotFoundError("index.html is missing: upload it beside draw.py")
    script = f"<script>\n{page_weights(model)}</script>"
    return pages[0].replace('<script src="weights.js"></script>', script)
