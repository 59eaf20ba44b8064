"""onnxruntime's Where takes no booleans: masks are filled by logic."""

from __future__ import annotations

import torch

from .subject import Lowering, before

aten = torch.ops.aten


def choose_by_logic(lowering: Lowering) -> Lowering:
    """Masks that are filled with a truth value, as `and` and `or`."""
    for node in list(lowering.module.graph.nodes):
        if node.target is not aten.masked_fill.Scalar or node.meta["val"].dtype != torch.bool:
            continue
        call = before(node, "choose_by_logic")
        mask, where, value = node.args
        if value:
            filled = call(aten.logical_or.default, mask, where)
        else:
            filled = call(aten.logical_and.default, mask, call(aten.logical_not.default, where))
        node.replace_all_uses_with(filled)
    return lowering
