"""Forms of laws and their optimiser: derivatives are right, no start goes uphill, and what is held stays where it is."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from tinylm.study.coverage import CHINCHILLA, spread
from tinylm.study.forms import (
    DATA_CONSTRAINED,
    FORMS,
    GROWTH,
    POWER_FLOOR,
    SURFACE,
    PowerSum,
    evaluate_law,
    form_of,
    hoffmann_grid,
    minimise,
    objective_and_gradient,
    solve,
)

# Muennighoff et al. 2023, huggingface/datablations: constants and worked example of the authors' README.
REPEATED = {"E": math.exp(0.6254804), "A": math.exp(6.255414), "B": math.exp(7.3049974)}
REPEATED |= {"alpha": 0.3526596, "beta": 0.3526596, "R_D": 15.387756, "R_N": 5.309743}


def somewhere(form: PowerSum, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """30 rows of centred log variables and three parameter vectors; for repetition, epochs below and above one."""
    X = rng.standard_normal((3, 30))
    X[1] = X[2] + 1.5 * rng.standard_normal(30)
    theta = rng.uniform(0.1, 0.8, (3, len(form.params)))
    return (X if form is DATA_CONSTRAINED else X[:2] if form is SURFACE else X[:1]), theta


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f.name}{len(f.params)}")
@pytest.mark.parametrize("delta", [0.05, np.inf])
def test_gradient_equals_finite_differences(form, delta):
    rng = np.random.default_rng(0)
    X, theta = somewhere(form, rng)
    y, w = rng.standard_normal(30), rng.uniform(0.5, 2, 30)
    _, gradient = objective_and_gradient(form, theta, X, y, w, delta)
    for i in range(theta.shape[1]):
        step = np.zeros(theta.shape[1])
        step[i] = 1e-6
        up, _ = objective_and_gradient(form, theta + step, X, y, w, delta)
        down, _ = objective_and_gradient(form, theta - step, X, y, w, delta)
        np.testing.assert_allclose(gradient[:, i], (up - down) / 2e-6, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", [SURFACE, POWER_FLOOR, GROWTH], ids=lambda f: f.name)
def test_curvature_equals_finite_differences_of_the_jacobian(form):
    rng = np.random.default_rng(1)
    X = rng.standard_normal((2, 20))
    psi = rng.standard_normal((2, 20))
    theta = rng.uniform(-0.5, 0.8, (2, len(form.params)))

    def weighted_slopes(at):
        shares = form.evaluate(at, X)[1]
        return (form.jacobian(shares, X) @ psi[:, :, None])[:, :, 0]

    shares = form.evaluate(theta, X)[1]
    curvature = form.curvature(psi, shares, form.jacobian(shares, X), X)
    for i in range(theta.shape[1]):
        step = np.zeros(theta.shape[1])
        step[i] = 1e-6
        slope = (weighted_slopes(theta + step) - weighted_slopes(theta - step)) / 2e-6
        np.testing.assert_allclose(curvature[:, i], slope, rtol=1e-5, atol=1e-6)


def test_minimise_never_goes_uphill_even_from_wild_starts():
    N, D = spread(60)(np.random.default_rng(0))
    X = np.log([N, D]) - np.log([N, D]).mean(axis=1)[:, None]
    y = np.log(evaluate_law("surface", CHINCHILLA, N, D) * np.exp(0.02 * np.random.default_rng(1).standard_normal(60)))
    starts = np.random.default_rng(0).uniform([-3, -8, -8, -1, -1], [3, 8, 8, 2, 2], (50, 5))
    before, _ = objective_and_gradient(SURFACE, starts, X, y, np.ones(60), 1e-3)
    theta, after = minimise(SURFACE, starts, X, y, np.ones(60), 1e-3, steps=30)
    assert (after <= before).all() and np.isfinite(theta).all()


def test_the_published_law_of_repetition_gives_its_published_losses():
    params, tokens = np.array([6.34e9, 8.67e9]), np.array([242e9, 178e9])
    losses = [2.2256440889984477, 2.2269634075087867]
    assert evaluate_law("data-constrained", REPEATED, params, tokens, 25e9) == pytest.approx(losses, rel=1e-12)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f.name}{len(f.params)}")
def test_theta_and_natural_parameters_are_one_law(form):
    rng = np.random.default_rng(2)
    X, theta = somewhere(form, rng)
    centre = rng.uniform(10, 20, len(X)) if form is not DATA_CONSTRAINED else np.array([17.0, 20.0, 20.0])
    natural = form.natural(theta, centre)
    assert form_of(form.name, natural.iloc[0].to_dict()) is form
    np.testing.assert_allclose(form.theta(natural, centre), theta, atol=1e-9)
    inputs = np.exp(X + centre[:, None])
    drawn = evaluate_law(form.name, natural, *inputs)
    np.testing.assert_allclose(np.log(drawn), form.evaluate(theta, X)[0], atol=1e-9)
    np.testing.assert_allclose(drawn[1], evaluate_law(form.name, natural.iloc[1].to_dict(), *inputs))


def test_without_limits_on_repeats_the_law_is_the_surface():
    N, D = spread(20)(np.random.default_rng(0))
    endless = CHINCHILLA | {"R_D": 1e9, "R_N": 1e12}
    exact = evaluate_law("surface", CHINCHILLA, N, D)
    np.testing.assert_allclose(evaluate_law("data-constrained", endless, N, D, D / 3), exact, rtol=1e-6)
    worthless = CHINCHILLA | {"R_D": 1e-9, "R_N": 1e12}  # only the distinct tokens count
    np.testing.assert_allclose(
        evaluate_law("data-constrained", worthless, N, D, D / 3),
        evaluate_law("surface", CHINCHILLA, N, D / 3),
        rtol=1e-6,
    )


@pytest.mark.parametrize("name", ["E", "A", "B", "alpha", "beta", "a"])
def test_a_parameter_that_is_held_stays_and_the_rest_is_optimal(name):
    N, D = spread(60)(np.random.default_rng(0))
    logs = np.log([N, D])
    centre = SURFACE.centre(logs)
    X, y = logs - centre[:, None], np.log(evaluate_law("surface", CHINCHILLA, N, D))
    truth = SURFACE.theta(pd.DataFrame([CHINCHILLA]), centre)
    natural = CHINCHILLA | {"a": CHINCHILLA["beta"] / (CHINCHILLA["alpha"] + CHINCHILLA["beta"])}
    row, right = SURFACE.held(name, 1.03 * natural[name], centre)
    theta, value = minimise(SURFACE, truth, X, y, np.ones(60), np.inf, held=(row[None], np.array([right])))
    found = SURFACE.natural(theta, centre).iloc[0]
    found["a"] = found["beta"] / (found["alpha"] + found["beta"])
    assert found[name] == pytest.approx(1.03 * natural[name], rel=1e-9) and value[0] > 0
    _, gradient = objective_and_gradient(SURFACE, theta, X, y, np.ones(60), np.inf)
    along = gradient[0] - row * (gradient[0] @ row) / (row @ row)
    assert np.abs(along).max() < 1e-4 * np.abs(gradient).max()


def test_a_limit_that_is_reached_does_not_stop_the_others():
    """Repeats as good as new text put R_D at its upper limit; the surface under it still comes back."""
    rng = np.random.default_rng(0)
    N, D = spread(60)(rng)
    law = CHINCHILLA | {"R_D": 1e12, "R_N": 8.0}
    U = D / np.exp(rng.uniform(0, 2, 60))
    y = np.log(evaluate_law("data-constrained", law, N, D, U))
    logs = np.log([N, D, U])
    centre = DATA_CONSTRAINED.centre(logs)
    start = DATA_CONSTRAINED.theta(pd.DataFrame([CHINCHILLA | {"R_D": 500.0, "R_N": 20.0}]), centre)
    theta, value = solve(DATA_CONSTRAINED, start, logs - centre[:, None], y, np.ones(60), [np.inf])
    found = DATA_CONSTRAINED.natural(theta, centre).iloc[0]
    assert found["R_D"] == pytest.approx(1e4) and value[0] < 1e-6
    assert found["alpha"] == pytest.approx(CHINCHILLA["alpha"], rel=1e-2)


def test_the_grid_counts_every_start_of_hoffmann_once():
    starts, times = hoffmann_grid(SURFACE, np.array([20.0, 24.0]), 1.0)
    assert times.sum() == 6 * 6 * 5 * 5 * 5 and len(starts) == len(times) < 1000
    share = np.exp(starts[:, :3] - 1.0)  # of the typical loss, at the centre of the data
    assert share.min() >= 0.2 - 1e-9 and share.max() <= 1 + 1e-9
