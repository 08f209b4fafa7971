"""The claims: rules that stay, verdicts by their bounds, and loud words where evidence is missing or a rule was changed."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil

import numpy as np
import pandas as pd
import pytest

from tinylm import backend
from tinylm.errors import LabError
from tinylm.study import claims
from tinylm.study.ablations import AS_USED, VARIANTS
from tinylm.study.claims import ABOVE, BELOW, CLAIMS, COLUMNS, EQUAL, Claim, Part, claims_of, judge, seal
from tinylm.study.parameters import ClaimsParameters, repository
from tinylm.study.runs import _write_checked, write_record

NOW = "2999-01-01T00:00:00+00:00"  # when the made-up runs began: after any seal


def row(effect: float, half: float = 0.0, p: float = math.nan) -> pd.Series:
    ends = {"low": effect - half, "high": effect + half, "low_90": effect - 0.8 * half, "high_90": effect + 0.8 * half}
    return pd.Series({"effect": effect, **ends, "p": p, "seeds": 5})


def write_runs(folder, losses: dict[str, float], started: str = NOW) -> None:
    for name, loss in losses.items():
        about = {"parameters": {"total": 1000}, "corpus": {"name": "made up"}, "started": started}
        write_record(folder, {"run_id": name, "val_loss": loss, **about})


def write_effects(folder, effects: dict[str, tuple[float, float]], p: float = 0.001) -> None:
    rows = []
    for part, (effect, half) in effects.items():
        ends = (effect - half, effect + half, effect - 0.8 * half, effect + 0.8 * half)
        rows.append(claims.effects_row(part, effect, *ends, p, seeds=5, runs=["a"]))
    path = folder / "tables" / "effects.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(path, index=False)


SWIGLU = claims_of([3])[0]
BETTER = dict.fromkeys((part.name for part in SWIGLU.parts), (0.02, 0.01))


@pytest.fixture
def root(tmp_path):
    """Evidence for claim 3, which it supports."""
    folder = tmp_path / "ablations"
    seal(folder, "ablations", [SWIGLU])
    write_runs(folder, {"a": 3.0})
    write_effects(folder, BETTER)
    return tmp_path


# ------------------------------------------------------------------------------------------------------------- the rules


def test_fifteen_claims_each_with_a_rule_that_can_be_judged():
    assert [claim.number for claim in CLAIMS] == list(range(1, 16))
    assert len({claim.hash for claim in CLAIMS}) == 15
    for claim in CLAIMS:
        names = [part.name for part in claim.parts]
        assert len(set(names)) == len(names) and any(part.decides for part in claim.parts)
        assert claim.sentence.endswith(".") and claim.margin
        for part in claim.parts:
            assert len(part.about) > 20 or part.about.startswith("the same"), part.name
            least, most = part.supported
            assert least is not None or most is not None
            assert least is None or most is None or least < most
            json.dumps(dataclasses.asdict(part), allow_nan=False)


def test_the_ablations_measure_what_the_claims_ask_of_them():
    """Every contrast that a rule names is a variant, or one of the few effects that the study makes of them."""
    made = {"share of the head", "mqa less gqa by 3"}
    asked = {part.name.partition(": ")[2] for claim in CLAIMS for part in claim.parts if part.study == "ablations"}
    assert {name.removesuffix(AS_USED) for name in asked - made} <= set(VARIANTS)
    assert asked >= {"layernorm", "gelu", "relu", "gqa by 3", "untied"}


def test_any_change_of_a_rule_is_another_rule():
    claim = SWIGLU
    changed = [
        dataclasses.replace(claim, sentence=claim.sentence + " "),
        dataclasses.replace(claim, margin="another"),
        dataclasses.replace(claim, parts=claim.parts[1:]),
        dataclasses.replace(
            claim, parts=(dataclasses.replace(claim.parts[0], supported=(0.001, None)), *claim.parts[1:])
        ),
        dataclasses.replace(claim, parts=(dataclasses.replace(claim.parts[0], decides=False), *claim.parts[1:])),
    ]
    assert len({claim.hash, *(other.hash for other in changed)}) == 1 + len(changed)
    assert dataclasses.replace(claim).hash == claim.hash


@pytest.mark.parametrize(
    ("supported", "refuted", "level", "row", "verdict"),
    [
        (ABOVE, None, 95, row(0.02, 0.01, 0.001), "supported"),
        (ABOVE, None, 95, row(0.02, 0.01, 0.2), "undecided"),  # not after correction
        (ABOVE, None, 95, row(0.02, 0.01), "supported"),  # nothing was corrected
        (ABOVE, None, 95, row(0.02, 0.03, 0.2), "undecided"),
        (ABOVE, None, 95, row(-0.02, 0.01, 0.001), "refuted"),
        (BELOW, None, 95, row(-0.02, 0.01), "supported"),
        (EQUAL, None, 90, row(0.002, 0.0095), "supported"),  # the 90 % interval lies inside, the 95 % does not
        (EQUAL, None, 95, row(0.002, 0.0095), "undecided"),
        (EQUAL, None, 90, row(0.03, 0.01, 0.001), "refuted"),
        (EQUAL, None, 90, row(0.03, 0.025), "undecided"),
        ((-0.01, None), BELOW, 95, row(-0.002, 0.001, 0.001), "supported"),  # better, but not by what counts
        ((-0.01, None), BELOW, 95, row(-0.02, 0.015, 0.01), "refuted"),
        ((-0.01, None), BELOW, 95, row(-0.02, 0.015, 0.3), "undecided"),
        ((-0.01, None), BELOW, 95, row(0.02, 0.04), "undecided"),
        ((0.4, 0.6), None, 95, row(0.5, 0.05), "supported"),
        ((0.4, 0.6), None, 95, row(0.3, 0.05), "refuted"),
        ((0.4, 0.6), None, 95, row(0.45, 0.1), "undecided"),
    ],
)  # fmt: skip
def test_a_part_is_judged_by_where_its_interval_lies(supported, refuted, level, row, verdict):
    assert Part("part", "study", "about", supported, refuted, level).verdict(row) == verdict


def test_how_many_seeds_would_decide_follows_the_root_law():
    part = Part("part", "study", "about", EQUAL)
    assert part.seeds_to_decide(row(0.0, 0.02)) == 5 * 4  # half the width needs four times the seeds
    assert part.seeds_to_decide(row(0.01, 0.02)) == math.inf
    near = Part("part", "study", "about", (-0.01, None), BELOW)
    assert near.seeds_to_decide(row(0.001, 0.022)) == 5 * 4  # zero is no bound of what the effect would show
    assert (
        near.seeds_to_decide(row(-0.004, 0.012)) == 5 * 4
    )  # either verdict would do: 0.006 to the one bound, 0.004 to the other
    assert near.seeds_to_decide(row(-0.02, 0.04)) == 5 * 4
    # what the correction alone keeps undecided takes more seeds than there are
    assert 5 < Part("part", "study", "about", ABOVE).seeds_to_decide(row(0.02, 0.01, 0.2)) < 20
    assert Part("part", "study", "about", ABOVE).seeds_to_decide(row(0.02, 0.01, 1.0)) == math.inf


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [("ss", "supported"), ("su", "undecided"), ("sr", "refuted"), ("ur", "refuted"), ("uu", "undecided")],
)
def test_a_claim_is_as_good_as_its_weakest_deciding_part(verdicts, expected, tmp_path):
    effects = {"s": (0.1, 0.01), "u": (0.1, 0.2), "r": (-0.1, 0.01)}
    parts = tuple(Part(f"part {i}", "ablations", "about", ABOVE) for i in range(len(verdicts)))
    beside = Part("beside", "ablations", "about", ABOVE, decides=False)
    claim = Claim(3, "made up", "A sentence.", "none", (*parts, beside))
    folder = tmp_path / "ablations"
    seal(folder, "ablations", [claim])
    write_runs(folder, {"a": 3.0})
    write_effects(folder, {p.name: effects[v] for p, v in zip(parts, verdicts, strict=True)} | {"beside": effects["r"]})
    (verdict,) = judge(tmp_path, [claim])
    assert verdict.verdict == expected
    told = verdict.row()
    assert (
        told["seeds"] == 5
        and told["smallest"] == told["largest"] == 1000
        and told["corpus"] == "made up"
        and told["runs"] == 1
    )
    needed = verdict.parts.set_index("part").more_seeds
    assert all((needed[p.name] > 5) == (v == "u") for p, v in zip(parts, verdicts, strict=True))


# ------------------------------------------------------------------------------------------------------ loud where it must


def test_a_rule_changed_after_its_data_ends_the_verdict(root):
    assert judge(root, [SWIGLU])[0].verdict == "supported" and judge(root, [SWIGLU])[0].sealed == "before"
    changed = dataclasses.replace(SWIGLU, margin="whatever suits")
    with pytest.raises(
        LabError, match=rf"may not change after its data.*{changed.hash}.*{SWIGLU.hash}.*take the old rule"
    ):
        judge(root, [changed])
    with pytest.raises(LabError, match="may not change after its data"):
        seal(root / "ablations", "ablations", [changed])


def test_a_rule_may_change_while_there_are_no_data_and_a_seal_keeps_its_time(tmp_path):
    folder = tmp_path / "ablations"
    seal(folder, "ablations", [SWIGLU])
    first = (folder / claims.RULES).read_bytes()
    seal(folder, "ablations", [SWIGLU])
    assert (folder / claims.RULES).read_bytes() == first
    changed = dataclasses.replace(SWIGLU, margin="better thought out")
    seal(folder, "ablations", [changed])
    assert changed.hash in (folder / claims.RULES).read_text()
    seal(folder, "another study", CLAIMS)  # serves none of them
    assert changed.hash in (folder / claims.RULES).read_text()


def test_a_rule_sealed_after_its_data_is_told_so(tmp_path):
    folder = tmp_path / "ablations"
    write_runs(folder, {"a": 3.0}, started="2001-01-01T00:00:00+00:00")
    write_effects(folder, BETTER)
    assert judge(tmp_path, [SWIGLU])[0].sealed == "after"  # never sealed
    seal(folder, "ablations", [SWIGLU])
    assert judge(tmp_path, [SWIGLU])[0].sealed == "after"


@pytest.mark.parametrize("study, pieces", [("norms", "sittings"), ("decoding", "cells")])
def test_what_was_timed_counts_as_data(study, pieces, tmp_path):
    """Studies that train nothing have no records of runs: their timings say whether the rule came first, and hold it."""
    folder, part = tmp_path / study, Part("how long", study, "seconds", claims.BELOW)
    rule = Claim(99, "time", "It is quick.", "any", (part,))
    seal(folder, study, [rule])
    (folder / "tables").mkdir()
    effects = pd.DataFrame([claims.effects_row(part.name, -0.1, -0.2, -0.05)])
    effects.to_csv(folder / "tables" / "effects.csv", index=False)
    seal(folder, study, [dataclasses.replace(rule, margin="a tenth")])  # nothing was timed yet
    seal(folder, study, [rule])
    for started, told in (("2999-01-01T00:00:00.000+00:00", "before"), ("2001-01-01T00:00:00.000+00:00", "after")):
        _write_checked(
            folder / claims.TIMINGS, "timings", {"asked": {}, pieces: [{"started": NOW}, {"started": started}]}
        )
        (verdict,) = judge(tmp_path, [rule])
        assert (verdict.verdict, verdict.sealed) == ("supported", told)
    with pytest.raises(LabError, match="may not change after its data"):
        seal(folder, study, [dataclasses.replace(rule, margin="a tenth")])


def test_a_seal_that_was_tampered_with_is_refused(root):
    path = root / "ablations" / claims.RULES
    path.write_text(path.read_text().replace(SWIGLU.hash, "0" * 16))
    with pytest.raises(LabError, match="does not match its checksum"):
        judge(root, [SWIGLU])


def test_all_that_is_missing_is_named_at_once(root):
    with pytest.raises(LabError) as caught:
        judge(root)
    message = str(caught.value)
    for study in (
        "norms",
        "stability",
        "extrapolation",
        "decoding",
        "data_quality",
        "hyperparameters",
        "model_scaling",
        "compute_scaling",
    ):
        assert study in message, study
    assert "'small: layernorm'" in message and "Way out: " in message
    effects = {name: value for name, value in BETTER.items() if name != "large: relu"}
    write_effects(root / "ablations", effects)
    with pytest.raises(LabError, match=r"ablations does not tell 'large: relu'"):
        judge(root, [SWIGLU])


def test_a_missing_record_or_an_effect_without_any_ends_the_verdict(root):
    (root / "ablations" / "runs" / "a.json").unlink()
    with pytest.raises(LabError, match=r"every record behind it.*a\.json"):
        judge(root, [SWIGLU])
    path = root / "ablations" / "tables" / "effects.csv"
    pd.read_csv(path).assign(runs="").to_csv(path, index=False)
    with pytest.raises(LabError, match="names the runs behind it"):
        judge(root, [SWIGLU])


def test_an_effect_is_held_against_its_records(root):
    folder = root / "ablations"
    write_runs(folder, {"a": 3.02, "b": 3.0})
    path = folder / "tables" / "effects.csv"
    table = pd.read_csv(path).assign(base_runs="b")
    table.to_csv(path, index=False)
    assert judge(root, [SWIGLU])[0].verdict == "supported"
    table.assign(effect=0.05).to_csv(path, index=False)
    with pytest.raises(LabError, match=r"must be what its records give.*0\.050000 in the table, 0\.020000 by"):
        judge(root, [SWIGLU])


def test_an_unknown_claim_is_refused_in_words():
    with pytest.raises(LabError, match=r"by their numbers.*16.*1 to 15"):
        claims_of([3, 16])
    assert [claim.number for claim in claims_of([14, 3])] == [14, 3] and len(claims_of()) == 15


# ----------------------------------------------------------------------------------------------------- studies of laws


def test_the_laws_of_the_compute_study_are_read(tmp_path):
    """A made-up compute study of known exponents, additive in truth: claim 9 and 11 hold, the product of powers does not."""
    folder = tmp_path / "compute_scaling"
    E, A, B, alpha, beta = 1.8, 30.0, 60.0, 0.35, 0.32
    rows, rng = [], np.random.default_rng(0)
    for budget in (1e11, 3.2e11, 1e12, 3.2e12, 1e13):
        for N in 3e4 * (budget / 1e11) ** 0.5 * np.array([0.25, 0.5, 1, 2, 4]):
            D = budget / 6 / N
            loss = E + A / N**alpha + B / D**beta + rng.normal(0, 1e-4)
            rows.append({"budget": budget, "params": N, "tokens": D, "loss": loss})
    config = {"model": {"vocab_size": 512}, "train": {"learning_rate": 0.01}, "data": {}, "corpus": {"name": "made up"}}
    for i, r in enumerate(rows):
        parts = {"total": r["params"], "non_embedding": r["params"], "embedding": 0, "head": 0}
        about = {"threads": 1, "device": "cpu", "tags": {"family": "isoflop", "budget": r["budget"]}, "started": NOW}
        about["numerics_revision"] = backend.NUMERICS_REVISION
        write_record(
            folder,
            {"run_id": f"r{i:03d}", "status": "finished", "parameters": parts, "tokens_seen": r["tokens"], "val_loss": r["loss"],
             "flops": r["budget"], **config, **about},
        )  # fmt: skip
    tables = folder / "tables"
    tables.mkdir()
    laws = [("L(C) = A / C^alpha", "alpha", 0.05, 0.045, 0.055), ("N_opt(C) = k C^a", "a", 0.48, 0.45, 0.51),
            ("D_opt(C) = k C^a", "a", 0.52, 0.49, 0.55)]  # fmt: skip
    pd.DataFrame(laws, columns=["law", "parameter", "value", "low", "high"]).to_csv(tables / "laws.csv", index=False)
    minima = pd.DataFrame(
        {"budget": [1e11, 1e12, 1e13], "loss_min": [3.9, 3.5, 3.2], "curvature": [0.07, 0.08, 0.09], "inside": True}
    )
    minima.assign(loss_low=minima.loss_min - 0.01, loss_high=minima.loss_min + 0.01).to_csv(
        tables / "isoflop_minima.csv", index=False
    )
    batches = pd.DataFrame({"factor": [0.5, 0.5, 2.0], "difference": [0.0, 0.01, 0.03]})
    batches.assign(low=batches.difference - 0.01, high=batches.difference + 0.01).to_csv(
        tables / "batches.csv", index=False
    )
    verdicts = {v.claim.number: v for v in judge(tmp_path, claims_of([9, 11, 13]))}
    assert (
        verdicts[9].verdict == "supported" and verdicts[11].verdict == "supported" and verdicts[13].verdict == "refuted"
    )
    parts = verdicts[9].parts.set_index("part")
    assert parts.effect["exponent of loss at the top"] == pytest.approx(math.log(3.5 / 3.2) / math.log(10))
    product = verdicts[13].parts.set_index("part").effect
    assert product["error on held-out runs, product less sum"] > 0.005
    assert 0 < product["exponent of N in 1 / L"] < 0.2
    assert len(verdicts[9].runs) == 25 and verdicts[9].sealed == "after"
    read = claims.evidence(tmp_path, "compute_scaling").set_index("part")
    assert read.effect["half the batch at equal tokens"] == pytest.approx(0.005)
    assert read.effect["perplexity at fixed compute"] == pytest.approx(
        np.mean(1 - np.exp(minima.curvature * math.log(2) ** 2))
    )
    assert read.effect["loss at fixed compute"] == pytest.approx(
        -np.mean(minima.curvature * math.log(2) ** 2 / minima.loss_min)
    )
    with pytest.raises(LabError, match="without the study ablations"):
        judge(tmp_path, claims_of([10]))


# ------------------------------------------------------------------------------------------------------------ the report


def test_the_report_tells_every_verdict_with_its_interval(root, tmp_path):
    path = root / "ablations" / "tables" / "effects.csv"
    # As the rounds of a timed study may be written:
    pd.read_csv(path).astype({"seeds": float}).to_csv(path, index=False)
    settings = ClaimsParameters(evidence=str(root), numbers=(3,), results_dir=str(tmp_path / "report"))
    study = claims.begin(settings)
    study.show_rules()
    study.show_verdicts()
    study.end()
    readme = (tmp_path / "report" / "README.md").read_text()
    assert "- **supported**: SwiGLU is better" in readme and "+0.0100 to +0.0300" in readme and SWIGLU.hash in readme
    links = re.findall(r"\]\(([^)#]+)\)", readme)
    assert links and all((tmp_path / "report" / link).exists() for link in links)
    table = pd.read_csv(tmp_path / "report" / "tables" / "verdicts.csv")
    assert table.verdict.tolist() == ["supported"] and table.sealed.tolist() == ["before"]
    assert "+0.010 to +0.030" in table.effect[0] and "(and 3 more parts alike)" in table.effect[0]
    assert "## How this was made" in readme and "-p numbers 3`" in readme
    assert pd.read_csv(tmp_path / "report" / "tables" / "runs.csv").run_id.tolist() == ["a"]


def test_what_is_exact_has_no_seeds_to_be_few(tmp_path):
    folder = tmp_path / "ablations"
    parts = (Part("counted", "ablations", "about", ABOVE), Part("measured", "ablations", "about", ABOVE))
    claim = Claim(99, "made up", "A sentence.", "none", parts)
    write_runs(folder, {"a": 3.0})
    write_effects(folder, {"counted": (0.2, 0.0), "measured": (0.2, 0.1)})
    path = folder / "tables" / "effects.csv"
    pd.read_csv(path).assign(seeds=[1, 5]).to_csv(path, index=False)
    assert judge(tmp_path, [claim])[0].row()["seeds"] == 5


def test_architecture_against_the_laws_has_the_records_of_both_behind_it(tmp_path, monkeypatch):
    """Claims 10 and 15 take a range from the ablations: its runs are named too, and missed where they are gone."""
    law = tmp_path / "compute_scaling" / "tables" / "law.json"
    law.parent.mkdir(parents=True)
    law.write_bytes((repository() / "results" / "compute_scaling" / "tables" / "law.json").read_bytes())
    monkeypatch.setitem(claims.READERS, "compute_scaling", lambda root: claims._gains(root, ["c"]))
    write_runs(tmp_path / "compute_scaling", {"c": 3.0})
    folder = tmp_path / "ablations"
    write_runs(folder, {"a": 3.0})
    write_effects(folder, {f"{place}: largest choice": (0.1, 0.02) for place in claims.PLACES})
    places = {
        "place": claims.PLACES,
        "params_total": [5e4, 1.2e5],
        "flops": [2.5e11, 1.25e12],
        "tokens_seen": [7e5, 1.6e6],
    }
    pd.DataFrame(places).to_csv(folder / "tables" / "places.csv", index=False)
    (verdict,) = judge(tmp_path, claims_of([10]))
    assert verdict.verdict == "supported" and verdict.runs == ["ablations/a", "c"]
    assert (verdict.parts.low < verdict.parts.effect).all() and (verdict.parts.effect < verdict.parts.high).all()
    (folder / "runs" / "a.json").unlink()
    with pytest.raises(LabError, match=r"every record behind it.*ablations/runs/a\.json"):
        judge(tmp_path, claims_of([10]))


def test_what_stands_beside_a_rule_is_told_by_its_study_and_named_by_no_rule(tmp_path):
    for number, studies in claims.BESIDE.items():
        (claim,) = claims_of([number])
        assert set(studies) <= set(claim.studies)
        for study in set(studies) - set(claims.READERS):
            told = pd.read_csv(repository() / "results" / study / "tables" / "effects.csv").part
            assert set(studies[study]) <= set(told)
        assert not {name for names in studies.values() for name in names} & {part.name for part in claim.parts}
    settings = ClaimsParameters(numbers=(8,), evidence=str(tmp_path), results_dir=str(tmp_path / "report"))
    for study in claims.READERS:
        shutil.copytree(
            repository() / "results" / study, tmp_path / study, ignore=shutil.ignore_patterns("*.html", "*.svg")
        )
    study = claims.begin(settings)
    study.show_verdicts()
    (told,) = [piece for piece in study.report.pieces if piece.startswith("Beside the rule, ")]
    assert "equal compute: -0.0" in told and "share (" in told


def test_where_the_claims_are_read_and_written():
    assert ClaimsParameters().folder == repository() / "results" / "local" / "claims"
    assert (
        claims.begin(ClaimsParameters(preset="smoke", results_dir="results/local/x")).root
        == repository() / "results/local/x"
    )
