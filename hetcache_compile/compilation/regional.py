"""Compile a form block by block: what occurs again is compiled once and called in turn.

Compilers work for minutes on the forms of a deep model, most of it on blocks that differ in their weights alone.
"""

from __future__ import annotations

import logging
import operator
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..passes.ir.regions import Region, regions_of
from .options import Compiled, Compiler

log = logging.getLogger(__name__)
RARE = 0.05
"""What occurs once and is less than this share of a form's nodes runs as it is written: what lies before and behind the
blocks takes as long to compile as they do, and next to none of the time of a call."""
Take = Callable[[Sequence[Any]], tuple[Any, ...]]


@dataclass(frozen=True)
class Link:
    """One call in a chain.

    Attributes:
        run: of the region.
        takes: places of its inputs among all values.
        take: gets them.
        gives: places of its outputs among all values.
        drops: places of values that nothing needs after it.
    """

    run: Compiled
    takes: tuple[int, ...]
    take: Take
    gives: tuple[int, ...]
    drops: tuple[int, ...]


class Chain:
    """A graph as calls of its regions.

    Args:
        links: in order.
        num_values: how many values there are, inputs included.
        results: takes the outputs, of all values.
    """

    def __init__(self, links: Sequence[Link], num_values: int, results: Take) -> None:
        self.links, self.num_values, self.results = links, num_values, results

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """The outputs of the graph."""
        values = list(inputs) + [None] * (self.num_values - len(inputs))
        for link in self.links:
            for place, value in zip(link.gives, link.run(*link.take(values)), strict=True):
                values[place] = value
            for place in link.drops:
                values[place] = None
        return self.results(values)


def compile_by_regions(module: GraphModule, inputs: Sequence[Any], compiler: Compiler, name: str = "graph") -> Compiled:
    """A form, compiled: as a chain of regions where blocks occur again, else as a whole.

    Args:
        module: whose nodes have fake values, and whose outputs are a flat tuple.
        inputs: like those it will get; the last ones may be missing, and are made up where they are needed.
        compiler: of each region.
        name: for the log.
    """
    graph = module.graph
    regions = regions_of(graph, lambda node: node.meta.get("val"))
    keys = {region.key for region in regions}
    handed_over = {node for region in regions for node in (*region.inputs, *region.outputs)}
    if len(keys) == len(regions) or not all(_is_plain_tensor(node) for node in handed_over):
        return compile_whole(module, inputs, compiler, name)
    given = dict(zip(graph.find_nodes(op="placeholder"), inputs, strict=False))
    counts = Counter(region.key for region in regions)
    num_nodes = sum(len(region.nodes) for region in regions)
    worth = {region.key for region in regions if counts[region.key] > 1 or len(region.nodes) > RARE * num_nodes}
    ready: dict[Hashable, Compiled] = {}
    for region in regions:
        if region.key in ready:
            continue
        if region.key not in worth:
            ready[region.key] = region.as_module(module)
            continue
        start = time.perf_counter()
        number = len(worth & ready.keys()) + 1
        examples = [given[node] if node in given else _example(node) for node in region.inputs]
        ready[region.key] = compiler(region.as_module(module), examples)
        log.info("compiled part %d of %d of the %s, %.1f s", number, len(worth), name, time.perf_counter() - start)
    return _chain(module, regions, ready)


def compile_whole(module: GraphModule, inputs: Sequence[Any], compiler: Compiler, name: str = "graph") -> Compiled:
    """A form, compiled as one graph; see `compile_by_regions`."""
    start = time.perf_counter()
    missing = module.graph.find_nodes(op="placeholder")[len(inputs) :]
    compiled = compiler(module, [*inputs, *map(_example, missing)])
    log.info("compiled the %s, %d nodes, %.1f s", name, len(module.graph.nodes), time.perf_counter() - start)
    return compiled


def _is_plain_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _example(node: Node) -> torch.Tensor:
    """A real tensor like a node's value, for compilers that look at one."""
    value = node.meta["val"]
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _chain(module: GraphModule, regions: Sequence[Region], compiled: dict[Hashable, Compiled]) -> Chain:
    placeholders = module.graph.find_nodes(op="placeholder")
    place: dict[Node, int] = {node: number for number, node in enumerate(placeholders)}
    for region in regions:
        for node in region.outputs:
            place[node] = len(place)
    results = module.graph.output_node().args[0]
    assert isinstance(results, tuple)
    last: dict[Node, int] = {}
    for number, region in enumerate(regions):
        for node in (*region.outputs, *region.inputs):
            last[node] = number
    kept = {*placeholders, *(node for node in results if isinstance(node, Node))}
    links = []
    for number, region in enumerate(regions):
        drops = tuple(place[node] for node in last if last[node] == number and node not in kept)
        takes, gives = (tuple(place[node] for node in nodes) for nodes in (region.inputs, region.outputs))
        links.append(Link(compiled[region.key], takes, _taker(takes), gives, drops))
    constants = [node for node in results if not isinstance(node, Node)]
    take = _taker([place[node] if isinstance(node, Node) else len(place) + constants.index(node) for node in results])
    return Chain(links, len(place), take if not constants else lambda values: take([*values, *constants]))


def _taker(places: Sequence[int]) -> Take:
    if not places:
        return lambda values: ()
    if len(places) == 1:
        only = places[0]
        return lambda values: (values[only],)
    return operator.itemgetter(*places)
