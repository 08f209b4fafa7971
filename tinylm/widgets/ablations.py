"""Variants of one model side by side: trained on the same batches, speaking from the same prompt and seed."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from pathlib import Path

import ipywidgets
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.figure import Figure

from tinylm import counts
from tinylm.config import DataConfig, GenerateConfig
from tinylm.errors import LabError
from tinylm.generate import stream
from tinylm.study.ablations import AS_USED
from tinylm.study.ablations import VARIANTS as STUDIED
from tinylm.study.design import Recipe
from tinylm.study.runs import Run
from tinylm.widgets.generation import LEGEND, side_by_side, write_together
from tinylm.widgets.live import PLAIN, LiveRun, labs_folder
from tinylm.widgets.models import own_manual, study_folders
from tinylm.widgets.shared import (
    COLOURS,
    GREY,
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
    wait_for,
)
from tinylm.words import duration, quantity

# Each differs from the recipe in one visible line.
VARIANTS = {
    "the recipe": {},
    "learned positions": {"position": "learned"},
    "sinusoidal positions": {"position": "sinusoidal"},
    "no positions": {"position": "none"},
    "ReLU instead of SwiGLU": {"mlp": "relu"},
    "GELU instead of SwiGLU": {"mlp": "gelu"},
    "ReLU squared instead of SwiGLU": {"mlp": "relu2"},
    "LayerNorm instead of RMSNorm": {"norm": "layernorm"},
    "post-norm instead of pre-norm": {"norm_position": "post"},
    "one key-value head for all": {"num_kv_heads": 1},
    "normed queries and keys": {"qk_norm": True},
    "untied embeddings": {"tie_embeddings": False},
    "fixed init": {"init": "fixed"},
}
SAID = {
    "the recipe": "vectors brought to size by their length (RMSNorm) before each part, a feed-forward with a learned gate "
    "(SwiGLU), positions as turns of queries and keys (RoPE), one matrix for reading and writing tokens",
    "learned positions": "each place of the window has a vector of its own, which is learned",
    "sinusoidal positions": "each place of the window has a vector of sine waves, which is not learned",
    "no positions": "nothing tells a token its place, but that it sees only what stands before it",
    "ReLU instead of SwiGLU": "the feed-forward cuts off what is negative, and has no learned gate",
    "GELU instead of SwiGLU": "the feed-forward cuts off what is negative, with a soft edge",
    "ReLU squared instead of SwiGLU": "the feed-forward cuts off what is negative and squares the rest",
    "LayerNorm instead of RMSNorm": "the mean is taken off a vector before it is brought to size",
    "post-norm instead of pre-norm": "vectors are brought to size after each sum, not before each part",
    "one key-value head for all": "all heads read the same keys and values, so that writing takes less memory",
    "normed queries and keys": "queries and keys are brought to size before they meet",
    "untied embeddings": "one matrix reads tokens and another one writes them: more parameters",
    "fixed init": "first weights spread alike in every model, however wide it is",
}
MOST = 4  # texts that fit beside each other


def ablations_panel(text: str | Path | None = None, results_dir: str | Path | None = None) -> AblationsPanel:
    """Pick two to four variants, train each for the same tokens on the same batches, and hear them side by side.

    text: a name or a path; None is Python's own manual. results_dir: where the runs are recorded; None is
    results/local/labs. What studies in results/ have measured of variants stands beside it, in multiples of compute.
    """
    text = own_manual() if text is None else str(text)
    return place(AblationsPanel, text, labs_folder() if results_dir is None else Path(results_dir), same=text)


class AblationsPanel(Panel):
    """What ``ablations_panel`` gives. ``start()`` trains and lets speak, ``speak()`` only speaks, ``stop()`` ends either."""

    def __init__(self, text: str, results_dir: Path):
        super().__init__(same=text)
        self.text_path, self.results_dir = text, results_dir
        self.lives: dict[str, LiveRun] = {}
        self.chosen = ipywidgets.SelectMultiple(
            options=list(VARIANTS), value=["the recipe", "no positions"], description="variants", rows=len(VARIANTS),
            style={"description_width": "60px"}, layout={"width": "auto"},
        )  # fmt: skip
        self.tokens = knob(
            ipywidgets.FloatLogSlider, "tokens", "of training, for each", "of training", 130,
            min=4, max=7.5, step=0.1, value=2e5, readout_format=".2s",
        )  # fmt: skip
        self.vocab_size = knob(
            ipywidgets.SelectionSlider, "vocab_size", "different tokens of the tokenizer", "tokens",
            options=(320, 512, 1024, 2048), value=512,
        )  # fmt: skip
        self.seed = knob(
            ipywidgets.BoundedIntText, "seed", "of weights, batches and texts", value=0, min=0, max=2**31 - 1
        )
        self.temperature = knob(
            ipywidgets.FloatSlider,
            "temperature",
            "0 always takes the likeliest token",
            value=0.8,
            min=0,
            max=2,
            step=0.05,
        )
        self.prompt = knob(ipywidgets.Text, "prompt", "what every text begins with", value="The")
        self.train_button = button("Train and speak", "play", primary=True)
        self.speak_button = button("Speak again", "comment", disabled=True)
        self.stop_button = button("Stop", "stop", disabled=True)
        self.facts, self.text, self.known = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        self.train_button.on_click(lambda _: self.start())
        self.speak_button.on_click(lambda _: self.speak())
        self.stop_button.on_click(lambda _: self.stop())
        for control in (self.chosen, self.tokens, self.vocab_size, self.seed):
            control.observe(self._changed, "value")
        self.chosen.observe(self._tell_known, "value")
        self.children = [
            self.chosen,
            grid([self.tokens, self.vocab_size, self.seed, self.temperature, self.prompt]),
            self.facts,
            beside(self.train_button, self.speak_button, self.stop_button, self.status),
            ipywidgets.HTML(LEGEND),
            self.text,
            self.shown_picture(),
            self.known,
        ]
        self.in_parts()
        self.ready(True)
        self._changed()
        self._tell_known()
        self._try_to_draw()

    @property
    def runs(self) -> dict[str, Run]:
        """The runs that the controls ask for, by the variant's name: alike in all else, so that differences are paired."""
        recipe, found = Recipe(), {}
        base = recipe.model((64, 2, 4), self.vocab_size.value)
        rate = recipe.learning_rate(counts.parameters(base)["total"])
        for name in self.chosen.value:
            model = base.replace(**VARIANTS[name])
            train = recipe.train(
                base, float(f"{self.tokens.value:.2g}"), rate, self.seed.value, batch_size=4, eval_tokens=32768, **PLAIN
            )
            found[name] = Run(model, train, DataConfig(self.text_path), {"label": name})
        return found

    def _changed(self, _change: object = None) -> None:
        if len(self.chosen.value) > MOST:
            self.chosen.value = self.chosen.value[:MOST]
            self._say(f"At most {MOST} variants fit side by side: the first {MOST} are kept.")
            return
        wanted = self.runs
        rows = [
            (name, f"{counts.parameters(run.model)['total']:,}", quantity(run.flops), f"{run.train.max_steps:,}")
            for name, run in wanted.items()
        ]
        said = "".join(f"<div><b>{html.escape(name)}</b>: {html.escape(SAID[name])}.</div>" for name in wanted)
        self.facts.value = f"<div style='{SMALL}'>{said}</div>" + table(
            ("variant", "parameters", "FLOPs", "steps"), rows
        )
        if len(wanted) < 2 and not self.is_running:
            self._say("Pick two to four variants: a comparison needs something to compare with.")
        self.train_button.disabled = self.is_running or len(wanted) < 2

    def _tell_known(self, _change: object = None) -> None:
        self.known.value = _known_variants(self.chosen.value)

    def ready(self, is_ready: bool) -> None:
        self.train_button.disabled = not is_ready or len(self.chosen.value) < 2
        self.speak_button.disabled = not is_ready or not self._speakers()
        self.stop_button.disabled = is_ready

    def _speakers(self) -> dict[str, LiveRun]:
        return {name: live for name, live in self.lives.items() if live.record and live.record.get("model_file")}

    def start(self) -> None:
        """Train what has not been trained yet, then let all speak."""
        if len(self.chosen.value) >= 2:
            self.begin(self._train, self.runs)

    def speak(self) -> None:
        """Let the trained models speak from the prompt, with the same seed."""
        self.begin(self._speak)

    def stop(self) -> None:
        super().stop()
        for live in self.lives.values():
            live.request_stop()

    def _train(self, wanted: dict[str, Run]) -> str:
        self.lives = {name: LiveRun(run, self.results_dir, self.prompt.value or "The") for name, run in wanted.items()}
        for number, (name, live) in enumerate(self.lives.items(), start=1):
            said, began = f"training {number} of {len(wanted)}: {name}", time.perf_counter()
            self._progress(f"{said} …")

            def on_point(live: LiveRun = live, said: str = said, began: float = began) -> None:
                step, steps = live.trainer.step, live.run.train.max_steps
                left = (time.perf_counter() - began) / step * (steps - step)
                self._progress(f"{said}, step {step:,} of {steps:,}, {duration(left)} left for this one")
                self._show_samples()
                self.redraw()

            record = live.train(self.is_stopping, lambda _: None, on_point)
            if record is None or record["status"] == "stopped" or self.is_stopping():
                live.discard()
                self.redraw()
                return f"stopped while training {name}; what had been trained before is kept"
        self.redraw()
        return self._speak()

    def _show_samples(self) -> None:
        texts = [[html.escape(live.samples[-1][1])] if live.samples else [""] for live in self.lives.values()]
        self.text.value = side_by_side("", texts, list(self.lives))

    def _speak(self) -> str:
        speakers = self._speakers()
        if not speakers:
            raise LabError("A model must have been trained before it speaks", "none was", "press Train and speak")
        prompt = self.prompt.value or "The"
        config = GenerateConfig(temperature=self.temperature.value, max_new_tokens=120, seed=self.seed.value)
        models = [live.model() for live in speakers.values()]
        texts = [stream(model, tokenizer, prompt, config, self.is_stopping, top=5) for model, tokenizer in models]

        def show(spans: list[list[str]]) -> None:
            self.text.value = side_by_side(prompt, spans, list(speakers))

        return write_together(texts, len(texts) * config.max_new_tokens, show, self._progress)

    def draw(self) -> None:
        self.picture.value = png(self._draw_curves, (9.6, 3.8 if self._drawn() else 0.8))

    def _drawn(self) -> list[tuple[str, LiveRun]]:
        return [(name, live) for name, live in self.lives.items() if live.curve]

    def _draw_curves(self, figure: Figure) -> None:
        curves, ends = parts(figure)
        drawn = self._drawn()
        if not drawn:
            wait_for(curves, "press Train and speak:\ncurves will grow here")
            wait_for(ends, "and here the differences\nat their ends")
            return
        for number, (name, live) in enumerate(drawn):
            draw_curve(curves, live.curve, "val_loss", COLOURS[number], name)
        curves.set_ylabel("validation loss (nats/token)")
        log_x(curves, "training tokens")
        curves.set_title("same text, batches and seed (star: on more text, at the end)")
        done = [
            (name, live.record["val_loss"], colour)
            for (name, live), colour in zip(drawn, COLOURS, strict=False)
            if live.record and live.record["val_loss"]
        ]
        curves.legend(loc="upper right")
        if done:
            names, losses, colours = zip(*done, strict=True)
            ends.barh(range(len(names)), np.array(losses) - losses[0], color=colours, height=0.6)
            ends.set_yticks(range(len(names)), names)
            ends.invert_yaxis()
            ends.xaxis.set_major_locator(ticker.MaxNLocator(4))
            ends.axvline(0, color=GREY, linewidth=0.8)
        ends.set(xlabel=f"loss above that of {done[0][0]} (nats/token)\nto the left is better" if done else "",
                 title="at the end, one seed")  # fmt: skip


