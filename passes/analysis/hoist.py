"""Keys and values that no step changes, such as those of the text: computed in front of the graph, not in it.

A model makes them anew in each call, of its weights and of inputs that stay the same over an edit. In a PARTIAL step of
few tokens they are a part of the work that does not shrink with the mask.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from ..ir.graphs import fake_mode, graph_module, has_side_effect
from .inputs import is_state
from .replace import VIEWS

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
NAME = "unchanging"
SPLITS = (
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.tensor_split.sections,
    aten.tensor_split.indices,
)  # fmt: skip
KEYS_AND_VALUES = slice(1, 3)
"""Of an attention's arguments."""


@dataclass(frozen=True)
class Hoisted:
    """A graph in two.

    Attributes:
        before: makes the keys and values, a tuple of tensors that share no memory.
        takes: names of the graph's inputs that it takes, in order: weights, and what they are made of.
        rest: the graph, whose last inputs are these keys and values.
        names: of these inputs.
    """

    before: GraphModule
    takes: tuple[str, ...]
    rest: GraphModule
    names: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Of all these keys and values."""
        return sum(node.meta["val"].nbytes for node in self.before.graph.output_node().all_input_nodes)


def hoist(module: GraphModule, varying: Collection[str]) -> Hoisted | None:
    """Take the keys and values out of a graph that are made of weights and of inputs that do not vary.

    Args:
        module: a functional graph with fake values; it is not changed.
        varying: names of the inputs that are others in each step: latents and the time.

    Returns:
        None if there are none.
    """
    steady = _steady(module.graph, varying)
    attentions = module.graph.find_nodes(op="call_function", target=ATTENTION)
    operands = [node for one in attentions for node in one.args[KEYS_AND_VALUES] if isinstance(node, Node)]
    made = dict.fromkeys(base for base in map(_memory_of, operands) if base in steady and _is_dense(base))
    rest, mode = copy.deepcopy(module.graph), fake_mode(module)
    copies = {node.name: node for node in rest.nodes}
    inputs: dict[Node, Node] = {}
    for number, node in enumerate(made):
        with rest.inserting_after(rest.find_nodes(op="placeholder")[-1]):
            inputs[node] = rest.placeholder(f"{NAME}_{number}")
        inputs[node].meta = {"val": _in_mode(mode, node.meta["val"])}
        copies[node.name].replace_all_uses_with(inputs[node])
    rest.eliminate_dead_code(has_side_effect)
    for node, own in list(inputs.items()):
        if not own.users:  # only others of them are made of it
            rest.erase_node(own)
            del inputs[node]
    if not inputs:
        return None
    names = tuple(own.name for own in inputs.values())
    return Hoisted(*_graph_of(module, list(inputs)), graph_module(module, rest), names)


def _in_mode(mode: FakeTensorMode, value: torch.Tensor) -> torch.Tensor:
    """A fake tensor like one that may be of another mode, as where blocks were captured one by one."""
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def is_unchanging(name: str) -> bool:
    """Whether an input is one of `Hoisted.names`."""
    return re.fullmatch(rf"{NAME}_\d+", name) is not None


def _steady(graph: Graph, varying: Collection[str]) -> set[Node]:
    """Nodes that are computed of weights and of other inputs, none of which varies."""
    of_weights: dict[Node, bool] = {}
    of_others: dict[Node, bool] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            if node.name not in varying:
                of_weights[node] = node.op == "get_attr" or is_state(node.name)
                of_others[node] = not of_weights[node]
        elif node.op == "call_function" and not _draws(node):
            operands = node.all_input_nodes
            if all(one in of_weights for one in operands):
                of_weights[node] = any(of_weights[one] for one in operands)
                of_others[node] = any(of_others[one] for one in operands)
    return {node for node, yes in of_weights.items() if yes and of_others[node]}


def _draws(node: Node) -> bool:
    """Whether a node draws numbers. Attention is known to torch as one that may, because it could drop out."""
    if node.target is ATTENTION:
        return bool((node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0)) != 0)
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _memory_of(node: Node) -> Node:
    """The node whose memory a view shows, or a part that was split off."""
    while node.op == "call_function":
        whole = node
        if node.target is operator.getitem:
            whole = node.all_input_nodes[0]
        if whole.target not in (SPLITS if whole is not node else VIEWS):
            break
        node = whole.all_input_nodes[0]
    return node


def _is_dense(node: Node) -> bool:
    """Whether each number has a place of its own, and no place is left out."""
    value = node.meta["val"]
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return bool(extent == value.numel())


def _graph_of(module: GraphModule, results: list[Node]) -> tuple[GraphModule, tuple[str, ...]]:
    """A graph that computes some nodes of another one, and the inputs that it takes."""
    needed, waiting = set(results), list(results)
    while waiting:
        new = [one for one in waiting.pop().all_input_nodes if one not in needed]
        needed.update(new)
        waiting += new
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in module.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in results))
    takes = tuple(node.name for node in module.graph.nodes if node in needed and node.op == "placeholder")
    return graph_module(module, graph), takes
