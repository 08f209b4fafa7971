"""Bad days: damaged files, killed work, folders that cannot be written or go away, no room on disk or in memory, no GPU.

A few of the moments and damages that ``make soak`` tries by the hundred; that the soak would see a fault; and what it does not
try. Full disks at each single write of a file, wrong input and missing networks are in test_bad_input, NaN in weights and losses in
test_train and test_generate, two sweeps in one folder and workers that die in test_sweep.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from tinylm.cli import main
from tinylm.errors import LabError
from tinylm.study import reliability, runs
from tinylm.study.reliability import GOOD_ENDS, Specimen, tiny_run, write_text
from tinylm.study.runs import Folder, load_runs, read_record, train_run
from tinylm.study.sweep import WorkerPool, sweep

on_linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A cache of its own, and nothing prepared in this process."""
    monkeypatch.setenv("TINYLM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(runs, "_corpora", {})
    return tmp_path / "home"


@pytest.fixture
def text(tmp_path) -> Path:
    return write_text(tmp_path / "text.txt", 300)


def sentence(done, *words: str) -> None:
    """One line of rule, value and way out, and no traceback."""
    assert done.exit_code == 2, (done.output, done.exception)
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert all(word in line for word in ("Received: ", "Way out: ", *words)), line
    assert "Traceback" not in done.output


def train_words(text: Path, out: Path) -> list[str]:
    words = (
        "--tokenizer byte --vocab-size 256 --hidden-size 8 --num-layers 1 --num-heads 2 --max-seq-len 16 --threads 1"
    )
    words += " --batch-size 2 --max-steps 10 --warmup-steps 2 --eval-tokens 256 --no-compile --precision fp32"
    return ["train", "--text", str(text), "--out", str(out), *words.split()]


# --------------------------------------------------------------------------------------------------------------- damage


def test_damaged_files_are_refused_or_made_anew(tmp_path):
    found = reliability.damages(tmp_path, 63, seed=3)
    bad = found[~found.outcome.isin(GOOD_ENDS)]
    assert bad.empty, bad.to_string()
    assert found.kind.nunique() == 9 and (found.kind.value_counts() == 7).all()
    refused = found[found.outcome == "refused"]
    assert {"record", "model", "checkpoint", "sealed forecast"} <= set(refused.kind)
    assert refused.words.str.contains("Way out").all()
    assert {"token map", "tokenizer", "clean copy of a text", "note of the cache"} <= set(
        found.kind[found.outcome == "made anew"]
    )


@pytest.mark.parametrize("way", ["truncated", "a bit flipped", "overwritten", "zeros in it", "longer", "emptied"])
def test_every_way_to_damage_a_file_is_tried_and_none_leaves_it_as_it_was(way):
    rng = reliability.random.Random(way)
    tried = [reliability.damage(bytes(range(256)), rng) for _ in range(200)]
    mine = [data for name, data in tried if name == way]
    assert len(mine) > 10 and all(data != bytes(range(256)) for data in mine)


def test_a_reader_that_believes_breaks_or_hangs_is_told_from_one_that_refuses(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"good")
    monkeypatch.setattr(reliability, "PATIENCE", 1)

    def refuse():
        raise LabError("A file must be whole")

    def hang():
        while True:
            with contextlib.suppress(Exception):
                path.read_bytes()

    for read, end in (
        (path.read_bytes, "believed"),
        (lambda: b"good", "read as before"),
        (lambda: path.write_bytes(b"good") and b"good", "made anew"),
        (lambda: {}["absent"], "broke"),
        (refuse, "refused"),
        (hang, "hung"),
    ):
        assert reliability.outcome(Specimen("file", path, read), b"bad", b"good", untouched=True)[0] == end
        assert path.read_bytes() == b"good"


# ---------------------------------------------------------------------------------------------------------------- kills


def test_what_a_kill_must_not_leave_is_seen(text, home, tmp_path):
    calm, other = tmp_path / "calm", tmp_path / "other"
    record = train_run(tiny_run(text, 4), calm, keep_model=True)
    shutil.copytree(calm, other)
    name = f"{record['run_id']}.json"
    before = {name: (calm / "runs" / name).read_bytes()}
    assert reliability.wrong_on_disk(other, before) == [] == reliability.differs(other, calm)

    runs.write_record(other, {**record, "val_loss": record["val_loss"] + 1e-12})
    assert reliability.wrong_on_disk(other, before) == [f"{name} was written again"]
    assert reliability.differs(other, calm) == [f"{name}: another val_loss"]
    runs.write_record(other, {**record, "seconds": 99.0})  # how long it took may differ
    assert reliability.differs(other, calm) == []
    (other / "runs" / name).unlink()
    assert reliability.wrong_on_disk(other, before) == [f"{name} was lost"]
    assert reliability.differs(other, calm) == ["0 records instead of 1"]

    (model,) = (other / "models").iterdir()
    model.write_bytes(model.read_bytes()[:-1])
    torn = other / ".checkpoints" / "ab" / "checkpoint.safetensors"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"torn")
    told = reliability.wrong_on_disk(other, {})
    assert len(told) == 2 and "truncated or altered" in told[0] and "checkpoint.safetensors" in told[1]
    shutil.copytree(calm / "runs", other / "runs", dirs_exist_ok=True)
    assert reliability.differs(other, calm) == ["other models", "a checkpoint is left over"]


