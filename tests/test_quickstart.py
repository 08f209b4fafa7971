"""The quickstart study as a person runs it: from any folder, whole, reproducible, and told in words where it cannot be."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest

from tinylm.errors import ConfigError, TextError
from tinylm.study import forecasts, quickstart
from tinylm.study.parameters import QuickstartParameters, repository
from tinylm.study.runs import load_runs

NOTEBOOK = repository() / "studies" / "quickstart.ipynb"
TABLES = {"runs.csv", "laws.csv", "isoflop_minima.csv", "plan.csv", "seeds.csv", "law.json"}
FIGURES = {"learning_rates", "isoflop", "seeds", "laws", "forecast", "surface"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def times_of(results: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (results / "runs").iterdir()}


def call(folder: Path, *words: object) -> subprocess.CompletedProcess:
    """A command in another folder than the repository; the kernel named python3 is this environment's."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "JUPYTER_PREFER_ENV_PATH": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)], cwd=folder, env=environment, capture_output=True, text=True
    )


def with_papermill(folder: Path, *parameters: object) -> subprocess.CompletedProcess:
    return call(folder, "papermill", NOTEBOOK, folder / "out.ipynb", "--log-output", "--no-progress-bar", *parameters)


# --------------------------------------------------------------------------------------------------- the compute study


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """The results of one smoke study, run by papermill from a folder of its own."""
    place = tmp_path_factory.mktemp("quickstart")
    done = with_papermill(place / "elsewhere", "-p", "preset", "smoke", "-p", "results_dir", place / "results")
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in (place / "elsewhere").iterdir()} == {"out.ipynb"}  # nothing is left lying about
    executed = nbformat.read(place / "elsewhere" / "out.ipynb", as_version=4)
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert "Warning" not in "".join(output.text for output in outputs if output.get("name") == "stderr")
    return place / "results"


