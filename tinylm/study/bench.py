"""How fast this package is on this machine: beside transformers' Llama of the same shapes, and beside the machine's limits.

Each contender lives in a process of its own, so that no setting of one reaches another. All are set up and warmed first;
then they take turns, one at a time, in rounds whose order rotates, and a figure is the median over the rounds with its
quartiles. Ratios are taken within a round. A section's raw turns are kept as one JSON file, and the report is drawn from
these files alone: sections may be measured on different days, and redrawn without measuring (``only=("report",)``).

FLOPs are those of ``counts``: matrix products only, causal keys only, backward twice forward. The limit is the largest
rate of a square matrix product that was measured beside the contenders.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import io
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinylm import counts, files
from tinylm.config import DataConfig, GenerateConfig, ModelConfig, TrainConfig
from tinylm.errors import ConfigError, LabError
from tinylm.ranks import ALONE, Ranks
from tinylm.study.parameters import repository, within_repository

SCHEMA = 1
FAST, PLAIN = {"compile": None, "precision": "auto"}, {"compile": False, "precision": "fp32"}
OWN = {"tinylm": FAST, "tinylm, no compiler": {**FAST, "compile": False}, "tinylm, plain": PLAIN}
PEERS = {
    "transformers": {},
    "transformers, compiled": {"compile": True},
    "transformers, bf16 autocast": {"autocast": True},
}
BASE = "transformers"  # what ratios are against
PARITY = {  # how the same runs are trained: each alone on either path, and in a sweep; short runs would not be compiled unasked
    "plain": ("sequential", PLAIN),
    "fast": ("sequential", {**FAST, "compile": True}),
    "sweep": ("engine", {**FAST, "compile": True}),
}
PARITY_RATE = 8e-3  # about the best of runs so small, where rounding has grown more by the end than at small rates


@dataclass(frozen=True)
class Shape:
    """A Llama-like model, and the windows of one training step."""

    hidden_size: int
    num_layers: int
    num_heads: int
    vocab_size: int
    max_seq_len: int
    windows: int

    @property
    def model(self) -> ModelConfig:
        fields = dataclasses.asdict(self)
        del fields["windows"]
        return ModelConfig(**fields).resolve()

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.windows * self.max_seq_len

    @property
    def flops_per_token(self) -> float:
        return counts.train_flops_per_token(self.model, self.max_seq_len)


SHAPES = {
    "Z": Shape(32, 2, 2, 256, 128, 16),
    "A": Shape(64, 2, 4, 512, 128, 64),
    "B": Shape(128, 4, 4, 1024, 128, 64),
    "C": Shape(256, 6, 8, 2048, 256, 16),
    "D": Shape(384, 6, 6, 4096, 256, 16),
    "tiny": Shape(16, 1, 2, 256, 32, 4),
}


@dataclass(frozen=True)
class Sweep:
    """A sweep to time: ``rates`` learning rates times ``seeds`` seeds, ``windows`` a step."""

    shape: str
    windows: int
    rates: int
    seeds: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.shape}, {self.windows * SHAPES[self.shape].max_seq_len} tokens a step"

    @property
    def count(self) -> int:
        return self.rates * self.seeds


@dataclass(frozen=True)
class Preset:
    """How much is measured. cores: threads of training, and workers of sweeps (None: all there are); rounds: turns of each
    contender; seconds: of each turn, at least; squares: sizes of matrix products; stream_mb: size of the arrays whose copy
    measures memory; corpora: MB of token maps; growth: shape and windows a step; parity: shapes, seeds and steps."""

    name: str = "full"
    cores: int | None = None
    rounds: int = 7
    seconds: float = 2.0
    squares: tuple[int, ...] = (512, 1024, 2048, 4096)
    stream_mb: int = 512
    shapes: tuple[str, ...] = ("Z", "A", "B", "C", "D")
    contenders: tuple[str, ...] = (*OWN, *PEERS)
    generation: tuple[tuple[str, int], ...] = (("A", 1), ("A", 16), ("C", 1))  # shape and sequences
    new_tokens: int | None = None  # None: to the end of the window
    sweeps: tuple[Sweep, ...] = (
        Sweep("Z", 2, 8, 2, 2000),
        Sweep("Z", 4, 8, 2, 2000),
        Sweep("A", 16, 4, 2, 1500),
    )
    sweep_rounds: int = 5
    growth: tuple[str, tuple[int, ...]] = ("B", (8, 16, 32, 64, 128))
    same_tokens: int = 4096
    corpora: tuple[int, ...] = (1, 10, 100)
    corpus_steps: int = 200
    profile_steps: int = 20
    parity: tuple[tuple[str, ...], int, int] = (("Z", "A", "B"), 5, 600)


PRESETS = {
    "full": Preset(),
    "smoke": Preset(
        name="smoke",
        cores=1,
        rounds=3,
        seconds=0.1,
        squares=(128, 256),
        stream_mb=16,
        shapes=("tiny",),
        contenders=("tinylm", "tinylm, plain", "transformers"),
        generation=(("tiny", 1), ("tiny", 4)),
        new_tokens=16,
        sweeps=(Sweep("tiny", 4, 2, 2, 40),),
        sweep_rounds=2,
        growth=("tiny", (4,)),
        same_tokens=128,
        corpora=(1, 4),
        corpus_steps=10,
        profile_steps=3,
        parity=(("tiny",), 2, 30),
    ),
}


# ----------------------------------------------------------------------------------------------------- is anyone there


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy(folder: Path | None = None, seconds: float = 0.5) -> list[str]:
    """Why this machine is no place to measure on now, in words; empty where nothing speaks against it.

    Looked at are the load average, what other processes use of the cores for ``seconds``, and the locks that a sweep
    holds in results folders under ``folder`` (None: the repository's results).
    """
    reasons = []
    cores = _cores()
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > 0.25 * cores:
        reasons.append(f"the load average of the last minute is {load:.2f} on {cores} cores")
    before = _cpu_seconds()
    time.sleep(seconds)
    for pid, (used, words) in sorted(_cpu_seconds().items()):
        share = (used - before.get(pid, (used, ""))[0]) / seconds
        if share > 0.1 and pid != os.getpid():
            reasons.append(f"process {pid} ({words}) uses {share:.0%} of a core")
    locks = (repository() / "results" if folder is None else folder).glob("**/.checkpoints/*.lock")
    for place in sorted({path.parent.parent for path in locks if _is_held(path)}):
        reasons.append(f"a sweep is at work in {within_repository(place)}")
    return reasons


def _cpu_seconds() -> dict[int, tuple[float, str]]:
    """Processor time and command of every process; empty where there is no /proc."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            ticks = (path / "stat").read_text().rpartition(")")[2].split()[11:13]  # utime and stime
            words = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
            told = " ".join(Path(word).name for word in words[:4])[:60].strip()  # no folders: reports are published
            found[int(path.name)] = (sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"), told or "of the system")
    return found


def _is_held(path: Path) -> bool:
    try:
        import fcntl

        with open(path, "rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        pass
    return False


class _Watch:
    """What others used of the cores while something was measured: ``share()`` is theirs, and what the host took."""

    def __init__(self) -> None:
        self.began, self.before = time.monotonic(), self._read()

    def _read(self) -> tuple[float, float] | None:
        try:
            ticks = [int(word) / os.sysconf("SC_CLK_TCK") for word in Path("/proc/stat").read_text().split()[1:9]]
        except (OSError, ValueError):
            return None
        mine = os.times()
        own = mine.user + mine.system + mine.children_user + mine.children_system
        return sum(ticks[i] for i in (0, 1, 2, 5, 6)) - own, ticks[7]

    def share(self) -> dict[str, float | None]:
        now, cpu = self._read(), (time.monotonic() - self.began) * (os.cpu_count() or 1)
        if now is None or self.before is None:
            return {"others": None, "stolen": None}
        others, stolen = (max(0.0, b - a) / cpu for a, b in zip(self.before, now, strict=True))
        return {"others": others, "stolen": stolen}


# ---------------------------------------------------------------------------------------- contenders, in their own process


def _transformers() -> object:
    """The peer's library. Raises LabError where it is not there."""
    try:
        import transformers
        from transformers import LlamaForCausalLM  # noqa: F401  (loaded late: a broken installation shows here)
    except (ImportError, RuntimeError) as error:
        raise LabError(
            "Comparing with transformers needs that library, which only the tests and the bench use",
            f"{type(error).__name__}: {error}",
            "use `make bench`, or pip install -e '.[test]'; `--only machine,sweep,profile,growth,parity` need none",
        ) from error
    return transformers


def _llama(shape: Shape) -> object:
    """transformers' model of the same shape, in fp32, with as many parameters as ours."""
    transformers, config = _transformers(), shape.model
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    own, other = counts.parameters(config)["total"], sum(p.numel() for p in model.parameters())
    if own != other:
        raise LabError(
            "Models that are compared must be of one shape", f"{own} parameters here, {other} there", "change SHAPES"
        )
    return model


def _token_map(path: Path, count: int, vocab_size: int) -> Path:
    """A map of token ids as the tokenizer writes them, uint16, Zipf-distributed; in constant memory."""
    import numpy as np

    rng = np.random.default_rng(0)
    summed = np.cumsum(1 / np.arange(1, vocab_size + 1))
    with files.writing_aside(path) as file:
        for start in range(0, count, 1 << 20):
            draws = rng.random(min(1 << 20, count - start)) * summed[-1]
            file.write(np.searchsorted(summed, draws).astype(np.uint16).tobytes())
    return path


def _own_trainer(job: dict, ranks: Ranks = ALONE) -> object:
    """The package's trainer of a job, far from the end of its schedule."""
    import numpy as np

    from tinylm.train import Trainer

    shape, tokens = Shape(**job["shape"]), np.memmap(job["tokens"], dtype=np.uint16, mode="r")
    config = TrainConfig(
        batch_size=shape.windows, max_steps=10**6, eval_interval=10**6, threads=job["threads"], **job["path"]
    )
    trainer = Trainer(shape.model, config, tokens, tokens[-(10 * shape.max_seq_len) :], ranks=ranks)
    trainer.model.train()
    return trainer


def _train(job: dict) -> tuple[Callable[[], dict], dict]:
    """A step of the package: data, forward, backward, clipping, AdamW."""
    from tinylm import backend

    trainer, tokens = _own_trainer(job), Shape(**job["shape"]).tokens

    def unit() -> dict:
        loss = trainer.train_step()
        if not math.isfinite(loss):
            raise LabError("A step must have a finite loss", loss, "look at the path that was chosen for it")
        return {"amount": tokens}

    return unit, {"path": backend.words(trainer.arithmetic)}


def _train_llama(job: dict) -> tuple[Callable[[], dict], dict]:
    """A step of transformers' Llama as a person writes it, with our loader and torch's fused AdamW."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    from tinylm.train import TextDataset

    shape, autocast = Shape(**job["shape"]), job.get("autocast", False)
    model = _llama(shape)
    model.train()
    forward = torch.compile(model) if job.get("compile") else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    data = TextDataset.from_tokens(np.memmap(job["tokens"], dtype=np.uint16, mode="r"), shape.max_seq_len)
    rng = np.random.default_rng(0)

    def unit() -> dict:
        inputs, targets = data.batch(rng.integers(0, len(data), shape.windows))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = forward(input_ids=inputs, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        return {"amount": shape.tokens}

    words = ["compiled" if job.get("compile") else "eager", "bf16 autocast" if autocast else "fp32"]
    return unit, {"path": ", ".join([*words, model.config._attn_implementation])}


class _Ids:
    """Stands for a tokenizer where only ids matter: prompts and new tokens are counted, not read."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        return [ord(sign) % self.vocab_size for sign in text]

    def decode(self, ids: Sequence[int]) -> str:
        return ""


PROMPT = "In the be"  # so many tokens


def _new_tokens(job: dict, shape: Shape) -> int:
    return job["new_tokens"] or shape.max_seq_len - len(PROMPT)


def _generate(job: dict) -> tuple[Callable[[], dict], dict]:
    from tinylm.generate import generate
    from tinylm.model import TinyLM

    shape = Shape(**job["shape"])
    model, tokenizer = TinyLM(shape.model).eval(), _Ids(shape.vocab_size)
    prompts = PROMPT if job["sequences"] == 1 else [PROMPT] * job["sequences"]
    config = GenerateConfig(temperature=1.0, max_new_tokens=_new_tokens(job, shape))

    def unit() -> dict:
        done = generate(model, tokenizer, prompts, config)
        return {"amount": sum(len(one.token_ids) for one in (done if isinstance(done, list) else [done]))}

    return unit, {}


def _generate_llama(job: dict) -> tuple[Callable[[], dict], dict]:
    import torch

    shape, transformers = Shape(**job["shape"]), _transformers()
    model = _llama(shape).eval()
    ids = torch.tensor([_Ids(shape.vocab_size).encode(PROMPT)] * job["sequences"])
    config = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, use_cache=True, pad_token_id=0, eos_token_id=None,
        max_new_tokens=_new_tokens(job, shape),
    )  # fmt: skip

    def unit() -> dict:
        new = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return {"amount": (new.shape[1] - ids.shape[1]) * new.shape[0]}

    return unit, {}


def _runs(job: dict) -> list:
    """The runs of a sweep: learning rates that all of them survive, and seeds."""
    from tinylm.study.runs import Run

    shape = SHAPES[job["shape"]]
    count = job.get("rates", 1)
    rates = [job["rate"]] if "rate" in job else [1e-3 * 8 ** (i / max(1, count - 1)) for i in range(count)]
    model = shape.model.replace(init="scaled")
    data = DataConfig(text="zipf-markov", tokenizer="byte" if shape.vocab_size == 256 else "bpe")
    return [
        Run(
            model,
            TrainConfig(
                learning_rate=rate,
                batch_size=job["windows"],
                max_steps=job["steps"],
                warmup_steps=job["steps"] // 10,
                seed=seed,
                **job["path"],
            ),
            data,
        )
        for rate in rates
        for seed in range(job["seeds"])
    ]


def _engine(job: dict) -> tuple[Callable[[], dict], dict]:
    """A whole sweep in a new folder, from the start of its workers to the last record."""
    from tinylm.study.sweep import sweep

    runs = _runs(job)

    def unit() -> dict:
        with tempfile.TemporaryDirectory() as folder:
            frame = sweep(runs, folder, workers=job["threads"], progress=False)
        _check_finished(frame["status"], frame["reason"])
        return {"amount": len(runs), "losses": [float(loss) for loss in frame["val_loss"]]}

    return unit, {}


def _sequential(job: dict) -> tuple[Callable[[], dict], dict]:
    """The same runs one after another on all threads, without records: what a plain loop over a Trainer costs."""
    from tinylm.study.runs import prepare_corpus
    from tinylm.train import Trainer

    runs = _runs(job)
    corpus = prepare_corpus(runs[0])

    def train(run, **changes) -> object:
        config = run.train.replace(threads=job["threads"], **changes)
        return Trainer(run.model, config, corpus.train, corpus.val, corpus.tokenizer.token_bytes).run()

    def unit() -> dict:
        results = [train(run) for run in runs]
        _check_finished([result.status for result in results], [result.reason for result in results])
        return {"amount": len(runs), "losses": [result.val_loss for result in results]}

    train(runs[0], max_steps=max(2, job["steps"] // 50), warmup_steps=1)  # warm, without a whole pass
    return unit, {}


def _check_finished(statuses: Sequence[str], reasons: Sequence[str | None]) -> None:
    for status, reason in zip(statuses, reasons, strict=True):
        if status != "finished":
            raise LabError("Runs that are timed must finish", f"{status}: {reason}", "mend what is said there first")


def _square(job: dict) -> tuple[Callable[[], dict], dict]:
    """Square products; ``best`` is the largest rate of any so far, FLOP/s."""
    import torch

    made = {size: torch.randn(size, size).to(getattr(torch, job["dtype"])) for size in job["squares"]}
    best = 0.0

    def unit() -> dict:
        nonlocal best
        amount = 0
        for size, matrix in made.items():
            begun = time.perf_counter()
            torch.mm(matrix, matrix)
            best = max(best, 2 * size**3 / (time.perf_counter() - begun))
            amount += 2 * size**3
        return {"amount": amount, "best": best}

    return unit, {}


def _machine(job: dict) -> tuple[Callable[[], dict], dict]:
    """The machine at so many threads, each figure the best of several tries."""
    import torch

    def best(run: Callable[[], object], least: int = 3) -> float:
        """Seconds of the quickest of at least ``least`` calls, for as long as a turn is."""
        run()
        times, until = [], time.perf_counter() + job["seconds"]
        while len(times) < least or time.perf_counter() < until:
            begun = time.perf_counter()
            run()
            times.append(time.perf_counter() - begun)
        return min(times)

    def unit() -> dict:
        rows = []
        for dtype, size in ((d, s) for d in ("float32", "bfloat16") for s in job["squares"]):
            square = torch.randn(size, size).to(getattr(torch, dtype))
            rate = 2 * size**3 / best(lambda square=square: torch.mm(square, square))
            rows.append({"what": f"{dtype} product", "size": size, "value": rate / 1e9, "unit": "GFLOP/s"})
        count = job["stream_mb"] * 10**6 // 4
        a, b, c = (torch.ones(count) for _ in range(3))
        for what, moved, run in (
            ("copy", 8 * count, lambda: b.copy_(a)),
            ("triad", 12 * count, lambda: torch.add(a, b, alpha=3.0, out=c)),
        ):
            rows.append({"what": what, "size": count, "value": moved / best(run) / 1e9, "unit": "GB/s"})
        one, number = torch.ones(1), 2000

        def many() -> None:
            for _ in range(number):
                one.add_(1.0)

        rows.append({"what": "tiny operation", "size": 1, "value": best(many) / number * 1e6, "unit": "µs"})
        return {"amount": 1, "rows": rows}

    return unit, {}


# Where a step's time goes: a name's group is the first whose pattern it matches. What lies within the data or the optimizer
# counts there, whatever it is called.
GROUPS = {
    "data": r"^data$",
    "optimizer": r"^optimizer$",
    "loss function": r"log_softmax|nll_loss|cross_entropy|logsumexp",
    "attention": r"scaled_dot_product|softmax|flash_attention|bmm",
    "matrix products": r"::(add)?mm$|::linear$|::matmul$|mkldnn|onednn|gemm|cpp_[a-z_]*mm",
    "norm, elementwise, embedding": r"^aten::|^graph_|cpp_",
}
REST = "dispatch, views and Python"
_WHOLE = ("data", "optimizer")
_VIEWS = (
    "as_strided view reshape transpose resolve_conj resolve_neg detach slice select narrow expand unsqueeze to unbind"
)


def group_of(names: Sequence[str]) -> str:
    """The group of an operation from its own name and those it was called within, innermost first."""
    for group in _WHOLE:
        if any(re.search(GROUPS[group], name, re.IGNORECASE) for name in names):
            return group
    if names[0].removeprefix("aten::") in _VIEWS.split():
        return REST
    return next((g for g, pattern in GROUPS.items() if re.search(pattern, names[0], re.IGNORECASE)), REST)


def _profile(job: dict) -> tuple[Callable[[], dict], dict]:
    """Seconds of a step by group, from torch's profiler, beside the step's time without it."""
    import torch._inductor.config as inductor
    from torch.profiler import ProfilerActivity, profile, record_function

    from tinylm import backend
    from tinylm.stack import Stack
    from tinylm.train import TextDataset

    def named(group: str, function: Callable) -> Callable:
        def inside(*arguments):
            with record_function(group):
                return function(*arguments)

        return inside

    inductor.cpp.enable_kernel_profile = True  # or compiled kernels would be one nameless block
    TextDataset.batch = named("data", TextDataset.batch)  # this process measures and ends
    Stack.norms, Stack.update = named("optimizer", Stack.norms), named("optimizer", Stack.update)
    trainer, steps = _own_trainer(job), job["steps"]

    def unit() -> dict:
        begun = time.perf_counter()
        for _ in range(steps):
            trainer.train_step()
        plain = (time.perf_counter() - begun) / steps
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            begun = time.perf_counter()
            for _ in range(steps):
                trainer.train_step()
            watched = (time.perf_counter() - begun) / steps
        groups = dict.fromkeys([*GROUPS, REST], 0.0)
        for event in profiler.events():
            names, parent = [event.name], event.cpu_parent
            while parent is not None:
                names.append(parent.name)
                parent = parent.cpu_parent
            groups[group_of(names)] += event.self_cpu_time_total / 1e6 / steps
        groups[REST] += max(0.0, watched - sum(groups.values()))
        return {"amount": 1, "groups": groups, "step_seconds": plain, "profiled_seconds": watched}

    return unit, {"path": backend.words(trainer.arithmetic)}


KINDS = {
    "train": _train,
    "train transformers": _train_llama,
    "generate": _generate,
    "generate transformers": _generate_llama,
    "engine": _engine,
    "sequential": _sequential,
    "square": _square,
    "machine": _machine,
    "profile": _profile,
}


def _memory() -> dict[str, float]:
    """MB (1e6 bytes) of this process: the most it held since ``_forget_peak``, and what it holds now, its own and mapped."""
    try:
        words = re.findall(
            r"^(VmHWM|RssAnon|RssFile|RssShmem):\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M
        )
        held = {name: int(kilobytes) * 1024 / 1e6 for name, kilobytes in words}
        return {
            "peak_mb": held["VmHWM"],
            "own_mb": held["RssAnon"],
            "mapped_mb": held["RssFile"] + held["RssShmem"],  # a map on a disk in memory counts as shared
        }
    except (OSError, KeyError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6}


def _forget_peak() -> None:
    """Let the peak begin anew, so that compiling does not hide what training holds (Linux only)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _serve() -> None:
    """The life of a contender's process: a job on stdin, then turns as they are asked for, answers as lines of JSON."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes elsewhere

    def say(answer: dict) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        job = json.loads(sys.stdin.readline())
        import torch

        torch.set_num_threads(job["threads"])  # before anything compiles
        begun = time.perf_counter()
        unit, about = KINDS[job["kind"]](job)
        for _ in range(job.get("warmup", 2)):
            unit()
        _forget_peak()
        say({**about, "setup_seconds": time.perf_counter() - begun})
        for line in sys.stdin:
            asked, amount, units, done = json.loads(line), 0, 0, {}
            begun = time.perf_counter()
            while units < asked["units"] or time.perf_counter() - begun < asked["seconds"]:
                done = unit()
                amount, units = amount + done["amount"], units + 1
            seconds = time.perf_counter() - begun
            say({**done, "amount": amount, "units": units, "seconds": seconds, **_memory()})
    except LabError as error:
        say({"error": [error.rule, None if error.got is None else str(error.got), error.fix]})
    except (KeyboardInterrupt, BrokenPipeError):
        os._exit(130)


QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}  # transformers fetches nothing


class _Contender:
    """A process that measures one thing when it is asked to, and sits still otherwise; ends with its ``with`` block."""

    def __init__(self, name: str, job: dict, command: Sequence[str] = ("-m", "tinylm.study.bench")):
        self.name = name
        threads = str(job["threads"])
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            encoding="utf-8",
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **QUIET},
        )
        try:
            self.about = self._ask(job)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> _Contender:
        return self

    def turn(self, seconds: float = 0.0, units: int = 1) -> dict:
        """Work for at least so long and so many units; amount, units, seconds, memory and what the unit told."""
        return self._ask({"seconds": seconds, "units": units})

    def _ask(self, words: dict) -> dict:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(words), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            last = self.errors.read().decode("utf-8", "replace").strip().splitlines()[-1:]
            raise LabError(
                f"Measuring {self.name} must run to its end",
                f"its process ended with {self.process.returncode}: {''.join(last) or 'no word'}",
                "free memory if it was killed; else mend what it says",
            )
        answer = json.loads(line)
        if "error" in answer:
            raise LabError(*answer["error"])
        return answer

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(0.5)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()


