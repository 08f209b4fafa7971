"""The compute scaling study: what it trains and in which order, how it judges, and, with losses from a known law in place of
training, that it finds that law again."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tinylm import corpora, counts
from tinylm.errors import TextError
from tinylm.study import compute, forecasts, planner
from tinylm.study.design import Recipe, isoflop_points
from tinylm.study.parameters import ComputeParameters, repository
from tinylm.study.runs import load_runs

FACTS = {
    "name": "made up", "bytes": {"train": 90_000_000, "val": 5_000_000, "test": 5_000_000},
    "tokens": {"train": 10**9, "val": 10**7, "test": 10**7}, "provenance": {"source": "own", "licence": "own"},
}  # fmt: skip
LAW = {"E": 1.8, "A": 30.0, "alpha": 0.35, "B": 60.0, "beta": 0.32}
CURVATURE = 0.05  # nats per squared log of the rate over the best one


def best_rate(params: float, tokens: float) -> float:
    return 0.01 * (params / 5e4) ** -0.6 * (tokens / 1e6) ** -0.1


class KnownLaw(compute.ComputeScaling):
    """The study with losses from a law in place of training; notes the runs it was asked for, in order."""

    spread = 1e-4
    drift = staticmethod(lambda budget: 1.0)  # how far the best rate leaves its rule

    def train(self, runs, **options):
        self.asked = getattr(self, "asked", {})
        rows = []
        for run in runs:
            parts = counts.parameters(run.model)
            tokens = run.train.max_steps * run.train.batch_size * self.recipe.seq_len
            rate = best_rate(parts["total"], tokens) * self.drift(run.tags["budget"])
            rate *= (run.train.batch_size / self.recipe.batch_size(tokens)) ** 0.5
            loss = LAW["E"] + LAW["A"] / parts["total"] ** LAW["alpha"] + LAW["B"] / tokens ** LAW["beta"]
            loss += CURVATURE * math.log(run.train.learning_rate / rate) ** 2
            name = json.dumps([run.model.to_dict(), run.train.to_dict()], sort_keys=True)
            loss += self.spread * np.random.default_rng(zlib.crc32(name.encode())).standard_normal()
            about = (run.tags["family"], run.tags["budget"], parts["total"], run.train.learning_rate)
            self.asked.setdefault(name, about)
            row = {**run.tags, **run.model.to_dict(), **run.train.to_dict(), "run_id": name, "status": "finished"}
            row |= {f"params_{part}": parts[part] for part in ("total", "non_embedding", "embedding", "head")}
            flops = tokens * counts.train_flops_per_token(run.model, self.recipe.seq_len)
            row |= {"tokens_seen": tokens, "epochs": tokens / 1e9, "flops": flops, "val_loss": loss, "seconds": 1.0}
            rows.append({**row, "val_bpb": loss / math.log(2) / 1.5})
        return pd.DataFrame(rows)


def study_of(tmp_path: Path, kind: type = KnownLaw, **preset) -> KnownLaw:
    settings = ComputeParameters(text="zipf-markov", results_dir=str(tmp_path / "results"))
    given = {"budgets": (1e11, 3.2e11, 1e12, 3.2e12, 1e13), "bootstrap": 100, "repeated": (1e12,), "batches": (1e12,)}
    return kind(settings, compute.Preset(**{**given, **preset}), FACTS)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> KnownLaw:
    study = study_of(tmp_path_factory.mktemp("known"))
    study.measure()
    return study


def test_the_full_preset_measures_what_it_promises_at_the_cost_it_prints(tmp_path, capsys):
    settings = ComputeParameters(text="zipf-markov", results_dir=str(tmp_path / "results"))
    study = compute.ComputeScaling(settings, compute.PRESETS["full"], FACTS)
    parts = study._outline()
    assert [round(math.log10(b), 1) for b in study.preset.budgets] == [11, 11.5, 12, 12.5, 13, 13.5]
    runs = {name: len(own) for name, own in parts.items()}
    assert [runs[f"family of {b:.2g} FLOPs"] for b in study.preset.budgets] == [15, 15, 15, 7, 7, 7]
    assert runs["seeds"] == 7 + 2 + 2 and runs["batches"] == 3 * 2 * 3 and runs["the forecast's run"] == 1
    for budget in study.preset.budgets:
        own = parts[f"family of {budget:.2g} FLOPs"]
        assert {run.model.hidden_size for run in own} and all(0.95 < run.flops / budget < 1.05 for run in own)
    flops = sum(run.flops for own in parts.values() for run in own)
    assert flops < 5.5e14
    last = parts["the forecast's run"][0]
    assert last.flops / max(study.preset.budgets) == pytest.approx(5, rel=0.02)


def test_families_are_trained_upward_and_only_small_budgets_and_central_sizes_have_brackets(measured):
    asked = pd.DataFrame(measured.asked.values(), columns=["family", "budget", "params", "rate"])
    families = asked[asked.family == "isoflop"]
    above = families[families.budget > measured.preset.tuned_up_to]
    assert above.budget.is_monotonic_increasing and above.index.min() > families[families.budget <= 1e12].index.max()
    for budget, own in families.groupby("budget"):
        rates = own.groupby("params").rate.nunique()
        assert len(rates) >= 5
        if budget <= measured.preset.tuned_up_to:
            assert (rates >= 3).all()
        else:
            assert sorted(rates)[-1] == 3 and sorted(rates)[-2] == 1
            central = own[own.params == rates.idxmax()].rate.sort_values().to_numpy()
            assert central[1:] / central[:-1] == pytest.approx([2, 2], rel=1e-9)
    # The side runs come with the largest family, not after it.
    assert set(asked[asked.budget == 1e12].family) == {"isoflop", "seeds", "batches"}


def test_the_rule_of_the_smaller_budgets_sets_the_rates_above(measured):
    above = measured.frame[measured.frame.rule_rate.notna()]
    truth = [best_rate(row.params_total, row.tokens_seen) for row in above.itertuples()]
    assert (above.rule_rate / truth - 1).abs().max() < 0.03
    assert measured.lr_rule.predict(1e6, 2e7) == pytest.approx(best_rate(1e6, 2e7), rel=0.05)


def test_sizes_of_a_family_are_judged_alike_and_the_rules_error_is_taken_off(tmp_path):
    """Where the best rate leaves its rule, the central size's bracket tells the cost, and all its family is freed of it."""

    class Drifting(KnownLaw):
        drift = staticmethod(lambda budget: 1.0 if budget <= 1e12 else 0.6)

    study = study_of(tmp_path, Drifting, budgets=(1e11, 3.2e11, 1e12, 3.2e12))
    study.measure()
    sizes, judged = study.judge(study.frame)
    cost = CURVATURE * math.log(0.6) ** 2
    above = sizes[sizes.budget == 3.2e12]
    assert above.rate_cost.to_numpy() == pytest.approx(cost, rel=0.1) and cost > 0.01
    truth = LAW["E"] + LAW["A"] * above.params_total ** -LAW["alpha"] + LAW["B"] * above.tokens_seen ** -LAW["beta"]
    assert (above.val_loss - truth).abs().max() < 0.1 * cost
    check = compute._rate_check(study.frame[study.frame.budget == 3.2e12])
    assert check["best_rate"] / check["rule_rate"] == pytest.approx(0.6, rel=0.03)
    assert "learning_rate" not in judged and len(judged) == len(sizes)


