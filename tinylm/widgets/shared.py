"""What all panels share: their place in a notebook, work in the background, words, pictures and controls.

A panel's work runs in one thread of its own, which asks ``is_stopping`` between steps; it is a daemon, so that a closed
kernel leaves nothing behind, and is asked to end first, since a process that cuts torch off in a thread aborts. A second
thread draws, and ends when the picture is up to date. Saved or converted without widgets, a panel shows as its picture.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import html
import io
import re
import threading
import time
import weakref
from collections.abc import Callable, Sequence

import ipywidgets
import matplotlib as mpl
from IPython import get_ipython
from matplotlib import font_manager, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tinylm.errors import LabError
from tinylm.words import quantity

BLUE, ORANGE, GREY = "#1E88E5", "#D55E00", "#808080"
COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A6FDF", "#A0764A")  # legible on light and dark
PAGE = (
    "white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.7;font-family:var(--jp-content-font-family,serif);"
    "font-size:15px;color:var(--jp-content-font-color1,inherit);min-height:3em;padding:6px 10px;"
    "border:1px solid var(--jp-border-color2,#808080);border-radius:4px"
)
SMALL = "font-size:13px;line-height:1.5;color:var(--jp-content-font-color1,inherit)"
LEFT = 0.6  # of the width of a picture of two parts
# The same picture stands on the page twice: a wide one hides the second, a narrow one shows a part of it in each.
_PARTS = f"""<style>
.tinylm-picture {{container-type: inline-size}}
.tinylm-again {{display: none}}
@container (max-width: 620px) {{
  .tinylm-parts > div {{display: flex; overflow: hidden !important}}
  .tinylm-parts img {{flex: none; min-width: 0 !important; max-width: none; width: {100 / LEFT:.4f}% !important}}
  .tinylm-parts > .tinylm-again img {{margin-left: -100%}}
}}
</style>"""
_ON_ANY_GROUND = {
    **{f"{part}.color": GREY for part in ("text", "xtick", "ytick")},
    **{"axes.labelcolor": GREY, "axes.edgecolor": GREY, "axes.titlecolor": GREY, "axes.grid": True},
    **{"grid.color": GREY, "grid.alpha": 0.25, "grid.linewidth": 0.6, "axes.axisbelow": True},
    **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.size": 9},
    **{"axes.titlesize": 9.5, "legend.fontsize": 8.5, "axes.prop_cycle": mpl.cycler(color=COLOURS)},
}

MACHINE = threading.Lock()  # one training or measurement at a time in a kernel: they would disturb each other
DRAWING = threading.Lock()  # matplotlib's settings and fonts belong to the whole process
LAST_SECONDS = 4.0  # that threads have to end when the kernel does; Jupyter waits five before it kills
_panels: weakref.WeakSet[Panel] = weakref.WeakSet()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def in_background(work: Callable, *given: object) -> threading.Thread:
    """Start work(*given) in a daemon thread, which is waited for at the end of the process."""
    thread = threading.Thread(target=work, args=given, daemon=True)
    _threads.add(thread)
    thread.start()
    return thread


@atexit.register
def end_all() -> None:
    """End the work of all panels as for one that takes their place, let none draw any more, and wait for it a moment."""
    until = time.monotonic() + LAST_SECONDS
    for panel in list(_panels):
        panel.is_closed = True  # so that work which ends now begins no drawing, nor what is measured for one
        with contextlib.suppress(Exception):  # a page that is gone takes no more words
            panel.make_room()
    for thread in list(_threads):
        with contextlib.suppress(RuntimeError):  # one that was made and has not begun cannot be waited for
            thread.join(max(0.0, until - time.monotonic()))


class Panel(ipywidgets.VBox):
    """A part of a page: controls, a status line, a picture, and work in the background.

    same: what it works on; where a notebook does not say which cell runs, a later panel of the kind on the same thing
    stops this one. A subclass has ``draw()``, which sets ``picture.value``, and says with ``ready`` which buttons start
    and stop its work.
    """

    def __init__(self, same: object):
        super().__init__(layout=ipywidgets.Layout(width="auto", max_width="1000px"))
        self.same = same
        self.cell = self.execution = None
        self.is_running = self.is_closed = False
        self.status = ipywidgets.HTML()
        self.picture = ipywidgets.Image(format="png", layout={"width": "100%", "min_width": "640px"})
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._lock = threading.RLock()
        self._drawer: threading.Thread | None = None
        self._outdated = self._is_complaining = False

    def shown_picture(self) -> ipywidgets.Box:
        """The picture. A narrow page scrolls it, or shows the parts of one that has two (see ``in_parts``, ``parts``) below
        one another."""
        left, right = (ipywidgets.Box([self.picture], layout={"overflow": "auto hidden"}) for _ in range(2))
        right.add_class("tinylm-again")
        self._shown = ipywidgets.VBox([ipywidgets.HTML(_PARTS, layout={"display": "none"}), left, right])
        return self._shown.add_class("tinylm-picture")

    def in_parts(self, is_so: bool = True) -> None:
        """Whether the picture is one of two parts, as ``parts`` cuts a figure."""
        self._shown.add_class("tinylm-parts") if is_so else self._shown.remove_class("tinylm-parts")

    # Work in the background.

    def begin(self, work: Callable, *given) -> bool:
        """Run work(*given) in a thread, and say the words that it returns; does nothing while something runs."""
        with self._lock:
            if self.is_running:
                return False
            self.is_running = True
            self._stop.clear()
            self.ready(False)
            self._thread = in_background(self._work, work, given)
        return True

    def _work(self, work: Callable, given: tuple) -> None:
        try:
            outcome = work(*given)
        except Exception as error:
            outcome = error
        with self._lock:
            self._complain(outcome) if isinstance(outcome, Exception) else self._say(outcome or "")
            self.is_running = False
            self.ready(True)

    def ready(self, is_ready: bool) -> None:
        """Put the buttons into the state for starting (True) or for work that goes on (False)."""

    def is_stopping(self) -> bool:
        return self._stop.is_set()

    def stop(self) -> None:
        """End what is going on at its next step; says so at once."""
        with self._lock:  # the thread has its last word under the same lock, so this one never comes after it
            if self.is_running:
                self._say("stopping …")
                self._stop.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the work to end; whether it has."""
        if self._thread is None:
            return True
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def make_room(self) -> None:
        """End what is going on, for a panel that takes this one's place."""
        self.stop()

    def close(self) -> None:
        """End what is going on and take the panel off the screen."""
        self.make_room()
        self.is_closed = True
        self._stop.set()
        _panels.discard(self)
        for part in within(self):
            if part is not self:
                part.close()
        super().close()

    # Words.

    def _say(self, words: str) -> None:
        self.status.value = f"<span role='status' class='tinylm-status'>{html.escape(words)}</span>"

    def _progress(self, words: str) -> None:
        """Say something in the middle of the work, but never over a stop that was acknowledged."""
        with self._lock:
            if self.is_running and not self._stop.is_set():
                self._say(words)

    def _complain(self, error: Exception) -> None:
        self.status.value = (
            f"<span role='alert' class='tinylm-status' style='border-left:4px solid {ORANGE};padding-left:8px'>"
            f"{html.escape(in_words(error))}</span>"
        )

    # The picture.

    def redraw(self, _change: object = None) -> None:
        """Draw soon, in a thread that ends when the picture is up to date: a slider may ask faster than one draws."""
        with self._lock:
            self._outdated = True
            if self._drawer is None and not self.is_closed:
                self._drawer = in_background(self._keep_drawing)

    def _keep_drawing(self) -> None:
        while True:
            with self._lock:
                if not self._outdated or self.is_closed:
                    self._drawer = None
                    return
                self._outdated = False
            self._try_to_draw()

    def _try_to_draw(self) -> None:
        """Draw; say what is wrong where that cannot be done, until it can."""
        try:
            self.draw()
            if self._is_complaining and not self.is_running:
                self._say("")
            self._is_complaining = False
        except Exception as error:
            self._is_complaining = True
            self._complain(error)

    def draw(self) -> None:
        raise NotImplementedError

    def _repr_mimebundle_(self, **options) -> dict:
        picture = {"image/png": base64.b64encode(self.picture.value).decode()} if self.picture.value else {}
        return {**super()._repr_mimebundle_(**options), **picture}


