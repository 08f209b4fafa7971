"""Read scaling laws off runs, make the field's mistakes on purpose, and plan a run for a budget."""

from __future__ import annotations

import html
import itertools
from dataclasses import dataclass, field
from pathlib import Path

import ipywidgets
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from tinylm import backend, counts, files
from tinylm.config import DataConfig
from tinylm.errors import LabError
from tinylm.study import doctor, mistakes, plots, runs
from tinylm.study.design import Recipe, isoflop_points
from tinylm.study.mistakes import MISTAKES, Reading
from tinylm.study.optima import LearningRateRule, learning_rate_rule
from tinylm.study.planner import FAR
from tinylm.study.runs import Run
from tinylm.study.tables import ROLES, read_runs
from tinylm.widgets.live import LiveRun, labs_folder
from tinylm.widgets.models import own_manual, study_folders
from tinylm.widgets.shared import LEFT, ORANGE, SMALL, Panel, beside, button, grid, knob, place, png
from tinylm.words import duration, quantity

SMALL_BUDGETS = (2e9, 6e9, 2e10)  # of the study that is trained where no runs are there at all
LEAST = 8  # points of different size or length that a surface can be told from


class NoRuns(LabError):
    """No study has left runs that a law can be read from."""


def laws_panel(source: object = None, columns: dict[str, str] | None = None) -> LawsPanel:
    """IsoFLOP curves, the surface, the doctor's words and a planned run, from runs.

    source: the name of a study, a results folder, a CSV file of runs or a DataFrame; None is the first study that is
    there, and where there is none a small one is trained (it says so). columns: role (params, tokens, loss, flops) ->
    column of a CSV file or DataFrame with other names than the lab's.
    """
    return place(LawsPanel, source, columns, same="laws" if source is None else str(source))


def load_runs(source: object = None, columns: dict[str, str] | None = None) -> tuple[pd.DataFrame, str]:
    """Runs as a table with the lab's names (and ``curve`` where they are known), and what they are, in words. Raises
    LabError where there are none, NoRuns where no study is named and none can be read."""
    if isinstance(source, pd.DataFrame):
        frame = source.rename(columns={name: ROLES.get(role, role) for role, name in (columns or {}).items()})
        return frame, _told(frame, f"{len(frame)} runs of a table")
    if source is None:
        passed = ""
        for folder in _with_a_law():
            try:
                frame, words = load_runs(folder)
                _enough(frame)
                return frame, words + passed
            except LabError as error:
                passed += f" Passed over: {folder.name}, since: {error}"
        raise NoRuns(
            "Some study must have been run", passed.strip() or "results/ holds none with a law", "run: make study"
        )
    if isinstance(source, str) and not Path(source).expanduser().exists() and (found := study_folders(source)):
        source = found[0]
    path = Path(source).expanduser()
    if path.is_dir():
        records = [runs.read_record(file) for file in sorted((path / "runs").glob("*.json"))]
        if not records:
            raise LabError("A results folder holds runs", f"{path} holds none", "give a study's results folder")
        frame = runs.table(records)
        frame["curve"] = [record["curve"] for record in records]
        if "variant" in frame:
            raise LabError(
                "A law needs runs that differ in size and length alone", f"{path.name} compares variants",
                "choose a study of compute, data or sizes",
            )  # fmt: skip
        return frame, _told(frame, f"{len(frame)} runs of {path.name}")
    roles = {role: ROLES[role] for role in ("params", "tokens", "loss")} | (columns or {})
    table = read_runs(path, roles, drop=["bad"])
    frame = table.frame.rename(columns={role: ROLES[role] for role in roles})
    for name in ("flops", "learning_rate", "params_non_embedding", "epochs", "seconds"):
        if name in frame:
            frame[name] = pd.to_numeric(frame[name], errors="coerce")
            if frame[name].isna().any():
                del frame[name]
    return frame, _told(frame, "; ".join(said for said in table.sentences() if not said.endswith(": 0 rows")))


def small_folder() -> Path:
    """Where the small study is recorded: a folder for each arithmetic, since runs of different ones share none, and nobody
    is asked here for another after an update of torch."""
    arithmetic = files.canonical_json([backend.NUMERICS_REVISION, backend.machine()])
    return labs_folder().with_name(f"labs-laws-{files.sha256_bytes(arithmetic.encode())[:8]}")


def _with_a_law() -> list[Path]:
    return [folder for folder in study_folders() if (folder / "tables" / "law.json").exists()]


