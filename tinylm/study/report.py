"""A study's report: what a notebook shows as it runs is what README.md says afterwards.

Every piece goes to three places at once: the notebook's output, the README, and a file of its own (CSV, SVG and PNG). Numbers
reach the text through f-strings over tables, never by hand.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from tinylm.files import write_whole
from tinylm.study import plots

# Headings of the columns whose names say too little, or no unit.
HEADINGS = {
    "budget": "FLOPs",
    "params": "parameters",
    "params_opt": "best size (parameters)",
    "params_low": "from",
    "params_high": "to",
    "tokens_opt": "its tokens",
    "loss_min": "loss (nats/token)",
    "loss": "loss (nats/token)",
    "val_loss": "loss (nats/token)",
    "inside": "inside the family",
    "low": "from",
    "high": "to",
    "batch_size": "windows a step",
    "reach": "reach (times the largest run fitted)",
    "half_size_costs": "half the size costs",
    "double_size_costs": "twice the size costs",
    "seed_sd": "sd of seeds",
    "params_total": "parameters",
    "unique_tokens": "distinct tokens",
    "more_seeds": "seeds that would decide",
}


class Report:
    """Collects text, tables and figures of a study in ``folder`` and writes them as README.md."""

    def __init__(self, folder: Path, title: str):
        self.folder = Path(folder)
        self.title, self.pieces, self.first = title, [], ""

    def section(self, title: str) -> None:
        """A heading of the README; the notebook has headings of its own."""
        self.pieces.append(f"## {title}")

    def summary(self, markdown: str) -> None:
        """What stands first in the README, though it is known last."""
        from IPython.display import Markdown, display

        self.first = markdown
        display(Markdown(markdown))

    def text(self, markdown: str) -> None:
        """A paragraph, heading or list in Markdown."""
        from IPython.display import Markdown, display

        self.pieces.append(markdown.strip())
        display(Markdown(markdown))

    def table(self, frame: pd.DataFrame, name: str, caption: str, /, **formats: str) -> None:
        """A table: whole as tables/<name>.csv, rounded in the text. ``formats`` are format specs by column, such as
        ``params_total=",.0f"``; only the columns they name are shown, under headings that a person reads."""
        write_table(self.folder / "tables" / f"{name}.csv", frame)
        shown = frame[list(formats)] if formats else frame
        specs = [formats.get(column, "") for column in shown.columns]
        rows = [
            [_cell(*pair) for pair in zip(row, specs, strict=True)] for row in shown.itertuples(index=False, name=None)
        ]
        heads = [HEADINGS.get(column, str(column).replace("_", " ")) for column in shown.columns]
        sides = [" :--- |" if formats.get(column) == "" else " ---: |" for column in shown.columns]
        lines = [f"| {' | '.join(heads)} |", "|" + "".join(sides)]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        self.text("\n".join(lines) + f"\n\n*{caption}* ([{name}.csv](tables/{name}.csv))")

    def figure(self, name: str, caption: str, draw: Callable[..., object], size=(7.0, 4.3), panels: int = 1) -> None:
        """A figure drawn by ``draw(ax)`` (or ``draw(axes)`` for several panels side by side), as figures/<name>.svg and .png."""
        from IPython.display import Image, display

        with plots.style():
            figure = Figure(figsize=size, layout="constrained")
            axes = figure.subplots(1, panels)
            draw(axes)
            picture = {}
            for kind in ("svg", "png"):
                buffer = io.BytesIO()
                # No date in the file: the same records give the same bytes.
                figure.savefig(
                    buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None}
                )
                picture[kind] = buffer.getvalue()
                write_whole(self.folder / "figures" / f"{name}.{kind}", picture[kind])
        self.pieces.append(f"![{caption}](figures/{name}.png)\n\n*{caption}* ([{name}.svg](figures/{name}.svg))")
        display(Image(picture["png"], width=int(size[0] * 100), alt=caption))

    def write(self) -> Path:
        """Write README.md from all pieces so far."""
        return write_whole(
            self.folder / "README.md", "\n\n".join(filter(None, [f"# {self.title}", self.first, *self.pieces])) + "\n"
        )


def write_table(path: Path, frame: pd.DataFrame) -> Path:
    """A table as CSV that pandas, polars and spreadsheets open as it is: numbers to ten digits, those of a column of floats
    all written as such (polars guesses a column's type from its first hundred rows), and the mark by which Excel knows
    UTF-8 where there is more than ASCII."""
    text = frame.to_csv(index=False, float_format=_as_float)
    return write_whole(path, text.encode("ascii" if text.isascii() else "utf-8-sig"))


def _as_float(value: float) -> str:
    text = f"{value:.10g}"
    return text if set(text) & set(".en") else text + ".0"  # 1.5, 1e+11, inf, nan


def _cell(value: object, spec: str) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    return format(value, spec).replace("|", "\\|")


def interval(low: float, high: float, spec: str = ".3f") -> str:
    """A 95 % interval in words: "1.234 to 1.345"."""
    if low != low or high != high:
        return "interval not known"
    return f"{format(low, spec)} to {format(high, spec)}"
