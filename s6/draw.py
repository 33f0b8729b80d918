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
from PIL import Image, ImageOps
from scipy.ndimage import convolve, distance_transform_edt, gaussian_filter, maximum_filter
from skimage.filters import threshold_otsu
from skimage.measure import label, regionprops
from torch.nn.utils import fuse_conv_bn_eval

MEAN, STD = 0.1307, 0.3081  # as in utils.py. Each module works alone


def _open(picture):
    """Return the grey levels of a picture, (H, W) float32, with at most 400 rows and columns."""
    if isinstance(picture, (str, Path)):
        with Image.open(picture) as file:
            file.draft("L", (400, 400))  # decodes a JPEG at a fraction of its size
            picture = file.copy()
    if isinstance(picture, Image.Image):
        picture = ImageOps.exif_transpose(picture)  # turns a photograph upright
        if picture.mode[0] not in "IF":  # these hold integers or floats
            picture = picture.convert("RGBA")
    levels = np.asarray(picture)
    if levels.dtype != np.uint8:  # booleans, 16 bits, floats. The largest value becomes white
        levels = np.uint8(np.interp(levels, (0, levels.max()), (0, 255)))
    picture = Image.fromarray(levels).convert("LA")
    picture.thumbnail((400, 400), Image.Resampling.BILINEAR)
    grey, alpha = np.moveaxis(np.asarray(picture, np.float32), 2, 0)
    # Transparent parts become paper: black if all ink is light, else white.
    darkest = grey.min(where=alpha > alpha.max() / 2, initial=255)
    paper = 0 if darkest > 127 else 255
    return paper + (grey - paper) * alpha / 255


def _local_mean(values):
    sigma = 0.12 * max(values.shape)  # wider than strokes, narrower than shadows
    return gaussian_filter(values, sigma, mode="nearest", truncate=2)


def _find_ink(grey):
    """Return `(darker, ink, contrast)`, all (H, W) as `grey`. Raises ValueError for one colour.

    `darker` compares each pixel with the paper, as a share of the paper's grey. `ink` is a mask.
    `contrast` compares each pixel with the mean of everything around it, in grey levels. Light ink
    on dark paper is inverted first.
    """
    contrast = gaussian_filter(_local_mean(grey) - grey, 0.7)  # blurred, so that noise is not ink
    ink = contrast > threshold_otsu(contrast)
    if not ink.any():
        raise ValueError("no ink was found: the picture has one colour")
    ink_width, paper_width = (distance_transform_edt(mask)[mask].mean() for mask in (ink, ~ink))
    if ink_width > paper_width:  # strokes are thin, so this is light ink on dark paper
        grey, contrast, ink = 255 - grey, -contrast, ~ink
    # Now we know where the ink is, so we can leave it out of the mean grey of the paper.
    paper = np.where(maximum_filter(ink, 5), 1e-3, 1)
    level = _local_mean(grey * paper) / _local_mean(paper)
    darker = 1 - (grey + 1) / (level + 1)  # a share, because a shadow darkens paper and ink alike
    smooth = gaussian_filter(darker, 0.7).clip(max=0.5)  # a black table must not hide pale ink
    return darker, smooth > threshold_otsu(smooth), contrast


def _extent(region):
    return max(region.image.shape)


