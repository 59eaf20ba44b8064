"""The rows of a token axis as an index: M active tokens and every row that is no token, however the dim is folded."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .axis import Tokens
from .graphs import AddNode

aten = torch.ops.aten


def rows_of(tokens: Tokens, selected: Node, num_tokens: int, device: torch.device, call: AddNode) -> Node:
    """The positions along a token axis (in the full form) of the selected tokens and of all whole rows, in order."""
    if tokens.plain:
        return selected
    parts: list[Node] = []
    start = 0
    for number, length in enumerate(tokens.whole):
        if number:
            parts.append(_shifted(selected, start - num_tokens, call))
        if length:
            parts.append(call(aten.arange.start, start, start + length, dtype=torch.int64, device=device))
        start += length + num_tokens
    rows = parts[0] if len(parts) == 1 else call(aten.cat.default, parts)
    if tokens.folds == 1:
        return rows
    return _folded(rows, tokens, num_tokens, device, call)


def mask_of(tokens: Tokens, active: Node, call: AddNode) -> Node:
    """Bool `[size]`: which positions along a token axis hold active tokens, or rows that are no tokens.

    Args:
        tokens: how rows lie along the dim.
        active: bool `[N]`.
        call: adds nodes.
    """
    parts: list[Node] = []
    for number, length in enumerate(tokens.whole):
        if number:
            parts.append(active)
        if length:
            parts.append(call(aten.new_ones.default, active, [length]))
    rows = parts[0] if len(parts) == 1 else call(aten.cat.default, parts)
    if tokens.folds == 1:
        return rows
    size = sum(tokens.whole) + (len(tokens.whole) - 1) * active.meta["val"].shape[0]
    folded = call(aten.expand.default, call(aten.view.default, rows, [1, size, 1]), [tokens.outer, size, tokens.inner])
    return call(aten.reshape.default, folded, [-1])


def runs_of(tokens: Tokens, selected: Node, num_tokens: int, call: AddNode) -> Node:
    """The positions of the selected tokens in every run of a token axis that is not folded."""
    parts, start = [], 0
    for length in tokens.whole[:-1]:
        start += length
        parts.append(_shifted(selected, start, call))
        start += num_tokens
    return parts[0] if len(parts) == 1 else call(aten.cat.default, parts)


def _shifted(index: Node, offset: int, call: AddNode) -> Node:
    return call(aten.add.Scalar, index, offset) if offset else index


def _folded(rows: Node, tokens: Tokens, num_tokens: int, device: torch.device, call: AddNode) -> Node:
    """Positions in a dim that runs over outer x rows x inner."""

    def steps(count: int, step: int, shape: list[int]) -> Any:
        numbers = call(aten.arange.start_step, 0, count * step, step, dtype=torch.int64, device=device)
        return call(aten.view.default, numbers, shape)

    index = call(aten.view.default, call(aten.mul.Scalar, rows, tokens.inner), [1, -1, 1])
    index = call(aten.add.Tensor, index, steps(tokens.outer, tokens.rows(num_tokens) * tokens.inner, [-1, 1, 1]))
    index = call(aten.add.Tensor, index, steps(tokens.inner, 1, [1, 1, -1]))
    return call(aten.view.default, index, [-1])
