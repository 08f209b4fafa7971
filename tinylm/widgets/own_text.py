"""One's own text: a look at its quality, a plan for the minutes one has, and a model that speaks."""

from __future__ import annotations

import html
import re
from pathlib import Path

import ipywidgets
import pandas as pd
from matplotlib.figure import Figure

from tinylm import corpora, counts, files
from tinylm.config import DataConfig, TrainConfig
from tinylm.corpora import Text
from tinylm.errors import LabError, TextError
from tinylm.study import glance, runs
from tinylm.study.design import LADDER, Recipe
from tinylm.study.planner import Speed, measure_speed
from tinylm.study.runs import Run
from tinylm.widgets.generation import GenerationPanel
from tinylm.widgets.live import PLAIN, LiveRun, labs_folder
from tinylm.widgets.models import own_manual
from tinylm.widgets.shared import (
    COLOURS,
    GREY,
    MACHINE,
    PAGE,
    SMALL,
    Panel,
    beside,
    button,
    draw_curve,
    grid,
    knob,
    log_x,
    parts,
    place,
    png,
    table,
    take_machine,
    wait_for,
)
from tinylm.words import duration, quantity


def text_panel(text: str | Path | None = None, results_dir: str | Path | None = None) -> TextPanel:
    """Choose or upload a text, look at its quality, and train a model on it in the minutes one has.

    text: a path or a name to begin with; None is Python's own manual, which is always there."""
    text = "" if text is None else str(text)
    return place(TextPanel, text, labs_folder() if results_dir is None else Path(results_dir), same="text")


