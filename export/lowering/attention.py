"""Before opset 23, ONNX has no Attention: it is written as the pattern that engines fuse."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ...passes.ir.refusal import shape_of
from .subject import Lowering, before

aten = torch.ops.aten


def spell_out_attention(lowering: Lowering) -> Lowering:
    """Attention as softmax(q kᵀ) v, the pattern that ONNX engines fuse, where there is no mask."""
    for node in list(lowering.module.graph.nodes):
        if node.target is not aten.scaled_dot_product_attention.default:
            continue
        defaults: tuple[Any, ...] = (None, 0.0, False)
        arguments: tuple[Any, ...] = (*node.args, *defaults[len(node.args) - 3 :])
        query, key, value, mask, _, causal, *_ = arguments
        assert isinstance(query, Node)
        if mask is not None or causal or node.kwargs.get("enable_gqa"):
            continue
        scale = node.kwargs.get("scale")
        if scale is None:
            scale = shape_of(query)[-1] ** -0.5
        call = before(node, "spell_out_attention")
        scaled = call(aten.mul.Tensor, query, scale)
        keys = call(aten.transpose.int, key, -2, -1)
        scores = call(aten.matmul.default, scaled, keys)
        weights = call(aten.softmax.int, scores, -1)
        node.replace_all_uses_with(call(aten.matmul.default, weights, value))
    return lowering
