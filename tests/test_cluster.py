"""Sweeps through executors of others: a Dask cluster whose workers die, folders that are not shared, runs done twice."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import threading
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from types import SimpleNamespace

import pandas
import pytest
from test_sweep import a_run, equal, grid, wait_until, written
from test_sweep import text as text

from tinylm.errors import LabError
from tinylm.study import cluster as cluster_module
from tinylm.study import runs as records
from tinylm.study.cluster import ClusterPool, study_pool
from tinylm.study.runs import load_runs
from tinylm.study.sweep import WorkerPool, sweep

on_linux = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills workers")


class Changed(Executor):
    """An executor of one thread that does to each task what ``change`` says."""

    def __init__(self, change):
        self.change, self.pool = change, ThreadPoolExecutor(1)

    def submit(self, fn, /, stack):
        return self.pool.submit(self.change, fn, stack)


def test_records_come_home_from_workers_that_share_no_folder(text, tmp_path):
    def elsewhere(fn, stack):
        return fn([dataclasses.replace(task, results_dir=str(tmp_path / "worker")) for task in stack])

    there = sweep(grid(text), tmp_path / "home", executor=Changed(elsewhere))
    assert written(tmp_path / "home").keys() == written(tmp_path / "worker").keys()
    with ThreadPoolExecutor(1) as threads:
        before = written(tmp_path / "home")
        again = sweep(grid(text), tmp_path / "home", executor=threads)
        assert written(tmp_path / "home") == before
        pandas.testing.assert_frame_equal(again, there)
        equal(sweep(grid(text), tmp_path / "calm", executor=threads), there)


def test_a_task_that_is_done_twice_is_one_record(text, tmp_path):
    """As where a worker that was thought dead still trains: one after the other, and both at once."""

    def twice(fn, stack):
        with ThreadPoolExecutor(2) as both:
            results = [future.result() for future in [both.submit(fn, stack) for _ in range(2)]]
        assert [r["finished"] for r in results[0]] == [r["finished"] for r in results[1]]  # the second took the first's
        return fn(stack)

    table = sweep(grid(text), tmp_path / "twice", executor=Changed(twice))
    assert len(load_runs(tmp_path / "twice")) == 5
    with ThreadPoolExecutor(1) as threads:
        equal(sweep(grid(text), tmp_path / "calm", executor=threads), table)


def test_a_task_that_is_done_twice_without_locks_is_the_same_record(text, tmp_path, monkeypatch):
    """On a file system that knows no locks, or between machines that do not tell each other of them."""
    monkeypatch.setattr(records, "fcntl", None)
    monkeypatch.setattr(records, "_one_at_a_time", threading.Semaphore(2))
    runs = [a_run(text, seed=seed, max_steps=60, checkpoint_minutes=1e-5) for seed in range(2)]

    def twice(fn, stack):
        with ThreadPoolExecutor(2) as both:
            first, second = [future.result() for future in [both.submit(fn, stack) for _ in range(2)]]
        assert [r["val_loss"] for r in first] == [r["val_loss"] for r in second]
        return first

    table = sweep(runs, tmp_path / "twice", executor=Changed(twice), stack=1)
    assert (table.status == "finished").all()
    assert load_runs(tmp_path / "twice").sort_values("seed").val_loss.tolist() == table.val_loss.tolist()
    with ThreadPoolExecutor(1) as threads:
        equal(sweep(runs, tmp_path / "calm", executor=threads), table)


def test_of_a_stack_that_is_lost_only_the_guilty_run_fails(text, tmp_path):
    def lost(fn, stack):
        if any(task.run.tags.get("family") == "poison" for task in stack):
            raise RuntimeError("all workers died while running it")
        return fn(stack)

    runs = [a_run(text, {"family": "poison" if seed == 1 else "good"}, seed=seed) for seed in range(4)]
    table = sweep(runs, tmp_path, executor=Changed(lost), workers=1)
    assert table.status.tolist() == ["finished", "failed", "finished", "finished"]
    assert table.reason[1] == "RuntimeError: all workers died while running it"


def test_a_cluster_that_is_gone_ends_the_sweep_and_blames_no_run(text, tmp_path):
    class Gone(Executor):
        def submit(self, fn, /, stack):
            future = Future()
            future.cancel()
            future.set_running_or_notify_cancel()
            return future

    with pytest.raises(LabError, match="must stay usable"):
        sweep([a_run(text, seed=seed) for seed in range(3)], tmp_path, executor=Gone())
    assert not list(tmp_path.glob("runs/*"))


def test_a_study_without_a_cluster_has_its_own_workers():
    with study_pool("", 3) as pool:
        assert isinstance(pool, WorkerPool) and pool.workers == 3


def test_a_cluster_that_cannot_be_had_is_told_in_words(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(LabError, match=r"needs Dask.*pip install -e '\.\[dask\]'"), study_pool("local"):
        pass


def test_work_is_packed_for_the_workers_that_are_to_come(monkeypatch, capsys):
    there: dict[str, int] = {}

    client = SimpleNamespace(nthreads=lambda: dict(there), get_executor=lambda pure: None)
    fake = SimpleNamespace(Client=lambda address, timeout: contextlib.nullcontext(client), LocalCluster=None)
    monkeypatch.setitem(sys.modules, "distributed", fake)
    with study_pool("tcp://queue:8786", 50) as pool:
        assert pool.workers == 50 and not capsys.readouterr().out
        there |= {f"tcp://{number}": 1 for number in range(64)}
        assert pool.workers == 64
    there.clear()
    with study_pool("tcp://queue:8786") as pool:
        assert pool.workers == 1 and "no workers yet" in capsys.readouterr().out
        there["tcp://one"] = there["tcp://other"] = 1
        assert pool.workers == 2


# ------------------------------------------------------------------------------------------------------ Dask, for real


@on_linux
@pytest.mark.slow
def test_a_dask_cluster_that_loses_a_worker_gives_the_numbers_of_the_local_sweep(text, tmp_path):
    pytest.importorskip("distributed")
    runs = [
        a_run(text, {"size": size}, seed=seed, hidden_size=size, max_steps=500) for size in (8, 16) for seed in (0, 1)
    ]
    runs = [*runs, a_run(text, {"size": 0}, learning_rate=1e20, max_steps=60), runs[0]]
    results, trained = tmp_path / "dask", []
    with study_pool("local", 2) as pool, ThreadPoolExecutor(1) as side:
        assert isinstance(pool, ClusterPool)
        pool._client.wait_for_workers(2)
        assert pool.workers == 2
        workers = pool._client.run(os.getpid)
        swept = side.submit(sweep, runs, results, executor=pool, stack=1)
        wait_until(lambda: len(list(results.glob(".checkpoints/*.progress"))) > 1 or swept.done())  # both are training
        assert not swept.done()
        os.kill(next(iter(workers.values())), signal.SIGKILL)
        table = swept.result(timeout=120)
        after = pool._client.run(os.getpid)
        assert set(after.values()) != set(workers.values())  # the nanny started another
        trained = written(results)
        # Two sweeps at once in one folder: the second takes what the first trains, and nothing is trained again.
        more = [*runs, a_run(text, seed=7), a_run(text, seed=8)]
        both = [ThreadPoolExecutor(1).submit(sweep, more, results, executor=pool) for _ in range(2)]
        one, other = (future.result(timeout=120) for future in both)
        pandas.testing.assert_frame_equal(one, other)
    assert table.status.tolist() == ["finished"] * 4 + ["diverged", "finished"] and len(trained) == 5
    assert trained.items() <= written(results).items() and len(written(results)) == 7
    assert (one.threads == 1).all() and (load_runs(results).threads == 1).all()
    with ThreadPoolExecutor(1) as threads:
        equal(sweep(runs, tmp_path / "local", executor=threads), table)
        equal(sweep(more, tmp_path / "local", executor=threads), one)


@on_linux
@pytest.mark.slow
def test_a_dask_scheduler_that_is_gone_is_told_and_the_sweep_goes_on_elsewhere(text, tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    runs = [a_run(text, seed=seed, max_steps=1500, eval_interval=20) for seed in range(3)]
    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(processes=True, **options) as cluster:
        client = distributed.Client(cluster)
        with ThreadPoolExecutor(1) as side:
            swept = side.submit(sweep, runs, tmp_path, executor=client.get_executor(pure=False), stack=1)
            wait_until(lambda: list(tmp_path.glob(".checkpoints/*.progress")) or swept.done())
            client.close()
            with pytest.raises(LabError, match="must stay usable"):
                swept.result(timeout=60)
    assert all(record["status"] == "finished" for record in map(records.read_record, tmp_path.glob("runs/*.json")))
    with ThreadPoolExecutor(1) as threads:
        assert (sweep(runs, tmp_path, executor=threads).status == "finished").all()
    monkeypatch.setattr(cluster_module, "CONNECT_SECONDS", 1)
    with pytest.raises(LabError, match=r"must be reachable.*tcp://127\.0\.0\.1:1"), study_pool("tcp://127.0.0.1:1"):
        pass
