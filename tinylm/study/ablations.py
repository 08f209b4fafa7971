"""The ablations, step by step: what studies/ablations.ipynb narrates.

One choice of the architecture is changed at a time, at two fixed places: a size and a compute each. Every variant has its own
best learning rate, found on one seed; then it meets the baseline on other seeds, batch by batch the same. What its
difference in loss is worth in compute is read off the baseline's own frontier around the place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from tinylm import backend, counts, files
from tinylm.config import ModelConfig, TrainConfig
from tinylm.errors import ConfigError, LabError, TextError
from tinylm.study import claims, contrasts, planner, plots, scaling
from tinylm.study.design import SIZE_GROWTH, bracket, tune
from tinylm.study.multipliers import Frontier, fit_frontier, multipliers
from tinylm.study.parameters import AblationParameters, within_repository
from tinylm.study.report import interval, write_table
from tinylm.study.runs import Run, read_kept
from tinylm.study.sections import SectionStudy
from tinylm.study.steps import have, known_text
from tinylm.words import quantity

# ------------------------------------------------------------------------------------------------------------------ as data


@dataclass(frozen=True)
class Variant:
    """One change of the baseline. choice: which of the six choices it belongs to; empty for a reader's own. change: the fields
    of ModelConfig that it changes. Where that changes the number of parameters by more than 1 %, intermediate_size makes up
    for it, and the variant as people use it stands beside it under its name with ``AS_USED``."""

    choice: str
    change: dict = field(hash=False)

    @property
    def primary(self) -> bool:
        """Whether Holm's correction counts it."""
        return bool(self.choice)


BASELINE, AS_USED = "baseline", " as used"
VARIANTS = {
    "layernorm": Variant("norm", {"norm": "layernorm"}),
    "post-norm": Variant("norm position", {"norm_position": "post"}),
    "gelu": Variant("mlp", {"mlp": "gelu"}),
    "relu": Variant("mlp", {"mlp": "relu"}),
    "learned": Variant("position", {"position": "learned"}),
    "sinusoidal": Variant("position", {"position": "sinusoidal"}),
    "none": Variant("position", {"position": "none"}),
    "gqa by 2": Variant("heads", {"num_kv_heads": 3}),
    "gqa by 3": Variant("heads", {"num_kv_heads": 2}),
    "mqa": Variant("heads", {"num_kv_heads": 1}),
    "untied": Variant("embeddings", {"tie_embeddings": False}),
    # A reader's own: see CONTRIBUTING.md.
    "relu2": Variant("", {"mlp": "relu2"}),
    "qk-norm": Variant("", {"qk_norm": True}),
}
EQUAL = 0.01  # how far the totals of "equal" parameters may lie apart
# Compute of the frontier's budgets over the place's. The compute study's families stand half a decade apart, so that no four
# of them lie between C/4 and 4C: the study trains a frontier of its own.
LADDER = (0.25, 0.5, 1.0, 2.0)
ROUNDS = 5  # in which speeds are taken, every variant in each
LOOKS = (0.01, 0.04)  # the level of the first look at a contrast and of the second: 5 % in all, however often one looks
NULL = (
    5,
    1000,
    100_000,
)  # the null test: seeds against seeds, splits, and splits that leave little to the draw of them
CHECKED = 1.15  # a multiplier at least so far from 1 is checked by a direct run


@dataclass(frozen=True)
class Place:
    """A fixed point. shape: hidden_size, num_layers and num_heads of the baseline (six heads, so that keys and values can be
    shared by two, by three, or by all); flops: of its run. pilot: seeds of the baseline; first: seeds of a variant at the
    first look; most: at the second, where the first leaves it undecided. beside: the variants that are also shown as people
    use them."""

    name: str
    shape: tuple[int, int, int]
    flops: float
    pilot: int
    first: int
    most: int
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preset:
    """How much a preset measures. places: the two points; ladder_seeds: seeds at each other budget of the frontier; planted:
    seeds of the variant that is made worse on purpose; checks: multipliers held against direct runs, with ``check_seeds``
    seeds a side, a look at each number; moves: how often a bracket of rates may move outward; draws: of an interval;
    variants: those it tries, where not all; eval_tokens: of each evaluation; clock: seconds for the speed of one variant;
    compile: all runs, short ones too, so that all are computed alike (where a C++ compiler is found); None leaves it to each
    run's length."""

    places: tuple[Place, Place]
    ladder_seeds: int = 4
    planted: int = 20
    checks: int = 2
    check_seeds: tuple[int, ...] = (20, 48)
    moves: int = 2
    draws: int = 2000
    variants: tuple[str, ...] = tuple(VARIANTS)
    eval_tokens: int = TrainConfig.eval_tokens
    clock: float = 4.0
    compile: bool | None = None