def place(kind: type[Panel], *given, same: object) -> Panel:
    """Make a panel in the notebook cell that is running. What an earlier run of that cell made is closed; where the
    notebook does not tell, an earlier panel of the kind on the same thing is stopped."""
    cell, execution = running_cell()
    for older in list(_panels):
        same_place = older.cell == cell if cell else type(older) is kind and _is_same(older.same, same)
        if same_place and (execution is None or older.execution != execution):
            older.close() if cell else older.make_room()
    panel = kind(*given)
    panel.cell, panel.execution = cell, execution
    _panels.add(panel)
    return panel


def _is_same(one: object, other: object) -> bool:
    return one is other or (isinstance(one, str) and one == other)


def take_machine(is_stopping: Callable[[], bool], say: Callable[[str], None]) -> bool:
    """Wait for ``MACHINE``, which the caller releases; False where a stop came first."""
    while not MACHINE.acquire(timeout=0.1):
        say("waiting for another training or measurement in this kernel …")
        if is_stopping():
            return False
    return True


def running_cell() -> tuple[str | None, str | None]:
    """Which notebook cell is running, and which run of it; None outside a kernel or where the page does not say."""
    kernel = getattr(get_ipython(), "kernel", None)
    parent = kernel.get_parent() if kernel is not None else {}
    return parent.get("metadata", {}).get("cellId"), parent.get("header", {}).get("msg_id")


