"""Inside a model: what is shown is what the model computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tinylm.config import ModelConfig
from tinylm.errors import LabError
from tinylm.inside import look_inside, loss_by_position, position_similarity
from tinylm.model import TinyLM

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
SHAPES = [
    {},
    {"num_kv_heads": 1, "norm": "layernorm"},
    {"position": "learned", "tie_embeddings": False},
    {"norm_position": "post", "position": "sinusoidal"},
    {"position": "none", "dropout": 0.5},
    {"qk_norm": True, "num_kv_heads": 2},
]


def small(**changes):
    shape = {"vocab_size": 20, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "max_seq_len": 8, "init_std": 0.3}
    return TinyLM(ModelConfig(**{**shape, **changes}))


@torch.no_grad()
@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_what_is_seen_is_what_the_model_does(changes):
    model = small(**changes)
    seen = look_inside(model, IDS)
    assert model.training  # as it was
    model.eval()
    ids = torch.tensor([IDS])
    assert torch.allclose(seen.probabilities[-1], model(ids)[0].softmax(-1), atol=1e-5)
    assert seen.attention.shape == (2, 4, 8, 8) and seen.residual.shape == (3, 8, 16)
    assert torch.allclose(seen.attention.sum(-1), torch.ones(2, 4, 8), atol=1e-5)
    assert not seen.attention.triu(1).any()
    # The weights are those that the block used: put to its values, they give its output.
    block, x = model.blocks[0], seen.residual[:1]
    read = block.attention_norm(x) if block.is_pre_norm else x
    part = block.attention
    v = part.v(read).view(1, 8, part.num_kv_heads, part.head_dim).transpose(1, 2)
    v = v.repeat_interleave(part.num_heads // part.num_kv_heads, dim=1)
    mixed = part.out((seen.attention[:1] @ v).transpose(1, 2).reshape(1, 8, 16))
    _, angles = model.embed(ids)
    assert torch.allclose(mixed, part(read, angles), atol=1e-5)


def test_loss_by_position_is_the_models_loss():
    model = small().eval()
    tokens = np.random.default_rng(0).integers(0, 20, 8 * 30 + 1).astype(np.uint16)
    losses = loss_by_position(model, tokens, windows=30)
    windows = torch.from_numpy(tokens[:-1].astype(np.int64)).view(30, 8)
    targets = torch.from_numpy(tokens[1:].astype(np.int64)).view(30, 8)
    with torch.no_grad():
        assert losses.mean() == pytest.approx(model.loss(windows, targets).item(), abs=1e-5)
        each = F.cross_entropy(model(windows).transpose(1, 2), targets, reduction="none").numpy()
    assert np.allclose(losses, each, atol=1e-5)
    assert np.allclose(loss_by_position(model, tokens, windows=3), each[[0, 14, 29]], atol=1e-5)  # spread evenly


def test_positions_are_alike_as_their_kind_has_it():
    rope = position_similarity(small())
    assert np.allclose(np.diag(rope), 1) and np.allclose(rope[1:, 1:], rope[:-1, :-1])  # distance alone counts
    assert rope[0, 1] < 1
    assert (position_similarity(small(position="none")) == 1).all()
    for kind in ("learned", "sinusoidal"):
        alike = position_similarity(small(position=kind))
        assert np.allclose(np.diag(alike), 1, atol=1e-5) and np.allclose(alike, alike.T, atol=1e-5)


def test_too_long_a_text_is_refused():
    with pytest.raises(LabError, match="max_seq_len"):
        look_inside(small(), list(range(9)))
