"""Bad days, on purpose: files damaged at random, work killed at random moments, readers fed nonsense. What ``make soak`` does.

``python -m tinylm.study.reliability`` measures these parts, and beside them what must come out alike elsewhere (``agreement``),
into results/reliability. Each part writes its tables when it is measured, and the report is drawn from all tables that stand
there: parts may be measured on different days, and redrawn without measuring (``--only report``). The work is done in a scratch
folder with a cache of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
import typing
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import click
import pandas as pd

from tinylm import backend, checkpoint, corpora, tokenizer
from tinylm.config import DataConfig, ModelConfig, TrainConfig
from tinylm.errors import LabError
from tinylm.study import agreement, forecasts, large_text
from tinylm.study.agreement import Section, of, timeless
from tinylm.study.parameters import repository
from tinylm.study.report import Report, write_table
from tinylm.study.runs import Folder, Run, prepare_corpus, read_record, train_run
from tinylm.study.sweep import CRASHES, GRACE, sweep
from tinylm.words import duration


def write_text(path: Path, lines: int, seed: int = 0) -> Path:
    """A text of made-up words; its line ends make the lab keep a clean copy in its cache."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(150)]
    path.write_bytes("".join(" ".join(rng.choices(words, k=7)) + "\r\n" for _ in range(lines)).encode())
    return path


