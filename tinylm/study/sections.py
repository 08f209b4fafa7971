"""What the studies of data and of models share: a plan that knows what is recorded, the noise at several points, and laws
told with the doctor's verdicts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
from scipy import stats

from tinylm import files
from tinylm.study import plots
from tinylm.study.doctor import Diagnosis
from tinylm.study.forms import POWER, POWER_FLOOR, hoffmann_grid, minimise
from tinylm.study.report import interval, write_table
from tinylm.study.runs import RESULTS, Folder, Run, read_record
from tinylm.study.scaling import Fit, evaluate_law, fit_power
from tinylm.study.steps import Study
from tinylm.study.sweep import sweep


class NotRecorded(LookupError):
    """A run that was asked for has no record yet."""


class SectionStudy(Study):
    """A study whose later runs depend on what the earlier ones showed: a rate that is best, say."""

    def stages(self, train: Callable[..., pd.DataFrame]) -> list[pd.DataFrame]:
        """All runs of the study, through ``train`` (runs in, table out): one table a stage."""
        raise NotImplementedError

    def expected_runs(self) -> list[Run]:
        """All runs, those of later stages at the rates that are guessed before anything is known."""
        raise NotImplementedError

    def plan_sweep(self) -> None:
        """How many runs there are and what they cost, before anything is trained."""
        asked: list[Run] = []

        def recorded(runs: list[Run], **_: object) -> pd.DataFrame:
            folder = Folder(self.folder)
            for run in runs:
                task = folder.task(run)
                record = task and folder.record(task.run_id)
                if not record or record["status"] not in RESULTS:
                    raise NotRecorded
            asked.extend(runs)
            return sweep(runs, self.folder, progress=False)

        try:
            self.stages(recorded)
        except NotRecorded:
            asked = self.expected_runs()
        distinct = {files.canonical_json({**run.to_dict(), "tags": None}): run.flops for run in asked}
        sweep(asked, self.folder, workers=self.workers, dry_run=True)
        print(
            f"plan: {len(distinct)} runs, {sum(distinct.values()):.3g} FLOPs in all; a bracket of rates whose best lies at its "
            "edge is given another run, and a run that reads a text again may stop early"
        )

    def curves(self, run_ids: Iterable[str]) -> dict[str, pd.DataFrame]:
        """The evaluations of each run: step, tokens, train_loss, val_loss and more, a row each."""
        folder = Folder(self.folder)
        return {name: pd.DataFrame(read_record(folder.runs / f"{name}.json")["curve"]) for name in run_ids}

    def show_noise(self) -> None:
        """The spread between seeds at several places (column ``place`` of ``self.noise``), and pooled over them."""
        frame = self.noise[self.noise.val_loss.notna()]
        groups = frame.groupby("place", sort=False)
        table = groups.val_loss.agg(runs="size", mean="mean", sd="std").reset_index()
        self.freedom = int((table.runs - 1).sum())
        squares = float(((table.runs - 1) * table.sd**2).sum())
        self.seed_sd = math.sqrt(squares / self.freedom)
        low, high = (math.sqrt(squares / stats.chi2.ppf(q, self.freedom)) for q in (0.95, 0.05))
        pooled = {"place": "pooled", "runs": len(frame), "sd": self.seed_sd, "sd_low_90": low, "sd_high_90": high}
        ends = [
            [math.sqrt(f * sd**2 / stats.chi2.ppf(q, f)) for q in (0.95, 0.05)]
            for f, sd in zip(table.runs - 1, table.sd, strict=True)
        ]
        table[["sd_low_90", "sd_high_90"]] = ends
        self.report.section("How much luck there is")
        self.report.text(
            f"{len(table)} of the runs were trained with {_span(table.runs)} seeds each. Pooled over them, the standard "
            f"deviation of the loss between seeds is **{self.seed_sd:.4f} nats** (90 % interval {interval(low, high, '.4f')}, "
            f"{self.freedom} degrees of freedom). Two single runs must differ by {1.96 * 2**0.5 * self.seed_sd:.3f} nats before "
            "chance is unlikely."
        )
        self.report.table(
            pd.concat([table, pd.DataFrame([pooled])], ignore_index=True), "seeds",
            "The spread between seeds (standard deviation, nats per token) with 90 % intervals", place="", runs="d", mean=".3f",
            sd=".4f", sd_low_90=".4f", sd_high_90=".4f",
        )  # fmt: skip
        self.report.figure(
            "seeds", "Runs that differ in their seed alone", lambda ax: plots.spreads(frame, ax=ax),
            size=(7, 1.3 + 0.4 * len(table)),
        )  # fmt: skip
        self.findings.append(
            f"The seed alone moves the loss by {self.seed_sd:.3f} nats (standard deviation, {len(frame)} runs at {len(table)} "
            "places)."
        )

    def show_verdicts(
        self, name: str, caption: str, laws: dict[str, Diagnosis], shown: list[str] | None = None
    ) -> None:
        """Every parameter of some laws, with its 95 % interval and the doctor's verdict in words. shown: the laws that stand
        in the report, where not all do; tables/<name>_all.csv then has all of them."""
        rows = pd.concat([d.verdicts.reset_index().assign(law=law, points=d.fit.n) for law, d in laws.items()])
        if shown is not None:
            write_table(self.folder / "tables" / f"{name}_all.csv", rows)
            caption += f"; all laws are in [{name}_all.csv](tables/{name}_all.csv)"
            rows = rows[rows.law.isin(shown)]
        self.report.table(
            rows, name, caption, law="", points="d", parameter="", value=".4g", low=".4g", high=".4g", status="", why=""
        )

    def laws(self, x: pd.Series, loss: pd.Series, **options: object) -> dict[str, Fit]:
        """The power law of loss in x without a floor and, where the points allow it, with one."""
        options = {"bootstrap": self.preset.bootstrap, "seed": self.settings.seed, **options}
        kinds = {"no floor": False, "floor": True} if len(x) >= 4 else {"no floor": False}
        return {kind: fit_power(x, loss, floor=floor, **options) for kind, floor in kinds.items()}


def _span(counts: pd.Series) -> str:
    """Counts in words: 8, or 3 to 20."""
    return f"{counts.min()}" if counts.nunique() == 1 else f"{counts.min()} to {counts.max()}"


def aicc(fit: Fit) -> float:
    """Akaike's criterion for few rows (Hurvich and Tsai 1989) of a fit's log residuals, normal errors of unknown variance;
    infinite where there are too few rows to judge so many parameters."""
    n, k = fit.n, len(fit.params) + 1
    if n <= k + 1:
        return math.inf
    return n * math.log(max(float((fit.data["residual"] ** 2).mean()), 1e-30)) + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def preferred(laws: dict[str, Fit]) -> str:
    """The law that Akaike's criterion for few rows prefers; the first where no other can be judged."""
    return min(laws, key=lambda name: (aicc(laws[name]), list(laws).index(name)))


