"""What a study trains: budgets that are met, rules that say what they do, brackets that move until the best lies inside."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pandas as pd
import pytest

from tinylm import counts
from tinylm.config import DataConfig
from tinylm.study.design import (
    LADDER,
    Point,
    Recipe,
    best_runs,
    bracket,
    expected_best_size,
    isoflop_point,
    isoflop_points,
    rung_sizes,
    tune,
)
from tinylm.study.runs import Run

RECIPE = Recipe()
BUDGETS = (1e9, 1e11, 4e11, 3.2e12)


def run_of(point: Point, rate: float, seed: int = 0, vocab_size: int = 512) -> Run:
    model = RECIPE.model(point.shape, vocab_size)
    return Run(model, RECIPE.train(model, point.tokens, rate, seed), DataConfig("zipf-markov"))


# ------------------------------------------------------------------------------------------------------------- ladder


@pytest.mark.parametrize("vocab_size", [256, 512, 2048])
def test_rungs_are_models_of_growing_size_and_counted_exactly(vocab_size):
    sizes = rung_sizes(RECIPE, vocab_size)
    assert list(zip(sizes.hidden_size, sizes.num_layers, sizes.num_heads, strict=True)) == list(LADDER)
    for row, shape in zip(sizes.itertuples(), LADDER, strict=True):
        model = RECIPE.model(shape, vocab_size)
        parts = counts.parameters(model)
        assert (row.params_total, row.params_non_embedding) == (parts["total"], parts["non_embedding"])
        train = RECIPE.train(model, 1e5, 0.01)
        assert row.flops_per_token == counts.train_flops(model, train) / (
            train.max_steps * train.windows_per_step * RECIPE.seq_len
        )
    assert (np.diff(sizes.params_total) > 0).all() and (np.diff(sizes.flops_per_token) > 0).all()


def test_rungs_grow_by_the_factors_that_the_ladder_promises():
    steps = rung_sizes(RECIPE, 512).params_total.to_numpy()
    factors = steps[1:] / steps[:-1]
    assert factors.min() > 1.35 and factors.max() < 2.25


# ------------------------------------------------------------------------------------------------------- isoFLOP points


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("vocab_size", [256, 512, 4096])
def test_a_point_costs_its_budget_to_within_half_a_step(budget, vocab_size):
    for point in isoflop_points(RECIPE, vocab_size, [budget]):
        run = run_of(point, 0.01, vocab_size=vocab_size)
        a_step = run.flops / run.train.max_steps
        assert run.train.max_steps > 2
        assert abs(run.flops - budget) <= 0.5001 * a_step, point
        assert point.budget == budget and point.family == "isoflop"


def test_a_family_is_neighbouring_rungs_around_the_expected_size():
    points = isoflop_points(RECIPE, 512, BUDGETS, sizes=5)
    sizes = rung_sizes(RECIPE, 512).params_total
    for budget in BUDGETS:
        rungs = [LADDER.index(point.shape) for point in points if point.budget == budget]
        assert rungs == list(range(rungs[0], rungs[0] + 5))
        nearest = int(np.argmin(np.abs(np.log(sizes / expected_best_size(budget, 512)))))
        assert nearest == rungs[2] or (rungs[0] == 0 and nearest < 2)  # in the middle, where the ladder has room
    largest = [max(point.shape for point in points if point.budget == budget) for budget in BUDGETS]
    assert largest == sorted(set(largest))  # more compute, larger models


@pytest.mark.parametrize(("budget", "end"), [(1e3, 0), (1e30, len(LADDER))])
def test_a_family_at_an_end_of_the_ladder_stays_on_it(budget, end):
    rungs = [LADDER.index(point.shape) for point in isoflop_points(RECIPE, 512, [budget], sizes=5)]
    assert rungs == (list(range(5)) if end == 0 else list(range(end - 5, end)))


def test_a_point_beyond_a_family_has_the_tokens_that_its_budget_buys():
    small, large = (isoflop_point(RECIPE, 512, shape, 1e11) for shape in (LADDER[2], LADDER[5]))
    assert small.tokens > large.tokens
    for point in (small, large):
        cost = counts.train_flops_per_token(RECIPE.model(point.shape, 512), RECIPE.seq_len)
        assert point.tokens * cost == pytest.approx(1e11)


# --------------------------------------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize("tokens", [1e3, 7e4, 3e5, 3.1e6, 2.7e8])
def test_the_batch_is_the_whole_number_of_windows_nearest_to_the_rule(tokens):
    windows = RECIPE.batch_size(tokens)
    rule = RECIPE.batch_tokens_base * math.sqrt(tokens / 3e5) / RECIPE.seq_len
    assert isinstance(windows, int) and windows >= 1
    assert abs(windows - max(1.0, rule)) <= 0.5


def test_the_batch_doubles_with_four_times_the_tokens():
    recipe = dataclasses.replace(RECIPE, batch_tokens_base=512.0)
    assert [recipe.batch_size(3e5 * 4**power) for power in (-2, -1, 0, 1, 2, 3)] == [1, 2, 4, 8, 16, 32]
    assert dataclasses.replace(RECIPE, batch_tokens_base=256.0).batch_size(3e5) == 2


@pytest.mark.parametrize("shape", [LADDER[0], LADDER[4], LADDER[9]])
@pytest.mark.parametrize("tokens", [3e4, 3e5, 5e7])
def test_warmup_lasts_as_many_tokens_as_parameters_but_at_most_a_tenth_of_the_run(shape, tokens):
    model = RECIPE.model(shape, 512)
    train = RECIPE.train(model, tokens, 0.01)
    a_step = train.batch_size * RECIPE.seq_len
    wanted = min(counts.parameters(model)["total"], 0.1 * tokens)
    assert 1 <= train.warmup_steps < train.max_steps
    assert abs(train.warmup_steps * a_step - wanted) <= a_step / 2 or train.warmup_steps == 1


def test_the_schedule_ends_where_the_tokens_end():
    model = RECIPE.model((32, 2, 2), 512)
    for tokens in (1e4, 123_456, 4e6):
        train = RECIPE.train(model, tokens, 0.01, seed=3)
        a_step = train.batch_size * 128
        assert abs(train.max_steps * a_step - tokens) <= a_step / 2
        assert train.batch_size == RECIPE.batch_size(tokens)
        assert (train.learning_rate, train.seed, train.threads) == (0.01, 3, 1)
        assert train.stride == model.max_seq_len == 128  # no token is read twice in an epoch
    least = RECIPE.train(model, 1, 0.01)
    assert least.max_steps == 2 and least.warmup_steps == 1


def test_what_is_asked_for_by_name_wins_over_the_rules():
    model = RECIPE.model((32, 2, 2), 512, norm="layernorm", init="fixed")
    assert (model.norm, model.init, model.hidden_size) == ("layernorm", "fixed", 32)
    train = RECIPE.train(model, 3e5, 0.01, batch_size=16, unique_tokens=1000, patience=4)
    assert (train.batch_size, train.unique_tokens, train.patience) == (16, 1000, 4)
    assert abs(train.max_steps * 16 * 128 - 3e5) <= 8 * 128  # the same tokens in larger steps


def test_the_baseline_is_the_architecture_that_the_report_names():
    model = RECIPE.model((64, 2, 4), 512).resolve()
    assert (model.norm, model.norm_position, model.mlp, model.position) == ("rmsnorm", "pre", "swiglu", "rope")
    assert model.tie_embeddings and model.num_kv_heads == model.num_heads == 4 and model.init == "scaled"
    assert dataclasses.replace(RECIPE, group=2).model((64, 2, 4), 512).num_kv_heads == 2


def test_the_first_guess_of_the_rate_falls_as_a_power_of_the_parameters():
    assert RECIPE.learning_rate(4e4) == RECIPE.lr_base
    assert RECIPE.learning_rate(8e4) / RECIPE.learning_rate(4e4) == pytest.approx(2**-RECIPE.lr_exponent)


# ------------------------------------------------------------------------------------------------------------ brackets


@pytest.mark.parametrize("centre", [1e-4, 0.0117, 0.012, 0.02, 1.0])
def test_a_bracket_is_octaves_around_its_centre(centre):
    rates = bracket(centre)
    assert len(rates) == 3 and rates[1] / rates[0] == rates[2] / rates[1] == pytest.approx(2)
    assert abs(math.log2(rates[1] / centre)) <= 0.2501  # the middle is the nearest half octave
    assert len(bracket(centre, width=5)) == 5 and bracket(centre, width=5)[1:4] == rates


def test_neighbouring_brackets_share_one_grid():
    assert bracket(0.02)[:2] == bracket(0.01)[1:]  # exactly: a rate of the one is a rate of the other
    grid = {2 ** (step / 2) for step in range(-40, 4)}
    for centre in np.geomspace(1e-4, 1, 50):
        assert set(bracket(float(centre))) <= grid
    assert bracket(0.0121) == bracket(0.0120)  # a second call whose guess moved a little asks for the same runs


# ---------------------------------------------------------------------------------------------------------------- tune

POINTS = [Point((16, 2, 2), 1e5, "isoflop", 1e9), Point((32, 2, 2), 1e5, "isoflop", 1e9)]
FIRST = [0.005, 0.01, 0.02]


class Bench:
    """A stand-in for training: each size's loss is a parabola in log2 of the rate, with its lowest point at ``best``."""

    def __init__(self, best: dict[int, float], diverges_above: float = math.inf):
        self.best, self.diverges_above = best, diverges_above
        self.asked: list[list[Run]] = []

    def __call__(self, runs: list[Run]) -> pd.DataFrame:
        self.asked.append(runs)
        rows = []
        for run in runs:
            rate, size = run.train.learning_rate, run.model.hidden_size
            loss = 3 + 0.1 * math.log2(rate / self.best[size]) ** 2
            if rate > self.diverges_above:
                loss = None
            rows.append({"hidden_size": size, "learning_rate": rate, "val_loss": loss, "run_id": f"{size}-{rate}"})
        return pd.DataFrame(rows).astype({"val_loss": float})

    def tune(self, moves: int = 3, points: list[Point] = POINTS) -> pd.DataFrame:
        def runs_of(point, rates):
            return [run_of(point, rate) for rate in rates]

        return tune(points, runs_of, lambda point: FIRST, self, moves)


