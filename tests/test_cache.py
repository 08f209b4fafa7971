"""clean: what is held is told by kind, what is named goes, and nothing else does."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from tinylm import cache
from tinylm.cli import main
from tinylm.errors import LabError
from tinylm.study.runs import Folder


def put(path: Path, size: int = 100, age: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    os.utime(path, (time.time() - age,) * 2)
    return path


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache with something of every kind."""
    home = tmp_path / "home"
    for folder, size in (("texts", 1000), ("scans", 10), ("splits", 20), ("wheels", 500), ("tokenizers", 40)):
        put(home / folder / "one", size)
    put(home / "maps" / "a.ids", 2000, age=5000)
    put(home / "maps" / "a.json", 50, age=9000)
    put(home / "compiled" / "2a" / "deep" / "kernel.so", 300)
    put(home / "machines" / "m.json", 5)
    put(home / "labs" / "uploads" / "mine.txt", 70)
    put(home / "maps" / ".b.ids.xyz.part", 600, age=7200)
    put(home / "texts" / ".aside-abc" / "text", 800, age=7200)
    os.utime(home / "texts" / ".aside-abc", (time.time() - 7200,) * 2)
    put(home / "somebody's" / "file", 9)
    monkeypatch.setenv("TINYLM_HOME", str(home))
    return home


@pytest.fixture
def results(tmp_path):
    """A results folder with a record, a model, a run that was cut off, and a draft."""
    folder = tmp_path / "results"
    put(folder / "runs" / "aa.json")
    put(folder / "models" / "aa.safetensors")
    put(folder / "arithmetic.json")
    put(folder / ".checkpoints" / "bb" / "checkpoint.safetensors", 4000)
    put(folder / ".checkpoints" / "bb.progress", 8)
    put(folder / ".checkpoints" / "bb.lock", 0)
    put(folder / ".checkpoints" / "folder.lock", 0)
    put(folder / "runs" / ".cc.json.1.part", 30, age=7200)
    return folder


def everything(*folders: Path) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}


def clean(*words: object, said: str = ""):
    return CliRunner().invoke(main, ["clean", *map(str, words)], input=said)


def test_what_is_held_is_told_by_kind(home, results):
    found = cache.holdings(results)
    sizes = {kind: holding.bytes for kind, holding in found.items()}
    assert sizes == {
        **{"texts": 1030, "wheels": 500, "tokenizers": 40, "maps": 2050, "compiled": 300, "machines": 5, "labs": 70},
        **{"leftovers": 600 + 800 + 30, "checkpoints": 4008, "other": 9},
    }
    assert sum(len(holding.paths) for holding in found.values()) == len(everything(home, results)) - 3  # the results
    assert found["maps"].used == pytest.approx(time.time() - 5000, abs=5)
    shown = clean("--results", results).stdout
    assert all(f"\n{kind} " in shown for kind in sizes) and "last used " in shown
    assert everything(home, results) == everything(home, results)


def test_to_ask_alone_removes_nothing(home, results):
    before = everything(home, results)
    assert clean().exit_code == 0 and clean("--results", results).exit_code == 0
    assert clean("maps", said="n\n").exit_code == 0
    assert clean("maps").exit_code == 1  # nobody there to answer
    assert everything(home, results) == before


def test_what_is_named_goes_and_nothing_else(home, results):
    before = everything(home, results)
    done = clean("maps", "compiled", said="y\n")
    assert done.exit_code == 0, done.output
    assert "maps" in done.stdout and "wheels" not in done.stdout and "Remove 0.0 MB?" in done.stdout
    gone = {home / "maps" / "a.ids", home / "maps" / "a.json", home / "compiled" / "2a" / "deep" / "kernel.so"}
    assert before - everything(home, results) == gone
    assert not (home / "compiled").exists() and home.is_dir()  # its folders were empty then
    assert clean("compiled", "--yes").stdout.endswith("nothing to remove\n")


def test_leftovers_are_old_drafts_alone(home):
    young = put(home / "maps" / ".c.ids.xyz.part", age=60)
    busy = put(home / "wheels" / ".aside-def" / "wheel", age=7200)
    put(busy.with_name("just now"))
    assert cache.remove(["leftovers"]) == 600 + 800
    assert {young, busy} <= everything(home)
    assert cache.remove(["maps", "wheels"]) == 2050 + 500  # and they do not go with their kind either
    assert {young, busy} <= everything(home)


