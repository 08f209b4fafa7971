"""Paired contrasts: a planted difference is found with its size, equal variants are told apart at the stated rate."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tinylm.errors import LabError
from tinylm.study.contrasts import contrasts


def runs(effects: dict[str, float], seeds: int = 4, noise: float = 0.01, draw: int = 0) -> pd.DataFrame:
    """Losses that share what a seed brings, with noise of their own; the best rate is the middle one."""
    rng = np.random.default_rng(draw)
    shared = rng.normal(0, 0.5, seeds)
    rows = []
    for name, effect in effects.items():
        for rate, price in ((0.01, 0.2), (0.02, 0.0), (0.04, 0.2)):
            for seed in range(seeds):
                loss = 3 + effect + price + shared[seed] + rng.normal(0, noise)
                rows.append({"variant": name, "learning_rate": rate, "seed": seed, "val_loss": loss})
    return pd.DataFrame(rows)


def test_a_planted_difference_is_found_and_what_seeds_share_cancels():
    table = contrasts(runs({"base": 0.0, "worse": 0.05, "same": 0.0}), "base").set_index("variant")
    assert table.loc["worse", "verdict"] == "worse" and table.loc["same", "verdict"] == "not told apart"
    assert table.loc["worse", "difference"] == pytest.approx(0.05, abs=0.03)
    assert table.loc["base", "seed_sd"] > 0.05 and table.loc["worse", "high"] - table.loc["worse", "low"] < 0.06
    assert (table.rate == 0.02).all() and not table.edge.any()


def test_equal_variants_are_rarely_told_apart():
    effects = {"base": 0.0, **{f"equal {i}": 0.0 for i in range(5)}}
    false = sum(
        (contrasts(runs(effects, draw=draw), "base").verdict.isin(["worse", "better"])).any() for draw in range(200)
    )
    assert false <= 25  # Holm keeps the chance of any at about 5 %, a little more as all share one baseline


def test_a_rate_at_which_a_seed_diverged_is_no_candidate():
    frame = runs({"base": 0.0, "wild": 0.0})
    lost = (frame.variant == "wild") & (frame.learning_rate == 0.02) & (frame.seed == 1)
    table = contrasts(frame.assign(val_loss=frame.val_loss.mask(lost)), "base").set_index("variant")
    assert table.loc["wild", "rate"] != 0.02 and table.loc["wild", "edge"]
    with pytest.raises(LabError, match="baseline"):
        contrasts(frame.assign(val_loss=np.nan), "base")
