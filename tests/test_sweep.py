"""Sweeps: cached, resumable, parallel; whatever is killed, nothing finished is lost and the numbers stay the same."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas
import pytest

from tinylm import backend, train
from tinylm.config import DataConfig, ModelConfig, TrainConfig
from tinylm.errors import ConfigError, LabError, TextError
from tinylm.study import runs as records
from tinylm.study import sweep as engine
from tinylm.study.runs import Run, load_runs
from tinylm.study.sweep import WorkerPool, sweep, worker_pool

TIMES = ["started", "finished", "seconds", "tokens_per_second"]
on_linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(200)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(" ".join(rng.choices(words, k=8)) for _ in range(1500)))
    return path


def a_run(text, tags=None, **changes):
    model = {"vocab_size": 256, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "max_seq_len": 16}
    training = {"max_steps": 12, "warmup_steps": 2, "batch_size": 4, "eval_interval": 4, "eval_tokens": 512}
    for name, value in changes.items():
        (model if name in ModelConfig.__dataclass_fields__ else training)[name] = value
    data = DataConfig(text=str(text), tokenizer="byte")
    return Run(ModelConfig(**model), TrainConfig(**training), data, tags or {})


def grid(text, steps=12):
    """Five runs of three sizes, one of them diverging, and the first asked for again under another tag."""
    runs = [a_run(text, {"family": "a"}, hidden_size=size, max_steps=steps, eval_interval=10) for size in (8, 16)]
    runs += [a_run(text, {"family": "b"}, seed=seed, max_steps=steps // 2, eval_interval=10) for seed in (1, 2)]
    runs.append(a_run(text, {"family": "wild"}, learning_rate=1e20, max_steps=60))
    return [*runs, Run(runs[0].model, runs[0].train, runs[0].data, {"family": "again"})]


def tasks_of(runs, stacked=True):
    arithmetic = {"stacked": stacked}
    return [records.Task(run, f"{number:016d}", {}, arithmetic, 0, "") for number, run in enumerate(runs)]


def test_runs_of_one_shape_are_packed_in_stacks_the_longest_first():
    runs = [a_run("a", seed=seed, max_steps=steps) for seed in range(7) for steps in (12, 24)]
    runs += [a_run("a", hidden_size=16, batch_size=size) for size in (2, 4)]
    tasks = tasks_of(runs)
    stacks = engine.pack(tasks, workers=2)
    assert sorted(task.run_id for stack in stacks for task in stack) == sorted(task.run_id for task in tasks)
    assert all(len({records.stack_key(task) for task in stack}) == 1 for stack in stacks)
    work = [sum(task.run.flops for task in stack) for stack in stacks]
    assert work == sorted(work, reverse=True) and max(work) <= 0.75 * sum(work)
    assert 1 < max(len(stack) for stack in stacks) <= engine.STACK_HEIGHT
    assert {len(stack) for stack in engine.pack(tasks_of(runs, stacked=False), workers=2)} == {1}
    seeds = engine.pack(tasks_of([a_run("a", seed=seed) for seed in range(7)]), workers=2)
    assert [len(stack) for stack in seeds] == [4, 3]  # one for each worker
    many = engine.pack(tasks_of([a_run("a", seed=seed) for seed in range(40)]), workers=2)
    assert {len(stack) for stack in many} == {8}
    assert {len(stack) for stack in engine.pack(tasks, workers=2, height=1)} == {1}


def test_a_sweep_in_stacks_gives_the_records_of_runs_one_by_one(text, tmp_path):
    runs = grid(text)
    together = sweep(runs, tmp_path / "together", workers=1)
    assert load_runs(tmp_path / "together").status.value_counts()["diverged"] == 1
    found = [records.read_record(path) for path in (tmp_path / "together" / "runs").glob("*.json")]
    assert {record["trained_together"] for record in found} > {1} and {record["path"] for record in found} == {
        "eager, fp32 products, torch's attention, stacked"
    }
    equal(sweep(runs, tmp_path / "alone", workers=1, stack=1), together)


def equal(one, other):
    pandas.testing.assert_frame_equal(one.drop(columns=TIMES), other.drop(columns=TIMES), check_exact=True)


def written(results_dir):
    return {path.name: path.stat().st_mtime_ns for path in (results_dir / "runs").glob("*.json")}


def children_of(pid):
    """Processes whose parent is pid, by what /proc says."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(holds, seconds=60.0):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.01)


