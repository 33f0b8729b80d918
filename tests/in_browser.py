"""The drawing page in headless Chrome or Chromium: `make test-browser`."""

import base64
import html
import io
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from test_draw import WEIGHTS, network_in

from s6.draw import classify, drawing_page, read_picture
from s6.utils import load_mnist, upright

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
# Each digit as strokes of a hand, in a square of 100.
DIGITS = {
    0: [[(50, 4), (28, 12), (15, 34), (13, 60), (22, 84), (42, 96), (64, 90), (79, 68), (81, 42), (72, 17), (54, 5)]],
    1: [[(38, 20), (56, 4), (54, 36), (52, 68), (50, 97)]],
    2: [[(18, 26), (27, 9), (48, 3), (67, 10), (72, 28), (62, 48), (42, 68), (15, 95), (40, 93), (64, 93), (86, 95)]],
    3: [[(20, 12), (42, 4), (64, 9), (69, 25), (57, 40), (38, 47), (62, 53), (75, 69), (69, 88), (46, 97), (18, 89)]],
    4: [[(34, 4), (26, 29), (16, 54), (44, 56), (83, 52)], [(66, 27), (62, 60), (58, 98)]],
    5: [[(74, 6), (50, 6), (28, 8), (25, 28), (22, 46), (44, 42), (66, 50), (73, 68), (63, 88), (42, 97), (18, 92)]],
    6: [[(66, 4), (46, 15), (28, 37), (18, 62), (23, 86), (42, 97), (64, 92), (71, 74), (59, 59), (40, 59), (24, 73)]],
    7: [[(14, 10), (40, 8), (66, 6), (82, 8), (70, 34), (56, 62), (44, 97)]],
    8: [
        [(68, 16), (50, 4), (32, 12), (32, 30), (50, 46), (68, 64), (70, 84), (52, 97), (32, 90), (28, 70)],
        [(28, 70), (46, 50), (66, 32), (70, 18)],
    ],
    9: [[(72, 20), (54, 5), (33, 12), (25, 32), (36, 47), (56, 45), (72, 28), (74, 14), (72, 44), (66, 72), (57, 97)]],
}
PAGE = (ROOT / "docs" / "index.html").as_uri()
DESK, PHONE = {"width": 720, "height": 430}, {"width": 360, "height": 640}


class Hand:
    """A mouse, or a finger, above the paper in a page or in a frame of it."""

    def __init__(self, page, frame, touch):
        self.page, self.frame, self.paper = page, frame, frame.locator("#paper")
        self.devtools = page.context.new_cdp_session(page) if touch else None

    def stroke(self, points):
        if self.devtools:
            for kind, point in zip(["touchStart"] + ["touchMove"] * len(points), points[:1] + points, strict=True):
                touches = [{"x": point[0], "y": point[1]}]
                self.devtools.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})
            self.devtools.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        else:
            self.page.mouse.move(*points[0])
            self.page.mouse.down()
            for point in points[1:]:
                self.page.mouse.move(*point, steps=3)
            self.page.mouse.up()

    def draw(self, digit, size=0.8, left=0.1, top=0.1):
        """Draw on an empty paper; size and place as shares of its side."""
        self.frame.get_by_role("button", name="Clear").click()
        box = self.paper.bounding_box()
        for stroke in DIGITS[digit]:
            place = ((left + size * x / 100, top + size * y / 100) for x, y in stroke)
            self.stroke([(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in place])
        expect(self.frame.locator("#verdict")).to_have_text(re.compile(rf"^Read as {digit}, with [\d.]+ %$"))


@pytest.fixture(scope="module")
def browser():
    (ROOT / "build").mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])


@pytest.fixture(params=["desk", "phone"])
def hand(request, browser):
    touch = request.param == "phone"
    scheme = "dark" if touch else "light"
    context = browser.new_context(viewport=PHONE if touch else DESK, has_touch=touch, color_scheme=scheme)
    page, requests = context.new_page(), []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(PAGE)
    yield Hand(page, page.main_frame, touch)
    assert requests == [PAGE, PAGE.replace("index.html", "weights.js")], "nothing leaves the page"
    width, height = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
    assert width <= page.viewport_size["width"] and height <= page.viewport_size["height"], "it fits on the screen"
    page.screenshot(path=ROOT / "build" / f"draw-{request.param}.png")
    context.close()


