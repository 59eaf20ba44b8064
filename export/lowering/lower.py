"""From a form to the graph that is exported: the same graph, in the operators that engines like best.

Nothing here knows what a form computes. Every pass is exact but for the order of floating-point operations.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from ...passes.ir.form import Form
from ...passes.ir.graphs import has_side_effect
from ...passes.ir.refusal import module_path, shape_of
from ...runtime.capture import Program
from .interleave import interleave_writes

aten = torch.ops.aten

FIRST_FUSED_OPSET = 23
"""From here on ONNX has Attention, RMSNormalization and RotaryEmbedding."""
LARGEST_CONSTANT = 64 * 2**20
"""Bytes. A larger constant is cheaper to compute again than to ship."""
LARGEST_MEMBERSHIP = 2**26
"""Zeros and ones that are held at a time (see `sum_by_products`)."""


@dataclass(frozen=True)
class Lowered:
    """A form ready for export.

    Attributes:
        kind: name of the form.
        module: takes `weights`, then the inputs, as its placeholders say; returns a flat tuple.
        weights: tensors behind placeholders, by placeholder name.
        names: what a weight is called in the exported file, by placeholder name.
        inputs: names of the inputs, in order.
        outputs: names of the outputs, in order.
    """

    kind: str
    module: GraphModule
    weights: Mapping[str, torch.Tensor]
    names: Mapping[str, str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def lower(form: Form, program: Program, opset: int) -> Lowered:
    """The exported graph of a form, for one opset."""
    module = GraphModule(form.module, copy.deepcopy(form.module.graph))
    module = interleave_writes(module).graph_module
    weights, names = dict(program.state), dict(program.targets)
    fold_constants(module, weights, names)
    gather_parts(module)
    choose_by_logic(module)
    sum_by_products(module)
    if opset >= FIRST_FUSED_OPSET:
        fuse_rotary_embedding(module)
    else:
        spell_out_attention(module)
    forget_strides(module)
    module.graph.eliminate_dead_code(has_side_effect)
    drop_unused_inputs(module)
    module.graph.lint()
    module.recompile()
    cache_names = {entry.input_name.replace(".", "_"): entry.input_name for entry in form.reads}
    placeholders = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    outputs = [*output_names(program), *(entry.output_name for entry in form.writes)]
    return Lowered(
        form.kind,
        module,
        {name: weights[name] for name in placeholders if name in weights},
        {name: names[name] for name in placeholders if name in weights},
        tuple(cache_names.get(name, name) for name in placeholders if name not in weights),
        tuple(outputs),
    )


def output_names(program: Program) -> list[str]:
    """The model's own names of its outputs, where its output type has names; `sample` otherwise."""
    keys = program.out_spec.context
    count = program.out_spec.num_leaves
    if isinstance(keys, list) and len(keys) == count and all(isinstance(key, str) for key in keys):
        return list(keys)
    return ["sample"] if count == 1 else [f"sample.{number}" for number in range(count)]


def forget_strides(module: GraphModule) -> None:
    """ONNX tensors have no strides: a view is a reshape, whatever the layout of its operand is by now."""
    for node in module.graph.nodes:
        if node.target is aten.view.default:
            node.target = aten.reshape.default


def drop_unused_inputs(module: GraphModule) -> None:
    """Weights and inputs that the form does not need; Python values, which are constants by now."""
    for node in list(module.graph.nodes):
        if node.op == "placeholder" and not node.users:
            module.graph.erase_node(node)


def fold_constants(module: GraphModule, weights: dict[str, torch.Tensor], names: dict[str, str]) -> None:
    """Compute once what depends on the model's buffers only, such as rotary tables. Parameters stay as they are.

    A result becomes a weight, named after the module that computes it.
    """
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
    results = [
        node
        for node in module.graph.nodes
        if node in constant
        and node.op == "call_function"
        and isinstance(node.meta["val"], torch.Tensor)
        and prod(shape_of(node)) * node.meta["val"].dtype.itemsize <= LARGEST_CONSTANT
        and any(user not in constant for user in node.users)
    ]
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


