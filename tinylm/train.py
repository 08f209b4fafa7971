"""Windows over a text, the learning-rate schedule, evaluation, and the Trainer that resumes bit for bit.

Nothing here depends on what ran before: the order of windows follows from (seed, epoch), dropout from (seed, step), the
windows of an evaluation from a constant. So variants of one seed see the same batches, evaluation leaves training as it
was, and a checkpoint needs no state of any generator.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import hashlib
import math
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from tinylm import backend
from tinylm.checkpoint import copy_weights, load_state, save_state
from tinylm.config import ModelConfig, TrainConfig
from tinylm.errors import ConfigError, DamagedFileError, LabError, TextError
from tinylm.files import sha256_bytes
from tinylm.model import TinyLM
from tinylm.ranks import ALONE, Ranks
from tinylm.stack import Lane, Stack, Update
from tinylm.words import in_kernel

CHECKPOINT_NAME = "checkpoint.safetensors"
WINDOWS_MAPPED = 256  # windows read before the pages of a memory map are given back
SHUFFLED_WHOLE = 1 << 22  # windows; of more, each part of the order is drawn when it is needed


class TextDataset:
    """Windows of max_seq_len tokens over a text, ``stride`` tokens apart, by random access.

    ds[i] is (inputs (T,), targets (T,)), int64, the targets one token further. stride None is max_seq_len // 2, so that
    neighbouring windows overlap by half. A rest of the text shorter than a window is left out.
    Raises TextError where the text is shorter than one window and its target.
    """

    def __init__(self, file_path: str | os.PathLike, tokenizer, max_seq_len: int, stride: int | None = None):
        from tinylm.tokenizer import encode_file

        self._window(encode_file(file_path, tokenizer), max_seq_len, stride)

    @classmethod
    def from_tokens(cls, tokens: np.ndarray, max_seq_len: int, stride: int | None = None) -> TextDataset:
        """The same over token ids that are there already: an array or a memory map, (tokens,)."""
        dataset = cls.__new__(cls)
        dataset._window(tokens, max_seq_len, stride)
        return dataset

    def _window(self, tokens: np.ndarray, max_seq_len: int, stride: int | None) -> None:
        stride = max(1, max_seq_len // 2) if stride is None else stride
        for name, value in (("max_seq_len", max_seq_len), ("stride", stride)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1", f"{name}={value}", "give a positive whole number")
        if len(tokens) < max_seq_len + 1:
            raise TextError(
                "A text must be at least one window and one token long",
                f"{len(tokens)} tokens for a window of {max_seq_len}",
                "give more text, or lower max_seq_len or seq_len",
            )
        self.tokens, self.max_seq_len, self.stride = tokens, max_seq_len, stride
        self._windows = sliding_window_view(tokens, max_seq_len + 1)[::stride]  # a view: nothing is copied or read
        releasable = (
            hasattr(mmap, "MADV_DONTNEED") and getattr(tokens, "mode", None) == "r"
        )  # nothing of it can be lost
        self._map, self._gathered = tokens._mmap if releasable else None, 0

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.batch(np.array([index]))
        return inputs[0], targets[0]

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Windows by number (B,), gathered at once: inputs (B, T) and targets (B, T), int64."""
        windows = torch.from_numpy(self._windows[indices].astype(np.int64))
        self._gathered += len(indices)
        if self._map is not None and self._gathered >= WINDOWS_MAPPED:
            # Or the process would grow by the whole text. The system keeps the pages, so that nothing is read from disk again.
            self._map.madvise(mmap.MADV_DONTNEED)
            self._gathered = 0
        return windows[:, :-1], windows[:, 1:]

    def covered(self, indices: np.ndarray) -> int:
        """How many distinct tokens are a target in at least one of these windows."""
        if len(indices) == 0:
            return 0
        apart = -(-self.max_seq_len // self.stride)  # windows so far apart share no target
        steps = np.minimum(np.diff(np.sort(indices)), apart).astype(np.int64) * self.stride
        return int(np.minimum(steps, self.max_seq_len).sum()) + self.max_seq_len

    def subset(self, unique_tokens: int | None) -> np.ndarray | range:
        """Numbers of the windows that hold ``unique_tokens`` distinct targets, whole windows at least so many.

        They are the head of one shuffle that is the same for every seed: a smaller subset lies inside every larger one.
        None, or all there is, gives all windows. Raises TextError where the text has fewer tokens.
        """
        if unique_tokens is None:
            return range(len(self))
        if unique_tokens > len(self.tokens) - 1:
            raise TextError(
                "unique_tokens may not exceed what the text holds",
                f"unique_tokens={unique_tokens}, the text has {len(self.tokens) - 1} targets",
                "lower unique_tokens, leave it out to use all, or give more text",
            )
        order = _shuffle(len(self), "subset")[:]
        least = min(-(-unique_tokens // self.max_seq_len), len(self))  # enough where windows do not overlap
        count = least + bisect.bisect_left(
            range(least, len(self)), unique_tokens, key=lambda count: self.covered(order[:count])
        )
        return np.sort(order[:count])


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Learning rate of step 0 .. max_steps - 1.

    Linear from above zero over warmup_steps, so that step warmup_steps is the first at learning_rate; then a half
    cosine that reaches min_lr at max_steps (Loshchilov & Hutter 2017), or for ``wsd`` level, and over the last
    decay_steps linear to min_lr at max_steps (Hu et al. 2024, MiniCPM).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)
        height = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        height = min(1.0, (config.max_steps - step) / (config.decay_steps or max(1, config.max_steps // 5)))
    return config.min_lr + (config.learning_rate - config.min_lr) * height


@torch.no_grad()
def evaluate(
    model: TinyLM,
    tokens: np.ndarray,
    seq_len: int,
    eval_tokens: int,
    token_bytes: np.ndarray | None = None,
    arithmetic: dict | None = None,
    ranks: Ranks = ALONE,
) -> dict:
    """Score up to eval_tokens of ``tokens``, each once, in windows of seq_len that do not overlap.

    The windows are the head of a shuffle that is always the same: equal arguments score equal tokens, and fewer
    eval_tokens score a part of them. arithmetic: of the run, as ``backend.resolve`` gives it; None is fp32. ranks: who
    shares the windows; each gets the whole result. Returns val_loss (nats per token), val_bpb (bits per byte of raw
    text, by token_bytes (V,), the bytes each id stands for; None without) and scored_tokens. Leaves the model in the
    mode it was in.
    """
    data = TextDataset.from_tokens(tokens, seq_len, stride=seq_len)
    windows = _shuffle(len(data), "evaluation")[: max(1, eval_tokens // seq_len)]
    windows = ranks.slice_of(windows)
    device = next(model.parameters()).device
    at_once = max(1, 4096 // seq_len)
    nats, scored, scored_bytes = 0.0, 0, 0
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(windows), at_once):
            inputs, targets = data.batch(windows[start : start + at_once])
            with backend.autocast(arithmetic) if arithmetic else contextlib.nullcontext():
                loss = model.loss(inputs.to(device), targets.to(device))
            nats += loss.item() * targets.numel()
            scored += targets.numel()
            scored_bytes += int(token_bytes[targets.numpy()].sum()) if token_bytes is not None else 0
    finally:
        model.train(was_training)
    if ranks.size > 1:
        nats, *counted = ranks.sum(torch.tensor([nats, scored, scored_bytes], dtype=torch.float64)).tolist()
        scored, scored_bytes = map(int, counted)
    return {
        "val_loss": nats / scored,
        "val_bpb": nats / math.log(2) / scored_bytes if scored_bytes else None,
        "scored_tokens": scored,
    }


@dataclass
class TrainResult:
    """What a run came to.

    status: ``finished`` at max_steps; ``early_stopped`` by patience; ``diverged``; ``stopped`` on request, and to be
        resumed. reason: why, in words, for all but ``finished``.
    tokens_seen: targets trained on, repeats counted; unique_tokens: the distinct ones among them; epochs: passes over
        the windows (over unique_tokens of the config, where that is set).
    curve: one dict an evaluation: step, tokens, train_loss (mean since the one before), val_loss, val_bpb,
        scored_tokens, learning_rate, seconds. train_loss: that of its last point.
    val_loss (nats per token), val_bpb: over all of eval_tokens, with the weights that the model holds at the end: the
        last ones, or with patience the best. Of the last point where the run was stopped; None where it diverged.
    best_val_loss, best_step: with patience the best evaluation, else the final one.
    seconds: wall time of training and evaluation, over all parts of a resumed run; tokens_per_second: of training
        alone.
    """

    status: str
    reason: str | None
    steps: int
    tokens_seen: int
    unique_tokens: int
    epochs: float
    train_loss: float | None
    val_loss: float | None
    val_bpb: float | None
    best_val_loss: float | None
    best_step: int | None
    curve: list[dict]
    seconds: float
    tokens_per_second: float

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


class Trainer:
    """Trains a TinyLM with AdamW (Loshchilov & Hutter 2019) as ``train_config`` says, and resumes bit for bit.

    train_tokens, val_tokens: token ids (tokens,), arrays or memory maps. token_bytes (V,): bytes of raw text each id
    stands for, for val_bpb. checkpoint_dir: where a checkpoint is written every checkpoint_minutes, at a stop and at
    the end, and looked for at the start. progress: a bar, or plain lines without a screen. on_eval: called with each
    point of the curve. arithmetic: how to compute, where that was resolved before (see ``backend.resolve``). ranks: the
    processes that train this run together, each with a Trainer of its own and all else equal (see ``ranks``); the losses are
    those of one process to rounding (dropout apart, which each draws for its own part), and a checkpoint may be gone on with on
    another number of them. Only the first of them writes, shows progress and calls on_eval.

    Weight decay falls on matrices and embeddings, not on norms and biases. Every evaluation before the last scores a
    fixed part of eval_tokens, at most a quarter of them and an eighth of the tokens trained on in between (but 8
    windows), so that watching a run stays cheap; the last scores all of them, and with patience every one does.

    A run has diverged when a loss or the gradient's norm is not finite (under fp16: the loss, or no loss scale down to
    1 keeps the gradient finite; without loss_scaling, the gradients of as many steps in a row as it takes to get there),
    or when after the warm-up the training loss since the last evaluation is on average 2 nats above both the uniform
    guess, ln V, and the loss of the first step. A validation loss that high can also be overfitting, and ends nothing.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        train_config: TrainConfig,
        train_tokens: np.ndarray,
        val_tokens: np.ndarray,
        token_bytes: np.ndarray | None = None,
        checkpoint_dir: str | os.PathLike | None = None,
        progress: bool = False,
        on_eval: Callable[[dict], None] | None = None,
        arithmetic: dict | None = None,
        ranks: Ranks = ALONE,
    ):
        self.config = config = train_config.resolve(model_config)
        if config.batch_size < ranks.size:
            raise ConfigError(
                "Each process takes at least one window of a micro-step",
                f"batch_size={config.batch_size} on {ranks.size} processes",
                "raise batch_size (and lower grad_accum), or start fewer processes",
            )
        self.arithmetic = backend.resolve(config, model_config) if arithmetic is None else arithmetic
        self.ranks, own = ranks, ranks.own(self.arithmetic)
        backend.apply(own)
        self.device = torch.device(own["device"])
        self.data = TextDataset.from_tokens(train_tokens, config.seq_len, config.stride)
        self.windows = self.data.subset(config.unique_tokens)
        try:
            TextDataset.from_tokens(val_tokens, config.seq_len)  # long enough, or an error before any work
        except TextError as error:
            raise TextError(
                f"In the validation part: {error.rule[0].lower()}{error.rule[1:]}", error.got, error.fix
            ) from None
        self.val_tokens, self.token_bytes = val_tokens, token_bytes
        _check_vocabulary(model_config.vocab_size, token_bytes, train=train_tokens, validation=val_tokens)
        is_first = ranks.rank == 0
        self.progress, self.on_eval = progress and is_first, on_eval if is_first else None

        self.model = TinyLM(model_config, seed=config.seed).to(self.device)
        self.model.compute_with(backend.product_dtype(self.arithmetic), query_blocks=1)
        self.lane = Lane(self.model)
        self._loss_scale = backend.LOSS_SCALE if self.arithmetic["precision"] == "fp16" and config.loss_scaling else 1.0
        self._good_steps = 0  # in a row, since the loss scale changed; without loss_scaling, less overflows in a row

        self.step = 0
        self.curve: list[dict] = []
        self._status: str | None = None
        self._reason: str | None = None
        self._first_loss: float | None = None
        self._losses: tuple[float, int] = (0.0, 0)  # sum and number since the last evaluation
        self._seconds = self._step_seconds = 0.0
        self._skipped = 0  # steps whose gradient overflowed fp16 and changed nothing
        self._stack: Stack | None = None
        self._best: dict | None = None  # the best point of the curve, where there is patience
        self._best_weights: dict[str, Tensor] = {}
        self._order: tuple[int, np.ndarray | _Permutation] | None = None  # an epoch and its shuffle
        self._stop = threading.Event()
        self._all_stop = False  # what the processes agreed on in the last step

        self.checkpoint = Path(checkpoint_dir) / CHECKPOINT_NAME if checkpoint_dir is not None and is_first else None
        if self.checkpoint is not None and self.checkpoint.exists():
            self._resume()
        if ranks.size > 1:
            self._begin_alike()

    def run(self) -> TrainResult:
        """Train to the end, or until stopped; a run that has ended already only gives its result. Ctrl-C stops it at
        the border of the next step, with a checkpoint where there is a folder for it; a second Ctrl-C interrupts at
        once."""
        return train_together([self])[0]

    def train_step(self) -> float:
        """One update; returns the loss before it. Where the run diverges it gets its status, and keeps its weights."""
        if self._stack is None:
            self._stack = Stack([self.lane], self.arithmetic)
        return _step_together([self], self._stack)[0]

    def request_stop(self) -> None:
        """Let ``run`` end at the border of the next step, with status ``stopped``; from any thread."""
        self._stop.set()

    def save(self) -> Path:
        """Write the checkpoint, from which a Trainer of the same configs, text and arithmetic goes on."""
        if self.checkpoint is None:
            raise LabError("A checkpoint needs a folder", "checkpoint_dir=None", "give the Trainer a checkpoint_dir")
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        tensors |= {"optimizer.first": self.lane.first, "optimizer.second": self.lane.second}
        tensors |= {f"best.{name}": value for name, value in self._best_weights.items()}
        progress = {name: getattr(self, name) for name in _PROGRESS}
        return save_state(self.checkpoint, tensors, {**self._expected(), "progress": progress})

    def _expected(self) -> dict:
        """What a checkpoint must agree on to be gone on with."""
        train = self.config.identifying()  # a checkpoint from before a younger field was there is gone on with
        del train["checkpoint_minutes"]  # changes no number
        return {
            "model": self.model.config.to_dict(),
            "train": train,
            "text": {"train": _fingerprint(self.data.tokens), "validation": _fingerprint(self.val_tokens)},
            "arithmetic": self.arithmetic,
            "numerics_revision": backend.NUMERICS_REVISION,
        }

    def _resume(self) -> None:
        tensors, meta = load_state(self.checkpoint, expect=self._expected())
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "best": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = value.clone()  # out of the file's buffer
        progress, shapes = meta.get("progress"), {name: p.shape for name, p in self.model.named_parameters()}
        moments = {name: value.shape for name, value in parts["optimizer"].items()}
        best = {name: value.shape for name, value in parts["best"].items()}
        if (
            not _is_progress(progress, self.config.max_steps)
            or moments != {"first": self.lane.first.shape, "second": self.lane.second.shape}
            or (best and best != shapes)
            or len(parts) > 3
        ):  # a hash tells damage, and not who wrote the file
            raise DamagedFileError(
                "A checkpoint must hold what a Trainer writes", self.checkpoint, "delete it to start its run anew"
            )
        copy_weights(self.model, parts["model"], self.checkpoint)
        self.lane.first.copy_(parts["optimizer"]["first"])
        self.lane.second.copy_(parts["optimizer"]["second"])
        self._best_weights = {name: value.to(self.device) for name, value in parts["best"].items()}
        for name, value in progress.items():
            setattr(self, name, value)
        self.lane.steps = self.step - self._skipped

    def _begin_alike(self) -> None:
        """Bring the state of the first process, which may have read a checkpoint, to all."""
        told = self.ranks.tell(
            {**{name: getattr(self, name) for name in _PROGRESS}, "best": sorted(self._best_weights)}
        )
        for tensor in (self.lane.weights, self.lane.first, self.lane.second):
            self.ranks.copy_from_first(tensor)
        for name in told.pop("best"):
            best = self._best_weights.setdefault(name, torch.empty_like(self.model.get_parameter(name)).detach())
            self.ranks.copy_from_first(best)
        for name, value in told.items():
            setattr(self, name, value)
        self.lane.steps = self.step - self._skipped

    @property
    def _tokens_per_step(self) -> int:
        return self.config.windows_per_step * self.config.seq_len

    @property
    def _tokens_per_second(self) -> float:
        return self.step * self._tokens_per_step / self._step_seconds if self._step_seconds else 0.0

    def _windows_at(self, step: int) -> np.ndarray:
        """The windows of a step: the next windows_per_step of an endless stream of shuffled epochs."""
        count = len(self.windows)
        first = step * self.config.windows_per_step
        parts, left = [], self.config.windows_per_step
        while left:
            epoch, place = divmod(first, count)
            if self._order is None or self._order[0] != epoch:
                self._order = (epoch, _shuffle(count, "order", self.config.seed, epoch))
            parts.append(self._order[1][place : place + left])
            first, left = first + len(parts[-1]), left - len(parts[-1])
        return self._numbered(np.concatenate(parts))

    def _numbered(self, places: np.ndarray) -> np.ndarray:
        """The windows at these places of the subset."""
        return places if isinstance(self.windows, range) else self.windows[places]

    def _batches(self) -> list[tuple[Tensor, Tensor]]:
        """Inputs and targets (B, T) of this step, one pair for each of its micro-steps: of each, this process's part."""
        windows, size = self._windows_at(self.step), self.config.batch_size
        parts = [self.ranks.slice_of(windows[first : first + size]) for first in range(0, len(windows), size)]
        return [self.data.batch(part) for part in parts]

    def _update(self, loss: float, norm: float) -> Update | None:
        """What the optimizer is to do with a gradient of this length (of the loss as scaled); None is nothing."""
        config, norm = self.config, norm / self._loss_scale
        may_overflow = self.arithmetic["precision"] == "fp16"
        if not math.isfinite(loss) or not (math.isfinite(norm) or may_overflow):
            self._diverge(f"loss {loss}, gradient norm {norm}", self.step + 1)
            return None
        self.step += 1
        self._first_loss = loss if self._first_loss is None else self._first_loss
        self._losses = (self._losses[0] + loss, self._losses[1] + 1)
        scale = self._loss_scale
        if may_overflow:
            self._rescale(math.isfinite(norm))
        if not math.isfinite(norm):
            self._skipped += 1
            return None
        clip = min(1.0, config.grad_clip / norm) if norm > 0 else 1.0
        rate = learning_rate_at(self.step - 1, config)
        return Update(clip / scale, rate, config.weight_decay, config.beta1, config.beta2)

    def _rescale(self, good: bool) -> None:
        """The loss scale of fp16: half after an overflow, double after 2,000 good steps (Micikevicius et al. 2018)."""
        if not self.config.loss_scaling:
            self._good_steps = 0 if good else self._good_steps - 1
            if backend.LOSS_SCALE * 2**self._good_steps < 1:  # as patient as where there is a scale to halve
                self._diverge(f"gradients overflow fp16 in {-self._good_steps} steps in a row, unscaled", self.step)
            return
        self._good_steps = self._good_steps + 1 if good else 0
        if not good:
            self._loss_scale /= 2
            if self._loss_scale < 1:
                self._diverge("gradients overflow fp16 at every loss scale down to 1", self.step)
        elif self._good_steps == 2000:
            self._loss_scale, self._good_steps = self._loss_scale * 2, 0

    def _after_step(self) -> None:
        """Evaluate where it is time, and end where it is over."""
        at_end = self.step == self.config.max_steps
        if self._status is None and (at_end or self.step % self.config.eval_interval == 0):
            self._evaluate()
        if self._status is None and at_end:
            self._end("finished")

    def _keep(self) -> None:
        """Save a checkpoint where it is time for one."""
        if self.checkpoint and 0 < self.config.checkpoint_minutes * 60 < time.perf_counter() - self._saved:
            self.save()
            self._saved = time.perf_counter()

    def _randomness(self) -> contextlib.AbstractContextManager:
        if self.model.config.dropout == 0:
            return contextlib.nullcontext()
        rank = [self.ranks.rank] if self.ranks.size > 1 else []
        return _drawing_from(self.device, int(_seed("dropout", self.config.seed, self.step, *rank)[0]))

    def _is_to_stop(self) -> bool:
        """Processes that train together stop after the same step, or those that go on would wait for the others."""
        return self._stop.is_set() if self.ranks.size == 1 else self._all_stop

    def _evaluate(self) -> None:
        config = self.config
        tokens = config.eval_tokens
        if config.patience is None and self.step < config.max_steps:
            since_last = config.eval_interval * self._tokens_per_step
            tokens = min(tokens, max(8 * config.seq_len, min(tokens // 4, since_last // 8)))
        whose = self.token_bytes, self.arithmetic, self.ranks
        score = evaluate(self.model, self.val_tokens, config.seq_len, tokens, *whose)
        if not math.isfinite(score["val_loss"]):
            return self._diverge(f"validation loss {score['val_loss']}", self.step)
        total, count = self._losses
        self._losses = (0.0, 0)
        point = {
            "step": self.step,
            "tokens": self.step * self._tokens_per_step,
            "train_loss": total / count,
            **score,
            "learning_rate": learning_rate_at(self.step - 1, config),
            "seconds": round(self._seconds, 3),
        }
        self.curve.append(point)
        worst = max(math.log(self.model.config.vocab_size), self._first_loss) + 2
        if self.step > config.warmup_steps and point["train_loss"] > worst:
            self._diverge(f"training loss {point['train_loss']:.3f}, above {worst:.3f}", self.step)
        elif config.patience is not None:
            if self._best is None or point["val_loss"] < self._best["val_loss"]:
                self._best = point
                self._best_weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
            elif (waited := sum(p["step"] > self._best["step"] for p in self.curve)) >= config.patience:
                best = self._best["step"]
                self._end("early_stopped", f"no better val_loss in {waited} evaluations since step {best}")
        if self.on_eval:
            self.on_eval(dict(point))

    def _diverge(self, what: str, step: int) -> None:
        self._end("diverged", f"{what} at step {step}; a lower learning_rate or a longer warm-up may help")

    def _end(self, status: str, reason: str | None = None) -> None:
        self._status, self._reason = status, reason
        if self._best_weights and status in ("finished", "early_stopped"):
            copy_weights(self.model, self._best_weights, "the best weights")
            self._best_weights = {}

    def _result(self) -> TrainResult:
        self.model.eval()
        last = self.curve[-1] if self.curve else {"train_loss": None, "val_loss": None, "val_bpb": None}
        ended = self._status in ("finished", "early_stopped")
        best = self._best or (last if ended else {"val_loss": None, "step": None})
        final = best if ended else last
        diverged = self._status == "diverged"
        seen = self.step * self.config.windows_per_step
        order = self._numbered(_shuffle(len(self.windows), "order", self.config.seed, 0)[:seen])
        return TrainResult(
            status=self._status,
            reason=self._reason,
            steps=self.step,
            tokens_seen=self.step * self._tokens_per_step,
            unique_tokens=self.data.covered(order),
            epochs=seen / len(self.windows),
            train_loss=last["train_loss"],
            val_loss=None if diverged else final["val_loss"],
            val_bpb=None if diverged else final["val_bpb"],
            best_val_loss=best["val_loss"],
            best_step=best["step"],
            curve=list(self.curve),
            seconds=self._seconds,
            tokens_per_second=self._tokens_per_second,
        )


# What a checkpoint keeps besides tensors: attributes of the Trainer that are plain values, and what they may be.
_NUMBER = (int, float)
_PROGRESS = {
    **{"step": int, "curve": list, "_status": (str, type(None)), "_reason": (str, type(None))},
    **{"_first_loss": (*_NUMBER, type(None)), "_losses": (list, tuple), "_seconds": _NUMBER, "_step_seconds": _NUMBER},
    **{"_best": (dict, type(None)), "_loss_scale": _NUMBER, "_good_steps": int, "_skipped": int},
}


def _is_progress(told: object, max_steps: int) -> bool:
    """Whether a checkpoint's ``progress`` is of the kind that ``Trainer.save`` writes, and nothing besides."""
    if not isinstance(told, dict) or told.keys() != _PROGRESS.keys():
        return False
    if not all(isinstance(told[name], kind) for name, kind in _PROGRESS.items()):
        return False
    points = [*told["curve"], *([] if told["_best"] is None else [told["_best"]])]
    plain = all(isinstance(point, dict) and isinstance(point.get("step"), int) for point in points)
    plain = plain and all(isinstance(p.get(name), _NUMBER) for p in points for name in ("train_loss", "val_loss"))
    plain = plain and all(isinstance(point.get("val_bpb"), (*_NUMBER, type(None))) for point in points)
    losses = len(told["_losses"]) == 2 and all(isinstance(value, _NUMBER) for value in told["_losses"])
    return plain and losses and 0 <= told["_skipped"] <= told["step"] <= max_steps


def train_together(
    trainers: list[Trainer], on_end: Callable[[Trainer, TrainResult], None] | None = None
) -> list[TrainResult]:
    """Train each to its end, or until it is stopped, and return their results in order.

    More than one must be of one shape (model, batch and arithmetic, which must be ``stacked``); they may differ in all
    else. Their steps are computed together, and each leaves when it ends; ``on_end`` is called then. Time is shared
    out evenly among those that were training. Ctrl-C stops all, with checkpoints; a second one interrupts at once.
    """
    for trainer in trainers:
        trainer._status = None if trainer._status == "stopped" else trainer._status
        trainer._saved = time.perf_counter()
    active = [trainer for trainer in trainers if trainer._status is None]
    results: dict[int, TrainResult] = {}

    def leave(trainer: Trainer) -> None:
        trainer._stop.clear()
        trainer._all_stop, trainer._stack = False, None
        if trainer.checkpoint:
            trainer.save()
        results[id(trainer)] = trainer._result()
        if on_end:
            on_end(trainer, results[id(trainer)])

    shown = max((t for t in active if t.progress), key=lambda t: t.config.max_steps - t.step, default=None)
    total, done = (shown.config.max_steps, shown.step) if shown else (0, 0)
    stack = None
    bar = progress_bar(total, done, "training", "step", enabled=shown is not None)
    with bar, _stop_at_interrupt(active):
        while True:
            for trainer in active:
                if trainer._status is None and trainer._is_to_stop():
                    trainer._end("stopped", f"stopped on request after step {trainer.step}")
            if any(trainer._status for trainer in active):
                for trainer in [t for t in active if t._status]:
                    leave(trainer)
                active, stack = [t for t in active if not t._status], None
            if not active:
                break
            stack = stack or Stack([trainer.lane for trainer in active], active[0].arithmetic)
            began = time.perf_counter()
            losses = _step_together(active, stack)
            for trainer in active:
                trainer._after_step()
            share = (time.perf_counter() - began) / len(active)
            for trainer in active:
                trainer._seconds += share
                trainer._keep()
            if shown in active:
                loss = losses[active.index(shown)]
                bar.update(shown.step, lambda loss=loss: f"loss {loss:.3f}, {shown._tokens_per_second:,.0f} tokens/s")
    return [results[id(t)] if id(t) in results else t._result() for t in trainers]


def _step_together(trainers: list[Trainer], stack: Stack) -> list[float]:
    """One step of trainers of one shape: data, forward, backward, clipping, AdamW. Returns the losses before it."""
    began = time.perf_counter()
    first = trainers[0]
    total = gradients = None
    batches = [trainer._batches() for trainer in trainers]
    with first._randomness():
        for micro in zip(*batches, strict=True):
            inputs, targets = (_to_device(torch.stack(parts), first.device) for parts in zip(*micro, strict=True))
            part = inputs.shape[1] / first.config.batch_size  # 1 where this process is alone
            losses, parts = stack.gradients(inputs, targets, first._loss_scale / len(batches[0]) * part)
            losses = losses if part == 1 else losses * part
            total = losses if total is None else total + losses
            gradients = parts if gradients is None else gradients.add_(parts)
    if first.ranks.size > 1:
        gradients, total = _summed(trainers, gradients, total)
    numbers = torch.stack([total / len(batches[0]), stack.norms(gradients)]).tolist()  # the one wait for the device
    updates = [trainer._update(*pair) for trainer, *pair in zip(trainers, *numbers, strict=True)]
    stack.update(gradients, updates)
    share = (time.perf_counter() - began) / len(trainers)
    for trainer in trainers:
        trainer._step_seconds += share
    return numbers[0]


def _summed(trainers: list[Trainer], gradients: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (M, P) and losses (M,) over all processes, in one sum that also tells who is asked to stop."""
    stops = losses.new_tensor([trainer._stop.is_set() for trainer in trainers])
    sizes = gradients.numel(), len(losses), len(stops)
    flat, losses, stops = trainers[0].ranks.sum(torch.cat([gradients.flatten(), losses, stops])).split(sizes)
    for trainer, votes in zip(trainers, stops.tolist(), strict=True):
        trainer._all_stop = votes > 0
    return flat.view(gradients.shape), losses


def _seed(*parts: str | int) -> np.ndarray:
    """Eight 32-bit words that follow from the parts alone, as different for seeds 0 and 1 as for any others."""
    return np.frombuffer(hashlib.sha256(repr(parts).encode()).digest(), dtype="<u4")


def _shuffle(count: int, *parts: str | int) -> np.ndarray | _Permutation:
    """A permutation of range(count), which can be sliced. RandomState, because numpy promises its stream for all versions to
    come."""
    if count > SHUFFLED_WHOLE:
        return _Permutation(count, _seed(*parts))
    return np.random.RandomState(_seed(*parts)).permutation(count)


class _Permutation:
    """A permutation of range(count) that takes no room: any slice of it is drawn by itself.

    A Feistel network (Luby & Rackoff 1988), one round a key (a uint32 each), over the smallest power of four that holds
    count; what falls outside goes through it again until it falls inside (Black & Rogaway 2002). The rounds mix with the
    finalizer of SplitMix64 (Steele et al. 2014).
    """

    AT_ONCE = 1 << 20

    def __init__(self, count: int, keys: np.ndarray):
        self._count, self._keys = count, keys.astype(np.uint64) << np.uint64(32)
        self._half = np.uint64(((count - 1).bit_length() + 1) // 2)
        self._mask = (np.uint64(1) << self._half) - np.uint64(1)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, part: slice) -> np.ndarray:
        places = range(self._count)[part]
        found = np.empty(len(places), dtype=np.int64)
        for first in range(0, len(places), self.AT_ONCE):
            some = places[first : first + self.AT_ONCE]
            drawn = self._mapped(np.arange(some.start, some.stop, some.step, dtype=np.uint64))
            while (outside := drawn >= self._count).any():
                drawn[outside] = self._mapped(drawn[outside])
            found[first : first + len(some)] = drawn
        return found

    def _mapped(self, numbers: np.ndarray) -> np.ndarray:
        left, right = numbers >> self._half, numbers & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right | key) & self._mask)
        return left << self._half | right


def _mixed(x: np.ndarray) -> np.ndarray:
    """Every bit of each uint64 spread over all of it."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@contextlib.contextmanager
def _drawing_from(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the device's global generator for a while, and leave it as it was; touch no other device's generator."""
    if device.type == "cpu":
        get, put, reseed = torch.get_rng_state, torch.set_rng_state, torch.default_generator.manual_seed
    else:
        module = torch.get_device_module(device)
        get, put, reseed = module.get_rng_state, module.set_rng_state, module.manual_seed
    before = get()
    reseed(seed)
    try:
        yield
    finally:
        put(before)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@contextlib.contextmanager
def _stop_at_interrupt(trainers: list[Trainer]) -> Iterator[None]:
    """Turn the first Ctrl-C into a stop of all and the second into KeyboardInterrupt, where Ctrl-C has its usual meaning
    and this is the thread that hears it. Among several processes also SIGTERM, by which torchrun hands on its own end."""
    heard = threading.Event()
    usual = {signal.SIGINT: signal.default_int_handler}
    if any(trainer.ranks.size > 1 for trainer in trainers):
        usual[signal.SIGTERM] = signal.SIG_DFL
    if threading.current_thread() is not threading.main_thread() or any(
        signal.getsignal(number) is not handler for number, handler in usual.items()
    ):
        yield
        return

    def handle(number: int, frame: object) -> None:
        if heard.is_set():
            raise KeyboardInterrupt
        heard.set()
        for trainer in trainers:
            trainer.request_stop()

    for number in usual:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def _sample(tokens: np.ndarray) -> np.ndarray:
    """All of a small text, 256 spans of 256 tokens spread evenly over a large one: few pages of a map are read."""
    if len(tokens) <= 1 << 16:
        return np.asarray(tokens)
    spans = np.linspace(0, len(tokens) - 256, 256).astype(np.int64)
    return tokens[spans[:, None] + np.arange(256)]


def _fingerprint(tokens: np.ndarray) -> dict:
    """Tells texts apart by length and sample, so that a checkpoint is not gone on with on another text by mistake."""
    return {"tokens": len(tokens), "sample_sha256": sha256_bytes(_sample(tokens).astype("<u4").tobytes())}


def _check_vocabulary(vocab_size: int, token_bytes: np.ndarray | None, **texts: np.ndarray) -> None:
    for name, tokens in texts.items():
        if (largest := int(_sample(tokens).max())) >= vocab_size:
            raise ConfigError(
                "vocab_size must be that of the tokenizer",
                f"vocab_size={vocab_size}, the {name} tokens go up to {largest}",
                "set vocab_size to the tokenizer's, or encode the text anew",
            )
    if token_bytes is not None and len(token_bytes) != vocab_size:
        raise ConfigError(
            "token_bytes must hold one number for each id",
            f"{len(token_bytes)} numbers, vocab_size={vocab_size}",
            "give the token_bytes of the tokenizer that encoded the text",
        )


class progress_bar:
    """Progress of ``total`` units, as a context: ``bar.update(done, note)``, where note() gives the words beside it.

    A bar in a terminal or a notebook someone looks at; elsewhere (logs, papermill) a plain line about every 10 s and
    one at the end. Cheap enough to be told of every step.
    """

    def __init__(
        self,
        total: int,
        initial: int = 0,
        label: str = "",
        unit: str = "it",
        enabled: bool = True,
        interval: float = 10.0,
    ):
        self.total, self.label, self.unit, self.enabled = total, label, unit, enabled
        self._initial, self._began = initial, time.monotonic()
        self._bar = None
        if enabled and _has_screen():
            from tqdm.auto import tqdm

            self._bar = tqdm(total=total, initial=initial, desc=label or None, unit=unit)
        self._interval = 0.2 if self._bar is not None else interval
        self._next = self._began + self._interval

    def __enter__(self) -> progress_bar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, done: int, note: Callable[[], str] = str) -> None:
        now = time.monotonic()
        if not self.enabled or (now < self._next and done < self.total):
            return
        self._next = now + self._interval
        if self._bar is not None:
            self._bar.set_postfix_str(note(), refresh=False)
            self._bar.update(done - self._bar.n)
            return
        left = (now - self._began) / max(1, done - self._initial) * (self.total - done)
        words = [f"{self.label} {done}/{self.total} {self.unit}s".strip(), note(), f"{_clock(left)} left"]
        out = sys.stdout if in_kernel() else sys.stderr
        print(", ".join(word for word in words if word), file=out, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


def _has_screen() -> bool:
    """Whether someone watches: a terminal, or a kernel that a notebook's front end started (papermill has none)."""
    if in_kernel():
        return any(name in os.environ for name in ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG"))
    return sys.stderr.isatty()