@on_linux
@pytest.mark.slow
def test_work_that_is_ended_at_random_moments_comes_to_the_same_end(tmp_path):
    found = reliability.kills(tmp_path, 6, seed=reliability.random.SystemRandom().randrange(10**6), each=3)
    print(found.to_string())
    assert len(found) == 6 and set(found.work) == {"sweep", "run"}
    assert (found.wrong == "").all()


def test_the_report_tells_what_was_found_and_what_was_not_survived(tmp_path):
    kills = pd.DataFrame({"number": [0, 1], "work": ["run", "run"], "way": ["SIGTERM", "SIGTERM"],
                          "seconds": [1.5, 2.5], "records": [0, 1], "wrong": ["", "a.json was lost"]})  # fmt: skip
    ends = ["refused", "made anew", "made anew", "believed"]
    damages = pd.DataFrame({"kind": "record", "file": "a", "way": "emptied", "outcome": ends, "words": ""})
    fuzz = pd.DataFrame([{"reader": "texts", "examples": 1200, "seconds": 9.0, "wrong": 0}])
    found = {"moments": kills, "damages": reliability.by_kind(damages), "fuzz": fuzz}
    for name, rows in found.items():
        reliability.keep(tmp_path, name, {name: rows}, 60.0, 7)
    told = reliability.draw(tmp_path).read_text()
    assert (
        "**1 of 2** random moments" in told
        and "**3 of 4** damaged files" in told
        and "1,200 readings of generated input" in told
    )
    assert "a.json was lost" in told and "| believed |" in told
    assert "nothing finished lost" not in told and "what was wrong after the others stands below" in told
    assert [reliability.SECTIONS[name].wrong(rows) for name, rows in found.items()] == [1, 1, 0]
    assert pd.read_csv(tmp_path / "tables" / "damages.csv").loc[0, "believed"] == 1
    reliability.keep(tmp_path, "damages", {"damages": reliability.by_kind(damages[:3])}, 60.0, 0)
    alone = reliability.draw(tmp_path).read_text()
    assert "none used with other numbers" in alone and "**1 of 2** random moments" in alone


