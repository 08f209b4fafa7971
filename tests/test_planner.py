"""Plans: the best of the ladder, what it costs to be off, and what is said when the evidence ends."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tinylm.config import TrainConfig
from tinylm.errors import LabError
from tinylm.study import planner
from tinylm.study.design import Recipe, rung_sizes
from tinylm.study.planner import (
    PUBLISHED,
    Evidence,
    RepeatedText,
    Repetition,
    Speed,
    evaluation_tokens,
    expected_loss,
    measure_speed,
    plan,
)
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
    best = evaluate_law("surface", LAW, shapes["params_total"], 6000 * speeds).argmin()
    chosen = make(budget_flops=None, budget_seconds=6000, speed=slow_when_large)
    assert chosen.params == shapes["params_total"][best]
    assert chosen.seconds == pytest.approx(6000, rel=0.01)
    even = make(budget_flops=None, budget_seconds=6000, speed=lambda shape: 1e12 / shape["flops_per_token"])
    assert even.params > chosen.params  # where speed does not fall with size, larger models pay
    timed = make(speed=slow_when_large)
    per_second = slow_when_large(timed.shape)
    assert timed.seconds == pytest.approx((timed.tokens + evaluation_tokens(timed.tokens)) / per_second)


def test_the_time_of_a_short_run_counts_its_evaluations():
    """20 on an eighth of what was trained in between, one on 65,536 tokens, each at a third of a training token."""
    assert evaluation_tokens(160_000) == pytest.approx((20 * 1000 + 65536) / 3)
    assert evaluation_tokens(1e9) == pytest.approx((20 * 16384 + 65536) / 3)
    chosen = make(budget_flops=None, budget_seconds=2.0, speed=lambda shape: 2e5)
    assert chosen.tokens == pytest.approx(4e5 - evaluation_tokens(chosen.tokens), rel=0.01)


def test_a_budget_of_tokens_buys_the_size_they_suit():
    """At the compute of the plan, no other shape of the ladder is better; twice the tokens suit a larger model."""
    shapes = ladder()
    for tokens in (3e5, 4e6, 6e7):
        chosen = make(budget_flops=None, budget_tokens=tokens)
        assert chosen.tokens == pytest.approx(tokens, rel=0.02)
        compute = tokens * shapes.set_index("params_total").flops_per_token[chosen.params]
        losses = evaluate_law("surface", LAW, shapes["params_total"], compute / shapes["flops_per_token"])
        assert chosen.params == shapes["params_total"][losses.argmin()]
        assert chosen.smaller_costs > 0 and chosen.larger_costs > 0
        assert make(budget_flops=None, budget_tokens=2 * tokens).params > chosen.params


def test_reach_counts_from_the_largest_budget_fitted_and_is_marked_when_far():
    near, far = make(), make(budget_flops=4e13)
    assert near.reach == pytest.approx(5, rel=0.01) and not near.far
    assert far.reach == pytest.approx(100, rel=0.01) and far.far
    assert "far beyond the evidence" in far.sentence() and "far beyond the evidence" not in near.sentence()
    assert "far beyond the evidence" in far.table().loc["of the largest budget fitted", "plan"]
    within = make(budget_flops=3e11)
    assert "within it" in within.sentence() and "beyond" not in within.sentence()


def test_reach_in_size_and_length_is_told_where_the_rows_are_known():
    rows = pd.DataFrame({"params": [2e4, 6e4], "tokens": [3e6, 5e5]})
    chosen = make(surface_fit=surface(data=rows))
    assert chosen.size_reach == pytest.approx(chosen.params / 6e4)
    assert chosen.length_reach == pytest.approx(chosen.tokens / 3e6)
    assert "the largest model" in chosen.evidence and make().size_reach is None


def test_a_model_half_or_twice_the_size_costs_something():
    chosen = make()
    assert chosen.smaller_costs > 0 and chosen.larger_costs > 0
    twice = evaluate_law("surface", LAW, 2 * chosen.params, 2e12 / np.interp(
        np.log(2 * chosen.params), np.log(ladder()["params_total"]), ladder()["flops_per_token"]
    ))  # fmt: skip
    assert chosen.larger_costs == pytest.approx(float(twice) - chosen.loss, abs=2e-3)


def test_the_price_in_compute_buys_the_same_loss():
    chosen, shapes = make(), ladder(4001)
    for factor, times in ((0.5, chosen.smaller_compute), (2.0, chosen.larger_compute)):
        other = np.interp(math.log(factor * chosen.params), np.log(shapes["params_total"]), shapes["flops_per_token"])
        loss = evaluate_law("surface", LAW, factor * chosen.params, times * 2e12 / other)
        assert times > 1 and loss == pytest.approx(chosen.loss, abs=2e-3)
    flat = {**LAW, "B": 1e-3}  # tokens bring nothing more: no compute makes up for a smaller model
    hopeless = make(surface_fit=Fit("surface", flat), ladder=ladder(5, 1e4, 3e4))
    assert math.isinf(hopeless.smaller_compute) and "no budget" in hopeless.sentence()
    assert hopeless.to_dict()["smaller_compute"] is None


def test_the_sizes_that_resamples_would_choose_surround_the_plan():
    chosen = make(surface_fit=surface(0.05))
    assert chosen.params_low < chosen.params < chosen.params_high
    exact = make(surface_fit=surface(0.0))
    assert exact.params_low == exact.params == exact.params_high
    assert math.isnan(make(surface_fit=Fit("surface", LAW)).params_low)


def test_the_end_of_the_ladder_and_the_end_of_the_text_are_said():
    short = make(ladder=ladder(5, 1e4, 3e4))
    assert any("largest shape of the ladder" in w for w in short.warnings)
    assert short.larger_costs < 0  # and a larger model would indeed be better
    assert not any("ladder" in w for w in make().warnings)


def test_a_text_that_is_not_used_up_changes_nothing():
    free = make()
    ample = make(tokens_available=2 * free.tokens)
    assert ample.epochs == pytest.approx(0.5) and ample.effective_tokens == ample.tokens
    assert (ample.params, ample.tokens, ample.loss, ample.warnings) == (
        free.params,
        free.tokens,
        free.loss,
        free.warnings,
    )


def test_a_text_read_again_is_worth_less_and_is_told():
    free = make(surface_fit=surface(0.01))
    short = make(surface_fit=surface(0.01), tokens_available=free.tokens / 30)
    assert short.epochs == pytest.approx(short.tokens / (free.tokens / 30)) and short.epochs > 10
    assert short.effective_tokens == pytest.approx(float(PUBLISHED.tokens(short.tokens, free.tokens / 30)))
    assert short.loss > free.loss + 0.05
    fresh = surface(0.01).predict(short.params, short.tokens).iloc[0]
    assert short.low == fresh["low"] < fresh["loss"] < short.loss  # repeated text may be worth as much as new
    told = short.sentence()
    assert "epochs" in told and "R_D* = 15.39" in told and "assumption" in told
    assert "up to 12" in short.table().loc["epochs that still pay", "plan"]
    fit = Fit("data-constrained", {**LAW, "R_D": 15.39, "R_N": 5.31}, status={"R_D": "identified"})
    fitted = Repetition.of(fit)
    own = make(surface_fit=surface(0.01), tokens_available=free.tokens / 30, repetition=fitted)
    assert own.loss == short.loss and own.low > short.low and "assumption" not in own.sentence()


def test_a_plan_on_repeated_text_is_the_best_by_brute_force():
    shapes, unique = ladder(), 2e5
    law = RepeatedText(surface(), unique)
    for budget in (1e11, 1e13, 1e15):
        best = law.loss(shapes["params_total"], budget / shapes["flops_per_token"]).argmin()
        assert make(budget_flops=budget, tokens_available=unique).params == shapes["params_total"][best]


# ---------------------------------------------------------------------------------------------------------- repetition


def test_the_published_law_gives_its_published_losses():
    """The worked example of the authors' repository (huggingface/datablations, README): 25 billion distinct tokens."""
    constants = {"A": math.exp(6.255414), "B": math.exp(7.3049974), "E": math.exp(0.6254804)}
    fit = Fit("surface", {**constants, "alpha": 0.3526596, "beta": 0.3526596})
    law = Repetition(15.387756, 5.309743)
    base = RepeatedText(fit, 25e9, law).base
    for params, tokens, loss in ((6.34e9, 242e9, 2.2256440889984477), (8.67e9, 178e9, 2.2269634075087867)):
        counted = law.params(params, base), law.tokens(tokens, 25e9)
        assert evaluate_law("surface", fit.params, *counted) == pytest.approx(loss, rel=1e-12)


