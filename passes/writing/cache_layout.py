"""Which cache entries a graph has: what its edits say must pass from step to step."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from torch.fx import Node

from ..analysis.analyse import Analysis
from ..ir.axis import Accumulate, Attend, Keep, Leave, Tokens
from ..ir.cache import CacheEntry, EntryGroup, Role, Rows, with_rows
from ..ir.contract import Budgets
from ..ir.refusal import module_path, shape_of


def cache_layout(analysis: Analysis, budgets: Budgets) -> dict[tuple[Node, Role], CacheEntry]:
    """Every cache entry of a graph, by the node it belongs to and its role there, in graph order."""
    layout: dict[tuple[Node, Role], CacheEntry] = {}
    parts: tuple[tuple[Role, Node], ...]
    numbers: Counter[str] = Counter()
    for node, edits in analysis.edits.items():
        for edit in edits:
            if isinstance(edit, Attend):
                parts = (("key", edit.key), ("value", edit.value))
                for role, operand in parts:
                    rows = len(edit.tokens.whole) * budgets.num_context - budgets.num_context
                    shape = with_rows(shape_of(operand), edit.tokens.dim, rows)
                    entry = _entry(operand, "context", edit.tokens, node, shape)
                    layout[node, role] = _of_layer(entry, numbers["key_values"], role)
                numbers["key_values"] += 1
            elif isinstance(edit, Accumulate):
                entry = _entry(node, "none", edit.left_tokens, node)
                layout[node, "sum"] = _of_layer(entry, numbers["key_values"], "sum")
                numbers["key_values"] += 1
    for edit, group in _ends(analysis):
        rows_kind: Rows = "tokens" if isinstance(edit, Leave) else "none"
        tokens = edit.tokens if isinstance(edit, Leave) else Tokens(0)
        if (edit.operand, "whole") not in layout:
            entry = _entry(edit.operand, rows_kind, tokens, edit.operand)
            layout[edit.operand, "whole"] = replace(entry, name=str(numbers[group]), group=group)
            numbers[group] += 1
    return layout


def _ends(analysis: Analysis) -> list[tuple[Leave | Keep, EntryGroup]]:
    """Where token tensors become whole: first those a reuse step reads, then those inside the model."""
    ends: list[tuple[Leave | Keep, EntryGroup]] = [
        (edit, "output" if node in analysis.after else "hidden")
        for node, edits in analysis.edits.items()
        for edit in edits
        if isinstance(edit, Leave | Keep)
    ]
    return sorted(ends, key=lambda end: end[1] == "hidden")


def _entry(operand: Node, rows: Rows, tokens: Tokens, near: Node, shape: tuple[int, ...] | None = None) -> CacheEntry:
    value = operand.meta["val"]
    return CacheEntry("", rows, tokens.dim, shape or shape_of(operand), value.dtype, module_path(near), tokens)


def _of_layer(entry: CacheEntry, layer: int, role: Role) -> CacheEntry:
    return replace(entry, name=f"{layer}.{role}", role=role, layer=layer)
