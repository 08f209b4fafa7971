"""Stacks: runs trained together are the runs alone, to the last bit, whatever their neighbours do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tinylm import backend
from tinylm.config import ModelConfig, TrainConfig
from tinylm.model import TinyLM
from tinylm.stack import Lane, Stack, Update
from tinylm.train import Trainer, train_together

V, T = 48, 16
MODEL = ModelConfig(vocab_size=V, hidden_size=16, num_layers=2, num_heads=4, max_seq_len=T, init="scaled")
TRAIN = TrainConfig(
    max_steps=30, warmup_steps=3, batch_size=2, eval_interval=10, eval_tokens=256, stride=T, threads=1, compile=False
)
SWITCHES = {
    "as usual": {},
    "layernorm": dict(norm="layernorm"),
    "post-norm": dict(norm_position="post"),
    "gelu": dict(mlp="gelu"),
    "relu": dict(mlp="relu"),
    "relu2": dict(mlp="relu2"),
    "normed queries and keys": dict(qk_norm=True, num_kv_heads=2),
    "learned": dict(position="learned"),
    "sinusoidal": dict(position="sinusoidal"),
    "none": dict(position="none"),
    "grouped queries": dict(num_kv_heads=2),
    "one kv head": dict(num_kv_heads=1),
    "untied": dict(tie_embeddings=False),
}
TEXT = np.random.RandomState(0).randint(0, V, 6000).astype(np.uint16)
TEXT[1::2] = TEXT[::2] * 7 % V  # every other token follows from the one before


def trainer(model: ModelConfig = MODEL, stacked: bool = True, folder=None, **changes) -> Trainer:
    config = TRAIN.replace(**changes)
    arithmetic = backend.resolve(config, model, in_stacks=stacked)
    assert arithmetic["stacked"] is stacked
    return Trainer(model, config, TEXT[:5000], TEXT[5000:], checkpoint_dir=folder, arithmetic=arithmetic)


def numbers(result) -> dict:
    values = {k: v for k, v in result.to_dict().items() if k not in ("seconds", "tokens_per_second")}
    return {**values, "curve": [{k: v for k, v in point.items() if k != "seconds"} for point in values["curve"]]}


RUNS = [dict(seed=0, learning_rate=3e-3), dict(seed=1, learning_rate=1e-2), dict(seed=2, learning_rate=1e-2, beta2=0.9)]


@pytest.mark.parametrize("switch", SWITCHES)
def test_runs_in_a_stack_are_the_runs_alone(switch):
    model = MODEL.replace(**SWITCHES[switch])
    together = train_together([trainer(model, **run) for run in RUNS])
    for run, result in zip(RUNS, together, strict=True):
        plain = trainer(model, stacked=False, **run).run()
        for a, b in zip(result.curve, plain.curve, strict=True):
            assert (a["train_loss"], a["val_loss"]) == pytest.approx((b["train_loss"], b["val_loss"]), abs=1e-5)
    assert len({result.val_loss for result in together}) == len(RUNS)
    alone = trainer(model, **RUNS[1]).run()  # a stack of one, and of others
    assert numbers(alone) == numbers(together[1])
    assert numbers(train_together([trainer(model, **RUNS[1]), trainer(model, **RUNS[0])])[0]) == numbers(alone)


def test_in_bf16_a_run_in_a_stack_is_the_run_alone_too():
    low = dict(precision="bf16", max_steps=8, eval_interval=4)  # few steps: emulated, these products are slow
    together = train_together([trainer(**low, **run) for run in RUNS])
    for run, result in zip(RUNS, together, strict=True):
        apart = trainer(stacked=False, **low, **run).run()
        assert result.val_loss == pytest.approx(apart.val_loss, abs=5e-3)  # rounding at other places
    assert numbers(trainer(**low, **RUNS[1]).run()) == numbers(together[1])
    assert together[0].val_loss != trainer(**{**low, "precision": "fp32"}, **RUNS[0]).run().val_loss


def test_a_run_that_leaves_changes_nothing_for_the_others():
    calm = [numbers(trainer(**run).run()) for run in RUNS[:2]]
    wild = dict(seed=5, learning_rate=1e4, grad_clip=1e9)
    short = dict(seed=6, max_steps=7)
    ended = []
    runs = [wild, RUNS[0], short, RUNS[1]]
    results = train_together([trainer(**run) for run in runs], on_end=lambda _, result: ended.append(result.steps))
    assert [result.status for result in results] == ["diverged", "finished", "finished", "finished"]
    assert [numbers(results[1]), numbers(results[3])] == calm
    assert ended == sorted(ended) and results[2].steps == 7


def test_a_gradient_that_is_not_finite_stays_in_its_lane(monkeypatch):
    calm = numbers(trainer(**RUNS[0]).run())
    gradients, steps = Stack.gradients, []

    def spoiled(self, *args):
        losses, parts = gradients(self, *args)
        steps.append(len(self.lanes))
        if len(steps) == 5:
            parts[0, 3] = math.nan
        return losses, parts

    monkeypatch.setattr(Stack, "gradients", spoiled)
    bad, good = trainer(**RUNS[1]), trainer(**RUNS[0])
    results = train_together([bad, good])
    assert [r.status for r in results] == ["diverged", "finished"] and results[0].steps == 4
    assert numbers(results[1]) == calm and bool(torch.isfinite(bad.lane.weights).all())
    assert steps[:5] == [2] * 5 and set(steps[5:]) == {1}


def test_runs_that_stopped_at_different_steps_go_on_together_bit_for_bit(tmp_path):
    whole = [numbers(trainer(**run).run()) for run in RUNS[:2]]
    for index, (run, stop_at) in enumerate(zip(RUNS, (6, 13), strict=False)):
        part = trainer(folder=tmp_path / str(index), **run)
        after_step = part._after_step
        part._after_step = lambda p=part, a=after_step, s=stop_at: (a(), p.request_stop() if p.step == s else None)
        assert part.run().status == "stopped" and part.step == stop_at
    again = [trainer(folder=tmp_path / str(index), **run) for index, run in enumerate(RUNS[:2])]
    assert [part.step for part in again] == [6, 13]
    assert [numbers(result) for result in train_together(again)] == whole


@pytest.mark.parametrize("rows", [1, 3])
def test_updates_are_those_of_torchs_adamw(rows):
    models = [TinyLM(MODEL, seed=seed) for seed in range(rows)]
    twins = [TinyLM(MODEL, seed=seed) for seed in range(rows)]
    plain = {"device": "cpu", "precision": "fp32", "compile": False, "query_blocks": 1, "stacked": rows > 1}
    stack = Stack([Lane(model) for model in models], plain)
    optimizers = []
    for row, twin in enumerate(twins):
        matrices, rest = ([p for p in twin.parameters() if (p.ndim > 1) is kind] for kind in (True, False))
        groups = [{"params": matrices, "weight_decay": 0.1 * (row + 1)}, {"params": rest, "weight_decay": 0.0}]
        optimizers.append(torch.optim.AdamW(groups, lr=1e-2 / (row + 1), betas=(0.9, 0.95 + 0.01 * row), eps=1e-8))
    for _ in range(4):
        ids = torch.randint(0, V, (rows, 2, T + 1))
        losses, gradients = stack.gradients(ids[..., :-1], ids[..., 1:])
        updates = [Update(0.5, 1e-2 / (row + 1), 0.1 * (row + 1), 0.9, 0.95 + 0.01 * row) for row in range(rows)]
        for row, (twin, optimizer) in enumerate(zip(twins, optimizers, strict=True)):
            loss = twin.loss(ids[row, :, :-1], ids[row, :, 1:])
            (0.5 * loss).backward()
            assert float(losses[row]) == pytest.approx(loss.item(), abs=1e-6)
            optimizer.step()
            optimizer.zero_grad()
        stack.update(gradients, updates)
    for model, twin in zip(models, twins, strict=True):
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-6)


def test_only_a_stack_holds_more_than_one():
    plain = {"device": "cpu", "precision": "fp32", "compile": False, "query_blocks": 1, "stacked": False}
    with pytest.raises(ValueError, match="one lane"):
        Stack([Lane(TinyLM(MODEL)), Lane(TinyLM(MODEL))], plain)


@pytest.mark.slow
@pytest.mark.skipif(backend.cpp_compiler() is None, reason="no C++ compiler here")
@pytest.mark.parametrize("switches", [["as usual"], ["layernorm", "gelu", "learned", "grouped queries", "untied"]])
def test_the_fast_path_is_the_plain_one_within_rounding(switches):
    model = MODEL.replace(**{name: value for switch in switches for name, value in SWITCHES[switch].items()})
    plain = [trainer(model, **run).run() for run in RUNS]
    before = sum(torch._dynamo.utils.counters["stats"].values())
    fast = train_together([trainer(model, compile=True, **run) for run in RUNS])
    assert sum(torch._dynamo.utils.counters["stats"].values()) > before  # something was compiled
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    lower = train_together([trainer(model, compile=True, **run) for run in RUNS[:2]])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # one code for stacks of any height
    single = trainer(model, stacked=False, compile=True, **RUNS[0]).run()
    blocked = trainer(model, stacked=False, compile=True, **RUNS[0])
    blocked.arithmetic = {**blocked.arithmetic, "query_blocks": 2}
    for a, b in zip([*fast, *lower, single, blocked.run()], [*plain, *plain[:2], plain[0], plain[0]], strict=True):
        assert (a.train_loss, a.val_loss) == pytest.approx((b.train_loss, b.val_loss), abs=1e-3)
    assert [numbers(r) for r in lower] == [numbers(r) for r in fast[:2]]
