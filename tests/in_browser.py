"""The whole notebook in JupyterLab, run from its menu in headless Chrome or Chromium: `make test-browser`."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from draw_in_browser import BROWSER, Hand
from playwright.sync_api import expect, sync_playwright


@pytest.fixture
def address(tmp_path, mnist):
    """JupyterLab as it comes, over a copy of the checkout with a training of six epochs; its own settings folder."""
    for name in ("s6", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "data").symlink_to(ROOT / "data")
    notebook = tmp_path / "notebooks" / "S6.ipynb"
    content = json.loads(notebook.read_text().replace("recipe = Recipe()", "recipe = Recipe(epochs=6, lr=0.4)"))
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
    notebook.write_text(json.dumps(content))
    # All cells stay in the page, wherever it is scrolled to; the kernel starts without a question.
    settings = tmp_path / "lab" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none", "autoStartDefaultKernel": true}')
    folders = {"JUPYTERLAB_SETTINGS_DIR": tmp_path / "lab", "JUPYTER_CONFIG_DIR": tmp_path / "config"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0", "--ip=127.0.0.1"]
    log = tmp_path / "log"
    with open(log, "w") as file:
        environment = {key: value for key, value in os.environ.items() if key != "TQDM_DISABLE"}
        environment |= {key: str(value) for key, value in folders.items()}
        command.append("--IdentityProvider.token=S6")
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=file)
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:\d+/lab", log.read_text())):
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)
        yield f"{found[0]}/tree/notebooks/S6.ipynb?token=S6&reset"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def page():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 12_000})  # all of the notebook
        yield page
        page.screenshot(path=ROOT / "build" / "browser.png")  # when it failed, too
        browser.close()


def test_run_all(address, page):
    page.goto(address)
    cells = page.locator(".jp-CodeCell")
    cells.first.wait_for(timeout=120_000)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=120_000)  # in the status bar; before, nothing runs
    page.locator(".lm-MenuBar-item", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()
    training = cells.filter(has_text="for epoch in resumable(")
    bars, deadline = set(), time.monotonic() + 600
    while not cells.last.locator("iframe").count():
        assert time.monotonic() < deadline, "the notebook did not come to its end in ten minutes"
        bars |= set(re.findall(r"epoch \d+: +\d+%\|", " ".join(training.locator(".jp-OutputArea").all_inner_texts())))
        time.sleep(0.2)
    verdict = "Passed: more than 99.4 % at the last epoch, 10,474 parameters, 6 epochs"
    expect(page.get_by_text(verdict)).to_be_visible()
    assert len(bars) > 10, f"the bar hardly moved: {sorted(bars)}"
    lines = training.locator(".jp-OutputArea").first.inner_text().strip().splitlines()
    assert [line.split(":")[0] for line in lines] == [f"epoch  {n}" for n in range(1, 7)], "nothing is left of the bars"
    expect(page.get_by_text("Total params: 10,474")).to_be_visible()
    images = page.locator(".jp-OutputArea img")
    expect(images).to_have_count(5)  # digits, curves, mistakes, confusion, a 7
    for i in range(5):
        assert images.nth(i).evaluate("image => image.naturalWidth") > 300
    Hand(page, cells.last.frame_locator("iframe"), touch=False).draw(3)
    for kind in ("stderr", "error"):
        assert not page.locator(f'[data-mime-type="application/vnd.jupyter.{kind}"]').count()
