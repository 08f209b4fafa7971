"""The field's known mistakes, made on purpose on one's own runs, to see how far each moves the law.

Kaplan et al. 2020 found that the best size grows as compute^0.73, Hoffmann et al. 2022 as compute^0.5. What lies between
them is bookkeeping and tuning, not nature: parameters counted without embeddings and compute as 6 N D (Pearce and Song
2024), losses read in the middle of a schedule, and rates that were not tuned for each size (Hoffmann et al. 2022; Porian
et al. 2024). ``read`` fits the surface with any of these mistakes; ``planned`` says what one would then train, and what
that costs by the law without them.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pandas as pd

from tinylm.errors import LabError
from tinylm.study.optima import best_learning_rate, isoflop_minima, require_columns
from tinylm.study.scaling import Fit, evaluate_law, fit_surface
from tinylm.study.tables import budgets_of

MISTAKES = {
    "non-embedding": "count parameters without embeddings",
    "mid-schedule": "take losses from the middle of longer runs",
    "one rate": "use one learning rate for all sizes",
    "6ND": "take 6 N D for the compute",
}
APART = (
    "forecast",
    "promised",
    "batches",
)  # families of runs that a study holds out of its fits, or trains at other batches


@dataclass(frozen=True)
class Reading:
    """What one makes of the runs. points: one row a size and length, at its best rate, with ``N`` as it was counted,
    params_total, tokens_seen, flops (exact), val_loss and ``budget`` (NaN outside families of equal compute). cost: k and eta
    of the FLOPs a token, k N^eta, as they were counted. a: exponent of the best size, with its 95 % interval."""

    mistakes: tuple[str, ...]
    points: pd.DataFrame
    fit: Fit
    cost: tuple[float, float]
    a: float
    a_low: float
    a_high: float

    @property
    def minima(self) -> pd.DataFrame:
        """The best size of each budget, as ``optima.isoflop_minima`` finds it; sizes as they were counted."""
        return isoflop_minima(self.points[self.points["budget"].notna()], params="N")

    def best_size(self, flops: float) -> float:
        """The size that this reading holds best for a budget of FLOPs, as it counts both."""
        sizes = np.geomspace(self.points["N"].min() / 30, self.points["N"].max() * 3000, 4000)
        k, eta = self.cost
        return float(sizes[np.argmin(evaluate_law("surface", self.fit.params, sizes, flops / (k * sizes**eta)))])


def unavailable(frame: pd.DataFrame) -> dict[str, str]:
    """The mistakes that these runs do not allow, each with the reason."""
    found = {}
    if "params_non_embedding" not in frame:
        found["non-embedding"] = "the table does not tell parameters without embeddings"
    elif (frame["params_non_embedding"] <= 0).any():
        found["non-embedding"] = "some models have no parameters beside embeddings"
    if "curve" not in frame:
        found["mid-schedule"] = "the table holds no curves, only final losses"
    if "learning_rate" not in frame or frame.groupby("params_total")["learning_rate"].nunique().max() < 2:
        found["one rate"] = "no size was tried at several learning rates"
    if "flops" not in frame:
        found["6ND"] = "the table has no exact FLOPs: 6 N D is all there is"
    return found


def read(frame: pd.DataFrame, mistakes: Collection[str] = (), bootstrap: int = 200, seed: int = 0) -> Reading:
    """Fit L(N, D) to runs (params_total, tokens_seen, val_loss; and what the mistakes need, see ``unavailable``), with
    the named mistakes made. Runs that diverged or read their text more than once are left out, and so is what a study
    keeps apart from its own fits (see ``kept_apart``)."""
    require_columns(frame, _NEEDED)
    missing = unavailable(frame)
    for name in mistakes:
        if name not in MISTAKES:
            raise LabError(f"The mistakes are {', '.join(MISTAKES)}", repr(name))
        if name in missing and name != "6ND":
            raise LabError(f"These runs do not allow to {MISTAKES[name]}", missing[name])
    points = points_of(frame, "one rate" in mistakes)
    if "mid-schedule" in mistakes:
        points = _mid_schedule(points, frame)
    points["N"] = points["params_non_embedding" if "non-embedding" in mistakes else "params_total"].astype(float)
    fit = fit_surface(points["N"], points["tokens_seen"], points["val_loss"], bootstrap=bootstrap, seed=seed)
    cost = (6.0, 1.0)
    if "6ND" not in mistakes and "flops" in frame:
        per_token = np.log(points["flops"] / points["tokens_seen"])
        eta, log_k = np.polyfit(np.log(points["N"]), per_token, 1)
        cost = (float(np.exp(log_k)), float(eta))
    alpha, beta = fit.params["alpha"], fit.params["beta"]
    a, low, high = beta / (alpha + cost[1] * beta), np.nan, np.nan
    if len(fit.samples):
        draws = fit.samples["beta"] / (fit.samples["alpha"] + cost[1] * fit.samples["beta"])
        low, high = np.quantile(draws, [0.025, 0.975])
    return Reading(tuple(m for m in MISTAKES if m in mistakes), points, fit, cost, float(a), float(low), float(high))


_NEEDED = ("params_total", "tokens_seen", "val_loss")


def kept_apart(frame: pd.DataFrame) -> pd.Series:
    """Which runs of a study never enter a fit: those that a forecast or a plan was held against, and those of other
    batches than the recipe's."""
    return frame["family"].isin(APART) if "family" in frame else pd.Series(False, index=frame.index)


