"""The map of hyperparameters with numbers in it, step by step: what studies/hyperparameters.ipynb narrates.

Every knob is turned down and up alone from one tuned baseline, over a range written here before anything was trained, at fixed
FLOPs and with the same seeds. What a knob is worth is the loss between its worst and its best value. The knobs of sampling are
turned on the baseline's own models, and judged by a larger one.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import patches
from matplotlib.colors import LogNorm
from scipy import stats

from tinylm import backend, counts, files
from tinylm.config import DataConfig, GenerateConfig, ModelConfig, TrainConfig
from tinylm.errors import TextError
from tinylm.study import claims, planner, plots, scaling
from tinylm.study.ablations import PRESETS as ABLATIONS
from tinylm.study.design import Recipe, bracket, tune
from tinylm.study.parameters import HyperparameterParameters, repository
from tinylm.study.report import interval, write_table
from tinylm.study.runs import Run, prepare_corpus, read_kept
from tinylm.study.sections import SectionStudy
from tinylm.study.steps import known_text
from tinylm.words import quantity

# ------------------------------------------------------------------------------------------------------------------ as data


@dataclass(frozen=True)
class Times:
    """A factor on the baseline's value of a field; ``of`` names another field that is meant (``tokens``: of the run). A whole
    number is rounded to the nearest that the model can have."""

    factor: float
    of: str = ""


FOLLOWS = "by the rule"  # a learning rate that follows the size of the model as the recipe's first guess does


@dataclass(frozen=True)
class Knob:
    """One cell of the map. group: its box; moves: the changes of the baseline, fields of the configs by name, the knob's own
    first; star: whether the design counts it as one of the most impactful; note: what has to be known of the range; beside:
    it is shown, but neither ranked nor part of the claim."""

    group: str
    moves: tuple[dict, ...] = field(hash=False)
    star: bool = False
    note: str = ""
    beside: bool = False


def by(name: str, *factors: float) -> tuple[dict, ...]:
    """The field at so many times the baseline's value: a quarter and four times, if not said."""
    return tuple({name: Times(factor)} for factor in factors or (1 / 4, 4))


def to(name: str, *values: object) -> tuple[dict, ...]:
    """The field at these values."""
    return tuple({name: value} for value in values)


def window(factor: float, **more: object) -> dict:
    """Windows so many times as long that neither overlap nor leave gaps, with as many tokens a step as can be."""
    return {"seq_len": Times(factor), "stride": Times(factor), "batch_size": Times(1 / factor), **more}


GROUPS = ("architecture", "training", "generation", "data", "arch choices", "numerical")
BASELINE = "baseline"
_OFF = "off in the baseline: a quarter and four times of the usual"
_ONE = "what is left to one at four times and at a quarter"
KNOBS = {
    "vocab_size": Knob("architecture", by("vocab_size"), note="no smaller than 320: an id for each byte and some letters"),
    "hidden_size": Knob(
        "architecture", by("hidden_size"), star=True, note="the feed-forward keeps its proportion; heads too, if they can",
    ),
    "num_layers": Knob("architecture", by("num_layers"), star=True),
    "num_heads": Knob("architecture", by("num_heads"), note="equal width: heads grow narrow as they grow many"),
    "num_kv_heads": Knob("architecture", by("num_kv_heads", 1 / 4, 1 / 2), note="no more than heads"),
    "intermediate_size": Knob("architecture", by("intermediate_size")),
    "max_seq_len": Knob(
        "architecture", ({"max_seq_len": Times(1 / 4), **window(1 / 4)}, {"max_seq_len": Times(4), "seq_len": Times(1)}),
        note="training windows shrink with it, and do not grow with it",
    ),
    "rope_theta": Knob("architecture", by("rope_theta")),
    "dropout": Knob("architecture", to("dropout", 0.025, 0.4), note=f"{_OFF} 0.1"),
    "learning_rate": Knob("training", by("learning_rate"), star=True),
    "batch_size": Knob("training", by("batch_size"), note="steps make up"),
    "grad_accum": Knob("training", to("grad_accum", 2, 4), note="steps make up; no less than one"),
    "max_steps": Knob("training", by("batch_size", 4, 1 / 4), note="at fixed FLOPs the batch makes up: batch_size, turned round"),
    "warmup_steps": Knob("training", by("warmup_steps")),
    "weight_decay": Knob("training", by("weight_decay")),
    "grad_clip": Knob("training", by("grad_clip")),
    "beta1": Knob("training", to("beta1", 0.6, 0.975), note=_ONE),
    "beta2": Knob("training", to("beta2", 0.96, 0.9975), note=_ONE),
    "min_lr": Knob(
        "training", ({"min_lr": Times(0.025, "learning_rate")}, {"min_lr": Times(0.4, "learning_rate")}),
        note=f"{_OFF} tenth of learning_rate",
    ),
    "data quality": Knob(
        "data", to("damage", "swap:0.025", "swap:0.4"), star=True,
        note=f"{_OFF} tenth of the characters, swapped with a neighbour in training text alone",
    ),
    "data size": Knob(
        "data", ({"unique_tokens": Times(1 / 4, "tokens")}, {"unique_tokens": Times(1 / 2, "tokens")}), star=True,
        note="distinct tokens, read again until the FLOPs are spent; more than the run reads cannot matter",
    ),
    "seq_len": Knob("data", (window(1 / 4), window(4, max_seq_len=Times(4))), note="as many tokens a step as can be"),
    "stride": Knob("data", by("stride"), note="the text is much longer than the run"),
    "tokenizer": Knob(
        "data", ({"tokenizer": "unigram"}, {"tokenizer": "char"}, {"tokenizer": "byte", "vocab_size": 256}),
        note="windows of as many tokens, hence of less text",
    ),
    "precision": Knob("numerical", to("precision", "bf16", "fp16"), note="fp16 with its loss scale; numerics is without too"),
    "attention_scale": Knob("numerical", by("attention_scale")),
    "init_std": Knob("numerical", by("init_std")),
    "norm_eps": Knob("numerical", by("norm_eps")),
    "hidden_size, its own rate": Knob(
        "architecture", tuple({"hidden_size": Times(f), "learning_rate": FOLLOWS} for f in (1 / 4, 4)), beside=True,
        note="the learning rate follows the size by the recipe's rule",
    ),
    "num_layers, its own rate": Knob(
        "architecture", tuple({"num_layers": Times(f), "learning_rate": FOLLOWS} for f in (1 / 4, 4)), beside=True,
        note="the learning rate follows the size by the recipe's rule",
    ),
    "data size, down to a sixteenth": Knob(
        "data", ({"unique_tokens": Times(1 / 16, "tokens")},), beside=True, note="beyond the range stated",
    ),
}  # fmt: skip
# Sampling: how text is drawn from the baseline's models. GenerateConfig's own values are the baseline.
SAMPLING = {
    "temperature": Knob("generation", by("temperature"), star=True),
    "top_k": Knob("generation", to("top_k", 10, 160), note=f"{_OFF} 40"),
    "top_p": Knob("generation", to("top_p", 0.225, 0.9), note="off in the baseline: a quarter of the usual 0.9, and that"),
    "repetition_penalty": Knob(
        "generation", to("repetition_penalty", 1.05, 1.8), note=f"{_OFF} 0.2 above one",
    ),
    "max_new_tokens": Knob("generation", by("max_new_tokens")),
}  # fmt: skip
# The design's cells of architecture choices, and the choice of the ablations that each belongs to.
CHOICES = {
    "RMSNorm": "norm", "Pre-norm": "norm position", "SwiGLU": "mlp", "RoPE": "position", "GQA": "heads",
    "tied embeddings": "embeddings",
}  # fmt: skip
# Their runs are judged on other stretches of the validation text than the baseline's, which no seed shows.
JUDGED_APART = ("vocab_size", "tokenizer", "seq_len", "max_seq_len")
PROMPT = 16  # tokens of validation text that a sample goes on from
GRAM = 4  # tokens of what counts as said again
PIECE = 50  # tokens of each sample in which different pairs are counted: the shortest that is drawn
NO_TIME = (
    "rope_theta",
    "attention_scale",
    "init",
    "init_std",
    "norm_eps",
)  # fields that cannot change what a step takes
FEWEST_IDS = 320  # of a vocabulary: one for each byte, and some letters
SCORES = ("judge", "ngram", "repetition", "distinct")


