"""The resolved arithmetic: complete, plain, and refused with words where the machine cannot do it."""

from __future__ import annotations

import json
import os

import pytest
import torch

from tinylm import backend
from tinylm.config import TrainConfig
from tinylm.errors import LabError


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_arithmetic_is_plain_values_and_names_all_that_decides_bits():
    arithmetic = backend.resolve(TrainConfig(precision="bf16", threads=3))
    assert json.loads(json.dumps(arithmetic)) == arithmetic
    assert list(arithmetic) == ["device", "precision", "compile", "attention", "threads", "stack"]
    assert (arithmetic["device"], arithmetic["precision"], arithmetic["threads"]) == ("cpu", "bf16", 3)
    assert arithmetic["compile"] is False and arithmetic["attention"] == "sdpa"
    assert arithmetic["stack"]["torch"] == torch.__version__
    assert set(arithmetic["stack"]) >= {"torch", "cpu", "platform"} and all(arithmetic["stack"].values())


def test_resolving_twice_gives_the_same_and_threads_default_to_the_machine():
    assert backend.resolve(TrainConfig()) == backend.resolve(TrainConfig())
    assert backend.resolve(TrainConfig())["threads"] == os.cpu_count()
    assert backend.resolve(TrainConfig(device="cpu:0")) == backend.resolve(TrainConfig(device="cpu"))


@pytest.mark.parametrize("name", ["gpu", "meta", "", "cpu:x"])
def test_an_unknown_device_is_refused_with_the_known_ones(name):
    with pytest.raises(LabError, match=r"device must be cpu, cuda.*Received: device=.*Way out: use device='cpu'"):
        backend.resolve(TrainConfig(device=name))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_device_that_is_absent_is_refused(name):
    with pytest.raises(LabError, match=rf"'{name}' needs such a device.*0 cuda devices.*use device='cpu'"):
        backend.resolve(TrainConfig(device=name))


def test_compiling_needs_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(LabError, match=r"needs a C\+\+ compiler.*install one, or train with compile=False"):
        backend.resolve(TrainConfig(compile=True))
    assert backend.resolve(TrainConfig())["compile"] is False
    compiler = tmp_path / "my-cxx"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", "my-cxx")
    assert backend.resolve(TrainConfig(compile=True))["compile"] is True


def test_apply_sets_the_threads(threads):
    for count in (2, 1):
        backend.apply(backend.resolve(TrainConfig(threads=count)))
        assert torch.get_num_threads() == count


@pytest.mark.parametrize("precision", backend.DTYPES)
def test_autocast_lowers_products_and_leaves_weights(precision):
    layer = torch.nn.Linear(4, 4)
    with backend.autocast(torch.device("cpu"), precision):
        assert layer(torch.ones(2, 4)).dtype == backend.DTYPES[precision]
    assert layer.weight.dtype == torch.float32
