"""The cache: what passes from step to step, as typed descriptors."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

from .axis import Tokens

Rows = Literal["context", "tokens", "none"]
EntryGroup = Literal["key_values", "output", "hidden", "selection"]
Role = Literal["key", "value", "sum", "whole", "log_size", "older", "scale", "times", "index", "mass"]


@dataclass(frozen=True)
class CacheEntry:
    """One tensor that passes from step to step.

    Attributes:
        name: within its group, such as `3.key`.
        rows: what its dim `dim` counts: the C context tokens (keys and values), all rows of a token axis, or nothing
            that has to do with tokens (a sum over the context, a whole tensor).
        dim: see `rows`.
        shape: of the tensor.
        dtype: of the tensor.
        module: path of the module that it comes from.
        tokens: how its rows lie along `dim`.
        group: what it is for: the attentions, the output, hidden states that are needed whole, or which tokens are
            active.
        role: what it is within its group: `older` is an earlier value of another entry, `scale` what the numbers of
            another one are multiplied by, `times` when values were computed.
        layer: number of the attention that it belongs to, in graph order; None where it belongs to none.
        initial: what it must hold before the first step, where that matters.
    """

    name: str
    rows: Rows
    dim: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    module: str
    tokens: Tokens
    group: EntryGroup = "key_values"
    role: Role = "whole"
    layer: int | None = None
    initial: float | None = None

    @property
    def input_name(self) -> str:
        """Its name where a form reads it, and its key in a cache dict: `past_key_values.3.key`."""
        return f"past_{self.group}.{self.name}"

    @property
    def output_name(self) -> str:
        """Its name where a form writes it: `present.3.key`."""
        return f"present.{self.name}" if self.group == "key_values" else f"present_{self.group}.{self.name}"

    def empty(self, device: torch.device) -> torch.Tensor:
        """Memory for it, holding what it must hold before the first step."""
        return torch.full(self.shape, self.initial or 0.0, dtype=self.dtype, device=device)

    @property
    def is_context(self) -> bool:
        """Whether it is a key or a value of tokens: what each block has of its own, and most of the cache."""
        return self.group == "key_values" and self.rows == "context"

    @property
    def num_bytes(self) -> int:
        """Its size in memory."""
        return prod(self.shape) * self.dtype.itemsize


def with_rows(shape: tuple[int, ...], dim: int, rows: int) -> tuple[int, ...]:
    """The shape with another size in one dim."""
    return (*shape[:dim], rows, *shape[dim + 1 :])
