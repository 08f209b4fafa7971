"""Small files that studies keep beside their records: a damaged one is told in words with a way out, wherever it is read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from tinylm import files
from tinylm.errors import DamagedFileError, LabError
from tinylm.study import (
    ablations,
    bench,
    claims,
    compute,
    data_quality,
    hyperparameters,
    numerics,
    quickstart,
    scale,
    stability,
    steps,
)
from tinylm.study.design import Recipe
from tinylm.study.planner import Speed
from tinylm.study.runs import read_kept

MEASURED = pd.DataFrame({"run_id": ["r"], "seed": [1], "knob": ["baseline"], "val_loss": [2.0]})
SPEED = Speed((1e4, 1e6), (1e10, 1e11), 2, "some processor")
SCORES = {"judge": 3.0, "ngram": 4.0, "repetition": 0.1, "distinct": 0.5}
SAMPLES = {
    **{"judge": "r", "models": ["r"], "asked": [["baseline", {}]], "text": SCORES},
    "rows": [{"knob": "baseline", "value": "baseline", "seed": 1, "run_id": "r", "seconds": 1.0, **SCORES}],
}
PLAN = {"minutes": 1, "threads": 2, "hidden_size": 96, "num_layers": 4, "tokens": 9, "seconds": 60.0, "loss": 3.0}
PROMISES = [{**PLAN, "low": 2.9, "high": 3.1}]


def some(**known: object) -> SimpleNamespace:
    return SimpleNamespace(**known)


@dataclasses.dataclass
class Kept:
    """Where a file lies, what may stand in it, the step that reads it (given a folder), and what that makes of it."""

    path: str
    content: object
    read: Callable[[Path], object]
    gives: object = ...


KEPT = {
    "speeds of ablations": Kept(
        "speed.json",
        known := {"tokens_per_second": {"small: gelu": [9e3, 8e3]}, "models": files.sha256_bytes(b"[]")[:16], "load": 0.5},
        lambda at: ablations.Ablations._speeds(some(folder=at, trial_of={}, recipe=Recipe())), known,
    ),
    "seconds of knobs": Kept(
        "speed.json", {"seconds_per_step": {"ab": 0.1}, "date": "2026-01-01", "load": None},
        lambda at: hyperparameters.OneAtATime.step_seconds(some(folder=at), []), {},
    ),
    "speed of the machine": Kept(
        "speed.json", dataclasses.asdict(SPEED), lambda at: quickstart.ComputeStudy.machine_speed(some(folder=at)), SPEED
    ),
    "samples": Kept(
        "tables/samples.json", SAMPLES,
        lambda at: hyperparameters.Hyperparameters._samples(
            some(folder=at, measured=MEASURED, judged=MEASURED, _drawn=list)
        ), SAMPLES,
    ),
    "stretches": Kept(
        "tables/stretches.json", {"run_id": "r", "windows": 9, "sd": 0.5},
        lambda at: hyperparameters.Hyperparameters.stretch_error(
            some(folder=at, preset=some(eval_tokens=8 * Recipe().seq_len), recipe=Recipe(), measured=MEASURED)
        ), 0.25,
    ),
    "bytes": Kept(
        "tables/kept_bytes.json", {"a": 5},
        lambda at: numerics.Numerics._kept_bytes(some(folder=at), {"a": some(value="a")}), {"a": 5},
    ),
    "unigram": Kept(
        "unigram.json", {"nats_per_token": 5.5}, lambda at: stability.Stability.unigram.func(some(folder=at)), 5.5
    ),
    "examples": Kept(
        "tables/examples.json", {"As it is": "some words"},
        lambda at: data_quality.DataQuality._examples(some(folder=at, preset=some(damages=()))), {"As it is": "some words"},
    ),
    "lines": Kept(
        "tables/lines.json", {"one": 7, "other": 7},
        lambda at: data_quality.DataQuality._lines(some(folder=at, pair={"one": 1, "other": 1})), 7,
    ),
    "pages": Kept(
        "tables/pages.json", {"run_id": "r", "pages": {"The ": "end"}},
        lambda at: steps.Study.show_samples(
            some(folder=at, final=MEASURED, settings=some(seed=0), report=some(section=str, text=str))
        ), None,
    ),
    "promises": Kept(
        "tables/promised.json", PROMISES,
        lambda at: compute.ComputeScaling.keep_promises(some(folder=at, preset=some(promised=(1,)))),
    ),
    "law, for claims": Kept("compute_scaling/tables/law.json", {"surface": None}, lambda at: claims._gains(at, [])),
    "law, at scale": Kept("compute_scaling/tables/law.json", {"surface": None}, scale.table),
    "bench": Kept(
        "sweep.json", known := {"schema": bench.SCHEMA, "section": "sweep", "machine": {}}, bench.read_sections,
        {"sweep": known},
    ),
}  # fmt: skip


def emptied(value: object) -> object:
    """The same with null in place of every text and number."""
    if isinstance(value, dict):
        return {name: emptied(item) for name, item in value.items()}
    return [emptied(item) for item in value] if isinstance(value, list) else None


@pytest.mark.parametrize("name", KEPT)
def test_a_damaged_file_is_told_with_the_way_out(name, tmp_path):
    kept = KEPT[name]
    path = tmp_path / kept.path
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = json.dumps(kept.content)
    if kept.gives is not ...:
        path.write_text(whole)
        assert kept.read(tmp_path) == kept.gives
    for damage in (whole[: len(whole) // 2], "", "\0\xff", "[1, 2]", '"text"', json.dumps(emptied(kept.content))):
        path.write_text(damage, encoding="latin-1")
        with pytest.raises(DamagedFileError) as told:
            kept.read(tmp_path)
        assert str(path) in str(told.value) and ("delete it" in told.value.fix or "anew" in told.value.fix), damage


def test_promises_are_read_as_they_were_written():
    assert compute._promises(PROMISES) == PROMISES
    for wrong in ([], [{**PROMISES[0], "hidden_size": 97}]):
        with pytest.raises(ValueError):
            compute._promises(wrong)


def test_what_cannot_be_opened_is_told_too(tmp_path):
    (tmp_path / "a folder").mkdir()
    for name in ("nothing there", "a folder"):
        with pytest.raises(LabError, match=f"{name}.*Way out"):
            read_kept(tmp_path / name, dict)
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    with pytest.raises(DamagedFileError, match="deep"):
        read_kept(deep, list)
