"""Several processes that train one run together, as torchrun starts them: gloo between CPUs, nccl between GPUs.

    torchrun --nproc_per_node=2 -m tinylm train ...

What they compute is what DistributedDataParallel computes (Li et al. 2020): each holds the whole model, takes its slice of
the same global batch, and steps with the mean gradient of all. It is done by one sum over the flat row of gradients,
not by wrapping the model. A ``Stack`` takes gradients by torch.autograd.grad, which runs none of the hooks that DDP reduces
in, and into one row, which is what DDP's buckets are there to make; and with the sum after the last micro-step,
accumulation, clipping and loss scaling need no case of their own. What is given up is communication during the
backward pass, which pays where a model is large and its processes lie far apart.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinylm.errors import LabError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

PATIENCE = datetime.timedelta(
    hours=2
)  # for the others, while the first prepares a text; one that ends is noticed at once


class LostProcess(LabError):
    """Another process of the run has ended. What is on disk is as good as it was."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run: number ``rank`` of ``size``, and ``local_rank`` of ``local_size`` on its machine.
    The first, rank 0, alone reads and writes what belongs to the run, and shows its progress.

    Each method that communicates is called by all of them, in the same order; where one is gone, the others get LostProcess.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def own(self, arithmetic: dict) -> dict:
        """A run's arithmetic as this process computes it: with its share of the machine's threads, on its own GPU."""
        device = arithmetic["device"]
        if self.size > 1 and device.startswith("cuda"):
            device = f"cuda:{self.local_rank}"
        return {**arithmetic, "device": device, "threads": max(1, arithmetic["threads"] // self.local_size)}

    def slice_of(self, windows: np.ndarray) -> np.ndarray:
        """The part of the windows (B,) that is this process's; the parts differ by one at most."""
        bounds = [len(windows) * rank // self.size for rank in (self.rank, self.rank + 1)]
        return windows[bounds[0] : bounds[1]]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place, and the same bits in each."""
        if self.size > 1:
            import torch.distributed

            with _together(self):
                torch.distributed.all_reduce(tensor)
        return tensor

    def copy_from_first(self, tensor: Tensor) -> Tensor:
        """What the first process holds, in place."""
        if self.size > 1:
            import torch.distributed

            with _together(self):
                torch.distributed.broadcast(tensor, 0)
        return tensor

    def tell(self, value: object = None) -> object:
        """The first process's value (of JSON), in all of them."""
        if self.size == 1:
            return value
        import torch

        data = json.dumps(value).encode() if self.rank == 0 else b""
        length = self.copy_from_first(torch.tensor(len(data)))
        text = torch.frombuffer(bytearray(data or bytes(int(length))), dtype=torch.uint8)
        return json.loads(bytes(self.copy_from_first(text).numpy()))


ALONE = Ranks()


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The processes that torchrun started beside this one, for the time of a block; ``ALONE`` where it did not."""
    if not all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        yield ALONE
        return
    import torch.distributed

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    here = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if size == 1:
        yield ALONE
        return
    ranks = Ranks(rank, size, *here)
    if device.startswith("cuda"):
        if (count := torch.cuda.device_count() if torch.cuda.is_available() else 0) < ranks.local_size:
            raise LabError(
                "Each process of a run needs a GPU of its own",
                f"device={device!r} for {ranks.local_size} processes on a machine with {count}",
                "lower --nproc_per_node, or use device='cpu'",
            )
        torch.cuda.set_device(ranks.local_rank)
    with _together(ranks):
        kind = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        torch.distributed.init_process_group(kind, timeout=PATIENCE)
    try:
        yield ranks
    except LostProcess:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which would cut our last word off
        raise
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _together(ranks: Ranks) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        told = re.sub(r"^\[[^\]]*\] ", "", str(error))  # without the place in their code
        told = told.partition("\n")[0].partition(". ")[0]
        raise LostProcess(
            "All processes of a run must stay to its end",
            f"process {ranks.rank} of {ranks.size} has lost the others ({told or type(error).__name__})",
            "see above what ended one of them, if it could say; the same command, on any number of processes, goes on from the "
            "last checkpoint",
        ) from error