def _told(frame: pd.DataFrame, words: str) -> str:
    """What runs are, with what of them no fit sees, and whether they were computed alike."""
    apart = int(mistakes.kept_apart(frame).sum())
    if apart:
        words += f", {apart} of which no fit sees: what a forecast or plan was held against, and other batches"
    revisions = runs.revisions_told(frame["numerics_revision"]) if "numerics_revision" in frame else ""
    return words.rstrip(".") + "." + (f" Mind: {revisions}" if revisions else "")


def _enough(frame: pd.DataFrame) -> pd.DataFrame:
    """The points of runs that a surface can be told from."""
    points = mistakes.points_of(frame)
    if len(points) < LEAST:
        raise LabError(f"A surface needs at least {LEAST} points of different size or length", f"{len(points)}")
    return points


@dataclass
class _Known:
    """Runs, and what was made of them already: kept together, so that no reading of other runs gets among them."""

    frame: pd.DataFrame
    rule: LearningRateRule | None
    readings: dict[tuple, Reading] = field(default_factory=dict)
    reports: dict[tuple, str] = field(default_factory=dict)

    def read(self, chosen: tuple[str, ...]) -> Reading:
        if chosen not in self.readings:
            self.readings[chosen] = mistakes.read(self.frame, chosen)
        return self.readings[chosen]

    def report(self, chosen: tuple[str, ...]) -> str:
        if chosen not in self.reports:
            self.reports[chosen] = doctor.diagnose(self.read(chosen).fit, bootstrap=200).report()
        return self.reports[chosen]