def _find_digit(ink, contrast):
    """Return the part of the mask `ink` that is the digit. Raises ValueError without one digit."""
    labels = label(ink)
    # Noise and the edge of a shadow are pale: less than 20 of 255 levels above what is around them.
    parts = [r for r in regionprops(labels, contrast) if r.intensity_mean >= 20]
    if not parts:
        raise ValueError("no ink was found, or its contrast is too low: use a darker pen")
    # A table or a printed line reaches the border. A digit reaches it only in a tight crop, where
    # nothing else is large. Even there, it does not cover most of a side, as a table does.
    sides = labels[0], labels[-1], labels[:, 0], labels[:, -1]
    regions = [r for r in parts if not any(r.label in side for side in sides)]
    if max(map(_extent, regions), default=0) < 0.05 * max(ink.shape):
        regions = [r for r in parts if not any((side == r.label).mean() > 0.8 for side in sides)]
    # A line that ends on the paper is flat, and longer than the digit is high.
    tallest = max((len(r.image) for r in regions), default=0)
    regions = [r for r in regions if r.image.shape[1] < max(4 * len(r.image), 1.2 * tallest)]
    largest = max(regions, key=_extent, default=None)
    if largest is None or _extent(largest) < 0.02 * max(ink.shape):
        raise ValueError("no digit was found: write it larger, and leave some paper around it")
    # If the largest region is a printed frame, the digit is in its hole. (A dot in a 0 is smaller.)
    inside = labels[largest.slice][largest.image_filled & ~largest.image]
    framed = [r for r in regions if r.label in inside and _extent(r) > 0.2 * _extent(largest)]
    regions = framed or regions
    largest = max(regions, key=_extent)
    # Strokes near each other belong to one digit. We look less far to the sides, because another
    # digit may stand there.
    reach = _extent(largest)
    ink = np.isin(labels, [r.label for r in regions])
    near = label(maximum_filter(ink, (reach // 2 | 1, reach // 5 | 1)))  # "| 1" makes it odd
    digit = ink & (near == near[tuple(largest.coords[0])])
    apart = [r for r in regions if not digit[tuple(r.coords[0])]]
    if any(len(r.image) > 0.5 * len(largest.image) for r in apart):
        raise ValueError("more than one digit was found: let one fill the picture")
    return digit


def read_picture(picture):
    """Return the digit in a picture as MNIST would have it: (28, 28) uint8, light on black.

    The picture is cut to the digit. The longer side is scaled to 20 pixels. The centre of mass
    moves to the middle (LeCun et al., Gradient-based learning applied to document recognition).

    `picture` is a path, a PIL image, or an array (H, W), (H, W, 3) or (H, W, 4). In a uint8 array,
    255 is white. In others, the largest value is. The digit may be dark on light or light on dark.
    Raises OSError without a picture. Raises ValueError if no digit is found, or a second one that
    is clearly apart.
    """
    darker, ink, contrast = _find_ink(_open(picture))
    digit = _find_digit(ink, contrast)
    # The edge of a stroke is at half the level of ink.
    digit = maximum_filter(digit, 5) & (darker > np.quantile(darker[digit], 0.9) / 2)
    (region,) = regionprops(digit.astype(np.uint8))
    longer = max(region.image.shape)
    side = 28 / 20 * longer  # this square becomes 28 x 28
    # With its corner at (x, y), the centre of mass is in pixel [14, 14], as in MNIST.
    y, x = np.add(region.centroid_local, 0.5 + longer - 14.5 / 28 * side)
    square = Image.fromarray(np.pad(255 * region.image.astype(np.uint8), longer))
    image = square.resize((28, 28), Image.Resampling.BOX, (x, y, x + side, y + side))
    # A thin stroke is grey now. Blur it to two pixels, as wide as MNIST's, and scale it to white.
    image = convolve(np.float32(image), np.outer((1, 2, 1), (1, 2, 1)), mode="constant")
    return (image * (255 / image.max())).round().astype(np.uint8)


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
    ValueError for another network, or RuntimeError if its shapes do not fit.
    """
    net = copy.deepcopy(getattr(model, "module", model)).cpu().eval()  # a GPU rounds more
    layers, entries = [], []
    for layer in getattr(net, "layers", [])[:-1]:  # the last takes the mean
        if isinstance(getattr(layer, "norm", None), nn.BatchNorm2d):
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
    # Compute what the page computes. A changed `forward`, for example, gives other results.
    images = 3 * torch.arange(784.0).sin().view(1, 1, 28, 28)
    ends_as_net = layers and isinstance(layers[-1], nn.Conv2d)
    for activation in ("silu", "relu") if ends_as_net else ():
        x = images
        for layer in layers[:-1]:
            x = layer(x)
            x = getattr(F, activation)(x) if isinstance(layer, nn.Conv2d) else x
        scores = layers[-1](x).mean((2, 3))
        if torch.allclose(scores.log_softmax(1), net(images), atol=1e-4):
            break
    else:
        raise ValueError("the drawing page needs blocks with SiLU or ReLU, then one convolution")
    weights = torch.cat([part.flatten() for layer in layers for part in layer.parameters()])
    text = base64.b64encode(weights.detach().numpy()).decode()
    constants = {"LAYERS": entries, "ACTIVATION": activation, "WEIGHTS": text}
    return "".join(f"const {name} = {json.dumps(value)};\n" for name, value in constants.items())


def drawing_page(model):
    """Return the drawing page as one text, with the weights of `model` inside, for a notebook.

    Raises FileNotFoundError if index.html is neither in ../docs nor beside draw.py.
    """
    here = Path(__file__).parent
    page = here.parent / "docs" / "index.html"
    page = page if page.is_file() else here / "index.html"
    script = f"<script>\n{page_weights(model)}</script>"
    text = page.read_text(encoding="utf-8")
    return text.replace('<script src="weights.js"></script>', script)


def show_page(model):
    """Show the drawing page in a notebook, or print why there is none."""
    from IPython.display import HTML, display

    try:
        page = escape(drawing_page(model))
    except (FileNotFoundError, RuntimeError, ValueError) as error:  # no file, or another network
        print(f"There is no page to draw on: {error}")
    else:
        frame = f'<iframe srcdoc="{page}" width="100%" height="760" frameborder="0"></iframe>'
        display(HTML(f"<div>{frame}</div>"))  # IPython warns about text that begins with <iframe
