"""Variants against a baseline, seed by seed: paired differences with a pooled variance and Holm's correction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from tinylm.errors import LabError


def contrasts(frame: pd.DataFrame, baseline: str, by: str = "variant", loss: str = "val_loss") -> pd.DataFrame:
    """Each variant at its best learning rate (lowest mean over seeds) against the baseline at its own.

    frame: one row a run, with ``by``, ``learning_rate``, ``seed`` and ``loss`` (nats per token). Seeds see the same text in the
    same order, so differences are paired; a rate at which a seed diverged is not a candidate. The best rate is chosen on the
    seeds that are tested, which flatters all alike. Spreads and p as in ``effects``. Returns one row a variant: ``rate``,
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
    found, _ = spreads(pairs)
    rows = []
    for name, losses in best.items():
        row = {by: name, "rate": losses.name, "edge": edges[name], "loss": losses.mean(), "seed_sd": losses.std()}
        row |= {"seeds": len(losses), "difference": 0.0, "low": np.nan, "high": np.nan, "p": np.nan}
        if name in pairs:
            spread, freedom = found[name]
            error, mean = spread / np.sqrt(len(pairs[name])), pairs[name].mean()
            half = error * stats.t.ppf(0.975, freedom) if freedom else np.nan
            row |= {"difference": mean, "low": mean - half, "high": mean + half}
            row["p"] = _p(mean, error, freedom) if freedom else np.nan
        rows.append(row)
    table = pd.DataFrame(rows)
    told = np.where(table.difference > 0, "worse", "better")
    told = np.where(holm(table.p.dropna()).reindex(table.index) < 0.05, told, "not told apart")
    return table.assign(verdict=np.where(table.p.isna(), "–", told))


# ------------------------------------------------------------------------------------------- effects at one fixed rate each

MARGIN = 0.01  # nats: what counts as equal, unless a claim says otherwise
PLANTED = 0.015  # nats: the difference that a study is planned to find
POWER = 0.8
ALIKE = 0.05  # spreads are pooled unless chance would make them so unalike more rarely than this


def effects(
    losses: dict[str, pd.Series],
    baseline: str,
    primary: Sequence[str],
    margin: float = MARGIN,
    alpha: float = 0.05,
    pool: bool = True,
) -> pd.DataFrame:
    """Each variant against the baseline, seed by seed, each at a rate that was chosen on other seeds.

    losses: for each variant and the baseline the losses (nats per token) by seed, NaN where a seed diverged. primary: the
    contrasts over which Holm's correction (1979) runs; for the others p stands uncorrected. Two questions are asked of each:
    is it different from the baseline (Student's t on paired differences), and is it equal to it within ``margin`` (two
    one-sided tests, Schuirmann 1987)? The variance is pooled over all variants, as ``spreads`` does it; without ``pool`` each
    has its own, with as many degrees of freedom as pairs less one.

    Returns one row a variant: seeds (pairs), diverged, loss and seed_sd (its own), difference, error (standard), freedom,
    low, high (at 1 - alpha: 95 %), low_90, high_90 (at 1 - 2 alpha), p, p_holm, p_equal, primary, own_spread (whether it has
    its own), unlike (p of the hypothesis that all spreads are alike), verdict (``equal`` within the margin, else ``worse`` or
    ``better``, else ``undecided``; ``diverges`` where a seed did) and more_seeds: how many seeds would decide it, were the
    difference what it seems (0 where it is decided).
    """
    base = losses[baseline]
    pairs = {name: (own - base.reindex(own.index)).dropna() for name, own in losses.items() if name != baseline}
    pairs = {name: pair for name, pair in pairs.items() if len(pair)}
    found, unlike = spreads(pairs, pool)
    rows = []
    for name, pair in pairs.items():
        own, (spread, freedom) = losses[name], found[name]
        mean, error = pair.mean(), spread / np.sqrt(len(pair))
        ends = {}
        for tail, suffix in ((alpha / 2, ""), (alpha, "_90")):
            half = error * stats.t.isf(tail, freedom)
            ends |= {f"low{suffix}": mean - half, f"high{suffix}": mean + half}
        rows.append(
            {"variant": name, "seeds": len(pair), "diverged": int(own.isna().sum()), "loss": own.mean(),
             "seed_sd": own.std(), "difference": mean, "error": error, "freedom": freedom, **ends,
             "p": _p(mean, error, freedom), "primary": name in primary,
             "p_equal": 0.5 * _p(margin - abs(mean), error, freedom) if abs(mean) < margin else 1.0,
             "own_spread": spread == float(pair.std()), "unlike": unlike}
        )  # fmt: skip
    table = pd.DataFrame(rows)
    corrected = holm(table.p[table.primary])
    table["p_holm"] = corrected.reindex(table.index)
    table["verdict"] = [_told(row, margin, alpha) for row in table.itertuples()]
    family = alpha / max(1, int(table.primary.sum()))
    table["more_seeds"] = [
        0 if row.verdict != "undecided" else _seeds_to_decide(row, found[row.variant][0], margin, family, alpha)
        for row in table.itertuples()
    ]
    return table


