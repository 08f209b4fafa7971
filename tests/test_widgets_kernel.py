"""A panel in a kernel, as a notebook has it: what an hour of live updates takes, and what a closed kernel leaves."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jupyter_client.manager import start_new_kernel
from safetensors import safe_open
from scipy import stats

from tinylm.study import runs

pytestmark = pytest.mark.slow

OPEN = """
import time, types
from tinylm import widgets
from tinylm.widgets import training
panel = widgets.training_panel({text!r}, {folder!r})
panel.knobs["checkpoint_minutes"].value = 0.0
panel.knobs["tokenizer"].value = "byte"
panel.knobs["max_steps"].value = 1e5
"""
# A run that never ends in the place of a real one: each point is told, sampled, drawn and sent as in training.
PLAY = """
import contextlib, ctypes, gc, psutil
live = training.LiveRun(panel.run, panel.results_dir)
live.trainer = types.SimpleNamespace(step=0, curve=[])
panel.live, panel.is_running = live, True
panel.ready(False)

def go_on(points):
    for number in range(points):
        if number % 21 == 0:  # another run begins
            live.trainer.curve, live.samples = [], []
        step = live.trainer.step = number % 21 + 1
        loss = 6.0 / (1 + step)
        live.trainer.curve.append({"step": step, "tokens": 512.0 * step, "val_loss": loss, "train_loss": loss,
                                   "scored_tokens": 4096})
        live.samples.append((step, "The model says something. " * 8))
        for tick in range(4):
            panel._progress(f"step {number}, tick {tick}")
        panel._point()
        while panel._drawer is not None:
            time.sleep(0.002)
    # What is free in the heaps of ended threads is no growth; how many heaps there are hangs on how busy the machine is.
    gc.collect()
    with contextlib.suppress(AttributeError):  # glibc's own
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss / 1e6
"""


@pytest.fixture
def kernel(tmp_path):
    """(manager, run): a kernel, and a function that runs code in it and returns what it printed."""
    manager, client = start_new_kernel(startup_timeout=180, env={**os.environ, "IPYTHONDIR": str(tmp_path / "ipython")})

    def run(code: str, seconds: float = 300) -> str:
        printed = []

        def hear(message: dict) -> None:
            if message["msg_type"] == "error":
                printed.append("\n".join(message["content"]["traceback"]))
            elif message["msg_type"] == "stream":
                printed.append(message["content"]["text"])

        try:
            reply = client.execute_interactive(code, timeout=seconds, output_hook=hear, allow_stdin=False)
        except (TimeoutError, queue.Empty):
            pytest.fail(f"no answer in {seconds} s to {code!r}")
        assert reply["content"]["status"] == "ok", "".join(printed)
        return "".join(printed)

    yield manager, run
    client.stop_channels()
    if manager.is_alive():
        manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text("".join(f"{a} and {b} went to the sea.\n" for a in range(100) for b in range(100)))
    return str(path)


def test_an_hour_of_live_updates_takes_less_than_200_mb(kernel, text, tmp_path):
    """An hour of runs of the panel's first length, one after the other at 20 s a run, has 3,780 points of 21 a run. Of
    ten runs the first three may take what is taken once (a cache); what the others take, by the median of the slopes between
    any two of them, is taken by each that follows. One such cache filled late moves no median."""
    _, run = kernel
    run(OPEN.format(text=text, folder=str(tmp_path / "runs")) + PLAY)
    sizes = [float(run("print(go_on(21))", seconds=600)) for _ in range(10)]
    pictures = int(run("print(len(panel.picture.value))"))
    hour = sizes[2] - sizes[0] + 3780 / 21 * stats.theilslopes(sizes[2:]).slope
    print(f"\n21 live points each: {', '.join(f'{size:.1f}' for size in sizes)} MB, so {hour:.0f} MB in an hour")
    assert pictures > 5000, "nothing was drawn"
    assert hour < 200


@pytest.mark.parametrize("way", ["shut down", "killed"])
def test_a_kernel_closed_while_it_trains_leaves_no_process_and_no_half_written_file(way, kernel, text, tmp_path):
    psutil = pytest.importorskip("psutil")
    manager, run = kernel
    folder = tmp_path / "runs"
    run(OPEN.format(text=text, folder=str(folder)))
    run("panel.start()")
    run("while panel.live.trainer is None or panel.live.trainer.step < 5: time.sleep(0.05)")
    process = psutil.Process(int(run("import os; print(os.getpid())")))
    family = [process, *process.children(recursive=True)]
    began = time.monotonic()
    if way == "killed":
        process.kill()
    else:
        manager.shutdown_kernel()
    _, left = psutil.wait_procs(family, timeout=30)
    print(f"\n{way}: gone after {time.monotonic() - began:.1f} s, {len(left)} of {len(family)} processes left")
    assert not left
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".part")]
    assert files, "the run had begun to write"
    for path in files:
        _read_whole(path)
    # The next kernel trains in the same folder as if nothing had been.
    again, client = start_new_kernel(startup_timeout=180)
    try:
        code = (
            OPEN.format(text=text, folder=str(folder))
            + "panel.knobs['max_steps'].value = 60\npanel.start()\npanel.wait()"
        )
        reply = client.execute_interactive(code, timeout=300, output_hook=lambda _: None, allow_stdin=False)
        assert reply["content"]["status"] == "ok"
    finally:
        client.stop_channels()
        again.shutdown_kernel(now=True)
    assert runs.load_runs(folder)["status"].tolist() == ["finished"]


def _read_whole(path: Path) -> None:
    """Raises where a file is cut off."""
    if path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no iterator of its own)
                file.get_tensor(name)
    else:
        assert path.stat().st_size or path.suffix == ".lock", path


def test_a_script_that_ends_while_a_panel_trains_ends_in_good_order(text, tmp_path):
    """Torch in a thread that Python cuts off would abort the process; the run keeps its place."""
    folder = tmp_path / "runs"
    code = OPEN.format(text=text, folder=str(folder)) + (
        "panel.start()\nwhile panel.live.trainer is None or panel.live.trainer.step < 5: time.sleep(0.05)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "terminate" not in done.stderr, done.stderr
    assert list((folder / ".checkpoints").rglob("*.safetensors"))