def test_a_study_leaves_report_tables_figures_records_and_model(results):
    assert {path.name for path in (results / "tables").iterdir()} >= TABLES
    assert {f"{name}.{kind}" for name in FIGURES for kind in ("svg", "png")} <= {
        path.name for path in (results / "figures").iterdir()
    }
    readme = (results / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("# What a small model learns from zipf-markov\n")
    links = re.findall(r"\]\(([^)#]+)\)", readme)
    assert links and not [link for link in links if "://" not in link and not (results / link).exists()]
    for name in FIGURES:
        assert f"(figures/{name}.png)" in readme
    assert not list(results.rglob("*.part")) and not (results / ".checkpoints").exists()
    assert str(results) not in readme and "nan" not in readme.lower().replace("finance", "")


def test_the_table_of_runs_is_the_records(results):
    table = pd.read_csv(results / "tables" / "runs.csv").set_index("run_id")
    records = load_runs(results).set_index("run_id")
    assert set(table.index) == set(records.index) and len(table) > 20
    for column in ("val_loss", "flops", "learning_rate", "params_total", "tokens_seen"):
        pd.testing.assert_series_equal(
            table[column].astype(float), records.loc[table.index, column].astype(float), rtol=1e-9
        )
    assert set(table.status) <= {"finished", "diverged"}
    assert {"isoflop", "sizes", "amounts", "seeds", "forecast"} <= set(table.family)
    families = table[table.family == "isoflop"]
    for budget, family in families.groupby("budget"):
        assert (family.flops / budget - 1).abs().max() < 0.05 and family.params_total.nunique() >= 3
    assert (families.groupby(["budget", "params_total"]).learning_rate.nunique() >= 3).all()


def test_every_number_of_the_report_can_be_read_as_data(results):
    minima = pd.read_csv(results / "tables" / "isoflop_minima.csv")
    assert minima.budget.tolist() == list(quickstart.PRESETS["smoke"].budgets)
    assert minima.inside.dtype == bool and (minima.loss_min > 0).all()
    seeds = pd.read_csv(results / "tables" / "seeds.csv").iloc[0]
    assert seeds.runs == quickstart.PRESETS["smoke"].seeds and seeds.sd_low_90 < seeds.sd < seeds.sd_high_90
    laws = pd.read_csv(results / "tables" / "laws.csv")
    assert {"L(N) at equal tokens", "L(D) at equal size", "L(N, D)"} <= set(laws.law)
    plan = pd.read_csv(results / "tables" / "plan.csv")
    assert plan.minutes.tolist() == [10, 60] and (plan.low < plan.loss).all() and (plan.loss < plan.high).all()
    assert (plan.tokens / (plan.steps * plan.batch_size * 128) - 1).abs().max() < 0.01
    far = plan.reach > 30
    assert (plan.evidence[far] == "far beyond").all() and (plan.evidence[~far] == "near").all()
    law = json.loads((results / "tables" / "law.json").read_text())
    assert law["surface"]["params"].keys() == {"E", "A", "B", "alpha", "beta"}


def test_the_forecast_was_sealed_before_its_run_began(results):
    table = forecasts.load(results / "forecasts")  # reading checks the seals
    assert len(table) == 1 and table.scored.all()
    sealed = table.iloc[0]
    record = load_runs(results).set_index("run_id").loc[sealed.run_id]
    assert pd.Timestamp(sealed.time) <= pd.Timestamp(record.started)
    assert sealed.observed == record.val_loss and sealed.params_total == record.params_total
    others = load_runs(results).query("run_id != @sealed.run_id")
    assert pd.to_datetime(others.finished).max() <= pd.Timestamp(sealed.time)  # the fit had seen all there was
    beyond = record.flops / others.flops.max()
    assert beyond >= quickstart.PRESETS["smoke"].beyond
    score = json.loads((results / "forecasts" / f"{sealed['name']}.score.json").read_text())
    assert score["error"] == pytest.approx(record.val_loss - sealed.loss)


def test_the_best_model_writes(results):
    from tinylm import GenerateConfig, generate, load_model

    model, tokenizer, about = load_model(results / "models" / "best.safetensors")
    page = generate(model, tokenizer, "AB", GenerateConfig(max_new_tokens=50, seed=1))
    assert len(page.text) >= 50 and page.text.isprintable()
    record = load_runs(results).set_index("run_id").loc[about["run_id"]]
    assert about["val_loss"] == record.val_loss and model.config.hidden_size == record.hidden_size


def test_a_second_call_trains_nothing_and_gives_the_same_bytes(results, tmp_path):
    """And by the other road: the command line, which also leaves the executed notebook and its page."""
    times, before = times_of(results), files_of(results)
    done = call(tmp_path, "tinylm", "study", "--preset", "smoke", "--results-dir", results)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert times_of(results) == times
    assert "nothing to train" in done.stdout and "trained in" not in done.stdout
    assert set(re.findall(r"(\d+) (?:runs? )?to train", done.stdout)) == {"0"}
    after = files_of(results)
    assert set(after) - set(before) == {"notebook.ipynb", "notebook.html"}
    changed = [name for name, content in before.items() if after[name] != content]
    assert changed == []
    page = after["notebook.html"].decode()
    assert page.count("data:image/png;base64,") >= len(FIGURES)
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=\"?(https?:)?//", page)
    readme = (results / "README.md").read_text(encoding="utf-8")
    assert all(line in page for line in re.findall(r"^\| (\S+ x \d+) \|", readme, re.MULTILINE))


