"""Figures: they show the numbers they were given, fit on their page, and leave no global state behind."""

from __future__ import annotations

import io
import itertools
import warnings

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tinylm.errors import LabError
from tinylm.study import forecasts, plots
from tinylm.study.design import Recipe, rung_sizes
from tinylm.study.planner import Evidence, RepeatedText
from tinylm.study.scaling import (
    Fit,
    evaluate_law,
    fit_growth,
    fit_power,
    fit_surface,
    isoflop_laws,
    learning_rate_rule,
)

LAW = {"E": 1.6, "A": 30.0, "B": 120.0, "alpha": 0.35, "beta": 0.37}


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    """Three isoFLOP families of five sizes at three rates; one run diverged."""
    rng, rows = np.random.default_rng(0), []
    for C in (1e11, 2e11, 4e11):
        for N in (9000, 16000, 27000, 46000, 78000):
            D, best = C / 6 / N, 0.012 * (N / 4e4) ** -0.35
            for rate in best * np.array([0.5, 1.1, 2.0]):
                L = evaluate_law("surface", LAW, N, D) + 0.08 * np.log(rate / best) ** 2 + 0.004 * rng.standard_normal()
                rows.append({"budget": C, "params_total": N, "tokens_seen": D, "learning_rate": rate, "val_loss": L})
    frame = pd.DataFrame(rows).assign(status="finished", seed=0)
    frame.loc[2, ["val_loss", "status"]] = np.nan, "diverged"
    return frame


@pytest.fixture(scope="module")
def iso(frame):
    return isoflop_laws(frame, bootstrap=50)


@pytest.fixture(scope="module")
def law():
    x = np.geomspace(3e4, 2e6, 7)
    return fit_power(x, 2.4 + 40 * x**-0.31 * (1 + 0.003 * np.cos(9 * np.log(x))), floor=True, bootstrap=50)


@pytest.fixture(scope="module")
def sealed() -> pd.DataFrame:
    common = {"study": "quickstart", "params_total": 1.2e5, "tokens": 3e6}
    frame = pd.DataFrame(
        {
            "loss": [2.9, 2.5, 2.3, 2.7],
            "low": [2.86, 2.44, 2.2, 2.6],
            "high": [2.95, 2.55, 2.4, 2.8],
            "scored": [True, True, False, True],
            "observed": [2.91, 2.6, np.nan, np.nan],
            "inside": [True, False, np.nan, False],  # the last one's run diverged
        }
    )
    frame["error"] = frame["observed"] - frame["loss"]
    frame["error_percent"] = 100 * frame["error"] / frame["loss"]
    return frame.assign(**common)


def history() -> pd.DataFrame:
    tokens = np.geomspace(1e4, 1e6, 12)
    return pd.concat(
        pd.DataFrame(
            {"run_id": name, "tokens": tokens, "val_loss": top * tokens**-0.1, "train_loss": top * tokens**-0.11}
        )
        for name, top in (("a", 9), ("b", 10))
    )


def profile() -> pd.DataFrame:
    """A closed profile, one open above, and a flat one on a log axis; the limit is 2."""
    x = np.linspace(-1, 1, 41)
    curves = {
        "alpha": (0.35 + 0.1 * x, 8 * x**2),
        "E": (1.6 + x, np.where(x < 0, 5 * x**2, 0.3 * x)),
        "A": (30 * 9**x, 0.1 * x**2),
    }
    return pd.concat(pd.DataFrame({"parameter": k, "value": v, "delta": d}) for k, (v, d) in curves.items())


def left_out() -> pd.DataFrame:
    return pd.DataFrame({"left_out": ["9.7k", "9.7k", "the largest budget"], "error_percent": [-0.4, 0.1, 1.2]})


def repeated(fit: Fit) -> pd.DataFrame:
    """Runs of one size over two amounts of text, up to 16 epochs, exactly as the law has them."""
    rows = [(unique, epochs) for unique in (5e4, 5e5) for epochs in (1, 4, 16)]
    frame = pd.DataFrame(rows, columns=["unique_tokens", "epochs"]).assign(params_total=3e4)
    return frame.assign(
        val_loss=[float(RepeatedText(fit, unique).loss(3e4, unique * epochs)) for unique, epochs in rows]
    )


