"""The resolved arithmetic: complete, plain, and refused with words where the machine cannot do it."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch

from tinylm import backend, counts
from tinylm.config import ModelConfig, TrainConfig
from tinylm.errors import LabError
from tinylm.layers import Linear

findings = backend.findings  # tests otherwise take the plain path: see conftest


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_arithmetic_is_plain_values_and_names_all_that_decides_bits():
    arithmetic = backend.resolve(TrainConfig(precision="bf16", threads=3), ModelConfig())
    assert json.loads(json.dumps(arithmetic)) == arithmetic
    names = ["device", "precision", "compile", "query_blocks", "threads", "stacked", "machine"]
    assert list(arithmetic) == names
    assert (arithmetic["device"], arithmetic["precision"], arithmetic["threads"]) == ("cpu", "bf16", 3)
    assert arithmetic["compile"] is False and arithmetic["query_blocks"] == 1 and arithmetic["stacked"] is False
    assert arithmetic["machine"]["torch"] == torch.__version__
    assert set(arithmetic["machine"]) >= {"torch", "cpu", "platform"} and all(arithmetic["machine"].values())


def test_resolving_twice_gives_the_same_and_threads_default_to_the_machine():
    model = ModelConfig()
    assert backend.resolve(TrainConfig(), model) == backend.resolve(TrainConfig(), model)
    assert backend.resolve(TrainConfig(), model)["threads"] == os.cpu_count()
    assert backend.resolve(TrainConfig(device="cpu:0"), model) == backend.resolve(TrainConfig(device="cpu"), model)


@pytest.mark.parametrize("name", ["gpu", "meta", "", "cpu:x"])
def test_an_unknown_device_is_refused_with_the_known_ones(name):
    with pytest.raises(LabError, match=r"device must be cpu, cuda.*Received: device=.*Way out: use device='cpu'"):
        backend.resolve(TrainConfig(device=name), ModelConfig())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_device_that_is_absent_is_refused(name):
    with pytest.raises(LabError, match=rf"'{name}' needs such a device.*0 cuda devices.*use device='cpu'"):
        backend.resolve(TrainConfig(device=name), ModelConfig())


def test_compiling_needs_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(LabError, match=r"needs a C\+\+ compiler.*install one, or train with compile=False"):
        backend.resolve(TrainConfig(compile=True), ModelConfig())
    assert backend.resolve(TrainConfig(), ModelConfig())["compile"] is False
    compiler = tmp_path / "my-cxx"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", "my-cxx")
    assert backend.resolve(TrainConfig(compile=True), ModelConfig())["compile"] is True


def test_apply_sets_the_threads(threads):
    for count in (2, 1):
        backend.apply(backend.resolve(TrainConfig(threads=count), ModelConfig()))
        assert torch.get_num_threads() == count


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_products_go_down_to_the_precision_and_weights_stay(precision):
    arithmetic = {**backend.resolve(TrainConfig(precision=precision), ModelConfig())}
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    layer = Linear(64, 64)
    layer.product_dtype = backend.product_dtype(arithmetic)
    x = torch.randn(3, 64)
    with backend.autocast(arithmetic):
        y = layer(x)
    exact = x.double() @ layer.weight.double().mT
    error = float((y.detach() - exact.detach()).norm() / exact.detach().norm())
    assert layer.weight.dtype == torch.float32
    assert torch.finfo(dtype).eps / 10 < error < torch.finfo(dtype).eps or (precision == "fp32" and error < 1e-6)


def test_open_choices_follow_what_was_measured_where_a_run_is_long(monkeypatch):
    found = {"bf16": True, "compile": True, "query_blocks": 2}
    monkeypatch.setattr(backend, "findings", lambda: found)
    model = ModelConfig()
    long, short = TrainConfig(max_steps=10_000), TrainConfig(max_steps=10, warmup_steps=1)
    chosen = backend.resolve(long, model)
    assert (chosen["precision"], chosen["compile"], chosen["query_blocks"]) == ("bf16", True, 2)
    assert backend.words(chosen) == "compiled, bf16 products, 2-block attention"
    plain = backend.resolve(short, model)
    assert backend.words(plain) == backend.PLAIN_WORDS == "eager, fp32 products, torch's attention"
    assert backend.resolve(short.replace(compile=True), model) == chosen  # who asks for it gets it at any length
    monkeypatch.setattr(backend, "cpp_compiler", lambda: None)
    assert not backend.resolve(long, model)["compile"]
    asked = backend.resolve(long.replace(precision="fp32", compile=False), model)
    assert {**asked, "stacked": None} == {**plain, "stacked": None}


def test_only_small_steps_of_one_thread_are_stacked_and_shorter_runs_of_them_are_compiled(monkeypatch):
    monkeypatch.setattr(backend, "findings", lambda: {"bf16": False, "compile": True, "query_blocks": 1})
    model, train = ModelConfig(), TrainConfig(threads=1, batch_size=2, max_steps=100_000)
    assert backend.resolve(train, model, in_stacks=True)["stacked"]
    few = train.replace(max_steps=round(2e11 / (counts.train_flops(model, train) / train.max_steps)))
    assert backend.resolve(few, model, in_stacks=True)["compile"] and not backend.resolve(few, model)["compile"]
    tiny = train.replace(max_steps=10, warmup_steps=1)
    assert backend.resolve(tiny, model, in_stacks=True)["stacked"]
    assert not backend.resolve(tiny, model, in_stacks=True)["compile"]
    assert not backend.resolve(train, model)["stacked"]
    for other in (train.replace(threads=2), train.replace(batch_size=512), train.replace(precision="fp16")):
        assert not backend.resolve(other, model, in_stacks=True)["stacked"]
    assert not backend.resolve(train, model.replace(dropout=0.1), in_stacks=True)["stacked"]


def test_findings_are_measured_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("TINYLM_HOME", str(tmp_path))
    calls = []

    def measured(*args, **kwargs):
        calls.append(args)
        out = json.dumps({"bf16": False, "compile": True, "query_blocks": 1, "seconds_per_step": {}})
        return subprocess.CompletedProcess(args, 0, stdout=f"noise\n{out}\n", stderr="")

    monkeypatch.setattr(backend.subprocess, "run", measured)
    for _ in range(2):
        assert findings() == {"bf16": False, "compile": True, "query_blocks": 1}
    assert len(calls) == 1


def test_a_machine_that_cannot_be_measured_takes_the_plain_path(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TINYLM_HOME", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nNo such thing\n")
    monkeypatch.setattr(backend.subprocess, "run", lambda *args, **kwargs: failed)
    assert findings() == backend.PLAIN
    assert "No such thing" in capsys.readouterr().out


def test_a_plan_reckons_with_what_compiling_gained_in_the_probe(monkeypatch, tmp_path):
    monkeypatch.setenv("TINYLM_HOME", str(tmp_path))
    compiled = {"compile": True, "precision": "fp32", "query_blocks": 1}
    assert backend.gain(compiled) == 1.0  # nothing was measured
    took = {"eager": 0.06, "compiled": 0.04, "compiled, bf16, 2-block attention": 0.02}
    found = {"bf16": False, "compile": True, "query_blocks": 1, "seconds_per_step": took}
    done = subprocess.CompletedProcess([], 0, stdout=json.dumps(found), stderr="")
    monkeypatch.setattr(backend.subprocess, "run", lambda *args, **kwargs: done)
    findings()
    assert backend.gain(compiled) == pytest.approx(1.5)
    assert backend.gain({**compiled, "precision": "bf16", "query_blocks": 2}) == pytest.approx(3.0)
    assert backend.gain({**compiled, "query_blocks": 2}) == backend.gain({**compiled, "compile": False}) == 1.0
