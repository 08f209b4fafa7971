"""The ablations: what they compare is alike in all but one thing, and, with losses from a known law in place of training, planted
effects come out with their size, their worth in compute and the right verdict."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from tinylm import counts
from tinylm.errors import ConfigError, LabError, TextError
from tinylm.study import ablations, claims, contrasts, steps
from tinylm.study.ablations import AS_USED, BASELINE, VARIANTS, Place, with_total
from tinylm.study.design import Recipe
from tinylm.study.multipliers import fit_frontier, multipliers
from tinylm.study.parameters import AblationParameters
from tinylm.study.runs import write_record

FACTS = {
    "name": "made up", "bytes": {"train": 90_000_000, "val": 5_000_000, "test": 5_000_000},
    "tokens": {"train": 10**9, "val": 10**7, "test": 10**7}, "provenance": {"source": "own", "licence": "own"},
}  # fmt: skip
NOISE = 0.006  # of one run, besides what its seed does to all alike
EFFECTS = {"relu": 0.06, "gelu": 0.0, "none": 0.02, "relu2": -0.03, "layernorm": 0.002}


def law(params: float, tokens: float) -> float:
    return 1.9 + 1.7 * (6 * params * tokens / 1e12) ** -0.12


def effect_of(model) -> float:
    found = 0.0 if model.mlp == "swiglu" else EFFECTS[model.mlp]
    found += EFFECTS["layernorm"] if model.norm == "layernorm" else 0.0
    return found + (EFFECTS["none"] if model.position == "none" else 0.0)


class KnownLaw(ablations.Ablations):
    """The study with losses from a law in place of training; ``asked`` counts the runs, ``folder`` gets their records."""

    spread = NOISE
    recorded = False

    def train(self, runs, **options):
        self.asked = getattr(self, "asked", {})
        rows = []
        for run in runs:
            parts = counts.parameters(run.model)
            tokens = run.train.max_steps * run.train.batch_size * self.recipe.seq_len
            loss = law(parts["total"], tokens) + effect_of(run.model)
            best = self.recipe.learning_rate(parts["total"]) * (1.5 if run.model.mlp == "relu" else 1.0)
            loss += 0.05 * math.log(run.train.learning_rate / best) ** 2
            name = json.dumps([run.model.to_dict(), run.train.to_dict()], sort_keys=True)
            loss += np.random.default_rng(run.train.seed).normal(0, 0.02)  # what a seed does to all alike
            loss += np.random.default_rng(zlib.crc32(name.encode())).normal(0, self.spread)
            self.asked[name] = run
            run_id = f"{zlib.crc32(name.encode()):08x}"
            row = {**run.tags, **run.model.to_dict(), **run.train.to_dict(), "run_id": run_id, "status": "finished"}
            row |= {f"params_{part}": parts[part] for part in ("total", "non_embedding", "embedding", "head")}
            row |= {"tokens_seen": tokens, "epochs": tokens / 1e9, "flops": run.flops, "val_loss": loss, "seconds": 1.0}
            rows.append({**row, "val_bpb": loss / math.log(2) / 1.5})
            if self.recorded:
                record = {"run_id": run_id, "val_loss": loss, "parameters": parts, "corpus": {"name": "made up"}}
                write_record(self.folder, {**record, "started": "2999-01-01T00:00:00+00:00"})
        return pd.DataFrame(rows)


def preset(**changes) -> ablations.Preset:
    places = (
        Place("small", (36, 2, 6), 2.5e11, pilot=20, first=4, most=16, beside=("gqa by 3", "untied")),
        Place("large", (60, 2, 6), 1.25e12, pilot=8, first=4, most=8),
    )
    options = {
        "draws": 300,
        "variants": ("layernorm", "gelu", "relu", "none", "gqa by 3", "untied", "relu2"),
        **changes,
    }
    return ablations.Preset(places, **options)


def study_of(folder, kind: type = KnownLaw, **changes) -> KnownLaw:
    settings = AblationParameters(text="zipf-markov", results_dir=str(folder))
    return kind(settings, preset(**changes), FACTS)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> KnownLaw:
    study = study_of(
        tmp_path_factory.mktemp("ablations") / "ablations", type("Recorded", (KnownLaw,), {"recorded": True})
    )
    claims.seal(study.folder, "ablations")
    study.describe_places()
    study.measure()
    study.show_learning_rates()
    study.show_noise()
    study.show_contrasts()
    return study


# --------------------------------------------------------------------------------------------------- what is compared


@pytest.mark.parametrize("name", ["full", "quick", "smoke"])
def test_variants_are_alike_in_parameters_and_tokens(name, tmp_path):
    settings = AblationParameters(preset=name, text="zipf-markov", results_dir=str(tmp_path / name))
    study = ablations.Ablations(settings, ablations.PRESETS[name], FACTS)
    trials = study.trials()
    for place in study.preset.places:
        own = {trial.name: trial for trial in trials if trial.place == place}
        base = own[BASELINE]
        total = counts.parameters(base.model)["total"]
        for trial in own.values():
            if trial.kind != "ladder":
                assert trial.tokens == base.tokens
            if trial.kind == "equal":
                assert counts.parameters(trial.model)["total"] / total == pytest.approx(1, abs=0.01)
        for factor in ablations.LADDER:
            rung = own[BASELINE if factor == 1 else f"{BASELINE} x {factor:g}"]
            assert rung.flops / place.flops == pytest.approx(factor, rel=1e-9)
            assert (rung.model.norm, rung.model.mlp, rung.model.position) == ("rmsnorm", "swiglu", "rope")
        runs = [run for trial in own.values() if trial.kind == "equal" for run in study.runs_of(trial, [0.01], seed=3)]
        assert len({(r.train.batch_size, r.train.max_steps, r.train.seed, r.train.stride) for r in runs}) == 1


def test_the_full_preset_tries_all_choices_and_costs_what_it_may(tmp_path):
    settings = AblationParameters(text="zipf-markov", results_dir=str(tmp_path / "full"))
    study = ablations.Ablations(settings, ablations.PRESETS["full"], FACTS)
    named = {(trial.place.name, trial.name) for trial in study.trials()}
    for place in ("small", "large"):
        assert {name for where, name in named if where == place} >= set(VARIANTS)
        assert (place, "untied" + AS_USED) in named and (place, "gqa by 3" + AS_USED) in named
    assert not study.left_out
    tied, untied = (
        counts.parameters(next(t.model for t in study.trials() if t.name == name))["non_embedding"]
        for name in (BASELINE, "untied" + AS_USED)
    )
    assert tied == untied  # as people use it, it has the same blocks: equal non-embedding parameters
    assert {variant.choice for variant in VARIANTS.values() if variant.primary} == {
        "norm", "norm position", "mlp", "position", "heads", "embeddings",
    }  # fmt: skip
    assert 1e14 < sum(run.flops for run in study.expected_runs()) < 3.5e14
    assert study.preset.places[0].pilot >= 20  # the null test


def test_a_count_that_no_feed_forward_can_make_up_for_is_left_out():
    model = Recipe().model((24, 1, 6), 512, tie_embeddings=False)
    assert with_total(model, counts.parameters(model.replace(tie_embeddings=True))["total"]) is None
    wide = with_total(model, 2 * counts.parameters(model)["total"])
    assert counts.parameters(wide)["total"] / counts.parameters(model)["total"] == pytest.approx(2, rel=0.01)


def test_what_cannot_be_tried_is_told_in_words(tmp_path):
    wrong = AblationParameters(preset="smoke", variants="relu2, geglu", results_dir=str(tmp_path / "r"))
    with pytest.raises(ConfigError, match=r"line of VARIANTS.*geglu.*layernorm"):
        ablations.begin(wrong)
    short = tmp_path / "short.txt"
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), size=rng.integers(2, 7))) for _ in range(200)]
    short.write_text("\n".join(" ".join(rng.choice(words, 8)) for _ in range(800)))
    settings = AblationParameters(preset="smoke", text=str(short), vocab_size=300, results_dir=str(tmp_path / "r"))
    with pytest.raises(TextError, match=r"reads [\d,]+ training tokens once"):
        ablations.begin(settings)
    assert not (tmp_path / "r").exists()


# ------------------------------------------------------------------------------------------------------ what comes out


def test_planted_effects_come_out_with_their_size_and_verdict(measured):
    for place in ("small", "large"):
        table = measured.tables[place].set_index("variant")
        assert table.verdict["relu"] == "worse" and table.verdict["relu2"] == "better"
        assert table.verdict[["gelu", "layernorm"]].isin(["equal", "undecided"]).all()
        for name in ("relu", "none", "relu2", "gelu"):
            assert table.difference[name] == pytest.approx(EFFECTS[name], abs=0.008)
        assert table.low["relu"] < EFFECTS["relu"] < table.high["relu"]
    small = measured.tables["small"].set_index("variant")
    assert small.noise["relu"] == pytest.approx(
        EFFECTS["relu"] / 0.021, rel=0.4
    )  # in deviations of the baseline's seeds
    assert small.noise_low["relu"] / small.low["relu"] == pytest.approx(small.noise["relu"] / small.difference["relu"])
    assert small.bpb["relu"] == pytest.approx(small.difference["relu"] / math.log(2) / 1.5, rel=1e-6)
    assert small.primary.relu and not small.primary.relu2 and math.isnan(small.p_holm.relu2)


def test_seeds_that_chose_a_rate_are_no_evidence_and_the_undecided_get_more(measured):
    assert not set(measured.tuned.seed) & set(measured.seeded.seed)
    seeds = measured.seeded[measured.seeded.place == "small"].groupby("variant").seed.nunique()
    assert seeds["relu"] == 4 and seeds[BASELINE] == 20
    small = measured.tables["small"].set_index("variant")
    assert small.look["relu"] == 1 and seeds[small.index[small.look == 2][0]] > 4
    assert (seeds[small.index[(small.look == 2) & (small.kind == "equal")]] == measured.planned["small"]["seeds"]).all()
    rates = measured.rates[measured.rates.place == "small"].set_index("variant").learning_rate
    assert rates["relu"] / rates[BASELINE] == pytest.approx(1.5, rel=0.2)  # each at its own best


def test_what_the_first_look_decided_is_told_with_its_own_numbers_and_claims_decide_alike(measured):
    effects = pd.read_csv(measured.folder / "tables" / "effects.csv").set_index("part")
    for place in measured.preset.places:
        table = measured.tables[place.name].set_index("variant")
        early = table[table.primary & (table.look == 1)]
        assert (early.verdict != "undecided").all() and "relu" in early.index
        for _, row in early.iterrows():
            assert (row.p_equal < 0.01) if row.verdict == "equal" else (row.p_holm < 0.01)
        for name, row in table[table.primary].iterrows():
            told = effects.loc[f"{place.name}: {name}"]
            equal = told.low_90 > -contrasts.MARGIN and told.high_90 < contrasts.MARGIN
            assert equal == (row.verdict == "equal")
            assert (told.p < 0.05) == (row.verdict in ("worse", "better")) or equal


def test_a_multiplier_is_the_compute_that_the_law_says(measured):
    table = measured.tables["large"].set_index("variant")
    frontier = measured.frontier(measured.seeded, measured.preset.places[1])
    base = measured.trial_of["large", BASELINE]
    N, D = counts.parameters(base.model)["total"], base.tokens
    level = law(N, D)
    assert frontier.slope == pytest.approx(0.12 * (level - 1.9), rel=0.15)
    for name in ("relu2", "none"):
        factor = ((level + EFFECTS[name] - 1.9) / (level - 1.9)) ** (-1 / 0.12)
        row = table.loc[name]
        assert row.multiplier == pytest.approx(factor * frontier.flops / row.flops, rel=0.08)
        assert row.multiplier_low < row.multiplier < row.multiplier_high
    untied = table.loc["untied"]  # fewer FLOPs for the same loss is a saving too
    assert untied.flops < 0.9 * frontier.flops and untied.multiplier > 1.1


def test_nothing_is_extrapolated(measured):
    frontier = measured.frontier(measured.seeded, measured.preset.places[0])
    row = {"error": 0.002, "freedom": 30.0, "flops": frontier.flops}
    far = pd.DataFrame([{"variant": "far", "difference": 2.0, **row}, {"variant": "near", "difference": -2.0, **row}])
    table = multipliers(frontier, far).set_index("variant")
    assert table.beyond.to_dict() == {"far": "below", "near": "above"} and table.multiplier.isna().all()
    assert table.multiplier_low["far"] == pytest.approx(0.25, rel=0.02)
    runs = measured.seeded[measured.seeded.variant.str.startswith(BASELINE) & (measured.seeded.place == "small")]
    runs = runs.assign(budget=runs.variant)
    with pytest.raises(LabError, match=r"at least 4 budgets.*3 around"):
        fit_frontier(runs[runs.variant != f"{BASELINE} x 2"], frontier.flops)
    with pytest.raises(LabError, match="must fall"):
        fit_frontier(runs.assign(val_loss=runs.flops / 1e11), frontier.flops)


def test_the_checks_tell_how_far_the_measuring_is_to_be_believed(measured, monkeypatch):
    measured.show_multipliers()
    measured.show_crossing()
    rates = iter([4.0, 2.0, 3.0] * 1000)
    known = SimpleNamespace(flops_per_second=[1.0])
    monkeypatch.setattr(ablations.planner, "measure_speed", lambda *a: known.__class__(flops_per_second=[next(rates)]))
    measured.show_costs()
    costs = pd.read_csv(measured.folder / "tables" / "costs.csv")
    assert (costs.speed_least <= costs.speed).all() and (costs.speed <= costs.speed_most).all()
    kept = (measured.folder / "speed.json").read_text()
    measured.show_costs()
    assert (measured.folder / "speed.json").read_text() == kept  # timed once for these models
    measured.check_planted()
    measured.check_multipliers()
    tables = measured.folder / "tables"
    null = pd.read_csv(tables / "null_test.csv").iloc[0]
    assert (null["size"], null.splits) == (5, 1000) and 0.02 <= null.rate <= 0.08
    planted = pd.read_csv(tables / "planted_test.csv")
    assert planted.share[0] >= 0.8
    kept = (
        measured.planted.tokens_seen.mean()
        / measured.seeded.query("place == 'small' and variant == 'baseline'").tokens_seen.mean()
    )
    base = measured.trial_of["small", BASELINE]
    N, D = counts.parameters(base.model)["total"], base.tokens
    assert law(N, D * kept) - law(N, D) == pytest.approx(contrasts.PLANTED, abs=0.004)
    parts = pd.read_csv(tables / "parts.csv").set_index(["place", "variant"])
    own = parts.drop(columns=["non_embedding", "total"]).sum(axis=1)
    assert (own == parts.total).all() and parts["head"]["small", BASELINE] == 0
    assert parts["head"]["small", "untied"] == 512 * 36 and "untied as used" in parts.loc["small"].index
    checks = pd.read_csv(tables / "checks.csv")
    assert checks.seeds.tolist() == 2 * [*measured.preset.check_seeds] and (checks.difference.abs() < 0.02).all()
    assert (np.abs(np.log(checks.multiplier)) > math.log(1.15)).all()
    assert {line for line in measured.findings if "Compute multiplier of relu2" in line}
    monkeypatch.setattr(steps, "Folder", lambda folder: SimpleNamespace(shared=lambda name: None))  # made-up records
    measured.end()
    runs = pd.read_csv(tables / "runs.csv")
    assert set(runs.variant) > {BASELINE, "relu2", "planted"} and set(runs.place) == {"small", "large"}


def test_a_curve_that_crosses_is_seen(tmp_path):
    class Crossing(KnownLaw):
        def train(self, runs, **options):
            frame = super().train(runs)
            small = (frame.place == "small") & (frame.mlp == "gelu")
            large = (frame.place == "large") & (frame.mlp == "gelu")
            return frame.assign(val_loss=frame.val_loss + 0.05 * small - 0.05 * large)

    study = study_of(tmp_path / "r", Crossing, variants=("gelu", "layernorm"))
    study.measure()
    study.show_contrasts()
    study.show_crossing()
    table = pd.read_csv(study.folder / "tables" / "crossing.csv").set_index("variant")
    assert table.verdict["gelu"] == "crosses" and table.verdict["layernorm"] != "crosses"


def test_a_variant_that_diverges_is_told_and_not_compared(tmp_path):
    class Wild(KnownLaw):
        def train(self, runs, **options):
            frame = super().train(runs)
            lost = (frame.position == "none") | ((frame.norm == "layernorm") & (frame.seed == 2))
            lost |= (frame.variant == BASELINE) & (frame.seed == 3)
            losses = (frame.val_loss - 0.05 * (frame.mlp == "gelu")).mask(lost)
            return frame.assign(val_loss=losses, status=np.where(lost, "diverged", "finished"))

    study = study_of(tmp_path / "r", Wild, variants=("none", "layernorm", "gelu", "relu"))
    study.measure()
    study.show_learning_rates()
    study.show_contrasts()
    table = study.tables["small"].set_index("variant")
    assert "none" not in table.index and table.verdict["layernorm"] == "diverges" and table.diverged["layernorm"] == 1
    assert any(
        "Diverged at every rate: small at the none" in piece or "none at the small" in piece
        for piece in study.report.pieces
    )
    effects = pd.read_csv(study.folder / "tables" / "effects.csv").set_index("part")
    own = effects.loc["small: range of mlp"]  # of relu less gelu, on the seeds that the baseline ended too
    assert own.effect == pytest.approx(0.11, abs=0.015)
    lost = study.seeded.query("place == 'small' and seed == 3").run_id
    assert own.seeds == table.seeds["relu"] and not set(own.runs.split()) & set(lost)
    for name in ("none", "layernorm"):  # claims learn that there are runs, and tell nothing
        row = effects.loc[f"small: {name}"]
        assert math.isnan(row.effect) and row.runs
        part = claims.Part(f"small: {name}", "ablations", "", (0.0, None))
        assert part.verdict(row) == "undecided"


def test_one_variant_alone_has_its_multiplier(tmp_path):
    """What CONTRIBUTING promises for a reader's own: one name, one command."""
    study = study_of(tmp_path / "r", variants=("relu2",))
    study.measure()
    study.show_contrasts()
    table = study.tables["small"].set_index("variant")
    assert list(table.index) == ["relu2"] and table.multiplier["relu2"] > 1.05


