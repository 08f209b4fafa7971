"""The quickstart study, step by step: what studies/quickstart.ipynb narrates.

``begin`` looks at the text and returns one of two studies with the same steps. ``ComputeStudy`` measures how loss falls with
parameters, data and compute; ``DataStudy`` serves a text too small for that, and measures how loss falls with the amount of
text when a model may read it more than once.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from tinylm import counts, files
from tinylm.config import TrainConfig
from tinylm.errors import TextError
from tinylm.study import forecasts, planner, plots, scaling
from tinylm.study.design import (
    LADDER,
    Point,
    best_runs,
    isoflop_points,
    rung_sizes,
    sizes_beyond,
    tune,
)
from tinylm.study.parameters import QuickstartParameters
from tinylm.study.report import interval
from tinylm.study.runs import Run, read_kept
from tinylm.study.steps import Study, command, have, known_text
from tinylm.study.sweep import sweep
from tinylm.words import duration, quantity

SMALLEST_TEXT = 2_000_000  # bytes; below it the runs of an isoFLOP family would repeat the text many times


@dataclass(frozen=True)
class Preset:
    """How much a preset measures. budgets: FLOPs of the isoFLOP families; sizes: rungs in each; moves: how often a bracket of
    learning rates, or a family's range of sizes, may move outward; seeds: runs that measure the noise; beyond: how many times
    the largest budget the sealed forecast reaches; threads: of the run behind it, which is trained alone; bootstrap: resamples
    of a fit; amounts: parts of a small text that are fitted, the whole being forecast; epochs: how often a small text may be
    read at most; eval_tokens: of each evaluation; clock: seconds for the speed of one size."""

    budgets: tuple[float, ...]
    sizes: int = 5
    moves: int = 3
    seeds: int = 8
    beyond: float = 4.0
    threads: int = 1
    bootstrap: int = 1000
    amounts: tuple[float, ...] = (1 / 32, 1 / 16, 1 / 8, 1 / 4)
    epochs: int = 8
    eval_tokens: int = TrainConfig.eval_tokens
    clock: float = 1.0


PRESETS = {
    "smoke": Preset(
        (5e8, 1e9, 2e9),
        sizes=3,
        moves=1,
        seeds=3,
        beyond=2.0,
        bootstrap=100,
        amounts=(1 / 16, 1 / 8, 1 / 4),
        epochs=2,
        eval_tokens=8192,
        clock=0.1,
    ),
    "quick": Preset((1e11, 1.8e11, 3.2e11)),
    "full": Preset((1e11, 2e11, 4e11, 8e11, 1.6e12, 3.2e12)),
}


LAW_AXES = {
    "L(N) at equal tokens": plots.PARAMS,
    "L(D) at equal size": plots.TOKENS,
    "L(C) at the best size": plots.FLOPS,
}


def begin(settings: QuickstartParameters) -> Study:
    """The study that suits the text. Prepares the text, unless all that is known of it stands in the results folder."""
    known = known_text(settings)
    kind = ComputeStudy if sum(known["bytes"].values()) >= SMALLEST_TEXT else DataStudy
    return kind(settings, PRESETS[settings.preset], known)


class ComputeStudy(Study):
    """How loss falls with parameters, data and compute: isoFLOP families, laws, a sealed forecast, a plan."""

    title = "What a small model learns from {text}"

    def plan_sweep(self) -> None:
        """The families and what they cost, before anything is trained."""
        self.points = isoflop_points(self.recipe, self.settings.vocab_size, self.preset.budgets, self.preset.sizes)
        runs = [run for point in self.points for run in self.runs_at(point, self.first_rates(point))]
        sweep(runs, self.folder, workers=self.workers, dry_run=True)

    def measure(self) -> None:
        """Train the families; move rates, and then sizes, outward where the best lies at an edge."""
        self.points, self.frame = self.families(self.points, self.first_rates, self.train)
        self.best = best_runs(self.frame)

    def families(self, points: list[Point], first_rates: Callable, train: Callable) -> tuple[list[Point], pd.DataFrame]:
        """The points of isoFLOP families, tuned, with those added that lie beyond an edge; and all their runs."""
        for _ in range(self.preset.moves + 1):
            frame = tune(points, self.runs_at, first_rates, train, self.preset.moves)
            beyond = sizes_beyond(best_runs(frame), points, self.recipe, self.settings.vocab_size)
            if not beyond:
                break
            points = points + beyond
        return points, frame

    def show_learning_rates(self) -> None:
        edges = int(self.frame.groupby("point").edge.first().sum())
        self.lr_rule = scaling.learning_rate_rule(self.frame)
        self.report.section("Learning rates")
        self.report.text(
            f"Each of {len(self.best)} points was trained at three rates or more, a factor of two apart, and the bracket moved "
            f"outward while its best rate lay at an edge; {edges} of {len(self.best)} still {have(edges)} theirs there. "
            f"{self.lr_rule.sentence()}"
        )
        self.report.figure(
            "learning_rates", "Loss against learning rate; a star is the vertex of its size's parabola, hollow at an edge",
            lambda axes: plots.learning_rates(self.frame, axes), size=(3.9 * len(self.preset.budgets), 3.6),
            panels=len(self.preset.budgets),
        )  # fmt: skip

    def show_families(self) -> None:
        self.sizes, judged = self.judge(self.frame)
        self.minima = scaling.isoflop_minima(judged)
        self.iso_laws: dict[str, scaling.Fit] = {}
        if self.minima.inside.sum() >= 2:
            iso = scaling.isoflop_laws(judged, bootstrap=self.preset.bootstrap, seed=self.settings.seed)
            self.minima, self.iso_laws = iso.minima, iso.laws
        minima = self.minima.reindex(columns=[*self.minima, *self._intervals(self.minima)])
        outside = int((~minima.inside).sum())
        self.report.section("The best size for a budget")
        self.report.text(
            "Each family spends the same compute on models of several sizes, each trained on the tokens that are left for it. "
            "The lowest point of its curve is the best size for that compute. "
            + (f"{outside} of {len(minima)} have no minimum inside their sizes, and the best size tried is only a bound."
               if outside else "All minima lie inside their families.")
        )  # fmt: skip
        self.report.figure(
            "isoflop", "Loss against parameters at equal compute", lambda ax: plots.isoflop(judged, minima, ax=ax)
        )
        self.report.table(
            minima.assign(tokens_per_parameter=minima.tokens_opt / minima.params_opt), "isoflop_minima",
            "The best size at each budget (FLOPs), with 95 % intervals from redrawing the runs' scatter",
            budget=".2g", params_opt=",.0f", params_low=",.0f", params_high=",.0f", tokens_opt=",.0f",
            tokens_per_parameter=".1f", loss_min=".3f", inside="",
        )  # fmt: skip
        last = minima.iloc[-1]
        self.findings.append(
            f"With {last.budget:.2g} FLOPs the best model here has about {quantity(last.params_opt)} parameters"
            + ("" if math.isnan(last.params_low) else f" ({quantity(last.params_low)} to {quantity(last.params_high)})")
            + f" and reads {quantity(last.tokens_opt)} tokens; it loses {last.loss_min:.3f} nats per token."
        )

    @staticmethod
    def judge(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
        """One row a size at its best learning rate, and the table that minima are read off."""
        return scaling.best_learning_rate(frame), frame

    @staticmethod
    def _intervals(minima: pd.DataFrame) -> list[str]:
        """Names of interval columns that a table of minima lacks (no law, no intervals)."""
        return [name for name in ("params_low", "params_high") if name not in minima]

    def measure_noise(self) -> None:
        """Seeds at the smallest budget, at the size nearest its minimum, at that size's best rate."""
        budget = min(self.preset.budgets)
        optimum = self.minima.set_index("budget").params_opt[budget]
        smallest = self.best[self.best.budget == budget]
        nearest = smallest.loc[(smallest.params_total / optimum).map(math.log).abs().idxmin()]
        run = self.runs_at(self.points[int(nearest.point)], [nearest.learning_rate])[0]
        runs = self.with_seeds(run)
        self.train([*runs, *self.section_runs()])  # in one sweep, so that no worker waits in between
        self.show_noise(self.train(runs, progress=False))

    def measure_sections(self) -> None:
        """Two straight cuts through the plane of sizes and tokens: L(N) and L(D)."""
        self.sections = self.train(self.section_runs(), progress=False)

    def section_runs(self) -> list[Run]:
        """The runs of both cuts, at the learning rates of the rule."""
        middle = sorted(self.preset.budgets)[len(self.preset.budgets) // 2]
        centre = self.best[self.best.budget == middle].sort_values("val_loss").iloc[0]
        own = self.points[int(centre.point)]
        shapes = [
            s for s in LADDER if self.flops_of(s, own.tokens) <= max(self.preset.budgets)
        ]  # none beyond the families
        last = min(LADDER.index(own.shape) + 2, len(shapes) - 1)
        points = [Point(shape, own.tokens, "sizes") for shape in shapes[max(0, last - 4) : last + 1]]
        points += [Point(own.shape, own.tokens * 2.0**power, "amounts") for power in (-1, -0.5, 0, 0.5, 1)]
        return [run for point in points for run in self.runs_at(point, [self.rule_rate(point.shape, point.tokens)])]

    def flops_of(self, shape: tuple[int, int, int], tokens: float) -> float:
        return tokens * counts.train_flops_per_token(self.model(shape), self.recipe.seq_len)

    def rule_rate(self, shape: tuple[int, int, int], tokens: float) -> float:
        """The measured rule's learning rate, to three digits."""
        params = counts.parameters(self.model(shape))["total"]
        return float(f"{self.lr_rule.predict(params, tokens):.3g}")

    def fit_laws(self) -> None:
        """Power laws in one variable, and the joint surface over all points."""
        boot = {"bootstrap": self.preset.bootstrap, "seed": self.settings.seed}
        sections = self.sections[self.sections.val_loss.notna()]
        sizes, amounts = (sections[sections.family == family] for family in ("sizes", "amounts"))
        laws = {
            "L(N) at equal tokens": scaling.fit_power(sizes.params_total, sizes.val_loss, **boot),
            "L(D) at equal size": scaling.fit_power(amounts.tokens_seen, amounts.val_loss, **boot),
        }
        names = {"L_min": "L(C) at the best size", "N_opt": "N_opt(C)", "D_opt": "D_opt(C)"}
        laws |= {names[name]: fit for name, fit in self.iso_laws.items()}
        columns = ["params_total", "tokens_seen", "epochs", "flops", "val_loss"]
        rows = pd.concat([self.sizes, sections.drop_duplicates("run_id")])[columns]
        repeated = int((rows.epochs > 1).sum())  # text read twice is worth less than new text: another law
        self.rows = rows[rows.epochs <= 1] if repeated else rows
        self.largest = float(self.rows.flops.max())
        self.surface = scaling.fit_surface(self.rows.params_total, self.rows.tokens_seen, self.rows.val_loss, **boot)
        laws["L(N, D)"] = self.surface
        table = pd.concat([fit.table().reset_index().assign(law=name, points=fit.n) for name, fit in laws.items()])
        self.report.section("The laws")
        middle = amounts.iloc[0]
        self.report.text(
            "Over the range measured here, straight lines in log-log, L = A x^-alpha: the text held at "
            f"{quantity(sizes.tokens_seen.median())} tokens while the model grows, the model held at {middle.hidden_size} x "
            f"{middle.num_layers} while the text grows, and the best size for each compute. Under them lies one surface: "
            f"{self.surface.sentence()}"
            + (f" {repeated} points that read the text more than once are left out of it." if repeated else "")
        )
        self.report.table(
            table, "laws", "Fitted parameters with 95 % intervals (L in nats per token; N parameters, embeddings included; "
            "D tokens; C FLOPs). What is not identified cannot be told from these runs", law="", parameter="", value=".4g",
            low=".4g", high=".4g", status="", points="d",
        )  # fmt: skip
        drawn = [(laws[name], label) for name, label in LAW_AXES.items() if name in laws]
        self.report.figure(
            "laws", f"Loss against {', '.join(label for _, label in drawn)}, with 95 % bands",
            lambda axes: [plots.law(fit, ax=ax, x=label) for (fit, label), ax in zip(drawn, axes, strict=True)],
            size=(4.0 * len(drawn), 3.6), panels=len(drawn),
        )  # fmt: skip
        gain_n, gain_d = laws["L(N) at equal tokens"], laws["L(D) at equal size"]
        self.findings.append(
            f"Doubling the parameters at equal tokens multiplies the loss by {2 ** -gain_n.params['alpha']:.3f} "
            f"({interval(*(2**-v for v in gain_n.intervals['alpha'][::-1]))}); doubling the tokens at equal size by "
            f"{2 ** -gain_d.params['alpha']:.3f} ({interval(*(2**-v for v in gain_d.intervals['alpha'][::-1]))})."
        )

    def forecast(self) -> None:
        """What the planner expects of a budget beyond all that was fitted."""
        largest = self.largest
        plan = self.evidence.plan(
            self.recipe, flops=1.02 * self.preset.beyond * largest
        )  # whole steps must not fall short of it
        shape = next(shape for shape in LADDER if shape[:2] == (plan.hidden_size, plan.num_layers))
        point, rate = Point(shape, plan.tokens, "forecast"), self.rule_rate(shape, plan.tokens)
        run = self.runs_at(point, [rate], threads=self.preset.threads)[0]
        self.seal_and_score(
            run, {**plan.target(self.task(run).run_id), "learning_rate": rate, "flops": run.flops},
            {"loss": plan.loss, "low": plan.low, "high": plan.high}, self.surface,
            f"a run of {run.flops / largest:.1f} times the compute of the largest run fitted, at the planner's own size and tokens "
            f"({plan.hidden_size} x {plan.num_layers}, {quantity(plan.params)} parameters, {quantity(plan.tokens)} tokens, "
            f"learning rate {rate:g})",
        )  # fmt: skip

    @functools.cached_property
    def evidence(self) -> planner.Evidence:
        return planner.Evidence(
            self.surface, self.lr_rule, rung_sizes(self.recipe, self.settings.vocab_size), self.seed_sd, self.largest,
            self.corpus["tokens"]["train"], self.frontier,
        )  # fmt: skip

    @property
    def frontier(self) -> scaling.Fit | None:
        """L(C) along the minima, the second reading of a forecast beside the surface."""
        return self.iso_laws.get("L_min")

    def readings(self) -> str:
        """What a forecast is read off, in words."""
        return (
            "the surface with its floor and the line L(C) without one, whose intervals it spans: over so small a range of "
            "compute nobody can tell the two apart"
        )

    def machine_speed(self) -> planner.Speed:
        """How fast this machine trains when idle, with all its cores; measured once for a results folder."""
        path = self.folder / "speed.json"
        if path.exists():
            return read_kept(path, planner.Speed.from_dict)
        speed = self.speed_for(self.settings.minutes)
        files.write_whole(path, json.dumps(dataclasses.asdict(speed)) + "\n")
        return speed

    def speed_for(self, minutes: tuple[float, ...]) -> planner.Speed:
        """How fast this machine trains now what plans of so many minutes choose."""
        # To compile what is timed would take minutes of a study of minutes: only the full preset does.
        plain = None if self.settings.preset == "full" else TrainConfig(precision="fp32", compile=False)
        seconds = [60 * each for each in minutes]
        return self.evidence.speed_for(self.recipe, seconds, os.cpu_count(), self.preset.clock, train=plain)

    def plan_next(self) -> None:
        """What to train next with the minutes that a person has, on this machine with all its cores."""
        speed = self.machine_speed()
        plans = [
            self.evidence.plan(self.recipe, seconds=60 * minutes, speed=speed) for minutes in self.settings.minutes
        ]
        rows = [
            {
                "minutes": minutes,
                "model": f"{plan.hidden_size} x {plan.num_layers}",
                **{
                    name: getattr(plan, name)
                    for name in ("params", "tokens", "steps", "batch_size", "learning_rate", "loss")
                },
                **{name: getattr(plan, name) for name in ("low", "high", "flops", "reach", "epochs")},
                "half_size_costs": plan.smaller_costs,
                "double_size_costs": plan.larger_costs,
                "evidence": "far beyond" if plan.far else "near",
            }
            for minutes, plan in zip(self.settings.minutes, plans, strict=True)
        ]
        self.report.section("What to train next")
        self.report.text(
            "The size and the tokens come from the surface, the expected loss from two readings of the same runs, "
            f"{self.readings()}. The speed is this machine's, measured when it was idle ({speed.threads} threads"
            + (")" if self.settings.preset == "full" else ", plain path: a run that is compiled ends earlier)")
            + ". "
            f"`reach` is the plan's compute over that of the largest run fitted; over {planner.FAR:.0f} it is marked as far beyond "
            "the evidence, and its interval knows nothing of what may change on the way."
        )
        self.report.table(
            pd.DataFrame(rows), "plan", "One run for each number of minutes: hidden_size x num_layers, tokens, steps, windows a "
            "step, learning rate, expected loss (nats per token) with its 95 % interval, and what half or twice the size would "
            "cost", minutes="g", model="", params=",.0f", tokens=",.0f", steps=",d", batch_size="d", learning_rate=".2g",
            loss=".3f", low=".3f", high=".3f", reach=".1f", evidence="", half_size_costs="+.3f", double_size_costs="+.3f",
        )  # fmt: skip
        for minutes, plan in zip(self.settings.minutes, plans, strict=True):
            point = Point(next(s for s in LADDER if s[:2] == (plan.hidden_size, plan.num_layers)), plan.tokens, "plan")
            rates, usual = [self.rule_rate(point.shape, point.tokens)], TrainConfig.eval_tokens
            run = self.runs_at(point, rates, threads=speed.threads, eval_tokens=usual)[0]
            self.report.text(f"**{minutes:g} minutes.** {plan.sentence()}\n\n```\n{command(run)}\n```")
        self.report.figure(
            "surface", "The surface L(N, D) with the runs behind it, the best size for each budget, and the first plan",
            lambda ax: plots.surface(self.surface, self.rows, planned=plans[0], ax=ax), size=(7, 5),
        )  # fmt: skip
        first, minutes = plans[0], self.settings.minutes[0]
        self.findings.append(
            f"Next, with {minutes:g} minutes on this machine: {first.hidden_size} x {first.num_layers} on "
            f"{quantity(first.tokens)} tokens at learning rate {first.learning_rate:.2g}, for an expected loss of "
            f"{first.loss:.3f} ({interval(first.low, first.high)}), with {first.reach:.0f} times the compute of the "
            "largest run fitted."
        )
        law = self.evidence.to_dict()
        files.write_whole(self.folder / "tables" / "law.json", json.dumps(law) + "\n")

    def end(self) -> None:
        self.finish([self.frame, self.sections, self.noise, self.final])


class DataStudy(Study):
    """How loss falls with the amount of text, where there is too little of it for a law of compute: nested parts of the text,
    each read several times with early stopping, and the whole text as the sealed forecast."""

    title = "What a small model learns from {text}: a study limited by data"
    shapes = ((32, 2, 4), (64, 2, 4))
    patience = 4  # evaluations, of twenty in a run

    def plan_sweep(self) -> None:
        tokens, least = self.corpus["tokens"]["train"], 16 * self.recipe.seq_len
        self.amounts = [tokens * part for part in self.preset.amounts if tokens * part >= least]
        if len(self.amounts) < 3:
            raise TextError(
                f"A study of the amount of text needs three parts of it of at least {least} tokens each",
                f"{tokens} training tokens, parts of {', '.join(f'{part:.3g}' for part in self.preset.amounts)}",
                f"give at least {least / sorted(self.preset.amounts)[-3]:,.0f} tokens of training text, or train one model "
                "on it with `tinylm train`",
            )
        self.report.section("Why this study")
        self.report.text(
            f"The text has {sum(self.corpus['bytes'].values()) / 1e6:.2f} MB, less than the {SMALLEST_TEXT / 1e6:g} MB from which "
            "a law of compute can be measured: models large enough to learn would read the same lines many times, and the law "
            "of fresh text would not hold. So this study asks what a small text can answer: how the loss falls with the amount "
            f"of it. Parts of the text, each inside the next, are read up to {self.preset.epochs} times, and training stops when "
            "the validation loss no longer falls."
        )
        self.points = [Point(shape, amount, "amounts") for shape in self.shapes for amount in self.amounts]
        runs = [run for point in self.points for run in self.runs_at(point, self.first_rates(point))]
        sweep(runs, self.folder, workers=self.workers, dry_run=True)

    def runs_at(self, point: Point, rates: list[float], seed: int | None = None) -> list[Run]:
        """point.tokens is the amount of text; the run reads it ``epochs`` times unless it stops early."""
        read = dataclasses.replace(point, tokens=point.tokens * self.preset.epochs)
        return super().runs_at(read, rates, seed, unique_tokens=round(point.tokens), patience=self.patience)

    def measure(self) -> None:
        self.frame = tune(self.points, self.runs_at, self.first_rates, self.train, self.preset.moves)
        self.best = best_runs(self.frame)

    def show_learning_rates(self) -> None:
        edges = int(self.frame.groupby("point").edge.first().sum())
        self.report.section("Learning rates")
        self.report.text(
            f"Each of {len(self.best)} points was trained at three rates or more, a factor of two apart, and the bracket moved "
            f"outward while its best rate lay at an edge; {edges} of {len(self.best)} still {have(edges)} theirs there."
        )

    def show_families(self) -> None:
        self.lowest = self.best.loc[self.best.groupby("unique_tokens").val_loss.idxmin()].sort_values("unique_tokens")
        self.report.section("Loss against the amount of text")
        self.report.table(
            self.lowest, "amounts",
            "The best model of each amount: the epochs it was trained for, and the best validation loss on the way",
            unique_tokens=",d", hidden_size="d", num_layers="d", learning_rate=".3g", epochs=".1f",
            val_loss=".3f", status="",
        )  # fmt: skip
        self.report.figure(
            "data_limited", "Validation and training loss against distinct training tokens",
            lambda ax: plots.data_limited(self.best, ax=ax),
        )  # fmt: skip

    def measure_noise(self) -> None:
        """Seeds at the smallest amount, with its best size and rate."""
        nearest = self.lowest.iloc[0]
        run = self.runs_at(self.points[int(nearest.point)], [nearest.learning_rate])[0]
        self.show_noise(self.train(self.with_seeds(run)))

    def measure_sections(self) -> None:
        """Nothing more: the amounts are the section."""

    def fit_laws(self) -> None:
        self.law = scaling.fit_power(
            self.lowest.unique_tokens, self.lowest.val_loss, bootstrap=self.preset.bootstrap, seed=self.settings.seed
        )
        self.report.section("The law")
        self.report.text(f"With x the distinct training tokens: {self.law.sentence()}")
        self.report.table(
            self.law.table().reset_index().assign(law="L(D) with early stopping", points=self.law.n), "laws",
            "Fitted parameters with 95 % intervals", law="", parameter="", value=".4g", low=".4g", high=".4g", status="",
            points="d",
        )  # fmt: skip
        self.report.figure(
            "laws", "Loss against distinct training tokens, with the 95 % band",
            lambda ax: plots.law(self.law, ax=ax, x="distinct training tokens D"),
        )  # fmt: skip
        alpha, span = self.law.params["alpha"], self.law.intervals["alpha"]
        self.findings.append(
            f"Twice the text multiplies the loss by {2**-alpha:.3f} ({interval(*(2**-v for v in span[::-1]))}), each amount read "
            f"up to {self.preset.epochs} times."
        )

    def forecast(self) -> None:
        """The whole text, from the law of its parts."""
        largest = self.lowest.iloc[-1]
        whole = self.corpus["tokens"]["train"] - self.recipe.seq_len  # the last window may be cut off
        shape = next(s for s in self.shapes if s[:2] == (largest.hidden_size, largest.num_layers))
        point = Point(shape, whole, "forecast")
        run = self.runs_at(point, [largest.learning_rate])[0]
        prediction = forecasts.predict(self.law, whole, seed_sd=self.seed_sd)
        target = {
            "params_total": counts.parameters(self.model(shape))["total"], "tokens": whole, "unique_tokens": whole,
            "learning_rate": run.train.learning_rate, "run_id": self.task(run).run_id,
        }  # fmt: skip
        self.seal_and_score(
            run, target, prediction, self.law,
            f"the whole text, {whole / largest.unique_tokens:.1f} times the largest part fitted ({shape[0]} x {shape[1]}, "
            f"{quantity(whole)} distinct tokens, learning rate {run.train.learning_rate:.3g})",
        )  # fmt: skip

    def plan_next(self) -> None:
        final = self.final.iloc[0]
        whole = float(final.unique_tokens)
        more = self.law.predict([whole, 2 * whole, 4 * whole], seed_sd=self.seed_sd).assign(
            text=["all of it", "twice as much", "four times as much"], tokens=[whole, 2 * whole, 4 * whole]
        )
        at_largest = self.best[self.best.unique_tokens == self.lowest.unique_tokens.iloc[-1]].sort_values(
            "params_total"
        )
        gain = at_largest.val_loss.iloc[0] - at_largest.val_loss.iloc[-1]
        if final.status == "early_stopped":
            told = f"More minutes would not help: on the whole text the loss stopped falling after {final.epochs:.1f} epochs."
        else:
            told = (
                f"The whole text was read {final.epochs:.1f} times, the most that this preset allows, in {duration(final.seconds)} "
                "on one core, and the loss was still falling: reading it more often may help a little."
            )
        self.report.section("What to do next")
        self.report.text(
            f"{told} A larger model ({quantity(at_largest.params_total.iloc[-1])} "
            f"parameters in place of {quantity(at_largest.params_total.iloc[0])}) changed the loss by {-gain:+.3f} nats at the "
            "largest part. More text of the same kind would change it as follows."
        )
        self.report.table(
            more, "plan", "Expected loss (nats per token) with its 95 % interval for one run", text="", tokens=",.0f", loss=".3f",
            low=".3f", high=".3f",
        )  # fmt: skip
        self.findings.append(
            f"Next: find more text. Twice as much is expected to bring {more.loss.iloc[1]:.3f} nats "
            f"({interval(more.low.iloc[1], more.high.iloc[1])}) in place of {final.val_loss:.3f}."
        )

    def end(self) -> None:
        self.finish([self.frame, self.noise, self.final])
