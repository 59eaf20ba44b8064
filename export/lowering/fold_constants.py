"""What depends on the model's buffers only is computed once and shipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from ...passes.ir.graphs import has_side_effect
from ...passes.ir.refusal import module_path, shape_of
from .subject import Lowering

LARGEST_CONSTANT = 64 * 2**20
"""Bytes. A larger constant is cheaper to compute again than to ship."""


def fold_constants(lowering: Lowering) -> Lowering:
    """Compute once what depends on the model's buffers only, such as rotary tables. Parameters stay as they are.

    A result becomes a weight, named after the module that computes it.
    """
    module, weights, names = lowering.module, dict(lowering.weights), dict(lowering.names)
    constant = _constant_nodes(module, weights)
    results = [node for node in module.graph.nodes if node in constant and _is_worth_shipping(node, constant)]
    values = _evaluate(module, constant, weights)
    first = next(iter(module.graph.nodes))
    for node in results:
        with module.graph.inserting_before(first):
            new = module.graph.placeholder(f"constant_{node.name}")
        new.meta = {"val": node.meta["val"]}
        node.replace_all_uses_with(new)
        weights[new.name] = values[node].contiguous()
        names[new.name] = ".".join(filter(None, (module_path(node), "constants", node.name)))
    module.graph.eliminate_dead_code(has_side_effect)
    return replace(lowering, weights=weights, names=names)


def _constant_nodes(module: GraphModule, weights: Mapping[str, torch.Tensor]) -> set[Node]:
    """Buffers, and what is computed from them alone."""
    constant: set[Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder":
            value = weights.get(node.name)
            if value is not None and not isinstance(value, torch.nn.Parameter):
                constant.add(node)
        elif node.op == "call_function" and all(operand in constant for operand in node.all_input_nodes):
            tags = getattr(node.target, "tags", ())
            if torch.Tag.nondeterministic_seeded not in tags:
                constant.add(node)
    return constant


def _is_worth_shipping(node: Node, constant: set[Node]) -> bool:
    """Whether a constant node is a tensor of the size to ship, and what is not constant reads it."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.Tensor):
        return False
    num_bytes = prod(shape_of(node)) * value.dtype.itemsize
    return num_bytes <= LARGEST_CONSTANT and any(user not in constant for user in node.users)


def _evaluate(module: GraphModule, constant: set[Node], weights: Mapping[str, torch.Tensor]) -> dict[Node, Any]:
    """The values of the constant nodes."""
    interpreter = Interpreter(module)
    for node in module.graph.nodes:
        if node in constant:
            value = weights[node.name] if node.op == "placeholder" else interpreter.run_node(node)
            interpreter.env[node] = value.detach() if isinstance(value, torch.Tensor) else value
    return interpreter.env
