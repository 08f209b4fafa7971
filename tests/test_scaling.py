"""Fits of scaling laws: known laws come back, derivatives are right, intervals cover, doubts are told."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats

from tinylm.errors import LabError
from tinylm.study import scaling
from tinylm.study.coverage import CHINCHILLA, SMALL, spread
from tinylm.study.forms import SURFACE, huber, objective_and_gradient
from tinylm.study.scaling import (
    Fit,
    evaluate_law,
    fit_data_constrained,
    fit_growth,
    fit_power,
    fit_surface,
    prediction_interval,
    profile_threshold,
)

REPEATED = {"E": 1.87, "A": 521.0, "B": 1488.0, "alpha": 0.353, "beta": 0.353, "R_D": 15.4, "R_N": 5.3}


def design(rows: int = 240, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return spread(rows)(np.random.default_rng(seed))


def repeated(rows: int = 120, most: float = 60.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N, D and U of runs of 7 million to 8 billion parameters, up to ``most`` epochs, a third of them of one epoch."""
    rng = np.random.default_rng(3)
    U = 10 ** rng.choice([8.0, 8.6, 9.0, 9.5, 10.0, 10.6], rows)
    epochs = np.where(rng.random(rows) < 0.33, 1.0, np.exp(rng.uniform(0, np.log(most), rows)))
    return np.exp(rng.uniform(np.log(7e6), np.log(8e9), rows)), U * epochs, U


def noisy(law: dict, N, D, sd: float, seed: int = 1) -> np.ndarray:
    return evaluate_law("surface", law, N, D) * np.exp(sd * np.random.default_rng(seed).standard_normal(len(N)))


def test_the_optimum_is_no_worse_than_that_of_general_optimisers():
    N, D = design(120)
    L = noisy(CHINCHILLA, N, D, 0.01)
    X = np.log([N, D])
    fit = fit_surface(N, D, L, bootstrap=0)
    truth = np.array([np.log(CHINCHILLA[n]) if n in "EAB" else CHINCHILLA[n] for n in SURFACE.params])

    def objective(theta):
        value, gradient = objective_and_gradient(SURFACE, theta[None], X, np.log(L), np.ones(len(L)), 1e-3)
        return 1e3 * value[0], 1e3 * gradient[0]

    for method in ("BFGS", "L-BFGS-B"):
        other = optimize.minimize(objective, truth, jac=True, method=method)
        assert fit.value <= other.fun / 1e3 * (1 + 1e-9)


def test_absolute_deviations_agree_with_linear_programming():
    rng = np.random.default_rng(4)
    x = np.geomspace(1, 100, 25)
    y = 3 * x**-0.4 * np.exp(0.05 * rng.standard_t(2, 25))
    fit = fit_power(x, y, objective="lad", bootstrap=0)
    # minimise sum(t) with -t <= log y - (c - s log x) <= t
    A = np.stack([np.ones(25), -np.log(x)], axis=1)
    rows = np.block([[A, -np.eye(25)], [-A, -np.eye(25)]])
    exact = optimize.linprog(
        [0, 0] + [1] * 25, rows, np.concatenate([np.log(y), -np.log(y)]), bounds=[(None, None)] * 2 + [(0, None)] * 25
    )
    assert fit.value == pytest.approx(exact.fun, rel=1e-7)
    assert fit.params["alpha"] == pytest.approx(exact.x[1], abs=1e-6)


# Known laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", scaling.OBJECTIVES)
def test_the_chinchilla_law_is_recovered_without_noise(objective):
    N, D = design()
    fit = fit_surface(N, D, evaluate_law("surface", CHINCHILLA, N, D), objective=objective, bootstrap=0)
    for name, value in CHINCHILLA.items():
        assert fit.params[name] == pytest.approx(value, rel=1e-6), name
    assert fit.a == pytest.approx(0.3658 / (0.3478 + 0.3658), rel=1e-6)
    assert fit.starts_agreeing >= 0.9 * fit.starts


