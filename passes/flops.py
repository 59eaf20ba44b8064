"""Floating-point operations of a graph, node by node, counted by torch on fake tensors."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Interpreter, Node
from torch.utils.flop_counter import FlopCounterMode

from .forms import fake_mode


def node_flops(module: GraphModule) -> dict[Node, int]:
    """FLOPs of each node that has any: products, convolutions and attention, two for each multiply-add."""
    counts: dict[Node, int] = {}

    class Count(Interpreter):
        def run_node(self, n: Node) -> Any:
            with FlopCounterMode(display=False) as counter:
                result = super().run_node(n)
            if total := counter.get_total_flops():
                counts[n] = int(total)
            return result

    inputs = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
    with fake_mode(module):
        Count(module).run(*inputs, enable_io_processing=False)
    return counts
