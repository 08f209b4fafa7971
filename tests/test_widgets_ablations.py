"""Variants side by side, without a browser, and what they are worth in compute."""

from __future__ import annotations

import html
import re
import time
from pathlib import Path

import pandas as pd
import pytest

from tinylm import widgets
from tinylm.study import runs
from tinylm.widgets import ablations
from tinylm.widgets.ablations import VARIANTS

PNG = b"\x89PNG\r\n\x1a\n"


def words(widget):
    return html.unescape(re.sub(r"<[^>]*>", " ", widget.value))


@pytest.fixture
def panel(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(Path(widgets.own_manual()).read_text()[:150_000])
    made = widgets.ablations_panel(text, tmp_path / "runs")
    made.tokens.value = 1e4
    yield made
    made.close()
    assert made.wait(20)


def test_runs_differ_in_one_line_and_nothing_else(panel):
    base = panel.runs["the recipe"]
    panel.chosen.value = [name for name in VARIANTS][:4]
    for name, run in panel.runs.items():
        assert run.train == base.train and run.data == base.data
        assert run.model == base.model.replace(**VARIANTS[name])


def test_too_few_or_too_many_cannot_be_trained_and_it_says_why(panel):
    panel.chosen.value = ["no positions"]
    assert panel.train_button.disabled and "two to four" in words(panel.status)
    panel.start()
    assert not panel.is_running
    panel.chosen.value = list(VARIANTS)
    assert len(panel.chosen.value) == 4 and "At most 4" in words(panel.status) and not panel.train_button.disabled


def test_variants_are_trained_recorded_and_speak_side_by_side(panel):
    before = bytes(panel.picture.value)
    assert before.startswith(PNG) and panel.speak_button.disabled
    panel.train_button.click()
    assert panel.wait(60) and words(panel.status).startswith(" done:"), words(panel.status)
    end = time.monotonic() + 10
    while panel._drawer is not None and time.monotonic() < end:
        time.sleep(0.02)
    assert bytes(panel.picture.value) != before
    frame = runs.load_runs(panel.results_dir)
    assert sorted(frame["label"]) == ["no positions", "the recipe"] and frame["val_loss"].notna().all()
    assert panel.text.value.count("tinylm-text") == 2 and "no positions" in words(panel.text)
    first = words(panel.text)
    panel.speak_button.click()
    assert panel.wait(20) and words(panel.text) == first  # the same seed, the same words
    panel.seed.value = 1
    panel.speak()
    assert panel.wait(20) and words(panel.text) != first


def test_stop_ends_a_training(panel):
    panel.tokens.value = 1e7
    panel.start()
    end = time.monotonic() + 20
    while not any(live.trainer for live in panel.lives.values()):
        assert time.monotonic() < end
        time.sleep(0.01)
    panel.stop_button.click()
    assert words(panel.status).strip() == "stopping …"
    assert panel.wait(10) and "stopped while training the recipe" in words(panel.status)
    assert not list(panel.results_dir.rglob("*.safetensors"))


def test_what_studies_measured_stands_beside_it(panel, tmp_path, monkeypatch):
    assert "fixed init" in words(panel.known) or "compute multiplier" in words(panel.known)
    tables = tmp_path / "ablations" / "tables"
    monkeypatch.setattr(ablations, "study_folders", lambda: [tables.parent])
    assert "No study" in re.sub(r"<[^>]*>", " ", ablations._known_variants([]))
    tables.mkdir(parents=True)
    row = {"place": "small", "variant": "relu", "difference": 0.02, "reads": "0.91", "multiplier_low": 0.85,
           "multiplier_high": 0.97, "seeds": 5, "verdict": "worse"}  # fmt: skip
    pd.DataFrame([row, {**row, "variant": "mqa as used", "reads": "1.10"}]).to_csv(tables / "multipliers.csv")
    told = re.sub(r"<[^>]*>", " ", ablations._known_variants([]))
    assert "relu" in told and "+0.020" in told and "0.91 [0.85, 0.97]" in told
    # Those that are picked stand first, the others are folded away.
    for picked, first, folded in (
        ("ReLU instead of SwiGLU", "relu", "mqa"),
        ("one key-value head for all", "mqa", "relu"),
    ):
        shown, _, hidden = ablations._known_variants(["the recipe", picked]).partition("<details")
        assert first in shown and folded not in shown and folded in hidden and first not in hidden
    panel.chosen.value = ("ReLU instead of SwiGLU", "the recipe")
    assert "relu" in panel.known.value.partition("<details")[0]
    assert "none of those picked" in ablations._known_variants(["no position code"])
    assert "none of those picked" not in ablations._known_variants([])
    # Where a study compared losses alone, its own names are those of the lab.
    (tables / "variants.csv").write_text(
        "variant,loss,difference,seeds,verdict\nfixed init,3.9,0.08,3,worse\nwarm,3.8,0,3,-\n"
    )
    (tables / "multipliers.csv").unlink()
    shown, _, hidden = ablations._known_variants(["the recipe", "fixed init"]).partition("<details")
    assert "fixed init" in shown and "warm" in hidden and "none of those picked" not in hidden
    (tables / "variants.csv").unlink()
    (tables / "multipliers.csv").write_text("not,a table\n1,2\n")
    assert "No study" in re.sub(r"<[^>]*>", " ", ablations._known_variants([]))
