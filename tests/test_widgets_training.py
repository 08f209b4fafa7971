"""The training panel without a browser: knobs that fit each other, costs before training, Pause, Resume and Stop."""

from __future__ import annotations

import html
import json
import re
import threading
import time

import pytest

from tinylm import counts, widgets
from tinylm.config import YOUNGER, ModelConfig, TrainConfig
from tinylm.study import runs
from tinylm.study.parameters import repository
from tinylm.study.planner import Evidence, Speed
from tinylm.widgets import training

PNG = b"\x89PNG\r\n\x1a\n"
LINES = [f"{a} {b} the {c}.\n" for a in ("one", "two", "six") for b in ("dogs", "cats", "cows") for c in ("sea", "sun")]


def words(widget):
    return html.unescape(re.sub(r"<[^>]*>", " ", widget.value))


def until(holds, seconds=20.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text("".join(LINES * 200))
    return str(path)


@pytest.fixture
def panel(text, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "evidence_for", lambda run: None)
    made = widgets.training_panel(text, tmp_path / "runs")
    small = {"hidden_size": 16, "num_layers": 1, "tokenizer": "byte", "max_seq_len": 32, "max_steps": 40}
    for name, value in {**small, "warmup_steps": 2, "eval_tokens": 4096, "batch_size": 4}.items():
        made.knobs[name].value = value
    until(lambda: made._drawer is None)
    yield made
    made.close()
    assert made.wait(10)


@pytest.fixture
def slow(panel, monkeypatch):
    """Steps of 20 ms and plenty of them, to catch a run in the act."""
    from tinylm import train

    step = train._step_together
    monkeypatch.setattr(train, "_step_together", lambda *given: (time.sleep(0.02), step(*given))[1])
    panel.knobs["max_steps"].value = 2000
    panel.knobs["checkpoint_minutes"].value = 0.0
    return panel


def test_every_hyperparameter_has_its_knob_at_a_value_that_stands(panel):
    run = panel.run
    assert set(ModelConfig.__dataclass_fields__) | set(TrainConfig.__dataclass_fields__) <= set(panel.knobs)
    assert (run.model.hidden_size, run.model.vocab_size, run.train.max_steps) == (16, 256, 40)
    assert run.train.learning_rate == float(f"{panel.knobs['learning_rate'].value:.4g}")


def test_costs_are_told_before_training_and_follow_the_knobs(panel):
    for change in ({}, {"hidden_size": 64}, {"mlp": "gelu"}, {"tie_embeddings": False}):
        for name, value in change.items():
            panel.knobs[name].value = value
        parts = counts.parameters(panel.run.model)
        assert f"{parts['total']:,} parameters" in words(panel.facts)
        assert f"mlp {parts['mlp']:,}" in words(panel.facts)
    assert re.search(r"about [\d.]+ (s|min|h)", words(panel.facts))
    before = words(panel.facts)
    panel.knobs["max_steps"].value = 4000
    assert words(panel.facts) != before and training.memory_estimate(panel.run.model, panel.run.train) > 0


def test_the_time_told_is_that_of_the_threads_and_batch_chosen(panel, monkeypatch):
    asked = []

    def measure(configs, seconds, threads, batch, train):
        asked.append((threads, batch, train.device))
        sizes = tuple(float(counts.parameters(config)["total"]) for config in configs)
        return Speed(sizes, (1e6 * batch * threads,) * len(sizes), threads)

    monkeypatch.setattr(training, "measure_speed", measure)
    panel._speeds.clear()
    told = {}
    for batch, threads in ((2, 1), (16, 1), (16, 2), (2, 1)):
        panel.knobs["batch_size"].value, panel.knobs["threads"].value = batch, threads
        until(lambda: panel._drawer is None)
        tokens = panel.run.train.max_steps * batch * panel.run.train.resolve(panel.run.model).seq_len
        seconds = panel._seconds(panel.run, tokens)
        per_token = counts.train_flops_per_token(panel.run.model, panel.run.train.resolve(panel.run.model).seq_len)
        assert seconds * 1e6 * batch * threads / per_token >= tokens
        told[batch, threads] = seconds / tokens
    assert told[2, 1] > told[16, 1] > told[16, 2]
    assert {(2, 1, "cpu"), (16, 1, "cpu"), (16, 2, "cpu")} == {(b, t, d) for t, b, d in asked}


def test_a_knob_moved_while_a_run_goes_on_gets_its_time_when_it_ends(slow):
    slow.start()
    until(lambda: slow.live.step > 1)
    slow.knobs["batch_size"].value = 8
    until(lambda: slow._drawer is None)
    assert "measuring how long" in words(slow.facts)
    slow.stop()
    assert slow.wait(5)
    until(lambda: "on this machine" in words(slow.facts))


def test_a_law_of_the_text_says_what_it_expects_and_of_what(panel, monkeypatch):
    law = json.loads((repository() / "results" / "quickstart" / "tables" / "law.json").read_text(encoding="utf-8"))
    evidence = Evidence.from_dict(law)
    monkeypatch.setattr(training, "evidence_for", lambda run: (evidence, "a study"))
    panel._law.clear()
    panel.knobs["max_steps"].value = 50
    until(lambda: panel._drawer is None)
    run = panel.run
    tokens = run.train.max_steps * run.train.windows_per_step * run.train.resolve(run.model).seq_len
    loss = evidence.surface.predict(counts.parameters(run.model)["total"], tokens)["loss"].iloc[0]
    assert re.search(rf"law of a study expects a loss of\s+{loss:.3f}", words(panel.facts))
    assert "its own recipe" in words(panel.facts) and "far beyond" not in words(panel.facts)
    panel.knobs["hidden_size"].value, panel.knobs["max_steps"].value = 512, 1e5
    assert "far beyond the evidence" in words(panel.facts)
    until(lambda: panel._drawer is None, 60)  # it measures so large a model


def test_impossible_combinations_cannot_be_set_and_say_why(panel):
    k = panel.knobs
    k["hidden_size"].value = 12
    assert set(k["num_heads"].options) == {1, 2, 3, 6}  # RoPE needs an even head, so 4 and 12 are out
    assert "num_heads is one of 1, 2, 3, 6" in words(panel.reasons)
    k["position"].value = "none"
    assert set(k["num_heads"].options) == {1, 2, 3, 4, 6, 12} and k["rope_theta"].disabled
    assert "only RoPE has a base" in words(panel.reasons)
    k["num_heads"].value = 4
    k["num_kv_heads"].value = 4
    k["num_heads"].value = 6
    assert k["num_kv_heads"].value in (3, 6)
    k["max_seq_len"].value = 16
    assert k["seq_len"].value == 16
    k["max_steps"].value = 10
    assert k["warmup_steps"].max == 9
    assert not k["decay_steps"].disabled or k["schedule"].value == "cosine"
    k["tokenizer"].value = "bpe"
    k["tokenizer"].value = "byte"
    assert k["vocab_size"].value == 256 and k["vocab_size"].disabled
    assert k["loss_scaling"].disabled and "only fp16 has" in words(panel.reasons)
    k["precision"].value = "fp16"
    k["loss_scaling"].value = False
    assert not k["loss_scaling"].disabled and not panel.run.train.loss_scaling
    k["precision"].value = "fp32"
    for hidden in k["hidden_size"].options:  # whatever one does, what stands can be trained
        k["hidden_size"].value = hidden
        for position in k["position"].options:
            k["position"].value = position
            assert panel.run.train.resolve(panel.run.model)


def test_a_run_is_trained_recorded_and_compared(panel):
    before = bytes(panel.picture.value)
    assert before.startswith(PNG)
    panel.train_button.click()
    assert panel.train_button.disabled and not panel.stop_button.disabled
    assert panel.wait(30)
    assert re.match(r"\s*done: val_loss [\d.]+ nats/token", words(panel.status)), words(panel.status)
    until(lambda: panel._drawer is None)
    assert bytes(panel.picture.value) != before
    frame = runs.load_runs(panel.results_dir)
    (record,) = panel.records()
    assert frame["run_id"].tolist() == [record["run_id"]] and frame["status"].tolist() == ["finished"]
    assert "step 40" in words(panel.samples) and record["run_id"] in words(panel.comparison)
    model, tokenizer = panel.model()
    assert model.config.hidden_size == 16 and tokenizer.vocab_size == 256
    # The same once more is not trained again; another one stands beside it, named by what differs.
    panel.start()
    assert panel.wait(30) and "trained before" in words(panel.status)
    panel.knobs["mlp"].value = "relu"
    panel.start()
    assert panel.wait(30)
    assert [label for label, _ in panel.compare.options] == ["mlp relu", "mlp swiglu"]
    other = {**record, "run_id": "other", "data": {**record["data"], "text": "/somewhere/verse.txt"}}
    assert training.labels_of([record, other]) == {record["run_id"]: "text lines.txt", "other": "text verse.txt"}
    older = {
        name: {field: v for field, v in record[name].items() if field not in YOUNGER} for name in ("model", "train")
    }
    older = {**other, **older, "run_id": "older"}  # as recorded before those fields were there
    for records in ([record, older], [older, record]):
        assert training.labels_of(records)["older"] == "text verse.txt"
    again = widgets.training_panel(panel.text, panel.results_dir)
    assert {record["run_id"] for record in again.records()} == {record["run_id"] for record in panel.records()}
    again.close()


def test_stop_is_acknowledged_at_once_and_nothing_is_left(slow):
    slow.start()
    until(lambda: "step " in words(slow.status))
    began = time.monotonic()
    slow.stop_button.click()
    assert words(slow.status).strip() == "stopping …" and time.monotonic() - began < 0.5
    assert slow.wait(5) and "stopped after step" in words(slow.status)
    assert not slow.train_button.disabled and slow.stop_button.disabled
    assert not list(slow.results_dir.rglob("*.safetensors")) and not list((slow.results_dir / "runs").glob("*"))


def test_pause_and_resume_go_on_where_it_stood(slow, monkeypatch):
    slow.knobs["max_steps"].value = 60
    slow.start()
    until(lambda: slow.live.trainer is not None and slow.live.trainer.step > 3)
    slow.pause_button.click()
    assert slow.wait(5) and re.search(r"paused after step \d+ of 60", words(slow.status))
    at = slow.live.trainer.step
    assert 3 < at < 60 and not slow.resume_button.disabled and slow.train_button.disabled
    slow.start()
    assert not slow.is_running  # a paused run keeps its place
    slow.resume_button.click()
    assert slow.wait(30) and "val_loss" in words(slow.status)
    assert slow.records()[0]["steps"] == 60 and [p["step"] for p in slow.records()[0]["curve"]][-1] == 60


def test_a_paused_run_can_be_given_up(slow):
    slow.start()
    until(lambda: slow.live.trainer is not None and slow.live.trainer.step > 1)
    slow.pause()
    assert slow.wait(5)
    slow.stop_button.click()
    assert "given up" in words(slow.status) and not slow.train_button.disabled
    assert not list(slow.results_dir.rglob("*.safetensors"))


def test_a_pause_at_once_keeps_the_place_too(slow):
    slow.knobs["max_steps"].value = 60
    with training.MACHINE:  # another training is going on: this one has not begun
        slow.start()
        slow.pause()
        assert slow.wait(5) and "paused after step 0" in words(slow.status) and not slow.resume_button.disabled
    slow.resume()
    until(lambda: slow.live.step > 3)
    slow.pause()
    assert slow.wait(5)
    at = slow.live.step
    with training.MACHINE:
        slow.resume()
        slow.pause()  # before it goes on
        assert slow.wait(5) and f"paused after step {at}" in words(slow.status)
    assert list(slow.results_dir.rglob("*.safetensors")), "what had been learned was thrown away"
    slow.resume()
    assert slow.wait(30) and "val_loss" in words(slow.status)
    slow.knobs["seed"].value = 1
    with training.MACHINE:
        slow.start()
        slow.pause()
        assert slow.wait(5)
    slow.stop()  # a run that never began is given up
    assert "given up after step 0" in words(slow.status) and not slow.train_button.disabled


@pytest.mark.parametrize("is_paused", [True, False], ids=["paused", "running"])
def test_the_cell_run_again_ends_a_run_and_keeps_what_it_learned(slow, is_paused):
    slow.knobs["max_steps"].value = 60
    slow.start()
    until(lambda: slow.live.step > 3)
    if is_paused:
        slow.pause()
        assert slow.wait(5)
    slow.close()
    assert slow.wait(5)
    at = slow.live.step
    again = training.LiveRun(slow.live.run, slow.results_dir)  # the same settings, trained again
    steps = []
    again.train(lambda: bool(steps.append(again.step)), lambda _: None, lambda: steps.append(again.step))
    assert again.record["status"] == "finished"
    assert min(step for step in steps if step) >= at > 3


def test_an_error_is_told_in_words(panel, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(training.LiveRun, "train", lambda *given: 1 / 0)
        panel.start()
        assert panel.wait(5) and words(panel.status).strip() == "ZeroDivisionError: division by zero"
    assert not panel.train_button.disabled
    missing = widgets.training_panel("no such file.txt", panel.results_dir)
    missing.start()
    assert missing.wait(5) and "Way out" in words(missing.status)
    missing.close()


def test_a_second_press_or_panel_makes_no_second_trainer(slow):
    slow.start()
    until(lambda: slow.live.trainer is not None)
    live, count = slow.live, threading.active_count()
    slow.start()
    assert slow.live is live and threading.active_count() <= count
    again = widgets.training_panel(slow.text, slow.results_dir)  # the cell run again
    assert slow.wait(5)
    again.close()
