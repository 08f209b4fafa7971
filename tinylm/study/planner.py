"""What to train next: a budget in, a model and a training run out, with the loss to expect and how far that reaches.

The planner minimises the fitted surface L(N, D) over a ladder of shapes, each with the tokens that the budget buys it
by its exact FLOPs (or by its measured speed), so that it needs neither C = 6 N D nor a fitted power law for N_opt. Where
the text is read more than once, repeated tokens and the parameters they feed count less, by a ``Repetition`` law.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from tinylm.config import ModelConfig, TrainConfig
from tinylm.errors import LabError
from tinylm.study.scaling import Fit, LearningRateRule, evaluate_law
from tinylm.words import duration, quantity

FAR = 30.0  # a budget so many times the largest one fitted is far beyond the evidence


# ---------------------------------------------------------------------------------------------------------- repetition


@dataclass(frozen=True)
class Repetition:
    """What repeated text is worth: the law of Muennighoff et al. 2023 (arXiv:2305.16264, eq. 5 and 6).

    D tokens over a text of U distinct ones count as U + U r (1 - exp(-R / r)) new ones, where R = D / U - 1 and r is
    ``tokens_star`` (R_D* there). Parameters beyond U_N, the size that would be best for U fresh tokens, count less by
    the same form with ``params_star`` (R_N*). Infinity means that nothing is lost.

    source and standing: where the constants come from and how well they are known, in words. assumed: the text at hand
    did not settle them. The published ones were fitted on runs of 7 million parameters and more, and their R_D* is a
    local optimum of a flat objective.
    """

    tokens_star: float = 15.39
    params_star: float = 5.31
    source: str = "Muennighoff et al. 2023"
    standing: str = "an assumption: fitted on other texts and far larger models"
    assumed: bool = True

    def __post_init__(self) -> None:
        if not (self.tokens_star > 0 and self.params_star > 0):
            given = f"tokens_star={self.tokens_star}, params_star={self.params_star}"
            raise LabError(
                "A repetition law's constants must be positive", given, "infinity means that nothing is lost"
            )

    @classmethod
    def of(cls, fit: Fit, source: str = "this study") -> Repetition:
        """The constants of a fitted data-constrained law, its parameters R_D and R_N (without R_N no parameter counts
        less). Where R_D is not identified, the law stays an assumption."""
        if "R_D" not in fit.params:
            raise LabError("Only a data-constrained law knows what repetition is worth", f"form={fit.form}")
        settled = fit.status.get("R_D") != "not identified"
        standing = "fitted" if settled else "fitted, but R_D* is not identified"
        return cls(fit.params["R_D"], fit.params.get("R_N", math.inf), source, standing, assumed=not settled)

    def tokens(self, tokens: object, unique: float) -> np.ndarray:
        """New tokens that ``tokens`` of training over ``unique`` distinct ones are worth; all of them up to one pass."""
        tokens = np.asarray(tokens, float)
        return np.minimum(tokens, unique) + unique * _saturating(tokens / unique - 1, self.tokens_star)

    def params(self, params: object, base: float) -> np.ndarray:
        """Parameters that ``params`` are worth where the text feeds ``base`` of them; all of them up to base."""
        params = np.asarray(params, float)
        if not math.isfinite(base):
            return params
        return np.minimum(params, base) + base * _saturating(params / base - 1, self.params_star)

    def worth(self, epoch: object) -> np.ndarray:
        """What the epoch-th pass over the text is worth, as a share of as much new text; 1 for the first."""
        passes = np.asarray(epoch, float)
        return self.tokens(passes, 1.0) - self.tokens(passes - 1, 1.0)

    def last_epoch(self, worth: float = 0.5) -> float:
        """The last whole epoch that is worth at least such a share of new text; infinity where none is worth less."""
        if not math.isfinite(self.tokens_star):
            return math.inf
        second = float(self.worth(2))
        if second < worth:
            return 1.0
        return 2.0 + math.floor(self.tokens_star * math.log(second / worth) + 1e-9)

    def sentence(self) -> str:
        """Which law it is, and up to where reading a text again pays."""
        name = f"the repetition law of {self.source} (R_D* = {self.tokens_star:.4g}, R_N* = {self.params_star:.4g}, "
        name += f"{self.standing})"
        half, tenth = self.last_epoch(0.5), self.last_epoch(0.1)
        if math.isinf(half):
            return f"By {name} every epoch is worth as much as new text."
        return (
            f"By {name} the second epoch is worth {float(self.worth(2)):.0%} of as much new text, epochs up to number "
            f"{half:.0f} at least half, and epochs beyond number {tenth:.0f} less than a tenth."
        )


def _saturating(repeats: object, star: float) -> np.ndarray:
    """r (1 - exp(-R / r)) of R repeats, none below zero."""
    repeats = np.maximum(np.asarray(repeats, float), 0.0)
    return repeats if not math.isfinite(star) else -star * np.expm1(-repeats / star)


PUBLISHED = Repetition()


@dataclass(frozen=True)
class RepeatedText:
    """A surface L(N, D) over a text of ``unique`` distinct tokens, where D may be more than it holds.

    unique None is a text that never ends. Within the first pass it is the surface itself, since that is what was
    measured. Beyond, ``repetition`` discounts the repeated tokens, and the parameters above ``base`` (those that would
    be best for the whole text read once, under C = 6 N D). The published law discounts these on fresh text too, which
    the surface has measured otherwise; so their share of the loss moves from the surface's, at one pass, to the
    published one at many, by the share of training that is repeats, 1 - U / D. This interpolation is ours.
    """

    surface: Fit
    unique: float | None = None
    repetition: Repetition = PUBLISHED

    @property
    def base(self) -> float:
        """Parameters for which ``unique`` tokens are the best length: N = G (G U)^(beta / alpha), from Hoffmann et al.
        2022, eq. 4; infinity where the surface has no best size."""
        p = self.surface.params
        if self.unique is None or not all(p[name] > 0 for name in ("A", "B", "alpha", "beta")):
            return math.inf
        log_g = math.log(p["alpha"] * p["A"] / (p["beta"] * p["B"])) / (p["alpha"] + p["beta"])
        log_base = log_g + (log_g + math.log(self.unique)) * p["beta"] / p["alpha"]
        return math.exp(log_base) if log_base < 700 else math.inf

    def effective(self, params: object, tokens: object) -> tuple[np.ndarray, np.ndarray]:
        """Parameters and tokens that count, as arrays."""
        params, tokens = np.asarray(params, float), np.asarray(tokens, float)
        if self.unique is None:
            return params, tokens
        repeats = np.maximum(0.0, 1 - self.unique / tokens)
        discounted, alpha = self.repetition.params(params, self.base), self.surface.params["alpha"]
        if math.isfinite(self.base):
            discounted = params * (1 + repeats * ((params / discounted) ** alpha - 1)) ** (-1 / alpha)
        return discounted, self.repetition.tokens(tokens, self.unique)

    def loss(self, params: object, tokens: object) -> np.ndarray:
        """Expected loss in nats per token."""
        return evaluate_law("surface", self.surface.params, *self.effective(params, tokens))

    def predict(self, params: object, tokens: object, seed_sd: float = 0.0) -> pd.DataFrame:
        """Columns loss, low, high as ``Fit.predict``. Where the repetition law is an assumption and text is repeated, the
        low end is that of a text that never ends: repeated tokens may be worth as much as new ones."""
        table = self.surface.predict(*self.effective(params, tokens), seed_sd=seed_sd)
        if self.unique is not None and self.repetition.assumed:
            fresh = self.surface.predict(params, tokens, seed_sd=seed_sd)
            table["low"] = np.minimum(table["low"], fresh["low"])
        return table

    def epochs(self, params: float, epochs: Sequence[float] = (1, 2, 4, 8, 16, 32, 64)) -> pd.DataFrame:
        """What reading the text so often brings a model of ``params``: columns epochs, tokens, effective_tokens, worth
        (of the last epoch, as a share of new text), loss, gained (nats, against one epoch)."""
        if self.unique is None:
            raise LabError("Epochs need a text of known size", "unique=None", "give the distinct tokens that it holds")
        passes = np.asarray(epochs, float)
        tokens = passes * self.unique
        loss = self.loss(np.full(len(tokens), float(params)), tokens)
        columns = {"epochs": passes, "tokens": tokens, "effective_tokens": self.repetition.tokens(tokens, self.unique)}
        columns |= {"worth": self.repetition.worth(passes), "loss": loss}
        return pd.DataFrame(columns).assign(gained=float(self.loss(params, self.unique)) - loss)


# --------------------------------------------------------------------------------------------------------------- speed


@dataclass(frozen=True)
class Speed:
    """Training speed of this machine: FLOP/s against parameters, as calibrated by ``measure_speed``.

    ``speed(shape)`` is tokens per second of a ladder row: FLOP/s interpolated in log-log (constant beyond the shapes
    measured), over the row's FLOPs a token. params, flops_per_second: (k,), rising in params. machine: the processor it
    was measured on, empty where not known.
    """

    params: tuple[float, ...]
    flops_per_second: tuple[float, ...]
    threads: int
    machine: str = ""

    @classmethod
    def from_dict(cls, known: dict) -> Speed:
        """What ``dataclasses.asdict`` made of one. Raises KeyError, TypeError or ValueError where it is not that."""
        pairs = [(float(n), float(rate)) for n, rate in zip(known["params"], known["flops_per_second"], strict=True)]
        if not pairs or not min(map(min, pairs)) > 0:
            raise ValueError("sizes and speeds must be positive")
        return cls(*zip(*pairs, strict=True), int(known["threads"]), str(known.get("machine", "")))

    def __call__(self, shape: pd.Series | dict) -> float:
        logs = np.log(self.params), np.log(self.flops_per_second)
        return float(np.exp(np.interp(np.log(shape["params_total"]), *logs)) / shape["flops_per_token"])

    def joined(self, other: Speed) -> Speed:
        """With the shapes of ``other``, measured on the same machine; where both know a shape, other's counts."""
        rows = dict(zip(self.params, self.flops_per_second, strict=True))
        rows |= dict(zip(other.params, other.flops_per_second, strict=True))
        params = tuple(sorted(rows))
        return Speed(params, tuple(rows[size] for size in params), other.threads, other.machine)

    def table(self) -> pd.DataFrame:
        """One row a shape measured: params_total, flops_per_second."""
        return pd.DataFrame({"params_total": self.params, "flops_per_second": self.flops_per_second})