def law_of_repeated(fit: Fit):
    return lambda params, tokens, unique: RepeatedText(fit, float(unique[0])).loss(params, tokens)


def limited() -> pd.DataFrame:
    x = np.repeat(np.geomspace(5e4, 1.5e6, 5), 2)
    return pd.DataFrame({"unique_tokens": x, "val_loss": 9 * x**-0.09 + [0, 0.1] * 5, "train_loss": 8.5 * x**-0.09})


@pytest.fixture(scope="module")
def drawings(frame, iso, law, sealed) -> dict:
    surface = fit_surface(iso.sizes.params_total, iso.sizes.tokens_seen, iso.sizes.val_loss, bootstrap=30)
    ladder = rung_sizes(Recipe(), 512)
    known = Evidence(surface, learning_rate_rule(frame), ladder, 0.01, 4e11, tokens_available=2e6)
    noise = pd.DataFrame({"val_loss": [3.46, 3.47, 3.48, 3.465], "budget": [1, 1, 2, 2]})
    return {
        "isoflop": lambda ax: plots.isoflop(frame, iso.minima, ax=ax),
        "frontier_size": lambda ax: plots.frontier(iso.minima, iso.laws["N_opt"], "params_opt", ax=ax),
        "frontier_tokens": lambda ax: plots.frontier(iso.minima, iso.laws["D_opt"], "tokens_opt", ax=ax),
        "frontier_loss": lambda ax: plots.frontier(iso.minima, iso.laws["L_min"], "loss_min", ax=ax),
        "law": lambda ax: plots.law(law, ax=ax, x=plots.TOKENS, label="L(D)"),
        "surface": lambda ax: plots.surface(surface, iso.sizes, ax=ax, planned=(2e5, 5e6)),
        "surface_alone": lambda ax: plots.surface(surface, ax=ax),
        "surface_plan": lambda ax: plots.surface(surface, ax=ax, planned=known.plan(Recipe(), flops=4e12)),
        "learning_rates": lambda ax: plots.learning_rates(frame, ax),
        "residuals": lambda ax: plots.residuals(surface, ax),
        "residuals_seeds": lambda ax: plots.residuals(surface, ax, seed_sd=0.01),
        "clouds": lambda ax: plots.clouds(surface, ax),
        "clouds_law": lambda ax: plots.clouds(law, ax, pairs=[("A", "alpha"), ("E", "alpha")]),
        "profiles": lambda ax: plots.profiles(profile(), ax, threshold=2.0),
        "profiles_bare": lambda ax: plots.profiles(profile(), ax),
        "leave_out": lambda ax: plots.leave_out(left_out(), ax=ax),
        "repetition": lambda ax: plots.repetition(repeated(surface), law_of_repeated(surface), ax=ax),
        "forecast": lambda ax: plots.forecast(sealed, ax=ax),
        "calibration": lambda ax: plots.calibration(forecasts.calibration(sealed.assign(name="x")).table, ax),
        "seeds": lambda ax: plots.seeds(noise, ax=ax),
        "seeds_by": lambda ax: plots.seeds(noise, ax=ax, by="budget"),
        "data_limited": lambda ax: plots.data_limited(limited(), ax=ax),
        "data_limited_fit": lambda ax: plots.data_limited(limited(), fit_power(*data_points(), bootstrap=20), ax=ax),
        "curves": lambda ax: plots.curves(history(), ax=ax),
    }


def data_points():
    best = limited().groupby("unique_tokens", as_index=False)["val_loss"].min()
    return best["unique_tokens"], best["val_loss"]


NAMES = (
    *("isoflop", "frontier_size", "frontier_tokens", "frontier_loss", "law", "learning_rates"),
    *("surface", "surface_alone", "surface_plan", "residuals", "residuals_seeds", "clouds", "clouds_law"),
    *("profiles", "profiles_bare", "leave_out", "repetition", "forecast", "calibration", "seeds", "seeds_by"),
    *("data_limited", "data_limited_fit", "curves"),
)