@pytest.fixture(scope="module")
def fitted(measured) -> KnownLaw:
    measured.show_families()
    measured.seed_sd = 0.005
    measured.fit_laws()
    return measured


def test_the_known_law_is_found_again(fitted):
    for name, value in LAW.items():
        assert fitted.surface.params[name] == pytest.approx(value, rel=0.03)
    a = LAW["beta"] / (LAW["alpha"] + LAW["beta"])
    assert fitted.surface.a == pytest.approx(a, abs=0.01)
    laws = pd.read_csv(fitted.folder / "tables" / "laws.csv")
    assert {"L(N, D)", "N_opt(C) = k C^a", "D_opt(C) = k C^a", "L(C) = A / C^alpha"} <= set(laws.law)
    assert laws.status.isin(["identified", "weak", "not identified"]).all()
    exponents = [line for line in fitted.findings if "exponent" in line]
    assert exponents and all(re.search(r"exponent -?\d\.\d+ \(", line) for line in exponents)  # never bare


def test_looking_back_holds_forecasts_against_budgets_they_did_not_see(fitted):
    fitted.look_back()
    table = pd.read_csv(fitted.folder / "tables" / "looking_back.csv")
    assert (table.foretold > table.fitted_to).all() and table.inside.mean() > 0.8
    assert table.surface_error_percent.abs().max() < 0.2  # the losses come from such a surface
    assert (table.line_error_percent >= -0.01).all()  # a line without a floor promises too much
    expected = 100 * (table.observed / table.loss - 1)
    assert table.error_percent.to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-6)


