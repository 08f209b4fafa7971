"""Damage does what its name says and nothing else, and is part of a run's identity; and the study of it, with losses from a known
law in place of training, finds what each damage is worth in clean tokens."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
import zlib
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from tinylm import corpora, counts, files
from tinylm.config import Damage, DataConfig
from tinylm.corpora import BOILERPLATE, damaged, prepare
from tinylm.errors import ConfigError, LabError, TextError
from tinylm.study import claims, data_quality
from tinylm.study.data_quality import CLAIMED, CLEAN, DAMAGES, FOUR, MORE, STRONG, TWICE
from tinylm.study.parameters import DataQualityParameters, repository
from tinylm.study.runs import Folder, Run, identity, read_record, write_record

WORDS = [a + b for a in ("bar", "nel", "sto", "wi", "dra") for b in ("g", "med", "lint", "p", "soth", "vek")]
RANDOM = np.random.RandomState(0)
LINES = [" ".join(RANDOM.choice(WORDS, RANDOM.randint(4, 9))).capitalize() + "\n" for _ in range(4000)]
TEXT = "".join(LINES)


def spoil(damage: str, text: str = TEXT) -> str:
    return "".join(damaged([text], Damage.parse(damage)))


# ------------------------------------------------------------------------------------------------------------ the damage


@pytest.mark.parametrize("share", [0.03, 0.1, 1.0])
def test_swapped_characters_change_places_within_their_line(share):
    spoilt = spoil(f"swap:{share}")
    assert [i for i, c in enumerate(spoilt) if c == "\n"] == [i for i, c in enumerate(TEXT) if c == "\n"]
    assert all(Counter(a) == Counter(b) for a, b in zip(spoilt.split("\n"), TEXT.split("\n"), strict=True))
    moved = np.array([a != b for a, b in zip(spoilt, TEXT, strict=True)])
    # Some of those that change places meet a letter like themselves, or the end of a line.
    assert 0.85 * share < moved.mean() <= 1.02 * share
    assert spoil("swap:1", "ab\ncd\u00e9\U0001f600") == "ba\nc\u00e9d\U0001f600"  # characters, not bytes


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_shuffled_lines_are_the_same_lines(share):
    lines = spoil(f"shuffle:{share}").splitlines(keepends=True)
    assert Counter(lines) == Counter(LINES)
    assert np.mean([a != b for a, b in zip(lines, LINES, strict=True)]) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_repeated_lines_stand_behind_themselves(share):
    lines = spoil(f"repeat:{share}").splitlines(keepends=True)
    assert [line for line, _ in itertools.groupby(lines)] == [line for line, _ in itertools.groupby(LINES)]
    assert 1 - len(LINES) / len(lines) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("share", [0.2, 0.5])
@pytest.mark.parametrize("kind", ["boilerplate", "foreign"])
def test_what_is_mixed_in_leaves_the_text_as_it_is(kind, share):
    lines = spoil(f"{kind}:{share}").splitlines(keepends=True)
    own = set(LINES)
    assert [line for line in lines if line in own] == LINES
    added = [line for line in lines if line not in own]
    assert len(added) / len(lines) == pytest.approx(share, abs=0.03)
    if kind == "boilerplate":
        assert {line.strip() for line in added} == set(BOILERPLATE)
        return
    assert [len(word) for word in added[0].split()] in [[len(word) for word in line.split()] for line in LINES]
    assert len(set(added)) > len(added) / 3  # many sentences, in letters of which none is its own translation
    before, after = (set("".join(lines)) - set(" \n") for lines in (LINES, added))
    assert len(before) == len(after) and not any(line in own for line in added)


def test_equal_damage_is_equal_text_for_ever():
    """Text that came out differently would silently be another text under an old identity: raise DAMAGING with it."""
    assert corpora.DAMAGING == 1
    found = {damage: files.sha256_bytes(spoil(damage).encode())[:12] for damage in STRONG}
    assert found == PINNED
    assert spoil("swap:0.1:7") != spoil("swap:0.1") == spoil("swap:0.1:0")


PINNED = {
    "swap:0.1": "76079861fd81", "shuffle:1": "90eff8e381c3", "repeat:0.5": "06bfe2bad070",
    "boilerplate:0.5": "1398db61d61f", "foreign:0.5": "5e8e8927efbc",
}  # fmt: skip


@pytest.mark.parametrize("damage", STRONG)
def test_a_damaged_text_streams(damage):
    """Pieces come out as they go in, so that a text of any length takes the memory of one piece."""
    taken = []
    endless = (taken.append(number) or TEXT[:5000] for number in itertools.count())
    first = list(itertools.islice(damaged(endless, Damage.parse(damage)), 3))
    assert len(taken) == 3 and len(set(first)) == 3  # and each piece is spoilt in other places


def test_a_text_without_lines_is_cut_into_some():
    text = "".join(RANDOM.choice(list("abcdef"), 100_000))
    pieces = {text[i : i + corpora.LINE] for i in range(0, len(text), corpora.LINE)}
    spoilt = spoil("shuffle:1", text)
    assert spoilt != text and {spoilt[i : i + corpora.LINE] for i in range(0, len(text), corpora.LINE)} & pieces
    assert len(spoil("repeat:0.5", text)) == pytest.approx(2 * len(text), rel=0.15)
    assert spoil("foreign:0.5", "") == "" and spoil("swap:0.5", "a") == "a"


def test_a_damage_is_written_in_one_way_and_refused_in_words():
    assert (
        DataConfig(damage="swap:0.10:0").damage == "swap:0.1"
        and DataConfig(damage="swap:1e-1:3").damage == "swap:0.1:3"
    )
    assert DataConfig().damage is None
    for wrong, said in {
        "swap": "a kind and a share", "swap:x": "a kind and a share", "swap:0.1:1:2": "a kind and a share",
        "scramble:0.1": "kind must be one of swap", "swap:1.5": "above 0 and at most 1", "repeat:1": "above 0 and below 1",
        "shuffle:0": "above 0", "swap:0.1:-1": "seed must not be negative",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            DataConfig(damage=wrong)


# ---------------------------------------------------------------------------------------------------- corpora and identity


def test_only_the_training_part_is_spoilt(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    clean, spoilt, stronger = (
        prepare(path, "bpe", 320, progress=False, damage=d) for d in (None, "swap:0.1", "swap:0.5")
    )
    assert spoilt.tokenizer == clean.tokenizer
    for split in ("val", "test"):
        np.testing.assert_array_equal(getattr(spoilt, split), getattr(clean, split))
    decoded = clean.tokenizer.decode(spoilt.train)
    assert decoded != clean.tokenizer.decode(clean.train) and Counter(decoded) == Counter(
        clean.tokenizer.decode(clean.train)
    )
    assert len(clean.train) < len(spoilt.train) < len(stronger.train)  # what is misspelt takes more tokens
    assert set(clean.identity) == {"text", "text_sha256", "tokenizer_sha256", "split"}  # as ever
    assert {**clean.identity, "damage": spoilt.identity["damage"]} == spoilt.identity != stronger.identity
    assert "swap:0.1" in spoilt.provenance["damage"] and "damage" not in clean.provenance
    written = spoilt.train._mmap is not None and os.stat(spoilt.train.filename).st_mtime_ns
    again = prepare(path, "bpe", 320, progress=False, damage="swap:0.10")
    assert again.identity == spoilt.identity and os.stat(again.train.filename).st_mtime_ns == written
    other = prepare(path, "bpe", 320, progress=False, damage="swap:0.1:5")
    assert other.identity != spoilt.identity and not np.array_equal(other.train, spoilt.train)


def test_a_run_without_damage_is_the_run_that_it_was():
    """The committed records know nothing of damage: each is found under its name, and a damaged run is none of them."""
    folder = Folder(repository() / "results" / "quickstart")
    paths = sorted(folder.runs.glob("*.json"))
    assert paths
    for path in paths:
        record = read_record(path)
        assert "damage" not in record["data"]
        run = Run.from_dict(record)
        assert run.data.damage is None
        rest = record["arithmetic"], record["numerics_revision"]
        assert identity(run, record["corpus"]["identity"], *rest) == record["identity"]
        task = folder.task(run)
        assert (task.run_id, task.identity) == (path.stem, record["identity"])
        spoilt = Run(run.model, run.train, run.data.replace(damage=CLAIMED), run.tags)
        assert folder.corpus(spoilt) is None and folder.task(spoilt) is None
        about = {**record["corpus"]["identity"], "damage": "swap:0.1:0, revision 1"}
        assert identity(spoilt, about, *rest) != record["identity"]


def test_clean_and_damaged_runs_share_a_folder_and_no_corpus(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    clean = Run(*_tiny(), DataConfig(str(path), "byte"))
    spoilt = Run(*_tiny(), DataConfig(str(path), "byte", damage="repeat:0.5"))
    folder = Folder(tmp_path / "results")
    folder.admit([(run, prepare(path, "byte", 256, progress=False, damage=run.data.damage)) for run in (spoilt, clean)])
    told = [Folder(tmp_path / "results").corpus(run) for run in (clean, spoilt)]
    assert "damage" not in told[0]["identity"] and told[1]["identity"]["damage"].startswith("repeat:0.5:0")
    assert told[1]["tokens"]["train"] > 1.5 * told[0]["tokens"]["train"]
    assert folder.task(clean).run_id != folder.task(spoilt).run_id


def _tiny():
    from tinylm.config import ModelConfig, TrainConfig

    model = ModelConfig(vocab_size=256, hidden_size=8, num_layers=1, num_heads=2, max_seq_len=16)
    return model, TrainConfig(max_steps=4, warmup_steps=1, batch_size=2, eval_tokens=256, threads=1)


# --------------------------------------------------------------------------------------------------------------- the study

FACTS = {
    "name": "made up", "bytes": {"train": 90_000_000, "val": 5_000_000, "test": 5_000_000},
    "tokens": {"train": 10**9, "val": 10**7, "test": 10**7}, "provenance": {"source": "own", "licence": "own"},
}  # fmt: skip
PAIR = {
    name: {**FACTS, "tokens": {"train": tokens, "val": tokens // 18}, "bytes": {"val": tokens // 9}}
    for name, tokens in (("simple", 1_200_000), ("rich", 1_500_000))
}
NOISE = 0.004
WORTH = {"swap": 0.45, "shuffle": 0.95, "repeat": 0.5, "boilerplate": 0.6, "foreign": 0.1}


def law(params: float, tokens: float) -> float:
    return 1.6 + 40 / params**0.35 + 60 / tokens**0.30


class KnownLaw(data_quality.DataQuality):
    """The study with losses from a law in place of training: a damage leaves so much of the tokens."""

    def train(self, runs, **options):
        rows = []
        for run in runs:
            parts = counts.parameters(run.model)
            tokens = run.train.max_steps * run.train.batch_size * self.recipe.seq_len
            kind = run.data.damage and Damage.parse(run.data.damage).kind
            loss = law(parts["total"], tokens * WORTH.get(kind, 1.0)) - (0.2 if run.tags["reads"] == "rich" else 0)
            rate = self.recipe.learning_rate(parts["total"])
            loss += 0.05 * math.log(run.train.learning_rate / rate) ** 2
            name = json.dumps([run.model.to_dict(), run.train.to_dict(), run.data.to_dict()], sort_keys=True)
            loss += np.random.default_rng(zlib.crc32(name.encode())).normal(0, NOISE)
            run_id = f"{zlib.crc32(name.encode()):08x}"
            row = {**run.tags, **run.model.to_dict(), **run.train.to_dict(), **run.data.to_dict(), "run_id": run_id}
            row |= {f"params_{part}": parts[part] for part in ("total", "non_embedding", "embedding", "head")}
            row |= {"tokens_seen": tokens, "epochs": tokens / 1e9, "flops": run.flops, "val_loss": loss, "seconds": 1.0}
            rows.append({**row, "val_bpb": loss / math.log(2) / 2, "status": "finished"})
            record = {"run_id": run_id, "val_loss": loss, "parameters": parts, "corpus": {"name": "made up"}}
            write_record(self.folder, {**record, "started": "2999-01-01T00:00:00+00:00"})
        return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> KnownLaw:
    folder = tmp_path_factory.mktemp("quality") / "data_quality"
    settings = DataQualityParameters(text="zipf-markov", results_dir=str(folder))
    full = data_quality.PRESETS["full"]
    preset = data_quality.Preset(full.places, full.amount, full.clean, elsewhere=full.elsewhere, pair=(), draws=400)
    study = KnownLaw(settings, preset, FACTS, PAIR)
    claims.seal(folder, "data_quality")
    study.show_damages()
    study.measure()
    study.show_learning_rates()
    study.show_noise()
    study.show_clean()
    study.show_worth()
    study.show_claim()
    study.show_pair()
    return study


def test_every_damage_is_worth_the_clean_tokens_that_the_law_says(measured):
    for place in ("small", "large"):
        table = measured.tables[place].set_index("variant")
        for damage in DAMAGES:
            worth, row = WORTH[Damage.parse(damage).kind], table.loc[damage]
            if damage.startswith("foreign"):  # a tenth lies below the least clean text that was measured
                assert row.beyond == "below" and math.isnan(row.worth) and row.bound == pytest.approx(0.25, rel=0.02)
                continue
            assert row.worth == pytest.approx(worth, rel=0.08)
            assert 0.97 * row.worth_low < worth < 1.03 * row.worth_high  # a parabola is not quite this law
            assert row.clean_tokens == pytest.approx(row.worth * 4e5, rel=0.01)
        assert table.clean_tokens[MORE] == pytest.approx(8e5, rel=0.1)  # a clean token is worth a clean token
        assert (
            table.worth[f"{CLAIMED}, 200k"] == pytest.approx(0.45, rel=0.35)
            or table.beyond[f"{CLAIMED}, 200k"] == "below"
        )
        assert table.verdict["swap:0.1"] == "worse" and table.verdict["shuffle:0.3"] != "better"


def test_an_interval_that_ends_where_the_clean_text_ends_is_told_as_a_bound(measured):
    table = measured.tables["small"].set_index("variant", drop=False)
    row = next(table.loc[["swap:0.1"]].itertuples())
    assert measured._open(row) == (False, False) and f"({row.worth_low:.0%} to" in measured._share(row)
    at_least = row._replace(worth=0.251, worth_low=0.25, worth_high=0.31)
    assert measured._open(at_least) == (True, False) and measured._share(at_least) == "at most 31%"
    assert measured._share(row._replace(worth_high=4.0)) == f"at least {row.worth_low:.0%}"
    below = next(table.loc[["foreign:0.5"]].itertuples())
    assert below.beyond == "below" and measured._share(below) == f"at most {below.worth_high:.0%}"


def test_every_code_is_tied_to_its_words(measured):
    for damage in DAMAGES:
        assert f"- `{damage}`: {data_quality.words(damage)}" in "\n".join(measured.report.pieces)
    assert all(f"(`{damage}`)" in "\n".join(measured.findings) for damage in STRONG)
    assert any("clearly beat clean text in" in line for line in measured.findings)


def test_intervals_hold_the_truth_and_are_no_wider_than_the_noise_asks_for(measured):
    held = []
    for place in measured.preset.places:
        n = counts.parameters(measured.model(place.shape))["total"]
        sd, freedom = measured.spread[place.name]
        assert sd == pytest.approx(NOISE * math.sqrt(2), rel=0.35) and freedom == 2 * len(measured.tables[place.name])
        clean = measured.seeded[(measured.seeded.place == place.name) & (measured.seeded.reads == CLEAN)]
        for row in measured.tables[place.name].itertuples():
            kept = WORTH[Damage.parse(row.damage).kind] if isinstance(row.damage, str) else 1.0
            truth = law(row.times * n, row.tokens_seen * kept) - law(n, clean.tokens_seen.iloc[0])
            held.append(row.low - 0.002 < truth < row.high + 0.002)  # sizes are right within 1 %, rates within a vertex
            assert row.high - row.low < 4.2 * sd / math.sqrt(3)
    assert np.mean(held) >= 0.8


def test_the_spread_of_differences_is_free_of_what_a_seed_does_to_all():
    rng = np.random.default_rng(1)
    alike = rng.normal(0, 1.0, 5)
    losses = {f"r{i}": pd.Series(i + alike + rng.normal(0, 0.01, 5)) for i in range(40)}
    sd, freedom = data_quality.paired_spread(losses)
    assert sd == pytest.approx(0.01 * math.sqrt(2), rel=0.1) and freedom == 4 * 39
    losses["lost"] = pd.Series([1.0, math.nan, 1.0, 1.0, 1.0])
    assert data_quality.paired_spread(losses) == (sd, freedom)
    with pytest.raises(LabError, match="two seeds and two texts"):
        data_quality.paired_spread({"r": losses["r1"]})


def test_a_damage_is_told_in_parameters_too(measured):
    table = measured.tables["small"].set_index("variant")
    N = counts.parameters(measured.model((32, 2, 4)))["total"]
    gain = law(N, 4e5) - law(4 * N, 4e5)
    harm = law(N, 4e5 * WORTH["repeat"]) - law(N, 4e5)
    assert table.of_size["repeat:0.5"] == pytest.approx(4 ** (harm / gain), rel=0.15)
    assert table.of_size_low["repeat:0.5"] < 4 ** (harm / gain) < table.of_size_high["repeat:0.5"]
    assert np.isnan(table.of_size[[TWICE, FOUR, MORE]]).all()


def test_claim_7_is_judged_by_these_very_records(measured):
    N = {place.name: counts.parameters(measured.model(place.shape))["total"] for place in measured.preset.places}
    truth = {}
    for place, n in N.items():
        truth[f"{place}: twice the size less twice the text"] = law(2 * n, 4e5) - law(n, 8e5)
        four = law(4 * n, 4e5 * WORTH["swap"]) - law(n, 4e5)
        truth[f"{place}: damaged text at four times the size less clean text"] = four
    table = pd.read_csv(measured.folder / "tables" / "effects.csv").set_index("part")
    (claim,) = claims.claims_of([7])
    assert set(table.index) == {part.name for part in claim.parts} == set(truth)
    for part, value in truth.items():
        row = table.loc[part]
        assert (
            row.effect == pytest.approx(value, abs=0.015) and row.low < row.low_90 < row.effect < row.high_90 < row.high
        )
        assert row.seeds == 3 and len(row.runs.split()) == len(row.base_runs.split()) == 3
    (verdict,) = claims.judge(measured.folder.parent, [claim])
    assert verdict.sealed == "before" and set(verdict.parts.verdict) <= {"supported", "refuted", "undecided"}
    expected = ["supported" if value > 0 else "refuted" for value in truth.values()]
    clear = [abs(value) > 0.02 for value in truth.values()]
    assert any(clear)
    for got, right, sure in zip(verdict.parts.set_index("part").verdict.loc[list(truth)], expected, clear, strict=True):
        assert got == right or not sure


def test_lines_of_equal_content_are_compared_in_nats_a_line(measured):
    lines = json.loads((measured.folder / "tables" / "lines.json").read_text())
    assert len(set(lines.values())) == 1
    table = pd.read_csv(measured.folder / "tables" / "pair.csv")
    for row in table.itertuples():
        assert row.nats_a_line == pytest.approx(row.loss * PAIR[row.text]["tokens"]["val"] / lines[row.text], rel=1e-6)
    gaps = pd.read_csv(measured.folder / "tables" / "pair_gaps.csv").set_index("place")
    nats = table.set_index(["place", "text"]).nats_a_line
    # A token of the rich text is cheaper, but a line of it takes more of them.
    assert (table.set_index(["place", "text"]).loss.unstack().eval("rich < simple")).all()
    for place in ("small", "large"):
        assert gaps.difference[place] == pytest.approx(nats[place, "simple"] - nats[place, "rich"], rel=1e-6)
        assert gaps.low[place] < gaps.difference[place] < gaps.high[place] < 0


def test_rates_come_from_clean_text_and_from_another_seed(measured):
    assert measured.tuned.damage.isna().all() and not set(measured.tuned.seed) & set(measured.seeded.seed)
    for place, rows in measured.seeded[~measured.seeded.reads.isin(list(PAIR))].groupby("place"):
        assert rows[rows.times == 1].learning_rate.nunique() == 1  # carried over
        best = measured.rates[(measured.rates.place == place) & (measured.rates.reads == CLEAN)].learning_rate.iloc[0]
        assert rows[rows.times == 1].learning_rate.iloc[0] == pytest.approx(best, rel=0.01)


@pytest.mark.parametrize("name", ["smoke", "quick", "full"])
def test_presets_read_equal_tokens_once_at_the_sizes_they_say(name, tmp_path):
    settings = DataQualityParameters(preset=name, text="zipf-markov", results_dir=str(tmp_path / name))
    preset = data_quality.PRESETS[name]
    study = KnownLaw(settings, preset, FACTS, dict(zip(preset.pair or PAIR, PAIR.values(), strict=True)))
    amount = study.preset.amount
    assert {CLAIMED} <= set(study.preset.damages) and {amount, 2 * amount} <= set(study.preset.clean)
    assert all(amount / 4 <= other <= 4 * amount for other in study.preset.clean) and len(study.preset.clean) >= 4
    for reading in study.readings():
        model = study.grown(reading.place, reading.times)
        total = counts.parameters(study.model(reading.place.shape))["total"]
        assert counts.parameters(model)["total"] / total == pytest.approx(reading.times, rel=0.01)
    compared = [r for r in study.readings() if r.amount == amount]
    assert {r.data.damage for r in compared} == {None, *study.preset.damages}
    runs = [run for r in compared if r.times == 1 for run in study.runs_of(r, [0.01], 5)]
    assert len({(r.train.batch_size, r.train.max_steps, r.train.eval_tokens) for r in runs}) == 1
    if name == "full":
        assert [place.shape[:2] for place in study.preset.places] == [(32, 2), (64, 2)] and amount == 4e5
        kinds = Counter(Damage.parse(damage).kind for damage in study.preset.damages)
        assert set(kinds.values()) == {2} and study.preset.seeds == 3
        assert 5e13 < sum(run.flops for run in study.expected_runs()) < 1.1e14


def test_a_text_that_is_too_short_is_told_in_words(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("".join(LINES[:1200]))
    settings = DataQualityParameters(preset="smoke", text=str(short), vocab_size=300, results_dir=str(tmp_path / "r"))
    with pytest.raises(TextError, match=r"reads [\d,]+ training tokens once"):
        data_quality.begin(settings)
    assert not (tmp_path / "r").exists()


def test_parallel_texts_must_be_parallel(measured, tmp_path, monkeypatch):
    paths = {}
    for name, lines in (("simple", LINES), ("rich", LINES[:2000])):
        (tmp_path / f"{name}.txt").write_text("".join(lines))
        paths[name] = str(tmp_path / f"{name}.txt")
    monkeypatch.setattr(data_quality, "pair_of", lambda *_: paths)
    settings = DataQualityParameters(text="zipf-markov", results_dir=str(tmp_path / "r"))
    study = KnownLaw(settings, measured.preset, FACTS, PAIR)
    with pytest.raises(LabError, match=r"same lines.*simple \d+, rich \d+"):
        study._lines()


@pytest.mark.slow
def test_the_smoke_study_is_whole_and_a_second_call_only_redraws_it(tmp_path):
    results = tmp_path / "results"
    command = [
        sys.executable,
        "-m",
        "tinylm",
        "study",
        "data_quality",
        "--preset",
        "smoke",
        "--results-dir",
        str(results),
    ]
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
