"""A text at a glance: size, repeats, alphabet, compressibility, and what tokenizers of several sizes make of it."""

from __future__ import annotations

import lzma
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from tinylm import corpora
from tinylm.config import ModelConfig
from tinylm.corpora import Text
from tinylm.errors import LabError
from tinylm.study.design import LADDER, Recipe, expected_best_size, rung_sizes
from tinylm.study.planner import Speed, evaluation_tokens
from tinylm.tokenizer import Tokenizer, read_pieces, sample_lines

LOOKED_AT = 4_000_000  # bytes of a large text that are looked at


@dataclass(frozen=True)
class Glance:
    """bytes: of the whole text; the rest is of its first 4 MB. lines; repeated: share of lines (of more than 20 characters)
    that stood before; characters: distinct ones; rare: those that come fewer than 10 times; compressed: size under LZMA as a
    share, in ``bits`` per byte."""

    bytes: int
    lines: int
    repeated: float
    characters: int
    rare: int
    compressed: float

    @property
    def bits(self) -> float:
        return 8 * self.compressed

    def sentences(self) -> list[str]:
        """What it says of the text, in words."""
        said = [
            (f"{self.bytes / 1e6:.2f} MB" if self.bytes >= 1e5 else f"{self.bytes / 1e3:.1f} kB")
            + (f"; looked at: the first {LOOKED_AT // 10**6} MB," if self.bytes > LOOKED_AT else "")
            + f" in {self.lines:,} lines",
            f"{self.characters:,} different characters, {self.rare:,} of them come fewer than 10 times",
            f"The compressor LZMA packs it to {self.compressed:.0%}, {self.bits:.2f} bits a byte: a model has to do better "
            "than that",
            f"{self.repeated:.1%} of the longer lines repeat an earlier line word for word",
        ]
        if self.bytes < 200_000:
            said.append(
                "This is little text: it will be read many times, and what counts is the loss on held-out text."
            )
        if self.repeated > 0.2:
            said.append("Much is repeated: held-out text may hold what was trained on, and look easier than it is.")
        if self.rare > 0.3 * self.characters:
            said.append(
                "Many characters are rare: stray signs or several scripts; a cleaner text may be worth the work."
            )
        return said


def glance(text: Text) -> Glance:
    """Look at a text's first 4 MB."""
    with open(text.path, "rb") as file:
        pieces = list(read_pieces(file, 0, min(text.bytes, LOOKED_AT)))
    whole = "".join(pieces)
    lines = whole.splitlines()
    long_lines = [line.strip() for line in lines if len(line.strip()) > 20]
    characters = Counter(whole)
    raw = whole.encode("utf-8")
    return Glance(
        bytes=text.bytes,
        lines=len(lines),
        repeated=1 - len(set(long_lines)) / len(long_lines) if long_lines else 0.0,
        characters=len(characters),
        rare=sum(count < 10 for count in characters.values()),
        compressed=len(lzma.compress(raw, preset=1)) / len(raw),
    )


def tokenizers(
    text: Text, sizes: Sequence[int] = (320, 512, 1024, 2048), say: Callable[[int], object] = lambda size: None
) -> pd.DataFrame:
    """BPE tokenizers of several sizes tried on a text: trained on (a sample of) its training split, measured on its
    validation split. Columns vocab_size, bytes_per_token, ``bits_per_byte`` of the tokens' frequencies alone (the
    entropy of a model that knows which tokens are frequent and nothing of their order, its frequencies learned on
    training text, one added to each count), and embedding parameters per channel. Sizes that the text cannot support are
    left out. say: told each size before it is tried."""
    _, spans = corpora.split_spans(text.path)
    train = list(sample_lines(text.path, spans["train"], LOOKED_AT // 2))
    held = "".join(sample_lines(text.path, spans["val"], LOOKED_AT // 8))
    rows = []
    for size in sizes:
        say(size)
        try:
            tokenizer = Tokenizer.train(train, "bpe", size)
        except LabError:
            continue
        seen = np.bincount(tokenizer.encode_array("".join(train)), minlength=size) + 1.0
        new = tokenizer.encode_array(held)
        bits = -np.log2(seen / seen.sum())[new].sum()
        raw = len(held.encode("utf-8"))
        rows.append({"vocab_size": size, "bytes_per_token": raw / len(new), "bits_per_byte": bits / raw})
    if not rows:
        raise LabError(
            "A text must support a vocabulary of at least 320", text.name, "give a longer or more varied text"
        )
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class TimePlan:
    """A run for the time one has. epochs: passes over the training text."""

    model: ModelConfig
    tokens: float
    learning_rate: float
    seconds: float
    epochs: float


def plan_for_time(
    seconds: float,
    train_tokens: float,
    vocab_size: int,
    speed: Speed,
    recipe: Recipe | None = None,
    most_epochs: float = 8,
) -> TimePlan:
    """The recipe's shape and length for so many seconds at a measured speed, without any law of the text: the size that
    the recipe expects to be best for that compute (``design.expected_best_size``), at most so many passes over the text."""
    recipe = recipe or Recipe()
    rungs = rung_sizes(recipe, vocab_size)
    rungs["speed"] = rungs.apply(speed, axis=1)
    rungs["tokens"] = [_tokens_in(seconds, float(rate)) for rate in rungs["speed"]]
    budget = rungs["tokens"] * rungs["flops_per_token"]
    wanted = [expected_best_size(float(flops), vocab_size) for flops in budget]
    best = int(np.argmin(np.abs(np.log(rungs["params_total"] / wanted))))
    row = rungs.iloc[best]
    tokens = min(float(row["tokens"]), most_epochs * train_tokens)
    model = recipe.model(LADDER[best], vocab_size)
    return TimePlan(
        model, tokens, recipe.learning_rate(row["params_total"]),
        float((tokens + evaluation_tokens(tokens)) / row["speed"]), tokens / train_tokens,
    )  # fmt: skip


def _tokens_in(seconds: float, rate: float) -> float:
    """Tokens that can be trained on in so many seconds, evaluations included; at least a few steps' worth."""
    low, high = 2000.0, max(4000.0, seconds * rate)
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if (middle + evaluation_tokens(middle)) / rate < seconds else (low, middle)
    return low
