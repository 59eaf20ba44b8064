"""What a lowering pass takes and returns, and how it adds a node."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from ...passes.ir.editor import TRACES
from ...passes.ir.graphs import AddNode


@dataclass(frozen=True)
class Lowering:
    """A form on its way to an engine. A pass edits `module` in place: it is a copy of the form's own.

    Attributes:
        module: a graph in which every tensor node has a fake value.
        weights: tensors behind placeholders, by placeholder name.
        names: what a weight is called in the exported file, by placeholder name.
    """

    module: GraphModule
    weights: Mapping[str, torch.Tensor]
    names: Mapping[str, str]


LoweringPass = Callable[[Lowering], Lowering]


def before(place: Node, name: str) -> AddNode:
    """A function that adds nodes in front of `place`, with its traces, the name of the pass, and a fake value."""

    def call(op: Any, *args: Any, **kwargs: Any) -> Node:
        with place.graph.inserting_before(place):
            node = place.graph.call_function(op, args, kwargs)
        node.meta = {key: place.meta[key] for key in TRACES if key in place.meta}
        node.meta["hetcache"] = name
        with place.meta["val"].fake_mode:
            node.meta["val"] = op(*pytree.tree_map_only(Node, lambda operand: operand.meta["val"], args), **kwargs)
        return node

    return call