def _evaluate(module: GraphModule, constant: set[Node], weights: Mapping[str, torch.Tensor]) -> dict[Node, Any]:
    """The values of the constant nodes."""
    interpreter = Interpreter(module)
    for node in module.graph.nodes:
        if node in constant:
            value = weights[node.name] if node.op == "placeholder" else interpreter.run_node(node)
            interpreter.env[node] = value.detach() if isinstance(value, torch.Tensor) else value
    return interpreter.env


def gather_parts(module: GraphModule) -> None:
    """Rows of complex tensors (rotary tables) as rows of their real and imaginary parts: ONNX gathers no others."""
    for node in list(module.graph.nodes):
        if node.target is not aten.index_select.default or not node.meta["val"].is_complex():
            continue
        table, dim, index = node.args
        parts = _insert(node, aten.view_as_real.default, table)
        rows = _insert(node, aten.index_select.default, parts, dim % len(shape_of(node)), index)
        node.replace_all_uses_with(_insert(node, aten.view_as_complex.default, rows))


def choose_by_logic(module: GraphModule) -> None:
    """Masks that are filled with a truth value, as `and` and `or`: onnxruntime's Where takes no booleans."""
    for node in list(module.graph.nodes):
        if node.target is not aten.masked_fill.Scalar or node.meta["val"].dtype != torch.bool:
            continue
        mask, where, value = node.args
        if value:
            filled = _insert(node, aten.logical_or.default, mask, where)
        else:
            filled = _insert(node, aten.logical_and.default, mask, _insert(node, aten.logical_not.default, where))
        node.replace_all_uses_with(filled)


