"""Scaling laws: fitted from records of runs, with intervals, and with a plain word on what the data cannot tell.

Notation here and in the plots: N parameters, D training tokens, C training FLOPs, L loss in nats per token.

Every loss law is a sum of power terms, L = sum_k A_k x_k^-s_k (a floor is a term without a variable). It is fitted on
log L, where the sum is a logsumexp of straight lines in log x (Hoffmann et al. 2022, arXiv:2203.15556, eq. 10;
Besiroglu et al. 2024, arXiv:2404.10102). The variables are centred at their geometric means, so that all parameters are
of order one; the objective is *summed*, since a mean lets default tolerances stop an optimiser early. One batched
damped Newton method with analytic first and second derivatives (``minimise``) serves the starts, the polish and all
bootstrap resamples at once.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import special, stats

from tinylm.errors import LabError

OBJECTIVES = ("huber", "lsq", "lad")
LEVEL = 0.95
LEAST = -30.0  # log of the smallest term, relative to the typical loss, that the optimiser can tell from zero
LAD_DELTA = 1e-9  # absolute deviations are the limit of Huber's objective: at this delta the two agree to 1e-9 a row
COEFFICIENTS = ("A", "B", "k")  # these multiply a power and span decades, so they are judged by a factor
SYMBOLS = {"power": ("x",), "growth": ("x",), "surface": ("params", "tokens")}


# --------------------------------------------------------------------------------------------------------------- forms


@dataclass(frozen=True)
class PowerSum:
    """log y = logsumexp_k(c_k - s_k u_k). ``terms`` are (coefficient, exponent, variable); a floor has only the first.

    theta (S, p) holds S parameter vectors: first all c_k, then the exponents. X (d, n) holds the centred log variables.
    """

    name: str
    terms: tuple[tuple[str, str | None, int | None], ...]

    @property
    def params(self) -> tuple[str, ...]:
        return tuple(c for c, _, _ in self.terms) + tuple(s for _, s, _ in self.terms if s)

    @property
    def slots(self) -> list[tuple[int, int | None, int | None]]:
        """For each term the index of its coefficient, of its exponent and of its variable."""
        names = self.params
        return [(names.index(c), names.index(s) if s else None, v) for c, s, v in self.terms]

    def evaluate(self, theta: np.ndarray, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Model m = log y, (S, n), and each term's share of y, (S, K, n): the softmax of the terms."""
        logs = np.empty((len(theta), len(self.terms), X.shape[1]))
        for k, (c, s, v) in enumerate(self.slots):
            logs[:, k] = theta[:, c, None] if s is None else theta[:, c, None] - theta[:, s, None] * X[v]
        top = logs.max(axis=1)
        shares = np.exp(logs - top[:, None], out=logs)
        total = shares.sum(axis=1)
        shares /= total[:, None]
        return top + np.log(total), shares

    def jacobian(self, shares: np.ndarray, X: np.ndarray) -> np.ndarray:
        """dm/dtheta, (S, p, n)."""
        J = np.empty((shares.shape[0], len(self.params), shares.shape[2]))
        for k, (c, s, v) in enumerate(self.slots):
            J[:, c] = shares[:, k]
            if s is not None:
                np.multiply(shares[:, k], -X[v], out=J[:, s])
        return J

    def curvature(self, psi: np.ndarray, shares: np.ndarray, J: np.ndarray, X: np.ndarray) -> np.ndarray:
        """sum_i psi_i d2m_i/dtheta2, (S, p, p): a logsumexp curves by the covariance of its terms' gradients."""
        Q = np.zeros((len(psi), J.shape[1], J.shape[1]))
        for k, (c, s, v) in enumerate(self.slots):
            weight = psi * shares[:, k]
            Q[:, c, c] = weight.sum(axis=1)
            if s is not None:
                Q[:, c, s] = Q[:, s, c] = -(weight @ X[v])
                Q[:, s, s] = weight @ (X[v] * X[v])
        return Q - (J * psi[:, None]) @ J.transpose(0, 2, 1)

    def box(self, level: float) -> tuple[np.ndarray, np.ndarray]:
        """Limits of theta around the typical log y, so far outside that only degenerate fits touch them."""
        exponents = len(self.params) - len(self.terms)
        low = [level + LEAST] * len(self.terms) + [-6.0] * exponents
        high = [level - LEAST] * len(self.terms) + [6.0] * exponents
        return np.array(low), np.array(high)

    def natural(self, theta: np.ndarray, centre: np.ndarray) -> pd.DataFrame:
        """Parameters as people write them (E, A, ...) from theta and the variables' mean logs."""
        columns = {}
        for (c, s, v), (name, exponent, _) in zip(self.slots, self.terms, strict=True):
            columns[name] = np.exp(theta[:, c] + (0 if s is None else theta[:, s] * centre[v]))
            if exponent:
                columns[exponent] = theta[:, s]
        table = pd.DataFrame(columns)[list(self.params)]
        if self.name == "growth":  # y = k x^a is the same line with its slope's sign turned
            table["a"] = -table["a"]
        return table


