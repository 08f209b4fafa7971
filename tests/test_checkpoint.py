"""Files that come back bit for bit, or are refused with words."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tinylm import files
from tinylm.checkpoint import load_model, load_state, save_model, save_state
from tinylm.config import ModelConfig
from tinylm.errors import ConfigError, DamagedFileError, LabError
from tinylm.model import TinyLM
from tinylm.tokenizer import Tokenizer

CONFIG = ModelConfig(vocab_size=256, hidden_size=8, num_layers=1, num_heads=2, max_seq_len=8)
TENSORS = {"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b": torch.tensor([1, 255], dtype=torch.uint8)}
META = {"model": {"hidden_size": 32, "norm": "rmsnorm"}, "step": 7, "curve": [{"loss": 0.1 + 0.2}]}


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"position": "learned", "norm": "layernorm"}])
def test_a_model_comes_back_whole(tmp_path, changes):
    model = TinyLM(CONFIG.replace(**changes), seed=3)
    tokenizer = Tokenizer.train(["some words"], "byte", 256)
    path = save_model(tmp_path / "new folder" / "m.safetensors", model, tokenizer, {"text": "ünïcode", "loss": 1.25})
    loaded, tokenizer_again, metadata = load_model(path)
    assert loaded.config == model.config and not loaded.training
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
    ids = torch.tensor([tokenizer_again.encode("abcdefg")])
    assert torch.equal(loaded(ids), model.eval()(ids))
    assert tokenizer_again == tokenizer and metadata == {"text": "ünïcode", "loss": 1.25}


def test_a_model_without_a_tokenizer_has_none_and_equal_models_give_equal_files(tmp_path):
    paths = [save_model(tmp_path / name, TinyLM(CONFIG, seed=1)) for name in "ab"]
    assert load_model(paths[0])[1:] == (None, {})
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].read_bytes() != save_model(tmp_path / "c", TinyLM(CONFIG, seed=2)).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def test_tied_weights_are_stored_once_and_other_tools_read_the_file(tmp_path):
    tied = save_model(tmp_path / "tied", TinyLM(CONFIG))
    untied = save_model(tmp_path / "untied", TinyLM(CONFIG.replace(tie_embeddings=False)))
    assert untied.stat().st_size - tied.stat().st_size >= 4 * 256 * 8
    with safe_open(tied, framework="pt") as file:
        names = set(file.keys())
        assert names == {name for name, _ in TinyLM(CONFIG).named_parameters()}
        assert json.loads(file.metadata()["meta"])["config"] == CONFIG.resolve().to_dict()


def test_a_model_in_half_precision_takes_half_the_room_and_loads_as_fp32(tmp_path):
    model = TinyLM(CONFIG.replace(vocab_size=4096))
    full, half = (save_model(tmp_path / str(t), model, dtype=t) for t in (torch.float32, torch.bfloat16))
    assert half.stat().st_size < 0.52 * full.stat().st_size
    loaded = load_model(half)[0]
    for name, parameter in model.named_parameters():
        again = loaded.get_parameter(name)
        assert again.dtype == torch.float32 and torch.equal(again, parameter.bfloat16().float())


def test_a_state_comes_back_bit_for_bit(tmp_path):
    odd = {"nan": torch.tensor([float("nan"), -0.0, 1e-45]), "half": torch.randn(3).bfloat16(), "none": torch.empty(0)}
    tensors, meta = load_state(save_state(tmp_path / "s", {**TENSORS, **odd}, META), expect={"step": 7})
    assert meta == META and set(tensors) == {*TENSORS, *odd}
    for name, tensor in {**TENSORS, **odd}.items():
        assert tensors[name].dtype == tensor.dtype and tensors[name].shape == tensor.shape
        assert torch.equal(tensors[name].view(torch.uint8), tensor.view(torch.uint8))  # NaN, -0 and denormals too


def test_a_state_of_another_config_is_refused_by_the_values_that_differ(tmp_path):
    path = save_state(tmp_path / "s", TENSORS, META)
    with pytest.raises(ConfigError) as caught:
        load_state(path, expect={"model": {"hidden_size": 64, "norm": "rmsnorm"}, "step": 7})
    assert "model.hidden_size is 32 in the file, 64 was asked for" in str(caught.value)
    assert "norm" not in str(caught.value) and str(path) in str(caught.value) and "Way out" in str(caught.value)
    with pytest.raises(ConfigError, match="seed is None in the file, 1 was asked for"):
        load_state(path, expect={"seed": 1})


def test_every_truncation_is_damage(tmp_path):
    path = save_state(tmp_path / "s", TENSORS, META)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedFileError, match="Way out"):
            load_state(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(DamagedFileError, match="truncated or altered"):
        load_state(path)


def test_a_flipped_bit_in_any_byte_is_damage_in_header_and_body(tmp_path):
    path = save_state(tmp_path / "s", TENSORS, META)
    whole = path.read_bytes()
    unnoticed = []
    for place in range(len(whole)):
        altered = bytearray(whole)
        altered[place] ^= 1 << place % 8
        path.write_bytes(altered)
        try:
            load_state(path)
            unnoticed.append(place)
        except DamagedFileError:
            pass
    assert unnoticed == []


@pytest.mark.parametrize(
    "data",
    [b"", b"short", b"a text that is no such file, but longer than eight bytes", b"\xff" * 64]
    + [struct.pack("<Q", len(head)) + head for head in (b"[]", b"{}", b'{"__metadata__":3}', b"NaN", b"\xff\xfe")],
)
def test_what_is_no_safetensors_file_of_ours_is_refused(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    for load in (load_model, load_state):
        with pytest.raises(DamagedFileError, match=r"Received: .*x, \d+ bytes"):
            load(tmp_path / "x")


def test_foreign_files_missing_files_and_mixed_up_kinds_are_refused(tmp_path):
    save_file(TENSORS, tmp_path / "foreign", metadata={"format": "pt"})
    with pytest.raises(DamagedFileError, match="that this lab wrote"):
        load_model(tmp_path / "foreign")
    with pytest.raises(LabError, match=r"must exist and be readable.*absent: No such file"):
        load_model(tmp_path / "absent")
    state, model = save_state(tmp_path / "s", TENSORS, META), save_model(tmp_path / "m", TinyLM(CONFIG))
    with pytest.raises(DamagedFileError, match=r"kind tinylm-model-1.*of the kind tinylm-state-1"):
        load_model(state)
    with pytest.raises(DamagedFileError, match=r"kind tinylm-state-1.*of the kind tinylm-model-1"):
        load_state(model)


def test_a_model_of_an_unknown_config_or_with_other_weights_is_refused(tmp_path, monkeypatch):
    model = TinyLM(CONFIG)
    honest = CONFIG.resolve()
    for config, error, words in [
        ({**honest.to_dict(), "experts": 8}, ConfigError, "no field of that name.*experts=8"),
        (honest.replace(vocab_size=512).to_dict(), DamagedFileError, r"embedding.weight is \(512, 8\) by the config"),
        (honest.replace(num_layers=2).to_dict(), DamagedFileError, r"blocks.1.* and absent in the file"),
    ]:
        model.config = type("Stub", (), {"to_dict": lambda self, config=config: config})()
        with pytest.raises(error, match=words):
            load_model(save_model(tmp_path / "m", model))


def test_a_write_that_fails_leaves_the_file_before_it(tmp_path, monkeypatch):
    path = save_state(tmp_path / "s", TENSORS, META)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(LabError, match="must have room"):
        save_state(path, {"a": torch.zeros(9)}, {})
    monkeypatch.undo()
    assert load_state(path)[1] == META and [p.name for p in tmp_path.iterdir()] == ["s"]
