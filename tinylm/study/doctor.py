"""The fit doctor: what survives a second look at a fitted law, and one verdict in plain words for each parameter.

A fit's own bootstrap says how far a parameter would move with other rows of the same kind. The doctor also asks what the
objective itself allows (profiles), what one size or a few outlying rows decide, what the law says of runs that it was
not shown, where its residuals lean, and what changes when parameters and FLOPs are counted otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from tinylm.errors import LabError
from tinylm.study.forms import LAD_DELTA, REPEATS, deltas, form_of, minimise
from tinylm.study.optima import require_columns
from tinylm.study.scaling import (
    COEFFICIENTS,
    Fit,
    design_faults,
    finite,
    fit_surface,
    identification,
    percentile_intervals,
    profile_threshold,
    resampled,
    robust_sd,
)

OUTLYING = 4.0  # robust standard deviations from the law, beyond which a row counts as an outlier
COLLINEAR = 1e3  # condition number of the design above which some direction of the parameters is hardly seen
STEPS = np.array([0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 9.0, 16.0])  # of a profile, in half-intervals


@dataclass(frozen=True)
class _Problem:
    """A fit's rows and optimum as the optimiser takes them."""

    form: object
    theta: np.ndarray
    X: np.ndarray
    y: np.ndarray
    w: np.ndarray
    centre: np.ndarray
    path: list[float]

    @classmethod
    def of(cls, fit: Fit) -> _Problem:
        if not len(fit.data):
            raise LabError("A diagnosis needs the rows behind the fit", "a fit without data", "fit the rows again")
        form = form_of(fit.form, fit.params)
        names = [name for name in ("x", "params", "tokens", "unique") if name in fit.data]
        logs = np.log(fit.data[names].to_numpy(float).T)
        centre = form.centre(logs)
        y, w = np.log(fit.data["observed"].to_numpy(float)), fit.data["weight"].to_numpy(float)
        path = deltas(fit.objective, fit.delta)
        return cls(form, form.theta(pd.DataFrame([fit.params]), centre), logs - centre[:, None], y, w, centre, path)

    def minimise(self, theta: np.ndarray, w: np.ndarray, held=None) -> tuple[np.ndarray, np.ndarray]:
        """Optima near theta (S, p) under weights (n,) or (S, n): the better of going straight to the last delta, and of
        coming to it from least squares."""
        last = self.path[-3:] if self.path[-1] == LAD_DELTA else self.path[-1:]
        found = []
        for path in (last, self.path) if len(self.path) > 1 else (last,):
            end = theta
            for delta in path:
                end, value = minimise(self.form, end, self.X, self.y, w, delta, steps=100, tolerance=1e-10, held=held)
            found.append((end, value))
        better = np.argmin([value for _, value in found], axis=0)
        rows = np.arange(len(theta))
        return np.array([end for end, _ in found])[better, rows], np.array([value for _, value in found])[better, rows]


# ------------------------------------------------------------------------------------------------------------ profiles


