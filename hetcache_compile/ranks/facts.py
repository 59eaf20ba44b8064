"""What ranks must have in common, in a few bytes: ranks that differ would compute something that is nobody's result."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from ..plan.plan import Plan

Facts = Mapping[str, Any]
"""By name, what has to be the same on every rank."""


def facts_of_plans(plans: Sequence[Plan]) -> Facts:
    """Every field of every plan, arrays as their hashes."""
    return {
        f"{one.name} of the plan" if len(plans) == 1 else f"{one.name} of plan {number}": _digest(
            getattr(plan, one.name)
        )
        for number, plan in enumerate(plans)
        for one in fields(plan)
    }


def _digest(value: Any) -> str:
    data = repr((value.shape, value.dtype.str)).encode() + value.tobytes() if isinstance(value, np.ndarray) else None
    return hashlib.sha256(repr(value).encode() if data is None else data).hexdigest()


def checksum(tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """Of each tensor its shape, its type, and sums of its bits as integers, weighed by where they stand.

    It reads every byte twice, on the tensor's own device, and waits for it.
    """
    sums = [_sum(_bits(tensor.detach())) for tensor in tensors]
    shapes = tuple((tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors)
    return (*shapes, *(torch.stack([one.to(sums[0].device) for one in sums]).tolist() if sums else ()))


def _sum(bits: torch.Tensor) -> torch.Tensor:
    """An int64 that is another one where numbers change, or change places: odd weights for rows and for columns."""
    table = bits.reshape(-1, bits.shape[-1]) if bits.ndim and bits.numel() else bits.reshape(-1, 1)
    parts = []
    for dim, factor in ((1, 3), (0, 5)):
        line = table.sum(dim, dtype=torch.int64)
        weight = torch.arange(line.numel(), device=line.device, dtype=torch.int64).mul_(2).add_(1).mul_(factor)
        parts.append((line * weight).sum())
    return torch.stack(parts).sum()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return real.contiguous().view(kinds[real.element_size()])


def differences(facts: Sequence[Facts]) -> dict[str, list[int]]:
    """The names of facts that some ranks have otherwise than the first, and these ranks."""
    first = facts[0]
    names = dict.fromkeys(name for one in facts for name in one)
    found = {name: [r for r, one in enumerate(facts) if one.get(name) != first.get(name)] for name in names}
    return {name: ranks for name, ranks in found.items() if ranks}