def spreads(pairs: dict[str, pd.Series], pool: bool = True) -> tuple[dict[str, tuple[float, float]], float]:
    """For each variant the spread of one paired difference and its degrees of freedom, and the p of all being alike.

    Pooled over all variants, a spread from few seeds is steadier than each one's own, but where variants truly differ in
    theirs it is too wide for the quiet and too narrow for the noisy. So where Levene's test, about medians (Brown and Forsythe
    1974), says that chance would rarely make them so unalike, a variant whose own spread gives the wider interval has that.
    Without ``pool`` each has its own.
    """
    own = {name: (float(pair.std()), float(len(pair) - 1)) for name, pair in pairs.items()}
    groups = [pair.to_numpy(float) for pair in pairs.values() if len(pair) > 2 and pair.std() > 0]
    unlike = float(stats.levene(*groups, center="median").pvalue) if len(groups) > 1 else np.nan
    if not pool:
        return own, unlike
    pooled = pooled_spread(pairs)

    def width(spread: float, freedom: float) -> float:
        return spread * stats.t.isf(0.025, freedom) if freedom else 0.0

    wider = {name: max(pooled, mine, key=lambda found: width(*found)) for name, mine in own.items()}
    return wider if unlike < ALIKE else dict.fromkeys(pairs, pooled), unlike


def pooled_spread(pairs: dict[str, pd.Series]) -> tuple[float, float]:
    """The pooled standard deviation of paired differences (nats), and its effective degrees of freedom.

    pairs: differences by seed. Variants share the baseline, and some share their initial weights, so their differences go
    together and the pooled variance has fewer degrees of freedom than its rows suggest: Satterthwaite's (1946) number for
    that, from the covariances as they came out, which for few seeds errs on the safe side (Greenhouse and Geisser 1959). NaN
    and 0 where no variant has two seeds.
    """
    table = pd.DataFrame({name: pair for name, pair in pairs.items() if len(pair) > 1})
    if table.empty:
        return np.nan, 0.0
    there = table.notna().to_numpy(float)
    shared = np.maximum(
        there.T @ there - 1, 0
    )  # degrees of freedom that two variants have in common; their own on the diagonal
    covariance = table.cov(min_periods=2).fillna(0).to_numpy()
    squares = float(np.diag(covariance) @ np.diag(shared))
    if not squares > 0:  # changes that change nothing: all losses are the baseline's
        return 0.0, float(np.trace(shared))
    return float(np.sqrt(squares / np.trace(shared))), squares**2 / float((shared * covariance**2).sum())


def _p(mean: float, error: float, freedom: float) -> float:
    """Two-sided p of a mean, by Student's t; what has no error at all is either nothing or certain."""
    return float(mean == 0) if error == 0 else 2 * stats.t.sf(abs(mean) / error, freedom)


def half_width(errors: Sequence[float], freedoms: Sequence[float], level: float = 0.95) -> float:
    """Half the width of the interval of a sum or a difference of independent means with these standard errors and degrees of
    freedom, by Welch (1947): with a handful of seeds 1.96 errors would be too few."""
    squares = np.square(np.asarray(errors, float))
    if not squares.sum() > 0:
        return float(squares.sum())
    freedom = squares.sum() ** 2 / (squares**2 / np.asarray(freedoms, float)).sum()
    return float(np.sqrt(squares.sum()) * stats.t.ppf(0.5 * (1 + level), freedom))


def holm(p: pd.Series) -> pd.Series:
    """p-values with Holm's correction (1979): to be held against the level as they are."""
    ordered = p.sort_values()
    steps = ordered * np.arange(len(ordered), 0, -1)
    return steps.cummax().clip(upper=1.0).reindex(p.index)


def _told(row: tuple, margin: float, alpha: float) -> str:
    if row.diverged:
        return "diverges"
    if row.p_equal < alpha:
        return "equal"
    if (row.p_holm if row.primary else row.p) < alpha:
        return "worse" if row.difference > 0 else "better"
    return "undecided"


