"""The panel for one's own text, without a browser."""

from __future__ import annotations

import datetime
import html
import re
import time
from pathlib import Path

import pytest

from tinylm import widgets
from tinylm.study import runs
from tinylm.study.planner import Speed
from tinylm.widgets import own_text, shared

PNG = b"\x89PNG\r\n\x1a\n"


def words(widget):
    return html.unescape(re.sub(r"<[^>]*>", " ", widget.value))


def until(holds, seconds=30.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture
def panel(tmp_path, monkeypatch):
    monkeypatch.setattr(own_text, "measure_speed", lambda *given: Speed((1e3, 1e6), (2e8, 2e8), 1))
    text = tmp_path / "mine.txt"
    text.write_text(Path(widgets.own_manual()).read_text()[:150_000])
    made = widgets.text_panel(text, tmp_path / "runs")
    made.vocab_size.value = 320
    assert made.wait(30)
    yield made
    made.close()
    assert made.wait(20)


def test_a_text_is_looked_at_and_a_plan_is_told(panel):
    assert bytes(panel.picture.value).startswith(PNG)
    assert "mine.txt" in words(panel.quality) and "LZMA packs it to" in words(panel.quality)
    assert "parameters" in words(panel.plan_words) and "tokens" in words(panel.plan_words)
    before = words(panel.plan_words)
    panel.minutes.value = 0.1
    assert words(panel.plan_words) != before
    panel.tokenizers = panel.tokenizers[:2]  # as of a text that supports no more
    panel.vocab_size.value = 2048
    assert "must support the vocabulary" in words(panel.plan_words) and panel.train_button.disabled
    panel.start()
    assert not panel.is_running


def test_a_model_is_trained_on_it_and_speaks(panel):
    panel.minutes.value = 0.1
    panel.train_button.click()
    assert panel.wait(60) and "bits/byte" in words(panel.status), words(panel.status)
    assert panel.voice.wait(30)
    assert words(panel.voice.text).strip().startswith(panel._opening())
    (label,) = runs.load_runs(panel.results_dir)["label"]
    assert label == "mine.txt"
    assert panel.model()[0].config.vocab_size == 320


def test_a_text_that_was_edited_can_be_trained_on_again(panel):
    panel.minutes.value = 0.1
    panel.start()
    assert panel.wait(60) and "bits/byte" in words(panel.status)
    (old,) = runs.load_runs(panel.results_dir)["run_id"]
    with open(panel.path.value, "a") as file:
        file.write("And a line more.\n")
    panel.look()
    assert panel.wait(30)
    panel.start()
    assert panel.wait(60) and "bits/byte" in words(panel.status), words(panel.status)
    folder = panel.live.folder.path
    assert folder != panel.results_dir and folder.name in words(panel.status)
    assert runs.load_runs(folder)["run_id"].tolist() != [old] == runs.load_runs(panel.results_dir)["run_id"].tolist()


def test_a_file_that_is_none_is_told_in_words(panel):
    panel.path.value = ""  # that is Python's own manual
    panel.look()
    assert panel.wait(30) and "python-manual" in words(panel.quality)
    panel.path.value = "/no/such/file.txt"
    panel.look_button.click()
    assert panel.wait(10) and "Way out" in words(panel.status)
    assert panel.train_button.disabled and not (
        words(panel.quality) + words(panel.plan_words)
    )  # nothing of the text before it


def test_an_upload_is_kept_and_looked_at(panel):
    content = Path(panel.path.value).read_bytes()[:100_000]
    name = "../my notes?.txt"
    panel.upload.value = ({"name": name, "type": "text/plain", "size": len(content), "content": memoryview(content),
                           "last_modified": datetime.datetime.now()},)  # fmt: skip
    kept = Path(panel.path.value)
    assert kept.name == "my_notes_.txt" and kept.parents[1].name == "uploads" and panel.wait(30)
    assert "my_notes_.txt" in words(panel.quality)
    # The same name with other content is another text: what was trained on the first stays true, and it can be trained on.
    panel.minutes.value = 0.1
    for added in (b"", b"And another line at the end.\n" * 50):
        panel.upload.value = ({"name": name, "type": "text/plain", "size": len(content + added),
                               "content": memoryview(content + added), "last_modified": datetime.datetime.now()},)  # fmt: skip
        assert panel.wait(30)
        panel.start()
        assert panel.wait(60) and "bits/byte" in words(panel.status), words(panel.status)
    assert kept.read_bytes() == content and Path(panel.path.value) != kept


def test_train_is_offered_only_where_a_plan_stands(panel):
    assert not panel.train_button.disabled
    panel.vocab_size.value = 2048
    panel.path.value = str(Path(panel.path.value).with_name("few.txt"))
    Path(panel.path.value).write_text("".join(f"{a} and {b} went home.\n" for a in range(40) for b in range(40)))
    panel.look()
    assert panel.wait(30) and "must support the vocabulary" in words(panel.plan_words)
    assert panel.train_button.disabled


def test_a_look_that_waits_for_another_training_can_be_stopped(panel):
    panel._speed = None
    with shared.MACHINE:
        panel.look()
        until(lambda: "waiting for another training" in words(panel.status))
        panel.stop_button.click()
        assert panel.wait(2) and words(panel.status).strip() == "stopped"
    assert panel.train_button.disabled and "press Look" in words(panel.plan_words)
    panel.look()
    assert panel.wait(30) and "The plan: " in words(panel.plan_words) and not panel.train_button.disabled


def test_stop_ends_the_look_or_the_training(panel):
    panel.minutes.value = 100
    panel.start()
    until(lambda: panel.live is not None and panel.live.trainer is not None)
    panel.stop_button.click()
    assert words(panel.status).strip() == "stopping …"
    assert panel.wait(10) and "stopped" in words(panel.status) and not panel.train_button.disabled
    assert not list(panel.results_dir.rglob("*.safetensors"))
