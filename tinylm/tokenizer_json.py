"""tokenizer.json, the format of Hugging Face's tokenizers: ours written, those of Llama-family checkpoints read.

Ours are written with plain spaces where SentencePiece has its sign for one, so that the sign itself stays a character
and goes through its bytes. Read are BPE with byte fallback (Llama 1 and 2), BPE over bytes (Llama 3, SmolLM) and, from
``tokenizer.model``, whatever SentencePiece reads; a part that is not known here is refused, not guessed at.
"""

from __future__ import annotations

import functools
import heapq
import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from tinylm import files
from tinylm.errors import DamagedFileError, LabError, TextError
from tinylm.tokenizer import Tokenizer

JSON_BYTES = 100_000_000  # of a file that is read as JSON, at most; as safetensors limits its header
_SPACE = "\u2581"
_BYTE_NAME = "(?<=<)0(?=x[0-9A-F]{2}>)"  # where a text holds what looks like the name of a byte
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WHITE = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space


def to_json(tokenizer: Tokenizer) -> dict:
    """A tokenizer of ours as the content of a tokenizer.json. It encodes and decodes as ours does, but for two rare cases:
    of two ways to spell the same longer piece, or two of equal likelihood, it may take the other; and where a sampled
    model leaves bytes that are no UTF-8, it shows U+FFFD for every byte beside them too (not under ``byte``)."""
    if isinstance(tokenizer, ImportedTokenizer):
        raise tokenizer.refusal()
    pre_tokenizer = decoder = None
    processor = tokenizer.processor
    if processor is None:  # a vocabulary of single bytes
        vocab, merges, fallback = {char: value for value, char in _byte_chars().items()}, [], False
        pre_tokenizer = decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
        pre_tokenizer = {**pre_tokenizer, "use_regex": False}
        model = _bpe(vocab, merges, fallback)
    else:
        ids = range(processor.get_piece_size())
        named = ["" if processor.is_unknown(i) else processor.id_to_piece(i).replace(_SPACE, " ") for i in ids]
        scores = [processor.get_score(i) for i in ids]
        decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
        if tokenizer.kind == "unigram":
            # Its model would take the name of a byte in a text for the byte; cut behind the "<", the name is none.
            pre_tokenizer = {"type": "Split", "pattern": {"Regex": _BYTE_NAME}, "invert": False}
            pre_tokenizer["behavior"] = "MergedWithNext"
            model = {"type": "Unigram", "unk_id": 0, "byte_fallback": True}
            model["vocab"] = [[name, score] for name, score in zip(named, scores, strict=True)]
        else:
            text = {named[i]: scores[i] for i in ids if not processor.is_byte(i) and named[i]}
            model = _bpe({name: i for i, name in enumerate(named)}, _merges(text), True)
    return {
        **{"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None},
        **{"pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": decoder, "model": model},
    }


def _bpe(vocab: dict[str, int], merges: list, fallback: bool) -> dict:
    return {
        **{"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None},
        **{"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": fallback, "ignore_merges": False},
        **{"vocab": vocab, "merges": merges},
    }


def _merges(scores: dict[str, float]) -> list[list[str]]:
    """Pairs of pieces in the order in which SentencePiece joins them: it joins any two that make a piece, the piece of the
    highest score first."""
    ordered = {piece: place for place, piece in enumerate(sorted(scores, key=lambda piece: -scores[piece]))}
    return [
        [piece[:cut], piece[cut:]]
        for piece in ordered
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]


class ImportedTokenizer(Tokenizer):
    """The tokenizer of a checkpoint that was read: all that the sampler asks of one of ours. A text is encoded as the start
    of a document, with the ids that the checkpoint wants there; added tokens of a tokenizer.json that it names count as
    such. ``ends``: the ids after which the model has nothing to say."""

    def __init__(self, raw: list[bytes], vocab_size: int, encode: Callable[[str], list[int]], sha256: str):
        if len(raw) > vocab_size:
            raise LabError(
                "A tokenizer may not have more ids than its model",
                f"{len(raw)} ids, vocab_size={vocab_size}",
                "use the tokenizer that belongs to the checkpoint",
            )
        self.kind, self.vocab_size, self.processor, self._encode = "imported", vocab_size, None, encode
        self.sha256, self.ends = sha256, frozenset()
        self._bytes = raw + [b""] * (vocab_size - len(raw))
        self._pieces = [_printable(one) for one in self._bytes]
        self.token_bytes = np.array([len(one) for one in self._bytes], dtype=np.int64)

    def encode_array(self, text: str, threads: int = 1) -> np.ndarray:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TextError(
                "A text must consist of characters that UTF-8 can hold", f"a lone surrogate at {error.start}"
            ) from error
        return np.array(self._encode(text), dtype=np.int32)

    def to_bytes(self) -> bytes:
        raise self.refusal()

    def refusal(self) -> LabError:
        return LabError(
            "Only tokenizers trained here are written",
            "an imported one",
            "leave it in its folder, and read it from there",
        )


def _printable(raw: bytes) -> str:
    try:
        return raw.decode("utf-8").replace(" ", _SPACE)
    except UnicodeDecodeError:
        return "".join(f"<0x{value:02X}>" for value in raw)


def read_tokenizer(folder: Path, vocab_size: int) -> ImportedTokenizer:
    """The tokenizer in a checkpoint's folder: ``tokenizer.json`` where it holds a BPE, else ``tokenizer.model``. Raises
    LabError where neither is there, or holds what is not known here."""
    path, proto = folder / "tokenizer.json", folder / "tokenizer.model"
    told = read_object(path) if path.exists() else None
    kind = _get(told, "model", "type") or ("BPE" if _get(told, "model", "merges") else None)
    if kind != "BPE" and proto.exists():
        return _from_sentencepiece(folder, proto, vocab_size)
    if kind != "BPE":
        found = f"a {kind} in tokenizer.json" if told else "neither tokenizer.json nor tokenizer.model"
        raise LabError(
            "Reading needs a tokenizer: a BPE in tokenizer.json, or SentencePiece's tokenizer.model",
            f"{folder}: {found}",
            "put the tokenizer's files beside the weights",
        )
    try:
        raw, encode = _from_json(told)
    except LabError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise DamagedFileError(
            "A tokenizer.json must be as Hugging Face's tokenizers write it",
            f"{path}: {type(error).__name__}: {error}",
            "fetch or write it again",
        ) from error
    return ImportedTokenizer(raw, vocab_size, encode, files.sha256_file(path))


def read_object(path: Path) -> dict:
    """The JSON object in a file that others wrote. Raises DamagedFileError where there is none."""
    try:
        if path.stat().st_size > JSON_BYTES:
            raise ValueError(f"more than {JSON_BYTES:,} bytes")
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
    except OSError as error:
        raise LabError("The file must exist and be readable", f"{path}: {error.strerror}", "check the path") from error
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(
            "The file must hold a JSON object", f"{path}: {error}", "fetch or write it again"
        ) from error
    return value


def _get(value: object, *names: str) -> object:
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _from_sentencepiece(folder: Path, path: Path, vocab_size: int) -> ImportedTokenizer:
    about = folder / "tokenizer_config.json"
    wants_first = read_object(about).get("add_bos_token", True) if about.exists() else True
    try:
        data = path.read_bytes()
        trained = Tokenizer("imported", max(vocab_size, 1), data)
    except OSError as error:
        raise LabError("The file must be readable", f"{path}: {error.strerror}", "mend its permissions") from error
    processor = trained.processor
    first = [processor.bos_id()] if wants_first and processor.bos_id() >= 0 else []
    raw = [trained.decode_bytes([i]) for i in range(processor.get_piece_size())]
    keeps_spaces = "".join(processor.encode_as_pieces("  ")) == 2 * _SPACE  # and puts none before a text: one of ours
    encode = trained.encode if keeps_spaces else processor.encode
    return ImportedTokenizer(raw, vocab_size, lambda text: first + encode(text), files.sha256_bytes(data))


def _from_json(told: dict) -> tuple[list[bytes], Callable[[str], list[int]]]:
    """The bytes of each id, and the function from a text to its ids."""
    model = told["model"]
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise _unknown(f"a BPE with {name}")
    vocab: dict[str, int] = model["vocab"]
    added = {token["content"]: token["id"] for token in told.get("added_tokens") or []}
    if not all(isinstance(i, int) and 0 <= i < 1 << 24 for i in (*vocab.values(), *added.values())):
        raise ValueError("an id that is no small whole number")
    is_bytes, space = _decoding(told.get("decoder"))
    of_char = {char: value for value, char in _byte_chars().items()}
    raw = [b""] * (1 + max((*vocab.values(), *added.values())))
    for piece, i in vocab.items():
        if is_bytes:
            raw[i] = bytes(of_char[c] for c in piece) if all(c in of_char for c in piece) else piece.encode()
        elif model.get("byte_fallback") and re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece):
            raw[i] = bytes([int(piece[3:5], 16)])
        else:
            raw[i] = (piece.replace(space, " ") if space else piece).encode()
    for token in told.get("added_tokens") or []:
        raw[token["id"]] = b"" if token.get("special") else token["content"].encode()

    merges = {}
    for rank, pair in enumerate(model["merges"]):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        merges[vocab[left], vocab[right]] = rank, vocab[left + right]
    fallback = [vocab.get(f"<0x{value:02X}>") for value in range(256)] if model.get("byte_fallback") else None
    unknown = [vocab[model["unk_token"]]] if model.get("unk_token") in vocab else []

    @functools.lru_cache(4096)
    def ids_of(word: str) -> tuple[int, ...]:
        if model.get("ignore_merges") and word in vocab:
            return (vocab[word],)
        ids: list[int] = []
        for char in word:
            if char in vocab:
                ids.append(vocab[char])
            elif fallback and all(fallback[value] is not None for value in char.encode()):
                ids += [fallback[value] for value in char.encode()]
            else:
                ids += unknown
        return tuple(_merge(ids, merges))

    normalise = [_normaliser(step) for step in _flat(told.get("normalizer"), "normalizers")]
    cuts = [_cutter(step) for step in _flat(told.get("pre_tokenizer"), "pretokenizers")]
    first = _first_ids(told.get("post_processor"))

    def normal(text: str) -> str:
        for step in normalise:
            text = step(text)
        return text

    # Added tokens are looked for in the text as it is, or where they say so, both they and it normalised.
    told_added = told.get("added_tokens") or []
    plain = _added([(token["content"], token) for token in told_added if not token.get("normalized")])
    normalised = _added([(normal(token["content"]), token) for token in told_added if token.get("normalized")])

    def encode(text: str) -> list[int]:
        ids = list(first)
        for number, (part, found) in enumerate(plain(text)):
            if found is not None:
                ids.append(found)
                continue
            for place, (piece, found) in enumerate(normalised(normal(part))):
                if found is not None:
                    ids.append(found)
                    continue
                words = [piece] if piece else []
                for cut in cuts:
                    words = [inner for word in words for inner in cut(word, number == place == 0) if inner]
                for word in words:
                    ids += ids_of(word)
        return ids

    return raw, encode


def _added(tokens: list[tuple[str, dict]]) -> Callable[[str], list[tuple[str, int | None]]]:
    """What cuts a text at added tokens, each given with its spelling: texts with None, and in between the ids found. Of two
    that start together the longer is taken; some stand only as a word of their own, or take the white space beside them."""
    tokens = sorted(((text, token) for text, token in tokens if text), key=lambda pair: -len(pair[0]))
    spellings = []
    for text, token in tokens:
        spelling = rf"(?<!\w){re.escape(text)}(?!\w)" if token.get("single_word") else re.escape(text)
        before, after = (f"[{_WHITE}]*" if token.get(side) else "" for side in ("lstrip", "rstrip"))
        spellings.append(f"({before}{spelling}{after})")
    pattern = re.compile("|".join(spellings))

    def cut(text: str) -> list[tuple[str, int | None]]:
        parts, end = [], 0
        for match in pattern.finditer(text) if tokens else ():
            parts += [(text[end : match.start()], None), ("", tokens[match.lastindex - 1][1]["id"])]
            end = match.end()
        return [*parts, (text[end:], None)]

    return cut


def _merge(ids: list[int], merges: dict[tuple[int, int], tuple[int, int]]) -> list[int]:
    """Neighbours joined, the pair of lowest rank first and of equals the leftmost (Sennrich et al. 2016, algorithm 1).
    merges: (id, id) -> (rank, joined id). Time grows as n log n."""
    after, before = [*range(1, len(ids)), -1], list(range(-1, len(ids) - 1))
    heap: list[tuple[int, int, int]] = []

    def offer(at: int) -> None:
        if at >= 0 and after[at] >= 0 and (found := merges.get((ids[at], ids[after[at]]))):
            heapq.heappush(heap, (found[0], at, found[1]))

    for at in range(len(ids)):
        offer(at)
    while heap:
        rank, at, joined = heapq.heappop(heap)
        right = after[at]
        if ids[at] < 0 or right < 0 or merges.get((ids[at], ids[right])) != (rank, joined):
            continue  # one of the two has been joined to another since
        ids[at], ids[right], after[at] = joined, -1, after[right]
        if after[right] >= 0:
            before[after[right]] = at
        offer(before[at])
        offer(at)
    return [i for i in ids if i >= 0]


def _flat(step: dict | None, inner: str) -> Iterable[dict]:
    if step is None:
        return
    if step["type"] == "Sequence":
        for one in step[inner]:
            yield from _flat(one, inner)
    else:
        yield step


def _decoding(decoder: dict | None) -> tuple[bool, str]:
    """Whether pieces are written in characters that stand for bytes, and the character that stands for a space."""
    is_bytes, space = False, ""
    for step in _flat(decoder, "decoders"):
        kind = step["type"]
        if kind == "ByteLevel":
            is_bytes = True
        elif kind == "Metaspace":
            space = step["replacement"]
        elif kind == "Replace" and step["content"] == " ":
            space = step["pattern"]["String"]
        elif kind not in (
            "ByteFallback",
            "Fuse",
            "Strip",
        ):  # Strip takes the space before the first word: we go on from one
            raise _unknown(f"a decoder {kind}")
    return is_bytes, space


def _normaliser(step: dict) -> Callable[[str], str]:
    kind = step["type"]
    if kind == "Prepend":
        return lambda text: text and step["prepend"] + text
    if kind == "Replace":
        return functools.partial(_replaced, old=step["pattern"]["String"], new=step["content"])
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        return functools.partial(unicodedata.normalize, kind)
    raise _unknown(f"a normalizer {kind}")


def _replaced(text: str, old: str, new: str) -> str:
    return text.replace(old, new)


def _cutter(step: dict) -> Callable[[str, bool], list[str]]:
    """A pre-tokenizer: from a text, and whether it is the start of all, to its words."""
    kind = step["type"]
    if kind == "Split" and step["behavior"] == "Isolated":
        pattern = step["pattern"]
        found = re.compile(re.escape(pattern["String"])) if "String" in pattern else _pattern(pattern["Regex"])
        return lambda text, _: _isolated(found, text)
    if kind == "Digits":
        digits = _pattern(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
        return lambda text, _: _isolated(digits, text)
    if kind == "ByteLevel":
        words, chars = _pattern(_GPT2) if step.get("use_regex", True) else None, _byte_chars()

        def spell(text: str, _: bool) -> list[str]:
            text = " " + text if step["add_prefix_space"] and not text.startswith(" ") else text
            parts = _isolated(words, text) if words else [text]
            return ["".join(chars[value] for value in part.encode()) for part in parts]

        return spell
    if kind == "Metaspace":
        mark, scheme = step["replacement"], step.get("prepend_scheme", "always")

        def mark_spaces(text: str, is_first: bool) -> list[str]:
            text = text.replace(" ", mark)
            if (scheme == "always" or (scheme == "first" and is_first)) and not text.startswith(mark):
                text = mark + text
            return re.split(f"(?={re.escape(mark)})", text) if step.get("split", True) else [text]

        return mark_spaces
    raise _unknown(f"a pre-tokenizer {kind}")


def _first_ids(step: dict | None) -> list[int]:
    """The ids that stand before a text."""
    first: list[int] = []
    for one in _flat(step, "processors"):
        if one["type"] == "TemplateProcessing":
            for part in one["single"]:
                if "Sequence" in part:
                    break
                first += one["special_tokens"][part["SpecialToken"]["id"]]["ids"]
        elif one["type"] != "ByteLevel":
            raise _unknown(f"a post-processor {one['type']}")
    return first


def _isolated(pattern: re.Pattern, text: str) -> list[str]:
    """What the pattern finds, and what lies between."""
    parts, end = [], 0
    for match in pattern.finditer(text):
        parts += [text[end : match.start()], match[0]]
        end = match.end()
    return [*parts, text[end:]]


def _pattern(regex: str) -> re.Pattern:
    """A pattern of the tokenizers' engine for Python's: classes of Unicode are spelled out."""
    out, inside = [], False
    for token in re.findall(r"\\[pP]\{[^}]*\}|\\.|.", regex, re.DOTALL):
        if token in ("\\s", "\\S") or token[:2] in ("\\p", "\\P"):
            chars = _class(token[3:-1] if token[1] in "pP" else "", token[1].isupper())
            token = chars if inside else f"[{chars}]"
        elif token in "[]":
            inside = token == "["
        out.append(token)
    try:
        return re.compile("".join(out))
    except re.error as error:
        raise _unknown(f"the pattern {regex!r} ({error})") from error


@functools.cache
def _class(category: str, is_not: bool) -> str:
    """The characters of a general category, such as L or Lu (empty: white space), as the inside of a character class."""
    white = re.compile(f"[{_WHITE}]")
    if not re.fullmatch("[A-Z]?[a-z]?", category):
        raise _unknown(f"the class \\p{{{category}}}")
    ranges: list[list[int]] = []
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        if bool(white.match(char) if not category else unicodedata.category(char).startswith(category)) == is_not:
            continue
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in ranges)


@functools.cache
def _byte_chars() -> dict[int, str]:
    """The character by which each byte is written in a vocabulary over bytes (Radford et al. 2019)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [value for value in range(256) if value not in shown]
    return {**{value: chr(value) for value in shown}, **{value: chr(256 + n) for n, value in enumerate(hidden)}}


def _unknown(what: str) -> LabError:
    return LabError(
        "A tokenizer is read where all of its parts are known here",
        what,
        "use a checkpoint with a SentencePiece, Llama or GPT-2 tokenizer",
    )
