"""Text out of a model: the filters that shape the next-token distribution, and the loop that draws from it.

How generation goes past max_seq_len, by kind of position:

rope, none            attention slides: a token sees itself and the max_seq_len - 1 tokens before it. Every layer looks
                      back that far, so deeper layers carry word from further back: it equals one forward pass over
                      the whole text with a banded causal mask, at constant cost a token.
learned, sinusoidal   positions end where the window ends, so a full window is left: its last max_seq_len // 2 tokens
                      move to the front, are read anew, and generation goes on behind them.

A prompt longer than max_seq_len counts by its last max_seq_len tokens. An empty prompt starts from a newline, which
is not part of the text that comes back. Rows of a batch follow these rules each by itself, as if they were alone.
"""

from __future__ import annotations

import codecs
import copy
import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tinylm.attention import KVCache
from tinylm.config import GenerateConfig
from tinylm.decoding import Step
from tinylm.errors import ConfigError, LabError
from tinylm.model import TinyLM

if TYPE_CHECKING:
    from tinylm.tokenizer import Tokenizer

STEP_UP_TO = 1 << 27  # parameters of a model whose weights a Step may hold a second time
STAGES = ("model", "repetition_penalty", "temperature", "top_k", "top_p")  # in the order in which they are applied


@dataclass(frozen=True)
class Generation:
    """One continued prompt. ``text`` is what was added to it, ``token_ids`` its tokens and ``log_probs`` (nats) what
    the unfiltered model gave each of them. ``seconds`` is the time of the whole batch, ``tokens_per_second`` the
    tokens of all its rows over that time."""

    prompt: str
    text: str
    token_ids: list[int]
    log_probs: list[float]
    seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class TokenOut:
    """One token as it is drawn. ``text`` is what it adds: empty while the bytes of a character are still incomplete,
    all of the character with the token that completes it; the texts of a stream joined are the text. ``probability``
    is that of the unfiltered model, as are the ``alternatives``, the likeliest tokens as (id, printable piece,
    probability)."""

    token_id: int
    text: str
    probability: float
    alternatives: list[tuple[int, str, float]]


def generate(
    model: TinyLM, tokenizer: Tokenizer, prompts: str | list[str], config: GenerateConfig | None = None
) -> Generation | list[Generation]:
    """Continue one prompt (a str gives one Generation) or a batch of unequal ones (a list gives a list, in order).

    Row r of a batch draws with ``seed + r``: its text is what its prompt alone gives with that seed.
    """
    config = config or GenerateConfig()
    batch = [prompts] if isinstance(prompts, str) else list(prompts)
    rows = [_encode(model, tokenizer, prompt) for prompt in batch]
    if not rows:
        return []
    begin = time.perf_counter()
    steps = [(ids, log_probs) for ids, log_probs, _ in _sample(model, rows, config)]
    seconds = time.perf_counter() - begin
    ids = np.stack([step[0] for step in steps], axis=1).tolist()  # (B, max_new_tokens)
    log_probs = np.stack([step[1] for step in steps], axis=1).tolist()
    rate = len(rows) * config.max_new_tokens / seconds
    done = [
        Generation(batch[r], tokenizer.decode(ids[r]), ids[r], log_probs[r], seconds, rate) for r in range(len(rows))
    ]
    return done[0] if isinstance(prompts, str) else done


def stream(
    model: TinyLM,
    tokenizer: Tokenizer,
    prompt: str,
    config: GenerateConfig | None = None,
    stop: Callable[[], bool] | None = None,
    top: int = 0,
) -> Iterator[TokenOut]:
    """Continue a prompt token by token; the same text as ``generate``. ``stop()`` is asked after every token and ends
    the stream when true; ``top`` is how many alternatives to tell with each token. Mistakes in what was asked are
    raised by this call."""
    config = config or GenerateConfig()
    if top < 0:
        raise ConfigError("top must not be negative", f"top={top}", "0 tells no alternatives")
    return _stream(model, tokenizer, _encode(model, tokenizer, prompt), config, stop or (lambda: False), top)