# ------------------------------------------------------------------------------------------------- what is asked wrongly


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"presett": "smoke"}, ["only its own parameters", "presett='smoke'", "perhaps 'preset' was meant"]),
        ({"workers": "two"}, ["workers must be of type int", "'two' (str)", "give"]),
        ({"text": "no/such/file.txt"}, ["must be a file or folder that exists", "no/such/file.txt", "the names are"]),
    ],
    ids=["unknown name", "wrong type", "no file"],
)
def test_a_wrong_question_ends_in_a_sentence_before_any_work(asked, words, tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    given = {"preset": "smoke", "results_dir": str(tmp_path / "results"), **asked}
    with pytest.raises(papermill.PapermillExecutionError) as caught:
        papermill.execute_notebook(
            NOTEBOOK, tmp_path / "out.ipynb", parameters=given, progress_bar=False, log_output=False
        )
    assert caught.value.ename in ("ConfigError", "TextError")
    for word in ["Received: ", "Way out: ", *words]:
        assert word in caught.value.evalue
    assert not (tmp_path / "results").exists()


def test_a_wrong_text_is_told_before_anything_is_written(tmp_path):
    path = tmp_path / "pictures.txt"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0" * 100)
    with pytest.raises(TextError, match=r"plain text in UTF-8.*pictures\.txt.*binary.*Way out"):
        quickstart.begin(QuickstartParameters(preset="smoke", text=str(path), results_dir=str(tmp_path / "results")))
    assert not (tmp_path / "results").exists()


def test_a_vocabulary_that_the_text_cannot_support_is_told_before_anything_is_written(tmp_path):
    path = write_sentences(tmp_path / "small.txt", 60_000)
    settings = QuickstartParameters(preset="smoke", text=str(path), vocab_size=20_000, results_dir=str(tmp_path / "r"))
    with pytest.raises(TextError, match=r"vocab_size=20000.*largest vocab_size that works is \d+"):
        quickstart.begin(settings)
    with pytest.raises(ConfigError, match=r"byte tokenizer.*vocab_size=512.*set vocab_size to 256"):
        quickstart.begin(QuickstartParameters(preset="smoke", tokenizer="byte", results_dir=str(tmp_path / "r")))
    assert not (tmp_path / "r").exists()


# ----------------------------------------------------------------------------------------------------- texts of one's own


def write_sentences(path: Path, size: int) -> Path:
    """Sentences of made-up words, the frequent ones short: enough like a language to be learned."""
    rng = random.Random(0)
    syllables = [c + v + e for c in "bdfgklmnprst" for v in "aeiou" for e in ("", "n", "r", "s")]
    words = ["".join(rng.choices(syllables, k=1 + rank // 150)) for rank in range(600)]
    weights = [1 / (rank + 1) for rank in range(600)]
    lines: list[str] = []
    written = 0
    while written < size:
        line = " ".join(rng.choices(words, weights, k=rng.randint(4, 12))).capitalize() + "."
        lines.append(line)
        written += len(line) + 1
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_the_size_of_a_text_decides_which_study_it_gets(tmp_path):
    small = write_sentences(tmp_path / "small.txt", 300_000)
    large = write_sentences(tmp_path / "large.txt", quickstart.SMALLEST_TEXT)
    for path, kind in ((small, quickstart.DataStudy), (large, quickstart.ComputeStudy)):
        study = quickstart.begin(
            QuickstartParameters(preset="smoke", text=str(path), results_dir=str(tmp_path / path.stem))
        )
        assert type(study) is kind
        assert path.name in study.report.title


@pytest.mark.parametrize("size", [8_000, 40_000])
def test_a_text_far_too_small_says_so_before_anything_is_trained(size, tmp_path):
    path = write_sentences(tmp_path / "tiny.txt", size)
    settings = QuickstartParameters(
        preset="smoke", text=str(path), vocab_size=300, results_dir=str(tmp_path / "results")
    )
    with pytest.raises(TextError) as caught:
        study = quickstart.begin(settings)
        study.plan_sweep()
    for word in ("needs three parts of it", "training tokens", "give at least", "`tinylm train`"):
        assert word in str(caught.value)
    assert not (tmp_path / "results" / "runs").exists()


@pytest.mark.slow
@pytest.mark.alone
def test_a_small_text_gets_a_study_of_its_amount_and_says_why(tmp_path):
    path = write_sentences(tmp_path / "my notes.txt", 300_000)
    results = tmp_path / "results"
    asked = ["-p", "preset", "smoke", "-p", "text", path, "-p", "results_dir", results]
    done = with_papermill(tmp_path / "elsewhere", *asked)
    assert done.returncode == 0, done.stderr[-3000:]
    readme = (results / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("# What a small model learns from my notes.txt: a study limited by data\n")
    why = readme[readme.index("## Why this study") : readme.index("## Learning rates")]
    assert "0.30 MB, less than the 2 MB" in why and "law of compute" in why and "stops when the validation loss" in why
    runs = load_runs(results)
    fitted = runs[runs.family == "amounts"]
    assert fitted.unique_tokens.nunique() == 3 and set(fitted.status) <= {"finished", "early_stopped"}
    assert fitted.epochs.max() <= quickstart.PRESETS["smoke"].epochs + 0.5
    assert fitted.hidden_size.nunique() == 2
    amounts = pd.read_csv(results / "tables" / "amounts.csv")
    assert amounts.unique_tokens.is_monotonic_increasing and amounts.val_loss.is_monotonic_decreasing
    sealed = forecasts.load(results / "forecasts").iloc[0]
    final = runs.set_index("run_id").loc[sealed.run_id]
    assert pd.Timestamp(sealed.time) <= pd.Timestamp(final.started)
    assert final.unique_tokens > 3 * fitted.unique_tokens.max()  # the whole text, beyond every part fitted
    assert {"runs.csv", "laws.csv", "plan.csv", "seeds.csv"} <= {path.name for path in (results / "tables").iterdir()}

    times, before = times_of(results), files_of(results)
    assert with_papermill(tmp_path / "again", *asked).returncode == 0
    assert times_of(results) == times and files_of(results) == before