def test_the_size_that_suits_a_text_is_the_optimum_of_the_surface():
    law = RepeatedText(surface(), 3e6)
    flops = 6 * law.base * 3e6
    best = surface().optimal(flops)
    assert best["params"][0] == pytest.approx(law.base) and best["tokens"][0] == pytest.approx(3e6)


def test_the_first_pass_is_the_surface_and_many_are_the_published_law():
    law = RepeatedText(surface(), 1e6)
    sizes, tokens = np.array([1e3, 1e5, 1e7]), np.array([1e5, 1e6, 3e5])
    np.testing.assert_allclose(law.loss(sizes, tokens), evaluate_law("surface", LAW, sizes, tokens))
    just_more = law.loss(sizes, np.full(3, 1.0001e6))  # no jump where the text ends, whatever the size
    np.testing.assert_allclose(just_more, evaluate_law("surface", LAW, sizes, 1e6), rtol=1e-3)
    counted = PUBLISHED.params(sizes, law.base), PUBLISHED.tokens(1e10, 1e6)
    np.testing.assert_allclose(law.effective(sizes, 1e10)[0], counted[0], rtol=1e-3)
    assert law.loss(1e5, 1e10) == pytest.approx(evaluate_law("surface", LAW, counted[0][1], counted[1]), rel=1e-4)