def tiny_run(text: Path, steps: int, kind: str = "byte", vocab_size: int = 256, **changes: object) -> Run:
    """A run of a fraction of a second for each thousand steps, on the plain path, with frequent checkpoints."""
    model = {"vocab_size": vocab_size, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "max_seq_len": 16}
    train = {"max_steps": steps, "warmup_steps": 2, "batch_size": 4, "eval_interval": max(1, steps // 8), "threads": 1}
    train |= {"eval_tokens": 256, "compile": False, "precision": "fp32", "checkpoint_minutes": 0.005}
    for name, value in changes.items():
        (model if name in ModelConfig.__dataclass_fields__ else train)[name] = value
    return Run(ModelConfig(**model), TrainConfig(**train), DataConfig(str(text), kind))


@contextlib.contextmanager
def own_home(path: Path) -> typing.Iterator[None]:
    """The lab's cache in ``path``, for this process and those it starts."""
    before = os.environ.get("TINYLM_HOME")
    os.environ["TINYLM_HOME"] = str(path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["TINYLM_HOME"]
        else:
            os.environ["TINYLM_HOME"] = before


# Damage to files.

PATIENCE = 60  # seconds after which a reader hangs
GOOD_ENDS = ("refused", "made anew", "read as before")


@dataclasses.dataclass(frozen=True)
class Specimen:
    """A file of the lab that is to be damaged, and how it is read: ``read()`` gives what must never come out differently."""

    kind: str
    path: Path
    read: Callable[[], object]


def specimens(folder: Path) -> list[Specimen]:
    """A finished run with its model, one that was stopped, a sealed forecast and the cache behind them, all in ``folder``:
    each file, with its reader. To be called and read within ``own_home``."""
    run = tiny_run(write_text(folder / "text.txt", 300), 4, "bpe", 300)
    results = folder / "results"
    record = train_run(run, results, keep_model=True)
    stopped = _stopped(run, folder / "stopped")
    target = {"params_total": 1, "tokens": 1, "learning_rate": 0.1, "run_id": "a"}
    prediction = {"loss": 2.5, "low": 2.25, "high": 2.75}
    seal = forecasts.seal(folder / "seals", study="soak", target=target, prediction=prediction, fit={"E": 1.0})
    written, model = results / "runs" / f"{record['run_id']}.json", results / record["model_file"]
    found = [
        Specimen("record", written, lambda: read_record(written)),
        Specimen("model", model, lambda: _contents(*checkpoint.load_model(model))),
        Specimen("checkpoint", stopped, lambda: _tensors(*checkpoint.load_state(stopped))),
        Specimen("sealed forecast", seal, lambda: forecasts.load(folder / "seals").to_dict("list")),
    ]
    for kind in ("arithmetic", "corpora"):
        shared = results / f"{kind}.json"
        found.append(Specimen("a folder's shared file", shared, lambda kind=kind: Folder(results).shared(kind)))
    kinds = {"maps": "token map", "tokenizers": "tokenizer", "texts": "clean copy of a text"}
    home = Path(os.environ["TINYLM_HOME"])
    for path in sorted(path for path in home.rglob("*") if path.is_file()):
        kind = "note of the cache" if path.suffix == ".json" else kinds[path.relative_to(home).parts[0]]
        found.append(Specimen(kind, path, lambda: _prepared(run)))
    return found


def _stopped(run: Run, folder: Path) -> Path:
    """The checkpoint of a run that was stopped at its first evaluation."""
    from tinylm.train import Trainer

    corpus = prepare_corpus(run)
    trainer = Trainer(run.model, run.train, corpus.train, corpus.val, checkpoint_dir=folder)
    trainer.on_eval = lambda point: trainer.request_stop()
    trainer.run()
    return trainer.checkpoint


def _tensors(tensors: dict, meta: dict) -> object:
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}, meta


def _contents(model: typing.Any, learned: typing.Any, metadata: dict) -> object:
    weights = {name: weight.detach().numpy().tobytes() for name, weight in model.named_parameters()}
    return weights, model.config, learned.to_bytes(), metadata


def _prepared(run: Run) -> object:
    tokenizer._hashed.clear()  # as in a process of its own
    data = run.data
    corpus = corpora.prepare(data.text, data.tokenizer, run.model.vocab_size, progress=False)
    return corpus.identity, corpus.bytes, [getattr(corpus, split).tobytes() for split in corpora.SPLITS]


def damage(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """The name of a way to spoil a file, and the file spoilt in it, never as it was."""
    while True:
        way = rng.choice(("truncated", "a bit flipped", "overwritten", "zeros in it", "longer", "emptied"))
        at, spoilt = rng.randrange(len(data)), bytearray(data)
        span = min(len(data) - at, rng.choice((1, 4, 64, 512)))
        if way == "truncated":
            del spoilt[at:]
        elif way == "a bit flipped":
            spoilt[at] ^= 1 << rng.randrange(8)
        elif way == "overwritten":
            spoilt[at : at + span] = rng.randbytes(span)
        elif way == "zeros in it":
            spoilt[at : at + span] = bytes(span)
        elif way == "longer":
            spoilt += rng.randbytes(span)
        else:
            spoilt.clear()
        if spoilt != data:
            return way, bytes(spoilt)


def outcome(specimen: Specimen, spoilt: bytes, as_it_should: object, untouched: bool) -> tuple[str, str]:
    """What reading a spoilt file came to, and its words. The file is put back afterwards.

    One of ``GOOD_ENDS``, or: ``believed`` for other numbers, ``broke`` for an error that no person is meant to read,
    ``hung``. untouched: leave the time of change as it was, as a failing disk does.
    """
    path, good, status = specimen.path, specimen.path.read_bytes(), specimen.path.stat()
    path.write_bytes(spoilt)
    if untouched:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    try:
        with _at_most(PATIENCE):
            value = specimen.read()
        if value != as_it_should:
            return "believed", "other numbers"
        return ("read as before" if path.read_bytes() == spoilt else "made anew"), ""
    except LabError as error:
        return "refused", str(error)
    except _HungError:
        return "hung", f"for {PATIENCE} s"
    except Exception as error:
        return "broke", f"{type(error).__name__}: {error}"
    finally:
        if path.read_bytes() != good:
            path.write_bytes(good)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


class _HungError(BaseException):
    """A reader that did not come to an end; no ``except Exception`` of its own may hide it."""


@contextlib.contextmanager
def _at_most(seconds: int) -> typing.Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(number: int, frame: types.FrameType | None) -> None:
        raise _HungError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # again each second: a destructor would swallow a single ring
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def damages(folder: Path, count: int, seed: int = 0) -> pd.DataFrame:
    """Damage files of all kinds in turn, ``count`` times, one row each: kind, file, way, outcome, words."""
    rng = random.Random(seed)
    rows = []
    with own_home(folder / "home"):
        by_kind: dict[str, list[Specimen]] = {}
        for specimen in specimens(folder):
            by_kind.setdefault(specimen.kind, []).append(specimen)
        known: dict[Path, object] = {}
        for number in range(count):
            specimen = rng.choice(list(by_kind.values())[number % len(by_kind)])
            if specimen.path not in known:
                known[specimen.path] = specimen.read()
            way, spoilt = damage(specimen.path.read_bytes(), rng)
            end, words = outcome(specimen, spoilt, known[specimen.path], untouched=rng.random() < 0.5)
            name = specimen.path.relative_to(folder).as_posix()
            rows.append({"kind": specimen.kind, "file": name, "way": way, "outcome": end, "words": words})
    return pd.DataFrame(rows)


# Kills.

EARLY = 0.2  # share of the moments that are drawn from the time before the first step, while things start
WAYS = {  # how work is ended, and by whom
    "SIGKILL to all": ("sweep", "run"),
    "SIGKILL to the parent": ("sweep",),
    "SIGTERM": ("sweep", "run"),
    "Ctrl-C twice": ("sweep", "run"),
    "SIGKILL to a worker": ("sweep",),
}


def asked(kind: str, text: Path) -> list[Run]:
    """The runs of a sweep of some seconds (two shapes, several lengths, one that diverges), or one long run."""
    if kind == "run":
        return [tiny_run(text, 2500, dropout=0.1, hidden_size=16)]
    steps = (900, 700, 600, 500, 300, 200)
    runs = [tiny_run(text, many, seed=seed, hidden_size=8 * (1 + seed % 2)) for seed, many in enumerate(steps)]
    return [*runs, tiny_run(text, 60, learning_rate=1e20)]


def work(kind: str, folder: Path, text: Path) -> None:
    """What is killed: train what is asked, two at a time, and keep the models."""
    if kind == "run":
        train_run(asked(kind, text)[0], folder, keep_model=True)
    else:
        sweep(asked(kind, text), folder, workers=2, keep_models=True)


class Work:
    """``work`` in a process group of its own, as a terminal starts it; ``said`` is the file with its output."""

    def __init__(self, kind: str, folder: Path, text: Path):
        self.kind, self.folder, self.said = kind, folder, folder.parent / f"{folder.name}.out"
        self.began, self.records = time.monotonic(), set(_records(folder))
        self._wall, self.struck = time.time(), 0  # struck: how many of its workers were killed
        command = [sys.executable, "-m", "tinylm.study.reliability", "--work", kind, str(folder), str(text)]
        with self.said.open("ab") as out:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [
                    str(repository()), os.environ.get("PYTHONPATH")]))},
            )  # fmt: skip

    def __enter__(self) -> Work:
        return self

    def __exit__(self, *error: object) -> None:
        if not self.ended():
            self.kill("SIGKILL to all", random.Random())

    def is_training(self) -> bool:
        """Whether anything on disk shows that a step was made since the start."""
        if set(_records(self.folder)) != self.records:
            return True
        with contextlib.suppress(OSError):
            return any(path.stat().st_mtime > self._wall for path in self.folder.glob(".checkpoints/*.progress"))
        return False

    def ended(self) -> bool:
        return self.process.poll() is not None

    def wait(self, until: Callable[[], bool], seconds: float) -> bool:
        """Wait until something holds, the work ends or the time is over; whether it holds."""
        stop = time.monotonic() + seconds
        while not (held := until()) and not self.ended() and time.monotonic() < stop:
            time.sleep(0.01)
        return held

    def kill(self, how: str, rng: random.Random) -> str:
        """End it, or one of its workers; what went wrong with that, in words."""
        members = _family(self.process.pid)
        if how == "SIGKILL to a worker":
            for pid in rng.sample(workers := self.workers(), min(1, len(workers))):
                self.struck += 1
                _send(pid, signal.SIGKILL)
            return ""
        if how == "SIGKILL to all":
            for pid in [self.process.pid, *members]:
                _send(pid, signal.SIGKILL)
        elif how == "Ctrl-C twice":  # a terminal sends it to the whole group
            for pause in (rng.uniform(0, 0.5), 0):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGINT)
                time.sleep(pause)
        else:
            _send(self.process.pid, signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL)
        return self.gone(members)

    def workers(self) -> list[int]:
        return [pid for pid in _family(self.process.pid) if "spawn_main" in _cmdline(pid)]

    def gone(self, members: dict[int, int]) -> str:
        """Wait for the end of all processes, and say which did not come to it; they are killed then."""
        stop = time.monotonic() + 3 * GRACE
        while (left := _alive(members) or ([] if self.ended() else [self.process.pid])) and time.monotonic() < stop:
            self.process.poll()
            time.sleep(0.02)
        for pid in left:
            _send(pid, signal.SIGKILL)
        self.process.wait()
        return f"{len(left)} processes left over" if left else ""

    def words(self) -> str:
        return self.said.read_text(errors="replace")


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _cmdline(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _family(pid: int) -> dict[int, int]:
    """A process and all that descend from it, each with its time of birth, which tells it from a later one of its number."""
    parents, births = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            fields = _stat(int(folder.name))
            if fields[0] != "Z":
                parents[int(folder.name)], births[int(folder.name)] = int(fields[1]), int(fields[19])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {member: births[member] for member in found if member in births}


def _alive(members: dict[int, int]) -> list[int]:
    living = []
    for pid, birth in members.items():
        with contextlib.suppress(OSError, IndexError):
            fields = _stat(pid)
            if fields[0] != "Z" and int(fields[19]) == birth:
                living.append(pid)
    return living


def _records(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "runs").glob("*.json")}


