"""The tokenizer loses nothing, is the same whenever it is trained, and a file's map of ids is whole or made again."""

from __future__ import annotations

import codecs
import errno
import gzip
import os
import pickle
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm import tokenizer as module
from tinylm.errors import ConfigError, DamagedFileError, LabError, TextError
from tinylm.tokenizer import Tokenizer, encode_file, read_pieces, sample_lines, scan

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "then",
    "sleeps",
    "under",
    "one",
    "old",
    "tree",
    "while",
    "rain",
    "falls",
    "on",
    "the",
    "hills",
]
TEXT = "".join(
    " ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(4 + i % 5)).capitalize() + ".\n" for i in range(400)
)
SIZES = {"bpe": 400, "unigram": 320, "char": 512, "byte": 256}
AWKWARD = "\u2581\u2585\ufffd\ufeff\u2028⁇ \n\t\r\0ab<s>/unk0x41é😀"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def trained():
    return {kind: Tokenizer.train([TEXT], kind, size) for kind, size in SIZES.items()}


@pytest.fixture(params=list(SIZES))
def tokenizer(request, trained):
    return trained[request.param]


@settings(max_examples=150, deadline=None)
@given(text=st.text() | st.text(alphabet=AWKWARD))
def test_every_string_comes_back(trained, text):
    for tokenizer in trained.values():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())


@pytest.mark.parametrize(
    "text",
    [
        "  two leading, two trailing  ",
        "runs   of    spaces\t\tand tabs\r\n\r\n\nCRLF\rCR",
        "\0 NUL \0",
        "\u2581 is \u2581\u2581 SentencePiece's space \u2581",
        "<s> </s> <unk> <pad> <0x41> ⁇",
        "👩‍👩‍👧‍👦 中文 Ελληνικά e\u0301 é",
        "x" * 200_000,
        " " * 5000 + "\n" * 5000,
    ],
)
def test_awkward_strings_come_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=60, deadline=None)
@given(before=st.text(alphabet=AWKWARD), after=st.text(alphabet=AWKWARD))
def test_no_piece_crosses_a_newline(trained, before, after):
    for tokenizer in trained.values():
        assert tokenizer.encode(before + "\n" + after) == tokenizer.encode(before + "\n") + tokenizer.encode(after)


def test_vocabulary_has_the_size_asked_for(tokenizer):
    assert tokenizer.vocab_size == SIZES[tokenizer.kind] == len(tokenizer.token_bytes)
    assert tokenizer.token_bytes.dtype == np.int64
    assert max(tokenizer.encode(TEXT + AWKWARD)) < tokenizer.vocab_size


def test_subwords_shorten_and_char_gives_one_id_a_character(trained):
    lengths = {kind: len(tokenizer.encode(TEXT)) for kind, tokenizer in trained.items()}
    assert lengths["char"] == lengths["byte"] == len(TEXT)
    assert lengths["bpe"] < 0.5 * len(TEXT) and lengths["unigram"] < 0.8 * len(TEXT)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char"])
@pytest.mark.parametrize(
    "learned", ["abcd" * 50, "中文字" * 50, "ab ab ba " * 9, "\u2581a\u2581b" * 20, "\u2585ab\t" * 20]
)
def test_what_the_learned_text_lacked_comes_back(kind, learned):
    for size in (258, 259, 260):
        tokenizer = Tokenizer.train([learned], kind, size)
        text = learned + " spaces  and\u2581marks, ab cd " + AWKWARD
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.token_bytes[tokenizer.encode(text)].sum() == len(text.encode())


def test_rare_characters_are_spelled_in_bytes():
    text = "abcdefgh" * 5000 + "é"
    assert len(Tokenizer.train([text], "bpe", 280).encode("é")) == 2
    assert len(Tokenizer.train([text], "char", 512).encode("é")) == 1
    assert len(Tokenizer.train([text], "char", 257 + 9).encode("é")) == 2
    wide = "".join(chr(0x4E00 + i % 3000) for i in range(20_000))
    tokenizer = Tokenizer.train([wide], "bpe", 512)
    assert tokenizer.vocab_size == 512 and tokenizer.decode(tokenizer.encode(wide)) == wide


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_largest_vocabulary_named_is_the_largest_that_works(kind):
    with pytest.raises(TextError, match="vocab_size=5000") as caught:
        Tokenizer.train([TEXT], kind, 5000)
    largest = int(caught.value.fix.split("works is ")[1].split(";")[0])
    assert Tokenizer.train([TEXT], kind, largest).vocab_size == largest
    with pytest.raises(TextError):
        Tokenizer.train([TEXT], kind, largest + 1)


