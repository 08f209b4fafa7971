"""doctor: each fault that is put in comes out under its name with a way out, and a whole installation and folder are ok."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tinylm import backend, files
from tinylm.cli import main
from tinylm.config import DataConfig, ModelConfig, TrainConfig
from tinylm.study import checkup, forecasts, runs

NEWER = backend.NUMERICS_REVISION + 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A results folder with two finished runs, a model and a sealed forecast."""
    folder = tmp_path_factory.mktemp("results")
    text = folder.parent / f"{folder.name}.txt"
    text.write_text("".join(f"{n} green bottles, hanging on the wall\n" for n in range(400)), encoding="utf-8")
    shape = {"vocab_size": 256, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "max_seq_len": 16}
    short = {"max_steps": 4, "warmup_steps": 1, "batch_size": 2, "eval_tokens": 128, "threads": 1}
    for seed in (0, 1):
        run = runs.Run(ModelConfig(**shape), TrainConfig(**short, seed=seed), DataConfig(str(text), tokenizer="byte"))
        record = runs.train_run(run, folder, keep_model=seed == 0)
    target = {"params_total": 1, "tokens": 1, "learning_rate": 0.1, "run_id": record["run_id"]}
    prediction = {"loss": 2.0, "low": 1.0, "high": 3.0}
    forecasts.seal(folder / "forecasts", study="mine", target=target, prediction=prediction, fit={})
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "results", symlinks=True))


def found(folder, state=None):
    """The findings about a folder, one line each; all, or those of a state."""
    return [f.line() for f in checkup.folder_findings(Path(folder)) if state in (None, f.state)]


def rewrite(path: Path, **changes) -> Path:
    """The record with other content and a right checksum, as another version of tinylm might have written it."""
    record = {**json.loads(path.read_text()), **changes}
    record["checksum"] = runs._checksum(record)
    path.write_text(json.dumps(record))
    return path


def records(folder) -> list[Path]:
    return sorted((folder / "runs").glob("*.json"))


# -------------------------------------------------------------------------------------------------------- installation


def test_this_installation_is_whole():
    lines = checkup.checkup()
    assert {"Python", "packages", "torch", "compiler", "bf16", "threads", "cache"} <= {
        finding.about for finding in lines
    }
    assert not [finding.line() for finding in lines if finding.state == checkup.BROKEN]
    assert all(finding.fix for finding in lines if finding.about == "packages" and finding.state != checkup.OK)


def test_versions_lie_in_their_ranges_or_do_not():
    for version in ("2.9", "2.13.0+cpu", "2.13.99.post1", "2.9.0rc1"):
        assert checkup.within(version, ">=2.9,<2.14"), version
    for version in ("2.8.9", "2.14", "2.14.0+cpu", "3", "1.99"):
        assert not checkup.within(version, ">=2.9,<2.14"), version
    assert checkup.within("1.0", "") and checkup.within("1.0", "==1.0.0") and not checkup.within("1.0.1", "!=1.0.1")
    assert checkup.within("2025.7.1", ">2025.7") and not checkup.within("2025.7", ">2025.7,<=2026")


def test_what_is_asked_for_is_pyprojects():
    python, wanted = checkup.requirements()
    assert python == ">=3.11" and any(line.startswith("torch>=") for line in wanted[""]) and wanted["dask"]


def test_a_missing_package_is_broken_and_an_untried_version_is_looked_at(monkeypatch):
    wanted = {"": ["numpy>=1,<2", "no-such-package>=1,<2"], "more": ["no-such-extra>=3,<4", "pytest>=1,<99"]}
    monkeypatch.setattr(checkup, "requirements", lambda: (">=3.0", wanted))
    lines = [finding.line() for finding in checkup._packages()]
    assert len(lines) == 3
    assert lines[0].startswith("look   packages: numpy ") and "pip install 'numpy>=1,<2'" in lines[0]
    assert lines[1].startswith("broken packages: no-such-package is not installed. Way out: pip install")
    assert lines[2].startswith("ok     packages: 1 as asked for") and "no-such-extra (more)" in lines[2]
    monkeypatch.setattr(checkup, "requirements", lambda: (">=99", {}))
    assert [finding.state for finding in checkup._python()] == [checkup.BROKEN]


