"""What is well and what is not with an installation, this machine and a results folder, in plain words.

Each finding is ``ok``, ``look`` (it works, and there is something to know) or ``broken`` (something will not work), with the
way out. Nothing is changed by looking. A package that is missing or damaged is a finding, not an error, so this module
imports nothing that might be.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tinylm import cache, files
from tinylm.errors import LabError
from tinylm.study import runs

OK, LOOK, BROKEN = "ok", "look", "broken"
LOW_DISK, NO_DISK = 2e9, 1e8  # bytes free below which to look, and below which nothing is sure to be written


@dataclass(frozen=True)
class Finding:
    """state: ``ok``, ``look`` or ``broken``. about: what was looked at. words: what was found. fix: the way out."""

    state: str
    about: str
    words: str
    fix: str = ""

    def line(self) -> str:
        return f"{self.state:6s} {self.about}: {self.words}" + (f". Way out: {self.fix}" if self.fix else "")


def checkup(results_dir: str | os.PathLike | None = None) -> list[Finding]:
    """All findings about this installation and machine, and about a results folder (or a folder of them, or of sealed
    forecasts) where one is given."""
    found = [*_python(), *_packages(), *_torch(), *_compiler(), *_bf16(), *_threads()]
    found += _room("cache", files.home(), "set TINYLM_HOME to a folder that can be written to")
    if results_dir is not None:
        found += folder_findings(Path(results_dir).expanduser())
    return found


def to_json(findings: list[Finding]) -> str:
    """One JSON object: the worst state of all, and each finding."""
    states = {finding.state for finding in findings}
    worst = next((state for state in (BROKEN, LOOK) if state in states), OK)
    return json.dumps({"state": worst, "findings": [asdict(finding) for finding in findings]}, indent=2)


# -------------------------------------------------------------------------------------------------------- installation


def requirements() -> tuple[str, dict[str, list[str]]]:
    """The Python that is asked for, and the packages by extra ("" for what is always needed): of pyproject.toml where the
    package lies in its repository, else as they were when it was installed."""
    path = Path(__file__).resolve().parents[2] / "pyproject.toml"
    with contextlib.suppress(OSError, ValueError, KeyError):
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        if project["name"] == "tinylm":
            return project["requires-python"], {"": project["dependencies"], **project["optional-dependencies"]}
    about = importlib.metadata.metadata("tinylm")
    wanted: dict[str, list[str]] = {"": []}
    for line in about.get_all("Requires-Dist") or []:
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        wanted.setdefault(extra[1] if extra else "", []).append(line.partition(";")[0].strip())
    return about["Requires-Python"], wanted


def within(version: str, ranges: str) -> bool:
    """Whether a version lies in ranges such as ``>=2.9,<2.14``, by its numbers alone (2.13.0+cpu is 2.13.0)."""

    def numbers(text: str) -> tuple[int, ...]:
        found = tuple(map(int, re.findall(r"\d+", re.match(r"\s*[\d.]*", text)[0])))
        return found + (0,) * (6 - len(found))

    own = numbers(version)
    for sign, limit in re.findall(r"(>=|<=|==|!=|<|>)\s*([\d.]+)", ranges):
        other = numbers(limit)
        fits = {">=": own >= other, "<=": own <= other, "==": own == other, "!=": own != other, "<": own < other}
        if not fits.get(sign, own > other):
            return False
    return True


def _python() -> Iterator[Finding]:
    try:
        ranges, _ = requirements()
    except importlib.metadata.PackageNotFoundError:
        return
    good = within(platform.python_version(), ranges)
    words = f"{platform.python_version()} in {sys.prefix} (asked for: {ranges})"
    yield Finding(OK if good else BROKEN, "Python", words, "" if good else "make a new environment with a newer Python")


def _packages() -> Iterator[Finding]:
    try:
        _, wanted = requirements()
    except importlib.metadata.PackageNotFoundError:
        yield Finding(BROKEN, "packages", "tinylm itself is not installed", "pip install -e .")
        return
    fine, absent, seen = [], [], set()
    for extra, lines in wanted.items():
        for line in lines:
            name, ranges = re.match(r"\s*([\w.-]+)\s*(.*)", line).groups()
            if name in seen:
                continue
            seen.add(name)
            install = f"pip install '{name}{ranges}'"
            try:
                version = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                if extra:
                    absent.append(f"{name} ({extra})")
                else:
                    yield Finding(BROKEN, "packages", f"{name} is not installed", install)
                continue
            if within(version, ranges):
                fine.append(name)
            else:
                yield Finding(LOOK, "packages", f"{name} {version} was not tried (asked for: {ranges})", install)
    words = f"{len(fine)} as asked for" + (
        f"; not installed, and only some extras need them: {', '.join(absent)}" * bool(absent)
    )
    yield Finding(OK, "packages", words)


def _torch() -> Iterator[Finding]:
    try:
        import torch

        product = (torch.ones(2, 2) @ torch.ones(2, 2)).sum().item()
    except Exception as error:  # a broken build fails in many ways
        yield Finding(BROKEN, "torch", f"{type(error).__name__}: {error}", "install it again, as README says")
        return
    state = OK if product == 8 else BROKEN
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    where = f"GPUs: {', '.join(gpus)}" if gpus else "on the processor alone"
    yield Finding(state, "torch", f"{torch.__version__}, {where}", "" if state == OK else "install it again")
    if torch.version.cuda and not gpus:
        fix = "check its driver; without a GPU the CPU-only build of torch is far smaller"
        yield Finding(LOOK, "torch", f"built for CUDA {torch.version.cuda}, and no GPU is seen", fix)


def _compiler() -> Iterator[Finding]:
    """Presence, and whether it compiles what torch.compile writes: C++17 against Python's headers."""
    from tinylm.backend import cpp_compiler

    without = "runs are computed without torch.compile, to the same losses within rounding, and long ones more slowly"
    path = cpp_compiler()
    if path is None:
        fix = "install g++ or clang++ where long runs should be faster"
        yield Finding(LOOK, "compiler", f"none of $CXX, c++, g++, clang++, cl is found: {without}", fix)
        return
    if Path(path).stem.lower() == "cl":
        yield Finding(OK, "compiler", path)
        return
    source = "#include <Python.h>\n#include <vector>\nint main() { std::vector<float> x(1); return int(x[0]); }\n"
    command = [path, "-std=c++17", "-fsyntax-only", "-x", "c++", "-I", sysconfig.get_paths()["include"], "-"]
    try:
        done = subprocess.run(command, input=source, capture_output=True, text=True, timeout=60)
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        failed = done.returncode != 0
    except (OSError, subprocess.TimeoutExpired) as error:
        said, failed = str(error), True
    if failed:
        fix = "install Python's headers (python3-dev)" if "Python.h" in said else "mend the compiler, or unset CXX"
        yield Finding(LOOK, "compiler", f"{path} does not compile what torch.compile writes ({said}): {without}", fix)
    else:
        yield Finding(OK, "compiler", path)


