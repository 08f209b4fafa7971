"""The compute scaling study, step by step: what studies/compute_scaling.ipynb narrates.

Half-decades of compute, five sizes at each. Up to ``tuned_up_to`` FLOPs every size is trained at three learning rates or
more; above, at the rate of a rule fitted below, and only the central size has a bracket, which says what the rule costs.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from tinylm import corpora, counts, files
from tinylm.config import TrainConfig
from tinylm.errors import LabError, TextError
from tinylm.study import doctor, planner, plots, quickstart, scaling
from tinylm.study.design import (
    LADDER,
    SIZE_GROWTH,
    Point,
    best_runs,
    bracket,
    expected_best_size,
    isoflop_family,
    isoflop_points,
    tune,
)
from tinylm.study.parameters import ComputeParameters
from tinylm.study.report import interval, write_table
from tinylm.study.runs import Run, read_kept
from tinylm.study.steps import have, known_text
from tinylm.study.sweep import sweep


@dataclass(frozen=True)
class Preset(quickstart.Preset):
    """A quickstart preset with more asked of it. tuned_up_to: FLOPs up to which every size has a bracket of learning rates;
    repeated: budgets with three seeds, besides the smallest; batches: budgets at which half and twice the batch is tried;
    promised: minutes of plans that are trained at once, to hold what they promised against what came."""

    beyond: float = 5.0
    tuned_up_to: float = 1e12
    repeated: tuple[float, ...] = ()
    batches: tuple[float, ...] = ()
    promised: tuple[float, ...] = ()


PRESETS = {
    "smoke": Preset(
        (5e8, 1e9, 2e9),
        sizes=3,
        moves=1,
        seeds=3,
        bootstrap=100,
        beyond=2.0,
        eval_tokens=8192,
        clock=0.1,
        tuned_up_to=1e9,
        repeated=(1e9,),
        batches=(5e8, 1e9),
        promised=(0.05,),
    ),
    "quick": Preset((1e11, 3.2e11, 1e12), tuned_up_to=3.2e11, repeated=(3.2e11,), batches=(1e11, 3.2e11)),
    "full": Preset(
        (1e11, 3.2e11, 1e12, 3.2e12, 1e13, 3.2e13),
        threads=2,
        repeated=(1e12, 3.2e12),
        batches=(1e11, 1e12, 3.2e12),
        promised=(1, 2, 4),
    ),
}


CURVE = "L(C) = E + A / C^alpha"


class Variant(NamedTuple):
    """A point at another batch than the recipe's, with the learning rates it begins with."""

    point: Point
    batch_size: int
    rates: list[float]


def begin(settings: ComputeParameters) -> ComputeScaling:
    """The study of a text. Raises TextError for one too small to be read but once."""
    known = known_text(settings)
    if (size := sum(known["bytes"].values())) < quickstart.SMALLEST_TEXT:
        raise TextError(
            f"A law of compute needs a text of {quickstart.SMALLEST_TEXT / 1e6:g} MB or more, or its runs read the same lines "
            "again and again",
            f"{size / 1e6:.2f} MB",
            "give more text, or study this one with `tinylm study`, which suits small texts too",
        )
    return ComputeScaling(settings, PRESETS[settings.preset], known)


