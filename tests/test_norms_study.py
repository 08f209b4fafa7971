"""The study of norms: turns are fair, ratios come out as planted, and a report is drawn from kept timings alone."""

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

from tinylm.config import NORMS
from tinylm.errors import DamagedFileError, LabError
from tinylm.study import bench, claims, norms
from tinylm.study.norms import PATHS, WHOLE, Preset, median_ratio
from tinylm.study.parameters import NormsParameters

PARTS = {part.name: part for claim in claims.CLAIMS for part in claim.parts if part.study == "norms"}
RATIOS = {"eager": 1.3, "native": 1.3, "compiled": 0.8, "written out": 0.7, WHOLE: 0.95}
TINY = Preset((64, 16), bench.SHAPES["tiny"], sittings=3, rounds=8)


@pytest.fixture
def planted(monkeypatch):
    """Sittings with known ratios in place of timing; the numbers of those that were asked for."""
    asked = []

    def sitting(preset, number):
        rng, turns = np.random.default_rng(number), []
        asked.append(number)
        for case, ratio in RATIOS.items():
            for one in range(preset.rounds):
                drift = 1e-3 * (1 + 0.3 * one)  # both alike: a ratio within a round does not see it
                for norm in NORMS:
                    own = ratio if norm == "rmsnorm" else 1.0
                    turns.append(
                        {"case": case, "norm": norm, "round": one, "seconds": drift * own * rng.normal(1, 0.004)}
                    )
        return {"turns": turns, "path": "eager, fp32 products, torch's attention"}

    monkeypatch.setattr(norms, "_sit_apart", sitting)
    monkeypatch.setattr(bench, "busy", list)
    monkeypatch.setitem(norms.PRESETS, "quick", TINY)
    return asked


def whole_study(folder, **asked) -> norms.Norms:
    study = norms.begin(NormsParameters(**{"preset": "quick", "results_dir": str(folder), **asked}))
    study.describe()
    study.measure()
    study.show_alone()
    study.show_step()
    study.end()
    return study


# ---------------------------------------------------------------------------------------------------------------- one sitting


def test_turns_are_alike_for_both_and_take_the_lead_in_turns(monkeypatch):
    clock, calls = [0.0], []

    def unit(name, seconds):
        def call():
            clock[0] += seconds
            calls.append(name)

        return call

    monkeypatch.setattr(norms.time, "perf_counter", lambda: clock[0])
    preset = dataclasses.replace(TINY, rounds=4, seconds=0.01)
    units = {"rmsnorm": unit("rmsnorm", 1e-3), "layernorm": unit("layernorm", 2e-3)}
    rows = norms.take_turns(units, preset, sitting=0, many=True)
    assert [row["norm"] for row in rows[::2]] == ["rmsnorm", "layernorm"] * 2
    assert {(row["norm"], round(row["seconds"], 9)) for row in rows} == {("rmsnorm", 1e-3), ("layernorm", 2e-3)}
    assert calls.count("rmsnorm") == calls.count("layernorm") >= 4 * 10  # enough to last 10 ms, and equally many
    assert norms.take_turns(units, preset, sitting=1, many=True)[0]["norm"] == "layernorm"
    calls.clear()
    norms.take_turns(units, preset, sitting=0, many=False)
    assert len(calls) == 2 * (2 + 4)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("path", ["eager", "native", "written out"])
