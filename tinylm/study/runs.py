"""A run: what decides its numbers, its record on disk, and all records of a folder as one table.

A results folder holds one JSON a run (``runs/<run_id>.json``), the models that were kept
(``models/<run_id>.safetensors``), and two small files about what its runs share: ``arithmetic.json`` (the machine that
trains here, and how it resolved each train config) and ``corpora.json`` (what each text was when first prepared).
With these a study can be redrawn on any machine, without its text, while nothing that another machine's arithmetic
computed is ever mixed in.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import os
import platform
import shutil
import sys
import threading
import time
import traceback
import typing
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tinylm import counts, files
from tinylm.config import DataConfig, ModelConfig, TrainConfig
from tinylm.errors import ConfigError, DamagedFileError, LabError, TextError
from tinylm.ranks import ALONE, LostProcess, Ranks

if typing.TYPE_CHECKING:
    import pandas

try:
    import fcntl
except ImportError:  # Windows has no flock: two sweeps in one folder may then train a run twice, to the same record
    fcntl = None

SCHEMA = 1
RESULTS = ("finished", "early_stopped", "diverged")  # statuses that are never trained again; "failed" is
NO_NUMBER = ("device", "threads", "compile", "precision", "checkpoint_minutes")  # of TrainConfig; see identity()
ASKED = ("device", "precision", "compile", "threads")  # what a run asks of the arithmetic

NUMBERS = (
    *("params_total", "params_non_embedding", "params_embedding", "params_head", "flops", "flops_6nd", "steps"),
    *("tokens_seen", "unique_tokens", "epochs", "val_loss", "val_bpb", "train_loss", "best_val_loss", "best_step"),
    *("seconds", "tokens_per_second"),
)
_LEADING = (
    *("run_id", "status", "hidden_size", "num_layers", "params_total", "params_non_embedding", "params_embedding"),
    *("params_head", "flops", "flops_6nd", "tokens_seen", "unique_tokens", "epochs", "learning_rate", "batch_size"),
    *("max_steps", "seed", "val_loss", "val_bpb", "train_loss", "best_val_loss", "best_step", "steps", "seconds"),
    *("tokens_per_second", "reason"),
)
_CONFIG = tuple(f.name for cls in (ModelConfig, TrainConfig, DataConfig) for f in dataclasses.fields(cls))
COLUMNS = tuple(dict.fromkeys((*_LEADING, *_CONFIG, "started", "finished", "model_file", "numerics_revision")))


class OtherSchemaError(DamagedFileError):
    """A whole file of ours that another version of tinylm wrote, in a layout that this one does not read."""


@dataclass(frozen=True)
class Run:
    """One training run asked for. tags: names and plain values that a study groups its table by; they decide no number
    and are no part of the identity."""

    model: ModelConfig
    train: TrainConfig
    data: DataConfig = field(default_factory=DataConfig)
    tags: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.train.resolve(self.model)  # checks the one against the other before any work starts
        tags = {name: value.item() if hasattr(value, "item") else value for name, value in self.tags.items()}
        object.__setattr__(self, "tags", tags)  # numpy's numbers as Python's, and no dict of anyone else's
        for name, value in tags.items():
            if not isinstance(name, str) or name in COLUMNS:
                raise ConfigError(
                    "a tag's name must be text, and none of the table's own columns",
                    f"tags={{{name!r}: {value!r}}}",
                    "choose another name for the tag",
                )
            if not isinstance(value, (str, int, float, bool, type(None))):
                raise ConfigError(
                    "a tag's value must be text, a number, true, false or nothing",
                    f"tags={{{name!r}: {value!r}}}",
                    "turn the value into text",
                )

    def to_dict(self) -> dict:
        return {
            "model": self.model.to_dict(),
            "train": self.train.to_dict(),
            "data": self.data.to_dict(),
            "tags": dict(self.tags),
        }

    @classmethod
    def from_dict(cls, values: dict) -> Run:
        return cls(
            ModelConfig.from_dict(values["model"]),
            TrainConfig.from_dict(values["train"]),
            DataConfig.from_dict(values["data"]),
            dict(values.get("tags", {})),
        )

    @property
    def corpus_key(self) -> dict:
        """What is asked of ``corpora.prepare``: the text by name or path, its damage, and the tokenizer."""
        return {**self.data.to_dict(), "vocab_size": self.model.vocab_size}

    @property
    def flops(self) -> int:
        """Exact FLOPs of all max_steps steps (see ``counts``)."""
        return counts.train_flops(self.model, self.train)


def identity(run: Run, corpus_identity: dict, arithmetic: dict, revision: int | None = None) -> str:
    """64 hex digits: SHA-256 over everything that decides a run's numbers, and nothing else.

    That is the resolved configs, the corpus by content (text and tokenizer hashes and the split, not the name or path),
    the arithmetic as ``backend.resolve`` gave it, and the numerics revision (None: that of this version). Where and how
    fast a run is computed (device, threads, compile, precision) enters through the arithmetic alone; checkpoints and
    tags not at all.
    """
    if revision is None:
        from tinylm.backend import NUMERICS_REVISION as revision
    train = run.train.resolve(run.model).identifying()
    parts = {
        "model": run.model.resolve().identifying(),
        "train": {name: value for name, value in train.items() if name not in NO_NUMBER},
        "corpus": {name: value for name, value in corpus_identity.items() if name != "text"},
        "arithmetic": arithmetic,
        "numerics_revision": revision,
    }
    return files.sha256_bytes(files.canonical_json(parts).encode())


# Files of ours: one JSON object, one line an entry, with a schema version and a checksum over its content.


def _plain(value: object) -> object:
    """The value as JSON has it: numpy scalars as Python's, tuples as lists, None for what is no finite number."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _checksum(content: dict) -> str:
    kept = {name: value for name, value in content.items() if name != "checksum"}
    return files.sha256_bytes(files.canonical_json(kept).encode("utf-8", "surrogatepass"))