def wrong_on_disk(folder: Path, before: dict[str, bytes]) -> list[str]:
    """What a folder shows that it must not: a finished record lost or written again, a file half written."""
    told, now = [], _records(folder)
    told += [f"{name} was lost" for name in before if name not in now]
    told += [f"{name} was written again" for name in before if name in now and now[name] != before[name]]
    readers = {
        "runs/*.json": read_record,
        "models/*.safetensors": checkpoint.load_model,
        ".checkpoints/*/checkpoint.safetensors": checkpoint.load_state,
    }
    for pattern, read in readers.items():
        for path in sorted(folder.glob(pattern)):
            try:
                read(path)
            except LabError as error:
                told.append(str(error))
    return told


def differs(folder: Path, calm: Path) -> list[str]:
    """In what the ends of killed work differ from those of work that nobody disturbed."""
    told = []
    if (names := set(_records(folder))) != set(_records(calm)):
        return [f"{len(names)} records instead of {len(_records(calm))}"]
    for name in sorted(names):
        mine, theirs = (timeless(read_record(place / "runs" / name)) for place in (folder, calm))
        told += [f"{name}: another {key}" for key in theirs if mine.get(key) != theirs[key]]
    models = [{path.name: path.read_bytes() for path in place.glob("models/*")} for place in (folder, calm)]
    told += [] if models[0] == models[1] else ["other models"]
    told += ["a checkpoint is left over"] if list(folder.glob(".checkpoints/*/*")) else []
    return told


