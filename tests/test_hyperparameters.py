"""The map of hyperparameters: a knob is turned alone and at equal cost, its worth is not flattered by luck, samples are judged
as they should be, and with losses that are known in place of training the planted impacts come out."""

from __future__ import annotations

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
import torch

from tinylm import counts
from tinylm.config import GenerateConfig, ModelConfig
from tinylm.errors import TextError
from tinylm.model import TinyLM
from tinylm.study import claims, hyperparameters
from tinylm.study.design import Recipe
from tinylm.study.hyperparameters import (
    BASELINE,
    KNOBS,
    SAMPLING,
    TrigramStatistics,
    distinct,
    ends,
    held_out_range,
    margin,
    nats_under,
    range_interval,
    said_again,
    turned,
)
from tinylm.study.parameters import HyperparameterParameters
from tinylm.study.runs import write_record

FACTS = {
    "name": "made up", "bytes": {"train": 90_000_000, "val": 5_000_000, "test": 5_000_000},
    "tokens": {"train": 10**9, "val": 10**7, "test": 10**7}, "provenance": {"source": "own", "licence": "own"},
}  # fmt: skip
NOISE = 0.004
BYTES = 2.0  # of a token of the baseline, and of any other
STARRED = {"learning_rate", "hidden_size", "num_layers", "data quality", "data size"}


def study_of(folder, kind: type | None = None, preset: str = "full") -> hyperparameters.Hyperparameters:
    settings = HyperparameterParameters(preset=preset, text="zipf-markov", results_dir=str(folder))
    return (kind or hyperparameters.Hyperparameters)(settings, hyperparameters.PRESETS[preset], FACTS)


# ----------------------------------------------------------------------------------------------------- what is turned


def test_the_map_has_every_cell_of_the_design_and_its_stars():
    cells = {name: knob for name, knob in {**KNOBS, **SAMPLING}.items() if not knob.beside}
    assert set(cells) == {
        *("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size", "max_seq_len"),
        *("rope_theta", "dropout", "learning_rate", "batch_size", "grad_accum", "max_steps", "warmup_steps"),
        *("weight_decay", "grad_clip", "beta1", "beta2", "min_lr", "data quality", "data size", "seq_len", "stride"),
        *("tokenizer", "precision", "attention_scale", "init_std", "norm_eps"),
        *("temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens"),
    }  # fmt: skip
    assert {name for name, knob in cells.items() if knob.star} == STARRED | {"temperature"}
    assert {knob.group for knob in cells.values()} | {"arch choices"} == set(hyperparameters.GROUPS)


FOLLOWERS = {
    "hidden_size": {"num_heads", "num_kv_heads", "intermediate_size", "attention_scale"},
    "num_heads": {"num_kv_heads", "attention_scale"},
    "seq_len": {"decay_steps"},
}  # fmt: skip


@pytest.mark.parametrize("preset", ["full", "quick", "smoke"])
def test_a_knob_is_turned_alone_and_at_equal_flops(preset, tmp_path):
    study = study_of(tmp_path / preset, preset=preset)
    base = study.baseline(0.01)
    usual = {**base.model.resolve().to_dict(), **base.train.resolve(base.model).to_dict(), **base.data.to_dict()}
    for name, knob in KNOBS.items():
        for move in knob.moves:
            there = turned(base, name, move, study.preset.flops)
            train = there.train.resolve(there.model)
            values = {**there.model.resolve().to_dict(), **train.to_dict(), **there.data.to_dict()}
            differ = {field for field in values if values[field] != usual[field]}
            followers = {"max_steps", "warmup_steps", "eval_interval", "decay_steps"} | FOLLOWERS.get(
                next(iter(move)), set()
            )
            assert differ <= set(move) | followers, (name, differ)
            step = counts.train_flops(there.model, train.replace(max_steps=1, warmup_steps=0))
            assert abs(train.max_steps * step - study.preset.flops) <= step
            if "warmup_steps" not in move:
                share = base.train.warmup_steps / base.train.max_steps
                assert train.warmup_steps == pytest.approx(share * train.max_steps, abs=1)