PLACES = {"large": (0.8, 0.1, 0.1), "small": (0.25, 0.4, 0.35), "corner": (0.3, 0.02, 0.68)}  # size, left, top


@pytest.mark.parametrize("where", PLACES.values(), ids=PLACES)
def test_all_ten_digits_are_read_and_made_ready_as_read_picture_does(hand, where):
    for digit in DIGITS:
        hand.draw(digit, *where)
        drawing = hand.page.evaluate("paper.toDataURL()").split(",")[1]
        seen = np.array(hand.page.evaluate("Array.from(prepare())")).reshape(28, 28)
        expected = torch.tensor(read_picture(Image.open(io.BytesIO(base64.b64decode(drawing)))))
        difference = abs(seen - upright(expected.view(1, 1, 28, 28)).numpy()[0, 0])
        assert difference.max() <= 24 and difference.mean() < 1, f"{digit}: {difference.max()}, {difference.mean()}"
    assert hand.page.evaluate("scrollX + scrollY") == 0


def test_undo_and_clear_down_to_the_empty_paper(hand):
    def nothing():
        expect(hand.frame.locator("#verdict")).to_have_text("Draw a digit, 0 to 9")
        assert set(hand.page.evaluate("bars.map(bar => bar.style.height)")) == {"0px"}
        assert not hand.page.evaluate("seen.getImageData(0, 0, 28, 28).data.some(v => v)")

    nothing()
    hand.draw(4)
    undo, clear = (hand.frame.get_by_role("button", name=name) for name in ("Undo", "Clear"))
    before = hand.frame.locator("#verdict").inner_text()
    undo.click()
    expect(hand.frame.locator("#verdict")).not_to_have_text(before)
    undo.click()
    nothing()
    undo.click()  # of nothing
    hand.paper.click()
    expect(hand.frame.locator("#verdict")).to_contain_text("Read as")
    hand.draw(3)
    clear.click()
    nothing()
    hand.draw(5)


def test_its_forward_pass_is_torch_s(browser):
    page = browser.new_page()
    page.goto(PAGE)
    images, labels = load_mnist(ROOT / "data", train=False)
    images = upright(images)
    expected, wanted = classify(network_in(WEIGHTS), images[:, 0])
    run = """text => {
        const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0)), start = performance.now(), all = [];
        for (let i = 0; i < bytes.length; i += 784) all.push(classify(bytes.subarray(i, i + 784)));
        return [(performance.now() - start) / all.length, all];
    }"""
    milliseconds, probabilities = page.evaluate(run, base64.b64encode(images.numpy()).decode())
    probabilities = torch.tensor(probabilities)
    print(f"{milliseconds:.1f} ms an image, {100 * (probabilities.argmax(1) == labels).float().mean():.2f} %")
    assert len(probabilities) == 10_000 and torch.equal(probabilities.argmax(1), expected)
    assert (probabilities - wanted).abs().max() < 1e-4


def test_in_the_frames_of_a_notebook_s_output(browser):
    """Colab shows a cell's output in a sandboxed frame; the notebook puts the page into one of its own."""
    page = browser.new_page(viewport={"width": 1000, "height": 700})
    drawing = html.escape(drawing_page(network_in(WEIGHTS)))
    output = f'<div><iframe srcdoc="{drawing}" width="100%" height="480" frameborder="0"></iframe></div>'
    outer = f'<iframe sandbox="allow-scripts" srcdoc="{html.escape(output)}" width="900" height="600"></iframe>'
    page.set_content(outer)
    frame = page.frame_locator("iframe").frame_locator("iframe")
    hand = Hand(page, frame, touch=False)
    hand.draw(8)
    page.screenshot(path=ROOT / "build" / "draw-output.png")
