"""Many runs: configs in, finished records out. Cached, resumable, parallel, and through any executor.

Workers are processes of one thread each, started by spawn, that stay for the whole sweep (or for several: see
``worker_pool``). They write the records themselves, so that nothing finished is lost when their parent is killed, and
they end when it does.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import heapq
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
import signal
import sys
import threading
import time
import types
import typing
import warnings
from collections import deque
from concurrent.futures import Executor, Future, ProcessPoolExecutor

from tinylm import backend, files
from tinylm.errors import ConfigError, LabError
from tinylm.study.runs import (
    RESULTS,
    Folder,
    Run,
    Task,
    allow_training,
    failed_record,
    perform,
    prepare_corpus,
    read_record,
    revisions_told,
    stack_key,
    stop_training,
    table,
    write_record,
)

if typing.TYPE_CHECKING:
    import pandas

STACK_HEIGHT = 8  # runs in a stack at most: three were nearly as fast as eight
CRASHES = 3  # a run during which its worker was killed so often is given up
GRACE = 10.0  # seconds that a worker has for its last checkpoint
LINE_EVERY = 10.0  # seconds between lines of progress where there is no terminal


# Worker processes.


@contextlib.contextmanager
def _no_main_no_interrupt() -> typing.Iterator[None]:
    """While a worker is started: hide ``__main__``, and hold back Ctrl-C from it until it ignores it.

    Spawn has the child import the parent's main module again, which fails where that came from stdin, and starts the
    whole script again where it has no ``if __name__ == "__main__"``. Workers need nothing from it.
    """
    main = sys.modules["__main__"]
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if hasattr(signal, "pthread_sigmask") else None
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        if held is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)


class _Process(multiprocessing.context.SpawnProcess):
    @staticmethod
    def _Popen(process_obj):
        with _no_main_no_interrupt():
            return multiprocessing.context.SpawnProcess._Popen(process_obj)


class _Context(multiprocessing.context.SpawnContext):
    Process = _Process


def _begin_worker(lifeline: multiprocessing.connection.Connection, parent: int) -> None:
    """What each worker does first, before torch is loaded."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, _on_terminate)
    # A run of several threads raises their number. How these wait for each other stays OpenMP's choice: with
    # OMP_WAIT_POLICY=passive two threads lose a quarter to two fifths of their speed.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    atexit.register(os._exit, 0)  # runs last: without torch's slow unloading a pool closes at once
    threading.Thread(target=_watch, args=(lifeline, parent), daemon=True).start()
    import tinylm.train  # noqa: F401  (loads torch while the parent goes on)


def _watch(lifeline: multiprocessing.connection.Connection, parent: int) -> None:
    """End this worker when its parent is gone, or closes the lifeline (then with a last checkpoint)."""
    with contextlib.suppress(OSError, EOFError):
        while not lifeline.poll(1.0):
            if os.getppid() != parent:
                os._exit(1)
    stop_training()
    until = time.monotonic() + GRACE
    while time.monotonic() < until and os.getppid() == parent:
        time.sleep(0.05)
    os._exit(1)


_terminated = False


def _on_terminate(*_: object) -> None:
    """SIGTERM: a last checkpoint where something is being trained, then the end."""
    global _terminated
    _terminated = True
    if not stop_training():
        os._exit(143)
    deadline = threading.Timer(GRACE, os._exit, (143,))
    deadline.daemon = True
    deadline.start()


def _ready() -> None:
    """Shows that a worker has come up."""


def _work(tasks: list[Task]) -> list[dict]:
    records = perform(tasks)
    if _terminated:
        os._exit(143)
    return records


