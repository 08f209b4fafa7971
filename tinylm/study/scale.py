"""The lab on paper at 100 and 10,000 times the compute: what its own planner says, and how long other machines would take.

``python -m tinylm.study.scale`` prints the table that README shows. It is computed from the committed law, from exact counts
and from the rates that vendors publish; nothing of it was run.
"""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path

import pandas as pd

from tinylm.study import design, planner
from tinylm.study.parameters import repository
from tinylm.study.runs import Folder, read_kept
from tinylm.words import duration, quantity

STUDY = "compute_scaling"  # whose law, speed and text are taken
BASE = 3.2e13  # FLOPs: the largest budget of the compute study
FACTORS = (1, 100, 10_000)
# Dense bf16 products, FLOP/s, from NVIDIA's data sheets: A100 (2020), H100 SXM (2022; half the rate given there with sparsity).
DEVICES = {"A100": 312e12, "H100": 989e12}
UTILISATION = 0.3  # share of that rate which training reaches; an assumption, and a kind one for narrow models
BYTES_A_PARAMETER = 16  # fp32 weights, their gradient, and AdamW's two moments
BYTES_A_WINDOW = 8  # a window's number, and its place in the order of the epoch
MORE = (
    (640, 10, 10),
    (768, 12, 12),
    (1024, 12, 16),
    (1280, 14, 20),
    (1536, 16, 24),
    (2048, 18, 32),
)  # rungs above the ladder


def table(results: Path | None = None) -> pd.DataFrame:
    """One row a factor: flops; its plan (params, params_low, params_high, hidden_size, num_layers, tokens, batch_size, reach;
    at_the_end: params_high is the largest rung tried); text_bytes, and epochs over the study's own text; map_bytes,
    state_bytes, order_bytes; here_seconds, and <device>_<number>, seconds on so many of a device.

    results: the folder that holds the study, by default this repository's. The text is taken to never end (``epochs`` tells
    how often the study's own would be read). Time here is the planner's, at the speed that the study measured, evaluations
    included; on a device it is FLOPs / (rate x utilisation x number).
    """
    folder = (results or repository() / "results") / STUDY
    evidence = read_kept(folder / "tables" / "law.json", planner.Evidence.from_dict)
    speed = read_kept(folder / "speed.json", planner.Speed.from_dict)
    corpus = Folder(folder).shared("corpora")["corpora"][0]
    recipe = design.Recipe()
    ladder = design.rung_sizes(recipe, corpus["asked"]["vocab_size"], (*design.LADDER, *MORE))
    endless = dataclasses.replace(evidence, ladder=ladder, tokens_available=None)
    rows = []
    for factor in FACTORS:
        plan = endless.plan(recipe, flops=factor * BASE, speed=speed)
        row = {"factor": factor, "flops": factor * BASE, "epochs": plan.tokens / evidence.tokens_available}
        names = ("params", "params_low", "params_high", "hidden_size", "num_layers", "tokens", "batch_size", "reach")
        row |= {name: getattr(plan, name) for name in names}
        row["at_the_end"] = plan.params_high == ladder["params_total"].max()
        row["text_bytes"] = plan.tokens * corpus["bytes"]["train"] / corpus["tokens"]["train"]
        row["map_bytes"] = plan.tokens * (2 if corpus["asked"]["vocab_size"] <= 65536 else 4)
        row["state_bytes"] = plan.params * BYTES_A_PARAMETER
        row["order_bytes"] = plan.tokens / recipe.seq_len * BYTES_A_WINDOW
        row["here_seconds"] = plan.seconds
        for device, rate in DEVICES.items():
            row |= {f"{device}_{number}": plan.flops / (rate * UTILISATION * number) for number in (1, 8)}
        rows.append(row)
    return pd.DataFrame(rows)


def markdown(results: Path | None = None) -> str:
    """The table as README shows it, and under it what it takes for granted."""
    frame = table(results)
    folder = (results or repository() / "results") / STUDY
    speed = read_kept(folder / "speed.json", planner.Speed.from_dict)
    lines = {
        "FLOPs": [f"{row.flops:.2g}" for row in frame.itertuples()],
        "parameters": [f"{quantity(row.params)} ({row.hidden_size} x {row.num_layers})" for row in frame.itertuples()],
        "95 % of resampled laws": [
            f"{quantity(row.params_low)} to {quantity(row.params_high)}{' or more' * row.at_the_end}"
            for row in frame.itertuples()
        ],
        "tokens": [quantity(row.tokens) for row in frame.itertuples()],
        "windows a step": [f"{row.batch_size}" for row in frame.itertuples()],
        "text for one pass": [_size(row.text_bytes) for row in frame.itertuples()],
        "passes over this text": [
            f"{row.epochs:.2g}" if row.epochs < 10 else f"{row.epochs:,.0f}" for row in frame.itertuples()
        ],
        "token map on disk": [_size(row.map_bytes) for row in frame.itertuples()],
        "weights, gradient, moments": [_size(row.state_bytes) for row in frame.itertuples()],
        "order of the windows": [_size(row.order_bytes) for row in frame.itertuples()],
        f"time here ({speed.threads} threads)": [_time(row.here_seconds) for row in frame.itertuples()],
    }
    for device in DEVICES:
        for number in (1, 8):
            values = frame[f"{device}_{number}"]
            lines[f"{number} {device}"] = [_time(value) for value in values]
    heads = ["", *(f"{factor:,}x" for factor in FACTORS)]
    text = [f"| {' | '.join(heads)} |", "| :--- |" + " ---: |" * len(FACTORS)]
    text += [f"| {name} | {' | '.join(cells)} |" for name, cells in lines.items()]
    rates = " and ".join(f"{rate / 1e12:.0f} TFLOP/s ({device})" for device, rate in DEVICES.items())
    minima = pd.read_csv((results or repository() / "results") / STUDY / "tables" / "isoflop_minima.csv")
    measured = minima[minima.budget == BASE].iloc[0]
    size, low, high = (quantity(measured[name]) for name in ("params_opt", "params_low", "params_high"))
    note = (
        f"Computed, not run. The law is [{STUDY}](results/{STUDY}/README.md)'s surface of parameters and tokens, at the "
        f"largest budget that it was fitted to and up to {FACTORS[-1]:,} times beyond; the minimum of the family measured at 1x "
        f"lies elsewhere, at {size} parameters ({low} to {high}) and {quantity(measured.tokens_opt)} tokens. The text "
        f"never ends. GPUs: FLOPs over the published dense bf16 rate, {rates}, at a utilisation of {UTILISATION:.0%}, which "
        "models so narrow may not reach, and without loss between eight. Memory: fp32 state without activations, which "
        "batch_size and grad_accum bound."
    )
    return "\n".join(text) + "\n\n" + textwrap.fill(f"*{note}*", 130)


def _size(number: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if number >= unit:
            return f"{number / unit:.2g} {name}" if number < 100 * unit else f"{number / unit:.0f} {name}"
    return f"{number / 1e3:.0f} kB"


def _time(seconds: float) -> str:
    if seconds < 1:
        return "under 1 s"
    return duration(seconds) if seconds < 48 * 3600 else f"{seconds / 86400:.2g} days"


if __name__ == "__main__":
    print(markdown())
