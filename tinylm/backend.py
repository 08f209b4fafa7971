"""The resolved arithmetic of this machine: what decides the bits of a run beside its configs, text and seed.

One place decides how a run is computed. What is asked for stands in ``TrainConfig`` (device, precision, compile, threads);
what is left open (``precision="auto"``, ``compile=None``) is picked by rules below from what was measured on this machine.
Imports torch only when it is needed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import typing
from pathlib import Path

from tinylm import counts, files
from tinylm.config import ModelConfig, TrainConfig
from tinylm.errors import LabError

if typing.TYPE_CHECKING:
    import torch

NUMERICS_REVISION = 2  # raised by every change to how training computes, so that old records are not taken for new ones

# Compiling costs some ten seconds of a core or more, once for each shape and machine, and a second or two where the code
# is kept. A run shorter than this takes about a minute of a core and would hardly win that back.
FLOPS_WORTH_COMPILING = 2e12
# In a stack of one shape several runs share the code, and a run takes a third less of its time with it (at hidden 16 to 64).
FLOPS_WORTH_COMPILING_IN_A_STACK = 9e10
# A stack pays where the operations of one run are too small to keep a core busy; at twice this size it won nothing.
STACKED_UP_TO = 1 << 15  # channels a step: tokens in a micro-step times hidden_size

LOSS_SCALE = 2.0**16  # what the loss is multiplied by when training begins under fp16

PLAIN_WORDS = "eager, fp32 products, torch's attention"
PLAIN = {"bf16": False, "compile": False, "query_blocks": 1}  # what a machine is taken for until it is measured


def picks(model: ModelConfig, train: TrainConfig) -> dict:
    """What the open choices of a run depend on beside the machine; no two runs that differ here share an arithmetic."""
    channels = train.batch_size * train.resolve(model).seq_len * model.hidden_size
    flops = counts.train_flops(model, train)
    stackable = train.device == "cpu" and (train.threads or 1) == 1 and model.dropout == 0 and train.precision != "fp16"
    return {
        "long": flops >= FLOPS_WORTH_COMPILING,
        "stackable": stackable and channels <= STACKED_UP_TO,
        "long_for_a_stack": flops >= FLOPS_WORTH_COMPILING_IN_A_STACK,
    }


def resolve(train: TrainConfig, model: ModelConfig, in_stacks: bool = False) -> dict:
    """What ``train`` comes to on this machine, as plain values that enter a run's identity: ``device``, ``precision``,
    ``compile``, ``query_blocks`` (of ``attention.blocked_causal``; 1 is torch's kernel), ``threads``, ``stacked`` (only
    where ``in_stacks`` allows it) and ``machine``.

    Raises LabError where the device is unknown or absent, or compile=True finds no C++ compiler.
    """
    device, pick = _device(train.device), picks(model, train)
    if train.compile:
        _need_compiler()
    open_choice = train.precision == "auto" or train.compile is None
    stacked = in_stacks and pick["stackable"]
    long = pick["long_for_a_stack"] if stacked else pick["long"]
    if device.type == "cuda":
        found = _findings_on_gpu()
    else:
        # Who asks for compiling, and leaves the products open, gets those and the attention that suit it at any length.
        found = findings() if open_choice and (long or train.compile) else PLAIN
    compiles = train.compile
    if compiles is None:
        compiler = device.type == "cuda" or cpp_compiler() is not None
        compiles = found["compile"] and long and compiler
    precision = ("bf16" if found["bf16"] else "fp32") if train.precision == "auto" else train.precision
    return {
        "device": str(device),
        "precision": precision,
        "compile": compiles,
        "query_blocks": found["query_blocks"] if compiles else 1,
        "threads": train.threads or os.cpu_count() or 1,
        "stacked": stacked,
        "machine": machine(train.device),
    }


def words(arithmetic: dict) -> str:
    """The path in words: ``compiled, bf16 products, 2-block attention``."""
    parts = ["compiled" if arithmetic["compile"] else "eager", f"{arithmetic['precision']} products"]
    blocks = arithmetic["query_blocks"]
    parts.append(f"{blocks}-block attention" if blocks > 1 else "torch's attention")
    return ", ".join([*parts, "stacked"] if arithmetic["stacked"] else parts)


def machine(device: str = "cpu") -> dict:
    """What the bits of a computation depend on: torch, processor, platform, and under CUDA the GPU."""
    import torch

    known = {
        "torch": torch.__version__,
        "cpu": f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}",
        "platform": f"{platform.system()}-{platform.machine()}",
    }
    if (found := _device(device)).type == "cuda":
        known["gpu"] = f"{torch.cuda.get_device_name(found)}, CUDA {torch.version.cuda}"
    return known


def findings() -> dict:
    """What was measured on this machine, once: ``bf16``, ``compile``, ``query_blocks`` (see ``probe``). Kept in the lab's
    cache. Measured in a process of its own, since what is compiled depends on the threads of the process."""
    path = _kept_findings()
    with contextlib.suppress(OSError, ValueError, TypeError):
        known = json.loads(path.read_text())
        return {name: type(value)(known[name]) for name, value in PLAIN.items()}
    print("measuring this machine, once: eager or compiled, fp32 or bf16 products, which attention", flush=True)
    command = [sys.executable, "-m", "tinylm.probe"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        known = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no word of why"])[-1]
        print(f"the measurement failed ({last}): runs take the plain path", flush=True)
        return dict(PLAIN)
    files.write_whole(path, json.dumps(known, indent=1) + "\n")
    return {name: known[name] for name in PLAIN}


def _kept_findings() -> Path:
    key = files.sha256_bytes(files.canonical_json(machine()).encode())[:16]
    return files.home() / "machines" / f"{key}.json"


def gain(arithmetic: dict) -> float:
    """How many times as fast as eager fp32 a step of this arithmetic was in the probe of this machine; 1 where that did
    not try it."""
    if not arithmetic["compile"]:
        return 1.0
    way = "compiled" + (", bf16" if arithmetic["precision"] == "bf16" else "")
    way += ", 2-block attention" if arithmetic["query_blocks"] == 2 else ""
    try:
        took = json.loads(_kept_findings().read_text())["seconds_per_step"]
        return took["eager"] / took[way]
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return 1.0


def _findings_on_gpu() -> dict:
    import importlib.util

    import torch

    return {
        "bf16": torch.cuda.is_bf16_supported(),
        "compile": importlib.util.find_spec("triton") is not None,
        "query_blocks": 1,
    }


def apply(arithmetic: dict) -> None:
    """Make this process compute as ``resolve`` said. Call it before anything runs or compiles: a later change of
    threads makes Dynamo compile anew.

    On a GPU torch is told to prefer deterministic kernels and warns where it has none (the backward pass of some
    attention kernels): bit-equal resume is promised on the CPU.

    Denormals are left alone: flushing them made no difference to the speed of tiny runs, and the switch reaches only
    threads started after it, so that bits would depend on what ran before.
    """
    import torch

    if torch.get_num_threads() != arithmetic["threads"]:
        torch.set_num_threads(arithmetic["threads"])
    if arithmetic["device"].startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is reproducible only with it
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.cuda.set_device(torch.device(arithmetic["device"]))


def prepare_to_compile() -> None:
    """Keep compiled code in the lab's cache, compile in this process, and never fall back to eager in silence."""
    _need_compiler()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(files.home() / "compiled"))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # its pool of processes would outlive a killed worker
    import torch._dynamo

    torch._dynamo.config.force_parameter_static_shapes = False  # a stack's weights have its height as first dimension
    # Only the sizes that stack.py names may vary within one code. Else, after a second model in the same process, Dynamo
    # would make one code for all widths, half again as slow, whose bits depend on what was compiled before it.
    torch._dynamo.config.automatic_dynamic_shapes = False
    # Every shape of a sweep is one more entry for the same code. With fullgraph=True a full table is an error.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 1024)


def product_dtype(arithmetic: dict) -> torch.dtype | None:
    """In what matrix products are taken by explicit casts; None for fp32, and where autocast does it (``autocast``)."""
    import torch

    explicit = arithmetic["precision"] == "bf16" and arithmetic["device"] == "cpu"
    return torch.bfloat16 if explicit else None


def autocast(arithmetic: dict) -> contextlib.AbstractContextManager:
    """The context in which forward passes run: weights stay fp32, matrix products go down to the precision."""
    import torch

    if arithmetic["precision"] == "fp32" or product_dtype(arithmetic) is not None:
        return contextlib.nullcontext()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[arithmetic["precision"]]
    return torch.autocast(torch.device(arithmetic["device"]).type, dtype=dtype)


def cpp_compiler() -> str | None:
    """Path of the C++ compiler that torch.compile would find, or None."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++", "cl")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _need_compiler() -> None:
    if cpp_compiler() is None:
        raise LabError(
            "compile=True needs a C++ compiler",
            "none of $CXX, c++, g++, clang++, cl on the PATH",
            "install one, or train with compile=False",
        )


def _device(name: str) -> torch.device:
    import torch

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
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