@dataclasses.dataclass(frozen=True)
class Calm:
    """Work that nobody disturbed: its folder, seconds until the first step and from there to the end."""

    folder: Path
    start: float
    rest: float


def undisturbed(kind: str, folder: Path, text: Path) -> Calm:
    with Work(kind, folder, text) as calm:
        calm.wait(calm.is_training, 600)
        start = time.monotonic() - calm.began
        calm.wait(lambda: False, 1800)
    if calm.process.poll() != 0:
        raise LabError("Work that nobody disturbs must end well", calm.words()[-2000:], "mend what is said there")
    return Calm(folder, start, time.monotonic() - calm.began - start)


def kills(folder: Path, count: int, seed: int = 0, each: int = 5, say: Callable[[str], object] = print) -> pd.DataFrame:
    """End a sweep and a long run at ``count`` random moments, ``each`` of them one after another in one folder, and let them
    go on; one row each: work, way, seconds after the start, records by then, and what was wrong (empty where nothing).

    Runs on Linux, where processes are found in /proc. A share ``EARLY`` of the moments is drawn soon after each start.
    """
    rng = random.Random(seed)
    rows: list[dict] = []
    with own_home(folder / "home"):
        text = write_text(folder / "text.txt", 400)
        calm = {kind: undisturbed(kind, folder / f"calm-{kind}", text) for kind in ("sweep", "run")}
        for number in itertools.count():
            if len(rows) >= count:
                break
            kind = ("sweep", "run")[number % 2]
            place, moments = folder / f"{kind}-{number}", min(each, count - len(rows))
            told = _one_after_another(kind, place, text, calm[kind], moments, rng)
            shutil.rmtree(place)
            rows += [{"number": len(rows) + at, "work": kind, **row} for at, row in enumerate(told)]
            wrong = sum(bool(row["wrong"]) for row in rows)
            say(f"{len(rows)} of {count} moments, {wrong} with something wrong")
            for row in told:
                if row["wrong"]:
                    say(f"  {kind}, {row['way']} after {row['seconds']:.1f} s: {row['wrong']}")
    return pd.DataFrame(rows)


