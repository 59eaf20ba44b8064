"""Sequences that are packed by index: rows of several kinds, each written to the places that an input names.

A model that is given the places of its text and its tokens writes them into one sequence by index, and picks its
results out again. Where the places are runs, as packed sequences have them, they are slices, which the analysis can
follow. That is right for these places only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ..ir.graphs import AddNode
from ..ir.refusal import shape_of
from .replace import Replacement

aten = torch.ops.aten
MOST_RUNS = 16
"""More make no packed sequence."""
LARGEST = 2**20
"""Places that are computed from inputs. More are left to the graph."""
WRITES = (aten.index_copy.default, aten.index_put.default, aten.scatter_add.default)
READS = (aten.index_select.default, aten.index.Tensor)


def slices_for_places(module: GraphModule, values: Mapping[str, Any]) -> set[str]:
    """Read and write runs of places as slices, where a sequence is written by index at all; in place.

    Args:
        module: a functional ATen graph.
        values: what inputs hold, by the names of their placeholders.

    Returns the names of the inputs that the graph is right for only if they have these values.
    """
    known, write = _Known(values), Replacement(module, "slices_for_places")
    lengths: set[int] = set()
    for node in [node for node in module.graph.nodes if node.target in WRITES]:
        found = _places(node, known)
        if found is not None:
            dim, runs = found
            lengths.add(shape_of(node)[dim])
            write.put(node, _written(write.before(node), node, dim, runs))
    for node in [node for node in module.graph.nodes if node.target in READS] if lengths else []:
        found = _places(node, known)
        if found is not None and shape_of(node.args[0])[found[0]] in lengths:
            write.put(node, _read(write.before(node), node, *found))
    if write.known:
        module.graph.eliminate_dead_code()
        module.recompile()
    return known.used


@dataclass
class _Known:
    """What integers in a graph are, that are computed from inputs alone; and which inputs that is right for."""

    values: Mapping[str, Any]
    used: set[str] = field(default_factory=set)
    _found: dict[Node, tuple[torch.Tensor, frozenset[str]] | None] = field(default_factory=dict)

    def of(self, node: Node) -> tuple[torch.Tensor, frozenset[str]] | None:
        """The value, and the inputs it comes from."""
        if node not in self._found:
            self._found[node] = self._compute(node)
        return self._found[node]

    def _compute(self, node: Node) -> tuple[torch.Tensor, frozenset[str]] | None:
        traced = node.meta.get("val")
        if not isinstance(traced, torch.Tensor) or traced.is_floating_point() or traced.numel() > LARGEST:
            return None
        if node.op == "placeholder":
            value = self.values.get(node.name)
            return (value, frozenset({node.name})) if isinstance(value, torch.Tensor) else None
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return None
        operands = {operand: self.of(operand) for operand in node.all_input_nodes}
        if None in operands.values():
            return None
        args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda used: operands[used][0])  # type: ignore[index]
        result: Any = node.target(*args, **kwargs)  # type: ignore[operator]
        return result, frozenset[str]().union(*(found[1] for found in operands.values() if found))


def _places(node: Node, known: _Known) -> tuple[int, list[tuple[int, int]]] | None:
    """The dim along which a node reads or writes by index, and the runs of places there."""
    dim: int
    index: Any
    if node.target in (aten.index.Tensor, aten.index_put.default):
        indices: Any = node.args[1]
        named = [(dim, index) for dim, index in enumerate(indices) if index is not None]
        accumulates = node.target is aten.index_put.default and len(node.args) > 3 and node.args[3]
        if len(named) != 1 or accumulates or node.kwargs:
            return None
        dim, index = named[0]
    else:
        given: Any = node.args[1]
        dim, index = given % len(shape_of(node)), node.args[2]
    found = known.of(index) if isinstance(index, Node) else None
    if found is None:
        return None
    places = found[0]
    if node.target is aten.scatter_add.default:  # an index for each entry: the same for all along the other dims
        first = places[tuple(slice(None) if d == dim else slice(1) for d in range(places.ndim))]
        if (
            not _fills(node, dim)
            or shape_of(_source(node)) != tuple(places.shape)
            or not torch.equal(places, first.expand_as(places))
        ):
            return None
        places = first.flatten()
    elif node.target is aten.index_put.default and _is_broadcast(node, dim, len(places)):
        return None
    runs = runs_of(places)
    if runs:
        known.used |= found[1]
    return (dim, runs) if runs else None


def _fills(node: Node, dim: int) -> bool:
    """Whether what is written has all of the base's entries along the other dims."""
    base, source = shape_of(node), shape_of(_source(node))
    return len(base) == len(source) and all(
        b == s or d == dim for d, (b, s) in enumerate(zip(base, source, strict=True))
    )


def _is_broadcast(node: Node, dim: int, count: int) -> bool:
    """Whether an `index_put` writes fewer values than there are entries at its places."""
    return shape_of(_source(node))[dim:] != (count, *shape_of(node)[dim + 1 :])


def _source(node: Node) -> Any:
    """What a node writes."""
    return node.args[2 if node.target is aten.index_put.default else 3]


def runs_of(places: torch.Tensor) -> list[tuple[int, int]]:
    """The first place and the one behind the last of each run of places that follow each other; empty if too many."""
    if places.ndim != 1 or places.dtype == torch.bool:
        return []
    rows = places.tolist()
    if not rows:
        return []
    starts = [n for n, place in enumerate(rows) if n == 0 or place != rows[n - 1] + 1]
    runs = [(rows[a], rows[b - 1] + 1) for a, b in zip(starts, [*starts[1:], len(rows)], strict=True)]
    overlap = sum(end - start for start, end in runs) != len(set(rows))
    return [] if len(runs) > MOST_RUNS or overlap or min(runs)[0] < 0 else runs


def _written(call: AddNode, node: Node, dim: int, runs: Sequence[tuple[int, int]]) -> Node:
    """What a node writes, put into slices."""
    base: Any = node.args[0]
    row = 0
    for start, end in runs:
        rows: Any = _source(node)
        if len(runs) > 1:
            rows = call(aten.slice.Tensor, rows, dim, row, row + end - start)
        if node.target is aten.scatter_add.default:
            rows = call(aten.add.Tensor, call(aten.slice.Tensor, base, dim, start, end), rows)
        whole = shape_of(rows) == shape_of(base)
        base = rows if whole else call(aten.slice_scatter.default, base, rows, dim, start, end)
        row += end - start
    assert isinstance(base, Node)
    return base


def _read(call: AddNode, node: Node, dim: int, runs: Sequence[tuple[int, int]]) -> Node:
    """What a node reads, taken in slices."""
    rows = [call(aten.slice.Tensor, node.args[0], dim, start, end) for start, end in runs]
    return rows[0] if len(rows) == 1 else call(aten.cat.default, rows, dim)
