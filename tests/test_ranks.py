"""Several processes train one run: the losses of one to rounding, one writer, and an end for all where one of them ends."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from tinylm.checkpoint import load_state
from tinylm.config import DataConfig, ModelConfig, TrainConfig
from tinylm.errors import ConfigError, LabError
from tinylm.ranks import ALONE, LostProcess, Ranks, joined
from tinylm.study import runs
from tinylm.study.runs import read_record
from tinylm.train import CHECKPOINT_NAME, Trainer

MODEL = ModelConfig(vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, max_seq_len=16, init="scaled")
TRAIN = TrainConfig(
    batch_size=3, grad_accum=2, max_steps=40, warmup_steps=4, learning_rate=0.02, eval_interval=8, eval_tokens=2048,
    grad_clip=0.5, threads=1, checkpoint_minutes=0,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 64, 6000) // np.arange(1, 6001).clip(max=3)
SIZES = torch.arange(64).numpy() % 3 + 1


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(200)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(" ".join(rng.choices(words, k=8)) for _ in range(1500)))
    return path


def threads_that_talk(size):
    """Ranks that are threads of this process."""
    barrier, slots = threading.Barrier(size, timeout=60), [None] * size

    class Talking(Ranks):
        def all_of(self, tensor):
            slots[self.rank] = tensor.clone()
            barrier.wait()
            found = list(slots)
            barrier.wait()
            return found

        def sum(self, tensor):
            return tensor.copy_(sum(self.all_of(tensor)))

        def copy_from_first(self, tensor):
            return tensor.copy_(self.all_of(tensor)[0])

    return [Talking(rank, size, rank, size) for rank in range(size)]


def trained(size, config=TRAIN, folder=None, before=lambda trainer: None):
    """The Trainers of so many ranks, trained to their end, and their results."""

    def work(ranks):
        told = []
        trainer = Trainer(
            MODEL, config, TOKENS, TOKENS[::-1].copy(), SIZES, checkpoint_dir=folder, on_eval=told.append, ranks=ranks
        )
        before(trainer)
        result = trainer.run()
        assert told == (result.curve[-len(told) :] if ranks.rank == 0 else [])
        return trainer, result

    if size == 1:
        return [work(ALONE)]
    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(work, ranks) for ranks in threads_that_talk(size)]]


def losses(result):
    names = ("step", "tokens", "train_loss", "val_loss", "val_bpb", "scored_tokens", "learning_rate")
    return np.array([[point[name] for name in names] for point in result.curve])


def test_windows_are_shared_out_whole_and_evenly():
    for size in (1, 2, 3, 5):
        for count in (1, 5, 12):
            windows = np.arange(count)
            parts = [Ranks(rank, size).slice_of(windows) for rank in range(size)]
            assert np.concatenate(parts).tolist() == windows.tolist()
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_processes_share_a_machines_threads_and_take_a_gpu_each():
    arithmetic = {"device": "cuda:0", "threads": 8, "precision": "bf16"}
    assert Ranks(5, 6, 1, 3).own(arithmetic) == {"device": "cuda:1", "threads": 2, "precision": "bf16"}
    assert Ranks(1, 2, 1, 2).own({"device": "cpu", "threads": 1}) == {"device": "cpu", "threads": 1}
    assert ALONE.own({"device": "cuda:3", "threads": 4}) == {"device": "cuda:3", "threads": 4}


def test_a_process_that_torchrun_did_not_start_is_alone(monkeypatch):
    with joined("cpu") as ranks:
        assert ranks is ALONE
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with joined("cpu") as ranks:
        assert ranks is ALONE and ranks.tell({"a": 1}) == {"a": 1}


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="GPUs are there")
def test_more_processes_than_gpus_are_told_before_they_meet(monkeypatch):
    told = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LabError, match=r"for 2 processes on a machine with \d.*device='cpu'"), joined("cuda"):
        pass


def test_what_the_first_tells_reaches_all():
    values = [None, {"text": "ü", "list": [1, 2.5, None]}, "x" * 5000]
    with ThreadPoolExecutor(3) as pool:
        for value in values:
            said = [pool.submit(ranks.tell, value if ranks.rank == 0 else None) for ranks in threads_that_talk(3)]
            assert [future.result() for future in said] == [value] * 3


def test_a_lost_process_is_told_in_words(monkeypatch):
    def lost(tensor):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:4\nmore")

    monkeypatch.setattr(torch.distributed, "all_reduce", lost)
    words = r"process 1 of 2 has lost the others \(Connection closed by peer \[127.0.0.1\]:4\)"
    with pytest.raises(LabError, match=words):
        Ranks(1, 2).sum(torch.zeros(1))


def test_a_process_that_is_lost_at_the_start_costs_no_checkpoint(text, tmp_path, monkeypatch):
    run = runs.Run(MODEL.replace(vocab_size=256), TRAIN, DataConfig(text=str(text), tokenizer="byte"))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_after_step", lambda self: self.request_stop())
        with pytest.raises(KeyboardInterrupt):
            runs.train_run(run, tmp_path)
    (checkpoint,) = tmp_path.glob(f".checkpoints/*/{CHECKPOINT_NAME}")
    kept = checkpoint.read_bytes()

    def lost(tensor, source):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(Ranks, "tell", lambda self, value=None: value)  # it goes at the next thing that is said
    monkeypatch.setattr(torch.distributed, "broadcast", lost)
    with pytest.raises(LostProcess):
        runs.train_run(run, tmp_path, ranks=Ranks(0, 2))
    assert checkpoint.read_bytes() == kept


def test_who_fails_ends_all_in_words_and_keeps_nobody_waiting(text, tmp_path, monkeypatch):
    """The others may be in the middle of a step, where what the first would tell them is not understood."""
    run = runs.Run(MODEL.replace(vocab_size=256), TRAIN, DataConfig(text=str(text), tokenizer="byte"))
    told = []

    def fail(trainers, **_):
        raise RuntimeError("no memory")

    monkeypatch.setattr("tinylm.train.train_together", fail)
    monkeypatch.setattr(Ranks, "tell", lambda self, value=None: told.append(value) or value)
    monkeypatch.setattr(Ranks, "copy_from_first", lambda self, tensor: tensor)
    record = runs.train_run(run, tmp_path, ranks=Ranks(0, 2))
    assert record["status"] == "failed" and "no memory" in record["reason"]
    assert told[0]["run"] == run.to_dict() and None not in told
    first, start = told[0], {**told[1], "best": []}
    monkeypatch.setattr(Ranks, "tell", lambda self, value=None: [first, start].pop(value is not None))
    with pytest.raises(LabError, match=r"process 1 of 2: RuntimeError: no memory.*goes on from the last checkpoint"):
        runs.train_run(run, tmp_path, ranks=Ranks(1, 2))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "changes", [{}, {"patience": 2, "unique_tokens": 64, "learning_rate": 0.05}, {"precision": "bf16"}]
)
def test_several_give_the_losses_of_one_to_rounding(size, changes):
    config = TRAIN.replace(**changes)
    ((_, expected),) = trained(1, config)
    together = trained(size, config)
    assert losses(expected)[-1, 2] < losses(expected)[0, 2] - 0.1 or changes.get("patience")
    for trainer, result in together:
        tolerance = 2e-3 if changes else 2e-5  # a high rate makes differences of rounding grow
        np.testing.assert_allclose(losses(result), losses(expected), rtol=tolerance)
        assert result.status == expected.status and result.steps == expected.steps
        assert (result.unique_tokens, result.tokens_seen) == (expected.unique_tokens, expected.tokens_seen)
        for name, parameter in trainer.model.named_parameters():
            assert torch.equal(parameter, together[0][0].model.get_parameter(name)), name
    if changes.get("patience"):
        assert expected.status == "early_stopped" and expected.best_step < expected.steps


def test_a_run_that_diverges_diverges_for_all():
    results = [result for _, result in trained(2, TRAIN.replace(learning_rate=1e20))]
    assert [result.status for result in results] == ["diverged"] * 2 and results[0].reason == results[1].reason


def test_whoever_is_asked_to_stop_stops_all_and_another_number_goes_on(tmp_path):
    ((_, expected),) = trained(1)

    def ask(trainer):
        if trainer.ranks.rank == 1:
            real = trainer._update

            def update(*pair):
                if trainer.step == 12:
                    trainer.request_stop()
                return real(*pair)

            trainer._update = update

    stopped = [result for _, result in trained(2, folder=tmp_path / "two", before=ask)]
    assert [(result.status, result.steps) for result in stopped] == [("stopped", 14)] * 2  # agreed on in the next step
    checkpoint = tmp_path / "two" / CHECKPOINT_NAME
    assert load_state(checkpoint)[1]["progress"]["step"] == 14
    kept = checkpoint.read_bytes()
    for size in (1, 2, 3):
        checkpoint.write_bytes(kept)
        for _, result in trained(size, folder=tmp_path / "two"):
            assert result.status == "finished"
            np.testing.assert_allclose(losses(result), losses(expected), rtol=2e-5)


def test_a_batch_has_a_window_for_each():
    with pytest.raises(ConfigError, match="batch_size=3 on 4 processes"):
        Trainer(MODEL, TRAIN, TOKENS, TOKENS, ranks=Ranks(0, 4))


def test_dropout_differs_between_processes():
    trainer = trained(1, TRAIN.replace(max_steps=1, warmup_steps=0))[0][0]
    drawn = []
    trainer.model.config = MODEL.replace(dropout=0.5)
    for ranks in (ALONE, Ranks(0, 2), Ranks(1, 2), Ranks(1, 2)):
        trainer.ranks = ranks
        with trainer._randomness():
            drawn.append(torch.rand(3).tolist())
    assert drawn[0] != drawn[1] != drawn[2] == drawn[3]


# ------------------------------------------------------------------------------------------------- torchrun, for real

TINY = "--tokenizer byte --vocab-size 256 --hidden-size 32 --num-layers 2 --num-heads 2 --max-seq-len 32 --threads 1"
TINY += " --batch-size 4 --warmup-steps 2 --eval-tokens 2048 --init scaled --no-compile --checkpoint-minutes 0.01"


def start(text, out, processes, steps=300):
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [
        "-m",
        "tinylm",
        "train",
        "--text",
        str(text),
        "--out",
        str(out),
        *TINY.split(),
        "--max-steps",
        str(steps),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def under_way(out, process):
    """Wait for a checkpoint of a run that goes on."""
    until = time.monotonic() + 120
    while not list(out.glob(f".checkpoints/*/{CHECKPOINT_NAME}")):
        assert time.monotonic() < until and process.poll() is None, ended(process)
        time.sleep(0.01)


def the_record(out):
    (path,) = (out / "runs").glob("*.json")
    return read_record(path)


def children_of(pid):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except OSError:
            continue
    return sorted(found)


def curve(record):
    return np.array([[point["train_loss"], point["val_loss"], point["val_bpb"]] for point in record["curve"]])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_torchrun_trains_as_one_process_does_and_survives_kills(text, tmp_path):
    steps = 600
    code, _, said = ended(start(text, tmp_path / "one", 1, steps))
    assert code == 0, said
    one = the_record(tmp_path / "one")

    code, out, said = ended(start(text, tmp_path / "two", 2, steps))
    assert code == 0, said
    two = the_record(tmp_path / "two")
    assert (one["processes"], two["processes"]) == (1, 2) and one["run_id"] == two["run_id"]
    assert out.count("finished: val_loss") == 1 and said.count("2 processes") == 1
    np.testing.assert_allclose(curve(two), curve(one), rtol=2e-4)
    np.testing.assert_allclose(curve(two)[:3], curve(one)[:3], rtol=1e-5)  # before rounding has grown
    places = [{path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert places[0] == places[1] and len(list((tmp_path / "two" / "models").iterdir())) == 1

    # A rank is killed: all end, with a word of why, and another number of processes goes on.
    killed = start(text, tmp_path / "killed", 2, steps)
    under_way(tmp_path / "killed", killed)
    workers = children_of(killed.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    code, out, said = ended(killed)
    assert code != 0 and re.search(r"error: All processes of a run must stay to its end\..*process 0 of 2", said)
    assert "goes on from the last checkpoint" in said and not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert not list((tmp_path / "killed").glob("runs/*.json"))
    code, _, said = ended(start(text, tmp_path / "killed", 1, steps))
    assert code == 0, said
    np.testing.assert_allclose(curve(the_record(tmp_path / "killed")), curve(one), rtol=2e-4)

    # Ctrl-C: all stop after one step, with a checkpoint; the same number of processes goes on to the same bits.
    stopped = start(text, tmp_path / "stopped", 2, steps)
    under_way(tmp_path / "stopped", stopped)
    stopped.send_signal(signal.SIGINT)
    code, out, said = ended(stopped)
    assert code != 0 and said.count("goes on from there") == 1 and not list((tmp_path / "stopped").glob("runs/*.json"))
    (checkpoint,) = (tmp_path / "stopped").glob(f".checkpoints/*/{CHECKPOINT_NAME}")
    assert load_state(checkpoint)[1]["progress"]["_status"] == "stopped"
    code, _, said = ended(start(text, tmp_path / "stopped", 2, steps))
    assert code == 0, said
    again = the_record(tmp_path / "stopped")
    assert json.dumps(curve(again).tolist()) == json.dumps(curve(two).tolist())
    models = [next((tmp_path / name / "models").iterdir()).read_bytes() for name in ("two", "stopped")]
    assert models[0] == models[1]


@pytest.mark.slow
def test_what_the_first_process_refuses_ends_all(tmp_path):
    code, _, said = ended(start(tmp_path / "absent.txt", tmp_path / "out", 2))
    assert (
        code != 0
        and "absent.txt" in said
        and "Traceback" not in said.partition("ChildFailedError")[0].partition("torch")[0]
    )