class WorkerPool(Executor):
    """Worker processes of one thread each; an Executor that can be renewed after one of them was killed.

    They start when the first task comes, ignore Ctrl-C, and end with their parent, whatever ends it.
    """

    def __init__(self, workers: int):
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None
        self._closed = False

    def _open(self) -> ProcessPoolExecutor:
        self._ear, self._voice = multiprocessing.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(
            self.workers, mp_context=_Context(), initializer=_begin_worker, initargs=(self._ear, os.getpid())
        )
        self._arrivals = [self._pool.submit(_ready) for _ in range(self.workers)]  # each starts one more process
        return self._pool

    def submit(self, fn: typing.Callable, /, *args: object, **kwargs: object) -> Future:
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        return (self._pool or self._open()).submit(fn, *args, **kwargs)

    def came_up(self) -> bool:
        """Whether any worker has begun to work since the pool was opened or renewed."""
        return any(f.done() and not f.cancelled() and f.exception() is None for f in self._arrivals)

    def stop(self) -> None:
        """End the workers now, with a last checkpoint of what they train; a later task starts new ones."""
        if self._pool:
            self._voice.close()
            self._leave()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._closed = True
        if self._pool:
            self._leave(wait, cancel_futures)

    def _leave(self, wait: bool = True, cancel_futures: bool = True) -> None:
        pool, self._pool = self._pool, None
        pool.shutdown(wait=wait, cancel_futures=cancel_futures)
        if wait:
            self._voice.close()
            self._ear.close()


@contextlib.contextmanager
def worker_pool(workers: int | None = None) -> typing.Iterator[WorkerPool]:
    """Workers for several sweeps: ``with worker_pool(2) as pool: sweep(..., executor=pool)``. None is one a processor.

    Leaving the block by an error or Ctrl-C ends them at once.
    """
    pool = WorkerPool(_checked(workers))
    try:
        yield pool
    except BaseException:
        pool.stop()
        raise
    finally:
        pool.shutdown()


def _checked(workers: int | None) -> int:
    if workers is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ConfigError("workers must be a whole number of at least 1", f"workers={workers!r}", "leave it out")
    return workers


# The sweep.


def sweep(
    runs: typing.Iterable[Run],
    results_dir: str | os.PathLike,
    workers: int | None = None,
    executor: Executor | None = None,
    progress: bool = True,
    dry_run: bool = False,
    keep_models: bool | typing.Callable[[Run], bool] = False,
    stack: int = STACK_HEIGHT,
) -> pandas.DataFrame:
    """Train what is not recorded yet, and return one row a run asked for, in order, with its tags (``runs.table``).

    Runs that differ in nothing but tags are trained once. ``threads`` of None means one thread. Diverged and failed
    runs are rows with their ``reason``; failed ones are tried again by the next sweep that asks for them. Ctrl-C, a
    kill or a full disk lose nothing finished, and runs under way go on from their checkpoints, bit for bit, when the
    sweep is started again.

    workers: processes to start, None is one a processor. executor: any ``concurrent.futures.Executor`` to use instead (a
    ``worker_pool`` for several sweeps, ``Client(address).get_executor(pure=False)`` for a Dask cluster; threads of one
    process train one at a time), of which ``workers`` then says how many tasks it takes at once. keep_models: save the trained
    models under results_dir/models, all or those for which ``keep_models(run)`` is true; a run recorded without its
    model stays without. dry_run: train nothing, print what would be done and what it costs, and return the plan as a
    table (``status`` is "to train" where no record is found, ``seconds`` an estimate). stack: how many runs of one shape
    a worker trains together at most, where that is faster; it changes no number.

    Raises LabError where the folder belongs to another machine, a text has changed or cannot be had, a record is
    damaged, or the disk is full.
    """
    asked = [run if run.train.threads else _with_one_thread(run) for run in runs]
    count = _checked(workers)
    folder = Folder(results_dir)
    found: dict[str, dict | None] = {}
    tasks = [_look_up(folder, run, found) for run in asked]
    unfinished = [i for i, task in enumerate(tasks) if task is None or not _is_result(found[task.run_id])]
    if dry_run:
        return _plan(folder, asked, tasks, found, count)
    for run in {files.canonical_json(run.corpus_key): run for run in asked}.values():
        folder.check_own_text(run)
    todo: dict[str, Task] = {}
    if unfinished:
        keep = keep_models if callable(keep_models) else lambda run: bool(keep_models)
        try:
            _admit(folder, [asked[i] for i in unfinished], progress)
        except LabError as error:
            if any(tasks[i] is None or not found[tasks[i].run_id] for i in unfinished):
                raise
            warnings.warn(f"runs that failed are shown as recorded: {error}", stacklevel=2)
        else:
            for i in unfinished:
                tasks[i] = task = _look_up(folder, asked[i], found, str(files.home()), keep(asked[i]))
                if not _is_result(found[task.run_id]) and (task.run_id not in todo or task.keep_model):
                    todo[task.run_id] = task
    show = _Show(folder, len(found) - len(todo), list(todo.values()), progress)
    if todo:
        found |= _train_all(folder, list(todo.values()), executor, count, show, stack)
    show.end(found)
    folder.tidy()
    return table([found[task.run_id] for task in tasks], [run.tags for run in asked])


