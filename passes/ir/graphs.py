"""What every writer of graphs needs: shapes checked on fake tensors, what may be dropped, where a graph runs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from .refusal import shape_of

AddNode = Callable[..., Node]
"""`call(op, *args, **kwargs)` adds a node to a graph."""


class VerificationError(AssertionError):
    """A form's graph does not have the shapes that the analysis promised: a wrong rule, never a user's error."""


def graph_module(root: torch.nn.Module, graph: Graph) -> GraphModule:
    """A graph as a module whose Python code is written when it is first looked at or run, which most never are."""
    return _LazyGraphModule(root, graph)


def verify_shapes(module: GraphModule, expected: dict[Node, tuple[int, ...]]) -> None:
    """Run a form on fake tensors, store each result in `meta["val"]`, and compare it with what was promised.

    Calls that are alike are made once: blocks of a deep model are.
    """

    values: dict[Node, Any] = {}
    known: dict[Hashable, Any] = {}

    def value_of(node: Node) -> Any:
        key: Hashable = node.op, node.target, *constants_of(node, lambda operand: exactly(values[operand]))
        try:
            hash(key)
        except TypeError:  # sizes that Dynamo made symbolic are like no other
            key = node
        if key not in known:
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            known[key] = getattr(interpreter, node.op)(node.target, args, kwargs)
        return known[key]

    interpreter = Interpreter(module)
    with fake_mode(module):
        for node in module.graph.nodes:
            if node.op == "output":
                continue
            values[node] = node.meta.get("val") if node.op == "placeholder" else value_of(node)
            node.meta["val"] = values[node]
            if node in expected and shape_of(node) != expected[node]:
                raise VerificationError(
                    f"{node.name} ({node.target}) has shape {shape_of(node)}, expected {expected[node]}"
                )


def described_value(value: Any) -> Hashable:
    """What makes two values alike for a compiler."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device, isinstance(value, torch.nn.Parameter)
    if isinstance(value, tuple | list):
        return tuple(map(described_value, value))
    return type(value), value


def constants_of(node: Node, number: Callable[[Node], Any]) -> tuple[Hashable, Hashable]:
    """The arguments of a node with a number in place of every operand."""
    return _frozen(node.args, number), _frozen(node.kwargs, number)


def _frozen(argument: Any, number: Callable[[Node], Any]) -> Hashable:
    if isinstance(argument, Node):
        return Node, number(argument)
    if isinstance(argument, tuple | list):
        return tuple(_frozen(one, number) for one in argument)
    if isinstance(argument, dict):
        return tuple((name, _frozen(one, number)) for name, one in argument.items())
    if isinstance(argument, slice):
        return slice, *(_frozen(one, number) for one in (argument.start, argument.stop, argument.step))
    return type(argument), argument


def exactly(value: Any) -> Hashable:
    """What of a value decides on the values that are computed from it, for fake tensors."""
    offsets = [one.storage_offset() for one in pytree.tree_leaves(value) if isinstance(one, torch.Tensor)]
    return described_value(value), *offsets


def inline(graph: Graph, name: str, place: Node, function: Callable[..., Any], *operands: Any) -> list[Node]:
    """What a function of tensors does, traced and copied in front of `place`: the nodes of its results.

    Args:
        graph: to copy into.
        name: of the pass.
        place: a node of the graph.
        function: returns a tuple of tensors.
        operands: nodes with a fake value, and Python values, which become part of the trace.
    """
    nodes = [operand for operand in operands if isinstance(operand, Node)]
    values = [node.meta["val"] for node in nodes]

    def of_tensors(*tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        return function(*(next(given) if isinstance(operand, Node) else operand for operand in operands))

    mode = detect_fake_mode(values)
    assert mode is not None, "the graph was not captured on fake tensors"
    with mode:
        # Nodes that are alike may have one fake value, and tracing tells tensors apart by identity.
        values = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device) for v in values]
        traced = make_fx(of_tensors)(*values)
    new: dict[Node, Node] = {}
    given = iter(nodes)
    with graph.inserting_before(place):
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                new[node] = next(given)
            elif node.op == "call_function":
                new[node] = graph.node_copy(node, new.__getitem__)
                new[node].meta = {"val": node.meta["val"], "hetcache": name}
    results = traced.graph.output_node().args[0]
    return [new[result] for result in pytree.tree_leaves(results)]


def has_side_effect(node: Node) -> bool:
    """FX takes attention for a random number generator, because it could drop out; a form has no dropout."""
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output") or (schema is not None and schema.is_mutable)


def fake_mode(module: GraphModule) -> FakeTensorMode:
    """The mode of the fake tensors that the graph was captured on."""
    values = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
    mode = detect_fake_mode(values)
    assert mode is not None, "the graph was not captured on fake tensors"
    return mode


def device_of(inputs: Iterable[Any]) -> torch.device:
    """Where a graph with these inputs runs: the first device of a tensor among them that is not the CPU, if any."""
    devices = [value.device for value in inputs if isinstance(value, torch.Tensor)]
    return next((device for device in devices if device.type != "cpu"), devices[0])
