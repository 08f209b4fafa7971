"""Files that are whole or not there at all, and where the lab keeps what it makes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tinylm.errors import LabError


def home() -> Path:
    """The lab's cache of texts, tokenizers and maps: ``$TINYLM_HOME``, or ``tinylm`` in the user's cache folder."""
    if named := os.environ.get("TINYLM_HOME"):
        return Path(named).expanduser().resolve()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "tinylm"


def write_whole(path: str | os.PathLike, data: bytes | str) -> Path:
    """Write a file so that readers see all of it or none: aside, fsync, rename. Makes the folder if there is none.

    Raises LabError where the disk is full or the folder cannot be written; what stood at ``path`` before stays as it was.
    """
    with writing_aside(path) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)
    return Path(path)


@contextlib.contextmanager
def writing_aside(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """``write_whole`` for a stream: a file to write to, which takes its name when all is written and goes away when
    something fails."""
    path, aside = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob(".*.????????.part"):  # what a killed process left behind, named as below
            with contextlib.suppress(OSError):
                if time.time() - old.stat().st_mtime > 86400:
                    old.unlink()
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
        sync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        if aside and os.path.exists(aside):
            os.unlink(aside)


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut (a no-op where folders cannot be opened)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def disk_error(error: OSError, path: str | os.PathLike) -> LabError:
    """An operating system's complaint about a write, as a message with a way out."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return LabError(
            "The disk must have room for what is written",
            f"no space left for {path}",
            "free some space and start again: finished runs are kept, and work goes on where it stopped",
        )
    return LabError(
        "The folder must exist and be writable",
        f"{path}: {error.strerror or error}",
        "choose another folder, or mend its permissions",
    )


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike) -> str:
    """Hash of a file's content, read in pieces: constant memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: object) -> str:
    """One text for one value: sorted keys, no spaces, no NaN. What identities are hashes of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
