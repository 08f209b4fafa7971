"""The panels without a browser: what the buttons do, what the page would show, and that nothing is left running."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import ipywidgets
import nbformat
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from nbconvert import HTMLExporter

from tinylm import decoding, widgets
from tinylm.checkpoint import save_model
from tinylm.config import GenerateConfig, ModelConfig
from tinylm.generate import STAGES, TokenOut, filter_logits, generate
from tinylm.model import TinyLM
from tinylm.tokenizer import Tokenizer
from tinylm.widgets import generation, models, shared

PNG = b"\x89PNG\r\n\x1a\n"
TOKENIZER = Tokenizer.train([], "byte", 256)


def small(seed=0):
    config = ModelConfig(vocab_size=256, hidden_size=32, num_layers=1, num_heads=2, max_seq_len=32, init_std=0.1)
    return TinyLM(config, seed=seed).eval()


@pytest.fixture
def panel():
    made = widgets.generation_panel(small(), TOKENIZER, prompt="to be")
    yield made
    made.close()
    assert made.wait(5)


@pytest.fixture
def slow_panel(panel, monkeypatch):
    """A panel whose model takes 20 ms a token, so that it can be caught in the act."""
    step = decoding.Step.__call__
    monkeypatch.setattr(decoding.Step, "__call__", lambda *given: (time.sleep(0.02), step(*given))[1])
    panel.max_new_tokens.value = 2000
    return panel


def words(widget):
    return html.unescape(re.sub(r"<[^>]*>", "", widget.value))


def until(holds, seconds=5.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_the_button_writes_what_the_controls_say(panel):
    panel.temperature.value, panel.top_k.value, panel.top_p.value = 0.7, 20, 0.9
    panel.repetition_penalty.value, panel.max_new_tokens.value, panel.seed.value = 1.2, 50, 7
    config = GenerateConfig(
        temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.2, max_new_tokens=50, seed=7
    )  # fmt: skip
    assert panel.config == config
    panel.generate_button.click()
    assert panel.wait(20)
    assert words(panel.text) == "to be" + generate(panel.model, TOKENIZER, "to be", config).text
    assert re.fullmatch(r"done: 50 tokens in [\d.]+ s, [\d,]+ tokens/s", words(panel.status))
    assert not panel.generate_button.disabled and panel.stop_button.disabled


def test_several_samples_stand_side_by_side_each_of_its_own_seed(panel):
    panel.samples.value, panel.max_new_tokens.value, panel.seed.value = 3, 20, 5
    panel.start()
    assert panel.wait(20) and words(panel.status).startswith("done: 60 tokens")
    pages = re.findall(r"<form [^>]*class='tinylm-text'[^>]*>(.*?)</form>", panel.text.value, re.DOTALL)
    texts = [html.unescape(re.sub(r"<[^>]*>", "", page)) for page in pages]
    config = panel.config
    assert texts == [
        "to be" + generate(panel.model, TOKENIZER, "to be", config.replace(seed=5 + n)).text for n in range(3)
    ]
    assert len(set(texts)) == 3


def test_controls_start_at_the_defaults(panel):
    assert panel.config == GenerateConfig()


def test_text_streams_while_the_caller_goes_on_and_stops_within_a_second(slow_panel):
    began = time.monotonic()
    slow_panel.generate_button.click()
    assert time.monotonic() - began < 0.5 and slow_panel.is_running
    assert slow_panel.generate_button.disabled and not slow_panel.stop_button.disabled
    until(lambda: "tokens/s" in words(slow_panel.status))
    first = words(slow_panel.text)
    until(lambda: len(words(slow_panel.text)) > len(first))
    assert words(slow_panel.text).startswith(first)  # what was shown stays
    began = time.monotonic()
    slow_panel.stop_button.click()
    assert slow_panel.wait(1) and time.monotonic() - began < 1
    count = int(re.match(r"stopped after (\d+) tokens", words(slow_panel.status))[1])
    assert 0 < count < 2000
    assert not slow_panel.generate_button.disabled and slow_panel.stop_button.disabled


def test_stop_is_acknowledged_before_the_next_token(panel, monkeypatch):
    hold = threading.Event()
    forward = panel.model.forward
    monkeypatch.setattr(panel.model, "forward", lambda ids, cache: (hold.wait(5), forward(ids, cache))[1])
    panel.start()
    panel.stop()
    assert words(panel.status) == "stopping …"
    hold.set()
    assert panel.wait(5)


def test_a_second_press_starts_no_second_text(slow_panel):
    slow_panel.start()
    thread, count = slow_panel._thread, threading.active_count()
    slow_panel.start()
    slow_panel.generate_button.click()
    assert slow_panel._thread is thread and threading.active_count() == count
    slow_panel.stop()
    assert slow_panel.wait(1)
    slow_panel.start()
    assert slow_panel._thread is not thread


def test_an_error_is_told_in_words_and_the_panel_goes_on(panel, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(panel.model, "forward", lambda ids, cache: 1 / 0)
        panel.start()
        assert panel.wait(5)
    assert words(panel.status) == "ZeroDivisionError: division by zero"
    assert not panel.generate_button.disabled and panel.stop_button.disabled
    panel.start()
    assert panel.wait(20) and words(panel.status).startswith("done: 200 tokens")


def test_a_model_that_cannot_speak_says_so_instead_of_a_traceback():
    broken = small()
    with torch.no_grad():
        broken.embedding.weight.fill_(float("nan"))
    panel = widgets.generation_panel(broken, TOKENIZER)
    assert "finite logits" in words(panel.status) and "Way out" in words(panel.status)
    assert "image/png" not in panel._repr_mimebundle_()
    assert "tokenizer" in words(widgets.generation_panel(small(), None).status)


def test_a_prompt_that_cannot_be_read_says_so_until_it_is_mended(panel):
    panel.prompt.value = "\ud800"
    until(lambda: "lone surrogate" in words(panel.status) and panel._drawer is None)
    panel.prompt.value = "to be"
    until(lambda: words(panel.status) == "" and panel._drawer is None)


def test_the_figure_follows_each_filter_and_the_prompt(panel):
    seen = [bytes(panel.picture.value)]
    assert seen[0].startswith(PNG)
    changes = [(panel.temperature, 0.3), (panel.top_k, 3), (panel.top_p, 0.5), (panel.repetition_penalty, 1.5)]
    for control, value in [*changes, (panel.prompt, "or not")]:
        control.value = value
        until(lambda: bytes(panel.picture.value) != seen[-1] and panel._drawer is None)
        seen.append(bytes(panel.picture.value))
    assert len(set(seen)) == 6
    panel.seed.value = 5  # draws other tokens from the same distribution
    assert panel._drawer is None


def test_a_dragged_slider_skips_pictures_but_not_the_last(panel, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        generation, "draw_filters", lambda stages, config, piece: (time.sleep(0.02), drawn.append(config))[0]
    )
    for step in range(40):
        panel.temperature.value = step / 20
    until(lambda: panel._drawer is None)
    assert drawn[-1].temperature == pytest.approx(39 / 20)
    assert len(drawn) < 40


@pytest.fixture
def notebook(monkeypatch):
    """Pretend to be in a notebook: (cell id, number of its run)."""
    place = ["a", 1]
    monkeypatch.setattr(shared, "running_cell", lambda: tuple(place))
    return place


def test_running_the_cell_again_ends_the_earlier_panel_and_no_other(notebook, monkeypatch):
    model = small()
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, cache: (time.sleep(0.02), forward(ids, cache))[1])
    panels = [widgets.generation_panel(model, TOKENIZER) for _ in range(2)]  # two in one cell
    notebook[0] = "b"
    panels.append(widgets.generation_panel(model, TOKENIZER))
    for panel in panels:
        panel.max_new_tokens.value = 2000
        panel.start()
    assert all(panel.is_running for panel in panels)
    notebook[:] = "a", 2
    again = widgets.generation_panel(model, TOKENIZER)
    assert panels[0].wait(1) and panels[1].wait(1)
    assert panels[0].comm is None and panels[0].temperature.comm is None
    assert panels[2].is_running
    for panel in (*panels, again):
        panel.close()
        assert panel.wait(1)


def test_without_a_cell_a_new_panel_stops_the_models_earlier_one(slow_panel):
    slow_panel.start()
    widgets.generation_panel(slow_panel.model, TOKENIZER).close()
    assert slow_panel.wait(1)


def test_work_that_the_end_of_the_process_stops_begins_no_drawing():
    """A thread begun then is not waited for, and one that computes would abort the process."""
    drawn = []

    class Drawn(shared.Panel):
        def ready(self, is_ready):
            if is_ready:
                self.redraw()

        def draw(self):
            drawn.append(threading.current_thread())

    made = shared.place(Drawn, None, same=None)
    assert made.begin(lambda: "ended" if made._stop.wait(5) else "")
    shared.end_all()
    assert not made.is_running and made._drawer is None and not drawn


def test_saved_without_widgets_a_panel_is_a_picture(panel):
    bundle = panel._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]) == panel.picture.value
    assert "application/vnd.jupyter.widget-view+json" in bundle
    # As a page, which has no state of widgets to draw from.
    shown = nbformat.v4.new_output("display_data", data=bundle)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("panel", outputs=[shown])])
    page, _ = HTMLExporter().from_notebook_node(notebook)
    assert re.search(r'<img[^>]*src="data:image/png;base64,', page) and bundle["image/png"][:60] in page


def token(text, probability, *alternatives):
    return TokenOut(0, text, probability, list(alternatives))


def strength(span):
    return float(re.search(r"rgba\([\d, ]+, ([\d.]+)\)", span)[1])


def test_the_less_likely_the_stronger():
    strengths = [strength(generation._span([token("x", p)])) for p in (1.0, 0.5, 0.1, 0.01, 0.001, 0.0)]
    assert strengths[0] == 0 and strengths == sorted(strengths) and strengths[-1] == strengths[-2] == 0.65


def test_a_token_tells_its_alternatives_and_cannot_break_the_page():
    span = generation._span([token('<b a="1">&', 0.25, (1, "▁the", 0.5), (2, '"<0x0A>', 0.0123))])
    title = html.unescape(re.search(r'title="([^"]*)"', span)[1])
    assert title == 'probability 25 %\nlikeliest: ␣the 50 %, "⏎ 1.2 %'
    assert html.unescape(re.sub(r"<[^>]*>", "", span)) == '<b a="1">&'
    assert span.count("<") == 3  # the label, its button and its end


def test_a_piece_is_readable_as_a_label():
    assert [shared.readable(piece) for piece in ("▁the", "<0x0A>", "<0x2D>", "<0x20>", "<0xE6>", "a\nb")] == [
        "␣the", "⏎", "-", "␣", "<0xE6>", "a⏎b"
    ]  # fmt: skip


def test_the_bytes_of_a_character_are_one_span():
    span = generation._span([token("", 0.5), token("é", 0.5)])
    assert "25 % (2 tokens for this character)" in span and span.endswith(">é</label>")


class _Page(HTMLParser):
    """What a keyboard meets on a page: for each form its attributes and, for each radio button in it, the button's
    attributes and those of the label around it."""

    def __init__(self, text):
        super().__init__()
        self.forms, self.label = [], {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "form":
            self.forms.append((dict(attrs), []))
        elif tag == "label":
            self.label = dict(attrs)
        elif tag == "input":
            self.forms[-1][1].append((dict(attrs), self.label))


def test_the_keyboard_reaches_the_alternatives_of_every_token(panel):
    panel.samples.value, panel.max_new_tokens.value = 2, 20
    panel.start()
    assert panel.wait(20)
    page = _Page(panel.text.value)
    assert len(page.forms) == 2  # each text is one stop of the Tab key: radio buttons of one name in one form
    for form, tokens in page.forms:
        assert form["method"] == "dialog"  # Enter sends it nowhere
        assert len(tokens) > 10 and {button["type"] for button, _ in tokens} == {"radio"}
        assert len({button["name"] for button, _ in tokens}) == 1
        assert all("likeliest: " in label["title"] for _, label in tokens)
    styles = "".join(part.value for part in shared.within(panel) if isinstance(part, ipywidgets.HTML))
    assert ".tinylm-text label:focus-within::after{content:attr(title)" in styles  # shown without a pointer


def test_the_figure_copes_with_any_vocabulary():
    """Signs that the font lacks, dollar signs (which would be read as formulae), fewer tokens than rows, and ties."""
    pieces = ["$x", "日本", "▁", "<0x0A>", "\U0001f600", "^_{"]
    stages = filter_logits(torch.zeros(1, 6), GenerateConfig(temperature=0.0), None)
    picture = widgets.draw_filters({s: stages[s][0].numpy() for s in STAGES}, GenerateConfig(), pieces.__getitem__)
    assert picture.startswith(PNG)
    many = {stage: np.full(5000, 1 / 5000) for stage in STAGES}
    assert widgets.draw_filters(many, GenerateConfig(), str).startswith(PNG)


def test_a_picture_of_two_parts_is_cut_where_nothing_is_drawn(panel):
    def draw(figure):
        for axes in shared.parts(figure):
            axes.plot([0, 1e6], [0, 1e-6])
            axes.set(xlabel="a long label " * 3, ylabel="another", title="and a title")

    for picture in (panel.picture.value, shared.png(draw, (9.6, 3.8))):
        opaque = imread(io.BytesIO(picture))[:, :, 3]
        cut = round(shared.LEFT * opaque.shape[1])
        assert not opaque[:, cut - 1 : cut + 2].any()
        assert opaque[:, :cut].any() and opaque[:, cut:].any()


def test_the_best_model_is_found_in_ones_own_results_first(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "repository", lambda: tmp_path)
    assert widgets.find_model() is None
    reference = tmp_path / "results" / "quickstart" / "models"
    own = tmp_path / "results" / "local" / "quickstart" / "models"
    for name, loss in (("small", 3.0), ("large", 2.0), ("odd", None)):
        save_model(reference / f"{name}.safetensors", small(), TOKENIZER, {"val_loss": loss})
    assert widgets.find_model() == reference / "large.safetensors"
    save_model(reference / "best.safetensors", small(), TOKENIZER)
    assert widgets.find_model() == reference / "best.safetensors"
    save_model(own / "any.safetensors", small(seed=3), TOKENIZER, {"val_loss": 9.0, "text": "verse"})
    assert widgets.find_model() == own / "any.safetensors"


def test_load_or_train_loads_what_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "repository", lambda: tmp_path)
    path = tmp_path / "results" / "quickstart" / "models" / "best.safetensors"
    save_model(path, small(seed=3), TOKENIZER, {"val_loss": 2.5, "text": "verse"})
    model, tokenizer = widgets.load_or_train()
    assert torch.equal(model.embedding.weight, small(seed=3).embedding.weight) and tokenizer == TOKENIZER
    told = capsys.readouterr().out
    assert "best.safetensors" in told and "trained on verse, validation loss 2.500 nats per token" in told


def test_with_no_model_at_all_a_small_one_is_trained_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "repository", lambda: tmp_path)
    model, tokenizer = widgets.load_or_train(seconds=1.0)
    assert "for about 1 s" in capsys.readouterr().out
    text = generate(model, tokenizer, "The value", GenerateConfig(temperature=0.0, max_new_tokens=20))
    assert np.mean(text.log_probs) > -5  # an even guess among 512 tokens has -6.2
    monkeypatch.setattr(models, "Trainer", None)
    again, _ = widgets.load_or_train(seconds=1.0)
    assert "earlier visit" in capsys.readouterr().out
    assert torch.equal(again.embedding.weight, model.embedding.weight)


LABS = sorted((Path(__file__).parents[1] / "labs").glob("*.ipynb"))


@pytest.mark.parametrize("path", LABS, ids=lambda path: path.stem)
def test_labs_are_short_stories_without_saved_output(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert sum(len(source.splitlines()) for source in code) < 100
    assert all(
        not cell["outputs"] and cell["execution_count"] is None for cell in notebook["cells"] if "outputs" in cell
    )
    assert "widgets" not in notebook["metadata"] and notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert not any(re.search(r"(?m)^\s*(class |.*sys\.path)", source) for source in code)