def test_all_kinds_together_leave_records_models_and_strangers(home, results):
    kept = {results / "runs" / "aa.json", results / "models" / "aa.safetensors", results / "arithmetic.json"}
    assert clean(*cache.KINDS, "--results", results, "--yes").exit_code == 0
    assert everything(home, results) == kept | {home / "somebody's" / "file"}
    assert not (results / ".checkpoints").exists()
    refused = clean("other", "--yes")
    assert refused.exit_code == 2 and "other" in refused.stderr and "leftovers" in refused.stderr


def test_links_are_left_alone(home, results, tmp_path):
    outside = put(tmp_path / "outside" / "precious")
    (home / "maps" / "link.ids").symlink_to(outside)
    (home / "maps" / "folder").symlink_to(outside.parent)
    (home / "texts" / "gone").symlink_to(tmp_path / "nowhere")
    (results / ".checkpoints" / "dd").symlink_to(outside.parent)
    done = clean(*cache.KINDS, "--results", results, "--yes")
    assert done.exit_code == 0 and outside.exists()
    links = {
        home / "maps" / "link.ids",
        home / "maps" / "folder",
        home / "texts" / "gone",
        results / ".checkpoints" / "dd",
    }
    assert links <= everything(home, results)
    assert all(f"{link} is a link: left alone" in done.stdout for link in links)
    put(tmp_path / "elsewhere" / "one")
    (home / "wheels").symlink_to(tmp_path / "elsewhere")  # moved to another disk
    assert cache.remove(["wheels"]) == 0 and (tmp_path / "elsewhere" / "one").exists()


def test_a_run_under_way_keeps_its_checkpoint(home, results):
    before = everything(home, results)
    with Folder(results).locked("bb"):
        done = clean("checkpoints", "maps", "--results", results, "--yes")
        assert done.exit_code == 2 and "bb" in done.stderr and "Ctrl-C" in done.stderr
        assert everything(home, results) == before
    assert clean("checkpoints", "--results", results, "--yes").exit_code == 0
    assert everything(results).isdisjoint(path for path in before if ".checkpoints" in path.parts)


def test_no_run_begins_while_its_checkpoint_goes(results):
    entered = threading.Event()

    def begin():
        with Folder(results).locked("bb"):
            entered.set()

    with cache.held(results):
        thread = threading.Thread(target=begin)
        thread.start()
        assert not entered.wait(0.4)
    thread.join(10)
    assert entered.is_set()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads /proc")
def test_what_a_process_has_mapped_or_open_stays(home):
    before = everything(home)
    mapping = "import mmap, sys; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ); f.close()"
    opening = "import sys; f = open(sys.argv[1], 'rb')"
    for code, kind, path in (
        (mapping, "maps", home / "maps" / "a.ids"),
        (opening, "compiled", home / "compiled" / "2a" / "deep" / "kernel.so"),
    ):
        code += "; print('there', flush=True); sys.stdin.read()"
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen([sys.executable, "-c", code, path], **options) as process:
            assert process.stdout.readline() == "there\n"
            done = clean(kind, "--yes")
            process.stdin.close()
        assert done.exit_code == 2 and str(process.pid) in done.stderr and path.name in done.stderr
        assert everything(home) == before


def test_what_cannot_be_is_told_in_a_sentence(home, tmp_path):
    for words, named in (
        (["mapps"], "tokenizers"),
        (["checkpoints"], "--results"),
        (["--results", tmp_path / "nowhere"], "exist"),
    ):
        done = clean(*words)
        assert done.exit_code == 2 and named in done.stderr and "Traceback" not in done.output
    with pytest.raises(LabError):
        cache.remove(["runs"])


def test_an_empty_cache_is_no_trouble(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLM_HOME", str(tmp_path / "not yet"))
    assert clean().exit_code == 0 and clean(*cache.FOLDERS, "--yes").exit_code == 0
    assert not (tmp_path / "not yet").exists()
