"""RMSNorm against LayerNorm in time, step by step: what studies/norms.ipynb narrates. Nothing is trained here.

The two norms take turns in rounds, first alone and then inside a whole training step. A sitting is a fresh process with some
rounds: where a process happens to lay its memory moves times by more than rounds within it tell. The turns are kept in
timings.json with the machine and the date; the report is drawn from that file.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from tinylm import counts
from tinylm.config import NORMS, ModelConfig, TrainConfig
from tinylm.errors import LabError
from tinylm.study import bench, claims, contents, plots
from tinylm.study.claims import TIMINGS
from tinylm.study.parameters import NormsParameters, repository, within_repository
from tinylm.study.report import Report, interval, write_table
from tinylm.study.runs import _read_checked, _write_checked
from tinylm.words import duration, quantity

# ------------------------------------------------------------------------------------------------------------------ as data

# How the norm alone is computed. What claim 1 names comes first; the last is shown beside it.
PATHS = {
    "eager": "the package's module",
    "native": "torch's function, which the module calls",
    "compiled": "the package's module under torch.compile",
    "written out": "the formula in single operations, eager: what a norm costs where nobody fused it",
}
WHOLE = "whole step"
CLAIMED = {**{path: f"norm alone, {path}" for path in list(PATHS)[:3]}, WHOLE: WHOLE}  # the parts of the claim
NAMES = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}
FASTER = 0.01  # what claim 1 calls a faster step: 1 % less time


@dataclass(frozen=True)
class Preset:
    """How much a preset measures. activations: rows and channels that the norm alone is given; shape: model and windows of
    the whole step; max_steps: of the run that the step's path is picked for; sittings: fresh processes; rounds: in each; seconds:
    of a turn of the norm alone, at least (a turn of the whole step is one step)."""

    activations: tuple[int, int] = (4096, 256)
    shape: bench.Shape = bench.SHAPES["C"]
    max_steps: int = 10**6
    sittings: int = 5
    rounds: int = 6
    seconds: float = 0.1


PRESETS = {
    "smoke": Preset((256, 32), bench.SHAPES["tiny"], max_steps=100, sittings=3, rounds=3, seconds=0.002),
    "quick": Preset(sittings=3, rounds=4, seconds=0.05),
    "full": Preset(),
}


def begin(settings: NormsParameters) -> Norms:
    """The study. Seals the rule of claim 1 before anything is timed."""
    study = Norms(settings, PRESETS[settings.preset])
    claims.seal(study.folder, settings.study)
    return study


# ---------------------------------------------------------------------------------------------- one sitting, in its process


def sit(preset: Preset, sitting: int) -> dict:
    """Time both norms in this process, which has one thread: ``turns``, one row a turn (case, norm, round, seconds a call), and
    ``path``, how the whole step was computed."""
    import torch

    torch.set_num_threads(1)  # before anything compiles
    torch.manual_seed(sitting)
    turns, path = [], ""
    for case in (*PATHS, WHOLE):
        if case == WHOLE:
            units, path = _steps(preset)
        else:
            units = {norm: _alone(case, norm, *preset.activations) for norm in NORMS}
        turns += [{"case": case, **turn} for turn in take_turns(units, preset, sitting, case != WHOLE)]
    return {"turns": turns, "path": path}


def take_turns(units: dict[str, Callable], preset: Preset, sitting: int, many: bool) -> list[dict]:
    """Rounds of turns of the two ``units``, which goes first alternating, after turns that are not counted. many: a turn is
    as many calls as last ``preset.seconds``, for both alike; else it is one."""

    def turn(unit: Callable, calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            unit()
        return (time.perf_counter() - began) / calls

    calls = 1
    for unit in units.values():
        turn(unit, 2)  # compiled code comes to be here
    if many:
        calls = max(1, math.ceil(preset.seconds / max(1e-9, min(turn(unit, 3) for unit in units.values()))))
    rows = []
    for number in range(preset.rounds):
        names = list(units) if (number + sitting) % 2 == 0 else list(units)[::-1]
        rows += [{"norm": name, "round": number, "seconds": turn(units[name], calls)} for name in names]
    return rows


def _alone(path: str, norm: str, rows: int, width: int) -> Callable[[], object]:
    """Forward and backward of a norm on activations (rows, width) in fp32: the gradients of input and weights."""
    import torch

    function, weights = norm_of(path, norm, width)
    x = torch.randn(rows, width, requires_grad=True)
    gradient = torch.randn(rows, width)
    return lambda: torch.autograd.grad(function(x), [x, *weights], gradient)


def norm_of(path: str, norm: str, width: int) -> tuple[Callable, list]:
    """A norm over ``width`` channels as ``path`` of ``PATHS`` computes it, and its weights: (..., width) -> (..., width)."""
    import torch
    import torch.nn.functional as F

    from tinylm import backend, normalization

    eps = ModelConfig().norm_eps
    module = normalization.NORMS[norm](width, eps)
    weights = list(module.parameters())
    if path == "compiled":
        backend.prepare_to_compile()
        return torch.compile(module, fullgraph=True), weights
    if path == "eager":
        return module, weights

    def rms_by_hand(x, shape, weight, eps):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    def layer_by_hand(x, shape, weight, bias, eps):
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(variance + eps) * weight + bias

    native, by_hand = {"rmsnorm": (F.rms_norm, rms_by_hand), "layernorm": (F.layer_norm, layer_by_hand)}[norm]
    chosen = native if path == "native" else by_hand
    return lambda x: chosen(x, (width,), *weights, eps), weights


def _steps(preset: Preset) -> tuple[dict[str, Callable], str]:
    """A training step of the package with either norm (data, forward, backward, clipping, AdamW) on random tokens, and the path
    that this machine picks for it in words."""
    from tinylm import backend
    from tinylm.train import Trainer

    shape, last = preset.shape, preset.max_steps
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, 200 * shape.max_seq_len).astype(np.uint16)
    fixed = {"warmup_steps": 0, "eval_interval": last, "threads": 1, "stride": shape.max_seq_len}
    train = TrainConfig(batch_size=shape.windows, max_steps=last, **fixed)
    trainers = {norm: Trainer(shape.model.replace(norm=norm), train, tokens, tokens) for norm in NORMS}
    for trainer in trainers.values():
        trainer.model.train()
    units = {norm: trainer.train_step for norm, trainer in trainers.items()}
    return units, backend.words(trainers["rmsnorm"].arithmetic)


def _sit_apart(preset: Preset, sitting: int) -> dict:
    """``sit`` in a process of its own. Raises LabError with its last word where it does not end well."""
    asked = json.dumps({"preset": dataclasses.asdict(preset), "sitting": sitting})
    command = [sys.executable, "-m", "tinylm.study.norms"]
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(command, input=asked, capture_output=True, text=True, env={**os.environ, **threads})
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word of why"])[-1]
        raise LabError("A sitting must run to its end", f"it ended with {done.returncode}: {last}", "mend what it says")
    return json.loads(done.stdout.splitlines()[-1])


def _serve() -> None:
    asked = json.loads(sys.stdin.read())
    given = asked["preset"]
    preset = Preset(**{**given, "activations": tuple(given["activations"]), "shape": bench.Shape(**given["shape"])})
    print(json.dumps(sit(preset, asked["sitting"])))


# ---------------------------------------------------------------------------------------------------------------- the study


class Norms:
    """What either norm costs in time, alone and in a training step."""

    def __init__(self, settings: NormsParameters, preset: Preset):
        self.settings, self.preset, self.folder = settings, preset, settings.folder
        self.report = Report(self.folder, "RMSNorm against LayerNorm in time")
        self.findings: list[str] = []

    def describe(self) -> None:
        """What is timed."""
        rows, width = self.preset.activations
        shape = self.preset.shape
        self.report.section("What is timed")
        self.report.text(
            f"The norm alone: forward and backward on {rows:,} x {width} activations in fp32, on one thread, in "
            f"{len(PATHS)} ways:\n\n"
            + "\n".join(f"- **{path}**: {about}" for path, about in PATHS.items())
            + f"\n\nThe whole step: {shape.hidden_size} x {shape.num_layers}, {shape.num_heads} heads, vocabulary "
            f"{shape.vocab_size:,} ({quantity(counts.parameters(shape.model)['total'])} parameters), {shape.windows} windows of "
            f"{shape.max_seq_len} tokens, one thread, on the path that the machine picks: data, forward, backward, clipping "
            f"and AdamW.\n\nRMSNorm and LayerNorm take turns, and the ratio of their times is taken within a round: "
            f"{self.preset.sittings} sittings, each a fresh process, of {self.preset.rounds} rounds. An effect is the median ratio "
            "less one: below zero RMSNorm is the faster. Its 95 % interval resamples sittings, and rounds within them, and is "
            f"then stretched {stretch_of(self.preset.sittings):.2f} times in logarithms, by Student's t and sqrt(n / (n - 1)), "
            f"since n = {self.preset.sittings} sittings are few: an end may lie beyond every ratio that was measured."
        )

    def measure(self) -> None:
        """Time what is not in timings.json yet; each sitting is kept when it ends. Raises LabError where the machine is busy
        (not for the smoke preset, whose times say nothing, and not with force=True), and where the file is of another
        machine or preset."""
        path = self.folder / TIMINGS
        asked = json.loads(json.dumps(dataclasses.asdict(self.preset)))
        kept: dict = {"asked": asked, "sittings": []}
        if path.exists():
            kept = _read_checked(path, "timings", "delete the file, and measure again")
        if kept["asked"] != asked:
            raise LabError(
                "A folder keeps the timings of one preset",
                f"{within_repository(path)} is of another than {self.settings.preset}",
                "give another results_dir, or delete the file",
            )
        missing = self.preset.sittings - len(kept["sittings"])
        if missing:
            reasons = self._reasons()
            here = bench._about_machine()
            self._check_machine(kept["sittings"], here)
            print(f"plan: {missing} sittings; a few minutes at most, nothing is trained")
        for _ in range(missing):
            number, watch, began = len(kept["sittings"]), bench._Watch(), time.monotonic()
            started = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            done = _sit_apart(self.preset, number)
            kept["sittings"].append(
                {"started": started, "seconds": time.monotonic() - began, "busy": reasons, **watch.share(), "machine": here, **done}
            )  # fmt: skip
            _write_checked(path, "timings", {"asked": asked, "sittings": kept["sittings"]})
            print(
                f"sitting {number + 1} of {self.preset.sittings}: {duration(kept['sittings'][-1]['seconds'])}",
                flush=True,
            )
        self.sittings = kept["sittings"]
        self.times = times_of(self.sittings)

    def _reasons(self) -> list[str]:
        reasons = bench.busy()
        if reasons and not self.settings.force and self.settings.preset != "smoke":
            raise LabError(
                "Times are measured on an idle machine",
                "; ".join(reasons),
                "wait until it is idle (the load average takes a minute), or measure all the same with -p force true",
            )
        return reasons

    @staticmethod
    def _check_machine(sittings: list[dict], here: dict) -> None:
        there = sittings[0]["machine"] if sittings else here
        if there != here:
            differ = ", ".join(
                f"{name} {there.get(name)} there, {here[name]} here" for name in here if there.get(name) != here[name]
            )
            raise LabError("All sittings of a folder are of one machine", differ, "give another results_dir")

    def show_alone(self) -> None:
        """The norm alone, by path."""
        self.table = pd.DataFrame([self._row(case) for case in (*PATHS, WHOLE)])
        alone = self.table[self.table.case != WHOLE]
        self.report.section("The norm alone")
        self._show(
            "alone", alone, "Milliseconds of forward and backward of either norm (median over all rounds), and RMSNorm's over "
            "LayerNorm's less one with its 95 % interval",
        )  # fmt: skip
        self.report.text(self._sittings_apart())
        said = [f"{row.case} {row.effect:+.0%} ({interval(row.low, row.high, '+.0%')})" for row in alone.itertuples()]
        self.findings.append(
            f"RMSNorm's time alone, forward and backward, over LayerNorm's less one: {', '.join(said)} (95 % intervals, stretched "
            f"for so few sittings, {self.preset.sittings})."
        )

    def _sittings_apart(self) -> str:
        """A sentence: where the median times of the sittings differ most, and by how much elsewhere."""
        medians = {
            (case, norm): 1e3 * own.groupby("sitting")[norm].median()
            for case, own in self.times.groupby("case") if case != WHOLE
            for norm in NORMS
        }  # fmt: skip
        apart = {key: values.max() / values.min() for key, values in medians.items()}
        *_, second, most = sorted(apart, key=apart.get)
        return (
            f"Sittings differ most in {NAMES[most[1]]}, {most[0]}: their medians are "
            f"{', '.join(f'{value:.2f}' for value in sorted(medians[most]))} ms, the longest {apart[most]:.1f} times the shortest; "
            f"elsewhere it is {apart[second]:.1f} times at most."
        )

    def show_step(self) -> None:
        """The whole step, and both in one picture."""
        row = self.table.set_index("case").loc[WHOLE]
        self.report.section("The whole step")
        paths = sorted({sitting["path"] for sitting in self.sittings})
        self.report.text(f"The path that this machine picked: {'; '.join(paths)}.")
        self._show("step", self.table[self.table.case == WHOLE], "The same of a whole training step")
        self.report.figure(
            "ratios", "RMSNorm's time over LayerNorm's: a dot a round, coloured by sitting, and the median with its 95 % "
            "interval, which may run beyond the picture; the whole step has an axis of its own; dashed: what claim 1 calls a "
            "faster step", self._draw, size=(10.2, 3.2), panels=2,
        )  # fmt: skip
        self.findings.append(
            f"A whole training step takes {row.effect:+.1%} with RMSNorm instead of LayerNorm "
            f"({interval(row.low, row.high, '+.1%')}; {'; '.join(paths)}, one thread)."
        )
        rows = [
            claims.effects_row(
                CLAIMED[row.case],
                row.effect,
                row.low,
                row.high,
                row.low_90,
                row.high_90,
                unit="share",
                seeds=row.rounds,
            )
            for row in self.table[self.table.case.isin(list(CLAIMED))].itertuples()
        ]
        effects = pd.DataFrame(rows, columns=list(claims.COLUMNS))
        write_table(self.folder / "tables" / "effects.csv", effects)
        self._show_verdict(effects.set_index("part"))

    def _show_verdict(self, effects: pd.DataFrame) -> None:
        """What claim 1 hangs on here, and what stands beside it."""
        (claim,) = claims.claims_of([1])
        own = [part for part in claim.parts if part.study == self.settings.study and part.decides]
        told = "; ".join(f"{part.name}: {part.verdict(effects.loc[part.name])}" for part in own)
        beside = ", ".join(f"`{path}`" for path in PATHS if path not in CLAIMED)
        self.report.section("What decides")
        self.report.text(
            f"Claim 1 wants RMSNorm the faster in each of these ({told}), and its loss equal, which the ablations judge; one part "
            f"that is refuted refutes it. {beside} has no vote: the rule names the ways that a run takes, this package's own, "
            "torch's function behind it and the compiler's. Single operations only show what those save."
        )
        self.findings.append(f"By the rule of claim 1: {told}. {beside} has no vote.")

    def _row(self, case: str) -> dict:
        own = self.times[self.times.case == case]
        ratios = np.log(own.pivot(index="sitting", columns="round", values="ratio").to_numpy(float))
        effect, draws = median_ratio(ratios)
        told = claims.drawn_row(case, effect, draws)
        return {
            "case": case, **{norm: own[norm].median() for norm in NORMS},
            **{name: told[name] for name in ("effect", "low", "high", "low_90", "high_90")}, "rounds": ratios.size,
        }  # fmt: skip

    def _show(self, name: str, table: pd.DataFrame, caption: str) -> None:
        times = {f"{norm}_ms": table[norm] * 1e3 for norm in NORMS}
        self.report.table(
            table.assign(**times), name, caption, case="", **dict.fromkeys(times, ".3f"), effect="+.1%", low="+.1%",
            high="+.1%", rounds="d",
        )  # fmt: skip

    def _draw(self, axes: list) -> None:
        alone = self.table.case != WHOLE
        axes[1].axvline(1 - FASTER, linestyle="--", color=plots.COLOURS[1], linewidth=1.4)
        for ax, rows in zip(axes, (self.table[alone], self.table[~alone]), strict=True):
            self._draw_ratios(ax, rows)
        axes[0].set_title("norm alone")
        axes[1].set_title(WHOLE)
        axes[1].set_yticks([])

    def _draw_ratios(self, ax: object, rows: pd.DataFrame) -> None:
        ax.axvline(1, color=plots.GREY, linewidth=1)
        count = self.preset.sittings
        for i, row in enumerate(rows.itertuples()):
            own = self.times[self.times.case == row.case]
            lift = 0.5 * ((own["sitting"] + 0.5) / count - 0.5)
            colours = [plots.COLOURS[number % len(plots.COLOURS)] for number in own["sitting"]]
            ax.scatter(own.ratio, i + lift, s=14, c=colours, alpha=0.7, linewidths=0)
            ax.plot([1 + row.low, 1 + row.high], [i, i], color="black", linewidth=2.5, solid_capstyle="butt")
            ax.plot(1 + row.effect, i, "o", color="black", markerfacecolor="white", zorder=4)
        ax.set_yticks(range(len(rows)), rows.case)
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.grid(axis="y", visible=False)
        plots._log(ax, "x", "RMSNorm's time over LayerNorm's", plots._plain)
        ratios = self.times.ratio[self.times.case.isin(rows.case)]
        low, high = min(1 - FASTER, ratios.quantile(0.01)), max(1, ratios.quantile(0.99))
        room = (high / low) ** 0.5  # an interval of few sittings may run far out of the picture
        ax.set_xlim(max(ax.get_xlim()[0], low / room), min(ax.get_xlim()[1], high * room))

    def end(self) -> None:
        """How it was made, and the report's first lines."""
        machine, packages = self.sittings[0]["machine"], self.sittings[0]["machine"]["packages"]
        days = sorted({sitting["started"][:10] for sitting in self.sittings})
        others = [sitting["others"] for sitting in self.sittings if sitting["others"] is not None]
        reasons = list(dict.fromkeys(reason for sitting in self.sittings for reason in sitting["busy"]))
        self.report.section("How this was made")
        if reasons:
            told = "\n".join(f"- {reason}" for reason in reasons)
            self.report.text(f"**Not to be relied on**, since the machine was busy when measuring began:\n\n{told}")
        self.report.text(
            f"Timed on {' and '.join(days)}, in {duration(sum(sitting['seconds'] for sitting in self.sittings))}, on "
            f"{machine['cpu']} ({machine['cores']} cores, one used; {machine['system']}), torch {packages['torch']}"
            + (f"; other processes used {max(others):.1%} of the cores at most" if others else "")
            + f". Every turn is in [{TIMINGS}]({TIMINGS}). Drawn again from it, or timed in an empty folder: "
            f"`tinylm study {self.settings.study} --preset {self.settings.preset} --results-dir FOLDER`."
        )
        if reasons:
            self.findings.append("Timed on a busy machine: not to be relied on.")
        self.report.summary("\n".join(f"- {line}" for line in self.findings))
        path = self.report.write()
        if self.folder.parent == repository() / "results":
            contents.write(self.folder.parent)
        print(f"report: {within_repository(path)}")