def interleave(case: str, jobs: dict[str, dict], rounds: int, seconds: float, say: Callable[[str], None]) -> dict:
    """Set the contenders up one after another, then let each take a turn in every round, the first one a place later each
    time. Returns ``turns``, one row a turn, and ``about``, what each told of itself."""
    turns = []
    with contextlib.ExitStack() as stack:
        all_ = []
        for name, job in jobs.items():
            say(f"{case}: {name} is set up")
            all_.append(stack.enter_context(_Contender(name, job)))
        for number in range(rounds):
            say(f"{case}: round {number + 1} of {rounds}")
            first = number % len(all_)
            for contender in all_[first:] + all_[:first]:
                turn = contender.turn(seconds)
                turns.append({"case": case, "contender": contender.name, "round": number, **turn})
        about = [{"case": case, "contender": contender.name, **contender.about} for contender in all_]
    return {"turns": turns, "about": about}


# ----------------------------------------------------------------------------------------------------------- sections


def _joined(parts: Sequence[dict]) -> dict:
    return {key: [row for part in parts for row in part[key]] for key in ("turns", "about")}


def _shape_facts(names: Sequence[str]) -> dict:
    return {
        name: {
            **dataclasses.asdict(SHAPES[name]),
            "parameters": counts.parameters(SHAPES[name].model)["total"],
            "tokens_a_step": SHAPES[name].tokens,
            "flops_per_token": SHAPES[name].flops_per_token,
        }
        for name in names
    }