def test_most_starts_of_hoffmanns_grid_reach_the_best_optimum_on_noisy_rows():
    N, D = design()
    fit = fit_surface(N, D, noisy(CHINCHILLA, N, D, 0.01), bootstrap=0)
    assert fit.starts == 4500
    assert fit.starts_agreeing >= 0.9 * fit.starts


def test_what_repeats_are_worth_is_recovered_without_noise():
    N, D, U = repeated()
    fit = fit_data_constrained(
        N, D, U, evaluate_law("data-constrained", REPEATED, N, D, U), objective="lsq", bootstrap=0
    )
    assert fit.params == pytest.approx(REPEATED, rel=1e-6)
    assert fit.starts_agreeing > 0.3 * fit.starts
    assert fit.predict(1e9, 1e11, 1e10)["loss"][0] == pytest.approx(
        evaluate_law("data-constrained", REPEATED, 1e9, 1e11, 1e10)
    )
    fresh = fit.surface()
    assert fresh.form == "surface" and set(fresh.params) == set(CHINCHILLA)
    assert fresh.optimal(1e20)["params"][0] == fit.optimal(1e20)["params"][0]
    with pytest.raises(LabError, match="data-constrained"):
        fresh.surface()


def test_units_do_not_matter():
    N, D = design(80)
    L = noisy(CHINCHILLA, N, D, 0.01)
    one, other = fit_surface(N, D, L, bootstrap=0), fit_surface(N / 1e6, D / 1e9, L, bootstrap=0)
    assert other.value == pytest.approx(one.value, rel=1e-9)
    assert other.params["alpha"] == pytest.approx(one.params["alpha"], rel=1e-6)
    assert other.params["A"] == pytest.approx(one.params["A"] * 1e6 ** -one.params["alpha"], rel=1e-5)


def test_power_laws_with_and_without_a_floor_and_growth():
    x = np.geomspace(1e4, 1e7, 9)
    floor = fit_power(x, 2.0 + 35 * x**-0.3, floor=True)
    assert [floor.params[n] for n in ("E", "A", "alpha")] == pytest.approx([2.0, 35, 0.3], rel=1e-6)
    assert set(floor.status.values()) == {"identified"}
    plain = fit_power(x, 9 * x**-0.1)
    assert plain.params == pytest.approx({"A": 9, "alpha": 0.1}, rel=1e-9)
    growth = fit_growth(x, 0.2 * x**0.5)
    assert growth.params == pytest.approx({"k": 0.2, "a": 0.5}, rel=1e-9)
    assert growth.a == growth.params["a"]
    assert growth.predict(4e8)["value"][0] == pytest.approx(0.2 * 2e4)


def test_huber_shrugs_off_outliers_that_least_squares_follows():
    N, D = design()
    L = noisy(CHINCHILLA, N, D, 0.003)
    L[:5] *= 1.5
    huber = fit_surface(N, D, L, bootstrap=0).params["beta"]
    squares = fit_surface(N, D, L, objective="lsq", bootstrap=0).params["beta"]
    assert abs(huber - CHINCHILLA["beta"]) < 0.01 < abs(squares - CHINCHILLA["beta"])


def test_an_outlier_that_takes_least_squares_along_does_not_keep_the_best_optimum_hidden():
    x = np.geomspace(1e18, 3e21, 36)
    y = (1.7 + 900 * x**-0.15) * np.exp(0.01 * np.random.default_rng(0).standard_normal(36))
    y[0] *= 2.2
    fit = fit_power(x, y, floor=True, bootstrap=0)
    true = fit_power(x[1:], y[1:], floor=True, bootstrap=0)
    law = evaluate_law("power", true.params, x)  # which is in reach
    assert fit.value <= huber(np.log(y / law), 1e-3).sum() * (1 + 1e-9)
    assert fit.params["alpha"] == pytest.approx(true.params["alpha"], rel=0.3)


