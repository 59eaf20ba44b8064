"""Sequences that are packed by index: rows of several kinds, each written to the places that an input names.

A model that is given the places of its text and its tokens writes them into one sequence with `index_copy`, and picks
its results out again with `index_select`. Where the places are a run, as packed sequences have them, they are slices,
which the analysis can follow. That is right for these places only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

aten = torch.ops.aten
COPY, SELECT = aten.index_copy.default, aten.index_select.default
MOST_RUNS = 16
"""More make no packed sequence."""
ALIASES = (aten._to_copy.default, aten.to.dtype, aten.to.device, aten.alias.default, aten.contiguous.default)
"""Operators whose result names the same places."""


def slices_for_places(module: GraphModule, values: Mapping[str, Any]) -> set[str]:
    """Read and write runs of places as slices, where a sequence is written by index at all; in place.

    Args:
        module: a functional ATen graph.
        values: what inputs hold, by the names of their placeholders.

    Returns the names of the inputs that the graph is right for only if they have these values.
    """
    written = {_input_of(node.args[2]) for node in module.graph.find_nodes(op="call_function", target=COPY)}
    runs = {place: runs_of(values.get(place.name)) for place in written if place is not None}
    settled: set[str] = set()
    for node in [node for node in module.graph.nodes if node.target in (COPY, SELECT)]:
        place = _input_of(node.args[2])
        found = runs.get(place) if place is not None else None
        if not found or place is None:
            continue
        with module.graph.inserting_before(node):
            new = _written(node, found) if node.target is COPY else _read(node, found)
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
        settled.add(place.name)
    if settled:
        module.graph.eliminate_dead_code()
        module.recompile()
    return settled


def runs_of(value: Any) -> list[tuple[int, int]]:
    """The first place and the one behind the last of each run of places that follow each other; empty if too many."""
    if not isinstance(value, torch.Tensor) or value.ndim != 1 or value.is_floating_point():
        return []
    places = value.tolist()
    starts = [n for n, place in enumerate(places) if n == 0 or place != places[n - 1] + 1]
    if len(starts) > MOST_RUNS:
        return []
    return [(places[a], places[b - 1] + 1) for a, b in zip(starts, [*starts[1:], len(places)], strict=True)]


def _input_of(index: Any) -> Node | None:
    """The input that an index is, but for its type."""
    while isinstance(index, Node) and index.target in ALIASES:
        index = index.args[0]
    return index if isinstance(index, Node) and index.op == "placeholder" else None


def _written(node: Node, runs: Sequence[tuple[int, int]]) -> Node:
    """The rows of an `index_copy` put into slices."""
    base, dim, _, source = node.args
    row = 0
    for start, end in runs:
        rows = source if len(runs) == 1 else _call(node, aten.slice.Tensor, source, dim, row, row + end - start)
        base = _call(node, aten.slice_scatter.default, base, rows, dim, start, end)
        row += end - start
    assert isinstance(base, Node)
    return base


def _read(node: Node, runs: Sequence[tuple[int, int]]) -> Node:
    """The rows of an `index_select` taken in slices."""
    base, dim = node.args[:2]
    rows = [_call(node, aten.slice.Tensor, base, dim, start, end) for start, end in runs]
    return rows[0] if len(rows) == 1 else _call(node, aten.cat.default, rows, dim)


def _call(node: Node, target: Any, *args: Any) -> Node:
    """A node in the place of another one, from the same line of the model's code."""
    new = node.graph.call_function(target, args)
    new.meta = {**node.meta, "val": target(*map_arg(args, lambda used: used.meta["val"]))}
    return new
