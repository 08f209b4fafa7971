"""The extrapolation study, step by step: what studies/extrapolation.ipynb narrates.

Models that differ in their kind of position alone are trained on windows of T tokens and then read stretches of 8T held-out
tokens, the very same for all. A kind whose positions go on carries them on over the whole stretch; each kind also slides a
window of T tokens over it, which is all that learned positions can do and the honest baseline for the others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from tinylm import counts
from tinylm.config import ModelConfig
from tinylm.errors import LabError, TextError
from tinylm.study import claims, contrasts, plots
from tinylm.study.design import bracket, tune
from tinylm.study.optima import best_learning_rate
from tinylm.study.parameters import ExtrapolationParameters, within_repository
from tinylm.study.report import interval, write_table
from tinylm.study.runs import Run, _read_checked, _write_checked, prepare_corpus
from tinylm.study.sections import SectionStudy
from tinylm.study.steps import have, known_text
from tinylm.words import duration, quantity

# ------------------------------------------------------------------------------------------------------------------ as data

BASE = "rope"
KINDS = (BASE, "learned", "sinusoidal", "none")
ENDING = ("learned",)  # their table ends at T: they can only slide
REACH = 8  # how many training windows a stretch holds
SPANS = {"within T": (0, 1), "T to 2T": (1, 2), "2T to 4T": (2, 4), "4T to 8T": (4, 8)}  # name -> from, to, in windows
BEYOND = tuple(SPANS)[1:]
SLIDING = "both sliding"  # how contrasts are named whose models all read a window of T anew
PRIMARY = ("sinusoidal", "learned")  # the contrasts with RoPE that the claim names
COLOURS = dict(zip(KINDS, plots.COLOURS, strict=False))
LINEAR = 0.02  # nats: differences are drawn linearly up to here, and by their logarithm beyond


@dataclass(frozen=True)
class Preset:
    """How much a preset measures. shape: hidden_size, num_layers and num_heads; window: T, in tokens; tokens: of each run;
    seeds: of each kind, besides the one that chose its rate; stretches: of REACH * T held-out tokens at most; moves: how often
    a bracket of rates may move outward; eval_tokens: of each evaluation while training."""

    shape: tuple[int, int, int]
    window: int
    tokens: float
    seeds: int
    stretches: int
    moves: int
    eval_tokens: int

    @property
    def length(self) -> int:
        """Positions of a stretch."""
        return REACH * self.window

    @property
    def step(self) -> int:
        """By how much a sliding window moves on: each token has at least 7/8 of a window before it."""
        return max(1, self.window // 8)


PRESETS = {
    "smoke": Preset((16, 2, 2), 32, 2e4, seeds=3, stretches=24, moves=0, eval_tokens=4096),
    "quick": Preset((32, 2, 4), 128, 4e5, seeds=3, stretches=64, moves=1, eval_tokens=16384),
    "full": Preset((64, 3, 4), 128, 1.6e6, seeds=5, stretches=140, moves=1, eval_tokens=16384),
}


# --------------------------------------------------------------------------------------------------------------- scoring


def edges_of(window: int) -> np.ndarray:
    """Where positions 1 to REACH * window are cut into bins a quarter of an octave wide, whole positions each and each
    multiple of the window by a power of two an edge: bin i holds positions edges[i] + 1 to edges[i + 1]."""
    first, last = -math.ceil(4 * math.log2(window)), round(4 * math.log2(REACH))
    return np.array(sorted({0, *(max(1, round(window * 2 ** (k / 4))) for k in range(first, last + 1))}))


def stretches_of(tokens: np.ndarray, length: int, count: int) -> np.ndarray:
    """Stretches of ``length`` tokens and one more to predict (S, length + 1), int64, that share no position, spread evenly over
    held-out ``tokens`` (n,): ``count``, or as many as there are."""
    there = (len(tokens) - 1) // length
    starts = length * np.linspace(0, there - 1, min(count, there)).round().astype(int)
    return np.stack([np.asarray(tokens[start : start + length + 1], dtype=np.int64) for start in starts])


def score_stretches(model: object, stretches: np.ndarray, window: int, step: int) -> dict[str, np.ndarray | None]:
    """The loss (nats) of every token of stretches (S, length + 1), as (S, length) in two ways. ``carried``: the model reads the
    whole stretch at once, its positions carried on, each token after all before it; None for a kind that ends. ``slid``: it
    sees windows of its training length that move on by ``step``, each read anew from position 0, so that from the first
    window on each token has the last window - step + 1 to window tokens before it."""
    import torch
    import torch.nn.functional as F

    def losses(inputs: object, targets: object) -> np.ndarray:
        """(B, T) and (B, t): of the last t positions of each row, (B, t)."""
        logits = model.logits(model.hidden(inputs)[:, -targets.shape[1] :]).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).numpy()

    def all_losses(inputs: object, targets: object) -> np.ndarray:
        at_once = max(1, 8192 // inputs.shape[1])
        pieces = zip(inputs.split(at_once), targets.split(at_once), strict=True)
        return np.concatenate([losses(*piece) for piece in pieces])

    ids = torch.from_numpy(stretches)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    with torch.inference_mode():
        first = all_losses(inputs[:, :window], targets[:, :window])
        windows = inputs[:, step:].unfold(1, window, step)  # (S, n, window)
        ends = targets[:, window:].unfold(1, step, step)  # (S, n, step): what each window adds
        rest = all_losses(windows.flatten(0, 1), ends.flatten(0, 1)).reshape(len(ids), -1)
        carried = None if model.config.position in ENDING else all_losses(inputs, targets)
    return {"carried": carried, "slid": np.concatenate([first, rest], axis=1)}


def by_bin(losses: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Means of (S, length) over bins of positions, (S, bins)."""
    return np.add.reduceat(losses, edges[:-1], axis=1) / np.diff(edges)


