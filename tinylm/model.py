"""TinyLM: token ids in, a distribution over the next token out. Knows nothing of training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.attention import Attention, KVCache
from tinylm.config import ModelConfig
from tinylm.decoder import Block
from tinylm.layers import Embedding, Linear, product
from tinylm.normalization import build_norm
from tinylm.positional import build_position, embedding_std, weight_std


class TinyLM(nn.Module):
    """A decoder-only transformer with every choice of ``ModelConfig``.

    model(token_ids (B, T) int64) gives logits (B, T, V); row t predicts token t + 1. With a ``KVCache`` only the new tokens are
    given, and the logits are those of the new tokens. ``seed`` decides the initial weights and touches no other generator.
    """

    product_dtype: torch.dtype | None = None  # of the head; see ``compute_with``

    def __init__(self, config: ModelConfig, seed: int = 0):
        super().__init__()
        config = config.resolve()
        self.config = config
        with torch.random.fork_rng(
            devices=[]
        ):  # the parts draw weights of their own when made; ours follow from ``seed``
            self.embedding = Embedding(config.vocab_size, config.hidden_size)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
            self.norm = build_norm(config) if config.norm_position == "pre" else nn.Identity()
            self.head = None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size)
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
        return self.logits(self.hidden(token_ids, cache))

    def logits(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, V), from what the last block gives
        return product(self.norm(x), (self.head or self.embedding).weight, self.product_dtype)

    def hidden(self, token_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """What the last block gives for token ids (B, T): (B, T, D)."""
        return self.through_blocks(*self.embed(token_ids, cache), cache)

    def embed(
        self, token_ids: Tensor, cache: KVCache | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:  # (B, T) -> (B, T, D), and the angles that attention turns by
        length = token_ids.shape[-1]
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
        return self.dropout(x), angles

    def through_blocks(
        self, x: Tensor, angles: tuple[Tensor, Tensor] | None, cache: KVCache | None = None
    ) -> Tensor:  # (B, T, D) -> (B, T, D)
        for layer, block in enumerate(self.blocks):
            x = block(x, angles, cache, layer)
        return x

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token of targets (B, T) given inputs (B, T); in a stack (M, B, T) one mean for
        each model, (M,)."""
        x, angles = self.embed(inputs)
        return self.loss_of(x, targets, angles)

    def loss_of(self, x: Tensor, targets: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        """The loss from the embedded inputs (B, T, D) on."""
        return self.score(self.through_blocks(x, angles), targets)

    def score(self, x: Tensor, targets: Tensor) -> Tensor:
        """The loss from what the last block gives, (B, T, D)."""
        logits = self.logits(x).float()
        if targets.ndim == 2:
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        losses = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none")
        return losses.view(targets.shape[0], -1).mean(1)

    def compute_with(self, product_dtype: torch.dtype | None, query_blocks: int) -> None:
        """Choose how this model multiplies (see ``Linear``) and attends (see ``Attention``); weights stay as they are."""
        self.product_dtype = product_dtype
        for module in self.modules():
            if isinstance(module, Linear):
                module.product_dtype = product_dtype
            elif isinstance(module, Attention):
                module.query_blocks = query_blocks
