"""TinyLM: token ids in, a distribution over the next token out. Knows nothing of training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.attention import KVCache
from tinylm.config import ModelConfig
from tinylm.decoder import Block
from tinylm.normalization import build_norm
from tinylm.positional import build_position, embedding_std, weight_std


class TinyLM(nn.Module):
    """A decoder-only transformer with every choice of ``ModelConfig``.

    model(token_ids (B, T) int64) gives logits (B, T, V); row t predicts token t + 1. With a ``KVCache`` only the new tokens are
    given, and the logits are those of the new tokens. ``seed`` decides the initial weights and touches no other generator.
    """

    def __init__(self, config: ModelConfig, seed: int = 0):
        super().__init__()
        config = config.resolve()
        self.config = config
        with torch.random.fork_rng(
            devices=[]
        ):  # the parts draw weights of their own when made; ours follow from ``seed``
            self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
            self.norm = build_norm(config) if config.norm_position == "pre" else nn.Identity()
            self.head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.position = build_position(config)
        self.dropout = nn.Dropout(config.dropout)
        self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw all weights anew: normal matrices (see ``ModelConfig.init``), norms at one, biases at zero."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name in ("embedding.weight", "position.weight"):
                parameter.normal_(0.0, embedding_std(self.config), generator=generator)
            elif parameter.ndim == 2:
                parameter.normal_(0.0, weight_std(self.config, parameter.shape[1]), generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)

    def forward(self, token_ids: Tensor, cache: KVCache | None = None) -> Tensor:  # (B, T) -> (B, T, V)
        x = self.hidden(token_ids, cache)
        return F.linear(x, self.embedding.weight if self.head is None else self.head.weight)

    def hidden(
        self, token_ids: Tensor, cache: KVCache | None = None
    ) -> Tensor:  # (B, T) -> (B, T, D), ready for the head
        length = token_ids.shape[1]
        if cache is None:
            positions = torch.arange(length, device=token_ids.device)
            angles = self.position.leading_angles(length)
        else:
            positions = cache.reserve(length)
            angles = self.position.angles(positions)
            if angles is not None and positions.ndim == 2:  # rows at different positions: (B, 1, T, Dh / 2)
                angles = tuple(angle[:, None] for angle in angles)
        x = self.embedding(token_ids)
        if (added := self.position.embed(positions)) is not None:
            x = x + added
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, angles, cache, layer)
        return self.norm(x)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token of targets (B, T) given inputs (B, T)."""
        return F.cross_entropy(self(inputs).flatten(0, 1).float(), targets.flatten())
