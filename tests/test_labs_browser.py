"""The labs as a person meets them: JupyterLab on loopback, chromium, each notebook opened, run and played with."""

from __future__ import annotations

import contextlib
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

from tinylm.widgets import find_model

LABS = Path(__file__).parents[1] / "labs"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},  # cells out of sight stay in the page
}

NO_BROWSER = "no chromium on the PATH (Debian: apt install chromium)"
pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.skipif(CHROMIUM is None, reason=NO_BROWSER)]
if os.environ.get("TINYLM_SCREENSHOTS") and CHROMIUM is None:  # who asks for pictures wants no success without them
    pytest.fail(f"pictures of the labs were asked for, but there is {NO_BROWSER}", pytrace=False)


@dataclass
class Lab:
    """A running JupyterLab."""

    url: str
    token: str
    pid: int

    def ask(self, path: str) -> object:
        """What the server's REST interface answers, or None while it is not ready."""
        request = urllib.request.Request(f"{self.url}{path}", headers={"Authorization": f"token {self.token}"})
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return json.load(answer)
        except (urllib.error.URLError, OSError):  # refused while it starts; /api/kernels may answer 500 once
            return None

    def end_kernels(self) -> None:
        """End what earlier notebooks left running, so that labs do not share the machine."""
        for session in self.ask("/api/sessions") or []:
            request = urllib.request.Request(
                f"{self.url}/api/sessions/{session['id']}",
                headers={"Authorization": f"token {self.token}"},
                method="DELETE",
            )
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(request, timeout=10).close()


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
    for path in work.glob("*.ipynb"):  # what is trained here is kept here, and always trained anew
        source = path.read_text(encoding="utf-8")
        for panel in ("training", "ablations", "text"):
            source = source.replace(f"widgets.{panel}_panel()", f"widgets.{panel}_panel(results_dir='{home / panel}')")
        path.write_text(source, encoding="utf-8")
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
        running = Lab(f"http://127.0.0.1:{port}", token, server.pid)
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


def run_all(lab: Lab, page, name: str) -> float:
    """Open a notebook in a workspace of its own, wait for its kernel and press Run All Cells; when that was."""
    lab.end_kernels()
    page.goto(f"{lab.url}/lab/workspaces/{name}/tree/{name}.ipynb?token={lab.token}&reset")

    def own_kernel() -> bool:
        sessions = [s for s in lab.ask("/api/sessions") or [] if s["path"] == f"{name}.ipynb" and s["kernel"]]
        return any(session["kernel"]["execution_state"] == "idle" for session in sessions)

    until(own_kernel, 90, "a kernel")
    page.get_by_text("| Idle").wait_for(timeout=60_000)
    prompts = page.locator(".jp-InputPrompt")

    def begun() -> bool:
        return any("*" in text or any(c.isdigit() for c in text) for text in prompts.all_inner_texts())

    for _ in range(3):  # a press may come before the page has taken up its kernel, and is then lost
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        pressed = time.monotonic()
        while time.monotonic() < pressed + 10 and not begun():
            time.sleep(0.1)
        if begun():
            return pressed
    raise AssertionError("no cell began to run")


def first_picture(lab: Lab, page, pressed: float) -> None:
    """Wait for the panel's picture: within 10 s of Run All on an idle machine, and of computing on any."""
    picture = page.locator(".widget-image").first
    until(lambda: picture.count() or errors_of(page), 180, "the panel (a model may have to be trained first)")
    seconds, computing = time.monotonic() - pressed, kernel_seconds(lab)
    load = os.getloadavg()[0]
    print(f"\nfirst picture {seconds:.1f} s after Run All, {computing:.1f} s of computing; load average {load:.1f}")
    assert not errors_of(page)
    if find_model() is not None:
        assert computing < 10


def kernel_seconds(lab: Lab) -> float:
    """Processor time that the youngest kernel has taken since it started."""
    import psutil

    kernels = [
        p for p in psutil.Process(lab.pid).children(recursive=True) if "ipykernel_launcher" in " ".join(p.cmdline())
    ]
    times = max(kernels, key=lambda process: process.create_time()).cpu_times()
    return times.user + times.system


