"""Pictures of digits come out as MNIST has them, whatever is around them. Pictures without a digit are refused."""

import gc
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps
from scipy.ndimage import distance_transform_edt
from skimage.morphology import skeletonize
from sklearn.datasets import load_digits

from conftest import ROOT
from s6 import utils
from s6.draw import MEAN, STD, classify, plot_reading, read_picture

SIDE = 200
Y, X = np.mgrid[:SIDE, :SIDE]
LINES = (abs(X - 10) < 2) | (abs(Y - 190) < 2)
SHORT_LINE = (abs(X - 100) < 80) & (abs(Y - 184) < 2)
FRAME = abs(np.maximum(abs(X - 100), abs(Y - 100)) - 89) < 2


def cut(image, level):
    rows, columns = (np.flatnonzero((image > level).any(axis)) for axis in (1, 0))
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def strokes(digit, height, pen=None):
    """The ink of a digit, 0 to 1, without a border, about `height` high or wide. `pen` is a share of it."""
    digit = Image.fromarray(cut(digit, 40))
    size = [max(1, round(length * height / max(digit.size))) for length in digit.size]
    ink = np.asarray(digit.resize(size, Image.Resampling.BICUBIC), float) / 255
    if pen is None:
        return ink
    line = skeletonize(np.pad(ink > 0.5, int(pen * height / 2 + 2)))
    return cut(np.clip(pen * height / 2 + 0.5 - distance_transform_edt(~line), 0, 1), 0.5)


def write(ink, g, rim=10):
    """The ink at a random place of a blank sheet, at least `rim` pixels from its border."""
    top, left = (g.integers(rim, SIDE - rim - length + 1) for length in ink.shape)
    return np.pad(ink, ((top, SIDE - top - len(ink)), (left, SIDE - left - ink.shape[1])))


def photo(ink, g, light=220.0, dark=0.3, grain=3):
    return (light * (1 - (1 - dark) * ink) + g.normal(0, grain, ink.shape)).clip(0, 255).astype(np.uint8)


def shade(g, soft):
    """From 0 to 1 across a line through the middle of the sheet. A large `soft` makes the edge wide."""
    angle = g.uniform(0, 2 * np.pi)
    return 1 / (1 + np.exp(-(np.cos(angle) * (X - SIDE / 2) + np.sin(angle) * (Y - SIDE / 2)) / soft))


def tight(digit, covered):
    """A tight crop. The ink of a thick pen covers a share of it."""
    inks = (strokes(digit, SIDE, pen / 100) for pen in range(8, 60, 2))
    ink = next(ink for ink in inks if ink.mean() >= covered)
    while ink.mean() > covered:
        ink = np.pad(ink, 1)
    return ink


def table(ink, g, sides, dark=0.3):
    """Paper on a table that is seen at 1 to 4 sides."""
    picture = photo(write(ink, g, 32), g, dark=dark)
    distances = [Y, SIDE - 1 - Y, X, SIDE - 1 - X]
    tilt = g.uniform(-0.05, 0.05) * (X - Y)
    seen = np.any([distances[side] < g.uniform(12, 20) + tilt for side in g.permutation(4)[:sides]], axis=0)
    return np.where(seen, g.normal(g.uniform(30, 110), 6, seen.shape), picture).astype(np.uint8)


def printed(digit, g, lines, height=100, rim=26):
    return photo(np.maximum(write(strokes(digit, height), g, rim), lines), g)


def squares(g, strength, both=True, step=16):
    across = Y % step == g.integers(step)
    return strength * (across | (both & (X % step == g.integers(step))))


def broken(ink):
    """With a gap below the top, such as below the bar of a 5."""
    return ink * (abs(np.arange(len(ink)) - 18) > 2)[:, None]


