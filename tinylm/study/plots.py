"""Figures of scaling studies: a DataFrame or a Fit in, matplotlib Axes out.

Every function draws into the ``ax`` it is given, or into a figure of its own (``ax.figure``) that no global state holds
on to. One style (``style``): colours that the colour-blind can tell apart (Okabe and Ito 2008), markers that differ as
well, units on every axis. N parameters, D tokens, C FLOPs, L loss in nats per token.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import patheffects, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tinylm.errors import LabError
from tinylm.study.planner import RepeatedText
from tinylm.study.scaling import COEFFICIENTS, Fit, best_learning_rate
from tinylm.words import quantity

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#666666"
LOSS = "validation loss (nats/token)"
PARAMS = "parameters N"
TOKENS = "training tokens D"
UNIQUE = "distinct tokens U"
FLOPS = "training compute C (FLOPs)"
RATE = "learning rate"
# Parameters of a law as an axis names them; exponents have no unit.
NAMES = {"alpha": r"$\alpha$", "beta": r"$\beta$", "E": "E (nats/token)"}
NAMES |= {"R_D": "$R_D^*$ (repeats)", "R_N": "$R_N^*$ (repeats)"}
_RC = {
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.prop_cycle": mpl.cycler(color=COLOURS),
    "svg.hashsalt": "tinylm",  # the same figure gives the same bytes
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The lab's one look, as a context: ``with style(): ...``. Every function here draws in it by itself."""
    with mpl.rc_context(_RC):
        yield


def _styled(draw: Callable) -> Callable:
    @functools.wraps(draw)
    def inside(*args, **kwargs):
        with style():
            return draw(*args, **kwargs)

    return inside


def _axes(ax: Axes | None, size: tuple[float, float] = (6.4, 4.2)) -> Axes:
    return Figure(figsize=size, layout="constrained").subplots() if ax is None else ax


def _panels(ax: object, count: int, size: tuple[float, float]) -> list[Axes]:
    """``ax`` as a list of panels; a new figure with ``count`` of them side by side where it is None."""
    if ax is None:
        ax = Figure(figsize=(size[0] * count, size[1]), layout="constrained").subplots(1, count, squeeze=False)
    return list(np.ravel(ax))


# --------------------------------------------------------------------------------------------------------------- ticks


class _LogTicks(ticker.Locator):
    """Few, round, labelled ticks on a log axis, also where it spans less than a decade."""

    def __call__(self) -> np.ndarray:
        return self.tick_values(*sorted(self.axis.get_view_interval()))

    def tick_values(self, vmin: float, vmax: float) -> np.ndarray:
        powers = np.arange(np.floor(np.log10(vmin)), np.ceil(np.log10(vmax)) + 1)
        powers = powers[:: max(1, len(powers) // 7)]
        for mantissas in ([1], [1, 3], [1, 2, 5], [1, 2, 3, 5, 7]):
            ticks = np.outer(10.0**powers, mantissas).ravel()
            ticks = ticks[(ticks >= vmin * 0.9999) & (ticks <= vmax * 1.0001)]
            if len(ticks) >= 3:
                return ticks
        ticks = np.asarray(ticker.MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]).tick_values(vmin, vmax))
        return ticks[(ticks >= vmin * 0.9999) & (ticks <= vmax * 1.0001) & (ticks > 0)]


def power_of_ten(value: float, _position: object = None) -> str:
    """A large number in mathtext: 10^11, 2x10^11."""
    if value <= 0:
        return f"{value:g}"
    exponent = int(np.floor(np.log10(value) + 1e-9))
    mantissa = f"{value / 10.0**exponent:.2g}"
    return rf"$10^{{{exponent}}}$" if mantissa == "1" else rf"${mantissa}\times 10^{{{exponent}}}$"


def _plain(value: float, _position: object = None) -> str:
    return f"{value:.4g}"


def _signed(percent: float) -> str:
    return f"{percent:+.2f} %".replace("-", "\N{MINUS SIGN}")


def _plain_or_power(value: float, _position: object = None) -> str:
    return _plain(value) if 1e-3 <= value < 1e4 else power_of_ten(value)


def _log(ax: Axes, axis: str, label: str, written: Callable | None = None) -> None:
    """Make ``axis`` ("x" or "y") logarithmic, with ticks a reader can read."""
    getattr(ax, f"set_{axis}scale")("log")
    getattr(ax, f"set_{axis}label")(label)
    side = getattr(ax, f"{axis}axis")
    side.set_major_locator(_LogTicks())
    side.set_major_formatter(ticker.FuncFormatter(written or (lambda value, _position: quantity(value))))
    side.set_minor_formatter(ticker.NullFormatter())


def _colour(index: int, count: int) -> object:
    """Okabe-Ito while they last; beyond, an even walk through viridis (without its pale end)."""
    return COLOURS[index] if count <= len(COLOURS) else mpl.colormaps["viridis"](0.9 * index / (count - 1))


def _marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


# ------------------------------------------------------------------------------------------------------------- figures


@_styled
def isoflop(
    frame: pd.DataFrame,
    minima: pd.DataFrame | None = None,
    ax: Axes | None = None,
    budget: str = "budget",
    params: str = "params_total",
    loss: str = "val_loss",
) -> Axes:
    """Loss against size at equal compute: each size at its best learning rate, a parabola a budget, a star at its
    minimum (hollow where it is not inside the sizes tried), with its 95 % interval where ``minima`` has one."""
    ax = _axes(ax, (6.8, 4.4))
    best = best_learning_rate(frame, (budget, params), loss=loss) if "learning_rate" in frame else frame
    families = list(best.groupby(budget))
    for i, (flops, family) in enumerate(families):
        family = family.groupby(params, as_index=False)[loss].mean()
        N, L = family[params].to_numpy(float), family[loss].to_numpy(float)
        colour = _colour(i, len(families))
        ax.plot(N, L, _marker(i), color=colour, label=power_of_ten(flops))
        if len(N) >= 3:
            grid = np.linspace(np.log(N[0]), np.log(N[-1]), 100)
            middle = np.log(N).mean()
            ax.plot(np.exp(grid), np.polyval(np.polyfit(np.log(N) - middle, L, 2), grid - middle), color=colour)
        rows = minima[minima[budget] == flops] if minima is not None else ()
        for _, row in rows.iterrows() if len(rows) else ():
            if "params_low" in row and np.isfinite(row["params_low"]):
                ends = [row["params_low"], row["params_high"]]
                ax.plot(ends, [row["loss_min"]] * 2, color=colour, linewidth=5, alpha=0.3, solid_capstyle="butt")
            ax.plot(
                row["params_opt"], row["loss_min"], "*", color=colour, markersize=13, markeredgecolor="black",
                markeredgewidth=0.8, markerfacecolor=colour if row["inside"] else "none", zorder=5,
            )  # fmt: skip
    _log(ax, "x", PARAMS)
    ax.set_ylabel(LOSS)
    _legend_beside(ax, "FLOPs")
    return ax


