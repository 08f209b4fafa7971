"""Parameters, FLOPs and cache bytes in closed form, from a config alone. Imports no torch.

Convention for FLOPs: only matrix products count, a multiply-add is two, the head is included, a query meets only the keys
that causality lets it see, and the backward pass costs twice the forward (Kaplan et al. 2020, section 2.1, counts the same
products but leaves out the head and the attention scores from its 6 N D).
"""

from __future__ import annotations

from tinylm.config import ModelConfig, TrainConfig


def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by part: ``embedding``, ``position``, ``attention``, ``mlp``, ``norm``, ``head`` (0 where tied), and the sums
    ``total`` and ``non_embedding`` (total without embedding, position table and head)."""
    c = config.resolve()
    kv_width = c.num_kv_heads * c.head_dim
    norms = 2 * c.num_layers + (1 if c.norm_position == "pre" else 0)  # post-norm has no final norm
    head_norms = 2 * c.num_layers * c.head_dim if c.qk_norm else 0  # gains of queries and of keys
    parts = {
        "embedding": c.vocab_size * c.hidden_size,
        "position": c.max_seq_len * c.hidden_size if c.position == "learned" else 0,
        "attention": c.num_layers * (2 * c.hidden_size**2 + 2 * c.hidden_size * kv_width),
        "mlp": c.num_layers * (3 if c.mlp == "swiglu" else 2) * c.hidden_size * c.intermediate_size,
        "norm": norms * c.hidden_size * (2 if c.norm == "layernorm" else 1) + head_norms,
        "head": 0 if c.tie_embeddings else c.vocab_size * c.hidden_size,
    }
    total = sum(parts.values())
    return {
        **parts,
        "total": total,
        "non_embedding": total - parts["embedding"] - parts["position"] - parts["head"],
    }


def forward_flops(config: ModelConfig, seq_len: int) -> int:
    """FLOPs of one forward pass over one window of seq_len tokens."""
    c = config.resolve()
    p = parameters(c)
    products = p["attention"] + p["mlp"] + c.vocab_size * c.hidden_size  # weights that every token meets, head included
    pairs = seq_len * (seq_len + 1) // 2  # query-key pairs under the causal mask
    scores = 2 * c.num_layers * c.hidden_size * pairs  # q.k and the weighted sum of v
    return 2 * (seq_len * products + scores)


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """FLOPs of forward and backward for one token in a window of seq_len."""
    return 3 * forward_flops(config, seq_len) / seq_len


def train_flops(model: ModelConfig, train: TrainConfig) -> int:
    """FLOPs of a whole training run of max_steps steps (evaluation not counted)."""
    windows = train.max_steps * train.windows_per_step
    return 3 * forward_flops(model, train.resolve(model).seq_len) * windows


def kv_cache_bytes(config: ModelConfig, batch_size: int, length: int, bytes_per_value: int = 4) -> int:
    """Bytes of keys and values for ``length`` tokens of ``batch_size`` sequences (4 bytes a value in fp32)."""
    c = config.resolve()
    return 2 * c.num_layers * c.num_kv_heads * c.head_dim * batch_size * length * bytes_per_value