# The share to be read right, and a picture of a digit d. g draws random numbers.
KINDS = {
    "grain": (0.99, lambda d, g: photo(write(strokes(d, 70), g), g, grain=8)),
    "light from a side": (0.98, lambda d, g: photo(write(strokes(d, 110), g), g, 240 - 150 * X / SIDE)),
    "a soft shadow": (0.98, lambda d, g: photo(write(strokes(d, 110), g), g, 215 - 55 * shade(g, 12))),
    "a hard shadow": (0.9, lambda d, g: photo(write(strokes(d, 150), g), g, 215 - 55 * shade(g, 0.5))),
    "printed lines": (0.95, lambda d, g: printed(d, g, LINES)),
    "a short line": (0.95, lambda d, g: printed(d, g, SHORT_LINE, 90, 30)),
    "a printed frame": (0.95, lambda d, g: printed(d, g, FRAME)),
    "squared paper": (0.95, lambda d, g: printed(d, g, squares(g, 0.25), 110, 10)),
    "ruled paper": (0.95, lambda d, g: printed(d, g, squares(g, 0.3, both=False), 110, 10)),
    "pencil": (0.98, lambda d, g: photo(write(strokes(d, 110, 0.05), g), g, dark=0.7)),
    "a gap": (0.95, lambda d, g: photo(write(broken(strokes(d, 110)), g), g)),
    "a digit far away": (0.98, lambda d, g: photo(write(strokes(d, 24), g), g)),
    "a small digit, a table": (0.7, lambda d, g: table(strokes(d, 9), g, 1)),
    "pencil, a table": (0.95, lambda d, g: table(strokes(d, 60, 0.06), g, 1, 0.7)),
    "white on black": (0.98, lambda d, g: 255 - photo(write(strokes(d, 110), g), g)),
}
for sides in (1, 2, 3, 4):
    KINDS[f"a table at {sides} sides"] = (0.95, lambda d, g, sides=sides: table(strokes(d, 90), g, sides))
for covered in (0.3, 0.5):
    KINDS[f"ink on {covered:.0%}"] = (0.95, lambda d, g, covered=covered: photo(tight(d, covered), g))
for part, wanted in {60: 0.96, 25: 0.98, 12: 0.98, 6: 0.98}.items():
    KINDS[f"a pen of 1/{part}"] = (wanted, lambda d, g, pen=1 / part: photo(write(strokes(d, 130, pen), g), g))


BLANK = {
    "grain": lambda g: g.normal(200, 15, (SIDE, SIDE)).clip(0, 255).astype(np.uint8),
    "light from a side": lambda g: photo(0 * X, g, 240 - 150 * X / SIDE),
    "a soft shadow": lambda g: photo(0 * X, g, 215 - 55 * shade(g, 12)),
    "a hard shadow": lambda g: photo(0 * X, g, 215 - 55 * shade(g, 0.5)),
    "faint squares": lambda g: photo(squares(g, 0.15), g),
}


def read(pictures, network):
    """The digit of each picture, or why it was refused."""
    answers = []
    for picture in pictures:
        try:
            answers.append(int(classify(network, read_picture(picture)[None])[0]))
        except ValueError as error:
            answers.append(str(error).partition(":")[0])
    return answers


def share(answers, labels):
    return np.mean([answer == label for answer, label in zip(answers, labels, strict=True)])


@pytest.fixture(scope="module")
def digits():
    images, labels = utils.load_mnist(ROOT / "data", train=False)
    return images[::100, 0].numpy(), labels[::100].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_digits_are_read(kind, digits, network):
    (wanted, picture), g = KINDS[kind], np.random.default_rng(0)
    assert share(read([picture(digit, g) for digit in digits[0]], network), digits[1]) >= wanted


def test_small_pictures_are_read(network):
    images, labels = (part[::5] for part in utils.load_mnist(ROOT / "data", train=False))
    direct = (classify(network, images[:, 0])[0] == labels).double().mean()
    assert share(read(images[:, 0].numpy(), network), labels.tolist()) >= direct - 0.0035
    tiny = load_digits()  # 8 x 8 pixels, without a margin
    enlarged = [Image.fromarray(np.uint8(image * 15.9)).resize((64, 64)) for image in tiny.images[::3]]
    assert share(read(enlarged, network), tiny.target[::3]) >= 0.93


@pytest.mark.parametrize("kind", BLANK)
def test_blank_paper_is_refused(kind, network):
    g = np.random.default_rng(0)
    assert sum(type(answer) is str for answer in read([BLANK[kind](g) for _ in range(40)], network)) >= 38