def _tokens_for(scratch: Path, shape: Shape, megabytes: float = 10) -> str:
    """The path of a token map of so many MB for a shape's vocabulary."""
    path = scratch / f"{shape.vocab_size}-{megabytes}.tokens"
    return str(path if path.exists() else _token_map(path, int(megabytes * 10**6) // 2, shape.vocab_size))


def _job(kind: str, scratch: Path, threads: int, shape: Shape, megabytes: float = 10, **more) -> dict:
    tokens = _tokens_for(scratch, shape, megabytes)
    return {"kind": kind, "threads": threads, "shape": dataclasses.asdict(shape), "tokens": tokens, **more}


def _measure_machine(preset: Preset, scratch: Path, say: Callable[[str], None]) -> dict:
    rows = []
    for threads in sorted({1, preset.cores}):
        say(f"machine: {threads} thread{'s' * (threads > 1)}")
        job = {"kind": "machine", "threads": threads, "warmup": 0, "seconds": preset.seconds / 4}
        with _Contender("the machine", {**job, "squares": preset.squares, "stream_mb": preset.stream_mb}) as contender:
            rows += [{"threads": threads, **row} for row in contender.turn()["rows"]]
    return {"rows": rows}


def _measure_training(preset: Preset, scratch: Path, say: Callable[[str], None]) -> dict:
    parts = []
    for name in preset.shapes:
        shape = SHAPES[name]
        jobs = {
            f"square {dtype}": {
                "kind": "square",
                "threads": preset.cores,
                "dtype": dtype,
                "squares": preset.squares[-2:],
            }
            for dtype in ("float32", "bfloat16")
        }
        jobs |= {who: _job("train", scratch, preset.cores, shape, path=path) for who, path in OWN.items()}
        jobs |= {who: _job("train transformers", scratch, preset.cores, shape, **how) for who, how in PEERS.items()}
        jobs = {who: job for who, job in jobs.items() if who in preset.contenders or job["kind"] == "square"}
        parts.append(interleave(name, jobs, preset.rounds, preset.seconds, say))
    return {"shapes": _shape_facts(preset.shapes), **_joined(parts)}


def _case(shape: str, sequences: int) -> str:
    return f"{shape}, {sequences} sequence{'s' * (sequences > 1)}"


def _measure_generation(preset: Preset, scratch: Path, say: Callable[[str], None]) -> dict:
    parts = []
    for name, sequences in preset.generation:
        more = {"sequences": sequences, "new_tokens": preset.new_tokens}
        jobs = {
            "tinylm": _job("generate", scratch, preset.cores, SHAPES[name], **more),
            BASE: _job("generate transformers", scratch, preset.cores, SHAPES[name], **more),
        }
        parts.append(interleave(_case(name, sequences), jobs, preset.rounds, preset.seconds, say))
    return {"shapes": _shape_facts(dict(preset.generation)), **_joined(parts)}


def _measure_sweep(preset: Preset, scratch: Path, say: Callable[[str], None]) -> dict:
    parts = []
    for case in preset.sweeps:
        asked = {**dataclasses.asdict(case), "threads": preset.cores}
        jobs = {
            "sweep engine": {**asked, "kind": "engine", "warmup": 1, "path": FAST},
            "one after another": {**asked, "kind": "sequential", "warmup": 0, "path": PLAIN},
        }
        parts.append(interleave(case.name, jobs, preset.sweep_rounds, 0.0, say))
    cases = [{"case": case.name, "runs": case.count, **dataclasses.asdict(case)} for case in preset.sweeps]
    return {"cases": cases, **_joined(parts)}


def _measure_profile(preset: Preset, scratch: Path, say: Callable[[str], None]) -> dict:
    rows = []
    for name in preset.shapes:
        say(f"profile: {name}")
        job = _job("profile", scratch, preset.cores, SHAPES[name], path=FAST, steps=preset.profile_steps, warmup=1)
        with _Contender(f"the profile of {name}", job) as contender:
            done = contender.turn()
        facts = {key: done[key] for key in ("step_seconds", "profiled_seconds")}
        rows.append({"case": name, "path": contender.about["path"], **facts, "groups": done["groups"]})
    return {"rows": rows}


def _measure_growth(preset: Preset, scratch: Path, say: Callable[[str], None]) -> dict:
    rows = []

    def measure(series: str, name: str, shape: Shape, megabytes: float = 10, units: int = 1) -> None:
        say(f"growth: {series}, {name}")
        job = _job("train", scratch, preset.cores, shape, megabytes=megabytes, path=FAST)
        with _Contender(f"{series}, {name}", job) as contender:
            turns = [contender.turn(preset.seconds, units) for _ in range(3)]
        best = min(turns, key=lambda turn: turn["seconds"] / turn["units"])
        rows.append(
            {
                "series": series,
                "case": name,
                "parameters": counts.parameters(shape.model)["total"],
                "tokens_a_step": shape.tokens,
                "corpus_mb": megabytes,
                "flops": shape.flops_per_token * shape.tokens,
                "step_seconds": best["seconds"] / best["units"],
                "setup_seconds": contender.about["setup_seconds"],
                **{key: turns[-1].get(key) for key in ("peak_mb", "own_mb", "mapped_mb")},
            }
        )

    name, windows = preset.growth
    for count in windows:
        measure("tokens a step", f"{name}, {count} windows", dataclasses.replace(SHAPES[name], windows=count))
    alike = {
        name: dataclasses.replace(SHAPES[name], windows=max(1, preset.same_tokens // SHAPES[name].max_seq_len))
        for name in preset.shapes
    }
    for name, shape in alike.items():
        measure("parameters", name, shape)
    for megabytes in preset.corpora:
        measure("corpus", f"{megabytes} MB", alike[preset.shapes[0]], megabytes, preset.corpus_steps)
    return {"rows": rows}


def _measure_parity(preset: Preset, scratch: Path, say: Callable[[str], None]) -> dict:
    rows = []
    names, seeds, steps = preset.parity
    for name in names:
        windows = max(1, min(1024, SHAPES[name].tokens) // SHAPES[name].max_seq_len)
        for way, (kind, path) in PARITY.items():
            say(f"parity: {name}, {way}")
            asked = {
                "shape": name,
                "windows": windows,
                "rate": PARITY_RATE,
                "seeds": seeds,
                "steps": steps,
                "warmup": 0,
            }
            job = {**asked, "kind": kind, "threads": preset.cores, "path": path}
            with _Contender(f"{name}, {way}", job) as contender:
                losses = contender.turn()["losses"]
            rows += [{"case": name, "way": way, "seed": seed, "val_loss": loss} for seed, loss in enumerate(losses)]
    return {"steps": steps, "rows": rows}


MEASURES = {
    "machine": _measure_machine,
    "training": _measure_training,
    "generation": _measure_generation,
    "sweep": _measure_sweep,
    "profile": _measure_profile,
    "growth": _measure_growth,
    "parity": _measure_parity,
}
USUAL = tuple(name for name in MEASURES if name != "parity")  # parity is a study of its own, measured when asked for


def machine_name() -> str:
    """This machine as a folder's name: its processor's, and how many cores may be used."""
    from tinylm.backend import _cpu_name

    name = re.sub(r"\((r|tm)\)|\bcpu\b|@.*", " ", _cpu_name().lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-") + f"-{_cores()}-cores"


def _about_machine() -> dict:
    import importlib.metadata
    import platform

    from tinylm.backend import _cpu_name, cpp_compiler

    flags: set[str] = set()
    with contextlib.suppress(OSError):
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        flags = set(found[1].split()) if found else flags
    packages = {"python": platform.python_version()}
    for name in ("tinylm", "torch", "transformers", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return {
        "cpu": _cpu_name(),
        "cores": _cores(),
        "bf16_instructions": sorted(flag for flag in flags if "bf16" in flag),
        "compiler": cpp_compiler() is not None,
        "system": f"{platform.system()} {platform.machine()}",
        "packages": packages,
    }


def run(
    only: Sequence[str] = USUAL,
    preset: Preset | str = "full",
    results_dir: str | os.PathLike | None = None,
    force: bool = False,
    rounds: int | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Measure the sections named in ``only`` and draw the report of all that ``results_dir`` holds; its path.

    only: of ``MEASURES``, or ("report",) to draw anew without measuring. results_dir: None is results/bench/<machine>,
    for the smoke preset results/local/bench/<machine>. rounds: other than the preset's. force: measure also where the
    machine is busy, and say so in the report; parity compares losses, and needs no idle machine. Each section is written
    when it is measured.

    Raises LabError where the machine is busy, a name is unknown, transformers is needed and missing, or a measurement
    does not end well.
    """
    for name in only:
        if name not in (*MEASURES, "report"):
            raise ConfigError(
                "The bench's sections go by name", f"{name!r}", f"the names are {', '.join([*MEASURES, 'report'])}"
            )
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ConfigError("A preset goes by name", f"preset={preset!r}", f"the names are {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    preset = dataclasses.replace(preset, cores=preset.cores or _cores())
    if rounds is not None:
        if rounds < 1:
            raise ConfigError("There is at least one round", f"rounds={rounds}", "leave it out")
        preset = dataclasses.replace(preset, rounds=rounds, sweep_rounds=rounds)
    if results_dir is None:
        place = ("bench",) if preset.name == "full" else ("local", "bench")
        results_dir = repository().joinpath("results", *place, machine_name())
    folder, names = Path(results_dir), [name for name in MEASURES if name in only]
    reasons = busy() if set(names) - {"parity"} else []  # a loss is the same on a busy machine
    if reasons and not force:
        raise LabError(
            "A bench measures an idle machine, and no study may run beside it",
            "; ".join(reasons),
            "wait until it is idle (the load average takes a minute), or measure all the same with --force",
        )
    if {"training", "generation"} & set(names):
        _transformers()
    for name in names:
        begun, watch = time.monotonic(), _Watch()
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with tempfile.TemporaryDirectory(prefix="tinylm-bench-") as scratch:
            data = MEASURES[name](preset, Path(scratch), say)
        record = {
            **{"schema": SCHEMA, "section": name, "started": started, "seconds": time.monotonic() - begun},
            **{"preset": preset.name, "rounds": preset.sweep_rounds if name == "sweep" else preset.rounds},
            **{"busy": reasons, **watch.share(), "machine": _about_machine(), "data": data},
        }
        files.write_whole(folder / f"{name}.json", json.dumps(record, indent=1) + "\n")
    page = draw(folder)
    say(f"report: {page}")
    return page


# ------------------------------------------------------------------------------------------------------------- report

# Figures to reach: (what, section, case, contender, measure, must, aim).
GOALS = (
    *(
        ("training tokens/s against eager fp32 transformers", "training", case, "tinylm", "ratio", must, aim)
        for case, must, aim in (("A", 1.75, 2.4), ("B", 2.1, 2.6), ("C", 2.0, 2.5), ("D", 1.95, 2.3))
    ),
    *(
        ("share of the matrix-product peak, bf16 or fp32, the higher", "training", case, "tinylm", "share", must, aim)
        for case, must, aim in (("B", 0.45, 0.55), ("C", 0.50, 0.60), ("D", 0.58, 0.68))
    ),
    *(
        (
            "training tokens/s against the same, without a compiler",
            "training",
            case,
            "tinylm, no compiler",
            "ratio",
            must,
            aim,
        )
        for case, must, aim in (("B", 1.35, 1.6), ("C", 1.6, 1.8))
    ),
    *(
        ("generated tokens/s against transformers with its cache", "generation", case, "tinylm", "ratio", must, aim)
        for case, must, aim in ((_case("A", 1), 4.5, 7.0), (_case("A", 16), 2.1, 3.0), (_case("C", 1), 1.4, 2.5))
    ),
    *(
        ("a sweep against its runs one after another", "sweep", case, "sweep engine", "ratio", must, aim)
        for case, must, aim in (
            ("Z, 256 tokens a step", 3.5, 6.0),
            ("Z, 512 tokens a step", 2.1, 3.5),
            ("A, 2048 tokens a step", 2.0, 2.6),
        )
    ),
)


def summarise(turns: Sequence[dict], base: str) -> object:
    """Turns as a table, one row a case and contender: median and quartiles of the rate (amount a second), and of the ratio to
    ``base``, taken within each round. Keeps the order in which cases and contenders came."""
    import pandas as pd

    frame = pd.DataFrame(turns)
    frame["rate"] = frame["amount"] / frame["seconds"]
    against = frame[frame["contender"] == base].set_index(["case", "round"])["rate"]
    frame["ratio"] = frame["rate"] / against.reindex(pd.MultiIndex.from_frame(frame[["case", "round"]])).to_numpy()
    rows = []
    for (case, contender), group in frame.groupby(["case", "contender"], sort=False):
        row = {"case": case, "contender": contender, "rounds": len(group)}
        for name in ("rate", "ratio"):
            low, middle, high = group[name].quantile([0.25, 0.5, 0.75])
            row |= {name: middle, f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def peaks(turns: Sequence[dict]) -> dict[str, dict[str, float]]:
    """The largest rate of a square product by case and dtype, FLOP/s."""
    found: dict[str, dict[str, float]] = {}
    for turn in turns:
        if turn["contender"].startswith("square "):
            dtype = turn["contender"].removeprefix("square ")
            case = found.setdefault(turn["case"], {})
            case[dtype] = max(case.get(dtype, 0.0), turn["best"])
    return found


def training_table(data: dict) -> object:
    """Of the training section: ``summarise``, FLOP/s, the shares of both peaks and of the higher one, and ``ratio_limit``, the
    ratio of a step that did nothing but matrix products, at that higher peak."""
    limits, shapes = peaks(data["turns"]), data["shapes"]
    table = summarise([turn for turn in data["turns"] if not turn["contender"].startswith("square ")], BASE)
    table["path"] = [_about(data, row.case, row.contender).get("path") for row in table.itertuples()]
    table["parameters"] = [shapes[case]["parameters"] for case in table["case"]]
    table["flops"] = table["rate"] * [shapes[case]["flops_per_token"] for case in table["case"]]
    for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        table[f"peak_{name}"] = [limits[case][dtype] for case in table["case"]]
        table[f"share_{name}"] = table["flops"] / table[f"peak_{name}"]
    peak = table[["peak_fp32", "peak_bf16"]].max(axis=1)
    table["share"] = table["flops"] / peak
    peer = table[table["contender"] == BASE].set_index("case")["flops"]
    table["ratio_limit"] = peak / table["case"].map(peer)
    return table


def _about(data: dict, case: str, contender: str) -> dict:
    return next(row for row in data["about"] if (row["case"], row["contender"]) == (case, contender))


def sweep_table(data: dict) -> object:
    """Of the sweep section: runs a second and ratios, seconds of a whole sweep, and how far its losses lie from those of the
    same runs one after another."""
    base = "one after another"
    table = summarise(data["turns"], base)
    runs = {case["case"]: case["runs"] for case in data["cases"]}
    losses = {(turn["case"], turn["contender"]): turn["losses"] for turn in data["turns"]}
    table["seconds"] = [runs[row.case] / row.rate for row in table.itertuples()]
    table["loss_difference"] = [
        max(abs(a - b) for a, b in zip(losses[row.case, row.contender], losses[row.case, base], strict=True))
        for row in table.itertuples()
    ]
    return table


def parity_table(rows: Sequence[dict]) -> object:
    """Final losses by shape and way, against plain runs of the same seeds: mean difference with its standard error, the
    largest one, and the spread of seeds (standard deviation of the plain runs). ``within``: the largest is smaller."""
    import numpy as np
    import pandas as pd

    losses = pd.DataFrame(rows).pivot(index=["case", "seed"], columns="way", values="val_loss")
    found = []
    for case in dict.fromkeys(row["case"] for row in rows):
        plain = losses.loc[case]["plain"].to_numpy(float)
        spread = plain.std(ddof=1)
        for way in [name for name in dict.fromkeys(row["way"] for row in rows) if name != "plain"]:
            difference = losses.loc[case][way].to_numpy(float) - plain
            largest = float(np.abs(difference).max())
            found.append(
                {
                    **{"case": case, "way": way, "seeds": len(plain), "plain": plain.mean(), "seed_sd": spread},
                    **{"difference": difference.mean(), "error": difference.std(ddof=1) / len(plain) ** 0.5},
                    **{"largest": largest, "of_spread": largest / spread, "within": largest < spread},
                }
            )
    return pd.DataFrame(found)


def exponent(flops: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of log seconds over log FLOPs: 1 where cost grows as FLOPs do."""
    import numpy as np

    return float(np.polyfit(np.log(flops), np.log(seconds), 1)[0])


def read_sections(folder: Path) -> dict[str, dict]:
    """The sections that a folder holds, by name. Raises DamagedFileError where one is not as it was written."""
    from tinylm.study.runs import read_kept

    found = {}
    for name in MEASURES:
        path = folder / f"{name}.json"
        if path.exists():
            found[name] = read_kept(path, functools.partial(_section, name), f"measure it anew: --only {name}")
    return found


def _section(name: str, kept: dict) -> dict:
    if (kept["schema"], kept["section"]) != (SCHEMA, name):
        raise ValueError(f"schema {kept['schema']}, section {kept['section']}")
    return kept


def draw(folder: str | os.PathLike) -> Path:
    """Tables, figures and README.md of what was measured into ``folder``; measures nothing. Returns the README's path."""
    from tinylm.study.report import Report

    folder = Path(folder)
    sections = read_sections(folder)
    if not sections:
        raise LabError("A report needs something measured", f"no section in {folder}", "run the bench first")
    machine = next(reversed(sections.values()))["machine"]
    report = Report(folder, f"Speed on {machine['cpu']}, {machine['cores']} cores")
    with contextlib.redirect_stdout(io.StringIO()):  # outside a notebook what a report displays would be printed
        _tell_measured(report, sections)
        for name, tell in _TELL.items():
            if name in sections:
                tell(report, sections[name]["data"])
        return report.write()


def _tell_measured(report, sections: dict[str, dict]) -> None:
    """What was reached, and how and when it was measured."""
    import pandas as pd

    tables = {
        name: make(sections[name]["data"])
        for name, make in (
            ("training", training_table),
            ("generation", lambda data: summarise(data["turns"], BASE)),
            ("sweep", sweep_table),
        )
        if name in sections
    }
    rows = []
    for what, section, case, contender, measure, must, aim in GOALS:
        table = tables.get(section)
        found = table[(table["case"] == case) & (table["contender"] == contender)] if table is not None else ()
        if len(found):
            value = float(found[measure].iloc[0])
            reached = "aim" if value >= aim else "must" if value >= must else "below"
            limit = float(found["ratio_limit"].iloc[0]) if section == "training" and measure == "ratio" else None
            rows.append(
                {"figure": what, "case": case, "measured": value, "must": must, "aim": aim, "reached": reached}
                | {"limit here": "–" if limit is None else f"{limit:.2f}"}
            )
    if rows:
        at_least = sum(row["reached"] != "below" for row in rows)
        aims = sum(row["reached"] == "aim" for row in rows)
        report.summary(
            f"Of {len(rows)} figures that were set as goals and are measured here, {at_least} reach what they must and "
            f"{aims} also what was aimed at. The goals come from prototypes on two Zen 4 cores, which have bf16 products in "
            "hardware."
        )
        report.section("What was to be reached")
        report.table(
            pd.DataFrame(rows),
            "goals",
            "Medians; ratios are taken within each round. Limit here: the ratio of a step that did nothing but matrix products, "
            "each as fast as the largest square product on this machine in the precision that suits it better.",
            **{
                "figure": "",
                "case": "",
                "measured": ".2f",
                "must": ".2f",
                "aim": ".2f",
                "reached": "",
                "limit here": "",
            },
        )
    report.section("How it was measured")
    one = next(iter(sections.values()))
    machine = one["machine"]
    bf16 = ", ".join(machine["bf16_instructions"]) or "none: bf16 products are emulated, and its peak is no upper limit"
    report.text(
        "Contenders live in processes of their own and take turns, one at a time, in rounds whose order rotates; a figure is "
        "the median over the rounds, and its quartiles stand beside it. A training step is data, forward, backward, clipping "
        "and AdamW; all contenders read the same map of tokens with the same loader, and transformers' models are updated by "
        "torch's fused AdamW. FLOPs are "
        "matrix products only, the head included, causal keys only, backward twice forward.\n\n"
        f"Processor: {machine['cpu']}, {machine['cores']} cores, {machine['system']}; bf16 instructions: {bf16}; C++ compiler: "
        f"{'yes' if machine['compiler'] else 'none'}."
    )
    when = []
    for name, section in sections.items():
        packages = section["machine"]["packages"]
        when.append(
            {
                **{"section": name, "preset": section["preset"], "rounds": section["rounds"]},
                **{"started": section["started"][:16].replace("T", " "), "minutes": section["seconds"] / 60},
                **{"others": section["others"], "stolen": section["stolen"]},
                **{"torch": packages["torch"], "transformers": packages.get("transformers", "–")},
                "forced": "yes" if section["busy"] else "no",
            }
        )
    report.table(
        pd.DataFrame(when),
        "sections",
        "others: share of the cores that other processes used meanwhile; stolen: what the host took of a virtual machine; "
        "forced: measured although the machine was busy.",
        **{
            "section": "",
            "preset": "",
            "rounds": "d",
            "started": "",
            "minutes": ".1f",
            "others": ".1%",
            "stolen": ".1%",
        },
        **{"torch": "", "transformers": "", "forced": ""},
    )
    reasons: dict[str, list[str]] = {}
    for name, section in sections.items():
        reasons.setdefault("; ".join(section["busy"]), []).append(name)
    if told := [f"- {', '.join(names)}: {why}." for why, names in reasons.items() if why]:
        report.text("**Not to be relied on**, since the machine was busy when measuring began:\n\n" + "\n".join(told))


def _tell_machine(report, data: dict) -> None:
    import pandas as pd

    frame = pd.DataFrame(data["rows"])
    report.section("The machine")
    report.table(
        frame,
        "machine",
        "The best of several tries. A product of size n takes 2 n³ FLOPs; a copy moves 8 bytes a number, a triad (a + 3 b into "
        "c) 12; a tiny operation adds 1 to one number in place.",
        **{"what": "", "threads": "d", "size": ",d", "value": ",.4g", "unit": ""},
    )
    best = frame[frame["what"].str.endswith("product")].groupby(["threads", "what"])["value"].max()
    told = [
        f"{best[n, 'float32 product']:,.0f} GFLOP/s in fp32 and {best[n, 'bfloat16 product']:,.0f} in bf16 on {n} "
        f"thread{'s' * (n > 1)}"
        for n in sorted(set(frame["threads"]))
    ]
    report.text(f"Matrix products reach {'; '.join(told)}.")


RATIO = {"case": "", "contender": "", "rate": ",.0f", "rate_low": ",.0f", "rate_high": ",.0f"} | {
    name: ".2f" for name in ("ratio", "ratio_low", "ratio_high")
}


def _tell_training(report, data: dict) -> None:
    import pandas as pd

    table = training_table(data)
    shapes = pd.DataFrame([{"case": name, **facts} for name, facts in data["shapes"].items()])
    report.section("Training")
    report.table(
        shapes,
        "shapes",
        "The shapes: windows are those of one step.",
        **dict.fromkeys(["case", "hidden_size", "num_layers", "num_heads", "vocab_size", "max_seq_len", "windows"], ""),
        **{"parameters": ",d", "flops_per_token": ",.0f"},
    )
    report.table(
        table,
        "training",
        "rate: tokens a second, with quartiles (low, high); ratio: to transformers, eager, fp32, in the same round.",
        **RATIO,
        path="",
    )
    report.table(
        table[table["contender"].isin(OWN)],
        "shares",
        "Share of the largest rate of a square product measured beside them: in fp32, in bf16, and of the higher of the two. A "
        "share above 1 of one peak means that the products were computed in the other precision.",
        **{"case": "", "contender": "", "flops": ",.3g", "peak_fp32": ",.3g", "peak_bf16": ",.3g"},
        **{"share_fp32": ".1%", "share_bf16": ".1%", "share": ".1%"},
    )
    report.figure(
        "throughput",
        "Tokens a second against parameters, beside the limit that matrix products set (dashed); bars are quartiles.",
        lambda ax: draw_throughput(table, data["shapes"], ax),
    )


def _tell_profile(report, data: dict) -> None:
    import pandas as pd

    rows = [
        {
            **{"case": row["case"], "path": row["path"], "step_ms": 1e3 * row["step_seconds"]},
            "slowed": row["profiled_seconds"] / row["step_seconds"],
            **{group: seconds / sum(row["groups"].values()) for group, seconds in row["groups"].items()},
        }
        for row in data["rows"]
    ]
    frame, groups = pd.DataFrame(rows), list(data["rows"][0]["groups"])
    report.section("Where a step's time goes")
    report.table(
        frame,
        "profile",
        "Shares of a step on the fast path, by torch's profiler. step ms: without it; slowed: how many times longer the step "
        "took under it, which swells the small operations' and the dispatch's share.",
        **{"case": "", "path": "", "step_ms": ",.1f", "slowed": ".2f"},
        **dict.fromkeys(groups, ".0%"),
    )
    report.figure("step", "Where a step's time goes, fast path.", lambda ax: draw_step(frame, groups, ax), (8.0, 3.6))


def _tell_generation(report, data: dict) -> None:
    report.section("Generation")
    report.table(
        summarise(data["turns"], BASE),
        "generation",
        f"rate: new tokens a second of all sequences together, after a prompt of {len(PROMPT)} tokens, sampled at temperature "
        "1; ratio: to transformers' generate with its cache, in the same round.",
        **RATIO,
    )


def _tell_sweep(report, data: dict) -> None:
    import pandas as pd

    report.section("Sweeps")
    report.table(
        pd.DataFrame(data["cases"]),
        "sweep_cases",
        "The sweeps: learning rates times seeds.",
        **dict.fromkeys(["case", "runs", "rates", "seeds", "steps"], ""),
    )
    report.table(
        sweep_table(data),
        "sweep",
        "seconds: of the whole sweep, the start of the workers included, the compile cache warm by a first pass that is not "
        "timed. One after another: the same runs, all of them trained, in one process that is there already, eager, fp32, on "
        "all cores. loss difference: the largest of any run's final loss from the same run there (nats per token).",
        **{"case": "", "contender": "", "seconds": ",.1f", "ratio": ".2f", "ratio_low": ".2f", "ratio_high": ".2f"},
        loss_difference=".1e",
    )


def _tell_growth(report, data: dict) -> None:
    import pandas as pd

    frame = pd.DataFrame(data["rows"])
    frame["gflops_per_second"] = frame["flops"] / frame["step_seconds"] / 1e9
    frame["step_ms"] = 1e3 * frame["step_seconds"]
    report.section("Cost against size")
    report.table(
        frame,
        "growth",
        "Fast path, best of three. Memory in MB: the most the process held once it was set up; at the end, its own and that of "
        "mapped files (which the system takes back when it needs it).",
        **{"series": "", "case": "", "parameters": ",d", "tokens_a_step": ",d", "corpus_mb": "g", "flops": ".3g"},
        **{"step_ms": ",.1f", "gflops_per_second": ",.1f", "setup_seconds": ".1f"},
        **dict.fromkeys(["peak_mb", "own_mb", "mapped_mb"], ",.0f"),
    )
    told = []
    for series in ("tokens a step", "parameters"):
        part = frame[frame["series"] == series]
        if len(part) > 1:
            slope = exponent(part["flops"], part["step_seconds"])
            told.append(f"With {series} a step's time grows as FLOPs to the power {slope:.2f}.")
    corpus = frame[frame["series"] == "corpus"]
    if len(corpus) > 1:
        first, last = corpus.iloc[0], corpus.iloc[-1]
        told.append(
            f"From {first['corpus_mb']:g} to {last['corpus_mb']:g} MB of corpus the peak goes from {first['peak_mb']:,.0f} to "
            f"{last['peak_mb']:,.0f} MB, the process's own memory from {first['own_mb']:,.0f} to {last['own_mb']:,.0f} MB."
        )
    if told:
        report.text(" ".join(told))
    report.figure(
        "cost",
        "Left: a step's time against its FLOPs. Right: memory against the corpus.",
        lambda axes: draw_cost(frame, axes),
        (9.0, 4.0),
        panels=2,
    )


def _tell_parity(report, data: dict) -> None:
    table = parity_table(data["rows"])
    report.section("Parity")
    report.table(
        table,
        "parity",
        f"Final validation loss (nats per token) after {data['steps']} steps. fast: each run alone; sweep: as the sweep engine "
        "picks. difference: from the plain run of the same seed, with its standard error; largest: in size, over the seeds; of "
        "spread: the largest over the seeds' standard deviation.",
        **{"case": "", "way": "", "seeds": "d", "plain": ".4f", "seed_sd": ".4f", "difference": "+.1e", "error": ".1e"},
        **{"largest": ".1e", "of_spread": ".3f", "within": ""},
    )
    inside = int(table["within"].sum())
    report.text(f"In {inside} of {len(table)} comparisons the largest difference is smaller than the spread of seeds.")


_TELL = {
    "machine": _tell_machine,
    "training": _tell_training,
    "profile": _tell_profile,
    "generation": _tell_generation,
    "sweep": _tell_sweep,
    "growth": _tell_growth,
    "parity": _tell_parity,
}


def draw_throughput(table, shapes: dict, ax) -> None:
    """Tokens a second against parameters, a line a contender, with the limits of both precisions."""
    from tinylm.study.plots import COLOURS, GREY, MARKERS, _log

    for i, (contender, group) in enumerate(table.groupby("contender", sort=False)):
        group = group.sort_values("parameters")
        spread = [group["rate"] - group["rate_low"], group["rate_high"] - group["rate"]]
        look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        ax.errorbar(group["parameters"], group["rate"], spread, label=contender, capsize=2, **look)
    limits = table.drop_duplicates("case").sort_values("parameters")
    for name, dashes in (("fp32", "--"), ("bf16", ":")):
        most = [row[f"peak_{name}"] / shapes[row["case"]]["flops_per_token"] for _, row in limits.iterrows()]
        ax.plot(limits["parameters"], most, dashes, color=GREY, label=f"{name} products alone")
    for _, row in limits.iterrows():
        ax.annotate(row["case"], (row["parameters"], 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom")
    _log(ax, "x", "parameters")
    _log(ax, "y", "tokens a second")
    ax.legend(fontsize=8)


def draw_step(frame, groups: Sequence[str], ax) -> None:
    """A bar a shape, split by what its step's time goes to."""
    from matplotlib.ticker import PercentFormatter

    from tinylm.study.plots import COLOURS

    left = frame[groups[0]] * 0
    for group, colour in zip(groups, COLOURS, strict=True):
        ax.barh(frame["case"], frame[group], left=left, color=colour, label=group)
        left = left + frame[group]
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlabel("share of a step")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, fontsize=8)


def draw_cost(frame, axes) -> None:
    """A step's time against its FLOPs, beside a line of slope 1; memory against the corpus."""
    from tinylm.study.plots import COLOURS, GREY, MARKERS, _log

    cost, memory = axes
    for i, series in enumerate(("tokens a step", "parameters")):
        part = frame[frame["series"] == series].sort_values("flops")
        cost.plot(part["flops"], part["step_seconds"], MARKERS[i] + "-", color=COLOURS[i], label=f"more {series}")
    quickest = (frame["step_seconds"] / frame["flops"]).min()
    ends = [frame["flops"].min(), frame["flops"].max()]
    cost.plot(ends, [quickest * flops for flops in ends], "--", color=GREY, label="as FLOPs do, at the best rate")
    _log(cost, "x", "FLOPs of a step")
    _log(cost, "y", "seconds a step")
    cost.legend(fontsize=8)
    part = frame[frame["series"] == "corpus"].sort_values("corpus_mb")
    for i, (column, words) in enumerate(
        {"peak_mb": "most held at once", "own_mb": "its own, at the end", "mapped_mb": "of mapped files"}.items()
    ):
        memory.plot(part["corpus_mb"], part[column].astype(float), MARKERS[i] + "-", color=COLOURS[i], label=words)
    _log(memory, "x", "corpus (MB)")
    memory.set_ylabel("memory of the process (MB)")
    memory.set_ylim(bottom=0)
    memory.legend(fontsize=8)


if __name__ == "__main__":
    _serve()
