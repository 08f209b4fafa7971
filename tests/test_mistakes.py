"""The field's mistakes on runs of a known law: which way each moves the exponent, and what it costs."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tinylm.errors import LabError
from tinylm.study import mistakes

E, A, B, ALPHA, BETA = 1.8, 30.0, 60.0, 0.4, 0.4
RATES = (0.5, 1.0, 2.0)


def loss(params, tokens):
    return E + A / params**ALPHA + B / tokens**BETA


@pytest.fixture(scope="module")
def frame():
    """Runs of five sizes at three budgets: embeddings weigh more in small models, larger models want lower rates, and a
    curve lies above the law until its end."""
    rows = []
    for budget in (1e11, 1e12, 1e13):
        for step in (-2, -1, 0, 1, 2):
            params = (budget / 6 / 20) ** 0.5 * 2.0**step
            tokens = budget / (6 * params)
            best = 0.02 * (params / 1e4) ** -0.5
            for rate in RATES:
                final = loss(params, tokens) + 0.04 * np.log(rate) ** 2
                seen = tokens * np.linspace(0.05, 1, 20)
                late = 0.15 * (1 - seen / tokens)  # the rate has not come down yet
                curve = [
                    {"tokens": float(d), "val_loss": float(loss(params, d) + up + final - loss(params, tokens))}
                    for d, up in zip(seen, late, strict=True)
                ]
                rows.append(
                    {"params_total": params, "params_non_embedding": params - 60 * params**0.5 * 0.9,
                     "tokens_seen": tokens, "flops": budget, "val_loss": final, "learning_rate": best * rate,
                     "status": "finished", "epochs": 0.5, "curve": curve, "budget": budget}
                )  # fmt: skip
    return pd.DataFrame(rows)


def test_without_mistakes_the_law_is_found(frame):
    reading = mistakes.read(frame, bootstrap=40)
    assert len(reading.points) == 15 and reading.mistakes == ()
    assert reading.fit.params["alpha"] == pytest.approx(ALPHA, rel=0.02)
    assert reading.a == pytest.approx(0.5, abs=0.01) and reading.a_low <= reading.a <= reading.a_high
    assert reading.cost == pytest.approx((6, 1), rel=1e-3)
    # The best size of the known law, in closed form.
    best = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA)) * (1e14 / 6) ** 0.5
    assert reading.best_size(1e14) == pytest.approx(best, rel=0.03)
    assert reading.minima["inside"].all()


def test_what_a_forecast_or_a_plan_was_held_against_never_enters_a_fit(frame):
    honest = mistakes.read(frame.assign(family="isoflop"), bootstrap=0)
    apart = frame.iloc[[-1, 0, 4]].assign(family=["forecast", "promised", "batches"])
    apart["val_loss"] -= 0.5
    both = pd.concat([frame.assign(family="isoflop"), apart], ignore_index=True)
    assert mistakes.kept_apart(both).sum() == 3 and not mistakes.kept_apart(frame).any()
    for made in ((), ("mid-schedule", "one rate")):
        seen, alone = (mistakes.read(runs, made, bootstrap=0) for runs in (both, frame))
        assert len(seen.points) == len(alone.points) and seen.a == alone.a
    assert honest.fit.params == mistakes.read(both, bootstrap=0).fit.params


def test_each_mistake_moves_the_law(frame):
    honest = mistakes.read(frame, bootstrap=0)
    embeddings = mistakes.read(frame, ["non-embedding"], bootstrap=0)
    assert embeddings.a > honest.a + 0.01  # small models seem smaller than they are
    assert (embeddings.points["N"] < honest.points["N"]).all()
    middle = mistakes.read(frame, ["mid-schedule"], bootstrap=0)
    moved = middle.points["val_loss"].to_numpy() - honest.points["val_loss"].to_numpy()
    assert (moved > -1e-3).all() and (moved < 1e-9).any()
    one = mistakes.read(frame, ["one rate"], bootstrap=0)
    worse = one.points["val_loss"].to_numpy() - honest.points["val_loss"].to_numpy()
    largest = one.points["params_total"] == one.points["params_total"].max()
    assert (worse > -1e-6).all() and worse[largest].max() > 0.01
    both = mistakes.read(frame, ["one rate", "non-embedding"], bootstrap=0)
    assert both.mistakes == ("non-embedding", "one rate")


def test_a_token_that_costs_otherwise_than_6nd_moves_the_exponent(frame):
    dear = frame.assign(flops=frame["params_total"] ** 0.8 * 60 * frame["tokens_seen"])
    assert mistakes.read(dear, bootstrap=0).cost[1] == pytest.approx(0.8, abs=1e-6)
    exact, rough = mistakes.read(dear, bootstrap=0), mistakes.read(dear, ["6ND"], bootstrap=0)
    assert exact.a == pytest.approx(BETA / (ALPHA + 0.8 * BETA), abs=0.02)
    assert rough.a == pytest.approx(0.5, abs=0.02)


def test_a_plan_tells_what_a_mistake_costs(frame):
    honest = mistakes.read(frame, bootstrap=40)
    plan = mistakes.planned(honest, honest, 1e13)
    assert plan.costs == pytest.approx(0, abs=1e-6) and plan.compute == pytest.approx(1, abs=1e-3)
    assert plan.params == plan.best_params and plan.low <= plan.loss <= plan.high
    assert 6 * plan.params * plan.tokens == pytest.approx(1e13, rel=0.01)
    wrong = mistakes.planned(honest, mistakes.read(frame, ["one rate"], bootstrap=0), 1e15)
    assert wrong.best_params != wrong.params and wrong.costs > 0 and wrong.compute > 1
    # Where the mistaken run's loss comes from: the honest best at that much less compute.
    best = honest.best_size(1e15 / wrong.compute)
    assert loss(best, 1e15 / wrong.compute / 6 / best) == pytest.approx(wrong.loss, rel=2e-3)


def test_what_runs_do_not_allow_is_said(frame):
    bare = frame[["params_total", "tokens_seen", "val_loss"]]
    assert set(mistakes.unavailable(bare)) == set(mistakes.MISTAKES)
    assert mistakes.unavailable(frame) == {}
    for name in ("non-embedding", "mid-schedule", "one rate"):
        with pytest.raises(LabError, match="do not allow"):
            mistakes.read(bare, [name])
    with pytest.raises(LabError, match="The mistakes are"):
        mistakes.read(frame, ["laziness"])
    with pytest.raises(LabError, match="finished"):
        mistakes.read(frame.assign(status="diverged"))
    assert len(mistakes.read(frame.assign(epochs=np.where(frame["flops"] > 5e12, 3.0, 0.5)), bootstrap=0).points) == 10
