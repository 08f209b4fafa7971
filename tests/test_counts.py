"""Closed forms against the built model and against counting by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tinylm import counts
from tinylm.attention import KVCache
from tinylm.config import MLPS, NORM_POSITIONS, NORMS, POSITIONS, ModelConfig, TrainConfig
from tinylm.model import TinyLM

EVERY_SWITCH = list(itertools.product(NORMS, NORM_POSITIONS, MLPS, POSITIONS, (4, 2, 1), (True, False)))


def config_of(norm, norm_position, mlp, position, num_kv_heads, tie_embeddings) -> ModelConfig:
    return ModelConfig(
        vocab_size=48,
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        max_seq_len=16,
        norm=norm,
        norm_position=norm_position,
        mlp=mlp,
        position=position,
        tie_embeddings=tie_embeddings,
    )


@pytest.mark.parametrize("num_kv_heads", [4, 1])
def test_norms_of_queries_and_keys_are_counted(num_kv_heads):
    config = config_of("rmsnorm", "pre", "relu2", "rope", num_kv_heads, True).replace(qk_norm=True)
    counted = counts.parameters(config)
    assert counted["total"] == sum(parameter.numel() for parameter in TinyLM(config).parameters())
    assert counted["norm"] - counts.parameters(config.replace(qk_norm=False))["norm"] == 2 * 3 * 8


def part_of(name: str) -> str:
    """Which part of ``counts.parameters`` a parameter of the built model belongs to."""
    if name.startswith(("embedding", "position", "head")):
        return name.split(".")[0]
    if "norm" in name:
        return "norm"
    return name.split(".")[2]


@pytest.mark.parametrize("switches", EVERY_SWITCH, ids=lambda s: "-".join(map(str, s)))
def test_parameters_by_part_equal_the_built_model(switches):
    config = config_of(*switches)
    built: dict[str, int] = {}
    for name, parameter in TinyLM(config).named_parameters():
        built[part_of(name)] = built.get(part_of(name), 0) + parameter.numel()
    counted = counts.parameters(config)
    assert {part: counted[part] for part in built} == built
    assert counted["total"] == sum(built.values())
    assert counted["non_embedding"] == built["attention"] + built["mlp"] + built["norm"]


@pytest.mark.parametrize("hidden_size", [8, 24, 32, 40, 100, 384])
def test_the_three_mlps_hold_equally_many_parameters(hidden_size):
    sizes = {counts.parameters(ModelConfig(hidden_size=hidden_size, num_heads=2, mlp=mlp))["mlp"] for mlp in MLPS}
    assert len(sizes) == 1


@pytest.mark.parametrize("mlp,kv_heads,tie", [("swiglu", 4, True), ("gelu", 2, False), ("relu", 1, True)])
def test_flops_equal_the_products_torch_counts(mlp, kv_heads, tie):
    config = config_of("rmsnorm", "pre", mlp, "rope", kv_heads, tie)
    model, ids = TinyLM(config), torch.zeros(1, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids)
    products = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    # Attention by brute force: for every query, one product of Dh with each visible key and one with each visible value.
    attention = sum(
        2 * 2 * config.head_dim for _ in range(3) for _ in range(4) for query in range(16) for _ in range(query + 1)
    )
    assert counts.forward_flops(config, 16) == products + attention


def test_training_flops_are_three_forwards_of_every_window():
    model, train = ModelConfig(), TrainConfig(max_steps=7, warmup_steps=1, batch_size=3, grad_accum=2)
    assert counts.train_flops(model, train) == 3 * counts.forward_flops(model, 128) * 7 * 6
    assert counts.train_flops_per_token(model, 128) * 128 == 3 * counts.forward_flops(model, 128)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_cache_bytes_equal_the_cache(kv_heads):
    config = config_of("rmsnorm", "pre", "swiglu", "rope", kv_heads, True)
    cache = KVCache(config, batch_size=5)
    assert counts.kv_cache_bytes(config, 5, config.max_seq_len) == cache.keys.nbytes + cache.values.nbytes