def test_a_weight_of_two_is_the_row_twice():
    x = np.geomspace(1, 100, 8)
    y = 5 * x**-0.3 * np.exp(0.02 * np.random.default_rng(0).standard_normal(8))
    weights = np.where(np.arange(8) == 3, 2.0, 1.0)
    for objective in scaling.OBJECTIVES:
        weighted = fit_power(x, y, weights=weights, objective=objective, bootstrap=0)
        doubled = fit_power(np.append(x, x[3]), np.append(y, y[3]), objective=objective, bootstrap=0)
        assert weighted.value == pytest.approx(doubled.value, rel=1e-7)
        flat = 1e-2 if objective != "lsq" else 1e-6  # the optimum of absolute deviations may be a short flat stretch
        assert weighted.params == pytest.approx(doubled.params, rel=flat)
        alone = fit_power(x, y, objective=objective, bootstrap=0)
        assert weighted.value > alone.value * 1.001


def test_the_frontier_is_where_the_loss_is_lowest_at_equal_compute():
    fit = Fit("surface", CHINCHILLA)
    best = fit.optimal([1e20, 1e22])
    for row in best.itertuples():
        N = row.params * np.exp(np.linspace(-0.5, 0.5, 2001))
        L = evaluate_law("surface", CHINCHILLA, N, row.flops / 6 / N)
        assert abs(np.log(N[L.argmin()] / row.params)) < 1e-3
        assert row.loss == pytest.approx(L.min(), rel=1e-9)


# Certainty ------------------------------------------------------------------------------------------------------------


def test_few_points_get_wide_intervals_that_cover():
    x, hits = np.geomspace(1e5, 3e6, 4), 0
    for study in range(100):
        y = 20 * x**-0.2 * np.exp(0.003 * np.random.default_rng(study).standard_normal(4))
        low, high = fit_power(x, y, bootstrap=100, seed=study).intervals["alpha"]
        hits += low <= 0.2 <= high
    assert 91 <= hits <= 100


def test_a_prediction_interval_adds_the_seeds_spread():
    draws = np.random.default_rng(0).normal(3.0, 0.03, (20000, 2))
    low, high = prediction_interval(draws, 0.04)
    np.testing.assert_allclose(high - low, 2 * 1.96 * 0.05, rtol=0.02)
    narrow = prediction_interval(draws)
    np.testing.assert_allclose(narrow[1] - narrow[0], 2 * 1.96 * 0.03, rtol=0.03)
    assert prediction_interval(draws, 0.04)[0].tolist() == low.tolist()


def test_drawing_whole_clusters_widens_what_runs_of_one_size_share():
    rng = np.random.default_rng(2)
    sizes = np.repeat(np.geomspace(2e4, 1e6, 10), 8)
    D = np.exp(rng.uniform(np.log(3e5), np.log(3e7), 80))
    shared = np.repeat(0.02 * rng.standard_normal(10), 8)
    L = evaluate_law("surface", SMALL, sizes, D) * np.exp(shared + 0.001 * rng.standard_normal(80))
    rows = fit_surface(sizes, D, L, bootstrap=200)
    by_size = fit_surface(sizes, D, L, bootstrap=200, clusters=sizes)
    width = [np.diff(fit.intervals["alpha"])[0] for fit in (rows, by_size)]
    assert width[1] > 1.3 * width[0]


def test_a_collinear_design_is_told_in_plain_words():
    N = np.geomspace(1e7, 1e10, 40)
    fit = fit_surface(N, 20 * N, noisy(CHINCHILLA, N, 20 * N, 0.005), bootstrap=50)
    assert any("D = 20 N in" in w and "alpha and beta cannot be told apart" in w for w in fit.warnings)
    assert {fit.status[name] for name in ("A", "B", "alpha", "beta")} == {"not identified"}
    assert "cannot be told apart" in fit.sentence()
    wide = fit_surface(*design(40), noisy(CHINCHILLA, *design(40), 0.005), bootstrap=50)
    assert not wide.warnings and wide.a_status == "identified"
    assert fit.condition > 3 * wide.condition
    assert fit.a_status == "not identified" and "cannot be told apart" in fit.reasons["beta"]


