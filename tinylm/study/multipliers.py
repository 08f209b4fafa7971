"""What a difference in loss is worth in compute, along the baseline's own measured frontier.

A compute multiplier is C_base(L) / C: the compute that the baseline needs for the loss of a variant, over the compute that the
variant took. 1.2 means that the variant saves a sixth of the compute, 0.8 that it wastes a fifth. Nothing is extrapolated:
a loss that the frontier was not measured at has no multiplier, only a bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from tinylm.errors import LabError

REACH = 4.0  # budgets count from C / 4 to 4 C
FEWEST = 4  # budgets
GRID = 801


@dataclass
class Frontier:
    """The baseline's loss around one compute: a parabola of loss in x = log(C / ``flops``), or a line where that does not fall
    throughout, through the mean losses of its budgets.

    points: one row a budget: flops, loss (mean, nats per token), seeds, sd. spread: the pooled standard deviation of a seed,
    with its degrees of freedom. shape: ``parabola`` or ``line``. x: the grid (G,) between the budgets. curve: losses on it
    (G,). draws (R, G): the same, with the seeds' noise drawn again.
    """

    flops: float
    points: pd.DataFrame
    spread: float
    freedom: int
    shape: str
    x: np.ndarray
    curve: np.ndarray
    draws: np.ndarray

    @property
    def reach(self) -> tuple[float, float]:
        """The smallest and the largest compute measured, over that of the place."""
        return float(np.exp(self.x[0])), float(np.exp(self.x[-1]))

    @property
    def slope(self) -> float:
        """Nats that a factor e of compute takes away at the place."""
        return float(-np.interp(0.0, self.x, np.gradient(self.curve, self.x)))

    def loss_at(self, factor: float) -> float:
        """The loss at ``factor`` times the place's compute."""
        return float(np.interp(math.log(factor), self.x, self.curve))

    def gain(self, factor: float) -> tuple[float, np.ndarray]:
        """Nats that ``factor`` times the compute takes away, and the same of each draw (R,)."""
        x = math.log(factor)
        both = np.vstack([self.curve, self.draws])
        gains = np.array([np.interp(0.0, self.x, row) - np.interp(x, self.x, row) for row in both])
        return float(gains[0]), gains[1:]

    def factor(self, difference: float, curve: np.ndarray | None = None) -> float:
        """The compute, over the place's, at which the baseline loses ``difference`` nats more than it does at the place;
        the nearest end of the frontier where it was not measured there."""
        curve = self.curve if curve is None else curve
        level = np.interp(0.0, self.x, curve) + difference
        return float(np.exp(np.interp(-level, -curve, self.x)))


def fit_frontier(runs: pd.DataFrame, flops: float, draws: int = 2000, seed: int = 0) -> Frontier:
    """The baseline's frontier around ``flops``, from runs (columns budget, seed, flops, val_loss) with several seeds a budget.

    Raises LabError for fewer than four budgets from a quarter to four times the compute, or none with two seeds.
    """
    runs = runs[runs.val_loss.notna()]
    points = runs.groupby("budget").agg(flops=("flops", "mean"), loss=("val_loss", "mean"), seeds=("val_loss", "size"),
                                        sd=("val_loss", "std")).reset_index()  # fmt: skip
    near = points[(points.flops > flops / REACH * 0.97) & (points.flops < flops * REACH * 1.03)]
    if len(near) < FEWEST:
        raise LabError(
            f"A compute multiplier is read off at least {FEWEST} budgets from a quarter to four times the compute",
            f"{len(near)} around {flops:.3g} FLOPs",
            "train the baseline at more budgets there",
        )
    freedom = int((near.seeds - 1).sum())
    if not freedom:
        raise LabError("A frontier needs two seeds at one budget, or its noise is not known", "one seed each")
    spread = math.sqrt(float(((near.seeds - 1) * near.sd.fillna(0) ** 2).sum()) / freedom)
    at, losses = np.log(near.flops.to_numpy() / flops), near.loss.to_numpy()
    x = np.linspace(at[0], at[-1], GRID)
    rng = np.random.default_rng(seed)
    noise = spread * np.sqrt(freedom / rng.chisquare(freedom, draws))[:, None] * rng.standard_normal((draws, len(at)))
    drawn = losses + noise / np.sqrt(near.seeds.to_numpy())
    weights = np.sqrt(near.seeds.to_numpy())
    shape = "parabola"
    solve = _solution(at, x, weights, 2)
    if not (np.diff(solve @ losses) < 0).all():
        shape, solve = "line", _solution(at, x, weights, 1)
    curve = solve @ losses
    if curve[-1] >= curve[0]:
        raise LabError(
            "The baseline's loss must fall as its compute grows", ", ".join(f"{loss:.3f}" for loss in losses),
            "train the baseline with more seeds at these budgets, or choose other sizes",
        )  # fmt: skip
    redrawn = np.minimum.accumulate((solve @ drawn.T).T, axis=1) - 1e-9 * np.arange(GRID)  # falling, if by a hair
    return Frontier(flops, near.reset_index(drop=True), spread, freedom, shape, x, curve, redrawn)


def _solution(at: np.ndarray, x: np.ndarray, weights: np.ndarray, degree: int) -> np.ndarray:
    """The matrix (G, k) that turns losses at ``at`` (k,) into a weighted polynomial's values at ``x`` (G,)."""
    return np.vander(x, degree + 1) @ np.linalg.pinv(np.vander(at, degree + 1) * weights[:, None]) * weights


def multipliers(frontier: Frontier, effects: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """The compute multiplier of each row of ``effects`` (variant, difference, error, freedom, flops) with a 95 % interval.

    A variant's loss is read as the baseline's plus their paired difference, so that what a seed does to both cancels. Returns
    variant, multiplier (NaN where the loss lies beyond the frontier), multiplier_low, multiplier_high (an end beyond the
    frontier stands at its end), ``beyond`` (``below`` or ``above`` where the value itself is only bounded, else empty) and
    draws' log standard deviation ``log_error``.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for row in effects.itertuples():
        taken = row.flops / frontier.flops
        factor = frontier.factor(row.difference)
        differences = row.difference + row.error * stats.t.rvs(row.freedom, size=len(frontier.draws), random_state=rng)
        drawn = np.array([frontier.factor(d, c) for d, c in zip(differences, frontier.draws, strict=True)]) / taken
        low, high = np.quantile(drawn, [0.025, 0.975])
        least, most = frontier.reach
        beyond = "below" if factor <= least * 1.001 else "above" if factor >= most * 0.999 else ""
        rows.append(
            {"variant": row.variant, "multiplier": math.nan if beyond else factor / taken, "multiplier_low": low,
             "multiplier_high": high, "beyond": beyond, "log_error": float(np.log(drawn).std())}
        )  # fmt: skip
    return pd.DataFrame(rows)
