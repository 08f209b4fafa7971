"""What happens inside a model while it reads: attention, the residual stream through depth, and loss by position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinylm.attention import by_head
from tinylm.errors import LabError
from tinylm.model import TinyLM
from tinylm.positional import RoPE, rotate
from tinylm.train import TextDataset


@dataclass(frozen=True)
class Inside:
    """One text of T tokens on its way through a model of L blocks. ids (T,); attention (L, H, T, T): how much query row t
    takes from key column s; residual (L + 1, T, D): the stream before the first block and after each; probabilities
    (L + 1, T, V): what the final norm and head make of each of these (the logit lens of nostalgebraist 2020), so that the
    last is the model's own word on the next token."""

    ids: Tensor
    attention: Tensor
    residual: Tensor
    probabilities: Tensor


@torch.no_grad()
def look_inside(model: TinyLM, ids: list[int]) -> Inside:
    """Read ids (T,), at most max_seq_len of them, and keep what was seen on the way. Dropout is off."""
    if not 1 <= len(ids) <= model.config.max_seq_len:
        raise LabError(
            "A text to look at has between one token and max_seq_len of them",
            f"{len(ids)} tokens, max_seq_len={model.config.max_seq_len}",
            "give another text",
        )
    was_training = model.training
    model.eval()
    try:
        tokens = torch.tensor([ids], device=model.embedding.weight.device)
        x, angles = model.embed(tokens)
        stream, attention = [x], []
        for block in model.blocks:
            attention.append(_attention(block, x, angles))
            x = block(x, angles)
            stream.append(x)
        residual = torch.cat(stream)  # (L + 1, T, D)
        probabilities = model.logits(residual).float().softmax(-1)
    finally:
        model.train(was_training)
    return Inside(tokens[0].cpu(), torch.cat(attention).cpu(), residual.cpu(), probabilities.cpu())


def _attention(block: torch.nn.Module, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
    """The weights (1, H, T, T) that a block's attention gives to its keys, for x (1, T, D)."""
    part = block.attention
    read, length = (block.attention_norm(x) if block.is_pre_norm else x), x.shape[1]
    q, k = part.q(read), part.k(read)
    if part.q_norm is not None:
        q, k = by_head(q, part.q_norm), by_head(k, part.k_norm)
    q = q.view(1, length, part.num_heads, part.head_dim).transpose(1, 2)
    k = k.view(1, length, part.num_kv_heads, part.head_dim).transpose(1, 2)
    if angles is not None:
        q, k = rotate(q, *angles), rotate(k, *angles)
    k = k.repeat_interleave(part.num_heads // part.num_kv_heads, dim=1)
    scores = (q @ k.mT).float() * part.scale
    later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    return scores.masked_fill(later, float("-inf")).softmax(-1)


@torch.no_grad()
def loss_by_position(model: TinyLM, tokens: np.ndarray, windows: int = 64) -> np.ndarray:
    """Losses (W, T) in nats of up to so many windows, spread evenly over ``tokens``, at each position of max_seq_len: their
    mean over windows says how much more a model knows the more it has read."""
    data = TextDataset.from_tokens(tokens, model.config.max_seq_len, stride=model.config.max_seq_len)
    chosen = np.unique(np.linspace(0, len(data) - 1, min(windows, len(data))).astype(int))
    was_training, losses = model.training, []
    model.eval()
    try:
        for start in range(0, len(chosen), 16):
            inputs, targets = data.batch(chosen[start : start + 16])
            logits = model(inputs).float()
            losses.append(F.cross_entropy(logits.transpose(1, 2), targets, reduction="none"))
    finally:
        model.train(was_training)
    return torch.cat(losses).numpy()


@torch.no_grad()
def position_similarity(model: TinyLM, length: int | None = None) -> np.ndarray:
    """How alike positions look to the model, (T, T) in [-1, 1]: the cosine between the vectors added at two places
    (learned, sinusoidal), or the mean cosine by which RoPE turns equal vectors at two places against each other. Ones
    where there are no positions."""
    length = length or model.config.max_seq_len
    places = torch.arange(length)
    if isinstance(model.position, RoPE):
        distances = (places[:, None] - places[None, :]).double()
        return (distances[..., None] * model.position.frequencies).cos().mean(-1).numpy()
    added = model.position.embed(places)
    if added is None:
        return np.ones((length, length))
    unit = F.normalize(added.float(), dim=-1)
    return (unit @ unit.mT).numpy()
