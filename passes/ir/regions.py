"""Find what repeats in a graph: a model's blocks, so that work can be done once for all that are alike.

    for region in regions_of(graph):        # in order; together they are the whole body
        ...                                 # regions of one `key` compute the same function of their inputs

Nothing is asked of names or of the modules that nodes came from: a block is a run of nodes that occurs again.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from .graphs import constants_of, described_value, graph_module

LEAST = 48
"""Nodes that must not have to be looked at again for a run to count as a repeated one."""
FAR = 0.25
"""A value whose users lie this share of the graph apart belongs to no block: it is computed where it first can be."""
NEAR_BEST = 0.97
"""Of runs that save about the same, the one that hands over fewest values is chosen: whole blocks, not two halves."""

ValueOf = Callable[[Node], Any]


@dataclass(frozen=True)
class Region:
    """A run of nodes as a function.

    Attributes:
        nodes: in order.
        inputs: what they take from outside, in order of first use.
        outputs: those of them that are used outside, here or in another region of the same key.
        key: equal for regions that compute the same function.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    key: Hashable

    def as_module(self, root: torch.nn.Module) -> GraphModule:
        """The region alone, which returns a tuple of its outputs; its placeholders carry the `meta` of its inputs."""
        graph = Graph()
        new: dict[Node, Node] = {}
        for number, node in enumerate(self.inputs):
            new[node] = graph.placeholder(f"input_{number}")
            new[node].meta = dict(node.meta)
        for node in self.nodes:
            new[node] = graph.node_copy(node, new.__getitem__)
        graph.output(tuple(new[node] for node in self.outputs))
        return graph_module(root, graph)


def regions_of(graph: Graph, value_of: ValueOf, *, reorder: bool = True) -> list[Region]:
    """The body of a graph, cut into runs of nodes so that as many as possible are alike; one run if none are.

    Args:
        graph: which has no effects, or none but stores into its inputs if it is to be reordered.
        value_of: what a node is known to hold: tensors are told apart by shape, strides, type and device.
        reorder: see `arranged`.
    """
    body = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    if reorder:
        body = arranged(body)
    if not body:
        return []
    described = {node: described_value(value_of(node)) for node in graph.nodes if node.op != "output"}
    numbers: dict[Hashable, int] = {}
    tokens = [
        numbers.setdefault((node.op, node.target, *constants_of(node, described.__getitem__)), len(numbers))
        for node in body
    ]
    cuts = sorted({0, len(body), *(place for start, end in _repeats(tokens, body) for place in (start, end))})
    runs = [tuple(body[start:end]) for start, end in itertools.pairwise(cuts)]
    return list(_as_regions(runs, described))


def arranged(body: Sequence[Node]) -> list[Node]:
    """The same nodes in another order, which computes the same.

    What far places share comes as early as it can, and is no part of a block. A store comes as early as it can too,
    behind all that read what it overwrites: in the block that computed what is stored.
    """
    place = {node: number for number, node in enumerate(body)}
    stores = [node for node in body if _is_mutable(node)]
    overwritten = {store: _aliases(store.args[0]) for store in stores}
    unsteady = {node for aliases in overwritten.values() for node in aliases}
    early: set[Node] = set()
    for node in reversed(body):
        users = [place[user] for user in node.users if user in place and user not in overwritten]
        is_shared = len(users) > 1 and max(users) - min(users) > FAR * len(body)
        serves_shared = bool(users) and len(users) == len(node.users) and early.issuperset(node.users)
        steady = node not in overwritten and not unsteady & {node, *node.all_input_nodes} and not _is_random(node)
        if (is_shared or serves_shared) and steady:
            early.add(node)
    rank: dict[Node, int] = {}
    for number, node in enumerate(body):
        before = list(node.all_input_nodes)
        if node in overwritten:
            before += [
                reader for alias in overwritten[node] for reader in alias.users if place.get(reader, -1) < number
            ]
        movable = node in early or node in overwritten
        rank[node] = max((rank[other] for other in before if other in rank), default=-1) if movable else number
    return sorted(body, key=lambda node: (rank[node], place[node]))


def _aliases(node: Any) -> set[Node]:
    """A node and all that may be views of it."""
    found: set[Node] = set()
    new = [node] if isinstance(node, Node) else []
    while new:
        one = new.pop()
        if one not in found:
            found.add(one)
            new += [user for user in one.users if _may_alias(user)]
    return found


