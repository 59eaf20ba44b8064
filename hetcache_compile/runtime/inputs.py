"""What a graph is given: what may vary between calls, the time, and whether it is finite."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from ..errors import NonFiniteError


def varying_inputs(graph: GraphModule, floats: frozenset[int]) -> Callable[[Sequence[Any]], Hashable]:
    """A function of inputs that tells apart what the graph may be called with.

    Dynamo guards the shapes that it captured, so only symbolic ones and Python values may vary.
    """
    places = list(enumerate(graph.graph.find_nodes(op="placeholder")))
    varying = [n for n, node in places if n not in floats and _may_vary(node.meta.get("example_value"))]
    if not varying and not floats:
        return lambda inputs: None

    def signature(inputs: Sequence[Any]) -> Hashable:
        return signature_of([inputs[n] for n in varying]), tuple(float(inputs[n]) for n in floats)

    return signature


def _may_vary(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return any(isinstance(size, torch.SymInt) for size in value.shape)
    return True


def signature_of(inputs: Sequence[Any]) -> Hashable:
    """What makes a graph static: shapes, strides, types and devices of tensors, values of anything else."""
    return tuple(
        (tuple(value.shape), value.stride(), value.dtype, value.device) if isinstance(value, torch.Tensor) else value
        for value in inputs
    )


def time_value(time: Any) -> float:
    """The time of a step. Where tokens have their own, the latest: those of a given first frame stand at 0."""
    if not isinstance(time, torch.Tensor):
        return float(time)
    return float(time if time.numel() == 1 else time.detach().amax())


def check_finite(latents: Sequence[torch.Tensor], step: int | None, calls: int) -> None:
    """Raise `NonFiniteError` if any of the latents holds NaN or infinity."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in latents):
        where = f"step {step}" if step is not None else f"call {calls}"
        raise NonFiniteError(
            f"the latents of {where} hold NaN or infinity: look at the step before, or at the model's dtype"
        )
