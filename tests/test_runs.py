"""Runs: identity, records that cannot be half believed, and results folders that keep to one machine and one text."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time

import pytest

from tinylm import backend, train
from tinylm.checkpoint import load_model
from tinylm.config import YOUNGER, DataConfig, ModelConfig, TrainConfig
from tinylm.errors import ConfigError, DamagedFileError, LabError, TextError
from tinylm.study import runs as engine
from tinylm.study.parameters import repository
from tinylm.study.runs import COLUMNS, Folder, Run, identity, load_runs, read_record, train_run, write_record
from tinylm.study.sweep import sweep
from tinylm.train import evaluate

CORPUS = {"text": "a", "text_sha256": "1", "tokenizer_sha256": "2", "split": "90/5/5"}
STACK = {"torch": "2", "cpu": "x", "platform": "y"}
ARITHMETIC = {"device": "cpu", "precision": "fp32", "compile": False, "query_blocks": 1, "threads": 1}
ARITHMETIC |= {"stacked": False, "machine": STACK}
TIMES = ("started", "finished", "seconds", "tokens_per_second", "checksum")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(200)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(" ".join(rng.choices(words, k=8)) for _ in range(1500)))
    return path


def a_run(text="a.txt", tags=None, **changes):
    model = {"vocab_size": 256, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "max_seq_len": 16}
    training = {
        "max_steps": 12,
        "warmup_steps": 2,
        "batch_size": 4,
        "eval_interval": 4,
        "eval_tokens": 512,
        "threads": 1,
    }
    for name, value in changes.items():
        (model if name in ModelConfig.__dataclass_fields__ else training)[name] = value
    data = DataConfig(text=str(text), tokenizer="byte")
    return Run(ModelConfig(**model), TrainConfig(**training), data, tags or {})


def timeless(record):
    curve = [{**point, "seconds": None} for point in record["curve"]]
    return {**{name: value for name, value in record.items() if name not in TIMES}, "curve": curve}


def test_identity_holds_what_decides_the_numbers():
    base = identity(a_run(), CORPUS, ARITHMETIC)
    assert len(base) == 64 and base == identity(a_run(), CORPUS, ARITHMETIC)
    for changes in (
        {"hidden_size": 16},
        {"norm": "layernorm"},
        {"learning_rate": 1e-3},
        {"seed": 1},
        {"max_steps": 13},
    ):
        assert identity(a_run(**changes), CORPUS, ARITHMETIC) != base, changes
    assert identity(a_run(), {**CORPUS, "text_sha256": "3"}, ARITHMETIC) != base
    assert identity(a_run(), {**CORPUS, "tokenizer_sha256": "3"}, ARITHMETIC) != base
    assert identity(a_run(), CORPUS, {**ARITHMETIC, "threads": 2}) != base
    assert identity(a_run(), CORPUS, {**ARITHMETIC, "machine": {**STACK, "torch": "3"}}) != base
    assert identity(a_run(), CORPUS, ARITHMETIC, revision=backend.NUMERICS_REVISION + 1) != base


def test_identity_leaves_out_what_changes_no_number():
    base = identity(a_run(), CORPUS, ARITHMETIC)
    same = [
        a_run(tags={"family": "b"}),
        a_run(text="other/name.txt"),
        a_run(checkpoint_minutes=7.0),
        a_run(num_kv_heads=2, seq_len=16, stride=8),  # what None stands for here
    ]
    assert {identity(run, CORPUS, ARITHMETIC) for run in same} == {base}
    assert identity(a_run(), {**CORPUS, "text": "another name"}, ARITHMETIC) == base


@pytest.mark.parametrize("study", ["model_scaling", "compute_scaling"])
def test_records_from_before_a_field_of_a_config_are_still_theirs(study):
    """The committed records were written when configs had fewer fields: each is still found under its name, and read."""
    folder = repository() / "results" / study
    paths = sorted((folder / "runs").glob("*.json"))[:5]
    assert paths
    for path in paths:
        record = read_record(path)
        assert not set(YOUNGER) & {*record["model"], *record["train"]}
        run = Run.from_dict(record)
        assert (
            identity(run, record["corpus"]["identity"], record["arithmetic"], record["numerics_revision"])
            == (record["identity"])
        )
    usual = {**ModelConfig().to_dict(), **TrainConfig().to_dict()}
    table = load_runs(folder)
    for name in YOUNGER:  # and away from its default such a field tells runs apart
        assert (table[name] == usual[name]).all()
        assert identity(a_run(**{name: not usual[name]}), CORPUS, ARITHMETIC) != identity(a_run(), CORPUS, ARITHMETIC)


def test_tags_may_not_pose_as_columns():
    with pytest.raises(ConfigError, match="tag"):
        a_run(tags={"val_loss": 1})
    with pytest.raises(ConfigError, match="tag"):
        a_run(tags={"grid": [1, 2]})


def test_a_run_goes_through_a_dict():
    run = a_run(tags={"family": "b"}, norm="layernorm")
    assert Run.from_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_a_record_is_believed_whole_or_not_at_all(tmp_path):
    record = {"run_id": "ab", "status": "diverged", "val_loss": float("nan"), "curve": [{"step": 1, "val_loss": 2.5}]}
    path = write_record(tmp_path, record)
    assert read_record(path)["val_loss"] is None and read_record(path)["curve"] == record["curve"]
    good = path.read_bytes()
    whole = read_record(path)
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        place = rng.randrange(len(good))
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << rng.randrange(8)]) + good[place + 1 :])
        try:
            assert read_record(path) == whole  # a flip that changes no meaning, such as in white space
        except DamagedFileError as error:
            assert "ab.json" in str(error) and "delete" in str(error)
            refused += 1
    assert refused > 290
    for length in range(0, len(good) - 2, 7):
        path.write_bytes(good[:length])
        with pytest.raises(DamagedFileError):
            read_record(path)
    path.write_bytes(good)
    renamed = path.rename(tmp_path / "cd.json")
    with pytest.raises(DamagedFileError, match="run ab"):
        read_record(renamed)


def test_a_record_of_another_schema_is_refused_in_words(tmp_path):
    path = write_record(tmp_path, {"run_id": "ab"})
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(engine.OtherSchemaError, match="schema 2") as caught:
        read_record(path)
    assert "the version of tinylm that wrote it" in caught.value.fix
    with pytest.warns(UserWarning, match="schema 2"):
        assert load_runs(tmp_path, on_damage="skip").empty


def test_train_run_records_itself_and_is_not_trained_twice(text, tmp_path):
    run = a_run(text, tags={"family": "b"})
    record = train_run(run, tmp_path, keep_model=True)
    path = tmp_path / "runs" / f"{record['run_id']}.json"
    written = path.stat().st_mtime_ns
    assert read_record(path) == {"schema": 1, "kind": "run", **record, "checksum": read_record(path)["checksum"]}
    assert record["status"] == "finished" and record["steps"] == 12 and record["tokens_seen"] == 12 * 4 * 16
    assert record["flops"] == run.flops and record["parameters"]["total"] > 0
    assert record["identity"].startswith(record["run_id"])
    assert [point["step"] for point in record["curve"]] == [4, 8, 12]
    for name in ("model", "train", "data", "corpus", "arithmetic", "packages", "threads", "device", "started", "tags"):
        assert record[name], name
    again = train_run(run, tmp_path)
    assert timeless(again).items() >= timeless(record).items() and path.stat().st_mtime_ns == written
    assert not (tmp_path / ".checkpoints" / record["run_id"]).exists()

    model, tokenizer, about = load_model(tmp_path / record["model_file"])
    assert about["run_id"] == record["run_id"] and tokenizer.decode(tokenizer.encode("abc")) == "abc"
    corpus = engine.prepare_corpus(run)
    assert evaluate(model, corpus.val, 16, 512)["val_loss"] == pytest.approx(record["val_loss"], abs=1e-6)


def test_an_interrupted_run_goes_on_bit_for_bit(text, tmp_path):
    run = a_run(text, max_steps=400, eval_interval=20, dropout=0.1)
    whole = train_run(run, tmp_path / "whole")
    folder = Folder(tmp_path / "parts")
    stopped = {}
    worker = threading.Thread(target=lambda: stopped.update(train_run(run, folder.path)))
    worker.start()
    while folder.progress(whole["run_id"])[0] < 100 and worker.is_alive():
        time.sleep(0.002)
    engine.stop_training()
    worker.join()
    engine.allow_training()
    assert stopped["status"] == "stopped" and 100 <= stopped["steps"] < 400
    assert folder.record(whole["run_id"]) is None
    resumed = train_run(run, folder.path)
    assert timeless(resumed) == timeless(whole)


def test_what_a_writer_left_who_was_killed_behind_its_record_goes(text, tmp_path):
    record = train_run(a_run(text), tmp_path)
    folder, other = Folder(tmp_path), tmp_path / ".checkpoints" / "0123456789abcdef"
    for again in (folder.tidy, lambda: train_run(a_run(text), tmp_path)):
        left = tmp_path / ".checkpoints" / record["run_id"]
        for place in (left, other):
            place.mkdir(parents=True, exist_ok=True)
            (place / train.CHECKPOINT_NAME).write_bytes(b"x")
        folder.note_progress(record["run_id"], 1, 1.0)
        again()
        assert not list((tmp_path / ".checkpoints").glob(f"{record['run_id']}*"))
        assert (other / train.CHECKPOINT_NAME).exists()  # of a run that has no record


@pytest.mark.skipif(engine.fcntl is None, reason="no locks")
def test_a_sweep_that_ends_leaves_another_its_lock(tmp_path):
    entered = []

    def wait():
        with Folder(tmp_path).locked("folder"):
            entered.append(time.monotonic())

    with Folder(tmp_path).locked("folder"):
        Folder(tmp_path).tidy()
        third = threading.Thread(target=wait)
        third.start()
        time.sleep(0.3)
        assert not entered
    third.join()
    assert entered
    Folder(tmp_path).tidy()
    assert not (tmp_path / ".checkpoints").exists()


def test_a_damaged_checkpoint_starts_the_run_again(text, tmp_path):
    run = a_run(text)
    whole = train_run(run, tmp_path / "whole")
    checkpoint = tmp_path / "parts" / ".checkpoints" / whole["run_id"] / train.CHECKPOINT_NAME
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"torn")
    with pytest.warns(UserWarning, match="starts again"):
        assert timeless(train_run(run, tmp_path / "parts")) == timeless(whole)


def test_a_diverged_run_is_a_result_with_its_reason(text, tmp_path):
    run = a_run(text, learning_rate=1e20, max_steps=50)
    record = train_run(run, tmp_path)
    assert record["status"] == "diverged" and record["reason"] and record["val_loss"] is None
    assert record["flops"] == run.flops * record["steps"] // 50
    assert train_run(run, tmp_path)["finished"] == record["finished"]
    frame = load_runs(tmp_path)
    assert frame.status.item() == "diverged" and frame.val_loss.isna().item() and frame.val_loss.dtype == "float64"


def test_a_failed_run_is_recorded_and_tried_again(text, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "_batches", lambda self: 1 / 0)
        record = train_run(a_run(text), tmp_path)
    assert record["status"] == "failed" and "ZeroDivisionError" in record["reason"]
    assert load_runs(tmp_path).status.tolist() == ["failed"]
    assert train_run(a_run(text), tmp_path)["status"] == "finished"
    assert not list((tmp_path / ".checkpoints").glob(f"{record['run_id']}*"))


def test_a_run_that_fails_late_goes_on_from_its_checkpoint(text, tmp_path, monkeypatch):
    run, steps = a_run(text, checkpoint_minutes=1e-6), []
    real = train.Trainer._batches

    def batches(self):
        steps.append(self.step)
        return real(self) if self.step < 9 else 1 / 0

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "_batches", batches)
        assert train_run(run, tmp_path / "late")["status"] == "failed"
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "_batches", lambda self: steps.append(self.step) or real(self))
        record = train_run(run, tmp_path / "late")
    assert steps == [*range(10), 9, 10, 11]
    assert timeless(record) == timeless(train_run(run, tmp_path / "calm"))
    assert not list((tmp_path / "late" / ".checkpoints").glob(f"{record['run_id']}*"))


def test_errors_a_person_can_mend_are_raised_and_not_recorded(text, tmp_path):
    with pytest.raises(LabError):
        train_run(a_run(tmp_path / "nothing.txt"), tmp_path / "results")
    with pytest.raises(TextError):
        train_run(a_run(text, max_seq_len=100_000, batch_size=1), tmp_path / "results")
    assert not list((tmp_path / "results").glob("runs/*.json"))


def test_a_folder_keeps_to_one_machine_but_is_read_on_any(text, tmp_path, monkeypatch):
    record = train_run(a_run(text), tmp_path)
    train_run(a_run(text, precision="bf16"), tmp_path)  # another arithmetic of the same machine is welcome
    here = backend.machine()
    monkeypatch.setattr(backend, "machine", lambda device="cpu": {**here, "cpu": "another processor"})
    assert train_run(a_run(text), tmp_path)["finished"] == record["finished"]
    with pytest.raises(LabError, match="another processor") as caught:
        train_run(a_run(text, seed=1), tmp_path)
    assert "results_dir" in caught.value.fix
    assert train_run(a_run(text), tmp_path / "own")["run_id"] != record["run_id"]


def test_a_folder_keeps_to_one_numerics_revision(text, tmp_path, monkeypatch):
    record = train_run(a_run(text), tmp_path)
    monkeypatch.setattr(backend, "NUMERICS_REVISION", backend.NUMERICS_REVISION + 1)
    assert train_run(a_run(text), tmp_path)["finished"] == record["finished"]
    with pytest.raises(LabError, match="numerics revision"):
        train_run(a_run(text, seed=1), tmp_path)


def test_runs_of_another_numerics_revision_are_shown_as_such(text, tmp_path, monkeypatch, capsys):
    old = train_run(a_run(text), tmp_path / "old")
    assert set(load_runs(tmp_path / "old").numerics_revision) == {backend.NUMERICS_REVISION}  # and no warning
    monkeypatch.setattr(backend, "NUMERICS_REVISION", backend.NUMERICS_REVISION + 1)
    with pytest.warns(UserWarning, match=f"1 of revision {backend.NUMERICS_REVISION - 1}; this version trains"):
        assert load_runs(tmp_path / "old").numerics_revision.tolist() == [backend.NUMERICS_REVISION - 1]
    sweep([a_run(text)], tmp_path / "old", workers=1)  # redraws what is there, and says what it is
    assert f"1 of revision {backend.NUMERICS_REVISION - 1}; this version trains" in capsys.readouterr().out
    new = train_run(a_run(text), tmp_path / "new")
    assert new["run_id"] != old["run_id"]
    write_record(tmp_path / "new", old)  # copied by hand
    with pytest.warns(UserWarning, match="do not fit them together"):
        frame = load_runs(tmp_path / "new").set_index("run_id")
    assert frame.numerics_revision[old["run_id"]] == frame.numerics_revision[new["run_id"]] - 1


def test_records_are_found_without_the_text_and_never_under_another(text, tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text(text.read_text())
    run, other = a_run(mine), a_run(mine, seed=1)
    record = train_run(run, tmp_path / "results")
    folder = Folder(tmp_path / "results")
    folder.check_own_text(run)
    mine.write_text(text.read_text()[::-1])
    with pytest.raises(TextError, match="changed"):
        folder.check_own_text(run)
    with pytest.raises(TextError, match="changed"):
        train_run(other, tmp_path / "results")
    mine.unlink()
    folder.check_own_text(run)
    assert train_run(run, tmp_path / "results")["finished"] == record["finished"]


def test_what_runs_share_is_put_together_again_from_the_records(text, tmp_path):
    run = a_run(text)
    record = train_run(run, tmp_path)
    before = [json.loads((tmp_path / f"{kind}.json").read_text()) for kind in ("arithmetic", "corpora")]
    (tmp_path / "arithmetic.json").write_text("{")
    with pytest.raises(DamagedFileError, match="put together again"):
        train_run(run, tmp_path)
    for kind in ("arithmetic", "corpora"):
        (tmp_path / f"{kind}.json").unlink()
    assert train_run(run, tmp_path)["finished"] == record["finished"]
    train_run(a_run(text, seed=1, threads=2), tmp_path)
    after = [json.loads((tmp_path / f"{kind}.json").read_text()) for kind in ("arithmetic", "corpora")]
    assert after[0]["resolved"][0] == before[0]["resolved"][0] and len(after[0]["resolved"]) == 2
    assert after[1] == before[1]


def test_one_run_asked_for_twice_at_once_is_trained_once(text, tmp_path, monkeypatch):
    began = []
    together = train.train_together
    monkeypatch.setattr(train, "train_together", lambda *a, **k: began.append(1) or together(*a, **k))
    monkeypatch.setattr(engine, "_one_at_a_time", contextlib.nullcontext())
    found = []
    both = [threading.Thread(target=lambda: found.append(train_run(a_run(text), tmp_path))) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(began) == 1 and found[0]["finished"] == found[1]["finished"]


def test_load_runs_is_one_table(text, tmp_path):
    with pytest.raises(LabError, match="exist"):
        load_runs(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert list(load_runs(tmp_path / "empty").columns) == list(COLUMNS)
    for seed in (0, 1):
        train_run(a_run(text, seed=seed, tags={"family": "b"}), tmp_path)
    frame = load_runs(tmp_path)
    assert sorted(frame.seed) == [0, 1] and set(frame.family) == {"b"} and len(set(frame.run_id)) == 2
    row = frame.iloc[0]
    assert row.flops_6nd == 6 * row.params_total * row.tokens_seen
    assert row.params_total == row.params_embedding + row.params_non_embedding
    assert row.threads == 1 and row.tokenizer == "byte" and row.hidden_size == 8
    for seed, budget in (
        (2, 1e6),
        (3, "large"),
        (4, None),
    ):  # a tag of two kinds is text, so that columns have one type
        train_run(a_run(text, seed=seed, tags={"budget": budget}), tmp_path)
    frame = load_runs(tmp_path).set_index("seed")
    assert frame.budget[2] == "1000000.0" and frame.budget[3] == "large" and frame.budget[[0, 4]].isna().all()
    victim = next((tmp_path / "runs").glob("*.json"))
    victim.write_text(victim.read_text()[:-20])
    with pytest.raises(DamagedFileError, match=victim.name):
        load_runs(tmp_path)
    with pytest.warns(UserWarning, match=victim.name):
        assert len(load_runs(tmp_path, on_damage="skip")) == 4


def test_load_runs_opens_in_polars(text, tmp_path):
    polars = pytest.importorskip("polars")
    pytest.importorskip("pyarrow")
    for seed, budget in ((0, 1), (1, "large"), (2, None)):
        train_run(a_run(text, seed=seed, learning_rate=0.01 * (1 + seed), tags={"budget": budget}), tmp_path)
    frame = load_runs(tmp_path)
    found = polars.from_pandas(frame)
    assert found.shape == frame.shape and found["val_loss"].to_list() == pytest.approx(frame.val_loss.tolist())
