"""Variants against a baseline, seed by seed: paired differences with a pooled variance and Holm's correction."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats

from tinylm.errors import LabError


def contrasts(frame: pd.DataFrame, baseline: str, by: str = "variant", loss: str = "val_loss") -> pd.DataFrame:
    """Each variant at its best learning rate (lowest mean over seeds) against the baseline at its own.

    frame: one row a run, with ``by``, ``learning_rate``, ``seed`` and ``loss`` (nats per token). Seeds see the same text in the
    same order, so differences are paired; a rate at which a seed diverged is not a candidate. The variance of a difference is
    pooled over all variants, which with few seeds is steadier than each one's own. Returns one row a variant: ``rate``,
    ``edge`` (the best rate is the lowest or highest tried), ``loss``, ``seed_sd``, ``seeds``, ``difference``, ``low`` and ``high``
    (95 % interval), ``p`` (two-sided Student's t) and ``verdict`` after Holm's correction (1979) over all variants at 5 %.
    """
    best: dict[str, pd.Series] = {}
    edges = {}
    for name, runs in frame.groupby(by, sort=False):
        losses = runs.pivot(index="seed", columns="learning_rate", values=loss).dropna(axis=1)
        if losses.empty:
            continue
        best[name] = losses[losses.mean().idxmin()]
        rates = sorted(runs["learning_rate"].unique())
        edges[name] = best[name].name in (rates[0], rates[-1])
    if baseline not in best:
        raise LabError(
            "A comparison needs its baseline, with at least one learning rate that no seed diverged at", baseline
        )
    pairs = {name: (losses - best[baseline]).dropna() for name, losses in best.items() if name != baseline}
    freedom = sum(len(pair) - 1 for pair in pairs.values())
    pooled = np.sqrt(sum(((pair - pair.mean()) ** 2).sum() for pair in pairs.values()) / freedom) if freedom else np.nan
    rows = []
    for name, losses in best.items():
        row = {by: name, "rate": losses.name, "edge": edges[name], "loss": losses.mean(), "seed_sd": losses.std()}
        row |= {"seeds": len(losses), "difference": 0.0, "low": np.nan, "high": np.nan, "p": np.nan}
        if name in pairs:
            error = pooled / np.sqrt(len(pairs[name]))
            half = error * stats.t.ppf(0.975, freedom) if freedom else np.nan
            mean = pairs[name].mean()
            row |= {"difference": mean, "low": mean - half, "high": mean + half}
            row["p"] = 2 * stats.t.sf(abs(mean) / error, freedom) if freedom else np.nan
        rows.append(row)
    table = pd.DataFrame(rows)
    return table.assign(verdict=_holm(table))


def _holm(table: pd.DataFrame) -> list[str]:
    """``worse``, ``better`` or ``not told apart`` for each row, smallest p first against 5 % over the number still open."""
    verdicts = pd.Series("not told apart", index=table.index)
    verdicts[table.p.isna()] = "–"
    open_rows = table[table.p.notna()].sort_values("p")
    for rank, (index, row) in enumerate(open_rows.iterrows()):
        if row.p > 0.05 / (len(open_rows) - rank):
            break
        verdicts[index] = "worse" if row.difference > 0 else "better"
    return verdicts.tolist()
