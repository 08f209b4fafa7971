"""Scaling laws: fitted from records of runs, with intervals, and with a plain word on what the data cannot tell.

Notation here and in the plots: N parameters, D training tokens, U distinct tokens among them, C training FLOPs, L loss
in nats per token. ``forms`` holds the laws and the optimiser, ``optima`` what is read off the runs themselves, and
``doctor`` says of a fit what survives a second look. No torch is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import special, stats

from tinylm.errors import LabError
from tinylm.study.forms import (
    DATA_CONSTRAINED,
    GROWTH,
    LAD_DELTA,
    OBJECTIVES,
    POWER,
    POWER_FLOOR,
    REPEATS,
    SURFACE,
    PowerSum,
    deltas,
    evaluate_law,
    hoffmann_grid,
    huber,
    minimise,
    solve,
)
from tinylm.study.optima import (
    LearningRateRule,
    best_learning_rate,
    best_sizes,
    frontier,
    isoflop_minima,
    learning_rate_rule,
    minimum,
    require_columns,
)

__all__ = [
    "COEFFICIENTS",
    "LEVEL",
    "OBJECTIVES",
    "SYMBOLS",
    "Fit",
    "Frontier",
    "IsoFlop",
    "LearningRateRule",
    "best_learning_rate",
    "design_faults",
    "evaluate_law",
    "fit_data_constrained",
    "fit_growth",
    "fit_power",
    "fit_surface",
    "frontier",
    "frontier_laws",
    "identification",
    "isoflop_laws",
    "isoflop_minima",
    "learning_rate_rule",
    "prediction_interval",
    "profile_threshold",
]

LEVEL = 0.95
COEFFICIENTS = ("A", "B", "k", "R_D", "R_N")  # these span decades, so they are judged by a factor
SYMBOLS = {
    "power": ("x",),
    "growth": ("x",),
    "surface": ("params", "tokens"),
    "data-constrained": ("params", "tokens", "unique"),
}
FORMULAS = {
    "power": "L = A / x^alpha",
    "growth": "y = k x^a",
    "surface": "L = E + A / N^alpha + B / D^beta",
    "data-constrained": "L = E + A / N'^alpha + B / D'^beta (repeats discounted by R_D and R_N)",
}


# ----------------------------------------------------------------------------------------------------------------- Fit


@dataclass
class Fit:
    """A fitted law with what is known about its certainty.

    form: ``power`` y = E + A x^-alpha (or without E), ``growth`` y = k x^a, ``surface`` L = E + A/N^alpha + B/D^beta,
        ``data-constrained`` the surface of what repeated tokens are worth (``forms.DataConstrained``).
    value: the summed objective on log residuals: Huber's rho, the squares (lsq) or the absolute values (lad).
    intervals: 95 %, percentiles of the bootstrap. samples: one row of natural parameters a resample (see ``resampled``).
    status: ``identified``, ``weak`` or ``not identified`` for each parameter (``not assessed`` without a bootstrap), by
        the rule in ``identification``; ``a_status`` the same for the exponent of N_opt in C.
    starts_agreeing: starts whose objective ends within 1e-6, relative, of the best.
    reasons: why a parameter cannot be told whatever the losses, or why another optimum forbids it.
    rivals: other optima that are as good within the noise, one row each: parameters and ``value``.
    condition: condition number of the Jacobian at the optimum, columns scaled to one length.
    data: the rows as fitted: inputs, ``observed``, ``predicted``, ``residual`` (log observed - log predicted),
        ``weight`` and ``unit`` (the number of the cluster that a row is drawn with).
    """

    form: str
    params: dict[str, float]
    intervals: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    value: float = float("nan")
    n: int = 0
    objective: str = "huber"
    delta: float = 1e-3
    starts: int = 0
    starts_agreeing: int = 0
    status: dict[str, str] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)
    samples: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)
    condition: float = float("nan")
    data: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)
    a_status: str = "not assessed"
    rivals: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)

    def predict(self, *inputs: object, seed_sd: float = 0.0) -> pd.DataFrame:
        """Predicted y at ``inputs``, broadcast together: x for a law in one variable; params, tokens for a surface;
        params, tokens, unique tokens for a data-constrained law.

        Returns columns ``loss`` (``value`` for a growth law), ``low`` and ``high``: a 95 % interval from the bootstrap.
        With ``seed_sd`` (nats) it is an interval for one new run, the spread between seeds included.
        """
        wanted = SYMBOLS[self.form]
        if len(inputs) != len(wanted):
            raise LabError(f"A {self.form} law predicts from {' and '.join(wanted)}", f"{len(inputs)} inputs")
        arrays = [np.ravel(a) for a in np.broadcast_arrays(*(np.asarray(i, float) for i in inputs))]
        if not all((a > 0).all() and np.isfinite(a).all() for a in arrays):
            raise LabError("Predictions need positive, finite inputs", ", ".join(str(a[:5]) for a in arrays))
        centre = evaluate_law(self.form, self.params, *arrays)
        if len(self.samples):
            draws = evaluate_law(self.form, self.samples, *arrays)
            low, high = prediction_interval(draws, seed_sd, centre)
        else:
            low = high = np.full(len(centre), np.nan)
        name = "value" if self.form == "growth" else "loss"
        return pd.DataFrame({name: centre, "low": low, "high": high})

    def optimal(self, flops: object) -> pd.DataFrame:
        """Compute-optimal N and D of a surface under C = 6 N D, in closed form (Hoffmann et al. 2022, eq. 4): columns
        flops, params, tokens, loss, and a 95 % interval of params from the bootstrap (params_low, params_high). Of a
        data-constrained law, those for text that is not repeated."""
        if "beta" not in self.params:
            raise LabError("Only a surface has a compute-optimal size", f"form={self.form}")
        C = np.atleast_1d(np.asarray(flops, float))

        def size(p: dict | pd.DataFrame) -> np.ndarray:
            log_g = np.log(p["alpha"] * p["A"] / (p["beta"] * p["B"])) / (p["alpha"] + p["beta"])
            a = p["beta"] / (p["alpha"] + p["beta"])
            return np.exp(np.asarray(log_g)[..., None] + np.asarray(a)[..., None] * np.log(C / 6))

        N = size(self.params)
        D = C / 6 / N
        table = pd.DataFrame({"flops": C, "params": N, "tokens": D})
        table["loss"] = evaluate_law("surface", self.params, N, D)
        # A resample whose exponents are not positive has no optimum; it stands in the interval as none.
        usable = self.samples.query("alpha > 0 and beta > 0") if len(self.samples) else self.samples
        if len(usable):
            table["params_low"], table["params_high"] = prediction_interval(size(usable), 0.0, N)
        return table

    @property
    def a(self) -> float:
        """Exponent of N_opt in C: beta / (alpha + beta) of a surface, the slope itself of a growth law."""
        if "beta" in self.params:
            return self.params["beta"] / (self.params["alpha"] + self.params["beta"])
        return self.params.get("a", float("nan"))

    @property
    def a_interval(self) -> tuple[float, float]:
        if "beta" in self.params and len(self.samples):
            draws = self.samples["beta"] / (self.samples["alpha"] + self.samples["beta"])
            return _percentiles(draws, self.a)
        return self.intervals.get("a", (float("nan"), float("nan")))

    def table(self) -> pd.DataFrame:
        """One row a parameter: value, low, high, status."""
        rows = {
            name: dict(zip(("low", "high"), self.intervals.get(name, (np.nan, np.nan)), strict=True))
            for name in self.params
        }
        frame = pd.DataFrame(rows).T.rename_axis("parameter")
        frame.insert(0, "value", pd.Series(self.params))
        frame["status"] = pd.Series(self.status)
        return frame

    @property
    def formula(self) -> str:
        return "L = E + A / x^alpha" if self.form == "power" and "E" in self.params else FORMULAS[self.form]

    def surface(self) -> Fit:
        """The surface L(N, D) under a data-constrained law: what fresh text would give, as the planner takes it."""
        if self.form != "data-constrained":
            raise LabError("Only a data-constrained law has a surface under it", f"form={self.form}")
        names = list(SURFACE.params)
        return dataclasses.replace(
            self,
            form="surface",
            samples=self.samples[names] if len(self.samples) else self.samples,
            **{part: {name: getattr(self, part)[name] for name in names} for part in ("params", "intervals", "status")},
        )

    def sentence(self) -> str:
        """The law in words: its formula, each parameter with its interval, and what is not identified."""
        formula = self.formula
        parts = []
        for name, value in self.params.items():
            low, high = self.intervals.get(name, (np.nan, np.nan))
            span = f" [{low:.4g}, {high:.4g}]" if np.isfinite(low) else ""
            verdict = self.status.get(name, "not assessed")
            parts.append(f"{name} = {value:.4g}{span}" + ("" if verdict == "identified" else f" ({verdict})"))
        text = f"{formula} from {self.n} rows: {', '.join(parts)}."
        if "beta" in self.params:
            low, high = self.a_interval
            span = f" [{low:.2f}, {high:.2f}]" if np.isfinite(low) else ""
            verdict = "" if self.a_status == "identified" else f" ({self.a_status})"
            text += f" N_opt grows as C^{self.a:.2f}{span}{verdict}."
        return " ".join([text, *self.warnings])

    def to_dict(self) -> dict:
        """Everything but rows and samples, ready for JSON (a value that is not finite becomes None)."""
        answer = {
            "n": self.n,
            "form": self.form,
            "objective": self.objective,
            "delta": self.delta if self.objective == "huber" else None,
            "value": finite(self.value),
            "params": {name: finite(v) for name, v in self.params.items()},
            "intervals": {name: [finite(v) for v in pair] for name, pair in self.intervals.items()},
            "starts": self.starts,
            "starts_agreeing": self.starts_agreeing,
            "status": dict(self.status),
            "condition": finite(self.condition),
            "warnings": list(self.warnings),
        }
        if "beta" in self.params or self.form == "growth":
            answer |= {"a": finite(self.a), "a_interval": [finite(v) for v in self.a_interval]}
            answer["a_status"] = self.a_status if "beta" in self.params else self.status.get("a", "not assessed")
        return answer


def finite(value: float) -> float | None:
    """A number as JSON can hold it: None for what is not finite."""
    return float(value) if np.isfinite(value) else None


def prediction_interval(
    draws: np.ndarray, seed_sd: float = 0.0, centre: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Central 95 % interval of draws (R, points) blurred by a normal of standard deviation seed_sd: quantiles of the
    mixture, solved for rather than sampled, so the same fit gives the same interval. Returns low and high, (points,).

    The interval reaches the prediction ``centre`` (points,), blurred as well, also where the refits of weak rows lie to
    one side of it: their percentiles are right about where fits may lie but need not hold the one at hand. Reaching out
    to it can only cover more; to shift or mirror the refits instead would leave what a fit can be.
    """
    if seed_sd < 0:
        raise LabError("The spread between seeds must not be negative", f"seed_sd={seed_sd}")
    tails = (0.5 * (1 - LEVEL), 0.5 * (1 + LEVEL))
    if not seed_sd:
        ends = [*np.quantile(draws, tails, axis=0, method="weibull")]  # right on average for few draws too
    else:
        ends = []
        for tail in tails:
            low = draws.min(axis=0) - 10 * seed_sd
            high = draws.max(axis=0) + 10 * seed_sd
            for _ in range(60):
                middle = 0.5 * (low + high)
                below = special.ndtr((middle - draws) / seed_sd).mean(axis=0) < tail
                low, high = np.where(below, middle, low), np.where(below, high, middle)
            ends.append(0.5 * (low + high))
    if centre is not None:
        reach = special.ndtri(tails[1]) * seed_sd
        ends = [np.minimum(ends[0], centre - reach), np.maximum(ends[1], centre + reach)]
    return ends[0], ends[1]


