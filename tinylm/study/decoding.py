"""Grouped-query attention in decoding, step by step: what studies/decoding.ipynb narrates. Nothing is trained here.

Models that differ in their number of key-value heads alone take turns in rounds: each writes tokens for a batch of sequences
whose context is already there. What a token costs does not depend on what weights, keys and values say, so weights are as
initialised and the cache is filled with random numbers instead of by reading a prompt. The turns are kept in timings.json with
the machine and the date; the report is drawn from that file.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pandas as pd
from scipy import stats

from tinylm import counts
from tinylm.config import ModelConfig
from tinylm.errors import LabError
from tinylm.study import bench, claims, contents, plots
from tinylm.study.claims import TIMINGS
from tinylm.study.parameters import DecodingParameters, repository, within_repository
from tinylm.study.report import Report, interval, write_table
from tinylm.study.runs import _read_checked, _write_checked
from tinylm.words import duration, quantity

# ------------------------------------------------------------------------------------------------------------------ as data

GROUPS = (1, 2, 3, 4, 6)  # query heads that share a key-value head, as the heads allow; then all of them
CLAIMED = "groups of 3"
PARTS = {Fraction(1, 2): "half", Fraction(1, 3): "a third", Fraction(1, 4): "a quarter"}
FASTER = 0.1  # what claim 5 calls faster: 10 % more tokens a second


@dataclass(frozen=True)
class Preset:
    """How much a preset measures. layers, hidden_size, heads: the model; contexts and batches: of the cells, of which the last of
    both decides; rounds: of that cell; rounds_beside: of the others; seconds: of a turn, at least; threads: None is one a
    core."""

    layers: int = 12
    hidden_size: int = 768
    heads: int = 12
    vocab_size: int = 512
    contexts: tuple[int, ...] = (256, 1024, 4096)
    batches: tuple[int, ...] = (1, 8)
    rounds: int = 20
    rounds_beside: int = 8
    seconds: float = 0.4
    threads: int | None = None

    @property
    def cells(self) -> list[tuple[int, int]]:
        """Batch and context of every cell, that which decides first."""
        return [(batch, context) for batch in self.batches[::-1] for context in self.contexts[::-1]]

    @property
    def groups(self) -> dict[str, int]:
        """Name -> query heads a key-value head."""
        shared = {"MHA" if g == 1 else f"groups of {g}": g for g in GROUPS if g < self.heads and self.heads % g == 0}
        return {**shared, "MQA": self.heads}

    def model(self, name: str, context: int) -> ModelConfig:
        return ModelConfig(
            vocab_size=self.vocab_size, hidden_size=self.hidden_size, num_layers=self.layers, num_heads=self.heads,
            num_kv_heads=self.heads // self.groups[name], max_seq_len=context,
        ).resolve()  # fmt: skip

    def rounds_of(self, cell: tuple[int, int]) -> int:
        return self.rounds if cell == self.cells[0] else self.rounds_beside


PRESETS = {
    "smoke": Preset(2, 96, 12, 64, (16, 64), (1, 2), rounds=4, rounds_beside=3, seconds=0.005, threads=1),
    "quick": Preset(rounds=8, rounds_beside=3, seconds=0.2),
    "full": Preset(),
}


def begin(settings: DecodingParameters) -> DecodingStudy:
    """The study. Seals the rule of claim 5 before anything is timed."""
    study = DecodingStudy(settings, PRESETS[settings.preset])
    claims.seal(study.folder, settings.study)
    return study


# -------------------------------------------------------------------------------------------------- one cell, in its process


def time_cell(preset: Preset, cell: tuple[int, int]) -> dict:
    """Rounds of turns of all groups at one batch and context, in this process: ``turns``, one row a turn (heads, round, steps and
    seconds), after one each that is not counted, and ``peak_mb``, what the process held at most."""
    import torch

    from tinylm.decoding import Step
    from tinylm.model import TinyLM

    batch, context = cell
    torch.manual_seed(0)
    torch.set_num_threads(preset.threads or bench._cores())
    with torch.inference_mode():
        models = {name: preset.model(name, context) for name in preset.groups}
        steps = {name: Step(TinyLM(model)) for name, model in models.items()}
        noise = torch.randn(preset.hidden_size // preset.heads, context)
        turns = []
        for number in range(-1, preset.rounds_of(cell)):
            names = list(models)
            first = number % len(names)
            for name in names[first:] + names[:first]:
                cache = filled_cache(models[name], batch, noise)
                turn = take_turn(steps[name], cache, batch, preset.seconds if number >= 0 else 0.0)
                del cache  # the next is made when this is gone: the largest alone is what memory must hold
                turns += [{"heads": name, "round": number, **turn}] if number >= 0 else []
    return {"turns": turns, "peak_mb": bench._memory()["peak_mb"]}


def filled_cache(model: ModelConfig, batch: int, noise: object) -> object:
    """A cache as if max_seq_len tokens had been read: full, with the same ``noise`` (Dh, slots) for keys and values in the
    memory of every layer, sequence and head. A token more takes the place of the oldest, so that the context keeps its
    length."""
    from tinylm.attention import KVCache

    cache = KVCache(model, batch)
    cache.keys.copy_(noise)
    cache.values.copy_(noise.mT)
    cache.length = cache.slots
    return cache


def take_turn(step: Callable, cache: object, batch: int, seconds: float) -> dict:
    """Tokens of every sequence, the likeliest each time, for at least so many seconds and three steps, after one that is not
    counted: how many steps, and how long they took."""
    import torch

    step.cache = cache  # its keys are noise, in whatever order a step keeps their channels
    ids = step(torch.zeros(batch, dtype=torch.long), cache).argmax(-1)
    steps, began = 0, time.perf_counter()
    while steps < 3 or time.perf_counter() - began < seconds:
        ids = step(ids, cache).argmax(-1)
        steps += 1
    seconds = time.perf_counter() - began
    step.cache = None  # or it would be held until the model's next turn
    return {"steps": steps, "seconds": seconds}


def _time_apart(preset: Preset, cell: tuple[int, int]) -> dict:
    """``time_cell`` in a process of its own, whose threads are its own. Raises LabError with its last word where it fails."""
    asked = json.dumps({"preset": dataclasses.asdict(preset), "cell": cell})
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(preset.threads or bench._cores()))
    command = [sys.executable, "-m", "tinylm.study.decoding"]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, env={**os.environ, **threads})
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word of why, as when memory runs out"])[-1]
        raise LabError(
            f"Timing batch {cell[0]} at context {cell[1]} must run to its end", f"it ended with {done.returncode}: {last}",
            "mend what it says, or free memory",
        )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def _serve() -> None:
    asked = json.loads(sys.stdin.read())
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in asked["preset"].items()}
    print(json.dumps(time_cell(Preset(**given), tuple(asked["cell"]))))


# ---------------------------------------------------------------------------------------------------------------- the study


class DecodingStudy:
    """What shared keys and values bring in decoding: speed, and bytes of the cache."""

    def __init__(self, settings: DecodingParameters, preset: Preset):
        self.settings, self.preset, self.folder = settings, preset, settings.folder
        self.report = Report(self.folder, "Grouped-query attention in decoding")
        self.findings: list[str] = []

    def cache_bytes(self, name: str, cell: tuple[int, int]) -> int:
        batch, context = cell
        return counts.kv_cache_bytes(self.preset.model(name, context), batch, context)

    def weight_bytes(self, name: str) -> int:
        """Bytes of the weights that every step reads, in fp32: the embedding serves as the head."""
        return 4 * counts.parameters(self.preset.model(name, self.preset.contexts[-1]))["total"]

    # Timing ---------------------------------------------------------------------------------------------------------------

    def describe(self) -> None:
        """What is timed, and how."""
        preset = self.preset
        batch, context = preset.cells[0]
        self.report.section("What is timed")
        self.report.text(
            f"Models of {preset.layers} layers of {preset.hidden_size} with {preset.heads} query heads, vocabulary "
            f"{preset.vocab_size:,}, in fp32: multi-head attention (MHA), groups of query heads that share a key-value head, and "
            "one for all (MQA); fewer of them also means fewer weights, and all else is equal. The package's own decoding step, "
            "with the choice of the likeliest token, is timed at batches of "
            f"{_listed(preset.batches)} and contexts of {_listed(preset.contexts)}, on {preset.threads or 'all'} "
            f"core{'s' if preset.threads != 1 else ''}; batch {batch} at context {context:,} decides.\n\n"
            "What a token costs does not depend on what weights, keys and values say. So the weights are as initialised, and the "
            "cache is filled with random keys and values rather than by reading a prompt: every layer, head and sequence in its "
            "own memory, made anew for every turn. The cache is full, and each new token takes the place of the oldest: the "
            f"context keeps its length.\n\nThe models take turns, one at a time, in {preset.rounds} rounds ({preset.rounds_beside} "
            "beside the deciding case) whose order rotates. Ratios to MHA are taken within a round; an effect is their geometric "
            "mean less one, with a 95 % interval over rounds (Student's t of their logarithms)."
        )

    def plan(self) -> None:
        """What will be timed and how much memory that takes."""
        cells, preset = self.preset.cells, self.preset
        least = sum(preset.rounds_of(cell) for cell in cells) * len(preset.groups) * preset.seconds
        weights = [self.weight_bytes(name) for name in preset.groups]
        memory = sum(weights) + max(*weights, self.cache_bytes("MHA", cells[0]))
        there = len({(one["batch"], one["context"]) for one in self._kept()["cells"]})
        print(
            f"plan: {len(cells)} cells of {len(preset.groups)} models, {there} of them timed already; at least {duration(least)} "
            f"of decoding in all, and about three times that with setting up; {memory / 1e9:.1f} GB of memory at most"
        )

    def _kept(self) -> dict:
        """What timings.json holds. Raises LabError where it is of another preset."""
        path, asked = self.folder / TIMINGS, json.loads(json.dumps(dataclasses.asdict(self.preset)))
        kept = {"asked": asked, "cells": []}
        if path.exists():
            kept = _read_checked(path, "timings", "delete the file, and measure again")
        if kept["asked"] != asked:
            raise LabError(
                "A folder keeps the timings of one preset",
                f"{within_repository(path)} is of another than {self.settings.preset}",
                "give another results_dir, or delete the file",
            )
        return kept

    def measure(self) -> None:
        """Time the cells that are not in timings.json yet; each is kept when it ends. Raises LabError where the machine is busy
        (not for the smoke preset, whose times say nothing, and not with force=True), and where the file is of another
        machine."""
        kept = self._kept()
        cells = kept["cells"]
        known = {(one["batch"], one["context"]) for one in cells}
        if todo := [cell for cell in self.preset.cells if cell not in known]:
            reasons, here = self._reasons(), bench._about_machine()
            if cells and cells[0]["machine"] != here:
                raise LabError(
                    "All timings of a folder are of one machine", f"{cells[0]['machine']} there, {here} here",
                    "give another results_dir",
                )  # fmt: skip
        for cell in todo:
            started = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            watch, began = bench._Watch(), time.monotonic()
            done = _time_apart(self.preset, cell)
            cells.append(
                {"batch": cell[0], "context": cell[1], "started": started, "seconds": time.monotonic() - began,
                 "busy": reasons, **watch.share(), "machine": here, **done}
            )  # fmt: skip
            _write_checked(self.folder / TIMINGS, "timings", {"asked": kept["asked"], "cells": cells})
            print(f"timed batch {cell[0]} at context {cell[1]:,} in {duration(cells[-1]['seconds'])}", flush=True)
        self.cells = cells
        self.table = pd.DataFrame([row for one in cells for row in self._rows(one)])

    def _reasons(self) -> list[str]:
        reasons = bench.busy()
        if reasons and not self.settings.force and self.settings.preset != "smoke":
            raise LabError(
                "Speeds are measured on an idle machine",
                "; ".join(reasons),
                "wait until it is idle (the load average takes a minute), or measure all the same with -p force true",
            )
        return reasons

    def _rows(self, one: dict) -> list[dict]:
        """Speed and bytes of each model in one cell, MHA first."""
        batch, context = cell = one["batch"], one["context"]
        turns = pd.DataFrame(one["turns"])
        rates = (batch * turns.steps / turns.seconds).groupby([turns["round"], turns["heads"]]).first().unstack()
        read = {name: self.weight_bytes(name) + self.cache_bytes(name, cell) for name in self.preset.groups}
        rows = []
        for name, group in self.preset.groups.items():
            rate = float(rates[name].median())
            rows.append(
                {"batch": batch, "context": context, "heads": name, "group": group, "tokens_per_second": rate,
                 **ratio_of(rates[name], rates["MHA"]), "rounds": len(rates),
                 "cache_mb": self.cache_bytes(name, cell) / 1e6, "gb_per_second": read[name] * rate / batch / 1e9,
                 "by_bytes": read["MHA"] / read[name] - 1}
            )  # fmt: skip
        return rows

    # Telling --------------------------------------------------------------------------------------------------------------

    def show_cache(self) -> None:
        """Bytes of the cache, exact."""
        cells = self.preset.cells[::-1]
        rows = [
            {"heads": name, "over_mha": self.cache_bytes(name, cells[-1]) / self.cache_bytes("MHA", cells[-1])}
            | {f"batch {b}, context {c:,}": self.cache_bytes(name, (b, c)) / 1e6 for b, c in cells}
            for name in self.preset.groups
        ]
        self.report.section("The cache")
        self.report.table(
            pd.DataFrame(rows), "cache", "MB (1e6 bytes) of keys and values in fp32, exact, and the share of MHA's", heads="",
            over_mha=".3f", **{f"batch {b}, context {c:,}": ",.1f" for b, c in cells},
        )  # fmt: skip

    def show_speed(self) -> None:
        """Tokens a second over batch and context, and over MHA's."""
        table = self.table.sort_values(["batch", "context", "group"], ignore_index=True)
        self.report.section("Speed")
        self.report.table(
            table.rename(columns={"effect": "over_mha"}), "speed", "Tokens a second (median over rounds), how much more than MHA "
            "with its 95 % interval, bytes of weights and cache read a second, and how much more it would be if those bytes were "
            "all that counts", batch="d", context=",d", heads="", tokens_per_second=",.1f",
            over_mha="+.1%", low="+.1%", high="+.1%", rounds="d",
            cache_mb=",.1f", gb_per_second=".1f", by_bytes="+.1%",
        )  # fmt: skip
        self.report.figure(
            "speed", "Tokens a second against context", self._draw_speed, size=(4.6 * len(self.preset.batches), 3.9),
            panels=len(self.preset.batches),
        )  # fmt: skip
        self.report.figure(
            "gain", "Tokens a second over MHA's with 95 % intervals; dashed: what claim 5 calls faster; grey: what bytes "
            "of weights and cache alone would give in the deciding case", self._draw_gain, size=(7.8, 4.0),
        )  # fmt: skip
        batch, context = self.preset.cells[0]
        deciding = table[(table.batch == batch) & (table.context == context)].set_index("heads")
        said = "; ".join(
            f"{name} {row.effect:+.0%} ({interval(row.low, row.high, '+.0%')})"
            for name, row in deciding.iloc[1:].iterrows()
        )
        self.findings.append(
            f"Batch {batch} at context {context:,} ({self._words()}), tokens a second against MHA's "
            f"{deciding.tokens_per_second['MHA']:,.0f}, {deciding.rounds['MHA']} rounds: {said}."
        )
        least = table[(table.batch == self.preset.batches[0]) & (table.context == self.preset.contexts[0])].set_index(
            "heads"
        )
        row = least.loc[CLAIMED]
        self.findings.append(
            f"At batch {self.preset.batches[0]} and context {self.preset.contexts[0]:,}, {CLAIMED} bring {row.effect:+.0%} "
            f"({interval(row.low, row.high, '+.0%')})."
        )
        held = self.cache_bytes(CLAIMED, (batch, context))
        share = Fraction(held, self.cache_bytes("MHA", (batch, context)))
        self.findings.append(
            f"At batch {batch} and context {context:,} the cache of {CLAIMED} holds {quantity(held)} bytes, exactly "
            f"{PARTS.get(share, share)} of MHA's."
        )
        self._write_effects(deciding)

    def _words(self) -> str:
        preset = self.preset
        return f"{preset.layers} layers of {preset.hidden_size}, {preset.heads} heads, fp32"

    def _draw_speed(self, axes: object) -> None:
        for ax, batch in zip(np.ravel(axes), self.preset.batches, strict=True):
            for i, name in enumerate(self.preset.groups):
                own = self.table[(self.table.batch == batch) & (self.table.heads == name)].sort_values("context")
                ax.plot(own.context, own.tokens_per_second, f"{plots.MARKERS[i]}-", color=plots.COLOURS[i], label=name)
            ax.set_xscale("log", base=2)
            ax.set_xticks(self.preset.contexts, [f"{context:,}" for context in self.preset.contexts])
            ax.minorticks_off()
            ax.set_ylim(bottom=0)
            ax.set_xlabel("context (tokens)")
            ax.set_title(f"batch {batch}")
        np.ravel(axes)[0].set_ylabel("tokens a second")
        np.ravel(axes)[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))

    def _draw_gain(self, ax: object) -> None:
        names = list(self.preset.groups)[1:]
        cells = self.preset.cells[::-1]
        for i, (batch, context) in enumerate(cells):
            own = (
                self.table[(self.table.batch == batch) & (self.table.context == context)].set_index("heads").loc[names]
            )
            x = np.arange(len(names)) + 0.11 * (i - (len(cells) - 1) / 2)
            errors = [own.effect - own.low, own.high - own.effect]
            ax.errorbar(
                x, 1 + own.effect, errors, fmt=plots.MARKERS[i % len(plots.MARKERS)], capsize=2.5, color=plots.COLOURS[i],
                label=f"batch {batch}, context {context:,}",
            )  # fmt: skip
        ax.plot(x, 1 + own.by_bytes, "_", color=plots.GREY, markersize=16, label="by bytes, deciding case")
        ax.axhline(1, color=plots.GREY, linewidth=1)
        ax.axhline(1 + FASTER, color=plots.GREY, linewidth=1, linestyle="--")
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        ticks = [tick for tick in (0.01, 0.1, 0.5, 1, 1.5, 2, 3, 5, 10, 30, 100) if low <= tick <= high]
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.set_xticks(range(len(names)), names)
        ax.grid(axis="x", visible=False)
        ax.set_ylabel("tokens a second over MHA's")
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))

    def _write_effects(self, deciding: pd.DataFrame) -> None:
        """tables/effects.csv, which ``claims`` reads."""
        rows = []
        for name, row in deciding.iloc[1:].iterrows():
            ends = row[["low", "high", "low_90", "high_90"]]
            rows.append(
                claims.effects_row(f"tokens a second, {name}", row.effect, *ends, unit="share", seeds=row.rounds)
            )
            share = row.cache_mb / deciding.cache_mb["MHA"]
            rows.append(claims.effects_row(f"cache bytes, {name}", share, share, share, unit="share", seeds=1))
        effects = pd.DataFrame(rows, columns=list(claims.COLUMNS))
        write_table(self.folder / "tables" / "effects.csv", effects)

    def end(self) -> None:
        """How it was made, and the report's first lines."""
        machine = self.cells[0]["machine"]
        days = sorted({one["started"][:10] for one in self.cells})
        others = [one["others"] for one in self.cells if one["others"] is not None]
        reasons = list(dict.fromkeys(reason for one in self.cells for reason in one["busy"]))
        self.report.section("How this was made")
        if reasons:
            told = "\n".join(f"- {reason}" for reason in reasons)
            self.report.text(f"**Not to be relied on**, since the machine was busy when measuring began:\n\n{told}")
            self.findings.append("Timed on a busy machine: not to be relied on.")
        self.report.text(
            f"Timed on {' and '.join(days)}, in {duration(sum(one['seconds'] for one in self.cells))}, on {machine['cpu']} "
            f"({machine['cores']} cores; {machine['system']}), torch {machine['packages']['torch']}; a process held "
            f"{max(one['peak_mb'] for one in self.cells) / 1e3:.1f} GB at most"
            + (f", and others used {max(others):.1%} of the cores at most" if others else "")
            + f". Every turn is in [{TIMINGS}]({TIMINGS}). Drawn again from it, or timed in an empty folder: "
            f"`tinylm study {self.settings.study} --preset {self.settings.preset} --results-dir FOLDER`."
        )
        self.report.summary("\n".join(f"- {line}" for line in self.findings))
        path = self.report.write()
        if self.folder.parent == repository() / "results":
            contents.write(self.folder.parent)
        print(f"report: {within_repository(path)}")


def ratio_of(rates: pd.Series, base: pd.Series) -> dict[str, float]:
    """The geometric mean of rates over those of ``base``, round by round, less one: ``effect``, with ``low`` and ``high`` (95 %)
    and ``low_90`` and ``high_90`` by Student's t of the logarithms over rounds."""
    logs = np.log(rates / base)
    mean, error = float(logs.mean()), float(logs.std(ddof=1) / np.sqrt(len(logs)))
    found = {"effect": np.expm1(mean)}
    for level, suffix in ((0.95, ""), (0.90, "_90")):
        half = error * stats.t.ppf(0.5 * (1 + level), len(logs) - 1)
        found |= {f"low{suffix}": np.expm1(mean - half), f"high{suffix}": np.expm1(mean + half)}
    return {name: float(value) for name, value in found.items()}


def _listed(values: tuple[int, ...]) -> str:
    words = [f"{value:,}" for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


if __name__ == "__main__":
    _serve()