def measure_speed(
    configs: Sequence[ModelConfig],
    seconds_each: float = 1.0,
    threads: int | None = None,
    batch_size: int | Sequence[int] = 8,
    train: TrainConfig | None = None,
) -> Speed:
    """Time training steps of each config on this machine: those of a Trainer in a long run, on random tokens.

    Three or four shapes that span the ladder do; a plan is kept best where its own shape and batch are among them (see
    ``Evidence.speed_for``). A step sees batch_size windows (one number, or one a config) of max_seq_len tokens; the
    speed is the median over blocks of steps, after a warm-up that compiles where the machine's path does. The machine
    should be idle. train: whatever else decides the speed (precision, compile, device). threads: None keeps torch's own
    number. It is put back afterwards, as is torch's random state.
    """
    import torch  # only here: fits, plans and plots work where torch is not installed

    from tinylm import backend, counts

    batches = [batch_size] * len(configs) if isinstance(batch_size, int) else list(batch_size)
    if not configs or len(batches) != len(configs):
        raise LabError("Speed is measured on configs, each with its batch", f"{len(configs)} and {len(batches)}")
    before = torch.get_num_threads()
    # Steps without end: a short run may be computed in a way of its own, without a compiler.
    train = (train or TrainConfig()).replace(threads=threads or before, max_steps=10**6, warmup_steps=0)
    rows = {}
    try:
        with torch.random.fork_rng(devices=[]):
            for config, batch in zip(configs, batches, strict=True):
                tokens = train.replace(batch_size=batch).windows_per_step * config.max_seq_len
                seconds = _seconds_per_step(config, train.replace(batch_size=batch), seconds_each)
                flops = tokens * counts.train_flops_per_token(config, config.max_seq_len) / seconds
                rows[float(counts.parameters(config)["total"])] = float(flops)
    finally:
        torch.set_num_threads(before)
    params = tuple(sorted(rows))
    return Speed(params, tuple(rows[size] for size in params), train.threads, backend.machine(train.device)["cpu"])