def test_epochs_are_worth_less_and_less():
    worth = PUBLISHED.worth(np.arange(1, 60))
    assert worth[0] == 1 and (np.diff(worth) < 0).all()
    assert PUBLISHED.tokens(40.0, 1.0) == pytest.approx(worth[:40].sum())
    for share in (0.5, 0.1):
        last = int(PUBLISHED.last_epoch(share))
        assert worth[last - 1] >= share > worth[last]
    assert Repetition(0.2, 1.0).last_epoch() == 1
    endless = Repetition(math.inf, math.inf)
    assert math.isinf(endless.last_epoch()) and endless.worth(50) == 1 and endless.params(9.0, 1.0) == 9
    table = RepeatedText(surface(), 1e6).epochs(1e4)
    assert table["gained"][0] == 0 and table["gained"].is_monotonic_increasing
    np.testing.assert_allclose(table["tokens"], table["epochs"] * 1e6)
    with pytest.raises(LabError, match="must be positive"):
        Repetition(0.0)


def test_a_fitted_repetition_law_that_is_not_identified_stays_an_assumption():
    vague = Fit("data-constrained", {**LAW, "R_D": 40.0}, status={"R_D": "not identified"})
    law = Repetition.of(vague)
    assert law.assumed and math.isinf(law.params_star) and "not identified" in law.sentence()
    with pytest.raises(LabError, match="data-constrained"):
        Repetition.of(surface())


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
        ({"budget_tokens": 1e6}, "one budget"),
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
    both = speed.joined(Speed((1e6, 1e5), (5e9, 3e9), threads=2, machine="mine"))
    assert both == Speed((1e4, 1e5, 1e6), (1e9, 3e9, 5e9), 2, "mine")


def test_speed_is_measured_on_real_steps_and_leaves_torch_as_it_was():
    import torch

    from tinylm.config import ModelConfig

    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    configs = [ModelConfig(vocab_size=64, hidden_size=size, num_layers=1, max_seq_len=16) for size in (64, 16)]
    plain = TrainConfig(precision="fp32", compile=False)
    speed = measure_speed(configs, seconds_each=0.1, threads=1, batch_size=2, train=plain)
    assert speed.params == tuple(sorted(speed.params)) and len(speed.params) == 2
    assert all(1e6 < f < 1e13 for f in speed.flops_per_second) and speed.threads == 1 and speed.machine
    assert torch.get_num_threads() == threads and torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(LabError, match="each with its batch"):
        measure_speed(configs, batch_size=[1])


# ------------------------------------------------------------------------------------------------------------ evidence


def evidence(**more) -> Evidence:
    return Evidence(surface(0.01), RULE, rung_sizes(Recipe(), 512), seed_sd=0.01, largest_flops=4e11, **more)


