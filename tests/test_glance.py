"""A text at a glance, and a plan for the minutes one has."""

from __future__ import annotations

import numpy as np
import pytest

from tinylm import corpora, counts
from tinylm.errors import LabError
from tinylm.study import glance
from tinylm.study.planner import Speed

SPEED = Speed((1e4, 1e6), (1e10, 1e11), 1)


def text_of(tmp_path, content: str):
    path = tmp_path / "text.txt"
    path.write_text(content, encoding="utf-8")
    return corpora.load(path)


def test_size_repeats_alphabet_and_compressibility(tmp_path):
    lines = [f"this line is number {n} of the text" for n in range(300)]
    seen = glance.glance(text_of(tmp_path, "\n".join([*lines, *lines[:100], "é" * 30]) + "\n"))
    assert seen.lines == 401 and seen.repeated == pytest.approx(100 / 401, abs=1e-6)
    assert seen.characters == len(set("".join(lines)) | set("é\n")) and seen.rare == 0
    assert seen.compressed < 0.3 and seen.bits == 8 * seen.compressed
    said = " ".join(seen.sentences())
    assert (
        "kB in 401 lines" in said
        and "looked at: the first 4 MB, in 9 lines" in glance.Glance(5_000_000, 9, 0.0, 5, 0, 0.5).sentences()[0]
    )
    assert "little text" in said and "Much is repeated" in said
    noise = "".join(map(chr, np.random.default_rng(0).integers(32, 127, 300_000)))
    assert glance.glance(text_of(tmp_path, noise)).bits > 6  # log2 of 95 characters is 6.6
    assert "little text" not in " ".join(glance.glance(text_of(tmp_path, noise)).sentences())


def test_larger_vocabularies_pack_more_and_say_what_they_cost(tmp_path):
    words = np.random.default_rng(0).choice(["alpha", "beta", "gamma", "delta", "epsilon"], 30_000)
    text = text_of(tmp_path, "".join(f"{w} " + ("\n" if i % 9 == 8 else "") for i, w in enumerate(words)))
    asked = []
    table = glance.tokenizers(text, (260, 290, 100_000), say=asked.append)
    assert asked == [260, 290, 100_000] and table["vocab_size"].tolist() == [260, 290]  # the last has no ground
    assert table["bytes_per_token"].is_monotonic_increasing
    assert table["bits_per_byte"].is_monotonic_decreasing and (table["bits_per_byte"] < 8).all()
    with pytest.raises(LabError, match="vocabulary"):
        glance.tokenizers(text, (100_000,))


def test_a_plan_fits_the_time_and_the_text():
    plans = [glance.plan_for_time(seconds, 1e8, 512, SPEED) for seconds in (5, 60, 600)]
    assert [plan.seconds for plan in plans] == pytest.approx([5, 60, 600], rel=0.02)
    sizes = [counts.parameters(plan.model)["total"] for plan in plans]
    assert sizes[0] < sizes[1] < sizes[2] and plans[0].tokens < plans[1].tokens < plans[2].tokens
    assert plans[1].epochs == pytest.approx(plans[1].tokens / 1e8)
    short = glance.plan_for_time(600, 1e5, 512, SPEED)
    assert short.epochs == 8 and short.tokens == 8e5 and short.seconds < 600
