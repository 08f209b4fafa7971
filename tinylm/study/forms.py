"""Forms of scaling laws, and the one optimiser that fits them all.

Every loss law is a sum of power terms, L = sum_k A_k x_k^-s_k (a floor is a term without a variable). It is fitted on
log L, where the sum is a logsumexp of straight lines in log x (Hoffmann et al. 2022, arXiv:2203.15556, eq. 10;
Besiroglu et al. 2024, arXiv:2404.10102). The variables are centred at their geometric means, so that all parameters are
of order one; the objective is *summed*, since a mean lets default tolerances stop an optimiser early. One batched
damped Newton method with analytic first and second derivatives (``minimise``) serves the starts, the polish, all
bootstrap resamples and all points of a profile at once.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pandas as pd

OBJECTIVES = ("huber", "lsq", "lad")
LEAST = -16.0  # log of the smallest term, relative to the typical loss, that the optimiser can tell from zero
LAD_DELTA = 1e-9  # absolute deviations are the limit of Huber's objective: at this delta the two agree to 1e-9 a row
LEAST_EXPONENT = 1e-2  # of a data-constrained law: without positive exponents no size suits the tokens
REPEATS = (1e-2, 1e4)  # limits of R_D and R_N: beyond them repeats are worth nothing, or as much as what is new


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

    def centre(self, logs: np.ndarray) -> np.ndarray:
        """Where the log variables (d, n) are centred."""
        return logs.mean(axis=1)

    def evaluate(self, theta: np.ndarray, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Model m = log y, (S, n), and its state for the derivatives, (S, K, n): each term's share of y."""
        logs = np.empty((len(theta), len(self.terms), X.shape[1]))
        for k, (c, s, v) in enumerate(self.slots):
            logs[:, k] = theta[:, c, None] if s is None else theta[:, c, None] - theta[:, s, None] * X[v]
        return _logsumexp(logs)

    def jacobian(self, state: np.ndarray, X: np.ndarray) -> np.ndarray:
        """dm/dtheta, (S, p, n)."""
        J = np.empty((state.shape[0], len(self.params), state.shape[2]))
        for k, (c, s, v) in enumerate(self.slots):
            J[:, c] = state[:, k]
            if s is not None:
                np.multiply(state[:, k], -X[v], out=J[:, s])
        return J

    def curvature(self, psi: np.ndarray, state: np.ndarray, J: np.ndarray, X: np.ndarray) -> np.ndarray:
        """sum_i psi_i d2m_i/dtheta2, (S, p, p): a logsumexp curves by the covariance of its terms' gradients."""
        Q = np.zeros((len(psi), J.shape[1], J.shape[1]))
        for k, (c, s, v) in enumerate(self.slots):
            weight = psi * state[:, k]
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
        table = pd.DataFrame(columns)[list(self.params)[: theta.shape[1]]]
        if self.name == "growth":  # y = k x^a is the same line with its slope's sign turned
            table["a"] = -table["a"]
        return table

    def theta(self, params: pd.DataFrame, centre: np.ndarray) -> np.ndarray:
        """The inverse of ``natural``: rows of parameters as theta (S, p)."""
        theta = params[list(self.params)].to_numpy(float, copy=True)
        if self.name == "growth":
            theta[:, self.params.index("a")] *= -1
        for c, s, v in self.slots:
            theta[:, c] = np.log(np.maximum(theta[:, c], 1e-300)) - (0 if s is None else theta[:, s] * centre[v])
        return theta

    def held(self, name: str, value: float, centre: np.ndarray) -> tuple[np.ndarray, float]:
        """The linear equation row . theta = right that holds a parameter, or a = beta / (alpha + beta), at a value."""
        row, names = np.zeros(len(self.params)), self.params
        if name == "a" and "beta" in names:
            row[names.index("beta")], row[names.index("alpha")] = 1 - value, -value
            return row, 0.0
        for (c, s, v), (coefficient, _, _) in zip(self.slots, self.terms, strict=True):
            if coefficient == name:
                row[c] = 1
                if s is not None:
                    row[s] = centre[v]
                return row, float(np.log(value))
        row[names.index(name)] = 1
        return row, -value if self.name == "growth" else value


