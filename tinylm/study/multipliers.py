"""What a variant is worth in compute: how much of it the baseline would need for the variant's loss."""

from __future__ import annotations

import pandas as pd

from tinylm.errors import LabError
from tinylm.study.contrasts import contrasts
from tinylm.study.scaling import Fit

BASELINES = ("baseline", "the recipe")


def compute_multiplier(law: Fit, baseline: float, loss: float) -> float:
    """(L_baseline / L)^(1 / alpha) under L = A C^-alpha: 2 means that the baseline needs twice the compute for such a loss,
    0.5 that half would have done. Read off the law between losses, so far from its rows it is an extrapolation."""
    if "E" in law.params or law.form != "power":
        raise LabError("A compute multiplier is read off a power law without a floor", law.formula)
    return float((baseline / loss) ** (1 / law.params["alpha"]))


def variants(frame: pd.DataFrame, law: Fit | None = None) -> pd.DataFrame:
    """The variants of a study's runs (a ``variant`` column, several seeds) against their baseline, as ``contrasts`` gives
    them, and with a law the ``multiplier`` of each, with its ends from the interval of the difference."""
    names = set(frame["variant"]) if "variant" in frame else set()
    baseline = next((name for name in BASELINES if name in names), None)
    if baseline is None:
        raise LabError(
            "Runs of variants have one that is called baseline", ", ".join(sorted(map(str, names))) or "none"
        )
    table = contrasts(frame, baseline)
    if law is None:
        return table
    base = float(table.loc[table["variant"] == baseline, "loss"].iloc[0])
    for name, losses in (
        ("multiplier", table["loss"]),
        ("multiplier_low", base + table["high"]),
        ("multiplier_high", base + table["low"]),
    ):
        table[name] = [compute_multiplier(law, base, value) for value in losses]
    return table