class TextPanel(Panel):
    """What ``text_panel`` gives. ``look()`` reads the chosen text, ``start()`` trains on it, ``stop()`` ends either;
    ``model()`` is the model that was trained."""

    def __init__(self, text: str, results_dir: Path):
        super().__init__(same="text")
        self.results_dir = results_dir
        self.text: Text | None = None
        self.glance: glance.Glance | None = None
        self.tokenizers: pd.DataFrame | None = None
        self.live: LiveRun | None = None
        self.voice: GenerationPanel | None = None
        self._speed: Speed | None = None
        self.path = ipywidgets.Text(
            value=text,
            placeholder="Python's own manual; or the path of a file",
            description="file",
            style={"description_width": "60px"},
            layout={"width": "420px", "max_width": "100%"},
        )
        self.upload = ipywidgets.FileUpload(
            accept=".txt,.md", multiple=False, description="or upload one", layout={"width": "auto"}
        )
        self.look_button = button("Look", "search")
        self.vocab_size = knob(
            ipywidgets.SelectionSlider, "vocab_size", "different tokens of the tokenizer", "tokens",
            options=(320, 512, 1024, 2048), value=512,
        )  # fmt: skip
        self.minutes = knob(
            ipywidgets.FloatLogSlider, "time", "that the training may take", "minutes",
            min=-1, max=2.1, step=0.05, value=1.0, readout_format=".2g",
        )  # fmt: skip
        self.train_button = button("Train", "play", primary=True, disabled=True)
        self.stop_button = button("Stop", "stop", disabled=True)
        self.quality, self.plan_words, self.samples = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        self.speaking = ipywidgets.VBox()
        self.look_button.on_click(lambda _: self.look())
        self.train_button.on_click(lambda _: self.start())
        self.stop_button.on_click(lambda _: self.stop())
        self.upload.observe(self._uploaded, "value")
        for control in (self.vocab_size, self.minutes):
            control.observe(lambda _: self._tell_plan(), "value")
        self.children = [
            beside(self.path, self.look_button, self.upload),
            self.quality,
            grid([self.vocab_size, self.minutes]),
            self.plan_words,
            beside(self.train_button, self.stop_button, self.status),
            self.shown_picture(),
            self.samples,
            self.speaking,
        ]
        self.in_parts()
        self._try_to_draw()
        self.look()

    def _uploaded(self, _change: dict) -> None:
        """Keep an uploaded text in the lab's cache, under its own name, and look at it."""
        for item in self.upload.value:
            name = re.sub(r"[^\w.-]+", "_", Path(item["name"]).name) or "text.txt"
            content = bytes(item["content"])
            # A folder for each content: runs are trained on a text under its path, and it may not change under them.
            path = files.home() / "labs" / "uploads" / files.sha256_bytes(content)[:8] / name
            files.write_whole(path, content)
            self.path.value = str(path)
            self.look()

    def look(self) -> None:
        """Read the text, judge it, try tokenizers on it and measure this machine; in the background."""
        self.begin(self._look, self.path.value.strip() or own_manual())

    def _look(self, path: str) -> str:
        self._progress("reading the text …")
        self.text = self.tokenizers = None
        self.quality.value = self.plan_words.value = ""  # that was of another text
        text = corpora.load(path)
        self.text, self.glance = text, glance.glance(text)
        self._show_quality()

        def say(size: int) -> None:
            if self.is_stopping():
                raise _Stopped
            self._progress(f"trying a tokenizer of {size:,} tokens …")

        try:
            self.tokenizers = glance.tokenizers(text, say=say)
            self._show_quality()
            self.redraw()
            if self._speed is None:
                if not take_machine(self.is_stopping, self._progress):
                    raise _Stopped
                try:
                    self._progress("measuring how fast this machine trains …")
                    recipe = Recipe()
                    shapes = [recipe.model(LADDER[rung], 512) for rung in (2, 6, 9)]
                    self._speed = measure_speed(shapes, 0.2, 1, 8, TrainConfig(**PLAIN))
                finally:
                    MACHINE.release()
        except _Stopped:
            self._tell_plan()
            return "stopped"
        self._tell_plan()
        return ""

    def _show_quality(self) -> None:
        said = "".join(f"<div>{html.escape(words)}</div>" for words in self.glance.sentences())
        tried = ""
        if self.tokenizers is not None:
            rows = [
                (f"{row.vocab_size:,}", f"{row.bytes_per_token:.2f}", f"{row.bits_per_byte:.2f}")
                for row in self.tokenizers.itertuples()
            ]
            tried = table(("vocabulary (tokens)", "bytes a token", "bits a byte by token frequencies alone"), rows)
            tried += (
                f"<div style='{SMALL}'>The last column is what a model comes to that knows how frequent each token is, and "
                "nothing of their order. Yours begins there; a good one ends below the compressor.</div>"
            )
        self.quality.value = (
            f"<div class='tinylm-quality' style='{SMALL}'><b>{html.escape(self.text.name)}</b>{said}</div>{tried}"
        )

    @property
    def plan(self) -> glance.TimePlan:
        """What Train would train: the recipe's shape for the minutes, at the speed of this machine."""
        if self.text is None or self._speed is None or self.tokenizers is None:
            raise LabError("A plan needs a text that was looked at", self.path.value, "press Look and wait for it")
        tried = self.tokenizers.set_index("vocab_size")["bytes_per_token"]
        if self.vocab_size.value not in tried:
            raise LabError(
                "The text must support the vocabulary", f"vocab_size={self.vocab_size.value}",
                f"choose one of {', '.join(map(str, tried.index))}",
            )  # fmt: skip
        tokens = 0.9 * self.text.bytes / tried[self.vocab_size.value]
        return glance.plan_for_time(60 * self.minutes.value, tokens, self.vocab_size.value, self._speed)

    @property
    def run(self) -> Run:
        plan, recipe = self.plan, Recipe()
        rate = float(f"{plan.learning_rate:.2g}")
        train = recipe.train(plan.model, float(f"{plan.tokens:.2g}"), rate, eval_tokens=32768, **PLAIN)
        return Run(plan.model, train, DataConfig(str(self.text.path), "bpe"), {"label": self.text.name})

    def _has_plan(self) -> bool:
        try:
            return bool(self.plan)
        except LabError:
            return False

    def _tell_plan(self) -> None:
        try:
            plan = self.plan
        except LabError as error:
            self.plan_words.value = f"<div class='tinylm-plan' style='{SMALL}'>{html.escape(str(error))}</div>"
            self.train_button.disabled = True
            return
        self.train_button.disabled = self.is_running
        total = counts.parameters(plan.model)["total"]
        again = f", the text read {plan.epochs:.1f} times" if plan.epochs > 1 else f", {plan.epochs:.0%} of the text"
        short = " The text would be read too often for more: give more text, or less time." if plan.epochs >= 8 else ""
        self.plan_words.value = (
            f"<div class='tinylm-plan' style='{SMALL}'>The plan: <b>{quantity(total)} parameters</b> "
            f"({plan.model.hidden_size} channels, {plan.model.num_layers} blocks) on <b>{quantity(plan.tokens)} tokens</b>{again}, "
            f"about <b>{duration(plan.seconds)}</b> on this machine as busy as it is now.{short}</div>"
        )

    def ready(self, is_ready: bool) -> None:
        self.look_button.disabled, self.stop_button.disabled = not is_ready, is_ready
        self.train_button.disabled = not is_ready or not self._has_plan()

    def start(self) -> None:
        """Train what the plan says, in the background; then the model speaks."""
        if self.is_running:
            return
        try:
            run = self.run
            folder = self._folder_for(run)
        except LabError as error:
            self._complain(error)
            return
        self.live = LiveRun(run, folder, self._opening())
        self.begin(self._train)

    def _folder_for(self, run: Run) -> Path:
        """Where the run is recorded: beside ``results_dir``, where that one knows the file with other content."""
        try:
            runs.Folder(self.results_dir).check_own_text(run)
        except TextError:
            return self.results_dir.with_name(f"{self.results_dir.name}-{self.text.sha256[:8]}")
        return self.results_dir

    def stop(self) -> None:
        super().stop()
        if self.live is not None:
            self.live.request_stop()

    def model(self):
        """The model that was trained, and its tokenizer."""
        if self.live is None:
            raise LabError("A model must have been trained before it can be had", "nothing trained yet", "press Train")
        return self.live.model()

    def _opening(self) -> str:
        """The first words of the text: a beginning that the model may know how to go on from."""
        with open(self.text.path, encoding="utf-8") as file:
            words = file.read(400).split()
        return " ".join(words[:2]) or "The"

    def _train(self) -> str:
        live = self.live

        def on_point() -> None:
            self._progress(f"step {live.trainer.step:,} of {live.run.train.max_steps:,}")
            self._show_samples()
            self.redraw()

        record = live.train(self.is_stopping, self._progress, on_point)
        if record is None or record["status"] == "stopped":
            live.discard()
            return "stopped; nothing of it is kept"
        if record["status"] not in ("finished", "early_stopped"):
            return f"{record['status']}: {record['reason']}"
        self.redraw()
        if self.voice is not None:
            self.voice.close()
        self.voice = GenerationPanel(*live.model(), self._opening())
        self.speaking.children = [self.voice]
        self.voice.start()
        return (
            f"done: val_loss {record['val_loss']:.3f} nats/token, {record['val_bpb']:.3f} bits/byte "
            f"(LZMA: {self.glance.bits:.2f}), in {duration(record['seconds'])}; recorded in {live.folder.path.name}; "
            "the model speaks below"
        )

    def _show_samples(self) -> None:
        step, text = self.live.samples[-1]
        self.samples.value = f"<div class='tinylm-samples' style='{PAGE}'>step {step:,}: {html.escape(text)}</div>"

    def close(self) -> None:
        if self.voice is not None:
            self.voice.close()
        super().close()

    def draw(self) -> None:
        self.picture.value = png(self._draw, (9.6, 3.4))

    def _draw(self, figure: Figure) -> None:
        curve, tried = parts(figure)
        if self.tokenizers is None:
            wait_for(tried, "tokenizers are tried on the text:\ntheir bits per byte will stand here")
        else:
            tried.plot(self.tokenizers["vocab_size"], self.tokenizers["bits_per_byte"], "o-", color=COLOURS[0])
            tried.axhline(self.glance.bits, color=GREY, linestyle=":", label="LZMA")
            tried.legend()
            tried.set(ylabel="bits/byte", title="what token frequencies alone tell")
            log_x(tried, "vocabulary (tokens)")
        points = self.live.curve if self.live is not None else []
        if not points:
            wait_for(curve, "press Train:\nthe model's curve will grow here")
            return
        draw_curve(curve, points, "val_bpb", COLOURS[1])
        curve.axhline(self.glance.bits, color=GREY, linestyle=":", label="LZMA")
        curve.legend()
        curve.set(ylabel="bits/byte", title="the model, on held-out text (star: on more of it)")
        log_x(curve, "training tokens")


class _Stopped(Exception):
    """A stop that was asked for in the middle of a look."""