def test_a_forecast_reads_a_curve_with_a_floor_where_five_minima_show_one(fitted):
    """The line without a floor is asked only while the minima cannot refute it."""
    assert fitted.frontier.params["E"] == pytest.approx(LAW["E"], rel=0.1)
    assert compute._curve(fitted.minima[:4], 50, 0) is None
    C = fitted.minima.budget
    flat = fitted.minima.assign(loss_min=20 * C**-0.06 * np.exp(0.004 * np.cos(7 * np.log(C))))
    assert compute._shown(compute._curve(flat, 200, 0)) is None  # a straight line, but for noise: no floor is shown


def test_noise_and_batches_are_measured_at_the_best_sizes(fitted):
    measured = fitted
    measured.measure_noise()
    counted = measured.noise.groupby("budget").seed.nunique()
    assert counted.to_dict() == {1e11: 8, 1e12: 3}
    measured.measure_batches()
    table = pd.read_csv(measured.folder / "tables" / "batches.csv")
    assert sorted(table.factor.round(1)) == [0.4, 2.0]  # 5 windows: whole ones are 2 and 10
    tokens = measured.batches.groupby("batch_size").tokens_seen.first()
    assert tokens.max() / tokens.min() < 1.01  # equal tokens
    assert table.rate_ratio.to_numpy() == pytest.approx(table.factor**0.5, rel=0.02)
    assert table.difference.abs().max() < 0.002  # this law knows no batch, only tokens


def test_plans_are_trained_and_held_to_what_they_promised_before(fitted, monkeypatch):
    monkeypatch.setattr(fitted, "preset", dataclasses.replace(fitted.preset, promised=(1, 2)))
    speed = planner.Speed((1e4, 1e7), (2e10, 2e10), threads=2)
    monkeypatch.setattr(fitted, "speed_for", lambda minutes: speed)
    fitted.keep_promises()
    table = pd.read_csv(fitted.folder / "tables" / "promises.csv")
    assert table.promised.to_numpy() == pytest.approx([60, 120], rel=0.05)
    assert (table.took == 1.0).all()  # so says the made-up record
    assert table.time_off.to_numpy() == pytest.approx(100 * (1 / table.promised - 1).to_numpy(), rel=1e-6)
    assert table.kept.all() and table.loss_off.abs().max() < 0.5  # the losses come from the law that was fitted
    monkeypatch.setattr(fitted, "speed_for", None)  # a later start keeps the promises that were made
    fitted.keep_promises()
    assert pd.read_csv(fitted.folder / "tables" / "promises.csv").equals(table)


def test_minutes_that_buy_no_step_make_no_promise_and_end_no_study(fitted, monkeypatch):
    monkeypatch.setattr(fitted, "speed_for", lambda minutes: planner.Speed((1e4, 1e7), (2e10, 2e10), threads=2))
    for path in fitted.folder.glob("tables/promise*"):
        path.unlink()
    monkeypatch.setattr(fitted, "preset", dataclasses.replace(fitted.preset, promised=(1e-4,)))
    fitted.keep_promises()
    assert not list(fitted.folder.glob("tables/promise*"))
    assert "at least one step" in "\n".join(fitted.report.pieces)
    monkeypatch.setattr(fitted, "preset", dataclasses.replace(fitted.preset, promised=(1e-4, 2)))
    fitted.keep_promises()
    assert list(pd.read_csv(fitted.folder / "tables" / "promises.csv").minutes) == [2]