def _known_variants(chosen: Sequence[str]) -> str:
    """What studies have measured of variants, as a table: the chosen ones, and the others folded away; a word where no study
    has."""
    for name, read in (("multipliers", _by_compute), ("variants", _by_loss)):
        for folder in study_folders():
            try:
                measured = pd.read_csv(folder / "tables" / f"{name}.csv")
                head, rows = read(measured)
                is_chosen = [
                    variant in chosen or _changes_of(variant) in map(VARIANTS.get, chosen)
                    for variant in measured.variant
                ]
            except (OSError, ValueError, AttributeError):
                continue
            said = (
                "Measured with several seeds, each variant at its own best rate: results of "
                f"<b>{html.escape(folder.name)}</b>."
            )
            if read is _by_compute:
                said += (
                    " A compute multiplier is how much compute the baseline needs for that loss, over what the variant took: "
                    "below 1 the variant wastes compute."
                )
            first = [row for row, is_so in zip(rows, is_chosen, strict=True) if is_so]
            rest = [row for row, is_so in zip(rows, is_chosen, strict=True) if not is_so]
            shown = table(head, first) if first else ""
            if rest:
                label = "what was measured" if not chosen else "none of those picked was measured, but these were"
                label = "the others that were measured" if first else label
                shown += f"<details style='{SMALL}'><summary>{label}</summary>{table(head, rest)}</details>"
            return f"<div class='tinylm-known' style='{SMALL}'>{said}</div>{shown}"
    said = "No study in results/ has compared variants yet: one seed is all there is here."
    return f"<div class='tinylm-known' style='{SMALL}'>{said}</div>"


