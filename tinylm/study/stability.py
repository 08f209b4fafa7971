"""Pre-norm against post-norm in what they bear, step by step: what studies/stability.ipynb narrates.

Models of several depths are trained with the norm before and after each part, with and without warmup, over a grid of
learning rates half an octave apart. Looked for is the largest rate at which no seed fails.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import pandas as pd

from tinylm import counts, files
from tinylm.config import NORM_POSITIONS
from tinylm.errors import LabError, TextError
from tinylm.study import claims, plots
from tinylm.study.parameters import StabilityParameters
from tinylm.study.report import interval, write_table
from tinylm.study.runs import Run, prepare_corpus, read_kept
from tinylm.study.sections import SectionStudy
from tinylm.study.steps import known_text
from tinylm.words import quantity

# ------------------------------------------------------------------------------------------------------------------ as data

WARMUPS = {"with warmup": {}, "without warmup": {"warmup_steps": 0}}  # what each changes in the recipe
POSITIONS = NORM_POSITIONS
WORSE = 0.5  # nats above the best rate of its depth and position: so far a run may end and still count as stable
STEP = 0.5  # octaves from rate to rate
WIDER = 2  # rates that a grid is widened by at a time
NAMES = {"pre": "pre-norm", "post": "post-norm"}


@dataclass(frozen=True)
class Preset:
    """How much a preset measures. depths: layers; shape: hidden_size and num_heads; windows: a step; steps: of a run; seeds: of
    each; grid: the first and the last rate of the grid that every depth and warmup starts with, in steps of half an octave
    below 1 (-10 is 2^-5); moves: how often a grid may be widened, at the side where a boundary is not inside; draws: of an
    interval; eval_tokens: of the last evaluation; evaluations: of a run, at each of which it may be found to diverge."""

    depths: tuple[int, ...] = (2, 4, 8, 16)
    shape: tuple[int, int] = (32, 4)
    windows: int = 1
    steps: int = 800
    seeds: int = 3
    grid: tuple[int, int] = (-16, -4)
    moves: int = 4
    draws: int = 2000
    eval_tokens: int = 16384
    evaluations: int = 10


PRESETS = {
    "smoke": Preset(
        (1, 2), (16, 2), steps=24, seeds=2, grid=(-5, 0), moves=1, draws=300, eval_tokens=1024, evaluations=4
    ),
    "quick": Preset((2, 8), seeds=2, steps=400),
    "full": Preset(),
}


@dataclass(frozen=True)
class Cell:
    """A depth (layers) and a warmup: both positions are tried on the same rates there."""

    depth: int
    warmup: str


def rate_of(place: int) -> float:
    """The learning rate at a place of the grid."""
    return 2.0 ** (STEP * place)


def begin(settings: StabilityParameters) -> Stability:
    """The study. Seals the rule of claim 2 before its first run. Raises TextError for a text that a run would have to read
    twice."""
    study = Stability(settings, PRESETS[settings.preset], known_text(settings))
    if (there := study.corpus["tokens"]["train"]) < study.tokens:
        raise TextError(
            f"The {settings.preset} preset of this study reads {study.tokens:,.0f} training tokens once",
            f"{there:,}",
            "choose a smaller preset or another text",
        )
    claims.seal(study.folder, settings.study)
    return study


# ---------------------------------------------------------------------------------------------------------------- the study


class Stability(SectionStudy):
    """The largest stable learning rate of pre-norm and of post-norm, and how often their runs fail."""

    title = "Pre-norm against post-norm: which learning rates they bear, on {text}"

    # The plan -------------------------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> float:
        """Training tokens of a run."""
        return float(self.preset.steps * self.preset.windows * self.recipe.seq_len)

    @property
    def cells(self) -> list[Cell]:
        return [Cell(depth, warmup) for warmup in WARMUPS for depth in self.preset.depths]

    @property
    def seeds(self) -> range:
        return range(self.settings.seed, self.settings.seed + self.preset.seeds)

    def model_of(self, depth: int, position: str):
        hidden, heads = self.preset.shape
        return self.recipe.model((hidden, depth, heads), self.settings.vocab_size, norm_position=position)

    def runs_of(self, cell: Cell, places: range) -> list[Run]:
        """Both positions and all seeds at the rates of these places."""
        runs = []
        for position in POSITIONS:
            model = self.model_of(cell.depth, position)
            tags = {"warmup": cell.warmup, "family": "grid", "budget": 0}
            for place in places:
                for seed in self.seeds:
                    train = self.recipe.train(
                        model, self.tokens, float(f"{rate_of(place):.6g}"), seed, batch_size=self.preset.windows,
                        eval_tokens=self.preset.eval_tokens, eval_interval=max(1, self.preset.steps // self.preset.evaluations),
                        precision="fp32", **WARMUPS[cell.warmup],
                    )  # fmt: skip
                    runs.append(Run(model, train, self.data, {**tags, "place": place}))
        return runs

    def stages(self, train: Callable[..., pd.DataFrame]) -> list[pd.DataFrame]:
        """The grid; then, while a boundary lies outside it, the grid of that depth and warmup wider, for both positions."""
        first, last = self.preset.grid
        self.grids = {cell: range(first, last + 1) for cell in self.cells}
        for move in range(self.preset.moves + 1):
            frame = train([run for cell, grid in self.grids.items() for run in self.runs_of(cell, grid)])
            wider = {cell: self._widened(frame, cell) for cell in self.cells}
            if wider == self.grids or move == self.preset.moves:
                break
            self.grids = wider
        return [frame]

    def _widened(self, frame: pd.DataFrame, cell: Cell) -> range:
        """The grid of a cell, wider where one of its positions is stable at the top, stable nowhere, or best at the bottom."""
        grid = self.grids[cell]
        found = [arm_of(self.losses(frame, cell, position)) for position in POSITIONS]
        below = any(arm.last < 0 or arm.best == 0 for arm in found)
        above = any(arm.last == len(grid) - 1 for arm in found)
        return range(grid.start - WIDER * below, grid.stop + WIDER * above)

    def expected_runs(self) -> list[Run]:
        return [
            run
            for cell in self.cells
            for run in self.runs_of(cell, range(self.preset.grid[0], self.preset.grid[1] + 1))
        ]

    def describe_grid(self) -> None:
        """What is trained, and what counts as stable."""
        preset = self.preset
        first, last = preset.grid
        hidden, heads = preset.shape
        train = self.runs_of(self.cells[0], range(first, first + 1))[0].train
        sizes = [counts.parameters(self.model_of(depth, "pre"))["total"] for depth in preset.depths]
        self.report.section("What is tried")
        self.report.text(
            f"Depths of {', '.join(map(str, preset.depths))} layers at hidden size {hidden} with {heads} heads "
            f"({quantity(min(sizes))} to {quantity(max(sizes))} parameters; pre-norm has one norm more, after the last block). The "
            f"recipe above, but that every run has {preset.steps} steps of {preset.windows} windows, "
            f"{self.tokens:,.0f} tokens in all, products in fp32, and either the warmup of the recipe, "
            f"{train.warmup_steps} steps here, or none. Gradients are "
            f"clipped at length {train.grad_clip:g}.\n\n"
            f"Rates lie half an octave apart, from {rate_of(first):.3g} to {rate_of(last):.3g} at first; {preset.seeds} seeds "
            "each. Where a boundary is not inside, the grid of that depth and warmup is widened for both positions alike, at most "
            f"{preset.moves} times.\n\nA run **diverges** where its loss or its gradient is not finite, or where after the warmup "
            "its training loss is 2 nats above a guess at random and above where it began. It **fails** where it diverges or ends "
            f"{WORSE} nats above the best rate of its depth, position and warmup (mean over seeds). A rate is **stable** where no "
            "seed fails."
        )

    # Judging --------------------------------------------------------------------------------------------------------------

    def losses(self, frame: pd.DataFrame, cell: Cell, position: str) -> pd.DataFrame:
        """Losses of a cell and position by place of the grid and seed, infinite where a run diverged."""
        own = frame[
            (frame.num_layers == cell.depth) & (frame.warmup == cell.warmup) & (frame.norm_position == position)
        ]
        return own.pivot(index="place", columns="seed", values="val_loss").fillna(math.inf).sort_index()

    @functools.cached_property
    def unigram(self) -> float:
        """Loss (nats per token) of a guess by how frequent each token is: what a run comes to that learns nothing else.
        Counted once for a results folder, on the first two million tokens of each part."""
        path = self.folder / "unigram.json"
        if not path.exists():
            corpus, size = prepare_corpus(self.expected_runs()[0]), self.settings.vocab_size
            seen, asked = (np.bincount(part[:2_000_000], minlength=size) for part in (corpus.train, corpus.val))
            loss = -float(asked @ np.log((seen + 1) / (seen + 1).sum()) / asked.sum())
            files.write_whole(path, json.dumps({"nats_per_token": loss}) + "\n")
        return read_kept(path, lambda kept: float(kept["nats_per_token"]))

    def measure(self) -> None:
        (self.frame,) = self.stages(self.train)
        if len(broken := self.frame[self.frame.status == "failed"]):
            raise LabError(
                "Every run of the grid must end, if only by diverging",
                f"{len(broken)} failed; the first: {broken.reason.iloc[0]}",
                "start the study again: what failed is tried again",
            )
        self.by_arm = {
            (cell, p): self.losses(self.frame, cell, p).to_numpy(float) for cell in self.cells for p in POSITIONS
        }
        self.arms = pd.DataFrame([self._row(cell, position) for cell in self.cells for position in POSITIONS])

    def _row(self, cell: Cell, position: str) -> dict:
        losses, grid = self.by_arm[cell, position], self.grids[cell]
        arm, start = arm_of(losses), grid.start
        failed, diverged = ~steady(losses), ~np.isfinite(losses)
        edge = "above" if arm.last == len(grid) - 1 else "below" if arm.last < 0 else ""
        seeds = [arm_of(losses[:, [i]]).last for i in range(losses.shape[1])]
        return {
            "warmup": cell.warmup, "depth": cell.depth, "position": NAMES[position],
            "stable_rate": rate_of(start + arm.last) if arm.last >= 0 else math.nan, "edge": edge,
            "least_seed": rate_of(start + min(seeds)), "most_seed": rate_of(start + max(seeds)),
            "best_rate": rate_of(start + arm.best) if math.isfinite(arm.loss) else math.nan,
            "best_loss": arm.loss if math.isfinite(arm.loss) else math.nan,
            "learns": arm.loss < self.unigram - WORSE,
            "gap": bool(failed.any(axis=1)[: max(0, arm.last)].any()),
            "runs": losses.size, "diverged": diverged.mean(), "failed": failed.mean(),
        }  # fmt: skip

    def octaves(self, cell: Cell, picks: np.ndarray | slice = slice(None)) -> float:
        """log2 of pre-norm's largest stable rate over post-norm's in a cell, by the seeds picked. Where none is stable, it lies
        a step below the grid."""
        pre, post = (arm_of(self.by_arm[cell, position][:, picks]).last for position in POSITIONS)
        return STEP * (pre - post)

    def mean_octaves(self, warmup: str, depths: Collection[int] | None = None) -> tuple[float, np.ndarray]:
        """The mean of ``octaves`` over depths (all of them, unless some are named), and draws of it (R,).

        A draw takes depths with replacement and seeds within each; and as a boundary is only known to half an octave, it lies
        anywhere between the last stable rate and the next. The draws are moved to the effect, since a resample has fewer
        seeds that could fail, and stretched by sqrt(n / (n - 1)) for few clusters (Davison & Hinkley 1997, section 3.8). The
        depths are those of the rule and no draw from many: resampling them errs on the safe side.
        """
        own = [cell for cell in self.cells if cell.warmup == warmup and (depths is None or cell.depth in depths)]
        effect = float(np.mean([self.octaves(cell) for cell in own]))
        rng, count, seeds = np.random.default_rng(self.settings.seed), len(own), self.preset.seeds
        found = np.array(
            [
                np.mean(
                    [self.octaves(own[i], rng.integers(seeds, size=seeds)) for i in rng.integers(count, size=count)]
                )
                for _ in range(self.preset.draws)
            ]
        )
        found += STEP * (rng.random((self.preset.draws, count)) - rng.random((self.preset.draws, count))).mean(axis=1)
        return effect, effect + _stretch(count) * (found - found.mean())

    def share_diverged(self) -> tuple[float, np.ndarray]:
        """Share of post-norm's runs that diverge less pre-norm's, over the same rates, depths, warmups and seeds, and draws of it
        (R,): depths with replacement, each with both its warmups, and seeds within each."""
        tables = {
            cell: np.subtract(*(~np.isfinite(self.by_arm[cell, position]) for position in POSITIONS[::-1]), dtype=float)
            for cell in self.cells
        }
        effect = float(np.concatenate([table.ravel() for table in tables.values()]).mean())
        rng, depths, seeds = np.random.default_rng(self.settings.seed), self.preset.depths, self.preset.seeds
        found = []
        for _ in range(self.preset.draws):
            parts = []
            for depth in rng.choice(depths, len(depths)):
                picks = rng.integers(seeds, size=seeds)
                parts += [tables[Cell(int(depth), warmup)][:, picks].ravel() for warmup in WARMUPS]
            found.append(np.concatenate(parts).mean())
        found = np.array(found)
        return effect, effect + _stretch(len(depths)) * (found - found.mean())

    # Telling --------------------------------------------------------------------------------------------------------------

    def show_losses(self) -> None:
        """Loss against rate, by depth."""
        self.report.section("Loss against rate")
        self.report.figure(
            "losses", "Validation loss against learning rate by depth: mean over the seeds that ended, bars from the least to the "
            "most of them; crosses at the top: rates at which a seed diverged; ring: the largest stable rate; dotted: a guess by "
            "how frequent each token is",
            self._draw_losses, size=(13.0, 3.9), panels=len(WARMUPS) * len(POSITIONS),
        )  # fmt: skip
        best = self.arms.pivot_table(index=["warmup", "depth"], columns="position", values="best_loss")
        if {*NAMES.values()} <= set(best.columns) and len(gap := (best["post-norm"] - best["pre-norm"]).dropna()):
            self.report.text(
                f"At the best rate of each, post-norm ends {gap.min():+.3f} to {gap.max():+.3f} nats from pre-norm (mean "
                f"{gap.mean():+.3f} over {len(gap)} depths and warmups)."
            )

    def _draw_losses(self, axes: list) -> None:
        ends = np.concatenate([losses[np.isfinite(losses)] for losses in self.by_arm.values()])
        low, high = ends.min() - 0.15, min(ends.max(), self.unigram + 1.0) + 0.15
        top = high + 0.08 * (high - low)  # above it the crosses
        for ax, (warmup, position) in zip(axes, [(w, p) for w in WARMUPS for p in POSITIONS], strict=True):
            for i, depth in enumerate(self.preset.depths):
                cell, colour = Cell(depth, warmup), plots.COLOURS[i % len(plots.COLOURS)]
                losses, rates = self.by_arm[cell, position], np.array([rate_of(place) for place in self.grids[cell]])
                ended = pd.DataFrame(losses).replace(math.inf, math.nan)
                ax.plot(rates, ended.mean(axis=1), "o-", color=colour, markersize=3.5, linewidth=1.2, label=f"{depth}")
                ax.vlines(rates, ended.min(axis=1), ended.max(axis=1), color=colour, linewidth=1)
                lost = rates[ended.isna().any(axis=1)]
                ax.plot(lost, np.full(len(lost), top + 0.04 * i * (high - low)), "x", color=colour, markersize=4)
                if (last := arm_of(losses).last) >= 0:
                    ax.plot(
                        rates[last], ended.mean(axis=1)[last], "o", color=colour, markersize=10, markerfacecolor="none", zorder=4
                    )  # fmt: skip
            plots._log(ax, "x", plots.RATE, plots._plain_or_power)
            ax.set_ylim(low, top + 0.04 * len(self.preset.depths) * (high - low))
            ax.set_title(f"{NAMES[position]}, {warmup}")
            if self.unigram > low:
                ax.axhline(self.unigram, color=plots.GREY, linewidth=1, linestyle=":")
        axes[0].set_ylabel(plots.LOSS)
        plots._legend_beside(axes[-1], "layers")

    def show_boundaries(self) -> None:
        """The largest stable rate of each depth, position and warmup, and what the claim asks of them."""
        self.effects = {warmup: claims.drawn_row(warmup, *self.mean_octaves(warmup)) for warmup in WARMUPS}
        outside, idle = int((self.arms.edge != "").sum()), int((~self.arms.learns).sum())
        self.report.section("The largest stable rate")
        self.report.text(
            f"Of {len(self.arms)} boundaries {len(self.arms) - outside} lie inside their grids"
            + (f"; {outside} are only known to lie beyond an end of it (`edge`)" if outside else "")
            + ". `gap` says that a smaller rate fails all the same. Seeds taken alone have their boundary between `least seed` and "
            f"`most seed`.\n\nA guess by how frequent each token is loses {self.unigram:.3f} nats. A model that is not {WORSE} "
            "nats better at its best rate (`learns`: no) has nothing to lose by a larger one, so that only "
            "divergence bounds its rates: "
            f"{'none here' if not idle else f'{idle} of {len(self.arms)} here, whose boundaries say little'}."
        )
        self.report.table(
            self.arms, "boundaries", "Each depth, position and warmup: the largest stable rate, that of single seeds, the best "
            "rate and its loss (nats per token), and the shares of runs that diverged and that failed", warmup="", depth="d",
            position="", stable_rate=".3g", edge="", least_seed=".3g", most_seed=".3g", best_rate=".3g", best_loss=".3f", learns="",
            gap="", runs="d", diverged=".0%", failed=".0%",
        )  # fmt: skip
        self.report.figure(
            "boundaries", "The largest stable rate against depth; an arrow where it lies beyond the grid; hollow and off the line "
            "where the model does not learn, so that only divergence bounds its rate", self._draw_boundaries, size=(9.0, 3.6),
            panels=len(WARMUPS),
        )  # fmt: skip
        rows = [
            {
                "warmup": cell.warmup,
                "depth": str(cell.depth),
                "octaves": self.octaves(cell),
                "low": math.nan,
                "high": math.nan,
            }
            for cell in self.cells
        ]
        both = self._where_both_learn()
        rows += [
            {"warmup": name, "depth": depth, "octaves": row["effect"], "low": row["low"], "high": row["high"]}
            for depth, means in (("mean where both learn", both), ("mean", self.effects))
            for name, row in means.items()
        ]
        self.report.table(
            pd.DataFrame(rows), "octaves", "Octaves by which pre-norm's largest stable rate lies above post-norm's, and their "
            "means with 95 % intervals over depths, seeds and the step of the grid; the mean over all depths is what claim 2 is "
            "judged by", warmup="", depth="", octaves="+.2f", low="+.2f", high="+.2f",
        )  # fmt: skip
        self._tell_octaves(both)

    def _where_both_learn(self) -> dict[str, dict]:
        """The mean of ``octaves`` over the depths at which both positions learn, by warmup: none where all do, and the mean
        over all depths is the same. A model that learns nothing has nothing to lose by any rate; claim 2 counts it all the
        same."""
        found = {}
        for warmup in WARMUPS if not self.arms.learns.all() else ():
            learn = self.arms[self.arms.warmup == warmup].groupby("depth").learns.all()
            if depths := set(learn.index[learn]):
                row = claims.drawn_row(warmup, *self.mean_octaves(warmup, depths))
                found[warmup] = {**row, "depths": len(depths)}
        return found

    def _tell_octaves(self, both: dict[str, dict]) -> None:
        """The means in words: where both learn first, since one that learns nothing can turn the other about."""

        def words(means: dict[str, dict]) -> str:
            return "; ".join(
                f"{name} {row['effect']:+.2f} octaves ({interval(row['low'], row['high'], '+.2f')}"
                + (f"; {row['depths']} of {len(self.preset.depths)} depths)" if means is both else ")")
                for name, row in means.items()
            )

        idle = self.arms[~self.arms.learns]
        above = "How far pre-norm's largest stable rate lies above post-norm's"
        if both:
            self.findings.append(f"{above}, at the depths where both learn: {words(both)}.")
        told = f"{above}, over all {len(self.preset.depths)} depths, as claim 2 asks: {words(self.effects)}."
        if len(idle):
            named = ", ".join(f"{row.position} at {row.depth} layers {row.warmup}" for row in idle.itertuples())
            told += (
                f" {len(idle)} of {len(self.arms)} boundaries in it say little, since no rate learns much more than how frequent "
                f"each token is: {named}."
            )
        self.findings.append(told)

    def _draw_boundaries(self, axes: list) -> None:
        for ax, warmup in zip(axes, WARMUPS, strict=True):
            for j, position in enumerate(NAMES.values()):
                own = self.arms[(self.arms.warmup == warmup) & (self.arms.position == position)]
                colour, marker = plots.COLOURS[j], plots.MARKERS[j]
                depth = own.depth.to_numpy(float) * 1.03 ** (2 * j - 1)
                learns = own.learns.to_numpy()
                ax.plot(depth[learns], own.stable_rate[learns], f"{marker}-", color=colour, label=position)
                ax.plot(depth[~learns], own.stable_rate[~learns], marker, color=colour, markerfacecolor="white")
                ax.vlines(depth, own.least_seed, own.most_seed, color=colour, linewidth=4, alpha=0.25)
                for x, row in zip(depth, own.itertuples(), strict=True):
                    if row.edge:
                        y = (
                            row.stable_rate
                            if row.edge == "above"
                            else rate_of(self.grids[Cell(row.depth, warmup)].start)
                        )
                        ax.plot(x, y, "^" if row.edge == "above" else "v", color=colour, markersize=11)
            plots._log(ax, "x", "layers", plots._plain)
            ax.set_xticks(list(self.preset.depths), [str(depth) for depth in self.preset.depths])
            ax.minorticks_off()
            plots._log(ax, "y", "largest stable learning rate", plots._plain_or_power)
            ax.set_title(warmup)
        low, high = min(ax.get_ylim()[0] for ax in axes), max(ax.get_ylim()[1] for ax in axes)
        for ax in axes:
            ax.set_ylim(low, high)
        axes[1].set_ylabel("")
        plots._legend_beside(axes[-1], "")

    def show_failures(self) -> None:
        """How many runs diverge, and how many fail."""
        effect, draws = self.share_diverged()
        row = claims.drawn_row("share of diverged runs", effect, draws)
        total = self.arms.assign(lost=self.arms.diverged * self.arms.runs, bad=self.arms.failed * self.arms.runs)
        sums = total.groupby("position")[["runs", "lost", "bad"]].sum()
        said = ", ".join(
            f"{sums.lost[name] / sums.runs[name]:.1%} of {name}'s runs diverge and {sums.bad[name] / sums.runs[name]:.1%} fail"
            for name in NAMES.values()
        )
        if row["low"] <= 0 <= row["high"]:
            told = "The shares that diverge cannot be told apart"
        else:
            told = f"The share that diverges is {'larger' if effect > 0 else 'smaller'} for post-norm"
        told += f": post-norm's less pre-norm's is {effect:+.1%} (95 % interval {interval(row['low'], row['high'], '+.1%')})."
        self.report.section("How many runs fail")
        self.report.text(
            f"Over the same rates, depths, warmups and seeds for both, {sums.runs.iloc[0]} runs each, {said}. {told}"
        )
        self.report.figure(
            "failures", "Shares of runs that fail: full, those that diverge; pale, those that end too high; hatched where the "
            "model does not learn, so that it has little to lose but by divergence", self._draw_failures, size=(9.0, 3.2),
            panels=len(WARMUPS),
        )  # fmt: skip
        self.findings.append(f"{said[0].upper()}{said[1:]}. {told}")
        self._write_effects({**row, "unit": "share"})

    def _draw_failures(self, axes: list) -> None:
        depths = self.preset.depths
        for ax, warmup in zip(axes, WARMUPS, strict=True):
            for j, position in enumerate(NAMES.values()):
                own = self.arms[(self.arms.warmup == warmup) & (self.arms.position == position)]
                x, colour = np.arange(len(depths)) + 0.2 * (2 * j - 1), plots.COLOURS[j]
                ax.bar(x, own.failed, 0.36, color=colour, alpha=0.3)
                ax.bar(x, own.diverged, 0.36, color=colour, label=position)
                for place, row in zip(x, own.itertuples(), strict=True):
                    if not row.learns:
                        ax.bar(place, row.failed, 0.36, color="none", edgecolor="white", hatch="////", linewidth=0)
                        ax.text(
                            place, row.failed, " does not learn", rotation=90, ha="center", va="bottom", color=colour,
                            fontsize=9, clip_on=True,
                        )  # fmt: skip
            ax.set_xticks(range(len(depths)), [str(depth) for depth in depths])
            ax.set_xlabel("layers")
            ax.set_title(warmup)
            ax.set_ylim(0, max(0.05, 1.1 * self.arms.failed.max()))
            ax.grid(axis="x", visible=False)
        axes[0].set_ylabel("share of runs")
        plots._legend_beside(axes[-1], "")

    def _write_effects(self, share: dict) -> None:
        """tables/effects.csv, which ``claims`` reads."""
        rest = {"seeds": self.preset.seeds}
        rows = [
            {**row, **rest, "part": f"largest stable rate, {warmup}{where}", "unit": "octaves",
             "runs": " ".join(self.frame.run_id[self.frame.warmup == warmup])}
            for where, means in (("", self.effects), (", where both learn", self._where_both_learn()))
            for warmup, row in means.items()
        ]  # fmt: skip
        rows.append({**share, **rest, "runs": " ".join(self.frame.run_id)})
        effects = pd.DataFrame(rows, columns=list(claims.COLUMNS))
        write_table(self.folder / "tables" / "effects.csv", effects)

    def end(self) -> None:
        self.finish([self.frame], ("norm_position", "warmup"))


# ------------------------------------------------------------------------------------------------------------------ the rule


@dataclass(frozen=True)
class Arm:
    """last: the row of the largest stable rate, -1 where none is; best: the row of the lowest mean loss; loss: that mean."""

    last: int
    best: int
    loss: float


def steady(losses: np.ndarray) -> np.ndarray:
    """Which runs (rates, seeds) neither diverge (infinite) nor end ``WORSE`` nats above the best rate's mean over seeds."""
    return np.isfinite(losses) & (losses < losses.mean(axis=1).min() + WORSE)


def arm_of(losses: np.ndarray | pd.DataFrame) -> Arm:
    """What the rule says of losses (rates ascending, seeds): a rate is stable where all its seeds are ``steady``."""
    losses = np.asarray(losses, float)
    means = losses.mean(axis=1)
    stable = np.flatnonzero(steady(losses).all(axis=1))
    return Arm(int(stable[-1]) if len(stable) else -1, int(means.argmin()), float(means.min()))


def _stretch(clusters: int) -> float:
    return math.sqrt(clusters / (clusters - 1)) if clusters > 1 else 1.0