def test_a_best_rate_inside_is_left_alone():
    bench = Bench({16: 0.011, 32: 0.009})
    frame = bench.tune()
    assert len(bench.asked) == 1 and len(frame) == 6
    assert not frame.edge.any()
    assert frame.point.tolist() == [0, 0, 0, 1, 1, 1]
    assert frame.hidden_size.tolist() == [16] * 3 + [32] * 3


@pytest.mark.parametrize(
    ("best", "rates"),
    [
        (0.02, [0.005, 0.01, 0.02, 0.04]),
        (0.05, [0.005, 0.01, 0.02, 0.04, 0.08]),
        (0.005, [0.0025, 0.005, 0.01, 0.02]),
        (0.001, [0.000625, 0.00125, 0.0025, 0.005, 0.01, 0.02]),
    ],
)
def test_a_bracket_moves_outward_until_the_best_lies_inside(best, rates):
    frame = Bench({16: best, 32: 0.01}).tune()
    moved, still = frame[frame.point == 0], frame[frame.point == 1]
    assert moved.learning_rate.tolist() == pytest.approx(rates)
    assert still.learning_rate.tolist() == FIRST  # the other point is judged by its own runs
    assert not frame.edge.any()
    least = moved.loc[moved.val_loss.idxmin(), "learning_rate"]
    assert moved.learning_rate.min() < least < moved.learning_rate.max()