def _may_alias(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(result.alias_info is not None for result in schema.returns)


def _is_mutable(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _as_regions(runs: Sequence[tuple[Node, ...]], described: dict[Node, Hashable]) -> Iterator[Region]:
    """Runs with their inputs, their keys, and every output that a run of the same key needs."""
    found: list[tuple[tuple[Node, ...], tuple[Node, ...], Hashable]] = []
    needed: dict[Hashable, set[int]] = defaultdict(set)
    for run in runs:
        number = {node: place for place, node in enumerate(run)}
        inputs: dict[Node, int] = {}
        numbered = functools.partial(_number_of, number, inputs)
        calls = tuple((node.op, node.target, *constants_of(node, numbered)) for node in run)
        key: Hashable = calls, tuple(described[node] for node in inputs)
        found.append((run, tuple(inputs), key))
        needed[key] |= {number[node] for node in run if any(user not in number for user in node.users)}
    for run, inputs_of_run, key in found:
        yield Region(run, inputs_of_run, tuple(run[place] for place in sorted(needed[key])), key)


def _number_of(inside: dict[Node, int], inputs: dict[Node, int], node: Node) -> Hashable:
    """The place of a node in its run, or among the run's inputs."""
    return inside[node] if node in inside else ("input", inputs.setdefault(node, len(inputs)))


def _repeats(tokens: Sequence[int], body: Sequence[Node]) -> list[tuple[int, int]]:
    """Where runs that occur again begin and end: the one that saves most, then in what lies between, and so on."""
    segments = [(0, len(tokens))]
    repeats: list[tuple[int, int]] = []
    while True:
        candidates = _candidates(tokens, segments)
        if not candidates:
            return repeats
        most = max(saved for saved, _, _ in candidates)
        best = [(starts, length) for saved, starts, length in candidates if saved >= NEAR_BEST * most]
        starts, length = min(best, key=lambda one: _handed_over(body, one[0][len(one[0]) // 2], one[1]))
        taken = [(start, start + length) for start in starts]
        repeats += taken
        segments = list(_without(segments, taken))


def _without(segments: Sequence[tuple[int, int]], taken: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for begin, end in segments:
        for start, stop in taken:
            if begin <= start and stop <= end:
                if start > begin:
                    yield begin, start
                begin = stop
        if end > begin:
            yield begin, end


def _handed_over(body: Sequence[Node], start: int, length: int) -> int:
    """How many values a run takes from other nodes of the body, and gives to them."""
    inside = set(body[start : start + length])
    taken = {operand for node in inside for operand in node.all_input_nodes if operand.op != "placeholder"} - inside
    given = {node for node in inside if any(user not in inside for user in node.users)}
    return len(taken) + len(given)


def _candidates(tokens: Sequence[int], segments: Sequence[tuple[int, int]]) -> list[tuple[int, tuple[int, ...], int]]:
    """Runs that occur again: nodes saved, where they start, their length."""
    room = [(0, 0)] * len(tokens)
    places: dict[int, list[int]] = defaultdict(list)
    for begin, end in segments:
        for place in range(begin, end):
            room[place] = begin, end
            places[tokens[place]].append(place)
    found: dict[tuple[tuple[int, ...], int], int] = {}
    for anchors in places.values():
        for group, right in _grown(tokens, room, anchors, 1, 0, 1):
            for starts, left in _grown(tokens, room, group, -1, right, 1):
                length = left + right - 1
                saved = (len(starts) - 1) * length
                if saved >= LEAST:
                    found[tuple(start - left + 1 for start in starts), length] = saved
    return [(saved, starts, length) for (starts, length), saved in found.items()]


def _grown(
    tokens: Sequence[int], room: Sequence[tuple[int, int]], group: Sequence[int], way: int, other: int, size: int
) -> Iterator[tuple[list[int], int]]:
    """Groups of places that go on alike in one direction, and how far; where they part, the larger part goes on."""
    group = list(group)
    while len(group) > 1:
        gap = min(b - a for a, b in itertools.pairwise(group))
        if size + max(other - 1, 0) >= gap:
            yield group, size
            return
        following: dict[int, list[int]] = defaultdict(list)
        for place in group:
            at = place + way * size
            begin, end = room[place]
            if begin <= at < end:
                following[tokens[at]].append(place)
        largest = max(following.values(), key=len, default=[])
        if len(largest) < len(group):
            yield group, size
        group, size = largest, size + 1
