"""One block of the decoder.

pre-norm    x + attention(norm(x)), then x + mlp(norm(x))       the residual path is free from end to end
post-norm   norm(x + attention(x)), then norm(x + mlp(x))       as in Vaswani et al. 2017
"""

from __future__ import annotations

from torch import Tensor, nn

from tinylm.attention import Attention, KVCache
from tinylm.config import ModelConfig
from tinylm.mlp import build_mlp
from tinylm.normalization import build_norm


class Block(nn.Module):
    """Attention and feed-forward, each with its norm, residual path and dropout (Xiong et al. 2020, figure 1)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.is_pre_norm = config.norm_position == "pre"
        self.attention_norm = build_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = build_norm(config)
        self.mlp = build_mlp(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor] | None, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:  # (B, T, D) -> (B, T, D)
        if self.is_pre_norm:
            x = x + self.dropout(self.attention(self.attention_norm(x), angles, cache, layer))
            return x + self.dropout(self.mlp(self.mlp_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, angles, cache, layer)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))
