"""Optima read off runs: the best rate of a size, the best size of a budget, the frontier, and the laws they follow."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tinylm.errors import LabError
from tinylm.study.coverage import SMALL
from tinylm.study.optima import best_learning_rate, frontier, isoflop_minima, learning_rate_rule
from tinylm.study.scaling import Fit, evaluate_law, frontier_laws, isoflop_laws


def families(budgets=(1e11, 2e11, 4e11), sizes: int = 5, sd: float = 0.0, seed: int = 0, shift: float = 0.2):
    """IsoFLOP families of the SMALL law under C = 6 N D, three learning rates a size; the best rate falls with N."""
    rng, rows = np.random.default_rng(seed), []
    for C in budgets:
        middle = Fit("surface", SMALL).optimal(C)["params"][0]
        for N in middle * 1.7 ** (np.arange(sizes) - sizes // 2 + shift):
            D = C / 6 / N
            best = 0.012 * (N / 4e4) ** -0.35
            for rate in best * 1.15 * np.array([0.5, 1.0, 2.0]):
                L = evaluate_law("surface", SMALL, N, D) + 0.08 * np.log(rate / best) ** 2 + sd * rng.standard_normal()
                rows.append({"budget": C, "params_total": N, "tokens_seen": D, "learning_rate": rate, "val_loss": L})
    return pd.DataFrame(rows)


# Learning rates -------------------------------------------------------------------------------------------------------


def rates(losses: dict[float, float], **more) -> pd.DataFrame:
    rows = [
        {"learning_rate": r, "val_loss": L, "budget": 1e11, "params_total": 1000, **more} for r, L in losses.items()
    ]
    return pd.DataFrame(rows)


def test_the_best_rate_is_the_vertex_of_the_parabola():
    vertex = 0.0093
    losses = {r: 3.2 + 0.15 * np.log(r / vertex) ** 2 for r in (0.004, 0.008, 0.016)}
    row = best_learning_rate(rates(losses, tokens_seen=5000, family="a")).iloc[0]
    assert row["learning_rate"] == pytest.approx(vertex) and row["val_loss"] == pytest.approx(3.2)
    assert row["curvature"] == pytest.approx(0.15) and row["fitted"] and row["edge"] == ""
    assert row["tokens_seen"] == 5000 and row["family"] == "a"


def test_seeds_at_one_rate_count_by_their_mean():
    frame = pd.concat([rates({0.004: 3.3, 0.008: 3.1 + d, 0.016: 3.3}) for d in (-0.1, 0.1)])
    assert best_learning_rate(frame).iloc[0]["val_loss"] == pytest.approx(3.1)


@pytest.mark.parametrize(
    ("losses", "edge"),
    [
        ({0.004: 3.0, 0.008: 3.1, 0.016: 3.3}, "low"),
        ({0.004: 3.3, 0.008: 3.1, 0.016: 3.0}, "high"),
        ({0.008: 3.0}, "single"),
        ({0.004: 3.3, 0.008: 3.1, 0.016: np.nan}, ""),  # the larger rate was tried, and diverged
    ],
)
def test_an_optimum_at_the_edge_is_flagged(losses, edge):
    row = best_learning_rate(rates(losses)).iloc[0]
    assert row["edge"] == edge and not row["fitted"]
    assert row["val_loss"] == np.nanmin(list(losses.values()))


def test_a_diverged_run_counts_at_infinite_loss_whatever_it_recorded():
    frame = rates({0.004: 3.3, 0.008: 3.1, 0.016: 2.0}).assign(status=["finished", "finished", "diverged"])
    assert best_learning_rate(frame).iloc[0]["learning_rate"] == 0.008
    with pytest.raises(LabError, match="finite"):
        best_learning_rate(frame.assign(status="diverged"))


def test_the_rate_rule_recovers_powers_of_size_and_tokens():
    rows = []
    for N in (1e4, 3e4, 1e5):
        for D in (1e6, 4e6, 9e6):
            best = 0.01 * (N / 3e4) ** -0.4 * (D / 3e6) ** -0.2
            losses = {r: 3 + 0.1 * np.log(r / best) ** 2 for r in best * np.array([0.6, 1.2, 2.4])}
            rows.append(rates(losses).assign(budget=N * D, params_total=N, tokens_seen=D))
    rule = learning_rate_rule(pd.concat(rows))
    assert rule.form == "N and D" and rule.n == 9
    assert (rule.params_exponent, rule.tokens_exponent) == pytest.approx((-0.4, -0.2), abs=1e-6)
    assert rule.predict(1e6, 1e8) == pytest.approx(0.01 * (1e6 / 3e4) ** -0.4 * (1e8 / 3e6) ** -0.2)
    assert rule.predict(np.array([1e4, 1e5]), 1e6).shape == (2,)
    assert list(rule.table().index) == ["rate", "params_exponent", "tokens_exponent"]
    assert "tokens^-0.20" in rule.sentence()
    with pytest.raises(LabError, match="tokens"):
        rule.predict(1e6)


def test_the_rate_rule_uses_only_what_the_data_supports():
    frame = families(budgets=(1e11,))  # one budget: D = C / 6 N, so only N can be told
    rule = learning_rate_rule(frame)
    assert rule.form == "N" and rule.params_exponent == pytest.approx(-0.35, abs=1e-6)
    assert rule.predict(4e4) == pytest.approx(0.012, rel=1e-6)
    one = learning_rate_rule(frame[frame.params_total == frame.params_total.iloc[0]])
    assert one.form == "constant" and any("one rate for all" in w for w in one.warnings)


def test_optima_at_an_edge_do_not_bend_the_rate_rule():
    frame = families()
    first = frame.params_total == frame.params_total.min()
    frame.loc[first, "val_loss"] = 4 + frame.loc[first, "learning_rate"]  # falls towards the smallest rate tried
    rule = learning_rate_rule(frame)
    assert rule.edges == 1 and rule.n == 14 and any("1 of 15" in w for w in rule.warnings)
    assert rule.params_exponent == pytest.approx(-0.35, abs=1e-6)


# isoFLOPs -------------------------------------------------------------------------------------------------------------


def test_isoflop_minima_are_the_vertices_of_their_parabolas():
    N, rows = np.geomspace(2e4, 2e5, 5), []
    for C, centre in ((1e11, 5e4), (4e11, 9e4)):
        for size in N:
            L = 3 + 0.1 * np.log(size / centre) ** 2
            rows.append({"budget": C, "params_total": size, "tokens_seen": C / (7 * size**0.9), "val_loss": L})
    minima = isoflop_minima(pd.DataFrame(rows))
    assert minima["params_opt"].tolist() == pytest.approx([5e4, 9e4])
    assert minima["loss_min"].tolist() == pytest.approx([3, 3]) and minima["inside"].all()
    # D is read off the runs, whatever a token costs: here 7 N^0.9 FLOPs
    assert minima["tokens_opt"].tolist() == pytest.approx([C / (7 * N**0.9) for C, N in ((1e11, 5e4), (4e11, 9e4))])


def test_a_table_without_the_columns_is_refused_by_name():
    with pytest.raises(LabError, match="val_loss"):
        isoflop_minima(families().drop(columns="val_loss"))


def test_a_minimum_outside_its_sizes_is_flagged_and_enters_no_law():
    frame = families()
    low = frame[frame.budget == 4e11].params_total.quantile(0.6)
    frame = frame[~((frame.budget == 4e11) & (frame.params_total < low))]
    minima = isoflop_minima(frame)
    assert minima["inside"].tolist() == [True, True, False]
    edge = minima.iloc[2]
    assert edge["params_opt"] == frame[frame.budget == 4e11].params_total.min()
    laws = isoflop_laws(frame, bootstrap=50)
    assert laws.laws["N_opt"].n == 2 and any("4e+11" in w for w in laws.warnings)
    assert "Two budgets always lie on a line" in laws.laws["N_opt"].sentence()
    with pytest.raises(LabError, match="at least two budgets"):
        isoflop_laws(frame[frame.budget != 1e11])


def test_isoflop_laws_find_the_exponents_of_the_surface():
    laws = isoflop_laws(families(budgets=np.geomspace(1e11, 1e13, 5), sizes=7, shift=0.0), bootstrap=100).laws
    a = SMALL["beta"] / (SMALL["alpha"] + SMALL["beta"])
    assert laws["N_opt"].a == pytest.approx(a, abs=0.02)
    assert laws["D_opt"].a == pytest.approx(1 - a, abs=0.02)
    assert laws["N_opt"].a + laws["D_opt"].a == pytest.approx(1, abs=1e-3)
    assert laws["L_min"].params["alpha"] > 0


def test_isoflop_intervals_come_from_the_runs_and_cover():
    a, hits = SMALL["beta"] / (SMALL["alpha"] + SMALL["beta"]), 0
    for study in range(40):
        iso = isoflop_laws(families(sd=0.008, seed=study), bootstrap=200, seed=study)
        low, high = iso.laws["N_opt"].intervals["a"]
        hits += low <= a <= high
    assert 34 <= hits <= 40
    assert (iso.minima["params_low"] < iso.minima["params_opt"]).all()
    assert iso.scatter == pytest.approx(0.008, rel=0.8)
    assert set(iso.table().index.get_level_values("law")) == {"N_opt", "D_opt", "L_min"}


def test_three_sizes_a_budget_need_a_seed_spread_for_intervals():
    frame = families(sizes=3, sd=0.002)
    without = isoflop_laws(frame, bootstrap=50)
    assert any("give seed_sd" in w for w in without.warnings)
    assert np.isnan(without.laws["N_opt"].intervals["a"][0])
    low, high = isoflop_laws(frame, bootstrap=50, seed_sd=0.002).laws["N_opt"].intervals["a"]
    assert low < without.laws["N_opt"].a < high


# The frontier --------------------------------------------------------------------------------------------------------


def test_the_frontier_is_what_no_cheaper_run_reaches():
    C = np.array([4.0, 1.0, 2.0, 2.0, 8.0, 3.0])
    L = np.array([2.0, 4.0, 3.0, 2.9, 2.5, np.inf])
    assert frontier(C, L).tolist() == [1, 3, 0]
    rng = np.random.default_rng(0)
    C, L = rng.uniform(1, 9, 60), rng.uniform(2, 4, 60)
    beaten = [any((c >= C) & (loss > L)) for c, loss in zip(C, L, strict=True)]
    assert sorted(frontier(C, L)) == np.flatnonzero(~np.array(beaten)).tolist()


def test_the_laws_of_the_frontier_are_those_of_the_surface():
    rows = []
    for N in np.geomspace(1e4, 1e6, 25):
        for D in np.geomspace(3e5, 1e8, 40):  # as the points of a training curve would lie
            loss = evaluate_law("surface", SMALL, N, D)
            rows.append(
                {"flops": 6 * N * D, "params_total": N, "tokens_seen": D, "val_loss": loss, "run_id": f"{N:.0f}"}
            )
    frame = pd.DataFrame(rows)
    frame = frame[(frame.flops > 1e11) & (frame.flops < 1e13)]  # where the best size is among them
    found = frontier_laws(frame, run="run_id", bootstrap=60)
    a = SMALL["beta"] / (SMALL["alpha"] + SMALL["beta"])
    low, high = found.laws["N_opt"].intervals["a"]
    assert found.laws["N_opt"].a == pytest.approx(a, abs=0.03) and low < a < high
    assert found.laws["D_opt"].a == pytest.approx(1 - a, abs=0.03)
    assert found.laws["L_min"].params["alpha"] > 0
    assert (np.diff(found.points["val_loss"]) < 0).all() and (np.diff(found.points["flops"]) > 0).all()
    assert set(found.table().index.get_level_values("law")) == {"N_opt", "D_opt", "L_min"}
    with pytest.raises(LabError, match="two points"):
        frontier_laws(frame.assign(flops=1e12))
