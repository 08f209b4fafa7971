"""Numerics, step by step: what studies/numerics.ipynb narrates.

In how many bits products are taken, how large weights start at each width, how sharply attention looks and what a norm adds
before its root: each is changed alone, over a wider range than the map of hyperparameters gives it, at fixed FLOPs and with the
same seeds. Loss and failures, speed and memory stand side by side.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from tinylm import backend, files
from tinylm.config import TrainConfig
from tinylm.errors import TextError
from tinylm.study import contrasts, plots
from tinylm.study.hyperparameters import BASELINE, FOLLOWS, OneAtATime, Setting, Times, small_place, turned
from tinylm.study.parameters import NumericsParameters
from tinylm.study.report import interval, write_table
from tinylm.study.runs import Run, prepare_corpus, read_kept
from tinylm.study.steps import known_text

# ------------------------------------------------------------------------------------------------------------------ as data

UNSCALED = "fp16 without loss scaling"
PRECISIONS = {  # name -> fields of TrainConfig
    **{name: {"precision": name} for name in ("fp32", "bf16", "fp16")},
    UNSCALED: {"precision": "fp16", "loss_scaling": False},
}
RATES = (1.0, 4.0, 16.0)  # over the baseline's: failures show where steps are large
WIDTHS = (1 / 3, 1.0, 3.0)  # over the baseline's
INITS = ("fixed", "scaled")
STARTS = (0.005, 0.02, 0.08)  # init_std
SCALES = (1 / 8, 1 / 2, 2.0, 8.0)  # of attention, over one by the root of a head's channels
EPSILONS = (1e-8, 1e-4, 1e-2, 1.0)  # of the norms; 1e-6 is the baseline's
SMALLEST_FP16 = 2.0**-24  # what is smaller than half of it becomes zero in fp16


def changes() -> dict[tuple[str, str], dict]:
    """All that is tried beside the baseline: (part, value) -> fields of the configs."""
    found: dict[tuple[str, str], dict] = {}
    for factor in RATES:
        for name, fields in PRECISIONS.items():
            found["precision", f"{name}, rate x {factor:g}"] = {**fields, "learning_rate": Times(factor)}
    for width in WIDTHS:
        for init in INITS:
            for std in STARTS:
                about = {"hidden_size": Times(width), "init": init, "init_std": std, "learning_rate": FOLLOWS}
                found["initialisation", f"width x {width:.3g}, {init} {std:g}"] = about
    found |= {("attention_scale", f"x {factor:g}"): {"attention_scale": Times(factor)} for factor in SCALES}
    return found | {("norm_eps", f"{eps:g}"): {"norm_eps": eps} for eps in EPSILONS}


@dataclass(frozen=True)
class Preset:
    """How much a preset measures. shape, flops: of the baseline; wide: a shape whose speed is measured too; parts: which of the
    changes it tries; the rest as in ``hyperparameters``."""

    shape: tuple[int, int, int]
    flops: float
    wide: tuple[int, int, int] = (256, 4, 8)
    seeds: int = 3
    moves: int = 2
    eval_tokens: int = TrainConfig.eval_tokens
    clock: float = 0.9
    widths: tuple[float, ...] = WIDTHS
    rates: tuple[float, ...] = RATES


PRESETS = {
    "smoke": Preset(
        *small_place("smoke"),
        wide=(48, 2, 6),
        seeds=2,
        moves=0,
        eval_tokens=4096,
        clock=0.03,
        widths=(1.0,),
        rates=(1.0, 16.0),
    ),
    "quick": Preset(*small_place("quick"), moves=1, clock=0.3, rates=(1.0, 16.0)),
    "full": Preset(*small_place("full")),
}


def begin(settings: NumericsParameters) -> Numerics:
    """The study. Raises TextError for a text that the runs would have to read twice."""
    study = Numerics(settings, PRESETS[settings.preset], known_text(settings))
    most = max(run.train.max_steps * run.train.windows_per_step * study.recipe.seq_len for run in study.expected_runs())
    if (there := study.corpus["tokens"]["train"]) < most:
        raise TextError(
            f"The {settings.preset} preset of this study reads {most:,} training tokens once", f"{there:,}",
            "choose a smaller preset or another text; `tinylm study quickstart` takes small texts",
        )  # fmt: skip
    return study


class Numerics(OneAtATime):
    """What the arithmetic does to a small model."""

    title = "What the arithmetic does on {text}"

    # The plan -------------------------------------------------------------------------------------------------------------

    def settings_at(self, rate: float) -> list[Setting]:
        base = self.baseline(rate)
        found = [base]
        for (part, value), change in changes().items():
            width, factor = change.get("hidden_size"), change.get("learning_rate")
            if width is not None and width.factor not in self.preset.widths:
                continue
            if part == "precision" and factor.factor not in self.preset.rates:
                continue
            setting = turned(base, part, change, self.preset.flops)
            found.append(dataclasses.replace(setting, value=value))
        return found

    def expected_runs(self) -> list[Run]:
        rates = self.guesses()
        seeded = [self.run_of(setting, seed) for setting in self.settings_at(rates[1]) for seed in self.seeds()]
        return [*self.rates_of(self.preset.flops, rates), *seeded]

    def stages(self, train: Callable[..., pd.DataFrame]) -> list[pd.DataFrame]:
        tuned = self.tune_rate(train)
        self.settings_tried = self.settings_at(self.rate)
        runs = [self.run_of(setting, seed) for setting in self.settings_tried for seed in self.seeds()]
        first = self.seeds()[0]
        return [tuned, train(runs, keep_models=lambda run: run.tags["knob"] == BASELINE and run.train.seed == first)]

    def measure(self) -> None:
        self.tuned, self.measured = self.stages(self.train)
        self.show_rate()

    def losses(self, part: str) -> dict[str, pd.Series]:
        """The losses of a part's values, by seed; NaN where a seed diverged."""
        own = self.measured[(self.measured.knob == part) & (self.measured.status != "failed")]
        return {value: rows.set_index("seed").val_loss for value, rows in own.groupby("value", sort=False)}

    def compared(self, losses: dict[str, pd.Series], base: str) -> pd.DataFrame:
        """A row a value: seeds, how many failed, loss, and the difference to ``base`` with its 95 % interval and verdict."""
        table = pd.DataFrame(
            [{"variant": name, "runs": len(own), "failed": own.isna().mean(), "loss": own.mean()} for name, own in losses.items()]
        )  # fmt: skip
        others = [name for name in losses if name != base]
        columns = ["variant", "difference", "low", "high", "verdict"]
        if not (losses[base].notna().sum() > 1 and any(losses[name].notna().sum() > 1 for name in others)):
            return table.assign(**dict.fromkeys(columns[1:4], math.nan), verdict="–")
        told = contrasts.effects(losses, base, others, pool=False)[columns]  # fp16 or a poor start may spread tenfold
        table = table.merge(told, on="variant", how="left")
        return table.assign(verdict=table.verdict.fillna("–").where(table.failed == 0, "diverges"))

    # Telling --------------------------------------------------------------------------------------------------------------

    def show_noise(self) -> None:
        self.noise = self.measured[self.measured.knob == BASELINE].assign(place=BASELINE)
        super().show_noise()

    def show_precision(self) -> None:
        """Loss, failures, speed and memory in 32 and in 16 bits, with and without a loss scale."""
        losses = self.losses("precision")
        parts = []
        for factor in self.preset.rates:
            own = {f"{name}, rate x {factor:g}": losses[f"{name}, rate x {factor:g}"] for name in PRECISIONS}
            told = self.compared(own, f"fp32, rate x {factor:g}")
            parts.append(told.assign(precision=list(PRECISIONS), factor=factor))
        table = pd.concat(parts, ignore_index=True)
        self.report.section("Precision")
        self.report.text(
            "Matrix products are taken in the precision named; weights, the residual stream, norms, softmax and loss stay in 32 "
            "bits (fp16 by torch's autocast, which decides that itself). Under fp16 the trainer scales the loss by a power of two "
            "that halves at an overflow and doubles after 2,000 good steps (Micikevicius et al. 2018); `loss_scaling=False` keeps "
            f"it at 1. Each has {self.preset.seeds} seeds at the baseline's learning rate and at multiples of it, where steps are "
            "large enough to fail. Differences are to fp32 at the same rate."
        )
        formats = {
            "variant": "", "runs": "d", "failed": ".0%", "loss": ".3f", "difference": "+.4f", "low": "+.4f", "high": "+.4f",
            "verdict": "",
        }  # fmt: skip
        self.report.table(
            table, "precision", "Loss (nats per token, of runs that ended), the share of runs that diverged, and the difference to "
            "fp32 at the same rate with its 95 % interval", **formats,
        )  # fmt: skip
        self.report.figure(
            "precision", "Differences to fp32 at the same learning rate with 95 % intervals; a cross where every seed diverged, "
            "nothing where too few ended to compare",
            lambda ax: _draw_precisions(table, ax), size=(7.4, 3.8),
        )  # fmt: skip
        self.report.table(
            self._costs(), "costs", "Training steps a second over fp32's, and bytes that a forward pass keeps for the backward one "
            "over fp32's (weights, gradients and moments are 16 bytes a parameter in all three), at the baseline's shape and a "
            "wider one; the loss scale, a factor on one number, is not timed apart", shape="", precision="", speed=".2f",
            kept_bytes=",.0f", memory=".2f",
        )  # fmt: skip
        self.report.text(f"Speed: {self.clock_words()}.")
        self._show_underflow()
        plain = table[table.factor == 1].set_index("precision")
        for name, row in plain.drop(index="fp32").iterrows():
            at = f"{interval(row.low, row.high, '+.4f')}; {row.verdict}"
            told = f"change the loss by {row.difference:+.4f} nats ({at})"
            told = "cannot be compared, too few of their runs ended" if math.isnan(row.difference) else told
            self.findings.append(f"Products in {name} {told}.")
        runs = table.assign(lost=table.failed * table.runs).groupby("precision", sort=False)[["lost", "runs"]].sum()
        lost = [f"{row.Index} {row.lost:.0f} of {row.runs}" for row in runs.itertuples()]
        self.findings.append(f"Diverged, of the runs at {len(self.preset.rates)} learning rates: {', '.join(lost)}.")

    def _costs(self) -> pd.DataFrame:
        shapes = [self.preset.shape, self.preset.wide]
        base = self.baseline(self.rate)
        names = dict.fromkeys(fields["precision"] for fields in PRECISIONS.values())
        settings = {
            (shape, name): dataclasses.replace(
                base, model=self.model(shape), train=base.train.replace(precision=name), value=f"{shape} {name}"
            )
            for shape in shapes for name in names
        }  # fmt: skip
        seconds = self.step_seconds(settings.values())
        kept = self._kept_bytes(settings)
        rows = []
        for (shape, name), setting in settings.items():
            usual = settings[shape, "fp32"]
            rows.append(
                {"shape": f"{shape[0]} x {shape[1]}", "precision": name, "speed": seconds[usual] / seconds[setting],
                 "kept_bytes": kept[setting.value], "memory": kept[setting.value] / kept[usual.value]}
            )  # fmt: skip
        return pd.DataFrame(rows)

    def _kept_bytes(self, settings: dict[tuple, Setting]) -> dict[str, int]:
        """Bytes that one step's forward pass keeps for the backward one, counted once for a results folder."""
        path = self.folder / "tables" / "kept_bytes.json"
        known = (
            read_kept(path, lambda kept: {value: int(size) for value, size in kept.items()}) if path.exists() else {}
        )
        if set(known) != {setting.value for setting in settings.values()}:
            known = {setting.value: kept_for_backward(setting) for setting in settings.values()}
            files.write_whole(path, json.dumps(known) + "\n")
        return known

    def _show_underflow(self) -> None:
        """Why fp16 has a loss scale: what its gradients lose without one."""
        path = self.folder / "tables" / "underflow.csv"
        if not path.exists():
            run_id = self.measured[(self.measured.knob == BASELINE) & self.measured.val_loss.notna()].run_id.iloc[0]
            write_table(path, self._underflow(run_id))
        table = pd.read_csv(path)
        self.report.text(
            "Why fp16 has a loss scale is counted on gradients of one batch in fp32: the share of their entries, other than zero, "
            f"that fp16 takes for zero as they are, and times {backend.LOSS_SCALE:,.0f}, with which training begins; and the share "
            "that then overflows."
        )
        self.report.table(
            table, "underflow", "Entries of gradients that fp16 cannot hold, at the start and at the end of a run", when="",
            entries=",.0f", lost=".2%", lost_scaled=".2%", overflown_scaled=".2%",
        )  # fmt: skip
        end = table.iloc[-1]
        self.findings.append(
            f"Without a loss scale fp16 takes {end.lost:.1%} of a trained model's gradient entries for zero, with it "
            f"{end.lost_scaled:.1%}."
        )

    def _underflow(self, run_id: str) -> pd.DataFrame:
        import torch

        from tinylm.checkpoint import load_model
        from tinylm.model import TinyLM
        from tinylm.train import TextDataset

        base = self.baseline(self.rate)
        data = TextDataset.from_tokens(
            prepare_corpus(self.run_of(base, 0)).train, self.recipe.seq_len, self.recipe.seq_len
        )
        batch = data.batch(np.arange(min(len(data), 8 * base.train.batch_size)))
        trained, _, _ = load_model(self.folder / "models" / f"{run_id}.safetensors")
        rows = []
        for when, model in (("start", TinyLM(base.model, seed=self.seeds()[0])), ("end", trained)):
            model.loss(*batch).backward()
            sizes = torch.cat([p.grad.flatten().abs() for p in model.parameters()])
            sizes = sizes[sizes > 0].double()
            rows.append(
                {"when": when, "entries": len(sizes), "lost": float((sizes <= SMALLEST_FP16 / 2).double().mean()),
                 "lost_scaled": float((sizes * backend.LOSS_SCALE <= SMALLEST_FP16 / 2).double().mean()),
                 "overflown_scaled": float((sizes * backend.LOSS_SCALE >= 65520).double().mean())}
            )  # fmt: skip
        return pd.DataFrame(rows)

    def show_initialisation(self) -> None:
        """A fixed start against one that knows the width."""
        losses = self.losses("initialisation")
        usual = self.recipe.init
        parts = []
        for width in self.preset.widths:
            named = f"width x {width:.3g}, "
            own = {name: values for name, values in losses.items() if name.startswith(named)}
            told = self.compared(own, f"{named}{usual} 0.02")
            hidden = next(s.model.hidden_size for s in self.settings_tried if s.value.startswith(named))
            words = told.variant.str.removeprefix(named).str.split(" ", expand=True)
            parts.append(told.assign(hidden_size=hidden, init=words[0], init_std=words[1].astype(float)))
        table = pd.concat(parts, ignore_index=True)
        self.report.section("How large weights start, over width")
        self.report.text(
            "`fixed` draws every matrix at init_std; `scaled` at init_std times the root of 1024 over the inputs of a unit, so "
            "that narrow layers start larger. Widths are a third and three times of the baseline's, at equal FLOPs, the learning "
            f"rate following the size by the recipe's rule. Differences are to `{usual}` at 0.02 of the same width."
        )
        self.report.table(
            table, "initialisation", "Loss (nats per token) and the difference to the recipe's start at the same width with its "
            "95 % interval", hidden_size="d", init="", init_std="g", runs="d", failed=".0%", loss=".3f", difference="+.4f",
            low="+.4f", high="+.4f", verdict="",
        )  # fmt: skip
        self.report.figure(
            "initialisation", "Loss over init_std at each width: solid where the start knows the width, dashed where it is fixed",
            lambda ax: _draw_starts(table, ax), size=(6.8, 4.0),
        )  # fmt: skip
        worst = table.loc[table.difference.idxmax()]
        fixed = table[(table.init == "fixed") & (table.init_std == 0.02)]
        costs = ", ".join(
            f"{row.difference:+.3f} ({interval(row.low, row.high, '+.3f')}) at width {row.hidden_size}"
            for row in fixed.itertuples()
        )
        self.findings.append(f"A fixed init_std of 0.02 costs, against the start that knows the width (nats): {costs}.")
        self.findings.append(
            f"The worst start {'that ended ' if (table.failed == 1).any() else ''}is {worst.init} {worst.init_std:g} at width "
            f"{worst.hidden_size}: {worst.difference:+.3f} nats ({interval(worst.low, worst.high, '+.3f')}).{_lost(table)}"
        )

    def show_scales(self) -> None:
        """attention_scale and norm_eps."""
        base = self.measured[self.measured.knob == BASELINE].set_index("seed").val_loss
        tables = {
            part: self.compared({BASELINE: base, **self.losses(part)}, BASELINE)
            for part in ("attention_scale", "norm_eps")
        }
        model = self.baseline(self.rate).model.resolve()
        at = {"attention_scale": 1.0, "norm_eps": model.norm_eps}
        self.report.section("How sharply attention looks, and what norms add before the root")
        self.report.text(
            f"`attention_scale` multiplies the products of queries and keys: {model.attention_scale:.3g} in the baseline, one by "
            "the root of a head's channels. `norm_eps` is added to the mean square before the root is taken."
        )
        for part, table in tables.items():
            table["x"] = [at[part] if name == BASELINE else float(name.removeprefix("x ")) for name in table.variant]
            self.report.table(
                table.sort_values("x"), part, f"{part}: loss (nats per token) and the difference to the baseline with its "
                "95 % interval", variant="", runs="d", failed=".0%", loss=".3f", difference="+.4f", low="+.4f", high="+.4f",
                verdict="",
            )  # fmt: skip
            self.findings.append(_most(part, table))
        self.report.figure(
            "scales", "Differences to the baseline with 95 % intervals",
            lambda axes: [_draw_scale(part, table, ax) for (part, table), ax in zip(tables.items(), axes, strict=True)],
            size=(8.8, 3.4), panels=2,
        )  # fmt: skip

    def end(self) -> None:
        self.finish([self.tuned, self.measured], ("knob", "value"))