@dataclass(frozen=True)
class DataConstrained(PowerSum):
    """L = E + A / N'^alpha + B / D'^beta over U distinct tokens (Muennighoff et al. 2023, arXiv:2305.16264, eq. 5, 6).

    D' = U + U R_D (1 - exp(-(D / U - 1) / R_D)) are the new tokens that D tokens of training are worth, and
    N' = U_N + U_N R_N (1 - exp(-(N / U_N - 1) / R_N)) the parameters that U tokens can feed. U_N = min(N, N_opt(U)),
    with N_opt(U) the size for which U tokens are the best length under C = 6 N D.

    X (3, n) holds log N, log D and log U, the last two centred alike. theta ends with log R_D and log R_N.
    """

    @property
    def params(self) -> tuple[str, ...]:
        return ("E", "A", "B", "alpha", "beta", "R_D", "R_N")

    def centre(self, logs: np.ndarray) -> np.ndarray:
        return logs.mean(axis=1)[[0, 1, 1]]

    def evaluate(self, theta, X):
        """Model and state (S, 10, n): three shares, then the derivatives of the two terms' logs (see ``_slopes``)."""
        theta = np.where(np.isin(np.arange(7), (3, 4)), np.maximum(theta, LEAST_EXPONENT), theta)
        c_e, c_a, c_b, alpha, beta, k_d, k_n = (column[:, None] for column in theta.T)
        base = np.minimum(X[1], X[2])
        repeated, _, repeated_k = _saturation(np.maximum(X[1] - X[2], 0.0) + 0 * k_d, k_d)
        tokens = base + repeated
        unique_n = (np.log(alpha / beta) + c_a - c_b + beta * X[2]) / alpha
        excess = np.maximum(X[0] - unique_n, 0.0)
        more, more_z, more_k = _saturation(excess, k_n)
        beyond = excess > 0
        size = np.where(beyond, unique_n + more, X[0])
        by_unique = np.where(beyond, 1 - more_z, 0.0)  # d log N' / d log U_N
        logs = np.stack([c_e + 0 * X[0], c_a - alpha * size, c_b - beta * tokens], axis=1)
        m, shares = _logsumexp(logs)
        slopes = [
            1 - by_unique,
            by_unique,
            -size - by_unique * (1 / alpha - unique_n),
            -by_unique * (X[2] - 1 / beta),
            -alpha * more_k,
            -tokens,
            -beta * repeated_k,
        ]
        return m, np.concatenate([shares, np.stack(slopes, axis=1)], axis=1)

    def jacobian(self, state, X):
        J = np.zeros((state.shape[0], 7, state.shape[2]))
        J[:, 0] = state[:, 0]
        for term, at, slope in _slopes(state):
            J[:, at] += state[:, term] * slope
        return J

    def curvature(self, psi, state, J, X):
        """As for any sum of terms; the curvature of a term's own log is left to the damping (Gauss-Newton)."""
        Q = -(J * psi[:, None]) @ J.transpose(0, 2, 1)
        Q[:, 0, 0] += (psi * state[:, 0]).sum(axis=1)
        slopes = list(_slopes(state))
        for (term, i, one), (other, j, two) in itertools.product(slopes, slopes):
            if term == other:
                Q[:, i, j] += (psi * state[:, term] * one * two).sum(axis=1)
        return Q

    def box(self, level):
        low, high = super().box(level)
        low[3:5] = LEAST_EXPONENT
        low[5:], high[5:] = np.log(REPEATS)
        return low, high

    def natural(self, theta, centre):
        table = super().natural(theta[:, :5], centre)
        return table.assign(R_D=np.exp(theta[:, 5]), R_N=np.exp(theta[:, 6]))

    def theta(self, params, centre):
        theta = super().theta(params, centre)
        theta[:, 5:] = np.log(np.clip(theta[:, 5:], *REPEATS))
        return theta

    def held(self, name, value, centre):
        row, right = super().held(name, value, centre)
        return row, float(np.log(value)) if name in ("R_D", "R_N") else right


