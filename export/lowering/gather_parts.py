"""ONNX gathers no complex tensors: rows of them are gathered as real and imaginary parts."""

from __future__ import annotations

import torch

from ...passes.ir.refusal import shape_of
from .subject import Lowering, before

aten = torch.ops.aten


def gather_parts(lowering: Lowering) -> Lowering:
    """Rows of complex tensors (rotary tables) as rows of their real and imaginary parts."""
    for node in list(lowering.module.graph.nodes):
        if node.target is not aten.index_select.default or not node.meta["val"].is_complex():
            continue
        call = before(node, "gather_parts")
        table, dim, index = node.args
        parts = call(aten.view_as_real.default, table)
        rows = call(aten.index_select.default, parts, dim % len(shape_of(node)), index)
        node.replace_all_uses_with(call(aten.view_as_complex.default, rows))
    return lowering