def _most(part: str, table: pd.DataFrame) -> str:
    """What changes the loss most, up or down, in words; and what no run bore."""
    known = table[table.difference.notna()]
    if known.empty:
        return f"{part}: no difference can be told.{_lost(table)}"
    most = known.loc[known.difference.abs().idxmax()]
    return (
        f"{part} at {most.variant} changes the loss by {most.difference:+.3f} nats "
        f"({interval(most.low, most.high, '+.3f')}), the most of those tried{' that ended' if _lost(table) else ''}.{_lost(table)}"
    )


def _lost(table: pd.DataFrame) -> str:
    names = table.variant[table.failed == 1]
    return f" Every run diverged at {', '.join(names)}." if len(names) else ""


def kept_for_backward(setting: Setting) -> int:
    """Bytes of the tensors that a training step's forward pass keeps for its backward pass, weights not counted."""
    import torch

    from tinylm.model import TinyLM

    arithmetic = backend.resolve(setting.train.replace(compile=False), setting.model)
    model = TinyLM(setting.model, seed=0)
    model.compute_with(backend.product_dtype(arithmetic), query_blocks=1)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(setting.train.batch_size, setting.model.max_seq_len, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), backend.autocast(arithmetic):
        loss = model.loss(ids, ids)
    del loss
    return sum(kept.values())


