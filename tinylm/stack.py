"""One training step of one model, or of several of one shape at once.

A ``Lane`` is a model with its AdamW state, as flat vectors. A ``Stack`` computes the step of its lanes together, as large
operations where each alone would be many tiny ones, and keeps them apart: no lane's numbers depend on which others it
trains with, and lanes may come from different configs, stand at different steps, and leave at any time.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinylm import backend
from tinylm.model import TinyLM

EPS = 1e-8  # AdamW's, beside the root of the second moment
WHOLE_UP_TO = 3  # layers that are compiled with the loss, as one code; more of them as one code for each block
CHUNK = 1 << 17  # elements of an update that fit a core's cache, with their temporaries


class Lane:
    """A model, and the weights (P,) and moments (P,) of its AdamW (Loshchilov & Hutter 2019). The parameters of the model
    are views into the weights. ``steps`` counts the updates so far."""

    def __init__(self, model: TinyLM):
        self.model, self.steps = model, 0
        self.shapes = [parameter.shape for parameter in model.parameters()]
        weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        self.hold(weights, torch.zeros_like(weights), torch.zeros_like(weights))

    def hold(self, weights: Tensor, first: Tensor, second: Tensor) -> None:
        """Move weights and moments to this storage."""
        self.weights, self.first, self.second = weights, first, second
        for parameter, view in zip(self.model.parameters(), split(weights, self.shapes), strict=True):
            parameter.data = view


@dataclass(frozen=True)
class Update:
    """What AdamW is told for one step of one lane. clip: factor on its gradient."""

    clip: float
    rate: float
    weight_decay: float
    beta1: float
    beta2: float


class Stack:
    """Computes the steps of ``lanes`` as ``arithmetic`` says (see ``backend.resolve``).

    ``arithmetic["stacked"]``: with a leading axis over the lanes, so that every stack computes alike; else there is one
    lane, and its model is as it is. A lone lane of a compiled stack is computed twice, for the sake of the same code.
    """

    def __init__(self, lanes: list[Lane], arithmetic: dict):
        self.lanes, self.stacked = lanes, arithmetic["stacked"]
        if not self.stacked and len(lanes) != 1:
            raise ValueError("only a stack holds more than one lane")
        self.padded = lanes * 2 if self.stacked and arithmetic["compile"] and len(lanes) == 1 else lanes
        self.weights, self.first, self.second = (
            torch.stack([getattr(lane, name) for lane in self.padded])
            if self.stacked
            else getattr(lanes[0], name)[None]
            for name in ("weights", "first", "second")
        )
        for row, lane in enumerate(lanes):
            lane.hold(self.weights[row], self.first[row], self.second[row])
        shapes = lanes[0].shapes
        self.decays = torch.cat(  # weight decay falls on matrices and embeddings, not on norms and biases
            [torch.full((shape.numel(),), float(len(shape) >= 2), device=self.weights.device) for shape in shapes]
        )
        self.model = _sharing(lanes[0].model, split(self.weights if self.stacked else self.weights[0], shapes))
        self.model.compute_with(backend.product_dtype(arithmetic), arithmetic["query_blocks"])
        self.model.train()
        self._parameters = list(self.model.parameters())
        self._adamw = _in_chunks
        if arithmetic["compile"]:
            backend.prepare_to_compile()
            free = (0, 1) if self.stacked else (0,)
            if self.stacked:
                for parameter in self._parameters:
                    torch._dynamo.maybe_mark_dynamic(parameter, 0)
            if len(self.model.blocks) <= WHOLE_UP_TO:
                self.model.loss_of = _compiled(self.model.loss_of, free)
            else:
                for block in self.model.blocks:  # they share their code, so that it is compiled once
                    block.forward = _compiled(block.forward, free)
                self.model.score = _compiled(self.model.score, free)
            self._adamw = _compiled_adamw()
        self._autocast = functools.partial(backend.autocast, arithmetic)

    def gradients(self, inputs: Tensor, targets: Tensor, loss_scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Losses (M,) in nats per token on inputs and targets (M, B, T), and the gradients (M, P) of loss_scale * loss."""
        if len(self.padded) > len(self.lanes):
            inputs, targets = (torch.cat([t] * 2) for t in (inputs, targets))
        if not self.stacked:
            inputs, targets = inputs[0], targets[0]
        with self._autocast():
            losses = self.model.loss(inputs, targets)
        total = losses.sum() if loss_scale == 1 else losses.sum() * loss_scale
        parts = torch.autograd.grad(total, self._parameters)
        rows = len(self.padded)
        return losses.detach().reshape(-1)[: len(self.lanes)], torch.cat([p.reshape(rows, -1) for p in parts], dim=1)

    @torch.no_grad()
    def norms(self, gradients: Tensor) -> Tensor:
        """Length of each lane's gradient, (M,)."""
        return torch.linalg.vector_norm(gradients, dim=1)[: len(self.lanes)]

    @torch.no_grad()
    def update(self, gradients: Tensor, updates: list[Update | None]) -> None:
        """One step of AdamW in each lane, in place; a lane whose update is None keeps its weights, and if it is alone its
        moments too. Overwrites the gradients."""
        if not any(updates):
            return
        rows = []
        for row, (lane, one) in enumerate(zip(self.padded, updates * (len(self.padded) // len(updates)), strict=True)):
            if one is None:
                gradients[row] = 0.0  # it may hold what is not finite
                rows.append((0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
                continue
            count = lane.steps + 1
            decayed = 1 - one.rate * one.weight_decay
            corrections = 1 - one.beta1**count, (1 - one.beta2**count) ** 0.5
            rows.append((one.clip, decayed, 1 - one.beta1, 1 - one.beta2, one.rate / corrections[0], corrections[1]))
        for lane, one in zip(self.lanes, updates, strict=True):
            lane.steps += one is not None
        settings = torch.tensor(rows, device=self.weights.device)
        self._adamw(self.weights, self.first, self.second, gradients, self.decays, settings)


def split(flat: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    """The parameters within flat (P,) or (M, P), each (*shape) or (M, *shape), as views."""
    parts = flat.split([shape.numel() for shape in shapes], dim=-1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]


def _sharing(model: TinyLM, weights: list[Tensor]) -> TinyLM:
    """A model of the same code whose parameters are these tensors."""
    model = copy.deepcopy(model)
    for (name, _), weight in zip(list(model.named_parameters()), weights, strict=True):
        module, _, own = name.rpartition(".")
        setattr(model.get_submodule(module), own, nn.Parameter(weight))
    return model


def _adamw(weights, first, second, gradients, decays, settings) -> None:
    """Algorithm 2 of Loshchilov & Hutter 2019 on rows (M, P), each with settings of its own (M, 6)."""
    clip, decayed, rest1, rest2, rate, root = settings[..., None].unbind(1)
    gradients = gradients * clip
    first.lerp_(gradients, rest1)
    second.lerp_(gradients * gradients, rest2)
    weights.mul_(torch.where(decays > 0, decayed, 1.0))
    weights.sub_(rate * first / (second.sqrt() / root + EPS))


def _in_chunks(weights, first, second, gradients, decays, settings) -> None:
    """The same piece by piece, so that the temporaries of each stay in the cache."""
    width = max(1, CHUNK // len(weights))
    for start in range(0, weights.shape[1], width):
        piece = slice(start, start + width)
        _adamw(*(t[:, piece] for t in (weights, first, second, gradients)), decays[piece], settings)


def _compiled(function: Callable, free: tuple[int, ...]) -> Callable:
    """The function compiled once for all sizes of the ``free`` dimensions of its tensors: stacks of any height and batches
    of any size. A size of one is another code."""
    compiled = torch.compile(function, fullgraph=True)

    def call(x: Tensor, *rest: object) -> Tensor:
        for tensor in (x, *(other for other in rest if isinstance(other, Tensor))):
            for dim in free:
                if tensor.shape[dim] > 1:
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)
        return compiled(x, *rest)

    return call


@functools.cache
def _compiled_adamw():
    return torch.compile(_adamw, fullgraph=True, dynamic=True)