def _seconds_per_step(model: ModelConfig, train: TrainConfig, seconds: float) -> float:
    """Seconds of one training step: the median over blocks of about a tenth of the time each, three at least; one block where
    a step alone takes longer than the time."""
    from tinylm.train import Trainer

    windows = max(4 * train.windows_per_step, 64)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (windows + 1) * model.max_seq_len)
    trainer = Trainer(model, train, tokens.astype(np.uint32), tokens.astype(np.uint32))
    trainer.train_step()  # allocates, and compiles
    start = time.perf_counter()
    trainer.train_step()  # tells roughly how many steps make a block
    step = time.perf_counter() - start
    block, least = max(1, round(0.1 * seconds / step)), 3 if step < seconds else 1
    blocks = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(blocks) < least:
        start = time.perf_counter()
        for _ in range(block):
            trainer.train_step()
        blocks.append((time.perf_counter() - start) / block)
    return statistics.median(blocks)


# ---------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Plan:
    """One recommended run. loss, low, high: nats per token and a 95 % interval for one run, seeds included.

    tokens: steps x batch_size (windows a step) x seq_len. flops: exact, of the whole run. seconds: of training and its
    evaluations; None without a speed. params_low, params_high: the sizes that resamples of the fit would have chosen,
    from the 2.5th to the 97.5th percentile (NaN without a bootstrap).
    smaller_costs, larger_costs: nats lost by a model of half and of twice the size at the same budget.
    smaller_compute, larger_compute: how many times the budget such a model needs for the loss of the plan; infinity
    where it never gets there. epochs: passes over the text available (below 1 where it is not used up; None where its
    size is not known). effective_tokens: the new tokens that these are worth by ``repetition`` (equal to tokens within
    the first pass). reach: flops over the largest budget behind the fit; size_reach, length_reach: the same of params
    and tokens (None where the fit's rows are not known). options: every shape of the ladder with its tokens, flops,
    seconds and loss.
    """

    hidden_size: int
    num_layers: int
    params: float
    params_low: float
    params_high: float
    tokens: int
    steps: int
    batch_size: int
    seq_len: int
    learning_rate: float
    loss: float
    low: float
    high: float
    flops: float
    seconds: float | None
    reach: float
    size_reach: float | None
    length_reach: float | None
    smaller_costs: float
    larger_costs: float
    smaller_compute: float
    larger_compute: float
    epochs: float | None
    effective_tokens: float
    repetition: Repetition
    warnings: tuple[str, ...]
    shape: dict
    options: pd.DataFrame

    @property
    def far(self) -> bool:
        """Whether the budget lies more than 30 times beyond the largest one fitted."""
        return self.reach > FAR

    @property
    def evidence(self) -> str:
        """How far the plan lies from the runs behind it, in words."""
        grade = "far beyond the evidence" if self.far else "beyond the evidence" if self.reach > 1.05 else "within it"
        text = f"{_times(self.reach)}, {grade}"
        if self.reach > 1.05 and self.size_reach is not None:
            text += f" ({_times(self.size_reach)} the largest model, {_times(self.length_reach)} the longest run)"
        return text

    def table(self) -> pd.DataFrame:
        """What to type and what to expect, one row an item, as text."""
        sizes = "" if math.isnan(self.params_low) else f" (best: {_span(self.params_low, self.params_high)})"
        rows = {
            "hidden_size x num_layers": f"{self.hidden_size} x {self.num_layers}",
            "parameters": f"{self.params:,.0f}{sizes}",
            "tokens": f"{self.tokens:,}",
            "steps": f"{self.steps:,}",
            "batch_size (windows)": f"{self.batch_size}",
            "learning_rate": f"{self.learning_rate:.3g}",
            "FLOPs": f"{self.flops:.3g}",
            "expected loss (nats/token)": f"{self.loss:.3f} ({self.low:.3f} to {self.high:.3f})",
            "expected time": "not known" if self.seconds is None else duration(self.seconds),
            "of the largest budget fitted": self.evidence,
            "a model half the size costs": _price_words(self.smaller_costs, self.smaller_compute),
            "a model twice the size costs": _price_words(self.larger_costs, self.larger_compute),
            "epochs": "not known" if self.epochs is None else f"{self.epochs:.2g}",
        }
        if self.epochs is not None:
            last, assumed = self.repetition.last_epoch(), " (assumed law)" if self.repetition.assumed else ""
            pays = "any number" if math.isinf(last) else f"up to {last:.0f}, worth half of new text or more"
            rows["epochs that still pay"] = pays + assumed
        if self.epochs is not None and self.epochs > 1:
            rows["worth in new tokens"] = f"{self.effective_tokens:,.0f}"
        return pd.DataFrame({"plan": rows}).rename_axis("item")

    def sentence(self) -> str:
        """The plan in words, its warnings included."""
        text = (
            f"Train {self.hidden_size} x {self.num_layers} ({self.params:,.0f} parameters) on {self.tokens:,} tokens: "
            f"{self.steps:,} steps of {self.batch_size} windows at a learning rate of {self.learning_rate:.2g}. "
            f"Expect a loss of {self.loss:.3f} ({self.low:.3f} to {self.high:.3f})"
        )
        text += f" after {duration(self.seconds)}." if self.seconds is not None else "."
        prices = (
            f"A model of half the size would cost {_price_words(self.smaller_costs, self.smaller_compute)}, one of twice "
            f"the size {_price_words(self.larger_costs, self.larger_compute)}."
        )
        return " ".join([text, prices, f"Of the largest budget fitted this is {self.evidence}.", *self.warnings])

    def target(self, run_id: str) -> dict:
        """What ``forecasts.seal`` takes as target."""
        return {
            "params_total": self.params,
            "tokens": self.tokens,
            "learning_rate": self.learning_rate,
            "run_id": run_id,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "flops": self.flops,
            "reach": self.reach,
        }

    def to_dict(self) -> dict:
        """Everything but ``shape`` and ``options``, ready for JSON (a value that is not finite becomes None)."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("shape", "options")}
        fields |= {"warnings": list(self.warnings), "repetition": _finite(dataclasses.asdict(self.repetition))}
        last = None if self.epochs is None else self.repetition.last_epoch()
        return _finite({**fields, "epochs_that_pay": last, "evidence": self.evidence})


def plan(
    surface_fit: Fit,
    lr_rule: LearningRateRule,
    ladder: pd.DataFrame,
    *,
    batch_rule: Callable[[float], int],
    seq_len: int,
    largest_flops_fitted: float,
    budget_flops: float | None = None,
    budget_seconds: float | None = None,
    budget_tokens: float | None = None,
    speed: Callable[[pd.Series], float] | None = None,
    tokens_available: float | None = None,
    repetition: Repetition = PUBLISHED,
    seed_sd: float = 0.0,
    frontier: Fit | None = None,
) -> Plan:
    """The shape of the ladder, and its tokens, with the lowest expected loss for a budget.

    Give exactly one of budget_flops, budget_seconds (which needs ``speed``, tokens per second of a ladder row) and
    budget_tokens. More parameters always lower the loss of given tokens, so a budget of tokens is spent on the shape for
    which so many tokens are the best use of its own compute.
    ladder: one row a shape, with hidden_size, num_layers, params_total and flops_per_token (the params are those that
    the surface was fitted on). batch_rule: tokens of training -> windows a step. tokens_available: distinct training
    tokens of the text; beyond them text is repeated, and counts by ``repetition`` (see ``RepeatedText``). seed_sd:
    spread between seeds in nats. frontier: a second reading of the expected loss (see ``expected_loss``).
    Raises LabError for a budget below one step.
    """
    budgets = {"budget_flops": budget_flops, "budget_seconds": budget_seconds, "budget_tokens": budget_tokens}
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise LabError("A plan has one budget", ", ".join(f"{name}={value}" for name, value in budgets.items()))
    (kind, budget), *_ = given.items()
    if budget_seconds is not None and speed is None:
        raise LabError("A budget in seconds needs the machine's speed", "speed=None", "give measure_speed(...)")
    if not (np.isfinite(budget) and budget > 0):
        raise LabError("A budget must be a positive number", budget)
    needed = ["hidden_size", "num_layers", "params_total", "flops_per_token"]
    if missing := [name for name in needed if name not in ladder]:
        raise LabError(f"A ladder has the columns {', '.join(needed)}", f"without {', '.join(missing)}")

    law = RepeatedText(surface_fit, tokens_available, repetition)
    options = ladder.sort_values("params_total", ignore_index=True)
    sizes, per_token = (options[name].to_numpy(float) for name in ("params_total", "flops_per_token"))

    rates = options.apply(speed, axis=1).to_numpy(float) if speed is not None else np.full(len(options), np.nan)
    if kind == "budget_seconds":
        bought = np.maximum(1.0, _left_to_train(budget * rates))
    else:
        bought = budget / per_token if kind == "budget_flops" else np.full(len(options), float(budget))
    # What each shape gets for the budget; for a budget of tokens, a row for the compute of each shape.
    table = np.outer(bought * per_token, 1 / per_token) if kind == "budget_tokens" else bought[None]
    best = int(_choose(law.loss(np.broadcast_to(sizes, table.shape), table)[None])[0])
    chosen = np.full(2, np.nan)
    if len(surface_fit.samples):
        points = (v.ravel() for v in law.effective(np.broadcast_to(sizes, table.shape), table))
        draws = evaluate_law("surface", surface_fit.samples, *points).reshape(-1, *table.shape)
        chosen = np.quantile(sizes[_choose(draws)], [0.025, 0.975], method="nearest")
    options = options.assign(tokens=bought, flops=bought * per_token)
    options["seconds"] = (bought + evaluation_tokens(bought)) / rates
    options["effective_tokens"] = law.effective(sizes, bought)[1]
    options = options.join(law.predict(sizes, bought, seed_sd=seed_sd))
    row = options.loc[best]

    batch_size = int(batch_rule(row["tokens"]))
    steps = round(row["tokens"] / (batch_size * seq_len))
    if steps < 1:
        raise LabError(
            "A budget must buy at least one step",
            f"{row['tokens']:.0f} tokens, {batch_size * seq_len} a step",
            "raise the budget",
        )
    tokens = steps * batch_size * seq_len
    flops = float(tokens * row["flops_per_token"])
    expected = expected_loss(surface_fit, frontier, row["params_total"], tokens, flops, seed_sd, law)
    # The price of another size is at equal compute, or in equal time.
    same = table[best if kind == "budget_tokens" else 0]
    smaller, larger = (_price(law, sizes, same, best, factor) for factor in (0.5, 2.0))
    epochs = None if tokens_available is None else tokens / tokens_available
    reach = flops / largest_flops_fitted
    known = surface_fit.data
    reached = [
        float(value / known[name].max()) if name in known else None
        for name, value in (("params", row["params_total"]), ("tokens", tokens))
    ]

    warnings = []
    if reach > FAR:
        warnings.append(
            f"The budget is {reach:,.0f} times the largest one fitted: far beyond the evidence. The interval covers the "
            "fit's uncertainty and the seeds', not a law that bends on the way."
        )
    if best in (0, len(options) - 1) and len(options) > 1:
        end, beyond = ("smallest", "smaller") if best == 0 else ("largest", "larger")
        warnings.append(f"This is the {end} shape of the ladder: a {beyond} one may be better still.")
    effective = float(law.effective(row["params_total"], tokens)[1])
    if epochs is not None and epochs > 1:
        warnings.append(
            f"The text holds {tokens_available:,.0f} tokens, so this is {epochs:.1f} epochs, worth {quantity(effective)} new "
            f"tokens. {repetition.sentence()} The price of a text read too often can be higher: hold out text, and stop early."
        )
    doubtful = [name for name, status in surface_fit.status.items() if status == "not identified"]
    if doubtful:
        warnings.append(f"The surface's {', '.join(doubtful)} could not be identified: trust the interval only.")
    return Plan(
        hidden_size=int(row["hidden_size"]),
        num_layers=int(row["num_layers"]),
        params=float(row["params_total"]),
        params_low=float(chosen[0]),
        params_high=float(chosen[1]),
        tokens=int(tokens),
        steps=int(steps),
        batch_size=batch_size,
        seq_len=seq_len,
        learning_rate=float(lr_rule.predict(row["params_total"], tokens)),
        loss=float(expected["loss"]),
        low=float(expected["low"]),
        high=float(expected["high"]),
        flops=flops,
        seconds=None if speed is None else float((tokens + evaluation_tokens(tokens)) / rates[best]),
        reach=float(reach),
        size_reach=reached[0],
        length_reach=reached[1],
        smaller_costs=smaller[0],
        larger_costs=larger[0],
        smaller_compute=smaller[1],
        larger_compute=larger[1],
        epochs=epochs,
        effective_tokens=effective,
        repetition=repetition,
        warnings=tuple(warnings),
        shape=options.loc[[best], list(ladder.columns)].to_dict("records")[0],
        options=options,
    )


def expected_loss(
    surface: Fit,
    frontier: Fit | None,
    params: float,
    tokens: float,
    flops: float,
    seed_sd: float,
    law: RepeatedText | None = None,
) -> dict[str, float]:
    """Expected loss of one run, with a 95 % interval: ``loss``, ``low``, ``high``.

    Over a small range of compute the data cannot tell a law with a floor (the surface) from one without (``frontier``,
    L(C) = A C^-alpha through the isoFLOP minima), and beyond that range the two part. So where both are given the loss is
    their mean, and the interval spans both of theirs. law: the surface over a text that may be repeated; the frontier is
    then read at the compute that the run is worth, C times the shares of its parameters and tokens that count. It knows the
    best size for a compute alone, so what another size costs there by the surface is added to it. seed_sd: in nats; where
    the surface's own rows scatter more about it than seeds do, a new run is expected to do so too.
    """
    law = law or RepeatedText(surface)
    spread = max(seed_sd, _scatter(surface) * float(law.loss(params, tokens)))
    readings = [law.predict(params, tokens, seed_sd=spread).iloc[0]]
    if frontier is not None:
        product = float(np.prod(law.effective(params, tokens)))
        at_best = frontier.predict(flops * product / (params * tokens), seed_sd=seed_sd).iloc[0]
        readings.append(at_best + _off_size(surface, *law.effective(params, tokens)))
    return {
        "loss": float(np.mean([reading["loss"] for reading in readings])),
        "low": float(min(reading["low"] for reading in readings)),
        "high": float(max(reading["high"] for reading in readings)),
    }


def _off_size(surface: Fit, params: float, tokens: float) -> float:
    """Nats that a size costs against the best one for the same N D, by the surface; nothing where that has no best size."""
    p = surface.params
    if not all(p[name] > 0 for name in ("A", "B", "alpha", "beta")):
        return 0.0
    here, best = evaluate_law("surface", p, params, tokens), surface.optimal(6 * params * tokens).loss.iloc[0]
    return float(here - best)


def _scatter(surface: Fit) -> float:
    """The standard deviation of the log loss of a surface's rows about it; 0 where there are none to spare."""
    rows = surface.data.get("residual")
    freedom = 0 if rows is None else len(rows) - len(surface.params)
    return float(np.sqrt((rows**2).sum() / freedom)) if freedom > 0 else 0.0


