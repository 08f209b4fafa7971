"""Parts for notebooks to play with, each usable alone in one line. The only module that knows the screen.

A panel works in a thread of its own, so that the kernel stays free; running its cell again ends what the earlier panel
was doing. Saved or converted without widgets, a panel shows as a picture.
"""

from __future__ import annotations

import base64
import html
import io
import math
import re
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import ipywidgets
import numpy as np
import torch
from IPython import get_ipython
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tinylm import files
from tinylm.checkpoint import load_model, save_model
from tinylm.config import GenerateConfig
from tinylm.errors import LabError
from tinylm.generate import STAGES, TokenOut, filter_logits, next_token_logits, stream
from tinylm.model import TinyLM
from tinylm.study.design import Recipe
from tinylm.study.parameters import repository
from tinylm.tokenizer import Tokenizer
from tinylm.train import Trainer

# One hue in many strengths, told apart by lightness alone; as a wash under the text it suits light and dark themes.
_BLUE, _ORANGE, _GREY = "#1E88E5", "#D55E00", "#808080"
_WASH = "30, 136, 229"  # the same blue


# ------------------------------------------------------------------------------------------------------ models


def find_model(study: str = "quickstart") -> Path | None:
    """The best model that a study kept, in results/local/<study>/models, else in results/<study>/models; None without.

    ``best.safetensors`` where there is one, else the file whose metadata tells the lowest val_loss.
    """
    for results in (repository() / "results" / "local", repository() / "results"):
        kept = sorted((results / study / "models").glob("*.safetensors"))
        if kept:
            named = [path for path in kept if path.stem == "best"]
            return named[0] if named else min(kept, key=lambda path: _val_loss(load_model(path)[2]))
    return None


def load_or_train(study: str = "quickstart", seconds: float = 20.0) -> tuple[TinyLM, Tokenizer]:
    """A model to play with, and a line about it: the study's best one, or a small one trained here and now."""
    path = find_model(study)
    if path is None:
        return small_model(seconds)
    model, tokenizer, about = load_model(path)
    # Steps as small as these lose by a second thread, most of all beside a busy neighbour; small_model does the same.
    torch.set_num_threads(1)
    print(f"{path.relative_to(repository())}: {_in_words(model, about)}")
    return model, tokenizer


def small_model(seconds: float = 20.0) -> tuple[TinyLM, Tokenizer]:
    """Train a small model for about so long on a text that every Python brings along, its own language reference
    (``pydoc_data.topics``, 0.5 MB), and keep it in the lab's cache; the next call takes it from there."""
    from pydoc_data.topics import topics

    # Its prose: tables and rules left out, the lines of a paragraph joined.
    prose = {name: re.sub(r"(?m)^\s*(?:[|+]|[*=-]{3}).*$", "", topics[name]) for name in topics}
    pages = ["\n".join(" ".join(part.split()) for part in prose[name].split("\n\n")) for name in sorted(prose)]
    recipe = Recipe()
    config = recipe.model((64, 2, 4), vocab_size=512)
    identity = files.sha256_bytes(files.canonical_json([pages, config.to_dict(), seconds]).encode())[:16]
    path = files.home() / "labs" / f"small-{identity}.safetensors"
    if path.exists():
        model, tokenizer, about = load_model(path)
        print(f"A small model from an earlier visit: {_in_words(model, about)}")
        return model, tokenizer
    print(f"No study has left a model yet, so a small one learns from Python's own manual, for about {seconds:.0f} s.")
    tokenizer = Tokenizer.train(pages, "bpe", config.vocab_size)
    train = tokenizer.encode_array("\n".join(page for number, page in enumerate(pages) if number % 10))
    val = tokenizer.encode_array("\n".join(page for number, page in enumerate(pages) if not number % 10))
    probe = recipe.train(config, 20 * 8 * recipe.seq_len, learning_rate=1e-3, batch_size=8, eval_tokens=1)
    speed = Trainer(config, probe, train, val).run().tokens_per_second
    rate = recipe.learning_rate(sum(p.numel() for p in TinyLM(config).parameters()))
    plan = recipe.train(config, speed * seconds, learning_rate=rate)
    trainer = Trainer(config, plan, train, val, tokenizer.token_bytes, progress=True)
    result = trainer.run()
    about = {"text": "Python's manual", "val_loss": result.val_loss, "tokens_seen": result.tokens_seen}
    if result.status == "finished":
        save_model(path, trainer.model, tokenizer, about)
    print(_in_words(trainer.model, about))
    return trainer.model, tokenizer


