"""Optima read off the runs themselves: the best learning rate of a size, the best size of a budget, the frontier of compute.

A run that diverged counts as tried, at an infinite loss. Nothing here fits a scaling law; ``scaling`` does that with
what is found here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from tinylm.errors import LabError

LEVEL = 0.95


# ------------------------------------------------------------------------------------------------------ learning rates


def best_learning_rate(
    frame: pd.DataFrame,
    by: Sequence[str] = ("budget", "params_total"),
    rate: str = "learning_rate",
    loss: str = "val_loss",
) -> pd.DataFrame:
    """The best learning rate of each group of runs, by a parabola of loss in log rate through the lowest and its
    neighbours (all rates within a factor of four of the lowest); runs of several seeds at one rate count by their mean.

    Returns one row a group: ``by``, ``learning_rate`` and ``val_loss`` (under their given names) at the vertex,
    ``edge`` (empty, ``low`` or ``high`` where the best lies at the edge of the rates tried, ``single`` where there was
    one rate), ``fitted`` (a vertex was found inside; otherwise the best run itself stands there), ``curvature`` (nats
    per squared log rate), ``rates``, and every column that is the same in all runs of the group (the median of tokens
    and FLOPs). A run that diverged counts as tried, at an infinite loss; a group where every run did is left out.
    """
    by = list(by)
    require_columns(frame, [*by, rate, loss])
    frame = frame.assign(**{loss: _finite_losses(frame, loss)})
    rows = []
    for key, group in frame.groupby(by, sort=True):
        means = group.groupby(rate)[loss].mean().sort_index()
        tried, losses = means.index.to_numpy(float), means.to_numpy()
        best = int(np.argmin(losses))
        if not np.isfinite(losses[best]):
            continue
        edge = "single" if len(tried) == 1 else "low" if best == 0 else "high" if best == len(tried) - 1 else ""
        row = dict(zip(by, key, strict=True)) | {rate: tried[best], loss: losses[best], "edge": edge}
        row |= {"fitted": False, "curvature": np.nan, "rates": len(tried)}
        x = np.log(tried / tried[best])
        near = np.isfinite(losses) & (np.abs(x) <= np.log(4.01))
        if not edge:
            near[[best - 1, best + 1]] = np.isfinite(losses[[best - 1, best + 1]])
        if not edge and near.sum() >= 3 and np.isfinite(losses[[best - 1, best + 1]]).all():
            c, b, a = np.polyfit(x[near], losses[near], 2)[::-1]
            if a > 0 and x[best - 1] < -b / (2 * a) < x[best + 1]:
                vertex = -b / (2 * a)
                row |= {rate: tried[best] * np.exp(vertex), loss: c - b * b / (4 * a), "fitted": True, "curvature": a}
        for column in group.columns:
            if column in row:
                continue
            if group[column].map(repr).nunique() == 1:
                row[column] = group[column].iloc[0]
            elif column in ("tokens_seen", "unique_tokens", "epochs", "flops", "flops_6nd"):
                row[column] = group[column].median()
        rows.append(row)
    if not rows:
        raise LabError("At least one run must have ended with a finite loss", f"{len(frame)} runs, none finite")
    return pd.DataFrame(rows)


def _finite_losses(frame: pd.DataFrame, loss: str) -> pd.Series:
    losses = pd.to_numeric(frame[loss]).astype(float)
    if "status" in frame:
        losses = losses.where(frame["status"] != "diverged", np.inf)
    return losses.fillna(np.inf)


def require_columns(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    """Raises LabError that names the columns a table lacks."""
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise LabError(
            f"The table needs the columns {', '.join(columns)}",
            f"without {', '.join(missing)}",
            f"its columns are {', '.join(map(str, frame.columns[:30]))}",
        )


@dataclass(frozen=True)
class LearningRateRule:
    """learning rate = ``rate`` (N / ``params``)^``params_exponent`` (D / ``tokens``)^``tokens_exponent``, where params
    and tokens are the geometric means of the runs behind it. form: ``N and D``, ``N`` or ``constant``, what the data
    supports.
    n: optima used; edges: those left out because they lie at the edge of the rates tried. scatter: standard deviation
    of log rate about the rule. intervals: 95 %, Student's t, of each coefficient."""

    form: str
    rate: float
    params: float
    tokens: float
    params_exponent: float
    tokens_exponent: float
    intervals: dict[str, tuple[float, float]]
    n: int
    edges: int
    scatter: float
    warnings: tuple[str, ...] = ()

    def predict(self, params: object, tokens: object = None) -> object:
        """The best learning rate for N parameters and D tokens; a float for numbers, an array for arrays. tokens may be
        left out where the rule does not depend on them."""
        if tokens is None:
            if self.tokens_exponent:
                raise LabError("This rule depends on the tokens too", "params alone", "give tokens")
            tokens = self.tokens
        N, D = np.asarray(params, float), np.asarray(tokens, float)
        rate = self.rate * (N / self.params) ** self.params_exponent * (D / self.tokens) ** self.tokens_exponent
        return float(rate) if np.ndim(rate) == 0 else rate

    def table(self) -> pd.DataFrame:
        """One row a coefficient: value, low, high."""
        values = {"rate": self.rate, "params_exponent": self.params_exponent, "tokens_exponent": self.tokens_exponent}
        rows = {
            name: {"value": value, **dict(zip(("low", "high"), self.intervals[name], strict=True))}
            for name, value in values.items()
            if name in self.intervals
        }
        return pd.DataFrame(rows).T.rename_axis("coefficient")

    def sentence(self) -> str:
        """The rule in words."""
        text = f"The best learning rate is {self.rate:.2g} at {self.params:.3g} parameters"
        if self.form == "N and D":
            text += f" and {self.tokens:.3g} tokens"
        for name, words in (("params_exponent", "parameters"), ("tokens_exponent", "tokens")):
            if name in self.intervals:
                low, high = self.intervals[name]
                span = f" [{low:.2f}, {high:.2f}]" if np.isfinite(low) else ""
                text += f", and goes as {words}^{getattr(self, name):.2f}{span}"
        text += f" (from {self.n} optima, scatter a factor of {np.exp(self.scatter):.2f})."
        return " ".join([text, *self.warnings])


