r"""Causal attention in which groups of query heads share keys and values, and the cache that generation keeps of them.

query heads   q0 q1 q2 q3 q4 q5 q6 q7        num_heads = 8
               \  |  |  /  \  |  |  /
kv heads          k0,v0       k1,v1          num_kv_heads = 2   (8 would be multi-head, 1 multi-query attention)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.config import ModelConfig
from tinylm.errors import LabError
from tinylm.layers import Linear
from tinylm.normalization import RMSNorm
from tinylm.positional import rotate


class KVCache:
    """Keys and values of the tokens so far, in a fixed store of max_seq_len slots a sequence: ``keys`` (layers, B, K, Dh,
    slots), the way round in which one query meets them fastest, and ``values`` (layers, B, K, slots, Dh).

    Token number n lies in slot n % max_seq_len. Under ``rope`` and ``none`` the store is a ring: past max_seq_len a new token takes
    the slot of the oldest, so that attention slides over the last max_seq_len tokens. Under ``learned`` and ``sinusoidal``,
    whose positions are tied to the training window, a full store is an error.

    padding (B,): how many tokens at the left of each row are filling, for prompts of unequal length; the position of a token is
    its index minus its row's padding, and filling is never attended to. length: tokens written so far, filling included.

    A pass over new tokens takes ``reserve``, then ``update`` in each layer. ``grow`` serves the sampler's own step.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        padding: Tensor | None = None,
    ):
        config = config.resolve()
        heads = (config.num_layers, batch_size, config.num_kv_heads)
        self.keys = torch.zeros(*heads, config.head_dim, config.max_seq_len, device=device, dtype=dtype)
        self.values = torch.zeros(*heads, config.max_seq_len, config.head_dim, device=device, dtype=dtype)
        self._flat = self.keys.flatten(1, 2), self.values.flatten(1, 2)
        self.slots = config.max_seq_len
        self.is_ring = config.position in ("rope", "none")
        self.padding = padding if padding is not None and bool(padding.any()) else None
        self.length = 0
        self._filling: Tensor | None = None  # (B K, 1, slots): what ``grow`` adds to the scores

    def reserve(self, count: int) -> Tensor:
        """Make room for ``count`` new tokens and return their positions, (T,) or with padding (B, T)."""
        self._check(count)
        index = torch.arange(self.length, self.length + count, device=self.keys.device)
        self._new_slots = index % self.slots
        self.length += count
        self._used = min(self.length, self.slots)
        self._mask, self._filling = self._visible(index), None
        return index if self.padding is None else (index - self.padding[:, None]).clamp(min=0)

    def _check(self, count: int) -> None:
        if not self.is_ring and self.length + count > self.slots:
            raise LabError(
                "This kind of position ends at max_seq_len",
                f"{self.length + count} tokens, max_seq_len={self.slots}",
                "start a new cache from the last tokens, as tinylm.generate does",
            )
        if self.is_ring and self.length and count > 1 and self.length + count > self.slots:
            raise LabError(
                "A ring that is about to wrap takes one token at a time",
                f"{count} tokens at length {self.length}, max_seq_len={self.slots}",
                "write the prompt first, then token by token",
            )
        if count > self.slots:
            raise LabError(
                "A cache holds max_seq_len tokens", f"{count} at once", "give only the last max_seq_len tokens"
            )

    def _written(self) -> Tensor:
        """The number of the token in each slot that is in use, (used,)."""
        last = self.length - 1
        return last - (last - torch.arange(min(self.length, self.slots), device=self.keys.device)) % self.slots

    def _visible(self, index: Tensor) -> Tensor | None:
        """Which slots each new token may attend to: (T, used), with padding (B, 1, T, used); None where it is all of them."""
        if len(index) == 1 and self.padding is None:
            return None
        written = self._written()
        visible = written <= index[:, None]
        if self.padding is None:
            return visible
        real = (written >= self.padding[:, None])[:, None, :]  # (B, 1, used)
        itself = written == index[:, None]  # filling sees at least itself: a row of no keys would be NaN
        return ((visible & real) | itself)[:, None]

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store the new keys and values (B, K, T, Dh) of a layer; return all of them (B, K, used, Dh) and the mask."""
        self.keys[layer][..., self._new_slots] = keys.mT.to(self.keys.dtype)
        self.values[layer][:, :, self._new_slots] = values.to(self.values.dtype)
        if self._used == keys.shape[2]:  # a prompt need not be read back
            return keys, values, self._mask
        used = self._used
        return (
            self.keys[layer][..., :used].mT.to(keys.dtype),
            self.values[layer][:, :, :used].to(values.dtype),
            self._mask,
        )

    def grow(self) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Tensor | None]:
        """Make room for one token in each row, which the caller writes. Of each layer: where its key and its value go, (B K,
        1, Dh) both, and the keys (B K, Dh, used) and values (B K, used, Dh) that it attends to, itself included; then what to
        add to the scores (B K, 1, used), None where no row is padded. All are views of the store."""
        self._check(1)
        slot = self.length % self.slots
        self.length += 1
        (keys, values), used = self._flat, min(self.length, self.slots)
        if self.padding is not None and self._filling is None:
            filling = self._written() < self.padding[:, None]  # (B, used)
            self._filling = keys.new_zeros(len(filling), self.slots)
            self._filling[:, :used].masked_fill_(filling, float("-inf"))
            self._filling = self._filling.repeat_interleave(self.keys.shape[2], dim=0)[:, None]
        elif self.padding is not None and self.length > self.slots:  # a token has come where filling was
            self._filling[..., slot] = 0.0
        return (
            keys.select(3, slot).unsqueeze(2).unbind(0),
            values.select(2, slot).unsqueeze(2).unbind(0),
            keys.narrow(3, 0, used).unbind(0),
            values.narrow(2, 0, used).unbind(0),
            None if self._filling is None else self._filling[..., :used],
        )


class Attention(nn.Module):
    """softmax(q k^T * attention_scale) v over the past, K key-value heads serving H query heads (Ainslie et al. 2023). No
    biases; dropout falls on the attention weights. With ``qk_norm`` each head of q and k is normalised first."""

    query_blocks = 1  # 1 is torch's own kernel, more is ``blocked_causal``; which is faster depends on the machine

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.scale, self.dropout = config.attention_scale, config.dropout
        kv_width = config.num_kv_heads * config.head_dim
        self.q = Linear(config.hidden_size, config.hidden_size)
        self.k = Linear(config.hidden_size, kv_width)
        self.v = Linear(config.hidden_size, kv_width)
        self.out = Linear(config.hidden_size, config.hidden_size)
        self.q_norm, self.k_norm = (
            RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None for _ in range(2)
        )

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor] | None, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:  # (B, T, D) -> (B, T, D)
        length = x.shape[-2]  # attention holds no weights of its own: the models of a stack are so many more sequences
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.q_norm is not None:
            q, k = by_head(q, self.q_norm), by_head(k, self.k_norm)
        q = q.view(-1, length, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, T, Dh)
        k = k.view(-1, length, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, Dh)
        v = v.view(-1, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        mask = None
        if cache is not None:
            k, v, mask = cache.update(layer, k, v)
        if self.num_kv_heads != self.num_heads:
            # Query head h reads kv head h // (H / K): each kv head is repeated for the group that shares it.
            k, v = (t.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for t in (k, v))
        if (dtype := self.q.product_dtype) is not None:
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        dropout = self.dropout if self.training else 0.0
        if cache is None and self.query_blocks > 1 and not dropout:
            y = blocked_causal(q, k, v, self.scale, self.query_blocks)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=cache is None, scale=self.scale, dropout_p=dropout
            )
        return self.out(y.transpose(1, 2).reshape(x.shape))


def by_head(x: Tensor, norm: RMSNorm) -> Tensor:
    """x (..., T, heads Dh) with each head normalised over its own Dh channels; in a stack x is (M, B, T, heads Dh)."""
    return norm(x.unflatten(-1, (-1, norm.weight.shape[-1])).flatten(-3, -2)).view(x.shape)


def blocked_causal(q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: int) -> Tensor:
    """Causal attention (B, H, T, Dh) with the queries in a few blocks, each against the keys up to its own end: of the
    square of scores little more than the half that counts is computed, by large products. Softmax is in fp32."""
    length, parts = q.shape[-2], []
    for block in range(blocks):
        start, end = length * block // blocks, length * (block + 1) // blocks
        scores = (q[..., start:end, :] * scale) @ k[..., :end, :].mT
        later = torch.ones(end - start, end, dtype=torch.bool, device=q.device).triu(start + 1)
        weights = scores.float().masked_fill(later, float("-inf")).softmax(-1)
        parts.append(weights.to(v.dtype) @ v[..., :end, :])
    return torch.cat(parts, dim=-2)