def test_every_drawing_is_looked_at(drawings):
    assert set(NAMES) == set(drawings)


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_draws_alone_and_into_axes_given(drawings, name):
    before = dict(mpl.rcParams)
    alone = drawings[name](None)
    panels = alone if isinstance(alone, list) else [alone]
    assert all(isinstance(ax, Axes) for ax in panels)
    given = Figure(figsize=(7, 4.3), layout="constrained").subplots()
    assert drawings[name](given) is given
    for ax in (*panels, given):
        assert ax.get_xlabel() and (ax.get_ylabel() or name.startswith(("forecast", "seeds")) or ax is not panels[0])
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # matplotlib warns where a layout collapses or a glyph is missing
            ax.figure.savefig(io.BytesIO(), format="png")
        labels = [tick.label1 for tick in ax.xaxis.get_major_ticks() if tick.label1.get_text() and visible(tick, ax)]
        boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.x0)
        assert len(boxes) >= 2, "an axis needs at least two labelled ticks"
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes)), "tick labels overlap"
        assert inside_page(ax), "something is drawn beyond the page"
    assert dict(mpl.rcParams) == before


def visible(tick, ax) -> bool:
    low, high = sorted(ax.get_xlim())
    return low <= tick.get_loc() <= high


def inside_page(ax: Axes) -> bool:
    """Whether axes, labels and legend lie on the figure's page (2 pixels of slack)."""
    box, page = ax.get_tightbbox(), ax.figure.bbox
    return box.x0 > -2 and box.y0 > -2 and box.x1 < page.x1 + 2 and box.y1 < page.y1 + 2


def test_figures_are_the_same_bytes_each_time(drawings):
    def svg() -> bytes:
        with plots.style():
            buffer = io.BytesIO()
            drawings["isoflop"](None).figure.savefig(buffer, format="svg", metadata={"Date": None})
            return buffer.getvalue()

    assert svg() == svg()


def test_pyplot_holds_on_to_nothing(drawings):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    drawings["isoflop"](None)
    assert plt.get_fignums() == before


def points(ax: Axes, marker: str) -> np.ndarray:
    lines = [np.column_stack(line.get_data()) for line in ax.lines if line.get_marker() == marker]
    return np.concatenate(lines) if lines else np.zeros((0, 2))


def test_isoflop_stars_are_the_minima_and_hollow_where_not_inside(frame, iso):
    minima = iso.minima.copy()
    minima.loc[2, "inside"] = False
    ax = plots.isoflop(frame, minima)
    np.testing.assert_allclose(points(ax, "*"), minima[["params_opt", "loss_min"]])
    faces = [line.get_markerfacecolor() for line in ax.lines if line.get_marker() == "*"]
    assert [face == "none" for face in faces] == [False, False, True]
    assert ax.get_xscale() == "log"


def test_learning_rate_panels_mark_vertices_edges_and_diverged_runs(frame):
    panels = plots.learning_rates(frame)
    assert len(panels) == 3
    assert [len(points(panel, "*")) for panel in panels] == [5, 5, 5]
    assert len(points(panels[0], "x")) == 1 and points(panels[0], "x")[0, 0] == frame.learning_rate[2]
    two = Figure().subplots(1, 3)
    assert plots.learning_rates(frame, two) is two


def test_a_law_is_drawn_through_its_own_prediction(law):
    ax = plots.law(law, extend=4)
    dashed = next(line for line in ax.lines if line.get_linestyle() == "--")
    x, y = dashed.get_data()
    assert x[-1] == pytest.approx(4 * law.data["x"].max())
    np.testing.assert_allclose(y, law.predict(x)["loss"])
    assert any("floor 2.4" in text.get_text() for text in ax.texts)


def test_a_band_is_missing_where_there_was_no_bootstrap():
    x = np.geomspace(1e11, 1e13, 4)
    assert len(plots.law(fit_growth(x, x**0.5, bootstrap=0), x=plots.FLOPS).collections) == 0


def test_a_missed_forecast_looks_different(sealed):
    ax = plots.forecast(sealed)
    assert points(ax, "o").tolist() == [[2.91, 0]]
    missed = points(ax, "X")
    assert missed[np.isfinite(missed).all(axis=1)].tolist() == [[2.6, 1]]
    words = [text.get_text() for text in ax.texts]
    assert words == ["+0.34 %", "+4.00 %", "not yet scored", "its run diverged"]


