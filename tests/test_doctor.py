"""The fit doctor: it agrees with what is known exactly, finds what is wrong on purpose, and never praises what is not so."""

from __future__ import annotations

import json
import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from tinylm.errors import LabError
from tinylm.study import doctor
from tinylm.study.coverage import CHINCHILLA, SMALL, spread
from tinylm.study.doctor import diagnose, leave_out, outliers, profile_intervals, profiles, residual_bins
from tinylm.study.scaling import Fit, evaluate_law, fit_data_constrained, fit_power, fit_surface


def rows(count: int = 80, sd: float = 0.005, law: dict = CHINCHILLA, seed: int = 1):
    N, D = spread(count)(np.random.default_rng(0))
    return N, D, evaluate_law("surface", law, N, D) * np.exp(sd * np.random.default_rng(seed).standard_normal(count))


@pytest.fixture(scope="module")
def healthy():
    return diagnose(fit_surface(*rows(), bootstrap=300), bootstrap=100)


# Profiles -------------------------------------------------------------------------------------------------------------


def test_the_profile_of_a_straight_line_is_students_interval():
    x = np.geomspace(1, 100, 12)
    y = 3 * x**-0.4 * np.exp(0.02 * np.random.default_rng(0).standard_normal(12))
    line = stats.linregress(np.log(x), np.log(y))
    half = stats.t.ppf(0.975, 10) * line.stderr
    fit = fit_power(x, y, objective="lsq", bootstrap=100)
    found = profile_intervals(profiles(fit))
    assert found["alpha"] == pytest.approx((-line.slope - half, -line.slope + half), rel=1e-3)
    ends = np.exp(line.intercept + np.array([-1, 1]) * stats.t.ppf(0.975, 10) * line.intercept_stderr)
    assert found["A"] == pytest.approx(tuple(ends), rel=1e-3)


@pytest.mark.parametrize("objective", ["huber", "lsq", "lad"])
def test_profiles_rise_from_the_optimum_and_agree_with_the_bootstrap(objective):
    fit = fit_surface(*rows(), objective=objective, bootstrap=300)
    table = profiles(fit)
    assert list(table.columns) == ["parameter", "value", "delta", "threshold"]
    assert set(table["parameter"]) == {*CHINCHILLA, "a"}
    assert (table["delta"] >= 0).all()
    for name, (low, high) in profile_intervals(table).items():
        own = fit.a_interval if name == "a" else fit.intervals[name]
        assert low < (fit.a if name == "a" else fit.params[name]) < high
        assert 0.5 < (high - low) / (own[1] - own[0]) < 2, name


def test_a_profile_is_the_least_of_the_objective():
    """At each point nothing near, with the parameter held, is lower: held alpha leaves a law that can be fitted apart."""
    N, D, L = rows(40)
    fit = fit_surface(N, D, L, objective="lsq", bootstrap=50)
    table = profiles(fit, ["alpha"])
    for row in table[table["delta"] < 5 * table["threshold"]].itertuples():
        best = np.inf
        for beta in np.linspace(0.2, 0.7, 400):
            terms = np.stack([np.ones(40), N**-row.value / 1e-3, D**-beta / 1e-3], axis=1)
            best = min(best, np.linalg.lstsq(terms / L[:, None], np.ones(40), rcond=None)[1][0])
        # Squares of relative errors stand for squares of log errors to first order.
        assert fit.value + row.delta == pytest.approx(best, rel=0.05)


def test_what_is_not_bounded_is_said_to_be_flat():
    N = np.geomspace(1e7, 1e10, 30)
    L = evaluate_law("surface", CHINCHILLA, N, 20 * N) * np.exp(0.005 * np.random.default_rng(0).standard_normal(30))
    found = diagnose(fit_surface(N, 20 * N, L, bootstrap=100), bootstrap=0)
    assert {found.status[name] for name in ("A", "B", "alpha", "beta")} == {"not identified"}
    assert (
        "cannot be told apart" in found.verdicts["why"]["alpha"] and found.verdicts["status"]["a"] == "not identified"
    )
    # Reading a text twice at most leaves open how soon repeats are worth nothing.
    rng = np.random.default_rng(3)
    law = CHINCHILLA | {"R_D": 15.0, "R_N": 5.0}
    n, u = np.exp(rng.uniform(16, 22, 80)), 10 ** rng.uniform(8, 10.5, 80)
    d = u * rng.choice([1.0, 1.5, 2.0], 80)
    loss = evaluate_law("data-constrained", law, n, d, u) * np.exp(0.004 * rng.standard_normal(80))
    repeats = diagnose(fit_data_constrained(n, d, u, loss, bootstrap=100), bootstrap=0)
    assert repeats.status["R_D"] == "not identified"
    assert np.isinf(repeats.intervals["by profile"]["R_D"][1]) and "larger values" in repeats.verdicts["why"]["R_D"]


# What was not shown ---------------------------------------------------------------------------------------------------