def _one_after_another(kind: str, place: Path, text: Path, calm: Calm, moments: int, rng: random.Random) -> list[dict]:
    """The rows of some moments in one folder, and of its end, which counts to the last of them."""
    rows: list[dict] = []
    before: dict[str, bytes] = {}
    while True:
        with Work(kind, place, text) as now:
            while len(rows) < moments and (row := _moment(now, calm, before, rng)):
                rows.append(row)
                if now.ended():
                    break
            else:  # no moment is left, or it was faster
                now.wait(lambda: False, 1800)
                if now.process.poll() == 0:
                    wrong = wrong_on_disk(place, before) + differs(place, calm.folder)
                else:
                    wrong = [f"it ended with {now.process.poll()}: {now.words()[-500:]}"]
                if not rows and not wrong:  # too fast to be killed even once: anew, and sooner
                    shutil.rmtree(place)
                    calm = dataclasses.replace(calm, rest=0.5 * calm.rest)
                    continue
                rows = rows or [{"way": "none", "seconds": 0.0, "records": len(_records(place)), "wrong": ""}]
                rows[-1]["wrong"] = "; ".join(filter(None, [rows[-1]["wrong"], *wrong]))
                return rows
        before = _records(place)


def _moment(now: Work, calm: Calm, before: dict[str, bytes], rng: random.Random) -> dict | None:
    """Wait for a random moment of the work and do to it what is drawn; None where it ended before."""
    early = rng.random() < EARLY
    pause = rng.uniform(0, calm.start if early else 0.6 * calm.rest)
    if not early and not now.wait(now.is_training, 600):
        return None
    until = time.monotonic() + pause
    if not now.wait(lambda: time.monotonic() >= until, 600) or len(_records(now.folder)) >= len(_records(calm.folder)):
        return None  # nothing is left to be disturbed
    ways = [way for way, works in WAYS.items() if now.kind in works]
    if now.struck == CRASHES - 1 or not now.workers():  # more, and the sweep would give a run up, as it should
        ways = [way for way in ways if way != "SIGKILL to a worker"]
    way = rng.choice(ways)
    seconds, left_over = time.monotonic() - now.began, now.kill(way, rng)
    wrong = [left_over] if left_over else []
    if way != "SIGKILL to a worker":  # which the sweep goes on without
        wrong += wrong_on_disk(now.folder, before)
    return {"way": way, "seconds": seconds, "records": len(_records(now.folder)), "wrong": "; ".join(wrong)}


# The fuzzers.


def fuzz(examples: int, folder: Path) -> pd.DataFrame | None:
    """Feed each reader that many examples, by tests/test_fuzz.py; None where the tests are not at hand. Columns: reader,
    examples, seconds, wrong. Where a test fails, what it says is printed, and a failure of no reader has a row of its own."""
    tests = repository() / "tests" / "test_fuzz.py"
    if not tests.exists():
        return None
    log = folder / "fuzz.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    known = {"TINYLM_FUZZ_EXAMPLES": str(examples), "TINYLM_FUZZ_LOG": str(log)}
    done = subprocess.run(
        command, cwd=repository(), env={**os.environ, **known}, capture_output=True, text=True, check=False
    )
    if not log.exists():
        raise LabError("The fuzzers must run", done.stdout[-2000:] + done.stderr[-2000:], "mend what is said there")
    rows = json.loads(log.read_text())
    if done.returncode:
        print(done.stdout[-5000:], done.stderr[-1000:])
        if not any(row["wrong"] for row in rows):
            rows.append({"reader": "other checks", "examples": 1, "seconds": 0.0, "wrong": 1})
    return pd.DataFrame(rows)


