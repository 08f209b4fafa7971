"""The lab at more compute, on paper: README shows what the code computes, and the code computes what counts and rates give."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tinylm import counts
from tinylm.study import design, planner, scale
from tinylm.study.parameters import repository

RESULTS = repository() / "results"


@pytest.fixture(scope="module")
def frame():
    return scale.table()


def test_readme_shows_what_the_code_computes():
    shown = (repository() / "README.md").read_text(encoding="utf-8")
    assert scale.markdown() in shown, "put what `python -m tinylm.study.scale` prints into README.md"


def test_the_factors_are_of_the_compute_studys_largest_budget(frame):
    from tinylm.study.compute import PRESETS

    assert max(PRESETS["full"].budgets) == scale.BASE
    assert frame.flops.tolist() == [scale.BASE * factor for factor in (1, 100, 10_000)]


def test_sizes_and_tokens_are_the_planners_and_spend_the_budget(frame):
    known = planner.Evidence.from_dict(json.loads((RESULTS / scale.STUDY / "tables" / "law.json").read_text()))
    endless = dataclasses.replace(known, tokens_available=None)
    plan = endless.plan(design.Recipe(), flops=float(scale.BASE))  # where the ladder itself reaches
    first = frame.iloc[0]
    assert (first.params, first.tokens, first.batch_size) == (plan.params, plan.tokens, plan.batch_size)
    for row in frame.itertuples():
        heads = next(h for d, n, h in (*design.LADDER, *scale.MORE) if (d, n) == (row.hidden_size, row.num_layers))
        model = design.Recipe().model((row.hidden_size, row.num_layers, heads), 512)
        assert counts.parameters(model)["total"] == row.params
        assert row.tokens * counts.train_flops_per_token(model, 128) == pytest.approx(row.flops, rel=0.01)
        assert row.params_low <= row.params <= row.params_high
        assert row.epochs == pytest.approx(row.tokens / known.tokens_available)


def test_times_are_flops_over_rates(frame):
    last = frame.iloc[-1]
    times = (last.A100_1, last.H100_8)
    assert times == pytest.approx((3.2e17 / (312e12 * 0.3), 3.2e17 / (989e12 * 0.3 * 8)), rel=0.01)
    speed = json.loads((RESULTS / scale.STUDY / "speed.json").read_text())["flops_per_second"]
    slowest, quickest = (last.flops / rate for rate in (min(speed), max(speed)))
    assert quickest * 0.99 < last.here_seconds < slowest
    assert (frame.state_bytes == 16 * frame.params).all() and (frame.map_bytes == 2 * frame.tokens).all()


def test_the_ladder_goes_on_as_it_went():
    sizes = design.rung_sizes(design.Recipe(), 512, (*design.LADDER, *scale.MORE)).params_total
    growth = (sizes / sizes.shift()).dropna()
    assert growth.between(1.4, 2.2).all()
    assert all(hidden % heads == 0 for hidden, _, heads in scale.MORE)


def test_quantities_read_well():
    assert [scale._size(n) for n in (3e5, 3.6e6, 1.41e8, 1.2e10)] == ["300 kB", "3.6 MB", "141 MB", "12 GB"]
    assert [scale._time(t) for t in (0.3, 34, 3400, 1.94e6)] == ["under 1 s", "34 s", "57 min", "22 days"]