@pytest.mark.parametrize(
    ("kind", "size", "word"),
    [
        ("byte", 512, "256"),
        ("bpe", 257, "above 257"),
        ("char", 10, "above 257"),
        ("bpe", 400.5, "whole number"),
        ("bpe", "512", "whole number"),
        ("words", 512, "bpe, unigram, char, byte"),
    ],
)
def test_impossible_sizes_and_kinds_are_named(kind, size, word):
    with pytest.raises(ConfigError, match=word):
        Tokenizer.train([TEXT], kind, size)


@pytest.mark.parametrize("text", ["", "\n\n", "\t"])
def test_nothing_to_learn_from_is_an_error(text):
    with pytest.raises(TextError, match="learn from"):
        Tokenizer.train([text], "bpe", 300)


def test_training_repeats_itself_in_silence(trained, capfd):
    for kind, tokenizer in trained.items():
        assert Tokenizer.train([TEXT], kind, SIZES[kind]).sha256 == tokenizer.sha256
    assert len({tokenizer.sha256 for tokenizer in trained.values()}) == len(trained)
    assert Tokenizer.train([TEXT.upper()], "bpe", 400) != trained["bpe"]
    assert Tokenizer.train([TEXT], "bpe", 401) != trained["bpe"]
    assert capfd.readouterr() == ("", "")


def test_training_from_a_file_is_training_from_its_text(tmp_path, trained):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    assert Tokenizer.train(path, "bpe", 400) == trained["bpe"]


def test_bytes_file_and_pickle_give_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "one")
    for copy in (
        Tokenizer.from_bytes(tokenizer.to_bytes()),
        Tokenizer.load(tmp_path / "one"),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert copy == tokenizer and copy.kind == tokenizer.kind
        assert copy.encode(TEXT) == tokenizer.encode(TEXT)


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-1], lambda d: d[:30], lambda d: b"x" + d, lambda d: d[:-9] + b"x" * 9]
)
def test_a_damaged_tokenizer_is_refused(trained, damage):
    with pytest.raises(DamagedFileError):
        Tokenizer.from_bytes(damage(trained["bpe"].to_bytes()))


def test_pieces_are_printable_and_ids_are_checked(tokenizer):
    assert all(tokenizer.pieces(i).isprintable() and tokenizer.pieces(i) for i in range(tokenizer.vocab_size))
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(LabError, match=str(tokenizer.vocab_size)):
            tokenizer.decode([wrong])
        with pytest.raises(LabError):
            tokenizer.pieces(wrong)


def test_cut_characters_and_lone_surrogates(tokenizer):
    ids = tokenizer.encode("😀")
    assert tokenizer.decode(ids[:-1]) == "\ufffd"
    assert tokenizer.decode_bytes(ids[:2]) + tokenizer.decode_bytes(ids[2:]) == "😀".encode()
    with pytest.raises(TextError, match="surrogate"):
        tokenizer.encode("a\ud800b")


# ---------------------------------------------------------------------------------------------------------------- files


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_file_becomes_the_ids_of_its_text(tokenizer, tmp_path):
    text = TEXT + AWKWARD.replace("\0", "")
    ids = encode_file(write(tmp_path / "a.txt", text), tokenizer, progress=False)
    assert isinstance(ids, np.memmap) and ids.dtype == np.uint16
    assert ids.tolist() == tokenizer.encode(text)


@pytest.mark.parametrize("size", [7, 64, 1000])
def test_pieces_change_nothing_where_there_are_newlines(tokenizer, tmp_path, monkeypatch, size):
    monkeypatch.setattr(module, "PIECE_BYTES", max(size, 80))  # no line is longer
    ids = encode_file(write(tmp_path / "a.txt", TEXT), tokenizer, tmp_path / str(size), progress=False)
    assert ids.tolist() == tokenizer.encode(TEXT)


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="aé中😀 \u2581", min_size=1), size=st.integers(4, 12))
def test_pieces_lose_nothing_where_there_are_none(tmp_path_factory, text, size):
    path = write(tmp_path_factory.mktemp("long") / "a.txt", text)
    with pytest.MonkeyPatch.context() as patch, open(path, "rb") as file:
        patch.setattr(module, "PIECE_BYTES", size)
        pieces = list(read_pieces(file, 0, path.stat().st_size))
    assert "".join(pieces) == text
    assert max(len(piece.encode()) for piece in pieces) <= 2 * size


