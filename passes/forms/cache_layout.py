"""Which cache entries a graph has: what its edits say must pass from step to step."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from torch.fx import Node

from ..analysis.analyse import Analysis
from ..ir.axis import Accumulate, Attend, Keep, Leave, Tokens
from ..ir.cache import CacheEntry, Group, Rows, with_rows
from ..ir.contract import Budgets
from ..ir.refusal import module_path, shape_of


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