POWER = PowerSum("power", (("A", "alpha", 0),))
POWER_FLOOR = PowerSum("power", (("E", None, None), ("A", "alpha", 0)))
GROWTH = PowerSum("growth", (("k", "a", 0),))
SURFACE = PowerSum("surface", (("E", None, None), ("A", "alpha", 0), ("B", "beta", 1)))


def evaluate_law(form: str, params: dict | pd.DataFrame, *inputs: np.ndarray) -> np.ndarray:
    """y of a law from its natural parameters, (points,); from a frame of R rows of parameters, (R, points)."""

    def get(name: str) -> np.ndarray:
        return params[name].to_numpy()[:, None] if isinstance(params, pd.DataFrame) else np.float64(params[name])

    logs = [np.log(np.asarray(values, float)) for values in inputs]
    if form == "growth":
        return get("k") * np.exp(get("a") * logs[0])
    y = np.exp(np.log(get("A")) - get("alpha") * logs[0])
    if form == "surface":
        y = y + np.exp(np.log(get("B")) - get("beta") * logs[1])
    return y + get("E") if "E" in params else y


# ----------------------------------------------------------------------------------------------------------- optimiser


def huber(r: np.ndarray, delta: float) -> np.ndarray:
    """Huber's rho: r^2 / 2 up to delta, delta (|r| - delta / 2) beyond. With delta infinite half the square."""
    size = np.abs(r)
    inner = np.minimum(size, delta)
    return inner * (size - 0.5 * inner)


def objective_and_gradient(
    form: PowerSum, theta: np.ndarray, X: np.ndarray, y: np.ndarray, w: np.ndarray, delta: float
) -> tuple[np.ndarray, np.ndarray]:
    """Summed objective (S,) and its gradient (S, p) at theta (S, p); y (n,) is log loss, w (n,) or (S, n) weights."""
    m, shares = form.evaluate(theta, X)
    r = y - m
    psi = w * np.clip(r, -delta, delta)
    return (w * huber(r, delta)).sum(axis=1), -(form.jacobian(shares, X) @ psi[:, :, None])[:, :, 0]


