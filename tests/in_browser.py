"""The drawing page in headless Chrome or Chromium: `make test-browser`."""

import base64
import copy
import html
import io
import json
import re
import shutil

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
SCREENS = {"desk": (1280, 720), "phone": (360, 640)}
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

    def draw(self, digit, *where):
        self.find("#clear").click()
        for points in self.strokes(digit, *where):
            if self.devtools:
                for kind, (x, y) in zip(["touchStart"] + ["touchMove"] * len(points), points[:1] + points, strict=True):
                    self.devtools.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
                self.devtools.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
            else:
                self.page.mouse.move(*points[0])
                self.page.mouse.down()
                for point in points[1:]:
                    self.page.mouse.move(*point, steps=3)
                self.page.mouse.up()
        expect(self.find("#verdict")).to_have_text(re.compile(rf"^Read as {digit}, with [\d.]+ %$"))
        assert float(self.find("#bars i").nth(digit).evaluate("bar => bar.style.height").rstrip("%")) > 25

    def expect_blank(self):
        expect(self.find("#verdict")).to_have_text("Draw a digit, 0 to 9")
        assert set(self.page.evaluate("bars.map(bar => bar.querySelector('i').style.height)")) == {"0px"}

    def expect_pixel(self, name, row, column):
        expect(self.find("#sentence")).to_have_text(re.compile(f"^{name}, row {row}, column {column}: "))


@pytest.fixture(scope="module")
def browser():
    (ROOT / "build").mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])


@pytest.fixture(params=SCREENS)
def hand(request, browser):
    touch, (width, height) = request.param == "phone", SCREENS[request.param]
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
    for digit in range(10):
        hand.draw(digit, *where)
        drawing = hand.page.evaluate("(update(), paper.toDataURL())").split(",")[1]
        seen = np.array(hand.page.evaluate("Array.from(prepare())")).reshape(28, 28)
        difference = abs(seen - read_picture(Image.open(io.BytesIO(base64.b64decode(drawing)))))
        assert difference.max() <= 8 and difference.mean() < 0.1, f"{digit}: {difference.max()}, {difference.mean()}"
    assert hand.find("#seen canvas").evaluate(PIXELS)[::4] == seen.flatten().tolist()


def test_undo_and_clear_down_to_the_empty_paper(hand):
    hand.expect_blank()
    hand.draw(4)  # of two strokes
    whole = hand.find("#verdict").text_content()
    hand.find("#undo").click()
    expect(hand.find("#verdict")).not_to_have_text(whole)
    for _ in range(2):  # the second of nothing
        hand.find("#undo").click()
        hand.expect_blank()
    hand.page.evaluate("redraw([[[-6.6, 200]]]); update()")  # a dot outside, of which only a grey rim is on the paper
    hand.expect_blank()
    hand.find("#clear").click()
    hand.find("#paper").click()
    expect(hand.find("#verdict")).to_contain_text("Read as")
    hand.draw(5)


def test_a_pen_takes_over_from_a_palm_and_a_second_finger_does_nothing(browser):
    """The events are made up: they have no coalesced ones, and cannot be captured. No canvas can be read."""
    page = browser.new_page()
    page.add_init_script("CanvasRenderingContext2D.prototype.getImageData = undefined")
    page.goto(PAGE)
    send = """([pointerId, pointerType, kind, [clientX, clientY]]) => {
        const properties = { pointerId, pointerType, clientX, clientY, buttons: 1, bubbles: true };
        paper.dispatchEvent(new PointerEvent("pointer" + kind, properties));
        return strokes.length; }"""
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


