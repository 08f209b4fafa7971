"""Positions beyond the training length: what is scored is what a loop over single windows gives, intervals cover, planted
effects come out with the claim's verdict, and what was scored is kept while its model goes."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import typing
import zlib
from concurrent.futures import Future

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from tinylm import counts
from tinylm.config import ModelConfig
from tinylm.errors import LabError, TextError
from tinylm.model import TinyLM
from tinylm.study import claims, extrapolation
from tinylm.study.extrapolation import KINDS, PRESETS, REACH, SPANS, Preset, by_bin, crossed_mean, edges_of
from tinylm.study.parameters import ExtrapolationParameters
from tinylm.study.runs import write_record

FACTS = {
    "name": "made up", "bytes": {"train": 90_000_000, "val": 5_000_000, "test": 5_000_000},
    "tokens": {"train": 10**8, "val": 10**6, "test": 10**6}, "provenance": {"source": "own", "licence": "own"},
}  # fmt: skip
T = 8


# -------------------------------------------------------------------------------------------------------------- scoring


def model_of(position: str) -> TinyLM:
    config = ModelConfig(vocab_size=50, hidden_size=16, num_layers=2, num_heads=2, max_seq_len=T, position=position)
    return TinyLM(config.replace(init_std=0.3), seed=1).eval()


@pytest.fixture(scope="module")
def stretches() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 50, (3, REACH * T + 1))


@torch.no_grad()
def loss_after(model: TinyLM, before: np.ndarray, token: int) -> float:
    """Of one token after those before it, read from position 0."""
    logits = model(torch.from_numpy(before)[None])[0, -1]
    return float(F.cross_entropy(logits, torch.tensor(token)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1, 4])
def test_a_sliding_window_scores_each_token_after_the_last_of_its_window(kind, step, stretches):
    model = model_of(kind)
    slid = extrapolation.score_stretches(model, stretches, T, step)["slid"]
    assert slid.shape == (3, REACH * T)
    for place in (1, 3, T, T + 1, T + 3, 3 * T + 2, REACH * T):  # tokens before the one that is scored
        start = step * math.ceil(max(0, place - T) / step)  # windows start at multiples of the step
        row = stretches[1]
        assert slid[1, place - 1] == pytest.approx(loss_after(model, row[start:place], row[place]), abs=1e-4)
        assert place <= T or T - step < place - start <= T


@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_carried_on_where_they_can_be(kind, stretches):
    model = model_of(kind)
    carried = extrapolation.score_stretches(model, stretches, T, 1)["carried"]
    if kind == "learned":
        assert carried is None
        return
    row = stretches[2]
    for place in (1, T, T + 1, REACH * T):
        assert carried[2, place - 1] == pytest.approx(loss_after(model, row[:place], row[place]), abs=1e-4)
    slid = extrapolation.score_stretches(model, stretches, T, 1)["slid"]
    np.testing.assert_allclose(carried[:, :T], slid[:, :T], atol=1e-4)
    assert np.abs(carried[:, T:] - slid[:, T:]).max() > 1e-3  # context beyond the window changes something


@pytest.mark.parametrize("window", [8, 32, 128])
def test_bins_cover_every_position_once_and_end_with_the_spans(window):
    edges = edges_of(window)
    assert edges[0] == 0 and edges[-1] == REACH * window and (np.diff(edges) > 0).all()
    assert set(window * np.array([1, 2, 4, 8])) <= set(edges)
    losses = np.random.default_rng(1).normal(size=(2, REACH * window))
    means = by_bin(losses, edges)
    assert means[1, 3] == pytest.approx(losses[1, edges[3] : edges[4]].mean())
    assert np.average(means[0], weights=np.diff(edges)) == pytest.approx(losses[0].mean())


def test_stretches_share_no_position_and_span_the_text():
    tokens = np.arange(1000, dtype=np.uint16)
    found = extrapolation.stretches_of(tokens, 64, 5)
    assert found.shape == (5, 65) and found.dtype == np.int64
    assert (np.diff(found, axis=1) == 1).all()
    assert found[0, 0] == 0 and found[-1, 0] == 64 * 14 and (np.diff(found[:, 0]) >= 64).all()
    assert len(extrapolation.stretches_of(tokens, 64, 99)) == 15  # as many as there are


# -------------------------------------------------------------------------------------------------------------- intervals


def test_intervals_over_few_seeds_and_many_stretches_cover():
    rng = np.random.default_rng(2)
    seeds, stretches, draws = 4, 40, 600
    values = rng.normal(0, 0.03, (seeds, 1, draws)) + rng.normal(0, 0.05, (1, stretches, draws))
    values += rng.normal(0, 0.1, (seeds, stretches, draws))
    mean = crossed_mean(values)
    low, high = mean.ends()
    assert 0.92 <= ((low < 0) & (high > 0)).mean() <= 0.99
    low, high = mean.ends(0.9)
    assert 0.86 <= ((low < 0) & (high > 0)).mean() <= 0.97
    assert 0.01 <= (mean.p < 0.05).mean() <= 0.08
    alone = values.mean(0)  # seeds taken as given: too sure by far
    half = 2 * alone.std(0, ddof=1) / math.sqrt(stretches)
    assert (np.abs(alone.mean(0)) < half).mean() < 0.85


def test_an_interval_is_never_narrower_than_seeds_alone_make_it():
    """Of nothing but the rest, the estimate of the variance would often be below zero."""
    values = np.random.default_rng(3).normal(size=(3, 5, 400))
    mean = crossed_mean(values)
    assert (mean.error >= values.mean(1).std(0, ddof=1) / math.sqrt(3) - 1e-12).all() and (mean.freedom >= 1).all()
    same = crossed_mean(np.full((3, 4), 0.2))
    assert same.value == pytest.approx(0.2) and same.error == pytest.approx(0)


# --------------------------------------------------------------------------------------------- the study, on known losses


class Known(extrapolation.Extrapolation):
    """The study with losses from a law in place of training and scoring. worse: nats that each kind loses beyond T, carried
    on, against a sliding window."""

    worse: typing.ClassVar = {"rope": 0.2, "learned": 0.0, "sinusoidal": 0.6, "none": 0.3}

    def train(self, runs, **options):
        rows = []
        for run in runs:
            parts = counts.parameters(run.model)
            rate = 0.05 * math.log(run.train.learning_rate / self.recipe.learning_rate(parts["total"])) ** 2
            loss = 2.0 + rate + 0.003 * np.random.default_rng(run.train.seed).normal()
            run_id = f"{zlib.crc32(str(run.to_dict()).encode()):016x}"
            row = {**run.tags, **run.model.to_dict(), **run.train.to_dict(), "run_id": run_id, "status": "finished"}
            row |= {f"params_{part}": parts[part] for part in ("total", "non_embedding")}
            row |= {
                "tokens_seen": self.preset.tokens,
                "epochs": 0.1,
                "flops": run.flops,
                "val_loss": loss,
                "seconds": 1.0,
            }
            rows.append({**row, "val_bpb": loss})
            record = {"run_id": run_id, "val_loss": loss, "parameters": parts, "corpus": {"name": "made up"}}
            write_record(self.folder, {**record, "started": "2999-01-01T00:00:00+00:00"})
        return pd.DataFrame(rows)

    def score(self, runs):
        return [self.known(run_id, run) for run_id, run in runs.items()]

    def known(self, run_id, run) -> dict:
        edges = edges_of(self.preset.window)
        kind, seed = run.model.position, run.train.seed
        texts = np.random.default_rng(7).normal(0, 0.3, (30, 1)) + 2.0 + 2.0 / np.sqrt(edges[1:])  # the same for all
        noise = np.random.default_rng(zlib.crc32(run_id.encode())).normal(0, 0.02, texts.shape)
        slid = texts + noise + 0.004 * np.random.default_rng([seed, len(kind)]).normal()
        carried = slid + self.worse[kind] * (edges[1:] > self.preset.window)
        found = {"carried": None if kind == "learned" else carried.tolist(), "slid": slid.tolist()}
        about = {"run_id": run_id, "position": kind, "seed": seed, "window": self.preset.window, "step": 4}
        return {**about, "tokens_sha256": "same", "edges": edges.tolist(), **found}


SMALL = Preset((16, 2, 2), 32, 2e4, seeds=4, stretches=30, moves=0, eval_tokens=4096)


def study_of(folder, kind: type = Known) -> Known:
    study = kind(ExtrapolationParameters(text="zipf-markov", results_dir=str(folder)), SMALL, FACTS)
    claims.seal(study.folder, "extrapolation")
    study.measure()
    return study


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Known:
    study = study_of(tmp_path_factory.mktemp("known") / "extrapolation")
    study.describe_kinds()
    study.show_learning_rates()
    study.show_noise()
    study.show_positions()
    study.show_reaches()
    return study


def test_planted_effects_come_out_by_reach(measured):
    table = measured.table.set_index(["contrast", "span"])
    for span in list(SPANS)[1:]:
        assert table.difference["sinusoidal less rope", span] == pytest.approx(0.4, abs=0.02)
        assert table.difference["learned less rope", span] == pytest.approx(-0.2, abs=0.02)
        own = table.loc["rope less its own sliding window", span]
        assert own.difference == pytest.approx(0.2, abs=1e-3) and own.low - 1e-9 <= 0.2 <= own.high + 1e-9
    within = table.loc["sinusoidal less rope", "within T"]
    assert within.low < 0 < within.high and not within.primary
    assert table.primary.sum() == 6 and (table.p_holm[table.primary] >= table.p[table.primary]).all()
    assert "learned less its own sliding window" not in table.index  # it has nothing else


def test_learned_and_rope_are_compared_like_for_like_too(measured):
    """Both with a sliding window: a row of its own, which no rule reads."""
    table = measured.table.set_index(["contrast", "span"])
    own = table.loc["learned less rope, both sliding"]
    assert set(own.index) == set(SPANS) - {"within T"} and not own.primary.any() and own.p_holm.isna().all()
    by_hand = measured.losses("learned", "slid") - measured.losses("rope", "slid")
    for span, row in own.iterrows():
        assert (
            row.difference == pytest.approx(measured.over(by_hand, span).mean()) and row.low < row.difference < row.high
        )
    effects = pd.read_csv(measured.folder / "tables" / "effects.csv")
    assert "learned less rope, both sliding, T to 2T" in set(effects.part) and not effects.part.duplicated().any()
    read = {part.name for claim in claims.CLAIMS for part in claim.parts}
    assert not [part for part in effects.part if "both sliding" in part and part in read]
    assert sum("both with a sliding window" in line for line in measured.findings) == 1


def test_a_tick_stands_beyond_every_difference(measured):
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    ax.plot([0, 1], [-0.4, 0.73])
    extrapolation._by_size(ax)
    assert ax.get_ylim() == (-1.0, 1.0) and 1.0 in ax.get_yticks()


def test_bands_tell_differences_though_stretches_differ_more(measured):
    """What is the same for all kinds goes away, token by token."""
    row = measured.table.set_index(["contrast", "span"]).loc["none less rope", "T to 2T"]
    alone = crossed_mean(measured.over(measured.losses("none", "carried"), "T to 2T"))
    assert row.high - row.low < 0.05 < float(alone.ends()[1] - alone.ends()[0])
    positions = pd.read_csv(measured.folder / "tables" / "positions.csv")
    assert set(zip(positions.position, positions.way, strict=True)) == {
        *((kind, "slid") for kind in KINDS), *((kind, "carried") for kind in KINDS if kind != "learned"),
    }  # fmt: skip
    assert positions["last"].max() == REACH * 32 and (positions["first"] <= positions["last"]).all()


def test_the_claim_is_judged_from_these_very_records(measured, tmp_path):
    (claim,) = claims.claims_of([4])
    (verdict,) = claims.judge(measured.folder.parent, [claim])
    parts = verdict.parts.set_index("part")
    assert parts.verdict["sinusoidal less rope, 4T to 8T"] == "supported"
    assert parts.verdict["learned less rope, T to 2T"] == "refuted" and verdict.verdict == "refuted"
    assert parts.verdict["rope less its own sliding window, 2T to 4T"] == "refuted"
    assert parts.seeds["learned less rope, T to 2T"] == 4 and len(parts.runs["learned less rope, T to 2T"].split()) == 8
    good = type("Good", (Known,), {"worse": {"rope": 0.0, "learned": 0.0, "sinusoidal": 0.4, "none": 0.0}})
    better = study_of(tmp_path / "extrapolation", good)
    better.scores = [
        {**score, "slid": (np.array(score["slid"]) + 0.1).tolist()} if score["position"] == "learned" else score
        for score in better.scores
    ]
    better.show_reaches()
    (verdict,) = claims.judge(tmp_path, [claim])
    assert verdict.verdict == "supported" and verdict.sealed == "before"


def test_seeds_that_chose_a_rate_are_no_evidence_and_kinds_see_the_same(measured):
    assert not set(measured.tuned.seed) & set(measured.seeded.seed)
    assert (measured.seeded.groupby("position").seed.nunique() == 4).all()
    for column in ("batch_size", "max_steps", "stride", "max_seq_len"):
        assert measured.seeded[column].nunique() == 1


def test_a_seed_that_diverged_is_left_out_of_its_pairs(tmp_path):
    class Wild(Known):
        def train(self, runs, **options):
            frame = super().train(runs)
            return frame.assign(val_loss=frame.val_loss.mask((frame.position == "none") & (frame.seed == 2)))

    study = study_of(tmp_path / "extrapolation", Wild)
    table = study.contrasts().set_index(["contrast", "span"])
    assert table.seeds["none less rope", "T to 2T"] == 3 and table.seeds["learned less rope", "T to 2T"] == 4


# ------------------------------------------------------------------------------------------------------ what is kept


class Inline:
    """An executor that works at once."""

    def __init__(self):
        self.asked = []

    def submit(self, function, *arguments):
        self.asked.append(arguments)
        future = Future()
        future.set_result(function(*arguments))
        return future


def test_models_go_when_they_are_scored_and_scores_stay(tmp_path, monkeypatch):
    settings = ExtrapolationParameters(text="zipf-markov", results_dir=str(tmp_path / "r"))
    study = extrapolation.Extrapolation(settings, SMALL, FACTS)
    study._executor = Inline()
    monkeypatch.setattr(
        extrapolation, "score_run", lambda folder, run_id, run, preset: {"run_id": run_id, "slid": [1.0]}
    )
    runs = {name: study.runs_of("rope", [0.01], seed)[0] for seed, name in enumerate(("a", "b"))}
    for name in runs:
        (study.folder / "models").mkdir(parents=True, exist_ok=True)
        (study.folder / "models" / f"{name}.safetensors").write_bytes(b"weights")
    assert [score["run_id"] for score in study.score(runs)] == ["a", "b"]
    assert not (study.folder / "models").exists() and len(study._executor.asked) == 2
    assert len(study.score(runs)) == 2 and len(study._executor.asked) == 2  # redrawn without a model
    (study.folder / "scores" / "b.json").unlink()
    with pytest.raises(LabError, match=r"kept until it is scored.*delete runs/b\.json"):
        study.score(runs)


def test_what_cannot_be_done_is_told_in_words(tmp_path):
    short = tmp_path / "short.txt"
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), size=rng.integers(2, 7))) for _ in range(200)]
    short.write_text("\n".join(" ".join(rng.choice(words, 8)) for _ in range(800)))
    settings = ExtrapolationParameters(text=str(short), vocab_size=300, results_dir=str(tmp_path / "r"))
    with pytest.raises(TextError, match=r"takes 1,600,000 train tokens"):
        extrapolation.begin(settings)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_alike_in_all_but_the_kind_and_cost_what_they_may(name, tmp_path):
    preset = PRESETS[name]
    study = extrapolation.Extrapolation(
        ExtrapolationParameters(preset=name, text="zipf-markov", results_dir=str(tmp_path)), preset, FACTS
    )
    assert preset.seeds >= 3 and preset.window % preset.step == 0
    models = {kind: study.model_of(kind).to_dict() for kind in KINDS}
    assert {name for kind in KINDS for name, value in models[kind].items() if value != models["rope"][name]} == {
        "position"
    }
    flops = sum(run.flops for run in study.expected_runs())
    assert flops < {"smoke": 1.5e11, "quick": 5e12, "full": 8e13}[name]


def test_the_usual_text_has_long_contexts():
    assert ExtrapolationParameters().data.text == "stories" and ExtrapolationParameters().folder.name == "extrapolation"
    assert ExtrapolationParameters(preset="smoke").data.text == "zipf-markov"
    assert ExtrapolationParameters(text="verse").folder.name == "extrapolation-verse"


# ------------------------------------------------------------------------------------------------------ the whole study


@pytest.mark.slow
def test_the_smoke_study_is_whole_and_a_second_call_only_redraws_it(tmp_path):
    results = tmp_path / "results"
    command = [
        sys.executable,
        "-m",
        "tinylm",
        "study",
        "extrapolation",
        "--preset",
        "smoke",
        "--results-dir",
        str(results),
    ]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr[-3000:]
    assert not (results / "models").exists()
    readme = (results / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", readme)
    assert links and not [link for link in links if "://" not in link and not (results / link).exists()]
    assert str(results) not in readme and "nan" not in readme.lower().replace("finance", "")
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file() and "notebook" not in path.name}
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0 and "trained in" not in done.stdout and "scored 1 of" not in done.stdout
    assert [path.name for path, content in before.items() if path.read_bytes() != content] == []