def test_leaving_a_rung_out_is_fitting_without_it():
    N = np.tile(np.geomspace(1e8, 1e10, 6), 8)
    D = np.repeat(np.geomspace(1e9, 3e11, 8), 6) * np.exp(0.2 * np.random.default_rng(0).standard_normal(48))
    L = evaluate_law("surface", CHINCHILLA, N, D) * np.exp(0.004 * np.random.default_rng(1).standard_normal(48))
    fit = fit_surface(N, D, L, objective="lsq", bootstrap=0)
    runs, groups = leave_out(fit)
    assert len(groups) == 7 and groups.index[-1] == "largest runs" and (groups["rows"][:6] == 8).all()
    largest = N.max() == N
    without = fit_surface(N[~largest], D[~largest], L[~largest], objective="lsq", bootstrap=0)
    row = groups.iloc[5]
    assert row[list(CHINCHILLA)].to_dict() == pytest.approx(without.params, rel=1e-4)
    error = 100 * (L[largest] / without.predict(N[largest], D[largest])["loss"] - 1)
    assert row["mean_error_percent"] == pytest.approx(error.mean(), abs=1e-6)
    told = runs[runs["left_out"] == groups.index[5]]
    np.testing.assert_allclose(told["error_percent"], error, atol=1e-5)


def test_errors_of_held_out_runs_are_signed():
    """The largest runs came out worse than the law of the others says."""
    N, D, L = rows(80, 0.001)
    top = np.quantile(N * D, 0.9) <= N * D
    fit = fit_surface(N, D, np.where(top, 1.03 * L, L), bootstrap=0)
    _, groups = leave_out(fit)
    assert groups["mean_error_percent"]["largest runs"] == pytest.approx(3, abs=0.3)


def test_outliers_are_named_by_a_rule_and_their_weight_is_told():
    N, D, L = rows(100, 0.003)
    L[[3, 50]] *= 1.08
    fit = fit_surface(N, D, L, objective="lsq", bootstrap=200)
    far, without = outliers(fit)
    assert np.flatnonzero(far).tolist() == [3, 50]
    clean = fit_surface(N[~far], D[~far], L[~far], objective="lsq", bootstrap=0)
    assert {name: without[name] for name in CHINCHILLA} == pytest.approx(clean.params, rel=1e-4)
    assert outliers(fit_surface(*rows(60), bootstrap=0))[1] == {}
    found = diagnose(fit, bootstrap=0)
    assert list(found.outliers.index) == [3, 50]
    assert any("2 of 100 rows are outliers" in note and "4 robust standard deviations" in note for note in found.notes)


@pytest.mark.parametrize("objective", ["huber", "lsq"])
def test_a_value_that_outliers_decide_is_at_most_weak(objective):
    N, D, L = rows(60, 0.001)
    pulled = np.argsort(D)[0]
    L[pulled] *= 1.15  # the row that weighs most in beta, which least squares follows
    found = diagnose(fit_surface(N, D, L, objective=objective, bootstrap=200), bootstrap=0)
    assert list(found.outliers.index) == [pulled]
    assert found.without_outliers["beta"] == pytest.approx(CHINCHILLA["beta"], rel=0.02)
    decided = [name for name, row in found.verdicts.iterrows() if "1 outlying row decided" in row["why"]]
    assert ("beta" in decided) == (objective == "lsq")
    assert all(found.verdicts["status"][name] != "identified" for name in decided)


def test_residuals_that_lean_are_seen():
    N, D, L = rows(120, 0.003)
    bent = L * (1 + 0.01 * np.cos(2 * np.log(N)))
    straight, crooked = (diagnose(fit_surface(N, D, y, bootstrap=0), bootstrap=0) for y in (L, bent))
    assert not any("lean" in note for note in straight.notes)
    assert any("lean with params" in note for note in crooked.notes)
    table = residual_bins(crooked.fit)
    assert table.groupby("variable")["rows"].sum().to_dict() == {"params": 120, "tokens": 120}
    assert (table["low_percent"] < table["mean_percent"]).all()


def test_runs_of_one_size_that_share_their_errors_are_told():
    sizes = np.repeat(np.geomspace(2e4, 1e6, 12), 6)
    rng = np.random.default_rng(2)
    D = np.exp(rng.uniform(np.log(3e5), np.log(3e7), 72))
    shared = np.repeat(0.01 * rng.standard_normal(12), 6)
    L = evaluate_law("surface", SMALL, sizes, D) * np.exp(shared + 0.001 * rng.standard_normal(72))
    found = diagnose(fit_surface(sizes, D, L, bootstrap=200), bootstrap=200)
    by_run, by_size = (np.diff(found.intervals[way]["alpha"])[0] for way in ("by run", "by size"))
    assert by_size > 1.5 * by_run
    assert any("share their errors" in note for note in found.notes)


# Accounting -----------------------------------------------------------------------------------------------------------


