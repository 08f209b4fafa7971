r"""Causal attention in which groups of query heads share keys and values, and the cache that generation keeps of them.

query heads   q0 q1 q2 q3 q4 q5 q6 q7        num_heads = 8
               \  |  |  /  \  |  |  /
kv heads          k0,v0       k1,v1          num_kv_heads = 2   (8 would be multi-head, 1 multi-query attention)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.config import ModelConfig
from tinylm.errors import LabError
from tinylm.positional import rotate


class KVCache:
    """Keys and values of the tokens so far, in a fixed store of max_seq_len slots a sequence.

    Token number n lies in slot n % max_seq_len. Under ``rope`` and ``none`` the store is a ring: past max_seq_len a new token takes
    the slot of the oldest, so that attention slides over the last max_seq_len tokens. Under ``learned`` and ``sinusoidal``,
    whose positions are tied to the training window, a full store is an error.

    padding (B,): how many tokens at the left of each row are filling, for prompts of unequal length; the position of a token is
    its index minus its row's padding, and filling is never attended to. length: tokens written so far, filling included.
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
        shape = (config.num_layers, batch_size, config.num_kv_heads, config.max_seq_len, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.slots = config.max_seq_len
        self.is_ring = config.position in ("rope", "none")
        self.padding = padding if padding is not None and bool(padding.any()) else None
        self.length = 0
        self._slot_index = torch.full(
            (self.slots,), -1, device=device
        )  # number of the token in each slot, -1 where empty

    def reserve(self, count: int) -> Tensor:
        """Make room for ``count`` new tokens and return their positions, (T,) or with padding (B, T)."""
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
        index = torch.arange(self.length, self.length + count, device=self.keys.device)
        self._new_slots = index % self.slots
        self._slot_index[self._new_slots] = index
        self.length += count
        self._used = min(self.length, self.slots)
        self._mask = self._visible(index)
        return index if self.padding is None else (index - self.padding[:, None]).clamp(min=0)

    def _visible(self, index: Tensor) -> Tensor | None:
        """Which slots each new token may attend to: (T, used), with padding (B, 1, T, used); None where it is all of them."""
        if len(index) == 1 and self.padding is None:
            return None
        written = self._slot_index[: self._used]
        visible = (written <= index[:, None]) & (written >= 0)
        if self.padding is None:
            return visible
        real = (written >= self.padding[:, None])[:, None, :]  # (B, 1, used)
        itself = written == index[:, None]  # filling sees at least itself: a row of no keys would be NaN
        return ((visible & real) | itself)[:, None]

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store the new keys and values (B, K, T, Dh) of a layer; return all of them (B, K, used, Dh) and the mask."""
        self.keys[layer][:, :, self._new_slots] = keys.to(self.keys.dtype)
        self.values[layer][:, :, self._new_slots] = values.to(self.values.dtype)
        used = self._used
        return (
            self.keys[layer][:, :, :used].to(keys.dtype),
            self.values[layer][:, :, :used].to(values.dtype),
            self._mask,
        )


class Attention(nn.Module):
    """softmax(q k^T * attention_scale) v over the past, K key-value heads serving H query heads (Ainslie et al. 2023). No
    biases; dropout falls on the attention weights."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.scale, self.dropout = config.attention_scale, config.dropout
        kv_width = config.num_kv_heads * config.head_dim
        self.q = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor] | None, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:  # (B, T, D) -> (B, T, D)
        batch, length, width = x.shape
        q = self.q(x).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, T, Dh)
        k = self.k(x).view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, Dh)
        v = self.v(x).view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        mask = None
        if cache is not None:
            k, v, mask = cache.update(layer, k, v)
        if self.num_kv_heads != self.num_heads:
            # Query head h reads kv head h // (H / K): each kv head is repeated for the group that shares it.
            k, v = (t.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=cache is None,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out(y.transpose(1, 2).reshape(batch, length, width))
