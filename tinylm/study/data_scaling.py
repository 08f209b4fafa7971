"""The data study, step by step: what studies/data_scaling.ipynb narrates.

How loss falls with distinct tokens, what reading the same tokens again is worth, when it starts to harm, and whether one
law of repetition can be told from these runs.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from tinylm import counts, files
from tinylm.config import TrainConfig
from tinylm.errors import TextError
from tinylm.study import doctor, planner, plots, scaling
from tinylm.study.design import Point, best_runs, bracket, rung_sizes, tune
from tinylm.study.parameters import DataParameters
from tinylm.study.report import interval
from tinylm.study.runs import Run
from tinylm.study.sections import SectionStudy, doubling, preferred, size_words
from tinylm.study.steps import have, known_text
from tinylm.words import quantity

PATIENCE = 5  # evaluations, of twenty in a run
WHOLE = 0.98  # of its steps, after which a run counts as one that had its whole schedule: the rate is nearly zero then


@dataclass(frozen=True)
class Arm:
    """One size, and what it reads: ``amounts`` of distinct tokens, each as often as ``epochs`` say, in runs of their own;
    ``once``: further amounts that it reads only once, for the curve of fresh text."""

    shape: tuple[int, int, int]
    amounts: tuple[float, ...]
    epochs: tuple[int, ...]
    once: tuple[float, ...] = ()


@dataclass(frozen=True)
class Preset:
    """How much a preset measures. tuned: amounts whose learning rate is also tuned at the most epochs (at one epoch all
    are); longest: no run is given more tokens; noisy: amount and epochs that are repeated with ``seeds`` seeds, by the arms
    numbered ``noisy_arms``; moves: how often a bracket of rates may move outward; bootstrap: resamples of a fit;
    eval_tokens: of each evaluation, all of them also on the way where a run may stop early."""

    arms: tuple[Arm, ...]
    tuned: tuple[float, ...]
    longest: float
    noisy: tuple[float, tuple[int, ...]]
    noisy_arms: tuple[int, ...] = (0, 1)
    seeds: int = 3
    moves: int = 2
    bootstrap: int = 1000
    eval_tokens: int = TrainConfig.eval_tokens


_AMOUNTS = (5e4, 1e5, 2e5, 5e5, 1.5e6)
PRESETS = {
    "smoke": Preset(
        (
            Arm((8, 2, 2), (2e3, 4e3, 8e3), (1, 2, 4, 8), once=(16e3,)),
            Arm((12, 2, 2), (2e3, 4e3, 8e3), (1, 2, 4, 8), once=(16e3,)),
            Arm((16, 2, 4), (2e3, 4e3), (1, 2, 8), once=(8e3,)),
        ),
        tuned=(4e3,), longest=64e3, noisy=(4e3, (1, 2)), seeds=2, moves=1, bootstrap=50, eval_tokens=1024,
    ),
    "quick": Preset(
        (
            Arm((24, 2, 4), (5e4, 1e5, 2e5, 4e5), (1, 2, 4, 8), once=(8e5,)),
            Arm((48, 2, 4), (5e4, 1e5, 2e5, 4e5), (1, 2, 4, 8), once=(8e5,)),
            Arm((64, 2, 4), (5e4, 1e5), (1, 2, 8), once=(2e5,)),
        ),
        tuned=(1e5,), longest=1.6e6, noisy=(1e5, (1, 4)),
    ),
    "full": Preset(
        (
            Arm((32, 2, 4), _AMOUNTS, (1, 2, 4, 8, 16), once=(1e6,)),
            Arm((64, 2, 4), _AMOUNTS, (1, 2, 4, 8, 16), once=(1e6,)),
            Arm((72, 3, 4), (5e4, 2e5, 5e5), (1, 2, 4, 16), once=(1e5,)),
        ),
        tuned=(5e4, 2e5), longest=8e6, noisy=(2e5, (1, 4)),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """One place to be trained: a shape, distinct tokens, and how often they are read."""

    shape: tuple[int, int, int]
    unique: float
    epochs: int


def begin(settings: DataParameters) -> DataStudy:
    """The study. Prepares the text, unless all that is known of it stands in the results folder."""
    known, preset = known_text(settings), PRESETS[settings.preset]
    most = max(amount for arm in preset.arms for amount in (*arm.amounts, *arm.once))
    if (there := known["tokens"]["train"]) < most + 1:
        raise TextError(
            f"The {settings.preset} preset of this study needs {most:,.0f} distinct training tokens",
            f"{there:,}",
            "choose a smaller preset or another text; `tinylm study quickstart` takes small texts",
        )
    return DataStudy(settings, preset, known)


class DataStudy(SectionStudy):
    """How loss falls with distinct tokens, and what repeated ones are worth."""

    title = "How far text goes: distinct tokens and epochs on {text}"

    # Training -------------------------------------------------------------------------------------------------------------

    def readings(self) -> list[Reading]:
        """All places of the study, by size, amount and epochs."""
        return [
            Reading(arm.shape, amount, epochs)
            for arm in self.preset.arms
            for amount in sorted({*arm.amounts, *arm.once})
            for epochs in (arm.epochs if amount in arm.amounts else (1,))
            if epochs == 1 or amount * epochs <= self.preset.longest
        ]

    def tuned(self, reading: Reading) -> bool:
        """Whether a place is trained at several rates: all at one epoch, and some amounts at the most epochs."""
        arm = next(arm for arm in self.preset.arms if arm.shape == reading.shape)
        return reading.epochs == 1 or (reading.unique in self.preset.tuned and reading.epochs == max(arm.epochs))

    def runs_of(self, reading: Reading, rates: list[float], seed: int | None = None) -> list[Run]:
        """Runs over ``unique`` distinct tokens whose schedules end where the last epoch does. What is read again may be
        learnt by heart, so those runs stop when the validation loss no longer falls."""
        point = Point(reading.shape, reading.unique * reading.epochs, "epochs" if reading.epochs > 1 else "fresh")
        runs = self.runs_at(
            point, rates, seed, unique_tokens=round(reading.unique),
            patience=PATIENCE if reading.epochs > 1 else None,
        )  # fmt: skip
        tags = {"amount": reading.unique, "passes": reading.epochs}
        return [dataclasses.replace(run, tags={**run.tags, **tags}) for run in runs]

    def guesses(self, reading: Reading) -> list[float]:
        return bracket(self.recipe.learning_rate(counts.parameters(self.model(reading.shape))["total"]))

    def stages(self, train: Callable[..., pd.DataFrame]) -> list[pd.DataFrame]:
        """First the places that are tuned; then, at rates that follow from these, all others and the seeds."""
        readings = self.readings()
        tuned = [reading for reading in readings if self.tuned(reading)]
        frame = tune(tuned, self.runs_of, self.guesses, train, self.preset.moves)
        self.rates = self.best_rates(frame)
        rest = [
            r for reading in readings if not self.tuned(reading) for r in self.runs_of(reading, [self.rate(reading)])
        ]
        best = best_runs(frame)
        noise = []
        for reading in self.noisy():
            own = best[(best.point == tuned.index(reading))] if reading in tuned else ()
            rate = own.learning_rate.iloc[0] if len(own) else self.rate(reading)
            noise += self.seeds_of(reading, rate)
        later = train([*rest, *noise])
        return [frame, later.iloc[: len(rest)], later.iloc[len(rest) :].assign(family="seeds")]

    def expected_runs(self) -> list[Run]:
        runs = []
        for reading in self.readings():
            rates = self.guesses(reading)
            runs += self.runs_of(reading, rates if self.tuned(reading) else rates[1:2])
        return runs + [run for reading in self.noisy() for run in self.seeds_of(reading, self.guesses(reading)[1])]

    def noisy(self) -> list[Reading]:
        amount, epochs = self.preset.noisy
        return [Reading(self.preset.arms[arm].shape, amount, e) for arm in self.preset.noisy_arms for e in epochs]

    def seeds_of(self, reading: Reading, rate: float) -> list[Run]:
        first = self.settings.seed
        return [run for seed in range(first, first + self.preset.seeds) for run in self.runs_of(reading, [rate], seed)]

    def best_rates(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The vertex of each tuned place's parabola, and how each size's rate moves with epochs: ``slope`` is the mean over
        its amounts of d log rate / d log epochs between one and the most epochs. Rates at the edge of their bracket say
        nothing of that; a size with no others takes the mean of all sizes."""
        best = scaling.best_learning_rate(frame, ("hidden_size", "num_layers", "amount", "passes"))
        known = best[best.edge == ""]
        pairs = known[known.passes > 1].merge(known[known.passes == 1], on=["hidden_size", "num_layers", "amount"])
        moved = np.log(pairs.learning_rate_x / pairs.learning_rate_y) / np.log(pairs.passes_x)
        slopes = moved.groupby([pairs.hidden_size, pairs.num_layers]).mean()
        usual = float(moved.mean()) if len(moved) else 0.0
        return best.assign(slope=[slopes.get((row.hidden_size, row.num_layers), usual) for row in best.itertuples()])

    def rate(self, reading: Reading) -> float:
        """The rate of a place that is not tuned, to three digits: its amount's best at one epoch, moved as its size's rates
        moved where they were tuned at both ends."""
        known = self.rates[
            (self.rates.hidden_size == reading.shape[0])
            & (self.rates.num_layers == reading.shape[1])
            & (self.rates.amount == reading.unique)
            & (self.rates.passes == 1)
        ].iloc[0]
        return float(f"{known.learning_rate * reading.epochs**known.slope:.3g}")

    def measure(self) -> None:
        self.frame, self.others, self.noise = self.stages(self.train)
        runs = pd.concat([self.frame, self.others], ignore_index=True)
        place = ["hidden_size", "num_layers", "amount", "passes"]
        ended = runs[runs.val_loss.notna()]
        best = ended.loc[ended.groupby(place).val_loss.idxmin()].sort_values(["params_total", "amount", "passes"])
        # A run that stopped at its very last evaluation has had its whole schedule.
        best = best.assign(size=size_words(best), ended=best.steps >= WHOLE * best.max_steps).reset_index(drop=True)
        self.curve = self.curves(best.run_id)
        # With patience a run's own loss is the best on its way; a law of whole schedules takes the one at their end.
        best["end_loss"] = [self.curve[run_id].val_loss.iloc[-1] for run_id in best.run_id]
        best["end_loss"] = best.end_loss.where(best.ended)
        self.places = best
        self.most = int(best.passes.max())

    # Telling --------------------------------------------------------------------------------------------------------------

    def show_learning_rates(self) -> None:
        edges = int(self.frame.groupby("point").edge.first().sum())
        tuned, rates = self.frame.point.nunique(), self.rates.assign(size=size_words(self.rates))
        slopes = rates.groupby("size", sort=False).slope.first()
        told = "; ".join(f"{size}: epochs^{slope:+.2f}" for size, slope in slopes.items())
        self.report.section("Learning rates")
        self.report.text(
            f"{tuned} places (a size, an amount of distinct tokens, a number of epochs) were trained at three rates or more, a "
            "factor of two apart: every amount at one epoch, and "
            f"{' and '.join(quantity(amount) for amount in self.preset.tuned)} distinct tokens at the most epochs too. The bracket "
            f"moved outward while its best rate lay at an edge; {edges} of {tuned} still {have(edges)} theirs there. All other "
            f"places were trained once, at the best rate of their amount at one epoch (the vertex of a parabola), moved with the "
            f"epochs as the best rates of their size moved where both ends were tuned ({told}). A run that reads its text more "
            f"than once stops after {PATIENCE} evaluations, of twenty, without a lower validation loss."
        )
        self.report.table(
            rates.sort_values(["params_total", "amount", "passes"]), "learning_rates",
            "The best rate of each place that was tuned: the vertex of a parabola through its runs, or the best run where there is "
            "none (`edge` says on which side)", size="", amount=",.0f", passes="d", learning_rate=".3g", rates="d", edge="",
        )  # fmt: skip

    def show_noise(self) -> None:
        words = [
            f"{size}, {quantity(row.amount)} tokens, {row.passes} epoch{'s' if row.passes > 1 else ''}"
            for size, row in zip(size_words(self.noise), self.noise.itertuples(), strict=True)
        ]
        self.noise = self.noise.assign(place=words)
        super().show_noise()

    def show_amounts(self) -> None:
        """L(D): each amount read once, and read as often as is best."""
        places, rows = self.places, []
        for (size, amount), group in places.groupby(["size", "amount"], sort=False):
            whole = group[group.ended]
            best, early = whole.loc[whole.end_loss.idxmin()], group.loc[group.val_loss.idxmin()]
            rows.append(
                {
                    "size": size, "params_total": best.params_total, "amount": amount, "unique_tokens": best.unique_tokens,
                    "once": whole.end_loss[whole.passes == 1].iloc[0], "best_passes": best.passes, "best": best.end_loss,
                    "tried": group.passes.max(), "early": early.val_loss,
                }
            )  # fmt: skip
        table = pd.DataFrame(rows)
        self.amounts = table.assign(gain=table.once - table.best)
        repeated = self.amounts[self.amounts.tried == self.most]
        self.once_laws, self.best_laws = (
            {size: self.laws(group.unique_tokens, group[loss]) for size, group in rows.groupby("size", sort=False)}
            for rows, loss in ((self.amounts, "once"), (repeated, "best"))
        )
        self.report.section("Loss against distinct tokens")
        self.report.text(
            "Every amount of text lies inside every larger one. `once` is the loss after one epoch, `best` the lowest loss of a "
            "run that had its whole schedule, over the epochs tried; `early` the lowest seen at all, the middle of a schedule "
            "included: what stopping in time would give, and part of no law here. The laws of the best leave out the amounts that "
            f"were read fewer than {self.most} times at most: some serve the curve of fresh text alone, and no run reads more than "
            f"{quantity(self.preset.longest)} tokens."
        )
        self.report.table(
            self.amounts, "amounts", "Loss (nats per token) by size and distinct tokens", size="", amount=",.0f", once=".3f",
            best_passes="d", tried="d", best=".3f", gain="+.3f", early=".3f",
        )  # fmt: skip
        told, chosen, drawn = {}, [], []
        for what, laws in (("once", self.once_laws), ("best", self.best_laws)):
            for size, kinds in laws.items():
                told |= {f"{what}, {size}, {kind}": doctor.diagnose(fit, bootstrap=0) for kind, fit in kinds.items()}
                chosen.append(f"{what}, {size}, {preferred(kinds)}")
        self.show_verdicts(
            "laws", "L(D) = A / D^alpha, or E + A / D^alpha with a floor where Akaike's criterion for few points prefers it, D the "
            "distinct tokens, with 95 % intervals and the verdict on each parameter", told, chosen,
        )  # fmt: skip
        for laws in (self.once_laws, self.best_laws):
            drawn.append({size: kinds[preferred(kinds)] for size, kinds in laws.items()})
        self.report.figure(
            "amounts", "Loss against distinct tokens with 95 % bands: read once (left), and as often as is best (right)",
            lambda axes: self._draw_amounts(axes, drawn), size=(9.0, 3.9), panels=2,
        )  # fmt: skip
        for what, laws in (("once", drawn[0]), ("as often as is best", drawn[1])):
            factors = {size: doubling(fit) for size, fit in laws.items()}
            said = "; ".join(
                f"{size}: {value:.3f} ({interval(low, high)})" for size, (value, low, high) in factors.items()
            )
            self.findings.append(f"Twice the text, read {what}, multiplies the loss at the largest amounts by: {said}.")
        helped = "; ".join(
            f"{size}: {', '.join(f'{quantity(row.amount)} {row.best_passes}' for row in rows.itertuples())}"
            for size, rows in repeated.groupby("size", sort=False)
        )
        self.findings.append(
            f"The epochs that served best, of up to {self.most} tried, by distinct tokens, among runs that had their whole "
            f"schedule: {helped}."
        )

    @staticmethod
    def _draw_amounts(axes: object, drawn: list[dict[str, scaling.Fit]]) -> None:
        for ax, laws, title in zip(axes, drawn, ("one epoch", "the best number of epochs"), strict=True):
            for colour, (size, fit) in zip(plots.COLOURS, laws.items(), strict=False):
                plots.law(fit, ax=ax, x="distinct training tokens D", label=size, colour=colour, extend=1.0)
            ax.set_title(title)
        low, high = (f(ax.get_ylim()[i] for ax in axes) for i, f in ((0, min), (1, max)))
        for ax in axes:
            ax.set_ylim(low, high)

    def show_epochs(self) -> None:
        stopped = self.places[~self.places.ended]
        self.report.section("Reading again")
        told = ", ".join(
            f"{size}: {', '.join(f'{quantity(a)} from {int(g.passes.min())} epochs' for a, g in group.groupby('amount'))}"
            for size, group in stopped.groupby("size", sort=False)
        )
        self.report.text(
            "Every mark is a run of its own that was made for so many epochs. "
            + (
                f"{len(stopped)} of {len(self.places)} runs stopped before their end, since the validation loss no longer fell "
                f"({told}). Their marks are hollow, at the best loss on their way."
                if len(stopped)
                else "No run stopped before its end."
            )
        )
        self.report.figure(
            "epochs", "Validation loss against the number of epochs that a run was made for",
            lambda axes: plots.epochs(self.places, axes), size=(3.3 * self.sizes + 1.2, 3.7), panels=self.sizes,
        )  # fmt: skip

    @property
    def sizes(self) -> int:
        return len(self.preset.arms)

    def show_overfitting(self) -> None:
        """Training loss against validation loss in the longest run of each amount."""
        longest = self.places.loc[self.places.groupby(["size", "amount"], sort=False).passes.idxmax()]
        longest = longest[longest.passes > 1]
        rows, curves = [], []
        for row in longest.itertuples():
            curve = self.curve[row.run_id].assign(size=row.size, amount=row.amount)
            curve["epochs"] = curve.tokens / row.unique_tokens
            curves.append(curve)
            best, last = curve.loc[curve.val_loss.idxmin()], curve.iloc[-1]
            rows.append(
                {
                    "size": row.size, "amount": row.amount, "tokens_per_parameter": row.amount / row.params_total,
                    "passes": row.passes, "best_epochs": best.epochs, "best_loss": best.val_loss, "read": last.epochs,
                    "val_loss_end": last.val_loss, "train_loss_end": last.train_loss, "rise": last.val_loss - best.val_loss,
                    "gap": last.val_loss - last.train_loss,
                }
            )  # fmt: skip
        self.overfit = pd.DataFrame(rows)
        harmed = self.overfit[self.overfit.rise > 1.96 * 2**0.5 * self.seed_sd]
        told = (
            f"In {len(harmed)} of {len(self.overfit)} runs the validation loss had risen, by more than two runs differ by chance, "
            "when they ended or were stopped"
        )
        if len(harmed):
            first = harmed.loc[harmed.tokens_per_parameter.idxmax()]
            told += (
                f": all of them on {first.tokens_per_parameter:.2g} distinct tokens a parameter or fewer, and lowest after "
                f"{harmed.best_epochs.min():.1f} to {harmed.best_epochs.max():.1f} epochs"
            )
        told += "."
        self.findings.append(told)
        self.report.text(
            "The longest run of each amount, as it went. Training loss (on text read before, from the second epoch on) and "
            "validation loss part where the model begins to learn by heart. " + told
        )
        self.report.figure(
            "overfitting", "Validation and training loss while the text is read again and again",
            lambda axes: plots.overfitting(pd.concat(curves), axes), size=(3.3 * self.sizes + 1.2, 3.7), panels=self.sizes,
        )  # fmt: skip
        self.report.table(
            self.overfit, "overfitting", "The longest run of each amount: epochs it was made for and epochs read, where its "
            "validation loss was lowest, how much it had risen at the end, and the gap to the training loss there (nats)",
            size="", amount=",.0f", tokens_per_parameter=".2g", passes="d", read=".1f", best_epochs=".1f", best_loss=".3f",
            rise="+.3f", gap="+.3f",
        )  # fmt: skip

    def show_worth(self) -> None:
        """What more epochs bring, in nats and in new text, from the same size's own curve of fresh text."""
        tables = [
            fresh_worth(group, self.seed_sd, self.freedom, self.settings.seed)
            for _, group in self.places.groupby("size", sort=False)
        ]
        self.worth = pd.concat(tables, ignore_index=True)
        self.passes = pd.concat([passes_worth(table, (2, 5)) for table in tables], ignore_index=True)
        self.report.section("What an epoch is worth")
        self.report.text(
            "The second epoch brings the loss of two epochs less that of one, each a run with its own whole schedule. The loss of "
            "five epochs lies between those of the numbers tried around it, on a straight line in the logarithm of epochs. In new "
            "text: the length of fresh text at which the same size reaches the same loss, read off a parabola in log D through its "
            "one-epoch runs, less the length for one epoch fewer, as a share of the distinct tokens; 100 % is as good as new. "
            "Intervals (95 %) come from redrawing every loss with the spread between seeds, itself drawn from what the seeds "
            "say of it. Where no measured length of fresh text reaches the loss there is no share."
        )
        if len(self.passes):
            self.report.table(
                self.passes.assign(**{name: 100 * self.passes[name] for name in ("share", "share_low", "share_high")}), "epochs",
                "What one more epoch brings: nats per token, and percent of as much new text", size="", amount=",.0f",
                epoch="d", nats=".3f", nats_low="+.3f", nats_high="+.3f", share=".0f", share_low=".0f", share_high=".0f",
            )  # fmt: skip
        self.report.figure(
            "worth", "So many epochs in new text, with 95 % intervals (on the grey line a repeated token is as good as a new one)",
            lambda axes: plots.worth(self.worth, axes), size=(3.2 * self.sizes + 1.4, 3.5), panels=self.sizes,
        )  # fmt: skip
        for epoch, rows in self.passes.groupby("epoch"):
            known = rows.dropna(subset=["share"]).sort_values("share")
            brings = f"{rows.nats.min():.3f} to {rows.nats.max():.3f}" if len(rows) > 1 else f"{rows.nats.iloc[0]:.3f}"
            told = (
                [_share(row) for _, row in known.iloc[[0, -1] if len(known) > 1 else [0]].iterrows()]
                if len(known)
                else []
            )
            stands = f" In new text it is worth {' to '.join(told)} of the text itself." if told else ""
            self.findings.append(f"The {_ORDINALS[epoch]} epoch brings {brings} nats.{stands}")

    def fit_repetition(self) -> None:
        """The law of Muennighoff et al. 2023, whether its constants are identified, and what simpler laws leave over."""
        rows = self.places[self.places.ended]
        out = len(self.places) - len(rows)
        columns = rows.params_total, rows.tokens_seen, rows.unique_tokens, rows.end_loss
        boot = {"bootstrap": self.preset.bootstrap, "seed": self.settings.seed}
        self.law = scaling.fit_data_constrained(*columns, **boot)
        self.diagnosis = doctor.diagnose(self.law, bootstrap=self.preset.bootstrap // 4, seed=self.settings.seed)
        distinct = np.minimum(rows.tokens_seen, rows.unique_tokens)
        rivals = {
            "repeats discounted (fitted)": self.law,
            "repeats as good as new": scaling.fit_surface(
                rows.params_total, rows.tokens_seen, rows.end_loss, bootstrap=0
            ),
            "repeats worth nothing": scaling.fit_surface(rows.params_total, distinct, rows.end_loss, bootstrap=0),
        }
        self.rivals = pd.DataFrame(
            [
                {
                    "law": name, "parameters": len(fit.params), "points": fit.n,
                    "error_percent": 100 * float(np.sqrt((fit.data.residual**2).mean())), "objective": fit.value,
                }
                for name, fit in rivals.items()
            ]
        )  # fmt: skip
        verdicts, profile = self.diagnosis.verdicts, self.diagnosis.intervals["by profile"]
        repetition = planner.Repetition.of(self.law)
        self.report.section("One law of repetition?")
        self.report.text(
            "Muennighoff et al. 2023 let D tokens over U distinct ones count as D' = U + U R_D (1 - exp(-(D / U - 1) / R_D)), and "
            "discount parameters beyond those that U tokens can feed in the same way with R_N, in L = E + A / N'^alpha + B / "
            f"D'^beta. All seven constants are fitted at once to the {len(rows)} runs that had their whole schedules"
            + (
                f"; the {out} that stopped early are not in it: their losses are from the middle of a schedule, and the law does "
                "not know that reading again can harm. What it says holds short of that."
                if out
                else "."
            )
        )
        self.show_verdicts(
            "repetition", "The law of repetition with 95 % intervals and the verdict on each parameter",
            {"data-constrained": self.diagnosis},
        )  # fmt: skip
        said = [f"{name}*: **{verdicts.status[name]}**. {self._told(name, profile[name])}" for name in ("R_D", "R_N")]
        self.report.text("\n".join(f"- {line}" for line in [*said, *self.diagnosis.notes]))
        self.report.figure(
            "repetition_profile", "How well other values fit, all else fitted again: below the dashed line a value is as good, at "
            "95 %, as the best (star)",
            lambda axes: plots.profiles(self.diagnosis.profiles[self.diagnosis.profiles.parameter.isin(_SHOWN)], axes),
            size=(3.0 * len(_SHOWN), 3.0), panels=len(_SHOWN),
        )  # fmt: skip
        self.report.table(
            self.rivals, "rivals", "What laws leave over: the root mean square error in percent of the loss, and the summed Huber "
            "objective", law="", parameters="d", points="d", error_percent=".2f", objective=".4g",
        )  # fmt: skip
        self.report.figure(
            "repetition", "The runs (marks) and the fitted law (lines)",
            lambda axes: plots.epochs(self.places, axes, predict=lambda *x: self.law.predict(*x).loss.to_numpy()),
            size=(3.3 * self.sizes + 1.2, 3.7), panels=self.sizes,
        )  # fmt: skip
        self.report.figure(
            "residuals", "What the law leaves over, against parameters, tokens of training and distinct tokens",
            lambda axes: plots.residuals(self.law, axes, self.seed_sd), size=(11, 3.2), panels=3,
        )  # fmt: skip
        if len(self.law.samples):
            self.report.figure(
                "clouds",
                "Resamples of the law's constants",
                lambda axes: plots.clouds(self.law, axes),
                size=(10, 3.3),
                panels=3,
            )
        if verdicts.status["R_D"] == "not identified":
            self.report.text(
                "So no number of worthwhile epochs follows from the law here: the measured worth above stands alone."
            )
        else:
            self.report.text(f"In words: {repetition.sentence()[0].lower()}{repetition.sentence()[1:]}")
        told = [
            f"{name}* = {row.value:.3g} ({row.low:.3g} to {row.high:.3g}) is {row.status}"
            for name, row in verdicts.loc[["R_D", "R_N"]].iterrows()
        ]
        self.findings.append(
            f"One law of repetition: {'; '.join(told)}"
            + f". It misses these runs by {self.rivals.error_percent[0]:.2f} % of the loss, a law for which repeats are as good as "
            f"new by {self.rivals.error_percent[1]:.2f} %, one for which they are worth nothing by "
            f"{self.rivals.error_percent[2]:.2f} %."
        )

    def _told(self, name: str, region: tuple[float, float]) -> str:
        """What the profile of a constant says, and whether the published value is among what it allows."""
        published = {"R_D": planner.PUBLISHED.tokens_star, "R_N": planner.PUBLISHED.params_star}[name]
        low, high = region
        if not np.isfinite(region).any():
            allowed = "Every value fits these runs as well as the best one, the other constants adjusted"
        elif not np.isfinite(high):
            allowed = f"Every value above {low:.3g} fits as well as the best one, the other constants adjusted"
        elif not np.isfinite(low):
            allowed = f"Every value below {high:.3g} fits as well as the best one, the other constants adjusted"
        else:
            allowed = f"Values from {low:.3g} to {high:.3g} fit as well as the best one, the other constants adjusted"
        return f"{allowed}; the published {published:g} is {'one of them' if low <= published <= high else 'not among them'}."

    def end(self) -> None:
        """The laws as the planner takes them, and the report."""
        rule = scaling.learning_rate_rule(self.frame, by=("hidden_size", "num_layers", "amount", "passes"))
        ladder = rung_sizes(self.recipe, self.settings.vocab_size)
        known = planner.Evidence(
            self.law.surface(), rule, ladder, self.seed_sd, float(self.places.flops.max()), self.corpus["tokens"]["train"],
            repetition=planner.Repetition.of(self.law, f"this study of {self.corpus['name']}"),
        )  # fmt: skip
        files.write_whole(self.folder / "tables" / "law.json", json.dumps(known.to_dict()) + "\n")
        self.finish([self.frame, self.others, self.noise])


_ORDINALS = {2: "second", 5: "fifth"}
_SHOWN = ("R_D", "R_N", "beta")


def _share(row: pd.Series) -> str:
    where = f"{row['size']}, {quantity(row.amount)} distinct tokens"
    return f"{row.share:.0%} ({row.share_low:.0%} to {row.share_high:.0%}; {where})"


# ------------------------------------------------------------------------------------------------- the worth of an epoch


def fresh_worth(places: pd.DataFrame, seed_sd: float, freedom: int, seed: int = 0, draws: int = 2000) -> pd.DataFrame:
    """The places of one size, with what their epochs are worth in new text.

    places: one row a place with size, amount, passes, unique_tokens, ended, end_loss. The fresh curve is a parabola of loss
    in log tokens through the places of one epoch (a line through fewer than four). seed_sd (nats), freedom: the spread
    between seeds and its degrees of freedom. Returns size, amount, passes, end_loss, ``worth`` (tokens of fresh text with the
    same loss over the distinct tokens; NaN beyond the lengths measured), worth_low, worth_high (95 %; an end beyond the
    lengths measured stands at their limit), and what is behind them: ``losses`` and ``lengths`` (log worth), arrays (1 +
    draws,) of the loss as it is and as redrawn.
    """
    rng = np.random.default_rng(seed)
    whole = places[places.ended].sort_values(["amount", "passes"])
    once = whole[whole.passes == 1]
    x = np.log(once.unique_tokens.to_numpy(float))
    middle, ends = x.mean(), (x.min(), x.max())
    powers = np.vander(x - middle, 3 if len(x) > 3 else 2)
    grid = np.linspace(*ends, 400)
    basis = np.vander(grid - middle, powers.shape[1])
    noise = seed_sd * np.sqrt(freedom / rng.chisquare(freedom, size=draws))
    drawn = {
        index: loss + noise * rng.standard_normal(draws) for index, loss in whole.end_loss.items()
    }  # each loss is drawn once: a run that stands in two differences is the same run
    fresh = np.stack([drawn[index] for index in once.index])
    curves = (
        basis @ np.linalg.pinv(powers) @ np.column_stack([once.end_loss.to_numpy(float), fresh])
    )  # (grid, 1 + draws)
    rows = []
    for index, row in whole.iterrows():
        losses = np.concatenate([[row.end_loss], drawn[index]])
        lengths, beyond = np.zeros(draws + 1), False
        if row.passes > 1:
            lengths = _crossing(grid, curves, losses) - math.log(row.unique_tokens)
            beyond = not curves[:, 0].min() <= losses[0] <= curves[0, 0]
        low, high = np.exp(np.quantile(lengths[1:], [0.025, 0.975]))
        rows.append(
            {
                "size": row["size"], "amount": row.amount, "passes": row.passes, "end_loss": row.end_loss,
                "worth": math.nan if beyond else math.exp(lengths[0]), "worth_low": low, "worth_high": high,
                "losses": losses, "lengths": lengths,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _crossing(grid: np.ndarray, curves: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Where each falling curve (grid, n) first comes down to its loss (n,); the last grid point where it never does."""
    reached = curves <= losses
    first = np.where(reached.any(axis=0), reached.argmax(axis=0), len(grid) - 1)
    before = np.maximum(first - 1, 0)
    columns = np.arange(curves.shape[1])
    above, below = curves[before, columns], curves[first, columns]
    share = np.clip((above - losses) / np.where(above > below, above - below, np.inf), 0, 1)
    return grid[before] + share * (grid[first] - grid[before])


def passes_worth(table: pd.DataFrame, epochs: tuple[int, ...]) -> pd.DataFrame:
    """What single epochs bring, from a table of ``fresh_worth``: size, amount, epoch, nats and share with 95 % intervals.

    Between the numbers of epochs tried loss and log worth are straight in log epochs; an epoch counts where a
    number was tried between it and twice the one before. share: of as much new text; NaN where the loss lies
    beyond the fresh text measured.
    """
    rows = []
    for amount, group in table.groupby("amount", sort=True):
        tried = group.sort_values("passes")
        passes = tried.passes.to_numpy(float)
        for epoch in epochs:
            right = int(np.searchsorted(passes, epoch))
            if epoch - 1 < passes[0] or right == len(passes) or passes[right] > 2 * (epoch - 1):
                continue
            weights = [_between(passes, e) for e in (epoch - 1, epoch)]
            losses, lengths = np.stack(list(tried.losses)), np.stack(list(tried.lengths))
            nats = (weights[0] - weights[1]) @ losses
            share = np.exp(weights[1] @ lengths) - np.exp(weights[0] @ lengths)
            known = tried.worth[(weights[0] + weights[1]) > 0].notna().all()
            low, high = np.quantile(nats[1:], [0.025, 0.975])
            share_low, share_high = np.quantile(share[1:], [0.025, 0.975])
            row = {"size": tried["size"].iloc[0], "amount": amount, "epoch": epoch, "nats": nats[0], "nats_low": low}
            row |= {"nats_high": high, "share": share[0], "share_low": share_low, "share_high": share_high}
            rows.append(row if known else row | dict.fromkeys(("share", "share_low", "share_high"), math.nan))
    return pd.DataFrame(rows)


def _between(passes: np.ndarray, epoch: float) -> np.ndarray:
    """Weights on the numbers of epochs tried that interpolate at ``epoch``, straight in the logarithm."""
    weights = np.zeros(len(passes))
    right = int(np.searchsorted(passes, epoch))
    if passes[right] == epoch:
        weights[right] = 1.0
        return weights
    part = math.log(epoch / passes[right - 1]) / math.log(passes[right] / passes[right - 1])
    weights[right - 1 : right + 1] = 1 - part, part
    return weights