def on_processors(monkeypatch, number):
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda pid: set(range(number)), raising=False)


def test_any_number_of_processors_gives_the_same_map(tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", TEXT * 20 + AWKWARD.replace("\0", "") + "x" * 200_000 + " y" * 50_000 + TEXT)
    monkeypatch.setattr(module, "PIECE_BYTES", 100_000)
    maps = {}
    for number in (1, 2, 3, 64):
        with monkeypatch.context() as patch:
            on_processors(patch, number)
            encode_file(path, tokenizer, tmp_path / str(number), progress=False)
        (made,) = (tmp_path / str(number)).glob("*.ids")
        maps[number] = made.read_bytes()
    assert maps[1] == maps[2] == maps[3] == maps[64]
    assert tokenizer.decode_bytes(np.frombuffer(maps[1], dtype="<u2")) == path.read_bytes()


def test_all_processors_are_put_to_work(trained, tmp_path, monkeypatch):
    asked = []
    encode = Tokenizer.encode_array
    monkeypatch.setattr(
        Tokenizer, "encode_array", lambda self, text, threads=1: asked.append(threads) or encode(self, text, threads)
    )
    on_processors(monkeypatch, 3)
    encode_file(write(tmp_path / "a.txt", TEXT), trained["bpe"], progress=False)
    assert asked == [3]


def test_progress_reaches_the_size_of_the_file_and_tells_the_time_left(trained, tmp_path, monkeypatch):
    text = TEXT + AWKWARD.replace("\0", "") + TEXT
    path, bars = write(tmp_path / "a.txt", text), []
    made = module.progress_bar
    monkeypatch.setattr(module, "PIECE_BYTES", 5000)
    monkeypatch.setattr(module, "progress_bar", lambda *given: bars.append(made(*given)) or bars[0])
    encode_file(path, trained["bpe"])
    assert bars[0].n == bars[0].total == path.stat().st_size
    bar = made(1_000_000, "encoding a")
    bar.start_t -= 10
    bar.update(250_000)
    assert "25%" in str(bar) and "00:10<00:3" in str(bar)


@pytest.mark.parametrize("change", [lambda data: data[:-2000], lambda data: data[:3000] + b"\xff" + data[3001:]])
def test_a_file_that_changes_under_the_hand_is_named(trained, tmp_path, change):
    path, out = write(tmp_path / "a.txt", TEXT), tmp_path / "maps"
    found = scan(path)
    write(path, change(path.read_bytes()))
    with pytest.raises(TextError, match=r"must not change.*a\.txt"):
        module.encode_spans(path, found.sha256, [(0, found.size)], trained["bpe"], out, progress=False)
    assert not list(out.glob("*"))


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_an_interrupt_ends_it_at_once_and_leaves_nothing_half_made(trained, tmp_path):
    path, out = write(tmp_path / "a.txt", TEXT * (100_000_000 // len(TEXT))), tmp_path / "maps"
    trained["bpe"].save(tmp_path / "tokenizer")
    code = (
        "import sys; from tinylm.tokenizer import *; encode_file(sys.argv[1], Tokenizer.load(sys.argv[2]), sys.argv[3])"
    )
    words = [sys.executable, "-c", code, path, tmp_path / "tokenizer", out]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            until = time.monotonic() + 60
            while not any(part.stat().st_size for part in out.glob(".*.part")):
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            said = process.communicate(timeout=30)[1]
        finally:
            process.kill()
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in said
    assert list(out.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nobody of its group is left


def test_large_vocabularies_take_four_bytes(trained, tmp_path):
    tokenizer = Tokenizer.train([TEXT], "char", 70_000)
    ids = encode_file(write(tmp_path / "a.txt", TEXT), tokenizer, progress=False)
    assert ids.dtype == np.uint32 and tokenizer.decode(ids) == TEXT


def test_a_map_is_made_once_and_a_truncated_one_again(trained, tmp_path):
    path, out = write(tmp_path / "a.txt", TEXT), tmp_path / "maps"

    def encode(kind="bpe"):
        ids = encode_file(path, trained[kind], out, progress=False)
        assert ids.tolist() == trained[kind].encode(path.read_text())
        return sorted(out.glob("*.ids"))

    (first,) = encode()
    made = first.stat().st_mtime_ns
    assert encode() == [first] and first.stat().st_mtime_ns == made

    with open(first, "r+b") as file:
        file.truncate(100)
    assert encode() == [first] and first.stat().st_size > 100
    first.with_suffix(".json").write_text("{")
    assert encode() == [first]

    assert len(encode("char")) == 2
    write(path, TEXT + "More.\n")
    assert len(encode()) == 3
    assert not list(out.glob(".*"))


def test_a_full_disk_leaves_nothing_half_made(trained, tmp_path, monkeypatch):
    path, out = write(tmp_path / "a.txt", TEXT), tmp_path / "maps"
    scan(path)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(LabError, match="disk"):
        encode_file(path, trained["bpe"], out, progress=False)
    assert list(out.iterdir()) == []


def test_memory_of_python_does_not_grow_with_the_file(trained, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.encode() * (32_000_000 // len(TEXT)))
    size = path.stat().st_size
    tracemalloc.start()
    ids = encode_file(path, trained["byte"], progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(ids) == size > 30_000_000
    assert peak < 24_000_000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak in kB")
def test_memory_of_the_whole_process_does_not_grow_with_the_file(trained, tmp_path):
    trained["bpe"].save(tmp_path / "tokenizer")
    code = """if True:
        import resource, sys
        from tinylm.tokenizer import *
        for path in sys.argv[2:]:
            encode_file(path, Tokenizer.load(sys.argv[1]), progress=False)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
    paths = [write(tmp_path / f"{size}.txt", TEXT * (size // len(TEXT))) for size in (2_000_000, 2_100_000, 10_000_000)]
    words = [sys.executable, "-c", code, tmp_path / "tokenizer", *paths]
    calm = {**os.environ, "MALLOC_ARENA_MAX": "1"}  # one heap for all threads: its size depends on no chance
    peaks = [int(line) for line in subprocess.run(words, capture_output=True, check=True, env=calm).stdout.split()]
    assert peaks[2] - peaks[1] < 4000


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["empty", "0 bytes"]),
        (codecs.BOM_UTF8, ["empty"]),
        (b"plain\0text", ["binary", "offset 5"]),
        ("caf\u00e9 noir".encode("latin-1"), ["UTF-8", "0xe9", "offset 3", "iconv"]),
        ("some words".encode("utf-16"), ["UTF-16", "iconv -f UTF-16"]),
        (gzip.compress(b"some words", mtime=0), ["gzip", ".gz"]),
        (b"\x89PNG\r\n\x1a\n\0\0\0", ["binary", "offset 0"]),
        ("cut short: 😀".encode()[:-1], ["offset 11"]),
        (b"x" * (module.PIECE_BYTES - 1) + "é".encode() + b"\xff", ["0xff", f"offset {module.PIECE_BYTES + 1:,}"]),
    ],
)
def test_a_file_that_is_no_text_is_named_with_the_way_out(trained, tmp_path, content, words):
    path = write(tmp_path / "bad.txt", content)
    with pytest.raises(TextError) as caught:
        encode_file(path, trained["bpe"])
    assert all(word in str(caught.value) for word in [*words, "bad.txt", "Way out"])


def test_a_missing_file_and_a_folder_are_named(trained, tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(TextError, match=path.name):
            encode_file(path, trained["bpe"])


def test_a_look_at_a_file_is_remembered_until_it_changes(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "one\ntwo\r\nthree")
    first = scan(path)
    assert (first.size, first.lines, first.crlf, first.bom) == (14, 3, True, False)
    with monkeypatch.context() as patch:
        patch.setattr(module.TextCheck, "update", lambda *_: pytest.fail("read again"))
        assert scan(path) == first
    write(path, "one\ntwo\n")
    assert scan(path).sha256 != first.sha256 and scan(path).lines == 2


def test_a_sample_is_lines_from_everywhere_in_the_spans(tmp_path):
    lines = [f"{number:06d} a line of some length to fill the file with" for number in range(40_000)]
    path = write(tmp_path / "a.txt", "\n".join(lines) + "\n")
    size = path.stat().st_size
    spans = [(0, size // 2), (3 * size // 4, size)]
    sample = "".join(sample_lines(path, spans, limit=200_000))
    assert sample == "".join(sample_lines(path, spans, limit=200_000))
    taken = [int(line[:6]) for line in sample.splitlines()]
    assert 100_000 < len(sample) < 300_000
    assert all(lines[number] == line for number, line in zip(taken, sample.splitlines(), strict=True))
    assert min(taken) < 1500 and max(taken) > 38_500
    assert not any(20_000 < number < 29_999 for number in taken)