def _bf16() -> Iterator[Finding]:
    from tinylm import backend

    try:
        kept = backend._kept_findings()
    except Exception:  # without a torch that works there is nothing to say
        return
    flags: set[str] = set()
    with contextlib.suppress(OSError):
        line = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        flags = {flag for flag in (line[1].split() if line else ()) if "bf16" in flag}
    words = (
        f"instructions {', '.join(sorted(flags))}" if flags else "no instructions of its own are seen on this processor"
    )
    try:
        picked = json.loads(kept.read_text(encoding="utf-8"))
        words += f"; measured here: {'bf16' if picked['bf16'] else 'fp32'} products, "
        words += ("compiled" if picked["compile"] else "eager") + " for long runs"
    except (OSError, ValueError, KeyError, TypeError):
        words += "; which products are faster here is measured, once, before the first long run"
    yield Finding(OK, "bf16", words)


def _threads() -> Iterator[Finding]:
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    words, fix = f"{usable} of {cores} processors may be used", ""
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max" and int(quota) < usable * int(period):
            words += f", and the container's quota is {int(quota) / int(period):.2g} of them"
            fix = "start sweeps with as many workers as the quota allows"
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) < usable:
            words += f", {name}={value}"
    yield Finding(LOOK if fix else OK, "threads", words, fix)


