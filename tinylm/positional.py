"""How a model knows where a token stands: turned queries and keys (RoPE), or a vector added to the embedding (learned,
sinusoidal), or not at all.

Every kind has two hooks, and leaves one of them idle: ``embed`` gives what is added to the token embeddings, ``angles`` gives
the (cos, sin) by which attention turns queries and keys.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinylm.config import ModelConfig
from tinylm.errors import LabError


class NoPosition(nn.Module):
    """No positions: order reaches the model through the causal mask alone (Haviv et al. 2022)."""

    def __init__(self, config: ModelConfig):
        super().__init__()

    def embed(self, positions: Tensor) -> Tensor | None:  # (T,) or (B, T) -> (..., D)
        return None

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:  # (T,) or (B, T) -> cos, sin (..., Dh / 2)
        return None

    def leading_angles(self, length: int) -> tuple[Tensor, Tensor] | None:  # the angles of positions 0 .. length - 1
        return None


class RoPE(NoPosition):
    """Rotary positions: channel pair i is turned by position * theta^(-2i / Dh) (Su et al. 2021, eq. 15)."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        frequencies = config.rope_theta**-exponent
        angles = torch.arange(config.max_seq_len, dtype=torch.float64)[:, None] * frequencies
        self.register_buffer(
            "frequencies", frequencies, persistent=False
        )  # (Dh / 2,) in fp64: angles grow with position
        self.register_buffer("cos", angles.cos().float(), persistent=False)  # (max_seq_len, Dh / 2)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].to(self.frequencies.dtype) * self.frequencies
        return angles.cos().float(), angles.sin().float()

    def leading_angles(self, length: int) -> tuple[Tensor, Tensor]:
        if length <= self.cos.shape[0]:  # every training step asks for the same table
            return self.cos[:length], self.sin[:length]
        return self.angles(torch.arange(length, device=self.cos.device))


class LearnedPosition(NoPosition):
    """A trained vector for each of max_seq_len positions (as in GPT-2); beyond the table there is nothing to look up."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.max_seq_len, config.hidden_size))

    def embed(self, positions: Tensor) -> Tensor:
        if positions.shape[-1] > self.weight.shape[-2]:
            raise LabError(
                "Learned positions end at max_seq_len",
                f"{positions.shape[-1]} tokens, max_seq_len={self.weight.shape[-2]}",
                "give a shorter text, or train with position='rope'",
            )
        if self.weight.ndim == 3:  # a stack
            return self.weight[:, positions][:, None]  # (M, 1, T, D)
        return self.weight[positions]


class SinusoidalPosition(NoPosition):
    """Fixed sines and cosines of geometric wavelengths (Vaswani et al. 2017, section 3.5), scaled to the embedding's spread:
    at their native size they would drown an embedding of small standard deviation."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        exponent = torch.arange(0, config.hidden_size, 2, dtype=torch.float64) / config.hidden_size
        self.register_buffer("frequencies", 10000.0**-exponent, persistent=False)  # (D / 2,)
        self.scale = embedding_std(config) * 2**0.5  # a sine has root mean square 1 / sqrt(2)

    def embed(self, positions: Tensor) -> Tensor:
        angles = positions[..., None].to(self.frequencies.dtype) * self.frequencies
        return (torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2) * self.scale).float()


def embedding_std(config: ModelConfig) -> float:
    """Standard deviation at which embeddings (and position tables) start."""
    return weight_std(config, config.hidden_size)


def weight_std(config: ModelConfig, fan_in: int) -> float:
    """Standard deviation at which a matrix with ``fan_in`` inputs starts, by ``config.init``."""
    return config.init_std * (1024 / fan_in) ** 0.5 if config.init == "scaled" else config.init_std


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + Dh / 2) of x (B, heads, T, Dh) by the angles whose cos and sin are (T, Dh / 2) or
    (B, 1, T, Dh / 2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


POSITIONS = {"rope": RoPE, "learned": LearnedPosition, "sinusoidal": SinusoidalPosition, "none": NoPosition}


def build_position(config: ModelConfig) -> NoPosition:
    return POSITIONS[config.position](config)
