"""What to train next: a budget in, a model and a training run out, with the loss to expect and how far that reaches.

The planner minimises the fitted surface L(N, D) over a ladder of shapes, each with the tokens that the budget buys it
by its exact FLOPs (or by its measured speed), so that it needs neither C = 6 N D nor a fitted power law for N_opt.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from tinylm.config import ModelConfig
from tinylm.errors import LabError
from tinylm.study.scaling import Fit, LearningRateRule
from tinylm.words import duration

FAR = 30.0  # a budget so many times the largest one fitted is far beyond the evidence
# Up to so many epochs repeated text was worth nearly as much as new (Muennighoff et al. 2023, arXiv:2305.16264).
FRESH_EPOCHS = 4.0


@dataclass(frozen=True)
class Speed:
    """Training speed of this machine: FLOP/s against parameters, as calibrated by ``measure_speed``.

    ``speed(shape)`` is tokens per second of a ladder row: FLOP/s interpolated in log-log (constant beyond the shapes
    measured), over the row's FLOPs a token. params, flops_per_second: (k,), rising in params.
    """

    params: tuple[float, ...]
    flops_per_second: tuple[float, ...]
    threads: int

    def __call__(self, shape: pd.Series | dict) -> float:
        logs = np.log(self.params), np.log(self.flops_per_second)
        return float(np.exp(np.interp(np.log(shape["params_total"]), *logs)) / shape["flops_per_token"])

    def table(self) -> pd.DataFrame:
        """One row a shape measured: params_total, flops_per_second."""
        return pd.DataFrame({"params_total": self.params, "flops_per_second": self.flops_per_second})


@dataclass(frozen=True)
class Plan:
    """One recommended run. loss, low, high: nats per token and a 95 % interval for one run, seeds included.

    tokens: steps x batch_size (windows a step) x seq_len. flops: exact, of the whole run. seconds: None without a
    speed.
    smaller_costs, larger_costs: nats lost by a model of half and of twice the size at the same budget. epochs: passes
    over the text available (below 1 where it is not used up; None where its size is not known). reach: flops over the
    largest budget behind the fit. options: every shape of the ladder with its tokens, flops, seconds and loss.
    """

    hidden_size: int
    num_layers: int
    params: float
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
    smaller_costs: float
    larger_costs: float
    epochs: float | None
    warnings: tuple[str, ...]
    shape: dict
    options: pd.DataFrame

    @property
    def far(self) -> bool:
        """Whether the budget lies more than 30 times beyond the largest one fitted."""
        return self.reach > FAR

    def table(self) -> pd.DataFrame:
        """What to type and what to expect, one row an item, as text."""
        rows = {
            "hidden_size x num_layers": f"{self.hidden_size} x {self.num_layers}",
            "parameters": f"{self.params:,.0f}",
            "tokens": f"{self.tokens:,}",
            "steps": f"{self.steps:,}",
            "batch_size (windows)": f"{self.batch_size}",
            "learning_rate": f"{self.learning_rate:.3g}",
            "FLOPs": f"{self.flops:.3g}",
            "expected loss (nats/token)": f"{self.loss:.3f} ({self.low:.3f} to {self.high:.3f})",
            "expected time": "not known" if self.seconds is None else duration(self.seconds),
            "of the largest budget fitted": f"{self.reach:.2g}x" + (", far beyond the evidence" if self.far else ""),
            "a model half the size costs": f"{self.smaller_costs:+.3f} nats",
            "a model twice the size costs": f"{self.larger_costs:+.3f} nats",
            "epochs": "not known" if self.epochs is None else f"{self.epochs:.2g}",
        }
        return pd.DataFrame({"plan": rows}).rename_axis("item")

    def sentence(self) -> str:
        """The plan in words, its warnings included."""
        text = (
            f"Train {self.hidden_size} x {self.num_layers} ({self.params:,.0f} parameters) on {self.tokens:,} tokens: "
            f"{self.steps:,} steps of {self.batch_size} windows at a learning rate of {self.learning_rate:.2g}. "
            f"Expect a loss of {self.loss:.3f} ({self.low:.3f} to {self.high:.3f})"
        )
        text += f" after {duration(self.seconds)}." if self.seconds is not None else "."
        return " ".join([text, *self.warnings])

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
        }


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
    speed: Callable[[pd.Series], float] | None = None,
    tokens_available: float | None = None,
    seed_sd: float = 0.0,
    frontier: Fit | None = None,
) -> Plan:
    """The shape of the ladder, and its tokens, with the lowest expected loss for a budget.

    Give exactly one of budget_flops and budget_seconds (which needs ``speed``, tokens per second of a ladder row).
    ladder: one row a shape, with hidden_size, num_layers, params_total and flops_per_token (the params are those that
    the surface was fitted on). batch_rule: tokens of training -> windows a step. tokens_available: distinct training
    tokens of the text; the surface knows only fresh text, so a plan beyond it says how many epochs it is and that the
    loss is a lower bound. seed_sd: spread between seeds in nats. frontier: a second reading of the expected loss (see
    ``expected_loss``). Raises LabError for a budget below one step.
    """
    if (budget_flops is None) == (budget_seconds is None):
        raise LabError("A plan has one budget", f"budget_flops={budget_flops}, budget_seconds={budget_seconds}")
    if budget_seconds is not None and speed is None:
        raise LabError("A budget in seconds needs the machine's speed", "speed=None", "give measure_speed(...)")
    budget = budget_flops if budget_seconds is None else budget_seconds
    if not (np.isfinite(budget) and budget > 0):
        raise LabError("A budget must be a positive number", budget)
    needed = ["hidden_size", "num_layers", "params_total", "flops_per_token"]
    if missing := [name for name in needed if name not in ladder]:
        raise LabError(f"A ladder has the columns {', '.join(needed)}", f"without {', '.join(missing)}")

    options = ladder.sort_values("params_total", ignore_index=True)
    rates = options.apply(speed, axis=1).to_numpy(float) if speed is not None else np.full(len(options), np.nan)
    bought = budget_seconds * rates if budget_seconds is not None else budget_flops / options["flops_per_token"]
    options = options.assign(tokens=bought, flops=bought * options["flops_per_token"], seconds=bought / rates)
    options = options.join(surface_fit.predict(options["params_total"], options["tokens"], seed_sd=seed_sd))
    best = int(options["loss"].idxmin())
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
    expected = expected_loss(surface_fit, frontier, row["params_total"], tokens, flops, seed_sd)
    smaller, larger = (_price(surface_fit, options, best, factor) for factor in (0.5, 2.0))
    epochs = None if tokens_available is None else tokens / tokens_available
    reach = flops / largest_flops_fitted

    warnings = []
    if reach > FAR:
        warnings.append(f"The budget is {reach:.0f} times the largest one fitted: far beyond the evidence.")
    if best in (0, len(options) - 1) and len(options) > 1:
        end, beyond = ("smallest", "smaller") if best == 0 else ("largest", "larger")
        warnings.append(f"This is the {end} shape of the ladder: a {beyond} one may be better still.")
    if epochs is not None and epochs > 1:
        worth = "nearly true so far" if epochs <= FRESH_EPOCHS else "too hopeful by now: expect more"
        warnings.append(
            f"The text holds {tokens_available:,.0f} tokens, so this is {epochs:.1f} epochs; the expected loss takes "
            f"every token as new, which is {worth}."
        )
    doubtful = [name for name, status in surface_fit.status.items() if status == "not identified"]
    if doubtful:
        warnings.append(f"The surface's {', '.join(doubtful)} could not be identified: trust the interval only.")
    return Plan(
        hidden_size=int(row["hidden_size"]),
        num_layers=int(row["num_layers"]),
        params=float(row["params_total"]),
        tokens=int(tokens),
        steps=int(steps),
        batch_size=batch_size,
        seq_len=seq_len,
        learning_rate=float(lr_rule.predict(row["params_total"], tokens)),
        loss=float(expected["loss"]),
        low=float(expected["low"]),
        high=float(expected["high"]),
        flops=flops,
        seconds=None if speed is None else float(tokens / rates[best]),
        reach=float(reach),
        smaller_costs=smaller,
        larger_costs=larger,
        epochs=epochs,
        warnings=tuple(warnings),
        shape=ladder.sort_values("params_total").iloc[[best]].to_dict("records")[0],
        options=options,
    )


def expected_loss(
    surface: Fit, frontier: Fit | None, params: float, tokens: float, flops: float, seed_sd: float
) -> dict[str, float]:
    """Expected loss of one run at the best size for its compute, with a 95 % interval: ``loss``, ``low``, ``high``.

    Over a small range of compute the data cannot tell a law with a floor (the surface) from one without (``frontier``,
    L(C) = A C^-alpha through the isoFLOP minima), and beyond that range the two part. So where both are given the loss is
    their mean, and the interval spans both of theirs.
    """
    readings = [surface.predict(params, tokens, seed_sd=seed_sd).iloc[0]]
    if frontier is not None:
        readings.append(frontier.predict(flops, seed_sd=seed_sd).iloc[0])
    return {
        "loss": float(np.mean([reading["loss"] for reading in readings])),
        "low": float(min(reading["low"] for reading in readings)),
        "high": float(max(reading["high"] for reading in readings)),
    }


def _price(fit: Fit, options: pd.DataFrame, best: int, factor: float) -> float:
    """Nats lost at the same budget by a model ``factor`` times the size of the best: its tokens are interpolated
    between the ladder's in log-log; beyond the ladder they fall as 1 / N."""
    x, y = np.log(options["params_total"].to_numpy(float)), np.log(options["tokens"].to_numpy(float))
    size = x[best] + np.log(factor)
    inside = np.clip(size, x[0], x[-1])
    log_tokens = np.interp(inside, x, y) - (size - inside)
    there = fit.predict(np.exp(size), np.exp(log_tokens))["loss"].iloc[0]
    return float(there - options["loss"].iloc[best])