def _logsumexp(logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log sum exp over axis 1 of (S, K, n), and the softmax, written over ``logs``."""
    top = logs.max(axis=1)
    shares = np.exp(logs - top[:, None], out=logs)
    total = shares.sum(axis=1)
    shares /= total[:, None]
    return top + np.log(total), shares


def _saturation(z: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log(1 + r (1 - exp(-(e^z - 1) / r))) with r = e^k, and its derivatives in z and in k."""
    repeats, r = np.expm1(np.minimum(z, 50.0)), np.exp(k)
    left = np.exp(-repeats / r)
    gained = -r * np.expm1(-repeats / r)
    return np.log1p(gained), left * (1 + repeats) / (1 + gained), (gained - repeats * left) / (1 + gained)


def _slopes(state: np.ndarray) -> list[tuple[int, int, np.ndarray | float]]:
    """(term, parameter, derivative of the term's log) of ``DataConstrained``, from its state."""
    by_size = [(1, at, state[:, row]) for at, row in ((1, 3), (2, 4), (3, 5), (4, 6), (6, 7))]
    return [*by_size, (2, 2, 1.0), (2, 4, state[:, 8]), (2, 5, state[:, 9])]


POWER = PowerSum("power", (("A", "alpha", 0),))
POWER_FLOOR = PowerSum("power", (("E", None, None), ("A", "alpha", 0)))
GROWTH = PowerSum("growth", (("k", "a", 0),))
SURFACE = PowerSum("surface", (("E", None, None), ("A", "alpha", 0), ("B", "beta", 1)))
DATA_CONSTRAINED = DataConstrained("data-constrained", SURFACE.terms)
FORMS = (POWER, POWER_FLOOR, GROWTH, SURFACE, DATA_CONSTRAINED)


def form_of(name: str, params: dict) -> PowerSum:
    """The form with such a name and such parameters."""
    return next(form for form in FORMS if form.name == name and set(form.params) == set(params))


def evaluate_law(form: str, params: dict | pd.DataFrame, *inputs: np.ndarray) -> np.ndarray:
    """y of a law from its natural parameters, (points,); from a frame of R rows of parameters, (R, points).

    inputs: x for a law in one variable; N, D for a surface; N, D and the distinct tokens U for ``data-constrained``.
    """

    def get(name: str) -> np.ndarray:
        return params[name].to_numpy()[:, None] if isinstance(params, pd.DataFrame) else np.float64(params[name])

    logs = [np.log(np.asarray(values, float)) for values in inputs]
    if form == "growth":
        return get("k") * np.exp(get("a") * logs[0])
    with np.errstate(divide="ignore"):
        c_a = np.log(get("A"))
        c_b = np.log(get("B")) if "B" in params else None
    if form == "data-constrained":
        alpha, beta, base = get("alpha"), get("beta"), np.minimum(logs[1], logs[2])
        k_d, k_n = np.log(get("R_D")), np.log(get("R_N"))
        unique_n = np.minimum((np.log(alpha / beta) + c_a - c_b + beta * logs[2]) / alpha, logs[0])
        logs = [
            unique_n + _saturation(logs[0] - unique_n, k_n)[0],
            base + _saturation(np.maximum(logs[1] - logs[2], 0.0), k_d)[0],
        ]
    y = np.exp(c_a - get("alpha") * logs[0])
    if c_b is not None:
        y = y + np.exp(c_b - get("beta") * logs[1])
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
    m, state = form.evaluate(theta, X)
    r = y - m
    psi = w * np.clip(r, -delta, delta)
    return (w * huber(r, delta)).sum(axis=1), -(form.jacobian(state, X) @ psi[:, :, None])[:, :, 0]


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
    held: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise sum_i w_i huber(y_i - m_i(theta)) from all rows of theta (S, p) at once; returns theta, objectives (S,).

    Damped semismooth Newton. Huber's objective is quadratic between kinks: the Newton matrix counts the rows within
    delta plus the model's own curvature. It is damped by the matrix of reweighted least squares, which majorises it, so
    that a rejected step is tried shorter in the same scale-free metric; this passes the kinks where L-BFGS stalls. A
    row has converged when three steps in a row change its objective by less than ``tolerance``, relative.

    held: rows (S, p) and right sides (S,) of one linear equation for each start (``PowerSum.held``); the search keeps
    to it, and starts at the nearest point that fulfils it.
    """
    out, best = theta.copy(), np.empty(len(theta))
    w = np.broadcast_to(w, (len(theta), len(y)))
    basis = None
    if held is not None:
        rows, right = held
        out += rows * ((right - (rows * out).sum(axis=1)) / (rows * rows).sum(axis=1))[:, None]
        basis = np.linalg.svd(rows[:, None, :])[2][:, 1:].transpose(0, 2, 1)  # (S, p, p - 1), the directions left free
    chunk = max(1, 32768 // len(y))  # keeps the working arrays in the processor's cache
    for start in range(0, len(theta), chunk):
        part = slice(start, start + chunk)
        free = None if basis is None else basis[part]
        out[part], best[part] = _minimise_chunk(form, out[part], X, y, w[part], delta, steps, tolerance, free)
    return out, best


def _minimise_chunk(form, theta, X, y, w, delta, steps, tolerance, basis):
    theta = theta.copy()
    low, high = form.box(float(np.median(y)))
    if basis is not None:  # a box would leave the equation that is held
        low, high = low - np.inf, high + np.inf
    theta = np.clip(theta, low, high)
    most = np.where(np.arange(len(low)) < len(form.terms), 2.0, 0.5)  # longest step in a log coefficient, an exponent
    m, state = form.evaluate(theta, X)
    r = y - m
    value = (w * huber(r, delta)).sum(axis=1)
    damping = np.full(len(theta), 1e-2)
    quiet = np.zeros(len(theta), int)
    rows = np.arange(len(theta))  # those still moving; r, state and weights are kept for them only
    diagonal = np.arange(len(low) - (basis is not None))
    weights = w
    floor = 1e-30
    for _ in range(steps):
        J = form.jacobian(state, X)
        size = np.abs(r)
        irls = weights * np.minimum(1.0, delta / np.maximum(size, 1e-300))
        psi = irls * r
        gradient = -(J @ psi[:, :, None])[:, :, 0]
        majorant = (J * irls[:, None]) @ J.transpose(0, 2, 1)
        newton = (J * (weights * (size <= delta))[:, None]) @ J.transpose(0, 2, 1)
        newton -= form.curvature(psi, state, J, X)
        if basis is not None:
            Z = basis[rows]
            gradient = (gradient[:, None] @ Z)[:, 0]
            majorant, newton = (Z.transpose(0, 2, 1) @ matrix @ Z for matrix in (majorant, newton))
        scale = np.sqrt(np.einsum("sii->si", majorant)) + 1e-150
        lam = damping[rows]
        matrix = (newton + lam[:, None, None] * majorant) / scale[:, :, None] / scale[:, None, :]
        matrix[:, diagonal, diagonal] += (0.1 * lam + 1e-10)[:, None]
        slope = gradient / scale
        if basis is None:  # what is pushed against a limit stays there, and the others move as if it were not there
            pushed = ((theta[rows] <= low) & (slope > 0)) | ((theta[rows] >= high) & (slope < 0))
            if pushed.any():
                slope = np.where(pushed, 0.0, slope)
                matrix[pushed[:, :, None] | pushed[:, None, :]] = 0.0
                matrix[:, diagonal, diagonal] += pushed
        try:
            step = np.linalg.solve(matrix, -slope[:, :, None])[:, :, 0]
        except np.linalg.LinAlgError:
            step = np.full_like(slope, np.nan)
        descends = np.isfinite(step).all(axis=1) & ((slope * step).sum(axis=1) < 0)
        step = np.where(descends[:, None], step, -slope / (1 + lam[:, None]))
        promised = -(slope * step).sum(axis=1)
        step = step / scale
        if basis is not None:
            step = (Z @ step[:, :, None])[:, :, 0]
        shorten = np.minimum(1.0, 1.0 / np.maximum((np.abs(step) / most).max(axis=1), 1e-300))
        trial = np.clip(theta[rows] + step * shorten[:, None], low, high)
        m, trial_state = form.evaluate(trial, X)
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
        state = np.where(better[:, None, None], trial_state, state)
        moving = (quiet[rows] < 3) & (damping[rows] < 1e12)
        if not moving.all():
            rows, r, state, weights = rows[moving], r[moving], state[moving], weights[moving]
            if not len(rows):
                break
    return theta, value


def deltas(objective: str, delta: float) -> list[float]:
    """The deltas to minimise at, in order: smooth least squares first, then tenfold smaller ones, so that starts do not
    strand on kinks, nor creep where outliers had drawn them."""
    if objective == "lsq":
        return [np.inf]
    last = delta if objective == "huber" else LAD_DELTA
    return [np.inf, *(10.0**k for k in range(-1, -8, -1) if 10.0**k > 2 * last), last]


def solve(form, starts, X, y, w, path: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """``minimise`` along a path of ``deltas``: theta (S, p) and the last objectives (S,)."""
    theta = starts
    for d in path:
        theta, value = minimise(form, theta, X, y, w, d, steps=200 if d in (np.inf, path[-1]) else 60)
    return theta, value


def hoffmann_grid(form: PowerSum, centre: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """The grid of Hoffmann et al. 2022 (log A, B 0..25 by 5, log E -1..1 by 0.5, exponents 0..2 by 0.5) as distinct
    starts (S, p), and how many points of the grid each stands for, (S,).

    Most of the surface's 4,500 points put a term many decades off the data, where its gradient is zero to rounding.
    Each is therefore moved to the nearest point where every term explains between a fifth and all of the typical loss
    at the centre of the data; points that coincide after that are one start (some 400 remain for the surface).
    """
    axes = [np.arange(-1, 1.01, 0.5) if s is None else np.arange(0, 25.1, 5) for _, s, _ in form.terms]
    axes += [np.arange(0, 2.01, 0.5)] * sum(s is not None for _, s, _ in form.terms)
    grid = np.array(list(itertools.product(*axes)))
    for c, s, v in form.slots:
        if s is not None:
            grid[:, c] -= grid[:, s] * centre[v]
        grid[:, c] = np.clip(grid[:, c], level + np.log(0.2), level)
    return np.unique(grid, axis=0, return_counts=True)