class ComputeScaling(quickstart.ComputeStudy):
    """How loss falls with compute over two decades and more of it, and what of that survives the doctor."""

    title = "How loss falls with compute on {text}"

    def __init__(self, *args):
        super().__init__(*args)
        self.checks: list[str] = []  # findings about the measuring itself, which stand last

    # Training -------------------------------------------------------------------------------------------------------------

    def plan_sweep(self) -> None:
        """What is going to be trained and what it costs, before anything is."""
        parts = self._outline()
        rows = [
            {"part": name, "runs": len(runs), "flops": float(sum(run.flops for run in runs))}
            for name, runs in parts.items()
        ]
        rows.append({"part": "all", "runs": sum(r["runs"] for r in rows), "flops": sum(r["flops"] for r in rows)})
        self.report.section("The plan")
        self.report.text(
            "Each family spends one budget on models of several sizes. Up to "
            f"{self.preset.tuned_up_to:.2g} FLOPs every size is trained at three learning rates, a factor of two apart; above, at "
            "the rate of the rule that the smaller budgets give, with a bracket of three at the central size to check it. "
            "Families above are centred where the minima below them point. Brackets move, and families grow by a size, where "
            "the best lies at an edge: that comes on top."
        )
        self.report.table(
            pd.DataFrame(rows), "planned", "Runs and training FLOPs of each part, as planned before the first run", part="",
            runs=",d", flops=".3g",
        )  # fmt: skip
        if any((self.folder / "runs").glob("*.json")):
            print("some runs are recorded already: what is missing is trained as its step comes")
        else:
            sweep([run for runs in parts.values() for run in runs], self.folder, workers=self.workers, dry_run=True)

    def _outline(self) -> dict[str, list[Run]]:
        """The runs as far as they are known beforehand: sizes and rates above are guesses, their number and cost are not."""
        preset, vocab_size, parts = self.preset, self.settings.vocab_size, {}
        central = {}
        for budget in preset.budgets:
            points = isoflop_points(self.recipe, vocab_size, [budget], preset.sizes)
            central[budget] = self._central(points, expected_best_size(budget, vocab_size))
            rates = self.first_rates if budget <= preset.tuned_up_to else self._rates(central[budget], self._guess)
            parts[f"family of {budget:.2g} FLOPs"] = [run for p in points for run in self.runs_at(p, rates(p))]
        parts["seeds"] = [
            run
            for budget, count in self._seed_counts().items()
            for run in self.with_seeds(self.runs_at(central[budget], [self._guess(central[budget])])[0], count)[1:]
        ]
        parts["batches"] = [
            run
            for budget in preset.batches
            for variant in self._variants(central[budget], self._guess(central[budget]))
            for run in self._at_batch(variant, variant.rates)
        ]
        flops = preset.beyond * max(preset.budgets)
        points = isoflop_points(self.recipe, vocab_size, [flops], 1)
        parts["the forecast's run"] = self.runs_at(points[0], [self._guess(points[0])])
        return parts

    def _guess(self, point: Point) -> float:
        return self.recipe.learning_rate(self._params(point))

    def _params(self, point: Point) -> int:
        return counts.parameters(self.model(point.shape))["total"]

    def _central(self, points: list[Point], params: float) -> Point:
        return min(points, key=lambda point: abs(math.log(self._params(point) / params)))

    @staticmethod
    def _rates(central: Point, rate_of: Callable[[Point], float]) -> Callable[[Point], list[float]]:
        """First rates of a family above: one a size, three at the central one."""
        return lambda point: [rate_of(point) * f for f in ((0.5, 1, 2) if point.shape == central.shape else (1,))]

    def measure(self) -> None:
        """Train the families from the smallest budget up: the rates and the place of each follow from those below it."""
        low = [budget for budget in self.preset.budgets if budget <= self.preset.tuned_up_to]
        points = isoflop_points(self.recipe, self.settings.vocab_size, low, self.preset.sizes)
        self.points, self.frame = self.families(points, self.first_rates, self.train)
        self.frame["rule_rate"] = math.nan
        above = [budget for budget in self.preset.budgets if budget > self.preset.tuned_up_to]
        for budget in above:
            # The side runs fill the cores while the last, longest runs of the largest family leave one idle.
            self._measure_above(budget, self._side_runs() if budget == above[-1] else [])
        self.best = best_runs(self.frame)
        self.lr_rule = scaling.learning_rate_rule(self.bracketed())

    def _measure_above(self, budget: float, beside: list[Run]) -> None:
        """One family at the rates of the rule, centred where the two minima below point."""
        self.lr_rule = scaling.learning_rate_rule(self.bracketed())
        below = scaling.isoflop_minima(self.judge(self.frame)[1]).tail(2)
        centre = float(np.exp(np.log(below.params_opt * (budget / below.budget) ** SIZE_GROWTH).mean()))
        family = isoflop_family(self.recipe, self.settings.vocab_size, budget, centre, self.preset.sizes)

        def rule(point: Point) -> float:
            return self.rule_rate(point.shape, point.tokens)

        points, frame = self.families(
            family, self._rates(self._central(family, centre), rule),
            lambda runs: self.train([*runs, *beside]).iloc[: len(runs)],
        )  # fmt: skip
        rates = frame.point.map(lambda number: rule(points[number]))
        frame = frame.assign(point=frame.point + len(self.points), rule_rate=rates)
        self.points, self.frame = self.points + points, pd.concat([self.frame, frame], ignore_index=True)

    def bracketed(self) -> pd.DataFrame:
        """The runs of points that were trained at more than one rate."""
        return self.frame[self.frame.groupby("point").learning_rate.transform("nunique") > 1]

    @staticmethod
    def judge(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
        """One row a size, and the table that minima are read off. A size with a bracket stands at the vertex of its parabola.
        In a family above all stand at the rule's rate, less what that rate costs the central size (``rate_cost``, nats):
        only so are they judged alike."""
        sizes = [scaling.best_learning_rate(frame[frame.rule_rate.isna()]).assign(rate_cost=0.0)]
        for _, family in frame[frame.rule_rate.notna()].groupby("budget"):
            by_rule, cost = _at_rule(family), _rate_check(family)["rate_cost"]
            sizes.append(by_rule.assign(val_loss=by_rule.val_loss - cost, rate_cost=cost, edge=""))
        table = pd.concat(sizes).sort_values(["budget", "params_total"], ignore_index=True)
        return table, table.drop(columns="learning_rate")

    def tuned_best(self, budget: float) -> tuple[Point, float]:
        """Of a budget's sizes with a bracket, the one nearest to the minimum, and its best rate."""
        judged = self.judge(self.frame)[1]
        optimum = scaling.isoflop_minima(judged[judged.budget == budget]).params_opt.iloc[0]
        rows = best_runs(self.bracketed())
        rows = rows[rows.budget == budget]
        distance = (rows.params_total / optimum).map(math.log).abs()
        nearest = rows.loc[distance.idxmin()]
        return self.points[int(nearest.point)], float(nearest.learning_rate)

    def _seed_counts(self) -> dict[float, int]:
        return {min(self.preset.budgets): self.preset.seeds} | dict.fromkeys(self.preset.repeated, 3)

    def _seed_runs(self) -> list[Run]:
        return [
            run
            for budget, count in self._seed_counts().items()
            for point, rate in [self.tuned_best(budget)]
            for run in self.with_seeds(self.runs_at(point, [rate])[0], count)
        ]

    def _variants(self, point: Point, rate: float) -> list[Variant]:
        """Half and twice the batch of the recipe (in whole windows), with rates around the one that goes as its root."""
        usual = self.recipe.batch_size(point.tokens)
        batches = {max(1, round(usual / 2)), 2 * usual} - {usual}
        point = dataclasses.replace(point, family="batches")
        return [Variant(point, batch, bracket(rate * (batch / usual) ** 0.5)) for batch in sorted(batches)]

    def _at_batch(self, variant: Variant, rates: list[float]) -> list[Run]:
        return self.runs_at(variant.point, rates, batch_size=variant.batch_size)

    def _batch_variants(self) -> list[Variant]:
        return [
            variant for budget in self.preset.batches for variant in self._variants(*self.tuned_best(budget))
        ]  # fmt: skip

    def _side_runs(self) -> list[Run]:
        """Seeds and batches, as far as they are known before any bracket of theirs moves."""
        return self._seed_runs() + [run for v in self._batch_variants() for run in self._at_batch(v, v.rates)]

    # Learning rates -------------------------------------------------------------------------------------------------------

    def show_learning_rates(self) -> None:
        tuned = self.frame[self.frame.rule_rate.isna()]
        above = self.frame[self.frame.rule_rate.notna()]
        edges, points = int(tuned.groupby("point").edge.first().sum()), tuned.point.nunique()
        checks = pd.DataFrame([_rate_check(family) for _, family in above.groupby("budget")])
        self.report.section("Learning rates")
        self.report.text(
            f"Up to {self.preset.tuned_up_to:.2g} FLOPs each of {points} sizes was trained at three rates or more, and the "
            f"bracket moved outward while its best rate lay at an edge; {edges} of {points} still {have(edges)} theirs there. "
            f"With the brackets of the larger families: {self.lr_rule.sentence()}"
        )
        self._brackets(
            "learning_rates", tuned, "Loss against learning rate; a star is the vertex of its size's parabola"
        )
        self.report.text(
            "Above, each family was trained at the rate that the budgets below it foretold, and its central size at half and at "
            "twice that rate too. What the rule cost that size is taken off every loss of its family, so that budgets are "
            "judged alike."
        )
        self.report.table(
            checks, "rate_rule", "The rule against what the brackets of the larger families found at their central size, and the "
            "loss that the rule's rate cost there", budget=".2g", params_total=",d", tokens_seen=",.0f", rule_rate=".3g",
            best_rate=".3g", rate_cost=".4f",
        )  # fmt: skip
        central = self.bracketed()
        self._brackets(
            "learning_rates_above", central[central.rule_rate.notna()],
            "The brackets of the larger families' central sizes; the middle rate is the rule's",
        )  # fmt: skip
        worst = checks.rate_cost.max()
        self.checks.append(
            f"A rule of the best learning rate, fitted up to {self.preset.tuned_up_to:.2g} FLOPs and then from budget to budget, "
            f"cost {worst:.4f} nats at most at the central size of a larger family."
        )

    def _brackets(self, name: str, frame: pd.DataFrame, caption: str) -> None:
        count = frame.budget.nunique()
        self.report.figure(
            name, caption, lambda axes: plots.learning_rates(frame, axes), size=(1.6 + 3.6 * count, 3.6), panels=count
        )

    # Noise and batches ----------------------------------------------------------------------------------------------------

    def measure_noise(self) -> None:
        """Seeds at the best size of some budgets."""
        self.show_noise(self.train(self._seed_runs()))

    def show_noise(self, frame: pd.DataFrame) -> None:
        self.noise = frame
        ended = frame[frame.val_loss.notna()]
        rows = [_spread(budget, group) for budget, group in ended.groupby("budget")]
        table = pd.DataFrame(rows)
        freedom = int((table.runs - 1).sum())
        self.seed_sd = float(np.sqrt((table.sd**2 * (table.runs - 1)).sum() / freedom))
        first = table.iloc[0]
        self.report.section("How much luck there is")
        self.report.text(
            f"One run at the best size of a budget, with several seeds. At {first.budget:.2g} FLOPs the standard deviation of "
            f"{first.runs} seeds is **{first.sd:.4f} nats** (90 % interval {interval(first.sd_low_90, first.sd_high_90, '.4f')}); "
            f"pooled over all {len(table)} budgets it is {self.seed_sd:.4f}, from {freedom} degrees of freedom, and that is the "
            f"noise that the forecast reckons with. Two single runs must differ by {1.96 * 2**0.5 * self.seed_sd:.3f} nats before "
            "chance is unlikely."
        )
        self.report.table(
            table, "seeds", "Seeds: the standard deviation of the loss with its 90 % interval (nats per token). Three seeds tell "
            "little of a spread", budget=".2g", model="", tokens=",.0f", runs="d", mean=".3f", sd=".4f", sd_low_90=".4f",
            sd_high_90=".4f",
        )  # fmt: skip
        labelled = ended.assign(
            which=ended.budget.map("{:.2g} FLOPs".format),
            away=ended.val_loss - ended.groupby("budget").val_loss.transform("mean"),
        )
        self.report.figure(
            "seeds", "Runs that differ in their seed alone, about the mean of their budget",
            lambda ax: _draw_seeds(labelled, ax), size=(7, 1.4 + 0.5 * len(table)),
        )  # fmt: skip
        self.checks.append(
            f"The seed alone moves the loss by {first.sd:.4f} nats at {first.budget:.2g} FLOPs (standard deviation of {first.runs} "
            f"runs, 90 % interval {interval(first.sd_low_90, first.sd_high_90, '.4f')})."
        )

    def measure_batches(self) -> None:
        """Half and twice the batch at equal tokens, each at its own best rate."""
        variants = self._batch_variants()
        frame = tune(variants, self._at_batch, lambda variant: variant.rates, self.train, self.preset.moves)
        self.batches = frame
        found = scaling.best_learning_rate(frame, ("budget", "batch_size"))
        usual = self.sizes.set_index(["budget", "params_total"])
        half = 1.96 * 2**0.5 * self.seed_sd
        rows = []
        for row in found.itertuples():
            base = usual.loc[(row.budget, row.params_total)]
            rate = self._own_rate(row.budget, row.params_total)
            factor, difference = row.batch_size / base.batch_size, row.val_loss - base.val_loss
            low, high = difference - half, difference + half
            rows.append(
                {"budget": row.budget, "params_total": row.params_total, "usual": base.batch_size,
                 "batch_size": row.batch_size, "factor": factor, "steps": row.max_steps,
                 "rate_ratio": row.learning_rate / rate, "difference": difference, "low": low, "high": high,
                 "verdict": "worse" if low > 0 else "better" if high < 0 else "not told apart"}
            )  # fmt: skip
        table = pd.DataFrame(rows).sort_values(["factor", "budget"], ignore_index=True)
        table["variant"] = [f"{row.factor:.2g} x the batch, {row.budget:.2g} FLOPs" for row in table.itertuples()]
        self.report.section("The batch")
        told = []
        for words, group in (("smaller", table[table.factor < 1]), ("larger", table[table.factor > 1])):
            if len(group):
                mean, width = group.difference.mean(), half / len(group) ** 0.5
                told.append(
                    f"a {words} batch changes the loss by {mean:+.4f} nats ({interval(mean - width, mean + width, '+.4f')})"
                )
        said = " and ".join(told)
        self.report.text(
            "The recipe's batch grows with the square root of the tokens. At the best size of some budgets half and twice of it "
            "were tried at equal tokens, so with other numbers of steps, each at three rates or more around the one that goes as "
            f"the root of the batch. On average over the budgets {said}."
        )
        self.report.table(
            table, "batches", "Other batches against the recipe's, each at its best rate: windows a step, steps, the best rate "
            "over that of the recipe's batch, and the difference in loss (nats per token) with the 95 % interval that the seeds "
            "give", budget=".2g", params_total=",d", usual="d", batch_size="d", steps=",d", rate_ratio=".2f",
            difference="+.4f", low="+.4f", high="+.4f", verdict="",
        )  # fmt: skip
        self.report.figure(
            "batches", "What another batch changes at equal tokens, with 95 % intervals from the spread of the seeds",
            lambda ax: plots.contrasts(table, ax=ax), size=(7, 1.0 + 0.36 * len(table)),
        )  # fmt: skip
        self.checks.append(
            f"At equal tokens, and at its own best rate, {said}, on average over {table.budget.nunique()} budgets."
        )

    def _own_rate(self, budget: float, params: int) -> float:
        """The best learning rate of a size with a bracket."""
        runs = self.bracketed()
        return float(
            scaling.best_learning_rate(
                runs[(runs.budget == budget) & (runs.params_total == params)]
            ).learning_rate.iloc[0]
        )

    # The laws -------------------------------------------------------------------------------------------------------------

    def fit_laws(self) -> None:
        """N_opt, D_opt and L along the minima, the surface under all sizes, and the doctor's word on each of its parameters."""
        boot = {"bootstrap": self.preset.bootstrap, "seed": self.settings.seed}
        repeated = int((self.sizes.epochs > 1).sum())  # text read twice is worth less than new text: another law
        self.rows = self.sizes[self.sizes.epochs <= 1] if repeated else self.sizes
        self.largest = float(self.rows.flops.max())
        self.surface = scaling.fit_surface(self.rows.params_total, self.rows.tokens_seen, self.rows.val_loss, **boot)
        self.accounts = doctor.accounting(self.rows, params=_countings(self.rows), **boot)
        self.diagnosis = doctor.diagnose(self.surface, accounting=self.accounts, **boot)
        names = {"N_opt": "N_opt(C) = k C^a", "D_opt": "D_opt(C) = k C^a", "L_min": "L(C) = A / C^alpha"}
        tables = [
            fit.table().reset_index().assign(law=names[name], points=fit.n) for name, fit in self.iso_laws.items()
        ]
        if self._curve is not None:
            tables.append(self._curve.table().reset_index().assign(law=CURVE, points=self._curve.n))
        verdicts = self.diagnosis.verdicts.reset_index()
        tables.append(verdicts.drop(columns="why").assign(law="L(N, D)", points=self.surface.n))
        table = pd.concat(tables)[["law", "parameter", "value", "low", "high", "status", "points"]]
        self.report.section("The laws")
        self.report.text(
            "Two readings of the same runs. The minima of the families, as straight lines in log-log against compute; and one "
            "surface L = E + A / N^alpha + B / D^beta under all sizes, which has a floor and gives the best size by itself: it "
            "grows as C^a with a = beta / (alpha + beta). Every parameter comes with its 95 % interval and with a verdict, "
            "whether these runs could tell it."
            + (f" {repeated} sizes that read the text more than once are left out of the surface." if repeated else "")
        )
        self.report.table(
            table, "laws", "Fitted parameters with 95 % intervals (L in nats per token; N parameters, embeddings included; "
            "D tokens; C FLOPs). What is not identified cannot be told from these runs", law="", parameter="", value=".4g",
            low=".4g", high=".4g", status="", points="d",
        )  # fmt: skip
        if self.iso_laws:
            laws = [
                (self.iso_laws["N_opt"], "params_opt"),
                (self.iso_laws["D_opt"], "tokens_opt"),
                (self.frontier, "loss_min"),
            ]
            self.report.figure(
                "laws", "The best size, its tokens and its loss against compute, with 95 % bands; dashed beyond the families",
                lambda axes: [_draw_law(self.minima, *law, ax) for law, ax in zip(laws, axes, strict=True)],
                size=(12.6, 3.8), panels=3,
            )  # fmt: skip
        self._find_exponents()

    @functools.cached_property
    def _curve(self) -> scaling.Fit | None:
        """L(C) with a floor of its own, where there are minima enough to check one."""
        return _curve(self.minima, self.preset.bootstrap, self.settings.seed)

    @property
    def frontier(self) -> scaling.Fit | None:
        """The curve with a floor where the minima show one, else the line without."""
        return _shown(self._curve) or self.iso_laws.get("L_min")

    def readings(self) -> str:
        if _shown(self._curve) is None:
            return super().readings()
        return (
            "the surface and the curve L(C) through the minima with a floor of its own, whose intervals it spans; a line "
            "without a floor is not asked, since the minima bend away from it"
        )

    def _find_exponents(self) -> None:
        """The findings that people quote, each with its interval and its verdict."""
        low, high = self.surface.a_interval
        verdict = self.diagnosis.verdicts.status["a"]
        said = f"by the surface with the exponent {self.surface.a:.2f} ({interval(low, high, '.2f')}; {verdict})"
        if "N_opt" in self.iso_laws:
            law, tokens = self.iso_laws["N_opt"], self.iso_laws["D_opt"]
            said = (
                f"by the minima of the families with the exponent {law.a:.2f} ({interval(*law.a_interval, '.2f')}; "
                f"{law.status['a']}), its tokens with {tokens.a:.2f} ({interval(*tokens.a_interval, '.2f')}; "
                f"{tokens.status['a']}); {said}"
            )
            self._find_gain()
        self.findings.append(f"The best size grows with compute {said}.")
        floor = self.diagnosis.verdicts.loc["E"]
        self.findings.append(
            f"The floor of the surface is {floor.value:.3g} nats per token ({interval(floor.low, floor.high, '.3g')}): "
            f"{floor.status}."
        )

    def _find_gain(self) -> None:
        """What compute brings, by the law that the minima follow."""
        law, top = self.frontier, self.preset.budgets[-1]
        span, status = interval(*law.intervals["alpha"], ".3f"), law.status["alpha"]
        if "E" not in law.params:
            gain, ends = 2 ** -law.params["alpha"], [2**-v for v in law.intervals["alpha"][::-1]]
            self.findings.append(
                f"Each doubling of compute, well spent, multiplies the loss by {gain:.4f} ({interval(*ends, '.4f')}; {status}), "
                f"over {self.preset.budgets[0]:.2g} to {top:.2g} FLOPs."
            )
            return
        now, then = law.predict([top, 2 * top]).loss
        self.findings.append(
            f"Well spent, compute lowers the loss as E + A / C^alpha with the exponent {law.params['alpha']:.3f} ({span}; "
            f"{status}) and a floor E of {law.params['E']:.3g} nats per token ({interval(*law.intervals['E'], '.3g')}; "
            f"{law.status['E']}): "
            f"beyond {top:.2g} FLOPs another doubling takes off {now - then:.4f} nats, {100 * (1 - then / now):.2f} %."
        )

    def consult_doctor(self) -> None:
        """The doctor's whole report on the surface."""
        found, fit = self.diagnosis, self.surface
        self.report.section("What survives a second look")
        self.report.table(
            found.verdicts.reset_index(), "verdicts", "The doctor's verdict on each parameter of the surface, and why",
            parameter="", value=".4g", low=".4g", high=".4g", status="", why="",
        )  # fmt: skip
        self.report.text("\n".join(f"- {note}" for note in found.notes))
        curves = found.profiles[found.profiles.parameter.isin(["E", "alpha", "beta", "a"])]
        self.report.figure(
            "profiles", "Profiles: how much worse the fit gets when one parameter is held and all others are fitted again. Below "
            "the dashed line a value is within the 95 % region",
            lambda axes: plots.profiles(curves, axes), size=(10.4, 2.9), panels=4,
        )  # fmt: skip
        if len(fit.samples):
            self.report.figure(
                "clouds", "Resamples of the fit: parameters that trade against one another lie on a line",
                lambda axes: plots.clouds(fit, axes), size=(11, 3.3), panels=3,
            )  # fmt: skip
        self.report.figure(
            "residuals", "What the surface leaves over, by size and by tokens",
            lambda axes: plots.residuals(fit, axes, seed_sd=self.seed_sd), size=(8.4, 3.4), panels=2,
        )  # fmt: skip
        if len(found.left_out):
            groups = found.left_out.left_out.nunique()
            self.report.figure(
                "left_out", "Each size, and the largest runs, as the other runs foretell them: a dot a run, a bar their mean",
                lambda ax: plots.leave_out(found.left_out, ax=ax), size=(7.4, 1.2 + 0.34 * groups),
            )  # fmt: skip
        self._count_otherwise()

    def _count_otherwise(self) -> None:
        """The exponent of the best size under each way of counting parameters and compute."""
        judged = self.sizes.drop(columns="learning_rate")
        rows = self.accounts.assign(reading="surface").to_dict("records")
        for name, values in _countings(judged).items():
            rows += _lines_counted(judged.assign(counted=values), name, self.preset.bootstrap, self.settings.seed)
        table = pd.DataFrame(rows)
        table["way"] = table.reading + ": " + table.params + ", " + table.flops
        self.report.text(
            "Others count parameters without embeddings, or compute as 6 N D. The same runs, read in each of these ways: "
            + "; ".join(doctor.survives(self.accounts).values()) + "."
        )  # fmt: skip
        self.report.table(
            table, "accounting", "The exponent a of the best size in compute, N_opt = k C^a, by reading, by which parameters count "
            "and by how compute is counted, with 95 % intervals", reading="", params="", flops="", a=".3f", a_low=".3f",
            a_high=".3f", a_status="",
        )  # fmt: skip
        self.report.figure(
            "accounting", "The exponent of the best size, by how one counts, with 95 % intervals (hollow: not identified)",
            lambda ax: _draw_exponents(table, ax), size=(7.4, 1.0 + 0.32 * len(table)),
        )  # fmt: skip
        told = table[table.a_status != "not identified"]
        if len(told):
            low, high = told.a_low.max(), told.a_high.min()
            self.findings.append(
                f"By how parameters and compute are counted that exponent reads {told.a.min():.2f} to {told.a.max():.2f} over "
                f"{len(told)} readings that tell it; "
                + (
                    f"all their intervals hold {low:.2f} to {high:.2f}."
                    if low <= high
                    else "their intervals do not agree."
                )
            )

    def look_back(self) -> None:
        """What the laws of the smaller budgets alone would have said of the larger ones."""
        rows, budgets = [], self.minima.budget.tolist()
        for known in range(2, len(budgets)):
            if self.minima.inside[:known].sum() >= 2:
                rows += self._foretold(budgets[known - 1], self.minima[known:])
        self.report.section("Had it stopped earlier")
        if not rows:
            self.report.text("Too few budgets have a minimum inside their sizes for that.")
            return
        table = pd.DataFrame(rows)
        near = table[table.reach == table.groupby("fitted_to").reach.transform("min")]
        far = table.loc[table.reach.idxmax()]
        self.report.text(
            "The same forecast as the sealed one below, made from the smaller budgets alone, for the minima that were measured "
            "later. It is the mean of two readings: the surface, and L(C) along the minima, as a curve with a floor where five "
            "minima or more show one and else as a line without; its interval spans both. "
            f"{int(table.inside.sum())} of {len(table)} minima came out inside; one budget ahead the errors were "
            f"{near.error_percent.min():+.2f} % to {near.error_percent.max():+.2f} %, at the farthest ({far.reach:.0f} times) "
            f"{far.error_percent:+.2f} %. These are not sealed: they were made with all runs at hand, by the rule that was fixed "
            "before."
        )
        self.report.table(
            table, "looking_back", "Forecasts from the budgets up to one, for a later one's best size: loss (nats per token) with "
            "its 95 % interval, what came out, and by how many percent that was above each reading and above their mean",
            fitted_to=".2g", foretold=".2g", loss=".3f", low=".3f", high=".3f", observed=".3f", surface_error_percent="+.2f",
            curve_error_percent="+.2f", line_error_percent="+.2f", error_percent="+.2f",
        )  # fmt: skip
        self.report.figure(
            "looking_back", "Error of forecasts from the smaller budgets alone, against how far they reach",
            lambda ax: _draw_looking_back(table, ax), size=(7, 3.8),
        )  # fmt: skip

    def _foretold(self, last: float, later: pd.DataFrame) -> list[dict]:
        """What the budgets up to ``last`` say of later minima, as the planner reads them, and what came out."""
        boot = {"bootstrap": min(200, self.preset.bootstrap), "seed": self.settings.seed}
        known, judged = self.rows[self.rows.budget <= last], self.sizes[self.sizes.budget <= last]
        surface = scaling.fit_surface(known.params_total, known.tokens_seen, known.val_loss, **boot)
        iso = scaling.isoflop_laws(judged.drop(columns="learning_rate"), **boot)
        line = iso.laws["L_min"]
        frontier = _shown(_curve(iso.minima, **boot)) or line
        rows = []
        for row in later.itertuples():
            place = (row.params_opt, row.tokens_opt)
            said = planner.expected_loss(surface, frontier, *place, row.budget, self.seed_sd)
            readings = (surface.predict(*place), frontier.predict(row.budget), line.predict(row.budget))
            by_surface, by_curve, by_line = (float(reading.loss.iloc[0]) for reading in readings)
            rows.append(
                {"fitted_to": last, "foretold": row.budget, "reach": row.budget / last, **said, "observed": row.loss_min,
                 "surface_error_percent": 100 * (row.loss_min / by_surface - 1),
                 "curve_error_percent": 100 * (row.loss_min / by_curve - 1) if frontier is not line else math.nan,
                 "line_error_percent": 100 * (row.loss_min / by_line - 1),
                 "error_percent": 100 * (row.loss_min / said["loss"] - 1),
                 "inside": said["low"] <= row.loss_min <= said["high"]}
            )  # fmt: skip
        return rows

    def check_floor(self) -> None:
        """The fitted floor against the exact entropy, where the text is the generated one."""
        self.report.section("The floor, where it is known")
        if self.data.text != "zipf-markov":
            self.report.text(
                "The entropy of a natural text is not known, so nothing here can say whether the fitted floor is its. On "
                "`zipf-markov`, a generated language whose entropy is known exactly, the same study holds the one against the "
                "other (`-p text zipf-markov`)."
            )
            return
        record = self.frame[self.frame.val_loss.notna()].iloc[0]
        per_token = record.val_loss / (record.val_bpb * math.log(2))  # symbols of one byte each
        truth = corpora.zipf_markov_entropy() * per_token
        floor = self.diagnosis.verdicts.loc["E"]
        held = floor.low <= truth <= floor.high
        table = pd.DataFrame(
            [{"truth": truth, "E": floor.value, "low": floor.low, "high": floor.high, "status": floor.status,
              "error_percent": 100 * (floor.value / truth - 1), "inside": held}]
        )  # fmt: skip
        span, off = interval(floor.low, floor.high, ".4f"), f"{100 * (floor.value / truth - 1):+.2f} % off"
        self.report.text(
            f"The text's entropy is {corpora.zipf_markov_entropy():.4f} nats a symbol exactly, so no model can expect to lose "
            f"less than **{truth:.4f} nats per token** of {per_token:.2f} symbols. The surface's floor is "
            f"**{floor.value:.4f} ({span})**: {off}, the truth {'inside' if held else 'outside'} its interval; the doctor calls "
            f"it {floor.status}."
        )
        write_table(self.folder / "tables" / "floor.csv", table)
        self.findings.append(
            f"The exact entropy of the text is {truth:.4f} nats per token; the fitted floor is {floor.value:.4f} "
            f"({span}; {floor.status}), {off}."
        )

    def keep_promises(self) -> None:
        """Plans of a few minutes, trained at once: what the planner promised against what came."""
        self.kept: list[pd.DataFrame] = []
        if not self.preset.promised:
            return
        path = self.folder / "tables" / "promised.json"
        if not path.exists():  # written before the runs, so that a later start holds the same promises against them
            said, unkept = self._promise()
            if not said:
                self.report.section("Promises")
                self.report.text(f"No plan of a few minutes could be made on this machine as busy as it was. {unkept}")
                return
            files.write_whole(path, json.dumps(said, indent=1) + "\n")
        way_out = "put it back from a copy, or give another results_dir: promises made anew would come after their runs"
        rows = []
        for said in read_kept(path, _promises, way_out):
            shape = next(s for s in LADDER if s[:2] == (said["hidden_size"], said["num_layers"]))
            point = Point(shape, said["tokens"], "promised")
            rate = self.rule_rate(shape, point.tokens)
            run = self.runs_at(point, [rate], threads=said["threads"], eval_tokens=TrainConfig.eval_tokens)
            self.kept.append(self.train(run))  # one at a time
            row = self.kept[-1].iloc[0]
            rows.append(
                {"minutes": said["minutes"], "model": f"{shape[0]} x {shape[1]}", "tokens": point.tokens,
                 "promised": said["seconds"], "took": row.seconds, "time_off": 100 * (row.seconds / said["seconds"] - 1),
                 "loss": said["loss"], "low": said["low"], "high": said["high"], "got": row.val_loss,
                 "loss_off": 100 * (row.val_loss / said["loss"] - 1), "kept": said["low"] <= row.val_loss <= said["high"]}
            )  # fmt: skip
        table = pd.DataFrame(rows)
        told = (
            f"{len(table)} plans of {' and '.join(f'{minutes:g}' for minutes in table.minutes)} minutes took "
            f"{table.time_off.min():+.0f} % to {table.time_off.max():+.0f} % more time than they promised, and came "
            f"{table.loss_off.min():+.2f} % to {table.loss_off.max():+.2f} % above the loss that they promised, "
            f"{int(table.kept.sum())} of {len(table)} inside their intervals"
        )
        self.report.section("Promises")
        self.report.text(
            f"Plans of a few minutes with all cores of this machine, trained as soon as they were made: {told}. Their runs fitted "
            "nothing."
        )
        self.report.table(
            table, "promises", "Seconds and loss (nats per token, with the 95 % interval for one run) as planned, and as they "
            "came; by how many percent they were above; whether the loss kept its interval", minutes="g", model="", tokens=",d",
            promised=".0f", took=".0f", time_off="+.1f", loss=".3f", low=".3f", high=".3f", got=".3f", loss_off="+.2f", kept="",
        )  # fmt: skip
        self.checks.append(f"{told}.")

    def _promise(self) -> tuple[list[dict], str]:
        """Plans of the preset's minutes at the speed that this machine has now, and why the last one failed that buys no step
        (a machine may be slow, or busy)."""
        speed = self.speed_for(self.preset.promised)
        said, reason = [], ""
        for minutes in self.preset.promised:
            try:
                plan = self.evidence.plan(self.recipe, seconds=60 * minutes, speed=speed)
            except LabError as error:
                reason = str(error)
                print(f"no plan of {minutes:g} minutes: {reason}", flush=True)
                continue
            shape = {name: getattr(plan, name) for name in ("hidden_size", "num_layers", "tokens", "seconds")}
            losses = {name: float(getattr(plan, name)) for name in ("loss", "low", "high")}
            said.append({"minutes": minutes, "threads": speed.threads} | shape | losses)
        return said, reason

    def end(self) -> None:
        self.findings += self.checks
        self.finish([self.frame, self.noise, self.batches, self.final, *self.kept])


def _promises(kept: list) -> list[dict]:
    """The plans that ``keep_promises`` wrote: all numbers (else TypeError), and of shapes that plans have (else ValueError)."""
    names = ("minutes", "threads", "hidden_size", "num_layers", "tokens", "seconds", "loss", "low", "high")
    found = [{name: said[name] + 0 for name in names} for said in kept]
    shapes = {(said["hidden_size"], said["num_layers"]) for said in found}
    if not shapes or not shapes <= {shape[:2] for shape in LADDER}:
        raise ValueError("no plans of the ladder's shapes")
    return found


def _at_rule(family: pd.DataFrame) -> pd.DataFrame:
    """The runs of a family above that were trained at the rule's own rate."""
    same = np.isclose(family.learning_rate, family.rule_rate, rtol=1e-9)
    return family[same & family.val_loss.notna()]


def _rate_check(family: pd.DataFrame) -> dict:
    """What the rule's rate costs the central size of a family above, against the vertex of its bracket."""
    central = family[family.groupby("point").learning_rate.transform("nunique") > 1]
    best, by_rule = scaling.best_learning_rate(central).iloc[0], _at_rule(central)
    cost = max(0.0, float(by_rule.val_loss.iloc[0] - best.val_loss)) if len(by_rule) else 0.0
    return {
        "budget": float(best.budget), "params_total": int(best.params_total), "tokens_seen": float(best.tokens_seen),
        "rule_rate": float(central.rule_rate.iloc[0]), "best_rate": float(best.learning_rate), "edge": best.edge,
        "rate_cost": cost,
    }  # fmt: skip


def _spread(budget: float, runs: pd.DataFrame) -> dict:
    """Mean and standard deviation of runs that differ in their seed, with the deviation's 90 % interval."""
    n, sd = len(runs), runs.val_loss.std()
    low, high = (sd * math.sqrt((n - 1) / stats.chi2.ppf(q, n - 1)) if n > 1 else math.nan for q in (0.95, 0.05))
    return {
        "budget": budget, "model": f"{runs.hidden_size.iloc[0]} x {runs.num_layers.iloc[0]}", "tokens": runs.tokens_seen.iloc[0],
        "runs": n, "mean": runs.val_loss.mean(), "sd": sd, "sd_low_90": low, "sd_high_90": high,
    }  # fmt: skip


def _draw_seeds(frame: pd.DataFrame, ax: object) -> None:
    plots.seeds(frame, ax=ax, loss="away", by="which")
    for words, (_, group) in zip(ax.texts, frame.groupby("which", sort=False), strict=True):
        words.set_text(f"sd {group.away.std():.4f}")
    ax.set_xlabel("validation loss about the mean (nats/token)")


def _countings(frame: pd.DataFrame) -> dict[str, pd.Series]:
    """The doctor's ways of counting parameters, without those that come to the same: with tied embeddings, the head counted
    and the embeddings not is the total."""
    found: dict[str, pd.Series] = {}
    for name, values in doctor.conventions(frame).items():
        if not any((values == other).all() for other in found.values()):
            found[name] = values
    return found


def _lines_counted(judged: pd.DataFrame, name: str, bootstrap: int, seed: int) -> list[dict]:
    """The exponent of N_opt along the isoFLOP minima with parameters as in the column ``counted``, against exact FLOPs and
    against 6 N D of the minima; nothing where too few minima lie inside."""
    try:
        laws = scaling.isoflop_laws(judged, params="counted", bootstrap=bootstrap, seed=seed).laws
    except LabError:
        return []
    size, length = laws["N_opt"], laws["D_opt"]
    rows = []
    for flops in ("exact", "6ND"):
        a, low, high = size.a, *size.a_interval
        if flops == "6ND":  # N goes as C^a and D as C^d, so 6ND as C^(a + d)
            a /= size.a + length.a
            if len(size.samples):
                low, high = np.quantile(size.samples.a / (size.samples.a + length.samples.a), [0.025, 0.975])
        status = scaling.identification("a", a, (low, high), size.n - 2)
        rows.append(
            {
                "reading": "minima",
                "params": name,
                "flops": flops,
                "a": a,
                "a_low": low,
                "a_high": high,
                "a_status": status,
            }
        )
    return rows


def _curve(minima: pd.DataFrame, bootstrap: int, seed: int) -> scaling.Fit | None:
    """L(C) = E + A / C^alpha through the minima inside their families, where there are five or more of them."""
    inside = minima[minima.inside]
    if len(inside) < 5:
        return None
    return scaling.fit_power(inside.budget, inside.loss_min, floor=True, bootstrap=bootstrap, seed=seed)


def _shown(curve: scaling.Fit | None) -> scaling.Fit | None:
    """The curve, where its floor could be told at all."""
    return curve if curve is not None and curve.status["E"] != "not identified" else None


def _draw_law(minima: pd.DataFrame, fit: scaling.Fit, what: str, ax: object) -> None:
    """A law along the minima; one with a floor is told by its own words."""
    if "E" not in fit.params:
        plots.frontier(minima, fit, what, ax)
        return
    low, high = fit.intervals["alpha"]
    words = rf"$L = {fit.params['E']:.2f} + A/C^{{{fit.params['alpha']:.2f}}}$  [{low:.2f}, {high:.2f}]"
    plots.law(fit, ax=ax, x=plots.FLOPS, label=words, colour=plots.COLOURS[1])


def _draw_exponents(table: pd.DataFrame, ax: object) -> None:
    """An exponent a line, with its interval."""
    colours = {"minima": plots.COLOURS[0], "surface": plots.COLOURS[1]}
    for i, row in enumerate(table.itertuples()):
        colour = colours[row.reading]
        ax.plot([row.a_low, row.a_high], [i, i], color=colour, linewidth=2.5, solid_capstyle="butt")
        ax.plot(row.a, i, "o", color=colour, markerfacecolor="white" if row.a_status == "not identified" else colour)
    ax.set_yticks(range(len(table)), table.way)
    ax.set_ylim(len(table) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("exponent a of the best size, N_opt = k C^a (no unit)")


def _draw_looking_back(table: pd.DataFrame, ax: object) -> None:
    """Signed errors against reach, one colour a reading."""
    ways = {
        "surface_error_percent": "surface",
        "curve_error_percent": "curve L(C) with a floor",
        "line_error_percent": "line L(C) without a floor",
    }
    ways["error_percent"] = "the forecast"
    ax.axhline(0, color=plots.GREY, linewidth=1)
    for i, (column, label) in enumerate(ways.items()):
        if table[column].notna().any():
            ax.plot(
                table.reach * 1.05 ** (i - 1.5), table[column], plots.MARKERS[i], color=plots.COLOURS[i], label=label
            )
    ax.set_xscale("log")
    ticks = sorted({10 ** (round(2 * math.log10(reach)) / 2) for reach in table.reach})
    ax.set_xticks(ticks, [f"{tick:.2g}" if tick < 10 else f"{tick:.0f}" for tick in ticks])
    ax.minorticks_off()
    ax.set_xlabel("reach (compute foretold over the largest fitted)")
    ax.set_ylabel("observed above forecast (%)")
    ax.legend()
