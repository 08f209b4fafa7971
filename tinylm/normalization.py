"""Normalisation of the residual stream: RMSNorm and LayerNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.config import ModelConfig
from tinylm.layers import across


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        if self.weight.ndim == 1:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x, x.shape[-1:], None, self.eps) * across(self.weight)


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over the last dimension (Ba et al. 2016)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        if self.weight.ndim == 1:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * across(self.weight) + across(self.bias)


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


def build_norm(config: ModelConfig) -> nn.Module:
    return NORMS[config.norm](config.hidden_size, config.norm_eps)