@pytest.mark.parametrize("other", [None, other_network], ids=["stored", "other"])
def test_outlines_are_exact_and_numbers_and_colours_are_torch_s(other, network, browser):
    net, generator, page = other() if other else network, np.random.default_rng(0), browser.new_page()
    page.set_content(drawing_page(net))
    page.evaluate("redraw([[[80, 60], [330, 70], [240, 200], [180, 360]], [[150, 210], [300, 220]]])")
    image = torch.tensor(page.evaluate("Array.from((update(), prepare()))")).view(1, 1, 28, 28)
    maps = [values.detach() for values in maps_of(net, (image / 255 - MEAN) / STD)]
    for output, values in zip(page.evaluate("convs.map(conv => Array.from(conv.output))"), maps[1:], strict=True):
        torch.testing.assert_close(torch.tensor(output), values.flatten(), rtol=0, atol=1e-4)
    probabilities = torch.tensor([page.evaluate("classify(prepare())")])
    torch.testing.assert_close(probabilities, classify(net, image[:, 0])[1], rtol=0, atol=1e-4)
    # With positive numbers only, and the mean as pooling, the gradient is positive exactly at the pixels that are seen.
    positive = copy.deepcopy(net).double()
    for parameter in positive.parameters():
        parameter.data.abs_()
    positive = maps_of(positive, torch.ones(1, 1, 28, 28, dtype=torch.float64, requires_grad=True), nn.AvgPool2d)
    outlined = """elements => elements.filter(element => element.style.getPropertyValue("--traced")).map(element =>
        ["--y", "--x", "--size"].map(name => parseFloat(element.style.getPropertyValue(name))))"""
    for n, values in enumerate(maps[1:]):
        for channel, y, x in generator.integers(values.shape[1:], size=(12, 3)).tolist():
            page.evaluate("pixel => hold(pixel)", {"n": n, "channel": channel, "y": y, "x": x})
            text = page.locator("#sentence").inner_text().replace("−", "-")
            assert f": {round(values[0, channel, y, x].item(), 2) + 0.0:.2f}\n" in text
            bias, total = (float(re.search(word + r" (-?\d+\.\d\d)", text)[1]) for word in ("bias", "make"))
            sums = [float(term.replace("−", "-")) for term in page.locator("figcaption").all_inner_texts()]
            assert abs(sum(sums) + bias - total) < 0.005 * (len(sums) + 2)
            assert n < len(maps) - 2 or f"scores is {values[0, channel].mean():.2f}." in text
            red, _, blue, _ = np.array(page.locator("#zoom canvas").evaluate(PIXELS)).reshape(-1, 4).T
            drawn = values[0, channel].flatten().numpy()
            assert np.array_equal(np.sign(red - blue)[abs(drawn) > 0.05], np.sign(drawn)[abs(drawn) > 0.05])
            pixel, squares = (page.eval_on_selector_all(name, outlined) for name in (".map:not(#seen)", "#seen, .row"))
            assert np.allclose(np.array(pixel) * values.shape[3], [[y, x, 1]] * 2), "in the map and its enlargement"
            gradients = torch.autograd.grad(positive[n + 1][0, channel, y, x], positive[: n + 1], retain_graph=True)
            for gradient, square in zip(gradients, squares, strict=True):
                top, left, size = np.rint(np.array(square) * gradient.shape[3]).astype(int)
                inside = torch.zeros_like(gradient[0, 0], dtype=bool)
                inside[top : top + size, left : left + size] = True
                assert torch.equal(gradient[0].sum(0) > 0, inside)
    page.keyboard.press("Escape")
    assert page.locator("[style*=traced]").count() == 0


def test_a_pixel_is_traced_by_mouse_finger_and_keys(hand):
    hand.draw(3)
    assert hand.find(".row").nth(2).bounding_box()["y"] < hand.page.viewport_size["height"] - 40
    canvas = hand.find(".row").nth(4).locator("canvas").nth(2)  # of 9 x 9 pixels
    pixel = canvas.bounding_box()["width"] / 9
    if hand.devtools:
        canvas.tap(position={"x": 3.5 * pixel, "y": 5.5 * pixel})
    else:
        canvas.hover(position={"x": 1, "y": 1})
        hand.expect_pixel("Block 5, map 3", 1, 1)
        canvas.click(position={"x": 3.5 * pixel, "y": 5.5 * pixel})
        canvas.hover(position={"x": 1, "y": 1})  # the clicked one is kept
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