def test_evidence_survives_json_and_plans_the_same():
    rows = pd.DataFrame({"params": [2e4, 6e4], "tokens": [3e6, 5e5]})
    line = Fit("power", {"A": 30.0, "alpha": 0.08}, samples=pd.DataFrame({"A": [29.0, 31.0], "alpha": [0.08, 0.08]}))
    before = Evidence(
        surface(0.01, data=rows),
        RULE,
        rung_sizes(Recipe(), 512),
        0.01,
        4e11,
        3e6,
        line,
        Repetition(20.0, math.inf, "x"),
    )
    after = Evidence.from_dict(json.loads(json.dumps(before.to_dict(), allow_nan=False)))
    for budget in ({"flops": 3e12}, {"tokens": 4e6}, {"seconds": 60, "speed": lambda shape: 1e5}):
        old, new = before.plan(Recipe(), **budget).to_dict(), after.plan(Recipe(), **budget).to_dict()
        assert old.pop("repetition") == new.pop("repetition") and old.pop("warnings") == new.pop("warnings")
        assert old.pop("evidence") == new.pop("evidence")
        assert new == pytest.approx(old)
        json.dumps(new, allow_nan=False)


def test_the_reference_law_can_be_planned_from():
    folder = Path(__file__).parents[1] / "results" / "quickstart"
    known = Evidence.from_dict(json.loads((folder / "tables" / "law.json").read_text(encoding="utf-8")))
    speed = Speed(**json.loads((folder / "speed.json").read_text(encoding="utf-8")))
    chosen = known.plan(Recipe(), seconds=600, speed=speed)
    assert chosen.seconds == pytest.approx(600, rel=0.01) and chosen.low < chosen.loss < chosen.high
    model = known.model(Recipe(), chosen.shape)
    assert (model.vocab_size, model.hidden_size) == (512, chosen.hidden_size)


def test_speed_for_a_plan_is_measured_on_its_very_shape_and_batch(monkeypatch):
    asked = []

    def measured(models, batch_size, **_options):
        asked.append((models, batch_size))
        from tinylm import counts

        sizes = sorted(float(counts.parameters(model)["total"]) for model in models)
        return Speed(tuple(sizes), (1e10 + len(asked),) * len(sizes), 1)

    monkeypatch.setattr(planner, "measure_speed", measured)
    speed = evidence().speed_for(Recipe(), [120.0])
    chosen = evidence().plan(Recipe(), seconds=120.0, speed=Speed((1e4,), (1e10,), 1))
    (rungs, _), (own, batch) = asked
    assert len(rungs) == 3 and [(m.hidden_size, m.num_layers) for m in own] == [(chosen.hidden_size, chosen.num_layers)]
    assert batch == chosen.batch_size
    assert speed(chosen.shape) == pytest.approx((1e10 + 2) / chosen.shape["flops_per_token"])


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
    law = surface(0.01)
    off = law.predict(alone.params, alone.tokens).loss[0] - law.optimal(6 * alone.params * alone.tokens).loss[0]
    reading = frontier.predict(alone.flops).iloc[0] + off
    assert both.loss == pytest.approx((alone.loss + reading["loss"]) / 2)
    assert both.low == pytest.approx(min(alone.low, reading["low"]))
    assert both.high == pytest.approx(max(alone.high, reading["high"]))


def test_a_size_that_is_not_the_best_is_expected_to_cost_what_the_surface_says():
    """L(C) knows the best size alone: at a quarter of it, for the same N D, both readings rise by the surface's price."""
    law, frontier = surface(0.01), Fit(form="power", params={"A": 30.0, "alpha": 0.08}, samples=pd.DataFrame())
    best = law.optimal(1e15).iloc[0]
    there = expected_loss(law, frontier, best.params, best.tokens, 1e15, 0.0)["loss"]
    off = expected_loss(law, frontier, best.params / 4, best.tokens * 4, 1e15, 0.0)["loss"]
    price = law.predict(best.params / 4, best.tokens * 4).loss[0] - best.loss
    assert price > 0.01 and off - there == pytest.approx(price, rel=1e-9)


def test_a_new_run_may_lie_as_far_from_the_surface_as_the_runs_behind_it_do():
    seeds, misfit, rows = 0.002, 0.02, 25  # nats, a share of the loss

    def width(residual: float) -> float:
        fit = surface(0.001, data=pd.DataFrame({"residual": residual * np.resize([1, -1], rows)}))
        found = expected_loss(fit, None, 1e6, 2e7, 1.2e14, seeds)
        return found["high"] - found["low"]

    def told(spread: float) -> float:
        reading = surface(0.001).predict(1e6, 2e7, seed_sd=spread).iloc[0]
        return reading.high - reading.low

    assert width(0.0) == pytest.approx(told(seeds))
    loss = float(evaluate_law("surface", LAW, 1e6, 2e7))
    assert width(misfit) == pytest.approx(told(misfit * loss * (rows / (rows - 5)) ** 0.5))
    assert width(misfit) > 1.5 * width(0.0)
