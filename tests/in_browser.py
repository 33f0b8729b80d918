"""The whole notebook in JupyterLab, run from its menu in headless Chromium: `make test-browser`."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from playwright.sync_api import expect, sync_playwright

SHOTS = ROOT / "build" / "browser"


@pytest.fixture
def address(tmp_path, mnist):
    """JupyterLab as it comes, over a copy of the checkout with a training of six epochs; its own settings folder."""
    for name in ("s6", "notebooks"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        )
    (tmp_path / "data").symlink_to(ROOT / "data")
    notebook = tmp_path / "notebooks" / "S6.ipynb"
    content = json.loads(notebook.read_text())
    for cell in (cell for cell in content["cells"] if cell["cell_type"] == "code"):
        cell["outputs"], cell["execution_count"] = [], None
        cell["source"] = "".join(cell["source"]).replace("recipe = Recipe()", "recipe = Recipe(epochs=6, lr=0.4)")
    notebook.write_text(json.dumps(content))
    settings = tmp_path / "settings"
    # All cells stay in the page, wherever it is scrolled to; no questions, which kernel and whether to fetch news.
    for name, value in {
        "lab/@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {
            "windowingMode": "none",
            "autoStartDefaultKernel": True,
        },
        "labconfig/page_config.json": {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}},
    }.items():
        (settings / name).parent.mkdir(parents=True)
        (settings / name).write_text(json.dumps(value))
    folders = {
        "JUPYTERLAB_WORKSPACES_DIR": str(settings / "workspaces"),
        "JUPYTERLAB_SETTINGS_DIR": str(settings / "lab"),
        "JUPYTER_CONFIG_DIR": str(settings),
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0", "--ip=127.0.0.1"]
    log = tmp_path / "log"
    with open(log, "w") as file:
        server = subprocess.Popen(
            [*command, "--IdentityProvider.token=S6"], cwd=tmp_path, env=os.environ | folders, stderr=file
        )
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:\d+/lab", log.read_text())):
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)
        yield f"{found[0]}/tree/notebooks/S6.ipynb?token=S6"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def page():
    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        yield page
        page.screenshot(path=SHOTS / "page.png")  # when it failed, too
        browser.close()


def test_run_all(address, page):
    page.goto(address)
    cells = page.locator(".jp-CodeCell")
    cells.first.wait_for(timeout=120_000)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=120_000)  # in the status bar; before, nothing runs
    page.locator(".lm-MenuBar-item", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()
    training = cells.filter(has_text="checkpoint.resume()")
    bars, deadline = set(), time.monotonic() + 600
    while not (verdict := cells.last.locator(".jp-OutputArea-output")).count():
        assert time.monotonic() < deadline, "the notebook did not come to its end in ten minutes"
        text = " ".join(training.locator(".jp-OutputArea").all_inner_texts())
        if (bar := re.search(r"epoch \d+: +(\d+)%\|", text)) and bar[0] not in bars:
            bars.add(bar[0])
            if len(bars) == 5:
                training.screenshot(path=SHOTS / "training.png")
        time.sleep(0.2)
    expect(verdict).to_contain_text("Passed: more than 99.4 % at the last epoch, 10,474 parameters, 6 epochs")
    assert len(bars) > 10, f"the bar hardly moved: {sorted(bars)}"
    lines = training.locator(".jp-OutputArea").first.inner_text().strip().splitlines()
    assert [line.split(":")[0] for line in lines] == [f"epoch  {n}" for n in range(1, 7)], "nothing is left of the bars"
    expect(page.get_by_text("Total params: 10,474")).to_be_visible()
    images = page.locator(".jp-OutputArea img")
    expect(images).to_have_count(4)  # digits, curves, mistakes, confusion
    for i in range(4):
        assert images.nth(i).evaluate("image => image.naturalWidth") > 300
    for i in range(cells.count()):
        cells.nth(i).screenshot(path=SHOTS / f"cell-{i + 1:02}.png")
    for kind in ("stderr", "error"):
        assert not page.locator(f'[data-mime-type="application/vnd.jupyter.{kind}"]').count()
    assert not page.locator(".jp-Dialog, .Toastify__toast--error, .Toastify__toast--warning").count()