def test_calibration_shows_what_was_scored_against_its_own_interval(sealed):
    left, right = plots.calibration(forecasts.calibration(sealed.assign(name="x")).table)
    assert points(left, "o").tolist() == [[2.9, 2.91]] and points(left, "X").tolist() == [[2.5, 2.6]]
    bars = [np.array(path.vertices)[:, 1].tolist() for path in left.collections[0].get_paths()]
    assert bars == [[2.86, 2.95], [2.44, 2.55]]
    np.testing.assert_allclose(points(right, "o"), [[1, 1.96 * 0.01 / 0.05]], rtol=1e-3)
    missed = points(right, "X")
    np.testing.assert_allclose(missed[0], [2, 1.96 * 0.1 / 0.05], rtol=1e-3)
    assert missed[1, 0] == 3 and missed[1, 1] > 0.9 * right.get_ylim()[1]  # the run that diverged, at the rim


def test_residuals_are_percent_of_the_prediction():
    data = pd.DataFrame(
        {"params": [1e4, 1e5, 1e5], "tokens": [1e6, 1e7, 3e7], "residual": np.log([1.02, 0.99, 1.03]), "observed": 3.0}
    )
    panels = plots.residuals(Fit("surface", LAW, data=data), seed_sd=0.03)
    np.testing.assert_allclose(points(panels[1], "o"), [[1e6, 2.0], [1e7, -1.0], [3e7, 3.0]])
    means = [line.get_ydata() for line in panels[0].lines if line.get_color() == plots.COLOURS[1]]
    np.testing.assert_allclose(means, [[1.0, 1.0]])  # of the two runs of one size; single runs have none
    band = panels[0].patches[0].get_extents().transformed(panels[0].transData.inverted())
    assert (band.y0, band.y1) == pytest.approx((-1.96, 1.96))


def test_a_cloud_holds_every_resample_and_the_estimate():
    rng = np.random.default_rng(0)
    samples = pd.DataFrame({name: value * np.exp(0.02 * rng.standard_normal(200)) for name, value in LAW.items()})
    fit = Fit("surface", LAW, samples=samples, intervals={name: (0.9 * v, 1.1 * v) for name, v in LAW.items()})
    panels = plots.clouds(fit)
    assert [panel.get_xscale() for panel in panels] == ["linear"] * 3
    np.testing.assert_allclose(points(panels[0], "o"), samples[["alpha", "beta"]])
    np.testing.assert_allclose(points(panels[0], "*"), [[0.35, 0.37]])
    assert plots.clouds(fit, pairs=[("A", "alpha")])[0].get_xscale() == "log"
    ends = [line.get_data() for line in panels[0].lines if line.get_linewidth() == 4]
    np.testing.assert_allclose(ends[0], [[0.9 * 0.35, 1.1 * 0.35], [0, 0]])
    np.testing.assert_allclose(ends[1], [[0, 0], [0.9 * 0.37, 1.1 * 0.37]])
    with pytest.raises(LabError, match="needs a bootstrap"):
        plots.clouds(Fit("surface", LAW))


def test_a_profile_is_drawn_in_units_of_its_limit_and_says_where_it_has_none():
    panels = plots.profiles(profile(), threshold=2.0)
    assert [panel.get_title() for panel in panels] == ["", "no upper limit", "no limit either way"]
    x, y = panels[0].lines[1].get_data()
    np.testing.assert_allclose(y, 4 * ((x - 0.35) / 0.1) ** 2, atol=1e-12)
    np.testing.assert_allclose(points(panels[0], "*"), [[0.35, 0]], atol=1e-12)
    assert panels[2].get_xscale() == "log"
    objective = profile().rename(columns={"delta": "objective"}).assign(threshold=2.0)
    objective["objective"] += 7.5
    again = plots.profiles(objective)
    np.testing.assert_allclose(again[0].lines[1].get_ydata(), y, atol=1e-12)


