"""The data study: which runs it trains, that it finds what simulated runs were made with, and that no loss from the middle
of a schedule enters a law. One slow test runs it as a person does."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from tinylm import counts
from tinylm.errors import TextError
from tinylm.study import data_scaling, plots
from tinylm.study.data_scaling import PRESETS, DataStudy, Reading, fresh_worth, passes_worth
from tinylm.study.design import Recipe
from tinylm.study.parameters import DataParameters, repository
from tinylm.study.planner import Evidence
from tinylm.study.runs import load_runs
from tinylm.study.scaling import evaluate_law

NOTEBOOK = repository() / "studies" / "data_scaling.ipynb"
CORPUS = {"name": "made up", "tokens": {"train": 10_000_000}}
TRUTH = {"E": 2.3, "A": 40.0, "B": 90.0, "alpha": 0.34, "beta": 0.36, "R_D": 6.0, "R_N": 8.0}
SD, SLOPE = 0.008, -0.12


class Simulated(DataStudy):
    """The study with losses from TRUTH, a best rate that falls as epochs^SLOPE, and runs over little text that overfit."""

    def train(self, runs, **_):
        self.simulated = getattr(self, "simulated", {})
        return pd.DataFrame([self.record(run) for run in runs])

    def record(self, run) -> dict:
        train = run.train.resolve(run.model)
        params = counts.parameters(run.model)["total"]
        tokens = train.max_steps * train.windows_per_step * train.seq_len
        unique = min(tokens, train.unique_tokens)
        # What identifies a run, so that a switch that is added changes nobody's luck.
        fields = run.model.resolve().identifying(), run.train.resolve(run.model).identifying()
        name = hashlib.sha256(repr(fields).encode()).hexdigest()[:16]
        rng = np.random.default_rng(int(name, 16))
        best = 0.0098 * (params / 5.3e4) ** -0.65 * (tokens / unique) ** SLOPE
        loss = float(
            evaluate_law("data-constrained", TRUTH, *(np.array([float(v)]) for v in (params, tokens, unique)))[0]
        )
        loss += 0.06 * math.log(train.learning_rate / best) ** 2 + rng.normal(0, SD)
        read = np.linspace(0.05, 1, 20)
        curve = pd.DataFrame({"tokens": read * tokens, "val_loss": loss + np.exp(-8 * read)})
        steps, status = train.max_steps, "finished"
        if train.patience and tokens / unique > 6 and unique < 3 * params:
            curve["val_loss"] = loss - 0.2 + 2 * (read - 0.4) ** 2  # falls, and rises again
            curve, steps, status = curve.iloc[:13], int(0.65 * steps), "early_stopped"
        self.simulated[name] = curve.assign(train_loss=curve.val_loss - 0.3 * read[: len(curve)])
        facts = {"run_id": name, "status": status, "steps": steps, "flops": run.flops, "seconds": 1.0, "val_bpb": 2.0}
        facts |= {"params_total": params, "params_non_embedding": counts.parameters(run.model)["non_embedding"]}
        facts |= {"tokens_seen": tokens * steps / train.max_steps, "epochs": tokens / unique}
        loss = curve.val_loss.min() if train.patience else curve.val_loss.iloc[-1]
        row = {**run.model.to_dict(), **train.to_dict(), **facts, "unique_tokens": unique, "val_loss": loss}
        return row | {"train_loss": 0.0, **run.tags}

    def curves(self, run_ids):
        return {name: self.simulated[name] for name in run_ids}


def study(folder: Path, preset: str = "full", kind: type = Simulated, **changes) -> DataStudy:
    settings = DataParameters(preset=preset, results_dir=str(folder))
    return kind(settings, dataclasses.replace(PRESETS[preset], **changes), CORPUS)


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> DataStudy:
    """The full study over simulated runs, with its report."""
    made = study(tmp_path_factory.mktemp("data"), bootstrap=50)
    made.measure()
    made.show_learning_rates()
    made.show_noise()
    made.show_amounts()
    made.show_epochs()
    made.show_overfitting()
    made.show_worth()
    made.fit_repetition()
    made.end()
    return made


# ---------------------------------------------------------------------------------------------------- what is trained


def test_the_full_preset_covers_what_was_asked_at_a_cost_that_is_told(tmp_path):
    made = study(tmp_path)
    read = {}
    for reading in made.readings():
        read.setdefault(reading.shape, {}).setdefault(reading.unique, []).append(reading.epochs)
    small, middle, large = read.values()
    for amounts in (small, middle):
        assert min(amounts) == 5e4 and max(amounts) == 1.5e6
        assert amounts[5e4] == amounts[5e5] == [1, 2, 4, 8, 16] and amounts[1.5e6] == [1, 2, 4]
    assert max(large) == 5e5 and max(large[5e5]) == 16
    assert all(reading.epochs == 1 or reading.unique * reading.epochs <= 8e6 for reading in made.readings())
    assert sum(run.flops for run in {repr(run): run for run in made.expected_runs()}.values()) < 1.1e14


@pytest.mark.parametrize("preset", PRESETS)
def test_every_schedule_ends_where_its_last_epoch_does(preset, tmp_path):
    made = study(tmp_path, preset)
    for reading in made.readings():
        for run in made.runs_of(reading, [0.01]):
            tokens = run.train.max_steps * run.train.batch_size * made.recipe.seq_len
            assert tokens == pytest.approx(reading.unique * reading.epochs, rel=0.1 if preset == "smoke" else 0.01)
            assert run.train.unique_tokens == reading.unique
            assert (run.train.patience is None) == (reading.epochs == 1)  # new text cannot be learnt by heart
            assert run.train.warmup_steps < run.train.max_steps / 2


def test_rates_are_tuned_at_both_ends_and_follow_a_rule_in_between(told):
    tuned = told.frame.groupby(["hidden_size", "amount", "passes"]).learning_rate.nunique()
    assert (tuned >= 3).all()
    assert {amount for _, amount, passes in tuned.index if passes == 16} == {5e4, 2e5}
    assert set(told.places.amount) == {amount for _, amount, passes in tuned.index if passes == 1}
    assert told.rates.groupby("hidden_size").slope.first().between(SLOPE - 0.12, SLOPE + 0.12).all()
    reading = Reading((64, 2, 4), 5e5, 8)
    once = told.rates[(told.rates.hidden_size == 64) & (told.rates.amount == 5e5) & (told.rates.passes == 1)].iloc[0]
    assert told.rate(reading) == pytest.approx(once.learning_rate * 8**once.slope, rel=0.01)
    assert set(told.others[(told.others.amount == 5e5) & (told.others.passes == 8)].learning_rate) <= {
        told.rate(dataclasses.replace(reading, shape=arm.shape)) for arm in told.preset.arms
    }


def test_a_rate_at_an_edge_does_not_bend_the_rule(tmp_path):
    made = study(tmp_path, moves=0)
    lopsided = lambda reading: [0.0005, 0.001] if reading.epochs > 1 else DataStudy.guesses(made, reading)  # noqa: E731
    made.guesses = lopsided
    made.stages(made.train)
    assert (made.rates[made.rates.passes > 1].edge != "").all() and (made.rates.slope == 0).all()


def test_seeds_repeat_runs_of_the_study(told):
    groups = told.noise.groupby(["hidden_size", "passes"])
    assert len(groups) == 4 and (groups.seed.nunique() == 3).all() and (groups.learning_rate.nunique() == 1).all()
    assert set(told.noise[told.noise.seed == 0].run_id) <= set(told.frame.run_id) | set(told.others.run_id)
    assert told.seed_sd == pytest.approx(SD, rel=0.6) and told.freedom == 8


def test_a_text_too_small_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(data_scaling, "known_text", lambda settings: {"name": "x", "tokens": {"train": 100_000}})
    with pytest.raises(TextError, match=r"full preset.*1,500,000.*100,000.*quickstart"):
        data_scaling.begin(DataParameters(results_dir=str(tmp_path / "results")))
    assert not (tmp_path / "results").exists()


# ------------------------------------------------------------------------------------------------------ what is found


def test_no_loss_from_the_middle_of_a_schedule_enters_a_law(told):
    stopped = told.places[told.places.status == "early_stopped"]
    assert len(stopped) > 3 and stopped.end_loss.isna().all() and stopped.val_loss.notna().all()
    assert told.law.n == len(told.places) - len(stopped)
    whole = told.places[told.places.ended]
    assert (whole.end_loss >= whole.val_loss).all()
    assert set(told.law.data.observed) == set(whole.end_loss)
    assert set(told.once_laws["64 x 2"]["no floor"].data.observed) <= set(whole.end_loss)


def test_a_run_stopped_at_its_last_evaluation_had_its_whole_schedule(tmp_path):
    made = study(tmp_path, bootstrap=0)
    record = made.record
    made.record = lambda run: record(run) | {"status": "early_stopped"}
    made.measure()
    late = made.places[made.places.steps == made.places.max_steps]
    assert len(late) and late.ended.all()


def test_the_law_of_repetition_is_found_again(told):
    verdicts = told.diagnosis.verdicts
    for name in ("R_D", "R_N", "beta"):
        assert verdicts.low[name] < TRUTH[name] < verdicts.high[name]
    assert verdicts.status["R_D"] == "identified"
    errors = told.rivals.set_index("law").error_percent
    assert (
        errors["repeats discounted (fitted)"] < 0.5 * errors["repeats as good as new"] < errors["repeats worth nothing"]
    )


def test_the_report_says_what_is_identified_and_its_numbers_are_data(told):
    readme = (told.folder / "README.md").read_text(encoding="utf-8")
    assert "R_D*: **identified**" in readme and "the published 15.39 is not among them" in readme
    assert f"R_D* = {told.law.params['R_D']:.3g}" in readme.split("## ")[0]
    links = re.findall(r"\]\(([^)#]+)\)", readme)
    assert not [link for link in links if "://" not in link and link != "runs" and not (told.folder / link).exists()]
    verdicts = pd.read_csv(told.folder / "tables" / "repetition.csv").set_index("parameter")
    assert verdicts.status["R_D"] == "identified" and verdicts.why.notna().all()
    shown, everything = (pd.read_csv(told.folder / "tables" / f"laws{end}.csv") for end in ("", "_all"))
    assert set(shown.law) < set(everything.law) and set(everything.parameter) == {"A", "alpha", "E"}
    amounts = pd.read_csv(told.folder / "tables" / "amounts.csv")
    assert (amounts.best <= amounts.once).all() and (amounts.gain >= 0).all()
    assert "nan" not in readme.lower()


def test_the_planner_takes_the_law_with_its_own_repetition(told):
    known = Evidence.from_dict(json.loads((told.folder / "tables" / "law.json").read_text()))
    assert known.repetition.tokens_star == told.law.params["R_D"] and not known.repetition.assumed
    plan = known.plan(Recipe(), tokens=8 * CORPUS["tokens"]["train"])
    assert plan.epochs == pytest.approx(8, rel=0.01) and plan.effective_tokens < 0.8 * plan.tokens


def fresh(beta: float = 0.3) -> pd.DataFrame:
    amounts = [5e4, 1e5, 2e5, 5e5, 1e6, 1.5e6]
    rows = [(amount, 1, 3 + 60 * amount**-beta) for amount in amounts]
    return pd.DataFrame(rows, columns=["amount", "passes", "end_loss"])


def read_again(worth: dict[int, float], amount: float = 1e5) -> pd.DataFrame:
    """Fresh text, and one amount whose epochs stand for so much of it."""
    curve = np.poly1d(np.polyfit(np.log(fresh().amount), fresh().end_loss, 2))
    rows = fresh().assign(end_loss=curve(np.log(fresh().amount)))
    more = [(amount, passes, curve(np.log(amount * times))) for passes, times in worth.items()]
    rows = pd.concat([rows, pd.DataFrame(more, columns=rows.columns)], ignore_index=True)
    return rows.assign(size="32 x 2", ended=True, unique_tokens=rows.amount)


@pytest.mark.parametrize("times", [1.0, 1.6, 2.0])
def test_the_worth_of_an_epoch_is_the_fresh_text_with_its_loss(times):
    table = fresh_worth(read_again({2: times}), seed_sd=0.01, freedom=8)
    row = table[table.passes == 2].iloc[0]
    assert row.worth == pytest.approx(times, rel=0.01) and row.worth_low < times < row.worth_high
    second = passes_worth(table, (2, 5)).iloc[0]
    assert second.epoch == 2 and second.share == pytest.approx(times - 1, abs=0.02)
    assert second.share_low < times - 1 < second.share_high
    assert second.nats_low < second.nats < second.nats_high
    half = 1.96 * 2**0.5 * 0.01 * 1.25  # two losses redrawn; the spread itself is drawn too
    assert 0.5 * (second.nats_high - second.nats_low) == pytest.approx(half, rel=0.15)


def test_the_fifth_epoch_is_read_between_its_neighbours_and_only_there():
    table = fresh_worth(read_again({2: 1.9, 4: 3.4, 8: 5.0}), seed_sd=0.005, freedom=20)
    fifth = passes_worth(table, (5,)).iloc[0]
    part = math.log(5 / 4) / math.log(2)
    assert fifth.share == pytest.approx(3.4 * (5.0 / 3.4) ** part - 3.4, abs=0.02)
    losses = table.set_index("passes").end_loss
    assert fifth.nats == pytest.approx(part * (losses[4] - losses[8]))
    assert passes_worth(fresh_worth(read_again({2: 1.9, 4: 3.4, 16: 6.0}), 0.005, 20), (5,)).empty


def test_what_no_fresh_text_reaches_has_nats_but_no_share():
    rows = read_again({2: 2.0}, amount=1.5e6)
    table = fresh_worth(rows, seed_sd=0.003, freedom=8)
    assert math.isnan(table[(table.passes == 2)].worth.iloc[0])
    second = passes_worth(table, (2,)).iloc[0]
    assert second.nats > 0 and math.isnan(second.share)


# ------------------------------------------------------------------------------------------------------------ figures


def test_figures_tell_stopped_runs_from_whole_ones_and_fit_their_page(told):
    drawings = [
        lambda axes: plots.epochs(told.places, axes),
        lambda axes: plots.epochs(told.places, axes, predict=lambda *x: told.law.predict(*x).loss.to_numpy()),
        lambda axes: plots.worth(told.worth, axes),
    ]
    for draw in drawings:
        panels = draw(None)
        panels[0].figure.savefig(io.BytesIO(), format="png")
        for ax in panels:
            box = ax.get_tightbbox()
            assert box.x0 > -2 and box.x1 < ax.figure.bbox.x1 + 2 and ax.get_xlabel()
    figure = Figure(layout="constrained")
    axes = plots.epochs(told.places, figure.subplots(1, 3))
    hollow = sum(len(line.get_xdata()) for ax in axes for line in ax.lines if line.get_markerfacecolor() == "white")
    assert hollow == (~told.places.ended).sum() > 0


# -------------------------------------------------------------------------------------------------- as a person runs it


@pytest.mark.slow
def test_a_smoke_study_runs_from_any_folder_and_a_second_call_trains_nothing(tmp_path):
    environment = {**os.environ, "JUPYTER_PREFER_ENV_PATH": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    results = tmp_path / "results"
    words = [sys.executable, "-m", "papermill", NOTEBOOK, tmp_path / "out.ipynb", "--log-output", "--no-progress-bar"]
    words += ["-p", "preset", "smoke", "-p", "results_dir", results]
    first = subprocess.run(list(map(str, words)), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-3000:]
    assert re.search(r"plan: \d+ runs, \S+ FLOPs in all", first.stderr + first.stdout)
    executed = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")
    runs = load_runs(results)
    assert set(runs.status) <= {"finished", "early_stopped", "diverged"} and runs.unique_tokens.nunique() >= 4
    records = {path.name: json.loads(path.read_text())["finished"] for path in (results / "runs").iterdir()}
    before = {path: path.read_bytes() for path in sorted(results.rglob("*")) if path.is_file()}
    second = subprocess.run(list(map(str, words)), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert second.returncode == 0 and "trained in" not in second.stdout + second.stderr
    assert {path.name: json.loads(path.read_text())["finished"] for path in (results / "runs").iterdir()} == records
    assert {path: path.read_bytes() for path in before} == before