def _legend_beside(ax: Axes, title: str, handles: list | None = None) -> None:
    """A legend to the right of the axes, where it can hide nothing."""
    entries = len(handles or ax.get_legend_handles_labels()[0])
    place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.2}
    ax.legend(handles=handles, title=title, ncols=1 + (entries - 1) // 10, columnspacing=1.0, **place)


@_styled
def law(
    fit: Fit,
    ax: Axes | None = None,
    x: str = PARAMS,
    y: str = LOSS,
    label: str | None = None,
    errors: tuple[Sequence[float], Sequence[float]] | None = None,
    extend: float = 2.0,
    colour: str = COLOURS[0],
) -> Axes:
    """A law in one variable with its rows and its 95 % bootstrap band, on log axes. The line goes on, dashed, to
    ``extend`` times the largest x. ``errors`` are low and high ends of an interval of each row."""
    ax = _axes(ax)
    seen, observed = fit.data["x"].to_numpy(float), fit.data["observed"].to_numpy(float)
    if errors is not None:
        ax.vlines(seen, *errors, color=colour, linewidth=4, alpha=0.35)
    ax.plot(seen, observed, "o", color=colour, zorder=3)
    inside = np.geomspace(seen.min(), seen.max(), 60)
    beyond = np.geomspace(seen.max(), seen.max() * extend, 30)
    for grid, dashes in ((inside, "-"), (beyond, "--")):
        curve = fit.predict(grid)
        ax.plot(grid, curve.iloc[:, 0], dashes, color=colour, label=label if dashes == "-" else None)
        if np.isfinite(curve["low"]).all():
            ax.fill_between(grid, curve["low"], curve["high"], color=colour, alpha=0.18, linewidth=0)
    if fit.params.get("E", 0) > 0.5 * observed.min():
        ax.axhline(fit.params["E"], color=GREY, linewidth=1, linestyle=":")
        ax.annotate(
            f"floor {fit.params['E']:.2f}", (seen.min(), fit.params["E"]), (2, 2), textcoords="offset points",
            color=GREY, fontsize=9,
        )  # fmt: skip
    _log(ax, "x", x, power_of_ten if "FLOP" in x else None)
    _log(ax, "y", y, _plain if "loss" in y else None)
    if label:
        ax.legend(loc="best")
    return ax


@_styled
def frontier(minima: pd.DataFrame, fit: Fit, what: str = "params_opt", ax: Axes | None = None) -> Axes:
    """A law of the isoFLOP minima (``what`` is params_opt, tokens_opt or loss_min) against compute, with its band, the
    minima's own intervals where they are known, and the minima no law uses as hollow marks."""
    label = {"params_opt": "best size $N_{opt}$ (parameters)", "tokens_opt": "best length $D_{opt}$ (tokens)"}.get(
        what, LOSS
    )
    colour = {"params_opt": COLOURS[0], "tokens_opt": COLOURS[2]}.get(what, COLOURS[1])
    inside = minima[minima["inside"]]
    low, high = (f"{what.split('_')[0]}_{end}" for end in ("low", "high"))
    errors = (inside[low], inside[high]) if low in inside and len(inside) == len(fit.data) else None
    if fit.form == "growth":
        words = rf"${what[0].replace('p', 'N').replace('t', 'D')}_{{opt}} \propto C^{{{fit.params['a']:.2f}}}$"
    else:
        words = rf"$L \propto C^{{-{fit.params['alpha']:.3f}}}$"
    low, high = fit.intervals.get("a", fit.intervals.get("alpha", (np.nan, np.nan)))
    if np.isfinite(low):
        words += f"  [{low:.2f}, {high:.2f}]" if fit.form == "growth" else f"  [{low:.3f}, {high:.3f}]"
    ax = law(fit, ax=ax, x=FLOPS, y=label, label=words, errors=errors, colour=colour)
    outside = minima[~minima["inside"]]
    ax.plot(outside["budget"], outside[what], "o", color=colour, markerfacecolor="none")
    return ax


@_styled
def surface(
    fit: Fit,
    runs: pd.DataFrame | None = None,
    ax: Axes | None = None,
    planned: object = None,
    params: str = "params_total",
    tokens: str = "tokens_seen",
) -> Axes:
    """Contours of L(N, D) with the runs and the compute-optimal frontier (under C = 6 N D, with its bootstrap band);
    dashed beyond the most compute of any run. planned: an (N, D) pair, or a Plan, which also shows what other sizes its
    budget buys, and where the text ends: above, the contours are those of repeated text (the frontier is not)."""
    ax = _axes(ax, (6.8, 4.8))
    N, D = (runs[params], runs[tokens]) if runs is not None else (fit.data["params"], fit.data["tokens"])
    N, D = np.asarray(N, float), np.asarray(D, float)
    star = (planned.params, planned.tokens) if hasattr(planned, "params") else planned
    reach = [
        (v.min(), v.max() if star is None else max(v.max(), p)) for v, p in zip((N, D), star or (0, 0), strict=True)
    ]
    grids = [np.geomspace(low / 1.5, high * 1.7, 120) for low, high in reach]
    n, d = np.meshgrid(*grids)
    law, whole = RepeatedText(fit), np.inf
    if getattr(planned, "epochs", None):
        whole = planned.tokens / planned.epochs
        law = RepeatedText(fit, whole, planned.repetition)
    L = law.loss(n, d)
    levels = ticker.MaxNLocator(14, steps=[1, 2, 2.5, 5, 10]).tick_values(L.min(), np.quantile(L, 0.97))
    levels = levels[(levels > L.min()) & (levels < L.max())]
    dark = mpl.colormaps["viridis"](np.linspace(0.78, 0, len(levels)))  # its pale end would be lost on paper
    inside = np.where(n * d <= (N * D).max(), L, np.nan)
    for heights, dashes in ((L, "--"), (inside, "-")):
        ax.contour(n, d, heights, levels=levels, colors=dark, linewidths=1.1, linestyles=dashes)
    for level, colour, (x, y) in zip(levels, dark, _on_contours(n, d, L, levels), strict=True):
        ax.annotate(
            f"{level:.4g}", (x, y), color=colour, fontsize=8, ha="center", va="center", zorder=2.5,
            path_effects=[patheffects.withStroke(linewidth=3, foreground="white")],
        )  # fmt: skip
    flops = np.geomspace(6 * reach[0][0] * reach[1][0] / 4, 6 * reach[0][1] * reach[1][1] * 4, 60)
    best = fit.optimal(flops)
    ax.plot(best["params"], best["tokens"], color="black", linewidth=1.4, label="best for its compute (6ND)")
    if "params_low" in best:  # each end of the interval lies on its own line of equal compute
        ends = pd.concat([best["params_low"], best["params_high"][::-1]]).to_numpy()
        ax.fill(ends, np.concatenate([flops, flops[::-1]]) / 6 / ends, color="black", alpha=0.1, linewidth=0)
    ax.plot(N, D, "o", color=COLOURS[0], markersize=4.5, markeredgecolor="white", markeredgewidth=0.5, label="runs")
    if hasattr(planned, "options"):
        same = planned.options
        ax.plot(same["params_total"], same["tokens"], ":", color=COLOURS[1], linewidth=2, label="same budget")
        if grids[1][0] < whole < grids[1][-1]:
            ax.axhline(whole, color=GREY, linewidth=1)
            ax.annotate(
                "the text ends; repeated above", (0.01, whole), (0, -3), xycoords=ax.get_yaxis_transform(), va="top",
                textcoords="offset points", color=GREY, fontsize=8,
                path_effects=[patheffects.withStroke(linewidth=3, foreground="white")],
            )  # fmt: skip
    if star is not None:
        ax.plot(*star, "*", color=COLOURS[1], markersize=17, markeredgecolor="black", zorder=5, label="planned run")
    _log(ax, "x", PARAMS)
    _log(ax, "y", TOKENS)
    ax.set_xlim(grids[0][0], grids[0][-1])
    ax.set_ylim(grids[1][0], grids[1][-1])
    ax.set_title(f"contours: {LOSS}")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, columnspacing=1.4, handlelength=1.6)
    return ax


