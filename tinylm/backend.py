"""The resolved arithmetic of this machine: what decides the bits of a run beside its configs, text and seed."""

from __future__ import annotations

import functools
import os
import platform
import shutil

import torch

from tinylm.config import TrainConfig
from tinylm.errors import LabError

NUMERICS_REVISION = 1  # raised by every change to how training computes, so that old records are not taken for new ones
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(train: TrainConfig) -> dict:
    """What ``train`` comes to on this machine, as plain values that enter a run's identity: ``device``, ``precision``,
    ``compile``, ``attention`` (which kernel), ``threads`` and ``stack`` (torch, CPU, platform, and under CUDA its GPU).

    Raises LabError where the device is unknown or absent, or compile=True finds no C++ compiler.
    """
    device = _device(train.device)
    if train.compile and cpp_compiler() is None:
        raise LabError(
            "compile=True needs a C++ compiler",
            "none of $CXX, c++, g++, clang++, cl on the PATH",
            "install one, or train with compile=False",
        )
    stack = {
        "torch": torch.__version__,
        "cpu": f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}",
        "platform": f"{platform.system()}-{platform.machine()}",
    }
    if device.type == "cuda":
        stack["gpu"] = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return {
        "device": str(device),
        "precision": train.precision,
        "compile": train.compile,
        "attention": "sdpa",
        "threads": train.threads or os.cpu_count() or 1,
        "stack": stack,
    }


def apply(arithmetic: dict) -> None:
    """Make this process compute as ``resolve`` said. Call it before anything runs or compiles: a later change of
    threads makes Dynamo compile anew.

    On a GPU torch is told to prefer deterministic kernels and warns where it has none (the backward pass of some
    attention kernels): bit-equal resume is promised on the CPU.

    Denormals are left alone: flushing them made no difference to the speed of tiny runs, and the switch reaches only
    threads started after it, so that bits would depend on what ran before.
    """
    if torch.get_num_threads() != arithmetic["threads"]:
        torch.set_num_threads(arithmetic["threads"])
    if arithmetic["device"].startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is reproducible only with it
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.cuda.set_device(torch.device(arithmetic["device"]))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which forward passes run: weights stay fp32, matrix products go down to ``precision``."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")


def cpp_compiler() -> str | None:
    """Path of the C++ compiler that torch.compile would find, or None."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++", "cl")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise LabError("device must be cpu, cuda or cuda:<number>", f"device={name!r}", "use device='cpu'")
    if device.type == "cpu":
        return torch.device("cpu")
    module = torch.get_device_module(device)
    count = module.device_count() if module.is_available() else 0
    if (device.index or 0) >= count:
        raise LabError(
            f"device={name!r} needs such a device, and a torch built for it",
            f"{count} {device.type} devices seen by torch {torch.__version__}",
            "use device='cpu', or install the torch build for your accelerator",
        )
    return torch.device(device.type, device.index or 0)


@functools.cache
def _cpu_name() -> str:
    """The processor's name: matrix libraries choose their kernels, and so their rounding, by it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