def _seeds_to_decide(row: tuple, sd: float, margin: float, family: float, alpha: float) -> int:
    """Seeds, more than there are, after which the difference of a row would be told from zero, or be shown to be equal,
    whichever is sooner; its degrees of freedom grow as the seeds do."""
    size, seeds = abs(row.difference), row.seeds + 1

    def decides(seeds: int) -> bool:
        error, freedom = sd / np.sqrt(seeds), row.freedom * (seeds - 1) / max(1, row.seeds - 1)
        return size > error * stats.t.isf(family / 2, freedom) or margin - size > error * stats.t.isf(alpha, freedom)

    if not sd > 0:
        return seeds
    distances = size / stats.norm.isf(family / 2), (margin - size) / stats.norm.isf(alpha)
    seeds = max(seeds, int(np.ceil((sd / max(distances)) ** 2)))  # Student's quantile asks for some more
    while not decides(seeds):
        seeds += 1 + seeds // 100
    return seeds


# --------------------------------------------------------------------------------------------------------------------- power


def power_to_tell(difference: float, sd: float, seeds: int, alpha: float, freedom: float | None = None) -> float:
    """The chance to tell a true difference (nats) from zero with so many pairs of seeds, by a two-sided t test at level
    alpha. sd: of one paired difference. freedom: of the sd, by default seeds - 1."""
    freedom = seeds - 1 if freedom is None else freedom
    limit, shift = stats.t.isf(alpha / 2, freedom), abs(difference) / (sd / np.sqrt(seeds))
    told = stats.nct.sf([limit, -limit], freedom, shift)  # far out in a tail scipy gives NaN for a chance of none
    return float(np.nan_to_num(told[0], nan=1.0) + 1 - np.nan_to_num(told[1], nan=1.0))


def power_to_equal(margin: float, sd: float, seeds: int, alpha: float = 0.05, freedom: float | None = None) -> float:
    """The chance that two one-sided t tests at level alpha show equality within the margin (nats) where there is no
    difference at all (the first-order form of Phillips 1990)."""
    freedom = seeds - 1 if freedom is None else freedom
    reach = margin / (sd / np.sqrt(seeds)) - stats.t.isf(alpha, freedom)
    return float(max(0.0, 2 * stats.t.cdf(reach, freedom) - 1))


def seeds_for(power_of: Callable[[int], float], power: float = POWER, most: int = 1000) -> int:
    """The fewest seeds, at least two, with which ``power_of(seeds)`` reaches the power; ``most`` where that many do not."""
    low, high = 2, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if power_of(middle) >= power else (middle + 1, high)
    return low


def null_test(losses: Sequence[float], size: int = 5, splits: int = 1000, alpha: float = 0.05, seed: int = 0) -> dict:
    """How often one baseline is told apart from itself: its seeds' losses (n,) are split at random, ``size`` against ``size``,
    paired as they come, and tested without any correction. Returns size, splits, false (how many were told apart) and
    ``rate``, which should be near alpha."""
    losses = np.asarray(losses, float)
    if len(losses) < 2 * size:
        raise LabError(
            f"Splits of {size} against {size} need {2 * size} seeds", len(losses), "train more seeds, or lower size"
        )
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(np.arange(len(losses)), (splits, 1)), axis=1)
    differences = losses[order[:, :size]] - losses[order[:, size : 2 * size]]
    false = int((_p_of(differences) < alpha).sum())
    return {"size": size, "splits": splits, "false": false, "rate": false / splits}


def planted_test(
    differences: Sequence[float],
    seeds: int,
    shift: float | None = PLANTED,
    sd: float | None = None,
    freedom: float | None = None,
    alpha: float = 0.05,
    draws: int = 1000,
    seed: int = 0,
) -> dict:
    """How often a variant that is worse by ``shift`` nats is found with so many seeds.

    differences (n,): paired differences of real runs, moved so that their mean is the shift (None leaves them as they are);
    each draw takes ``seeds`` of them, with replacement: without, a draw of most of them would know too much. sd, freedom: as
    pooled over a study's variants; by default each draw's own. alpha: of each test, corrected or not. Returns seeds, draws,
    found and ``share``.
    """
    differences = np.asarray(differences, float)
    if shift is not None:
        differences = differences - differences.mean() + shift
    rng = np.random.default_rng(seed)
    drawn = differences[rng.integers(len(differences), size=(draws, seeds))]
    found = int(((_p_of(drawn, sd, freedom) < alpha) & (drawn.mean(axis=1) > 0)).sum())
    return {"seeds": seeds, "draws": draws, "found": found, "share": found / draws}


def _p_of(differences: np.ndarray, sd: float | None = None, freedom: float | None = None) -> np.ndarray:
    """Two-sided p of paired differences (draws, n)."""
    n = differences.shape[1]
    spread = differences.std(axis=1, ddof=1) if sd is None else sd
    t = np.abs(differences.mean(axis=1)) / (spread / np.sqrt(n))
    return 2 * stats.t.sf(t, n - 1 if freedom is None else freedom)