def _on_contours(n: np.ndarray, d: np.ndarray, L: np.ndarray, levels: np.ndarray) -> list[tuple[float, float]]:
    """A place for the label of each level of a surface that falls in both directions: near the right edge where the
    contour reaches it, else near the lower one."""
    right, lower = int(0.93 * n.shape[1]), int(0.06 * n.shape[0])
    places = []
    for level in levels:
        column, row = L[:, right], L[lower]
        if column.min() < level < column[lower]:
            places.append((n[0, right], float(np.exp(np.interp(-level, -column, np.log(d[:, right]))))))
        elif row.min() < level < row.max():
            places.append((float(np.exp(np.interp(-level, -row, np.log(n[lower])))), d[lower, 0]))
        else:
            places.append((np.nan, np.nan))
    return places


@_styled
def learning_rates(
    frame: pd.DataFrame,
    ax: object = None,
    budget: str = "budget",
    params: str = "params_total",
    rate: str = "learning_rate",
    loss: str = "val_loss",
) -> object:
    """Loss against learning rate for every size, with the parabola and its vertex (a star, hollow at an edge of the
    rates tried). One panel a budget where ``ax`` is an array of axes (or None); a single Axes takes all. Diverged runs
    are crosses at the upper rim. Returns ``ax``, or the list of new axes."""
    budgets = sorted(frame[budget].unique())
    panels = _panels(ax, len(budgets), (3.6, 3.4))
    shared = len(panels) == 1
    chosen = [budgets] if shared else [[b] for b in budgets]
    sizes = sorted(frame[params].unique())
    best = best_learning_rate(frame, (budget, params), rate, loss)
    for panel, own in zip(panels, chosen, strict=False):
        for (flops, size), group in frame[frame[budget].isin(own)].groupby([budget, params]):
            index = sizes.index(size)
            colour = _colour(index, len(sizes))
            means = group.groupby(rate)[loss].mean()
            panel.plot(means.index, means, _marker(index), color=colour)
            lost = means.index[~np.isfinite(means.to_numpy(float))]
            if len(lost):
                rim = panel.get_xaxis_transform()  # x in data, y in parts of the axes
                panel.plot(lost, np.full(len(lost), 0.97), "x", color=colour, transform=rim)
            row = best[(best[budget] == flops) & (best[params] == size)]
            if not len(row):
                continue
            row = row.iloc[0]
            if row["fitted"]:
                reach = np.log(means.index.to_numpy(float) / row[rate])
                x = np.linspace(max(reach.min(), -1.6), min(reach.max(), 1.6), 50)
                panel.plot(row[rate] * np.exp(x), row[loss] + row["curvature"] * x**2, color=colour, linewidth=1.2)
            panel.plot(
                row[rate], row[loss], "*", color=colour, markersize=12, markeredgecolor="black", markeredgewidth=0.6,
                markerfacecolor="none" if row["edge"] else colour, zorder=5,
            )  # fmt: skip
        _log(panel, "x", RATE, _plain)
        panel.set_title(", ".join(power_of_ten(b) for b in own) + " FLOPs")
        panel.margins(y=0.12)
    panels[0].set_ylabel(LOSS)
    handles = [
        Line2D([], [], color=_colour(i, len(sizes)), marker=_marker(i), label=quantity(size))
        for i, size in enumerate(sizes)
    ]
    _legend_beside(panels[len(chosen) - 1], PARAMS, handles)
    return panels if ax is None else ax


@_styled
def contrasts(table: pd.DataFrame, ax: Axes | None = None, by: str = "variant") -> Axes:
    """Differences to a baseline with their 95 % intervals, a line a variant (a table as ``contrasts.contrasts`` gives it):
    worse to the right of zero, better to the left; those told apart after correction are filled."""
    rows = table[table["low"].notna()].sort_values("difference", ignore_index=True)
    ax = _axes(ax, (6.8, 1.0 + 0.36 * max(1, len(rows))))
    colours = {"worse": COLOURS[1], "better": COLOURS[2]}
    ax.axvline(0, color=GREY, linewidth=1)
    for i, row in rows.iterrows():
        colour = colours.get(row["verdict"], GREY)
        ax.plot([row["low"], row["high"]], [i, i], color=colour, linewidth=2.5, solid_capstyle="butt")
        ax.plot(
            row["difference"], i, "o", color=colour, markerfacecolor=colour if row["verdict"] in colours else "white"
        )
    ax.set_yticks(range(len(rows)), rows[by])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("loss above the baseline's (nats/token)")
    return ax


