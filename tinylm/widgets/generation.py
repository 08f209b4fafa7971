"""Play with a model's sampler: text that streams in, coloured by how likely each token was, and what each filter does."""

from __future__ import annotations

import html
import io
import math
import time
from collections.abc import Callable, Iterator, Sequence

import ipywidgets
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tinylm.config import GenerateConfig
from tinylm.generate import STAGES, TokenOut, filter_logits, next_token_logits, stream
from tinylm.model import TinyLM
from tinylm.tokenizer import Tokenizer
from tinylm.widgets.shared import (
    BLUE,
    DRAWING,
    GREY,
    LEFT,
    ORANGE,
    PAGE,
    Panel,
    beside,
    button,
    grid,
    knob,
    place,
    readable,
)

WASH = (
    "30, 136, 229"  # one hue in many strengths, told apart by lightness alone; as a wash it suits light and dark themes
)


def generation_panel(model: TinyLM, tokenizer: Tokenizer, prompt: str = "The") -> GenerationPanel:
    """Play with a model's sampler: prompt, every knob of ``GenerateConfig``, text that streams in coloured by how
    likely the model held each token (its alternatives under the pointer, by click or by keyboard), and what each filter
    makes of the distribution of the token after the prompt."""
    return place(GenerationPanel, model, tokenizer, prompt, same=model)


class GenerationPanel(Panel):
    """What ``generation_panel`` gives. ``start()`` and ``stop()`` do what the buttons do."""

    def __init__(self, model: TinyLM, tokenizer: Tokenizer, prompt: str):
        super().__init__(same=model)
        self.model, self.tokenizer = model, tokenizer
        self._read: tuple[str, tuple[torch.Tensor, torch.Tensor]] | None = None  # a prompt and what it leads to

        start = GenerateConfig()
        wide = 180  # of a name with its unit, in pixels
        ks = [k for k in (1, 2, 3, 5, 10, 20, 50, 100, 200, 500) if k < model.config.vocab_size]
        self.prompt = ipywidgets.Textarea(
            prompt, description="prompt", rows=2, style={"description_width": "60px"}, layout={"width": "auto"}
        )
        self.temperature = knob(
            ipywidgets.FloatSlider, "temperature", "0 always takes the likeliest token; 1 is the model as it is", "", wide,
            value=start.temperature, min=0, max=2, step=0.05,
        )  # fmt: skip
        self.top_k = knob(
            ipywidgets.SelectionSlider, "top_k", "only the k likeliest tokens may be drawn", "tokens", wide,
            value=start.top_k or 0, options=[*((str(k), k) for k in ks), ("all", 0)],
        )  # fmt: skip
        self.top_p = knob(
            ipywidgets.FloatSlider, "top_p", "only the likeliest tokens that together reach p may be drawn", "", wide,
            value=start.top_p, min=0.05, max=1, step=0.05,
        )  # fmt: skip
        self.repetition_penalty = knob(
            ipywidgets.FloatSlider, "repetition_penalty", "above 1, tokens already in the text become less likely", "", wide,
            value=start.repetition_penalty, min=1, max=2, step=0.05,
        )  # fmt: skip
        self.max_new_tokens = knob(
            ipywidgets.IntSlider, "max_new_tokens", "how long the text becomes", "tokens", wide,
            value=start.max_new_tokens, min=10, max=2000, step=10,
        )  # fmt: skip
        self.seed = knob(
            ipywidgets.BoundedIntText, "seed", "the same seed and settings give the same text", "", wide,
            value=start.seed, min=0, max=2**31 - 1,
        )  # fmt: skip
        self.samples = knob(
            ipywidgets.IntSlider, "samples", "texts side by side, each of a seed of its own: seed, seed + 1, ...", "texts", wide,
            value=1, min=1, max=4,
        )  # fmt: skip
        self.generate_button = button("Generate", "play", primary=True)
        self.stop_button = button("Stop", "stop", disabled=True)
        self.text = ipywidgets.HTML(layout={"width": "auto", "max_height": "420px", "overflow": "auto"})

        self._filters = (self.temperature, self.top_k, self.top_p, self.repetition_penalty)
        for control in (self.prompt, *self._filters):
            control.observe(self.redraw, "value")
        self.generate_button.on_click(lambda _: self.start())
        self.stop_button.on_click(lambda _: self.stop())
        self.children = [
            self.prompt,
            grid([*self._filters, self.max_new_tokens, self.samples, self.seed]),
            beside(self.generate_button, self.stop_button, self.status),
            ipywidgets.HTML(LEGEND),
            self.text,
            ipywidgets.HTML(_CAPTION),
            self.shown_picture(),
        ]
        self.in_parts()
        self._show(prompt, [[]])
        self._try_to_draw()

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
        self.begin(self._write, self.prompt.value, self.config, self.samples.value)

    def ready(self, is_ready: bool) -> None:
        self.generate_button.disabled, self.stop_button.disabled = not is_ready, is_ready

    def _write(self, prompt: str, config: GenerateConfig, samples: int) -> str:
        """Stream texts into the panel; returns a word on how it went."""
        texts = [
            stream(
                self.model, self.tokenizer, prompt, config.replace(seed=config.seed + number), self.is_stopping, top=5
            )
            for number in range(samples)
        ]
        return write_together(
            texts, samples * config.max_new_tokens, lambda spans: self._show(prompt, spans), self._progress
        )

    def _show(self, prompt: str, texts: list[list[str]]) -> None:
        self.text.value = side_by_side(prompt, texts)

    def draw(self) -> None:
        prompt, config = self.prompt.value, self.config
        if self._read is None or self._read[0] != prompt:
            self._read = prompt, next_token_logits(self.model, self.tokenizer, prompt)
        stages = filter_logits(self._read[1][0], config, self._read[1][1])
        stages = {name: stage[0].numpy() for name, stage in stages.items()}
        self.picture.value = draw_filters(stages, config, self.tokenizer.pieces)


