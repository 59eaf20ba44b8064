"""ONNX tensors have no strides."""

from __future__ import annotations

import torch

from .subject import Lowering

aten = torch.ops.aten


def forget_strides(lowering: Lowering) -> Lowering:
    """A view is a reshape, whatever the layout of its operand is by now."""
    for node in lowering.module.graph.nodes:
        if node.target is aten.view.default:
            node.target = aten.reshape.default
    return lowering