@_styled
def residuals(fit: Fit, ax: object = None, seed_sd: float | None = None) -> object:
    """What the fit leaves over, in percent of the loss, against each of its inputs (a panel each; a single Axes takes
    the first): a trend or a funnel here is a law that does not hold. A bar is the mean of the runs of one size (or of
    one length). seed_sd: the spread between seeds in nats, shown as the band that 95 % of them should keep to. Returns
    ``ax``, or the list of new axes."""
    names = [name for name in ("params", "tokens", "unique", "x") if name in fit.data]
    panels = _panels(ax, len(names), (3.8, 3.2))
    left = 100 * np.expm1(fit.data["residual"].to_numpy(float))
    most = 1.15 * np.abs(left).max() or 1.0
    for panel, name in zip(panels, names, strict=False):
        x = fit.data[name].to_numpy(float)
        if seed_sd:
            band = 196 * seed_sd / fit.data["observed"].mean()
            panel.axhspan(-band, band, color=GREY, alpha=0.13, linewidth=0)
            most = max(most, 1.25 * band)
            if panel is panels[0]:
                panel.annotate("95 % of seeds", (0.02, band), (0, 2), xycoords=panel.get_yaxis_transform(),
                               textcoords="offset points", color=GREY, fontsize=8)  # fmt: skip
        panel.axhline(0, color=GREY, linewidth=1)
        panel.plot(x, left, "o", color=COLOURS[0], alpha=0.7, markersize=5)
        groups = pd.Series(left).groupby(np.round(np.log(x), 2))
        for at, mean in groups.mean()[groups.size() > 1].items():
            panel.plot(np.exp([at - 0.09, at + 0.09]), [mean, mean], color=COLOURS[1], linewidth=2.5)
        _log(panel, "x", {"params": PARAMS, "tokens": TOKENS, "unique": UNIQUE}.get(name, name))
        panel.set_ylim(-most, most)
    panels[0].set_ylabel("observed above predicted (%)")
    return panels if ax is None else ax


@_styled
def clouds(fit: Fit, ax: object = None, pairs: Sequence[tuple[str, str]] | None = None) -> object:
    """Bootstrap resamples of pairs of parameters, a panel each: the estimate (star), its 95 % intervals (bars at the
    rims), and how strongly the two hang together (r, of logs where the axis is logarithmic). Coefficients (A, B, k) are
    drawn on log axes. In alpha against beta a line joins the pairs that give the same exponent of N_opt. A single Axes
    takes the first pair. Returns ``ax``, or the list of new axes."""
    if not len(fit.samples):
        raise LabError("A cloud needs a bootstrap", "a fit without resamples", "fit with bootstrap=1000")
    usual = (("R_D", "R_N"), ("alpha", "beta"), ("E", "alpha"), ("E", "beta"), ("A", "alpha"), ("k", "a"))
    pairs = list(pairs or [pair for pair in usual if set(pair) <= set(fit.params)][:3])
    panels = _panels(ax, len(pairs), (3.3, 3.2))
    for panel, pair in zip(panels, pairs, strict=False):
        draws = fit.samples[list(pair)].to_numpy(float)
        logs = [name in COEFFICIENTS for name in pair]
        told = np.where(logs, np.log(np.abs(draws) + 1e-300), draws)
        r = np.corrcoef(told.T)[0, 1] if (told.std(axis=0) > 0).all() else np.nan
        panel.plot(*draws.T, "o", color=COLOURS[0], markersize=2.6, alpha=0.3, markeredgewidth=0)
        # A handful of wild resamples would squeeze the rest into a corner.
        ends = np.quantile(told, [0.005, 0.995], axis=0)
        wide = 0.12 * (ends[1] - ends[0]) + 1e-12
        low, high = ends[0] - wide, ends[1] + wide
        for axis, name, log, a, b in zip("xy", pair, logs, low, high, strict=True):
            span = np.array(fit.intervals.get(name, (np.nan, np.nan)), float)
            span = np.log(span) if log else span
            a, b = np.nanmin([a, span[0] - 0.04 * (b - a)]), np.nanmax([b, span[1] + 0.04 * (b - a)])
            if log:
                _log(panel, axis, NAMES.get(name, name), _plain_or_power)
                a, b = np.exp(a), np.exp(b)
            else:
                getattr(panel, f"set_{axis}label")(NAMES.get(name, name))
                getattr(panel, f"{axis}axis").set_major_locator(ticker.MaxNLocator(5))
            getattr(panel, f"set_{axis}lim")(a, b)
        if pair == ("alpha", "beta"):
            slope = fit.params["beta"] / fit.params["alpha"]
            panel.axline((0, 0), slope=slope, color=GREY, linewidth=1, linestyle=":")
        rims = (panel.get_xaxis_transform(), panel.get_yaxis_transform())  # data along the axis, on its spine across
        for name, rim, flip in zip(pair, rims, (1, -1), strict=True):
            span = fit.intervals.get(name, (np.nan, np.nan))
            if np.isfinite(span).all():
                panel.plot(
                    *(span, (0, 0))[::flip], color=COLOURS[1], linewidth=4, solid_capstyle="butt", clip_on=False,
                    zorder=4, transform=rim,
                )  # fmt: skip
        panel.plot(
            *(fit.params[name] for name in pair), "*", color=COLOURS[1], markersize=13, markeredgecolor="black",
            markeredgewidth=0.7, zorder=5,
        )  # fmt: skip
        if np.isfinite(r):
            panel.set_title(f"r = {r:+.2f}".replace("-", "\N{MINUS SIGN}"), fontsize=9)
    return panels if ax is None else ax


