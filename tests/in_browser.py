"""The drawing page in headless Chrome or Chromium: `make test-browser`."""

import copy
import html
import json
import math
import re
import shutil
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from torch import nn

from conftest import ROOT
from s6.draw import MEAN, STD, classify, drawing_page, read_picture, show_page
from s6.model import ConvBlock, Net

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
PAGE = (ROOT / "docs" / "index.html").as_uri()
SCREENS = {"desk": (1280, 720), "phone": (360, 640), "landscape": (640, 360)}
PLACES = [(0.8, 0.1, 0.1), (0.25, 0.4, 0.35), (0.3, 0.02, 0.68)]  # size, left, top: large, small, in a corner
# Each digit as strokes of a hand, in a square of 100.
DIGITS = json.loads((ROOT / "tests" / "digits.json").read_text(encoding="utf-8"))
PIXELS = "canvas => Array.from(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data)"


class Hand:
    """A mouse, or a finger, above the paper in a page or in a frame of it."""

    def __init__(self, page, frame=None, touch=False):
        self.page, self.find = page, (frame or page).locator
        self.devtools = page.context.new_cdp_session(page) if touch else None

    def strokes(self, digit, size=0.8, left=0.1, top=0.1):
        """Return the places of each stroke on the screen; size, left and top are shares of the paper's side."""
        box = self.find("#paper").bounding_box()
        x0, y0, scale = box["x"] + box["width"] * left, box["y"] + box["width"] * top, box["width"] * size / 100
        return [[(x0 + scale * x, y0 + scale * y) for x, y in stroke] for stroke in DIGITS[digit]]

    def touch(self, points):
        for kind, (x, y) in zip(["touchStart"] + ["touchMove"] * len(points), points[:1] + points, strict=True):
            self.devtools.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
        self.devtools.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    def draw(self, digit, *where):
        self.find("#clear").click()
        for points in self.strokes(digit, *where):
            if self.devtools:
                self.touch(points)
            else:
                self.page.mouse.move(*points[0])
                self.page.mouse.down()
                for point in points[1:]:
                    self.page.mouse.move(*point, steps=3)
                self.page.mouse.up()
        expect(self.find("#verdict")).to_have_text(re.compile(rf"^Read as {digit}(, or \d \(\d+ %\))?$"))
        assert float(self.find("#bars i").nth(digit).evaluate("bar => bar.style.height").rstrip("%")) > 25

    def expect_blank(self):
        expect(self.find("#verdict")).to_have_text("Draw a digit, 0 to 9")
        assert set(self.page.evaluate("bars.map(bar => bar.querySelector('i').style.height)")) == {"0px"}

    def expect_pixel(self, name, row, column):
        expect(self.find("#name")).to_have_text(re.compile(f"^{name}, row {row}, column {column}: "))


@pytest.fixture(scope="module")
def browser():
    (ROOT / "build").mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])