def press_stop(stop, status) -> None:
    """Press Stop, which is acknowledged within a second, and the work then ends soon."""
    stop.click()
    pressed = time.monotonic()
    until(lambda: "stop" in status.inner_text(), 1, "Stop to be acknowledged")
    print(f"\nStop acknowledged after {time.monotonic() - pressed:.2f} s", end="")
    until(lambda: status.inner_text().startswith("stopped "), 20, "the work to end")
    print(f", and all ended after {time.monotonic() - pressed:.2f} s")


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Where pictures of the labs are kept: $TINYLM_SCREENSHOTS (see ``make screenshots``), else a folder of the test's."""
    folder = Path(os.environ.get("TINYLM_SCREENSHOTS") or tmp_path).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def keep_picture(page, panel, path: Path) -> None:
    page.set_viewport_size({"width": 1280, "height": max(1500, int(panel.bounding_box()["height"]) + 300)})
    panel.scroll_into_view_if_needed()
    page.wait_for_timeout(300)  # fonts and pictures settle
    panel.screenshot(path=str(path))
    print(f"\nscreenshot: {path}")


def panel_of(page, part):
    return page.locator(".jp-OutputArea-output", has=part)


def button_of(page, name: str):
    return page.locator(".widget-button", has_text=name)


def errors_of(page) -> list[str]:
    """The tracebacks that cells show."""
    return page.locator(".jp-OutputArea-output", has_text="Traceback (most recent call last)").all_inner_texts()


def test_generation_lab(lab, page, pictures):
    first_picture(lab, page, run_all(lab, page, "01_generation"))
    generate, stop = (button_of(page, name) for name in ("Generate", "Stop"))
    text, status, picture = (
        page.locator(".tinylm-text"),
        page.locator(".tinylm-status"),
        page.locator(".widget-image").first,
    )
    # The cells below the panel ran too: the last one tells of four temperatures.
    page.get_by_text("temperature 1.5, ").wait_for(timeout=30_000)
    assert text.inner_text().strip() == "The"

    # A slider moved by keys changes its number and the figure.
    before, temperature = picture.get_attribute("src"), page.locator(".noUi-handle").first
    temperature.focus()
    for _ in range(4):
        temperature.press("ArrowRight")
    assert page.locator(".widget-readout").first.inner_text() == "1.00"
    until(lambda: picture.get_attribute("src") != before, 60, "the figure to follow the slider")

    # Text streams in, coloured, with alternatives under the pointer.
    generate.click()
    until(lambda: status.inner_text().startswith("done: 200 tokens"), 60, "200 tokens")
    written = text.inner_text()
    assert written.startswith("The") and len(written) > 200
    spans = text.locator("label[title]")
    assert spans.count() > 150 and "likeliest: " in spans.nth(5).get_attribute("title")
    assert len({spans.nth(n).get_attribute("style") for n in range(20)}) > 5
    keep_picture(page, panel_of(page, text), pictures / "01_generation.png")

    # They are there without a pointer, too: a click, then the arrow keys; the page's own shortcuts stay out of it.
    spans.nth(5).click()
    page.keyboard.press("ArrowRight")
    focused = "document.activeElement.parentElement"
    assert page.evaluate(f"{focused}.title") == spans.nth(6).get_attribute("title")
    told = page.evaluate(f"getComputedStyle({focused}, '::after').content")
    assert "likeliest: " in told

    # A narrow page shows the figure in two parts, one below the other, and nothing is wider than the page.
    panel, again = panel_of(page, text), page.locator(".tinylm-again")
    wide, is_whole = page.viewport_size, not again.is_visible()
    page.set_viewport_size({"width": 800, "height": 1500})
    until(again.is_visible, 10, "the second part of the figure")
    assert is_whole and panel.bounding_box()["width"] < 500
    first, second = (page.locator(".tinylm-picture > .widget-box").nth(n).bounding_box() for n in range(2))
    assert second["y"] >= first["y"] + first["height"] and second["width"] <= panel.bounding_box()["width"]
    assert page.evaluate("e => e.scrollWidth <= e.clientWidth", panel.element_handle())
    page.set_viewport_size(wide)

    # A long text is stopped: at once, and the panel is ready for the next.
    length = page.locator(".noUi-handle").nth(4)
    length.focus()
    length.press("End")
    assert page.locator(".widget-readout").nth(4).inner_text() == "2000"
    generate.click()
    until(generate.is_disabled, 60, "the text to begin")
    press_stop(stop, status)
    assert generate.is_enabled() and stop.is_disabled()

    # The cell run again while it writes: one panel, a new one, that works.
    generate.click()
    page.get_by_text("widgets.generation_panel(").click()
    page.keyboard.press("Shift+Enter")
    until(lambda: status.count() == 0 and text.inner_text().strip() == "The", 60, "a fresh panel")
    assert generate.count() == 1
    generate.click()
    until(lambda: status.inner_text().startswith("done: 200 tokens"), 60, "200 tokens of the new panel")
    assert not errors_of(page)