def _val_loss(about: dict) -> float:
    value = about.get("val_loss")
    return math.inf if value is None else float(value)


def _in_words(model: TinyLM, about: dict) -> str:
    parts = [f"{sum(p.numel() for p in model.parameters()):,} parameters"]
    parts += [f"trained on {about['text']}"] if about.get("text") else []
    parts += [f"validation loss {_val_loss(about):.3f} nats per token"] if about.get("val_loss") is not None else []
    return ", ".join(parts) + "."


# -------------------------------------------------------------------------------------------------- generation


def generation_panel(model: TinyLM, tokenizer: Tokenizer, prompt: str = "The") -> GenerationPanel:
    """Play with a model's sampler: prompt, every knob of ``GenerateConfig``, text that streams in coloured by how
    likely the model held each token (its alternatives under the pointer), and what each filter makes of the
    distribution of the token after the prompt."""
    cell, execution = _cell()
    for older in list(_panels):
        same_place = older.cell == cell if cell else older.model is model
        if same_place and (execution is None or older.execution != execution):
            older.stop()
            if cell:
                older.close()
    panel = GenerationPanel(model, tokenizer, prompt)
    panel.cell, panel.execution = cell, execution
    _panels.add(panel)
    return panel


class GenerationPanel(ipywidgets.VBox):
    """What ``generation_panel`` gives. ``start()`` and ``stop()`` do what the buttons do."""

    def __init__(self, model: TinyLM, tokenizer: Tokenizer, prompt: str):
        self.model, self.tokenizer = model, tokenizer
        self.cell = self.execution = None
        self.is_running = False
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._drawer: threading.Thread | None = None
        self._outdated = self._is_prompt_bad = False
        self._read: tuple[str, tuple[torch.Tensor, torch.Tensor]] | None = None  # a prompt and what it leads to

        start = GenerateConfig()
        ks = [k for k in (1, 2, 3, 5, 10, 20, 50, 100, 200, 500) if k < model.config.vocab_size]
        self.prompt = ipywidgets.Textarea(
            prompt, description="prompt", rows=2, style={"description_width": "60px"}, layout={"width": "auto"}
        )
        self.temperature = _knob(
            ipywidgets.FloatSlider, "temperature", "0 always takes the likeliest token; 1 is the model as it is",
            value=start.temperature, min=0, max=2, step=0.05,
        )  # fmt: skip
        self.top_k = _knob(
            ipywidgets.SelectionSlider, "top_k", "only the k likeliest tokens may be drawn",
            value=start.top_k or 0, options=[*((str(k), k) for k in ks), ("all", 0)],
        )  # fmt: skip
        self.top_p = _knob(
            ipywidgets.FloatSlider, "top_p", "only the likeliest tokens that together reach p may be drawn",
            value=start.top_p, min=0.05, max=1, step=0.05,
        )  # fmt: skip
        self.repetition_penalty = _knob(
            ipywidgets.FloatSlider, "repetition_penalty", "above 1, tokens already in the text become less likely",
            value=start.repetition_penalty, min=1, max=2, step=0.05,
        )  # fmt: skip
        self.max_new_tokens = _knob(
            ipywidgets.IntSlider, "max_new_tokens", "how long the text becomes",
            value=start.max_new_tokens, min=10, max=2000, step=10,
        )  # fmt: skip
        self.seed = _knob(
            ipywidgets.BoundedIntText, "seed", "the same seed and settings give the same text",
            value=start.seed, min=0, max=2**31 - 1,
        )  # fmt: skip
        self.generate_button = ipywidgets.Button(description="Generate", button_style="primary", icon="play")
        self.stop_button = ipywidgets.Button(description="Stop", icon="stop", disabled=True)
        self.status = ipywidgets.HTML()
        self.text = ipywidgets.HTML(layout={"width": "auto", "max_height": "420px", "overflow": "auto"})
        self.picture = ipywidgets.Image(format="png", layout={"width": "100%", "min_width": "640px"})

        self._filters = (self.temperature, self.top_k, self.top_p, self.repetition_penalty)
        for control in (self.prompt, *self._filters):
            control.observe(self._redraw, "value")
        self.generate_button.on_click(lambda _: self.start())
        self.stop_button.on_click(lambda _: self.stop())
        knobs = ipywidgets.GridBox(
            [*self._filters, self.max_new_tokens, self.seed],
            layout=ipywidgets.Layout(
                grid_template_columns="repeat(auto-fit, minmax(min(340px, 100%), 1fr))", grid_gap="0 24px"
            ),
        )
        buttons = ipywidgets.HBox(
            [self.generate_button, self.stop_button, self.status],
            layout=ipywidgets.Layout(flex_flow="row wrap", align_items="center"),
        )
        picture = ipywidgets.Box([self.picture], layout={"overflow": "auto hidden"})  # a narrow page scrolls it
        super().__init__(
            [self.prompt, knobs, buttons, ipywidgets.HTML(_LEGEND), self.text, picture],
            layout=ipywidgets.Layout(width="auto", max_width="1000px"),
        )
        self._show(prompt, [])
        self._draw()

    @property
    def config(self) -> GenerateConfig:
        """What the controls say."""
        return GenerateConfig(
            temperature=self.temperature.value,
            top_k=self.top_k.value or None,
            top_p=self.top_p.value,
            repetition_penalty=self.repetition_penalty.value,
            max_new_tokens=self.max_new_tokens.value,
            seed=self.seed.value,
        )

    def start(self) -> None:
        """Continue the prompt in the background; does nothing while text is being written."""
        with self._lock:
            if self.is_running:
                return
            self.is_running = True
            self._stop.clear()
            self.generate_button.disabled, self.stop_button.disabled = True, False
            self._thread = threading.Thread(target=self._write, args=(self.prompt.value, self.config), daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the text at its next token."""
        with self._lock:  # the thread has its last word under the same lock, so this one never comes after it
            if self.is_running:
                self._say("stopping …")
                self._stop.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the thread to end; whether it has."""
        if self._thread is None:
            return True
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def close(self) -> None:
        """End what is going on and take the panel off the screen."""
        self._stop.set()
        _panels.discard(self)
        for part in _within(self):
            if part is not self:
                part.close()
        super().close()

    def _repr_mimebundle_(self, **options) -> dict:
        picture = {"image/png": base64.b64encode(self.picture.value).decode()} if self.picture.value else {}
        return {**super()._repr_mimebundle_(**options), **picture}

    def _write(self, prompt: str, config: GenerateConfig) -> None:
        """The body of the thread: stream text into the panel, and end with a word on how it went."""
        began = told = time.perf_counter()
        spans: list[str] = []
        count, waiting = 0, []
        try:
            self._show(prompt, spans)
            self._say("writing …")
            for token in stream(self.model, self.tokenizer, prompt, config, stop=self._stop.is_set, top=5):
                count += 1
                waiting.append(token)
                if token.text:
                    spans.append(_span(waiting))
                    waiting = []
                now = time.perf_counter()
                # A long text is a long message: it is sent less often, so that the page keeps up.
                if now - told > 0.1 + len(spans) / 2000:
                    self._show(prompt, spans)
                    self._say(f"writing … {count:,} tokens, {count / (now - began):,.0f} tokens/s")
                    told = time.perf_counter()
            seconds = max(time.perf_counter() - began, 1e-9)
            ended = "stopped after" if count < config.max_new_tokens else "done:"
            outcome = f"{ended} {count:,} tokens in {seconds:.1f} s, {count / seconds:,.0f} tokens/s"
        except Exception as error:
            outcome = error
        with self._lock:
            self._show(prompt, spans)
            self._complain(outcome) if isinstance(outcome, Exception) else self._say(outcome)
            self.generate_button.disabled, self.stop_button.disabled = False, True
            self.is_running = False

    def _show(self, prompt: str, spans: list[str]) -> None:
        head = f"<span style='opacity:.65'>{html.escape(prompt)}</span>"
        self.text.value = f"<div class='tinylm-text' style='{_PAGE}'>{head}{''.join(spans)}</div>"

    def _say(self, words: str) -> None:
        self.status.value = f"<span role='status' class='tinylm-status'>{html.escape(words)}</span>"

    def _complain(self, error: Exception) -> None:
        words = str(error) if isinstance(error, LabError) else f"{type(error).__name__}: {error}"
        self.status.value = (
            f"<span role='alert' class='tinylm-status' style='border-left:4px solid {_ORANGE};padding-left:8px'>"
            f"{html.escape(words)}</span>"
        )

    def _redraw(self, _change: dict) -> None:
        """Draw soon, in a thread that ends when the picture is up to date: a slider may ask faster than one draws."""
        with self._lock:
            self._outdated = True
            if self._drawer is None:
                self._drawer = threading.Thread(target=self._keep_drawing, daemon=True)
                self._drawer.start()

    def _keep_drawing(self) -> None:
        while True:
            with self._lock:
                if not self._outdated:
                    self._drawer = None
                    return
                self._outdated = False
            self._draw()

    def _draw(self) -> None:
        try:
            prompt, config = self.prompt.value, self.config
            if self._read is None or self._read[0] != prompt:
                self._read = prompt, next_token_logits(self.model, self.tokenizer, prompt)
            stages = filter_logits(self._read[1][0], config, self._read[1][1])
            stages = {name: stage[0].numpy() for name, stage in stages.items()}
            self.picture.value = draw_filters(stages, config, self.tokenizer.pieces)
            if self._is_prompt_bad:
                self._say("")
            self._is_prompt_bad = False
        except Exception as error:
            self._is_prompt_bad = True
            self._complain(error)


def draw_filters(
    stages: dict[str, np.ndarray], config: GenerateConfig, piece: Callable[[int], str], rows: int = 10
) -> bytes:
    """A PNG of the next token's distribution after each stage of ``filter_logits``, one column a stage: the likeliest
    tokens of the model, all others in one bar. A tick marks what the stage before gave, a cross what a filter removed.

    stages: name in ``STAGES`` -> probabilities (V,). piece: id -> its printable form.
    """
    model = stages["model"]
    shown = np.argsort(-model, kind="stable")[:rows]
    others = len(model) - len(shown)
    names = [_readable(piece(int(token))) for token in shown] + ([f"{others:,} others"] if others else [])
    rest = np.ones(len(model), dtype=bool)
    rest[shown] = False
    values = {name: np.append(stage[shown], stage[rest].sum())[: len(names)] for name, stage in stages.items()}
    settings = {
        "model": "the model",
        "repetition_penalty": f"repetition_penalty {config.repetition_penalty:g}",
        "temperature": f"temperature {config.temperature:g}",
        "top_k": f"top_k {config.top_k or 'all'}",
        "top_p": f"top_p {config.top_p:g}",
    }
    step, top = 1.5, max(value.max() for value in values.values())
    figure = Figure(figsize=(9.6, 0.6 + 0.23 * len(names)), dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.09, 0.01, 0.91, 0.97))
    axes.set(xlim=(-0.05, step * len(STAGES)), ylim=(len(names) - 0.4, -1.6))
    axes.axis("off")
    words = {"color": _GREY, "fontsize": 8.5, "va": "center", "parse_math": False}
    for row, name in enumerate(names):
        axes.text(-0.05, row, name, ha="right", **words)
    before = None
    for column, stage in enumerate(STAGES):
        value, left = values[stage], column * step
        changes = stage == "model" or not np.array_equal(stages[stage], before)
        axes.text(left, -1.1, settings[stage], ha="left", **{**words, "weight": "bold" if changes else "normal"})
        axes.barh(range(len(names)), value / top, left=left, height=0.7, color=_BLUE, alpha=1.0 if changes else 0.35)
        axes.vlines(left, -0.5, len(names) - 0.5, color=_GREY, linewidth=0.8)
        if before is not None and changes:
            ticks = left + values[STAGES[column - 1]] / top
            axes.vlines(ticks, np.arange(len(names)) - 0.42, np.arange(len(names)) + 0.42, color=_ORANGE, linewidth=1.6)
        for row, share in enumerate(value):
            place = left + max(share, values[STAGES[column - 1]][row] if before is not None and changes else 0) / top
            label, color = (f"{share:.0%}", _GREY) if share >= 0.01 else ("<1%", _GREY) if share > 0 else ("×", _ORANGE)
            axes.text(place + 0.03, row, label, ha="left", **{**words, "color": color, "fontsize": 7.5})
        before = stages[stage]
    out = io.BytesIO()
    figure.savefig(out, format="png", transparent=True)
    return out.getvalue()


