"""Graphs whose M and C are free: one engine for edits with larger and smaller masks.

Nothing in a form but sizes depends on the budgets. So the same form written for two budgets differs exactly where a
size was written down, and each such place becomes "whatever is left" (-1). Where that is not possible, the export is
refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from ...engine.manifest import CacheSpec, DynamicDim, TensorSpec
from ...errors import ExportError
from ...passes.ir.contract import Budgets
from ...plan.plan import Plan
from ..lowering.pipeline import Lowered

aten = torch.ops.aten
S = TypeVar("S", TensorSpec, CacheSpec)

GROWTH = {"num_active": 1, "num_context": 2}
"""By how much each named dim is larger in the second form: the difference tells which dim a size is."""


def dynamic_dims(plan: Plan, active: tuple[int, int, int]) -> dict[str, DynamicDim]:
    """The free dims. C follows M where the plan caches every inactive token; else it stays what it is.

    Raises:
        ExportError: sizes that are out of order, or not around the plan's own.
    """
    smallest, usual, largest = active
    if not 1 <= smallest <= usual <= largest <= plan.num_tokens or not smallest <= plan.num_active <= largest:
        raise ExportError(
            f"--dynamic-active takes MIN:OPT:MAX in order, from 1 to {plan.num_tokens} and around the plan's "
            f"M = {plan.num_active}; got {smallest}:{usual}:{largest}"
        )
    dims = {"num_active": DynamicDim(smallest, usual, largest)}
    if caches_all(plan):
        counts = (budgets_at(plan, size).num_context for size in (largest, usual, smallest))
        dims["num_context"] = DynamicDim(*counts)
    return dims


def budgets_at(plan: Plan, num_active: int) -> Budgets:
    """The budgets of another M: C follows it where the plan caches every inactive token."""
    return Budgets(num_active, plan.num_tokens - num_active if caches_all(plan) else plan.num_context)


def caches_all(plan: Plan) -> bool:
    """Whether every inactive token is cached."""
    return plan.num_active + plan.num_context == plan.num_tokens


def second_budgets(budgets: Budgets, dims: Mapping[str, DynamicDim]) -> Budgets:
    """Budgets that differ from `budgets` in each free dim by its own number (`GROWTH`)."""
    return Budgets(
        budgets.num_active + GROWTH["num_active"] * ("num_active" in dims),
        budgets.num_context + GROWTH["num_context"] * ("num_context" in dims),
    )


def free_sizes(first: Lowered, second: Lowered) -> None:
    """Replace every size in `first` that is another in `second` by -1.

    Raises:
        ExportError: a size that no operator can infer.
    """
    nodes = zip(first.module.graph.nodes, second.module.graph.nodes, strict=True)
    for node, other in nodes:
        if node.op != "call_function":
            continue
        mine, spec = pytree.tree_flatten((list(node.args), dict(node.kwargs)))
        theirs, other_spec = pytree.tree_flatten((list(other.args), dict(other.kwargs)))
        different = [i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if _value(a) != _value(b)]
        if not different and node.target is other.target:
            continue
        sizes = [value for value in mine if isinstance(value, int)]
        inferable = node.target in (aten.reshape.default, aten.view.default) and len(different) == 1
        if spec != other_spec or not (inferable and -1 not in sizes):
            raise ExportError(f"the size of {node.name} ({node.target}) depends on M or C in a way that cannot be free")
        mine[different[0]] = -1
        args, kwargs = pytree.tree_unflatten(mine, spec)
        node.args, node.kwargs = tuple(args), kwargs
        _view_a_copy(node)
    first.module.recompile()


def _view_a_copy(node: Node) -> None:
    """A `view` of a contiguous copy in place of a `reshape`: torch.onnx takes a reshape that has to copy apart, and
    writes the traced size where the -1 stood. ONNX knows no strides, so the copy costs nothing there."""
    if node.target is not aten.reshape.default:
        return
    operand = node.args[0]
    assert isinstance(operand, Node)
    with node.graph.inserting_before(node):
        copied = node.graph.call_function(aten.clone.default, (operand,), {"memory_format": torch.contiguous_format})
    copied.meta = {**operand.meta, "val": operand.meta["val"].clone(memory_format=torch.contiguous_format)}
    node.replace_input_with(operand, copied)
    node.target = aten.view.default


def named_dims(specs: tuple[S, ...], others: tuple[S, ...], dims: Mapping[str, DynamicDim]) -> tuple[S, ...]:
    """Specs of inputs, outputs or cache entries in which the sizes that differ from `others` are names."""
    return tuple(
        replace(spec, shape=_named(spec.shape, other.shape, dims)) for spec, other in zip(specs, others, strict=True)
    )


def _named(
    shape: tuple[int | str, ...], other: tuple[int | str, ...], dims: Mapping[str, DynamicDim]
) -> tuple[int | str, ...]:
    names = {GROWTH[name]: name for name in dims}
    sizes: list[int | str] = []
    for mine, theirs in zip(shape, other, strict=True):
        if mine == theirs:
            sizes.append(mine)
            continue
        assert isinstance(mine, int)
        assert isinstance(theirs, int)
        sizes.append(names[theirs - mine])
    return tuple(sizes)


def _value(value: Any) -> Any:
    """Nodes of two graphs are the same if they have one name."""
    return value.name if isinstance(value, Node) else value