def refit(x: object, loss: object, weights: np.ndarray, floor: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The power law of loss (n,) in x (n,) by least squares on log loss, once for each row of weights (S, n), from all starts
    and all at once. Returns the losses it predicts (S, n) and the weighted sums of squares (S,)."""
    form = POWER_FLOOR if floor else POWER
    logs, y = np.log(np.asarray(x, float))[None], np.log(np.asarray(loss, float))
    centre = form.centre(logs)
    X = logs - centre[:, None]
    starts, _ = hoffmann_grid(form, centre, float(np.median(y)))
    thetas, values = minimise(
        form,
        np.tile(starts, (len(weights), 1)),
        X,
        y,
        np.repeat(weights, len(starts), axis=0),
        np.inf,
        steps=60,
        tolerance=1e-10,
    )
    values = values.reshape(len(weights), -1)
    best = thetas.reshape(len(weights), len(starts), -1)[np.arange(len(weights)), values.argmin(axis=1)]
    return np.exp(form.evaluate(best, X)[0]), 2 * values.min(axis=1)


def left_out_errors(x: object, loss: object, floor: bool = True) -> np.ndarray:
    """For each row the error (nats, observed less predicted) of a power law that was fitted to all others."""
    predicted, _ = refit(x, loss, 1.0 - np.eye(len(loss)), floor)
    return np.asarray(loss, float) - np.diag(predicted)


def doubling(fit: Fit) -> tuple[float, float, float]:
    """What twice the x does to the loss at the largest x seen, as a factor with its 95 % interval."""
    x = float(fit.data.x.max())
    factor = float(fit.predict(x).loss.iloc[0] / fit.predict(x / 2).loss.iloc[0])
    if not len(fit.samples):
        return factor, math.nan, math.nan
    draws = evaluate_law(fit.form, fit.samples, np.array([x / 2, x]))
    low, high = np.quantile(draws[:, 1] / draws[:, 0], [0.025, 0.975])
    return factor, float(low), float(high)


def size_words(frame: pd.DataFrame) -> list[str]:
    """The sizes of a table's rows in words: 64 x 2."""
    return [f"{width} x {layers}" for width, layers in zip(frame.hidden_size, frame.num_layers, strict=True)]