def test_training_lab(lab, page, pictures):
    first_picture(lab, page, run_all(lab, page, "02_train_live"))
    train, pause, resume, stop = (button_of(page, name) for name in ("Train", "Pause", "Resume", "Stop"))
    facts, status, picture = (
        page.locator(".tinylm-facts"),
        page.locator(".tinylm-status"),
        page.locator(".widget-image").first,
    )
    until(lambda: "parameters" in facts.inner_text(), 60, "the costs")
    until(lambda: "on this machine" in facts.inner_text(), 60, "the expected time")

    # A knob moved by keys changes what the run will cost.
    def parameters() -> str:
        return facts.inner_text().splitlines()[0]

    before, layers = parameters(), page.locator(".noUi-handle").nth(1)
    layers.focus()
    layers.press("ArrowRight")
    until(lambda: parameters() != before, 60, "the costs to follow a knob")
    layers.press("ArrowLeft")
    until(lambda: parameters() == before, 60, "the costs to follow a knob back")  # a click may overtake a knob

    # The curve grows and samples appear while the kernel answers; Pause and Resume keep the place.
    src = picture.get_attribute("src")
    train.click()
    until(lambda: "step" in status.inner_text(), 60, "the training to begin")
    until(
        lambda: picture.get_attribute("src") != src and page.locator(".tinylm-samples").count(), 60, "a curve, a sample"
    )
    pause.click()
    until(lambda: "paus" in status.inner_text(), 1, "Pause to be acknowledged")
    until(lambda: status.inner_text().startswith("paused after"), 60, "the run to pause")
    page.get_by_text("frame = runs.load_runs").first.click()
    page.keyboard.press("Shift+Enter")
    resume.click()
    until(lambda: "val_loss" in status.inner_text(), 300, "the run to end")
    assert "step" in page.locator(".tinylm-samples").inner_text()
    page.wait_for_timeout(1000)
    keep_picture(page, panel_of(page, facts), pictures / "02_train_live.png")

    # A long run is stopped: acknowledged at once, done at the next step.
    page.get_by_role("tab", name="The training").click()
    steps = page.locator(".widget-inline-hbox", has_text="max_steps (steps)").locator(".noUi-handle").first
    steps.focus()
    steps.press("End")
    train.click()
    until(lambda: status.inner_text().startswith("step"), 60, "the long run to begin")
    press_stop(stop, status)
    assert train.is_enabled() and stop.is_disabled()

    # The cell run again while it trains: one panel, and the trainer of the old one ends.
    train.click()
    until(lambda: status.inner_text().startswith("step"), 60, "a run to begin")
    page.get_by_text("widgets.training_panel(").click()
    page.keyboard.press("Shift+Enter")
    until(lambda: train.count() == 1 and train.is_enabled() and not status.count(), 60, "a fresh panel")
    assert not errors_of(page)


