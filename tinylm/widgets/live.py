"""One run of a panel while it is trained: an ordinary run of a results folder, followed point by point."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tinylm import corpora
from tinylm.checkpoint import load_model
from tinylm.config import GenerateConfig
from tinylm.errors import LabError
from tinylm.generate import stream
from tinylm.model import TinyLM
from tinylm.study import runs
from tinylm.study.parameters import repository
from tinylm.study.planner import Evidence
from tinylm.study.runs import Run
from tinylm.tokenizer import Tokenizer
from tinylm.train import Trainer
from tinylm.widgets.models import study_folders
from tinylm.widgets.shared import MACHINE, take_machine

# Measuring the machine and compiling take long, and no Stop can cut them short: panels train on the plain path.
PLAIN = {"precision": "fp32", "compile": False}


def labs_folder() -> Path:
    """Where runs of the labs are recorded, for studies to use as any other."""
    return repository() / "results" / "local" / "labs"


class LiveRun:
    """A run that ``train`` carries out and records; ``trainer`` and ``samples`` tell of it meanwhile.

    prompt: what samples of the text to come begin with. A run that is stopped leaves a checkpoint, from which the same
    run goes on bit for bit; ``discard`` removes it.
    """

    def __init__(self, run: Run, folder: Path, prompt: str = "The", sample_tokens: int = 48):
        self.run, self.folder, self.prompt, self.sample_tokens = run, runs.Folder(folder), prompt, sample_tokens
        self.trainer: Trainer | None = None
        self.corpus: corpora.Corpus | None = None
        self.record: dict | None = None
        self.samples: list[tuple[int, str]] = []  # (step, text)
        self._task: runs.Task | None = None

    def train(
        self, is_stopping: Callable[[], bool], say: Callable[[str], None], on_point: Callable[[], None]
    ) -> dict | None:
        """Train until the end or a stop; the record (status ``stopped`` where it was, and then not on disk). None where
        the stop came before anything began. on_point: called after each evaluation."""
        say("reading the text …")
        self.corpus = runs.prepare_corpus(self.run)
        self.folder.admit([(self.run, self.corpus)])
        self._task = self.folder.task(self.run, keep_model=True)

        def watch(trainer: Trainer) -> None:
            self.trainer, note = trainer, trainer.on_eval

            def on_eval(point: dict) -> None:
                note(point)
                self._sample(point["step"])
                on_point()

            trainer.on_eval = on_eval
            if is_stopping():
                trainer.request_stop()

        if not take_machine(is_stopping, say):
            return None
        try:
            if is_stopping():
                return None
            (self.record,) = runs.perform([self._task], watch=watch)
        finally:
            MACHINE.release()
        return self.record

    def request_stop(self) -> None:
        if self.trainer is not None:
            self.trainer.request_stop()

    def discard(self) -> None:
        """Remove the checkpoint of a run that was stopped."""
        if self._task is not None:
            self.folder.clear_checkpoint(self._task.run_id)

    @property
    def step(self) -> int:
        """Steps done so far."""
        return self.trainer.step if self.trainer is not None else 0

    @property
    def curve(self) -> list[dict]:
        """The points so far, each as ``TrainResult.curve`` has them."""
        if self.record is not None:
            return self.record["curve"]
        return list(self.trainer.curve) if self.trainer is not None else []

    def model(self) -> tuple[TinyLM, Tokenizer]:
        """The model as it stands, and its tokenizer."""
        if self.trainer is not None:
            return self.trainer.model.eval(), self.corpus.tokenizer
        if self.record is not None and self.record.get("model_file"):
            return load_model(self.folder.path / self.record["model_file"])[:2]
        raise LabError("A run must have been trained before its model can be had", "no model yet", "press Train")

    def _sample(self, step: int) -> None:
        config = GenerateConfig(temperature=0.8, max_new_tokens=self.sample_tokens)
        if len(self.samples) > 1 and 2 * (step - self.samples[-1][0]) < self.samples[1][0] - self.samples[0][0]:
            self.samples.pop()  # the last evaluation may come a step or two after the one before
        try:
            tokens = stream(self.trainer.model, self.corpus.tokenizer, self.prompt, config)
            self.samples.append((step, self.prompt + "".join(token.text for token in tokens)))
        except LabError as error:  # a model about to diverge has nothing to say, and that is no reason to end its run
            self.samples.append((step, str(error)))


def read_curves(folder: Path, most: int = 12) -> list[dict]:
    """The latest finished records of a folder, oldest first; damaged ones are left out."""
    paths = sorted((folder / "runs").glob("*.json"), key=lambda path: path.stat().st_mtime)[-most:]
    records = []
    for path in paths:
        try:
            records.append(runs.read_record(path))
        except LabError:
            continue
    return records


def evidence_for(run: Run) -> tuple[Evidence, str] | None:
    """The law that a study measured on this very text and tokenizer, with the study's name; None without."""
    try:
        sha256 = corpora.load(run.data.text, field=run.data.field).sha256
    except LabError:
        return None
    for folder in study_folders():
        try:
            known = (runs.Folder(folder).shared("corpora") or {}).get("corpora", [])
            same = [
                entry for entry in known
                if entry["identity"]["text_sha256"] == sha256
                and entry["asked"]["tokenizer"] == run.data.tokenizer
                and entry["asked"]["vocab_size"] == run.model.vocab_size
            ]  # fmt: skip
            path = folder / "tables" / "law.json"
            if same and path.exists():
                return runs.read_kept(path, Evidence.from_dict), folder.name
        except (LabError, KeyError, TypeError, ValueError):
            continue
    return None


def law_line(evidence: Evidence, params: float, most_tokens: float) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (40,) up to ``most_tokens`` and the loss (40,) that the law expects of a run which ends there."""
    tokens = np.geomspace(most_tokens / 100, most_tokens, 40)
    return tokens, evidence.surface.predict(np.full(40, params), tokens)["loss"].to_numpy()