_PAGE = (
    "white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.7;font-family:var(--jp-content-font-family,serif);"
    "font-size:15px;color:var(--jp-content-font-color1,inherit);min-height:3em;padding:6px 10px;"
    "border:1px solid var(--jp-border-color2,#808080);border-radius:4px"
)


def _strength(probability: float) -> float:
    """How strongly a token is coloured: 0 where it was certain, full where the model gave it 1 in 500 or less."""
    return 0.65 * min(1.0, abs(math.log(max(probability, 1e-9))) / math.log(500))


_LEGEND = (
    "<div style='font-size:12px;line-height:1.6'>how likely the model held each token, alternatives under the pointer: "
    + " ".join(
        f"<span style='background:rgba({_WASH}, {_strength(p):.2f});padding:1px 6px;border-radius:2px'>{name}</span>"
        for name, p in (("100 %", 1.0), ("50 %", 0.5), ("10 %", 0.1), ("2 %", 0.02), ("0.2 %", 0.002))
    )
    + "</div>"
)


def _span(tokens: list[TokenOut]) -> str:
    """A piece of text in the colour of its probability; several tokens are the bytes of one character."""
    probability = math.prod(token.probability for token in tokens)
    title = f"{_percent(probability)}" + (f" ({len(tokens)} tokens for this character)" if len(tokens) > 1 else "")
    others = ", ".join(f"{_readable(piece)} {_percent(p)}" for _, piece, p in tokens[-1].alternatives)
    title = html.escape(f"{title}\nlikeliest: {others}", quote=True).replace("\n", "&#10;")
    wash = f"background:rgba({_WASH}, {_strength(probability):.2f})"
    return f'<span style="{wash}" title="{title}">{html.escape(tokens[-1].text)}</span>'


