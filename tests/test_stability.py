"""Stability: with losses from known limits in place of training, the boundaries, the shares and the verdict come out as planted."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import subprocess
import sys
import zlib

import numpy as np
import pandas as pd
import pytest

from tinylm import counts
from tinylm.errors import LabError, TextError
from tinylm.study import claims, stability
from tinylm.study.parameters import StabilityParameters
from tinylm.study.runs import write_record
from tinylm.study.stability import Preset, arm_of, rate_of, steady

FACTS = {
    "name": "made up", "bytes": {"train": 90_000_000, "val": 5_000_000, "test": 5_000_000},
    "tokens": {"train": 10**9, "val": 10**7, "test": 10**7}, "provenance": {"source": "own", "licence": "own"},
}  # fmt: skip
DEPTHS = (2, 4, 16)
PARTS = {part.name for claim in claims.CLAIMS for part in claim.parts if part.study == "stability"}


def limit(depth: int, position: str, warm: bool) -> float:
    """The place of the grid up to which runs are well: pre-norm two steps (one octave) higher with warmup, four without."""
    return -8 - math.log2(depth) + {"pre": 0, "post": -2 if warm else -4}[position]


@functools.cache
def facts_of(model, train) -> dict:
    """What a table says of a run before it is trained."""
    parts = counts.parameters(model)
    row = {**model.to_dict(), **train.to_dict()}
    row["run_id"] = f"{zlib.crc32(json.dumps(row, sort_keys=True).encode()):08x}"
    row |= {f"params_{part}": parts[part] for part in ("total", "non_embedding", "embedding", "head")}
    return {**row, "flops": counts.train_flops(model, train), "epochs": 0.1, "seconds": 1.0, "reason": ""}


class KnownLimits(stability.Stability):
    """The study with losses from a law in place of training. Up to the limit a run is well; in the two steps above it ends 1
    nat too high; farther up it diverges. ``fragile`` is a seed whose limit lies one step lower."""

    recorded, fragile, unigram = False, None, 6.0

    def limit(self, run) -> float:
        own = limit(run.model.num_layers, run.model.norm_position, run.train.warmup_steps > 0)
        return own - (run.train.seed == self.fragile)

    def train(self, runs, **options):
        self.asked = getattr(self, "asked", {})
        rows = []
        for run in runs:
            facts = facts_of(run.model, run.train)
            place, run_id = 2 * math.log2(run.train.learning_rate), facts["run_id"]
            beyond = round(place - self.limit(run), 3)
            status = "diverged" if beyond > 2 else "finished"
            loss = 4.0 + 0.02 * (place + 13) ** 2 / 9 + 0.01 * run.train.seed + (1.0 if beyond > 0 else 0.0)
            loss = None if status == "diverged" else loss
            rows.append(
                {**facts, **run.tags, "status": status, "val_loss": loss, "val_bpb": loss, "tokens_seen": self.tokens}
            )
            if self.recorded and run_id not in self.asked:
                parts = {"total": facts["params_total"]}
                record = {"run_id": run_id, "val_loss": loss, "parameters": parts, "corpus": {"name": "made up"}}
                write_record(self.folder, {**record, "started": "2999-01-01T00:00:00+00:00"})
            self.asked[run_id] = run
        return pd.DataFrame(rows).astype({"val_loss": float})


def study_of(folder, kind: type = KnownLimits, **changes) -> KnownLimits:
    settings = StabilityParameters(text="zipf-markov", results_dir=str(folder))
    return kind(settings, Preset(**{"depths": DEPTHS, "grid": (-16, -6), "draws": 200, **changes}), FACTS)


def whole(study: KnownLimits) -> KnownLimits:
    study.describe_grid()
    study.measure()
    study.show_losses()
    study.show_boundaries()
    study.show_failures()
    return study


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> KnownLimits:
    folder = tmp_path_factory.mktemp("stability") / "stability"
    study = study_of(folder, type("Recorded", (KnownLimits,), {"recorded": True}))
    claims.seal(folder, "stability")
    return whole(study)


# ------------------------------------------------------------------------------------------------------------------ the rule


def test_a_rate_is_stable_where_no_seed_diverges_or_ends_half_a_nat_above_the_best():
    best, inf = [4.0, 4.2], math.inf  # mean 4.1
    losses = np.array([[4.3, 4.3], best, [4.5, 4.59], [4.2, 4.61], [4.1, inf]])
    assert steady(losses).tolist() == [[True] * 2, [True] * 2, [True] * 2, [True, False], [True, False]]
    arm = arm_of(losses)
    assert (arm.last, arm.best, arm.loss) == (2, 1, pytest.approx(4.1))
    assert arm_of(losses[:, :1]).last == 4  # its first seed alone is well everywhere
    assert arm_of(np.full((3, 2), inf)).last == -1
    assert arm_of(np.array([[4.0, inf], [inf, 4.0]])).last == -1  # no rate that both seeds survive: nothing to judge by


def test_a_gap_below_the_largest_stable_rate_is_told(tmp_path):
    class Gap(KnownLimits):
        def train(self, runs, **options):
            frame = super().train(runs)
            hole = (frame.num_layers == 2) & (frame.norm_position == "pre") & (frame.place == -11)
            return frame.assign(val_loss=frame.val_loss + 2.0 * hole)

    study = study_of(tmp_path / "r", Gap, depths=(2,))
    study.measure()
    arms = study.arms.set_index(["warmup", "depth", "position"])
    assert arms.gap["with warmup", 2, "pre-norm"] and arms.gap.sum() == 2  # with warmup and without
    assert arms.stable_rate["with warmup", 2, "pre-norm"] == pytest.approx(rate_of(-9))


# ------------------------------------------------------------------------------------------------------------------ the grid


@pytest.mark.parametrize("name", stability.PRESETS)
def test_both_positions_are_tried_alike(name, tmp_path):
    settings = StabilityParameters(preset=name, text="zipf-markov", results_dir=str(tmp_path))
    study = stability.Stability(settings, stability.PRESETS[name], FACTS)
    runs = study.expected_runs()
    pre, post = ([run for run in runs if run.model.norm_position == position] for position in ("pre", "post"))
    assert [run.train for run in pre] == [run.train for run in post]
    assert all(run.train.precision == "fp32" for run in runs)
    warm = {run.tags["warmup"]: run.train.warmup_steps for run in runs}
    assert warm["without warmup"] == 0 and warm["with warmup"] >= 1
    rates = sorted({run.train.learning_rate for run in runs})
    assert np.allclose(np.diff(np.log2(rates)), 0.5, atol=1e-4)


def test_the_full_preset_is_what_the_claim_says():
    preset = stability.PRESETS["full"]
    assert preset.depths == (2, 4, 8, 16) and preset.shape[0] == 32 and preset.seeds == 3
    assert stability.STEP == 0.5 and stability.WORSE == 0.5


def test_the_tokens_that_are_scored_are_those_of_the_preset(tmp_path):
    study = study_of(tmp_path / "r", eval_tokens=12345)
    study.describe_text()
    assert any("nats per token over 12,345 tokens of the validation part" in piece for piece in study.report.pieces)


def test_a_grid_is_widened_for_both_where_a_boundary_lies_outside(tmp_path):
    study = study_of(tmp_path / "r", depths=(2, 16), grid=(-12, -10), moves=4)
    study.measure()
    grids = {(cell.depth, cell.warmup): (grid.start, grid.stop - 1) for cell, grid in study.grids.items()}
    # 16 layers: post-norm's limit, and so its best rate, is -14 with warmup and -16 without: neither may lie at the bottom.
    assert grids[16, "with warmup"] == (-16, -10) and grids[16, "without warmup"] == (-18, -10)
    assert grids[2, "with warmup"][1] == -8  # pre-norm is stable up to -9
    assert (study.arms.edge == "").all()
    for cell, grid in study.grids.items():
        own = study.frame[(study.frame.num_layers == cell.depth) & (study.frame.warmup == cell.warmup)]
        for _, one in own.groupby("norm_position"):
            assert sorted(one.place.unique()) == list(grid) and len(one) == 3 * len(grid)


def test_a_boundary_beyond_the_grid_is_told_as_such(tmp_path):
    study = whole(study_of(tmp_path / "r", depths=(2, 4), grid=(-11, -10), moves=0))
    edges = study.arms.set_index(["warmup", "depth", "position"]).edge
    assert edges["with warmup", 2, "pre-norm"] == "above" and edges["without warmup", 4, "post-norm"] == "below"
    assert any("only known to lie beyond" in piece for piece in study.report.pieces)


def test_a_model_that_learns_nothing_is_no_evidence_and_told(tmp_path):
    class Idle(KnownLimits):
        unigram = 4.4

    study = whole(study_of(tmp_path / "r", Idle, depths=(2,), moves=0))
    assert not study.arms.learns.any() and any("say little" in line for line in study.findings)
    assert not any("both learn" in line for line in study.findings)


def test_the_mean_over_depths_that_learn_leads_and_the_sealed_one_stays(tmp_path):
    """One model that learns nothing bears every rate: the sealed mean counts it, and the report says so."""

    class OneIdle(KnownLimits):
        unigram = 5.2

        def train(self, runs, **options):
            frame = super().train(runs)
            idle = (frame.num_layers == 16) & (frame.norm_position == "post") & (frame.warmup == "without warmup")
            return frame.assign(val_loss=frame.val_loss.mask(idle & (frame.place < -6), 5.0))

    study = whole(study_of(tmp_path / "r", OneIdle))
    effects = pd.read_csv(study.folder / "tables" / "effects.csv").set_index("part").effect
    assert effects["largest stable rate, with warmup"] == pytest.approx(1.0)
    assert effects["largest stable rate, without warmup"] < 2.0  # two depths at 2, and one far below
    lead, sealed = (line for line in study.findings if "lies above" in line)
    assert "with warmup +1.00 octaves" in lead and "without warmup +2.00 octaves" in lead and "2 of 3 depths" in lead
    assert f"without warmup {effects['largest stable rate, without warmup']:+.2f} octaves" in sealed
    assert "say little" in sealed and "post-norm at 16 layers without warmup" in sealed


def test_shares_that_are_not_told_apart_are_not_called_larger(measured, tmp_path):
    class Alike(KnownLimits):
        def limit(self, run):
            return limit(run.model.num_layers, "pre", True)

    assert any("share that diverges is larger for post-norm" in line for line in measured.findings)
    study = whole(study_of(tmp_path / "r", Alike, depths=(2, 4)))
    assert any("cannot be told apart: post-norm's less pre-norm's is +0.0%" in line for line in study.findings)


# ---------------------------------------------------------------------------------------------------------- what comes out


def test_planted_boundaries_come_out(measured):
    arms = measured.arms.set_index(["warmup", "depth", "position"])
    for depth in DEPTHS:
        for warmup, warm in (("with warmup", True), ("without warmup", False)):
            for position in ("pre", "post"):
                row = arms.loc[(warmup, depth, f"{position}-norm")]
                assert row.stable_rate == pytest.approx(rate_of(limit(depth, position, warm)), rel=1e-4)
                assert row.least_seed == row.most_seed == pytest.approx(row.stable_rate) and not row.gap
    for warmup, octaves in (("with warmup", 1.0), ("without warmup", 2.0)):
        effect, draws = measured.mean_octaves(warmup)
        assert effect == pytest.approx(octaves)
        low, high = np.quantile(draws, [0.025, 0.975])
        assert (
            octaves - 0.4 < low < octaves - 0.1 and octaves + 0.1 < high < octaves + 0.4
        )  # the step of the grid alone


def test_the_share_that_diverges_is_counted_over_the_same_runs(measured):
    frame = measured.frame.assign(lost=measured.frame.status == "diverged")
    shares = frame.groupby("norm_position").lost.agg(["mean", "size"])
    assert shares["size"].nunique() == 1
    effect, draws = measured.share_diverged()
    assert effect == pytest.approx(shares["mean"]["post"] - shares["mean"]["pre"]) and effect > 0.1
    low, high = np.quantile(draws, [0.025, 0.975])
    assert low < effect < high


def test_a_seed_that_fails_earlier_lowers_the_boundary_and_widens_the_interval(tmp_path):
    class Fragile(KnownLimits):
        fragile = 1

        def limit(self, run):
            return super().limit(run) if run.model.norm_position == "pre" else limit(run.model.num_layers, "post", True)

    study = study_of(tmp_path / "r", Fragile, depths=(2, 4), draws=400)
    study.measure()
    row = study.arms.set_index(["warmup", "depth", "position"]).loc[("with warmup", 2, "pre-norm")]
    assert row.stable_rate == row.least_seed == pytest.approx(rate_of(-10))
    assert row.most_seed == pytest.approx(rate_of(-9))
    effect, draws = study.mean_octaves("with warmup")
    assert effect == pytest.approx(0.5)
    plain = study_of(tmp_path / "q", depths=(2, 4), draws=400)
    plain.measure()
    assert np.std(draws) > 1.1 * np.std(plain.mean_octaves("with warmup")[1])


def test_the_interval_holds_the_truth_as_often_as_it_says(tmp_path):
    """Depths whose true boundaries differ by chance: the interval over depths must reach the mean of them all."""
    rng, inside = np.random.default_rng(0), 0
    study = study_of(tmp_path / "r", depths=(2, 4, 8, 16), draws=120)
    for _ in range(60):
        study.by_arm = {}
        for cell in study.cells:
            for position, middle in (("pre", 12.0), ("post", 9.0)):
                own = middle + rng.normal(0, 1.5)
                study.by_arm[cell, position] = np.where(np.arange(20)[:, None] <= own + rng.normal(0, 0.5, 3), 4.0, 5.0)
        _, draws = study.mean_octaves("with warmup")
        low, high = np.quantile(draws, [0.025, 0.975])
        inside += low < 1.5 < high
    assert inside / 60 > 0.75  # of four depths drawn from many; the rule's own four are no draw


def test_the_claims_judge_these_very_records(measured):
    effects = pd.read_csv(measured.folder / "tables" / "effects.csv")
    assert list(effects.columns) == list(claims.COLUMNS) and set(effects.part) == PARTS
    (verdict,) = claims.judge(measured.folder.parent, [claim for claim in claims.CLAIMS if claim.number == 2])
    assert verdict.verdict == "supported" and verdict.sealed == "before"
    assert set(verdict.runs) == set(measured.asked) and verdict.parts.corpus.eq("made up").all()


def test_what_cannot_be_measured_is_told_in_words(tmp_path):
    class Broken(KnownLimits):
        def train(self, runs, **options):
            frame = super().train(runs)
            frame.loc[0, ["status", "reason"]] = ["failed", "no memory"]
            return frame

    with pytest.raises(LabError, match=r"1 failed.*no memory"):
        study_of(tmp_path / "r", Broken, depths=(2,), moves=0).measure()
    short = tmp_path / "short.txt"
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), size=rng.integers(2, 7))) for _ in range(200)]
    short.write_text("\n".join(" ".join(rng.choice(words, 8)) for _ in range(800)))
    settings = StabilityParameters(text=str(short), vocab_size=300, results_dir=str(tmp_path / "s"))
    with pytest.raises(TextError, match=r"reads [\d,]+ training tokens once"):
        stability.begin(settings)
    assert not (tmp_path / "s").exists()


# ------------------------------------------------------------------------------------------------------ the whole study


@pytest.mark.slow
def test_the_smoke_study_is_whole_and_a_second_call_only_redraws_it(tmp_path):
    results = tmp_path / "results"
    command = [sys.executable, "-m", "tinylm", "study", "stability", "--preset", "smoke", "--results-dir", str(results)]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr[-3000:]
    readme = (results / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", readme)
    assert links and not [link for link in links if "://" not in link and not (results / link).exists()]
    assert str(results) not in readme and not re.search(r"\bnan\b", readme)
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file() and "notebook" not in path.name}
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0 and "trained in" not in done.stdout
    assert [path.name for path, content in before.items() if path.read_bytes() != content] == []