def _write_checked(path: Path, kind: str, content: dict) -> dict:
    content = {"schema": SCHEMA, "kind": kind, **_plain(content)}
    content["checksum"] = _checksum(content)
    lines = (f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in content.items())
    files.write_whole(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _read_checked(path: Path, kind: str, way_out: str) -> dict:
    """The content of a file that ``_write_checked`` wrote. Raises DamagedFileError with the way out for any other."""

    def refuse(why: str) -> DamagedFileError:
        return DamagedFileError(f"A {kind} file must be whole, as it was written", f"{path}: {why}", way_out)

    try:
        content = json.loads(path.read_bytes().decode("utf-8"), parse_constant=_no_constant)
        checksum = _checksum(content) if isinstance(content, dict) else None
    except (ValueError, RecursionError) as error:
        raise refuse(f"no readable JSON ({error})") from None
    except OSError as error:
        raise LabError(
            f"A {kind} file must be one that can be read",
            f"{path}: {error.strerror}",
            "mend its permissions, or remove it",
        ) from error
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise refuse("a file of another kind")
    if content.get("schema") != SCHEMA:
        raise OtherSchemaError(
            f"This version of tinylm reads schema {SCHEMA} of {kind} files",
            f"{path}: schema {content.get('schema')!r}",
            f"use the version of tinylm that wrote it, or {way_out}",
        )
    if content.get("checksum") != checksum:
        raise refuse("its content does not match its checksum")
    return content


Kept = typing.TypeVar("Kept")
AGAIN = "put it back from a copy, or delete it: the next start of the study makes it anew"


def read_kept(path: str | os.PathLike, read: Callable[[typing.Any], Kept], way_out: str = AGAIN) -> Kept:
    """What ``read`` makes of a small JSON file that a study keeps beside its records: what it timed, counted or wrote once.

    Such files carry no checksum: ``read`` takes what is used of them as the types it must have. Raises DamagedFileError
    with the way out where the file is truncated, no JSON or of another shape, LabError where it cannot be read at all.
    """
    path = Path(path)
    try:
        return read(json.loads(path.read_bytes()))
    except OSError as error:
        raise LabError(
            "A file of a study must be one that can be read", f"{path}: {error.strerror}", way_out
        ) from error
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise DamagedFileError(
            "A file of a study must be as the study wrote it", f"{path}: {error!r}", way_out
        ) from error


def read_record(path: str | os.PathLike) -> dict:
    """One run's record. Raises DamagedFileError for a file that is truncated, altered, renamed or of another schema."""
    path = Path(path)
    way_out = "delete the file: the run will be trained again by the next sweep that asks for it"
    record = _read_checked(path, "run", way_out)
    if record.get("run_id") != path.stem:
        raise DamagedFileError("A record must carry its run's name", f"{path}: run {record.get('run_id')}", way_out)
    return record


def write_record(results_dir: str | os.PathLike, record: dict) -> Path:
    """Write a record whole under its run_id; numbers that are not finite become null. Returns its path."""
    path = Path(results_dir) / "runs" / f"{record['run_id']}.json"
    _write_checked(path, "run", record)
    return path


def load_runs(results_dir: str | os.PathLike, on_damage: str = "raise") -> pandas.DataFrame:
    """All records of a results folder, one row a run, in order of their names. Columns as ``table`` gives them.

    on_damage: ``raise`` stops at a damaged record (or one of another schema), ``skip`` leaves it out with a warning. Runs
    of another numerics revision than this version's are rows like the others, with a warning: ``numerics_revision`` tells
    them apart.
    """
    if on_damage not in ("raise", "skip"):
        raise ConfigError("on_damage must be one of raise, skip", f"on_damage={on_damage!r}", "leave it out to raise")
    folder = Path(results_dir)
    if not folder.is_dir():
        raise LabError("A results folder must exist", folder, "give the folder that a study or a sweep wrote to")
    records = []
    for path in sorted((folder / "runs").glob("*.json")):
        try:
            record = read_record(path)
            _checked_row(record)
            records.append(record)
        except DamagedFileError as error:
            if on_damage == "raise":
                raise
            warnings.warn(f"left out: {error}", stacklevel=2)
    frame = table(records)
    if told := revisions_told(frame["numerics_revision"]):
        warnings.warn(f"{folder}: {told}", stacklevel=2)
    return frame


def revisions_told(revisions: typing.Iterable[object]) -> str:
    """What to know of runs of these numerics revisions, one a run; nothing where all are this version's own."""
    from tinylm.backend import NUMERICS_REVISION

    counted = collections.Counter(map(str, revisions))
    if set(counted) <= {str(NUMERICS_REVISION)}:
        return ""
    many = ", ".join(f"{number} of revision {revision}" for revision, number in sorted(counted.items()))
    told = f"of these runs there are, by numerics, {many}; this version trains by revision {NUMERICS_REVISION}."
    if len(counted) > 1:
        return told + " Those of different revisions were computed differently: do not fit them together."
    return told + " They may be read, drawn and fitted, and not compared with runs of another revision."


def table(records: list[dict], tags: list[dict] | None = None) -> pandas.DataFrame:
    """Records as rows. Loss is in nats per token (``val_bpb`` in bits per byte), ``flops`` are exact training FLOPs of
    the steps done, ``flops_6nd`` is 6 * params_total * tokens_seen (Hoffmann et al. 2022); then come every field of the
    configs as resolved, and the tags (those given, else those recorded)."""
    import pandas

    tags = [record.get("tags", {}) for record in records] if tags is None else tags
    rows = [{**_checked_row(record), **extra} for record, extra in zip(records, tags, strict=True)]
    names = dict.fromkeys(name for extra in tags for name in extra)
    frame = pandas.DataFrame(rows, columns=[*COLUMNS, *names])
    for name in NUMBERS:
        frame[name] = pandas.to_numeric(frame[name])
        if frame[name].isna().all():
            frame[name] = frame[name].astype("float64")
    for (
        name
    ) in names:  # a tag that is text in one study and a number in another is text: elsewhere columns have one type
        kinds = {isinstance(value, str) for value in frame[name] if not pandas.isna(value)}
        if len(kinds) == 2:
            frame[name] = [None if pandas.isna(value) else str(value) for value in frame[name]]
    return frame


def _checked_row(record: dict) -> dict:
    """A record as a row. Raises DamagedFileError for one that is whole and yet holds what no run comes to."""
    try:
        row, tags = _row(record), record.get("tags", {})
        numbers = {name: row.get(name) for name in (*NUMBERS, "numerics_revision")}
        wrong = [name for name, value in numbers.items() if not isinstance(value, (int, float, type(None)))]
        wrong += [name for name, value in tags.items() if not isinstance(value, (str, int, float, type(None)))]
        for value in numbers.values() if not wrong else ():
            float(value or 0)  # OverflowError for a whole number beyond all others
        if wrong:
            raise ValueError(f"{', '.join(map(repr, wrong))} of another type")
        return row
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DamagedFileError(
            "A record must hold what its run was and came to",
            f"run {record.get('run_id')}: {type(error).__name__} {error}",
            "delete the file: the run will be trained again by the next sweep that asks for it",
        ) from error


def _row(record: dict) -> dict:
    parameters = record["parameters"]
    configs = ModelConfig.from_dict(record["model"]), TrainConfig.from_dict(record["train"])
    row = {**record["data"], **configs[0].to_dict(), **configs[1].to_dict()}
    row |= {name: record[name] for name in ("threads", "device")}  # as resolved
    row |= {f"params_{part}": parameters[part] for part in ("total", "non_embedding", "embedding", "head")}
    row |= {name: record.get(name) for name in COLUMNS if name not in row}
    row["unique_tokens"] = record.get("unique_tokens")  # what was seen; the config's field is only a limit
    row["flops_6nd"] = 6 * parameters["total"] * (record.get("tokens_seen") or 0)
    return row


# What the runs of one folder share.


@dataclass(frozen=True)
class Task:
    """A run with everything settled that decides its numbers: all that a worker elsewhere needs. Plain data."""

    run: Run
    identity: str
    corpus: dict  # see about_corpus
    arithmetic: dict
    numerics_revision: int
    results_dir: str
    home: str | None = None
    keep_model: bool = False

    @property
    def run_id(self) -> str:
        return self.identity[:16]


class Folder:
    """A results folder: where its files are, and what its runs share.

    The first run trained in a folder settles its machine (torch, processor, platform). A run that is asked
    for later is looked up under the arithmetic and the corpus noted here, so that finding it needs neither that machine
    nor the text; to train something more, both must still be what they were.
    """

    def __init__(self, results_dir: str | os.PathLike):
        self.path = Path(results_dir).expanduser().absolute()
        self.runs, self.models, self.checkpoints = (self.path / name for name in ("runs", "models", ".checkpoints"))
        self._shared: dict[str, dict | None] = {}

    def shared(self, kind: str) -> dict | None:
        """Content of ``arithmetic.json`` or ``corpora.json``; where it is lost, put together again from the records."""
        if kind not in self._shared:
            path = self.path / f"{kind}.json"
            if path.exists():
                way_out = "delete the file: it is put together again from the records"
                self._shared[kind] = _read_checked(path, kind, way_out)
            else:
                self._shared[kind] = self._from_records(kind)
        return self._shared[kind]

    def _from_records(self, kind: str) -> dict | None:
        records = [read_record(path) for path in sorted(self.runs.glob("*.json"))]
        if not records:
            return None
        if kind == "corpora":
            corpora: list[dict] = []
            for record in records:
                asked = {**record["data"], "vocab_size": record["model"]["vocab_size"]}
                if not _find(corpora, asked):
                    corpora.append({"asked": asked, **record["corpus"]})
            return {"corpora": corpora}
        shared: dict = {}
        for record in records:
            asked = _asked(ModelConfig.from_dict(record["model"]), TrainConfig.from_dict(record["train"]))
            shared = self._with_arithmetic(shared, asked, record["arithmetic"], record["numerics_revision"])
        return shared

    def corpus(self, run: Run) -> dict | None:
        """What this folder knows of a run's corpus: identity, name, bytes and tokens of each split, provenance."""
        return _find((self.shared("corpora") or {}).get("corpora", []), run.corpus_key)

    def task(self, run: Run, home: str | None = None, keep_model: bool = False) -> Task | None:
        """The run as this folder identifies it; None where its arithmetic or its corpus has not been settled here."""
        shared = self.shared("arithmetic")
        known = _find((shared or {}).get("resolved", []), _asked(run.model, run.train))
        corpus = self.corpus(run)
        if known is None or corpus is None:
            return None
        arithmetic, revision = known["arithmetic"], shared["numerics_revision"]
        name = identity(run, corpus["identity"], arithmetic, revision)
        return Task(run, name, corpus, arithmetic, revision, str(self.path), home, keep_model)

    def record(self, run_id: str) -> dict | None:
        """The record of a run, None where there is none."""
        path = self.runs / f"{run_id}.json"
        return read_record(path) if path.exists() else None

    def has_record(self, run_id: str) -> bool:
        return (self.runs / f"{run_id}.json").exists()

    def result(self, run_id: str) -> dict | None:
        """The record of a run that need not be trained (again)."""
        record = self.record(run_id)
        return record if record and record["status"] in RESULTS else None

    def admit(self, runs: list[tuple[Run, typing.Any]]) -> None:
        """Let runs be trained here: note how this machine computes them and what their corpora are.

        runs: pairs of a run and its prepared corpus. Raises LabError where the folder belongs to another machine or
        numerics revision, TextError where a text is not what it was when the folder's runs were trained on it, or is
        too short for a run.
        """
        from tinylm.backend import NUMERICS_REVISION, machine, resolve
        from tinylm.train import TextDataset

        for run, corpus in runs:  # too short a text, or too many unique_tokens, is told before any work
            config = run.train.resolve(run.model)
            data = TextDataset.from_tokens(corpus.train, config.seq_len, config.stride)
            if config.unique_tokens:
                data.subset(config.unique_tokens)
            TextDataset.from_tokens(corpus.val, config.seq_len)
        with self.locked("folder"):
            self._shared.clear()
            arithmetic = dict(self.shared("arithmetic") or {})
            corpora = dict(self.shared("corpora") or {"corpora": []})
            before = files.canonical_json([arithmetic, corpora])
            for run, corpus in runs:
                asked = _asked(run.model, run.train)
                known = _find(arithmetic.get("resolved", []), asked)  # what was picked once for a folder stays
                here = {**known["arithmetic"], "machine": machine(run.train.device)} if known else None
                here = here or resolve(run.train, run.model, in_stacks=True)
                arithmetic = self._with_arithmetic(arithmetic, asked, _plain(here), NUMERICS_REVISION)
                corpora = self._with_corpus(corpora, run, corpus)
            if files.canonical_json([arithmetic, corpora]) != before:
                for kind, content in (("arithmetic", arithmetic), ("corpora", corpora)):
                    kept = {k: v for k, v in content.items() if k not in ("schema", "kind", "checksum")}
                    self._shared[kind] = _write_checked(self.path / f"{kind}.json", kind, kept)

    def _with_arithmetic(self, shared: dict, asked: dict, here: dict, revision: int) -> dict:
        shared = shared or {"numerics_revision": revision, "machine": {}, "resolved": []}
        known = _find(shared["resolved"], asked)
        differ = _differences({"numerics revision": shared["numerics_revision"]}, {"numerics revision": revision})
        differ += _differences(shared["machine"], here["machine"])
        differ += _differences(known["arithmetic"] if known else {}, {**here, "machine": None})
        if differ:
            raise LabError(
                "All runs of one results folder are computed by one arithmetic, so that they can be compared",
                f"{self.path}: {'; '.join(differ)}",
                "choose another results_dir for what is trained here; what this one holds can still be read and drawn",
            )
        if known:
            return shared
        entry = {"asked": asked, "arithmetic": here}
        # A run on a GPU names it beside torch and processor; one on the CPU does not.
        return {**shared, "machine": {**shared["machine"], **here["machine"]}, "resolved": [*shared["resolved"], entry]}

    def _with_corpus(self, shared: dict, run: Run, corpus: typing.Any) -> dict:
        here = {"asked": run.corpus_key, **about_corpus(corpus)}
        known = _find(shared["corpora"], run.corpus_key)
        if known is None:
            return {**shared, "corpora": [*shared["corpora"], here]}
        self._same_text(run, known["identity"], here["identity"])
        return shared

    def _same_text(self, run: Run, there: dict, here: dict) -> None:
        differ = [name for name in here if name != "text" and here[name] != there.get(name)]
        if differ:
            raise TextError(
                "A results folder keeps to the text that its runs were trained on",
                f"{run.data.text} has changed since {self.path} was begun ({', '.join(differ)})",
                "give another results_dir for the new text, or put the old text back",
            )

    def check_own_text(self, run: Run) -> None:
        """Raises TextError where a run's text is a file that is here, but not the one this folder knows by its path."""
        from tinylm import corpora

        known = self.corpus(run)
        if known and run.data.text not in corpora.NAMES and Path(run.data.text).expanduser().exists():
            text = corpora.load(run.data.text, field=run.data.field)
            self._same_text(run, known["identity"], {"text_sha256": text.sha256})

    @contextlib.contextmanager
    def locked(self, name: str) -> typing.Iterator[None]:
        """Hold a lock of this folder that the system takes back when its holder dies; wait while another holds it."""
        path = self.checkpoints / f"{name}.lock"
        handle = None
        try:
            while handle is None:
                handle = self._open_lock(path)
                while fcntl and not _stop.is_set():
                    try:
                        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        time.sleep(0.1)
                    except OSError:  # a file system without locks: at worst a run is trained twice, to the same record
                        break
                with contextlib.suppress(OSError):
                    if os.path.samestat(os.fstat(handle), os.stat(path)):
                        break
                if _stop.is_set():
                    break
                os.close(handle)  # its holder removed the file while we waited: lock the one that stands there now
                handle = None
            yield
        finally:
            if handle is not None:
                os.close(handle)

    def _open_lock(self, path: Path) -> int:
        for attempt in range(5):
            try:
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:  # another sweep may just have tidied the folder away
                if attempt == 4 or not isinstance(error, FileNotFoundError):
                    raise files.disk_error(error, self.checkpoints) from error
        raise AssertionError("not reached")

    def note_progress(self, run_id: str, step: int, seconds: float) -> None:
        """Leave word of how far a run is, for whoever waits for it; losing it costs nothing."""
        with contextlib.suppress(OSError):
            (self.checkpoints / f"{run_id}.progress").write_text(f"{step} {seconds:.3f}")

    def progress(self, run_id: str) -> tuple[int, float]:
        """Steps done and seconds taken by a run that is being trained; zeros where nothing is known."""
        try:
            step, seconds = (self.checkpoints / f"{run_id}.progress").read_text().split()
            return int(step), float(seconds)
        except (OSError, ValueError):
            return 0, 0.0

    def clear_checkpoint(self, run_id: str) -> None:
        shutil.rmtree(self.checkpoints / run_id, ignore_errors=True)
        for leftover in (f"{run_id}.progress", f"{run_id}.lock"):
            with contextlib.suppress(OSError):
                (self.checkpoints / leftover).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove what writers that were killed left lying for an hour, checkpoints of runs whose record stands (its writer
        was killed before it came to them), and the checkpoint folder where it is empty."""
        with contextlib.suppress(OSError):
            for path in [*self.path.glob(".*.part"), *self.runs.glob(".*.part"), *self.models.glob(".*.part")]:
                if time.time() - path.stat().st_mtime > 3600:
                    path.unlink()
        with contextlib.suppress(OSError, LabError):
            for run_id in sorted({path.stem for path in self.checkpoints.iterdir()}):
                if self.result(run_id):
                    self.clear_checkpoint(run_id)
        with contextlib.suppress(OSError):
            self._remove_lock_nobody_holds(self.checkpoints / "folder.lock")
            self.checkpoints.rmdir()

    def _remove_lock_nobody_holds(self, path: Path) -> None:
        """Removed from under its holder, it would let a third one in."""
        handle = None
        try:
            if fcntl and path.exists():
                handle = os.open(path, os.O_RDWR)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return
                except OSError:  # a file system without locks
                    pass
            path.unlink(missing_ok=True)
        finally:
            if handle is not None:
                os.close(handle)


def _differences(there: dict, here: dict) -> list[str]:
    both = (name for name in here if name in there and here[name] is not None)
    return [f"{name} is {there[name]} there, {here[name]} here" for name in both if there[name] != here[name]]


def _asked(model: ModelConfig, train: TrainConfig) -> dict:
    """What the resolved arithmetic of a run depends on, besides the machine."""
    from tinylm.backend import picks

    return {**{name: getattr(train, name) for name in ASKED}, **picks(model, train)}


def _find(entries: list[dict], asked: dict) -> dict | None:
    """The entry for what is asked. One written when fewer things were told apart stands for all that they are now, but for
    damage: a text of which none is told has none."""
    asked = {"damage": None, **asked}
    return next((entry for entry in entries if {"damage": None, **entry["asked"]}.items() <= asked.items()), None)


# Training one run.

_stop = threading.Event()
_trainers: set = set()
_one_at_a_time = threading.Lock()  # threads, determinism and torch's generator belong to the whole process
_corpora: dict[str, typing.Any] = {}  # prepared in this process, by what was asked


def stop_training() -> bool:
    """Ask every run that this process trains to write a checkpoint and end; nothing starts until ``allow_training``.
    Returns whether anything is being trained."""
    _stop.set()
    trainers = list(_trainers)
    for trainer in trainers:
        trainer.request_stop()
    return bool(trainers)


def allow_training() -> None:
    _stop.clear()


def about_corpus(corpus: typing.Any) -> dict:
    """What records and ``Folder.corpus`` tell of a corpus: identity, name, bytes and tokens by split, provenance."""
    splits = {"train": corpus.train, "val": corpus.val, "test": corpus.test}
    return _plain(
        {
            "identity": corpus.identity,
            "name": corpus.name,
            "bytes": corpus.bytes,
            "tokens": {name: len(tokens) for name, tokens in splits.items()},
            "provenance": corpus.provenance,
        }
    )


def prepare_corpus(run: Run, progress: bool = False) -> typing.Any:
    """The run's corpus, from the cache where it is there already; kept in this process for the runs to come."""
    from tinylm import corpora

    data = run.data
    corpus = corpora.prepare(data.text, data.tokenizer, run.model.vocab_size, data.field, progress, data.damage)
    if corpus.tokenizer.vocab_size != run.model.vocab_size:
        raise ConfigError(
            "the model's vocabulary must be the tokenizer's",
            f"vocab_size={run.model.vocab_size}, the {data.tokenizer} tokenizer has {corpus.tokenizer.vocab_size}",
            f"set vocab_size to {corpus.tokenizer.vocab_size}",
        )
    if len(_corpora) >= 8:
        _corpora.clear()
    _corpora[files.canonical_json(run.corpus_key)] = corpus
    return corpus


def _corpus_of(task: Task) -> typing.Any:
    def fits(corpus: typing.Any) -> bool:
        return corpus is not None and _plain(corpus.identity) == task.corpus["identity"]

    corpus = _corpora.get(files.canonical_json(task.run.corpus_key))
    corpus = corpus if fits(corpus) else prepare_corpus(task.run)
    if not fits(corpus):
        raise TextError(
            "A text must stay as it is while runs are trained on it",
            f"{task.run.data.text} has changed since the sweep began",
            "start the sweep again with a results_dir of its own for the new text",
        )
    return corpus


def train_run(
    run: Run,
    results_dir: str | os.PathLike,
    home: str | os.PathLike | None = None,
    keep_model: bool = False,
    progress: bool = False,
    ranks: Ranks = ALONE,
) -> dict | None:
    """Train one run here and now, and return its record; a run that is recorded already is not trained again.

    home: the lab's cache, where it is not the usual one. keep_model: also save the model, to
    models/<run_id>.safetensors; a run recorded without its model stays without. Checkpoints are kept under results_dir
    until the record is written, so that a run which was interrupted goes on from there, bit for bit. A run that
    diverges, or fails by an error of the training itself, is recorded with the reason; LabErrors (a wrong text, a full
    disk, another machine's folder) are raised. ranks: the processes that train the run together; each of them calls this,
    all but the first get None. How many they are is no part of the identity, which they share the threads of.
    """
    home = None if home is None else str(home)
    _use_home(home)
    if ranks.rank > 0:
        return _follow(ranks)
    folder = Folder(results_dir)
    task = folder.task(run, home, keep_model)
    if task and (record := folder.result(task.run_id)):
        folder.check_own_text(run)
        folder.clear_checkpoint(task.run_id)  # of a process that was killed between the record and its end
    else:
        folder.admit([(run, prepare_corpus(run, progress))])
        (record,) = perform([folder.task(run, home, keep_model)], progress, ranks)
    if record["status"] != "failed":  # else the others may be in the middle of a step: they end when this process does
        ranks.tell(None)  # there is nothing more to follow in
    if record["status"] == "stopped" and not _stop.is_set():  # the Trainer took a Ctrl-C to write a last checkpoint
        raise KeyboardInterrupt
    return record


def _follow(ranks: Ranks) -> None:
    """Train along in what the first process trains, and leave no trace of it."""
    from tinylm.train import train_together

    result = None
    while told := ranks.tell():
        task = Task(**{**told, "run": Run.from_dict(told["run"])})
        _check_machine(task)
        try:
            (result,) = train_together([_trainer(task, None, False, ranks)])
        except (LabError, OSError):
            raise
        except Exception as error:
            raise LabError(
                "Each process of a run must be able to train its part",
                f"process {ranks.rank} of {ranks.size}: {_told(error)}",
                "mend what it names, or start fewer processes; the same command goes on from the last checkpoint",
            ) from error
    if result and result.status == "stopped":
        raise KeyboardInterrupt


def _use_home(home: str | None) -> None:
    if home and home != str(files.home()):
        os.environ["TINYLM_HOME"] = home


def perform(
    tasks: list[Task],
    progress: bool = False,
    ranks: Ranks = ALONE,
    watch: Callable[[typing.Any], None] | None = None,
) -> list[dict]:
    """Train tasks of one stack (see ``stack_key``) in this process, together, and write each record when its run ends;
    what workers are sent. Returns the records in order (see ``train_run``). watch: is shown each ``Trainer`` before it
    starts, for who wants to follow it or ask it to stop.

    Where another process trains one of the runs in the same folder, wait and take its record. A run that was asked to
    stop gives a record of status ``stopped``, which is not written. Where the stack fails as a whole, each run is tried
    alone, so that it fails for a reason of its own. ranks: the processes that train a single task together.
    """
    _use_home(tasks[0].home)
    folder = Folder(tasks[0].results_dir)
    with contextlib.ExitStack() as locks:
        for run_id in sorted(task.run_id for task in tasks):
            locks.enter_context(folder.locked(run_id))
        locks.enter_context(_one_at_a_time)
        records = {task.run_id: record for task in tasks if (record := folder.result(task.run_id))}
        todo = [task for task in tasks if task.run_id not in records]
        if todo and _stop.is_set():
            reason = "asked to stop before it began"
            records |= {task.run_id: _record(task, {"status": "stopped", "reason": reason}, _now()) for task in todo}
        elif todo:
            _check_machine(todo[0])
            try:
                records |= _train(todo, folder, progress, ranks, watch)
            except (LabError, OSError):  # where locks do not hold: another was faster, and tidied up
                if not all(folder.result(task.run_id) for task in todo):
                    raise
                records |= {task.run_id: folder.result(task.run_id) for task in todo}
            except Exception as error:
                if len(todo) == 1:
                    records[todo[0].run_id] = record = failed_record(todo[0], _told(error))
                    write_record(folder.path, record)
                    if not any((folder.checkpoints / todo[0].run_id).glob("*")):  # else the next try goes on from there
                        folder.clear_checkpoint(todo[0].run_id)
    for task in tasks:
        if task.run_id not in records:
            (records[task.run_id],) = perform([task], progress, ranks, watch)
    return [records[task.run_id] for task in tasks]


def stack_key(task: Task) -> str:
    """Equal for runs that can be trained in one stack: of one shape, batch and arithmetic."""
    train = task.run.train.resolve(task.run.model)
    shape = [task.run.model.resolve().to_dict(), train.batch_size, train.grad_accum, train.seq_len]
    return files.canonical_json([*shape, task.arithmetic, None if task.arithmetic["stacked"] else task.run_id])


def _check_machine(task: Task) -> None:
    from tinylm import backend

    there, here = task.arithmetic["machine"], _plain(backend.machine(task.run.train.device))
    if here != there:
        raise LabError(
            "All workers of a sweep must compute alike",
            "; ".join(_differences(there, here)),
            "use workers with the processor and the version of torch of the machine that started the sweep",
        )


def _train(
    tasks: list[Task],
    folder: Folder,
    progress: bool,
    ranks: Ranks = ALONE,
    watch: Callable[[typing.Any], None] | None = None,
) -> dict[str, dict]:
    """Train tasks together; their records by run_id, those that ended written and tidied up."""
    from tinylm.checkpoint import save_model
    from tinylm.train import train_together

    started = _now()
    records = {}
    ranks.tell({**dataclasses.asdict(tasks[0]), "run": tasks[0].run.to_dict()} if ranks.size > 1 else None)
    trainers = [_trainer(task, folder, progress, ranks) for task in tasks]
    for trainer in trainers if watch else ():
        watch(trainer)
    task_of = {id(trainer): task for trainer, task in zip(trainers, tasks, strict=True)}

    def end(trainer: typing.Any, result: typing.Any) -> None:
        task, result, model_file = task_of[id(trainer)], result.to_dict(), None
        if task.keep_model and result["status"] in ("finished", "early_stopped"):
            model_file = f"models/{task.run_id}.safetensors"
            about = {"run_id": task.run_id, "text": task.corpus["name"], "val_loss": result["val_loss"]}
            tokenizer = _corpus_of(task).tokenizer
            save_model(folder.path / model_file, trainer.model, tokenizer=tokenizer, metadata=about)
        result |= {"model_file": model_file}
        records[task.run_id] = record = _record(task, result, started, len(tasks), ranks.size)
        if result["status"] != "stopped":
            write_record(folder.path, record)
            folder.clear_checkpoint(task.run_id)

    _trainers.update(trainers)
    try:
        if _stop.is_set():
            for trainer in trainers:
                trainer.request_stop()
        for trainer, result in zip(trainers, train_together(trainers, on_end=end), strict=True):
            if task_of[id(trainer)].run_id not in records:  # its checkpoint had ended already
                end(trainer, result)
        return records
    finally:
        _trainers.difference_update(trainers)


def _trainer(task: Task, folder: Folder | None, progress: bool, ranks: Ranks) -> typing.Any:
    """A Trainer that goes on from the folder's checkpoint where there is one; without a folder it leaves no trace."""
    from tinylm.train import Trainer

    corpus = _corpus_of(task)
    checkpoint_dir = folder.checkpoints / task.run_id if folder else None
    note = (lambda point: folder.note_progress(task.run_id, point["step"], point["seconds"])) if folder else None

    def build() -> Trainer:
        return Trainer(
            task.run.model,
            task.run.train,
            corpus.train,
            corpus.val,
            token_bytes=corpus.tokenizer.token_bytes,
            checkpoint_dir=checkpoint_dir,
            progress=progress,
            on_eval=note,
            arithmetic=task.arithmetic,
            ranks=ranks,
        )

    try:
        return build()
    except LabError as error:
        if isinstance(error, LostProcess) or checkpoint_dir is None or not checkpoint_dir.exists():
            raise
        # A checkpoint that cannot be used is given up: the run starts again, to the same numbers.
        warnings.warn(f"run {task.run_id} starts again: {error}", stacklevel=2)
        shutil.rmtree(checkpoint_dir)
        return build()


def _told(error: Exception) -> str:
    """An error in one line: what, and the last place in the lab's own code that it passed."""
    here = [frame for frame in traceback.extract_tb(error.__traceback__) if "tinylm" in frame.filename]
    place = f" ({Path(here[-1].filename).name}:{here[-1].lineno})" if here else ""
    return f"{type(error).__name__}: {error}{place}"


def failed_record(task: Task, reason: str) -> dict:
    """The record of a run that could not be trained, for whoever has to write it in a worker's place."""
    return _record(task, {"status": "failed", "reason": reason}, _now())


_NOTHING = {
    **{"reason": None, "steps": 0, "tokens_seen": 0, "unique_tokens": 0, "epochs": 0.0, "train_loss": None},
    **{"val_loss": None, "val_bpb": None, "best_val_loss": None, "best_step": None, "curve": [], "seconds": 0.0},
    **{"tokens_per_second": None, "model_file": None},
}


def _record(task: Task, result: dict, started: str, together: int = 1, processes: int = 1) -> dict:
    from tinylm import backend

    run = task.run
    train = run.train.resolve(run.model)
    result = {**_NOTHING, **result}
    return _plain(
        {
            "run_id": task.run_id,
            "identity": task.identity,
            "status": result.pop("status"),
            "reason": result.pop("reason"),
            "model": run.model.resolve().to_dict(),
            "train": train.to_dict(),
            "data": run.data.to_dict(),
            "corpus": {name: value for name, value in task.corpus.items() if name != "asked"},
            "arithmetic": task.arithmetic,
            "path": backend.words(task.arithmetic),
            "trained_together": together,
            "processes": processes,
            "numerics_revision": task.numerics_revision,
            "parameters": counts.parameters(run.model),
            "flops": run.flops * result["steps"] // train.max_steps,
            **result,
            "threads": task.arithmetic["threads"],
            "device": task.arithmetic["device"],
            "packages": _packages(),
            "started": started,
            "finished": _now(),
            "tags": run.tags,
        }
    )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


@functools.cache
def _packages() -> dict[str, str]:
    from tinylm import __version__

    versions = {"python": platform.python_version(), "tinylm": __version__}
    for name in ("torch", "numpy", "sentencepiece", "safetensors"):
        module = sys.modules.get(name)
        versions[name] = str(getattr(module, "__version__", None) or importlib.metadata.version(name))
    return versions