def measure_speed(
    configs: Sequence[ModelConfig],
    seconds_each: float = 1.0,
    threads: int | None = None,
    batch_size: int | Sequence[int] = 8,
) -> Speed:
    """Time real training steps (forward, backward, clipping, AdamW, in plain fp32) of each config on this machine.

    Three or four shapes that span the ladder do. A step sees batch_size windows (one number, or one a config) of
    max_seq_len random tokens; the speed of a shape is the median over blocks of steps, after a warm-up. The machine
    should be idle. threads: None keeps torch's own number. It is put back afterwards, as is torch's random state.
    """
    import torch  # only here: fits, plans and plots work where torch is not installed

    from tinylm import counts
    from tinylm.model import TinyLM

    batches = [batch_size] * len(configs) if isinstance(batch_size, int) else list(batch_size)
    if not configs or len(batches) != len(configs):
        raise LabError("Speed is measured on configs, each with its batch", f"{len(configs)} and {len(batches)}")
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            pairs = []
            for config, batch in zip(configs, batches, strict=True):
                per_second = _steps_per_second(torch, TinyLM(config), batch, seconds_each)
                per_token = counts.train_flops_per_token(config, config.max_seq_len)
                flops = per_second * batch * config.max_seq_len * per_token
                pairs.append((float(counts.parameters(config)["total"]), float(flops)))
            used = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    params, flops = zip(*sorted(pairs), strict=True)
    return Speed(params, flops, used)


def _steps_per_second(torch, model, batch_size: int, seconds: float) -> float:
    """Training steps per second: the median over blocks of about a tenth of the time each."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, model.config.max_seq_len)
    inputs = torch.randint(model.config.vocab_size, shape, generator=generator)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        model.loss(inputs, inputs.roll(-1, dims=1)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()

    model.train()
    start = time.perf_counter()
    step()  # allocates; also tells roughly how many steps make a block
    block = max(1, round(0.1 * seconds / (time.perf_counter() - start)))
    blocks = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(blocks) < 3:
        start = time.perf_counter()
        for _ in range(block):
            step()
        blocks.append((time.perf_counter() - start) / block)
    return 1 / statistics.median(blocks)
