"""The layers that hold weights, for one model or for a stack of M models of one shape.

In a stack each weight has a leading axis, (M, ...) where one model has (...), and activations are (M, B, T, D). No model
of a stack reads another's numbers, so that one which diverges, or leaves, changes nothing for the rest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """x W^T, without a bias. The product is taken in ``product_dtype`` where that is set and comes back in fp32: weights
    and everything between two products stay fp32."""

    product_dtype: torch.dtype | None = None

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (..., inputs) -> (..., outputs)
        return product(x, self.weight, self.product_dtype)


def product(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x (..., in) times the transpose of weight (out, in); in a stack x (M, ..., in) and weight (M, out, in)."""
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
    if weight.ndim == 2:
        y = F.linear(x, weight)
    else:
        y = torch.bmm(x.flatten(1, -2), weight.mT).view(*x.shape[:-1], weight.shape[-2])
    return y if dtype is None else y.float()


class Embedding(nn.Embedding):
    """Row ``id`` of the table (V, D); in a stack ids are (M, B, T) and tables (M, V, D)."""

    def forward(self, ids: Tensor) -> Tensor:  # (B, T) -> (B, T, D)
        if self.weight.ndim == 2:
            return F.embedding(ids, self.weight)
        models, vocab_size, _ = self.weight.shape
        first = torch.arange(0, models * vocab_size, vocab_size, device=ids.device)
        return F.embedding(ids + first[:, None, None], self.weight.flatten(0, 1))


def across(weight: Tensor) -> Tensor:
    """The weight of a norm, to meet activations: (D,) as it is, and a stack's (M, D) as (M, 1, 1, D)."""
    return weight if weight.ndim == 1 else weight[:, None, None]