def test_every_path_is_the_same_norm(path, norm):
    """Values and gradients against plain formulas in fp64."""
    torch.manual_seed(0)
    function, weights = norms.norm_of(path, norm, 12)
    with torch.no_grad():
        for weight in weights:
            weight.copy_(torch.randn(12))
    x, gradient = torch.randn(5, 12, requires_grad=True), torch.randn(5, 12)
    found = [function(x), *torch.autograd.grad(function(x), [x, *weights], gradient)]
    z = x.detach().double().requires_grad_()
    w = [weight.detach().double().requires_grad_() for weight in weights]
    centred = z if norm == "rmsnorm" else z - z.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[0] + (w[1] if len(w) > 1 else 0)
    for one, other in zip(found, [y, *torch.autograd.grad(y, [z, *w], gradient.double())], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def test_a_whole_step_differs_in_its_norm_alone():
    units, path = norms._steps(dataclasses.replace(TINY, max_steps=20))
    kinds = {norm: step.__self__ for norm, step in units.items()}
    configs = {norm: trainer.model.config.to_dict() for norm, trainer in kinds.items()}
    assert (
        configs["layernorm"] == {**configs["rmsnorm"], "norm": "layernorm"} and configs["rmsnorm"]["norm"] == "rmsnorm"
    )
    before = kinds["rmsnorm"].lane.weights.clone()
    losses = [step() for step in units.values()]
    assert np.isfinite(losses).all() and not torch.equal(before, kinds["rmsnorm"].lane.weights)
    assert kinds["rmsnorm"].arithmetic == kinds["layernorm"].arithmetic and "eager" in path


# ------------------------------------------------------------------------------------------------------------- the interval


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Sittings differ by 1 %, rounds within them by 0.5 %: the interval must know of both."""
    rng, inside, narrow = np.random.default_rng(0), 0, 0
    for number in range(120):
        logs = np.log(0.9) + rng.normal(0, 0.01, (6, 1)) + rng.normal(0, 0.005, (6, 8))
        effect, draws = median_ratio(logs, draws=300, seed=number)
        low, high = np.quantile(draws, [0.025, 0.975])
        inside += low < -0.1 < high
        low, high = np.quantile(median_ratio(logs.reshape(1, -1), draws=300, seed=number)[1], [0.025, 0.975])
        narrow += low < -0.1 < high
        assert abs(effect + 0.1) < 0.03
    assert inside / 120 > 0.9 and narrow / 120 < 0.75  # rounds of one sitting alone would claim too much


def test_one_round_that_was_disturbed_moves_little():
    logs = np.log(np.full((4, 8), 0.9))
    logs[1, 3] = np.log(5.0)
    assert median_ratio(logs)[0] == pytest.approx(-0.1)


# ---------------------------------------------------------------------------------------------------------------- the study


def test_planted_ratios_come_out_as_the_claim_asks(planted, tmp_path):
    study = whole_study(tmp_path / "norms")
    assert planted == [0, 1, 2]
    table = study.table.set_index("case")
    for case, ratio in RATIOS.items():
        assert table.effect[case] == pytest.approx(ratio - 1, abs=0.01)
        assert table.low[case] < ratio - 1 < table.high[case] and table.rounds[case] == 24
    effects = pd.read_csv(tmp_path / "norms" / "tables" / "effects.csv")
    assert list(effects.columns) == list(claims.COLUMNS) and set(effects.part) == set(PARTS)
    told = {row.part: PARTS[row.part].verdict(row) for row in effects.itertuples()}
    assert told == {
        "norm alone, eager": "refuted", "norm alone, native": "refuted", "norm alone, compiled": "supported",
        "whole step": "supported",
    }  # fmt: skip
    assert "1" in claims._sealed(tmp_path / "norms")


def test_the_report_says_how_it_is_judged_and_how_far_sittings_lie_apart(planted, tmp_path):
    study = whole_study(tmp_path / "norms")
    study.times.loc[study.times.sitting.eq(1) & study.times.case.eq("eager"), "layernorm"] *= 3
    assert "differ most in LayerNorm, eager" in study._sittings_apart() and "3.0 times the" in study._sittings_apart()
    told = (tmp_path / "norms" / "README.md").read_text(encoding="utf-8")
    assert f"stretched {norms.stretch_of(3):.2f} times" in told and norms.stretch_of(3) > norms.stretch_of(30) > 1
    assert "norm alone, native: refuted; norm alone, compiled: supported" in told
    assert "`written out` has no vote" in told.split("## ")[0]


def test_drawing_again_times_nothing_and_changes_nothing(planted, tmp_path, monkeypatch):
    whole_study(tmp_path / "norms")
    before = {path: path.read_bytes() for path in (tmp_path / "norms").rglob("*") if path.is_file()}
    monkeypatch.setattr(bench, "busy", lambda: ["a sweep is at work"])  # drawing needs no idle machine
    whole_study(tmp_path / "norms")
    assert planted == [0, 1, 2]
    assert [path.name for path, content in before.items() if path.read_bytes() != content] == []
    readme = (tmp_path / "norms" / "README.md").read_text(encoding="utf-8")
    assert bench._about_machine()["cpu"] in readme and not re.search(r"\bnan\b", readme)


def test_what_was_interrupted_goes_on_where_it_was(planted, tmp_path, monkeypatch):
    good = norms._sit_apart

    def breaks(preset, number):
        if number == 2:
            raise KeyboardInterrupt
        return good(preset, number)

    monkeypatch.setattr(norms, "_sit_apart", breaks)
    with pytest.raises(KeyboardInterrupt):
        whole_study(tmp_path / "norms")
    monkeypatch.setattr(norms, "_sit_apart", good)
    whole_study(tmp_path / "norms")
    assert planted == [0, 1, 2]


def test_a_busy_machine_is_refused_unless_forced(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "busy", lambda: ["process 7 (someone) uses 90% of a core"])
    with pytest.raises(LabError, match=r"someone.*-p force true"):
        whole_study(tmp_path / "norms")
    assert planted == [] and not (tmp_path / "norms" / norms.TIMINGS).exists()
    whole_study(tmp_path / "norms", force=True)
    readme = (tmp_path / "norms" / "README.md").read_text(encoding="utf-8")
    assert "Not to be relied on" in readme and "someone" in readme
    monkeypatch.setitem(norms.PRESETS, "smoke", TINY)
    whole_study(tmp_path / "smoke", preset="smoke")  # its times say nothing anyway


def test_timings_of_another_kind_are_not_mixed(planted, tmp_path, monkeypatch):
    whole_study(tmp_path / "norms")
    monkeypatch.setitem(norms.PRESETS, "full", dataclasses.replace(TINY, sittings=4))
    with pytest.raises(LabError, match="timings of one preset"):
        whole_study(tmp_path / "norms", preset="full")
    path = tmp_path / "norms" / norms.TIMINGS
    kept = norms._read_checked(path, "timings", "")
    norms._write_checked(path, "timings", {"asked": kept["asked"], "sittings": kept["sittings"][:1]})
    about = {**bench._about_machine(), "cpu": "another"}
    monkeypatch.setattr(bench, "_about_machine", lambda: about)
    with pytest.raises(LabError, match=r"one machine.*another here"):
        whole_study(tmp_path / "norms")
    path.write_text(path.read_text(encoding="utf-8").replace('"round": 1', '"round": 2', 1), encoding="utf-8")
    with pytest.raises(DamagedFileError, match="checksum"):
        whole_study(tmp_path / "norms")


def test_the_full_preset_is_what_the_claim_says():
    preset = norms.PRESETS["full"]
    assert preset.activations == (4096, 256) and preset.sittings * preset.rounds >= 20
    model = preset.shape.model
    assert (model.hidden_size, model.num_layers, preset.shape.windows, preset.shape.max_seq_len) == (256, 6, 16, 256)
    assert set(norms.CLAIMED.values()) == set(PARTS) and set(norms.CLAIMED) == {*PATHS, WHOLE} - {"written out"}


@pytest.mark.slow
@pytest.mark.alone
def test_the_smoke_study_is_whole_and_a_second_call_only_redraws_it(tmp_path):
    results = tmp_path / "results"
    command = [sys.executable, "-m", "tinylm", "study", "norms", "--preset", "smoke", "--results-dir", str(results)]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr[-3000:]
    readme = (results / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", readme)
    assert links and not [link for link in links if "://" not in link and not (results / link).exists()]
    assert str(results) not in readme and not re.search(r"\bnan\b", readme)
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file() and "notebook" not in path.name}
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0 and "sitting 1 of" not in done.stdout
    assert [path.name for path, content in before.items() if path.read_bytes() != content] == []