@_styled
def profiles(table: pd.DataFrame, ax: object = None, threshold: float | None = None) -> object:
    """Profile curves, a panel a parameter: how much the objective rises when a parameter is held and all others are
    fitted again. Where the curve stays below ``threshold`` the data allow the value; a curve that never rises above it
    is a parameter that the data do not fix.

    table: one row a point, with columns parameter, value, and either delta (above the least) or objective. threshold: by
    default the table's own column of that name. A single Axes takes the first parameter. Returns ``ax``, or the list of
    new axes."""
    names = list(dict.fromkeys(table["parameter"]))
    panels = _panels(ax, len(names), (2.9, 2.9))
    for panel, name in zip(panels, names, strict=False):
        rows = table[table["parameter"] == name].sort_values("value")
        value = rows["value"].to_numpy(float)
        rise = (rows["delta"] if "delta" in rows else rows["objective"] - rows["objective"].min()).to_numpy(float)
        limit = float(rows["threshold"].iloc[0]) if threshold is None and "threshold" in rows else threshold
        best = int(np.argmin(rise))
        if limit is not None:
            rise = rise / limit
            panel.set_ylim(0, min(4.0, max(1.3, 1.05 * rise.max())))
            panel.axhline(1, color=GREY, linewidth=1, linestyle="--")
            fine = np.interp(np.linspace(0, len(value) - 1, 1000), np.arange(len(value)), value)
            height = np.interp(fine, value, rise)
            panel.fill_between(fine, 0, height, where=height <= 1, color=COLOURS[0], alpha=0.15, linewidth=0)
            ends = (rise[0] <= 1, rise[-1] <= 1)
            said = {
                (True, True): "no limit either way",
                (True, False): "no lower limit",
                (False, True): "no upper limit",
            }
            panel.set_title(said.get(ends, ""), fontsize=9, color=COLOURS[1])
        else:
            panel.set_ylim(0, 1.05 * rise.max() or 1.0)
            panel.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        panel.plot(value, rise, color=COLOURS[0])
        panel.plot(
            value[best], rise[best], "*", color=COLOURS[1], markersize=12, markeredgecolor="black", markeredgewidth=0.7,
            zorder=5, clip_on=False,
        )  # fmt: skip
        panel.yaxis.set_major_locator(ticker.MaxNLocator(5))
        if name in COEFFICIENTS:
            _log(panel, "x", NAMES.get(name, name), _plain_or_power)
        else:
            panel.set_xlabel(NAMES.get(name, name))
            panel.xaxis.set_major_locator(ticker.MaxNLocator(4))
    panels[0].set_ylabel("objective above its least" + ("" if limit is None else "\nin units of its 95 % limit"))
    return panels if ax is None else ax


@_styled
def leave_out(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Signed errors of predicting what a fit was not shown: a line a group left out (one size, one budget, the largest
    runs), a dot a run, a bar their mean. Right of zero the runs came out above their prediction.

    table: one row a run, with columns left_out (a number or words) and error_percent."""
    groups = list(table.groupby("left_out", sort=False))
    ax = _axes(ax, (6.8, 1.1 + 0.34 * max(1, len(groups))))
    ax.axvline(0, color=GREY, linewidth=1)
    for i, (_, group) in enumerate(groups):
        errors = group["error_percent"].to_numpy(float)
        ax.plot(errors, np.full(len(errors), i), "o", color=COLOURS[0], alpha=0.6, markersize=5)
        ax.plot([errors.mean()] * 2, [i - 0.3, i + 0.3], color=COLOURS[1], linewidth=2.5)
        ax.annotate(
            _signed(errors.mean()), (1.01, i), xycoords=("axes fraction", "data"), va="center", fontsize=9,
            annotation_clip=False,
        )  # fmt: skip
    ax.set_yticks(range(len(groups)), [name if isinstance(name, str) else quantity(name) for name, _ in groups])
    ax.set_ylim(len(groups) - 0.4, -0.6)
    most = 1.12 * table["error_percent"].abs().max() or 1.0
    ax.set_xlim(-most, most)
    ax.grid(axis="y", visible=False)
    ax.set_ylabel("left out")
    ax.set_xlabel("observed above predicted (%)")
    return ax


@_styled
def repetition(
    frame: pd.DataFrame,
    predict: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] | None = None,
    ax: Axes | None = None,
    unique: str = "unique_tokens",
    epochs: str = "epochs",
    params: str = "params_total",
    loss: str = "val_loss",
) -> Axes:
    """Loss against the number of epochs, a line an amount of distinct tokens: what reading a text again brings. frame: one
    row a run that ended at its epochs. predict: a law's loss from arrays of parameters, tokens of training and distinct
    tokens, drawn as thin lines."""
    ax = _axes(ax)
    groups = list(frame.dropna(subset=[loss]).groupby(unique))
    for i, (amount, group) in enumerate(groups):
        colour = _colour(i, len(groups))
        best = group.loc[group.groupby(epochs)[loss].idxmin()].sort_values(epochs)
        ax.plot(best[epochs], best[loss], _marker(i), color=colour, label=quantity(amount))
        x = np.geomspace(best[epochs].min(), best[epochs].max(), 60)
        if predict is None:
            ax.plot(best[epochs], best[loss], color=colour)
        else:
            size = np.exp(np.interp(np.log(x), np.log(best[epochs]), np.log(best[params].to_numpy(float))))
            ax.plot(x, predict(size, x * amount, np.full(len(x), float(amount))), color=colour, linewidth=1.2)
    _log(ax, "x", "epochs", _plain)
    tried = np.unique(frame[epochs])
    if len(tried) <= 8:
        ax.xaxis.set_major_locator(ticker.FixedLocator(tried))
        ax.xaxis.set_minor_locator(ticker.NullLocator())
    ax.set_ylabel(LOSS)
    _legend_beside(ax, "distinct tokens")
    return ax


@_styled
def forecast(forecasts: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Sealed forecasts (``forecasts.load``), one a line, oldest above: the predicted loss with its 95 % interval, and
    the loss observed; those that missed are marked, those that wait say so."""
    ax = _axes(ax, (6.8, 1.2 + 0.45 * max(1, len(forecasts))))
    for i, row in enumerate(forecasts.itertuples()):
        ax.plot([row.low, row.high], [i, i], color=COLOURS[0], linewidth=6, alpha=0.3, solid_capstyle="butt")
        ax.plot(row.loss, i, "|", color=COLOURS[0], markersize=13, markeredgewidth=2)
        if row.scored:
            missed = not row.inside
            ax.plot(
                row.observed,
                i,
                "X" if missed else "o",
                color=COLOURS[1] if missed else COLOURS[2],
                markersize=7,
                zorder=3,
            )
        words = "not yet scored"
        if row.scored:
            words = _signed(row.error_percent) if np.isfinite(row.observed) else "its run diverged"
        ax.annotate(
            words, (1.01, i), xycoords=("axes fraction", "data"), va="center", fontsize=9, annotation_clip=False
        )
    names = [f"{row.study}, {quantity(row.params_total)} x {quantity(row.tokens)}" for row in forecasts.itertuples()]
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(LOSS)
    handles = [
        Line2D([], [], color=COLOURS[0], marker="|", markersize=11, linewidth=5, alpha=0.5, label="forecast, 95 %"),
        Line2D([], [], color=COLOURS[2], marker="o", linestyle="none", label="observed"),
        Line2D([], [], color=COLOURS[1], marker="X", linestyle="none", label="observed, missed"),
    ]
    ax.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return ax


@_styled
def calibration(table: pd.DataFrame, ax: object = None) -> object:
    """All forecasts ever scored (``forecasts.calibration(...).table``): the loss observed against the loss forecast with
    its 95 % interval, and beside it each error in standard deviations of its own interval, in the order they were
    sealed, against the 1.96 that 95 % of honest ones keep to. Misses are crosses, diverged runs crosses at the rim. A
    single Axes takes the first panel. Returns ``ax``, or the list of new axes."""
    scored = table[table["scored"].astype(bool)].reset_index(drop=True)
    panels = _panels(ax, 2, (3.9, 3.7))
    seen = scored[scored["observed"].notna()]
    panel = panels[0]
    panel.axline((1, 1), slope=1, color=GREY, linewidth=1)
    panel.vlines(seen["loss"], seen["low"], seen["high"], color=COLOURS[0], linewidth=5, alpha=0.3)
    panel.plot(seen["loss"], seen["loss"], "_", color=COLOURS[0], markersize=9, markeredgewidth=1.6)
    hits, missed = (seen[seen["inside"].astype(bool) == kept] for kept in (True, False))
    panel.plot(hits["loss"], hits["observed"], "o", color=COLOURS[2], zorder=3)
    panel.plot(missed["loss"], missed["observed"], "X", color=COLOURS[1], markersize=7, zorder=3)
    if len(seen):
        ends = seen[["low", "high", "observed", "loss"]]
        low, high = ends.min().min(), ends.max().max()
        edge = 0.06 * (high - low)
        panel.set_xlim(low - edge, high + edge)
        panel.set_ylim(low - edge, high + edge)
    panel.set_xlabel("forecast (nats/token)")
    panel.set_ylabel("observed (nats/token)")
    handles = [
        Line2D([], [], color=COLOURS[0], marker="_", markersize=9, linewidth=5, alpha=0.4, label="forecast, 95 %"),
        Line2D([], [], color=COLOURS[2], marker="o", linestyle="none", label="inside"),
        Line2D([], [], color=COLOURS[1], marker="X", linestyle="none", label="missed"),
    ]
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 3}
    panel.legend(handles=handles, handlelength=1.2, columnspacing=1.2, **place)
    for panel in panels[1:2]:
        z = scored["standardised"].to_numpy(float)
        rim = 1.1 * max(3.0, np.nanmax(np.abs(z[np.isfinite(z)]), initial=0.0))
        place = np.arange(1, len(z) + 1)
        inside = scored["inside"].astype(bool).to_numpy()
        panel.axhspan(-1.96, 1.96, color=COLOURS[0], alpha=0.15, linewidth=0)
        panel.axhline(0, color=GREY, linewidth=1)
        height = np.where(np.isfinite(z), np.clip(z, -rim, rim), 0.96 * rim)
        panel.plot(place[inside], height[inside], "o", color=COLOURS[2])
        panel.plot(place[~inside], height[~inside], "X", color=COLOURS[1], markersize=7)
        panel.set_ylim(-rim, rim)
        panel.set_xlim(0.4, max(2, len(z)) + 0.6)
        panel.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
        panel.set_xlabel("forecast, in the order sealed")
        panel.set_ylabel("error (standard deviations)")
    return panels if ax is None else ax