def _stream(model, tokenizer, row, config, stop, top) -> Iterator[TokenOut]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # holds back the bytes of an unfinished character
    if stop():
        return
    for count, (ids, log_probs, log_probabilities) in enumerate(_sample(model, [row], config), start=1):
        likeliest = log_probabilities[0].topk(min(top, log_probabilities.shape[1]))
        told = zip(likeliest.indices.tolist(), likeliest.values.exp().tolist(), strict=True)
        alternatives = [(i, tokenizer.pieces(i), probability) for i, probability in told]
        last = count == config.max_new_tokens or bool(stop())
        text = decoder.decode(tokenizer.decode_bytes(ids), final=last)
        yield TokenOut(int(ids[0]), text, float(np.exp(log_probs[0])), alternatives)
        if last:
            return


def next_token_logits(model: TinyLM, tokenizer: Tokenizer, prompt: str) -> tuple[Tensor, Tensor]:
    """What a prompt leads to, ready for ``filter_logits``: logits (1, V) of the next token, and seen (1, V)."""
    decoding = Decoding(model, [_encode(model, tokenizer, prompt)])
    return decoding.logits, decoding.seen()


def filter_logits(logits: Tensor, config: GenerateConfig, seen: Tensor | None = None) -> dict[str, Tensor]:
    """From logits (B, V) to the distribution that is drawn from, stage by stage: name in ``STAGES`` -> probabilities
    (B, V) in fp64.

    ``model`` is the softmax of the logits. ``repetition_penalty`` divides positive and multiplies negative logits of
    tokens in ``seen`` (B, V) bool (Keskar et al. 2019, section 4.1). ``temperature`` divides logits; at 0 all goes to
    the likeliest. ``top_k`` keeps the k likeliest. ``top_p`` keeps the smallest set of likeliest tokens whose
    probability reaches p, and at least one (Holtzman et al. 2020). Each works on what the one before left, and what
    is kept is scaled to sum to 1. A stage that its setting leaves alone is the same tensor as the one before it.
    """
    logits = logits.double()
    stages = {"model": logits.softmax(-1)}
    if config.repetition_penalty != 1 and seen is not None:
        penalised = torch.where(logits > 0, logits / config.repetition_penalty, logits * config.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
        stages["repetition_penalty"] = logits.softmax(-1)
    else:
        stages["repetition_penalty"] = stages["model"]

    if config.temperature == 0:
        stages["temperature"] = torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    elif config.temperature != 1:
        # The largest logit is taken off first: a tiny temperature would otherwise send the others past fp64.
        stages["temperature"] = ((logits - logits.amax(-1, keepdim=True)) / config.temperature).softmax(-1)
    else:
        stages["temperature"] = stages["repetition_penalty"]

    probabilities = stages["temperature"]
    if config.top_k is not None and config.top_k < probabilities.shape[-1]:
        largest = probabilities.topk(config.top_k)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, largest.indices, largest.values)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    stages["top_k"] = probabilities

    if config.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        # What the likelier tokens add up to: while that is short of p, this one is needed.
        reached = ordered.cumsum(-1).roll(1, -1)
        reached[..., 0] = 0.0
        kept = ordered * (reached < config.top_p)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, kept)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    stages["top_p"] = probabilities
    return stages


def _encode(model: TinyLM, tokenizer: Tokenizer | None, prompt: str) -> list[int]:
    if tokenizer is None:
        raise LabError(
            "Text needs the tokenizer that the model was trained with",
            "tokenizer=None",
            "load a model that was saved with its tokenizer, or give the tokenizer",
        )
    if tokenizer.vocab_size != model.config.vocab_size:
        raise LabError(
            "Model and tokenizer must have the same vocabulary",
            f"vocab_size={model.config.vocab_size} in the model, {tokenizer.vocab_size} in the tokenizer",
            "give the tokenizer that the model was trained with",
        )
    if not isinstance(prompt, str):
        raise ConfigError(
            "A prompt must be a str", f"{prompt!r} ({type(prompt).__name__})", "give text, or a list of texts"
        )
    return list(tokenizer.encode(prompt)) or list(tokenizer.encode("\n"))[-1:] or [0]