def _changes_of(variant: str) -> dict | None:
    """What a variant of the ablations changes, as used or with as many parameters as the baseline; None for another's."""
    found = STUDIED.get(str(variant).removesuffix(AS_USED))
    return found.change if found else None


def _by_compute(measured: pd.DataFrame) -> tuple[tuple[str, ...], list[tuple]]:
    """Head and rows of what the ablations say: differences in nats, and what they are worth in compute."""
    rows = [
        (row.place, row.variant, f"{row.difference:+.3f}", _read_with_interval(row),
         row.seeds, row.verdict)
        for row in measured.itertuples()
    ]  # fmt: skip
    return (
        "place",
        "variant",
        "above the baseline (nats/token)",
        "compute multiplier [95 %]",
        "seeds",
        "verdict",
    ), rows


def _read_with_interval(row: object) -> str:
    """A multiplier with its interval; a bound ("below 0.25") has none."""
    bound = not str(row.reads)[0].isdigit()
    return row.reads if bound else f"{row.reads} [{row.multiplier_low:.2f}, {row.multiplier_high:.2f}]"


def _by_loss(measured: pd.DataFrame) -> tuple[tuple[str, ...], list[tuple]]:
    """The same of a study that compared losses alone."""
    rows = [
        (row.variant, f"{row.loss:.3f}", f"{row.difference:+.3f}", row.seeds, row.verdict)
        for row in measured.itertuples()
    ]
    return ("variant", "loss (nats/token)", "above the baseline", "seeds", "verdict"), rows