def in_words(error: Exception) -> str:
    return str(error) if isinstance(error, LabError) else f"{type(error).__name__}: {error}"


# ------------------------------------------------------------------------------------------------------------ controls


def knob(
    kind: type[ipywidgets.Widget], name: str, tooltip: str, unit: str = "", label_width: int = 130, **options
) -> ipywidgets.Widget:
    """A control with its name and unit before it, as wide as its place."""
    return kind(
        description=f"{name} ({unit})" if unit else name,
        tooltip=tooltip,
        style={"description_width": f"{label_width}px"},
        layout={"width": "auto", "min_width": f"{label_width + 150}px"},
        **options,
    )


def choice(name: str, tooltip: str, options: Sequence, value: object, label_width: int = 130) -> ipywidgets.Widget:
    """A few names as buttons, one of them pressed."""
    made = ipywidgets.ToggleButtons(
        description=name,
        options=options,
        value=value,
        tooltip=tooltip,
        tooltips=[tooltip] * len(options),
        style={"description_width": f"{label_width}px", "button_width": "auto"},
        layout={"width": "auto"},
    )
    made.add_class("widget-inline-hbox")  # the name stands before the buttons, as with sliders, not above them
    return made


def offer(widget: ipywidgets.Widget, options: Sequence) -> None:
    """Change what a selection offers. It keeps its value, or takes the nearest number where that is gone."""
    values = [option[1] if isinstance(option, tuple) else option for option in options]
    if list(widget.options) == list(options):
        return
    value = widget.value
    if value not in values:
        value = min(values, key=lambda number: abs(number - value))
    widget.options = options
    widget.value = value


def button(words: str, icon: str, primary: bool = False, disabled: bool = False) -> ipywidgets.Button:
    return ipywidgets.Button(description=words, icon=icon, button_style="primary" if primary else "", disabled=disabled)


