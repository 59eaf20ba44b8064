"""The cache: what passes from step to step, as typed descriptors found in the edits of a graph."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from torch.fx import Node

from .analyse import Analysis
from .axis import Accumulate, Attend, Keep, Leave, Tokens
from .refusal import module_path, shape_of

Rows = Literal["context", "tokens", "none"]
Group = Literal["key_values", "output", "hidden", "selection"]


@dataclass(frozen=True)
class CacheEntry:
    """One tensor that passes from step to step.

    `rows` says what its dim `dim` counts: the C context tokens (keys and values), all rows of a token axis, or
    nothing that has to do with tokens (a sum over the context, a whole tensor). `module` is the module path it
    comes from. `group` says what it is for: the attentions, the output, hidden states that are needed whole, or which
    tokens are active.
    `initial` is what it must hold before the first step, where that matters.
    """

    name: str
    rows: Rows
    dim: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    module: str
    tokens: Tokens
    group: Group = "key_values"
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
    def num_bytes(self) -> int:
        """Its size in memory."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Budgets:
    """M active and C cached context tokens: all a form's shapes know of a plan."""

    num_active: int
    num_context: int


def cache_layout(analysis: Analysis, budgets: Budgets) -> dict[tuple[Node, str], CacheEntry]:
    """Every cache entry of a graph, by the node it belongs to and its role there, in graph order."""
    layout: dict[tuple[Node, str], CacheEntry] = {}
    numbers: Counter[str] = Counter()
    for node, edits in analysis.edits.items():
        for edit in edits:
            if isinstance(edit, Attend):
                for role, operand in (("key", edit.key), ("value", edit.value)):
                    rows = len(edit.tokens.whole) * budgets.num_context - budgets.num_context
                    shape = with_rows(shape_of(operand), edit.tokens.dim, rows)
                    name = f"{numbers['key_values']}.{role}"
                    layout[node, role] = _entry(operand, name, "context", edit.tokens, node, shape)
                numbers["key_values"] += 1
            elif isinstance(edit, Accumulate):
                name = f"{numbers['key_values']}.sum"
                layout[node, "sum"] = _entry(node, name, "none", edit.left_tokens, node)
                numbers["key_values"] += 1
    for edit, group in _ends(analysis):
        rows_kind: Rows = "tokens" if isinstance(edit, Leave) else "none"
        tokens = edit.tokens if isinstance(edit, Leave) else Tokens(0)
        if (edit.operand, "whole") not in layout:
            layout[edit.operand, "whole"] = replace(
                _entry(edit.operand, str(numbers[group]), rows_kind, tokens, edit.operand), group=group
            )
            numbers[group] += 1
    return layout


def _ends(analysis: Analysis) -> list[tuple[Leave | Keep, Group]]:
    """Where token tensors become whole: first those a reuse step reads, then those inside the model."""
    ends: list[tuple[Leave | Keep, Group]] = [
        (edit, "output" if node in analysis.after else "hidden")
        for node, edits in analysis.edits.items()
        for edit in edits
        if isinstance(edit, Leave | Keep)
    ]
    return sorted(ends, key=lambda end: end[1] == "hidden")


def _entry(
    operand: Node, name: str, rows: Rows, tokens: Tokens, near: Node, shape: tuple[int, ...] | None = None
) -> CacheEntry:
    value = operand.meta["val"]
    return CacheEntry(name, rows, tokens.dim, shape or shape_of(operand), value.dtype, module_path(near), tokens)


def with_rows(shape: tuple[int, ...], dim: int, rows: int) -> tuple[int, ...]:
    """The shape with another size in one dim."""
    return (*shape[:dim], rows, *shape[dim + 1 :])
