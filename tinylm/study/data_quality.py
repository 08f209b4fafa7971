"""What the quality of a text is worth, step by step: what studies/data_quality.ipynb narrates.

Clean text of several amounts, and the same text spoilt on purpose, are read once by models of two sizes, and all are judged on
clean validation text. A loss on spoilt text is then told in clean tokens, off the clean text's own curve, and in parameters. Two
translations of one book, one in simple words, are compared verse by verse.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from tinylm import corpora, counts, files
from tinylm.config import Damage, DataConfig, ModelConfig, TrainConfig
from tinylm.errors import LabError, TextError
from tinylm.study import claims, contrasts, plots, scaling
from tinylm.study.ablations import with_total
from tinylm.study.design import bracket, tune
from tinylm.study.multipliers import Frontier, fit_frontier, multipliers
from tinylm.study.parameters import DataQualityParameters
from tinylm.study.report import interval, write_table
from tinylm.study.runs import Run, read_kept
from tinylm.study.sections import SectionStudy
from tinylm.study.steps import have, known_text
from tinylm.tokenizer import read_pieces
from tinylm.words import quantity

# ------------------------------------------------------------------------------------------------------------------ as data

# Each kind at two strengths; "kind:share", see ``tinylm.config.Damage``.
DAMAGES = (
    *("swap:0.03", "swap:0.1"),
    *("shuffle:0.3", "shuffle:1"),
    *("repeat:0.2", "repeat:0.5"),
    *("boilerplate:0.2", "boilerplate:0.5"),
    *("foreign:0.2", "foreign:0.5"),
)
STRONG = DAMAGES[1::2]
CLAIMED = "swap:0.1"  # the damage of claim 7
SIZES = (2, 4)  # how many times the parameters clean text is also read with; claim 7 asks for both
CLEAN, TWICE, FOUR, MORE = "clean text", "twice the size", "four times the size", "twice the text"
_WORDS = {
    "swap": "{} of the characters change places with a neighbour",
    "shuffle": "{} of the lines change places",
    "repeat": "{} of the lines repeat the one before",
    "boilerplate": "{} of the lines are stock phrases of web pages",
    "foreign": "{} of the lines are in a made-up language",
}
_CODED = "by the codes of How the text is spoilt"  # in captions
_COLOURS = dict(zip(_WORDS, plots.COLOURS, strict=False))


@dataclass(frozen=True)
class Place:
    """A size of model: its name in the claims and its shape (hidden_size, num_layers, num_heads)."""

    name: str
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Preset:
    """How much a preset measures. amount: tokens at which everything is compared; clean: amounts of clean text, from a quarter
    to four times of it; damages: those tried at that amount; elsewhere: amounts at which ``strong`` ones are read too; pair: two
    texts of the same lines, to be compared line by line (empty: two that are made up), and the share of them that is read;
    moves: how often a bracket of rates may move outward; draws: of an interval; eval_tokens: of each evaluation."""

    places: tuple[Place, Place]
    amount: float
    clean: tuple[float, ...]
    damages: tuple[str, ...] = DAMAGES
    strong: tuple[str, ...] = STRONG
    elsewhere: tuple[float, ...] = ()
    pair: tuple[str, ...] = ("bible-bbe", "bible-kjv")
    pair_share: float = 1.0
    seeds: int = 3
    moves: int = 2
    draws: int = 2000
    eval_tokens: int = TrainConfig.eval_tokens


PRESETS = {
    "smoke": Preset(
        (Place("small", (8, 2, 2)), Place("large", (12, 2, 2))), 8e3, (2e3, 4e3, 8e3, 16e3, 32e3), damages=STRONG,
        strong=(CLAIMED,), elsewhere=(16e3,), pair=(), seeds=2, moves=0, draws=300, eval_tokens=4096,
    ),
    "quick": Preset(
        (Place("small", (24, 2, 4)), Place("large", (48, 2, 4))), 1e5, (25e3, 5e4, 1e5, 2e5, 4e5), elsewhere=(2e5,),
        pair_share=0.25, moves=1,
    ),
    "full": Preset(
        (Place("small", (32, 2, 4)), Place("large", (64, 2, 4))), 4e5, (1e5, 2e5, 4e5, 8e5, 1.6e6), elsewhere=(2e5, 8e5),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """A text that a model reads once. times: the model's parameters over those of the place. name: what stands in tables; rate:
    the name of the reading whose best learning rate it takes."""

    place: Place
    name: str
    data: DataConfig
    amount: float
    times: int = 1
    rate: str = CLEAN


def words(damage: str) -> str:
    """What a damage does, in words."""
    told = Damage.parse(damage)
    return _WORDS[told.kind].format("all" if told.share == 1 else f"{told.share:.0%}")


def begin(settings: DataQualityParameters) -> DataQuality:
    """The study. Prepares its texts, unless what is known of them stands in the results folder, and seals the rules of the
    claims that it serves, before its first run. Raises TextError for a text that runs would have to read twice."""
    preset, known = PRESETS[settings.preset], known_text(settings)
    most = max(preset.clean)
    if (there := known["tokens"]["train"]) < most:
        raise TextError(
            f"The {settings.preset} preset of this study reads {most:,.0f} training tokens once",
            f"{there:,}",
            "choose a smaller preset or another text; `tinylm study quickstart` takes small texts",
        )
    pair = {
        name: known_text(dataclasses.replace(settings, text=path, results_dir=str(settings.folder)))
        for name, path in pair_of(preset, settings.folder).items()
    }
    study = DataQuality(settings, preset, known, pair)
    claims.seal(study.folder, settings.study)
    return study


def pair_of(preset: Preset, folder: Path) -> dict[str, str]:
    """The names of the two parallel texts, and what ``corpora.load`` takes for them. Without any in the preset two are made up
    in the folder: lines of the same meanings, with a word for each in the one, and one for every four in the other."""
    if preset.pair:
        return {name: name for name in preset.pair}
    rng, lines = np.random.RandomState(0), 1500
    letters = np.array(list("abcdefghiklmnoprstu"))
    vocabulary = ["".join(rng.choice(letters, rng.randint(3, 8))) for _ in range(400)]
    meanings = rng.zipf(1.5, (lines, 8)) % len(vocabulary)
    found = {}
    for name, step in (("simple", 4), ("rich", 1)):
        path = folder / "texts" / f"{name}.txt"
        text = "\n".join(" ".join(vocabulary[m // step * step] for m in line) for line in meanings) + "\n"
        if not path.exists():
            files.write_whole(path, text)
        found[name] = str(path)
    return found


def paired_spread(losses: dict[str, pd.Series]) -> tuple[float, int]:
    """The standard deviation of a paired difference (nats) and its degrees of freedom, pooled over all pairs of readings: from
    what is left of the losses without each reading's mean and each seed's mean (two-way analysis of variance).

    It takes the spread as alike in all readings. ``contrasts.pooled_spread`` does not, and pays for it: with three seeds its
    degrees of freedom are about one, however many variants there are.
    """
    table = pd.DataFrame(losses).dropna(axis=1)
    left = table - table.mean() + table.to_numpy().mean() - table.mean(axis=1).to_numpy()[:, None]
    freedom = (len(table) - 1) * (table.shape[1] - 1)
    if not freedom:
        raise LabError("A comparison needs two seeds and two texts that did not diverge", f"{table.shape} of them")
    return math.sqrt(2 * float((left**2).to_numpy().sum()) / freedom), freedom


class DataQuality(SectionStudy):
    """What clean text is worth against spoilt text, more text and more parameters."""

    title = "What the quality of the text is worth on {text}"

    def __init__(self, settings: DataQualityParameters, preset: Preset, corpus: dict, pair: dict[str, dict]):
        super().__init__(settings, preset, corpus)
        self.pair = pair

    # The plan -------------------------------------------------------------------------------------------------------------

    def grown(self, place: Place, times: int) -> ModelConfig:
        """The model of a place with so many times the parameters, within 1 %: as deep and with as many heads, the width whose
        usual proportions come nearest, and the intermediate_size that closes the gap."""
        base = self.model(place.shape)
        if times == 1:
            return base
        hidden, layers, heads = place.shape
        total = times * counts.parameters(base)["total"]
        models = [self.model((width, layers, heads)) for width in range(hidden, 4 * hidden, 2 * heads)]
        models.sort(key=lambda model: abs(math.log(counts.parameters(model)["total"] / total)))
        return next(found for model in models if (found := with_total(model, total)) is not None)

    def readings(self) -> list[Reading]:
        return [reading for place in self.preset.places for reading in (*self._clean(place), *self._spoilt(place))]

    def _clean(self, place: Place) -> list[Reading]:
        amount = self.preset.amount
        names = {amount: CLEAN, 2 * amount: MORE}
        found = [Reading(place, names.get(a, f"{CLEAN}, {quantity(a)}"), self.data, a) for a in self.preset.clean]
        return found + [Reading(place, self._sized(n), self.data, amount, n, self._sized(n)) for n in SIZES]

    def _spoilt(self, place: Place) -> list[Reading]:
        data = {damage: self.data.replace(damage=damage) for damage in self.preset.damages}
        found = [Reading(place, damage, own, self.preset.amount) for damage, own in data.items()]
        found += [
            Reading(place, f"{damage}, {quantity(amount)}", data[damage], amount)
            for damage in self.preset.strong
            for amount in self.preset.elsewhere
        ]
        four = f"{CLAIMED}, {FOUR}"
        return [*found, Reading(place, four, data[CLAIMED], self.preset.amount, 4, FOUR)]

    @staticmethod
    def _sized(times: int) -> str:
        return {2: TWICE, 4: FOUR}[times]

    def _paired(self, tuning: bool = False) -> list[Reading]:
        """The two parallel texts, each read once; for finding a rate no more of them than ``amount``."""
        paths = pair_of(self.preset, self.folder)
        found = []
        for place in self.preset.places:
            for name, facts in self.pair.items():
                tokens = 0.99 * facts["tokens"]["train"]  # whole steps, and none of a second reading
                amount = min(tokens, self.preset.amount) if tuning else tokens * self.preset.pair_share
                found.append(Reading(place, name, self.data.replace(text=paths[name]), amount, rate=name))
        return found

    def runs_of(
        self, reading: Reading, rates: list[float], seed: int | None = None, family: str = "rates"
    ) -> list[Run]:
        model = self.grown(reading.place, reading.times)
        seed = self.settings.seed if seed is None else seed
        facts = self.pair.get(reading.name)
        scored = facts["tokens"]["val"] if facts else self.preset.eval_tokens
        tags = {"place": reading.place.name, "reads": reading.name, "times": reading.times, "amount": reading.amount}
        tags |= {"family": family, "budget": 0.0}
        return [
            Run(model, self.recipe.train(model, reading.amount, rate, seed, eval_tokens=scored), reading.data, tags)
            for rate in rates
        ]

    def guesses(self, reading: Reading) -> list[float]:
        model = self.grown(reading.place, reading.times)
        return bracket(self.recipe.learning_rate(counts.parameters(model)["total"]))

    @property
    def seeds(self) -> range:
        """Seeds of comparisons: none of them chose a rate."""
        return range(self.settings.seed + 1, self.settings.seed + 1 + self.preset.seeds)

    def tuned_readings(self) -> list[Reading]:
        """Clean text at the amount compared, read at every size, and the parallel texts."""
        clean = [r for place in self.preset.places for r in self._clean(place) if r.amount == self.preset.amount]
        return [*clean, *self._paired(tuning=True)]

    def stages(self, train: Callable[..., pd.DataFrame]) -> list[pd.DataFrame]:
        """Rates on clean text, on one seed; then everything at these rates, on others."""
        tuned = tune(self.tuned_readings(), self.runs_of, self.guesses, train, self.preset.moves)
        order = {(r.place.name, r.name): number for number, r in enumerate(self.tuned_readings())}
        rates = scaling.best_learning_rate(tuned, ("place", "reads"))
        self.rates = rates.iloc[np.argsort([order[key] for key in zip(rates.place, rates.reads, strict=True)])]
        best = {(row.place, row.reads): float(f"{row.learning_rate:.3g}") for row in self.rates.itertuples()}
        runs = [
            run
            for reading in [*self.readings(), *self._paired()]
            if (rate := best.get((reading.place.name, reading.rate)))  # none where all diverged
            for seed in self.seeds
            for run in self.runs_of(reading, [rate], seed, "seeds")
        ]
        return [tuned, train(runs)]

    def expected_runs(self) -> list[Run]:
        runs = [run for reading in self.tuned_readings() for run in self.runs_of(reading, self.guesses(reading))]
        for reading in [*self.readings(), *self._paired()]:
            rate = self.guesses(reading)[1]
            runs += [run for seed in self.seeds for run in self.runs_of(reading, [rate], seed, "seeds")]
        return runs

    def plan_sweep(self) -> None:
        super().plan_sweep()
        each = 2 * self.corpus["tokens"]["train"]
        added = [Damage.parse(damage) for damage in self.preset.damages]
        room = sum(each / (1 - d.share if d.kind not in ("swap", "shuffle") else 1) for d in added)
        print(
            f"plan: {len(added)} spoilt texts are cut into tokens first; the cache takes about {room / 1e6:,.0f} MB for them"
        )

    def measure(self) -> None:
        self.tuned, self.seeded = self.stages(self.train)
        own = self.seeded[~self.seeded.reads.isin(list(self.pair))]
        self.spread, self.tables, self.frontiers = {}, {}, {}
        for place in self.preset.places:
            frame = own[own.place == place.name]
            losses = {name: rows.set_index("seed").val_loss for name, rows in frame.groupby("reads", sort=False)}
            if CLEAN not in losses or losses[CLEAN].isna().all():
                raise LabError(
                    "A comparison needs its baseline, and every run of it diverged", f"{place.name}: {CLEAN}",
                    "choose another text, or a smaller vocabulary",
                )  # fmt: skip
            self.spread[place.name] = paired_spread(losses)
            self.frontiers[place.name] = self.frontier(frame)
            self.tables[place.name] = self._worth(place, frame, losses)
        self.all = pd.concat(self.tables.values(), ignore_index=True)

    # Judging --------------------------------------------------------------------------------------------------------------

    def frontier(self, frame: pd.DataFrame) -> Frontier:
        """The loss on clean text against tokens, at one size, around the amount compared."""
        clean = frame[frame.damage.isna() & (frame.times == 1)]
        base = float(clean.tokens_seen[clean.reads == CLEAN].mean())
        runs = clean.assign(budget=clean.amount, flops=clean.tokens_seen)  # a frontier in tokens, not in FLOPs
        return fit_frontier(runs, base, self.preset.draws, self.settings.seed)

    def _effects(self, losses: dict[str, pd.Series], place: str) -> pd.DataFrame:
        """Each reading against clean text, seed by seed; Holm's correction runs over the damages at the amount compared."""
        sd, freedom = self.spread[place]
        rows = []
        for name, own in losses.items():
            pair = (own - losses[CLEAN]).dropna()
            if name == CLEAN or pair.empty:
                continue
            mean, error = pair.mean(), sd / math.sqrt(len(pair))
            half = error * stats.t.ppf(0.975, freedom)
            rows.append(
                {"variant": name, "seeds": len(pair), "loss": own.mean(), "difference": mean, "error": error,
                 "freedom": freedom, "low": mean - half, "high": mean + half, "p": 2 * stats.t.sf(abs(mean) / error, freedom)}
            )  # fmt: skip
        table = pd.DataFrame(rows)
        corrected = contrasts.holm(table.p[table.variant.isin(self.preset.damages)]).reindex(table.index)
        told = np.where(table.difference > 0, "worse", "better")
        table["p_holm"], table["verdict"] = corrected, np.where(corrected.fillna(table.p) < 0.05, told, "undecided")
        return table

    def _worth(self, place: Place, frame: pd.DataFrame, losses: dict[str, pd.Series]) -> pd.DataFrame:
        """Every reading of a place against clean text of the amount compared: in nats, in clean tokens, in parameters."""
        table = self._effects(losses, place.name)
        about = frame.drop_duplicates("reads").set_index("reads").reindex(table.variant)
        for name in ("amount", "times", "damage", "params_total"):
            table[name] = about[name].to_numpy()
        table["flops"] = about.tokens_seen.to_numpy(float)
        known = multipliers(self.frontiers[place.name], table, self.settings.seed)
        known.columns = [name.replace("multiplier", "worth") for name in known.columns]
        table = table.merge(known, on="variant").rename(columns={"flops": "tokens_seen"})
        table["clean_tokens"] = table.worth * table.tokens_seen
        reach = dict(zip(("below", "above"), self.frontiers[place.name].reach, strict=True))
        table["bound"] = table.beyond.map(reach) * self.frontiers[place.name].flops / table.tokens_seen
        table[["of_size", "of_size_low", "of_size_high"]] = np.nan
        for at, row in table[table.damage.notna() & (table.times == 1)].iterrows():
            table.loc[at, ["of_size", "of_size_low", "of_size_high"]] = self._in_parameters(
                table, row, place.name, losses
            )
        table["place"] = place.name
        return table

    def _in_parameters(
        self, table: pd.DataFrame, row: pd.Series, place: str, losses: dict[str, pd.Series]
    ) -> tuple[float, float, float]:
        """The factor in parameters that on clean text takes off as much loss as a damage adds, with a 95 % interval: loss is
        taken as straight in log parameters, from once to four times of them; NaN where the factor lies beyond."""
        gain = -table.set_index("variant").difference.get(FOUR, math.nan)
        sd, freedom = self.spread[place]
        rng = np.random.default_rng(self.settings.seed)
        each = [losses[name].notna().sum() for name in (CLEAN, row.variant, FOUR)]
        run_sd = sd / math.sqrt(2) * np.sqrt(freedom / rng.chisquare(freedom, self.preset.draws))
        clean, spoilt, four = (run_sd * rng.standard_normal(self.preset.draws) / math.sqrt(n) for n in each)
        gains = gain + clean - four
        drawn = np.where(gains > 0, (row.difference + spoilt - clean) / np.where(gains > 0, gains, 1), np.inf)
        factor = 4 ** (row.difference / gain) if gain > 0 else math.inf
        low, high = np.quantile(4 ** np.clip(drawn, -1, 1), [0.025, 0.975])
        return (factor if 0.25 <= factor <= 4 else math.nan), low, high

    # Telling --------------------------------------------------------------------------------------------------------------

    def show_damages(self) -> None:
        """What is done to the text, with a few lines of each kind."""
        self.report.section("How the text is spoilt")
        self.report.text(
            f"Only the training part is spoilt. The tokenizer has learnt from it clean, and every model is judged on clean "
            f"validation text. All read equally many tokens, {quantity(self.preset.amount)} where nothing else is said, once. The "
            "windows are drawn from the whole training part by the seed, so that seeds differ in their text too, and intervals "
            "hold its luck. Misspelt words cost more tokens, so that equal tokens hold less of a text with swapped characters."
        )
        self.report.text("\n".join(f"- `{damage}`: {words(damage)}" for damage in self.preset.damages))
        codes = {words(damage).capitalize(): f" (`{damage}`)" for damage in self.preset.damages}
        shown = self._examples()
        self.report.text(
            "\n\n".join(f"{told}{codes.get(told, '')}:\n\n```text\n{lines}\n```" for told, lines in shown.items())
        )

    def _examples(self) -> dict[str, str]:
        """The beginning of the training part as it is, and as each kind of damage leaves it; kept beside the tables."""
        path = self.folder / "tables" / "examples.json"
        wanted = {"As it is": None} | {words(d).capitalize(): d for d in self.preset.damages if d in STRONG}
        known = (
            read_kept(path, lambda kept: {told: lines + "" for told, lines in kept.items()}) if path.exists() else {}
        )
        if set(known) != set(wanted):
            text = corpora.load(self.data.text, self.data.field)
            _, spans = corpora.split_spans(text.path)
            with open(text.path, "rb") as file:
                piece = next(iter(read_pieces(file, *spans["train"][0])))
            known = {}
            for told, damage in wanted.items():
                spoilt = piece if damage is None else next(corpora.damaged([piece], Damage.parse(damage)))
                known[told] = "\n".join(line[:100] for line in spoilt[:1000].splitlines()[:5])
            files.write_whole(path, json.dumps(known, ensure_ascii=False, indent=1) + "\n")
        return known

    def show_learning_rates(self) -> None:
        edges = int((self.rates.edge != "").sum())
        self.report.section("Learning rates")
        self.report.text(
            f"The rate is found on clean text of {quantity(self.preset.amount)} tokens, for each size and each of the parallel "
            "texts: three rates, a factor of two apart, on a seed that is used for nothing else, and the vertex of a parabola "
            f"through them; {edges} of {len(self.rates)} brackets {have(edges)} their best at an edge. It is carried over to all "
            "other amounts and to every damage, which may have a better one of their own: part of what a damage costs may be that, "
            "and more text is, if anything, told as worth less than it is."
        )
        self.report.table(
            self.rates, "learning_rates", "The best rate of each size on clean text, and on the parallel texts (a vertex, or the "
            "best run where `edge` says on which side it lies)", place="", reads="", params_total=",.0f", learning_rate=".3g",
            rates="d", edge="",
        )  # fmt: skip

    def show_noise(self) -> None:
        clean = self.seeded[self.seeded.damage.isna() & ~self.seeded.reads.isin(list(self.pair))]
        self.noise = clean.assign(place=clean.place + ": " + clean.reads)
        super().show_noise()

    def show_clean(self) -> None:
        """What more clean text and more parameters bring."""
        names = [MORE, *(self._sized(times) for times in SIZES)]
        rows = self.all[self.all.variant.isin(names)]
        self.report.section("More text, or more parameters?")
        shapes = "; ".join(
            f"{place.name}: "
            + ", ".join(
                f"{name} {model.hidden_size} x {model.num_layers} with a feed-forward of {model.resolve().intermediate_size}, "
                f"{counts.parameters(model)['total']:,} parameters"
                for name, model in (
                    ("once", self.model(place.shape)), *((f"{n} times", self.grown(place, n)) for n in SIZES)
                )
            )
            for place in self.preset.places
        )  # fmt: skip
        spreads = "; ".join(
            f"{name} {sd:.4f} nats ({freedom} degrees of freedom)" for name, (sd, freedom) in self.spread.items()
        )
        self.report.text(
            f"Clean text of {', '.join(quantity(amount) for amount in self.preset.clean)} tokens gives the curve of loss against "
            f"text at each size ({self.preset.seeds} seeds an amount, a parabola in log tokens through the means). The models "
            f"({shapes}). `clean tokens` is how much clean text the model of the place would need for that loss, `worth` the same "
            f"over the tokens that were read. Differences are paired by seed; the standard deviation of one is {spreads}, pooled "
            "over everything that was read by the models of a place (what is left without each text's mean and each seed's)."
        )
        self.report.table(
            rows, "clean", f"Against clean text of {quantity(self.preset.amount)} tokens (nats per token, 95 % intervals)",
            place="", variant="", params_total=",.0f", tokens_seen=",.0f", loss=".3f", difference="+.4f", low="+.4f",
            high="+.4f", clean_tokens=",.0f", worth=".2f", worth_low=".2f", worth_high=".2f", beyond="",
        )  # fmt: skip
        self.report.figure(
            "curves", f"Loss against text read once. Line: clean text, with its 95 % band; marks: spoilt text, {_CODED}",
            lambda axes: [self._draw_curve(place, ax) for place, ax in zip(self.preset.places, axes, strict=True)],
            size=(10.2, 4.4), panels=2,
        )  # fmt: skip
        told = []
        for place in self.preset.places:
            own = rows[rows.place == place.name].set_index("variant")
            told.append(
                f"{place.name}: "
                + ", ".join(
                    f"{name} {row.difference:+.3f} ({interval(row.low, row.high, '+.3f')})"
                    for name, row in own.iterrows()
                )
            )
        self.findings.append(f"On {quantity(self.preset.amount)} clean tokens (nats per token): {'; '.join(told)}.")

    def _draw_curve(self, place: Place, ax: object) -> None:
        frontier, table = self.frontiers[place.name], self.tables[place.name]
        tokens = frontier.flops * np.exp(frontier.x)
        ax.fill_between(
            tokens, *np.quantile(frontier.draws, [0.025, 0.975], axis=0), color=plots.GREY, alpha=0.25, linewidth=0
        )
        ax.plot(tokens, frontier.curve, color="black", label=CLEAN)
        ax.plot(frontier.points.flops, frontier.points.loss, "o", color="black")
        own = table[table.damage.notna() & (table.times == 1)]
        for damage, rows in own.groupby("damage", sort=False):
            kind, rows = Damage.parse(damage).kind, rows.sort_values("tokens_seen")
            strong = damage in STRONG
            ax.plot(
                rows.tokens_seen, rows.loss, "-" if len(rows) > 1 else "", marker=plots.MARKERS[list(_WORDS).index(kind) + 1],
                color=_COLOURS[kind], markerfacecolor=_COLOURS[kind] if strong else "white", linewidth=1, label=damage,
            )  # fmt: skip
        plots._log(ax, "x", plots.TOKENS)
        ax.set_ylabel(plots.LOSS)
        ax.set_title(f"{place.name}: {quantity(counts.parameters(self.model(place.shape))['total'])} parameters")
        if place is self.preset.places[-1]:
            ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))

    def show_worth(self) -> None:
        """What each damage costs: in nats, in clean tokens, in parameters."""
        amount = self.preset.amount
        rows = self.all[self.all.damage.notna() & (self.all.times == 1) & (self.all.amount == amount)].copy()
        kept = [Damage.parse(damage) for damage in rows.damage]
        rows["left"] = [1 - d.share if d.kind in ("repeat", "boilerplate", "foreign") else math.nan for d in kept]
        rows["does"] = [words(damage) for damage in rows.damage]
        self.report.section("What a spoilt text is worth")
        self.report.text(
            "`worth` is the clean text that gives the same loss, as a share of the tokens read, by the curve of clean text; where "
            f"it lies outside of what was measured ({quantity(min(self.preset.clean))} to {quantity(max(self.preset.clean))} "
            "tokens) only a bound is known (`beyond`), and an end of an interval stands at the last amount measured; intervals "
            "hold the luck of seeds, not what a parabola may miss of the curve. `left` is the share of the lines that is the "
            "text's own: a text that is worth less does harm beyond the room that it takes. "
            "`of size` is the factor in parameters, between a quarter and four, that on clean text changes the loss as much: 2 "
            "says that the damage costs what twice the parameters bring. Verdicts are after Holm's correction over all damages."
        )
        self.report.table(
            rows, "worth", f"{quantity(amount)} tokens of spoilt text against as many clean ones (nats per token, 95 % intervals), "
            "in clean tokens and in parameters", place="", damage="", does="", loss=".3f", difference="+.4f", low="+.4f",
            high="+.4f", verdict="", clean_tokens=",.0f", worth=".2f", worth_low=".2f", worth_high=".2f", beyond="", left=".2f",
            of_size=".2f", of_size_low=".2f", of_size_high=".2f",
        )  # fmt: skip
        self.report.figure(
            "worth", f"What a spoilt token is worth in clean ones, with 95 % intervals, {_CODED}; arrow: the interval may go on "
            "beyond the least or most clean text that was tried; grey stroke: the share of lines that is the text's own",
            lambda axes: [self._draw_worth(rows, place, ax) for place, ax in zip(self.preset.places, axes, strict=True)],
            size=(10.2, 1.3 + 0.34 * len(self.preset.damages)), panels=2,
        )  # fmt: skip
        for place in self.preset.places:
            own = rows[(rows.place == place.name) & rows.damage.isin(STRONG)].sort_values("difference", ascending=False)
            told = "; ".join(f"{row.does} (`{row.damage}`) {self._share(row)}" for row in own.itertuples())
            self.findings.append(
                f"What a token is worth in clean ones, for the {place.name} model on {quantity(amount)} of them, where: {told}."
            )
        self._show_more(rows)

    def _open(self, row: tuple) -> tuple[bool, bool]:
        """Whether the lower and the upper end of a worth's interval stand at the least and the most clean text that was
        tried, and so are not known."""
        frontier = self.frontiers[row.place]
        least, most = (end * frontier.flops / row.tokens_seen for end in frontier.reach)
        below, above = (row.beyond == side for side in ("below", "above"))
        return below or row.worth_low <= 1.001 * least, above or row.worth_high >= 0.999 * most

    def _share(self, row: tuple) -> str:
        below, above = self._open(row)
        if below or above:
            bounds = [f"at least {row.worth_low:.0%}"] * (not below) + [f"at most {row.worth_high:.0%}"] * (not above)
            return bounds[0] if bounds else f"not known between {row.worth_low:.0%} and {row.worth_high:.0%}"
        return f"{row.worth:.0%} ({row.worth_low:.0%} to {row.worth_high:.0%})"

    def _draw_worth(self, rows: pd.DataFrame, place: Place, ax: object) -> None:
        rows = rows[rows.place == place.name]
        ax.axvline(1, color=plots.GREY, linewidth=1)
        for i, row in enumerate(rows.itertuples()):
            colour = _COLOURS[Damage.parse(row.damage).kind]
            below, above = self._open(row)
            ends = [row.worth_low / (1.06 if below else 1), row.worth_high * (1.06 if above else 1)]
            ax.plot(ends, [i, i], color=colour, linewidth=3, alpha=0.5, solid_capstyle="butt")
            for end, arrow, is_open in zip(ends, "<>", (below, above), strict=True):
                if is_open:
                    ax.plot(end, i, arrow, color=colour)
            if not row.beyond:
                ax.plot(row.worth, i, "o", color=colour)
            if row.left == row.left:
                ax.plot([row.left, row.left], [i - 0.35, i + 0.35], color=plots.GREY, linewidth=1.5)
        plots._log(ax, "x", "worth of a token in clean ones", plots._plain)
        ax.set_yticks(range(len(rows)), rows.damage)
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.grid(axis="y", visible=False)
        ax.set_title(place.name)

    def _show_more(self, rows: pd.DataFrame) -> None:
        """Whether more of a spoilt text, or more parameters on it, make up for the damage."""
        other = self.all[self.all.damage.notna() & ~self.all.variant.isin(rows.variant)]
        self.report.text(
            "Do more tokens or more parameters make up for a damage? All differences are to clean text of "
            f"{quantity(self.preset.amount)} tokens, read by the model of the place."
        )
        self.report.table(
            other, "more", "Spoilt text of other amounts, and read by four times the parameters (nats per token, 95 % intervals), "
            f"{_CODED}", place="", variant="", params_total=",.0f", tokens_seen=",.0f", loss=".3f", difference="+.4f",
            low="+.4f", high="+.4f", clean_tokens=",.0f", worth=".2f", worth_low=".2f", worth_high=".2f", beyond="",
        )  # fmt: skip
        twice = other[(other.times == 1) & (other.amount == 2 * self.preset.amount)]
        if len(twice):
            told = "; ".join(
                f"{place}: "
                + ", ".join(
                    f"`{row.damage}` {row.difference:+.3f} ({interval(row.low, row.high, '+.3f')})"
                    for row in own.itertuples()
                )
                for place, own in twice.groupby("place", sort=False)
            )
            better, worse = int((twice.high < 0).sum()), int((twice.low > 0).sum())
            self.findings.append(
                f"Of {len(twice)} cases, twice the tokens of a spoilt text clearly beat clean text in {better} (95 % interval "
                f"below zero), are clearly behind it in {worse} and cannot be told from it in {len(twice) - better - worse} "
                f"(nats, spoilt less clean): {told}."
            )

    def show_claim(self) -> None:
        """The comparisons that claim 7 is judged by, and tables/effects.csv."""
        spoilt = f"{CLAIMED}, {FOUR}"
        asked = [
            (place, part, one, base)
            for place in self.preset.places
            for part, one, base in (
                ("twice the size less twice the text", TWICE, MORE),
                ("damaged text at four times the size less clean text", spoilt, CLEAN),
            )
        ]
        rows = []
        for place, part, one, base in asked:
            frame = self.seeded[(self.seeded.place == place.name) & self.seeded.val_loss.notna()]
            runs = [frame[frame.reads == name].set_index("seed") for name in (one, base)]
            seeds = [seed for seed in self.seeds if all(seed in own.index for own in runs)]
            if not seeds:
                continue  # every pair diverged: ``claims`` says what it misses
            mean = float((runs[0].val_loss - runs[1].val_loss).loc[seeds].mean())
            sd, freedom = self.spread[place.name]
            error = sd / math.sqrt(len(seeds))
            ends = [mean + sign * error * stats.t.ppf(q, freedom) for q in (0.975, 0.95) for sign in (-1, 1)]
            p = float(2 * stats.t.sf(abs(mean) / error, freedom))
            ids = (own.run_id.loc[seeds].tolist() for own in runs)
            name = f"{place.name}: {part}"
            rows.append(
                claims.effects_row(name, mean, *ends, p=p, seeds=len(seeds), runs=next(ids), base_runs=next(ids))
            )
        self.effects = pd.DataFrame(rows, columns=list(claims.COLUMNS))
        self.effects["p"] = contrasts.holm(self.effects.p)
        write_table(self.folder / "tables" / "effects.csv", self.effects)
        self.report.section("Does better text beat a bigger model?")
        shown = self.effects.drop(columns=["runs", "base_runs"])
        self.report.text(
            "Two comparisons at each size, seed by seed, with the variance of a difference pooled over everything read there, "
            "and Holm's correction over all four. A positive difference speaks for the text: twice of it did better than twice the "
            "parameters, or the clean one better than a spoilt one with four times the parameters. The damaged text is "
            f"`{CLAIMED}`: {words(CLAIMED)}."
        )
        self.report.table(
            shown, "claim", "What claim 7 is judged by (nats per token, 95 % intervals, p after Holm)", part="", effect="+.4f",
            low="+.4f", high="+.4f", p=".2g", seeds="d",
        )  # fmt: skip
        self.report.figure(
            "claim", "Loss against that of clean text, with 95 % intervals: left of the line is better; "
            f"{CLAIMED}: {words(CLAIMED)}",
            lambda axes: [self._draw_claim(place, ax) for place, ax in zip(self.preset.places, axes, strict=True)],
            size=(10.2, 2.6), panels=2,
        )  # fmt: skip
        for row in self.effects.itertuples():
            part = row.part.replace("damaged text", f"damaged text (`{CLAIMED}`)")
            self.findings.append(f"{part}: {row.effect:+.3f} nats ({interval(row.low, row.high, '+.3f')}).")

    def _draw_claim(self, place: Place, ax: object) -> None:
        table = self.tables[place.name].set_index("variant")
        names = [name for name in (MORE, TWICE, FOUR, CLAIMED, f"{CLAIMED}, {FOUR}") if name in table.index]
        ax.axvline(0, color=plots.GREY, linewidth=1)
        for i, row in enumerate(table.loc[names].itertuples()):
            colour = plots.COLOURS[2] if row.high < 0 else plots.COLOURS[1] if row.low > 0 else plots.GREY
            ax.plot([row.low, row.high], [i, i], color=colour, linewidth=3, alpha=0.5, solid_capstyle="butt")
            ax.plot(row.difference, i, "o", color=colour)
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.4, -0.6)
        ax.locator_params(axis="x", nbins=6)
        ax.grid(axis="y", visible=False)
        ax.set_title(place.name)
        ax.set_xlabel("loss above clean text's (nats/token)")

    # Simple words -----------------------------------------------------------------------------------------------------------

    def _lines(self) -> int:
        """Lines of the validation part, alike in both parallel texts; kept beside the tables."""
        path = self.folder / "tables" / "lines.json"
        known = (
            read_kept(path, lambda kept: {text: int(lines) for text, lines in kept.items()}) if path.exists() else {}
        )
        if set(known) != set(self.pair):
            known = {}
            for name, where in pair_of(self.preset, self.folder).items():
                text = corpora.load(where)
                _, spans = corpora.split_spans(text.path)
                with open(text.path, "rb") as file:
                    known[name] = sum(piece.count("\n") for span in spans["val"] for piece in read_pieces(file, *span))
            files.write_whole(path, json.dumps(known) + "\n")
        if len(set(known.values())) > 1:
            told = ", ".join(f"{name} {count}" for name, count in known.items())
            raise LabError("Parallel texts have the same lines in the same parts", told, "name two that do")
        return next(iter(known.values()))

    def show_pair(self) -> None:
        """The same verses in simple and in rich words, in units that can be compared."""
        lines, rows, losses = self._lines(), [], {}
        for place in self.preset.places:
            for name, facts in self.pair.items():
                own = self.seeded[(self.seeded.place == place.name) & (self.seeded.reads == name)].set_index("seed")
                each = facts["tokens"]["val"] / lines
                losses[place.name, name] = own.val_loss * each
                rows.append(
                    {"place": place.name, "text": name, "tokens_read": own.tokens_seen.mean(), "tokens_a_line": each,
                     "bytes_a_line": facts["bytes"]["val"] / lines, "loss": own.val_loss.mean(), "bits_a_byte": own.val_bpb.mean(),
                     "nats_a_line": (own.val_loss * each).mean()}
                )  # fmt: skip
        table = pd.DataFrame(rows)
        one, other = self.pair
        pairs = {p.name: (losses[p.name, one] - losses[p.name, other]).dropna() for p in self.preset.places}
        sd, freedom = paired_spread(losses)
        differences = []
        for place, pair in pairs.items():
            half = sd / math.sqrt(len(pair)) * stats.t.ppf(0.975, freedom)
            nats = table[table.place == place].set_index("text").nats_a_line
            differences.append(
                {"place": place, "difference": pair.mean(), "low": pair.mean() - half, "high": pair.mean() + half,
                 "percent": 100 * pair.mean() / nats[other], "percent_low": 100 * (pair.mean() - half) / nats[other],
                 "percent_high": 100 * (pair.mean() + half) / nats[other]}
            )  # fmt: skip
        gaps = pd.DataFrame(differences)
        self.report.section("The same in simple words")
        self.report.text(
            f"`{one}` and `{other}` say the same, line by line, in other words; the parts are cut by lines, so that both are "
            f"trained and judged on the same ones ({lines:,} of validation, all scored but for an unfinished window). Each has "
            "a tokenizer of its own, and their bytes differ too, so that neither nats a token nor bits a byte say which is "
            "easier. Nats a line do: what the model still needs to be told of the same content."
        )
        self.report.table(
            table, "pair", "Two texts of the same lines, each read once (means over seeds; loss in nats per token)", place="",
            text="", tokens_read=",.0f", tokens_a_line=".1f", bytes_a_line=".1f", loss=".3f", bits_a_byte=".3f", nats_a_line=".2f",
        )  # fmt: skip
        self.report.table(
            gaps, "pair_gaps", f"Nats a line of {one} less {other}'s, with 95 % intervals, and as a share of the latter", place="",
            difference="+.2f", low="+.2f", high="+.2f", percent="+.1f", percent_low="+.1f", percent_high="+.1f",
        )  # fmt: skip
        self.report.figure(
            "pair", "The same lines in two wordings: a mark a seed, side by side, and a line through the means; the axes do not "
            "begin at zero",
            lambda axes: self._draw_pair(axes, losses), size=(8.4, 3.4), panels=2,
        )  # fmt: skip
        told = "; ".join(
            f"{row.place} {row.percent:+.1f} % ({interval(row.percent_low, row.percent_high, '+.1f')})"
            for row in gaps.itertuples()
        )
        bits = "; ".join(
            f"{place} {' and '.join(f'{value:.3f}' for value in rows.bits_a_byte)}"
            for place, rows in table.groupby("place", sort=False)
        )
        self.findings.append(
            f"Per line of the same content {one} costs, against {other}: {told} of the nats. In bits a byte ({one} and {other}): "
            f"{bits}."
        )

    def _draw_pair(self, axes: object, losses: dict[tuple[str, str], pd.Series]) -> None:
        sizes = [counts.parameters(self.model(place.shape))["total"] for place in self.preset.places]
        for ax, unit in zip(axes, ("nats a line", "bits a byte"), strict=True):
            for colour, marker, name in zip(plots.COLOURS, plots.MARKERS, self.pair, strict=False):
                seen = []
                for place in self.preset.places:
                    own = self.seeded[(self.seeded.place == place.name) & (self.seeded.reads == name)]
                    seen.append(losses[place.name, name] if unit == "nats a line" else own.val_bpb)
                ax.plot(sizes, [values.mean() for values in seen], color=colour, label=name)
                for size, values in zip(sizes, seen, strict=True):
                    beside = size * 1.03 ** (np.arange(len(values)) - (len(values) - 1) / 2)
                    ax.plot(beside, values, marker, color=colour, markersize=4, linestyle="none")
            plots._log(ax, "x", plots.PARAMS)
            ax.set_ylabel(unit)
            ax.margins(y=0.1)
        axes[0].legend()

    def end(self) -> None:
        self.finish([self.tuned, self.seeded], ("place", "reads"))
