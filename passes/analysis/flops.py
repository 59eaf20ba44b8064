"""Floating-point operations of a graph, counted by torch on fake tensors: nothing is computed."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..ir.graphs import fake_mode
from ..rules.quantised import PRODUCTS, SCALED_PRODUCTS


def flop_counter() -> FlopCounterMode:
    """torch's counter, told that attention on a CPU is attention too, and of products with quantised weights."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    products = dict.fromkeys(filter(None, map(_packet, (*PRODUCTS, *SCALED_PRODUCTS))), _product_flops)
    return FlopCounterMode(display=False, custom_mapping={attention: _attention_flops, **products})


def _packet(name: str) -> Any:
    """The operators of a name such as `aten::mm`; None where its library is not imported."""
    namespace, _, op = name.partition("::")
    return getattr(getattr(torch.ops, namespace), op, None)


def node_flops(module: GraphModule) -> dict[Node, int]:
    """FLOPs of each node that has any: products, convolutions and attention, two for each multiply-add."""
    counts: dict[Node, int] = {}

    class Count(Interpreter):
        def run_node(self, n: Node) -> Any:
            with flop_counter() as counter:
                result = super().run_node(n)
            if total := counter.get_total_flops():
                counts[n] = int(total)
            return result

    inputs = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
    with fake_mode(module):
        Count(module).run(*inputs, enable_io_processing=False)
    return counts


def graph_flops(module: GraphModule) -> int:
    """FLOPs of one call of a graph."""
    return sum(node_flops(module).values())


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _product_flops(rows: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return int(2 * prod(out_shape) * rows[-1])
