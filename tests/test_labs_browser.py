"""The labs as a person meets them: JupyterLab on loopback, chromium, each notebook opened, run and played with."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

LABS = Path(__file__).parents[1] / "labs"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},  # cells out of sight stay in the page
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH (Debian: apt install chromium)"),
]


@dataclass
class Lab:
    """A running JupyterLab."""

    url: str
    token: str

    def ask(self, path: str) -> object:
        """What the server's REST interface answers, or None while it is not ready."""
        request = urllib.request.Request(f"{self.url}{path}", headers={"Authorization": f"token {self.token}"})
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return json.load(answer)
        except (urllib.error.URLError, OSError):  # refused while it starts; /api/kernels may answer 500 once
            return None


def until(holds, seconds: float, what: str) -> object:
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[Lab]:
    """JupyterLab in a folder of its own, with a copy of the labs; afterwards no process of it may be left."""
    psutil = pytest.importorskip("psutil")
    home = tmp_path_factory.mktemp("jupyter")
    work = home / "a folder elsewhere"
    shutil.copytree(LABS, work, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    folders = {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    folders |= {f"JUPYTERLAB_{name}_DIR": str(home / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
    folders |= {"IPYTHONDIR": str(home / "ipython"), "MPLCONFIGDIR": str(home / "matplotlib")}
    for name, values in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    options = [
        "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={work}", "--LabApp.extension_manager=readonly",
    ]  # fmt: skip
    with open(home / "log.txt", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            cwd=work,
            env={**os.environ, **folders},
            stdout=log,
            stderr=log,
        )
    try:
        running = Lab(f"http://127.0.0.1:{port}", token)
        until(lambda: running.ask("/api/status") or server.poll() is not None, 60, "JupyterLab to start")
        assert server.poll() is None, (home / "log.txt").read_text()
        yield running
    finally:
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        server.terminate()
        _, left = psutil.wait_procs(family, timeout=15)
        for process in left:
            process.kill()
    assert not left, f"still running after JupyterLab was closed: {left}"


@pytest.fixture
def page(tmp_path):
    """A page that cannot reach anything but loopback; its last look is kept as a picture."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync",
                "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            ],
        )  # fmt: skip
        page = browser.new_page(viewport={"width": 1280, "height": 1500}, color_scheme="light")
        yield page
        page.screenshot(path=str(tmp_path / "last look.png"))
        browser.close()


def run_all(lab: Lab, page, name: str) -> None:
    """Open a notebook, wait for its kernel and press Run All Cells."""
    page.goto(f"{lab.url}/lab/tree/{name}.ipynb?token={lab.token}")
    until(lambda: any(k["execution_state"] == "idle" for k in lab.ask("/api/kernels") or []), 60, "a kernel")
    page.get_by_text("| Idle").wait_for(timeout=60_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def errors_of(page) -> list[str]:
    return page.locator("[data-mime-type='application/vnd.jupyter.error']").all_inner_texts()


def test_generation_lab(lab, page, tmp_path):
    run_all(lab, page, "01_generation")
    generate, stop = (page.locator(".widget-button", has_text=name) for name in ("Generate", "Stop"))
    until(lambda: generate.count() or errors_of(page), 120, "the panel (a model may have to be trained first)")
    assert not errors_of(page)
    text, status, picture = page.locator(".tinylm-text"), page.locator(".tinylm-status"), page.locator(".widget-image")
    # The cells below the panel ran too: the last one tells of four temperatures.
    page.get_by_text("temperature 1.5, ").wait_for(timeout=30_000)
    assert text.inner_text().strip() == "The"

    # A slider moved by keys changes its number and the figure.
    before, temperature = picture.get_attribute("src"), page.locator(".noUi-handle").first
    temperature.focus()
    for _ in range(4):
        temperature.press("ArrowRight")
    assert page.locator(".widget-readout").first.inner_text() == "1.00"
    until(lambda: picture.get_attribute("src") != before, 5, "the figure to follow the slider")

    # Text streams in, coloured, with alternatives under the pointer.
    generate.click()
    until(lambda: status.inner_text().startswith("done: 200 tokens"), 30, "200 tokens")
    written = text.inner_text()
    assert written.startswith("The") and len(written) > 200
    spans = text.locator("span[title]")
    assert spans.count() > 150 and "likeliest: " in spans.nth(5).get_attribute("title")
    assert len({spans.nth(n).get_attribute("style") for n in range(20)}) > 5
    panel = page.locator(".jp-OutputArea-output", has=text)
    panel.scroll_into_view_if_needed()
    panel.screenshot(path=str(tmp_path / "01_generation.png"))

    # A long text is stopped: at once, and the panel is ready for the next.
    length = page.locator(".noUi-handle").nth(4)
    length.focus()
    length.press("End")
    assert page.locator(".widget-readout").nth(4).inner_text() == "2000"
    generate.click()
    until(generate.is_disabled, 5, "the text to begin")
    stop.click()
    began = time.monotonic()
    until(lambda: "stop" in status.inner_text(), 1, "Stop to be acknowledged")
    until(lambda: status.inner_text().startswith("stopped after"), 5, "the text to end")
    assert time.monotonic() - began < 2
    assert generate.is_enabled() and stop.is_disabled()

    # The cell run again while it writes: one panel, a new one, that works.
    generate.click()
    page.get_by_text("widgets.generation_panel(").click()
    page.keyboard.press("Shift+Enter")
    until(lambda: status.count() == 0 and text.inner_text().strip() == "The", 10, "a fresh panel")
    assert generate.count() == 1
    generate.click()
    until(lambda: status.inner_text().startswith("done: 200 tokens"), 30, "200 tokens of the new panel")
    assert not errors_of(page)
    print(f"\nscreenshot: {tmp_path / '01_generation.png'}")