def test_processes_and_threads_give_one_table_and_nothing_is_trained_twice(text, tmp_path, capsys):
    runs = grid(text)
    with worker_pool(2) as pool:
        first = sweep(runs, tmp_path / "processes", executor=pool)
        assert "5 runs to train" in capsys.readouterr().out
        before = written(tmp_path / "processes")
        again = sweep(runs, tmp_path / "processes", executor=pool)
        assert "nothing to train" in capsys.readouterr().out
        more = sweep([a_run(text, seed=9)], tmp_path / "processes", executor=pool, progress=False)
        assert capsys.readouterr().out == ""
    assert first.family.tolist() == ["a", "a", "b", "b", "wild", "again"]
    assert first.run_id[5] == first.run_id[0] and first.run_id.nunique() == 5 == len(before)
    assert first.status.tolist() == ["finished"] * 4 + ["diverged", "finished"]
    assert first.val_loss.isna().tolist() == [False] * 4 + [True, False]
    assert (first.threads == 1).all() and first.hidden_size.tolist() == [8, 16, 8, 8, 8, 8]
    pandas.testing.assert_frame_equal(first, again)
    assert before.items() <= written(tmp_path / "processes").items()
    assert more.status.tolist() == ["finished"] and len(load_runs(tmp_path / "processes")) == 6
    assert not (tmp_path / "processes" / ".checkpoints").exists()

    with ThreadPoolExecutor(2) as threads:
        equal(sweep(runs, tmp_path / "threads", executor=threads), first)


def test_models_are_kept_where_asked(text, tmp_path):
    with ThreadPoolExecutor(1) as threads:
        table = sweep(grid(text), tmp_path, executor=threads, keep_models=lambda run: run.tags["family"] == "b")
    kept = {path.stem for path in (tmp_path / "models").iterdir()}
    assert kept == set(table.run_id[table.family == "b"]) and table.model_file.notna().sum() == 2


def test_dry_run_trains_nothing_and_tells_the_cost(text, tmp_path, capsys, monkeypatch):
    runs = grid(text)
    plan = sweep(runs, tmp_path / "results", dry_run=True, workers=2)
    assert "5 runs, 0 recorded, 5 to train" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()
    assert (plan.status == "to train").all() and plan.flops.tolist() == [run.flops for run in runs]
    assert (plan.seconds > 0).all() and plan.attrs["seconds"] <= plan.seconds.sum()
    with ThreadPoolExecutor(1) as threads:
        sweep(runs[:2], tmp_path / "results", executor=threads)
    monkeypatch.setattr(engine, "_seconds_per_step", None)  # measured speeds are in the records now
    plan = sweep(runs, tmp_path / "results", dry_run=True, workers=2)
    assert "5 runs, 2 recorded, 3 to train" in capsys.readouterr().out
    assert plan.status.tolist() == ["finished"] * 2 + ["to train"] * 3 + ["finished"]
    assert plan.seconds.tolist()[0] == 0 and plan.family.tolist() == [run.tags["family"] for run in runs]


def test_time_left_comes_from_flops_and_measured_speed(text):
    small, large = a_run(text, hidden_size=8, max_steps=100), a_run(text, hidden_size=64, max_steps=100)
    clock = engine._Clock()
    assert clock.seconds(small) is None
    clock.note("one", small.flops / 100, 100, 2.0)
    assert clock.seconds(small) == pytest.approx(2.0) and clock.seconds(small, 75) == pytest.approx(0.5)
    clock.note("two", large.flops / 100, 100, 5.0)
    assert clock.seconds(small) == pytest.approx(2.0) and clock.seconds(large) == pytest.approx(5.0)
    assert 2.0 < clock.seconds(a_run(text, hidden_size=32, max_steps=100)) < 5.0
    assert engine._makespan([3.0], [2.0, 2.0], 2) == 4.0 and engine._makespan([], [3.0, 2.0, 2.0], 2) == 4.0


def test_progress_is_told_in_plain_lines(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engine, "LINE_EVERY", 0.05)
    with ThreadPoolExecutor(1) as threads:
        sweep([a_run(text, seed=seed, max_steps=100) for seed in range(4)], tmp_path, executor=threads)
    lines = capsys.readouterr().out.splitlines()
    assert any("of 4 runs" in line and "% of the work" in line and "left" in line for line in lines)
    assert lines[-1].startswith("sweep: 4 runs trained in")


def test_bad_input_is_told_before_any_work(text, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "_train_all", None)
    for workers in (0, -1, True, 1.5):
        with pytest.raises(ConfigError, match="workers"):
            sweep([a_run(text)], tmp_path / "results", workers=workers)
    with pytest.raises(LabError, match=r"nothing\.txt"):
        sweep([a_run(tmp_path / "nothing.txt")], tmp_path / "results")
    for changes in ({"max_seq_len": 100_000}, {"unique_tokens": 10**7}):
        with pytest.raises(TextError):
            sweep([a_run(text, **changes)], tmp_path / "results")
    with pytest.raises(LabError, match="cuda"):
        sweep([a_run(text, device="cuda:99")], tmp_path / "results")
    assert not list(tmp_path.glob("results/*.json"))


def test_what_a_worker_cannot_mend_ends_the_sweep(text, tmp_path, monkeypatch):
    def full(*_):
        raise LabError("The disk must have room for what is written")

    monkeypatch.setattr(records, "write_record", full)
    with ThreadPoolExecutor(2) as threads, pytest.raises(LabError, match="disk"):
        sweep([a_run(text, seed=seed) for seed in range(20)], tmp_path, executor=threads)
    monkeypatch.undo()
    with ThreadPoolExecutor(2) as threads:  # and does not stand in the way of the next
        assert sweep([a_run(text)], tmp_path, executor=threads).status.tolist() == ["finished"]