def learning_rate_rule(
    frame: pd.DataFrame,
    by: Sequence[str] = ("budget", "params_total"),
    params: str = "params_total",
    tokens: str = "tokens_seen",
    rate: str = "learning_rate",
    loss: str = "val_loss",
) -> LearningRateRule:
    """The optimal learning rate as a power of N and D, or of N alone where that is all that the data supports.

    ``frame`` holds the runs; each group ``by`` gives one optimum (``best_learning_rate``). Optima at an edge of their
    grid are left out, unless no others exist. D enters where there are at least six optima, log N and log D are not on
    a line (|correlation| at most 0.95), and Akaike's criterion for few rows prefers it; N where there are at least
    three sizes.
    """
    best = best_learning_rate(frame, by, rate, loss)
    if tokens not in best:
        best[tokens] = frame.groupby(list(by))[tokens].median().reindex(best[list(by)]).to_numpy()
    inner = best[best.edge == ""]
    warnings = []
    if len(inner) < len(best):
        warnings.append(f"{len(best) - len(inner)} of {len(best)} optima lie at the edge of the rates tried.")
    chosen = inner if len(inner) else best
    log_n, log_d = np.log(chosen[params].to_numpy(float)), np.log(chosen[tokens].to_numpy(float))
    y = np.log(chosen[rate].to_numpy(float))
    u, v, one = log_n - log_n.mean(), log_d - log_d.mean(), np.ones(len(y))
    designs = {"constant": np.stack([one], axis=1)}
    if len(np.unique(log_n.round(6))) >= 3:
        designs["N"] = np.stack([one, u], axis=1)
        if len(y) >= 6 and v.std() > 0 and abs(np.corrcoef(u, v)[0, 1]) <= 0.95:
            designs["N and D"] = np.stack([one, u, v], axis=1)
    else:
        warnings.append("Fewer than three sizes have an optimum inside: the rule is one rate for all.")
    fits = {form: (np.linalg.lstsq(X, y, rcond=None)[0], X) for form, X in designs.items()}
    form = "N" if "N" in fits else "constant"
    if "N and D" in fits and _aicc(y, *fits["N and D"]) < _aicc(y, *fits["N"]):
        form = "N and D"
    theta, X = fits[form]
    freedom = len(y) - len(theta)
    scatter = float(np.sqrt(((y - X @ theta) ** 2).sum() / freedom)) if freedom else 0.0
    error = np.sqrt(np.diag(np.linalg.inv(X.T @ X))) * scatter
    half = error * stats.t.ppf(0.5 * (1 + LEVEL), freedom) if freedom else np.full(len(theta), np.nan)
    intervals = {"rate": (float(np.exp(theta[0] - half[0])), float(np.exp(theta[0] + half[0])))}
    for i, name in enumerate(("params_exponent", "tokens_exponent")[: len(theta) - 1], start=1):
        intervals[name] = (float(theta[i] - half[i]), float(theta[i] + half[i]))
    exponents = [*(float(t) for t in theta[1:]), 0.0, 0.0]
    return LearningRateRule(
        form=form,
        rate=float(np.exp(theta[0])),
        params=float(np.exp(log_n.mean())),
        tokens=float(np.exp(log_d.mean())),
        params_exponent=exponents[0],
        tokens_exponent=exponents[1],
        intervals=intervals,
        n=len(y),
        edges=len(best) - len(inner),
        scatter=scatter,
        warnings=tuple(warnings),
    )