class LawsPanel(Panel):
    """What ``laws_panel`` gives. ``load(source)`` reads other runs; ``reading`` is what the pressed mistakes make of them."""

    def __init__(self, source: object = None, columns: dict[str, str] | None = None):
        super().__init__(same="laws" if source is None else str(source))
        self.honest: Reading | None = None
        self.reading: Reading | None = None
        self._known: _Known | None = None
        self._live: LiveRun | None = None
        self._is_taking = False
        names = [folder.name for folder in _with_a_law()]
        self.source = ipywidgets.Combobox(
            description="runs", options=list(dict.fromkeys(names)), placeholder="a study, a folder or a CSV file",
            style={"description_width": "60px"}, layout={"width": "420px", "max_width": "100%"},
        )  # fmt: skip
        self.columns = ipywidgets.Text(
            description="columns", placeholder="of a CSV: params=N, tokens=D, loss=L",
            style={"description_width": "60px"}, layout={"width": "420px", "max_width": "100%"},
        )  # fmt: skip
        self.load_button = button("Read", "folder-open", primary=True)
        self.stop_button = button("Stop", "stop", disabled=True)
        self.toggles = {
            name: ipywidgets.Checkbox(description=words, indent=False, layout={"width": "auto"})
            for name, words in MISTAKES.items()
        }
        self.budget = knob(
            ipywidgets.FloatLogSlider, "compute budget", "of the planned run", "FLOPs", 170,
            min=9, max=15, step=0.05, value=1e12, readout_format=".2g",
        )  # fmt: skip
        self.about, self.reasons, self.plan = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        self.words = ipywidgets.HTML()
        self.load_button.on_click(lambda _: self.load(self.source.value or None, _columns_of(self.columns.value)))
        self.stop_button.on_click(lambda _: self.stop())
        for control in (*self.toggles.values(), self.budget):
            control.observe(self._changed, "value")
        self.children = [
            beside(self.source, self.columns, self.load_button, self.stop_button),
            self.status,
            self.about,
            ipywidgets.HTML(f"<div style='{SMALL}'>Make a known mistake on these runs:</div>"),
            grid(list(self.toggles.values()), 380),
            self.reasons,
            self.budget,
            self.plan,
            self.shown_picture(),
            self.words,
        ]
        self.in_parts()
        self.load(source, columns)

    def load(self, source: object = None, columns: dict[str, str] | None = None) -> None:
        """Read other runs; where none are asked for and none are there, train a few small ones."""
        if self.is_running:
            return
        try:
            self._take(*load_runs(source, columns))
        except NoRuns as error:
            self.about.value = f"<div class='tinylm-about' style='{SMALL}'>{html.escape(str(error.got))}</div>"
            self.begin(self._train_small)
        except Exception as error:
            self._complain(error)

    def stop(self) -> None:
        super().stop()
        if self._live is not None:
            self._live.request_stop()

    @property
    def frame(self) -> pd.DataFrame | None:
        """The runs that are read, None where there are none yet."""
        return self._known.frame if self._known else None

    def _take(self, frame: pd.DataFrame, words: str) -> None:
        points = _enough(frame)  # raises where nothing is usable, before anything is replaced
        missing = mistakes.unavailable(frame)
        told = [f"not here: {MISTAKES[name]}, since {why}" for name, why in missing.items()]
        try:
            rule = learning_rate_rule(frame[~mistakes.kept_apart(frame)], by=("tokens_seen", "params_total"))
        except (LabError, KeyError):
            rule = None
        known = _Known(frame, rule)
        known.read(())  # a law that cannot be fitted is told before anything is replaced, too
        least, most = (float(np.log10(end)) for end in (points["flops"].min(), points["flops"].max()))
        self._is_taking = True  # the controls are brought to these runs, and the figure is drawn once
        try:
            for name, toggle in self.toggles.items():
                toggle.value = toggle.value and name not in missing
                toggle.disabled = name in missing
            self.budget.max = max(self.budget.max, most + 3)
            self.budget.min, self.budget.max = least, most + 3
            self.budget.value = 10 ** (most + 1)
        finally:
            self._is_taking = False
        self._known = known
        self.reasons.value = f"<div style='{SMALL};opacity:.75'>{'<br>'.join(map(html.escape, told))}</div>"
        self.about.value = f"<div class='tinylm-about' style='{SMALL}'>{html.escape(words)}</div>"
        self._say("")
        self._draw_picture(known)
        self.redraw()  # the doctor takes his time

    def _changed(self, _change: dict) -> None:
        if not self._is_taking:
            self.redraw()

    def ready(self, is_ready: bool) -> None:
        self.load_button.disabled, self.stop_button.disabled = not is_ready, is_ready

    def _train_small(self) -> str:
        """A study of a dozen tiny runs on Python's own manual, under results/local, for want of any other."""
        recipe, text = Recipe(), own_manual()
        points, folder = isoflop_points(recipe, 320, SMALL_BUDGETS, sizes=4), small_folder()
        done = []
        for number, point in enumerate(points, start=1):
            model = recipe.model(point.shape, 320)
            params = counts.parameters(model)["total"]
            train = recipe.train(model, point.tokens, recipe.learning_rate(params), eval_tokens=16384)
            run = Run(model, train, DataConfig(text), {"family": "isoflop", "budget": point.budget})
            self._live = live = LiveRun(run, folder)
            said = (
                f"No study has left runs to read a law from, so {len(points)} small ones are trained, for about half a "
                f"minute: {number}"
            )
            record = live.train(self.is_stopping, lambda _, said=said: self._progress(said), lambda: None)
            if record is None or record["status"] == "stopped" or self.is_stopping():
                return f"stopped after {len(done)} of {len(points)} small runs; those are kept"
            done.append(record)
        frame = runs.table(done)
        frame["curve"] = [record["curve"] for record in done]
        self._take(frame, f"{len(frame)} small runs on Python's own manual, trained here; a study would tell far more")
        return ""

    # Reading.

    @property
    def chosen(self) -> tuple[str, ...]:
        """The mistakes that are pressed."""
        return tuple(name for name, toggle in self.toggles.items() if toggle.value)

    def draw(self) -> None:
        known = self._known
        if known is None:
            return
        chosen = self._draw_picture(known)
        report = known.report(chosen)
        if known is not self._known:  # other runs have been read meanwhile
            return
        heading = "The doctor's words" + (f", with {len(chosen)} of the mistakes made" if chosen else "")
        if known.read(chosen).cost != (6.0, 1.0):
            heading += " (its <i>a</i> takes 6 N D for the compute, the figure's takes exact FLOPs)"
        self.words.value = (
            f"<details open style='{SMALL}'><summary>{heading}</summary><pre class='tinylm-doctor' "
            f"style='white-space:pre-wrap;word-break:normal;overflow-wrap:anywhere;font-size:12px'>{html.escape(report)}</pre></details>"
        )

    def _draw_picture(self, known: _Known) -> tuple[str, ...]:
        """The figure and the plan for what is pressed; returns which mistakes that was."""
        chosen = self.chosen
        steps = [known.read(chosen[:count]) for count in range(len(chosen) + 1)]
        plan = mistakes.planned(steps[0], steps[-1], self.budget.value)
        picture = png(lambda figure: _draw(figure, steps, plan), (10.5, 6.8), paper=True, dpi=95)
        with self._lock:
            if known is self._known:
                self.honest, self.reading = steps[0], steps[-1]
                self._tell_plan(plan, chosen, known)
                self.picture.value = picture
        return chosen

    def _tell_plan(self, plan: mistakes.Planned, chosen: tuple[str, ...], known: _Known) -> None:
        lines = [
            f"For {quantity(plan.flops)} FLOPs: <b>{quantity(plan.params)} parameters on {quantity(plan.tokens)} tokens</b>, "
            f"expected loss <b>{plan.loss:.3f}</b> [{plan.low:.3f}, {plan.high:.3f}] nats per token"
            + (f", learning rate about {known.rule.predict(plan.params, plan.tokens):.2g}" if known.rule else "")
            + "."
        ]  # fmt: skip
        if chosen:
            lines.append(
                f"<span style='border-left:4px solid {ORANGE};padding-left:8px'>By the law without these mistakes the best "
                f"size is {quantity(plan.best_params)}: the mistakes cost {plan.costs:.4f} nats, as if only "
                f"{1 / plan.compute:.0%} of the compute had been there.</span>"
            )
        if {"seconds", "flops"} <= set(known.frame):
            speed = (known.frame["flops"] / known.frame["seconds"].where(known.frame["seconds"] > 0)).max()
            lines.append(
                f"Price: {duration(plan.flops / speed)} at the best speed among these runs ({quantity(speed)} FLOP/s)."
            )
        largest = float(self.reading.points["flops"].max())
        if plan.flops > FAR * largest:
            lines.append(f"That is {plan.flops / largest:,.0f} times the largest run here: far beyond the evidence.")
        self.plan.value = f"<div class='tinylm-plan' style='{SMALL}'>{'<br>'.join(lines)}</div>"