def profiles(fit: Fit, names: list[str] | None = None) -> pd.DataFrame:
    """Profile of the objective in each parameter (and in ``a`` of a surface): the parameter is held at a value, all
    others are fitted again.

    Returns columns parameter, value, ``delta`` (the objective above its least, in the units of ``Fit.value``) and
    ``threshold``: up to there a value lies in the 95 % region (``scaling.profile_threshold``). Each side goes on until
    the profile has left the region, or to 16 times the half-width of the parameter's interval: what is flat that far
    stays flat.
    """
    problem, form = _Problem.of(fit), form_of(fit.form, fit.params)
    names = names or [*fit.params, *(["a"] if "beta" in fit.params else [])]
    unit = {"huber": 1.0, "lsq": 2.0, "lad": 1 / LAD_DELTA}[fit.objective]
    _, least = problem.minimise(problem.theta, problem.w)
    residual = fit.data["residual"].to_numpy(float)
    threshold = profile_threshold(residual, problem.w, len(form.params), fit.objective, fit.delta)
    J = form.jacobian(form.evaluate(problem.theta, problem.X)[1], problem.X)[0] * np.sqrt(problem.w)
    shape = np.linalg.pinv(J @ J.T)
    rows: list[dict] = []
    best: dict[str, float] = {name: fit.a if name == "a" else fit.params[name] for name in names}
    sides = {(name, sign): problem.theta[0] for name in names for sign in (-1, 1)}
    for near in (STEPS[:8], STEPS[8:]):
        asked = [(key, step) for key in sides for step in near]
        values = [_step(name, best[name], fit, sign * step) for (name, sign), step in asked]
        kept = [i for i, value in enumerate(values) if value is not None]
        if not kept:
            break
        lines = [form.held(asked[i][0][0], values[i], problem.centre) for i in kept]
        held = np.array([row for row, _ in lines]), np.array([right for _, right in lines])
        start = np.array([sides[asked[i][0]] for i in kept])
        # Along the valley: where the linearised law would go when the parameter is held elsewhere.
        lean = held[0] @ shape
        short = held[1] - (held[0] * start).sum(axis=1)
        start = start + lean * (short / np.maximum((lean * held[0]).sum(axis=1), 1e-300))[:, None]
        start = np.clip(start, *form.box(float(np.median(problem.y))))
        ends, reached = problem.minimise(start, problem.w, held)
        for i, end, value in zip(kept, ends, reached, strict=True):
            key = asked[i][0]
            rows.append({"parameter": key[0], "side": key[1], "value": values[i], "rise": value - least[0]})
            sides[key] = end
        out = {(row["parameter"], row["side"]) for row in rows if row["rise"] > 1.5 * threshold}
        sides = {key: theta for key, theta in sides.items() if key not in out}
        if not sides:
            break
    least_seen = min(0.0, min(row["rise"] for row in rows))
    rows += [{"parameter": name, "side": 0, "value": value, "rise": 0.0} for name, value in best.items()]
    table = pd.DataFrame(rows)
    table["delta"] = unit * (table["rise"] - least_seen)
    table["threshold"] = unit * threshold
    order = {name: i for i, name in enumerate(names)}
    table = table.sort_values(["parameter", "value"], key=lambda c: c.map(order) if c.name == "parameter" else c)
    return table[["parameter", "value", "delta", "threshold"]].reset_index(drop=True)


def _step(name: str, value: float, fit: Fit, steps: float) -> float | None:
    """The value so many half-intervals away, on a log scale for coefficients; None where there is no such value."""
    low, high = fit.a_interval if name == "a" else fit.intervals.get(name, (np.nan, np.nan))
    if name in COEFFICIENTS:
        ends = np.log([max(low, 1e-300), max(high, 1e-300)]) - np.log(value) if np.isfinite(low) else (-0.5, 0.5)
        width = np.clip(abs(ends[int(steps > 0)]), 0.05, 3.0)
        limits = REPEATS if name in ("R_D", "R_N") else (1e-30 * value, 1e30 * value)
        found = float(value * np.exp(steps * width))
        return found if limits[0] < found < limits[1] else None
    width = abs((high if steps > 0 else low) - value) if np.isfinite(low) else 0.25 * abs(value)
    width = float(np.clip(width, 0.01 * abs(value) + 1e-6, abs(value) + 0.1))
    found = value + steps * width
    if name == "E":
        nothing = 1e-6 * abs(value)
        return found if found > nothing else nothing if found + width > nothing > 0 else None
    if name == "a":
        return found if 0.01 < found < 0.99 else None
    return found if abs(found) < 6 else None