def write_together(
    texts: list[Iterator[TokenOut]], most: int, show: Callable[[list[list[str]]], None], say: Callable[[str], None]
) -> str:
    """Take a token of each text in turn until all have ended, and show what there is some ten times a second; returns a
    word on how it went. most: how many tokens there are where nothing is stopped."""
    began = told = time.perf_counter()
    spans: list[list[str]] = [[] for _ in texts]
    waiting: list[list[TokenOut]] = [[] for _ in texts]
    active, count = dict(enumerate(texts)), 0
    show(spans)
    say("writing …")
    try:
        while active:
            for number, text in list(active.items()):
                token = next(text, None)
                if token is None:
                    del active[number]
                    continue
                count += 1
                waiting[number].append(token)
                if token.text:
                    spans[number].append(_span(waiting[number]))
                    waiting[number] = []
            now = time.perf_counter()
            # A long text is a long message: it is sent less often, so that the page keeps up.
            if now - told > 0.1 + sum(map(len, spans)) / 2000:
                show(spans)
                say(f"writing … {count:,} tokens, {count / (now - began):,.0f} tokens/s")
                told = time.perf_counter()
    finally:
        show(spans)
    seconds = max(time.perf_counter() - began, 1e-9)
    ended = "stopped after" if count < most else "done:"
    return f"{ended} {count:,} tokens in {seconds:.1f} s, {count / seconds:,.0f} tokens/s"


def side_by_side(prompt: str, texts: list[list[str]], names: Sequence[str] = ()) -> str:
    """Texts of coloured spans as columns, as many as the page has room for, each under its name; ``LEGEND`` goes before."""
    head = f"<span style='opacity:.65'>{html.escape(prompt)}</span>"
    above = [f"<b>{html.escape(name)}</b>" for name in names] or [""] * len(texts)
    # A form, so that the tokens of a text are one stop of the Tab key and arrows walk through them, as with any radio
    # buttons; as a dialog's it is never sent.
    pages = [
        f"<div>{name}<form method='dialog' class='tinylm-text' style='{PAGE}'>{head}{''.join(spans)}</form></div>"
        for name, spans in zip(above, texts, strict=True)
    ]
    columns = "display:grid;gap:8px;grid-template-columns:repeat(auto-fit, minmax(min(190px, 100%), 1fr))"
    return f"<div style='{columns}'>{''.join(pages)}</div>"


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
    names = [readable(piece(int(token))) for token in shown] + ([f"{others:,} others"] if others else [])
    rest = np.ones(len(model), dtype=bool)
    rest[shown] = False
    values = {name: np.append(stage[shown], stage[rest].sum())[: len(names)] for name, stage in stages.items()}
    settings = {
        "model": "the model",
        "repetition_penalty": f"repetition_penalty\n{config.repetition_penalty:g}",
        "temperature": f"temperature\n{config.temperature:g}",
        "top_k": f"top_k\n{config.top_k or 'all'}",
        "top_p": f"top_p\n{config.top_p:g}",
    }
    # In units of the longest bar. A picture of two parts: three stages in the left one, each part with the tokens' names.
    step, room, in_left, top = 1.5, 0.75, 3, max(value.max() for value in values.values())
    second = (room + (len(STAGES) - in_left) * step) / (1 / LEFT - 1)  # where the right part begins
    lefts = [room + step * n for n in range(in_left)]
    lefts += [second + room + step * n for n in range(len(STAGES) - in_left)]
    figure = Figure(figsize=(9.6, 0.75 + 0.23 * len(names)), dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0.01, 1, 0.97))
    axes.set(xlim=(0, second / LEFT), ylim=(len(names) - 0.4, -2.1))
    axes.axis("off")
    words = {"color": GREY, "fontsize": 8.5, "va": "center", "parse_math": False}
    for row, name in enumerate(names):
        for left in (lefts[0], lefts[in_left]):
            axes.text(left - 0.05, row, name, ha="right", **words)
    before = None
    for column, stage in enumerate(STAGES):
        value, left = values[stage], lefts[column]
        changes = stage == "model" or not np.array_equal(stages[stage], before)
        axes.text(
            left,
            -0.7,
            settings[stage],
            ha="left",
            **{**words, "va": "bottom", "weight": "bold" if changes else "normal"},
        )
        axes.barh(range(len(names)), value / top, left=left, height=0.7, color=BLUE, alpha=1.0 if changes else 0.35)
        axes.vlines(left, -0.5, len(names) - 0.5, color=GREY, linewidth=0.8)
        if before is not None and changes:
            ticks = left + values[STAGES[column - 1]] / top
            axes.vlines(ticks, np.arange(len(names)) - 0.42, np.arange(len(names)) + 0.42, color=ORANGE, linewidth=1.6)
        for row, share in enumerate(value):
            place = left + max(share, values[STAGES[column - 1]][row] if before is not None and changes else 0) / top
            label, color = (f"{share:.0%}", GREY) if share >= 0.01 else ("<1%", GREY) if share > 0 else ("×", ORANGE)
            axes.text(place + 0.03, row, label, ha="left", **{**words, "color": color, "fontsize": 7.5})
        before = stages[stage]
    out = io.BytesIO()
    with DRAWING:
        figure.savefig(out, format="png", transparent=True)
    return out.getvalue()