def test_without_a_compiler_that_works_there_is_a_word(tmp_path, monkeypatch):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'error: Python.h: no such file' >&2; exit 1\n")
    broken.chmod(0o755)
    for path, word in ((None, "none of $CXX"), (str(broken), "python3-dev")):
        monkeypatch.setattr(backend, "cpp_compiler", lambda path=path: path)
        (finding,) = checkup._compiler()
        assert finding.state == checkup.LOOK and word in finding.line() and "torch.compile" in finding.words


def test_a_torch_that_does_not_load_is_a_finding(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libtorch_cpu.so: cannot open shared object file')")
    (tmp_path / "numpy.py").write_text("raise ImportError('no numpy')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "tinylm", "doctor", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "broken torch: OSError: libtorch_cpu.so" in done.stdout and "Way out:" in done.stdout


def test_disk_space_and_write_access(tmp_path, monkeypatch):
    def room(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: type("", (), {"free": free}))
        return [(f.state, f.words) for f in checkup._room("cache", tmp_path / "a" / "b", "go elsewhere")]

    assert room(5e9)[0][0] == checkup.OK and "5.0 GB" in room(5e9)[0][1] and "not made yet" in room(5e9)[0][1]
    assert room(1e9)[0][0] == checkup.LOOK and room(1e6)[0][0] == checkup.BROKEN
    assert not list(tmp_path.iterdir())  # looking leaves nothing behind

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkup.tempfile, "TemporaryFile", refuse)
    assert room(5e9)[0][0] == checkup.BROKEN
    (finding,) = checkup._room("results", tmp_path, "read it", needed=False)
    assert finding.state == checkup.LOOK and "Permission denied" in finding.line() and finding.fix == "read it"


# ------------------------------------------------------------------------------------------------------ results folder


def test_a_whole_folder_is_ok(folder):
    lines = found(folder)
    assert lines == found(folder, checkup.OK)
    text = "\n".join(lines)
    assert (
        "2 readable (2 finished)" in text and "1 of 1 load" in text and "1 sealed and intact, 0 of them scored" in text
    )
    assert found(folder.parent) == lines  # a folder of results folders
    (alone,) = found(folder / "forecasts")
    assert "1 sealed and intact" in alone


def test_a_folder_that_cannot_be_read_is_broken(folder, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkup.os, "listdir", refuse)
    (line,) = found(folder)
    assert line.startswith("broken") and "Permission denied" in line and "permissions" in line


def test_damage_is_told_by_name(folder):
    torn, altered = records(folder)
    torn.write_bytes(torn.read_bytes()[:-30])
    altered.write_text(altered.read_text().replace('"steps": 4', '"steps": 5'))
    (model,) = (folder / "models").glob("*")
    model.write_bytes(model.read_bytes()[:-4])
    (folder / "corpora.json").write_text("{")
    (seal,) = (folder / "forecasts").glob("*.json")
    seal.write_text(seal.read_text().replace('"loss": 2.0', '"loss": 2.5'))
    broken = found(folder, checkup.BROKEN)
    for name in (torn.name, altered.name, model.name, "corpora.json", seal.name):
        (line,) = [line for line in broken if name in line]
        assert "Way out: " in line
    assert len(broken) == 5 and "0 readable" in "\n".join(found(folder))


def test_older_schema_and_numerics_are_told_and_not_called_damage(folder, monkeypatch):
    first, second = records(folder)
    rewrite(first, schema=0)
    (line,) = found(folder, checkup.LOOK)
    assert first.name in line and "schema 0" in line and "Way out: use the version of tinylm that wrote it" in line
    rewrite(first, schema=runs.SCHEMA)
    monkeypatch.setattr(backend, "NUMERICS_REVISION", NEWER)
    (line,) = found(folder, checkup.LOOK)
    assert f"2 of revision {NEWER - 1}" in line and f"trains by revision {NEWER}" in line
    rewrite(second, numerics_revision=NEWER)
    (line,) = [line for line in found(folder, checkup.LOOK) if "revision" in line]
    assert f"1 of revision {NEWER - 1}, 1 of revision {NEWER}" in line and "do not fit them together" in line
    assert not found(folder, checkup.BROKEN)


def test_a_folder_of_another_machine_is_told(folder, monkeypatch):
    here = backend.machine()
    monkeypatch.setattr(backend, "machine", lambda device="cpu": {**here, "cpu": "another processor"})
    (line,) = found(folder, checkup.LOOK)
    assert "another processor here" in line and "another results_dir" in line


def test_failed_runs_leftovers_and_interrupted_runs_are_told(folder):
    from tinylm.checkpoint import save_state
    from tinylm.train import CHECKPOINT_NAME

    rewrite(records(folder)[0], status="failed", reason="out of memory")
    ended = records(folder)[1].stem
    for name in ("c" * 16, "d" * 16, ended, records(folder)[0].stem):
        save_state(folder / ".checkpoints" / name / CHECKPOINT_NAME, {}, {"step": 1})
    (folder / ".checkpoints" / ("d" * 16) / CHECKPOINT_NAME).write_bytes(b"torn")
    draft = folder / "runs" / ".x.json.abc.part"
    draft.touch()
    os.utime(draft, (0, 0))
    failed, begun, damaged, left, drafts = found(folder, checkup.LOOK)
    assert "1 failed, the first: out of memory" in failed
    assert "3 runs were cut off" in begun and records(folder)[0].stem in begun  # the one that failed is tried again
    assert "c" * 16 in begun and "tinylm clean checkpoints --results" in begun
    assert "d" * 16 in damaged and "starts anew" in damaged and "c" * 16 not in damaged
    assert "1 of finished runs" in left and "1 half-written" in drafts and "clean leftovers" in drafts
    assert not found(folder, checkup.BROKEN)


def test_a_run_under_way_is_no_leftover(folder):
    held = runs.Folder(folder)
    held.checkpoints.mkdir(exist_ok=True)
    with held.locked("a" * 16):
        (held.checkpoints / ("a" * 16)).mkdir()
        assert not found(folder, checkup.LOOK)
        assert [line for line in found(folder) if "being trained now: " + "a" * 16 in line]
    assert found(folder, checkup.LOOK)


def test_the_command_ends_with_1_only_where_something_is_broken(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(checkup, "_compiler", lambda: [])  # which takes a second

    def doctor(*words):
        return CliRunner().invoke(main, ["doctor", *map(str, words)])

    done = doctor(folder)
    assert done.exit_code == 0, done.output
    assert all(line.startswith(("ok     ", "look   ")) for line in done.stdout.splitlines())
    rewrite(records(folder)[0], schema=0)
    assert doctor(folder).exit_code == 0
    records(folder)[1].write_text("{")
    done = doctor(folder, "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == 1 and told["state"] == "broken"
    assert [f["state"] for f in told["findings"] if records(folder)[1].name in f["words"]] == ["broken"]
    (tmp_path / "empty").mkdir()
    assert doctor(tmp_path / "empty").exit_code == 0 and doctor(tmp_path / "nowhere").exit_code == 1


def test_looking_changes_nothing(folder):
    def everything():
        return {p.relative_to(folder): p.stat().st_mtime_ns for p in folder.rglob("*")}

    (folder / ".checkpoints").mkdir(exist_ok=True)
    (folder / ".checkpoints" / "x.lock").touch()
    before = everything()
    assert CliRunner().invoke(main, ["doctor", str(folder)]).exit_code == 0
    after = everything()
    assert set(after) == set(before) and all(after[p] == before[p] for p in before if (folder / p).is_file())
    assert files.home().is_relative_to(Path(os.environ["TINYLM_HOME"]))