def profile_intervals(table: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Where each profile crosses its threshold, on both sides; infinite where it does not."""
    found = {}
    for name, rows in table.groupby("parameter", sort=False):
        value, rise = rows["value"].to_numpy(float), rows["delta"].to_numpy(float)
        limit, lowest = rows["threshold"].iloc[0], int(np.argmin(rise))
        ends = []
        for side in (range(lowest, -1, -1), range(lowest, len(value))):
            end, before = np.inf if side.step == 1 else -np.inf, lowest
            for i in side:
                if rise[i] > limit:
                    # Roots of a parabola's height are straight in the distance.
                    a, b, c = (np.sqrt(max(v, 0.0)) for v in (rise[before], rise[i], limit))
                    end = value[before] + (value[i] - value[before]) * (c - a) / max(b - a, 1e-300)
                    break
                before = i
            ends.append(float(end))
        if name == "E" and ends[0] < 0:
            ends[0] = 0.0
        found[name] = (ends[0], ends[1])
    return found


# ----------------------------------------------------------------------------------------------------- rows left out


def rungs(x: np.ndarray, most: int = 10) -> list[tuple[str, np.ndarray]]:
    """Groups of rows of about one x, rising: the distinct values (those within 3 % are one), or where there are more than
    ``most`` of them bins of equal count. Returns (label, mask) pairs."""
    logs = np.log(np.asarray(x, float))
    order = np.argsort(logs)
    jumps = np.flatnonzero(np.diff(logs[order]) > 0.03) + 1
    groups = np.split(order, jumps)
    if len(groups) > most:
        groups = [group for group in np.array_split(order, min(most, 6)) if len(group)]
    pairs = []
    for group in groups:
        low, high = x[group].min(), x[group].max()
        label = f"{np.median(x[group]):.3g}" if high < 1.04 * low else f"{low:.3g} to {high:.3g}"
        mask = np.zeros(len(x), bool)
        mask[group] = True
        pairs.append((label, mask))
    return pairs


def leave_out(fit: Fit) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The law fitted without each rung, and what it then says of that rung's runs.

    Rungs are sizes (or x, for a law in one variable); then come the ``largest runs``, those of the highest compute N x D
    (a tenth of the rows, or the rung that they share). Errors are signed: positive where the runs came out above their
    prediction. Returns a table with a row a run (left_out, the inputs, observed, predicted, error_percent) and one with
    a row a group: rows, mean_error_percent, worst_error_percent, and the parameters fitted without it. Groups without
    which no law can be told apart are not there.
    """
    problem, form = _Problem.of(fit), form_of(fit.form, fit.params)
    names = [name for name in ("x", "params", "tokens", "unique") if name in fit.data]
    rows = fit.data
    first = "x" if "x" in rows else "params"
    groups = [(f"{'x' if first == 'x' else 'N'} = {label}", mask) for label, mask in rungs(rows[first].to_numpy())]
    compute = (rows["x"] if first == "x" else rows["params"] * rows["tokens"]).to_numpy(float)
    top = compute >= min(np.quantile(compute, 0.9), compute.max() * 0.97)
    groups.append(("largest runs", top))
    logs = problem.X + problem.centre[:, None]
    whole = len(design_faults(form, logs, names))
    groups = [
        (label, mask)
        for label, mask in groups
        if (~mask).sum() > len(form.params) and len(design_faults(form, logs[:, ~mask], names)) <= whole
    ]
    if not groups:
        return pd.DataFrame(), pd.DataFrame()
    weights = np.array([np.where(mask, 0.0, problem.w) for _, mask in groups])
    thetas, _ = problem.minimise(np.repeat(problem.theta, len(groups), axis=0), weights)
    predicted = np.exp(form.evaluate(thetas, problem.X)[0])
    observed = rows["observed"].to_numpy(float)
    runs, summary = [], []
    for (label, mask), there in zip(groups, predicted, strict=True):
        error = 100 * (observed[mask] / there[mask] - 1)
        part = rows.loc[mask, names].assign(observed=observed[mask], predicted=there[mask], error_percent=error)
        runs.append(part.assign(left_out=label))
        worst = error[np.argmax(np.abs(error))]
        summary.append({"rows": int(mask.sum()), "mean_error_percent": error.mean(), "worst_error_percent": worst})
    table = pd.DataFrame(summary, index=pd.Index([label for label, _ in groups], name="left_out"))
    table = table.join(form.natural(thetas, problem.centre).set_index(table.index))
    if "beta" in table:
        table["a"] = table["beta"] / (table["alpha"] + table["beta"])
    return pd.concat(runs, ignore_index=True), table


def outliers(fit: Fit) -> tuple[np.ndarray, dict[str, float]]:
    """Rows (a mask) further than four robust standard deviations, 1.4826 x the median of |log residual|, from the law that
    the other rows give, and the parameters of that law (``a`` of a surface too); none and empty where there are none.

    The rule is applied until it names the same rows again, five times at most, so that what pulls a fit to itself is seen.
    """
    problem, form = _Problem.of(fit), form_of(fit.form, fit.params)
    theta, far = problem.theta, np.zeros(fit.n, bool)
    for _ in range(5):
        residual = problem.y - form.evaluate(theta, problem.X)[0][0]
        before, far = far, np.abs(residual) > max(OUTLYING * robust_sd(residual[~far]), 1e-9)
        # A quarter of all rows are not outliers but another law, and too few others give none.
        if not far.any() or far.mean() > 0.25 or (~far).sum() <= len(form.params) + 1:
            return np.zeros(fit.n, bool), {}
        if (far == before).all():
            break
        theta, _ = problem.minimise(theta, np.where(far, 0.0, problem.w))
    without = form.natural(theta, problem.centre).iloc[0].to_dict()
    if "beta" in without:
        without["a"] = without["beta"] / (without["alpha"] + without["beta"])
    return far, without


def residual_bins(fit: Fit) -> pd.DataFrame:
    """Residuals in percent of the loss, by rungs of each input: columns variable, rung, rows, mean_percent, low_percent,
    high_percent (95 %, Student's t; NaN for single rows), and ``p``: the chance that rungs of a variable differ so
    much though the law holds (Kruskal and Wallis's test of ranks; NaN with fewer than two rows a rung)."""
    left, found = 100 * np.expm1(fit.data["residual"].to_numpy(float)), []
    for name in ("x", "params", "tokens"):
        if name not in fit.data:
            continue
        groups = rungs(fit.data[name].to_numpy(float))
        parts = [left[mask] for _, mask in groups]
        testable = len(parts) > 1 and len(left) >= 2 * len(parts) and np.ptp(left) > 1e-9
        p = float(stats.kruskal(*parts).pvalue) if testable else np.nan
        for (label, _), part in zip(groups, parts, strict=True):
            half = np.nan
            if len(part) > 1:
                half = stats.t.ppf(0.975, len(part) - 1) * part.std(ddof=1) / np.sqrt(len(part))
            mean = part.mean()
            row = {"variable": name, "rung": label, "rows": len(part), "mean_percent": mean}
            found.append(row | {"low_percent": mean - half, "high_percent": mean + half, "p": p})
    return pd.DataFrame(found)


def clustered_intervals(fit: Fit, clusters: object, bootstrap: int = 1000, seed: int = 0) -> dict:
    """95 % intervals when whole clusters are drawn, for instance all runs of one size (those of ``a`` too); empty with
    fewer clusters than parameters and two."""
    problem, form = _Problem.of(fit), form_of(fit.form, fit.params)
    units = pd.factorize(np.asarray(clusters))[0]
    if units.max() + 1 < len(form.params) + 2:
        return {}
    draws = resampled(
        form, problem.theta, problem.X, problem.y, problem.w, units, fit.objective, fit.delta, bootstrap, seed
    )
    again = dataclasses.replace(fit, samples=form.natural(draws, problem.centre))
    found = percentile_intervals(fit.params, again.samples)
    return {**found, "a": again.a_interval} if "beta" in fit.params else found


# ---------------------------------------------------------------------------------------------------------- accounting


def conventions(frame: pd.DataFrame) -> dict[str, pd.Series]:
    """Ways to count the parameters of the lab's own records: total, without embeddings, and without embeddings but with
    the head (the embedding matrix itself, where it is tied)."""
    found = {"total": frame["params_total"]}
    if "params_non_embedding" in frame:
        found["non-embedding"] = frame["params_non_embedding"]
        if "params_head" in frame and "params_embedding" in frame:
            head = frame["params_head"].where(frame["params_head"] > 0, frame["params_embedding"])
            found["non-embedding and head"] = frame["params_non_embedding"] + head
    return found


def accounting(
    frame: pd.DataFrame,
    params: Mapping[str, object] | None = None,
    tokens: str = "tokens_seen",
    loss: str = "val_loss",
    flops: str | None = "flops",
    **options,
) -> pd.DataFrame:
    """The surface fitted under each way of counting parameters, and its exponent a under each way of counting FLOPs.

    params: name -> column or values, by default the lab's own (``conventions``). flops: the column of exact FLOPs, if
    any. With C = 6 N D the best size goes as C^(beta / (alpha + beta)); where a token costs k N^eta (eta is read off
    the rows) it goes as C^(beta / (alpha + eta beta)). options: as ``fit_surface`` takes them.

    Returns a row for each pair: params, flops, eta, and E, alpha, beta, a, each with its ``_low``, ``_high`` and
    ``_status``, and the fit's ``value``. ``survives`` says what all of them agree on.
    """
    require_columns(frame, [tokens, loss])
    counted = conventions(frame) if params is None else params
    rows = []
    for name, column in counted.items():
        N = np.asarray(frame[column] if isinstance(column, str) else column, float)
        fit = fit_surface(N, frame[tokens], frame[loss], **options)
        costs = {"6ND": 1.0}
        if flops is not None and flops in frame:
            per_token = np.log(frame[flops].to_numpy(float) / frame[tokens].to_numpy(float))
            costs["exact"] = float(np.polyfit(np.log(N), per_token, 1)[0])
        for cost, eta in costs.items():
            row = {"params": name, "flops": cost, "eta": eta, "value": fit.value}
            draws = (
                pd.DataFrame({key: fit.samples[key] for key in ("E", "alpha", "beta")}) if len(fit.samples) else None
            )
            for key in ("E", "alpha", "beta"):
                row |= {key: fit.params[key], f"{key}_low": fit.intervals[key][0], f"{key}_high": fit.intervals[key][1]}
                row[f"{key}_status"] = fit.status[key]
            row["a"] = fit.params["beta"] / (fit.params["alpha"] + eta * fit.params["beta"])
            ends = (np.nan, np.nan)
            if draws is not None:
                ends = np.quantile(draws["beta"] / (draws["alpha"] + eta * draws["beta"]), [0.025, 0.975])
            rows.append({**row, "a_low": float(ends[0]), "a_high": float(ends[1]), "a_status": fit.a_status})
    return pd.DataFrame(rows)


def survives(table: pd.DataFrame) -> dict[str, str]:
    """What of an ``accounting`` holds however one counts, in words: a quantity survives where all intervals share a value."""
    said = {}
    for name in ("E", "alpha", "beta", "a"):
        low, high = table[f"{name}_low"].max(), table[f"{name}_high"].min()
        span = f"{table[name].min():.3g} to {table[name].max():.3g}"
        if (table[f"{name}_status"] == "not identified").any():
            said[name] = f"{name} is not identified in every way of counting ({span})"
        elif not np.isfinite([low, high]).all():
            said[name] = f"{name} is {span} over the ways of counting (no intervals to judge by)"
        elif low <= high:
            said[name] = f"{name} survives: {span}, and every interval holds {low:.3g} to {high:.3g}"
        else:
            least, most = table.loc[table[name].idxmin()], table.loc[table[name].idxmax()]
            ways = [f"{row['params']}, {row['flops']}" for row in (least, most)]
            said[name] = (
                f"{name} depends on how one counts: {least[name]:.3g} ({ways[0]}) to {most[name]:.3g} ({ways[1]})"
            )
    return said


# ----------------------------------------------------------------------------------------------------------- diagnosis


@dataclass
class Diagnosis:
    """A fit and all that was asked of it.

    verdicts: one row a parameter (and ``a``): value, low, high, status, and ``why`` in words. intervals: by run, by size
    (empty where sizes are too few) and by profile, (low, high) a parameter. profiles, residuals, left_out (a row a run),
    without_rung (a row a group), accounting: as their functions give them. outliers: rows of ``fit.data`` beyond four
    robust standard deviations; without_outliers: the parameters fitted without them.
    """

    fit: Fit
    verdicts: pd.DataFrame
    intervals: dict[str, dict[str, tuple[float, float]]]
    profiles: pd.DataFrame
    residuals: pd.DataFrame
    left_out: pd.DataFrame
    without_rung: pd.DataFrame
    outliers: pd.DataFrame
    without_outliers: dict[str, float]
    accounting: pd.DataFrame | None
    notes: list[str]

    @property
    def status(self) -> dict[str, str]:
        """One of identified, weak, not identified for each parameter of the fit."""
        return {name: self.verdicts["status"][name] for name in self.fit.params}

    def report(self) -> str:
        """The diagnosis as text, one finding a paragraph; every number has its interval or its error beside it."""
        fit, lines = self.fit, []
        objective = {"huber": f"Huber's on log loss, delta {fit.delta:g}", "lsq": "squares of log residuals"}
        lines.append(f"{fit.formula}, from {fit.n} rows; intervals are 95 %.\n")
        before = ""
        for name, row in self.verdicts.iterrows():
            span = f"[{row['low']:.4g}, {row['high']:.4g}]" if np.isfinite(row["low"]) else "[no interval]"
            meaning = " (N_opt grows as C^a)" if name == "a" and "beta" in fit.params else ""
            lines.append(f"  {name:6s} {row['value']:<11.5g} {span:26s} {row['status']}{meaning}")
            lines.append(f"         {'for the same reason' if row['why'] == before else row['why']}")
            before = row["why"]
        said = objective.get(fit.objective, "absolute log residuals")
        lines.append(f"\nObjective ({said}): {fit.value:.6g}, reached by {fit.starts_agreeing} of {fit.starts} starts.")
        lines += [f"- {note}" for note in self.notes]
        if self.accounting is not None:
            lines.append("\nCounting parameters and FLOPs otherwise:")
            lines += [f"- {text}" for text in survives(self.accounting).values()]
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """All of it, ready for JSON (a value that is not finite becomes None)."""

        def rows(table: pd.DataFrame | None) -> list[dict] | None:
            if table is None:
                return None
            plain = table.reset_index() if table.index.name else table
            return [
                {k: finite(v) if isinstance(v, float) else v for k, v in row.items()}
                for row in plain.to_dict("records")
            ]

        return {
            "verdicts": {name: {"status": r["status"], "why": r["why"]} for name, r in self.verdicts.iterrows()},
            "intervals": {
                way: {name: [finite(v) for v in pair] for name, pair in found.items()}
                for way, found in self.intervals.items()
            },
            "condition": finite(self.fit.condition),
            "residuals": rows(self.residuals),
            "left_out": rows(self.without_rung),
            "outliers": rows(self.outliers),
            "without_outliers": {name: finite(value) for name, value in self.without_outliers.items()},
            "accounting": rows(self.accounting),
            "notes": self.notes,
        }


def diagnose(
    fit: Fit, sizes: object = None, accounting: pd.DataFrame | None = None, bootstrap: int = 1000, seed: int = 0
) -> Diagnosis:
    """Everything the doctor asks of a fit (a surface, a power law, a data-constrained law; straight lines too).

    sizes: what to cluster by, by default params. accounting: a table of that function, if the runs are counted in several
    ways. bootstrap: resamples of whole sizes. A fit made without a bootstrap is judged by its profiles.

    A verdict starts from the fit's own and can only fall: to *not identified* where the profile never leaves the 95 %
    region on one side; to *weak* where it is more than twice as wide as the bootstrap says, where outliers decide
    (without them the value leaves its interval, or moves by a tenth, a coefficient by half), or where one rung does (it
    moves by more than two half-intervals).
    """
    curves = profiles(fit)
    by_profile = profile_intervals(curves)
    by_run = {**fit.intervals, "a": fit.a_interval} if "beta" in fit.params else dict(fit.intervals)
    if sizes is None and "params" in fit.data:
        sizes = np.round(np.log(fit.data["params"].to_numpy(float)), 2)
    repeated = sizes is not None and len(np.unique(sizes)) < fit.n
    by_size = clustered_intervals(fit, sizes, bootstrap, seed) if repeated and bootstrap and len(fit.samples) else {}
    far, without = outliers(fit)
    runs, without_rung = leave_out(fit)
    residuals = residual_bins(fit)
    freedom = int(fit.data["unit"].max()) + 1 - len(fit.params)
    rows = {}
    for name, profile in by_profile.items():
        value = fit.a if name == "a" and "beta" in fit.params else fit.params[name]
        own = fit.a_status if name == "a" and "beta" in fit.params else fit.status[name]
        interval = by_run[name]
        assessed = own in _WORSE
        if not assessed:
            interval = profile
            own = "not identified" if name in fit.reasons else identification(name, value, profile, freedom)
        moved = without_rung[name] if len(without_rung) and name in without_rung else pd.Series(dtype=float)
        status, why = _verdict(
            name, value, interval, profile, own, fit, without.get(name), int(far.sum()), moved, freedom
        )
        rows[name] = {"value": value, "low": interval[0], "high": interval[1], "status": status, "why": why}
    verdicts = pd.DataFrame.from_dict(rows, orient="index").rename_axis("parameter")
    diagnosis = Diagnosis(
        fit=fit,
        verdicts=verdicts,
        intervals={"by run": by_run, "by size": by_size, "by profile": by_profile},
        profiles=curves,
        residuals=residuals,
        left_out=runs,
        without_rung=without_rung,
        outliers=fit.data[far],
        without_outliers=without,
        accounting=accounting,
        notes=[],
    )
    diagnosis.notes = _notes(diagnosis)
    return diagnosis


_WORSE = {"identified": 0, "weak": 1, "not identified": 2}


def _verdict(name, value, interval, profile, own, fit, without, far, moved, freedom) -> tuple[str, str]:
    """Status and reasons of one parameter."""
    low, high = interval
    reasons = []
    worst = own

    def fall(to: str, why: str) -> None:
        nonlocal worst
        worst = max(worst, to, key=_WORSE.get)
        reasons.append(why)

    concerned = [fit.reasons[p] for p in ((name, "alpha", "beta") if name == "a" and "beta" in fit.params else (name,))
                 if p in fit.reasons]  # fmt: skip
    if concerned:
        fall("not identified", concerned[0])
    elif freedom < 3:
        more = f"{freedom} row{'' if freedom == 1 else 's'} more than parameters"
        fall("weak" if freedom > 0 else "not identified", f"{more}: nothing checks the law")
    if own != "identified" and not concerned:
        if low <= 1e-3 * value <= high or low <= 0:
            reasons.append("its interval reaches zero: these rows do not show that the term is there")
        elif np.isfinite([low, high]).all():
            wide = (
                f"a factor of {high / low:.3g} between its ends" if name in COEFFICIENTS else _percent(low, high, value)
            )
            reasons.append(f"its interval is wide: {wide}")
    for end, side in zip(profile, ("smaller", "larger"), strict=True):
        if not np.isfinite(end) and not concerned and not (name == "E" and side == "smaller"):
            fall(
                "not identified", f"the objective is flat towards {side} values: they fit as well, the others adjusted"
            )
    if np.isfinite([low, high, *profile]).all() and name not in COEFFICIENTS and not concerned:
        wider = (profile[1] - profile[0]) / max(high - low, 1e-300)
        if wider > 2 and profile[1] - profile[0] > 0.1 * abs(value):
            ends = f"[{profile[0]:.3g}, {profile[1]:.3g}]"
            fall("weak", f"the objective allows {ends}, {wider:.1f} times its interval")
    if without is not None and np.isfinite(low):
        far_off = (
            abs(np.log(max(without, 1e-300) / value)) > 0.4
            if name in COEFFICIENTS
            else abs(without - value) > 0.1 * abs(value)
        )
        if far_off or not low <= without <= high:
            fall("weak", f"{far} outlying row{'s' if far > 1 else ''} decided it: {without:.4g} without")
    if len(moved) and np.isfinite([low, high]).all():
        half = np.where(moved > value, high - value, value - low)
        far_off = ((moved - value).abs() / np.maximum(half, 1e-300)).fillna(0)
        if far_off.max() > 2 and abs(moved[far_off.idxmax()] - value) > 0.02 * abs(value) and not concerned:
            label = far_off.idxmax()
            fall("weak", f"it hangs on {label}: without these it is {moved[label]:.4g}")
    if worst == "identified":
        wide = f"within a factor of {high / low:.3g}" if name in COEFFICIENTS else _percent(low, high, value)
        alone = ", and no rung decides it" if len(moved) else ""
        reasons.insert(0, f"{wide}; the objective rises on both sides{alone}")
    return worst, "; ".join(reason.rstrip(".") for reason in reasons)


def _percent(low: float, high: float, value: float) -> str:
    return f"{100 * (low - value) / abs(value):+.2g} % to {100 * (high - value) / abs(value):+.2g} %"


def _notes(d: Diagnosis) -> list[str]:
    """What the diagnosis found beyond the parameters, a sentence each."""
    fit, notes = d.fit, list(d.fit.warnings)
    tight = "fine" if fit.condition < COLLINEAR else "collinear: some combinations of parameters are hardly seen"
    notes.append(f"Condition number of the design: {fit.condition:.3g} ({tight}; above {COLLINEAR:g} is collinear).")
    bounded = [name for name in ("alpha", "beta", "a") if abs(fit.params.get(name, 0)) > 5.99]
    for name in {"R_D", "R_N"} & set(fit.params):
        bounded += [] if 1.01 * REPEATS[0] < fit.params[name] < 0.99 * REPEATS[1] else [name]
    bounded += ["E"] if fit.params.get("E") == 0 else []
    notes.append(f"At a limit of the search: {', '.join(bounded) or 'none'}.")
    spread = 100 * np.std(fit.data["residual"])
    notes.append(
        f"Residuals: {spread:.2g} % of the loss (standard deviation), {100 * robust_sd(fit.data['residual']):.2g} % robustly."
    )
    for name, rows in d.residuals.groupby("variable", sort=False):
        if rows["p"].iloc[0] < 1e-3:
            worst = rows.loc[rows["mean_percent"].abs().idxmax()]
            notes.append(
                f"Residuals lean with {name} (p = {rows['p'].iloc[0]:.1g}): {worst['mean_percent']:+.2g} % at {worst['rung']}. "
                "The law bends away from the runs there."
            )
    if len(d.outliers):
        rule = (
            f"further than {OUTLYING:g} robust standard deviations (1.4826 x the median of |log residual|) from the law"
        )
        share = f"{len(d.outliers)} of {fit.n} rows are outliers, {rule}"
        moved = ", ".join(
            f"{name} {d.without_outliers[name]:.4g}" for name in d.verdicts.index if name in d.without_outliers
        )
        notes.append(f"{share}. All rows are in the fit; without these: {moved}.")
    else:
        notes.append(f"No row is an outlier (further than {OUTLYING:g} robust standard deviations from the law).")
    if len(d.without_rung):
        table = d.without_rung
        inner = table.drop(index="largest runs", errors="ignore")
        if len(inner):
            worst = inner["mean_error_percent"].abs().idxmax()
            notes.append(
                f"Each rung predicted by the others: mean errors from {inner['mean_error_percent'].min():+.2g} % to "
                f"{inner['mean_error_percent'].max():+.2g} %, the largest at {worst}."
            )
        if "largest runs" in table.index:
            row = table.loc["largest runs"]
            count = "run" if row["rows"] == 1 else f"{int(row['rows'])} runs"
            said = f"The largest {count}, held out, came out {row['mean_error_percent']:+.2g} % from the prediction"
            notes.append(
                said + (f" on average (worst {row['worst_error_percent']:+.2g} %)." if row["rows"] > 1 else ".")
            )
    if d.intervals["by size"]:
        wider = {
            name: (pair[1] - pair[0]) / max(d.intervals["by run"][name][1] - d.intervals["by run"][name][0], 1e-300)
            for name, pair in d.intervals["by size"].items()
            if name not in COEFFICIENTS
        }
        name = max(wider, key=wider.get)
        low, high = d.intervals["by size"][name]
        width = f"up to {wider[name]:.2g} times as wide" if wider[name] > 1.05 else "no wider"
        told = f"Drawing whole sizes, intervals are {width} ({name}: [{low:.4g}, {high:.4g}])"
        notes.append(told + (": runs of one size share their errors." if wider[name] > 1.5 else "."))
    return notes