def minimise(
    form: PowerSum,
    theta: np.ndarray,
    X: np.ndarray,
    y: np.ndarray,
    w: np.ndarray,
    delta: float,
    *,
    steps: int = 200,
    tolerance: float = 1e-12,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise sum_i w_i huber(y_i - m_i(theta)) from all rows of theta (S, p) at once; returns theta, objectives (S,).

    Damped semismooth Newton. Huber's objective is quadratic between kinks: the Newton matrix counts the rows within
    delta plus the model's own curvature. It is damped by the matrix of reweighted least squares, which majorises it, so
    that a rejected step is tried shorter in the same scale-free metric; this passes the kinks where L-BFGS stalls. A
    row has converged when three steps in a row change its objective by less than ``tolerance``, relative.
    """
    out, best = theta.copy(), np.empty(len(theta))
    w = np.broadcast_to(w, (len(theta), len(y)))
    chunk = max(1, 32768 // len(y))  # keeps the working arrays in the processor's cache
    for start in range(0, len(theta), chunk):
        part = slice(start, start + chunk)
        out[part], best[part] = _minimise_chunk(form, theta[part], X, y, w[part], delta, steps, tolerance)
    return out, best


def _minimise_chunk(form, theta, X, y, w, delta, steps, tolerance):
    theta = theta.copy()
    low, high = form.box(float(np.median(y)))
    theta = np.clip(theta, low, high)
    most = np.where(np.arange(len(low)) < len(form.terms), 2.0, 0.5)  # longest step in a log coefficient, an exponent
    m, shares = form.evaluate(theta, X)
    r = y - m
    value = (w * huber(r, delta)).sum(axis=1)
    damping = np.full(len(theta), 1e-2)
    quiet = np.zeros(len(theta), int)
    rows = np.arange(len(theta))  # those still moving; r, shares and weights are kept for them only
    diagonal = np.arange(len(low))
    weights = w
    floor = 1e-30
    for _ in range(steps):
        J = form.jacobian(shares, X)
        size = np.abs(r)
        irls = weights * np.minimum(1.0, delta / np.maximum(size, 1e-300))
        psi = irls * r
        gradient = -(J @ psi[:, :, None])[:, :, 0]
        majorant = (J * irls[:, None]) @ J.transpose(0, 2, 1)
        newton = (J * (weights * (size <= delta))[:, None]) @ J.transpose(0, 2, 1)
        newton -= form.curvature(psi, shares, J, X)
        scale = np.sqrt(np.einsum("sii->si", majorant)) + 1e-150
        lam = damping[rows]
        matrix = (newton + lam[:, None, None] * majorant) / scale[:, :, None] / scale[:, None, :]
        matrix[:, diagonal, diagonal] += (0.1 * lam + 1e-10)[:, None]
        slope = gradient / scale
        try:
            step = np.linalg.solve(matrix, -slope[:, :, None])[:, :, 0]
        except np.linalg.LinAlgError:
            step = np.full_like(slope, np.nan)
        descends = np.isfinite(step).all(axis=1) & ((slope * step).sum(axis=1) < 0)
        step = np.where(descends[:, None], step, -slope / (1 + lam[:, None]))
        promised = -(slope * step).sum(axis=1)
        step = step / scale
        shorten = np.minimum(1.0, 1.0 / np.maximum((np.abs(step) / most).max(axis=1), 1e-300))
        trial = np.clip(theta[rows] + step * shorten[:, None], low, high)
        m, trial_shares = form.evaluate(trial, X)
        trial_r = y - m
        trial_value = (weights * huber(trial_r, delta)).sum(axis=1)

        before = value[rows]
        better = trial_value < before
        small = tolerance * before + floor
        still = np.where(better, (before - trial_value <= small) & (shorten >= 1), (promised <= small) | (lam > 1e10))
        quiet[rows] = np.where(still, quiet[rows] + 1, 0)
        theta[rows[better]] = trial[better]
        value[rows[better]] = trial_value[better]
        damping[rows] = np.where(better, np.maximum(lam / 5, 1e-10), lam * 6)
        r = np.where(better[:, None], trial_r, r)
        shares = np.where(better[:, None, None], trial_shares, shares)
        moving = (quiet[rows] < 3) & (damping[rows] < 1e12)
        if not moving.all():
            rows, r, shares, weights = rows[moving], r[moving], shares[moving], weights[moving]
            if not len(rows):
                break
    return theta, value


def _deltas(objective: str, delta: float) -> list[float]:
    """The deltas to minimise at, in order: smooth least squares first, so that starts do not strand on kinks."""
    if objective == "lsq":
        return [np.inf]
    if objective == "huber":
        return [np.inf, delta]
    return [np.inf, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, LAD_DELTA]


def _solve(form, starts, X, y, w, objective, delta) -> tuple[np.ndarray, np.ndarray]:
    theta = starts
    for d in _deltas(objective, delta):
        theta, value = minimise(form, theta, X, y, w, d, steps=200 if d in (np.inf, delta) else 60)
    return theta, value


def hoffmann_grid(form: PowerSum, centre: np.ndarray, level: float) -> np.ndarray:
    """Starts (S, p): the grid of Hoffmann et al. 2022: log A, B 0..25 by 5, log E -1..1 by 0.5, exponents 0..2 by 0.5.

    Most of its 4,500 points put a term many decades off the data, where its gradient is zero to rounding. Each start is
    therefore moved to the nearest point where every term explains between a fifth and all of the typical loss at the
    centre of the data; points that coincide after that count once (some 400 remain for the surface).
    """
    axes = [np.arange(-1, 1.01, 0.5) if s is None else np.arange(0, 25.1, 5) for _, s, _ in form.terms]
    axes += [np.arange(0, 2.01, 0.5)] * (len(form.params) - len(form.terms))
    grid = np.array(list(itertools.product(*axes)))
    for c, s, v in form.slots:
        if s is not None:
            grid[:, c] -= grid[:, s] * centre[v]
        grid[:, c] = np.clip(grid[:, c], level + np.log(0.2), level)
    return np.unique(grid, axis=0)


# ----------------------------------------------------------------------------------------------------------------- Fit


@dataclass
class Fit:
    """A fitted law with what is known about its certainty.

    form: ``power`` y = E + A x^-alpha (or without E), ``growth`` y = k x^a, ``surface`` L = E + A/N^alpha + B/D^beta.
    value: the summed objective on log residuals: Huber's rho, the squares (lsq) or the absolute values (lad).
    intervals: 95 % percentile bootstrap. samples: one row of natural parameters a resample.
    widening: factor on deviations from the estimate in every interval, for few rows (see ``small_sample_factor``).
    status: ``identified``, ``weak`` or ``not identified`` for each parameter (``not assessed`` without a bootstrap), by
        the rule in ``identification``.
    condition: condition number of the Jacobian at the optimum, columns scaled to one length.
    data: the rows as fitted: inputs, ``observed``, ``predicted`` and ``residual`` (log observed - log predicted).
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
    widening: float = 1.0
    condition: float = float("nan")
    data: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)

    def predict(self, *inputs: object, seed_sd: float = 0.0) -> pd.DataFrame:
        """Predicted y at ``inputs`` (x for a law in one variable; params, tokens for the surface), broadcast together.

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
            low, high = prediction_interval(draws, seed_sd, centre, self.widening)
        else:
            low = high = np.full(len(centre), np.nan)
        name = "value" if self.form == "growth" else "loss"
        return pd.DataFrame({name: centre, "low": low, "high": high})

    def optimal(self, flops: object) -> pd.DataFrame:
        """Compute-optimal N and D of a surface under C = 6 N D, in closed form (Hoffmann et al. 2022, eq. 4): columns
        flops, params, tokens, loss, and a 95 % interval of params from the bootstrap (params_low, params_high)."""
        if self.form != "surface":
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
            table["params_low"], table["params_high"] = prediction_interval(size(usable), 0.0, N, self.widening)
        return table

    @property
    def a(self) -> float:
        """Exponent of N_opt in C: beta / (alpha + beta) of a surface, the slope itself of a growth law."""
        if self.form == "surface":
            return self.params["beta"] / (self.params["alpha"] + self.params["beta"])
        return self.params.get("a", float("nan"))

    @property
    def a_interval(self) -> tuple[float, float]:
        if self.form == "surface" and len(self.samples):
            draws = self.samples["beta"] / (self.samples["alpha"] + self.samples["beta"])
            return _percentiles(draws, self.a, self.widening, positive=False)
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

    def sentence(self) -> str:
        """The law in words: its formula, each parameter with its interval, and what is not identified."""
        formula = {
            "power": "L = E + A / x^alpha" if "E" in self.params else "L = A / x^alpha",
            "growth": "y = k x^a",
            "surface": "L = E + A / N^alpha + B / D^beta",
        }[self.form]
        parts = []
        for name, value in self.params.items():
            low, high = self.intervals.get(name, (np.nan, np.nan))
            span = f" [{low:.4g}, {high:.4g}]" if np.isfinite(low) else ""
            verdict = self.status.get(name, "not assessed")
            parts.append(f"{name} = {value:.4g}{span}" + ("" if verdict == "identified" else f" ({verdict})"))
        text = f"{formula} from {self.n} rows: {', '.join(parts)}."
        if self.form == "surface":
            low, high = self.a_interval
            span = f" [{low:.2f}, {high:.2f}]" if np.isfinite(low) else ""
            text += f" N_opt grows as C^{self.a:.2f}{span}."
        return " ".join([text, *self.warnings])

    def to_dict(self) -> dict:
        """Everything but rows and samples, ready for JSON (a value that is not finite becomes None)."""

        def finite(value: float) -> float | None:
            return float(value) if np.isfinite(value) else None

        answer = {
            "n": self.n,
            "form": self.form,
            "objective": self.objective,
            "delta": self.delta if self.objective == "huber" else None,
            "value": finite(self.value),
            "params": {name: finite(v) for name, v in self.params.items()},
            "intervals": {name: [finite(v) for v in pair] for name, pair in self.intervals.items()},
            "widening": self.widening,
            "starts": self.starts,
            "starts_agreeing": self.starts_agreeing,
            "status": dict(self.status),
            "condition": finite(self.condition),
            "warnings": list(self.warnings),
        }
        if self.form in ("surface", "growth"):
            answer |= {"a": finite(self.a), "a_interval": [finite(v) for v in self.a_interval]}
        return answer


def prediction_interval(
    draws: np.ndarray, seed_sd: float = 0.0, centre: np.ndarray | None = None, widening: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Central 95 % interval of positive draws (R, points) blurred by a normal of standard deviation seed_sd: quantiles
    of the mixture, solved for rather than sampled, so the same fit gives the same interval. Returns low and high,
    (points,).

    widening stretches the draws about ``centre`` (points,) on a log scale.
    """
    if seed_sd < 0:
        raise LabError("The spread between seeds must not be negative", f"seed_sd={seed_sd}")
    if widening != 1:
        draws = centre * (draws / centre) ** widening
    tails = (0.5 * (1 - LEVEL), 0.5 * (1 + LEVEL))
    if not seed_sd:
        low, high = np.quantile(draws, tails, axis=0)
        return low, high
    ends = []
    for tail in tails:
        low = draws.min(axis=0) - 10 * seed_sd
        high = draws.max(axis=0) + 10 * seed_sd
        for _ in range(60):
            middle = 0.5 * (low + high)
            below = special.ndtr((middle - draws) / seed_sd).mean(axis=0) < tail
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        ends.append(0.5 * (low + high))
    return ends[0], ends[1]


