"""The feed-forward part of a block: gated (SwiGLU) or plain (GELU, ReLU, ReLU squared). No biases."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.config import ModelConfig
from tinylm.layers import Linear


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, eq. 6): three matrices of D x F."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Linear(config.hidden_size, config.intermediate_size)
        self.up = Linear(config.hidden_size, config.intermediate_size)
        self.down = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        return self.down(F.silu(self.gate(x)) * self.up(x))


class PlainMLP(nn.Module):
    """down(activation(up(x))): two matrices of D x F."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.mlp]
        self.up = Linear(config.hidden_size, config.intermediate_size)
        self.down = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        return self.down(self.activation(self.up(x)))


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU (Hendrycks & Gimpel 2016)."""
    return F.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    """ReLU squared (So et al. 2021, Primer)."""
    return F.relu(x).square()


ACTIVATIONS = {"gelu": gelu, "relu": F.relu, "relu2": relu2}
MLPS = {"swiglu": GatedMLP, "gelu": PlainMLP, "relu": PlainMLP, "relu2": PlainMLP}


def build_mlp(config: ModelConfig) -> nn.Module:
    return MLPS[config.mlp](config)