def sum_by_products(module: GraphModule) -> None:
    """`index_add` of rows as products with zeros and ones, blockwise: TensorRT has no scatter that adds."""
    for node in list(module.graph.nodes):
        if node.target is not aten.index_add.default or node.kwargs:
            continue
        into, dim, index, rows = node.args
        rank, size = len(shape_of(node)), shape_of(node)[dim]
        if rank == 1:
            rows = _insert(node, aten.unsqueeze.default, rows, 1)
        elif dim % rank != rank - 2:
            continue
        step = max(1, LARGEST_MEMBERSHIP // shape_of(index)[0])
        sums = []
        for start in range(0, size, step):
            end = min(start + step, size)
            numbers = _insert(node, aten.arange.start, start, end, device=index.meta["val"].device)
            belongs = _insert(node, aten.eq.Tensor, _insert(node, aten.unsqueeze.default, numbers, 1), index)
            member = _insert(node, aten.to.dtype, belongs, rows.meta["val"].dtype)
            sums.append(_insert(node, aten.matmul.default, member, rows))
        total = sums[0] if len(sums) == 1 else _insert(node, aten.cat.default, sums, 0 if rank == 1 else dim)
        if rank == 1:
            total = _insert(node, aten.squeeze.dim, total, 1)
        node.replace_all_uses_with(_insert(node, aten.add.Tensor, into, total))


def spell_out_attention(module: GraphModule) -> None:
    """Attention as softmax(q kᵀ) v, the pattern that ONNX engines fuse, where there is no mask."""
    for node in list(module.graph.nodes):
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
        scaled = _insert(node, aten.mul.Tensor, query, scale)
        keys = _insert(node, aten.transpose.int, key, -2, -1)
        scores = _insert(node, aten.matmul.default, scaled, keys)
        weights = _insert(node, aten.softmax.int, scores, -1)
        node.replace_all_uses_with(_insert(node, aten.matmul.default, weights, value))


def fuse_rotary_embedding(module: GraphModule) -> None:
    """`stack([x1 c - x2 s, x1 s + x2 c], -1)` of the pairs (x1, x2) of x is one RotaryEmbedding.

    x is `[B, S, heads, D]`; c and s are `[1 or B, S, 1, D/2]`, in a type at least as wide as that of x.
    """
    for node in list(module.graph.nodes):
        if node.target is not aten.stack.default or (found := _rotary_operands(node)) is None:
            continue
        x, cos, sin = found
        batch, length, heads, width = shape_of(x)
        dtype = cos.meta["val"].dtype
        tables = []
        for table in (cos, sin):
            rows = _insert(node, aten.reshape.default, table, [shape_of(table)[0], length, width // 2])
            if shape_of(rows)[0] != batch:
                rows = _insert(node, aten.expand.default, rows, [batch, -1, -1])
            tables.append(rows)
        flat = _insert(node, aten.reshape.default, x, [batch, length, heads * width])
        if x.meta["val"].dtype != dtype:
            flat = _insert(node, aten.to.dtype, flat, dtype)
        rotate = torch.ops.onnx.RotaryEmbedding.opset23
        rotated = _insert(node, rotate, flat, *tables, interleaved=True, num_heads=heads)
        result = node.meta["val"]
        if result.dtype != dtype:
            rotated = _insert(node, aten.to.dtype, rotated, result.dtype)
        node.replace_all_uses_with(_insert(node, aten.reshape.default, rotated, list(result.shape)))


def _rotary_operands(stack: Node) -> tuple[Node, Node, Node] | None:
    """x, c and s of the pattern above, or None."""
    parts, dim = stack.args[0], stack.args[1] if len(stack.args) > 1 else 0
    if not isinstance(parts, list) or len(parts) != 2 or dim not in (-1, len(shape_of(stack)) - 1):
        return None
    real, imaginary = (_without_cast(part) for part in parts)
    if real.target is not aten.sub.Tensor or imaginary.target is not aten.add.Tensor:
        return None
    products = [_factors(operand) for operand in (*real.args[:2], *imaginary.args[:2])]
    if any(product is None for product in products) or real.kwargs or imaginary.kwargs:
        return None
    (x1, cos), (x2, sin), (y1, sin2), (y2, cos2) = products  # type: ignore[misc]
    if (x1, x2, cos, sin) != (y1, y2, cos2, sin2):
        return None
    pairs = _pairs(x1, x2)
    if pairs is None or len(shape_of(pairs)) != 4:
        return None
    batch, length, _, width = shape_of(pairs)
    allowed = {(1, length, 1, width // 2), (batch, length, 1, width // 2)}
    wide = real.meta["val"].dtype == cos.meta["val"].dtype == sin.meta["val"].dtype
    fits = shape_of(cos) in allowed and shape_of(cos) == shape_of(sin)
    return (pairs, cos, sin) if wide and fits and cos.meta["val"].dtype != torch.float64 else None


def _without_cast(node: Node) -> Node:
    while node.target is aten.to.dtype and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _factors(product: Any) -> tuple[Node, Node] | None:
    if isinstance(product, Node) and product.target is aten.mul.Tensor:
        left, right = product.args
        if isinstance(left, Node) and isinstance(right, Node):
            return left, right
    return None


def _pairs(first: Node, second: Node) -> Node | None:
    """The tensor `[B, S, heads, D]` whose neighbours along D are (`first`, `second`)."""
    operands = [node.args[0] for node in (first, second) if _is_getitem(node)]
    if len(operands) != 2 or operands[0] is not operands[1] or (first.args[1], second.args[1]) != (0, 1):
        return None
    unbind = operands[0]
    if not isinstance(unbind, Node) or unbind.target is not aten.unbind.int:
        return None
    split = unbind.args[0]
    assert isinstance(split, Node)
    if split.target is not aten.view.default or unbind.args[1] not in (-1, len(shape_of(split)) - 1):
        return None
    whole = split.args[0]
    assert isinstance(whole, Node)
    shape = shape_of(whole)
    return whole if shape_of(split) == (*shape[:-1], shape[-1] // 2, 2) else None


def _is_getitem(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _insert(near: Node, op: Any, *args: Any, **kwargs: Any) -> Node:
    """A new node in front of `near`, with its traces and a fake value."""
    graph = near.graph
    with graph.inserting_before(near):
        node = graph.call_function(op, args, kwargs)
    node.meta = {k: near.meta[k] for k in ("stack_trace", "nn_module_stack") if k in near.meta}
    with near.meta["val"].fake_mode:
        node.meta["val"] = op(*pytree.tree_map_only(Node, lambda operand: operand.meta["val"], args), **kwargs)
    return node