def _aicc(y: np.ndarray, theta: np.ndarray, X: np.ndarray) -> float:
    """Akaike's criterion for few rows (Hurvich and Tsai 1989), normal errors of unknown variance."""
    n, k = len(y), len(theta) + 1
    return n * np.log(max(((y - X @ theta) ** 2).mean(), 1e-30)) + 2 * k + 2 * k * (k + 1) / max(n - k - 1, 1e-9)


# --------------------------------------------------------------------------------------------------------------- sizes


def best_sizes(frame: pd.DataFrame, budget: str, params: str, tokens: str, loss: str) -> pd.DataFrame:
    """One row for each budget and size: the loss at its best learning rate, or the mean loss where no rate is known."""
    require_columns(frame, [budget, params, tokens, loss])
    if "learning_rate" in frame:
        best = best_learning_rate(frame, (budget, params), loss=loss)
    else:
        finite = frame.assign(**{loss: _finite_losses(frame, loss)}).query(f"`{loss}` < inf")
        best = finite.groupby([budget, params], as_index=False)[[tokens, loss]].mean().assign(edge="")
    if tokens not in best:
        best[tokens] = frame.groupby([budget, params])[tokens].median().reindex(best[[budget, params]]).to_numpy()
    return best.sort_values([budget, params], ignore_index=True)


def isoflop_minima(
    frame: pd.DataFrame,
    budget: str = "budget",
    params: str = "params_total",
    tokens: str = "tokens_seen",
    loss: str = "val_loss",
) -> pd.DataFrame:
    """The best size at each budget: a parabola of loss in log N (Hoffmann et al. 2022, approach 2), after the best
    learning rate of each size (``best_learning_rate``).

    D_opt is read off the runs themselves, log D against log N, so it holds for any accounting of FLOPs. Returns one row
    a budget: ``budget``, ``params_opt``, ``tokens_opt``, ``loss_min``, ``inside`` (the parabola opens upward and its
    minimum lies between the smallest and the largest size; otherwise the best size measured stands there and no law
    uses the row), ``curvature`` (nats per squared log N), ``sizes``, ``edges`` (sizes whose best learning rate lies at
    an edge).
    """
    best = best_sizes(frame, budget, params, tokens, loss)
    return pd.DataFrame([minimum(family, key, params, tokens, loss)[0] for key, family in best.groupby(budget)])


def minimum(family: pd.DataFrame, key: float, params: str, tokens: str, loss: str) -> tuple[dict, np.ndarray]:
    """One budget's row of ``isoflop_minima`` from its sizes (rising), and their residuals (nats) about the parabola."""
    N, D, L = (family[name].to_numpy(float) for name in (params, tokens, loss))
    x, lowest = np.log(N), int(np.argmin(L))
    row = {
        "budget": float(key),
        "params_opt": N[lowest],
        "tokens_opt": D[lowest],
        "loss_min": L[lowest],
        "inside": False,
    }
    row |= {"curvature": np.nan, "sizes": len(N), "edges": int((family["edge"] != "").sum())}
    if len(N) < 3:
        return row, np.zeros(0)
    middle = x.mean()
    coefficients = np.polyfit(x - middle, L, 2)
    a, b, c = coefficients
    row["curvature"] = a
    residuals = L - np.polyval(coefficients, x - middle)
    if a > 0 and x[0] < middle - b / (2 * a) < x[-1]:
        vertex = middle - b / (2 * a)
        row |= {"params_opt": np.exp(vertex), "tokens_opt": np.exp(np.interp(vertex, x, np.log(D)))}
        row |= {"loss_min": c - b * b / (4 * a), "inside": True}
    return row, residuals


def frontier(flops: object, loss: object) -> np.ndarray:
    """The compute frontier, the lower envelope of all that was trained: positions of the points whose loss no cheaper one
    reaches, by rising compute. Points may be runs, or the points of many runs' curves (Hoffmann et al. 2022, approach 1);
    a point in the middle of a decaying schedule has a loss that a run ended there would beat."""
    C, L = np.asarray(flops, float), np.asarray(loss, float)
    order = np.lexsort((L, C))
    lowest = np.minimum.accumulate(np.where(np.isfinite(L[order]), L[order], np.inf))
    return order[np.isfinite(lowest) & (np.diff(lowest, prepend=np.inf) < 0)]