def test_the_claims_judge_these_very_records(measured):
    """Evidence, records and rules go together: a verdict with the right sign, and a loud end where a record is changed."""
    root = measured.folder.parent
    (verdict,) = claims.judge(root, [c for c in claims.CLAIMS if c.number == 3])
    assert verdict.verdict in ("undecided", "refuted") and verdict.sealed == "before"
    parts = verdict.parts.set_index("part")
    assert parts.verdict["small: relu"] == "supported" and parts.seeds["small: relu"] == 4
    assert parts.corpus["small: relu"] == "made up" and set(parts.runs["small: relu"].split()) <= set(verdict.runs)
    effects = pd.read_csv(measured.folder / "tables" / "effects.csv").set_index("part")
    assert effects.effect["small: largest choice"] == pytest.approx(EFFECTS["relu"], abs=0.01)
    assert effects.effect["small: share of the head"] == pytest.approx(512 * 36 / (49716 + 512 * 36))
    path = measured.folder / "tables" / "effects.csv"
    before = path.read_text()
    effects.loc["small: relu", "effect"] = 0.5
    effects.reset_index().to_csv(path, index=False)
    with pytest.raises(LabError, match="must be what its records give"):
        claims.judge(root, [c for c in claims.CLAIMS if c.number == 3])
    path.write_text(before)
    victim = measured.folder / "runs" / f"{parts.runs['small: relu'].split()[0]}.json"
    kept = victim.read_bytes()
    victim.unlink()
    with pytest.raises(LabError, match="every record behind it"):
        claims.judge(root, [c for c in claims.CLAIMS if c.number == 3])
    victim.write_bytes(kept)


