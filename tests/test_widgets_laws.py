"""The laws panel without a browser: what it reads, what the mistakes change, and the plan."""

from __future__ import annotations

import html
import re
import threading
import time

import numpy as np
import pandas as pd
import pytest

from tinylm import backend, widgets
from tinylm.errors import LabError
from tinylm.study import mistakes, runs
from tinylm.study.parameters import repository
from tinylm.widgets import laws, live, models

REFERENCE = repository() / "results" / "quickstart"
PNG = b"\x89PNG\r\n\x1a\n"


def words(widget):
    return html.unescape(re.sub(r"<[^>]*>", " ", widget.value))


def until(holds, seconds=30.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def panel():
    made = widgets.laws_panel(REFERENCE)
    until(lambda: made._drawer is None)
    yield made
    made.close()


def test_it_opens_with_a_picture_a_plan_and_the_doctors_words(panel):
    assert bytes(panel.picture.value).startswith(PNG) and "image/png" in panel._repr_mimebundle_()
    apart = int(panel.frame["family"].isin(["forecast", "promised", "batches"]).sum())
    assert apart and f"{len(panel.frame)} runs of quickstart, {apart} of which no fit sees" in words(panel.about)
    assert re.search(r"For [\d.]+\w? FLOPs: .+ parameters on .+ tokens", words(panel.plan)) and "Price: " in words(
        panel.plan
    )
    assert "L = E + A / N^alpha + B / D^beta" in words(panel.words)
    assert not any(toggle.disabled for toggle in panel.toggles.values())


def test_a_mistake_changes_figure_words_and_plan(panel):
    before = bytes(panel.picture.value), words(panel.words), panel.reading.a
    panel.toggles["one rate"].value = True
    until(lambda: panel._drawer is None and panel.reading.mistakes == ("one rate",))
    assert bytes(panel.picture.value) != before[0] and words(panel.words) != before[1]
    assert panel.reading.a == mistakes.read(panel.frame, ["one rate"]).a != before[2]
    assert "the mistakes cost" in words(panel.plan)
    panel.toggles["one rate"].value = False
    until(lambda: panel._drawer is None and panel.reading.mistakes == ())
    assert panel.reading.a == before[2]


def test_the_budget_moves_the_plan(panel):
    before = words(panel.plan)
    panel.budget.value = 10**panel.budget.max
    until(lambda: panel._drawer is None)
    assert words(panel.plan) != before and "far beyond the evidence" in words(panel.plan)


def test_a_table_of_other_names_is_read_and_told_what_it_lacks(panel, tmp_path):
    rows = [f"{n},{d},{2 + 30 / n**0.4 + 60 / d**0.4:.5f}" for n in (1e4, 3e4, 9e4) for d in (1e6, 3e6, 9e6)]
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(["size,length,loss", *rows]))
    with pytest.raises(LabError, match="params_total"):
        laws.load_runs(path)
    other = widgets.laws_panel(path, {"params": "size", "tokens": "length", "loss": "loss"})
    until(lambda: other._drawer is None)
    assert "9 rows" in words(other.about) and bytes(other.picture.value).startswith(PNG)
    assert all(toggle.disabled for toggle in other.toggles.values())
    assert "no curves, only final losses" in words(other.reasons)
    assert other.reading.fit.params["alpha"] == pytest.approx(0.4, abs=0.05)
    other.load("nothing of that name")
    assert "Way out" in words(other.status) and other.frame is not None  # what was there stays
    other.close()


def grid_of_runs(exponent=0.4):
    sizes, lengths = (1e4, 3e4, 9e4), (1e6, 3e6, 9e6)
    rows = [(n, d, 2 + 30 / n**exponent + 60 / d**exponent) for n in sizes for d in lengths]
    return pd.DataFrame(rows, columns=["params_total", "tokens_seen", "val_loss"])


def test_runs_of_different_numerics_are_told_as_studies_tell_them(panel):
    assert "revision" not in laws.load_runs(grid_of_runs())[1]
    frame = grid_of_runs().assign(numerics_revision=[1, 2, 2] * 3)
    told = runs.revisions_told(frame["numerics_revision"])
    assert told and told in laws.load_runs(frame)[1]
    renamed = frame.rename(columns={"params_total": "N", "val_loss": "L"})
    same, _ = laws.load_runs(renamed, {"params": "N", "loss": "L"})
    assert same.equals(frame)