def _percentiles(samples: object, centre: float, widening: float, positive: bool) -> tuple[float, float]:
    """Percentile interval of samples (R,), stretched about the estimate, on a log scale for what is positive."""
    low, high = np.quantile(np.asarray(samples, float), [0.5 * (1 - LEVEL), 0.5 * (1 + LEVEL)])
    if positive:
        return float(centre * (low / centre) ** widening), float(centre * (high / centre) ** widening)
    return float(centre + (low - centre) * widening), float(centre + (high - centre) * widening)


def _intervals(params: dict[str, float], samples: pd.DataFrame, widening: float) -> dict[str, tuple[float, float]]:
    if not len(samples):
        return dict.fromkeys(params, (np.nan, np.nan))
    found = {
        name: _percentiles(samples[name], value, widening, positive=name in COEFFICIENTS)
        for name, value in params.items()
    }
    if "E" in found:  # a floor below zero is none
        found["E"] = (max(0.0, found["E"][0]), found["E"][1])
    return found


def identification(name: str, value: float, interval: tuple[float, float], freedom: int) -> str:
    """The rule for one parameter, from its 95 % interval and the degrees of freedom (rows, or clusters, less
    parameters).

    Exponents and the floor E are *identified* when the half-width is at most a quarter of the value, *weak* up to three
    quarters, and *not identified* beyond; nor are they when the interval reaches zero (the term may not be there at
    all). Coefficients (A, B, k) multiply a power of a large number, so they are judged by the factor high / low: at
    most 4 is identified, at most 30 weak. Fewer than three degrees of freedom are at most weak, none is not identified.
    On top of this the fit calls parameters not identified that its design cannot tell apart (see ``design_faults``).
    """
    low, high = interval
    if freedom < 1 or not (np.isfinite(low) and np.isfinite(high)):
        return "not identified"
    if name in COEFFICIENTS:
        width, limits = (np.inf if low <= 0 else high / low), (4.0, 30.0)
    else:
        reaches_zero = low <= 1e-3 * value <= high if value > 0 else True
        width, limits = (np.inf if reaches_zero else 0.5 * (high - low) / value), (0.25, 0.75)
    if width > limits[1]:
        return "not identified"
    return "weak" if width > limits[0] or freedom < 3 else "identified"