def _draw_precisions(table: pd.DataFrame, ax: object) -> None:
    rates = list(dict.fromkeys(table.factor))
    ax.axhline(0, color=plots.GREY, linewidth=1)
    for i, (name, rows) in enumerate(table[table.precision != "fp32"].groupby("precision", sort=False)):
        x = np.array([rates.index(factor) for factor in rows.factor]) + 0.18 * (i - 1)
        ax.vlines(x, rows.low, rows.high, color=plots.COLOURS[i], linewidth=2.5, alpha=0.5)
        ax.plot(x, rows.difference, plots.MARKERS[i], color=plots.COLOURS[i], label=name)
        gone = (rows.failed == 1).to_numpy()
        ax.plot(x[gone], np.full(gone.sum(), 0.96), "x", color=plots.COLOURS[i], transform=ax.get_xaxis_transform())
    ax.set_xticks(range(len(rates)), [f"x {factor:g}" for factor in rates])
    ax.set_xlim(-0.5, len(rates) - 0.5)
    ax.set_yscale("symlog", linthresh=0.01)  # steps that are too large spread a hundredfold
    most = float(np.nanmax(np.abs(table[["low", "high"]].to_numpy(float)), initial=0.01))
    ticks = [tick for tick in (0.01, 0.1, 1.0) if tick <= 2 * most]
    ax.set_yticks(
        [*(-tick for tick in reversed(ticks)), 0, *ticks],
        [*(f"-{t:g}" for t in reversed(ticks)), "0", *(f"+{t:g}" for t in ticks)],
    )
    ax.minorticks_off()
    ax.set_xlabel("learning rate over the baseline's")
    ax.set_ylabel("loss above fp32's (nats/token)")
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _draw_starts(table: pd.DataFrame, ax: object) -> None:
    for i, (hidden, rows) in enumerate(table.groupby("hidden_size")):
        for init, line in (("scaled", "-"), ("fixed", "--")):
            own = rows[rows.init == init].sort_values("init_std")
            label = f"width {hidden}" if init == "scaled" else None
            ax.plot(own.init_std, own.loss, line + plots.MARKERS[i], color=plots.COLOURS[i], label=label)
    ax.set_xscale("log")
    ax.set_xticks(STARTS, [f"{std:g}" for std in STARTS])
    ax.minorticks_off()
    ax.set_xlabel("init_std")
    ax.set_ylabel(plots.LOSS)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _draw_scale(part: str, table: pd.DataFrame, ax: object) -> None:
    table = table.sort_values("x")
    ax.axhline(0, color=plots.GREY, linewidth=1)
    ax.vlines(table.x, table.low, table.high, color=plots.COLOURS[0], linewidth=2.5, alpha=0.5)
    ax.plot(table.x, table.difference.fillna(0.0), "o", color=plots.COLOURS[0])
    ax.set_xscale("log")
    ax.set_xticks(table.x, [f"{x:g}" for x in table.x])
    ax.minorticks_off()
    ax.set_xlabel("attention_scale over the usual" if part == "attention_scale" else part)
    ax.set_ylabel("loss above the baseline's (nats/token)")