def _percent(probability: float) -> str:
    return f"{100 * probability:.{0 if probability >= 0.1 else 1 if probability >= 0.01 else 2}f} %"


def _readable(piece: str) -> str:
    """A piece as a label: spaces and newlines visible, and no character that the figures' font lacks."""
    piece = piece.replace("<0x0A>", "⏎").replace("▁", "␣").replace("\n", "⏎")
    return "".join(char if ord(char) in _GLYPHS else "□" for char in piece)


_GLYPHS = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
_panels: weakref.WeakSet[GenerationPanel] = weakref.WeakSet()


def _knob(kind: type[ipywidgets.Widget], name: str, tooltip: str, **options) -> ipywidgets.Widget:
    """A control with its name before it, as wide as its place."""
    return kind(
        description=name,
        tooltip=tooltip,
        style={"description_width": "130px"},
        layout={"width": "auto", "min_width": "0"},
        **options,
    )


def _within(widget: ipywidgets.Widget) -> list[ipywidgets.Widget]:
    """A widget and all that it holds."""
    return [widget, *(inner for child in getattr(widget, "children", ()) for inner in _within(child))]


def _cell() -> tuple[str | None, str | None]:
    """Which notebook cell is running, and which run of it; None outside a kernel or where the page does not say."""
    kernel = getattr(get_ipython(), "kernel", None)
    parent = kernel.get_parent() if kernel is not None else {}
    return parent.get("metadata", {}).get("cellId"), parent.get("header", {}).get("msg_id")