def test_a_batch_of_one_window_is_not_halved(measured):
    point = isoflop_points(Recipe(), 512, [1e9], 1)[0]
    assert [variant.batch_size for variant in measured._variants(point, 0.01)] == [2]


def test_the_floor_is_held_against_the_exact_entropy(tmp_path, monkeypatch):
    truth = corpora.zipf_markov_entropy() * 1.5  # the made-up records say 1.5 symbols a token
    monkeypatch.setitem(LAW, "E", truth)
    study = study_of(tmp_path, budgets=(1e11, 3.2e11, 1e12, 3.2e12))
    study.measure()
    study.show_families()
    study.seed_sd = 0.005
    study.fit_laws()
    study.check_floor()
    row = pd.read_csv(study.folder / "tables" / "floor.csv").iloc[0]
    assert row.truth == pytest.approx(truth, rel=1e-9) and abs(row.error_percent) < 1 and row.inside
    assert "exact entropy" in study.findings[-1]


def test_a_small_text_is_sent_to_the_quickstart(tmp_path):
    path = tmp_path / "small.txt"
    path.write_text("a small text that says little, again and again\n" * 6000, encoding="utf-8")
    asked = {"preset": "smoke", "text": str(path), "vocab_size": 256, "tokenizer": "byte"}
    with pytest.raises(TextError, match=r"2 MB or more.*Received: 0\.28 MB.*tinylm study"):
        compute.begin(ComputeParameters(**asked, results_dir=str(tmp_path / "results")))
    assert not (tmp_path / "results").exists()


# ------------------------------------------------------------------------------------------------------ the whole study


@pytest.mark.slow
@pytest.mark.alone
def test_the_smoke_study_is_whole_and_a_second_call_only_redraws_it(tmp_path):
    results = tmp_path / "results"
    command = [
        sys.executable,
        "-m",
        "tinylm",
        "study",
        "compute_scaling",
        "--preset",
        "smoke",
        "--results-dir",
        results,
    ]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr[-3000:]
    readme = (results / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", readme)
    assert links and not [link for link in links if "://" not in link and not (results / link).exists()]
    assert str(results) not in readme and "nan" not in readme.lower()
    runs = pd.read_csv(results / "tables" / "runs.csv")
    assert {"isoflop", "seeds", "batches", "forecast", "promised"} <= set(runs.family) and len(runs) == len(
        load_runs(results)
    )
    sealed = forecasts.load(results / "forecasts").iloc[0]
    record = load_runs(results).set_index("run_id").loc[sealed.run_id]
    assert pd.Timestamp(sealed.time) <= pd.Timestamp(record.started) and sealed.learning_rate == record.learning_rate
    others = runs.query("run_id != @sealed.run_id and family != 'promised'")
    assert record.flops >= compute.PRESETS["smoke"].beyond * others.flops.max()
    assert pd.read_csv(results / "tables" / "floor.csv").truth.iloc[0] > corpora.zipf_markov_entropy()
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file() and "notebook" not in path.name}
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0 and "trained in" not in done.stdout
    assert [path.name for path, content in before.items() if path.read_bytes() != content] == []


def test_the_notebook_asks_what_the_parameters_take():
    notebook = json.loads((repository() / "studies" / "compute_scaling.ipynb").read_text())
    cell = next(cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", []))
    given: dict = {}
    exec("".join(cell["source"]), given)
    names = {name for name in given if not name.startswith("__")}
    assert names == {field.name for field in dataclasses.fields(ComputeParameters)}
    assert ComputeParameters(**{name: tuple(given[name]) if name == "minutes" else given[name] for name in names})
