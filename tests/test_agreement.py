"""What must come out alike elsewhere: how it is told, what is told as wrong, and a look at two processes for real.

That it does come out alike is tested in test_cluster, test_ranks and test_exchange; ``make soak`` measures it.
"""

from __future__ import annotations

import pandas as pd
import pytest

from tinylm.study import agreement, bench, reliability

CLUSTER = {"hidden_size": 8, "max_steps": 900, "seed": 0, "status": "finished", "cut_off": True, "val_loss": 1.5}
CLUSTER |= {"val_loss_local": 1.5, "differs": ""}
RANKS = {"step": 200, "val_loss": 2.5, "val_loss_two": 2.5000025, "apart": 1e-6, "halves_apart": 1e-4}
EXCHANGE = {"model": "best.safetensors", "params_total": 80_000, "positions": 128, "largest": 20.0, "difference": 2e-5}
EXCHANGE |= {"relative": 1e-6, "tokens": 100, "same_tokens": 100, "same_text": True}
PAIRS = (100, 80), (100, 84), (100, 90)


def turns(*rates):
    """Turns of both kinds at one size, a pair a round."""
    return pd.DataFrame(
        {"params_total": 130_368, "contender": name, "round": number, "tokens_per_second": rate, "others": 0.01}
        for number, pair in enumerate(rates)
        for name, rate in zip((agreement.SIDE_BY_SIDE, agreement.RANKS), pair, strict=True)
    )


def told(folder, **tables):
    for name, rows in tables.items():
        reliability.keep(folder, name, {name: pd.DataFrame(rows)}, 1.0, 0)
    return reliability.draw(folder).read_text()


def wrong(name, **changes):
    row = {"cluster": CLUSTER, "ranks": RANKS, "exchange": EXCHANGE}[name]
    return agreement.SECTIONS[name].wrong(pd.DataFrame([row, {**row, **changes}]))


def test_what_agrees_is_told_with_its_figures(tmp_path):
    page = told(tmp_path, cluster=[CLUSTER] * 2, ranks=[RANKS], exchange=[EXCHANGE], pace=turns(*PAIRS))
    assert "**2 of 2** runs of a sweep on a Dask cluster" in page and "bit for bit." in page
    assert "to rounding: 1.0e-06 of the loss apart after 200 steps" in page and "comes to 1.0e-04." in page
    assert "**0.84** (0.82 to 0.87) at 130k parameters" in page and "Other work took 1.0% of the processor" in page
    assert "**1 of 1** exported models" in page and "2.0e-05 at most, and by 1.0e-06 of the largest" in page
    assert not [name for name in ("cluster", "ranks", "exchange") if wrong(name)]


def test_what_does_not_agree_is_told_and_counted(tmp_path):
    page = told(
        tmp_path,
        cluster=[CLUSTER, {**CLUSTER, "val_loss": 1.6, "differs": "curve, val_loss"}],
        ranks=[{**RANKS, "apart": 0.01}],
        exchange=[EXCHANGE, {**EXCHANGE, "same_text": False}],
    )
    assert "**1 of 2** runs of a sweep" in page and "bit for bit" not in page and "curve, val_loss" in page
    assert "does not give the losses of one" in page and "to rounding" not in page
    assert "**1 of 2** exported models" in page
    assert wrong("cluster", differs="status") == wrong("ranks", apart=0.01) == wrong("ranks", apart=float("nan")) == 1
    assert wrong("ranks", apart=9e-4) == 0 and wrong("ranks", apart=2e-3) == 1  # ten times what halved batches come to
    assert wrong("exchange", relative=2e-5) == wrong("exchange", same_tokens=99) == 1


def test_an_efficiency_is_taken_within_each_round():
    """As where the whole machine is slower in one round than in another."""
    table = agreement.efficiency(turns((100, 90), (10, 9), (50, 45))).set_index("contender")
    assert table.loc[agreement.RANKS, ["ratio", "ratio_low", "ratio_high"]].tolist() == pytest.approx([0.9] * 3)
    assert table.loc[agreement.RANKS, "rate"] == 45 and table.loc[agreement.SIDE_BY_SIDE, "ratio"] == 1


def test_steps_that_end_too_late_are_computed_and_not_counted(monkeypatch):
    clock, steps = [0.0], []

    def step():
        clock[0] += 1.0
        steps.append(clock[0])

    monkeypatch.setattr(agreement.time, "perf_counter", lambda: clock[0])
    assert agreement.steps_within(2.5, 4, step) == (2, 2.0) and len(steps) == 4
    assert agreement.steps_within(0.5, 2, step) == (1, 1.0)  # slower than was asked for: as long as it takes


@pytest.mark.slow
@pytest.mark.alone
def test_one_run_on_two_processes_is_timed_beside_two_runs(tmp_path):
    """Every contender takes its turns; how fast each is is for a machine that is quiet."""
    rows = agreement.pace(tmp_path, [bench.SHAPES["tiny"]], rounds=2, seconds=0.2, say=lambda words: None)
    assert sorted(rows["contender"]) == sorted([*agreement.CONTENDERS] * 2)
    assert (rows["tokens_per_second"] > 0).all() and rows["others"].between(0, 1).all()
    table = agreement.efficiency(rows).set_index("contender")
    assert 0 < table.loc[agreement.RANKS, "ratio"] < 3 and (table["rounds"] == 2).all()
