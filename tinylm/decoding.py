"""One more token in each row of a batch, in as few operations as a model of any of our kinds can do with.

A small model is bound by how many operations a token takes, not by their size. ``Step`` therefore does what the model's own
pass with a cache does, in fewer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.attention import Attention, KVCache
from tinylm.mlp import GatedMLP, PlainMLP
from tinylm.model import TinyLM
from tinylm.normalization import RMSNorm


class Step:
    """ids (B,) and a cache that has read what precedes them -> logits (B, V), written to the cache. In fp32.

    The queries, the key and the value of a kv head come from one product and are turned as one: channels i and i + Dh / 2 of
    queries and keys stand side by side, as a complex number (Su et al. 2021, eq. 15), and values are turned by nothing. The
    weights take in the factors that would precede or follow them, residuals are added by the products, and attention meets
    the filled slots alone. Some of this is made of the weights beforehand: they count as they are when a Step is built.
    """

    def __init__(self, model: TinyLM):
        config = model.config
        self.heads, self.group = config.num_kv_heads, config.num_heads // config.num_kv_heads
        self.position, self.span, self.first = model.position, config.max_seq_len, None
        self.is_pre_norm, self.embedding = config.norm_position == "pre", model.embedding.weight
        self.is_turned = self.position.angles(torch.zeros(1, device=self.embedding.device)) is not None
        self.norm, gain = _split_norm(model.norm)
        self.head = _columns((model.head or model.embedding).weight, gain)
        self.cache, self.layers = None, []
        for block in model.blocks:
            norms = block.attention_norm, block.mlp_norm
            (attention_norm, gain), (mlp_norm, mlp_gain) = (
                _split_norm(norm) if self.is_pre_norm else (_norm(norm), 1.0) for norm in norms
            )
            part, shape = block.attention, (self.heads, -1, config.head_dim, config.hidden_size)
            q, k, v = (layer.weight.view(shape) for layer in (part.q, part.k, part.v))
            if self.is_turned:
                q, k = _pairs(q), _pairs(k)
            scale = part.scale if part.q_norm is None else 1.0  # a norm would take it away again
            heads = _columns(torch.cat((q * scale, k, v), dim=1).flatten(0, 2), gain)
            own = _head_norm(part, self.group, self.is_turned)
            out, mlp = _columns(part.out.weight), _mlp(block.mlp, mlp_gain)
            self.layers.append((attention_norm, heads, own, out, mlp_norm, mlp))

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        if cache is not self.cache:  # one that the model wrote: its keys come into the order of channels used here
            self.cache = cache
            if self.is_turned:
                cache.keys.copy_(_pairs(cache.keys, dim=3))
        added, turn = self._where(cache)
        new_keys, new_values, keys, values, mask = cache.grow()
        batch, parts = len(ids), (self.group, 1, 1)
        rows = batch * self.heads, self.group + 2, -1
        x = self.embedding.index_select(0, ids)
        if added is not None:
            x = x + added
        for layer, (attention_norm, to_heads, head_norm, out, mlp_norm, mlp) in enumerate(self.layers):
            heads = torch.mm(attention_norm(x) if self.is_pre_norm else x, to_heads)
            if head_norm is not None:
                heads = head_norm(heads.view(rows))
            if turn is not None:
                pairs = heads.view(torch.complex64).view(batch, self.heads, self.group + 2, -1)
                heads = (pairs * turn).view(torch.float32)
            q, k, v = heads.view(rows).split_with_sizes(parts, 1)  # (B K, G or 1, Dh)
            new_keys[layer].copy_(k)
            new_values[layer].copy_(v)
            scores = torch.bmm(q, keys[layer]) if mask is None else torch.baddbmm(mask, q, keys[layer])
            y = torch.bmm(scores.softmax(-1), values[layer])
            x = torch.addmm(x, y.view(batch, -1), out)
            if self.is_pre_norm:
                x = mlp(x, mlp_norm(x))
            else:
                x = attention_norm(x)
                x = mlp_norm(mlp(x, x))
        return torch.mm(self.norm(x), self.head)

    def _where(self, cache: KVCache) -> tuple[Tensor | None, Tensor | None]:
        """Of the tokens that the cache takes next: what is added to their embeddings, (D,) or with padding (B, D), and how
        their heads are turned, (G + 2, Dh / 2) or (B, 1, G + 2, Dh / 2), complex of modulus 1. None where nothing is."""
        if self.first is None or cache.length >= self.first + 2 * self.span:
            # The rows' positions lie less than a window apart: a table of two windows serves for one window of tokens.
            self.first = max(0, cache.length - self.span + 1)
            positions = torch.arange(self.first, self.first + 2 * self.span, device=cache.keys.device)
            self.added = self.position.embed(positions[: self.span])  # positions that are added end with the window
            if self.is_turned:
                turn = torch.complex(*self.position.angles(positions))[:, None]
                self.turns = torch.cat((turn.expand(-1, self.group + 1, -1), torch.ones_like(turn)), dim=1)
        at = cache.length - self.first
        if cache.padding is not None:
            at = at - cache.padding
        turn = self.turns[at] if self.is_turned else None
        if turn is not None and cache.padding is not None:
            turn = turn[:, None]
        return None if self.added is None else self.added[at], turn


def _pairs(x: Tensor, dim: int = 2) -> Tensor:
    """Channels i and i + Dh / 2, those that RoPE turns together, side by side."""
    return x.unflatten(dim, (2, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def _columns(weight: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    """(out, in) -> (in, out), the faster way round for few rows; times the gain of the norm before it."""
    return (weight * gain).t().contiguous()


def _split_norm(module: nn.Module) -> tuple[Callable[[Tensor], Tensor], Tensor | float]:
    """A norm without its gain, and the gain: module(x) = norm(x) * gain."""
    if not isinstance(module, RMSNorm):
        return module, 1.0
    size, length = module.weight.numel(), torch.linalg.vector_norm
    floor = module.weight.new_tensor((size * module.eps) ** 0.5)
    # x / sqrt(mean(x^2) + eps) = sqrt(D) x / hypot(|x|, sqrt(D eps)): three operations for six
    return lambda x: x / length(x, dim=-1, keepdim=True).hypot_(floor), module.weight * size**0.5


def _norm(module: nn.Module) -> Callable[[Tensor], Tensor]:
    norm, gain = _split_norm(module)
    return norm if norm is module else lambda x: norm(x) * gain


def _head_norm(part: Attention, group: int, is_turned: bool) -> Callable[[Tensor], Tensor] | None:
    """(B K, G + 2, Dh), the queries, key and value of each kv head -> the same with queries and key normalised, times the
    attention scale for the queries. None where the model does not normalise them."""
    if part.q_norm is None:
        return None
    queries, key = part.q_norm.weight * part.scale, part.k_norm.weight
    gains = torch.stack([queries] * group + [key])  # (G + 1, Dh)
    if is_turned:
        gains = _pairs(gains, dim=1)

    def norm(heads: Tensor) -> Tensor:
        both, value = heads.split_with_sizes((group + 1, 1), 1)
        return torch.cat((F.rms_norm(both, both.shape[-1:], None, part.q_norm.eps) * gains, value), 1)

    return norm


def _mlp(module: nn.Module, gain: Tensor | float) -> Callable[[Tensor, Tensor], Tensor]:
    """(x, y) -> x + module(y * gain)"""
    if isinstance(module, GatedMLP):
        gate, up, down = (
            _columns(module.gate.weight, gain),
            _columns(module.up.weight, gain),
            _columns(module.down.weight),
        )
        return lambda x, y: torch.addmm(x, F.silu(torch.mm(y, gate)).mul_(torch.mm(y, up)), down)
    if isinstance(module, PlainMLP):
        activation, up, down = module.activation, _columns(module.up.weight, gain), _columns(module.down.weight)
        return lambda x, y: torch.addmm(x, activation(torch.mm(y, up)), down)
    return lambda x, y: x + module(y * gain)
