"""The panel that looks inside a model, without a browser."""

from __future__ import annotations

import html
import re
import time

import pytest

from tinylm import widgets
from tinylm.config import ModelConfig
from tinylm.model import TinyLM
from tinylm.tokenizer import Tokenizer
from tinylm.widgets.inside import VIEWS

PNG = b"\x89PNG\r\n\x1a\n"


def until(holds, seconds=20.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture
def panel(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question.\n" * 40)
    shape = ModelConfig(vocab_size=256, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=32)
    made = widgets.inside_panel(TinyLM(shape).eval(), Tokenizer.train([], "byte", 256), "to $be_{", text)
    yield made
    made.close()


def test_every_view_is_a_picture_of_its_own(panel):
    seen = set()
    for view in VIEWS:
        panel.view.value = view
        until(lambda: panel._drawer is None)
        assert bytes(panel.picture.value).startswith(PNG)
        seen.add(bytes(panel.picture.value))
        assert VIEWS[view] in html.unescape(panel.words.value)
        assert panel.layer.disabled == panel.head.disabled == (view != "attention")
    assert len(seen) == len(VIEWS)
    assert "image/png" in panel._repr_mimebundle_()


def test_block_head_and_text_change_the_map(panel):
    seen = [bytes(panel.picture.value)]
    for control, value in ((panel.layer, 2), (panel.head, 3), (panel.prompt, "or not")):
        control.value = value
        until(lambda: panel._drawer is None)
        seen.append(bytes(panel.picture.value))
    assert len(set(seen)) == 4
    panel.prompt.value = ""
    until(lambda: panel._drawer is None)
    assert "at least one token" in re.sub("<[^>]*>", "", panel.status.value)
    panel.prompt.value = "x" * 500  # more than the window: its head is looked at
    until(lambda: panel._drawer is None)
    assert panel.inside.attention.shape == (2, 4, 32, 32)
