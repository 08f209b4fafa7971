"""How often the intervals of a fit hold the truth, measured on simulated studies: ``python -m tinylm.study.coverage``.

A study is a set of rows drawn from a known law with noise, fitted as any other. Intervals that are called 95 % should
hold the truth in 95 % of the studies, for each parameter, for the exponent of N_opt in C, for the loss that the law
forecasts beyond the rows, and for the loss of one new run there, whose noise the interval includes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import click
import numpy as np
import pandas as pd
from scipy import stats

from tinylm.study.scaling import LEVEL, evaluate_law, fit_surface

CHINCHILLA = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}  # Besiroglu et al. 2024
SMALL = {"E": 1.6, "A": 30.0, "B": 120.0, "alpha": 0.35, "beta": 0.37}  # losses like those of runs of minutes


def families(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """N and D of isoFLOP families: half-decades from 1e11 to 3.2e13 FLOPs, five sizes each, 30 rows."""
    C = np.repeat(10.0 ** np.arange(11, 13.6, 0.5), 5)
    N = 4e4 * (C / 1e11) ** 0.5 * np.tile([0.35, 0.6, 1.0, 1.7, 2.9], 6) * np.exp(0.05 * rng.standard_normal(30))
    return N, C / 6 / N


def spread(rows: int) -> Callable:
    """N and D spread like the runs of Hoffmann et al. 2022: 40 million to 16 billion parameters, 6e18 to 3e21 FLOPs."""

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        N = np.exp(rng.uniform(np.log(4e7), np.log(1.6e10), rows))
        return N, np.exp(rng.uniform(np.log(6e18), np.log(3e21), rows)) / 6 / N

    return draw


@dataclass(frozen=True)
class Design:
    """A law, where its rows lie, and the (N, D) that is forecast: five times the most compute, at the law's best size."""

    law: dict[str, float]
    draw: Callable
    target: tuple[float, float]


DESIGNS = {
    "families": Design(SMALL, families, (1.0e6, 2.6e7)),
    "spread-20": Design(CHINCHILLA, spread(20), (1.09e10, 2.2e11)),
    "spread-60": Design(CHINCHILLA, spread(60), (1.09e10, 2.2e11)),
    "spread-240": Design(CHINCHILLA, spread(240), (1.09e10, 2.2e11)),
}


def coverage(
    design: str = "families",
    studies: int = 1000,
    noise: float = 0.004,
    tails: float | None = None,
    objective: str = "huber",
    bootstrap: int = 400,
    seed: int = 0,
) -> pd.DataFrame:
    """Simulate studies and count how often each 95 % interval holds the truth.

    noise: standard deviation of log loss; normal, or Student's t with ``tails`` degrees of freedom. Fits start at the
    truth, which finds the optimum that the grid finds and saves the search. Returns one row a quantity: ``counted``
    studies, ``exempt`` ones (the fit called the parameter weak or not identified), ``percent`` of the counted whose
    interval held the truth, its own 95 % interval ``low`` to ``high`` (Wilson), and the share of misses ``above``.
    """
    chosen = DESIGNS[design]
    law, rng = chosen.law, np.random.default_rng(seed)
    truth = {**law, "a": law["beta"] / (law["alpha"] + law["beta"])}
    truth["forecast"] = float(evaluate_law("surface", law, *chosen.target))
    seen: dict[str, list[int]] = {name: [] for name in (*truth, "new run")}
    exempt = dict.fromkeys(seen, 0)

    def errors(count: int) -> np.ndarray:
        if tails is None:
            return noise * rng.standard_normal(count)
        return noise * rng.standard_t(tails, count) / np.sqrt(tails / (tails - 2))

    for study in range(studies):
        N, D = chosen.draw(rng)
        L = evaluate_law("surface", law, N, D) * np.exp(errors(len(N)))
        start = [[law[name] for name in ("E", "A", "B", "alpha", "beta")]]
        fit = fit_surface(N, D, L, objective=objective, bootstrap=bootstrap, starts=start, seed=study)
        intervals = {**fit.intervals, "a": fit.a_interval}
        status = {**fit.status, "a": fit.a_status}
        for name, seed_sd in (("forecast", 0.0), ("new run", noise * truth["forecast"])):
            row = fit.predict(*chosen.target, seed_sd=seed_sd).iloc[0]
            intervals[name] = (row["low"], row["high"])
        now = {**truth, "new run": truth["forecast"] * np.exp(errors(1)[0])}
        for name, value in now.items():
            if status.get(name, "identified") != "identified":
                exempt[name] += 1
                continue
            low, high = intervals[name]
            seen[name].append(int(value > high) - int(value < low))
    rows = []
    for name, sides in seen.items():
        counted, held = len(sides), sides.count(0)
        ends = stats.binomtest(held, counted).proportion_ci(LEVEL, "wilson") if counted else (np.nan, np.nan)
        rows.append(
            {
                "quantity": name,
                "counted": counted,
                "exempt": exempt[name],
                "percent": 100 * held / counted if counted else np.nan,
                "low": 100 * ends[0],
                "high": 100 * ends[1],
                "above": 100 * sides.count(1) / counted if counted else np.nan,
            }
        )
    return pd.DataFrame(rows).set_index("quantity")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--design", type=click.Choice([*DESIGNS]), multiple=True, default=[*DESIGNS], show_default=True)
@click.option("--studies", default=1000, show_default=True)
@click.option("--noise", default=0.004, show_default=True, help="Standard deviation of log loss.")
@click.option("--tails", type=float, help="Student's t of so many degrees of freedom instead of normal noise.")
@click.option("--objective", type=click.Choice(["huber", "lsq", "lad"]), default="huber", show_default=True)
@click.option("--bootstrap", default=400, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(design: tuple[str, ...], **options) -> None:
    """Simulate studies and print how often 95 % intervals hold the truth, for each quantity."""
    for name in design:
        began = time.perf_counter()
        table = coverage(name, **options)
        click.echo(f"{name}: {options}, {time.perf_counter() - began:.0f} s")
        click.echo(table.to_string(float_format="{:.1f}".format) + "\n")


if __name__ == "__main__":
    main()
