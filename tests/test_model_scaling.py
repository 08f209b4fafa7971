"""The model study: shapes of equal parameters, which runs it trains, and that it finds the law, the depth and the notion of
size that simulated runs were made with. One slow test runs it as a person does."""

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

from tinylm import counts
from tinylm.errors import TextError
from tinylm.study import model_scaling, plots
from tinylm.study.design import Recipe
from tinylm.study.model_scaling import PRESETS, ModelStudy, best_depth, equal_shape, exponent_profile, win_shares
from tinylm.study.parameters import ModelParameters, repository
from tinylm.study.runs import load_runs
from tinylm.study.scaling import fit_power
from tinylm.study.sections import aicc, doubling, left_out_errors, preferred, refit

NOTEBOOK = repository() / "studies" / "model_scaling.ipynb"
CORPUS = {"name": "made up", "tokens": {"train": 10_000_000}}
E, A, ALPHA, SD = 2.6, 60.0, 0.38, 0.006
BEST_RATIO = 18.0  # hidden size over layers


class Simulated(ModelStudy):
    """The study with losses E + A / N^ALPHA, and a price for other shapes than BEST_RATIO."""

    def train(self, runs, **_):
        return pd.DataFrame([self.record(run) for run in runs])

    def record(self, run) -> dict:
        parts, train, model = counts.parameters(run.model), run.train.resolve(run.model), run.model.resolve()
        # What identifies a run, so that a switch that is added changes nobody's luck.
        fields = run.model.resolve().identifying(), run.train.resolve(run.model).identifying()
        name = hashlib.sha256(repr(fields).encode()).hexdigest()[:16]
        best = 0.0098 * (parts["total"] / 5.3e4) ** -0.65
        loss = E + A / parts["total"] ** ALPHA + 0.06 * math.log(train.learning_rate / best) ** 2
        loss += 0.03 * math.log(model.hidden_size / model.num_layers / BEST_RATIO) ** 2
        loss += np.random.default_rng(int(name, 16)).normal(0, SD)
        tokens = train.max_steps * train.windows_per_step * train.seq_len
        row = {**model.to_dict(), **train.to_dict(), "run_id": name, "status": "finished", "flops": run.flops}
        row |= {"params_total": parts["total"], "params_non_embedding": parts["non_embedding"], "seconds": 1.0}
        return row | {"tokens_seen": tokens, "epochs": 0.1, "val_loss": loss, "val_bpb": loss, **run.tags}


def study(folder: Path, preset: str = "full", **changes) -> Simulated:
    settings = ModelParameters(preset=preset, results_dir=str(folder))
    return Simulated(settings, dataclasses.replace(PRESETS[preset], **changes), CORPUS)


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> Simulated:
    """The full study over simulated runs, with its report."""
    made = study(tmp_path_factory.mktemp("model"), bootstrap=200)
    made.measure()
    made.show_learning_rates()
    made.show_noise()
    made.fit_sizes()
    made.show_depth()
    made.compare_sizes()
    made.end()
    return made


# ---------------------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize("preset", ["quick", "full"])
def test_a_family_has_equal_parameters_and_its_own_depths(preset):
    for base, layers in PRESETS[preset].families:
        target = counts.parameters(Recipe().model(base, 512))["total"]
        shapes = [equal_shape(Recipe(), 512, base, count) for count in layers]
        assert [shape.num_layers for shape in shapes] == list(layers)
        assert all(abs(counts.parameters(shape)["total"] / target - 1) < 0.005 for shape in shapes)
        widths = [shape.hidden_size for shape in shapes]
        assert widths == sorted(widths, reverse=True) and len(set(widths)) == len(widths)
        for shape in shapes:  # the feed-forward closes the gap, and stays near its usual width
            usual = shape.replace(intermediate_size=None).resolve().intermediate_size
            assert 0.75 < shape.resolve().intermediate_size / usual < 1.25


def test_the_full_preset_covers_what_was_asked_at_a_cost_that_is_told(tmp_path):
    made = study(tmp_path)
    ladder = [member for member in made.members() if member.family == "ladder"]
    sizes = [counts.parameters(member.model)["total"] for member in ladder]
    assert len(ladder) == 8 and sizes == sorted(sizes) and sizes[-1] > 80 * sizes[0]
    runs = made.expected_runs()
    assert {len(made.guesses(member)) for member in made.members()} == {3}
    assert all(
        run.train.max_steps * run.train.batch_size * 128 == pytest.approx(2e6, rel=0.001)
        and run.train.unique_tokens is None
        for run in runs
    )
    assert sum(run.flops for run in {repr(run): run for run in runs}.values()) < 1.1e14
    assert {layers for base, layers in made.preset.families if base == (64, 2, 4)} == {(1, 2, 3, 4, 6, 8)}