def test_what_was_measured_on_another_day_stays_in_the_report(tmp_path):
    calm = pd.DataFrame([{"number": 0, "work": "run", "way": "SIGTERM", "seconds": 1.5, "records": 0, "wrong": ""}])
    reliability.keep(tmp_path, "kills", {"moments": calm}, 60.0, 3)
    before = reliability.draw(tmp_path).read_bytes()
    assert reliability.draw(tmp_path).read_bytes() == before and b"**1 of 1** random moments" in before
    assert b"nothing finished lost" in before and b"stands below" not in before
    fuzz = pd.DataFrame([{"reader": "texts", "examples": 5, "seconds": 9.0, "wrong": 0}])
    for seconds in (10.0, 20.0):
        reliability.keep(tmp_path, "fuzz", {"fuzz": fuzz}, seconds, 4)
    done = CliRunner().invoke(reliability.main, ["--only", "report", "--results-dir", str(tmp_path)])
    told = (tmp_path / "README.md").read_text()
    assert done.exit_code == 0 and "**1 of 1** random moments" in told and "5 readings of generated input" in told
    made = pd.read_csv(tmp_path / "tables" / "made.csv")
    assert made[["part", "seconds", "seed"]].values.tolist() == [["kills", 60.0, 3], ["fuzz", 20.0, 4]]


def test_a_part_that_is_not_there_is_told_before_any_work(tmp_path):
    for words in (["--only", "kills,fuz"], ["--only", "report"], ["--kills", "0", "--only", "kills"]):
        sentence(CliRunner().invoke(reliability.main, [*words, "--results-dir", str(tmp_path)]))
    assert not list(tmp_path.iterdir())


def test_a_check_that_fails_without_a_reader_at_fault_is_no_success(tmp_path, monkeypatch, capsys):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_fuzz.py").write_text(
        "import json, os\nfrom pathlib import Path\n"
        'rows = [{"reader": "texts", "examples": 3, "seconds": 1.0, "wrong": 0}]\n'
        'def test_log():\n    Path(os.environ["TINYLM_FUZZ_LOG"]).write_text(json.dumps(rows))\n'
        "def test_bomb():\n    assert not 'exploded'\n"
    )
    monkeypatch.setattr(reliability, "repository", lambda: tmp_path)
    found = reliability.fuzz(3, tmp_path)
    assert found["wrong"].tolist() == [0, 1] and "exploded" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------------- folders


@contextlib.contextmanager
def nobody():
    """As an ordinary person, whom permissions bind, where the tests run as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def permissions(folder: Path, mode: int) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(mode if path.is_dir() else mode & 0o666)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_read_only_folder_is_read_and_told_when_it_must_be_written(monkeypatch):
    scratch = Path(tempfile.mkdtemp())  # pytest's own folders are root's alone
    try:
        scratch.chmod(0o755)
        monkeypatch.setenv("TINYLM_HOME", str(scratch / "home"))
        text, out = write_text(scratch / "text.txt", 300), scratch / "out"
        assert CliRunner().invoke(main, train_words(text, out)).exit_code == 0
        (before,) = (out / "runs").iterdir()
        permissions(scratch, 0o555)
        with nobody():
            again = CliRunner().invoke(main, train_words(text, out))
            assert again.exit_code == 0 and before.stem in again.stdout  # a finished run is read, not written
            assert len(load_runs(out)) == 1
            done = CliRunner().invoke(main, [*train_words(text, out), "--seed", "1"])
            sentence(done, "folder must exist and be writable", str(out), "mend its permissions")
            monkeypatch.setattr(runs, "_corpora", {})
            monkeypatch.setenv("TINYLM_HOME", str(scratch / "home" / "other"))
            sentence(CliRunner().invoke(main, train_words(text, out)), "folder must exist and be writable", "home")
        permissions(out, 0o755)
        before.chmod(0o000)
        with nobody():
            sentence(CliRunner().invoke(main, train_words(text, out)), "must be one that can be read", before.name)
    finally:
        permissions(scratch, 0o755)
        shutil.rmtree(scratch)


def test_a_folder_that_vanishes_under_the_work_is_made_again(text, home, tmp_path, monkeypatch):
    run = tiny_run(text, 200)
    calm = train_run(run, tmp_path / "calm", keep_model=True)
    noted, gone = Folder.note_progress, []

    def vanish(self, run_id, step, seconds):
        if step >= 100 and not gone:
            gone.append(step)
            shutil.rmtree(self.path)
            shutil.rmtree(home)
        noted(self, run_id, step, seconds)

    monkeypatch.setattr(Folder, "note_progress", vanish)
    record = train_run(run, tmp_path / "out", keep_model=True)
    assert gone and reliability.timeless(record) == reliability.timeless(calm)
    assert reliability.differs(tmp_path / "out", tmp_path / "calm") == []
    assert read_record(tmp_path / "out" / "runs" / f"{record['run_id']}.json")["val_loss"] == calm["val_loss"]
    monkeypatch.undo()
    monkeypatch.setenv("TINYLM_HOME", str(home))
    assert train_run(run, tmp_path / "out")["finished"] == record["finished"]  # found, with all that runs share lost


@pytest.mark.skipif(os.name != "posix", reason="elsewhere the folder that one is in cannot be removed")
def test_the_folder_that_one_is_in_may_be_gone(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    for words in (["fit", "runs.csv"], train_words(Path("a.txt"), Path("out")), ["generate", "--model", "m"]):
        sentence(CliRunner().invoke(main, words))


# ------------------------------------------------------------------------------------------------------ disk and memory


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
@pytest.mark.parametrize("bytes_a_file", [500, 8000])
def test_no_file_may_grow_further_and_then_it_may(bytes_a_file, text, home, tmp_path):
    """The system's own limit, as of a quota: it strikes in the middle of a write, in whatever file is the first so large."""
    words = [sys.executable, "-m", "tinylm", *train_words(text, tmp_path / "out")]
    limit = (bytes_a_file, resource.RLIM_INFINITY)
    full = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, limit))  # fmt: skip
    assert full.returncode == 2 and "Traceback" not in full.stderr, full.stderr
    (line,) = (line for line in full.stderr.splitlines() if line.startswith("error: "))
    assert "disk must have room" in line and "free some space" in line
    assert not [path for place in (home, tmp_path / "out") for path in place.rglob("*.part")]
    again = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert again.returncode == 0, again.stderr
    words[words.index("--out") + 1] = str(tmp_path / "calm")
    calm = subprocess.run(words, capture_output=True, cwd=ROOT)
    assert calm.returncode == 0 and reliability.differs(tmp_path / "out", tmp_path / "calm") == []