_BESIDE = ("learned", "gqa by 2", "gqa by 3", "mqa", "untied")
# The places of the full preset: near the best size of their compute, five times apart in compute, and cheap enough that three
# rates a variant and the seeds fit into some 3.3e14 FLOPs.
PRESETS = {
    "smoke": Preset(
        (
            Place("small", (24, 1, 6), 1.5e9, pilot=10, first=2, most=3, beside=("gqa by 3",)),
            Place("large", (36, 1, 6), 3e9, pilot=3, first=2, most=2, beside=("gqa by 3",)),
        ),
        ladder_seeds=2, planted=6, checks=1, check_seeds=(2,), moves=0, draws=300, eval_tokens=4096, clock=0.02,
        variants=("gelu", "relu", "gqa by 3"),
    ),
    "quick": Preset(
        (
            Place("small", (24, 2, 6), 5e10, pilot=20, first=3, most=6, beside=("gqa by 3", "untied")),
            Place("large", (36, 2, 6), 2e11, pilot=5, first=3, most=4, beside=("gqa by 3",)),
        ),
        ladder_seeds=3, moves=1, check_seeds=(3,), clock=0.3,
    ),
    "full": Preset(
        (
            Place("small", (36, 2, 6), 2.5e11, pilot=20, first=5, most=20, beside=_BESIDE),
            Place("large", (60, 2, 6), 1.25e12, pilot=8, first=3, most=6, beside=("gqa by 3", "untied")),
        ),
        compile=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One model at a place, to be trained at several rates and seeds. kind: ``equal``, ``as used`` or ``ladder``."""

    place: Place
    name: str
    model: ModelConfig
    tokens: float
    kind: str = "equal"

    @property
    def flops(self) -> float:
        return self.tokens * counts.train_flops_per_token(self.model, self.model.max_seq_len)


def with_total(model: ModelConfig, total: float) -> ModelConfig | None:
    """The model with the intermediate_size that brings its parameters nearest to ``total``; None where that is not within
    1 %, or leaves no feed-forward."""
    model = model.resolve()
    parts = counts.parameters(model)
    each = parts["mlp"] // model.intermediate_size
    size = round((total - parts["total"] + parts["mlp"]) / each)
    if size < 1:
        return None
    model = model.replace(intermediate_size=size)
    return model if abs(counts.parameters(model)["total"] / total - 1) <= EQUAL else None


def begin(settings: AblationParameters) -> Ablations:
    """The study. Seals the rules of the claims that it serves, before its first run. Raises ConfigError for a variant that is
    not known, LabError where the folder's report tells of variants that a report of the chosen ones would lose, TextError for a
    text that the runs would have to read twice."""
    preset = PRESETS[settings.preset]
    names = settings.chosen or preset.variants
    for name in names:
        if name not in VARIANTS:
            raise ConfigError(
                "A variant is named by a line of VARIANTS in tinylm/study/ablations.py", f"variants={name!r}",
                f"the names are {', '.join(VARIANTS)}",
            )  # fmt: skip
    if settings.chosen and (lost := [name for name in _reported(settings.folder) if name not in names]):
        raise LabError(
            "A report is not replaced by one of fewer variants",
            f"variants={settings.variants!r}; the report in {within_repository(settings.folder)} also tells of {', '.join(lost)}",
            f"name those too, whose runs are kept (variants={','.join([*lost, *names])}), or give another results_dir",
        )
    compiled = preset.compile if backend.cpp_compiler() else None
    study = Ablations(settings, dataclasses.replace(preset, variants=names, compile=compiled), known_text(settings))
    most = max(trial.tokens for trial in study.trials())
    if (there := study.corpus["tokens"]["train"]) < most:
        raise TextError(
            f"The {settings.preset} preset of this study reads {most:,.0f} training tokens once",
            f"{there:,}",
            "choose a smaller preset or another text; `tinylm study quickstart` takes small texts",
        )
    claims.seal(study.folder, settings.study)
    return study


def _reported(folder: Path) -> list[str]:
    """The variants that the report in a folder tells of; none where there is no report that can be read."""
    found: list[str] = []
    for path in sorted((folder / "tables").glob("contrasts_*.csv")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            found += [name.removesuffix(AS_USED) for name in pd.read_csv(path)["variant"].astype(str)]
    return list(dict.fromkeys(found))


class Ablations(SectionStudy):
    """What each choice of the architecture is worth, in loss and in compute."""

    title = "What each choice of the architecture is worth on {text}"

    # The plan -------------------------------------------------------------------------------------------------------------

    def trials(self) -> list[Trial]:
        """All models: at each place the baseline, the variants, those as used, and the baseline at the frontier's budgets."""
        self.left_out: list[str] = []
        return [trial for place in self.preset.places for trial in (*self._variants(place), *self._ladder(place))]

    def _variants(self, place: Place) -> list[Trial]:
        base = self.model(place.shape)
        total = counts.parameters(base)["total"]
        tokens = place.flops / counts.train_flops_per_token(base, self.recipe.seq_len)
        found = [Trial(place, BASELINE, base, tokens)]
        for name in self.preset.variants:
            model = self.recipe.model(place.shape, self.settings.vocab_size, **VARIANTS[name].change)
            own = counts.parameters(model)["total"]
            equal = model if abs(own / total - 1) <= EQUAL else with_total(model, total)
            if equal is None:
                self.left_out.append(f"{name} at the {place.name} place")
            else:
                found.append(Trial(place, name, equal, tokens))
            if equal is not model and (name in place.beside or equal is None):
                found.append(Trial(place, name + AS_USED, model, tokens, "as used"))
        return found

    def _ladder(self, place: Place) -> list[Trial]:
        return [self.grown(place, factor) for factor in LADDER if factor != 1]

    def grown(self, place: Place, factor: float) -> Trial:
        """The baseline at another compute, sizes growing as its 0.45th power through the place: the heads and the width whose
        usual proportions come nearest to that size, and the intermediate_size that closes the gap."""
        hidden, layers, heads = place.shape
        total = counts.parameters(self.model(place.shape))["total"] * factor**SIZE_GROWTH
        shapes = [
            (width, layers, number)
            for number in range(max(1, heads - 2), heads + 1)
            for width in range(2 * number, 4 * hidden + 1, 2 * number)
        ]
        models = {shape: self.model(shape) for shape in shapes}
        ordered = sorted(models, key=lambda s: abs(math.log(counts.parameters(models[s])["total"] / total)))
        model = next(found for shape in ordered if (found := with_total(models[shape], total)) is not None)
        tokens = factor * place.flops / counts.train_flops_per_token(model, self.recipe.seq_len)
        return Trial(place, f"{BASELINE} x {factor:g}", model, tokens, "ladder")

    def runs_of(
        self, trial: Trial, rates: list[float], seed: int | None = None, family: str = "rates", **changes
    ) -> list[Run]:
        tags = {"place": trial.place.name, "variant": trial.name, "family": family, "budget": trial.place.flops}
        seed = self.settings.seed if seed is None else seed
        options = {"eval_tokens": self.preset.eval_tokens, "compile": self.preset.compile, **changes}
        trains = [self.recipe.train(trial.model, trial.tokens, rate, seed, **options) for rate in rates]
        return [Run(trial.model, train, self.data, tags) for train in trains]

    def guesses(self, trial: Trial) -> list[float]:
        return bracket(self.recipe.learning_rate(counts.parameters(trial.model)["total"]))

    def seeds(self, count: int, first: int = 0) -> range:
        """Seeds of comparisons: none of them chose a rate."""
        start = self.settings.seed + 1
        return range(start + first, start + count)

    def with_seeds(self, trial: Trial, rate: float, seeds: Iterable[int], family: str, **changes) -> list[Run]:
        return [run for seed in seeds for run in self.runs_of(trial, [rate], seed, family, **changes)]

    # Training -------------------------------------------------------------------------------------------------------------

    def train(self, runs: list[Run], **options: object) -> pd.DataFrame:
        """Records of the runs. Raises LabError where one failed: a full disk must not pass for a variant that diverges."""
        frame = super().train(runs, **options)
        if len(broken := frame[frame.status == "failed"]):
            raise LabError(
                "Every run that is compared must end, if only by diverging",
                f"{len(broken)} failed; the first: {broken.reason.iloc[0]}",
                "start the study again: what failed is tried again",
            )
        return frame

    def stages(self, train: Callable[..., pd.DataFrame]) -> list[pd.DataFrame]:
        """Rates; then the baseline's seeds, the frontier's and a first look at all; then more seeds for what is undecided, and
        the two checks: a variant made worse on purpose, and the baseline at the compute that a multiplier says."""
        trials = self.trials()
        tuned = tune(trials, self.runs_of, self.guesses, train, self.preset.moves)
        order = {(trial.place.name, trial.name): number for number, trial in enumerate(trials)}
        rates = scaling.best_learning_rate(tuned, ("place", "variant"))
        self.rates = rates.iloc[np.argsort([order[key] for key in zip(rates.place, rates.variant, strict=True)])]
        best = {(row.place, row.variant): float(f"{row.learning_rate:.3g}") for row in self.rates.itertuples()}
        self.trial_of = {(trial.place.name, trial.name): trial for trial in trials}
        alive = [trial for trial in trials if (trial.place.name, trial.name) in best]  # others diverged at every rate
        self.rate_of = best

        def rate(trial: Trial) -> float:
            return best[trial.place.name, trial.name]

        runs = [
            run
            for trial in alive
            for run in self.with_seeds(trial, rate(trial), self.seeds(self._first(trial)), "seeds")
        ]
        first = train(runs)
        self.planned = {place.name: self._plan_seeds(place, first) for place in self.preset.places}
        undecided = [
            trial
            for place in self.preset.places
            for name in self.effects(first, place, 1).query("verdict == 'undecided'").variant
            for trial in [self.trial_of[place.name, name]]
        ]
        more = [
            run
            for trial in undecided
            for run in self.with_seeds(
                trial, rate(trial), self.seeds(self.planned[trial.place.name]["seeds"], trial.place.first), "seeds"
            )
        ]
        more += [
            run
            for place in self.preset.places
            for run in self.with_seeds(
                self.trial_of[place.name, BASELINE], best[place.name, BASELINE],
                self.seeds(self.planned[place.name]["seeds"], place.pilot), "seeds",
            )
        ]  # fmt: skip
        planted = self._planted_runs(first)
        second = train([*more, *planted])
        seeded = pd.concat([first, second.iloc[: len(more)]], ignore_index=True)
        asked = self._check_runs(seeded)
        checks = train(asked) if asked else pd.DataFrame()
        return [tuned, seeded, second.iloc[len(more) :], checks]

    def _first(self, trial: Trial) -> int:
        if trial.kind == "ladder":
            return self.preset.ladder_seeds
        return trial.place.pilot if trial.name == BASELINE else trial.place.first

    def _plan_seeds(self, place: Place, first: pd.DataFrame) -> dict:
        """The seeds of the second look, from the spread of the baseline's seeds alone: enough to tell a difference of 0.015
        nats from zero, corrected for all primary contrasts, and to show equality; no more than the preset allows."""
        losses = self.losses(first, place)[BASELINE].dropna()
        sd, level = float(losses.std()), LOOKS[1]
        pair = sd * math.sqrt(2)  # if a seed did not move both alike
        family = level / max(1, len(self._primary()))
        tell = contrasts.seeds_for(lambda n: contrasts.power_to_tell(contrasts.PLANTED, pair, n, family))
        equal = contrasts.seeds_for(lambda n: contrasts.power_to_equal(contrasts.MARGIN, pair, n, level))
        seeds = max(place.first, min(place.most, max(tell, equal)))
        return {
            "place": place.name, "baseline_seeds": len(losses), "seed_sd": sd, "pair_sd": pair, "to_tell": tell,
            "to_equal": equal, "seeds": seeds,
            "power_to_tell": contrasts.power_to_tell(contrasts.PLANTED, pair, seeds, family),
            "power_to_equal": contrasts.power_to_equal(contrasts.MARGIN, pair, seeds, level),
        }  # fmt: skip

    def _primary(self) -> list[str]:
        return [name for name in self.preset.variants if VARIANTS[name].primary] or list(self.preset.variants)

    def _planted_trial(self, frontier: Frontier, place: Place) -> Trial:
        """The baseline with as many tokens taken away as the frontier says for 0.015 nats."""
        base = self.trial_of[place.name, BASELINE]
        kept = math.exp(-contrasts.PLANTED / frontier.slope)
        return dataclasses.replace(base, name="planted", tokens=base.tokens * kept)

    def _planted_runs(self, first: pd.DataFrame) -> list[Run]:
        place = self.preset.places[0]
        trial = self._planted_trial(self.frontier(first, place), place)
        batch = self.recipe.batch_size(self.trial_of[place.name, BASELINE].tokens)
        rate, seeds = self.rate_of[place.name, BASELINE], self.seeds(min(self.preset.planted, place.pilot))
        return self.with_seeds(trial, rate, seeds, "planted", batch_size=batch)

    def _check_runs(self, seeded: pd.DataFrame) -> list[Run]:
        """The baseline at the compute that a multiplier says, for those that are farthest from 1, on both sides if any are."""
        place = self.preset.places[0]
        frontier, table = self.frontier(seeded, place), self.worth(seeded, place)
        known = table[table.multiplier.notna() & (table.kind == "equal")]
        far = known[np.abs(np.log(known.multiplier)) >= math.log(CHECKED)].sort_values("multiplier")
        picks = list(dict.fromkeys([*far.variant.head(1), *far.variant[far.multiplier > 1].tail(1), *far.variant]))
        ladder = [self.trial_of[place.name, f"{BASELINE} x {f:g}" if f != 1 else BASELINE] for f in LADDER]
        log_rates = [math.log(self.rate_of[place.name, trial.name]) for trial in ladder]
        self.checked = {}
        runs = []
        for name in picks[: self.preset.checks]:
            row = known.set_index("variant").loc[name]
            factor = float(f"{row.multiplier * row.flops / frontier.flops:.4g}")
            trial = dataclasses.replace(self.grown(place, factor), name=f"{BASELINE} for {name}")
            rate = float(f"{math.exp(np.interp(math.log(factor), np.log(LADDER), log_rates)):.3g}")
            self.checked[name] = factor
            seeds = self.seeds(max(self.preset.check_seeds))
            runs += self.with_seeds(trial, rate, seeds, "check")
            known_seeds = self.losses(seeded, place)[name].dropna().index
            own = [
                seed for seed in seeds if seed not in known_seeds
            ]  # only for this comparison: the contrasts are decided
            runs += self.with_seeds(self.trial_of[place.name, name], self.rate_of[place.name, name], own, "check")
        return runs

    def expected_runs(self) -> list[Run]:
        """All runs, at guessed rates, with every contrast undecided at the first look: the most that the study may cost, but for
        brackets that move."""
        runs = []
        for trial in self.trials():
            rates = self.guesses(trial)
            place, count = trial.place, self._first(trial)
            if trial.kind != "ladder":
                count = max(count, place.most)
            runs += self.runs_of(trial, rates) + self.with_seeds(trial, rates[1], self.seeds(count), "seeds")
        place = self.preset.places[0]
        base = Trial(place, "planted", self.model(place.shape), 0.9 * place.flops / counts.train_flops_per_token(
            self.model(place.shape), self.recipe.seq_len))  # fmt: skip
        runs += self.with_seeds(base, self.guesses(base)[1], self.seeds(self.preset.planted), "planted")
        for factor in (0.8, 1.2)[: self.preset.checks]:
            trial = self.grown(place, factor)
            runs += self.with_seeds(trial, self.guesses(trial)[1], self.seeds(max(self.preset.check_seeds)), "check")
        return runs

    def measure(self) -> None:
        self.tuned, self.seeded, self.planted, self.checks = self.stages(self.train)
        self.tables = {place.name: self.worth(self.seeded, place) for place in self.preset.places}

    # Judging --------------------------------------------------------------------------------------------------------------

    def losses(self, frame: pd.DataFrame, place: Place) -> dict[str, pd.Series]:
        """The losses of each variant at a place, by seed."""
        own = frame[frame.place == place.name].drop_duplicates(["variant", "seed"])
        names = [t.name for t in self.trial_of.values() if t.place == place and t.kind != "ladder"]
        found = {name: own[own.variant == name].set_index("seed").val_loss for name in names}
        return {name: losses for name, losses in found.items() if len(losses)}

    def effects(self, frame: pd.DataFrame, place: Place, look: int) -> pd.DataFrame:
        """The contrasts of a place at the first or the second look."""
        return contrasts.effects(
            self.losses(frame, place), BASELINE, self._primary(), alpha=LOOKS[look - 1]
        )  # fmt: skip

    def worth(self, frame: pd.DataFrame, place: Place) -> pd.DataFrame:
        """The contrasts of a place in all units. A contrast that the first look decided stays as that look told it, interval and
        p too."""
        seeds = list(self.seeds(max(place.first, 1)))
        early = self.effects(frame[(frame.variant == BASELINE) | frame.seed.isin(seeds)], place, 1)
        table = self.effects(frame, place, 2)
        told = early.set_index("variant").reindex(table.variant).reset_index()
        decided = told.verdict.fillna("undecided") != "undecided"
        for name in early.columns.drop(["variant", "seeds", "diverged", "loss", "seed_sd", "difference", "primary"]):
            table[name] = told[name].where(decided, table[name])
        table["more_seeds"] = table.more_seeds.where(table.verdict == "undecided", 0)
        table["look"] = np.where(decided, 1, 2)
        trials = {name: self.trial_of[place.name, name] for name in table.variant}
        own = frame[frame.place == place.name].groupby("variant")
        bits = (frame.val_bpb / frame.val_loss).median()
        table["choice"] = [self._choice(name) for name in table.variant]
        table["kind"] = [trial.kind for trial in trials.values()]
        table["params_total"] = [counts.parameters(trial.model)["total"] for trial in trials.values()]
        table["params_non_embedding"] = [counts.parameters(trial.model)["non_embedding"] for trial in trials.values()]
        table["intermediate_size"] = [trial.model.resolve().intermediate_size for trial in trials.values()]
        table["flops"] = own.flops.max().reindex(table.variant).to_numpy()
        table["bpb"] = table.difference * bits
        table["bpb_low"], table["bpb_high"] = table.low * bits, table.high * bits
        sd = self.losses(frame, place)[BASELINE].std()
        table["noise"], table["noise_low"], table["noise_high"] = table.difference / sd, table.low / sd, table.high / sd
        table["place"] = place.name
        return table.merge(multipliers(self.frontier(frame, place), table, self.settings.seed), on="variant")

    def _pooled(self, place: Place) -> tuple[float, float]:
        """The standard deviation of a paired difference at a place, by all its seeds, and its degrees of freedom."""
        losses = self.losses(self.seeded, place)
        base = losses[BASELINE]
        pairs = {name: (own - base.reindex(own.index)).dropna() for name, own in losses.items() if name != BASELINE}
        return contrasts.pooled_spread(pairs)

    @staticmethod
    def _choice(name: str) -> str:
        return VARIANTS[name.removesuffix(AS_USED)].choice

    def frontier(self, frame: pd.DataFrame, place: Place) -> Frontier:
        """The baseline's loss around a place: its budgets' seeds, its own among them."""
        names = {f"{BASELINE} x {factor:g}": factor for factor in LADDER if factor != 1} | {BASELINE: 1.0}
        own = frame[(frame.place == place.name) & frame.variant.isin(list(names))].drop_duplicates(["variant", "seed"])
        base = float(own.flops[own.variant == BASELINE].mean())
        return fit_frontier(own.assign(budget=own.variant.map(names)), base, self.preset.draws, self.settings.seed)

    # Telling --------------------------------------------------------------------------------------------------------------

    def describe_places(self) -> None:
        """The two places, and the variants as data."""
        self.trials()
        rows = [
            {"place": p.name, "model": f"{p.shape[0]} x {p.shape[1]}, {p.shape[2]} heads",
             "params_total": counts.parameters(self.model(p.shape))["total"], "flops": p.flops,
             "tokens_seen": p.flops / counts.train_flops_per_token(self.model(p.shape), self.recipe.seq_len),
             "pilot": p.pilot, "first": p.first, "most": p.most}
            for p in self.preset.places
        ]  # fmt: skip
        lines = [f'"{name}": {VARIANTS[name].change}' for name in self.preset.variants]
        self.report.section("What is compared")
        self.report.text(
            "The baseline is the recipe's architecture. Each variant changes one thing:\n\n```python\n"
            + "\n".join(lines)
            + "\n```"
        )
        self.report.text(
            f"Variants have as many parameters as the baseline, in all and within {EQUAL:.0%}, by the width of their "
            "feed-forward, and "
            "read the same tokens in the same order. Where a change alters the count, the variant as people use it (`as used`) "
            "stands beside. Each has at least three learning rates, a factor of two apart, on one seed; it is compared at the "
            "vertex of the parabola through them, on other seeds than that one."
        )
        self.report.table(
            pd.DataFrame(rows), "places", "The two places: seeds of the baseline (pilot), of a variant at the first "
            "look, and the "
            "most that it may have", place="", model="", params_total=",.0f", flops=".2g", tokens_seen=",.0f", pilot="d",
            first="d", most="d",
        )  # fmt: skip
        if self.left_out:
            self.report.text(
                f"No feed-forward is left at equal parameters for {', '.join(self.left_out)}: shown as used only."
            )

    def show_noise(self) -> None:
        """The spread between seeds, the null test on it, and the power that follows."""
        baseline = self.seeded[self.seeded.variant == BASELINE].drop_duplicates(["place", "seed"])
        self.noise = baseline[baseline.val_loss.notna()]
        super().show_noise()
        plan = pd.DataFrame(self.planned.values())
        self.report.table(
            plan, "power", "Power, before any contrast was seen: the seeds that would tell 0.015 nats from zero, "
            "corrected for all "
            "primary contrasts, and that would show equality within 0.01 nats, each in four cases of five, if a "
            "seed did not move "
            "variant and baseline alike (pair_sd); what is planned, and the power of that", place="", baseline_seeds="d",
            seed_sd=".4f", pair_sd=".4f", to_tell="d", to_equal="d", seeds="d", power_to_tell=".2f", power_to_equal=".2f",
        )  # fmt: skip
        losses = self.noise.val_loss[self.noise.place == self.preset.places[0].name].to_numpy()
        size = min(NULL[0], len(losses) // 2)
        nulls = [contrasts.null_test(losses, size, splits, seed=self.settings.seed) for splits in NULL[1:]]
        write_table(self.folder / "tables" / "null_test.csv", pd.DataFrame(nulls))
        said = (
            f"A null test: {len(losses)} seeds of the baseline, split at random into {size} against {size}, are told apart in "
            f"{nulls[1]['rate']:.1%} of {NULL[2]:,} splits at 5 % without correction; of the {NULL[1]:,} that were planned, in "
            f"{nulls[0]['rate']:.1%}"
        )
        self.report.text(f"{said}.")
        self.findings.append(f"{said}.")

    def show_learning_rates(self) -> None:
        edges = int((self.rates.edge != "").sum())
        lost = [" at the ".join(key[::-1]) for key in self.trial_of if key not in self.rate_of]
        self.report.section("Learning rates")
        self.report.text(
            f"{len(self.rates)} models were trained at three rates or more; the bracket moved outward while its best "
            f"rate lay at an edge, at most {self.preset.moves} times; {edges} still {have(edges)} theirs there."
            + (f" Diverged at every rate: {', '.join(lost)}." if lost else "")
        )
        base = self.rates[self.rates.variant == BASELINE].set_index("place").learning_rate
        table = self.rates.assign(over_baseline=self.rates.learning_rate / self.rates.place.map(base))
        self.report.table(
            table, "learning_rates", "The best rate of each model (a vertex, or the best run where `edge` says on which "
            "side it lies), "
            "also over the baseline's", place="", variant="", learning_rate=".3g", over_baseline=".2f", rates="d", edge="",
        )  # fmt: skip

    def show_contrasts(self) -> None:
        """Each variant against the baseline, in nats, bits per byte and units of noise."""
        self.all = pd.concat(self.tables.values(), ignore_index=True)
        order = {name: i for i, name in enumerate([*VARIANTS, *(n + AS_USED for n in VARIANTS)])}
        self.all = self.all.sort_values(["place", "variant"], key=lambda c: c.map(order) if c.name == "variant" else -c.map(
            {place.name: -i for i, place in enumerate(self.preset.places)}), ignore_index=True)  # fmt: skip
        primary = ", ".join(self._primary())
        self.report.section("What each variant does to the loss")
        self.report.text(
            "A positive difference means that the variant is worse. Differences are paired by seed and their variance is pooled "
            f"over the variants of a place, unless Levene's test tells their spreads apart at {contrasts.ALIKE:.0%}: then a "
            "variant whose own spread gives the wider interval has that one (`own spread`). The spreads: "
            f"{'; '.join(self._alike(place) for place in self.preset.places)}. Holm's correction runs over the contrasts named "
            f"as primary at a place: {primary}. `equal` is what two one-sided tests show to lie within {contrasts.MARGIN} nats "
            f"of the baseline. A contrast is looked at twice, first at a level of {LOOKS[0]:.0%} and, where that leaves it "
            f"undecided, with more seeds at {LOOKS[1]:.0%}, and its interval is of that look: 5 % in all. `noise` is the "
            "difference in standard deviations of the baseline's seeds."
        )
        for place in self.preset.places:
            own = self.all[self.all.place == place.name]
            self.report.table(
                own, f"contrasts_{place.name}", f"The {place.name} place: differences with their intervals, in nats per "
                "token, in bits per byte and in units of noise; p after Holm for the primary ones; the verdict, and how many "
                "seeds would tell the difference from zero or show it equal, were it what it seems", variant="", seeds="d",
                params_total=",.0f", intermediate_size="d", difference="+.4f", low="+.4f", high="+.4f", bpb="+.4f",
                bpb_low="+.4f", bpb_high="+.4f", noise="+.1f", noise_low="+.1f", noise_high="+.1f", own_spread="", p=".2g",
                p_holm=".2g", verdict="", more_seeds="d",
            )  # fmt: skip
        self.report.figure(
            "contrasts", "Differences to the baseline with their intervals; grey band: equal; hollow: undecided; diamond: as used",
            lambda axes: [self._draw_contrasts(place, ax) for place, ax in zip(self.preset.places, axes, strict=True)],
            size=(10.4, 1.2 + 0.33 * self.all.groupby("place").size().max()), panels=2,
        )  # fmt: skip
        for place in self.preset.places:
            own = self.all[(self.all.place == place.name) & self.all.primary]
            said = [
                f"{verdict}: {', '.join(f'{r.variant} ({r.difference:+.3f})' for r in rows.itertuples())}"
                for verdict, rows in own.groupby("verdict")
            ]
            self.findings.append(f"At the {place.name} place, against the baseline (nats): {'; '.join(said)}.")
        self._write_effects()

    def _alike(self, place: Place) -> str:
        table = self.tables[place.name]
        unlike = table.unlike[table.look.idxmax()]
        if np.isnan(unlike):
            return f"too few seeds to tell at the {place.name} place"
        return f"{'' if unlike < contrasts.ALIKE else 'not '}told apart at the {place.name} place (p = {unlike:.2g})"

    def _draw_contrasts(self, place: Place, ax: object) -> None:
        rows = self.all[self.all.place == place.name].reset_index(drop=True)
        colours = {"worse": plots.COLOURS[1], "better": plots.COLOURS[2], "equal": plots.COLOURS[0]}
        ax.axvspan(-contrasts.MARGIN, contrasts.MARGIN, color=plots.GREY, alpha=0.15, linewidth=0)
        ax.axvline(0, color=plots.GREY, linewidth=1)
        for i, row in enumerate(rows.itertuples()):
            colour = colours.get(row.verdict, plots.GREY)
            ax.plot([row.low, row.high], [i, i], color=colour, linewidth=2.5, solid_capstyle="butt")
            face = colour if row.verdict in colours else "white"
            ax.plot(row.difference, i, "o" if row.kind == "equal" else "D", color=colour, markerfacecolor=face)
        ax.set_yticks(range(len(rows)), rows.variant)
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.locator_params(axis="x", nbins=6)
        ax.grid(axis="y", visible=False)
        ax.set_title(
            f"{place.name}: {quantity(counts.parameters(self.model(place.shape))['total'])} parameters, {place.flops:.3g} FLOPs"
        )
        ax.set_xlabel("loss above the baseline's (nats/token)")

    def show_multipliers(self) -> None:
        """What the differences are worth in compute, along the baseline's own frontier."""
        frontiers = {place.name: self.frontier(self.seeded, place) for place in self.preset.places}
        points = pd.concat([f.points.assign(place=name, factor=f.points.budget) for name, f in frontiers.items()])
        self.report.section("What that is worth in compute")
        told = "; ".join(
            f"around the {name} place 0.01 nats are {1 - math.exp(-0.01 / f.slope):.1%} of the compute"
            for name, f in frontiers.items()
        )
        self.report.text(
            "The baseline was trained at a quarter, half and twice the compute of each place too, its size growing "
            "with it, each "
            "budget at its own best rate and with several seeds. A variant's multiplier is the compute at which the baseline "
            f"reaches the variant's loss over the compute that the variant took: {told}. Nothing is extrapolated: "
            "a loss beyond the budgets measured has no multiplier but a bound."
        )
        self.report.table(
            points, "frontier", "The baseline's own frontier: compute over the place's, FLOPs, loss and spread between seeds",
            place="", factor="g", flops=".3g", loss=".4f", seeds="d", sd=".4f",
        )  # fmt: skip
        self.report.figure(
            "frontier", "The baseline's loss against compute at each place: a dot a run, and the curve that "
            "multipliers are read off with its 95 % band",
            lambda axes: [
                self._draw_frontier(place, frontiers[place.name], ax) for place, ax in zip(self.preset.places, axes, strict=True)
            ], size=(9.4, 3.6), panels=2,
        )  # fmt: skip
        table = self.all.assign(
            reads=[_multiplier_words(row, frontiers[row.place]) for row in self.all.itertuples()],
            loss_is=self.all.verdict,
        )
        self.report.table(
            table, "multipliers", "Compute multipliers with 95 % intervals (an end beyond the frontier stands at its limit): "
            "above 1 the variant saves compute; the variant's FLOPs are its own; `loss is` the verdict on the loss, corrected "
            "for all contrasts, where the multiplier's interval is not", place="", variant="", flops=".3g", reads="",
            multiplier_low=".2f", multiplier_high=".2f", loss_is="",
        )  # fmt: skip
        self.report.figure(
            "multipliers", "Compute multipliers at both places with 95 % intervals; arrow: a bound; diamond: as used",
            lambda ax: self._draw_multipliers(frontiers, ax), size=(7.6, 1.2 + 0.42 * self.all.variant.nunique()),
        )  # fmt: skip
        last = self.all[self.all.place == self.preset.places[-1].name].set_index("variant")
        for name in self.preset.variants:
            if not VARIANTS[name].primary or self.settings.chosen:
                words = [
                    f"{_multiplier_words(row, frontiers[row.place])} at the {row.place} place{_span(row)}"
                    for row in self.all[self.all.variant == name].itertuples()
                ]
                if words:
                    self.findings.append(f"Compute multiplier of {name}: {', '.join(words)}.")
        told = last[last.primary & last.verdict.eq("worse")].sort_values(
            ["multiplier", "difference"], ascending=[True, False], na_position="first"
        )
        if len(told):
            row = told.iloc[0]
            self.findings.append(
                f"The choice that costs most at the {row.place} place is {told.index[0]}: a compute multiplier of "
                f"{_multiplier_words(row, frontiers[row.place])}{_span(row)}."
            )

    def _draw_frontier(self, place: Place, frontier: Frontier, ax: object) -> None:
        names = [f"{BASELINE} x {factor:g}" for factor in LADDER if factor != 1] + [BASELINE]
        own = self.seeded[(self.seeded.place == place.name) & self.seeded.variant.isin(names)]
        compute = frontier.flops * np.exp(frontier.x)
        low, high = np.quantile(frontier.draws, [0.025, 0.975], axis=0)
        ax.fill_between(compute, low, high, color=plots.COLOURS[0], alpha=0.2, linewidth=0)
        ax.plot(compute, frontier.curve, color=plots.COLOURS[0])
        ax.plot(
            own.flops,
            own.val_loss,
            "o",
            color=plots.COLOURS[1],
            markersize=4,
            markeredgecolor="white",
            markeredgewidth=0.4,
        )
        ticks = frontier.points.flops.to_numpy()
        ax.set_xscale("log")
        ax.set_xticks(ticks, [plots.power_of_ten(float(f"{tick:.2g}")) for tick in ticks])
        ax.minorticks_off()
        ax.set_xlabel(plots.FLOPS)
        ax.set_ylabel(plots.LOSS)
        ax.set_title(place.name)

    def _draw_multipliers(self, frontiers: dict[str, Frontier], ax: object) -> None:
        names = list(dict.fromkeys(self.all.variant))
        ax.axvline(1, color=plots.GREY, linewidth=1)
        for j, place in enumerate(self.preset.places):
            for row in self.all[self.all.place == place.name].itertuples():
                y, colour = names.index(row.variant) + 0.2 * (2 * j - 1), plots.COLOURS[j]
                if row.beyond:
                    bound = frontiers[row.place].reach[row.beyond == "above"] * frontiers[row.place].flops / row.flops
                    ax.plot(bound, y, "<" if row.beyond == "below" else ">", color=colour)
                    continue
                ax.plot(
                    [row.multiplier_low, row.multiplier_high],
                    [y, y],
                    color=colour,
                    linewidth=2.2,
                    solid_capstyle="butt",
                )
                ax.plot(row.multiplier, y, "o" if row.kind == "equal" else "D", color=colour, markersize=4.5)
            ax.plot([], [], "o-", color=plots.COLOURS[j], label=place.name)
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.4, -0.6)
        ax.set_xscale("log")
        low, high = ax.get_xlim()
        ticks = [t for t in (0.25, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4, 1.7, 2.0) if low <= t <= high]
        ticks = ticks if len(ticks) < 9 else [t for t in ticks if t in (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)]
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.grid(axis="y", visible=False)
        ax.set_xlabel("compute multiplier (above 1: saves compute)")
        ax.legend(title="place", loc="upper left", bbox_to_anchor=(1.0, 1.0))

    def show_crossing(self) -> None:
        """Whether the order of variants changes between the places."""
        small, large = (self.tables[place.name].set_index("variant") for place in self.preset.places)
        rows = []
        for name in [n for n in small.index if n in large.index]:
            one, two = small.loc[name], large.loc[name]
            change = two.difference - one.difference
            half = contrasts.half_width((one.error, two.error), (one.freedom, two.freedom))
            told = [row.verdict if row.verdict in ("worse", "better") else "" for row in (one, two)]
            rows.append(
                {"variant": name, "small": one.difference, "large": two.difference, "change": change, "low": change - half,
                 "high": change + half,
                 "verdict": "crosses" if set(told) == {"worse", "better"} else "rises" if change - half > 0 else "falls"
                 if change + half < 0 else "no change told"}
            )  # fmt: skip
        table = pd.DataFrame(rows)
        crossing = table.variant[table.verdict == "crosses"].tolist()
        self.report.section("Do curves cross?")
        self.report.text(
            "How each difference changes from the small to the large place. A curve crosses the baseline's where the "
            "variant is worse at one place and better at the other, both told apart. "
            + (f"Crossing: {', '.join(crossing)}." if crossing else "None is seen to cross between these two.")
        )
        self.report.table(
            table, "crossing", "Differences at the two places (nats per token) and their change with its 95 % "
            "interval (each by itself, not corrected)", variant="",
            small="+.4f", large="+.4f", change="+.4f", low="+.4f", high="+.4f", verdict="",
        )  # fmt: skip
        told = (
            f"{', '.join(crossing)} cross{'es' * (len(crossing) == 1)}" if crossing else "no variant is seen to cross"
        )
        self.findings.append(f"Between the two places {told} the baseline.")

    def show_costs(self) -> None:
        """Speed and memory beside quality."""
        speeds = self._speeds()
        rows = []
        for row in self.all.itertuples():
            model = self.trial_of[row.place, row.variant].model
            base = self.trial_of[row.place, BASELINE].model
            rounds = speeds["tokens_per_second"]
            ratios = np.divide(rounds[f"{row.place}: {row.variant}"], rounds[f"{row.place}: {BASELINE}"])
            rows.append(
                {"place": row.place, "variant": row.variant, "difference": row.difference, "speed": np.median(ratios),
                 "speed_least": ratios.min(), "speed_most": ratios.max(),
                 "flops_per_token": counts.train_flops_per_token(model, self.recipe.seq_len)
                 / counts.train_flops_per_token(base, self.recipe.seq_len),
                 "training_bytes": 16 * row.params_total,
                 "cache_bytes": counts.kv_cache_bytes(model, 1, self.recipe.seq_len)}
            )  # fmt: skip
        self.report.section("What it costs in time and memory")
        self.report.text(
            "Speed of training over the baseline's of the same round: one thread, eager, fp32, one run alone, the median, the "
            f"least and the most of {ROUNDS} rounds that take every variant in turn"
            + (f", at a load average of {speeds['load']:.1f}" if speeds["load"] is not None else "")
            + ". What lies between the least and the most is noise of the machine. Memory of training is that of weights, "
            "gradients and both moments; the key-value cache is of one sequence as long as the training window, in fp32."
        )
        self.report.table(
            pd.DataFrame(rows), "costs", "Speed and FLOPs a token over the baseline's, bytes of training, bytes of the "
            "key-value cache",
            place="", variant="", difference="+.4f", speed=".2f", speed_least=".2f", speed_most=".2f", flops_per_token=".2f",
            training_bytes=",.0f", cache_bytes=",.0f",
        )  # fmt: skip
        parts = [
            {"place": trial.place.name, "variant": trial.name, **counts.parameters(trial.model)}
            for trial in self.trial_of.values() if trial.kind != "ladder"
        ]  # fmt: skip
        columns = ("embedding", "position", "attention", "mlp", "norm", "head", "non_embedding", "total")
        self.report.table(
            pd.DataFrame(parts), "parts", "Parameters by part; `non_embedding` leaves out embedding, position table and "
            "head: by it `untied as used` equals the baseline", place="", variant="",
            **dict.fromkeys(columns, ",.0f"),
        )  # fmt: skip

    def _speeds(self) -> dict:
        """Tokens a second of each model in each round, measured once for a results folder."""
        path = self.folder / "speed.json"
        known = read_kept(path, _speeds_of) if path.exists() else {"tokens_per_second": {}, "models": "", "load": None}
        plain = TrainConfig(precision="fp32", compile=False, stride=self.recipe.seq_len)
        todo = {
            f"{trial.place.name}: {trial.name}": trial for trial in self.trial_of.values() if trial.kind != "ladder"
        }
        models = files.sha256_bytes(files.canonical_json([t.model.to_dict() for t in todo.values()]).encode())[:16]
        if models == known["models"]:
            return known
        known |= {"tokens_per_second": {}, "models": models}  # all anew: a ratio is of two speeds in the same round
        if hasattr(os, "getloadavg"):
            known["load"] = os.getloadavg()[0]
        for _ in range(ROUNDS):
            for name, trial in todo.items():
                batch = self.recipe.batch_size(trial.tokens)
                speed = planner.measure_speed(
                    [trial.model], self.preset.clock / ROUNDS, 1, batch, plain
                ).flops_per_second[0]
                tokens = speed / counts.train_flops_per_token(trial.model, trial.model.max_seq_len)
                known["tokens_per_second"].setdefault(name, []).append(tokens)
        files.write_whole(path, json.dumps(known) + "\n")
        return known

    # Checks ---------------------------------------------------------------------------------------------------------------

    def check_planted(self) -> None:
        """A variant made worse on purpose, by 0.015 nats as the frontier says: is it found?"""
        place = self.preset.places[0]
        base = self.losses(self.seeded, place)[BASELINE]
        own = self.planted.drop_duplicates("seed").set_index("seed")
        differences = (own.val_loss - base.reindex(own.index)).dropna()
        seeds, (sd, freedom) = self.planned[place.name]["seeds"], self._pooled(place)
        options = {"seeds": seeds, "sd": sd, "freedom": freedom, "seed": self.settings.seed}
        family = LOOKS[1] / max(1, len(self._primary()))
        tests = {
            "moved to 0.015 nats, one contrast at 5 %": contrasts.planted_test(differences, **options),
            "moved to 0.015 nats, the hardest of Holm's steps": contrasts.planted_test(
                differences, alpha=family, **options
            ),
            "as they came out, one contrast at 5 %": contrasts.planted_test(differences, shift=None, **options),
        }
        real = self.tables[place.name].set_index("variant")
        pairs = {name: (self.losses(self.seeded, place)[name] - base).dropna() for name in real.index}
        for name in [name for name, pair in pairs.items() if len(pair) >= seeds]:
            about = {"sd": real.error[name] * math.sqrt(len(pairs[name])), "freedom": real.freedom[name]}
            tests[f"the pairs of {name}, moved to 0.015 nats, the hardest of Holm's steps"] = contrasts.planted_test(
                pairs[name], seeds=seeds, alpha=family, seed=self.settings.seed, **about
            )
        table = pd.DataFrame([{"test": name, **found} for name, found in tests.items()])
        count = len(differences)
        half = contrasts.half_width([differences.std() / math.sqrt(count)], [count - 1])
        kept = (
            own.tokens_seen.mean()
            / self.seeded[self.seeded.variant.eq(BASELINE) & self.seeded.place.eq(place.name)].tokens_seen.mean()
        )
        self.report.section("Would a difference have been found?")
        self.report.text(
            f"The baseline was trained again on {kept:.1%} of its tokens, which by the frontier should cost "
            f"{contrasts.PLANTED} nats; it "
            f"cost {differences.mean():.4f} ({interval(differences.mean() - half, differences.mean() + half, '.4f')}, "
            f"{len(differences)} seeds). Draws of {seeds} of these pairs, tested as the contrasts are:"
        )
        self.report.table(
            table, "planted_test", "How often a variant that is worse on purpose is found at the planned number of seeds", test=""
            "",
            seeds="d", draws=",d", found=",d", share=".1%",
        )  # fmt: skip
        first = table.iloc[0]
        real = table.share[table.test.str.startswith("the pairs of")]
        likeness = f"its pairs spread {differences.std():.4f} nats, since a seed moves both alike, those of the variants {sd:.4f}"
        if len(real):
            likeness += (
                f": moved to as much, the pairs of {len(real)} variants are found in {real.min():.0%} to {real.max():.0%} of draws "
                "at the hardest step"
            )
        self.findings.append(
            f"A variant made worse by {contrasts.PLANTED} nats on purpose is found in {first.share:.0%} of draws with the "
            f"{first.seeds} seeds planned ({table.iloc[1].share:.0%} at the hardest of Holm's steps); {likeness}."
        )

    def check_multipliers(self) -> None:
        """The baseline at the compute that a multiplier says: do the losses meet?"""
        place = self.preset.places[0]
        self.report.section("Do multipliers hold?")
        if not self.checked:
            self.report.text(
                f"No variant of the {place.name} place has a multiplier within reach that differs from 1 by "
                f"{CHECKED - 1:.0%} or more, so there is nothing to hold against a direct run."
            )
            return
        table, rows = self.tables[place.name].set_index("variant"), []
        by_seed = {name: group.set_index("seed").val_loss for name, group in self.checks.groupby("variant")}
        seeded = self.losses(self.seeded, place)
        looks = [(name, factor, count) for name, factor in self.checked.items() for count in self.preset.check_seeds]
        for name, factor, count in looks:
            known = [losses for losses in (seeded[name], by_seed.get(name)) if losses is not None]
            sides = by_seed[f"{BASELINE} for {name}"], pd.concat(known)
            own, variant = (losses.reindex(self.seeds(count)).dropna() for losses in sides)
            difference = own.mean() - variant.mean()
            errors = [values.std(ddof=1) / math.sqrt(len(values)) for values in (own, variant)]
            freedoms = len(own) - 1, len(variant) - 1
            half, half_90 = (contrasts.half_width(errors, freedoms, level) for level in (0.95, 0.9))
            rows.append(
                {"variant": name, "multiplier": table.multiplier[name], "compute": factor, "variant_loss": variant.mean(),
                 "baseline_loss": own.mean(), "seeds": len(own), "difference": difference, "low": difference - half,
                 "high": difference + half, "told_apart": abs(difference) > half,
                 "equal": abs(difference) + half_90 < contrasts.MARGIN}
            )  # fmt: skip
        table = pd.DataFrame(rows)
        checked = table.groupby("variant", sort=False).tail(1)  # the last look of each
        first, last = self.preset.check_seeds[0], self.preset.check_seeds[-1]
        self.report.text(
            "The baseline was trained with the compute at which, by its frontier, it should lose as much as a variant does"
            + (
                f". A look at {first} seeds a side came first; seeds were then added to see whether the losses are equal, up to "
                f"{last}, and the findings tell that last look."
                if last > first
                else "."
            )
        )
        self.report.table(
            table, "checks", "The baseline's loss at that compute (over the place's) less the variant's, with its 95 % "
            f"interval; `equal`: two one-sided tests show it within {contrasts.MARGIN} nats", variant="", multiplier=".3f",
            compute=".3f", variant_loss=".4f", baseline_loss=".4f", seeds="d", difference="+.4f", low="+.4f", high="+.4f",
            told_apart="", equal="",
        )  # fmt: skip
        gaps = ", ".join(
            f"{r.variant} by {r.difference:+.4f} nats ({interval(r.low, r.high, '+.4f')})" for r in checked.itertuples()
        )
        self.findings.append(
            "Trained with the compute that a multiplier says, the baseline cannot be told from the variant for "
            f"{(~checked.told_apart).sum()} of {len(checked)} variants, and is shown to lose the same within "
            f"{contrasts.MARGIN} nats for {checked.equal.sum()}: it misses {gaps}."
        )

    # For the claims -------------------------------------------------------------------------------------------------------

    def _write_effects(self) -> None:
        """tables/effects.csv, which ``claims`` reads."""
        rows = []
        for place in self.preset.places:
            table = self.tables[place.name]
            ids = self._run_ids(place)
            for row in table[table.diverged == 0].itertuples():
                own = ids[row.variant]
                rows.append(self._effect(place, row, own, [ids[BASELINE][seed] for seed in own]))
            named = table.set_index("variant")
            if {"mqa", "gqa by 3"} <= set(named.index[named.diverged == 0]):
                rows.append(self._between(place, "mqa", "gqa by 3", ids))
            rows += self._lost(place, named)
            ranges = {
                choice: self._range(place, choice, table, ids) for choice in dict.fromkeys(c for c in table.choice if c)
            }
            rows += [{**row, "part": f"{place.name}: range of {choice}"} for choice, row in ranges.items()]
            if ranges:
                largest = max(ranges.values(), key=lambda row: row["effect"])
                rows.append({**largest, "part": f"{place.name}: largest choice"})
            untied = self.recipe.model(place.shape, self.settings.vocab_size, tie_embeddings=False)
            parts = counts.parameters(untied)
            share = parts["head"] / parts["total"]
            tested = [run for name in ("untied as used", "untied", BASELINE) for run in ids.get(name, {}).values()]
            exact = (share, share, share)
            rows.append(claims.effects_row(f"{place.name}: share of the head", *exact, unit="share", runs=tested[:1]))
            gain, drawn = self.frontier(self.seeded, place).gain(2.0)
            rungs = [f"{BASELINE} x {factor:g}" if factor != 1 else BASELINE for factor in LADDER]
            own = self.seeded[(self.seeded.place == place.name) & self.seeded.variant.isin(rungs)]
            about = {"seeds": self.preset.ladder_seeds, "runs": own.run_id}
            rows.append(claims.drawn_row(f"{place.name}: a doubling of compute", gain, drawn, **about))
        frame = pd.DataFrame(rows, columns=list(claims.COLUMNS))
        write_table(self.folder / "tables" / "effects.csv", frame)

    def _run_ids(self, place: Place) -> dict[str, dict[int, str]]:
        """The runs behind each variant's contrast, by seed: those that both it and the baseline ended."""
        own = self.seeded[(self.seeded.place == place.name) & self.seeded.val_loss.notna()]
        found = {name: dict(zip(rows.seed, rows.run_id, strict=True)) for name, rows in own.groupby("variant")}
        return {name: {s: r for s, r in runs.items() if s in found[BASELINE]} for name, runs in found.items()}

    def _lost(self, place: Place, table: pd.DataFrame) -> list[dict]:
        """The contrasts of variants that diverge, wholly or at a seed: they have runs and no loss, and claims tell nothing."""
        lost = {
            name: self.tuned.run_id[(self.tuned.place == place.name) & (self.tuned.variant == name)]
            for where, name in self.trial_of
            if where == place.name and name not in table.index and (where, name) not in self.rate_of
        }
        lost |= {name: self._run_ids(place)[name].values() for name in table.index[table.diverged > 0]}
        rows = {f"{place.name}: {name}": runs for name, runs in lost.items()}
        if pair := [name for name in ("mqa", "gqa by 3") if name in lost]:
            rows[f"{place.name}: mqa less gqa by 3"] = lost[pair[0]]
        return [claims.effects_row(part, *[math.nan] * 3, seeds=0, runs=runs) for part, runs in rows.items()]

    @staticmethod
    def _effect(place: Place, row: object, own: dict[int, str], base: list[str]) -> dict:
        """A contrast as claims take it. They decide at 5 %, the study at the level of the look that a contrast came to: its
        corrected p is stretched to decide alike; its intervals are of that look already."""
        return claims.effects_row(
            f"{place.name}: {row.variant}", row.difference, row.low, row.high, row.low_90, row.high_90,
            np.minimum(1.0, row.p_holm * 0.05 / LOOKS[row.look - 1]), seeds=row.seeds, runs=own.values(), base_runs=base,
        )  # fmt: skip

    def _between(self, place: Place, one: str, other: str, ids: dict[str, dict[int, str]]) -> dict:
        """The contrast of two variants, with its own variance: that of variants less the baseline is another."""
        losses = self.losses(self.seeded, place)
        pair = (losses[one] - losses[other].reindex(losses[one].index)).dropna()
        seeds = [seed for seed in pair.index if seed in ids[one] and seed in ids[other]]
        own = self._spread(pair.loc[seeds])
        runs = ([ids[name][seed] for seed in seeds] for name in (one, other))
        return claims.effects_row(
            f"{place.name}: {one} less {other}", *own, seeds=len(seeds), runs=next(runs), base_runs=next(runs)
        )

    @staticmethod
    def _spread(pair: pd.Series) -> tuple[float, ...]:
        """Mean and intervals (95 %, 90 %) of paired differences."""
        error, mean = pair.std() / math.sqrt(len(pair)), float(pair.mean())
        halves = [error * stats.t.ppf(q, len(pair) - 1) for q in (0.975, 0.95)]
        return mean, *(mean + sign * half for half in halves for sign in (-1, 1))

    def _range(self, place: Place, choice: str, table: pd.DataFrame, ids: dict[str, dict[int, str]]) -> dict:
        """The loss between the worst and the best alternative of a choice, at equal parameters, the baseline's included."""
        losses = self.losses(self.seeded, place)
        own = table[(table.choice == choice) & (table.kind == "equal")]
        means = {BASELINE: 0.0} | dict(zip(own.variant, own.difference, strict=True))
        worst, best = max(means, key=means.get), min(means, key=means.get)
        pair = (losses[worst] - losses[best].reindex(losses[worst].index)).dropna()
        pair = pair[[seed in ids[worst] and seed in ids[best] for seed in pair.index]]
        if worst == best or not len(pair):
            return claims.effects_row(choice, 0.0, 0.0, 0.0, runs=ids[BASELINE].values())
        runs = [ids[name][seed] for name in (worst, best) for seed in pair.index]
        return claims.effects_row(choice, *self._spread(pair), seeds=len(pair), runs=runs)

    def end(self) -> None:
        self.finish(
            [frame for frame in (self.tuned, self.seeded, self.planted, self.checks) if len(frame)],
            ("place", "variant"),
        )


def _speeds_of(kept: dict) -> dict:
    """What ``_speeds`` wrote, as it is used."""
    speeds = {name: [float(speed) for speed in rounds] for name, rounds in kept["tokens_per_second"].items()}
    return {
        "tokens_per_second": speeds,
        "models": str(kept["models"]),
        "load": None if kept["load"] is None else float(kept["load"]),
    }


def measure_for_claims(root: Path) -> None:
    """The smoke preset, whole, into a folder under ``root``: small evidence for a look at ``claims``."""
    study = begin(AblationParameters(preset="smoke", results_dir=str(root / AblationParameters.study)))
    study.describe_places()
    study.measure()
    study.show_contrasts()
    study.end()


def _multiplier_words(row: object, frontier: Frontier) -> str:
    """A multiplier, or the bound that the frontier gives."""
    if not row.beyond:
        return f"{row.multiplier:.2f}"
    end = frontier.reach[row.beyond == "above"] * frontier.flops / row.flops
    return f"{'below' if row.beyond == 'below' else 'above'} {end:.2f}"


def _span(row: object) -> str:
    """The interval of a multiplier in brackets; nothing where the multiplier is a bound."""
    return "" if row.beyond else f" ({row.multiplier_low:.2f} to {row.multiplier_high:.2f})"