def test_every_model_is_tuned_and_two_have_seeds(told):
    assert (told.frame.groupby(["hidden_size", "num_layers"]).learning_rate.nunique() >= 3).all()
    assert len(told.best) == len(told.members()) and (told.best.edge == "").all()
    groups = told.noise.groupby("hidden_size")
    assert len(groups) == 2 and (groups.seed.nunique() == 3).all()
    assert set(told.noise[told.noise.seed == 0].run_id) <= set(told.frame.run_id)


def test_a_text_too_small_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(model_scaling, "known_text", lambda settings: {"name": "x", "tokens": {"train": 100_000}})
    with pytest.raises(TextError, match=r"full preset.*2,000,000.*100,000.*quickstart"):
        model_scaling.begin(ModelParameters(results_dir=str(tmp_path / "results")))
    assert not (tmp_path / "results").exists()


# ------------------------------------------------------------------------------------------------------ what is found


def test_the_law_the_floor_and_the_depth_are_found_again(told):
    floor = told.size_laws["params_total", "floor"]
    assert floor.intervals["E"][0] - 0.15 < E < floor.intervals["E"][1] + 0.15
    assert preferred({kind: told.size_laws["params_total", kind] for kind in ("no floor", "floor")}) == "floor"
    middle = told.depth.set_index("family").loc["64 x 2"]
    # The truth is a parabola in the log of the ratio, the fit one in log layers: a tenth is theirs to differ by.
    assert middle.inside and middle.ratio_low / 1.1 < BEST_RATIO < middle.ratio_high * 1.1
    assert middle.layers_low < middle.layers < middle.layers_high
    assert middle.deepest == 8 and middle.deepest_costs > middle.one_layer_costs - 0.05


def test_the_report_gives_a_verdict_with_its_uncertainty_and_its_numbers_as_data(told):
    readme = (told.folder / "README.md").read_text(encoding="utf-8")
    notions = pd.read_csv(told.folder / "tables" / "notions.csv").set_index("notion")
    assert notions.left_out.idxmin() == "all parameters" and notions.wins.sum() == pytest.approx(100)
    assert "Loss follows all parameters best" in readme.split("## ")[0]
    assert re.search(r"this is \*\*(settled here|likely, not sure|not settled)\*\*", readme)
    laws = pd.read_csv(told.folder / "tables" / "laws.csv")
    assert set(laws.law) == {
        f"{n}, {kind}" for n in ("all parameters", "without embeddings") for kind in ("no floor", "floor")
    }
    assert laws.status.isin(["identified", "weak", "not identified"]).all() and laws.why.notna().all()
    links = re.findall(r"\]\(([^)#]+)\)", readme)
    assert not [link for link in links if "://" not in link and link != "runs" and not (told.folder / link).exists()]
    assert "nan" not in readme.lower() and " inf" not in readme.lower()


def shapes() -> pd.DataFrame:
    made = [(12, 2), (16, 2), (24, 2), (32, 2), (48, 2), (64, 2), (96, 4), (128, 4), (88, 1), (48, 4), (40, 6), (32, 8)]
    return pd.DataFrame(made, columns=["hidden_size", "num_layers"])


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_power_of_width_in_a_product_is_found(power):
    frame = shapes()
    size = frame.hidden_size**power * frame.num_layers
    noise = np.random.default_rng(3).normal(0, 0.004, len(frame))
    frame["val_loss"] = 2.5 + 3 * (size / size.min()) ** -0.35 + noise
    table, (best, low, high) = exponent_profile(frame)
    assert low < power < high and abs(best - power) <= 0.2
    assert not low < 3 - power < high  # the other product is ruled out
    rows = {name: frame.hidden_size**p * frame.num_layers for name, p in (("h L", 1), ("h2 L", 2))}
    shares = win_shares({name: left_out_errors(x, frame.val_loss) for name, x in rows.items()})
    assert shares[{1.0: "h L", 2.0: "h2 L"}[power]] > 0.95 and shares.sum() == pytest.approx(1)
    assert (table.delta >= 0).all() and table.delta.min() == 0


def test_ways_that_predict_alike_share_the_wins():
    errors = np.random.default_rng(0).normal(size=40)
    shares = win_shares({"a": errors, "b": errors[::-1]})
    assert shares.max() < 0.7


def family(losses: list[float], layers: tuple[int, ...] = (1, 2, 3, 4, 6, 8)) -> pd.DataFrame:
    widths = [round(128 / count) for count in layers]
    rows = {"family": "64 x 2", "num_layers": layers, "hidden_size": widths, "val_loss": losses, "target": 130_000}
    return pd.DataFrame(rows)