# The report, from the tables that stand.


def keep(folder: Path, part: str, tables: dict[str, pd.DataFrame], seconds: float, seed: int) -> None:
    """Write the tables of a part that was measured, and into ``made`` when and on what; what other parts left stays."""
    for name, rows in tables.items():
        write_table(folder / "tables" / f"{name}.csv", rows)
    machine, day = backend.machine(), datetime.datetime.now(datetime.UTC).date().isoformat()
    made = {"part": part, "day": day, "seconds": seconds, "seed": seed, "processor": machine["cpu"]}
    made |= {"threads": os.cpu_count(), "torch": machine["torch"]}
    before = _standing(folder, "made")
    rows = [] if before is None else [row for row in before.to_dict("records") if row["part"] != part]
    write_table(folder / "tables" / "made.csv", pd.DataFrame([*rows, made]))


def _standing(folder: Path, name: str) -> pd.DataFrame | None:
    path = folder / "tables" / f"{name}.csv"
    if not path.exists():
        return None
    rows = pd.read_csv(path)
    for words in {"wrong", "differs"} & set(rows):  # where nothing is wrong they are empty, and no missing numbers
        rows[words] = rows[words].astype(object).where(rows[words].notna(), "")
    return rows


def draw(folder: Path) -> Path:
    """README.md of what the tables in ``folder`` tell. Raises LabError where there are none."""
    found = {name: rows for name in SECTIONS if (rows := _standing(folder, name)) is not None}
    if not found:
        raise LabError("A report needs tables", f"none in {folder / 'tables'}", "measure some part first")
    report = Report(folder, "Reliability: bad days, and the same numbers elsewhere")
    with contextlib.redirect_stdout(io.StringIO()):  # outside a notebook what a report displays would be printed
        report.summary("\n".join(f"- {SECTIONS[name].sentence(rows)}" for name, rows in found.items()))
        for name, rows in found.items():
            SECTIONS[name].tell(report, rows)
        report.section("How this was made")
        report.text(
            "By `make soak`, or part by part: `make soak ONLY=kills,fuzz`, and the large text with `ONLY=large-text` alone. Other "
            "seeds give other moments and other damages."
        )
        if (made := _standing(folder, "made")) is not None:
            specs = {"part": "", "day": "", "seconds": ",.0f", "seed": "d"}
            specs |= {"processor": "", "threads": "d", "torch": ""}
            report.table(made, "made", "When each part was measured last, how long that took, and on what.", **specs)
        return report.write()


def _say_kills(rows: pd.DataFrame) -> str:
    good = int((rows["wrong"] == "").sum())
    end = "; what was wrong after the others stands below."
    if good == len(rows):
        end = ": nothing finished lost or trained again, nothing half written believed, and the end bit-equal to undisturbed work."
    return f"{of(good, len(rows))} random moments of a sweep and of a long run survived{end}"


def _tell_kills(report: Report, rows: pd.DataFrame) -> None:
    report.section("Work that is killed")
    report.text(
        "A sweep of two worker processes and one long run, each started, ended at a random moment and started again, several "
        "times in one folder. After each end every record, model and checkpoint on disk is read, and no process may be left "
        "over; at last records and models are compared, bit for bit, with those of work that nobody disturbed, and what is "
        f"wrong then counts to the last moment in that folder. About {EARLY:.0%} of the moments are drawn from the time that "
        "things take to start, when little can be lost yet."
    )
    table = rows.groupby(["work", "way"], as_index=False).agg(
        moments=("way", "size"), survived=("wrong", lambda wrong: int((wrong == "").sum())),
        earliest=("seconds", "min"), latest=("seconds", "max"),
    )  # fmt: skip
    specs = {"work": "", "way": "", "moments": ",d", "survived": ",d", "earliest": ".1f", "latest": ".1f"}
    report.table(table, "kills", "Moments by work and way; earliest, latest: seconds after the start.", **specs)
    write_table(report.folder / "tables" / "moments.csv", rows)
    report.text("Every moment, in order, stands in [moments.csv](tables/moments.csv).")
    (report.folder / "tables" / "not_survived.csv").unlink(missing_ok=True)  # of an earlier measurement
    lost = rows[rows["wrong"] != ""]
    if len(lost):
        specs = {"number": "d", "work": "", "way": "", "seconds": ".1f", "wrong": ""}
        report.table(lost, "not_survived", "Moments that were not survived, and what was wrong.", **specs)


