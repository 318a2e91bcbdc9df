"""What readers see: the explorer in a real JupyterLab and under voila, and every page of a report, in Chromium.

Screenshots are kept in outputs/screenshots, to be looked at.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from nfnet_lib import PROJECT
from nfnet_lib.report import build_report

CHROMIUM = shutil.which("chromium")
SCREENSHOTS = PROJECT / "outputs" / "screenshots"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium; make test installs it"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from playwright.sync_api import sync_playwright

    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    quiet = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=quiet.split())
        yield browser
        browser.close()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def serve(tmp_path):
    """serve(arguments, path): start a Jupyter server, wait for it to answer, return its address; ended with the test."""
    processes = []

    def start(arguments, path):
        port = free_port()
        environment = os.environ | {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "DATA", "RUNTIME")}
        environment |= {f"JUPYTERLAB_{name}_DIR": str(tmp_path / name) for name in ("SETTINGS", "WORKSPACES")}
        environment["npm_config_cache"] = str(tmp_path / "npm")  # its language servers ask npm, which spins without one
        settings = tmp_path / "SETTINGS" / "@jupyterlab" / "apputils-extension"
        settings.mkdir(parents=True, exist_ok=True)
        (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
        log = (tmp_path / "server.log").open("w")
        command = [sys.executable, "-m", *(a.format(port=port) for a in arguments)]
        processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=PROJECT))
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5).close()
                return f"http://127.0.0.1:{port}"
            except urllib.error.HTTPError:  # it answers
                return f"http://127.0.0.1:{port}"
            except OSError:
                assert processes[-1].poll() is None, (tmp_path / "server.log").read_text()
                time.sleep(0.1)
        raise AssertionError((tmp_path / "server.log").read_text())

    yield start
    for process in processes:
        process.terminate()
        process.wait(20)


def drag_and_look(page, name):
    """Move the budget's slider, and see picture and sentence change; then choose another view."""
    picture = page.locator("img.widget-image").first
    picture.wait_for(timeout=90_000)
    sentence = page.locator(".widget-html-content", has_text="training FLOPs").first
    before, said = picture.get_attribute("src"), sentence.inner_text()
    handle = page.locator(".widget-slider:has-text('budget') .noUi-handle").first
    handle.focus()
    for _ in range(3):
        handle.press("ArrowLeft")
    page.wait_for_function("before => document.querySelector('img.widget-image').src !== before", arg=before, timeout=30_000)
    assert sentence.inner_text() != said and "90 % interval" in sentence.inner_text()
    page.wait_for_timeout(1500)  # until all three steps are drawn
    readout = float(page.locator(".widget-slider:has-text('budget') .widget-readout").first.inner_text())
    assert abs(float(sentence.inner_text().split()[0]) / readout - 1) < 0.01, "the picture is that of the slider"
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)
    moved = picture.get_attribute("src")
    page.get_by_role("button", name="Best learning rates").click()
    page.wait_for_function("before => document.querySelector('img.widget-image').src !== before", arg=moved, timeout=30_000)
    page.screenshot(path=SCREENSHOTS / f"{name}_rates.png", full_page=True)


def test_the_explorer_in_jupyterlab(browser, serve, tmp_path):
    shutil.copytree(PROJECT / "notebooks", tmp_path / "notebooks")
    address = serve([
        "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--port={port}", "--ServerApp.port_retries=0",
        "--ServerApp.allow_root=True", "--IdentityProvider.token=secret", f"--ServerApp.root_dir={tmp_path / 'notebooks'}",
    ], "/api")  # fmt: skip
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    page.goto(f"{address}/lab/tree/08_explore.ipynb?reset&token=secret", wait_until="domcontentloaded")
    page.locator(".jp-Notebook").wait_for(timeout=60_000)
    page.get_by_text("| Idle").wait_for(timeout=60_000)
    for _ in range(6):
        page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
        page.get_by_text("Run All Cells", exact=True).click()
        try:
            page.locator(".jp-CodeCell .jp-InputPrompt", has_text="[1]").first.wait_for(timeout=20_000)
            break
        except Exception:  # JupyterLab drops the command while its kernel connects
            continue
    drag_and_look(page, "explorer_lab")
    page.close()


def test_the_explorer_as_a_page(browser, serve):
    address = serve([
        "voila", "notebooks/08_explore.ipynb", "--no-browser", "--Voila.ip=127.0.0.1", "--port={port}",
        "--Voila.token=secret",
    ], "/voila/files/none")  # fmt: skip
    page = browser.new_page(viewport={"width": 1000, "height": 900})
    for path in ("", "/api/kernels"):
        with urllib.request.urlopen(f"{address}{path}", timeout=20) as answer:
            assert "/login?" in answer.url, "without the token there is nothing but the way in"
    page.goto(f"{address}/?token=secret", wait_until="domcontentloaded", timeout=90_000)
    drag_and_look(page, "explorer_voila")
    page.close()


def test_every_page_of_a_report_is_quiet_and_asks_for_nothing(browser, planted_study):
    index = build_report(planted_study)
    pages = sorted(path for path in index.parent.rglob("*.html") if "_static" not in path.parts)
    assert len(pages) >= 6
    assert sum(file.stat().st_size for file in index.parent.rglob("*") if file.is_file()) < 15e6
    said, asked = [], []
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.on("console", lambda message: said.append((page.url, message.text)) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append((page.url, str(error))))
    page.on("request", lambda request: asked.append(request.url) if not request.url.startswith(("file:", "data:")) else None)
    for path in pages:
        page.goto(path.as_uri(), wait_until="load")
        alts = page.eval_on_selector_all("img", "images => images.map(image => [image.alt, image.naturalWidth])")
        assert all(alt.strip() and width > 0 for alt, width in alts), (path.name, alts)
        page.screenshot(path=SCREENSHOTS / f"report_{path.stem}.png", full_page=True)
    assert not said and not asked

    page.goto(index.with_name("runs.html").as_uri())
    rows = "[...document.querySelectorAll('#every-run tbody tr')]"
    losses = f"() => {rows}.filter(row => !row.hidden).map(row => row.cells[6].textContent)"
    page.get_by_label("find runs").fill("F1-mini finetune")
    assert len(page.evaluate(losses)) == 0
    page.get_by_label("find runs").fill("f3+-mini")
    assert 0 < len(page.evaluate(losses)) < 40
    page.get_by_label("find runs").fill("")
    page.locator("#every-run th", has_text="heldout_loss").click()
    found = [float(text) for text in page.evaluate(losses) if text]
    assert len(found) > 100 and found == sorted(found)
    page.locator("#every-run th", has_text="heldout_loss").click()
    assert [float(text) for text in page.evaluate(losses) if text] == sorted(found, reverse=True)

    for scheme, width in (("dark", 1200), ("light", 390)):  # a phone's width: nothing sticks out of the page
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 844})
        page.goto(index.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1")
        page.screenshot(path=SCREENSHOTS / f"report_index_{scheme}_{width}.png")
    page.close()
