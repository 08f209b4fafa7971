"""The study of numerics: what it changes is what it says, at equal cost; planted differences and failures come out; and what it
counts of memory and of fp16's gradients is right."""

from __future__ import annotations

import dataclasses
import json
import math
import zlib

import numpy as np
import pandas as pd
import pytest
import torch

from tinylm import counts
from tinylm.checkpoint import save_model
from tinylm.model import TinyLM
from tinylm.study import numerics
from tinylm.study.hyperparameters import BASELINE
from tinylm.study.parameters import NumericsParameters

FACTS = {
    "name": "made up", "bytes": {"train": 90_000_000, "val": 5_000_000, "test": 5_000_000},
    "tokens": {"train": 10**9, "val": 10**7, "test": 10**7}, "provenance": {"source": "own", "licence": "own"},
}  # fmt: skip


class Known(numerics.Numerics):
    """The study with losses that are known in place of training, and no clock."""

    def train(self, runs, **_):
        rows = []
        for run in runs:
            name = json.dumps([run.model.to_dict(), run.train.to_dict()], sort_keys=True)
            parts, value = counts.parameters(run.model), run.tags["value"]
            loss = 3.5 + 0.3 * math.log(run.train.learning_rate / 0.011) ** 2 * (run.tags["family"] == "rates")
            loss += 0.02 if run.train.precision == "bf16" else 0.0 if run.train.loss_scaling else 0.05
            loss += 0.4 if run.model.init == "fixed" and run.model.init_std < 0.05 else 0.0
            loss += 0.3 if run.tags["knob"] == "norm_eps" and value == "1" else 0.0
            loss += np.random.default_rng(zlib.crc32(name.encode())).normal(0, 0.002)
            lost_at = {"fp16": ("x 16",), numerics.UNSCALED: ("x 4", "x 16")}
            diverged = value.endswith(lost_at.get(value.partition(",")[0], ("never",)))
            row = {**run.tags, **run.data.to_dict(), **run.model.to_dict(), **run.train.to_dict()}
            row |= {"run_id": f"{zlib.crc32(name.encode()):08x}", "status": "diverged" if diverged else "finished"}
            row |= {f"params_{part}": parts[part] for part in ("total", "non_embedding", "embedding", "head")}
            row |= {"tokens_seen": 1000, "epochs": 0.1, "flops": run.flops, "seconds": 1.0}
            rows.append({**row, "val_loss": math.nan if diverged else loss, "val_bpb": loss / 1.4})
        return pd.DataFrame(rows)

    def step_seconds(self, settings):
        self.clock = {"date": "2999-01-01", "load": None}
        return {s: 2.0 if s.train.precision == "fp16" else 1.0 for s in settings}

    def _underflow(self, run_id):
        return pd.DataFrame(
            [{"when": "end", "entries": 100, "lost": 0.2, "lost_scaled": 0.0, "overflown_scaled": 0.0}]
        )  # fmt: skip


def study_of(folder, kind: type = Known, preset: str = "full") -> numerics.Numerics:
    settings = NumericsParameters(preset=preset, text="zipf-markov", results_dir=str(folder))
    return kind(settings, numerics.PRESETS[preset], FACTS)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Known:
    study = study_of(tmp_path_factory.mktemp("known") / "numerics", preset="smoke")
    study.preset = dataclasses.replace(numerics.PRESETS["full"], shape=(12, 2, 6), wide=(24, 2, 6), flops=1e11)
    study.measure()
    study.show_noise()
    study.show_precision()
    study.show_initialisation()
    study.show_scales()
    return study


@pytest.mark.parametrize("preset", ["full", "quick", "smoke"])
def test_all_is_tried_at_equal_flops_and_within_the_cost(preset, tmp_path):
    study = study_of(tmp_path / preset, preset=preset)
    runs = study.expected_runs()
    for run in runs:
        step = run.flops / run.train.max_steps
        assert abs(run.flops - study.preset.flops) <= step
    widths = {run.model.hidden_size for run in runs}
    assert len(widths) == len(study.preset.widths)
    assert {run.train.precision for run in runs} == {"fp32", "bf16", "fp16"}
    fp16 = [run.train for run in runs if run.train.precision == "fp16" and run.train.loss_scaling]
    unscaled = [run.train for run in runs if not run.train.loss_scaling]
    assert {train.replace(loss_scaling=False) for train in fp16} == set(unscaled)  # the same rates and seeds
    assert len(fp16) == len(unscaled) == len(study.preset.rates) * study.preset.seeds
    if preset == "full":
        distinct = {json.dumps([run.model.to_dict(), run.train.to_dict()]): run.flops for run in runs}
        assert 2e13 < sum(distinct.values()) < 3.2e13
        assert sum(run.tags["knob"] == "initialisation" for run in runs) == 3 * 2 * 3 * 3