def design_faults(form: PowerSum, X: np.ndarray, names: Sequence[str]) -> tuple[list[str], set[str]]:
    """What the rows' places alone rule out, before any loss is looked at: warnings, and the parameters concerned.

    X (d, n) holds log variables. A term beside others needs three distinct values of its variable; the two terms of a
    surface need log N and log D that do not lie on one line (|correlation| above 0.98 counts as a line).
    """
    warnings, faulty = [], set()
    needed = 2 if len(form.terms) == 1 else 3
    for c, s, v in form.terms:
        if s is None:
            continue
        distinct = len(np.unique(np.round(X[v], 6)))
        if distinct < needed:
            warnings.append(
                f"{distinct} distinct value{'s' if distinct != 1 else ''} of {names[v]}: {c} and {s} need at least "
                f"{needed} to be told apart{' from the rest' if len(form.terms) > 1 else ''}."
            )
            faulty |= {c, s}
    if len(X) == 2 and X.std(axis=1).min() > 0:
        correlation = np.corrcoef(X)[0, 1]
        if abs(correlation) > 0.98:
            slope = np.sign(correlation) * X[1].std() / X[0].std()
            ratio = np.exp(np.mean(X[1] - X[0]))
            line = f"D = {ratio:.3g} N" if abs(slope - 1) < 0.05 else f"D follows N^{slope:.2f}"
            warnings.append(
                f"{line} in (nearly) every row: alpha and beta cannot be told apart, nor A and B. Add runs with more "
                "and with fewer tokens at the same size."
            )
            faulty |= set(form.params) - {"E"}
    return warnings, faulty