def test_one_budget_shows_a_best_size_and_no_exponent():
    N = np.geomspace(1e8, 1e10, 15)
    D = 1e20 / 6 / N
    fit = fit_surface(N, D, noisy(CHINCHILLA, N, D, 0.001), bootstrap=50)
    assert any("one budget" in w for w in fit.warnings)
    assert fit.a_status == "not identified" and fit.status["alpha"] == fit.status["beta"] == "not identified"
    best = N[np.argmin(fit.predict(N, D)["loss"])]  # what it can show, it does
    assert best == N[np.argmin(evaluate_law("surface", CHINCHILLA, N, D))]


def test_a_loss_that_rises_is_no_law_of_falling():
    N, D = design(60)
    L = evaluate_law("surface", CHINCHILLA, N, D) * (D / 1e10) ** 0.3
    fit = fit_surface(N, D, L, bootstrap=50)
    assert any("does not fall with D" in w for w in fit.warnings) and fit.status["beta"] == "not identified"


def test_copies_of_rows_do_not_make_a_fit_surer():
    N, D = design(50)
    L = noisy(CHINCHILLA, N, D, 0.005)
    once = fit_surface(N, D, L, bootstrap=300)
    thrice = fit_surface(*(np.tile(v, 3) for v in (N, D, L)), bootstrap=300)
    assert any("100 of 150 rows are exact copies" in w for w in thrice.warnings) and not once.warnings
    widths = [np.diff(fit.intervals["alpha"])[0] for fit in (once, thrice)]
    assert widths[1] == pytest.approx(widths[0], rel=0.2)
    assert thrice.params == pytest.approx(once.params, rel=1e-4)


def test_what_repeats_are_worth_is_not_identified_from_few_epochs():
    N, D, U = repeated(80, most=2.0)
    L = evaluate_law("data-constrained", REPEATED, N, D, U) * np.exp(
        0.005 * np.random.default_rng(0).standard_normal(80)
    )
    fit = fit_data_constrained(N, D, U, L, bootstrap=200)
    assert fit.status["R_D"] == "not identified" and fit.status["alpha"] == "identified"
    once = fit_data_constrained(N, U, U, evaluate_law("surface", CHINCHILLA, N, U), bootstrap=50)
    assert any("distinct numbers of epochs" in w for w in once.warnings) and once.status["R_D"] == "not identified"


def test_another_optimum_as_good_takes_the_certainty_away():
    fit = Fit("power", {"A": 3.0, "alpha": 0.3}, {"A": (2.5, 3.5), "alpha": (0.28, 0.32)})
    fit.status = {"A": "identified", "alpha": "identified"}
    fit.rivals = pd.DataFrame({"A": [3.2], "alpha": [0.4], "value": [1.0]})
    scaling._doubt(fit)
    assert fit.status == {"A": "identified", "alpha": "not identified"}
    assert "alpha = 0.4" in fit.reasons["alpha"] and fit.reasons["alpha"] in fit.warnings


def test_the_profile_limit_of_least_squares_is_the_f_test():
    r, w = 0.01 * np.random.default_rng(0).standard_normal(40), np.ones(40)
    exact = 0.5 * (r**2).sum() / (40 - 3) * stats.f.ppf(0.95, 1, 37)  # of half the sum of squares
    assert profile_threshold(r, w, 3, "lsq", 1e-3) == pytest.approx(exact, rel=1e-12)
    assert profile_threshold(r, w, 3, "huber", 1.0) == pytest.approx(exact, rel=1e-12)
    # Absolute deviations of normal noise: the median's variance is pi / 2 times the mean's
    r = 0.01 * np.random.default_rng(0).standard_normal(20000)
    exact = 0.5 * stats.chi2.ppf(0.95, 1) * scaling.LAD_DELTA * 0.01 * np.sqrt(np.pi / 2)
    assert profile_threshold(r, np.ones(20000), 3, "lad", 1e-3) == pytest.approx(exact, rel=0.1)