def test_what_cannot_be_read_is_told_and_no_traceback(panel):
    for source in (pd.DataFrame({"N": [1.0]}), "~nobody of that name/runs.csv"):
        other = widgets.laws_panel(source)
        assert words(other.status).strip() and other.frame is None and not other.is_running
        other.close()


def test_a_study_that_cannot_be_read_is_passed_over_in_words(tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    (broken / "tables").mkdir(parents=True)
    (broken / "tables" / "law.json").write_text("{}")
    (broken / "runs").mkdir()
    (broken / "runs" / "0123456789abcdef.json").write_text("{")
    monkeypatch.setattr(laws, "study_folders", lambda study=None: [broken, REFERENCE])
    frame, told = laws.load_runs()
    assert "runs of quickstart" in told and "Passed over: broken" in told and len(frame) > 20
    monkeypatch.setattr(laws, "study_folders", lambda study=None: [broken])
    with pytest.raises(laws.NoRuns, match="broken"):
        laws.load_runs()


def test_other_runs_read_in_the_middle_of_a_reading_stand_alone(monkeypatch):
    read, hold, began = mistakes.read, threading.Event(), threading.Event()
    old = grid_of_runs(0.4).assign(learning_rate=1e-3, flops=lambda f: 7 * f["params_total"] * f["tokens_seen"])

    def slow(frame, chosen=(), **options):
        if chosen and not began.is_set():
            began.set()
            hold.wait(20)
        return read(frame, chosen, **options)

    made = widgets.laws_panel(old)
    until(lambda: made._drawer is None)
    monkeypatch.setattr(mistakes, "read", slow)
    made.toggles["6ND"].value = True
    assert began.wait(20)
    new = grid_of_runs(0.3).assign(learning_rate=1e-3, flops=lambda f: 7 * f["params_total"] * f["tokens_seen"])
    made.load(new)
    hold.set()
    until(lambda: made._drawer is None)
    assert made.frame.equals(new) and made.reading.mistakes == ("6ND",)
    assert np.array_equal(made.reading.points["val_loss"], mistakes.points_of(new)["val_loss"])
    assert made.reading.fit.params["alpha"] == pytest.approx(0.3, abs=0.05)
    made.close()


def test_columns_are_read_from_one_line():
    assert laws._columns_of("params=N, tokens = D ,loss=L") == {"params": "N", "tokens": "D", "loss": "L"}
    assert laws._columns_of("") is None


@pytest.mark.slow
def test_with_no_results_at_all_small_runs_are_trained_and_can_be_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "repository", lambda: tmp_path)
    monkeypatch.setattr(live, "repository", lambda: tmp_path)
    monkeypatch.setattr(laws, "SMALL_BUDGETS", (2e13, 6e13))  # each run of hours
    made = widgets.laws_panel()
    assert made.is_running
    until(lambda: "small ones are trained" in words(made.status) and made._live.trainer)
    made.stop_button.click()
    assert made.wait(10) and "stopped after 0" in words(made.status)
    monkeypatch.setattr(laws, "SMALL_BUDGETS", (2e8, 6e8))
    made.load()
    assert made.wait(60)
    until(lambda: made._drawer is None)
    assert made.frame is not None, words(made.status)
    assert "small runs on Python's own manual" in words(made.about) and bytes(made.picture.value).startswith(PNG)
    before = {path: path.read_bytes() for path in tmp_path.rglob("runs/*.json")}
    assert len(before) == len(made.frame)
    # After an update: another torch and another revision of the numerics compute otherwise, and the lab goes on.
    here = backend.machine()
    monkeypatch.setattr(backend, "NUMERICS_REVISION", backend.NUMERICS_REVISION + 1)
    monkeypatch.setattr(backend, "machine", lambda device="cpu": {**here, "torch": "99.0"})
    made.load()
    assert made.wait(60)
    until(lambda: made._drawer is None)
    assert set(made.frame["numerics_revision"]) == {backend.NUMERICS_REVISION}, words(made.status)
    after = {path: path.read_bytes() for path in tmp_path.rglob("runs/*.json")}
    assert before.items() <= after.items() and len(after) == 2 * len(before)
    made.close()