def test_another_cost_of_a_token_is_another_exponent():
    """With C = k N^eta D the best size of the fitted surface, found by search, grows as the table says."""
    N, D, L = rows(80, 0.0)
    frame = pd.DataFrame({"N": N, "tokens_seen": D, "val_loss": L, "flops": 40 * N**0.8 * D})
    table = doctor.accounting(frame, {"total": "N"}, bootstrap=50)
    assert table["flops"].tolist() == ["6ND", "exact"] and table["eta"].tolist() == pytest.approx([1, 0.8])
    best = []
    for C in (1e20, 1e22):
        size = np.exp(np.linspace(np.log(1e7), np.log(1e12), 200_001))
        best.append(size[evaluate_law("surface", CHINCHILLA, size, C / (40 * size**0.8)).argmin()])
    assert table["a"][1] == pytest.approx(np.log(best[1] / best[0]) / np.log(100), abs=1e-3)
    assert table["a"][0] == pytest.approx(0.3658 / (0.3478 + 0.3658), rel=1e-5)


def test_what_survives_the_counting_is_told_from_what_does_not():
    rng = np.random.default_rng(0)
    blocks = np.exp(rng.uniform(np.log(1e4), np.log(1e6), 80))
    D = np.exp(rng.uniform(np.log(3e5), np.log(3e7), 80))
    total = blocks + 512 * 8 * blocks**0.33  # embeddings weigh most in small models
    L = evaluate_law("surface", SMALL, total, D) * np.exp(0.002 * rng.standard_normal(80))
    frame = pd.DataFrame({"params_total": total, "params_non_embedding": blocks, "tokens_seen": D, "val_loss": L})
    table = doctor.accounting(frame, bootstrap=200)
    assert table["params"].tolist() == ["total", "non-embedding"]
    said = doctor.survives(table)
    assert "beta survives" in said["beta"] and "alpha depends on how one counts" in said["alpha"]
    found = diagnose(fit_surface(total, D, L, bootstrap=100), accounting=table, bootstrap=0)
    assert "alpha depends on how one counts" in found.report()
    with pytest.raises(LabError, match="val_loss"):
        doctor.accounting(frame.drop(columns="val_loss"))


def test_the_head_counts_once_tied_or_not():
    frame = pd.DataFrame({"params_total": [150, 250], "params_non_embedding": [50, 50], "params_embedding": [100, 100]})
    ways = doctor.conventions(frame.assign(params_head=[0, 100]))
    assert ways["non-embedding and head"].tolist() == [150, 150]


# The verdict ----------------------------------------------------------------------------------------------------------


def test_a_healthy_fit_is_identified_and_says_why(healthy):
    assert set(healthy.verdicts["status"]) == {"identified"} and list(healthy.verdicts.index) == [*CHINCHILLA, "a"]
    assert healthy.status == dict.fromkeys(CHINCHILLA, "identified")
    assert healthy.verdicts["why"].str.contains("rises on both sides").all()
    assert any("At a limit of the search: none" in note for note in healthy.notes)
    assert any("held out" in note for note in healthy.notes)


def test_no_number_of_a_law_stands_alone(healthy):
    """Each parameter is written with its interval and its verdict."""
    for name in (*CHINCHILLA, "a"):
        assert re.search(rf"^ +{name} +[\d.]+ +\[[\d., ]+\] +identified", healthy.report(), re.MULTILINE), name


def test_a_diagnosis_is_json(healthy):
    told = json.loads(json.dumps(healthy.to_dict(), allow_nan=False))
    assert set(told["verdicts"]) == {*CHINCHILLA, "a"}
    assert told["verdicts"]["alpha"]["status"] == "identified"
    assert {row["left_out"] for row in told["left_out"]} == set(healthy.without_rung.index)
    assert set(told["intervals"]) == {"by run", "by size", "by profile"} and told["accounting"] is None


def test_without_a_bootstrap_the_profiles_judge():
    N, D, L = rows()
    found = diagnose(fit_surface(N, D, L, bootstrap=0), bootstrap=0)
    assert set(found.status.values()) == {"identified"}
    low, high = found.verdicts.loc["alpha", ["low", "high"]]
    assert low < CHINCHILLA["alpha"] < high
    noisy = diagnose(fit_surface(N[:12], D[:12], L[:12] * np.exp(0.05 * np.sin(N[:12])), bootstrap=0), bootstrap=0)
    assert "identified" not in {noisy.status["A"], noisy.status["alpha"]}


def test_few_rows_are_not_praised():
    x = np.geomspace(1e5, 1e6, 5)
    y = (2.0 + 20 * x**-0.25) * np.exp(0.003 * np.random.default_rng(5).standard_normal(5))
    found = diagnose(fit_power(x, y, floor=True), bootstrap=0)
    assert "identified" not in found.status.values()
    assert "nothing checks the law" in found.verdicts["why"]["E"]


def test_a_fit_without_rows_is_refused():
    with pytest.raises(LabError, match="rows behind the fit"):
        diagnose(Fit("surface", CHINCHILLA))