def test_a_rows_pull_is_its_leverage_and_a_clusters_that_of_its_worst_direction():
    x = np.array([1.0, 1.5, 2.0, 2.5, 30.0, 40.0, 55.0])
    design, w = np.stack([np.ones(7), -np.log(x)], axis=1), np.linspace(1, 2, 7)
    hat = (
        np.sqrt(w)[:, None]
        * design
        @ np.linalg.inv(design.T @ (w[:, None] * design))
        @ (np.sqrt(w)[:, None] * design).T
    )
    np.testing.assert_allclose(scaling._pulls(design, w, np.arange(7)), np.diag(hat), rtol=1e-9)
    units = np.array([0, 0, 0, 1, 1, 2, 3])
    worst = [np.linalg.eigvalsh(hat[np.ix_(units == g, units == g)])[-1] for g in range(4)]
    np.testing.assert_allclose(scaling._pulls(design, w, units), np.minimum(worst, 2 / 3), rtol=1e-9)


def test_resamples_of_a_straight_line_spread_as_hc3_with_students_t():
    x = np.geomspace(1, 100, 40)
    sd = np.where(np.arange(40) % 10 == 0, 0.05, 0.01)  # of unequal noise
    y = 3 * x**-0.2 * np.exp(sd * np.random.default_rng(1).standard_normal(40))
    fit = fit_power(x, y, objective="lsq", bootstrap=4000)
    design = np.stack([np.ones(40), -np.log(x)], axis=1)
    inverse = np.linalg.inv(design.T @ design)
    pull = np.einsum("ij,jk,ik->i", design, inverse, design)
    scores = design * (fit.data["residual"].to_numpy() / (1 - pull))[:, None]
    hc3 = np.sqrt((inverse @ scores.T @ scores @ inverse)[1, 1])
    low, high = fit.intervals["alpha"]
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 38) * hc3, rel=0.1)