def _percentiles(samples: object, value: float) -> tuple[float, float]:
    """Percentile interval of samples (R,), which reaches the estimate (see ``prediction_interval``)."""
    low, high = prediction_interval(np.asarray(samples, float), 0.0, value)
    return float(low), float(high)


def percentile_intervals(params: dict[str, float], samples: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Percentile intervals of the parameters from samples of them; NaN without any."""
    if not len(samples):
        return dict.fromkeys(params, (np.nan, np.nan))
    return {name: _percentiles(samples[name], value) for name, value in params.items()}


def identification(name: str, value: float, interval: tuple[float, float], freedom: int) -> str:
    """The rule for one parameter, from its 95 % interval and the degrees of freedom (rows, or clusters, less
    parameters).

    Exponents and the floor E are *identified* when the half-width is at most a quarter of the value, *weak* up to three
    quarters, and *not identified* beyond; nor are they when the interval reaches zero (the term may not be there at
    all). Coefficients (A, B, k) multiply a power of a large number, so they are judged by the factor high / low: at
    most 4 is identified, at most 30 weak; for R_D and R_N, which are plain numbers of repeats, at most 3 and 10, and an
    end at a limit of the search is no end. Fewer than three degrees of freedom are at most weak, none is not
    identified. On top of this the fit calls parameters not identified that its design cannot tell apart (see
    ``design_faults``).
    """
    low, high = interval
    if freedom < 1 or not (np.isfinite(low) and np.isfinite(high)):
        return "not identified"
    if name in ("R_D", "R_N"):
        width, limits = high / low, (3.0, 10.0)
        if low <= 1.01 * REPEATS[0] or high >= 0.99 * REPEATS[1]:
            width = np.inf
    elif name in COEFFICIENTS:
        width, limits = (np.inf if low <= 0 else high / low), (4.0, 30.0)
    else:
        reaches_zero = low <= 1e-3 * value <= high if value > 0 else True
        width, limits = (np.inf if reaches_zero else 0.5 * (high - low) / value), (0.25, 0.75)
    if width > limits[1]:
        return "not identified"
    return "weak" if width > limits[0] or freedom < 3 else "identified"


def design_faults(form: PowerSum, X: np.ndarray, names: Sequence[str]) -> list[tuple[str, set[str]]]:
    """What the rows' places alone rule out, before any loss is looked at: sentences, each with the parameters concerned.

    X (d, n) holds log variables. A term beside others needs three distinct values of its variable (values within 1 %
    are one), or it may trade with the floor; the two terms of a surface need log N and log D that do not lie on one line
    (|correlation| above 0.98 counts as a line). Repetition needs two distinct numbers of epochs above one.
    """
    faults: list[tuple[str, set[str]]] = []
    needed = 2 if len(form.terms) == 1 else 3
    for c, s, v in form.terms:
        if s is None:
            continue
        distinct = len(np.unique(np.round(X[v] - X[v].min(), 2)))
        if distinct < needed:
            said = f"{distinct} distinct value{'s' if distinct != 1 else ''} of {names[v]}: {c} and {s} need at least "
            said += f"{needed} to be told apart{' from the rest' if len(form.terms) > 1 else ''}."
            faults.append((said, {c, s} | {name for name, other, _ in form.terms if other is None}))
    if len(X) >= 2 and X[:2].std(axis=1).min() > 0:
        correlation = np.corrcoef(X[:2])[0, 1]
        if abs(correlation) > 0.98:
            slope = np.sign(correlation) * X[1].std() / X[0].std()
            if abs(slope + 1) < 0.05:
                said = (
                    "N x D is (nearly) the same in every row, one budget: it shows where that budget's best size lies, "
                )
                said += (
                    "not how it moves, so alpha and beta cannot be told apart, nor A and B. Add runs at other budgets."
                )
            else:
                ratio = np.exp(np.mean(X[1] - X[0]))
                said = f"D = {ratio:.3g} N" if abs(slope - 1) < 0.05 else f"D follows N^{slope:.2f}"
                said += (
                    " in (nearly) every row: alpha and beta cannot be told apart, nor A and B. Add runs with more and "
                )
                said += "with fewer tokens at the same size."
            faults.append((said, set(form.params) - {"E"}))
    if form is DATA_CONSTRAINED:
        epochs = np.round(X[1] - X[2], 2)
        if len(np.unique(epochs[epochs > 0.02])) < 2:
            said = "Fewer than two distinct numbers of epochs above one: what repeats are worth cannot be told."
            faults.append((said, {"R_D", "R_N"}))
    return faults


# ---------------------------------------------------------------------------------------------------------------- fits


def fit_power(
    x: object,
    y: object,
    floor: bool = False,
    objective: str = "huber",
    delta: float = 1e-3,
    bootstrap: int = 1000,
    clusters: object = None,
    weights: object = None,
    seed: int = 0,
) -> Fit:
    """y = A x^-alpha, or E + A x^-alpha with a floor, by the chosen objective on log y (see ``fit_surface``).

    With three to five points a floor is often not identified; ``status`` says so, and the fit without a floor then is
    the one to use. x, y (n,) positive and finite.
    """
    return _fit(POWER_FLOOR if floor else POWER, [x], y, ["x"], objective, delta, bootstrap, clusters, weights, seed)


def fit_growth(
    x: object,
    y: object,
    objective: str = "huber",
    delta: float = 1e-3,
    bootstrap: int = 1000,
    clusters: object = None,
    weights: object = None,
    seed: int = 0,
) -> Fit:
    """y = k x^a: what grows with compute, such as N_opt(C). A straight line in log-log."""
    return _fit(GROWTH, [x], y, ["x"], objective, delta, bootstrap, clusters, weights, seed)


def fit_surface(
    params: object,
    tokens: object,
    loss: object,
    objective: str = "huber",
    delta: float = 1e-3,
    bootstrap: int = 1000,
    clusters: object = None,
    weights: object = None,
    starts: object = None,
    seed: int = 0,
) -> Fit:
    """L(N, D) = E + A / N^alpha + B / D^beta, fitted on log L (Hoffmann et al. 2022, eq. 10; Besiroglu et al. 2024).

    params N, tokens D, loss L (nats): arrays (n,), positive and finite, one row a finished run, in any units.
    objective: ``huber`` (summed, delta on log residuals), ``lsq`` (sum of squares) or ``lad`` (sum of absolute values).
    bootstrap: resamples, warm-started at the optimum, see ``resampled``. A resample weighs each row anew, or each of
        ``clusters`` (n,) where these are given, for instance all runs of one size. Exact copies of a row count once.
    weights: (n,) positive factors on the rows. starts: (S, 5) of (E, A, B, alpha, beta); None is Hoffmann's grid.

    Raises LabError for rows that are not positive and finite (by number), and for fewer rows than parameters.
    """
    names = ["params", "tokens"]
    return _fit(
        SURFACE, [params, tokens], loss, names, objective, delta, bootstrap, clusters, weights, seed, starts
    )  # fmt: skip


def fit_data_constrained(
    params: object,
    tokens: object,
    unique: object,
    loss: object,
    objective: str = "huber",
    delta: float = 1e-3,
    bootstrap: int = 1000,
    clusters: object = None,
    weights: object = None,
    starts: object = None,
    seed: int = 0,
) -> Fit:
    """The surface where text is repeated (Muennighoff et al. 2023, arXiv:2305.16264): L = E + A / N'^alpha + B / D'^beta
    with N' and D' what parameters and tokens are worth over ``unique`` distinct tokens (``forms.DataConstrained``).

    All seven parameters, R_D and R_N among them, are fitted at once, so that their intervals know of each other. Rows
    without repetition belong in the fit: they carry the surface. unique (n,): distinct tokens; what exceeds tokens
    counts as tokens. R_D and R_N are searched between 0.01 and 10,000. starts: (S, 7). Otherwise as ``fit_surface``.
    """
    names = ["params", "tokens", "unique"]
    N, D, U, _ = _columns({"params": params, "tokens": tokens, "unique": unique, "loss": loss})
    inputs = [N, D, np.minimum(U, D)]
    return _fit(DATA_CONSTRAINED, inputs, loss, names, objective, delta, bootstrap, clusters, weights, seed, starts)


def _fit(form, inputs, y, names, objective, delta, bootstrap, clusters, weights, seed, starts=None) -> Fit:
    if objective not in OBJECTIVES:
        raise LabError(f"The objective must be one of {', '.join(OBJECTIVES)}", objective)
    if not (np.isfinite(delta) and delta > 0):
        raise LabError("delta must be a positive number", delta, "1e-3 is usual")
    arrays = _columns(dict(zip(names, inputs, strict=True)) | {"loss" if form is not GROWTH else "y": y})
    *inputs, y = arrays
    n, p = len(y), len(form.params)
    if n < p:
        raise LabError(f"A {form.name} law with {p} parameters needs at least {p} rows", f"{n} rows", "add runs")
    w = np.ones(n) if weights is None else _columns({"weights": weights, "loss": y})[0]
    logs = np.log(np.array(inputs))
    centre = form.centre(logs)
    X, log_y = logs - centre[:, None], np.log(y)
    level = float(np.median(log_y))

    if starts is not None:
        begin = form.theta(pd.DataFrame(np.atleast_2d(np.asarray(starts, float)), columns=form.params), centre)
        times = np.ones(len(begin), int)
    elif form is DATA_CONSTRAINED:
        begin, times = _repetition_starts(X, log_y, w, centre, level)
    else:
        begin, times = hoffmann_grid(form, centre, level)
    path = deltas(objective, delta)
    last = path[-1]
    thetas, values = solve(form, begin, X, log_y, w, path)
    slow = (values > values.min() * (1 + 1e-6)) & (values < values.min() * 1.01)  # in a flat valley, not yet at its end
    if slow.any():
        thetas[slow], values[slow] = minimise(form, thetas[slow], X, log_y, w, last, steps=1000)
    if len(path) > 1:  # least squares may have led all starts to gross outliers, so some go without it
        more, there = solve(form, begin[:: max(1, len(begin) // 50)], X, log_y, w, path[1:][-2:])
        thetas, values = np.concatenate([thetas, more]), np.concatenate([values, there])
        times = np.concatenate([times, np.zeros(len(more), int)])
    # Under one budget the two terms may change places, N^-alpha for D^beta: of equal optima the one that falls is meant.
    falling = (thetas[:, len(form.terms) :] > 0).all(axis=1)
    near = [int(np.argmin(values)), int(np.argmin(np.where(falling, values, np.inf)))]
    polished, least = minimise(form, thetas[near], X, log_y, w, last, steps=500, tolerance=0.0)
    chosen = int(least[1] <= least[0] * (1 + 1e-6) and (polished[1, len(form.terms) :] > 0).all())
    theta, least = polished[chosen : chosen + 1], least[chosen : chosen + 1]
    agrees = values <= least[0] * (1 + 1e-6) + 1e-14 * n * min(last, 1.0)
    m, state = form.evaluate(theta, X)
    r = log_y - m[0]
    value = {"huber": huber(r, delta), "lsq": r**2, "lad": np.abs(r)}[objective] @ w

    units, copies = _units(clusters, [*inputs, y])
    freedom = int(units.max()) + 1 - p
    samples = pd.DataFrame()
    if bootstrap and freedom >= 1:
        drawn = resampled(form, theta, X, log_y, w, units, objective, delta, bootstrap, seed)
        samples = form.natural(drawn, centre)

    fitted = form.natural(theta, centre).iloc[0].to_dict()
    nothing = 1e-6 * y.min()
    if fitted.get("E", 1.0) < nothing:
        fitted["E"] = 0.0
    if "E" in samples:
        samples["E"] = samples["E"].where(samples["E"] > nothing, 0.0)
    faults = design_faults(form, logs, [{"params": "N", "tokens": "D"}.get(name, name) for name in names])
    if fitted.get("E") == 0:
        faults.append(("The floor E ends at zero: these rows show no floor.", {"E"}))
    for c, s, _ in form.terms:
        if s and form is not GROWTH and fitted[s] <= 0:
            variable = {"alpha": "N", "beta": "D"}[s] if "beta" in fitted else "x"
            faults.append((f"{s} is not positive: in these rows the loss does not fall with {variable}.", {c, s}))
    # The slope in log A is one up to U_N, and less above it.
    if form is DATA_CONSTRAINED and (1 - state[0, 3] > 0.02).sum() < 3:
        faults.append(("Fewer than three runs are larger than their text could feed: R_N cannot be told.", {"R_N"}))
    warnings = [said for said, _ in faults]
    reasons = {name: said for said, concerned in reversed(faults) for name in concerned}
    if copies:
        warnings.append(f"{copies} of {n} rows are exact copies of others: fitted as they are, but drawn as one.")
    if bootstrap and not len(samples):
        warnings.append(f"{n} rows in {freedom + p} units are too few for {p} parameters: no intervals.")
    total, agreeing = int(times.sum()), max(1, int(times[agrees].sum()))
    if agreeing < 0.1 * total:
        warnings.append(f"Only {agreeing} of {total} starts reach the best optimum: it may not be the global one.")
    intervals = percentile_intervals(fitted, samples)
    limit = profile_threshold(r, w, p, objective, delta)
    leaning = False
    if len(samples) and "E" in fitted:
        low, high = intervals["E"]
        least_floor, most = _floors(form, theta, X, log_y, w, last, least[0] + limit, centre)
        intervals["E"] = (min(low, least_floor), max(high, most))
        leaning = np.ptp(intervals["E"]) > 1.5 * (high - low) and np.ptp(intervals["E"]) > 0.25 * y.min()
    status = {
        name: "not assessed"
        if not bootstrap
        else "not identified"
        if name in reasons
        else identification(name, fitted[name], intervals[name], 1 if leaning else freedom)
        for name in form.params
    }
    if leaning:
        span = "{:.3g} to {:.3g}".format(*intervals["E"])
        warnings.append(f"Floors from {span} fit as well, with other exponents: none is more than weak.")
    J = form.jacobian(state, X)[0] * np.sqrt(w)
    data = pd.DataFrame(
        dict(zip(names, inputs, strict=True))
        | {"observed": y, "predicted": np.exp(m[0]), "residual": r, "weight": w, "unit": units}
    )
    fit = Fit(
        form=form.name,
        params=fitted,
        intervals=intervals,
        value=float(value),
        n=n,
        objective=objective,
        delta=delta,
        starts=total,
        starts_agreeing=agreeing,
        status=status,
        warnings=warnings,
        samples=samples,
        condition=float(np.linalg.cond(J / np.maximum(np.linalg.norm(J, axis=1), 1e-300)[:, None])),
        data=data,
        reasons=reasons,
    )
    if bootstrap and "beta" in fitted:
        told_apart = not {"alpha", "beta"} & set(reasons)
        enough = 1 if leaning else freedom
        fit.a_status = identification("a", fit.a, fit.a_interval, enough) if told_apart else "not identified"
    others = thetas[~agrees & (values <= least[0] + limit)]
    if len(others) and starts is None:
        fit.rivals = _rivals(form, others, X, log_y, w, last, least[0], limit, centre)
        _doubt(fit)
    return fit


def _floors(form, theta, X, log_y, w, delta, limit, centre) -> tuple[float, float]:
    """The least and the largest floor E, in steps of a twentieth of the lowest loss, at which the objective is within its
    limit (infinity and zero where none is). Resamples start at one optimum, and seldom leave the valley of few rows."""
    lowest, now = np.exp(log_y.min()), float(np.exp(theta[0, 0]))
    floors = lowest * np.append(1e-3, np.arange(0.05, 1.0, 0.05))
    lines = [form.held("E", floor, centre) for floor in floors]
    held = np.array([row for row, _ in lines]), np.array([right for _, right in lines])
    begin = np.repeat(theta, len(floors), axis=0)
    begin[:, 1 : len(form.terms)] += np.log((lowest - floors) / max(lowest - now, 0.01 * lowest))[:, None]
    values = minimise(form, begin, X, log_y, w, delta, held=held)[1]
    allowed = np.append(0.0, floors[1:])[values <= limit]
    return float(np.min(allowed, initial=np.inf)), float(np.max(allowed, initial=0.0))


def _units(clusters: object, columns: list[np.ndarray]) -> tuple[np.ndarray, int]:
    """The unit that each row is drawn with, numbered from 0, and how many rows are exact copies of an earlier one."""
    n = len(columns[0])
    copy_of = np.unique(np.stack(columns), axis=1, return_inverse=True)[1].ravel()
    copies = n - int(copy_of.max()) - 1
    if clusters is None:
        return pd.factorize(copy_of)[0], copies
    units = pd.factorize(np.asarray(clusters))[0]
    if len(units) != n:
        raise LabError("clusters must name one cluster a row", f"{len(units)} clusters, {n} rows")
    return units, copies


def _repetition_starts(X, log_y, w, centre, level) -> tuple[np.ndarray, np.ndarray]:
    """Starts of a data-constrained fit: the surface's optima by least squares, on all rows and on those without
    repetition, and a few points of its grid, each with R_D and R_N over four decades."""
    grid, _ = hoffmann_grid(SURFACE, centre, level)
    found = [grid[len(grid) // 14 :: len(grid) // 7]]
    fresh = X[1] <= X[2] + 0.02
    for rows in (np.full(len(log_y), True), fresh):
        if rows.sum() >= 8:
            thetas, values = minimise(SURFACE, grid, X[:2, rows], log_y[rows], w[rows], np.inf, steps=60)
            found.append(thetas[np.argsort(values)[:1]])
    surfaces = np.concatenate(found)
    repeats = np.log([[d, k] for d in (0.5, 3, 15, 80, 1000) for k in (0.5, 5, 50, 1000)])
    starts = np.hstack([np.repeat(surfaces, len(repeats), axis=0), np.tile(repeats, (len(surfaces), 1))])
    return starts, np.ones(len(starts), int)


def _rivals(form, others, X, log_y, w, delta, least, limit, centre) -> pd.DataFrame:
    """Optima that are not the best but as good within the noise: the distinct ends of what starts came near them."""
    step = max(1, len(others) // 12)
    thetas, values = minimise(form, others[::step], X, log_y, w, delta, steps=300, tolerance=1e-14)
    worse = (values > least * (1 + 1e-6)) & (values <= least + limit)
    if not worse.any():
        return pd.DataFrame()
    keep = np.unique(np.round(thetas[worse], 2), axis=0, return_index=True)[1]
    table = form.natural(thetas[worse][keep], centre).assign(value=values[worse][keep])
    return table.sort_values("value", ignore_index=True).head(5)


def _doubt(fit: Fit) -> None:
    """A parameter that another optimum, as good within the noise, puts outside its interval is not identified."""
    for name, (low, high) in fit.intervals.items():
        if not len(fit.rivals) or not np.isfinite(low):
            continue
        outside = fit.rivals[name][(fit.rivals[name] < low) | (fit.rivals[name] > high)]
        if len(outside):
            said = f"Another optimum, as good within the noise, lies at {name} = {outside.iloc[0]:.3g}, outside its interval."
            fit.status[name] = "not identified"
            fit.reasons.setdefault(name, said)
            fit.warnings.append(said)


def _columns(named: dict[str, object]) -> list[np.ndarray]:
    """Arrays of one length, positive and finite, or an error that names the column and the rows."""
    arrays = []
    for name, values in named.items():
        try:
            array = np.ravel(np.asarray(values, dtype=float))
        except (TypeError, ValueError) as error:
            raise LabError(f"{name} must be numbers", str(error)) from error
        bad = np.flatnonzero(~(np.isfinite(array) & (array > 0)))
        if len(bad):
            shown = ", ".join(f"row {i}: {array[i]}" for i in bad[:5]) + (", ..." if len(bad) > 5 else "")
            raise LabError(f"{name} must be positive and finite in every row", shown, "leave those rows out by name")
        arrays.append(array)
    lengths = {name: len(array) for name, array in zip(named, arrays, strict=True)}
    if len(set(lengths.values())) != 1:
        raise LabError("All columns must have one length", lengths)
    return arrays


# ----------------------------------------------------------------------------------------------------------- certainty


def resampled(form, theta, X, log_y, w, units, objective, delta, count, seed) -> np.ndarray:
    """theta (R, p) of R resamples, all refitted at once from the optimum of the whole.

    A Bayesian bootstrap (Rubin 1981): every unit, a row or a cluster, gets a random weight of mean one. Unlike draws
    with replacement it leaves no size out, so that few rows stay a design, and every resample is itself a fit, with no
    parameter where no fit could be. Three things make the intervals cover at their rate from a dozen rows up (measured
    by ``coverage``):

    - Absolute deviations hop between rows, the more the fewer there are: resamples are refitted with a zone of at least a
      quarter of the residuals' robust spread, up to 2.5 times Huber's own for few rows.
    - Residuals are too small by the pull h of their own row on the fit. Where they count by their size, weights are
      drawn not from an exponential but from a gamma distribution of standard deviation 1 / (1 - h), so that the scores
      spread as in HC3 (MacKinnon and White 1985); where they count by their sign the standard deviation stays one, and
      in between it goes by the share of rows in the quadratic zone, the mean of the fit's and the refits'.
    - A straight line from few rows needs Student's t: its deviations are stretched by t / 1.96. Those of sums of terms
      are wide enough by their own curvature.
    """
    n, p, count_units = len(log_y), theta.shape[1], int(units.max()) + 1
    own = zone = {"huber": delta, "lsq": np.inf, "lad": LAD_DELTA}[objective]
    m, state = form.evaluate(theta, X)
    size, middle = np.abs(log_y - m[0]), theta
    if np.isfinite(own):
        zone = max(0.25 * robust_sd(size), own * (1 + min(1.5, 12 * p / count_units)))
        middle, _ = minimise(form, theta, X, log_y, w, zone, tolerance=1e-12)
    inside = [max(0.0, ((size <= limit).sum() - p) / (n - p)) for limit in (own, zone)]  # p would be without any noise
    quadratic = 0.5 * sum(inside)
    spread = 1 + quadratic * (1 / (1 - _pulls(form.jacobian(state, X)[0].T, w, units)) - 1)
    draws = np.random.default_rng(seed).gamma(1 / spread**2, spread**2, size=(count, count_units))
    draws *= count_units / draws.sum(axis=1, keepdims=True)
    begin = np.repeat(middle, count, axis=0)
    thetas, _ = minimise(form, begin, X, log_y, draws[:, units] * w, zone, steps=100, tolerance=1e-9)
    if len(form.terms) == 1:
        tail = 0.5 * (1 + LEVEL)
        thetas = theta + (thetas - middle) * stats.t.ppf(tail, count_units - p) / stats.norm.ppf(tail)
    return thetas


def _pulls(J: np.ndarray, w: np.ndarray, units: np.ndarray) -> np.ndarray:
    """How much of each unit's own error its fitted value follows, at most two thirds: the leverage of a row, the largest
    eigenvalue of a cluster's block. J (n, p) slopes, w (n,) weights, units (n,)."""
    J = J * np.sqrt(w)[:, None]
    Q, _ = np.linalg.qr(J / (np.linalg.norm(J, axis=0) + 1e-150))
    blocks = np.zeros((int(units.max()) + 1, Q.shape[1], Q.shape[1]))
    np.add.at(blocks, units, Q[:, :, None] * Q[:, None, :])
    return np.minimum(np.linalg.eigvalsh(blocks)[:, -1], 2 / 3)


def robust_sd(r: np.ndarray) -> float:
    """1.4826 times the median size: the standard deviation, if the residuals are normal but for a few."""
    return 1.4826 * float(np.median(np.abs(r)))


def profile_threshold(r: np.ndarray, w: np.ndarray, p: int, objective: str, delta: float) -> float:
    """How far the objective may rise above its least while a parameter held elsewhere is still within its 95 % region.

    The likelihood-ratio test of robust regression (Schrader and Hettmansperger 1980): F / 2 times the mean squared
    influence over the mean slope of the influence; for least squares the usual F test. In units of Huber's rho. r (n,)
    log residuals at the optimum, w (n,) weights, p parameters.
    """
    n = len(r)
    if n <= p:
        return float("inf")
    zone = {"huber": delta, "lsq": np.inf, "lad": LAD_DELTA}[objective]
    psi, slope = np.clip(r, -zone, zone), 1.0
    if np.isfinite(zone):  # rows inside the zone may be few: count them in a wider one, where the density is the same
        window = max(zone, 0.5 * robust_sd(r))
        slope = np.average(np.abs(r) <= window, weights=w) * zone / window
    spread = ((w * psi) ** 2).mean() / w.mean()
    return float(0.5 * stats.f.ppf(LEVEL, 1, n - p) * spread / max(slope, 1e-12) * n / (n - p))


# ------------------------------------------------------------------------------------------------------------- compute


@dataclass
class IsoFlop:
    """IsoFLOP families and their laws. minima: as ``isoflop_minima``, with 95 % intervals (``params_low`` ...
    ``loss_high``).
    sizes: each size at its best rate. laws: ``N_opt`` = k C^a, ``D_opt`` = k C^a and ``L_min`` = A C^-alpha as ``Fit``.
    scatter: standard deviation (nats) of the sizes about their parabolas."""

    minima: pd.DataFrame
    sizes: pd.DataFrame
    laws: dict[str, Fit]
    scatter: float
    warnings: list[str]

    def table(self) -> pd.DataFrame:
        """The laws' parameters in one frame, with the law's name as first index."""
        return pd.concat({name: law.table() for name, law in self.laws.items()}, names=["law"])


def isoflop_laws(
    frame: pd.DataFrame,
    budget: str = "budget",
    params: str = "params_total",
    tokens: str = "tokens_seen",
    loss: str = "val_loss",
    bootstrap: int = 1000,
    seed_sd: float | None = None,
    seed: int = 0,
) -> IsoFlop:
    """N_opt(C), D_opt(C) and L_min(C) from isoFLOP minima, as straight lines in log-log with intervals.

    The minima are few and far from independent of their runs, so the bootstrap redraws the runs: every size's loss gets
    new normal noise about its parabola, the minima and the lines are fitted again. The noise is the pooled scatter
    about the parabolas, its own uncertainty included (a scaled inverse chi-square draw); with no degrees of freedom
    left it is ``seed_sd`` (nats), and without that there are no intervals. Only minima inside their grid count.
    """
    best = best_sizes(frame, budget, params, tokens, loss)
    families = [(key, family) for key, family in best.groupby(budget)]
    rows, residuals = zip(*(minimum(family, key, params, tokens, loss) for key, family in families), strict=True)
    minima = pd.DataFrame(rows)
    warnings = []
    for row in rows:
        if not row["inside"]:
            warnings.append(f"At {row['budget']:.3g} FLOPs the minimum is not inside the sizes tried; no law uses it.")
        elif row["edges"]:
            warnings.append(f"At {row['budget']:.3g} FLOPs {row['edges']} sizes have their best rate at an edge.")
    used = [i for i, row in enumerate(rows) if row["inside"]]
    if len(used) < 2:
        raise LabError(
            "IsoFLOP laws need at least two budgets whose minimum lies inside the sizes tried",
            f"{len(used)} of {len(rows)} budgets",
            "add sizes beyond the edge where the loss still falls, or more budgets",
        )
    freedom = sum(len(r) - 3 for r in residuals if len(r) > 3)
    scatter = float(np.sqrt(sum((r**2).sum() for r in residuals) / freedom)) if freedom else float("nan")
    rng = np.random.default_rng(seed)
    if freedom:
        noise = scatter * np.sqrt(freedom / rng.chisquare(freedom, size=bootstrap))
    else:
        noise = np.full(bootstrap, seed_sd if seed_sd else np.nan)
    if not np.isfinite(noise).all():
        warnings.append("Three sizes a budget leave no scatter to judge by: no intervals. Add a size, or give seed_sd.")
        noise = noise[:0]

    draws = {name: np.empty((len(noise), len(used))) for name in ("params_opt", "tokens_opt", "loss_min")}
    for column, i in enumerate(used):
        family = families[i][1]
        x, log_d = np.log(family[params].to_numpy(float)), np.log(family[tokens].to_numpy(float))
        L = family[loss].to_numpy(float)
        middle = x.mean()
        powers = np.vander(x - middle, 3)
        mean = powers @ np.linalg.lstsq(powers, L, rcond=None)[0]
        a, b, c = np.linalg.pinv(powers) @ (mean[:, None] + rng.standard_normal((len(x), len(noise))) * noise)
        # A redrawn family whose minimum leaves the grid stops at its edge: the truth may be farther still, so the
        # interval is honest about its direction though not about its length; such families are flagged above.
        vertex = np.clip(np.where(a > 0, -b / (2 * a), np.where(b > 0, -np.inf, np.inf)), x[0] - middle, x[-1] - middle)
        draws["params_opt"][:, column] = np.exp(middle + vertex)
        draws["tokens_opt"][:, column] = np.exp(np.interp(middle + vertex, x, log_d))
        draws["loss_min"][:, column] = a * vertex**2 + b * vertex + c
    for name, values in draws.items():
        low, high = np.quantile(values, [0.025, 0.975], axis=0) if len(values) else (np.nan, np.nan)
        what = name.split("_")[0]
        minima.loc[used, f"{what}_low"], minima.loc[used, f"{what}_high"] = low, high

    C = minima.budget.to_numpy()[used]
    laws = {
        law: _line(C, minima[name].to_numpy()[used], draws[name], form, freedom)
        for law, name, form in (
            ("N_opt", "params_opt", GROWTH),
            ("D_opt", "tokens_opt", GROWTH),
            ("L_min", "loss_min", POWER),
        )
    }
    return IsoFlop(minima, best, laws, scatter, warnings)


@dataclass
class Frontier:
    """The compute frontier and its laws. points: the rows that no cheaper one beats, by rising compute. laws: ``N_opt``
    = k C^a, ``D_opt`` = k C^a and ``L_min`` = A C^-alpha as ``Fit``."""

    points: pd.DataFrame
    laws: dict[str, Fit]
    warnings: list[str]

    def table(self) -> pd.DataFrame:
        """The laws' parameters in one frame, with the law's name as first index."""
        return pd.concat({name: law.table() for name, law in self.laws.items()}, names=["law"])


def frontier_laws(
    frame: pd.DataFrame,
    flops: str = "flops",
    params: str = "params_total",
    tokens: str = "tokens_seen",
    loss: str = "val_loss",
    run: str | None = None,
    bootstrap: int = 200,
    seed: int = 0,
) -> Frontier:
    """N_opt(C), D_opt(C) and L_min(C) along the lower envelope of all points (Hoffmann et al. 2022, approach 1; see
    ``optima.frontier``), as straight lines in log-log.

    The envelope is chosen by the losses it is made of, so the bootstrap draws whole runs (``run`` names their column;
    without it each row is one) and takes the envelope and fits the lines again. Few points make an envelope, and its
    losses are the luckiest: prefer ``isoflop_laws`` or ``fit_surface`` where the runs allow them.
    """
    require_columns(frame, [flops, params, tokens, loss])
    frame = frame.reset_index(drop=True)
    C, values = frame[flops].to_numpy(float), frame[[params, tokens, loss]].to_numpy(float)
    chosen = frontier(C, values[:, 2])
    if len(np.unique(C[chosen])) < 2:
        raise LabError("A frontier's laws need at least two points", f"{len(chosen)}", "add runs at other budgets")
    units = np.arange(len(C)) if run is None else pd.factorize(frame[run])[0]
    rng, draws = np.random.default_rng(seed), []
    lines = np.stack([np.ones(len(chosen)), np.log(C[chosen])], axis=1)
    for _ in range(bootstrap):
        groups = units.max() + 1
        kept = np.flatnonzero(np.isin(units, rng.integers(0, groups, groups)))
        again = kept[frontier(C[kept], values[kept, 2])]
        if len(np.unique(C[again])) >= 2:
            design = np.stack([np.ones(len(again)), np.log(C[again])], axis=1)
            draws.append(np.exp(lines @ np.linalg.lstsq(design, np.log(values[again]), rcond=None)[0]))
    drawn = np.array(draws) if len(draws) > 0.9 * bootstrap > 0 else np.empty((0, len(chosen), 3))
    freedom = len(chosen) - 2
    forms = (("N_opt", GROWTH), ("D_opt", GROWTH), ("L_min", POWER))
    laws = {
        name: _line(C[chosen], values[chosen, i], drawn[:, :, i], form, freedom) for i, (name, form) in enumerate(forms)
    }
    warnings = [] if len(drawn) else ["Too few runs for intervals: most draws of them leave no frontier."]
    return Frontier(frame.loc[chosen].reset_index(drop=True), laws, warnings)


def _line(x: np.ndarray, y: np.ndarray, draws: np.ndarray, form: PowerSum, freedom: int) -> Fit:
    """A straight line in log-log by least squares, refitted to every row of draws (R, n)."""
    centre = np.log(x).mean()
    design = np.stack([np.ones(len(x)), -(np.log(x) - centre)], axis=1)
    inverse = np.linalg.pinv(design)
    theta = inverse @ np.log(y)
    r = np.log(y) - design @ theta
    params = form.natural(theta[None], np.array([centre])).iloc[0].to_dict()
    samples = form.natural((inverse @ np.log(draws).T).T, np.array([centre])) if len(draws) else pd.DataFrame()
    intervals = percentile_intervals(params, samples)
    # Two budgets give a line whatever the law is: at most weak.
    checkable = min(freedom, 3 if len(x) > 2 else 1)
    warnings = [] if len(x) > 2 else ["Two budgets always lie on a line: nothing here tests the power law itself."]
    return Fit(
        form=form.name,
        params=params,
        intervals=intervals,
        value=float(r @ r),
        n=len(x),
        objective="lsq",
        starts=1,
        starts_agreeing=1,
        status={name: identification(name, params[name], intervals[name], checkable) for name in params},
        warnings=warnings,
        samples=samples,
        condition=float(np.linalg.cond(design / np.linalg.norm(design, axis=0))),
        data=pd.DataFrame({"x": x, "observed": y, "predicted": np.exp(design @ theta), "residual": r}),
    )