def evaluation_tokens(tokens: object) -> object:
    """The evaluations of a run of so many tokens, in training tokens of equal cost: a third each, since nothing goes
    backward. As a Trainer does by default: 20 on an eighth of what was trained in between, and one on eval_tokens."""
    most = TrainConfig.eval_tokens
    return (20 * np.minimum(most / 4, tokens / 160) + most) / 3


def _left_to_train(tokens: np.ndarray) -> np.ndarray:
    """The tokens of training in so many of training and evaluation: the inverse of t + evaluation_tokens(t), which is
    the lower of two lines."""
    most = TrainConfig.eval_tokens
    return np.maximum(tokens - 2 * most, (tokens - most / 3) / (1 + 1 / 24))


def _choose(losses: np.ndarray) -> np.ndarray:
    """The best shape of each fit, (R,), from losses (R, budgets, shapes). With one budget, the lowest loss; with one for
    each shape (its own compute), the shape that is nearest to the best one at its own compute."""
    lowest = losses.argmin(axis=2)
    if losses.shape[1] == 1:
        return lowest[:, 0]
    return np.abs(lowest - np.arange(losses.shape[1])).argmin(axis=1)


def _price(law: RepeatedText, sizes: np.ndarray, tokens: np.ndarray, best: int, factor: float) -> tuple[float, float]:
    """What a model ``factor`` times the size of the best costs: nats at the same budget, and how many times the budget
    it needs for the same loss. Its tokens are interpolated between the ladder's in log-log; beyond the ladder they fall
    as 1 / N."""
    x, y = np.log(sizes), np.log(tokens)
    size = x[best] + np.log(factor)
    inside = np.clip(size, x[0], x[-1])
    params, bought = float(np.exp(size)), float(np.exp(np.interp(inside, x, y) - (size - inside)))
    aim = float(law.loss(sizes[best], tokens[best]))
    needed = _inverse(lambda t: -float(law.loss(params, t)), -aim)
    return float(law.loss(params, bought)) - aim, needed / bought


