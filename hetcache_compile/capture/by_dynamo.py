"""Capture a model whose weights are of a class of their own, such as diffusers' GGUF ones and those of bitsandbytes.

Such a weight is a parameter with more to it than its data: attributes, and methods that its layer calls.
`torch.export` puts a bare tensor in its place, which has none of them. Dynamo sees the weight itself. So it writes the
call down, with all weights as inputs of the graph, and that graph is captured.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from ..passes.analysis.inputs import is_state
from ..passes.ir.graphs import graph_module
from ..passes.ir.refusal import Refusal, UnsupportedGraphError
from .capture import Program, capture, first_line, is_more_than_data, with_input_names
from .subclasses import Unwrapping


def capture_model(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Program:
    """Capture one call of any model, with static shapes.

    Raises:
        UnsupportedGraphError: the call cannot be captured.
    """
    by_class = any(is_more_than_data(weight) for weight in model.parameters())
    return (capture_by_dynamo if by_class else capture)(model, args, kwargs)


def capture_by_dynamo(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Program:
    """Capture one call of `model`, which is made for that, with static shapes.

    Raises:
        UnsupportedGraphError: the call cannot be captured.
    """
    try:
        graph, given, outputs, result = _call(model, args, kwargs)
    except Exception as error:
        reason = f"Dynamo cannot capture it: {type(error).__name__}: {first_line(error)}"
        raise UnsupportedGraphError([Refusal(reason, module=type(model).__name__)]) from error
    unwrapped = Unwrapping(graph)
    leaves, in_spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    results, out_spec = pytree.tree_flatten(result)
    graph, values = _arranged(unwrapped.graph, unwrapped(given), leaves, _places(results, outputs))
    names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    program = with_input_names(capture(graph, values, {}), names)
    weights = dict(zip(program.inputs[len(leaves) :], values[len(leaves) :], strict=True))
    held = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    known = {id(tensor): name for name, tensor in held}
    return replace(
        program,
        state={**program.state, **weights},
        targets={**program.targets, **{name: known.get(id(weight), name) for name, weight in weights.items()}},
        inputs=program.inputs[: len(leaves)],
        in_spec=in_spec,
        out_spec=out_spec,
    )


def _call(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[GraphModule, Sequence[Any], Sequence[Any], Any]:
    """The graph of a call, what that was called with and returned, and what the model returned."""
    kept: list[tuple[GraphModule, Sequence[Any], Sequence[Any]]] = []

    def keep(graph: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            kept.append((graph, inputs, graph(*inputs)))
            return kept[-1][2]

        return run

    # A hook of accelerate moves the model to its device before each call, which is no part of what is computed.
    called: Any = model._old_forward if hasattr(model, "_hf_hook") and "forward" in vars(model) else model
    compiled: Any = torch.compile(called, backend=keep, fullgraph=True, dynamic=False)
    # Every capture counts as one more compilation of the model.
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=torch.iinfo(torch.int32).max):
        result = compiled(*args, **kwargs)
    if len(kept) != 1:
        raise RuntimeError(f"it is cut into {len(kept)} graphs: TORCH_LOGS=graph_breaks says where")
    return *kept[0], result


def _places(results: Sequence[Any], outputs: Sequence[Any]) -> list[Any]:
    """For each leaf of a model's output the number of the graph's output, in a tuple; a constant as it is.

    Raises:
        UnsupportedGraphError: a tensor comes from elsewhere.
    """
    numbers = {id(output): (number,) for number, output in enumerate(outputs)}
    if any(isinstance(leaf, torch.Tensor) and id(leaf) not in numbers for leaf in results):
        raise UnsupportedGraphError([Refusal("the model returns a tensor that its graph does not compute")])
    return [numbers[id(leaf)] if isinstance(leaf, torch.Tensor) else leaf for leaf in results]


def _arranged(
    source: GraphModule, given: Sequence[Any], leaves: Sequence[Any], places: Sequence[Any]
) -> tuple[GraphModule, list[Any]]:
    """The graph with the call's inputs first, all of them and in order, then the weights; and a value for each.

    Raises:
        UnsupportedGraphError: an input of the graph is neither.
    """
    graph = Graph()
    inputs = list(source.graph.find_nodes(op="placeholder"))
    of_value = {id(value): node for node, value in zip(inputs, given, strict=True)}
    new: dict[Node, Node] = {}
    for number, leaf in enumerate(leaves):
        node = of_value.get(id(leaf)) if isinstance(leaf, torch.Tensor) else None
        place = graph.placeholder(f"unused_{number}" if node is None or node in new else node.name)
        if node is not None:
            new.setdefault(node, place)
    values = list(leaves)
    for node, value in zip(inputs, given, strict=True):
        if node in new:
            continue
        if not is_state(node.name) and not re.match("l_self_", node.name, re.IGNORECASE):
            raise UnsupportedGraphError([Refusal(f"{node.name} is neither an input of the call nor a weight")])
        new[node] = graph.placeholder(node.name)
        values.append(value)
    for node in source.graph.nodes:
        if node.op not in ("placeholder", "output"):
            new[node] = graph.node_copy(node, new.__getitem__)
    results: Any = source.graph.output_node().args[0]
    graph.output(tuple(new[results[place[0]]] if isinstance(place, tuple) else place for place in places))
    return graph_module(source, graph), values
