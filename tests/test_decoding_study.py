"""Grouped-query attention in decoding: what is timed is the package's own step on a full cache, planted speeds come out with the
claim's verdict, and a busy machine is refused."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from tinylm import counts
from tinylm.decoding import Step
from tinylm.errors import DamagedFileError, LabError
from tinylm.model import TinyLM
from tinylm.study import bench, claims, decoding
from tinylm.study.decoding import PRESETS, TIMINGS, Preset
from tinylm.study.parameters import DecodingParameters

TINY = Preset(2, 24, 12, 32, (4, 8), (1, 2), rounds=6, rounds_beside=3, seconds=0.0, threads=1)


# ------------------------------------------------------------------------------------------------------- what is timed


def test_the_deciding_case_is_the_claims():
    full = PRESETS["full"]
    (claim,) = claims.claims_of([5])
    about = next(part.about for part in claim.parts if part.name == "tokens a second, groups of 3")
    assert (
        about.count(f"{full.layers} layers of {full.hidden_size} with {full.heads} heads, context 4096, batch 8, fp32")
        == 1
    )
    assert full.cells[0] == (8, 4096) and full.rounds >= 20 and full.threads is None
    assert full.groups == {"MHA": 1, "groups of 2": 2, "groups of 3": 3, "groups of 4": 4, "groups of 6": 6, "MQA": 12}
    assert dataclasses.replace(full, heads=8).groups == {"MHA": 1, "groups of 2": 2, "groups of 4": 4, "MQA": 8}


def test_the_models_differ_in_their_key_value_heads_alone():
    for preset in PRESETS.values():
        models = {name: preset.model(name, preset.contexts[-1]).to_dict() for name in preset.groups}
        differ = {field for model in models.values() for field, value in model.items() if value != models["MHA"][field]}
        assert differ == {"num_kv_heads"} and "groups of 3" in models


def test_a_filled_cache_is_what_a_prompt_leaves_behind():
    """The step reads it as the model's own pass does: every key and value, and the oldest gives way."""
    config = TINY.model("groups of 3", 8)
    noise = torch.randn(config.head_dim, 8)
    with torch.inference_mode():
        model = TinyLM(config.replace(init_std=0.3), seed=2).eval()
        caches = [decoding.filled_cache(config, 2, noise) for _ in range(2)]
        step, ids = Step(model), torch.tensor([3, 7])
        for _ in range(3):
            torch.testing.assert_close(
                step(ids, caches[0]), model(ids[:, None], caches[1])[:, -1], atol=1e-4, rtol=1e-4
            )
    cache = decoding.filled_cache(config, 2, noise)
    assert cache.keys.nbytes + cache.values.nbytes == counts.kv_cache_bytes(config, 2, 8)
    assert cache.length == 8 and bool((cache.keys == noise).all()) and bool((cache.values == noise.mT).all())
    assert cache.keys.is_contiguous()  # memory of its own for every head and sequence


def test_a_turn_counts_what_it_times():
    calls = []

    def step(ids, cache):
        calls.append(ids.clone())
        return torch.nn.functional.one_hot((ids + 1) % 5, 5).float()

    turn = decoding.take_turn(step, None, 2, 0.0)
    assert turn["steps"] == 3 and len(calls) == 4 and turn["seconds"] > 0  # one that is not counted
    assert step.cache is None  # gone with its turn: memory holds one at a time
    assert [ids.tolist() for ids in calls] == [[i, i] for i in range(4)]  # each takes the token of the one before
    assert decoding.take_turn(step, None, 2, 0.05)["seconds"] >= 0.05


def test_every_model_has_a_turn_in_every_round():
    threads = torch.get_num_threads()
    try:
        done = decoding.time_cell(TINY, (2, 8))
    finally:
        torch.set_num_threads(threads)
    turns = pd.DataFrame(done["turns"])
    assert (turns.groupby(["round", "heads"]).size() == 1).all() and set(turns["round"]) == set(range(TINY.rounds))
    assert set(turns.heads) == set(TINY.groups) and done["peak_mb"] > 0
    firsts = turns.groupby("round").heads.first()
    assert len(set(firsts)) == len(TINY.groups)  # the order rotates


def test_memory_stays_below_six_gigabytes(tmp_path, capsys):
    study = decoding.DecodingStudy(DecodingParameters(results_dir=str(tmp_path)), PRESETS["full"])
    study.plan()
    told = float(re.search(r"([\d.]+) GB of memory", capsys.readouterr().out)[1])
    weights = sum(study.weight_bytes(name) for name in study.preset.groups)
    assert told == pytest.approx((weights + 2 * 12 * 768 * 8 * 4096 * 4) / 1e9, abs=0.06)
    assert told < 5.5  # and Python and torch themselves


# ------------------------------------------------------------------------------------------------------------ ratios


def test_a_ratio_is_taken_within_rounds():
    rng = np.random.default_rng(0)
    weather = np.exp(rng.normal(0, 0.3, 20))  # what a round does to all alike
    base = pd.Series(100 * weather)
    found = decoding.ratio_of(base * 1.5 * np.exp(rng.normal(0, 0.02, 20)), base)
    assert found["low"] < 0.5 < found["high"] and found["high"] - found["low"] < 0.05
    assert found["low"] < found["low_90"] < found["effect"] < found["high_90"] < found["high"]


def test_intervals_cover_the_ratio():
    rng = np.random.default_rng(1)
    base, covered = pd.Series(np.ones(8)), 0
    for _ in range(300):
        found = decoding.ratio_of(pd.Series(1.2 * np.exp(rng.normal(0, 0.05, 8))), base)
        covered += found["low"] < 0.2 < found["high"]
    assert 0.91 <= covered / 300 <= 0.99


# --------------------------------------------------------------------------------------------- the study, on known speeds