def _inverse(rising: Callable[[float], float], value: float) -> float:
    """Where a rising function of tokens reaches ``value``, by bisection on a log scale; infinity where it never does."""
    low, high = math.log(1.0), math.log(1e30)
    if rising(math.exp(high)) < value:
        return math.inf
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if rising(math.exp(middle)) < value else (low, middle)
    return math.exp(high)


def _price_words(nats: float, compute: float) -> str:
    if nats < 0:
        return f"{nats:+.3f} nats (it would be better)"
    more = "no budget brings it there" if math.isinf(compute) else f"{compute:.2f}x the budget for the same loss"
    return f"{nats:+.3f} nats, or {more}"


def _times(ratio: float) -> str:
    return f"{ratio:.2g}x" if ratio < 10 else f"{ratio:,.0f}x"


def _span(low: float, high: float) -> str:
    return quantity(low) if low == high else f"{quantity(low)} to {quantity(high)}"


def _finite(values: dict) -> dict:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


# ------------------------------------------------------------------------------------------------------------ evidence


@dataclass(frozen=True)
class Evidence:
    """What a study knows that plans need, and keeps in tables/law.json: its laws, its ladder and its text.

    surface, lr_rule, ladder, seed_sd, frontier, repetition: as ``plan`` takes them. largest_flops: of the rows behind
    the surface. tokens_available: distinct training tokens of the text.
    """

    surface: Fit
    lr_rule: LearningRateRule
    ladder: pd.DataFrame
    seed_sd: float
    largest_flops: float
    tokens_available: float | None = None
    frontier: Fit | None = None
    repetition: Repetition = PUBLISHED

    def plan(
        self,
        recipe: object,
        *,
        flops: float | None = None,
        seconds: float | None = None,
        tokens: float | None = None,
        speed: Callable[[pd.Series], float] | None = None,
    ) -> Plan:
        """``plan`` for one budget; recipe: a ``design.Recipe``, for its batches and windows."""
        return plan(
            self.surface,
            self.lr_rule,
            self.ladder,
            batch_rule=recipe.batch_size,
            seq_len=recipe.seq_len,
            largest_flops_fitted=self.largest_flops,
            budget_flops=flops,
            budget_seconds=seconds,
            budget_tokens=tokens,
            speed=speed,
            tokens_available=self.tokens_available,
            repetition=self.repetition,
            seed_sd=self.seed_sd,
            frontier=self.frontier,
        )

    def speed_for(
        self,
        recipe: object,
        seconds: Sequence[float],
        threads: int | None = None,
        seconds_each: float = 1.0,
        train: TrainConfig | None = None,
    ) -> Speed:
        """This machine's speed, for plans that take so many ``seconds``: measured roughly, on the plain path, on three rungs
        of the ladder, and then on the very shapes and batches that such plans choose, as they will be trained. The rest
        as ``measure_speed`` takes it."""
        rows = self.ladder[self.ladder["params_total"] <= max(5e6, self.ladder["params_total"].min())]
        rows = rows.sort_values("params_total").to_dict("records")  # beyond five million parameters little changes
        picks = [rows[i] for i in sorted({len(rows) // 4, len(rows) // 2, len(rows) - 1})]
        batches = [min(16, recipe.batch_size(20 * row["params_total"])) for row in picks]
        options = {"threads": threads, "seconds_each": seconds_each, "train": train}
        plain = (train or TrainConfig()).replace(precision="fp32", compile=False)
        speed = measure_speed(
            [self.model(recipe, row) for row in picks], batch_size=batches, **{**options, "train": plain}
        )
        for budget in seconds:
            known: set[float] = set()  # an exact speed may lead to another shape, whose speed is then measured too
            while (chosen := self.plan(recipe, seconds=budget, speed=speed)).params not in known and len(known) < 3:
                model, batch_size = self.model(recipe, chosen.shape), min(chosen.batch_size, 64)
                speed = speed.joined(measure_speed([model], batch_size=batch_size, **options))
                known.add(chosen.params)
        return speed

    def model(self, recipe: object, row: dict) -> ModelConfig:
        """The model of a ladder row, by ``recipe.model`` (its vocabulary from the embeddings, which are tied)."""
        vocab_size = round((row["params_total"] - row["params_non_embedding"]) / row["hidden_size"])
        return recipe.model((int(row["hidden_size"]), int(row["num_layers"]), int(row["num_heads"])), vocab_size)

    def to_dict(self) -> dict:
        """Ready for JSON; ``from_dict`` reads it again. The fits go with their rows and resamples."""

        def kept(fit: Fit | None) -> dict | None:
            return fit and {**fit.to_dict(), "samples": fit.samples.to_dict("list"), "data": fit.data.to_dict("list")}

        return {
            "surface": kept(self.surface),
            "frontier": kept(self.frontier),
            "lr_rule": dataclasses.asdict(self.lr_rule),
            "ladder": self.ladder.to_dict("records"),
            "seed_sd": self.seed_sd,
            "largest_flops": self.largest_flops,
            "tokens_available": self.tokens_available,
            "repetition": _finite(dataclasses.asdict(self.repetition)),
        }

    @classmethod
    def from_dict(cls, known: dict) -> Evidence:
        """What ``to_dict`` wrote. Raises KeyError, TypeError or ValueError where it is not that."""
        names = {field.name for field in dataclasses.fields(Fit)}

        def fit(values: dict | None) -> Fit | None:
            if not values:
                return None
            values = {name: value for name, value in values.items() if name in names and value is not None}
            frames = {name: pd.DataFrame(values.get(name, {})) for name in ("samples", "data")}
            return Fit(**{**values, **frames})

        repetition = {k: math.inf if v is None else v for k, v in known.get("repetition", {}).items()}
        return cls(
            surface=fit(known["surface"]),
            lr_rule=LearningRateRule(**known["lr_rule"]),
            ladder=pd.DataFrame(known["ladder"]),
            seed_sd=known["seed_sd"],
            largest_flops=known["largest_flops"],
            tokens_available=known["tokens_available"],
            frontier=fit(known["frontier"]),
            repetition=Repetition(**repetition),
        )