def times_of(sittings: list[dict]) -> pd.DataFrame:
    """One row a round: case, sitting, round, seconds of either norm, and ratio of RMSNorm's to LayerNorm's."""
    turns = pd.concat([pd.DataFrame(one["turns"]).assign(sitting=number) for number, one in enumerate(sittings)])
    table = turns.pivot(index=["case", "sitting", "round"], columns="norm", values="seconds").reset_index()
    return table.rename_axis(columns=None).assign(ratio=table.rmsnorm / table.layernorm)


def median_ratio(logs: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, np.ndarray]:
    """The median of ratios less one, and draws of it (draws,). logs: of the ratios, (sittings, rounds).

    A draw takes sittings with replacement, and rounds within each; draws are stretched about the effect by ``stretch_of``.
    """
    count, rounds = logs.shape
    rng = np.random.default_rng(seed)
    sittings = rng.integers(count, size=(draws, count, 1))
    found = np.median(logs[sittings, rng.integers(rounds, size=(draws, count, rounds))], axis=(1, 2))
    middle = float(np.median(logs))
    return math.expm1(middle), np.expm1(middle + stretch_of(count) * (found - middle))


def stretch_of(sittings: int) -> float:
    """How much wider draws of a few sittings must be for their 95 % interval to be one: resampling alone is too narrow, by
    sqrt((n - 1) / n) (Davison & Hinkley 1997, section 3.8) and for want of Student's quantile."""
    if sittings < 2:
        return 1.0
    return math.sqrt(sittings / (sittings - 1)) * stats.t.ppf(0.975, sittings - 1) / stats.norm.ppf(0.975)


if __name__ == "__main__":
    _serve()