def _usable(frame: pd.DataFrame) -> pd.DataFrame:
    """Finished runs on fresh text that a fit may see, with ``place``: one number for each size and length."""
    require_columns(frame, _NEEDED)
    kept = frame[~kept_apart(frame)]
    kept = kept[kept["status"].isin(["finished", "early_stopped"])] if "status" in kept else kept
    if "epochs" in kept:
        kept = kept[~(pd.to_numeric(kept["epochs"]) > 1.02)]
    kept = kept[kept["val_loss"].notna()].copy()
    if not len(kept):
        raise LabError("Some runs must have finished on fresh text", f"0 of {len(frame)}")
    lengths = np.round(np.log(kept["tokens_seen"].astype(float)) / 0.02)
    kept["place"] = kept.groupby(["params_total", lengths]).ngroup()
    if "flops" not in kept:
        kept["flops"] = 6.0 * kept["params_total"] * kept["tokens_seen"]
    return kept


def points_of(frame: pd.DataFrame, one_rate: bool = False) -> pd.DataFrame:
    """The runs as points to fit, one for each size and length, at its best learning rate (or near one rate for all)."""
    kept = _usable(frame)
    if "learning_rate" not in kept:
        numbers = kept.select_dtypes("number").columns.drop("place")
        best = kept.groupby("place", as_index=False)[list(numbers)].mean()
    else:
        best = best_learning_rate(kept, ("place", "params_total"))
        if one_rate:  # the rate that suits the smallest size, or what was tried nearest to it
            smallest = best[best["params_total"] == best["params_total"].min()]
            rate = np.exp(np.log(smallest["learning_rate"]).mean())
            means = kept.groupby(["place", "learning_rate"], as_index=False)["val_loss"].mean()
            means["far"] = np.abs(np.log(means["learning_rate"] / rate))
            nearest = means.loc[means.groupby("place")["far"].idxmin()].set_index("place")
            for name in ("learning_rate", "val_loss"):
                best[name] = best["place"].map(nearest[name])
    for name in ("tokens_seen", "flops"):  # of runs nearly alike in length: the median
        best[name] = best["place"].map(kept.groupby("place")[name].median())
    best["budget"] = budgets_of(best["flops"])[0]
    if "budget" in kept:  # the study's own families
        own = pd.to_numeric(kept["budget"], errors="coerce").groupby(kept["place"]).max()
        best["budget"] = best["place"].map(own.where(own > 0))
    sizes = best.groupby("budget")["params_total"].transform("nunique")
    best["budget"] = best["budget"].where(sizes >= 3)
    return best


def _mid_schedule(points: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    """Each point's loss as the longest run of its size passed that length; the longest keep their own."""
    kept = _usable(frame)
    points = points.copy()
    for size, own in points.groupby("params_total"):
        runs = kept[kept["params_total"] == size]
        longest = runs[runs["tokens_seen"] > 0.98 * runs["tokens_seen"].max()]
        curve = longest.loc[longest["val_loss"].idxmin(), "curve"]
        tokens, losses = (np.array([point[name] for point in curve], float) for name in ("tokens", "val_loss"))
        shorter = own.index[(own["tokens_seen"] < 0.9 * tokens[-1]) & (own["tokens_seen"] >= tokens[0])]
        points.loc[shorter, "val_loss"] = np.interp(np.log(points.loc[shorter, "tokens_seen"]), np.log(tokens), losses)
    return points


@dataclass(frozen=True)
class Planned:
    """A run for a budget by a reading. params: in total; tokens: what the budget truly buys; loss: what the law without
    mistakes expects of it, with its 95 % interval; best_params: what that law would train; costs: nats above its best;
    compute: how many times the budget's worth the mistake costs (the best run for budget / compute does as well)."""

    flops: float
    params: float
    tokens: float
    loss: float
    low: float
    high: float
    best_params: float
    costs: float
    compute: float


def planned(honest: Reading, reading: Reading, flops: float) -> Planned:
    """What a reading would train for a budget of (exact) FLOPs, judged by the reading without mistakes."""
    size = reading.best_size(flops)
    if "non-embedding" in reading.mistakes:  # back to all parameters, along the runs' own sizes
        known = reading.points.drop_duplicates("N").sort_values("N")
        line = np.polyfit(np.log(known["N"]), np.log(known["params_total"]), 1)
        inside = known["N"].min() <= size <= known["N"].max()
        total = np.interp(np.log(size), np.log(known["N"]), np.log(known["params_total"]))
        size = float(np.exp(total if inside else np.polyval(line, np.log(size))))
    k, eta = honest.cost
    law = functools.partial(evaluate_law, "surface", honest.fit.params)

    def best_loss(budget: float) -> float:
        best = honest.best_size(budget)
        return float(law(best, budget / (k * best**eta)))

    tokens = flops / (k * size**eta)
    expected = honest.fit.predict(size, tokens).iloc[0]
    best, loss = honest.best_size(flops), float(expected["loss"])
    low, high = 0.0, 6.0  # ln of how many times less compute would have done; bisection
    for _ in range(30):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if best_loss(flops / np.exp(middle)) < loss else (low, middle)
    return Planned(
        flops, size, tokens, loss, float(expected["low"]), float(expected["high"]), best,
        max(0.0, loss - best_loss(flops)), float(np.exp(low)),
    )  # fmt: skip
