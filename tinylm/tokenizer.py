"""Text to token ids and back without loss: SentencePiece (BPE, unigram, char) or plain bytes, and files as a stream.

SentencePiece: Kudo and Richardson 2018. BPE: Sennrich et al. 2016. Unigram: Kudo 2018. Nothing is normalised, and what
the vocabulary lacks is spelled in bytes, so that decode(encode(x)) == x for every string that UTF-8 can hold.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import sentencepiece
from tqdm import tqdm

from tinylm import files
from tinylm.config import TOKENIZERS
from tinylm.errors import ConfigError, DamagedFileError, LabError, TextError

SPECIAL_IDS = 257  # one for "unknown", which text never becomes, and one for each byte
SAMPLE_BYTES = 5_000_000
PIECE_BYTES = 1 << 20
MAP_REVISION = 1  # raise when the same text and tokenizer would give other ids

_MAGIC = b"tinylm tokenizer 1\n"
_SPACE = "\u2581"  # SentencePiece writes a space so; the character itself goes through its bytes
_RESERVED = (0x00, 0x09, 0x0D, 0x2581, 0x2585)  # the trainer drops lines with these; they are always spelled in bytes
_COVERAGE = 0.9995  # share of the sample's characters that get an id of their own under bpe and unigram


class Tokenizer:
    """A frozen vocabulary of ``vocab_size`` ids. Made by ``train``, ``load`` or ``from_bytes``; equal by content.

    kind: ``bpe``, ``unigram``, ``char`` or ``byte`` (id = byte value). The first three keep id 0 for "unknown" and
        1 to 256 for the bytes; ``char`` leaves the ids past its alphabet unused.
    sha256: hash of the kind, the size and every piece with its score, hence of all that decides an encoding.
    token_bytes: int64 (V,), raw bytes each id stands for, 0 for ids that text never becomes, so that
        ``token_bytes[ids].sum()`` is the size of the text in bytes.
    processor, model_proto: SentencePiece's own, and its file's content; None and empty for ``byte``.
    """

    def __init__(self, kind: str, vocab_size: int, model: bytes = b""):
        """``model`` is a serialised SentencePiece model, empty for ``byte``; anything else is a DamagedFileError."""
        self.kind, self.vocab_size, self.model_proto = kind, vocab_size, model
        self.processor = None
        if kind == "byte":
            self._bytes = [bytes([value]) for value in range(256)]
            self._pieces = [chr(value) if 32 < value < 127 else f"<0x{value:02X}>" for value in range(256)]
            scores = []
        else:
            try:
                sp = self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            except (RuntimeError, TypeError, ValueError) as error:
                raise DamagedFileError(
                    "A tokenizer must hold a SentencePiece model", str(error), "delete it; it is trained again"
                ) from error
            ids = range(sp.get_piece_size())
            self._pieces = [sp.id_to_piece(i) for i in ids]
            if _SPACE not in self._pieces:
                raise DamagedFileError("A tokenizer must have an id for the space", "a model without one", "delete it")
            scores = [sp.get_score(i) for i in ids]
            self._bytes = [self._raw(i) for i in ids]
            unused = range(len(ids), vocab_size)
            self._pieces += [f"<unused {i}>" for i in unused]
            self._bytes += [b""] * len(unused)
            self._space_ids = [sp.piece_to_id(f"<0x{value:02X}>") for value in _SPACE.encode()]
        if len(self._bytes) != vocab_size:
            raise DamagedFileError(
                "A tokenizer must have as many ids as it says",
                f"{len(self._bytes)} instead of {vocab_size}",
                "delete it",
            )
        self.token_bytes = np.array([len(raw) for raw in self._bytes], dtype=np.int64)
        self.sha256 = files.sha256_bytes(files.canonical_json([kind, vocab_size, self._pieces, scores]).encode())

    def _raw(self, token_id: int) -> bytes:
        sp = self.processor
        if sp.is_unknown(token_id) or sp.is_control(token_id):
            return b""
        piece = sp.id_to_piece(token_id)
        return bytes([int(piece[3:5], 16)]) if sp.is_byte(token_id) else piece.replace(_SPACE, " ").encode()

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Raises TextError for lone surrogates, which no UTF-8 can hold."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str, threads: int = 1) -> np.ndarray:
        """Like ``encode``, as an int32 array (T,), with so many threads; they do not change it."""
        try:
            raw = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TextError(
                "A text must consist of characters that UTF-8 can hold",
                f"a lone surrogate {text[error.start]!r} at character {error.start}",
                "read the text with errors='replace', or leave that character out",
            ) from error
        if self.kind == "byte":
            return np.frombuffer(raw, dtype=np.uint8).astype(np.int32)
        parts = []
        for number, part in enumerate(text.split(_SPACE)):
            if number:
                parts.append(np.array(self._space_ids, dtype=np.int32))
            if part:
                parts += self.processor.encode(_cut(part), return_type="numpy", num_threads=threads)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids. Bytes that are no UTF-8 (a sampled model may cut a character) show as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The raw bytes of some ids, for who decodes a stream token by token."""
        ids = [int(i) for i in ids]
        for i in ids:
            self._check(i)
        return b"".join(self._bytes[i] for i in ids)

    def pieces(self, token_id: int) -> str:
        """One id as a printable string: spaces as ``▁``, single bytes as ``<0x0A>``, the unseen as ``<U+200B>``."""
        self._check(token_id)
        return "".join(char if char.isprintable() else f"<U+{ord(char):04X}>" for char in self._pieces[token_id])

    def _check(self, token_id: int) -> None:
        if not 0 <= token_id < self.vocab_size:
            raise LabError(
                "A token id must lie in the vocabulary",
                f"id {token_id}, vocab_size {self.vocab_size}",
                "use the tokenizer that the ids were made with",
            )

    @classmethod
    def train(cls, source: str | os.PathLike | Iterable[str], kind: str, vocab_size: int) -> Tokenizer:
        """Learn a vocabulary from a UTF-8 file (5 MB of lines evenly spread over it) or from some strings; repeatable.

        Under bpe and unigram the rarest characters, the last 0.05 % of the text, get no id of their own, and neither do
        those past half of the room (or past 16): they are spelled in bytes. ``char`` gives one to as many as fit.
        Raises ConfigError for an unknown kind or impossible size, TextError where the text does not support so many.
        """
        check_size(kind, vocab_size)
        vocab_size = int(vocab_size)
        if kind == "byte":
            return cls("byte", 256)
        if isinstance(source, (str, os.PathLike)):
            source = sample_lines(source, [(0, scan(source).size)])
        lines = [line for text in source for line in text.split("\n")]
        if kind == "unigram":  # whose training takes twenty times as long
            lines = lines[:: max(1, sum(map(len, lines)) // 1_000_000)]
        model = _train_sentencepiece(lines, kind, vocab_size)
        if model is None:
            largest = vocab_size
            while model is None:  # a smaller size has a smaller alphabet, so the first answer need not hold
                largest = _attainable(lines, kind, largest)
                model = _train_sentencepiece(lines, kind, largest)
            raise TextError(
                "A vocabulary may not be larger than the text supports",
                f"vocab_size={vocab_size} for {kind} on this text",
                f"the largest vocab_size that works is {largest}; or give more text",
            )
        return cls(kind, vocab_size, model)

    def to_bytes(self) -> bytes:
        """The whole tokenizer, with a checksum; ``from_bytes`` gives it back."""
        head = {"kind": self.kind, "vocab_size": self.vocab_size, "model_sha256": files.sha256_bytes(self.model_proto)}
        return _MAGIC + files.canonical_json(_signed(head)).encode() + b"\n" + self.model_proto

    @classmethod
    def from_bytes(cls, data: bytes) -> Tokenizer:
        """The tokenizer that ``to_bytes`` wrote. Raises DamagedFileError for anything else."""
        data = bytes(data)
        try:
            if not data.startswith(_MAGIC):
                raise ValueError("it does not start as a tokenizer does")
            head, _, model = data[len(_MAGIC) :].partition(b"\n")
            head = json.loads(head)
            parts = {name: head[name] for name in ("kind", "vocab_size", "model_sha256")}
            # The first tokenizers that were written had no checksum over their first line.
            if files.sha256_bytes(model) != head["model_sha256"] or head not in (parts, _signed(parts)):
                raise ValueError("its checksum differs: it was truncated or altered")
            kind, vocab_size = head["kind"], head["vocab_size"]
            check_size(kind, vocab_size)
            # Only ``char`` has ids to spare, one for each character of Unicode at most.
            if vocab_size > max(len(model), SPECIAL_IDS + sys.maxunicode + 1):
                raise ValueError(f"{vocab_size} ids")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedFileError(
                "A tokenizer must be whole", f"{len(data)} bytes; {error}", "delete it; it is trained again when needed"
            ) from error
        return cls(kind, vocab_size, model)

    def save(self, path: str | os.PathLike) -> Path:
        return files.write_whole(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Tokenizer:
        try:
            return cls.from_bytes(Path(path).read_bytes())
        except OSError as error:
            raise LabError("A tokenizer must exist", f"{path}: {error.strerror}", "check the path") from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        return f"Tokenizer({self.kind}, vocab_size={self.vocab_size}, sha256={self.sha256[:12]})"

    def __reduce__(self):  # so that workers started afresh can be handed one
        return (Tokenizer.from_bytes, (self.to_bytes(),))


def check_size(kind: str, vocab_size: int) -> None:
    """Raise ConfigError for a kind of tokenizer that there is not, or a size that no text could give it."""
    if kind not in TOKENIZERS:
        raise ConfigError(f"A tokenizer must be one of {', '.join(TOKENIZERS)}", f"{kind!r}", "bpe is usual")
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, (int, np.integer)):
        raise ConfigError("vocab_size must be a whole number", f"{vocab_size!r}", "512 is a good start")
    if kind == "byte" and vocab_size != 256:
        raise ConfigError(
            "The byte tokenizer has one id for each byte", f"vocab_size={vocab_size}", "set vocab_size to 256"
        )
    if kind != "byte" and vocab_size <= SPECIAL_IDS:
        raise ConfigError(
            f"vocab_size must be above {SPECIAL_IDS} for {kind}: one id for each byte and one for 'unknown'",
            f"vocab_size={vocab_size}",
            "set vocab_size to 320 or more, or use the byte tokenizer with vocab_size 256",
        )


def _cut(text: str) -> list[str]:
    """Parts of some thousand characters: the time of an encoding grows faster than the length of what is encoded.

    They end after a newline, which no piece crosses, or else before a space, where a piece starts anyway; only after 64
    thousand characters without either is a text cut where it stands.
    """
    parts, start = [], 0
    while len(text) - start > 2000:
        stop = text.find("\n", start + 1000, start + 4000) + 1
        stop = stop or max(0, text.find(" ", start + 1000, start + 65536)) or start + 65536
        parts.append(text[start:stop])
        start = stop
    if start < len(text):
        parts.append(text[start:])
    return parts


def _train_sentencepiece(lines: list[str], kind: str, vocab_size: int, exact: bool = True) -> bytes | None:
    """A serialised model, or None where the lines cannot fill ``vocab_size`` (``exact=False``: as large as can be)."""
    counts = Counter()
    for line in lines:
        counts.update(line)
    for code in (*_RESERVED, 0x0A):
        counts.pop(chr(code), None)
    spaces = counts.pop(" ", 0)
    if not counts:
        raise TextError("A tokenizer must have some text to learn from", "no printable character", "give more text")
    room = vocab_size - SPECIAL_IDS
    most, enough = (room, 1.0) if kind == "char" else (max(room // 2, min(room, 16)), _COVERAGE)
    # A space always gets an id: without one SentencePiece would spell its own mark for it, and so lose the space.
    alphabet, seen, total = [" "], spaces, spaces + sum(counts.values())
    for char, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if len(alphabet) >= most or seen >= enough * total:
            break
        alphabet.append(char)
        seen += count
    # Whatever gets no id ends a line of the sample, so that the trainer never sees it.
    breaks = dict.fromkeys([ord(char) for char in counts.keys() - set(alphabet)] + list(_RESERVED), "\n")
    sample = itertools.chain(
        [" "],
        (
            part[start : start + 1000]
            for line in lines
            for part in line.translate(breaks).split("\n")
            for start in range(0, len(part), 1000)
        ),
    )
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sample,
            model_writer=out,
            model_type=kind,
            vocab_size=SPECIAL_IDS + len(alphabet) if kind == "char" else vocab_size,
            hard_vocab_limit=exact,
            character_coverage=1.0,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            seed_sentencepiece_size=100_000,
            num_threads=4,  # a fixed number: unigram adds up in an order that depends on it
            minloglevel=2,
        )
    except RuntimeError as error:
        if exact and re.search(r"(?i)vocabulary size|vocab_size", str(error)):
            return None
        raise TextError(
            "SentencePiece must be able to learn from the text", str(error), "give more text or another vocab_size"
        ) from error
    return out.getvalue()


def _attainable(lines: list[str], kind: str, vocab_size: int) -> int:
    model = _train_sentencepiece(lines, kind, vocab_size, exact=False)
    size = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    return size if size < vocab_size else vocab_size - 1


# ---------------------------------------------------------------------------------------------------------------- files


class TextCheck:
    """Looks at a text as it streams by: UTF-8 without NUL bytes, or a TextError with the place. Counts and hashes."""

    def __init__(self, name: str | os.PathLike):
        self.name, self.size, self.lines, self.crlf, self.bom = name, 0, 0, False, False
        self._hash, self._decoder = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
        self._head = self._last = b""

    def update(self, chunk: bytes) -> None:
        if not self._head:
            self._head = chunk[:4096]
            self.bom = chunk.startswith(codecs.BOM_UTF8)
        waiting = len(self._decoder.getstate()[0])
        try:
            self._decoder.decode(chunk)
        except UnicodeDecodeError as error:
            self._refuse(self.size - waiting + error.start, error.object[error.start])
        if (place := chunk.find(b"\0")) >= 0:
            self._refuse(self.size + place, 0)
        self.crlf = self.crlf or b"\r\n" in chunk or (self._last == b"\r" and chunk.startswith(b"\n"))
        self.lines += chunk.count(b"\n")
        self._hash.update(chunk)
        self.size += len(chunk)
        self._last = chunk[-1:] or self._last

    def finish(self) -> Scan:
        waiting = self._decoder.getstate()[0]
        if waiting:
            self._refuse(self.size - len(waiting), waiting[0])
        if self.size <= 3 * self.bom:
            raise TextError(
                "A text must not be empty", f"{self.name}: {self.size} bytes", "give a file with text in it"
            )
        lines = self.lines + (self._last != b"\n")
        return Scan(self._hash.hexdigest(), self.size, lines, self.crlf, self.bom)

    def _refuse(self, place: int, value: int) -> None:
        if self._head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            kind, fix = "UTF-16", "convert it: iconv -f UTF-16 -t UTF-8 old.txt > new.txt"
        elif self._head.startswith(b"\x1f\x8b"):
            kind, fix = "gzip", "give it a name that ends in .gz"
        elif self._head.startswith((b"%PDF", b"PK\x03\x04")) or b"\0" in self._head or value == 0:
            kind, fix = "binary", "give plain text: export it as .txt first, or take out its NUL bytes"
        else:
            kind = "no UTF-8"
            fix = "save it as UTF-8 in an editor, or convert it: iconv -f WINDOWS-1252 -t UTF-8 old.txt > new.txt"
        raise TextError(
            "A text must be plain text in UTF-8", f"{self.name}: {kind}, byte 0x{value:02x} at offset {place:,}", fix
        )


@dataclass(frozen=True)
class Scan:
    """What one look at a text file tells: hash, size in bytes, number of lines, CRLF line ends, a byte order mark."""

    sha256: str
    size: int
    lines: int
    crlf: bool
    bom: bool


def scan(path: str | os.PathLike) -> Scan:
    """Check a text file and hash it, in constant memory; remembered for as long as its size and time of change stay.

    Raises TextError for a file that is missing, a folder, unreadable, empty, binary or not UTF-8.
    """
    path = Path(path).absolute()
    try:
        status = path.stat()
        stamp = [str(path), status.st_size, status.st_mtime_ns]
        kept = (
            files.home() / "scans" / (files.sha256_bytes(str(path).encode("utf-8", "surrogateescape"))[:32] + ".json")
        )
        if (found := read_note(kept)) and found.get("stamp") == stamp:
            return Scan(**found["scan"])
        check = TextCheck(path)
        with open(path, "rb") as file:
            while chunk := file.read(PIECE_BYTES):
                check.update(chunk)
    except OSError as error:
        raise unreadable(path, error) from error
    result = check.finish()
    write_note(kept, {"stamp": stamp, "scan": asdict(result)})
    return result


def unreadable(path: str | os.PathLike, error: OSError | ValueError) -> TextError:
    """An operating system's complaint about a read, in words."""
    return TextError(
        "A text must be a file that can be read",
        f"{path}: {getattr(error, 'strerror', None) or error}",
        "check the path and its permissions",
    )


def _changed(path: str | os.PathLike) -> TextError:
    return TextError("A text must not change while it is read", path, "leave the file alone and start again")


def read_note(path: Path) -> dict | None:
    """A small file of the cache as ``write_note`` wrote it, or None where there is none or it is damaged (what it says is
    then found out again)."""
    try:
        signed = json.loads(path.read_bytes())
        value = {name: item for name, item in signed.items() if name != "checksum"}
        return value if signed == _signed(value) else None
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def write_note(path: Path, value: dict) -> None:
    files.write_whole(path, json.dumps(_signed(value)))


def _signed(value: dict) -> dict:
    return {**value, "checksum": files.sha256_bytes(files.canonical_json(value).encode("utf-8", "surrogatepass"))}


def sample_lines(path: str | os.PathLike, spans: Sequence[tuple[int, int]], limit: int = SAMPLE_BYTES) -> Iterator[str]:
    """Text to train a tokenizer on: all of the spans (start, stop in bytes) of a file, or about ``limit`` bytes of
    whole lines taken at even distances."""
    total = sum(stop - start for start, stop in spans)
    with open(path, "rb") as file:
        if total <= limit:
            for start, stop in spans:
                yield from read_pieces(file, start, stop)
            return
        width = 4096
        count = limit // width
        starts = np.cumsum([0] + [stop - start for start, stop in spans])
        for number in range(count):
            place = (2 * number + 1) * total // (2 * count)
            index = int(np.searchsorted(starts, place, side="right")) - 1
            start, stop = spans[index]
            file.seek(start + place - int(starts[index]))
            window = file.read(min(2 * width, stop - file.tell()))
            first = window.find(b"\n") + 1
            last = window.rfind(b"\n", first, first + width) + 1
            yield (window[first:last] if last else window[:width]).decode("utf-8", errors="ignore")


def read_pieces(file: BinaryIO, start: int, stop: int) -> Iterator[str]:
    """The text from byte ``start`` to ``stop`` in pieces of about 1 MB, cut after a newline; in a longer line before a
    space, and where there is none either, between two characters."""
    file.seek(start)
    left, rest = stop - start, b""
    while left > 0:
        chunk = file.read(min(PIECE_BYTES, left))
        if not chunk:
            raise _changed(file.name)
        left -= len(chunk)
        data = rest + chunk
        cut = len(data)
        if left:
            cut = data.rfind(b"\n") + 1 or max(0, data.rfind(b" "))
            if not cut:
                cut = len(data)
                while (
                    cut > len(data) - 4 and data[cut - 1] >= 0x80
                ):  # back to before a character that may be incomplete
                    cut -= 1
                    if data[cut] >= 0xC0:
                        break
        rest = data[cut:]
        try:
            text = data[:cut].decode("utf-8")
        except UnicodeDecodeError as error:
            raise _changed(file.name) from error
        yield text


def encode_file(
    path: str | os.PathLike, tokenizer: Tokenizer, out_dir: str | os.PathLike | None = None, progress: bool = True
) -> np.memmap:
    """A UTF-8 text file as a memory-mapped array of ids (T,), uint16, or uint32 for more than 65,536 ids.

    Encoded as a stream in constant memory, with a bar for the time left, once for each content and tokenizer: the map
    is kept in ``out_dir`` (the lab's cache by default) beside a small JSON with its hash, by which it is checked once a process.
    Raises TextError for a file that is no text, LabError for a full disk.
    """
    found = scan(path)
    return encode_spans(path, found.sha256, [(0, found.size)], tokenizer, out_dir, progress)


def encode_spans(
    path: str | os.PathLike,
    text_sha256: str,
    spans: Sequence[tuple[int, int]],
    tokenizer: Tokenizer,
    out_dir: str | os.PathLike | None = None,
    progress: bool = True,
    label: str = "",
    change: Callable[[Iterator[str]], Iterator[str]] | None = None,
    changed: str = "",
) -> np.memmap:
    """Like ``encode_file`` for some spans (start, stop in bytes, at character boundaries) of a text with that hash, one
    after the other. change: makes other text of its pieces as they stream by; its map is told from others by ``changed``."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65536 else "<u4")
    what = {
        "revision": MAP_REVISION,
        "text_sha256": text_sha256,
        "tokenizer_sha256": tokenizer.sha256,
        "spans": [list(span) for span in spans],
        **({"changed": changed} if change else {}),
    }
    folder = files.home() / "maps" if out_dir is None else Path(out_dir)
    target = folder / f"{files.sha256_bytes(files.canonical_json(what).encode())[:32]}.ids"
    sidecar = target.with_suffix(".json")
    for _ in range(2):
        kept = read_note(sidecar) or {}
        with contextlib.suppress(OSError):
            if kept.get("what") == what and kept.get("dtype") == dtype.str and _map_sha256(target) == kept["sha256"]:
                return np.memmap(target, dtype=dtype, mode="r")
        try:
            if files.sha256_file(path) != text_sha256:  # it was looked at before, and perhaps long ago
                raise _changed(path)
        except OSError as error:
            raise unreadable(path, error) from error
        sha256 = _write_map(path, spans, tokenizer, target, dtype, progress, label or Path(path).name, change)
        if not target.stat().st_size:
            raise TextError("A text must hold at least one token", f"{path}: none in {spans}", "give more text")
        write_note(sidecar, {"what": what, "dtype": dtype.str, "sha256": sha256})
    raise DamagedFileError("A map of ids must stay as it was written", f"{target} changed at once", "check the disk")


_hashed: dict[tuple, str] = {}  # maps that this process has read through, by where they are and when they were written


def _map_sha256(path: Path) -> str:
    """The hash of a map's content, taken once in a process."""
    status = path.stat()
    stamp = (str(path), status.st_ino, status.st_size, status.st_mtime_ns)
    if stamp not in _hashed:
        _hashed[stamp] = files.sha256_file(path)
    return _hashed[stamp]


def _write_map(path, spans, tokenizer, target, dtype, progress, label, change) -> str:
    """Write the ids of the spans to ``target``, whole or not at all, and return the hash of what was written.

    SentencePiece's own threads take a piece's parts in turn; the ids and their order stay, and no lock of Python's is held.
    On two processors that is 1.9 times as fast as one thread, and processes, even when they run already, 1.8 times; the
    rest, on one thread, is 4 % of the time. Two threads start in 20 microseconds, a sixth of the time of one part of a
    thousand bytes, so that small files need no other way.
    """
    threads = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    written = hashlib.sha256()
    bar = progress_bar(sum(stop - start for start, stop in spans), f"encoding {label}", progress)
    with bar, open(path, "rb") as source, files.writing_aside(target) as out:
        pieces = (piece for start, stop in spans for piece in read_pieces(source, start, stop))
        for text in change(pieces) if change else pieces:
            ids = tokenizer.encode_array(text, threads).astype(dtype)
            out.write(ids)
            written.update(ids)
            bar.update(len(text.encode("utf-8")))
    return written.hexdigest()


def progress_bar(total: int, label: str, show: bool = True) -> tqdm:
    """A bar over bytes with the time left, for what takes over a second; now and then a line outside a terminal."""
    every = 0.2 if sys.stderr is not None and sys.stderr.isatty() else 5
    return tqdm(total=total, desc=label, unit="B", unit_scale=True, delay=1, mininterval=every, disable=not show)