def test_ranges_are_a_quarter_and_four_times_where_a_model_can_have_that(tmp_path):
    study = study_of(tmp_path / "r")
    found = {}
    for setting in study.settings_at(0.01)[1:]:
        found.setdefault(setting.knob, []).append(setting)
    rates = [setting.train.learning_rate for setting in found["learning_rate"]]
    assert rates == [0.0025, 0.04]
    assert [(s.model.hidden_size, s.model.num_heads) for s in found["hidden_size"]] == [(10, 5), (144, 6)]
    assert [s.model.num_layers for s in found["num_layers"]] == [1, 8]
    assert [s.model.num_heads for s in found["num_heads"]] == [2, 18]
    assert [s.model.num_kv_heads for s in found["num_kv_heads"]] == [2, 3]
    assert [s.train.batch_size for s in found["batch_size"]] == [1, 12]
    base = study.baseline(0.01).train.max_steps
    assert [s.train.max_steps for s in found["max_steps"]] == pytest.approx([base / 4, 3 * base], rel=0.01)
    assert [s.train.unique_tokens / (base * 3 * 128) for s in found["data size"]] == pytest.approx(
        [0.25, 0.5], rel=1e-4
    )
    lengths = [(s.model.max_seq_len, s.train.resolve(s.model).seq_len) for s in found["max_seq_len"]]
    assert lengths == [(32, 32), (512, 128)]
    assert {s.train.seq_len * s.train.batch_size for s in found["seq_len"]} == {384, 512}
    slower = [s.train.learning_rate for s in found["hidden_size, its own rate"]]
    assert slower[0] > 0.01 > slower[1]
    assert {name for name, settings in found.items() if len(settings) != len(KNOBS[name].moves)} == set()


def test_the_full_preset_costs_what_it_may(tmp_path):
    runs = study_of(tmp_path / "full").expected_runs()
    distinct_runs = {
        json.dumps([run.model.to_dict(), run.train.to_dict(), run.data.to_dict()]): run.flops for run in runs
    }
    assert 6e13 < sum(distinct_runs.values()) < 9.5e13
    seeds = {run.train.seed for run in runs if run.tags["family"] == "knobs"}
    assert len(seeds) == 5 and not seeds & {run.train.seed for run in runs if run.tags["family"] == "rates"}


def test_a_text_that_is_too_short_is_told_before_any_work(tmp_path):
    short = tmp_path / "short.txt"
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), size=rng.integers(2, 7))) for _ in range(200)]
    short.write_text("\n".join(" ".join(rng.choice(words, 8)) for _ in range(800)))
    settings = HyperparameterParameters(
        preset="smoke", text=str(short), vocab_size=300, results_dir=str(tmp_path / "r")
    )
    with pytest.raises(TextError, match=r"reads [\d,]+ training tokens once"):
        hyperparameters.begin(settings)
    assert not (tmp_path / "r").exists()


# -------------------------------------------------------------------------------------------------- what a knob is worth


def drawn(rng: np.random.Generator, means: list[float], seeds: int = 5, sd: float = 0.01) -> pd.DataFrame:
    values = np.array(means) + sd * rng.standard_normal((seeds, len(means)))
    return pd.DataFrame(values, columns=[f"v{i}" for i in range(len(means))])


def test_a_knob_that_does_nothing_is_worth_nothing_and_one_that_does_its_true_range():
    rng = np.random.default_rng(0)
    null = [drawn(rng, [3.0, 3.0, 3.0]) for _ in range(300)]
    assert np.mean([ends(losses)[2] for losses in null]) > 0.006  # the plain range of nothing
    assert abs(np.mean([held_out_range(losses) for losses in null])) < 0.001
    planted = [drawn(rng, [3.0, 3.1, 3.02]) for _ in range(300)]
    assert np.mean([held_out_range(losses) for losses in planted]) == pytest.approx(0.1, abs=0.001)


@pytest.mark.parametrize("means", [(3.0, 3.0, 3.0), (3.0, 3.005, 3.005), (3.0, 3.1, 3.02), (3.0, 3.1)])
def test_intervals_hold_the_true_range_also_where_the_ends_are_nearly_tied(means):
    rng = np.random.default_rng(1)
    intervals = [range_interval(drawn(rng, list(means)) + rng.normal(0, 0.1)) for _ in range(300)]
    true = max(means) - min(means)
    assert np.mean([low <= true <= high for low, high in intervals]) > 0.92
    assert np.mean([high - low for low, high in intervals]) < 0.05
    low, high = range_interval(drawn(rng, list(means)), other=0.1)
    assert high - low == pytest.approx(2 * 1.96 * 0.1, rel=0.1)


def test_what_a_seed_does_to_all_values_alike_is_no_noise():
    rng = np.random.default_rng(2)
    losses = drawn(rng, [3.0, 3.1])
    shifted = losses.add(rng.normal(0, 1.0, len(losses)), axis=0)
    assert range_interval(shifted) == pytest.approx(range_interval(losses))
    assert held_out_range(shifted) == pytest.approx(held_out_range(losses))