def test_errors_of_what_was_left_out_are_signed_and_averaged():
    ax = plots.leave_out(left_out())
    assert points(ax, "o").tolist() == [[-0.4, 0], [0.1, 0], [1.2, 1]]
    assert [text.get_text() for text in ax.texts] == ["\N{MINUS SIGN}0.15 %", "+1.20 %"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["9.7k", "the largest budget"]


def test_the_surface_is_dashed_beyond_its_runs_and_shows_what_a_budget_buys(frame, iso):
    fit = fit_surface(iso.sizes.params_total, iso.sizes.tokens_seen, iso.sizes.val_loss, bootstrap=0)
    rule = learning_rate_rule(frame)
    chosen = Evidence(fit, rule, rung_sizes(Recipe(), 512), 0.01, 4e11, 3e6).plan(Recipe(), flops=8e12)
    ax = plots.surface(fit, planned=chosen)
    np.testing.assert_allclose(points(ax, "*"), [[chosen.params, chosen.tokens]])
    dotted = next(line for line in ax.lines if line.get_linestyle() == ":")
    np.testing.assert_allclose(dotted.get_ydata(), 8e12 / chosen.options["flops_per_token"])
    level = next(line for line in ax.lines if line.get_color() == plots.GREY)
    assert level.get_ydata()[0] == pytest.approx(3e6) and "the text ends; repeated above" in [
        text.get_text() for text in ax.texts
    ]
    labels = [
        text
        for text in ax.texts
        if not text.get_text().startswith("the text") and np.isfinite(text.get_position()).all()
    ]
    assert len(labels) >= 5
    for text in labels:  # each stands on its contour
        loss = RepeatedText(fit, 3e6).loss(*text.get_position())
        assert loss == pytest.approx(float(text.get_text()), abs=5e-3)


def test_repetition_draws_one_line_an_amount_through_the_law():
    fit = Fit("surface", LAW)
    ax = plots.repetition(repeated(fit), law_of_repeated(fit))
    np.testing.assert_allclose(points(ax, "o")[:, 0], [1, 4, 16])
    curve = next(line for line in ax.lines if len(line.get_xdata()) > 10)
    shown = np.interp(np.log([1, 4, 16]), np.log(curve.get_xdata()), curve.get_ydata())
    np.testing.assert_allclose(shown, points(ax, "o")[:, 1], rtol=2e-3)


def test_the_best_run_of_each_amount_of_data_is_shown():
    ax = plots.data_limited(limited())
    np.testing.assert_allclose(points(ax, "o"), np.column_stack(data_points()))


@pytest.mark.parametrize(
    ("value", "text"),
    [(950, "950"), (20000, "20k"), (999999, "1M"), (1.5e6, "1.5M"), (3e9, "3B"), (2e13, "20T"), (1.584e15, "1.58e+15")],
)
def test_quantities_are_short(value, text):
    assert plots.quantity(value) == text


def test_powers_of_ten():
    assert plots.power_of_ten(1e11) == "$10^{11}$"
    assert plots.power_of_ten(2e11) == r"$2\times 10^{11}$"
    assert plots.power_of_ten(1e15) == "$10^{15}$"


@pytest.mark.parametrize(("low", "high"), [(2.7, 3.1), (2.2, 4.0), (2e4, 9e4), (1e4, 1e6), (1e3, 1e9), (1e11, 3.2e13)])
def test_log_axes_have_a_few_round_ticks(low, high):
    ticks = plots._LogTicks().tick_values(low, high)
    assert 3 <= len(ticks) <= 9
    assert ((ticks > 0.999 * low) & (ticks < 1.001 * high)).all()
    assert all(
        float(f"{tick:.2g}") == pytest.approx(tick) or float(f"{tick:.3g}") == pytest.approx(tick) for tick in ticks
    )


def test_the_palette_is_distinct_also_to_the_colour_blind_and_readable_on_white():
    colours = np.array([mpl.colors.to_rgb(c) for c in plots.COLOURS])
    # Machado, Oliveira and Fernandes 2009, complete deuteranopia and protanopia
    deutan = [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]
    protan = [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]
    for seen in (colours, colours @ np.transpose(deutan), colours @ np.transpose(protan)):
        distance = np.linalg.norm(seen[:, None] - seen[None], axis=-1)[np.triu_indices(len(seen), 1)]
        assert distance.min() > 0.15
    assert (colours @ [0.2126, 0.7152, 0.0722]).max() < 0.75
    assert len(plots.MARKERS) == len(plots.COLOURS)