def weak_rows(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three tiny budgets of three sizes each and two cuts through them, as noisy as the tiniest runs are."""
    rng = np.random.default_rng(seed)
    C = np.repeat([1e9, 2e9, 4e9], 3)
    N = np.append(np.tile([6e3, 1e4, 1.4e4], 3), [6e3, 1e4, 6e3, 6e3, 6e3])
    D = np.append(C / 6 / N[:9], [4e4, 4e4, 2e4, 3e4, 9e4])
    return N, D, (4.0 * (D / 2e4) ** -0.03 + 0.8 * (N / 6e3) ** -0.1) * np.exp(0.01 * rng.standard_normal(len(N)))


@pytest.mark.parametrize("objective", scaling.OBJECTIVES)
@pytest.mark.parametrize("seed", range(2))
def test_an_interval_from_weak_rows_holds_its_own_prediction_and_stays_sane(seed, objective):
    N, D, L = weak_rows(seed)
    fit = fit_surface(N, D, L, objective=objective, bootstrap=60, seed=seed)
    for seed_sd in (0.0, 0.05):
        told = fit.predict(np.append(N, 2e4), np.append(D, 2e5), seed_sd=seed_sd)
        assert (told["low"] <= told["loss"]).all() and (told["loss"] <= told["high"]).all()
        assert told["high"].max() < 2 * L.max() and told["low"].min() > 0.25 * L.min()
    assert all(fit.intervals[name][0] <= value <= fit.intervals[name][1] for name, value in fit.params.items())
    assert fit.a_interval[0] <= fit.a <= fit.a_interval[1]
    assert fit.status["E"] != "identified" and fit.intervals["E"][1] <= L.max()


def test_an_interval_reaches_a_prediction_that_all_refits_miss():
    draws = np.random.default_rng(0).uniform(3.0, 3.1, (500, 1))
    low, high = prediction_interval(draws, 0.0, np.array([2.9]))
    assert low[0] == 2.9 and 3.09 < high[0] < 3.1
    low, high = prediction_interval(draws, 0.1, np.array([2.9]))
    assert low[0] == pytest.approx(2.9 - 1.96 * 0.1, abs=1e-3)
    assert high[0] == prediction_interval(draws, 0.1)[1][0]


def test_a_floor_that_ends_at_zero_may_still_be_large():
    N, D, L = weak_rows(1)
    fit = fit_surface(N, D, L, bootstrap=60)
    assert fit.params["E"] == 0
    assert fit.intervals["E"][1] > 0.25 * L.min() and fit.status["E"] == "not identified"
    assert "identified" not in {*fit.status.values(), fit.a_status}
    assert any("Floors from 0 to" in said for said in fit.warnings)


def test_two_sizes_do_not_make_a_law_in_size():
    N, D = np.repeat([1e7, 1e9], 20), np.tile(np.geomspace(1e9, 1e11, 20), 2)
    fit = fit_surface(N, D, noisy(CHINCHILLA, N, D, 0.002), bootstrap=50)
    assert any("2 distinct values of N" in w for w in fit.warnings)
    assert fit.status["alpha"] == "not identified"


@pytest.mark.parametrize("rows", [3, 4, 5])
def test_a_floor_from_few_points_is_not_called_identified(rows):
    x = np.geomspace(1e5, 1e6, rows)
    y = (2.0 + 20 * x**-0.25) * np.exp(0.003 * np.random.default_rng(rows).standard_normal(rows))
    fit = fit_power(x, y, floor=True)
    assert "identified" not in fit.status.values()
    if rows == 3:
        assert set(fit.status.values()) == {"not identified"} and any("too few" in w for w in fit.warnings)


def test_a_floor_that_is_not_there_is_found_absent():
    x = np.geomspace(1e3, 1e8, 30)
    fit = fit_power(x, 30 * x**-0.2 * np.exp(0.01 * np.random.default_rng(5).standard_normal(30)), floor=True)
    assert fit.status["E"] == "not identified"
    assert fit.status["alpha"] == "identified"


def test_without_a_bootstrap_nothing_is_assessed():
    fit = fit_power(np.geomspace(1, 10, 6), np.geomspace(3, 2, 6), bootstrap=0)
    assert set(fit.status.values()) == {"not assessed"} and len(fit.samples) == 0
    assert np.isnan(fit.predict(20.0)["low"][0])


def test_the_same_seed_gives_the_same_intervals():
    N, D = design(40)
    L = noisy(CHINCHILLA, N, D, 0.01)
    one, two, other = (fit_surface(N, D, L, bootstrap=50, seed=s) for s in (0, 0, 1))
    assert one.intervals == two.intervals != other.intervals


def test_a_fit_speaks_as_table_sentence_and_json():
    N, D = design(60)
    fit = fit_surface(N, D, noisy(CHINCHILLA, N, D, 0.01), bootstrap=50)
    assert list(fit.table().columns) == ["value", "low", "high", "status"]
    assert list(fit.table().index) == list(SURFACE.params)
    assert "N_opt grows as C^" in fit.sentence() and "[" in fit.sentence()
    told = json.loads(json.dumps(fit.to_dict(), allow_nan=False))
    assert told["n"] == 60 and told["form"] == "surface" and told["a_interval"][0] < told["a"] < told["a_interval"][1]
    assert set(told["params"]) == set(told["intervals"]) == set(told["status"]) == set(SURFACE.params)
    assert len(fit.data) == 60
    np.testing.assert_allclose(np.log(fit.data["observed"] / fit.data["predicted"]), fit.data["residual"], atol=1e-12)


def test_bad_rows_are_named_and_too_few_are_refused():
    N, D = design(20)
    L = evaluate_law("surface", CHINCHILLA, N, D)
    for bad in (np.nan, -1.0, np.inf, 0.0):
        broken = L.copy()
        broken[7] = bad
        with pytest.raises(LabError, match="row 7"):
            fit_surface(N, D, broken)
    with pytest.raises(LabError, match="one length"):
        fit_surface(N, D[:-1], L)
    with pytest.raises(LabError, match="at least 5 rows"):
        fit_surface(N[:4], D[:4], L[:4])
    with pytest.raises(LabError, match="one cluster a row"):
        fit_surface(N, D, L, clusters=[1, 2])
    with pytest.raises(LabError, match="huber, lsq, lad"):
        fit_surface(N, D, L, objective="l2")
    with pytest.raises(LabError, match="delta"):
        fit_surface(N, D, L, delta=0.0)
    with pytest.raises(LabError, match="params and tokens"):
        Fit("surface", CHINCHILLA).predict(1e9)