@pytest.fixture(params=SCREENS)
def hand(request, browser):
    touch, (width, height) = request.param != "desk", SCREENS[request.param]
    screen = {"viewport": {"width": width, "height": height}, "color_scheme": "dark" if touch else "light"}
    page, requests, errors = browser.new_context(has_touch=touch, **screen).new_page(), [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(PAGE)
    yield Hand(page, touch=touch)
    assert (requests, errors) == ([PAGE, PAGE.replace("index.html", "weights.js")], []), "nothing leaves the page"
    sizes = "[scrollX + scrollY, document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
    assert page.evaluate(sizes) == [0, width, height]
    page.screenshot(path=ROOT / "build" / f"draw-{request.param}.png")
    page.context.close()


@pytest.mark.parametrize("where", PLACES)
def test_all_ten_digits_are_read_and_made_ready_as_read_picture_does(hand, where):
    heavy = "draw([...Array(30).keys()].map(i => [[20, 20 + 4 * i], i ? [200, 20 + 4 * i] : [385, 385]]))"
    for digit in [*range(10), None]:
        if digit is None:
            hand.page.evaluate(heavy)  # at one side, so that its tail is out of the image
        else:
            hand.draw(digit, *where)
        drawing = urlopen(hand.page.evaluate("(update(), paper.toDataURL())"))
        seen = np.array(hand.page.evaluate("Array.from(prepare())")).reshape(28, 28)
        difference = abs(seen - read_picture(Image.open(drawing)))
        assert difference.max() <= 8 and difference.mean() < 0.1, f"{digit}: {difference.max()}, {difference.mean()}"
    assert hand.find("#seen canvas").evaluate(PIXELS)[::4] == seen.flatten().tolist()


def test_undo_brings_back_what_was_there_and_clear_empties_the_paper(hand):
    ink = "(update(), paper.toDataURL())"
    start = hand.page.evaluate(ink)  # an example
    hand.draw(4)
    four = hand.page.evaluate(ink)
    hand.draw(5)
    hand.page.keyboard.press("Control+z")
    hand.expect_blank()
    hand.find("#undo").click()  # of Clear
    assert hand.page.evaluate(ink) == four
    for _ in range(4):  # two strokes, Clear, nothing
        hand.page.keyboard.press("Meta+z")
    assert hand.page.evaluate(ink) == start != four
    for _ in range(6 if hand.devtools else 0):  # a tap right after a fast stroke
        hand.touch(*hand.strokes(7))
        hand.find("#clear").tap()
        hand.expect_blank()
    hand.page.evaluate("draw([[[-6.6, 200]]]); update()")  # a dot outside, of which only a grey rim is on the paper
    hand.expect_blank()


def test_no_line_is_drawn_where_the_paper_moved_under_the_pen(hand):
    x, y = hand.strokes(1)[0][0]
    hand.page.mouse.move(x, y)
    hand.page.mouse.down()  # this takes the example away
    hand.page.evaluate("$('verdict').style.marginTop = '20px'")  # as a wheel or a rotation would
    hand.page.mouse.move(x, y + 1)
    hand.page.mouse.up()
    inked = hand.page.evaluate("$('verdict').style = '', sheet.filter(v => v > 127).length")
    assert 1.9 < inked / (math.pi * 7**2) < 2.1, "two dots"


def test_a_pen_takes_over_from_a_palm_and_a_second_finger_does_nothing(browser):
    """The events are made up: they have no coalesced ones, and cannot be captured. No canvas can be read."""
    page = browser.new_page()
    page.add_init_script("CanvasRenderingContext2D.prototype.getImageData = undefined")
    page.goto(PAGE)
    send = """([pointerId, pointerType, kind, [clientX, clientY]]) => {
        const properties = { pointerId, pointerType, clientX, clientY, buttons: 1, bubbles: true };
        return (paper.dispatchEvent(new PointerEvent("pointer" + kind, properties)), steps.length); }"""
    palm, pen, finger, [seven] = (7, "touch"), (8, "pen"), (9, "touch"), Hand(page).strokes(7)
    assert page.evaluate(send, (*palm, "down", (300, 300))) == 1
    for i, place in enumerate(seven):
        events = [(*pen, "move" if i else "down", place), (*palm, "move", (290, 290)), (*finger, "down", (50, 300))]
        assert [page.evaluate(send, event) for event in events] == [1, 1, 1]
    expect(page.locator("#verdict")).to_contain_text("Read as 7")
    events = [(*pen, "up", seven[-1]), (*finger, "down", (200, 200)), (*finger, "cancel", (200, 200))]
    assert [page.evaluate(send, event) for event in events] == [1, 2, 1], "the system took the last for a palm"


def other_network():
    """Two poolings, other channels and kernels, ReLU."""
    torch.manual_seed(0)
    net, sizes = Net(), [(1, 20, 5), (20, 6, 3), None, (6, 24, 3), None, (24, 7, 2)]
    blocks = [ConvBlock(*size, activation=nn.ReLU()) if size else nn.MaxPool2d(2) for size in sizes]
    net.layers = nn.Sequential(*blocks, nn.Conv2d(7, 10, 1), nn.AvgPool2d(3))
    net(torch.randn(64, 1, 28, 28))  # for the statistics of BatchNorm
    return net.eval()


def maps_of(net, x, pool=nn.MaxPool2d):
    """Return the images x, then the maps of each convolution."""
    maps = [x]
    for layer in net.layers[:-1]:
        pooling = isinstance(layer, nn.MaxPool2d)
        x = pool(2)(x) if pooling else layer(x)
        maps += [] if pooling else [x]
    return maps


def check_calculation(page, value, activation):
    """Do by hand what the page writes down, from its rounded numbers."""
    texts = page.locator("#name, #sentence, .pair").all_inner_texts()
    name, sentence, *sums = (text.replace("−", "-") for text in texts)
    left, total = re.search(r": (.*) \(bias\) = (-?[\d.]+)\. ", sentence).groups()
    terms, total = np.array(left.replace("+ ", "").replace("- ", "-").split(), float), float(total)
    assert terms[:-1].tolist() == [float(text) for text in sums]
    assert abs(terms.sum() - total) < 0.0005 * (len(terms) + 1)
    assert abs(activation(torch.tensor(total)) - value) < 0.0012 > abs(float(name.split(": ")[1]) - value)
    for i in (abs(terms[:-1]).argmax(), len(sums) - 1):  # the strongest pair is shown first
        lines = page.locator("#pair").inner_text().replace("−", "-")
        pixels, weights, products = np.array(re.findall(r"(\S+\d) × (\S+) = (\S+)", lines), float).T
        assert (abs(pixels * weights - products) <= 0.0005 * (1.001 + abs(pixels) + abs(weights))).all()
        assert abs(products.sum() - terms[i]) <= 0.0005 * (len(products) + 1)
        pooled = [max(map(float, four.split(", "))) for four in re.findall("largest of (.*):", lines)]
        assert pooled == page.evaluate("convs[spot.n].pooling > 1") * pixels.tolist()
        page.locator(".pair").last.evaluate("button => button.click()")
    assert page.evaluate("(spot.n ? convs[spot.n - 1].frames : [$('seen')]).at(-1).className") == "map input"


@pytest.mark.parametrize("other", [None, other_network], ids=["stored", "other"])
def test_outlines_are_exact_and_numbers_and_colours_are_torch_s(other, network, browser):
    net, generator, page = other() if other else network, np.random.default_rng(0), browser.new_page()
    page.set_content(drawing_page(net))
    page.evaluate("draw([[[80, 60], [330, 70], [240, 200], [180, 360]], [[150, 210], [300, 220]]])")
    image = torch.tensor(page.evaluate("Array.from((update(), prepare()))")).view(1, 1, 28, 28)
    maps = [values.detach() for values in maps_of(net, (image / 255 - MEAN) / STD)]
    for output, values in zip(page.evaluate("convs.map(conv => Array.from(conv.output))"), maps[1:], strict=True):
        torch.testing.assert_close(torch.tensor(output), values.flatten(), rtol=0, atol=1e-4)
    assert np.allclose(page.evaluate("classify(prepare())"), classify(net, image[:, 0])[1], rtol=0, atol=1e-4)
    # With positive numbers only, and the mean as pooling, the gradient is positive exactly at the pixels that are seen.
    positive = copy.deepcopy(net).double()
    positive.load_state_dict({name: torch.ones_like(value) for name, value in net.state_dict().items()})
    positive = maps_of(positive, torch.ones(1, 1, 28, 28, dtype=torch.float64, requires_grad=True), nn.AvgPool2d)
    outlined = """elements => elements.filter(element => element.style.getPropertyValue("--traced")).map(element =>
        ["--y", "--x", "--size"].map(name => parseFloat(element.style.getPropertyValue(name))))"""
    for n, values in enumerate(maps[1:]):
        for channel, y, x in generator.integers(values.shape[1:], size=(12, 3)).tolist():
            page.evaluate("pixel => { picked = null; hold(pixel); }", {"n": n, "channel": channel, "y": y, "x": x})
            value, score = values[0, channel, y, x].item(), n == len(maps) - 2
            check_calculation(page, value, nn.Identity() if score else nn.ReLU() if other else nn.SiLU())
            mean = f"scores is {values[0, channel].mean():.3f}.".replace("-", "−")
            assert not score or mean in page.inner_text("#sentence")
            red, _, blue, _ = np.array(page.locator("#path canvas").last.evaluate(PIXELS)).reshape(-1, 4).T
            drawn = values[0, channel].flatten().numpy()
            assert np.array_equal(np.sign(red - blue)[abs(drawn) > 0.05], np.sign(drawn)[abs(drawn) > 0.05])
            places = (".row .map, #bars .map", "#seen, .row", "#path .map")
            pixel, squares, path = (page.eval_on_selector_all(place, outlined) for place in places)
            assert np.allclose(np.array(pixel) * values.shape[3], [[y, x, 1]]) and path == squares + pixel
            gradients = torch.autograd.grad(positive[n + 1][0, channel, y, x], positive[: n + 1], retain_graph=True)
            for gradient, square in zip(gradients, squares, strict=True):
                top, left, size = np.rint(np.array(square) * gradient.shape[3]).astype(int)
                seen = gradient[0].sum(0) > 0
                assert seen.sum() == size**2 == seen[top : top + size, left : left + size].sum()
    page.keyboard.press("Escape")
    assert page.locator("[style*=traced]").count() == 0


def test_a_pixel_is_traced_by_mouse_finger_and_keys(hand):
    hand.draw(3)
    assert hand.find(".row").nth(1).bounding_box()["y"] < hand.page.viewport_size["height"] - 40
    canvas = hand.find(".row").nth(4).locator("canvas").nth(2)  # of 9 x 9 pixels
    pixel = canvas.bounding_box()["width"] / 9
    place = {"x": 3.5 * pixel, "y": 5.5 * pixel}
    if hand.devtools:
        canvas.tap(position=place)
        for part in ("#verdict", "#paper", "#path", "#name", "#sentence"):
            expect(hand.find(part)).to_be_in_viewport(ratio=1)
        hand.find("#name").tap()
        expect(hand.find("#sentence")).to_be_hidden()
        hand.find("#name").tap()
    else:
        canvas.hover(position=place)
        hand.expect_pixel("Block 5, map 3", 6, 4)
        box = hand.find(".pair").nth(1).bounding_box()
        hand.page.mouse.move(box["x"] + 9, box["y"] + 9, steps=99)  # the pixel stays on the way, over other maps
        expect(hand.find("#pair")).to_contain_text("Block 4, map 2")
        hand.page.keyboard.press("ArrowUp")  # scrolls
        hand.expect_pixel("Block 5, map 3", 6, 4)
        canvas.click(position=place)
        canvas.hover(position={"x": 1, "y": 1})  # the clicked one is kept
        hand.page.wait_for_timeout(200)
        canvas.click(position={"x": 1, "y": 1}, button="right")
    hand.expect_pixel("Block 5, map 3", 6, 4)
    for key in ("ArrowLeft", "ArrowUp", "Shift+ArrowDown", "Shift+ArrowRight"):
        hand.page.keyboard.press(key)
    hand.expect_pixel("Block 6, map 4", 4, 2)  # the same place in 7 x 7 pixels
    kept, scrolled = hand.find("#sentence").text_content(), hand.page.evaluate("$('net').scrollTop")
    hand.draw(5)
    expect(hand.find("#sentence")).not_to_have_text(kept)  # it follows the pen
    hand.expect_pixel("Block 6, map 4", 4, 2)
    assert hand.page.evaluate("$('net').scrollTop") == scrolled, "drawing does not scroll"
    hand.find("#close").click()
    expect(hand.find("#spot")).to_be_hidden()
    hand.find("#net").focus()
    hand.page.keyboard.press("ArrowRight")
    hand.expect_pixel("Block 1, map 1", 13, 14)
    hand.find("#bars canvas").nth(3).click()
    hand.expect_pixel("Score of 3", 2, 2)


def test_examples_are_read_and_what_mnist_lacks_is_said_once_a_stroke(hand):
    expect(hand.find("#verdict")).to_have_text("Read as 3. Draw your own")
    said = "new MutationObserver(() => said.push($('status').textContent)).observe($('status'), { childList: true })"
    hand.page.evaluate(f"said = []; {said}")
    reads = [*map(str, range(10)), "7", "0, or 8", "1, or 7", "8"]
    for button, read in zip(hand.find("#examples button").all(), reads, strict=True):
        button.click()
        expect(hand.find("#verdict")).to_have_text(re.compile(f"^Read as {read}"))
        rare = {"1, or 7": "1s with a long flag.", "0, or 8": "0s with a slash."}.get(read, "")
        expect(hand.find("#note")).to_have_text(re.compile(f"few {rare}$" if rare else "^$"))
        assert abs(sum(int(text.rstrip("\u200b%")) for text in hand.find("#bars small").all_inner_texts()) - 100) <= 3
    hand.draw(1)  # Clear, and one stroke
    hand.page.wait_for_function("said.length === 16 && said[14].startsWith('Draw') && said[15].startsWith('Read as 1')")


def test_a_page_that_cannot_start_says_why(browser, network):
    text = drawing_page(network)
    for broken, message in [
        (text.replace("const WEIGHTS", "const OTHER"), "weights.js is not beside this page, or is damaged"),
        (text.replace("[8, 1, 3]", "[8, 1, 5]"), "The weights do not fit"),
        (text[:-50_000], "scripts are blocked, or this file is cut"),
        (text, "Read as 3"),
    ]:
        page = browser.new_page()
        page.set_content(broken)
        expect(page.locator("#verdict")).to_contain_text(message)


def test_a_printed_page_is_one_sheet_with_all_maps(browser):
    page = browser.new_page(color_scheme="dark", viewport={"width": 718, "height": 300})
    page.goto(PAGE)
    page.evaluate("hold({ n: 5, channel: 3, y: 3, x: 3 })")
    page.emulate_media(media="print")
    width, height = page.evaluate(
        "({ scrollWidth, scrollHeight } = document.documentElement, [scrollWidth, scrollHeight])"
    )
    assert width == 718 and height < 1046, "A4 without its margins"
    assert page.evaluate("net.scrollHeight - net.clientHeight") == 0, "nothing is hidden"
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"


def test_in_the_frames_of_a_notebook_s_output(browser, network, monkeypatch):
    """Colab shows a cell's output in a sandboxed frame; `show_page` puts the page into one of its own."""
    page, shown = browser.new_page(viewport={"width": 1000, "height": 800}), []
    monkeypatch.setattr("IPython.display.display", shown.append)
    show_page(network)
    output = html.escape(shown[0].data)
    page.set_content(f'<iframe sandbox="allow-scripts" srcdoc="{output}" width="980" height="790">')
    hand = Hand(page, page.frame_locator("iframe").frame_locator("iframe"))
    hand.draw(8)
    hand.find("#bars canvas").nth(8).click()
    hand.expect_pixel("Score of 8", 2, 2)
    assert hand.find("html").evaluate("html => html.scrollHeight") <= 760
    page.screenshot(path=ROOT / "build" / "draw-output.png")