class Clockwork:
    """In place of a process that times a cell: tokens a second as planted, with a little noise. cells: those asked."""

    def __init__(self, gain: float = 0.4, fail_at: int | None = None):
        self.gain, self.fail_at, self.cells = gain, fail_at, []

    def __call__(self, preset: Preset, cell: tuple[int, int]) -> dict:
        if len(self.cells) == self.fail_at:
            raise LabError("Timing must run to its end", "killed")
        self.cells.append(cell)
        rng = np.random.default_rng(len(self.cells))
        turns = []
        for number in range(preset.rounds_of(cell)):
            for name, group in preset.groups.items():
                rate = 100 * (1 + self.gain * (group > 1)) * np.exp(rng.normal(0, 0.02))
                turns.append({"heads": name, "round": number, "steps": 5, "seconds": 5 * cell[0] / rate})
        return {"turns": turns, "peak_mb": 123.0}


def study_of(folder, monkeypatch, clock: Clockwork, reasons: tuple[str, ...] = (), **asked) -> decoding.DecodingStudy:
    monkeypatch.setattr(decoding, "_time_apart", clock)
    monkeypatch.setattr(bench, "busy", lambda: list(reasons))
    study = decoding.DecodingStudy(DecodingParameters(results_dir=str(folder), **asked), TINY)
    claims.seal(study.folder, "decoding")
    return study


def tell(study: decoding.DecodingStudy) -> str:
    study.describe()
    study.measure()
    study.show_cache()
    study.show_speed()
    study.end()
    return (study.folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("gain", "verdict"), [(0.4, "supported"), (0.02, "refuted")])
def test_planted_speeds_come_out_with_the_claims_verdict(tmp_path, monkeypatch, gain, verdict):
    study = study_of(tmp_path, monkeypatch, Clockwork(gain))
    assert "At batch 2 and context 8 the cache of groups of 3 holds" in tell(study)
    assert "exactly a third of MHA's" in study.report.first
    effects = pd.read_csv(tmp_path / "tables" / "effects.csv").set_index("part")
    parts = {part.name: part for claim in claims.claims_of([5]) for part in claim.parts if part.study == "decoding"}
    assert set(parts) <= set(effects.index)
    speed = effects.loc["tokens a second, groups of 3"]
    assert speed.effect == pytest.approx(gain, abs=0.06) and speed.seeds == TINY.rounds
    assert parts["tokens a second, groups of 3"].verdict(speed) == verdict
    held = effects.loc["cache bytes, groups of 3"]
    assert held.effect == held.low == held.high == pytest.approx(1 / 3)
    assert parts["cache bytes, groups of 3"].verdict(held) == "supported"
    table = pd.read_csv(tmp_path / "tables" / "cache.csv").set_index("heads")
    assert table["batch 2, context 8"]["MQA"] * 1e6 == pytest.approx(2 * 2 * 2 * 2 * 8 * 4)


def test_what_was_timed_is_not_timed_again(tmp_path, monkeypatch):
    first = tell(study_of(tmp_path, monkeypatch, Clockwork()))
    assert "Not to be relied on" not in first and "0.1 GB at most" in first
    again = Clockwork()
    assert tell(study_of(tmp_path, monkeypatch, again, ("a neighbour works",))) == first
    assert again.cells == []


def test_an_interrupted_study_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(LabError):
        study_of(tmp_path, monkeypatch, Clockwork(fail_at=2)).measure()
    rest = Clockwork()
    study_of(tmp_path, monkeypatch, rest).measure()
    assert rest.cells == TINY.cells[2:]


def test_a_busy_machine_is_refused_unless_forced(tmp_path, monkeypatch):
    with pytest.raises(LabError, match=r"idle machine.*a neighbour works.*force true"):
        study_of(tmp_path, monkeypatch, Clockwork(), ("a neighbour works",)).measure()
    assert not (tmp_path / TIMINGS).exists()
    told = tell(study_of(tmp_path, monkeypatch, Clockwork(), ("a neighbour works",), force=True))
    assert "Not to be relied on" in told and "a neighbour works" in told


def test_timings_of_another_machine_or_preset_are_not_mixed(tmp_path, monkeypatch):
    with pytest.raises(LabError, match="killed"):
        study_of(tmp_path, monkeypatch, Clockwork(fail_at=1)).measure()
    with monkeypatch.context() as patch:
        patch.setattr(bench, "_about_machine", lambda: {"cpu": "another"})
        with pytest.raises(LabError, match="of one machine"):
            study_of(tmp_path, patch, Clockwork()).measure()
    other = study_of(tmp_path, monkeypatch, Clockwork())
    other.preset = dataclasses.replace(TINY, rounds=5)
    with pytest.raises(LabError, match="timings of one preset"):
        other.measure()
    path = tmp_path / TIMINGS
    path.write_text(path.read_text().replace('"steps": 5', '"steps": 6', 1))
    with pytest.raises(DamagedFileError):
        study_of(tmp_path, monkeypatch, Clockwork()).measure()


# ------------------------------------------------------------------------------------------------------ the whole study


@pytest.mark.slow
@pytest.mark.alone
def test_the_smoke_study_is_whole_and_a_second_call_only_redraws_it(tmp_path):
    results = tmp_path / "results"
    command = [sys.executable, "-m", "tinylm", "study", "decoding", "--preset", "smoke", "--results-dir", str(results)]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr[-3000:]
    readme = (results / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", readme)
    assert links and not [link for link in links if "://" not in link and not (results / link).exists()]
    assert str(results) not in readme and "nan" not in readme.lower()
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file() and "notebook" not in path.name}
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0 and "timed batch" not in done.stdout
    assert [path.name for path, content in before.items() if path.read_bytes() != content] == []