def _sample(
    model: TinyLM, rows: list[list[int]], config: GenerateConfig
) -> Iterator[tuple[np.ndarray, np.ndarray, Tensor]]:
    """Yield for every new token its ids (B,), their log-probabilities (B,) and those of all tokens (B, V), of the
    unfiltered model."""
    # One uniform number a token and row, from the row's own generator: neither the other rows nor max_new_tokens nor
    # the filters change what a row draws.
    generators = [torch.Generator().manual_seed((config.seed + row) % 2**63) for row in range(len(rows))]
    draws = torch.stack([torch.rand(config.max_new_tokens, generator=g, dtype=torch.float64) for g in generators])
    draws = (draws * (1 - 1e-12)).t().contiguous()[:, :, None]  # below what probabilities add up to, rounding and all
    penalises = config.repetition_penalty != 1
    is_plain = config.temperature > 0.01 and config.top_k is None and config.top_p == 1 and not penalises
    decoding, ids = Decoding(model, rows), None
    for draw in draws:
        # Entered anew for each token: a mode held across a yield would leak into the caller's code.
        with torch.inference_mode():
            if ids is not None:
                decoding.advance(ids)
            logits = decoding.logits
            if is_plain:  # what filter_logits comes to, in fewer operations
                probabilities = (logits.double() / config.temperature).softmax(-1)
            else:
                probabilities = filter_logits(logits, config, decoding.seen() if penalises else None)["top_p"]
            summed = probabilities.cumsum(-1)
            # The first token whose running sum exceeds the draw: one of probability zero never does.
            chosen = torch.searchsorted(summed, draw, right=True)
            log_probabilities = logits.log_softmax(-1)
            log_probs = log_probabilities.gather(-1, chosen).squeeze(-1)
            ids = chosen.squeeze(-1)
        yield ids.numpy(), log_probs.numpy(), log_probabilities


class Decoding:
    """Rows being continued: the tokens of each inside its window, and a cache of their keys and values.

    logits (B, V): those of the next token, on the CPU in fp32.
    """

    def __init__(self, model: TinyLM, rows: list[list[int]]):
        is_fp32 = model.embedding.weight.dtype == torch.float32
        self.model, self.slots = model if is_fp32 else copy.deepcopy(model).float(), model.config.max_seq_len
        with torch.inference_mode():
            self._read([row[-self.slots :] for row in rows])

    @functools.cached_property
    def step(self) -> Callable[[Tensor, KVCache], Tensor]:
        """ids (B,) and the cache -> logits (B, V). A large model takes its own pass, which is bound by its weights anyway."""
        if sum(parameter.numel() for parameter in self.model.parameters()) > STEP_UP_TO:
            return lambda ids, cache: self._pass(ids[:, None])
        return Step(self.model)

    def advance(self, ids: Tensor) -> None:
        """Add one token to each row (B,) and move the logits on."""
        if self.cache.length == self.slots and not self.cache.is_ring:
            # Rows that are not full are read anew too, as they stand: the same as having gone on.
            keep = max(1, self.slots // 2)
            rows = [[*held[held >= 0], token] for held, token in zip(self.tokens, ids.tolist(), strict=True)]
            self._read([row if len(row) <= self.slots else row[-keep:] for row in rows])
        else:
            self.tokens[:, self.cache.length % self.slots] = ids.numpy()
            self._tell(self.step(ids.to(self.cache.keys.device), self.cache))

    def seen(self) -> Tensor:
        """Which tokens the windows hold, (B, V) bool."""
        seen = np.zeros((len(self.tokens), self.model.config.vocab_size + 1), dtype=bool)
        seen[np.arange(len(seen))[:, None], self.tokens] = True  # the last column takes the -1 of empty slots
        return torch.from_numpy(seen[:, :-1])

    def _read(self, rows: list[list[int]]) -> None:
        longest, device = max(map(len, rows)), self.model.embedding.weight.device
        self.tokens = np.full((len(rows), self.slots), -1)  # by slot, as in the cache; -1 where there is none
        for tokens, row in zip(self.tokens, rows, strict=True):
            tokens[longest - len(row) : longest] = row
        padding = torch.tensor([longest - len(row) for row in rows], device=device)
        self.cache = KVCache(self.model.config, len(rows), device, padding=padding)
        self._tell(self._pass(torch.from_numpy(self.tokens[:, :longest]).clamp(min=0).to(device)))

    def _pass(self, ids: Tensor) -> Tensor:  # (B, T) -> (B, V), from the last of them
        is_training = self.model.training
        if is_training:  # a model sampled while it trains: dropout off for this pass only
            self.model.eval()
        try:
            return self.model(ids, self.cache)[:, -1]
        finally:
            if is_training:
                self.model.train()

    def _tell(self, logits: Tensor) -> None:
        self.logits = logits.float().cpu()
        if not math.isfinite(self.logits.sum()):
            raise LabError(
                "A model that speaks has finite logits",
                "NaN or infinite logits",
                "its training has probably diverged: use another model, or train again with a lower learning_rate",
            )
