"""Configs by meaning: nothing wrong gets in, nothing right is changed, and every complaint says what to do."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys

import pytest

from tinylm.config import DataConfig, GenerateConfig, ModelConfig, TrainConfig
from tinylm.errors import ConfigError

CHANGED = [
    ModelConfig(hidden_size=48, num_heads=6, num_kv_heads=2, mlp="relu", position="none", attention_scale=0.3),
    TrainConfig(
        learning_rate=0.01, schedule="wsd", decay_steps=7, unique_tokens=5000, precision="fp16", loss_scaling=False
    ),
    GenerateConfig(temperature=0.0, top_k=5, top_p=0.5),
    DataConfig(text="shakespeare", tokenizer="char"),
]


@pytest.mark.parametrize("config", CHANGED, ids=lambda c: type(c).__name__)
def test_a_config_survives_dict_json_and_pickle(config):
    kind = type(config)
    assert kind.from_dict(config.to_dict()) == config
    assert kind.from_json(config.to_json()) == config
    assert kind.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == config  # workers are handed configs
    assert config != kind() and hash(config) == hash(kind.from_dict(config.to_dict()))


def test_a_config_cannot_be_changed_only_replaced():
    config = ModelConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 128
    assert config.replace(hidden_size=128).hidden_size == 128 and config.hidden_size == 64


# What is wrong, and what the message must say: the rule, the value received, the way out.
WRONG_MODEL = [
    (dict(hidden_size=30), ["divisible by num_heads", "hidden_size=30, num_heads=4", "num_heads could be"]),
    (dict(num_heads=4, num_kv_heads=3), ["divisible by num_kv_heads", "num_kv_heads=3", "num_kv_heads could be"]),
    (dict(num_heads=2, num_kv_heads=4), ["divisible by num_kv_heads", "num_kv_heads=4", "could be"]),
    (dict(hidden_size=20, num_heads=4), ["must be even", "head_dim=5", "position='learned'"]),
    (dict(hidden_size=15, num_heads=3, position="sinusoidal"), ["must be even", "hidden_size=15", "add 1"]),
    (dict(norm="rms"), ["norm must be one of rmsnorm, layernorm", "'rms'", "perhaps 'rmsnorm'"]),
    (dict(mlp="GELU"), ["mlp must be one of swiglu, gelu, relu", "'GELU'"]),
    (dict(position="alibi"), ["position must be one of rope", "'alibi'"]),
    (dict(norm_position="sandwich"), ["norm_position must be one of pre, post", "'sandwich'"]),
    (dict(init="xavier"), ["init must be one of fixed, scaled", "'xavier'"]),
    (dict(num_layers=0), ["num_layers must be at least 1", "num_layers=0", "positive"]),
    (dict(intermediate_size=0), ["intermediate_size must be at least 1", "leave it out"]),
    (dict(dropout=1.0), ["dropout must be in [0, 1)", "dropout=1.0", "0 turns it off"]),
    (dict(norm_eps=0.0), ["norm_eps must be positive", "norm_eps=0.0"]),
    (dict(hidden_size="64"), ["hidden_size must be of type int", "'64' (str)", "give int"]),
    (dict(hidden_size=64.5), ["hidden_size must be of type int", "64.5 (float)"]),
    (dict(num_layers=True), ["num_layers must be of type int", "True (bool)"]),
    (dict(tie_embeddings=1), ["tie_embeddings must be of type bool", "1 (int)"]),
    (dict(norm=None), ["norm must be of type str", "None (NoneType)"]),
    (dict(init_std=float("nan")), ["init_std must be a finite number", "nan"]),
]
WRONG_TRAIN = [
    (dict(learning_rate=0), ["learning_rate must be positive", "learning_rate=0.0"]),
    (dict(grad_clip=0.0), ["grad_clip must be positive", "grad_clip=0.0"]),
    (dict(beta2=1.0), ["beta2 must be in [0, 1)", "0.9 and 0.95"]),
    (dict(min_lr=1.0), ["min_lr must not exceed learning_rate", "min_lr=1.0, learning_rate=0.003"]),
    (dict(warmup_steps=100, max_steps=100), ["warmup_steps must be smaller than max_steps", "warmup_steps=100"]),
    (dict(weight_decay=-0.1), ["weight_decay must not be negative", "weight_decay=-0.1"]),
    (dict(patience=0), ["patience must be at least 1", "leave it out"]),
    (dict(grad_accum=0), ["grad_accum must be at least 1", "grad_accum=0"]),
    (dict(schedule="linear"), ["schedule must be one of cosine, wsd", "'linear'"]),
    (dict(precision="float32"), ["precision must be one of auto, fp32, bf16, fp16", "'float32'"]),
    (dict(loss_scaling=1), ["loss_scaling must be of type bool", "1 (int)"]),
    (dict(learning_rate=float("inf")), ["learning_rate must be a finite number", "inf"]),
]
WRONG_GENERATE = [
    (dict(temperature=-1), ["temperature must not be negative", "temperature=-1.0", "greedy"]),
    (dict(top_k=0), ["top_k must be at least 1", "None keeps every token"]),
    (dict(top_p=0.0), ["top_p must be in (0, 1]", "top_p=0.0"]),
    (dict(repetition_penalty=0), ["repetition_penalty must be positive", "1 turns it off"]),
    (dict(max_new_tokens=0), ["max_new_tokens must be at least 1", "max_new_tokens=0"]),
]
WRONG = [
    *((ModelConfig, *case) for case in WRONG_MODEL),
    *((TrainConfig, *case) for case in WRONG_TRAIN),
    *((GenerateConfig, *case) for case in WRONG_GENERATE),
    (DataConfig, dict(tokenizer="wordpiece"), ["tokenizer must be one of bpe, unigram, char, byte", "'wordpiece'"]),
]


@pytest.mark.parametrize("kind,values,words", WRONG, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_a_wrong_value_is_refused_with_rule_value_and_way_out(kind, values, words):
    with pytest.raises(ConfigError) as caught:
        kind(**values)
    for word in ["Received: ", "Way out: ", *words]:
        assert word in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args  # and crosses process borders whole


def test_an_unknown_field_is_named_with_its_nearest():
    with pytest.raises(ConfigError, match=r"no field of that name.*hidden_dim=64.*perhaps 'hidden_size' was meant"):
        ModelConfig.from_dict({"hidden_dim": 64})
    with pytest.raises(ConfigError, match="perhaps 'learning_rate'"):
        TrainConfig().replace(learning_rat=0.1)


def test_whole_floats_count_as_integers_and_integers_as_floats():
    config = TrainConfig(max_steps=1e3, learning_rate=1, warmup_steps=0.0, min_lr=0)
    assert config.max_steps == 1000 and type(config.max_steps) is int
    assert config.learning_rate == 1.0 and type(config.learning_rate) is float
    assert config == TrainConfig(max_steps=1000, learning_rate=1.0, warmup_steps=0)


def test_resolving_a_model_fills_in_everything_and_changes_nothing_given():
    config = ModelConfig(hidden_size=96, num_heads=6)
    resolved = config.resolve()
    assert (resolved.num_kv_heads, resolved.intermediate_size, resolved.attention_scale) == (6, 256, 16**-0.5)
    assert None not in resolved.to_dict().values() and resolved.resolve() == resolved
    given = ModelConfig(num_kv_heads=2, intermediate_size=100, attention_scale=1.0)
    assert given.resolve() == given


@pytest.mark.parametrize("hidden_size", [32, 64, 88, 96, 256])
def test_gated_and_plain_mlps_hold_equal_parameters_by_default(hidden_size):
    gated, plain = (ModelConfig(hidden_size=hidden_size, mlp=m).resolve().intermediate_size for m in ("swiglu", "gelu"))
    assert 3 * gated == 2 * plain


def test_resolving_a_training_run_follows_the_model():
    resolved = TrainConfig(max_steps=1000).resolve(ModelConfig(max_seq_len=64))
    assert (resolved.seq_len, resolved.stride, resolved.eval_interval, resolved.decay_steps) == (64, 32, 50, 200)
    tiny = TrainConfig(max_steps=1, warmup_steps=0, seq_len=1).resolve(ModelConfig())
    assert (tiny.seq_len, tiny.stride, tiny.eval_interval, tiny.decay_steps) == (1, 1, 1, 1)
    assert TrainConfig(seq_len=32, stride=32).resolve(ModelConfig()).stride == 32
    with pytest.raises(ConfigError, match=r"may not exceed.*seq_len=256, max_seq_len=128.*lower seq_len"):
        TrainConfig(seq_len=256).resolve(ModelConfig(max_seq_len=128))
    assert TrainConfig(batch_size=4, grad_accum=3).windows_per_step == 12


def test_configs_import_no_torch():
    code = "import sys, tinylm.config, tinylm.counts; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