def test_a_report_of_all_is_not_replaced_by_one_of_fewer(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "known_text", lambda settings: FACTS)
    told = ["layernorm", "gelu", "relu", "none", "gqa by 3", "untied", "relu2"]  # with some of them as used beside
    before = {path: path.read_bytes() for path in measured.folder.rglob("*") if path.is_file()}

    def begin(variants: str, folder=measured.folder):
        return ablations.begin(AblationParameters(variants=variants, results_dir=str(folder)))

    with pytest.raises(LabError, match=r"qk-norm.*layernorm, gelu, .*another results_dir") as refused:
        begin("qk-norm")
    assert {path: path.read_bytes() for path in measured.folder.rglob("*") if path.is_file()} == before
    named = re.search(r"variants=([^)]+)\)", refused.value.fix)[1]  # the way out, followed
    assert set(begin(named).preset.variants) == {*told, "qk-norm"}
    assert begin("").preset.variants == ablations.PRESETS["full"].variants
    assert begin("qk-norm", tmp_path / "another").preset.variants == ("qk-norm",)


# ------------------------------------------------------------------------------------------------------ the whole study


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("name", ["ablations", "claims"])
def test_the_smoke_study_is_whole_and_a_second_call_only_redraws_it(name, tmp_path):
    results = tmp_path / "results"
    command = [sys.executable, "-m", "tinylm", "study", name, "--preset", "smoke", "--results-dir", str(results)]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr[-3000:]
    readme = (results / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", readme)
    assert links and not [link for link in links if "://" not in link and not (results / link).exists()]
    assert str(results) not in readme and "nan" not in readme.lower().replace("finance", "")
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file() and "notebook" not in path.name}
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0 and "trained in" not in done.stdout
    assert [path.name for path, content in before.items() if path.read_bytes() != content] == []
