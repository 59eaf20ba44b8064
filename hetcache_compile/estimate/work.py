"""What a graph asks of a GPU: floating-point operations of products and attention, and bytes moved to and from memory.

*Heavy* operators are those that have FLOPs: products, convolutions, attention. Each reads its operands from memory and
writes its result. All others are light. In a compiled graph light operators that follow each other, with no heavy one
in between, are fused: what only they pass to each other is never in memory. In an eager graph each is a kernel.

Counted from shapes alone, so a reshape that has to copy is free here, as it mostly is in a compiled graph.
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from scipy.cluster.hierarchy import DisjointSet
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from ..passes.analysis.flops import node_flops

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
GATHERS = (aten.index_select.default, aten.gather.default, aten.index.Tensor, aten.embedding.default)
"""They read as much of their first operand as they return."""
IN_PLACE = (aten.index_copy.default, aten.copy_.default)
"""They write into memory that is there already."""
CASTS = (aten._to_copy.default, aten.to.dtype, aten.type_as.default)
"""Of their other operands they read nothing."""


class Operation(NamedTuple):
    """A heavy operator: whether it is attention, its FLOPs, and the bytes of its operands and its result."""

    attends: bool
    flops: int
    bytes: int


@dataclass(frozen=True)
class Work:
    """What one call of a graph asks for.

    Attributes:
        operations: how many heavy operators there are of each kind and size.
        fused_bytes: what light operators move where they are fused.
        eager_bytes: what they move where each is a kernel of its own.
    """

    operations: Counter[Operation] = field(default_factory=Counter)
    fused_bytes: int = 0
    eager_bytes: int = 0

    @property
    def flops(self) -> int:
        """FLOPs, two for each multiply-add."""
        return sum(operation.flops * count for operation, count in self.operations.items())

    @property
    def attention_flops(self) -> int:
        """Those of them that are attention."""
        return sum(one.flops * count for one, count in self.operations.items() if one.attends)

    @property
    def bytes(self) -> int:
        """Bytes moved by a compiled call."""
        return self.fused_bytes + sum(operation.bytes * count for operation, count in self.operations.items())


def work_of(module: GraphModule) -> Work:
    """The work of one call of a graph whose nodes have fake values."""
    flops = node_flops(module)
    fused, eager = _Memory(module, fused=True), _Memory(module, fused=False)
    operations = Counter(Operation(node.target is ATTENTION, flops[node], fused.moved_alone(node)) for node in flops)
    eager_bytes = sum(eager.moved_alone(node) for node in eager.owners if node not in flops)
    return Work(operations, fused.moved_fused(flops), eager_bytes)


class _Memory:
    """Which operators have memory of their own, and what operators read and write of it.

    Attributes:
        nodes: of the graph, in order.
        base: for each node the one in whose memory its value lies.
        owners: the operators that compute something, in order.
    """

    def __init__(self, module: GraphModule, *, fused: bool) -> None:
        self.nodes = list(module.graph.nodes)
        self.base: dict[Node, Node] = {}
        self.owners: list[Node] = []
        for node in self.nodes:
            source = node.args[0] if node.args else None
            is_view = isinstance(source, Node) and node.op == "call_function" and _is_view(node, source, fused)
            # Rows are written in place: the others stay where they are.
            shares = is_view or node.target is aten.index_copy.default
            self.base[node] = self.base[source] if shares and isinstance(source, Node) else node
            if node.op == "call_function" and not is_view:
                self.owners.append(node)

    def reads(self, node: Node) -> Counter[Node]:
        """Bytes that an operator reads, by the node that holds them."""
        found: Counter[Node] = Counter()
        if node.target is aten.copy_.default:
            target, value = node.args[:2]
            assert isinstance(target, Node)
            assert isinstance(value, Node)
            operands = [] if self.base[target] is self.base[value] else [value]
        elif node.target is aten.index_copy.default:
            operands = [one for one in node.all_input_nodes if one is not node.args[0]]
        else:
            operands = node.all_input_nodes[:1] if node.target in CASTS else node.all_input_nodes
        for operand in operands:
            part = _bytes(node) if node.target in GATHERS and operand is node.args[0] else _bytes(operand)
            base = self.base[operand]
            found[base] = min(found[base] + part, _bytes(base))
        return found

    def written(self, node: Node) -> int:
        """Bytes that an operator writes where its result is in memory."""
        if node.target is aten.index_copy.default:
            fresh = node.args[3]
            assert isinstance(fresh, Node)
            return _bytes(fresh)
        if node.target is aten.copy_.default:
            target = node.args[0]
            assert isinstance(target, Node)
            return _bytes(target) if self.reads(node) else 0  # it may have been written there already
        return _bytes(node)

    def moved_alone(self, node: Node) -> int:
        """Bytes that an operator moves as a kernel of its own."""
        return self.reads(node).total() + self.written(node)

    def moved_fused(self, heavy: dict[Node, int]) -> int:
        """Bytes that light operators move where those that follow each other in one stage are one kernel."""
        stage = self._stages(heavy)
        reads = {node: self.reads(node) for node in self.owners}
        kept = {self.base[node] for end in self.nodes if end.op == "output" for node in end.all_input_nodes}
        kernels = DisjointSet(stage)
        for node in self.owners:
            for base in reads[node]:
                if node in stage and stage.get(base) == stage[node]:
                    kernels.merge(base, node)  # passed on inside one kernel
                else:
                    kept.add(base)
        read: defaultdict[Node, Counter[Node]] = defaultdict(Counter)
        for node in stage:
            of_kernel = read[kernels[node]]
            for base, part in reads[node].items():
                if stage.get(base) != stage[node]:
                    of_kernel[base] = min(of_kernel[base] + part, _bytes(base))
        written = sum(self.written(node) for node in stage if node in kept or node.target in IN_PLACE)
        return written + sum(of_kernel.total() for of_kernel in read.values())

    def _stages(self, heavy: dict[Node, int]) -> dict[Node, int]:
        """When each light operator runs: after so many heavy ones, one behind the other, or when it is first needed."""
        depth: dict[Node, int] = {}
        for node in self.nodes:
            depth[node] = max((depth[one] + (one in heavy) for one in node.all_input_nodes), default=0)
        light = {node for node in self.owners if node not in heavy}
        needed: defaultdict[Node, list[int]] = defaultdict(list)
        stage: dict[Node, int] = {}
        for end in reversed(self.nodes):
            if end in light:
                stage[end] = max(depth[end], min(needed[end], default=0))
            if end in light or end in heavy or end.op == "output":
                for base in self.reads(end) if end in light else map(self.base.__getitem__, end.all_input_nodes):
                    needed[base].append(stage.get(end, 0))
        return stage


def _is_view(node: Node, source: Node, fused: bool) -> bool:
    """Whether a node is another look at the memory of its first operand.

    So is a cast that changes nothing, and in fused kernels one to a larger type: it is made anew by each that reads it.
    """
    if node.target is operator.getitem:
        return True
    if node.target in CASTS:
        return _bytes(node) == _bytes(source) or (fused and _bytes(node) > _bytes(source))
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.returns:
        return False
    alias = node.target._schema.returns[0].alias_info
    return alias is not None and not alias.is_write


def _bytes(node: Node) -> int:
    """The size of a node's value."""
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return sum(_tensor_bytes(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor))


def _tensor_bytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())
