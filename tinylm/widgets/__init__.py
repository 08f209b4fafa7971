"""Parts for notebooks to play with, each usable alone in one line. The only package that knows the screen.

A panel works in a thread of its own, so that the kernel stays free; running its cell again ends what the earlier panel
was doing. Saved or converted without widgets, a panel shows as a picture.
"""

from __future__ import annotations

from tinylm.widgets.ablations import AblationsPanel, ablations_panel
from tinylm.widgets.generation import GenerationPanel, draw_filters, generation_panel
from tinylm.widgets.inside import InsidePanel, inside_panel
from tinylm.widgets.laws import LawsPanel, laws_panel
from tinylm.widgets.models import find_model, load_or_train, own_manual, small_model
from tinylm.widgets.own_text import TextPanel, text_panel
from tinylm.widgets.training import TrainingPanel, training_panel

__all__ = [
    "AblationsPanel",
    "GenerationPanel",
    "InsidePanel",
    "LawsPanel",
    "TextPanel",
    "TrainingPanel",
    "ablations_panel",
    "draw_filters",
    "find_model",
    "generation_panel",
    "inside_panel",
    "laws_panel",
    "load_or_train",
    "own_manual",
    "small_model",
    "text_panel",
    "training_panel",
]