# In a namespace of its own: a disk of so many bytes, a run on it, a disk with room, and the same run again.
ON_A_SMALL_DISK = """
size=$1 disk=$2 kept=$3; shift 3
mount -t tmpfs -o size="$size" none "$disk" || exit
export TINYLM_HOME="$disk/home"
"$@" --out "$disk/out" 2> "$kept/stderr"; echo $? > "$kept/first"
find "$disk" -name '*.part' > "$kept/left"
mount -o remount,size=64m "$disk" || exit
"$@" --out "$disk/out" && cp -r "$disk/out" "$kept/out"
"""


def on_a_small_disk(size: int, disk: Path, kept: Path, words: list[str]) -> subprocess.CompletedProcess:
    disk.mkdir(exist_ok=True)
    kept.mkdir()
    command = ["unshare", "-rm", "bash", "-c", ON_A_SMALL_DISK, "bash", str(size), disk, kept, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("unshare"), reason="mounts a small disk in a namespace of its own")
def test_a_disk_that_fills_up_loses_nothing_and_the_run_goes_on_when_it_has_room(text, home, tmp_path):
    on_a_small_disk(4096, tmp_path / "disk", tmp_path / "tried", ["false"])
    if not (tmp_path / "tried" / "first").exists():
        pytest.skip("this system lets nobody mount a small disk of their own")
    words = [sys.executable, "-m", "tinylm", *train_words(text, tmp_path / "calm")]
    assert subprocess.run(words, capture_output=True, cwd=ROOT).returncode == 0
    calm = [path for place in (home, tmp_path / "calm") for path in place.rglob("*") if path.is_file()]
    whole = sum(-(-path.stat().st_size // 4096) * 4096 for path in calm)
    where = words.index("--out")
    del words[where : where + 2]
    for share in (0.2, 0.6, 0.95):
        kept = tmp_path / f"{share:g}"
        again = on_a_small_disk(int(share * whole), tmp_path / "disk", kept, words)
        told = (kept / "stderr").read_text()
        assert (kept / "first").read_text() == "2\n" and "Traceback" not in told, told
        assert "disk must have room" in told and "free some space" in told
        assert not (kept / "left").read_text()
        assert again.returncode == 0, again.stderr
        assert reliability.differs(kept / "out", tmp_path / "calm") == []


def little_room(function, tasks):
    """A worker with room for what it holds already, and 300 MB."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 300_000_000, resource.RLIM_INFINITY))
    return function(tasks)


class NarrowPool(WorkerPool):
    """Its workers get little memory."""

    def submit(self, fn, /, *args, **kwargs):
        return super().submit(little_room, fn, *args, **kwargs) if args else super().submit(fn)


@on_linux
@pytest.mark.slow
def test_a_run_that_needs_more_memory_than_there_is_fails_with_its_reason_and_the_others_finish(text, home, tmp_path):
    small = [tiny_run(text, 20, seed=seed) for seed in range(3)]
    large = tiny_run(text, 20, hidden_size=4096, num_layers=4, num_heads=32)
    with NarrowPool(2) as pool:
        table = sweep([large, *small], tmp_path / "out", executor=pool, progress=False)
    assert table.status.tolist() == ["failed"] + ["finished"] * 3
    assert "memory" in table.reason[0].lower()
    assert sorted(load_runs(tmp_path / "out").status) == ["failed"] + ["finished"] * 3


def test_a_run_alone_that_needs_more_memory_than_there_is_is_told_in_one_line(text, home, tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("tinylm.train.TinyLM", full)
    sentence(
        CliRunner().invoke(main, train_words(text, tmp_path / "out")),
        "this run failed",
        "can't allocate memory",
        "a smaller model",
    )


# ----------------------------------------------------------------------------------------------------- devices and NaN


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_there_is_told_before_any_work(text, home, tmp_path):
    for device in ("cuda", "cuda:7"):
        done = CliRunner().invoke(main, [*train_words(text, tmp_path / "out"), "--device", device])
        sentence(done, f"device='{device}' needs such a device", "use device='cpu'")
    assert not list((tmp_path / "out").rglob("*.json")) and not list((tmp_path / "out").rglob("*.safetensors"))


def test_nan_in_the_weights_of_a_checkpoint_is_a_divergence_with_its_reason(text, home, tmp_path):
    from tinylm.checkpoint import load_state, save_state

    run = tiny_run(text, 8)
    corpus = runs.prepare_corpus(run)
    path = reliability._stopped(run, tmp_path / "checkpoint")
    tensors, meta = load_state(path)
    tensors = {name: value.clone() for name, value in tensors.items()}
    tensors["model.embedding.weight"][:] = float("nan")
    save_state(path, tensors, meta)
    from tinylm.train import Trainer

    result = Trainer(run.model, run.train, corpus.train, corpus.val, checkpoint_dir=path.parent).run()
    assert result.status == "diverged" and "nan" in result.reason and result.val_loss is None


def test_nan_in_a_table_is_named_by_its_line(tmp_path):
    rows = ["params_total,tokens_seen,val_loss", *(f"{10**n},{10 ** (n + 1)},{5 - n / 3}" for n in range(3, 9))]
    rows[3] = "100000,1000000,nan"
    (tmp_path / "runs.csv").write_text("\n".join(rows))
    sentence(CliRunner().invoke(main, ["fit", str(tmp_path / "runs.csv")]), "positive, finite numbers", "line 4", "nan")


def test_the_columns_of_the_lab_that_nobody_asked_for_do_not_disturb_a_fit(tmp_path):
    rows = ["params_total,tokens_seen,val_loss,flops,epochs,loss"]
    rows += [f"{n},{d},{1.5 + n**-0.3 + d**-0.3},,text,text" for n in (1e4, 1e5, 1e6) for d in (1e5, 1e6, 1e7)]
    (tmp_path / "runs.csv").write_text("\n".join(rows))
    done = CliRunner().invoke(main, ["fit", str(tmp_path / "runs.csv"), "--bootstrap", "0", "--json"])
    assert done.exit_code == 0, done.output
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert abs(json.loads(done.stdout)["params"]["E"] - 1.5) < 0.05