def _strength(probability: float) -> float:
    """How strongly a token is coloured: 0 where it was certain, full where the model gave it 1 in 500 or less."""
    return 0.65 * min(1.0, abs(math.log(max(probability, 1e-9))) / math.log(500))


# What a token tells stands below its line while it has the focus; the page is made longer for that of the last line.
_TOKENS = (
    "<style>.tinylm-text{position:relative}.tinylm-text:focus-within{padding-bottom:4.5em!important}"
    ".tinylm-text input{appearance:none;position:absolute;width:0;height:0;margin:0;border:0;outline:none}"
    f".tinylm-text label:focus-within{{outline:2px solid {ORANGE}}}"
    ".tinylm-text label:focus-within::after{content:attr(title);position:absolute;left:8px;max-width:calc(100% - 34px);"
    "margin-top:27px;z-index:1;padding:2px 8px;font-size:13px;line-height:1.5;white-space:pre-wrap;border:1px solid;"
    "border-radius:4px;background:var(--jp-layout-color1,Canvas)}</style>"
)
# For all that shows ``side_by_side``, whose tokens take their looks from here, too.
LEGEND = (
    _TOKENS
    + "<div style='font-size:12px;line-height:1.6'>how likely the model held each token: "
    + " ".join(
        f"<span style='background:rgba({WASH}, {_strength(p):.2f});padding:1px 6px;border-radius:2px;white-space:nowrap'>"
        f"{name}</span>"
        for name, p in (("100 %", 1.0), ("50 %", 0.5), ("10 %", 0.1), ("2 %", 0.02), ("0.2 %", 0.002))
    )
    + " &nbsp;for what else it held likely, point at a token, or click it and walk on with the arrow keys</div>"
)
_CAPTION = (
    "<div style='font-size:12px;line-height:1.6'>The token after the prompt, its likeliest candidates (␣ is a space, ⏎ a "
    "new line): first as the model has it, then after each filter in turn. Orange tick: before that filter; ×: removed.</div>"
)


def _span(tokens: list[TokenOut]) -> str:
    """A piece of text in the colour of its probability; several tokens are the bytes of one character. Its alternatives
    show under the pointer, and below it when it is clicked or reached by the keyboard."""
    probability = math.prod(token.probability for token in tokens)
    title = f"probability {_percent(probability)}" + (
        f" ({len(tokens)} tokens for this character)" if len(tokens) > 1 else ""
    )
    others = ", ".join(f"{readable(piece)} {_percent(p)}" for _, piece, p in tokens[-1].alternatives)
    title = html.escape(f"{title}\nlikeliest: {others}", quote=True).replace("\n", "&#10;")
    wash = f"background:rgba({WASH}, {_strength(probability):.2f})"
    text = html.escape(tokens[-1].text)
    stop = '<input type="radio" name="token" data-lm-suppress-shortcuts>'  # JupyterLab's own would take the arrow keys
    return f'<label style="{wash}" title="{title}">{stop}{text}</label>'


def _percent(probability: float) -> str:
    return f"{100 * probability:.{0 if probability >= 0.1 else 1 if probability >= 0.01 else 2}f} %"