# ---------------------------------------------------------------------------------------------------------------- fits


def fit_power(
    x: object,
    y: object,
    floor: bool = False,
    objective: str = "huber",
    delta: float = 1e-3,
    bootstrap: int = 200,
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
    bootstrap: int = 200,
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

    params N, tokens D, loss L (nats): arrays (n,), positive and finite, one row a finished run.
    objective: ``huber`` (summed, delta on log residuals), ``lsq`` (sum of squares) or ``lad`` (sum of absolute values).
    bootstrap: resamples, warm-started at the optimum. Rows are drawn, or whole ``clusters`` (n,) where these are given,
        for instance all runs of one size. Few rows make percentile intervals too short: deviations from the estimate
        are widened by t(0.975, freedom) / 1.96, freedom = n - parameters, which is 1 for many rows.
    weights: (n,) positive factors on the rows. starts: (S, 5) of (E, A, B, alpha, beta); None is Hoffmann's grid.

    ``starts_agreeing`` counts starts whose objective ends within 1e-6, relative, of the best. Raises LabError for rows
    that are not positive and finite (by number), and for fewer rows than parameters.
    """
    return _fit(
        SURFACE,
        [params, tokens],
        loss,
        ["params", "tokens"],
        objective,
        delta,
        bootstrap,
        clusters,
        weights,
        seed,
        starts,
    )


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
    centre = logs.mean(axis=1)
    X, log_y = logs - centre[:, None], np.log(y)
    level = float(np.median(log_y))

    if starts is None:
        begin = hoffmann_grid(form, centre, level)
    else:
        begin = np.atleast_2d(np.asarray(starts, float)).copy()
        for c, s, v in form.slots:
            begin[:, c] = np.log(begin[:, c]) - (0 if s is None else begin[:, s] * centre[v])
    thetas, values = _solve(form, begin, X, log_y, w, objective, delta)
    best = int(np.argmin(values))
    agreeing = int((values <= values[best] * (1 + 1e-6) + 1e-14 * n).sum())
    last = _deltas(objective, delta)[-1]
    theta, _ = minimise(form, thetas[best : best + 1], X, log_y, w, last, steps=500, tolerance=0.0)
    m, shares = form.evaluate(theta, X)
    r = log_y - m[0]
    value = {"huber": huber(r, delta), "lsq": r**2, "lad": np.abs(r)}[objective] @ w

    units = np.arange(n) if clusters is None else pd.factorize(np.asarray(clusters))[0]
    if len(units) != n:
        raise LabError("clusters must name one cluster a row", f"{len(units)} clusters, {n} rows")
    freedom = int(units.max()) + 1 - p
    samples, widening = pd.DataFrame(), 1.0
    if bootstrap:
        drawn = resample(units, X, bootstrap, seed, needed=2 if len(form.terms) == 1 else 3)
        if drawn is not None and freedom >= 1:
            samples = form.natural(_bootstrap(form, theta, X, log_y, drawn * w, objective, delta), centre)
            widening = small_sample_factor(freedom)

    fitted = form.natural(theta, centre).iloc[0].to_dict()
    warnings, faulty = design_faults(form, logs, [{"params": "N", "tokens": "D"}.get(name, name) for name in names])
    J = form.jacobian(shares, X)[0] * np.sqrt(w)
    condition = float(np.linalg.cond(J / np.maximum(np.linalg.norm(J, axis=1), 1e-300)[:, None]))
    if fitted.get("E", 1.0) < 1e-6 * y.min():
        warnings.append("The floor E ends at zero: these rows show no floor.")
        faulty.add("E")
    if bootstrap and not len(samples):
        warnings.append(f"{n} rows in {freedom + p} units are too few for {p} parameters: no intervals.")
    if agreeing < 0.1 * len(begin):
        warnings.append(f"Only {agreeing} of {len(begin)} starts reach the best optimum: it may not be the global one.")
    intervals = _intervals(fitted, samples, widening)
    status = {
        name: "not assessed"
        if not bootstrap
        else "not identified"
        if name in faulty
        else identification(name, fitted[name], intervals[name], freedom)
        for name in form.params
    }
    data = pd.DataFrame(
        dict(zip(names, inputs, strict=True)) | {"observed": y, "predicted": np.exp(m[0]), "residual": r}
    )
    return Fit(
        form=form.name,
        params=fitted,
        intervals=intervals,
        value=float(value),
        n=n,
        objective=objective,
        delta=delta,
        starts=len(begin),
        starts_agreeing=agreeing,
        status=status,
        warnings=warnings,
        samples=samples,
        widening=widening,
        condition=condition,
        data=data,
    )


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


def resample(units: np.ndarray, X: np.ndarray, count: int, seed: int, needed: int) -> np.ndarray | None:
    """Bootstrap multiplicities (count, n): units (a row's cluster number, (n,)) drawn with replacement.

    A draw with fewer than ``needed`` distinct values of a variable says nothing about the law, so it is drawn again.
    None where the rows themselves have fewer, or where such draws are so rare that keeping them would not be a
    bootstrap.
    """
    rng = np.random.default_rng(seed)
    groups = int(units.max()) + 1
    values = [np.unique(np.round(x, 6), return_inverse=True)[1] for x in X]
    if min(v.max() + 1 for v in values) < needed:
        return None
    onehot = [(v == np.arange(v.max() + 1)[:, None]).T.astype(float) for v in values]
    kept: list[np.ndarray] = []
    for _ in range(50):
        times = rng.multinomial(groups, np.full(groups, 1 / groups), size=count)[:, units].astype(float)
        useful = np.all([((times @ o) > 0).sum(axis=1) >= needed for o in onehot], axis=0)
        kept.append(times[useful])
        if sum(map(len, kept)) >= count:
            return np.concatenate(kept)[:count]
    return None


def small_sample_factor(freedom: int) -> float:
    """How much to widen bootstrap deviations: Student's t over the normal quantile. Resampling rows already overstates
    the spread of few rows a little, which stands in for the usual n / freedom (chosen by simulated coverage)."""
    tail = 0.5 * (1 + LEVEL)
    return float(stats.t.ppf(tail, freedom) / stats.norm.ppf(tail))


def _bootstrap(form, theta, X, log_y, weights, objective, delta) -> np.ndarray:
    """theta (R, p) refitted on every row of weights (R, n), all at once, from the optimum of the whole."""
    thetas = np.repeat(theta, len(weights), axis=0)
    path = {"lsq": [np.inf], "huber": [delta], "lad": [1e-3, 1e-4, 1e-5]}[objective]
    for d in path:
        thetas, _ = minimise(form, thetas, X, log_y, weights, d, steps=100, tolerance=1e-9)
    return thetas


# ----------------------------------------------------------------------------------------- learning rates and isoFLOPs


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
    _require_columns(frame, [*by, rate, loss])
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


def _require_columns(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise LabError(
            f"The table needs the columns {', '.join(columns)}",
            f"without {', '.join(missing)}",
            f"its columns are {', '.join(map(str, frame.columns[:30]))}",
        )


def _best_sizes(frame, budget, params, tokens, loss) -> pd.DataFrame:
    """One row for each budget and size: the loss at its best learning rate, or the mean loss where no rate is known."""
    _require_columns(frame, [budget, params, tokens, loss])
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
    a
    budget: ``budget``, ``params_opt``, ``tokens_opt``, ``loss_min``, ``inside`` (the parabola opens upward and its
    minimum lies between the smallest and the largest size; otherwise the best size measured stands there and no law
    uses the row), ``curvature`` (nats per squared log N), ``sizes``, ``edges`` (sizes whose best learning rate lies at
    an edge).
    """
    best = _best_sizes(frame, budget, params, tokens, loss)
    return pd.DataFrame([_minimum(family, key, params, tokens, loss)[0] for key, family in best.groupby(budget)])


def _minimum(family, key, params, tokens, loss) -> tuple[dict, np.ndarray]:
    """One budget's row, and the residuals (nats) of its sizes about the parabola."""
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
    best = _best_sizes(frame, budget, params, tokens, loss)
    families = [(key, family) for key, family in best.groupby(budget)]
    rows, residuals = zip(*(_minimum(family, key, params, tokens, loss) for key, family in families), strict=True)
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


def _line(x: np.ndarray, y: np.ndarray, draws: np.ndarray, form: PowerSum, freedom: int) -> Fit:
    """A straight line in log-log by least squares, refitted to every row of draws (R, n)."""
    centre = np.log(x).mean()
    design = np.stack([np.ones(len(x)), -(np.log(x) - centre)], axis=1)
    inverse = np.linalg.pinv(design)
    theta = inverse @ np.log(y)
    r = np.log(y) - design @ theta
    params = form.natural(theta[None], np.array([centre])).iloc[0].to_dict()
    samples = form.natural((inverse @ np.log(draws).T).T, np.array([centre])) if len(draws) else pd.DataFrame()
    intervals = _intervals(params, samples, 1.0)
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
