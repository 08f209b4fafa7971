"""The model by meaning: causality, caches, switches, initialisation; and against independent code, torch and transformers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from tinylm.attention import KVCache
from tinylm.config import MLPS, NORM_POSITIONS, NORMS, POSITIONS, ModelConfig
from tinylm.errors import LabError
from tinylm.model import TinyLM
from tinylm.positional import RoPE, SinusoidalPosition, embedding_std, rotate

BASE = ModelConfig(
    vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=16, init="scaled"
)
ABLATIONS = {
    "layernorm": dict(norm="layernorm"),
    "post-norm": dict(norm_position="post"),
    "gelu": dict(mlp="gelu"),
    "relu": dict(mlp="relu"),
    "relu2": dict(mlp="relu2"),
    "qk_norm": dict(qk_norm=True),
    "learned": dict(position="learned"),
    "sinusoidal": dict(position="sinusoidal"),
    "no position": dict(position="none"),
    "multi-head": dict(num_kv_heads=4),
    "multi-query": dict(num_kv_heads=1),
    "untied": dict(tie_embeddings=False),
    "rope_theta": dict(rope_theta=100.0),
    "attention_scale": dict(attention_scale=0.2),
    "init_std": dict(init_std=0.03),
    "fixed init": dict(init="fixed"),
    "norm_eps": dict(norm_eps=1e-2),
    "intermediate_size": dict(intermediate_size=96),
}


def tokens(batch=2, length=12, vocab_size=61, seed=0):
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("change", ABLATIONS.values(), ids=ABLATIONS.keys())
def test_every_switch_and_knob_changes_the_logits(change):
    changed = TinyLM(BASE.replace(**change), seed=1)
    base = TinyLM(BASE, seed=1)
    shared = {n: p for n, p in base.state_dict().items() if n in changed.state_dict()}
    if "init" not in "".join(change):  # same weights wherever shapes agree: the difference is the switch, not the draw
        changed.load_state_dict(
            {n: p for n, p in shared.items() if changed.state_dict()[n].shape == p.shape}, strict=False
        )
    assert (changed(tokens()) - base(tokens())).abs().max() > 1e-4


@pytest.mark.parametrize("norm,norm_position,position", list(itertools.product(NORMS, NORM_POSITIONS, POSITIONS)))
def test_no_logit_depends_on_a_later_token(norm, norm_position, position):
    model = TinyLM(BASE.replace(norm=norm, norm_position=norm_position, position=position))
    embedded: list[torch.Tensor] = []

    def keep(module, args, output):
        embedded.append(output.requires_grad_())

    model.embedding.register_forward_hook(keep)
    logits = model(tokens(batch=1))
    for t in range(12):
        (gradient,) = torch.autograd.grad(logits[0, t].sum(), embedded[0], retain_graph=True)
        reach = gradient[0].abs().sum(-1)
        assert (reach[: t + 1] > 0).all() and (reach[t + 1 :] == 0).all()


@pytest.mark.parametrize(
    "position,kv_heads,norm_position", list(itertools.product(POSITIONS, (4, 2, 1), NORM_POSITIONS))
)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_cached_logits_equal_uncached(position, kv_heads, norm_position, qk_norm):
    config = BASE.replace(position=position, num_kv_heads=kv_heads, norm_position=norm_position, qk_norm=qk_norm)
    model, ids = TinyLM(config).eval(), tokens()
    cache = KVCache(config, batch_size=2)
    pieces = [model(ids[:, :5], cache), model(ids[:, 5:8], cache)]
    pieces += [model(ids[:, t : t + 1], cache) for t in range(8, 12)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("position", POSITIONS)
def test_padded_rows_give_what_they_give_alone(position):
    config = BASE.replace(position=position)
    model, ids = TinyLM(config).eval(), tokens(batch=1)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids[:, :9]], dim=1)
    both = torch.cat([padded, tokens(batch=1, seed=2)])
    cache = KVCache(config, batch_size=2, padding=torch.tensor([3, 0]))
    logits = torch.cat([model(both[:, :10], cache), model(both[:, 10:11], cache), model(both[:, 11:], cache)], dim=1)
    torch.testing.assert_close(logits[:1, 3:], model(ids[:, :9]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[1:], model(both[1:]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("position", ["rope", "none"])
def test_the_ring_is_attention_over_the_last_max_seq_len_tokens(position):
    config = BASE.replace(position=position, max_seq_len=8)
    model, ids = TinyLM(config).eval(), tokens(length=20)
    cache = KVCache(config, batch_size=2)
    ringed = [model(ids[:, :6], cache)] + [model(ids[:, t : t + 1], cache) for t in range(6, 20)]

    def banded(q, k, v, **options):
        t = torch.arange(q.shape[2])
        near = (t[:, None] >= t) & (t[:, None] - t < 8)
        return attention(q, k, v, attn_mask=near, scale=options["scale"])

    attention = F.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", banded)
        expected = model(ids)
    torch.testing.assert_close(torch.cat(ringed, dim=1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
def test_a_full_cache_of_tied_positions_is_an_error_in_words(position):
    config = BASE.replace(position=position, max_seq_len=8)
    cache = KVCache(config, batch_size=2)
    model = TinyLM(config)
    model(tokens(length=8), cache)
    with pytest.raises(LabError, match="max_seq_len=8"):
        model(tokens(length=1), cache)


def test_learned_positions_end_with_their_table():
    with pytest.raises(LabError, match="20 tokens, max_seq_len=16"):
        TinyLM(BASE.replace(position="learned"))(tokens(length=20))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("init,slack", [("fixed", 0.1), ("scaled", 0.4)])
@pytest.mark.parametrize("hidden_size", [32, 128])
def test_initial_loss_is_near_log_vocabulary(hidden_size, init, slack, tie):
    config = BASE.replace(hidden_size=hidden_size, vocab_size=512, init=init, tie_embeddings=tie)
    ids, targets = tokens(8, 16, 512), tokens(8, 16, 512, seed=1)
    assert abs(TinyLM(config).loss(ids, targets).item() - math.log(512)) < slack


@pytest.mark.parametrize("hidden_size", [32, 64, 128])
def test_scaled_init_keeps_the_spread_of_every_matrix_output(hidden_size):
    model = TinyLM(BASE.replace(hidden_size=hidden_size, num_heads=4, num_layers=1))
    x = torch.randn(400, hidden_size, generator=torch.Generator().manual_seed(0))
    assert model.blocks[0].mlp.up(x).std().item() == pytest.approx(0.02 * 32, rel=0.08)


def test_one_seed_gives_one_model_and_touches_no_other_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = TinyLM(BASE, seed=3), TinyLM(BASE, seed=3), TinyLM(BASE, seed=4)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.embedding.weight, other.embedding.weight)


@pytest.mark.parametrize("norm_position", NORM_POSITIONS)
def test_one_batch_overfits(norm_position):
    model = TinyLM(BASE.replace(norm_position=norm_position))
    ids = tokens(4, 16)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        optimiser.zero_grad()
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.1


def test_dropout_acts_in_training_only():
    model = TinyLM(BASE.replace(dropout=0.5))
    assert not torch.equal(model(tokens()), model(tokens()))
    model.eval()
    assert torch.equal(model(tokens()), model(tokens()))


# Against a few lines of independent reference, one for each part. -----------------------------------------------------------


def reference_norm(x, module, eps=1e-6):
    if not hasattr(module, "bias"):
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * module.weight
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * module.weight + module.bias


def reference_mlp(x, module, kind):
    if kind == "swiglu":
        gate = x @ module.gate.weight.T
        return (gate * torch.sigmoid(gate) * (x @ module.up.weight.T)) @ module.down.weight.T
    up = x @ module.up.weight.T
    tanh_form = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    activated = {"relu": up.clamp(min=0), "relu2": up.clamp(min=0) ** 2, "gelu": tanh_form}[kind]
    return activated @ module.down.weight.T


def reference_attention(x, module, config, turn):
    """One head, one query, one key at a time."""
    batch, length, _ = x.shape
    size, group = config.head_dim, config.num_heads // config.num_kv_heads
    of_q, of_k = (
        (lambda y, norm=norm: reference_norm(y, norm)) if config.qk_norm else (lambda y: y)
        for norm in (module.q_norm, module.k_norm)
    )
    out = torch.zeros(batch, length, config.hidden_size)
    for b, h, t in itertools.product(range(batch), range(config.num_heads), range(length)):
        kv = h // group
        q = turn(of_q(x[b, t] @ module.q.weight[h * size : (h + 1) * size].T), t)
        keys = [turn(of_k(x[b, s] @ module.k.weight[kv * size : (kv + 1) * size].T), s) for s in range(t + 1)]
        weights = torch.softmax(torch.stack([q @ k for k in keys]) * config.attention_scale, dim=0)
        values = x[b, : t + 1] @ module.v.weight[kv * size : (kv + 1) * size].T
        out[b, t, h * size : (h + 1) * size] = weights @ values
    return out @ module.out.weight.T


def reference_turn(config):
    """RoPE as multiplication of complex numbers (channel i paired with channel i + Dh / 2)."""

    def turn(x, position):
        half = config.head_dim // 2
        if config.position != "rope":
            return x
        angle = position * config.rope_theta ** (-torch.arange(half, dtype=torch.float64) * 2 / config.head_dim)
        turned = torch.complex(x[:half].double(), x[half:].double()) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag]).float()

    return turn


def reference_logits(model, ids):
    config = model.config
    x = model.embedding.weight[ids]
    if config.position == "learned":
        x = x + model.position.weight[: ids.shape[1]]
    if config.position == "sinusoidal":
        table = torch.tensor(
            [
                [
                    (math.sin if i % 2 == 0 else math.cos)(p / 10000 ** ((i - i % 2) / config.hidden_size))
                    for i in range(config.hidden_size)
                ]
                for p in range(ids.shape[1])
            ]
        )
        x = x + table * embedding_std(config) * math.sqrt(2)
    for block in model.blocks:

        def mix(y, block=block):
            return reference_attention(y, block.attention, config, reference_turn(config))

        def feed(y, block=block):
            return reference_mlp(y, block.mlp, config.mlp)

        if config.norm_position == "pre":
            x = x + mix(reference_norm(x, block.attention_norm))
            x = x + feed(reference_norm(x, block.mlp_norm))
        else:
            x = reference_norm(x + mix(x), block.attention_norm)
            x = reference_norm(x + feed(x), block.mlp_norm)
    if config.norm_position == "pre":
        x = reference_norm(x, model.norm)
    return x @ (model.embedding.weight if config.tie_embeddings else model.head.weight).T


@pytest.mark.parametrize("norm,norm_position,mlp", list(itertools.product(NORMS, NORM_POSITIONS, MLPS)))
@pytest.mark.parametrize(
    "position,kv_heads,tie", [("rope", 2, True), ("learned", 4, False), ("sinusoidal", 1, True), ("none", 2, False)]
)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_logits_equal_the_reference_for_every_switch(norm, norm_position, mlp, position, kv_heads, tie, qk_norm):
    config = BASE.replace(
        norm=norm, norm_position=norm_position, mlp=mlp, position=position, num_kv_heads=kv_heads, tie_embeddings=tie,
        qk_norm=qk_norm, init_std=0.05,
    )  # fmt: skip
    model, ids = TinyLM(config), tokens(batch=1, length=6)
    with torch.no_grad():
        for parameter in model.parameters():  # norms away from one and zero, so that they are tested too
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        torch.testing.assert_close(model(ids), reference_logits(model, ids), atol=1e-5, rtol=1e-4)


def test_rope_scores_depend_on_distance_alone():
    rope = RoPE(BASE.replace(max_seq_len=64).resolve())
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def score(query_position, key_position):
        turned = [rotate(x, *rope.angles(torch.tensor([p]))) for x, p in ((q, query_position), (k, key_position))]
        return float((turned[0] * turned[1]).sum())

    assert score(5, 2) == pytest.approx(score(53, 50), abs=1e-5)
    assert abs(score(5, 2) - score(5, 3)) > 1e-3


def test_the_sinusoidal_table_has_the_spread_of_the_embedding():
    table = SinusoidalPosition(BASE.resolve()).embed(torch.arange(16))
    assert float(table.pow(2).mean().sqrt()) == pytest.approx(embedding_std(BASE), rel=1e-5)


# Against transformers, family by family. ------------------------------------------------------------------------------------


def assert_same_logits_and_gradients(model, other, pairs, ids):
    """pairs: (ours, theirs, function that brings their gradient into our layout)."""
    logits, expected = model(ids), other(ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)) / logits.numel()
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    for ours, theirs, layout in pairs:
        torch.testing.assert_close(ours.grad, layout(theirs.grad), atol=1e-5, rtol=1e-5)


def as_it_is(x):
    return x


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_parity_with_transformers_llama(kv_heads, tie):
    transformers = pytest.importorskip("transformers")
    config = BASE.replace(num_kv_heads=kv_heads, tie_embeddings=tie, init_std=0.05).resolve()
    other = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=kv_heads,
            intermediate_size=config.intermediate_size, max_position_embeddings=16, rms_norm_eps=1e-6,
            tie_word_embeddings=tie, rope_theta=10000.0, attention_bias=False, mlp_bias=False,
        )
    )  # fmt: skip
    model = TinyLM(config)
    pairs = [(model.embedding.weight, other.model.embed_tokens.weight), (model.norm.weight, other.model.norm.weight)]
    if not tie:
        pairs.append((model.head.weight, other.lm_head.weight))
    for ours, theirs in zip(model.blocks, other.model.layers, strict=True):
        pairs += [
            (ours.attention_norm.weight, theirs.input_layernorm.weight),
            (ours.mlp_norm.weight, theirs.post_attention_layernorm.weight),
            *((getattr(ours.attention, n), getattr(theirs.self_attn, f"{n}_proj")) for n in "qkv"),
            (ours.attention.out, theirs.self_attn.o_proj),
            *((getattr(ours.mlp, n), getattr(theirs.mlp, f"{n}_proj")) for n in ("gate", "up", "down")),
        ]
    pairs = [tuple(getattr(m, "weight", m) for m in pair) for pair in pairs]
    with torch.no_grad():
        for ours, theirs in pairs:
            theirs.copy_(ours)
    assert sum(p.numel() for p in other.parameters()) == sum(p.numel() for p in model.parameters())
    assert_same_logits_and_gradients(model, other, [(a, b, as_it_is) for a, b in pairs], tokens())


def test_parity_with_transformers_gpt2():
    transformers = pytest.importorskip("transformers")
    config = BASE.replace(
        norm="layernorm",
        mlp="gelu",
        position="learned",
        num_kv_heads=4,
        intermediate_size=128,
        norm_eps=1e-5,
        init_std=0.05,
    )
    other = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=16, activation_function="gelu_new",
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, layer_norm_epsilon=1e-5,
        )
    )  # fmt: skip
    model = TinyLM(config)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith("bias") and "ln_" not in name:
                parameter.zero_()
    pairs = [
        (model.embedding.weight, other.transformer.wte.weight, as_it_is),
        (model.position.weight, other.transformer.wpe.weight, as_it_is),
        (model.norm.weight, other.transformer.ln_f.weight, as_it_is),
        (model.norm.bias, other.transformer.ln_f.bias, as_it_is),
    ]
    fused = []
    for ours, theirs in zip(model.blocks, other.transformer.h, strict=True):
        for norm, ln in ((ours.attention_norm, theirs.ln_1), (ours.mlp_norm, theirs.ln_2)):
            pairs += [(norm.weight, ln.weight, as_it_is), (norm.bias, ln.bias, as_it_is)]
        for linear, conv in (
            (ours.attention.out, theirs.attn.c_proj),
            (ours.mlp.up, theirs.mlp.c_fc),
            (ours.mlp.down, theirs.mlp.c_proj),
        ):
            pairs.append((linear.weight, conv.weight, lambda g: g.T))  # GPT-2 stores its matrices as (in, out)
        fused += [
            (getattr(ours.attention, n).weight, theirs.attn.c_attn.weight, lambda g, i=i: g.T[32 * i : 32 * (i + 1)])
            for i, n in enumerate("qkv")
        ]
    with torch.no_grad():
        for ours, theirs, layout in pairs + fused:
            layout(theirs).copy_(ours)
    assert_same_logits_and_gradients(model, other, pairs + fused, tokens())