def _room(about: str, folder: Path, fix: str, needed: bool = True) -> Iterator[Finding]:
    """Disk space and write access where ``folder`` is or would be made. needed: without them something will not work."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    place = str(folder) if there == folder else f"{folder} (not made yet)"
    bad = BROKEN if needed else LOOK
    try:
        free = shutil.disk_usage(there).free
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"tinylm")
            file.flush()
            locks = _locks_hold(file)
    except OSError as error:
        yield Finding(bad, about, f"{place} cannot be written to ({error.strerror or error})", fix)
        return
    words = f"{place} can be written to, {free / 1e9:,.1f} GB are free"
    if free < NO_DISK:
        yield Finding(bad, about, words, "free some space (`tinylm clean` says what the cache holds)")
    elif free < LOW_DISK:
        yield Finding(LOOK, about, words, "`tinylm clean` says what the cache holds")
    else:
        yield Finding(OK, about, words)
    if not locks:
        words = f"the file system of {place} has no locks: two sweeps in one folder may train a run twice, to the same record"
        yield Finding(LOOK, about, words)


def _locks_hold(file: object) -> bool:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


# ------------------------------------------------------------------------------------------------------ results folder


def folder_findings(folder: Path) -> list[Finding]:
    """What is to be said of a results folder; of a folder that holds several, of each of them."""
    if not folder.is_dir():
        return [Finding(BROKEN, str(folder), "there is no such folder", "name one that a study or a sweep wrote to")]
    try:
        os.listdir(folder)
    except OSError as error:
        return [Finding(BROKEN, str(folder), f"cannot be read ({error.strerror})", "mend its permissions")]
    if not _is_results(folder):
        inside = [
            path for path in sorted(folder.iterdir()) if path.is_dir() and (_is_results(path) or any(_seals(path)))
        ]
        if inside:
            return [finding for path in inside for finding in folder_findings(path)]
        if not any(_seals(folder)):
            words = "holds no runs and no forecasts"
            return [Finding(LOOK, str(folder), words, "name one that a study or a sweep wrote to")]
        return list(_forecasts(folder))
    found = [
        *_records(folder),
        *_shared(folder),
        *_models(folder),
        *_unfinished(folder),
        *_forecasts(folder / "forecasts"),
    ]
    fix = "what it holds can be read; choose another results_dir to train"
    return [*found, *_room(str(folder), folder, fix, needed=False)]


def _is_results(folder: Path) -> bool:
    return (folder / "runs").is_dir() or (folder / ".checkpoints").is_dir()


def _seals(folder: Path) -> list[Path]:
    """Files of sealed forecasts and of their scores, by their names."""
    return sorted(path for path in folder.glob("*.json") if re.search(r"-[0-9a-f]{16}(\.score)?\.json$", path.name))


def _records(folder: Path) -> Iterator[Finding]:
    about, records = f"{folder}, records", []
    for path in sorted((folder / "runs").glob("*.json")):
        try:
            records.append(runs.read_record(path))
        except runs.OtherSchemaError as error:
            yield Finding(LOOK, about, f"{path.name} is of another schema ({error.got})", error.fix or "")
        except LabError as error:
            yield Finding(BROKEN, about, f"{path.name} is damaged ({error.got})", error.fix or "")
        except OSError as error:
            yield Finding(BROKEN, about, f"{path.name} cannot be read ({error.strerror})", "mend its permissions")
    states = Counter(str(record.get("status")) for record in records)
    words = ", ".join(f"{number} {status}" for status, number in sorted(states.items())) or "none"
    yield Finding(OK, about, f"{len(records)} readable" + (f" ({words})" if records else ""))
    failed = next((record for record in records if record.get("status") == "failed"), None)
    if failed:
        words = f"{states['failed']} failed, the first: {failed.get('reason')}"
        yield Finding(LOOK, about, words, "the next sweep that asks for them tries again")
    if told := runs.revisions_told(record.get("numerics_revision") for record in records):
        yield Finding(
            LOOK, about, told.rstrip("."), "train anew in another results_dir what is to be compared with new runs"
        )


def _shared(folder: Path) -> Iterator[Finding]:
    from tinylm import backend

    shared = None
    for kind in ("arithmetic", "corpora"):
        path = folder / f"{kind}.json"
        if not path.exists():
            yield Finding(OK, f"{folder}, {path.name}", "is not there; it is put together again from the records")
            continue
        try:
            content = runs._read_checked(path, kind, "delete the file: it is put together again from the records")
            shared = content if kind == "arithmetic" else shared
        except LabError as error:
            yield Finding(BROKEN, f"{folder}, {path.name}", f"cannot be used ({error.got})", error.fix or "")
    with contextlib.suppress(Exception):  # without a torch that works there is nothing to compare with
        here = backend.machine()
        differ = runs._differences(shared["machine"], here) if shared else []
        if differ:
            words = f"belongs to another machine ({'; '.join(differ)}): it can be read and drawn, and not trained further here"
            yield Finding(LOOK, str(folder), words, "choose another results_dir to train")


def _models(folder: Path) -> Iterator[Finding]:
    paths = sorted((folder / "models").glob("*.safetensors"))
    if not paths:
        return
    try:
        from tinylm.checkpoint import load_model
    except Exception:  # without a torch that works: said already
        return
    good = 0
    for path in paths:
        try:
            load_model(path)
            good += 1
        except LabError as error:
            fix = "remove it; a model is kept again by a run in a new folder, or restore it from a copy"
            yield Finding(BROKEN, f"{folder}, models", f"{path.name} cannot be loaded ({error.got})", fix)
    yield Finding(OK, f"{folder}, models", f"{good} of {len(paths)} load")


def _unfinished(folder: Path) -> Iterator[Finding]:
    held = cache.holdings(folder)
    busy = cache.locked_runs(folder)
    about = f"{folder}, checkpoints"
    clean = f"`tinylm clean {cache.CHECKPOINTS} --results {folder}` removes them"
    if busy:
        yield Finding(OK, about, f"{len(busy)} runs are being trained now: {', '.join(busy[:5])}")
    names = {path.name for path in (folder / ".checkpoints").glob("*") if path.is_dir()} - set(busy)
    ended = {name for name in names if _is_over(folder, name)}
    if begun := sorted(names - ended):
        words = f"{len(begun)} runs were cut off ({', '.join(begun[:5])}); asked for again, they go on from there"
        yield Finding(LOOK, about, words, f"start the study again, or {clean}")
        yield from _checkpoints(folder, begun)
    locks = {path.stem for path in (folder / ".checkpoints").glob("*.lock")} - {"folder", *busy, *begun}
    if (ended or locks) and not busy:
        words = f"{len(ended)} of finished runs and {len(locks)} locks that nobody holds are left; they do no harm"
        yield Finding(LOOK, about, words, clean)
    drafts = [path for path in held[cache.LEFTOVERS].paths if path.is_relative_to(folder)]
    if drafts:
        words = f"{len(drafts)} half-written files of killed processes; they do no harm"
        yield Finding(LOOK, str(folder), words, f"`tinylm clean {cache.LEFTOVERS} --results {folder}` removes them")


def _is_over(folder: Path, run_id: str) -> bool:
    """Whether a run is recorded and will not be tried again, as one that failed will."""
    try:
        return runs.Folder(folder).result(run_id) is not None
    except (LabError, KeyError):
        return False


def _checkpoints(folder: Path, names: list[str]) -> Iterator[Finding]:
    try:
        from tinylm.checkpoint import load_state
        from tinylm.train import CHECKPOINT_NAME
    except Exception:  # without a torch that works: said already
        return
    for name in names:
        path = folder / ".checkpoints" / name / CHECKPOINT_NAME
        try:
            if path.exists():
                load_state(path)
        except LabError as error:
            words = f"the one of {name} is damaged ({error.got}); its run starts anew, to the same numbers"
            yield Finding(LOOK, f"{folder}, checkpoints", words)


def _forecasts(folder: Path) -> Iterator[Finding]:
    about, seals = f"{folder}, forecasts", _seals(folder)
    if not seals:
        return
    try:
        from tinylm.study import forecasts
    except Exception as error:  # numpy, pandas or scipy is missing: said already
        yield Finding(LOOK, about, f"cannot be looked at here ({error})")
        return
    good = 0
    for path in seals:
        try:
            forecasts._read(path)
            good += 1
        except runs.OtherSchemaError as error:
            yield Finding(LOOK, about, f"{path.name} is of another schema ({error.got})", error.fix or "")
        except LabError as error:
            yield Finding(BROKEN, about, f"{path.name} is not as it was sealed ({error.got})", error.fix or "")
    if good < len(seals):
        return
    try:
        table = forecasts.load(folder)
        yield Finding(OK, about, f"{len(table)} sealed and intact, {int(table.scored.sum())} of them scored")
    except LabError as error:  # each is whole, and they do not belong together
        yield Finding(BROKEN, about, str(error.got), error.fix or "")