def test_the_margin_is_between_the_least_of_some_and_the_largest_of_others():
    rng = np.random.default_rng(1)
    some = {"large": drawn(rng, [3.0, 3.9]), "least": drawn(rng, [3.0, 3.3, 3.1])}
    others = {"small": drawn(rng, [3.0, 3.01]), "largest": drawn(rng, [3.1, 3.0, 3.2])}
    told = margin(some, others, {})
    assert told["effect"] == pytest.approx(0.3 - 0.2, abs=0.03)
    assert told["low"] < told["low_90"] < 0.1 < told["high_90"] < told["high"] < 0.2
    assert margin(others, some, {})["effect"] == pytest.approx(0.01 - 0.9, abs=0.03)
    apart = margin(some, others, {"largest": 0.05})
    assert apart["low"] < told["low"] - 0.05 and apart["effect"] == told["effect"]


def test_a_tie_among_many_knobs_is_not_decided():
    rng = np.random.default_rng(3)
    decided = 0
    for _ in range(15):
        some = {f"s{i}": drawn(rng, [3.0, 3.02, 3.01]) for i in range(3)}
        others = {f"o{i}": drawn(rng, [3.0, 3.02, 3.01]) for i in range(10)}
        told = margin(some, others, {})
        decided += not told["low"] < 0 < told["high"]
    assert decided <= 1


# ------------------------------------------------------------------------------------------------------- judging samples


def test_trigram_statistics_are_probabilities_and_know_their_text():
    rng = np.random.default_rng(0)
    text = np.array([0, 1, 2, 3, 4] * 200 + rng.integers(0, 8, 500).tolist())
    grams = TrigramStatistics(text, 8)
    for history in ([0, 1], [7, 7], [3, 0]):
        assert sum(math.exp(-grams.nats([*history, last], 2)[0]) for last in range(8)) == pytest.approx(1.0)
    own, other = ([0, 1, 2, 3, 4] * 4, [4, 2, 0, 3, 1] * 4)
    assert grams.nats(own, 2).mean() < 0.2 < 2 < grams.nats(other, 2).mean()
    assert len(grams.nats(own, 5)) == 15
    np.testing.assert_allclose(grams.nats(own, 5), grams.nats(own, 2)[3:])


def test_tokens_are_scored_once_with_three_quarters_of_a_window_before_them():
    torch.manual_seed(0)
    model = TinyLM(ModelConfig(vocab_size=20, hidden_size=16, num_layers=1, num_heads=2, max_seq_len=16), seed=1).eval()
    ids = torch.randint(0, 20, (60,)).tolist()

    def alone(place: int, before: int) -> float:
        """What a token costs with so many tokens before it."""
        with torch.no_grad():
            logits = model(torch.tensor([ids[place - before : place]]))[0, -1]
        return -float(logits.log_softmax(-1)[ids[place]])

    short = nats_under(model, ids[:12], 5)
    np.testing.assert_allclose(short, [alone(place, place) for place in range(5, 12)], atol=1e-5)
    long = nats_under(model, ids, 5)
    assert len(long) == 55
    for place in range(16, 60):
        assert any(abs(long[place - 5] - alone(place, before)) < 1e-5 for before in range(12, 17))