def score_run(folder: str, run_id: str, run: Run, preset: Preset) -> dict:
    """What is kept of a trained model's scores: the mean loss of each stretch in each bin of positions, in both ways, and a
    hash of the tokens scored."""
    from tinylm.checkpoint import load_model

    model, _, _ = load_model(Path(folder) / "models" / f"{run_id}.safetensors")
    stretches = stretches_of(prepare_corpus(run).val, preset.length, preset.stretches)
    edges = edges_of(preset.window)
    found = score_stretches(model, stretches, preset.window, preset.step)
    return {
        "run_id": run_id, "position": run.model.position, "seed": run.train.seed, "window": preset.window, "step": preset.step,
        "tokens_sha256": hashlib.sha256(stretches.astype("<i8").tobytes()).hexdigest(), "edges": edges.tolist(),
        **{way: None if x is None else by_bin(x, edges).astype(float).round(6).tolist() for way, x in found.items()},
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- intervals


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and stretches with its standard error and degrees of freedom, all of one shape."""

    value: np.ndarray
    error: np.ndarray
    freedom: np.ndarray

    def ends(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        half = self.error * stats.t.ppf(0.5 * (1 + level), self.freedom)
        return self.value - half, self.value + half

    @property
    def p(self) -> np.ndarray:
        """Two-sided, of no difference."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return 2 * stats.t.sf(np.abs(self.value) / self.error, self.freedom)


def crossed_mean(values: np.ndarray) -> Mean:
    """The mean of values (seeds, stretches, ...) over both, each taken for a sample of many: seeds and stretches are crossed
    random effects, so that Var = (MS_seeds + MS_stretches - MS_rest) / n, with Satterthwaite's (1946) degrees of freedom. No less
    than what either alone gives. With a handful of seeds that is honest, where a bootstrap over them would be too narrow."""
    seeds, stretches = values.shape[:2]
    mean, rows, columns = values.mean((0, 1)), values.mean(1), values.mean(0)
    a = stretches * rows.var(0, ddof=1)
    b = seeds * columns.var(0, ddof=1)
    free = (seeds - 1) * (stretches - 1)
    rest = ((values - rows[:, None] - columns[None] + mean) ** 2).sum((0, 1)) / free
    total = np.maximum(a + b - rest, np.maximum(a, b))
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = total**2 / (a**2 / (seeds - 1) + b**2 / (stretches - 1) + rest**2 / free)
    freedom = np.where(total > 0, np.maximum(freedom, 1), free)
    return Mean(mean, np.sqrt(total / (seeds * stretches)), freedom)


# ----------------------------------------------------------------------------------------------------------------- the study


def begin(settings: ExtrapolationParameters) -> Extrapolation:
    """The study. Seals the rules of the claims that it serves, before its first run. Raises TextError for a text that the runs
    would read twice, or whose held-out part is too short to be scored."""
    preset = PRESETS[settings.preset]
    study = Extrapolation(settings, preset, known_text(settings))
    tokens = study.corpus["tokens"]
    for part, least in (("train", preset.tokens), ("val", 8 * preset.length)):
        if tokens[part] < least:
            raise TextError(
                f"The {settings.preset} preset of this study takes {least:,.0f} {part} tokens", f"{tokens[part]:,}",
                "choose a smaller preset or another text",
            )  # fmt: skip
    claims.seal(study.folder, settings.study)
    return study


class Extrapolation(SectionStudy):
    """What each kind of position is worth beyond the length it was trained on."""

    title = "Positions within and beyond the training length on {text}"

    def __init__(self, settings: ExtrapolationParameters, preset: Preset, corpus: dict):
        super().__init__(settings, preset, corpus)
        self.recipe = dataclasses.replace(self.recipe, seq_len=preset.window)

    # The plan -------------------------------------------------------------------------------------------------------------

    def model_of(self, kind: str) -> ModelConfig:
        return self.recipe.model(self.preset.shape, self.settings.vocab_size, position=kind)

    def runs_of(self, kind: str, rates: list[float], seed: int | None = None, family: str = "rates") -> list[Run]:
        model, seed = self.model_of(kind), self.settings.seed if seed is None else seed
        tags = {"family": family, "budget": 0.0}
        trains = [
            self.recipe.train(model, self.preset.tokens, rate, seed, eval_tokens=self.preset.eval_tokens)
            for rate in rates
        ]
        return [Run(model, train, self.data, tags) for train in trains]

    def guesses(self, kind: str) -> list[float]:
        return bracket(self.recipe.learning_rate(counts.parameters(self.model_of(kind))["total"]))

    def seeded_runs(self, rates: dict[str, float]) -> list[Run]:
        """The runs that are compared: none of their seeds chose a rate."""
        first = self.settings.seed + 1
        seeds = range(first, first + self.preset.seeds)
        return [
            run for kind, rate in rates.items() for seed in seeds for run in self.runs_of(kind, [rate], seed, "seeds")
        ]

    def stages(self, train: Callable[..., pd.DataFrame]) -> list[pd.DataFrame]:
        """Rates of each kind on one seed; then the seeds at the best, whose models are kept until they are scored."""
        tuned = tune(list(KINDS), self.runs_of, self.guesses, train, self.preset.moves)
        self.rates = best_learning_rate(tuned, ("position",)).set_index("position")
        if lost := [kind for kind in KINDS if kind not in self.rates.index]:
            raise LabError("A comparison needs a rate at which no run diverges", f"none for {', '.join(lost)}")
        rates = {kind: float(f"{self.rates.learning_rate[kind]:.3g}") for kind in KINDS}
        self.asked = self.seeded_runs(rates)
        return [tuned, train(self.asked, keep_models=True)]

    def expected_runs(self) -> list[Run]:
        guesses = {kind: self.guesses(kind) for kind in KINDS}
        runs = [run for kind, rates in guesses.items() for run in self.runs_of(kind, rates)]
        return runs + self.seeded_runs({kind: rates[1] for kind, rates in guesses.items()})

    def plan_sweep(self) -> None:
        super().plan_sweep()
        preset, models = self.preset, len(KINDS) * self.preset.seeds
        stretches = min(preset.stretches, (self.corpus["tokens"]["val"] - 1) // preset.length)
        model = self.model_of(BASE)
        windows = 1 + (preset.length - preset.window) // preset.step
        flops = windows * counts.forward_flops(model, preset.window) + counts.forward_flops(model, preset.length)
        print(
            f"scoring: {models} models, {stretches} stretches of {preset.length:,} held-out tokens each, read once as a whole and "
            f"once in {windows} windows of {preset.window}: {models * stretches * flops:.3g} FLOPs"
        )

    # Training and scoring -------------------------------------------------------------------------------------------------

    def measure(self) -> None:
        self.tuned, self.seeded = self.stages(self.train)
        ended = zip(self.seeded.run_id, self.asked, self.seeded.val_loss.notna(), strict=True)
        self.scores = self.score({run_id: run for run_id, run, went_well in ended if went_well})
        if len({tuple(score[key] for key in ("tokens_sha256", "step")) for score in self.scores}) > 1:
            raise LabError(
                "All models are scored on the very same tokens", f"{within_repository(self.folder)}/scores holds others",
                "delete the folders runs and scores, and run the study again",
            )  # fmt: skip
        self.seeds = {kind: [s["seed"] for s in self.scores if s["position"] == kind] for kind in KINDS}
        if few := [kind for kind, seeds in self.seeds.items() if len(seeds) < 2]:
            raise LabError("An interval over seeds needs two that did not diverge", f"fewer for {', '.join(few)}")

    def score(self, runs: dict[str, Run]) -> list[dict]:
        """The kept scores of trained runs, by run_id; those not there yet are made by the workers, and each model goes when
        its scores are written."""
        folder = self.folder / "scores"
        waiting = {
            self._executor.submit(score_run, str(self.folder), run_id, run, self.preset): run_id
            for run_id, run in runs.items()
            if not (folder / f"{run_id}.json").exists() and self._model(run_id)
        }
        for done, future in enumerate(as_completed(waiting), start=1):
            _write_checked(folder / f"{waiting[future]}.json", "score", future.result())
            print(f"scored {done} of {len(waiting)} models", flush=True)
        for run_id in runs:
            (self.folder / "models" / f"{run_id}.safetensors").unlink(missing_ok=True)
        if (self.folder / "models").is_dir() and not any((self.folder / "models").iterdir()):
            (self.folder / "models").rmdir()
        way_out = "delete it together with its record in runs: the run will be trained again"
        return [_read_checked(folder / f"{run_id}.json", "score", way_out) for run_id in runs]

    def _model(self, run_id: str) -> Path:
        path = self.folder / "models" / f"{run_id}.safetensors"
        if not path.exists():
            raise LabError(
                "A trained model is kept until it is scored", f"neither {within_repository(path)} nor its scores are there",
                f"delete runs/{run_id}.json: the run will be trained again",
            )  # fmt: skip
        return path

    # Judging --------------------------------------------------------------------------------------------------------------

    def losses(self, kind: str, way: str, seeds: list[int] | None = None) -> np.ndarray:
        """Mean losses (seeds, stretches, bins); a kind that ends slides whatever is asked."""
        way = "slid" if kind in ENDING else way
        own = {score["seed"]: score[way] for score in self.scores if score["position"] == kind}
        return np.array([own[seed] for seed in (self.seeds[kind] if seeds is None else seeds)])

    def less(self, one: tuple[str, str], other: tuple[str, str]) -> tuple[np.ndarray, list[int]]:
        """The losses of one (kind, way) less those of another, seed by seed, and the seeds that both have."""
        seeds = [seed for seed in self.seeds[one[0]] if seed in self.seeds[other[0]]]
        return self.losses(*one, seeds) - self.losses(*other, seeds), seeds

    @property
    def edges(self) -> np.ndarray:
        return np.array(self.scores[0]["edges"])

    def over(self, values: np.ndarray, span: str) -> np.ndarray:
        """Means over the positions of a span: (seeds, stretches, bins) -> (seeds, stretches)."""
        low, high = (windows * self.preset.window for windows in SPANS[span])
        inside = (self.edges[:-1] >= low) & (self.edges[1:] <= high)
        return np.average(values[..., inside], axis=-1, weights=np.diff(self.edges)[inside])

    def compared(self) -> list[tuple[str, tuple[str, str], tuple[str, str], tuple[str, ...]]]:
        """All contrasts: name, what, less what, over which spans."""
        rope = (BASE, "carried")
        found = [(f"{kind} less {BASE}", (kind, "carried"), rope, tuple(SPANS)) for kind in KINDS if kind != BASE]
        found += [
            (f"{kind} less its own sliding window", (kind, "carried"), (kind, "slid"), BEYOND)
            for kind in KINDS
            if kind not in ENDING
        ]
        # Names of their own, which no rule reads: the claim asks for RoPE carried on.
        return found + [
            (f"{kind} less {BASE}, {SLIDING}", (kind, "slid"), (BASE, "slid"), BEYOND) for kind in KINDS if kind != BASE
        ]

    def contrasts(self) -> pd.DataFrame:
        """Every contrast over every span, a row each; p corrected by Holm over those with RoPE that the claim names."""
        rows = []
        for name, one, other, spans in self.compared():
            difference, seeds = self.less(one, other)
            own = self.seeded[self.seeded.position.isin([one[0], other[0]]) & self.seeded.seed.isin(seeds)]
            for span in spans:
                mean = crossed_mean(self.over(difference, span))
                ends = dict(zip(("low", "high", "low_90", "high_90"), (*mean.ends(), *mean.ends(0.9)), strict=True))
                rows.append(
                    {"contrast": name, "span": span, "difference": mean.value, **ends, "freedom": mean.freedom, "p": mean.p,
                     "primary": name in [f"{kind} less {BASE}" for kind in PRIMARY] and span in BEYOND,
                     "seeds": len(seeds), "stretches": difference.shape[1], "runs": " ".join(own.run_id)}
                )  # fmt: skip
        table = pd.DataFrame(rows)
        numbers = ["difference", "low", "high", "low_90", "high_90", "freedom", "p"]
        table[numbers] = table[numbers].astype(float)
        table["p_holm"] = contrasts.holm(table.p[table.primary]).reindex(table.index)
        return table

    # Telling --------------------------------------------------------------------------------------------------------------

    def describe_kinds(self) -> None:
        """The four models, and how they are scored."""
        preset = self.preset
        rows = [
            {"position": kind, "params_total": counts.parameters(self.model_of(kind))["total"],
             "tokens_seen": preset.tokens, "flops": self.runs_of(kind, [0.01])[0].flops,
             "beyond T": "a sliding window" if kind in ENDING else "carried on, and a sliding window"}
            for kind in KINDS
        ]  # fmt: skip
        self.report.section("What is compared")
        self.report.text(
            f"Models of {preset.shape[0]} x {preset.shape[1]} with {preset.shape[2]} heads, trained on windows of T = "
            f"{preset.window} tokens, all alike but for how they know where a token stands. Then all read the same stretches of "
            f"8T = {preset.length:,} held-out tokens. Angles of RoPE (rope_theta {self.recipe.rope_theta:g}) and the sinusoidal "
            "table are formulas and are carried on to the end of a stretch; `none` has nothing to carry on. The learned table "
            f"ends at T. Each kind also slides a window of T over the stretch, in steps of {preset.step}, and reads it anew from "
            f"position 0, so that beyond T each token has {preset.window - preset.step + 1} to {preset.window} tokens before it."
        )
        self.report.table(
            pd.DataFrame(rows), "kinds", "Parameters, training tokens and FLOPs of each kind, and how it is scored beyond T",
            position="", params_total=",.0f", tokens_seen=",.0f", flops=".3g", **{"beyond T": ""},
        )  # fmt: skip

    def show_learning_rates(self) -> None:
        edges = int((self.rates.edge != "").sum())
        self.report.section("Learning rates")
        self.report.text(
            "Each kind was trained at three rates or more on one seed, and is compared at its best on other seeds; the bracket "
            f"moved outward while its best rate lay at an edge, at most {self.preset.moves} times; {edges} still {have(edges)} "
            "theirs there."
        )
        table = self.rates.reset_index()
        self.report.table(
            table, "learning_rates", "The best rate of each kind (a vertex, or the best run where `edge` says on which side it "
            "lies), and its loss within T", position="", learning_rate=".3g", val_loss=".3f", rates="d", edge="",
        )  # fmt: skip

    def show_noise(self) -> None:
        self.noise = self.seeded.assign(place=self.seeded.position)
        super().show_noise()

    def show_positions(self) -> None:
        """The loss by position, of each kind and each way."""
        ways = [(kind, way) for kind in KINDS for way in ("carried", "slid") if way == "slid" or kind not in ENDING]
        bins = pd.DataFrame(
            [
                {"position": kind, "way": way, "first": low + 1, "last": high, "loss": value, "low": ends[0], "high": ends[1]}
                for kind, way in ways
                for mean in [crossed_mean(self.losses(kind, way))]
                for low, high, value, *ends in zip(self.edges, self.edges[1:], mean.value, *mean.ends(), strict=False)
            ]
        )  # fmt: skip
        write_table(self.folder / "tables" / "positions.csv", bins)
        spans = [
            {"position": kind, "way": way} | {span: crossed_mean(self.over(values, span)).value for span in SPANS}
            for kind, way in ways
            for values in [self.losses(kind, way)]
        ]
        stretches = len(self.losses(BASE, "slid")[0])
        self.report.section("Loss by position")
        self.report.text(
            f"{stretches} stretches of {self.preset.length:,} tokens, spread over the validation part. The position of a token is "
            "the number of tokens before it in its stretch. Bands are 95 % intervals over seeds and stretches, taken as crossed "
            "random effects (Satterthwaite's degrees of freedom). Most of a band is what stretches differ in, the same for all "
            "kinds; the second figure takes that away, token by token."
        )
        self.report.table(
            pd.DataFrame(spans), "spans", "Mean loss (nats per token) over spans of positions, T the training length", position="",
            way="", **dict.fromkeys(SPANS, ".3f"),
        )  # fmt: skip
        self.report.figure(
            "positions", "Loss by position; dashed: RoPE's own sliding window; vertical lines: T, 2T, 4T and 8T",
            lambda ax: self._draw_positions(ax), size=(8.2, 4.2),
        )  # fmt: skip
        self.report.figure(
            "beside_sliding", "The loss of each kind less that of RoPE with a sliding window, on the same tokens, with 95 % bands; "
            f"linear up to {LINEAR} nats, logarithmic beyond", lambda ax: self._draw_beside(ax), size=(8.2, 4.2),
        )  # fmt: skip

    def _draw_positions(self, ax: object) -> None:
        x = self._centres()
        for kind, way, line in [(kind, "carried", "-") for kind in KINDS] + [(BASE, "slid", "--")]:
            mean = crossed_mean(self.losses(kind, way))
            ax.plot(x, mean.value, line, color=COLOURS[kind], label=self._name(kind, way))
            if line == "-":
                ax.fill_between(x, *mean.ends(), color=COLOURS[kind], alpha=0.15, linewidth=0)
        ax.set_ylabel("loss (nats/token)")
        self._position_axis(ax)

    def _draw_beside(self, ax: object) -> None:
        x = self._centres()
        ax.axhline(0, color=COLOURS[BASE], linestyle="--", linewidth=1.2, label=self._name(BASE, "slid"))
        for kind in KINDS:
            mean = crossed_mean(self.less((kind, "carried"), (BASE, "slid"))[0])
            ax.plot(x, mean.value, color=COLOURS[kind], label=self._name(kind, "carried"))
            ax.fill_between(x, *mean.ends(), color=COLOURS[kind], alpha=0.18, linewidth=0)
        _by_size(ax)
        ax.set_ylabel("loss above RoPE's sliding window (nats/token)")
        self._position_axis(ax)

    def _centres(self) -> np.ndarray:
        """The middle of each bin of positions, on a log axis."""
        return np.sqrt((self.edges[:-1] + 1) * self.edges[1:])

    @staticmethod
    def _name(kind: str, way: str) -> str:
        if kind in ENDING:
            return f"{kind}, sliding beyond T"
        return f"{kind}, sliding" if way == "slid" else f"{kind}, carried on"

    def _position_axis(self, ax: object) -> None:
        ax.set_xscale("log", base=2)
        for windows in (1, 2, 4, 8):
            ax.axvline(
                windows * self.preset.window, color=plots.GREY, linewidth=0.9, linestyle=":" if windows > 1 else "-"
            )
        ticks = [2**k for k in range(round(math.log2(self.preset.length)) + 1)]
        ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        ax.minorticks_off()
        ax.set_xlabel("position (tokens before it)")
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))

    def show_reaches(self) -> None:
        """The contrasts of the claim and those beside it, by reach."""
        table = self.table = self.contrasts()
        self.report.section("Who goes on better?")
        self.report.text(
            "A positive difference means that the first is worse. RoPE's angles and the sinusoidal table are carried on, the "
            f"learned model slides its window; like for like is `{SLIDING}`, where both read a window of T anew. Differences are "
            "taken token by token and seed by seed (a seed decides the order of the batches, the same for all kinds); intervals "
            f"are over seeds and stretches, and p is corrected by Holm over the {int(table.primary.sum())} contrasts that the "
            "claim names."
        )
        self.report.table(
            table, "differences", "Differences in loss (nats per token) with 95 % intervals, degrees of freedom, p, and p by Holm",
            contrast="", span="", difference="+.4f", low="+.4f", high="+.4f", freedom=".1f", p=".2g", p_holm=".2g", seeds="d",
            stretches="d",
        )  # fmt: skip
        self.report.figure(
            "reaches", "Left: each kind less RoPE carried on (above zero RoPE is better; learned slides a window beyond T); "
            "middle: the same with a sliding window for both; right: carried on less the same model's sliding window, linear up to "
            f"{LINEAR} nats, logarithmic beyond. 95 % intervals", lambda axes: self._draw_reaches(axes), size=(13.0, 4.0), panels=3,
        )  # fmt: skip
        told_as = {
            "sinusoidal less rope": "sinusoidal less rope, both carried on",
            "learned less rope": "learned, sliding beyond T, less rope carried on",
            f"learned less rope, {SLIDING}": "learned less rope, like for like, both with a sliding window",
            "rope less its own sliding window": "rope carried on less its own sliding window",
        }
        for name, words in told_as.items():
            own = table[(table.contrast == name) & table.span.isin(BEYOND)]
            told = "; ".join(
                f"{r.difference:+.3f} ({interval(r.low, r.high, '+.3f')}) from {r.span}" for r in own.itertuples()
            )
            self.findings.append(f"Loss of {words}, nats per token, {own.seeds.min()} seeds: {told}.")
        self._write_effects()

    def _draw_reaches(self, axes: object) -> None:
        sides = {
            f" less {BASE}": ("loss less rope carried on", tuple(SPANS)),
            f" less {BASE}, {SLIDING}": (f"loss less rope, {SLIDING}", BEYOND),
            " less its own sliding window": ("loss less its own sliding window", BEYOND),
        }
        for ax, (ending, (title, spans)) in zip(axes, sides.items(), strict=True):
            kinds = [kind for kind in KINDS if (self.table.contrast == kind + ending).any()]
            ax.axhline(0, color=plots.GREY, linewidth=1)
            for i, kind in enumerate(kinds):
                own = self.table[self.table.contrast == kind + ending].set_index("span").loc[list(spans)]
                x = np.arange(len(spans)) + 0.16 * (i - (len(kinds) - 1) / 2)
                errors = [own.difference - own.low, own.high - own.difference]
                ax.errorbar(x, own.difference, errors, fmt="o", markersize=4, color=COLOURS[kind], capsize=3)
            ax.set_xticks(range(len(spans)), spans)
            ax.set_xlim(-0.5, len(spans) - 0.5)
            ax.grid(axis="x", visible=False)
            ax.set_title(title)
        lows, highs = zip(*(ax.get_ylim() for ax in axes[:2]), strict=True)
        for ax in axes[:2]:
            ax.set_ylim(min(lows), max(highs))
        _by_size(axes[2])
        for kind in KINDS:  # one legend for all panels
            axes[2].plot([], [], "o", color=COLOURS[kind], label=kind)
        axes[2].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        axes[0].set_ylabel("difference (nats/token)")

    def _write_effects(self) -> None:
        """tables/effects.csv, which ``claims`` reads."""
        rows = [
            claims.effects_row(
                f"{row.contrast}, {row.span}", row.difference, row.low, row.high, row.low_90, row.high_90, row.p_holm,
                seeds=row.seeds, runs=row.runs.split(),
            )
            for row in self.table.itertuples()
        ]  # fmt: skip
        frame = pd.DataFrame(rows, columns=list(claims.COLUMNS))
        write_table(self.folder / "tables" / "effects.csv", frame)

    def end(self) -> None:
        spent = self.seeded.seconds.sum() + self.tuned.seconds.sum()
        self.report.section("Again")
        self.report.text(
            f"Training took {duration(spent)} of one core for {quantity(self.seeded.flops.sum() + self.tuned.flops.sum())} FLOPs. "
            "What was scored of each model is kept in [scores](scores), a JSON file a model; the models were not."
        )
        self.finish([self.tuned, self.seeded], ("position",))


def _by_size(ax: object) -> None:
    """Differences of a hundredth of a nat and of several nats on one axis."""
    ends = -ax.dataLim.y0, ax.dataLim.y1
    ax.set_yscale("symlog", linthresh=LINEAR, linscale=0.8)
    sizes = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
    # Each end is a size with a tick, so that no value stands at the edge.
    low, high = (next((size for size in sizes if size > 1.1 * end), 30.0) for end in ends)
    ax.set_ylim(-low, high)
    ticks = [tick for tick in (*(-size for size in reversed(sizes)), 0.0, *sizes) if -low <= tick <= high]
    ax.set_yticks(ticks, [f"{tick:+g}" if tick else "0" for tick in ticks])
    ax.minorticks_off()
