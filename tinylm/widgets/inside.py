"""Look inside a model: attention maps, the logit lens, loss by position, what positions look like, and the KV cache."""

from __future__ import annotations

import html
import itertools
from pathlib import Path

import ipywidgets
import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure

from tinylm import counts
from tinylm.errors import LabError
from tinylm.inside import Inside, look_inside, loss_by_position, position_similarity
from tinylm.model import TinyLM
from tinylm.tokenizer import Tokenizer
from tinylm.widgets.models import own_manual
from tinylm.widgets.shared import (
    BLUE,
    COLOURS,
    GREY,
    SMALL,
    Panel,
    choice,
    grid,
    knob,
    log_x,
    parts,
    place,
    png,
    readable,
)

VIEWS = {
    "attention": "One head's attention. Each row is a token; the stronger a box, the more this token reads from the token of "
    "that column.",
    "all heads": "Every head of every block, drawn as under attention: rows read from columns, the first token at the top "
    "left.",
    "logit lens": "For each token that is read, the likeliest next token (in the box), if the output head were put right "
    "after the embedding or after that block. The last row is the model's own word.",
    "loss by position": "How much the model is surprised by a token, by how many tokens of the window it has read before; "
    "lower is better.",
    "positions": "How alike two places look to the model: 1 the same, 0 unrelated, -1 opposite. On the left the average by "
    "their distance, on the right any two places.",
    "KV cache": "The memory that writing takes: keys and values of all tokens so far, by how many heads share them.",
}
SHOWN = 32  # tokens of a text that are looked at
FADE = LinearSegmentedColormap.from_list(
    "fade", [to_rgba(BLUE, 0.05), to_rgba(BLUE, 1)]
)  # none is no colour on any ground


def inside_panel(model: TinyLM, tokenizer: Tokenizer, prompt: str = "The sun was set and all the birds were still",
                 text: str | Path | None = None) -> InsidePanel:  # fmt: skip
    """Look inside a model while it reads a prompt. text: a file for the loss by position; None is Python's own manual."""
    return place(InsidePanel, model, tokenizer, prompt, own_manual() if text is None else str(text), same=model)


class InsidePanel(Panel):
    """What ``inside_panel`` gives. ``inside`` holds what was seen; the controls choose what is drawn of it."""

    def __init__(self, model: TinyLM, tokenizer: Tokenizer, prompt: str, text: str):
        super().__init__(same=model)
        self.model, self.tokenizer, self.text = model, tokenizer, text
        self.inside: Inside | None = None
        self._read: str | None = None
        self._by_position: np.ndarray | None = None
        config = model.config
        self.prompt = ipywidgets.Textarea(
            prompt, description="text", rows=2, style={"description_width": "60px"}, layout={"width": "auto"}
        )
        self.view = choice("", "what to look at", list(VIEWS), "attention", 0)
        self.layer = knob(
            ipywidgets.IntSlider, "block", "from the first to the last", min=1, max=config.num_layers, value=1
        )
        self.head = knob(
            ipywidgets.IntSlider, "head", "of this block's attention", min=1, max=config.num_heads, value=1
        )
        self.words = ipywidgets.HTML()
        for control in (self.prompt, self.view, self.layer, self.head):
            control.observe(self.redraw, "value")
        self.children = [
            self.prompt, self.view, grid([self.layer, self.head]), self.words, self.status, self.shown_picture(),
        ]  # fmt: skip
        self._try_to_draw()

    def draw(self) -> None:
        view, layer, head = self.view.value, self.layer.value - 1, self.head.value - 1
        self.layer.disabled = self.head.disabled = view != "attention"
        self.words.value = f"<div class='tinylm-view' style='{SMALL}'>{html.escape(VIEWS[view])}</div>"
        if self._read != self.prompt.value:
            ids = self.tokenizer.encode(self.prompt.value)[:SHOWN]
            if not ids:
                raise LabError("A text to look at has at least one token", repr(self.prompt.value), "write something")
            self.inside, self._read = look_inside(self.model, ids[: self.model.config.max_seq_len]), self.prompt.value
        pieces = [readable(self.tokenizer.pieces(int(i))) for i in self.inside.ids]
        if view == "loss by position" and self._by_position is None:
            self._say("reading some windows of text …")
            tokens = self.tokenizer.encode_array(Path(self.text).read_text(encoding="utf-8")[:400_000])
            self._by_position = loss_by_position(self.model, tokens, windows=256)
            self._say("")
        draws = {
            "attention": lambda figure: _one_head(figure, self.inside, pieces, layer, head),
            "all heads": lambda figure: _all_heads(figure, self.inside),
            "logit lens": lambda figure: _lens(figure, self.inside, pieces, self.tokenizer),
            "loss by position": lambda figure: _positions_loss(figure, self._by_position, Path(self.text).name),
            "positions": lambda figure: _positions(figure, self.model),
            "KV cache": lambda figure: _cache(figure, self.model),
        }
        blocks = len(self.inside.attention)
        height = {"attention": 6.4, "all heads": 0.6 + 1.9 * blocks, "logit lens": 1.6 + 0.42 * (blocks + 1)}
        self.in_parts(view == "positions")
        self.picture.value = png(draws[view], (9.6, height.get(view, 4.2)))