def _columns_of(text: str) -> dict[str, str] | None:
    """``params=N, tokens=D`` as a dict."""
    pairs = [part.split("=", 1) for part in text.split(",") if "=" in part]
    return {role.strip(): name.strip() for role, name in pairs} or None


def _draw(figure: Figure, steps: list[Reading], plan: mistakes.Planned) -> None:
    reading = steps[-1]
    left, right = figure.subfigures(1, 2, width_ratios=(LEFT, 1 - LEFT))
    upper, lower = left.subfigures(2, 1, height_ratios=(2.2, 1))
    families, walk, surface = upper.subplots(), lower.subplots(), right.subplots()
    rows = reading.points[reading.points["budget"].notna()]
    if len(rows):
        plots.isoflop(rows.drop(columns="learning_rate", errors="ignore"), reading.minima, ax=families, params="N")
    else:
        families.set_axis_off()
        families.text(0.5, 0.5, "no three sizes at one budget:\nno isoFLOP curves", ha="center", va="center")
    families.set_title("equal compute: loss against size")
    counted = plan.params if "non-embedding" not in reading.mistakes else reading.best_size(plan.flops)
    with np.errstate(invalid="ignore"):  # a law that does not fall has no best size to draw
        plots.surface(reading.fit, ax=surface, planned=(counted, plan.tokens))
    names = ["none of the mistakes"]
    names += [f"+ {MISTAKES[_added(before, after)]}" for before, after in itertools.pairwise(steps)]
    places = np.arange(len(steps))
    values = np.array([[step.a, step.a_low, step.a_high] for step in steps])
    walk.hlines(places, values[:, 1], values[:, 2], color=plots.COLOURS[0], alpha=0.35, linewidth=6)
    walk.plot(values[:, 0], places, "-o", color=plots.COLOURS[1])
    for at, (value, low, high) in zip(places, values, strict=True):
        walk.annotate(
            f"{value:.2f} [{low:.2f}, {high:.2f}]",
            (value, at),
            (0, 7),
            textcoords="offset points",
            fontsize=8,
            ha="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
        )
    walk.set_yticks(places, names)
    walk.set(ylim=(len(steps) - 0.4, -0.8), xlabel="a: best size as compute^a (band: 95 %)")
    walk.set_xlim(min(0.0, np.nanmin(values)), max(1.0, np.nanmax(values)))
    walk.spines[["top", "right"]].set_visible(False)


def _added(before: Reading, after: Reading) -> str:
    return next(name for name in after.mistakes if name not in before.mistakes)
