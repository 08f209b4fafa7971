"""A text larger than memory: that it is tokenised and trained on in the memory, and at the speed, of a small one.

    python -m tinylm.study.large_text 50 5000 --out results/local/large_text

writes generated texts of so many MB one after the other, tokenises each as a stream and trains on its memory-mapped ids, all
in a cache folder of its own that goes away afterwards. Each text has a process of its own, so that each peak is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tinylm import files
from tinylm.errors import LabError

SHARE = 2.5  # disk needed, in sizes of the text: itself, its ids and some room
SIZES = (50.0, 5000.0)  # MB
VOCAB_SIZE, SEQ_LEN, BATCH_SIZE, STEPS = 512, 128, 16, 300
WORDS, EXPONENT = 5000, 1.1  # words of the made-up language, drawn by a Zipf law


def generated(megabytes: float, seed: int = 0) -> Iterator[bytes]:
    """Lines of made-up words, about 1 MB at a time; no piece repeats another. The first megabytes of a longer text are the
    shorter text."""
    import numpy as np

    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjq"))
    words = np.array(["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(WORDS)], dtype=object)
    odds = np.cumsum(np.arange(1, WORDS + 1) ** -EXPONENT)
    written, most = 0, int(megabytes * 1e6)
    while written < most:
        chosen = words[np.searchsorted(odds, rng.random((14_000, 12)) * odds[-1])]
        piece = "\n".join(map(" ".join, chosen.tolist())).encode("ascii")[: most - written - 1] + b"\n"
        written += len(piece)
        yield piece


def measure(sizes: Sequence[float], scratch: str | os.PathLike | None = None, steps: int = STEPS) -> list[dict]:
    """One row a text of so many MB (see ``_one``). scratch: the folder in which texts and ids are made for a while; by
    default the lab's cache. Raises LabError where the disk has no room for the largest, before anything is written."""
    parent = Path(scratch) if scratch is not None else files.home()
    parent.mkdir(parents=True, exist_ok=True)
    needed, free = SHARE * max(sizes) * 1e6, shutil.disk_usage(parent).free
    if free < needed:
        raise LabError(
            "The disk must have room for the text and its ids",
            f"{free / 1e9:.1f} GB free in {parent}, {needed / 1e9:.1f} GB needed",
            "free some space, name another folder with --scratch, or ask for a smaller text",
        )
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=parent, prefix=".aside-large-text-") as home:
            text = Path(home) / "large.txt"
            began = time.perf_counter()
            with open(text, "wb") as file:
                for piece in generated(size):
                    file.write(piece)
            wrote = time.perf_counter() - began
            command = [sys.executable, "-m", "tinylm.study.large_text", "--one", str(text), "--steps", str(steps)]
            done = subprocess.run(command, env={**os.environ, "TINYLM_HOME": home}, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise LabError(
                    "Measuring a text must run to its end",
                    f"{size:g} MB: its process ended with {done.returncode}",
                    "mend what it says above; free memory if it was killed",
                )
            rows.append({"text_mb": float(size), "write_seconds": wrote, **json.loads(done.stdout.splitlines()[-1])})
    return rows


def _one(text: Path, steps: int) -> dict:
    """Prepare a text and train on it, here.

    Of preparing (reading, splitting, training the tokenizer, encoding) the seconds, the MB/s and the MB per second of
    processor time; of training the tokens, and the tokens/s and tokens per second of processor time (the best of three
    parts), which other work on the machine touches less. Of memory, in MB, the most held while preparing, until training was
    under way and while it was; and at the end this process's own and that of mapped files.
    """
    from tinylm import corpora
    from tinylm.config import ModelConfig, TrainConfig
    from tinylm.study.bench import _forget_peak, _memory
    from tinylm.train import WINDOWS_MAPPED, Trainer

    size = text.stat().st_size / 1e6
    began = time.perf_counter(), time.process_time()
    corpus = corpora.prepare(text, "bpe", VOCAB_SIZE, progress=False)
    seconds, own = time.perf_counter() - began[0], time.process_time() - began[1]
    row = {"prepare_seconds": seconds, "prepare_mb_per_second": size / seconds, "prepare_mb_per_cpu_second": size / own}
    row |= {"tokens": len(corpus.train), "prepare_peak_mb": _memory()["peak_mb"]}
    warm = WINDOWS_MAPPED // BATCH_SIZE + 1  # until the pages that a first look at all the ids took are given back
    model = ModelConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, num_layers=2, num_heads=4, max_seq_len=SEQ_LEN, init="scaled"
    )
    train = TrainConfig(
        **{"batch_size": BATCH_SIZE, "max_steps": steps + warm, "warmup_steps": 1, "stride": SEQ_LEN, "threads": 1},
        **{"precision": "fp32", "compile": False, "eval_tokens": SEQ_LEN * 64},
    )
    trainer = Trainer(model, train, corpus.train, corpus.val, corpus.tokenizer.token_bytes)
    for _ in range(warm):
        trainer.train_step()
    row["begin_peak_mb"] = _memory()["peak_mb"]
    _forget_peak()
    part, parts = max(1, steps // 3), []
    for _ in range(3):
        began = time.perf_counter(), time.process_time()
        for _ in range(part):
            trainer.train_step()
        parts.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    for name, took in zip(("second", "cpu_second"), map(min, zip(*parts, strict=True)), strict=True):
        row[f"train_tokens_per_{name}"] = part * BATCH_SIZE * SEQ_LEN / took
    memory = _memory()
    return {**row, "train_peak_mb": memory["peak_mb"], **{name: memory.get(name) for name in ("own_mb", "mapped_mb")}}


def sentence(rows: Sequence[dict]) -> str:
    """What the first and the last row come to."""
    first, last = rows[0], rows[-1]

    def change(name: str, spec: str) -> str:
        return f"{first[name]:{spec}} to {last[name]:{spec}}"

    return (
        f"From {first['text_mb']:,g} to {last['text_mb']:,g} MB of text: preparing holds {change('prepare_peak_mb', ',.0f')} MB at "
        f"most, training {change('own_mb', ',.0f')} MB of its own ({change('train_peak_mb', ',.0f')} MB at most with the pages of "
        f"mapped files); preparing reads {change('prepare_mb_per_cpu_second', '.1f')} MB and training "
        f"{change('train_tokens_per_cpu_second', ',.0f')} tokens per second of processor time "
        f"({change('prepare_mb_per_second', '.1f')} and {change('train_tokens_per_second', ',.0f')} per second)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tinylm.study.large_text", description=__doc__.partition("\n")[0])
    parser.add_argument("sizes", nargs="*", type=float, default=SIZES, metavar="MB", help="50 5000 by default")
    parser.add_argument("--out", type=Path, default=Path("results/local/large_text"), help="where its table goes")
    parser.add_argument("--scratch", type=Path, help="where the texts are made for a while; the cache by default")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps that are timed")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # the process of one text
    asked = parser.parse_args()
    try:
        if asked.one:
            print(json.dumps(_one(asked.one, asked.steps)))
            return
        import pandas as pd

        from tinylm.study.report import write_table

        rows = measure(asked.sizes, asked.scratch, asked.steps)
        print(write_table(asked.out / "tables" / "large_text.csv", pd.DataFrame(rows)))
        print(sentence(rows))
    except LabError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
