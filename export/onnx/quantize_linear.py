"""Say what a cache in int8 is in ONNX's own operators: `QuantizeLinear` and `DequantizeLinear`, in blocks of a row.

A scale for each token and head is a block of as many numbers as a head has. Blocks came with opset 21; before it the
arithmetic stays spelled out, which every engine knows.
"""

from __future__ import annotations

import onnx_ir as ir

FIRST_BLOCKED_OPSET = 21


def use_quantize_linear(model: ir.Model) -> None:
    """Put the two operators in place of what `passes.forms.store` writes for int8."""
    for node in list(model.graph):
        if node.op_type == "Mul":
            _dequantize(model, node)
        elif node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.INT8:
            _quantize(model, node)


def _dequantize(model: ir.Model, node: ir.Node) -> None:
    """`Mul(Cast(numbers), scale)`."""
    cast, scale = (node.inputs[0].producer() if node.inputs[0] else None), node.inputs[1]
    if cast is None or cast.op_type != "Cast" or scale is None:
        return
    numbers = cast.inputs[0]
    if numbers is None or numbers.dtype != ir.DataType.INT8 or not _is_of_rows(scale, numbers):
        return
    _replace(model, node, "DequantizeLinear", [numbers, scale], {})


def _quantize(model: ir.Model, node: ir.Node) -> None:
    """`Cast(Clip(Round(Div(value, scale))))`: it rounds alike, to even, and holds what the scale lets through."""
    found = node
    for op_type in ("Clip", "Round", "Div"):
        before = found.inputs[0].producer() if found.inputs[0] else None
        if before is None or before.op_type != op_type:
            return
        found = before
    if not _is_of_rows(found.inputs[1], found.inputs[0]):
        return
    _replace(model, node, "QuantizeLinear", list(found.inputs), {"output_dtype": ir.DataType.INT8.value})


def _is_of_rows(scale: ir.Value | None, numbers: ir.Value | None) -> bool:
    """Whether there is a scale for each row of the last axis, as `passes.forms.store` has them."""
    if scale is None or numbers is None or scale.shape is None or numbers.shape is None:
        return False
    return scale.dtype == ir.DataType.FLOAT and list(scale.shape) == [*list(numbers.shape)[:-1], 1]


def _replace(
    model: ir.Model, node: ir.Node, op_type: str, inputs: list[ir.Value | None], attributes: dict[str, int]
) -> None:
    old = node.outputs[0]
    assert old.shape is not None
    width = old.shape[-1]
    assert isinstance(width, int)
    attributes = {**attributes, "axis": -1, "block_size": width}
    new = ir.node(op_type, inputs, attributes=attributes, metadata_props=dict(node.metadata_props))
    new.outputs[0].shape, new.outputs[0].type = old.shape, old.type
    model.graph.insert_before(node, new)
    old.replace_all_uses_with(new.outputs[0], replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