def test_differences_and_failures_come_out(measured):
    table = pd.read_csv(measured.folder / "tables" / "precision.csv").set_index("variant")
    assert table.difference["bf16, rate x 1"] == pytest.approx(0.02, abs=0.006)
    assert table.verdict["bf16, rate x 1"] == "worse" and table.verdict["fp16, rate x 1"] != "worse"
    assert table.failed["fp16, rate x 16"] == 1 and table.verdict["fp16, rate x 16"] == "diverges"
    assert table.difference[f"{numerics.UNSCALED}, rate x 1"] == pytest.approx(0.05, abs=0.006)
    assert table.failed[f"{numerics.UNSCALED}, rate x 4"] == 1 and table.failed["fp16, rate x 4"] == 0
    shares = "fp32 0 of 9, bf16 0 of 9, fp16 3 of 9, fp16 without loss scaling 6 of 9"
    assert any(line.endswith(f"{shares}.") for line in measured.findings)
    assert any(
        line.startswith("Products in fp16 without loss scaling change the loss by +0.05") for line in measured.findings
    )
    assert (measured.folder / "figures" / "precision.png").exists()
    starts = pd.read_csv(measured.folder / "tables" / "initialisation.csv")
    fixed = starts[(starts.init == "fixed") & (starts.init_std < 0.05)]
    assert len(starts) == 18 and fixed.difference.to_numpy() == pytest.approx(0.4, abs=0.01)
    eps = pd.read_csv(measured.folder / "tables" / "norm_eps.csv").set_index("variant")
    assert eps.difference["1"] == pytest.approx(0.3, abs=0.01) and eps.verdict["1"] == "worse"
    assert math.isnan(eps.difference[BASELINE])
    costs = pd.read_csv(measured.folder / "tables" / "costs.csv").set_index(["shape", "precision"])
    assert (costs.speed.unstack()["fp16"] == 0.5).all() and set(costs.index.levels[1]) == {"fp32", "bf16", "fp16"}


def test_the_most_is_the_most_in_either_direction_and_what_no_run_bore_is_named():
    table = pd.DataFrame(
        {
            "variant": ["baseline", "x 2", "x 8", "x 64"],
            "failed": [0, 0, 0, 1],
            "difference": [np.nan, 0.01, -0.3, np.nan],
        }
    ).assign(low=-1.0, high=1.0)
    said = numerics._most("knob", table)
    assert said.startswith("knob at x 8 changes the loss by -0.300 nats") and said.endswith(
        "Every run diverged at x 64."
    )
    assert "no difference" in numerics._most("knob", table[table.variant.isin(["baseline", "x 64"])])


def test_what_is_kept_for_the_backward_pass_is_counted(tmp_path):
    study = study_of(tmp_path / "r", preset="smoke")
    base = study.baseline(0.01)
    kept = numerics.kept_for_backward(base)
    double = dataclasses.replace(base, train=base.train.replace(batch_size=2 * base.train.batch_size))
    assert numerics.kept_for_backward(double) == pytest.approx(2 * kept, rel=0.05)  # activations, and no weights
    logits = base.train.batch_size * base.model.max_seq_len * base.model.vocab_size * 4
    assert kept > logits


def test_gradients_that_fp16_cannot_hold_are_counted(tmp_path, monkeypatch):
    study = study_of(tmp_path / "r", numerics.Numerics, preset="smoke")
    study.rate = 0.01
    base = study.baseline(0.01)
    tokens = np.random.default_rng(0).integers(0, base.model.vocab_size, 20_000).astype(np.uint16)
    monkeypatch.setattr(numerics, "prepare_corpus", lambda run: type("Corpus", (), {"train": tokens}))
    model = TinyLM(base.model, seed=1)
    with torch.no_grad():  # a model so sure of the wrong that its gradients are large, but for what it never reads
        model.embedding.weight.mul_(1e-12)
    (study.folder / "models").mkdir(parents=True)
    save_model(study.folder / "models" / "a.safetensors", model)
    table = study._underflow("a").set_index("when")
    assert table.lost["end"] > 0.5 > table.lost["start"]
    assert table.lost_scaled["start"] <= table.lost["start"] and table.overflown_scaled["start"] == 0