def by_kind(rows: pd.DataFrame) -> pd.DataFrame:
    """Of ``damages``: one row a kind of file, how often it was damaged and how often reading it came to each outcome."""
    ends = [*GOOD_ENDS, *sorted(set(rows["outcome"]) - set(GOOD_ENDS))]
    counted = {kind: Counter(part["outcome"]) for kind, part in rows.groupby("kind")}
    return pd.DataFrame([{"file": kind, "damages": found.total(), **{end: found[end] for end in ends}}
                         for kind, found in counted.items()])  # fmt: skip


def _unhandled(rows: pd.DataFrame) -> int:
    return int(rows["damages"].sum() - rows[list(GOOD_ENDS)].to_numpy().sum())


def _say_damages(rows: pd.DataFrame) -> str:
    count, bad = int(rows["damages"].sum()), _unhandled(rows)
    end = ": refused with the way out, made anew, or read as before the damage; none used with other numbers."
    return f"{of(count - bad, count)} damaged files handled{'; the others stand below.' if bad else end}"


def _tell_damages(report: Report, rows: pd.DataFrame) -> None:
    report.section("Files that are damaged")
    report.text(
        "Files of a finished run, of a stopped one and of the cache are truncated, emptied, lengthened, overwritten or flipped in "
        "one bit, at random places; in half of the cases the time of change stays as it was, as when a disk fails. Read as before: "
        "the damage changed nothing that is read, such as a line end."
    )
    specs = {name: "" if name == "file" else ",d" for name in rows.columns}
    report.table(rows, "damages", "What reading a damaged file came to, by kind of file.", **specs)


def _say_fuzz(rows: pd.DataFrame) -> str:
    return (
        f"{int(rows['examples'].sum()):,} readings of generated input by {len(rows)} readers in {duration(rows['seconds'].sum())}; "
        f"readers that gave an error that no person is meant to read, or came to no end: {int(rows['wrong'].sum())}."
    )


def _tell_fuzz(report: Report, rows: pd.DataFrame) -> None:
    report.section("Readers that are fed nonsense")
    report.text(
        "Each reader gets generated input (text in any encoding, JSON of any shape, tables, parameters) and may only give a value "
        "or an error that is meant for a person."
    )
    specs = {"reader": "", "examples": ",d", "seconds": ",.0f", "wrong": ",d"}
    report.table(rows, "fuzz", "Examples by reader; wrong: 1 where there was any other error, or no end.", **specs)


def _tell_large_text(report: Report, rows: pd.DataFrame) -> None:
    report.section("A text larger than memory")
    report.text(
        "`python -m tinylm.study.large_text`: generated texts, each in a process of its own that tokenises it as a stream and "
        "trains on its memory-mapped ids. Peak: the most that the process held. Beside it stand what was its own at the end and "
        "the pages of mapped files, which the system may take back."
    )
    specs = {"text_mb": ",.0f", "prepare_mb_per_second": ".1f", "prepare_peak_mb": ",.0f"}
    specs |= {"train_tokens_per_second": ",.0f", "train_tokens_per_cpu_second": ",.0f"}
    specs |= {"train_peak_mb": ",.0f", "own_mb": ",.0f", "mapped_mb": ",.0f"}
    report.table(rows, "large_text", "By MB of text: preparing and training, their speed and their memory.", **specs)