@dataclass(frozen=True)
class Preset:
    """How much a preset measures. shape, flops: the small place of the ablations; judge: shape and FLOPs of the larger model
    that scores samples; seeds: of each value; knobs: those it turns; prompts: samples of one setting and seed; counted: training
    tokens behind the n-gram statistics; eval_tokens: of the last evaluation; clock: seconds for the speed of one value."""

    shape: tuple[int, int, int]
    flops: float
    judge: tuple[tuple[int, int, int], float]
    seeds: int = 5
    moves: int = 2
    knobs: tuple[str, ...] = (*KNOBS, *SAMPLING)
    prompts: int = 32
    counted: int = 2_000_000
    eval_tokens: int = 4 * TrainConfig.eval_tokens
    clock: float = 0.6


def small_place(preset: str) -> tuple[tuple[int, int, int], float]:
    """Shape and FLOPs of the small place of the ablations."""
    return ABLATIONS[preset].places[0].shape, ABLATIONS[preset].places[0].flops


def _at(preset: str, **options: object) -> Preset:
    large = ABLATIONS[preset].places[1]
    return Preset(*small_place(preset), (large.shape, large.flops), **options)


PRESETS = {
    "smoke": _at(
        "smoke", seeds=2, moves=0, prompts=2, counted=100_000, eval_tokens=4096, clock=0.02,
        knobs=(
            "hidden_size", "num_layers", "learning_rate", "batch_size", "dropout", "data quality", "data size", "seq_len",
            "tokenizer", "precision", "temperature", "top_k", "max_new_tokens",
        ),
    ),
    "quick": _at("quick", seeds=3, moves=1, prompts=16, eval_tokens=TrainConfig.eval_tokens, clock=0.2),
    "full": _at("full"),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- turning a knob

_MODEL, _TRAIN, _DATA = ({f.name for f in dataclasses.fields(kind)} for kind in (ModelConfig, TrainConfig, DataConfig))


@dataclass(frozen=True)
class Setting:
    """The baseline with one knob at one value; ``value`` says which."""

    knob: str
    value: str
    model: ModelConfig
    train: TrainConfig
    data: DataConfig

    @property
    def same(self) -> tuple:
        """What two settings share that are one and the same."""
        return self.model.resolve(), self.train.resolve(self.model), self.data


def turned(base: Setting, knob: str, change: dict, flops: float) -> Setting:
    """The baseline with a change: the steps make up for what it alters in cost, warm-up keeps its share of them, and all else
    stays."""
    known = {
        **base.model.resolve().to_dict(), **base.train.resolve(base.model).to_dict(),
        "tokens": base.train.max_steps * base.train.windows_per_step * base.model.max_seq_len,
    }  # fmt: skip
    new: dict = {}
    for name, value in change.items():
        if isinstance(value, Times):
            start = known[value.of or name]
            value = start * value.factor
            new |= _nearest(name, value, base.model) if isinstance(start, int) else {name: value}
        elif value != FOLLOWS:
            new[name] = value
    model = base.model.replace(**{name: value for name, value in new.items() if name in _MODEL})
    if change.get("learning_rate") == FOLLOWS:
        own, usual = (Recipe().learning_rate(counts.parameters(config)["total"]) for config in (model, base.model))
        new["learning_rate"] = base.train.learning_rate * (own / usual)
    train = base.train.to_dict() | {name: value for name, value in new.items() if name in _TRAIN}
    windows = train["batch_size"] * train["grad_accum"]
    steps = max(2, round(flops / (3 * counts.forward_flops(model, train["seq_len"] or model.max_seq_len) * windows)))
    if "warmup_steps" not in new:
        train["warmup_steps"] = round(base.train.warmup_steps / base.train.max_steps * steps)
    train |= {"max_steps": steps, "warmup_steps": min(steps - 1, max(1, train["warmup_steps"]))}
    data = base.data.replace(**{name: value for name, value in new.items() if name in _DATA})
    value = steps if knob == "max_steps" else new[next(iter(change))]
    return Setting(knob, f"{value:.4g}" if isinstance(value, float) else str(value), model, TrainConfig(**train), data)


def _nearest(name: str, wanted: float, model: ModelConfig) -> dict:
    """The whole number nearest to ``wanted`` (in its logarithm) that a model can have, with what has to follow it: RoPE turns
    pairs, so a head has an even number of channels."""
    heads, width = model.num_heads, model.hidden_size
    if name == "hidden_size":
        pairs = [(size, h) for h in range(1, heads + 1) for size in range(2 * h, 8 * width + 1, 2 * h)]
        size, h = min(pairs, key=lambda pair: (abs(math.log(pair[0] / wanted)), -pair[1]))
        return {name: size, "num_heads": h, "num_kv_heads": h}
    choices = {
        "num_heads": [h for h in range(1, width) if width % h == 0 and width // h % 2 == 0],
        "num_kv_heads": [h for h in range(1, heads + 1) if heads % h == 0],
    }.get(name, [max(FEWEST_IDS if name == "vocab_size" else 1, round(wanted))])
    found = min(choices, key=lambda choice: abs(math.log(choice / wanted)))
    return {"num_heads": found, "num_kv_heads": found} if name == "num_heads" else {name: found}


# ----------------------------------------------------------------------------------------------- what a knob is worth

# The plain range of a few noisy means is too large even where a knob does nothing: the worst and the best are the unluckiest
# and the luckiest too. Two remedies. For the number: the other seeds choose for each seed which values are the worst and the
# best, and the seed itself, which had no say, tells their difference. For the interval: the differences of all pairs of values
# are held at once (Tukey's studentized range, seeds as blocks), so that whichever pair came out largest is covered.


def ends(losses: pd.DataFrame) -> tuple[str, str, float]:
    """The worst and the best column of losses (seeds x values) by their means, and the difference: the plain range."""
    means = losses.mean()
    worst, best = means.idxmax(), means.idxmin()
    return worst, best, float(means[worst] - means[best])


def held_out_range(losses: pd.DataFrame) -> float:
    """The mean over seeds of the difference between the values that the other seeds call the worst and the best (nats): zero
    on average where a knob does nothing, and no more than its true range."""
    found = []
    for seed in losses.index:
        worst, best, _ = ends(losses.drop(seed))
        found.append(losses.loc[seed, worst] - losses.loc[seed, best])
    return float(np.mean(found))


def range_interval(losses: pd.DataFrame, level: float = 0.95, other: float = 0.0) -> tuple[float, float]:
    """An interval that holds the true range of the values (columns) of losses, at least at that level: the plain range less and
    plus what the largest of all differences may be off. other: the standard error of what no seed shows."""
    seeds, values = losses.shape
    rest = losses.sub(losses.mean(axis=1), axis=0)
    freedom = (seeds - 1) * (values - 1)
    error = math.sqrt(float(((rest - rest.mean()) ** 2).to_numpy().sum()) / freedom / seeds)
    half = math.hypot(_studentized(level, values, freedom) * error, stats.norm.ppf(0.5 + level / 2) * other)
    return ends(losses)[2] - half, ends(losses)[2] + half


@functools.cache
def _studentized(level: float, values: int, freedom: int) -> float:
    return float(stats.studentized_range.ppf(level, values, freedom))


def margin(some: dict[str, pd.DataFrame], others: dict[str, pd.DataFrame], apart: dict[str, float]) -> dict[str, float]:
    """The least range among ``some`` knobs less the largest among ``others`` (nats), with 95 % and 90 % intervals: those of all
    knobs are held at once (Bonferroni), so that whichever are the least and the largest are covered. apart: standard errors of
    what no seed shows, by knob."""
    both = {**some, **others}
    worth = {name: held_out_range(losses) for name, losses in both.items()}
    found = {"effect": min(worth[name] for name in some) - max(worth[name] for name in others)}
    for miss, suffix in ((0.05, ""), (0.1, "_90")):
        sure = {
            name: range_interval(losses, 1 - miss / len(both), apart.get(name, 0.0)) for name, losses in both.items()
        }
        found[f"low{suffix}"] = min(sure[name][0] for name in some) - max(sure[name][1] for name in others)
        found[f"high{suffix}"] = min(sure[name][1] for name in some) - max(sure[name][0] for name in others)
    return found


# ------------------------------------------------------------------------------------------------------ judging samples


class TrigramStatistics:
    """What a text says itself of a token after two others: counts of one, two and three tokens, interpolated as Witten and
    Bell (1991) do: a history seen c times with t different tokens after it has its counts believed by c / (c + t)."""

    def __init__(self, tokens: np.ndarray, vocab_size: int):
        ids = np.asarray(tokens, np.int64)
        self.size = vocab_size
        self.tables = []
        for order in (1, 2, 3):
            grams, seen = np.unique(self._keys(ids, order), return_counts=True)
            histories, first, kinds = np.unique(grams // vocab_size, return_index=True, return_counts=True)
            self.tables.append((grams, seen, histories, np.add.reduceat(seen, first), kinds))

    def _keys(self, ids: np.ndarray, order: int) -> np.ndarray:
        """One number for each run of ``order`` tokens (T - order + 1,)."""
        keys = np.zeros(len(ids) - order + 1, np.int64)
        for place in range(order):
            keys = keys * self.size + ids[place : len(ids) - order + 1 + place]
        return keys

    def nats(self, ids: list[int], first: int) -> np.ndarray:
        """What each token from number ``first`` (two at least) on costs, nats (T - first,)."""
        every = np.asarray(ids, np.int64)
        probability = np.full(len(ids) - first, 1 / self.size)
        for order, (grams, seen, histories, totals, kinds) in enumerate(self.tables, start=1):
            keys = self._keys(every, order)[first - order + 1 :]
            count = _looked_up(grams, seen, keys)
            total, different = (_looked_up(histories, values, keys // self.size) for values in (totals, kinds))
            probability = (count + different * probability) / np.maximum(total + different, 1) + (
                total == 0
            ) * probability
        return -np.log(probability)


def _looked_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The values of wanted keys; 0 for those that are not there. keys: in order."""
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def nats_under(model: object, ids: list[int], first: int) -> np.ndarray:
    """What each token from number ``first`` on costs under a model (T - first,): within windows of its length that move by a
    quarter of it, so that a token is scored with three quarters before it, or all there is."""
    import torch

    span, found, done = model.config.max_seq_len, [], first
    with torch.inference_mode():
        while done < len(ids):
            stop = min(len(ids), max(done + span // 4, min(span, len(ids)) if done == first else 0))
            piece = torch.tensor(ids[max(0, stop - span - 1) : stop])
            logs = model(piece[None, :-1])[0].log_softmax(-1).gather(-1, piece[1:, None])[:, 0]
            found.append(-logs[-(stop - done) :].numpy())
            done = stop
    return np.concatenate(found)


def said_again(ids: list[int], length: int = GRAM) -> float:
    """The share of a sample's runs of ``length`` tokens that stood in it before."""
    grams = [tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)]
    return 1 - len(set(grams)) / len(grams)


def distinct(samples: list[list[int]]) -> float:
    """Different pairs of tokens over all pairs, in the first ``PIECE`` tokens of some samples together."""
    pairs = [pair for ids in samples for pair in itertools.pairwise(ids[:PIECE])]
    return len(set(pairs)) / len(pairs)


# ------------------------------------------------------------------------------------------------------------ the study


def begin(settings: HyperparameterParameters) -> Hyperparameters:
    """The study. Seals the rule of the claim that it serves, before its first run. Raises TextError for a text that the runs
    would have to read twice."""
    study = Hyperparameters(settings, PRESETS[settings.preset], known_text(settings))
    own = [
        run for run in study.expected_runs() if run.data == study.data and run.model.vocab_size == settings.vocab_size
    ]
    most = max(run.train.max_steps * run.train.windows_per_step * run.train.resolve(run.model).seq_len for run in own)
    if (there := study.corpus["tokens"]["train"]) < most:
        raise TextError(
            f"The {settings.preset} preset of this study reads {most:,} training tokens once", f"{there:,}",
            "choose a smaller preset or another text; `tinylm study quickstart` takes small texts",
        )  # fmt: skip
    claims.seal(study.folder, settings.study)
    return study


class OneAtATime(SectionStudy):
    """What studies share that change one thing of a tuned baseline: the baseline, its rate, seeds, and what a step takes. Their
    presets have shape, flops, seeds, moves, eval_tokens and clock."""

    def baseline(self, rate: float) -> Setting:
        model = self.model(self.preset.shape)
        tokens = self.preset.flops / counts.train_flops_per_token(model, self.recipe.seq_len)
        train = self.recipe.train(
            model, tokens, rate, self.settings.seed, precision="fp32", eval_tokens=self.preset.eval_tokens
        )
        return Setting(BASELINE, BASELINE, model, train, self.data)

    def seeds(self) -> range:
        """Those of the comparisons: none of them chose the rate."""
        return range(self.settings.seed + 1, self.settings.seed + 1 + self.preset.seeds)

    @staticmethod
    def run_of(setting: Setting, seed: int) -> Run:
        tags = {"knob": setting.knob, "value": setting.value, "family": "knobs", "budget": 0.0}
        return Run(setting.model, setting.train.replace(seed=seed), setting.data, tags)

    def rates_of(self, flops: float, rates: list[float]) -> list[Run]:
        runs = [self.run_of(self.baseline(rate), self.settings.seed) for rate in rates]
        return [dataclasses.replace(run, tags={**run.tags, "family": "rates", "budget": flops}) for run in runs]

    def guesses(self, _: float = 0.0) -> list[float]:
        return bracket(self.recipe.learning_rate(counts.parameters(self.model(self.preset.shape))["total"]))

    def tune_rate(self, train: Callable[..., pd.DataFrame]) -> pd.DataFrame:
        """The baseline's runs at several rates, on a seed of their own; the best is kept as ``rate``."""
        tuned = tune([self.preset.flops], self.rates_of, self.guesses, train, self.preset.moves)
        self.rates = scaling.best_learning_rate(tuned, ("budget",))
        self.rate = float(f"{self.rates.learning_rate.iloc[0]:.3g}")
        return tuned

    def show_rate(self) -> None:
        edge, base = self.rates.edge.iloc[0], self.baseline(self.rate)
        self.report.section("The baseline's learning rate")
        self.report.text(
            f"{self.rates.rates.iloc[0]} rates, a factor of two apart, on a seed of its own: {self.rate:g} is best"
            + (f" (at the {edge} edge of those tried)." if edge else ".")
            + f" {base.train.max_steps:,} steps of {base.train.batch_size} windows."
        )

    def step_seconds(self, settings: Iterable[Setting]) -> dict[Setting, float]:
        """Seconds of a training step of each setting: eager, one thread, the best of three interleaved rounds. Measured once for
        a results folder; they stand in speed.json with machine, date and load."""
        path = self.folder / "speed.json"
        known = read_kept(path, _clock_of) if path.exists() else {"seconds_per_step": {}}
        paces = {}
        for setting in settings:
            train, model = setting.train, setting.model.resolve().to_dict()
            shape = {name: value for name, value in model.items() if name not in NO_TIME}
            shape |= {name: getattr(train, name) for name in ("batch_size", "grad_accum", "seq_len", "precision")}
            paces[setting] = files.sha256_bytes(files.canonical_json(shape).encode())[:16]
        todo = {pace: setting for setting, pace in paces.items() if pace not in known["seconds_per_step"]}
        if todo:
            known |= {
                "machine": backend.machine(), "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            }  # fmt: skip
        for _ in range(3):
            for pace, setting in todo.items():
                model, train = setting.model, setting.train.replace(compile=False, unique_tokens=None, stride=None)
                timed = planner.measure_speed([model], self.preset.clock / 3, 1, train.batch_size, train)
                tokens = train.windows_per_step * model.max_seq_len  # what that speed was reckoned with
                took = tokens * counts.train_flops_per_token(model, model.max_seq_len) / timed.flops_per_second[0]
                known["seconds_per_step"][pace] = min(took, known["seconds_per_step"].get(pace, math.inf))
        if todo:
            files.write_whole(path, json.dumps(known) + "\n")
        self.clock = known
        return {setting: known["seconds_per_step"][pace] for setting, pace in paces.items()}

    def clock_words(self) -> str:
        load = f", load average {self.clock['load']:.1f}" if self.clock["load"] is not None else ""
        return f"one thread, eager, one run alone, best of three interleaved rounds, {self.clock['date']}{load}"


class Hyperparameters(OneAtATime):
    """What each knob is worth."""

    title = "The map of hyperparameters, measured on {text}"

    # The plan -------------------------------------------------------------------------------------------------------------

    def settings_at(self, rate: float) -> list[Setting]:
        """The baseline, and each knob at each of its values that is another than the baseline's."""
        base = self.baseline(rate)
        found = [
            turned(base, name, move, self.preset.flops)
            for name in self.preset.knobs if name in KNOBS for move in KNOBS[name].moves
        ]  # fmt: skip
        different = {(setting.knob, setting.same): setting for setting in found if setting.same != base.same}
        return [base, *different.values()]

    def judge_run(self) -> Run:
        """The larger model under which samples are scored."""
        shape, flops = self.preset.judge
        model = self.model(shape)
        rate = self.recipe.learning_rate(counts.parameters(model)["total"])
        tokens = flops / counts.train_flops_per_token(model, self.recipe.seq_len)
        train = self.recipe.train(model, tokens, rate, self.settings.seed, eval_tokens=self.preset.eval_tokens)
        return Run(model, train, self.data, {"knob": "judge", "value": "", "family": "judge", "budget": flops})

    def expected_runs(self) -> list[Run]:
        rates = self.guesses()
        settings = self.settings_at(rates[1])
        seeded = [self.run_of(setting, seed) for seed in self.seeds() for setting in settings]
        return [*self.rates_of(self.preset.flops, rates), *seeded, self.judge_run()]

    def stages(self, train: Callable[..., pd.DataFrame]) -> list[pd.DataFrame]:
        """The baseline's rate; then every value with one seed, and after that with the others; and the judge."""
        tuned = self.tune_rate(train)
        self.settings_tried = self.settings_at(self.rate)

        def speaks(run: Run) -> bool:
            return run.tags["knob"] == BASELINE

        first, *others = self.seeds()
        parts = [
            train([self.run_of(setting, seed) for seed in seeds for setting in self.settings_tried], keep_models=speaks)
            for seeds in ([first], others)
        ]
        return [tuned, pd.concat(parts, ignore_index=True), train([self.judge_run()], keep_models=True)]

    def measure(self) -> None:
        self.tuned, self.measured, self.judged = self.stages(self.train)
        self.show_rate()

    # Losses ---------------------------------------------------------------------------------------------------------------

    def losses(self) -> dict[str, pd.DataFrame]:
        """For each knob the losses (seeds x values, the baseline's among them), nats per token of the baseline's tokenizer. A
        run that diverged counts as a guess at random."""
        frame = self.measured[self.measured.status != "failed"]
        base = frame[frame.knob == BASELINE]
        self.nats_per_bit = float((base.val_loss / base.val_bpb).mean())
        foreign = (frame.vocab_size != self.settings.vocab_size) | (frame.tokenizer != self.data.tokenizer)
        nats = frame.val_loss.where(~foreign, frame.val_bpb * self.nats_per_bit)
        frame = frame.assign(nats=nats.fillna(math.log(self.settings.vocab_size)))
        own = frame[frame.knob == BASELINE].set_index("seed").nats
        order = {name: list(dict.fromkeys(s.value for s in self.settings_tried if s.knob == name)) for name in KNOBS}
        found = {}
        for name, rows in frame[frame.knob != BASELINE].groupby("knob"):
            table = rows.pivot(index="seed", columns="value", values="nats").reindex(columns=order[name])
            found[name] = table.assign(**{BASELINE: own}).dropna()
        return found

    def stretch_error(self) -> float:
        """How far two scorings on different stretches of the validation text lie apart by that alone: the standard error of
        the difference of two means (nats), from the spread between windows of the baseline's own losses."""
        path = self.folder / "tables" / "stretches.json"
        run_id = self.measured[self.measured.knob == BASELINE].run_id.iloc[0]
        known = read_kept(path, lambda kept: {**kept, "sd": float(kept["sd"])}) if path.exists() else {}
        if known.get("run_id") != run_id:  # another seed has another baseline
            import torch

            from tinylm.checkpoint import load_model
            from tinylm.train import TextDataset

            model, _, _ = load_model(self.folder / "models" / f"{run_id}.safetensors")
            data = TextDataset.from_tokens(
                prepare_corpus(self.judge_run()).val, self.recipe.seq_len, self.recipe.seq_len
            )
            picks = np.linspace(0, len(data) - 1, min(256, len(data))).astype(int)
            with torch.inference_mode():
                means = [float(model.loss(*(part[None] for part in data[i]))) for i in picks]
            known = {"run_id": run_id, "windows": len(means), "sd": float(np.std(means, ddof=1))}
            files.write_whole(path, json.dumps(known) + "\n")
        return known["sd"] * math.sqrt(2 / max(1, self.preset.eval_tokens // self.recipe.seq_len))

    def ranked(self, tables: dict[str, pd.DataFrame], knobs: dict[str, Knob], times: dict) -> pd.DataFrame:
        """Knobs in the order of what they are worth, a row each."""
        rows = []
        for name, losses in tables.items():
            worst, best, plain = ends(losses)
            other = self.stretches if name in JUDGED_APART else 0.0
            low, high = range_interval(losses, other=other)
            taken = [times.get((name, value), 1.0) for value in losses.columns]
            rows.append(
                {"knob": name, "box": knobs[name].group, "star": "★" if knobs[name].star else "", "impact": held_out_range(losses),
                 "low": low, "high": high, "plain": plain, "best": best, "worst": worst,
                 "seeds": len(losses), "time_low": min(taken), "time_high": max(taken), "beside": knobs[name].beside,
                 "note": knobs[name].note}
            )  # fmt: skip
        table = pd.DataFrame(rows).sort_values("impact", ascending=False, ignore_index=True)
        return table.assign(rank=(~table.beside).cumsum().where(~table.beside))

    # Telling --------------------------------------------------------------------------------------------------------------

    def describe_knobs(self) -> None:
        """The baseline, and each knob with its range."""
        base = self.baseline(self.guesses()[1])
        total = counts.parameters(base.model)["total"]
        known = {**base.model.resolve().to_dict(), **base.train.to_dict(), **base.data.to_dict()}
        known |= GenerateConfig().to_dict() | {"data size": "all that it reads"}
        tried = {name: [] for name in self.preset.knobs}
        for setting in self.settings_at(base.train.learning_rate)[1:]:
            tried[setting.knob].append(setting.value)
        for name, move in self._drawn():
            tried[name].append(f"{next(iter(move.values())):g}")
        knobs = {**KNOBS, **SAMPLING}
        rows = [
            {"knob": name, "box": knobs[name].group, "star": "★" if knobs[name].star else "",
             "baseline": _plainly(known.get(name.partition(",")[0])), "values": ", ".join(values), "note": knobs[name].note}
            for name, values in tried.items()
        ]  # fmt: skip
        self.report.section("What is turned")
        self.report.text(
            f"The baseline is the recipe at the small place of the ablations: {base.model.hidden_size} x "
            f"{base.model.num_layers}, {quantity(total)} parameters, {self.preset.flops:.3g} FLOPs, in fp32. One knob is turned "
            "at a time, a quarter and four times of the baseline's value where it is a number, or what a model can have that comes "
            "nearest, and everything else stays; where "
            "that changes what a step costs, the number of steps changes so that the FLOPs stay, and warm-up keeps its share. "
            f"{self.preset.seeds} seeds each, the same for all; the baseline's learning rate was chosen on another."
        )
        self.report.table(
            pd.DataFrame(rows), "knobs", "Every knob with its range, as written before anything was trained (a learning rate "
            "stands at its first guess)", knob="", box="", star="", baseline="", values="", note="",
        )  # fmt: skip

    def show_noise(self) -> None:
        base = self.measured[self.measured.knob == BASELINE]
        self.noise = base.assign(place=BASELINE)
        super().show_noise()
        self.stretches = self.stretch_error()
        self.report.text(
            f"Where a knob changes how the text is cut ({', '.join(JUDGED_APART)}), runs are judged on other stretches of the "
            f"validation text. By the spread between windows that alone moves a difference by {self.stretches:.4f} nats (standard "
            "error), which their intervals hold too."
        )

    def show_impacts(self) -> None:
        """What each knob of the model, its training and its data is worth."""
        self.tables = self.losses()
        seconds = self.step_seconds(self.settings_tried)
        took = {(s.knob, s.value): step * s.train.max_steps for s, step in seconds.items()}
        times = {key: value / took[BASELINE, BASELINE] for key, value in took.items()}
        self.impacts = self.ranked(self.tables, KNOBS, times)
        ranked = self.impacts[~self.impacts.beside]
        lost = self.measured[self.measured.status == "diverged"].groupby(["knob", "value"]).size()
        self.report.section("What each knob is worth")
        self.report.text(
            "The impact of a knob is the loss between its worst and its best value, the baseline's included. The plain range of a "
            "few noisy means is too large even where a knob does nothing, since the worst and the best value are the unluckiest "
            "and the luckiest too. So for each seed the other seeds choose the two values, and it tells their difference: the "
            "mean of that is the impact, zero on average where there is none. Its interval holds the differences of all pairs of "
            "values at once (Tukey's, seeds as blocks), so whichever came out largest is covered; where it begins below zero, the "
            "knob is not shown to do anything. Losses under another tokenizer are bits per "
            f"byte, turned into nats per token of the baseline ({self.nats_per_bit:.3f} nats a bit per byte)."
            + (f" Diverged, and counted as a guess at random: {_counted(lost)}." if len(lost) else "")
        )
        formats = {
            "rank": ".0f", "knob": "", "star": "", "box": "", "impact": ".4f", "low": "+.4f", "high": "+.4f", "plain": ".4f",
            "best": "", "worst": "", "time_low": ".2f", "time_high": ".2f",
        }  # fmt: skip
        self.report.table(
            self.impacts, "impacts", "Knobs in the order of their impact (nats per token, 95 % interval), with the plain range, "
            "the best and the worst value, and the least and the most time that a run of equal FLOPs takes over the baseline's "
            f"({self.clock_words()}); without a rank: shown beside, no part of the claim", **formats,
        )  # fmt: skip
        self.report.figure(
            "impacts", "The impact of each knob with its 95 % interval; orange: starred by the design; hollow: not told from none; "
            "diamond: shown beside; arrow: below 0.001",
            lambda ax: _draw_impacts(self.impacts, ax), size=(7.4, 1.1 + 0.27 * len(self.impacts)),
        )  # fmt: skip
        values = pd.concat(
            [losses.melt(ignore_index=False, var_name="value", value_name="nats").reset_index().assign(knob=name)
             for name, losses in self.tables.items()]
        )  # fmt: skip
        means = values.groupby(["knob", "value"], sort=False).nats.agg(["mean", "std"]).reset_index()
        write_table(self.folder / "tables" / "values.csv", means)
        top = ", ".join(f"{row.knob} ({row.impact:.3f})" for row in ranked.head(5).itertuples())
        self.findings.append(f"The knobs worth most, in nats between their worst and best value: {top}.")

    # Generation -----------------------------------------------------------------------------------------------------------

    def _drawn(self) -> list[tuple[str, dict]]:
        """The knobs of sampling with their values."""
        usual = GenerateConfig().to_dict()
        kind = {field.name: field.type for field in dataclasses.fields(GenerateConfig)}
        return [
            (name, {name: (round if "int" in kind[name] else float)(usual[name] * v.factor if isinstance(v, Times) else v)})
            for name in self.preset.knobs if name in SAMPLING for move in SAMPLING[name].moves for v in move.values()
        ]  # fmt: skip

    def show_generation(self) -> None:
        """What each knob of sampling does to what is written."""
        kept = self._samples()
        rows, text = pd.DataFrame(kept["rows"]), kept["text"]
        own = rows[rows.knob == BASELINE].set_index("seed")
        self.spoken = {
            name: group.pivot(index="seed", columns="value", values="judge").assign(**{BASELINE: own.judge})
            for name, group in rows[rows.knob != BASELINE].groupby("knob", sort=False)
        }  # fmt: skip
        means = rows.groupby(["knob", "value"], sort=False)[[*SCORES, "seconds"]].mean().reset_index()
        means["time"] = means.seconds / means.seconds[means.knob == BASELINE].iloc[0]
        times = {(row.knob, row.value): row.time for row in means.itertuples()}
        self.sampling = self.ranked(self.spoken, SAMPLING, times)
        gaps = {
            score: {name: float(np.ptp(means[score][means.knob.isin([name, BASELINE])])) for name in self.spoken}
            for score in SCORES[1:]
        }  # fmt: skip
        self.sampling = self.sampling.assign(**{score: self.sampling.knob.map(gap) for score, gap in gaps.items()})
        judge = self.judged.iloc[0]
        self.report.section("What the knobs of sampling do")
        self.report.text(
            f"{self.preset.prompts} pieces of {PROMPT} tokens of the validation text were gone on from, with the baseline's model "
            f"of each seed. `judge` is the loss of what came (nats per token) under a model of {quantity(judge.params_total)} "
            f"parameters and {judge.flops:.2g} FLOPs; `ngram` that under the text's own counts of three tokens in "
            f"{self.preset.counted:,}; `repetition` the share of runs of {GRAM} tokens that the sample had before; `distinct` the "
            f"different pairs among all in the first {PIECE} tokens of all samples. A low loss is not the aim: the text itself, at "
            f"the same places, has a loss of {text['judge']:.2f} under the judge, {text['ngram']:.2f} under its counts, "
            f"repetition {text['repetition']:.3f} and distinct {text['distinct']:.3f}."
        )
        self.report.table(
            pd.concat([means, pd.DataFrame([{"knob": "the text itself", "value": "", **text}])], ignore_index=True), "samples",
            "What each setting of the sampler writes, mean over seeds; time over the baseline's", knob="", value="", judge=".3f",
            ngram=".3f", repetition=".3f", distinct=".3f", time=".2f",
        )  # fmt: skip
        self.report.table(
            self.sampling, "sampling_impacts", "Knobs of sampling in the order of their impact on the loss under the judge (nats "
            "per token, 95 % interval), with the range over their values of the other three scores", rank=".0f", knob="", star="",
            impact=".4f", low="+.4f", high="+.4f", best="", worst="", ngram=".3f", repetition=".3f", distinct=".3f",
        )  # fmt: skip
        self.report.figure(
            "samples", "What samples lose under the larger model, and how much they say again; dashed: the text itself; values "
            "without a number lie beside the baseline",
            lambda ax: _draw_samples(means, text, ax), size=(8.2, 4.4),
        )  # fmt: skip

    def _samples(self) -> dict:
        """Scores of samples, drawn once for a results folder: they stand in tables/samples.json."""
        path = self.folder / "tables" / "samples.json"
        base = self.measured[(self.measured.knob == BASELINE) & self.measured.val_loss.notna()]
        asked = [(BASELINE, {}), *self._drawn()]
        names = {
            "judge": self.judged.run_id.iloc[0],
            "models": base.run_id.tolist(),
            "asked": [[k, m] for k, m in asked],
        }
        known = read_kept(path, _samples_of) if path.exists() else {}
        if {name: known.get(name) for name in names} == names:
            return known
        from tinylm.checkpoint import load_model
        from tinylm.generate import generate

        models = self.folder / "models"
        judge, tokenizer, _ = load_model(models / f"{names['judge']}.safetensors")
        corpus = prepare_corpus(self.judge_run())
        grams = TrigramStatistics(corpus.train[: self.preset.counted], tokenizer.vocab_size)
        length = GenerateConfig().max_new_tokens
        starts = np.linspace(0, len(corpus.val) - PROMPT - length, self.preset.prompts).astype(int)
        prompts = [tokenizer.decode(corpus.val[start : start + PROMPT]) for start in starts]

        def scores(pairs: list[tuple[list[int], list[int]]]) -> dict[str, float]:
            per_token = {
                "judge": lambda before, ids: nats_under(judge, [*before, *ids], len(before)),
                "ngram": lambda before, ids: grams.nats([*before, *ids], max(2, len(before))),
            }
            found = {
                name: float(np.mean(np.concatenate([score(*pair) for pair in pairs])))
                for name, score in per_token.items()
            }
            found["repetition"] = float(np.mean([said_again(ids) for _, ids in pairs]))
            return found | {"distinct": distinct([ids for _, ids in pairs])}

        rows = []
        for run_id, seed in zip(base.run_id, base.seed, strict=True):
            model, _, _ = load_model(models / f"{run_id}.safetensors")
            for name, move in asked:
                pages = generate(
                    model, tokenizer, prompts, GenerateConfig(seed=int(seed) * self.preset.prompts, **move)
                )
                pairs = [(tokenizer.encode(page.prompt), page.token_ids) for page in pages]
                value = f"{next(iter(move.values())):g}" if move else BASELINE
                about = {"knob": name, "value": value, "seed": int(seed), "run_id": run_id, "seconds": pages[0].seconds}
                rows.append({**about, **scores(pairs)})
        text = scores([np.split(corpus.val[s : s + PROMPT + length].astype(int), [PROMPT]) for s in starts])
        known = {**names, "text": text, "rows": rows}
        files.write_whole(path, json.dumps(known) + "\n")
        return known

    # The map --------------------------------------------------------------------------------------------------------------

    def show_map(self) -> None:
        """The design's map, each cell in the colour of what it was measured to be worth; and whether its stars hold."""
        choices = self._choices()
        ranked = self.impacts[~self.impacts.beside]
        starred = [name for name, knob in KNOBS.items() if knob.star and not knob.beside and name in self.preset.knobs]
        top = ranked.knob.head(len(starred)).tolist()
        rows = [*ranked.itertuples(), *self.sampling.itertuples()]
        found = {row.knob: (row.impact, row.low) for row in rows} | choices
        self.report.section("The map")
        self.report.text(
            "The design's map of hyperparameters with what was measured in each cell: nats per token between the worst and the "
            "best value. Stars are the design's; a thick frame marks the cells that were measured to be worth most, as many as the "
            "design starred. Sampling is judged by what its samples lose under the larger model, so its colours are its own. The "
            "six choices are the ablations' (equal parameters and tokens, each at its own learning rate): the range between the "
            "worst and the best mean, in brackets where no alternative is told from the baseline"
            + ("." if len(choices) == len(CHOICES) else ", where they were measured at this place.")
        )
        self.report.figure(
            "map", "The map of hyperparameters: impact of each knob in nats per token, in brackets where it is not told from none; "
            "★ as the design has it, thick frames as "
            "measured", lambda ax: _draw_map(found, [*top, self.sampling.knob.iloc[0]], ax), size=(10.2, 7.4),
        )  # fmt: skip
        held = [name for name in starred if name in top]
        ranks = ranked.set_index("knob")["rank"]
        words = ", ".join(f"{name} {ranks[name]:.0f}" for name in starred)
        said = (
            f"Of the {len(starred)} knobs of training, model and data that the design stars, {len(held)} are among the "
            f"{len(starred)} worth most ({', '.join(held) or 'none'}); their ranks of {len(ranked)}: {words}."
        )
        first = self.sampling.iloc[0]
        spoken = self.sampling.set_index("knob").impact
        said_too = (
            f"In generation the design stars temperature, and {first.knob} is worth most ({first.impact:.2f} nats"
            + (")." if first.knob == "temperature" else f", temperature {spoken.get('temperature', math.nan):.2f}).")
        )
        self.report.text(f"{said} {said_too}")
        self.findings += [said, said_too]
        self._write_effects()

    def _choices(self) -> dict[str, tuple[float, float]]:
        """The range of each architecture choice from ablations at this very place, beside this study's folder or in the
        reference results; and the low end of its interval, or -1 where no alternative of it is told from the baseline."""
        for root in (self.folder.parent, repository() / "results"):
            tables = root / "ablations" / "tables"
            if not all((tables / f"{name}.csv").exists() for name in ("effects", "places", "contrasts_small")):
                continue
            place = pd.read_csv(tables / "places.csv").set_index("place").loc["small"]
            total = counts.parameters(self.model(self.preset.shape))["total"]
            if (place.params_total, place.flops) == (total, self.preset.flops):
                effects = pd.read_csv(tables / "effects.csv").set_index("part")
                contrasts = pd.read_csv(tables / "contrasts_small.csv")
                told = set(contrasts.choice[contrasts.verdict.isin(["worse", "better"]) & contrasts.kind.eq("equal")])
                return {
                    cell: (float(effects.effect[part]), float(effects.low[part]) if choice in told else -1.0)
                    for cell, choice in CHOICES.items() if (part := f"small: range of {choice}") in effects.index
                }  # fmt: skip
        return {}

    def _write_effects(self) -> None:
        """tables/effects.csv, which ``claims`` reads."""
        ranked = {name: self.tables[name] for name in self.impacts.knob[~self.impacts.beside]}
        starred = {name: losses for name, losses in ranked.items() if KNOBS[name].star}
        others = {name: losses for name, losses in ranked.items() if name not in starred}
        asked = self.measured[self.measured.knob.isin([*ranked, BASELINE])]
        warm = {name: losses for name, losses in self.spoken.items() if SAMPLING[name].star}
        cold = {name: losses for name, losses in self.spoken.items() if name not in warm}
        models = [*asked.run_id[asked.knob == BASELINE], self.judged.run_id.iloc[0]]
        apart = dict.fromkeys(JUDGED_APART, self.stretches)
        rows = []
        for part, some, rest, runs in (
            ("least starred less largest other, training", starred, others, dict.fromkeys(asked.run_id)),
            ("temperature less largest other, generation", warm, cold, models),
        ):
            seeds = min(len(losses) for losses in some.values())
            rows.append(claims.effects_row(part, **margin(some, rest, apart), seeds=seeds, runs=runs))
        table = pd.DataFrame(rows, columns=list(claims.COLUMNS))
        write_table(self.folder / "tables" / "effects.csv", table)
        for row, kind in zip(table.itertuples(), ("of training, model and data", "of generation"), strict=True):
            self.findings.append(
                f"The starred knob {kind} that is worth least is worth {row.effect:+.3f} nats "
                f"({interval(row.low, row.high, '+.3f')}) against the other knob that is worth most."
            )

    def end(self) -> None:
        self.finish([self.tuned, self.measured, self.judged], ("knob", "value"))


def _clock_of(kept: dict) -> dict:
    """What ``step_seconds`` wrote, as it is used."""
    seconds = {pace: float(took) for pace, took in kept["seconds_per_step"].items()}
    load = None if kept["load"] is None else float(kept["load"])
    return {**kept, "seconds_per_step": seconds, "date": str(kept["date"]), "load": load}


def _samples_of(kept: dict) -> dict:
    """What ``_samples`` wrote, as it is used."""
    scored = {score: float for score in SCORES}
    kinds = {"knob": str, "value": str, "seed": int, "run_id": str, "seconds": float, **scored}
    rows = [{name: kind(row[name]) for name, kind in kinds.items()} for row in kept["rows"]]
    return {**kept, "rows": rows, "text": {score: float(kept["text"][score]) for score in SCORES}}


def _plainly(value: object) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _counted(lost: pd.Series) -> str:
    return ", ".join(f"{knob} {value} ({number})" for (knob, value), number in lost.items())


# -------------------------------------------------------------------------------------------------------------- figures


def _draw_impacts(table: pd.DataFrame, ax: object) -> None:
    """A line a knob: its impact with its interval, on a log axis; what is below its left end stands there."""
    least = 1e-3
    for i, row in enumerate(table.itertuples()):
        colour = plots.COLOURS[1] if row.star else plots.COLOURS[0]
        ax.plot(np.clip([row.low, row.high], least, None), [i, i], color=colour, linewidth=2.5, solid_capstyle="butt")
        marker = "<" if not row.impact > least else "D" if row.beside else "o"
        face = colour if row.low > 0 else "white"
        ax.plot(max(row.impact, least), i, marker, color=colour, markerfacecolor=face)
    ax.set_yticks(range(len(table)), [f"{row.knob} {row.star}" for row in table.itertuples()])
    ax.set_ylim(len(table) - 0.4, -0.6)
    ax.set_xscale("log")
    ax.set_xlim(left=least / 1.15)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("impact: loss between worst and best value (nats/token)")


def _draw_samples(means: pd.DataFrame, text: dict[str, float], ax: object) -> None:
    ax.axhline(text["judge"], color=plots.GREY, linestyle="--", linewidth=1)
    ax.axvline(text["repetition"], color=plots.GREY, linestyle="--", linewidth=1)
    base = means[means.knob == BASELINE].iloc[0]
    names = [name for name in SAMPLING if name in set(means.knob)]
    for i, name in enumerate(names):
        rows = means[means.knob == name]
        for row in rows.itertuples():
            ax.plot(
                [base.repetition, row.repetition],
                [base.judge, row.judge],
                color=plots.COLOURS[i],
                linewidth=0.8,
                alpha=0.6,
            )
            if abs(row.judge - base.judge) > 0.2 or row.repetition - base.repetition > 0.01:
                ax.annotate(
                    row.value, (row.repetition, row.judge), (-7, -3), textcoords="offset points", ha="right", fontsize=9,
                    color=plots.COLOURS[i],
                )  # fmt: skip
        ax.plot(rows.repetition, rows.judge, plots.MARKERS[i], color=plots.COLOURS[i], label=name)
    ax.plot(base.repetition, base.judge, "*", color="black", markersize=12, label=BASELINE)
    ax.set_xscale("symlog", linthresh=1e-3)
    ax.set_xlim(-4e-4, 1)
    ax.set_xticks([0, 1e-3, 1e-2, 0.1, 1], ["0", "0.001", "0.01", "0.1", "1"])
    ax.minorticks_off()
    ax.set_xlabel(f"repetition (share of runs of {GRAM} tokens said before)")
    ax.set_ylabel("loss under the larger model (nats/token)")
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _draw_map(found: dict[str, tuple[float, float]], most: list[str], ax: object) -> None:
    """Six boxes as the design has them, a cell a knob. found: impact and low end of its interval by cell (nats), in brackets
    where that is below zero; most: cells with a thick frame."""
    stars = {name for name, knob in (*KNOBS.items(), *SAMPLING.items()) if knob.star}
    cells = {
        group: [name for name, knob in KNOBS.items() if knob.group == group and not knob.beside] for group in GROUPS
    }
    cells["generation"], cells["arch choices"] = list(SAMPLING), list(CHOICES)
    spoken = max([found[name][0] for name in SAMPLING if name in found], default=1.0)
    scales = {"generation": (mpl.colormaps["PuBu"], LogNorm(spoken / 300, spoken))}
    usual = (mpl.colormaps["YlOrRd"], LogNorm(1e-3, 1.0))
    rows = [max(len(cells[group]) for group in GROUPS[start : start + 3]) for start in (0, 3)]
    tops = [0.0, rows[0] + 1.6]
    for place, group in enumerate(GROUPS):
        left, top = 3.4 * (place % 3), tops[place // 3]
        ax.text(left + 1.6, top + 0.45, group.upper(), ha="center", va="center", fontweight="bold", fontsize=10.5)
        colours, norm = scales.get(group, usual)
        for i, name in enumerate(cells[group]):
            y, (value, low) = top + 1 + i, found.get(name, (None, None))
            colour = "#F2F2F2" if value is None else colours(float(np.clip(norm(max(value, norm.vmin)), 0, 1)) * 0.9)
            dark = value is not None and sum(np.multiply(colour[:3], (0.3, 0.59, 0.11))) < 0.5
            ink = "white" if dark else "#777777" if value is None else "black"
            ax.add_patch(patches.Rectangle((left, y), 3.2, 0.92, facecolor=colour, edgecolor="white"))
            ax.text(left + 0.12, y + 0.47, name + (" ★" if name in stars else ""), va="center", color=ink, fontsize=10)
            said = "not measured" if value is None else f"{max(value, 0):.2g}" if value >= 0.0005 else "0.000"
            said = f"({said})" if low is not None and low < 0 else said
            ax.text(left + 3.08, y + 0.47, said, ha="right", va="center", color=ink, fontsize=10)
            if name in most:
                frame = patches.Rectangle(
                    (left + 0.02, y + 0.02), 3.16, 0.88, fill=False, edgecolor="black", linewidth=2.2
                )
                ax.add_patch(frame)
    bottom = tops[1] + 1 + rows[1] + 0.5
    for left, (colours, norm), words in (
        (0.0, usual, "training, model, data"), (5.2, scales["generation"], "generation: loss of its samples"),
    ):  # fmt: skip
        for i in range(60):
            ax.add_patch(
                patches.Rectangle((left + i / 12.5, bottom), 1 / 12.5, 0.4, color=colours(0.9 * i / 59), linewidth=0)
            )
        for share in (0, 0.5, 1):
            value = norm.vmin * (norm.vmax / norm.vmin) ** share
            ax.text(left + 4.8 * share, bottom + 0.75, f"{value:.2g}", ha="center", va="center", fontsize=8.5)
        ax.text(left + 2.4, bottom + 1.25, f"nats per token ({words})", ha="center", va="center", fontsize=8.5)
    ax.set_xlim(-0.2, 10.2)
    ax.set_ylim(bottom + 1.6, -0.2)
    ax.axis("off")