def test_inside_lab(lab, page, pictures):
    first_picture(lab, page, run_all(lab, page, "04_inside_the_model"))
    view, picture = page.locator(".tinylm-view"), page.locator(".widget-image").first
    seen = {picture.get_attribute("src")}
    for name in ("all heads", "loss by position", "positions", "KV cache", "logit lens", "attention"):
        before = picture.get_attribute("src")
        page.get_by_role("button", name=name, exact=True).click()
        until(lambda before=before: picture.get_attribute("src") != before, 60, f"the picture of {name}")
        seen.add(picture.get_attribute("src"))
    assert len(seen) >= 6
    before, head = picture.get_attribute("src"), page.locator(".noUi-handle").nth(1)
    head.focus()
    head.press("ArrowRight")
    until(lambda: picture.get_attribute("src") != before, 60, "another head")
    keep_picture(page, panel_of(page, view), pictures / "04_inside_the_model.png")
    assert not errors_of(page)


def test_laws_lab(lab, page, pictures):
    first_picture(lab, page, run_all(lab, page, "05_read_the_laws"))
    plan, picture = page.locator(".tinylm-plan"), page.locator(".widget-image").first
    until(lambda: page.locator(".tinylm-doctor").count(), 60, "the doctor")
    before, words = picture.get_attribute("src"), plan.inner_text()
    page.get_by_text("use one learning rate for all sizes").last.click()
    until(lambda: picture.get_attribute("src") != before and "mistakes cost" in plan.inner_text(), 60, "the walk")
    until(lambda: page.get_by_text("with 1 of the mistakes made").count(), 60, "the doctor's words, which come last")
    keep_picture(page, panel_of(page, plan), pictures / "05_read_the_laws.png")
    words, budget = plan.inner_text(), page.locator(".noUi-handle").first
    budget.focus()
    budget.press("End")
    until(lambda: plan.inner_text() != words and "far beyond" in plan.inner_text(), 60, "the plan to follow the budget")

    # What cannot be read is told in words, and what was there stays.
    words = plan.inner_text()
    page.get_by_placeholder("a study, a folder or a CSV file").fill("no such file.csv")
    button_of(page, "Read").click()
    until(lambda: "Way out" in page.locator(".tinylm-status").inner_text(), 60, "words on what is wrong")
    assert plan.inner_text() == words and not errors_of(page)


def test_ablations_lab(lab, page, pictures):
    first_picture(lab, page, run_all(lab, page, "03_ablations_side_by_side"))
    train, stop = (button_of(page, name) for name in ("Train and speak", "Stop"))
    status, texts = page.locator(".tinylm-status"), page.locator(".tinylm-text")
    assert page.locator(".tinylm-known").count() == 1
    tokens = page.locator(".noUi-handle").first
    tokens.focus()
    for _ in range(3):
        tokens.press("ArrowLeft")  # a tenth of a decade each
    train.click()
    until(lambda: "training 1 of 2" in status.inner_text(), 60, "the first training")
    until(lambda: status.inner_text().startswith("done:"), 300, "both models to have spoken")
    assert texts.count() == 2 and texts.nth(0).inner_text() != texts.nth(1).inner_text()
    page.wait_for_timeout(1000)
    keep_picture(page, panel_of(page, train), pictures / "03_ablations_side_by_side.png")
    tokens.focus()
    tokens.press("End")
    train.click()
    until(lambda: "step" in status.inner_text() or "training" in status.inner_text(), 60, "a long training")
    press_stop(stop, status)
    assert not errors_of(page)


def test_own_text_lab(lab, page, pictures):
    first_picture(lab, page, run_all(lab, page, "06_your_text"))
    plan, status, train = page.locator(".tinylm-plan"), page.locator(".tinylm-status").first, button_of(page, "Train")
    until(lambda: "The plan: " in plan.inner_text(), 300, "the look at the text, and a plan")
    assert "LZMA packs it to" in page.locator(".tinylm-quality").inner_text()
    before, minutes = plan.inner_text(), page.locator(".noUi-handle").nth(1)
    minutes.focus()
    minutes.press("Home")
    until(lambda: plan.inner_text() != before, 60, "the plan to follow the time")
    until(train.is_enabled, 60, "the plan to stand")
    train.click()
    until(lambda: "the model speaks below" in status.inner_text(), 300, "the model")
    until(lambda: "done: 200 tokens" in page.locator(".tinylm-status").nth(1).inner_text(), 60, "200 tokens")
    page.wait_for_timeout(1000)
    keep_picture(page, panel_of(page, train), pictures / "06_your_text.png")
    assert not errors_of(page)