def test_repetition_and_distinct_pairs():
    assert said_again([1, 2, 3, 4, 5, 6, 7]) == 0
    assert said_again([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert said_again([7] * 20) == pytest.approx(16 / 17)
    assert distinct([[1, 2, 3], [1, 2, 4]]) == pytest.approx(3 / 4)


# ---------------------------------------------------------------------------------------------------------- what comes out

PLANTED = {  # what turning a knob down and up costs, in nats
    "learning_rate": (0.2, 0.25), "hidden_size": (0.3, 0.4), "num_layers": (0.08, 0.15), "data quality": (0.05, 0.3),
    "data size": (0.12, 0.06), "batch_size": (0.03, 0.05), "warmup_steps": (0.0, 0.01), "tokenizer": (0.02, 0.1, 0.0),
}  # fmt: skip


class KnownImpacts(hyperparameters.Hyperparameters):
    """The study with losses that are known in place of training, samples of made-up scores, and no clock."""

    lost: tuple[str, ...] = ()  # knobs whose second value diverges

    def train(self, runs, **_):
        rows = []
        for run in runs:
            name = json.dumps([run.model.to_dict(), run.train.to_dict(), run.data.to_dict()], sort_keys=True)
            run_id = f"{zlib.crc32(name.encode()):08x}"
            loss = 3.5 + 0.3 * math.log(run.train.learning_rate / 0.011) ** 2 * (run.tags["family"] == "rates")
            tried = [s.value for s in getattr(self, "settings_tried", []) if s.knob == run.tags["knob"]]
            costs = PLANTED.get(run.tags["knob"], (0.0,) * len(tried))
            loss += dict(zip(tried, costs, strict=True)).get(run.tags["value"], 0.0)
            loss += np.random.default_rng(run.train.seed).normal(0, 0.02)  # what a seed does to all alike
            loss += np.random.default_rng(zlib.crc32(name.encode())).normal(0, NOISE)
            diverged = run.tags["knob"] in self.lost and run.tags["value"] == tried[1]
            parts = counts.parameters(run.model)
            row = {**run.tags, **run.data.to_dict(), **run.model.to_dict(), **run.train.to_dict(), "run_id": run_id}
            row |= {f"params_{part}": parts[part] for part in ("total", "non_embedding", "embedding", "head")}
            row |= {"tokens_seen": 1000, "epochs": 0.1, "flops": run.flops, "seconds": 1.0, "status": "finished"}
            row |= {"val_loss": loss, "val_bpb": loss / math.log(2) / BYTES}
            if run.data.tokenizer != "bpe" or run.model.vocab_size != 512:
                row["val_loss"] = 17.0  # nats of other tokens: what must not be compared
            if diverged:
                row |= {"val_loss": math.nan, "val_bpb": math.nan, "status": "diverged"}
            rows.append(row)
            kept = {"run_id": run_id, "val_loss": row["val_loss"], "parameters": parts, "corpus": {"name": "made up"}}
            write_record(self.folder, {**kept, "started": "2999-01-01T00:00:00+00:00"})
        return pd.DataFrame(rows)

    def stretch_error(self):
        return 0.005

    def step_seconds(self, settings):
        self.clock = {"date": "2999-01-01", "load": None}
        base = self.baseline(self.rate)
        return {s: 2.0 if s.model.num_layers == 8 else 1.0 if s.model == base.model else 1.5 for s in settings}

    def _samples(self):
        rng = np.random.default_rng(0)
        costs = {"temperature": 1.5, "top_p": 0.8}
        rows = [
            {"knob": name, "value": BASELINE if not move else f"{next(iter(move.values())):g}", "seed": seed, "run_id": "a",
             "seconds": 1.0, "judge": 3.0 + costs.get(name, 0.1) * (i % 2) + rng.normal(0, 0.02), "ngram": 3.3,
             "repetition": 0.1 + 0.02 * i, "distinct": 0.6}
            for seed in self.seeds() for i, (name, move) in enumerate([(BASELINE, {}), *self._drawn()])
        ]  # fmt: skip
        return {"rows": rows, "text": {"judge": 3.2, "ngram": 3.4, "repetition": 0.05, "distinct": 0.7}}


def told(folder, kind: type = KnownImpacts) -> KnownImpacts:
    study = study_of(folder, kind)
    claims.seal(study.folder, "hyperparameters")
    study.describe_knobs()
    study.measure()
    study.show_noise()
    study.show_impacts()
    study.show_generation()
    study.show_map()
    return study


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> KnownImpacts:
    return told(tmp_path_factory.mktemp("known") / "hyperparameters")


def test_planted_impacts_come_out_in_their_order(measured):
    assert 0.008 < measured.rate < 0.015
    table = measured.impacts.set_index("knob")
    for name, costs in PLANTED.items():
        if name != "warmup_steps":
            assert table.impact[name] == pytest.approx(max(0, *costs), abs=0.012), name
            assert table.low[name] < max(costs) < table.high[name] or abs(table.impact[name] - max(costs)) < 0.01
    order = [
        name for name in measured.impacts.knob if name in ("hidden_size", "learning_rate", "num_layers", "batch_size")
    ]
    assert order == ["hidden_size", "learning_rate", "num_layers", "batch_size"]
    nothing = [name for name in table.index if name not in PLANTED and name != "max_steps"]
    assert table.impact[nothing].max() < 0.012 and (table.plain[nothing] > table.impact[nothing]).mean() > 0.6
    assert table.best["hidden_size"] == BASELINE and table.worst["hidden_size"] == "144"
    assert table.time_high["num_layers"] > 1.2 and table.time_high["beta1"] == table.time_low["beta1"] == 1
    assert table["rank"]["hidden_size"] == 1 and math.isnan(table["rank"]["num_layers, its own rate"])
    wide = (table.high - table.low)[["tokenizer", "beta1"]]
    assert wide["tokenizer"] > 2 * 1.9 * 0.005  # judged on other stretches of the text


def test_other_tokenizers_are_compared_in_bits_of_the_same_bytes(measured):
    losses = measured.tables["tokenizer"]
    assert measured.nats_per_bit == pytest.approx(math.log(2) * BYTES)
    assert (losses["char"] - losses[BASELINE]).mean() == pytest.approx(0.1, abs=0.01)
    assert losses.max().max() < 4


def test_the_stars_are_held_against_what_was_measured(measured):
    said = next(line for line in measured.findings if "the design stars" in line)
    assert "5 are among the 5" in said
    assert any("temperature is worth most" in line for line in measured.findings)
    assert (measured.folder / "figures" / "map.png").stat().st_size > 20_000


def test_the_claim_judges_these_very_records(measured):
    effects = pd.read_csv(measured.folder / "tables" / "effects.csv").set_index("part")
    (claim,) = claims.claims_of([12])
    assert list(effects.index) == [part.name for part in claim.parts]
    first, second = effects.iloc[0], effects.iloc[1]
    assert first.effect == pytest.approx(0.12 - 0.1, abs=0.012) and first.seeds == 5  # data size against tokenizer
    assert second.effect == pytest.approx(1.5 - 0.8, abs=0.05) and second.low > 0
    (verdict,) = claims.judge(measured.folder.parent, [claim])
    parts = verdict.parts.set_index("part").verdict
    assert parts["temperature less largest other, generation"] == "supported"
    assert len(verdict.runs) > 200 and verdict.sealed == "before"


def test_a_run_that_diverged_counts_as_a_guess_at_random(tmp_path):
    study = study_of(tmp_path / "r", type("Wild", (KnownImpacts,), {"lost": ("learning_rate",)}))
    study.measure()
    study.show_noise()
    study.show_impacts()
    row = study.impacts.set_index("knob").loc["learning_rate"]
    assert (
        row.impact == pytest.approx(math.log(512) - 3.5, abs=0.05)
        and row.worst == study.tables["learning_rate"].columns[1]
    )
    assert any("Diverged" in piece and "learning_rate" in piece for piece in study.report.pieces)


def test_architecture_choices_are_taken_from_ablations_at_this_very_place(tmp_path, monkeypatch):
    # The repository's own results have measured ablations too.
    monkeypatch.setattr(hyperparameters, "repository", lambda: tmp_path / "elsewhere")
    study = study_of(tmp_path / "hyperparameters")
    tables = tmp_path / "ablations" / "tables"
    tables.mkdir(parents=True)
    total = counts.parameters(Recipe().model((36, 2, 6), 512))["total"]
    places = pd.DataFrame([{"place": "small", "params_total": total, "flops": 2.5e11}])
    places.to_csv(tables / "places.csv", index=False)
    pd.DataFrame([{"part": "small: range of mlp", "effect": 0.03, "low": 0.005}]).to_csv(
        tables / "effects.csv", index=False
    )
    contrasts = pd.DataFrame([{"choice": "mlp", "kind": "equal", "verdict": "worse"}])
    contrasts.to_csv(tables / "contrasts_small.csv", index=False)
    assert study._choices() == {"SwiGLU": (0.03, 0.005)}
    # Where no alternative is told from the baseline, the range is told as not seen.
    contrasts.assign(verdict="undecided").to_csv(tables / "contrasts_small.csv", index=False)
    assert study._choices() == {"SwiGLU": (0.03, -1.0)}
    places.assign(flops=1e11).to_csv(tables / "places.csv", index=False)
    assert study._choices() == {}


def test_settings_of_the_sampler_are_of_its_own_kinds(tmp_path):
    drawn_at = study_of(tmp_path / "r")._drawn()
    assert dict(drawn_at[:1]) == {"temperature": {"temperature": 0.2}}
    assert ("max_new_tokens", {"max_new_tokens": 800}) in drawn_at
    for _, move in drawn_at:
        GenerateConfig(**move)
    assert len(drawn_at) == sum(len(knob.moves) for knob in SAMPLING.values())


# -------------------------------------------------------------------------------------------------------- the whole study


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("name", ["hyperparameters", "numerics"])
def test_the_smoke_study_is_whole_and_a_second_call_only_redraws_it(name, tmp_path):
    results = tmp_path / "results"
    command = [sys.executable, "-m", "tinylm", "study", name, "--preset", "smoke", "--results-dir", str(results)]
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