def _with_one_thread(run: Run) -> Run:
    return Run(run.model, run.train.replace(threads=1), run.data, run.tags)


def _look_up(folder: Folder, run: Run, found: dict, home: str | None = None, keep: bool = False) -> Task | None:
    """The run's task where the folder can identify it; its record (or None) goes to ``found``."""
    task = folder.task(run, home, keep)
    if task and task.run_id not in found:
        found[task.run_id] = folder.record(task.run_id)
    return task


def _is_result(record: dict | None) -> bool:
    return bool(record) and record["status"] in RESULTS


def _admit(folder: Folder, runs: list[Run], progress: bool) -> None:
    """Prepare each corpus once, here, so that workers find it in the cache, and settle the folder's arithmetic."""
    corpora = {}
    for run in runs:
        key = files.canonical_json(run.corpus_key)
        if key not in corpora:
            corpora[key] = prepare_corpus(run, progress)
    folder.admit([(run, corpora[files.canonical_json(run.corpus_key)]) for run in runs])


def pack(tasks: list[Task], workers: int, height: int = STACK_HEIGHT) -> list[list[Task]]:
    """Tasks in stacks that are trained together, the longest stack first, so that workers end together.

    A stack holds runs of one shape, at most ``height`` of them, and no more than a worker's share of all the work. What
    a run comes to does not depend on its stack (see ``tinylm.stack``), so the packing is free.
    """
    share = sum(task.run.flops for task in tasks) / workers
    groups: dict[str, list[Task]] = {}
    for task in sorted(tasks, key=lambda task: -task.run.flops):
        groups.setdefault(stack_key(task), []).append(task)
    stacks = []
    for group in groups.values():
        while group:
            high = max(1, min(height, math.ceil(share / group[0].run.flops)))
            high = -(-len(group) // -(-len(group) // high))  # as even as can be: 5 in 3 and 2, not in 4 and 1
            stacks.append(group[:high])
            group = group[high:]
    return sorted(stacks, key=lambda stack: -_flops(stack))


def _flops(stack: list[Task]) -> int:
    return sum(task.run.flops for task in stack)


def _train_all(
    folder: Folder, todo: list[Task], executor: Executor | None, workers: int, show: _Show, height: int
) -> dict:
    """Train all tasks, packed in stacks, and return their records by run_id."""
    pool = WorkerPool(min(workers, len(todo))) if executor is None else executor
    own = isinstance(pool, WorkerPool)
    show.workers = getattr(pool, "workers", None) or workers
    stacks = pack(todo, show.workers, height)
    # Our own pool is handed one stack a worker at a time: if it breaks, only those few may be the cause. Another
    # executor, whose size is not known, gets all at once.
    room = pool.workers if own else len(todo)
    waiting = deque(stacks)
    suspects: deque[list[Task]] = deque()  # were being trained when a worker was killed; tried again one at a time
    crashes: dict[str, int] = {}
    barren = 0  # times in a row that the pool broke before any worker had come up
    running: dict[Future, list[Task]] = {}
    done: dict[str, dict] = {}

    def settle(task: Task, record: dict, write: bool = False) -> None:
        if write:
            write_record(folder.path, record)
        done[task.run_id] = record
        show.finished(task, record)

    def next_stack() -> list[Task] | None:
        if suspects and not any(task.run_id in crashes for stack in running.values() for task in stack):
            return suspects.popleft()
        return waiting.popleft() if waiting else None

    try:
        while waiting or suspects or running:
            broken = None
            while len(running) < room and (stack := next_stack()):
                try:
                    running[pool.submit(_work if own else perform, stack)] = stack
                except concurrent.futures.BrokenExecutor as error:
                    (suspects if stack[0].run_id in crashes else waiting).appendleft(stack)
                    broken = error
                    break
            ended, _ = concurrent.futures.wait(running, show.patience(), concurrent.futures.FIRST_COMPLETED)
            for future in ended:
                error = concurrent.futures.CancelledError() if future.cancelled() else future.exception()
                if error is None:
                    for task, record in zip(running.pop(future), future.result(), strict=True):
                        # What a worker elsewhere wrote may not be seen here yet, or never: the same record serves.
                        unseen = not own and record["status"] != "stopped" and not folder.has_record(task.run_id)
                        settle(task, record, write=unseen)
                elif isinstance(error, (concurrent.futures.BrokenExecutor, concurrent.futures.CancelledError)):
                    broken = error
                elif isinstance(error, (LabError, OSError)):
                    raise error
                elif len(stack := running.pop(future)) > 1:  # a worker was lost with it, perhaps by one of its runs
                    waiting.extend([task] for task in stack)
                else:  # an executor's own trouble: the engine's task gives a record for anything that training raises
                    (task,) = stack
                    settle(task, failed_record(task, f"{type(error).__name__}: {error}"), write=True)
            if broken:
                if not own:
                    raise LabError(
                        "The executor must stay usable for the whole sweep",
                        f"{type(broken).__name__}: {broken}",
                        "start again with a new one: finished runs are kept, and the others go on where they stopped",
                    ) from broken
                came_up = pool.came_up()
                pool.stop()
                barren = 0 if came_up else barren + 1
                if barren == CRASHES:
                    raise LabError(
                        "Worker processes must be able to start",
                        f"they ended {barren} times before they could work (what they said stands above, if anything)",
                        "free some memory, ask for fewer workers, or try workers=1 to see it happen alone",
                    ) from broken
                for future, stack in running.items():
                    returned = future.done() and not future.cancelled() and future.exception() is None
                    records = future.result() if returned else [folder.result(task.run_id) for task in stack]
                    left = []
                    for task, record in zip(stack, records, strict=True):
                        if record:  # perhaps written just before its worker was killed
                            settle(task, record)
                        elif not came_up:
                            left.append(task)
                        else:
                            crashes[task.run_id] = crashes.get(task.run_id, 0) + 1
                            if crashes[task.run_id] < CRASHES:
                                suspects.append([task])
                            else:
                                reason = f"its worker process was killed {CRASHES} times, perhaps for want of memory"
                                settle(task, failed_record(task, reason), write=True)
                    if left:
                        waiting.appendleft(left)
                running.clear()
            show.update(list(running.values()), [*suspects, *waiting])
    except BaseException as error:
        for future in running:
            future.cancel()
        if own:
            pool.stop()
        else:  # threads of this process can be asked to stop; what runs elsewhere ends by itself and is kept
            stop_training()
            concurrent.futures.wait([future for future in running if not future.cancelled()], GRACE)
            allow_training()
        if isinstance(error, KeyboardInterrupt):
            show.interrupted()
        raise
    finally:
        if executor is None:
            pool.shutdown()
    return done


# What is said about it.


class _Clock:
    """Seconds that runs will take, from exact FLOPs and the speeds seen: a fixed time a step plus a time per FLOP."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[float, float]] = {}  # by run: FLOPs a step, seconds a step

    def note(self, run_id: str, flops_per_step: float, steps: int, seconds: float) -> None:
        if steps > 0 and seconds > 0:
            self.seen[run_id] = (flops_per_step, seconds / steps)

    def note_record(self, record: dict | None) -> None:
        if record and record["steps"] and _is_result(record):
            self.note(record["run_id"], record["flops"] / record["steps"], record["steps"], record["seconds"])

    def seconds(self, run: Run, steps_done: int = 0) -> float | None:
        """Seconds for the run's remaining steps; None where no speed has been seen yet."""
        if not self.seen:
            return None
        import numpy

        flops, seconds = numpy.array(list(self.seen.values())).T
        # Relative least squares: every run seen counts alike, small or large.
        fixed, slope = numpy.linalg.lstsq(numpy.stack([1 / seconds, flops / seconds], 1), numpy.ones(len(flops)))[0]
        if fixed < 0 or slope < 0 or numpy.ptp(flops) < 0.01 * flops.max():
            fixed, slope = 0.0, float(numpy.median(seconds / flops))
        steps = run.train.max_steps
        return (steps - steps_done) * (fixed + slope * run.flops / steps)


def _makespan(begun: list[float], waiting: list[float], workers: int) -> float:
    """Seconds until all is done, when each worker that is free takes the next of ``waiting``."""
    free = sorted([*begun, *[0.0] * max(0, workers - len(begun))])
    for seconds in waiting:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def _told_time(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def _told_runs(number: int) -> str:
    return "1 run" if number == 1 else f"{number} runs"


class _Show:
    """Progress of a sweep: a bar on a terminal, a plain line every few seconds elsewhere, nothing where turned off."""

    def __init__(self, folder: Folder, recorded: int, todo: list[Task], progress: bool):
        self.folder, self.recorded, self.todo, self.progress = folder, recorded, todo, progress
        self.flops = sum(task.run.flops for task in todo)
        self.done: dict[str, dict] = {}
        self.flops_done = 0
        self.clock = _Clock()
        self.workers = 1
        self.began = self.last = time.monotonic()
        self.bar = None
        if not progress:
            return
        if not todo:
            self.say(f"all {_told_runs(recorded)} recorded, nothing to train")
            return
        self.say(f"{_told_runs(len(todo))} to train, {self.flops:.3g} FLOPs ({_told_runs(recorded)} already recorded)")
        for path in sorted({backend.words(task.arithmetic) for task in todo}):
            self.say(f"fast path: {path}" if path != backend.PLAIN_WORDS else f"plain path: {path}")
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.flops, bar_format="{desc} |{bar}|{postfix}", leave=False)

    def say(self, words: str) -> None:
        print(f"sweep: {words}", flush=True)

    def patience(self) -> float:
        """Seconds to wait for the next run to end before progress is shown again."""
        return 1.0 if self.bar is not None else LINE_EVERY

    def finished(self, task: Task, record: dict) -> None:
        self.done[task.run_id] = record
        self.flops_done += task.run.flops
        self.clock.note_record(record)

    def update(self, running: list[list[Task]], waiting: list[list[Task]]) -> None:
        if not self.progress or time.monotonic() - self.last < 0.9 * self.patience():
            return
        self.last = time.monotonic()
        begun, flops_done, waiting = [], self.flops_done, list(waiting)
        for stack in running:
            steps = {}
            for task in stack:
                steps[task.run_id], seconds = self.folder.progress(task.run_id)
                per_step = task.run.flops / task.run.train.max_steps
                self.clock.note(task.run_id, per_step, steps[task.run_id], seconds)
                flops_done += steps[task.run_id] * per_step
            if any(steps.values()) or len(begun) < self.workers:
                begun.append((stack, steps))
            else:
                waiting.append(stack)
        left = None
        if self.clock.seen:
            ahead = [sum(self.clock.seconds(task.run) for task in stack) for stack in waiting]
            now = [sum(self.clock.seconds(t.run, steps[t.run_id]) for t in stack) for stack, steps in begun]
            left = _makespan(now, ahead, self.workers)
        words = f"{len(self.done)} of {_told_runs(len(self.todo))}"
        share = f"{100 * flops_done / self.flops:.0f} % of the work"
        share += f", {_told_time(left)} left" if left is not None else ""
        if self.bar is None:
            self.say(f"{words}, {share}")
        else:
            self.bar.n = flops_done
            self.bar.set_description_str(f"sweep: {words}", refresh=False)
            self.bar.set_postfix_str(share)

    def end(self, found: dict[str, dict]) -> None:
        if self.bar is not None:
            self.bar.close()
        if not self.progress:
            return
        if self.done:
            self.say(f"{_told_runs(len(self.done))} trained in {_told_time(time.monotonic() - self.began)}")
        for status, remark in (("diverged", ""), ("failed", "; the next sweep tries again")):
            of_it = [record for record in found.values() if record["status"] == status]
            if of_it:
                self.say(f"{_told_runs(len(of_it))} {status}, the first: {of_it[0]['reason']}{remark}")
        if told := revisions_told(record.get("numerics_revision") for record in found.values()):
            self.say(told)

    def interrupted(self) -> None:
        if self.bar is not None:
            self.bar.close()
        kept = sum(_is_result(self.folder.record(task.run_id)) for task in self.todo)
        self.say(f"interrupted with {kept} of {_told_runs(len(self.todo))} recorded; a second start goes on from there")


def _plan(folder: Folder, asked: list[Run], tasks: list[Task | None], found: dict, workers: int) -> pandas.DataFrame:
    """The table and the words of a dry run."""
    import pandas

    clock = _Clock()
    for path in folder.runs.glob("*.json"):
        clock.note_record(read_record(path))
    todo: dict[str, Run] = {}
    names = []
    for run, task in zip(asked, tasks, strict=True):
        names.append(task.run_id if task else files.canonical_json({**run.to_dict(), "tags": None}))
        if not (task and _is_result(found[task.run_id])):
            todo[names[-1]] = run
    if todo and not clock.seen:
        ordered = sorted(todo.values(), key=lambda run: run.flops / run.train.max_steps)
        for run in (ordered[0], ordered[-1]):
            flops = run.flops / run.train.max_steps
            clock.note(str(flops), flops, 1, _seconds_per_step(run))
    rows = []
    for name, run, task in zip(names, asked, tasks, strict=True):
        row = {"run_id": task.run_id if task else None, "status": "to train", "flops": run.flops}
        row["seconds"] = clock.seconds(run) if name in todo else 0.0
        if name not in todo:
            row["status"] = found[task.run_id]["status"]
        rows.append({**row, **run.data.to_dict(), **run.model.to_dict(), **run.train.to_dict(), **run.tags})
    longest_first = sorted((clock.seconds(run) for run in todo.values()), reverse=True)
    total = _makespan([], longest_first, min(workers, len(todo))) if todo else 0.0
    flops = sum(run.flops for run in todo.values())
    print(
        f"sweep: {_told_runs(len(set(names)))}, {len(set(names)) - len(todo)} recorded, {len(todo)} to train: "
        f"{flops:.3g} FLOPs, about {_told_time(total)} with {workers} worker{'s' if workers > 1 else ''}",
        flush=True,
    )
    frame = pandas.DataFrame(rows)
    frame.attrs["seconds"] = total
    return frame


def _seconds_per_step(run: Run) -> float:
    """Measured here on random tokens, in about a second: a run's share of a small stack. Never compiled for that, which
    would take longer than all else; the step is reckoned to gain what it gained in the probe of this machine."""
    import numpy
    import torch

    from tinylm.train import Trainer, train_together

    threads = torch.get_num_threads()
    try:
        arithmetic = backend.resolve(run.train, run.model, in_stacks=True)
        gain = backend.gain(arithmetic)
        arithmetic |= {"compile": False, "query_blocks": 1}
        train = run.train.resolve(run.model)
        length = 4 * train.windows_per_step * train.seq_len + 1
        tokens = numpy.random.default_rng(0).integers(0, run.model.vocab_size, length).astype(numpy.uint32)
        steps, best, until = 2, float("inf"), None
        while until is None or time.monotonic() < until:
            short = {"max_steps": steps, "warmup_steps": 0, "eval_interval": steps, "eval_tokens": train.seq_len}
            short = train.replace(**short, unique_tokens=None, patience=None)
            height = 3 if arithmetic["stacked"] else 1
            results = train_together(
                [Trainer(run.model, short, tokens, tokens, arithmetic=arithmetic) for _ in range(height)]
            )
            if until is not None:  # the first time everything is cold
                best = min(best, results[0].seconds / results[0].steps)
            until = until or time.monotonic() + 1.0
            steps = 10
        return best / gain
    finally:
        torch.set_num_threads(threads)