@pytest.mark.parametrize(("count", "height", "band"), [(2, 110, 0), (3, 60, 60), (3, 40, 150)])
def test_digits_side_by_side_are_refused_also_beside_a_dark_band(count, height, band, digits, network):
    g = np.random.default_rng(0)
    sheets = [photo(write(strokes(digit, height), g), g, dark=0.6) for digit in digits[0]]
    rows = [np.hstack(sheets[i : i + count]) for i in range(0, 20 * count, count)]
    answers = read([np.pad(row, ((0, 0), (band, 0)), constant_values=60) for row in rows], network)
    assert answers.count("more than one digit was found") >= 19


def seven(paper=230, ink=40, mode="L"):
    picture = Image.new(mode, (400, 300), paper)
    ImageDraw.Draw(picture).line([(140, 80), (240, 76), (185, 230)], ink, width=14)
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
    same = {
        "transparent": seven(paper=(0, 0, 0, 0), ink=(0, 0, 0, 255), mode="RGBA"),
        "phone": tmp_path / "phone.jpg",
        "phone, opened": Image.open(tmp_path / "phone.jpg"),
        "16 bits": Image.fromarray(np.asarray(seven(), np.uint16) * 200),
        "floats": Image.fromarray(np.asarray(seven(), np.float32) / 255),
        "1 bit": seven(255, 0).convert("1"),
        "booleans, light": np.asarray(seven()) < 128,
        "booleans, dark": np.asarray(seven()) > 128,
        "a tensor": torch.from_numpy(np.asarray(seven(), int)),
        "matplotlib's": np.asarray(seven(mode="RGBA", paper=(230,) * 3 + (255,), ink=(40, 40, 40, 255)), float) / 255,
        "four inks": seven().convert("CMYK"),
        "blue on yellow": seven((240, 230, 120), (40, 60, 170), "RGB"),
        "transparent margin": ImageOps.expand(seven().convert("LA"), 80, (0, 0)),
        "light on nothing": Image.merge("LA", [Image.new("L", (400, 300), 255), seven(paper=0, ink=200)]),
    }
    for name, picture in same.items():
        assert abs(read_picture(picture) - image).mean() < 4, name


def test_a_dot_in_a_zero_is_not_the_digit(network):
    picture = Image.new("L", (200, 200), 230)
    for box in ((60, 30, 140, 170), (96, 88, 104, 112)):
        ImageDraw.Draw(picture).ellipse(box, outline=40, width=12)
    assert read([picture], network) == [0]


def test_files_are_read_and_closed_also_broken_ones(tmp_path):
    seven().save(tmp_path / "whole.gif")
    seven().save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:1500])
    with warnings.catch_warnings(record=True) as seen:  # of a file that was left open
        warnings.simplefilter("always")
        assert read_picture(tmp_path / "whole.gif").max() == 255
        for name in ("half.jpg", "missing.jpg"):
            with pytest.raises(OSError, match="truncated|missing.jpg"):
                read_picture(str(tmp_path / name))
        gc.collect()
    assert not seen


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        (np.zeros((1, 1), np.uint8), "no ink was found: the picture has one colour"),
        (Image.new("RGB", (300, 200), "red"), "no ink was found: the picture has one colour"),
        (seven(ink=218), "its contrast is too low"),
        (seven(ink=218).resize((28, 28)), "its contrast is too low"),
        (photo((X - 100) ** 2 + (Y - 90) ** 2 < 3, np.random.default_rng(0)), "write it larger"),
    ],
)
def test_what_has_no_clear_digit_is_refused_with_the_reason(picture, reason):
    with pytest.raises(ValueError, match=reason):
        read_picture(picture)


def test_classify_and_its_picture(network):
    assert (MEAN, STD) == (utils.MEAN, utils.STD)
    images = torch.stack([torch.from_numpy(read_picture(seven())), torch.zeros(28, 28, dtype=torch.uint8)])
    labels, probabilities = classify(network, images)
    assert labels[0] == 7 and torch.allclose(probabilities.sum(1), torch.ones(2))
    assert torch.equal(probabilities, classify(network, images.numpy())[1])
    hook = network.register_forward_hook(lambda *both: both[2] + torch.tensor([[3.0], [-5.0]]))  # scores
    torch.testing.assert_close(classify(network, images)[1], probabilities)
    hook.remove()
    assert plot_reading(seven(), images[0].numpy(), probabilities[0]) is None  # Jupyter shows the figure once
    assert [bar.get_height() for bar in plt.gcf().axes[2].patches] == probabilities[0].tolist()