# By the name of the table that each is drawn from, in the order of the report.
SECTIONS = {
    "moments": Section(_say_kills, _tell_kills, lambda rows: int((rows["wrong"] != "").sum())),
    "damages": Section(_say_damages, _tell_damages, _unhandled),
    "fuzz": Section(_say_fuzz, _tell_fuzz, lambda rows: int(rows["wrong"].sum())),
    **agreement.SECTIONS,
    "large_text": Section(lambda rows: large_text.sentence(rows.to_dict("records")), _tell_large_text, lambda rows: 0),
}
# What may be measured, in that order: first what is timed, while nothing before it has left the machine warm.
PARTS = ("ranks", "exchange", "cluster", "damages", "fuzz", "kills", "large-text")


def _chosen(only: str | None) -> list[str]:
    names = [name.strip() for name in only.split(",")] if only else [name for name in PARTS if name != "large-text"]
    if unknown := [name for name in names if name not in (*PARTS, "report")]:
        raise LabError("A part goes by its name", ", ".join(unknown), f"the names are {', '.join(PARTS)} and report")
    return [name for name in PARTS if name in names]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", metavar="PARTS", help=f"Of {', '.join(PARTS)}; by default all but the last. report: draw anew.")
@click.option("--kills", "moments", type=int, default=200, show_default=True, help="Random moments; 0 is none.")
@click.option("--damages", "files", type=int, default=1000, show_default=True, help="Damaged files; 0 is none.")
@click.option("--examples", type=int, default=2000, show_default=True, help="Generated inputs a reader; 0 is none.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of moments and damages.")
@click.option("--results-dir", type=click.Path(path_type=Path), help="By default results/reliability.")
@click.option("--work", "killed", nargs=3, type=str, hidden=True, help="What is killed: its kind, folder and text.")
def main(
    only: str | None, moments: int, files: int, examples: int, seed: int, results_dir: Path | None, killed: tuple | None
) -> None:
    """Kill work, damage files, feed readers nonsense and compare what must come out alike; write what came of it. Takes about
    an hour or two."""
    try:
        if killed:
            work(killed[0], Path(killed[1]), Path(killed[2]))
        else:
            counts = {"kills": moments, "damages": files, "fuzz": examples}
            folder = results_dir or repository() / "results" / "reliability"
            sys.exit(1 if soak([name for name in _chosen(only) if counts.get(name, 1)], folder, counts, seed) else 0)
    except LabError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def soak(parts: list[str], folder: Path, counts: dict[str, int], seed: int) -> int:
    """Measure parts, keep the tables of each, and draw the report of all that stand; how much was wrong. counts: of kills,
    damages and examples."""
    measures: dict[str, Callable[[Path, Path], dict[str, pd.DataFrame | None]]] = {
        "ranks": lambda place, text: {
            "pace": agreement.pace(place, say=click.echo),
            "ranks": agreement.ranks(place, text),
        },
        "exchange": lambda place, text: {
            "exchange": agreement.exchange(place, sorted(repository().glob("results/*/models/best.safetensors")))
        },
        "cluster": lambda place, text: {"cluster": agreement.cluster(place, asked("sweep", text))},
        "damages": lambda place, text: {"damages": by_kind(damages(place, counts["damages"], seed))},
        "fuzz": lambda place, text: {"fuzz": fuzz(counts["fuzz"], place)},
        "kills": lambda place, text: {"moments": kills(place, counts["kills"], seed, say=click.echo)},
        "large-text": lambda place, text: {"large_text": pd.DataFrame(large_text.measure(large_text.SIZES))},
    }
    wrong = 0
    for part in parts:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="tinylm-soak-") as scratch, contextlib.ExitStack() as stack:
            if part != "large-text":  # which takes its room in the lab's own cache
                stack.enter_context(own_home(Path(scratch) / "home"))
            found = measures[part](Path(scratch), write_text(Path(scratch) / "words.txt", 4000))
        tables = {name: rows for name, rows in found.items() if rows is not None}
        if tables:
            keep(folder, part, tables, time.monotonic() - began, seed)
        for name, rows in tables.items():
            click.echo(SECTIONS[name].sentence(rows).replace("**", ""))
            wrong += SECTIONS[name].wrong(rows)
    click.echo(f"report: {draw(folder)}")
    return wrong


if __name__ == "__main__":
    main()
