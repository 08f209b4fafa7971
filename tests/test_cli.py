"""The command line: what it asks for reaches the lab unchanged, what goes wrong reaches the person as one sentence."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from click.testing import CliRunner

from tinylm.cli import main
from tinylm.config import DataConfig, GenerateConfig, ModelConfig, TrainConfig
from tinylm.errors import LabError
from tinylm.study import notebooks, parameters

CONFIGS = (DataConfig, ModelConfig, TrainConfig, GenerateConfig)


def call(*words: object):
    return CliRunner().invoke(main, [str(word) for word in words])


# --------------------------------------------------------------------------------------------------------------- help


def test_help_is_quick_and_imports_no_torch():
    code = "import sys\nfrom tinylm.cli import main\nmain(sys.argv[1:], standalone_mode=False)\n"
    code += "assert not {'torch', 'numpy', 'pandas', 'papermill', 'ipywidgets'} & set(sys.modules)"
    for words in ([], ["train"], ["study"]):
        subprocess.run([sys.executable, "-c", code, *words, "--help"], check=True, stdout=subprocess.DEVNULL)

    def seconds() -> float:  # of processor time: another process on the machine does not count
        before = os.times()
        subprocess.run([sys.executable, "-m", "tinylm", "--help"], check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(3)) < 0.3


def test_help_names_every_command_and_choice():
    commands = {"fetch", "train", "generate", "export", "import", "fit", "plan", "study", "bench", "doctor", "clean"}
    assert set(main.commands) == commands
    listed = call("--help").output
    for name in main.commands:
        assert re.search(rf"^  {name} +\S", listed, re.MULTILINE)
        assert call(name, "--help").exit_code == 0
    text = call("train", "--help").output
    assert "[swiglu|gelu|relu|relu2]" in text and "num_kv_heads: None is num_heads" in " ".join(text.split())


# -------------------------------------------------------------------------------------------------------------- train


@pytest.fixture
def asked(monkeypatch):
    """The Run that ``tinylm train`` asks for, without training it."""
    from tinylm.study import runs

    seen = []
    record = {"status": "finished", "val_loss": 1.0, "val_bpb": None, "run_id": "r", "model_file": None}
    monkeypatch.setattr(runs, "train_run", lambda run, out, **_: seen.append(run) or record)
    return seen


def test_train_without_options_is_the_default_configs(asked, tmp_path):
    assert call("train", "--out", tmp_path).exit_code == 0
    assert (asked[0].model, asked[0].train, asked[0].data) == (ModelConfig(), TrainConfig(), DataConfig())


def other(field: dataclasses.Field) -> tuple[list[str], object]:
    """Words of the command line that change a field, and the value they stand for."""
    switches = {"norm": "layernorm", "norm_position": "post", "mlp": "relu", "position": "learned", "init": "scaled"}
    names = {**switches, "schedule": "wsd", "precision": "bf16", "tokenizer": "byte", "damage": "swap:0.1"}
    flag = "--" + field.name.replace("_", "-")
    if field.name in names:
        return [flag, names[field.name]], names[field.name]
    if isinstance(field.default, bool):
        return [flag if not field.default else f"--no-{flag[2:]}"], not field.default
    if "bool" in str(field.type):  # None as default, to be picked
        return [flag], True
    if "int" in str(field.type):
        value = {"hidden_size": 8, "num_layers": 3}.get(field.name, 2)
        return [flag, str(value)], value
    if "float" in str(field.type):
        return [flag, "1e-3"], 1e-3
    return [flag, "meta"], "meta"


FIELDS = [(config, field) for config in CONFIGS[:3] for field in dataclasses.fields(config)]


@pytest.mark.parametrize(("config", "field"), FIELDS, ids=[field.name for _, field in FIELDS])
def test_every_field_of_a_config_is_an_option(config, field, asked, tmp_path):
    words, value = other(field)
    assert value != field.default
    if field.name == "max_steps":
        words += ["--warmup-steps", "1"]
    done = call("train", "--out", tmp_path, *words)
    assert done.exit_code == 0, done.output
    parts = {DataConfig: asked[0].data, ModelConfig: asked[0].model, TrainConfig: asked[0].train}
    got = getattr(parts[config], field.name)
    assert got == value and type(got) is type(value)


def test_whole_numbers_may_be_written_with_an_exponent(asked, tmp_path):
    assert call("train", "--out", tmp_path, "--max-steps", "1e3").exit_code == 0
    assert asked[0].train.max_steps == 1000
    refused = call("train", "--out", tmp_path, "--max-steps", "2.5")
    assert refused.exit_code == 2 and "max-steps" in refused.output


def test_what_cannot_be_is_told_in_a_sentence(tmp_path):
    done = call("train", "--out", tmp_path, "--hidden-size", "63")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: hidden_size must be divisible by num_heads. Received: hidden_size=63")
    assert "Traceback" not in done.output and not list(tmp_path.iterdir())


TINY = "--tokenizer byte --vocab-size 256 --hidden-size 16 --num-layers 1 --num-heads 2 --max-seq-len 16 --threads 1"
TINY += " --batch-size 2 --warmup-steps 2 --eval-tokens 256"


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "own text.txt"
    path.write_text("".join(f"{n} green bottles, hanging on the wall\n" for n in range(400)), encoding="utf-8")
    return path


def test_train_then_generate(text, tmp_path):
    from tinylm import generate, load_model

    words = ["train", "--text", text, "--out", tmp_path / "out", *TINY.split(), "--max-steps", "20"]
    done = call(*words)
    assert done.exit_code == 0, done.output
    (record,) = (tmp_path / "out" / "runs").glob("*.json")
    (model,) = (tmp_path / "out" / "models").glob("*.safetensors")
    assert str(record) in done.stdout and str(model) in done.stdout
    written = record.read_bytes()
    again = call(*words)
    assert again.exit_code == 0 and record.read_bytes() == written  # a finished run is not trained again

    network, tokenizer, _ = load_model(model)
    config = GenerateConfig(max_new_tokens=24, temperature=0.7, seed=3)
    expected = generate(network, tokenizer, "1 green", config).text
    for place in (model, tmp_path / "out"):
        options = ["--prompt", "1 green", "--max-new-tokens", 24, "--temperature", 0.7, "--seed", 3]
        told = call("generate", "--model", place, *options)
        assert told.exit_code == 0 and told.stdout == "1 green" + expected + "\n"


def test_generate_says_what_is_wrong_with_a_model(tmp_path):
    empty = call("generate", "--model", tmp_path)
    assert empty.exit_code == 2 and "must hold a model" in empty.stderr
    (tmp_path / "no.safetensors").write_bytes(b"not a model")
    damaged = call("generate", "--model", tmp_path / "no.safetensors")
    assert damaged.exit_code == 2 and damaged.stderr.startswith("error: ")


@pytest.mark.slow
def test_train_goes_on_after_ctrl_c(text, tmp_path):
    words = [sys.executable, "-m", "tinylm", "train", "--text", str(text), *TINY.split(), "--max-steps", "3000"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    subprocess.run([*words, "--out", str(whole)], check=True, stdin=subprocess.DEVNULL, capture_output=True)
    process = subprocess.Popen(
        [*words, "--out", str(parts)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    begun = r"[1-9]\d* "  # steps done, seconds taken
    while time.monotonic() < deadline:
        if any(re.match(begun, path.read_text()) for path in (parts / ".checkpoints").glob("*.progress")):
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped; the same command" in said and "goes on from there" in said and "Traceback" not in said
    assert not list((parts / "runs").glob("*.json"))
    subprocess.run([*words, "--out", str(parts)], check=True, stdin=subprocess.DEVNULL, capture_output=True)
    (one,), (other,) = (list((folder / "models").iterdir()) for folder in (whole, parts))
    assert one.read_bytes() == other.read_bytes()


# ---------------------------------------------------------------------------------------------------------------- fit


@pytest.fixture
def table(tmp_path) -> Path:
    """Runs on a surface with known parameters, without noise."""
    lines = ["params_total,tokens_seen,val_loss"]
    for n in np.geomspace(1e4, 3e5, 5):
        lines += [f"{n},{d},{1.8 + 480 * n**-0.5 + 2000 * d**-0.45}" for d in np.geomspace(1e5, 1e7, 4)]
    path = tmp_path / "runs.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_fit_recovers_a_known_law(table):
    done = call("fit", table, "--json", "--bootstrap", 20)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    law = {"E": 1.8, "A": 480, "B": 2000, "alpha": 0.5, "beta": 0.45}
    assert found["params"] == pytest.approx(law, rel=1e-6)
    assert found["a"] == pytest.approx(0.45 / 0.95) and found["status"] == dict.fromkeys(law, "identified")
    assert (found["n"], found["form"], found["starts"], found["warnings"]) == (20, "surface", 4500, [])
    assert set(found["intervals"]) == set(law) and len(found["a_interval"]) == 2 and found["value"] < 1e-12
    shown = call("fit", table, "--bootstrap", 20).stdout
    assert re.search(r"alpha +0\.5 +\[0\.5, 0\.5\] +identified", shown)
    assert re.search(r"a +0\.47368 .*N_opt grows as C\^a", shown)


def test_fit_reads_the_columns_it_is_given(table):
    renamed = table.with_name("renamed.csv")
    renamed.write_text(table.read_text().replace("params_total,tokens_seen,val_loss", "N,D,L"), encoding="utf-8")
    done = call("fit", renamed, "--params", "N", "--tokens", "D", "--loss", "L", "--json", "--bootstrap", 0)
    assert json.loads(done.stdout)["n"] == 20
    missing = call("fit", renamed)
    assert missing.exit_code == 2 and "'params_total'" in missing.stderr and "N, D, L" in missing.stderr


def test_fit_takes_every_option_as_it_is_meant(table):
    words = ["--objective", "lsq", "--bootstrap", 0, "--drop", "tokens<2e5", "--drop", "loss>100", "--json"]
    found = json.loads(call("fit", table, *words).stdout)
    assert found["objective"] == "lsq" and found["n"] == 15 and found["delta"] is None
    dropped = found["rows"]["dropped"]
    assert dropped == {"tokens<2e5": [2, 6, 10, 14, 18], "loss>100": []}
    assert json.loads(call("fit", table, "--delta", "0.01", "--json").stdout)["delta"] == 0.01
    power = json.loads(call("fit", table, "--params", "params_total", "--form", "power", "--json").stdout)
    assert power["form"] == "power" and set(power["params"]) == {"E", "A", "alpha"}
    assert call("fit", table, "--form", "cubic").exit_code == 2
    wrong = call("fit", table, "--drop", "loss")
    assert wrong.exit_code == 2 and "'loss'" in wrong.stderr and "loss>4" in wrong.stderr
    repeated = call("fit", table, "--unique-tokens", "tokens_seen", "--bootstrap", 0, "--json")
    assert json.loads(repeated.stdout)["form"] == "data-constrained"


@pytest.mark.parametrize("bad", ["", "nan", "-3", "0", "inf", "much"])
def test_fit_names_bad_rows_by_line(table, bad):
    lines = table.read_text().splitlines()
    for number in (5, 9):
        lines[number - 1] = lines[number - 1].rsplit(",", 1)[0] + "," + bad
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = call("fit", table)
    assert done.exit_code == 2
    assert f"line 5: val_loss='{bad}'; line 9: val_loss='{bad}'." in done.stderr
    left = call("fit", table, "--drop", "bad", "--bootstrap", 0)
    assert left.exit_code == 0 and "dropped by the rule bad: 2 rows (lines 5, 9)" in left.stdout


# --------------------------------------------------------------------------------------------------------------- plan


@pytest.fixture
def studied(tmp_path) -> Path:
    """The results folder of a study that found a known law, on this machine, at 1e11 FLOP/s."""
    from tinylm import backend
    from tinylm.study.design import Recipe, rung_sizes
    from tinylm.study.scaling import LearningRateRule

    law = {"E": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.5, "beta": 0.45}
    rule = LearningRateRule("N", 0.01, 4e4, 1e6, -0.3, 0.0, {"rate": (0.009, 0.011)}, n=9, edges=0, scatter=0.1)
    ladder = rung_sizes(Recipe(), 512)
    content = {
        "frontier": None,
        "surface": {
            "form": "surface",
            "params": law,
            "intervals": {name: [0.9 * value, 1.1 * value] for name, value in law.items()},
            "samples": {name: [0.99 * value, 1.01 * value] for name, value in law.items()},
            "a": 0.47,
        },
        "lr_rule": dataclasses.asdict(rule),
        "ladder": ladder.to_dict("records"),
        "seed_sd": 0.01,
        "largest_flops": 4e11,
        "tokens_available": 1e9,
    }
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "law.json").write_text(json.dumps(content), encoding="utf-8")
    speed = {"params": [1e4, 1e6], "flops_per_second": [1e11, 1e11], "threads": os.cpu_count()}
    speed["machine"] = backend.machine()["cpu"]
    (tmp_path / "speed.json").write_text(json.dumps(speed), encoding="utf-8")
    return tmp_path


def test_plan_is_the_best_of_the_ladder(studied):
    from tinylm.study.design import Recipe, rung_sizes

    done = call("plan", "--results-dir", studied, "--flops", "4e12", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    ladder = rung_sizes(Recipe(), 512)
    loss = 1.8 + 480 / ladder.params_total**0.5 + 2000 / (4e12 / ladder.flops_per_token) ** 0.45
    best = ladder.loc[loss.idxmin()]
    assert (found["hidden_size"], found["num_layers"]) == (best.hidden_size, best.num_layers)
    assert found["loss"] == pytest.approx(loss.min(), rel=1e-3)
    assert found["low"] < found["loss"] < found["high"]
    assert found["learning_rate"] == pytest.approx(0.01 * (best.params_total / 4e4) ** -0.3)
    assert found["reach"] == pytest.approx(10, rel=0.01)
    assert found["smaller_costs"] > 0 and found["larger_compute"] > 1 and found["warnings"] == []
    # The same run, asked for by the time that it and its evaluations take.
    worth = found["tokens"] + (20 * 16384 + 65536) / 3
    seconds = worth * best.flops_per_token / 1e11
    timed = json.loads(call("plan", "--results-dir", studied, "--minutes", seconds / 60, "--json").stdout)
    assert timed["seconds"] == pytest.approx(seconds, rel=0.01) and found["seconds"] is None
    same = ("hidden_size", "num_layers", "tokens", "batch_size", "learning_rate", "loss", "low", "high")
    assert {name: timed[name] for name in same} == pytest.approx({name: found[name] for name in same}, rel=1e-9)


def test_plan_spends_tokens_at_the_size_they_suit_and_reads_a_text_again(studied):
    found = json.loads(call("plan", "--results-dir", studied, "--tokens", "3e6", "--json").stdout)
    assert found["tokens"] == pytest.approx(3e6, rel=0.02) and found["epochs"] == pytest.approx(3e-3, rel=0.02)
    longer = call("plan", "--results-dir", studied, "--tokens", "3e9")
    assert longer.exit_code == 0 and "epochs that still pay" in longer.stdout
    assert "3.0 epochs" in longer.stderr and "Muennighoff" in longer.stderr and "assumption" in longer.stderr


def test_plan_measures_a_machine_that_the_study_did_not_know(studied, monkeypatch):
    from tinylm.study import planner

    def measured(self, recipe, seconds, threads):
        assert seconds == [60.0] and threads == os.cpu_count()
        return planner.Speed((1e5,), (5e10,), threads, "here")

    monkeypatch.setattr(planner.Evidence, "speed_for", measured)
    slower = json.loads((studied / "speed.json").read_text()) | {"machine": "another processor"}
    for known in (slower, None):
        (studied / "speed.json").unlink()
        if known:
            (studied / "speed.json").write_text(json.dumps(known), encoding="utf-8")
        done = call("plan", "--results-dir", studied, "--minutes", "1", "--json")
        assert done.exit_code == 0 and "measuring this machine's speed" in done.stderr
        assert json.loads(done.stdout)["flops"] == pytest.approx(60 * 5e10, rel=0.1)
        (studied / "speed.json").touch()


def test_plan_marks_what_lies_far_beyond_the_evidence(studied):
    near = call("plan", "--results-dir", studied, "--flops", "4e12")
    far = call("plan", "--results-dir", studied, "--flops", "4e13")
    assert "10x" in near.stdout and "far beyond the evidence" not in near.output
    assert "far beyond the evidence" in far.stdout and "warning: " in far.stderr


def test_plan_says_what_it_needs(studied):
    for words in ((), ("--minutes", "1", "--flops", "1e12"), ("--flops", "1e12", "--tokens", "1e6")):
        done = call("plan", "--results-dir", studied, *words)
        assert done.exit_code == 2 and "--minutes or --flops or --tokens" in done.stderr
    absent = call("plan", "--results-dir", studied / "nowhere", "--flops", "1e12")
    assert absent.exit_code == 2 and "law.json" in absent.stderr and "tinylm study" in absent.stderr
    path = studied / "tables" / "law.json"
    for damage in (path.read_text()[:-50], "{}", path.read_text().replace('"rate"', '"ratio"')):
        path.write_text(damage, encoding="utf-8")
        damaged = call("plan", "--results-dir", studied, "--flops", "1e12")
        assert damaged.exit_code == 2 and "must be as the study wrote it" in damaged.stderr


def test_plan_does_not_take_a_damaged_speed_for_the_machines(studied):
    path = studied / "speed.json"
    whole = path.read_text()
    for damage in (
        whole[:-9],
        "[]",
        whole.replace("100000000000.0", "-1"),
        whole.replace("1000000.0]", "1000000.0, 2]"),
    ):
        path.write_text(damage, encoding="utf-8")
        done = call("plan", "--results-dir", studied, "--minutes", "1")
        assert done.exit_code == 2 and "speed.json" in done.stderr and "delete it" in done.stderr, done.output


# -------------------------------------------------------------------------------------------------------------- fetch


def test_fetch_lists_the_named_texts():
    from tinylm.corpora import NAMES

    done = call("fetch")
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(NAMES)


def test_fetch_of_an_unknown_name():
    done = call("fetch", "no-such-text")
    assert done.exit_code == 2 and "no-such-text" in done.stderr


# -------------------------------------------------------------------------------------------------------------- study


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A repository with studies of our own."""

    def write(name: str, *cells: str) -> None:
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
        notebook.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
        notebook.cells[0].metadata["tags"] = ["parameters"]
        nbformat.write(notebook, tmp_path / "studies" / f"{name}.ipynb")

    (tmp_path / "studies").mkdir()
    monkeypatch.setattr(notebooks, "repository", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    return write


def test_study_runs_a_notebook(house, tmp_path):
    house(
        "mine",
        "text = 'verse'\nrates = []\nseed = 0\nflag = False",
        "import sys, os\nprint(sys.executable, os.getcwd(), [text, rates, seed, flag])",
        f"import base64\nfrom IPython.display import HTML, Image, display\ndisplay(Image(base64.b64decode({PNG!r})))",
        "HTML('<b>in bold</b>')",
    )
    given = ["--text", "a b.txt", "--seed", "3", "-p", "rates", "[1e-3]", "-p", "flag", "true"]
    process = subprocess.run(
        [sys.executable, "-c", CALL, str(tmp_path), "study", "mine", *given],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    results = tmp_path / "results" / "local" / "mine"
    # This very interpreter, in the current folder, with the parameters as values.
    assert process.stdout.splitlines()[0] == f"{sys.executable} {tmp_path} {['a b.txt', [0.001], 3, True]}"
    assert process.stdout.splitlines()[-1] == f"page:   {results / 'notebook.html'}"
    executed = nbformat.read(results / "notebook.ipynb", as_version=4)
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")
    assert str(tmp_path) not in json.dumps(executed.metadata)
    page = (results / "notebook.html").read_text(encoding="utf-8")
    assert "<b>in bold</b>" in page and 'src="data:image/png;base64,' in page
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=\"?(https?:)?//|import\(|url\(\"?https?:", page)


PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
CALL = """
import pathlib, sys
from tinylm.study import notebooks
notebooks.repository = lambda root=pathlib.Path(sys.argv.pop(1)): root
from tinylm.cli import main
main()
"""


def test_study_tells_an_error_in_a_sentence(house, tmp_path):
    house("wrong", "heads = 4", "from tinylm import ModelConfig\nModelConfig(num_heads=heads)")
    house("broken", "x = 1", "x / 0")
    done = call("study", "wrong", "-p", "heads", "5")
    assert done.exit_code == 1
    assert done.stderr.startswith(
        "error: hidden_size must be divisible by num_heads. Received: hidden_size=64, num_heads=5"
    )
    assert "Traceback" not in done.output
    assert not (tmp_path / "results").exists()
    done = call("study", "broken", "--results-dir", tmp_path / "there")
    assert done.exit_code == 1 and done.stderr.startswith("error: ZeroDivisionError: division by zero")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["notebook-failed.ipynb"]
    assert "Traceback" not in done.output


def test_study_of_an_unknown_name(house):
    house("mine", "x = 1")
    done = call("study", "yours")
    assert done.exit_code == 2 and "yours" in done.stderr and "the studies are mine" in done.stderr


def test_study_refuses_wrong_parameters_before_it_starts(house):
    house("quickstart", "x = 1")
    for words, named in (
        (("--preset", "quik"), "quick"),
        (("--seed", "-1"), "seed=-1"),
        (("-p", "vocab_sise", "3"), "vocab_size"),
        (("--workers", "many"), "workers"),
    ):
        done = call("study", *words)
        assert done.exit_code == 2 and named in done.stderr, done.output


def test_studies_without_a_repository(monkeypatch, tmp_path):
    monkeypatch.setattr(notebooks, "repository", lambda: tmp_path)
    with pytest.raises(LabError, match=r"pip install -e \."):
        notebooks.find_study("quickstart")


def test_results_in_the_repository_do_not_name_the_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(parameters, "repository", lambda: tmp_path)
    assert parameters.within_repository(tmp_path / "results" / "mine") == "results/mine"
    assert parameters.within_repository(tmp_path.parent / "elsewhere") == str(tmp_path.parent / "elsewhere")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_ctrl_c_ends_a_study_and_its_kernel(house, tmp_path):
    house("long", "x = 1", "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)")
    process = subprocess.Popen(
        [sys.executable, "-c", CALL, str(tmp_path), "study", "long"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    kernel = int(process.stdout.readline())
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.strip() == "stopped; finished runs are kept, and the same command started again goes on from there"
    assert not alive(kernel)