def grid(children: Sequence[ipywidgets.Widget], width: int = 340) -> ipywidgets.GridBox:
    """Controls side by side, as many as the page has room for."""
    columns = f"repeat(auto-fit, minmax(min({width}px, 100%), 1fr))"
    return ipywidgets.GridBox(
        list(children),
        layout=ipywidgets.Layout(
            grid_template_columns=columns, grid_gap="0 24px", align_items="center", overflow="visible"
        ),
    )


def beside(*children: ipywidgets.Widget) -> ipywidgets.HBox:
    return ipywidgets.HBox(children, layout=ipywidgets.Layout(flex_flow="row wrap", align_items="center"))


def within(widget: ipywidgets.Widget) -> list[ipywidgets.Widget]:
    """A widget and all that it holds."""
    return [widget, *(inner for child in getattr(widget, "children", ()) for inner in within(child))]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A small HTML table of plain words; a narrow page scrolls it, and not all that stands around it (hence the width)."""
    cells = "".join(f"<th style='text-align:left;padding:1px 12px 1px 0'>{html.escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>"
        + "".join(f"<td style='padding:1px 12px 1px 0;white-space:nowrap'>{html.escape(str(c))}</td>" for c in row)
        + "</tr>"
        for row in rows
    )
    return f"<div style='overflow-x:auto;width:0;min-width:100%;{SMALL}'><table><tr>{cells}</tr>{body}</table></div>"


# ------------------------------------------------------------------------------------------------------------ pictures


def png(draw: Callable[[Figure], object], size: tuple[float, float], paper: bool = False, dpi: int = 110) -> bytes:
    """What ``draw(figure)`` draws, as PNG. size in inches. Without ``paper`` the ground is clear and words are grey, for light
    and dark pages alike; with it the ground is white, as the studies' own figures need it."""
    with DRAWING, mpl.rc_context({} if paper else _ON_ANY_GROUND):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=dpi, transparent=not paper)
        return out.getvalue()


def parts(figure: Figure) -> tuple[Axes, Axes]:
    """The axes of a picture of two parts, the left one ``LEFT`` of its width."""
    left, right = figure.subfigures(1, 2, width_ratios=(LEFT, 1 - LEFT))
    return left.subplots(), right.subplots()


def log_x(axes: Axes, label: str) -> None:
    """A logarithmic x axis with few, round ticks in words (10k, 2M)."""
    axes.set_xscale("log")
    axes.set_xlabel(label)
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: quantity(value)))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())


def wait_for(axes: Axes, words: str) -> None:
    """Say what will stand in a place that is still empty."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, words, ha="center", va="center", color=GREY, transform=axes.transAxes)


def draw_curve(axes: Axes, curve: list[dict], name: str, colour: str, label: str = "", dashes: str = "-") -> None:
    """The points of a run's curve, ``name`` against tokens. The last evaluation scores more text than those before it and
    stands apart, as a star."""
    points = [(point["tokens"], point[name]) for point in curve if point[name] is not None]
    if not points:
        return
    apart = len(curve) > 1 and curve[-1]["scored_tokens"] > curve[-2]["scored_tokens"]
    axes.plot(*zip(*(points[:-1] if apart else points), strict=True), dashes, marker=".", color=colour, label=label)
    if apart:
        axes.plot(*points[-1], "*", color=colour, markersize=11)


def readable(piece: str) -> str:
    """A piece as a label: spaces and newlines visible, a byte as the sign that it is, and no character that the figures'
    font lacks."""
    piece = re.sub(r"<0x([2-7][0-9A-F])>", lambda byte: chr(int(byte[1], 16)), piece.replace("<0x0A>", "⏎"))
    piece = piece.replace("▁", "␣").replace(" ", "␣").replace("\n", "⏎")
    return "".join(char if ord(char) in _GLYPHS else "□" for char in piece)


_GLYPHS = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