@_styled
def seeds(frame: pd.DataFrame, ax: Axes | None = None, loss: str = "val_loss", by: str | None = None) -> Axes:
    """Losses of runs that differ in their seed alone: a dot a run, the mean and one standard deviation either way.
    ``by`` names a column that puts groups on lines of their own."""
    groups = [("", frame)] if by is None else list(frame.groupby(by, sort=False))
    ax = _axes(ax, (6.8, 1.2 + 0.55 * len(groups)))
    for i, (_, group) in enumerate(groups):
        losses = np.sort(group[loss].dropna().to_numpy(float))
        mean, spread = losses.mean(), losses.std(ddof=1) if len(losses) > 1 else 0.0
        ax.plot(
            [mean - spread, mean + spread], [i, i], color=COLOURS[0], linewidth=10, alpha=0.25, solid_capstyle="butt"
        )
        ax.plot([mean, mean], [i - 0.28, i + 0.28], color=COLOURS[0])
        lift = 0.12 * (np.arange(len(losses)) % 3 - 1)  # neighbours do not hide one another
        ax.plot(losses, i + lift, "o", color=COLOURS[1], markersize=5, markeredgecolor="white", markeredgewidth=0.5)
        words = f"{mean:.3f} ± {spread:.3f}"
        ax.annotate(
            words, (1.01, i), xycoords=("axes fraction", "data"), va="center", fontsize=9, annotation_clip=False
        )
    if by is None:
        ax.set_yticks([])
    else:
        ax.set_yticks(range(len(groups)), [str(name) for name, _ in groups])
    ax.set_ylim(len(groups) - 0.4, -0.6)
    ax.margins(x=0.1)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(LOSS)
    return ax


@_styled
def data_limited(
    frame: pd.DataFrame,
    fit: Fit | None = None,
    ax: Axes | None = None,
    unique: str = "unique_tokens",
    loss: str = "val_loss",
    train: str = "train_loss",
) -> Axes:
    """L(D): loss on validation and on training text against the distinct tokens there were to learn from, best run of
    each amount, with the fitted law and its band. The gap between the two is what was learnt by heart."""
    ax = _axes(ax)
    best = frame.loc[frame.dropna(subset=[loss]).groupby(unique)[loss].idxmin()].sort_values(unique)
    if fit is not None:
        law(fit, ax=ax, x="distinct training tokens D", colour=COLOURS[0])
        bend = best[unique].to_numpy(float)
        ax.plot(bend, best[loss], "o", color=COLOURS[0], label="validation")
    else:
        ax.plot(best[unique], best[loss], "o-", color=COLOURS[0], label="validation")
    if train in best:
        ax.plot(best[unique], best[train], "s--", color=COLOURS[1], markersize=4.5, linewidth=1.2, label="training")
    _log(ax, "x", "distinct training tokens D")
    _log(ax, "y", "loss (nats/token)", _plain)
    ax.legend(loc="best")
    return ax


@_styled
def curves(frame: pd.DataFrame, ax: Axes | None = None, by: str = "run_id", title: str | None = None) -> Axes:
    """Loss against tokens while training: validation as lines, training (where there is a ``train_loss``) thin behind.
    frame: one row an evaluation, with ``tokens``, ``val_loss`` and ``by``, which tells the runs apart."""
    ax = _axes(ax, (6.8, 4.2))
    groups = list(frame.groupby(by, sort=False))
    for i, (name, group) in enumerate(groups):
        group = group[group["tokens"] > 0].sort_values("tokens")
        colour = _colour(i, len(groups))
        ax.plot(
            group["tokens"],
            group["val_loss"],
            color=colour,
            label=quantity(name) if isinstance(name, float) else str(name),
        )
        if "train_loss" in group:
            ax.plot(group["tokens"], group["train_loss"], color=colour, linewidth=0.9, alpha=0.55)
    _log(ax, "x", TOKENS)
    ax.set_ylabel("loss (nats/token)" if "train_loss" in frame else LOSS)
    _legend_beside(ax, title or by)
    return ax