def test_what_is_still_at_an_edge_is_flagged_and_only_that():
    bench = Bench({16: 10.0, 32: 0.01})
    frame = bench.tune(moves=2)
    assert len(bench.asked) == 3  # once, and once more for each move
    assert frame[frame.point == 0].learning_rate.max() == pytest.approx(0.08)
    assert frame.groupby("point").edge.unique().map(list).to_dict() == {0: [True], 1: [False]}
    none = Bench({16: 10.0, 32: 0.01}).tune(moves=0)
    assert len(none) == 6 and none[none.point == 0].edge.all() and not none[none.point == 1].edge.any()


def test_earlier_rates_stay_in_the_table_and_are_asked_for_again():
    bench = Bench({16: 0.05, 32: 0.01})
    frame = bench.tune()
    asked = [{(run.model.hidden_size, run.train.learning_rate) for run in runs} for runs in bench.asked]
    assert all(before < after for before, after in itertools.pairwise(asked))
    assert set(zip(frame.hidden_size, frame.learning_rate, strict=True)) == asked[-1]
    assert not frame.duplicated(["hidden_size", "learning_rate"]).any()


def test_a_diverged_run_is_the_worst_there_is():
    frame = Bench({16: 0.05, 32: 0.01}, diverges_above=0.015).tune()
    own = frame[frame.point == 0]
    assert own.learning_rate.tolist() == FIRST  # 0.01 is the best that did not diverge, and it lies inside
    assert own.val_loss.isna().tolist() == [False, False, True]
    assert not own.edge.any()
    assert best_runs(frame).learning_rate.tolist() == [0.01, 0.01]


def test_where_all_diverged_the_bracket_moves_down():
    frame = Bench({16: 0.002, 32: 0.002}, diverges_above=0.003).tune()
    assert frame[frame.point == 0].learning_rate.min() == pytest.approx(0.00125)
    assert not frame.edge.any()
    assert best_runs(frame).learning_rate.tolist() == pytest.approx([0.0025, 0.0025])


def test_the_best_run_of_each_point_is_its_row_of_lowest_loss():
    frame = Bench({16: 0.016, 32: 0.006}).tune()
    best = best_runs(frame)
    assert best.point.tolist() == [0, 1] and best.index.tolist() == [0, 1]
    for row in best.itertuples():
        assert row.val_loss == frame[frame.point == row.point].val_loss.min()
