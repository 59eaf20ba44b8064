"""Capture a graph of Dynamo block by block: what occurs again is captured once and copied.

Gives the same operators as `capture` of the whole graph, in a time that hardly grows with the number of blocks.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from ..errors import UnsupportedGraphError
from ..passes.analysis.normalise import normalise
from ..passes.ir.graphs import graph_module
from ..passes.ir.regions import Region, regions_of
from .capture import Program, export

TRACES = ("stack_trace", "nn_module_stack")


def capture_by_regions(graph: GraphModule) -> Program | None:
    """The program of a graph that Dynamo captured, or None where only a capture of the whole graph can tell.

    That is so where a size is symbolic, where nothing occurs again, where a value other than a tensor goes from one
    region to another, or where a part of the graph refuses to be captured: the whole one gives the reasons.
    """
    values = {node: node.meta.get("example_value") for node in graph.graph.nodes if node.op != "output"}
    if not all(_is_static(value) or _is_idle(node) for node, value in values.items()):
        return None
    regions = regions_of(graph.graph, values.__getitem__, reorder=False)
    if len({region.key for region in regions}) == len(regions):
        return None
    handed_over = {node for region in regions for node in (*region.inputs, *region.outputs)}
    if not all(isinstance(values[node], FakeTensor) for node in handed_over):
        return None
    try:
        return _Copier(graph, values).program(regions)
    except (UnsupportedGraphError, _NotByRegionsError):
        return None


class _NotByRegionsError(Exception):
    """A region is no function of its inputs alone."""


def _is_static(value: Any) -> bool:
    """Whether a value is known: tensors of numbers for sizes and strides, and what these are put together to."""
    leaves = pytree.tree_leaves(value)
    return bool(leaves) and all(
        not any(isinstance(size, torch.SymInt) for size in (*leaf.shape, *leaf.stride()))
        if isinstance(leaf, FakeTensor)
        else isinstance(leaf, int | float | bool | torch.dtype | torch.device)
        for leaf in leaves
    )


def _is_idle(node: Node) -> bool:
    """Whether a node has no value to know: an input that is not used, or a store into a tensor."""
    return not node.users and (node.op == "placeholder" or node.target is operator.setitem)


@dataclass(frozen=True)
class _Captured:
    """A region as exported.

    Attributes:
        exported: the program.
        places: for nodes of it, the place in the region of a node from the same line of the model's code.
    """

    exported: ExportedProgram
    places: dict[Node, int]


class _Copier:
    """Puts captured regions together to one graph."""

    def __init__(self, source: GraphModule, values: dict[Node, Any]) -> None:
        self.source, self.values = source, values
        self.mode = next(value.fake_mode for value in values.values() if isinstance(value, FakeTensor))
        self.graph = Graph()
        self.state: dict[str, torch.Tensor] = {}
        self.captured: dict[Hashable, _Captured] = {}
        self.constants: dict[tuple[Hashable, str], Node] = {}
        self.new: dict[Node, Node] = {}

    def program(self, regions: Sequence[Region]) -> Program:
        """The whole.

        Raises:
            UnsupportedGraphError: a region cannot be captured.
        """
        inputs = []
        for node in self.source.graph.find_nodes(op="placeholder"):
            self.new[node] = self.graph.placeholder(node.name)
            self.new[node].meta["val"] = self.values[node]
            inputs.append(self.new[node].name)
        for region in regions:
            if region.key not in self.captured:
                exported = self._export(region)
                self.captured[region.key] = _Captured(exported, _places(exported.graph_module.graph, region))
            self._copy(region)
        results = self.source.graph.output_node().args[0]
        leaves, out_spec = pytree.tree_flatten(results)
        self.graph.output(tuple(self.new[leaf] if isinstance(leaf, Node) else leaf for leaf in leaves))
        self.graph.lint()
        module = normalise(graph_module(torch.nn.Module(), self.graph))
        in_spec = pytree.tree_structure((tuple(range(len(inputs))), {}))
        targets = {name: name for name in self.state}
        return Program(module, self.state, targets, tuple(inputs), in_spec, out_spec)

    def _export(self, region: Region) -> ExportedProgram:
        exported = export(region.as_module(self.source), [self.values[node] for node in region.inputs], {})
        signature = exported.graph_signature
        if any(spec.kind is not OutputKind.USER_OUTPUT for spec in signature.output_specs):
            raise _NotByRegionsError  # it changes an input: the whole graph knows whose value that is
        if exported.graph_module.graph.find_nodes(op="get_attr"):
            raise _NotByRegionsError
        return exported

    def _copy(self, region: Region) -> None:
        captured = self.captured[region.key]
        exported, places = captured.exported, captured.places
        given = iter(region.inputs)
        copies: dict[Node, Node] = {}
        specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
        nodes = list(exported.graph_module.graph.nodes)
        for node in nodes[:-1]:
            if node.op != "placeholder":
                copies[node] = self.graph.node_copy(node, copies.__getitem__)
                traced = region.nodes[places[node]].meta if node in places else {}
                copies[node].meta = {**node.meta, **{trace: traced[trace] for trace in TRACES if trace in traced}}
            elif specs[node.name].kind is InputKind.USER_INPUT:
                copies[node] = self.new[next(given)]
            else:
                copies[node] = self._constant(region.key, node, exported, specs[node.name].target)
        results = pytree.tree_leaves(nodes[-1].args[0])
        for old, result in zip(region.outputs, results, strict=True):
            self.new[old] = copies[result]

    def _constant(self, key: Hashable, node: Node, exported: ExportedProgram, target: str) -> Node:
        """A tensor that the code makes of numbers, as an input of the whole graph."""
        if (key, node.name) not in self.constants:
            first = next(iter(self.graph.nodes))
            with self.graph.inserting_before(first):
                new = self.constants[key, node.name] = self.graph.placeholder(f"constant_{len(self.constants)}")
            tensors = exported.state_dict if target in exported.state_dict else exported.constants
            self.state[new.name] = tensors[target]
            # All inputs are of one fake mode: each region has one of its own.
            new.meta["val"] = self.mode.from_tensor(tensors[target], static_shapes=True)
        return self.constants[key, node.name]


def _places(graph: Graph, region: Region) -> dict[Node, int]:
    known: dict[Hashable, int] = {}
    for place, node in enumerate(region.nodes):
        known.setdefault(_line(node), place)
    return {node: known[_line(node)] for node in graph.nodes if _line(node) in known}


def _line(node: Node) -> Hashable:
    """The line of the model's code that a node comes from, and the module it runs in."""
    modules = node.meta.get("nn_module_stack") or {}
    return node.meta.get("stack_trace"), tuple(path for path, _ in modules.values())
