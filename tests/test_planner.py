"""Plans: the best of the ladder, what it costs to be off, and what is said when the evidence ends."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from tinylm.errors import LabError
from tinylm.study.planner import Speed, measure_speed, plan
from tinylm.study.scaling import Fit, LearningRateRule, evaluate_law

LAW = {"E": 1.6, "A": 30.0, "B": 120.0, "alpha": 0.35, "beta": 0.37}
RULE = LearningRateRule("N", 0.01, 4e4, 1e6, -0.35, 0.0, {"rate": (0.009, 0.011)}, 9, 0, 0.1)


def surface(spread: float = 0.0, **more) -> Fit:
    rng = np.random.default_rng(0)
    samples = pd.DataFrame({k: v * np.exp(spread * rng.standard_normal(500)) for k, v in LAW.items()})
    return Fit("surface", LAW, samples=samples, **more)


def ladder(count: int = 40, low: float = 1e4, high: float = 1e7) -> pd.DataFrame:
    N = np.geomspace(low, high, count).round()
    return pd.DataFrame(
        {
            "hidden_size": np.arange(count) * 8 + 16,
            "num_layers": 2 + np.arange(count) // 8,
            "params_total": N.astype(int),
            "flops_per_token": 6 * N + 900 * np.sqrt(N),  # a head and attention on top of 6 N
        }
    )


def batch_rule(tokens: float) -> int:
    return 2 ** max(0, round(np.log2((tokens / 3e5) ** 0.5 * 4)))


def make(**changes):
    common = {"batch_rule": batch_rule, "seq_len": 128, "largest_flops_fitted": 4e11, "budget_flops": 2e12}
    return plan(**{"surface_fit": surface(), "lr_rule": RULE, "ladder": ladder(), **common, **changes})


def test_the_plan_is_the_best_of_all_shapes_by_brute_force():
    shapes = ladder()
    for budget in (3e10, 2e12, 5e13):
        tokens = budget / shapes["flops_per_token"]
        best = evaluate_law("surface", LAW, shapes["params_total"], tokens).argmin()
        chosen = make(budget_flops=budget)
        assert chosen.params == shapes["params_total"][best]
        assert (chosen.hidden_size, chosen.num_layers) == tuple(shapes.loc[best, ["hidden_size", "num_layers"]])
        assert chosen.shape == shapes.loc[[best]].to_dict("records")[0]
        assert len(chosen.options) == len(shapes)


def test_tokens_are_whole_steps_of_the_batch_and_cost_the_budget():
    chosen = make()
    assert chosen.tokens == chosen.steps * chosen.batch_size * 128
    assert chosen.batch_size == batch_rule(chosen.tokens)
    assert chosen.flops == pytest.approx(2e12, rel=0.01)
    assert chosen.loss == pytest.approx(evaluate_law("surface", LAW, chosen.params, chosen.tokens))
    assert chosen.learning_rate == pytest.approx(0.01 * (chosen.params / 4e4) ** -0.35)
    assert chosen.seconds is None and chosen.epochs is None
    unsorted = make(ladder=ladder().sample(frac=1, random_state=0))
    assert (unsorted.params, unsorted.tokens, unsorted.shape) == (chosen.params, chosen.tokens, chosen.shape)


def test_a_budget_in_seconds_uses_the_speed_of_each_shape():
    def slow_when_large(shape):
        return 1e12 / shape["flops_per_token"] / (1 + shape["params_total"] / 1e5)

    shapes = ladder()
    speeds = shapes.apply(slow_when_large, axis=1)
    best = evaluate_law("surface", LAW, shapes["params_total"], 60 * speeds).argmin()
    chosen = make(budget_flops=None, budget_seconds=60, speed=slow_when_large)
    assert chosen.params == shapes["params_total"][best]
    assert chosen.seconds == pytest.approx(60, rel=0.01)
    even = make(budget_flops=None, budget_seconds=60, speed=lambda shape: 1e12 / shape["flops_per_token"])
    assert even.params > chosen.params  # where speed does not fall with size, larger models pay
    assert make(speed=slow_when_large).seconds == pytest.approx(2e12 / 1e12 * (1 + make().params / 1e5), rel=0.01)


def test_reach_counts_from_the_largest_budget_fitted_and_is_marked_when_far():
    near, far = make(), make(budget_flops=4e13)
    assert near.reach == pytest.approx(5, rel=0.01) and not near.far
    assert far.reach == pytest.approx(100, rel=0.01) and far.far
    assert "far beyond the evidence" in far.sentence() and "far beyond the evidence" not in near.sentence()
    assert "far beyond the evidence" in far.table().loc["of the largest budget fitted", "plan"]


def test_a_model_half_or_twice_the_size_costs_something():
    chosen = make()
    assert chosen.smaller_costs > 0 and chosen.larger_costs > 0
    twice = evaluate_law("surface", LAW, 2 * chosen.params, 2e12 / np.interp(
        np.log(2 * chosen.params), np.log(ladder()["params_total"]), ladder()["flops_per_token"]
    ))  # fmt: skip
    assert chosen.larger_costs == pytest.approx(float(twice) - chosen.loss, abs=2e-3)


def test_the_end_of_the_ladder_and_the_end_of_the_text_are_said():
    short = make(ladder=ladder(5, 1e4, 3e4))
    assert any("largest shape of the ladder" in w for w in short.warnings)
    assert short.larger_costs < 0  # and a larger model would indeed be better
    assert not any("ladder" in w for w in make().warnings)
    tokens = make().tokens
    assert make(tokens_available=2 * tokens).epochs == pytest.approx(0.5)
    repeated = make(tokens_available=tokens / 3)
    assert repeated.epochs == pytest.approx(3) and any(
        "3.0 epochs" in w and "nearly true" in w for w in repeated.warnings
    )
    assert any("expect more" in w for w in make(tokens_available=tokens / 9).warnings)


def test_the_interval_holds_the_fits_and_the_seeds_spread():
    exact, seeds, both = make(), make(seed_sd=0.01), make(surface_fit=surface(0.005), seed_sd=0.01)
    assert exact.high - exact.low < 1e-9
    assert seeds.high - seeds.low == pytest.approx(2 * 1.96 * 0.01, rel=1e-3)
    assert both.high - both.low > 1.2 * (seeds.high - seeds.low)
    assert both.low < both.loss < both.high


def test_what_the_surface_could_not_tell_is_said():
    chosen = make(surface_fit=surface(status={"alpha": "not identified", "beta": "identified"}))
    assert any("alpha could not be identified" in w for w in chosen.warnings)


def test_a_plan_speaks_and_can_be_sealed():
    chosen = make(budget_flops=None, budget_seconds=600, speed=lambda shape: 1e11 / shape["flops_per_token"])
    assert f"{chosen.hidden_size} x {chosen.num_layers}" in chosen.sentence() and "10 min" in chosen.sentence()
    assert chosen.table().loc["tokens", "plan"] == f"{chosen.tokens:,}"
    target = chosen.target("abc")
    assert target["run_id"] == "abc" and target["tokens"] == chosen.tokens and target["batch_size"] == chosen.batch_size


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget_seconds": 10.0}, "one budget"),
        ({"budget_flops": None}, "one budget"),
        ({"budget_flops": None, "budget_seconds": 10.0}, "needs the machine's speed"),
        ({"budget_flops": -1.0}, "positive"),
        ({"budget_flops": 1e6}, "at least one step"),
        ({"ladder": ladder().drop(columns="flops_per_token")}, "flops_per_token"),
    ],
)
def test_a_senseless_budget_is_refused(changes, words):
    with pytest.raises(LabError, match=words):
        make(**changes)


def test_speed_interpolates_flops_between_the_shapes_measured():
    speed = Speed((1e4, 1e6), (1e9, 4e9), threads=1)
    assert speed({"params_total": 1e5, "flops_per_token": 6e5}) == pytest.approx(2e9 / 6e5)
    assert speed({"params_total": 1e8, "flops_per_token": 6e8}) == pytest.approx(4e9 / 6e8)  # constant beyond
    assert speed.table()["flops_per_second"].tolist() == [1e9, 4e9]


def test_speed_is_measured_on_real_steps_and_leaves_torch_as_it_was():
    import torch

    from tinylm.config import ModelConfig

    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    configs = [ModelConfig(vocab_size=64, hidden_size=size, num_layers=1, max_seq_len=16) for size in (64, 16)]
    speed = measure_speed(configs, seconds_each=0.1, threads=1, batch_size=2)
    assert speed.params == tuple(sorted(speed.params)) and len(speed.params) == 2
    assert all(1e6 < f < 1e13 for f in speed.flops_per_second) and speed.threads == 1
    assert torch.get_num_threads() == threads and torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(LabError, match="each with its batch"):
        measure_speed(configs, batch_size=[1])


def test_fits_plans_and_plots_import_no_torch():
    code = (
        "import sys, tinylm.study.planner, tinylm.study.plots, tinylm.study.forecasts; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_two_readings_are_averaged_and_their_intervals_spanned():
    """A line through the minima changes what a plan expects, not what it chooses."""
    line = {"A": 30.0, "alpha": 0.08}
    frontier = Fit(form="power", params=line, samples=pd.DataFrame([{**line, "A": a} for a in np.linspace(29, 31, 41)]))
    alone, both = (make(surface_fit=surface(0.01), frontier=fit) for fit in (None, frontier))
    assert (alone.params, alone.tokens) == (both.params, both.tokens)
    reading = frontier.predict(alone.flops).iloc[0]
    assert both.loss == pytest.approx((alone.loss + reading["loss"]) / 2)
    assert both.low == pytest.approx(min(alone.low, reading["low"]))
    assert both.high == pytest.approx(max(alone.high, reading["high"]))