def _past(weights: torch.Tensor) -> np.ndarray:
    """Attention (T, T) without the future, which is hidden and stays clear on any ground."""
    return np.ma.masked_array(weights.numpy(), np.triu(np.ones(weights.shape, bool), 1))


def _one_head(figure: Figure, inside: Inside, pieces: list[str], layer: int, head: int) -> None:
    axes = figure.subplots()
    image = axes.imshow(_past(inside.attention[layer, head]), cmap=FADE, vmin=0, vmax=1)
    axes.set_xticks(range(len(pieces)), pieces, rotation=90, parse_math=False)
    axes.set_yticks(range(len(pieces)), pieces, parse_math=False)
    axes.set(xlabel="token that is read from", ylabel="token that reads", title=f"block {layer + 1}, head {head + 1}")
    axes.grid(False)
    figure.colorbar(image, ax=axes, label="share of attention", shrink=0.8)


def _all_heads(figure: Figure, inside: Inside) -> None:
    blocks, heads = inside.attention.shape[:2]
    panels = figure.subplots(blocks, heads, squeeze=False)
    for layer in range(blocks):
        for head in range(heads):
            axes = panels[layer, head]
            axes.imshow(_past(inside.attention[layer, head]), cmap=FADE, vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[], title=f"block {layer + 1}, head {head + 1}")
            axes.grid(False)


def _lens(figure: Figure, inside: Inside, pieces: list[str], tokenizer: Tokenizer) -> None:
    axes = figure.subplots()
    best = inside.probabilities.max(-1)
    shown = min(16, len(pieces))
    image = axes.imshow(best.values[:, -shown:].numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for level, row in enumerate(best.indices[:, -shown:].tolist()):
        for place_, token in enumerate(row):
            dark = float(best.values[level, len(pieces) - shown + place_]) > 0.6
            axes.text(place_, level, readable(tokenizer.pieces(token)), ha="center", va="center", fontsize=8,
                      color="white" if dark else "black", parse_math=False)  # fmt: skip
    names = ["embedding", *(f"after block {n}" for n in range(1, len(best.values)))]
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks(range(shown), pieces[-shown:], rotation=60, parse_math=False)
    axes.set(xlabel="token that is read; in the boxes, the likeliest token to follow it")
    axes.grid(False)
    figure.colorbar(image, ax=axes, label="probability")


def _positions_loss(figure: Figure, losses: np.ndarray, name: str) -> None:
    axes = figure.subplots()
    windows, length = losses.shape
    # Neighbours together, the further on the more of them: single places are noise.
    ends = np.unique(np.geomspace(1, length, 14).round().astype(int))
    groups = np.split(losses, ends[:-1], axis=1)
    middle = [(first + 1 + last) / 2 for first, last in itertools.pairwise([0, *ends])]
    mean = np.array([group.mean() for group in groups])
    error = np.array([group.mean(1).std(ddof=1) for group in groups]) / windows**0.5 if windows > 1 else np.nan
    axes.fill_between(middle, mean - 1.96 * error, mean + 1.96 * error, color=BLUE, alpha=0.2, linewidth=0)
    axes.plot(middle, mean, ".-", color=BLUE)
    axes.set(ylabel="loss (nats/token)", title=f"mean of {windows} windows of {name}; band: 95 %")
    log_x(axes, "tokens read so far")


def _positions(figure: Figure, model: TinyLM) -> None:
    distance, pairs = parts(figure)
    alike = position_similarity(model)
    image = pairs.imshow(alike, cmap="RdBu", vmin=-1, vmax=1)
    pairs.set(xlabel="position", ylabel="position", title=f"position: {model.config.position}")
    pairs.grid(False)
    pairs.figure.colorbar(image, ax=pairs, label="cosine", location="bottom", aspect=30, ticks=(-1, -0.5, 0, 0.5, 1))
    distance.plot([np.diagonal(alike, -d).mean() for d in range(len(alike))], color=COLOURS[1])
    distance.axhline(0, color=GREY, linewidth=0.8)
    distance.set(xlabel="distance (tokens)", ylabel="how alike, on average (cosine)", ylim=(-1.05, 1.05))


def _cache(figure: Figure, model: TinyLM) -> None:
    axes = figure.subplots()
    config, lengths = model.config, np.arange(0, model.config.max_seq_len + 1)
    shares = [h for h in range(1, config.num_heads + 1) if config.num_heads % h == 0]
    for number, heads in enumerate(shares):
        size = [counts.kv_cache_bytes(config.replace(num_kv_heads=heads), 1, int(n)) / 1e3 for n in lengths]
        kind = {config.num_heads: "multi-head", 1: "multi-query"}.get(heads, "grouped-query")
        own = heads == config.num_kv_heads
        axes.plot(lengths, size, color=COLOURS[number % len(COLOURS)], linewidth=2.6 if own else 1.2,
                  label=f"{heads} of {config.num_heads} heads: {kind}{' (this model)' if own else ''}")  # fmt: skip
    axes.set(xlabel="tokens so far", ylabel="keys and values kept (kB, fp32, one text)",
             title=f"for comparison: the weights take {4 * counts.parameters(config)['total'] / 1e3:,.0f} kB")  # fmt: skip
    axes.legend(loc="upper left")
