"""TensorRT has no scatter that adds: rows are summed by products with zeros and ones."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ...passes.ir.refusal import shape_of
from .subject import Lowering, before

aten = torch.ops.aten

LARGEST_MEMBERSHIP = 2**26
"""Zeros and ones that are held at a time."""


def sum_by_products(lowering: Lowering) -> Lowering:
    """`index_add` along the rows of matrices, or in a vector, as blocks of products with zeros and ones."""
    for node in list(lowering.module.graph.nodes):
        if node.target is not aten.index_add.default or node.kwargs:
            continue
        rank, dim = len(shape_of(node)), node.args[1]
        if rank == 1 or dim % rank == rank - 2:
            node.replace_all_uses_with(_summed(node))
    return lowering


def _summed(node: Node) -> Node:
    """What stands for an `index_add`."""
    call = before(node, "sum_by_products")
    into, dim, index, rows = _operands(node)
    is_vector, size = len(shape_of(node)) == 1, shape_of(node)[dim]
    if is_vector:
        rows = call(aten.unsqueeze.default, rows, 1)
    step = max(1, LARGEST_MEMBERSHIP // shape_of(index)[0])
    sums = []
    for start in range(0, size, step):
        end = min(start + step, size)
        numbers = call(aten.arange.start, start, end, device=index.meta["val"].device)
        belongs = call(aten.eq.Tensor, call(aten.unsqueeze.default, numbers, 1), index)
        member = call(aten.to.dtype, belongs, rows.meta["val"].dtype)
        sums.append(call(aten.matmul.default, member, rows))
    total = sums[0] if len(sums) == 1 else call(aten.cat.default, sums, 0 if is_vector else dim)
    if is_vector:
        total = call(aten.squeeze.dim, total, 1)
    return call(aten.add.Tensor, into, total)


def _operands(node: Node) -> tuple[Node, int, Node, Node]:
    operands: Any = node.args
    into, dim, index, rows = operands
    return into, dim, index, rows
