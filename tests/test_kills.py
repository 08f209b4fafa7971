"""A study killed without warning, again and again: nothing finished is lost or trained twice, and the end is the same.

So do two studies at once in one folder. Compared to the last digit with a study that nobody killed: every table, every record
but its times, the best model and the forecast. Not compared, because the machine's measured speed or the clock is in them:
tables/plan.csv, speed.json, the figure ``surface`` (it shows the first plan), the README's paragraphs on the plan and on seconds,
and when the forecast was sealed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from tinylm.study import forecasts
from tinylm.study.runs import load_runs, read_record

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc"),
]

KILLS = 3
TIMES = ("started", "finished", "seconds", "tokens_per_second", "checksum")
OF_THIS_MACHINES_SPEED = {"plan.csv"}


def start(results: Path, said: Path) -> subprocess.Popen:
    """The study as a person starts it, in a session of its own."""
    with said.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "tinylm", "study", "--preset", "smoke", "--results-dir", str(results)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=said.parent,
            start_new_session=True,
        )


def family(pid: int) -> dict[int, int]:
    """A process and all that descend from it, each with its time of birth, which tells it from a later one of its number."""
    parents, births = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                parents[int(stat.parent.name)], births[int(stat.parent.name)] = int(fields[1]), int(fields[19])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {member: births[member] for member in found if member in births}


def alive(members: dict[int, int]) -> list[int]:
    living = []
    for pid, birth in members.items():
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if fields[0] != "Z" and int(fields[19]) == birth:
                living.append(pid)
    return living


def kill(study: subprocess.Popen, everything: bool) -> dict[int, int]:
    """SIGKILL to the study, alone or with all that it started (as when the power fails); returns who they were."""
    members = family(study.pid)
    for pid in [study.pid, *members] if everything else [study.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    study.wait()
    return members


def records(results: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (results / "runs").glob("*.json")}


def finish(results: Path, said: Path) -> str:
    begun = said.stat().st_size if said.exists() else 0
    study = start(results, said)
    try:
        assert study.wait(timeout=900) == 0, said.read_text()
    finally:
        if study.poll() is None:
            kill(study, everything=True)
    return said.read_text()[begun:]


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> Path:
    """The results of a study that nobody killed."""
    folder = tmp_path_factory.mktemp("calm")
    finish(folder / "results", folder / "said")
    return folder / "results"


def timeless(record: dict) -> dict:
    """What must not differ between a run and its repetition."""
    curve = [{**point, "seconds": None} for point in record["curve"]]
    without = (*TIMES, "trained_together")  # a killed sweep leaves other runs to share a stack
    return {**{name: value for name, value in record.items() if name not in without}, "curve": curve}


@pytest.mark.parametrize("everything", [True, False], ids=["with all its processes", "alone, its workers left behind"])
def test_a_study_killed_three_times_ends_as_if_it_never_was(everything, calm, tmp_path):
    results, said = tmp_path / "results", tmp_path / "said"
    seed = random.SystemRandom().randrange(10**6)  # another set of moments each time; printed where the test fails
    rng = random.Random(seed)
    total = len(records(calm))
    moments = sorted(rng.sample(range(total - 1), KILLS))  # records written by then
    print(f"kills after {moments} of {total} records and a moment more (seed {seed})")
    before: dict[str, bytes] = {}
    for moment in moments:
        study = start(results, said)
        until = time.monotonic() + 600
        while len(list((results / "runs").glob("*.json"))) < moment:
            assert study.poll() is None and time.monotonic() < until, said.read_text()
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1.5))
        members = kill(study, everything)
        deadline = time.monotonic() + 5
        while (left := alive(members)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, f"still there 5 s after the kill: {left}"
        now = records(results)
        assert {name: now.get(name) for name in before} == before  # none lost, none trained again
        for path in (results / "runs").glob("*.json"):
            read_record(path)  # and each of them whole
        before = now

    told = finish(results, said)
    after = records(results)
    assert {name: after.get(name) for name in before} == before
    trained = sum(int(number) for number in re.findall(r"sweep: (\d+) runs? trained", told))
    assert trained == len(after) - len(before)
    the_same(results, calm)
    assert not (results / ".checkpoints").exists()


def test_two_studies_at_once_in_one_folder_come_to_what_one_comes_to(calm, tmp_path):
    results, said = tmp_path / "results", [tmp_path / "one", tmp_path / "other"]
    studies, first = [start(results, out) for out in said], {}
    try:
        end = time.monotonic() + 600
        while any(study.poll() is None for study in studies):
            assert time.monotonic() < end, [out.read_text() for out in said]
            first = records(results) | first
            time.sleep(0.2)
    finally:
        for study in studies:
            if study.poll() is None:
                kill(study, everything=True)
    assert [study.returncode for study in studies] == [0, 0], [out.read_text() for out in said]
    now = records(results)
    assert first and {name: now[name] for name in first} == first  # none was trained again over the first's record
    assert all("sealed" in out.read_text() for out in said)  # both met the forecast
    the_same(results, calm)  # in which it stands once
    assert not (results / ".checkpoints").exists()
    doctor = subprocess.run([sys.executable, "-m", "tinylm", "doctor", str(results)], capture_output=True, text=True)
    told = [line for line in doctor.stdout.splitlines() if str(results) in line]
    assert doctor.returncode == 0 and told and all(line.startswith("ok ") for line in told), doctor.stdout


def the_same(results: Path, calm: Path) -> None:
    """Both studies came to the same, to the last digit."""
    assert {path.name for path in (results / "tables").iterdir()} == {path.name for path in (calm / "tables").iterdir()}
    for path in (calm / "tables").iterdir():
        if path.name not in OF_THIS_MACHINES_SPEED:
            assert (results / "tables" / path.name).read_bytes() == path.read_bytes(), path.name
    one, other = (pd.read_csv(folder / "tables" / "plan.csv") for folder in (results, calm))
    assert one.columns.tolist() == other.columns.tolist() and one.minutes.tolist() == other.minutes.tolist()

    assert set(records(results)) == set(records(calm))
    for name in records(calm):
        mine, theirs = (timeless(read_record(folder / "runs" / name)) for folder in (results, calm))
        assert mine == theirs, name
    # The join of records: load_runs is what every later study reads.
    frames = [load_runs(folder).drop(columns=list(set(TIMES) - {"checksum"})) for folder in (results, calm)]
    pd.testing.assert_frame_equal(*frames, check_exact=True)

    best = "models/best.safetensors"
    assert (results / best).read_bytes() == (calm / best).read_bytes()
    mine, theirs = (forecasts.load(folder / "forecasts").drop(columns="time") for folder in (results, calm))
    assert len(mine) == 1
    pd.testing.assert_frame_equal(mine, theirs, check_exact=True)
    seal = json.loads(next((results / "forecasts").glob("*.score.json")).read_text())
    assert seal["observed"] == theirs.observed[0]
    for path in (calm / "figures").iterdir():
        if path.stem != "surface":
            assert (results / "figures" / path.name).read_bytes() == path.read_bytes(), path.name