def test_failed_runs_are_tried_again_but_do_not_stand_in_the_way_of_a_redraw(text, tmp_path, monkeypatch):
    runs = [a_run(text), a_run(text, seed=1)]
    with ThreadPoolExecutor(1) as threads:
        with monkeypatch.context() as patch:
            real = train.Trainer._update
            patch.setattr(train.Trainer, "_update", lambda self, *a: real(self, *a) if self.config.seed else 1 / 0)
            assert sweep(runs, tmp_path, executor=threads).status.tolist() == ["failed", "finished"]
        with monkeypatch.context() as patch:  # on another machine
            patch.setattr(backend, "machine", lambda device="cpu": {"cpu": "another"})
            with pytest.warns(UserWarning, match="as recorded"):
                assert sweep(runs, tmp_path, executor=threads).status.tolist() == ["failed", "finished"]
            with pytest.raises(LabError, match="another"):
                sweep([*runs, a_run(text, seed=2)], tmp_path, executor=threads)
        assert sweep(runs, tmp_path, executor=threads).status.tolist() == ["finished", "finished"]


def die_if_poisoned(function, tasks):
    if any(task.run.tags.get("family") == "poison" for task in tasks):
        os.kill(os.getpid(), signal.SIGKILL)
    return function(tasks)


class PoisonedPool(WorkerPool):
    """Its workers die of runs of the family ``poison``."""

    def submit(self, fn, /, *args, **kwargs):
        return super().submit(die_if_poisoned, fn, *args, **kwargs) if args else super().submit(fn)


@on_linux
@pytest.mark.slow
def test_a_run_that_kills_its_worker_is_given_up_and_the_others_finish(text, tmp_path):
    runs = [a_run(text, seed=seed) for seed in range(5)]
    poison = a_run(text, {"family": "poison"}, seed=1, max_steps=20)
    with PoisonedPool(2) as pool:
        table = sweep([poison, *runs], tmp_path, executor=pool)
    assert table.status.tolist() == ["failed"] + ["finished"] * 5
    assert "killed 3 times" in table.reason[0]


@on_linux
@pytest.mark.slow
def test_a_killed_worker_costs_nothing_but_time(text, tmp_path):
    runs = [a_run(text, seed=seed, max_steps=600, eval_interval=20) for seed in range(3)]
    with worker_pool(2) as pool, ThreadPoolExecutor(1) as side:
        swept = side.submit(sweep, runs, tmp_path / "killed", executor=pool)
        wait_until(lambda: list(tmp_path.glob("killed/.checkpoints/*.progress")) or swept.done())
        workers = [pid for pid in children_of(os.getpid()) if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
        os.kill(workers[0], signal.SIGKILL)
        table = swept.result()
        assert not any(alive(pid) for pid in workers)
    assert (table.status == "finished").all()
    with ThreadPoolExecutor(1) as threads:
        equal(sweep(runs, tmp_path / "calm", executor=threads), table)


@on_linux
@pytest.mark.slow
def test_two_sweeps_at_once_share_one_folder(text, tmp_path):
    both = [start_from_stdin(text, tmp_path / "results", f"{name}.py") for name in "ab"]
    for parent in both:
        said = parent.communicate(timeout=300)[0]
        assert parent.returncode == 0, said
    with ThreadPoolExecutor(1) as threads:
        before = written(tmp_path / "results")
        table = sweep(grid(text, steps=1200), tmp_path / "results", executor=threads)
        assert written(tmp_path / "results") == before
        equal(sweep(grid(text, steps=1200), tmp_path / "calm", executor=threads), table)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_sweep import grid
from tinylm.study.sweep import sweep
sweep(grid({text!r}, steps=1200), {results!r}, workers=2)
"""


def start_from_stdin(text, results, name="script.py"):
    """A sweep in a process of its own whose script comes from stdin and has no guard around it."""
    script = results.with_name(name)
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), text=str(text), results=str(results)))
    with script.open() as stdin:
        return subprocess.Popen(
            [sys.executable, "-"], stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_sweep_that_is_ended_leaves_no_orphan_and_goes_on_where_it_was(text, tmp_path, how):
    results = tmp_path / "results"
    parent = start_from_stdin(text, results)
    wait_until(lambda: list(results.glob("runs/*.json")) or parent.poll() is not None)
    time.sleep(0.7)  # the worker that wrote it is now well within its next run
    family = children_of(parent.pid)
    assert len(family) >= 2
    parent.send_signal(how)
    said = parent.communicate(timeout=30)[0]
    wait_until(lambda: not any(alive(pid) for pid in family), seconds=15)
    before = written(results)
    assert 1 <= len(before) < 5, said
    if how == signal.SIGINT:
        assert "a second start goes on from there" in said
        assert list(results.glob(".checkpoints/*/checkpoint.safetensors"))  # workers left what they had
    with ThreadPoolExecutor(1) as threads:
        table = sweep(grid(text, steps=1200), results, executor=threads)
        assert before.items() <= written(results).items()
        equal(sweep(grid(text, steps=1200), tmp_path / "calm", executor=threads), table)