# ------------------------------------------------------------------------------------------------ studies of one knob


@_styled
def epochs(
    frame: pd.DataFrame,
    ax: object = None,
    predict: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] | None = None,
    ended: str = "ended",
) -> object:
    """Loss against the epochs a run was made for, a panel a size, a line an amount of distinct tokens. Hollow marks are
    runs that stopped early, at the best loss on their way.

    frame: one row a place, with size, amount, passes, params_total, ``ended`` (a mask), end_loss and val_loss. predict: a
    law's loss from arrays of parameters, tokens of training and distinct tokens, drawn as thin lines. Returns ``ax``, or
    the list of new axes."""
    sizes, amounts = list(dict.fromkeys(frame["size"])), sorted(frame["amount"].unique())
    panels = _panels(ax, len(sizes), (3.6, 3.6))
    tried = sorted(frame["passes"].unique())
    for panel, size in zip(panels, sizes, strict=True):
        for amount, group in frame[frame["size"] == size].groupby("amount"):
            index, group = amounts.index(amount), group.sort_values("passes")
            colour, mark = _colour(index, len(amounts)), _marker(index)
            whole, stopped = group[group[ended]], group[~group[ended]]
            panel.plot(whole["passes"], whole["end_loss"], mark, color=colour)
            panel.plot(stopped["passes"], stopped["val_loss"], mark, color=colour, markerfacecolor="white")
            if predict is None:
                panel.plot(whole["passes"], whole["end_loss"], color=colour, linewidth=1.2)
            elif len(whole):
                x = np.geomspace(1, whole["passes"].max(), 40)
                params, unique = np.full(len(x), float(whole["params_total"].iloc[0])), np.full(len(x), float(amount))
                panel.plot(x, predict(params, x * amount, unique), color=colour, linewidth=1.2)
        _epochs_axis(panel, tried)
        panel.set_title(size)
    low, high = (f(panel.get_ylim()[i] for panel in panels) for i, f in ((0, min), (1, max)))
    for panel in panels:
        panel.set_ylim(low, high)
    panels[0].set_ylabel(LOSS)
    handles = [
        Line2D([], [], color=_colour(i, len(amounts)), marker=_marker(i), label=quantity(amount))
        for i, amount in enumerate(amounts)
    ]
    if not frame[ended].all():
        handles.append(
            Line2D([], [], color=GREY, marker="o", markerfacecolor="white", linestyle="none", label="stopped early")
        )
    _legend_beside(panels[-1], "distinct tokens", handles)
    return panels if ax is None else ax


def _epochs_axis(panel: Axes, tried: Sequence[float]) -> None:
    _log(panel, "x", "epochs", _plain)
    panel.xaxis.set_major_locator(ticker.FixedLocator(tried))
    panel.xaxis.set_minor_locator(ticker.NullLocator())
    panel.set_xlim(0.85 * min(tried), 1.18 * max(tried))


@_styled
def overfitting(curves: pd.DataFrame, ax: object = None) -> object:
    """Validation loss (thick) and training loss (thin) while a text is read again and again: a panel a size, a colour an
    amount of distinct tokens, a star at the lowest validation loss.

    curves: one row an evaluation, with size, amount, epochs (read so far), val_loss and train_loss. Returns ``ax``, or the
    list of new axes."""
    sizes, amounts = list(dict.fromkeys(curves["size"])), sorted(curves["amount"].unique())
    panels = _panels(ax, len(sizes), (3.6, 3.6))
    for panel, size in zip(panels, sizes, strict=True):
        for amount, group in curves[curves["size"] == size].groupby("amount"):
            colour, group = _colour(amounts.index(amount), len(amounts)), group.sort_values("epochs")
            panel.plot(group["epochs"], group["train_loss"], color=colour, linewidth=0.9, alpha=0.8, linestyle="--")
            panel.plot(group["epochs"], group["val_loss"], color=colour)
            best = group.loc[group["val_loss"].idxmin()]
            panel.plot(
                best["epochs"], best["val_loss"], "*", color=colour, markersize=11, markeredgecolor="black",
                markeredgewidth=0.6, zorder=5,
            )  # fmt: skip
        _log(panel, "x", "epochs read so far", _plain)
        panel.set_title(size)
    shown = curves[curves["epochs"] >= curves["epochs"].max() / 16]  # the first steps would squeeze all that follows
    low, high = shown[["val_loss", "train_loss"]].min().min(), shown[["val_loss", "train_loss"]].max().max()
    for panel in panels:
        panel.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    panels[0].set_ylabel("loss (nats/token)")
    handles = [
        Line2D([], [], color=_colour(i, len(amounts)), label=quantity(amount)) for i, amount in enumerate(amounts)
    ]
    handles += [
        Line2D([], [], color=GREY, label="validation"),
        Line2D([], [], color=GREY, linewidth=0.9, linestyle="--", label="training"),
        Line2D([], [], color=GREY, marker="*", markersize=10, linestyle="none", label="lowest"),
    ]
    _legend_beside(panels[-1], "distinct tokens", handles)
    return panels if ax is None else ax


@_styled
def worth(table: pd.DataFrame, ax: object = None) -> object:
    """How much new text so many epochs stand for, in units of the text itself: a panel a size, a colour an amount. On the
    grey line a repeated token is as good as a new one.

    table: one row a place, with size, amount, passes, worth, worth_low and worth_high (95 %); NaN where no measured length of
    fresh text reaches that loss. Returns ``ax``, or the list of new axes."""
    sizes = list(dict.fromkeys(table["size"]))
    panels = _panels(ax, len(sizes), (3.6, 3.4))
    known = table.dropna(subset=["worth"]).query("passes > 1")  # one epoch is worth one by definition
    amounts = sorted(known["amount"].unique())
    most = known["passes"].max() if len(known) else 2
    for panel, size in zip(panels, sizes, strict=True):
        panel.plot([1, most], [1, most], color=GREY, linewidth=1)
        for amount, group in known[known["size"] == size].groupby("amount"):
            index, group = amounts.index(amount), group.sort_values("passes")
            colour = _colour(index, len(amounts))
            shift = 1 + 0.03 * (index - 0.5 * (len(amounts) - 1))  # intervals beside one another
            panel.vlines(
                group["passes"] * shift, group["worth_low"], group["worth_high"], color=colour, linewidth=3, alpha=0.35
            )
            panel.plot(group["passes"] * shift, group["worth"], _marker(index), color=colour)
        _epochs_axis(panel, sorted({1, *known["passes"]}))
        _log(panel, "y", "", _plain)
        panel.set_title(size)
    low = min([1.0, *known["worth_low"].dropna()])
    high = max([2.0, *known["worth_high"].dropna()])
    for panel in panels:
        panel.set_ylim(max(0.4, 0.9 * low), 1.15 * high)
    panels[0].set_ylabel("worth in new text\n(times the distinct tokens)")
    handles = [
        Line2D([], [], color=_colour(i, len(amounts)), marker=_marker(i), linestyle="none", label=quantity(amount))
        for i, amount in enumerate(amounts)
    ]
    handles.append(Line2D([], [], color=GREY, linewidth=1, label="as good as new"))
    _legend_beside(panels[-1], "distinct tokens", handles)
    return panels if ax is None else ax


