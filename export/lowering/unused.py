"""The last pass: what no output needs is not exported."""

from __future__ import annotations

from ...passes.ir.graphs import has_side_effect
from .subject import Lowering


def drop_unused(lowering: Lowering) -> Lowering:
    """Drop dead code; weights and inputs that the form does not need; Python values, which are constants by now."""
    graph = lowering.module.graph
    graph.eliminate_dead_code(has_side_effect)
    for node in list(graph.nodes):
        if node.op == "placeholder" and not node.users:
            graph.erase_node(node)
    return lowering
