"""What a study trains: the frozen recipe, the ladder of shapes, isoFLOP families, and learning-rate brackets that move.

The recipe's numbers were chosen by measurement (studies/recipe.ipynb, results/recipe) and are the same in every study.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pandas as pd

from tinylm import counts
from tinylm.config import ModelConfig, TrainConfig
from tinylm.study.runs import Run

# (hidden_size, num_layers, num_heads): each rung holds between 1.4 and 2.2 times the parameters of the one before.
LADDER = (
    (8, 2, 2),
    (12, 2, 2),
    (16, 2, 4),
    (24, 2, 4),
    (32, 2, 4),
    (48, 2, 4),
    (64, 2, 4),
    (72, 3, 4),
    (96, 4, 4),
    (128, 4, 4),
    (160, 5, 4),
    (192, 6, 6),
    (256, 6, 8),
    (320, 7, 8),
    (384, 9, 8),
    (512, 9, 8),
)

SIZE_GROWTH = 0.45  # the best size of a budget grows about as budget^0.45: where a family is looked for, no finding


@dataclass(frozen=True)
class Recipe:
    """Everything about a run that a study holds still, or derives from its size and length by a rule.

    batch_tokens_base: tokens a step at 300,000 tokens of training; grows with the square root of the tokens, in whole
    windows. warmup_share: the most of a run that warmup may take; below that it lasts as many tokens as the model has
    parameters. lr_base: first guess of the best learning rate at 40,000 parameters; falls as parameters^-lr_exponent. group:
    query heads that share one key-value head; 1 is multi-head attention. rope_theta: small, since windows are short.
    """

    seq_len: int = 128
    init: str = "scaled"
    batch_tokens_base: float = 256.0
    warmup_share: float = 0.1
    lr_base: float = 0.012
    lr_exponent: float = 0.6
    group: int = 1
    rope_theta: float = 100.0
    weight_decay: float = 0.1
    beta2: float = 0.99

    def model(self, shape: tuple[int, int, int], vocab_size: int, **changes) -> ModelConfig:
        """The baseline architecture at one rung: RMSNorm, pre-norm, SwiGLU, RoPE, multi-head attention, tied embeddings."""
        hidden_size, num_layers, num_heads = shape
        return ModelConfig(
            **{
                "vocab_size": vocab_size,
                "hidden_size": hidden_size,
                "num_layers": num_layers,
                "num_heads": num_heads,
                "num_kv_heads": max(1, num_heads // self.group),
                "max_seq_len": self.seq_len,
                "rope_theta": self.rope_theta,
                "init": self.init,
                **changes,
            }
        )

    def batch_size(self, tokens: float) -> int:
        """Windows a step for a run of so many tokens, by the rule, to the nearest whole window: steps of a factor of two would
        put jumps into the loss."""
        return max(1, round(self.batch_tokens_base * (tokens / 3e5) ** 0.5 / self.seq_len))

    def learning_rate(self, params: float) -> float:
        """A first guess at the best learning rate; brackets start here and move."""
        return self.lr_base * (params / 4e4) ** -self.lr_exponent

    def train(self, model: ModelConfig, tokens: float, learning_rate: float, seed: int = 0, **changes) -> TrainConfig:
        """A run whose schedule ends where its tokens end."""
        batch_size = changes.pop("batch_size", None) or self.batch_size(tokens)
        max_steps = max(2, round(tokens / (batch_size * self.seq_len)))
        warmup_tokens = min(counts.parameters(model)["total"], self.warmup_share * tokens)
        return TrainConfig(
            **{
                "learning_rate": learning_rate,
                "batch_size": batch_size,
                "max_steps": max_steps,
                "warmup_steps": min(max_steps - 1, max(1, round(warmup_tokens / (batch_size * self.seq_len)))),
                "weight_decay": self.weight_decay,
                "beta2": self.beta2,
                "stride": self.seq_len,
                "threads": 1,
                "seed": seed,
                **changes,
            }
        )


@dataclass(frozen=True)
class Point:
    """One place in the plane of sizes and tokens, to be trained at several learning rates. ``family`` is the study's arm that
    asked for it, ``budget`` its FLOPs (0 where the arm does not fix them)."""

    shape: tuple[int, int, int]
    tokens: float
    family: str
    budget: float = 0.0


def rung_sizes(recipe: Recipe, vocab_size: int, ladder: Iterable[tuple[int, int, int]] = LADDER) -> pd.DataFrame:
    """The ladder as a table: shape, parameters and FLOPs a token of each rung."""
    rows = []
    for shape in ladder:
        model = recipe.model(shape, vocab_size)
        parts = counts.parameters(model)
        rows.append(
            {
                "hidden_size": shape[0],
                "num_layers": shape[1],
                "num_heads": shape[2],
                "params_total": parts["total"],
                "params_non_embedding": parts["non_embedding"],
                "flops_per_token": counts.train_flops_per_token(model, recipe.seq_len),
            }
        )
    return pd.DataFrame(rows)


def expected_best_size(budget: float, vocab_size: int) -> float:
    """Where an isoFLOP family is centred before anything is known: 35,000 parameters at 1e11 FLOPs and 512 tokens of
    vocabulary, growing as budget^0.45. Only a start: a family whose minimum lies at its edge is extended."""
    return 35e3 * (vocab_size / 512) ** 0.3 * (budget / 1e11) ** SIZE_GROWTH


def isoflop_points(recipe: Recipe, vocab_size: int, budgets: Iterable[float], sizes: int = 5) -> list[Point]:
    """For each budget, a family around the size that is expected to be best before anything is known."""
    centres = [(budget, expected_best_size(budget, vocab_size)) for budget in budgets]
    return [point for centre in centres for point in isoflop_family(recipe, vocab_size, *centre, sizes)]


def isoflop_family(recipe: Recipe, vocab_size: int, budget: float, params: float, sizes: int = 5) -> list[Point]:
    """``sizes`` neighbouring rungs around ``params`` parameters, each on the tokens that the budget buys."""
    rungs = rung_sizes(recipe, vocab_size)
    distance = (rungs.params_total / params).map(math.log).abs()
    first = min(max(0, int(distance.idxmin()) - sizes // 2), len(rungs) - sizes)
    return [isoflop_point(recipe, vocab_size, LADDER[i], budget) for i in range(first, first + sizes)]


def isoflop_point(recipe: Recipe, vocab_size: int, shape: tuple[int, int, int], budget: float) -> Point:
    flops_per_token = counts.train_flops_per_token(recipe.model(shape, vocab_size), recipe.seq_len)
    return Point(shape, budget / flops_per_token, "isoflop", budget)


def bracket(centre: float, width: int = 3) -> list[float]:
    """``width`` learning rates a factor of two apart around a centre, all on one grid of half octaves, so that rates of
    neighbouring points (and of a second call) coincide."""
    middle = round(2 * math.log2(centre))
    return [2 ** ((middle + 2 * (i - width // 2)) / 2) for i in range(width)]


def tune(
    points: list[Point],
    runs_of: Callable[[Point, list[float]], list[Run]],
    first_rates: Callable[[Point], list[float]],
    train: Callable[[list[Run]], pd.DataFrame],
    moves: int = 3,
) -> pd.DataFrame:
    """Train every point at its first rates; where the best lies at the edge of its bracket, add a rate beyond that edge and
    train again, at most ``moves`` times. ``train`` turns runs into a table (a sweep). Returns all runs; ``point`` numbers
    the points, ``edge`` marks those whose best rate still lies at an edge."""
    rates = [sorted(first_rates(point)) for point in points]
    frame = pd.DataFrame()
    for _ in range(moves + 1):
        runs = [run for point, own in zip(points, rates, strict=True) for run in runs_of(point, own)]
        owner = [number for number, own in enumerate(rates) for _ in own]
        frame = train(runs).assign(point=owner)
        moved = False
        for number, own in enumerate(rates):
            edge = _edge(frame[frame.point == number])
            frame.loc[frame.point == number, "edge"] = edge is not None
            if edge is not None:
                rates[number] = sorted([*own, edge])
                moved = True
        if not moved:
            break
    return frame


def _edge(runs: pd.DataFrame) -> float | None:
    """The rate to add where the best of a point's runs lies at the edge of its bracket; None where it lies inside, and where
    a single rate was asked for and went well: that is no bracket."""
    runs = runs.sort_values("learning_rate")
    losses = runs.val_loss.fillna(math.inf).to_numpy()  # a diverged run is the worst there is
    if len(losses) == 1 and losses[0] < math.inf:
        return None
    best = int(losses.argmin())
    if best == 0:
        return float(runs.learning_rate.iloc[0] / 2)
    if best == len(losses) - 1:
        return float(runs.learning_rate.iloc[-1] * 2)
    return None


def best_runs(frame: pd.DataFrame) -> pd.DataFrame:
    """The run of lowest loss of each point; a point whose every run diverged has none."""
    ended = frame[frame.val_loss.notna()]
    return ended.loc[ended.groupby("point").val_loss.idxmin()].reset_index(drop=True)


def sizes_beyond(best: pd.DataFrame, points: list[Point], recipe: Recipe, vocab_size: int) -> list[Point]:
    """The next rung of each isoFLOP family whose best size is its smallest or largest, where the ladder has one. best: one row
    a point, with budget, params_total and val_loss."""
    beyond = []
    for budget, family in best.groupby("budget"):
        family = family.sort_values("params_total").reset_index()
        lowest = int(family.val_loss.idxmin())
        rungs = [LADDER.index(point.shape) for point in points if point.budget == budget]
        rung = min(rungs) - 1 if lowest == 0 else max(rungs) + 1 if lowest == len(family) - 1 else -1
        if 0 <= rung < len(LADDER):
            beyond.append(isoflop_point(recipe, vocab_size, LADDER[rung], budget))
    return beyond