@_styled
def depths(frame: pd.DataFrame, best: pd.DataFrame, ax: object = None, error: float = 0.0) -> object:
    """Loss against layers at equal parameters, a panel a family, with the parabola in log layers through its models and a
    star at the minimum (hollow where it lies outside), with its 95 % interval.

    frame: family, num_layers, hidden_size, val_loss. best: a row a family with family, layers, layers_low, layers_high,
    loss, inside and the parabola's coefficients a, b, c in log layers. error: half-width (nats) of the bar on each model.
    Returns ``ax``, or the list of new axes."""
    names = list(best["family"])
    panels = _panels(ax, len(names), (3.8, 3.6))
    for i, (panel, (_, row)) in enumerate(zip(panels, best.iterrows(), strict=True)):
        group = frame[frame["family"] == row["family"]].sort_values("num_layers")
        layers, losses, colour = group["num_layers"].to_numpy(float), group["val_loss"].to_numpy(float), COLOURS[i]
        panel.errorbar(layers, losses, yerr=error or None, fmt=_marker(i), color=colour, elinewidth=2, alpha=0.8)
        x = np.linspace(np.log(layers[0]), np.log(layers[-1]), 80)
        panel.plot(np.exp(x), row["a"] * x**2 + row["b"] * x + row["c"], color=colour, linewidth=1.2)
        ends = [row["layers_low"], row["layers_high"]]
        if np.isfinite(ends).any():  # an end that is not known lies beyond the layers tried
            ends = [end if np.isfinite(end) else edge for end, edge in zip(ends, layers[[0, -1]], strict=True)]
            panel.plot(ends, [row["loss"]] * 2, color=colour, linewidth=6, alpha=0.3, solid_capstyle="butt")
        panel.plot(
            row["layers"], row["loss"], "*", color=colour, markersize=13, markeredgecolor="black", markeredgewidth=0.7,
            markerfacecolor=colour if row["inside"] else "none", zorder=5,
        )  # fmt: skip
        for layer, width in zip(layers, group["hidden_size"], strict=True):
            rim = panel.get_xaxis_transform()
            panel.annotate(f"{width:d}", (layer, 0.99), xycoords=rim, ha="center", va="top", fontsize=8, color=GREY)
        panel.annotate("hidden size", (0.01, 0.93), xycoords="axes fraction", va="top", fontsize=8, color=GREY)
        _log(panel, "x", "layers", _plain)
        panel.xaxis.set_major_locator(ticker.FixedLocator(layers))
        panel.xaxis.set_minor_locator(ticker.NullLocator())
        panel.margins(x=0.12, y=0.2)
        panel.set_title(row["title"] if "title" in row else row["family"])
    panels[0].set_ylabel(LOSS)
    return panels if ax is None else ax


@_styled
def notions(frame: pd.DataFrame, fits: dict[str, Fit], labels: dict[str, str], ax: object = None) -> object:
    """One law of loss against several notions of size, a panel each: all shapes as one law has to take them, with the
    family of each as colour and mark. frame: family, val_loss and a column for each notion, the keys of ``fits``. labels: of
    the axes. Returns ``ax``, or the list of new axes."""
    families = list(dict.fromkeys(frame["family"]))
    panels = _panels(ax, len(fits), (3.2, 3.4))
    for panel, (name, fit) in zip(panels, fits.items(), strict=True):
        for i, family in enumerate(families):
            group = frame[frame["family"] == family]
            panel.plot(group[name], group["val_loss"], _marker(i), color=_colour(i, len(families)), label=family)
        grid = np.geomspace(frame[name].min(), frame[name].max(), 80)
        panel.plot(grid, fit.predict(grid)["loss"], color="black", linewidth=1.2, zorder=1)
        _log(panel, "x", labels[name])
        _log(panel, "y", "", _plain)
        miss = 100 * (fit.data["observed"] / fit.data["predicted"] - 1)
        panel.set_title(f"misses by {np.sqrt((miss**2).mean()):.2f} %", fontsize=9)
    panels[0].set_ylabel(LOSS)
    _legend_beside(panels[-1], "family")
    return panels if ax is None else ax


@_styled
def spreads(frame: pd.DataFrame, ax: Axes | None = None, by: str = "place", loss: str = "val_loss") -> Axes:
    """How far runs that differ in their seed alone lie from the mean of their place: a line a place, a dot a run, and one
    standard deviation either way."""
    groups = list(frame.dropna(subset=[loss]).groupby(by, sort=False)[loss])
    ax = _axes(ax, (6.8, 1.2 + 0.4 * len(groups)))
    for i, (_, losses) in enumerate(groups):
        away = np.sort(losses.to_numpy(float) - losses.mean())
        ax.plot(
            [-losses.std(), losses.std()], [i, i], color=COLOURS[0], linewidth=10, alpha=0.25, solid_capstyle="butt"
        )
        lift = 0.12 * (np.arange(len(away)) % 3 - 1)  # neighbours do not hide one another
        ax.plot(away, i + lift, "o", color=COLOURS[1], markersize=5, markeredgecolor="white", markeredgewidth=0.5)
        words = f"{losses.mean():.3f} ± {losses.std():.3f}"
        ax.annotate(
            words, (1.01, i), xycoords=("axes fraction", "data"), va="center", fontsize=9, annotation_clip=False
        )
    ax.axvline(0, color=GREY, linewidth=1)
    ax.set_yticks(range(len(groups)), [str(name) for name, _ in groups])
    ax.set_ylim(len(groups) - 0.4, -0.6)
    ax.margins(x=0.1)
    ax.grid(axis="y", visible=False)
    ax.xaxis.set_major_locator(ticker.MaxNLocator(5))  # more labels would touch
    ax.set_xlabel("loss away from the mean of its place (nats/token)")
    return ax
