"""Measures on this machine what the fast path should be: ``python -m tinylm.probe`` prints it as JSON.

A small model trains a few steps on one thread in each way there is, in turns; the fastest wins by medians. A way must win
by a margin: between equals the plainer one is taken.
"""

from __future__ import annotations

import json
import statistics
import time

import torch

from tinylm import backend
from tinylm.config import ModelConfig
from tinylm.model import TinyLM
from tinylm.stack import Lane, Stack, Update

MARGIN = 1.08  # how much faster than the plainer way a way must be
ROUNDS = 7
MODEL = ModelConfig(vocab_size=512, hidden_size=64, num_layers=2, num_heads=4, max_seq_len=128)
WINDOWS = 16


def measure() -> dict:
    """``bf16``, ``compile`` and ``query_blocks``, and beside them what each way took: seconds a step by name, and the
    speed of a bf16 product in units of the fp32 one."""
    torch.set_num_threads(1)
    speedup = product_seconds(torch.float32) / product_seconds(torch.bfloat16)
    steps = {"eager": _step()}
    if backend.cpp_compiler():
        steps["compiled"] = _step(compile=True)
        steps["compiled, 2-block attention"] = _step(compile=True, query_blocks=2)
        if speedup > 1.5:  # native; emulated, it is several times slower
            steps["compiled, bf16"] = _step(compile=True, precision="bf16")
            steps["compiled, bf16, 2-block attention"] = _step(compile=True, precision="bf16", query_blocks=2)
    took = seconds(steps)
    best = "eager"
    for name in steps:  # from plain to less plain
        if took[name] * MARGIN < took[best]:
            best = name
    return {
        "bf16": "bf16" in best,
        "compile": "compiled" in best,
        "query_blocks": 2 if "2-block" in best else 1,
        "seconds_per_step": {name: round(value, 6) for name, value in took.items()},
        "bf16_product_speed": round(speedup, 2),
        "machine": backend.machine(),
    }


def seconds(steps: dict) -> dict:
    """Median seconds of each step, measured in turns after one that is not counted."""
    for step in steps.values():
        step()
    took: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            took[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in took.items()}


def product_seconds(dtype: torch.dtype, size: int = 512) -> float:
    """Seconds of a square matrix product, the best of several."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return best


def _step(**changes):
    plain = {"device": "cpu", "precision": "fp32", "compile": False, "query_blocks": 1, "stacked": False}
    stack = Stack([Lane(TinyLM(MODEL))], {**plain, **changes})
    ids = torch.randint(0, MODEL.vocab_size, (1, WINDOWS, MODEL.max_seq_len + 1))

    def step() -> None:
        _, gradients = stack.gradients(ids[..., :-1], ids[..., 1:])
        stack.update(gradients, [Update(clip=1.0, rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.99)])

    return step


if __name__ == "__main__":
    print(json.dumps(measure()))
