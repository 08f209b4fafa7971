"""Training by meaning: windows, schedule, optimiser against plain torch, evaluation apart, exact resume."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import signal
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tinylm import stack as stack_module
from tinylm import train as train_module
from tinylm.config import ModelConfig, TrainConfig
from tinylm.errors import ConfigError, DamagedFileError, LabError, TextError
from tinylm.model import TinyLM
from tinylm.tokenizer import Tokenizer
from tinylm.train import TextDataset, Trainer, evaluate, learning_rate_at, progress_bar

V, T = 32, 16
MODEL = ModelConfig(vocab_size=V, hidden_size=16, num_layers=2, num_heads=2, max_seq_len=T, init="scaled")
TRAIN = TrainConfig(
    learning_rate=0.01,
    batch_size=4,
    max_steps=20,
    warmup_steps=1,
    eval_interval=5,
    eval_tokens=512,
    stride=T,
    threads=1,
)


def language(count: int, seed: int) -> np.ndarray:
    """Tokens of a small Markov chain: something to learn, and never the same twice."""
    random = np.random.RandomState(seed)
    jumps, tokens = random.randint(0, 3, count), np.zeros(count, dtype=np.uint16)
    for place in range(1, count):
        tokens[place] = (tokens[place - 1] * 5 + jumps[place] * 3 + 1) % V
    return tokens


TEXT, HELD_OUT = language(4000, 0), language(1000, 1)


def trainer(model=None, text=TEXT, held_out=HELD_OUT, token_bytes=None, checkpoint_dir=None, on_eval=None, **changes):
    model = MODEL if model is None else model
    return Trainer(model, TRAIN.replace(**changes), text, held_out, token_bytes, checkpoint_dir, on_eval=on_eval)


def weights(trained: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trained.model.parameters()])


def optimiser_state(trained: Trainer) -> dict[str, torch.Tensor]:
    return {"first": trained.lane.first, "second": trained.lane.second, "steps": torch.tensor(trained.lane.steps)}


def numbers(result) -> dict:
    """A result without its times."""
    values = {k: v for k, v in result.to_dict().items() if k not in ("seconds", "tokens_per_second")}
    values["curve"] = [{k: v for k, v in point.items() if k != "seconds"} for point in values["curve"]]
    return values


# Windows


@pytest.mark.parametrize("count,stride", [(100, None), (100, 16), (100, 5), (17, 16), (33, 16), (100, 40)])
def test_windows_are_the_text_and_targets_one_token_on(count, stride):
    tokens = np.arange(count, dtype=np.uint16)
    data = TextDataset.from_tokens(tokens, 16, stride)
    step = 8 if stride is None else stride
    for i in range(len(data)):
        inputs, targets = data[i]
        assert inputs.tolist() == list(range(i * step, i * step + 16))
        assert targets.tolist() == list(range(i * step + 1, i * step + 17))
        assert inputs.dtype == targets.dtype == torch.int64
    assert 0 <= count - 17 - (len(data) - 1) * step < step  # no window is missing at the end
    with pytest.raises(IndexError):
        data[len(data)]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process in /proc")
def test_reading_a_whole_map_does_not_hold_it_in_memory(tmp_path):
    def mapped() -> int:
        told = Path("/proc/self/status").read_text()
        return 1024 * sum(int(kilobytes) for kilobytes in re.findall(r"^Rss(?:File|Shmem):\s+(\d+) kB", told, re.M))

    count, window = 24 * 2**20, 2048
    (np.arange(count, dtype=np.uint32) % 60000).astype(np.uint16).tofile(tmp_path / "ids")
    data = TextDataset.from_tokens(np.memmap(tmp_path / "ids", dtype=np.uint16, mode="r"), window, stride=window)
    before, most = mapped(), 0
    for start in range(0, len(data), 64):
        inputs, targets = data.batch(np.arange(start, min(start + 64, len(data))))
        assert inputs[0, 0] == start * window % 60000 and targets[-1, -1] == (inputs[-1, -1] + 1) % 60000
        most = max(most, mapped() - before)
    assert 0 < most < count * 2 / 3  # bytes: a third of the map at most


def test_a_batch_is_its_windows_stacked_and_a_map_reads_like_an_array(tmp_path):
    TEXT.tofile(tmp_path / "ids")
    data = TextDataset.from_tokens(np.memmap(tmp_path / "ids", dtype=np.uint16, mode="r"), 16)
    inputs, targets = data.batch(np.array([5, 0, 5, len(data) - 1]))
    expected = [TextDataset.from_tokens(TEXT, 16)[i] for i in (5, 0, 5, len(data) - 1)]
    assert torch.equal(inputs, torch.stack([x for x, _ in expected]))
    assert torch.equal(targets, torch.stack([y for _, y in expected]))


def test_a_file_is_windowed_through_its_tokenizer(tmp_path):
    text = "To be, or not to be: that is the question — whether 'tis nobler.\n" * 3
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    data = TextDataset(tmp_path / "text.txt", Tokenizer.train([text], "byte", 256), max_seq_len=10)
    raw = text.encode("utf-8")
    assert data.stride == 5 and len(data) == (len(raw) - 11) // 5 + 1
    assert bytes(data[3][0].tolist()) == raw[15:25] and bytes(data[3][1].tolist()) == raw[16:26]


def test_a_text_shorter_than_a_window_is_refused_with_both_numbers():
    with pytest.raises(TextError, match=r"16 tokens for a window of 16.*Way out: give more text, or lower"):
        TextDataset.from_tokens(np.zeros(16, dtype=np.uint16), 16)
    assert len(TextDataset.from_tokens(np.zeros(17, dtype=np.uint16), 16)) == 1
    with pytest.raises(TextError, match="10 tokens for a window of 16"):
        trainer(held_out=HELD_OUT[:10])
    with pytest.raises(ConfigError, match="stride must be at least 1"):
        TextDataset.from_tokens(TEXT, 16, 0)


@pytest.mark.parametrize("stride", [3, 8, 16, 20])
def test_covered_counts_distinct_targets(stride):
    data = TextDataset.from_tokens(np.arange(300, dtype=np.uint16), 16, stride)
    for seed in range(5):
        chosen = np.random.RandomState(seed).permutation(len(data))[: 1 + 3 * seed]
        assert data.covered(chosen) == len({int(t) for i in chosen for t in data[int(i)][1]})
    assert data.covered(np.array([], dtype=int)) == 0


@pytest.mark.parametrize("stride", [4, 8, 16])
def test_subsets_hold_the_tokens_asked_for_and_lie_inside_each_other(stride):
    data = TextDataset.from_tokens(TEXT, 16, stride)
    before: set[int] = set()
    for unique in (1, 16, 17, 500, 2000, 3999):
        chosen = data.subset(unique)
        assert before <= set(chosen)
        before = set(chosen)
        assert data.covered(chosen) >= min(unique, data.covered(np.arange(len(data))))
        if stride == 16:
            assert len(chosen) == min(math.ceil(unique / 16), len(data))
        else:
            assert data.covered(chosen) < unique + 16  # the last window was needed
    assert list(data.subset(None)) == list(data.subset(3999)) == list(range(len(data)))
    with pytest.raises(TextError, match=r"unique_tokens=4000, the text has 3999 targets.*Way out"):
        data.subset(4000)


# Order


@pytest.mark.parametrize("whole", [train_module.SHUFFLED_WHOLE, 0], ids=["shuffled whole", "drawn in parts"])
@pytest.mark.parametrize("changes", [{}, {"batch_size": 3}, {"unique_tokens": 30}, {"batch_size": 700}])
def test_the_stream_of_windows_is_whole_epochs_each_in_an_order_of_its_own(changes, whole, monkeypatch):
    monkeypatch.setattr(train_module, "SHUFFLED_WHOLE", whole)
    run = trainer(**changes)
    count = len(run.windows)
    stream = np.concatenate([run._windows_at(step) for step in range(-(-3 * count // run.config.batch_size))])
    epochs = [tuple(stream[e * count : (e + 1) * count]) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(run.windows)
    if count > 10:
        assert len(set(epochs)) == 3


@pytest.mark.parametrize("count", [1, 2, 3, 1000, 4096, 65_537])
def test_an_order_drawn_in_parts_is_a_permutation_like_one_drawn_by_chance(count, monkeypatch):
    monkeypatch.setattr(train_module, "SHUFFLED_WHOLE", 0)
    monkeypatch.setattr(train_module._Permutation, "AT_ONCE", 1000)
    order = train_module._shuffle(count, "order", 3, 7)
    whole = order[:]
    assert len(order) == count and np.array_equal(np.sort(whole), np.arange(count))
    for part in (slice(0, 5), slice(count // 2, None), slice(count - 1, count + 9), slice(0, 0)):
        assert np.array_equal(order[part], whole[part])
    if count < 1000:
        return
    other = train_module._shuffle(count, "order", 4, 7)[:]
    for pair in ((whole, other), (whole, np.arange(count)), (whole[1:], whole[:-1])):
        assert abs(np.corrcoef(*pair)[0, 1]) < 4 / count**0.5
        assert (pair[0] == pair[1]).sum() < 9  # one on average
    jumps = np.bincount(np.diff(whole) % count * 16 // count, minlength=16)  # any place may follow any other
    assert ((jumps - count / 16) ** 2 / (count / 16)).sum() < 44  # chi squared of 15: 1 in 10,000


def test_the_order_of_any_number_of_windows_takes_no_room():
    endless = np.broadcast_to(np.uint8(0), 1 << 44)
    data = TextDataset.from_tokens(endless, 16, 16)
    tracemalloc.start()
    order = train_module._shuffle(len(data), "order", 0, 0)
    assert len(set(order[10**11 : 10**11 + 100].tolist())) == 100 and isinstance(data.subset(None), range)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_targets_are_counted_beyond_four_bytes():
    text = np.broadcast_to(np.uint8(0), 1 << 40)  # takes no room
    data = TextDataset.from_tokens(text, 16, 1 << 20)
    for kind in (np.uint32, np.int64):
        assert data.covered(np.array([0, 1, 1_000_000], dtype=kind)) == 48
        assert TextDataset.from_tokens(text, 16, 5).covered(np.array([0, 1, 1 << 31], dtype=kind)) == 16 + 5 + 16


def test_the_order_depends_on_the_seed_and_on_nothing_else():
    def order(run, steps=6):
        return np.concatenate([run._windows_at(step) for step in range(steps)]).tolist()

    base = order(trainer())
    assert order(trainer(seed=1)) != base
    assert order(trainer(model=MODEL.replace(norm="layernorm", hidden_size=32), learning_rate=0.1, max_steps=9)) == base
    assert order(trainer(batch_size=2, grad_accum=2)) == base  # a step sees the same windows however it is cut
    assert order(trainer(batch_size=8), steps=3) == base
    assert trainer()._windows_at(40).tolist() == [trainer()._windows_at(s).tolist() for s in range(41)][40]
    torch.manual_seed(5)
    np.random.seed(5)
    assert order(trainer()) == base
    assert (trainer(seed=1, unique_tokens=500).windows == trainer(unique_tokens=500).windows).all()


def test_tokens_seen_and_unique_tokens_are_told_apart():
    once = trainer(max_steps=5).run()
    assert (once.tokens_seen, once.unique_tokens) == (5 * 4 * T, 5 * 4 * T)
    assert once.epochs == pytest.approx(20 / 249)
    run = trainer(max_steps=62, stride=T // 2, eval_interval=1000)
    overlapping = run.run()
    assert overlapping.tokens_seen == 62 * 4 * T
    seen = {8 * window + place for step in range(62) for window in run._windows_at(step) for place in range(T)}
    assert overlapping.unique_tokens == len(seen) < overlapping.tokens_seen
    few = trainer(max_steps=10, unique_tokens=100).run()
    assert (few.tokens_seen, few.unique_tokens, few.epochs) == (640, 7 * T, 40 / 7)


# Schedule


def test_warmup_rises_evenly_to_the_learning_rate():
    config = TRAIN.replace(max_steps=100, warmup_steps=9)
    rates = [learning_rate_at(step, config) for step in range(10)]
    assert rates == pytest.approx([0.001 * (step + 1) for step in range(10)])


def test_cosine_is_the_one_of_torch():
    config = TRAIN.replace(max_steps=50, warmup_steps=10, min_lr=0.001)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=0.001)
    for step in range(10, 50):
        assert learning_rate_at(step, config) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr()[0] == pytest.approx(0.001)


@pytest.mark.parametrize("decay_steps", [None, 20])
def test_wsd_stays_and_then_falls_in_a_line(decay_steps):
    config = TRAIN.replace(schedule="wsd", max_steps=100, warmup_steps=10, min_lr=0.002, decay_steps=decay_steps)
    rates = [learning_rate_at(step, config) for step in range(100)]
    assert rates[10:81] == [0.01] * 71
    assert np.diff(rates[80:]) == pytest.approx([-0.008 / 20] * 19)
    assert rates[-1] == pytest.approx(0.002 + 0.008 / 20)


def test_a_single_step_and_no_warmup_have_a_rate():
    assert learning_rate_at(0, TRAIN.replace(max_steps=1, warmup_steps=0)) == 0.01
    assert learning_rate_at(0, TRAIN.replace(max_steps=1, warmup_steps=3)) == pytest.approx(0.0025)


# Steps


def test_training_is_adamw_clipping_and_schedule_as_plain_torch_does_them():
    run = trainer(grad_clip=0.7, weight_decay=0.3, beta2=0.99, max_steps=8)
    twin = TinyLM(MODEL, seed=0)
    decayed = [p for p in twin.parameters() if p.ndim == 2]
    kept = [p for p in twin.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), foreach=False)
    losses = []
    for step in range(8):
        inputs, targets = run.data.batch(run._windows_at(step))
        logits = twin(inputs)
        loss = -F.log_softmax(logits, -1).gather(-1, targets[..., None]).mean()
        optimizer.zero_grad()
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.7) > 0.7  # or clipping would go untested
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, run.config)
        optimizer.step()
        losses.append(loss.item())
    result = run.run()
    assert result.curve[0]["train_loss"] == pytest.approx(np.mean(losses[:5]), abs=1e-5)
    assert result.train_loss == pytest.approx(np.mean(losses[5:]), abs=1e-5)
    reference = torch.cat([p.detach().flatten() for p in twin.parameters()])
    torch.testing.assert_close(weights(run), reference, rtol=0, atol=2e-5)


def test_a_small_gradient_is_not_clipped_and_a_large_one_to_the_norm():
    def first_moment(grad_clip):
        run = trainer(grad_clip=grad_clip, max_steps=1, warmup_steps=0)
        run.run()
        return float(run.lane.first.norm()) / 0.1  # (1 - beta1) times the gradient

    free = first_moment(1e9)
    assert first_moment(free * 2) == free
    assert first_moment(free / 10) == pytest.approx(free / 10, rel=1e-4)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_weight_decay_falls_on_matrices_and_not_on_norms(norm):
    model = MODEL.replace(norm=norm, position="learned")
    plain, decayed = trainer(model, weight_decay=0.0, max_steps=1), trainer(model, weight_decay=0.5, max_steps=1)
    start = dict(TinyLM(model, seed=0).named_parameters())
    plain.run(), decayed.run()
    rate = learning_rate_at(0, decayed.config)
    for name, parameter in plain.model.named_parameters():
        shrunk = rate * 0.5 * start[name] if parameter.ndim == 2 else torch.zeros(())
        torch.testing.assert_close(decayed.model.get_parameter(name), parameter - shrunk, rtol=0, atol=1e-7)


def test_accumulated_micro_steps_equal_one_large_batch():
    large, small = (trainer(batch_size=b, grad_accum=8 // b, max_steps=6) for b in (8, 2))
    one, other = large.run(), small.run()
    assert one.tokens_seen == other.tokens_seen
    for a, b in zip(one.curve, other.curve, strict=True):
        assert (a["train_loss"], a["val_loss"]) == pytest.approx((b["train_loss"], b["val_loss"]), abs=1e-5)
    torch.testing.assert_close(weights(large), weights(small), rtol=0, atol=1e-5)
    assert (
        weights(trainer(batch_size=2, max_steps=6)) - weights(large)
    ).abs().max() > 1e-3  # and a small batch does not


@pytest.mark.parametrize("precision,apart", [("fp32", 0.0), ("bf16", 0.05), ("fp16", 0.05)])
def test_every_precision_learns_the_language(precision, apart):
    result = trainer(precision=precision, max_steps=100, eval_interval=50).run()
    assert result.status == "finished" and result.reason is None
    assert result.val_loss < math.log(V) - 1.5  # the chain's own entropy is ln 3 = 1.1 of ln 32 = 3.47
    full = trainer(max_steps=100, eval_interval=50).run()
    assert abs(result.val_loss - full.val_loss) <= apart and abs(result.train_loss - full.train_loss) <= apart


def test_lower_precision_computes_in_it_and_keeps_its_weights_in_fp32(monkeypatch):
    for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        seen = set()
        linear = torch.nn.functional.linear

        def watched(x, weight, *rest, seen=seen, linear=linear):
            y = linear(x, weight, *rest)
            seen.add(y.dtype)
            return y

        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", watched)
            run = trainer(precision=precision, max_steps=2)
            run.run()
        assert seen == {dtype}
        assert weights(run).dtype == run.lane.first.dtype == torch.float32


def test_dropout_follows_from_seed_and_step_and_reseeds_nothing():
    model = MODEL.replace(dropout=0.3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = trainer(model, max_steps=4)
    one.run()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    other, plain, seeded = trainer(model, max_steps=4), trainer(max_steps=4), trainer(model, max_steps=4, seed=1)
    other.run(), plain.run(), seeded.run()
    assert torch.equal(weights(one), weights(other))
    assert not torch.equal(weights(one), weights(plain)) and not torch.equal(weights(one), weights(seeded))
    masks = {float(_draw(one, step)) for step in range(10)}
    assert len(masks) == 10  # a mask of its own for every step


def _draw(run: Trainer, step: int) -> torch.Tensor:
    run.step = step
    with run._randomness():
        return torch.rand(())


def test_compile_goes_block_by_block_or_whole_and_changes_no_number(monkeypatch):
    compiled = []

    def pretend(function, *args, **kwargs):
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", pretend)
    monkeypatch.setattr(train_module.backend, "cpp_compiler", lambda: "a compiler")
    stack_module._compiled_adamw.cache_clear()
    for layers, codes in (
        (2, 2),
        (4, 6),
    ):  # the whole and the optimizer; four blocks, the head with its loss, the optimizer
        compiled.clear()
        model = MODEL.replace(num_layers=layers)
        run, plain = trainer(model, compile=True, max_steps=3), trainer(model, max_steps=3)
        assert numbers(run.run())["curve"] == numbers(plain.run())["curve"]
        assert len(compiled) == codes
        stack_module._compiled_adamw.cache_clear()
    assert list(run.model.state_dict()) == list(plain.model.state_dict())


# Evaluation


def test_evaluation_is_the_mean_over_all_windows_in_nats_and_in_bits_per_byte():
    model = TinyLM(MODEL.replace(dropout=0.5), seed=1)
    token_bytes = np.arange(V)
    nats, count, size = 0.0, 0, 0
    with torch.no_grad():
        model.eval()
        for start in range(0, len(HELD_OUT) - T, T):
            window = torch.from_numpy(HELD_OUT[start : start + T + 1].astype(np.int64))
            log_probs = model(window[None, :-1])[0].double().log_softmax(-1)
            nats -= float(log_probs.gather(-1, window[1:, None]).sum())
            count += T
            size += int(window[1:].sum())
    model.train()
    state = torch.get_rng_state()
    score = evaluate(model, HELD_OUT, T, 10**9, token_bytes)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert score["scored_tokens"] == count == 992
    assert score["val_loss"] == pytest.approx(nats / count, abs=1e-6)
    assert score["val_bpb"] == pytest.approx(nats / math.log(2) / size, abs=1e-6)
    assert evaluate(model.eval(), HELD_OUT, T, 10**9)["val_bpb"] is None and not model.training


def test_evaluations_score_the_same_tokens_and_fewer_score_a_part_of_them(monkeypatch):
    scored = []
    batch = TextDataset.batch
    monkeypatch.setattr(TextDataset, "batch", lambda self, i: scored.extend(i.tolist()) or batch(self, i))
    model = TinyLM(MODEL)

    def windows(eval_tokens):
        scored.clear()
        assert evaluate(model, HELD_OUT, T, eval_tokens)["scored_tokens"] == len(scored) * T
        return list(scored)

    everything, some = windows(10**9), windows(320)
    assert sorted(everything) == list(range(62)) and some == windows(320) == everything[:20]
    assert len(windows(1)) == 1  # never nothing
    assert max(np.diff(sorted(some))) < 20  # spread over the text, not its beginning


def test_evaluation_leaves_training_as_it_was():
    model = MODEL.replace(dropout=0.2)
    often, seldom = trainer(model, eval_interval=1), trainer(model, eval_interval=1000)
    one, other = often.run(), seldom.run()
    assert torch.equal(weights(often), weights(seldom))
    assert (len(one.curve), len(other.curve)) == (20, 1)
    assert one.val_loss == other.val_loss


def test_the_curve_is_cheap_on_the_way_and_whole_at_the_end():
    points = []
    result = trainer(max_steps=50, eval_interval=20, token_bytes=np.full(V, 2), on_eval=points.append).run()
    assert [p["step"] for p in result.curve] == [20, 40, 50] and points == result.curve
    assert [p["scored_tokens"] for p in result.curve] == [128, 128, 512]
    assert [p["tokens"] for p in result.curve] == [20 * 64, 40 * 64, 50 * 64]
    assert [p["learning_rate"] for p in result.curve] == [
        learning_rate_at(s - 1, TRAIN.replace(max_steps=50)) for s in (20, 40, 50)
    ]
    assert (result.val_loss, result.train_loss) == (result.curve[-1]["val_loss"], result.curve[-1]["train_loss"])
    assert (result.best_val_loss, result.best_step) == (result.val_loss, 50)
    assert result.val_bpb == pytest.approx(result.val_loss / math.log(2) / 2)
    assert 0 < result.curve[0]["seconds"] <= result.seconds and result.tokens_per_second > 0
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()


# Ends


def overfitting(**changes):
    noise = np.random.RandomState(0).randint(0, V, 1000).astype(np.uint16)  # nothing to learn: only to memorise
    return dict(text=noise, held_out=noise[::-1].copy(), max_steps=300, unique_tokens=64, eval_interval=10, **changes)


def test_patience_ends_the_run_and_brings_back_the_best_weights():
    run = trainer(**overfitting(patience=2))
    result = run.run()
    losses = [p["val_loss"] for p in result.curve]
    assert result.status == "early_stopped" and "2 evaluations since step" in result.reason
    assert result.steps == result.best_step + 20 < 300
    assert result.val_loss == result.best_val_loss == min(losses) < losses[-1]
    assert {p["scored_tokens"] for p in result.curve} == {512}  # a choice is made on all of the evaluation set
    assert evaluate(run.model, run.val_tokens, T, 512)["val_loss"] == result.val_loss
    without = trainer(**overfitting()).run()
    assert without.status == "finished"  # far above guessing on the held-out text, and still no divergence
    assert without.val_loss > max(result.val_loss, math.log(V) + 2) and without.train_loss < 1


def test_a_loss_that_is_not_finite_is_a_result_with_its_reason():
    run = trainer()
    with torch.no_grad():
        run.model.norm.weight[0] = float("nan")
    result = run.run()
    assert result.status == "diverged" and "loss nan" in result.reason and "at step 1;" in result.reason
    assert (result.steps, result.val_loss, result.val_bpb, result.curve) == (0, None, None, [])
    assert json.dumps(result.to_dict(), allow_nan=False)


def overflowing(monkeypatch, at=range(10**9)):
    gradients, step = stack_module.Stack.gradients, itertools.count(1)

    def infinite(self, *args):
        losses, parts = gradients(self, *args)
        if next(step) in at:
            parts[:, 7] = float("inf")
        return losses, parts

    monkeypatch.setattr(stack_module.Stack, "gradients", infinite)


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(monkeypatch):
    overflowing(monkeypatch)
    run = trainer()
    before = weights(run).clone()
    result = run.run()
    assert result.status == "diverged" and "gradient norm" in result.reason
    assert torch.equal(weights(run), before)


def test_a_training_loss_far_above_guessing_is_divergence_and_a_poor_start_is_none():
    result = trainer(learning_rate=30.0, grad_clip=1e9, warmup_steps=2, max_steps=200).run()
    assert result.status == "diverged" and "above 5." in result.reason and result.steps < 200
    late = trainer(learning_rate=30.0, grad_clip=1e9, warmup_steps=23, max_steps=200).run()
    assert late.status == "diverged" and late.steps == 25 and late.curve[3]["train_loss"] > math.log(V) + 2
    poor = trainer(MODEL.replace(init="fixed", init_std=3.0, tie_embeddings=False), max_steps=10).run()
    assert poor.curve[0]["train_loss"] > math.log(V) + 2 and poor.status == "finished"


def test_fp16_skips_steps_that_overflow_and_gives_up_only_when_all_do(monkeypatch):
    run = trainer(precision="fp16", max_steps=12)
    run._loss_scale = 2.0**30
    result = run.run()
    assert result.status == "finished" and 1 <= run._loss_scale < 2.0**30
    assert run.lane.steps == 12 - run._skipped < 12
    overflowing(monkeypatch)
    hopeless = trainer(precision="fp16", max_steps=40)
    result = hopeless.run()
    assert result.status == "diverged" and "fp16" in result.reason and result.steps == 17
    assert hopeless.lane.steps == 0


def test_without_loss_scaling_the_scale_stays_at_one_and_overflows_are_skipped_as_patiently(monkeypatch):
    run = trainer(precision="fp16", loss_scaling=False, max_steps=12)
    scaled = trainer(precision="fp16", max_steps=12)
    for _ in range(2000):
        run._rescale(True)
        scaled._rescale(True)
    assert run._loss_scale == 1 and scaled._loss_scale == 2.0**17
    with monkeypatch.context() as patch:
        overflowing(patch, at=(1, 2, 5))
        assert run.run().status == "finished"
        assert (run._loss_scale, run._skipped, run.lane.steps) == (1, 3, 9)
    overflowing(monkeypatch)
    hopeless = trainer(precision="fp16", loss_scaling=False, max_steps=40)
    result = hopeless.run()
    assert result.status == "diverged" and "17 steps in a row" in result.reason and result.steps == 17
    assert hopeless._loss_scale == 1 and hopeless.lane.steps == 0


@pytest.mark.parametrize("precision,learns", [("fp32", True), ("fp16", True), ("unscaled", False)])
def test_gradients_below_what_fp16_holds_are_saved_by_the_loss_scale_alone(precision, learns):
    scaling = {"precision": "fp16", "loss_scaling": False} if precision == "unscaled" else {"precision": precision}
    run = trainer(weight_decay=0.0, **scaling)
    with torch.no_grad():  # so little of the blocks reaches the head that their gradients are below 2^-25
        run.model.norm.weight.fill_(1e-8)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters() if name.startswith("blocks.")}
    run.train_step()
    moved = {name for name, old in before.items() if not torch.equal(run.model.get_parameter(name).detach(), old)}
    matrices = {name for name, old in before.items() if old.dim() > 1}
    assert len(matrices) == 14 and (moved >= matrices if learns else not moved & matrices)


def test_loss_scaling_is_a_matter_of_fp16_alone():
    for precision in ("fp32", "bf16"):
        without, usual = (trainer(precision=precision, max_steps=6, loss_scaling=on) for on in (False, True))
        assert numbers(without.run()) == numbers(usual.run()) and torch.equal(weights(without), weights(usual))


# Stops and resumes

RESUMES = {
    "fp32, dropout, micro-steps": (dict(dropout=0.2), dict(batch_size=2, grad_accum=2)),
    "bf16": (dict(dropout=0.1), dict(precision="bf16")),
    "fp16": ({}, dict(precision="fp16")),
    "fp16 without loss scaling": ({}, dict(precision="fp16", loss_scaling=False)),
    "patience": ({}, overfitting(patience=3)),
    "untied, learned, wsd": (dict(tie_embeddings=False, position="learned"), dict(schedule="wsd", stride=None)),
}


@pytest.mark.parametrize("case", RESUMES)
def test_a_resumed_run_gives_the_bits_of_one_never_interrupted(case, tmp_path):
    model, changes = MODEL.replace(**RESUMES[case][0]), {"eval_interval": 4, **RESUMES[case][1]}
    whole = trainer(model, **changes)
    expected = whole.run()
    parts = 0
    while True:
        torch.manual_seed(parts)
        part = trainer(model, checkpoint_dir=tmp_path, **changes)
        stop_at = part.step + 7
        after_step = part._after_step

        def stopping(part=part, after_step=after_step, stop_at=stop_at):
            after_step()
            if part.step == stop_at:
                part.request_stop()

        part._after_step = stopping
        result = part.run()
        parts += 1
        if result.status != "stopped":
            break
        assert part.step == stop_at and f"after step {stop_at}" in result.reason
    assert parts >= 3
    assert torch.equal(weights(part), weights(whole))
    mine, theirs = optimiser_state(part), optimiser_state(whole)
    assert set(mine) == set(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert numbers(result) == numbers(expected)
    assert (part._loss_scale, part._good_steps) == (whole._loss_scale, whole._good_steps)
    assert result.seconds >= max(p["seconds"] for p in result.curve[:-1])


def test_a_run_killed_without_warning_goes_on_from_its_last_checkpoint(tmp_path):
    class Killed(BaseException):
        pass

    def kill(point):
        if point["step"] == 10:
            raise Killed

    with pytest.raises(Killed):
        trainer(checkpoint_dir=tmp_path, checkpoint_minutes=1e-9, on_eval=kill).run()
    again = trainer(checkpoint_dir=tmp_path)
    assert again.step == 9  # the step that was under way is lost, no more
    assert numbers(again.run()) == numbers(trainer().run())


def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch):
    first = trainer(checkpoint_dir=tmp_path)
    result = first.run()
    monkeypatch.setattr(Trainer, "_batches", lambda self: pytest.fail("trained again"))
    again = trainer(checkpoint_dir=tmp_path)
    assert again.run() == result and first.run() == result
    assert torch.equal(weights(again), weights(first))


def test_no_checkpoint_is_written_in_between_where_it_is_turned_off(tmp_path, monkeypatch):
    saves = []
    monkeypatch.setattr(Trainer, "save", lambda self: saves.append(self.step))
    trainer(checkpoint_dir=tmp_path, checkpoint_minutes=0).run()
    assert saves == [20]
    trainer(checkpoint_dir=tmp_path, checkpoint_minutes=1e-9).run()
    assert saves == [20, *range(1, 21), 20]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    trainer(checkpoint_dir=tmp_path, max_steps=5).run()
    for changes, words in [
        (dict(max_steps=6), "train.max_steps is 5 in the file, 6 was asked for"),
        (dict(model=MODEL.replace(norm="layernorm")), "model.norm is 'rmsnorm' in the file, 'layernorm' was asked"),
        (dict(text=language(4000, 7)), "text.train.sample_sha256"),
        (dict(loss_scaling=False), "train.loss_scaling is None in the file, False was asked"),
        (dict(held_out=HELD_OUT[:900]), "text.validation.tokens is 1000 in the file, 900"),
    ]:
        with pytest.raises(ConfigError, match=words):
            trainer(checkpoint_dir=tmp_path, **{"max_steps": 5, **changes})
    trainer(checkpoint_dir=tmp_path, max_steps=5, checkpoint_minutes=9)  # changes no number
    file = tmp_path / train_module.CHECKPOINT_NAME
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DamagedFileError, match=r"truncated or altered.*delete a damaged checkpoint"):
        trainer(checkpoint_dir=tmp_path, max_steps=5)


def test_saving_needs_a_folder():
    with pytest.raises(LabError, match="checkpoint_dir=None"):
        trainer().save()


def test_ctrl_c_stops_at_a_step_and_leaves_a_checkpoint(tmp_path):
    def interrupt(point):
        if point["step"] == 10:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    result = trainer(checkpoint_dir=tmp_path, on_eval=interrupt).run()
    assert (result.status, result.steps) == ("stopped", 10)
    assert signal.getsignal(signal.SIGINT) is before
    assert numbers(trainer(checkpoint_dir=tmp_path).run()) == numbers(trainer().run())


def test_a_second_ctrl_c_interrupts_at_once():
    def interrupt(point):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trainer(on_eval=interrupt).run()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_thread_stops_a_run_which_then_goes_on_in_place():
    reached, go_on = threading.Event(), threading.Event()

    def wait(point):
        if point["step"] == 5:
            reached.set()
            assert go_on.wait(10)

    run = trainer(on_eval=wait)
    results = []
    thread = threading.Thread(target=lambda: results.append(run.run()))
    thread.start()
    assert reached.wait(10)
    run.request_stop()
    go_on.set()
    thread.join(10)
    assert (results[0].status, results[0].steps, results[0].val_loss) == ("stopped", 5, run.curve[0]["val_loss"])
    assert numbers(run.run()) == numbers(trainer().run())


# Input


def test_tokens_outside_the_vocabulary_are_refused_before_work():
    with pytest.raises(ConfigError, match=r"vocab_size=16, the train tokens go up to 31.*Way out"):
        trainer(model=MODEL.replace(vocab_size=16))
    with pytest.raises(ConfigError, match=r"the validation tokens go up to 40"):
        trainer(held_out=np.full(100, 40))
    with pytest.raises(ConfigError, match=r"31 numbers, vocab_size=32"):
        trainer(token_bytes=np.ones(31, dtype=int))


def test_a_device_that_is_absent_is_refused():
    with pytest.raises(LabError, match="device must be cpu"):
        trainer(device="abacus")


# Progress


def watched(monkeypatch, kernel=False, **environment):
    for name in ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(train_module, "in_kernel", lambda: kernel)
    return train_module._has_screen()


def test_plain_lines_tell_loss_speed_and_time_left(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(train_module.time, "monotonic", lambda: now[0])
    with progress_bar(100, 20, "training", "step") as bar:
        for done in range(21, 101):
            now[0] += 1.0
            bar.update(done, lambda: "loss 3.142, 5,000 tokens/s")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 8 and "\r" not in "".join(lines)
    assert lines[0] == "training 30/100 steps, loss 3.142, 5,000 tokens/s, 1:10 left"
    assert lines[-1] == "training 100/100 steps, loss 3.142, 5,000 tokens/s, 0:00 left"
    assert [train_module._clock(s) for s in (59.6, 3600, 7325)] == ["1:00", "1:00:00", "2:02:05"]


def test_a_terminal_has_a_bar_and_a_run_reports_to_it(monkeypatch, capsys):
    monkeypatch.setattr(train_module, "_has_screen", lambda: True)
    Trainer(MODEL, TRAIN, TEXT, HELD_OUT, progress=True).run()
    shown = capsys.readouterr().err
    assert "\r" in shown and "20/20" in shown and "loss " in shown and " tokens/s" in shown


def test_without_progress_nothing_is_printed(capsys):
    trainer(max_steps=2).run()
    assert capsys.readouterr() == ("", "")


def test_a_notebook_in_a_front_end_has_a_screen_and_one_under_papermill_has_none(monkeypatch, capsys):
    assert not watched(monkeypatch)  # stderr is captured here
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert watched(monkeypatch)
    assert watched(monkeypatch, True, JPY_SESSION_NAME="labs/01.ipynb")
    assert not watched(monkeypatch, True)
    with progress_bar(1) as bar:
        bar.update(1)
    assert capsys.readouterr() == ("1/1 its, 0:00 left\n", "")  # on stdout: notebooks paint stderr as trouble


def test_a_result_has_the_fields_that_records_need():
    names = [field.name for field in dataclasses.fields(train_module.TrainResult)]
    assert names[:4] == ["status", "reason", "steps", "tokens_seen"] and "val_bpb" in names and "curve" in names


@pytest.mark.parametrize(
    ("progress", "tensors"),
    [
        *(({name: value}, {}) for name, value in {
            "checkpoint": "here", "run": 1, "step": "x", "_losses": None, "curve": [{"step": 1}], "_best": {}, "_seconds": "a",
        }.items()),
        ({"step": 10**30}, {}), ({"step": -5}, {}), ({"_skipped": 5}, {}), ({"_losses": [1.0]}, {}), ({"curve": 3}, {}),
        ({}, {"evil.x": 3}), ({}, {"best.x": 3}), ({}, {"optimizer.first": 3}), ({}, {"optimizer.third": 3}),
    ],
    ids=str,
)  # fmt: skip
def test_a_checkpoint_that_means_harm_is_refused_and_writes_nowhere(progress, tensors, tmp_path):
    """Its hash is right: anyone can write one."""
    first = trainer(checkpoint_dir=tmp_path, max_steps=3)
    first.train_step()
    first.save()
    stored, meta = train_module.load_state(first.checkpoint)
    stored = {name: value.clone() for name, value in stored.items()}
    victim = tmp_path / "victim"
    victim.write_text("precious")
    told = {name: str(victim) if value == "here" else value for name, value in progress.items()}
    meta["progress"] |= told
    train_module.save_state(
        first.checkpoint, {**stored, **{name: torch.zeros(many) for name, many in tensors.items()}}, meta
    )
    with pytest.raises(DamagedFileError, match="must hold what a Trainer writes"):
        trainer(checkpoint_dir=tmp_path, max_steps=3)
    del meta["progress"]
    train_module.save_state(first.checkpoint, stored, meta)
    with pytest.raises(DamagedFileError, match="must hold what a Trainer writes"):
        trainer(checkpoint_dir=tmp_path, max_steps=3)
    assert victim.read_text() == "precious"
