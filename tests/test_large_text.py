"""A text larger than memory: what is generated, that the disk is asked first, and that memory does not grow with the text."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys

import pytest

from tinylm import files
from tinylm.errors import LabError
from tinylm.study import large_text


def test_the_text_is_as_long_as_asked_and_repeats_nothing():
    pieces = list(large_text.generated(2.5))
    text = b"".join(pieces)
    assert len(text) == 2_500_000 and text.endswith(b"\n") and all(piece.endswith(b"\n") for piece in pieces)
    lines = text.splitlines()
    assert len(set(lines)) > 0.999 * len(lines)
    assert b"".join(large_text.generated(1.0))[:-1] == text[:999_999]  # the shorter text is the head of the longer one
    assert len({word for line in lines for word in line.split()}) <= large_text.WORDS


def test_the_disk_is_asked_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("", (), {"free": 12.4e9}))
    with pytest.raises(LabError, match=r"12\.4 GB free in .*, 12\.5 GB needed"):
        large_text.measure([50, 5000], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_process_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(large_text.sys, "executable", shutil.which("false"))
    with pytest.raises(LabError, match="ended with 1"):
        large_text.measure([0.1], tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_it_comes_to_in_words():
    row = {"text_mb": 50.0, "prepare_mb_per_second": 4.0, "prepare_peak_mb": 300.0, "train_peak_mb": 400.0}
    row |= {"train_tokens_per_second": 10_000.0, "train_tokens_per_cpu_second": 12_000.0, "own_mb": 200.0}
    row["prepare_mb_per_cpu_second"] = 2.0
    said = large_text.sentence([row, {**row, "text_mb": 5000.0, "train_peak_mb": 1234.0}])
    assert "From 50 to 5,000 MB" in said and "400 to 1,234 MB" in said and "10,000 per second" in said


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_and_speed_stays(tmp_path):
    command = [sys.executable, "-m", "tinylm.study.large_text", "8", "24", "--out", tmp_path / "out", "--steps", "60"]
    environment = {**os.environ, "TINYLM_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out" / "tables" / "large_text.csv", newline="") as file:
        small, large = ({name: float(value) for name, value in row.items()} for row in csv.DictReader(file))
    assert large["tokens"] == pytest.approx(3 * small["tokens"], rel=0.02)
    for held in ("prepare_peak_mb", "own_mb"):  # 16 MB more of text; as int64 its ids would be 46 MB
        assert large[held] - small[held] < 10, held
    assert large["train_tokens_per_cpu_second"] > 0.5 * small["train_tokens_per_cpu_second"]
    assert not list((tmp_path / "home").iterdir())  # it cleans up after itself
    assert files.home() != tmp_path / "home"