def test_the_best_depth_is_the_vertex_with_its_interval():
    layers = np.array([1, 2, 3, 4, 6, 8])
    losses = 3.5 + 0.05 * np.log(layers / 2.5) ** 2
    found = best_depth(family(losses), seed_sd=0.004, freedom=8)
    assert found["inside"] and found["layers"] == pytest.approx(2.5) and found["loss"] == pytest.approx(3.5)
    assert (
        found["layers_low"] < 2.5 < found["layers_high"] and found["ratio_low"] < found["ratio"] < found["ratio_high"]
    )
    assert found["p"] < 0.01 and found["one_layer_costs"] > 0 and found["deepest_costs"] > 0
    wide = best_depth(family(losses), seed_sd=0.008, freedom=8)
    assert wide["layers_high"] - wide["layers_low"] > found["layers_high"] - found["layers_low"]


def test_a_family_that_only_falls_has_no_best_depth_and_a_flat_one_is_chance():
    falling = best_depth(family([3.6, 3.55, 3.52, 3.5, 3.47, 3.45]), seed_sd=0.002, freedom=8)
    assert not falling["inside"] and falling["layers"] == pytest.approx(8)
    flat = best_depth(family([3.500, 3.504, 3.498, 3.502, 3.497, 3.501]), seed_sd=0.01, freedom=8)
    assert flat["p"] > 0.5 and math.isnan(flat["layers_low"]) and math.isnan(flat["layers_high"])


def rows() -> tuple[np.ndarray, np.ndarray]:
    x = np.geomspace(1e4, 1e6, 8)
    return x, (E + A / x**ALPHA) * np.exp(np.random.default_rng(1).normal(0, 0.002, 8))


@pytest.mark.parametrize("floor", [False, True])
def test_refits_and_errors_left_out_are_those_of_single_fits(floor):
    x, loss = rows()
    whole = fit_power(x, loss, floor=floor, objective="lsq", bootstrap=0)
    predicted, squares = refit(x, loss, np.ones((1, 8)), floor)
    assert predicted[0] == pytest.approx(whole.predict(x).loss.to_numpy(), abs=1e-5)
    assert squares[0] == pytest.approx(whole.value, rel=1e-4)
    rest = np.arange(8) != 3
    alone = fit_power(x[rest], loss[rest], floor=floor, objective="lsq", bootstrap=0)
    errors = left_out_errors(x, loss, floor)
    assert errors[3] == pytest.approx(loss[3] - alone.predict(x[3]).loss.iloc[0], abs=1e-4)


def test_criteria_prefer_the_law_that_made_the_rows():
    x, loss = rows()
    laws = {kind: fit_power(x, loss, floor=kind == "floor", bootstrap=100) for kind in ("no floor", "floor")}
    assert preferred(laws) == "floor" and aicc(laws["floor"]) < aicc(laws["no floor"])
    value, low, high = doubling(laws["floor"])
    truth = (E + A / 1e6**ALPHA) / (E + A / 5e5**ALPHA)
    assert low < value < high and value == pytest.approx(truth, abs=0.005)
    few = {kind: fit_power(x[:4], loss[:4], floor=kind == "floor", bootstrap=0) for kind in laws}
    assert preferred(few) == "no floor" and aicc(few["floor"]) == math.inf  # four points cannot judge three parameters


# ------------------------------------------------------------------------------------------------------------ figures


def test_figures_show_every_shape_and_fit_their_page(told):
    drawings = {
        "depths": lambda axes: plots.depths(told.shapes, told.depth, axes, 0.01),
        "spreads": lambda axes: [plots.spreads(told.noise, axes)],
        "notions": lambda axes: plots.notions(
            told.best, {"h_l": fit_power(told.best.h_l, told.best.val_loss, bootstrap=0)}, {"h_l": "h L"}, axes
        ),
    }
    for name, draw in drawings.items():
        panels = draw(None)
        panels[0].figure.savefig(io.BytesIO(), format="png")
        for ax in panels:
            box = ax.get_tightbbox()
            assert box.x0 > -2 and box.x1 < ax.figure.bbox.x1 + 2 and ax.get_xlabel(), name
    ax = drawings["notions"](None)[0]
    marks = sum(len(line.get_xdata()) for line in ax.lines if line.get_linestyle() == "None")
    assert marks == len(told.best)


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
    assert set(runs.status) <= {"finished", "diverged"} and runs.num_layers.nunique() == 3
    records = {path.name: json.loads(path.read_text())["finished"] for path in (results / "runs").iterdir()}
    before = {path: path.read_bytes() for path in sorted(results.rglob("*")) if path.is_file()}
    second = subprocess.run(list(map(str, words)), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert second.returncode == 0 and "trained in" not in second.stdout + second.stderr
    assert {path.name: json.loads(path.read_text())["finished"] for path in (results / "runs").iterdir()} == records
    assert {path: path.read_bytes() for path in before} == before
